"""Ask a finished (or running) run what held it back, from the timings that training always keeps."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from manyview.pipeline.errors import UserError
from manyview.training.monitor import read_metrics


def ask(folder: Path) -> str:
    """A table of where the time went and a sentence, from metrics.jsonl, config.json and env.json."""
    found = summary(folder)
    lines = [
        f"{folder}: {found['steps']:,} steps of {found['batch']} images x {found['views']} views in {found['seconds']:,.0f} s"
    ]
    lines.append(f"{'where the time went':24s}{'ms/image':>10s}{'share':>8s}")
    for name, ms in found["engine_ms"].items():
        lines.append(f"{'engine: ' + name:24s}{ms:10.3f}{ms / found['engine_budget_ms']:8.1%}  of the engine's threads")
    lines.append(
        f"{'parameters':24s}{found['parameters_ms']:10.3f}{found['parameters_ms'] / found['ms']:8.1%}  of the training thread"
    )
    lines.append(f"{'waiting for data':24s}{found['wait_ms']:10.3f}{found['data_wait']:8.1%}  of the training thread")
    lines.append(
        f"{'training':24s}{found['training_ms']:10.3f}{found['training_ms'] / found['ms']:8.1%}  of the training thread"
    )
    if found["core_ms"] is not None:
        lines.append(
            f"{found['core_ms']:.2f} core-ms an image, {found['cores_used']:.2f} cores busy of {found['cores']}"
        )
    return "\n".join(lines) + "\n\n" + sentence(found)


def summary(folder: Path) -> dict[str, Any]:
    """Where the time went, over all rows of metrics.jsonl that carry timings. UserError where there are none."""
    try:
        rows = [r for r in read_metrics(folder / "metrics.jsonl") if "timings" in r]
        config = json.loads((folder / "config.json").read_text())
        env = json.loads((folder / "env.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no run of train.py: {error}") from None
    if len(rows) < 2:
        raise UserError(
            f"{folder}: {len(rows)} row(s) of timings are too few; two or more --log-every intervals are needed"
        )
    total = _differences(rows)
    images, seconds = total["images"], total["seconds"]
    threads, cores = int(config.get("threads") or 0) or int(env["cores"]), int(env["cores"])
    engine = {k: 1e3 * v / images for k, v in total["timings"].items() if k not in ("wait", "parameters", "batches")}
    per_image = 1e3 * seconds / images
    wait, drawn = (1e3 * total["timings"].get(k, 0.0) / images for k in ("wait", "parameters"))
    return {
        "steps": total["steps"], "batch": config["batch_size"], "views": config["views"], "seconds": seconds, "ms": per_image,
        "images_per_s": images / seconds, "engine_ms": engine, "engine_budget_ms": per_image * threads, "threads": threads,
        "wait_ms": wait, "data_wait": wait / per_image, "parameters_ms": drawn, "training_ms": per_image - wait - drawn,
        "core_ms": 1e3 * total["core_seconds"] / images, "cores": cores, "cores_used": total["core_seconds"] / seconds,
    }  # fmt: skip


def _differences(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over neighbouring rows; where a counter falls, a resumed run began to count anew, and the pair is left out."""
    total: dict[str, Any] = {"images": 0, "seconds": 0.0, "steps": 0, "core_seconds": 0.0, "timings": {}}
    for before, after in pairwise(rows):
        if after["timings"]["batches"] < before["timings"]["batches"]:
            continue
        for key in ("images", "seconds", "core_seconds"):
            total[key] += after[key] - before[key]
        total["steps"] += after["step"] - before["step"]
        for key, value in after["timings"].items():
            total["timings"][key] = total["timings"].get(key, 0.0) + value - before["timings"].get(key, 0.0)
    return total


def sentence(found: dict[str, Any]) -> str:
    rate, n_views = found["images_per_s"], found["views"]
    said = f"{rate:,.1f} images/s ({rate * n_views:,.0f} views/s): "
    busy = sum(found["engine_ms"].values()) / found["engine_budget_ms"]
    if found["data_wait"] < 0.05:
        shared = sum(found["engine_ms"].values()) / (found["ms"] * found["cores"])
        return said + (
            f"training held it back; it waited for data {found['data_wait']:.1%} of the time. Making the views took"
            f" {shared:.0%} of the host's cores."
        )
    stage = max(found["engine_ms"], key=found["engine_ms"].__getitem__, default="the engine")
    best = 1e3 / (found["ms"] - found["wait_ms"])
    return said + (
        f"the data path held it back, mostly {stage}; it waited {found['data_wait']:.0%} of the time, and without waiting"
        f" {best:,.1f} images/s would be possible (engine threads busy {busy:.0%})."
    )
