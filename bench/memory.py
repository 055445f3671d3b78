"""Peak memory of a training step, whole and in chunks of views: python tools/profile.py memory --csv FILE

Every row is a process of its own, so that one peak does not hide the next: on CUDA the allocator's peak, on the CPU the
growth of the resident set during the step.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import tyro

from manyview.model import backbone, objective, projector
from manyview.pipeline import engines
from manyview.training.step import PretrainingModel, backward, backward_chunked


@dataclass
class Args:
    backbone: str = "resnet18"
    size: int = 32
    batch_size: int = 64
    views: tuple[int, ...] = (2, 4, 8, 16)
    chunks: tuple[int, ...] = (0, 1, 4)
    """Views in the graph at a time; 0 = all."""
    projector_dim: int = 256
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    csv: Path | None = None
    """Where to write the rows."""
    one: tuple[int, int] | None = None
    """Measure one (views, chunk) in this process and print its bytes."""


def main(argv: list[str]) -> None:
    args = tyro.cli(Args, args=argv, description=__doc__, prog="profile.py memory")
    if args.one:
        print(json.dumps(peak(args, *args.one)))
        return
    engines.device_of(args.device)  # here, since what a process of its own says is not shown
    rows = []
    for v in args.views:
        for chunk in args.chunks:
            if chunk >= v:
                continue
            done = subprocess.run(
                [sys.executable, "tools/profile.py", "memory", *argv, "--one", str(v), str(chunk)],
                capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[1],
            )  # fmt: skip
            rows.append(
                {"views": v, "chunk": chunk, "batch": args.batch_size, **json.loads(done.stdout.splitlines()[-1])}
            )
            mib = rows[-1]["peak_bytes"] / 2**20
            print(f"V={v:<3d} chunk {chunk or 'all':<4} {mib:8.0f} MiB  {rows[-1]['seconds']:.2f} s a step")
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def peak(args: Args, views: int, chunk: int) -> dict[str, float]:
    """Peak bytes above the resting state, and seconds, of one step after a small warm-up step."""
    device = engines.device_of(args.device)
    trunk: Any = backbone.create(args.backbone, image_size=args.size)
    head = projector.Projector(trunk.num_features, args.projector_dim, args.projector_dim)
    encoder: Any = PretrainingModel(trunk, head).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=device.type == "cuda")
    loss_of = objective.create("barlow")

    def step(x: torch.Tensor) -> None:
        if chunk:
            backward_chunked(encoder, [x], loss_of, lambda t: t, chunk, autocast)
        else:
            backward(encoder, [x], loss_of, lambda t: t, True, autocast)

    step(torch.randn(2, 2, 3, args.size, args.size, device=device))
    x = torch.randn(views, args.batch_size, 3, args.size, args.size, device=device)
    if device.type == "cuda":
        step(x)  # the first of a shape also loads its kernels
        torch.cuda.synchronize()
    start = time.perf_counter()
    if device.type == "cuda":
        rest = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(x)
        torch.cuda.synchronize()
        top = torch.cuda.max_memory_allocated() - rest
    else:
        with ResidentPeak() as watch:
            step(x)
        top = watch.peak - watch.rest
    return {"peak_bytes": top, "seconds": round(time.perf_counter() - start, 3)}


class ResidentPeak:
    """Highest resident set while inside, sampled every 2 ms."""

    def __enter__(self) -> ResidentPeak:
        self.process = psutil.Process()
        self.rest = self.peak = self.process.memory_info().rss
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(0.002):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.thread.join()
