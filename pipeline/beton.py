"""FFCV shards (`.beton`, format version 2), written and read without the ffcv package.

Layout, little-endian: header, one descriptor a field, the samples' metadata, data pages, allocation table to the end.
A payload never crosses a page (pages lie at multiples of the page size). The header is written last, so an
interrupted file has a zero where the allocation table's address belongs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from manyview.pipeline import codec, index

SUFFIX = ".beton"
VERSION = 2
MIN_PAGE = 1 << 21
MAX_PAGE = 1 << 31
HEADER = np.dtype([("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("table", "<u8")])
FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")])
ALLOCATION = np.dtype([("sample", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
FLOAT, INT, IMAGE, BYTES = 0, 1, 2, 3
RECORDS = {  # metadata of one value of a field, by the field's type
    FLOAT: np.dtype("<f8"),
    INT: np.dtype("<i8"),
    IMAGE: np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("ptr", "<u8")]),
    BYTES: np.dtype([("ptr", "<u8"), ("size", "<u8")]),
    4: np.dtype("<u8"),
    5: np.dtype([("ptr", "<u8"), ("size", "<u8")]),
    6: np.dtype("<u8"),
}
MODES = {codec.JPEG: 0, codec.RAW: 1}


def _metadata(types: list[int]) -> np.dtype:
    return np.dtype([(f"f{i}", RECORDS[kind]) for i, kind in enumerate(types)], align=True)


class Writer:
    """Appends samples with the fields `image` and `label` to an open file.

    `count`: the most samples that will be added; it decides where the first page begins. With 4:2:0 payloads
    (`planar`) the field is FFCV's bytes field, which its loader hands over undecoded; otherwise its RGB image field.
    """

    def __init__(self, file: BinaryIO, count: int, planar: bool = False) -> None:
        self.file, self.planar = file, planar
        self.types = [BYTES if planar else IMAGE, INT]
        self.records: list[tuple] = []
        self.allocations: list[tuple[int, int, int]] = []
        self.page_size = MIN_PAGE
        front = HEADER.itemsize + 2 * FIELD.itemsize + count * _metadata(self.types).itemsize
        self.at = -(-front // MIN_PAGE) * MIN_PAGE
        file.seek(self.at)

    def add(self, key: str, label: int, payload: np.ndarray) -> int:
        """Returns the offset of the payload. `key` is not part of the format; the index keeps it."""
        del key
        size = payload.nbytes
        while size > self.page_size:  # smaller pages joined in pairs: nothing already written comes to cross one
            self.page_size *= 2
            if self.page_size > MAX_PAGE:
                raise ValueError(f"{size} bytes do not fit a page of an FFCV file")
        if self.at // self.page_size != (self.at + size - 1) // self.page_size:
            self.at = -(-self.at // self.page_size) * self.page_size
            self.file.seek(self.at)
        self.file.write(payload.data)
        offset, self.at = self.at, self.at + size
        self.allocations.append((len(self.records), offset, size))
        if self.planar:
            image: tuple = (offset, size)
        else:
            height, width = _sides(payload)
            image = (MODES[codec.kind(payload)], width, height, offset)
        self.records.append((image, label))
        return offset

    def finish(self) -> str:
        """Append the allocation table, write everything in front; returns the file's SHA-256."""
        table = self.at
        self.file.write(np.array(self.allocations, ALLOCATION).tobytes())
        fields = np.zeros(2, FIELD)
        fields["type"], fields["name"] = self.types, (b"image", b"label")
        metadata = np.zeros(len(self.records), _metadata(self.types))
        metadata[:] = self.records
        self.file.seek(HEADER.itemsize)
        self.file.write(fields.tobytes() + metadata.tobytes())
        header = np.array([(VERSION, 2, self.page_size, len(self.records), table)], HEADER)
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.seek(0)
        return index.sha256(self.file)


def _sides(payload: np.ndarray) -> tuple[int, int]:
    if payload.ndim == 3:
        return payload.shape[0], payload.shape[1]
    import simplejpeg

    return simplejpeg.decode_jpeg_header(payload, strict=False)[:2]


@dataclass
class Contents:
    """What a .beton holds: one entry a sample in each array. `label` is -1 where no integer field exists."""

    page_size: int
    table: int
    label: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    height: np.ndarray  # 0 in a bytes field, which does not say
    width: np.ndarray
    kind: np.ndarray  # codec.JPEG, codec.RAW, or codec.YUV420 for a bytes field


def read(path: Path) -> Contents:
    """Parse headers, metadata and allocation table. Raises ValueError with the reason where they do not hold together."""
    size = path.stat().st_size
    if size < HEADER.itemsize:
        raise ValueError("too short for a header")
    header = np.fromfile(path, HEADER, 1)[0]
    if header["version"] != VERSION:
        raise ValueError(f"not an FFCV file of version {VERSION}")
    table, samples = int(header["table"]), int(header["samples"])
    if table == 0:
        raise ValueError("unfinished: the header has no allocation table, so its writer was interrupted")
    if table > size or (size - table) % ALLOCATION.itemsize:
        raise ValueError(f"cut off: the allocation table at {table} does not end with the file at {size}")
    fields = np.fromfile(path, FIELD, int(header["fields"]), offset=HEADER.itemsize)
    types = [int(kind) for kind in fields["type"]]
    if unknown := [kind for kind in types if kind not in RECORDS]:
        raise ValueError(f"field type {unknown[0]} has no known layout")
    front = HEADER.itemsize + fields.nbytes
    if front + samples * _metadata(types).itemsize > table:
        raise ValueError(f"metadata of {samples} samples does not fit before the allocation table")
    metadata = np.fromfile(path, _metadata(types), samples, offset=front)
    allocations = np.fromfile(path, ALLOCATION, offset=table)
    return _contents(types, metadata, allocations, int(header["page_size"]), table)


def _contents(types, metadata, allocations, page_size: int, table: int) -> Contents:
    picture = next((i for i, kind in enumerate(types) if kind == IMAGE), None)
    if picture is None:
        picture = next((i for i, kind in enumerate(types) if kind == BYTES), None)
    if picture is None:
        raise ValueError("has no image field")
    number = next((i for i, kind in enumerate(types) if kind == INT), None)
    records = metadata[f"f{picture}"]
    n = len(records)
    label = np.full(n, -1, np.int64) if number is None else metadata[f"f{number}"].astype(np.int64)
    offset = records["ptr"].astype(np.uint64)
    order = np.argsort(allocations["ptr"], kind="stable")
    where = np.searchsorted(allocations["ptr"][order], offset)
    found = where < len(order)
    found[found] = allocations["ptr"][order][where[found]] == offset[found]
    if not found.all():
        raise ValueError(
            f"sample {int(np.argmin(found))} points at {int(offset[np.argmin(found)])}, which was never allocated"
        )
    length = allocations["size"][order][where].astype(np.uint64)
    if types[picture] == BYTES:
        zeros = np.zeros(n, np.int32)
        return Contents(page_size, table, label, offset, length, zeros, zeros, np.full(n, codec.YUV420, np.uint8))
    kind = np.where(records["mode"] == 0, codec.JPEG, codec.RAW).astype(np.uint8)
    height, width = records["height"].astype(np.int32), records["width"].astype(np.int32)
    return Contents(page_size, table, label, offset, length, height, width, kind)
