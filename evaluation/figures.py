"""The pictures of a report, each drawn once from cached features and kept under a key of what it shows."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.manifold import TSNE
from torch import Tensor

from manyview.evaluation import compare, features, knn, label_free
from manyview.evaluation.data import Data
from manyview.evaluation.features import zscore
from manyview.evaluation.suite import Suite
from manyview.pipeline import views
from manyview.pipeline.sheet import in_colors
from manyview.pipeline.store import Store
from manyview.training.plots import STYLE

TRAINED, UNTRAINED, WRONG, RIGHT = "#2563eb", "#9ca3af", "#dc2626", "#16a34a"
POINTS = 1000  # of the 2-D embedding
QUERIES, NEIGHBOURS = 8, 9
TEXTS = {
    "spectrum": "How many directions the features use: a flat line uses all of them, a steep one few.",
    "confusion": "Of each true class (row), the share that was given each answer (column).",
    "neighbours": "Test images (left) and the training images nearest to them by cosine; a red frame is another class.",
    "map": "Test images laid out by t-SNE on the features, coloured by class; distances between far groups mean little.",
}


def draw(work: Suite, data: Data) -> list[dict]:
    """The pictures of a dataset, as {"dataset", "kind", "file", "text"}; only where its features are in use."""
    if not any(p.reads == "clean" and not p.learns_from_own for p in data.protocols):
        return []
    kinds: dict[str, Callable[[Suite, Data, Path], bool]] = {"spectrum": _spectrum}
    if data.labelled and len(data.test_ids) and not data.multilabel:
        kinds |= {"confusion": _confusion, "neighbours": _neighbours, "map": _map}
    pictures = []
    for kind, picture in kinds.items():
        file = work.out / "plots" / f"eval-{data.name}-{kind}.png"
        key, stamp = _key(work, data, kind), file.with_suffix(".key")
        kept = file.is_file() and stamp.is_file() and stamp.read_text() == key
        if kept or picture(work, data, file):
            pictures.append({"dataset": data.name, "kind": kind, "file": file.name, "text": TEXTS[kind]})
            stamp.write_text(key)
    return pictures


def _key(work: Suite, data: Data, kind: str) -> str:
    both = (work.trained, work.encoder("untrained", data))
    parts = [kind, *(features.describe(e, s, ids) for e in both for s, ids in ((data.train, data.train_ids),
                                                                               (data.test, data.test_ids)))]  # fmt: skip
    if kind == "confusion":
        parts.append(_matrix(work, data) or {})
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _save(figure, file: Path) -> bool:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return True


def _spectrum(work: Suite, data: Data, file: Path) -> bool:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.2, 3.6))
        for weights, color in (("untrained", UNTRAINED), ("trained", TRAINED)):
            values = label_free.eigenspectrum(work.features(weights, data, "train")[:, 0])
            alpha = label_free.power_law(values)
            label = f"{weights}, alpha {alpha.alpha:.2f}"
            axes.loglog(range(1, len(values) + 1), values / values[0], color=color, label=label)
            if weights == "trained" and alpha.last > alpha.first:
                ranks = np.arange(alpha.first, alpha.last + 1)
                middle = float((values[alpha.first - 1 : alpha.last] / values[0]).log().mean().exp())
                fit = ranks**-alpha.alpha
                axes.loglog(ranks, fit * middle / np.exp(np.log(fit).mean()), "--", color="#111827", lw=1,
                            label=f"fit over ranks {alpha.first} to {alpha.last}, R² {alpha.r2:.3f}")  # fmt: skip
        axes.set(xlabel="rank", ylabel="eigenvalue / largest", title=f"Eigenspectrum, {data.name} training images")
        axes.set_ylim(max(1e-8, axes.dataLim.ymin / 2), 2)  # below that are rounding errors
        axes.legend()
        return _save(figure, file)


def _matrix(work: Suite, data: Data) -> dict | None:
    """The row of eval.json whose confusion is drawn: the linear probe's, else kNN's."""
    for cell in ("linear", "knn"):
        for row in work.cells.get(f"{data.name}/{cell}/trained", []):
            if "confusion" in row:
                return row
    return None


def _confusion(work: Suite, data: Data, file: Path) -> bool:
    row = _matrix(work, data)
    if row is None:
        return False
    counts = np.array(row["confusion"], float)
    share = counts / np.maximum(1, counts.sum(1, keepdims=True))
    n = len(share)
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(figsize=(5.2, 4.6))
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        if n <= 20:
            names = [textwrap.shorten(c, 14, placeholder="…") for c in data.train.classes]
            axes.set_xticks(range(n), names, rotation=45, ha="right")
            axes.set_yticks(range(n), names)
            for i, j in np.argwhere(share >= 0.005):
                axes.text(j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", fontsize=7,
                          color="white" if share[i, j] > 0.5 else "#111827")  # fmt: skip
        axes.spines[:].set_visible(False)
        axes.set_title(f"Confusion on {data.name}: {row['protocol']} ({row['norm']}), {100 * row['value']:.1f} %")
        return _save(figure, file)


def _neighbours(work: Suite, data: Data, file: Path) -> bool:
    labels, truth = data.labels("train"), data.labels("test")
    order = np.random.default_rng(work.options.seed).permutation(len(truth))
    first = {int(truth[i]): i for i in reversed(order)}  # one of each class, then others
    rest = [i for i in order if first[int(truth[i])] != i]
    queries = [*first.values(), *rest][:QUERIES]
    x, q = (work.features("trained", data, split)[:, 0] for split in ("train", "test"))
    ids = knn.neighbours(x, q[queries], min(NEIGHBOURS, len(x)))[1].numpy()
    size = max(32, min(64, work.trained.image_size))
    left = _images(work, data.test, data.test_ids[queries], size)
    right = _images(work, data.train, data.train_ids[ids.ravel()], size).reshape(*ids.shape, size, size, 3)
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, grid = plt.subplots(len(queries), ids.shape[1] + 1, figsize=(7.4, 0.76 * len(queries)), squeeze=False)
        for r, query in enumerate(queries):
            _tile(grid[r][0], left[r], "#111827")
            name = textwrap.shorten(data.train.classes[int(truth[query])], 16, placeholder="…")
            grid[r][0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
            for c in range(ids.shape[1]):
                same = labels[ids[r, c]] == truth[query]
                _tile(grid[r][c + 1], right[r, c], RIGHT if same else WRONG)
        figure.subplots_adjust(wspace=0.06, hspace=0.1)
        return _save(figure, file)


def _tile(axes, image: np.ndarray, color: str) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color=color, linewidth=1.8)


def _images(work: Suite, store: Store, ids: np.ndarray, size: int) -> np.ndarray:
    """(n, S, S, 3) uint8 of the clean views."""
    boxes = views.clean(size, store.heights[ids], store.widths[ids], work.trained.crop_ratio)
    pixels = work.engine(store)(ids, boxes)[0][0].permute(0, 2, 3, 1).cpu().numpy()
    seen = work.trained  # files have no statistics
    return np.stack([in_colors(one, store.layout, seen.mean, seen.std) for one in pixels])


def _map(work: Suite, data: Data, file: Path) -> bool:
    chosen = np.random.default_rng(work.options.seed).permutation(len(data.test_ids))[:POINTS]
    labels = data.labels("test")[chosen].numpy()
    colors = plt.get_cmap("tab10" if data.classes <= 10 else "tab20" if data.classes <= 20 else "hsv")
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, both = plt.subplots(1, 2, figsize=(8.6, 4.3))
        for axes, weights in zip(both, ("trained", "untrained")):
            xy = tsne(zscore(work.features(weights, data, "test")[chosen, 0])[0], seed=work.options.seed)
            for c in range(data.classes):
                color = colors(c if data.classes <= 20 else c / data.classes)
                axes.scatter(*xy[labels == c].T, s=7, color=color, lw=0, alpha=0.85, label=data.train.classes[c])
            axes.set(xticks=[], yticks=[], title=f"{weights}, {len(chosen):,} test images")
            axes.spines[:].set_visible(False)
        if data.classes <= 20:
            figure.legend(*both[0].get_legend_handles_labels(), loc="lower center", ncol=min(10, data.classes), fontsize=7,
                          markerscale=2.5, handletextpad=0.1, columnspacing=0.8, bbox_to_anchor=(0.5, -0.06))  # fmt: skip
        figure.tight_layout()
        return _save(figure, file)


def tsne(x: Tensor, *, seed: int = 0) -> np.ndarray:
    """t-SNE (van der Maaten & Hinton 2008) of (n, F) to (n, 2), scikit-learn's."""
    if bool((x == x[0]).all()):
        return np.zeros((len(x), 2))  # of a collapsed encoder: there is nothing to lay out, and scikit-learn's crashes
    # Half its default iterations: of a thousand points the picture is then settled, and it takes 3 s for 5.
    layout = TSNE(2, perplexity=min(30.0, max(1.0, (len(x) - 1) / 3)), max_iter=500, random_state=seed, n_jobs=1)
    return layout.fit_transform(x.float().numpy())


# ------------------------------------------------------------------------------------------------------- of many runs


def comparison(rows: list[dict], correlations: list[compare.Correlation], out: Path) -> list[str]:
    """A heat map of Spearman's rho and scatter plots of the strongest pairs; file names in `out`."""
    named = [c for c in correlations if c.kind == "spearman" and c.group == "all" and c.r is not None]
    return [_heat(named, out), _scatter(rows, named, out)] if named else []


def _heat(correlations: list[compare.Correlation], out: Path) -> str:
    predictors = sorted({(c.measured_on, c.predictor) for c in correlations})
    targets = sorted({(c.dataset, c.target) for c in correlations})
    grid = np.full((len(targets), len(predictors)), np.nan)
    for c in correlations:
        grid[targets.index((c.dataset, c.target)), predictors.index((c.measured_on, c.predictor))] = c.r
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(figsize=(2.5 + 0.62 * len(predictors), 1.2 + 0.3 * len(targets)))
        image = axes.imshow(grid, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
        axes.set_xticks(range(len(predictors)), [" · ".join(p) for p in predictors], rotation=45, ha="right")
        axes.set_yticks(range(len(targets)), [" · ".join(t) for t in targets])
        for i, j in np.argwhere(np.isfinite(grid)):
            axes.text(j, i, f"{grid[i, j]:.2f}", ha="center", va="center", fontsize=7,
                      color="white" if abs(grid[i, j]) > 0.6 else "#111827")  # fmt: skip
        figure.colorbar(image, shrink=0.8)
        models = [c.n for c in correlations]
        axes.set_title(f"Spearman's rho, n = {min(models)} to {max(models)} models")
        _save(figure, out / "heatmap.png")
    return "heatmap.png"


def _scatter(rows: list[dict], correlations: list[compare.Correlation], out: Path) -> str:
    """The strongest pair of each pre-training set with each dataset."""
    columns = compare.table(rows)
    best: dict[tuple[str, str], compare.Correlation] = {}
    for c in sorted(correlations, key=lambda c: abs(c.r or 0)):
        best[c.measured_on, c.dataset] = c
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1, len(best), figsize=(3.6 * len(best), 3.4), squeeze=False)
        for axes, ((own, dataset), c) in zip(grid[0], sorted(best.items())):
            x, y = columns[own, c.predictor], columns[dataset, c.target]
            ranked = [m for m in x if m in y and c.pretrained_on in (m[3], compare.ANY)]
            for group in sorted({m[2] for m in ranked}):
                models = [m for m in ranked if m[2] == group]
                axes.scatter([100 * x[m] for m in models], [100 * y[m] for m in models], s=22, label=group, alpha=0.8)
            axes.set(xlabel=f"{own}: {c.predictor}, %", ylabel=f"{dataset}: {c.target}, %",
                     title=f"rho {c.r:.2f}, n = {c.n}")  # fmt: skip
            axes.legend(fontsize=7)
        figure.tight_layout()
        _save(figure, out / "scatter.png")
    return "scatter.png"
