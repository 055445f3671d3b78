"""Checking shards: files against the manifest, shards against the index, every payload against its checksum."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32

from manyview.pipeline import beton, codec, files, index, storage, tar
from manyview.pipeline.convert.sources import Reading, shards
from manyview.pipeline.errors import UserError
from manyview.pipeline.manifest import MANIFEST, layout, read_manifest


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
        problems += [f"{split}: {line}" for line in _split(path, part, manifest)]
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


def _split(path: Path, part: dict, manifest: dict) -> Iterator[str]:
    with _here(path, [part["index"]["file"]]) as (file,):
        try:
            altered = index.sha256(file) != part["index"]["sha256"]
            rows = index.read(file)
        except FileNotFoundError:
            yield f"{file.name}: is missing"
            return
        except (OSError, ValueError) as error:
            yield f"{file.name}: {error}"
            return
    if altered:
        yield f"{file.name}: altered since it was written (SHA-256)"
    try:
        index.check(rows, part, len(manifest["classes"]), layout(manifest))
    except ValueError as error:
        yield f"{file.name}: {error}"
    if not altered and rows.fingerprint() != part["fingerprint"]:
        yield f"{file.name}: is not the index of these samples (fingerprint)"
    yield from _doubled(rows, part, file.name)
    for number, shard in enumerate(part["shards"]):
        mine = np.flatnonzero(rows["shard"] == number)
        if len(mine) != shard["count"]:
            yield f"{shard['file']}: {len(mine)} of its {shard['count']} samples are in the index"
        names = [shard["file"]]
        if manifest["format"] == "webdataset":  # older manifests do not say the name of DALI's index
            names.append(shard.get("idx", str(Path(shard["file"]).with_suffix(".idx"))))
        with _here(path, names) as (file, *beside):
            yield from (f"{shard['file']}: {line}" for line in _shard(file, beside, shard, rows, mine, manifest))


def _doubled(rows: index.Index, part: dict, name: str) -> Iterator[str]:
    def shard(i: int) -> str:
        number = int(rows["shard"][i])
        return part["shards"][number]["file"] if number < len(part["shards"]) else f"shard {number}, which is none"

    first: dict[str, int] = {}
    for i in range(len(rows)):
        key = rows.key(i)
        if key.encode() != rows.raw_key(i):
            yield f"{name}: the key of row {i} is not text"
        if first.setdefault(key, i) != i:
            yield f"{name}: key {key} occurs twice, in {shard(first[key])} and in {shard(i)}"


def _shard(
    file: Path, beside: list[Path], shard: dict, rows: index.Index, mine: np.ndarray, manifest: dict
) -> Iterator[str]:
    if not file.is_file():
        yield "is missing"
        return
    size = file.stat().st_size
    if size != shard["bytes"]:
        yield f"has {size} bytes instead of {shard['bytes']}" + (": cut off" if size < shard["bytes"] else "")
    if index.sha256(file) != shard["sha256"]:
        yield "altered since it was written (SHA-256)"
    if not size:
        return
    with files.Opened(file) as data:
        yield from _payloads(data, rows, mine, layout(manifest).bytes)
    yield from _overlaps(rows, mine)
    asked = manifest["source"].get("parts")  # of foreign samples, see `sources.Reading`
    image, label, cut = asked if isinstance(asked, list) and len(asked) == 3 else ("", "", False)
    reading = Reading(image_part=image, label_part=label, allow_cut=cut)
    lacking = len(mine) != shard["count"]
    try:
        if beside:
            yield from _tar(file, rows, mine, lacking, reading, manifest["classes"])
            if not beside[0].exists():
                yield f"{beside[0].name}: is missing"
            elif beside[0].read_bytes() != tar.dali_index(file):
                yield f"{beside[0].name}: does not fit the archive"
        else:
            yield from _beton(file, rows, mine, lacking, reading)
    except (ValueError, UserError) as error:
        yield f"does not read as {'a tar' if beside else 'a .beton'}: {error}"


def _payloads(file: files.Opened, rows: index.Index, mine: np.ndarray, pixel: int) -> Iterator[str]:
    size = file.size
    for i in mine:
        start, length = int(rows["offset"][i]), int(rows["length"][i])
        if start + length > size or not length:
            yield f"key {rows.key(i)}: lies beyond the end of the file"
            continue
        payload = np.frombuffer(file.read(start, length), np.uint8)
        if crc32(payload) != rows["crc"][i]:
            yield f"key {rows.key(i)}: its bytes have changed (checksum)"
        elif (reason := _undecodable(payload, rows, i, pixel)) is not None:
            yield f"key {rows.key(i)}: {reason}"


def _undecodable(payload: np.ndarray, rows: index.Index, i: int, pixel: int) -> str | None:
    """The index must fit the payload: a JPEG's header, or the size of an array of so many bytes a `pixel`."""
    height, width, kind = int(rows["height"][i]), int(rows["width"][i]), int(rows["kind"][i])
    if kind == codec.JPEG:
        header = codec.jpeg_header(payload)
        sides = (header.height, header.width) if header else None
        return None if sides == (height, width) else f"the index says {(height, width)}, its JPEG header {sides}"
    expected = height * width * pixel if kind == codec.RAW else height * width * 3 // 2
    return None if expected == len(payload) else f"{len(payload)} bytes are no image of {(height, width)}"


def _overlaps(rows: index.Index, mine: np.ndarray) -> Iterator[str]:
    start, length = rows["offset"][mine].astype(np.int64), rows["length"][mine].astype(np.int64)
    ranked = np.argsort(start, kind="stable")
    ends = (start + length)[ranked]
    for j in np.flatnonzero(ends[:-1] > start[ranked][1:]):
        first, second = (rows.key(mine[ranked[j + step]]) for step in (0, 1))
        yield f"key {second}: overlaps key {first}"


def _tar(
    file: Path, rows: index.Index, mine: np.ndarray, lacking: bool, reading: Reading, classes: list[str]
) -> Iterator[str]:
    """The archive as it is read anew. `lacking`: the index has too few of its samples (what was rejected when a foreign shard
    was indexed is rightly not there)."""
    shard = shards.read_shard(file, reading)
    yield from (f"key {item['name']}: {item['reason']}" for item in shard.problems if lacking or not reading.parts)
    records = {record.key: record for record in shard.records}
    bare = _bare([rows.key(i) for i in mine], records)
    if lacking:
        yield from (f"key {key}: missing from the index" for key in records if key not in bare)
    for i, key in zip(mine, bare):
        if key not in records:
            yield f"key {rows.key(i)}: missing from the archive"
            continue
        record, label = records[key], int(rows["label"][i])
        end = int(rows["offset"][i]) + int(rows["length"][i])
        if end != record.offset + record.size:
            yield f"key {rows.key(i)}: ends at {record.offset + record.size} in the archive, at {end} in the index"
        there = label if isinstance(record.label, int) or not 0 <= label < len(classes) else classes[label]
        if there != record.label and not (record.caption and label == -1):
            yield f"key {rows.key(i)}: label {record.label} in the archive, {there} in the index"


def _bare(keys: list[str], records: dict[str, shards.Record]) -> list[str]:
    """Keys as the archive has them: an index puts the shard's name, with its folders, before keys that begin anew in each."""

    def cut(depth: int) -> list[str]:
        return [key.split("/", depth)[-1] for key in keys]

    return max(map(cut, range(16)), key=lambda some: sum(key in records for key in some))


def _beton(file: Path, rows: index.Index, mine: np.ndarray, lacking: bool, reading: Reading) -> Iterator[str]:
    """Header, metadata and allocation table of an FFCV file, which has no keys: what the index lacks is named by place."""
    contents = beton.read(file, reading.image_part, reading.label_part)
    if lacking:
        left = np.flatnonzero(~np.isin(contents.offset, rows["offset"][mine]))
        for k in left:
            yield f"sample {k} at {contents.offset[k]}, label {contents.label[k]}: missing from the index"
    yield from (f"allocation table: {line}" for line in _allocation(contents))
    number = {int(offset): j for j, offset in enumerate(contents.offset)}
    for i in mine:
        key, offset = rows.key(i), int(rows["offset"][i])
        j = number.get(offset)
        if j is None:
            yield f"key {key}: no sample of the file lies at {offset}"
            continue
        pairs = [("length", contents.length), ("label", contents.label)]
        if contents.height[j]:
            pairs += [("height", contents.height), ("width", contents.width), ("kind", contents.kind)]
        for name, values in pairs:
            if values[j] != rows[name][i]:
                yield f"key {key}: {name} {values[j]} in the file, {rows[name][i]} in the index"


def _allocation(contents: beton.Contents) -> Iterator[str]:
    first, last = contents.offset.astype(np.int64), (contents.offset + contents.length).astype(np.int64)
    page = contents.page_size
    for j in np.flatnonzero((first // page != (last - 1) // page) | (last > contents.table)):
        yield f"sample {j} at {first[j]} crosses the end of its page or of the data"
    ranked = np.argsort(first, kind="stable")
    for j in np.flatnonzero(last[ranked][:-1] > first[ranked][1:]):
        yield f"samples {ranked[j]} and {ranked[j + 1]} overlap"
