"""The thing that is profiled: train.py's data path and training step, built from the same parts."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manyview.model import backbone, objective, projector
from manyview.pipeline import engines, views
from manyview.pipeline.loader import Loader, normalize
from manyview.pipeline.machine import tune
from manyview.pipeline.plan import Plan, plan
from manyview.pipeline.store import Store, training_split
from manyview.pipeline.views import Policy, ViewParameters, parameters
from manyview.training import estimate, optim, precision
from manyview.training.step import PretrainingModel, Update, backward


@dataclass(kw_only=True)
class Setup:
    """What is run. The names and defaults are train.py's where it has them."""

    data: Path = Path("shards/imagenet")
    """Shard directory, as `make shards` writes it."""
    split: str = ""
    """Split of the data; default: the one that train.py takes."""
    views: int = 4
    """Views an image (V)."""
    policy: str = "simclr"
    """Augmentation policy."""
    augment: tuple[str, ...] = ()
    """Changes to the policy as name=value or YAML files."""
    size: int = 0
    """View side in pixels; 0 = the median short side of the images, at most 224."""
    batch_size: int = 256
    """Images a step."""
    backbone: str = "resnet18"
    """Backbone, or `none`: the data path alone, for those who train with something else."""
    stem: str = "auto"
    """ResNet stem: small, standard or auto."""
    projector_dim: int = 256
    """Embedding dimensions."""
    objective: str = "barlow"
    """barlow, vicreg, spectral or paper."""
    optimizer: str = "adamw"
    """adamw, sgd or lars."""
    precision: str = "auto"
    """bf16, fp16, fp32 or auto."""
    compile: bool = False
    """torch.compile the encoder."""
    engine: str = "auto"
    """What makes the views: dali, cpu, resident or auto."""
    device: str = "auto"
    """cpu, cuda or auto."""
    threads: int = 0
    """Threads of the engine; 0 = all cores this process may use."""
    prefetch: int = 2
    """Batches made ahead."""
    seed: int = 0
    """Seed of weights, order and views."""


class Training:
    """Model, objective and optimizer; the step is train.py's."""

    def __init__(self, setup: Setup, size: int, device: torch.device, mean: Any, std: Any):
        dtype, self.precision = precision.choose(setup.precision, device)
        self.mean, self.std, self.device, self.size = mean, std, device, size
        trunk: Any = backbone.create(setup.backbone, image_size=size, stem=setup.stem)
        head = projector.Projector(trunk.num_features, setup.projector_dim, setup.projector_dim)
        self.plain = PretrainingModel(trunk, head).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dim = setup.projector_dim
        self.loss_of = objective.create(setup.objective)
        self.optimizer = optim.create(setup.optimizer, self.plain, 1e-4, 1e-4)
        self.dtype = dtype
        self.update = Update(self.plain, self.optimizer, dtype)
        self.autocast: Callable[[], AbstractContextManager] = partial(
            torch.autocast, device.type, dtype, enabled=dtype is not torch.float32
        )
        self.seconds_per_view = estimate.trial(self.plain, size, device, self.autocast).seconds_per_view
        self.encoder: Any = torch.compile(self.plain) if setup.compile else self.plain

    def normalized(self, made: list[Tensor]) -> list[Tensor]:
        return [normalize(view, self.mean, self.std, torch.float32) for view in made]

    def gradients(self, groups: list[Tensor]) -> Tensor:
        """Leaves gradients; the loss."""
        return backward(self.encoder, groups, self.loss_of, self.update.scale, False, self.autocast)[0].total

    def step(self, made: list[Tensor]) -> None:
        self.update(self.gradients(self.normalized(made)))


@dataclass
class Workload:
    setup: Setup
    store: Store
    policy: Policy
    plan: Plan
    engine: Any
    engine_reason: str
    device: torch.device
    training: Training | None

    @property
    def batch(self) -> int:
        """Images of a measured step: `--batch-size`, or fewer where a step of that size takes too long."""
        return self.plan.global_batch

    @property
    def threads(self) -> int:
        return int(getattr(self.engine, "threads", 1))

    def consume(self, made: list[Tensor]) -> None:
        """What happens to a batch: a training step, or without a model the normalized floats that one would start from."""
        if self.training is not None:
            self.training.step(made)
            return
        for view in made:
            normalize(view, self.store.mean, self.store.std, torch.float32)

    def loader(self, **changes: Any) -> Loader:
        """A loader over this data; `plan`, `policy`, `engine` and `prefetch` may be others than the workload's."""
        parts = {"plan": self.plan, "policy": self.policy, "engine": self.engine, "prefetch": self.setup.prefetch}
        parts.update(changes)
        return Loader(
            self.store,
            parts["plan"],
            parts["policy"],
            parts["engine"],
            seed=self.setup.seed,
            prefetch=parts["prefetch"],
        )

    def close(self) -> None:
        self.engine.close()
        self.store.close()


def build(setup: Setup, step_seconds: float) -> Workload:
    """Open the data, the engine and, unless the backbone is `none`, the model. On the CPU a step that would take longer
    than `step_seconds` is measured with fewer images."""

    torch.manual_seed(setup.seed)
    device = engines.device_of(setup.device)
    tune(device)
    store = Store(setup.data, setup.split or training_split(setup.data))
    size = setup.size or store.default_size()
    policy = views.policy(setup.policy, setup.views, size, views.overrides(setup.augment))
    engine, reason = engines.create(setup.engine, store, device, threads=setup.threads or None)
    training = None if setup.backbone == "none" else Training(setup, size, device, store.mean, store.std)
    whole = plan(store.labels, seed=setup.seed, batch=setup.batch_size)
    work = Workload(setup, store, policy, whole, engine, reason, device, training)
    if device.type == "cpu":
        work.plan = replace(whole, global_batch=trial_batch(work, size, step_seconds))
    return work


def trial_batch(work: Workload, size: int, step_seconds: float) -> int:
    """Images of a step of about `step_seconds`; 2 at least. Costs a view hardly change with the batch."""
    seconds = 0.0
    if work.training is not None:
        rows = sum(group.count * (group.size / size) ** 2 for group in work.policy.groups)
        seconds += work.training.seconds_per_view * rows
    ids, drawn = draw(work, work.plan.ids[:4])
    work.engine(ids, drawn)  # compiles what is compiled on first use
    begun = time.perf_counter()
    work.engine(ids, drawn)
    seconds += (time.perf_counter() - begun) / len(ids)
    return min(work.setup.batch_size, max(2, int(step_seconds / seconds)))


def draw(work: Workload, ids: np.ndarray, epoch: int = 0) -> tuple[np.ndarray, ViewParameters]:
    """`ids` and the parameters of their views."""
    epochs = np.full(len(ids), epoch, np.int64)
    store = work.store
    return ids, parameters(work.policy, work.setup.seed, epochs, ids, store.heights[ids], store.widths[ids])
