"""What a step will cost, from a trial on a few rows: seconds, and the bytes that autograd keeps."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from manyview.training import checkpoint


@dataclass(frozen=True)
class Estimate:
    """Cost of one view (one row through the network, forward and backward) and of what does not grow with rows."""

    rows: int  # of the trial
    seconds_per_view: float
    bytes_per_view: int
    fixed_bytes: int  # weights, gradients and two optimizer moments

    def memory(self, views: int) -> int:
        return self.fixed_bytes + views * self.bytes_per_view

    def rows_that_fit(self, available: int) -> int:
        return max(0, (available - self.fixed_bytes) // self.bytes_per_view)


def trial(
    encoder: nn.Module, size: int, device: torch.device, autocast: Callable[[], AbstractContextManager]
) -> Estimate:
    """Time forward + backward of a copy of the encoder on random rows of (3, size, size), and count the saved bytes.

    The copy and the restored generators keep the run itself untouched.
    """
    state = checkpoint.random_state()
    twin = copy.deepcopy(encoder)
    rows = max(8, min(256, 2**18 // size**2))  # few, but enough that the cost a call has anyway does not show
    x = torch.randn(rows, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def step() -> None:
        with autocast():
            z = twin(x)
        z.float().square().mean().backward()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    _synchronize(device)
    start = time.perf_counter()
    step()
    _synchronize(device)
    seconds = time.perf_counter() - start
    weights = sum(p.numel() * p.element_size() for p in encoder.parameters())
    checkpoint.restore_random_state(state)
    return Estimate(rows, seconds / len(x), max(1, sum(saved.values()) // len(x)), 4 * weights)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this says that memory is lacking; on the CPU torch raises a plain RuntimeError with a text of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        type(error) is RuntimeError and "DefaultCPUAllocator" in str(error)
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def available_memory(device: torch.device) -> int:
    """Bytes that a run could use on the device: the whole GPU, or the host's memory that is not taken."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    return psutil.virtual_memory().available
