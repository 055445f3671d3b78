"""What every measurement is made of: clocks, contenders taken in turn, intervals, and who else was using the machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from scipy import stats

from manyview.pipeline.machine import cores

LOAD_LIMIT = 0.05  # share of the cores that other processes may use in a run that is certified
SPREAD_LIMIT = 0.05  # half the interval of the whole run's core-ms, over its median, in a run that is certified
CPU = torch.device("cpu")
Call = Callable[[], Any]
Name = TypeVar("Name")
Sample = TypeVar("Sample")


@dataclass(frozen=True)
class Spent:
    """Seconds of one measurement: on the clock, and of all cores."""

    wall: float
    core: float

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.wall - other.wall, self.core - other.core)

    def __truediv__(self, n: float) -> Spent:
        return Spent(self.wall / n, self.core / n)


def tree_seconds() -> float:
    """Core seconds of this process and of its children, alive or ended; the clock ticks every 10 ms."""
    total = sum(os.times()[:4])  # of both, user's and system's
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(child.cpu_times()[:4])  # its own, and of its children that have ended
    return total


def now(core_clock: Callable[[], float] = time.process_time) -> Spent:
    return Spent(time.perf_counter(), core_clock())


def spent(call: Call, device: torch.device = CPU, core_clock: Callable[[], float] = time.process_time) -> Spent:
    """What one call takes, work that it left on the device included. Of its cores those of this process alone, in
    nanoseconds; `tree_seconds` also sees worker processes."""
    synchronize(device)
    begun = now(core_clock)
    call()
    synchronize(device)
    return now(core_clock) - begun


def memory() -> dict[str, int]:
    """Bytes of this process, as Linux counts them: VmRSS now, RssAnon of it its own, VmHWM at most since
    `/proc/self/clear_refs` was told 5."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {key: 1024 * int(lines[key].split()[0]) for key in ("VmHWM", "VmRSS", "RssAnon")}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alone(call: Callable[..., Sample], *args: Any) -> Sample:
    """What `call` returns in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(call, *args).result()


def interleaved(
    contenders: Mapping[Name, Call], rounds: int, measure: Callable[[Call], Sample], shuffled: bool = False
) -> dict[Name, list[Sample]]:
    """`measure` of every contender once a round, round after round, so that a noisy neighbour hits all of them; with
    `shuffled` in another order each round."""
    samples: dict[Name, list[Sample]] = {name: [] for name in contenders}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(contenders), len(contenders)) if shuffled else contenders:
            samples[name].append(measure(contenders[name]))
    return samples


def interval(samples: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the median, by bootstrap: the median of what another run of as many rounds would give."""
    if len(samples) < 2 or min(samples) == max(samples):
        return (samples[0], samples[0])
    rng = np.random.default_rng(0)
    bootstrap = stats.bootstrap((samples,), np.median, n_resamples=2000, method="percentile", rng=rng)
    return float(bootstrap.confidence_interval.low), float(bootstrap.confidence_interval.high)


def spread(samples: Sequence[float]) -> float:
    """Half the interval over the median."""
    low, high = interval(samples)
    middle = median(samples)
    return (high - low) / 2 / middle if middle else 0.0


def apart(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two intervals have no point in common."""
    return one[0] > other[1] or other[0] > one[1]


class Neighbours:
    """Use of this process's cores by anything else (other processes, the hypervisor) since construction.

    The kernel counts in hundredths of a second, so intervals under half a second say little.
    """

    def __init__(self) -> None:
        self.begun, self.others = now(), others_seconds()

    def share(self) -> float:
        """0..1 of the cores; 0 where the interval was too short to tell."""
        elapsed, others = now() - self.begun, others_seconds() - self.others
        return float(np.clip(others / (elapsed.wall * cores()), 0, 1)) if elapsed.wall > 0.5 else 0.0


def others_seconds() -> float:
    """Seconds of the cores since boot that are neither this process's nor its ended children's."""
    return busy_seconds() - time.process_time() - sum(os.times()[2:4])


def busy_seconds() -> float:
    """Seconds for which the cores of this process have done anything (stolen time included) since boot."""
    every = psutil.cpu_times(percpu=True)
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(every))
    kinds = ("user", "system", "nice", "irq", "softirq", "steal")
    return sum(getattr(every[i], kind, 0.0) for i in mine if i < len(every) for kind in kinds)
