"""The data sets by name: `load(dataset, source)`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from manyview.pipeline import storage
from manyview.pipeline.convert import summary
from manyview.pipeline.convert.sources import (
    AS_IT_IS,
    SUFFIXES,
    Reading,
    Source,
    arrays,
    benchmarks,
    folders,
    imagenet,
    shards,
)
from manyview.pipeline.errors import UserError, nearest


def load(dataset: str, source: Path | None, reading: Reading = AS_IT_IS) -> Source:
    """Open a dataset. UserError: unknown name, nothing there, no source given where one is needed, labels that cannot be
    what was meant (see `summary.check`)."""
    if dataset not in DATASETS:
        raise UserError(nearest("dataset", dataset, DATASETS))
    if source is None and dataset not in WITHOUT_SOURCE and not reading.download:
        raise UserError(f"dataset {dataset} needs SOURCE, the folder it lies in (--source DIRECTORY)")
    if source is not None and (url := storage.address(source)):
        raise UserError(f"source {url} is an address: a source is a folder or an archive of this machine, copy it here")
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
        raise UserError(f"no images in {source}: looked for {', '.join(sorted(SUFFIXES))}{there}")
    if reading.unlabelled and not reading.labels:
        result.classes = []
        for split in result.splits:
            split.labels = np.full(len(split.names), -1, np.int64)
    if reading.holdout:
        result.hold_out(reading.holdout, reading.seed)
    result.notes += summary.check(
        result.classes, {split.name: split.labels for split in result.splits}, reading.disjoint
    )
    return result


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
