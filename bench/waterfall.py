"""The waterfall as a PNG: where the time of one image goes, stage after stage."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from manyview.bench import view
from manyview.bench.expected import RESOURCES
from manyview.bench.output import number

INK, MUTED, LINE = "#1f2933", "#7b8794", "#9aa5b1"
COLORS = {"data": "#2f6db5", "train": "#d9822b", "rest": LINE, "expected": LINE, "observed": "#3e4c59"}
KINDS = {"data": "data path", "train": "training"}


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the figure: a bar a stage, then what they make together, then what was observed."""
    rows = view.bars(report)
    style: Any = {"font.size": 10, "font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": INK}
    with plt.rc_context(style):
        figure, ax = plt.subplots(figsize=(9.6, 2.06 + 0.36 * len(rows)), dpi=150)
        span = max(row["ms"] for row in rows[-2:])
        for y, row in enumerate(rows):
            end = row["from"] + row["ms"]
            ax.barh(y, row["ms"], left=row["from"], height=0.72, color=COLORS[row["kind"]], zorder=3)
            if y < len(rows) - 2:
                ax.plot([end] * 2, [y + 0.36, y + 0.64], color=LINE, linewidth=0.8, zorder=2)
            label = ax.annotate(f"{number(row['ms'])} ms", (end + 0.008 * span, y), va="center", fontsize=9.5)
            ax.annotate(f"  {row['more']}", (1, 0.5), xycoords=label, va="center", fontsize=9.5, color=MUTED)
        ax.set_yticks(range(len(rows)), [row["name"] for row in rows])
        ax.invert_yaxis()
        ax.set_xlim(0, 1.3 * span)
        ax.set_xlabel(
            f"milliseconds of {RESOURCES[report['bottleneck']['resource']]} an image", color=MUTED, fontsize=9
        )
        ax.tick_params(axis="both", length=0, colors=INK)
        ax.tick_params(axis="x", colors=MUTED, labelsize=8.5)
        ax.grid(axis="x", color="#e4e7eb", linewidth=0.8, zorder=0)
        ax.spines[:].set_visible(False)
        finish(figure, report, [kind for kind in KINDS if any(row["kind"] == kind for row in rows)])
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)


def finish(figure: Any, report: dict[str, Any], kinds: list[str]) -> None:
    """Title, what was measured, and the legend."""
    high = figure.get_figheight()
    rate = view.rate(report["composed"]["images_per_s"], report["shape"]["views"])
    subtitle = textwrap.fill(view.heading(report), 125)
    if not report["noise"]["certified"]:
        subtitle += "\nNOT CERTIFIED: " + "; ".join(report["noise"]["reasons"])
    title = f"{report['bottleneck']['stage']} sets the pace: {rate}"
    figure.text(0.015, 1 - 0.16 / high, title, fontsize=13, fontweight="bold", va="top")
    figure.text(0.015, 1 - 0.46 / high, subtitle, fontsize=8.5, color=MUTED, va="top")
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[kind]) for kind in kinds]
    figure.legend(handles, [KINDS[kind] for kind in kinds], loc="lower right", ncols=2, frameon=False, fontsize=9,
                  handlelength=0.9, handleheight=0.9, bbox_to_anchor=(0.99, 0.0))  # fmt: skip
    figure.subplots_adjust(left=0.105, right=0.985, top=1 - 0.98 / high, bottom=0.55 / high)
