"""Messages a user can act on: one line, exit code 2, no traceback."""

from __future__ import annotations

import difflib
import errno
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable
from typing import TextIO

# What the system says no to, by the name of a file: no room, no permission, no such place, a name too long, a broken disk.
REFUSED = frozenset(
    [
        errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
        errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE,
    ]
)  # fmt: skip


class UserError(Exception):
    """Bad input. The text names what is wrong and, where there is one, the command or value that would help.

    Several errors at once are joined by newlines: one line each.
    """


def refuse(errors: list[str]) -> None:
    """UserError of all of them at once; nothing where there are none."""
    if errors:
        raise UserError("\n".join(errors))


def nearest(kind: str, given: str, valid: Iterable[str]) -> str:
    """The message for an unknown name: `unknown backbone 'resnet19'; nearest: resnet18, resnet10t`."""
    names = sorted(valid)
    close = difflib.get_close_matches(given, names, n=4, cutoff=0.4)
    hint = f"nearest: {', '.join(close)}" if close else f"valid: {', '.join(names[:20])}"
    return f"unknown {kind} {given!r}; {hint}"


def first_line(error: BaseException) -> str:
    """Of an error's text; where it has none, its type's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def in_one_line(error: BaseException) -> str:
    """All of an error's text: YAML's tells the place in its last lines."""
    return " ".join(str(error).split())


def run(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit: 0 or its own code; 2 with one line an error for `UserError` and for what the system
    refuses by the name of a file; 130 for Ctrl-C; 141, quietly, where whoever reads what it prints has closed the pipe."""
    try:
        try:
            code = main() or 0
        except UserError as error:
            for line in str(error).splitlines():
                print(f"error: {line}", file=sys.stderr)
            code = 2
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            where = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
            print(f"error: {where}{error.strerror}", file=sys.stderr)
            code = 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            code = 130
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not (closed := [stream for stream in (sys.stdout, sys.stderr) if _closed(stream)]):
            raise
        for stream in closed:
            to_nowhere(stream)
        code = 128 + signal.SIGPIPE
    sys.exit(code)


def to_nowhere(stream: TextIO) -> None:
    """Where nobody listens any more, later writes and the flush at exit must not fail either."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _closed(stream: TextIO) -> bool:
    """Whether it is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
