"""The data sets by name: `load(dataset, source)`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from manyview.pipeline import storage
from manyview.pipeline.convert.sources import SUFFIXES, Source, arrays, folders, imagenet, shards
from manyview.pipeline.errors import UserError, nearest


def load(dataset: str, source: Path | None, download: bool = False, unlabelled: bool = False) -> Source:
    """Open a dataset. UserError: unknown name, nothing there, no source given where one is needed."""
    if dataset not in DATASETS:
        raise UserError(nearest("dataset", dataset, DATASETS))
    if source is None and dataset not in WITHOUT_SOURCE and not download:
        raise UserError(f"dataset {dataset} needs SOURCE, the folder it lies in (--source DIRECTORY)")
    if source is not None and (url := storage.address(source)):
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


WITHOUT_SOURCE = {"digits", "fashion-mnist"}
DATASETS: dict[str, Callable[[Path, bool, bool], Source]] = {
    "folder": folders.folder,
    "imagenet": lambda source, *_: imagenet.imagenet(source),
    "imagenet100": lambda source, *_: imagenet.imagenet(source, imagenet.imagenet100_classes()),
    "shards": lambda source, *_: shards.existing(source),
    "cifar10": lambda source, download, _: arrays.cifar("cifar10", source, download),
    "cifar100": lambda source, download, _: arrays.cifar("cifar100", source, download),
    "stl10": lambda source, download, _: arrays.stl10(source, download),
    "fashion-mnist": lambda source, download, _: arrays.fashion_mnist(source, download),
    "digits": lambda *_: arrays.digits(),
}
