"""Fine-tuning of the whole network, on few labels or all: SGD, momentum 0.9, no weight decay, cosine to 0 by epoch.

Crops and flips only. The headline is the last epoch: the test set is scored once, after it.
ViTs get layer decay 0.65, label smoothing 0.1 and drop path 0.2; ResNets none of them (Knott et al. 2024).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from manyview.evaluation.encoder import Encoder, Layers
from manyview.evaluation.features import CLEAN, forward, pixels_of, result
from manyview.evaluation.linear import MOMENTUM, schedule
from manyview.pipeline.errors import UserError
from manyview.pipeline.loader import normalize
from manyview.pipeline.store import Store
from manyview.pipeline.views import Group, Policy, parameters

LAYER_DECAY, SMOOTHING, DROP_PATH = 0.65, 0.1, 0.2


@dataclass(frozen=True)
class Preset:
    """Learning rates per 256 samples a step. `batch` in samples."""

    backbone_rate: float
    head_rate: float
    epochs: int
    warmup: int = 0
    batch: int = 256


PRESETS = {
    "byol2": Preset(0.1, 0.1, 30),
    "byol1": Preset(0.01, 0.01, 30),
    "swav-1%": Preset(0.02, 5.0, 20),
    "swav-10%": Preset(0.01, 0.2, 20),
    "barlowtwins": Preset(0.005, 0.5, 20),  # as its own README; the benchmarking code has the two swapped
    "full": Preset(0.1, 0.1, 100, 5),
}


class Classifier(nn.Module):
    """Backbone, a BatchNorm if asked for, and a linear head from N(0, 0.01)."""

    def __init__(self, backbone: nn.Module, features: int, classes: int, *, bn: bool, seed: int):
        super().__init__()
        self.backbone = backbone
        self.norm = nn.BatchNorm1d(features) if bn else nn.Identity()
        self.head = nn.Linear(features, classes)
        with torch.no_grad():
            self.head.weight.copy_(0.01 * torch.randn(classes, features, generator=torch.Generator().manual_seed(seed)))
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.backbone(x)))


def classifier(encoder: Encoder, classes: int, *, bn: bool, seed: int) -> Classifier:
    """A trainable copy of the encoder with a head; a ViT gets its drop path. The encoder itself is left alone."""
    module = copy.deepcopy(encoder.module).requires_grad_(True)
    # A copy that shares no statistics: the width is asked of it in evaluation mode, so that BatchNorm sees nothing.
    with torch.no_grad():
        features = module.eval()(encoder.no_image.to(next(module.parameters()).device)).shape[1]
    check(module)
    blocks: Any = module.blocks if is_vit(module) else ()
    for i, block in enumerate(blocks):  # rising linearly from 0 over the blocks, as timm sets it at construction
        for name in filter(partial(hasattr, block), DROP_PATHS):
            setattr(block, name, DropPath(DROP_PATH * i / max(1, len(blocks) - 1)))
    return Classifier(module, features, classes, bn=bn, seed=seed)


def is_vit(module: nn.Module) -> bool:
    return hasattr(module, "blocks") and hasattr(module, "patch_embed")


DROP_PATHS = ("drop_path1", "drop_path2", "drop_path")


def check(module: nn.Module) -> None:
    """UserError where fine-tuning does not know this network."""
    if isinstance(module, Layers):
        raise UserError(
            f"fine-tuning takes the network's own output, not {module.spec}: leave out --layers, or fewshot and full"
        )
    for block in module.blocks if is_vit(module) else ():  # type: ignore[union-attr]
        if not any(hasattr(block, name) for name in DROP_PATHS):
            raise UserError(
                f"{type(block).__name__} has no place for drop path: fine-tuning does not know this network"
            )


def groups(model: Classifier, preset: Preset, total: float) -> list[dict]:
    """Optimizer groups for `total` samples a step: each trainable parameter in exactly one, with its own peak rate.

    timm says which layer of a ViT a parameter is of (the final norm: of the last block); layer l of L has 0.65^(L + 1 - l).
    """
    trunk: Any = model.backbone
    rate = preset.backbone_rate * total / 256
    if is_vit(trunk):
        layers = param_groups_layer_decay(trunk, weight_decay=0.0, layer_decay=LAYER_DECAY)
        last = {id(p) for p in trunk.blocks[-1].parameters()}
        scale = next(g["lr_scale"] for g in layers if any(id(p) in last for p in g["params"]))
        peaks = [(g["params"], rate * LAYER_DECAY * g["lr_scale"] / scale) for g in layers]
    else:
        peaks = [(list(trunk.parameters()), rate)]
    peaks.append(([*model.norm.parameters(), *model.head.parameters()], preset.head_rate * total / 256))
    return [{"params": parameters, "lr": peak, "peak": peak} for parameters, peak in peaks]


def train(
    encoder: Encoder, store: Store, ids: np.ndarray, classes: int, engine: Any, preset: Preset, *,
    bn: bool = False, seed: int = 0, device: str | torch.device = "cpu",
) -> Classifier:  # fmt: skip
    """Fine-tune on these samples for `preset.epochs` passes; returns the network of the last one, in eval mode."""
    model = classifier(encoder, classes, bn=bn, seed=seed).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    total = len(ids) / math.ceil(len(ids) / preset.batch)  # of batches that are equal to within one
    optimizer = torch.optim.SGD(groups(model, preset, total), momentum=MOMENTUM)
    smoothing = SMOOTHING if is_vit(model.backbone) else 0.0
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=torch.device(device).type == "cuda")
    labels = torch.tensor(np.asarray(store.labels, np.int64))
    model.train()
    for epoch, chosen, images in _batches(encoder, store, ids, engine, preset, seed):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(epoch, preset.epochs, preset.warmup)
        x = normalize(images.to(device), encoder.mean, encoder.std, torch.float32)
        with autocast:
            logits = model(x.contiguous(memory_format=torch.channels_last))
        F.cross_entropy(logits.float(), labels[chosen].to(device), label_smoothing=smoothing).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def _batches(
    encoder: Encoder, store: Store, ids: np.ndarray, engine: Any, preset: Preset, seed: int
) -> Iterator[tuple[int, np.ndarray, Tensor]]:
    """(epoch, ids, images (B, C, S, S)), the next batch under way while one is used."""
    policy = Policy("finetune", (Group(1, encoder.image_size, jitter=0.0, grey=0.0),))
    # Of equal size to within one: a last batch of a single sample would have no BatchNorm statistics.
    count = math.ceil(len(ids) / preset.batch)
    generator = np.random.default_rng(seed)
    waiting: list[tuple] = []

    def ready(epoch: int, chosen: np.ndarray, pending: Any) -> tuple[int, np.ndarray, Tensor]:
        return epoch, chosen, result(pending, store)[0]

    for epoch in range(preset.epochs):
        for chosen in np.array_split(generator.permutation(ids), count):
            epochs, heights, widths = np.full(len(chosen), epoch), store.heights[chosen], store.widths[chosen]
            crops = parameters(policy, seed, epochs, chosen, heights, widths)
            waiting.append((epoch, chosen, engine.submit(chosen, crops)))
            if len(waiting) > 1:
                yield ready(*waiting.pop(0))
    yield from (ready(*one) for one in waiting)


@torch.inference_mode()
def predict(
    model: Classifier, encoder: Encoder, store: Store, ids: np.ndarray, engine: Any, *,
    batch: int = 256, device: str | torch.device = "cpu",
) -> Tensor:  # fmt: skip
    """Scores (n, C) of these samples' clean views, in evaluation mode, on the CPU."""
    tuned = replace(encoder, module=model.eval())
    images = pixels_of(tuned, store, np.array_split(ids, math.ceil(len(ids) / batch)), engine, CLEAN)
    return torch.cat([forward(tuned, x, device)[:, 0] for x in images])
