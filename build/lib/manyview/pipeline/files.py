"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def whole(path: Path, buffering: int = -1) -> Iterator[IO[bytes]]:
    """An open file that gets its name when the block ends: temporary file, fsync, rename, fsync of the folder.

    Whatever is raised leaves an old file in place and nothing else behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b", buffering=buffering) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write(path: Path, content: str | bytes | memoryview) -> None:
    """All of a file at once, see `whole`."""
    with whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
