"""Labels from a table: a row an image, as csv, tsv, text in columns, json or jsonl."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from operator import eq
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from manyview.pipeline.convert.sources import Reading, Source
from manyview.pipeline.errors import UserError

FILE_COLUMNS = [
    "file_name", "filename", "file", "file_path", "filepath", "path", "image", "image_name", "image_path", "image_id", "imageid",
    "img", "img_name", "img_path", "name", "id",
]  # fmt: skip
LABEL_COLUMNS = [
    "label", "labels", "class", "class_name", "classname", "class_id", "category", "category_id", "target", "cls", "wnid",
    "species", "breed", "y",
]  # fmt: skip
METADATA = ("metadata.csv", "metadata.jsonl")  # Hugging Face's: names are paths from its folder
BESIDE = ("val_annotations.txt", *METADATA)  # in a split's folder, as Tiny-ImageNet has it, or above
LARGEST = 10_000_000  # a number beyond is an id, and to name as many classes would take gigabytes


@dataclass
class Table:
    """`labels`: of each row, None where it has none; `paths`: what it says of its image, as the parts of a path; `by_name`:
    rows by the last of these, with and without suffix."""

    path: Path
    column: str
    labels: list[str | None] = field(default_factory=list)
    paths: list[tuple[str, ...]] = field(default_factory=list)
    by_name: dict[str, list[int]] = field(default_factory=dict)

    def add(self, path: str, label: object) -> None:
        parts = _parts(path.replace("\\", "/"))
        if parts:
            self.by_name.setdefault(parts[-1], []).append(len(self.paths))
            self.paths.append(parts)
            self.labels.append(_text(label, self))

    def row(self, root: Path, name: str) -> int | None:
        """The row that names the image `name` below a split's folder: of Hugging Face's metadata by its whole path, of others by
        as many folders as both tell. UserError: two rows that give it different labels."""
        metadata = self.path.name in METADATA
        parts = _parts(os.path.relpath(root / name, self.path.parent) if metadata else f"{root.name}/{name}")
        candidates = [*self.by_name.get(parts[-1], ()), *self.by_name.get(PurePosixPath(parts[-1]).stem, ())]
        alike = eq if metadata else _same_folders
        rows = [i for i in candidates if alike(self.paths[i], parts)]
        if len(different := {self.labels[i] for i in rows}) > 1:
            first, second = sorted(map(str, different))[:2]
            raise UserError(f"{self.path} gives {'/'.join(parts)} two labels, {first!r} and {second!r}")
        return rows[0] if rows else None


Splits = dict[str, tuple[Path, list[str]]]  # the folder of each, and its images' names


def labels(source: Path, splits: Splits, reading: Reading, result: Source) -> dict[str, list[str | None]]:
    """Class names of the images, None where there is none, of those splits that a table names: {split: one for each name}.

    The table is `reading.labels`, or lies in a split's folder or above, up to `source`. UserError: a table that cannot be
    read, or of which it is not clear what it means.
    """
    by_table: dict[Path, Splits] = {reading.labels: splits} if reading.labels else {}
    if not reading.labels and not reading.unlabelled:
        for split, (root, names) in splits.items():
            folders = [root, *(folder for folder in root.parents if folder == source or source in folder.parents)]
            places = [folder / name for folder in folders for name in BESIDE]
            if there := [place for place in places if place.is_file()]:
                by_table.setdefault(there[0], {})[split] = root, names
    given: dict[str, list[str | None]] = {}
    column = ""
    for path, named in by_table.items():
        if table := read(path, reading.columns if reading.labels else ("", "")):
            given, column = given | _apply(table, named, result), table.column
        elif reading.labels:
            raise UserError(f"which column of {path} holds the labels? --label-column NAME says it")
        else:
            where = f"{path.parent.name}/{path.name}"
            result.notes.append(f"{where} has no column of labels: --labels and --label-column NAME can take one")
    texts = [text for names in given.values() for text in names if text is not None]
    if not reading.columns[1] and len(texts) > 1 and len(set(texts)) == len(texts):
        tables = " and ".join(map(str, by_table))
        raise UserError(
            f"{tables}: no two images have the same {column!r}, so it is no class: --label-column NAME says what is"
        )
    return given


def _apply(table: Table, splits: Splits, result: Source) -> dict[str, list[str | None]]:
    rows = {split: [table.row(root, name) for name in names] for split, (root, names) in splits.items()}
    rows = {split: numbers for split, numbers in rows.items() if any(number is not None for number in numbers)}
    used = Counter(number for numbers in rows.values() for number in numbers if number is not None)
    if not used:
        raise UserError(
            f"{table.path} names no image: its first is {'/'.join(table.paths[0]) if table.paths else 'missing'}"
        )
    row, images = used.most_common(1)[0]
    if images > 1:
        raise UserError(
            f"{'/'.join(table.paths[row])} in {table.path} names several images: put their folders before it"
        )
    result.watch.append(str(table.path.resolve()))
    named = {table.paths[row] for row in used}
    counts = {
        "images have no row": sum(number is None for numbers in rows.values() for number in numbers),
        "rows have no image": sum(path not in named for path in table.paths),
    }
    more = "".join(f"; {count} {what}" for what, count in counts.items() if count)
    result.notes.append(f"labels of {' and '.join(rows)} from column {table.column!r} of {table.path.name}{more}")
    return {
        split: [None if number is None else table.labels[number] for number in numbers]
        for split, numbers in rows.items()
    }


def beside(source: Path) -> str:
    """The name of a file that may be a table of labels, "" if none lies there."""
    names = sorted(entry.name for entry in source.iterdir() if entry.suffix.lower() in (".csv", ".tsv", ".jsonl"))
    return next((name for name in names if "label" in name.lower()), names[0] if names else "")


def classes(labels: list[str]) -> list[str]:
    """The classes that these labels name: numbers stay what they are, so there is a class for each up to the largest;
    other names are in alphabetical order."""
    if labels and all(label.isdecimal() for label in labels):
        largest = max(int(label) for label in labels)
        if largest > LARGEST:
            raise UserError(f"label {largest} is no class's number, which is 0 to {LARGEST:,}")
        return [str(number) for number in range(largest + 1)]
    return sorted(set(labels))


# --- reading ---------------------------------------------------------------------------------------------------------


def read(path: Path, columns: tuple[str, str]) -> Table | None:
    """A table of labels. None: no column is one of labels. UserError: no table, no such column, no column of files."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
        names, rows = _json(text) if path.suffix.lower() in (".json", ".jsonl") else _lines(text, path, columns)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a table: {getattr(error, 'strerror', None) or error}") from None
    file_column = columns[0] or _named(names, FILE_COLUMNS)
    label_column = columns[1] or _named(names, LABEL_COLUMNS)
    if len(names) == 2 and file_column and not label_column and path.name not in BESIDE:
        label_column = next(name for name in names if name != file_column)
    for wanted, flag in ((file_column, "--name-column"), (label_column, "--label-column")):
        if wanted not in names and (wanted or flag == "--name-column"):
            raise UserError(f"{path} has no column {wanted or 'of file names'}; it has {', '.join(names)}: {flag} NAME")
    if not label_column:
        return None
    table = Table(path, label_column)
    for row in rows:
        table.add(str(row.get(file_column) or ""), row.get(label_column))
    return table


def _named(names: list[str], usual: list[str]) -> str:
    by_plain_name = {name.strip().casefold().replace(" ", "_"): name for name in reversed(names)}
    return next((by_plain_name[name] for name in usual if name in by_plain_name), "")


def _json(text: str) -> tuple[list[str], list[dict]]:
    listed = text.lstrip()[:1] == "["
    rows = json.loads(text) if listed else [json.loads(line) for line in text.split("\n") if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("its rows are no objects")
    return list(dict.fromkeys(name for row in rows for name in row)), rows


def _lines(text: str, path: Path, columns: tuple[str, str]) -> tuple[list[str], list[dict]]:
    first = text.split("\n", 1)[0]
    separator = max(",;\t", key=first.count)
    if separator in first:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator) if row]
    else:
        rows = [line.split() for line in text.splitlines() if line.strip()]
    names = rows[0] if rows else []
    usual = {*FILE_COLUMNS, *LABEL_COLUMNS, *(column.casefold() for column in columns if column)}
    if not any(name.strip().casefold().replace(" ", "_") in usual for name in names):  # no header
        names = ["file_name", "label", *(f"column {i}" for i in range(3, len(names) + 1))][: len(names)]
        rows.insert(0, names)
    return names, [dict(zip(names, row)) for row in rows[1:]]


def _text(label: object, table: Table) -> str | None:
    """A class's name as it is compared: composed letters, whole numbers without a point; None for none."""
    if isinstance(label, list | dict):
        raise UserError(
            f"{table.path}: {table.column!r} holds several values an image, {str(label)[:40]}: a class is one"
        )
    text = normalize("NFC", "" if label is None else str(label).strip())
    text = re.sub(r"^(-?\d+)\.0+$", r"\1", text)
    if re.fullmatch(r"\d+", text):
        text = str(int(text[:20]))
    return None if text in ("", "-1", "nan", "NaN", "None") else text


def _parts(path: str) -> tuple[str, ...]:
    return tuple(normalize("NFC", part) for part in path.strip().split("/") if part not in ("", "."))


def _same_folders(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    return all(a == b for a, b in zip(one[-2::-1], other[-2::-1]))
