"""Engines turn ids and parameters into pixels; `create` picks one."""

from __future__ import annotations

import torch

from pipeline.engines.cpu import CPUEngine
from pipeline.errors import UserError, nearest
from pipeline.store import Store

NAMES = ("auto", "cpu", "dali", "resident")


def create(name: str, store: Store, device: str | torch.device = "cpu", *, threads: int | None = None):
    """(engine, reason): the named engine, or for `auto` the best one here; `reason` is a line to print."""
    if name not in NAMES:
        raise UserError(nearest("engine", name, NAMES))
    return CPUEngine(store, device, threads), "engine cpu"
