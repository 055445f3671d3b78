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
from manyview.bench.harness import Call, Spent, interval, spent
from manyview.bench.workload import Workload
from manyview.pipeline import codec, views
from manyview.pipeline.views import ViewParameters
from manyview.training.setup import Training
from manyview.training.step import embed, local_views

SMALL_SECONDS = 0.002  # of a stage that is so short that it is repeated
OPERATIONS = ("solarize", "blur", "color", "flip")  # taken away in this order
STAGES = {
    "index": ("main", "image"), "plan": ("main", "image"), "parameters": ("main", "view"),
    "read": ("engine", "image"), "decode": ("engine", "image"), "dispatch": ("engine", "image"),
    "resize": ("engine", "view"), **dict.fromkeys(reversed(OPERATIONS), ("engine", "view")),
    "copy": ("copy", "view"), "normalize": ("compute", "view"), "forward": ("compute", "view"),
    "backward": ("compute", "view"), "objective": ("compute", "image"), "optimizer": ("compute", "step"),
}  # fmt: skip
TRAINED = ("forward", "backward", "objective", "optimizer")


@dataclass
class Cost:
    """One stage alone. `where` it runs: `engine` (the engine's threads, which are cores or the device), `main` (the
    thread that trains, on the cores), `device`, `copy` (host to device). `core` and `wall`: milliseconds a
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
        values = {"core": self.core, "wall": self.wall, "core_interval": interval(self.core)}
        rounded = {key: [float(f"{v:.5g}") for v in numbers] for key, numbers in values.items()}
        return asdict(self) | rounded | {"core_ms": self.core_ms}


class StageCosts:
    """`round()` measures everything once more; `costs` has what was found so far, in the order of the pipeline."""

    def __init__(self, work: Workload, run_seconds: float):
        """`run_seconds`: about how long one run of the engine takes; it decides on how many images."""
        self.work = work
        self.rng = np.random.default_rng(work.setup.seed)
        self.pool = ThreadPoolExecutor(work.threads, "stage")
        self.parallel: list[float] = []  # core seconds a second of the engine alone: how many cores it really fills
        self.repeats: dict[str, int] = {}
        on_device = work.device.type == "cuda"
        left_out = [] if on_device and work.engine.name == "cpu" else ["copy"]
        left_out += [] if work.training else TRAINED
        compute = "device" if on_device else "main"
        self.cost = {name: Cost(name, compute if where == "compute" else where, per)
                     for name, (where, per) in STAGES.items() if name not in left_out}  # fmt: skip
        self.images = self._images(run_seconds)
        self.batch = [torch.randint_like(group, 256) for group in work.engine(*work.draw(work.plan.ids[: work.batch]))]
        dim = work.setup.projector_dim
        self.z = [torch.randn(len(group), group.shape[1], dim, device=work.device) for group in self.batch]

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

    def _spent(self, call: Call) -> Spent:
        return spent(call, self.work.device)

    def _images(self, run_seconds: float) -> int:
        if self.work.engine.name != "cpu":  # batches are its unit of work, so as many as end to end
            return self.work.batch
        few = self.work.plan.ids[:8]
        taken = self._spent(lambda: self.work.engine(*self.work.draw(few))).wall / len(few)
        return int(np.clip(run_seconds / taken, 16, 2048))

    def _often(self, name: str, call: Callable[[int], Any]) -> Spent:
        """What `call(1)` takes, from as many repetitions, `call(times)`, as are long enough to be seen."""
        if name not in self.repeats:
            call(1)
            self.repeats[name] = 1 + int(SMALL_SECONDS / max(1e-7, self._spent(lambda: call(1)).wall))
        times = self.repeats[name]
        return self._spent(lambda: call(times)) / times

    def _alone(self, name: str, call: Call, units: float) -> None:
        def loop(times: int) -> None:  # which keeps no result: memory is used again, as in training
            for _ in range(times):
                call()

        self.cost[name].add(self._often(name, loop), units)

    def _in_threads(self, name: str, call: Callable[[Any], Any], items: list[Any]) -> Spent:
        """`call` on every item, in as many threads as the engine has."""
        parts = [items[i :: self.work.threads] for i in range(self.work.threads)]

        def some(part: list[Any], times: int) -> None:
            for item in part * times:
                call(item)

        return self._often(name, lambda times: list(self.pool.map(some, parts, [times] * len(parts))))

    def _planning(self, ids: np.ndarray) -> None:
        store, plan, step = self.work.store, self.work.plan, int(self.rng.integers(1000))
        self._alone("index", lambda: (store.heights[ids], store.widths[ids], store.labels[ids]), len(ids))
        # As the loader does: the batch to make, and the same number of ids for storage to fetch.
        self._alone("plan", lambda: (plan.batch(step), next(plan.reading(step, step + 1))), plan.global_batch)
        sizes, epochs = (np.asarray(store.heights[ids]), np.asarray(store.widths[ids])), np.zeros(len(ids), np.int64)
        seed, policy = self.work.setup.seed, self.work.policy
        n = len(ids) * policy.views
        self._alone("parameters", lambda: workload.parameters(policy, seed, epochs, ids, *sizes), n)

    def _engine(self, ids: np.ndarray) -> None:
        """read and decode on their own; then the whole engine, and again with one step of a view less each time."""
        work, n, cost = self.work, len(ids), self.cost
        n_views = work.policy.views
        _, parameters = work.draw(ids, epoch=int(self.rng.integers(100)))
        numbers = [int(i) for i in ids]
        read = self._in_threads("read", work.store.read, numbers)
        cost["read"].add(read, n)
        decode = None  # where the engine reads and decodes in one go, in its own way
        if work.engine.name == "cpu":
            decode = self._in_threads("decode", codec.decode, [work.store.read(i) for i in numbers])
        whole = self._spent(lambda: work.engine(ids, parameters))
        self.parallel.append(whole.core / whole.wall)
        for name in OPERATIONS:
            less = without(parameters, name)
            if less is parameters:  # the policy has none of it
                cost[name].add(Spent(0, 0), 1)
                continue
            parameters = less
            rest = self._spent(lambda p=parameters: work.engine(ids, p))  # type: ignore[misc]
            cost[name].add(whole - rest, n * n_views)
            whole = rest
        tiny = one_tiny_view(work, ids)
        rest = self._spent(lambda: work.engine(ids, tiny))
        cost["resize"].add(whole - rest, n * n_views)
        cost["decode"].add(decode or rest - read, n)
        cost["dispatch"].add(rest - read - decode if decode else Spent(0, 0), n)

    def _step(self) -> None:
        work, cost = self.work, self.cost
        rows = sum(len(group) * group.shape[1] for group in self.batch)
        if "copy" in cost:
            pinned = [torch.empty_like(group, device="cpu").pin_memory() for group in self.batch]
            cost["copy"].add(self._spent(lambda: [p.to(work.device, non_blocking=True) for p in pinned]), rows)
        if work.training is None:
            self._alone("normalize", lambda: work.normalized(self.batch), rows)
            return
        self._training(work.training, {"view": rows, "image": work.batch, "step": 1})

    def _training(self, training: Training, units: dict[str, int]) -> None:
        """One step, part by part."""

        def part(name: str, call: Callable[[], Any]) -> Any:
            result: list[Any] = []
            self.cost[name].add(self._spent(lambda: result.append(call())), units[STAGES[name][1]])
            return result[0]

        def forward() -> list[torch.Tensor]:
            with training.autocast():
                return [embed(training.called, group, False) for group in groups]

        def objective() -> torch.Tensor:
            z = [one.detach().requires_grad_() for one in self.z]
            loss = training.objective(torch.cat(z), local=local_views(self.batch)).total
            training.update.scale(loss).backward()
            return loss

        groups = part("normalize", lambda: self.work.normalized(self.batch))
        z = part("forward", forward)
        gradient = [torch.randn_like(one) for one in z]
        part("backward", lambda: torch.autograd.backward(z, gradient))
        loss = part("objective", objective)
        part("optimizer", lambda: training.update(loss))


def without(parameters: ViewParameters, name: str) -> ViewParameters:
    """The same views without one of their steps; `parameters` itself where there is none of it."""
    field, nothing = {"blur": ("sigma", 0), "color": ("color", np.eye(3, 4))}.get(name, (name, 0))
    if (parameters.views[field] == nothing).all():
        return parameters
    views = parameters.views.copy()
    views[field] = nothing
    return replace(parameters, views=views)


def one_tiny_view(work: Workload, ids: np.ndarray) -> ViewParameters:
    """One view of 8 pixels from a box of 8: what is left is reading, decoding and the engine's own work."""
    heights, widths = work.store.heights[ids], work.store.widths[ids]
    tiny = views.clean(8, heights, widths)
    tiny.views["box"][..., 2], tiny.views["box"][..., 3] = np.minimum(8, heights), np.minimum(8, widths)
    return tiny
