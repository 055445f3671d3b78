"""Made-up images of five classes, and runs of a tiny ResNet and a tiny ViT: what the tests of the evaluation share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from manyview.model import backbone
from manyview.pipeline.convert.write import write_shards
from manyview.pipeline.manifest import Options
from manyview.pipeline.store import Store

CLASSES = ("stripes", "checks", "blob", "ring", "slope")
NETWORKS = {"smoke-resnet": ("resnet10-narrow", 32), "smoke-vit": ("test_vit", 32)}


def images(folder: Path, *, per_class: dict[str, int], size: int = 32, seed: int = 0, hue: float = 0.0) -> Path:
    """Write {split: count a class} PNGs of five kinds of pattern in random colors, with noise, as class folders."""
    generator = np.random.default_rng(seed)
    for split, count in per_class.items():
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                Image.fromarray(pattern(label, size, generator, hue)).save(folder / split / name / f"{i:04d}.png")
    return folder


def pattern(label: int, size: int, generator: np.random.Generator, hue: float = 0.0) -> np.ndarray:
    """One (size, size, 3) uint8 picture of the kind `label`."""
    y, x = np.mgrid[0:size, 0:size] / size
    shift, scale = generator.uniform(0, 1, 2), generator.uniform(0.8, 1.2)
    r = np.hypot(x - 0.3 - 0.4 * shift[0], y - 0.3 - 0.4 * shift[1])
    shape = (
        np.sin(2 * np.pi * (5 * scale * x + shift[0])) > 0,
        (np.sin(2 * np.pi * (3 * scale * x + shift[0])) > 0) ^ (np.sin(2 * np.pi * (3 * scale * y + shift[1])) > 0),
        r < 0.25 * scale,
        abs(r - 0.25 * scale) < 0.06,
        (x + y) / 2,
    )[label].astype(float)
    low, high = generator.uniform(0, 110, 3), generator.uniform(140, 255, 3)
    low[0] += hue
    picture = low + shape[..., None] * (high - low) + generator.normal(0, 14, (size, size, 3))
    return picture.clip(0, 255).astype(np.uint8)


def make_shards(folder: Path, out: Path, **settings) -> Path:
    """Shards `out` of pictures that are made under `folder`."""
    write_shards(Options("folder", encoding="raw"), images(folder, **settings), out, jobs=1, quiet=True)
    return out


def make_run(out: Path, data: Path, network: str, *, seed: int = 0) -> Path:
    """A run directory as train.py leaves it, with fresh weights: what is smoke-tested is the evaluation."""
    name, size = NETWORKS[network]
    torch.manual_seed(seed)
    module = backbone.create(name, image_size=size)
    store = Store(data)
    out.mkdir(parents=True)
    about = {
        "backbone": name,
        "stem": "auto",
        "image_size": str(size),
        "mean": json.dumps(store.mean),
        "std": json.dumps(store.std),
    }
    backbone.save(module, out / "backbone.safetensors", about)
    config = {"data": str(data), "dataset": store.name, "policy": "simclr", "augment": [], "objective": "barlow", "size": size,
              "backbone": name, "stem": "auto", "steps": 0}  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    return out


def prepare(folder: Path) -> tuple[list[Path], list[Path]]:
    """(run directories, shard directories): two networks, and two datasets of the same classes."""
    data = [
        make_shards(folder / "images-a", folder / "shards" / "patterns", per_class={"train": 40, "val": 12}),
        make_shards(
            folder / "images-b", folder / "shards" / "shifted", per_class={"train": 25, "val": 12}, seed=1, hue=90
        ),
    ]
    return [make_run(folder / "runs" / name, data[0], name) for name in NETWORKS], data


_SHARED: list[tuple[list[Path], list[Path]]] = []


def shared(folder: pytest.TempPathFactory) -> tuple[list[Path], list[Path]]:
    """`prepare`, once for all modules of a session: they copy a run before they write into it, or give another --out."""
    if not _SHARED:
        _SHARED.append(prepare(folder.mktemp("patterns")))
    return _SHARED[0]
