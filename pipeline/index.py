"""The binary index of a split: one row a sample, columns side by side, read through a memory map.

File layout (little-endian): magic, version, rows, bytes of all keys; then each column at a multiple of 64 bytes in
the order of `COLUMNS`; then where each key begins (rows + 1 numbers), then the keys (UTF-8) end to end.
"""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path
from typing import BinaryIO

import numpy as np

from manyview.pipeline import files

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
HEADER = np.dtype([("magic", "S8"), ("version", "<u8"), ("rows", "<u8"), ("key_bytes", "<u8")])


class Index:
    """Columns as attributes-by-name `index["label"]`, keys as `index.key(i)`."""

    def __init__(self, columns: dict[str, np.ndarray], key_starts: np.ndarray, key_bytes) -> None:
        self.columns, self.key_starts, self.key_bytes = columns, key_starts, key_bytes

    def __len__(self) -> int:
        return len(self.key_starts) - 1

    def __getitem__(self, column: str) -> np.ndarray:
        return self.columns[column]

    def key(self, i: int) -> str:
        return bytes(self.key_bytes[int(self.key_starts[i]) : int(self.key_starts[i + 1])]).decode()

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
    columns: dict[str, np.ndarray] = {
        name: np.array([row[i] for row in rows], dtype=kind) for i, (name, kind) in enumerate(COLUMNS.items())
    }
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


def sha256(file: BinaryIO) -> str:
    """Hex digest of what is left of an open file."""
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


def read(path: Path) -> Index:
    """Memory-map an index; nothing is loaded until it is used. Raises ValueError if it is not a whole index."""
    size = path.stat().st_size
    if size < 64:
        raise ValueError("too short to be an index")
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header = np.frombuffer(data, HEADER, 1)[0]
    if header["magic"] != MAGIC.rstrip(b"\0") or header["version"] != VERSION:
        raise ValueError("not an index of this version")
    rows, key_bytes = int(header["rows"]), int(header["key_bytes"])
    columns: dict[str, np.ndarray] = {}
    at = 64
    sizes = [(name, np.dtype(kind), rows) for name, kind in COLUMNS.items()]
    for name, kind, count in [*sizes, ("key_starts", np.dtype(np.uint64), rows + 1)]:
        if at + count * kind.itemsize > size:
            raise ValueError(f"cut off in column {name}")
        columns[name] = np.frombuffer(data, kind, count, at)
        at += -(-count * kind.itemsize // 64) * 64
    if at + key_bytes > size:
        raise ValueError("cut off in the keys")
    return Index(columns, columns.pop("key_starts"), memoryview(data)[at : at + key_bytes])
