"""The training step against a bare one: python tools/profile.py step --data shards/NAME --json FILE

Ways of doing the same forward, backward and optimizer work, taken in turn in one run:
`bare`      the network on random tensors with the cheapest loss there is
`step`      train.py's step (normalize, autocast, objective, scaler, skip of non-finite steps) on random pixels
`data`      the same step fed by the real pipeline
`compiled`  with --compile: `step` through torch.compile
Ratios to `bare` are medians over rounds, each in another order, so a noisy neighbour hits all; the interval is the
bootstrap's 95 % of that median.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import tyro

from manyview.model import backbone, objective, projector
from manyview.pipeline import engines, views
from manyview.pipeline.loader import Loader, normalize
from manyview.pipeline.machine import tune
from manyview.pipeline.plan import plan
from manyview.pipeline.store import Store
from manyview.training import monitor, optim
from manyview.training.step import PretrainingModel, Update, backward


@dataclass
class Args:
    data: Path = Path("shards/cifar10")
    """Shards that feed the third way."""
    backbone: str = "resnet18"
    size: int = 32
    views: int = 4
    batch_size: int = 64
    projector_dim: int = 256
    rounds: int = 30
    """Rounds; each way runs `steps` steps a round: several on a GPU, where in training the host works steps ahead and only
    a log line waits. With one step a round the GPU would stand still while the host draws the next batch."""
    steps: int = 10 if torch.cuda.is_available() else 1
    engine: str = "auto"
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    compile: bool = False
    """Measure the compiled step too."""
    json: Path | None = None
    """Where to write the result."""


def main(argv: list[str]) -> None:
    args = tyro.cli(Args, args=argv, description=__doc__, prog="profile.py step")
    result = measure(args)
    for name, row in result["rows"].items():
        times = f"{row['ms']:9.1f} ms  {row['core_ms']:9.1f} core-ms"
        low, high = row["interval"]
        print(f"{name:8s} {times}  {row['ratio']:.3f}x bare [{low:.3f}, {high:.3f}] (core {row['core_ratio']:.3f}x)")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def measure(args: Args) -> dict[str, Any]:
    device = engines.device_of(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype is not torch.float32)
    tune(device)
    torch.manual_seed(0)
    store = Store(args.data)
    trunk: Any = backbone.create(args.backbone, image_size=args.size)
    head = projector.Projector(trunk.num_features, args.projector_dim, args.projector_dim)
    encoder: Any = PretrainingModel(trunk, head).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = optim.create("adamw", encoder, 1e-4, 1e-4)
    update = Update(encoder, optimizer, dtype)
    compiled: Any = torch.compile(encoder) if args.compile else None
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
            z = encoder(floats.flatten(0, 1))
        z.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def step(made: list[torch.Tensor], run: Any = encoder) -> None:
        groups = [normalize(v, store.mean, store.std, torch.float32) for v in made]
        loss, _ = backward(run, groups, loss_of, update.scale, False, autocast)
        update(loss.total)

    ways = {"bare": bare, "step": lambda: step([pixels]), "data": lambda: step(next(batches).views)}
    if compiled is not None:
        ways["compiled"] = lambda: step([pixels], compiled)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    first = {name: timed(way, 2, device)[0] for name, way in ways.items()}  # warm up: kernels, compiler, prefetch
    order = random.Random(0)
    for _ in range(args.rounds):
        for name in order.sample(list(ways), len(ways)):
            taken[name].append(timed(ways[name], args.steps, device))
    batches.close()  # type: ignore[attr-defined]
    engine.close()
    rows = {name: summary(times, taken["bare"]) for name, times in taken.items()}
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    return {
        "rows": rows,
        "settings": settings,
        "engine": f"{engine.name}: {reason}",
        "first_steps_s": first,
        "environment": monitor.environment(device),
    }


def summary(times: list[tuple[float, float]], bare: list[tuple[float, float]]) -> dict[str, Any]:
    """Medians, and the median ratio to `bare` of the same round with its interval."""
    wall, core = (np.array([t[i] / b[i] for t, b in zip(times, bare)]) for i in (0, 1))
    again = np.median(np.random.default_rng(0).choice(wall, (2000, len(wall))), axis=1)
    return {
        "ms": 1e3 * median(t[0] for t in times),
        "core_ms": 1e3 * median(t[1] for t in times),
        "ratio": float(np.median(wall)),
        "interval": [float(x) for x in np.percentile(again, (2.5, 97.5))],
        "core_ratio": float(np.median(core)),
    }


def timed(way: Any, steps: int, device: torch.device) -> tuple[float, float]:
    """Wall and CPU seconds a step."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(steps):
        way()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps
