"""The slow, obvious way to make a view, that the engines are held against."""

from __future__ import annotations

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F

from manyview.pipeline.codec import decode
from manyview.pipeline.store import Store
from manyview.pipeline.views import Parameters


def render(image: np.ndarray, p: Parameters, v: int, b: int) -> torch.Tensor:
    """View `v` of `image` (H, W, 3), sample `b` of the batch: (3, S, S) uint8."""
    size = p.sizes[v]
    view = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    view = F.resized_crop(view, *p.box[v, b].tolist(), [size, size], antialias=True)
    if p.flip[v, b]:
        view = F.horizontal_flip(view)
    color = torch.from_numpy(p.color[v, b]).double()
    colored = torch.einsum("dc,chw->dhw", color[:, :3], view.double()) + color[:, 3, None, None]
    view = colored.round().clamp(0, 255).to(torch.uint8)
    sigma = float(p.sigma[v, b])
    if sigma > 0:
        reach = min(int(np.ceil(5 * sigma)), size - 1)
        view = F.gaussian_blur(view, [2 * reach + 1] * 2, [sigma] * 2)
    return F.solarize(view, 128) if p.solarize[v, b] else view


def engine(store: Store, ids: np.ndarray, p: Parameters) -> list[torch.Tensor]:
    """What an engine returns."""
    images = [decode(store.read(int(i))) for i in ids]
    views = [torch.stack([render(image, p, v, b) for b, image in enumerate(images)]) for v in range(len(p.sizes))]
    return [torch.stack(views[group]) for group in p.groups]
