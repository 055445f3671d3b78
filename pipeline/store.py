"""Reading shards: samples by number, straight from memory maps, the same for both formats."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from itertools import groupby
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32  # the CRC-32 of zlib, four times as fast

from manyview.pipeline import bucket, codec, index, storage
from manyview.pipeline.errors import UserError
from manyview.pipeline.manifest import MANIFEST, read_manifest

GAP = 128 << 10  # bytes: reading over less than this is cheaper than another request
REQUEST = 128 << 10  # bytes: the kernel cuts a longer read-ahead short without saying so


class Corrupt(UserError):
    """A record whose bytes are not those that were written."""

    def __init__(self, id: int, key: str, reason: str) -> None:
        super().__init__(f"sample {id} ({key}): {reason}")
        self.id, self.key, self.reason = id, key, reason


class Store:
    """One split of shards in a folder, or in a bucket (see `remote`). Reads may come from any number of threads.

    `labels`: (n,) int64, -1 = unlabelled; `heights`, `widths`: (n,) int32, pixels of the stored image. `mean`, `std`: a
    channel, of values 0..255, over the training split. `fingerprint`: identity of this split's samples, the same
    for both formats. `shard_of`: (n,) uint32, the shard a sample lies in.

    UserError: no shards, no such split, another version, an index that is damaged, a shard that is missing or of the wrong
    length (named).
    """

    def __init__(self, path: str | Path, split: str = "train") -> None:
        self.path, self.split = Path(path), split
        manifest = _manifest(self.path)
        if split not in manifest["splits"]:
            raise UserError(f"{storage.where(path)} has no split {split!r}; it has {', '.join(manifest['splits'])}")
        self.manifest, self.name, self.classes = manifest, manifest["name"], manifest["classes"]
        part = manifest["splits"][split]
        self.fingerprint: str = part["fingerprint"]
        self.mean, self.std = statistics(manifest)
        self.shards: list[dict] = part["shards"]
        url = storage.address(path)
        self.bucket = bucket.Bucket(url, manifest, split) if url else None
        self._check_shards()
        self._rows = self._read_index(part)
        self.labels, self.heights, self.widths = (self._rows[name] for name in ("label", "height", "width"))
        self.shard_of = self._rows["shard"]
        self._maps: list[tuple[mmap.mmap, np.ndarray] | None] = [None] * len(self.shards)
        self._lock = threading.Lock()

    def _check_shards(self) -> None:
        paths = [self.path / shard["file"] for shard in self.shards]
        sizes = (
            self.bucket.sizes() if self.bucket else [path.stat().st_size if path.exists() else None for path in paths]
        )
        errors = []
        for shard, path, size in zip(self.shards, paths, sizes):
            if size != shard["bytes"]:
                state = "is missing" if size is None else f"has {size} bytes instead of {shard['bytes']}"
                errors.append(f"shard {storage.where(path)} {state}; make it again or copy it anew")
        if errors:
            raise UserError("\n".join(errors))

    def _read_index(self, part: dict) -> index.Index:
        path = self.path / part["index"]["file"]
        try:
            rows = self.bucket.read_index(part["index"]) if self.bucket else index.read(path)
        except (OSError, ValueError) as error:
            raise UserError(f"index {storage.where(path)}: {error}") from None
        if len(rows) != part["count"]:
            raise UserError(f"index {storage.where(path)} has {len(rows)} rows, the manifest {part['count']}")
        return rows

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, i: int) -> str:
        return self._rows.key(i)

    def read(self, i: int) -> np.ndarray:
        """Sample i's payload (see `codec`), read-only; of a folder, a view of the memory map. Raises `Corrupt`; of a
        bucket also UserError, when it cannot be reached any more."""
        rows = self._rows
        payload = self._payload(i)
        damaged = crc32(payload) != rows["crc"][i]
        if damaged and self.bucket:
            payload = self.bucket.read_again(i)
            damaged = crc32(payload) != rows["crc"][i]
        if damaged:
            raise Corrupt(
                i, self.key(i), f"its bytes in {self.shards[rows['shard'][i]]['file']} have changed (checksum)"
            )
        return codec.view(payload, rows["kind"][i], int(rows["height"][i]), int(rows["width"][i]))

    def prefetch(self, ids: np.ndarray) -> None:
        """Say that these samples ((n,) ids, any order) will be read soon. A hint: it returns at once, brings them into the
        operating system's cache (from a bucket: onto local disk) while others are worked on, and what is wrong with a sample
        shows when it is read."""
        if self.bucket:
            return self.bucket.prefetch(ids)
        if not hasattr(os, "posix_fadvise"):  # macOS has none; its maps read ahead by themselves
            return
        for shard, pieces in groupby(self.ranges(ids), key=lambda one: one[0]):
            with contextlib.suppress(OSError), open(self.path / self.shards[shard]["file"], "rb") as file:
                for _, start, stop in pieces:
                    for at in range(start, stop, REQUEST):
                        os.posix_fadvise(file.fileno(), at, min(REQUEST, stop - at), os.POSIX_FADV_WILLNEED)

    def ranges(self, ids: np.ndarray) -> list[tuple[int, int, int]]:
        """Where these samples lie: (shard, first byte, end), ascending, merged over gaps of up to `GAP` bytes."""
        shard, start, length = (self._rows[name][ids].astype(np.int64) for name in ("shard", "offset", "length"))
        order = np.lexsort((start, shard))
        shard, start, stop = shard[order], start[order], (start + length)[order]
        apart = (shard[1:] != shard[:-1]) | (start[1:] - stop[:-1] > GAP)
        first, last = np.flatnonzero(np.r_[True, apart]), np.flatnonzero(np.r_[apart, True])
        return list(zip(shard[first].tolist(), start[first].tolist(), stop[last].tolist())) if len(order) else []

    def _payload(self, i: int) -> np.ndarray:
        shard, start = int(self._rows["shard"][i]), int(self._rows["offset"][i])
        if self.bucket:
            return self.bucket.read(i)
        mapped, data = self._maps[shard] or self._map(i, shard)
        stop = start + int(self._rows["length"][i])
        if mapped.size() < stop:  # of the file, not of the map; a map of what is no longer there would kill the process
            raise Corrupt(i, self.key(i), f"{self.shards[shard]['file']} has been cut off since it was opened")
        return data[start:stop]

    def _map(self, i: int, shard: int) -> tuple[mmap.mmap, np.ndarray]:
        with self._lock:
            if (found := self._maps[shard]) is None:
                try:
                    with open(self.path / self.shards[shard]["file"], "rb") as file:
                        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                except (OSError, ValueError) as error:  # removed, or emptied, after the shards were checked
                    raise Corrupt(i, self.key(i), f"{self.shards[shard]['file']} cannot be read: {error}") from None
                found = self._maps[shard] = mapped, np.frombuffer(mapped, np.uint8)
            return found

    def nbytes(self) -> int:
        """Bytes of all payloads."""
        return int(self._rows["length"].sum(dtype=np.int64))

    def default_size(self) -> int:
        """View side in pixels: the median short side of the images, at most 224."""
        return min(224, int(np.median(np.minimum(self.heights, self.widths))))

    def close(self) -> None:
        """Forget the memory maps and stop fetching; payloads still held stay valid."""
        if self.bucket:
            self.bucket.close()
        self._maps = [None] * len(self.shards)


def splits(path: str | Path) -> list[str]:
    """Names of the splits of a folder of shards, or of a bucket's. UserError if there are none."""
    return list(_manifest(Path(path))["splits"])


def training_split(path: str | Path) -> str:
    """The split to train on: `unlabelled` where there is one (of STL-10, 100,000 images beside 5,000 with labels), or `train`."""
    return "unlabelled" if "unlabelled" in splits(path) else "train"


def _manifest(path: Path) -> dict:
    manifest = read_manifest(path)
    if manifest is None:
        where = storage.where(path)
        raise UserError(f"no shards in {where} (no {MANIFEST}); `make shards DATASET=… OUT={where}` writes them")
    return manifest


def statistics(manifest: dict) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation a channel, 0..255, of `train` (of the first split where there is no such). A channel that
    hardly varies (of blank or padded channels) gets a tenth of the largest deviation, so that it does not drown the others."""
    part = _measured(manifest)
    floor = max(1.0, max(part["std"]) / 10)
    return tuple(part["mean"]), tuple(max(value, floor) for value in part["std"])


def flat_channels(manifest: dict) -> list[str]:
    """A line for each channel whose deviation `statistics` raises."""
    deviations = zip(("red", "green", "blue"), _measured(manifest)["std"], statistics(manifest)[1])
    return [
        f"channel {name} hardly varies (deviation {own:.2g} of 255): it is normalized as if by {used:.2g}"
        for name, own, used in deviations
        if used > own
    ]


def _measured(manifest: dict) -> dict:
    splits = manifest["splits"]
    return splits.get("train") or next(iter(splits.values()))
