"""Backbones: every kind there is, the small stem, and weights that timm and torchvision load without this project."""

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

from manyview.model import backbone
from manyview.pipeline.errors import UserError

NETWORKS = [
    ("resnet10-narrow", 28),
    ("resnet18", 32),
    ("resnet18:layers=[1,1,1,1],channels=[8,16,24,40],global_pool=catavgmax", 32),  # timm's keyword arguments
    ("resnet18", 96),
    ("torchvision:resnet18", 32),
    ("resnet10t", 32),  # deep stem: three 3x3 convolutions
    ("vit_tiny_patch16_224", 32),
    ("vit_tiny_patch16_224", 96),
    ("dla46_c", 32),
    ("mobilenetv3_small_050", 64),  # its features are wider than timm's num_features
]


def header(name: str, image_size: int, stem: str = "auto") -> dict[str, str]:
    return {"backbone": name, "stem": stem, "image_size": str(image_size)}


def trained(name: str, image_size: int) -> nn.Module:
    """A network whose BatchNorm statistics and weights are not the initial ones."""
    torch.manual_seed(0)
    model = backbone.create(name, image_size=image_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.train()(torch.randn(4, 3, image_size, image_size))
    return model.eval()


@pytest.mark.parametrize(("name", "size"), NETWORKS)
def test_weights_load_in_timm_by_the_printed_lines_and_here(name, size, tmp_path):
    model = trained(name, size)
    images = torch.randn(3, 3, size, size)
    features = model(images)
    assert features.shape == (3, model.num_features)
    file = tmp_path / "backbone.safetensors"
    backbone.save(model, file, {**header(name, size), "mean": "[1.0, 2.0, 3.0]"})
    names: dict = {}
    exec(backbone.timm_snippet(backbone.metadata(file), str(file)), names)
    assert torch.equal(names["model"].eval()(images), features)
    ours, metadata = backbone.load(tmp_path)  # by its run directory
    assert not ours.training and torch.equal(ours(images), features)
    assert metadata["mean"] == "[1.0, 2.0, 3.0]" and metadata["num_features"] == str(features.shape[1])


@pytest.mark.parametrize("name", ["resnet18", "resnet10-narrow", "torchvision:resnet18"])
def test_small_stem_keeps_the_resolution_the_relu_and_every_name(name):
    small, standard = (backbone.create(name, image_size=32, stem=stem) for stem in ("small", "standard"))
    assert small.conv1.kernel_size == (3, 3) and small.conv1.stride == (1, 1)
    assert list(small.state_dict()) == list(standard.state_dict())
    into_layer1 = {}
    small.layer1.register_forward_pre_hook(lambda _, inputs: into_layer1.update(x=inputs[0]))
    small(torch.randn(2, 3, 32, 32))
    assert into_layer1["x"].shape == (2, 64, 32, 32)
    assert (into_layer1["x"] >= 0).all() and (into_layer1["x"] == 0).any()


def test_names_load_in_torchvision_too(tmp_path):
    model = trained("resnet18", 96)  # timm's, standard stem
    backbone.save(model, tmp_path / "x.safetensors", header("resnet18", 96))
    other = torchvision.models.resnet18()
    missing = other.load_state_dict(load_file(tmp_path / "x.safetensors"), strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"] and not missing.unexpected_keys
    other.fc = nn.Identity()
    images = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(other.eval()(images), model(images), rtol=1e-5, atol=1e-6)


def test_auto_stem_is_small_up_to_64_px():
    assert backbone.create("resnet18", image_size=64).conv1.kernel_size == (3, 3)
    assert backbone.create("resnet18", image_size=65).conv1.kernel_size == (7, 7)
    assert [backbone.small_patch(size) for size in (28, 32, 48, 64)] == [4, 4, 6, 8]
    assert backbone.create("vit_tiny_patch16_224", image_size=32).patch_embed.num_patches == 64
    assert backbone.create("vit_tiny_patch16_224", image_size=96).patch_embed.num_patches == 36


def test_one_seed_gives_one_network():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(backbone.create("resnet10-narrow", image_size=32).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))


def test_every_torchvision_resnet_has_timms_names_and_every_tiny_one_is_timms():
    for name in backbone.names():
        if name.startswith("torchvision:"):
            with torch.device("meta"):
                ours = torchvision.models.get_model(name.removeprefix("torchvision:"))
                theirs = timm.create_model(name.removeprefix("torchvision:"))
            assert {k: v.shape for k, v in ours.state_dict().items()} == {
                k: v.shape for k, v in theirs.state_dict().items()
            }
    assert "torchvision:resnet50" in backbone.names() and "vit_small_patch16_224" in backbone.names()
    for name, (base, kwargs) in backbone.TINY.items():
        ours = backbone.create(name, image_size=224).state_dict()
        theirs = timm.create_model(base, num_classes=0, **kwargs).state_dict()
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_wrapped_modules_save_under_plain_names(tmp_path):
    model = backbone.create("resnet10-narrow", image_size=32)
    wrapped = torch.compile(nn.DataParallel(model))
    backbone.save(wrapped, tmp_path / "x.safetensors", header("resnet10-narrow", 32))
    assert load_file(tmp_path / "x.safetensors").keys() == model.state_dict().keys()
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(
    ("name", "size", "stem", "words"),
    [
        ("resnet19", 32, "auto", "unknown backbone 'resnet19'; nearest: resnet18"),
        ("torchvision:resnet19", 32, "auto", "torchvision:resnet18"),
        ("torchvision:vgg16", 32, "auto", "unknown backbone"),
        ("dla46_c", 28, "auto", "'dla46_c' does not take 28 px images"),
        ("resnet18", 32, "smal", "unknown stem 'smal'; nearest: small"),
        ("dla46_c", 32, "small", "no small stem"),
        ("convnext_atto", 16, "auto", "does not take 16 px"),
        ("hf-hub:someone/model", 32, "auto", "unknown backbone"),
        ("resnet19:layers=[1,1,1,1]", 32, "auto", "unknown backbone 'resnet19'; nearest: resnet18"),
        ("resnet18:layers", 32, "auto", "after the colon come arguments"),
        ("resnet18:layers=[1,1", 32, "auto", "after the colon come arguments"),
        ("resnet18:layer=[1,1,1,1]", 32, "auto", "unexpected keyword argument 'layer'"),
        ("resnet18:layers=[1,1]", 32, "auto", "does not take"),
        ("resnet18:checkpoint_path=/tmp/foreign.pt", 32, "auto", "checkpoint_path cannot be given"),
        ("resnet18:pretrained=true", 32, "auto", "pretrained cannot be given"),
    ],
)
def test_bad_names_are_named_with_their_neighbours(name, size, stem, words):
    with pytest.raises(UserError) as caught:
        backbone.create(name, image_size=size, stem=stem)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_bad_files_are_named(tmp_path):
    from safetensors.torch import save_file

    for path, words in ((tmp_path, "no weights at"), (tmp_path / "none.safetensors", "no weights at")):
        with pytest.raises(UserError, match=words):
            backbone.load(path)
    (tmp_path / "text.safetensors").write_text("no weights")
    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name, words in (("text", "not a safetensors file"), ("other", "names no backbone")):
        with pytest.raises(UserError, match=words):
            backbone.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="image_size, stem"):
        backbone.save(nn.Linear(1, 1), tmp_path / "x", {"backbone": "resnet18"})
