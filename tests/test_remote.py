"""Shards in a bucket, against a real S3 service on loopback and a network that slows, refuses, cuts and flips."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import conftest
import fsspec
import numpy as np
import pytest
import torch
from bucket import FAULTS, Proxy, service, upload
from conftest import ROOT
from pictures import encoded
from safetensors.torch import load_file

from manyview.pipeline import bucket, files, storage
from manyview.pipeline import plan as plans
from manyview.pipeline.convert.verify import verify
from manyview.pipeline.convert.write import write_shards
from manyview.pipeline.engines.cpu import CPUEngine
from manyview.pipeline.errors import UserError
from manyview.pipeline.loader import Loader
from manyview.pipeline.manifest import Options
from manyview.pipeline.plan import plan
from manyview.pipeline.store import Corrupt, Store, splits
from manyview.pipeline.views import policy

PIECE = 128 << 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """60 noisy photos in 4 shards of about 500 KB."""
    root = tmp_path_factory.mktemp("local")
    for i in range(60):
        path = root / "in" / "train" / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(np.random.default_rng(i).integers(0, 256, (130, 170, 3), np.uint8), "PNG"))
    write_shards(Options("folder", shard_mb=1), root / "in", root / "photos", quiet=True)
    return root / "photos"


@pytest.fixture(scope="module")
def proxy() -> Proxy:
    with pytest.MonkeyPatch.context() as patch, service() as proxy:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "x", "DEFAULT_REGION": "us-east-1"}.items():
            patch.setenv(f"AWS_{name}", value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield proxy


@pytest.fixture(scope="module")
def url(proxy, folder) -> str:
    return upload(folder, "s3://bucket/photos")


@pytest.fixture(autouse=True)
def fresh(proxy, monkeypatch, tmp_path) -> Path:
    """A calm network, a cache of this test, small pieces, no patience."""
    proxy.calm()
    monkeypatch.setenv("MANYVIEW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "PIECE", PIECE)
    monkeypatch.setattr(storage, "FIRST", 0.01)
    return tmp_path / "cache"


def payloads(store: Store) -> list[bytes]:
    store.prefetch(np.arange(len(store)))
    return [store.read(i).tobytes() for i in range(len(store))]


def epoch(store: Store, order: str, steps: int = 10) -> tuple[list[list[int]], list[torch.Tensor]]:
    """(ids, views) of an epoch in batches of 6, as training reads them."""
    engine = CPUEngine(store, threads=3)
    loader = Loader(
        store, plan(len(store), seed=3, batch=6, order=order), policy("simclr", 2, 32), engine, seed=3, prefetch=2
    )
    batches = [(b.ids.tolist(), b.views[0].clone()) for b in loader.batches(0, steps)]
    engine.close()
    assert not loader.bad
    return [ids for ids, _ in batches], [views for _, views in batches]


def held(cache: Path) -> int:
    return sum(path.stat().st_size for path in (cache / "pieces").glob("*/*"))


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["s3", "file", "memory"])
def test_a_bucket_reads_like_a_folder(where, url, folder, tmp_path):
    address = {"s3": url, "file": f"file://{folder}", "memory": "memory://shards/photos"}[where]
    if where == "memory":
        upload(folder, address)
    local, store = Store(folder), Store(Path(address))  # a Path folds the slashes, as on the command line
    assert splits(address) == splits(folder) and store.name == "photos" and store.fingerprint == local.fingerprint
    assert [store.key(i) for i in range(len(store))] == [local.key(i) for i in range(len(local))]
    assert payloads(store) == payloads(local) and not store.read(0).flags.writeable
    assert np.array_equal(store.labels, local.labels) and store.mean == local.mean
    store.prefetch(np.arange(len(store)))
    store.close()


@pytest.mark.parametrize("order", ["random", "blocks"])
def test_an_epoch_is_the_same_through_a_bad_network(order, proxy, url, folder):
    proxy.trouble()
    expected = epoch(Store(folder), order)
    store = Store(url)
    found = epoch(store, order)
    assert found[0] == expected[0] and sorted(np.concatenate(found[0])) == list(range(60)), "lost or doubled"
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1]))
    assert {fault for *_, fault in proxy.log} >= set(FAULTS), "the network was not bad"
    pieces = [(path, where) for path, where in proxy.requests("GET") if length(where) > 40_000]
    assert len(pieces) == len(set(pieces)) <= store.bucket.counts["pieces"] <= 16, "a piece was fetched twice"


def length(where: str) -> int:
    """Bytes of a range: of a piece 58 to 150 KB, of a photo 28 KB."""
    first, last = where.removeprefix("bytes=").split("-")
    return int(last) - int(first) + 1


def test_a_piece_is_fetched_ahead_once_and_found_when_read(proxy, url):
    store = Store(url)
    store.prefetch(np.arange(len(store)))
    deadline = time.monotonic() + 20
    while store.bucket.counts["pieces"] < 16 and time.monotonic() < deadline:
        time.sleep(0.01)
    before = len(proxy.log)
    payloads(store)
    assert store.bucket.counts["misses"] == 0 and store.bucket.counts["hits"] == 60 and len(proxy.log) == before
    again = Store(url)  # another run: manifest, listing and the index's size, no data
    payloads(again)
    assert again.bucket.counts["bytes"] == 0 and not [1 for _, path, *_ in proxy.log[before:] if ".tar" in path]
    store.close()


def test_a_sample_that_nobody_announced_comes_alone(proxy, url, folder, fresh):
    """A probe's few thousand images of a large set must not bring the set with them."""
    local, store = Store(folder), Store(url)
    proxy.trouble(("flipped",), every=3)
    for i in (3, 20, 33, 59):
        assert np.array_equal(store.read(i), local.read(i))
    lengths = [length(where) for _, where in proxy.requests("GET")]
    assert lengths == [int(store._rows["length"][i]) for i in (3, 20, 33, 59)]
    assert not list(fresh.glob("pieces/*/train-*")) and store.bucket.counts["pieces"] == 0
    for i, pieces in ((4, 0), (2, 1)):  # with 3 the third of a piece, which then comes
        assert np.array_equal(store.read(i), local.read(i))
        assert store.bucket.counts["pieces"] == pieces, "neighbours came one by one"


def test_requests_fit_the_records(proxy, url, folder):
    """All pieces together are hardly more than the payloads, and none is longer than a piece and a record."""
    store = Store(url)
    payloads(store)
    lengths = [length(where) for _, where in proxy.requests("GET")]
    assert max(lengths) <= PIECE + int(store._rows["length"].max())
    assert store.nbytes() <= sum(lengths) == store.bucket.counts["bytes"] < 1.5 * store.nbytes()


def test_damage_in_the_cache_heals(url, folder, fresh):
    expected, store = payloads(Store(folder)), Store(url)
    payloads(store)
    cut, flipped, *_ = sorted(fresh.glob("pieces/*/train-*"))
    cut.write_bytes(cut.read_bytes()[:1000])
    data = bytearray(flipped.read_bytes())
    data[5000::10000] = bytes(255 - b for b in data[5000::10000])
    flipped.write_bytes(data)
    index = next(fresh.glob("pieces/*/train.index"))
    assert payloads(Store(url)) == expected
    index.write_bytes(index.read_bytes()[:200])
    assert payloads(Store(url)) == expected


def test_a_damaged_object_is_that_samples_fault(folder, proxy, tmp_path):
    address = upload(folder, "s3://bucket/damaged")
    store = Store(folder)
    fs = fsspec.filesystem("s3")
    path = f"bucket/damaged/{store.shards[store.shard_of[9]]['file']}"
    data = bytearray(fs.cat_file(path))
    data[int(store._rows["offset"][9]) + 99] ^= 4
    fs.pipe_file(path, bytes(data))
    found = Store(address)
    found.prefetch(np.arange(0, len(found), 2))  # some by pieces, some one by one
    for i in range(len(found)):
        if i == 9:
            with pytest.raises(Corrupt, match=r"checksum"):
                found.read(i)
        else:
            assert found.read(i).tobytes() == store.read(i).tobytes()


# --- the cache --------------------------------------------------------------------------------------------------------

READER = """
import sys, numpy as np
from manyview.pipeline import bucket, storage
storage.PIECE, bucket.STREAMS = {piece}, 3
from manyview.pipeline.store import Store
store = Store(sys.argv[1])
order = np.random.default_rng(int(sys.argv[2])).permutation(len(store))
print("ready", flush=True)
sys.stdin.readline()
store.prefetch(order)
import zlib
print(sum(zlib.crc32(store.read(int(i)).tobytes()) for i in order), flush=True)
"""


def reader(url: str, seed: int) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", READER.format(piece=PIECE), url, str(seed)]
    done = subprocess.Popen(line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert done.stdout is not None and done.stdout.readline() == "ready\n"
    return done


@pytest.mark.slow
def test_processes_of_a_node_fetch_a_piece_once(proxy, url):
    readers = [reader(url, seed) for seed in (1, 2)]
    proxy.delay, proxy.fault = 0.05, lambda method, path: "slow" if ".tar" in path and method == "GET" else None
    for process in readers:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0] for process in readers]
    assert outputs[0] == outputs[1] and len(outputs[0]) > 5
    fetched = [(path, where) for method, path, where, _ in proxy.log if method == "GET" and ".tar" in path]
    assert len(fetched) == len(set(fetched)) >= 16


def test_the_cache_keeps_its_bound(proxy, url, folder, fresh, monkeypatch, capfd):
    limit = 5 * PIECE
    monkeypatch.setenv("MANYVIEW_CACHE_GB", str(limit / 1e9))
    expected, store = payloads(Store(folder)), Store(url)
    for first in np.random.default_rng(0).permutation(len(store) - 3).tolist():
        store.prefetch(np.arange(first, first + 4))
        assert payload_range(store, first) == expected[first : first + 4]
        assert held(fresh) <= limit and int((fresh / "pieces" / "size").read_text()) >= held(fresh)
    assert store.bucket.counts["pieces"] > 20 and "too small" not in capfd.readouterr().err
    store.prefetch(np.arange(len(store)))  # more than fits: slower, and said once, but right
    while store.bucket.counts["pieces"] < 60 and not store.bucket._queue.empty():
        time.sleep(0.01)
    assert [store.read(i).tobytes() for i in reversed(range(len(store)))] == expected[::-1]
    store.close()
    assert capfd.readouterr().err.count("too small") == 1


def payload_range(store: Store, first: int) -> list[bytes]:
    return [store.read(i).tobytes() for i in range(first, first + 4)]


def test_a_random_order_beyond_the_cache_fetches_samples_not_pieces(proxy, url, folder, monkeypatch):
    monkeypatch.setenv("MANYVIEW_CACHE_GB", str(5 * PIECE / 1e9))
    local, store = Store(folder), Store(url)
    strewn = np.arange(0, 60, 7)
    store.prefetch(strewn)
    assert all(np.array_equal(store.read(i), local.read(i)) for i in strewn)
    assert store.bucket.counts["bytes"] == sum(local.read(i).nbytes for i in strewn)
    store.prefetch(np.arange(8))  # side by side: their pieces
    assert all(np.array_equal(store.read(i), local.read(i)) for i in range(8))
    assert store.bucket.counts["pieces"] >= 2
    store.close()


def test_what_was_asked_for_longest_ago_goes_first(fresh):
    cache = bucket.Cache(fresh / "pieces", 1000)
    for name in "abcdefgh":
        assert cache.add(f"x/{name}", lambda file: file.write(b"." * 120))
    assert cache.touch("x/a")
    assert cache.add("x/i", lambda file: file.write(b"." * 120))
    assert cache.read("x/a", 100, 20) == b"." * 20 and cache.read("x/b", 0, 1) is None and not cache.touch("x/b")
    assert held(fresh) <= 950
    dead = fresh / "pieces" / "x" / "dead.part"  # of a process that was killed
    dead.write_bytes(b"." * 500)
    with files.locked(fresh / "pieces" / "x" / "alive.part"):  # and of one that is at work
        for name in "jklmnopq":
            assert cache.add(f"x/{name}", lambda file: file.write(b"." * 120))
        assert (fresh / "pieces" / "x" / "alive.part").exists()
    assert not dead.exists() and held(fresh) <= 1000


def test_what_another_process_begins_to_fetch_is_not_evicted(fresh, monkeypatch):
    """A dead process's part is removed; at once another one begins the same piece."""
    cache = bucket.Cache(fresh / "pieces", 1000)
    dead = fresh / "pieces" / "x" / "a.part"
    dead.parent.mkdir(parents=True)
    dead.write_bytes(b"." * 990)

    @contextmanager
    def taken_over(path: Path, wait: bool = True):
        with files.locked(path, wait) as descriptor:
            yield descriptor
        if path == dead:
            dead.write_bytes(b"new")

    monkeypatch.setattr(bucket, "locked", taken_over)
    assert cache.add("x/b", lambda file: file.write(b"." * 120))
    assert dead.read_bytes() == b"new"


def test_a_piece_that_comes_in_while_it_is_looked_for_is_not_fetched_again(url, folder, monkeypatch, capsys):
    store = Store(url)
    look = store.bucket.cache.read

    def too_early(name: str, start: int, length: int) -> bytes | None:
        """Nothing is there; right after, the piece is, fetched by another thread."""
        monkeypatch.setattr(store.bucket.cache, "read", look)
        store.bucket._fetch((0, 0))
        return None

    monkeypatch.setattr(store.bucket.cache, "read", too_early)
    assert np.array_equal(store.read(0), Store(folder).read(0))
    assert store.bucket.counts["pieces"] == 1 and "too small" not in capsys.readouterr().err


def test_a_sample_that_is_damaged_on_its_way_costs_no_piece(url, folder, monkeypatch, capsys):
    store = Store(url)
    read = store.bucket.storage.read

    def flipped(*place) -> bytes:
        """The sample alone, flipped; meanwhile its piece comes in, whole."""
        monkeypatch.setattr(store.bucket.storage, "read", read)
        store.bucket._fetch((0, 0))
        data = bytearray(read(*place))
        data[len(data) // 2] ^= 1
        return bytes(data)

    monkeypatch.setattr(store.bucket.storage, "read", flipped)
    assert np.array_equal(store.read(0), Store(folder).read(0))
    assert store.bucket.counts["pieces"] == 1 and "too small" not in capsys.readouterr().err


@pytest.mark.slow
def test_killed_while_fetching_nothing_is_spoiled(proxy, url, folder, fresh):
    process = reader(url, 1)
    proxy.delay, proxy.fault = 0.4, lambda method, path: "slow" if ".tar" in path and method == "GET" else None
    process.stdin.write("go\n")
    process.stdin.flush()
    while not list(fresh.glob("pieces/*/*.part")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(fresh.glob("pieces/*/*.part"))
    proxy.calm()
    assert payloads(Store(url)) == payloads(Store(folder))


# --- what goes wrong for good -----------------------------------------------------------------------------------------


def one_line(address: str, *words: str) -> None:
    with pytest.raises(UserError) as raised:
        Store(address).read(0)
    text = str(raised.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_what_is_not_there_is_one_line(proxy, url, folder):
    one_line("s3://bucket/nothing", "no shards in s3://bucket/nothing")
    one_line("s3://no-such-bucket/x", "no shards in s3://no-such-bucket/x")
    one_line("s9://bucket/x", "Protocol not known")
    assert len(proxy.log) < 6, "tried again what cannot help"
    address = upload(folder, "s3://bucket/holes")
    fs = fsspec.filesystem("s3")
    fs.pipe_file("bucket/holes/train-00001.tar", fs.cat_file("bucket/holes/train-00001.tar")[:-700])
    one_line(address, "s3://bucket/holes/train-00001.tar has", "instead of")
    fs.rm_file("bucket/holes/train-00001.tar")
    one_line(address, "s3://bucket/holes/train-00001.tar is missing")
    address = upload(folder, "s3://bucket/without")
    fs.rm_file("bucket/without/train.index")
    with pytest.raises(UserError, match=r"index s3://bucket/without/train\.index is missing"):
        Store(address)


def test_an_object_that_vanishes_later_is_one_line(folder, proxy):
    store = Store(upload(folder, "s3://bucket/vanishes"))
    fsspec.filesystem("s3").rm_file(f"bucket/vanishes/{store.shards[store.shard_of[0]]['file']}")
    with pytest.raises(UserError, match=r"^s3://bucket/vanishes/train-\d+\.tar: no such object or bucket"):
        store.read(0)


def test_credentials_are_one_line_and_not_tried_again(proxy, url, monkeypatch):
    switch = f"http://{proxy.upstream[0]}:{proxy.upstream[1]}/moto-api/reset-auth"

    def checking(on: bool) -> None:
        count, kind = b"0" if on else b"inf", {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(switch, count, kind, method="POST"))

    checking(True)
    try:
        one_line(url, "no access", "Access Key Id", "AWS_ACCESS_KEY_ID")
        assert len(proxy.log) == 1
    finally:
        checking(False)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    fsspec.filesystem("s3").clear_instance_cache()
    one_line(url, "no access", "nobody")
    monkeypatch.delenv("AWS_PROFILE")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.filesystem("s3").clear_instance_cache()
    one_line(url, "no access", "credentials")
    fsspec.filesystem("s3").clear_instance_cache()


def test_a_storage_that_stays_away_is_given_up_in_one_line(proxy, url, monkeypatch, capfd):
    monkeypatch.setattr(storage, "TRIES", 5)
    store = Store(url)
    proxy.fault = lambda method, path: "503"
    before = len(proxy.log)
    with pytest.raises(UserError, match=r"^s3://bucket/photos/train-\d+\.tar: .*busy \(5 tries\)$"):
        store.read(0)
    assert len(proxy.log) - before == 5 and capfd.readouterr().err.count("trying again") == 1


@pytest.mark.parametrize("where", ["s3", "file"])
def test_an_object_that_was_cut_off_for_good_is_one_line(where, proxy, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "TRIES", 3)
    (tmp_path / "cut").mkdir()
    address = f"file://{tmp_path}/cut" if where == "file" else "s3://bucket/cut"
    store = Store(upload(folder, address))
    fs, root = fsspec.core.url_to_fs(address)
    name = store.shards[store.shard_of[9]]["file"]
    fs.pipe_file(f"{root}/{name}", fs.cat_file(f"{root}/{name}")[: int(store._rows["offset"][9]) + 100])
    with pytest.raises(UserError, match=rf"^{address}/{name}: 100 of \d+ bytes came: cut off \(3 tries\)$"):
        store.read(9)
    with pytest.raises(UserError, match=rf"^{address}/{name}: .*"):  # what lies altogether beyond the end
        store.read(11)


def test_an_answer_that_is_always_cut_off_is_one_line(proxy, url, monkeypatch):
    monkeypatch.setattr(storage, "TRIES", 3)
    store = Store(url)
    proxy.fault = lambda method, path: "truncated" if ".tar" in path else None
    with pytest.raises(UserError, match=r"^s3://bucket/photos/train-\d+\.tar: .* \(3 tries\)$"):
        store.read(0)


@pytest.mark.parametrize("value", ["much", "0", "-3", "nan", "inf"])
def test_the_bound_is_checked(url, monkeypatch, value):
    monkeypatch.setenv("MANYVIEW_CACHE_GB", value)
    one_line(url, "MANYVIEW_CACHE_GB is the size of the cache in gigabytes", value)


@pytest.mark.parametrize("zeros", [0, 20, 4096])
def test_a_count_that_was_lost_is_made_again(url, folder, fresh, zeros):
    payloads(Store(url))
    (fresh / "pieces" / "size").write_bytes(bytes(zeros))  # by a machine that lost power
    for path in list(fresh.glob("pieces/*/train-*"))[:2]:
        path.unlink()
    assert payloads(Store(url)) == payloads(Store(folder))
    assert int((fresh / "pieces" / "size").read_bytes()[:20]) >= held(fresh)


def test_a_disk_that_takes_no_more_is_one_line(url, fresh):
    store = Store(url)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        store.prefetch(np.arange(1))
        with pytest.raises(UserError, match=r"cache .*: File too large; MANYVIEW_CACHE names another folder"):
            store.read(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(fresh.glob("pieces/*/*.part")) and store.read(0).size


def test_a_cache_on_a_file_system_without_locks_is_one_line(url, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(UserError, match=r"cache .*: Operation not supported; MANYVIEW_CACHE names another folder"):
        Store(url)


@pytest.mark.parametrize("protocol", ["s9", "github", "dbfs", "reference", "zip", "ftp", "generic", "hdfs", "dir"])
def test_addresses_that_cannot_be_opened_are_one_line(protocol, monkeypatch):
    def unreachable(*_, **__):
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    monkeypatch.setattr("socket.create_connection", unreachable)
    monkeypatch.setattr("socket.getaddrinfo", unreachable)
    monkeypatch.setattr(storage, "TRIES", 1)
    one_line(f"{protocol}://bucket/x", f"{protocol}://bucket/x: ")


def test_addresses():
    assert storage.address("shards/x") is None and storage.address(Path("/data/x")) is None
    assert storage.address(Path("s3://bucket/a/b/")) == storage.address("s3://bucket/a/b") == "s3://bucket/a/b"
    assert storage.address("S3://Bucket/A") == "s3://Bucket/A"
    assert storage.address(Path("file:///data/x")) == "file:///data/x" and storage.address("timm:resnet18") is None
    for chained in ("simplecache::s3://bucket/a", "zip://*.tar::file:///a.zip"):
        for path in (chained, Path(chained)):
            with pytest.raises(UserError, match="addresses chained by :: are not read here"):
                storage.address(path)
    assert storage.address("a::b/c") is None
    assert storage.where(Path("s3://bucket/a")) == "s3://bucket/a" and storage.where(Path("a/b")) == "a/b"


# --- training ---------------------------------------------------------------------------------------------------------


def train(data: object, out: Path) -> list[dict]:
    """Eight steps in blocks order; the rows of metrics.jsonl without what depends on time."""
    words = ["--data", data, "--out", out, "--steps", 8, "--batch-size", 16, "--views", 2, "--order", "blocks"]
    words += ["--backbone", "resnet10-narrow", "--size", 8, "--projector-dim", 16, "--log-every", 1, "--eval-every", -1]
    words += ["--seed", 77]  # of its own: orders are remembered, and these are of small blocks
    assert conftest.train(*words) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: row[k] for k in ("step", "loss", "rank", "images") if k in row} for row in rows]


@pytest.mark.slow
def test_training_notices_nothing(proxy, digits, tmp_path, monkeypatch):
    for place, name, value in ((storage, "PIECE", 1 << 18), (plans, "BLOCK", 32), (plans, "MIXED", 32 * plans.WINDOW)):
        monkeypatch.setattr(place, name, value)
    address = upload(digits, "s3://bucket/digits")
    proxy.trouble()
    assert train(address, tmp_path / "remote") == train(digits, tmp_path / "local")
    assert {fault for *_, fault in proxy.log} >= set(FAULTS)
    weights = [load_file(tmp_path / name / "backbone.safetensors") for name in ("remote", "local")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert json.loads((tmp_path / "remote" / "config.json").read_text())["data"] == address


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(folder) -> Path:
    return folder.parent / "in"


def objects(address: str) -> dict[str, bytes]:
    fs, root = fsspec.core.url_to_fs(address)
    fs.invalidate_cache()
    return {path.removeprefix(root).lstrip("/"): fs.cat_file(path) for path in fs.find(root)}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def write(address: str, source: Path, **options) -> dict:
    return write_shards(Options("folder", shard_mb=1), source, Path(address), quiet=True, **options)


@pytest.mark.slow
def test_a_bucket_gets_what_a_folder_gets_through_a_bad_network(proxy, folder, source, fresh):
    proxy.trouble(("503", "cut"), methods="PUT", every=3)
    manifest = write("s3://bucket/made/photos", source)
    assert objects("s3://bucket/made/photos") == files_of(folder)
    assert {"503", "cut"} <= {fault for method, *_, fault in proxy.log if method == "PUT"}
    names = [path.rsplit("/", 1)[1] for method, path, _, fault in proxy.log if method == "PUT" and not fault]
    assert names[-1] == "manifest.json" and names.count("manifest.json") == 1
    assert not list(fresh.glob("making/*/photos/*.tar")), "shards stayed on local disk"
    proxy.calm()
    assert write("s3://bucket/made/photos", source) == manifest and not proxy.requests("PUT", "")
    fsspec.filesystem("s3").rm_file("bucket/made/photos/train-00002.tar")  # lost: made again, and the manifest the last
    assert write("s3://bucket/made/photos", source) == manifest
    assert objects("s3://bucket/made/photos") == files_of(folder)
    with pytest.raises(UserError, match=r"^s3://bucket/made/photos holds shards made otherwise"):
        write_shards(Options("folder", shard_mb=2), source, Path("s3://bucket/made/photos"), quiet=True)
    with pytest.raises(UserError, match="executor ray writes to a folder"):
        write("s3://bucket/made/other", source, executor="ray")


def test_shards_of_others_in_a_bucket_are_left_alone(folder, source, proxy, fresh):
    address = upload(folder, "s3://bucket/theirs")
    fsspec.filesystem("s3").rm_file("bucket/theirs/manifest.json")
    before = objects(address)
    proxy.calm()
    with pytest.raises(UserError, match=r"^s3://bucket/theirs holds train-00000\.idx and no manifest\.json"):
        write(address, source)
    assert objects(address) == before and not proxy.requests("DELETE", "") and not list(fresh.glob("making/*/*"))


def test_a_bucket_is_verified(folder, proxy):
    address = upload(folder, "s3://bucket/verified")
    assert verify(Path(address)) == []
    fs, store = fsspec.filesystem("s3"), Store(folder)
    path = f"bucket/verified/{store.shards[store.shard_of[9]]['file']}"
    data = bytearray(fs.cat_file(path))
    data[int(store._rows["offset"][9]) + 99] ^= 4
    fs.pipe_file(path, bytes(data))
    assert any(f"key {store.key(9)}: its bytes have changed" in line for line in verify(Path(address)))


@pytest.mark.slow
def test_killed_between_uploads_it_goes_on(proxy, folder, source, tmp_path, monkeypatch):
    address = "s3://bucket/killed/photos"
    line = [sys.executable, "tools/shards.py", "write", "--dataset", "folder", "--source", source, "--shard-mb", 1]
    proxy.delay, proxy.fault = 0.7, lambda method, path: "slow" if ".tar" in path and method == "PUT" else None
    process = subprocess.Popen([*map(str, line), "--out", address, "--jobs", "1"], cwd=ROOT, stderr=subprocess.DEVNULL)
    while len(proxy.requests("PUT")) < 3:  # the third shard is under way
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.8)
    with pytest.raises(UserError, match="no shards in s3://bucket/killed/photos"):
        Store(address)
    proxy.calm()
    write(address, source)
    assert len(proxy.requests("PUT")) in (1, 2), "finished shards were uploaded again"
    assert objects(address) == files_of(folder) and payloads(Store(address)) == payloads(Store(folder))
    monkeypatch.setenv("MANYVIEW_CACHE", str(tmp_path / "another machine"))
    proxy.calm()
    write(address, source)
    assert not proxy.requests("PUT", "")
