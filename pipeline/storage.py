"""Objects behind an address (s3://..., or any that fsspec knows): requests that are tried again, in one line if they fail."""

from __future__ import annotations

import contextlib
import errno
import posixpath
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from manyview.pipeline import files
from manyview.pipeline.errors import UserError

PIECE = 8 << 20  # bytes: long enough that a request's first byte (tens of ms) is not most of its time
TRIES = 10  # of a request
FIRST, LONGEST = 0.1, 30.0  # seconds to wait after the first failure, and at most: a minute in all
# Waiting and trying again are done here, once, not also in two layers below.
OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"use_listings_cache": False, "config_kwargs": {"retries": {"total_max_attempts": 1}}},
    "file": {"auto_mkdir": True},
}
ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)", re.IGNORECASE)
CHAINED = re.compile(r".*::[a-z][a-z0-9+.-]+:/.*", re.IGNORECASE)


def address(path: str | Path) -> str | None:
    """The address, if this is one and not a folder. A Path has lost one of its slashes: it is put back.

    UserError: one of fsspec's chained addresses.
    """
    if CHAINED.fullmatch(str(path)):
        raise UserError(
            f"{path}: addresses chained by :: are not read here; give the bucket's own, such as s3://bucket/name"
        )
    match = ADDRESS.fullmatch(str(path))
    if match is None:
        return None
    protocol, rest = match[1].lower(), match[2].rstrip("/")
    return f"{protocol}://{'/' if protocol in ('file', 'local') else ''}{rest}"


def where(path: str | Path) -> str:
    """How to name a folder or a bucket in a message."""
    return address(path) or str(path)


def open_storage(path: str | Path) -> Storage | None:
    """What is behind an address, None for a folder."""
    url = address(path)
    return Storage(url) if url else None


class Missing(UserError):
    """No such object, or no such bucket."""


class Short(OSError):
    """Fewer bytes came than there are."""


class Storage:
    """Objects under an address, by name. Every request is tried again, later and later, unless that cannot help.

    UserError, of one line: unknown protocol, credentials, no such object (`Missing`), a storage that stays unreachable.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url
        protocol, _, _ = url.partition(":")
        try:
            self.fs, root = fsspec.core.url_to_fs(url, **OPTIONS.get(protocol, {}))
        except Exception as error:  # each protocol has its own way to say what it lacks
            raise UserError(f"{url}: {_line(error)}") from None
        if protocol == "s3":
            self.fs.retries = 1
        self._root = root.rstrip("/")
        self._jitter = random.Random()  # the global generator's state belongs to training

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes `start` .. `stop - 1` of an object."""

        def get() -> bytes:
            data = self.fs.cat_file(self._path(name), start=start, end=stop)
            if stop is not None and len(data) != stop - start:
                raise Short(f"{len(data)} of {stop - start} bytes came: cut off")
            return data

        return self._persist(name, get)

    def write(self, local: Path, name: str) -> None:
        """Upload a file."""
        self._persist(name, lambda: self.fs.put_file(str(local), self._path(name)))

    def pieces(self, name: str) -> Iterator[bytes]:
        """A whole object, a piece at a time."""
        size = self._persist(name, lambda: self.fs.info(self._path(name))["size"])
        for start in range(0, size, PIECE):
            yield self.read(name, start, min(start + PIECE, size))

    def fetch(self, name: str, local: Path) -> None:
        """Download a whole object."""
        local.parent.mkdir(parents=True, exist_ok=True)
        with files.whole(local) as file:
            file.writelines(self.pieces(name))

    def remove(self, name: str) -> None:
        with contextlib.suppress(Missing):
            self._persist(name, lambda: self.fs.rm_file(self._path(name)))

    def sizes(self) -> dict[str, int]:
        """Bytes of all objects under the address, by name; none if there is nothing."""
        try:
            self.fs.invalidate_cache()
            objects = self._persist("", lambda: self.fs.find(self._root, detail=True))
        except Missing:
            return {}
        return {path[len(self._root) + 1 :]: state["size"] for path, state in objects.items()}

    def size(self, name: str) -> int | None:
        """Bytes of one object, None if there is no such."""
        try:
            return self._persist(name, lambda: self.fs.info(self._path(name))["size"])
        except Missing:
            return None

    def _path(self, name: str) -> str:
        path = f"{self._root}/{name}"
        return posixpath.normpath(path) if ".." in name else path  # shards that were indexed from a folder beside

    def _persist(self, name: str, request: Callable[[], Any]) -> Any:
        place = f"{self.url}/{name}".rstrip("/")
        for attempt in range(TRIES):
            try:
                return request()
            except Exception as error:
                if _lasting(error) or attempt == TRIES - 1:
                    raise _explained(place, error, attempt) from error
                if attempt == 3:  # by now it has taken a second
                    print(f"storage: {place}: {_line(error)}; trying again", file=sys.stderr)
            time.sleep(min(FIRST * 2**attempt, LONGEST) * self._jitter.uniform(0.5, 1))


def _lasting(error: Exception) -> bool:
    """Whether another try cannot end otherwise: no such object, no access, a request that the storage finds wrong."""
    refused = isinstance(error, FileNotFoundError | PermissionError | ImportError | ValueError | TypeError)
    return refused or getattr(error, "errno", None) == errno.EINVAL or _credentials(error)


def _credentials(error: Exception) -> bool:
    return isinstance(error, PermissionError) or any(word in type(error).__name__ for word in ("Credential", "Profile"))


def _explained(place: str, error: Exception, attempt: int) -> UserError:
    if isinstance(error, FileNotFoundError):
        return Missing(f"{place}: no such object or bucket ({_line(error)})")
    if _credentials(error):
        return UserError(
            f"{place}: no access ({_line(error)}); set the credentials in the environment, for S3 AWS_PROFILE or "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return UserError(f"{place}: {_line(error)}" + (f" ({attempt + 1} tries)" if attempt else ""))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
