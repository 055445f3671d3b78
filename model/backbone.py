"""Backbones from timm and torchvision, and their weights on disk under names that both load.

`create` gives a module that maps images (N, C, H, W) to features (N, num_features). Small images get a small stem: a
3x3, stride 1 convolution without max-pool for ResNets, small patches for ViTs; no parameter changes its name.

A name may carry timm's keyword arguments: `resnet18:layers=[1,1,1,1],channels=[32,64,128,256]`. It is written into the
weights' header as it is, and the lines that load them in timm hold the arguments.
"""

from __future__ import annotations

import contextlib
import json
from inspect import signature
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import yaml
from safetensors import safe_open
from safetensors.torch import save as dump
from torch import nn

from manyview.model import weights
from manyview.pipeline import files
from manyview.pipeline.codec import Layout
from manyview.pipeline.errors import UserError, first_line, nearest
from manyview.pipeline.store import Store, training_split
from manyview.pipeline.views import crop_ratio

SMALL_IMAGE = 64  # pixels, up to which stem "auto" is "small"
STEMS = ("auto", "small", "standard")

# Networks for a CPU, as a timm name and its keyword arguments, so that timm loads their weights.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet10-narrow": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)})
}
# Not for a name to say: what this module sets itself, and what could make timm read files or the network.
RESERVED = {*signature(timm.create_model).parameters, "num_classes", "in_chans", "features_only"}


def names() -> list[str]:
    """Every valid name: ours, `torchvision:NAME` for its ResNets, and timm's."""
    torchvisions = [name for name in torchvision.models.list_models(torchvision.models) if "resne" in name]
    return [*TINY, *(f"torchvision:{name}" for name in torchvisions), *timm.list_models()]


def check(name: str) -> None:
    """UserError where there is no such backbone to train, with the nearest names."""
    _family(name)
    network, tag, _ = _timm(name)[0].partition(".")
    if tag:
        raise UserError(f"{name} names trained weights; training starts from fresh ones, or --init-from: {network}")


def create(
    name: str, *, image_size: int, stem: str = "auto", other_sizes: bool = False, channels: int = 3
) -> nn.Module:
    """A backbone with fresh weights for square images of `image_size` pixels: (N, channels, H, W) -> (N, num_features).

    stem: "small", "standard", or "auto", which is "small" up to 64 pixels where the backbone has one. other_sizes: it will
    see images of other sizes too (a ViT resamples its position embedding for them); the weights are the same.
    UserError for an unknown name, and for a network that does not fit the image size.
    """
    model = _build(name, image_size, resolve(name, stem, image_size), other_sizes, channels)
    model.channels, model.num_features = channels, _features(model, name, image_size, channels)
    return model


def _timm(name: str) -> tuple[str, dict[str, Any]]:
    """The timm name and keyword arguments behind a backbone's name. UserError where the arguments cannot be read."""
    if name.startswith("torchvision:"):
        return name.removeprefix("torchvision:"), {}
    network, _, text = name.partition(":")
    timm_name, own = TINY.get(network, (network, {}))
    try:
        keywords = yaml.safe_load("{" + text.replace("=", ": ") + "}")
    except yaml.YAMLError:
        keywords = None
    if not isinstance(keywords, dict) or not all(isinstance(k, str) and v is not None for k, v in keywords.items()):
        raise UserError(
            f"backbone {name!r}: after the colon come arguments as in resnet18:layers=[1,1,1,1],drop_rate=0.1"
        )
    if reserved := sorted(RESERVED & keywords.keys()):
        raise UserError(f"backbone {name!r}: {reserved[0]} cannot be given in a name")
    return timm_name, own | {key: tuple(value) if isinstance(value, list) else value for key, value in keywords.items()}


def _family(name: str) -> str:
    """`resnet`, `vit` or `other`: which small stem there is."""
    network = name if name.startswith("torchvision:") else name.partition(":")[0]
    if network not in TINY and not timm.is_model(network) and network not in names():
        raise UserError(nearest("backbone", network, names()))
    module = timm.models.model_entrypoint(_timm(name)[0].split(".")[0]).__module__.rpartition(".")[2]
    return {"resnet": "resnet", "vision_transformer": "vit", "deit": "vit"}.get(module, "other")


def resolve(name: str, stem: str, image_size: int) -> str:
    """`stem` without "auto". UserError where the backbone has no such stem."""
    if stem not in STEMS:
        raise UserError(nearest("stem", stem, STEMS))
    family = _family(name)
    if stem == "small" and family == "other":
        raise UserError(f"backbone {name!r} has no small stem; ResNets and ViTs have one")
    if stem == "auto":
        return "small" if image_size <= SMALL_IMAGE and family != "other" else "standard"
    return stem


def _kwargs(name: str, stem: str, image_size: int, channels: int = 3) -> dict[str, Any]:
    """What timm.create_model needs beside its name and num_classes=0."""
    kwargs = _timm(name)[1] | ({"in_chans": channels} if channels != 3 else {})
    kwargs |= {"img_size": image_size} if _fixed_size(name) else {}
    return kwargs | ({"patch_size": small_patch(image_size)} if stem == "small" and _family(name) == "vit" else {})


def small_patch(image_size: int) -> int:
    """The largest patch (pixels) that divides the image into 7 x 7 patches or more: 4 at 32 px, 8 at 64."""
    return max(p for p in range(1, image_size // 7 + 1) if image_size % p == 0)


def patch_size(name: str, *, image_size: int, stem: str = "auto") -> int:
    """Side in pixels of the patches into which the backbone cuts an image; 1 where it needs no whole number of them."""
    if not _fixed_size(name):
        return 1
    with torch.device("meta"):
        patches = getattr(_build(name, image_size, resolve(name, stem, image_size)), "patch_embed", None)
    return max(getattr(patches, "patch_size", (1,)))


def _fixed_size(name: str) -> bool:
    """Whether it is made for one image size."""
    return bool(timm.models.get_pretrained_cfg_value(_timm(name)[0], "fixed_input_size"))


def _build(name: str, image_size: int, stem: str, other_sizes: bool = False, channels: int = 3) -> Any:
    if name.startswith("torchvision:"):
        if channels != 3:
            raise UserError(
                f"torchvision's networks take 3 channels, not {channels}; timm's of the same name takes any"
            )
        model = torchvision.models.get_model(name.removeprefix("torchvision:"), weights=None)
        model.fc = nn.Identity()
    else:
        kwargs = _kwargs(name, stem, image_size, channels)
        try:
            model = _timm_model(name, kwargs, other_sizes and _fixed_size(name))
        except (AssertionError, AttributeError, ValueError, RuntimeError, TypeError) as error:
            raise UserError(
                f"backbone {name!r} does not take {_images(image_size, channels)}: {first_line(error)}"
            ) from error
    if stem == "small" and _family(name) == "resnet":
        _small_stem(model, channels)
    return model


def _timm_model(name: str, kwargs: dict[str, Any], other_sizes: bool) -> Any:
    """timm's families have two words for taking other sizes than `img_size`, and some have none."""
    words: list[dict[str, Any]] = [{"dynamic_img_size": True}, {"strict_img_size": False}]
    for word in words if other_sizes else []:
        with contextlib.suppress(TypeError):
            return timm.create_model(_timm(name)[0], num_classes=0, **kwargs, **word)
    return timm.create_model(_timm(name)[0], num_classes=0, **kwargs)


def _images(size: int, channels: int) -> str:
    return f"{size} px images" + f" of {channels} channels" * (channels != 3)


def _small_stem(model: Any, channels: int) -> None:
    """First convolution 3x3 at stride 1, no max-pool; BatchNorm and ReLU after it stay."""
    if isinstance(model.conv1, nn.Sequential):  # a deep stem is 3x3 already
        deep: Any = model.conv1[0]
        deep.stride = (1, 1)
    else:
        model.conv1 = nn.Conv2d(channels, model.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()


@torch.no_grad()
def _features(model: nn.Module, name: str, image_size: int, channels: int) -> int:
    """The width of the output, by asking: a few of timm's networks state another one."""
    try:
        y = model.eval()(torch.zeros(1, channels, image_size, image_size))
    except (AssertionError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"backbone {name!r} does not take {_images(image_size, channels)}: {first_line(error)}"
        ) from error
    finally:
        model.train()
    if y.ndim != 2:
        raise UserError(f"backbone {name!r} gives no feature vector but {tuple(y.shape[1:])}")
    return y.shape[1]


# ------------------------------------------------------------------------------------------------------------- on disk


def save(module: nn.Module, path: str | Path, metadata: dict[str, str]) -> None:
    """Write weights as safetensors, atomically. `metadata` names at least `backbone`, `stem` and `image_size`; also `channels`
    and `bits` of the images where they are no RGB of 8 bits.

    UserError where they cannot be written.

    It goes into the file's header, with `num_features` and, where mean and std are known, timm's `pretrained_cfg`; wrappers
    (DDP, torch.compile) leave no trace in the names.
    """
    if missing := {"backbone", "stem", "image_size"} - metadata.keys():
        raise ValueError(f"backbone metadata lacks {', '.join(sorted(missing))}")
    while (inner := getattr(module, "_orig_mod", None) or getattr(module, "module", None)) is not None:
        module = inner
    tensors = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
    header = {"format": "pt", **metadata, "num_features": str(module.num_features)}
    if {"mean", "std"} <= header.keys():
        header["pretrained_cfg"] = json.dumps(images(header))
    try:
        files.write(Path(path), dump(tensors, {key: str(value) for key, value in header.items()}))
    except OSError as error:
        raise UserError(
            f"{path} not written: {error.strerror}; with room there, the same command with --resume"
        ) from error


def layout(header: dict[str, str]) -> Layout:
    """Of the images that the network wants."""
    return Layout(int(header.get("channels", 3)), int(header.get("bits", 8)))


def images(header: dict[str, str]) -> dict[str, Any]:
    """What the network wants to see, in timm's words: size, crop, interpolation, and mean and std of values 0..1.

    UserError where the weights do not say by which mean and std (in the header: of 0..255, or 0..65535) their images are
    normalized.
    """
    size, pixels = int(header["image_size"]), layout(header)
    digits = 6 if pixels.bits == 8 else 9
    try:
        mean, std = ([round(v / pixels.white, digits) for v in json.loads(header[name])] for name in ("mean", "std"))
    except (KeyError, ValueError):
        raise UserError("these weights do not say by which mean and std their images are normalized") from None
    crop, kind = float(header.get("crop_pct", crop_ratio(size))), header.get("interpolation", "bilinear")
    return {"input_size": [pixels.channels, size, size], "interpolation": kind, "crop_pct": crop, "crop_mode": "center",
            "mean": mean, "std": std}  # fmt: skip


def metadata(path: str | Path) -> dict[str, str]:
    """The header of a file that `save` wrote; `path` may be its run directory. UserError for anything else."""
    path = locate(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except Exception as error:
        raise UserError(f"{path}: not a safetensors file ({first_line(error)})") from error
    if "backbone" not in header:
        raise UserError(f"{path}: its header names no backbone; others' files go with timm:NAME --weights FILE")
    return header


def locate(path: str | Path) -> Path:
    """`path`, or `backbone.safetensors` in it where it is a run directory. UserError where there is none."""
    path = Path(path)
    file = path / "backbone.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no weights at {file}; `python train.py` writes them into its run directory")
    return file


def load(source: str | Path, key: str | None = None) -> tuple[nn.Module, dict[str, str]]:
    """The backbone in a file that `save` wrote, in its run directory, or in a checkpoint of train.py's (FILE, or FILE:encoder
    where it also has the average of the weights; or `key`), in eval mode, and its header."""
    path, suffix = weights.split_key(source)
    path = locate(path)
    if path.suffix == ".pt":
        checkpointed = weights.checkpoint(path, key or suffix)
        if checkpointed is None:
            raise UserError(f"{path}: not a checkpoint of train.py; others' files go with timm:NAME --weights FILE")
        content, tensors, network = checkpointed
        header = content.get("header") or _header_of_run(path)
        header = {**header, "step": str(content["step"]), "network": network}
    else:
        header, tensors = metadata(path), weights.read(path)
    model = described(header)
    weights.fill_from(model, tensors, path)
    return model.eval(), {**header, "num_features": str(model.num_features)}


def _header_of_run(path: Path) -> dict[str, str]:
    """Of an older checkpoint, by its run's config and export."""
    folder = path.parent.parent
    config = files.facts(folder / "config.json")
    if not {"backbone", "stem", "size", "data"} <= config.keys():
        raise UserError(f"{path}: no config.json in {folder} that says what network this is")
    header = {name: config[name] for name in ("backbone", "stem")}
    header |= {"image_size": str(config["size"]), "source": folder.name}
    if exported := _header(folder / "backbone.safetensors"):
        return header | {name: exported[name] for name in ("mean", "std", "channels", "bits") if name in exported}
    return header | Store(config["data"], training_split(config["data"])).described()


def described(header: dict[str, str]) -> nn.Module:
    """The backbone of which a header tells, with fresh weights."""
    size, channels = int(header["image_size"]), layout(header).channels
    return create(header["backbone"], image_size=size, stem=header["stem"], channels=channels)


def fill(model: nn.Module, name: str, source: str | Path) -> str:
    """Load weights into `model`, a backbone `name`; returns a sentence that says what was loaded.

    source: a run directory, a file as `weights.fill` takes it (FILE or FILE:KEY), `timm:NAME` or `torchvision:NAME` (which
    are downloaded). UserError where they are another network's.
    """
    if str(source).startswith(("timm:", "torchvision:")):
        public = weights.public(str(source))
        tensors = weights.download(public).state_dict()
        return weights.fill_from(model, tensors, Path(public.name))
    path, key = weights.split_key(source)
    path = locate(path)
    header = _header(path)
    if header.get("backbone", name) != name:
        raise UserError(f"{path} holds a {header['backbone']}, not a {name}: give --backbone {header['backbone']}")
    try:
        return weights.fill(model, path, key)
    except UserError as error:
        if "backbone" in header:
            size = int(header["image_size"])
            stem = resolve(name, header["stem"], size)
            raise UserError(f"{path} does not fit: it was trained at {size} px with stem {stem} ({error})") from None
        if "conv1." in str(error) or "patch_embed.proj." in str(error):
            raise UserError(f"{error}; a network of photos fits with --stem standard") from None
        raise


def _header(path: Path) -> dict[str, str]:
    """What a file says about itself: {} for any that this project did not write."""
    try:
        return metadata(path)
    except UserError:
        return {}


def timm_arguments(header: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """timm's name of the network and what `timm.create_model` needs beside it, but for a ResNet's small stem."""
    name, image_size = header["backbone"], int(header["image_size"])
    stem = resolve(name, header["stem"], image_size)
    return _timm(name)[0], _kwargs(name, stem, image_size, layout(header).channels)


def timm_snippet(header: dict[str, str], path: str = "backbone.safetensors") -> str:
    """Lines of Python that load the weights at `path` into timm, strictly, with nothing of this project, and make the
    transform that the network's images want, where the header knows it."""
    name, kwargs = timm_arguments(header)
    known = {"mean", "std"} <= header.keys()
    if known:
        kwargs = {**kwargs, "pretrained_cfg_overlay": images(header)}
    arguments = "".join(f", {key}={value!r}" for key, value in kwargs.items())
    lines = ["import timm, torch", "from safetensors.torch import load_file"]
    lines.append(f"model = timm.create_model({name!r}, num_classes=0{arguments})")
    lines += stem_lines(header)
    lines.append(f"model.load_state_dict(load_file({path!r}), strict=True)")
    if known and made_by_timm(header):
        call = "timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
        lines.append(f"transform = {call}  # of PIL images")
    elif known:
        images_are = f"{layout(header)}, divided by {layout(header).white}"
        lines.append(f"# images: {images_are}, then normalized by model.pretrained_cfg's mean and std")
    return "\n".join(lines)


def made_by_timm(header: dict[str, str]) -> bool:
    """Whether timm's transform makes its images, which PIL must be able to hold."""
    channels, bits = layout(header)
    return channels in (1, 3) and bits == 8


def stem_lines(header: dict[str, str]) -> list[str]:
    """The lines that give a timm or torchvision ResNet `model` the small stem; none where it has the standard one."""
    name, image_size = header["backbone"], int(header["image_size"])
    if _family(name) != "resnet" or resolve(name, header["stem"], image_size) != "small":
        return []
    channels = layout(header).channels
    conv = _build(name, image_size, "small", channels=channels).conv1
    if isinstance(conv, nn.Sequential):
        first = "model.conv1[0].stride = (1, 1)"
    else:
        first = f"model.conv1 = torch.nn.Conv2d({channels}, {conv.out_channels}, 3, padding=1, bias=False)"
    return [first, "model.maxpool = torch.nn.Identity()"]
