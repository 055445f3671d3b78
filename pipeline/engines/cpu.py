"""Views on the CPU: each image is decoded once, its views are made in threads that do not hold Python's lock.

JPEGs are decoded whole. Half the size would do where every crop of a photo is twice the view's size, which at 224 px is one
ImageNet photo in 70 with 2 views and one in 200 with 8, and the pixels would not be the same. What lies below the last crop is
8 % of the rows with 2 views and 2 % with 8; beside and above all crops only the inverse transform could be left out, a
third of the work, since 70 % is reading the entropy codes. No library with a wheel decodes a part and reports damage.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from manyview.pipeline.codec import RGB, decode
from manyview.pipeline.engines import Engine, Pending, bands
from manyview.pipeline.engines.pixels import render
from manyview.pipeline.machine import Memory, cores
from manyview.pipeline.store import Corrupt, Store
from manyview.pipeline.views import ViewParameters

PIXELS = 2**18  # of the images and views of a task, if it is more than one image: a part of what a cache holds


class CPUEngine(Engine):
    """An `Engine` of compiled threads; `seconds` has read, decode and render."""

    name, holds_all = "cpu", False

    def __init__(self, store: Store, device: str | torch.device = "cpu", threads: int | None = None):
        self.store, self.device = store, torch.device(device)
        self.threads = threads or cores()
        self._bands = None if store.layout == RGB else bands.renderer(store)
        self.decoded = 0
        self.seconds = {"read": 0.0, "decode": 0.0, "render": 0.0}
        self._lock = threading.Lock()
        self._memory = Memory()
        self._pool = ThreadPoolExecutor(self.threads, "views")

    def submit(self, ids: np.ndarray, parameters: ViewParameters) -> Pending:
        batch, channels = len(ids), self.store.layout.channels
        shapes = [(part.stop - part.start, batch, size, size, channels) for part, size in parameters.groups]
        outputs = [self._empty(shape) for shape in shapes]
        arrays = [output.numpy() for output in outputs]
        # Several images a task where they are small: what holds Python's lock is then little beside what does not.
        largest = parameters.views["box"][..., 2:].max((0, 1))  # of all views of a batch: hardly less than an image
        cost = int(largest.prod(dtype=np.int64)) + sum(views * size**2 for views, _, size, *_ in shapes)
        chunk = max(1, min(batch // (2 * self.threads), PIXELS // cost))
        work = [
            self._pool.submit(self._images, ids, range(first, min(first + chunk, batch)), parameters, arrays)
            for first in range(0, batch, chunk)
        ]
        return Pending(work, lambda: [o.permute(0, 1, 4, 2, 3).to(self.device, non_blocking=True) for o in outputs])

    def _empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        dtype = self.store.layout.dtype
        if self.device.type == "cuda":  # torch keeps and reuses pinned memory itself
            return torch.empty(shape, dtype=torch.uint8 if dtype == np.uint8 else torch.uint16, pin_memory=True)
        return torch.from_numpy(self._memory.empty(shape, dtype.type))

    def _images(self, ids: np.ndarray, rows: range, p: ViewParameters, outputs: list[np.ndarray]) -> None:
        times = [time.perf_counter()]
        payloads = [self.store.read(int(ids[b])) for b in rows]
        times.append(time.perf_counter())
        heights, widths = p.heights[rows.start : rows.stop], p.widths[rows.start : rows.stop]
        told = zip(payloads, zip(heights.tolist(), widths.tolist()))
        images = [decoded(self.store, int(ids[b]), payload, size) for b, (payload, size) in zip(rows, told)]
        times.append(time.perf_counter())
        pixels = images[0].reshape(-1) if len(images) == 1 else np.concatenate([image.reshape(-1) for image in images])
        pixels.setflags(write=False)  # one compiled version of `render`, for decoded and for stored pixels
        draw = self._bands or render
        for (part, _), out in zip(p.groups, outputs):
            draw(pixels, heights, widths, rows.start, p.views[part], out)
        times.append(time.perf_counter())
        with self._lock:
            self.decoded += len(rows)
            for stage, seconds in zip(self.seconds, np.diff(times)):
                self.seconds[stage] += float(seconds)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def decoded(store: Store, i: int, payload: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Sample i's pixels, (H, W, C), from its payload. Raises `Corrupt`, also if they are not of this height and width:
    boxes were drawn for those, and kernels do not look beyond which pixel an image ends."""
    try:
        pixels = decode(payload)
    except ValueError as error:
        raise Corrupt(i, store.key(i), str(error)) from None
    check_size(store, i, pixels.shape[:2], size)
    return pixels


def check_size(store: Store, i: int, decoded: Sequence[int], told: Sequence[int]) -> None:
    """Raise `Corrupt` if sample i has another height and width than its index told."""
    if tuple(decoded) != tuple(told):
        sizes = "{1} x {0} pixels, its index says {3} x {2}".format(*decoded, *told)
        raise Corrupt(i, store.key(i), f"decodes to {sizes}")
