"""Other people's recipes on the same network, data and core-seconds: what the ladder's rows are held against.

lightly's own transforms, heads and losses with the settings of its CIFAR-10 benchmark (SGD 0.06 for a batch of 128,
momentum 0.9, weight decay 5e-4, cosine, no blur; for VICReg LARS 0.3, weight decay 1e-4, a tenth of warm-up), by a ResNet-18
with the small stem; and EMP-SSL (Tong et al. 2023) with the settings of its authors' code, whose patches this project's
pipeline makes. Nothing here is a method of this project.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightly.loss import BarlowTwinsLoss, NTXentLoss, VICRegLoss
from lightly.models.modules.heads import ProjectionHead, SimCLRProjectionHead, VICRegProjectionHead
from lightly.transforms import SimCLRTransform, VICRegTransform
from PIL import Image
from torch import Tensor, nn

from manyview.model import backbone
from manyview.pipeline.engines.cpu import CPUEngine
from manyview.pipeline.loader import Loader, clean_views, normalize
from manyview.pipeline.plan import plan
from manyview.pipeline.store import Store
from manyview.pipeline.views import Group, Policy
from manyview.training import checkpoint, optim

WIDTH = 512  # of a ResNet-18's features
SIZE = 32  # pixels
SAVE_EVERY = 300  # core-seconds
Views = list[Tensor]  # one (B, 3, S, S) float32 a view


@dataclass(frozen=True)
class Recipe:
    batch: int
    head: Callable[[], nn.Module]
    loss: Callable[[list[Tensor]], Tensor]  # of the views' embeddings (B, D)
    views: Callable[[Store, Recipe, int, int], Iterator[Views]]  # of (shards, recipe, seed, first step)
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    transform: Callable[[], Any] = lambda: None  # lightly's; an image to a list of views
    warmup: float = 0.0  # share of the core-seconds in which the learning rate rises to its peak
    pooled: bool = False  # all views through the network at once


def lightly_views(store: Store, recipe: Recipe, seed: int, start: int) -> Iterator[Views]:
    """As a DataLoader in this process makes them: each image through lightly's transform."""
    order, transform = plan(store.labels, seed=seed, batch=recipe.batch), recipe.transform()
    engine = CPUEngine(store, threads=1)
    for step in itertools.count(start):
        torch.manual_seed(seed + step)
        images = clean_views(store, engine, SIZE, order.batch(step)[0])[1].movedim(1, -1).numpy()
        yield [torch.stack(list(view)) for view in zip(*(transform(Image.fromarray(image)) for image in images))]


def patches(store: Store, recipe: Recipe, seed: int, start: int) -> Iterator[Views]:
    """EMP-SSL's: 20 a picture, a quarter of its area each, at the picture's size."""
    group = Group(20, SIZE, scale=(0.25, 0.25), hue=0.2, blur=(0.1,), solarize=(0.1,))
    order = plan(store.labels, seed=seed, batch=recipe.batch)
    loader = Loader(store, order, Policy("emp-ssl", (group,)), CPUEngine(store, threads=1), seed=seed)
    for batch in loader.batches(start, 2**31):
        yield list(normalize(batch.views[0], store.mean, store.std, torch.float32))


def coding_rate(z: list[Tensor]) -> Tensor:
    """EMP-SSL's loss: 200 x distance to the patches' mean in cosine - the total coding rate of each patch's batch."""
    unit = F.normalize(torch.stack(z), dim=-1)
    batch, dim = unit.shape[1:]
    scale = dim / (batch * 0.2)
    gram = torch.eye(batch) + scale * unit @ unit.mT  # log det(I + s Z^T Z) = log det(I + s Z Z^T), the smaller one
    return -200 * F.cosine_similarity(unit, unit.mean(0)[None], dim=-1).mean() - torch.logdet(gram).mean() / 2


def pair(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[list[Tensor]], Tensor]:
    return lambda z: loss(z[0], z[1])


def barlow_head() -> nn.Module:
    return ProjectionHead([(WIDTH, 2048, nn.BatchNorm1d(2048), nn.ReLU()), (2048, 2048, None, None)])


def emp_head() -> nn.Module:
    first = [nn.Linear(WIDTH, 4096), nn.BatchNorm1d(4096), nn.ReLU()]
    return nn.Sequential(*first, nn.Linear(4096, 4096), nn.BatchNorm1d(4096), nn.ReLU(), nn.Linear(4096, 1024))


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)


def lars(module: nn.Module) -> torch.optim.Optimizer:
    return optim.create("lars", module, 0.3, 1e-4)


def simclr_transform() -> Any:
    return SimCLRTransform(input_size=SIZE, gaussian_blur=0.0)


RECIPES = {
    "lightly-barlow": Recipe(128, barlow_head, pair(BarlowTwinsLoss()), lightly_views, sgd, simclr_transform),
    "lightly-simclr": Recipe(
        128, lambda: SimCLRProjectionHead(WIDTH, WIDTH, 128), pair(NTXentLoss()), lightly_views, sgd, simclr_transform
    ),
    "lightly-vicreg": Recipe(
        128, lambda: VICRegProjectionHead(WIDTH, 2048, 2048), pair(VICRegLoss()), lightly_views, lars,
        lambda: VICRegTransform(input_size=SIZE, gaussian_blur=0.0), warmup=0.1,
    ),
    "emp-ssl": Recipe(100, emp_head, coding_rate, patches, lars, pooled=True),
}  # fmt: skip


def schedule(done: float, warmup: float) -> float:
    """Share of the peak learning rate after this share of the training: a line up to it, then half a cosine."""
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warmup) / (1 - warmup))))


def train(name: str, data: Path, folder: Path, core_seconds: float, seed: int, precision: str) -> dict[str, Any]:
    """Train a ResNet-18 by a recipe for so many core-seconds into `folder`/backbone.safetensors, or go on there.

    The learning rate follows `schedule` over the core-seconds. Returns views, steps and core-seconds.
    """
    recipe, store = RECIPES[name], Store(data)
    torch.manual_seed(seed)
    trunk: Any = backbone.create("resnet18", image_size=SIZE, stem="small")
    model = nn.Sequential(trunk, recipe.head()).to(memory_format=torch.channels_last)
    optimizer = recipe.optimizer(model)
    peak = [group["lr"] for group in optimizer.param_groups]
    step, before, views = _resume(folder, model, optimizer)
    begun, used, saved = time.process_time(), before, before
    for batch in recipe.views(store, recipe, seed, step):
        for group, lr in zip(optimizer.param_groups, peak):
            group["lr"] = lr * schedule(used / core_seconds, recipe.warmup)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            z = model(torch.cat(batch)).chunk(len(batch)) if recipe.pooled else [model(x) for x in batch]
        loss = recipe.loss([view.float() for view in z])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step, views = step + 1, views + sum(len(x) for x in batch)
        used = before + time.process_time() - begun
        if used - saved > SAVE_EVERY:
            saved = used
            state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint.save(folder / "checkpoints", state | {"core_seconds": used, "views": views}, 1, 0)
        if used >= core_seconds:
            break
    about = {"backbone": "resnet18", "stem": "small", "image_size": str(SIZE), "source": name}
    about |= {"mean": json.dumps(store.mean), "std": json.dumps(store.std)}
    folder.mkdir(parents=True, exist_ok=True)
    backbone.save(trunk, folder / "backbone.safetensors", about)
    return {"views": views, "steps": step, "core_seconds": used, "loss": float(loss.detach())}


def _resume(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float, int]:
    """(step, core-seconds, views) of the newest checkpoint, after loading it; zeros where there is none."""
    steps = checkpoint.steps_in(folder / "checkpoints")
    if not steps:
        return 0, 0.0, 0
    state = checkpoint.load(checkpoint.path_of(folder / "checkpoints", steps[-1]))
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["core_seconds"], state["views"]
