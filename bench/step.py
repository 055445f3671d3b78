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

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from manyview.bench import output, workload
from manyview.bench.end_to_end import ENDLESS
from manyview.bench.harness import Call, Spent, interleaved, interval, spent
from manyview.bench.workload import Setup
from manyview.pipeline import engines
from manyview.training import setup
from manyview.training.config import Config


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
    args = output.parse(Args, argv, __doc__, "step", views=2, batch_size=2, projector_dim=1, size=1, rounds=1, steps=1)
    result = measure(args, argv)
    for name, row in result["rows"].items():
        low, high = row["interval"]
        print(f"{name:8s} {row['ms']:9.1f} ms  {row['core_ms']:9.1f} core-ms  {row['ratio']:.3f}x bare [{low:.3f}, {high:.3f}]"
              f" (core {row['core_ratio']:.3f}x)")  # fmt: skip
    output.write(args.json, result)


def measure(args: Args, argv: list[str]) -> dict[str, Any]:
    device = engines.device_of(args.device)
    precision = "bf16" if device.type == "cuda" else "fp32"
    asked = {key: value for key, value in asdict(args).items() if key in Setup.__dataclass_fields__}
    work = workload.build(Setup(**asked | {"split": "train", "precision": precision, "compile": False}))
    training: Any = work.training
    shape = (args.views, args.batch_size, args.size, args.size, 3)
    pixels = torch.randint(256, shape, dtype=torch.uint8, device=device).permute(0, 1, 4, 2, 3)
    floats = work.normalized([pixels])[0]
    batches = work.loader().batches(0, ENDLESS)

    def bare() -> None:
        with training.autocast():
            z = training.model(floats.flatten(0, 1))
        z.square().mean().backward()
        training.optimizer.step()
        training.optimizer.zero_grad(set_to_none=True)

    ways: dict[str, Call] = {"bare": bare, "step": lambda: work.step([pixels])}
    ways["data"] = lambda: work.step(next(batches).views)
    if args.compile:
        cfg = Config(backbone=args.backbone, projector_dim=args.projector_dim, precision=precision, compile=True)
        compiled = replace(work, training=setup.create(cfg, args.size, device))
        ways["compiled"] = lambda: compiled.step([pixels])

    def timed(way: Call, steps: int = args.steps) -> Spent:
        return spent(lambda: [way() for _ in range(steps)], device) / steps

    first = {name: timed(way, 2).wall for name, way in ways.items()}  # warm up: kernels, compiler, prefetch
    taken = interleaved(ways, args.rounds, timed, shuffled=True)
    batches.close()  # type: ignore[attr-defined]
    work.close()
    return {
        "rows": {name: summary(times, taken["bare"]) for name, times in taken.items()}, "settings": output.settings(args),
        "engine": f"{work.engine.name}: {work.engine_reason}", "first_steps_s": first,
        "environment": output.environment(device, "step", argv),
    }  # fmt: skip


def summary(times: list[Spent], bare: list[Spent]) -> dict[str, Any]:
    """Medians, and the median ratio to `bare` of the same round with its interval."""
    wall = [t.wall / b.wall for t, b in zip(times, bare)]
    return {
        "ms": 1e3 * median(t.wall for t in times), "core_ms": 1e3 * median(t.core for t in times),
        "ratio": median(wall), "interval": interval(wall),
        "core_ratio": median(t.core / b.core for t, b in zip(times, bare)),
    }  # fmt: skip
