"""Export a run's backbone: `python tools/export.py runs/NAME --to timm|torchvision|onnx`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # the checkout on the path instead of this folder, whose profile.py would hide the library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from manyview.model.export import export
from manyview.pipeline import errors


@dataclass
class Config:
    source: Annotated[Path, tyro.conf.Positional]
    """A run directory, or a backbone.safetensors."""
    to: Literal["timm", "torchvision", "onnx"] = "timm"
    """The library that shall load it; it is loaded there and its features compared before anything is said."""
    out: Path | None = None
    """The file to write; by default in export/ beside the weights."""


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    file, snippet, difference = export(config.source, config.to, config.out)
    print(snippet)
    checked = f"features differ from ours by {difference:.0e} of the largest at most"
    if difference is None:
        checked = "not compared with ours, which needs: pip install onnxruntime"
    print(f"# {file}: {checked}")


if __name__ == "__main__":
    errors.run(main)
