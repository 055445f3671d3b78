"""The slow, obvious way to make a view, that the engines are held against."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F

from manyview.pipeline.codec import RGB, decode
from manyview.pipeline.store import Store
from manyview.pipeline.views import ViewParameters


def render(image: np.ndarray, view: np.void, size: int) -> torch.Tensor:
    """One `view` (of `views.VIEW`) of `image` (H, W, 3): (3, size, size) uint8."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    pixels = F.resized_crop(pixels, *view["box"].tolist(), [size, size], antialias=True)
    if view["flip"]:
        pixels = F.horizontal_flip(pixels)
    if view["vflip"]:
        pixels = F.vertical_flip(pixels)
    if view["transposed"]:
        pixels = pixels.mT
    color = torch.from_numpy(view["color"].copy()).double()
    colored = torch.einsum("dc,chw->dhw", color[:, :3], pixels.double()) + color[:, 3, None, None]
    pixels = colored.round().clamp(0, 255).to(torch.uint8)
    sigma = float(view["sigma"])
    if sigma > 0:
        reach = min(int(np.ceil(5 * sigma)), size - 1)
        pixels = F.gaussian_blur(pixels, [2 * reach + 1] * 2, [sigma] * 2)
    return F.solarize(pixels, 128) if view["solarize"] else pixels


def render_bands(image: np.ndarray, view: np.void, size: int, mean: Sequence[float]) -> torch.Tensor:
    """One view of `image` (H, W, C), uint8 or uint16, that is no RGB of 8 bits: (C, size, size) of its type. Brightness and
    contrast of each channel around its `mean`, no step of color, rounded once."""
    pixels = torch.from_numpy(image.astype(np.float64)).permute(2, 0, 1)
    pixels = F.resized_crop(pixels, *view["box"].tolist(), [size, size], antialias=True)
    if view["flip"]:
        pixels = F.horizontal_flip(pixels)
    if view["vflip"]:
        pixels = F.vertical_flip(pixels)
    gain, offset = float(view["color"][0, :3].sum()), float(view["color"][0, 3]) / 128  # of grey; contrast around 128
    pixels = gain * pixels + offset * torch.tensor(mean, dtype=torch.float64)[:, None, None]
    pixels = pixels.clamp(0, np.iinfo(image.dtype).max)
    sigma = float(view["sigma"])
    if sigma > 0:
        reach = min(int(np.ceil(3 * sigma)), size - 1)  # as engines: beyond is much of 16 bits
        pixels = F.gaussian_blur(pixels, [2 * reach + 1] * 2, [sigma] * 2)
    pixels = pixels.mT if view["transposed"] else pixels
    return torch.from_numpy(pixels.round().numpy().astype(image.dtype))


def engine(store: Store, ids: np.ndarray, p: ViewParameters) -> list[torch.Tensor]:
    """What an engine returns."""
    images = [decode(store.read(int(i))) for i in ids]
    draw = render if store.layout == RGB else partial(render_bands, mean=store.mean)
    rows = [[torch.stack([draw(image, view, size) for image, view in zip(images, row)]) for row in p.views[part]]
            for part, size in p.groups]  # fmt: skip
    return [torch.stack(group) for group in rows]
