"""The report of `stages` as one HTML file that needs nothing else (no script, no font, no picture from anywhere), and its
waterfall as a PNG: where the time of one image goes, stage after stage."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from manyview.bench import view
from manyview.bench.expected import RESOURCES
from manyview.bench.output import number, quantity

COLORS = {"data": "#2f6db5", "train": "#d9822b", "rest": "#9aa5b1", "expected": "#9aa5b1", "observed": "#3e4c59"}
KINDS = {"data": "data path", "train": "training"}


def html(report: dict[str, Any]) -> str:
    """A whole page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "quantity": quantity, "code": code}
    said = report["verdict"].split("): ", 1)[1] if not report["noise"]["certified"] else report["verdict"]
    page, said = environment.get_template("page.html"), said[0].upper() + said[1:]
    everything = json.dumps(report, indent=1)
    return page.render(report=report, view=view, resources=RESOURCES, said=said, everything=everything)


def code(text: str) -> Markup:
    """Text with `words` in backquotes as code."""
    pieces = enumerate(text.split("`"))
    return Markup("").join(Markup("<code>{}</code>").format(piece) if i % 2 else piece for i, piece in pieces)


def waterfall(report: dict[str, Any], path: Path) -> None:
    """Write the picture: a bar a stage, then what they make together, then what was observed."""
    rows, bottleneck = view.bars(report), report["bottleneck"]
    figure, ax = plt.subplots(figsize=(9.6, 2.06 + 0.36 * len(rows)), dpi=150, layout="constrained")
    starts, lengths, colors = [r["from"] for r in rows], [r["ms"] for r in rows], [COLORS[r["kind"]] for r in rows]
    bars = ax.barh([r["name"] for r in rows], lengths, left=starts, height=0.72, color=colors, zorder=3)
    ax.bar_label(bars, [f"{number(r['ms'])} ms  {r['more']}" for r in rows], padding=5, fontsize=9.5)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.3 * max(lengths[-2:]))
    ax.set_xlabel(f"milliseconds of {RESOURCES[bottleneck['resource']]} an image")
    ax.tick_params(length=0)
    ax.grid(axis="x", color="#e4e7eb", zorder=0)
    ax.spines[:].set_visible(False)
    rate = view.rate(report["composed"]["images_per_s"], report["shape"]["views"])
    figure.suptitle(f"{bottleneck['stage']} sets the pace: {rate}", x=0.01, ha="left", fontsize=13, fontweight="bold")
    subtitle = textwrap.fill(view.heading(report), 125)
    if not report["noise"]["certified"]:
        subtitle += "\nNOT CERTIFIED: " + "; ".join(report["noise"]["reasons"])
    ax.set_title(subtitle, x=-0.08, loc="left", fontsize=8.5, color="#7b8794")
    kinds = [kind for kind in KINDS if any(r["kind"] == kind for r in rows)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[kind]) for kind in kinds]
    labels = [KINDS[kind] for kind in kinds]
    figure.legend(handles, labels, loc="outside lower right", ncols=2, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
