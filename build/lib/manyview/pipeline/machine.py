"""Cores that this process may use, and memory that is used again instead of being given back and fetched anew."""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections import deque
from typing import Any

import numpy as np

SPARE = 4  # batches that nobody holds any more whose memory is kept for the next


def cores() -> int:
    """Cores that this process may use: its share of them where a launcher started several on this machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def keep_memory() -> None:
    """Let glibc keep the pages that this process frees: mapping and zeroing them anew took a third of a CPU step's time,
    half of the resident engine's and a tenth of a conversion's."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: its largest value
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def tune(device: Any) -> None:
    """Settings of a process that trains on this `torch.device`: on CUDA the fastest convolutions, found by trial.

    Plain matrix products keep torch's default, no TF32: outside autocast they are the objective's, which are fp32.
    """
    if device.type == "cuda":
        import torch  # here, since the processes that convert images need none

        torch.backends.cudnn.benchmark = True
    else:
        keep_memory()


class Memory:
    """`empty(shape)` -> array of any content, in memory that comes back when the last array or tensor over it goes: fresh
    pages cost a fifth of making the views that go there, and three quarters of normalizing them."""

    def __init__(self) -> None:
        self._spare: deque[np.ndarray] = deque(maxlen=SPARE)

    def empty(self, shape: tuple[int, ...], dtype: type = np.uint8) -> np.ndarray:
        memory = None
        for _ in range(len(self._spare)):
            spare = self._spare.popleft()
            if spare.shape == shape and spare.dtype == dtype:
                memory = spare
                break
            self._spare.append(spare)
        if memory is None:
            memory = np.empty(shape, dtype)
        lent = memory.view()
        weakref.finalize(lent, self._spare.append, memory).atexit = False
        return lent
