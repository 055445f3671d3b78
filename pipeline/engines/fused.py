"""The pixels of views in two Triton kernels: crop, antialiased resize, mirror, color and solarize in one; blur in another.

Images may lie anywhere on the device, each of its own size, as DALI's decoder leaves them: the kernels are given addresses.
Every program makes `BLOCK` pixels of one view. The filter is the antialiasing triangle of `pixels.py`, its weights computed
where they are used: a program needs a few dozen, and reading them would cost what computing them does. Only the views that
are blurred pass through `scratch` and the second kernel.

With TRITON_INTERPRET=1 in the environment before the first import the same kernels run on the CPU, which is how they are tested
without a GPU.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from manyview.pipeline.engines import Engine, Pending, has_dali
from manyview.pipeline.engines.cpu import check_size, decoded
from manyview.pipeline.machine import cores
from manyview.pipeline.store import Corrupt, Store
from manyview.pipeline.views import ViewParameters

BLOCK, INTERPRETED = 512, 4096  # pixels of a view that one program makes, on the GPU and where Python plays it
REACH = 3  # sigmas that a blur reaches, as in `pixels.blur`
# One row of numbers a view of an image, all of 32 bits, so that a batch's go to the device in one copy.
ROW = np.dtype(
    [
        ("box", "<i4", 4),
        ("flip", "<i4"),
        ("solarize", "<i4"),
        ("color", "<f4", 12),
        ("sigma", "<f4"),
        ("vflip", "<i4"),
        ("transposed", "<i4"),
        ("scratch", "<i4"),
    ]
)
WORDS = tl.constexpr(ROW.itemsize // 4)


def table(views: np.ndarray) -> np.ndarray:
    """(V, B, WORDS) int32, rows of `ROW` from (V, B) of `views.VIEW`; `scratch` numbers the blurred views, -1 elsewhere."""
    rows = np.zeros(views.shape, ROW)
    for name in ("box", "flip", "solarize", "sigma", "vflip", "transposed"):
        rows[name] = views[name]
    rows["color"] = views["color"].reshape(*views.shape, 12)
    blurred = views["sigma"] > 0
    rows["scratch"] = np.where(blurred, np.cumsum(blurred).reshape(views.shape) - 1, -1)
    return rows.view(np.int32).reshape(*views.shape, -1)


def render(images: torch.Tensor, rows: torch.Tensor, size: int, blurred: int) -> torch.Tensor:
    """(V, B, S, S, 3) uint8: the views of one size of a batch.

    `images`: (B, 4) int64, where each image's first pixel lies on the device, and the bytes from one row, one pixel and one
    channel to the next; `rows`: (V, B, WORDS) int32, see `table`; `blurred`: how many views are.
    """
    views, batch, _ = rows.shape
    out = torch.empty((views, batch, size, size, 3), dtype=torch.uint8, device=rows.device)
    scratch = torch.empty((max(blurred, 1), size, size, 3), dtype=torch.uint8, device=rows.device)
    half = torch.empty((max(blurred, 1), size, size, 3), dtype=torch.float32, device=rows.device)
    block = BLOCK if rows.is_cuda else INTERPRETED
    grid = (triton.cdiv(size * size, block), batch, views)
    _crop[grid](images, rows, out, scratch, batch, size, block)
    if blurred:
        _blur[grid](rows, scratch, half, half, batch, size, False, block)
        _blur[grid](rows, scratch, half, out, batch, size, True, block)
    return out


class FusedEngine(Engine):
    """An `Engine` for GPUs: JPEGs decoded by DALI (by threads of the host where there is none), views by the two kernels.

    `seconds` has read, decode (on the host) and feed.
    """

    name, holds_all = "fused", False

    def __init__(self, store: Store, device: str | torch.device = "cuda", threads: int | None = None):
        self.store, self.device = store, torch.device(device)
        self.threads = threads or cores()
        self.decoded = 0
        self.seconds = {"read": 0.0, "decode": 0.0, "feed": 0.0}
        self._readers = ThreadPoolExecutor(self.threads, "read")
        self._graph: Any = None
        self._busy: deque[tuple[Any, Any]] = deque()  # an event of the device, and the images that must live until then

    def submit(self, ids: np.ndarray, parameters: ViewParameters) -> Pending:
        begun = time.perf_counter()
        try:
            payloads = list(self._readers.map(self.store.read, ids.tolist()))
            self.seconds["read"] += time.perf_counter() - begun
            self.decoded += len(ids)
            if any(payload.ndim != 1 for payload in payloads) or not has_dali():
                views = self._views(parameters, *self._upload(self._decode(ids, payloads, parameters)))
                return Pending([], lambda: views)
        except Corrupt as error:
            return Pending.failed(error)
        begun = time.perf_counter()
        batch = self._decoder(len(ids)).feed({"images": payloads})
        self.seconds["feed"] += time.perf_counter() - begun
        return Pending([], lambda: self._of_graph(ids, parameters, batch))

    def _decode(self, ids: np.ndarray, payloads: list[np.ndarray], parameters: ViewParameters) -> list[np.ndarray]:
        begun = time.perf_counter()
        images = list(self._readers.map(partial(decoded, self.store), ids.tolist(), payloads, parameters.shapes()))
        self.seconds["decode"] += time.perf_counter() - begun
        return images

    def _decoder(self, size: int) -> Any:
        """DALI's graph for batches up to this size."""
        from manyview.pipeline.engines import dali

        if self._graph is None or self._graph.size < size:
            if self._graph is not None:
                self._graph.close()
            make = partial(dali.images_alone, self.device.type)
            self._graph = dali.Graph(make, size, self.device, self.threads)
        return self._graph

    def _of_graph(self, ids: np.ndarray, parameters: ViewParameters, batch: Any) -> list[torch.Tensor]:
        """Views of a decoded batch; one that DALI refused is decoded on the host, which names the culprit if there is one."""
        outputs = batch.wait()
        if isinstance(outputs, RuntimeError):
            payloads = [self.store.read(i) for i in ids.tolist()]
            return self._views(parameters, *self._upload(self._decode(ids, payloads, parameters)))
        (images,) = outputs
        for i, shape, told in zip(ids.tolist(), images.shape(), parameters.shapes()):
            check_size(self.store, i, shape[:2], told)
        return self._views(parameters, images, [images[i].data_ptr() for i in range(len(ids))])

    def _upload(self, images: list[np.ndarray]) -> tuple[torch.Tensor, list[int]]:
        """The images end to end on the device, and where each begins."""
        pixels = self._send(torch.from_numpy(np.concatenate([image.reshape(-1) for image in images])))
        starts = np.cumsum([0, *(image.size for image in images)])[:-1] + pixels.data_ptr()
        return pixels, starts.tolist()

    def _views(self, parameters: ViewParameters, images: Any, addresses: list[int]) -> list[torch.Tensor]:
        """Queue the kernels; `images` are kept until they are done."""
        row = 3 * parameters.widths
        strides = np.stack([row, np.full_like(row, 3), np.ones_like(row)], axis=1)
        where = self._send(torch.from_numpy(np.concatenate([np.array(addresses)[:, None], strides], axis=1)))
        groups = []
        for part, size in parameters.groups:
            views = parameters.views[part]
            rows = self._send(torch.from_numpy(table(views)))
            blurred = int((views["sigma"] > 0).sum())
            groups.append(render(where, rows, size, blurred).permute(0, 1, 4, 2, 3))
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
            self._busy.append((event, images))
            while self._busy[0][0].query():
                self._busy.popleft()
                if not self._busy:
                    break
        return groups

    def _send(self, numbers: torch.Tensor) -> torch.Tensor:
        """To the device. From pinned memory: CUDA may wait for all queued work before it copies 64 KB or more from other."""
        return numbers.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else numbers

    def close(self) -> None:
        if self._graph is not None:
            self._graph.close()
        self._readers.shutdown(cancel_futures=True)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self._busy.clear()


@triton.jit
def _real(words, k):
    return tl.load(words + k).to(tl.float32, bitcast=True)


@triton.jit
def _filter(out_at, n, size):
    """The triangle that makes output pixels `out_at` of `size` from n source pixels: first tap, centre, 1 / support."""
    scale = n.to(tl.float32) / size
    support = tl.maximum(scale, 1.0)
    center = scale * (out_at.to(tl.float32) + 0.5) - 0.5
    return tl.floor(center - support).to(tl.int32) + 1, center, 1.0 / support


@triton.jit
def _weight(at, n, center, inverse):
    """The weight of source pixel `at`: 0 beyond the triangle and outside the box."""
    w = tl.maximum(1.0 - tl.abs(at.to(tl.float32) - center) * inverse, 0.0)
    return tl.where((at >= 0) & (at < n), w, 0.0)


@triton.jit
def _level(x):
    """To a grey level, as the CPU's kernels round."""
    return tl.minimum(tl.maximum(x + 0.5, 0.0), 255.0).to(tl.uint8)


@triton.jit
def _crop(images, rows, out, scratch, batch, size, BLOCK: tl.constexpr):
    sample, view = tl.program_id(1), tl.program_id(2)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < size * size
    y, x = pixel // size, pixel % size
    words = rows + (view * batch + sample) * WORDS
    top, left, height, width = tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)
    turned = tl.load(words + 20) != 0
    y_from, x_from = tl.where(turned, x, y), tl.where(turned, y, x)
    y_from = tl.where(tl.load(words + 19) != 0, size - 1 - y_from, y_from)
    x_from = tl.where(tl.load(words + 4) != 0, size - 1 - x_from, x_from)
    where = images + 4 * sample
    row_step, step, channel = tl.load(where + 1), tl.load(where + 2), tl.load(where + 3)
    image = tl.load(where).to(tl.pointer_type(tl.uint8)) + top * row_step + left * step

    y_first, y_center, y_inverse = _filter(y_from, height, size)
    x_first, x_center, x_inverse = _filter(x_from, width, size)
    taps_y = tl.ceil(2.0 / y_inverse).to(tl.int32)
    taps_x = tl.ceil(2.0 / x_inverse).to(tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    red, green, blue = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for j in range(0, taps_y):
        y_at = y_first + j
        y_weight = _weight(y_at, height, y_center, y_inverse)
        line = image + y_at * row_step
        for i in range(0, taps_x):
            x_at = x_first + i
            w = y_weight * _weight(x_at, width, x_center, x_inverse)
            here, needed = line + x_at * step, inside & (w > 0)
            red += w * tl.load(here, mask=needed, other=0).to(tl.float32)
            green += w * tl.load(here + channel, mask=needed, other=0).to(tl.float32)
            blue += w * tl.load(here + 2 * channel, mask=needed, other=0).to(tl.float32)
            total += w
    total = tl.where(inside, total, 1.0)
    red, green, blue = red / total, green / total, blue / total

    slot = tl.load(words + 21)
    sharp = slot < 0
    place = tl.where(sharp, view * batch + sample, slot).to(tl.int64) * size * size
    target = tl.where(sharp, out, scratch) + (place + pixel) * 3
    invert = sharp & (tl.load(words + 5) != 0)  # a blurred view is solarized after its blur
    for c in tl.static_range(3):
        m = words + 6 + 4 * c
        level = _level(_real(m, 0) * red + _real(m, 1) * green + _real(m, 2) * blue + _real(m, 3))
        level = tl.where(invert, tl.minimum(level, 255 - level), level)
        tl.store(target + c, level, mask=inside)


@triton.jit
def _reflect(at, size):
    """An index outside 0 .. size - 1 mirrored back, the border not repeated."""
    period = tl.maximum(2 * size - 2, 1)
    at = tl.abs(at) % period
    return tl.where(at < size, at, period - at)


@triton.jit
def _blur(rows, scratch, half, out, batch, size, DOWN: tl.constexpr, BLOCK: tl.constexpr):
    """A Gaussian along x from `scratch` to `half`, or with `DOWN` along y from `half` to `out`, which ends the view."""
    sample, view = tl.program_id(1), tl.program_id(2)
    words = rows + (view * batch + sample) * WORDS
    slot = tl.load(words + 21)
    if slot >= 0:
        pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = pixel < size * size
        y, x = pixel // size, pixel % size
        sigma = _real(words, 18)
        reach = tl.ceil(3.0 * sigma).to(tl.int32)
        red, green, blue = (
            tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        )  # fmt: skip
        total = 0.0
        start = slot.to(tl.int64) * size * size
        for k in range(0, 2 * reach + 1):
            distance = (k - reach).to(tl.float32) / sigma
            w = tl.exp(-0.5 * distance * distance)
            total += w
            if DOWN:
                here = half + (start + _reflect(y + k - reach, size) * size + x) * 3
            else:
                here = scratch + (start + y * size + _reflect(x + k - reach, size)) * 3
            red += w * tl.load(here, mask=inside, other=0).to(tl.float32)
            green += w * tl.load(here + 1, mask=inside, other=0).to(tl.float32)
            blue += w * tl.load(here + 2, mask=inside, other=0).to(tl.float32)
        if DOWN:
            invert = tl.load(words + 5) != 0
            target = out + ((view * batch + sample).to(tl.int64) * size * size + pixel) * 3
            r, g, b = _level(red / total), _level(green / total), _level(blue / total)
            tl.store(target, tl.where(invert, tl.minimum(r, 255 - r), r), mask=inside)
            tl.store(target + 1, tl.where(invert, tl.minimum(g, 255 - g), g), mask=inside)
            tl.store(target + 2, tl.where(invert, tl.minimum(b, 255 - b), b), mask=inside)
        else:
            target = half + (start + pixel) * 3
            tl.store(target, red / total, mask=inside)
            tl.store(target + 1, green / total, mask=inside)
            tl.store(target + 2, blue / total, mask=inside)
