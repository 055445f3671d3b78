"""results/trainer.md from one command: python tools/profile.py trainer --data shards/cifar10

The step beside a bare one for two networks, and peak memory for V = 2..16, whole and in chunks; each also as JSON or CSV.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from manyview.bench import memory, output, step

NETWORKS = {  # backbone, views, images
    "cpu": [("resnet18", 4, 16), ("resnet10-narrow", 8, 32)],
    "cuda": [("resnet18", 8, 256), ("resnet50", 4, 256)],
}


@dataclass
class Args:
    data: Path = Path("shards/cifar10")
    """Shards of small images."""
    out: Path = Path("results")
    """Folder of trainer.md, step.json and memory.csv."""
    rounds: int = 30
    """Rounds, in which each way is taken once: one step of it, on a GPU ten."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def main(argv: list[str]) -> None:
    args = output.parse(Args, argv, __doc__, "trainer", rounds=1)
    args.out.mkdir(parents=True, exist_ok=True)  # now, not after minutes of measuring
    steps = []
    for backbone, views, batch in NETWORKS.get(args.device, NETWORKS["cpu"]):
        asked = step.Args(args.data, backbone, views=views, batch_size=batch, rounds=args.rounds, device=args.device)
        steps.append(step.measure(replace(asked, compile=True), argv))
        print(json.dumps(steps[-1]["rows"]))
    output.write(args.out / "step.json", steps)
    rows = memory.measure(memory.Args(device=args.device))
    output.write_csv(args.out / "memory.csv", rows)
    (args.out / "trainer.md").write_text(page(steps, rows, args))


def page(steps: list[dict[str, Any]], rows: list[dict[str, Any]], args: Args) -> str:
    about = steps[0]["environment"]
    ways = [
        [f"{s['backbone']}, {s['size']} px", f"{s['views']} x {s['batch_size']}", one["engine"].split(":")[0], name,
         f"{row['ms']:.1f}", f"{row['core_ms']:.1f}", "{:.3f} [{:.3f}, {:.3f}]".format(row["ratio"], *row["interval"]),
         f"{row['core_ratio']:.3f}"]
        for one in steps for s in [one["settings"]] for name, row in one["rows"].items()
    ]  # fmt: skip
    peaks = [[r["views"], r["chunk"] or "all", f"{r['peak_bytes'] / 2**20:.0f}", f"{r['seconds']:.2f}"] for r in rows]
    head = ("network", "V x B", "engine", "way", "ms a step", "core-ms a step", "wall / bare (95 %)", "core / bare")
    return output.document(
        "# The trainer's step",
        f"`python tools/profile.py trainer --data {args.data}` at commit {about['commit']}, {about['device']}, torch"
        f" {about['versions']['torch']}, seed 0. Medians of ratios over interleaved rounds; core-ms is the process's CPU time.",
        "`bare`: forward, backward and optimizer of the same network on random tensors, with the cheapest loss there is.\n"
        "`step`: what train.py does, on random pixels. `data`: the same, fed by the real pipeline (decode or copy, all views).\n"
        "`compiled`: `step` through torch.compile; what its first two steps take is in step.json.",
        output.table(head, ways, left=4),
        "## Peak memory of a step",
        f"ResNet-18 at 32 px, B = {rows[0]['batch']}, growth over rest, batch-norm statistics per view (chunks are exact).",
        output.table(("V", "views in the graph", "peak MiB", "seconds"), peaks, left=2),
    )
