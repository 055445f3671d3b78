"""What the rows of a study say about the paper's claims, as numbers with intervals. Nothing here draws or words.

A row is a dict of one run's settings and results (study/sweep.py). Accuracies are shares of 1. Intervals are Student's t
at 95 % over seeds; differences are paired by seed, which removes what a seed does to both sides.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from manyview.study.sweep import Settings, Study, name_of

Row = dict[str, Any]


@dataclass(frozen=True)
class Estimate:
    """Mean and half-width of its 95 % interval over n seeds (infinite for one)."""

    mean: float
    half: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.half:.2f}" if math.isfinite(self.half) else f"{self.mean:.2f} (one seed)"

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def estimate(values: Sequence[float]) -> Estimate:
    """Of at least one value. Student's t over the values as independent draws."""
    x = np.asarray(values, float)
    n = len(x)
    half = stats.t.ppf(0.975, n - 1) * x.std(ddof=1) / math.sqrt(n) if n > 1 else math.inf
    return Estimate(float(x.mean()), float(half), n)


def rows_of(study: Study, path: Path, grid: str) -> list[Row]:
    """The finished rows of one grid, numbers as numbers, `beta` as a number too and `c` = beta x D beside it."""
    with path.open(newline="") as file:
        found = {name_of({c: r[c] for c in study.columns if r[c] != ""}): r for r in csv.DictReader(file)}
    rows = [found[name_of(s)] for s in study.grids.get(grid, []) if name_of(s) in found]
    return [typed({**study.train, **row}) for row in rows]


def typed(row: Settings) -> Row:
    made: Row = {key: number(value) for key, value in row.items()}
    if isinstance(made.get("beta"), str) and made["beta"].endswith("/D"):
        made["beta"] = float(made["beta"].removesuffix("/D")) / made["projector_dim"]
    if isinstance(made.get("beta"), float | int):
        made["c"] = made["beta"] * made["projector_dim"]
    return made


def number(value: Any) -> Any:
    try:
        return float(value) if "." in str(value) or "e" in str(value) else int(value)
    except (TypeError, ValueError):
        return value


def by_seed(rows: list[Row], value: str, **settings: Any) -> dict[int, float]:
    """{seed: percent or number} of the rows with these settings; accuracies in percent."""
    scale = 100 if value in ("linear", "knn", "held_out") else 1
    chosen = [row for row in rows if all(close(row.get(k), v) for k, v in settings.items())]
    return {row["seed"]: scale * row[value] for row in chosen}


def close(a: Any, b: Any) -> bool:
    return math.isclose(a, b, rel_tol=1e-6) if isinstance(a, float) and isinstance(b, float | int) else a == b


def difference(a: dict[int, float], b: dict[int, float]) -> Estimate | None:
    """a - b paired by seed; None without a common seed."""
    common = sorted(a.keys() & b.keys())
    return estimate([a[s] - b[s] for s in common]) if common else None


def values(rows: list[Row], key: str) -> list[Any]:
    return sorted({row[key] for row in rows})


# --- claims 1 and 2: the projector and the strength of decorrelation


def complete(rows: list[Row]) -> list[Row]:
    """Without the D whose grid of beta and seeds is not done: a best beta among two of five says nothing."""
    counts = {d: sum(r["projector_dim"] == d for r in rows) for d in values(rows, "projector_dim")}
    return [r for r in rows if counts[r["projector_dim"]] == max(counts.values())]


def best_beta(rows: list[Row], dim: int, seed: int) -> float:
    """The beta that is best on held-out training images: the top of the parabola through the best point and its
    neighbours in log beta, or the best point itself at an edge of the grid."""
    points = sorted(
        (math.log(r["beta"]), r["held_out"]) for r in rows if r["projector_dim"] == dim and r["seed"] == seed
    )
    x, y = np.array(points).T
    best = int(y.argmax())
    if 0 < best < len(x) - 1:
        a, b, _ = np.polyfit(x[best - 1 : best + 2], y[best - 1 : best + 2], 2)
        if a < 0:
            return math.exp(float(np.clip(-b / (2 * a), x[best - 1], x[best + 1])))
    return math.exp(x[best])


def slope(rows: list[Row]) -> Estimate:
    """Of log beta* on log D: one slope a seed."""
    dims = values(rows, "projector_dim")
    slopes = [
        float(np.polyfit(np.log(dims), [math.log(best_beta(rows, d, seed)) for d in dims], 1)[0])
        for seed in values(rows, "seed")
    ]
    return estimate(slopes)


def tuned(rows: list[Row], of: Callable[[Row], float]) -> float:
    """The value of `of` (c, or beta at one D) whose held-out accuracy, averaged over all rows that have it, is best."""
    groups: dict[float, list[float]] = {}
    for row in rows:
        groups.setdefault(round(of(row), 9), []).append(row["held_out"])
    return max(groups, key=lambda value: float(np.mean(groups[value])))


# --- claims 3 to 5: views


def cost(rows: list[Row], **settings: Any) -> dict[str, float]:
    """Medians over the rows: core-ms a view and a step, core-seconds a run, peak MiB."""
    chosen = [row for row in rows if all(close(row.get(k), v) for k, v in settings.items())]
    middle = {
        "core_ms_a_view": [1e3 * r["core_seconds"] / r["views_seen"] for r in chosen],
        "core_ms_a_step": [1e3 * r["core_seconds"] / r["steps"] for r in chosen],
        "core_seconds": [r["core_seconds"] for r in chosen],
        "peak_mib": [r["peak_bytes"] / 2**20 for r in chosen],
    }
    return {key: float(np.median(v)) for key, v in middle.items()}
