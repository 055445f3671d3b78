"""The report of `stages` as one HTML file that needs nothing else: no script, no font, no picture from anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from manyview.bench import view
from manyview.bench.expected import RESOURCES
from manyview.bench.output import number, quantity

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 250, 170, 42, 24, 30  # of a plot, and of the margins around its axes


def html(report: dict[str, Any]) -> str:
    """A whole page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "quantity": quantity, "code": code}
    said = report["verdict"].split("): ", 1)[1] if not report["noise"]["certified"] else report["verdict"]
    return environment.get_template("page.html").render(
        report=report, view=view, resources=RESOURCES, plots=plots(report), said=said[0].upper() + said[1:],
        everything=json.dumps(report, indent=1),
    )  # fmt: skip


def code(text: str) -> Markup:
    """Text with `words` in backquotes as code."""
    pieces = enumerate(text.split("`"))
    return Markup("").join(Markup("<code>{}</code>").format(piece) if i % 2 else piece for i, piece in pieces)


def plots(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What other settings brought, one plot a setting: the cost of views with its law, and rates with the knee marked."""
    sweep = report.get("sweep")
    if not sweep:
        return []
    charts, fit = [], sweep["fit"]
    if fit:
        charts.append(
            plot(
                "views an image", list(zip(fit["views"], fit["core_ms"])), "core-ms an image", law=(fit["a"], fit["b"])
            )
        )
    for name in ("threads", "batch", "prefetch"):
        points = [(p["value"], p["images_per_s"]) for p in sweep["lines"][name]]
        if len(points) > 1:
            charts.append(plot(name, points, "images/s", knee=sweep["knees"][name]))
    return charts


def plot(
    title: str,
    points: list[tuple[float, float]],
    unit: str,
    law: tuple[float, float] | None = None,
    knee: float | None = None,
) -> dict[str, Any]:
    """A small line chart from zero up, in pixels; `law`: (a, b) of a fitted a + b x; `knee`: the x of the point to mark."""
    points = sorted(points)
    x_top, y_top = max(x for x, _ in points), 1.12 * max(y for _, y in points)

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (WIDTH - LEFT - 12) / x_top, (HEIGHT - BOTTOM - TOP) / y_top
        return round(LEFT + across * x, 1), round(HEIGHT - BOTTOM - up * y, 1)

    line = [(0.0, law[0]), (x_top, law[0] + law[1] * x_top)] if law else points
    path = " ".join(f"{'L' if i else 'M'}{x} {y}" for i, (x, y) in enumerate(at(*point) for point in line))
    marks = [{"at": at(x, y), "text": f"{x:g}", "knee": x == knee} for x, y in points]
    ticks = [{"y": at(0, y)[1], "text": number(y)} for y in (0, y_top / 2.24, y_top / 1.12)]
    return {"title": title, "unit": unit, "path": path, "marks": marks, "ticks": ticks, "width": WIDTH, "height": HEIGHT,
            "left": LEFT}  # fmt: skip
