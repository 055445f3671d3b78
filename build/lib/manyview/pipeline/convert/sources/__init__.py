"""What every source gives: splits of (name, label, bytes or pixels), in an order that never changes.

Nothing is decoded here: a split's `read(i)` gives the bytes of an image file (1-D uint8 array) or pixels ((H, W) or
(H, W, 3) uint8), and is called in the converting processes. `datasets.load` opens a source by the data set's name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

IMAGE_TYPES = "jpg jpeg jpe jfif png webp gif bmp tif tiff ppm pgm pnm tga ico jp2 avif"
SUFFIXES = frozenset(f".{name}" for name in IMAGE_TYPES.split())
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "val"}


@dataclass
class Split:
    """Images of one split. `names` are unique within it; `sizes` in bytes (files) or of the pixels (arrays);
    `times`: when the file of each was last changed (ctime, ns)."""

    name: str
    names: list[str]
    labels: np.ndarray
    sizes: np.ndarray
    read: Callable[[int], np.ndarray]
    times: np.ndarray


@dataclass
class Source:
    classes: list[str]
    splits: list[Split]
    problems: list[dict] = field(default_factory=list)  # what could not even be listed: {"split", "name", "reason"}
    ignored: int = 0  # files that are no images by their name
    watch: list[str] = field(default_factory=list)  # folders and archives that hold the images, see `source_state`

    def fingerprint(self) -> str:
        """Hex: names, labels and sizes of everything there is."""
        digest = hashlib.sha256(repr(self.classes).encode("utf-8", "surrogateescape"))
        for split in self.splits:
            digest.update(split.name.encode())
            digest.update("\0".join(split.names).encode("utf-8", "surrogateescape"))
            digest.update(np.ascontiguousarray(split.labels).data)
            digest.update(np.ascontiguousarray(split.sizes).data)
        return digest.hexdigest()


def read_range(path: str, offset: int, size: int) -> np.ndarray:
    """Bytes of a file. ValueError if they are not all there."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = np.frombuffer(os.pread(file.fileno(), size, offset), np.uint8)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    if len(data) != size:
        raise ValueError("the archive ends inside it")
    return data


def changed(paths: list[str]) -> np.ndarray:
    """(n,) int64: ctime, ns, of the archive each sample lies in."""
    known = {path: os.stat(path).st_ctime_ns for path in set(paths)}
    return np.array([known[path] for path in paths], np.int64)
