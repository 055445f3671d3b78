"""Existing shards as a source: our own folders, WebDataset tars, .beton files. Nothing is unpacked.

A sample of a tar is the members of one key (their name up to the first dot), each a part of it by what follows: `jpg`, `cls`,
`seg.png`. Of a .beton the parts are its fields.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from itertools import compress
from operator import not_
from pathlib import Path

import numpy as np

from manyview.pipeline import beton, codec, files, store, tar
from manyview.pipeline.convert.sources import AS_IT_IS, SUFFIXES, Reading, Source, Split, changed, read_bytes, read_npy
from manyview.pipeline.errors import UserError

# Parts that may be the image, the likeliest first: masks and depth maps are stored without loss, features as arrays.
IMAGES = (
    ("jpg", "jpeg", "jpe", "jfif", "webp", "avif", "jp2"),
    tuple(suffix[1:] for suffix in sorted(SUFFIXES)),
    ("npy",),
)
LABELS = ("cls", "label", "json", "txt")
WORDS = ("label", "cls", "class")  # of a .json that may hold the class
TEXT = 1 << 20  # bytes of a label's part; more is none, and need not be read
CLASSES = 10_000_000  # a number beyond is an id or damage, and to name as many classes would take gigabytes
PACKED = re.compile(r".*\.(tar\.\w+|tgz|tbz2?|txz|tzst)", re.IGNORECASE)


@dataclass
class Record:
    """One sample of an existing shard: where its image lies and what it is."""

    key: str
    extension: str  # of the image: jpg, png, npy, ...; "jpg" or "raw" in a .beton
    offset: int
    size: int
    label: int | str  # a class's number or name, -1 for none
    height: int = 0
    width: int = 0
    caption: bool = False  # the label is what a .txt says: a class only if such are numbers


@dataclass
class Shard:
    """What is in one file, in order. `problems`: samples that cannot be used. `notes`: what is to be said, and of how many."""

    path: Path
    split: str = "train"
    records: list[Record] = field(default_factory=list)
    problems: list[dict] = field(default_factory=list)
    ignored: int = 0
    notes: Counter[str] = field(default_factory=Counter)


# --- the files ------------------------------------------------------------------------------------------------------


def shard_files(source: Path) -> list[Path]:
    """Existing tars and betons: the file itself, or all below a folder, sorted. UserError if there are none."""
    paths = [source] if source.is_file() else sorted(source.rglob("*"))
    paths = [path for path in paths if path.is_file() and not path.name.startswith(".")]  # "._x.tar": a Mac's
    if packed := [path for path in paths if PACKED.fullmatch(path.name)]:
        raise UserError(
            f"{packed[0]}: {len(packed)} compressed tars, which cannot be read at random: unpack them (gunzip)"
        )
    paths = [path for path in paths if source.is_file() or path.suffix.lower() in (tar.SUFFIX, beton.SUFFIX)]
    if not paths:
        raise UserError(f"{source} holds no .tar and no .beton")
    return paths


def split_of(path: Path, source: Path) -> str:
    """`val` if the path says val, valid, validation or test, else `train`."""
    text = str(path.relative_to(source) if source.is_dir() else path.name).lower()
    return "val" if re.search(r"(^|[^a-z])(val|valid|validation|test)([^a-z]|$)", text) else "train"


def read_shards(source: Path, reading: Reading) -> tuple[list[Shard], list[str], list[str]]:
    """All shards of a source, with keys that are unique in their split and labels that are numbers; the classes' names; and
    what has to be said. UserError: no shards, a damaged one.
    """
    shards = [read_shard(path, reading) for path in shard_files(source)]
    for shard in shards:
        shard.split = split_of(shard.path, source)
    classes = number_labels(shards)
    keys = Counter((shard.split, record.key) for shard in shards for record in shard.records)
    if keys.total() != len(keys):  # they begin anew in every shard
        for shard, name in zip(shards, unique_names([shard.path for shard in shards], source)):
            for record in shard.records:
                record.key = f"{name}/{record.key}"
    notes = sum((shard.notes for shard in shards), Counter())
    return shards, classes, [f"{count:,} {text}" for text, count in notes.items()]


def unique_names(paths: list[Path], source: Path) -> list[str]:
    """For each file its name without suffix; where these are not unique, with its folders; else with its suffix too."""
    inside = [path.relative_to(source if source.is_dir() else source.parent) for path in paths]
    for names in ([path.stem for path in inside], [path.with_suffix("").as_posix() for path in inside]):
        if len(set(names)) == len(names):
            return names
    return [path.as_posix() for path in inside]


def read_shard(path: Path, reading: Reading) -> Shard:
    """Samples of one shard, in order, labels as they stand. UserError if the file is damaged."""
    shard = Shard(path)
    try:
        (_read_beton if path.suffix.lower() == beton.SUFFIX else _read_tar)(shard, reading)
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: {error}") from None
    return shard


# --- a .beton -------------------------------------------------------------------------------------------------------


def _read_beton(shard: Shard, reading: Reading) -> None:
    contents = beton.read(shard.path, reading.image_part, reading.label_part)
    if contents.note:
        shard.notes[f"images without labels: {contents.note}"] += len(contents.label)
    names = {codec.JPEG: "jpg", codec.RAW: "raw", codec.YUV420: "jpg"}  # a bytes field: the decoder will find out
    columns = (contents.kind, contents.offset, contents.length, contents.label, contents.height, contents.width)
    for i, (kind, offset, size, label, *sides) in enumerate(zip(*(column.tolist() for column in columns))):
        key = f"{i:08d}"
        try:
            if offset + size > contents.table:
                raise ValueError("lies beyond the data")
            record = Record(key, names[kind], offset, size, _class_number(label), *sides)
        except ValueError as error:
            shard.problems.append({"name": key, "reason": str(error)})
        else:
            shard.records.append(record)


# --- a tar ----------------------------------------------------------------------------------------------------------


def _read_tar(shard: Shard, reading: Reading) -> None:
    samples = _samples(shard, reading)
    with files.Opened(shard.path) as file:
        for key, members in samples.items():
            try:
                name = _image_part(members, reading.image_part, shard)
                label, caption = _label(file, key, members, reading.label_part)
            except ValueError as error:
                shard.problems.append({"name": key, "reason": str(error)})
                continue
            extension, image = name.rpartition(".")[2], members[name]
            shard.records.append(Record(key, extension, image.offset, image.size, label, caption=caption))
    if shard.records and not reading.label_part and not any(_of(members, LABELS) for members in samples.values()):
        classes = sorted({_folder(key) for key in samples} - {""})
        way = f"; --label-part folder takes {', '.join(classes[:3])}, … as classes" if classes else ""
        shard.notes[f"images without labels: no .cls, .json or .txt{way}"] += len(samples)


def _samples(shard: Shard, reading: Reading) -> dict[str, dict[str, tar.Member]]:
    """Key -> its parts. Members of one key need not lie together; but where they do not, none may be there twice."""
    samples: dict[str, dict[str, tar.Member]] = {}
    key, run, before = "", {}, {}  # type: ignore[var-annotated]
    try:
        for member in tar.members(shard.path):
            if member.type == tar.FOLDER or _ignored(member.name):
                shard.ignored += member.type != tar.FOLDER
                continue
            if reason := member.refused():
                shard.problems.append({"name": member.name, "reason": reason})
                continue
            folder, slash, base = member.name.rpartition("/")
            stem, _, part = base.partition(".")
            if folder + slash + stem != key or part.lower() in run:
                _add(samples, key, run, shard)
                before, key, run = run, folder + slash + stem, {}
            run[part.lower()] = member
    except tar.CutOff as error:
        if not reading.allow_cut:
            count = len(samples) + (run.keys() == before.keys())
            raise ValueError(f"is cut off after {count} samples ({error}); --allow-cut takes those") from None
        if run.keys() != before.keys():
            shard.problems.append({"name": key, "reason": "the shard is cut off inside it"})
            return samples
    _add(samples, key, run, shard)
    return samples


def _add(samples: dict, key: str, run: dict[str, tar.Member], shard: Shard) -> None:
    there = samples.setdefault(key, {}) if run else {}
    if there.keys() & run.keys():
        shard.problems.append({"name": key, "reason": "its key occurs twice in this shard"})
    else:
        there |= run


def _ignored(name: str) -> bool:
    """Whether a member is no part of a sample: without dot or name before it, as webdataset has it; hidden; left by systems."""
    *folders, base = name.removeprefix("./").split("/")
    hidden = any(
        (part.startswith(".") and part not in ("..", ".")) or part in ("__MACOSX", "@eaDir") for part in folders
    )
    stem, dot, _ = base.partition(".")
    return hidden or not stem or not dot or base in ("Thumbs.db", "desktop.ini") or bool(re.fullmatch("__.*__", stem))


def _of(members: dict[str, tar.Member], suffixes: tuple[str, ...]) -> list[str]:
    """Names of the parts with one of these last suffixes; if there are, only those that have no other before it."""
    names = [name for name in members if name.rpartition(".")[2] in suffixes]
    return [name for name in names if "." not in name] or names


def _image_part(members: dict[str, tar.Member], wanted: str, shard: Shard) -> str:
    every = [name for suffixes in IMAGES for name in _of(members, suffixes)]
    if wanted:
        if wanted in members and wanted.rpartition(".")[2] in sum(IMAGES, ()):
            return wanted
        raise ValueError(f"has no image {wanted!r}, only {', '.join(sorted(members))}")
    if not every:
        raise ValueError(f"has no image, only {', '.join(sorted(members))}")
    plain = [name for name in every if "." not in name] or every
    names = next(likely for suffixes in IMAGES if (likely := [n for n in plain if n.rpartition(".")[2] in suffixes]))
    names = list(dict.fromkeys(names))
    if len(names) > 1:
        raise ValueError(f"has several images ({', '.join(sorted(names))}): --image-part names the one to take")
    if others := sorted({*every} - {*names}):
        shard.notes[f"samples have several images: {names[0]} is taken, not {', '.join(others)} (--image-part)"] += 1
    return names[0]


# --- labels ---------------------------------------------------------------------------------------------------------


def _label(file: files.Opened, key: str, members: dict[str, tar.Member], wanted: str) -> tuple[int | str, bool]:
    """A class's number or name, -1 for none; and whether it may be a caption. ValueError for what cannot be a class."""
    if wanted == "folder":
        if not (name := _folder(key)):
            raise ValueError("lies in no folder that could be its class")
        return name, False
    if wanted == "none":
        return -1, False
    if wanted and wanted not in members:
        raise ValueError(f"has no part {wanted!r}, only {', '.join(sorted(members))}")
    for suffix in LABELS:
        names = [wanted] if wanted else _of(members, (suffix,))
        if len(names) > 1:
            raise ValueError(f"has several labels ({', '.join(sorted(names))}): --label-part names the one to take")
        if names and (label := _value(file, members[names[0]], names[0])) is not None:
            return label, suffix == "txt" and not wanted
    return -1, False


def _folder(key: str) -> str:
    name = key.rpartition("/")[0].rpartition("/")[2]
    return "" if name == "." else name


def _value(file: files.Opened, member: tar.Member, name: str) -> int | str | None:
    """What a label's part says; None if it is a .json without a class."""
    if member.size > TEXT:
        raise ValueError(f"its .{name} has {member.size:,} bytes, which is no label")
    text = file.read(member.offset, member.size).decode("utf-8", "replace").strip()
    if name.rpartition(".")[2] != "json":
        return _class(text, name)
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"its .{name} is damaged") from None
    said = next((said[word] for word in WORDS if word in said), None) if isinstance(said, dict) else None
    if said is None or (isinstance(said, int | float) and not isinstance(said, bool)):
        return None if said is None else _class_number(said)
    if not isinstance(said, str):
        raise ValueError(f"its .{name} has no single class, but {str(said)[:40]}")
    return _class(said.strip(), name)


def _class(text: str, name: str) -> int | str:
    if not text:
        raise ValueError(f"its .{name} is empty")
    if re.fullmatch(r"[+-]?[0-9]+", text):
        return _class_number(int(text[:20]))  # 20 digits: too many already
    return unicodedata.normalize("NFC", text)


def _class_number(value: float) -> int:
    if not (-1 <= value <= CLASSES and value == int(value)):  # nor NaN
        raise ValueError(f"label {value} is no class's number, which is -1 (none) to {CLASSES:,}")
    return int(value)


def number_labels(shards: list[Shard]) -> list[str]:
    """Make all labels numbers; returns the classes' names. Numbers stay, names are numbered in alphabetical order.

    What a .txt says is a class only if most of such are numbers. Where most labels are numbers a name does not fit, nor does a
    number among names: such a sample is set aside, and changes nothing for the others.
    """
    records = [record for shard in shards for record in shard.records]
    captions = [record for record in records if record.caption]
    if captions and 2 * sum(isinstance(record.label, int) for record in captions) <= len(captions):
        note = "images without labels: their .txt hold text, not classes' numbers (--label-part txt takes it for classes' names)"
        for shard in shards:
            shard.notes[note] += sum(record.caption for record in shard.records)
        for record in captions:
            record.label = -1
    numbers = [record.label for record in records if isinstance(record.label, int) and record.label >= 0]
    names = [record.label for record in records if isinstance(record.label, str)]
    kind, odd = (int, "a name among numbers") if len(numbers) >= len(names) else (str, "a number among names")
    for shard in shards:
        fits = [record.label == -1 or isinstance(record.label, kind) for record in shard.records]
        for record in compress(shard.records, map(not_, fits)):
            shard.problems.append({"name": record.key, "reason": f"its label {str(record.label)[:40]!r} is {odd}"})
        shard.records = list(compress(shard.records, fits))
    if kind is int:
        return [str(i) for i in range(max(numbers, default=-1) + 1)]
    number = {name: i for i, name in enumerate(sorted(set(names)))}
    for shard in shards:
        for record in shard.records:
            record.label = number.get(record.label, -1)  # type: ignore[arg-type]
    return list(number)


# --- as a source ----------------------------------------------------------------------------------------------------


def payload(record: Record, data: np.ndarray, reading: Reading = AS_IT_IS) -> np.ndarray:
    """What `encode.convert` takes: the bytes of an image file, or pixels. ValueError for arrays that are no image."""
    if record.extension == "raw":
        return data.reshape(record.height, record.width, 3)
    if record.extension != "npy" or reading.arrays:
        return data
    array = read_npy(data)
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)) or not array.size:
        raise ValueError(f"an array of {array.dtype}, {array.shape}, is no 8-bit image")
    return array


def existing(source: Path, reading: Reading = AS_IT_IS) -> Source:
    """Existing shards as a source, to be written anew: our own folders, WebDataset tars, .beton files."""
    if (source / "manifest.json").is_file():
        return _own(source)
    shards, classes, notes = read_shards(source, reading)
    paths = [shard.path for shard in shards]
    above = {folder for path in paths for folder in path.parents if folder.is_relative_to(source)}
    result = Source(classes, [], ignored=sum(shard.ignored for shard in shards), notes=notes)
    result.watch = [str(path) for path in (*paths, *sorted(above))]
    result.problems += [{"split": shard.split, **problem} for shard in shards for problem in shard.problems]
    for name in sorted({shard.split for shard in shards if shard.records}):
        rows = [(shard.path, record) for shard in shards if shard.split == name for record in shard.records]
        result.splits.append(_split(name, sorted(rows, key=lambda row: os.fsencode(row[1].key)), source, reading))
    return result


def _split(name: str, rows: list[tuple[Path, Record]], source: Path, reading: Reading) -> Split:
    def read(i: int) -> np.ndarray:
        path, record = rows[i]
        return payload(record, read_bytes(str(path), record.offset, record.size), reading)

    names = [f"{record.key}.{record.extension}" for _, record in rows]
    sizes, labels = (np.array([getattr(record, what) for _, record in rows], np.int64) for what in ("size", "label"))
    return Split(name, names, labels, sizes, read, changed([str(path) for path, _ in rows], source))


def _own(source: Path) -> Source:
    opened = {name: store.Store(source, name) for name in store.splits(source)}
    result = Source(next(iter(opened.values())).classes, [], watch=[str(source / "manifest.json")])
    for name, data in opened.items():
        paths = [str(source / shard["file"]) for shard in data.shards]
        result.watch += paths
        result.splits.append(_own_split(name, data, changed(paths)[data.shard_of]))
    return result


def _own_split(name: str, data: store.Store, times: np.ndarray) -> Split:
    ranked = sorted(range(len(data)), key=data.key)
    sizes = data.heights[ranked].astype(np.int64) * data.widths[ranked]

    def read(i: int) -> np.ndarray:
        try:
            image = data.read(ranked[i])
        except store.Corrupt as error:
            raise ValueError(str(error)) from None
        return image if image.ndim == 1 else codec.decode(image)

    return Split(name, [f"{data.key(i)}.img" for i in ranked], data.labels[ranked], sizes, read, times[ranked])
