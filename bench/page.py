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
