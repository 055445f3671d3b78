"""Image files in the place of shards: what tools/evaluate.py and tools/embed.py read of a plain folder."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from manyview.pipeline import storage
from manyview.pipeline.codec import ARRAY, RGB, Layout
from manyview.pipeline.convert import bands
from manyview.pipeline.convert.sources import Reading, Source, Split
from manyview.pipeline.convert.sources.folders import folder
from manyview.pipeline.errors import UserError
from manyview.pipeline.machine import cores
from manyview.pipeline.manifest import MANIFEST, Options
from manyview.pipeline.store import Corrupt, Store, splits

MEMORY = 2**30  # bytes of payloads that are kept


class FileStore:
    """Files of one split in the place of a `Store`: the same payloads as shards of them hold, read by the engine for the CPU.

    Sizes are known, and what is no image is put down in `unusable`, of the samples that were `load`ed.
    """

    def __init__(self, split: Split, classes: list[str], path: Path, layout: Layout = RGB):
        self.files, self.split, self.classes, self.path = split, split.name, classes, path
        self.name, self.labels = path.resolve().name, split.labels
        self.heights, self.widths = np.zeros(len(split.names), np.int32), np.zeros(len(split.names), np.int32)
        self.unusable: dict[int, str] = {}
        self.fingerprint = ""  # of what its images are, and `notes`, what has to be known of them: see `opened`
        self.notes: list[str] = []
        self._kept: dict[int, np.ndarray] = {}
        self._room = MEMORY
        self.layout, self.mean = layout, (0.0,) * layout.channels  # a clean view does not ask for the mean
        options = Options("folder", encoding="jpeg" if layout == RGB else ARRAY)
        self._convert = partial(bands.convert, options=options, wanted=layout, look="headers")

    def __len__(self) -> int:
        return len(self.files.names)

    def key(self, i: int) -> str:
        return self.files.names[i]

    def read(self, i: int) -> np.ndarray:
        """Sample i's payload. Raises `Corrupt` where it is no image, or no longer the one that was loaded."""
        if i in self._kept:
            return self._kept[i]
        try:
            return self._convert(self.files.read(i)).payload
        except ValueError as error:
            raise Corrupt(i, self.key(i), str(error)) from None

    def load(self, ids: np.ndarray) -> list[bytes]:
        """Look at these files once, in threads, and keep what there is room for; their digests, b"" of what is no image."""
        with ThreadPoolExecutor(cores(), "files") as pool:
            return list(pool.map(self._look, ids.tolist()))

    def forget(self) -> None:
        self._kept, self._room = {}, MEMORY

    def _look(self, i: int) -> bytes:
        try:
            image = self._convert(self.files.read(i))
        except ValueError as error:
            self.unusable[i] = str(error)
            return b""
        self.heights[i], self.widths[i] = image.height, image.width
        if image.payload.nbytes <= self._room:
            self._room -= image.payload.nbytes
            self._kept[i] = image.payload
        return hashlib.blake2b(np.ascontiguousarray(image.payload).data, digest_size=16).digest()


def is_folder(path: Path) -> bool:
    """Whether these are image files, not shards."""
    return storage.address(path) is None and path.is_dir() and not (path / MANIFEST).exists()


def listed(path: Path, layout: Layout = RGB) -> Source:
    """What a folder of image files holds, for an encoder of this layout. UserError: no image."""
    source = folder(path, Reading(arrays=layout != RGB))
    if not sum(len(split.names) for split in source.splits):
        raise UserError(f"{path}: neither shards nor a folder of images")
    return source


def opened(path: Path, layout: Layout = RGB) -> dict[str, Any]:
    """{split: what opens it, once} of shards, or of a folder of image files, all of which are then looked at, for an encoder
    of this layout."""
    if not is_folder(path):
        return {name: cache(partial(Store, path, name)) for name in splits(path)}
    source = listed(path, layout)
    return {
        split.name: cache(partial(_measured, source, split, path, layout)) for split in source.splits if split.names
    }


def _measured(source: Source, split: Split, path: Path, layout: Layout) -> FileStore:
    store = FileStore(split, source.classes, path, layout)
    digests = store.load(np.arange(len(store)))
    digest = hashlib.sha256("\0".join([*source.classes, "", *split.names]).encode("utf-8", "surrogateescape"))
    for part in (np.ascontiguousarray(split.labels).tobytes(), *digests):
        digest.update(part)
    store.fingerprint, store.notes = digest.hexdigest(), source.notes
    left_out = [f"{p['name']}: {p['reason']}" for p in source.problems if p["split"] == split.name]
    left_out += [f"{store.key(i)}: {store.unusable[i]}" for i in sorted(store.unusable)]
    if len(store.unusable) == len(store):
        raise UserError(f"{path}: no file of {split.name} can be used, first {left_out[0]}")
    if left_out:
        store.notes = [*source.notes, f"{len(left_out)} files of {split.name} left out, first {left_out[0]}"]
    return store


def engine_name(store: Any, wanted: str) -> str:
    """The engine that was asked for, but for files, which the one for the CPU reads."""
    return "cpu" if isinstance(store, FileStore) else wanted
