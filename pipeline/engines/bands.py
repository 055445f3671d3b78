"""The pixels of a view on the CPU where they are not RGB of 8 bits: any number of channels, 8 or 16 bits, compiled.

Resize, mirror, quarter turn, brightness, contrast and blur, as in `pixels`, but rounded once, at the end. Of a color map only its
gain and offset are taken, which is what it does to grey: saturation, hue, grey and solarize have no meaning here. Contrast
turns around a channel's own mean, since what 16 bits hold is seldom used up to white.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from manyview.pipeline.compiled import njit
from manyview.pipeline.engines.pixels import triangle
from manyview.pipeline.store import Store


def renderer(store: Store) -> Callable:
    """`render` for this set, called as `pixels.render` is."""
    return partial(render, np.array(store.mean, np.float32), np.float32(store.layout.white))


@njit
def render(mean, white, pixels, heights, widths, first, views, out):
    """Write the views of images that lie behind each other in `pixels` (flat), samples `first`, `first` + 1 … of a batch.

    `mean` (C,) float32; `heights`, `widths` (n,) int64; `views` (V, B) of `views.VIEW`; `out` (V, B, S, S, C), contiguous.
    """
    size, channels, start = out.shape[2], out.shape[4], 0
    for i in range(len(heights)):
        b, stop = first + i, start + channels * heights[i] * widths[i]
        rows = pixels[start:stop].reshape(heights[i], channels * widths[i])
        for v in range(out.shape[0]):
            view = views[v, b]
            crop = _resize(rows, view, size, channels)
            _light(crop, view.color, mean, white)
            if view.sigma > 0:
                crop = _blur(crop, view.sigma, channels)
            _round(crop, view.transposed, out[v, b])
        start = stop


@njit
def _resize(rows, view, size, channels):
    """(S, C S) float32: the box of an image, (H, C W), resized, mirrored or not."""
    box, out = view.box, np.zeros((size, channels * size), np.float32)
    left, width = channels * box[1], channels * box[3]
    y_first, y_weight = triangle(box[2], size, view.vflip)
    x_first, x_weight = triangle(box[3], size, view.flip)
    line = np.empty(width, np.float32)
    for y in range(size):
        line[:] = 0
        for k in range(y_weight.shape[1]):
            row, weight = rows[box[0] + np.int64(y_first[y]) + k, left : left + width], y_weight[y, k]
            for j in range(width):
                line[j] += weight * np.float32(row[j])
        for x in range(size):
            for k in range(x_weight.shape[1]):
                source, weight = channels * (np.int64(x_first[x]) + k), x_weight[x, k]
                for c in range(channels):
                    out[y, channels * x + c] += weight * line[source + c]
    return out


@njit
def _light(crop, color, mean, white):
    """Brightness and contrast, in place. A color map makes grey g `gain` g + `offset`, with contrast around 128."""
    gain, offset = color[0, 0] + color[0, 1] + color[0, 2], color[0, 3] / np.float32(128)
    channels = len(mean)
    for y in range(len(crop)):
        for x in range(crop.shape[1] // channels):
            for c in range(channels):
                value = gain * crop[y, channels * x + c] + offset * mean[c]
                crop[y, channels * x + c] = min(max(value, np.float32(0)), white)


@njit
def _blur(image, sigma, channels):
    """Gaussian blur of (S, C S) float32, to 3 sigma, edges reflected without repeating the border."""
    size, n, reach = len(image), image.shape[1], math.ceil(3 * sigma)
    weight = np.empty(2 * reach + 1, np.float32)
    for k in range(2 * reach + 1):
        weight[k] = math.exp(-0.5 * ((k - reach) / sigma) ** 2)
    weight /= weight.sum()
    at = np.empty(size + 2 * reach, np.int64)  # which row or column stands at a place beyond the edges
    for i in range(len(at)):
        away = abs(i - reach) % max(2 * size - 2, 1)
        at[i] = min(away, 2 * size - 2 - away)
    padded, out = np.empty(channels * len(at), np.float32), np.zeros_like(image)
    for y in range(size):
        middle = np.zeros(n, np.float32)
        for k in range(2 * reach + 1):
            row = image[at[y + k]]
            for j in range(n):
                middle[j] += weight[k] * row[j]
        for x in range(len(at)):
            for c in range(channels):
                padded[channels * x + c] = middle[channels * at[x] + c]
        for k in range(2 * reach + 1):
            for j in range(n):
                out[y, j] += weight[k] * padded[channels * k + j]
    return out


@njit
def _round(crop, transposed, out):
    """Into `out` (S, S, C)."""
    size, channels = out.shape[0], out.shape[2]
    for y in range(size):
        for x in range(size):
            row, column = (x, y) if transposed else (y, x)
            for c in range(channels):
                out[y, x, c] = crop[row, channels * column + c] + np.float32(0.5)
