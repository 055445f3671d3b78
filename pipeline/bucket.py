"""Shards in a bucket (s3://…, or any address that fsspec knows), read through a bounded cache on local disk.

What is fetched is a piece: the records of a shard that begin within the same `PIECE` bytes, in one ranged request. Pieces are
fetched ahead of need by a few threads, as `Store.prefetch` tells them, or else when a record is read. Every record's
checksum is looked at on arrival and again on reading. The cache is a folder that all processes of a node share: a piece
appears whole, by a rename, and is fetched by one of them. What was asked for longest ago makes room for what is new.
Nothing is held open between reads, so anything may be evicted, or killed, at any time: what is missing is fetched again.

MANYVIEW_CACHE is the folder (~/.cache/manyview), MANYVIEW_CACHE_GB its bound (half of what was free). Credentials are
fsspec's business; for S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_ENDPOINT_URL.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import queue
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from isal.isal_zlib import crc32

from manyview.pipeline import index, storage
from manyview.pipeline.errors import UserError
from manyview.pipeline.files import locked

STREAMS = 8  # requests under way ahead of need
ALTERED = 3  # times a piece is fetched whose checksums are wrong, until the object must be what is damaged
ALONE = 2  # samples of a piece that nobody announced and that are fetched alone: a probe picks a few of a large set
SLACK = 0.05  # share of the cache that an eviction frees beyond need, so that it is rare
PART = ".part"


def _now() -> tuple[int, int]:
    """Times for a file. The kernel's own stand still for milliseconds, and the order of files in time is the policy."""
    return (now := time.time_ns()), now


class Cache:
    """Files of a folder by name, in all not more than `limit` bytes (beside those being written). All processes of a node
    share it, by locks and renames alone: a piece is fetched once a node, and nobody has to run before or after them."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def read(self, name: str, start: int, length: int) -> bytes | None:
        """Part of a file; None if it is not there, or not as long as it was: then it goes."""
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            data = os.pread(descriptor, length, start)
        finally:
            os.close(descriptor)
        if len(data) == length:
            return data
        self.remove(name)  # cut off, by a machine that lost power
        return None

    def touch(self, name: str) -> bool:
        """Whether the file is there; it is then the last to go."""
        try:
            os.utime(self.folder / name, ns=_now())
        except FileNotFoundError:
            return False
        return True

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def add(self, name: str, make: Callable[[BinaryIO], None], wait: bool = True) -> bool:
        """Have `make` write the file, unless it is there. If another is at it, wait for that one, or leave it to that
        one and return False. UserError: the folder takes no more, or has no locks."""
        path = self.folder / name
        part = path.with_name(path.name + PART)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(part, wait) as descriptor:
                if descriptor is None:
                    return False
                if path.exists():
                    part.unlink()
                else:
                    self._make(descriptor, part, path, make)
        except OSError as error:
            raise UserError(f"cache {self.folder}: {error.strerror}; MANYVIEW_CACHE names another folder") from error
        return True

    def _make(self, descriptor: int, part: Path, path: Path, make: Callable[[BinaryIO], None]) -> None:
        try:
            with open(descriptor, "wb", closefd=False) as file:
                make(file)
                file.truncate()  # what a killed one left may have been longer
            self._make_room(os.fstat(descriptor).st_size)
            os.utime(descriptor, ns=_now())
            os.rename(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _make_room(self, size: int) -> None:
        """Count `size` more bytes. The count is only ever too high (after a kill), and made right when it matters."""
        with locked(self.folder / "size") as descriptor:
            assert descriptor is not None
            counted = _counted(self.folder)
            total = self._evict() if counted is None or counted + size > self.limit else counted + size
            os.pwrite(descriptor, f"{total:<20}".encode(), 0)

    def _evict(self) -> int:
        """Remove the files that were not asked for longest; returns the bytes that are left."""
        files = _files(self.folder)
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.limit * (1 - SLACK):
                break
            if path.suffix == PART:  # of a process that was killed, unless somebody is writing it now
                with locked(path, wait=False) as descriptor:
                    if descriptor is None:
                        continue
                    path.unlink()
            else:
                path.unlink(missing_ok=True)
            total -= size
        return total


def _files(folder: Path) -> list[tuple[int, int, Path]]:
    """(time in ns, bytes, path) of what is in the cache."""
    files = []
    for path in folder.glob("*/*"):
        with contextlib.suppress(FileNotFoundError):
            state = path.stat()
            files.append((state.st_mtime_ns, state.st_size, path))
    return files


def _counted(folder: Path) -> int | None:
    """Bytes in the cache by the last count; None if there was none, or a machine that lost power left zeros in its place."""
    try:
        return int((folder / "size").read_bytes()[:20])
    except (FileNotFoundError, ValueError):
        return None


def home() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "manyview"
    return Path(os.environ.get("MANYVIEW_CACHE") or default).expanduser()


def cache() -> Cache:
    """The cache that the environment names."""
    folder = home() / "pieces"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"MANYVIEW_CACHE {folder}: {error.strerror}") from None
    given = os.environ.get("MANYVIEW_CACHE_GB")
    held = _counted(folder) or sum(size for _, size, _ in _files(folder))
    try:
        limit = float(given) * 1e9 if given else (free + held) / 2
    except ValueError:
        limit = 0
    if not 0 < limit < math.inf:  # nor nan
        raise UserError(f"MANYVIEW_CACHE_GB is the size of the cache in gigabytes, above 0, not {given!r}")
    return Cache(folder, int(limit))


# --- a split ----------------------------------------------------------------------------------------------------------


class Bucket:
    """One split of shards in a bucket. Reads and announcements may come from any number of threads.

    `counts`: `hits` and `misses` of reads in the cache; `requests` that brought samples, `pieces` among them, and `bytes`.
    The manifest is part of the cache's names, so shards that are written anew never meet pieces of the old.
    """

    def __init__(self, url: str, manifest: dict, split: str) -> None:
        self.storage, self.cache = storage.Storage(url), cache()
        self.shards: list[dict] = manifest["splits"][split]["shards"]
        self.counts = {"hits": 0, "misses": 0, "pieces": 0, "requests": 0, "bytes": 0}
        key = hashlib.sha256(json.dumps([url, storage.PIECE, manifest]).encode()).hexdigest()[:16]
        self._names = f"{key}/{split}"
        self._fits = sum(shard["bytes"] for shard in self.shards) <= (1 - SLACK) * self.cache.limit
        self._first = np.concatenate([[0], np.cumsum([shard["count"] for shard in self.shards])])
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._queued: set[tuple[int, int]] = set()
        self._announced: dict[tuple[int, int], bool] = {}  # and whether it has been in the cache since then
        self._alone: Counter[tuple[int, int]] = Counter()  # samples that were read without their piece
        self._warned = False
        self._threads: list[threading.Thread] = []
        self._rows: index.Index

    def sizes(self) -> list[int | None]:
        """Bytes of each shard, None if it is not there."""
        sizes = self.storage.sizes()
        return [sizes.get(shard["file"]) or self.storage.size(shard["file"]) for shard in self.shards]

    def read_index(self, about: dict) -> index.Index:
        """The index of the split, by way of the cache. ValueError as `index.read`."""
        self._index = f"{self._names}.index"
        path = self.cache.folder / self._index
        there = self.cache.touch(self._index)
        self.cache.add(self._index, partial(self._fetch_whole, about))
        try:
            self._rows = index.read(path, about["sha256"])
        except ValueError:
            if not there:
                raise
            self.cache.remove(self._index)  # damaged in the cache, by a machine that lost power
            return self.read_index(about)
        return self._rows

    def _fetch_whole(self, about: dict, file: BinaryIO) -> None:
        for _ in range(ALTERED):
            digest = hashlib.sha256()
            file.seek(0)
            try:
                for data in self.storage.pieces(about["file"]):
                    digest.update(data)
                    file.write(data)
            except storage.Missing:
                raise UserError(f"index {self.storage.url}/{about['file']} is missing") from None
            if digest.hexdigest() == about["sha256"]:
                return
        raise UserError(f"index {self.storage.url}/{about['file']} was altered since it was written (SHA-256)")

    def prefetch(self, ids: np.ndarray) -> None:
        """Say that these samples will be read soon: their pieces are fetched in this order, or kept.

        Where the cache cannot hold the split, only pieces of which these samples are a good part: what lies strewn over
        the shards, as in a random order, is read sample by sample instead of being fetched with all its neighbours.
        """
        shard, number = (
            self._rows["shard"][ids].astype(np.int64),
            self._rows["offset"][ids].astype(np.int64) // storage.PIECE,
        )
        _, first, group = np.unique((shard << 32) + number, return_index=True, return_inverse=True)
        self.cache.touch(self._index)
        worth = np.ones(len(first), bool) if self._fits else self._dense(ids, group)
        for j in np.argsort(first):
            piece = int(shard[first[j]]), int(number[first[j]])
            there = self.cache.touch(self._name(piece))
            with self._lock:
                new = bool(worth[j]) and not there and piece not in self._queued
                if new or there:
                    self._announced[piece] = there
                elif piece not in self._queued:
                    self._announced.pop(piece, None)
                if new:
                    self._queued.add(piece)
            if new:
                self._queue.put(piece)
        if not self._threads:
            self._threads = [threading.Thread(target=self._work, name="storage", daemon=True) for _ in range(STREAMS)]
            for thread in self._threads:
                thread.start()

    def _dense(self, ids: np.ndarray, group: np.ndarray) -> np.ndarray:
        """Of each piece (a number in `group`), whether these samples are several and a quarter of what lies between them."""
        start, length = (self._rows[name][ids].astype(np.int64) for name in ("offset", "length"))
        first, last = np.full(group.max() + 1, np.iinfo(np.int64).max), np.zeros(group.max() + 1, np.int64)
        np.minimum.at(first, group, start)
        np.maximum.at(last, group, start + length)
        return (np.bincount(group) > 1) & (4 * np.bincount(group, length) >= last - first)

    def read(self, i: int) -> np.ndarray:
        """The payload's bytes of sample i, as they are in the cache."""
        shard, start = int(self._rows["shard"][i]), int(self._rows["offset"][i])
        length, piece = int(self._rows["length"][i]), (shard, start // storage.PIECE)
        with self._lock:  # before looking: it may come in meanwhile
            was_there = self._announced.get(piece, False)
        data = self.cache.read(self._name(piece), start % storage.PIECE, length)
        self._count(data is not None, was_there)
        if data is None and piece not in self._announced and (not self._fits or self._alone[piece] < ALONE):
            for _ in range(ALTERED):
                data = self.storage.read(self.shards[shard]["file"], start, start + length)
                if crc32(data) == self._rows["crc"][i]:
                    break
            self._add(requests=1, bytes=length)
            self._alone[piece] += 1
        while data is None:
            self._fetch(piece)
            data = self.cache.read(self._name(piece), start % storage.PIECE, length)
        return np.frombuffer(data, np.uint8)

    def read_again(self, i: int) -> np.ndarray:
        """As `read`, after the piece in the cache was found to be damaged."""
        self.cache.remove(self._name((int(self._rows["shard"][i]), int(self._rows["offset"][i]) // storage.PIECE)))
        return self.read(i)

    def close(self) -> None:
        """End the threads."""
        for _ in self._threads:
            self._queue.put(None)
        self._threads = []

    def _name(self, piece: tuple[int, int]) -> str:
        return f"{self._names}-{piece[0]:05d}.{piece[1]}"

    def _work(self) -> None:
        while (piece := self._queue.get()) is not None:
            with contextlib.suppress(UserError):  # it shows when a sample of it is read
                self._fetch(piece, wait=False)
            with self._lock:
                self._queued.discard(piece)

    def _fetch(self, piece: tuple[int, int], wait: bool = True) -> None:
        """Have a piece in the cache, or with another process, which is at it."""
        if self.cache.add(self._name(piece), partial(self._download, piece), wait):
            with self._lock:
                self._announced[piece] = True

    def _download(self, piece: tuple[int, int], file: BinaryIO) -> None:
        rows = slice(*self._first[piece[0] : piece[0] + 2].tolist())
        offset, length, crc = (self._rows[name][rows].astype(np.int64) for name in ("offset", "length", "crc"))
        mine = offset // storage.PIECE == piece[1]
        start, end, sums = offset[mine], (offset + length)[mine], crc[mine].tolist()
        begin = piece[1] * storage.PIECE
        spans = [slice(a, b) for a, b in zip((start - begin).tolist(), (end - begin).tolist())]
        for _ in range(ALTERED):
            data = memoryview(self.storage.read(self.shards[piece[0]]["file"], begin, int(end.max())))
            if all(crc32(data[span]) == value for span, value in zip(spans, sums)):
                break
        self._add(pieces=1, requests=1, bytes=len(data))
        file.write(data)

    def _add(self, **counts: int) -> None:
        with self._lock:
            for name, value in counts.items():
                self.counts[name] += value

    def _count(self, hit: bool, was_there: bool) -> None:
        with self._lock:
            self.counts["hits" if hit else "misses"] += 1
            early = not hit and was_there and not self._warned
            self._warned |= early
        if early:
            print(
                f"storage: the cache {self.cache.folder} of {self.cache.limit / 1e9:.3g} GB is too small, pieces leave it "
                "before they are read: raise MANYVIEW_CACHE_GB, or read with --order blocks",
                file=sys.stderr,
            )
