"""Extra: real photos and CIFAR-10, where MANYVIEW_PHOTO_FOLDERS and MANYVIEW_CIFAR10 name their folders (class folders)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from manyview.pipeline import codec
from manyview.pipeline.convert.shard_plan import FORMATS, safe_keys
from manyview.pipeline.convert.verify import verify
from manyview.pipeline.convert.write import write_shards
from manyview.pipeline.manifest import Options
from manyview.pipeline.store import Store


def real(name: str) -> Path:
    if name not in os.environ:
        pytest.skip(f"extra data: {name} is not set")
    return Path(os.environ[name])


def files(root: Path) -> dict[str, Path]:
    """By key: a few of the photos' names have apostrophes."""
    names = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
    return {key: root / name for key, name in zip(safe_keys(names), names)}


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_photos_keep_every_byte_and_label(tmp_path, format):
    source = real("MANYVIEW_PHOTO_FOLDERS")
    write_shards(Options("folder", format), source, tmp_path / "out", quiet=True)
    store, originals = Store(tmp_path / "out"), files(source / "train")
    assert len(store) == len(originals) and verify(tmp_path / "out") == []
    same = 0
    for i in range(len(store)):
        path = originals.pop(store.key(i))
        assert store.classes[store.labels[i]] == path.parent.name
        data = np.fromfile(path, np.uint8)
        header = codec.jpeg_header(data)
        same += header is not None and header.plain
        assert np.array_equal(store.read(i), data) == (header is not None and header.plain)
    assert not originals and same > 0.98 * len(store)  # a few are progressive, rotated or CMYK


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_cifar10_keeps_every_pixel_and_label(tmp_path, format):
    source = real("MANYVIEW_CIFAR10")
    write_shards(Options("cifar10", format), source, tmp_path / "out", quiet=True)
    assert verify(tmp_path / "out") == []
    for split, folder, count in (("train", "train", 50_000), ("val", "test", 10_000)):
        store, originals = Store(tmp_path / "out", split), files(source / folder)
        assert len(store) == len(originals) == count
        assert np.bincount(store.labels).tolist() == [count // 10] * 10
        for i in range(len(store)):
            path = originals.pop(store.key(i))
            assert store.classes[store.labels[i]] == path.parent.name
            assert np.array_equal(store.read(i), codec.decode(np.fromfile(path, np.uint8)))
