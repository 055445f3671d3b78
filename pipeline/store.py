"""Reading shards: samples by number, checked, the same for both formats."""

from __future__ import annotations

import contextlib
import json
import os
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32  # the CRC-32 of zlib, four times as fast

from manyview.pipeline import bucket, codec, files, index, storage
from manyview.pipeline.errors import UserError, refuse
from manyview.pipeline.manifest import MANIFEST, layout, read_manifest

GAP = 128 << 10  # bytes: reading over less than this is cheaper than another request
REQUEST = 128 << 10  # bytes: the kernel cuts a longer read-ahead short without saying so


class Corrupt(UserError):
    """A record whose bytes are not those that were written."""

    def __init__(self, id: int, key: str, reason: str) -> None:
        super().__init__(f"sample {id} ({key}): {reason}")
        self.id, self.key, self.reason = id, key, reason


class Store:
    """One split of shards in a folder, or in a bucket (see `bucket`). Reads may come from any number of threads.

    `labels`: (n,) int64, -1 = unlabelled; `heights`, `widths`: (n,) int32, pixels of the stored image; `layout`: what those
    are. `mean`, `std`: a channel, of values 0..255 (or 0..65535), over the training split. `fingerprint`: identity of this
    split's samples, the same for both formats. `shard_of`: (n,) uint32, the shard a sample lies in.

    UserError: no shards, no such split, another version, a damaged index, a shard (named) missing or of another length.
    """

    def __init__(self, path: str | Path, split: str = "train") -> None:
        self.path, self.split = Path(path), split
        manifest = _manifest(self.path)
        if split not in manifest["splits"]:
            raise UserError(f"{storage.where(path)} has no split {split!r}; it has {', '.join(manifest['splits'])}")
        self.manifest, self.name, self.classes = manifest, manifest["name"], manifest["classes"]
        part = manifest["splits"][split]
        self.fingerprint: str = part["fingerprint"]
        self.layout = layout(manifest)
        self.mean, self.std = statistics(manifest)
        self.shards: list[dict] = part["shards"]
        url = storage.address(path)
        self.bucket = bucket.Bucket(url, manifest, split) if url else None
        self._check_shards()
        self._rows = self._read_index(part)
        self.labels, self.heights, self.widths = (self._rows[name] for name in ("label", "height", "width"))
        self.shard_of = self._rows["shard"]
        # Some shards stay open, not all: there may be more of them than files that a process may open.
        folder = self.path
        self._open = lru_cache(max(8, files.raise_limit() // 8))(lambda name: files.Opened(folder / name))

    def _check_shards(self) -> None:
        names = [shard["file"] for shard in self.shards]
        sizes = self.bucket.sizes() if self.bucket else [files.size(self.path / name) for name in names]
        errors = []
        for shard, size in zip(self.shards, sizes):
            if size != shard["bytes"]:
                state = "is missing" if size is None else f"has {size} bytes instead of {shard['bytes']}"
                where = storage.where(self.path / shard["file"])
                errors.append(f"shard {where} {state}; make it again or copy it anew")
        refuse(errors)

    def _read_index(self, part: dict) -> index.Index:
        path = self.path / part["index"]["file"]
        try:
            rows = self.bucket.read_index(part["index"]) if self.bucket else index.read(path, part["index"]["sha256"])
            index.check(rows, part, len(self.classes), self.layout)
        except (OSError, ValueError) as error:
            raise UserError(f"index {storage.where(path)}: {error}") from None
        return rows

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, i: int) -> str:
        return self._rows.key(i)

    def read(self, i: int) -> np.ndarray:
        """Sample i's payload (see `codec`), read-only. Raises `Corrupt`; UserError where the disk, the network or this
        machine fails, or a bucket cannot be reached any more."""
        rows = self._rows
        payload = self._payload(i)
        damaged = crc32(payload) != rows["crc"][i]
        if damaged and self.bucket:
            payload = self.bucket.read_again(i)
            damaged = crc32(payload) != rows["crc"][i]
        if damaged:
            name = self.shards[rows["shard"][i]]["file"]
            raise Corrupt(i, self.key(i), f"its bytes in {name} have changed (checksum)")
        return codec.view(payload, rows["kind"][i], int(rows["height"][i]), int(rows["width"][i]), self.layout)

    def prefetch(self, ids: np.ndarray) -> None:
        """Say that these samples ((n,) ids, any order) will be read soon. A hint: it returns at once, brings them into the
        operating system's cache (from a bucket: onto local disk) while others are worked on, and what is wrong with a sample
        shows when it is read."""
        if self.bucket:
            return self.bucket.prefetch(ids)
        if not hasattr(os, "posix_fadvise"):  # macOS has none; it reads ahead by itself
            return
        for shard, pieces in groupby(self.ranges(ids), key=lambda one: one[0]):
            with contextlib.suppress(OSError, UserError):
                file = self._open(self.shards[shard]["file"])
                for _, start, stop in pieces:
                    for at in range(start, stop, REQUEST):
                        file.announce(at, min(REQUEST, stop - at))

    def ranges(self, ids: np.ndarray) -> list[tuple[int, int, int]]:
        """Where these samples lie: (shard, first byte, end), ascending, merged over gaps of up to `GAP` bytes."""
        shard, start, length = (self._rows[name][ids].astype(np.int64) for name in ("shard", "offset", "length"))
        order = np.lexsort((start, shard))
        shard, start, stop = shard[order], start[order], (start + length)[order]
        apart = (shard[1:] != shard[:-1]) | (start[1:] - stop[:-1] > GAP)
        first, last = np.flatnonzero(np.r_[True, apart]), np.flatnonzero(np.r_[apart, True])
        return list(zip(shard[first].tolist(), start[first].tolist(), stop[last].tolist())) if len(order) else []

    def _payload(self, i: int) -> np.ndarray:
        """Copied out of the file: a memory map of one that another process cuts off would kill this one."""
        if self.bucket:
            return self.bucket.read(i)
        name, length = self.shards[self._rows["shard"][i]]["file"], int(self._rows["length"][i])
        try:
            data = self._open(name).read(int(self._rows["offset"][i]), length)
        except OSError as error:  # removed after the shards were checked
            raise Corrupt(i, self.key(i), f"{name} cannot be read: {error.strerror}") from None
        if len(data) < length:
            raise Corrupt(i, self.key(i), f"{name} has been cut off since it was opened")
        return np.frombuffer(data, np.uint8)

    def nbytes(self) -> int:
        """Bytes of all payloads."""
        return int(self._rows["length"].sum(dtype=np.int64))

    @property
    def grey(self) -> bool:
        """Whether its pictures have no color: what is measured of them is the same in every channel, or they are no RGB."""
        return self.layout != codec.RGB or len(set(self.mean)) == len(set(self.std)) == 1

    def refuse_other_than_rgb(self, what: str) -> None:
        """UserError where `what` cannot take these images."""
        if self.layout != codec.RGB:
            raise UserError(f"{what} takes images of {codec.RGB}, {self.name} has {self.layout}")

    def described(self) -> dict[str, str]:
        """What weights trained on it say of the images they want: mean, std, and the layout where it is not RGB."""
        text = {"mean": json.dumps(self.mean), "std": json.dumps(self.std)}
        return text | ({} if self.layout == codec.RGB else {key: str(n) for key, n in self.layout._asdict().items()})

    def default_size(self) -> int:
        """View side in pixels: the median short side of the images, at most 224."""
        return min(224, int(np.median(np.minimum(self.heights, self.widths))))

    def close(self) -> None:
        """Close the shards and stop fetching; payloads still held stay valid."""
        if self.bucket:
            self.bucket.close()
        self._open.cache_clear()


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
    hardly varies (of blank or padded channels) gets a tenth of the largest deviation, so that it does not drown the others; where
    channels are not RGB, but bands with ranges of their own, one step of their values."""
    part = _measured(manifest)
    floor = max(1.0, max(part["std"]) / 10) if layout(manifest) == codec.RGB else 1.0
    return tuple(part["mean"]), tuple(max(value, floor) for value in part["std"])


def flat_channels(manifest: dict) -> list[str]:
    """A line that names the channels whose deviation `statistics` raises; none where there are none."""
    own, used, pixels = _measured(manifest)["std"], statistics(manifest)[1], layout(manifest)
    names = ("red", "green", "blue") if pixels == codec.RGB else range(1, pixels.channels + 1)
    flat = [f"{name} (deviation {a:.2g} of {pixels.white})" for name, a, b in zip(names, own, used) if b > a]
    return [f"channel {', '.join(flat)} hardly varies: it is normalized as if by {min(used):.2g}"] if flat else []


def _measured(manifest: dict) -> dict:
    splits = manifest["splits"]
    return splits.get("train") or next(iter(splits.values()))
