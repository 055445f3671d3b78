"""Who converts photos to shards in `bench.shards`, ours and its peers, each by one call on the same photos."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from manyview.pipeline.convert.sources import folders
from manyview.pipeline.convert.write import CHECKS, Contents, _moments, write_shards
from manyview.pipeline.manifest import Options

Prepare = Callable[[Path, Path, int], Callable[[], object]]  # (source, target, jobs) -> what is timed


def photos(source: Path) -> list[tuple[str, int]]:
    """(path, label), in one fixed shuffled order: what every contender is given."""
    split = folders.folder(source).splits[0]
    root = source / "train" if (source / "train").is_dir() else source
    order = np.random.default_rng(0).permutation(len(split.names))
    return [(str(root / split.names[i]), int(split.labels[i])) for i in order]


def decode(data: bytes) -> np.ndarray:
    import simplejpeg

    return simplejpeg.decode_jpeg(data, "RGB")


def ours(format: str, check: str) -> Prepare:
    def prepare(source: Path, target: Path, jobs: int) -> Callable:
        import cv2  # noqa: F401  (what the workers would import)
        import numpy.random  # noqa: F401
        import tqdm  # noqa: F401

        return lambda: write_shards(Options("folder", format, check=check), source, target, jobs=jobs, quiet=True)

    return prepare


def shardwriter(work: Callable | None = None, post: Callable | None = None) -> Prepare:
    """`work`: done to each image's bytes; `post`: to each finished tar."""

    def prepare(source: Path, target: Path, jobs: int) -> Callable:
        import cv2
        import webdataset

        def part(files: list[tuple[str, int]], number: int) -> None:
            cv2.setNumThreads(0)
            tars = str(target / f"{number}-%05d.tar")
            with webdataset.ShardWriter(tars, maxcount=80, verbose=0, post=post) as writer:
                for i in range(number, len(files), jobs):
                    path, label = files[i]
                    data = Path(path).read_bytes()
                    if work is not None:
                        work(data)
                    writer.write({"__key__": f"{i:08d}", "jpg": data, "cls": label})

        return lambda: forked(part, photos(source), jobs)

    return prepare


def as_ours(check: str) -> Callable:
    """What our converter does to an image's bytes, but for laying them down."""
    from isal.isal_zlib import crc32

    from manyview.pipeline.convert import encode, moments

    contents = Contents([], [], [], moments.nothing())

    def work(data: bytes) -> None:
        converted = encode.convert(np.frombuffer(data, np.uint8), Options("folder"), CHECKS[check])
        contents.moments += _moments(converted, contents)
        crc32(converted.payload)

    return work


def seal(path: str) -> None:
    """Checksum and sync of a finished tar."""
    from manyview.pipeline import index

    with open(path, "rb") as file:
        index.sha256(file)
        os.fsync(file.fileno())


def forked(work: Callable, files: list, jobs: int) -> None:
    """webdataset has no parallel writer: one in each of several processes is the best its user can do."""
    children = []
    for number in range(jobs):
        child = os.fork()
        if child == 0:
            work(files, number)
            os._exit(0)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        raise RuntimeError("a writing process failed")


class Photos:
    """What `ffcv.writer.DatasetWriter` takes."""

    def __init__(self, files: list[tuple[str, int]]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return decode(Path(self.files[i][0]).read_bytes()), self.files[i][1]


def datasetwriter(source: Path, target: Path, jobs: int) -> Callable:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()}
    writer = DatasetWriter(str(target / "x.beton"), fields, num_workers=jobs)
    return lambda: writer.from_indexed_dataset(Photos(photos(source)), chunksize=20)


def copied(item: tuple[str, int]) -> dict:
    return {"image": Path(item[0]).read_bytes(), "label": item[1]}


def checked(item: tuple[str, int]) -> dict:
    sample = copied(item)
    decode(sample["image"])
    return sample


def litdata(function: Callable) -> Prepare:
    def prepare(source: Path, target: Path, jobs: int) -> Callable:
        import litdata

        into = {"output_dir": str(target / "x"), "num_workers": jobs, "chunk_bytes": "8MB", "verbose": False}
        return lambda: litdata.optimize(fn=function, inputs=photos(source), **into)

    return prepare


def cp(source: Path, target: Path, jobs: int) -> Callable:
    return lambda: subprocess.run(["cp", "-r", str(source), str(target)], check=True)


@dataclass(frozen=True)
class Contender:
    group: str  # checked or copied
    name: str
    does: str
    prepare: Prepare


WHOLE = "decode at an eighth, a 16th completely; statistics, CRCs, SHA-256"
PART = "headers, a 16th decoded, CRCs, SHA-256"
BY_HAND = "webdataset.ShardWriter, by hand"
CONTENDERS = [
    Contender("checked", "manyview, WebDataset", f"{WHOLE}, indexes, fsync", ours("webdataset", "decode")),
    Contender("checked", "manyview, FFCV", f"{WHOLE}, index, fsync", ours("ffcv", "decode")),
    Contender("checked", "webdataset.ShardWriter", "decode", shardwriter(decode)),
    Contender("checked", BY_HAND, f"{WHOLE}, fsync", shardwriter(as_ours("decode"), seal)),
    Contender("checked", "litdata.optimize", "decode", litdata(checked)),
    Contender("checked", "ffcv.DatasetWriter", "decode, encode again at quality 90", datasetwriter),
    Contender("copied", "manyview, WebDataset", f"{PART}, indexes, fsync", ours("webdataset", "headers")),
    Contender("copied", "manyview, FFCV", f"{PART}, index, fsync", ours("ffcv", "headers")),
    Contender("copied", "webdataset.ShardWriter", "nothing", shardwriter()),
    Contender("copied", BY_HAND, f"{PART}, fsync", shardwriter(as_ours("headers"), seal)),
    Contender("copied", "litdata.optimize", "nothing", litdata(copied)),
    Contender("copied", "cp -r", "nothing, and no shards: the limit", cp),
]
