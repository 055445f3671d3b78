"""Plan + store + parameters + engine -> batches, some of them under way while the consumer works."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np
import torch

from manyview.pipeline.engines import Engine, Pending
from manyview.pipeline.errors import UserError
from manyview.pipeline.machine import Memory
from manyview.pipeline.plan import InOrder, Plan
from manyview.pipeline.store import Corrupt, Store
from manyview.pipeline.views import Policy, clean, parameters

CATCH_UP = 4  # steps' reads asked for at a time until storage is `plan.ahead` steps ahead


@dataclass
class Batch:
    step: int
    ids: torch.Tensor  # (B,) int64, as `epochs` and `labels` (-1 = unlabelled)
    epochs: torch.Tensor
    labels: torch.Tensor
    views: list[torch.Tensor]  # per group (V, B, C, S, S), uint8 or uint16, channels-last memory


class Loader:
    """The batches of a plan. The engine belongs to the caller, who closes it.

    A sample that cannot be read is replaced, for good, by the next one of the plan; it is named once on stderr and
    kept in `bad` (id -> its key and the reason). More than `max_bad` (a share of the plan's samples) of them raise
    `UserError`; of several processes each counts what it has met, and what it was told of by `learn`.
    `timings` are seconds so far: `wait` (the consumer waited for a batch), `parameters`, and the engine's own; and the
    number of `batches`. On a GPU also `device_wait`: from the end of what the consumer had queued until the next views are
    there, by the device's clock. The host runs ahead, so that it may wait where the device has work.
    """

    def __init__(
        self,
        store: Store,
        plan: Plan | InOrder,
        policy: Policy,
        engine: Engine,
        *,
        seed: int,
        prefetch: int = 2,
        max_bad: float = 0.01,
    ):
        self.store, self.plan, self.policy, self.engine = store, plan, policy, engine
        self.seed, self.prefetch, self.max_bad = seed, max(1, prefetch), max_bad
        self.bad: dict[int, str] = {}
        self._timings = {"wait": 0.0, "parameters": 0.0, "batches": 0.0}
        self._on_gpu = torch.device(getattr(engine, "device", "cpu")).type == "cuda"
        self._gaps: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def timings(self) -> dict[str, float]:
        while self._gaps and self._gaps[0][1].query():
            before, after = self._gaps.popleft()
            self._timings["device_wait"] = self._timings.get("device_wait", 0.0) + before.elapsed_time(after) / 1e3
        return self._timings | self.engine.seconds

    def _mark(self) -> torch.cuda.Event:
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(torch.cuda.current_stream(self.engine.device))  # type: ignore[attr-defined]
        return mark

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches of steps `start` .. `stop - 1`, in order."""
        waiting: deque = deque()
        step = told = start
        # An engine that holds every image lets storage rest: pages that the system has dropped would be read again for nothing.
        reading = iter(()) if self.engine.holds_all else self.plan.reading(start, stop)
        try:
            while step < stop or waiting:
                before = self._mark() if self._on_gpu else None
                while step < stop and len(waiting) < self.prefetch:
                    for ids in islice(reading, min(CATCH_UP, step + self.plan.ahead - told)):
                        self.store.prefetch(ids)
                        told += 1
                    waiting.append(self._submit(step))
                    step += 1
                batch = self._finish(*waiting.popleft())
                if before:
                    self._gaps.append((before, self._mark()))
                yield batch
        finally:
            for *_, pending in waiting:
                pending.cancel()

    def _submit(self, step: int) -> tuple:
        begun = time.perf_counter()
        ids, epochs = self.plan.batch(step)
        ids = self._replace(ids)
        p = parameters(self.policy, self.seed, epochs, ids, self.store.heights[ids], self.store.widths[ids])
        self._timings["parameters"] += time.perf_counter() - begun
        return step, ids, epochs, self.engine.submit(ids, p)

    def _finish(self, step: int, ids: np.ndarray, epochs: np.ndarray, pending: Pending) -> Batch:
        begun = time.perf_counter()
        while True:
            try:
                views = pending.result()
                break
            except Corrupt as error:
                pending.cancel()
                known = error.id in self.bad
                self.learn({error.id: f"{error.key} ({error.reason})"})
                if not known:
                    print(f"bad sample {error.key} ({error.reason}): replaced from now on", file=sys.stderr)
                step, ids, epochs, pending = self._submit(step)
        self._timings["wait"] += time.perf_counter() - begun
        self._timings["batches"] += 1
        labels = torch.from_numpy(np.asarray(self.store.labels[ids], np.int64))
        return Batch(step, torch.from_numpy(ids), torch.from_numpy(epochs), labels, views)

    def _replace(self, ids: np.ndarray) -> np.ndarray:
        """Bad samples become the next good one of the plan: the same one on every rank and after a resume."""
        if not self.bad:
            return ids
        ids = ids.copy()
        for b in range(len(ids)):
            while int(ids[b]) in self.bad:
                ids[b] = self.plan.after(int(ids[b]))
        return ids

    def learn(self, bad: dict[int, str]) -> None:
        """Replace these samples too, which another process found; UserError above `max_bad`."""
        self.bad |= bad
        if len(self.bad) > self.max_bad * self.plan.n:
            raise UserError(
                f"{self.store.name}: {len(self.bad)} bad samples are more than --max-bad {self.max_bad:g} of "
                f"{self.plan.n}; the last one is {list(self.bad.values())[-1]}: write the shards again"
            )
        if len(self.bad) >= self.plan.n:
            raise UserError(f"{self.store.name}: not one of {self.plan.n} samples can be read")


_MEMORY = Memory()


def normalize(views: torch.Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """(x - mean) / std, mean and std of the views' own values, a channel, on their device; (..., C, S, S), channels-last memory.

    Along rows of C S numbers: a kernel that repeats three numbers spends two to four times as long on the CPU.
    """
    width = views.shape[-1]
    scale, shift = _rows_of(tuple(mean), tuple(std), width, views.device)
    pixels = views.movedim(-3, -1).flatten(-2)
    if pixels.device.type == "cpu":
        rows = torch.from_numpy(_MEMORY.empty(tuple(pixels.shape), np.float32)).copy_(pixels)
    else:
        rows = pixels.to(torch.float32, copy=True)  # torch keeps a device's memory by itself
    torch.addcmul(shift, rows, scale, out=rows)
    return rows.unflatten(-1, (width, -1)).movedim(-1, -3).to(dtype)


@lru_cache
def _rows_of(mean: tuple, std: tuple, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift of a row. Kept: on a GPU each would be a copy from the host, and that waits for all work queued."""
    scale = torch.tensor([1 / s for s in std], device=device, dtype=torch.float32)
    shift = torch.tensor([-m / s for m, s in zip(mean, std)], device=device, dtype=torch.float32)
    return scale.repeat(width), shift.repeat(width)


def clean_views(
    store: Store,
    engine: Engine,
    size: int,
    ids: np.ndarray,
    crop_ratio: float = 1.0,
    say: Callable[[str], None] = lambda why: None,
) -> tuple[np.ndarray, torch.Tensor]:
    """One centre view of each of these images that can be read, the others told to `say`: (ids (B,), views (B, C, S, S))."""
    while len(ids):
        try:
            (group,) = engine(ids, clean(size, store.heights[ids], store.widths[ids], crop_ratio))
            return ids, group[0]
        except Corrupt as error:
            ids = ids[ids != error.id]
            say(f"{error.key}: {error.reason}")
    return ids, torch.from_numpy(np.empty((0, store.layout.channels, size, size), store.layout.dtype))
