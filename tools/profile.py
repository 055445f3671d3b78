"""Measure: python tools/profile.py NAME --help"""

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

MEASUREMENTS = {  # name: what it measures
    "stages": "the bottleneck, and what would fix it",
    "diff": "two profiles of `stages`",
    "capacity": "what a bigger run will need, from a profile",
    "peers": "views a second beside other pipelines",
    "objective": "the losses beside the pairwise form",
    "step": "the training step beside a bare one",
    "memory": "peak memory by views and chunks",
    "trainer": "the last two, as results/trainer.md",
    "shards": "conversion and reading beside their peers",
    "plan": "what many machines ask of the storage",
    "bucket": "what a bucket gives, cold and warm",
    "probes": "how long evaluation's probes take",
}
MODULES = {"plan": "scale"}  # where a module is called otherwise: `plan` is the order of samples everywhere else


def main() -> int | None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(f"{__doc__}\n\nNAME is one of\n")
        print("\n".join(f"  {name:<11} {about}" for name, about in MEASUREMENTS.items()))
        return 0
    name = sys.argv[1]
    if name not in MEASUREMENTS:
        raise UserError(nearest("measurement", name, MEASUREMENTS))
    return importlib.import_module(f"manyview.bench.{MODULES.get(name, name)}").main(sys.argv[2:])


if __name__ == "__main__":
    run(main)
