"""numba's `njit` as every kernel here has it: without Python's lock, and compiled once a machine, not once a process."""

from __future__ import annotations

import os
import stat
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numba


def cached() -> bool:
    """Whether numba can keep what it compiles. Where it can write neither beside the code nor at home (a container with
    another user, a cluster's node) it is given a folder below the temporary one."""
    if _keeps():
        return True
    folder = Path(tempfile.gettempdir()) / f"manyview-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.lstat()
    except OSError:
        return False
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o022:
        return False  # what lies in it is run, so nobody else may write there
    os.environ["NUMBA_CACHE_DIR"] = str(folder)
    numba.config.reload_config()
    return _keeps()


def _keeps() -> bool:
    try:
        numba.njit(cache=True)(_keeps)  # any function of this file: nothing is compiled before it is called
    except RuntimeError:  # "no locator available"
        return False
    return True


njit: Any = partial(numba.njit, nogil=True, cache=cached())
