"""Mean and mean square a channel over many images, most of which are seen only at an eighth of their size.

A thumbnail has its image's mean, but not what it smooths away; that part of the mean square is measured on every
`SAMPLED`-th image, which is decoded at full size too. What is added up is an array (6, C) float64, a channel a column:
sums of values and of squares, squares that thumbnails lost, and pixels: all, of thumbnails' images, of measured ones.
"""

from __future__ import annotations

import numpy as np

SAMPLED = 16


def nothing(channels: int = 3) -> np.ndarray:
    return np.zeros((6, channels))


def of_pixels(pixels: np.ndarray) -> np.ndarray:
    """(H, W, C) uint8 or uint16, looked at completely: exact."""
    total = nothing(pixels.shape[2])
    total[:2], total[3] = sums(pixels), pixels.shape[0] * pixels.shape[1]
    return total


def of_thumbnail(small: np.ndarray, area: int, pixels: np.ndarray | None = None) -> np.ndarray:
    """`small`: (h, w, 3) uint8, an image of `area` pixels made smaller; `pixels`: the image, if it is one to measure."""
    total = nothing()
    total[:2], total[3:5] = sums(small) * (area / (small.shape[0] * small.shape[1])), area
    if pixels is not None:
        total[2], total[5] = sums(pixels)[1] - total[1], area
    return total


def average(total: np.ndarray) -> np.ndarray:
    """(2, C): mean and mean square a channel."""
    values, squares, lost, pixels, of_thumbnails, measured = total
    return np.stack([values, squares + lost * of_thumbnails / np.maximum(measured, 1)]) / np.maximum(pixels, 1)


def sums(pixels: np.ndarray) -> np.ndarray:
    """(2, C) float64: sum of the values and of their squares, a channel."""
    import cv2

    if pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        channels = [np.ascontiguousarray(channel, np.uint64) for channel in np.moveaxis(pixels, 2, 0)]
        return np.array([[x.sum() for x in channels], [(x * x).sum() for x in channels]], np.float64)

    # Half the time of cv2.meanStdDev, a twentieth of numpy's, and exact.
    squares = [cv2.norm(channel, cv2.NORM_L2SQR) for channel in cv2.split(pixels)]
    return np.rint([cv2.sumElems(pixels)[:3], squares])
