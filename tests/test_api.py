"""The front door, held against the trainer's loader, the evaluation and scikit-learn."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import class_folders, jpeg
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

import manyview
from manyview import UserError
from manyview.evaluation import encoder as encoders
from manyview.evaluation import features
from manyview.model import backbone
from manyview.pipeline import engines
from manyview.pipeline.convert.write import write_shards
from manyview.pipeline.loader import Loader, normalize
from manyview.pipeline.manifest import Options
from manyview.pipeline.plan import plan
from manyview.pipeline.store import Store
from manyview.pipeline.views import policy

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """20 training photos and 7 test photos of several sizes."""
    root = tmp_path_factory.mktemp("photos")
    class_folders(root / "in", 10, 2)
    class_folders(root / "in", 3, 2, seed=50, split="val")
    (root / "in/val/class0/photo9.jpg").write_bytes(jpeg(99, 100, 60))
    write_shards(Options("folder"), root / "in", root / "out", quiet=True)
    return root / "out"


def processes(monkeypatch, world: int, rank: int) -> None:
    """As torchrun says it to each of its processes."""
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("RANK", str(rank))


def test_importing_it_loads_no_torch():
    code = (
        "import sys, manyview; assert 'Views' in dir(manyview); print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
    with pytest.raises(AttributeError, match="'manyview' has no attribute 'views'"):
        _ = manyview.views


def test_views_are_those_that_the_trainer_gets(photos):
    store = Store(photos)
    engine, _ = engines.create("cpu", store, threads=1)
    loader = Loader(store, plan(store.labels, seed=3, batch=6), policy("byol", 4, 32), engine, seed=3)
    with manyview.Views(photos, views=4, batch_size=6, seed=3, size=32, policy="byol") as data:
        assert len(data) == 3
        batches = [batch for _ in range(2) for batch in data]
    for batch, theirs in zip(batches, loader.batches(0, 6), strict=True):
        assert batch.views.shape == (4, 6, 3, 32, 32)
        assert torch.equal(batch.views, normalize(theirs.views[0], store.mean, store.std, torch.float32))
        assert all(torch.equal(getattr(batch, name), getattr(theirs, name)) for name in ("ids", "labels", "epochs"))
    engine.close()
    ids, epochs = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("ids", "epochs"))
    assert (
        sorted(ids[epochs == 0].tolist()) == list(range(20)) and len(set(epochs.tolist())) == 2
    )  # 20 is no multiple of 6


def test_pixels_and_other_statistics(photos):
    one = next(iter(manyview.Views(photos, 2, 6, size=24, normalize=False)))
    other = next(iter(manyview.Views(photos, 2, 6, size=24, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))))
    assert one.views.dtype == torch.uint8
    by_hand = (one.views / 255 - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.1, 0.2, 0.3])[
        :, None, None
    ]
    torch.testing.assert_close(other.views, by_hand, rtol=1e-4, atol=1e-4)


def test_processes_share_an_epoch(photos, monkeypatch):
    whole = [batch.ids.tolist() for batch in manyview.Views(photos, 2, 6, size=16)]
    parts = []
    for rank in range(3):
        processes(monkeypatch, 3, rank)
        parts.append([batch.ids.tolist() for batch in manyview.Views(photos, 2, 2, size=16)])
    assert [sorted(id for part in ids for id in part) for ids in zip(*parts)] == [sorted(ids) for ids in whole]
    processes(monkeypatch, 8, 0)
    with pytest.raises(UserError, match="batch_size 3 x 8 processes is more than the 20 images there are"):
        manyview.Views(photos, 2, 3)


@pytest.mark.parametrize("taken", [0, 1, 3, 4])
def test_resuming_is_exact(photos, monkeypatch, taken):
    def rest(data, epochs):
        return [(batch.ids.tolist(), batch.views) for _ in range(epochs) for batch in data]

    straight = rest(manyview.Views(photos, 2, 6, size=16), 3)
    data, iterator = manyview.Views(photos, 2, 6, size=16), None
    for number in range(taken):
        iterator = iter(data) if number % len(data) == 0 else iterator
        next(iterator)
    state = data.state_dict()
    fresh = manyview.Views(photos, 2, 6, size=16)
    fresh.load_state_dict(state)
    resumed = rest(fresh, 2)
    assert [ids for ids, _ in resumed] == [ids for ids, _ in straight[taken : taken + len(resumed)]]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(resumed, straight[taken:]))
    assert len(resumed) == 6 - taken % 3
    processes(monkeypatch, 2, 1)  # the same batches, now by two
    halves = manyview.Views(photos, 2, 3, size=16)
    halves.load_state_dict(state)
    assert set(next(iter(halves)).ids.tolist()) < set(straight[taken][0])


def test_a_loop_that_was_left_begins_the_next_epoch(photos):
    data = manyview.Views(photos, 2, 6, size=16)
    straight = [batch.ids.tolist() for _ in range(2) for batch in data]
    left = manyview.Views(photos, 2, 6, size=16)
    next(iter(left))
    assert [batch.ids.tolist() for batch in left] == straight[3:]


def test_a_state_of_something_else_is_refused(photos):
    state = manyview.Views(photos, 2, 6, size=16).state_dict()
    with pytest.raises(UserError, match="the state's seed is 0, now 1\nthe state's batch is 6, now 5"):
        manyview.Views(photos, 2, 5, seed=1, size=16).load_state_dict(state)
    with pytest.raises(UserError, match="the state's policy"):
        manyview.Views(photos, 2, 6, size=17).load_state_dict(state)
    for step in ("3", -1, 1.5, None):
        with pytest.raises(UserError, match="the state's step"):
            manyview.Views(photos, 2, 6, size=16).load_state_dict({**state, "step": step})


@pytest.mark.parametrize(
    "setting", [{"views": 2.0}, {"views": 0}, {"batch_size": "16"}, {"batch_size": 0}, {"seed": 2**63}, {"seed": 1.5},
                {"size": "8"}, {"threads": -1}, {"prefetch": True}]
)  # fmt: skip
def test_a_number_that_is_none_is_said_at_once(photos, setting):
    with pytest.raises(UserError, match=f"{next(iter(setting))} must be a whole number"):
        manyview.Views(photos, **setting)
    manyview.Views(photos, views=np.int64(2), batch_size=4, seed=2**63 - 1)


def test_a_test_split_comes_once_in_order_and_clean(photos, monkeypatch):
    data = manyview.Views(photos, split="val", batch_size=3, size=40)
    batches = list(data)
    assert [len(batch.ids) for batch in batches] == [3, 3, 1] and len(data) == 3
    assert torch.cat([batch.ids for batch in batches]).tolist() == list(range(7))
    assert torch.cat([batch.labels for batch in data]).tolist() == Store(photos, "val").labels.tolist()
    for world, batch_size in ((2, 2), (3, 2), (7, 1)):
        parts = []
        for rank in range(world):
            processes(monkeypatch, world, rank)
            parts.append(
                [batch.ids.tolist() for batch in manyview.Views(photos, split="val", batch_size=batch_size, size=8)]
            )
            assert len(parts[-1]) == len(manyview.Views(photos, split="val", batch_size=batch_size, size=8))
        assert len({len(part) for part in parts}) == 1 and all(ids for part in parts for ids in part)
        assert sorted(id for part in parts for ids in part for id in ids) == list(range(7))


def test_what_images_in_order_do_not_have_is_refused(photos, monkeypatch):
    with pytest.raises(UserError, match=r"fraction 0\.5 is of images that are shuffled"):
        manyview.Views(photos, split="val", fraction=0.5)
    state = manyview.Views(photos, split="val", batch_size=6, size=8).state_dict()
    processes(monkeypatch, 2, 0)  # each process would go through a part of its own
    with pytest.raises(UserError, match="the state's processes is 1, now 2"):
        manyview.Views(photos, split="val", batch_size=3, size=8).load_state_dict(state)
    processes(monkeypatch, 8, 0)
    with pytest.raises(UserError, match="7 images are too few for 8 processes"):
        manyview.Views(photos, split="val")


def test_clean_views_are_what_the_evaluation_sees(photos):
    for size in (32, 112):
        network: nn.Module = backbone.create("resnet10-narrow", image_size=size).eval()
        store = Store(photos, "val")
        seen = encoders.Encoder(network, nn.Identity, "x", "resnet10-narrow", size, store.mean, store.std)
        engine, _ = engines.create("cpu", store, threads=1)
        theirs = features.embed(seen, store, np.arange(7), engine)[:, 0]
        engine.close()
        with torch.inference_mode():
            ours = torch.cat(
                [network(b.views[0]) for b in manyview.Views(photos, split="val", batch_size=7, size=size)]
            )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    shuffled = next(iter(manyview.Views(photos, policy="clean", batch_size=5, size=32)))
    in_order = next(iter(manyview.Views(photos, policy="clean", batch_size=20, size=32, shuffle=False)))
    assert torch.equal(shuffled.views, in_order.views[:, shuffled.ids])
    with pytest.raises(UserError, match="policy 'clean' is one view with no settings, not 4"):
        manyview.Views(photos, 4, policy="clean")


def test_a_damaged_image_is_replaced_in_training_and_named_in_a_test_split(photos, tmp_path, capfd):
    write_shards(Options("shards"), photos, tmp_path / "copy", quiet=True)
    store = Store(tmp_path / "copy", "val")
    place = int(store._rows["offset"][4]) + 200
    file = tmp_path / "copy" / store.shards[int(store.shard_of[4])]["file"]
    data = bytearray(file.read_bytes())
    data[place] ^= 255
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"1 bad samples are more than --max-bad 0 of 7; .*: write the shards again"):
        list(manyview.Views(tmp_path / "copy", split="val", batch_size=3, size=16))


def test_own_policies(photos, tmp_path):
    supervised = next(iter(manyview.Views(photos, 1, 20, policy="supervised", size=16, normalize=False)))
    assert supervised.views.shape == (1, 20, 3, 16, 16) and supervised.local == [False]
    (tmp_path / "own.yaml").write_text("policy: supervised\nscale: [0.999, 1]\nratio: [0.999, 1.001]\nflip: 0\n")
    for own in (tmp_path / "own.yaml", str(tmp_path / "own.yaml"), {"policy": "supervised", "flip": 1}):
        data = manyview.Views(photos, 3, 4, policy=own, size=16)
        assert data.policy.groups[0].flip == (1 if isinstance(own, dict) else 0) and data.policy.groups[0].jitter == 0
    crops = next(iter(manyview.Views(photos, 4, 4, policy={"policy": "multicrop", "local.size": 12}, size=28)))
    assert [tuple(group.shape) for group in crops.views] == [(2, 4, 3, 28, 28), (2, 4, 3, 12, 12)]
    assert crops.local == [False, False, True, True]
    z = manyview.encode(lambda x: x.mean((2, 3)), crops.views)
    assert torch.isfinite(manyview.vicreg(z, local=crops.local).total)
    assert torch.allclose(z[3, 2], crops.views[1][1, 2].mean((1, 2)))
    wrongs = [
        ({"hu": 0}, "'hu'; nearest: hue"),
        ("simclear", "'simclear'; nearest: simclr"),
        (Path("no.yaml"), "no.yaml"),
    ]
    for wrong, message in wrongs:
        with pytest.raises(UserError, match=message):
            manyview.Views(photos, 2, 4, policy=wrong)


def test_threads_end_with_the_loop_that_was_left(photos):
    def threads():
        return [thread for thread in threading.enumerate() if thread.name.startswith("views")]

    gc.collect()
    before = len(threads())
    data = manyview.Views(photos, 2, 6, size=16)
    next(iter(data))
    assert len(threads()) > before
    del data
    gc.collect()
    for thread in threads()[before:]:
        thread.join(10)
    assert len(threads()) == before
    with manyview.Views(photos, 2, 6, size=16) as data:
        next(iter(data))
    assert len(threads()) == before and len(next(iter(data)).ids) == 6  # and they begin again
    data.close()


def test_probe_is_the_evaluations(digits):
    scores = manyview.probe(lambda x: x.flatten(1), digits, epochs=5)

    def arrays(split):
        batches = list(manyview.Views(digits, split=split, shuffle=False))
        return torch.cat([b.views[0].flatten(1) for b in batches]), torch.cat([b.labels for b in batches])

    train, test = arrays("train"), arrays("val")
    theirs = KNeighborsClassifier(20, weights="distance", algorithm="brute").fit(*train).score(*test)
    assert scores["knn-euclid-invdist k=20 raw"].top1 == pytest.approx(theirs, abs=1e-9)
    assert scores["knn-cosine-exp k=20 l2"].n == 359 and scores["linear-sweep bn"].top1 > 0.85
    again = manyview.probe(nn.Flatten(), [train], [test], epochs=5)
    assert again == scores


def test_probe_leaves_the_encoder_as_it_was(photos):
    network = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(2), nn.Dropout(), nn.Flatten())
    network[2].eval()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    manyview.probe(network, photos, size=16, epochs=2)
    assert [part.training for part in network] == [True, True, False, True] and network.training
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    with pytest.raises(UserError, match="none to test on"):
        manyview.probe(network, [(torch.zeros(2, 3, 8, 8), torch.zeros(2))])
    with pytest.raises(UserError, match="probe: 2 training images and 0 test images have a label"):
        manyview.probe(
            network, [(torch.zeros(2, 3, 8, 8), torch.zeros(2))], [(torch.zeros(2, 3, 8, 8), -torch.ones(2))]
        )
