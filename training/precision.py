"""Which floating-point numbers a run computes with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

# Processors that multiply bf16 themselves: Intel's with AMX, and those whose AVX-512 can (AMD since Zen 4, Cooper Lake).
# Forward and backward took 1/1.8 to 1/2.6 of fp32's core time with AMX, 1/1.3 to 1/2.0 with AVX-512 (docs/recipes.md).
BF16 = {"amx_bf16", "avx512_bf16"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose(name: str, device: torch.device, network: nn.Module) -> tuple[torch.dtype, str]:
    """The autocast dtype and why. "auto" asks the hardware and the network and no clock: the same machine trains with the same
    numbers."""
    if name != "auto":
        return DTYPES[name], f"{name} (asked for)"
    if device.type == "cpu":
        if _depthwise(network):
            return torch.float32, "fp32 (auto: depthwise convolutions and batch-norm are slower in bf16 on a processor)"
        if unit := sorted(BF16 & cpu_features()):
            return torch.bfloat16, f"bf16 (auto: this processor has {unit[0]}, which makes it faster than fp32)"
        return torch.float32, "fp32 (auto: this processor has neither amx_bf16 nor avx512_bf16)"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "bf16 (auto: this GPU has it)"
    return torch.float16, "fp16 with a loss scaler (auto: this GPU has no bf16)"


def _depthwise(network: nn.Module) -> bool:
    """EfficientNets, MobileNets and such: forward and backward at 96 px took 1.5 and 2 times longer in bf16 on Zen 4
    (docs/recipes.md). ConvNeXts, which have no batch-norm, are not among them."""
    modules = list(network.modules())
    single = any(isinstance(m, nn.Conv2d) and 1 < m.groups == m.in_channels for m in modules)
    return single and any(isinstance(m, nn.BatchNorm2d) for m in modules)


def cpu_features() -> set[str]:
    """What the processor says that it can do, in Linux's words; empty where nobody says so."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())
