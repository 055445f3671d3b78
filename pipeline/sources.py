"""Where images come from: each dataset as splits of (name, label, bytes or pixels), in an order that never changes.

`load(dataset, source)` returns a `Source`. Nothing is decoded here: a split's `read(i)` gives the bytes of an image file
(1-D uint8 array) or pixels ((H, W) or (H, W, 3) uint8), and is called in the converting processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPException
from itertools import compress
from pathlib import Path

import numpy as np

from pipeline import remote
from pipeline.errors import UserError, nearest

IMAGE_TYPES = "jpg jpeg jpe jfif png webp gif bmp tif tiff ppm pgm pnm tga ico jp2 avif"
SUFFIXES = frozenset(f".{name}" for name in IMAGE_TYPES.split())
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "val"}
LOST = "lost+found"  # of a file system's root, for its administrator alone
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


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
    if source is not None and (url := remote.address(source)):
        raise UserError(f"source {url} is an address: a source is a folder or an archive of this machine, copy it here")
    if source is not None and not source.exists() and not download:
        raise UserError(f"source {source} does not exist")
    found = DATASETS[dataset](source, download, unlabelled)  # type: ignore[arg-type]
    found.splits = [split for split in found.splits if split.names]
    if not found.splits and found.problems:
        first = found.problems[0]
        raise UserError(
            f"not one of {len(found.problems)} images in {source} can be used, the first is {first['name']!r}: {first['reason']}"
        )
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

    def keep(self, wanted: Callable[[str], bool]) -> list[str]:
        """Leave out the files whose names are not wanted; returns those names."""
        kept = [wanted(name) for name in self.names]
        out = [name for name, stays in zip(self.names, kept) if not stays]
        self.names, self.sizes, self.times = (
            list(compress(self.names, kept)),
            list(compress(self.sizes, kept)),
            list(compress(self.times, kept)),
        )
        return out


def listing(root: Path) -> Listing:
    """Walk a tree; follows links to folders, each real folder once, so a loop of links ends.

    UserError: a folder that cannot be read. Whatever lies in it would be missing, and its class from the numbers of labels.
    """
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
            raise _unreadable(error) from None
        folders = []
        for entry in children:
            name = f"{relative}/{entry.name}" if relative else entry.name
            if _is_folder(entry):
                if entry.name != LOST:
                    folders.append((entry.path, name))
            elif os.path.splitext(entry.name)[1].lower() not in SUFFIXES:
                found.ignored += 1
            else:
                _add_file(entry, name, entries, found)
        todo += reversed(folders)
    entries.sort(key=lambda item: os.fsencode(item[0]))
    found.names, found.sizes, found.times = ([entry[i] for entry in entries] for i in range(3))
    return found


def _unreadable(error: OSError) -> UserError:
    return UserError(f"{error.filename} cannot be read ({error.strerror}): make it readable or move it away")


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
    """`train/` and `val/` (or `valid/`, `validation/`, `test/`) if there are such folders, else everything is `train`.

    Below a split, folders are classes, and images beside them are problems. Where there are no folders, or if `unlabelled`,
    nothing has a label. `only`: the classes to keep. UserError: folders of which it is not clear whether they are splits.
    """
    del download
    roots = _split_folders(source) or {"train": source}
    found = {split: listing(root) for split, root in sorted(roots.items())}
    labelled = {split for split, files in found.items() if not unlabelled and any("/" in name for name in files.names)}
    classes = sorted({name.split("/", 1)[0] for split in labelled for name in found[split].names if "/" in name})
    if only is not None:
        if missing := sorted(only - set(classes)):
            raise UserError(f"{source} lacks {len(missing)} of {len(only)} classes, the first is {missing[0]}")
        classes = sorted(only)
    number = {name: i for i, name in enumerate(classes)}
    result = Source(classes, [], watch=[str(source.resolve())])
    for split, files in found.items():
        if split in labelled:
            files.problems += [{"name": name, "reason": BESIDE} for name in files.keep(lambda name: "/" in name)]
        if only is not None:
            files.keep(lambda name: name.split("/", 1)[0] in only)
        labels = [number[name.split("/", 1)[0]] if split in labelled else -1 for name in files.names]
        result.splits.append(_file_split(split, roots[split], files, np.array(labels, np.int64)))
        result.problems += [{"split": split, **problem} for problem in files.problems]
        result.ignored += files.ignored
        result.watch += files.folders
    return result


BESIDE = "lies beside the class folders, so it has no label; --unlabelled takes all images, without labels"


def _split_folders(source: Path) -> dict[str, Path]:
    """The folders of the splits, none if none is named like one."""
    folders = [entry for entry in sorted(source.iterdir()) if entry.is_dir()]
    named = [entry for entry in folders if entry.name in SPLITS]
    others = [entry.name for entry in folders if named and entry.name not in SPLITS and _holds_images(entry)]
    if others:
        names, beside = (", ".join(words) for words in ([entry.name for entry in named], others[:3]))
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise UserError(f"{source} holds {names} and also images in {beside}{more}: splits or classes? Move them apart")
    test = [entry for entry in named if entry.name == "test"]
    val = [entry for entry in named if SPLITS[entry.name] == "val" and entry not in test]
    if len(val) > 1:
        raise UserError(
            f"{source} holds {' and '.join(entry.name for entry in val)}: which of them is val? Move the other away"
        )
    if val and test:
        print(f"note: {test[0]} is left out, val is {val[0]}", file=sys.stderr)
        named.remove(test[0])
    return {SPLITS[entry.name]: entry for entry in named}


def _holds_images(folder: Path) -> bool:
    if folder.name.startswith(".") or folder.name == LOST:
        return False

    def stop(error: OSError) -> None:
        raise _unreadable(error)

    walk = os.walk(folder, onerror=stop)
    return any(os.path.splitext(name)[1].lower() in SUFFIXES for _, _, names in walk for name in names)


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


def _array_split(split: str, images: np.ndarray, labels, files: list[Path]) -> Split:
    """`images`: (n, H, W) or (n, H, W, 3) uint8; `files`: those that they were read from."""
    if len(images) != len(labels):
        raise UserError(
            f"{files[0]} has {len(images)} images and {len(labels)} labels: a file is cut off, or of another set"
        )
    names = [f"{i:06d}" for i in range(len(images))]
    sizes = np.full(len(images), images[0].nbytes if len(images) else 0, np.int64)
    times = np.full(len(images), max(path.stat().st_ctime_ns for path in files), np.int64)
    return Split(split, names, np.asarray(labels, np.int64), sizes, lambda i: images[i], times)


def _class_folders(source: Path | None) -> bool:
    return source is not None and any((source / name).is_dir() for name in SPLITS)


def cifar(name: str, source: Path | None, download: bool) -> Source:
    """The official python archive (unpacked) by torchvision, or class folders of images."""
    if source is not None and _class_folders(source):
        return folder(source)
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    root = source or Path("data")
    with _explained(name, root, download):
        sets = {split: kind(str(root), train=split == "train", download=download) for split in ("train", "val")}
    files = _files(root / kind.base_folder)
    splits = [_array_split(split, data.data, data.targets, files) for split, data in sets.items()]
    return Source(list(sets["train"].classes), splits, watch=[str(path) for path in files])


def stl10(source: Path | None, download: bool) -> Source:
    """`train` (5k), `val` (8k, the official test split) and `unlabelled` (100k, label -1)."""
    from torchvision import datasets

    root = source or Path("data")
    parts = {"train": "train", "val": "test", "unlabelled": "unlabeled"}
    with _explained("stl10", root, download):
        sets = {name: datasets.STL10(str(root), split=part, download=download) for name, part in parts.items()}
    files = _files(root / datasets.STL10.base_folder)
    # torchvision gives (n, 3, H, W), and -1 for what has no label.
    splits = [_array_split(name, data.data.transpose(0, 2, 3, 1), data.labels, files) for name, data in sets.items()]
    return Source(list(sets["train"].classes), splits, watch=[str(path) for path in files])


def _files(folder: Path) -> list[Path]:
    return sorted(path.resolve() for path in folder.iterdir() if path.is_file())


@contextlib.contextmanager
def _explained(name: str, root: Path, download: bool) -> Iterator[None]:
    """What torchvision says, or its way of fetching, in one line."""
    try:
        yield
    except (RuntimeError, OSError, HTTPException) as error:
        text = " ".join(str(error).split())[:200]
        if download:
            raise UserError(f"{name} cannot be fetched into {root}: {text}") from None
        if not isinstance(error, RuntimeError):
            raise
        raise UserError(f"{name} is not in {root} ({text}); --download fetches it") from None


def fashion_mnist(source: Path | None, download: bool) -> Source:
    """The four idx files, gzipped or not: in SOURCE, in Debian's package, or where torchvision puts them."""
    places = [source, source and source / "FashionMNIST" / "raw"] if source else [DEBIAN_FASHION_MNIST]
    places += [Path("data/FashionMNIST/raw")]
    here = next((place for place in places if place and _idx_file(place, "train-images-idx3-ubyte")), None)
    if here is None and download:
        from torchvision import datasets

        root = source or Path("data")
        with _explained("fashion-mnist", root, download):
            here = Path(datasets.FashionMNIST(str(root), download=True).raw_folder)
    if here is None:
        raise UserError(
            f"fashion-mnist is in none of {', '.join(str(place) for place in places)}; "
            "`apt-get install dataset-fashion-mnist` installs it, --download fetches it"
        )
    result = Source(list(FASHION_MNIST_CLASSES), [])
    for split, part in (("train", "train"), ("val", "t10k")):
        files = [_idx_file(here, f"{part}-images-idx3-ubyte"), _idx_file(here, f"{part}-labels-idx1-ubyte")]
        there = [path.resolve() for path in files if path]
        if len(there) < len(files):
            raise UserError(f"{here} lacks {part}-images-idx3-ubyte or {part}-labels-idx1-ubyte, gzipped or not")
        images, labels = (read_idx(path) for path in there)
        result.splits.append(_array_split(split, images, labels, there))
        result.watch += [str(path) for path in there]
    return result


def _idx_file(place: Path, name: str) -> Path | None:
    return next((path for path in (place / name, place / f"{name}.gz") if path.is_file()), None)


def read_idx(path: Path) -> np.ndarray:
    """An idx file of bytes (the MNIST format): two zeros, type 8, number of dimensions, then those, big-endian."""
    import gzip

    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is no whole gzip file: {error}") from None
    if data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise UserError(f"{path} is not an idx file of bytes")
    shape = np.frombuffer(data, ">u4", data[3], 4).astype(int)
    if len(data) != 4 + 4 * data[3] + int(shape.prod()):
        raise UserError(f"{path} has {len(data)} bytes, its header says otherwise: it is cut off")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def digits() -> Source:
    """scikit-learn's 1797 handwritten digits, 8x8 grey; every fifth is `val`."""
    try:
        from sklearn import datasets
    except ImportError:
        raise UserError("dataset digits comes with scikit-learn: pip install scikit-learn") from None
    data, file = datasets.load_digits(), Path(datasets.__file__)
    images = (data.images * 15.9375).astype(np.uint8)  # 0..16 to 0..255
    val = np.arange(len(images)) % 5 == 4
    splits = [
        _array_split(name, images[mask], data.target[mask], [file]) for name, mask in (("train", ~val), ("val", val))
    ]
    return Source([str(i) for i in range(10)], splits, watch=[str(file)])


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
