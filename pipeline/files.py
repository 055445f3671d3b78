"""Files that appear whole or not at all, locks that end with their process, reads that outlast a bad moment."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from manyview.pipeline.errors import UserError

PAUSES = (0.1, 0.4, 1.5, 5.0)  # seconds, before it is tried again
# What the machine or the network is at fault for, never the file: it may pass.
FAULTS = frozenset(
    [
        errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOBUFS,
        errno.EREMOTEIO, errno.ECONNRESET, errno.ENOTCONN, errno.EHOSTDOWN, errno.ENETDOWN,
    ]
)  # fmt: skip
UNLOCKABLE = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # of a file system without locks
Result = TypeVar("Result")


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


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[int | None]:
    """A descriptor of `path`, locked against all processes and threads; None if another holds it and `wait` is off.

    The lock goes with its process, however that ends. OSError (one of `UNLOCKABLE`) where the file system has no locks.
    """
    while (descriptor := _lock(path, wait)) == MOVED:
        pass
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


MOVED = -1


def _lock(path: Path, wait: bool) -> int | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                return descriptor
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return MOVED  # renamed or removed while this waited: there is another by that name, or none


class Opened:
    """A file open for reading at any place, from any number of threads; closed when nobody holds it any more.

    OSError: no such file for this user. UserError (for one of `FAULTS`): the disk, the network or this machine fails, which
    is no image's fault; it was tried again.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self._descriptor = path, -1
        self._descriptor = _persist(path, lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    @property
    def size(self) -> int:
        """Bytes it has now."""
        return _persist(self.path, lambda: os.fstat(self._descriptor).st_size)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on; fewer only where the file ends."""
        try:
            data = os.pread(self._descriptor, size, offset)
        except OSError:
            data = self._again(offset, size)
        while 0 < len(data) < size and (more := self._again(offset + len(data), size - len(data))):
            data += more  # after a signal, or where it is more than a call may read
        return data

    def _again(self, offset: int, size: int) -> bytes:
        return _persist(self.path, lambda: os.pread(self._descriptor, size, offset))

    def announce(self, offset: int, size: int) -> None:
        """Have the system read these bytes into its cache, without waiting. OSError where it cannot."""
        os.posix_fadvise(self._descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    __del__ = close

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def size(path: Path) -> int | None:
    """Bytes of a file, None if there is no such. UserError as `Opened`."""
    try:
        return _persist(path, lambda: os.stat(path).st_size)
    except OSError:
        return None


def patiently(call: Callable[[], Result]) -> Result:
    """What `call` returns, tried again with pauses where the machine is at fault. OSError: the fault stays."""
    for pause in PAUSES:
        try:
            return call()
        except OSError as error:
            if error.errno not in FAULTS:
                raise
            time.sleep(pause)
    return call()


def _persist(path: str | Path, call: Callable[[], Result]) -> Result:
    try:
        return patiently(call)
    except OSError as error:
        if error.errno not in FAULTS:
            raise
        raise failed(path, error) from None


def failed(name: str | Path, error: OSError) -> UserError:
    """The message for what is a machine's fault: its cause, and what helps where something does."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return UserError(
            f"{name}: {error.strerror}; raise the limit (`ulimit -n`, now {raise_limit()}) and start again"
        )
    return UserError(
        f"{name}: {error.strerror}: the disk, the network or this machine fails; start again when it is well"
    )


def raise_limit() -> int:
    """How many files this process may have open: the soft limit, after it was raised to the hard one."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(hard, 1 << 16) if hard != resource.RLIM_INFINITY else 1 << 16
    if soft == resource.RLIM_INFINITY or soft >= most:
        return most
    with contextlib.suppress(OSError, ValueError):  # macOS has another limit beside
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def facts(path: Path) -> dict[str, Any]:
    """A JSON object in a file; {} if there is no such file. UserError where it holds something else."""
    try:
        values = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it holds no object")
    return values
