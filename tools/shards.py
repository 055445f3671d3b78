"""Write, check, list, index and import shards. `python tools/shards.py write --help`."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from pipeline import errors, shards
from pipeline.errors import UserError


@dataclass
class Write:
    """Convert a dataset to shards. Run again after any interruption: it goes on where it stopped."""

    dataset: str
    """imagenet, imagenet100, cifar10, cifar100, stl10, fashion-mnist, digits or folder."""
    source: Path | None = None
    """The folder (or archives) the dataset lies in."""
    out: Path | None = None
    """Where the shards go; shards/DATASET if not given."""
    format: str = "webdataset"
    """webdataset (.tar) or ffcv (.beton)."""
    encoding: str = "jpeg"
    """jpeg, raw or yuv420. Images of 64 pixels and under are always raw."""
    size: int = 0
    """Short side in pixels to shrink larger images to; 0 leaves them, and baseline JPEGs then keep their bytes."""
    quality: int = 95
    """JPEG quality of images that must be encoded."""
    jobs: int = 0
    """Processes; 0 = one a core. The result does not depend on it."""
    seed: int = 0
    """Of the order in which samples are laid down."""
    shard_mb: int = 0
    """Source megabytes a shard; 0 = a 64th of the source, between 8 and 256."""
    max_rejected: str = "1%"
    """Images that may be set aside before the conversion counts as failed: a percentage or a fraction."""
    max_pixels: int = 100_000_000
    """Larger images are set aside."""
    unlabelled: bool = False
    """Folders are not classes."""
    download: bool = False
    """Let torchvision fetch what is missing."""

    def run(self) -> int:
        options = shards.Options(
            self.dataset, self.format, self.encoding, self.size, self.quality, self.max_pixels, self.seed, self.shard_mb,
            self.unlabelled,
        )  # fmt: skip
        out = self.out or Path("shards") / self.dataset
        start = time.perf_counter()
        manifest = shards.write(
            options, self.source, out, jobs=self.jobs, max_rejected=fraction(self.max_rejected), download=self.download
        )
        print(f"{summary(out, manifest)} in {time.perf_counter() - start:.1f} s")
        return 0


def fraction(text: str) -> float:
    try:
        value = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UserError(f"max-rejected is a percentage (1%) or a fraction (0.01), not {text!r}")
    return value


def summary(out: Path, manifest: dict) -> str:
    parts = [f"{split['count']:,} {name}" for name, split in manifest["splits"].items()]
    return f"{out}: {', '.join(parts)} images, {manifest['format']}, {manifest['rejected']} rejected"


def main() -> int:
    return tyro.extras.subcommand_cli_from_dict({"write": Write}, config=(tyro.conf.OmitArgPrefixes,)).run()


if __name__ == "__main__":
    errors.run(main)
