"""Views of a set that fits in device memory: all pixels as one uint8 tensor, all views of a batch at once in torch.

A resize of a box is two small matrices, rows and columns of the antialiasing triangle filter; a mirror image is in the
columns' matrix. A blur is two more, the same for both axes. On CUDA the whole is compiled by `torch.compile`.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from pipeline.codec import decode
from pipeline.store import Corrupt, Store
from pipeline.views import Parameters

CHUNK = 32  # images at a time on the CPU, so that what is between two steps stays in cache


class ResidentEngine:
    """`engine(ids, parameters)` -> a group: uint8 (V, B, 3, S, S) on `device`, channels-last memory.

    All images are read and decoded once, when it is made; they must be of one size (`engines.create` asks). A sample
    that cannot be read raises `store.Corrupt` when it is asked for. `decoded` counts images.
    """

    name = "resident"

    def __init__(self, store: Store, device: str | torch.device = "cpu", threads: int | None = None):
        self.store, self.device = store, torch.device(device)
        height, width = int(store.heights[0]), int(store.widths[0])
        self.decoded = 0
        self.bad: dict[int, Corrupt] = {}
        begun = time.perf_counter()
        images = torch.zeros((len(store), 3, height, width), dtype=torch.uint8)
        for i in range(len(store)):
            images[i] = torch.from_numpy(self._load(i, (height, width))).permute(2, 0, 1)
        self.images = images.to(self.device)
        self.seconds = {"load": time.perf_counter() - begun, "render": 0.0}
        self._render = torch.compile(render) if self.device.type == "cuda" else render

    def _load(self, i: int, shape: tuple[int, int]) -> np.ndarray:
        try:
            image = np.array(decode(self.store.read(i)))
        except Corrupt as error:
            self.bad[i] = error
        except ValueError as error:
            self.bad[i] = Corrupt(i, self.store.key(i), str(error))
        else:
            self.decoded += 1
            return image
        return np.zeros((*shape, 3), np.uint8)  # never shown: asking for it raises

    def __call__(self, ids: np.ndarray, parameters: Parameters) -> list[torch.Tensor]:
        return self.submit(ids, parameters).result()

    def submit(self, ids: np.ndarray, parameters: Parameters) -> Pending:
        """Start a batch (on CUDA the kernels are only queued); `result()` of what is returned gives it."""
        bad = next((self.bad[i] for i in ids.tolist() if i in self.bad), None) if self.bad else None
        if bad is not None:
            return Pending([], bad)
        begun = time.perf_counter()
        images = self.images[torch.from_numpy(ids).to(self.device, non_blocking=True)]
        outputs = [self._group(images, parameters, group) for group in parameters.groups]
        self.seconds["render"] += time.perf_counter() - begun
        return Pending(outputs, None)

    def _group(self, images: torch.Tensor, p: Parameters, group: slice) -> torch.Tensor:
        size, flags = p.sizes[group.start], (bool(p.sigma[group].any()), bool(p.solarize[group].any()))
        arrays = [np.ascontiguousarray(array[group]) for array in (p.box, p.flip, p.color, p.sigma, p.solarize)]
        numbers = [torch.from_numpy(array).to(self.device, non_blocking=True) for array in arrays]
        if self.device.type != "cpu":
            return self._render(images, numbers, size, *flags)
        parts = zip(images.split(CHUNK), zip(*(array.split(CHUNK, 1) for array in numbers)))
        views = [render(some, theirs, size, *flags).permute(0, 1, 3, 4, 2) for some, theirs in parts]
        return torch.cat(views, 1).permute(0, 1, 4, 2, 3)

    def close(self) -> None:
        self.images = self.images[:0]


class Pending:
    """A batch that is made already, or why it cannot be."""

    def __init__(self, outputs: list[torch.Tensor], error: Corrupt | None):
        self._outputs, self._error = outputs, error

    def result(self) -> list[torch.Tensor]:
        if self._error is not None:
            raise self._error
        return self._outputs

    def cancel(self) -> None:
        self._outputs = []


def render(images, numbers, size: int, blurred: bool, solarized: bool) -> torch.Tensor:
    """(V, B, 3, size, size) uint8 views of `images` (B, 3, H, W); `numbers`: box, flip, color, sigma and
    solarize of one group as in `views.Parameters`."""
    box, flip, color, sigma, solarize = numbers
    views, batch = flip.shape
    height, width = images.shape[-2:]
    rows = triangle(box[..., 0], box[..., 2], torch.zeros_like(flip), height, size)
    columns = triangle(box[..., 1], box[..., 3], flip, width, size)
    # The color map keeps sums of weights 1 and comes before the clamp, so it may come before the resize: it is then
    # one small matrix product on the source's pixels.
    pixels = images.to(rows.dtype).view(batch, 3, height * width)
    colored = torch.baddbmm(color[..., 3:].flatten(0, 1), color[..., :3].flatten(0, 1), pixels.repeat(views, 1, 1))
    x = colored.view(-1, 3 * height, width) @ columns.flatten(0, 1).mT
    x = rows.flatten(0, 1)[:, None] @ x.view(-1, 3, height, size)
    x = x.add_(0.5).clamp_(0, 255.5).floor_() if not blurred else x.round_().clamp_(0, 255)
    if blurred:
        kernel = gaussian(sigma, size).flatten(0, 1)[:, None]
        x = (kernel @ x @ kernel.mT).round_()
    x = x.view(views, batch, 3, size, size)
    if solarized:
        x = torch.where(solarize[..., None, None, None], torch.minimum(x, 255 - x), x)
    return x.to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def triangle(start: torch.Tensor, length: torch.Tensor, mirror: torch.Tensor, n: int, size: int) -> torch.Tensor:
    """(..., size, n) weights that resize `length` pixels from `start` of n to `size`, antialiased bilinear."""
    scale = (length.float() / size)[..., None, None]
    support = scale.clamp_min(1)
    grid = torch.arange(size, device=start.device, dtype=torch.float32)[:, None]
    center = scale * (torch.where(mirror[..., None, None], size - 1 - grid, grid) + 0.5) - 0.5
    pixel = torch.arange(n, device=start.device, dtype=torch.float32) - start[..., None, None]
    inside = (pixel >= 0) & (pixel < length[..., None, None])
    weight = (1 - (pixel - center).abs() / support).clamp_min(0) * inside
    return weight / weight.sum(-1, keepdim=True)


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
