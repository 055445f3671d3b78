"""Memory for the views of a batch: what an earlier batch, now forgotten, was in; fresh pages cost a fifth of the work."""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np
import torch

SPARE = 4  # batches that nobody holds any more whose memory is kept for the next


class Memory:
    """`empty(shape)` -> uint8 tensor of any content, in memory that comes back when the last tensor over it goes."""

    def __init__(self) -> None:
        self._spare: deque[np.ndarray] = deque(maxlen=SPARE)

    def empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        memory = None
        for _ in range(len(self._spare)):
            spare = self._spare.popleft()
            if spare.shape == shape:
                memory = spare
                break
            self._spare.append(spare)
        if memory is None:
            memory = np.empty(shape, np.uint8)
        lent = memory.view()  # the tensor keeps this alive
        weakref.finalize(lent, self._spare.append, memory).atexit = False
        return torch.from_numpy(lent)
