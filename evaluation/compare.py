"""How well one evaluation predicts another, over runs and checkpoints.

Three coefficients with intervals from a bootstrap that draws whole runs, because checkpoints of one run are not
independent. n is beside every number; with fewer than 5 models there is no coefficient, with fewer than 10 a warning.
"""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.errors import UserError

LEAST = 5
FEW = 10
RESAMPLES = 2000
KINDS = ("spearman", "pearson", "kendall")
COLUMNS = ("run", "checkpoint", "step", "backbone", "method", "pretrained_on", "dataset", "mode", "protocol", "norm",
           "seed", "weights", "metric", "value", "low", "high", "n")  # fmt: skip


def coefficients(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Spearman, Pearson and Kendall tau-b of x (n,) and y (n,): (3,), or (R, 3) for weights (R, n), the number of
    times each point is drawn in R resamples. NaN where one of them is constant. Ties get their mean rank."""
    counts = np.ones((1, len(x))) if weights is None else np.asarray(weights, float)
    order_x, order_y = (np.sign(v[:, None] - v[None, :]) for v in (x, y))
    # The rank among the drawn points is half the sum of the signs, up to a constant, ties included.
    result = np.stack(
        [
            _pearson(counts @ order_x.T, counts @ order_y.T, counts),
            _pearson(np.broadcast_to(x, counts.shape), np.broadcast_to(y, counts.shape), counts),
            _kendall(order_x, order_y, counts),
        ],
        axis=1,
    )
    return result[0] if weights is None else result


def _pearson(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
    total = w.sum(1, keepdims=True)
    x, y = (v - (w * v).sum(1, keepdims=True) / total for v in (x, y))
    spread = np.sqrt((w * x * x).sum(1)) * np.sqrt((w * y * y).sum(1))
    # A resample of equal values has a spread of rounding errors only.
    constant = spread <= 1e-13 * np.abs(w * x * y).sum(1) + 1e-300
    return np.where(constant, np.nan, np.clip((w * x * y).sum(1) / np.where(constant, 1, spread), -1, 1))


def _kendall(order_x: np.ndarray, order_y: np.ndarray, w: np.ndarray) -> np.ndarray:
    both, only_x, only_y = (((w @ m) * w).sum(1) for m in (order_x * order_y, order_x**2, order_y**2))
    spread = np.sqrt(only_x) * np.sqrt(only_y)
    return np.where(spread == 0, np.nan, np.clip(both / np.where(spread == 0, 1, spread), -1, 1))


def bootstrap(
    x: np.ndarray, y: np.ndarray, runs: list[str], *, seed: int = 0, resamples: int = RESAMPLES
) -> np.ndarray:
    """95 % percentile intervals (3, 2) of the coefficients, drawing whole runs. NaN with fewer than 3 runs."""
    names = sorted(set(runs))
    if len(names) < 3:
        return np.full((3, 2), np.nan)
    member = np.array([[run == name for run in runs] for name in names], float)
    draws = np.random.default_rng(seed).multinomial(len(names), [1 / len(names)] * len(names), size=resamples)
    return np.nanpercentile(coefficients(x, y, draws @ member), [2.5, 97.5], axis=0).T


def analytic(r: float, n: int, kind: str) -> tuple[float, float]:
    """95 % interval by Fisher's z, as a check on the bootstrap: independent models are assumed. NaN for Kendall."""
    if kind == "kendall" or n <= 3 or not math.isfinite(r):
        return math.nan, math.nan
    spread = 1.0 if kind == "pearson" else math.sqrt(1 + r * r / 2)
    z, half = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, r))), 1.959964 * spread / math.sqrt(n - 3)
    return math.tanh(z - half), math.tanh(z + half)


def fisher_mean(values: list[float]) -> float:
    """The mean coefficient over datasets, through Fisher's z (a perfect one counts as 0.999999)."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return math.nan
    return math.tanh(sum(math.atanh(max(-0.999999, min(0.999999, v))) for v in finite) / len(finite))


@dataclass(frozen=True)
class Correlation:
    """Of a column measured on the pre-training data with one measured on another dataset."""

    group: str  # "all", or a backbone
    predictor: str
    dataset: str
    target: str
    n: int  # models: pairs of a run and a checkpoint
    runs: int
    kind: str
    r: float | None
    low: float | None
    high: float | None
    analytic_low: float | None
    analytic_high: float | None
    note: str


def read(paths: list[Path]) -> list[dict]:
    """The result rows of these run directories, their checkpoints included (or of eval.json files).

    In an order that does not depend on theirs."""
    rows: list[dict] = []
    missing = []
    for path in sorted(set(paths)):
        files = [path / "eval.json", *sorted(path.glob("eval-*/eval.json"))] if path.is_dir() else [path]
        found = [row for file in files if file.is_file() for row in json.loads(file.read_text())["results"]]
        rows += found
        if not found and path.is_dir() and not (path / "correlations.csv").exists():
            missing.append(f"{path}: no eval.json there; make it with `python tools/evaluate.py {path}`")
    if not rows:
        raise UserError(
            "\n".join(missing) or "no run directories given, as in `python tools/evaluate.py compare runs/*`"
        )
    for line in missing:
        print(f"left out: {line}")
    return rows


def write_csv(rows: list[dict], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda r: tuple(str(r.get(c, "")) for c in COLUMNS)))


def table(rows: list[dict]) -> dict[tuple[str, str], dict[tuple[str, str, str], float]]:
    """{(dataset or "", column): {(run, checkpoint, backbone): top-1, mean over seeds}}; "" = the pre-training data."""
    found: dict = {}
    for row in rows:
        if row["metric"] != "top1" or row["weights"] != "trained" or row["mode"] != "retrained":
            continue
        dataset = "" if row["dataset"] == row["pretrained_on"] else row["dataset"]
        column = f"{row['protocol']} ({row['norm']})"
        model = (row["run"], row["checkpoint"], row["backbone"])
        found.setdefault((dataset, column), {}).setdefault(model, []).append(row["value"])
    return {key: {m: math.fsum(v) / len(v) for m, v in sorted(models.items())} for key, models in sorted(found.items())}


def correlate(rows: list[dict], *, seed: int = 0) -> list[Correlation]:
    """Every in-domain column against every column of every other dataset, over all models and within each backbone.

    Where nothing was measured outside the pre-training data, its columns are held against each other.
    """
    columns = table(rows)
    inside = {c: m for (d, c), m in columns.items() if not d}
    outside = {(d, c): m for (d, c), m in columns.items() if d}
    if not outside:
        outside = {("in-domain", c): m for c, m in inside.items()}
    groups = ["all", *sorted({model[2] for models in columns.values() for model in models})]
    groups = groups if len(groups) > 2 else groups[:1]
    return [
        found
        for group in groups
        for predictor, x in inside.items()
        for (dataset, target), y in outside.items()
        if dataset != "in-domain" or predictor < target
        for found in _pair(group, predictor, dataset, target, x, y, seed)
    ]


def _pair(group: str, predictor: str, dataset: str, target: str, x: dict, y: dict, seed: int) -> list[Correlation]:
    models = [m for m in sorted(x.keys() & y.keys()) if group in ("all", m[2])]
    runs = [m[0] for m in models]
    n, count = len(models), len(set(runs))
    made = partial(Correlation, group, predictor, dataset, target, n, count)
    if n < LEAST:
        note = f"n = {n}: too few models for a coefficient (at least {LEAST})"
        return [made(kind, None, None, None, None, None, note) for kind in KINDS]
    a, b = np.array([x[m] for m in models]), np.array([y[m] for m in models])
    values, intervals = coefficients(a, b), bootstrap(a, b, runs, seed=seed)
    few = [f"n = {n} is small: the interval says little"] if n < FEW else []
    few += [f"{count} run{'s' * (count != 1)}: no interval from drawing runs"] if count < 3 else []
    result = []
    for kind, value, (low, high) in zip(KINDS, values, intervals):
        first, last = map(_plain, analytic(value, n, kind))
        result.append(made(kind, _plain(value), _plain(low), _plain(high), first, last, "; ".join(few)))
    return result


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def averages(found: list[Correlation]) -> list[dict]:
    """For each predictor and group: the Fisher-z mean over the other datasets, target = the same protocol on each."""
    result = []
    for group, predictor, kind in sorted({(c.group, c.predictor, c.kind) for c in found}):
        same = [c for c in found if (c.group, c.predictor, c.kind) == (group, predictor, kind)]
        same = [c for c in same if c.target == predictor and c.r is not None and c.dataset != "in-domain"]
        if same:
            mean = fisher_mean([c.r for c in same if c.r is not None])
            per_dataset = {c.dataset: c.r for c in same}
            result.append({"group": group, "predictor": predictor, "kind": kind, "mean": mean,
                           "n": min(c.n for c in same), "per_dataset": per_dataset})  # fmt: skip
    return result


def write(rows: list[dict], out: Path, *, seed: int = 0) -> list[Correlation]:
    """results.csv (every row), correlations.csv and correlations.json in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    write_csv(rows, out / "results.csv")
    found = correlate(rows, seed=seed)
    with (out / "correlations.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(Correlation.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(c) for c in found)
    content = {"correlations": [asdict(c) for c in found], "averages": averages(found)}
    (out / "correlations.json").write_text(json.dumps(content, indent=1) + "\n")
    return found
