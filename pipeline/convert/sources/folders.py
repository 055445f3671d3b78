"""Trees of image files: class folders, split folders, or any tree without labels; labels from a table beside them."""

from __future__ import annotations

import errno
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import compress
from pathlib import Path
from unicodedata import normalize

import numpy as np

from manyview.pipeline.convert.sources import AS_IT_IS, SUFFIXES, Reading, Source, Split, read_named, tables
from manyview.pipeline.errors import UserError
from manyview.pipeline.files import FAULTS, patiently

SPLITS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val", "eval": "val", "evaluation": "val",
    "test": "val", "testing": "val",
}  # fmt: skip
TESTS = ("test", "testing")  # val where there is no other
# What systems, network disks and editors leave behind; names that begin with a dot need not be listed.
TOOLS = {
    "@eadir", "@tmp", "@recycle", "@recently-snapshot", "@sharebin", "@sharesnapshot", "#recycle", "#snapshot", "~snapshot",
    "$recycle.bin", "recycler", "recycled", "system volume information", "lost+found", "__macosx", "__pycache__",
}  # fmt: skip
MANY = 20  # folders beside each other: classes, which need not be looked into for splits
NOWHERE = "it is a link to what is not there"
BESIDE = "lies beside the class folders, so it has no label; --unlabelled takes all images, without labels"


@dataclass
class Listing:
    """Image files below a folder, as paths relative to it, sorted; and what stood in the way."""

    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    problems: list[dict] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)  # folders directly below, even without an image
    types: Counter = field(default_factory=Counter)  # of files that are no images
    hidden: Counter = field(default_factory=Counter)  # files and folders of tools, by name
    suffixes: frozenset[str] = SUFFIXES  # of images

    def keep(self, wanted: Callable[[str], bool]) -> list[str]:
        """Leave out the files whose names are not wanted; returns those names."""
        kept = [wanted(name) for name in self.names]
        unwanted = [name for name, stays in zip(self.names, kept) if not stays]
        self.names = list(compress(self.names, kept))
        self.sizes, self.times = list(compress(self.sizes, kept)), list(compress(self.times, kept))
        return unwanted


def is_hidden(name: str) -> bool:
    """Whether a file or folder is a tool's own: no image, no class."""
    return name.startswith(".") or name.casefold() in TOOLS


def is_image(name: str, suffixes: frozenset[str] = SUFFIXES) -> bool:
    return os.path.splitext(name)[1].lower() in suffixes and not is_hidden(name)


def listing(root: Path, suffixes: frozenset[str] = SUFFIXES) -> Listing:
    """Walk a tree; follows links to folders, each real folder once, so a loop of links ends. `suffixes`: of images.

    UserError: a folder that cannot be read, a link to one that is not there. Whatever lies in it would be missing, and its
    class from the numbers of labels.
    """
    result, seen, files = Listing(suffixes=suffixes), set(), []  # type: ignore[var-annotated]
    todo = [(os.path.realpath(root), "", 0)]
    while todo:
        path, relative, since = todo.pop()
        try:
            real = os.stat(path)
            if (real.st_dev, real.st_ino) in seen:
                result.problems.append({"name": relative, "reason": "leads back to a folder already read"})
                continue
            seen.add((real.st_dev, real.st_ino))
            result.folders.append(path)
            children = patiently(lambda: sorted(os.scandir(path), key=lambda entry: entry.name))  # noqa: B023
            folders = [_add(entry, relative, since, files, result) for entry in children]
        except OSError as error:
            raise _unreadable(error) from None
        todo += [folder for folder in reversed(folders) if folder]
        if not relative:
            result.classes = [name for _, name, _ in filter(None, folders)]
    files.sort(key=lambda file: os.fsencode(file[0]))
    result.names, result.sizes, result.times = ([file[i] for file in files] for i in range(3))
    return result


def _add(entry: os.DirEntry, relative: str, since: int, files: list, result: Listing) -> tuple[str, str, int] | None:
    """Put down one entry of a folder; returns (path, name below the root, since) of a folder to be read. `since`: when a
    folder on the way was last changed (ctime, ns): one that was renamed brings other files under old names."""
    name = f"{relative}/{entry.name}" if relative else entry.name
    if is_hidden(entry.name):
        result.hidden["._*" if entry.name.startswith("._") else entry.name] += 1
    elif _is_folder(entry):
        return entry.path, name, max(since, _changed(entry))
    elif (suffix := os.path.splitext(entry.name)[1].lower()) in result.suffixes:
        _add_file(entry, name, since, files, result)
    elif _leads_nowhere(entry.path):
        raise OSError(0, NOWHERE, entry.path)
    else:
        result.types[suffix or "no suffix"] += 1
    return None


def _unreadable(error: OSError) -> UserError:
    return UserError(f"{error.filename} cannot be read ({error.strerror}): make it readable or move it away")


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:  # of a link to itself
            raise
        return False


def _leads_nowhere(path: str) -> bool:
    """Of links that may stand for a folder: those to files have a suffix of letters."""
    broken = os.path.islink(path) and not os.path.exists(path)
    return broken and not re.search(r"\.[A-Za-z]{1,5}$", os.path.realpath(path))


def _changed(entry: os.DirEntry) -> int:
    """ctime, ns, of what is there, or of the link that leads to it if that is later."""
    return max(entry.stat().st_ctime_ns, entry.stat(follow_symlinks=False).st_ctime_ns)


def _add_file(entry: os.DirEntry, name: str, since: int, files: list, result: Listing) -> None:
    try:
        if not entry.is_file():
            raise OSError(0, "not a file")
        files.append((name, entry.stat().st_size, max(since, _changed(entry))))
    except OSError as error:
        if error.errno in FAULTS:
            raise
        result.problems.append({"name": name, "reason": f"cannot be read: {error.strerror}"})


def folder(source: Path, reading: Reading = AS_IT_IS, only: set[str] | None = None) -> Source:
    """Split folders (`SPLITS`, in any case) if there are such, else everything is `train`.

    Below a split, folders are classes, and images beside them are problems. Where there are no folders, or if
    `reading.unlabelled`, nothing has a label. A table, `reading.labels` or one that lies in the split's folder as
    Tiny-ImageNet and Hugging Face have it, labels the splits whose images it names. `only`: the classes to keep.
    UserError: folders of which it is not clear whether they are splits; what `listing` and `tables` refuse.
    """
    result = Source([], [], watch=[str(source.resolve())])
    roots = _split_folders(source, result.notes, reading.suffixes) or {"train": source}
    listings = {split: listing(root, reading.suffixes) for split, root in sorted(roots.items())}
    splits = {split: (roots[split], files.names) for split, files in listings.items()}
    by_table = tables.labels(source, splits, reading, result)

    def folder_of(name: str) -> str | None:  # as people see it, whatever its bytes
        return None if reading.unlabelled or "/" not in name else normalize("NFC", name.split("/", 1)[0])

    named = {split: by_table.get(split) or list(map(folder_of, files.names)) for split, files in listings.items()}
    by_folder = {split for split in listings if split not in by_table and any(named[split])}
    result.classes = _classes(source, named, {split: listings[split].classes for split in by_folder}, only)
    number: dict[str | None, int] = {name: i for i, name in enumerate(result.classes)}
    for split, files in listings.items():
        label_of = dict(zip(files.names, named[split]))
        if split in by_folder:
            outside = files.keep(lambda name: label_of[name] is not None)  # noqa: B023
            files.problems += [{"name": name, "reason": BESIDE} for name in outside]
        if only is not None:
            files.keep(lambda name: label_of[name] in only)  # noqa: B023
        labels = np.array([number.get(label_of[name], -1) for name in files.names], np.int64)
        read = partial(read_named, str(roots[split]), files.names)
        sizes, times = np.array(files.sizes, np.int64), np.array(files.times, np.int64)
        result.splits.append(Split(split, files.names, labels, sizes, read, times))
        result.problems += [{"split": split, **problem} for problem in files.problems]
        result.watch += files.folders
    _left_out(listings, result)
    if not result.classes and not reading.unlabelled and (table := tables.beside(source)):
        result.notes.append(f"no image has a label; --labels SOURCE/{table} would take them from there")
    return result


def _classes(
    source: Path, named: dict[str, list[str | None]], folders: dict[str, list[str]], only: set[str] | None
) -> list[str]:
    """All classes: of every image, of every class folder even without one; or `only` those, which then must be there."""
    labels = [name for names in named.values() for name in names if name is not None]
    even_empty = {normalize("NFC", name) for names in folders.values() for name in names}
    classes = sorted({*labels, *even_empty}) if folders else tables.classes(labels)
    if only is None:
        return classes
    if missing := sorted(only - set(classes)):
        raise UserError(f"{source} lacks {len(missing)} of {len(only)} classes, the first is {missing[0]}")
    return sorted(only)


def _left_out(listings: dict[str, Listing], result: Source) -> None:
    """Say which files and folders were no images and no classes."""
    types = sum((files.types for files in listings.values()), Counter())
    hidden = sum((files.hidden for files in listings.values()), Counter())
    result.ignored += sum(types.values()) + sum(hidden.values())
    if types:
        result.notes.append(f"{sum(types.values())} files left out by their type ({_counts(types)})")
    if hidden:
        result.notes.append(f"{sum(hidden.values())} hidden files and tools' folders left out ({_counts(hidden)})")


def _counts(counter: Counter) -> str:
    """`.heic: 4, .txt: 1`, the most frequent first."""
    ranked = sorted(counter.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name}: {count}" for name, count in ranked[:6]) + (", …" if len(ranked) > 6 else "")


def _split_of(folder: Path, exact: bool = True) -> str:
    """The split whose name a folder has, in any case: "" if none. Not `exact`: as part of it, as in seg_train or val2017."""
    words = re.split(r"[^a-z]+", normalize("NFC", folder.name).casefold())
    named = [word for word in words if word in SPLITS]
    return named[0] if len(named) == 1 and (not exact or len(words) == 1) else ""


def _split_folders(source: Path, notes: list[str], suffixes: frozenset[str]) -> dict[str, Path]:
    """The folders of the splits, none if none is named like one; below a single folder that holds everything, too."""
    entries = [entry for entry in sorted(source.iterdir()) if not is_hidden(entry.name)]
    if broken := [entry for entry in entries if _leads_nowhere(str(entry))]:
        raise _unreadable(OSError(0, NOWHERE, str(broken[0])))
    folders = [entry for entry in entries if entry.is_dir()]
    named = {entry: name for entry in folders if (name := _split_of(entry))}
    unclear = [entry for entry in folders if entry not in named] if named or len(folders) < MANY else []
    with_images = [entry for entry in unclear if _holds_images(entry, suffixes)]
    if not named and len({SPLITS.get(_split_of(entry, exact=False)) for entry in with_images} - {None}) == 2:
        named = {entry: name for entry in with_images if (name := _split_of(entry, exact=False))}
    stray = sum(is_image(entry.name, suffixes) for entry in entries)
    if not named and len(with_images) == 1 and not stray:
        return _split_folders(with_images[0], notes, suffixes)
    if beside := [entry.name for entry in with_images if entry not in named] if named else []:
        names, others = ", ".join(entry.name for entry in named), ", ".join(beside[:3])
        more = f" and {len(beside) - 3} more" if len(beside) > 3 else ""
        raise UserError(f"{source} holds {names} and also images in {others}{more}: splits or classes? Move them apart")
    if named and stray:
        notes.append(f"{stray} images beside the folders of the splits left out")
    return {split: _inside(folder) for split, folder in _one_each(source, named, notes).items()}


def _one_each(source: Path, named: dict[Path, str], notes: list[str]) -> dict[str, Path]:
    """One folder a split. UserError where several have its name, but for a test split beside val, which is left out."""
    tests = [entry for entry, name in named.items() if name in TESTS]
    by_split = {split: [entry for entry, name in named.items() if SPLITS[name] == split] for split in ("train", "val")}
    if tests and len(by_split["val"]) > len(tests):
        by_split["val"] = [entry for entry in by_split["val"] if entry not in tests]
        notes.append(f"{' and '.join(entry.name for entry in tests)} is left out, val is {by_split['val'][0].name}")
    for split, entries in by_split.items():
        if len(entries) > 1:
            names = " and ".join(entry.name for entry in entries)
            raise UserError(f"{source} holds {names}: which of them is {split}? Move the other away")
    return {split: entries[0] for split, entries in by_split.items() if entries}


def _inside(folder: Path) -> Path:
    """Where a split's folder holds nothing but one of the same name, as some archives unpack: that."""
    entries = [entry for entry in folder.iterdir() if not is_hidden(entry.name)]
    doubled = len(entries) == 1 and entries[0].is_dir() and entries[0].name == folder.name
    return _inside(entries[0]) if doubled else folder


def has_splits(source: Path) -> bool:
    return any(entry.is_dir() and _split_of(entry) for entry in source.iterdir())


def _holds_images(folder: str | Path, suffixes: frozenset[str]) -> bool:
    try:
        entries = patiently(lambda: list(os.scandir(folder)))
    except OSError as error:
        raise _unreadable(error) from None
    entries = [entry for entry in entries if not is_hidden(entry.name)]
    if any(is_image(entry.name, suffixes) for entry in entries):
        return True
    return any(_holds_images(entry.path, suffixes) for entry in entries if entry.is_dir(follow_symlinks=False))
