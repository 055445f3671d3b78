"""Features: computed once through the project's shards and engines, kept on disk, refused when stale.

A cache file is one safetensors file whose header is the manifest: weights, data, ids, transform, pooling, type. A
file whose manifest or content differs from what is asked for is never used.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from manyview.evaluation.encoder import Encoder, calibrating, frozen
from manyview.pipeline import files
from manyview.pipeline.engines import Engine, Pending
from manyview.pipeline.engines.cpu import decoded
from manyview.pipeline.errors import UserError
from manyview.pipeline.loader import normalize
from manyview.pipeline.machine import cores
from manyview.pipeline.store import Corrupt, Store
from manyview.pipeline.views import Policy, ViewParameters, clean, overrides, parameters, policy

VERSION = "2"
CALIBRATION, CALIBRATION_BATCH = 1024, 256  # images; fixed, so that --batch changes no number


class Stale(Exception):
    """A cache file that belongs to something else; the text says what differs."""


@dataclass(frozen=True)
class Views:
    """What the network is shown of each image: the clean view, then one random view for each of `policy`'s."""

    clean: bool = True
    policy: Policy | None = None  # of one group, at the encoder's size
    seed: int = 0

    @property
    def text(self) -> str:
        random = f"{self.policy} with seed {self.seed}" if self.policy else ""
        return " + ".join(filter(None, ["1 clean view" if self.clean else "", random]))

    def draw(self, size: int, crop_ratio: float, ids: np.ndarray, store: Store) -> list[ViewParameters]:
        heights, widths = store.heights[ids], store.widths[ids]
        shown = [clean(size, heights, widths, crop_ratio)] if self.clean else []
        if self.policy is not None:
            shown.append(parameters(self.policy, self.seed, np.zeros(len(ids)), ids, heights, widths))
        return shown


CLEAN = Views()
LIDAR_IMAGES, LIDAR_VIEWS, AVERAGED_VIEWS = 1000, 8, 16


def views_of(kind: str, policy_name: str, size: int, augment: tuple[str, ...], seed: int) -> Views:
    """What the network is shown for `clean`, `averaged` or `lidar` features."""
    if kind == "clean":
        return CLEAN
    count = LIDAR_VIEWS if kind == "lidar" else AVERAGED_VIEWS - 1
    chosen = policy(policy_name, max(count, 3), size, overrides(augment))
    chosen = replace(chosen, groups=(replace(chosen.groups[0], count=count, size=size),))
    return Views(kind == "averaged", chosen, seed)


def describe(encoder: Encoder, store: Store, ids: np.ndarray, views: Views = CLEAN) -> dict[str, str]:
    """The manifest: everything the features depend on."""
    return {
        "version": VERSION,
        "weights": encoder.checkpoint,
        "data": f"{store.name} {store.split} {store.fingerprint}",
        "ids": hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest(),
        "transform": f"{encoder.crop_ratio:g} of the short side, {encoder.interpolation}, {encoder.image_size} px",
        "normalization": json.dumps([encoder.mean, encoder.std]),
        "views": views.text,
        "layers": encoder.layers,
        "dtype": "float32",
    }


def calibrate(
    encoder: Encoder, store: Store, ids: np.ndarray, engine: Any, *, device: str | torch.device = "cpu"
) -> None:
    """Measure an untrained encoder's batch-norm statistics on clean views of these images; no weight changes.

    Fresh layers pretend that every activation has mean 0 and variance 1. Random weights make neither true, so the
    features would be dominated by a few channels, and whatever is held against them would look better than it is.
    """
    module = encoder.module.to(device).to(memory_format=torch.channels_last)
    # In a seeded order: the samples lie class by class, and a batch of one class has too small a variance.
    order = np.random.default_rng(0).permutation(ids)
    batches = np.array_split(order, math.ceil(len(ids) / CALIBRATION_BATCH))
    with calibrating(module), torch.no_grad():
        for images in pixels_of(encoder, store, batches, engine, CLEAN):
            forward(encoder, images, device)
    if dist.is_initialized():
        for value in module.buffers():
            dist.broadcast(value, 0)


def embed(
    encoder: Encoder, store: Store, ids: np.ndarray, engine: Any, *, batch: int = 256,
    device: str | torch.device = "cpu", views: Views = CLEAN,
) -> Tensor:  # fmt: skip
    """Features (N, V, F) float32 of these samples, in their order, on the CPU of every rank.

    In evaluation mode, and the encoder is checked to be unchanged after. With several processes each takes every
    world-th batch, so that the batches, and with them the features, are the same as with one.
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    batches = [ids[i : i + batch] for i in range(0, len(ids), batch)]
    module = encoder.module.to(device).to(memory_format=torch.channels_last)
    with frozen(module), torch.inference_mode():
        images = pixels_of(encoder, store, batches[rank::world], engine, views)
        mine = [forward(encoder, x, device) for x in images]
    if world > 1:
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, mine)
        mine = [gathered[i % world][i // world] for i in range(len(batches))]
    return finite(torch.cat(mine), encoder, store)


def finite(x: Tensor, encoder: Encoder, store: Store) -> Tensor:
    """`x` (N, ...) itself. UserError where features are not finite: whatever is computed from them means nothing."""
    broken = int((~x.flatten(1).isfinite().all(1)).sum())
    if broken:
        raise UserError(
            f"{encoder.run} ({encoder.weights}): the features of {broken:,} of {len(x):,} images of {store.name} are not finite: "
            "the encoder has diverged, and no score of it means anything"
        )
    return x


def pixels_of(encoder: Encoder, store: Store, batches: list[np.ndarray], engine: Any, views: Views) -> Iterator[Tensor]:
    """(V, B, 3, S, S) uint8 of each batch; the next one is under way while this one is used."""
    encoder.check(store)
    waiting: deque = deque()
    with clean_engine(encoder, store, engine) as clean_views:
        for ids in [*batches, None]:
            if ids is not None:
                shown = views.draw(encoder.image_size, encoder.crop_ratio, ids, store)
                by = [clean_views, engine] if views.clean else [engine]
                waiting.append([one.submit(ids, p) for one, p in zip(by, shown)])
            while len(waiting) > (0 if ids is None else 1):
                groups = [result(pending, store) for pending in waiting.popleft()]
                yield torch.cat([group.to(groups[-1].device) for group in groups])


def result(pending: Any, store: Store) -> Tensor:
    """The one group of views (V, B, 3, S, S) of a batch under way; `UserError` for a damaged sample."""
    try:
        (group,) = pending.result()
    except Corrupt as error:
        raise UserError(
            f"{store.path} {store.split}: sample {error.key} is damaged ({error.reason}); a score over the others would "
            "not be comparable: write the shards again"
        ) from None
    return group


def forward(encoder: Encoder, images: Tensor, device: str | torch.device) -> Tensor:
    """(V, B, 3, S, S) -> (B, V, F) on the CPU."""
    parts = []
    for view in images:  # one by one: V views of a batch need no more memory than one
        x = normalize(view.to(device), encoder.mean, encoder.std, torch.float32)
        parts.append(encoder.module(x.contiguous(memory_format=torch.channels_last)).float())
        if parts[-1].ndim != 2:
            raise UserError(f"{encoder.run}: its output is {tuple(parts[-1].shape)}, not (N, F): no pooled features")
    return torch.stack(parts, 1).cpu()


def save(path: Path, manifest: dict[str, str], features: Tensor) -> None:
    """Write atomically; the manifest gets the content's own hash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = features.contiguous()
    with files.whole(path) as file:
        save_file({"features": features}, file.name, manifest | {"content": _content(features)})


def _content(features: Tensor) -> str:
    return hashlib.sha256(features.numpy().data).hexdigest()


def load(path: Path, manifest: dict[str, str]) -> Tensor:
    """The features of this manifest. `Stale` where the file is of another, or damaged; FileNotFoundError."""
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        with safe_open(path, "pt") as file:
            written = dict(file.metadata() or {})
            features = file.get_tensor("features")
    except (SafetensorError, OSError) as error:
        raise Stale(f"it is damaged ({error})") from None
    other = [name for name, value in manifest.items() if written.get(name) != value]
    if other:
        raise Stale(f"it was made with other {', '.join(other)}")
    if written.get("content") != _content(features):
        raise Stale("its content does not match its hash")
    return features


def cached(path: Path, manifest: dict[str, str], make: Callable[[], Tensor]) -> tuple[Tensor, bool]:
    """(features, whether they were on disk). A stale file is named, refused, and replaced.

    With several processes all call it: all have the file or all make, and the first one writes.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    kept: Tensor | None = None
    try:
        kept = load(path, manifest)
    except FileNotFoundError:
        pass
    except Stale as reason:
        if first:
            print(f"{path}: not used, {reason}; computing the features again")
    answers = [kept is not None]
    if dist.is_initialized():
        answers = [False] * dist.get_world_size()
        dist.all_gather_object(answers, kept is not None)
    if kept is not None and all(answers):
        return kept, True
    features = make()
    if first:
        save(path, manifest, features)
    return features, False


def zscore(train: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Standardize (N, F) features with the mean and deviation of `train`; a constant dimension is only centred."""
    mean, std = train.mean(0), train.std(0, correction=0)
    # A dimension that is constant up to rounding has no scale of its own: dividing by it would amplify noise.
    std = torch.where(std > 1e-6 * train.abs().amax(0), std, 1.0)
    return tuple((x - mean) / std for x in (train, *others))


# --------------------------------------------------------------------------------------------------- bicubic clean views


class BicubicEngine:
    """Pillow's antialiased resize for the boxes of clean views alone, where other engines have a triangle's filter."""

    def __init__(self, store: Store, threads: int | None = None):
        self.store, self._pool = store, ThreadPoolExecutor(threads or cores(), "bicubic")

    __call__ = Engine.__call__

    def submit(self, ids: np.ndarray, parameters: ViewParameters) -> Pending:
        ((_, size),) = parameters.groups

        def view(i: int, box: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
            image = Image.fromarray(decoded(self.store, i, self.store.read(i), sides))
            top, left, height, width = box.tolist()
            return np.asarray(
                image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
            )

        boxes = parameters.views["box"][0]
        work = [self._pool.submit(view, *one) for one in zip(ids.tolist(), boxes, parameters.shapes())]
        return Pending(work, lambda: [torch.from_numpy(np.stack([w.result() for w in work])).permute(0, 3, 1, 2)[None]])

    def close(self) -> None:
        self._pool.shutdown()


@contextmanager
def clean_engine(encoder: Encoder, store: Store, engine: Any) -> Iterator[Any]:
    """What makes the clean views of this encoder: `engine`, or where it wants a bicubic filter, one that has it."""
    if encoder.interpolation != "bicubic":
        yield engine
    else:
        with closing(BicubicEngine(store, getattr(engine, "threads", None))) as own:
            yield own
