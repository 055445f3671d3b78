"""Ways to scale features before a probe. A number is only comparable with one of the same scaling, so each is named."""

from __future__ import annotations

import torch
from torch import Tensor

TEXT = {
    "raw": "features as they leave the network",
    "zscore": "each dimension standardized with the training features' mean and deviation",
    "l2": "each feature divided by its length",
    "bn": "a trainable BatchNorm before the classifier",
    "zscore-transductive": "training and test features standardized each with their own statistics (uses the test set)",
}


def zscore(train: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Standardize (N, F) features with the mean and deviation of `train`; a constant dimension is only centred."""
    mean, std = train.mean(0), train.std(0, correction=0)
    # A dimension that is constant up to rounding has no scale of its own: dividing by it would amplify noise.
    std = torch.where(std > 1e-6 * train.abs().amax(0), std, 1.0)
    return tuple((x - mean) / std for x in (train, *others))


def zscore_transductive(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Each split with its own statistics. Looks at the whole test set, so it is never a headline."""
    return zscore(train)[0], zscore(test)[0]
