"""What `pip install` gives: one importable name, its data files and one command, next to a user's own model/ and train.py."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONVERSION = ("manyview.pipeline.convert", "manyview.bench", "manyview.study", "manyview.evaluation.report")


def python(*words: object, folder: Path, path: Path) -> subprocess.CompletedProcess:
    """This environment's packages, but `manyview` from `path`: -P and a .pth file would both find the checkout first."""
    env = {**os.environ, "PYTHONPATH": str(path), "PYTHONSAFEPATH": ""}
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=folder, env=env, capture_output=True, text=True, timeout=240
    )


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """The wheel, as pip unpacks it; built from a copy, since setuptools leaves a folder and takes along what an old one holds."""
    out = tmp_path_factory.mktemp("wheel")
    for name in tracked():
        (out / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, out / "source" / name, follow_symlinks=False)
    words = [
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--disable-pip-version-check",
        "-w",
        out,
        out / "source",
    ]
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "site")
    return out / "site"


def tracked() -> list[str]:
    """The project's files, those that are not committed yet among them."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in names if os.path.lexists(ROOT / name)]


@pytest.mark.slow
def test_a_wheel_holds_one_name_with_every_module_and_data_file(unpacked):
    assert sorted(path.name for path in unpacked.iterdir() if path.suffix != ".dist-info") == ["manyview"]
    folders = ("pipeline", "model", "training", "evaluation", "bench", "study", "tools", "presets")
    wanted = [name for name in tracked() if name.split("/")[0] in folders and not name.endswith(".md")] + ["train.py"]
    assert [name for name in wanted if not (unpacked / "manyview" / name).is_file()] == []
    assert not list(unpacked.rglob("*.pyc"))


@pytest.mark.slow
def test_an_installed_wheel_trains_beside_folders_of_the_same_names(unpacked, tmp_path):
    for name in ("model", "training", "pipeline", "evaluation", "tools", "study", "bench"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong one')\n")
    (tmp_path / "train.py").write_text("raise SystemExit('the wrong one')\n")
    words = ("-m", "manyview", "shards", "write", "--dataset", "digits", "--out", tmp_path / "digits")
    done = python(*words, folder=tmp_path, path=unpacked)
    assert done.returncode == 0, done.stderr
    words = ("-m", "manyview", "train", "--data", tmp_path / "digits", "--views", 2, "--backbone", "resnet10-narrow")
    done = python(
        *words, "--batch-size", 32, "--steps", 2, "--eval-every", -1, "--out", "run", folder=tmp_path, path=unpacked
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "backbone.safetensors").is_file()


def test_the_one_command_is_each_program_of_tools():
    done = subprocess.run([sys.executable, "-m", "manyview"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")}
    assert listed == {path.stem for path in (ROOT / "tools").glob("*.py")} - {"__init__"} | {"train"}
    wrong = subprocess.run([sys.executable, "-m", "manyview", "trian"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: unknown command 'trian'; nearest: train")


def test_training_loads_no_module_of_conversion_reports_or_benches():
    code = "import sys, manyview.train; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [name for name in done.stdout.split() if name.startswith(CONVERSION)] == []


def test_every_module_is_python_of_the_oldest_version():
    for name in tracked():
        if name.endswith(".py"):
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # what a later Python refuses, an older one warns of
                ast.parse((ROOT / name).read_text(), name, feature_version=(3, 10))
                compile((ROOT / name).read_text(), name, "exec")
