from __future__ import annotations

import io

import numpy as np
import pytest
import simplejpeg
from pictures import class_folders, jpeg, pixels

from manyview.pipeline import beton, codec
from manyview.pipeline.convert.index_foreign import index_foreign
from manyview.pipeline.convert.write import write_shards
from manyview.pipeline.manifest import Options
from manyview.pipeline.store import Store


@pytest.mark.slow
def test_stock_reader_agrees_on_every_field(tmp_path):
    from ffcv.reader import Reader

    class_folders(tmp_path / "in", 5, 3)
    write_shards(Options("folder", "ffcv"), tmp_path / "in", tmp_path / "out", quiet=True)
    store = Store(tmp_path / "out")
    reader = Reader(str(tmp_path / "out" / store.shards[0]["file"]))
    assert reader.field_names == ["image", "label"] and reader.num_samples == len(store) == 15
    image = reader.metadata["f0"]
    assert np.array_equal(image["height"], store.heights) and np.array_equal(image["width"], store.widths)
    assert np.array_equal(reader.metadata["f1"].reshape(-1), store.labels)
    assert np.array_equal(image["data_ptr"], store._rows["offset"]) and (image["mode"] == 0).all()
    assert np.array_equal(reader.alloc_table["size"], store._rows["length"])


@pytest.mark.slow
@pytest.mark.parametrize("encoding,os_cache", [("jpeg", True), ("raw", False)])  # each compiles for seconds
def test_stock_loader_gives_equal_pixels(tmp_path, encoding, os_cache):
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    folder = tmp_path / "in" / "train" / "one"
    folder.mkdir(parents=True)
    for i in range(40):  # over several pages when raw
        (folder / f"{i}.jpg").write_bytes(jpeg(i, 250, 300))
    write_shards(Options("folder", "ffcv", encoding), tmp_path / "in", tmp_path / "out", quiet=True)
    store = Store(tmp_path / "out")
    loader = Loader(
        str(tmp_path / "out" / store.shards[0]["file"]),
        batch_size=8,
        num_workers=1,
        os_cache=os_cache,
        order=OrderOption.SEQUENTIAL,
        pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]},
    )
    seen = 0
    for images, labels in loader:
        for image, label in zip(images, labels):
            payload = store.read(seen)
            # FFCV decodes with libjpeg's fast, less exact transform; the same bytes so decoded are the same pixels.
            fast = simplejpeg.decode_jpeg(payload, fastdct=True) if encoding == "jpeg" else payload
            assert np.array_equal(np.asarray(image), fast)
            assert np.abs(fast.astype(int) - codec.decode(payload)).mean() < 2
            assert int(label[0]) == store.labels[seen]
            seen += 1
    assert seen == len(store) == 40


@pytest.mark.slow
def test_stock_loader_hands_over_yuv420_as_bytes(tmp_path):
    """FFCV has no such field: it gives the bytes undecoded, in rows of the longest."""
    from ffcv.fields import BytesField
    from ffcv.fields.bytes import BytesDecoder
    from ffcv.fields.decoders import IntDecoder
    from ffcv.loader import Loader, OrderOption

    folder = tmp_path / "in" / "train" / "one"
    folder.mkdir(parents=True)
    for i in range(12):
        (folder / f"{i}.jpg").write_bytes(jpeg(i, 90 + i, 120))
    write_shards(Options("folder", "ffcv", "yuv420"), tmp_path / "in", tmp_path / "out", quiet=True)
    store, seen = Store(tmp_path / "out"), 0
    loader = Loader(
        str(tmp_path / "out" / store.shards[0]["file"]),
        batch_size=4,
        num_workers=1,
        os_cache=True,
        order=OrderOption.SEQUENTIAL,
        pipelines={"image": [BytesDecoder()], "label": [IntDecoder()]},
    )
    assert isinstance(loader.reader.handlers["image"], BytesField)
    for images, labels in loader:
        for image, label in zip(np.asarray(images), labels):
            payload = store.read(seen).reshape(-1)
            assert len(image) == store._rows["length"].max() and np.array_equal(image[: len(payload)], payload)
            assert int(label[0]) == store.labels[seen]
            seen += 1
    assert seen == len(store) == 12


class Photos:
    """What `ffcv.writer.DatasetWriter` takes."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int):
        return pixels(i, 70 + i, 90), i % 4


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jpg", "raw", "proportion"])
def test_what_ffcv_writes_reads_in_ours(tmp_path, mode):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(write_mode=mode, jpeg_quality=95), "label": IntField()}
    np.random.seed(3)
    DatasetWriter(str(tmp_path / "x.beton"), fields, num_workers=1).from_indexed_dataset(Photos(), chunksize=3)
    index_foreign(tmp_path, quiet=True)
    store = Store(tmp_path)
    assert len(store) == 12 and store.labels.tolist() == [i % 4 for i in range(12)]
    kinds = {store.read(i).ndim for i in range(12)}
    assert kinds == {"jpg": {1}, "raw": {3}, "proportion": {1, 3}}[mode]
    for i in range(12):
        payload = store.read(i)
        assert np.abs(codec.decode(payload).astype(int) - pixels(i, 70 + i, 90)).mean() < (
            4 if payload.ndim == 1 else 0.1
        )


def write(payloads, count=None, planar=False) -> bytes:
    file = io.BytesIO()
    writer = beton.Writer(file, count or len(payloads), planar)
    for i, payload in enumerate(payloads):
        writer.add(str(i), i, payload)
    writer.finish()
    return file.getvalue()


def test_pages_grow_with_the_largest_payload_and_none_is_crossed(tmp_path):
    payloads = [np.full((200, 1000, 3), i, np.uint8) for i in range(8)]
    payloads.insert(5, np.full((1500, 1000, 3), 77, np.uint8))
    (tmp_path / "x").write_bytes(write(payloads))
    found = beton.read(tmp_path / "x")
    assert found.page_size == 8 << 20
    assert not (found.offset // found.page_size != (found.offset + found.length - 1) // found.page_size).any()
    data = (tmp_path / "x").read_bytes()
    for offset, payload in zip(found.offset, payloads):
        assert data[int(offset) : int(offset) + payload.nbytes] == payload.tobytes()


def test_fewer_samples_than_planned_is_a_valid_file(tmp_path):
    (tmp_path / "x").write_bytes(write([pixels(1), pixels(2)], count=100_000))
    assert beton.read(tmp_path / "x").label.tolist() == [0, 1]


@pytest.mark.parametrize(
    "damage,message",
    [
        (lambda data: data[:20], "too short"),
        (lambda data: data[:-1], "cut off"),
        (lambda data: data[: len(data) // 2], "cut off"),
        (lambda data: data[:16] + bytes(8) + data[24:], "unfinished"),
        (lambda data: b"\7\0" + data[2:], "version"),
        (lambda data: data[:8] + (1 << 40).to_bytes(8, "little") + data[16:], "metadata"),
        (lambda data: data[:24] + b"\x63" + data[25:], "field type"),
        (lambda data: data[:-16] + bytes(8) + data[-8:], "never allocated"),
    ],
)
def test_damage_is_refused_with_its_name(tmp_path, damage, message):
    (tmp_path / "x").write_bytes(damage(write([pixels(1), pixels(2)])))
    with pytest.raises(ValueError, match=message):
        beton.read(tmp_path / "x")
