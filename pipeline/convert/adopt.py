"""Indexing shards that others wrote, where they are: a manifest and an index beside them, nothing copied."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32

from manyview.pipeline import beton, codec, files, index, storage, tar
from manyview.pipeline.convert import moments, pool, summary
from manyview.pipeline.convert.sources import shards
from manyview.pipeline.convert.write import check_options
from manyview.pipeline.errors import UserError
from manyview.pipeline.manifest import MANIFEST, Options, finish_split, read_manifest, write_manifest, write_rejected


@dataclass
class Found:
    """What is in one shard. `rows`: tuples in the order of `index.COLUMNS`, labels as they stand."""

    size: int
    sha256: str
    keys: list[str] = field(default_factory=list)
    rows: list[tuple] = field(default_factory=list)
    rejected: list[dict] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)  # images that would have to be encoded
    moments: np.ndarray = field(default_factory=moments.nothing)


def adopt(
    source: Path,
    out: Path | None = None,
    *,
    jobs: int = 0,
    max_rejected: float = 0.01,
    disjoint: bool = False,
    quiet=False,
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
    paths = shards.shard_files(source)
    out = out or (source if source.is_dir() else source.parent)
    if read_manifest(out) is not None:
        raise UserError(f"{out} has a manifest already: remove {out / MANIFEST} to index it anew")
    if len(suffixes := {path.suffix for path in paths}) > 1:
        raise UserError(f"{source} holds both .tar and .beton: index one of them at a time")
    out.mkdir(parents=True, exist_ok=True)
    found = pool.run(adopt_shard, {str(path): path for path in paths}, jobs=jobs, quiet=quiet)
    results = [(path, found[str(path)]) for path in paths]
    if foreign := [f"{path}: {key}" for path, result in results for key in result.foreign]:
        raise UserError(
            f"{len(foreign)} images cannot be read where they are, the first is {foreign[0]}; "
            f"`python tools/shards.py import --source {source} --out DIRECTORY` converts them"
        )
    if suffixes == {tar.SUFFIX}:
        _dali_indexes(paths, out)
    return _manifest(source, out, results, max_rejected, disjoint)


def adopt_shard(path: Path) -> Found:
    """Look at every sample of one shard."""
    records, problems = shards.records(path)
    with open(path, "rb") as file:
        digest = index.sha256(file)
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    result = Found(len(data), digest, rejected=problems)
    for record in records:
        pool.check_stop()
        try:
            _adopt_record(record, data, result)
            pool.count(1, record.size, 0)
        except ValueError as error:
            result.rejected.append({"name": f"{path.name}: {record.key}", "key": record.key, "reason": str(error)})
            pool.count(0, 0, 1)
    return result


def _adopt_record(record: shards.Record, data: np.ndarray, result: Found) -> None:
    offset, payload = record.offset, data[record.offset : record.offset + record.size]
    if record.size == 0 or len(payload) != record.size:
        raise ValueError("empty" if record.size == 0 else "the shard ends inside it")
    if any("\ud800" <= letter <= "\udfff" for letter in record.key):  # how Python stands for bytes that are no text
        raise ValueError("its name is not UTF-8, and an index holds no other")
    if record.extension == "npy":
        payload = shards.payload(record, payload)
        offset += record.size - payload.nbytes
        whole = payload.ndim == 3 and np.array_equal(data[offset : offset + payload.nbytes], payload.reshape(-1))
    elif record.extension == "raw":
        payload, whole = shards.payload(record, payload), True
    else:
        header = codec.jpeg_header(payload)
        whole = header is not None and header.plain
    if not whole:
        result.foreign.append(record.key)
        return
    try:
        pixels = codec.decode(payload)
    except codec.UnknownSampling:
        result.foreign.append(record.key)
        return
    height, width = pixels.shape[:2]
    crc = crc32(np.ascontiguousarray(payload))
    result.moments += moments.of_pixels(pixels)
    result.keys.append(record.key)  # nothing below may fail: key and row go together
    result.rows.append((record.label, offset, payload.nbytes, 0, height, width, crc, codec.kind(payload)))


def _dali_indexes(tars: list[Path], out: Path) -> None:
    for path in tars:
        target = out / f"{path.stem}.idx"
        if not target.exists():
            files.write(target, tar.dali_index(path))


def _manifest(source: Path, out: Path, results: list[tuple[Path, Found]], max_rejected: float, disjoint: bool) -> dict:
    rejected = [item for _, result in results for item in result.rejected]
    total = len(rejected) + sum(len(result.rows) for _, result in results)
    write_rejected(out, rejected, total, max_rejected)
    classes, labels = shards.number_labels([row[0] for _, result in results for row in result.rows])
    splits = {}
    numbered = iter(labels)
    keys = [(shards.split_of(path, source), key) for path, result in results for key in result.keys]
    again = len(set(keys)) != len(keys)  # keys that begin anew in every shard: the shard's name makes them unique
    by_split: dict[str, list[tuple[Path, Found, index.Index]]] = {}
    for path, result in results:
        rows = [(next(numbered), *row[1:]) for row in result.rows]
        part = index.build(rows, [f"{path.stem}/{key}" if again else key for key in result.keys])
        by_split.setdefault(shards.split_of(path, source), []).append((path, result, part))
    indexes = {split: index.concatenate([part for *_, part in found]) for split, found in sorted(by_split.items())}
    notes = summary.check(classes, {split: rows["label"] for split, rows in indexes.items()}, disjoint)
    for split, found in sorted(by_split.items()):
        listed = [
            {"file": os.path.relpath(path, out), "count": len(part), "bytes": result.size, "sha256": result.sha256}
            | ({"idx": f"{path.stem}.idx"} if path.suffix == tar.SUFFIX else {})
            for path, result, part in found
        ]
        average = moments.average(sum((result.moments for _, result, _ in found), moments.nothing()))
        rejects = sum(len(result.rejected) for _, result, _ in found)
        splits[split] = finish_split(out, split, indexes[split], listed, average, rejects)
    kind = "ffcv" if results[0][0].suffix == beton.SUFFIX else "webdataset"
    options = Options("shards", kind)
    digest = shards.digest([result.sha256 for _, result in results])
    return write_manifest(out, options, classes, splits, len(rejected), digest, notes=notes)
