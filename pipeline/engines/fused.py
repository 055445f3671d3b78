"""The pixels of views in two Triton kernels: crop, antialiased resize, mirror, color and solarize in one; blur in another.

Images may lie anywhere on the device, each of its own size, as DALI's decoder leaves them: the kernels are given addresses.
Every program makes `BLOCK` pixels of one view. The filter is the antialiasing triangle of `pixels.py`, its weights computed
where they are used: a program needs a few dozen, and reading them would cost what computing them does. Only the views that
are blurred pass through `scratch` and the second kernel.

With TRITON_INTERPRET=1 in the environment before the first import the same kernels run on the CPU, which is how they are tested
without a GPU.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

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
        ("scratch", "<i4"),
    ]
)
WORDS = tl.constexpr(ROW.itemsize // 4)


def table(views: np.ndarray) -> np.ndarray:
    """(V, B) rows of `ROW` from as many of `views.VIEW`; `scratch` numbers the blurred views, -1 elsewhere."""
    rows = np.zeros(views.shape, ROW)
    for name in ("box", "flip", "solarize", "sigma"):
        rows[name] = views[name]
    rows["color"] = views["color"].reshape(*views.shape, 12)
    blurred = views["sigma"] > 0
    rows["scratch"] = np.where(blurred, np.cumsum(blurred).reshape(blurred.shape) - 1, -1)
    return rows


def render(addresses: torch.Tensor, strides: torch.Tensor, rows: torch.Tensor, size: int, blurred: int) -> torch.Tensor:
    """(V, B, S, S, 3) uint8: the views of one size of a batch.

    `addresses`: (B,) int64, where each image's first pixel lies on the device; `strides`: (B, 3) int64, bytes from one row,
    one pixel and one channel to the next; `rows`: (V, B, WORDS) int32, `table`'s bytes; `blurred`: how many views are.
    """
    views, batch, _ = rows.shape
    out = torch.empty((views, batch, size, size, 3), dtype=torch.uint8, device=rows.device)
    scratch = torch.empty((max(blurred, 1), size, size, 3), dtype=torch.uint8, device=rows.device)
    half = torch.empty((max(blurred, 1), size, size, 3), dtype=torch.float32, device=rows.device)
    block = BLOCK if rows.is_cuda else INTERPRETED
    grid = (triton.cdiv(size * size, block), batch, views)
    _crop[grid](addresses, strides, rows, out, scratch, batch, size, block)
    if blurred:
        _blur[grid](rows, scratch, half, half, batch, size, False, block)
        _blur[grid](rows, scratch, half, out, batch, size, True, block)
    return out


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
def _crop(addresses, strides, rows, out, scratch, batch, size, BLOCK: tl.constexpr):
    sample, view = tl.program_id(1), tl.program_id(2)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < size * size
    y, x = pixel // size, pixel % size
    words = rows + (view * batch + sample) * WORDS
    top, left, height, width = tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)
    x_from = tl.where(tl.load(words + 4) != 0, size - 1 - x, x)
    row_step, step, channel = (
        tl.load(strides + 3 * sample), tl.load(strides + 3 * sample + 1), tl.load(strides + 3 * sample + 2)
    )  # fmt: skip
    image = tl.load(addresses + sample).to(tl.pointer_type(tl.uint8)) + top * row_step + left * step

    y_first, y_center, y_inverse = _filter(y, height, size)
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

    slot = tl.load(words + 19)
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
    slot = tl.load(words + 19)
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
