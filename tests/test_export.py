"""Exports, each loaded by the real library it is for."""

import gc
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from pictures import jpeg
from PIL import Image
from test_backbone import header, trained
from torch import nn

from manyview.model import backbone
from manyview.model.export import EXPORTS, export
from manyview.pipeline import views
from manyview.pipeline.convert.write import write_shards
from manyview.pipeline.engines.cpu import CPUEngine
from manyview.pipeline.errors import UserError
from manyview.pipeline.loader import normalize
from manyview.pipeline.manifest import Options
from manyview.pipeline.store import Store

ROOT = Path(__file__).resolve().parents[1]


def run_directory(folder: Path, name: str, size: int) -> nn.Module:
    model = trained(name, size)
    backbone.save(
        model,
        folder / "backbone.safetensors",
        {**header(name, size), "mean": json.dumps([100.0, 128.0, 90.0]), "std": "[40, 50, 60]"},
    )
    return model


@pytest.mark.slow
def test_strangers_get_the_same_features(tmp_path):
    """The printed lines for all three libraries, in a process that knows nothing of this project."""
    gc.collect()  # CPython 3.11's ast.parse, which the exporter calls, fails where it meets a finalizer: numba's of other tests
    model = run_directory(tmp_path, "resnet18", 32)
    images = torch.randn(5, 3, 32, 32)  # another batch size than the exporter's
    torch.save(images, tmp_path / "images.pt")
    script = "import torch\nimages = torch.load('images.pt').numpy()\nresult = {}\n"
    for to in EXPORTS:
        file, snippet, difference = export(tmp_path, to)
        assert file.parent == tmp_path / "export" and difference is not None and difference <= 1e-5
        use = "" if to == "onnx" else "\nfeatures = model.eval()(torch.from_numpy(images)).detach().numpy()"
        script += f"{snippet}{use}\nresult[{to!r}] = torch.from_numpy(features)\n"
    (tmp_path / "other.py").write_text(script + "torch.save(result, 'result.pt')\n")
    subprocess.run([sys.executable, "-P", "other.py"], check=True, cwd=tmp_path)
    result = torch.load(tmp_path / "result.pt")
    with torch.no_grad():
        ours = model(images)
    assert set(result) == {"timm", "hub", "torchvision", "onnx"}
    for theirs in result.values():
        assert (theirs - ours).abs().max() <= 1e-5 * ours.abs().max()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> tuple[list[Path], Store]:
    root = tmp_path_factory.mktemp("photos")
    (root / "in" / "a").mkdir(parents=True)
    for i in range(8):  # square: of others we cut before we resize, and they after, up to half a pixel elsewhere
        (root / "in" / "a" / f"{i}.jpg").write_bytes(jpeg(i, 120 + 8 * i, 120 + 8 * i))
    write_shards(Options("folder"), root / "in", root / "shards", jobs=1, quiet=True)
    return sorted((root / "in").rglob("*.jpg")), Store(root / "shards")


@pytest.mark.parametrize(("name", "size"), [("resnet18", 32), ("resnet18", 112), ("vit_tiny_patch16_224", 64)])
def test_the_lines_show_the_network_what_it_saw(photos, name, size, tmp_path):
    """Their transform on the photos' files gives the features that evaluation gets from our views; ImageNet's mean and std,
    which timm would take else, or another crop, does not."""
    files, store = photos
    model = run_directory(tmp_path, name, size)
    ids = np.arange(len(store))
    engine = CPUEngine(store)
    view = engine(ids, views.clean(size, store.heights, store.widths, views.crop_ratio(size)))[0][0]
    engine.close()
    with torch.no_grad():
        ours = model(normalize(view, (100.0, 128.0, 90.0), (40.0, 50.0, 60.0), torch.float32))
    order = [[str(f.relative_to(files[0].parents[1])) for f in files].index(store.key(i) + ".jpg") for i in ids]
    for to in ["timm"] + ["torchvision"] * (name == "resnet18"):
        made: dict = {}
        exec(export(tmp_path, to)[1], made)
        images = torch.stack([made["transform"](Image.open(files[i])) for i in order])
        unsaid = (view / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / 0.225  # what timm would take
        with torch.no_grad():
            theirs, others = made["model"].eval()(images), model(unsaid)
        assert (theirs - ours).norm() < 0.2 * (ours - ours.mean(0)).norm()
        assert (theirs - ours).norm() < 0.2 * (others - ours).norm()


def test_the_files_say_by_themselves_what_the_network_saw(tmp_path):
    run_directory(tmp_path, "resnet10-narrow", 28)
    wanted = {"input_size": [3, 28, 28], "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center",
              "mean": [0.392157, 0.501961, 0.352941], "std": [0.156863, 0.196078, 0.235294]}  # fmt: skip
    file, _, _ = export(tmp_path, "onnx")
    session = onnxruntime.InferenceSession(file)
    assert json.loads(session.get_modelmeta().custom_metadata_map["pretrained_cfg"]) == wanted
    file, _, _ = export(tmp_path, "timm")
    assert json.loads(backbone.metadata(file)["pretrained_cfg"]) == wanted


def test_checkpoints_of_a_run(trained_run, tmp_path):
    """By the same loader as evaluation and --init-from: the step's own weights, here, moved elsewhere, and as older versions
    wrote them."""
    checkpoint = sorted((trained_run / "checkpoints").glob("*.pt"))[0]
    state = torch.load(checkpoint, weights_only=True)
    assert state["step"] < 50
    (tmp_path / "moved.pt").write_bytes(checkpoint.read_bytes())
    old = tmp_path / "old" / "checkpoints"
    old.mkdir(parents=True)
    torch.save({k: v for k, v in state.items() if k != "header"}, old / checkpoint.name)
    (old.parent / "config.json").write_text((trained_run / "config.json").read_text())
    for i, path in enumerate((checkpoint, tmp_path / "moved.pt", old / checkpoint.name)):
        file, snippet, difference = export(path, "timm", tmp_path / f"{i}.safetensors")
        assert difference == 0 and "mean" in snippet
        model, header = backbone.load(file)
        assert torch.equal(model.conv1.weight, state["encoder"]["backbone.conv1.weight"])
        assert (header["step"], header["source"]) == (str(state["step"]), trained_run.name if i < 2 else "old")
    assert export(old / checkpoint.name, "timm")[0] == old.parent / "export" / checkpoint.stem / "timm.safetensors"
    card = export(checkpoint, "hub", tmp_path / "hub")[0] / "README.md"
    assert "These weights were not evaluated" in card.read_text() and "--steps 50" in card.read_text()
    with pytest.raises(UserError, match=r"unknown network in .*'teacher'; nearest: encoder"):
        export(f"{checkpoint}:teacher", "timm", tmp_path / "x.safetensors")
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"not a checkpoint of train\.py"):
        export(tmp_path / "other.pt", "timm")


def test_weights_of_others(tmp_path):
    """A public network with a file's weights; the lines show it what it was trained on, its own bicubic crop."""
    module = timm.create_model("test_vit", num_classes=7)
    torch.save({"teacher": {f"backbone.{k}": v for k, v in module.state_dict().items()}}, tmp_path / "w.pth")
    file, snippet, difference = export("timm:test_vit", "timm", tmp_path / "x.safetensors", f"{tmp_path}/w.pth:teacher")
    assert difference == 0 and "'interpolation': 'bicubic', 'crop_pct': 0.875" in snippet
    loaded, header = backbone.load(file)
    size = int(header["image_size"])
    x = torch.randn(2, 3, size, size)
    module.reset_classifier(0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), module.eval()(x))
    for source, to, given, words in (
        (tmp_path / "x.safetensors", "timm", "w.pth", "--weights goes with a source timm:NAME"),
        ("timm:test_vit", "hub", str(tmp_path / "w.pth"), "--to hub is for what was trained here"),
        ("timm:test_vot", "timm", None, "unknown timm model 'test_vot'"),
    ):
        with pytest.raises(UserError, match=words):
            export(source, to, None, given)


@pytest.mark.parametrize("to", ["timm", "torchvision"])
def test_torchvision_weights_go_both_ways(to, tmp_path):
    run_directory(tmp_path, "torchvision:resnet18", 96)
    assert export(tmp_path, to)[2] <= 1e-5


@pytest.mark.slow
def test_vit_exports_to_onnx(tmp_path):
    run_directory(tmp_path, "vit_tiny_patch16_224", 32)
    assert export(tmp_path, "onnx")[2] <= 1e-5


def test_a_network_that_the_other_side_lacks_is_refused(tmp_path):
    run_directory(tmp_path, "resnet10-narrow", 28)
    with pytest.raises(UserError, match=r"torchvision has no 'resnet10-narrow'.*--to timm"):
        export(tmp_path, "torchvision")
    with pytest.raises(UserError, match="unknown target 'jax'; valid: timm, hub, torchvision, onnx"):
        export(tmp_path, "jax")


def test_different_features_are_an_error(tmp_path, monkeypatch):
    """The comparison is real: lines that leave the small stem out load nothing or something else."""
    run_directory(tmp_path, "resnet10t", 32)
    monkeypatch.setattr(backbone, "stem_lines", lambda header: [])
    with pytest.raises(UserError, match="features in timm differ"):
        export(tmp_path, "timm")


def test_command(tmp_path, monkeypatch, capsys):
    run_directory(tmp_path, "resnet10-narrow", 28)

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["export.py", *arguments])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / "tools/export.py"), run_name="__main__")
        return caught.value.code, *capsys.readouterr()

    code, out, _ = command(str(tmp_path), "--to", "timm", "--out", str(tmp_path / "x.safetensors"))
    assert code == 0 and (tmp_path / "x.safetensors").is_file()
    assert "timm.create_model('resnet18'" in out and "differ from ours by 0e+00" in out
    code, out, err = command(str(tmp_path / "backbone.safetensors"), "--to", "torchvision")
    assert code == 2 and not out and err.startswith("error: torchvision has no") and err.count("\n") == 1
    assert command(str(tmp_path), "--to", "jax")[0] == 2
