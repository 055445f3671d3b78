"""Has a source changed since shards were made from it?

What is written must not depend on when or where the source was unpacked, so times are in no manifest: they are kept
in a file of their own beside it. A file's change time (ctime) grows whenever its bytes, its name or its times are set, and no
tool sets it back. So what is older than the stamp is as it was, and what is younger is compared by content: touched or
copied anew is no change, rewritten with the same size is one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32

from manyview.pipeline import files, index
from manyview.pipeline.convert import encode
from manyview.pipeline.convert.sources import Source, Split

NAME = ".stamp.json"
TICK = 50_000_000  # ns; file times may lag the clock by one tick of the kernel


def now() -> int:
    """Nanoseconds; to be asked before the source is listed."""
    return time.time_ns() - TICK


def write(out: Path, source: Path | None, listed: Source, at: int) -> None:
    files.write(out / NAME, json.dumps({"source": _place(source), "at": at, "watch": listed.watch}))


def read(out: Path, source: Path | None) -> dict:
    """Without a stamp, or one of another folder, everything is younger than it."""
    try:
        stamp = json.loads((out / NAME).read_bytes())
        whole = stamp["source"] == _place(source) and isinstance(stamp["at"], int) and isinstance(stamp["watch"], list)
    except (FileNotFoundError, ValueError, RecursionError, TypeError, KeyError):
        whole = False
    return stamp if whole else {"at": -1, "watch": []}


def _place(source: Path | None) -> str:
    return str(source and source.resolve())


def untouched(stamp: dict) -> bool:
    """Whether nothing that the stamp watches is younger: folders with all that lies in them, and files."""
    return bool(stamp["watch"]) and all(_older(path, stamp["at"]) for path in stamp["watch"])


def _older(path: str, at: int) -> bool:
    try:
        if not os.path.isdir(path):
            return os.stat(path).st_ctime_ns <= at
        with os.scandir(path) as entries:
            return os.stat(path).st_ctime_ns <= at and all(entry.stat().st_ctime_ns <= at for entry in entries)
    except OSError:
        return False


def rewritten(
    split: Split, keys: list[str], rows: index.Index, at: int, convert: Callable[[np.ndarray], encode.Converted]
) -> list[str]:
    """Names of images younger than the stamp that no longer give the payload in `rows`, by `convert` as it was then."""
    number = {rows.key(i): i for i in range(len(rows))}
    return [
        split.names[i]
        for i in np.flatnonzero(split.times > at).tolist()
        if _crc(split, i, convert) != (rows["crc"][number[keys[i]]] if keys[i] in number else None)
    ]


def _crc(split: Split, i: int, convert: Callable[[np.ndarray], encode.Converted]) -> int | None:
    """Of an image's payload; None if it is rejected."""
    try:
        return crc32(convert(split.read(i)).payload)
    except ValueError:
        return None
