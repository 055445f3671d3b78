"""Accuracy with an interval: what every protocol turns its scores into."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Score:
    """Accuracies in 0..1 over `n` test samples; `low`, `high`: 95 % Wilson interval of `top1`."""

    top1: float
    top5: float | None  # None with fewer than 5 classes, where it says nothing
    mean_per_class: float  # balanced accuracy: over the classes that occur in the test labels
    low: float
    high: float
    n: int
    mean_low: float = 0.0  # 95 % interval of `mean_per_class`, from the classes' Wilson intervals (Zou and Donner 2008)
    mean_high: float = 1.0
    detection: tuple[float, float, float] | None = None  # of two classes: `detection` of the rarer one


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
    answered = _answered(scores, labels)
    hits = (scores.argmax(1) == labels) & answered
    top5 = None
    if classes >= 5:
        among = (scores.topk(5, dim=1).indices == labels[:, None]).any(1)
        top5 = (among & answered).double().mean().item()
    seen, right = (torch.bincount(some, minlength=classes).tolist() for some in (labels, labels[hits]))
    correct = int(hits.sum())
    low, high = wilson(correct, n)
    mean, mean_low, mean_high = _per_class(right, seen)
    rare = detection(scores, labels, rarer(labels)) if classes == 2 and min(seen) else None
    return Score(correct / n, top5, mean, low, high, n, mean_low, mean_high, rare)


def _answered(scores: Tensor, labels: Tensor) -> Tensor:
    """(N,) bool: whether a sample's true class had any vote, where scores are votes."""
    answered = scores > 0 if bool((scores >= 0).all()) else torch.ones_like(scores, dtype=torch.bool)
    return answered.gather(1, labels[:, None])[:, 0]


def _per_class(right: list[int], seen: list[int]) -> tuple[float, float, float]:
    """The mean over the classes that occur of the share that is right, and its interval."""
    each = [(r / n, *wilson(r, n)) for r, n in zip(right, seen) if n]
    mean = math.fsum(p for p, _, _ in each) / len(each)
    down, up = (math.hypot(*(p - row[i] for p, *row in each)) / len(each) for i in (0, 1))
    return mean, mean - down, mean + up


def average_precision(scores: Tensor, labels: Tensor) -> float:
    """Mean over the classes of the average precision (scikit-learn's) of scores (N, C) for labels (N, C) bool; classes
    that no sample has are left out. NaN scores come last."""
    from sklearn.metrics import average_precision_score  # here: a second and a half that training can do without

    scores, labels = scores.nan_to_num(-torch.inf).clamp(-1e30, 1e30).cpu(), labels.cpu()
    seen = labels.any(0)
    return float(average_precision_score(labels[:, seen], scores[:, seen], average="macro"))


def rarer(labels: Tensor) -> int:
    """Which of two classes has fewer of these labels (N,): what there is to be detected."""
    return int(2 * int(labels.sum()) <= len(labels))


RESAMPLES, AT_ONCE = 500, 2**22  # of the bootstrap: how many, and how many numbers of them are held in memory


def detection(scores: Tensor, labels: Tensor, positive: int) -> tuple[float, float, float]:
    """Average precision (scikit-learn's: equal scores are one step) of the class `positive` of two, and its 95 % interval by
    bootstrap over the samples. Scores (N, 2) as of `score`: votes count by their share; labels (N,)."""
    s = scores.double().nan_to_num(-torch.inf).clamp(-1e30, 1e30).cpu().numpy()
    ahead = s[:, positive] - s[:, 1 - positive]
    if (s >= 0).all():  # equal shares stay equal, whatever they were rounded from
        ahead = np.round(ahead / np.maximum(s.sum(1), 1e-300), 9)
    order = np.argsort(-ahead, kind="stable")
    ahead, is_positive = ahead[order], labels.cpu().numpy()[order] == positive
    ends = np.flatnonzero(np.append(ahead[1:] != ahead[:-1], True))  # of each step

    def precision(counts: np.ndarray) -> np.ndarray:  # (R, N) -> (R,)
        hits, seen = (np.cumsum(c, 1)[:, ends].astype(float) for c in (counts * is_positive, counts))
        return (np.diff(hits, axis=1, prepend=0) * hits / np.maximum(seen, 1)).sum(1) / np.maximum(hits[:, -1], 1)

    n, random, precisions = len(order), np.random.default_rng(0), []
    for part in np.array_split(np.arange(RESAMPLES), -(-RESAMPLES * n // AT_ONCE)):
        places = random.integers(n, size=(len(part), n)) + n * np.arange(len(part))[:, None]
        precisions.append(precision(np.bincount(places.ravel(), minlength=places.size).reshape(places.shape)))
    low, high = np.quantile(np.concatenate(precisions), (0.025, 0.975))
    return float(precision(np.ones((1, n), np.int64))[0]), float(low), float(high)


def quality(scores: Tensor, labels: Tensor) -> float:
    """What a rate is chosen by: top-1 of labels (N,), mean average precision of several labels a sample (N, C)."""
    if labels.ndim == 2:
        return average_precision(scores, labels)
    # A head that diverged has scores that are not finite: it loses.
    scores = scores.nan_to_num(-torch.inf)
    return ((scores.argmax(1) == labels) & _answered(scores, labels)).double().mean().item()


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
