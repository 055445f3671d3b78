"""The training step against a bare one: python tools/profile.py step --data shards/NAME --json FILE

Three ways of doing the same forward, backward and optimizer work, taken in turn in one run:
`bare`    the network on random tensors with the cheapest loss there is
`step`    train.py's step (normalize, autocast, objective, scaler, skip of non-finite steps) on random pixels
`data`    the same step fed by the real pipeline
Ratios are medians over rounds, so a noisy neighbour hits all three.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import tyro

from model import backbone, objective, projector
from pipeline import engines, views
from pipeline.loader import Loader, normalize
from pipeline.plan import plan
from pipeline.store import Store
from training import monitor, optim
from training.step import Encoder, backward


@dataclass
class Args:
    data: Path = Path("shards/cifar10")
    """Shards that feed the third way."""
    backbone: str = "resnet18"
    size: int = 32
    views: int = 4
    batch_size: int = 64
    projector_dim: int = 256
    rounds: int = 8
    """Rounds; each way runs `steps` steps a round."""
    steps: int = 3
    engine: str = "auto"
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    compile: bool = False
    json: Path | None = None
    """Where to write the result."""


def main(argv: list[str]) -> None:
    args = tyro.cli(Args, args=argv, description=__doc__, prog="profile.py step")
    result = measure(args)
    for name, row in result["rows"].items():
        times = f"{row['ms']:9.1f} ms  {row['core_ms']:9.1f} core-ms"
        print(f"{name:6s} {times}  {row['ratio']:.3f}x bare (core {row['core_ratio']:.3f}x)")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def measure(args: Args) -> dict[str, Any]:
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype is not torch.float32)
    torch.manual_seed(0)
    store = Store(args.data)
    trunk: Any = backbone.create(args.backbone, image_size=args.size)
    head = projector.Projector(trunk.num_features, args.projector_dim, args.projector_dim)
    encoder: Any = Encoder(trunk, head).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = optim.create("adamw", encoder, 1e-4, 1e-4)
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0)
    run: Any = torch.compile(encoder) if args.compile else encoder
    loss_of = objective.create("barlow")
    pixels = torch.randint(
        256, (args.views, args.batch_size, args.size, args.size, 3), dtype=torch.uint8, device=device
    )
    pixels = pixels.permute(0, 1, 4, 2, 3)
    floats = normalize(pixels, store.mean, store.std, torch.float32)
    policy = views.policy("simclr", args.views, args.size)
    engine, reason = engines.create(args.engine, store, device)
    loader = Loader(store, plan(len(store), seed=0, batch=args.batch_size), policy, engine, seed=0)
    batches = loader.batches(0, 10**9)

    def bare() -> None:
        with autocast():
            z = run(floats.flatten(0, 1))
        z.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def step(made: list[torch.Tensor]) -> None:
        groups = [normalize(v, store.mean, store.std, torch.float32) for v in made]
        backward(run, groups, loss_of, scaler.scale, False, autocast)
        scaler.step(optimizer)
        scaler.update(1.0)
        optimizer.zero_grad(set_to_none=True)

    ways = {"bare": bare, "step": lambda: step([pixels]), "data": lambda: step(next(batches).views)}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for way in ways.values():  # warm up: kernels, compiler, prefetch
        timed(way, 2, device)
    for _ in range(args.rounds):
        for name, way in ways.items():
            taken[name].append(timed(way, args.steps, device))
    batches.close()  # type: ignore[attr-defined]
    engine.close()
    rows = {}
    for name, times in taken.items():
        rows[name] = {
            "ms": 1e3 * statistics.median(t[0] for t in times),
            "core_ms": 1e3 * statistics.median(t[1] for t in times),
            "ratio": statistics.median(t[0] / b[0] for t, b in zip(times, taken["bare"])),
            "core_ratio": statistics.median(t[1] / b[1] for t, b in zip(times, taken["bare"])),
        }
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    return {
        "rows": rows,
        "settings": settings,
        "engine": f"{engine.name}: {reason}",
        "environment": monitor.environment(device),
    }


def timed(way: Any, steps: int, device: torch.device) -> tuple[float, float]:
    """Wall and CPU seconds a step."""
    process = psutil.Process()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    cpu, wall = sum(process.cpu_times()[:2]), time.perf_counter()
    for _ in range(steps):
        way()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - wall) / steps, (sum(process.cpu_times()[:2]) - cpu) / steps
