"""Which floating-point numbers a run computes with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from manyview.pipeline.errors import UserError

# Processors that multiply bf16 themselves: Intel's with AMX, and those whose AVX-512 can (AMD since Zen 4, Cooper Lake).
# Forward and backward took 1/1.8 to 1/2.6 of fp32's core time with AMX, 1/1.3 to 1/2.0 with AVX-512 (docs/recipes.md).
BF16 = {"amx_bf16", "avx512_bf16"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose(
    name: str, device: torch.device, network: nn.Module, inputs: Sequence[tuple[int, ...]]
) -> tuple[torch.dtype, str]:
    """The autocast dtype and why; `inputs`: shapes (C, S, S) of the views. "auto" asks the hardware and the network and no clock:
    the same machine trains with the same numbers. UserError for bf16 where a processor gets its gradients wrong."""
    on_processor = device.type == "cpu" and name in ("auto", "bf16")
    layer = _strides_over_one_pixel(network, inputs) if on_processor else None
    why = f"in bf16 on a processor PyTorch's gradient of {layer} is wrong, which strides over a single pixel"
    if layer and name == "bf16":
        raise UserError(f"--precision bf16: {why}; take fp32, --stem small or larger views")
    if name != "auto":
        return DTYPES[name], f"{name} (asked for)"
    if on_processor:
        # EfficientNets, MobileNets and such: forward and backward at 96 px took 1.5 and 2 times longer in bf16 on Zen 4
        # (docs/recipes.md). ConvNeXts, which have no batch-norm, are not among them.
        modules = list(network.modules())
        depthwise = any(isinstance(m, nn.Conv2d) and 1 < m.groups == m.in_channels for m in modules)
        unit = next(iter(sorted(BF16 & cpu_features())), None)
        reasons = {
            why: layer,
            "depthwise convolutions and batch-norm are slower in bf16 on a processor": depthwise
            and any(isinstance(m, nn.BatchNorm2d) for m in modules),
            "this processor has neither amx_bf16 nor avx512_bf16": not unit,
        }
        for reason, holds in reasons.items():
            if holds:
                return torch.float32, f"fp32 (auto: {reason})"
        return torch.bfloat16, f"bf16 (auto: this processor has {unit}, which makes it faster than fp32)"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "bf16 (auto: this GPU has it)"
    return torch.float16, "fp16 with a loss scaler (auto: this GPU has no bf16)"


def _strides_over_one_pixel(network: nn.Module, inputs: Sequence[tuple[int, ...]]) -> str | None:
    """The name of a padded convolution with a stride that sees maps of 1 x 1, as in a ResNet with the usual stem at 16 px. There
    torch 2.14's gradient of the weights in bf16 was off by more than 5 % or not finite in two of three tries (AVX-512; without a
    stride, without padding, on 2 x 2 and in fp32 never)."""
    names: list[str] = []

    def look(name: str, module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        if tuple(given[0].shape[-2:]) == (1, 1):
            names.append(name)

    hooks = [
        module.register_forward_pre_hook(partial(look, name))
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and max(module.stride) > 1 and any(module.padding)
    ]
    training, parameter = network.training, next(network.parameters())
    network.eval()
    with torch.no_grad():
        for shape in inputs if hooks else []:
            network(torch.zeros(1, *shape, device=parameter.device))
    network.train(training)
    for hook in hooks:
        hook.remove()
    return names[0] if names else None


def cpu_features() -> set[str]:
    """What the processor says that it can do, in Linux's words; empty where nobody says so."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())
