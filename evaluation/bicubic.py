"""The clean view with a bicubic filter, for weights that were trained with one: the project's engines have a triangle's."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image

from manyview.evaluation.encoder import Encoder
from manyview.pipeline.codec import decode
from manyview.pipeline.engines import Pending
from manyview.pipeline.machine import cores
from manyview.pipeline.store import Corrupt, Store
from manyview.pipeline.views import ViewParameters


class BicubicEngine:
    """`submit` as of the project's engines, for the boxes of clean views alone: Pillow's antialiased bicubic resize."""

    def __init__(self, store: Store, threads: int | None = None):
        self.store = store
        self._pool = ThreadPoolExecutor(threads or cores(), "bicubic")

    def submit(self, ids: np.ndarray, parameters: ViewParameters) -> Pending:
        ((_, size),) = parameters.groups
        boxes = parameters.views["box"][0]
        work = [self._pool.submit(self._view, int(i), box, size) for i, box in zip(ids, boxes)]
        return Pending(work, lambda: [torch.from_numpy(np.stack([w.result() for w in work])).permute(0, 3, 1, 2)[None]])

    def _view(self, i: int, box: np.ndarray, size: int) -> np.ndarray:
        try:
            image = Image.fromarray(decode(self.store.read(i)))
        except Corrupt:
            raise
        except ValueError as error:
            raise Corrupt(i, self.store.key(i), str(error)) from None
        top, left, height, width = (int(v) for v in box)
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + width, top + height)))

    def close(self) -> None:
        self._pool.shutdown()


@contextmanager
def clean_engine(encoder: Encoder, store: Store, engine: Any) -> Iterator[Any]:
    """What makes the clean views of this encoder: `engine`, or where it wants a bicubic filter, one that has it."""
    if encoder.interpolation != "bicubic":
        yield engine
        return
    own = BicubicEngine(store, getattr(engine, "threads", None))
    try:
        yield own
    finally:
        own.close()
