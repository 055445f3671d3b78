"""The evaluation's kNN and linear probes of any callable."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manyview.api import Batch, Views
from manyview.evaluation import protocols
from manyview.evaluation.metrics import Score
from manyview.pipeline.errors import UserError


def probe(
    encoder: Callable[[Tensor], Tensor],
    train: str | Path | Iterable,
    test: str | Path | Iterable | None = None,
    *,
    epochs: int = 100,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Score]:
    """The evaluation's kNN and linear probes of any frozen `encoder`: (N, 3, S, S) -> (N, F).

    train, test: folders of shards (their train and val splits as clean views; by default both of one folder), `Views` of one
    view, or any batches of (images, labels). `settings` of folders go to `Views`: size, mean, std, batch_size, device. Without
    them test images are prepared as the training images are. What has no label is left out. `epochs` are the linear probes'.
    Returns each protocol's score under the name that `eval.json` has for it.
    """
    if isinstance(train, str | Path):
        train = Views(train, split="train", shuffle=False, **settings)
        test = train.store.path if test is None else test
        settings = {"size": train.size, "mean": train.mean, "std": train.std} | settings
    if isinstance(test, str | Path):
        test = Views(test, split="val", shuffle=False, **settings)
    elif test is None:
        raise UserError("probe: batches to learn from, but none to test on")
    x, labels = _features(encoder, train)
    queries, truth = _features(encoder, test)
    if not len(x) or not len(queries):
        raise UserError(f"probe: {len(x)} training images and {len(queries)} test images have a label")
    problem = protocols.Problem(x, labels, queries, truth, int(max(labels.max(), truth.max())) + 1)
    results = [*protocols.nearest_neighbours(problem), *protocols.linear_probes(problem, seed, epochs)]
    return {f"{result.protocol} {result.norm}": result.score for result in results if result.score}


@torch.no_grad()
def _features(encoder: Any, data: Iterable) -> tuple[Tensor, Tensor]:
    """(N, F) float32 and (N,) of what has a label, on the encoder's device; the encoder is in evaluation mode meanwhile."""
    module = encoder if isinstance(encoder, nn.Module) else nn.Identity()
    device = next((parameter.device for parameter in module.parameters()), None)
    training = [part for part in module.modules() if part.training]
    features, labels = [], []
    module.eval()
    try:
        for batch in data:
            images, classes = (batch.views[0], batch.labels) if isinstance(batch, Batch) else batch[:2]
            features.append(encoder(images.to(device)).float().flatten(1))
            labels.append(torch.as_tensor(classes))
    finally:
        for part in training:
            part.training = True
    x, y = torch.cat(features), torch.cat(labels).to(features[0].device)
    return x[y >= 0], y[y >= 0]
