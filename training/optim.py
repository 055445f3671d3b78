"""Optimizers from torch and timm, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from timm.optim import Lars, Muon
from torch import nn

# Base learning rate and how it grows with the batch, per optimizer. The batch is counted in images, not views, so that
# V alone never changes the rate. lars: Barlow Twins' 0.2-0.3 per 256 images, linear (You et al. 2017, Zbontar et al. 2021);
# sgd: lightly's and solo-learn's 0.06 per 256 on small images, linear; adamw: 1e-3 per 256, square root (Malladi et al. 2022);
# muon: 0.03 whatever the batch, whose gradient only gives the direction (64 and 128 images x 4 views: docs/recipes.md).
RULES = {"lars": (0.3, 1.0), "sgd": (0.06, 1.0), "adamw": (1e-3, 0.5), "muon": (3e-2, 0.0)}
MOMENTUM = 0.9


def learning_rate(name: str, lr: float, batch_size: int) -> tuple[float, str]:
    """The peak learning rate and the sentence that says where it comes from; `lr > 0` is taken as it is."""
    if lr > 0:
        return lr, f"lr {lr:g} (given)"
    base, power = RULES[name]
    if power == 0:
        return base, f"lr {base:g} for {name}, whatever the batch"
    peak = base * (batch_size / 256) ** power
    law = "" if power == 1.0 else f"^{power:g}"
    return peak, f"lr {peak:.4g} = {base:g} x (batch {batch_size} / 256){law} for {name}"


def schedule(peak: float, steps: int, warmup: int, final: float = 0.001) -> Callable[[int], float]:
    """Learning rate of a step: linear warm-up over `warmup` steps, then half a cosine down to `final * peak`.

    Pure: it needs the step alone, so a resumed run has nothing to restore. `warmup=0, final=1` is a constant rate.
    """

    def at(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))

    return at


def create(name: str, module: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer over `module`; weight matrices and kernels alone decay and, under LARS, have a layer-wise rate. torch's
    own are fused: one kernel for all tensors, no host sync under a GradScaler.

    muon: momentum whose matrices are made orthogonal (Jordan 2024), scaled so that an AdamW rate fits (timm's
    `match_rms_adamw`); kernels count as matrices of one row a channel, and AdamW takes what does not decay."""
    weights, others = by_decay(module)
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(MOMENTUM, 0.999), fused=True)
    if name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM, nesterov=True, fused=True)
        # torch would make them uninitialized in the first step, and where the scaler skips that one (fp16's always) use them so.
        for p in [*weights, *others]:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return optimizer
    if name == "muon":
        for group, is_matrix in zip(groups, (True, False)):
            group["use_muon"] = is_matrix
        return Muon(groups, lr=lr, nesterov=True)
    groups[0]["always_adapt"] = True  # else timm's LARS is plain SGD where nothing decays
    return Lars(groups, lr=lr, momentum=MOMENTUM)


def by_decay(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What is trained: weight matrices and kernels, and all the rest, which does not decay.

    The rest are biases, the parameters of norms, layer scales, tokens, position embeddings and biases, and whatever a
    timm network names in its `no_weight_decay()`.
    """
    exempt = [f"{place}.{name}" for place, m in module.named_modules() for name in getattr(m, "no_weight_decay", set)()]
    weights: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in module.named_parameters():
        kept = any(f".{name}.".startswith(f".{place.removeprefix('.')}.") for place in exempt)
        is_weight = p.ndim > 1 and name.endswith("weight") and not kept
        if p.requires_grad:
            (weights if is_weight else others).append(p)
    return weights, others
