"""results/trainer.md from one command: python tools/profile.py trainer --data shards/cifar10

The step beside a bare one for two networks, and peak memory for V = 2..16, whole and in chunks; each also as JSON or CSV.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from manyview.bench import memory, step


@dataclass
class Args:
    data: Path = Path("shards/cifar10")
    """Shards of small images."""
    out: Path = Path("results")
    rounds: int = 30
    """Rounds, in which each way is taken once: one step of it, on a GPU ten."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def main(argv: list[str]) -> None:
    args = tyro.cli(Args, args=argv, description=__doc__, prog="profile.py trainer")
    args.out.mkdir(parents=True, exist_ok=True)  # now, not after minutes of measuring
    networks = [("resnet18", 4, 16), ("resnet10-narrow", 8, 32)]
    if args.device == "cuda":
        networks = [("resnet18", 8, 256), ("resnet50", 4, 256)]
    steps = []
    for backbone, views, batch in networks:
        taken = step.Args(
            args.data, backbone, views=views, batch_size=batch, rounds=args.rounds, device=args.device, compile=True
        )
        steps.append(step.measure(taken))
        print(json.dumps(steps[-1]["rows"]))
    (args.out / "step.json").write_text(json.dumps(steps, indent=2) + "\n")
    memory.main(["--csv", str(args.out / "memory.csv"), "--device", args.device])
    with open(args.out / "memory.csv") as file:
        rows = list(csv.DictReader(file))
    (args.out / "trainer.md").write_text(page(steps, rows, args))


def page(steps: list[dict[str, Any]], rows: list[dict[str, str]], args: Args) -> str:
    about = steps[0]["environment"]
    lines = [
        "# The trainer's step",
        "",
        f"`python tools/profile.py trainer --data {args.data}` at commit {about['commit']}, {about['device']}, torch"
        f" {about['versions']['torch']}, seed 0. Medians of ratios over interleaved rounds; core-ms is the process's CPU time.",
        "",
        "`bare`: forward, backward and optimizer of the same network on random tensors, with the cheapest loss there is.",
        "`step`: what train.py does, on random pixels. `data`: the same, fed by the real pipeline (decode or copy, all views).",
        "`compiled`: `step` through torch.compile; what its first two steps take is in step.json.",
        "",
        "| network | V x B | engine | way | ms a step | core-ms a step | wall / bare (95 %) | core / bare |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in steps:
        s = one["settings"]
        for name, row in one["rows"].items():
            low, high = row["interval"]
            lines.append(
                f"| {s['backbone']}, {s['size']} px | {s['views']} x {s['batch_size']} | {one['engine'].split(':')[0]} | {name} |"
                f" {row['ms']:.1f} | {row['core_ms']:.1f} | {row['ratio']:.3f} [{low:.3f}, {high:.3f}] |"
                f" {row['core_ratio']:.3f} |"
            )
    lines += ["", "## Peak memory of a step", ""]
    lines += [
        f"ResNet-18 at 32 px, B = {rows[0]['batch']}, growth over rest, batch-norm statistics per view (chunks are exact).",
        "",
        "| V | views in the graph | peak MiB | seconds |",
        "|---|---|---|---|",
    ]
    for r in rows:
        chunk = r["chunk"] if r["chunk"] != "0" else "all"
        lines.append(f"| {r['views']} | {chunk} | {int(r['peak_bytes']) / 2**20:.0f} | {float(r['seconds']):.2f} |")
    return "\n".join(lines) + "\n"
