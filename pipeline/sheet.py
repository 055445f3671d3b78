"""A contact sheet: originals with their crop boxes, the views under them engine by engine, and what was drawn."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from manyview.pipeline.codec import RGB, Layout, decode
from manyview.pipeline.store import Store
from manyview.pipeline.views import Policy, ViewParameters, parameters

Render = Callable[[np.ndarray, ViewParameters], list[torch.Tensor]]
CELL, GAP, LINE, MARGIN = 168, 14, 17, 40  # pixels: a view's side, between views, a line of text, around the sheet
MIRRORED = {"flip": "↔", "vflip": "↕", "transposed": "⟲"}  # signs that the font has
PAPER, INK, FAINT = (252, 251, 248), (32, 34, 38), (128, 130, 136)


def contact_sheet(
    store: Store,
    policy: Policy,
    ids: Sequence[int] | np.ndarray,
    path: Path,
    *,
    renders: dict[str, Render],
    seed: int = 0,
) -> None:
    """Write a PNG of the views of samples `ids` in epoch 0. `renders`: name -> engine, one row of views for each."""
    ids = np.asarray(ids, np.int64)
    p = parameters(policy, seed, 0 * ids, ids, store.heights[ids], store.widths[ids])
    pixels = {name: [view for group in render(ids, p) for view in group.cpu()] for name, render in renders.items()}
    shown = partial(in_colors, layout=store.layout, mean=store.mean, std=store.std)
    views, tall = len(p.views), len(pixels) * (CELL + GAP) - GAP
    first = 2 * CELL + GAP  # the original's width
    width = 2 * MARGIN + first + views * (CELL + GAP) + 2 * GAP
    block = tall + 4 * LINE + 3 * GAP
    sheet = Image.new("RGB", (width, 2 * MARGIN + 3 * LINE + len(ids) * block), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN - 8), f"{store.name}: {views} views by {policy.name}", INK, _font(24, bold=True))
    legend = "under each view: share of image and box, ↔ ↕ mirrored, ⟲ transposed, brightness, contrast, saturation, hue, blur"
    pen.text((MARGIN, MARGIN + 26), f"seed {seed}, epoch 0; {legend}", FAINT, _font(14))
    for b, i in enumerate(ids.tolist()):
        top = MARGIN + 3 * LINE + GAP + b * block
        original = shown(decode(store.read(i)))
        below = top + _original(sheet, original, p.views["box"][:, b], (MARGIN, top), first, tall) + 8
        pen.text((MARGIN, below), _shorten(store.key(i), first), INK, _font(13, bold=True))
        label = f", class {store.classes[store.labels[i]]}" if store.labels[i] >= 0 else ""
        about = f"sample {i}, {store.widths[i]} x {store.heights[i]} px{label}"
        pen.text((MARGIN, below + LINE + 2), _shorten(about, first), FAINT, _font(12))
        for row, name in enumerate(pixels):
            _upright(sheet, name, (MARGIN + first + GAP, top + row * (CELL + GAP)))
        for v in range(views):
            left = MARGIN + first + 3 * GAP + v * (CELL + GAP)
            for row, pictures in enumerate(pixels.values()):
                _place(sheet, shown(pictures[v][b].permute(1, 2, 0).numpy()), (left, top + row * (CELL + GAP)))
            pen.rectangle((left, top + tall + 4, left + CELL - 1, top + tall + 7), _hue(v, views))
            for k, line in enumerate(describe(p.views[v, b], int(p.heights[b] * p.widths[b]), store.layout)):
                pen.text((left, top + tall + 12 + k * LINE), line, INK if k == 0 else FAINT, _font(12))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def in_colors(pixels: np.ndarray, layout: Layout, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """(H, W, C) of a set as (H, W, 3) uint8 to look at: its first three channels as red, green and blue, or its only one as grey,
    two deviations of the set around its mean."""
    if layout == RGB:
        return pixels
    low = np.array(mean) - 2 * np.array(std)
    spread = (255 * (pixels - low) / (4 * np.array(std))).clip(0, 255).astype(np.uint8)
    if spread.shape[2] == 2:
        return np.dstack([spread, np.zeros_like(spread[..., :1])])
    return np.repeat(spread, 3, 2) if spread.shape[2] == 1 else np.ascontiguousarray(spread[..., :3])


def describe(view: np.void, pixels: int, layout: Layout = RGB) -> list[str]:
    """What was drawn for a view (of `views.VIEW`) of an image of so many pixels, in three short lines."""
    _, _, height, width = view["box"].tolist()
    share = f"{100 * height * width / pixels:.0f} %, {width} x {height}"
    brightness, contrast, saturation, hue = factors(view["color"])
    color = f"b {brightness:.2f} c {contrast:.2f}"
    if layout == RGB:
        color += f" s {saturation:.2f} h {hue:+.0f}°" if saturation > 1e-3 else " grey"
    if np.array_equal(view["color"], np.eye(3, 4)):
        color = "color as it is"
    rest = [f"blur {view['sigma']:.2f} px"] if view["sigma"] else []
    rest += ["solarize"] if view["solarize"] and layout == RGB else []
    mirrored = "".join(sign for name, sign in MIRRORED.items() if view[name])
    return [f"{share}  {mirrored}".rstrip(), color, "  ".join(rest)]


def factors(color: np.ndarray) -> tuple[float, float, float, float]:
    """(brightness, contrast, saturation, hue in degrees) that make a (3, 4) color map: `views.color_map` backwards."""
    gain, offset = float(color[0, :3].sum()), float(color[0, 3])
    brightness = gain + offset / 128
    luma = np.array([0.299, 0.587, 0.114])
    to_chroma = np.stack([luma, 0.492111 * (np.eye(3)[2] - luma), 0.877283 * (np.eye(3)[0] - luma)])
    turn = (to_chroma @ (color[:, :3] / gain) @ np.linalg.inv(to_chroma))[1:, 1:]
    saturation = math.hypot(turn[0, 0], turn[1, 0])
    return brightness, gain / brightness, saturation, math.degrees(math.atan2(turn[1, 0], turn[0, 0]))


def _original(
    sheet: Image.Image, pixels: np.ndarray, boxes: np.ndarray, at: tuple[int, int], width: int, height: int
) -> int:
    """The whole image, as large as fits, with a frame for each view's box in that view's color. Returns its height."""
    picture = Image.fromarray(np.array(pixels))
    scale = min(width / picture.width, max(height, CELL) / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)
    sheet.paste(picture, at)
    pen = ImageDraw.Draw(sheet)
    for v in np.argsort(-boxes[:, 2].astype(int) * boxes[:, 3]):  # large ones first, so that small ones stay visible
        top, left, tall, wide = (boxes[v] * scale).tolist()
        left, top = at[0] + left, at[1] + top
        corner = (left, top, left + max(wide - 1, 0), top + max(tall - 1, 0))
        pen.rectangle(corner, outline=PAPER, width=4)
        pen.rectangle(corner, outline=_hue(v, len(boxes)), width=3)
    return size[1]


def _upright(sheet: Image.Image, text: str, at: tuple[int, int]) -> None:
    """A row's name, reading upwards at its left."""
    label = Image.new("RGB", (CELL, LINE), PAPER)
    ImageDraw.Draw(label).text((CELL / 2, LINE / 2), text, FAINT, _font(13), anchor="mm")
    sheet.paste(label.rotate(90, expand=True), at)


def _place(sheet: Image.Image, pixels: np.ndarray, at: tuple[int, int]) -> None:
    """A view in its cell: small ones enlarged by a whole factor, smaller groups keep their proportion."""
    picture = Image.fromarray(pixels)
    if picture.width > CELL:
        picture = picture.resize((CELL, CELL), Image.Resampling.LANCZOS)
    elif factor := CELL // picture.width:
        picture = picture.resize((picture.width * factor,) * 2, Image.Resampling.NEAREST)
    sheet.paste(picture, at)


def _hue(v: int, views: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb((v / views + 0.58) % 1, 0.75, 0.88)
    return round(255 * red), round(255 * green), round(255 * blue)


def _shorten(text: str, width: int) -> str:
    most = width // 7
    return text if len(text) <= most else "…" + text[1 - most :]


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib."""
    weight = "bold" if bold else "normal"
    path = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight=weight))
    return ImageFont.truetype(path, size)
