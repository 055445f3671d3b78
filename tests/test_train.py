"""train.py as its users run it: the run directory, resume after SIGKILL, several processes, and what bad input gets."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, program
from PIL import Image
from safetensors.torch import load_file
from torchvision import datasets

import train as main_program
from manyview.evaluation import online
from manyview.model.backbone import metadata
from manyview.pipeline import sheet, views
from manyview.pipeline.convert.write import write_shards
from manyview.pipeline.errors import UserError
from manyview.pipeline.manifest import Options
from manyview.pipeline.store import Store
from manyview.training import checkpoint, config, estimate, plots, preemption, run
from manyview.training.preemption import Stop


def train(data: Path, out: Path, *words: object) -> int:
    return conftest.train("--data", data, "--out", out, *SMALL.split(), *words)


def start(data: Path, out: Path, *words: object) -> subprocess.Popen[str]:
    """The same as a process that can be killed; its output is a pipe."""
    line = [sys.executable, "train.py", "--data", data, "--out", out, *SMALL.split(), *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*map(str, line)], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=env)


def refused(data: Path, out: Path, *words: object) -> list[str]:
    """The lines of a refusal."""
    with pytest.raises(UserError) as caught:
        train(data, out, *words)
    return str(caught.value).splitlines()


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in metrics(out) if "loss" in row]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "backbone.safetensors")


def assert_equal_runs(a: Path, b: Path) -> None:
    assert losses(a) == losses(b)
    for name, tensor in weights(a).items():
        assert torch.equal(tensor, weights(b)[name]), name


# As `trained_run` in conftest.py.
FIFTY = ["--steps", 50, "--save-every", 10, "--fraction", 0.25, "--eval-every", 25]


def test_run_directory(trained_run):
    names = ["config.json", "env.json", "metrics.jsonl", "log.txt", "backbone.safetensors"]
    names += [f"plots/{name}.png" for name in ("views", "loss", "accuracy", "spectrum", "collapse", "throughput")]
    for name in names:
        assert (trained_run / name).stat().st_size > 0, name
    assert [step for step, _ in losses(trained_run)] == list(range(1, 51))
    row = next(row for row in metrics(trained_run) if row["step"] == 50 and "loss" in row)
    assert row["images"] == 800 and row["views"] == 1600 and row["skipped"] == 0
    assert [row["step"] for row in metrics(trained_run) if "knn" in row] == [25, 50]
    assert checkpoint.steps_in(trained_run / "checkpoints") == [40, 50]
    saved = json.loads((trained_run / "config.json").read_text())
    assert saved["steps"] == 50 and saved["size"] == 8 and saved["lr"] > 0
    environment = json.loads((trained_run / "env.json").read_text())
    assert environment["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    resolved = [saved[key] for key in ("form", "beta", "standardize", "engine", "device", "precision", "stem")]
    assert resolved == ["mean", 20 / 16, "view", "cpu", "cpu", "float32", "small"]


def test_printed_lines_load_the_weights_and_the_transform_in_timm(trained_run):
    """They name nothing of this project; digits are grey: mean and std the same thrice."""
    text = (trained_run / "log.txt").read_text()
    code, names = text[text.index("import timm") :], {}
    assert "manyview" not in code.replace(str(trained_run), "")
    exec(code, names)
    mean = json.loads(metadata(trained_run)["mean"])[0] / 255
    assert f"Normalize(mean=tensor([{mean:.4f}" in str(names["transform"].transforms[-1])
    assert names["model"].eval()(torch.zeros(1, 3, 8, 8)).shape == (1, 128)


def test_same_seed_same_losses_other_seed_others(digits, trained_run, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    assert train(digits, again, *FIFTY, "--threads", 3, "--eval-every", -1) == 0
    assert_equal_runs(trained_run, again)
    assert train(digits, other, *FIFTY, "--steps", 1, "--seed", 1) == 0
    assert losses(other)[0] != losses(trained_run)[0]


@pytest.mark.slow
def test_sigkill_then_resume_equals_an_undisturbed_run(digits, trained_run, tmp_path, capsys):
    out = tmp_path / "killed"
    kill_at = random.SystemRandom().randrange(11, 45)
    process = start(digits, out, *FIFTY)
    assert process.stdout
    for text in process.stdout:
        if text.startswith("step ") and int(text.split()[1].split("/")[0].rstrip(":")) >= kill_at:
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 46, "lo')  # the half line that a kill can leave
    assert train(digits, out, *FIFTY, "--resume") == 0
    assert "resumed at step" in capsys.readouterr().out
    assert_equal_runs(trained_run, out)


def test_ctrl_c_and_sigterm_save_and_exit_75_and_go_on(digits, trained_run, tmp_path, monkeypatch, capsys):
    out, logged = tmp_path / "stopped", run.Run.log
    for sign in (signal.SIGINT, signal.SIGTERM):
        with monkeypatch.context() as patch:
            patch.setattr(run.Run, "log", lambda *a, **k: (logged(*a, **k), signal.raise_signal(sign)))  # noqa: B023
            assert train(digits, out, *FIFTY, "--save-every", 1000, "--resume") == 75
        assert "Go on with --resume" in capsys.readouterr().out
        assert not (out / "backbone.safetensors").exists()
    assert checkpoint.steps_in(out / "checkpoints") == [1, 2]
    assert train(digits, out, *FIFTY, "--resume") == 0
    assert_equal_runs(trained_run, out)


def test_every_signal_that_asks_to_stop_is_heard():
    """A closed terminal's and a scheduler's too; what was ignored, as nohup has it, stays so, and all is put back."""
    for sign in preemption.SIGNALS:
        before = signal.getsignal(sign)
        with Stop(torch.device("cpu")) as stop:
            assert not stop()
            signal.raise_signal(sign)
            assert stop()
        assert signal.getsignal(sign) is before
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop(torch.device("cpu")) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_interrupts_at_once():
    with Stop(torch.device("cpu")) as stop:
        stop.listen_to_ctrl_c()
        signal.raise_signal(signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_resume_refuses_another_experiment_by_name(digits, trained_run):
    lines = refused(digits, trained_run, "--steps", 50, "--fraction", 0.5, "--seed", 3, "--policy", "byol", "--resume")
    assert {"fraction", "seed", "global.saturation", "global.solarize"} <= {line.split()[1] for line in lines}
    assert not any(line.split()[1] in ("steps", "augment", "global.flip") for line in lines)
    (line,) = refused(digits, trained_run, *FIFTY)
    assert "in use" in line and "--resume" in line


def test_resume_compares_what_is_learned_not_how_it_was_spelled(digits, trained_run, tmp_path, capsys):
    """Every word of `same` says what the finished run has anyway; every one of `other` something else."""
    rule = json.loads((trained_run / "config.json").read_text())["lr"]
    same = ["--beta", "20/D", "--form", "mean", "--standardize", "view", "--epochs", 7, "--stem", "small", "--lr", rule,
            "--projector-hidden", 16, "--augment", "hue=0.1", "blur=[0,0]"]  # fmt: skip
    out = tmp_path / "copy"
    shutil.copytree(trained_run, out)
    assert train(digits, out, *FIFTY, "--resume", *same) == 0
    assert "resumed at step 50" in capsys.readouterr().out
    for words, key in (
        (["--beta", "4/D"], "beta"),
        (["--augment", "hue=0.2"], "global.hue"),
        (["--lr", 2 * rule], "lr"),
        (["--projector-hidden", 8], "projector_hidden"),
        (["--form", "cross", "--beta", "20/D"], "form"),
    ):
        (line,) = refused(digits, out, *FIFTY, "--resume", *words)
        assert line.split()[1] == key


def test_a_finished_run_is_trained_further_as_its_refusal_says(digits, trained_run, tmp_path, capsys):
    *_, line = refused(digits, trained_run, *FIFTY, "--steps", 60, "--resume")
    words = line[line.index("--init-from") :].replace("ANOTHER", str(tmp_path / "further")).split()
    assert train(digits, tmp_path / "unused", *FIFTY, "--steps", 1, *words) == 0
    assert f"backbone and projector from {trained_run}" in capsys.readouterr().out
    fresh = tmp_path / "fresh"
    assert train(digits, fresh, *FIFTY, "--steps", 1) == 0
    assert losses(tmp_path / "further")[0][1] < 0.8 * losses(fresh)[0][1]


def test_a_run_goes_on_when_the_weights_it_started_from_are_gone(digits, trained_run, tmp_path):
    file, out = tmp_path / "start.safetensors", tmp_path / "run"
    shutil.copy(trained_run / "backbone.safetensors", file)
    words = ["--steps", 3, "--init-from", file]
    assert train(digits, out, *words) == 0
    file.unlink()
    checkpoint.path_of(out / "checkpoints", 3).rename(checkpoint.path_of(out / "checkpoints", 2))
    assert train(digits, out, *words, "--resume") == 0
    with pytest.raises(UserError):
        train(digits, tmp_path / "other", *words)


def test_resume_refuses_an_augmentation_file_that_was_edited(digits, tmp_path):
    file, out = tmp_path / "policy.yaml", tmp_path / "run"
    file.write_text("hue: 0\n")
    assert train(digits, out, "--steps", 2, "--augment", file, "solarize=0") == 0
    assert json.loads((out / "config.json").read_text())["augment"] == ["hue=0", "solarize=0"]
    file.write_text("hue: 0.4\n")
    (line,) = refused(digits, out, "--steps", 2, "--augment", file, "solarize=0", "--resume")
    assert line.startswith("--resume: global.hue was 0") and line.endswith("now 0.4")


def test_a_damaged_checkpoint_is_named(digits, trained_run, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(trained_run, out)
    checkpoint.path_of(out / "checkpoints", 50).write_bytes(b"")
    (line,) = refused(digits, out, *FIFTY, "--resume")
    assert "step-000000050.pt" in line and "remove it" in line


def test_weights_of_another_network_are_refused(digits, trained_run, tmp_path):
    file = trained_run / "backbone.safetensors"
    (line,) = refused(digits, tmp_path / "x", "--backbone", "resnet18", "--init-from", file)
    assert "holds a resnet10-narrow, not a resnet18" in line
    (line,) = refused(digits, tmp_path / "x", "--stem", "standard", "--init-from", file)
    assert "does not fit: it was trained at 8 px with stem small" in line
    saved = checkpoint.path_of(trained_run / "checkpoints", 50)
    (line,) = refused(digits, tmp_path / "x", "--backbone", "resnet18", "--init-from", saved)
    assert "another network than --backbone resnet18" in line
    assert not (tmp_path / "x").exists()


def test_full_disk_keeps_training_and_the_old_checkpoint(digits, tmp_path, capsys):
    """A file-size limit below a checkpoint's size makes the write fail as a full disk does."""
    out, limits = tmp_path / "full", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000 * 1024, limits[1]))
    try:
        assert train(digits, out, "--steps", 4, "--save-every", 2, "--projector-dim", 1024) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().out.count("not written") == 2
    assert not list((out / "checkpoints").iterdir())
    assert weights(out)


def test_non_finite_losses_stop_the_run_with_advice(digits, tmp_path, capsys):
    out = tmp_path / "nan"
    words = ["--steps", 60, "--lr", 1e30, "--warmup", 0, "--optimizer", "sgd", "--save-every", 1, "--eval-every", 5]
    (line,) = refused(digits, out, *words)
    assert "non-finite losses or gradients in a row" in line and "--lr" in line
    assert "features are not finite: nothing to probe" in capsys.readouterr().out
    rows = [json.loads(row, parse_constant=pytest.fail) for row in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["skipped"] >= 10 and rows[-1]["loss"] is None  # JSON has no NaN
    saved = checkpoint.load(checkpoint.path_of(out / "checkpoints", checkpoint.steps_in(out / "checkpoints")[-1]))
    assert saved["step"] < rows[-1]["step"] - 9  # none of the streak
    assert all(t.isfinite().all() for t in saved["encoder"].values())


def test_a_run_that_ends_in_a_streak_says_so(digits, tmp_path, capsys):
    assert train(digits, tmp_path / "run", "--steps", 6, "--lr", 1e30) == 0
    assert "steps were skipped" in capsys.readouterr().out


def test_a_damaged_image_costs_the_probe_and_the_loop_that_image(digits, tmp_path, capsys):
    data = tmp_path / "damaged"
    shutil.copytree(digits, data)
    store = Store(data)
    shard = next(data.glob("train-*.tar"))
    at = shard.read_bytes().index(bytes(store.read(7)))
    with open(shard, "r+b") as file:
        file.seek(at)
        file.write(b"\xff" * 20)
    assert train(data, tmp_path / "run", "--steps", 3, "--eval-every", 3, "--batch-size", 64) == 0
    rows = metrics(tmp_path / "run")
    assert ", 1 unreadable left out" in capsys.readouterr().out and "knn" in rows[-1]
    assert {row["bad"] for row in rows if "loss" in row} <= {0, 1}


def test_identical_images_end_the_run_as_any_other(tmp_path, capsys):
    """A placeholder for every photo: the features are one point, of which there is no spectrum to draw."""
    (tmp_path / "in" / "a").mkdir(parents=True)
    for i in range(40):
        Image.new("RGB", (16, 12), (90, 60, 30)).save(tmp_path / "in" / "a" / f"{i}.png")
    write_shards(Options("folder"), tmp_path / "in", tmp_path / "same", jobs=1, quiet=True)
    out = tmp_path / "run"
    assert train(tmp_path / "same", out, "--steps", 2, "--eval-every", 1, "--policy", "none") == 0
    said = capsys.readouterr().out
    assert "warning: channel red (deviation 0 of 255), green" in said
    assert said.count("features are the same for all images (collapsed)") == 2
    assert weights(out) and checkpoint.steps_in(out / "checkpoints") == [2]


def test_no_picture_and_no_probe_ends_a_run(digits, tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise IndexError("no such pixel")

    for place, name in ((plots, "draw"), (sheet, "contact_sheet"), (online.Probe, "__call__")):
        monkeypatch.setattr(place, name, broken)
    assert train(digits, tmp_path / "run", "--steps", 2, "--eval-every", 2) == 0
    said = capsys.readouterr().out
    assert said.count("left out (IndexError: no such pixel)") == 3 and weights(tmp_path / "run")


def test_unlabelled_images_are_trained_on_and_the_labelled_ones_probe(tmp_path, monkeypatch, capsys):
    """As of STL-10: nobody trains on its 5,000 labelled images while 100,000 others lie beside them."""
    generator, root = np.random.default_rng(0), tmp_path / "source" / datasets.STL10.base_folder
    root.mkdir(parents=True)
    for part, n in {"train": 60, "test": 20, "unlabeled": 90}.items():
        generator.integers(0, 256, (n, 3, 96, 96), np.uint8).tofile(root / f"{part}_X.bin")
        if part != "unlabeled":
            (np.arange(n, dtype=np.uint8) % 10 + 1).tofile(root / f"{part}_y.bin")
    (root / "class_names.txt").write_text("\n".join(f"name{i}" for i in range(10)))
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    write_shards(Options("stl10"), tmp_path / "source", tmp_path / "stl10", jobs=1, quiet=True)
    out = tmp_path / "run"
    assert train(tmp_path / "stl10", out, "--steps", 2, "--eval-every", 2) == 0
    said = capsys.readouterr().out
    assert (
        "stl10 unlabelled: 90 of 90 images" in said
        and "48 training images as bank, 12 as queries, majority class" in said
    )
    assert "knn" in metrics(out)[-1]


@pytest.mark.parametrize(
    "words",
    [
        ["--policy", "multicrop", "--views", "4", "--objective", "vicreg", "--optimizer", "lars", "--size", "16"],
        ["--bn", "view", "--view-chunk", "1", "--ema", "0.9", "--optimizer", "sgd", "--order", "blocks"],
        [
            "--policy",
            "multicrop",
            "--views",
            "4",
            "--backbone",
            "test_vit",
            "--size",
            "32",
        ],  # local: 14 px, patches of 4
    ],
)
def test_the_other_roads_train(digits, tmp_path, words):
    out = tmp_path / "run"
    assert train(digits, out, "--steps", 3, *words, "--eval-every", 3) == 0
    rows = metrics(out)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3] and "knn" in rows[-1]
    assert train(digits, out, "--steps", 3, *words, "--eval-every", 3, "--resume") == 0


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--policy", "multicrop", "--views", "4", "--backbone", "test_convnext", "--size", "64"], "--augment local.size=32"),
        (["--policy", "multicrop", "--views", "4", "--backbone", "test_vit", "--size", "32", "--augment", "local.size=13"],
         "views of 13 px"),
        (["--log", "wandb"], "pip install wandb"),
        (["--out", "FILE/run"], "is not a folder"),
        (["--out", "OTHER"], "choose another --out"),
        (["--init-from", "FILE"], "FILE"),
        (["--batch-size", "2000"], "more than the 1438 images"),
    ],
)  # fmt: skip
def test_what_can_fail_fails_before_anything_is_written(digits, tmp_path, monkeypatch, words, wrong, said):
    (tmp_path / "FILE").write_text("a file")
    (tmp_path / "OTHER").mkdir()
    (tmp_path / "OTHER" / "thesis.tex").write_text("not a run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    (line,) = refused(digits, tmp_path / "run", "--steps", 2, *wrong, *words)
    assert said in line
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["FILE", "OTHER", "thesis.tex"]


def test_advice_after_a_start_that_failed_works(digits, tmp_path, monkeypatch):
    """A tracker that is there but does not start, and then what its user is told: --resume, or --overwrite."""
    broken = type(sys)("wandb")
    broken.init = lambda **_: (_ for _ in ()).throw(ConnectionError("no login"))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", broken)
    out = tmp_path / "run"
    (line,) = refused(digits, out, "--steps", 1, "--log", "wandb")
    assert line == "--log wandb does not start: no login"
    (line,) = refused(digits, out, "--steps", 1)
    assert "--resume" in line and "--overwrite" in line
    assert train(digits, out, "--steps", 1, "--overwrite") == 0
    assert train(digits, out, "--steps", 1, "--resume") == 0


def test_dry_run_prints_the_plan_and_writes_nothing(digits, tmp_path, capsys):
    out = tmp_path / "never"
    assert train(digits, out, "--dry-run") == 0
    said = capsys.readouterr().out.splitlines()
    for word in ("data", "engine", "model", "projector", "objective", "optimizer", "steps", "estimate"):
        assert any(line.startswith(word) for line in said), word
    assert not out.exists()


def test_bad_input_is_one_line_each_all_at_once(tmp_path):
    done = program("train.py", "--veiws", 8, "--backbone", "resnet19", "--engine", "daly", "--data", tmp_path / "none")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 4 or len(errors) == 5, errors  # the stray 8 may be named beside its flag
    text = "\n".join(errors)
    for wanted in ("--views", "resnet18", "dali", "make shards"):
        assert wanted in text
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "rows", "wanted"),
    [
        (["--views", "4", "--batch-size", "256"], 512, "512 rows fit: --batch-size 128, or --bn view --view-chunk 2"),
        (["--views", "4", "--batch-size", "256"], 9999, "512 rows fit: --batch-size 128, or --bn view --view-chunk 2"),
        (["--views", "8", "--batch-size", "512", "--bn", "view", "--view-chunk", "1"], 999, "256 rows fit: --batch-size 256"),
        (["--views", "8", "--batch-size", "512"], 100, "100 rows fit: --batch-size 12"),
        (["--views", "8", "--batch-size", "512"], 5, "not even two images fit by the fp32 estimate (5 rows)"),
    ],
)  # fmt: skip
def test_out_of_memory_advice_is_less_than_what_failed(digits, words, rows, wanted):
    cfg = config.parse(["--data", str(digits), *words])
    found = estimate.what_fits(cfg, views.policy("cifar", cfg.views, 32, {}), 32, 1, rows)
    assert wanted in found and found.count("--batch-size") <= 1
    assert ("--view-chunk" in found) == ("--view-chunk" in wanted)


def test_more_memory_than_there_is_is_refused_before_anything_is_written(digits, tmp_path):
    """Where the system would end the run: also by --dry-run, with what fits."""
    words = ["--size", 512, "--views", 4, "--batch-size", 1400]
    for more in (["--dry-run"], []):
        (line,) = refused(digits, tmp_path / "x", *words, *more)
        assert "out of memory with 4 views x 1400 images x 512 px" in line and re.search(r"--batch-size \d", line)
    assert not (tmp_path / "x").exists()


def test_out_of_memory_on_the_cpu_is_advice(digits, monkeypatch):
    def train(*_):
        torch.empty(2**50)

    monkeypatch.setattr(main_program, "train", train)
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--data", str(digits), "--backbone", "resnet10-narrow", "--views", "2"]
    )
    with pytest.raises(
        config.UserError, match=r"out of memory with 2 views x 256 images x 8 px .* fit: --batch-size 128"
    ):
        main_program.main()
    monkeypatch.setattr(main_program, "train", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        main_program.main()


def test_collapse_is_said_once_and_only_where_it_can_be_known(tmp_path):
    def said(rank: float, spread: float, rows: int, dim: int) -> int:
        log = object.__new__(run.Run)
        lines: list[str] = []
        log.alarmed, log.steps, log.dim, log.say = False, 100, dim, lines.append
        log.watch_collapse(5, rank, spread, rows)
        assert not lines  # too early
        log.watch_collapse(50, rank, spread, rows)
        log.watch_collapse(60, rank, spread, rows)
        return len(lines)

    assert said(rank=3.0, spread=1.0, rows=256, dim=256) == 1
    assert said(rank=1.1, spread=1.0, rows=256, dim=8) == 1
    assert said(rank=50.0, spread=0.0, rows=256, dim=256) == 1
    assert said(rank=50.0, spread=1.0, rows=256, dim=256) == 0
    assert said(rank=2.9, spread=1.0, rows=4, dim=256) == 0  # four rows have no more
