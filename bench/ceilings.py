"""What each stage costs when it runs alone, through the pipeline's own functions.

One round takes every stage once, so a noisy moment hits all of them; a stage's cost is its median over rounds. The
steps of a view are told apart by taking them away: the engine runs on the same images with and without blur, and the
difference is what blur costs. So this works for any engine, and finds what a stage costs where it really runs.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np
import torch

from manyview.bench import workload
from manyview.bench.host import Spent, interval, now, spent, synchronize
from manyview.bench.workload import Training, Workload, draw
from manyview.pipeline import codec, views
from manyview.pipeline.loader import normalize
from manyview.pipeline.views import ViewParameters
from manyview.training.step import embed, local_views

SMALL_SECONDS = 0.002  # of a stage that is so short that it is repeated
OPERATIONS = ("solarize", "blur", "color", "flip")  # taken away in this order


@dataclass
class Cost:
    """One stage alone. `where` it runs: `engine` (the engine's threads, which are cores or the device), `main` (the
    thread that trains, on the cores), `device`, `copy` (host to device), `network`. `core` and `wall`: milliseconds a
    unit, one a round; a unit is a `per`: image, view or step."""

    name: str
    where: str
    per: str
    core: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    @property
    def core_ms(self) -> float:
        return max(0.0, median(self.core))

    @property
    def wall_ms(self) -> float:
        return max(0.0, median(self.wall))

    def units(self, n_views: int, batch: int) -> float:
        """Units an image."""
        return {"image": 1.0, "view": float(n_views), "step": 1 / batch}[self.per]

    def add(self, taken: Spent, units: float) -> None:
        self.core.append(1e3 * taken.core / units)
        self.wall.append(1e3 * taken.wall / units)

    def to_json(self) -> dict[str, Any]:
        digits = lambda values: [float(f"{v:.5g}") for v in values]  # noqa: E731
        return asdict(self) | {
            "core": digits(self.core),
            "wall": digits(self.wall),
            "core_ms": self.core_ms,
            "core_interval": digits(interval(self.core)),
        }


def from_json(row: dict[str, Any]) -> Cost:
    return Cost(row["name"], row["where"], row["per"], row["core"], row["wall"])


class Ceilings:
    """`round()` measures everything once more; `costs` has what was found so far, in the order of the pipeline."""

    def __init__(self, work: Workload, run_seconds: float):
        """`run_seconds`: about how long one run of the engine takes; it decides on how many images."""
        self.work = work
        self.rng = np.random.default_rng(work.setup.seed)
        self.pool = ThreadPoolExecutor(work.threads, "ceiling")
        self.parallel: list[float] = []  # core seconds a second of the engine alone: how many cores it really fills
        on_device = work.device.type == "cuda"
        compute = "device" if on_device else "main"
        rows = [
            ("index", "main", "image"), ("plan", "main", "image"), ("parameters", "main", "view"),
            ("read", "engine", "image"), ("decode", "engine", "image"), ("dispatch", "engine", "image"),
            ("resize", "engine", "view"), *((name, "engine", "view") for name in reversed(OPERATIONS)),
        ]  # fmt: skip
        if on_device and work.engine.name == "cpu":
            rows.append(("copy", "copy", "view"))
        if work.training is not None:
            rows += [("normalize", compute, "view"), ("forward", compute, "view"), ("backward", compute, "view"),
                     ("objective", compute, "image"), ("optimizer", compute, "step")]  # fmt: skip
        else:
            rows.append(("normalize", compute, "view"))
        self.cost = {name: Cost(name, where, per) for name, where, per in rows}
        self.repeats: dict[str, int] = {}
        self.images = self._images(run_seconds)
        made = work.engine(*draw(work, work.plan.ids[: work.batch]))
        self.made = [torch.randint_like(group, 256) for group in made]
        dim = work.setup.projector_dim
        self.z = [torch.randn(len(group), group.shape[1], dim, device=work.device) for group in self.made]

    @property
    def costs(self) -> list[Cost]:
        return list(self.cost.values())

    def close(self) -> None:
        self.pool.shutdown()

    def round(self) -> None:
        ids = self.rng.choice(self.work.plan.ids, self.images)
        self._planning(self.rng.choice(self.work.plan.ids, self.work.batch))
        self._engine(ids)
        self._step()

    def _images(self, run_seconds: float) -> int:
        if self.work.engine.name != "cpu":  # batches are its unit of work, so as many as in the composed run
            return self.work.batch
        few = self.work.plan.ids[:8]
        taken = spent(lambda: self.work.engine(*draw(self.work, few)), self.work.device).wall / len(few)
        return int(np.clip(run_seconds / taken, 16, 2048))

    def _repeat(self, name: str, call: Callable[[], Any], units: float) -> None:
        """Measure something short: often enough in a row to be seen."""
        if name not in self.repeats:
            call()
            once = max(1e-7, spent(call, self.work.device).wall)
            self.repeats[name] = max(1, int(SMALL_SECONDS / once))
        times = self.repeats[name]

        def loop() -> None:
            for _ in range(times):
                call()

        self.cost[name].add(spent(loop, self.work.device), units * times)

    def _planning(self, ids: np.ndarray) -> None:
        store, plan, step = self.work.store, self.work.plan, int(self.rng.integers(1000))
        self._repeat("index", lambda: (store.heights[ids], store.widths[ids], store.labels[ids]), len(ids))
        # As the loader does: the batch to make, and the same number of ids for storage to fetch.
        self._repeat("plan", lambda: (plan.batch(step), next(plan.reading(step, step + 1))), plan.global_batch)
        sizes, epochs = (np.asarray(store.heights[ids]), np.asarray(store.widths[ids])), np.zeros(len(ids), np.int64)
        seed, policy = self.work.setup.seed, self.work.policy
        drawing = lambda: workload.parameters(policy, seed, epochs, ids, *sizes)  # noqa: E731
        self._repeat("parameters", drawing, len(ids) * policy.views)

    def _in_threads(self, name: str, call: Callable[[Any], Any], items: list[Any]) -> Spent:
        """`call` on every item, in as many threads as the engine has; over and over where that is short."""

        def some(part: list[Any]) -> None:
            for _ in range(times):
                for item in part:
                    call(item)

        parts, times = [items[i :: self.work.threads] for i in range(self.work.threads)], 1
        if name not in self.repeats:
            once = spent(lambda: list(self.pool.map(some, parts)), self.work.device).wall
            self.repeats[name] = 1 + int(2 * SMALL_SECONDS / once)
        times = self.repeats[name]
        taken = spent(lambda: list(self.pool.map(some, parts)), self.work.device)
        return Spent(taken.wall / times, taken.core / times)

    def _engine(self, ids: np.ndarray) -> None:
        """read and decode on their own; then the whole engine, and again with one step of a view less each time."""
        work, n, cost = self.work, len(ids), self.cost
        n_views = work.policy.views
        _, drawn = draw(work, ids, epoch=int(self.rng.integers(100)))
        numbers = [int(i) for i in ids]
        read = self._in_threads("read", work.store.read, numbers)
        cost["read"].add(read, n)
        decode = Spent(0, 0)
        if work.engine.name == "cpu":
            decode = self._in_threads("decode", codec.decode, [work.store.read(i) for i in numbers])
        whole = spent(lambda: work.engine(ids, drawn), work.device)
        self.parallel.append(whole.core / whole.wall)
        for name in OPERATIONS:
            less = without(drawn, name)
            if less is drawn:  # the policy has none of it
                cost[name].add(Spent(0, 0), 1)
                continue
            drawn = less
            rest = spent(lambda p=drawn: work.engine(ids, p), work.device)  # type: ignore[misc]
            cost[name].add(whole - rest, n * n_views)
            whole = rest
        tiny = one_tiny_view(work, ids)
        rest = spent(lambda: work.engine(ids, tiny), work.device)
        cost["resize"].add(whole - rest, n * n_views)
        if work.engine.name == "cpu":
            cost["decode"].add(decode, n)
            cost["dispatch"].add(rest - read - decode, n)
        else:  # it reads and decodes in one go, in its own way
            cost["decode"].add(rest - read, n)
            cost["dispatch"].add(Spent(0, 0), n)

    def _step(self) -> None:
        work, cost = self.work, self.cost
        rows = sum(len(group) * group.shape[1] for group in self.made)
        if "copy" in cost:
            pinned = [torch.empty_like(group, device="cpu").pin_memory() for group in self.made]
            cost["copy"].add(spent(lambda: [p.to(work.device, non_blocking=True) for p in pinned], work.device), rows)
        if work.training is None:
            mean, std = work.store.mean, work.store.std
            self._repeat("normalize", lambda: [normalize(g, mean, std, torch.float32) for g in self.made], rows)
            return
        for name, taken in self._training(work.training):
            units = {"view": rows, "image": work.batch, "step": 1}[cost[name].per]
            cost[name].add(taken, units)

    def _training(self, training: Training) -> list[tuple[str, Spent]]:
        """One step, part by part."""
        device, taken = self.work.device, []

        def part(name: str, call: Callable[[], Any]) -> Any:
            synchronize(device)
            begun = now()
            result = call()
            synchronize(device)
            taken.append((name, now() - begun))
            return result

        def forward() -> list[torch.Tensor]:
            with training.autocast():
                return [embed(training.encoder, group, False) for group in groups]

        def objective() -> torch.Tensor:
            z = [one.detach().requires_grad_() for one in self.z]
            loss = training.loss_of(torch.cat(z), local=local_views(self.made)).total
            training.update.scale(loss).backward()
            return loss

        groups = part("normalize", lambda: training.normalized(self.made))
        z = part("forward", forward)
        gradient = [torch.randn_like(one) for one in z]
        part("backward", lambda: torch.autograd.backward(z, gradient))
        loss = part("objective", objective)
        part("optimizer", lambda: training.update(loss))
        return taken


def without(drawn: ViewParameters, name: str) -> ViewParameters:
    """The same views without one of their steps; `drawn` itself where there is none of it."""
    field, nothing = {"blur": ("sigma", 0), "color": ("color", np.eye(3, 4))}.get(name, (name, 0))
    if (drawn.views[field] == nothing).all():
        return drawn
    views = drawn.views.copy()
    views[field] = nothing
    return replace(drawn, views=views)


def one_tiny_view(work: Workload, ids: np.ndarray) -> ViewParameters:
    """One view of 8 pixels from a box of 8: what is left is reading, decoding and the engine's own work."""
    heights, widths = work.store.heights[ids], work.store.widths[ids]
    tiny = views.clean(8, heights, widths)
    tiny.views["box"][..., 2], tiny.views["box"][..., 3] = np.minimum(8, heights), np.minimum(8, widths)
    return tiny
