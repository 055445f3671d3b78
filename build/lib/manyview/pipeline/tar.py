"""WebDataset shards: plain ustar archives, deterministic, with the index file of DALI's reader beside them."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

SUFFIX = ".tar"
BLOCK = 512
RECORD = 20 * BLOCK  # GNU tar pads archives to whole records
# A header but for name, size and checksum: mode, owner, group; time 0; "\0 " ends the checksum, then a regular file, "ustar".
FRONT, MIDDLE = b"0000644\0" + b"0000000\0" * 2, b"\0" + b"%011o\0" % 0
BACK = (b"\0 0" + bytes(100) + b"ustar\x0000").ljust(BLOCK - 154, b"\0")
CHECK = sum(FRONT + MIDDLE + BACK[2:]) + 8 * ord(" ")  # the checksum counts as eight spaces


class Writer:
    """Appends samples `key.jpg|npy` + `key.cls` to an open file and keeps the lines of the DALI index."""

    def __init__(self, file: BinaryIO, count: int, planar: bool = False) -> None:
        del count, planar  # a tar needs no room in front, and any payload fits; see .beton
        self.file, self.at, self.digest, self.lines = file, 0, hashlib.sha256(), []  # type: ignore[var-annotated]

    def add(self, key: str, label: int, payload: np.ndarray) -> int:
        """Returns the offset of the payload."""
        extension, front = ("jpg", b"") if payload.ndim == 1 else ("npy", npy_header(payload.shape))
        text = b"%d" % label
        size = len(front) + payload.nbytes
        data_at = self.at + BLOCK
        label_at = data_at + _padded(size) + BLOCK
        tail = bytes(-size % BLOCK) + header(f"{key}.cls", len(text)) + text + bytes(-len(text) % BLOCK)
        self._write(header(f"{key}.{extension}", size) + front, payload, tail)
        self.lines.append(f"{extension} {data_at} {size} {key}.{extension} cls {label_at} {len(text)} {key}.cls\n")
        return data_at + len(front)

    def _write(self, *parts) -> None:
        for part in parts:  # not joined: that would be another copy of the payload
            data = part.reshape(-1).data if isinstance(part, np.ndarray) else part
            self.file.write(data)
            self.digest.update(data)
            self.at += len(data)

    def finish(self) -> str:
        """End the archive; returns its SHA-256."""
        self._write(bytes(2 * BLOCK), bytes(-(self.at + 2 * BLOCK) % RECORD))
        return self.digest.hexdigest()

    def index_text(self) -> str:
        """What `wds2idx` writes for this archive."""
        return f"v1.2 {len(self.lines)}\n" + "".join(self.lines)


def header(name: str, size: int) -> bytes:
    """A ustar header: mode 0644, owner 0, time 0. `name`: ASCII, at most 100 bytes."""
    encoded = name.encode("ascii")
    if len(encoded) > 100 or size >= 1 << 33:
        raise ValueError(f"does not fit a ustar header: {name!r}, {size} bytes")
    digits = b"%011o" % size
    check = CHECK + sum(encoded) + sum(digits)
    return b"%b%b%b%b%06o%b" % (encoded.ljust(100, b"\0"), FRONT, digits, MIDDLE, check, BACK)


def npy_header(shape: tuple[int, ...]) -> bytes:
    """The 128 bytes `numpy.save` puts before a C-ordered uint8 array."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def dali_index(path: Path) -> bytes:
    """What `wds2idx` writes for any tar; names that are not text as they are."""
    samples: list[list[str]] = []
    last = None
    with tarfile.open(path, "r:") as archive:
        for info in archive:
            dot = info.name.find(".", info.name.rfind("/") + 1)  # -1 for none, and then as wds2idx has it
            key, extension = info.name[:dot], info.name[dot + 1 :]
            if not info.isreg() or not key or key.endswith("/"):
                continue
            if key != last:
                samples.append([])
                last = key
            samples[-1].append(f"{extension} {info.offset_data} {info.size} {info.name}")
    lines = [f"v1.2 {len(samples)}", *(" ".join(parts) for parts in samples), ""]
    return "\n".join(lines).encode("utf-8", "surrogateescape")
