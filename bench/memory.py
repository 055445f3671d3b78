"""Peak memory of a training step, whole and in chunks of views: python tools/profile.py memory --json FILE

Every row is a process of its own, so that one peak does not hide the next: on CUDA the allocator's peak, on the CPU the
growth of the resident set during the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manyview.bench import output
from manyview.bench.harness import alone, memory, spent, synchronize
from manyview.model import backbone
from manyview.pipeline import engines
from manyview.training import setup
from manyview.training.config import Config


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
    json: Path | None = None
    """Where to write the rows; the same name with .csv gets them too."""


def main(argv: list[str]) -> None:
    args = output.parse(Args, argv, __doc__, "memory", size=1, batch_size=2, views=2, chunks=0, projector_dim=1)
    rows = measure(args)
    output.write(args.json, rows, rows=rows)


def measure(args: Args) -> list[dict[str, Any]]:
    """A row for each number of views and each chunk below it; printed as they come."""
    engines.device_of(args.device)  # what is missing or unknown is said before anything is started
    backbone.create(args.backbone, image_size=args.size)
    rows = []
    for v, chunk in ((v, chunk) for v in args.views for chunk in args.chunks if chunk < v):
        peak_bytes, seconds = alone(peak, args, v, chunk)
        print(f"V={v:<3d} chunk {chunk or 'all':<4} {peak_bytes / 2**20:8.0f} MiB  {seconds:.2f} s a step", flush=True)
        row = {"views": v, "chunk": chunk, "batch": args.batch_size, "peak_bytes": peak_bytes}
        rows.append(row | {"seconds": round(seconds, 3)})
    return rows


def peak(args: Args, views: int, chunk: int) -> tuple[int, float]:
    """Peak bytes above the resting state, and seconds, of one step after a small warm-up step."""
    device = engines.device_of(args.device)
    cfg = Config(backbone=args.backbone, projector_dim=args.projector_dim, bn="view", view_chunk=chunk,
                 precision="bf16" if device.type == "cuda" else "fp32")  # fmt: skip
    training = setup.create(cfg, args.size, device)

    def step(n_views: int, images: int) -> Callable[[], object]:
        x = torch.randn(n_views, images, 3, args.size, args.size, device=device)
        return lambda: training.gradients([x])

    step(2, 2)()
    measured = step(views, args.batch_size)
    if device.type != "cuda":
        rest = memory()["VmRSS"]
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        seconds = spent(measured).wall
        return memory()["VmHWM"] - rest, seconds
    measured()  # the first of a shape also loads its kernels
    synchronize(device)
    rest = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds = spent(measured, device).wall
    return torch.cuda.max_memory_allocated() - rest, seconds
