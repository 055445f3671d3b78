"""Encoders and their features: what is loaded, that it stays frozen, and that a cache is only used for what it holds."""

import json
import multiprocessing
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import update_bn

from manyview.evaluation import encoder as encoders
from manyview.evaluation import features
from manyview.evaluation.encoder import Asked
from manyview.evaluation.features import Views
from manyview.model import backbone
from manyview.pipeline import engines
from manyview.pipeline.errors import UserError
from manyview.pipeline.store import Store
from manyview.pipeline.views import policy
from tests import patterns
from tests.conftest import command


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(ResNet run, ViT run), (two shard directories)."""
    return patterns.shared(tmp_path_factory)


@pytest.fixture(params=[0, 1], ids=["resnet", "vit"])
def encoder(made, request):
    return encoders.load(str(made[0][request.param]))


@pytest.fixture
def store(made):
    return Store(made[1][0], "val")


def embed(encoder, store, *, batch=64, threads=2, ids=None, **kwargs) -> torch.Tensor:
    engine = engines.create("cpu", store, threads=threads)[0]
    try:
        return features.embed(
            encoder, store, np.arange(len(store)) if ids is None else ids, engine, batch=batch, **kwargs
        )
    finally:
        engine.close()


@pytest.mark.parametrize(("batch", "threads"), [(1, 1), (7, 2), (64, 1)])
def test_batches_and_threads_do_not_matter(encoder, store, batch, threads):
    torch.testing.assert_close(
        embed(encoder, store, batch=batch, threads=threads), embed(encoder, store), rtol=1e-4, atol=1e-5
    )


def test_features_are_those_of_the_network_on_the_pixels(encoder, store):
    """Against the module applied by hand to a sample's decoded and normalized pixels, in the order of the ids."""
    ids = np.array([5, 0, 17])
    found = embed(encoder, store, ids=ids)[:, 0]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.mean, encoder.std))
    pixels = torch.stack([torch.from_numpy(store.read(int(i)).copy()).permute(2, 0, 1) for i in ids])
    with torch.no_grad():
        expected = encoder.module((pixels - mean) / std)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_encoder_is_left_as_it_was(encoder, store):
    before = {k: v.clone() for k, v in encoder.module.state_dict().items()}
    embed(encoder, store)
    after = encoder.module.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert encoders.fingerprint(encoder.module) == encoder.checkpoint


def test_a_part_in_training_mode_is_refused(encoder, store):
    part = next(m for m in encoder.module.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm))
    part.train()
    with pytest.raises(RuntimeError, match="is in training mode"):
        embed(encoder, store)


def test_statistics_that_move_are_noticed(made, store):
    """A BatchNorm that sneaks into training mode during the forward pass, as the reference code's does."""
    encoder = encoders.load(str(made[0][0]))
    norm = next(m for m in encoder.module.modules() if isinstance(m, nn.BatchNorm2d))
    norm.register_forward_pre_hook(lambda module, _: module.train() and None)
    with pytest.raises(RuntimeError, match="changed while"):
        embed(encoder, store)


def calibrated(made, data, *, seed: int = 0) -> encoders.Encoder:
    encoder = encoders.untrained(encoders.load(str(made[0][0])), seed, "these images")
    store = Store(data)
    engine = engines.create("cpu", store, threads=2)[0]
    features.calibrate(encoder, store, np.arange(len(store)), engine)
    engine.close()
    return encoder


def test_an_untrained_network_knows_the_statistics_of_its_input(made, monkeypatch):
    """Torch's own update of batch-norm statistics on the same batches; no weight changes, and nothing else is left over."""
    monkeypatch.setattr(features, "CALIBRATION_BATCH", 64)
    found, store = calibrated(made, made[1][0]), Store(made[1][0])
    fresh = encoders.untrained(found, 0)
    order = np.random.default_rng(0).permutation(np.arange(len(store)))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (found.mean, found.std))
    pixels = torch.stack([torch.from_numpy(store.read(int(i)).copy()).permute(2, 0, 1) for i in order])
    update_bn([(x - mean) / std for x in pixels.tensor_split(4)], fresh.module)
    for (name, a), b in zip(found.module.state_dict().items(), fresh.module.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    assert not any(m.training for m in found.module.modules())
    assert {m.momentum for m in encoders.norms(found.module)} == {0.1}
    assert encoders.fingerprint(found.module) == encoders.fingerprint(calibrated(made, made[1][0]).module)
    assert encoders.fingerprint(found.module) != encoders.fingerprint(calibrated(made, made[1][1]).module)


def test_what_the_untrained_network_is_called(made):
    """Its identity is known before anything is measured; a network without batch-norm has no statistics to speak of."""
    resnet, vit = (encoders.untrained(encoders.load(str(run)), 3, "200 images") for run in made[0])
    assert resnet.source == "random weights (seed 3, all blocks on), batch-norm statistics of 200 images"
    assert vit.source == "random weights (seed 3)" and not encoders.norms(vit.module)
    assert resnet.source in resnet.checkpoint != encoders.untrained(resnet, 3, "201 images").checkpoint


def test_an_untrained_network_sees_the_whole_image():
    """As timm makes it, each block of a ResNet is switched off by a last scale of 0: only the corner is looked at."""
    fresh = partial(backbone.create, "resnet10-narrow", image_size=32, stem="standard")
    template = encoders.Encoder(fresh().eval(), fresh, "r", "resnet10-narrow", 32, (0, 0, 0), (1, 1, 1))
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[..., 20:, 20:] = 0.5
    with torch.no_grad():
        assert torch.equal(template.module(x), template.module(other))
        module = encoders.untrained(template, 0).module
        assert not torch.allclose(module(x), module(other), rtol=1e-3)


def test_fingerprint_sees_every_bit(made):
    encoder = encoders.load(str(made[0][0]))
    first = encoders.fingerprint(encoder.module)
    for tensor in list(encoder.module.parameters())[:1] + list(encoder.module.buffers())[:3]:
        kept = tensor.data.clone()
        tensor.data.view(-1)[0] += 1e-3 if tensor.is_floating_point() else 1
        assert encoders.fingerprint(encoder.module) != first
        tensor.data.copy_(kept)
    assert encoders.fingerprint(encoder.module) == first


def test_cache(made, store, tmp_path, capsys):
    """Used for the same manifest; refused, named and replaced for any other, and when its bytes changed."""
    encoder = encoders.load(str(made[0][0]))
    ids = np.arange(20)
    manifest = features.describe(encoder, store, ids)
    path = tmp_path / "cache" / "f.safetensors"
    calls = []

    def make():
        calls.append(1)
        return embed(encoder, store, ids=ids)

    first, old = features.cached(path, manifest, make)
    again, hit = features.cached(path, manifest, make)
    assert (old, hit, len(calls)) == (False, True, 1)
    assert torch.equal(first, again)
    for name in manifest:
        with pytest.raises(features.Stale, match=f"other {name}"):
            features.load(path, manifest | {name: "something else"})
    features.cached(path, manifest | {"weights": "other"}, make)
    assert "not used, it was made with other weights" in capsys.readouterr().out
    assert len(calls) == 2
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(features.Stale, match="hash"):
        features.load(path, manifest | {"weights": "other"})
    path.write_bytes(data[:100])
    with pytest.raises(features.Stale, match="damaged"):
        features.load(path, manifest)


def test_manifest_changes_with_everything_that_matters(made, store):
    encoder = encoders.load(str(made[0][0]))
    ids = np.arange(20)
    first = features.describe(encoder, store, ids)
    assert first == features.describe(encoders.load(str(made[0][0])), Store(made[1][0], "val"), ids)
    views = Views(True, policy("simclr", 3, 32), 0)
    changed = [
        features.describe(encoders.untrained(encoder, 5), store, ids),
        features.describe(replace(encoder, image_size=64), store, ids),
        features.describe(replace(encoder, mean=(1.0, 2.0, 3.0)), store, ids),
        features.describe(encoder, Store(made[1][0], "train"), ids),
        features.describe(encoder, Store(made[1][1], "val"), ids),
        features.describe(encoder, store, ids[::-1]),
        features.describe(encoder, store, ids, views),
        features.describe(encoder, store, ids, replace(views, seed=1)),
    ]
    assert len({json.dumps(m) for m in [first, *changed]}) == len(changed) + 1


def test_augmented_views_stay_grouped_by_image(made, store):
    encoder = encoders.load(str(made[0][0]))
    found = embed(encoder, store, ids=np.arange(6), views=Views(True, policy("simclr", 4, 32), 0), batch=4)
    assert found.shape == (6, 5, 128)
    torch.testing.assert_close(found[:, :1], embed(encoder, store, ids=np.arange(6)), rtol=1e-4, atol=1e-5)
    alone = embed(encoder, store, ids=np.array([3]), views=Views(True, policy("simclr", 4, 32), 0))
    torch.testing.assert_close(found[3:4], alone, rtol=1e-4, atol=1e-5)
    assert (found[:, 1] - found[:, 2]).abs().max() > 1e-3


def test_damaged_sample_is_an_error(made, tmp_path):
    """A score over the rest would not be the score."""
    data = patterns.make_shards(tmp_path / "images", tmp_path / "shards", per_class={"train": 8, "val": 4})
    shard = next(data.glob("val-*.tar"))
    content = bytearray(shard.read_bytes())
    content[1600] ^= 255
    shard.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        embed(encoders.load(str(made[0][0])), Store(data, "val"))


def _rank(rank: int, run: str, data: str, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", world_size=2, rank=rank)
    found = embed(encoders.load(run), Store(Path(data), "val"), batch=7)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_same_features(made, store, tmp_path):
    """Bit for bit and without padding, for a number of images that does not divide."""
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_rank, args=(r, str(made[0][0]), str(made[1][0]), str(tmp_path))) for r in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    alone = embed(encoders.load(str(made[0][0])), store, batch=7)
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), alone)


# ------------------------------------------------------------------------------------------------------ what is loaded


def test_run_file_and_untrained(made):
    run = made[0][0]
    by_run, by_file = encoders.load(str(run)), encoders.load(str(run / "backbone.safetensors"))
    assert (by_run.run, by_run.checkpoint) == (by_file.run, by_file.checkpoint)
    assert by_run.sha256 == by_file.sha256 != ""
    assert (by_run.run, by_run.backbone, by_run.pretrained_on, by_run.method) == (
        run.name,
        "resnet10-narrow",
        "patterns",
        "barlow",
    )
    fresh = encoders.untrained(by_run, 1)
    assert fresh.checkpoint == encoders.untrained(by_run, 1).checkpoint != by_run.checkpoint
    assert [v.shape for v in fresh.module.state_dict().values()] == [
        v.shape for v in by_run.module.state_dict().values()
    ]


def test_checkpoint_of_a_run_and_its_average(made, tmp_path):
    run = tmp_path / "run"
    patterns.make_run(run, made[1][0], "smoke-resnet")
    (run / "checkpoints").mkdir()
    student, teacher = (backbone.create("resnet10-narrow", image_size=32).state_dict() for _ in range(2))
    state = {
        "encoder": {f"backbone.{k}": v for k, v in student.items()} | {"projector.0.weight": torch.zeros(3)},
        "step": 40,
    }
    path = run / "checkpoints" / "step-000000040.pt"
    torch.save(state, path)
    found = encoders.load(str(path))
    assert (found.step, found.run) == ("40", "run")
    assert torch.equal(found.module.state_dict()["conv1.weight"], student["conv1.weight"])
    averaged = {f"module.backbone.{k}": v for k, v in teacher.items()} | {"n_averaged": torch.tensor(3)}
    torch.save(state | {"average": averaged}, path)
    assert torch.equal(encoders.load(str(path)).module.state_dict()["conv1.weight"], teacher["conv1.weight"])
    chosen = encoders.load(str(path), Asked(weights_key="encoder"))
    assert torch.equal(chosen.module.state_dict()["conv1.weight"], student["conv1.weight"])
    assert chosen.source.endswith("(encoder)")
    with pytest.raises(UserError, match="nearest: average"):
        encoders.load(str(path), Asked(weights_key="averag"))


def test_weights_of_another_network(made, tmp_path):
    tensors = load_file(made[0][0] / "backbone.safetensors")
    header = backbone.metadata(made[0][0])
    path = tmp_path / "other.safetensors"
    for change, words in (
        ({k: v for k, v in tensors.items() if k != "conv1.weight"}, "1 missing .first: conv1.weight"),
        (tensors | {"layer1.1.weight": torch.zeros(2)}, "1 unexpected .first: layer1.1.weight"),
        (tensors | {"conv1.weight": torch.zeros(16, 3, 7, 7)}, "1 of another shape .first: conv1.weight"),
        (load_file(made[0][1] / "backbone.safetensors"), "of 78 tensors match"),
    ):
        save_file(change, path, header)
        with pytest.raises(UserError, match=words):
            encoders.load(str(path))


def test_public_weights_from_a_file(tmp_path):
    """With a classifier, a wrapper's prefix, and several networks in one file."""
    full = timm.create_model("resnet10t", num_classes=7).state_dict()
    bare = {k: v for k, v in full.items() if not k.startswith("fc.")}
    path = tmp_path / "w.pth"
    for content, key in (
        (full, None),
        ({"state_dict": {f"module.{k}": v for k, v in full.items()}, "epoch": 3}, None),
        ({"student": bare, "teacher": {f"backbone.{k}": v for k, v in full.items()}}, "teacher"),
    ):
        torch.save(content, path)
        found = encoders.load("timm:resnet10t", Asked(weights=str(path), weights_key=key, image_size=64))
        assert all(torch.equal(v, full[k]) for k, v in found.module.state_dict().items())
        assert (found.image_size, found.weights, len(found.sha256)) == (64, "trained", 64)
    other = {f"backbone.{k}": v + 1 for k, v in full.items()}
    torch.save({"student": bare, "teacher": other}, path)
    with pytest.raises(UserError, match=r"several networks inside .student, teacher.; pick one"):
        encoders.load("timm:resnet10t", Asked(weights=str(path)))
    save_file(bare, tmp_path / "w.safetensors")
    found = encoders.load("timm:resnet10t", Asked(weights=str(tmp_path / "w.safetensors")))
    assert found.mean[0] == pytest.approx(0.485 * 255)
    fresh = encoders.untrained(found, 0)
    assert fresh.checkpoint != found.checkpoint
    torch.save(nn.Linear(2, 2), path)  # a whole pickled module: would run code
    with pytest.raises(UserError, match="not readable as weights"):
        encoders.load("timm:resnet10t", Asked(weights=str(path)))


def test_torchvision_weights_from_a_file(tmp_path):
    import torchvision

    full = torchvision.models.squeezenet1_1(num_classes=3).state_dict()
    torch.save(full, tmp_path / "w.pth")
    found = encoders.load("torchvision:squeezenet1_1", Asked(weights=str(tmp_path / "w.pth"), image_size=64))
    with torch.no_grad():
        assert found.module(torch.zeros(2, 3, 64, 64)).shape[0] == 2


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("runs/not-there", "unknown target 'runs/not-there'"),
        ("timm:resnet19", "nearest: .*resnet18"),
        ("torchvision:resnet19", "nearest: .*resnet18"),
    ],
)
def test_unknown_targets(target, words):
    with pytest.raises(UserError, match=words):
        encoders.load(target)


@pytest.mark.slow
def test_download_that_fails_is_one_line(tmp_path):
    """Offline, as far as the hub's client is concerned."""
    env = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "TORCH_HOME": str(tmp_path),
        "https_proxy": "http://127.0.0.1:9",
    }
    done = command("tools/evaluate.py", "timm:resnet10t.c3_in1k", "--data", tmp_path, env=env)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "give a local file: --weights PATH" in done.stderr


def test_cached_features_are_ten_times_as_fast(made, tmp_path):
    encoder = encoders.load(str(made[0][1]))
    store = Store(made[1][0])
    ids = np.tile(np.arange(len(store)), 3)
    manifest = features.describe(encoder, store, ids)
    seconds = []
    for _ in range(2):
        begun = time.process_time()
        features.cached(tmp_path / "f.safetensors", manifest, lambda: embed(encoder, store, ids=ids))
        seconds.append(time.process_time() - begun)
    assert seconds[1] < seconds[0] / 10
