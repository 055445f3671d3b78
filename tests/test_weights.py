"""Weights that others wrote, in the layouts that their programs write, into a network of timm."""

import argparse
import collections
import datetime
import logging
import os
import pathlib
import pickle
import re
import signal
import types

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from manyview.model import backbone, weights
from manyview.pipeline.errors import UserError


def under(prefix: str, tensors: dict) -> dict:
    return {prefix + name: value for name, value in tensors.items()}


@pytest.fixture(scope="module")
def resnet() -> dict:
    torch.manual_seed(1)
    return timm.create_model("resnet10t", num_classes=0).state_dict()


@pytest.fixture(scope="module")
def vit() -> dict:
    torch.manual_seed(1)
    return timm.create_model("test_vit", num_classes=0, img_size=32).state_dict()


HEAD = {"0.weight": torch.zeros(8, 512)}


def layouts(net: dict) -> dict[str, tuple[object, str | None, str]]:
    """Program: (what its file holds, the network asked for by name, what is said to be left out)."""
    other, zero = {name: value + 1 for name, value in net.items()}, torch.zeros(2)
    args = argparse.Namespace(arch="resnet", lr=0.1)

    def beside(prefix: str, head: str) -> dict:
        return under(prefix, net) | under(head, HEAD)

    barlow = {"epoch": 1, "model": beside("module.backbone.", "module.projector.")}
    solo = {"state_dict": beside("backbone.", "classifier."), "hyper_parameters": {"path": pathlib.PurePosixPath("x")}}
    dino = {"student": beside("module.backbone.", "module.head."), "teacher": under("backbone.", other), "args": args}
    ibot = {
        "student": under("module.backbone.", other),
        "teacher": under("backbone.", net),
        "args": args,
        "scaler": None,
    }
    ibot["teacher"]["backbone.masked_embed"] = zero
    moco2 = (
        beside("module.encoder_q.", "module.encoder_q.fc.") | under("module.encoder_k.", other) | {"module.queue": zero}
    )
    moco3 = beside("module.base_encoder.", "module.predictor.") | under("module.momentum_encoder.", other)
    simsiam = beside("module.encoder.", "module.encoder.fc.") | under("module.predictor.", HEAD)
    mae = {"model": beside("", "decoder_blocks.0.") | {"mask_token": zero, "decoder_pos_embed": zero}, "args": args}
    mae |= {"scaler": {"scale": 2.0}, "best": np.float64(0.5)}
    lightly = beside("backbone.", "projection_head.") | under("backbone_momentum.", other)
    ours = {"encoder": under("backbone.", other) | under("projector.", HEAD), "step": 3, "random": {"torch": zero}}
    ours["average"] = under("module.backbone.", net) | {"n_averaged": torch.tensor(2)}
    ours["optimizer"] = {"state": {0: {"momentum_buffer": zero}}, "param_groups": [{"lr": 1.0}]}
    return {
        "Barlow Twins": (barlow, None, "projector"),
        "VICReg": ({"model": beside("module.backbone.", "module.projector."), "optimizer": {}}, None, "projector"),
        "solo-learn": (solo, None, "classifier"),
        "DINO": (dino, "student", "teacher"),
        "iBOT": (ibot, "teacher", "masked_embed"),
        "MoCo v2": ({"state_dict": moco2, "arch": "resnet"}, "encoder_q", "encoder_k"),
        "MoCo v3": ({"state_dict": moco3}, "base_encoder", "momentum_encoder"),
        "SimSiam": ({"state_dict": simsiam}, None, "fc"),
        "SwAV": (beside("module.", "module.projection_head.") | {"module.prototypes.weight": zero}, None, "prototypes"),
        "MAE": (mae, None, "decoder_blocks"),
        "lightly": ({"state_dict": lightly}, "backbone", "backbone_momentum"),
        "compiled": (under("_orig_mod.module.", net), None, ""),
        "train.py": (ours, None, "encoder"),
    }


@pytest.mark.parametrize("family", ["resnet", "vit"])
@pytest.mark.parametrize("program", layouts({}))
def test_layouts(program, family, request, tmp_path):
    """All of the network, nothing else, and what was left out by name; with FILE:KEY as with a key."""
    net = request.getfixturevalue(family)
    content, key, left = layouts(net)[program]
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    module = timm.create_model(*{"resnet": ("resnet10t",), "vit": ("test_vit",)}[family], num_classes=0,
                               **({"img_size": 32} if family == "vit" else {}))  # fmt: skip
    if key is not None:
        with pytest.raises(UserError, match=rf"several networks inside \(.*{key}.*\); pick one with --weights-key"):
            weights.fill(module, path)
    said = weights.fill(module, f"{path}:{key}" if key else path)
    assert all(torch.equal(value, net[name]) for name, value in module.state_dict().items())
    assert left in said.partition("left out: ")[2] and "resampled" not in said
    if key is not None:
        with pytest.raises(UserError, match=r"unknown network in .* 'nobody'"):
            weights.fill(module, path, "nobody")


def test_children_in_a_sequence(tmp_path):
    """lightly's ResNet is `Sequential(*list(resnet.children())[:-1])`; DINOv2 writes its blocks in chunks."""
    theirs = torchvision.models.resnet18()
    torch.save(
        {"state_dict": under("backbone.", torch.nn.Sequential(*list(theirs.children())[:-1]).state_dict())},
        tmp_path / "l.ckpt",
    )
    module = timm.create_model("resnet18", num_classes=0)
    weights.fill(module, tmp_path / "l.ckpt")
    x = torch.randn(2, 3, 64, 64)
    theirs.fc = torch.nn.Identity()
    torch.testing.assert_close(module.eval()(x), theirs.eval()(x))
    vit = timm.create_model("test_vit", num_classes=0, img_size=32)
    chunked = {re.sub(r"^blocks\.", "blocks.0.", name): value for name, value in vit.state_dict().items()}
    teacher = under("backbone.", chunked) | {"backbone.mask_token": torch.zeros(1), "dino_head.x": torch.zeros(1)}
    torch.save({"teacher": teacher}, tmp_path / "d.pth")
    other = timm.create_model("test_vit", num_classes=0, img_size=32)
    assert "mask_token" in weights.fill(other, tmp_path / "d.pth")
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), vit.state_dict().values()))


def test_names_of_efficientnet_pytorch(tmp_path):
    """As its packages on PyPI write them: tensors in timm's order, blocks numbered through, no expansion in the first."""
    net = timm.create_model("tf_efficientnet_lite0").state_dict()
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["_conv_stem.weight", *(f"_bn0.{n}" for n in norm)]
    for block in range(16):
        steps = ("expand_conv", "bn0", "depthwise_conv", "bn1", "project_conv", "bn2")[2 if block == 0 else 0 :]
        for step in steps:
            names += [f"_blocks.{block}._{step}.{n}" for n in (norm if step.startswith("bn") else ("weight",))]
    names += ["_conv_head.weight", *(f"_bn1.{n}" for n in norm), "_fc.weight", "_fc.bias"]
    assert len(names) == len(net)
    torch.save(dict(zip(names, net.values())), tmp_path / "lite0.pth")
    module = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    assert weights.fill(module, tmp_path / "lite0.pth").endswith("; left out: _fc")
    # The same tensors fit a network that pads otherwise, and is 20 points worse with them.
    with pytest.raises(UserError, match="the right network is timm:tf_NAME"):
        weights.fill(timm.create_model("efficientnet_lite0", num_classes=0), tmp_path / "lite0.pth")
    assert all(torch.equal(value, net[name]) for name, value in module.state_dict().items())


class Settings(dict):
    """As EasyDict, ConfigDict and CfgNode: settings that are also attributes."""

    __getattr__ = dict.__getitem__


class History(list):
    pass


def test_what_else_programs_put_beside_the_tensors(resnet, tmp_path):
    """Dicts and lists of classes of their own, a state_dict that is one, networks in a list, wrappers in the middle of names,
    half precision beside full, tensors as parameters."""
    args = Settings(lr=0.1, nested=Settings(a=[1, 2]), history=History([1.0]), counts=collections.defaultdict(list, x=[1]),
                    level=signal.Signals.SIGTERM, when=datetime.date(2024, 1, 1))  # fmt: skip
    wrapped = {name.replace("layer1.", "layer1._fsdp_wrapped_module."): value for name, value in resnet.items()}
    contents = {
        "settings": {"state_dict": resnet, "args": args},
        "own dict": {"model": Settings(under("backbone.", resnet)), "args": args},
        "ordered": collections.OrderedDict(resnet),
        "list": {"networks": [under("encoder.", resnet)]},
        "wrapped": {"model": wrapped, "step": 3},
        "parameters": {name: torch.nn.Parameter(v) if v.is_floating_point() else v for name, v in resnet.items()},
    }
    for legacy in (False, True):
        for name, content in contents.items():
            torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
            module = timm.create_model("resnet10t", num_classes=0)
            weights.fill(module, tmp_path / "w.pth")
            assert all(torch.equal(v, resnet[k]) for k, v in module.state_dict().items()), name
    half = {k: v.half() if v.is_floating_point() else v for k, v in resnet.items()}
    torch.save({"student": {k: v.float() for k, v in half.items()}, "teacher": half}, tmp_path / "w.pth")
    weights.fill(module, tmp_path / "w.pth")  # the same network twice
    assert module.conv1[0].weight.dtype == torch.float32 and torch.equal(
        module.conv1[0].weight, half["conv1.0.weight"].float()
    )


def test_of_several_networks_the_one_that_fits(resnet, tmp_path):
    """A deeper one, or one of other widths, beside it is no choice to be made; asked for by name it is refused for what it is."""
    deep = timm.create_model("resnet14t", num_classes=0).state_dict()
    wide = {k: torch.cat([v, v]) if v.ndim else v for k, v in resnet.items()}
    for name, other in (("deep", deep), ("wide", wide)):
        torch.save({"small": {"trunk": resnet}, name: {"trunk": other}}, tmp_path / "w.pth")
        module = timm.create_model("resnet10t", num_classes=0)
        assert f"left out: {name}" in weights.fill(module, tmp_path / "w.pth")
        assert torch.equal(module.conv1[0].weight, resnet["conv1.0.weight"])
        weights.fill(module, tmp_path / "w.pth", "small.trunk")
        with pytest.raises(UserError, match=f"weights of another network: .*under '{name}.trunk'"):
            weights.fill(module, tmp_path / "w.pth", name)


def test_a_program_is_no_weights(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with pytest.raises(UserError, match=r"script\.pt: not readable as weights \(a TorchScript archive"):
        weights.read(tmp_path / "script.pt")


def test_position_embeddings_are_resampled(vit, tmp_path):
    """As timm does it, and said; the class token's own stays."""
    torch.save({"model": vit}, tmp_path / "w.pth")
    module = timm.create_model("test_vit", num_classes=0, img_size=64)
    said = weights.fill(module, tmp_path / "w.pth")
    assert "position embeddings resampled from 2 x 2 to 4 x 4 patches" in said
    same = timm.create_model("test_vit", num_classes=0, img_size=32)
    same.load_state_dict(vit)
    same.set_input_size(img_size=64)
    assert torch.equal(module.pos_embed, same.pos_embed)
    assert torch.equal(module.pos_embed[:, 0], vit["pos_embed"][:, 0])


def test_other_networks_are_refused(resnet, tmp_path):
    """A deeper one holds every tensor of a shallower one: what is more of the same is no head."""
    deep = timm.create_model("resnet34", num_classes=0).state_dict()
    torch.save(under("module.", deep), tmp_path / "deep.pth")
    with pytest.raises(
        UserError,
        match=r"deep.pth: weights of another network: 120 of 120 tensors match under 'module'; \d+ unexpected",
    ):
        weights.fill(timm.create_model("resnet18", num_classes=0), tmp_path / "deep.pth")
    for change, words in (
        ({k: v for k, v in resnet.items() if k != "bn1.weight"}, r"1 missing \(first: bn1.weight\)"),
        (resnet | {"bn1.weight": torch.zeros(3)}, r"1 of another shape \(first: bn1.weight\)"),
        ({"queue": torch.zeros(2)}, r"0 of \d+ tensors match"),
    ):
        save_file(change, tmp_path / "w.safetensors")
        with pytest.raises(UserError, match=words) as caught:
            weights.fill(timm.create_model("resnet10t", num_classes=0), tmp_path / "w.safetensors")
        assert "\n" not in str(caught.value)
    old = {k: v for k, v in resnet.items() if not k.endswith("num_batches_tracked")}  # as before torch 0.4.1
    save_file(old, tmp_path / "old.safetensors")
    weights.fill(timm.create_model("resnet10t", num_classes=0), tmp_path / "old.safetensors")


class Trap:
    """Unpickled by anything that executes what it reads, it leaves something behind."""

    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call, ("trapped",)


def test_nothing_in_a_file_is_executed(resnet, tmp_path, monkeypatch):
    """A foreign class is replaced by an empty object, a foreign call is not made; what then cannot be built is refused."""
    monkeypatch.chdir(tmp_path)
    for legacy in (False, True):
        content = {"state_dict": resnet, "hook": Trap(logging.FileHandler), "args": argparse.Namespace(x=1)}
        torch.save(content, "trap.pth", _use_new_zipfile_serialization=not legacy)
        module = timm.create_model("resnet10t", num_classes=0)
        weights.fill(module, "trap.pth")
        assert torch.equal(module.conv1[0].weight, resnet["conv1.0.weight"])
    torch.save({"state_dict": resnet, "hook": Trap(os.mkdir)}, "system.pth")  # of a module that torch does not touch
    torch.save(torch.nn.Linear(2, 2), "module.pth")
    pathlib.Path("pickle.pth").write_bytes(
        pickle.dumps({"x": Trap(logging.FileHandler), "y": types.SimpleNamespace(a=1)})
    )
    pathlib.Path("text.pth").write_text("no weights")
    for name in ("system.pth", "module.pth", "pickle.pth", "text.pth", "none.pth"):
        with pytest.raises(UserError, match=f"^{name}: (not readable as weights|no such file)") as caught:
            weights.fill(module, name)
        assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    assert not pathlib.Path("trapped").exists()


def test_fill_of_a_backbone(resnet, tmp_path):
    """--init-from: ours under its own rules, others' by their tensors, with a hint where the stem is what differs."""
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "w.pth")
    photo = backbone.create("resnet18", image_size=48, stem="standard")
    assert "left out: fc" in backbone.fill(photo, "resnet18", tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"conv1.weight.*--stem standard"):
        backbone.fill(backbone.create("resnet18", image_size=48), "resnet18", tmp_path / "w.pth")
    with pytest.raises(UserError, match="unknown timm model 'resnet19'"):
        backbone.fill(photo, "resnet18", "timm:resnet19")


def test_published_weights_know_their_input():
    """timm's and torchvision's own settings; for a file that says nothing, what is assumed, and that it is."""
    tagged = weights.public("timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k").transform
    assert tagged.mean == (127.5,) * 3 and tagged.interpolation == "bicubic" and tagged.crop == 0.9
    for target, kind in (
        ("timm:vit_tiny_patch16_224", "bicubic"),
        ("timm:resnet18", "bilinear"),
        ("torchvision:resnet18", "bilinear"),
    ):
        t = weights.public(target, local=True).transform
        assert t.mean == pytest.approx((123.675, 116.28, 103.53)) and (t.crop, t.interpolation) == (0.875, kind)
        assert "assumed" in t.text
    assert (
        "timm:tf_efficientnet_lite0.in1k" in weights.public("timm:tf_efficientnet_lite0", local=True).transform.origin
    )
    lite = weights.public("timm:tf_efficientnet_lite0.in1k", local=True).transform
    assert lite.mean == lite.std == (127.5,) * 3 and lite.interpolation == "bicubic"
    small = weights.public("torchvision:efficientnet_b3")
    assert (small.transform.size, small.transform.interpolation) == (300, "bicubic")
    assert small.transform.crop == pytest.approx(300 / 320) and small.trained_on == "imagenet"
    assert weights.public("timm:resnet18").name == "timm:resnet18.a1_in1k"
    assert weights.public("timm:resnet18", 160).transform.size == 160
