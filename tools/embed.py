"""Features of any images as a file: python tools/embed.py runs/NAME --data shards/x --to features.parquet

python tools/embed.py timm:resnet18.a1_in1k --data photos/ --to features.npz          a folder of image files, labels or none
python tools/embed.py runs/NAME --data shards/x --to x.parquet --layers last:4        the last four blocks, concatenated
Killed and started again, it goes on where it stopped. pandas, polars and DuckDB read the .parquet, numpy the .npz.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as train.py, and like there before torch is loaded
if __name__ == "__main__":  # the checkout on the path instead of this folder, whose profile.py would hide the library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass

import tyro

from manyview.evaluation import encoder
from manyview.evaluation.embed import embed
from manyview.pipeline import engines, errors


@dataclass(kw_only=True)
class Config(encoder.Asked):
    """Names, splits, labels where they are known, and features of images."""

    target: tyro.conf.Positional[str]
    """A run directory, a checkpoint (.pt), a .safetensors file, timm:NAME or torchvision:NAME."""
    data: Path
    """Shards, or a folder of image files: class folders, split folders, or any tree without labels."""
    to: Path
    """The file to write: .parquet or .npz."""
    split: str | None = None
    """Only this split; default: all there are."""
    batch: int = 256
    """Images a forward pass."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one."""
    engine: str = "auto"
    """What decodes shards: auto, cpu, dali, resident."""
    threads: int | None = None
    """That decode."""


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    if wrong := config.check() + [f"--batch must be at least 1, not {config.batch}"] * (config.batch < 1):
        raise errors.UserError("\n".join(wrong))
    loaded = encoder.load(config.target, config)
    print(f"encoder    {loaded.run}: {loaded.transform}")
    about = embed(loaded, config.data, config.to, split=config.split, batch=config.batch, threads=config.threads,
                  device=engines.device_of(config.device), engine=config.engine)  # fmt: skip
    print(f"{config.to}: {about['images']:,} images, {about['layers']} features")


if __name__ == "__main__":
    errors.run(main)
