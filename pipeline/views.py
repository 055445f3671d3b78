"""What is done to each view: a pure function of (seed, epoch, sample id, view).

A view is four steps, the same in every engine: an antialiased resize of a box, mirrored or not; one 3x4 color map;
a blur; solarize. `parameters` draws the numbers for a whole batch, engines draw nothing. See docs of `color_map` for
where this differs from torchvision's chain of clamped operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from manyview.pipeline.compiled import njit
from manyview.pipeline.errors import UserError, in_one_line, nearest, refuse
from manyview.pipeline.philox import below, philox, uniform


@dataclass(frozen=True)
class Group:
    """Views of one size. `blur` and `solarize` list one probability a view; a shorter list is repeated."""

    count: int
    size: int  # pixels, square
    scale: tuple[float, float] = (0.08, 1.0)  # the crop's share of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the crop
    # Probabilities of a mirror image, left to right and upside down, and of a turn by 90, 180 or 270 degrees.
    flip: float = 0.5
    vflip: float = 0.0
    turn: float = 0.0
    jitter: float = 0.8  # probabilities of the color jitter and of grey
    grey: float = 0.2
    brightness: float = 0.4  # factors are drawn from [1 - x, 1 + x]
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1  # of a full turn, drawn from [-x, x]
    blur: tuple[float, ...] = (0.0,)
    sigma: tuple[float, float] = (0.1, 2.0)  # of the blur, in pixels of the view
    solarize: tuple[float, ...] = (0.0,)


SMALL = 96  # pixels a side up to which a picture is small
PROBABILITIES = ("flip", "vflip", "turn", "jitter", "grey", "blur", "solarize")
STRENGTHS = {"brightness": 1, "contrast": 1, "saturation": 1, "hue": 0.5}  # and the largest there is
PAIRS = {"scale": 1, "ratio": math.inf, "sigma": math.inf}  # lowest and highest; what is the largest there is


@dataclass(frozen=True)
class Policy:
    """`groups[0]` are the global views, `groups[1]`, if there, the local crops."""

    name: str
    groups: tuple[Group, ...]
    centre: float = 0.0  # if not 0, no random view but one clean one: the centre square of this share of the short side

    @property
    def views(self) -> int:
        return sum(group.count for group in self.groups)

    def describe(self) -> str:
        """The name; of `auto` also its numbers, as `--augment` takes them."""
        if self.name != "auto":
            return self.name
        values = {key: value for key, value in vars(self.groups[0]).items() if key not in ("count", "size", "ratio")}
        if not any(self.groups[0].blur):
            del values["sigma"]
        told = {key: value for key, value in values.items() if value not in (0, (0.0,)) or key in STRENGTHS}
        return "auto: " + " ".join(f"{key}={_plain(value)}" for key, value in told.items())


def _plain(value: float | tuple[float, ...]) -> str:
    return "[" + ",".join(map(_plain, value)) + "]" if isinstance(value, tuple) else f"{value:g}"


# One view of one image.
VIEW = np.dtype(
    [
        ("box", np.int32, (4,)),  # top, left, height, width in source pixels
        ("flip", np.bool_),  # left and right, then
        ("vflip", np.bool_),  # top and bottom, then
        ("transposed", np.bool_),  # rows and columns: the three make every mirror image and quarter turn
        ("color", np.float32, (3, 4)),  # out = color @ (r, g, b, 1), values 0..255
        ("sigma", np.float32),  # of the blur, in pixels of the view; 0 = none
        ("solarize", np.bool_),  # invert values of 128 and more
    ]
)


@dataclass
class ViewParameters:
    """Everything that makes the V views of B images; V runs over all groups in order."""

    groups: tuple[tuple[slice, int], ...]  # the views of each output tensor, and their side in pixels
    heights: np.ndarray  # (B,) int64, as `widths`: pixels of the source images; every box lies inside
    widths: np.ndarray
    views: np.ndarray  # (V, B) of VIEW

    def shapes(self) -> list[tuple[int, int]]:
        """Of the source images: (height, width)."""
        return list(zip(self.heights.tolist(), self.widths.tolist()))


LARGEST = 16_384  # pixels of a view a side
SIMCLR = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2, "blur": (0.5,)}
BYOL = {"saturation": 0.2, "blur": (1.0, 0.1), "solarize": (0.0, 0.2)}
POLICIES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {  # global views, local crops
    "simclr": (SIMCLR, None),  # Chen et al. 2020, strength 1
    "byol": (BYOL, None),  # Grill et al. 2020: first view always blurred, second solarized, and so on alternately
    "barlow": (BYOL, None),  # Zbontar et al. 2021 use BYOL's numbers
    "cifar": ({"hue": 0.0}, None),  # the three sets of the small-projector paper
    "stl": ({"hue": 0.0, "scale": (0.2, 1.0), "grey": 0.1}, None),
    "imagenet100": ({"solarize": (0.2,)}, None),
    "multicrop": (  # two global views and the rest local crops at 3/7 of the size, as Caron et al. 2021 (DINO)
        BYOL | {"scale": (0.4, 1.0)},
        BYOL | {"scale": (0.05, 0.4), "blur": (0.5,), "solarize": (0.0,)},
    ),
    "supervised": ({"jitter": 0.0, "grey": 0.0}, None),  # crop and flip, as classifiers have been trained since 2014
    "clean": ({}, None),  # one view, nothing random: what the evaluation sees
    "auto": ({}, None),  # see `_auto`
    "none": ({"scale": (1.0, 1.0), "flip": 0.0, "jitter": 0.0, "grey": 0.0}, None),
}


def policy(name: str, views: int, size: int, overrides: dict[str, Any] | None = None, grey: bool = False) -> Policy:
    """The named policy for this many views of `size` pixels; `grey`: the pictures have no color, which `auto` asks.

    `overrides` changes fields of `Group` by name: `{"hue": 0, "local.scale": [0.05, 0.25]}`; `global.` and `local.`
    pick one group. `count` and `size` of the local crops may be given too, and `sigma` in shares of the view: `["0.1%", "1%"]`.
    """
    if name not in POLICIES:
        raise UserError(nearest("policy", name, POLICIES))
    if views < 1 or size < 1:
        raise UserError(f"views and size must be at least 1, not {views} and {size}")
    if name == "clean":
        if views != 1 or overrides:
            raise UserError(f"policy 'clean' is one view with no settings, not {views} with {overrides or 'none'}")
        return Policy(name, (Group(1, size),), crop_ratio(size))
    first, second = POLICIES[name]
    if second is not None and views < 3:
        raise UserError(f"policy {name!r} needs at least 3 views (2 global and the rest local), not {views}")
    groups = [Group(views if second is None else 2, size, **first)]
    if second is not None:
        groups.append(Group(views - 2, max(1, round(size * 3 / 7)), **second))
    changed = _override(groups, (_auto(size, grey) if name == "auto" else {}) | (overrides or {}))
    refuse(list(dict.fromkeys(error for group in changed for error in _check(group))))
    return Policy(name, tuple(changed))


def _auto(size: int, grey: bool) -> dict[str, Any]:
    """What fits the pictures: SimCLR's numbers, its blur by up to 2 pixels of 224 in shares of the view. Small views at half
    its strength and without blur, as SimCLR itself has them for CIFAR, and of larger crops. Grey pictures by light alone, at
    half strength: with no color to tell them apart, more of it leaves white and black squares."""
    numbers: dict[str, Any] = {**SIMCLR, "sigma": ["0.05%", "0.9%"]} if size > SMALL else {"scale": [0.2, 1.0]}
    light = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.0, "hue": 0.0, "grey": 0.0}
    return numbers | (light if grey else {})


def overrides(texts: Iterable[str]) -> dict[str, Any]:
    """Overrides from the command line: each `key=value` (value in YAML: `hue=0`, `local.scale=[0.05,0.25]`), or the
    path of a YAML file of such keys."""
    result: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        try:
            values = {key.strip(): yaml.safe_load(value)} if equals else yaml.safe_load(Path(text).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(
                f"view setting {text!r} is neither key=value nor a readable YAML file: {in_one_line(error)}"
            ) from None
        if not isinstance(values, dict):
            raise UserError(f"{text}: expected lines of `key: value`, as in `hue: 0.1`")
        result.update({str(key): value for key, value in values.items()})
    return result


def _override(groups: list[Group], changes: dict[str, Any]) -> list[Group]:
    names = {"global": 0, "local": 1}
    valid = [field.name for field in fields(Group)]
    errors = []
    # Sizes first, which shares are taken of.
    for key, value in sorted(changes.items(), key=lambda item: not item[0].endswith("size")):
        where, _, field = key.rpartition(".")
        if field not in valid or (where and where not in names):
            errors.append(nearest("view setting", key, [*valid, *(f"{n}.{v}" for n in names for v in valid)]))
            continue
        if where and names[where] >= len(groups):
            errors.append(f"view setting {key!r}: this policy has no local crops; `multicrop` has")
            continue
        for g in [names[where]] if where else range(len(groups)):
            try:
                groups[g] = replace(groups[g], **{field: _convert(field, value, groups[g].size)})
            except (TypeError, ValueError, OverflowError):
                errors.append(f"view setting {key}={value!r} is not a number or a list of numbers as in {field}="
                              f"{getattr(groups[0], field)}")  # fmt: skip
                break
    refuse(errors)
    return groups


def _convert(field: str, value: Any, size: int) -> Any:
    default = getattr(Group(1, 1), field)
    if field == "sigma" and isinstance(value, list | tuple):
        value = [float(x[:-1]) / 100 * size if isinstance(x, str) and x.endswith("%") else x for x in value]
    if isinstance(default, tuple):
        return tuple(float(x) for x in (value if isinstance(value, list | tuple) else [value]))
    if isinstance(default, int) and int(value) != float(value):
        raise ValueError(value)
    return type(default)(value)


def _check(group: Group) -> list[str]:
    errors = []
    for name in PROBABILITIES:
        value = getattr(group, name)
        if not all(0 <= p <= 1 for p in (value if isinstance(value, tuple) else (value,))) or value == ():
            errors.append(f"view setting {name} must be a probability in [0, 1], not {value}")
    for name, high in PAIRS.items():
        value = getattr(group, name)
        if len(value) != 2 or not 0 < value[0] <= value[1] <= high or not math.isfinite(value[1]):
            errors.append(f"view setting {name} must be two ascending numbers above 0, not {value}")
    for name, high in STRENGTHS.items():
        if not 0 <= getattr(group, name) <= high:
            errors.append(f"view setting {name} must be in [0, {high}], not {getattr(group, name)}")
    if group.count < 1 or not 1 <= group.size <= LARGEST:
        errors.append(f"view settings count and size must be at least 1 (size at most {LARGEST}), not {group.count} and "
                      f"{group.size}")  # fmt: skip
    if group.sigma[-1:] > (10 * max(group.size, 1),):
        errors.append(f"view setting sigma must be at most ten times the view's {group.size} pixels, not {group.sigma}")
    return errors


def parameters(
    chosen: Policy, seed: int, epochs: np.ndarray, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray
) -> ViewParameters:
    """Draw the views of a batch. `epochs`, `ids`, `heights`, `widths`: (B,) integers; sizes in source pixels."""
    if chosen.centre:
        return clean(chosen.groups[0].size, heights, widths, chosen.centre)
    result = _identity([(group.count, group.size) for group in chosen.groups], heights, widths)
    epochs, ids = (np.ascontiguousarray(a, np.int64) for a in (epochs, ids))
    _draw(_settings(chosen), np.uint64(seed), epochs, ids, result.heights, result.widths, result.views)
    return result


def crop_ratio(size: int) -> float:
    """Of the short side that a clean view of `size` pixels shows: all of a tiny image, the usual 7/8 of a photo."""
    return 1.0 if size <= SMALL else 0.875


def clean(size: int, heights: np.ndarray, widths: np.ndarray, crop_ratio: float = 1.0) -> ViewParameters:
    """One view for evaluation: the centre square of `crop_ratio` times the short side, resized."""
    result = _identity([(1, size)], heights, widths)
    heights, widths = result.heights, result.widths
    side = np.maximum(1, np.rint(np.minimum(heights, widths) * crop_ratio)).astype(np.int64)
    result.views["box"][0] = np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=1)
    return result


def _identity(groups: list[tuple[int, int]], heights: np.ndarray, widths: np.ndarray) -> ViewParameters:
    """Views (`groups`: count and size) that change nothing, of boxes yet to be set."""
    stops = np.cumsum([count for count, _ in groups]).tolist()
    parts = tuple((slice(stop - count, stop), size) for stop, (count, size) in zip(stops, groups))
    views = np.zeros((stops[-1], len(heights)), VIEW)
    views["color"] = np.eye(3, 4)
    return ViewParameters(parts, np.ascontiguousarray(heights, np.int64), np.ascontiguousarray(widths, np.int64), views)


def _settings(chosen: Policy) -> np.ndarray:
    """(V,) of the fields of `Group`: each view's own."""
    rows = []
    for group in chosen.groups:
        for i in range(group.count):
            own = {name: getattr(group, name)[i % len(getattr(group, name))] for name in ("blur", "solarize")}
            rows.append(tuple((vars(group) | own).values()))
    return np.array(rows, [(f.name, np.float64, (2,) if f.name in PAIRS else ()) for f in fields(Group)])


@njit
def _draw(settings, seed, epochs, ids, heights, widths, views):
    for v in range(len(settings)):
        s = settings[v]
        for i in range(len(ids)):
            view = views[v, i]
            _crop(seed, ids[i], epochs[i], v, heights[i], widths[i], s.scale, s.ratio, view.box)
            # Every number has its own fixed place in the counter: none moves when another is not used.
            x0, x1, x2, x3 = philox(seed, ids[i], epochs[i], v, 16)
            y0, y1, y2, y3 = philox(seed, ids[i], epochs[i], v, 17)
            z0, z1, z2, z3 = philox(seed, ids[i], epochs[i], v, 18)
            view.flip, view.vflip = uniform(x0) < s.flip, uniform(z2) < s.vflip
            if uniform(z3) < s.turn:
                quarters = 1 + int(3 * uniform(z3) / s.turn)  # counterclockwise; odd: a transpose and a mirror image
                view.flip ^= quarters <= 2
                view.vflip ^= quarters >= 2
                view.transposed = quarters != 2
            grey, jitter = uniform(x1) < s.grey, uniform(x2) < s.jitter
            view.solarize = uniform(x3) < s.solarize
            if jitter or grey:
                strength = 1.0 if jitter else 0.0
                color_map(
                    1 + strength * s.brightness * (2 * uniform(y0) - 1),
                    1 + strength * s.contrast * (2 * uniform(y1) - 1),
                    0.0 if grey else 1 + strength * s.saturation * (2 * uniform(y2) - 1),
                    strength * s.hue * (2 * uniform(y3) - 1),
                    view.color,
                )
            if uniform(z0) < s.blur:
                view.sigma = s.sigma[0] + (s.sigma[1] - s.sigma[0]) * uniform(z1)


@njit
def _crop(seed, sample, epoch, view, height, width, scale, ratio, box):
    """torchvision's RandomResizedCrop.get_params: area uniform, aspect ratio log-uniform, ten tries, then the centre."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(10):
        x0, x1, x2, x3 = philox(seed, sample, epoch, view, attempt)
        area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform(x0))
        aspect = math.exp(low + (high - low) * uniform(x1))
        w, h = np.int64(np.rint(math.sqrt(area * aspect))), np.int64(np.rint(math.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            box[0], box[1], box[2], box[3] = below(x2, height - h + 1), below(x3, width - w + 1), h, w
            return
    w, h = width, height
    if width < height * math.exp(low):
        h = np.int64(np.rint(width / math.exp(low)))
    elif width > height * math.exp(high):
        w = np.int64(np.rint(height * math.exp(high)))
    box[0], box[1], box[2], box[3] = (height - h) // 2, (width - w) // 2, max(h, 1), max(w, 1)


@njit
def color_map(brightness, contrast, saturation, hue, out):
    """Write the (3, 4) map of a color jitter: three factors (1 = unchanged) and `hue` in turns (0 = unchanged).

    Brightness scales; contrast scales around 128; saturation scales the chroma plane of YIQ and hue turns it;
    saturation 0 is grey (ITU-R 601 luma, as torchvision's). These commute: brightness and contrast act alike on the
    three channels, saturation and hue keep the luma. So torchvision's 24 random orders are all this one map, but
    for three things: it pivots contrast at the image's own mean luma, turns hue in HSV, and clamps and rounds to
    8 bits after each of its operations.
    """
    gain, offset = brightness * contrast, brightness * (1 - contrast) * 128
    cosine, sine = saturation * math.cos(2 * math.pi * hue), saturation * math.sin(2 * math.pi * hue)
    for column in range(3):
        luma = (0.299, 0.587, 0.114)[column]
        u = 0.492111 * ((column == 2) - luma)  # the chroma plane of PAL, which is YIQ's in another basis
        v = 0.877283 * ((column == 0) - luma)
        u, v = u * cosine - v * sine, u * sine + v * cosine
        red, blue = v / 0.877283, u / 0.492111
        out[0, column] = gain * (luma + red)
        out[1, column] = gain * (luma - (0.299 * red + 0.114 * blue) / 0.587)
        out[2, column] = gain * (luma + blue)
    for row in range(3):
        out[row, 3] = offset
