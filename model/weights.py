"""Weights that others wrote: which tensors of a file are a network's, what else is in it, and the input they were trained on.

Nothing in a file is executed: what is no tensor or plain container is replaced by an empty object while it is read.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed
from timm.models import PretrainedCfg, adapt_input_conv
from torch import Tensor, nn

from manyview.pipeline.errors import UserError, first_line, nearest

TF_EPS = 1e-3  # of batch-norm in networks that came from TensorFlow
COUNTER = "num_batches_tracked"  # of batch-norm: old files lack it, and it changes nothing in evaluation


# --------------------------------------------------------------------------------------------------------- one file


def split_key(source: str | Path) -> tuple[Path, str | None]:
    """`FILE:teacher` as (FILE, "teacher"); a path without a key as (path, None)."""
    path = Path(source)
    name, colon, key = path.name.rpartition(":")
    if colon and name and not path.exists():
        return path.with_name(name), key
    return path, None


def contents(path: Path) -> Any:
    """What a .safetensors or torch file holds: tensors in plain containers. UserError where it cannot be read."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    except Exception as error:  # torch and safetensors raise many kinds
        reason = first_line(error)[:120]
        if "TorchScript" in str(error):
            reason = "a TorchScript archive, which is a program; save its state_dict instead"
        elif isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
            reason = "its pickle holds more than tensors and plain containers; save the network's state_dict alone"
        raise UserError(f"{path}: not readable as weights ({reason})") from None


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file by dotted names. UserError where it cannot be read, or holds none."""
    tensors = dict(_flat(contents(path), ""))
    if not tensors:
        raise UserError(
            f"{path}: not readable as weights (no tensors by name inside; a whole pickled module is not read)"
        )
    return tensors


def checkpoint(path: Path, key: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor], str] | None:
    """Of one of train.py's checkpoints: what it holds, the tensors (`backbone.…`, `projector.…`) of the network `key` in it,
    encoder or average, and that key; by default the average of the weights, where the run kept one. None for any other file.
    UserError where it cannot be read, or has no such network."""
    content = contents(path) if path.suffix == ".pt" else None
    if not isinstance(content, dict) or "step" not in content or not isinstance(content.get("encoder"), dict):
        return None
    present = [name for name in ("encoder", "average") if content.get(name)]
    key = key or present[-1]
    if key not in present:
        raise UserError(nearest(f"network in {path}", key, present))
    tensors = {name.removeprefix("module."): value for name, value in content[key].items()}
    return content, {name: v for name, v in tensors.items() if name.startswith(("backbone.", "projector."))}, key


class _Skipped:
    """Stands for an object of a class that is not read: it takes what it is given and keeps nothing."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _Mapping(_Skipped):
    """Stands for a dict of such a class (settings that are also attributes, defaultdict): it becomes a plain one."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


class _List(_Skipped, list):
    """Stands for a list of such a class."""


def _unpickled(path: Path) -> Any:
    stand_ins: dict[str, type] = {}
    while True:
        classes: list[Any] = [(stand_in, name) for name, stand_in in sorted(stand_ins.items())]
        try:
            with torch.serialization.safe_globals(classes), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a file is of another format, which the error says too
                return torch.load(path, "cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            unknown = re.search(r"Unsupported global: GLOBAL (\S+) was not", str(error))
            container = re.search(r"Can only (SETITEM|append).* but got <class 'skipped\.(.+)'>", str(error))
            name, kind = (unknown[1], _Skipped) if unknown else ("", _Skipped)
            if container:
                name, kind = container[2], _Mapping if container[1] == "SETITEM" else _List
            stand_in = type(name, (kind,), {"__module__": "skipped"})
            names = [name] if "." in name else [f"builtins.{name}", name]  # torch leaves `builtins` out where it speaks
            if not name or (not container and name in stand_ins):
                raise
            stand_ins |= dict.fromkeys(names, stand_in)


WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # torch's, anywhere in a name


def _flat(content: Any, prefix: str) -> Iterable[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        for wrapper in WRAPPERS:
            prefix = prefix.replace(wrapper, "")
        yield prefix.rstrip("."), content
    elif isinstance(content, dict | list | tuple):
        for name, value in content.items() if isinstance(content, dict) else enumerate(content):
            if isinstance(name, str) or not isinstance(content, dict):
                yield from _flat(value, f"{prefix}{name}.")


# ---------------------------------------------------------------------------------------------------- which network


def fill(module: nn.Module, source: str | Path, key: str | None = None) -> str:
    """Load every tensor of `module` from a file, or `FILE:KEY`; returns a sentence that says what was taken and left.

    The network is looked for under any prefix that holds all of it (`module.`, `teacher.backbone.`); heads, decoders and
    whatever else lies beside it is left out and named. Where several prefixes hold it with other values, `key` says which
    (a part of its prefix: teacher, base_encoder). UserError where there is none, or the file's network is a larger one.
    """
    path, suffix = split_key(source)
    return fill_from(module, read(path), path, key or suffix)


def fill_from(module: nn.Module, tensors: dict[str, Tensor], path: Path, key: str | None = None) -> str:
    """`fill` from tensors that are read already."""
    expected = module.state_dict()
    candidates = _candidates(expected, tensors)
    whole = [c for c in candidates if not c.missing(expected)]
    fitting = [c for c in whole if not _difference(c, _resampled(module, c.tensors, expected)[0], expected)]
    if whole:
        chosen = _choose(whole if key or not fitting else fitting, path, key)
    else:
        chosen = max(candidates, key=lambda c: len(c.tensors), default=_Candidate(""))
    eps = getattr(getattr(module, "bn1", None), "eps", TF_EPS)
    if eps != TF_EPS and any("._depthwise_conv." in name for name in chosen.taken):
        reason = "weights of efficientnet_pytorch, whose networks pad and normalize as TensorFlow's do"
        raise UserError(f"{path}: {reason}: the right network is timm:tf_NAME")
    state, resampled = _resampled(module, chosen.tensors, expected)
    state, adapted = _adapted(module, state, expected)
    if difference := _difference(chosen, state, expected):
        raise UserError(f"{path}: weights of another network: {difference}")
    module.load_state_dict({name: state.get(name, expected[name]) for name in expected})
    left = _left_out(tensors, chosen)
    under = f" under {chosen.prefix.rstrip('.')!r}" if chosen.prefix else ""
    parts = [
        f"{len(expected)} tensors{under} of {path}",
        f"left out: {', '.join(left)}" if left else "",
        resampled,
        adapted,
    ]
    return "; ".join(filter(None, parts))


@dataclass
class _Candidate:
    """What lies under a prefix: the network's own tensors by its names, and others."""

    prefix: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)  # the names in the file of `tensors`

    def missing(self, expected: dict[str, Tensor]) -> list[str]:
        return sorted(k for k in expected if k not in self.tensors and not k.endswith(COUNTER))

    def same(self, other: _Candidate) -> bool:
        pairs = ((v, other.tensors[k]) for k, v in self.tensors.items() if k in other.tensors)
        return all(a.shape == b.shape and a.to(b.dtype).equal(b) for a, b in pairs)


def _candidates(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[_Candidate]:
    """Every prefix under which any of the network's tensors lies, that with the most first."""
    best: list[_Candidate] = []
    # DINOv2's training code writes blocks in chunks: blocks.1.7 is the eighth block.
    unchunked = partial(re.sub, r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.")
    for rename in (str, _in_sequence(expected), unchunked, _efficientnet(expected)):
        counts: Counter[str] = Counter()
        for name in tensors:
            parts = name.split(".")
            for i in range(len(parts)):
                if rename(".".join(parts[i:])) in expected:
                    counts[".".join([*parts[:i], ""])] += 1
        under = [_under(prefix, rename, expected, tensors) for prefix, _ in counts.most_common(8)]
        best = [c for c in under if not c.missing(expected)] or best or under
        if any(not c.missing(expected) for c in best):
            break
    return best


def _under(prefix: str, rename: Callable[[str], str], expected: dict, tensors: dict[str, Tensor]) -> _Candidate:
    candidate = _Candidate(prefix)
    for name, value in tensors.items():
        if name.startswith(prefix):
            own = rename(name.removeprefix(prefix))
            if own in expected:
                candidate.tensors[own] = value
                candidate.taken.add(name)
            else:
                candidate.others.append(own)
    return candidate


def _in_sequence(expected: dict[str, Tensor]) -> Callable[[str], str]:
    """lightly's and others' `Sequential(*resnet.children())`: 0 is conv1, 1 bn1, 4 to 7 the four layers."""
    places = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
    if "conv1.weight" not in expected:
        return str
    return lambda name: ".".join([places.get(name.partition(".")[0], "?"), name.partition(".")[2]])


def _efficientnet(expected: dict[str, Tensor]) -> Callable[[str], str]:
    """efficientnet_pytorch's names of timm's EfficientNets: its blocks are numbered through, timm's by stages."""
    inside = [name for name in expected if re.match(r"blocks\.\d+\.\d+\.", name)]
    stages = sorted({tuple(map(int, name.split(".")[1:3])) for name in inside})
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    narrow = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    wide = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
            "_bn2": "bn3"}  # fmt: skip
    excite = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}

    def rename(name: str) -> str:
        first, *rest = name.split(".")
        if first != "_blocks" or len(rest) != 3 or not rest[0].isdigit() or int(rest[0]) >= len(stages):
            return ".".join([outside.get(first, "?"), *rest])
        stage, block = stages[int(rest[0])]
        own = f"blocks.{stage}.{block}"
        parts = (wide if f"{own}.conv_pwl.weight" in expected else narrow) | excite
        return ".".join([own, parts.get(rest[1], "?"), rest[2]])

    return rename


def _choose(whole: list[_Candidate], path: Path, key: str | None) -> _Candidate:
    whole = sorted(whole, key=lambda c: len(c.prefix))
    names = {c.prefix: _distinct(c, whole) for c in whole}
    if key is not None:
        asked = [c for c in whole if f".{key}." in f".{c.prefix}"]
        if not asked:
            raise UserError(nearest(f"network in {path}", key, names.values()))
        whole = asked
    elif set(names.values()) == {"encoder", "average"}:  # a checkpoint of train.py: the average is what it exports
        whole = [c for c in whole if names[c.prefix] == "average"]
    if not all(whole[0].same(other) for other in whole[1:]):
        raise UserError(
            f"{path}: several networks inside ({', '.join(sorted(names[c.prefix] for c in whole))}); "
            f"pick one with --weights-key, or as {path.name}:{names[whole[0].prefix]}"
        )
    return whole[0]


def _distinct(candidate: _Candidate, others: list[_Candidate]) -> str:
    """The part of its prefix that tells it from the others."""
    parts = candidate.prefix.rstrip(".").split(".")
    shared = set.intersection(*(set(c.prefix.split(".")) for c in others)) if len(others) > 1 else set()
    return next((p for p in parts if p not in shared), candidate.prefix.rstrip("."))


def _resampled(module: Any, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Position embeddings for the image size of `module`, and the words that say so."""
    own, theirs = expected.get("pos_embed"), tensors.get("pos_embed")
    grid = getattr(getattr(module, "patch_embed", None), "grid_size", None)
    if own is None or theirs is None or grid is None or own.shape == theirs.shape or theirs.ndim != 3:
        return tensors, ""
    if own.shape[2] != theirs.shape[2]:
        return tensors, ""
    extra = 0 if getattr(module, "no_embed_class", False) else getattr(module, "num_prefix_tokens", 1)
    side = round((theirs.shape[1] - extra) ** 0.5)
    if side * side + extra != theirs.shape[1]:
        return tensors, ""
    resized = resample_abs_pos_embed(theirs.float(), list(grid), [side, side], num_prefix_tokens=extra)
    said = f"position embeddings resampled from {side} x {side} to {grid[0]} x {grid[1]} patches"
    return tensors | {"pos_embed": resized.to(theirs.dtype)}, said


def _adapted(module: Any, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """A first convolution of RGB for the channels of `module`, as timm does it (for one channel their sum, for more repeated
    and scaled to the same sum), and the words that say so."""
    channels = getattr(module, "channels", 3)
    first = {
        name: adapt_input_conv(channels, value)
        for name, value in tensors.items()
        if channels != 3 and value.ndim == 4 and value.shape[1] == 3
        and expected[name].shape == (len(value), channels, *value.shape[2:])
    }  # fmt: skip
    said = f"first convolution adapted from 3 channels to {channels}" if first else ""
    return tensors | first, said


def _difference(chosen: _Candidate, state: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """How what was found differs from the network; "" where it does not. A tensor in a part of the network that it has itself
    (a thirteenth block) is a difference, one in a part that it has not (a head) is none."""
    missing = chosen.missing(expected)
    shapes = sorted(k for k, v in state.items() if v.shape != expected[k].shape)
    own_parts = {name.partition(".")[0] for name in expected}
    extra = sorted(name for name in chosen.others if name.partition(".")[0] in own_parts)
    if not (missing or shapes or extra):
        return ""
    named = (("missing", missing), ("unexpected", extra), ("of another shape", shapes))
    parts = [f"{len(names)} {what} (first: {names[0]})" for what, names in named if names]
    under = f" under {chosen.prefix.rstrip('.')!r}" if chosen.prefix else ""
    return f"{len(state) - len(shapes)} of {len(expected)} tensors match{under}; {', '.join(parts)}"


def _left_out(tensors: dict[str, Tensor], chosen: _Candidate) -> list[str]:
    """What else is in the file, by the part that it belongs to: the first that it does not share with the network."""
    prefix = chosen.prefix.split(".")[:-1]
    parts: dict[str, None] = {}
    for name in tensors.keys() - chosen.taken:
        words = name.split(".")
        shared = next((i for i, (a, b) in enumerate(zip(words, prefix)) if a != b), len(prefix))
        parts[words[min(shared, len(words) - 1)]] = None
    listed = sorted(parts.keys() - {"optimizer", "scaler", "random"})
    return [*listed[:8], f"and {len(listed) - 8} more"] if len(listed) > 8 else listed


# ------------------------------------------------------------------------------------------ what they were trained on


@dataclass(frozen=True)
class Transform:
    """What an image becomes before it enters a network. `mean`, `std`: of values in 0..`white`, a channel."""

    size: int  # pixels, square
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float  # the centre square's share of the short side
    interpolation: str = "bilinear"  # or bicubic
    origin: str = ""  # where it comes from, for the reader
    white: int = 255

    @property
    def text(self) -> str:
        digits = ".3f" if self.white == 255 else ".3g"
        mean, std = (", ".join(f"{v / self.white:{digits}}" for v in values) for values in (self.mean, self.std))
        shown = f"centre square of {self.crop:g} of the short side, {self.interpolation} to {self.size} px"
        return f"{shown}, mean ({mean}), std ({std})" + (f": {self.origin}" if self.origin else "")


def in_255(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(255 * float(v) for v in values)


@dataclass(frozen=True)
class Public:
    """A network of timm or torchvision: how to make it, and what is known of its published weights."""

    name: str  # with the weights' tag
    make: Callable[[bool], nn.Module]  # downloaded or not
    transform: Transform
    trained_on: str


def public(target: str, image_size: int | None = None, *, local: bool = False) -> Public:
    """`timm:NAME` or `torchvision:NAME`. `local`: other weights will be put into it, so that only a tag in the name, not
    the library's default, says how they were trained. UserError for an unknown name."""
    library, _, name = target.partition(":")
    return (_timm if library == "timm" else _torchvision)(name, image_size, local)


def _assumed(transform: Transform, vit: bool) -> Transform:
    """For a file that says nothing of it: what nearly all self-supervised encoders of photos were trained on."""
    mean, std = in_255(IMAGENET_DEFAULT_MEAN), in_255(IMAGENET_DEFAULT_STD)
    filter_name = "bicubic" if vit else "bilinear"
    origin = "assumed, the file does not say; set it with --mean, --std, --crop and --interpolation"
    return replace(transform, mean=mean, std=std, crop=0.875, interpolation=filter_name, origin=origin)


def _timm(name: str, image_size: int | None, local: bool) -> Public:
    if not timm.is_model(name.partition(".")[0]):
        raise UserError(nearest("timm model", name, timm.list_models()))
    published = timm.get_pretrained_cfg(name) if timm.is_model_pretrained(name) else None
    config = published or PretrainedCfg(interpolation="bilinear")
    size, tag = image_size or config.input_size[-1], name.partition(".")[2] or config.tag or ""
    fixed: dict[str, Any] = {"img_size": size} if config.fixed_input_size else {}
    transform = Transform(size, in_255(config.mean), in_255(config.std), config.crop_pct,
                          "bicubic" if config.interpolation == "bicubic" else "bilinear",
                          f"timm's settings of {tag}" if tag else "")  # fmt: skip
    if local and "." not in name:
        module = timm.models.model_entrypoint(name).__module__
        transform = _assumed(transform, "vision_transformer" in module or bool(fixed))
        if tag:
            origin = f"{transform.origin}, or as timm's own weights have it: timm:{name}.{tag}"
            transform = replace(transform, origin=origin)
    full = name if "." in name or local or not tag else f"{name}.{tag}"

    def make(download: bool) -> nn.Module:
        return timm.create_model(name, pretrained=download, num_classes=0, **fixed)

    return Public(f"timm:{full}", make, transform, "" if local and "." not in name else trained_on(tag))


def _torchvision(name: str, image_size: int | None, local: bool) -> Public:
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise UserError(nearest("torchvision model", name, names))
    weights = torchvision.models.get_model_weights(name).DEFAULT
    preset: Any = weights.transforms()
    size, resized = preset.crop_size[0], preset.resize_size[0]
    kind = "bicubic" if "bicubic" in str(preset.interpolation).lower() else "bilinear"
    transform = Transform(image_size or size, in_255(preset.mean), in_255(preset.std), round(size / resized, 4), kind,
                          f"torchvision's settings of {weights.name}")  # fmt: skip
    if local:
        transform = _assumed(transform, "vit" in name)

    def make(download: bool) -> nn.Module:
        module = torchvision.models.get_model(name, weights=weights if download else None)
        for head in ("fc", "classifier", "heads", "head"):
            if hasattr(module, head):
                setattr(module, head, nn.Identity())
                return module
        raise UserError(
            f"{type(module).__name__}: no known classifier to take off; use the timm version of this network"
        )

    full = name if local else f"{name}.{weights.name}"
    return Public(f"torchvision:{full}", make, transform, "" if local else trained_on(weights.name))


def trained_on(tag: str) -> str:
    """The dataset that a timm tag or the name of torchvision's weights speaks of: imagenet where it was that alone."""
    tag = re.sub(r"_\d{3}$", "", tag.lower())  # the resolution
    alone = tag.startswith("imagenet1k") or tag.rpartition("_")[2] == "in1k"
    others = ("_ft_", "swag", "in21k", "in22k", "in12k", "jft", "ssld", "dist_")
    return "imagenet" if alone and not any(word in tag for word in others) else tag


def download(network: Public) -> nn.Module:
    """The network with its published weights. UserError where they cannot be fetched."""
    try:
        return network.make(True)
    except Exception as error:  # the download clients raise many kinds, and what helps is the same for all
        reason = re.sub(r"\s+", " ", str(error))[:120]
        text = f"{network.name}: its weights could not be fetched ({reason}); give a local file: --weights PATH"
        raise UserError(text) from None
