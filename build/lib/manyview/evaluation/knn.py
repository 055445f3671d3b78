"""Nearest-neighbour classification on features.

Two votes, which are different protocols and never mixed up:
`cosine_exp`      sum of exp(similarity / T) over the k most similar (Wu et al. 2018; DINO: k in 10, 20, 100, 200, T 0.07)
`euclid_invdist`  sum of 1 / distance over the k nearest (Knott et al. 2024: k 20, on raw or standardized features)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from manyview.pipeline.errors import UserError

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
SLACK = 16  # more candidates than k, so that rounding in the fast distances cannot lose a neighbour


def neighbours(
    bank: Tensor, queries: Tensor, k: int, *, metric: str = "cosine", chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of `bank` (N, F) to each of `queries` (n, F), nearest first.

    Returns (values, ids), both (n, k): values are cosine similarities, or Euclidean distances for `metric="euclid"`.
    `chunk` queries are compared at a time (default: about 256 MB of similarities). `UserError` if k > N.
    """
    if not 1 <= k <= len(bank):
        raise UserError(f"kNN with k = {k} needs at least {k} labelled training samples, but there are {len(bank)}")
    chunk = chunk or max(1, 2**26 // len(bank))
    if metric == "cosine":
        bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
        return _join([(q @ bank.T).topk(k, dim=1) for q in queries.split(chunk)])
    # |q - x|^2 = |x|^2 - 2 q.x + |q|^2 loses digits when features sit far from the origin; centring is free.
    center = bank.mean(0)
    bank, queries = bank - center, queries - center
    squares = bank.square().sum(1) / 2
    found = [(q @ bank.T - squares).topk(min(k + SLACK, len(bank)), dim=1).indices for q in queries.split(chunk)]
    return _exact(bank, queries, torch.cat(found), k)


def _join(parts: list) -> tuple[Tensor, Tensor]:
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _exact(bank: Tensor, queries: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distances of the candidates from the differences themselves, so that a duplicate is at exactly zero."""
    parts = []
    for q, ids in zip(queries.split(64), candidates.split(64)):
        distances = (q[:, None] - bank[ids]).square().sum(2).sqrt()
        values, order = distances.topk(k, dim=1, largest=False)
        parts.append((values, ids.gather(1, order)))
    return _join(parts)


def vote(weights: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Add up the neighbours' weights (n, k) by their labels (n, k): class scores (n, classes) in float64."""
    scores = torch.zeros(len(weights), classes, dtype=torch.float64, device=weights.device)
    return scores.scatter_add_(1, labels, weights.double())


def cosine_weights(similarities: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    return (similarities.double() / temperature).exp()


def distance_weights(distances: Tensor) -> Tensor:
    """1 / d; where a neighbour is at distance zero, only such neighbours vote (as in scikit-learn)."""
    distances = distances.double()
    zero = distances == 0
    return torch.where(zero.any(1, keepdim=True), zero.double(), 1 / distances.clamp_min(1e-300))


def cosine_exp(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    *,
    k: int = 20,
    temperature: float = TEMPERATURE,
    classes: int,
    chunk: int | None = None,
) -> Tensor:
    """Class scores (n, classes) of `queries` (n, F) by the k most similar rows of `bank` (N, F)."""
    similarities, ids = neighbours(bank, queries, k, metric="cosine", chunk=chunk)
    return vote(cosine_weights(similarities, temperature), bank_labels[ids], classes)


def euclid_invdist(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, *, k: int = 20, classes: int, chunk: int | None = None
) -> Tensor:
    """Class scores (n, classes) of `queries` (n, F) by the k nearest rows of `bank` (N, F)."""
    distances, ids = neighbours(bank, queries, k, metric="euclid", chunk=chunk)
    return vote(distance_weights(distances), bank_labels[ids], classes)
