"""What a node fetches from a bucket: the real plan, step by step, against the cache that `pipeline/bucket.py` keeps.

A node announces images as the loader does (`Plan.reading`, a window ahead of need) and reads them as they come
(`Plan.batch`). What its cache does not hold is fetched, a piece of a shard at a time; what was announced longest ago goes.
Nothing here has a clock: bytes are counted, and what they take follows from the bandwidths that one names.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from manyview.pipeline.bucket import SLACK
from manyview.pipeline.plan import Plan
from manyview.pipeline.storage import PIECE

LIMIT = 2_500_000  # images of a node that are replayed an epoch; of a longer epoch the first so many
NONE = np.empty(0, np.int64)  # of samples


class LRU:
    """The policy of `bucket.Cache` over pieces of one size: `limit` of them; beyond that those announced longest ago go,
    and `SLACK` more, so that evictions are rare."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held, self.fetched = limit, OrderedDict[int, None](), 0

    def announce(self, piece: int) -> None:
        """It is wanted soon: fetched if it is not there, and in any case the last to go."""
        if piece in self.held:
            self.held.move_to_end(piece)
        else:
            self.read(piece)

    def read(self, piece: int) -> None:
        """It is wanted now: fetched if it is not there, else left as it is."""
        if piece in self.held:
            return
        self.fetched += 1
        if len(self.held) + 1 > self.limit:
            while self.held and len(self.held) + 1 > self.limit * (1 - SLACK):
                self.held.popitem(last=False)
        self.held[piece] = None


@dataclass(frozen=True)
class Cluster:
    """The data and the machines. `batch`: images a step over all nodes."""

    images: int
    nodes: int
    batch: int
    image_bytes: float
    cache_bytes: float
    order: str = "blocks"

    @property
    def per_piece(self) -> int:
        """Images in a piece."""
        return max(1, round(PIECE / self.image_bytes))

    @property
    def piece_bytes(self) -> float:
        return self.per_piece * self.image_bytes

    @property
    def limit(self) -> int:
        """Pieces that a node's cache holds."""
        return max(1, int(self.cache_bytes / self.piece_bytes))


@dataclass(frozen=True)
class Epoch:
    """What one node did in one epoch, or in the part of it that was replayed."""

    images: int  # read by the node
    fetched: int  # pieces
    late: int  # of them, those that had been announced, fetched and evicted again before they were read
    share: float  # of the epoch that was replayed

    @property
    def hits(self) -> float:
        """Share of the announced images for which nothing had to be fetched."""
        return 1 - (self.fetched - self.late) / self.images


def replay(cluster: Cluster, epochs: int = 2, seed: int = 0, limit: int = LIMIT) -> list[Epoch]:
    """Epochs of the node in the middle, through the plan that training uses. The ranks of a node have neighbouring parts of
    each batch, so together they are what one rank of as many as there are nodes would be."""
    c = cluster
    order = Plan(c.images, seed, c.batch, c.nodes, c.nodes // 2, c.order)
    an_epoch = max(1, c.images // c.batch)
    steps = min(an_epoch, max(order.ahead, limit * c.nodes // c.batch))
    cache, history = LRU(c.limit), []
    for epoch in range(epochs):
        ahead, late = run(order, cache, c.per_piece, epoch * an_epoch, epoch * an_epoch + steps)
        history.append(Epoch(steps * (c.batch // c.nodes), ahead + late, late, steps / an_epoch))
    return history


def run(order: Plan, cache: LRU, per_piece: int, start: int, stop: int) -> tuple[int, int]:
    """Steps `start` .. `stop - 1`, each announced `order.ahead` steps before it is read. Returns the pieces that were fetched
    when they were announced, and when they were read."""
    told, before, late = order.reading(start, stop), cache.fetched, 0
    for step in range(start - order.ahead, stop):
        for piece in np.unique(next(told, NONE) // per_piece).tolist():
            cache.announce(piece)
        announced = cache.fetched
        for piece in np.unique((order.batch(step)[0] if step >= start else NONE) // per_piece).tolist():
            cache.read(piece)
        late += cache.fetched - announced
    return cache.fetched - before - late, late
