"""Views of a set that fits in device memory: all pixels as one uint8 tensor, all views of a batch at once in torch.

A resize of a box is two small matrices, rows and columns of the antialiasing triangle filter; a mirror image is in the
columns' matrix. A blur is two more, the same for both axes. On CUDA the whole is compiled by `torch.compile`.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from manyview.pipeline.engines import Engine, Pending
from manyview.pipeline.engines.cpu import decoded
from manyview.pipeline.machine import Memory, cores, keep_memory
from manyview.pipeline.store import Corrupt, Store
from manyview.pipeline.views import VIEW, ViewParameters

CHUNK = 128 * 32 * 32  # pixels a call on the CPU: small enough for the cache, large enough that calling costs little


class ResidentEngine(Engine):
    """An `Engine` that reads and decodes all images once, when it is made; they must be of one size (`engines.create`
    asks). `seconds` has load and render."""

    name, holds_all = "resident", True

    def __init__(self, store: Store, device: str | torch.device = "cpu", threads: int | None = None):
        self.store, self.device = store, torch.device(device)
        height, width = int(store.heights[0]), int(store.widths[0])
        self.decoded = 0
        self.bad: dict[int, Corrupt] = {}
        begun = time.perf_counter()
        images = torch.zeros((len(store), 3, height, width), dtype=torch.uint8)
        store.prefetch(np.arange(len(store)))
        for i in range(len(store)):
            images[i] = torch.from_numpy(self._load(i, (height, width))).permute(2, 0, 1)
        self.images = images.to(self.device)
        self.seconds = {"load": time.perf_counter() - begun, "render": 0.0}
        self._render = torch.compile(render) if self.device.type == "cuda" else render
        self._memory, self._pool = Memory(), None
        if self.device.type == "cpu":
            keep_memory()
            self._pool = _pool(threads or cores())

    def _load(self, i: int, shape: tuple[int, int]) -> np.ndarray:
        try:
            image = np.array(decoded(self.store, i, self.store.read(i), shape))
        except Corrupt as error:
            self.bad[i] = error
        else:
            self.decoded += 1
            return image
        return np.zeros((*shape, 3), np.uint8)  # never shown: asking for it raises

    def submit(self, ids: np.ndarray, parameters: ViewParameters) -> Pending:
        if self.bad and (errors := [self.bad[i] for i in ids.tolist() if i in self.bad]):
            return Pending.failed(errors[0])
        begun = time.perf_counter()
        work: list[Future] = []
        outputs = [self._group(ids, parameters.views[part], size, work) for part, size in parameters.groups]
        self.seconds["render"] += time.perf_counter() - begun
        return Pending(work, lambda: outputs)

    def _group(self, ids: np.ndarray, views: np.ndarray, size: int, work: list[Future]) -> torch.Tensor:
        """The pixels; on the CPU what still writes them is added to `work`, on CUDA the kernels are queued."""
        flags = [bool(views[name].any()) for name in ("transposed", "sigma", "solarize")]  # steps that some view takes
        which = self._send(np.tile(ids, len(views)))
        view = {name: self._send(np.concatenate(views[name])) for name in VIEW.names or ()}
        if self._pool is None:
            output = self._render(self.images.index_select(0, which), view, size, *flags)
        else:
            output = torch.from_numpy(self._memory.empty((len(which), size, size, 3)))
            chunk = max(1, CHUNK // max(size**2, self.images[0, 0].numel()))
            parts = [slice(first, first + chunk) for first in range(0, len(which), chunk)]
            work += [self._pool.submit(self._fill, output, which, view, part, size, *flags) for part in parts]
        return output.unflatten(0, (len(views), -1)).permute(0, 1, 4, 2, 3)

    def _send(self, numbers: np.ndarray) -> torch.Tensor:
        """To the device. From pinned memory: CUDA may wait for all queued work before it copies 64 KB or more from other."""
        sent = torch.from_numpy(numbers)
        return sent.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else sent

    @torch.inference_mode()
    def _fill(self, output: torch.Tensor, which: torch.Tensor, view: dict, part: slice, *options) -> None:
        images = self.images.index_select(0, which[part])
        output[part] = render(images, {name: values[part] for name, values in view.items()}, *options)

    def close(self) -> None:
        self.images = self.images[:0]
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads in each of which torch uses one core: its own threads would wait for each other after every step."""
    before, together = torch.get_num_threads(), threading.Barrier(threads + 1)

    def alone() -> None:
        torch.get_num_threads()  # the first call in a thread takes over the number set last, so it must come before
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(threads, "views", initializer=alone)
    for _ in range(threads):
        pool.submit(together.wait)
    together.wait()
    torch.set_num_threads(before)  # for threads that are made later, which take over the number set last
    return pool


def render(
    images: torch.Tensor, view: dict[str, torch.Tensor], size: int, transposed: bool, blurred: bool, solarized: bool
):
    """(N, size, size, 3) uint8, one view of each of `images` (N, 3, H, W); `view`: the fields of `views.VIEW`, (N, ...)."""
    box, color = view["box"], view["color"]
    height, width = images.shape[-2:]
    rows = triangle(box[:, 0], box[:, 2], view["vflip"], height, size)
    columns = triangle(box[:, 1], box[:, 3], view["flip"], width, size)
    # The color map keeps sums of weights 1 and comes before the clamp, so it may come before the resize: it is then
    # one small matrix product on the source's pixels. The half makes cutting off the fraction a rounding.
    x = torch.baddbmm(color[..., 3:] + 0.5, color[..., :3], images.flatten(2).to(color.dtype))
    x = x.view(-1, 3 * height, width) @ columns.mT
    x = (rows[:, None] @ x.view(-1, 3, height, size)).clamp_(0, 255.5)
    if transposed:
        x = torch.where(view["transposed"][:, None, None, None], x.mT, x)
    if blurred:
        kernel = gaussian(view["sigma"], size)[:, None]
        x = (kernel @ x.floor_() @ kernel.mT).add_(0.5)
    x = x.to(torch.uint8)
    if solarized:
        x = torch.where(view["solarize"][:, None, None, None], torch.minimum(x, 255 - x), x)
    return torch.stack(x.unbind(1), -1)


def triangle(start: torch.Tensor, length: torch.Tensor, mirror: torch.Tensor, n: int, size: int) -> torch.Tensor:
    """(..., size, n) weights that resize `length` pixels from `start` of n to `size`, antialiased bilinear."""
    start, length = start[..., None], length[..., None]
    scale = length.float() / size
    grid = torch.arange(size, device=start.device, dtype=torch.float32)
    center = scale * (torch.where(mirror[..., None], size - 1 - grid, grid) + 0.5) - 0.5
    pixel = torch.arange(n, device=start.device) - start
    pixel = torch.where((pixel >= 0) & (pixel < length), pixel.float(), torch.inf)  # no weight for what is outside
    support = scale.clamp_min(1)
    weight = ((pixel / support)[..., None, :] - (center / support)[..., None]).abs_().sub_(1).clamp_max_(0)  # negated
    return weight.div_(weight.sum(-1, keepdim=True))


def gaussian(sigma: torch.Tensor, size: int) -> torch.Tensor:
    """(..., size, size) matrices of the blur to 3 sigma with reflected edges; sigma 0 gives the identity."""
    sigma = sigma[..., None, None]
    at = torch.arange(size, device=sigma.device)
    period = max(1, 2 * size - 2)
    result = torch.zeros((*sigma.shape[:-2], size, size), device=sigma.device)
    # Output i sees pixel j directly and by its mirror images -j and 2 (size - 1) - j: sums of one Gaussian at those.
    for image in (at, -at, period - at):
        distance = (at[:, None] - image[None]).abs().float()
        weight = torch.exp(-0.5 * (distance / sigma.clamp_min(1e-3)) ** 2) * (distance <= torch.ceil(3 * sigma))
        if image is not at:  # the border itself is not repeated
            weight = weight * ((image[None] < 0) | (image[None] >= size))
        result = result + weight
    return result / result.sum(-1, keepdim=True)
