"""The protocols: each yields its results with a name, the scaling of the features, and a text that says what was done.

Each looks at the test labels once, to score. `PROTOCOLS`, at the end, is the one list of them: a new one is a function that
yields results, and a row there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from manyview.evaluation import data as datasets
from manyview.evaluation import fewshot, finetune, knn, label_free, linear, metrics
from manyview.evaluation.encoder import frozen
from manyview.evaluation.features import AVERAGED_VIEWS, zscore
from manyview.evaluation.metrics import Score, score
from manyview.pipeline import views
from manyview.pipeline.errors import UserError, nearest
from manyview.pipeline.store import Store

if TYPE_CHECKING:
    from manyview.evaluation.suite import Cell

OVERLAP_LIMIT, THUMBNAIL = 100_000, 16


@dataclass(frozen=True)
class Problem:
    """Features (N, F) with labels (N,) to learn from, and queries (n, F) with their true labels (n,), on one device."""

    x: Tensor
    labels: Tensor  # or, as `truth`, (N, C) bool
    queries: Tensor
    truth: Tensor
    classes: int


@dataclass(frozen=True)
class Result:
    protocol: str
    norm: str
    text: str
    score: Score | None = None
    metric: str = ""  # with `value`: a result that is no accuracy
    value: float = 0.0
    seed: int = 0
    scores: Tensor | None = None  # (n, C), for the confusion matrix


def judged(scores: Tensor, truth: Tensor) -> dict[str, Any]:
    """What a result says of scores (n, C): accuracies, or where an image has several labels, mean average precision."""
    if truth.ndim == 1:
        return {"score": score(scores, truth)}
    return {"metric": "mAP", "value": metrics.average_precision(scores, truth)}


def nearest_neighbours(p: Problem, prefix: str = "") -> Iterator[Result]:
    """kNN: cosine-exp at every k that the bank allows, Euclidean inverse-distance on raw and standardized features."""
    ks = [k for k in knn.KS if k <= len(p.x)]
    if ks:
        similarities, ids = knn.neighbours(p.x, p.queries, max(ks))
    for k in ks:
        scores = knn.vote(knn.cosine_weights(similarities[:, :k]), p.labels[ids[:, :k]], p.classes)
        text = f"cosine similarity, {k} neighbours, each votes exp(similarity / {knn.TEMPERATURE})"
        shown = scores if k == 20 else None
        yield Result(f"{prefix}knn-cosine-exp k={k}", "l2", text, **judged(scores, p.truth), scores=shown)
    if len(p.x) >= 20:
        text = "Euclidean distance, 20 neighbours, each votes 1 / distance"
        for norm, (bank, queries) in {"raw": (p.x, p.queries), "zscore": zscore(p.x, p.queries)}.items():
            scores = knn.euclid_invdist(bank, p.labels, queries, k=20, classes=p.classes)
            yield Result(f"{prefix}knn-euclid-invdist k=20", norm, text, **judged(scores, p.truth))


def transductive(p: Problem) -> Iterator[Result]:
    """kNN with the test features standardized by their own statistics: uses the whole test set."""
    text = "Euclidean distance, 20 neighbours, 1 / distance; test features standardized with the test set's statistics"
    (bank,), (queries,) = zscore(p.x), zscore(p.queries)
    scores = knn.euclid_invdist(bank, p.labels, queries, k=20, classes=p.classes)
    yield Result("knn-euclid-invdist k=20 transductive", "zscore-transductive", text, score(scores, p.truth))


def linear_probes(p: Problem, seed: int, epochs: int, prefix: str = "") -> Iterator[Result]:
    """The linear probe with and without BatchNorm, each with the rate chosen on held-out training data and fixed."""
    for bn in (True, False):
        probe = linear.sweep(p.x, p.labels, p.queries, p.classes, bn=bn, epochs=epochs, seed=seed)
        norm, where = "bn" if bn else "raw", " (the edge of the grid)" if probe.at_edge else ""
        text = (
            f"linear classifier on clean features, SGD, batch {linear.BATCH}, {epochs} epochs; rate {probe.rate:g} per 256"
            f" chosen among {len(linear.RATES)} on a tenth of the training data{where}"
        )
        yield Result(f"{prefix}linear-sweep", norm, text, **judged(probe.scores, p.truth), seed=seed,
                     scores=probe.scores if bn else None)  # fmt: skip
        text = (
            f"linear classifier on clean features, SGD {linear.PAPER_RATE:g} per 256, batch {linear.BATCH}, {epochs} epochs,"
            f" {linear.WARMUP} of warm-up, cosine to 0, no weight decay"
        )
        yield Result(f"{prefix}linear-paper", norm, text, **judged(probe.paper, p.truth), seed=seed)


def few_shots(p: Problem) -> Iterator[Result]:
    """Ridge regression on 1, 5, 10 and 25 labels a class and on 1 % and 10 % of all, three draws each; and on all."""
    for amount in (*fewshot.SHOTS, *fewshot.SHARES):
        for seed in fewshot.SEEDS if amount != 1.0 else (0,):
            if isinstance(amount, int):
                ids, name = fewshot.shots(p.labels, amount, seed), f"{amount}-shot"
                what = f"{amount} label{'s' * (amount > 1)} a class: {len(ids)} in all"
            else:
                ids = torch.from_numpy(fewshot.subset(p.labels.cpu().numpy(), amount, seed).ids)
                name, what = f"{100 * amount:g}%", f"{len(ids):,} labels, {len(ids) / len(p.x):.3%} of them"
            if len(ids) > fewshot.MOST:
                continue
            ids = ids.to(p.x.device)
            scores = fewshot.ridge(p.x[ids], p.labels[ids], p.queries, p.classes)
            text = f"ridge regression (penalty 1024) on {what}"
            yield Result(f"ridge {name}", "zscore", text, score(scores, p.truth), seed=seed)


def without_labels(x: Tensor) -> Iterator[Result]:
    """RankMe and alpha-ReQ of training features (N, K)."""
    n, k = x.shape
    few = f"; N is below 5 K = {5 * k}, which biases it down" if n < 5 * k else ""
    for centered in (False, True):
        text = f"exp of the entropy of the singular values, {'' if centered else 'not '}centred, eps 1e-7, N = {n}, K = {k}"
        name = "rankme centred" if centered else "rankme"
        yield Result(name, "raw", text + few, metric="rankme", value=label_free.rankme(x, centered=centered))
    alpha = label_free.power_law(label_free.eigenspectrum(x))
    text = (
        f"slope of ln eigenvalue on -ln rank, centred, ranks {alpha.first}..{alpha.last} weighted 1 / rank, R2 = "
        f"{alpha.r2:.3f}, N = {n}, K = {k}"
    )
    yield Result("alpha-req", "raw", text + few, metric="alpha", value=alpha.alpha)


def lidar(z: Tensor, policy: str) -> Iterator[Result]:
    """LiDAR of training features (n, q, K)."""
    n, q, k = z.shape
    text = f"rank of between-image over within-image scatter, {n} images x {q} views ({policy}), delta 1e-4, eps 1e-8, K = {k}"
    few = f"; at most {n - 1} with so few images" if n <= k else ""
    yield Result("lidar", "raw", text + few, metric="lidar", value=label_free.lidar(z))


def averaged(p: Problem, seed: int, epochs: int, views: int) -> Iterator[Result]:
    """kNN and the linear probe on features averaged over views: only ever under this name."""
    prefix = f"averaged-{views}-views "
    for result in [*nearest_neighbours(p, prefix), *linear_probes(p, seed, epochs, prefix)]:
        if "k=20" in result.protocol or "linear" in result.protocol:
            text = f"{result.text}; features averaged over 1 clean and {views - 1} augmented views"
            yield Result(result.protocol, result.norm, text, result.score, seed=result.seed)


# ------------------------------------------------------------------------------- those that look at images or two sets


def majority(cell: Cell) -> Iterator[Result]:
    chance = metrics.majority(cell.data.labels("train"), cell.data.labels("test"), cell.data.classes)
    yield Result("majority class", "none", "always the most frequent class of the training data", chance)


def overlap(cell: Cell) -> Iterator[Result]:
    """Test images that are also in the pre-training data: byte for byte, and nearly, by 16-pixel thumbnails."""
    seen, data = cell.seen, cell.data
    pool = datasets.sample(seen.labels, np.arange(len(seen)), OVERLAP_LIMIT, cell.options.seed)
    among = f"among {len(data.test_ids):,} test images, against {len(pool):,} of {len(seen):,} of {seen.name}"

    def digest(store: Store, i: int) -> bytes:
        return hashlib.blake2b(np.ascontiguousarray(store.read(int(i))).data, digest_size=16).digest()

    known = {digest(seen, i) for i in pool}
    same = sum(digest(data.test, i) in known for i in data.test_ids)
    yield Result("overlap exact", "none", f"same stored bytes, {among}", metric="images", value=same)
    bank, queries = _thumbnails(cell, seen, pool), _thumbnails(cell, data.test, data.test_ids)
    close = int((knn.neighbours(bank, queries, 1)[0][:, 0] >= 0.999).sum())
    text = f"{THUMBNAIL} px thumbnails with correlation of 0.999 or more, {among}"
    yield Result("overlap near", "none", text, metric="images", value=close)


def _thumbnails(cell: Cell, store: Store, ids: np.ndarray) -> Tensor:
    """(n, F), each centred: similarity by cosine is then correlation."""
    parts = []
    for some in np.array_split(ids, -(-len(ids) // 1024)):
        boxes = views.clean(THUMBNAIL, store.heights[some], store.widths[some])
        parts.append(cell.suite.engine(store)(some, boxes)[0][0].flatten(1).cpu().float())
    return torch.cat([x - x.mean(1, keepdim=True) for x in parts])


def in_domain(cell: Cell) -> Iterator[Result]:
    """The probe of the pre-training data, tested on another dataset without being trained there."""
    p = cell.problem()
    for r in [*nearest_neighbours(p), *linear_probes(p, cell.options.seed, cell.options.epochs)]:
        yield replace(r, text=f"{r.text}; trained on {cell.bank.name}, not on {cell.data.name}", scores=None)


def finetuned(cell: Cell) -> Iterator[Result]:
    """The whole network trained on a part of the labels, `cell.part` = (share, seed), and scored once, after it."""
    (preset_name, preset, subset), o, data = _tuning(cell), cell.options, cell.data
    if subset.fraction < 1:
        subset.save(cell.suite.out / "subsets" / f"{data.name}-{subset.fraction * 100:g}pct-seed{subset.seed}.json")
    extras = ", layer decay 0.65, label smoothing 0.1, drop path 0.2" if finetune.is_vit(cell.encoder.module) else ""
    text = (
        f"whole network trained on {len(subset.ids):,} labels ({subset.true_fraction:.3%} of the training images), preset"
        f" {preset_name}: SGD {preset.backbone_rate:g} / head {preset.head_rate:g} per 256, {preset.epochs} epochs,"
        f" {preset.warmup} of warm-up{extras}; last epoch"
    )
    encoder, engine = cell.suite.ready(cell.network, cell.bank), cell.suite.engine
    with frozen(encoder.module):  # the tuned network is a copy
        model = finetune.train(encoder, data.train, subset.ids, data.classes, engine(data.train), preset,
                               bn=o.finetune_bn, seed=subset.seed, device=o.device)  # fmt: skip
    scores = finetune.predict(
        model, encoder, data.test, data.test_ids, engine(data.test), batch=o.batch, device=o.device
    )
    if not scores.isfinite().all():
        raise UserError(f"{encoder.run}: fine-tuning on {data.name} with preset {preset_name} diverged: no score")
    name = "finetune full" if subset.fraction == 1 else f"finetune {subset.fraction * 100:g}%"
    yield Result(name, "bn" if o.finetune_bn else "raw", text, score(scores, data.labels("test")), seed=subset.seed)


def _tuning(cell: Cell) -> tuple[str, finetune.Preset, fewshot.Subset]:
    """The preset, with its name, and the labels to train on; their seed is also the run's."""
    (share, draw), o, data = cell.part, cell.options, cell.data
    if share == 1:
        name, subset = "full", fewshot.Subset(data.train_ids, 1.0, o.seed, 1.0)
    else:
        name = o.preset if o.preset in finetune.PRESETS else f"{o.preset}-{share * 100:g}%"
        subset = fewshot.subset(data.train.labels, share, draw, data.train_ids)
    preset = finetune.PRESETS[name]
    return name, replace(preset, epochs=o.finetune_epochs or preset.epochs), subset


def _tuning_facts(cell: Cell) -> dict:
    _, preset, subset = _tuning(cell)
    return {"preset": asdict(preset), "subset": subset.sha256, "seed": subset.seed, "bn": cell.options.finetune_bn}


# --------------------------------------------------------------------------------------------------------- the list


@dataclass(frozen=True)
class Protocol:
    """What the rest of the evaluation knows of a protocol. Whatever a field does not say, holds for every protocol."""

    name: str
    run: Callable[[Cell], Iterable[Result]]
    reads: str = "clean"  # the features it is given: `clean`, `averaged`, `lidar`; none: "" (it looks at images itself)
    labels: bool = True  # whether it needs labels
    test: bool = True  # whether it scores test images
    networks: tuple[str, ...] = ("trained", "untrained", "pixels")
    group: str = "all"  # the smallest group it belongs to: quick, all, or none
    needs_own: bool = False  # the data that the encoder was trained on
    learns_from_own: bool = False  # instead of from the training images of the data that it is tested on
    several: bool = False  # whether it knows images with several labels
    least: int = 0  # training images
    depends: Callable[[Cell], dict] = lambda cell: {}  # what else changes its results
    parts: tuple = (None,)  # several cells, so that an interruption loses one only
    refuse: Callable[[Cell], None] = lambda cell: None  # raises UserError where it cannot be run, before anything is


def _probe(cell: Cell) -> dict:
    return {"seed": cell.options.seed, "epochs": cell.options.epochs}


NETWORKS = ("trained", "untrained")
FEWSHOT = Protocol("fewshot", finetuned, reads="", networks=NETWORKS, depends=_tuning_facts,
                   refuse=lambda c: finetune.check(c.encoder.module),
                   parts=tuple((share, seed) for share in (0.01, 0.1) for seed in fewshot.SEEDS))  # fmt: skip
PROTOCOLS = (
    Protocol("knn", lambda c: nearest_neighbours(c.problem()), group="quick", least=min(knn.KS), several=True),
    Protocol("linear", lambda c: linear_probes(c.problem(), **_probe(c)), group="quick", depends=_probe, several=True),
    Protocol("ridge", lambda c: few_shots(c.problem()), group="quick"),
    Protocol("label-free", lambda c: without_labels(c.features("train")[:, 0].to(c.options.device)), group="quick",
             labels=False, test=False),
    Protocol("overlap", overlap, reads="", group="quick", labels=False, networks=("trained",), needs_own=True,
             depends=lambda c: {"own": c.seen.fingerprint}),
    Protocol("lidar", lambda c: lidar(c.features("train"), c.encoder.policy), reads="lidar", labels=False, test=False,
             networks=NETWORKS),
    Protocol("averaged", lambda c: averaged(c.problem(), **_probe(c), views=AVERAGED_VIEWS), reads="averaged", depends=_probe,
             networks=NETWORKS),
    Protocol("in-domain", in_domain, needs_own=True, learns_from_own=True, networks=NETWORKS, depends=_probe),
    FEWSHOT,
    replace(FEWSHOT, name="full", parts=((1.0, 0),)),
    Protocol("transductive", lambda c: transductive(c.problem()), group="none", least=20),
)  # fmt: skip
MAJORITY = Protocol("majority", majority, reads="", networks=("untrained",))  # beside every accuracy, asked for or not
GROUPS = {
    "quick": [p.name for p in PROTOCOLS if p.group == "quick"],
    "all": [p.name for p in PROTOCOLS if p.group != "none"],
}


def choose(names: Iterable[str]) -> tuple[Protocol, ...]:
    """The protocols of these names or groups, in the order of `PROTOCOLS`. UserError for an unknown name."""
    wanted: set[str] = set()
    known = [*(p.name for p in PROTOCOLS), *GROUPS]
    for name in names:
        if name not in known:
            raise UserError(nearest("protocol", name, known))
        wanted |= set(GROUPS.get(name, (name,)))
    return tuple(p for p in PROTOCOLS if p.name in wanted)
