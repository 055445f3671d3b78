"""Which samples, in which order: a pure function of (seed, epoch), so that resuming is arithmetic.

The epochs' permutations form one endless stream, and the stream is cut into batches. So a batch is always full (it
may straddle two epochs), nothing is dropped, padded or seen twice, and `batch(step)` needs no memory of earlier
steps. The batches are the same sets for any number of ranks. Gradients, losses and batch-norm statistics are taken over
all ranks, so who takes which part of a batch changes no result; a rank takes the part that lies together in storage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from manyview.pipeline.compiled import njit
from manyview.pipeline.errors import UserError, nearest, refuse
from manyview.pipeline.philox import below, philox

ORDERS = ("random", "blocks")
BLOCK = 512  # consecutive samples read together in `blocks` order: about 55 MB of ImageNet photos
WINDOW = 64  # blocks mixed with each other
MOST = 2**31 - 1  # samples that are shuffled as one list, of 32 bits each
MIXED = BLOCK * WINDOW  # samples: 32768
SUBSET, BLOCKS, SAMPLES = 0xFFFFFFFD, 0xFFFFFFFE, 0xFFFFFFFF  # counter words no view number reaches


@dataclass(frozen=True)
class Plan:
    """Which rows of the data this rank gets at each step. `n`: samples an epoch, over all ranks; `chosen`: their ids,
    (n,) int64, ascending; None = 0 .. n - 1, which of hundreds of millions need not be written down."""

    n: int
    seed: int
    global_batch: int
    world: int = 1
    rank: int = 0
    order: str = "random"
    chosen: np.ndarray | None = None
    kept: int = 0  # samples beyond the fraction: the only ones of their classes, of which none is left out

    @property
    def ids(self) -> np.ndarray:
        """(n,) int64, ascending: every sample of the plan."""
        return np.arange(self.n) if self.chosen is None else self.chosen

    def after(self, id: int) -> int:
        """The next sample of the plan, in storage; after the last one the first."""
        if self.chosen is None:
            return (id + 1) % self.n
        return int(self.chosen[(np.searchsorted(self.chosen, id) + 1) % self.n])

    def steps(self, epochs: float) -> int:
        """Steps that make `epochs` passes, rounded down, at least 1."""
        return max(1, int(self.n * epochs) // self.global_batch)

    def describe(self) -> str:
        """The order and how well it mixes, measured on (a part of) the first epoch."""
        more = f", {self.kept:,} more than the fraction: each class keeps at least one" if self.kept else ""
        if self.order == "random":
            return f"random (uniform){more}"
        some = min(self.n, 256 * MIXED)  # neighbours come as far apart in a larger set
        quality = shuffle_quality(permutation(some, self.seed, 0, self.order)) * some / self.n
        return f"blocks (neighbours in storage come {quality:.0%} as far apart as in a uniform shuffle){more}"

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """This rank's (ids, epochs) of global step `step`: two (global_batch / world,) int64 arrays, ids ascending.

        Rank r of w takes the r-th w-th of the batch in storage order. So a rank, or a node, reads about the same w-th of
        the storage in every batch and epoch: little more than its share, and its caches hold what it will ask for.
        """
        share, first = self.global_batch // self.world, step * self.global_batch
        epochs = range(first // self.n, (first + self.global_batch - 1) // self.n + 1)
        # The batch as (row, epoch) pairs in storage order, of which this rank takes its part. A pair is one number, row times
        # epochs plus epoch, because numbers can be partitioned: of 131,072 in 2 ms, where sorting pairs takes 13.
        pairs = np.concatenate([
            self._rows(epoch, max(0, first - epoch * self.n), min(self.n, first + self.global_batch - epoch * self.n))
            * len(epochs) + number
            for number, epoch in enumerate(epochs)
        ])  # fmt: skip
        mine = slice(self.rank * share, (self.rank + 1) * share)
        rows, number = np.divmod(np.sort(np.partition(pairs, (mine.start, mine.stop - 1))[mine]), len(epochs))
        return rows if self.chosen is None else self.chosen[rows], epochs[0] + number

    def _rows(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Places `start` .. `stop - 1` in the order of an epoch: int64. In `blocks` order no more than their windows are
        worked out; a random order has no beginning to work out alone."""
        if self.order == "random":
            return permutation(self.n, self.seed, epoch)[start:stop].astype(np.int64)
        numbers = range(start // MIXED, (stop - 1) // MIXED + 1)
        rows = np.concatenate([_window(self.n, self.seed, epoch, number) for number in numbers])
        return rows[start - numbers[0] * MIXED : stop - numbers[0] * MIXED].astype(np.int64)

    @property
    def ahead(self) -> int:
        """Steps by which storage should know what comes: a window's in `blocks` order."""
        return 4 if self.order == "random" else max(1, min(MIXED, self.n) // self.global_batch)

    def reading(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """This rank's ids of steps `start` .. `stop - 1` in the order in which storage should fetch them, (B,) a step.

        Each `ahead` steps' ids are sorted: in `blocks` order these are a window's, which lie side by side. So who
        fetches `ahead` steps early reads whole blocks, in sequence, and has every sample when its batch comes.
        """
        for first in range(start, stop, self.ahead):
            steps = range(first, min(first + self.ahead, stop))
            yield from np.sort(np.concatenate([self.batch(step)[0] for step in steps])).reshape(len(steps), -1)


@dataclass(frozen=True)
class InOrder:
    """Every sample once an epoch, in storage order: this rank's part of them, in batches of `size`, of which the last ones are
    short. All ranks have as many batches, and none is empty."""

    n: int
    size: int
    world: int = 1
    rank: int = 0
    ahead = 4

    def __post_init__(self) -> None:
        if self.n < self.world:
            raise UserError(f"{self.n} images are too few for {self.world} processes")

    def steps(self, epochs: int) -> int:
        return epochs * math.ceil(math.ceil(self.n / self.world) / self.size)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """This rank's (ids, epochs) of a step, as `Plan.batch`; every epoch is the first one again, with the same views."""
        share, more = divmod(self.n, self.world)
        first, share = self.rank * share + min(self.rank, more), share + (self.rank < more)
        steps = self.steps(1)
        step %= steps
        # One is left for each later batch.
        start, stop = (min(k * self.size, share - (steps - k)) for k in (step, step + 1))
        return np.arange(first + start, first + stop), np.zeros(stop - start, np.int64)

    def reading(self, start: int, stop: int) -> Iterator[np.ndarray]:
        return (self.batch(step)[0] for step in range(start, stop))

    def after(self, id: int) -> int:
        return (id + 1) % self.n


def plan(
    labels: np.ndarray | int,
    *,
    seed: int,
    batch: int,
    fraction: float = 1.0,
    world: int = 1,
    rank: int = 0,
    order: str = "random",
) -> Plan:
    """The plan for a set with these labels ((n,) integers, -1 = unlabelled, or just n).

    `batch` is the global batch. `fraction` keeps a nested, class-balanced subset (see `subset`).
    """
    n = int(labels) if isinstance(labels, int | np.integer) else len(labels)
    errors = []
    if not n:
        errors.append("the data has no samples")
    if not 0 < fraction <= 1:
        errors.append(f"fraction must be in (0, 1], not {fraction:g}")
    if batch < 1 or batch % world:
        errors.append(
            f"batch {batch} does not divide among {world} processes; nearest: {max(1, batch // world) * world}"
        )
    if n > MOST and (order == "random" or fraction < 1):
        errors.append(
            f"{n:,} samples are more than {MOST:,}: only order blocks, of all of them, has no list of that length"
        )
    if order not in ORDERS:
        errors.append(nearest("order", order, ORDERS))
    if seed < 0:
        errors.append(f"seed must not be negative, not {seed}")
    if not 0 <= rank < world:
        errors.append(f"rank {rank} is not in 0..{world - 1}")
    refuse(errors)
    if fraction == 1:
        return Plan(n, seed, batch, world, rank, order)
    labels = np.full(n, -1) if np.ndim(labels) == 0 else np.asarray(labels)
    chosen = subset(labels, fraction, seed)
    counts = np.bincount(labels - labels.min())
    kept = int(((counts > 0) & (counts * fraction < 0.5)).sum())
    return Plan(len(chosen), seed, batch, world, rank, order, chosen, kept)


def subset(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Ids of a random part of the data, ascending: of each class (unlabelled samples count as one) its rounded share,
    at least one. Nested: for the same seed a smaller fraction is inside a larger one."""
    classes = (labels - np.min(labels)).astype(np.int32)
    counts = np.bincount(classes)
    quota = np.where(counts > 0, np.maximum(1, np.floor(counts * fraction + 0.5)), 0).astype(np.int64)
    return np.flatnonzero(_take(_shuffled(len(labels), seed, 0, SUBSET), classes, quota))


@lru_cache(maxsize=3)
def permutation(n: int, seed: int, epoch: int, order: str = "random") -> np.ndarray:
    """The order of epoch `epoch`: (n,) integers, read-only. `blocks` shuffles blocks of neighbours, then the samples
    inside each window of blocks, so that only a window's part of the storage is being read at any time."""
    if order == "random":
        result = _shuffled(n, seed, epoch, SAMPLES)
    else:
        result = np.concatenate([_window(n, seed, epoch, number) for number in range(-(-n // MIXED))])
    result.flags.writeable = False
    return result


@lru_cache(maxsize=16)
def _window(n: int, seed: int, epoch: int, number: int) -> np.ndarray:
    """Window `number` of an epoch in `blocks` order: places number * MIXED .. of it, (MIXED,) int64, the last one shorter.

    The set's last block may be short; windows after it begin so many samples late, and take them from the next block.
    """
    blocks, short = _blocks(n, seed, epoch)
    some = blocks[number * WINDOW : (number + 1) * WINDOW + 1]
    ids = (some[:, None].astype(np.int64) * BLOCK + np.arange(BLOCK)).ravel()
    late = -n % BLOCK if short < number * WINDOW else 0
    ids = ids[ids < n][late : late + MIXED]
    return ids[_shuffled(len(ids), seed, epoch, SAMPLES, number)]


@lru_cache(maxsize=3)
def _blocks(n: int, seed: int, epoch: int) -> tuple[np.ndarray, int]:
    """The order of the blocks, and where in it the set's last one comes."""
    blocks = _shuffled(-(-n // BLOCK), seed, epoch, BLOCKS)
    return blocks, int(np.argmax(blocks))


def shuffle_quality(order: np.ndarray) -> float:
    """How far apart neighbours in storage come in `order`, as a share of what a uniform shuffle gives: 1 = uniform,
    near 0 = sequential. Neighbours in storage often share a class, so this is what keeps batches mixed."""
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    return float(np.abs(np.diff(place)).mean() / (len(order) / 3)) if len(order) > 1 else 1.0


@njit
def _shuffled(n, seed, epoch, stream, part=0):
    """Fisher-Yates on 0..n-1 with Philox: uniform, and the same in every version of every library."""
    order = np.arange(n, dtype=np.int32)
    i = n - 1
    while i > 0:
        numbers = philox(seed, i, epoch, stream, part)
        for x in numbers:
            if i > 0:
                j = below(x, i + 1)
                order[i], order[j] = order[j], order[i]
                i -= 1
    return order


@njit
def _take(order, classes, quota):
    keep = np.zeros(len(order), np.bool_)
    for i in order:
        if quota[classes[i]] > 0:
            quota[classes[i]] -= 1
            keep[i] = True
    return keep
