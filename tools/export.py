"""Export a run's backbone: python tools/export.py runs/NAME --to timm|hub|torchvision|onnx

python tools/export.py runs/NAME/checkpoints/step-000001000.pt --to onnx              a checkpoint of the run
python tools/export.py timm:resnet50 --weights dino.pth:teacher --to onnx             what others trained
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # the checkout on the path instead of this folder, whose profile.py would hide the library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from manyview.model import card
from manyview.model.export import export
from manyview.pipeline import errors


@dataclass
class Config:
    source: Annotated[str, tyro.conf.Positional]
    """A run directory, one of its checkpoints (.pt), a backbone.safetensors, timm:NAME or torchvision:NAME."""
    to: Literal["timm", "hub", "torchvision", "onnx"] = "timm"
    """The library that shall load it; it is loaded there and its features compared before anything is said. hub: a folder
    with weights, timm's config.json and a model card, as the Hugging Face hub has them."""
    out: Path | None = None
    """The file (of hub: the folder) to write; by default in export/ beside the weights."""
    weights: str | None = None
    """A file of someone else's for timm:NAME or torchvision:NAME, instead of the download: FILE, or FILE:teacher."""
    push: str = ""
    """With --to hub: also upload the folder to this repository (OWNER/NAME) of the Hugging Face hub."""


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    if config.push and config.to != "hub":
        raise errors.UserError(f"--push goes with --to hub, not {config.to}")
    file, snippet, difference = export(config.source, config.to, config.out, config.weights)
    print(snippet)
    checked = f"features differ from ours by {difference:.0e} of the largest at most"
    if difference is None:
        checked = "not compared with ours, which needs: pip install onnxruntime"
    print(f"# {file}: {checked}")
    if config.push:
        print(f"# {card.push(file, config.push)}")


if __name__ == "__main__":
    errors.run(main)
