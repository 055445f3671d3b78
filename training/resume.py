"""Going on from a checkpoint: which one, whether it is of the same experiment, what is saved and put back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from manyview.model import backbone, objective
from manyview.pipeline.errors import UserError, refuse
from manyview.training import checkpoint, config, optim, setup
from manyview.training.config import Config
from manyview.training.setup import Training


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of the run in `folder`, the same one on every rank; None where there is none."""
    steps = checkpoint.steps_in(folder / "checkpoints")[-1:]
    if dist.is_initialized():
        box = [steps]
        dist.broadcast_object_list(box, src=0)  # rank 0 decides: the others may look at an older listing
        steps = box[0]
    if not steps:
        return None
    path = checkpoint.path_of(folder / "checkpoints", steps[0])
    if not path.exists():
        where = f"rank {dist.get_rank()} does not see {path}" if dist.is_initialized() else f"{path} is gone"
        raise UserError(f"{where}: --out must be on a file system that all nodes share")
    return path


def load(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The state in `path`. UserError where it is of another experiment, one line for each setting that differs."""
    state, folder = checkpoint.load(path), path.parent.parent
    before, now = learned(state["identity"]), learned(identity)
    lines = [
        f"--resume: {key} was {before.get(key)!r} in {folder}, now {now.get(key)!r}"
        for key in dict.fromkeys([*now, *before])
        if before.get(key) != now.get(key)
    ]
    if lines and before["steps"] != now["steps"]:
        lines.append(
            f"the schedule is made for all steps; to train further, start a new run: --init-from {path} --out ANOTHER"
        )
    refuse(lines)
    return state


def learned(identity: dict[str, Any]) -> dict[str, Any]:
    """What decides what is learned, however it was spelled: of `beta` auto and 3/D, of `--epochs` and `--steps`, of a policy
    and the same numbers given by --augment, there is one form.

    identity: a checkpoint's: `Config.learned()` with `augment` as a dict, `size`, `steps` and the `data`'s fingerprint.
    """
    fields = {field.name for field in dataclasses.fields(Config)} - {"data", "augment"}
    augment = tuple(f"{key}={json.dumps(value)}" for key, value in identity["augment"].items())
    cfg = Config(augment=augment, **{key: value for key, value in identity.items() if key in fields})
    spelled = ("epochs", "policy", "augment", "size", "projector_hidden", "warmup", "lr", "stem")
    settings = {key: value for key, value in identity.items() if key not in spelled}
    settings["stem"] = backbone.resolve(cfg.backbone, cfg.stem, cfg.size)
    settings["projector_hidden"] = cfg.projector_hidden or cfg.projector_dim
    settings["lr"] = optim.learning_rate(cfg.optimizer, cfg.lr, cfg.batch_size)[0]
    settings["warmup"] = round(cfg.warmup * cfg.steps)
    loss_of = objective.create(cfg.objective, **config.objective_options(cfg))
    settings |= dict.fromkeys(("form", "standardize")) | objective.describe(loss_of, cfg.projector_dim)[1]
    for role, group in zip(("global", "local"), setup.policy(cfg, cfg.size).groups):
        numbers = dataclasses.asdict(group)
        for key in ("blur", "solarize"):  # a probability a view; a shorter list is repeated
            numbers[key] = [numbers[key][view % len(numbers[key])] for view in range(group.count)]
        settings |= {f"{role}.{key}": value for key, value in numbers.items() if key not in ("count", "size")}
        settings[f"{role}.size"] = group.size
    return json.loads(json.dumps(settings))  # a tuple is a list there


def snapshot(training: Training, average: Any) -> dict[str, Any]:
    """What a checkpoint holds of the network in training; `average`: of its weights, or None."""
    return {
        "encoder": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "scaler": training.update.state_dict(),
        "average": average.state_dict() if average else None,
        "random": checkpoint.random_state(),
    }


def restore(state: dict[str, Any], training: Training, average: Any) -> None:
    """Put it back, the generators too."""
    try:
        training.model.load_state_dict(state["encoder"])
        training.optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        what = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"--resume: the checkpoint is of another version of this network or optimizer ({what})"
        ) from error
    training.update.load_state_dict(state["scaler"])
    if average:
        average.load_state_dict(state["average"])
    checkpoint.restore_random_state(state["random"])
