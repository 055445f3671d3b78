"""Payloads to pixels.

A payload is a numpy array, and its shape says what it is:

====================  ==================================================================
1-D uint8             the bytes of a JPEG file
(H, W, 3) uint8       raw RGB
(H * 3 / 2, W) uint8  planar 4:2:0 (I420, BT.601 as OpenCV has it), H and W even
(H, W, C)             raw, of a set of another `Layout`: C channels, uint8 or uint16
====================  ==================================================================

JPEG goes through libjpeg-turbo (package simplejpeg): no torch, no interpreter lock, and damage that libjpeg
would only warn about is an error here.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import simplejpeg

JPEG, RAW, YUV420 = 0, 1, 2  # kinds of payload, as the index stores them
ENCODINGS = ("jpeg", "raw", "yuv420")  # of RGB
ARRAY = "array"  # the encoding that keeps any number of channels, and 16 bits
MAX_CHANNELS = 512  # what OpenCV resizes
QUALITY, SUBSAMPLING = 95, "420"  # of a JPEG that is encoded here
# Of luma and the two chromas, as in a header: 4:4:4, 4:2:2, 4:4:0, 4:2:0, 4:1:1, 4:4:1.
SAMPLINGS = frozenset(bytes([luma, 0x11, 0x11]) for luma in (0x11, 0x21, 0x12, 0x22, 0x41, 0x14))
STRAY = 16  # bytes before the end marker that touch no pixel; more of them is image data that found no place
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of a frame, which says the size
STANDALONE = frozenset((0x01, *range(0xD0, 0xD8)))  # markers without a length: TEM, RST0-7


class Layout(NamedTuple):
    """What all pixels of a set are: so many channels, of 8 or 16 bits each. Those of another than RGB are stored raw."""

    channels: int = 3
    bits: int = 8

    @classmethod
    def of(cls, pixels: np.ndarray) -> Layout:
        """Of (H, W, C) uint8 or uint16."""
        return cls(pixels.shape[2], 8 * pixels.itemsize)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(f"<u{self.bits // 8}")

    @property
    def white(self) -> int:
        """The largest value there is."""
        return (1 << self.bits) - 1

    @property
    def bytes(self) -> int:
        """Of a pixel."""
        return self.channels * self.bits // 8

    def __str__(self) -> str:
        return f"{self.channels} channel{'s' * (self.channels > 1)} of {self.bits} bits"


RGB = Layout()


class UnknownSampling(ValueError):
    """A JPEG of a chroma sampling that libjpeg-turbo's fast interface does not read; nothing need be wrong with it."""


@dataclass(frozen=True)
class Jpeg:
    """What the headers of a JPEG say. `plain`: baseline, upright, grey or 3 colors: it may pass through as it is.
    `usual`: of a chroma sampling that libjpeg-turbo's fast interface knows for certain. `orientation`: as in EXIF, 1 to 8."""

    height: int
    width: int
    plain: bool
    usual: bool = True
    orientation: int = 1
    components: int = 3


def decode(payload: np.ndarray) -> np.ndarray:
    """A payload's pixels: (H, W, 3) uint8 RGB, or (H, W, C) of another `Layout`. A raw payload is returned as it is, not copied.

    Raises ValueError for anything that is not a payload or does not decode to its end.
    """
    if payload.ndim == 3 and payload.dtype in (np.uint8, np.uint16):
        return payload
    if payload.dtype != np.uint8:
        raise ValueError(f"a payload is uint8, not {payload.dtype}")
    if payload.ndim == 1:
        return decode_jpeg(payload)
    if payload.ndim == 2 and payload.shape[0] % 3 == 0 and payload.shape[1] % 2 == 0:
        import cv2  # here, not above: nothing else in a conversion needs it

        return cv2.cvtColor(payload, cv2.COLOR_YUV2RGB_I420)
    raise ValueError(f"no payload has shape {payload.shape}")


def thumbnail(data: np.ndarray) -> np.ndarray:
    """A JPEG at an eighth of its size: (ceil(H / 8), ceil(W / 8), 3) uint8, three quarters of the work of all pixels.

    Every code of every block is read and checked as for a full decode, so damage is found as there (ValueError, the
    same text); left out are the inverse transform and the colors of single pixels, which cannot fail.
    """
    return decode_jpeg(data, min_height=1, min_width=1)


def decode_jpeg(data: np.ndarray, colorspace: str = "RGB", **size: int) -> np.ndarray:
    """(H, W, channels) uint8. ValueError for damage, even what libjpeg would only warn about; `UnknownSampling`."""
    try:
        return simplejpeg.decode_jpeg(data, colorspace, strict=True, **size)
    except ValueError as error:
        if "subsampling" in str(error):
            header = jpeg_header(data)
            if header is None or header.usual:
                raise ValueError("the headers of the JPEG are damaged or cut off") from None
            raise UnknownSampling(str(error)) from None
        # A few bytes between the last scan and the end marker are common in good photos and touch no pixel.
        stray = re.search(r"(\d+) extraneous bytes before marker 0xd9", str(error))
        if stray is None or int(stray[1]) > STRAY:
            raise
        return simplejpeg.decode_jpeg(data, colorspace, strict=False, **size)


def kind(payload: np.ndarray) -> int:
    return (JPEG, YUV420, RAW)[payload.ndim - 1]


def view(data: np.ndarray, kind: int, height: int, width: int, layout: Layout = RGB) -> np.ndarray:
    """Bytes (1-D) as the payload they are."""
    if kind == JPEG:
        return data
    if kind == RAW:
        return (data if layout == RGB else data.view(layout.dtype)).reshape(height, width, layout.channels)
    return data.reshape(height * 3 // 2, width)


def jpeg_header(data: np.ndarray) -> Jpeg | None:
    """What stands before the first scan. None where no frame does, or two; the decoder will say why."""
    frame, exif = None, b""
    for marker, start, end in segments(data):
        if marker == 0xE1:
            body = data[start + 4 : end].tobytes()
            exif += exif_block(body) if body[:6] == b"Exif\0\0" else b""
        elif marker in FRAMES:
            if frame or min(end, len(data)) - start < 10:
                return None
            frame = (marker, data[start + 4 : end].tobytes())
    if frame is None:
        return None
    (marker, frame_header), turned = frame, orientation(exif)
    bits, height, width, components = struct.unpack_from(">BHHB", frame_header)
    plain = marker == 0xC0 and bits == 8 and components in (1, 3) and turned == 1
    usual = components == 1 or frame_header[7:15:3] in SAMPLINGS
    return Jpeg(height, width, plain, usual, turned, components)


def segments(data: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(marker, its offset, the end) of a JPEG's segments, the head of the first scan being the last. Ends early where
    one does not follow the other."""
    view, at = data.data, 2
    while at + 4 <= len(view) and view[at] == 0xFF:
        marker = view[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker in STANDALONE:
            at += 2
        else:
            end = at + 2 + (view[at + 2] << 8 | view[at + 3])
            yield marker, at, end
            if marker == 0xDA:
                return
            at = end


def exif_block(body: bytes) -> bytes:
    """An EXIF block without the words that say so, of which some writers put two."""
    while body[:6] == b"Exif\0\0":
        body = body[6:]
    return body


def orientation(tiff: bytes) -> int:
    """EXIF tag 0x112 of the first directory, 1 to 8; 1 (upright) where there is none, or the block is broken."""
    try:
        order = {b"II": "<", b"MM": ">"}[tiff[:2]]
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, type = struct.unpack_from(order + "HH", tiff, entry)
            if tag == 0x112:
                (value,) = struct.unpack_from(order + INTEGERS[type], tiff, entry + 8)
                return value if 1 <= value <= 8 else 1
    except (KeyError, struct.error):
        pass
    return 1


INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}  # TIFF's types
