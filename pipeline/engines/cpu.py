"""Views on the CPU: each image is decoded once, and its views are made in threads that do not hold Python's lock."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait

import cv2
import numpy as np
import torch
from torch.nn.functional import interpolate

from pipeline.codec import decode
from pipeline.store import Store
from pipeline.views import Parameters

IDENTITY = np.eye(3, 4, dtype=np.float32)


class CPUEngine:
    """`engine(ids, parameters)` -> per group a uint8 (V, B, 3, S, S) tensor with channels-last memory.

    `decoded` counts decoded images; `seconds` sums the threads' time in reading, decoding and rendering. Safe to call from several threads.
    """

    name = "cpu"

    def __init__(self, store: Store, device: str | torch.device = "cpu", threads: int | None = None):
        self.store, self.device = store, torch.device(device)
        self.threads = threads or len(os.sched_getaffinity(0))
        self.decoded = 0
        self.seconds = {"read": 0.0, "decode": 0.0, "render": 0.0}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(self.threads, "view")
        cv2.setNumThreads(0)

    def submit(self, ids: np.ndarray, parameters: Parameters) -> Future[list[torch.Tensor]]:
        """Start a batch; its `result()` is what calling the engine returns."""
        views, batch = parameters.flip.shape
        outputs = [
            np.empty((len(range(views)[g]), batch, parameters.sizes[g.start], parameters.sizes[g.start], 3), np.uint8)
            for g in parameters.groups
        ]
        planes = [plane for output in outputs for plane in output]
        work = [self._pool.submit(self._image, int(i), b, parameters, planes) for b, i in enumerate(ids)]
        return _Pending(work, outputs, self.device)

    def __call__(self, ids: np.ndarray, parameters: Parameters) -> list[torch.Tensor]:
        return self.submit(ids, parameters).result()

    def _image(self, i: int, b: int, p: Parameters, planes: list[np.ndarray]) -> None:
        start = time.perf_counter()
        payload = self.store.read(i)
        read = time.perf_counter()
        image = decode(payload)
        decoded = time.perf_counter()
        for v, plane in enumerate(planes):
            render(image, p.box[v, b], p.flip[v, b], p.color[v, b], float(p.sigma[v, b]), p.solarize[v, b], plane[b])
        done = time.perf_counter()
        with self._lock:
            self.decoded += 1
            self.seconds["read"] += read - start
            self.seconds["decode"] += decoded - read
            self.seconds["render"] += done - decoded

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class _Pending:
    """The images of one batch under way."""

    def __init__(self, work: list[Future], outputs: list[np.ndarray], device: torch.device):
        self._work, self._outputs, self._device = work, outputs, device

    def result(self) -> list[torch.Tensor]:
        for one in self._work:
            one.result()
        return [torch.from_numpy(o).permute(0, 1, 4, 2, 3).to(self._device) for o in self._outputs]

    def cancel(self) -> None:
        """Drop what has not begun and wait for what has."""
        wait([one for one in self._work if not one.cancel()])


def render(image, box, flip, color, sigma, solarize, out) -> None:
    """Write one view of `image` (H, W, 3) into `out` (S, S, 3), both uint8."""
    top, left, height, width = box.tolist()
    crop = torch.from_numpy(image[top : top + height, left : left + width]).permute(2, 0, 1)[None]
    view = interpolate(crop, out.shape[:2], mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    if not np.array_equal(color, IDENTITY):
        view = cv2.transform(view, color)
    if sigma > 0:
        reach = 2 * int(np.ceil(3 * sigma)) + 1
        view = cv2.GaussianBlur(view, (reach, reach), sigma)
    if solarize:
        view = np.where(view >= 128, 255 - view, view)
    out[:] = view[:, ::-1] if flip else view
