"""The pixels of a view on the CPU: resize, mirror, color, blur, solarize, compiled and without Python's lock.

One pass makes one output row at a time while it is in cache: the rows of the box are combined (antialiasing triangle
filter, as Pillow's and torch's `antialias=True`), the columns are combined, the color map is applied and the result is
rounded once. Indices into rows are unsigned where they come from tables: a signed one costs a test each.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from manyview.pipeline.compiled import njit
from manyview.pipeline.engines.columns import TOGETHER, combine_columns

ZERO, HALF = np.float32(0), np.float32(0.5)
UNITS = np.uint16(128)  # of a level in the blur: the sum of two pixels fills 16 bits
NARROW = 64  # pixels that a blur may reach for its units to round to less than half a level
# What of fast math changes no finite value. Reassociating and fusing would: a compiler may do either here and not there,
# and did, so that views differed by one grey level between the process that compiled and those that found it compiled.
EXACT = {"nnan", "ninf", "nsz"}


@njit
def render(pixels, heights, widths, first, views, out):
    """Write the views of images that lie behind each other in `pixels` (uint8, flat), samples `first`, `first` + 1 … of a batch.

    `heights` and `widths` are theirs, (n,) int64; `views` (V, B) of `views.VIEW`; `out` (V, B, S, S, 3) uint8, contiguous.
    """
    size, start = out.shape[2], 0
    scratch = np.empty((size, size * 3), np.uint8)
    for i in range(len(heights)):
        b, stop = first + i, start + 3 * heights[i] * widths[i]
        rows = pixels[start:stop].reshape(heights[i], 3 * widths[i])
        for v in range(out.shape[0]):
            view, target = views[v, b], out[v, b].reshape(size, size * 3)
            sharp = scratch if view.sigma > 0 or view.transposed else target
            resize(rows, view, sharp)
            _finish(sharp, view, target)
        start = stop


@njit
def finish(crops, views, out):
    """What follows the resize: `crops` and `out` (V, S, S, 3) uint8, `views` (V,) of `views.VIEW`."""
    size = out.shape[1]
    red, green, blue = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    for v in range(out.shape[0]):
        view, crop, target = views[v], crops[v].reshape(size, size * 3), out[v].reshape(size, size * 3)
        sharp = np.empty_like(target) if view.sigma > 0 or view.transposed else target
        for y in range(size):
            for x in range(size):
                red[x], green[x], blue[x] = crop[y, 3 * x], crop[y, 3 * x + 1], crop[y, 3 * x + 2]
            _color_row(red, green, blue, view.color, sharp[y])
        _finish(sharp, view, target)


@njit
def _finish(sharp, view, target):
    """`target` from `sharp`, which is another array where the view is blurred or transposed."""
    if view.transposed:
        size = len(sharp)
        source, sharp = sharp, np.empty_like(sharp) if view.sigma > 0 else target
        for y in range(size):
            for x in range(size):
                for c in range(3):
                    sharp[y, 3 * x + c] = source[x, 3 * y + c]
    if view.sigma > 0:
        blur(sharp, view.sigma, target)
    if view.solarize:
        values = target.reshape(target.size)
        for j in range(len(values)):
            values[j] = min(values[j], np.uint8(255) - values[j])


@njit(fastmath=EXACT)
def resize(rows, view, out):
    """`out` (S, 3 S): the box of an image, (H, 3 W), resized, mirrored or not, through the color map of `view`."""
    size, box, color = len(out), view.box, view.color
    left, width = 3 * box[1], 3 * box[3]
    y_first, y_weight = triangle(box[2], size, view.vflip)
    x_first, x_weight = triangle(box[3], size, view.flip)
    line, planes = np.empty(width + 1, np.float32), np.empty((3, len(x_first)), np.float32)
    plain = _changes_nothing(color)
    for y in range(size):
        _combine_rows(rows, box[0] + np.int64(y_first[y]), left, left + width, y_weight[y], line[:width])
        combine_columns(line, x_first, x_weight, planes)  # type: ignore[call-arg]
        if plain:
            _plain_row(planes[0], planes[1], planes[2], out[y])
        else:
            _color_row(planes[0], planes[1], planes[2], color, out[y])


@njit(fastmath=EXACT, inline="always")
def _combine_rows(rows, first, start, stop, weights, line):
    one = rows[first, start:stop]
    if len(weights) == 1:
        for j in range(len(line)):
            line[j] = np.float32(one[j])
        return
    two, p, q = rows[first + 1, start:stop], weights[0], weights[1]
    for j in range(len(line)):
        line[j] = p * np.float32(one[j]) + q * np.float32(two[j])
    for k in range(2, len(weights)):
        if weights[k] > ZERO:
            more, p = rows[first + k, start:stop], weights[k]
            for j in range(len(line)):
                line[j] += p * np.float32(more[j])


@njit(fastmath=EXACT, inline="always")
def _color_row(red, green, blue, m, out):
    for x in range(len(out) // 3):
        r, g, b = red[x], green[x], blue[x]
        out[3 * x] = _level(m[0, 0] * r + m[0, 1] * g + m[0, 2] * b + m[0, 3] + HALF)
        out[3 * x + 1] = _level(m[1, 0] * r + m[1, 1] * g + m[1, 2] * b + m[1, 3] + HALF)
        out[3 * x + 2] = _level(m[2, 0] * r + m[2, 1] * g + m[2, 2] * b + m[2, 3] + HALF)


@njit(inline="always")
def _level(x):
    return np.uint8(min(max(np.int32(x), np.int32(0)), np.int32(255)))  # whole numbers are cut off faster than floats


@njit
def _changes_nothing(m):
    for row in range(3):
        for column in range(4):
            if m[row, column] != (row == column):
                return False
    return True


@njit(fastmath=EXACT, inline="always")
def _plain_row(red, green, blue, out):
    """`_color_row` of the map that changes nothing, a fifth of the time of a whole view."""
    for x in range(len(out) // 3):
        out[3 * x] = np.uint8(red[x] + HALF)
        out[3 * x + 1] = np.uint8(green[x] + HALF)
        out[3 * x + 2] = np.uint8(blue[x] + HALF)


@njit
def triangle(n, size, mirror):
    """The antialiased bilinear filter from n to `size` pixels: first source pixel (size,), weights (size, taps); behind them
    zeros up to a multiple of `TOGETHER`."""
    scale = n / size
    support = max(scale, 1.0)
    taps = min(n, math.ceil(2 * support))
    padded = -(-size // TOGETHER) * TOGETHER
    first, weight = np.zeros(padded, np.uint64), np.zeros((padded, taps), np.float32)
    for i in range(size):
        center = scale * (i + 0.5) - 0.5
        low = max(math.floor(center - support) + 1, 0)
        high = min(math.ceil(center + support), n)
        start, total, row = min(low, n - taps), 0.0, size - 1 - i if mirror else i
        for x in range(low, high):
            total += 1 - abs(x - center) / support
        for x in range(low, high):
            weight[row, x - start] = (1 - abs(x - center) / support) / total
        first[row] = start
    return first, weight


def _high(typing, a, b):
    """The upper half of a product of two uint16. numba has no such thing, and LLVM makes one instruction for many of it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        half, bits = ir.IntType(16), ir.IntType(32)
        product = builder.module.declare_intrinsic("llvm.umul.fix", [half], ir.FunctionType(half, [half, half, bits]))
        return builder.call(product, [*args, bits(16)])

    return types.uint16(types.uint16, types.uint16), generate


high: Any = intrinsic(_high)


@njit
def blur(image, sigma, out):
    """Gaussian blur of `image` (S, 3 S) uint8 into `out`, to 3 sigma, edges reflected without repeating the border.

    In whole `UNITS` of a level, 16 bits each: twice as many at a time as float32, and the same on every machine.
    """
    size, n, reach = len(image), image.shape[1], math.ceil(3 * sigma)
    weight = _gaussian(sigma, reach)
    if reach > NARROW:
        _blur_widely(image, weight, out)
        return
    parts = np.empty(reach + 1, np.uint16)  # of 2**16
    for k in range(1, reach + 1):
        parts[k] = np.uint16(weight[k] * 2**16 + 0.5)
    parts[0] = np.uint16(2**16 - 1 - 2 * parts[1:].sum())
    # Every product is rounded down, by half a unit on average.
    even, padded, line = np.uint16((reach + 1) // 2), np.empty(n + 6 * reach, np.uint16), np.empty(n, np.uint16)
    for y in range(size):
        middle, here = padded[3 * reach : 3 * reach + n], image[y]
        above, below = image[_reflect(y - 1, size)], image[_reflect(y + 1, size)]
        for j in range(n):
            middle[j] = even + high(np.uint16(here[j] * UNITS), parts[0]) + high(_sum(above[j], below[j]), parts[1])
        for k in range(2, reach + 1):
            above, below, p = image[_reflect(y - k, size)], image[_reflect(y + k, size)], parts[k]
            for j in range(n):
                middle[j] += high(_sum(above[j], below[j]), p)
        for x in range(1, reach + 1):
            for c in range(3):
                padded[3 * (reach - x) + c] = middle[3 * _reflect(-x, size) + c]
                padded[3 * (reach + size - 1 + x) + c] = middle[3 * _reflect(size - 1 + x, size) + c]
        before, after = padded[3 * (reach - 1) :], padded[3 * (reach + 1) :]
        rounded = even + UNITS // 2
        for j in range(n):
            line[j] = rounded + high(middle[j], parts[0]) + high(np.uint16(before[j] + after[j]), parts[1])
        for k in range(2, reach + 1):
            before, after, p = padded[3 * (reach - k) :], padded[3 * (reach + k) :], parts[k]
            for j in range(n):
                line[j] += high(np.uint16(before[j] + after[j]), p)
        target = out[y]
        for j in range(n):
            target[j] = np.uint8(line[j] // UNITS)


@njit(inline="always")
def _sum(one, two):
    return np.uint16((np.uint16(one) + np.uint16(two)) * UNITS)


@njit
def _gaussian(sigma, reach):
    """The weights of distances 0 to `reach`; together, both sides counted, 1."""
    weight = np.empty(reach + 1)
    for k in range(reach + 1):
        weight[k] = math.exp(-0.5 * (k / sigma) ** 2)
    return weight / (2 * weight.sum() - weight[0])


@njit
def _blur_widely(image, weight, out):
    """`blur` by weights too many for 16 bits, in float32 and without haste."""
    size, reach = len(image), len(weight) - 1
    half = np.empty((3, size), np.float32)
    for y in range(size):
        half[:] = 0
        for k in range(-reach, reach + 1):
            row, p = image[_reflect(y + k, size)], np.float32(weight[abs(k)])
            for x in range(size):
                for c in range(3):
                    half[c, x] += p * np.float32(row[3 * x + c])
        for x in range(size):
            for c in range(3):
                total = HALF
                for k in range(-reach, reach + 1):
                    total += np.float32(weight[abs(k)]) * half[c, _reflect(x + k, size)]
                out[y, 3 * x + c] = np.uint8(total)


@njit(inline="always")
def _reflect(i, n):
    if 0 <= i < n or n == 1:
        return i if n > 1 else 0
    i = abs(i) % (2 * n - 2)
    return i if i < n else 2 * n - 2 - i
