"""Accuracy for every core-second, ours and others': python tools/ladder.py [--only ours pixels --core-hours 0.1]

Makes the rows of study/ladder.yaml that results/ladder.csv lacks and writes results/ladder.md. Resumable: a killed run
goes on from its checkpoint, and rows that are there are not made again. See study/ladder.py.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as train.py, and like there before torch is loaded
os.environ.setdefault("OMP_NUM_THREADS", "1")
if __name__ == "__main__":  # the checkout on the path instead of this folder, whose profile.py would hide the library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import tyro

from manyview.pipeline import files
from manyview.pipeline.errors import UserError, nearest, run
from manyview.pipeline.machine import tune
from manyview.study import ladder


@dataclass
class Options:
    """Make the ladder's missing rows, then its page."""

    ladder: tyro.conf.Positional[Path] = Path("study/ladder.yaml")
    """YAML file of rows."""
    data: Path | None = None
    """Shards of CIFAR-10; default what the file says."""
    only: tuple[str, ...] = ()
    """Rows by name; default all."""
    core_hours: tuple[float, ...] = ()
    """Rungs; default all."""
    seeds: tuple[int, ...] = ()
    """Seeds; default all."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of every row that trains: bf16 or fp32, or auto as train.py has it."""
    runs: Path = Path("runs/ladder")
    """Where the runs are kept."""
    out: Path = Path("results/ladder.csv")
    """One line a row; the page beside it."""
    report: bool = False
    """Write the page from the rows that are there, and make none."""


def main() -> int:
    options = tyro.cli(Options, description=__doc__)
    asked = ladder.read(options.ladder, options.data)
    names = {row.name for row in asked.rows}
    for name in options.only:
        if name not in names:
            raise UserError(nearest("row", name, names))
    named = [row for row in asked.rows if row.name in (options.only or names)]
    todo = [row for row in named if row.core_hours in (options.core_hours or [row.core_hours])]
    todo = [row for row in todo if row.seed in (options.seeds or [row.seed])]
    if not todo:
        rungs = ", ".join(dict.fromkeys(f"{row.core_hours:g}" for row in named))
        raise UserError(f"no row has these --core-hours and --seeds; rungs of the rows asked for: {rungs}")
    torch.set_num_threads(1)
    tune(torch.device("cpu"))
    failed = 0 if options.report else ladder.run(asked, options.out, options.runs, todo, options.precision)
    page = options.out.with_suffix(".md")
    files.write(page, ladder.report(asked, options.out, f"python tools/ladder.py {shlex.quote(str(options.ladder))}"))
    print(page)
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
