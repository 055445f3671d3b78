"""Which part of a network the features are: its own pooled output, earlier layers, several of the last, or all tokens."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from manyview.pipeline.errors import UserError

if TYPE_CHECKING:
    from manyview.evaluation.encoder import Encoder

TEXT = "pooled, last:N (the last N blocks or stages, concatenated), layer:N (one, counted from 0) or tokens"


class Layers(nn.Module):
    """(N, C, S, S) -> (N, F), or (N, T, F) for `tokens`, from a network of timm.

    Of a ViT a block is its class token after the final norm (the mean of its tokens where it has none), as DINO's linear
    probe takes them; of other networks a stage is the mean over its map.
    """

    def __init__(self, network: Any, spec: str):
        super().__init__()
        self.network, self.spec = network, spec

    def forward(self, x: Tensor) -> Tensor:
        kind, _, number = self.spec.partition(":")
        if kind == "tokens":
            y = self.network.forward_features(x)
            return y.flatten(2).mT if y.ndim == 4 else y
        wanted: Any = int(number) if kind == "last" else [int(number)]
        if hasattr(self.network, "num_prefix_tokens"):
            blocks = self.network.forward_intermediates(
                x, indices=wanted, norm=True, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
            )
            pairs = [block if isinstance(block, tuple) else (block, block[:, :0]) for block in blocks]
            return torch.cat([own[:, 0] if own.shape[1] else patches.mean(1) for patches, own in pairs], 1)
        maps = self.network.forward_intermediates(x, indices=wanted, intermediates_only=True)
        return torch.cat([y.mean((2, 3)) for y in maps], 1)


def select(encoder: Encoder, spec: str) -> Encoder:
    """The encoder whose features are what `spec` says. UserError for an unknown `spec`, or a network without such layers."""
    if spec == "pooled":
        return encoder
    if not re.fullmatch(r"tokens|last:[1-9]\d*|layer:\d+", spec):
        raise UserError(f"unknown layers {spec!r}; valid: {TEXT}")
    module = Layers(encoder.module, spec).eval()
    try:
        with torch.inference_mode():
            module(encoder.no_image)
    except (AttributeError, AssertionError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{encoder.run} ({encoder.backbone}) has no {spec}: {str(error).splitlines()[0][:100]}"
        ) from None
    fresh = encoder.fresh
    return replace(encoder, module=module, fresh=partial(_fresh, fresh, spec), layers=spec)


def _fresh(fresh: Any, spec: str) -> nn.Module:
    return Layers(fresh(), spec)
