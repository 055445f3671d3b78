"""What is evaluated: a run of this project, an exported file, or weights of timm or torchvision."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from manyview.model import backbone
from manyview.pipeline import index
from manyview.pipeline.errors import UserError, nearest
from manyview.pipeline.store import Store
from manyview.pipeline.views import crop_ratio

HEADS = ("fc.", "head.", "head_dist.", "classifier.", "heads.", "last_linear.", "projector.", "prototypes.")
PREFIXES = ("module.", "backbone.", "encoder.", "model.", "base_encoder.", "student.", "teacher.")


@dataclass(frozen=True)
class Encoder:
    """A frozen network (N, 3, S, S) -> (N, F), and what has to be known to feed it."""

    module: nn.Module
    fresh: Callable[[], nn.Module]  # the same architecture with random weights
    run: str  # how the tables name it
    backbone: str
    image_size: int
    mean: tuple[float, float, float]  # of the input, in 0..255
    std: tuple[float, float, float]
    weights: str = "trained"  # or "untrained"
    sha256: str = ""  # of the weights file
    source: str = ""
    recipe: str = ""  # the identity of weights that are made, known before they are
    step: str = ""
    method: str = ""
    pretrained_on: str = ""
    trained_by: str = ""  # the command

    @property
    def crop_ratio(self) -> float:
        """Of the short side that the evaluation view shows."""
        return crop_ratio(self.image_size)

    @cached_property
    def checkpoint(self) -> str:
        """The identity of the parameters and buffers: their recipe, or their hash as they were at first sight."""
        return self.recipe or fingerprint(self.module)


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, names, types and shapes included."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict(keep_vars=False).items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, nothing may change `module`; a part left in training mode, or any changed tensor, is an error."""
    training = [name or "the network itself" for name, part in module.named_modules() if part.training]
    if training:
        raise RuntimeError(f"a frozen encoder must be in evaluation mode, but {training[0]} is in training mode")
    before = fingerprint(module)
    yield
    if fingerprint(module) != before:
        raise RuntimeError("the frozen encoder's parameters or buffers changed while its features were computed")


def load(target: str, *, weights: Path | None = None, key: str | None = None, image_size: int | None = None) -> Encoder:
    """`target`: a run directory, one of its checkpoints (.pt), a .safetensors file, `timm:NAME` or `torchvision:NAME`.

    `weights`: for the last two, a local file instead of the download; `key`: which of several networks inside it (also
    of a checkpoint, where the default is the average of the weights if the run kept one, else the weights).
    """
    if target.startswith(("timm:", "torchvision:")):
        return _public(target, weights, key, image_size)
    if weights is not None or image_size is not None:
        raise UserError("--weights and --image-size go with a target timm:NAME or torchvision:NAME")
    path = Path(target)
    if path.suffix == ".pt" and path.is_file():
        return _checkpoint(path, key)
    if path.is_dir() or (path.is_file() and path.suffix == ".safetensors"):
        return _exported(path)
    near = [p.as_posix() for p in Path(path.parent if path.parent.is_dir() else ".").glob("*/")]
    kinds = "a run directory, a checkpoint or .safetensors file, timm:NAME or torchvision:NAME"
    raise UserError(f"{nearest('target', target, near)} ({kinds})")


def _exported(path: Path) -> Encoder:
    """backbone.safetensors of a run directory, or any file of the same kind."""
    file, header = backbone.locate(path), backbone.metadata(path)
    made = _described(header, header.get("source") or file.stem)
    fill(made.module, load_file(file), file.as_posix())
    config = facts(file.parent, "config.json")
    return replace(made, run=file.resolve().parent.name if config else file.stem, sha256=_sha256(file),
                   source=file.as_posix(), step=header.get("step", str(config.get("steps", ""))),
                   **_history(file.parent, config))  # fmt: skip


def _checkpoint(path: Path, key: str | None) -> Encoder:
    """One of runs/NAME/checkpoints/step-*.pt; the run's config says what network it is."""
    folder = path.parent.parent
    config = facts(folder, "config.json")
    if not {"backbone", "stem", "size", "data"} <= config.keys():
        raise UserError(f"{path}: no config.json in {folder} that says what network this is")
    data = Store(Path(config["data"]))
    header = {k: str(config[n]) for k, n in (("backbone", "backbone"), ("stem", "stem"), ("image_size", "size"))}
    made = _described(header | {"mean": json.dumps(data.mean), "std": json.dumps(data.std)}, folder.name)
    try:
        state = torch.load(path, "cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds
        raise UserError(f"{path}: not readable as a checkpoint ({str(error).splitlines()[0][:120]})") from None
    if not isinstance(state, dict) or "step" not in state:
        raise UserError(f"{path}: not a checkpoint of train.py")
    key = key or ("average" if state.get("average") else "encoder")
    if key not in state:
        raise UserError(nearest(f"network in {path}", key, [k for k in ("encoder", "average") if k in state]))
    tensors = {k.removeprefix("module."): v for k, v in state[key].items() if k != "n_averaged"}
    fill(made.module, {k.removeprefix("backbone."): v for k, v in tensors.items()}, path.as_posix())
    return replace(made, sha256=_sha256(path), source=f"{path.as_posix()} ({key})", step=str(state["step"]),
                   **_history(folder, config))  # fmt: skip


def _described(header: dict[str, str], run: str) -> Encoder:
    """The network that a header describes, with random weights."""
    size = int(header["image_size"])
    fresh = partial(backbone.create, header["backbone"], image_size=size, stem=header["stem"])
    return Encoder(fresh().eval(), fresh, run, header["backbone"], size, _three(header["mean"]), _three(header["std"]))


def facts(run: Path, name: str) -> dict[str, Any]:
    """A run's config.json or env.json; {} if it has none. UserError if it is damaged."""
    file = run / name
    try:
        found = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged: it holds no settings")
    return found


def _history(run: Path, config: dict[str, Any]) -> dict[str, Any]:
    data = config.get("dataset") or Path(str(config.get("data", ""))).name
    environment = facts(run, "env.json")
    command = f"python {environment['command']} (commit {environment['commit']})" if "command" in environment else ""
    return {"method": str(config.get("objective", "")), "pretrained_on": data, "trained_by": command}


def _three(text: str) -> tuple[float, float, float]:
    r, g, b = json.loads(text)
    return float(r), float(g), float(b)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return index.sha256(file)


def untrained(encoder: Encoder, seed: int, statistics: str = "") -> Encoder:
    """The same architecture with random weights. `statistics`: of which images its batch-norm layers will know them.

    Many residual networks start with every block switched off, by a last batch-norm whose scale is 0. Such a network is
    little but strided 1x1 shortcuts: a ResNet with the standard stem would see one corner of a 32 px image. So as not to
    be held against that, the scales start at 1, as batch-norm has them by itself.
    """
    torch.manual_seed(seed)
    module = encoder.fresh().eval()
    closed = [m for m in norms(module) if isinstance(m.weight, Tensor) and not m.weight.any()]
    for layer in closed:
        nn.init.ones_(layer.weight)
    source = f"random weights (seed {seed}{', all blocks on' if closed else ''})"
    if statistics and norms(module):
        source += f", batch-norm statistics of {statistics}"
    return replace(encoder, module=module, weights="untrained", sha256="", source=source, step="",
                   recipe=f"{fingerprint(module)}, {source}")  # fmt: skip


def norms(module: nn.Module) -> list[Any]:
    """The batch-norm layers that keep statistics of their input."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return [m for m in module.modules() if isinstance(m, kinds) and m.running_mean is not None]


@contextmanager
def calibrating(module: nn.Module) -> Iterator[None]:
    """Inside, the batch-norm layers forget their statistics and average those of the batches that pass; nothing else
    changes, and everything but them stays in evaluation mode."""
    layers = norms(module)
    kept = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain average
        layer.train()
    yield
    for layer, momentum in zip(layers, kept):
        layer.momentum = momentum
        layer.eval()


def _public(target: str, weights: Path | None, key: str | None, image_size: int | None) -> Encoder:
    library, _, name = target.partition(":")
    make, size, mean, std, trained_on = (_timm if library == "timm" else _torchvision)(name, image_size)
    try:
        module = make(weights is None)
    except Exception as error:  # the download clients raise many kinds, and what helps is the same for all
        text = _offline(target, error) if weights is None else f"{target}: {' '.join(str(error).split())[:160]}"
        raise UserError(text) from None
    if weights is not None:
        fill(module, read_weights(weights, key), weights.as_posix())
    return Encoder(
        module.eval(), partial(make, False), target, name if library == "timm" else target, size, _bytes(mean),
        _bytes(std), sha256=_sha256(weights) if weights else "",
        source=weights.as_posix() if weights else f"the download of {library}",
        pretrained_on="" if weights and "." not in name else trained_on,  # a file may hold anything
    )  # fmt: skip


def _bytes(values: Sequence[float]) -> tuple[float, float, float]:
    r, g, b = (255 * float(v) for v in values)
    return r, g, b


def _timm(name: str, image_size: int | None) -> tuple[Callable[[bool], nn.Module], int, Any, Any, str]:
    if not timm.is_model(name.partition(".")[0]):
        raise UserError(nearest("timm model", name, timm.list_models()))
    config = timm.get_pretrained_cfg(name) if timm.is_model_pretrained(name) else None
    size = image_size or (config.input_size[-1] if config else 224)
    fixed: dict[str, Any] = {"img_size": size} if config and config.fixed_input_size else {}

    def make(download: bool) -> nn.Module:
        return timm.create_model(name, pretrained=download, num_classes=0, **fixed)

    mean, std = (config.mean, config.std) if config else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    tag = name.partition(".")[2] or (config.tag if config else None) or ""
    return make, size, mean, std, _trained_on(tag)


def _trained_on(tag: str) -> str:
    """The dataset that a timm tag or the name of torchvision's weights speaks of: imagenet where it was that alone."""
    tag = re.sub(r"_\d{3}$", "", tag.lower())  # the resolution
    alone = tag.startswith("imagenet1k") or tag.rpartition("_")[2] == "in1k"
    others = ("_ft_", "swag", "in21k", "in22k", "in12k", "jft", "ssld", "dist_")
    return "imagenet" if alone and not any(word in tag for word in others) else tag


def _torchvision(name: str, image_size: int | None) -> tuple[Callable[[bool], nn.Module], int, Any, Any, str]:
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise UserError(nearest("torchvision model", name, names))

    def make(download: bool) -> nn.Module:
        return _headless(torchvision.models.get_model(name, weights="DEFAULT" if download else None))

    weights = torchvision.models.get_model_weights(name).DEFAULT.name
    return make, image_size or 224, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, _trained_on(weights)


def _headless(module: nn.Module) -> nn.Module:
    for name in ("fc", "classifier", "heads", "head"):
        if hasattr(module, name):
            setattr(module, name, nn.Identity())
            return module
    raise UserError(f"{type(module).__name__}: no known classifier to take off; use the timm version of this network")


def _offline(target: str, error: Exception) -> str:
    reason = re.sub(r"\s+", " ", str(error))[:120]
    return f"{target}: its weights could not be fetched ({reason}); give a local file: --weights PATH"


def read_weights(path: Path, key: str | None) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file (only tensors are read: nothing in it is executed).

    A file with several networks (student and teacher, model and its average) needs `key` to say which.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: not readable as weights ({str(error).splitlines()[0][:120]})") from None
    nested = {
        k: v for k, v in content.items() if isinstance(v, dict) and any(isinstance(t, Tensor) for t in v.values())
    }
    if key is not None:
        if key not in nested:
            raise UserError(nearest(f"network in {path}", key, nested))
        return _tensors(nested[key])
    if len(nested) > 1:
        raise UserError(f"{path}: several networks inside ({', '.join(nested)}); pick one with --weights-key")
    return _tensors(next(iter(nested.values())) if nested else content)


def _tensors(content: dict) -> dict[str, Tensor]:
    found = {k: v for k, v in content.items() if isinstance(v, Tensor)}
    while found and (prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in found)), "")):
        found = {k.removeprefix(prefix): v for k, v in found.items()}
    return found


def fill(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load every tensor of `module`; only a known head (`HEADS`) may be left over. `UserError` for another network."""
    expected = module.state_dict()
    kept = {k: v for k, v in tensors.items() if k in expected or not k.startswith(HEADS)}
    missing, extra = sorted(expected.keys() - kept.keys()), sorted(kept.keys() - expected.keys())
    shapes = [k for k in expected.keys() & kept.keys() if expected[k].shape != kept[k].shape]
    if missing or extra or shapes:
        matched = len(expected) - len(missing) - len(shapes)
        parts = [
            f"{len(names)} {what} (first: {sorted(names)[0]})"
            for what, names in (("missing", missing), ("unexpected", extra), ("of another shape", shapes))
            if names
        ]
        raise UserError(
            f"{source}: weights of another network: {matched} of {len(expected)} tensors match; {', '.join(parts)}"
        )
    module.load_state_dict(kept)
