"""The front door: views, and scores of an encoder, in anyone's training loop.

data = manyview.Views("shards/x", views=8, batch_size=256, seed=0)
for batch in data:
    loss = manyview.barlow(manyview.encode(network, batch.views)).total
"""

from __future__ import annotations

import math
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from manyview.evaluation import protocols
from manyview.evaluation.metrics import Score
from manyview.pipeline import engines
from manyview.pipeline.errors import UserError
from manyview.pipeline.loader import Loader, normalize
from manyview.pipeline.machine import tune
from manyview.pipeline.plan import Plan, plan
from manyview.pipeline.store import Corrupt, Store, training_split
from manyview.pipeline.views import Policy, ViewParameters, overrides, parameters
from manyview.pipeline.views import policy as named_policy


class Batch(NamedTuple):
    """V views of B images, on the device."""

    views: (
        Any  # (V, B, 3, S, S), channels-last memory; where the policy has local crops a list: global views, local ones
    )
    labels: Tensor  # (B,) int64, -1 = unlabelled; as `ids`, places in the shards, and `epochs`, on the CPU
    ids: Tensor
    epochs: Tensor

    @property
    def local(self) -> list[bool]:
        """(V,) which views are local crops: the losses' argument of this name."""
        groups = self.views if isinstance(self.views, list) else [self.views]
        return [number > 0 for number, group in enumerate(groups) for _ in group]


class Views:
    """Batches of views of the images in a folder of shards. Iterating gives one epoch; the next time, the next one.

    views: how many of each image. batch_size: images a process, as torch's DataLoader has it. seed: of order and views.
    split and policy: by default what `train.py` takes. policy: a name (`simclr`, `byol`, `multicrop`, `supervised`, ...), or a
    dict or the path of a YAML file that changes a named one (`{"policy": "simclr", "hue": 0, "local.scale": [0.05, 0.3]}`), or
    `clean`, the evaluation's one centre view. shuffle: by default in training splits; without, each image comes once, in
    storage order, with a short last batch, and `clean` is the default policy. size: pixels a side, 0 = the images' own, at
    most 224. mean, std: what views are normalized by, of values 0..1 as timm has them; by default the data's own.
    normalize=False gives uint8. fraction: of the images, nested and class-balanced. device: by default the process's GPU.

    Rank and world are torch.distributed's, or torchrun's. Resuming (`state_dict`, `load_state_dict`, as torchdata has them) is
    exact in the middle of an epoch, and with another number of processes if all together make as large a batch. UserError:
    bad settings, damaged shards, an image of an unshuffled split that cannot be read.
    """

    def __init__(
        self,
        path: str | Path,
        views: int | None = None,
        batch_size: int = 256,
        seed: int = 0,
        *,
        split: str | None = None,
        policy: str | Path | dict[str, Any] | None = None,
        shuffle: bool | None = None,
        size: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        normalize: bool = True,
        fraction: float = 1.0,
        order: str = "random",
        device: str = "auto",
        engine: str = "auto",
        threads: int | None = None,
        prefetch: int = 2,
    ):
        self.store = Store(path, split or training_split(path))
        self.batch_size, self.seed, self.fraction, self.order = batch_size, seed, fraction, order
        self.shuffle = self.store.split in ("train", "unlabelled") if shuffle is None else shuffle
        self.classes, self.size = self.store.classes, size or self.store.default_size()
        self.mean = tuple(mean or (value / 255 for value in self.store.mean))
        self.std = tuple(std or (value / 255 for value in self.store.std))
        self.policy = chosen_policy(
            policy or ("simclr" if self.shuffle else "clean"), views, self.size, self.store.grey
        )
        self._normalize, self._prefetch = normalize, prefetch
        self._engine_options = (engine, device, threads)
        self._engine: Any = None
        self._step, self._resuming = 0, False
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}")
        len(self)  # says what is wrong with the rest

    def __len__(self) -> int:
        """Batches an epoch, the same in every process."""
        if self.shuffle:
            return self._plan().steps(1)
        return math.ceil(math.ceil(len(self.store) / processes()[0]) / self.batch_size)

    @property
    def epoch(self) -> int:
        """Epochs that have been given in full."""
        return self._step // len(self)

    def __iter__(self) -> Iterator[Batch]:
        steps = len(self)
        first = self._step if self._resuming else math.ceil(self._step / steps) * steps
        stop, self._resuming = (first // steps + 1) * steps, False
        for step, batch in enumerate(self._batches(first, stop), first):
            self._step = step + 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the data is: after the last batch given. Plain numbers and strings."""
        return {"step": self._step, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the last batch given when `state` was taken. UserError where it is of other data or settings."""
        mine = self._identity()
        if other := [name for name in mine if state.get(name) != mine[name]]:
            raise UserError(
                "\n".join(f"the state's {name} is {state.get(name)!r}, now {mine[name]!r}" for name in other)
            )
        self._step, self._resuming = state["step"], True

    def close(self) -> None:
        """End the engine's threads; iterating again begins new ones. It also happens when nobody holds this any more."""
        if self._engine is not None:
            self._closing()
            self._engine = None

    def __enter__(self) -> Views:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _identity(self) -> dict[str, Any]:
        return {"seed": self.seed, "batch": self.batch_size * processes()[0], "fraction": self.fraction, "order": self.order,
                "shuffle": self.shuffle, "policy": repr(self.policy), "data": self.store.fingerprint}  # fmt: skip

    def _plan(self) -> Plan:
        world, rank = processes()
        batch = self.batch_size * world
        made = plan(self.store.labels, seed=self.seed, fraction=self.fraction, world=world, rank=rank, batch=batch,
                    order=self.order)  # fmt: skip
        if made.n < batch:
            raise UserError(
                f"batch_size {self.batch_size} x {world} processes is more than the {made.n} images there are"
            )
        return made

    def _start(self) -> None:
        if self._engine is None:  # not before the first batch: by then a launcher has said which GPU is whose
            name, device, threads = self._engine_options
            where = engines.device_of(device)
            if where.type == "cuda" and device in ("auto", "cuda"):
                where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
            tune(where)
            self._engine, _ = engines.create(name, self.store, where, threads=threads)
            self._closing = weakref.finalize(self, self._engine.close)

    def _batches(self, start: int, stop: int) -> Iterator[Batch]:
        self._start()
        if not self.shuffle:
            yield from self._once(start % len(self))
            return
        loader = Loader(self.store, self._plan(), self.policy, self._engine, seed=self.seed, prefetch=self._prefetch)
        for batch in loader.batches(start, stop):
            yield Batch(self._finished(batch.views), batch.labels, batch.ids, batch.epochs)

    def _once(self, start: int) -> Iterator[Batch]:
        """This process's images in storage order, from batch `start`."""
        world, rank = processes()
        share = np.array_split(np.arange(len(self.store)), world)[rank]
        cuts = range(self.batch_size, len(share), self.batch_size)
        batches = np.array_split(share, cuts if len(cuts) + 1 == len(self) else len(self))
        waiting: deque = deque()
        try:
            for ids in batches[start:]:
                self.store.prefetch(ids)
                waiting.append((ids, self._engine.submit(ids, self._draw(ids))))
                if len(waiting) > self._prefetch:
                    yield self._labelled(*waiting.popleft())
            while waiting:
                yield self._labelled(*waiting.popleft())
        except Corrupt as error:
            raise UserError(f"{error}; without it a score would not be comparable: write the shards again") from None
        finally:
            for _, pending in waiting:
                pending.cancel()

    def _labelled(self, ids: np.ndarray, pending: Any) -> Batch:
        labels = torch.from_numpy(np.asarray(self.store.labels[ids], np.int64))
        return Batch(self._finished(pending.result()), labels, torch.from_numpy(ids), torch.zeros_like(labels))

    def _draw(self, ids: np.ndarray) -> ViewParameters:
        heights, widths = self.store.heights[ids], self.store.widths[ids]
        return parameters(self.policy, self.seed, np.zeros(len(ids), np.int64), ids, heights, widths)

    def _finished(self, groups: list[Tensor]) -> Any:
        if self._normalize:
            mean, std = (tuple(255 * value for value in values) for values in (self.mean, self.std))
            groups = [normalize(group, mean, std, torch.float32) for group in groups]
        return groups[0] if len(groups) == 1 else groups


def processes() -> tuple[int, int]:
    """(world, rank) of torch.distributed; before it is initialized, what torchrun says."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(), dist.get_rank()
    return int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))


def chosen_policy(given: str | Path | dict[str, Any], views: int | None, size: int, grey: bool) -> Policy:
    """A named policy, or one changed by a dict or a YAML file; 8 views (of `clean` 1) if it is not said how many."""
    from_file = isinstance(given, Path) or (isinstance(given, str) and given.endswith((".yaml", ".yml")))
    settings = dict(given) if isinstance(given, dict) else overrides([str(given)]) if from_file else {"policy": given}
    name = str(settings.pop("policy", "simclr"))
    return named_policy(name, (1 if name == "clean" else 8) if views is None else views, size, settings, grey)


def encode(network: Callable[[Tensor], Tensor], views: Any) -> Tensor:
    """(V, B, 3, S, S), or a list of such, -> (V, B, D): `network` maps (N, 3, S, S) to (N, D), all views of a size at once."""
    groups = views if isinstance(views, list) else [views]
    return torch.cat([network(group.flatten(0, 1)).unflatten(0, group.shape[:2]) for group in groups])


def probe(
    encoder: Callable[[Tensor], Tensor],
    train: str | Path | Iterable,
    test: str | Path | Iterable | None = None,
    *,
    epochs: int = 100,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Score]:
    """The evaluation's kNN and linear probes of any frozen `encoder`: (N, 3, S, S) -> (N, F).

    train, test: folders of shards (their train and val splits as clean views; by default both of one folder), `Views` of one
    view, or any batches of (images, labels). `settings` of folders go to `Views`: size, mean, std, batch_size, device. Without
    them test images are prepared as the training images are. What has no label is left out. `epochs` are the linear probes'.
    Returns each protocol's score under the name that `eval.json` has for it.
    """
    if isinstance(train, str | Path):
        train = Views(train, split="train", shuffle=False, **settings)
        test = train.store.path if test is None else test
        settings = {"size": train.size, "mean": train.mean, "std": train.std} | settings
    if isinstance(test, str | Path):
        test = Views(test, split="val", shuffle=False, **settings)
    elif test is None:
        raise UserError("probe: batches to learn from, but none to test on")
    x, labels = _features(encoder, train)
    queries, truth = _features(encoder, test)
    if not len(x) or not len(queries):
        raise UserError(f"probe: {len(x)} training images and {len(queries)} test images have a label")
    problem = protocols.Problem(x, labels, queries, truth, int(max(labels.max(), truth.max())) + 1)
    results = [*protocols.nearest_neighbours(problem), *protocols.linear_probes(problem, seed, epochs)]
    return {f"{result.protocol} {result.norm}": result.score for result in results if result.score}


@torch.no_grad()
def _features(encoder: Any, data: Iterable) -> tuple[Tensor, Tensor]:
    """(N, F) float32 and (N,) of what has a label, on the encoder's device; the encoder is in evaluation mode meanwhile."""
    module = encoder if isinstance(encoder, nn.Module) else nn.Identity()
    device = next((parameter.device for parameter in module.parameters()), None)
    training = [part for part in module.modules() if part.training]
    features, labels = [], []
    module.eval()
    try:
        for batch in data:
            images, classes = (batch.views[0], batch.labels) if isinstance(batch, Batch) else batch[:2]
            features.append(encoder(images.to(device)).float().flatten(1))
            labels.append(torch.as_tensor(classes))
    finally:
        for part in training:
            part.training = True
    x, y = torch.cat(features), torch.cat(labels).to(features[0].device)
    return x[y >= 0], y[y >= 0]
