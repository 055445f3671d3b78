"""Features without a network: k-means on whitened patches (Coates, Lee and Ng 2011), the bar for whoever needs core-hours.

Patches of 6 x 6 pixels at every position, each with its own mean and contrast taken out, whitened; `features` centroids;
an activation is how much nearer a centroid is than the average one ("triangle"); sums over the four quadrants.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PATCH = 6  # pixels
SAMPLES = 200_000  # patches that the centroids are learned from
ITERATIONS = 15
CONTRAST, WHITENING = 10.0, 0.1  # added to variances, for pixels in 0..255: the paper's
IMAGES = 16  # at a time: their activations fit in a cache


class KMeans:
    """Learned from images (N, 3, S, S) uint8; `kmeans(images)` -> (N, 4 * features) float32."""

    def __init__(self, images: Tensor, features: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        some = _sample(images, generator)
        self.mean = some.mean(0)
        variances, axes = torch.linalg.eigh(torch.cov(some.T).double())
        self.whiten = (axes * (variances + WHITENING).rsqrt() @ axes.T).float()
        some = (some - self.mean) @ self.whiten
        self.centroids = some[torch.randperm(len(some), generator=generator)[:features]].clone()
        for _ in range(ITERATIONS):
            self._move(some, generator)

    def _move(self, x: Tensor, generator: torch.Generator) -> None:
        """One round of Lloyd's algorithm; a centroid that nothing is nearest to starts again at a random patch."""
        half = self.centroids.square().sum(1) / 2
        nearest = torch.cat([(rows @ self.centroids.T - half).argmax(1) for rows in x.split(4096)])
        sums = torch.zeros_like(self.centroids).index_add_(0, nearest, x)
        counts = torch.bincount(nearest, minlength=len(sums))
        self.centroids = sums / counts.clamp_min(1)[:, None]
        empty = counts == 0
        self.centroids[empty] = x[torch.randint(len(x), (int(empty.sum()),), generator=generator)]

    def __call__(self, images: Tensor) -> Tensor:
        return torch.cat([self._quadrants(part) for part in images.split(IMAGES)])

    def _quadrants(self, images: Tensor) -> Tensor:
        x = (_normalized(F.unfold(images.float(), PATCH).mT) - self.mean) @ self.whiten
        squares = self.centroids.square().sum(1)
        distance = torch.addmm(squares, x.flatten(0, 1), self.centroids.T, alpha=-2).view(*x.shape[:2], -1)
        distance = distance.add_(x.square().sum(-1, keepdim=True)).clamp_min_(0).sqrt_()
        nearer = distance.mean(-1, keepdim=True).sub(distance).clamp_min_(0)
        side = math.isqrt(x.shape[1])
        grid, cut = nearer.unflatten(1, (side, side)), (side + 1) // 2
        parts = [rows.sum((1, 2)) for band in grid.split(cut, 1) for rows in band.split(cut, 2)]
        return torch.cat(parts, 1)


def _sample(images: Tensor, generator: torch.Generator) -> Tensor:
    """SAMPLES patches (n, 3 * PATCH * PATCH) from random places of random images, normalized."""
    high = images.shape[-1] - PATCH + 1
    n = torch.randint(len(images), (SAMPLES,), generator=generator)
    top, left = (torch.randint(high, (SAMPLES,), generator=generator) for _ in range(2))
    window = np.lib.stride_tricks.sliding_window_view(images.numpy(), (PATCH, PATCH), (2, 3))
    return _normalized(torch.from_numpy(window[n.numpy(), :, top.numpy(), left.numpy()].reshape(SAMPLES, -1)).float())


def _normalized(x: Tensor) -> Tensor:
    """Each patch (last axis) without its own mean and contrast."""
    variance, mean = torch.var_mean(x, -1, keepdim=True)
    return (x - mean) * (variance + CONTRAST).rsqrt()
