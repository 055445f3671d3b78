"""Accuracy with an interval: what every protocol turns its scores into."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from sklearn.metrics import average_precision_score
from torch import Tensor


@dataclass(frozen=True)
class Score:
    """Accuracies in 0..1 over `n` test samples; `low`, `high`: 95 % Wilson interval of `top1`."""

    top1: float
    top5: float | None  # None with fewer than 5 classes, where it says nothing
    mean_per_class: float  # over the classes that occur in the test labels
    low: float
    high: float
    n: int


def wilson(correct: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % Wilson interval of a proportion; right also at 0 and 1, where the normal one has no width."""
    if n == 0:
        return 0.0, 1.0
    p = correct / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def score(scores: Tensor, labels: Tensor) -> Score:
    """Scores (N, C), higher is likelier; labels (N,) in 0..C-1. Weighted by samples, not by batches.

    Where the scores are votes or counts (none is negative), a class without one is no answer, whatever its place.
    """
    n, classes = scores.shape
    labels = labels.to(scores.device)
    answered = scores > 0 if bool((scores >= 0).all()) else torch.ones_like(scores, dtype=torch.bool)
    answered = answered.gather(1, labels[:, None])[:, 0]
    hits = (scores.argmax(1) == labels) & answered
    top5 = None
    if classes >= 5:
        among = (scores.topk(5, dim=1).indices == labels[:, None]).any(1)
        top5 = (among & answered).double().mean().item()
    seen = torch.bincount(labels, minlength=classes)
    per_class = torch.bincount(labels[hits], minlength=classes)[seen > 0] / seen[seen > 0].double()
    correct = int(hits.sum())
    low, high = wilson(correct, n)
    return Score(correct / n, top5, per_class.mean().item(), low, high, n)


def average_precision(scores: Tensor, labels: Tensor) -> float:
    """Mean over the classes of the average precision (scikit-learn's) of scores (N, C) for labels (N, C) bool; classes
    that no sample has are left out. NaN scores come last."""
    scores, labels = scores.nan_to_num(-torch.inf).clamp(-1e30, 1e30).cpu(), labels.cpu()
    seen = labels.any(0)
    return float(average_precision_score(labels[:, seen], scores[:, seen], average="macro"))


def quality(scores: Tensor, labels: Tensor) -> float:
    """What a rate is chosen by: top-1 of labels (N,), mean average precision of several labels a sample (N, C)."""
    if labels.ndim == 2:
        return average_precision(scores, labels)
    # A head that diverged has scores that are not finite: it loses.
    return score(scores.nan_to_num(-torch.inf), labels).top1


def confusion(scores: Tensor, labels: Tensor) -> Tensor:
    """Counts (C, C): row = true class, column = predicted class."""
    classes = scores.shape[1]
    return torch.bincount(labels.cpu() * classes + scores.argmax(1).cpu(), minlength=classes**2).view(classes, classes)


def majority(train_labels: Tensor, test_labels: Tensor, classes: int) -> Score:
    """What always answering the most frequent training class scores."""
    counts = torch.bincount(train_labels.cpu(), minlength=classes).double()
    return score(counts.expand(len(test_labels), classes), test_labels.cpu())


def lift(trained: Score, untrained: Score) -> tuple[float, float, float]:
    """Top-1 of one minus the other, with a 95 % interval (Newcombe's, built from the two Wilson intervals)."""
    difference = trained.top1 - untrained.top1
    down = math.hypot(trained.top1 - trained.low, untrained.high - untrained.top1)
    up = math.hypot(trained.high - trained.top1, untrained.top1 - untrained.low)
    return difference, difference - down, difference + up
