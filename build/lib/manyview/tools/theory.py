"""Compute and draw results/theory.png: `python tools/theory.py`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # the checkout on the path instead of this folder, whose profile.py would hide the library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from manyview.bench import theory
from manyview.pipeline import errors


def main() -> None:
    theory.main(sys.argv[1:])


if __name__ == "__main__":
    errors.run(main)
