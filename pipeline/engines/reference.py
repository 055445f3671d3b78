"""The slow, obvious way to make a view, that the engines are held against."""

from __future__ import annotations

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F

from manyview.pipeline.codec import decode
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


def engine(store: Store, ids: np.ndarray, p: ViewParameters) -> list[torch.Tensor]:
    """What an engine returns."""
    images = [decode(store.read(int(i))) for i in ids]
    return [
        torch.stack(
            [torch.stack([render(image, view, size) for image, view in zip(images, row)]) for row in p.views[part]]
        )
        for part, size in p.groups
    ]
