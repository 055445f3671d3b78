"""What every source gives: splits of (name, label, bytes or pixels), in an order that never changes.

Nothing is decoded here: a split's `read(i)` gives the bytes of an image file (1-D uint8 array) or pixels ((H, W) or
(H, W, 3) uint8), and is called in the converting processes. `datasets.load` opens a source by the data set's name.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

IMAGE_TYPES = "jpg jpeg jpe jfif png webp gif bmp tif tiff ppm pgm pnm tga ico jp2 avif"
SUFFIXES = frozenset(f".{name}" for name in IMAGE_TYPES.split())
# What the machine or the network is at fault for, never the file: it may pass.
FAULTS = frozenset(
    [
        errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOBUFS,
        errno.EREMOTEIO, errno.ECONNRESET, errno.ENOTCONN, errno.EHOSTDOWN, errno.ENETDOWN,
    ]
)  # fmt: skip
PAUSES = (0.1, 0.4, 1.5, 5.0)  # seconds, before it is tried again
Result = TypeVar("Result")


@dataclass(frozen=True)
class Reading:
    """How a source is read. `labels`: a table of labels, and the names of its `columns` (of files, of labels; "" =
    guessed); `unlabelled`: folders are not classes; `disjoint`: splits may share no class."""

    download: bool = False
    unlabelled: bool = False
    labels: Path | None = None
    columns: tuple[str, str] = ("", "")
    disjoint: bool = False

    def digest(self) -> str:
        """Of everything that decides labels; empty where that is the source alone. UserError: the table cannot be read."""
        return (
            hashlib.sha256(self.labels.read_bytes() + repr(self.columns).encode()).hexdigest()[:16]
            if self.labels
            else ""
        )


AS_IT_IS = Reading()


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
    notes: list[str] = field(default_factory=list)  # what whoever converts should know, a line each

    def fingerprint(self) -> str:
        """Hex: names, labels and sizes of everything there is."""
        digest = hashlib.sha256(repr(self.classes).encode("utf-8", "surrogateescape"))
        for split in self.splits:
            digest.update(split.name.encode())
            digest.update("\0".join(split.names).encode("utf-8", "surrogateescape"))
            digest.update(np.ascontiguousarray(split.labels).data)
            digest.update(np.ascontiguousarray(split.sizes).data)
        return digest.hexdigest()


def patiently(call: Callable[[], Result]) -> Result:
    """What `call` returns, tried again with pauses where the machine is at fault. OSError: the fault stays."""
    for pause in PAUSES:
        try:
            return call()
        except OSError as error:
            if error.errno not in FAULTS:
                raise
            time.sleep(pause)
    return call()


def read_bytes(path: str, offset: int = 0, size: int | None = None) -> np.ndarray:
    """(n,) uint8: `size` bytes of a file, or all from `offset` on. ValueError: the file is gone, closed to us or too short.
    OSError with its path: the machine is at fault and stays so, which is no reason to set an image aside."""
    try:
        return patiently(lambda: _read(path, offset, size))
    except OSError as error:
        if error.errno in FAULTS:
            raise OSError(error.errno, error.strerror, path) from None
        raise ValueError(f"cannot be read: {error.strerror}") from None


def _read(path: str, offset: int, size: int | None) -> np.ndarray:
    with open(path, "rb", buffering=0) as file:
        data = np.empty(os.fstat(file.fileno()).st_size - offset if size is None else size, np.uint8)
        file.seek(offset)
        done = 0
        while done < len(data) and (count := file.readinto(data.data[done:])):
            done += count
    if done < len(data) and size is not None:
        raise ValueError("the archive ends inside it")
    return data[:done]


def changed(paths: list[str]) -> np.ndarray:
    """(n,) int64: ctime, ns, of the archive each sample lies in."""
    times = {path: os.stat(path).st_ctime_ns for path in set(paths)}
    return np.array([times[path] for path in paths], np.int64)
