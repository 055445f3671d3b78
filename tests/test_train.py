"""train.py as its users run it: the run directory, resume after SIGKILL, several processes, and what bad input gets."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command
from safetensors.torch import load_file
from torchvision import datasets

import train as main_program
from manyview.pipeline import views
from manyview.pipeline.convert.write import write_shards
from manyview.pipeline.manifest import Options
from manyview.pipeline.store import Store
from manyview.training import checkpoint, config, estimate, run

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


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines of a refusal, which is nothing else."""
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error:")]


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
    assert environment["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    resolved = [saved[key] for key in ("form", "beta", "standardize", "engine", "device", "precision", "stem")]
    assert resolved == ["mean", 3 / 16, "view", "cpu", "cpu", "float32", "small"]


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
def test_resume_refuses_an_augmentation_file_that_was_edited(digits, tmp_path):
    file, out = tmp_path / "policy.yaml", tmp_path / "run"
    file.write_text("hue: 0\n")
    assert train(digits, out, "--steps", 2, "--augment", file, "solarize=0").returncode == 0
    assert json.loads((out / "config.json").read_text())["augment"] == ["hue=0", "solarize=0"]
    file.write_text("hue: 0.4\n")
    (line,) = errors(train(digits, out, "--steps", 2, "--augment", file, "solarize=0", "--resume"))
    assert line.split()[2] == "augment"


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named(digits, undisturbed, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(undisturbed, out)
    checkpoint.path_of(out / "checkpoints", 50).write_bytes(b"")
    (line,) = errors(train(digits, out, "--steps", 50, "--fraction", 0.25, "--resume"))
    assert "step-000000050.pt" in line and "remove it" in line


@pytest.mark.slow
def test_weights_of_another_network_are_refused(digits, undisturbed, tmp_path):
    file = undisturbed / "backbone.safetensors"
    (line,) = errors(train(digits, tmp_path / "x", "--backbone", "resnet18", "--init-from", file))
    assert "holds a resnet10-narrow, not a resnet18" in line
    (line,) = errors(train(digits, tmp_path / "x", "--stem", "standard", "--init-from", file))
    assert "does not fit: it was trained at 8 px with stem small" in line
    assert train(digits, tmp_path / "x", "--steps", 1, "--init-from", file).returncode == 0


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
    words = ["--steps", 60, "--lr", 1e30, "--warmup", 0, "--optimizer", "sgd", "--save-every", 1, "--eval-every", 5]
    done = train(digits, out, *words)
    (line,) = errors(done)
    assert "non-finite losses or gradients in a row" in line and "--lr" in line
    assert "features are not finite: nothing to probe" in done.stdout
    assert metrics(out)[-1]["skipped"] >= 10
    saved = checkpoint.load(checkpoint.path_of(out / "checkpoints", checkpoint.steps_in(out / "checkpoints")[-1]))
    assert saved["step"] < metrics(out)[-1]["step"] - 9  # none of the streak
    assert all(t.isfinite().all() for t in saved["encoder"].values())


def test_a_run_that_ends_in_a_streak_says_so(digits, tmp_path):
    done = train(digits, tmp_path / "run", "--steps", 6, "--lr", 1e30)
    assert done.returncode == 0 and "steps were skipped" in done.stdout, done.stderr


@pytest.mark.slow
def test_a_damaged_image_costs_the_probe_and_the_loop_that_image(digits, tmp_path):
    data = tmp_path / "damaged"
    shutil.copytree(digits, data)
    store = Store(data)
    shard = next(data.glob("train-*.tar"))
    start = shard.read_bytes().index(bytes(store.read(7)))
    with open(shard, "r+b") as file:
        file.seek(start)
        file.write(b"\xff" * 20)
    done = train(data, tmp_path / "run", "--steps", 3, "--eval-every", 3, "--batch-size", 64)
    assert done.returncode == 0, done.stderr
    rows = metrics(tmp_path / "run")
    assert ", 1 unreadable left out)" in done.stdout and "knn" in rows[-1]
    assert {row["bad"] for row in rows if "loss" in row} <= {0, 1}


@pytest.mark.slow
def test_unlabelled_images_are_trained_on_and_the_labelled_ones_probe(tmp_path, monkeypatch):
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
    done = train(tmp_path / "stl10", out, "--steps", 3, "--eval-every", 3, "--batch-size", 16, "--size", 32)
    assert done.returncode == 0, done.stderr
    assert (
        "stl10 unlabelled: 90 of 90 images" in done.stdout
        and "48 training images as bank, 12 as queries" in done.stdout
    )
    assert "knn" in metrics(out)[-1]


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
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3] and "knn" in rows[-1]


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


@pytest.mark.parametrize(
    "line",
    [
        "steps: abc",
        "steps: 4.7",
        "steps:",
        "steps: [1]",
        "compile: 'false'",
        "views: true",
        "lr: {a: 1}",
        "- views",
        "a: b: c",
    ],
)
def test_a_preset_that_says_nonsense_is_one_line(digits, tmp_path, line):
    preset = tmp_path / "p.yaml"
    preset.write_text(line + "\n")
    with pytest.raises(config.UserError) as found:
        config.parse(["--preset", str(preset), "--data", str(digits)])
    assert str(found.value).startswith(str(preset)) and len(str(found.value).splitlines()) == 1


def test_lists_in_presets_and_flags(digits, tmp_path):
    preset = tmp_path / "p.yaml"
    preset.write_text("augment: blur=0 hue=0.1\nlr: 1\ncompile: true\n")
    words = ["--preset", str(preset), "--data", str(digits), "--log", "tensorboard,wandb"]
    chosen = config.parse(words)
    assert chosen.augment == ("blur=0", "hue=0.1") and chosen.lr == 1.0 and chosen.compile is True
    assert chosen.log == ("tensorboard", "wandb")


@pytest.mark.parametrize(
    "words",
    [
        ["--steps", "-5"], ["--lr", "nan"], ["--lr", "-1"], ["--final-lr", "-1"], ["--warmup", "5"], ["--warmup", "nan"],
        ["--weight-decay", "nan"], ["--ema", "1"], ["--ema", "-1"], ["--max-bad", "nan"], ["--keep-every", "-1"],
        ["--view-chunk", "-2", "--bn", "view"], ["--projector-hidden", "-3"], ["--threads", "-3"], ["--epochs", "0"],
        ["--epochs", "inf"], ["--fraction", "0"], ["--seed", "100000000000000000000000"], ["--views", "1"],
        ["--backbone", "resnet18.a1_in1k"],
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_right_are_refused_by_their_flag(digits, words):
    with pytest.raises(config.UserError) as found:
        config.parse(["--data", str(digits), *words])
    assert str(found.value).startswith(words[0]) and len(str(found.value).splitlines()) == 1


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


@pytest.mark.parametrize(("text", "value"), [("0.01", 0.01), ("5/D", 5 / 64), ("auto", "auto")])
def test_beta_may_be_a_number_divided_by_the_dimensions(text, value):
    assert config.objective_options(config.Config(beta=text, projector_dim=64))["beta"] == value


@pytest.mark.parametrize("text", ["five/D", "5/E", "-1/D", "nan"])
def test_a_beta_that_is_no_strength_is_refused(digits, text):
    assert any("beta" in line for line in config.check(config.Config(data=digits, beta=text)))
