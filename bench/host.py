"""Clocks, and how much of the machine other processes were using meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
import psutil
import torch

from manyview.pipeline.machine import cores

LOAD_LIMIT = 0.05  # share of the cores that other processes may use in a run that is certified
SPREAD_LIMIT = 0.05  # half the interval of the composed run's core-ms, over its median, in a run that is certified


@dataclass(frozen=True)
class Spent:
    """Seconds of one measurement: on the clock, and of all cores on behalf of this process's threads."""

    wall: float
    core: float

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.wall - other.wall, self.core - other.core)


def now() -> Spent:
    return Spent(time.perf_counter(), time.process_time())


def spent(call: Callable[[], object], device: torch.device) -> Spent:
    """What one call takes, work that it left on the device included."""
    synchronize(device)
    begun = now()
    call()
    synchronize(device)
    return now() - begun


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Neighbours:
    """Use of this process's cores by anything else (other processes, the hypervisor) since construction.

    The kernel counts in hundredths of a second, so intervals under half a second say little.
    """

    def __init__(self) -> None:
        self.begun, self.busy, self.children = now(), busy_seconds(), children_seconds()

    def share(self) -> float:
        """0..1 of the cores; 0 where the interval was too short to tell."""
        elapsed = now() - self.begun
        others = busy_seconds() - self.busy - elapsed.core - (children_seconds() - self.children)
        return float(np.clip(others / (elapsed.wall * cores()), 0, 1)) if elapsed.wall > 0.5 else 0.0


def children_seconds() -> float:
    """Core seconds of this process's children that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def busy_seconds() -> float:
    """Seconds for which the cores of this process have done anything (stolen time included) since boot."""
    every = psutil.cpu_times(percpu=True)
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(every))
    kinds = ("user", "system", "nice", "irq", "softirq", "steal")
    return sum(getattr(every[i], kind, 0.0) for i in mine if i < len(every) for kind in kinds)


def interval(samples: list[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the median, by bootstrap: the median of what another run of as many rounds would give."""
    if len(samples) < 2:
        return (samples[0], samples[0])
    values = np.asarray(samples)
    drawn = np.random.default_rng(seed).integers(len(values), size=(2000, len(values)))
    low, high = np.quantile(np.median(values[drawn], axis=1), (0.025, 0.975))
    return float(low), float(high)


def spread(samples: list[float]) -> float:
    """Half the interval over the median."""
    low, high = interval(samples)
    middle = median(samples)
    return (high - low) / 2 / middle if middle else 0.0
