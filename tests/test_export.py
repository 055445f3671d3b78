"""Exports, each loaded by the real library it is for."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_backbone import header, trained
from torch import nn

from manyview.model import backbone
from manyview.model.export import EXPORTS, export
from manyview.pipeline.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def run_directory(folder: Path, name: str, size: int) -> nn.Module:
    model = trained(name, size)
    backbone.save(
        model,
        folder / "backbone.safetensors",
        {**header(name, size), "mean": json.dumps([1.0, 2.0, 3.0]), "std": "[4, 5, 6]"},
    )
    return model


@pytest.mark.slow
def test_strangers_get_the_same_features(tmp_path):
    """The printed lines for all three libraries, in a process that knows nothing of this project."""
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
