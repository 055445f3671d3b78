"""Tar archives: WebDataset shards as they are written (plain ustar, deterministic, DALI's index beside them), and any
tar as it is read.

Both by hand. Written: a header by `tarfile` takes longer than a small image's payload. Read: `tarfile` takes a damaged
header for the end of the archive, so that whatever lies behind is lost without a word.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from manyview.pipeline import files

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
        extension, front = ("jpg", b"") if payload.ndim == 1 else ("npy", npy_header(payload))
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
            data = part.reshape(-1).view(np.uint8).data if isinstance(part, np.ndarray) else part
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


def npy_header(array: np.ndarray) -> bytes:
    """The 128 bytes `numpy.save` puts before a C-ordered array."""
    text = f"{{'descr': {array.dtype.str!r}, 'fortran_order': False, 'shape': {array.shape}, }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


# --- reading --------------------------------------------------------------------------------------------------------

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# Bytes of a long name or of extended headers; what claims more is damaged, or meant to fill the memory.
LONGEST = 1 << 20
GLOBAL = b"g"  # header of POSIX that says more of all members
NAMES = (b"x", GLOBAL, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)  # say more of the next
FOLDER = tarfile.DIRTYPE
LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
EMPTY = (*LINKS, tarfile.CHRTYPE, tarfile.BLKTYPE, FOLDER, tarfile.FIFOTYPE)  # without data, whatever they say
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)


class CutOff(ValueError):
    """The archive ends inside a member, or without its end marker."""


class Member(NamedTuple):
    """A file, link or folder of an archive, and where its bytes lie in the file that holds the archive."""

    name: str  # bytes that are not UTF-8 stand as surrogates
    type: bytes
    offset: int
    size: int

    def refused(self) -> str:
        """Why it is not to be used; empty if it may be, or is a folder."""
        if self.name.startswith("/") or ".." in self.name.split("/"):
            return "its name climbs out of the archive"
        if self.type in LINKS:
            return "is a link"
        return "" if self.type in (*REGULAR, FOLDER) else "is no regular file"


def members(path: Path, start: int = 0, stop: int | None = None) -> Iterator[Member]:
    """The members of the archive in bytes `start` .. `stop` of a file (default: all of it), in order.

    Archives one behind the other (`cat a.tar b.tar`) are read as one. `CutOff`, after the last whole member, where the file
    ends too early; ValueError, which names the byte, for a header that is none. UserError: the file cannot be read.
    """
    with files.Opened(path) as file:
        at, stop = start, file.size if stop is None else stop
        ended, more, everywhere = False, {}, {}  # type: ignore[var-annotated]
        while at < stop:
            block = file.read(at, min(BLOCK, stop - at))
            if not block.strip(b"\0"):
                zeros, at = at, _behind_zeros(file, at, stop)
                ended = at - zeros >= 2 * BLOCK
                if not ended and at < stop:
                    raise ValueError(
                        f"no header of a tar at byte {zeros}, but zeros: what lies behind it would be lost"
                    )
                continue
            ended = False
            kind, name, size, data_at = _header(file, block, at, start)
            if kind in NAMES:
                if size > LONGEST:
                    raise ValueError(f"the header at byte {at} is followed by {size} bytes of names")
                _check_end(at, data_at + size, stop)
                records = _names(kind, file.read(data_at, size), at)
                everywhere, more = (everywhere | records, more) if kind == GLOBAL else (everywhere, more | records)
            else:
                said, more = everywhere | more, {}
                size = _number(said["size"], at) if "size" in said else size
                size = 0 if kind in EMPTY else size
                _check_end(at, data_at + size, stop)
                sparse = any(word.startswith("GNU.sparse") for word in said)
                kind = tarfile.GNUTYPE_SPARSE if sparse else kind
                name = said.get("path", name)
                yield Member(name.rstrip("/") if kind == FOLDER else name, kind, data_at, size)
            at = data_at + _padded(size)
        if not ended:
            raise CutOff(f"has no end marker at byte {stop}, where it ends" if stop > start else "is empty")


def _check_end(at: int, end: int, stop: int) -> None:
    if end > stop:
        raise CutOff(f"ends at byte {stop}, inside the member at byte {at}")


def _behind_zeros(file: files.Opened, at: int, stop: int) -> int:
    """Where the next block that is not all zeros begins, or `stop`."""
    while at < stop:
        data = file.read(at, min(LONGEST, stop - at))
        zeros = len(data) - len(data.lstrip(b"\0"))
        at += zeros if zeros == len(data) else zeros // BLOCK * BLOCK
        if zeros < len(data) or not data:
            break
    return at


def _header(file: files.Opened, block: bytes, at: int, start: int) -> tuple[bytes, str, int, int]:
    """Type, name and size of a member, and where its data begins."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        packed = next((name for magic, name in COMPRESSED.items() if block.startswith(magic)), None)
        if packed and at == start:
            raise ValueError(f"is compressed with {packed}, so it cannot be read at random: unpack it") from None
        if len(block) < BLOCK:
            raise CutOff(f"ends at byte {at + len(block)}, inside a header") from None
        raise ValueError(f"no header of a tar at byte {at} ({error}): what lies behind it would be lost") from None
    if info.size < 0:
        raise ValueError(f"the header at byte {at} says {info.size} bytes")
    data_at = at + BLOCK
    if info.type == tarfile.GNUTYPE_SPARSE:  # a map of the holes may go on in blocks of its own
        goes_on = block[482]
        while goes_on:
            goes_on = file.read(data_at, BLOCK).ljust(BLOCK, b"\0")[504]
            data_at += BLOCK
    return info.type, info.name, info.size, data_at


def _names(kind: bytes, data: bytes, at: int) -> dict[str, str]:
    """What a header of names says: `path`, and of POSIX's records also `size` and others."""
    if kind in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
        name = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
        return {"path": name} if kind == tarfile.GNUTYPE_LONGNAME else {}
    records, data = {}, data.rstrip(b"\0")
    while data:  # "LENGTH KEYWORD=VALUE\n"
        length = _number(data.partition(b" ")[0].decode("latin-1"), at)
        word, equals, value = data[:length].partition(b" ")[2].partition(b"=")
        if not equals or value[-1:] != b"\n":
            raise ValueError(f"the extended header at byte {at} is damaged")
        records[word.decode("utf-8", "surrogateescape")] = value[:-1].decode("utf-8", "surrogateescape")
        data = data[length:]
    return records


def _number(text: str, at: int) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", text):
        raise ValueError(f"the extended header at byte {at} is damaged")
    return int(text)


def dali_index(path: Path) -> bytes:
    """What `wds2idx` writes for any tar; names that are not text as they are. Of one that was cut off, what is whole.

    ValueError, UserError as `members`.
    """
    samples: list[list[str]] = []
    last = None
    with contextlib.suppress(CutOff):
        for member in members(path):
            dot = member.name.find(".", member.name.rfind("/") + 1)  # -1 for none, and then as wds2idx has it
            key, extension = member.name[:dot], member.name[dot + 1 :]
            if member.type not in REGULAR or not key or key.endswith("/"):
                continue
            if key != last:
                samples.append([])
                last = key
            samples[-1].append(f"{extension} {member.offset} {member.size} {member.name}")
    lines = [f"v1.2 {len(samples)}", *(" ".join(parts) for parts in samples), ""]
    return "\n".join(lines).encode("utf-8", "surrogateescape")
