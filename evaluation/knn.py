"""Nearest-neighbour classification on features.

Two votes, which are different protocols and never mixed up:
`cosine_exp`      sum of exp(similarity / T) over the k most similar (Wu et al. 2018; DINO: k in 10, 20, 100, 200, T 0.07)
`euclid_invdist`  sum of 1 / distance over the k nearest (Knott et al. 2024: k 20, on raw or standardized features)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from manyview.pipeline.errors import UserError

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
SLACK = 16  # more candidates than k: enough for rounding in the fast distances nearly always, and `neighbours` looks


def neighbours(
    bank: Tensor, queries: Tensor, k: int, *, metric: str = "cosine", chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of `bank` (N, F) to each of `queries` (n, F), nearest first.

    Returns (values, ids), both (n, k): values are cosine similarities, or Euclidean distances for `metric="euclid"`, in
    float64, and so is the order: of rows that tie in float32 the truly nearer comes first, of equals the first.
    `chunk` queries are compared at a time (default: about 256 MB of similarities). `UserError` if k > N.
    """
    if not 1 <= k <= len(bank):
        raise UserError(f"kNN with k = {k} needs at least {k} labelled training samples, but there are {len(bank)}")
    chunk = chunk or max(1, 2**26 // len(bank))
    offset: Tensor | int = 0
    if metric == "cosine":
        fast_bank, fast_queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    else:
        # |q - x|^2 = |x|^2 - 2 q.x + |q|^2 loses digits when features sit far from the origin; centring is free.
        center = bank.mean(0)
        fast_bank, fast_queries = bank - center, queries - center
        offset = fast_bank.square().sum(1) / 2
    longest = fast_bank.norm(dim=1).max()
    rounding = 2 * math.sqrt(bank.shape[1]) * torch.finfo(bank.dtype).eps * longest
    parts = []
    for q, fast_q in zip(queries.split(chunk), fast_queries.split(chunk)):
        fast = (fast_q @ fast_bank.T - offset).topk(min(k + SLACK, len(bank)), dim=1)
        values, ids = _ranked(bank, q, fast.indices.sort(dim=1).values, k, metric)
        # Where rounding could have kept a neighbour from among the candidates, the whole bank is.
        margin = fast.values[:, k - 1] - fast.values[:, -1]
        unsure = margin <= rounding * (fast_q.norm(dim=1) + longest)
        if unsure.any() and k + SLACK < len(bank):
            values[unsure], ids[unsure] = _among_all(bank, q[unsure], k, metric)
        parts.append((values, ids))
    return _joined(parts)


def _among_all(bank: Tensor, queries: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    everyone = torch.arange(len(bank), device=bank.device)[None]
    return _joined([_ranked(bank, q[None], everyone, k, metric) for q in queries])


def _ranked(bank: Tensor, queries: Tensor, candidates: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """The k nearest of each query's candidates (n, c), ascending ids, by float64 from the rows themselves: a duplicate is at
    exactly zero, and of equals the first of the bank comes first."""
    parts = []
    for some, ids in zip(queries.split(64), candidates.split(64)):
        q, rows = some.double()[:, None], bank[ids].double()
        if metric == "cosine":
            lengths = q.norm(dim=2) * rows.norm(dim=2)
            far = -rows.mul_(q).sum(2) / lengths.clamp_min(1e-300)
        else:
            far = rows.sub_(q).norm(dim=2)
        values, order = far.sort(dim=1, stable=True)
        parts.append((values[:, :k].neg() if metric == "cosine" else values[:, :k], ids.gather(1, order[:, :k])))
    return _joined(parts)


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    values, ids = map(torch.cat, zip(*parts))
    return values, ids


def vote(weights: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Add up the neighbours' weights (n, k) by their labels (n, k): class scores (n, classes) in float64.

    Labels (n, k, C) bool: several a sample, and each gets the whole weight."""
    if labels.ndim == 3:
        return (weights.double()[:, None] @ labels.double())[:, 0]
    scores = torch.zeros(len(weights), classes, dtype=torch.float64, device=weights.device)
    return scores.scatter_add_(1, labels, weights.double())


def cosine_weights(similarities: Tensor) -> Tensor:
    return (similarities.double() / TEMPERATURE).exp()


def cosine_exp(bank: Tensor, bank_labels: Tensor, queries: Tensor, *, k: int, classes: int) -> Tensor:
    """Class scores (n, classes) of `queries` (n, F) by the k most similar rows of `bank` (N, F)."""
    similarities, ids = neighbours(bank, queries, k)
    return vote(cosine_weights(similarities), bank_labels[ids], classes)


def euclid_invdist(bank: Tensor, bank_labels: Tensor, queries: Tensor, *, k: int, classes: int) -> Tensor:
    """The same by the k nearest rows, by 1 / distance; where one is at distance zero, only such vote (as in scikit-learn)."""
    distances, ids = neighbours(bank, queries, k, metric="euclid")
    zero = distances == 0
    weights = torch.where(zero.any(1, keepdim=True), zero.double(), 1 / distances.clamp_min(1e-300))
    return vote(weights, bank_labels[ids], classes)
