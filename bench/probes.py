"""How long evaluation's probes take: python tools/profile.py probes --json results/evaluation-speed.json

The features are made up: what they are does not change the time. The bound of a sweep is its matrix products alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from manyview.bench import output
from manyview.bench.harness import spent
from manyview.evaluation import knn, linear
from manyview.pipeline import engines
from manyview.training import monitor


@dataclass
class Args:
    """Time kNN and the linear sweep."""

    train: int = 50_000
    test: int = 10_000
    features: int = 2048
    classes: int = 10
    device: str = "cpu"
    json: Path | None = None
    """Where to write the result; the same name with .md gets the page."""


def main(argv: list[str]) -> None:
    args = output.parse(Args, argv, __doc__, "probes", train=10, test=1, features=1, classes=2)
    device = engines.device_of(args.device)  # says what is missing before anything is made
    env, rows = output.environment(device, "probes", argv), []
    for name, (limit, job) in jobs(args).items():
        taken = spent(job, device)
        rows.append({"what": name, "wall_s": taken.wall, "core_s": taken.core, "limit_s": limit})
    gib = monitor.peak_memory(torch.device("cpu")) / 2**30
    result = {"environment": env, "settings": output.settings(args), "rows": rows, "peak_gib": gib}
    text = page(result)
    print(text)
    output.write(args.json, result, text)


def jobs(args: Args) -> dict[str, tuple[int, Callable[[], object]]]:
    """What is timed, by name: how long it may take on 2 cores (0: no limit), and the call."""
    torch.manual_seed(0)
    labels = torch.randint(args.classes, (args.train,))
    centers = torch.randn(args.classes, args.features)
    x = (centers[labels] + 8 * torch.randn(args.train, args.features)).to(args.device)
    q = (8 * torch.randn(args.test, args.features)).to(args.device)
    labels = labels.to(args.device)
    sweep = partial(linear.sweep, x, labels, q, args.classes)
    return {
        "kNN, cosine, k up to 200": (60, lambda: knn.neighbours(x, q, 200)),
        "kNN, Euclidean, k = 20": (60, lambda: knn.euclid_invdist(x, labels, q, k=20, classes=args.classes)),
        "linear sweep, 13 rates": (180, lambda: sweep(bn=False)),
        "linear sweep with BatchNorm, 13 rates": (180, lambda: sweep(bn=True)),
        "a sweep's matrix products alone (its bound)": (0, lambda: products(x, args.classes)),
    }


def products(x: torch.Tensor, classes: int) -> None:
    """The two products a step of both trainings of a sweep: heads by batch, and error by batch."""
    for heads, n in ((len(linear.RATES), len(x) * 9 // 10), (2, len(x))):
        batch = x[: linear.BATCH]
        weight = torch.randn(heads * classes, x.shape[1], device=x.device)
        for _ in range(linear.EPOCHS * math.ceil(n / linear.BATCH)):
            (weight @ batch.T) @ batch


def page(result: dict[str, Any]) -> str:
    env, asked = result["environment"], result["settings"]
    rows = [[r["what"], f"{r['wall_s']:.1f}", f"{r['core_s']:.1f}", r["limit_s"] or ""] for r in result["rows"]]
    return output.document(
        "# Speed of the probes",
        f"Made by `python {env['command']}`; commit {env['commit']}, torch {env['versions']['torch']}, {env['device']},"
        f" {env['threads']} threads, load average {env['load']:.1f} at the start, peak memory {result['peak_gib']:.1f} GiB.",
        f"{asked['train']:,} x {asked['features']} features, {asked['test']:,} queries, {asked['classes']} classes. A sweep is"
        " all of it: 13 rates for 100 epochs on nine tenths of the features, the choice on the last tenth, the chosen rate and"
        " the paper's again on everything, and the scores of the queries.",
        output.table(("what", "wall s", "CPU s", "to stay under, s"), rows),
    )
