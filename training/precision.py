"""Which floating-point numbers a run computes with."""

from __future__ import annotations

from pathlib import Path

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The autocast dtype and why. "auto" asks the hardware and no clock: the same machine trains with the same numbers."""
    if name != "auto":
        return DTYPES[name], f"{name} (asked for)"
    if device.type == "cpu":
        if "amx_bf16" in cpu_features():
            return torch.bfloat16, "bf16 (auto: this processor has AMX, which makes it about twice as fast as fp32)"
        return torch.float32, "fp32 (auto: this processor has no AMX, and without it bf16 is slower on most)"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "bf16 (auto: this GPU has it)"
    return torch.float16, "fp16 with a loss scaler (auto: this GPU has no bf16)"


def cpu_features() -> set[str]:
    """What the processor says that it can do, in Linux's words; empty where nobody says so."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())
