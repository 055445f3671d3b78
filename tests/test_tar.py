from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pictures import class_folders, jpeg, pixels

from manyview.pipeline import tar
from manyview.pipeline.convert.write import write_shards
from manyview.pipeline.manifest import Options
from manyview.pipeline.store import Store


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """JPEG shards, several a split."""
    root = tmp_path_factory.mktemp("tars")
    class_folders(class_folders(root / "in", 20, 3), 4, 3, seed=90, split="val")
    write_shards(Options("folder"), root / "in", root / "out", quiet=True)
    return root / "out"


def test_headers_are_those_of_tarfile():
    for name, size in (("a.jpg", 0), ("folder/" + "k" * 80 + ".npy", 123456789)):
        info = tarfile.TarInfo(name)
        info.size = size
        expected = info.tobuf(tarfile.USTAR_FORMAT)
        ours = tar.header(name, size)
        ours_info = tarfile.TarInfo.frombuf(ours, "ascii", "strict")
        assert (ours_info.name, ours_info.size, ours_info.mode, ours_info.mtime) == (name, size, 0o644, 0)
        # tarfile leaves the device numbers filled with zeros and pads its checksum alike
        assert ours[:329] == expected[:329]
    with pytest.raises(ValueError):
        tar.header("k" * 101, 1)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(1, 1, 3), (32, 32, 3), (480, 640), (3000, 4000, 3), (64, 64, 13)])
def test_npy_headers_are_those_of_numpy(shape, kind):
    buffer, array = io.BytesIO(), np.zeros(shape, kind)
    np.save(buffer, array)
    assert buffer.getvalue()[:128] == tar.npy_header(array)


def test_an_archive_reads_back_with_tarfile_and_tar(tmp_path):
    samples = {"a/x": np.frombuffer(jpeg(1), np.uint8), "b": pixels(2, 5, 7), "c": np.zeros((6, 4), np.uint8)}
    with open(tmp_path / "t.tar", "wb") as file:
        writer = tar.Writer(file, 3)
        offsets = [writer.add(key, i - 1, payload) for i, (key, payload) in enumerate(samples.items())]
        writer.finish()
    data = (tmp_path / "t.tar").read_bytes()
    assert len(data) % tar.RECORD == 0
    for offset, payload in zip(offsets, samples.values()):
        assert data[offset : offset + payload.nbytes] == payload.tobytes()
    listed = subprocess.run(["tar", "tf", tmp_path / "t.tar"], capture_output=True, text=True, check=True).stdout
    assert listed.split() == ["a/x.jpg", "a/x.cls", "b.npy", "b.cls", "c.npy", "c.cls"]
    with tarfile.open(tmp_path / "t.tar") as archive:
        assert np.array_equal(np.load(io.BytesIO(archive.extractfile("b.npy").read())), samples["b"])
        assert archive.extractfile("a/x.cls").read() == b"-1"


def test_stock_tar_unpacks_what_the_converter_wrote(photos, digits, tmp_path):
    for folder, extension in ((photos, "jpg"), (digits, "npy")):
        for split in ("train", "val"):
            store, out = Store(folder, split), tmp_path / folder.name / split
            out.mkdir(parents=True)
            for shard in store.shards:
                subprocess.run(["tar", "xf", folder / shard["file"], "-C", out], check=True)
            for i in range(len(store)):
                image, label = (out / f"{store.key(i)}.{what}" for what in (extension, "cls"))
                pixels = image.read_bytes() if extension == "jpg" else np.load(image).tobytes()
                assert pixels == store.read(i).tobytes() and int(label.read_text()) == store.labels[i]
            assert sum(path.is_file() for path in out.rglob("*")) == 2 * len(store)


def test_stock_webdataset_reads_every_sample(photos):
    import webdataset

    for split in ("train", "val"):
        store = Store(photos, split)
        files = [str(photos / shard["file"]) for shard in store.shards]
        samples = list(webdataset.WebDataset(files, shardshuffle=False, empty_check=False))
        assert [sample["__key__"] for sample in samples] == [store.key(i) for i in range(len(store))]
        for i, sample in enumerate(samples):
            assert sample["jpg"] == store.read(i).tobytes() and int(sample["cls"]) == store.labels[i]


def test_the_index_beside_is_what_wds2idx_writes(photos, digits, tmp_path):
    for shard in [*photos.glob("*.tar"), *digits.glob("*.tar")]:
        subprocess.run(["wds2idx", shard, tmp_path / "expected"], check=True, capture_output=True, env=_path())
        assert shard.with_suffix(".idx").read_bytes() == (tmp_path / "expected").read_bytes()


def test_the_index_of_any_tar_is_what_wds2idx_writes(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for name in (
            "./",
            "a/",
            "a/x.jpg",
            "a/x.seg.png",
            "a/.hidden",
            "a/x.cls",
            "plain",
            "b.jpg",
            "a/x.jpg",
            "z.tar.gz",
        ):
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            info.size = 0 if name.endswith("/") else 700
            archive.addfile(info, io.BytesIO(bytes(700)))
    subprocess.run(["wds2idx", tmp_path / "t.tar", tmp_path / "t.idx"], check=True, capture_output=True, env=_path())
    assert tar.dali_index(tmp_path / "t.tar") == (tmp_path / "t.idx").read_bytes()


def _path() -> dict:
    import os
    import sys

    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["photos", "digits"])
def test_dali_reads_every_sample_that_the_converter_wrote(what, request):
    from nvidia.dali import fn, pipeline_def

    folder = request.getfixturevalue(what)
    store = Store(folder, "val")
    files = [str(folder / shard["file"]) for shard in store.shards]
    extension = "jpg" if what == "photos" else "npy"

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def graph():
        data, label = fn.readers.webdataset(
            paths=files, index_paths=[file.replace(".tar", ".idx") for file in files], ext=[extension, "cls"]
        )
        return data, label

    reader = graph()
    reader.build()
    for i in range(len(store)):
        data, label = (np.asarray(part[0]).tobytes() for part in reader.run())
        pixels = data if extension == "jpg" else np.load(io.BytesIO(data)).tobytes()
        assert pixels == store.read(i).tobytes() and int(label) == store.labels[i]
