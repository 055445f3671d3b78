"""FFCV shards (`.beton`, format version 2), written and read without the ffcv package, which has to be compiled, writes with
an order and padding that depend on its processes, and opens a damaged file as if it were whole.

Layout, little-endian: header, one descriptor a field, the samples' metadata, data pages, allocation table to the end.
A payload never crosses a page (pages lie at multiples of the page size). The header is written last, so an
interrupted file has a zero where the allocation table's address belongs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import simplejpeg

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
LABELS = ("label", "target", "class", "cls")  # usual names of the field that is the class
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
            sides = payload.shape if payload.ndim == 3 else simplejpeg.decode_jpeg_header(payload, strict=False)
            height, width = sides[:2]
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


@dataclass
class Contents:
    """What a .beton holds: one entry a sample in each array. `label` as it stands: float64 where its field is one, -1 without a
    label; `note`: why there are none, where a field might have been one."""

    page_size: int
    table: int
    label: np.ndarray
    note: str
    offset: np.ndarray
    length: np.ndarray
    height: np.ndarray  # 0 in a bytes field, which does not say
    width: np.ndarray
    kind: np.ndarray  # codec.JPEG, codec.RAW, or codec.YUV420 for a bytes field


class Field(NamedTuple):
    name: str
    type: int
    column: str  # of the metadata


def read(path: Path, image: str = "", label: str = "") -> Contents:
    """Parse headers, metadata and allocation table. `image`, `label`: names of the fields to take, if not the usual ones; label
    also `none`. Raises ValueError with the reason where they do not hold together, or which field is meant is not clear."""
    size = path.stat().st_size
    if size < HEADER.itemsize:
        raise ValueError("too short for a header")
    header = np.fromfile(path, HEADER, 1)[0]
    if header["version"] != VERSION:
        raise ValueError(f"not an FFCV file of version {VERSION}")
    table, samples, page_size = int(header["table"]), int(header["samples"]), int(header["page_size"])
    if table == 0:
        raise ValueError("unfinished: the header has no allocation table, so its writer was interrupted")
    if table > size or (size - table) % ALLOCATION.itemsize:
        raise ValueError(f"cut off: the allocation table at {table} does not end with the file at {size}")
    raw = np.fromfile(path, FIELD, int(header["fields"]), offset=HEADER.itemsize)
    fields = [Field(name.decode("latin-1"), int(kind), f"f{i}") for i, (kind, name, _) in enumerate(raw)]
    if unknown := [field for field in fields if field.type not in RECORDS]:
        raise ValueError(f"field type {unknown[0].type} has no known layout")
    front, layout = HEADER.itemsize + raw.nbytes, _metadata([field.type for field in fields])
    if front + samples * layout.itemsize > table:
        raise ValueError(f"metadata of {samples} samples does not fit before the allocation table")
    if not page_size or size - table > samples * len(fields) * ALLOCATION.itemsize:
        raise ValueError(f"pages of {page_size} bytes, or more of them than {samples} samples can have")
    picture, number, note = _image_field(fields, image), *_label_field(fields, label)
    metadata = np.fromfile(path, layout, samples, offset=front)
    allocations = np.fromfile(path, ALLOCATION, offset=table)
    values = np.full(samples, -1, np.int64) if number is None else metadata[number.column]
    if number and number.type == FLOAT and 2 * np.count_nonzero(np.rint(values) == values) <= samples:
        values, note = np.full(samples, -1, np.int64), f"field {number.name} holds fractions"
    return Contents(page_size, table, values, note, *_places(picture, metadata[picture.column], allocations))


def _image_field(fields: list[Field], wanted: str) -> Field:
    pictures = [field for field in fields if field.type == IMAGE] or [field for field in fields if field.type == BYTES]
    named = [field for field in pictures if field.name == (wanted or "image")]
    if wanted and not named:
        raise ValueError(f"has no image field {wanted!r}, only {_names(pictures)}")
    if not pictures:
        raise ValueError("has no image field")
    if len(pictures) > 1 and not named:
        raise ValueError(f"has several image fields ({_names(pictures)}): --image-part names the one to take")
    return (named or pictures)[0]


def _label_field(fields: list[Field], wanted: str) -> tuple[Field | None, str]:
    """By its name, else the only whole number; and why there is none where there could have been."""
    others = [field for field in fields if field.type not in (IMAGE, BYTES)]
    named = [field for name in ([wanted] if wanted else LABELS) for field in others if field.name == name]
    numbers = [field for field in others if field.type == INT]
    if wanted == "none" or not others:
        return None, ""
    if wanted and not named:
        raise ValueError(f"has no field {wanted!r} that could be the label, only {_names(others)}")
    if len(numbers) > 1 and not named:
        raise ValueError(f"has several fields of whole numbers ({_names(numbers)}): --label-part names the label")
    field = (named or numbers or others)[0]
    if field.type == INT or (field.type == FLOAT and named):
        return field, ""
    if field.type == FLOAT:
        return None, f"field {field.name} is no whole number (--label-part {field.name} takes it where its values are)"
    return None, f"field {field.name} is an array"


def _names(fields: list[Field]) -> str:
    return ", ".join(field.name for field in fields)


def _places(field: Field, records: np.ndarray, allocations: np.ndarray) -> tuple[np.ndarray, ...]:
    """Offset, length, height, width and kind of every sample's image."""
    n, offset = len(records), records["ptr"].astype(np.uint64)
    order = np.argsort(allocations["ptr"], kind="stable")
    where = np.searchsorted(allocations["ptr"][order], offset)
    known = where < len(order)
    known[known] = allocations["ptr"][order][where[known]] == offset[known]
    if not known.all():
        i = int(np.argmin(known))
        raise ValueError(f"sample {i} points at {int(offset[i])}, which was never allocated")
    length = allocations["size"][order][where].astype(np.uint64)
    if field.type == BYTES:
        zeros = np.zeros(n, np.int32)
        return offset, length, zeros, zeros, np.full(n, codec.YUV420, np.uint8)
    kind = np.where(records["mode"] == 0, codec.JPEG, codec.RAW).astype(np.uint8)
    return offset, length, records["height"].astype(np.int32), records["width"].astype(np.int32), kind
