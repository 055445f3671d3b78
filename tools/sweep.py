"""A grid of training runs, one CSV row a run: python tools/sweep.py study/paper-cpu.yaml [--jobs 2]

Resumable: rows that are there are not run again, and a killed run goes on from its checkpoint. See study/sweep.py.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as train.py, and like there before torch is loaded
if __name__ == "__main__":  # the checkout on the path instead of this folder, whose profile.py would hide the library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from manyview.pipeline.errors import UserError, run
from manyview.study import sweep


@dataclass
class Options:
    """Run a grid of settings and write one row a run."""

    study: tyro.conf.Positional[Path]
    """YAML file: what every run shares, the probe, the grids."""
    out: Path | None = None
    """CSV file; default results/NAME-OF-THE-STUDY.csv."""
    folder: Path = Path("runs/studies")
    """Where the runs are kept."""
    jobs: int = 1
    """Runs at a time; each gets its share of the cores."""


def main() -> int:
    options = tyro.cli(Options, description=__doc__)
    if options.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {options.jobs}")
    study = sweep.read(options.study)
    out = options.out or Path("results") / f"{study.name}.csv"
    failed = sweep.run(study, out, options.folder, options.jobs)
    sweep.curves(study, options.folder, out.with_suffix(".curves.csv"))
    print(f"{out}: {len(sweep.finished(study, out))} of {len(study.runs)} rows", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
