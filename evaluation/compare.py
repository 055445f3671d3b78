"""How well one evaluation predicts another, over runs and checkpoints that were pre-trained on the same data, or over all
encoders where one dataset is named to be held against the others.

Three coefficients with intervals from a bootstrap that draws whole runs, because checkpoints of one run are not
independent. n is beside every number; with fewer than 5 models there is no coefficient, with fewer than 10 a warning.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from scipy import stats

from manyview.pipeline import files
from manyview.pipeline.errors import UserError, nearest, refuse

LEAST = 5
FEW = 10
RESAMPLES = 2000
ANY = "any"  # pre-training data
KINDS = ("spearman", "pearson", "kendall")
COLUMNS = ("run", "checkpoint", "step", "backbone", "method", "pretrained_on", "dataset", "mode", "protocol", "norm",
           "seed", "weights", "metric", "value", "low", "high", "n", "n_train", "sample")  # fmt: skip
Model = tuple[str, str, str, str]  # run, checkpoint, backbone, pretrained_on


def coefficients(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman, Pearson and Kendall tau-b of x (n,) and y (n,): (3,), scipy's. NaN where one of them is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.full(3, np.nan)
    return np.array([f(x, y).statistic for f in (stats.spearmanr, stats.pearsonr, stats.kendalltau)])


def resampled(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`coefficients` (R, 3) of R resamples; `counts` (R, n): how often each draws a point.

    Not scipy's, whose 2,000 calls a pair take 4 s where this takes 0.04. All three are correlations: Pearson's of the values,
    Spearman's of their ranks (among drawn points half the sum of the signs of all differences, up to a constant, ties
    included), Kendall's of the signs themselves.
    """
    w = counts.astype(float)
    signs_x, signs_y = (np.sign(v[:, None] - v[None, :]) for v in (x, y))
    of_ranks = _correlation(w @ signs_x.T, w @ signs_y.T, w)
    of_values = _correlation(np.broadcast_to(x, w.shape), np.broadcast_to(y, w.shape), w)
    both, only_x, only_y = (((w @ signs) * w).sum(1) for signs in (signs_x * signs_y, signs_x**2, signs_y**2))
    with np.errstate(invalid="ignore"):
        of_signs = both / np.sqrt(only_x) / np.sqrt(only_y)  # 0 / 0 where a resample is constant
    return np.stack([of_ranks, of_values, of_signs], 1)


def _correlation(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Pearson's of points with weights, a row each; NaN where a row is constant up to rounding."""
    x, y = (v - (w * v).sum(1, keepdims=True) / w.sum(1, keepdims=True) for v in (x, y))
    spread, product = np.sqrt((w * x * x).sum(1)) * np.sqrt((w * y * y).sum(1)), w * x * y
    constant = spread <= 1e-13 * np.abs(product).sum(1) + 1e-300
    return np.where(constant, np.nan, np.clip(product.sum(1) / np.where(constant, 1, spread), -1, 1))


def bootstrap(
    x: np.ndarray, y: np.ndarray, runs: list[str], *, seed: int = 0, resamples: int = RESAMPLES
) -> np.ndarray:
    """95 % percentile intervals (3, 2) of the coefficients, drawing whole runs. NaN with fewer than 3 runs."""
    names = sorted(set(runs))
    if len(names) < 3:
        return np.full((3, 2), np.nan)
    member = np.array([[run == name for run in runs] for name in names], float)
    draws = np.random.default_rng(seed).multinomial(len(names), [1 / len(names)] * len(names), size=resamples)
    return np.nanpercentile(resampled(x, y, draws @ member), [2.5, 97.5], axis=0).T


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
    """Of a column measured on one dataset (the pre-training data, or the one asked for) with one measured on another."""

    pretrained_on: str  # "any" where the encoders' are different
    measured_on: str  # the dataset of `predictor`
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


def contents(paths: list[Path]) -> list[dict]:
    """What the eval.json files of these run directories hold, their checkpoints and variants included (or these files), in an
    order that does not depend on theirs. Runs of one name are told apart by their paths.

    UserError: no such path, a damaged eval.json, nothing to compare, runs that were measured on other images.
    """
    if absent := [path for path in paths if not path.exists()]:
        raise UserError("\n".join(f"{path}: no such run" for path in absent))
    result: list[dict] = []
    missing: list[str] = []
    # By a run's name and its path: the weights that lie there, whatever their size or layers.
    homes: dict[str, dict[str, set[str]]] = {}
    for path in sorted(set(paths)):
        if path.is_dir():
            files = [f for f in (path / "eval.json", *sorted(path.glob("eval-*/eval.json"))) if f.is_file()]
        else:
            files = [path] if path.suffix == ".json" else []  # runs/* may hold a table beside the runs
        own = [_content(file) | {"home": path.as_posix()} for file in files]
        result += own
        for row in (row for content in own for row in content["results"]):
            weights = homes.setdefault(row["run"], {}).setdefault(path.as_posix(), set())
            weights |= {row["checkpoint"].partition(" ")[0]} if row["weights"] == "trained" else set()
        if not own and path.is_dir() and not (path / "correlations.csv").exists():
            missing.append(f"{path}: no eval.json there; make it with `python tools/evaluate.py {path}`")
    if not any(content["results"] for content in result):
        raise UserError(
            "\n".join(missing) or "no run directories given, as in `python tools/evaluate.py compare runs/*`"
        )
    for line in missing:
        print(f"left out: {line}")
    for content in result:
        for row in content["results"]:
            alike = homes[row["run"]].values()
            row["run"] = row["run"] if all(weights == next(iter(alike)) for weights in alike) else content["home"]
    _same_images(rows(result))
    return result


def rows(contents: list[dict]) -> list[dict]:
    return [row for content in contents for row in content["results"]]


def _content(file: Path) -> dict:
    try:
        content = json.loads(file.read_text())
        wanted = {"run", "checkpoint", "backbone", "pretrained_on", "dataset", "mode", "protocol", "norm", "weights", "metric",
                  "value", "n", "n_train", "sample"}  # fmt: skip
        if all(wanted <= row.keys() for row in content["results"]):
            return content
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{file}: not an eval.json of this version; make it again with `python tools/evaluate.py`")


def _same_images(rows: list[dict]) -> None:
    """UserError where a dataset's accuracies are of different images: they do not compare, however many there are."""
    samples: dict[str, dict[str, dict]] = {}
    for row in filter(_ranked, rows):
        samples.setdefault(row["dataset"], {}).setdefault(row["sample"], row)
    errors = []
    for dataset, of in sorted(samples.items()):
        sizes = ", ".join(f"{r['run']} with {r['n_train']:,} and {r['n']:,} ({sample[:6]})" for sample, r in of.items())
        if len(of) > 1:
            errors.append(f"{dataset} was measured on different images: {sizes}; "
                          "evaluate on the same shards with the same --limit and --seed")  # fmt: skip
    refuse(errors)


def _write_csv(path: Path, columns: tuple[str, ...], rows: Iterable[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(rows)


def _ranked(row: dict) -> bool:
    return row["metric"] == "top1" and row["weights"] == "trained" and row["mode"] == "retrained"


def table(rows: list[dict]) -> dict[tuple[str, str], dict[Model, float]]:
    """{(dataset, column): {model: top-1, mean over seeds}}."""
    columns: dict = {}
    for row in filter(_ranked, rows):
        column = f"{row['protocol']} ({row['norm']})"
        model = (row["run"], row["checkpoint"], row["backbone"], row["pretrained_on"])
        columns.setdefault((row["dataset"], column), {}).setdefault(model, []).append(row["value"])
    # Rounded, so that means which are equal tie: they are of counts over images and draws.
    return {key: {m: round(math.fsum(v) / len(v), 12) for m, v in sorted(models.items())}
            for key, models in sorted(columns.items())}  # fmt: skip


def correlate(rows: list[dict], *, seed: int = 0, reference: str | None = None) -> list[Correlation]:
    """Every column of the pre-training data against every column of every other dataset, over all models pre-trained on it
    and within each backbone. Where nothing was measured outside it, its columns are held against each other.

    `reference`: the dataset whose columns are held against the others', over all models, whatever they were pre-trained on.
    UserError where nothing was measured on it.
    """
    columns = table(rows)
    if reference is not None:
        if reference not in (names := sorted({dataset for dataset, _ in columns})):
            raise UserError(nearest("dataset", reference, names))
        return list(_held_against(reference, ANY, columns, seed))
    result: list[Correlation] = []
    for data in sorted({model[3] for models in columns.values() for model in models if model[3]}):
        own = {key: {m: v for m, v in models.items() if m[3] == data} for key, models in columns.items()}
        result += _held_against(data, data, own, seed)
    return result


def _held_against(data: str, pretrained_on: str, columns: dict, seed: int) -> Iterator[Correlation]:
    inside = {c: m for (d, c), m in columns.items() if d == data and m}
    outside = {(d, c): m for (d, c), m in columns.items() if d != data and m}
    alone = not outside
    if alone:
        outside = {(data, c): m for c, m in inside.items()}
    groups = ["all", *sorted({model[2] for models in columns.values() for model in models})]
    for group in groups if len(groups) > 2 else groups[:1]:
        for predictor, x in inside.items():
            for (dataset, target), y in outside.items():
                if not alone or predictor < target:
                    yield from _pair((pretrained_on, data, group, predictor, dataset, target), x, y, seed)


def _pair(columns: tuple[str, str, str, str, str, str], x: dict, y: dict, seed: int) -> list[Correlation]:
    """`columns`: as a Correlation begins."""
    models = [m for m in sorted(x.keys() & y.keys()) if columns[2] in ("all", m[2])]
    runs = [m[0] for m in models]
    n, count = len(models), len(set(runs))
    correlation = partial(Correlation, *columns, n, count)
    if n < LEAST:
        note = f"n = {n}: too few models for a coefficient (at least {LEAST})"
        return [correlation(kind, None, None, None, None, None, note) for kind in KINDS]
    a, b = np.array([x[m] for m in models]), np.array([y[m] for m in models])
    values, intervals = coefficients(a, b), bootstrap(a, b, runs, seed=seed)
    few = [f"n = {n} is small: the interval says little"] if n < FEW else []
    few += [f"{count} run{'s' * (count != 1)}: no interval from drawing runs"] if count < 3 else []
    result = []
    for kind, value, (low, high) in zip(KINDS, values, intervals):
        first, last = map(_plain, analytic(value, n, kind))
        result.append(correlation(kind, _plain(value), _plain(low), _plain(high), first, last, "; ".join(few)))
    return result


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def averages(correlations: list[Correlation]) -> list[dict]:
    """For each dataset that predicts, group and predictor: the Fisher-z mean of its coefficient with itself on the others."""
    names = ("pretrained_on", "measured_on", "group", "predictor", "kind")
    same: dict[tuple, list[Correlation]] = {}
    for c in correlations:
        if c.target == c.predictor and c.r is not None and c.dataset != c.measured_on:
            same.setdefault(tuple(getattr(c, name) for name in names), []).append(c)
    return [
        dict(zip(names, key)) | {"mean": fisher_mean([c.r or 0.0 for c in own]), "n": min(c.n for c in own),
                                 "per_dataset": {c.dataset: c.r for c in own}}
        for key, own in sorted(same.items())
    ]  # fmt: skip


def write(rows: list[dict], out: Path, *, seed: int = 0, reference: str | None = None) -> list[Correlation]:
    """results.csv (every row), correlations.csv and correlations.json in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    _write_csv(out / "results.csv", COLUMNS, sorted(rows, key=lambda r: tuple(str(r.get(c, "")) for c in COLUMNS)))
    correlations = correlate(rows, seed=seed, reference=reference)
    plain = [asdict(c) for c in correlations]
    _write_csv(out / "correlations.csv", tuple(Correlation.__dataclass_fields__), plain)
    content = {"correlations": plain, "averages": averages(correlations)}
    files.write(out / "correlations.json", json.dumps(content, indent=1) + "\n")
    return correlations
