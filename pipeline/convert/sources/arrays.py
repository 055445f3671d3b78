"""Sets of pixels in arrays: CIFAR, STL-10, Fashion-MNIST, digits, by their own files or by torchvision."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np

from manyview.pipeline.convert.sources import Reading, Source, Split, folders
from manyview.pipeline.errors import UserError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def array_split(split: str, images: np.ndarray, labels, files: list[Path]) -> Split:
    """`images`: (n, H, W) or (n, H, W, 3) uint8; `files`: those that they were read from."""
    if len(images) != len(labels):
        raise UserError(
            f"{files[0]} has {len(images)} images and {len(labels)} labels: a file is cut off, or of another set"
        )
    names = [f"{i:06d}" for i in range(len(images))]
    sizes = np.full(len(images), images[0].nbytes if len(images) else 0, np.int64)
    times = np.full(len(images), max(path.stat().st_ctime_ns for path in files), np.int64)
    return Split(split, names, np.asarray(labels, np.int64), sizes, lambda i: images[i], times)


def cifar(name: str, source: Path | None, reading: Reading) -> Source:
    """The official python archive (unpacked) by torchvision, or class folders of images."""
    if source is not None and source.is_dir() and folders.has_splits(source):
        return folders.folder(source, reading)
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    sets, files = _sets(name, kind, {"train": {"train": True}, "val": {"train": False}}, source, reading)
    splits = [array_split(split, data.data, data.targets, files) for split, data in sets.items()]
    return Source(list(sets["train"].classes), splits, watch=[str(path) for path in files])


def _sets(
    name: str, kind: Any, splits: dict[str, dict[str, Any]], source: Path | None, reading: Reading
) -> tuple[dict[str, Any], list[Path]]:
    """torchvision's class `kind` of each split, by what it is told, and the files that it reads."""
    root = source or Path("data")
    with explained(name, root, reading.download):
        sets = {split: kind(str(root), download=reading.download, **told) for split, told in splits.items()}
    return sets, sorted(path.resolve() for path in (root / kind.base_folder).iterdir() if path.is_file())


def stl10(source: Path | None, reading: Reading) -> Source:
    """`train` (5k), `val` (8k, the official test split) and `unlabelled` (100k, label -1)."""
    from torchvision import datasets

    told = {"train": {"split": "train"}, "val": {"split": "test"}, "unlabelled": {"split": "unlabeled"}}
    sets, files = _sets("stl10", datasets.STL10, told, source, reading)
    # torchvision gives (n, 3, H, W), and -1 for what has no label.
    splits = [array_split(name, data.data.transpose(0, 2, 3, 1), data.labels, files) for name, data in sets.items()]
    return Source(list(sets["train"].classes), splits, watch=[str(path) for path in files])


@contextlib.contextmanager
def explained(name: str, root: Path, download: bool) -> Iterator[None]:
    """Whatever a parser stumbles over (files that are not there, lists that are cut off) in one line."""
    try:
        yield
    except (RuntimeError, OSError, HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        text = text.replace("You can use download=True to download it", "--download fetches it")
        if download:
            raise UserError(f"{name} cannot be fetched into {root}: {text}") from None
        raise UserError(
            f"{name} is not in {root}, or not whole ({text}); docs/datasets.md says what belongs there"
        ) from None


def fashion_mnist(source: Path | None, reading: Reading) -> Source:
    """The four idx files, gzipped or not: in SOURCE, in Debian's package, or where torchvision puts them."""
    places = [source, source and source / "FashionMNIST" / "raw"] if source else [DEBIAN_FASHION_MNIST]
    places += [Path("data/FashionMNIST/raw")]
    here = next((place for place in places if place and _idx_file(place, "train-images-idx3-ubyte")), None)
    if here is None and reading.download:
        from torchvision import datasets

        root = source or Path("data")
        with explained("fashion-mnist", root, True):
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
        result.splits.append(array_split(split, images, labels, there))
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
    from sklearn import datasets

    data, file = datasets.load_digits(), Path(datasets.__file__)
    images = (data.images * 15.9375).astype(np.uint8)  # 0..16 to 0..255
    val = np.arange(len(images)) % 5 == 4
    parts = {"train": ~val, "val": val}
    splits = [array_split(name, images[mask], data.target[mask], [file]) for name, mask in parts.items()]
    return Source([str(i) for i in range(10)], splits, watch=[str(file)])
