"""The folder for timm and the hub, opened by timm itself, and the card in it."""

import hashlib
import json
from pathlib import Path

import pytest
import timm
import torch
import yaml
from hub import serving
from pictures import pixels
from PIL import Image
from test_backbone import header, trained
from torchvision.transforms.v2.functional import resized_crop

from manyview.model import backbone, card
from manyview.model.export import export
from manyview.pipeline.errors import UserError

MEAN, STD = [120.0, 110.5, 100.25], [60.0, 61.5, 62.25]


def run_directory(folder: Path, name: str, size: int) -> torch.nn.Module:
    """As train.py leaves it, evaluated."""
    model = trained(name, size)
    about = header(name, size) | {"mean": json.dumps(MEAN), "std": json.dumps(STD)}
    file = folder / "backbone.safetensors"
    backbone.save(model, file, about)
    row = {"dataset": "flowers102", "protocol": "knn-cosine-exp k=20", "norm": "l2", "text": "cosine", "top1": 0.5, "low": 0.45,
           "high": 0.55, "untrained": 0.1}  # fmt: skip
    found = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "transform": "centre", "table": [row]}
    (folder / "eval.json").write_text(json.dumps(found))
    (folder / "config.json").write_text(
        json.dumps({"dataset": "photos", "objective": "barlow", "views": 8, "augment": []})
    )
    (folder / "env.json").write_text(json.dumps({"command": "/a/b/train.py --data photos", "commit": "abc", "device": "a CPU",
                                                 "versions": {"torch": "2"}}))  # fmt: skip
    steps = {"images": 640, "views": 5120, "seconds": 1800.0, "core_seconds": 3600.0}
    (folder / "metrics.jsonl").write_text(json.dumps(steps) + "\n" + json.dumps({"step": 3, "knn": 0.5}) + '\n{"st')
    return model


@pytest.mark.parametrize(("name", "size"), [("resnet18", 96), ("vit_tiny_patch16_224", 32), ("convnext_atto", 64),
                                            ("torchvision:resnet18", 96), ("resnet10-narrow", 80)])  # fmt: skip
def test_timm_needs_nothing_but_the_folder(tmp_path, name, size):
    model = run_directory(tmp_path, name, size)
    out, lines, difference = export(tmp_path, "hub")
    assert out == tmp_path / "export/hub" and difference is not None and difference <= 1e-5 and "local-dir:" in lines
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(theirs)
    assert tuple(data["input_size"]) == (3, size, size) and data["crop_pct"] == (1.0 if size <= 96 else 0.875)
    photo = pixels(4, 240, 160)
    with torch.no_grad():
        image = timm.data.create_transform(**data)(Image.fromarray(photo))[None]
        view = resized_crop(
            torch.from_numpy(photo.copy()).permute(2, 0, 1), 40, 0, 160, 160, [size, size], antialias=True
        )
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        mine = (view[None] - mean) / std
        assert (image - mine)[..., 3:-3, 3:-3].abs().max() < 0.05  # two grey levels; timm cuts after it resizes
        assert torch.allclose(theirs(image), model(image), atol=1e-5)


def test_a_network_that_timm_cannot_make_is_said_and_has_no_config(tmp_path):
    """A deep stem at stride 1 has tensors of the same names and shapes: timm would load it and compute something else."""
    for name in ("resnet18", "resnet10t"):
        (tmp_path / name).mkdir()
        run_directory(tmp_path / name, name, 32)
        out, lines, difference = export(tmp_path / name, "hub")
        assert difference is not None and difference <= 1e-5 and not (out / "config.json").exists()
        assert "model.maxpool" in lines and lines in (out / "README.md").read_text()
        with pytest.raises(FileNotFoundError):
            timm.create_model(f"local-dir:{out}", pretrained=True)


def test_the_card(tmp_path):
    run_directory(tmp_path, "resnet10-narrow", 80)
    text = (export(tmp_path, "hub")[0] / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "timm"
    assert "| flowers102 | knn-cosine-exp k=20 | l2 | 50.0 | 45.0 to 55.0 | 10.0 |" in body
    assert "pretrained without labels on photos" in body and "- views: 8" in body and "1.00 core-hours" in body
    assert "`python train.py --data photos`" in body and "/a/b" not in body
    (tmp_path / "eval.json").write_text(json.dumps({"sha256": "of others", "table": [{}]}))
    assert "of other ones, so it is not shown" in (export(tmp_path, "hub")[0] / "README.md").read_text()
    for name in ("eval.json", "config.json", "metrics.jsonl", "env.json"):
        (tmp_path / name).unlink()
    text = (export(tmp_path, "hub")[0] / "README.md").read_text()
    assert "not evaluated" in text and "no config.json lay beside" in text


def test_weights_without_statistics_are_refused(tmp_path):
    backbone.save(trained("resnet10-narrow", 80), tmp_path / "backbone.safetensors", header("resnet10-narrow", 80))
    with pytest.raises(UserError, match="do not say by which mean and std"):
        export(tmp_path, "hub")


@pytest.mark.parametrize(("name", "size"), [("resnet10-narrow", 80), ("resnet18", 32)])  # the second has no config.json
def test_what_is_pushed_is_what_strangers_get(tmp_path, monkeypatch, name, size):
    model = run_directory(tmp_path, name, size)
    out, _, _ = export(tmp_path, "hub")
    with serving(tmp_path / "hub", monkeypatch) as hub:
        assert card.push(out, "me/net") == f"{hub.url}/me/net"
        there = tmp_path / "hub/me/net"
        assert {path.name for path in there.iterdir()} == set(card.FILES) - ({"config.json"} if size == 32 else set())
        text = (there / "README.md").read_text()
        assert str(tmp_path) not in text and ("create_model('hf-hub:me/net', pretrained=True)" in text) == (size == 80)
        out.rename(tmp_path / "away")
        names: dict = {}
        exec(text.split("```python\n")[1].split("```")[0], names)
    theirs, images = names["model"], torch.randn(2, 3, size, size)
    assert not theirs.training and torch.allclose(theirs(images), model(images), atol=1e-5)
    assert timm.data.resolve_model_data_config(theirs)["mean"] == pytest.approx(
        [value / 255 for value in MEAN], abs=1e-4
    )
    (tmp_path / "away").rename(out)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    with pytest.raises(UserError, match=r"is written, but not pushed to me/net: .*; `hf auth login`, and try again"):
        card.push(out, "me/net")
