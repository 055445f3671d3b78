from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from pictures import class_folders

from manyview.pipeline import engines
from manyview.pipeline.convert.write import write_shards
from manyview.pipeline.engines.cpu import CPUEngine
from manyview.pipeline.errors import UserError
from manyview.pipeline.loader import Loader, clean_views, normalize
from manyview.pipeline.manifest import Options
from manyview.pipeline.plan import plan
from manyview.pipeline.store import Corrupt, Store
from manyview.pipeline.views import policy

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    write_shards(Options("folder"), class_folders(root / "in", 10, 2), root / "out", quiet=True)
    return root / "out"


def loader(folder, *, batch=6, world=1, rank=0, threads=2, seed=4, name="cpu", views=2, **options) -> Loader:
    store = Store(folder)
    order = plan(store.labels, seed=seed, batch=batch, world=world, rank=rank)
    engine, _ = engines.create(name, store, threads=threads)
    return Loader(store, order, policy("simclr", views, 32), engine, seed=seed, **options)


def taken(made: Loader, start: int, stop: int) -> list[torch.Tensor]:
    found = [b.views[0].clone() for b in made.batches(start, stop)]
    made.engine.close()
    return found


def test_batches_are_as_promised(photos):
    made = loader(photos)
    batches = list(made.batches(0, 5))
    assert [b.step for b in batches] == [0, 1, 2, 3, 4]
    for b in batches:
        assert b.views[0].shape == (2, 6, 3, 32, 32) and b.views[0].dtype == torch.uint8
        assert b.ids.dtype == b.labels.dtype == b.epochs.dtype == torch.int64
        assert torch.equal(b.labels, torch.from_numpy(made.store.labels[b.ids.numpy()]))
    assert torch.bincount(torch.cat([b.ids[b.epochs == 0] for b in batches]), minlength=20).eq(1).all()
    assert made.timings["batches"] == 5 and made.engine.decoded == 30
    assert {"wait", "parameters", "read", "decode", "render"} <= set(made.timings)
    made.engine.close()


def test_the_same_tensors_for_any_threads_and_prefetch(photos):
    expected = taken(loader(photos, threads=1, prefetch=1), 0, 5)
    for threads, prefetch in ((2, 2), (5, 4)):
        for mine, theirs in zip(taken(loader(photos, threads=threads, prefetch=prefetch), 0, 5), expected):
            assert torch.equal(mine, theirs)


def test_the_same_tensors_for_any_number_of_ranks(photos):
    expected = taken(loader(photos), 0, 5)
    for world in (2, 3):
        parts = [taken(loader(photos, world=world, rank=r), 0, 5) for r in range(world)]
        for step in range(5):
            assert torch.equal(torch.cat([p[step] for p in parts], 1), expected[step])


def test_the_same_tensors_after_a_resume_in_mid_epoch(photos):
    expected = taken(loader(photos), 0, 9)
    for start in (1, 3, 8):  # 20 samples in batches of 6: all in the middle of an epoch
        for mine, theirs in zip(taken(loader(photos), start, 9), expected[start:]):
            assert torch.equal(mine, theirs)


@pytest.mark.slow
def test_another_process_makes_the_same_tensors(photos):
    program = (
        "import sys, hashlib; sys.path[:0] = sys.argv[1:3]; from test_loader import loader, taken;"
        "print(hashlib.sha256(b''.join(v.numpy().tobytes() for v in taken(loader(sys.argv[3]), 2, 4))).hexdigest())"
    )
    line = [sys.executable, "-c", program, str(ROOT), str(ROOT / "tests"), str(photos)]
    theirs = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    assert (
        theirs == hashlib.sha256(b"".join(v.numpy().tobytes() for v in taken(loader(photos), 2, 4))).hexdigest() + "\n"
    )


def test_views_and_epochs_and_seeds_differ(photos):
    a, b = taken(loader(photos, batch=20), 0, 2)
    (c,) = taken(loader(photos, batch=20, seed=5), 0, 1)
    for one, two in ((a[0], a[1]), (a, b), (a, c)):
        assert (one.float() - two.float()).abs().mean() > 5


def damaged(folder: Path, out: Path, ids: list[int]) -> Store:
    store = Store(shutil.copytree(folder, out))
    for i in ids:
        with open(out / store.shards[int(store.shard_of[i])]["file"], "r+b") as file:
            file.seek(int(store._rows["offset"][i]) + 200)
            file.write(b"\xff\xd8\x00")
    return store


@pytest.mark.parametrize("name", ["cpu", pytest.param("dali", marks=pytest.mark.slow)])
def test_bad_samples_cost_themselves_alone(photos, tmp_path, capfd, name):
    if name == "dali":
        pytest.importorskip("nvidia.dali")
    store = damaged(photos, tmp_path / "x", [4, 5])
    made = loader(tmp_path / "x", max_bad=0.1, name=name)
    batches = list(made.batches(0, 7))
    assert sorted(made.bad) == [4, 5] and "checksum" in made.bad[4]
    good = {b.step: b for b in loader(photos).batches(0, 7)}
    for b in batches:
        expected = good[b.step].ids.clone()
        expected[(expected == 4) | (expected == 5)] = 6  # the next good one
        assert torch.equal(b.ids, expected) and len(b.ids) == 6
        same = b.ids == good[b.step].ids
        if name == "cpu":
            assert torch.equal(b.views[0][:, same], good[b.step].views[0][:, same])
        assert b.views[0].float().std((-1, -2)).min() > 0  # nothing black
    log = capfd.readouterr().err
    assert log.count(store.key(4)) == 1 and log.count(store.key(5)) == 1
    made.engine.close()


def test_too_many_bad_samples_stop_with_a_message(photos, tmp_path):
    damaged(photos, tmp_path / "x", [4, 5])
    made = loader(tmp_path / "x", max_bad=0.05)
    with pytest.raises(UserError, match=r"2 bad samples are more than --max-bad 0\.05 of 20"):
        list(made.batches(0, 7))
    made.engine.close()


def test_clean_views_leave_out_what_cannot_be_read(photos, tmp_path):
    store, bad = Store(photos), damaged(photos, tmp_path / "x", [3])
    engine, other = CPUEngine(store, threads=2), CPUEngine(bad, threads=2)
    ids, views = clean_views(store, engine, 24, np.arange(2, 9))
    assert ids.tolist() == list(range(2, 9)) and views.shape == (7, 3, 24, 24) and views.dtype == torch.uint8
    left, rest = clean_views(bad, other, 24, ids)
    assert left.tolist() == [2, 4, 5, 6, 7, 8] and torch.equal(rest, views[ids != 3])
    none, empty = clean_views(bad, other, 24, np.array([3]))
    assert len(none) == 0 and empty.shape == (0, 3, 24, 24)
    engine.close()
    other.close()


def test_a_shard_that_is_cut_off_or_removed_while_in_use_costs_its_samples(photos, tmp_path):
    """Not the process: reading a map of what is no longer there is SIGBUS."""
    shutil.copytree(photos, tmp_path / "x")
    store, late = Store(tmp_path / "x"), Store(tmp_path / "x")
    last = max(range(len(store)), key=lambda i: int(store._rows["offset"][i]))
    assert len(store.read(last))
    shard = tmp_path / "x" / store.shards[int(store.shard_of[last])]["file"]
    os.truncate(shard, int(store._rows["offset"][last]) + 10)
    with pytest.raises(Corrupt, match="has been cut off since it was opened"):
        store.read(last)
    first = min(range(len(store)), key=lambda i: int(store._rows["offset"][i]))
    assert len(store.read(first))
    shard.unlink()
    assert len(store.read(first))  # the map holds the file
    with pytest.raises(Corrupt, match=r"cannot be read: .*No such file"):
        late.read(first)


def test_samples_that_another_process_found_bad_are_replaced_and_counted(photos):
    made = loader(photos, max_bad=0.1)
    want = [b.ids.tolist() for b in made.batches(0, 3)]
    made.learn({want[0][0]: "a (cut off)"})
    (got,) = made.batches(0, 1)
    assert want[0][0] not in got.ids.tolist() and got.ids.tolist()[1:] == want[0][1:]
    with pytest.raises(UserError, match=r"3 bad samples are more than --max-bad 0\.1 of 20; the last one is c"):
        made.learn({want[0][1]: "b (cut off)", want[0][2]: "c (cut off)"})
    every = loader(photos, max_bad=1)
    with pytest.raises(UserError, match="not one of 20 samples can be read"):
        every.learn(dict.fromkeys(range(20), "x"))
    made.engine.close()
    every.engine.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalize(dtype):
    views = torch.randint(0, 256, (2, 3, 8, 8, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3)
    mean, std = (123.0, 117.0, 104.0), (58.0, 57.0, 56.0)
    found = normalize(views, mean, std, dtype)
    expected = (views.double() - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert found.dtype == dtype and found.stride() == views.stride()
    assert (found.double() - expected).abs().max() < {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 2e-3}[
        dtype
    ]


def test_normalized_views_come_into_memory_that_nobody_holds():
    views = torch.randint(0, 256, (2, 3, 3, 8, 8), dtype=torch.uint8)
    first = normalize(views, (0, 0, 0), (1, 1, 1), torch.float32)
    kept = first[0].clone()
    part, place = first[0], first.data_ptr()
    del first
    second = normalize(255 - views, (0, 0, 0), (1, 1, 1), torch.float32)
    assert torch.equal(part, kept) and second.data_ptr() != place  # a part of it is still held
    del part
    assert normalize(views, (0, 0, 0), (1, 1, 1), torch.float32).data_ptr() == place


def test_closing_early_leaves_no_thread_and_no_work(photos):
    before = threading.active_count()
    made = loader(photos, prefetch=4)
    batches = made.batches(0, 1000)
    next(batches)
    batches.close()
    made.engine.close()
    assert threading.active_count() == before


def test_an_engine_that_raises_does_not_hang(photos):
    made = loader(photos)
    made.store.read = lambda i: (_ for _ in ()).throw(OSError("disk gone"))
    with pytest.raises(OSError, match="disk gone"):
        next(made.batches(0, 3))
    made.engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["exit", "interrupt"])
def test_no_process_thread_or_shared_memory_is_left(photos, ending):
    """A program that stops in the middle of loading, normally or by Ctrl-C, without closing anything."""
    names = ["cpu", *(["dali"] if engines.has_dali() else [])]
    program = (
        "import sys, os, signal; sys.path[:0] = sys.argv[1:3]\n"
        "from test_loader import loader\n"
        "batches = [loader(sys.argv[3], name=name).batches(0, 10**6) for name in sys.argv[5:]]\n"
        "for step in range(3):\n"
        "    kept = [next(one) for one in batches]\n"
        "print('running', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGINT) if sys.argv[4] == 'interrupt' else sys.exit(0)\n"
    )
    before = set(os.listdir("/dev/shm"))
    line = [sys.executable, "-c", program, str(ROOT), str(ROOT / "tests"), str(photos), ending, *names]
    child = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert "running" in child.stdout
    assert child.returncode == 0 if ending == "exit" else "KeyboardInterrupt" in child.stderr
    for _ in range(100):  # what a live process maps is another test's, and so is what vanishes with one
        left = {name for name in set(os.listdir("/dev/shm")) - before if not in_use(name)}
        if not left:
            break
        time.sleep(0.1)
    assert not left


def in_use(name: str) -> bool:
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if name in maps.read_text():
                return True
    return False


@pytest.mark.slow
def test_memory_is_flat_over_epochs(tmp_path):
    """Five epochs of photos of very different sizes, measured after the second."""
    from pictures import jpeg

    folder = tmp_path / "in" / "train" / "a"
    folder.mkdir(parents=True)
    for i in range(60):
        (folder / f"{i}.jpg").write_bytes(jpeg(i, 60 + 37 * i % 900, 80 + 53 * i % 1100))
    write_shards(Options("folder"), tmp_path / "in", tmp_path / "out", quiet=True)
    made = loader(tmp_path / "out", batch=12, views=4)
    used = []
    for epoch in range(7):
        for _ in made.batches(5 * epoch, 5 * epoch + 5):
            pass
        gc.collect()
        used.append(psutil.Process().memory_info().rss / 2**20)
    made.engine.close()
    assert used[-1] - used[1] < 25, json.dumps(used)


@pytest.mark.parametrize("order", ["random", "blocks"])
def test_storage_is_told_before_a_batch_is_read(photos, order):
    made = loader(photos)
    made.plan = plan(made.store.labels, seed=4, batch=6, order=order)
    told: list[int] = []
    prefetch, submit = made.store.prefetch, made.engine.submit
    made.store.prefetch = lambda ids: (told.extend(ids.tolist()), prefetch(ids))
    made.engine.submit = lambda ids, drawn: [told.remove(i) for i in ids.tolist()] and submit(ids, drawn)
    assert len(list(made.batches(2, 12))) == 10  # `remove` raises for what was not told
    assert told == []
    made.engine.close()


def test_storage_rests_where_the_engine_holds_every_image(digits):
    made = loader(digits, name="resident")
    told: list[int] = []
    made.store.prefetch = lambda ids: told.extend(ids.tolist())
    assert len(list(made.batches(0, 3))) == 3 and told == []
    made.engine.close()


def test_on_a_gpu_waiting_is_told_by_the_devices_clock(digits, monkeypatch):
    """Events of a device that has 3 ms between the end of a step and the next views, whatever the host's clock says."""
    clock = iter(range(0, 1000, 3))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.at = next(clock)

        def query(self):
            return True

        def elapsed_time(self, other):
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    store = Store(digits)
    engine = engines.create("cpu", store)[0]
    order = plan(store.labels, seed=0, batch=8)
    loader = Loader(store, order, policy("none", 1, 8), engine, seed=0)
    assert "device_wait" not in loader.timings
    loader._on_gpu = True
    assert len(list(loader.batches(0, 4))) == 4
    assert loader.timings["device_wait"] == pytest.approx(4 * 3e-3)
    engine.close()
