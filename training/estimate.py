"""What a step will cost, from a trial on a few rows: seconds, and the bytes that autograd keeps; what to do without memory."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import time
from dataclasses import dataclass

import psutil
import torch
from torch import nn

from manyview.pipeline.errors import UserError, first_line
from manyview.pipeline.store import Store, training_split
from manyview.pipeline.views import Group, Policy
from manyview.training import checkpoint, setup
from manyview.training.config import Config
from manyview.training.setup import Training
from manyview.training.step import Autocast


@dataclass(frozen=True)
class Estimate:
    """Cost of one view (one row through the network, forward and backward) and of what does not grow with rows."""

    rows: int  # of the trial
    seconds_per_view: float
    bytes_per_view: int
    fixed_bytes: int  # weights, gradients and two optimizer moments


def trials(training: Training, policy: Policy, device: torch.device, rows: int) -> list[Estimate]:
    """A trial for each group of views, of at most `rows` rows. UserError where the network does not take its size."""
    costs = []
    for group in policy.groups:
        try:
            costs.append(trial(training.model, group.size, device, training.autocast, rows))
        except (AssertionError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            reason = first_line(error) + _size_that_works(training.model, group, policy)
            raise UserError(f"this backbone does not train on views of {group.size} px: {reason}") from error
    return costs


def _size_that_works(model: nn.Module, group: Group, policy: Policy) -> str:
    """For local crops, the next larger size that the network takes, looked for on the meta device."""
    largest = policy.groups[0].size
    if group is policy.groups[0]:
        return ""
    twin = copy.deepcopy(model).to("meta")
    for size in range(group.size + 1, largest + 1):
        with contextlib.suppress(Exception), torch.no_grad():
            twin(torch.empty(2, _channels(model), size, size, device="meta"))
            return f"; try --augment local.size={size}"
    return "; it cannot do --policy multicrop"


def trial(encoder: nn.Module, size: int, device: torch.device, autocast: Autocast, most_rows: int = 256) -> Estimate:
    """Time forward + backward of a copy of the encoder on random rows of (C, size, size), and count the saved bytes.

    The copy and the restored generators keep the run itself untouched. The rows are few, so that memory is bounded, but
    enough that the cost which a call has anyway does not show.
    """
    state = checkpoint.random_state()
    twin = copy.deepcopy(encoder)
    rows = max(2, min(most_rows, 256, 2**18 // size**2))
    x = torch.randn(rows, _channels(encoder), size, size, device=device).contiguous(memory_format=torch.channels_last)
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
    torch.get_device_module(device).synchronize()
    start = time.perf_counter()
    step()
    torch.get_device_module(device).synchronize()
    seconds = time.perf_counter() - start
    weights = sum(p.numel() * p.element_size() for p in encoder.parameters())
    checkpoint.restore_random_state(state)
    return Estimate(rows, seconds / len(x), max(1, sum(saved.values()) // len(x)), 4 * weights)


def _channels(encoder: nn.Module) -> int:
    """Of the images that it takes."""
    return getattr(getattr(encoder, "backbone", None), "channels", 3)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this says that memory is lacking; on the CPU torch raises a plain RuntimeError with a text of its own."""
    on_cpu = type(error) is RuntimeError and "DefaultCPUAllocator" in str(error)
    return on_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)


def available_memory(device: torch.device) -> int:
    """Bytes that a run could use on the device: the whole GPU, or the host's memory that is not taken."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().available


def check_memory(needed: int, device: torch.device) -> None:
    """MemoryError where a step needs more bytes a process than there are at all: on a CPU nothing would say so later, as the
    system ends whatever takes too much."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if needed > (available_memory(device) if device.type == "cuda" else psutil.virtual_memory().total // ranks):
        raise MemoryError


def step_memory(costs: list[Estimate], cfg: Config, policy: Policy, world: int) -> int:
    """Bytes of a step on one rank. costs: of each group of views."""
    live = [
        min(cfg.view_chunk or group.count, group.count) * cost.bytes_per_view
        for cost, group in zip(costs, policy.groups)
    ]
    return costs[0].fixed_bytes + (max(live) if cfg.view_chunk else sum(live)) * cfg.batch_size // world


def step_seconds(costs: list[Estimate], cfg: Config, policy: Policy, world: int) -> float:
    """Network time of a step; chunks embed everything once more without a graph (about a third on top)."""
    seconds = sum(cost.seconds_per_view * group.count for cost, group in zip(costs, policy.groups))
    return seconds * cfg.batch_size / world * (4 / 3 if cfg.view_chunk else 1)


def out_of_memory(cfg: Config, world: int, device: torch.device) -> str:
    """What was asked for, what would fit by the estimate, and which flag to turn."""
    store = Store(cfg.data, training_split(cfg.data))
    size = cfg.size or store.default_size()
    policy = setup.policy(cfg, size)
    asked = f"out of memory with {policy.views} views x {cfg.batch_size // world} images x {size} px a process"
    gc.collect()
    try:
        cost = trial(setup.network(cfg, size, store.layout.channels), size, torch.device("cpu"), contextlib.nullcontext)
    except (MemoryError, RuntimeError):
        return f"{asked}, and there is none even for a trial: a smaller --size or --backbone"
    rows = max(0, int(0.9 * available_memory(device)) - cost.fixed_bytes) // cost.bytes_per_view
    return f"{asked}; {what_fits(cfg, policy, size, world, rows)}"


def what_fits(cfg: Config, policy: Policy, size: int, world: int, rows: int) -> str:
    """Flags with which at most `rows` rows are in the graph on a rank: less than what was asked for, whatever the estimate."""
    # Rows of size x size whose activations live at once, on one rank; local crops count by their area.
    live = [min(cfg.view_chunk or group.count, group.count) * (group.size / size) ** 2 for group in policy.groups]
    wanted = (max(live) if cfg.view_chunk else sum(live)) * cfg.batch_size / world
    rows = min(rows, int(wanted / 2))  # it did not fit, so an estimate of more than that is wrong
    batch = int(cfg.batch_size * rows / wanted) // world * world
    ways = [f"--batch-size {batch}"] if batch >= 2 * world else []
    chunk = rows * world // cfg.batch_size
    if 1 <= chunk < (cfg.view_chunk or policy.views):
        ways.append(f"--bn view --view-chunk {chunk}")
    if not ways:
        return f"not even two images fit by the fp32 estimate ({rows} rows): a smaller --size, --views or --backbone"
    return f"by the fp32 estimate {rows} rows fit: {', or '.join(ways)}"
