"""The theory behind the objectives as numbers and as one figure: python tools/theory.py

Four panels, all computed here: gradient flow of a toy model (rank against beta and D), what more views do to the
estimate of the invariance, eigenfunctions of a finite augmentation graph found by minimising `objective.spectral`, and
the measured cost of the loss. The formulas are those of arXiv 2312.10725; tests/test_theory.py checks them.
"""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from manyview.bench import output
from manyview.bench.harness import CPU
from manyview.bench.objective import run, tasks_of
from manyview.model import objective
from manyview.training.monitor import environment

# ------------------------------------------------------------------------------------------------------- gradient flow


def gradient_flow(dim: int, betas: list[float], seeds: int = 2, n: int = 64, time: float = 200.0) -> Tensor:
    """F (len(betas), seeds, n, dim) after a fixed time of gradient flow from small weights.

    The linear model's loss is sum_kl w_kl (I - F^T Lambda F)_kl^2, w = 1 on the diagonal and beta off it, with
    eigenvalues 1/k of the augmentation kernel: Barlow Twins in the kernel's eigenbasis (Simon et al., ICML 2023).
    The flow is dF/dt = -1/4 of the gradient.
    """
    step = 0.2
    eigenvalues = 1 / torch.arange(1, n + 1, dtype=torch.float64)[:, None]
    g = torch.Generator().manual_seed(0)
    start = 1e-2 * torch.randn(seeds, n, dim, generator=g, dtype=torch.float64)
    f = start.expand(len(betas), -1, -1, -1).clone()
    eye = torch.eye(dim, dtype=torch.float64)
    weight = eye + torch.tensor(betas, dtype=torch.float64)[:, None, None, None] * (1 - eye)
    for _ in range(round(time / step)):
        scaled = eigenvalues * f
        f -= step * scaled @ (weight * (f.mT @ scaled - eye))
    return f


def effective_rank(f: Tensor) -> Tensor:
    """exp of the entropy of the squared singular values of f (..., n, d)."""
    power = torch.linalg.svdvals(f).square()
    share = power / power.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp()


# --------------------------------------------------------------------------------------------------- spread of estimates


def invariance_estimates(views: int, repeats: int, images: int = 8, variance: float = 0.9) -> Tensor:
    """`repeats` estimates (repeats,) of a known within-image variance, each from one batch of `images` images."""
    g = torch.Generator().manual_seed(views)
    shared = torch.randn(repeats, 1, images, 1, generator=g, dtype=torch.float64)
    noise = torch.randn(repeats, views, images, 1, generator=g, dtype=torch.float64)
    return torch.stack([objective.spectral(z, beta=0).total for z in shared + math.sqrt(variance) * noise])


# -------------------------------------------------------------------------------------------------- an augmentation graph


@dataclass
class Graph:
    """Images whose augmentations are nodes: row b of `nodes` (B, V) are the nodes that image b can turn into."""

    nodes: Tensor
    n: int

    def transition(self) -> Tensor:
        """p(x | x0), (B, n)."""
        images, views = self.nodes.shape
        p = torch.zeros(images, self.n, dtype=torch.float64)
        return p.scatter_add_(1, self.nodes, torch.full((images, views), 1 / views, dtype=torch.float64))

    def marginal(self) -> Tensor:
        """rho(x), (n,)."""
        return self.transition().mean(0)

    def kernel(self) -> Tensor:
        """K = T* T as the symmetric matrix sqrt(rho) k sqrt(rho), (n, n): the same eigenvalues, in 0..1."""
        p, rho = self.transition(), self.marginal()
        return p.T @ p / len(p) / torch.outer(rho, rho).sqrt()

    def eigenfunctions(self, count: int) -> tuple[Tensor, Tensor]:
        """The top eigenvalues (count,) after the constant's, and their functions (n, count), orthonormal under rho."""
        values, vectors = torch.linalg.eigh(self.kernel())
        order = values.argsort(descending=True)[1 : count + 1]
        return values[order], vectors[:, order] / self.marginal().sqrt()[:, None]


def path_graph(n: int = 48, reach: int = 6) -> Graph:
    """Images on a line, augmented into their neighbors up to `reach` away, reflected at the ends."""
    shifted = torch.arange(n)[:, None] + torch.arange(-reach, reach + 1)
    shifted = torch.where(shifted < 0, -1 - shifted, shifted)
    return Graph(torch.where(shifted >= n, 2 * n - 1 - shifted, shifted), n)


def minimise_spectral(graph: Graph, dim: int, seed: int = 0) -> Tensor:
    """A table of embeddings (n, dim) that minimises `objective.spectral` over all views of all images."""
    g = torch.Generator().manual_seed(seed)
    table = torch.randn(graph.n, dim, generator=g, dtype=torch.float64).requires_grad_()
    solver = torch.optim.LBFGS(
        [table], max_iter=5000, history_size=50, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = objective.spectral(table[graph.nodes.T]).total
        loss.backward()
        return loss

    solver.step(closure)
    return table.detach()


def principal_angles(graph: Graph, f: Tensor, g: Tensor) -> Tensor:
    """Angles (radians) between the spans of two sets of functions (n, d), under rho and after centering."""
    rho = graph.marginal()
    a, b = (torch.linalg.qr((x - rho @ x) * rho.sqrt()[:, None]).Q for x in (f, g))
    return torch.linalg.svdvals(b - a @ (a.T @ b)).clamp(max=1).asin()


def rotated_onto(graph: Graph, f: Tensor, target: Tensor) -> Tensor:
    """An orthonormal basis under rho of f's span, turned to lie as near to `target` (n, d) as it can."""
    root = graph.marginal().sqrt()[:, None]
    q = torch.linalg.qr((f - graph.marginal() @ f) * root).Q
    u, _, v = torch.linalg.svd(q.T @ (target * root))
    return q @ u @ v / root


# ------------------------------------------------------------------------------------------------------------ the figure


@dataclass
class Args:
    out: Path = Path("results")
    """Folder for theory.png, theory.csv and theory.json (environment)."""
    redraw: bool = False
    """Draw theory.csv again, without computing anything."""


BETAS = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
DIMS = [4, 8, 16, 32]
VIEWS = [2, 3, 4, 6, 8, 12, 16]
COST_DIM, COST_BATCH = 512, 512
COSTS = {"ours-mean": "tab:blue", "ours-cross": "tab:orange", "ours-vicreg": "tab:green", "pairwise": "tab:red"}
Point = tuple[str, float, float, float]  # series, x, y, spread (standard deviation)
Series = dict[str, list[tuple[float, float, float]]]


def main(argv: list[str]) -> None:
    args = tyro.cli(Args, args=argv, description=__doc__, prog="theory.py")
    args.out.mkdir(parents=True, exist_ok=True)
    table, about = args.out / "theory.csv", args.out / "theory.json"
    if not args.redraw:
        about.write_text(json.dumps(environment(CPU), indent=1) + "\n")
        rows = [(name, series, *numbers) for name, (compute, _) in PANELS.items() for series, *numbers in compute()]
        output.write_csv(table, [dict(zip(("panel", "series", "x", "y", "spread"), (*row[:2], *(f"{v:.6g}" for v in row[2:]))))
                                 for row in rows])  # fmt: skip
    draw(read(table), json.loads(about.read_text()), args.out / "theory.png")
    print(f"{args.out / 'theory.png'}, {table}")


def read(file: Path) -> dict[str, Series]:
    """Series by panel."""
    panels: dict[str, Series] = {}
    with file.open(newline="") as stream:
        for r in csv.DictReader(stream):
            point = float(r["x"]), float(r["y"]), float(r["spread"])
            panels.setdefault(r["panel"], {}).setdefault(r["series"], []).append(point)
    return panels


def ranks() -> list[Point]:
    flows = [(dim, effective_rank(gradient_flow(dim, BETAS))) for dim in DIMS]
    return [(f"D = {dim}", b, r.mean().item(), r.std().item()) for dim, of in flows for b, r in zip(BETAS, of)]


def spreads() -> list[Point]:
    points: list[Point] = []
    for v in VIEWS:
        estimates = invariance_estimates(v, 2000)
        for name, x in (("1 / (V - 1)", estimates), ("1 / V", estimates * (v - 1) / v)):
            points.append((name, v, x.mean().item(), x.std().item()))
    return points


def eigenfunctions(dim: int = 4) -> list[Point]:
    graph = path_graph()
    values, true = graph.eigenfunctions(dim)
    learned = minimise_spectral(graph, dim)
    angle = principal_angles(graph, learned, true).max().item()
    both = {"true": true, "learned": rotated_onto(graph, learned, true)}
    points: list[Point] = [("largest principal angle", 0, angle, 0)]
    for k in range(dim):
        points.append((f"lambda {k + 1}", 0, values[k].item(), 0))
        points += [(f"{name} {k + 1}", i, f[i, k].item(), 0) for name, f in both.items() for i in range(graph.n)]
    return points


def costs() -> list[Point]:
    torch.set_num_threads(1)
    tasks = [task for task in tasks_of(VIEWS, COST_DIM, COST_BATCH, CPU, []) if task.form in COSTS]
    run(tasks, 5, CPU)
    rows = [task.row() for task in tasks]
    return [(row["form"].removeprefix("ours-"), row["views"], row["core_ms"], 0) for row in rows]


def draw(panels: dict[str, Series], about: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    with plt.rc_context({**style, "axes.titlesize": 11, "axes.titleweight": "bold"}):
        figure, axes = plt.subplots(2, 2, figsize=(11, 8.4), layout="constrained")
        for ax, (name, (_, panel)) in zip(axes.flat, PANELS.items()):
            panel(ax, panels[name])
        layout: Any = figure.get_layout_engine()
        layout.set(w_pad=0.15, h_pad=0.15, rect=(0, 0.03, 1, 0.97))
        caption = f"python {about['command']}, commit {about['commit']}, torch {about['versions']['torch']}, "
        figure.text(0.01, 0.008, f"{caption}{about['device']}, one thread", fontsize=8, color="0.45")
        figure.savefig(file, dpi=130, metadata={"Software": None})
        plt.close(figure)


def title(ax: Any, text: str, detail: str) -> None:
    ax.set_title(text, pad=24)
    ax.annotate(detail, (0, 1), xytext=(0, 9), xycoords="axes fraction", textcoords="offset points", color="0.4")


def label_end(ax: Any, text: str, x: float, y: float, color: Any, up: float = 0) -> None:
    """The name of a line, beside its last point and `up` points above it."""
    ax.annotate(text, (x, y), xytext=(8, up), textcoords="offset points", va="center", color=color)


def draw_rank(ax: Any, series: Series) -> None:
    import matplotlib

    colors = matplotlib.colormaps["viridis"]([0.05, 0.3, 0.55, 0.8])
    for color, (name, points) in zip(colors, reversed(series.items())):
        x, y, spread = zip(*points)
        ax.errorbar(x, y, spread, color=color, marker="o", markersize=4, capsize=2)
        label_end(ax, name, x[-1], y[-1], color)
    ax.set(xscale="log", yscale="log", xlim=(0.0025, 3), xlabel="weight of the off-diagonal, beta")
    ax.set(ylabel="effective rank of the embedding (dimensions)")
    ax.set_yticks([2, 4, 8, 16, 32], [2, 4, 8, 16, 32])
    ax.set_xticks(BETAS, [f"{beta:g}" for beta in BETAS])
    ax.minorticks_off()
    detail = "toy gradient flow, same time for all; mean and s.d. of 2 seeds"
    title(ax, "Stronger decorrelation fills a small projector", detail)


def draw_spread(ax: Any, series: Series) -> None:
    ax.plot([2, 16], [0.9, 0.9], color="0.5", linestyle="--", linewidth=1)
    label_end(ax, "truth", 16, 0.9, "0.4")
    labels = {"1 / (V - 1)": "divided by V - 1: ours", "1 / V": "divided by V: biased"}
    for (name, label), color in zip(labels.items(), ("tab:blue", "tab:red")):
        x, y, spread = (torch.tensor(column) for column in zip(*series[name]))
        ax.fill_between(x, y - spread, y + spread, color=color, alpha=0.15, linewidth=0)
        ax.plot(x, y, color=color, marker="o", markersize=4, label=label)
    ax.set(
        xlabel="views of an image, V", ylabel="within-image variance", xticks=VIEWS, ylim=(0, 1.45), xlim=(1.4, 17.4)
    )
    ax.legend(frameon=False, loc="lower right")
    title(ax, "More views: the same mean, less spread", "estimates from batches of 8 images; mean and one s.d.")


def draw_eigenfunctions(ax: Any, series: Series) -> None:
    count = sum(name.startswith("true") for name in series)
    for k in range(1, count + 1):
        x, y, _ = zip(*series[f"true {k}"])
        ax.plot(x, y, color=f"C{k - 1}", linewidth=1.5)
        x, y, _ = zip(*series[f"learned {k}"])
        ax.plot(x[::2], y[::2], "o", color=f"C{k - 1}", markersize=4, markerfacecolor="white")
        text, at = f"$\\lambda_{k}$ = {series[f'lambda {k}'][0][1]:.2f}", ((k - 0.5) / count, 0.95)
        ax.annotate(text, at, xycoords="axes fraction", color=f"C{k - 1}", ha="center", va="center")
    ax.plot([], [], color="0.4", label="eigenfunctions of the kernel")
    ax.plot([], [], "o", color="0.4", markerfacecolor="white", markersize=4, label="minimum of the loss, rotated")
    ax.set(xlabel="node of the augmentation graph", ylabel="value, unit variance", ylim=(-2.4, 2.1), yticks=[-1, 0, 1])
    ax.legend(frameon=False, loc="lower center", ncols=2, fontsize=9, columnspacing=1, handlelength=1.5)
    angle = series["largest principal angle"][0][1]
    title(ax, "The spectral loss finds the top eigenfunctions", f"largest principal angle {angle:.0e} rad, D = {count}")


def draw_cost(ax: Any, series: Series) -> None:
    colors = {name.removeprefix("ours-"): color for name, color in COSTS.items()}
    last, together = 0.0, 0
    for name in sorted(colors, key=lambda name: series[name][-1][1]):
        x, y, _ = zip(*series[name])
        ax.plot(x, y, color=colors[name], marker="o", markersize=4)
        together = (
            together + 1 if y[-1] < 1.3 * last else 0
        )  # lines that end at one height have their labels moved apart
        label_end(ax, name, x[-1], y[-1], colors[name], up=13 * together)
        last = y[-1]
    ax.set(
        xscale="log", yscale="log", xlim=(1.8, 28), xlabel="views of an image, V", ylabel="forward + backward (core-ms)"
    )
    ax.set_xticks(VIEWS, VIEWS)
    ax.minorticks_off()
    title(ax, "No pairs: what the loss costs", f"measured, D = {COST_DIM}, B = {COST_BATCH}, fp32, one core")


PANELS: dict[str, tuple[Any, Any]] = {
    "rank": (ranks, draw_rank), "spread": (spreads, draw_spread), "eigenfunctions": (eigenfunctions, draw_eigenfunctions),
    "cost": (costs, draw_cost),
}  # fmt: skip
