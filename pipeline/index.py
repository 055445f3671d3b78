"""The binary index of a split: one row a sample, columns side by side.

File layout (little-endian): magic, version, rows, bytes of all keys; then each column at a multiple of 64 bytes in
the order of `COLUMNS`; then where each key begins (rows + 1 numbers), then the keys (UTF-8) end to end.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from manyview.pipeline import codec, files

MAGIC = b"mvindex\0"
VERSION = 1
COLUMNS: dict[str, type] = {
    "label": np.int64,  # -1 = unlabelled
    "offset": np.uint64,  # of the payload in its shard, bytes
    "length": np.uint32,  # of the payload, bytes
    "shard": np.uint32,  # which of the manifest's shards
    "height": np.int32,
    "width": np.int32,
    "crc": np.uint32,  # CRC-32 of the payload
    "kind": np.uint8,  # codec.JPEG, RAW, YUV420
}
ROWS = 1 << 20  # checked at a time: of 14 million all at once would be a gigabyte
MAX_SIDE = 65_535  # pixels; .beton has 16 bits for them
# Bytes. What is read cannot be cut off under its reader, as what is mapped can; but it is his alone.
IN_MEMORY = 128 << 20
HEADER = np.dtype([("magic", "S8"), ("version", "<u8"), ("rows", "<u8"), ("key_bytes", "<u8")])


class Index:
    """Columns as attributes-by-name `index["label"]`, keys as `index.key(i)`."""

    def __init__(self, columns: dict[str, np.ndarray], key_starts: np.ndarray, key_bytes, file: Any = None) -> None:
        self.columns, self.key_starts, self.key_bytes, self._file = columns, key_starts, key_bytes, file

    def __len__(self) -> int:
        return len(self.key_starts) - 1

    def __getitem__(self, column: str) -> np.ndarray:
        return self.columns[column]

    def key(self, i: int) -> str:
        """Bytes that are not UTF-8, which only a damaged index has, as escapes: a message must be able to name it."""
        return self.raw_key(i).decode(errors="backslashreplace")

    def raw_key(self, i: int) -> bytes:
        return bytes(self.key_bytes[int(self.key_starts[i]) : int(self.key_starts[i + 1])])

    def forget(self) -> None:
        """Give back the memory of what was read of a mapped file; it is mapped again where it is needed."""
        if isinstance(self._file, mmap.mmap):
            self._file.madvise(mmap.MADV_DONTNEED)

    def fingerprint(self) -> str:
        """Hex: what the samples are (keys, labels, payloads, in order), not where they lie; equal for both formats."""
        digest = hashlib.sha256()
        for name in ("label", "height", "width", "kind", "crc", "length"):
            digest.update(np.ascontiguousarray(self[name]).data)
        digest.update(np.ascontiguousarray(self.key_starts).data)
        digest.update(self.key_bytes)
        return digest.hexdigest()


def build(rows: list[tuple], keys: list[str]) -> Index:
    """From one tuple a sample, in the order of `COLUMNS`."""
    columns: dict = {name: np.array([row[i] for row in rows], kind) for i, (name, kind) in enumerate(COLUMNS.items())}
    encoded = [key.encode() for key in keys]
    return Index(columns, _starts([len(key) for key in encoded]), b"".join(encoded))


def concatenate(parts: list[Index]) -> Index:
    """One after the other; the column `shard` becomes the number of the part."""
    columns = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
    columns["shard"] = np.repeat(np.arange(len(parts), dtype=np.uint32), [len(part) for part in parts])
    lengths = np.concatenate([np.diff(part.key_starts) for part in parts])
    return Index(columns, _starts(lengths), b"".join(bytes(part.key_bytes) for part in parts))


def _starts(lengths) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint64)


def write(index: Index, path: Path) -> str:
    """Write, then fsync and rename into place. Returns the SHA-256 of the file."""
    header = np.array([(MAGIC, VERSION, len(index), len(index.key_bytes))], HEADER)
    digest = hashlib.sha256()
    with files.whole(path) as file:
        for part in (header, *(index[name] for name in COLUMNS), index.key_starts, index.key_bytes):
            data = np.ascontiguousarray(part).data.cast("B") if isinstance(part, np.ndarray) else part
            padded = (data, b"\0" * (-len(data) % 64))
            for piece in padded:
                file.write(piece)
                digest.update(piece)
    return digest.hexdigest()


def sha256(file: BinaryIO | Path) -> str:
    """Hex digest of a file, or of what is left of an open one."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return sha256(opened)
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


def read(path: Path, checksum: str = "") -> Index:
    """An index, in memory if it is small; a large one is mapped: nothing is loaded until it is used, and several processes
    have one copy. `checksum`: SHA-256 that it must have.

    ValueError if it is not that, or no whole index. What its rows say is another matter: see `check`.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 64:
            raise ValueError("too short to be an index")
        data = file.read() if size <= IN_MEMORY else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if checksum and sha256(io.BytesIO(data) if isinstance(data, bytes) else file) != checksum:
            raise ValueError("altered since it was written (SHA-256)")
    header = np.frombuffer(data, HEADER, 1)[0]
    if header["magic"] != MAGIC.rstrip(b"\0") or header["version"] != VERSION:
        raise ValueError("not an index of this version")
    rows, key_bytes = int(header["rows"]), int(header["key_bytes"])
    columns: dict[str, np.ndarray] = {}
    at, size = 64, len(data)
    sizes = [(name, np.dtype(kind), rows) for name, kind in COLUMNS.items()]
    for name, kind, count in [*sizes, ("key_starts", np.dtype(np.uint64), rows + 1)]:
        if at + count * kind.itemsize > size:
            raise ValueError(f"cut off in column {name}")
        columns[name] = np.frombuffer(data, kind, count, at)
        at += -(-count * kind.itemsize // 64) * 64
    if at + key_bytes > size:
        raise ValueError("cut off in the keys")
    return Index(columns, columns.pop("key_starts"), memoryview(data)[at : at + key_bytes], data)


def check(index: Index, part: dict, classes: int, layout: codec.Layout = codec.RGB) -> None:
    """ValueError unless every row fits its shard and its kind of payload, so that none of them leads native code astray.

    `part`: the split's part of the manifest. `classes`: how many there are, 0 if that is not said. `layout`: of the set.
    """
    if len(index) != part["count"]:
        raise ValueError(f"has {len(index)} rows, the manifest {part['count']}")
    shards = part["shards"]
    sizes, counts = (np.array([shard[word] for shard in shards] or [0], np.int64) for word in ("bytes", "count"))
    ends = np.cumsum(counts)  # the rows of a shard lie together
    if ends[-1] != len(index):
        raise ValueError(f"has {len(index)} rows, the shards of the manifest {ends[-1]}")
    for first in range(0, len(index), ROWS):
        rows = slice(first, first + ROWS)
        wrong = _wrong({name: index[name][rows] for name in COLUMNS}, sizes.astype(np.uint64), classes, layout)
        number = np.arange(first, first + len(index["shard"][rows]))
        wrong["shard"] = index["shard"][rows] != np.searchsorted(ends, number, side="right")
        starts = index.key_starts[first : first + ROWS + 1]
        wrong["keys"] = (starts[1:] < starts[:-1]) | (starts[1:] > len(index.key_bytes))
        for name, rows_wrong in wrong.items():
            if rows_wrong.any():
                i = first + int(np.argmax(rows_wrong))
                said = ", ".join(f"{column} {index[column][i]}" for column in COLUMNS)
                raise ValueError(f"row {i} cannot be, by its {name} ({said})")
        index.forget()


def _wrong(row: dict[str, np.ndarray], sizes: np.ndarray, classes: int, layout: codec.Layout) -> dict[str, np.ndarray]:
    """Which rows are wrong, by what."""
    height, width = row["height"].astype(np.int64), row["width"].astype(np.int64)
    length, kind = row["length"], row["kind"]
    shard = np.minimum(row["shard"], len(sizes) - 1)
    raw, planar = kind == codec.RAW, kind == codec.YUV420
    sides = (np.minimum(height, width) < 1) | (np.maximum(height, width) > MAX_SIDE)
    return {
        "label": (row["label"] < -1) | (row["label"] >= (classes or np.iinfo(np.int64).max)),
        "place": (row["offset"] > sizes[shard]) | (length > sizes[shard] - row["offset"]) | (length == 0),
        "size": sides | (planar & ((height | width) % 2 > 0)),
        "kind": kind > codec.YUV420 if layout == codec.RGB else ~raw,
        "length": (raw & (length != layout.bytes * height * width))
        | (planar & (2 * length.astype(np.int64) != 3 * height * width)),
    }
