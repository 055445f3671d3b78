"""Linear probes on cached features: many learning rates at once, with or without a BatchNorm in front.

All heads see the same batches and start from the same weights, so a head in a pack ends where it would alone.
The heads lie in one tensor, so 13 of them are one matrix product a step and one more for the gradient.

Presets
`paper`   Knott et al. 2024: SGD 0.1 per 256, batch 1024, momentum 0.9, weight decay 0, 100 epochs, 5 of them warm-up,
          cosine to 0 by epoch; no gradient clipping (their code clips at 0.5 without saying so)
`sweep`   the same at 13 rates from 0.001 to 10; the rate is chosen on a tenth of the training data held out (see
          `choose`), the chosen head is trained again on all of it, and the test set is scored once
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from manyview.evaluation.metrics import quality, score
from manyview.pipeline.errors import UserError

RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
PAPER_RATE = 0.1
BATCH = 1024
EPOCHS = 100
WARMUP = 5
MOMENTUM = 0.9
EPS = 1e-5


@dataclass
class Heads:
    """H linear classifiers of F features into C classes.

    Features are the last axis everywhere, so that the products, the softmax and the updates run along memory.
    """

    weight: Tensor  # (H, C, F)
    bias: Tensor  # (H, C, 1)
    # With BatchNorm: each head has its own scale and shift (H, 1, F); the running statistics (F,) are shared.
    scale: Tensor | None = None
    shift: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None

    def scores(self, x: Tensor) -> Tensor:
        """Logits (H, N, C) of features (N, F), in evaluation mode."""
        return self._logits(x, self.mean, self.var).transpose(1, 2)

    def _logits(self, x: Tensor, mean: Tensor | None, var: Tensor | None) -> Tensor:
        """(H, C, N). BatchNorm is folded into the weights: there are fewer of them than features in a batch."""
        weight, bias = self.weight, self.bias
        if self.scale is not None and self.shift is not None and mean is not None and var is not None:
            slope = self.scale * (var + EPS).rsqrt()
            bias = bias + (weight * (self.shift - mean * slope)).sum(2, keepdim=True)
            weight = weight * slope
        return torch.addmm(bias.flatten(0, 1), weight.flatten(0, 1), x.T).view(*bias.shape[:2], len(x))

    def gradients(self, x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Of each head's mean loss on a batch (B, F), in the order of `parameters()`: cross-entropy of labels (B,), or of
        each class by itself for several labels a sample (B, C) bool.

        As BatchNorm does in training, uses the batch's statistics and moves the running ones a tenth of the way.
        `x` must be centred on the whole set: then the mean of squares has the digits that the variance needs.
        """
        mean = var = None
        if self.mean is not None and self.var is not None:
            mean = x.mean(0)
            var = (x.square().mean(0) - mean.square()).clamp_min(0)
            self.mean.lerp_(mean, 0.1)
            self.var.lerp_(var * len(x) / (len(x) - 1), 0.1)
        with torch.enable_grad():  # the probe of a running training is called without
            parameters = [p.requires_grad_() for p in self.parameters()]
            logits = self._logits(x, mean, var)  # (H, C, B)
            if labels.ndim == 1:
                loss = F.cross_entropy(logits, labels.expand(len(logits), -1), reduction="sum")
            else:
                truth = labels.T.to(logits.dtype).expand_as(logits)
                loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum")
            gradients = torch.autograd.grad(loss / len(x), parameters)
        for parameter in parameters:
            parameter.requires_grad_(False)
        return gradients

    def parameters(self) -> list[Tensor]:
        return [p for p in (self.weight, self.bias, self.scale, self.shift) if p is not None]


def create(features: int, heads: int, classes: int, *, bn: bool, seed: int, device: torch.device | str) -> Heads:
    """Weights from N(0, 0.01), the same for every head; biases zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.01 * torch.randn(classes, features, generator=generator)
    stack = Heads(weight.expand(heads, -1, -1).contiguous().to(device), torch.zeros(heads, classes, 1, device=device))
    if bn:
        stack.scale = torch.ones(heads, 1, features, device=device)
        stack.shift = torch.zeros_like(stack.scale)
        stack.mean, stack.var = torch.zeros(features, device=device), torch.ones(features, device=device)
    return stack


def schedule(epoch: int, epochs: int, warmup: int = WARMUP) -> float:
    """The share of the peak rate in an epoch (from 0): linear warm-up to the peak, then cosine to 0."""
    if epoch < warmup:
        return (epoch + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(1, epochs - warmup)))


def train(
    x: Tensor, labels: Tensor, classes: int, *, rates: tuple[float, ...], bn: bool, epochs: int = EPOCHS,
    warmup: int = WARMUP, batch: int = BATCH, seed: int = 0,
) -> Heads:  # fmt: skip
    """One head per learning rate (per 256 samples of a batch) on features (N, F) and labels (N,), or (N, C) bool."""
    if len(x) < 2:
        raise UserError(f"a linear probe needs at least 2 labelled training samples, but there are {len(x)}")
    heads = create(x.shape[1], len(rates), classes, bn=bn, seed=seed, device=x.device)
    # BatchNorm does not see a constant offset, but folding it into the weights would lose digits to a large one.
    offset = x.mean(0) if bn else torch.zeros(1, device=x.device)
    x = x - offset if bn else x
    batches = math.ceil(len(x) / batch)
    # Batches of equal size to within one: a last batch of one sample would have no BatchNorm statistics. The rates are
    # scaled by what a batch then holds.
    peak = torch.tensor(rates, device=x.device)[:, None, None] * len(x) / batches / 256
    momentum = [torch.zeros_like(p) for p in heads.parameters()]
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        rate = peak * schedule(epoch, epochs, warmup)
        for ids in torch.randperm(len(x), generator=generator).to(x.device).tensor_split(batches):
            # On the CPU index_select copies whole rows, where x[ids] goes number by number.
            gradients = heads.gradients(x.index_select(0, ids), labels[ids])
            for p, m, g in zip(heads.parameters(), momentum, gradients):
                p.sub_(m.mul_(MOMENTUM).add_(g) * rate)
    if heads.mean is not None:
        heads.mean += offset
    return heads


def held_out(labels: Tensor, seed: int) -> Tensor:
    """(N,) bool: a seeded tenth of every class (at least one of two samples); of all where each has several labels (N, C)."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    labels = labels if labels.ndim == 1 else torch.zeros(len(labels), dtype=torch.long)
    for c in labels.unique().tolist():
        ids = (labels.cpu() == c).nonzero()[:, 0]
        count = min(max(1, round(0.1 * len(ids))), len(ids) - 1)
        mask[ids[torch.randperm(len(ids), generator=generator)[:count]]] = True
    return mask.to(labels.device)


@dataclass(frozen=True)
class Probe:
    scores: Tensor  # (n, C) of the test samples
    rate: float
    held_out: tuple[float, ...]  # top-1 (or mean average precision) of every rate on the held-out training data
    paper: Tensor  # (n, C): scores of the preset `paper`, trained in the same pass

    @property
    def at_edge(self) -> bool:
        return self.rate in (RATES[0], RATES[-1])


def sweep(
    x: Tensor, labels: Tensor, queries: Tensor, classes: int, *, bn: bool, epochs: int = EPOCHS, seed: int = 0
) -> Probe:
    """Both presets for training features (N, F) with labels (N,) and test features (n, F), on the features' device.

    Sees no test label.
    """
    out = held_out(labels, seed)
    if not out.any():
        raise UserError("the learning-rate sweep needs at least 2 labelled training samples in some class")
    heads = train(x[~out], labels[~out], classes, rates=RATES, bn=bn, epochs=epochs, seed=seed)
    accuracies = tuple(quality(scores, labels[out]) for scores in heads.scores(x[out]))
    rate = choose(accuracies)
    scores = train(x, labels, classes, rates=(rate, PAPER_RATE), bn=bn, epochs=epochs, seed=seed).scores(queries)
    return Probe(scores[0], rate, accuracies, scores[1])


def choose(accuracies: tuple[float, ...]) -> float:
    """The rate whose accuracy, averaged with its neighbours' in the grid, is best; the smaller of equal ones.

    A tenth of a small training set is a noisy judge: alone it may pick a rate at the edge of divergence.
    """
    means = [math.fsum(a) / len(a) for a in (accuracies[max(0, i - 1) : i + 2] for i in range(len(accuracies)))]
    return RATES[means.index(max(means))]


def quick(x: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor, classes: int) -> float:
    """Top-1 of one BatchNorm probe at the paper's rate: for the curve during training, not for a table."""
    heads = train(x, labels, classes, rates=(PAPER_RATE,), bn=True, epochs=20, batch=256)
    return score(heads.scores(queries)[0], query_labels).top1
