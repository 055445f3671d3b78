"""Compute and draw results/theory.png: `python tools/theory.py`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipeline import errors
from profiling import theory

if __name__ == "__main__":
    errors.run(lambda: theory.main(sys.argv[1:]))
