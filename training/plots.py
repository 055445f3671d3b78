"""Pictures of a run, drawn from metrics.jsonl while it trains and when it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from manyview.pipeline import files
from manyview.training.monitor import read_metrics

STYLE: Any = {
    "figure.figsize": (6.4, 3.8),
    "figure.dpi": 130,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


def draw(run: Path) -> None:
    """Write loss.png, accuracy.png, collapse.png and throughput.png into run/plots; each needs rows that have its numbers."""
    rows = read_metrics(run / "metrics.jsonl")
    steps = [r for r in rows if "loss" in r]
    probes = [r for r in rows if "knn" in r]
    (run / "plots").mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        if len(steps) > 1:
            _loss(run, steps)
            _collapse(run, steps)
            _throughput(run, steps)
        if probes:
            _accuracy(run, probes)


def _column(rows: list[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([r[key] for r in rows], dtype=float)


def _smooth(y: np.ndarray) -> np.ndarray:
    """Running mean over about a twentieth of the run; its ends use what is there."""
    width = max(1, len(y) // 20)
    kernel = np.ones(width)
    return np.convolve(y, kernel, "same") / np.convolve(np.ones_like(y), kernel, "same")


def save(path: Path) -> None:
    """The current figure as PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.tight_layout()
    with files.whole(path) as file:
        plt.savefig(file, format="png", metadata={"Software": None})
    plt.close()


def _loss(run: Path, rows: list[dict[str, Any]]) -> None:
    x = _column(rows, "step")
    _, ax = plt.subplots()
    for key, label in (("loss", "total"), ("invariance", "invariance"), ("decorrelation", "decorrelation (weighted)")):
        y = _column(rows, key)
        line = ax.plot(x, y, alpha=0.25, linewidth=0.8)[0]
        ax.plot(x, _smooth(y), color=line.get_color(), label=label)
    if (_column(rows, "loss") > 0).all():
        ax.set_yscale("log")
    ax.set(title="Loss", xlabel="step", ylabel="loss per batch")
    ax.legend()
    save(run / "plots" / "loss.png")


def _accuracy(run: Path, rows: list[dict[str, Any]]) -> None:
    _, axes = plt.subplots(1, 2, sharey=True)
    for ax, key, factor, label in (
        (axes[0], "seconds", 1 / 60, "training time (minutes)"),
        (axes[1], "views", 1e-6, "views seen (millions)"),
    ):
        x = _column(rows, key) * factor
        for name, text in (("knn", "kNN"), ("linear", "linear")):
            ax.plot(x, 100 * _column(rows, name), marker="o", markersize=3, label=text)
        ax.set_xlabel(label)
        ax.locator_params(axis="x", nbins=4)  # half a picture wide, and numbers as long as 0.0125
    axes[0].set(title="Online probes, training images", ylabel="accuracy (%)")
    axes[0].legend()
    save(run / "plots" / "accuracy.png")


def _collapse(run: Path, rows: list[dict[str, Any]]) -> None:
    _, ax = plt.subplots()
    x = _column(rows, "step")
    ax.plot(x, _column(rows, "rank"), label="effective rank", color="C0")
    ax.set(
        title="Collapse watch: embeddings of one view",
        xlabel="step",
        ylabel="effective rank (dimensions)",
        ylim=(0, None),
    )
    twin = ax.twinx()
    twin.plot(x, _column(rows, "spread"), color="C1", label="median spread")
    twin.set(ylabel="median std of a dimension", ylim=(0, None))
    twin.grid(False)
    twin.spines["right"].set_visible(True)
    lines = [*ax.lines, *twin.lines]
    ax.legend(lines, [str(line.get_label()) for line in lines], loc="lower right")
    save(run / "plots" / "collapse.png")


def _throughput(run: Path, rows: list[dict[str, Any]]) -> None:
    _, ax = plt.subplots()
    x = _column(rows, "step")
    ax.plot(x, _column(rows, "views_per_s"), label="views/s", color="C0")
    ax.set(title="Throughput", xlabel="step", ylabel="views per second", ylim=(0, None))
    twin = ax.twinx()
    twin.fill_between(x, 100 * _column(rows, "data_wait"), color="C3", alpha=0.3, label="waiting for data")
    twin.set(ylabel="share of time waiting for data (%)", ylim=(0, 100))
    twin.grid(False)
    twin.spines["right"].set_visible(True)
    ax.legend([ax.lines[0], twin.collections[0]], ["views/s", "waiting for data"], loc="center right")
    save(run / "plots" / "throughput.png")


def spectrum(eigenvalues: np.ndarray, path: Path, title: str) -> None:
    """Eigenvalues of a feature covariance, largest first, on log-log axes, beside the 1/i line that alpha-ReQ favours."""
    values = eigenvalues[eigenvalues > eigenvalues[0] * 1e-9]
    rank = np.arange(1, len(values) + 1)
    with plt.rc_context(STYLE):
        _, ax = plt.subplots()
        ax.loglog(rank, values / values[0], label="features")
        ax.loglog(rank, 1.0 / rank, "--", color="grey", linewidth=1, label="1 / i")
        ax.set(title=title, xlabel="component i", ylabel="eigenvalue / largest")
        ax.legend()
        save(path)
