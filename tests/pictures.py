"""Small photographs made of noise with structure, and folders of them."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image


def pixels(seed: int, height: int = 90, width: int = 120) -> np.ndarray:
    """(height, width, 3) uint8: smooth noise, so that JPEG treats it like a photo."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 12 + 2, width // 12 + 2, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: np.ndarray | Image.Image, format: str = "JPEG", **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def jpeg(seed: int, height: int = 90, width: int = 120, **options) -> bytes:
    return encoded(pixels(seed, height, width), quality=88, **options)


def class_folders(root: Path, per_class: int = 6, classes: int = 3, seed: int = 0, split: str = "train") -> Path:
    """`root/split/class/photo.jpg`, of several sizes."""
    for label in range(classes):
        folder = root / split / f"class{label}"
        folder.mkdir(parents=True)
        for i in range(per_class):
            number = seed + label * per_class + i
            (folder / f"photo{i}.jpg").write_bytes(jpeg(number, 80 + number % 23, 100 + number % 17))
    return root


def with_segment(data: bytes, body: bytes, marker: int = 0xE1) -> bytes:
    """A JPEG with one more segment, the first."""
    return data[:2] + b"\xff" + struct.pack(">BH", marker, len(body) + 2) + body + data[2:]


def tiff_orientation(value: int, order: str = "<", type: int = 3, before: tuple = ()) -> bytes:
    """An EXIF block: one directory with `before`, entries (tag, type, count, four bytes), and the orientation as a whole
    number of TIFF's `type`."""
    size = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}.get(type, "H")
    entries = [*before, (0x112, type, 1, struct.pack(order + size, value).ljust(4, b"\0"))]
    packed = b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries)
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8)
    return head + struct.pack(order + "H", len(entries)) + packed + bytes(4)


def flat_jpeg(samplings: tuple[int, ...], across: int = 6) -> bytes:
    """A grey baseline JPEG of any chroma sampling, `across` x `across` units, written by hand: no block differs from the one
    before, which the standard tables write as 00 1010 for luma and 00 00 for chroma."""
    base = encoded(Image.new("RGB", (16, 16)), subsampling=0)
    frame, scan = base.index(b"\xff\xc0"), base.index(b"\xff\xda")
    tall, wide = (across * 8 * max(sampling >> shift & 15 for sampling in samplings) for shift in (0, 4))
    parts = b"".join(bytes([i + 1, sampling, min(i, 1)]) for i, sampling in enumerate(samplings))
    tables = b"".join(bytes([i + 1, 0x11 * min(i, 1)]) for i in range(len(samplings)))
    # A single component is not interleaved: its blocks are those that it has, whatever its sampling says.
    counts = [(sampling >> 4) * (sampling & 15) for sampling in samplings]
    bits = "".join(("0000" if i else "001010") * count for i, count in enumerate(counts)) * across**2
    bits += "1" * (-len(bits) % 8)
    return (
        base[:frame] + b"\xff\xc0" + struct.pack(">HBHHB", 8 + len(parts), 8, tall, wide, len(samplings)) + parts
        + base[frame + 19 : scan] + b"\xff\xda" + struct.pack(">HB", 6 + len(tables), len(samplings)) + tables + b"\0\x3f\0"
        + int(bits, 2).to_bytes(len(bits) // 8, "big") + b"\xff\xd9"
    )  # fmt: skip
