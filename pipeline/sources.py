"""Where images come from: each dataset as splits of (name, label, bytes or pixels), in an order that never changes.

`load(dataset, source)` returns a `Source`. Nothing is decoded here: a split's `read(i)` gives the bytes of an image file
(1-D uint8 array) or pixels ((H, W) or (H, W, 3) uint8), and is called in the converting processes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.errors import UserError, nearest

IMAGE_TYPES = "jpg jpeg jpe jfif png webp gif bmp tif tiff ppm pgm pnm tga ico jp2 avif"
SUFFIXES = frozenset(f".{name}" for name in IMAGE_TYPES.split())
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "val"}
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


@dataclass
class Split:
    """Images of one split. `names` are unique within it; `sizes` in bytes (files) or of the pixels (arrays);
    `times`: when their files were last changed (ctime, ns), None if they are no files."""

    name: str
    names: list[str]
    labels: np.ndarray
    sizes: np.ndarray
    read: Callable[[int], np.ndarray]
    times: np.ndarray | None = None


@dataclass
class Source:
    classes: list[str]
    splits: list[Split]
    problems: list[dict] = field(default_factory=list)  # what could not even be listed: {"split", "name", "reason"}
    ignored: int = 0  # files that are no images by their name
    watch: list[str] = field(default_factory=list)  # folders and archives that hold the images, see `stamp`

    def fingerprint(self) -> str:
        """Hex: names, labels and sizes of everything there is."""
        digest = hashlib.sha256(repr(self.classes).encode("utf-8", "surrogateescape"))
        for split in self.splits:
            digest.update(split.name.encode())
            digest.update("\0".join(split.names).encode("utf-8", "surrogateescape"))
            digest.update(np.ascontiguousarray(split.labels).data)
            digest.update(np.ascontiguousarray(split.sizes).data)
        return digest.hexdigest()


def load(dataset: str, source: Path | None, download: bool = False, unlabelled: bool = False) -> Source:
    """Open a dataset. UserError: unknown name, nothing there, no source given where one is needed."""
    if dataset not in DATASETS:
        raise UserError(nearest("dataset", dataset, DATASETS))
    if source is None and dataset not in WITHOUT_SOURCE and not download:
        raise UserError(f"dataset {dataset} needs SOURCE, the folder it lies in (--source DIRECTORY)")
    if source is not None and not source.exists() and not download:
        raise UserError(f"source {source} does not exist")
    found = DATASETS[dataset](source, download, unlabelled)  # type: ignore[arg-type]
    found.splits = [split for split in found.splits if split.names]
    if not found.splits:
        raise UserError(f"no images in {source}: looked for {', '.join(sorted(SUFFIXES))}")
    return found


# --- files ----------------------------------------------------------------------------------------------------------


@dataclass
class Listing:
    """Image files below a folder, as paths relative to it, sorted; and what stood in the way."""

    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    problems: list[dict] = field(default_factory=list)
    ignored: int = 0
    folders: list[str] = field(default_factory=list)


def listing(root: Path) -> Listing:
    """Walk a tree; follows links to folders, each real folder once, so a loop of links ends."""
    found, seen, entries = Listing(), set(), []  # type: ignore[var-annotated]
    todo = [(os.path.realpath(root), "")]
    while todo:
        path, relative = todo.pop()
        try:
            real = os.stat(path)
            if (real.st_dev, real.st_ino) in seen:
                found.problems.append({"name": relative, "reason": "leads back to a folder already read"})
                continue
            seen.add((real.st_dev, real.st_ino))
            found.folders.append(path)
            children = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            found.problems.append({"name": relative or ".", "reason": f"cannot be read: {error.strerror}"})
            continue
        folders = []
        for entry in children:
            name = f"{relative}/{entry.name}" if relative else entry.name
            if _is_folder(entry):
                folders.append((entry.path, name))
            elif os.path.splitext(entry.name)[1].lower() not in SUFFIXES:
                found.ignored += 1
            else:
                _add_file(entry, name, entries, found)
        todo += reversed(folders)
    entries.sort(key=lambda item: os.fsencode(item[0]))
    found.names, found.sizes, found.times = ([entry[i] for entry in entries] for i in range(3))
    return found


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _add_file(entry: os.DirEntry, name: str, entries: list, found: Listing) -> None:
    try:
        if not entry.is_file():
            raise OSError(0, "not a file")
        state = entry.stat()
        entries.append((name, state.st_size, state.st_ctime_ns))
    except OSError as error:
        found.problems.append({"name": name, "reason": f"cannot be read: {error.strerror}"})


def read_file(path: str) -> np.ndarray:
    """A file's bytes. ValueError if it cannot be read: one lost file is no reason to stop."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = np.empty(os.fstat(file.fileno()).st_size, np.uint8)
            got = file.readinto(data.data) if len(data) else 0
            return data[:got]
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None


def _file_split(split: str, root: Path, found: Listing, labels: np.ndarray) -> Split:
    names, start = found.names, f"{root}{os.sep}"
    sizes, times = np.array(found.sizes, np.int64), np.array(found.times, np.int64)
    return Split(split, names, labels, sizes, lambda i: read_file(start + names[i]), times)


def folder(source: Path, download: bool = False, unlabelled: bool = False, only: set[str] | None = None) -> Source:
    """`train/`, `val/` (or `test/`) if there are such folders, else everything is `train`.

    Below a split: folders are classes; if an image lies beside them, or `unlabelled`, nothing there has a label.
    `only`: the classes to keep.
    """
    del download
    roots = {SPLITS[entry.name]: entry for entry in sorted(source.iterdir()) if entry.name in SPLITS and entry.is_dir()}
    found = {split: listing(root) for split, root in (roots or {"train": source}).items()}
    labelled = {split: not unlabelled and all("/" in name for name in files.names) for split, files in found.items()}
    classes = sorted(
        {name.split("/", 1)[0] for split, files in found.items() if labelled[split] for name in files.names}
    )
    if only is not None:
        if missing := sorted(only - set(classes)):
            raise UserError(f"{source} lacks {len(missing)} of {len(only)} classes, the first is {missing[0]}")
        classes = sorted(only)
    number = {name: i for i, name in enumerate(classes)}
    result = Source(classes, [], watch=[str(source.resolve())])
    for split, files in sorted(found.items()):
        root = roots.get(split, source)
        if only is not None:
            kept = [i for i, name in enumerate(files.names) if name.split("/", 1)[0] in only]
            files.names = [files.names[i] for i in kept]
            files.sizes, files.times = ([column[i] for i in kept] for column in (files.sizes, files.times))
        labels = [number[name.split("/", 1)[0]] if labelled[split] else -1 for name in files.names]
        result.splits.append(_file_split(split, root, files, np.array(labels, np.int64)))
        result.problems += [{"split": split, **problem} for problem in files.problems]
        result.ignored += files.ignored
        result.watch += files.folders
    return result


def imagenet(source: Path, only: set[str] | None = None) -> Source:
    """Class folders below train/ and val/, or the official archives as they were downloaded."""
    from pipeline import archives

    return archives.imagenet_tars(source, only) if archives.has_imagenet_tars(source) else folder(source, only=only)


def imagenet100_classes() -> set[str]:
    text = Path(__file__).with_name("imagenet100.txt").read_text()
    return {line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")}


def existing(source: Path) -> Source:
    from pipeline import archives

    return archives.existing(source)


# --- arrays ---------------------------------------------------------------------------------------------------------


def _array_split(split: str, images: np.ndarray, labels) -> Split:
    """`images`: (n, H, W) or (n, H, W, 3) uint8."""
    names = [f"{i:06d}" for i in range(len(images))]
    sizes = np.full(len(images), images[0].nbytes if len(images) else 0, np.int64)
    return Split(split, names, np.asarray(labels, np.int64), sizes, lambda i: images[i])


def _class_folders(source: Path | None) -> bool:
    return source is not None and any((source / name).is_dir() for name in SPLITS)


def cifar(name: str, source: Path | None, download: bool) -> Source:
    """The official python archive (unpacked) by torchvision, or class folders of images."""
    if source is not None and _class_folders(source):
        return folder(source)
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    sets = _torchvision(name, source, lambda root, train: kind(root, train=train, download=download))
    splits = [_array_split(split, data.data, data.targets) for split, data in sets.items()]
    return Source(list(sets["train"].classes), splits)


def _torchvision(name: str, source: Path | None, make) -> dict:
    root = source if source is not None else Path("data")
    try:
        return {"train": make(str(root), True), "val": make(str(root), False)}
    except RuntimeError as error:
        raise UserError(f"{name} is not in {root} ({str(error).splitlines()[0]}); --download fetches it") from None


def stl10(source: Path | None, download: bool) -> Source:
    """`train` (5k), `val` (8k, the official test split) and `unlabelled` (100k, label -1)."""
    from torchvision import datasets

    root = source if source is not None else Path("data")
    parts = {"train": "train", "val": "test", "unlabelled": "unlabeled"}
    try:
        sets = {name: datasets.STL10(str(root), split=part, download=download) for name, part in parts.items()}
    except RuntimeError as error:
        raise UserError(f"stl10 is not in {root} ({str(error).splitlines()[0]}); --download fetches it") from None
    # torchvision gives (n, 3, H, W), and -1 for what has no label.
    splits = [_array_split(name, data.data.transpose(0, 2, 3, 1), data.labels) for name, data in sets.items()]
    return Source(list(sets["train"].classes), splits)


def fashion_mnist(source: Path | None, download: bool) -> Source:
    """The four idx files, gzipped or not: in SOURCE, in Debian's package, or where torchvision puts them."""
    places = [source, source and source / "FashionMNIST" / "raw"] if source else [DEBIAN_FASHION_MNIST]
    places += [Path("data/FashionMNIST/raw")]
    here = next((place for place in places if place and _idx_file(place, "train-images-idx3-ubyte")), None)
    if here is None and download:
        from torchvision import datasets

        here = Path(datasets.FashionMNIST(str(source or "data"), download=True).raw_folder)
    if here is None:
        raise UserError(
            f"fashion-mnist is in none of {', '.join(str(place) for place in places)}; "
            "`apt-get install dataset-fashion-mnist` installs it, --download fetches it"
        )
    splits = [
        _array_split(split, read_idx(here, f"{part}-images-idx3-ubyte"), read_idx(here, f"{part}-labels-idx1-ubyte"))
        for split, part in (("train", "train"), ("val", "t10k"))
    ]
    return Source(list(FASHION_MNIST_CLASSES), splits)


def _idx_file(place: Path, name: str) -> Path | None:
    return next((path for path in (place / name, place / f"{name}.gz") if path.is_file()), None)


def read_idx(place: Path, name: str) -> np.ndarray:
    """An idx file of bytes (the MNIST format): two zeros, type 8, number of dimensions, then those, big-endian."""
    import gzip

    path = _idx_file(place, name)
    if path is None:
        raise UserError(f"{place / name} is missing")
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise UserError(f"{path} is not an idx file of bytes")
    shape = np.frombuffer(data, ">u4", data[3], 4).astype(int)
    if len(data) != 4 + 4 * data[3] + int(shape.prod()):
        raise UserError(f"{path} has {len(data)} bytes, its header says otherwise: it is cut off")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def digits() -> Source:
    """scikit-learn's 1797 handwritten digits, 8x8 grey; every fifth is `val`."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("dataset digits comes with scikit-learn: pip install scikit-learn") from None
    data = load_digits()
    images = (data.images * 15.9375).astype(np.uint8)  # 0..16 to 0..255
    val = np.arange(len(images)) % 5 == 4
    splits = [_array_split(name, images[mask], data.target[mask]) for name, mask in (("train", ~val), ("val", val))]
    return Source([str(i) for i in range(10)], splits)


WITHOUT_SOURCE = {"digits", "fashion-mnist"}
DATASETS: dict[str, Callable[[Path, bool, bool], Source]] = {
    "folder": folder,
    "imagenet": lambda source, *_: imagenet(source),
    "imagenet100": lambda source, *_: imagenet(source, imagenet100_classes()),
    "shards": lambda source, *_: existing(source),
    "cifar10": lambda source, download, _: cifar("cifar10", source, download),
    "cifar100": lambda source, download, _: cifar("cifar100", source, download),
    "stl10": lambda source, download, _: stl10(source, download),
    "fashion-mnist": lambda source, download, _: fashion_mnist(source, download),
    "digits": lambda *_: digits(),
}
