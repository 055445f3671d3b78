"""A network in training: model, objective and optimizer as a `Config` asks for them, for train.py and every bench."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from manyview.model import backbone, objective, projector, weights
from manyview.model.objective import Loss
from manyview.pipeline import views
from manyview.pipeline.errors import UserError
from manyview.pipeline.views import Policy
from manyview.training import config, optim, precision, step
from manyview.training.config import Config


@dataclass(frozen=True)
class Training:
    """What is trained, and how. A step is `loss, z = training.gradients(views)`, then `training.update(loss.total)`."""

    model: step.PretrainingModel  # backbone and projector, neither compiled nor wrapped: its names are saved
    called: Any  # what a step calls: the model, compiled and wrapped where asked for
    objective: step.Objective
    optimizer: torch.optim.Optimizer
    update: step.Update
    gradients: Callable[[list[Tensor]], tuple[Loss, Tensor]]
    """Of normalized views by resolution, each (V_g, B, C, S, S); leaves gradients, gives loss and embeddings (V, B, D)."""
    autocast: step.Autocast
    dtype: torch.dtype  # of autocast
    precision: str  # its name, and why
    lr: float  # at the peak
    lr_rule: str  # where it comes from
    weights: str  # where those come from


def policy(cfg: Config, size: int, grey: bool = False) -> Policy:
    """The views that `cfg` asks for, global ones of `size` pixels. A network of patches gets local crops of whole ones."""
    changes = views.overrides(cfg.augment)
    asked = views.policy(cfg.policy, cfg.views, size, changes, grey)
    if len(asked.groups) == 1 or {"size", "local.size"} & changes.keys():
        return asked
    patch = backbone.patch_size(cfg.backbone, image_size=size, stem=cfg.stem)
    whole = max(1, round(asked.groups[1].size / patch)) * patch
    return views.policy(cfg.policy, cfg.views, size, {**changes, "local.size": whole}, grey)


def network(cfg: Config, size: int, channels: int = 3) -> step.PretrainingModel:
    """Backbone and projector with fresh weights, on the CPU."""
    several_sizes = len({group.size for group in policy(cfg, size).groups}) > 1
    trunk: Any = backbone.create(
        cfg.backbone, image_size=size, stem=cfg.stem, other_sizes=several_sizes, channels=channels
    )
    return step.PretrainingModel(
        trunk, projector.Projector(trunk.num_features, cfg.projector_dim, cfg.projector_hidden)
    )


def create(cfg: Config, size: int, device: torch.device, channels: int = 3) -> Training:
    """The training that `cfg` describes, on square global views of `size` pixels; `Config(...)` has defaults for the rest.

    Weights come from torch's generator: seed it before. Where torch.distributed is initialized, batch-norm and gradients
    go over all its ranks. UserError for a backbone, objective or file of weights that does not fit.
    """
    model: Any = network(cfg, size, channels)
    origin = fill(model, cfg) if cfg.init_from else "fresh weights"
    model.to(device, memory_format=torch.channels_last)
    step.synchronize_batchnorm(model, device)
    loss_of = objective.create(cfg.objective, **config.objective_options(cfg))
    inputs = [(channels, group.size, group.size) for group in policy(cfg, size).groups]
    dtype, reason = precision.choose(cfg.precision, device, model.backbone, inputs)
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype is not torch.float32)
    lr, lr_rule = optim.learning_rate(cfg.optimizer, cfg.lr, cfg.batch_size)
    optimizer = optim.create(cfg.optimizer, model, lr, cfg.weight_decay)
    update = step.Update(model, optimizer, dtype)
    backward: Callable[..., tuple[Loss, Tensor]] = partial(step.backward, per_view=cfg.bn == "view")
    if cfg.view_chunk:
        backward = partial(step.backward_chunked, chunk=cfg.view_chunk)
    called: Any = model
    if cfg.compile:
        try:
            torch.compile(torch.sin)(torch.ones(2, device=device))  # not as late as the first step
        except Exception as error:  # of the compiler's own kinds
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(f"--compile does not work here: {reason}") from error
        called = torch.compile(model)
    if dist.is_initialized() and dist.get_world_size() > 1:
        ids = [device.index] if device.type == "cuda" else None
        called = torch.nn.parallel.DistributedDataParallel(called, device_ids=ids, broadcast_buffers=False)
    gradients = partial(backward, called, objective=loss_of, scale=update.scale, autocast=autocast)
    return Training(model, called, loss_of, optimizer, update, gradients, autocast, dtype, reason, lr, lr_rule, origin)


def fill(model: step.PretrainingModel, cfg: Config) -> str:
    """Start `model` from --init-from: one of train.py's checkpoints has a backbone and, where it fits, a projector; any other
    file of weights a backbone. Returns what was taken. UserError where it is another network's."""
    assert cfg.init_from is not None
    path, key = weights.split_key(cfg.init_from)
    checkpointed = weights.checkpoint(path, key)
    if checkpointed is None:
        return f"backbone: {backbone.fill(model.backbone, cfg.backbone, cfg.init_from)}"
    trunk, head = ({name.removeprefix(part): value for name, value in checkpointed[1].items() if name.startswith(part)}
                   for part in ("backbone.", "projector."))  # fmt: skip
    try:
        weights.fill_from(model.backbone, trunk, path)
    except UserError as error:
        what = str(error).rpartition("of another network: ")[2]
        raise UserError(f"{path} holds another network than --backbone {cfg.backbone} ({what})") from None
    own = {name: value.shape for name, value in model.projector.state_dict().items()}
    if own != {name: value.shape for name, value in head.items()}:
        return f"backbone from {path}, its projector has another shape"
    model.projector.load_state_dict(head)
    return f"backbone and projector from {path}"
