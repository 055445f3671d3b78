"""Measure: python tools/profile.py NAME --help, with NAME one of stages, diff, capacity, peers, objective,
step, memory, trainer, jitter, throughput, shards, plan, bucket."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

# This folder must not be on the path: torch imports cProfile, which imports `profile`, and that must not be this file.
if __name__ == "__main__":  # the checkout on the path instead of this folder, whose profile.py would hide the library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as train.py, and like there before torch is loaded

from manyview.pipeline.errors import UserError, nearest, run

NAMES = (
    "bucket",
    "capacity",
    "diff",
    "jitter",
    "memory",
    "objective",
    "peers",
    "plan",
    "shards",
    "stages",
    "step",
    "throughput",
    "trainer",
)


def main() -> int | None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 0
    name = sys.argv[1]
    if name not in NAMES:
        raise UserError(nearest("measurement", name, NAMES))
    return importlib.import_module(f"manyview.bench.{name}").main(sys.argv[2:])


if __name__ == "__main__":
    run(main)
