"""Engines turn ids and view parameters into pixels; `create` picks one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

import numpy as np
import torch

from manyview.pipeline.codec import RGB
from manyview.pipeline.errors import UserError, nearest
from manyview.pipeline.store import Store
from manyview.pipeline.views import ViewParameters

# Module of this package: its class.
ENGINES = {"cpu": "CPUEngine", "dali": "DALIEngine", "resident": "ResidentEngine", "fused": "FusedEngine"}
NAMES = ("auto", *ENGINES)
SMALL = 96  # pixels a side up to which dense resize matrices beat reading and decoding
SHARE = 0.25  # of the device's free memory that resident pixels may take
INSTALL = "pip install nvidia-dali-cuda130 (drivers before 580: nvidia-dali-cuda120)"


class Pending:
    """A batch under way: `work` must end first, then `views()` gives its tensors."""

    def __init__(self, work: Sequence[Future], views: Callable[[], list[torch.Tensor]]):
        self._work, self._views = work, views

    @classmethod
    def failed(cls, error: Exception) -> Pending:
        """A batch whose `result` raises."""
        work: Future = Future()
        work.set_exception(error)
        return cls([work], list)

    def result(self) -> list[torch.Tensor]:
        """Wait for the views. Raises `store.Corrupt`."""
        for one in self._work:
            one.result()
        return self._views()

    def cancel(self) -> None:
        """Drop what has not begun and wait for what has."""
        wait([one for one in self._work if not one.cancel()])


class Engine(Protocol):
    """What makes views: `Class(store, device, threads)`, threads None = the cores that this process may use.

    It draws nothing, decodes an image once for all its views, and makes the pixels of `reference.render`, to 40 dB, the
    same ones for any batch, order and threads. A sample that cannot be read or decoded is `store.Corrupt`, raised by
    `Pending.result`; the engine goes on.
    """

    name: str
    holds_all: bool  # every image is in memory: nothing need be fetched from storage
    decoded: int  # images so far
    seconds: dict[str, float]  # by stage, summed over threads

    def submit(self, ids: np.ndarray, parameters: ViewParameters) -> Pending:
        """Start a batch of samples `ids` (B,): a tensor a group, uint8 (V, B, 3, S, S) on the device, channels-last memory
        (of another `codec.Layout` C channels, uint8 or uint16).

        Called by one thread at a time, also while earlier batches are under way.
        """

    def __call__(self, ids: np.ndarray, parameters: ViewParameters) -> list[torch.Tensor]:
        """`submit` and wait."""
        return self.submit(ids, parameters).result()

    def close(self) -> None:
        """End threads and give memory back; batches not begun are dropped."""


def device_of(name: str) -> torch.device:
    """The device of this name: cpu, cuda (this process's, by a launcher's LOCAL_RANK or torch), or `auto`, which is the GPU where
    there is one. UserError if there is no such."""
    if name.partition(":")[0] not in ("auto", "cpu", "cuda"):
        raise UserError(nearest("device", name, ("auto", "cpu", "cuda")))
    wanted = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if wanted != "cpu" and not torch.cuda.is_available():
        raise UserError(
            f"--device {name}: torch sees no CUDA device; use --device cpu, or install a driver that fits this torch"
        )
    if wanted != "cuda":
        return torch.device(wanted)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))


def has_dali() -> bool:
    """Whether DALI is installed: `nvidia` alone may be what torch's CUDA libraries lie in."""
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def create(
    name: str, store: Store, device: str | torch.device = "cpu", *, threads: int | None = None
) -> tuple[Engine, str]:
    """(engine, reason): the named engine, or for `auto` the best one here; `reason` is for the user to read.

    UserError: no such engine, or one that cannot make this set's views here.
    """
    if name not in NAMES:
        raise UserError(nearest("engine", name, NAMES))
    device, reason = torch.device(device), "asked for"
    if name == "auto":
        name, reason = choose(store, device)
    elif why_not := unfit(name, store, device):
        raise UserError(f"--engine {name}: {why_not}")
    return getattr(import_module(f"{__name__}.{name}"), ENGINES[name])(store, device, threads), reason


def unfit(name: str, store: Store, device: torch.device) -> str:
    """Why this engine cannot make this set's views here, or nothing."""
    if name != "cpu" and store.layout != RGB:
        return f"it takes {RGB}, {store.name} has {store.layout}; use cpu"
    if name == "dali" and not has_dali():
        return f"DALI is not installed; {INSTALL}"
    if name == "resident" and (why_not := _not_resident(store, device)):
        return f"{why_not}; use cpu or dali"
    if name == "fused" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "its kernels are Triton's, which need a GPU (TRITON_INTERPRET=1 plays them in Python, very slowly)"
    return ""


def choose(store: Store, device: torch.device) -> tuple[str, str]:
    """The best engine for this set on this device, and why."""
    if device.type != "cuda":
        return "cpu", f"auto: the device is {device.type}, where compiled threads beat the other engines at every size"
    if store.layout != RGB:
        return "cpu", f"auto: {store.name} has {store.layout}, which only this engine takes"
    side = int(max(store.heights.max(), store.widths.max()))
    if side <= SMALL and not (reason := _not_resident(store, device)):
        return "resident", f"auto: all {len(store):,} images of {side} px fit in {_gigabytes(store)} on the device"
    why = f"images up to {side} px are larger than {SMALL}" if side > SMALL else reason
    if not has_dali():
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
