"""How long the probes take: python -m evaluation.speed [--write results/evaluation-speed.md]

10,000 queries against 50,000 features of 2048 dimensions and 10 classes, made up: what they are does not change the time.
"""

from __future__ import annotations

import os
import resource
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from evaluation import knn, linear
from pipeline.errors import run
from training.monitor import environment


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
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(config.classes, (config.train,), generator=generator).to(config.device)
    centers = torch.randn(config.classes, config.features, generator=generator)
    x = (centers[labels.cpu()] + 8 * torch.randn(config.train, config.features, generator=generator)).to(config.device)
    q = (8 * torch.randn(config.test, config.features, generator=generator)).to(config.device)
    jobs: dict[str, Callable[[], object]] = {
        "kNN, cosine, k up to 200": lambda: knn.neighbours(x, q, 200),
        "kNN, Euclidean, k = 20": lambda: knn.euclid_invdist(x, labels, q, k=20, classes=config.classes),
        "linear, 13 rates, 100 epochs": lambda: linear.train(x, labels, config.classes, rates=linear.RATES, bn=False),
        "linear with BatchNorm, 13 rates, 100 epochs": lambda: linear.train(
            x, labels, config.classes, rates=linear.RATES, bn=True
        ),
    }
    rows = [(name, *timed(job)) for name, job in jobs.items()]
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    table = "| what | wall s | CPU s |\n| --- | --- | --- |\n" + "\n".join(
        f"| {n} | {w:.1f} | {c:.1f} |" for n, w, c in rows
    )
    print(f"{table}\npeak memory {gib:.1f} GiB")
    if config.write:
        facts = environment(torch.device(config.device))
        size = f"{config.train:,} x {config.features} features, {config.test:,} queries, {config.classes} classes"
        command = shlex.join(["python", "-m", "evaluation.speed", *sys.argv[1:]])
        about = (
            f"Made by `{command}`; commit {facts['commit']}, torch {facts['versions']['torch']}, {facts['device']}, "
        )
        about += (
            f"{facts['threads']} threads, load average {os.getloadavg()[0]:.1f} at the end, peak memory {gib:.1f} GiB."
        )
        config.write.write_text(f"# Speed of the probes\n\n{about}\n\n{size}.\n\n{table}\n")


def timed(job: Callable[[], object]) -> tuple[float, float]:
    """(wall, CPU) seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    job()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    run(main)
