"""Indexing shards that others wrote, where they are: a manifest and an index beside them, nothing copied."""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from isal.isal_zlib import crc32

from manyview.pipeline import beton, codec, files, index, storage, tar
from manyview.pipeline.convert import encode, moments, pool, summary
from manyview.pipeline.convert.sources import AS_IT_IS, Reading, shards
from manyview.pipeline.convert.write import Contents, check_options
from manyview.pipeline.errors import UserError
from manyview.pipeline.manifest import MANIFEST, Options, finish_split, read_manifest, write_manifest, write_rejected


@dataclass
class Result(Contents):
    """What a look at every image of one shard gave."""

    size: int = 0
    sha256: str = ""
    foreign: list[str] = field(default_factory=list)  # images that would have to be encoded


def index_foreign(
    source: Path,
    out: Path | None = None,
    *,
    reading: Reading = AS_IT_IS,
    jobs: int = 0,
    max_rejected: float = 0.01,
    quiet: bool = False,
) -> dict:
    """Index all tars and betons of `source` into `out` (default: there). Every image is decoded once, to be sure.

    Returns the manifest. UserError: a damaged shard, images that cannot be used as they are (`import` converts those).
    """
    check_options(Options("shards"), jobs)
    for path in (source, out):
        if path is not None and (url := storage.address(path)):
            raise UserError(f"{url}: only shards on this machine are indexed, into a folder of it; copy them here")
    if not source.exists():
        raise UserError(f"source {source} does not exist")
    out = out or (source if source.is_dir() else source.parent)
    if read_manifest(out) is not None:
        raise UserError(f"{out} has a manifest already: remove {out / MANIFEST} to index it anew")
    paths = shards.shard_files(source)
    if len(suffixes := {path.suffix.lower() for path in paths}) > 1:
        raise UserError(f"{source} holds both .tar and .beton: index one of them at a time")
    listed, classes, notes = shards.read_shards(source, reading)
    out.mkdir(parents=True, exist_ok=True)
    items = {str(shard.path): shard for shard in listed}
    total = sum(len(shard.records) for shard in listed)
    results = pool.run(look, items, jobs=jobs, total=total, quiet=quiet)
    if foreign := [f"{path}: {key}" for path in items for key in results[path].foreign]:
        raise UserError(
            f"{len(foreign)} images cannot be read where they are, the first is {foreign[0]}; "
            f"`python tools/shards.py import --source {source} --out DIRECTORY` converts them"
        )
    idx = dict.fromkeys(items, "")
    if suffixes == {tar.SUFFIX}:
        idx = {path: f"{name}.idx" for path, name in zip(items, shards.unique_names(paths, source))}
        for place, name in idx.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            if not (out / name).exists():
                files.write(out / name, tar.dali_index(Path(place)))
    looked = [(shard, results[path], idx[path]) for path, shard in items.items()]
    return _manifest(out, classes, looked, max_rejected, reading, notes)


def look(shard: shards.Shard) -> Result:
    """Decode every image of one shard."""
    digest = index.sha256(shard.path)
    with files.Opened(shard.path) as file:
        result = Result(size=file.size, sha256=digest, rejected=shard.problems)
        for record in shard.records:
            pool.check_stop()
            try:
                _look_at(record, file, result)
                pool.count(1, record.size, 0)
            except ValueError as error:
                item = {"name": f"{shard.path.name}: {record.key}", "key": record.key, "reason": str(error)}
                result.rejected.append(item)
                pool.count(0, 0, 1)
    return result


def _look_at(record: shards.Record, file: files.Opened, result: Result) -> None:
    if record.size == 0 or record.offset + record.size > result.size:
        raise ValueError("empty" if record.size == 0 else "the shard ends inside it")
    if any("\ud800" <= letter <= "\udfff" for letter in record.key):  # how Python stands for bytes that are no text
        raise ValueError("its name is not UTF-8, and an index holds no other")
    data = np.frombuffer(file.read(record.offset, record.size), np.uint8)
    payload, offset = shards.payload(record, data), record.offset
    if record.extension == "npy":
        offset += record.size - payload.nbytes
        whole = payload.ndim == 3 and np.array_equal(data[-payload.nbytes :], payload.reshape(-1))
        pixels = payload if whole else None
    else:
        pixels = payload if payload.ndim == 3 else _pixels(payload)
    if pixels is None:
        result.foreign.append(record.key)
        return
    height, width = pixels.shape[:2]
    if max(height, width) > index.MAX_SIDE:
        raise ValueError(f"{width}x{height} pixels is beyond the limit ({index.MAX_SIDE} a side)")
    crc = crc32(np.ascontiguousarray(payload))
    result.moments += moments.of_pixels(pixels)
    result.keys.append(record.key)  # nothing below may fail: key and row go together
    result.rows.append((record.label, offset, payload.nbytes, 0, height, width, crc, codec.kind(payload)))


def _pixels(data: np.ndarray) -> np.ndarray | None:
    """Of a JPEG that every engine can read as it is; None for another image. ValueError for a damaged or a huge one."""
    header = codec.jpeg_header(data)
    if data[:3].tobytes() != b"\xff\xd8\xff" or (header and not header.plain):
        return None
    pixels = encode.convert(data, Options("shards")).pixels
    if header and header.usual:
        return pixels
    with contextlib.suppress(codec.UnknownSampling):
        return codec.decode(data) if header else None
    return None


Looked = list[tuple[shards.Shard, Result, str]]  # each with the name of DALI's index


def _manifest(
    out: Path, classes: list[str], looked: Looked, max_rejected: float, reading: Reading, notes: list[str]
) -> dict:
    rejected = [item for _, result, _ in looked for item in result.rejected]
    write_rejected(out, rejected, len(rejected) + sum(len(result.rows) for _, result, _ in looked), max_rejected)
    names = sorted({shard.split for shard, *_ in looked})
    by_split = {name: [each for each in looked if each[0].split == name] for name in names}
    indexes = {
        name: index.concatenate([index.build(result.rows, result.keys) for _, result, _ in mine])
        for name, mine in by_split.items()
    }
    notes = notes + summary.check(classes, {name: rows["label"] for name, rows in indexes.items()}, reading.disjoint)
    splits = {}
    for name, mine in by_split.items():
        listed = [
            {"file": os.path.relpath(shard.path, out), "count": len(result.rows), "bytes": result.size}
            | {"sha256": result.sha256} | ({"idx": idx} if idx else {})
            for shard, result, idx in mine
        ]  # fmt: skip
        average = moments.average(sum((result.moments for _, result, _ in mine), moments.nothing()))
        rejects = sum(len(result.rejected) for _, result, _ in mine)
        splits[name] = finish_split(out, name, indexes[name], listed, average, rejects)
    kind = "ffcv" if looked[0][0].path.suffix.lower() == beton.SUFFIX else "webdataset"
    digest = hashlib.sha256("\n".join(result.sha256 for _, result, _ in looked).encode()).hexdigest()
    about: dict[str, Any] = {"parts": reading.parts} if reading.parts else {}  # for whoever verifies
    ignored = sum(shard.ignored for shard, *_ in looked)
    return write_manifest(out, Options("shards", kind), classes, splits, len(rejected), digest, ignored, notes, **about)
