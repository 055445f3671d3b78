"""Existing shards as a source: our own folders, WebDataset tars, .beton files. Nothing is unpacked."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from manyview.pipeline import beton, codec, tar
from manyview.pipeline.convert.sources import SUFFIXES, Source, Split, changed, read_bytes
from manyview.pipeline.convert.sources.imagenet import refused
from manyview.pipeline.errors import UserError

IMAGES = (*(suffix[1:] for suffix in sorted(SUFFIXES)), "npy")
LABELS = ("cls", "label", "json", "txt")
CLASSES = 10_000_000  # a number beyond is an id or damage, and to name as many classes would take gigabytes


@dataclass
class Record:
    """One sample of an existing shard: where its image lies and what it is."""

    key: str
    extension: str  # of the image: jpg, png, npy, ...; "jpg" or "raw" in a .beton
    offset: int
    size: int
    label: int | str
    height: int = 0
    width: int = 0


def shard_files(source: Path) -> list[Path]:
    """Existing tars and betons: the file itself, or all below a folder, sorted. UserError if there are none."""
    if source.is_file():
        return [source]
    found = sorted(path for suffix in (tar.SUFFIX, beton.SUFFIX) for path in source.rglob(f"*{suffix}"))
    if not found:
        raise UserError(f"{source} holds no .tar and no .beton")
    return found


def split_of(path: Path, source: Path) -> str:
    """`val` if the path says val, valid, validation or test, else `train`."""
    text = str(path.relative_to(source) if source.is_dir() else path.name).lower()
    return "val" if re.search(r"(^|[^a-z])(val|valid|validation|test)([^a-z]|$)", text) else "train"


def records(path: Path) -> tuple[list[Record], list[dict]]:
    """Samples of one shard, in order, and what cannot be used. UserError if the file is damaged."""
    try:
        return _beton_records(path) if path.suffix == beton.SUFFIX else _tar_records(path)
    except (tarfile.TarError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None


def _beton_records(path: Path) -> tuple[list[Record], list[dict]]:
    found = beton.read(path)
    names = {codec.JPEG: "jpg", codec.RAW: "raw", codec.YUV420: "jpg"}  # a bytes field: the decoder will find out
    samples: list[Record] = []
    problems: list[dict] = []
    columns = zip(found.kind, found.offset, found.length, found.label, found.height, found.width)
    for i, (kind, *rest) in enumerate(columns):
        record = Record(f"{i:08d}", names[int(kind)], *(int(value) for value in rest))
        try:
            _class_number(int(record.label))
            samples.append(record)
        except ValueError as error:
            problems.append({"name": record.key, "reason": str(error)})
    return samples, problems


def _tar_records(path: Path) -> tuple[list[Record], list[dict]]:
    found: list[Record] = []
    problems: list[dict] = []
    seen: set[str] = set()
    with tarfile.open(path, "r:") as archive:
        for key, parts in _groups(archive, problems):
            if key in seen:
                problems.append({"name": key, "reason": "its key occurs twice in this shard"})
                continue
            seen.add(key)
            extension = next((name for name in IMAGES if name in parts), None)
            if extension is None:
                problems.append({"name": key, "reason": f"has no image, only {', '.join(sorted(parts)) or 'nothing'}"})
                continue
            image = parts[extension]
            try:
                found.append(Record(key, extension, image.offset_data, image.size, _label(archive, parts)))
            except ValueError as error:
                problems.append({"name": key, "reason": str(error)})
    return found, problems


def _groups(archive: tarfile.TarFile, problems: list[dict]) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Consecutive members with the same key, as WebDataset has it: the name up to the first dot of its last part."""
    last, parts = None, {}  # type: ignore[var-annotated]
    for info in archive:
        if reason := refused(info):
            problems.append({"name": info.name, "reason": reason})
        if not info.isreg() or refused(info):
            continue
        folder, slash, base = info.name.rpartition("/")
        stem, _, extension = base.partition(".")
        key = folder + slash + stem
        if key != last or extension.lower() in parts:
            if last is not None:
                yield last, parts
            last, parts = key, {}
        parts[extension.lower()] = info
    if last is not None:
        yield last, parts


def _label(archive: tarfile.TarFile, parts: dict[str, tarfile.TarInfo]) -> int | str:
    """A class's number or name, -1 for none. ValueError for a number that is no class's."""
    for name in LABELS:
        if name in parts:
            text = archive.extractfile(parts[name]).read().decode("utf-8", "replace").strip()  # type: ignore[union-attr]
            if name == "json":
                try:
                    values = json.loads(text)
                except ValueError:
                    continue
                words = ("label", "cls", "class") if isinstance(values, dict) else ()
                found = next((values[word] for word in words if word in values), None)
                if found is None:
                    continue
                text = str(found)
            return (
                _class_number(int(text[:20])) if re.fullmatch(r"-?\d+", text) else text
            )  # 20 digits: too many already
    return -1


def _class_number(value: int) -> int:
    if not -1 <= value <= CLASSES:
        raise ValueError(f"label {value} is no class's number, which is -1 (none) to {CLASSES:,}")
    return value


def number_labels(labels: list[int | str]) -> tuple[list[str], np.ndarray]:
    """Class names and (n,) int64 labels: numbers stay, names are numbered in alphabetical order."""
    if any(isinstance(label, str) for label in labels):
        names = sorted({str(label) for label in labels if label != -1})
        number = {name: i for i, name in enumerate(names)}
        return names, np.array([-1 if label == -1 else number[str(label)] for label in labels], np.int64)
    values = np.array(labels, np.int64)
    return [str(i) for i in range(int(values.max(initial=-1)) + 1)], values


def payload(record: Record, data: np.ndarray) -> np.ndarray:
    """What `encode.convert` takes: the bytes of an image file, or pixels. ValueError for arrays that are no image."""
    if record.extension == "raw":
        return data.reshape(record.height, record.width, 3)
    if record.extension != "npy":
        return data
    try:
        array = np.lib.format.read_array(io.BytesIO(data.tobytes()), allow_pickle=False)
    except Exception as error:  # its header is parsed as Python: whatever Python's parser can say may come of it
        raise ValueError(f"is no array: {' '.join(str(error).split())[:200]}") from None
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)) or not array.size:
        raise ValueError(f"an array of {array.dtype}, {array.shape}, is no 8-bit image")
    return array


def digest(texts: list[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def existing(source: Path) -> Source:
    """Existing shards as a source, to be written anew: our own folders, WebDataset tars, .beton files."""
    if (source / "manifest.json").is_file():
        return _own(source)
    files = shard_files(source)
    result = Source([], [], watch=[str(path) for path in files])
    rows: list[tuple[str, str, Path, Record]] = []
    for path in files:
        found, problems = records(path)
        split = split_of(path, source)
        result.problems += [{"split": split, **problem} for problem in problems]
        rows += [(split, record.key, path, record) for record in found]
    if len({row[:2] for row in rows}) != len(rows):  # keys that begin anew in every shard
        rows = [(split, f"{path.stem}/{key}", path, record) for split, key, path, record in rows]
    result.classes, labels = number_labels([row[3].label for row in rows])
    for name in sorted({row[0] for row in rows}):
        mine = sorted((i for i, row in enumerate(rows) if row[0] == name), key=lambda i: os.fsencode(rows[i][1]))
        result.splits.append(_existing_split(name, [rows[i] for i in mine], labels[mine]))
    return result


def _existing_split(name: str, rows: list, labels: np.ndarray) -> Split:
    def read(i: int) -> np.ndarray:
        _, _, path, record = rows[i]
        return payload(record, read_bytes(str(path), record.offset, record.size))

    names = [f"{key}.{record.extension}" for _, key, _, record in rows]
    sizes = np.array([row[3].size for row in rows], np.int64)
    return Split(name, names, labels, sizes, read, changed([str(row[2]) for row in rows]))


def _own(source: Path) -> Source:
    from manyview.pipeline import store

    opened = {name: store.Store(source, name) for name in store.splits(source)}
    result = Source(next(iter(opened.values())).classes, [], watch=[str(source / "manifest.json")])
    for name, data in opened.items():
        paths = [str(source / shard["file"]) for shard in data.shards]
        result.watch += paths
        result.splits.append(_own_split(name, data, store.Corrupt, changed(paths)[data.shard_of]))
    return result


def _own_split(name: str, data, corrupt: type[Exception], times: np.ndarray) -> Split:
    ranked = sorted(range(len(data)), key=data.key)
    sizes = np.array([int(data.heights[i]) * int(data.widths[i]) for i in ranked], np.int64)

    def read(i: int) -> np.ndarray:
        try:
            found = data.read(ranked[i])
        except corrupt as error:
            raise ValueError(str(error)) from None
        return found if found.ndim == 1 else codec.decode(found)

    return Split(name, [f"{data.key(i)}.img" for i in ranked], data.labels[ranked], sizes, read, times[ranked])
