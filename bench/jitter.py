"""Does one clamped color map instead of torchvision's chain matter? python tools/profile.py jitter --data shards/photos

First the pixels: the same crop with the same four factors, ours against torchvision's `ColorJitter` operations in a random
order, and which of the three causes makes the difference. Then the distributions: statistics of the views by both,
and by torchvision with two seeds, which is what no difference looks like; and where clipped values come from. With
`--small shards/cifar10`, last, what it is for: a small network trained on views by either, several seeds with the same
crops, factors and weights at the start, and the k-nearest-neighbour accuracy of its features on held-out images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from manyview.bench import output
from manyview.bench.harness import CPU, interleaved
from manyview.bench.output import table
from manyview.evaluation.knn import cosine_exp
from manyview.model import backbone, objective
from manyview.pipeline.codec import decode
from manyview.pipeline.engines.resident import ResidentEngine
from manyview.pipeline.loader import normalize
from manyview.pipeline.plan import plan
from manyview.pipeline.store import Store
from manyview.pipeline.views import clean, color_map, parameters, policy

OPERATIONS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
STATISTICS = ("mean red", "mean green", "mean blue", "contrast", "chroma", "clipped share")
TRAINED = ("ours", "torchvision", "no jitter", "untrained")


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
    args = output.parse(Args, argv, __doc__, "jitter", images=1, size=8, strength=0, seeds=1, train_images=2, epochs=1)
    begun, env = time.perf_counter(), output.environment(CPU, "jitter", argv)
    result: dict[str, Any] = {
        "command": f"python {env['command']}", "environment": env,
        "pixels": pixels(args), "distributions": distributions(args), "clipped": clipped(args),
    }  # fmt: skip
    if args.small:
        result["training"] = training(args)
    result["minutes"] = round((time.perf_counter() - begun) / 60, 1)
    text = markdown(result)
    print(text)
    output.write(args.json, result, text)


def photos(args: Args) -> list[Tensor]:
    """Square crops (3, size, size) uint8."""
    store = Store(args.data)
    ids = np.arange(min(args.images, len(store)))
    crops = parameters(policy("none", 1, args.size), 0, 0 * ids, ids, store.heights[ids], store.widths[ids])
    images = (torch.from_numpy(np.array(decode(store.read(int(i))))).permute(2, 0, 1) for i in ids)
    boxes = (crops.views["box"][0, b].tolist() for b in range(len(ids)))
    return [F.resized_crop(image, *box, [args.size, args.size], antialias=True) for image, box in zip(images, boxes)]


def draw(generator: np.random.Generator, strength: float) -> tuple[list[float], list[int]]:
    """Three factors around 1, a hue in turns, and an order."""
    spread = 0.8 * strength
    factors = [*generator.uniform(1 - spread, 1 + spread, 3), generator.uniform(-0.2, 0.2) * strength]
    return factors, generator.permutation(4).tolist()


def chain(image: Tensor, factors: list[float], order: list[int]) -> Iterator[Tensor]:
    """torchvision's view after each of its operations."""
    for k in order:
        image = OPERATIONS[k](image, factors[k])
        yield image


def theirs(image: Tensor, factors: list[float], order: list[int]) -> Tensor:
    return [image, *chain(image, factors, order)][-1]


def ours(image: Tensor, factors: list[float], pivot: float = 128) -> Tensor:
    out = np.zeros((3, 4), np.float32)
    color_map(*factors, out)
    out[:, 3] *= pivot / 128
    m = torch.from_numpy(out)
    mapped = torch.einsum("dc,chw->dhw", m[:, :3], image.float()) + m[:, 3, None, None]
    return mapped.round().clamp(0, 255).to(torch.uint8)


def luma(image: Tensor) -> float:
    return float(F.rgb_to_grayscale(image, 1).float().mean())


def collected(rows: list[dict[str, float]], of: Callable[[list[float]], Any]) -> dict[str, Any]:
    return {name: of([row[name] for row in rows]) for name in rows[0]}


def pixels(args: Args) -> dict[str, Any]:
    """Mean absolute difference in grey levels (of 255), for all of the jitter and cause by cause."""
    generator, rows = np.random.default_rng(0), []

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a.float() - b.float()).abs().mean())

    for image in photos(args):
        factors, order = draw(generator, args.strength)
        _, other = draw(generator, args.strength)
        no_hue, only_hue, pivot = [*factors[:3], 0.0], [1.0, 1.0, 1.0, factors[3]], luma(image)
        full = theirs(image, factors, order)
        rows.append({
            "ours and torchvision": apart(ours(image, factors), full),
            "torchvision in two of its random orders": apart(theirs(image, factors, other), full),
            "torchvision with other factors": apart(theirs(image, draw(generator, args.strength)[0], order), full),
            "cause: contrast pivots at 128, not at the mean": apart(ours(image, no_hue), ours(image, no_hue, pivot)),
            "cause: hue in YIQ, not in HSV": apart(ours(image, only_hue), theirs(image, only_hue, [3])),
            "cause: one clamp, not four":
                apart(ours(image, no_hue, pivot), theirs(image, no_hue, [k for k in order if k < 3])),
        })  # fmt: skip
    return collected(rows, lambda v: {"mean": round(mean(v), 2), "median": round(median(v), 2)})


def distributions(args: Args) -> dict[str, Any]:
    """Kolmogorov-Smirnov distances of statistics of the views: ours to torchvision's, and two of torchvision's."""
    images = photos(args) * max(1, 900 // args.images)

    def statistics(seed: int, mine: bool) -> np.ndarray:
        generator, rows = np.random.default_rng(seed), []
        for image in images:
            factors, order = draw(generator, args.strength)
            view = (ours(image, factors) if mine else theirs(image, factors, order)).float()
            grey = (view * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
            ends = ((view == 0) | (view == 255)).float().mean()
            chroma = (view.amax(0) - view.amin(0)).mean()
            rows.append([*view.mean((1, 2)).tolist(), float(grey.std()), float(chroma), float(ends)])
        return np.array(rows).T

    mine, other, again = statistics(1, True), statistics(2, False), statistics(3, False)
    distance = lambda a, b: round(float(stats.ks_2samp(a, b).statistic), 3)  # noqa: E731
    return {name: {"ours to torchvision": distance(mine[k], other[k]), "torchvision to itself": distance(other[k], again[k])}
            for k, name in enumerate(STATISTICS)}  # fmt: skip


def clipped(args: Args) -> dict[str, float]:
    """Share (%) of the values that are 0 or 255, by what makes the views; and of those that torchvision's chain put to
    0 or 255 at any of its steps, where what they were is lost too."""
    generator, rows = np.random.default_rng(4), []
    ends = lambda image: (image == 0) | (image == 255)  # noqa: E731
    for image in photos(args):
        factors, order = draw(generator, args.strength)
        steps = torch.stack(list(chain(image, factors, order)))
        shares = {
            "photos": ends(image), "torchvision": ends(steps[-1]), "torchvision, at any of its steps": ends(steps).any(0),
            "ours": ends(ours(image, factors)),
            "ours, contrast around the image's mean": ends(ours(image, factors, luma(image))),
            "ours, without hue": ends(ours(image, [*factors[:3], 0.0])),
        }  # fmt: skip
        rows.append({name: 100 * float(which.float().mean()) for name, which in shares.items()})
    return collected(rows, lambda v: round(mean(v), 2))


def training(args: Args) -> dict[str, Any]:
    """Accuracies (%) a seed of networks trained on the views of either."""
    assert args.small is not None
    store, val = Store(args.small), Store(args.small, "val")
    engine, other = ResidentEngine(store), ResidentEngine(val)
    seeds = iter(range(args.seeds * len(TRAINED)))

    def score(name: str) -> float:
        return round(train(args, store, val, engine, other, name, next(seeds) // len(TRAINED)), 2)

    accuracy = interleaved({name: partial(score, name) for name in TRAINED}, args.seeds, lambda call: call())
    engine.close()
    other.close()
    pairs = (("ours", "torchvision"), ("torchvision", "no jitter"), ("torchvision", "untrained"))
    return {"accuracy": accuracy, "mean": {name: round(mean(v), 2) for name, v in accuracy.items()}} | {
        f"{a} - {b}": paired(accuracy[a], accuracy[b]) for a, b in pairs
    }


def paired(a: list[float], b: list[float]) -> dict[str, float]:
    """Mean difference a seed and its 95 % interval by Student's t (infinite for one seed)."""
    gaps = np.subtract(a, b)
    middle = float(gaps.mean())
    half = float(stats.t.ppf(0.975, len(gaps) - 1) * stats.sem(gaps)) if len(gaps) > 1 else np.inf
    return {"mean": round(middle, 2), "low": round(middle - half, 2), "high": round(middle + half, 2)}


def train(
    args: Args, store: Store, val: Store, engine: ResidentEngine, other: ResidentEngine, jitter: str, seed: int
) -> float:
    """Held-out kNN accuracy (%) of a network trained on the views of `jitter`."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    network: Any = backbone.create("resnet10-narrow", image_size=32, stem="standard")
    wide = nn.Linear(network.num_features, 128, bias=False)
    head = nn.Sequential(wide, nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 128))
    optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], 1e-3, weight_decay=1e-6)
    loss_of = objective.create("barlow")
    chosen = policy("simclr", 2, 32, {"jitter": 0, "grey": 0, "blur": 0})
    order = plan(store.labels, seed=seed, batch=250, fraction=args.train_images / len(store))
    for step in range(order.steps(args.epochs) if jitter != "untrained" else 0):
        ids, epochs = order.batch(step)
        crops = parameters(chosen, seed, epochs, ids, store.heights[ids], store.widths[ids])
        views = torch.stack(
            [jittered(view, jitter, generator, args.strength) for view in engine(ids, crops)[0].flatten(0, 1)]
        )
        z = head(network(normalize(views, store.mean, store.std, torch.float32))).unflatten(0, (2, -1))
        optimizer.zero_grad()
        loss_of(z).total.backward()
        optimizer.step()
    network.eval()
    bank = embed(network, store, engine, order.ids)
    queries = embed(network, val, other, np.arange(min(2000, len(val))))
    labels, truth = (torch.from_numpy(np.array(x)) for x in (store.labels[order.ids], val.labels[: len(queries)]))
    guesses = cosine_exp(bank, labels, queries, classes=len(store.classes)).argmax(1)
    return 100 * float((guesses == truth).float().mean())


def jittered(view: Tensor, jitter: str, generator: np.random.Generator, strength: float) -> Tensor:
    factors, order = draw(generator, strength)
    if generator.random() >= 0.8 or jitter == "no jitter":
        return view
    return ours(view, factors) if jitter == "ours" else theirs(view, factors, order)


@torch.inference_mode()
def embed(network: nn.Module, store: Store, engine: ResidentEngine, ids: np.ndarray) -> Tensor:
    parts = np.array_split(ids, max(1, len(ids) // 500))
    views = (engine(part, clean(32, store.heights[part], store.widths[part]))[0][0] for part in parts)
    return torch.cat([network(normalize(view, store.mean, store.std, torch.float32)) for view in views])


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
    env, trained = result["environment"], result.get("training")
    distances = [[name, *v.values()] for name, v in result["distributions"].items()]
    scores = [[k, trained["mean"][k], v] for k, v in trained["accuracy"].items()] if trained else []
    return output.document(
        "# One color map beside torchvision's chain",
        f"`{result['command']}`",
        f"Commit {env['commit']}, {env['device']} ({env['cores']} cores), {result['minutes']} minutes.",
        table(("mean absolute difference, grey levels", "mean", "median"),
              [[name, v["mean"], v["median"]] for name, v in result["pixels"].items()]),
        table(("Kolmogorov-Smirnov distance of views'", "ours to torchvision", "torchvision to itself"), distances),
        table(("values that are 0 or 255", "%"), result["clipped"].items()),
        "Torchvision clamps after each operation, and a later one moves what was clamped off the end again: fewer values end "
        "there, but what they were is lost all the same.",
        *([table(("held-out kNN, %", "mean", "seeds"), scores), verdict(trained)] if trained else []),
    )  # fmt: skip
