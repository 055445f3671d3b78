"""Images to payloads: whatever people have, decoded completely, once."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import simplejpeg

from manyview.pipeline import codec
from manyview.pipeline.codec import QUALITY, SUBSAMPLING
from manyview.pipeline.manifest import Options

TINY = 64  # images of this many pixels a side and under are stored raw: decoding them costs more than it saves
MAX_SIDE = 65_500  # of a JPEG; .beton stores sides in 16 bits
# What Pillow may be asked for: none that runs a program (EPS: Ghostscript) or reads another file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "ICO", "JPEG2000", "AVIF")
STRIP = 1_000_000  # pixels that are made RGB at a time


class Converted(NamedTuple):
    """A payload, its pixels (H, W, 3) uint8 if they were made, its size, its thumbnail if any, and what was lost, in words."""

    payload: np.ndarray
    pixels: np.ndarray | None
    height: int
    width: int
    thumbnail: np.ndarray | None = None
    note: str = ""


class Picture(NamedTuple):
    """Decoded: (H, W, 3) uint8, upright; what was lost, in words; whether it is a JPEG that every reader takes as it is."""

    pixels: np.ndarray
    note: str = ""
    plain: bool = False


def convert(data: np.ndarray, options: Options, look: str = "pixels") -> Converted:
    """A source image to a payload; the image is decoded completely, once.

    `data`: the bytes of an image file (1-D), or pixels (H, W) or (H, W, 3), uint8. A baseline JPEG keeps its bytes
    unless it is resized; everything else is encoded once. Raises ValueError with the reason when it cannot be used.
    `look`: what is asked of a baseline JPEG that may keep its bytes and is not cut off. "pixels": they are made.
    "thumbnail": all its data are decoded, see `codec.thumbnail`. "headers": it passes on the word of its headers.
    """
    if data.ndim > 1:
        check_size(data.shape[0], data.shape[1], options.max_pixels)
        if data.ndim == 3 and (layout := codec.Layout.of(data)) != codec.RGB:
            raise ValueError(f"{layout}: --encoding {codec.ARRAY} keeps them")
        picture = Picture(data if data.ndim == 3 else np.repeat(data[..., None], 3, axis=2))
    elif data[:3].tobytes() != b"\xff\xd8\xff":
        picture = _decode_pillow(data.tobytes(), options)
    else:
        jpeg = codec.jpeg_header(data)
        check_headers(data, jpeg, options.max_pixels)
        if look != "pixels" and jpeg is not None and _passes(jpeg, data, options):
            try:
                small = codec.thumbnail(data) if look == "thumbnail" else None
                return Converted(data, None, jpeg.height, jpeg.width, small)
            except codec.UnknownSampling:
                pass  # Pillow may know it
        picture = decode_jpeg(data, jpeg, options)
    pixels = shrink(picture.pixels, options.size) if options.size else picture.pixels
    height, width = pixels.shape[:2]
    if max(height, width) <= TINY or options.encoding == "raw":
        payload = np.ascontiguousarray(pixels)
    elif options.encoding == "yuv420":
        payload, height, width = to_yuv420(pixels), height + height % 2, width + width % 2
    elif picture.plain and pixels is picture.pixels:
        payload = data
    else:
        payload = encode(pixels, options.quality)
    return Converted(payload, pixels, height, width, note=picture.note)


def _passes(jpeg: codec.Jpeg, data: np.ndarray, options: Options) -> bool:
    short, long = sorted((jpeg.height, jpeg.width))
    small = options.size and short > options.size
    whole = data[-2:].tobytes() == b"\xff\xd9"
    return jpeg.plain and jpeg.usual and whole and options.encoding == "jpeg" and long > TINY and not small


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


def check_size(height: int, width: int, max_pixels: int) -> None:
    if not height or not width:
        raise ValueError(f"{width}x{height} pixels")
    if height * width > max_pixels or max(height, width) > MAX_SIDE:
        raise ValueError(f"{width}x{height} pixels is beyond the limit ({max_pixels} pixels, {MAX_SIDE} a side)")


# --- JPEG ------------------------------------------------------------------------------------------------------------


def check_headers(data: np.ndarray, jpeg: codec.Jpeg | None, max_pixels: int) -> None:
    """ValueError if a JPEG is too large, or for our reader of headers another size than for the decoder."""
    if jpeg is not None:
        check_size(jpeg.height, jpeg.width, max_pixels)
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return  # the decoder will say why
    check_size(height, width, max_pixels)
    if jpeg is not None and (jpeg.height, jpeg.width) != (height, width):
        raise ValueError(f"its headers say {jpeg.width}x{jpeg.height} pixels, its decoder {width}x{height}")


def decode_jpeg(data: np.ndarray, jpeg: codec.Jpeg | None, options: Options) -> Picture:
    """All kinds of JPEG by one decoder with one rule for damage; colors and samplings that it does not make by Pillow."""
    try:
        if jpeg is not None and jpeg.components == 4:
            codec.decode_jpeg(data, "CMYK")  # for the damage that Pillow does not tell of
            pixels = _decode_pillow(_bare_jpeg(data), options).pixels
        else:
            pixels = codec.decode_jpeg(data)
    except codec.UnknownSampling:
        pixels = _decode_pillow(_bare_jpeg(data), options).pixels
        return Picture(upright(pixels, jpeg.orientation if jpeg else 1))
    return Picture(upright(pixels, jpeg.orientation if jpeg else 1), plain=jpeg is not None and jpeg.plain)


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo what EXIF's orientation (1 to 8) says of stored pixels."""
    if orientation >= 5:  # rows are columns
        pixels = pixels.transpose(1, 0, 2)
    turns = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}
    down, right = turns.get(orientation, (1, 1))
    return np.ascontiguousarray(pixels[::down, ::right])


# --- everything else, by Pillow --------------------------------------------------------------------------------------


def _decode_pillow(data: bytes, options: Options) -> Picture:
    """First frame, upright, 8-bit RGB, transparency on white."""
    with opened(data, FORMATS, options.max_pixels) as (image, bare, turned):
        pixels, note = _rgb(image, bare, options.white)
        return Picture(upright(pixels, turned), note)


@contextlib.contextmanager
def opened(data: bytes, formats: tuple[str, ...], max_pixels: int) -> Iterator[tuple[Any, bytes, int]]:
    """An image of these of Pillow's formats: it, its bytes without metadata, so that they can spoil nothing, and EXIF's
    orientation. Whatever goes wrong inside is a ValueError with the reason."""
    from PIL import Image

    if not data:
        raise ValueError("empty file")
    Image.MAX_IMAGE_PIXELS = None  # the limit is checked here, before any pixel is decoded
    Image.init()
    turned = 1
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        data, turned = _bare_png(data)
    elif data[:4] in (b"II*\0", b"MM\0*"):
        data, turned = _bare_tiff(data), codec.orientation(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=[name for name in formats if name in Image.OPEN])
            check_size(image.height, image.width, max_pixels)
            image.load()
            if image.format in ("WEBP", "AVIF"):
                turned = codec.orientation(codec.exif_block(image.info.get("exif", b"")))
            yield image, data, turned
        except (MemoryError, ValueError):
            raise
        except Image.UnidentifiedImageError:
            raise ValueError(f"not an image: begins with {data[:12]!r}") from None
        except Exception as error:  # Pillow's plugins raise whatever their parsers meet
            raise ValueError(f"{type(error).__name__}: {error}") from error


def _bare_jpeg(data: np.ndarray) -> bytes:
    """A JPEG without comments and without application segments but Adobe's, which says what its colors are."""
    kept, end = [b"\xff\xd8"], 2
    for marker, start, end in codec.segments(data):
        if marker < 0xE0 or marker == 0xEE:
            kept.append(data[start:end].tobytes())
    return b"".join([*kept, data[end:].tobytes()])


def _bare_png(data: bytes) -> tuple[bytes, int]:
    """The parts that make the picture, and its EXIF orientation."""
    kept, exif, at = [data[:8]], b"", 8
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        body, end = data[at + 8 : at + 8 + length], at + 12 + length
        if not name[0] & 0x20 or name == b"tRNS":  # a capital letter: a decoder has to know it
            kept.append(data[at:end])
        elif name == b"eXIf":
            exif = exif or body
        elif name in (b"tEXt", b"zTXt") and body.startswith(b"Raw profile type exif\0"):
            exif = exif or _raw_profile(body[22:], name == b"zTXt")
        at = end
    return b"".join(kept), codec.orientation(codec.exif_block(exif))


def _raw_profile(text: bytes, packed: bool) -> bytes:
    """EXIF as ImageMagick wrote it before PNG had a chunk for it: a name, a length, hexadecimal digits."""
    try:
        text = zlib.decompressobj().decompress(text[1:], 1 << 20) if packed else text
        return bytes.fromhex(b"".join(text.split()[2:]).decode("ascii"))
    except (zlib.error, ValueError):
        return b""


# Of a TIFF's first directory, what decoding takes: sizes, bits, strips and tiles, compression, colors.
PICTURE_TAGS = {
    254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 338, 339,
    347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 532, 50674,
}  # fmt: skip


def _bare_tiff(data: bytes) -> bytes:
    order = "<" if data[:2] == b"II" else ">"
    try:
        (directory,) = struct.unpack_from(order + "I", data, 4)
        (count,) = struct.unpack_from(order + "H", data, directory)
    except struct.error:
        return data
    start, end = directory + 2, directory + 2 + 12 * count
    entries = [data[at : at + 12] for at in range(start, end, 12)]
    kept = [entry for entry in entries if len(entry) == 12 and struct.unpack(order + "H", entry[:2])[0] in PICTURE_TAGS]
    lines = struct.pack(order + "H", len(kept)) + b"".join(kept) + data[end : end + 4]
    return data[:directory] + lines + data[directory + len(lines) :]


def _rgb(image, data: bytes, white: float) -> tuple[np.ndarray, str]:
    """(H, W, 3) uint8, and what was lost in words."""
    bits, note = bits_of(image, data), ""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        narrow, note = _narrower(values, bits, image.format == "TIFF", white)
        return _by_strips(image.size, lambda top, end: narrow(values[top:end, :, None])), note
    colors = deep_colors(data) if bits > 8 else None
    if colors is not None and colors.shape[1::-1] == image.size:
        narrow, note = _narrower(colors[..., :3], bits, False, white)
        pixels = _by_strips(image.size, lambda top, end: _deep_on_white(colors[top:end], narrow))
    else:
        note = f"{bits} bits: the upper 8 were kept" if bits > 8 else ""
        pixels = _by_strips(image.size, lambda top, end: _on_white(image.crop((0, top, image.width, end))))
    bands = image.tag_v2.get(277, 1) if image.format == "TIFF" else 0
    more = bands > len(image.getbands()) or image.mode == "RGBX"
    return pixels, "; ".join(filter(None, [note, "bands beyond red, green and blue were left out" * more]))


def _by_strips(size: tuple[int, int], rows: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """(H, W, 3) uint8 of an image of `size` (width, height), some rows at a time: a large one is in memory once, and what is
    worked with on the way is small. `rows(top, end)`: what becomes these rows."""
    width, height = size
    pixels, step = np.empty((height, width, 3), np.uint8), max(1, STRIP // width)
    for top in range(0, height, step):
        pixels[top : top + step] = rows(top, min(top + step, height))
    return pixels


def _on_white(image) -> np.ndarray:
    from PIL import Image

    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def deep_colors(data: bytes) -> np.ndarray | None:
    """(H, W, bands) uint16, which Pillow cuts to 8 bits."""
    import cv2

    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    return values if values is not None and values.dtype == np.uint16 and values.ndim == 3 else None


def _deep_on_white(values: np.ndarray, narrow: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """(h, W, 3 or 4) uint16 as OpenCV reads them, blue first, to (h, W, 3) uint8."""
    colors = narrow(values[..., 2::-1])
    if values.shape[2] == 3:
        return colors
    alpha = values[..., 3:].astype(np.float32) / 65_535
    return np.rint(colors * alpha + 255 * (1 - alpha)).astype(np.uint8)


def bits_of(image, data: bytes) -> int:
    """Bits of a value in the file; of colors Pillow makes 8 without telling."""
    if image.format == "PNG":
        return data[24]
    return max(image.tag_v2.get(258, (8,))) if image.format == "TIFF" else 8


def _narrower(
    values: np.ndarray, bits: int, tiff: bool, white: float
) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """What makes values of more than 8 bits to 8, and in words what that costs.

    `white`: the value that becomes 255; 0 = what the type says. 32 bits say nothing, so that a TIFF of them with
    values up to 255 is taken for one of 8 bits."""
    least, largest = values.min(), values.max()
    if white:
        scale = 255 / white
        note = f"values above white ({white:g}) were cut to it" if largest > white else ""
        return lambda some: np.rint(np.clip(some * scale, 0, 255)).astype(np.uint8), note
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError("floating-point pixels have no known range; --white VALUE says what is white")
    if least < 0 or largest > 65_535:
        raise ValueError("integer pixels beyond 16 bits have no known range; --white VALUE says what is white")
    if tiff and bits == 32 and largest <= 255:
        return lambda some: some.astype(np.uint8), "values of 32 bits up to 255 were taken for 8 bits"
    if tiff and 8 < bits < 16:
        return lambda some: (some >> (bits - 8)).astype(np.uint8), f"{bits} bits: the upper 8 were kept"
    used = max(8, int(largest).bit_length())
    way = f"; their values use {used}, so they are dark: --white {(1 << used) - 1} makes them bright"
    dark = way if used < 15 else ""
    return lambda some: (some >> 8).astype(np.uint8), f"16 bits: the upper 8 were kept{dark}"
