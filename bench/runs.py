"""Ask a finished (or running) run what held it back, from the timings that training always keeps."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from manyview.bench.view import columns
from manyview.pipeline.errors import UserError
from manyview.training.monitor import read_metrics

OF_THE_LOOP = ("wait", "device_wait", "parameters", "batches")  # timings that are not the engine's threads'


def ask(folder: Path) -> str:
    """A table of where the time went and a sentence, from metrics.jsonl, config.json and env.json."""
    s = summary(folder)
    rows = [[f"engine: {name}", f"{ms:.3f}", f"{ms / s['engine_budget_ms']:.1%}", "of the engine's threads"]
            for name, ms in s["engine_ms"].items()]  # fmt: skip
    loop = {"parameters": s["parameters_ms"], "waiting for data": s["wait_ms"], "training": s["training_ms"]}
    rows += [[name, f"{ms:.3f}", f"{ms / s['ms']:.1%}", "of the training thread"] for name, ms in loop.items()]
    lines = [
        f"{folder}: {s['steps']:,} steps of {s['batch']} images x {s['views']} views in {s['seconds']:,.0f} s",
        *columns((("where the time went", "ms/image", "share", ""), rows)),
        f"{s['core_ms']:.2f} core-ms an image, {s['cores_used']:.2f} cores busy of {s['cores']}",
    ]
    return "\n".join(lines) + "\n\n" + sentence(s)


def summary(folder: Path) -> dict[str, Any]:
    """Where the time went, over all rows of metrics.jsonl that carry timings. UserError where there are none."""
    try:
        rows = [r for r in read_metrics(folder / "metrics.jsonl") if "timings" in r]
        config, env = (json.loads((folder / name).read_text()) for name in ("config.json", "env.json"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no run of train.py: {error}") from None
    if len(rows) < 2:
        raise UserError(f"{folder}: {len(rows)} row(s) of timings are too few; it takes two --log-every intervals")
    total, timings = _differences(rows)
    images, seconds, core_seconds = total["images"], total["seconds"], total["core_seconds"]
    engine = {k: 1e3 * v / images for k, v in timings.items() if k not in OF_THE_LOOP}
    per_image = 1e3 * seconds / images
    wait, parameters = (1e3 * timings[k] / images for k in ("wait", "parameters"))
    return {
        "steps": total["step"], "batch": config["batch_size"], "views": config["views"], "seconds": seconds, "ms": per_image,
        "images_per_s": images / seconds, "engine_ms": engine, "wait_ms": wait, "data_wait": wait / per_image,
        "engine_budget_ms": per_image * (config.get("threads") or env["cores"]),
        "parameters_ms": parameters, "training_ms": per_image - wait - parameters,
        "core_ms": 1e3 * core_seconds / images, "cores": env["cores"], "cores_used": core_seconds / seconds,
    }  # fmt: skip


def _differences(rows: list[dict[str, Any]]) -> tuple[Any, Any]:
    """Sums over neighbouring rows, of the rows' own numbers and of their timings; where a counter falls, a resumed run began
    to count anew, and the pair is left out."""
    total, seconds = Counter[Any](), Counter[Any]()
    for before, after in pairwise(rows):
        if after["timings"]["batches"] >= before["timings"]["batches"]:
            total.update({k: after[k] - before[k] for k in ("images", "seconds", "core_seconds", "step")})
            seconds.update({k: v - before["timings"].get(k, 0.0) for k, v in after["timings"].items()})
    return total, seconds


def sentence(s: dict[str, Any]) -> str:
    rate, engine = s["images_per_s"], s["engine_ms"]
    said, making = f"{rate:,.1f} images/s ({rate * s['views']:,.0f} views/s): ", sum(engine.values())
    if s["data_wait"] < 0.05:
        return said + (
            f"training held it back; it waited for data {s['data_wait']:.1%} of the time. Making the views took"
            f" {making / (s['ms'] * s['cores']):.0%} of the host's cores."
        )
    stage = max(engine, key=engine.__getitem__, default="the engine")
    return said + (
        f"the data path held it back, mostly {stage}; it waited {s['data_wait']:.0%} of the time, and without waiting"
        f" {1e3 / (s['ms'] - s['wait_ms']):,.1f} images/s would be possible (engine threads busy"
        f" {making / s['engine_budget_ms']:.0%})."
    )
