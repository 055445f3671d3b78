"""The front door: views for anyone's training loop.

data = manyview.Views("shards/x", views=8, batch_size=256, seed=0)
for batch in data:
    loss = manyview.barlow(manyview.encode(network, batch.views)).total
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from manyview.pipeline import engines
from manyview.pipeline.errors import UserError, refuse
from manyview.pipeline.loader import Loader, normalize
from manyview.pipeline.machine import tune
from manyview.pipeline.plan import InOrder, Plan, plan
from manyview.pipeline.store import Store, training_split
from manyview.pipeline.views import Policy, overrides
from manyview.pipeline.views import policy as named_policy


class Batch(NamedTuple):
    """V views of B images, on the device. Where the policy has local crops, `views` is a list: global views, local ones."""

    views: Any  # (V, B, C, S, S), channels-last memory
    labels: Tensor  # (B,) int64, -1 = unlabelled; as `ids`, places in the shards, and `epochs`, on the CPU
    ids: Tensor
    epochs: Tensor

    @property
    def local(self) -> list[bool]:
        """(V,) which views are local crops: the losses' argument of this name."""
        groups = self.views if isinstance(self.views, list) else [self.views]
        return [number > 0 for number, group in enumerate(groups) for _ in group]


class Views(AbstractContextManager["Views"]):
    """Batches of views of the images in a folder of shards. Iterating gives one epoch; the next time, the next one.

    views: how many of each image, by default 8. batch_size: images a process, as torch's DataLoader has it. seed: of order and
    views. split: by default the one that `train.py` takes. policy: a name (`simclr`, the default, `auto`, `multicrop`,
    `supervised`, ...), a dict or the path of a YAML file that changes a named one (`{"policy": "simclr", "hue": 0,
    "local.scale": [0.05, 0.3]}`), or `clean`, the evaluation's one centre view. shuffle: by default in training splits; without,
    each image comes once, in storage order, with a short last batch, and `clean` is the default policy. size: pixels a side,
    0 = the images' own, at most 224. mean, std: what views are normalized by, of values 0..1 as timm has them; by default the
    data's own. normalize=False gives uint8. fraction: of the images, nested and class-balanced. device: by default the
    process's GPU.

    Rank and world are torch.distributed's, or torchrun's. Resuming (`state_dict`, `load_state_dict`, as torchdata has them) is
    exact in the middle of an epoch; where images are shuffled also with another number of processes, if all together make as
    large a batch. UserError: bad settings, damaged shards, an image of an unshuffled split that cannot be read.
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
        wholes = {"views": (views, 1), "batch_size": (batch_size, 1), "seed": (seed, 0), "size": (size, 0),
                  "threads": (threads, 0), "prefetch": (prefetch, 0)}  # fmt: skip
        refuse([f"{name} must be a whole number of at least {least} (and below 2^63), not {value!r}"
                for name, (value, least) in wholes.items() if value is not None and not _whole(value, least)])  # fmt: skip
        self.store = store = Store(path, split or training_split(path))
        self.batch_size, self.seed, self.fraction, self.order = batch_size, seed, fraction, order
        self.shuffle = store.split in ("train", "unlabelled") if shuffle is None else shuffle
        self.classes, self.size = store.classes, size or store.default_size()
        self.mean = tuple(mean or (value / store.layout.white for value in store.mean))
        self.std = tuple(std or (value / store.layout.white for value in store.std))
        self.policy = chosen_policy(policy or ("simclr" if self.shuffle else "clean"), views, self.size, store.grey)
        self._normalize, self._prefetch = normalize, prefetch
        self._engine_options = (engine, device, threads)
        self._loader: Loader | None = None
        self._step, self._resuming = 0, False
        self._plan()  # says what is wrong with the rest

    def __len__(self) -> int:
        """Batches an epoch, the same in every process."""
        return self._plan().steps(1)

    @property
    def epoch(self) -> int:
        """Epochs that have been given in full."""
        return self._step // len(self)

    def __iter__(self) -> Iterator[Batch]:
        steps = len(self)
        first = self._step if self._resuming else math.ceil(self._step / steps) * steps
        self._resuming = False
        for batch in self._started().batches(first, (first // steps + 1) * steps):
            self._step, groups, white = batch.step + 1, batch.views, self.store.layout.white
            if self._normalize:
                mean, std = ([white * value for value in values] for values in (self.mean, self.std))
                groups = [normalize(group, mean, std, torch.float32) for group in groups]
            yield Batch(groups[0] if len(groups) == 1 else groups, batch.labels, batch.ids, batch.epochs)

    def state_dict(self) -> dict[str, Any]:
        """Where the data is, after the last batch given, and of what data and settings. Plain numbers and strings."""
        world, _ = processes()
        state = {"step": self._step, "seed": self.seed, "batch": self.batch_size * world, "fraction": self.fraction,
                 "order": self.order, "shuffle": self.shuffle, "policy": repr(self.policy),
                 "data": self.store.fingerprint}  # fmt: skip
        return state if self.shuffle else state | {"processes": world}  # each goes through a part of its own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the last batch given when `state` was taken. UserError where it is of other data or settings."""
        refuse([f"the state's {name} is {state.get(name)!r}, now {now!r}"
                for name, now in self.state_dict().items() if name != "step" and state.get(name) != now])  # fmt: skip
        if not _whole(state.get("step"), 0):
            raise UserError(f"the state's step is {state.get('step')!r}, no number of batches")
        self._step, self._resuming = state["step"], True

    def close(self) -> None:
        """End the engine's threads; iterating again begins new ones. It also happens when nobody holds this any more."""
        if self._loader is not None:
            self._closing()
            self._loader = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def _plan(self) -> Plan | InOrder:
        world, rank = processes()
        if not self.shuffle:
            if self.fraction != 1:
                raise UserError(f"fraction {self.fraction:g} is of images that are shuffled: it goes with shuffle=True")
            return InOrder(len(self.store), self.batch_size, world, rank)
        result = plan(self.store.labels, seed=self.seed, batch=self.batch_size * world, fraction=self.fraction, world=world,
                      rank=rank, order=self.order)  # fmt: skip
        if result.n < result.global_batch:
            many = f"batch_size {self.batch_size} x {world} processes"
            raise UserError(f"{many} is more than the {result.n} images there are")
        return result

    def _started(self) -> Loader:
        """The loader; not made before the first batch, since by then a launcher has said which GPU is whose."""
        if self._loader is None:
            name, device, threads = self._engine_options
            where = engines.device_of(device)
            tune(where)
            engine, _ = engines.create(name, self.store, where, threads=threads)
            self._closing = weakref.finalize(self, engine.close)
            self._loader = Loader(self.store, self._plan(), self.policy, engine, seed=self.seed, prefetch=self._prefetch,
                                  max_bad=0.01 if self.shuffle else 0)  # fmt: skip
        return self._loader


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) < 2**63


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
