"""The waterfall as a PNG: where the time of one image goes, stage after stage."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from manyview.bench.expected import RESOURCES, loads
from manyview.bench.terminal import heading, number
from manyview.bench.verdict import costs_of, shape_of

DATA, TRAINING, TOTAL, SEEN, INK, MUTED = "#2f6db5", "#d9822b", "#9aa5b1", "#3e4c59", "#1f2933", "#7b8794"
TRAINED = ("normalize", "forward", "backward", "objective", "optimizer", "all-reduce")


def bars(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Stages of the resource that sets the pace, in the order of the pipeline: milliseconds an image, from where on.

    Stages under half a percent are one bar, `the rest`.
    """
    resource = report["bottleneck"]["resource"]
    stages = loads(costs_of(report), shape_of(report))[resource]
    total = sum(stages.values())
    rows, at, rest = [], 0.0, 0.0
    for name, ms in stages.items():
        if ms < 0.005 * total:
            rest += ms
            continue
        rows.append({"name": name, "ms": ms, "from": at, "share": ms / total, "training": name in TRAINED})
        at += ms
    if rest > 0.0005 * total:
        rows.append({"name": "the rest", "ms": rest, "from": at, "share": rest / total, "training": None})
    return rows


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the figure: a bar a stage, then what they make together, then what was observed."""
    rows = bars(report)
    together, resource = report["composed"], report["bottleneck"]["resource"]
    expected, observed = 1e3 / together["expected_images_per_s"], 1e3 / together["images_per_s"]
    names = [row["name"] for row in rows] + ["expected", "observed"]
    style: Any = {"font.size": 10, "font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": INK}
    with plt.rc_context(style):
        figure, ax = plt.subplots(figsize=(9.6, 2.06 + 0.36 * len(names)), dpi=150)
        span = max(expected, observed)
        for y, row in enumerate(rows):
            color = TOTAL if row["training"] is None else TRAINING if row["training"] else DATA
            ax.barh(y, row["ms"], left=row["from"], height=0.72, color=color, zorder=3)
            ax.plot([row["from"] + row["ms"]] * 2, [y + 0.36, y + 0.64], color=TOTAL, linewidth=0.8, zorder=2)
            _label(ax, y, row["from"] + row["ms"], span, f"{number(row['ms'])} ms", f"  {row['share']:.0%}")
        for y, ms, color, rate in (
            (len(rows), expected, TOTAL, together["expected_images_per_s"]),
            (len(rows) + 1, observed, SEEN, together["images_per_s"]),
        ):
            ax.barh(y, ms, height=0.72, color=color, zorder=3)
            _label(ax, y, ms, span, f"{number(ms)} ms", f"  {number(rate)} images/s")
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        ax.set_xlim(0, 1.3 * span)
        ax.set_xlabel(f"milliseconds of {RESOURCES[resource]} an image", color=MUTED, fontsize=9)
        ax.tick_params(axis="both", length=0, colors=INK)
        ax.tick_params(axis="x", colors=MUTED, labelsize=8.5)
        ax.grid(axis="x", color="#e4e7eb", linewidth=0.8, zorder=0)
        for side in ax.spines.values():
            side.set_visible(False)
        title = f"{report['bottleneck']['stage']} sets the pace: {number(together['images_per_s'])} images/s, " \
                f"{number(together['images_per_s'] * report['shape']['views'])} views/s"  # fmt: skip
        figure.text(0.015, 1 - 0.16 / figure.get_figheight(), title, fontsize=13, fontweight="bold", va="top")
        figure.text(0.015, 1 - 0.46 / figure.get_figheight(), _subtitle(report), fontsize=8.5, color=MUTED, va="top")
        _legend(figure, rows)
        figure.subplots_adjust(
            left=0.105, right=0.985, top=1 - 0.98 / figure.get_figheight(), bottom=0.55 / figure.get_figheight()
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)


def _label(ax: Any, y: int, x: float, span: float, text: str, more: str) -> None:
    drawn = ax.annotate(text, (x + 0.008 * span, y), va="center", fontsize=9.5, color=INK)
    ax.annotate(more, (1, 0.5), xycoords=drawn, va="center", fontsize=9.5, color=MUTED)


def _subtitle(report: dict[str, Any]) -> str:
    text = textwrap.fill(heading(report), 125)
    if not report["noise"]["certified"]:
        text += "\nNOT CERTIFIED: " + "; ".join(report["noise"]["reasons"])
    return text


def _legend(figure: Any, rows: list[dict[str, Any]]) -> None:
    kinds = [(DATA, "data path")] * any(row["training"] is False for row in rows)
    kinds += [(TRAINING, "training")] * any(row["training"] is True for row in rows)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color, _ in kinds]
    figure.legend(handles, [name for _, name in kinds], loc="lower right", ncols=2, frameon=False, fontsize=9,
                  handlelength=0.9, handleheight=0.9, bbox_to_anchor=(0.99, 0.0))  # fmt: skip
