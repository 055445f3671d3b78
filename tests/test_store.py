from __future__ import annotations

import ctypes
import errno
import io
import json
import mmap
import os
import re
import shutil
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import command
from pictures import class_folders, encoded, jpeg, pixels

from manyview.pipeline import codec, engines, files, index
from manyview.pipeline.convert.index_foreign import index_foreign
from manyview.pipeline.convert.verify import verify
from manyview.pipeline.convert.write import FORMATS, write_shards
from manyview.pipeline.errors import UserError
from manyview.pipeline.manifest import Options
from manyview.pipeline.store import Corrupt, Store, splits
from manyview.pipeline.views import parameters, policy


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return class_folders(class_folders(tmp_path_factory.mktemp("in"), 8, 3), 2, 3, seed=50, split="val")


@pytest.fixture(scope="module", params=[(f, e) for f in FORMATS for e in codec.ENCODINGS], ids="-".join)
def folder(request, source, tmp_path_factory) -> Path:
    format, encoding = request.param
    out = tmp_path_factory.mktemp("out") / "x"
    write_shards(Options("folder", format, encoding), source, out, quiet=True)
    return out


def test_every_payload_is_the_source_image(folder, source):
    store = Store(folder)
    assert len(store) == 24 and splits(folder) == ["train", "val"] and store.name == "x" and store.split == "train"
    for i in range(len(store)):
        original = codec.decode(np.fromfile(source / "train" / f"{store.key(i)}.jpg", np.uint8))
        image = codec.decode(store.read(i))
        assert image.shape == (store.heights[i], store.widths[i], 3)
        found, expected = image[: original.shape[0], : original.shape[1]].astype(int), original.astype(int)
        assert np.abs(found - expected).mean() < (8 if store.read(i).ndim == 2 else 0.01)
        assert store.classes[store.labels[i]] == store.key(i).split("/")[0]


def test_types_are_those_of_the_contract(folder):
    store = Store(folder, "val")
    assert (store.labels.dtype, store.heights.dtype, store.widths.dtype) == (np.int64, np.int32, np.int32)
    payload = store.read(0)
    assert payload.dtype == np.uint8 and not payload.flags.writeable and payload.base is not None
    assert store.nbytes() == sum(store.read(i).nbytes for i in range(len(store)))
    assert store.default_size() == min(224, int(np.median([min(h, w) for h, w in zip(store.heights, store.widths)])))
    assert store.mean == Store(folder).mean and len(store.std) == 3  # one statistic for all splits: the training one
    kept = store.read(3)
    copy = kept.copy()
    store.close()
    assert np.array_equal(kept, copy) and np.array_equal(store.read(3), copy)


def test_threads_read_the_same(folder):
    store = Store(folder)
    expected = [store.read(i).tobytes() for i in range(len(store))]
    store.close()
    wrong: list[int] = []

    def reader(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, len(store), 300).tolist():
            if store.read(i).tobytes() != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_is_not_there_is_a_user_error(folder, tmp_path):
    with pytest.raises(UserError, match="make shards"):
        Store(tmp_path)
    with pytest.raises(UserError, match="no split 'tset'; it has train, val"):
        Store(folder, "tset")


def test_another_version_is_refused(folder, tmp_path):
    manifest = json.loads((folder / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(UserError, match="version 99"):
        Store(tmp_path)


def test_cut_and_missing_shards_are_named_all_at_once(source, tmp_path):
    for i in range(40):
        path = tmp_path / "in" / "train" / "a" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(np.random.default_rng(i).integers(0, 256, (200, 300, 3), np.uint8), "PNG"))
    write_shards(Options("folder", shard_mb=1), tmp_path / "in", tmp_path / "out", quiet=True)
    shard = tmp_path / "out" / "train-00003.tar"
    shard.write_bytes(shard.read_bytes()[:-600])
    (tmp_path / "out" / "train-00004.tar").unlink()
    with pytest.raises(UserError, match=r"train-00003\.tar has \d+ bytes instead of .*\n.*train-00004\.tar is missing"):
        Store(tmp_path / "out")


def test_adopting_refuses_what_needs_encoding_and_names_import(tmp_path):
    import webdataset

    with webdataset.ShardWriter(str(tmp_path / "t-%02d.tar"), verbose=0) as writer:
        writer.write({"__key__": "a", "jpg": jpeg(1), "cls": 3})
        writer.write({"__key__": "b", "png": encoded(pixels(2), "PNG"), "cls": 1})
    with pytest.raises(UserError, match=r"1 images .* b; .*import"):
        index_foreign(tmp_path, quiet=True)


def test_adopted_tars_read_in_place(tmp_path):
    import webdataset

    with webdataset.ShardWriter(str(tmp_path / "t-%02d.tar"), maxcount=4, verbose=0) as writer:
        for i in range(9):
            image = {"npy": pixels(i, 20, 30)} if i % 3 == 0 else {"jpg": jpeg(i)}
            writer.write({"__key__": f"k{i}", **image, "cls": i % 5})
        writer.write({"__key__": "bad", "jpg": jpeg(3)[:500], "cls": 0})
    before = {path: path.read_bytes() for path in tmp_path.glob("*.tar")}
    with pytest.raises(UserError, match="1 of 10 images were rejected"):
        index_foreign(tmp_path, quiet=True)
    index_foreign(tmp_path, max_rejected=0.1, quiet=True)
    store = Store(tmp_path)
    assert [store.key(i) for i in range(len(store))] == [f"k{i}" for i in range(9)]
    for i in range(9):
        payload = store.read(i)
        assert np.array_equal(payload, pixels(i, 20, 30)) if i % 3 == 0 else payload.tobytes() == jpeg(i)
    assert store.labels.tolist() == [i % 5 for i in range(9)]
    assert {path: path.read_bytes() for path in tmp_path.glob("*.tar")} == before
    with pytest.raises(UserError, match="has a manifest already"):
        index_foreign(tmp_path, quiet=True)


def test_what_cannot_be_indexed_is_rejected_and_the_rest_is_whole(tmp_path):
    """Keys and rows stay together, and a name that is not UTF-8 stops nothing."""
    zero = io.BytesIO()
    np.save(zero, np.zeros((0, 4, 3), np.uint8))
    members = {
        "a.npy": zero.getvalue(),
        "a.cls": b"1",
        "k\udcff.jpg": jpeg(1),
        "b.npy": b"",
        "c.jpg": jpeg(2),
        "c.cls": b"3",
    }
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    manifest = index_foreign(tmp_path, max_rejected=0.8, quiet=True)
    store = Store(tmp_path)
    assert [store.key(i) for i in range(len(store))] == ["c"] and store.labels.tolist() == [3]
    assert store.read(0).tobytes() == jpeg(2) and manifest["rejected"] == 3 and verify(tmp_path) == []
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["a", "k\udcff", "b"] and "is no 8-bit image" in lines[0]["reason"]
    assert "is not UTF-8" in lines[1]["reason"] and lines[2]["reason"] == "empty"


def test_only_folders_are_indexed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source, out in ((Path("s3:/bucket/x"), None), (tmp_path, Path("s3:/bucket/x"))):
        with pytest.raises(UserError, match=r"^s3://bucket/x: only shards on this machine are indexed"):
            index_foreign(source, out, quiet=True)
    assert not list(tmp_path.iterdir())


def test_our_shards_are_imported_into_the_other_format(folder, tmp_path):
    for format in FORMATS:
        encoding = json.loads((folder / "manifest.json").read_text())["encoding"]
        options = Options("shards", format, encoding)
        write_shards(options, folder, tmp_path / format, quiet=True)
        ours, theirs = Store(tmp_path / format), Store(folder)
        known = {theirs.key(i): i for i in range(len(theirs))}
        for i in range(len(ours)):
            j = known[ours.key(i)]
            found, expected = codec.decode(ours.read(i)).astype(int), codec.decode(theirs.read(j))
            assert np.abs(found - expected).mean() < (4 if encoding == "yuv420" else 0.01)
            assert ours.labels[i] == theirs.labels[j]
        assert ours.classes == theirs.classes


def in_memory(path: Path) -> np.ndarray:
    """Which pages of a file the operating system holds; asking reads none."""
    with open(path, "rb") as file:
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    found = np.zeros(-(-len(data) // mmap.PAGESIZE), np.uint8)
    arguments = (ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(len(data)), ctypes.c_void_p(found.ctypes.data))
    assert ctypes.CDLL(None).mincore(*arguments) == 0
    return found & 1


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system has no posix_fadvise")
def test_prefetch_brings_samples_into_memory(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 256, (500, 500, 3), np.uint8)
        (tmp_path / "in" / f"{i}.jpg").write_bytes(encoded(noise))
    write_shards(Options("folder"), tmp_path / "in", tmp_path / "out", quiet=True)
    store = Store(tmp_path / "out")
    path = store.path / store.shards[0]["file"]
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    wanted = np.arange(len(store) // 2, len(store))
    store.prefetch(wanted)
    ((shard, start, stop),) = store.ranges(wanted)
    deadline = time.monotonic() + 10
    assert shard == 0
    while not in_memory(path)[start // mmap.PAGESIZE : stop // mmap.PAGESIZE].all():
        assert time.monotonic() < deadline, "the samples were not brought into memory"
        time.sleep(0.01)


def test_ranges_cover_the_samples_and_little_else(folder):
    store = Store(folder)
    ids = np.array([7, 0, 1, 20])
    ranges = store.ranges(ids)
    assert ranges == sorted(ranges) and len(ranges) <= len(ids)
    for i in ids:
        shard, start = int(store._rows["shard"][i]), int(store._rows["offset"][i])
        assert any(s == shard and a <= start and start + int(store._rows["length"][i]) <= b for s, a, b in ranges)
    assert store.ranges(np.arange(0)) == []


def test_prefetch_of_a_shard_that_is_gone_is_silent(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "x")
    store = Store(copy)
    (copy / store.shards[0]["file"]).unlink()
    store.prefetch(np.arange(3))
    with pytest.raises((Corrupt, OSError)):
        store.read(0)


# --- the machine's faults, and what other processes do ----------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "x"
    write_shards(Options("folder"), source, out, quiet=True)
    return out


def many_shards(folder: Path, n: int) -> Path:
    """Shards of one tiny image each, indexed where they are."""
    for i in range(n):
        with tarfile.open(folder / f"{i:04d}.tar", "w") as archive:
            for name, data in ((f"{i}.npy", npy(pixels(i, 6, 7))), (f"{i}.cls", b"%d" % (i % 3))):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    index_foreign(folder, quiet=True)
    return folder


def npy(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, image)
    return buffer.getvalue()


READ_ALL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[3])))
from manyview.pipeline.store import Store
from manyview.pipeline.errors import UserError
stores = [Store(sys.argv[1]) for _ in range(2)]
print(sum(int(store.read(i).sum()) for store in stores for i in range(len(store))))
"""


def test_more_shards_than_open_files(tmp_path):
    folder = many_shards(tmp_path, 130)
    expected = 2 * sum(int(pixels(i, 6, 7).sum()) for i in range(130))
    for limits in ((64, 64), (40, 1000)):
        done = command("-c", READ_ALL, folder, *limits)
        assert done.returncode == 0 and int(done.stdout) == expected, done.stderr


@pytest.mark.parametrize("call", ["open", "pread"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM])
def test_a_fault_that_passes_costs_nothing_and_one_that_stays_is_no_samples_fault(
    plain, monkeypatch, call, code, tmp_path
):
    copy = shutil.copytree(plain, tmp_path / "x")
    monkeypatch.setattr(files, "PAUSES", (0.0, 0.0))
    real, failures = getattr(os, call), iter([True, True, False])

    def flaky(path, *rest):
        if (isinstance(path, int) or str(path).endswith(".tar")) and next(failures, True):
            raise OSError(code, os.strerror(code))
        return real(path, *rest)

    expected, store = Store(copy).read(0).copy(), Store(copy)
    monkeypatch.setattr(os, call, flaky)
    assert np.array_equal(store.read(0), expected)
    store.close()
    with pytest.raises(UserError, match=re.escape(os.strerror(code))) as error:
        store.read(1)
    assert not isinstance(error.value, Corrupt) and "train-0" in str(error.value)
    assert ("ulimit -n" in str(error.value)) == (code == errno.EMFILE)


WHILE_OTHERS_WRITE = """
import os, sys, threading
from manyview.pipeline.store import Corrupt, Store
store = Store(sys.argv[1])
path = store.path / store.shards[0]["file"]
whole, expected = path.read_bytes(), [store.read(i).tobytes() for i in range(len(store))]
stop, outcomes = threading.Event(), set()

def write():  # as `cp` over a file: cut to nothing, then written again
    for _ in range(150):
        with open(path, "wb") as file:
            for at in range(0, len(whole), 65536):
                file.write(whole[at : at + 65536])
        os.truncate(path, len(whole) // 3)
    path.write_bytes(whole)
    stop.set()

threading.Thread(target=write).start()
while not stop.is_set():
    for i in range(len(store)):
        try:
            payload = store.read(i)
            assert int(payload.sum()) >= 0 and payload.tobytes() == expected[i], "wrong bytes without a word"
            outcomes.add("equal")
        except Corrupt as error:
            outcomes.add("named")
assert [store.read(i).tobytes() for i in range(len(store))] == expected
print(sorted(outcomes))
"""


def test_a_shard_overwritten_in_place_while_it_is_read_kills_nobody(plain, tmp_path):
    done = command("-c", WHILE_OTHERS_WRITE, shutil.copytree(plain, tmp_path / "x"))
    assert done.returncode == 0 and "named" in done.stdout, (done.returncode, done.stderr)


def test_an_image_of_another_size_than_the_index_says_is_corrupt_in_every_engine(tmp_path):
    """A good JPEG under a wrong size, sealed: boxes drawn for the size would reach into other memory."""
    class_folders(tmp_path / "in", 3, 2)
    write_shards(Options("folder"), tmp_path / "in", tmp_path / "out", quiet=True)
    rows = index.read(tmp_path / "out" / "train.index")
    columns = {name: np.array(rows[name]) for name in index.COLUMNS}
    columns["height"][:], columns["width"][:] = 4000, 5000
    sealed = index.Index(columns, rows.key_starts, rows.key_bytes)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["splits"]["train"]["index"]["sha256"] = index.write(sealed, tmp_path / "out" / "train.index")
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    store = Store(tmp_path / "out")
    ids = np.arange(2)
    told = parameters(policy("simclr", 2, 32), 0, ids * 0, ids, store.heights[ids], store.widths[ids])
    for name in ("cpu", "resident", *(["dali"] if engines.has_dali() else [])):
        engine, _ = engines.create(name, store)
        with pytest.raises(Corrupt, match=r"index says 5000"):
            engine(ids, told)
        engine.close()
