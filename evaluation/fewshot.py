"""Learning from few labels: the subsets, and closed-form ridge regression on 1, 5, 10 or 25 labels a class."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from manyview.evaluation.features import zscore
from manyview.pipeline import plan
from manyview.pipeline.errors import UserError

SHOTS = (1, 5, 10, 25)  # a class
SHARES = (0.01, 0.1, 1.0)  # of the labels
MOST = 100_000  # labels: ridge regression holds their features in float64
SEEDS = (0, 1, 2)
L2 = 2.0**10  # as in big_vision's few-shot evaluator


@dataclass(frozen=True)
class Subset:
    ids: np.ndarray  # (n,) int64, ascending
    fraction: float  # what was asked for
    seed: int
    true_fraction: float  # of the samples to choose from: more than asked for where a class would else be empty

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.ids.astype("<i8").tobytes()).hexdigest()

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {"fraction": self.fraction, "true_fraction": self.true_fraction, "seed": self.seed}
        path.write_text(json.dumps(facts | {"sha256": self.sha256, "ids": self.ids.tolist()}) + "\n")


def subset(labels: np.ndarray, fraction: float, seed: int, among: np.ndarray | None = None) -> Subset:
    """A random part of the labelled samples: of each class its rounded share, at least one sample.

    labels: (N,) integers, -1 = unlabelled (never chosen); among: ids to choose from. For one seed 1 % lies inside 10 %.
    """
    labelled = np.flatnonzero(labels >= 0)
    if among is not None:
        labelled = np.intersect1d(labelled, among)
    if not len(labelled):
        raise UserError("a few-shot subset needs labels, and this split has none")
    ids = labelled[plan.subset(labels[labelled], fraction, seed)]
    return Subset(ids, fraction, seed, len(ids) / len(labelled))


def shots(labels: Tensor, n: int, seed: int) -> Tensor:
    """Ids of n random samples of every class (all of a smaller one). For one seed, fewer shots lie inside more."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels.cpu()[order]
    return torch.cat([order[shuffled == c][:n] for c in shuffled.unique()])


def ridge(x: Tensor, labels: Tensor, queries: Tensor, classes: int) -> Tensor:
    """Scores (n, C) of `queries` (n, F): least squares with penalty `L2` onto +1 / -1 targets, intercept free.

    Features (N, F) are standardized first. Solved in float64 on the smaller side: N x N or F x F.
    """
    x, queries = (z.double() for z in zscore(x, queries))
    targets = 2 * torch.nn.functional.one_hot(labels, classes).double() - 1
    center = targets.mean(0)
    n, features = x.shape
    eye = torch.eye(min(n, features), dtype=x.dtype, device=x.device)
    if n < features:
        weight = x.T @ torch.linalg.solve(x @ x.T + L2 * eye, targets - center)
    else:
        weight = torch.linalg.solve(x.T @ x + L2 * eye, x.T @ (targets - center))
    return queries @ weight + center
