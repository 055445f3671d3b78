"""Does one clamped color map instead of torchvision's chain matter? python tools/profile.py jitter --data shards/photos

First the pixels: the same crop with the same four factors, ours against torchvision's `ColorJitter` operations in a random
order, and which of the three causes makes the difference. Then the distributions: statistics of the views by both,
and by torchvision with two seeds, which is what no difference looks like; and where clipped values come from. With
`--small shards/cifar10`, last, what it is for: a small network trained on views by either, several seeds with the same
crops, factors and weights at the start, and the k-nearest-neighbour accuracy of its features on held-out images.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from scipy.stats import t
from torch import nn
from torchvision.transforms.v2 import functional as F

from manyview.evaluation.knn import cosine_exp
from manyview.model import backbone, objective
from manyview.pipeline.codec import decode
from manyview.pipeline.engines.resident import ResidentEngine
from manyview.pipeline.loader import normalize
from manyview.pipeline.plan import plan
from manyview.pipeline.store import Store
from manyview.pipeline.views import clean, color_map, parameters, policy
from manyview.training.monitor import environment

OPERATIONS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


@dataclass
class Args:
    data: Path = Path("shards/photos")
    small: Path | None = None
    """Shards of images of 32 px with classes and a `val` split, to train on."""
    images: int = 300
    """Photos compared."""
    size: int = 128
    strength: float = 1.0
    """SimCLR's: brightness, contrast, saturation 0.8 and hue 0.2 of a turn, times this."""
    seeds: int = 3
    train_images: int = 5000
    epochs: int = 16
    json: Path | None = None
    """Where the result goes; the same name with .md gets the page."""


def main(argv: list[str]) -> None:
    args = tyro.cli(Args, args=argv, description=__doc__, prog="profile.py jitter")
    begun = time.perf_counter()
    result: dict[str, Any] = {
        "command": "python tools/profile.py jitter " + shlex.join(argv),
        "environment": environment(torch.device("cpu")),
        "pixels": pixels(args), "distributions": distributions(args), "clipped": clipped(args),
    }  # fmt: skip
    if args.small:
        result["training"] = training(args)
    result["minutes"] = round((time.perf_counter() - begun) / 60, 1)
    text = markdown(result)
    print(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
        args.json.with_suffix(".md").write_text(text)


def photos(args: Args) -> list[torch.Tensor]:
    """Square crops (3, size, size) uint8."""
    store = Store(args.data)
    ids = np.arange(min(args.images, len(store)))
    drawn = parameters(policy("none", 1, args.size), 0, 0 * ids, ids, store.heights[ids], store.widths[ids])
    views = []
    for b, i in enumerate(ids):
        image = torch.from_numpy(np.array(decode(store.read(int(i))))).permute(2, 0, 1)
        views.append(F.resized_crop(image, *drawn.views["box"][0, b].tolist(), [args.size, args.size], antialias=True))
    return views


def draw(generator: np.random.Generator, strength: float) -> tuple[list[float], list[int]]:
    """Three factors around 1, a hue in turns, and an order."""
    spread = 0.8 * strength
    return [
        *generator.uniform(1 - spread, 1 + spread, 3),
        generator.uniform(-0.2, 0.2) * strength,
    ], generator.permutation(4).tolist()


def theirs(image: torch.Tensor, factors: list[float], order: list[int]) -> torch.Tensor:
    for k in order:
        image = OPERATIONS[k](image, factors[k])
    return image


def ours(image: torch.Tensor, factors: list[float], pivot: float = 128) -> torch.Tensor:
    out = np.zeros((3, 4), np.float32)
    color_map(*factors, out)
    out[:, 3] *= pivot / 128
    m = torch.from_numpy(out)
    mapped = torch.einsum("dc,chw->dhw", m[:, :3], image.float()) + m[:, 3, None, None]
    return mapped.round().clamp(0, 255).to(torch.uint8)


def pixels(args: Args) -> dict[str, Any]:
    """Mean absolute difference in grey levels (of 255), for all of the jitter and cause by cause."""
    generator = np.random.default_rng(0)
    found: dict[str, list[float]] = {}

    def add(name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        found.setdefault(name, []).append(float((a.float() - b.float()).abs().mean()))

    for image in photos(args):
        factors, order = draw(generator, args.strength)
        _, other = draw(generator, args.strength)
        luma = float(F.rgb_to_grayscale(image, 1).float().mean())
        no_hue, only_hue = [*factors[:3], 0.0], [1.0, 1.0, 1.0, factors[3]]
        full = theirs(image, factors, order)
        add("ours and torchvision", ours(image, factors), full)
        add("torchvision in two of its random orders", theirs(image, factors, other), full)
        add("torchvision with other factors", theirs(image, draw(generator, args.strength)[0], order), full)
        add("cause: contrast pivots at 128, not at the mean", ours(image, no_hue), ours(image, no_hue, luma))
        add("cause: hue in YIQ, not in HSV", ours(image, only_hue), theirs(image, only_hue, [3]))
        add("cause: one clamp, not four", ours(image, no_hue, luma), theirs(image, no_hue, [k for k in order if k < 3]))
    return {
        name: {"mean": round(statistics.mean(v), 2), "median": round(statistics.median(v), 2)}
        for name, v in found.items()
    }


def distributions(args: Args) -> dict[str, Any]:
    """Kolmogorov-Smirnov distances of statistics of the views: ours to torchvision's, and two of torchvision's."""
    images = photos(args) * max(1, 900 // args.images)
    sets = {}
    for name, seed, make in (("ours", 1, "ours"), ("torchvision", 2, "theirs"), ("torchvision again", 3, "theirs")):
        generator = np.random.default_rng(seed)
        rows = []
        for image in images:
            factors, order = draw(generator, args.strength)
            view = (ours(image, factors) if make == "ours" else theirs(image, factors, order)).float()
            luma = (view * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
            chroma = (view.amax(0) - view.amin(0)).mean()
            clipped = ((view == 0) | (view == 255)).float().mean()
            rows.append([*view.mean((1, 2)).tolist(), float(luma.std()), float(chroma), float(clipped)])
        sets[name] = np.array(rows)
    names = ("mean red", "mean green", "mean blue", "contrast", "chroma", "clipped share")
    return {
        name: {
            "ours to torchvision": _ks(sets["ours"][:, k], sets["torchvision"][:, k]),
            "torchvision to itself": _ks(sets["torchvision"][:, k], sets["torchvision again"][:, k]),
        }
        for k, name in enumerate(names)
    }


def clipped(args: Args) -> dict[str, float]:
    """Share (%) of the values that are 0 or 255, by what makes the views; and of those that torchvision's chain put to
    0 or 255 at any of its steps, where what they were is lost too."""
    generator = np.random.default_rng(4)
    found: dict[str, list[torch.Tensor]] = {}

    def ends(image: torch.Tensor) -> torch.Tensor:
        return (image == 0) | (image == 255)

    for image in photos(args):
        factors, order = draw(generator, args.strength)
        luma = float(F.rgb_to_grayscale(image, 1).float().mean())
        steps = [image]
        for k in order:
            steps.append(OPERATIONS[k](steps[-1], factors[k]))
        shares = {
            "photos": ends(image), "torchvision": ends(steps[-1]),
            "torchvision, at any of its steps": torch.stack([ends(step) for step in steps[1:]]).any(0),
            "ours": ends(ours(image, factors)), "ours, contrast around the image's mean": ends(ours(image, factors, luma)),
            "ours, without hue": ends(ours(image, [*factors[:3], 0.0])),
        }  # fmt: skip
        for name, which in shares.items():
            found.setdefault(name, []).append(which.float().mean())
    return {name: round(100 * float(torch.stack(v).mean()), 2) for name, v in found.items()}


def _ks(a: np.ndarray, b: np.ndarray) -> float:
    """The largest distance between two empirical distribution functions."""
    both = np.sort(np.concatenate([a, b]))
    steps = [np.searchsorted(np.sort(x), both, "right") / len(x) for x in (a, b)]
    return round(float(np.abs(steps[0] - steps[1]).max()), 3)


def training(args: Args) -> dict[str, Any]:
    """Accuracies (%) a seed of networks trained on the views of either."""
    assert args.small is not None
    store, val = Store(args.small), Store(args.small, "val")
    engine, other = ResidentEngine(store), ResidentEngine(val)
    found: dict[str, list[float]] = {"ours": [], "torchvision": [], "no jitter": [], "untrained": []}
    for seed in range(args.seeds):
        for name, scores in found.items():
            scores.append(round(train(args, store, engine, val, other, name, seed), 2))
    engine.close()
    other.close()
    return {
        "accuracy": found,
        "mean": {name: round(statistics.mean(v), 2) for name, v in found.items()},
        "ours - torchvision": paired(found["ours"], found["torchvision"]),
        "torchvision - no jitter": paired(found["torchvision"], found["no jitter"]),
        "torchvision - untrained": paired(found["torchvision"], found["untrained"]),
    }


def paired(a: list[float], b: list[float]) -> dict[str, float]:
    """Mean difference a seed and its 95 % interval by Student's t (infinite for one seed)."""
    differences = [x - y for x, y in zip(a, b)]
    mean, n = statistics.mean(differences), len(differences)
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(differences) / n**0.5 if n > 1 else math.inf
    return {"mean": round(mean, 2), "low": round(mean - half, 2), "high": round(mean + half, 2)}


def verdict(training: dict[str, Any]) -> str:
    """What the training says: about the color map, beside what the jitter itself is worth."""
    ours_, worth, learnt = (
        training[k] for k in ("ours - torchvision", "torchvision - no jitter", "torchvision - untrained")
    )
    if learnt["low"] <= 0:
        return "Nothing can be said: the networks are not better than untrained ones."
    zero = ours_["low"] <= 0 <= ours_["high"]
    return (
        f"Trained on one clamped color map instead of torchvision's chain, the accuracy is {ours_['mean']:+.2f} points "
        f"[{ours_['low']:.2f}, {ours_['high']:.2f}] different; "
        + ("the interval holds 0, so no difference is seen" if zero else "the interval does not hold 0: it matters")
        + f". The jitter itself is worth {worth['mean']:+.2f} [{worth['low']:.2f}, {worth['high']:.2f}], the training "
        f"{learnt['mean']:+.2f}."
    )


def markdown(result: dict[str, Any]) -> str:
    env = result["environment"]
    lines = [
        "# One color map beside torchvision's chain", "", f"`{result['command']}`", "",
        f"Commit {env['commit']}, {env['device']} ({env['cores']} cores), {result['minutes']} minutes.", "",
        "| mean absolute difference, grey levels | mean | median |", "|---|--:|--:|",
        *(f"| {name} | {v['mean']} | {v['median']} |" for name, v in result["pixels"].items()), "",
        "| Kolmogorov-Smirnov distance of views' | ours to torchvision | torchvision to itself |", "|---|--:|--:|",
        *(f"| {name} | {' | '.join(str(x) for x in v.values())} |" for name, v in result["distributions"].items()), "",
        "| values that are 0 or 255 | % |", "|---|--:|",
        *(f"| {name} | {v} |" for name, v in result["clipped"].items()), "",
        "Torchvision clamps after each operation, and a later one moves what was clamped off the end again: fewer values end "
        "there, but what they were is lost all the same.",
    ]  # fmt: skip
    if "training" in result:
        training = result["training"]
        lines += ["", "| held-out kNN, % | mean | seeds |", "|---|--:|---|"]
        lines += [f"| {k} | {training['mean'][k]} | {v} |" for k, v in training["accuracy"].items()]
        lines += ["", verdict(training)]
    return "\n".join(lines) + "\n"


def train(args: Args, store: Store, engine: ResidentEngine, val: Store, other: ResidentEngine, jitter: str, seed: int):
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    network = backbone.create("resnet10-narrow", image_size=32, stem="standard")
    head = nn.Sequential(
        nn.Linear(network.num_features, 128, bias=False),  # type: ignore[arg-type]
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Linear(128, 128),
    )
    optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], 1e-3, weight_decay=1e-6)
    loss_of = objective.create("barlow")
    chosen = policy("simclr", 2, 32, {"jitter": 0, "grey": 0, "blur": 0})
    order = plan(store.labels, seed=seed, batch=250, fraction=args.train_images / len(store))
    for step in range(order.steps(args.epochs) if jitter != "untrained" else 0):
        ids, epochs = order.batch(step)
        drawn = parameters(chosen, seed, epochs, ids, store.heights[ids], store.widths[ids])
        views = engine(ids, drawn)[0].flatten(0, 1)
        views = torch.stack([_jittered(view, jitter, generator, args.strength) for view in views])
        z = head(network(normalize(views, store.mean, store.std, torch.float32))).unflatten(0, (2, -1))
        optimizer.zero_grad()
        loss_of(z).total.backward()
        optimizer.step()
    network.eval()
    bank = embed(network, store, engine, order.ids)
    queries = embed(network, val, other, np.arange(min(2000, len(val))))
    labels = torch.from_numpy(np.array(store.labels[order.ids]))
    guesses = cosine_exp(bank, labels, queries, classes=len(store.classes)).argmax(1)
    return 100 * float((guesses == torch.from_numpy(np.array(val.labels[: len(queries)]))).float().mean())


def _jittered(view: torch.Tensor, jitter: str, generator: np.random.Generator, strength: float) -> torch.Tensor:
    factors, order = draw(generator, strength)
    if generator.random() >= 0.8 or jitter == "no jitter":
        return view
    return ours(view, factors) if jitter == "ours" else theirs(view, factors, order)


@torch.inference_mode()
def embed(network: nn.Module, store: Store, engine: ResidentEngine, ids: np.ndarray) -> torch.Tensor:
    parts = np.array_split(ids, max(1, len(ids) // 500))
    views = [engine(part, clean(32, store.heights[part], store.widths[part]))[0][0] for part in parts]
    return torch.cat([network(normalize(view, store.mean, store.std, torch.float32)) for view in views])
