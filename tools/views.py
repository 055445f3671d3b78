"""Draw a contact sheet of views: python tools/views.py --data shards/NAME --views 8

Originals with their crop boxes, the views of each engine side by side, and the numbers that were drawn underneath.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # the checkout on the path instead of this folder, whose profile.py would hide the library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import psutil
import torch
import tyro

from manyview.pipeline import engines, errors, sheet
from manyview.pipeline.engines import reference
from manyview.pipeline.plan import plan
from manyview.pipeline.store import Store
from manyview.pipeline.views import overrides, policy


@dataclass
class Args:
    data: Path
    """Shards."""
    views: int = 8
    policy: str = "simclr"
    """simclr, byol, barlow, cifar, stl, imagenet100, multicrop, supervised, none, or auto: by view size and whether pictures are
    grey."""
    augment: list[str] = field(default_factory=list)
    """Changes to it: key=value each, as hue=0 or local.scale=[0.05,0.25], or a YAML file of such keys."""
    size: int = 0
    """Pixels of a view; 0 = the median short side of the images, at most 224."""
    images: int = 4
    seed: int = 0
    engines: str = "all"
    """all (the slow reference and every engine that works here), or some of them: cpu,reference."""
    device: str = "cpu"
    split: str = "train"
    out: Path = Path("views.png")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    device = engines.device_of(args.device)
    if args.images < 1 or args.size < 0:
        raise errors.UserError(f"--images {args.images} --size {args.size}: at least one image, of 0 or more pixels")
    if args.out.suffix not in (".png", ".jpg", ".webp"):
        raise errors.UserError(f"--out {args.out}: a picture's name ends in .png, .jpg or .webp")
    store = Store(args.data, args.split)
    size = args.size or store.default_size()
    chosen = policy(args.policy, args.views, size, overrides(args.augment), store.grey)
    # The slow reference makes views of floats, four of 8 bytes a pixel at its worst; the others keep bytes.
    need = sum(group.count * group.size**2 for group in chosen.groups) * args.images * 3 * 5 + 100 * size**2
    if need > psutil.virtual_memory().available:
        text = f"{args.images} images x {chosen.views} views of {size} px need about {need / 2**30:,.0f} GiB"
        raise errors.UserError(f"{text}: a smaller --size, fewer --views or --images")
    ids = plan(len(store), seed=args.seed, batch=min(args.images, len(store))).batch(0)[0]
    renders: dict[str, sheet.Render] = {}
    with contextlib.ExitStack() as stack:
        for name in names(args, store, device):
            if name == "reference":
                renders[name] = partial(reference.engine, store)
            else:
                engine, _ = engines.create(name, store, device)
                renders[name] = stack.enter_context(contextlib.closing(engine))
        sheet.contact_sheet(store, chosen, np.asarray(ids), args.out, renders=renders, seed=args.seed)
    print(f"{args.out}: {len(ids)} images, {chosen.views} views of {size} px, {', '.join(renders)}")
    if chosen.name == "auto":
        print(f"policy {chosen.describe()}")


def names(args: Args, store: Store, device: torch.device) -> list[str]:
    every = ["reference", *engines.ENGINES]
    if args.engines != "all":
        wanted = args.engines.split(",")
        for name in wanted:
            if name not in every:
                raise errors.UserError(errors.nearest("engine", name, every))
        return wanted
    # One that holds the whole set would load much for a few pictures where they are large.
    large = max(store.heights.max(), store.widths.max()) > engines.SMALL
    left_out = [
        name for name in engines.ENGINES if engines.unfit(name, store, device) or (large and name == "resident")
    ]
    return [name for name in every if name not in left_out]


if __name__ == "__main__":
    errors.run(main)
