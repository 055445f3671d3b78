"""Write, verify, list, index and import shards: `python tools/shards.py COMMAND --help`."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the checkout on the path instead of this folder, whose profile.py would hide the library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from manyview.pipeline import errors, store
from manyview.pipeline.convert import summary, verify
from manyview.pipeline.convert.index_foreign import index_foreign
from manyview.pipeline.convert.sources import Reading
from manyview.pipeline.convert.write import write_shards
from manyview.pipeline.errors import UserError
from manyview.pipeline.manifest import Options, read_manifest


@dataclass(kw_only=True)
class Common:
    jobs: int = 0
    """Processes; 0 = one a core. The result does not depend on it."""
    max_rejected: str = "1%"
    """Images that may be set aside before this counts as failed: a percentage or a fraction."""
    disjoint: bool = False
    """Splits may have no class in common (few-shot sets)."""


@dataclass(kw_only=True)
class Converted(Common):
    format: str = "webdataset"
    """webdataset (.tar) or ffcv (.beton)."""
    encoding: str = "jpeg"
    """jpeg, raw, yuv420, or array: any number of channels, 8 or 16 bits, every value as it is (docs/datasets.md). Images of 64
    pixels and under are always raw."""
    size: int = 0
    """Short side in pixels to shrink larger images to; 0 leaves them, and baseline JPEGs then keep their bytes."""
    unlabelled: bool = False
    """Folders are not classes, labels are not read."""

    def convert(self, options: Options, source: Path | None, out: Path, reading: Reading, executor="local") -> int:
        start, most = time.perf_counter(), fraction(self.max_rejected)
        manifest = write_shards(
            options, source, out, jobs=self.jobs, max_rejected=most, reading=reading, executor=executor
        )
        print(f"{summary.text(out, manifest)}\n{time.perf_counter() - start:.1f} s")
        return 0


@dataclass(kw_only=True)
class Write(Converted):
    """Convert a dataset to shards. Run again after any interruption: it goes on where it stopped."""

    dataset: str
    """imagenet, cifar10, folder ... (docs/datasets.md has them all), or shards (tars and betons)."""
    source: Path | None = None
    """The folder (or archives) the dataset lies in."""
    out: Path | None = None
    """Where the shards go: a folder (shards/DATASET if not given), or a bucket's address such as s3://bucket/name."""
    quality: int = 95
    """JPEG quality of images that must be encoded."""
    seed: int = 0
    """Of the order in which samples are laid down."""
    shard_mb: int = 0
    """Source megabytes a shard; 0 = a 64th of the source, between 16 and 256."""
    max_pixels: int = 100_000_000
    """Larger images are set aside. Each process may need 12 bytes a pixel of this (20 for colors of 16 bits): 1.2 GB."""
    white: float = 0.0
    """The value that becomes white in images of more than 8 bits: 4095 for 12 bits in files of 16. 0 = what the file's type
    holds, of which the upper 8 bits are kept."""
    labels: Path | None = None
    """A table of labels (csv, tsv, json, jsonl or text), a row an image. It labels the splits whose images it names."""
    name_column: str = ""
    """Its column of file names (with or without folders and suffix), if it has no usual name."""
    label_column: str = ""
    """Its column of labels, if it has no usual name or holds text of which no two are the same."""
    holdout: str = "0"
    """Of a source without test images, the share of each class (25%) that is kept from training as split val, by --seed."""
    check: str = "decode"
    """decode: every image completely, once. headers: trust JPEGs that begin and end as they should (a sixteenth is decoded
    for the statistics): 2.2 times as fast with 3.6 times less work for the cores (results/shards.md), for photos that were
    checked before; what is broken inside is met in training."""
    download: bool = False
    """Let torchvision fetch what is missing."""
    executor: str = "local"
    """local: processes of this machine. ray: a Ray cluster whose nodes share source and output (RAY_ADDRESS)."""

    def run(self) -> int:
        options = Options(
            self.dataset, self.format, self.encoding, self.size, self.quality, self.max_pixels, self.seed, self.shard_mb,
            self.unlabelled, self.check, white=self.white,
        )  # fmt: skip
        reading = Reading(
            self.download, labels=self.labels, columns=(self.name_column, self.label_column), disjoint=self.disjoint,
            holdout=fraction(self.holdout, "holdout"), seed=self.seed,
        )  # fmt: skip
        out = self.out or Path("shards") / self.dataset
        return self.convert(options, self.source, out, reading, self.executor)


@dataclass
class Verify:
    """Check shards against their manifest, index and checksums; every problem names shard and key. Exit 1 if any."""

    path: tyro.conf.Positional[Path]
    """The folder of shards, or a bucket's address."""

    def run(self) -> int:
        problems = verify.verify(self.path)
        for line in problems:
            print(line)
        manifest = read_manifest(self.path)
        print(f"{summary.text(self.path, manifest or {}).splitlines()[0]}: {len(problems)} problems")
        return 1 if problems else 0


@dataclass
class List:
    """Say what is in shards: splits, counts, sizes, statistics; with --records also single samples."""

    path: tyro.conf.Positional[Path]
    """The folder of shards, or a bucket's address."""
    records: int = 0
    """How many samples of each split to list."""

    def run(self) -> int:
        for split in store.splits(self.path):
            show(store.Store(self.path, split), self.records)
        print(summary.text(self.path, read_manifest(self.path) or {}))
        return 0


@dataclass(kw_only=True)
class Foreign(Common):
    """How tars and betons that others wrote are read."""

    image_part: str = ""
    """Of a sample's files (KEY.left.jpg, KEY.right.jpg) or a .beton's fields, the one that is the image: left.jpg."""
    label_part: str = ""
    """The one that is the class: cls, txt, fine.cls, or a field; folder for the last folder of its name, none for no
    labels. If not given: .cls, .label, .json or numbers in .txt; the field called label, or the only one of whole numbers."""
    allow_cut: bool = False
    """Take what there is of a tar that was cut off."""

    def reading(self) -> Reading:
        return Reading(disjoint=self.disjoint, image_part=self.image_part, label_part=self.label_part,
                       allow_cut=self.allow_cut)  # fmt: skip


@dataclass(kw_only=True)
class Index(Foreign):
    """Make tars and betons that exist readable where they are: a manifest and an index, nothing is copied."""

    source: tyro.conf.Positional[Path]
    """A .tar or .beton, or a folder of them."""
    out: Path | None = None
    """Where manifest and index go; the folder itself if not given."""

    def run(self) -> int:
        rejected = fraction(self.max_rejected)
        manifest = index_foreign(self.source, self.out, reading=self.reading(), jobs=self.jobs, max_rejected=rejected)
        print(summary.text(self.out or self.source, manifest))
        return 0


@dataclass(kw_only=True)
class Import(Foreign, Converted):
    """Convert existing tars, betons or shards of this program (another format, encoding or size)."""

    source: Path
    """A .tar or .beton, or a folder of them."""
    out: Path
    """Where the shards go."""

    def run(self) -> int:
        options = Options("shards", self.format, self.encoding, self.size, unlabelled=self.unlabelled)
        return self.convert(options, self.source, self.out, self.reading())


def fraction(text: str, what: str = "max-rejected") -> float:
    try:
        value = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UserError(f"{what} is a percentage (1%) or a fraction (0.01), not {text!r}")
    return value


def show(data: store.Store, records: int) -> None:
    known = sum(label >= 0 for label in set(data.labels.tolist()))
    print(
        f"{data.split}: {len(data):,} images of {known} classes in {len(data.shards)} {data.manifest['format']} shards, "
        f"{data.nbytes() / 1e6:,.1f} MB, {data.heights.min()}-{data.heights.max()} x {data.widths.min()}-"
        f"{data.widths.max()} pixels, mean {rounded(data.mean)}, std {rounded(data.std)}, "
        f"fingerprint {data.fingerprint[:12]}"
    )
    for i in range(min(records, len(data))):
        file = data.shards[data.shard_of[i]]["file"]
        print(f"  {i} {data.key(i)} label {data.labels[i]} {data.heights[i]}x{data.widths[i]} in {file}")


def rounded(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:.1f}" for value in values)


COMMANDS: dict[str, Any] = {"write": Write, "verify": Verify, "ls": List, "index": Index, "import": Import}


def main() -> int:
    return tyro.extras.subcommand_cli_from_dict(COMMANDS, config=(tyro.conf.OmitArgPrefixes,)).run()


if __name__ == "__main__":
    errors.run(main)
