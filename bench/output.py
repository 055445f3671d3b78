"""How measurements are asked for and told: arguments, numbers as text, tables, and results as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import json
import math
import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import tyro

from manyview.pipeline.errors import UserError
from manyview.training import monitor

VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX", "sve": "SVE", "asimd": "NEON"}  # the kernel's flags
Args = TypeVar("Args")
Row = dict[str, Any]


def parse(kind: type[Args], argv: list[str], about: str | None, name: str, **least: float) -> Args:
    """The arguments of `profile.py NAME`. UserError, a line for each number that is not finite or below its `least` (where
    that is under 1: positive), or of which one of several is."""
    args, errors = tyro.cli(kind, args=argv, description=about, prog=f"profile.py {name}"), []
    for field, low in least.items():
        values = np.atleast_1d(getattr(args, field))
        if not len(values) or not all(low <= value < math.inf for value in values):
            bound = f"at least {low:g}" if low >= 1 or low == 0 else "positive"
            errors.append(f"--{field.replace('_', '-')} must be {bound}, not {' '.join(f'{v:g}' for v in values)}")
    if errors:
        raise UserError("\n".join(errors))
    return args


def whole_numbers(flag: str, text: str, least: int) -> list[int]:
    """`1,2,4` -> [1, 2, 4], ascending."""
    try:
        values = sorted({int(part) for part in text.split(",")})
    except ValueError:
        values = []
    if not values or values[0] < least:
        raise UserError(f"{flag} {text}: expected whole numbers from {least} on, separated by commas")
    return values


def environment(device: torch.device, name: str, argv: list[str]) -> Row:
    """Who measured what: commit, versions, hardware, the load when it began, and the command `profile.py NAME`.

    `vectors`: the widest vector instructions; a speed belongs to them as much as to the processor's name."""
    command, info = shlex.join(["tools/profile.py", name, *argv]), Path("/proc/cpuinfo")
    words = info.read_text().split() if info.exists() else []
    vectors = next((name for flag, name in VECTORS.items() if flag in words), "")
    return monitor.environment(device) | {"command": command, "vectors": vectors, "load": os.getloadavg()[0]}


def hardware(env: Row) -> str:
    """Processor and its vector instructions; pages of earlier results have none."""
    return ", ".join(filter(None, (env["device"], env.get("vectors"))))


def settings(args: Any) -> Row:
    """The arguments as JSON takes them."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(args).items()}


def version(package: str) -> str | None:
    try:
        return installed(package)
    except PackageNotFoundError:
        return None


def write(path: Path | None, result: Any, page: str = "", rows: Sequence[Row] = ()) -> None:
    """`result` as JSON into `path`; beside it, under the same name, the page as .md and the rows as .csv, where given."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    if page:
        path.with_suffix(".md").write_text(page.rstrip("\n") + "\n")
    if rows:
        write_csv(path.with_suffix(".csv"), rows)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def table(head: Sequence[object], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """Markdown; all columns but the first `left` are aligned to the right."""
    rule = ["---" if i < left else "--:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, rule, *rows))


def document(*parts: str) -> str:
    """Paragraphs, titles and tables as one page; empty parts are left out."""
    return "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"


def by(rows: Iterable[Row], *keys: str) -> dict[Any, list[Row]]:
    """Rows in groups that agree in `keys`, in order of appearance; a group's name is a tuple where keys are several."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        name = tuple(row[key] for key in keys)
        groups.setdefault(name if len(keys) > 1 else name[0], []).append(row)
    return groups


def number(x: float) -> str:
    """Three figures, thousands separated: 0.012, 1.23, 12.3, 1,234, 8.6 M; 0 where it is too small to matter."""
    if x >= 999_500:
        return f"{x / 1e6:.3g} M" if x < 999.5e6 else f"{x / 1e9:.3g} G"
    if x >= 99.95:
        return f"{x:,.0f}"
    return "0" if abs(x) < 5e-4 else f"{x:.3f}" if abs(x) < 0.0995 else f"{x:.3g}"


def quantity(x: float, unit: str) -> str:
    """`1.2 GB/s`, `95 Mpx/s`, `3.4 TFLOP/s`."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= factor:
            return f"{x / factor:.3g} {prefix}{unit}"
    return f"{x:.3g} {unit}"
