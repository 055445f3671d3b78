"""Trees of image files: class folders, split folders, or any tree without labels."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path

import numpy as np

from manyview.pipeline.convert.sources import SPLITS, SUFFIXES, Source, Split
from manyview.pipeline.errors import UserError

LOST = "lost+found"  # of a file system's root, for its administrator alone


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
