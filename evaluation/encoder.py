"""What is evaluated: a run of this project, an exported file, weights of timm or torchvision; and what it is held against."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manyview.model import backbone, weights
from manyview.model.weights import Transform, in_255
from manyview.pipeline import files, index
from manyview.pipeline.codec import RGB, Layout
from manyview.pipeline.errors import UserError, first_line, nearest
from manyview.pipeline.views import crop_ratio

LAYERS = "pooled, last:N (the last N blocks or stages, concatenated), layer:N (one, counted from 0) or tokens"
PIXEL_SIZE, PIXEL_BYTES = 32, 2**31  # of the images that the baseline of plain pixels looks at, and of all of them


@dataclass(frozen=True)
class Encoder:
    """A frozen network (N, C, S, S) -> (N, F), and what has to be known to feed it."""

    module: nn.Module
    fresh: Callable[[], nn.Module]  # the same architecture with random weights
    run: str  # how the tables name it
    backbone: str
    image_size: int
    mean: tuple[float, ...]  # of the input, a channel, in 0..layout.white
    std: tuple[float, ...]
    layout: Layout = RGB  # of the images
    crop: float | None = None  # the share of the short side that the evaluation view shows; None: by the size
    interpolation: str = "bilinear"  # of the evaluation view: or bicubic
    origin: str = ""  # of mean, std, crop and interpolation
    weights: str = "trained"  # or "untrained", "pixels"
    layers: str = "pooled"  # what of the network the features are: see `Layers`
    variant: str = ""  # what was asked for instead of its own size, transform and layers
    loaded: str = ""  # what was taken from a file, and what was left in it
    sha256: str = ""  # of the weights file
    source: str = ""
    recipe: str = ""  # the identity of weights that are made, known before they are
    step: str = ""
    method: str = ""
    pretrained_on: str = ""
    trained_by: str = ""  # the command
    policy: str = "simclr"  # of the views that it was trained on, for LiDAR and averaging
    augment: tuple[str, ...] = ()

    @property
    def crop_ratio(self) -> float:
        return self.crop or crop_ratio(self.image_size)

    @property
    def transform(self) -> str:
        """What an image becomes before it enters the network, in words."""
        crop, white = self.crop_ratio, self.layout.white
        return Transform(self.image_size, self.mean, self.std, crop, self.interpolation, self.origin, white).text

    @property
    def no_image(self) -> Tensor:
        """(1, C, S, S) of zeros."""
        return torch.zeros(1, self.layout.channels, self.image_size, self.image_size)

    def check(self, store: Any) -> None:
        """UserError where the network takes other images than these."""
        if self.layout != store.layout:
            raise UserError(f"{self.run} takes images of {self.layout}, {store.name} has {store.layout}")
        if self.interpolation == "bicubic" and store.layout != RGB:
            raise UserError(f"bicubic views are of {RGB}, {store.name} has {store.layout}: --interpolation bilinear")

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


@dataclass(kw_only=True)
class Asked:
    """What the user may say about an encoder, instead of what comes with it: flags of tools/evaluate.py and tools/embed.py."""

    weights: str | None = None
    """A local file with the weights of a timm or torchvision target, instead of the download; FILE:teacher takes one of several
    networks inside."""
    weights_key: str | None = None
    """Which network inside a file of several: a part of the prefix of its tensors."""
    image_size: int | None = None
    """Pixels; default: those the encoder was trained on."""
    mean: tuple[float, float, float] | None = None
    """Of the input, in 0..1; default: what comes with the weights, and it is printed."""
    std: tuple[float, float, float] | None = None
    """As the mean."""
    crop: float | None = None
    """The share of the short side that the view shows; default: what comes with the weights."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Of the view; default: what comes with the weights."""
    layers: str = "pooled"
    """What the features are: pooled, last:N (the last N blocks or stages, concatenated), layer:N (one of them), or for embed.py
    tokens."""
    pretrained_on: str | None = None
    """The name of the data that foreign weights were trained on, for the tables and `compare`."""

    def check(self) -> list[str]:
        """A line for everything that cannot be."""
        errors = []
        if self.image_size is not None and self.image_size < 8:
            errors.append(f"--image-size must be at least 8, not {self.image_size}")
        if self.crop is not None and not 0 < self.crop <= 1:
            errors.append(f"--crop must be a share in (0, 1], not {self.crop}")
        if self.std is not None and min(self.std) <= 0:
            errors.append(f"--std must be above 0, not {' '.join(map(str, self.std))}")
        return errors

    @property
    def variant(self) -> str:
        """What of it makes other features of the same weights, in a name's letters; "" where nothing does."""
        numbers = (f"{name}{','.join(map(str, v))}" for name in ("mean", "std") if (v := getattr(self, name)))
        parts = [f"{self.image_size}px" if self.image_size else "", *numbers, f"crop{self.crop}" if self.crop else "",
                 self.interpolation, "" if self.layers == "pooled" else self.layers.replace(":", "-")]  # fmt: skip
        return "-".join(filter(None, parts))


def load(target: str, asked: Asked | None = None) -> Encoder:
    """`target`: a run directory, one of its checkpoints (.pt), a .safetensors file, `timm:NAME` or `torchvision:NAME`.

    Of a checkpoint the average of the weights is taken if the run kept one. UserError: no such, or parameters not finite.
    """
    asked = asked or Asked()
    encoder = _load(target, asked)
    broken = [name for name, value in encoder.module.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise UserError(
            f"{encoder.run}: {len(broken)} of its tensors are not finite (first: {broken[0]}): it has diverged"
        )
    if asked.image_size:
        encoder = _resized(encoder, asked.image_size)
    changes: dict[str, Any] = {name: in_255(values) for name in ("mean", "std") if (values := getattr(asked, name))}
    if changes and encoder.layout != RGB:
        raise UserError(f"--mean and --std are three numbers for RGB, {encoder.run} takes {encoder.layout}")
    changes |= {"crop": asked.crop} if asked.crop else {}
    changes |= {"interpolation": asked.interpolation} if asked.interpolation else {}
    if changes:
        changes["origin"] = f"{', '.join(changes)} as asked for"
    changes |= {"pretrained_on": asked.pretrained_on} if asked.pretrained_on is not None else {}
    return select(replace(encoder, **changes, variant=asked.variant), asked.layers)


def _load(target: str, asked: Asked) -> Encoder:
    if target.startswith(("timm:", "torchvision:")):
        return _public(target, asked)
    if asked.weights is not None:
        raise UserError("--weights goes with a target timm:NAME or torchvision:NAME")
    path, key = weights.split_key(target)
    if path.is_dir() or (path.is_file() and path.suffix in (".pt", ".safetensors")):
        return _ours(path, asked.weights_key or key)
    near = [p.as_posix() for p in Path(path.parent if path.parent.is_dir() else ".").glob("*/")]
    kinds = "a run directory, a checkpoint or .safetensors file, timm:NAME or torchvision:NAME (others' files: --weights FILE)"
    raise UserError(f"{nearest('target', target, near)} ({kinds})")


def _ours(path: Path, key: str | None) -> Encoder:
    """A run's backbone.safetensors, one of its checkpoints, or a file of the same kind elsewhere."""
    module, header = backbone.load(path, key)
    backbone.images(header)  # which says what is missing
    file, size = backbone.locate(path), int(header["image_size"])
    folder = file.parent.parent if file.suffix == ".pt" else file.parent
    config, environment = (files.facts(folder / name) for name in ("config.json", "env.json"))
    name = folder.resolve().name if config else header.get("source") or file.stem
    network = f" ({header['network']})" if "network" in header else ""
    mean, std = (tuple(float(value) for value in json.loads(header[word])) for word in ("mean", "std"))
    return Encoder(
        module, partial(backbone.described, header), name, header["backbone"], size, mean, std, backbone.layout(header),
        float(header["crop_pct"]) if "crop_pct" in header else None, header.get("interpolation", "bilinear"),
        "as it was trained", sha256=index.sha256(file), source=file.as_posix() + network,
        step=header.get("step", str(config.get("steps", ""))), method=str(config.get("objective", "")),
        pretrained_on=config.get("dataset") or Path(str(config.get("data", ""))).name,
        trained_by=f"python {environment['command']} (commit {environment['commit']})" if "command" in environment else "",
        policy=config.get("policy", "simclr"), augment=tuple(config.get("augment", ())),
    )  # fmt: skip


def _public(target: str, asked: Asked) -> Encoder:
    network = weights.public(target, asked.image_size, local=asked.weights is not None)
    if asked.weights is None:
        module, loaded, sha, name = weights.download(network), "", "", network.name
        source = f"the download of {target.partition(':')[0]}"
    else:
        try:
            module = network.make(False)
        except Exception as error:  # of another library's making
            raise UserError(f"{target}: {' '.join(str(error).split())[:160]}") from None
        loaded = weights.fill(module, asked.weights, asked.weights_key)
        path, key = weights.split_key(asked.weights)
        sha, source = index.sha256(path), path.as_posix()
        name = "-".join(filter(None, [network.name, path.stem, asked.weights_key or key, sha[:8]]))
    t = network.transform
    return Encoder(
        module.eval(), partial(network.make, False), name, target.removeprefix("timm:"), t.size, t.mean, t.std, RGB, t.crop,
        t.interpolation, t.origin, sha256=sha, source=source, loaded=loaded, pretrained_on=network.trained_on,
    )  # fmt: skip


def _resized(encoder: Encoder, size: int) -> Encoder:
    """The same network for images of another size; position embeddings are resampled. UserError where it takes none such."""

    def resize(module: Any) -> nn.Module:
        if hasattr(module, "set_input_size"):
            module.set_input_size(img_size=size)
        return module

    fresh, before = encoder.fresh, encoder.image_size
    try:
        if size != before:
            module = resize(encoder.module)
            moved = f"; position embeddings resampled from {before} px" if hasattr(module, "pos_embed") else ""
            encoder = replace(encoder, module=module, fresh=lambda: resize(fresh()), image_size=size,
                              loaded=f"{encoder.loaded}{moved}".strip("; "))  # fmt: skip
        with torch.inference_mode():
            encoder.module(encoder.no_image)
    except (AssertionError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"{encoder.run}: it does not take {size} px images: {first_line(error)[:120]}") from None
    return encoder


def pixels(trained: Encoder, images: int) -> Encoder:
    """No network: what an image is after the encoder's own crop and resize, at its size or a smaller one, as numbers."""
    channels, white = trained.layout.channels, float(trained.layout.white)
    affordable = int((PIXEL_BYTES / (4 * channels * max(1, images))) ** 0.5)
    size = max(1, min(trained.image_size, PIXEL_SIZE, affordable))
    name = f"pixels at {size} px"
    return replace(
        trained, module=nn.Flatten().eval(), fresh=nn.Flatten, image_size=size, mean=(0.0,) * channels, std=(white,) * channels,
        weights="pixels", sha256="", source=name, step="", recipe=name, layers="pooled",
    )  # fmt: skip


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


# ------------------------------------------------------------------------------- which part of a network the features are


class Layers(nn.Module):
    """(N, C, S, S) -> (N, F), or (N, T, F) for `tokens`, from a network of timm.

    Of a ViT a block is its class token after the final norm (the mean of its tokens where it has none), as DINO's linear
    probe takes them; of other networks a stage is the mean over its map.
    """

    def __init__(self, network: Any, spec: str):
        super().__init__()
        self.network, self.spec = network, spec

    def forward(self, x: Tensor) -> Tensor:
        kind, _, number = self.spec.partition(":")
        if kind == "tokens":
            y = self.network.forward_features(x)
            return y.flatten(2).mT if y.ndim == 4 else y
        wanted: Any = int(number) if kind == "last" else [int(number)]
        if hasattr(self.network, "num_prefix_tokens"):
            asked = {"output_fmt": "NLC", "return_prefix_tokens": True, "intermediates_only": True}
            blocks = self.network.forward_intermediates(x, indices=wanted, norm=True, **asked)
            pairs = [block if isinstance(block, tuple) else (block, block[:, :0]) for block in blocks]
            return torch.cat([own[:, 0] if own.shape[1] else patches.mean(1) for patches, own in pairs], 1)
        maps = self.network.forward_intermediates(x, indices=wanted, intermediates_only=True)
        return torch.cat([y.mean((2, 3)) for y in maps], 1)


def select(encoder: Encoder, spec: str) -> Encoder:
    """The encoder whose features are what `spec` says. UserError for an unknown `spec`, or a network without such layers."""
    if spec == "pooled":
        return encoder
    if not re.fullmatch(r"tokens|last:[1-9]\d*|layer:\d+", spec):
        raise UserError(f"unknown layers {spec!r}; valid: {LAYERS}")
    module = Layers(encoder.module, spec).eval()
    try:
        with torch.inference_mode():
            module(encoder.no_image)
    except (AttributeError, AssertionError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{encoder.run} ({encoder.backbone}) has no {spec}: {str(error).splitlines()[0][:100]}"
        ) from None
    fresh = encoder.fresh
    return replace(encoder, module=module, fresh=lambda: Layers(fresh(), spec), layers=spec)
