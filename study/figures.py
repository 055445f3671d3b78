"""The pictures of results/paper.md, one a claim (the second shares the first's)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import EngFormatter, LogLocator

from manyview.study import claims
from manyview.study.claims import Row, Sample, Spread, cost, percent, select, values

MARKERS = "osD^v<>"
Lines = dict[str, dict[int, Sample]]  # {name: {D: accuracies}}


def projector(rows: list[Row], lines: Lines, untrained: Sample, spread: Spread, picture: Path) -> None:
    """Accuracy against D along each of `lines`, and against beta for each D."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    dims = values(rows, "projector_dim")
    for marker, (name, at) in zip(MARKERS, lines.items()):
        band(left, dims, list(at.values()), spread, name, marker)
    if untrained:
        left.axhline(float(np.mean(untrained)), color="grey", ls=":", label="untrained")
    left.set(xscale="log", xlabel="projector dimensions D", ylabel="linear, % (test)", title="1. Accuracy against D")
    ticks(left, dims, [str(d) for d in dims])
    for marker, d in zip(MARKERS, dims):
        x = values(select(rows, projector_dim=d), "beta")
        samples = [percent(rows, "held_out", projector_dim=d, beta=b) for b in x]
        band(right, x, samples, claims.spread(rows, "held_out"), f"D = {d}", marker)
    right.set(xscale="log", xlabel="beta", title="2. The best beta falls with D")
    right.set_ylabel("linear, % (held-out training)")
    left.legend()
    right.legend()
    save(figure, picture)


def convergence(points: list[Row], rows: list[Row], picture: Path) -> None:
    """Of the online probe while training; where there was none, of the budgets that runs were trained for."""
    label = "online linear, % (held-out training)" if points else "linear, % (test), one run a budget"
    points = points or [{**row, "step": row["steps"]} for row in rows]
    spread = claims.spread(points)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True)
    runs = sorted({(p["views"], p["batch_size"], p.get("projector_dim")) for p in points})
    several = len({d for *_, d in runs}) > 1
    for marker, (v, b, d) in zip(MARKERS, runs):
        mine, name = select(points, views=v, batch_size=b, projector_dim=d), f"V = {v}, {b} images a step"
        name += f", D = {d}" if several else ""
        steps = values(mine, "step")
        samples = [percent(mine, step=s) for s in steps]
        seconds = cost(select(rows, views=v, batch_size=b, projector_dim=d))
        for axis, scale in zip(axes, (v * b, 1, v * b * seconds)):
            band(axis, [s * scale for s in steps], samples, spread, name, marker)
    for axis, x in zip(axes, ("views seen", "steps", "core-seconds of training")):
        axis.set(xlabel=x, xscale="log")
        ticks(axis)
    axes[0].set(ylabel=label, title="3. More views, faster?")
    axes[2 if several else 0].legend(fontsize="small")  # a larger D costs time, and leaves room below
    save(figure, picture)


def images(rows: list[Row], spread: Spread, picture: Path) -> None:
    """Accuracy against images, for the budget that has most shares of them; error against time, of all."""
    most = max(values(rows, "budget"), key=lambda budget: len(values(select(rows, budget=budget), "fraction")))
    fractions, means = values(rows, "fraction"), []
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for color, (marker, (v, b)) in enumerate(zip(MARKERS, sorted({(r["views"], r["batch_size"]) for r in rows}))):
        mine, name = select(rows, views=v, batch_size=b), f"V = {v}, {b} images a step"
        samples = [percent(mine, fraction=f, budget=most) for f in fractions]
        band(left, fractions, samples, spread, name, marker)
        points = [
            (cost(mine) * at[0]["views_seen"], 100 - float(np.mean(percent(at))), 12 + 40 * math.sqrt(f / fractions[-1]))
            for budget in values(mine, "budget") for f in fractions if (at := select(mine, budget=budget, fraction=f))
        ]  # fmt: skip
        times, errors, sizes = zip(*points)
        right.scatter(times, errors, s=sizes, marker=marker, color=f"C{color}", label=name)
        means += list(zip(times, errors))
    # Of means: a front over single runs would be one over lucky seeds.
    right.step(*zip(*front(means)), where="post", color="0.4", linewidth=1, zorder=0, label="Pareto front")
    left.set(xlabel=f"share of the training images ({most:,} views seen)", title="4. Views against images")
    left.set(xscale="log", ylabel="linear, % (test)")
    ticks(left, fractions, [f"{100 * f:g}%" for f in fractions])
    right.set(xlabel="core-seconds of training", title="Error against time (larger: more images)")
    right.set(xscale="log", ylabel="error, %")
    ticks(right)
    left.legend()
    right.legend()
    save(figure, picture)


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (time, error) points that no other is better than in both, in order of time."""
    best: list[tuple[float, float]] = []
    for time, error in sorted(points):
        if not best or error < best[-1][1]:
            best.append((time, error))
    return best


def band(axis: Any, x: list[float], samples: list[Sample], spread: Spread, label: str, marker: str) -> None:
    """Means with intervals: as bars, or where there are many points as a shade."""
    points = [(a, spread.estimate(sample)) for a, sample in zip(x, samples) if sample]
    at, means = [a for a, _ in points], [e.mean for _, e in points]
    half = np.array([e.half if np.isfinite(e.half) else 0 for _, e in points])
    if len(points) > 7:
        (line,) = axis.plot(at, means, marker=marker, label=label)
        axis.fill_between(at, means - half, means + half, color=line.get_color(), alpha=0.12, lw=0)
    else:
        axis.errorbar(at, means, half, marker=marker, capsize=3, label=label)


def ticks(axis: Any, at: list[float] | None = None, labels: list[str] | None = None) -> None:
    """Of a logarithmic axis: where asked for, or plain numbers at 1, 2 and 5."""
    if at is not None:
        axis.set_xticks(at, labels, minor=False)
    else:
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.minorticks_off()


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
