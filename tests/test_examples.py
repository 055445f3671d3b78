"""The examples, run on digits as a reader would run them."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pictures import class_folders

import manyview
from manyview.pipeline.convert.write import write_shards
from manyview.pipeline.manifest import Options

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def example(monkeypatch, capsys, name: str, data: Path, *words: object) -> str:
    """What it prints."""
    monkeypatch.setattr(sys, "argv", [name, str(data), "--network", "test_resnet", *map(str, words)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def test_they_are_short():
    for path in EXAMPLES.glob("*.py"):
        if path.name != "measure.py":
            assert len(path.read_text().splitlines()) < 60, path


def test_torch_alone_and_then_under_torchrun(digits, monkeypatch, capsys):
    out = example(monkeypatch, capsys, "torch_loop", digits, "--views", 4, "--batch-size", 64)
    assert out.startswith("epoch 1: loss ") and out.endswith(" 22 batches of (4, 64, 3, 8, 8)\n")
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", EXAMPLES / "torch_loop.py", digits,
             "--network", "test_resnet", "--views", 4, "--batch-size", 32, "--epochs", 2]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *map(str, words)], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("epoch 2: loss ") and done.stdout.endswith(" 22 batches of (4, 32, 3, 8, 8)\n")
    assert torch.load("torch_loop.pt", weights_only=True)["data"]["step"] == 44


def test_lightning(digits, tmp_path, monkeypatch, capsys):
    import pytorch_lightning as L  # seconds, and only this test needs it

    assert "22 steps, loss " in example(monkeypatch, capsys, "lightning_loop", digits, "--views", 2)

    class Seen(L.Callback):
        def __init__(self):
            self.ids: list[list[int]] = []

        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            self.ids.append(batch.ids.tolist())

    def fit(steps: int, checkpoint: str | None = None) -> list[list[int]]:
        seen = Seen()
        module = runpy.run_path(str(EXAMPLES / "lightning_loop.py"))["BarlowTwins"]("test_resnet")
        trainer = L.Trainer(
            max_steps=steps, logger=False, enable_progress_bar=False, enable_checkpointing=False, callbacks=[seen]
        )
        trainer.fit(module, manyview.Views(digits, 2, 300), ckpt_path=checkpoint)
        trainer.save_checkpoint("middle.ckpt")
        return seen.ids

    straight = fit(8)  # two epochs of four
    assert fit(2) == straight[:2]
    assert fit(8, "middle.ckpt") == straight[2:]


def test_accelerate(digits, tmp_path, monkeypatch, capsys):
    assert (
        example(monkeypatch, capsys, "accelerate_loop", digits, "--views", 2, "--steps", 5)
        == "5 steps, saved in accelerate\n"
    )
    assert example(monkeypatch, capsys, "accelerate_loop", digits, "--views", 2, "--steps", 30).startswith("30 steps")
    data = manyview.Views(digits, 2, 64)
    data.load_state_dict(torch.load("accelerate/custom_checkpoint_0.pkl", weights_only=True))
    assert data.state_dict()["step"] == 30


def test_lightly(digits, monkeypatch, capsys):
    assert "epoch 1: loss " in example(monkeypatch, capsys, "lightly_loss", digits, "--views", 3, "--batch-size", 256)


def test_a_classifier_learns(digits, monkeypatch, capsys):
    out = example(monkeypatch, capsys, "timm_classifier", digits, "--epochs", 2)
    assert "of 359 test images right" in out
    assert float(out.splitlines()[-1].split(", ")[1].split("%")[0]) > 30  # one class in ten is 10


def test_the_notebook_from_photos_to_neighbours(tmp_path, monkeypatch, capsys):
    """Its code, cell by cell, in one namespace, with pictures drawn and thrown away."""
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "show", plt.close)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    class_folders(tmp_path / "photos", 14, 3)
    class_folders(tmp_path / "photos", 4, 3, seed=90, split="val")
    names: dict = {}
    for cell in json.loads((EXAMPLES / "photos.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None  # a notebook is committed clean
            exec("".join(cell["source"]), names)
            if "EPOCHS" in names:
                names |= {"SIZE": 32, "EPOCHS": 2}
    saved = torch.load("embeddings.pt", weights_only=True)
    assert saved["embeddings"].shape == (42, 512) and saved["names"][0].startswith("class")
    assert names["neighbours"][:, 0].tolist() == names["queries"].tolist()  # each photo is nearest to itself
    assert "knn-cosine-exp k=10 l2" in capsys.readouterr().out


def test_measuring(tmp_path, monkeypatch, capsys):
    photos = tmp_path / "shards"
    write_shards(Options("folder"), class_folders(tmp_path / "in", 12, 2), photos, quiet=True)
    words = [
        "--frameworks",
        "torch",
        "timm",
        "--networks",
        "none",
        "--images",
        "16",
        "--batch",
        "8",
        "--size",
        "32",
        "--rounds",
        "2",
        "--workers",
        "1",
    ]
    (tmp_path / "page.md").write_text("# An older one\n\n## By hand\n\nstays\n")
    monkeypatch.setattr(sys, "argv", ["measure.py", str(photos), *words, "--out", str(tmp_path / "page.md")])
    runpy.run_path(str(EXAMPLES / "measure.py"), run_name="__main__")
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("# The front door") and text.endswith("\n## By hand\n\nstays\n")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| t")]
    sources = ["torchvision", "manyview.Views", "timm", "manyview.Views"]
    assert [row[1].strip() for row in rows] == sources
    assert all(float(row[2].replace(",", "")) > 0 and float(row[3]) > 0 for row in rows)
    assert [row[4].strip() == "1" for row in rows] == [True, False, True, False]
