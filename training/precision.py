"""Which floating-point numbers a run computes with."""

from __future__ import annotations

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The autocast dtype and why."""
    if name != "auto":
        return DTYPES[name], f"{name} (asked for)"
    if device.type == "cpu":
        return torch.float32, "fp32 (auto: bf16 is slower than fp32 on most CPUs)"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "bf16 (auto: this GPU has it)"
    return torch.float16, "fp16 with a loss scaler (auto: this GPU has no bf16)"
