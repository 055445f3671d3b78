"""Checking shards: files against the manifest, shards against the index, every payload against its checksum."""

from __future__ import annotations

import contextlib
import mmap
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32

from manyview.pipeline import beton, codec, index, storage, tar
from manyview.pipeline.convert.sources import shards
from manyview.pipeline.errors import UserError
from manyview.pipeline.manifest import MANIFEST, read_manifest


def verify(path: Path) -> list[str]:
    """Everything that is wrong with a folder of shards, one line each, naming shard and key; empty if all is well.

    `path` may be the address of a bucket: its shards are brought here one by one and removed again.
    UserError if there is no manifest to check against.
    """
    manifest = read_manifest(path)
    if manifest is None:
        raise UserError(
            f"{storage.where(path)} has no {MANIFEST}: nothing to verify (a conversion that has not finished?)"
        )
    problems = []
    for split, part in manifest["splits"].items():
        problems += [f"{split}: {line}" for line in _split(path, part, manifest["format"])]
    return problems


@contextlib.contextmanager
def _here(path: Path, names: list[str]) -> Iterator[list[Path]]:
    """Files of a folder; objects of a bucket as files of a folder that is gone afterwards, but for those that are missing."""
    bucket = storage.open_storage(path)
    if bucket is None:
        yield [path / name for name in names]
        return
    with tempfile.TemporaryDirectory() as folder:
        local = [Path(folder) / Path(name).name for name in names]
        for name, file in zip(names, local):
            with contextlib.suppress(storage.Missing):
                bucket.fetch(name, file)
        yield local


def _split(path: Path, part: dict, format: str) -> Iterator[str]:
    with _here(path, [part["index"]["file"]]) as (file,):
        try:
            with open(file, "rb") as opened:
                altered = index.sha256(opened) != part["index"]["sha256"]
            rows = index.read(file)
        except FileNotFoundError:
            yield f"{file.name}: is missing"
            return
        except (OSError, ValueError) as error:
            yield f"{file.name}: {error}"
            return
    if altered:
        yield f"{file.name}: altered since it was written (SHA-256)"
    if len(rows) != part["count"] or len(rows) != sum(shard["count"] for shard in part["shards"]):
        yield f"{file.name}: has {len(rows)} rows, the manifest {part['count']}"
    if not altered and rows.fingerprint() != part["fingerprint"]:
        yield f"{file.name}: is not the index of these samples (fingerprint)"
    yield from _doubled(rows, part, file.name)
    for number, shard in enumerate(part["shards"]):
        mine = np.flatnonzero(rows["shard"] == number)
        if len(mine) != shard["count"]:
            yield f"{shard['file']}: {len(mine)} of its {shard['count']} samples are in the index"
        idx = shard.get("idx", str(Path(shard["file"]).with_suffix(".idx")))  # older manifests do not say
        with _here(path, [shard["file"], idx] if format == "webdataset" else [shard["file"]]) as (file, *beside):
            yield from (f"{shard['file']}: {line}" for line in _shard(file, beside, shard, rows, mine))


def _doubled(rows: index.Index, part: dict, name: str) -> Iterator[str]:
    def shard(i: int) -> str:
        number = int(rows["shard"][i])
        return part["shards"][number]["file"] if number < len(part["shards"]) else f"shard {number}, which is none"

    first: dict[str, int] = {}
    for i in range(len(rows)):
        try:
            key = rows.key(i)
        except (UnicodeDecodeError, ValueError):
            yield f"{name}: the key of row {i} is not text"
            continue
        if first.setdefault(key, i) != i:
            yield f"{name}: key {key} occurs twice, in {shard(first[key])} and in {shard(i)}"


def _shard(file: Path, beside: list[Path], shard: dict, rows: index.Index, mine: np.ndarray) -> Iterator[str]:
    if not file.is_file():
        yield "is missing"
        return
    size = file.stat().st_size
    if size != shard["bytes"]:
        yield f"has {size} bytes instead of {shard['bytes']}" + (": cut off" if size < shard["bytes"] else "")
    with open(file, "rb") as opened:
        if index.sha256(opened) != shard["sha256"]:
            yield "altered since it was written (SHA-256)"
        if not size:
            return
        data = np.frombuffer(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    yield from _payloads(data, rows, mine)
    yield from _overlaps(rows, mine)
    lacking = len(mine) != shard["count"]
    try:
        yield from _tar(file, beside[0], rows, mine, lacking) if beside else _beton(file, rows, mine, lacking)
    except (tarfile.TarError, ValueError, UserError) as error:
        yield f"does not read as {'a tar' if beside else 'a .beton'}: {error}"


def _payloads(data: np.ndarray, rows: index.Index, mine: np.ndarray) -> Iterator[str]:
    for i in mine:
        start, length = int(rows["offset"][i]), int(rows["length"][i])
        payload = data[start : start + length]
        if len(payload) != length:
            yield f"key {rows.key(i)}: lies beyond the end of the file"
        elif crc32(payload) != rows["crc"][i]:
            yield f"key {rows.key(i)}: its bytes have changed (checksum)"
        elif (reason := _undecodable(payload, rows, i)) is not None:
            yield f"key {rows.key(i)}: {reason}"


def _undecodable(payload: np.ndarray, rows: index.Index, i: int) -> str | None:
    """The index must fit the payload: a JPEG's header, or the size of an array."""
    height, width, kind = int(rows["height"][i]), int(rows["width"][i]), int(rows["kind"][i])
    if kind == codec.JPEG:
        header = codec.jpeg_header(payload)
        found = (header.height, header.width) if header else None
        return None if found == (height, width) else f"the index says {(height, width)}, its JPEG header {found}"
    expected = height * width * 3 // (1 if kind == codec.RAW else 2)
    return None if expected == len(payload) else f"{len(payload)} bytes are no image of {(height, width)}"


def _overlaps(rows: index.Index, mine: np.ndarray) -> Iterator[str]:
    start, length = rows["offset"][mine].astype(np.int64), rows["length"][mine].astype(np.int64)
    ranked = np.argsort(start, kind="stable")
    ends = (start + length)[ranked]
    for j in np.flatnonzero(ends[:-1] > start[ranked][1:]):
        first, second = (rows.key(mine[ranked[j + step]]) for step in (0, 1))
        yield f"key {second}: overlaps key {first}"


def _tar(file: Path, beside: Path, rows: index.Index, mine: np.ndarray, lacking: bool) -> Iterator[str]:
    """The archive as `tarfile` reads it, and DALI's index beside it. `lacking`: the index has too few of its samples (what
    was rejected when a foreign shard was indexed is rightly not there)."""

    records, problems = shards.records(file)
    yield from (f"key {item['name']}: {item['reason']}" for item in problems)
    found = {record.key: record for record in records}
    wanted = {rows.key(i): i for i in mine}
    bare = {key: key if key in found else key.removeprefix(f"{file.stem}/") for key in wanted}  # see adopt
    yield from (f"key {key}: missing from the archive" for key in wanted if bare[key] not in found)
    if lacking:
        yield from (f"key {key}: missing from the index" for key in found if key not in bare.values())
    wanted = {key: i for key, i in wanted.items() if bare[key] in found}
    for key, i in wanted.items():
        record = found[bare[key]]
        end = int(rows["offset"][i]) + int(rows["length"][i])
        if end != record.offset + record.size:
            yield f"key {key}: ends at {record.offset + record.size} in the archive, at {end} in the index"
        if isinstance(record.label, int) and record.label != rows["label"][i]:
            yield f"key {key}: label {record.label} in the archive, {rows['label'][i]} in the index"
    if not beside.exists():
        yield f"{beside.name}: is missing"
    elif beside.read_bytes() != tar.dali_index(file):
        yield f"{beside.name}: does not fit the archive"


def _beton(file: Path, rows: index.Index, mine: np.ndarray, lacking: bool) -> Iterator[str]:
    """Header, metadata and allocation table of an FFCV file, which has no keys: what the index lacks is named by place."""
    found = beton.read(file)
    if lacking:
        left = np.flatnonzero(~np.isin(found.offset, rows["offset"][mine]))
        yield from (f"sample {j} at {found.offset[j]}, label {found.label[j]}: missing from the index" for j in left)
    yield from (f"allocation table: {line}" for line in _allocation(found))
    number = {int(offset): j for j, offset in enumerate(found.offset)}
    for i in mine:
        key, offset = rows.key(i), int(rows["offset"][i])
        j = number.get(offset)
        if j is None:
            yield f"key {key}: no sample of the file lies at {offset}"
            continue
        pairs = [("length", found.length), ("label", found.label)]
        if found.height[j]:
            pairs += [("height", found.height), ("width", found.width), ("kind", found.kind)]
        for name, values in pairs:
            if int(values[j]) != int(rows[name][i]):
                yield f"key {key}: {name} {int(values[j])} in the file, {int(rows[name][i])} in the index"


def _allocation(found: beton.Contents) -> Iterator[str]:
    first, last = found.offset.astype(np.int64), (found.offset + found.length).astype(np.int64)
    for j in np.flatnonzero((first // found.page_size != (last - 1) // found.page_size) | (last > found.table)):
        yield f"sample {j} at {first[j]} crosses the end of its page or of the data"
    ranked = np.argsort(first, kind="stable")
    for j in np.flatnonzero(last[ranked][:-1] > first[ranked][1:]):
        yield f"samples {ranked[j]} and {ranked[j + 1]} overlap"
