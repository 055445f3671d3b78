import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath

from manyview.evaluation import encoder as encoders
from manyview.evaluation import finetune, metrics
from manyview.evaluation.finetune import PRESETS, Preset
from manyview.pipeline import engines
from manyview.pipeline.store import Store
from tests import patterns


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return patterns.shared(tmp_path_factory)


@pytest.fixture(scope="module")
def resnet(made):
    return encoders.load(str(made[0][0]))


@pytest.fixture(scope="module")
def vit(made):
    return encoders.load(str(made[0][1]))


@pytest.fixture(scope="module")
def opened(made):
    stores = [Store(made[1][0], split) for split in ("train", "val")]
    both = [engines.create("cpu", s, threads=1)[0] for s in stores]
    yield stores, both
    for engine in both:
        engine.close()


def test_presets_are_the_published_ones():
    assert PRESETS["byol2"] == Preset(0.1, 0.1, 30, 0, 256)
    assert PRESETS["full"] == Preset(0.1, 0.1, 100, 5, 256)
    assert PRESETS["barlowtwins"] == Preset(0.005, 0.5, 20)  # the backbone slow, the head fast
    assert (PRESETS["swav-1%"], PRESETS["swav-10%"]) == (Preset(0.02, 5.0, 20), Preset(0.01, 0.2, 20))


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "vit_base_patch16_siglip_224"])
def test_layer_decay_of_a_vit_b16(name):
    """The published scales: embeddings 0.65^13, block b 0.65^(12 - b), final norm 0.65, head 1; an attention pool that lies
    between them and the head is timm's to place."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    classifier = finetune.Classifier(model.to_empty(device="cpu"), 768, 10, bn=True, seed=0)
    rates = {id(p): g["lr"] / 0.05 for g in finetune.groups(classifier, PRESETS["byol2"], 128) for p in g["params"]}
    scale = {n: rates[id(p)] for n, p in classifier.named_parameters()}
    assert scale["backbone.pos_embed"] == pytest.approx(0.00370, abs=1e-5)
    assert scale["backbone.patch_embed.proj.weight"] == pytest.approx(0.65**13)
    assert scale["backbone.blocks.0.attn.qkv.weight"] == pytest.approx(0.00569, abs=1e-5)
    assert scale["backbone.blocks.11.mlp.fc2.bias"] == scale["backbone.norm.weight"] == pytest.approx(0.65)
    assert scale["head.weight"] == scale["norm.weight"] == 1


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_each_parameter_is_in_one_group(kind, resnet, vit):
    encoder = {"resnet": resnet, "vit": vit}[kind]
    model = finetune.classifier(encoder, 5, bn=True, seed=0)
    grouped = finetune.groups(model, PRESETS["swav-1%"], 256)
    found = [id(p) for g in grouped for p in g["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    rates = {id(p): g["lr"] for g in grouped for p in g["params"]}
    assert rates[id(model.head.weight)] == 5.0
    if kind == "resnet":
        assert {rates[id(p)] for p in model.backbone.parameters()} == {0.02}


def test_drop_path_is_really_there(vit, resnet):
    model = finetune.classifier(vit, 5, bn=False, seed=0)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert len(rates) == 2 * len(model.backbone.blocks)
    assert (rates[0], rates[-1]) == (0, 0.2)
    model.train()
    x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(model(x), model(x))
    model.eval()
    torch.testing.assert_close(model.backbone(x), vit.module(x))  # and it is gone in evaluation mode
    assert not any(isinstance(m, DropPath) for m in vit.module.modules())
    assert not any(isinstance(m, DropPath) for m in finetune.classifier(resnet, 5, bn=False, seed=0).modules())


def test_nothing_moves_before_the_first_step(resnet):
    """Building the classifier asks for the width of the features; that must not reach BatchNorm's statistics."""
    model = finetune.classifier(resnet, 5, bn=True, seed=0)
    for name, value in resnet.module.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], value), name
    assert model.norm.num_batches_tracked == 0
    again = finetune.classifier(resnet, 5, bn=True, seed=0)
    assert torch.equal(model.head.weight, again.head.weight)  # the head is under the seed
    assert model.head.weight.std().item() == pytest.approx(0.01, rel=0.15)


@pytest.mark.slow
def test_few_labels_are_learnt_from_and_the_encoder_stays(resnet, opened):
    (train, val), (engine, val_engine) = opened
    with encoders.frozen(resnet.module):
        model = finetune.train(resnet, train, np.arange(len(train)), 5, engine, Preset(0.1, 0.1, 8, batch=32), seed=0)
    scores = finetune.predict(model, resnet, val, np.arange(len(val)), val_engine, batch=17)
    assert metrics.score(scores, torch.from_numpy(np.array(val.labels))).top1 > 0.5
    again = finetune.train(resnet, train, np.arange(len(train)), 5, engine, Preset(0.1, 0.1, 8, batch=32), seed=0)
    assert torch.equal(model.head.weight, again.head.weight)


def test_one_sample_left_over_does_not_break_batchnorm(resnet, opened):
    (train, _), (engine, _) = opened
    model = finetune.train(resnet, train, np.arange(33), 5, engine, Preset(0.1, 0.1, 1, batch=32), bn=True)
    assert all(p.isfinite().all() for p in model.parameters())
