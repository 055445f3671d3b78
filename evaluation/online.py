"""Watching a run: probes on frozen features, and the signs of collapse.

The probes use images of the training split only (the test split is read by tools/evaluate.py, once a report): a bank
with labels, and queries whose labels are held out. They show the trend; they are not the published number.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor, nn

from manyview.evaluation import knn, label_free, linear
from manyview.pipeline.engines.cpu import CPUEngine
from manyview.pipeline.loader import clean_views, normalize
from manyview.pipeline.store import Store

BANK, QUERIES = 4000, 1000
PIXEL_BUDGET = 2**28  # bytes of pixels kept for the whole run


class Probe:
    """kNN (cosine, k = 20, T = 0.07) and a quick linear probe on a fixed, seeded sample of training images.

    Pixels are decoded once and kept. The backbone is put in eval mode and back: no parameter, buffer or gradient moves.
    """

    def __init__(self, store: Store, size: int, seed: int):
        affordable = PIXEL_BUDGET // (store.layout.bytes * size * size)
        n = min(BANK + QUERIES, len(store), affordable)
        ids = np.random.Generator(np.random.Philox(key=seed)).permutation(len(store))[:n]
        engine = CPUEngine(store)
        views = [clean_views(store, engine, size, ids[i : i + 256]) for i in range(0, n, 256)]
        engine.close()
        self.pixels = [pixels for _, pixels in views]
        ids = np.concatenate([readable for readable, _ in views])
        self.labels = torch.from_numpy(store.labels[ids])
        wanted, n = n, len(ids)
        self.bank = n * BANK // (BANK + QUERIES)
        self.classes = len(store.classes)
        self.labelled = bool((self.labels >= 0).all()) and self.classes > 1 and self.bank >= 20
        self.mean, self.std = store.mean, store.std
        self.text = f"{self.bank} training images as bank, {n - self.bank} as queries"
        self.text += f", {wanted - n} unreadable left out" if wanted > n else ""
        if self.labelled:
            guess = self.labels[: self.bank].mode().values
            self.text += f", majority class {(self.labels[self.bank :] == guess).float().mean():.2%}"
        self.eigenvalues: np.ndarray | None = None

    def __call__(self, backbone: nn.Module, autocast: Callable[[], AbstractContextManager]) -> dict[str, float]:
        """{"knn": …, "linear": …} as shares of 1; empty without labels. Also leaves the features' `eigenvalues`.

        Where features are not finite there are neither scores nor eigenvalues.
        """
        device = next(backbone.parameters()).device
        training = backbone.training
        backbone.eval()
        with torch.no_grad(), autocast():
            views = (normalize(p.to(device), self.mean, self.std, torch.float32) for p in self.pixels)
            z = torch.cat([backbone(view).float() for view in views])
        backbone.train(training)
        if not torch.isfinite(z).all():
            self.eigenvalues = None
            return {}
        self.eigenvalues = label_free.eigenspectrum(z).cpu().numpy()
        if not self.labelled:
            return {}
        labels = self.labels.to(device)
        (bank, queries), (bank_labels, query_labels) = ((x[: self.bank], x[self.bank :]) for x in (z, labels))
        votes = knn.cosine_exp(bank, bank_labels, queries, k=20, classes=self.classes)
        return {
            "knn": float((votes.argmax(1) == query_labels).float().mean()),
            "linear": linear.quick(bank, bank_labels, queries, query_labels, self.classes),
        }


def collapse(z: Tensor) -> tuple[float, float]:
    """Effective rank and median standard deviation of the dimensions of embeddings (B, D).

    Effective rank: exp of the entropy of the covariance's normalized eigenvalues (Roy & Vetterli 2007); 1 = a line.
    NaN where z is not finite.
    """
    z = z.float()
    spread = float(z.std(0).median())
    if not torch.isfinite(z).all():
        return float("nan"), spread
    return label_free.effective_rank(label_free.eigenspectrum(z), eps=1e-12), spread
