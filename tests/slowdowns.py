"""Make one stage of the pipeline slower by a known factor: its own function does its work several times over.

    python tests/slowdowns.py --runs 20 --out results/throughput

slows each stage in turn, this often, and writes whether the profiler named it, and what it predicted against what undoing
brought. `make test` takes every stage a time or two.
"""

from __future__ import annotations

import contextlib
import csv
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from manyview.pipeline.convert.write import write_shards
from manyview.pipeline.manifest import Options

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pictures import class_folders

from manyview.bench import stages, verdict, workload
from manyview.model import objective
from manyview.pipeline import codec, loader, views
from manyview.pipeline.engines import cpu, pixels
from manyview.pipeline.plan import Plan
from manyview.pipeline.store import Store
from manyview.training.step import PretrainingModel

STAGES = ("plan", "index", "parameters", "read", "decode", "dispatch", "resize", "color", "blur", "solarize", "normalize",
          "forward", "backward", "objective", "optimizer")  # fmt: skip


def repeated(function: Callable, times: int) -> Callable:
    def slow(*args: Any, **kwargs: Any) -> Any:
        for _ in range(times - 1):
            function(*args, **kwargs)
        return function(*args, **kwargs)

    return slow


def everywhere(name: str, times: int, *modules: Any) -> list:
    """Patches of a function in every module that has imported it."""
    slow = repeated(getattr(modules[0], name), times)
    return [patch.object(module, name, slow) for module in modules]


class SlowArray(np.ndarray):
    """Looking rows up takes `times` as long."""

    times = 1

    def __getitem__(self, key: Any) -> Any:
        for _ in range(self.times - 1):
            super().__getitem__(key)
        return np.asarray(super().__getitem__(key))


def slow_index(times: int) -> list:
    original = Store.__init__

    def init(self: Store, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        kind = type("Slow", (SlowArray,), {"times": times})
        self.heights, self.widths, self.labels = (a.view(kind) for a in (self.heights, self.widths, self.labels))

    return [patch.object(Store, "__init__", init)]


def slow_backward(times: int) -> list:
    original = torch.autograd.backward

    def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
        for _ in range(times - 1):
            original(tensors, grad_tensors, retain_graph=True)
        original(tensors, grad_tensors, *args, **kwargs)

    return [patch.object(torch.autograd, "backward", backward)]


def slow_objective(times: int) -> list:
    original = objective.create

    def create(*args: Any, **kwargs: Any) -> Any:
        loss_of = original(*args, **kwargs)
        return repeated(loss_of, times)

    return [patch.object(objective, "create", create)]


def work(times: int) -> None:
    """About `times` x 20 us of a core, without Python's lock."""
    scratch = np.empty(40_000)
    for _ in range(times):
        np.sqrt(ONES, out=scratch)


ONES = np.ones(40_000)
UNIT_MS = 0.02


def slow_dispatch(times: int) -> list:
    """Work of the engine's threads that is neither reading nor decoding nor a view."""
    original = cpu.CPUEngine._images

    def images(self: Any, ids: np.ndarray, rows: range, *args: Any) -> None:
        for _ in rows:
            work(times)
        original(self, ids, rows, *args)

    return [patch.object(cpu.CPUEngine, "_images", images)]


def slow_view(step: str, times: int) -> list:
    """One step of a view again and again on scratch memory, for the views that have it, after the real ones are made."""
    original = cpu.render

    def render(*call: Any) -> None:
        original(*call)
        images, heights, widths, first, views, out = call
        size = out.shape[2]
        scratch = np.empty((size, 3 * size), np.uint8)
        parts = np.split(images, 3 * np.cumsum(heights * widths)[:-1])
        for v in range(len(out)):
            for b, (part, height) in enumerate(zip(parts, heights), first):
                view, target = views[v, b], out[v, b].reshape(size, 3 * size)
                if step == "blur" and view["sigma"] > 0:
                    repeated(pixels.blur, times - 1)(target, view["sigma"], scratch)
                elif step == "resize":
                    if min(view["box"][2:]) > 8:  # a view, and not what is left when the profiler takes the views away
                        repeated(pixels.resize, times - 1)(part.reshape(height, -1), view, scratch)
                elif (step == "color" and not np.array_equal(view["color"], np.eye(3, 4))) or (
                    step == "solarize" and view["solarize"]
                ):
                    work(times)

    return [patch.object(cpu, "render", render)]


def patches(stage: str, times: int) -> list:
    """What makes `stage` do its work `times` times; of color, solarize and dispatch, next to nothing, a unit of work."""
    return {
        "plan": lambda: everywhere("batch", times, Plan),
        "index": lambda: slow_index(times),
        "parameters": lambda: everywhere("parameters", times, views, loader, workload),
        "read": lambda: everywhere("read", times, Store),
        "decode": lambda: everywhere("decode", times, codec, cpu),
        "dispatch": lambda: slow_dispatch(times),
        "normalize": lambda: everywhere("normalize", times, loader, workload),
        "forward": lambda: everywhere("forward", times, PretrainingModel),
        "backward": lambda: slow_backward(times),
        "objective": lambda: slow_objective(times),
        "optimizer": lambda: everywhere("step", times, torch.optim.AdamW),
    }.get(stage, lambda: slow_view(stage, times))()


@contextlib.contextmanager
def slowed(stage: str, times: int) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for one in patches(stage, times):
            stack.enter_context(one)
        yield


# ------------------------------------------------------------------------------------------------------- the experiment


def small_data(folder: Path) -> Path:
    """Shards of 240 small photos."""
    source = class_folders(folder / "photos", per_class=80)
    write_shards(Options("folder"), source / "train", folder / "shards", quiet=True)
    return folder / "shards"


def settings(data: Path, seconds: float) -> stages.Args:
    return stages.Args(
        data=data, views=4, size=32, batch_size=8, backbone="resnet10-narrow", stem="standard", projector_dim=64, policy="simclr",
        augment=("solarize=0.5",), engine="cpu", seconds=seconds,
    )  # fmt: skip


def factor_for(stage: str, base: dict[str, Any]) -> int:
    """Times that make the stage the largest by far: 1.6 x all others together, and at least 3."""
    cost = {row["name"]: row["core_ms_image"] for row in base["stages"]}
    total = sum(cost.values())
    if stage in ("color", "solarize", "dispatch"):  # in units of work: an image, or a view that has this step
        share = {"color": 0.84, "solarize": 0.5, "dispatch": 0.25}[stage] * base["shape"]["views"]
        return max(1, round(1.6 * total / UNIT_MS / share))
    cached = {"normalize": 4, "read": 2, "objective": 2}.get(
        stage, 1
    )  # the same again is cheaper: warm memory, no gradient
    return int(np.clip(round(1.6 * cached * total / max(1e-6, cost[stage])), 3, 200_000))


def trial(stage: str, args: stages.Args, base: dict[str, Any]) -> dict[str, Any]:
    """Profile with `stage` slowed; what the profiler says of it, and what is so."""
    times = factor_for(stage, base)
    with slowed(stage, times):
        report = stages.measure(args, extras=False)
    found = verdict.compare(base, report)
    culprit = found["culprit"] or {"stage": "none", "gain": 1.0, "core_gain": 1.0}
    true_core = report["composed"]["core_ms"] / base["composed"]["core_ms"]
    true_wall = base["composed"]["images_per_s"] / report["composed"]["images_per_s"]
    return {
        "stage": stage, "times": times, "bottleneck": report["bottleneck"]["stage"], "culprit": culprit["stage"],
        "core_predicted": culprit["core_gain"], "core_true": true_core, "core_error": culprit["core_gain"] / true_core - 1,
        "predicted": culprit["gain"], "true": true_wall, "error": culprit["gain"] / true_wall - 1,
        "others": report["noise"]["others"],
        "base_sum": base["composed"]["expected_core_ms"], "base_core": base["composed"]["core_ms"],
        "slow_sum": report["composed"]["expected_core_ms"], "slow_core": report["composed"]["core_ms"],
    }  # fmt: skip


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="slowed runs a stage")
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring, a run")
    parser.add_argument("--stages", nargs="*", default=STAGES, choices=STAGES)
    parser.add_argument("--out", type=Path, help="folder of validity.csv and validity.json")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in the tests: its own threads beside the engine's make the unslowed step vary
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        setup = settings(small_data(Path(folder)), args.seconds)
        stages.measure(setup, extras=False)  # compiles
        for number in range(args.runs):
            for stage in args.stages:
                base = stages.measure(setup, extras=False)
                rows.append({"run": number} | trial(stage, setup, base))
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    summary = summarize(rows)
    print(json.dumps(summary, indent=1))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        with open(args.out / "validity.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        (args.out / "validity.json").write_text(
            json.dumps(summary | {"environment": base["environment"]}, indent=1) + "\n"
        )


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all runs: how often the stage was named, and how often the gain was within 15 %."""
    named = [row["bottleneck"] == row["stage"] == row["culprit"] for row in rows]
    return {
        "runs": len(rows),
        "named": sum(named),
        "core_within_15": sum(abs(row["core_error"]) <= 0.15 for row in rows),
        "wall_within_15": sum(abs(row["error"]) <= 0.15 for row in rows),
        "core_error_median": float(np.median([abs(row["core_error"]) for row in rows])),
        "wall_error_median": float(np.median([abs(row["error"]) for row in rows])),
        "by_stage": {
            stage: {
                "named": sum(n for n, row in zip(named, rows) if row["stage"] == stage),
                "runs": sum(row["stage"] == stage for row in rows),
                "worst_core_error": max(abs(row["core_error"]) for row in rows if row["stage"] == stage),
                "worst_error": max(abs(row["error"]) for row in rows if row["stage"] == stage),
            }
            for stage in dict.fromkeys(row["stage"] for row in rows)
        },
    }


if __name__ == "__main__":
    main()
