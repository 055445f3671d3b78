"""Everything together, as train.py runs it: how fast, who waited for whom, and how evenly."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from manyview.bench.harness import Neighbours, Spent, interval, now, spread, synchronize
from manyview.bench.workload import Workload

READY_SECONDS = 5e-4  # a batch that comes this soon was there when it was asked for
ENDLESS = 10**9


@dataclass
class Block:
    """An uninterrupted run of steps, after as many unmeasured ones as fill the queues."""

    images: int
    spent: Spent
    others: float  # share of the cores used by anything else
    steps: list[float]  # seconds a step
    waits: list[float]  # of it waiting for the batch
    timings: dict[str, float]  # the loader's, of this block

    @property
    def idle(self) -> float:
        """Share of the time that lies between one step's last and the next step's views on the device, by its own clock.

        Gaps inside a step do not count; `--trace` shows those.
        """
        return min(1.0, self.timings["device_wait"] / self.spent.wall)


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
        before, neighbours, begun = loader.timings, Neighbours(), now()
        steps: list[float] = []
        waits: list[float] = []
        while len(steps) < least or (time.perf_counter() - begun.wall) * (1 + 1 / len(steps)) < seconds:
            start = time.perf_counter()
            waits.append(self._one(batches))
            steps.append(time.perf_counter() - start)
        synchronize(work.device)
        passed, others = now() - begun, neighbours.share()
        timings = {k: v - before.get(k, 0.0) for k, v in loader.timings.items()}
        batches.close()  # type: ignore[attr-defined]
        self.blocks.append(Block(len(steps) * work.batch, passed, others, steps, waits, timings))

    def _one(self, batches: Iterator) -> float:
        """One step; seconds that the batch kept it waiting."""
        begun = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - begun
        self.step = batch.step + 1
        self.work.step(batch.views)
        return waited

    def result(self) -> dict[str, Any]:
        blocks = self.blocks
        rates = [b.images / b.spent.wall for b in blocks]
        core = [1e3 * b.spent.core / b.images for b in blocks]
        wall, images = sum(b.spent.wall for b in blocks), sum(b.images for b in blocks)
        waits, steps = [w for b in blocks for w in b.waits], [s for b in blocks for s in b.steps]
        busy = {k: sum(b.timings[k] for b in blocks) for k in self.work.engine.seconds}
        return {
            "images_per_s": median(rates), "images_per_s_samples": rates, "images_per_s_interval": interval(rates),
            "core_ms": median(core), "core_ms_samples": core, "core_ms_interval": interval(core), "core_ms_spread": spread(core),
            "batch": self.work.batch, "steps": len(steps), "images": images, "data_wait": sum(waits) / wall,
            "ready": float(np.mean([w < READY_SECONDS for w in waits])),
            "engine_busy": min(1.0, sum(busy.values()) / (wall * self.work.threads)) if busy else None,
            "engine_ms": {k: 1e3 * v / images for k, v in busy.items()},
            "device_idle": median(b.idle for b in blocks) if "device_wait" in blocks[0].timings else None,
            "latency_ms": percentiles(waits), "step_ms": percentiles(steps), "others": max(b.others for b in blocks),
        }  # fmt: skip


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50, p95, p99 in milliseconds, and of how many."""
    quantiles = np.percentile(1e3 * np.asarray(seconds), (50, 95, 99)).tolist()
    return {**dict(zip(("p50", "p95", "p99"), quantiles)), "n": len(seconds)}


def trace(work: Workload, path: Path, steps: int = 6) -> None:
    """A torch.profiler trace of the loop, for ui.perfetto.dev or chrome://tracing."""
    from torch.profiler import profile, record_function

    options: dict[str, Any] = {}
    if hasattr(torch._C._profiler, "_ExperimentalConfig"):  # the engine's threads too, where torch can
        options["experimental_config"] = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    batches = work.loader().batches(0, ENDLESS)
    next(batches)
    with profile(**options) as recorded:
        for _ in range(steps):
            with record_function("wait for the batch"):
                batch = next(batches)
            with record_function("training step"):
                work.step(batch.views)
    batches.close()  # type: ignore[attr-defined]
    path.parent.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(path))
