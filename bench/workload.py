"""The thing that is profiled: train.py's data path and training step, built from the same parts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manyview.bench.harness import spent
from manyview.pipeline import engines, views
from manyview.pipeline.loader import Loader, normalize
from manyview.pipeline.machine import tune
from manyview.pipeline.plan import Plan, plan
from manyview.pipeline.store import Store, training_split
from manyview.pipeline.views import Policy, ViewParameters, parameters
from manyview.training import estimate, setup
from manyview.training.config import Config
from manyview.training.setup import Training


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
    """What makes the views: dali, cpu, resident, fused or auto."""
    device: str = "auto"
    """cpu, cuda or auto."""
    threads: int = 0
    """Threads of the engine; 0 = all cores this process may use."""
    prefetch: int = 2
    """Batches made ahead."""
    seed: int = 0
    """Seed of weights, order and views."""


@dataclass
class Workload:
    """`Setup`, opened: data, engine and, unless the backbone is `none`, a network in training."""

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

    def normalized(self, groups: list[Tensor]) -> list[Tensor]:
        """Views as an engine makes them -> as the network takes them."""
        return [normalize(group, self.store.mean, self.store.std, torch.float32) for group in groups]

    def step(self, groups: list[Tensor]) -> None:
        """What happens to a batch: a training step, or without a model the normalized floats that one would start from."""
        inputs = self.normalized(groups)
        if self.training is not None:
            loss, _ = self.training.gradients(inputs)
            self.training.update(loss.total)

    def loader(self) -> Loader:
        seed, prefetch = self.setup.seed, self.setup.prefetch
        return Loader(self.store, self.plan, self.policy, self.engine, seed=seed, prefetch=prefetch)

    def draw(self, ids: np.ndarray, epoch: int = 0) -> tuple[np.ndarray, ViewParameters]:
        """`ids` and the parameters of their views: what an engine takes."""
        epochs = np.full(len(ids), epoch, np.int64)
        sizes = self.store.heights[ids], self.store.widths[ids]
        return ids, parameters(self.policy, self.setup.seed, epochs, ids, *sizes)

    def close(self) -> None:
        self.engine.close()
        self.store.close()


def build(asked: Setup, step_seconds: float = float("inf")) -> Workload:
    """Open everything. On the CPU a step that would take longer than `step_seconds` is measured with fewer images."""
    torch.manual_seed(asked.seed)
    device = engines.device_of(asked.device)
    tune(device)
    store = Store(asked.data, asked.split or training_split(asked.data))
    store.refuse_other_than_rgb("the profiler")
    size = asked.size or store.default_size()
    policy = views.policy(asked.policy, asked.views, size, views.overrides(asked.augment), store.grey)
    engine, reason = engines.create(asked.engine, store, device, threads=asked.threads or None)
    known = {key: value for key, value in asdict(asked).items() if key in Config.__dataclass_fields__}
    trained = None if asked.backbone == "none" else setup.create(Config(**known), size, device)
    whole = plan(store.labels, seed=asked.seed, batch=asked.batch_size)
    work = Workload(asked, store, policy, whole, engine, reason, device, trained)
    if device.type == "cpu" and step_seconds < float("inf"):
        work.plan = replace(whole, global_batch=trial_batch(work, size, step_seconds))
    return work


def trial_batch(work: Workload, size: int, step_seconds: float) -> int:
    """Images of a step of about `step_seconds`; 2 at least. Costs a view hardly change with the batch."""
    seconds = 0.0
    if work.training is not None:
        cost = estimate.trial(work.training.model, size, work.device, work.training.autocast)
        seconds = cost.seconds_per_view * sum(group.count * (group.size / size) ** 2 for group in work.policy.groups)
    some = work.draw(work.plan.ids[:4])
    work.engine(*some)  # compiles what is compiled on first use
    seconds += spent(lambda: work.engine(*some)).wall / len(some[0])
    return min(work.setup.batch_size, max(2, int(step_seconds / seconds)))
