"""Find the bottleneck: python tools/profile.py stages --data shards/NAME --views 8 --backbone resnet50

Measures every stage alone, then everything together, and says what holds the run back, what a change would bring and
how far the hardware's limits are. Writes profile.json, waterfall.png and report.html. `--backbone none` profiles the
data path alone; `--run runs/NAME` asks a finished run what held it back, from the timings that training always keeps.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from manyview.bench import expected, limits, output, page, runs, view
from manyview.bench.end_to_end import EndToEnd, trace
from manyview.bench.harness import LOAD_LIMIT, SPREAD_LIMIT, Neighbours
from manyview.bench.stage_cost import Cost, StageCosts
from manyview.bench.sweep import Sweep
from manyview.bench.verdict import compare, sentence
from manyview.bench.workload import Setup, Workload, build
from manyview.pipeline.errors import UserError
from manyview.pipeline.machine import cores
from manyview.training import monitor

SCHEMA = 1
PARTS = ["settings", "environment", "data", "shape", "stages", "composed", "loads", "bottleneck", "what_if", "noise"]


@dataclass(kw_only=True)
class Args(Setup):
    """Find the bottleneck."""

    seconds: float = 70.0
    """Time to spend on measuring; starting up comes on top."""
    out: Path | None = None
    """Folder of profile.json, waterfall.png and report.html; default runs/profile-DATA-vV."""
    json: Path | None = None
    """Also write the profile here."""
    baseline: Path | None = None
    """profile.json of an earlier run: the verdict also says which stage has changed, and what undoing it would bring."""
    trace: Path | None = None
    """Also write a torch.profiler trace of the whole run here (.json.gz), for ui.perfetto.dev."""
    run: Path | None = None
    """A run directory of train.py to ask, instead of measuring."""


def main(argv: list[str]) -> int:
    least = {"views": 1, "size": 0, "batch_size": 2, "projector_dim": 2, "threads": 0, "prefetch": 1, "seed": 0}
    args = output.parse(Args, argv, __doc__, "stages", seconds=1, **least)
    if args.run:
        print(runs.ask(args.run))
        return 0
    baseline = read(args.baseline) if args.baseline else None
    report = measure(args)
    if baseline:
        report["baseline"] = compare(baseline, report)
        report["verdict"] = sentence(report)
    folder = args.out or Path("runs") / f"profile-{args.data.name}-v{args.views}"
    for path in (folder / "profile.json", args.json):
        output.write(path, report)
    page.waterfall(report, folder / "waterfall.png")
    (folder / "report.html").write_text(page.html(report))
    print(view.text(report))
    print(f"\nprofile.json, waterfall.png and report.html are in {folder}")
    return 0


def read(path: Path) -> dict[str, Any]:
    """A profile.json. UserError where it is none, or of another version."""
    try:
        report = json.loads(path.read_text())
        schema = report["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no profile, as `tools/profile.py stages` writes it: {error}") from None
    if schema != SCHEMA:
        raise UserError(f"{path} has schema {schema}, this program reads {SCHEMA}; measure again")
    if missing := [part for part in PARTS if part not in report]:
        raise UserError(f"{path} is no whole profile, without {', '.join(missing)}; measure again")
    return report


def measure(args: Args, extras: bool = True) -> dict[str, Any]:
    """The whole report, as JSON-ready data. Without `extras` there is no sweep and no limit: stages and verdict alone."""
    imported = time.time() - psutil.Process().create_time()
    neighbours, begun = Neighbours(), time.perf_counter()
    cold = limits.disk(args) if extras else None
    opened = time.perf_counter()
    work = build(args, max(0.06, args.seconds / 150))
    startup = {"imports_s": imported, "build_s": time.perf_counter() - opened}
    alone, whole = StageCosts(work, args.seconds / 300), EndToEnd(work)
    opened, batches = time.perf_counter(), work.loader().batches(0, 1)
    next(batches)
    startup["first_batch_s"] = time.perf_counter() - opened
    batches.close()  # type: ignore[attr-defined]
    sweep = Sweep(work, max(work.batch, min(args.batch_size, alone.images))) if extras else None
    for number in (1, 2, 3):  # by turns: what the machine does meanwhile hits all of them
        if sys.stdout.isatty():
            print(f"part {number} of 3", end="\r", flush=True)
        rounds(alone, 0.4 * args.seconds / 3)
        whole.block(0.3 * args.seconds / 3)
        if sweep:
            sweep.round(0.3 * args.seconds / 3)
    alone.close()
    others = neighbours.share()
    report = assemble(args, work, alone, whole, cores() * (1 - others)) | {"startup": startup}
    if sweep and cold:
        sweep.close()
        report["sweep"] = sweep.result()
        report["limits"] = limits.measure(work, cold)
        report["limits"]["shares"] = limits.shares(report["limits"], report["composed"]["images_per_s"])
    if args.trace:
        trace(work, args.trace)
    report["noise"] = noise(report["composed"], others)
    report["peak_bytes"] = monitor.peak_memory(work.device)
    report["took_s"] = time.perf_counter() - begun
    report["verdict"] = sentence(report)
    work.close()
    return report


def rounds(alone: StageCosts, seconds: float) -> None:
    """One round, and more as long as another one fits in."""
    begun, done = time.perf_counter(), 0
    while done == 0 or (time.perf_counter() - begun) * (done + 1) / done < seconds:
        alone.round()
        done += 1


def assemble(args: Args, work: Workload, alone: StageCosts, whole: EndToEnd, free: float) -> dict[str, Any]:
    """Everything that follows from the stages alone and the whole run, on a machine with `free` cores."""
    together, costs = whole.result(), alone.costs
    on_device = work.device.type == "cuda" and work.engine.name != "cpu"
    # Cores that the engine alone fills: an upper quartile, since whatever else runs takes some away.
    parallel = float(np.clip(np.quantile(alone.parallel, 0.75), 0.1, free))
    shape = expected.Shape(work.policy.views, work.batch, free, parallel, on_device)
    ms = expected.milliseconds(costs, shape)
    observed = together["images_per_s"]
    together |= {
        "expected_images_per_s": 1e3 / ms, "expected_core_ms": expected.core_ms(costs, shape), "efficiency": observed * ms / 1e3,
        "full_batch_images_per_s": observed * ms / expected.milliseconds(costs, replace(shape, batch=args.batch_size)),
    }  # fmt: skip
    resource, stage = expected.bottleneck(costs, shape)
    return {
        "schema": SCHEMA, "settings": output.settings(args), "environment": monitor.environment(work.device),
        "data": describe(work), "shape": asdict(shape), "stages": stages(costs, shape), "composed": together,
        "loads": {k: sum(v.values()) for k, v in expected.loads(costs, shape).items()},
        "bottleneck": {"resource": resource, "stage": stage}, "what_if": expected.removed(costs, shape, observed),
    }  # fmt: skip


def stages(costs: list[Cost], shape: expected.Shape) -> list[dict[str, Any]]:
    rows = []
    for cost in costs:
        row, units, per_s = cost.to_json(), cost.units(shape.views, shape.batch), expected.ceiling(cost, shape)
        low, high = (x * units for x in row["core_interval"])
        rows.append(row | {
            "images_per_s": per_s, "views_per_s": per_s * shape.views, "core_ms_image": cost.core_ms * units,
            "core_ms_image_interval": (low, high), "wall_ms_image": cost.wall_ms * units,
        })  # fmt: skip
    return rows


def describe(work: Workload) -> dict[str, Any]:
    store = work.store
    return {
        "name": store.name, "images": len(store), "encoding": store.manifest["encoding"], "format": store.manifest["format"],
        "bytes_per_image": store.nbytes() / len(store), "fingerprint": store.fingerprint,
        "pixels_per_image": float((store.heights.astype(float) * store.widths).mean()),
        "engine": work.engine.name, "engine_reason": work.engine_reason, "threads": work.threads, "batch": work.batch,
        "sizes": [g.size for g in work.policy.groups], "device": str(work.device),
        "precision": work.training.precision if work.training else None,
    }  # fmt: skip


def noise(together: dict[str, Any], others: float) -> dict[str, Any]:
    """Whether the numbers may be quoted, and if not why."""
    reasons = []
    others = max(others, together["others"])
    if others > LOAD_LIMIT:
        reasons.append(f"other processes used {others:.0%} of the cores (limit {LOAD_LIMIT:.0%})")
    if together["core_ms_spread"] > SPREAD_LIMIT:
        reasons.append(f"repeats differ by {together['core_ms_spread']:.0%} in core-ms (limit {SPREAD_LIMIT:.0%})")
    return {"others": others, "certified": not reasons, "reasons": reasons}
