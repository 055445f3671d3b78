"""Which samples, in which order: a pure function of (seed, epoch), so that resuming is arithmetic.

The epochs' permutations form one endless stream, and the stream is cut into batches. So a batch is always full (it
may straddle two epochs), nothing is dropped, padded or seen twice, and `batch(step)` needs no memory of earlier
steps. A rank takes a contiguous slice of the global batch: the batches are the same sets for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numba import njit

from pipeline.errors import UserError, nearest
from pipeline.philox import below, philox

ORDERS = ("random", "blocks")
BLOCK = 512  # consecutive samples read together in `blocks` order: about 55 MB of ImageNet photos
WINDOW = 64  # blocks mixed with each other: 32768 samples
SUBSET, BLOCKS, SAMPLES = 0xFFFFFFFD, 0xFFFFFFFE, 0xFFFFFFFF  # counter words no view number reaches


@dataclass(frozen=True)
class Plan:
    """Which rows of the data this rank gets at each step. `ids`: (n,) int64, the subset, ascending."""

    ids: np.ndarray
    seed: int
    global_batch: int
    world: int = 1
    rank: int = 0
    order: str = "random"

    @property
    def n(self) -> int:
        """Samples an epoch, over all ranks."""
        return len(self.ids)

    def steps(self, epochs: float) -> int:
        """Steps that make `epochs` passes, rounded down, at least 1."""
        return max(1, int(self.n * epochs) // self.global_batch)

    def describe(self) -> str:
        """The order and how well it mixes, measured on the first epoch."""
        if self.order == "random":
            return "random (uniform)"
        quality = shuffle_quality(permutation(self.n, self.seed, 0, self.order))
        return f"blocks (neighbours in storage come {quality:.0%} as far apart as in a uniform shuffle)"

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """This rank's (ids, epochs) of global step `step`: two (global_batch / world,) int64 arrays."""
        share = self.global_batch // self.world
        first = step * self.global_batch + self.rank * share
        position = np.arange(first, first + share, dtype=np.int64)
        epochs, within = np.divmod(position, self.n)
        rows = np.empty(share, np.int64)
        for epoch in np.unique(epochs):
            rows[epochs == epoch] = permutation(self.n, self.seed, int(epoch), self.order)[within[epochs == epoch]]
        return self.ids[rows], epochs

    @property
    def ahead(self) -> int:
        """Steps by which storage should know what comes: a window's in `blocks` order."""
        return 4 if self.order == "random" else max(1, min(BLOCK * WINDOW, self.n) // self.global_batch)

    def reading(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """This rank's ids of steps `start` .. `stop - 1` in the order in which storage should fetch them, (B,) a step.

        Each `ahead` steps' ids are sorted: in `blocks` order these are a window's, which lie side by side. So who
        fetches `ahead` steps early reads whole blocks, in sequence, and has every sample when its batch comes.
        """
        for first in range(start, stop, self.ahead):
            steps = range(first, min(first + self.ahead, stop))
            yield from np.sort(np.concatenate([self.batch(step)[0] for step in steps])).reshape(len(steps), -1)


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
    labels = np.full(labels, -1, np.int64) if isinstance(labels, int | np.integer) else np.asarray(labels)
    errors = []
    if not len(labels):
        errors.append("the data has no samples")
    if not 0 < fraction <= 1:
        errors.append(f"fraction must be in (0, 1], not {fraction:g}")
    if batch < 1 or batch % world:
        errors.append(
            f"batch {batch} does not divide among {world} processes; nearest: {max(1, batch // world) * world}"
        )
    if order not in ORDERS:
        errors.append(nearest("order", order, ORDERS))
    if seed < 0:
        errors.append(f"seed must not be negative, not {seed}")
    if not 0 <= rank < world:
        errors.append(f"rank {rank} is not in 0..{world - 1}")
    if errors:
        raise UserError("\n".join(errors))
    ids = np.arange(len(labels)) if fraction == 1 else subset(labels, fraction, seed)
    return Plan(ids, seed, batch, world, rank, order)


def subset(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Ids of a random part of the data, ascending: of each class (unlabelled samples count as one) its rounded share,
    at least one. Nested: for the same seed a smaller fraction is inside a larger one."""
    classes = (labels - np.min(labels)).astype(np.int32)
    counts = np.bincount(classes)
    quota = np.where(counts > 0, np.maximum(1, np.floor(counts * fraction + 0.5)), 0).astype(np.int64)
    return np.flatnonzero(_take(_shuffled(len(labels), seed, 0, SUBSET), classes, quota))


@lru_cache(maxsize=3)
def permutation(n: int, seed: int, epoch: int, order: str = "random") -> np.ndarray:
    """The order of epoch `epoch`: (n,) int32, read-only. `blocks` shuffles blocks of neighbours, then the samples
    inside each window of blocks, so that only a window's part of the storage is being read at any time."""
    result = _shuffled(n, seed, epoch, SAMPLES) if order == "random" else _blocks(n, seed, epoch)
    result.flags.writeable = False
    return result


def _blocks(n: int, seed: int, epoch: int) -> np.ndarray:
    starts = _shuffled((n + BLOCK - 1) // BLOCK, seed, epoch, BLOCKS) * BLOCK
    ids = (starts[:, None] + np.arange(BLOCK, dtype=np.int32)).ravel()
    ids = ids[ids < n]
    for window, first in enumerate(range(0, n, BLOCK * WINDOW)):
        part = ids[first : first + BLOCK * WINDOW]
        part[:] = part[_shuffled(len(part), seed, epoch, SAMPLES, window)]
    return ids


def shuffle_quality(order: np.ndarray) -> float:
    """How far apart neighbours in storage come in `order`, as a share of what a uniform shuffle gives: 1 = uniform,
    near 0 = sequential. Neighbours in storage often share a class, so this is what keeps batches mixed."""
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    return float(np.abs(np.diff(place)).mean() / (len(order) / 3)) if len(order) > 1 else 1.0


def evaluation_batches(n: int, batch: int, world: int = 1, rank: int = 0) -> Iterator[np.ndarray]:
    """Ids in order, every id once over all ranks; a rank's part is contiguous and its last batch may be short."""
    end = n * (rank + 1) // world
    for first in range(n * rank // world, end, batch):
        yield np.arange(first, min(first + batch, end), dtype=np.int64)


@njit(cache=True, nogil=True)
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


@njit(cache=True, nogil=True)
def _take(order, classes, quota):
    keep = np.zeros(len(order), np.bool_)
    for i in order:
        if quota[classes[i]] > 0:
            quota[classes[i]] -= 1
            keep[i] = True
    return keep
