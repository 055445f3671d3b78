"""The usual evaluation sets in their own layout, with their official splits, by torchvision's parsers where it has them.

See docs/datasets.md for what each holds. `train` is what one learns from (train and validation, where there are both), `val`
the test images. Where a set has no official split, the split here is drawn once, by a fixed seed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from itertools import chain, compress
from pathlib import Path
from typing import Any

import numpy as np

from manyview.pipeline.convert.sources import Reading, Source, Split, folders, read_named
from manyview.pipeline.convert.sources.arrays import array_split, explained
from manyview.pipeline.errors import UserError

Listed = list[tuple[str, int]]  # a split's images: path and label of each
VOC_CLASSES = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]  # fmt: skip
DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
FAMILY = 5  # its place in the name of a folder of iNaturalist 2021, after number, kingdom, phylum, class and order


def listed(root: Path, classes: list[str], parts: dict[str, Listed]) -> Source:
    """The files that lists name. What is not there, is named twice or lies outside `root` goes to the problems; UserError: a
    list whose labels are not those of the classes."""
    result, base = Source(classes, [], watch=[str(root.resolve())]), os.path.abspath(root)
    for split, images in parts.items():
        if wrong := [label for _, label in images if not 0 <= label < len(classes)]:
            raise UserError(f"{root}: the list of {split} gives class {wrong[0]} of {len(classes)} (from 0)")
        rows: dict[str, tuple[int, int, int]] = {}  # label, size, ctime
        for path, label in images:
            name = os.path.relpath(os.path.normpath(os.path.join(base, path)), base)
            if reason := _unusable(name, rows, os.path.join(base, name)):
                result.problems.append({"split": split, "name": name, "reason": reason})
            else:
                state = os.stat(os.path.join(base, name))
                rows[name] = label, state.st_size, state.st_ctime_ns
        names = sorted(rows, key=os.fsencode)
        labels, sizes, times = np.array([rows[name] for name in names], np.int64).reshape(-1, 3).T.copy()
        read = partial(read_named, base, names)
        result.splits.append(Split(split, names, labels, sizes, read, times))
        result.watch += sorted({os.path.dirname(os.path.join(base, name)) for name in rows})
    return result


def _unusable(name: str, rows: dict, path: str) -> str:
    if name.startswith(".."):
        return "the list leads out of the folder"
    if name in rows:
        return "the list names it twice"
    return "" if os.path.isfile(path) else "the list names it, but it is not there"


def root_of(source: Path | None, base: str) -> Path:
    """The folder that holds `base`; SOURCE may be either."""
    source = source or Path("data")
    return source.parent if source.name == base and not (source / base).is_dir() else source


# ------------------------------------------------------------------------------------------------- torchvision's parsers


def by_torchvision(
    kind: str, base: str, train: tuple[str, ...], test: str, files: str, source: Path | None, reading: Reading
) -> Source:
    """A set that torchvision's class `kind` lists below `base`, with its names of splits and of the attribute of paths."""
    from torchvision import datasets

    root = root_of(source, base)
    parts: dict[str, Listed] = {"train": [], "val": []}
    classes: list[str] = []
    for split, part in [*(("train", part) for part in train), ("val", test)]:
        with explained(kind, root, reading.download):
            data: Any = getattr(datasets, kind)(str(root), split=part, download=reading.download)
        parts[split] += [(os.path.abspath(path), int(label)) for path, label in zip(getattr(data, files), data._labels)]
        classes = list(getattr(data, "classes", ())) or classes
    count = max((label for images in parts.values() for _, label in images), default=-1) + 1
    return listed(root, classes or [str(i) for i in range(count)], parts)


def train_and_test(kind: str, root: Path, reading: Reading) -> dict[str, Any]:
    """torchvision's class `kind` of both splits."""
    from torchvision import datasets

    with explained(kind, root, reading.download):
        make = partial(getattr(datasets, kind), str(root), download=reading.download)
        return {split: make(split=part) for split, part in (("train", "train"), ("val", "test"))}


def cars(source: Path | None, reading: Reading) -> Source:
    root = root_of(source, "stanford_cars")
    sets = train_and_test("StanfordCars", root, reading)
    parts = {
        split: [(os.path.abspath(path), int(label)) for path, label in data._samples] for split, data in sets.items()
    }
    return listed(root, list(sets["train"].classes), parts)


def svhn(source: Path | None, reading: Reading) -> Source:
    root = source or Path("data")
    sets = train_and_test("SVHN", root, reading)
    files = {split: (root / data.filename).resolve() for split, data in sets.items()}
    splits = [
        array_split(split, data.data.transpose(0, 2, 3, 1), data.labels, [files[split]]) for split, data in sets.items()
    ]
    return Source([str(digit) for digit in range(10)], splits, watch=[str(file) for file in files.values()])


def voc2012(source: Path | None, reading: Reading) -> Source:
    """The segmentation split; an image's class is the one that most of its mask's pixels have."""
    from torchvision import datasets

    root, sets = root_of(source, "VOCdevkit"), {}
    for split in ("train", "val"):
        fetch = reading.download and not (root / "VOCdevkit").is_dir()
        with explained("VOC 2012", root, fetch):
            sets[split] = datasets.VOCSegmentation(str(root), year="2012", image_set=split, download=fetch)
    every = {split: [(os.path.abspath(path), largest_class(mask)) for path, mask in zip(data.images, data.targets)]
             for split, data in sets.items()}  # fmt: skip
    result = listed(root, VOC_CLASSES, {split: [row for row in rows if row[1] >= 0] for split, rows in every.items()})
    reason = "its mask shows no class, or cannot be read"
    for split, rows in every.items():
        names = [os.path.relpath(path, os.path.abspath(root)) for path, label in rows if label < 0]
        result.problems += [{"split": split, "name": name, "reason": reason} for name in names]
    return result


def largest_class(mask: str) -> int:
    """0 .. 19; -1 where the mask has none of the classes, or is no palette image."""
    from PIL import Image

    try:
        with Image.open(mask, formats=["PNG"]) as image:
            values = np.asarray(image) if image.mode == "P" else np.zeros(1, np.uint8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return -1
    counts = np.bincount(values.ravel(), minlength=256)[1 : len(VOC_CLASSES) + 1]
    return int(counts.argmax()) if counts.any() else -1


# ------------------------------------------------------------------------------------------- sets of folders, without a split


def class_folders(root: Path, training: Callable[[np.ndarray], np.ndarray], leave_out: str = "") -> Source:
    """Class folders below `root`; the images whose places `training(labels)` gives are `train`, the others `val`."""
    names = [name for name in folders.listing(root).names if "/" in name and name.split("/")[0] != leave_out]
    classes = sorted({name.split("/")[0] for name in names})
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[name.split("/")[0]] for name in names], np.int64)
    is_train = np.zeros(len(labels), bool)
    if len(labels):
        is_train[training(labels)] = True
    images = list(zip(names, labels.tolist()))
    return listed(root, classes, {"train": list(compress(images, is_train)), "val": list(compress(images, ~is_train))})


def caltech101(source: Path | None, reading: Reading) -> Source:
    """30 images of every class to train on, by a fixed seed."""
    from manyview.pipeline.plan import permutation  # here, as below: numba takes as long to load as all else

    def training(labels: np.ndarray) -> np.ndarray:
        order = permutation(len(labels), 0, 0)
        return np.concatenate([order[labels[order] == label][:30] for label in np.unique(labels)])

    root = fetched("caltech101", "Caltech101", "caltech101/101_ObjectCategories", source, reading)
    return class_folders(root, training, "BACKGROUND_Google")


def caltech256(source: Path | None, reading: Reading) -> Source:
    """80 % of the images, whatever their class, by a fixed seed."""
    from manyview.pipeline.plan import permutation

    root = fetched("caltech256", "Caltech256", "caltech256/256_ObjectCategories", source, reading)
    return class_folders(root, lambda labels: permutation(len(labels), 0, 0)[: int(0.8 * len(labels))])


def eurosat(source: Path | None, reading: Reading) -> Source:
    """80 % of every class, by a fixed seed."""
    from manyview.pipeline.plan import subset

    root = fetched("eurosat", "EuroSAT", "eurosat/2750", source, reading)
    return class_folders(root, partial(subset, fraction=0.8, seed=0))


def fetched(name: str, kind: str, inside: str, source: Path | None, reading: Reading) -> Path:
    """The folder `inside` of a set that torchvision can fetch: below SOURCE, or SOURCE itself."""
    root = source or Path("data")
    if reading.download and not (root / inside).is_dir():
        from torchvision import datasets

        with explained(name, root, True):
            getattr(datasets, kind)(str(root), download=True)
    last = inside.rpartition("/")[2]
    places = [root / inside, root / last, root]
    here = next((place for place in places if place.is_dir() and place.name == last), None)
    if here is None:
        raise UserError(f"{name} is not in {root}: no folder {last} there; --download fetches it")
    return here


# --------------------------------------------------------------------------------------------------------- lists of our own


def lines(path: Path, words: int) -> list[list[str]]:
    """The words of each line of a list, `words` of them (the last one may hold spaces). ValueError where a line has fewer."""
    rows = [line.split(maxsplit=words - 1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if short := [number for number, row in enumerate(rows, 1) if len(row) < words]:
        raise ValueError(f"{path.name}, line {short[0]}: {words} words expected")
    return rows


def by_hand(name: str, source: Path | None, reading: Reading) -> Path:
    """The folder of a set that nobody but its owner can fetch."""
    if source is None or not source.is_dir():
        ask = "--download cannot fetch it" if reading.download else "it needs SOURCE"
        raise UserError(f"{name}: {ask}; docs/datasets.md says where it is and how the folder looks")
    return source


def cub200(source: Path | None, reading: Reading) -> Source:
    """images.txt, image_class_labels.txt (from 1), train_test_split.txt (1 = train) and classes.txt."""
    root = root_of(by_hand("cub200", source, reading), "CUB_200_2011") / "CUB_200_2011"
    with explained("CUB-200-2011", root, False):
        classes = [name.split(".", 1)[-1] for _, name in lines(root / "classes.txt", 2)]
        label = {image: int(number) - 1 for image, number in lines(root / "image_class_labels.txt", 2)}
        train = {image for image, one in lines(root / "train_test_split.txt", 2) if one == "1"}
        rows = [(f"images/{name}", label[image], image in train) for image, name in lines(root / "images.txt", 2)]
    parts = {"train": [row[:2] for row in rows if row[2]], "val": [row[:2] for row in rows if not row[2]]}
    return listed(root, classes, parts)


def domainnet(domain: str, source: Path | None, reading: Reading) -> Source:
    """`DOMAIN_train.txt` and `DOMAIN_test.txt` beside the folder DOMAIN: a path and a label (from 0) a line."""
    root = by_hand(f"domainnet-{domain}", source, reading)
    with explained(f"DomainNet's {domain}", root, False):
        parts: dict[str, Listed] = {}
        for split, part in (("train", "train"), ("val", "test")):
            text = (root / f"{domain}_{part}.txt").read_text()
            rows = [line.rsplit(maxsplit=1) for line in text.splitlines() if line.strip()]
            parts[split] = [(path, int(label)) for path, label in rows]
        names: dict[int, str] = {}
        for path, label in chain(*parts.values()):
            if names.setdefault(label, path.split("/")[-2]) != path.split("/")[-2]:
                raise ValueError(f"label {label} is {names[label]} and {path.split('/')[-2]}")
    return listed(root, [names.get(i, str(i)) for i in range(max(names, default=-1) + 1)], parts)


def inaturalist(source: Path | None, reading: Reading) -> Source:
    """The 500,000 images of `train_mini` and the 100,000 of `val`, by family (1,103 of them): the folders' names say it."""
    root = by_hand("inat21-mini-family", source, reading)
    parts: dict[str, list[tuple[str, str]]] = {}
    for split, places in (("train", ("train_mini", "2021_train_mini")), ("val", ("val", "2021_valid"))):
        place = next((place for place in places if (root / place).is_dir()), None)
        if place is None:
            raise UserError(f"inat21-mini-family: neither {' nor '.join(places)} in {root}")
        names = folders.listing(root / place).names
        if wrong := [name for name in names if len(name.split("/")[0].split("_")) <= FAMILY]:
            raise UserError(
                f"{root / place / wrong[0]}: its folder names no family (00000_Kingdom_Phylum_Class_Order_Family_…)"
            )
        parts[split] = [(f"{place}/{name}", name.split("/")[0].split("_")[FAMILY]) for name in names]
    classes = sorted({family for _, family in chain(*parts.values())})
    number = {name: i for i, name in enumerate(classes)}
    by_number = {split: [(name, number[family]) for name, family in rows] for split, rows in parts.items()}
    return listed(root, classes, by_number)


def sun397(source: Path | None, reading: Reading) -> Source:
    """The first of the ten official partitions: Training_01.txt and Testing_01.txt, beside the images or in Partitions/."""
    root = root_of(source, "SUN397")
    if reading.download and not (root / "SUN397").is_dir():
        from torchvision import datasets

        with explained("SUN397", root, True):
            datasets.SUN397(str(root), download=True)
    root = root / "SUN397"
    with explained("SUN397", root, False):
        classes = [line.strip() for line in (root / "ClassName.txt").read_text().splitlines() if line.strip()]
        number = {name: i for i, name in enumerate(classes)}
        parts = {}
        for split, part in (("train", "Training_01.txt"), ("val", "Testing_01.txt")):
            places = (root / part, root / "Partitions" / part, root.parent / "Partitions" / part)
            file = next((place for place in places if place.is_file()), places[0])
            names = [line.strip() for line in file.read_text().splitlines() if line.strip()]
            parts[split] = [(name.lstrip("/"), number[name.rpartition("/")[0]]) for name in names]
    return listed(root, [name[3:] for name in classes], parts)


BENCHMARKS: dict[str, Callable[[Path | None, Reading], Source]] = {
    "aircraft": partial(by_torchvision, "FGVCAircraft", "fgvc-aircraft-2013b", ("trainval",), "test", "_image_files"),
    "caltech101": caltech101,
    "caltech256": caltech256,
    "cars": cars,
    "cub200": cub200,
    **{f"domainnet-{domain}": partial(domainnet, domain) for domain in DOMAINS},
    "dtd": partial(by_torchvision, "DTD", "dtd", ("train", "val"), "test", "_image_files"),
    "eurosat": eurosat,
    "flowers102": partial(by_torchvision, "Flowers102", "flowers-102", ("train", "val"), "test", "_image_files"),
    "food101": partial(by_torchvision, "Food101", "food-101", ("train",), "test", "_image_files"),
    "inat21-mini-family": inaturalist,
    "pets": partial(by_torchvision, "OxfordIIITPet", "oxford-iiit-pet", ("trainval",), "test", "_images"),
    "sun397": sun397,
    "svhn": svhn,
    "voc2012": voc2012,
}
