"""ImageNet: class folders, or the official tars and development kit as they were downloaded. Nothing is unpacked."""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from manyview.pipeline import tar
from manyview.pipeline.convert.sources import AS_IT_IS, Reading, Source, Split, changed, folders, read_bytes
from manyview.pipeline.errors import UserError

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


class Member(NamedTuple):
    name: str
    label: int
    path: str
    offset: int
    size: int


def _split(name: str, members: list[Member]) -> Split:
    members = sorted(members, key=lambda member: os.fsencode(member.name))
    names, paths = [member.name for member in members], [member.path for member in members]
    labels, sizes = (np.array([getattr(member, what) for member in members], np.int64) for what in ("label", "size"))
    return Split(name, names, labels, sizes, lambda i: read_bytes(*members[i][2:]), changed(paths))


def imagenet(source: Path, reading: Reading = AS_IT_IS, only: set[str] | None = None) -> Source:
    """Class folders below train/ and val/, or the official archives as they were downloaded."""
    if not ((source / TRAIN).is_file() or (source / VAL).is_file()):
        return folders.folder(source, replace(reading, unlabelled=False) if only else reading, only)
    if reading.labels:
        raise UserError(f"{source} holds the official archives, whose labels are in {DEVKIT}: no --labels")
    return imagenet_tars(source, only)


def imagenet100_classes() -> set[str]:
    text = Path(__file__).with_name("imagenet100.txt").read_text()
    return {line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")}


def imagenet_tars(source: Path, only: set[str] | None = None) -> Source:
    """The official train and val archives in one folder; val's labels come from the development kit beside them.

    The samples have the names they have in the class-folder layout, so both make the same shards.
    """
    result = Source([], [], watch=[str(source / name) for name in (TRAIN, VAL, DEVKIT) if (source / name).exists()])
    train = _train_members(source / TRAIN, only, result) if (source / TRAIN).is_file() else {}
    wnids = _devkit(source / DEVKIT) if (source / VAL).is_file() else []
    result.classes = sorted(only or {*train, *wnids})
    if train and (missing := sorted(set(result.classes) - set(train))):
        raise UserError(f"{source / TRAIN} lacks {len(missing)} classes, the first is {missing[0]}")
    number = {wnid: i for i, wnid in enumerate(result.classes)}
    members = [member._replace(label=number[wnid]) for wnid, images in train.items() for member in images]
    result.splits.append(_split("train", members))
    if wnids:
        result.splits.append(_split("val", _val_members(source / VAL, wnids, number, result)))
    if result.ignored:
        result.notes.append(f"{result.ignored} files in the archives are no images by their names")
    return result


def _images(path: Path, split: str, result: Source, place: tuple[int, int] | None = None) -> Iterator[tar.Member]:
    """Image members of a tar, or of one in these bytes of a file; what is no plain file inside it goes to `problems`."""
    try:
        for member in tar.members(path, *(place or ())):
            if reason := member.refused():
                result.problems.append({"split": split, "name": member.name, "reason": reason})
            elif folders.is_image(os.path.basename(member.name)) or (place is None and member.name.endswith(".tar")):
                yield member
            else:
                result.ignored += member.type != tar.FOLDER
    except ValueError as error:
        raise UserError(f"{path} is no whole tar archive{f' (at byte {place[0]})' if place else ''}: {error}") from None


def _train_members(path: Path, only: set[str] | None, result: Source) -> dict[str, list[Member]]:
    members = {}
    for outer in _images(path, "train", result):
        wnid = os.path.splitext(os.path.basename(outer.name))[0]
        if only is None or wnid in only:
            members[wnid] = [
                Member(f"{wnid}/{image.name}", -1, str(path), image.offset, image.size)
                for image in _images(path, "train", result, (outer.offset, outer.offset + outer.size))
            ]
    return members


def _val_members(path: Path, wnids: list[str], number: dict[str, int], result: Source) -> list[Member]:
    images = sorted(_images(path, "val", result), key=lambda image: image.name)
    if len(images) != len(wnids):
        raise UserError(f"{path} has {len(images)} images, the development kit labels {len(wnids)}")
    return [
        Member(f"{wnid}/{image.name}", number[wnid], str(path), image.offset, image.size)
        for wnid, image in zip(wnids, images)
        if wnid in number
    ]


def _devkit(path: Path) -> list[str]:
    """The class (wnid) of each validation image, in order of file name."""
    if not path.is_file():
        raise UserError(f"{path} is missing: it holds the labels of {VAL} (or remove {VAL} to convert train alone)")
    from scipy.io import loadmat

    try:
        with tarfile.open(path, "r:gz") as archive:
            files = {os.path.basename(info.name): info for info in archive if info.isreg()}
            meta, truth = (
                archive.extractfile(files[name]).read()  # type: ignore[union-attr]
                for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
            )
    except KeyError as error:
        raise UserError(f"{path} holds no {error.args[0]}") from None
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path} is no whole .tar.gz: {error}") from None
    synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    return [wnids[int(number)] for number in truth.split()]
