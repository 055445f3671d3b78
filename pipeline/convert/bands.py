"""Images of any number of channels, of 8 or 16 bits, with every value as it is in the file: `--encoding array`.

Microscopes and satellites give one channel, or thirteen, and use what 16 bits hold. Such images are stored raw. Read are PNG,
TIFF (by tifffile), .npy, JPEG, BMP and WebP: formats of which nothing is narrowed on the way.
"""

from __future__ import annotations

import io
import logging
import re

import numpy as np

from manyview.pipeline import codec
from manyview.pipeline.codec import ARRAY, RGB, Layout
from manyview.pipeline.convert import encode
from manyview.pipeline.convert.sources import NPY, Source, read_npy
from manyview.pipeline.errors import UserError
from manyview.pipeline.manifest import Options

FORMATS = ("PNG", "BMP", "WEBP")  # of Pillow's
EIGHT_BITS = ("L", "LA", "RGB", "RGBA")  # its modes of which nothing is lost
MAX_BYTES = 1 << 32  # of a payload, as an index counts them


def convert(data: np.ndarray, options: Options, wanted: Layout, look: str = "pixels") -> encode.Converted:
    """A source image to a payload: by `encode.convert`, or where the options ask for an array to one with every value of the
    image, of the layout that is `wanted`. ValueError with the reason when it cannot be used."""
    if options.encoding != ARRAY:
        return encode.convert(data, options, look)
    pixels = decode(data, options.max_pixels)
    if Layout.of(pixels) != wanted:
        raise ValueError(f"has {Layout.of(pixels)}, the set has {wanted}")
    if options.size:
        small = encode.shrink(pixels, options.size)
        pixels = small.reshape(*small.shape[:2], wanted.channels)  # OpenCV drops an axis of one channel
    payload = np.ascontiguousarray(pixels)
    if payload.nbytes >= MAX_BYTES:
        raise ValueError(f"{payload.nbytes:,} bytes of pixels do not fit an index")
    return encode.Converted(payload, payload, *payload.shape[:2])


def layout(options: Options, source: Source) -> Layout:
    """Of a set: RGB, or as the first image has it that can be read. UserError where there is none."""
    if options.encoding != ARRAY:
        return RGB
    reason = "there is none"
    for split, i in ((each, i) for each in source.splits for i in range(len(each.names))):
        try:
            return Layout.of(decode(split.read(i), options.max_pixels))
        except ValueError as error:
            reason = str(error)
    raise UserError(f"not one image can be kept as an array ({reason})")


def decode(data: np.ndarray, max_pixels: int) -> np.ndarray:
    """(H, W, C) uint8 or uint16, upright. ValueError with the reason for what cannot be kept as it is."""
    start = data[:8].tobytes() if data.ndim == 1 else b""
    if data.ndim > 1:
        pixels = data
    elif start.startswith(NPY):
        pixels = channels_last(read_npy(data))
    elif start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        pixels = _tiff(data, max_pixels)
    elif start.startswith(b"\xff\xd8\xff"):
        pixels = _jpeg(data, max_pixels)
    else:
        with encode.opened(data.tobytes(), FORMATS, max_pixels) as (image, bare, turned):
            pixels = encode.upright(_values(image, bare), turned)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3:
        raise ValueError(f"an array of {pixels.shape} is no image")
    height, width, channels = pixels.shape
    _check_size(height, width, channels, max_pixels)
    return _unsigned(pixels)


def _check_size(height: int, width: int, channels: int, max_pixels: int) -> None:
    """A pixel of many channels counts as the pixels of three channels that it has the memory of."""
    if not 1 <= channels <= codec.MAX_CHANNELS:
        raise ValueError(f"{channels} channels, there may be 1 to {codec.MAX_CHANNELS}")
    encode.check_size(height, width, max_pixels if channels <= 3 else 3 * max_pixels // channels)


def _unsigned(values: np.ndarray) -> np.ndarray:
    """uint8 or uint16. Integers of other types are taken where their values fit 16 bits."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind not in "iu":
        raise ValueError(f"values of {values.dtype} are not kept: whole numbers of 8 or 16 bits are")
    if values.dtype.kind == "i" or values.itemsize > 2:
        least, largest = int(values.min()), int(values.max())
        if least < 0 or largest > 65_535:
            raise ValueError(f"values from {least} to {largest} do not fit 16 bits")
    return values.astype("<u2", copy=False)


def channels_last(array: np.ndarray) -> np.ndarray:
    """Of an array that does not say: channels are the last axis, or the first one where that is the shorter."""
    return np.moveaxis(array, 0, 2) if array.ndim == 3 and array.shape[0] < array.shape[2] else array


def _jpeg(data: np.ndarray, max_pixels: int) -> np.ndarray:
    header = codec.jpeg_header(data)
    encode.check_headers(data, header, max_pixels)
    if header is not None and header.components == 1:
        return encode.upright(codec.decode_jpeg(data, "GRAY"), header.orientation)
    if header is not None and header.components == 4:
        raise ValueError("a JPEG of four colors is not kept as it is")
    return encode.decode_jpeg(data, header, Options("folder", max_pixels=max_pixels)).pixels


def _tiff(data: np.ndarray, max_pixels: int) -> np.ndarray:
    """By its pages alone: what tifffile knows of makers' files has it look for others beside them."""
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong with a file stands where it was set aside
    try:
        with tifffile.TiffFile(io.BytesIO(data.tobytes())) as file:
            pages = [page for page in file.pages if not page.is_reduced]
            first = pages[0]
            if first.photometric == tifffile.PHOTOMETRIC.PALETTE:
                raise ValueError("colors by a palette are not kept as they are")
            # ImageJ or OME say of one depth and one time that it has as many channels as pages.
            said = re.search(r"^channels=(\d+)", first.description, re.MULTILINE)
            said = said or re.search(r'SizeC="(\d+)"', first.description)
            if len(pages) > 1 and (said is None or int(said[1]) != len(pages)):
                raise ValueError(f"has {len(pages)} pages, of which nothing says that they are channels")
            if first.axes not in ("YX", "YXS", "SYX") or (len(pages) > 1 and first.axes != "YX"):
                raise ValueError(f"pages of axes {first.axes} are no image")
            for height, width in ((first.imagelength, first.imagewidth), (first.tilelength or 1, first.tilewidth or 1)):
                _check_size(height, width, len(pages) * first.samplesperpixel, max_pixels)
            if any((page.shape, page.dtype) != (first.shape, first.dtype) for page in pages):
                raise ValueError("has pages of several sizes or types")
            planes = [page.asarray(maxworkers=1) for page in pages]
            if any(plane.shape != first.shape for plane in planes):
                raise ValueError("its data are not there")
            pixels = np.stack(planes, 2) if first.axes == "YX" else planes[0]
            pixels = np.moveaxis(pixels, 0, 2) if first.axes == "SYX" else pixels
            return encode.upright(pixels, first.tags.valueof(274, default=1))
    except (MemoryError, ValueError):
        raise
    except Exception as error:  # tifffile raises whatever its parsers meet
        raise ValueError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None


def _values(image, data: bytes) -> np.ndarray:
    bits = encode.bits_of(image, data)
    if bits > 8 and image.mode in ("RGB", "RGBA"):
        colors = encode.deep_colors(data)
        if colors is None or colors.shape[1::-1] != image.size:
            raise ValueError(f"{bits} bits of {image.mode} that OpenCV does not read")
        grey_and_alpha = data[25] == 4  # a PNG's type of color, of which both make red, green, blue and alpha
        return colors[..., [0, 3] if grey_and_alpha else [2, 1, 0, 3][: colors.shape[2]]]
    if image.mode.startswith("I") or (bits <= 8 and image.mode in EIGHT_BITS):
        return np.asarray(image)
    if image.mode in "1P":
        return np.asarray(image.convert({"1": "L", "P": "RGBA" if "transparency" in image.info else "RGB"}[image.mode]))
    raise ValueError(f"{image.format} of {bits} bits, {image.mode}, is not kept as it is")
