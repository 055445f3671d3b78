"""The protocols on features: each yields its results with a name, the scaling of the features, and a text that says
what was done. Nothing here sees an image, and each looks at the test labels once, to score."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from manyview.evaluation import fewshot, knn, label_free, linear
from manyview.evaluation.metrics import Score, score
from manyview.evaluation.scaling import zscore, zscore_transductive


@dataclass(frozen=True)
class Problem:
    """Features (N, F) with labels (N,) to learn from, and queries (n, F) with their true labels (n,), on one device."""

    x: Tensor
    labels: Tensor
    queries: Tensor
    truth: Tensor
    classes: int


@dataclass(frozen=True)
class Result:
    protocol: str
    norm: str
    text: str
    score: Score | None = None
    metric: str = ""  # with `value`: a result that is no accuracy
    value: float = 0.0
    seed: int = 0
    scores: Tensor | None = None  # (n, C), for the confusion matrix


def nearest_neighbours(p: Problem, prefix: str = "") -> Iterator[Result]:
    """kNN: cosine-exp at every k that the bank allows, Euclidean inverse-distance on raw and standardized features."""
    ks = [k for k in knn.KS if k <= len(p.x)]
    if ks:
        similarities, ids = knn.neighbours(p.x, p.queries, max(ks))
    for k in ks:
        scores = knn.vote(knn.cosine_weights(similarities[:, :k]), p.labels[ids[:, :k]], p.classes)
        text = f"cosine similarity, {k} neighbours, each votes exp(similarity / {knn.TEMPERATURE})"
        yield Result(
            f"{prefix}knn-cosine-exp k={k}", "l2", text, score(scores, p.truth), scores=scores if k == 20 else None
        )
    if len(p.x) >= 20:
        text = "Euclidean distance, 20 neighbours, each votes 1 / distance"
        for norm, (bank, queries) in {"raw": (p.x, p.queries), "zscore": zscore(p.x, p.queries)}.items():
            scores = knn.euclid_invdist(bank, p.labels, queries, k=20, classes=p.classes)
            yield Result(f"{prefix}knn-euclid-invdist k=20", norm, text, score(scores, p.truth))


def transductive(p: Problem) -> Iterator[Result]:
    """kNN with the test features standardized by their own statistics: uses the whole test set."""
    text = "Euclidean distance, 20 neighbours, 1 / distance; test features standardized with the test set's statistics"
    bank, queries = zscore_transductive(p.x, p.queries)
    scores = knn.euclid_invdist(bank, p.labels, queries, k=20, classes=p.classes)
    yield Result("knn-euclid-invdist k=20 transductive", "zscore-transductive", text, score(scores, p.truth))


def linear_probes(p: Problem, seed: int, epochs: int, prefix: str = "") -> Iterator[Result]:
    """The linear probe with and without BatchNorm, each with the rate chosen on held-out training data and fixed."""
    for bn in (True, False):
        found = linear.sweep(p.x, p.labels, p.queries, p.classes, bn=bn, epochs=epochs, seed=seed)
        norm, where = "bn" if bn else "raw", " (the edge of the grid)" if found.at_edge else ""
        text = (
            f"linear classifier on clean features, SGD, batch {linear.BATCH}, {epochs} epochs; rate {found.rate:g} per 256"
            f" chosen among {len(linear.RATES)} on a tenth of the training data{where}"
        )
        yield Result(f"{prefix}linear-sweep", norm, text, score(found.scores, p.truth), seed=seed,
                     scores=found.scores if bn else None)  # fmt: skip
        text = (
            f"linear classifier on clean features, SGD {linear.PAPER_RATE:g} per 256, batch {linear.BATCH}, {epochs} epochs,"
            f" {linear.WARMUP} of warm-up, cosine to 0, no weight decay"
        )
        yield Result(f"{prefix}linear-paper", norm, text, score(found.paper, p.truth), seed=seed)


def few_shots(p: Problem) -> Iterator[Result]:
    """Ridge regression on 1, 5, 10 and 25 labels a class, three draws each."""
    for n in fewshot.SHOTS:
        for seed in fewshot.SEEDS:
            ids = fewshot.shots(p.labels, n, seed).to(p.x.device)
            scores = fewshot.ridge(p.x[ids], p.labels[ids], p.queries, p.classes)
            text = f"ridge regression (penalty 1024) on {n} label{'s' * (n > 1)} a class: {len(ids)} in all"
            yield Result(f"ridge {n}-shot", "zscore", text, score(scores, p.truth), seed=seed)


def without_labels(x: Tensor) -> Iterator[Result]:
    """RankMe and alpha-ReQ of training features (N, K)."""
    n, k = x.shape
    few = f"; N is below 5 K = {5 * k}, which biases it down" if n < 5 * k else ""
    for centered in (False, True):
        text = f"exp of the entropy of the singular values, {'' if centered else 'not '}centred, eps 1e-7, N = {n}, K = {k}"
        name = "rankme centred" if centered else "rankme"
        yield Result(name, "raw", text + few, metric="rankme", value=label_free.rankme(x, centered=centered))
    alpha = label_free.alpha_req(x)
    text = (
        f"slope of ln eigenvalue on -ln rank, centred, ranks {alpha.first}..{alpha.last} weighted 1 / rank, R2 = "
        f"{alpha.r2:.3f}, N = {n}, K = {k}"
    )
    yield Result("alpha-req", "raw", text + few, metric="alpha", value=alpha.alpha)


def lidar(z: Tensor, policy: str) -> Iterator[Result]:
    """LiDAR of training features (n, q, K)."""
    n, q, k = z.shape
    text = f"rank of between-image over within-image scatter, {n} images x {q} views ({policy}), delta 1e-4, eps 1e-8, K = {k}"
    few = f"; at most {n - 1} with so few images" if n <= k else ""
    yield Result("lidar", "raw", text + few, metric="lidar", value=label_free.lidar(z))


def averaged(p: Problem, seed: int, epochs: int, views: int) -> Iterator[Result]:
    """kNN and the linear probe on features averaged over views: only ever under this name."""
    prefix = f"averaged-{views}-views "
    for result in [*nearest_neighbours(p, prefix), *linear_probes(p, seed, epochs, prefix)]:
        if "k=20" in result.protocol or "linear" in result.protocol:
            text = f"{result.text}; features averaged over 1 clean and {views - 1} augmented views"
            yield Result(result.protocol, result.norm, text, result.score, seed=result.seed)


def overlap(train: Tensor, test: Tensor, threshold: float = 0.999) -> tuple[int, list[int]]:
    """How many test thumbnails (n, D) nearly equal a training one (N, D), and their ids: similarity after centring each."""
    a, b = (t.float() - t.float().mean(1, keepdim=True) for t in (train, test))
    values = knn.neighbours(a, b, 1)[0][:, 0]
    found = torch.nonzero(values >= threshold)[:, 0].tolist()
    return len(found), found
