"""Engines turn ids and parameters into pixels; `create` picks one."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from manyview.pipeline.errors import UserError, nearest
from manyview.pipeline.store import Store

NAMES = ("auto", "cpu", "dali", "resident")
SMALL = 96  # pixels a side up to which dense resize matrices beat reading and decoding
SHARE = 0.25  # of the device's free memory that resident pixels may take
INSTALL = "pip install nvidia-dali-cuda130 (drivers before 580: nvidia-dali-cuda120)"


def device_of(name: str) -> torch.device:
    """The device of this name: cpu, cuda, or `auto`, which is the GPU where there is one. UserError if there is no such."""
    if name.partition(":")[0] not in ("auto", "cpu", "cuda"):
        raise UserError(nearest("device", name, ("auto", "cpu", "cuda")))
    wanted = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if wanted != "cpu" and not torch.cuda.is_available():
        raise UserError(
            f"--device {name}: torch sees no CUDA device; use --device cpu, or install a driver that fits this torch"
        )
    return torch.device(wanted, 0 if wanted == "cuda" else None)  # type: ignore[arg-type]


def has_dali() -> bool:
    """Whether DALI is installed: `nvidia` alone may be what torch's CUDA libraries lie in."""
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def create(
    name: str, store: Store, device: str | torch.device = "cpu", *, threads: int | None = None
) -> tuple[Any, str]:
    """(engine, reason): the named engine, or for `auto` the best one here; `reason` is for the user to read.

    UserError: no such engine, DALI is not installed, or a set that `resident` cannot hold.
    """
    if name not in NAMES:
        raise UserError(nearest("engine", name, NAMES))
    device, reason = torch.device(device), "asked for"
    if name == "auto":
        name, reason = choose(store, device)
    if name == "dali":
        if not has_dali():
            raise UserError(f"--engine dali: DALI is not installed; {INSTALL}")
        from manyview.pipeline.engines.dali import DALIEngine as Engine
    elif name == "resident":
        if not_resident := _not_resident(store, device):
            raise UserError(f"--engine resident: {not_resident}; use cpu or dali")
        from manyview.pipeline.engines.resident import ResidentEngine as Engine  # type: ignore[assignment]
    else:
        from manyview.pipeline.engines.cpu import CPUEngine as Engine  # type: ignore[assignment]
    return Engine(store, device, threads), reason


def choose(store: Store, device: torch.device) -> tuple[str, str]:
    """The best engine for this set on this device, and why."""
    if device.type != "cuda":
        return "cpu", f"auto: the device is {device.type}, where compiled threads beat the other engines at every size"
    side = int(max(store.heights.max(), store.widths.max()))
    if side <= SMALL and not (reason := _not_resident(store, device)):
        return "resident", f"auto: all {len(store):,} images of {side} px fit in {_gigabytes(store)} on the device"
    why = f"images up to {side} px are larger than {SMALL}" if side > SMALL else reason
    if find_spec("nvidia") is None or find_spec("nvidia.dali") is None:
        return "cpu", f"auto: {why}, and DALI, which would decode on the GPU, is not installed; {INSTALL}"
    return "dali", f"auto: {why}, so they are decoded on the GPU"


def _not_resident(store: Store, device: torch.device) -> str:
    """Why the set cannot be held on the device, or nothing."""
    if (store.heights != store.heights[0]).any() or (store.widths != store.widths[0]).any():
        return f"{store.name} has images of several sizes"
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else np.inf
    if 3 * store.heights[0] * store.widths[0] * len(store) > SHARE * free:
        return f"{store.name} takes {_gigabytes(store)}, more than {SHARE:.0%} of the device's free memory"
    return ""


def _gigabytes(store: Store) -> str:
    return f"{3e-9 * store.heights[0] * store.widths[0] * len(store):.2g} GB"
