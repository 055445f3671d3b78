"""How long the probes take: python -m evaluation.speed [--write results/evaluation-speed.md]

10,000 queries against 50,000 features of 2048 dimensions and 10 classes, made up: what they are does not change the time.
A sweep is all of it: 13 rates for 100 epochs on nine tenths of the features, the choice on the last tenth, the chosen
rate and the paper's again on everything, and the scores of the queries. Its bound is the same matrix products alone.
"""

from __future__ import annotations

import math
import os
import resource
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

from manyview.evaluation import knn, linear
from manyview.pipeline import engines
from manyview.pipeline.errors import run
from manyview.training.monitor import environment


@dataclass
class Config:
    """Time kNN and the linear sweep."""

    train: int = 50_000
    test: int = 10_000
    features: int = 2048
    classes: int = 10
    device: str = "cpu"
    write: Path | None = None
    """Also write the table as Markdown."""


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    engines.device_of(config.device)  # says what is missing before anything is made
    rows = [(name, limit, *timed(job)) for name, (limit, job) in jobs(config).items()]
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    table = "| what | wall s | CPU s | to stay under, s |\n| --- | --- | --- | --- |\n" + "\n".join(
        f"| {n} | {w:.1f} | {c:.1f} | {limit or ''} |" for n, limit, w, c in rows
    )
    print(f"{table}\npeak memory {gib:.1f} GiB")
    if config.write:
        config.write.write_text(page(config, table, gib))


def jobs(config: Config) -> dict[str, tuple[int, Callable[[], object]]]:
    """What is timed, by name: how long it may take on 2 cores (0: no limit), and the call."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(config.classes, (config.train,), generator=generator)
    centers = torch.randn(config.classes, config.features, generator=generator)
    x = (centers[labels] + 8 * torch.randn(config.train, config.features, generator=generator)).to(config.device)
    q = (8 * torch.randn(config.test, config.features, generator=generator)).to(config.device)
    labels = labels.to(config.device)
    sweep = partial(linear.sweep, x, labels, q, config.classes)
    return {
        "kNN, cosine, k up to 200": (60, lambda: knn.neighbours(x, q, 200)),
        "kNN, Euclidean, k = 20": (60, lambda: knn.euclid_invdist(x, labels, q, k=20, classes=config.classes)),
        "linear sweep, 13 rates": (180, lambda: sweep(bn=False)),
        "linear sweep with BatchNorm, 13 rates": (180, lambda: sweep(bn=True)),
        "a sweep's matrix products alone (its bound)": (0, lambda: products(x, config.classes)),
    }


def products(x: torch.Tensor, classes: int) -> None:
    """The two products a step of both trainings of a sweep: heads by batch, and error by batch."""
    for heads, n in ((len(linear.RATES), len(x) * 9 // 10), (2, len(x))):
        batch = x[: linear.BATCH]
        weight = torch.randn(heads * classes, x.shape[1], device=x.device)
        for _ in range(linear.EPOCHS * math.ceil(n / linear.BATCH)):
            (weight @ batch.T) @ batch


def page(config: Config, table: str, gib: float) -> str:
    facts = environment(torch.device(config.device))
    command = shlex.join(["python", "-m", "evaluation.speed", *sys.argv[1:]])
    return (
        f"# Speed of the probes\n\nMade by `{command}`; commit {facts['commit']}, torch {facts['versions']['torch']}, "
        f"{facts['device']}, {facts['threads']} threads, load average {os.getloadavg()[0]:.1f} at the end, "
        f"peak memory {gib:.1f} GiB.\n\n{config.train:,} x {config.features} features, {config.test:,} queries, "
        f"{config.classes} classes. A sweep is all of it: 13 rates for 100 epochs on nine tenths of the features, the choice "
        f"on the last tenth, the chosen rate and the paper's again on everything, and the scores of the queries.\n\n{table}\n"
    )


def timed(job: Callable[[], object]) -> tuple[float, float]:
    """(wall, CPU) seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    job()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    run(main)
