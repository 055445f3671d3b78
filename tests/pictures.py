"""Small photographs made of noise with structure, and folders of them."""

from __future__ import annotations

import io
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
