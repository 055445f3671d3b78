"""results/paper.md and its pictures from the committed CSVs: what `tools/report.py` does. Computes nothing but statistics."""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import EngFormatter, LogLocator

from manyview.bench.output import table
from manyview.pipeline.errors import UserError
from manyview.study import claims, sweep
from manyview.study.claims import Claim, Row, Sample, Spread, estimate, percent, select, values
from manyview.study.sweep import Study
from manyview.training.plots import STYLE

POINT = 1.0  # percentage points within which two accuracies count as the same, as the paper's claims are worded
MARGIN = 0.05  # of accuracy, by which anything trained must beat the untrained network
LOSS = 5.0  # points that a beta which suits the largest D should cost a small one
LEVEL = 0.5  # points that "at least level" may be below
MARKERS = "osD^v<>"
Lines = list[str | Claim]


def main(studies: list[Path], out: Path, must_hold: bool = False) -> int:
    if missing := [path for path in studies if not path.is_file()]:
        raise UserError(f"no study {missing[0]}")
    wrong: list[str] = []
    lines: Lines = ["# The paper's claims, measured", "", (Path(__file__).parent / "paper.md").read_text().strip(), ""]
    for path in studies:
        rows = out.parent / f"{path.stem}.csv"
        if rows.exists():
            lines += Page(sweep.read(path), path, rows, out.parent / "paper").lines()
            wrong += check(sweep.read(path), rows) if must_hold else []
        else:
            lines += [f"## {path.stem}", "", f"Not run yet: `python tools/sweep.py {path.as_posix()}`.", ""]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(claims.decide(lines)).rstrip() + "\n")
    print(out)
    print("".join(f"does not hold: {line}\n" for line in wrong), end="", file=sys.stderr)
    return 1 if wrong else 0


def check(study: Study, table: Path) -> list[str]:
    """What must be true of any study that learns: a regression test of the science, in sentences that fail."""
    rows = [row for grid in study.grids if grid != "untrained" for row in claims.rows_of(study, table, grid)]
    before = [row["linear"] for row in claims.rows_of(study, table, "untrained")]
    if not rows or not before:
        return ["no trained or no untrained rows"]
    wrong = [
        f"{sweep.name_of({c: row[c] for c in study.columns if c in row})}: {row['linear']:.1%}, untrained {max(before):.1%}"
        for row in rows if row["linear"] < max(before) + MARGIN
    ]  # fmt: skip
    if strong := claims.rows_of(study, table, "projector"):
        dim, cs = min(values(strong, "projector_dim")), values(strong, "c")
        weak, right = (estimate(percent(strong, projector_dim=dim, c=float(c))) for c in cs[:2])
        if right.mean < weak.mean:
            wrong.append(
                f"D = {dim}: {right} with c = {cs[1]:g}, yet {weak} with c = {cs[0]:g}: weak decorrelation should lose"
            )
    return wrong


@dataclass
class Page:
    """One study's part of the page; its pictures are written beside."""

    study: Study
    path: Path  # of the study
    table: Path  # its rows
    pictures: Path  # folder

    def lines(self) -> Lines:
        self.pictures.mkdir(parents=True, exist_ok=True)
        rows = {grid: claims.rows_of(self.study, self.table, grid) for grid in self.study.grids}
        spread = claims.spread([row for grid in rows.values() for row in grid])
        views = [row for grid in ("views", "steps", "scarce", "longer") for row in rows.get(grid, [])]
        lines: Lines = [f"## {self.study.name}", "", *self.setup(rows, spread)]
        with plt.rc_context(STYLE):
            if rows.get("projector"):
                lines += projector(rows["projector"], rows.get("untrained", []), spread, self.picture("projector"))
            if rows.get("views"):
                lines += convergence(views, self.points(), spread, self.picture("convergence"))
                lines += images(views, rows.get("scarce", []), spread, self.picture("data"))
                lines += costs(views)
        if rows.get("forms"):
            lines += forms(rows["forms"], spread)
        reading = self.path.with_suffix(".md")  # what a person makes of it
        return [*lines, "### What this says", "", reading.read_text().strip(), ""] if reading.exists() else lines

    def picture(self, what: str) -> Path:
        return self.pictures / f"{self.study.name}-{what}.png"

    def points(self) -> list[Row]:
        """Of the curves: the online probe on held-out training images while training."""
        path = self.table.with_suffix(".curves.csv")
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return [claims.typed(row) for row in csv.DictReader(file)]

    def setup(self, rows: dict[str, list[Row]], spread: Spread) -> Lines:
        """Who made the numbers: command, commits, machines, what all runs share; what is pending; how they are judged."""
        with self.table.open(newline="") as file:
            stored = list(csv.DictReader(file))
        commits, machines = (", ".join(sorted({row[key] for row in stored})) for key in ("commit", "machine"))
        core = sum(float(row["core_seconds"] or 0) for row in stored) / 3600
        train = {k: v for k, v in self.study.train.items() if not k.endswith("every")}
        shared, probe = (", ".join(f"{k} {v}" for k, v in settings.items()) for settings in (train, self.study.probe))
        untrained = percent(rows.get("untrained", []))
        done, total = len({sweep.run_of(self.study, row) for row in stored}), len(self.study.runs)
        return [
            f"`python tools/sweep.py {self.path.as_posix()}`: {done} of {total} runs, {core:.1f} core-hours of training;"
            f" commit {commits}; {machines}. All runs: {shared}. Probe: evaluation's linear-sweep (bn),"
            f" {probe or 'as it is'}. The untrained network: {cell(spread, untrained)} % linear.",
            "",
            *([self.pending(rows, done, total), ""] if done < total else []),
            *([pooling(spread), ""] if spread.dof else []),
        ]

    def pending(self, rows: dict[str, list[Row]], done: int, total: int) -> str:
        parts = [f"{len(runs) - len(rows[grid])} of {len(runs)} in {grid}"
                 for grid, runs in self.study.grids.items() if len(rows[grid]) < len(runs)]  # fmt: skip
        return f"**Pending: {total - done} runs** ({', '.join(parts)}), by the same command, which does only what is missing."


def pooling(spread: Spread) -> str:
    return (
        f"Between seeds linear spreads by {spread.deviation:.2f} points, over {spread.settings} settings ({spread.dof} degrees of"
        f" freedom). Bartlett's test that it is the same in all of them: p = {spread.p_equal:.2f}, so "
        + ("it is pooled." if spread.pooled else "each setting keeps its own, and differences are Welch's.")
    )


def section(title: str, *parts: str) -> Lines:
    return [line for part in (title, *parts) for line in (part, "")]


def cell(spread: Spread, sample: Sample) -> str:
    return str(spread.estimate(sample)) if sample else "-"


def band(axis: Any, x: list[float], samples: list[Sample], label: str, marker: str, shaded: bool = False) -> None:
    """Means with each one's own interval: as bars, or for curves of many points as a shade."""
    points = [(a, estimate(sample)) for a, sample in zip(x, samples) if sample]
    at, means = [a for a, _ in points], [e.mean for _, e in points]
    if not shaded:
        half = [e.half if np.isfinite(e.half) else 0 for _, e in points]
        axis.errorbar(at, means, half, marker=marker, capsize=3, label=label)
        return
    (line,) = axis.plot(at, means, marker=marker, label=label)
    if all(np.isfinite(e.half) for _, e in points):
        low, high = [e.low for _, e in points], [e.high for _, e in points]
        axis.fill_between(at, low, high, color=line.get_color(), alpha=0.12, lw=0)


def ticks(axis: Any, at: list[float] | None = None, labels: list[str] | None = None) -> None:
    """Of a logarithmic axis: where asked for, or plain numbers at 1, 2 and 5."""
    if at is not None:
        axis.set_xticks(at, labels, minor=False)
    else:
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.minorticks_off()


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


# --- claims 1 and 2


def projector(rows: list[Row], untrained: list[Row], spread: Spread, picture: Path) -> Lines:
    dims, cs = values(rows, "projector_dim"), values(rows, "c")
    if len(dims) < 2:
        return section("### 1. and 2. Small projectors", "Too few runs yet to compare two D.")
    most = dims[-1]
    tuned = {d: claims.tuned(select(rows, projector_dim=d), "c") for d in dims}
    weak = min(values(select(rows, projector_dim=most), "beta"))
    betas = {
        f"beta = {tuned[most] / most:.3g}, best at D = {most}": tuned[most] / most,
        f"beta = {weak:.3g}, weak": weak,
    }
    scaled = {d: percent(rows, projector_dim=d, c=tuned[d]) for d in dims}
    fixed = {name: {d: percent(rows, projector_dim=d, beta=beta) for d in dims} for name, beta in betas.items()}
    small = [d for d in dims[:-1] if d <= 64]
    losses = [(f"At {name}, D = {d}", spread.difference(at[most], at[d])) for name, at in fixed.items() for d in small]
    body = [[d, *(cell(spread, percent(rows, projector_dim=d, c=c)) for c in cs), f"{tuned[d]:g}"] for d in dims]

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for marker, (name, at) in zip(MARKERS, {"beta best for each D": scaled, **fixed}.items()):
        band(left, dims, list(at.values()), name, marker)
    if untrained:
        left.axhline(float(np.mean(percent(untrained))), color="grey", ls=":", label="untrained")
    left.set(xscale="log", xlabel="projector dimensions D", ylabel="linear, % (test)", title="1. Accuracy against D")
    ticks(left, dims, [str(d) for d in dims])
    for marker, d in zip(MARKERS, dims):
        x = values(select(rows, projector_dim=d), "beta")
        band(right, x, [percent(rows, "held_out", projector_dim=d, beta=b) for b in x], f"D = {d}", marker)
    right.set(
        xscale="log", xlabel="beta", ylabel="linear, % (held-out training)", title="2. The best beta falls with D"
    )
    left.legend()
    right.legend()
    save(figure, picture)
    return [
        *section(
            "### 1. Small projectors suffice",
            f"![accuracy against D, and against beta](paper/{picture.name})",
            "Linear top-1 on the test split, %, against D (down) and c = beta x D (across). Tuned is the c that is best on"
            " held-out training images:",
            table(["D", *(f"c = {c:.4g}" for c in cs), "tuned c"], body),
        ),
        *(Claim(f"D = {d}, tuned, within {POINT:g} point of D = {most}, tuned", spread.difference(scaled[d], scaled[most]),
                -POINT, POINT) for d in dims[:-1] if 64 <= d <= 256),
        *(Claim(f"{name} loses at least {LOSS:g} points against D = {most}", loss, LOSS) for name, loss in losses if loss),
        "",
        *law(claims.gridded(rows)),
    ]  # fmt: skip


def law(rows: list[Row]) -> Lines:
    if len(dims := values(rows, "projector_dim")) < 2:
        return []
    seeds = values(rows, "seed")
    body = [[d, *(marked(rows, d, seed) for seed in seeds)] for d in dims]
    at_edge = sum(text.endswith("*") for line in body for text in line[1:])
    return [
        *section("### 2. The best beta falls as 1/D", table(["D", *(f"best beta, seed {s}" for s in seeds)], body)),
        Claim("Slope of log beta* on log D between -1.3 and -0.7, as claimed", claims.slope(rows), -1.3, -0.7),
        *([f"- {at_edge} best betas (*) lie at an edge of the grid: the optimum may be beyond it."] if at_edge else []),
        "",
    ]


def marked(rows: list[Row], dim: int, seed: int) -> str:
    """The best beta, with a star where it is the first or the last of the grid."""
    beta, grid = claims.best_beta(rows, dim, seed), values(select(rows, projector_dim=dim), "beta")
    return f"{beta:.4g}" + ("*" if any(math.isclose(beta, edge, rel_tol=1e-4) for edge in (grid[0], grid[-1])) else "")


# --- claims 3, 4, 5


def batches(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows by what all V have in common: the images of a step (B), or its views (B x V)."""
    v = min(values(rows, "views"))
    b = select(rows, views=v)[0]["batch_size"]
    return {f"{b} images a step": select(rows, batch_size=b),
            f"{b * v} views a step": [row for row in rows if row["batch_size"] * row["views"] == b * v]}  # fmt: skip


def against(spread: Spread, rows: list[Row], v: int, first: int, **settings: Any) -> str:
    """The mean of V views, and what it is ahead of the first V."""
    sample, other = (percent(rows, views=n, **settings) for n in (v, first))
    gap = spread.difference(sample, other) if v != first else None
    return cell(spread, sample) + (f" ({gap.mean:+.2f})" if gap else "")


def convergence(rows: list[Row], points: list[Row], spread: Spread, picture: Path) -> Lines:
    """On all of the images: accuracy while training, at an equal number of views and at equal epochs."""
    whole = select(rows, fraction=max(values(rows, "fraction")))
    first, *others = values(whole, "views")
    lines = section("### 3. More views converge faster")
    if points := select(points, fraction=max(values(points, "fraction"))) if points else []:
        curves(points, whole, picture)
        lines += [f"![convergence](paper/{picture.name})", ""]
    body, equal = [], []
    for batch, alike in batches(whole).items():
        for budget in values(alike, "budget"):
            if len(values(at := select(alike, budget=budget), "views")) > 1:
                body.append([f"{budget:,}", batch, *(against(spread, at, v, first) for v in (first, *others))])
            for v in others:
                more, fewer = (
                    select(alike, views=v, budget=budget * v // first),
                    select(alike, views=first, budget=budget),
                )
                if gap := spread.difference(percent(more), percent(fewer)):
                    text = (
                        f"At equal epochs, {batch}, V = {v} at least level ({LEVEL:g} below at most) with V = {first}"
                    )
                    equal.append(Claim(f"{text}: {budget * v // first:,} views against {budget:,}", gap, -LEVEL))
    return [
        *lines,
        *section(
            f"Linear top-1 on the test split, %, all images, at an equal number of views (in brackets: over V = {first}):",
            table(["views seen", "alike", *(f"V = {v}" for v in (first, *others))], body),
            f"The paper compares equal epochs of {next(iter(batches(whole)))}, where a larger V sees more views:",
        ),
        *equal,
        "",
    ]


def curves(points: list[Row], rows: list[Row], picture: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True)
    for marker, (v, b) in zip(MARKERS, sorted({(p["views"], p["batch_size"]) for p in points})):
        mine = select(points, views=v, batch_size=b)
        steps = values(mine, "step")
        samples = [percent(mine, step=s) for s in steps]
        for axis, scale in zip(axes, (v * b, 1, v * b * cost(select(rows, views=v, batch_size=b)))):
            band(axis, [s * scale for s in steps], samples, f"V = {v}, {b} images", marker, shaded=True)
    for axis, label in zip(axes, ("views seen", "steps", "core-seconds of training")):
        axis.set(xlabel=label, xscale="log")
        ticks(axis)
    axes[0].set(ylabel="online linear, % (held-out training)", title="3. More views, faster?")
    axes[0].legend()
    save(figure, picture)


def cost(rows: list[Row]) -> float:
    """Core-seconds a view, of the fastest run: neighbours on the machine can only slow one."""
    return min(row["core_seconds"] / row["views_seen"] for row in rows)


def images(rows: list[Row], scarce: list[Row], spread: Spread, picture: Path) -> Lines:
    """Views against images at an equal number of views; the halves of the claim where images are worth something."""
    first, *others = values(rows, "views")
    body = [
        [f"{budget:,}", f"{100 * f:g}%", batch, *(against(spread, at, v, first) for v in (first, *others))]
        for batch, alike in batches(rows).items()
        for budget in values(alike, "budget")
        for f in values(alike, "fraction")
        if len(values(at := select(alike, budget=budget, fraction=f), "views")) > 1
        or (at and batch == next(iter(batches(rows))))
    ]
    lines = section("### 4. More views replace data")
    if len(values(rows, "fraction")) > 1:
        pareto(rows, picture)
        lines += [f"![views against images](paper/{picture.name})", ""]
    return [
        *lines,
        *section(
            f"Linear top-1 on the test split, %, at an equal number of views, so about equal time (over V = {first}):",
            table(["views seen", "images", "alike", *(f"V = {v}" for v in (first, *others))], body),
        ),
        *instead(scarce, spread),
        "",
    ]


def instead(rows: list[Row], spread: Spread) -> Lines:
    """More views of fewer images, in proportion: at an equal number of views, so at equal epochs too."""
    lines: Lines = []
    if not rows:
        return lines
    first, *others = values(rows, "views")
    for v, f in ((v, f) for v in others for f in values(rows, "fraction")):
        share = f * v / first
        whole, control, part = (percent(rows, views=n, fraction=s) for n, s in ((first, share), (first, f), (v, f)))
        if whole and part:
            name = f"V = {v} on {100 * f:g}% against V = {first} on {100 * share:g}%"
            lines.append(Claim(f"{name}, within {POINT:g} point", spread.difference(part, whole), -POINT, POINT))
        if whole and control:
            text = f"Images are worth something: V = {first} on {100 * f:g}% loses against {100 * share:g}%"
            lines.append(Claim(text, spread.difference(whole, control), 0))
        if control and part:
            text = f"Views are worth something: V = {v} on {100 * f:g}% gains over V = {first} on {100 * f:g}%"
            lines.append(Claim(text, spread.difference(part, control), 0))
    return lines


def pareto(rows: list[Row], picture: Path) -> None:
    """Accuracy against images, and error against time, of the budget that has most shares of the images."""
    rows = max((select(rows, budget=b) for b in values(rows, "budget")), key=lambda at: len(values(at, "fraction")))
    fractions, means = values(rows, "fraction"), []
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for color, (marker, (v, b)) in enumerate(zip(MARKERS, sorted({(r["views"], r["batch_size"]) for r in rows}))):
        mine = select(rows, views=v, batch_size=b)
        shares = values(mine, "fraction")
        samples = [percent(mine, fraction=f) for f in shares]
        band(left, shares, samples, f"V = {v}, {b} images a step", marker)
        spent = cost(mine) * mine[0]["views_seen"]
        errors = [100 - float(np.mean(sample)) for sample in samples]
        sizes = [12 + 40 * math.sqrt(f / fractions[-1]) for f in shares]
        right.scatter(
            [spent] * len(errors), errors, s=sizes, marker=marker, color=f"C{color}", label=f"V = {v}, {b} images"
        )
        means += [(spent, error) for error in errors]
    # Of means: a front over single runs would be one over lucky seeds.
    right.step(*zip(*front(means)), where="post", color="0.4", linewidth=1, zorder=0, label="Pareto front")
    left.set(
        xscale="log", xlabel="share of the training images", ylabel="linear, % (test)", title="4. Views against images"
    )
    ticks(left, fractions, [f"{100 * f:g}%" for f in fractions])
    right.set(xlabel="core-seconds of training", ylabel="error, %", title="Error against time (larger: more images)")
    left.legend()
    right.legend()
    save(figure, picture)


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (time, error) points that no other is better than in both, in order of time."""
    best: list[tuple[float, float]] = []
    for time, error in sorted(points):
        if not best or error < best[-1][1]:
            best.append((time, error))
    return best


def costs(rows: list[Row]) -> Lines:
    groups = [select(rows, views=v, batch_size=b) for v, b in sorted({(r["views"], r["batch_size"]) for r in rows})]
    body = [
        [f"V = {g[0]['views']}, {g[0]['batch_size']} images a step", f"{1e3 * cost(g):.3g}",
         f"{1e3 * cost(g) * g[0]['views'] * g[0]['batch_size']:.3g}", f"{np.median([r['peak_bytes'] for r in g]) / 2**20:.0f}"]
        for g in groups
    ]  # fmt: skip
    return section(
        "### 5. What it costs",
        "Whole step (data, backbone, projector, loss, optimizer) of the fastest run, since neighbours on the machine can only"
        " slow one; the loss and the projector alone are in [objective.md](objective.md), memory in [trainer.md](trainer.md).",
        table(["", "core-ms a view", "core-ms a step", "peak MiB of the process"], body),
    )


def forms(rows: list[Row], spread: Spread) -> Lines:
    """Barlow's three off-diagonals."""
    vs, names = values(rows, "views"), values(rows, "form")
    body = [[name, *(cell(spread, percent(rows, form=name, views=v)) for v in vs)] for name in names]
    gaps = [
        f"- `{name}` against `pairs` at V = {v}: {gap} points"
        for name in names if name != "pairs" for v in vs
        if (gap := spread.difference(*(percent(rows, form=n, views=v) for n in (name, "pairs"))))
    ]  # fmt: skip
    return [
        *section(
            "### Which off-diagonal",
            "The default of `barlow` is `mean`, chosen by its cost ([objective.md](objective.md)); what accuracy says, at an"
            " equal number of views and c = 3 for all, is that no form is clearly behind. Linear top-1 on the test split, %:",
            table(["form", *(f"V = {v}" for v in vs)], body),
        ),
        *gaps,
        "",
    ]
