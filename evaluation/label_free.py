"""Scores that need no labels: how many dimensions the features use.

For watching one run, and choosing within it. They are not comparable between methods, so nothing here ranks runs.

RankMe     Garrido et al. 2023 (arXiv 2210.02885): exp of the entropy of the singular values, features NOT centred.
alpha-ReQ  Agrawal et al. 2022: exponent of the eigenspectrum of the centred covariance, lambda_i ~ i^-alpha.
LiDAR      Thilak et al. 2023 (arXiv 2312.04000): effective rank of between-image over within-image scatter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Alpha(NamedTuple):
    """`alpha`: the exponent; near 1 is the favourable regime. `r2` of the fit over ranks `first`..`last` (from 1)."""

    alpha: float
    r2: float
    first: int
    last: int


def singular_values(z: Tensor) -> Tensor:
    """Singular values of (N, K) features, largest first, float64 (K,): from the K x K Gram matrix when N > K."""
    z = z.double()
    gram = z.T @ z if z.shape[0] >= z.shape[1] else z @ z.T
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt()


def effective_rank(spectrum: Tensor, eps: float) -> float:
    """exp(-sum p ln p) of a non-negative spectrum, p = s / sum(s) + eps (the papers' eps, which lifts it slightly)."""
    p = spectrum.double() / spectrum.double().sum().clamp_min(1e-300) + eps
    return torch.exp(-(p * p.log()).sum()).item()


def rankme(z: Tensor, *, centered: bool = False) -> float:
    """RankMe of (N, K) features. Not centred, as in the paper, a common offset hides the rank, so look at both. The paper uses
    25,600 samples; with fewer than about 5 K it is biased down."""
    return effective_rank(singular_values(z - z.mean(0) if centered else z), 1e-7)


def eigenspectrum(z: Tensor) -> Tensor:
    """Eigenvalues of the centred covariance of (N, K) features, largest first, float64 (min(N, K),)."""
    z = z.double()
    return singular_values(z - z.mean(0)).square() / max(1, len(z) - 1)


def power_law(eigenvalues: Tensor, *, first: int = 11, last: int = 100) -> Alpha:
    """Least-squares slope of ln(lambda_i) on -ln(i) over ranks first..last (from 1), weighted by 1 / i.

    Ranks 11..100 with weights 1 / i are the authors' defaults. With fewer than `first + 10` usable eigenvalues the fit
    starts at rank 1. Eigenvalues that are zero to rounding are left out. NaN when fewer than two remain.
    """
    eigenvalues = eigenvalues.double()
    usable = int((eigenvalues > 1e-12 * eigenvalues[0]).sum()) if len(eigenvalues) else 0
    last = min(last, usable)
    first = first if last >= first + 10 else 1
    if last - first < 1:
        return Alpha(float("nan"), float("nan"), first, last)
    ranks = torch.arange(first, last + 1, dtype=torch.float64, device=eigenvalues.device)
    x, y, weights = -ranks.log(), eigenvalues[first - 1 : last].log(), 1 / ranks
    weights = weights / weights.sum()
    x0, y0 = (weights * x).sum(), (weights * y).sum()
    slope = (weights * (x - x0) * (y - y0)).sum() / (weights * (x - x0).square()).sum()
    residual = (weights * (y - y0 - slope * (x - x0)).square()).sum()
    total = (weights * (y - y0).square()).sum()
    r2 = 1 - (residual / total).item() if total > 0 else 1.0
    return Alpha(slope.item(), r2, first, last)


def lidar(z: Tensor) -> float:
    """LiDAR of (n, q, K) features: q views of each of n images, grouped by image. At most min(K, n - 1), up to eps."""
    n, q, k = z.shape
    if n < 2 or q < 2:
        raise ValueError(f"LiDAR needs at least 2 images with 2 views each, got {n} with {q}")
    z = z.double()
    means = z.mean(1)
    between = torch.cov(means.T).reshape(k, k)
    within = (z - means[:, None]).reshape(n * q, k)
    within = within.T @ within / (n * (q - 1)) + 1e-4 * torch.eye(k, dtype=z.dtype, device=z.device)
    values, vectors = torch.linalg.eigh(within)
    root = vectors * values.rsqrt() @ vectors.T
    return effective_rank(torch.linalg.eigvalsh(root @ between @ root).clamp_min(0), 1e-8)
