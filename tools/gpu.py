"""What a quarter of an hour on a GPU should show, in order of worth: python tools/gpu.py --minutes 13 --out runs/gpu

Every step is a process of its own with its own deadline. Its log and rows are on disk as they are made, `steps.jsonl` says how
each ended, README.md beside it is the page. Started again, it goes on: what has ended well for this commit is not run again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # the checkout on the path instead of this folder, whose profile.py would hide the library's
    sys.path[0] = str(ROOT)

import torch
import tyro

from manyview.bench import output
from manyview.pipeline.engines import has_dali
from manyview.pipeline.errors import UserError, run
from manyview.training.monitor import environment, read_metrics

GRACE = 15  # seconds from SIGTERM, at which train.py saves, to SIGKILL
EVALUATION = 70  # seconds kept for the two protocols on CIFAR-10's test split


@dataclass
class Options:
    """Run the steps that fit into the time, the most valuable first."""

    minutes: float = 13
    """For everything. A step begins only where half of its time is left."""
    out: Path = Path("runs/gpu")
    """Logs, rows and the page."""
    cifar10: Path | None = None
    """Shards of CIFAR-10, or what `tools/shards.py write --dataset cifar10` converts: its archive or class folders."""
    photos: Path | None = None
    """Shards of photos, for views at 224 pixels."""
    steps: tuple[str, ...] = ()
    """Only these, by name."""
    list: bool = False
    """Say what there is, with seconds, and stop."""
    rehearse: bool = False
    """Every step on the CPU at toy size, in under two minutes: so that no minute on a GPU is lost to a typing error."""


@dataclass(frozen=True)
class Step:
    name: str
    seconds: int  # at most
    shows: str
    # For the seconds that there are; each is asked for when the last has ended.
    commands: Callable[[Options, float], Iterable[list[str]]]
    lacks: Callable[[Options], str] = lambda options: ""  # what it needs and does not find


def python(*words: object) -> list[str]:
    return [sys.executable, *map(str, words)]


def data(options: Options) -> Path:
    """CIFAR-10's shards; in the rehearsal digits."""
    if options.rehearse:
        return options.out / "shards"
    given = options.cifar10
    return given if given and (given / "manifest.json").is_file() else ROOT / "shards" / "cifar10"


def prepare(options: Options, _: float) -> list[list[str]]:
    if options.rehearse:
        return [python("tools/shards.py", "write", "--dataset", "digits", "--out", data(options))]
    if (data(options) / "manifest.json").is_file():
        return []
    words = ["--dataset", "cifar10", "--source", options.cifar10, "--out", data(options)]
    return [python("tools/shards.py", "write", *words)]


def accuracy(options: Options, seconds: float) -> Iterator[list[str]]:
    """A trial tells how many steps fit; the run is then planned for them, so that its schedule ends in time. Resumable."""
    train = python("train.py", "--data", data(options), "--preset", "presets/cifar10.yaml")
    if options.rehearse:
        train += ["--backbone", "resnet10-narrow", "--views", "2", "--batch-size", "32"]
    plan = options.out / "accuracy.json"
    if not plan.exists():
        trial, steps = options.out / "trial", "6" if options.rehearse else "300"
        yield [*train, "--steps", steps, "--log-every", "2", "--eval-every", "-1", "--out", str(trial), "--overwrite"]
        speed = max(row["views_per_s"] for row in read_metrics(trial / "metrics.jsonl") if "views_per_s" in row)
        config = json.loads((trial / "config.json").read_text())
        steps_a_second = speed / (config["views"] * config["batch_size"])
        fits = 6 if options.rehearse else int(0.95 * (seconds - EVALUATION) * steps_a_second)
        plan.write_text(json.dumps({"views_per_s": speed, "steps": fits}))
    steps = json.loads(plan.read_text())["steps"]
    every = ["--eval-every", str(max(1, steps // (2 if options.rehearse else 5))), "--save-every", "500"]
    yield [*train, "--steps", str(steps), *every, "--out", str(options.out / "accuracy"), "--resume"]
    words = ["--protocols", "knn", "linear", "--no-plots", "--write", options.out / "accuracy.md"]
    yield python("tools/evaluate.py", options.out / "accuracy", "--limit", 200 if options.rehearse else 0, *words)


def tests(options: Options, _: float) -> list[list[str]]:
    files = ["tests/test_gpu.py", "tests/test_fused.py", "tests/test_engines.py"]
    if options.rehearse:
        return [python("-m", "pytest", "-q", "--collect-only", *files)]
    return [python("-m", "pytest", "-q", "-x", *files, "-k", "gpu or fused or against_the_reference")]


def measured(name: str, options: Options, real: str, toy: str, *data: object) -> list[list[str]]:
    """`profile.py NAME` on this data: `real` on the GPU, `toy` in the rehearsal."""
    to = ["--json", options.out / f"{'views' if name == 'peers' else name}.json", "--device", device(options)]
    return [python("tools/profile.py", name, *data, *to, *(toy if options.rehearse else real).split())]


def views(options: Options, _: float) -> list[list[str]]:
    small = ["--small", data(options)] if not no_cifar(options) else []
    toy = "--views 2 --size 16 --batch-size 16 --images 64 --rounds 1 --only cpu"
    real = "--views 2,4,8,16 --batch-size 256"
    return measured("peers", options, real, toy, "--data", options.photos or "None", *small)


def step(options: Options, _: float) -> list[list[str]]:
    toy = "--backbone resnet10-narrow --batch-size 16 --views 2 --rounds 1"
    return measured("step", options, "", toy, "--data", data(options))


def objective(options: Options, _: float) -> list[list[str]]:
    toy = "--views 2 --dim 16 --rounds 1 --batch-size 16 --backbone resnet10-narrow --sizes 32"
    return measured("objective", options, "--views 2,4,8,16 --dim 256,2048,8192", toy)


def probes(options: Options, _: float) -> list[list[str]]:
    return measured("probes", options, "", "--train 400 --test 100 --features 16")


def device(options: Options) -> str:
    return "cpu" if options.rehearse else "cuda"


def no_cifar(options: Options) -> str:
    there = options.rehearse or options.cifar10 or (data(options) / "manifest.json").is_file()
    return "" if there else "no CIFAR-10: --cifar10 FOLDER"


def no_images(options: Options) -> str:
    return "" if options.photos or not no_cifar(options) else "no photos: --photos SHARDS"


STEPS = [
    Step("prepare", 60, "CIFAR-10 as shards", prepare, no_cifar),
    Step("tests", 60, "pixels, no waiting for the GPU, stop and resume", tests),
    Step("accuracy", 480, "CIFAR-10 after eight minutes: kNN and linear, one clean view", accuracy, no_cifar),
    Step("views", 120, "views/s: the fused kernels, DALI's graph, kornia, the decode alone", views, no_images),
    Step("step", 90, "the training step with data beside the bare one", step, no_cifar),
    Step("objective", 60, "what the objectives cost", objective),
    Step("probes", 60, "probes on features of 50,000 images", probes),
]


def main() -> int:
    options = tyro.cli(Options, description=__doc__)
    if options.list:
        print("\n".join(f"{s.name:<10} {s.seconds:>4} s  {s.shows}" for s in STEPS))
        return 0
    unknown = set(options.steps) - {s.name for s in STEPS}
    if unknown:
        raise UserError(f"no step {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in STEPS)}")
    if not options.rehearse and not torch.cuda.is_available():
        raise UserError("torch sees no CUDA device; --rehearse runs every step on the CPU at toy size")
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    about = environment(torch.device(device(options)))
    ends = time.monotonic() + 60 * options.minutes
    for one in STEPS:
        if not options.steps or one.name in options.steps:
            perform(one, options, about, ends)
            write_page(options, about)
    print((options.out / "README.md").read_text())
    return int(any(row["status"] == "failed" for row in rows_of(options, about).values()))


def perform(one: Step, options: Options, about: dict, ends: float) -> None:
    """Run a step, unless it is done, and write down how it ended."""
    if rows_of(options, about).get(one.name, {}).get("status") == "done":
        return
    begun = time.monotonic()
    left = min(one.seconds, ends - begun)
    row = {"step": one.name, "commit": about["commit"]}
    if lack := one.lacks(options):
        row |= {"status": "left out", "reason": lack}
    elif left < one.seconds / 2:
        row |= {"status": "left out", "reason": f"{left:.0f} s are left, it may take {one.seconds}"}
    else:
        print(f"--- {one.name}: {one.shows} (at most {left:.0f} s)", flush=True)
        code: int | None = 0
        for command in one.commands(options, left):
            code = call(command, options.out / f"{one.name}.txt", left - (time.monotonic() - begun))
            if code != 0:
                break
        status = "done" if code == 0 else "out of time" if code is None else "failed"
        row |= {"status": status, "seconds": round(time.monotonic() - begun, 1)}
    with open(options.out / "steps.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def call(command: list[str], log: Path, seconds: float) -> int | None:
    """The exit code of a command whose output goes to the log; None if its time ran out."""
    with open(log, "ab") as file:
        file.write(f"$ {' '.join(command[1:])}\n".encode())
        file.flush()
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            return None


def rows_of(options: Options, about: dict) -> dict[str, dict]:
    """The last row of each step at this commit."""
    path = options.out / "steps.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["step"]: row for row in map(json.loads, lines) if row["commit"] == about["commit"]}


def write_page(options: Options, about: dict) -> None:
    body = []
    for one in STEPS:
        row = rows_of(options, about).get(one.name, {"status": "not begun"})
        log = options.out / f"{one.name}.txt"
        said = log.read_text(errors="replace").splitlines() if log.exists() else []
        tail = "<br>".join(line.replace("|", "/")[:160] for line in [line for line in said if line.strip()][-2:])
        ended = f"{row['status']}: {row['reason']}" if "reason" in row else row["status"]
        body.append([one.name, one.shows, ended, row.get("seconds", ""), tail])
    versions = f"{'DALI' if has_dali() else 'no DALI'}, torch {torch.__version__}"
    text = f"Commit {about['commit']}, {versions}. Made by `python tools/gpu.py`."
    table = output.table(("step", "shows", "ended", "s", "last lines"), body, left=5)
    (options.out / "README.md").write_text(output.document(f"# {about['device']}", text, table))


if __name__ == "__main__":
    run(main)
