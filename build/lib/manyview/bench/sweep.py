"""The data path alone under other settings: what a view costs on top of an image, and how many threads pay."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np

from manyview.bench.composed import ENDLESS
from manyview.bench.host import now, synchronize
from manyview.bench.workload import Workload
from manyview.pipeline import engines, views
from manyview.pipeline.machine import cores

KNEE = 0.03  # a setting that is this close to the best one is as good, and the smallest such is recommended


def points(work: Workload, base: dict[str, int]) -> list[dict[str, int]]:
    """One setting changed at a time around `base`."""
    ladder = {
        "views": sorted({v for v in (1, 2, 4, 8, base["views"]) if v <= max(4, base["views"])}),
        "threads": sorted({1, 2, max(1, cores() // 2), cores(), 2 * cores()}),
        "batch": sorted({max(2, base["batch"] // 4), base["batch"], min(2 * base["batch"], work.plan.n)}),
        "prefetch": sorted({1, 2, 4, base["prefetch"]}),
    }
    if len(work.policy.groups) > 1:  # local crops: fewer than three views are another policy
        ladder["views"] = sorted({3, 4, 6, base["views"]})
    if work.engine.name != "cpu":
        ladder["threads"] = [base["threads"]]
    found = [base | {name: value} for name, values in ladder.items() for value in values]
    return [dict(point) for point in dict.fromkeys(tuple(p.items()) for p in found)]


class Sweep:
    def __init__(self, work: Workload, batch: int):
        """`batch`: images of a batch; the network's step may be too dear for as many as the data path does well with."""
        self.work = work
        self.base = {
            "views": work.policy.views,
            "threads": work.threads,
            "batch": batch,
            "prefetch": work.setup.prefetch,
        }
        self.points = points(work, self.base)
        self.rows: list[dict[str, Any]] = [p | {"rate": [], "core": []} for p in self.points]
        self.engines: dict[int, Any] = {work.threads: work.engine}

    def round(self, seconds: float) -> None:
        """Every setting once, each for `seconds` or so."""
        for row in self.rows:
            rate, core = self._run(row, seconds)
            row["rate"].append(rate)
            row["core"].append(core)

    def _run(self, row: dict[str, Any], seconds: float) -> tuple[float, float]:
        """(images/s, core-ms an image) of the loader with nobody behind it."""
        work = self.work
        if row["threads"] not in self.engines:
            self.engines[row["threads"]] = engines.create(
                work.engine.name, work.store, work.device, threads=row["threads"]
            )[0]
        setup = work.setup
        policy = views.policy(setup.policy, row["views"], work.policy.groups[0].size, views.overrides(setup.augment))
        order = replace(work.plan, global_batch=row["batch"])
        loader = work.loader(plan=order, policy=policy, engine=self.engines[row["threads"]], prefetch=row["prefetch"])
        batches = loader.batches(0, ENDLESS)
        next(batches)
        synchronize(work.device)
        begun, images = now(), 0
        while images == 0 or time.perf_counter() - begun.wall < seconds:
            next(batches)
            images += row["batch"]
        synchronize(work.device)
        passed = now() - begun
        batches.close()  # type: ignore[attr-defined]
        return images / passed.wall, 1e3 * passed.core / images

    def close(self) -> None:
        for threads, engine in self.engines.items():
            if threads != self.work.threads:
                engine.close()

    def result(self) -> dict[str, Any]:
        rows = [row | {"images_per_s": median(row["rate"]), "core_ms": median(row["core"])} for row in self.rows]
        base = self.base
        lines = {}
        for name in base:
            line = [r for r in rows if all(r[k] == base[k] for k in base if k != name)]
            lines[name] = [{"value": r[name], "images_per_s": r["images_per_s"], "core_ms": r["core_ms"]} for r in line]
        return {
            "lines": lines,
            "knees": {k: knee(lines[k]) for k in ("threads", "batch", "prefetch")},
            "fit": fit(rows, base),
        }


def knee(line: list[dict[str, float]]) -> float:
    """The smallest value whose rate is within `KNEE` of the best."""
    best = max(point["images_per_s"] for point in line)
    return min(point["value"] for point in line if point["images_per_s"] >= (1 - KNEE) * best)


def fit(rows: list[dict[str, Any]], base: dict[str, int]) -> dict[str, Any]:
    """Core-ms an image = a + b * V by least squares over the medians; intervals by leaving rounds to chance."""
    line = [r for r in rows if all(r[k] == base[k] for k in base if k != "views")]
    v = np.array([r["views"] for r in line], float)
    samples = np.array([r["core"] for r in line])  # (points, rounds)
    if len(v) < 2:
        return {}
    b, a = np.polyfit(v, np.median(samples, axis=1), 1)
    rng = np.random.default_rng(0)
    drawn = [np.polyfit(v, np.median(samples[:, rng.integers(samples.shape[1], size=samples.shape[1])], axis=1), 1)
             for _ in range(500)]  # fmt: skip
    spread_b, spread_a = np.quantile(np.array(drawn), (0.025, 0.975), axis=0).T
    predicted, seen = a + b * v, np.median(samples, axis=1)
    return {
        "a": float(a), "b": float(b), "a_interval": spread_a.tolist(), "b_interval": spread_b.tolist(),
        "worst_error": float(np.max(np.abs(predicted / seen - 1))), "views": v.tolist(), "core_ms": seen.tolist(),
    }  # fmt: skip
