"""Pictures of a run, drawn from metrics.jsonl while it trains and when it ends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from manyview.pipeline import files
from manyview.training.monitor import read_metrics

STYLE: Any = {
    "figure.figsize": (6.4, 3.8), "figure.dpi": 130, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "legend.frameon": False, "lines.linewidth": 1.6,
}  # fmt: skip
Columns = dict[str, np.ndarray]


def draw(run: Path) -> None:
    """Write loss.png, accuracy.png, collapse.png and throughput.png into run/plots; each needs rows that have its numbers."""
    rows = read_metrics(run / "metrics.jsonl")
    steps, probes = ([row for row in rows if key in row] for key in ("loss", "knn"))
    (run / "plots").mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        if len(steps) > 1:
            columns = _columns(steps)
            for name, picture in (("loss", _loss), ("collapse", _collapse), ("throughput", _throughput)):
                _save(partial(picture, of=columns), run / "plots" / f"{name}.png")
        if probes:
            _save(partial(_accuracy, of=_columns(probes)), run / "plots" / "accuracy.png")


def _columns(rows: list[dict[str, Any]]) -> Columns:
    """The numbers of the rows by name; NaN where one was not finite."""
    names = [name for name, value in rows[0].items() if not isinstance(value, dict)]
    return {name: np.array([row.get(name) for row in rows], float) for name in names}


def _save(draw_on: Callable[[Figure], None], path: Path) -> None:
    """As PNG, whole or not at all. Not through pyplot, which draws a figure twice to save it once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure()
    draw_on(figure)
    figure.tight_layout()
    with files.whole(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})


def _smooth(y: np.ndarray) -> np.ndarray:
    """Running mean over about a twentieth of the run; its ends use what is there."""
    width = max(1, len(y) // 20)
    kernel = np.ones(width)
    return np.convolve(y, kernel, "same") / np.convolve(np.ones_like(y), kernel, "same")


def _twin(ax: Axes) -> Axes:
    """A second axis of values, on the right."""
    twin = ax.twinx()
    twin.grid(False)
    twin.spines["right"].set_visible(True)
    return twin


def _loss(figure: Figure, of: Columns) -> None:
    ax = figure.subplots()
    for key, label in (("loss", "total"), ("invariance", "invariance"), ("decorrelation", "decorrelation (weighted)")):
        line = ax.plot(of["step"], of[key], alpha=0.25, linewidth=0.8)[0]
        ax.plot(of["step"], _smooth(of[key]), color=line.get_color(), label=label)
    if (of["loss"] > 0).all():
        ax.set_yscale("log")
    ax.set(title="Loss", xlabel="step", ylabel="loss per batch")
    ax.legend()


def _accuracy(figure: Figure, of: Columns) -> None:
    axes = figure.subplots(1, 2, sharey=True)
    for ax, x, label in (
        (axes[0], of["seconds"] / 60, "training time (minutes)"), (axes[1], of["views"] / 1e6, "views seen (millions)")
    ):  # fmt: skip
        for name, text in (("knn", "kNN"), ("linear", "linear")):
            ax.plot(x, 100 * of[name], marker="o", markersize=3, label=text)
        ax.set_xlabel(label)
        ax.locator_params(axis="x", nbins=4)  # half a picture wide, and numbers as long as 0.0125
    axes[0].set(title="Online probes, training images", ylabel="accuracy (%)")
    axes[0].legend()


def _collapse(figure: Figure, of: Columns) -> None:
    ax = figure.subplots()
    ax.plot(of["step"], of["rank"], label="effective rank", color="C0")
    ax.set(title="Collapse watch: embeddings of one view", xlabel="step", ylabel="effective rank (dimensions)")
    ax.set_ylim(0, None)
    twin = _twin(ax)
    twin.plot(of["step"], of["spread"], color="C1", label="median spread")
    twin.set(ylabel="median std of a dimension", ylim=(0, None))
    lines = [*ax.lines, *twin.lines]
    ax.legend(lines, [str(line.get_label()) for line in lines], loc="lower right")


def _throughput(figure: Figure, of: Columns) -> None:
    ax = figure.subplots()
    ax.plot(of["step"], of["views_per_s"], label="views/s", color="C0")
    ax.set(title="Throughput", xlabel="step", ylabel="views per second", ylim=(0, None))
    twin = _twin(ax)
    twin.fill_between(of["step"], 100 * of["data_wait"], color="C3", alpha=0.3, label="waiting for data")
    twin.set(ylabel="share of time waiting for data (%)", ylim=(0, 100))
    ax.legend([ax.lines[0], twin.collections[0]], ["views/s", "waiting for data"], loc="center right")


def spectrum(eigenvalues: np.ndarray, path: Path, title: str) -> None:
    """Eigenvalues of a feature covariance, largest first, on log-log axes, beside the 1/i line that alpha-ReQ favours."""
    values = eigenvalues[eigenvalues > eigenvalues[0] * 1e-9]
    rank = np.arange(1, len(values) + 1)

    def draw_on(figure: Figure) -> None:
        ax = figure.subplots()
        ax.loglog(rank, values / values[0], label="features")
        ax.loglog(rank, 1.0 / rank, "--", color="grey", linewidth=1, label="1 / i")
        ax.set(title=title, xlabel="component i", ylabel="eigenvalue / largest")
        ax.legend()

    with matplotlib.rc_context(STYLE):
        _save(draw_on, path)
