"""train.py as its users run it: the run directory, resume after SIGKILL, several processes, and what bad input gets."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command
from safetensors.torch import load_file

from training import checkpoint, config

SMALL = [
    "--backbone",
    "resnet10-narrow",
    "--batch-size",
    "16",
    "--views",
    "2",
    "--projector-dim",
    "16",
    "--eval-every",
    "-1",
]
SMALL += ["--size", "8", "--engine", "cpu", "--log-every", "1"]


def train(data: Path, out: Path, *words: object, **kwargs) -> subprocess.CompletedProcess[str]:
    return command("train.py", "--data", data, "--out", out, *SMALL, *words, **kwargs)


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in metrics(out)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "backbone.safetensors")


def assert_equal_runs(a: Path, b: Path) -> None:
    assert losses(a) == losses(b)
    for name, tensor in weights(a).items():
        assert torch.equal(tensor, weights(b)[name]), name


@pytest.fixture(scope="session")
def undisturbed(digits, tmp_path_factory) -> Path:
    """50 steps, which straddle no epoch of the 1437 digits, with a checkpoint every 10."""
    out = tmp_path_factory.mktemp("run") / "a"
    done = train(digits, out, "--steps", 50, "--save-every", 10, "--fraction", 0.25)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_run_directory(undisturbed):
    for name in (
        "config.json",
        "env.json",
        "metrics.jsonl",
        "log.txt",
        "backbone.safetensors",
        "plots/views.png",
        "plots/loss.png",
    ):
        assert (undisturbed / name).stat().st_size > 0, name
    assert [step for step, _ in losses(undisturbed)] == list(range(1, 51))
    row = metrics(undisturbed)[-1]
    assert row["images"] == 800 and row["views"] == 1600 and row["skipped"] == 0
    assert checkpoint.steps_in(undisturbed / "checkpoints") == [40, 50]
    saved = json.loads((undisturbed / "config.json").read_text())
    assert saved["steps"] == 50 and saved["size"] == 8 and saved["lr"] > 0
    environment = json.loads((undisturbed / "env.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__.split("+")[0] or environment["versions"]["torch"]


@pytest.mark.slow
def test_printed_lines_load_the_weights_in_timm(undisturbed):
    text = (undisturbed / "log.txt").read_text()
    snippet = text[text.index("import timm") :].splitlines()
    snippet = snippet[: next(i for i, line in enumerate(snippet) if "load_state_dict" in line) + 1]
    code = "\n".join([*snippet, "print(model.eval()(torch.zeros(1, 3, 8, 8)).shape)"])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "torch.Size([1, 128])" in done.stdout, done.stderr


@pytest.mark.slow
def test_same_seed_same_fifty_losses_other_seed_others(digits, undisturbed, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    assert train(digits, again, "--steps", 50, "--save-every", 50, "--fraction", 0.25, "--threads", 3).returncode == 0
    assert_equal_runs(undisturbed, again)
    assert train(digits, other, "--steps", 50, "--fraction", 0.25, "--seed", 1).returncode == 0
    assert losses(other)[0] != losses(undisturbed)[0]


@pytest.mark.slow
def test_sigkill_then_resume_equals_an_undisturbed_run(digits, undisturbed, tmp_path):
    out = tmp_path / "killed"
    words = ["--data", digits, "--out", out, *SMALL, "--steps", 50, "--save-every", 10, "--fraction", 0.25, "--resume"]
    line = [sys.executable, "train.py", *map(str, words)]
    kill_at = random.SystemRandom().randrange(11, 45)
    process = subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.stdout
    for text in process.stdout:
        if text.startswith("step ") and int(text.split()[1].split("/")[0]) >= kill_at:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    assert process.returncode == -signal.SIGKILL
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 46, "lo')  # the half line that a kill can leave
    done = command(*line[1:])
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stdout
    assert_equal_runs(undisturbed, out)


@pytest.mark.slow
def test_sigterm_saves_and_exits_75_and_goes_on(digits, undisturbed, tmp_path):
    out = tmp_path / "stopped"
    words = [
        "--data",
        digits,
        "--out",
        out,
        *SMALL,
        "--steps",
        50,
        "--save-every",
        1000,
        "--fraction",
        0.25,
        "--resume",
    ]
    line = [sys.executable, "train.py", *map(str, words)]
    process = subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.stdout
    for text in process.stdout:
        if text.startswith("step "):
            process.terminate()
            break
    rest = process.stdout.read()
    assert process.wait() == 75
    assert "Go on with --resume" in rest
    assert not (out / "backbone.safetensors").exists()
    assert command(*line[1:]).returncode == 0
    assert_equal_runs(undisturbed, out)


@pytest.mark.slow
def test_resume_refuses_another_experiment_by_name(digits, undisturbed, tmp_path):
    done = train(digits, undisturbed, "--steps", 50, "--fraction", 0.5, "--seed", 3, "--policy", "byol", "--resume")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert [line.split()[2] for line in lines if line.startswith("error: --resume:")] == ["policy", "fraction", "seed"]
    assert "Traceback" not in done.stderr
    done = train(digits, undisturbed, "--steps", 50)
    assert done.returncode == 2 and "in use" in done.stderr and "--resume" in done.stderr


@pytest.mark.slow
def test_full_disk_keeps_training_and_the_old_checkpoint(digits, undisturbed, tmp_path):
    """A file-size limit below a checkpoint's size makes the write fail as a full disk does."""
    out = tmp_path / "full"
    words = [
        "train.py",
        "--data",
        digits,
        "--out",
        out,
        *SMALL,
        "--steps",
        4,
        "--save-every",
        2,
        "--projector-dim",
        1024,
    ]
    shell = f"ulimit -f 9000; exec {sys.executable} " + " ".join(map(str, words))
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("not written") == 2
    assert checkpoint.steps_in(out / "checkpoints") == []
    assert not list((out / "checkpoints").iterdir())
    assert weights(out)


@pytest.mark.slow
def test_two_processes_equal_one(digits, undisturbed, tmp_path):
    """torchrun, gloo, the same global batch: the same losses to 1e-5."""
    out = tmp_path / "two"
    words = ["--data", digits, "--out", out, *SMALL, "--steps", 10, "--fraction", 0.25, "--warmup", 0.25]
    single = tmp_path / "one"
    assert train(digits, single, "--steps", 10, "--fraction", 0.25, "--warmup", 0.25).returncode == 0
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *words]
    done = command(*run)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [s for s, _ in losses(out)] == list(range(1, 11))
    for (_, a), (_, b) in zip(losses(single), losses(out)):
        assert abs(a - b) < 1e-5 * abs(a)


@pytest.mark.slow
def test_non_finite_losses_stop_the_run_with_advice(digits, tmp_path):
    out = tmp_path / "nan"
    done = train(digits, out, "--steps", 60, "--lr", 1e30, "--warmup", 0, "--optimizer", "sgd", "--save-every", 1)
    assert done.returncode == 2
    assert "non-finite losses in a row" in done.stderr and "--lr" in done.stderr
    assert metrics(out)[-1]["skipped"] >= 10
    assert checkpoint.steps_in(out / "checkpoints")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--policy", "multicrop", "--views", "4", "--objective", "vicreg", "--optimizer", "lars"],
        ["--bn", "view", "--view-chunk", "1", "--ema", "0.9", "--optimizer", "sgd", "--order", "blocks"],
    ],
)
def test_the_other_roads_train(digits, tmp_path, words):
    done = train(digits, tmp_path / "run", "--steps", 3, *words, "--eval-every", 3)
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "run")) >= 3 if "knn" not in metrics(tmp_path / "run")[-1] else True
    assert "knn" in metrics(tmp_path / "run")[-1]


@pytest.mark.slow
def test_dry_run_prints_the_plan_and_writes_nothing(digits, tmp_path):
    out = tmp_path / "never"
    done = train(digits, out, "--dry-run")
    assert done.returncode == 0, done.stderr
    for word in ("data", "engine", "model", "projector", "objective", "optimizer", "steps", "estimate"):
        assert any(line.startswith(word) for line in done.stdout.splitlines()), word
    assert not out.exists()


@pytest.mark.slow
def test_bad_input_is_one_line_each_all_at_once(tmp_path):
    done = command("train.py", "--veiws", 8, "--backbone", "resnet19", "--engine", "daly", "--data", tmp_path / "none")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 4 or len(errors) == 5, errors  # the stray 8 may be named beside its flag
    text = "\n".join(errors)
    for wanted in ("--views", "resnet18", "dali", "make shards"):
        assert wanted in text
    assert "Traceback" not in done.stderr


FLAGS = [
    "data",
    "views",
    "policy",
    "augment",
    "size",
    "fraction",
    "batch_size",
    "epochs",
    "steps",
    "backbone",
    "stem",
    "projector_dim",
    "projector_hidden",
    "objective",
    "form",
    "beta",
    "standardize",
    "bn",
    "optimizer",
    "lr",
    "final_lr",
    "warmup",
    "weight_decay",
    "ema",
    "order",
    "seed",
    "engine",
    "device",
    "precision",
    "compile",
    "threads",
    "prefetch",
    "view_chunk",
    "out",
    "preset",
    "resume",
    "overwrite",
    "init_from",
    "dry_run",
    "log",
    "log_every",
    "save_every",
    "keep_every",
    "eval_every",
    "max_bad",
]


def test_flags_are_frozen():
    """A new flag is a decision: it costs every user a line of --help. At most 45."""
    assert list(vars(config.Config())) == FLAGS
    assert len(FLAGS) <= 45


@pytest.mark.parametrize("preset", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda p: p.stem)
def test_presets_parse_and_say_what_to_expect(preset, digits):
    header = [line for line in preset.read_text().splitlines() if line.startswith("#")]
    assert "Expected" in "".join(header) and "Hardware" in "".join(header)
    chosen = config.parse(["--preset", str(preset), "--data", str(digits), "--seed", "5"])
    assert chosen.seed == 5 and chosen.data == digits


def test_flags_win_over_the_preset(digits, tmp_path):
    preset = tmp_path / "p.yaml"
    preset.write_text("views: 8\nlr: 0.5\n")
    chosen = config.parse(["--preset", str(preset), "--data", str(digits), "--views", "3"])
    assert (chosen.views, chosen.lr) == (3, 0.5)
    preset.write_text("veiws: 8\n")
    with pytest.raises(config.UserError, match="nearest: views"):
        config.parse(["--preset", str(preset), "--data", str(digits)])


@pytest.mark.parametrize(("text", "value"), [("0.01", 0.01), ("5/D", 5 / 64), ("auto", "auto")])
def test_beta_may_be_a_number_divided_by_the_dimensions(text, value):
    assert config.objective_options(config.Config(beta=text, projector_dim=64))["beta"] == value


@pytest.mark.parametrize("text", ["five/D", "5/E", "-1/D", "nan"])
def test_a_beta_that_is_no_strength_is_refused(digits, text):
    assert any("beta" in line for line in config.check(config.Config(data=digits, beta=text)))
