"""Images to payloads and back.

A payload is a numpy array, and its shape says what it is:

====================  ==================================================================
1-D uint8             the bytes of a JPEG file
(H, W, 3) uint8       raw RGB
(H * 3 / 2, W) uint8  planar 4:2:0 (I420, BT.601 as OpenCV has it), H and W even
====================  ==================================================================

JPEG goes through libjpeg-turbo (package simplejpeg): no torch, no interpreter lock, and damage that libjpeg
would only warn about is an error here.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import simplejpeg

JPEG, RAW, YUV420 = 0, 1, 2  # kinds of payload, as the index stores them
ENCODINGS = ("jpeg", "raw", "yuv420")
TINY = 64  # images of this many pixels a side and under are stored raw: decoding them costs more than it saves
MAX_SIDE = 65_500  # of a JPEG; .beton stores sides in 16 bits
QUALITY = 95
# Of luma and the two chromas, as in a header: 4:4:4, 4:2:2, 4:4:0, 4:2:0, 4:1:1, 4:4:1.
SAMPLINGS = frozenset(bytes([luma, 0x11, 0x11]) for luma in (0x11, 0x21, 0x12, 0x22, 0x41, 0x14))
SUBSAMPLING = "420"


@dataclass(frozen=True)
class Settings:
    """What conversion does to an image; part of the manifest."""

    encoding: str = "jpeg"
    size: int = 0  # short side in pixels, 0 = as it is; never enlarged
    quality: int = QUALITY
    max_pixels: int = 100_000_000


@dataclass(frozen=True)
class Jpeg:
    """What the headers of a JPEG say. `plain`: baseline, upright, grey or 3 colors: it may pass through as it is.
    `usual`: of a chroma sampling that libjpeg-turbo's fast interface knows for certain."""

    height: int
    width: int
    plain: bool
    usual: bool = True


def decode(payload: np.ndarray) -> np.ndarray:
    """A payload's pixels: (H, W, 3) uint8 RGB. A raw payload is returned as it is, not copied.

    Raises ValueError for anything that is not a payload or does not decode to its end.
    """
    if payload.dtype != np.uint8:
        raise ValueError(f"a payload is uint8, not {payload.dtype}")
    if payload.ndim == 1:
        return _decode_jpeg(payload)
    if payload.ndim == 3 and payload.shape[2] == 3:
        return payload
    if payload.ndim == 2 and payload.shape[0] % 3 == 0 and payload.shape[1] % 2 == 0:
        import cv2  # here, not above: nothing else in a conversion needs it

        return cv2.cvtColor(payload, cv2.COLOR_YUV2RGB_I420)
    raise ValueError(f"no payload has shape {payload.shape}")


def thumbnail(data: np.ndarray) -> np.ndarray:
    """A JPEG at an eighth of its size: (ceil(H / 8), ceil(W / 8), 3) uint8, three quarters of the work of all pixels.

    Every code of every block is read and checked as for a full decode, so damage is found as there (ValueError, the
    same text); left out are the inverse transform and the colors of single pixels, which cannot fail.
    """
    return _decode_jpeg(data, min_height=1, min_width=1)


def _decode_jpeg(data, **size) -> np.ndarray:
    try:
        return simplejpeg.decode_jpeg(data, "RGB", strict=True, **size)
    except ValueError as error:
        # Bytes between the last scan and the end marker are common in good photos and touch no pixel.
        if "extraneous bytes before marker 0xd9" not in str(error):
            raise
        return simplejpeg.decode_jpeg(data, "RGB", strict=False, **size)


def kind(payload: np.ndarray) -> int:
    return (JPEG, YUV420, RAW)[payload.ndim - 1]


def view(data: np.ndarray, kind: int, height: int, width: int) -> np.ndarray:
    """Bytes (1-D) as the payload they are."""
    if kind == JPEG:
        return data
    return data.reshape((height, width, 3) if kind == RAW else (height * 3 // 2, width))


class Converted(NamedTuple):
    """A payload, its pixels (H, W, 3) uint8 (None if they were not made), its size, its thumbnail (or None)."""

    payload: np.ndarray
    pixels: np.ndarray | None
    height: int
    width: int
    thumbnail: np.ndarray | None = None


def convert(data: np.ndarray, settings: Settings, look: str = "pixels") -> Converted:
    """A source image to a payload; the image is decoded completely, once.

    `data`: the bytes of an image file (1-D), or pixels (H, W) or (H, W, 3), uint8. A baseline JPEG keeps its bytes
    unless it is resized; everything else is encoded once. Raises ValueError with the reason when it cannot be used.
    `look`: what is asked of a baseline JPEG that may keep its bytes and is not cut off. "pixels": they are made.
    "thumbnail": all its data are decoded, see `thumbnail`. "headers": it passes on the word of its headers.
    """
    jpeg = None
    if data.ndim == 1:
        jpeg = jpeg_header(data) if data[:3].tobytes() == b"\xff\xd8\xff" else None
        if look != "pixels" and jpeg is not None and _passes(jpeg, data, settings):
            with _unless_unusual():
                small = thumbnail(data) if look == "thumbnail" else None
                return Converted(data, None, jpeg.height, jpeg.width, small)
        jpeg, pixels = _decode_any(data, jpeg, settings.max_pixels)
    else:
        pixels = data if data.ndim == 3 else np.repeat(data[..., None], 3, axis=2)
    small = shrink(pixels, settings.size) if settings.size else pixels
    height, width = small.shape[:2]
    if max(height, width) <= TINY or settings.encoding == "raw":
        return Converted(np.ascontiguousarray(small), small, height, width)
    if settings.encoding == "yuv420":
        return Converted(to_yuv420(small), small, height + height % 2, width + width % 2)
    if jpeg is not None and jpeg.plain and small is pixels:
        return Converted(data, pixels, height, width)
    return Converted(encode(small, settings.quality), small, height, width)


def _passes(jpeg: Jpeg, data: np.ndarray, settings: Settings) -> bool:
    short, long = sorted((jpeg.height, jpeg.width))
    _check_size(jpeg.height, jpeg.width, settings.max_pixels)
    small = settings.size and short > settings.size
    whole = data[-2:].tobytes() == b"\xff\xd9"
    return jpeg.plain and jpeg.usual and whole and settings.encoding == "jpeg" and long > TINY and not small


def encode(pixels: np.ndarray, quality: int = QUALITY) -> np.ndarray:
    """(H, W, 3) uint8 RGB to the bytes of a baseline JPEG, exact DCT, 4:2:0."""
    data = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling=SUBSAMPLING, fastdct=False
    )
    return np.frombuffer(data, np.uint8)


def to_yuv420(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB to planar 4:2:0 (H' * 3 / 2, W'); an odd side gets its last row or column twice."""
    import cv2

    height, width = pixels.shape[:2]
    if height % 2 or width % 2:
        pixels = cv2.copyMakeBorder(pixels, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2YUV_I420)


def shrink(pixels: np.ndarray, short: int) -> np.ndarray:
    """Short side to `short` pixels by area averaging, which antialiases; the image itself if it is no larger."""
    import cv2

    height, width = pixels.shape[:2]
    if min(height, width) <= short:
        return pixels
    scale = short / min(height, width)
    return cv2.resize(pixels, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)


# --- reading whatever people have -----------------------------------------------------------------------------------


def _decode_any(data: np.ndarray, jpeg: Jpeg | None, max_pixels: int) -> tuple[Jpeg | None, np.ndarray]:
    if not len(data):
        raise ValueError("empty file")
    if jpeg is None or not jpeg.plain:
        return None, _decode_pillow(data, max_pixels)
    _check_size(jpeg.height, jpeg.width, max_pixels)
    with _unless_unusual():
        return jpeg, _decode_jpeg(data)
    return None, _decode_pillow(data, max_pixels)


@contextmanager
def _unless_unusual() -> Iterator[None]:
    """Go on behind the block where libjpeg-turbo's fast interface, which knows seven chroma samplings, meets another."""
    try:
        yield
    except ValueError as error:
        if "subsampling" not in str(error):
            raise


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if not height or not width:
        raise ValueError(f"{width}x{height} pixels")
    if height * width > max_pixels or max(height, width) > MAX_SIDE:
        raise ValueError(f"{width}x{height} pixels is beyond the limit ({max_pixels} pixels, {MAX_SIDE} a side)")


def _decode_pillow(data: np.ndarray, max_pixels: int) -> np.ndarray:
    """First frame, upright, 8-bit RGB, transparency on white."""
    from PIL import Image, ImageOps

    Image.MAX_IMAGE_PIXELS = None  # the limit is checked here, before any pixel is decoded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image: Image.Image = Image.open(io.BytesIO(data.tobytes()))
            _check_size(image.height, image.width, max_pixels)
            image.load()
            image = ImageOps.exif_transpose(image)
            return np.asarray(_rgb(image))
        except (MemoryError, ValueError):
            raise
        except Image.UnidentifiedImageError:
            raise ValueError(f"not an image: begins with {data[:12].tobytes()!r}") from None
        except Exception as error:  # Pillow's plugins raise whatever their parsers meet
            raise ValueError(f"{type(error).__name__}: {error}") from error


def _rgb(image):
    from PIL import Image

    if image.mode in ("F",):
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # 16 bits a pixel, whatever the byte order
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65_535:
            raise ValueError("integer pixels beyond 16 bits have no known range")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def jpeg_header(data: np.ndarray) -> Jpeg | None:
    """Walk the segments up to the scan. None where that does not work out; the decoder will say why."""
    view = data[: 1 << 20].data  # APP segments of a megabyte are no photo's
    at, rotated = 2, False
    while at + 9 < len(view):
        marker = view[at + 1]
        if view[at] != 0xFF or marker == 0xDA:
            return None
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        length = int.from_bytes(view[at + 2 : at + 4], "big")
        if marker == 0xE1 and view[at + 4 : at + 10] == b"Exif\0\0":
            rotated = rotated or _orientation(bytes(view[at + 10 : at + 2 + length])) not in (0, 1)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, height, width, components = struct.unpack_from(">BHHB", view, at + 4)
            plain = marker == 0xC0 and bits == 8 and components in (1, 3) and not rotated
            return Jpeg(height, width, plain, components == 1 or bytes(view[at + 11 : at + 19 : 3]) in SAMPLINGS)
        at += 2 + length
    return None


def _orientation(tiff: bytes) -> int:
    """EXIF tag 0x112 of the first directory; 0 where there is none, or the block is broken."""
    try:
        order = {b"II": "<", b"MM": ">"}[tiff[:2]]
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(count):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * entry)
            if tag == 0x112:
                return value if 1 <= value <= 8 else 0
    except (KeyError, struct.error):
        pass
    return 0
