"""results/paper.md and its pictures from the committed CSVs of the studies: python tools/report.py"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # the checkout on the path instead of this folder, whose profile.py would hide the library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from manyview.pipeline.errors import run
from manyview.study import report


@dataclass
class Options:
    """Write the page about the paper's claims from the studies' CSVs."""

    studies: tyro.conf.Positional[tuple[Path, ...]] = tuple(
        Path(f"study/paper-{name}.yaml") for name in ("cpu", "muon", "ladder", "cuda")
    )
    """Study files; the rows of NAME.yaml are read from NAME.csv beside --out."""
    out: Path = Path("results/paper.md")
    """The page; pictures go into paper/ beside it."""
    check: bool = False
    """Fail unless training beats the untrained network everywhere and strong decorrelation beats weak at the smallest D."""


def main() -> int:
    options = tyro.cli(Options, description=__doc__)
    return report.main(list(options.studies), options.out, options.check)


if __name__ == "__main__":
    run(main)
