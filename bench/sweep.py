"""The data path alone under other settings: what a view costs on top of an image, and how many threads pay."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np

from manyview.bench.end_to_end import ENDLESS
from manyview.bench.harness import now, synchronize
from manyview.bench.workload import Workload
from manyview.pipeline import engines, views
from manyview.pipeline.machine import cores

KNEE = 0.03  # a setting that is this close to the best one is as good, and the smallest such is recommended
Point = dict[str, int]


def points(work: Workload, base: Point) -> list[Point]:
    """One setting changed at a time around `base`."""
    ladder = {
        "views": {v for v in (1, 2, 4, 8, base["views"]) if v <= max(4, base["views"])},
        "threads": {1, 2, max(1, cores() // 2), cores(), 2 * cores()},
        "batch": {max(2, base["batch"] // 4), base["batch"], min(2 * base["batch"], work.plan.n)},
        "prefetch": {1, 2, 4, base["prefetch"]},
    }
    if len(work.policy.groups) > 1:  # local crops: fewer than three views are another policy
        ladder["views"] = {3, 4, 6, base["views"]}
    if work.engine.name != "cpu":
        ladder["threads"] = {base["threads"]}
    return [base] + [base | {k: v} for k, values in ladder.items() for v in sorted(values - {base[k]})]


class Sweep:
    """`round(seconds)` takes every setting once; `result()` says what a view costs and where the knees are."""

    def __init__(self, work: Workload, batch: int):
        """`batch`: images of a batch; the network's step may be too dear for as many as the data path does well with."""
        self.work = work
        views, prefetch = work.policy.views, work.setup.prefetch
        self.base = {"views": views, "threads": work.threads, "batch": batch, "prefetch": prefetch}
        self.rows: list[dict[str, Any]] = [p | {"rate": [], "core": []} for p in points(work, self.base)]
        self.engines: dict[int, Any] = {work.threads: work.engine}

    def round(self, seconds: float) -> None:
        """Every setting once, in about so many seconds all together."""
        for row in self.rows:
            rate, core = self._run(row, seconds / len(self.rows))
            row["rate"].append(rate)
            row["core"].append(core)

    def _run(self, row: dict[str, Any], seconds: float) -> tuple[float, float]:
        """(images/s, core-ms an image) of the loader with nobody behind it."""
        work, setup, threads = self.work, self.work.setup, row["threads"]
        if threads not in self.engines:
            self.engines[threads] = engines.create(work.engine.name, work.store, work.device, threads=threads)[0]
        policy = views.policy(setup.policy, row["views"], work.policy.groups[0].size, views.overrides(setup.augment))
        other = replace(
            work, policy=policy, plan=replace(work.plan, global_batch=row["batch"]), engine=self.engines[threads],
            setup=replace(setup, prefetch=row["prefetch"]),
        )  # fmt: skip
        batches = other.loader().batches(0, ENDLESS)
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
        lines = {}
        for name in self.base:
            line = along(name, self.rows, self.base)
            lines[name] = [{"value": row[name], "images_per_s": median(row["rate"]), "core_ms": median(row["core"])}
                           for row in line]  # fmt: skip
        knees = {name: knee(lines[name]) for name in ("threads", "batch", "prefetch")}
        return {"lines": lines, "knees": knees, "fit": fit(self.rows, self.base)}


def along(name: str, rows: list[dict[str, Any]], base: Point) -> list[dict[str, Any]]:
    """The rows in which only this setting may differ from `base`, in its order."""
    return sorted((r for r in rows if all(r[k] == base[k] for k in base if k != name)), key=lambda r: r[name])


def knee(line: list[dict[str, float]]) -> float:
    """The smallest value whose rate is within `KNEE` of the best."""
    best = max(point["images_per_s"] for point in line)
    return min(point["value"] for point in line if point["images_per_s"] >= (1 - KNEE) * best)


def fit(rows: list[dict[str, Any]], base: Point) -> dict[str, Any]:
    """Core-ms an image = a + b V by least squares over the medians; intervals by leaving rounds to chance."""
    line = along("views", rows, base)
    if len(line) < 2:
        return {}
    v, samples = (
        np.array([row["views"] for row in line], float),
        np.array([row["core"] for row in line]),
    )  # (points, rounds)
    chance = np.random.default_rng(0).integers(samples.shape[1], size=(500, samples.shape[1]))
    seen = np.median(samples, axis=1)
    b, a = np.polyfit(v, seen, 1)
    between = np.quantile(np.polyfit(v, np.median(samples[:, chance], axis=2), 1), (0.025, 0.975), axis=1)
    return {
        "a": float(a), "b": float(b), "a_interval": between[:, 1].tolist(), "b_interval": between[:, 0].tolist(),
        "worst_error": float(np.max(np.abs((a + b * v) / seen - 1))), "views": v.tolist(), "core_ms": seen.tolist(),
    }  # fmt: skip
