"""What the rows of a study say about the paper's claims, as numbers with intervals. Nothing here draws.

A row is a dict of one run's settings and results (study/sweep.py). Accuracies are shares of 1 in it and percent from
`percent` on. Where the spread between seeds is the same in all settings, it is pooled: three seeds a setting then give an
interval with the degrees of freedom of all of them. Verdicts are tests against a margin, with Holm's correction for all
verdicts of a page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from manyview.study.sweep import RESULTS, Settings, Study, finished, name_of

Row = dict[str, Any]
Sample = list[float]  # one value a seed
LEVEL = 0.05  # of tests; intervals are the other 95 %


# --- rows


def rows_of(study: Study, path: Path, *grids: str) -> list[Row]:
    """The finished rows of these grids, each once, numbers as numbers, `beta` as a number too and `c` = beta x D beside it."""
    done = finished(study, path)
    names = {name_of(settings): None for grid in grids for settings in study.grids.get(grid, [])}
    return [row_of(study, done[name]) for name in names if name in done]


def row_of(study: Study, cells: Settings) -> Row:
    row: Row = study.train | {key: number(value) for key, value in cells.items() if value != ""}
    if isinstance(beta := row.get("beta"), str) and beta.endswith("/D"):
        row["beta"] = float(beta.removesuffix("/D")) / row["projector_dim"]
    if isinstance(row.get("beta"), float | int):
        row["c"] = round(row["beta"] * row["projector_dim"], 6)
    return row


def number(value: Any) -> Any:
    try:
        return float(value) if "." in str(value) or "e" in str(value) else int(value)
    except (TypeError, ValueError):
        return value


def select(rows: list[Row], **settings: Any) -> list[Row]:
    def close(a: Any, b: Any) -> bool:
        return math.isclose(a, b, rel_tol=1e-6) if isinstance(a, float) and isinstance(b, float | int) else a == b

    return [row for row in rows if all(close(row.get(k), v) for k, v in settings.items())]


def percent(rows: list[Row], score: str = "linear", **settings: Any) -> Sample:
    """This accuracy of the rows with these settings."""
    return [100 * row[score] for row in select(rows, **settings)]


def values(rows: list[Row], key: str) -> list[Any]:
    return sorted({row[key] for row in rows})


def cost(rows: list[Row]) -> float:
    """Core-seconds a view, of the fastest run: neighbours on the machine can only slow one."""
    return min(row["core_seconds"] / row["views_seen"] for row in rows)


# --- estimates


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error, and the degrees of freedom that the error is known with (0: one seed, no error)."""

    mean: float
    error: float
    dof: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.half:.2f}" if self.dof else f"{self.mean:.2f} (one seed)"

    @property
    def half(self) -> float:
        """Of the 95 % interval, by Student's t."""
        return float(stats.t.ppf(1 - LEVEL / 2, self.dof)) * self.error if self.dof else math.inf

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def estimate(sample: Sequence[float]) -> Estimate:
    """By the spread of these values alone."""
    error = float(stats.sem(sample)) if len(sample) > 1 else math.nan
    return Estimate(float(np.mean(sample)), error, len(sample) - 1)


@dataclass(frozen=True)
class Spread:
    """Of one result between seeds. Pooled over the settings of a study unless `p_equal`, Bartlett's test that it is the same
    in all of them, says otherwise; then each setting has its own, and differences are Welch's."""

    deviation: float = math.nan
    dof: int = 0
    settings: int = 0
    p_equal: float = 0.0

    @property
    def pooled(self) -> bool:
        return self.dof > 0 and self.p_equal >= LEVEL

    def estimate(self, sample: Sample) -> Estimate:
        own = estimate(sample)
        return Estimate(own.mean, self.deviation / math.sqrt(len(sample)), self.dof) if self.pooled else own

    def difference(self, a: Sample, b: Sample) -> Estimate | None:
        """a - b; None where one of them was not measured."""
        if not a or not b:
            return None
        one, other = self.estimate(a), self.estimate(b)
        error = math.hypot(one.error, other.error)
        dof: float = self.dof if self.pooled else min(one.dof, other.dof)
        if not self.pooled and dof and error:
            dof = error**4 / (one.error**4 / one.dof + other.error**4 / other.dof)
        return Estimate(one.mean - other.mean, error, dof)


def spread(rows: list[Row], score: str = "linear") -> Spread:
    """Of this accuracy over all settings that have several seeds."""
    by_setting: dict[str, Sample] = {}
    for row in rows:
        settings = name_of({k: v for k, v in row.items() if k not in (*RESULTS, "seed")})
        by_setting.setdefault(settings, []).append(100 * row[score])
    groups = [group for group in by_setting.values() if len(group) > 1]
    if len(groups) < 2:
        return Spread()
    dof = sum(len(group) - 1 for group in groups)
    variances = [np.var(group, ddof=1) for group in groups]
    deviation = math.sqrt(sum((len(group) - 1) * v for group, v in zip(groups, variances)) / dof)
    p_equal = float(stats.bartlett(*groups).pvalue) if min(variances) > 0 else 1.0
    return Spread(deviation, dof, len(groups), p_equal)


# --- verdicts


@dataclass(frozen=True)
class Claim:
    """That a value lies between two margins (one of them may be infinite)."""

    text: str
    value: Estimate | None
    low: float = -math.inf
    high: float = math.inf

    @property
    def ps(self) -> tuple[float, float]:
        """One-sided: that it lies outside (two tests where it has two margins, the worse of them), and that it lies inside."""
        if self.value is None or not self.value.dof:
            return 1.0, 1.0
        t = lambda distance: distance / max(self.value.error, 1e-12)  # noqa: E731
        above, below = t(self.value.mean - self.low), t(self.high - self.value.mean)
        inside = stats.t.sf((above, below), self.value.dof)
        outside = stats.t.cdf((above, below), self.value.dof)
        return float(max(inside)), float(min(outside))

    @property
    def p(self) -> float:
        """Of the verdict, whichever it is."""
        return min(1.0, 2 * min(self.ps))

    def told(self, p: float) -> str:
        """The sentence, with the verdict by the corrected `p`."""
        if self.value is None:
            return f"- {self.text}: not measured"
        holds, fails = self.ps
        word = "undecided" if p >= LEVEL else "holds" if holds < fails else "does not hold"
        bound = max(-self.value.low, self.value.high)
        more = f", no difference larger than {bound:.2f}" if word == "undecided" and self.low == -self.high else ""
        return f"- {self.text}: {word} ({self.value}{more})"


Lines = list[str | Claim]


def section(*parts: str | Sequence[str | Claim]) -> Lines:
    """Titles, paragraphs, tables and lists with an empty line after each; what is empty is left out."""
    return [line for part in parts if part for line in (*([part] if isinstance(part, str) else part), "")]


def decide(lines: Lines) -> list[str]:
    """Every claim as a sentence, corrected for all of them by Holm's step-down method."""
    claims = [line for line in lines if isinstance(line, Claim) and line.value is not None]
    corrected = dict(zip(map(id, claims), holm([claim.p for claim in claims])))
    return [line.told(corrected.get(id(line), 1.0)) if isinstance(line, Claim) else line for line in lines]


def holm(ps: Sequence[float]) -> list[float]:
    """Corrected p values: the smallest times how many there are, the next times one fewer, never smaller than the one before."""
    order = np.argsort(ps)
    steps = np.maximum.accumulate(np.asarray(ps)[order] * np.arange(len(ps), 0, -1)) if len(ps) else np.array([])
    corrected = np.empty(len(ps))
    corrected[order] = np.minimum(steps, 1)
    return corrected.tolist()


# --- the best strength of decorrelation


def gridded(rows: list[Row]) -> list[Row]:
    """The D and seeds with at least four beta, of the D that have most such seeds: a best beta among two says nothing."""
    full = [r for r in rows if len(select(rows, projector_dim=r["projector_dim"], seed=r["seed"])) > 3]
    seeds = {d: len(values(select(full, projector_dim=d), "seed")) for d in values(full, "projector_dim")}
    return [r for r in full if seeds[r["projector_dim"]] == max(seeds.values())]


def best_beta(rows: list[Row], dim: int, seed: int) -> float:
    """The beta that is best on held-out training images: the top of the parabola through the best point and its
    neighbours in log beta, or the best point itself at an edge of the grid."""
    points = sorted((math.log(r["beta"]), r["held_out"]) for r in select(rows, projector_dim=dim, seed=seed))
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
    best = {seed: [math.log(best_beta(rows, d, seed)) for d in dims] for seed in values(rows, "seed")}
    return estimate([float(np.polyfit(np.log(dims), betas, 1)[0]) for betas in best.values()])


def tuned(rows: list[Row], setting: str) -> float:
    """The value of a setting whose accuracy on held-out training images, averaged over its rows, is best."""
    return max(values(rows, setting), key=lambda value: float(np.mean(percent(rows, "held_out", **{setting: value}))))
