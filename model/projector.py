"""The projector: a small head that the objective sees and that is thrown away after pretraining."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


class Projector(nn.Sequential):
    """Linear - BatchNorm - ReLU - Linear: (N, in_features) -> (N, dim). `hidden` None is `dim`, as in the paper.

    Neither Linear has a bias: the BatchNorm takes the first one's, and every objective the second one's, by
    subtracting the batch mean or comparing views.
    """

    def __init__(self, in_features: int, dim: int = 256, hidden: int | None = None) -> None:
        hidden = hidden or dim
        super().__init__(
            nn.Linear(in_features, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, dim, bias=False),
        )


class Cost(NamedTuple):
    """Parameters, and floating-point operations of one view forward, of a backbone and of its projector."""

    backbone_parameters: int
    projector_parameters: int
    backbone_flops: int
    projector_flops: int


def cost(backbone: nn.Module, projector: nn.Module, image_size: int) -> Cost:
    """Counted on the meta device with the size given (pixels): takes no memory and leaves both modules alone."""
    # Two rows, since a BatchNorm1d in training mode wants more than one.
    channels = getattr(backbone, "channels", 3)
    features, of_backbone = _forward(backbone, torch.empty(2, channels, image_size, image_size, device="meta"))
    _, of_projector = _forward(projector, features)
    return Cost(_parameters(backbone), _parameters(projector), of_backbone // 2, of_projector // 2)


def _forward(module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    module = copy.deepcopy(module).to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        y = module(x)
    return y, counter.get_total_flops()


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def describe(backbone: nn.Module, projector: Projector, image_size: int) -> str:
    """`projector 512-256-256: 0.20 M parameters (1.7 % of the model's), 0.04 % of its FLOPs`."""
    c = cost(backbone, projector, image_size)
    sizes = f"{projector[0].in_features}-{projector[0].out_features}-{projector[3].out_features}"
    parameters = c.projector_parameters / (c.backbone_parameters + c.projector_parameters)
    flops = c.projector_flops / (c.backbone_flops + c.projector_flops)
    return (
        f"projector {sizes}: {c.projector_parameters / 1e6:.2f} M parameters ({parameters:.1%} of the model's), "
        f"{flops:.2%} of its FLOPs"
    )
