"""Engines turn ids and parameters into pixels; `create` picks one."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from pipeline.engines.cpu import CPUEngine
from pipeline.errors import UserError, nearest
from pipeline.store import Store

NAMES = ("auto", "cpu", "dali", "resident")


def create(
    name: str, store: Store, device: str | torch.device = "cpu", *, threads: int | None = None
) -> tuple[Any, str]:
    """(engine, reason): the named engine, or for `auto` the best one here; `reason` is a line to print."""
    if name not in NAMES:
        raise UserError(nearest("engine", name, NAMES))
    if name == "dali":
        if find_spec("nvidia.dali") is None:
            raise UserError("engine dali needs DALI: pip install nvidia-dali-cuda130 (or -cuda120)")
        from pipeline.engines.dali import DALIEngine

        return DALIEngine(store, device, threads), "asked for"
    return CPUEngine(store, device, threads), "asked for"
