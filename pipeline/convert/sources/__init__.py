"""What every source gives: splits of (name, label, bytes or pixels), in an order that never changes.

Nothing is decoded here: a split's `read(i)` gives the bytes of an image file (1-D uint8 array) or pixels ((H, W) or
(H, W, 3) uint8), and is called in the converting processes. `datasets.load` opens a source by the data set's name.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from manyview.pipeline import files
from manyview.pipeline.errors import UserError

IMAGE_TYPES = "jpg jpeg jpe jfif png webp gif bmp tif tiff ppm pgm pnm tga ico jp2 avif"
SUFFIXES = frozenset(f".{name}" for name in IMAGE_TYPES.split())
NPY = b"\x93NUMPY"  # what an .npy begins with


@dataclass(frozen=True)
class Reading:
    """How a source is read. `labels`: a table of labels, and the names of its `columns` (of files, of labels; "" =
    guessed); `unlabelled`: folders are not classes; `disjoint`: splits may share no class; `holdout`: the share of each
    class that becomes test images, drawn by `seed`, where the source has none.

    Of shards: `image_part`, `label_part`: names of the parts of a sample that are image and label ("" = by the rules of
    `shards`), label also `folder`; `allow_cut`: what there is of a tar that was cut off is taken.

    `arrays`: an .npy is an image too, of any channels and of 8 or 16 bits."""

    download: bool = False
    unlabelled: bool = False
    labels: Path | None = None
    columns: tuple[str, str] = ("", "")
    disjoint: bool = False
    holdout: float = 0.0
    seed: int = 0
    image_part: str = ""
    label_part: str = ""
    allow_cut: bool = False
    arrays: bool = False

    @property
    def suffixes(self) -> frozenset[str]:
        """Of the files that are images."""
        return SUFFIXES | {".npy"} if self.arrays else SUFFIXES

    @property
    def parts(self) -> list:
        """What is asked of shards; nothing if by the rules."""
        asked = [self.image_part, self.label_part, self.allow_cut]
        return asked if any(asked) else []

    def digest(self) -> str:
        """Of what decides labels and splits besides the source, empty if nothing does. UserError: the table cannot be read."""
        decides = b""
        if self.labels:
            try:
                decides = self.labels.read_bytes() + repr(self.columns).encode()
            except OSError as error:
                raise UserError(f"{self.labels} cannot be read as a table: {error.strerror}") from None
        decides += repr(self.parts).encode() if self.parts else b""
        decides += repr((self.holdout, self.seed)).encode() if self.holdout else b""
        return hashlib.sha256(decides).hexdigest()[:16] if decides else ""


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

    def part(self, name: str, ids: np.ndarray) -> Split:
        """The images `ids` as a split of another name."""
        names = [self.names[i] for i in ids]
        return Split(name, names, self.labels[ids], self.sizes[ids], lambda i: self.read(int(ids[i])), self.times[ids])


@dataclass
class Source:
    classes: list[str]
    splits: list[Split]
    problems: list[dict] = field(default_factory=list)  # what could not even be listed: {"split", "name", "reason"}
    ignored: int = 0  # files that are no images by their name
    watch: list[str] = field(default_factory=list)  # folders and archives that hold the images, see `source_state`
    notes: list[str] = field(default_factory=list)  # what whoever converts should know, a line each

    def hold_out(self, share: float, seed: int) -> None:
        """Make `share` of each class of the training images the split `val`. UserError: there is one already."""
        if [split.name for split in self.splits] != ["train"]:
            raise UserError(
                f"--holdout: the source has splits already: {', '.join(split.name for split in self.splits)}"
            )
        from manyview.pipeline.plan import subset  # here, since a conversion need not wait for numba

        whole = self.splits[0]
        test = subset(whole.labels, share, seed)
        parts = {"train": np.setdiff1d(np.arange(len(whole.names)), test), "val": test}
        self.splits = [whole.part(name, ids) for name, ids in parts.items()]
        self.notes.append(f"{len(test):,} images held out as val, class-balanced, seed {seed}")

    def fingerprint(self) -> str:
        """Hex: names, labels and sizes of everything there is."""
        digest = hashlib.sha256(repr(self.classes).encode("utf-8", "surrogateescape"))
        for split in self.splits:
            digest.update(split.name.encode())
            digest.update("\0".join(split.names).encode("utf-8", "surrogateescape"))
            digest.update(np.ascontiguousarray(split.labels).data)
            digest.update(np.ascontiguousarray(split.sizes).data)
        return digest.hexdigest()


def read_bytes(path: str, offset: int = 0, size: int | None = None) -> np.ndarray:
    """(n,) uint8: `size` bytes of a file, or all from `offset` on. ValueError: the file is gone, closed to us or too short.
    UserError: the machine is at fault and stays so, which is no reason to set an image aside."""
    try:
        with files.Opened(path) as file:
            data = np.frombuffer(file.read(offset, file.size - offset if size is None else size), np.uint8)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    if size is not None and len(data) < size:
        raise ValueError("the archive ends inside it")
    return data


def read_named(folder: str, names: list[str], i: int) -> np.ndarray:
    """The file `names[i]` of a folder, as `read_bytes`."""
    return read_bytes(os.path.join(folder, names[i]))


def read_npy(data: np.ndarray) -> np.ndarray:
    """The array in the bytes of an .npy. ValueError for anything else, also where it would have to be unpickled."""
    try:
        return np.lib.format.read_array(io.BytesIO(data.tobytes()), allow_pickle=False)
    except Exception as error:  # its header is parsed as Python: whatever Python's parser can say may come of it
        raise ValueError(f"is no array: {' '.join(str(error).split())[:200]}") from None


def changed(paths: list[str], root: Path | None = None) -> np.ndarray:
    """(n,) int64: ctime, ns, of the archive each sample lies in, or of a folder between it and `root`, if that is later: a
    folder that was renamed brings another archive under an old name."""

    def latest(path: Path) -> int:
        way = [path, *(folder for folder in path.parents if root and folder != root and folder.is_relative_to(root))]
        return max(state(each).st_ctime_ns for each in way for state in (os.stat, os.lstat))

    times = {path: latest(Path(path)) for path in set(paths)}
    return np.array([times[path] for path in paths], np.int64)
