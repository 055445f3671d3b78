"""Everything together, as train.py runs it: how fast, who waited for whom, and how evenly."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from manyview.bench.harness import Neighbours, interval, now, spread, synchronize
from manyview.bench.workload import Workload

READY_SECONDS = 5e-4  # a batch that comes this soon was there when it was asked for
ENDLESS = 10**9


@dataclass
class Block:
    """An uninterrupted run of steps, after as many unmeasured ones as fill the queues."""

    images: int
    wall: float
    core: float
    others: float  # share of the cores used by anything else
    steps: list[float] = field(default_factory=list)  # seconds a step
    waits: list[float] = field(default_factory=list)  # of it waiting for the batch
    engine: dict[str, float] = field(default_factory=dict)  # seconds of the engine's threads, by kind of work
    idle: float | None = None  # share of the time for which the device had nothing to do between steps


class EndToEnd:
    """`block()` runs the loop for a while and keeps what it saw; `result()` is of all blocks."""

    def __init__(self, work: Workload):
        self.work = work
        self.blocks: list[Block] = []
        self.step = 0

    def block(self, seconds: float, least: int = 2) -> None:
        """Run for as many steps as fit in `seconds`, `least` at the fewest."""
        work, loader = self.work, self.work.loader()
        batches = loader.batches(self.step, ENDLESS)
        warmed = time.perf_counter()
        for _ in range(work.setup.prefetch + 1):
            self._one(batches)
            if time.perf_counter() - warmed > seconds / 4:  # steps so long that queues are full anyway
                break
        synchronize(work.device)
        before, neighbours, begun = dict(loader.timings), Neighbours(), now()
        steps: list[float] = []
        waits: list[float] = []
        marks: list[Any] = []
        while len(steps) < least or (time.perf_counter() - begun.wall) * (1 + 1 / len(steps)) < seconds:
            start = time.perf_counter()
            waits.append(self._one(batches, marks))
            steps.append(time.perf_counter() - start)
        synchronize(work.device)
        passed, others = now() - begun, neighbours.share()
        engine = {k: v - before[k] for k, v in loader.timings.items() if k in getattr(work.engine, "seconds", {})}
        batches.close()  # type: ignore[attr-defined]
        idle_share = idle(marks, passed.wall)
        images = len(steps) * work.batch
        self.blocks.append(Block(images, passed.wall, passed.core, others, steps, waits, engine, idle_share))

    def _one(self, batches: Iterator, marks: list | None = None) -> float:
        """One step; seconds that the batch kept it waiting."""
        begun = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - begun
        self.step = batch.step + 1
        with device_marks(self.work.device, marks):
            self.work.step(batch.views)
        return waited

    def result(self) -> dict[str, Any]:
        rates = [b.images / b.wall for b in self.blocks]
        core = [1e3 * b.core / b.images for b in self.blocks]
        wall, images = sum(b.wall for b in self.blocks), sum(b.images for b in self.blocks)
        waits = [w for b in self.blocks for w in b.waits]
        steps = [s for b in self.blocks for s in b.steps]
        busy = {k: sum(b.engine.get(k, 0.0) for b in self.blocks) for k in self.blocks[0].engine}
        return {
            "images_per_s": median(rates), "images_per_s_samples": rates, "images_per_s_interval": interval(rates),
            "core_ms": median(core), "core_ms_samples": core, "core_ms_interval": interval(core), "core_ms_spread": spread(core),
            "batch": self.work.batch, "steps": len(steps), "images": images, "data_wait": sum(waits) / wall,
            "ready": float(np.mean([w < READY_SECONDS for w in waits])),
            "engine_busy": min(1.0, sum(busy.values()) / (wall * self.work.threads)) if busy else None,
            "engine_ms": {k: 1e3 * v / images for k, v in busy.items()},
            "device_idle": None if self.blocks[0].idle is None else median([b.idle or 0.0 for b in self.blocks]),
            "latency_ms": percentiles(waits), "step_ms": percentiles(steps), "others": max(b.others for b in self.blocks),
        }  # fmt: skip


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50, p95, p99 in milliseconds, and of how many."""
    quantiles = np.percentile(1e3 * np.asarray(seconds), (50, 95, 99)).tolist()
    return {**dict(zip(("p50", "p95", "p99"), quantiles)), "n": len(seconds)}


@contextmanager
def device_marks(device: torch.device, marks: list | None) -> Iterator[None]:
    """CUDA events around a step's work; nothing on the CPU."""
    if device.type != "cuda" or marks is None:
        yield
        return
    begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begun.record()
    yield
    ended.record()
    marks.append((begun, ended))


def idle(marks: list, wall: float) -> float | None:
    """Share of the time that lies between one step's last and the next step's first work on the device.

    Gaps inside a step do not count; `--trace` shows those.
    """
    if not marks:
        return None
    gaps = [max(0.0, before[1].elapsed_time(after[0])) for before, after in pairwise(marks)]
    return min(1.0, sum(gaps) / 1e3 / wall)


def trace(work: Workload, path: Path, steps: int = 6) -> None:
    """A torch.profiler trace of the loop, for ui.perfetto.dev or chrome://tracing."""
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if work.device.type == "cuda" else [])
    options: dict[str, Any] = {}
    if hasattr(torch._C._profiler, "_ExperimentalConfig"):  # the engine's threads too, where torch can
        options["experimental_config"] = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    batches = work.loader().batches(0, ENDLESS)
    next(batches)
    with profile(activities=activities, **options) as recorded:
        for _ in range(steps):
            with record_function("wait for the batch"):
                batch = next(batches)
            with record_function("training step"):
                work.step(batch.views)
    batches.close()  # type: ignore[attr-defined]
    path.parent.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(path))
