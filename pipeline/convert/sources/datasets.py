"""The data sets by name: `load(dataset, source)`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from manyview.pipeline import storage
from manyview.pipeline.convert import summary
from manyview.pipeline.convert.sources import AS_IT_IS, Reading, Source, arrays, benchmarks, folders, imagenet, shards
from manyview.pipeline.errors import UserError, nearest

FETCHES = 16  # requests at once: small images wait for the network's answer, not for its width


def load(dataset: str, source: Path | None, reading: Reading = AS_IT_IS) -> Source:
    """Open a dataset. UserError: unknown name, nothing there, no source given where one is needed, labels that cannot be
    what was meant (see `summary.check`)."""
    if dataset not in DATASETS:
        raise UserError(nearest("dataset", dataset, DATASETS))
    if source is None and dataset not in WITHOUT_SOURCE and not reading.download:
        raise UserError(f"dataset {dataset} needs SOURCE, the folder it lies in (--source DIRECTORY)")
    if source is not None and (url := storage.address(source)):
        if not reading.download:
            raise UserError(f"source {url} is an address: --download (DOWNLOAD=1) fetches it into {_place(url)}")
        source, reading = fetched(url), replace(reading, download=False)
    if source is not None and not source.exists() and not reading.download:
        raise UserError(f"source {source} does not exist")
    if reading.labels and dataset not in WITH_TABLE:
        raise UserError(f"--labels is for the datasets {', '.join(WITH_TABLE)}: {dataset} has labels of its own")
    result = DATASETS[dataset](source, reading)  # type: ignore[arg-type]
    result.notes += [f"{split.name} holds no image" for split in result.splits if not split.names]
    result.splits = [split for split in result.splits if split.names]
    if not result.splits and result.problems:
        first = result.problems[0]
        raise UserError(
            f"not one of {len(result.problems)} images in {source} can be used, the first is {first['name']!r}: {first['reason']}"
        )
    if not result.splits:
        there = f"; {'; '.join(result.notes)}" if result.notes else ""
        raise UserError(f"no images in {source}: looked for {', '.join(sorted(reading.suffixes))}{there}")
    if reading.unlabelled and not reading.labels:
        result.classes = []
        for split in result.splits:
            split.labels = np.full(len(split.names), -1, np.int64)
    if reading.holdout:
        result.hold_out(reading.holdout, reading.seed)
    labels = {split.name: split.labels for split in result.splits}
    result.notes += summary.check(result.classes, labels, reading.disjoint)
    return result


def _place(url: str) -> Path:
    return Path("data") / url.partition("://")[2].strip("/")


def fetched(url: str) -> Path:
    """The folder in `data/` with the objects under an address (hf://datasets/OWNER/NAME, s3://..., whatever fsspec knows). What
    is there already, of the same size, is not fetched again."""
    remote, folder = storage.Storage(url), _place(url)
    sizes = remote.sizes()
    if not sizes or "" in sizes:
        raise UserError(f"{url} is no folder with files")
    if wrong := next((name for name in sizes if {"", ".."} & set(name.split("/")) or ".." in folder.parts), None):
        raise UserError(f"{url} holds {wrong!r}, which would lead out of {folder}")
    there = {name for name in sizes if (folder / name).is_file() and (folder / name).stat().st_size == sizes[name]}
    if missing := [name for name in sizes if name not in there]:
        megabytes = sum(sizes[name] for name in missing) / 1e6
        print(f"fetching {len(missing):,} of {len(sizes):,} files, {megabytes:,.1f} MB, into {folder}", file=sys.stderr)
    with ThreadPoolExecutor(FETCHES) as pool:
        for _ in pool.map(lambda name: remote.fetch(name, folder / name), missing):
            pass
    return folder


WITHOUT_SOURCE = {"digits", "fashion-mnist"}
WITH_TABLE = ("folder", "imagenet")
DATASETS: dict[str, Callable[[Path, Reading], Source]] = {
    "folder": folders.folder,
    "imagenet": imagenet.imagenet,
    "imagenet100": lambda source, reading: imagenet.imagenet(source, reading, imagenet.imagenet100_classes()),
    "shards": shards.existing,
    "cifar10": lambda source, reading: arrays.cifar("cifar10", source, reading),
    "cifar100": lambda source, reading: arrays.cifar("cifar100", source, reading),
    "stl10": arrays.stl10,
    "fashion-mnist": arrays.fashion_mnist,
    "digits": lambda *_: arrays.digits(),
    **benchmarks.BENCHMARKS,
}
