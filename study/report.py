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
from manyview.study.claims import BySeed, Claim, Row, Spread, by_seed, estimate, select, values
from manyview.study.sweep import Study
from manyview.training.plots import STYLE

POINT = 1.0  # percentage points within which two accuracies count as the same, as the paper's claims are worded
MARGIN = 0.05  # of accuracy, by which anything trained must beat the untrained network
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
        weak, right = (
            estimate(list(by_seed(strong, "linear", projector_dim=dim, c=float(c)).values())) for c in cs[:2]
        )
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
        every = [row for grid in rows.values() for row in grid]
        linear, knn = (claims.spread(every, value) for value in ("linear", "knn"))
        lines: Lines = [f"## {self.study.name}", "", *self.setup(rows, linear)]
        with plt.rc_context(STYLE):
            if rows.get("projector"):
                lines += projector(rows["projector"], rows.get("untrained", []), linear, self.picture("projector"))
            if rows.get("views"):
                lines += convergence(rows["views"], self.table, linear, knn, self.picture("convergence"))
                lines += data(rows["views"], linear, self.picture("data"))
                lines += equal_steps(rows.get("steps", []), rows["views"], linear)
                lines += longer(rows.get("longer", []), rows["views"], linear)
                lines += costs(rows["views"])
            if rows.get("forms"):
                lines += forms(rows["forms"], linear)
        reading = self.path.with_suffix(".md")  # what a person makes of it
        return [*lines, "### What this says", "", reading.read_text().strip(), ""] if reading.exists() else lines

    def picture(self, what: str) -> Path:
        return self.pictures / f"{self.study.name}-{what}.png"

    def setup(self, rows: dict[str, list[Row]], spread: Spread) -> Lines:
        """Who made the numbers: command, commits, machines, what all runs share; and how they are judged."""
        with self.table.open(newline="") as file:
            stored = list(csv.DictReader(file))
        commits, machines = (", ".join(sorted({row[key] for row in stored})) for key in ("commit", "machine"))
        core = sum(float(row["core_seconds"] or 0) for row in stored) / 3600
        train = {k: v for k, v in self.study.train.items() if not k.endswith("every")}
        shared, probe = (", ".join(f"{k} {v}" for k, v in settings.items()) for settings in (train, self.study.probe))
        untrained = by_seed(rows.get("untrained", []), "linear")
        done, total = (sum(len(grid) for grid in grids.values()) for grids in (rows, self.study.grids))
        return [
            f"`python tools/sweep.py {self.path.as_posix()}`: {done} of {total} runs, {core:.1f}"
            f" core-hours of training; commit {commits}; {machines}. All runs: {shared}. Probe: evaluation's"
            f" linear-sweep (bn), {probe or 'as it is'}. The untrained network:"
            f" {spread.estimate(untrained) if untrained else 'not scored'} % linear.",
            "",
            *([pooling(spread), ""] if spread.dof else []),
        ]


def pooling(spread: Spread) -> str:
    text = (
        f"Between seeds linear spreads by {spread.deviation:.2f} points, over {spread.settings} settings ({spread.dof} degrees of"
        f" freedom). Bartlett's test that it is the same in all of them: p = {spread.p_equal:.2f}, so "
    )
    text += "it is pooled" if spread.pooled else "each setting keeps its own, and differences are Welch's"
    return (
        text
        + f". Over settings a seed's deviations correlate by {spread.correlation:.2f}: pairing by seed would gain nothing."
    )


def section(title: str, *parts: str) -> Lines:
    return [line for part in (title, *parts) for line in (part, "")]


def band(axis: Any, x: list[float], samples: list[BySeed], label: str, marker: str, shaded: bool = False) -> None:
    """Means with each one's own interval: as bars, or for curves of many points as a shade."""
    points = [(a, estimate(list(f.values()))) for a, f in zip(x, samples) if f]
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
    rows = claims.complete(rows)
    dims, cs = values(rows, "projector_dim"), sorted({round(r["c"], 6) for r in rows})
    if len(dims) < 2:
        return section("### 1. and 2. Small projectors", "Too few runs yet to compare two D.")
    c = claims.tuned(rows, lambda r: r["c"])
    beta = claims.tuned(select(rows, projector_dim=dims[-1]), lambda r: r["beta"])
    scaled = {d: by_seed(rows, "linear", projector_dim=d, c=float(c)) for d in dims}
    fixed = {d: by_seed(rows, "linear", projector_dim=d, beta=float(beta)) for d in dims}
    law = claims.slope(rows)

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    band(left, dims, list(scaled.values()), f"beta = {c:g} / D", "o")
    band(left, dims, list(fixed.values()), f"beta = {beta:.3g}, best at D = {dims[-1]}", "s")
    if untrained:
        left.axhline(
            100 * float(np.mean([row["linear"] for row in untrained])), color="grey", ls=":", label="untrained"
        )
    left.set(xscale="log", xlabel="projector dimensions D", ylabel="linear, % (test)", title="1. Accuracy against D")
    ticks(left, dims, [str(d) for d in dims])
    left.legend()
    for marker, d in zip(MARKERS, dims):
        betas = values(select(rows, projector_dim=d), "beta")
        band(
            right, betas, [by_seed(rows, "held_out", projector_dim=d, beta=float(b)) for b in betas], f"D = {d}", marker
        )
    right.set(xscale="log", xlabel="beta", ylabel="linear, % (held-out training)",
              title=f"2. Best beta ~ D^({law.mean:.2f} ± {law.half:.2f})")  # fmt: skip
    right.legend()
    save(figure, picture)

    body = [[d, *(cell(spread, by_seed(rows, "linear", projector_dim=d, c=float(x))) for x in cs)] for d in dims]
    seeds = values(rows, "seed")
    best = [[d, *(marked(rows, d, s, cs) for s in seeds)] for d in dims]
    edges = sum(text.endswith("*") for line in best for text in line[1:])
    within = [
        Claim(f"D = {d} within {POINT:g} point of D = {dims[-1]} at {c:g}/D", spread.difference(scaled[d], scaled[dims[-1]]),
              -POINT, POINT)
        for d in dims[:-1] if d <= 256
    ]  # fmt: skip
    lost = spread.difference(fixed[dims[-1]], fixed[dims[0]])
    at_edge = f"{edges} best betas (*) lie at an edge of the grid: the optimum may be beyond it."
    return [
        *section(
            "### 1. Small projectors suffice",
            f"![accuracy against D, and against beta](paper/{picture.name})",
            f"Linear top-1 on the test split, %, against D (down) and c = beta x D (across); c = {c:g} is best on held-out"
            " training images over all D:",
            table(["D", *(f"c = {x:g}" for x in cs)], body),
        ),
        *within,
        Claim(
            f"With beta fixed at {beta:.3g}, the best of D = {dims[-1]}, D = {dims[0]} loses more than {POINT:g} point",
            lost,
            POINT,
        ),
        "",
        *section("### 2. The best beta falls as 1/D", table(["D", *(f"best beta, seed {s}" for s in seeds)], best)),
        Claim("Slope of log beta* on log D between -1.3 and -0.7, as claimed", law, -1.3, -0.7),
        *([f"- {at_edge}"] if edges else []),
        "",
    ]


def cell(spread: Spread, found: BySeed) -> str:
    return str(spread.estimate(found)) if found else "-"


def marked(rows: list[Row], dim: int, seed: int, cs: list[float]) -> str:
    """The best beta, with a star where it is the first or the last of the grid."""
    beta = claims.best_beta(rows, dim, seed)
    at_edge = any(math.isclose(beta * dim, c, rel_tol=1e-4) for c in (cs[0], cs[-1]))
    return f"{beta:.4g}" + ("*" if at_edge else "")


# --- claims 3, 4, 5


def convergence(rows: list[Row], table_path: Path, linear: Spread, knn: Spread, picture: Path) -> Lines:
    """Accuracy on held-out training images while training, on all of the data, against views, steps and core-seconds."""
    path = table_path.with_suffix(".curves.csv")
    if not path.exists():
        return []
    most = max(values(rows, "fraction"))
    with path.open(newline="") as file:
        points = select([claims.typed(row) for row in csv.DictReader(file)], fraction=most)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True)
    names = {"views_seen": "views seen", "step": "steps", "core_seconds": "core-seconds of training"}
    for axis, (key, label) in zip(axes, names.items()):
        for marker, v in zip(MARKERS, values(points, "views")):
            mine = select(points, views=v)
            steps = values(mine, "step")
            x = [float(np.mean([p[key] for p in select(mine, step=s)])) for s in steps]
            band(axis, x, [by_seed(mine, "linear", step=s) for s in steps], f"V = {v}", marker, shaded=True)
        axis.set(xlabel=label, xscale="log")
        ticks(axis)
    axes[0].set(ylabel="online linear, % (held-out training)", title="3. More views, faster?")
    axes[0].legend()
    save(figure, picture)
    chosen, body = select(rows, fraction=most), []
    for v in values(chosen, "views"):
        first = select(chosen, views=v)[0]
        scores = cell(linear, by_seed(chosen, "linear", views=v)), cell(knn, by_seed(chosen, "knn", views=v))
        spent = float(np.median([r["core_seconds"] for r in select(chosen, views=v)]))
        body.append([f"V = {v}, {first['views_seen']:,} views", *scores, f"{first['steps']:,}", f"{spent:.0f}"])
    return section(
        "### 3. More views converge faster",
        f"![convergence](paper/{picture.name})",
        f"At the end, on {most:.0%} of the images, test split, one clean view:",
        table(["images a step x V", "linear, %", "kNN, %", "steps", "core-seconds"], body),
    )


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (time, error) points that no other is better than in both, in order of time."""
    best: list[tuple[float, float]] = []
    for time, error in sorted(points):
        if not best or error < best[-1][1]:
            best.append((time, error))
    return best


def data(rows: list[Row], spread: Spread, picture: Path) -> Lines:
    """Views against images at an equal budget of views; the halves and quarters of the claim; error against time."""
    fractions, vs = values(rows, "fraction"), values(rows, "views")
    at = {(v, f): by_seed(rows, "linear", views=v, fraction=f) for v in vs for f in fractions}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    means: list[tuple[float, float]] = []
    for color, (marker, v) in enumerate(zip(MARKERS, vs)):
        band(left, fractions, [at[v, f] for f in fractions], f"V = {v}", marker)
        cells = [(f, np.array([(r["core_seconds"], 100 - 100 * r["linear"]) for r in group]))
                 for f in fractions if (group := select(rows, views=v, fraction=f))]  # fmt: skip
        middle, sizes = [tuple(c.mean(0)) for _, c in cells], [12 + 40 * np.sqrt(f / fractions[-1]) for f, _ in cells]
        right.scatter(
            *np.concatenate([c for _, c in cells]).T, s=6, marker=marker, color=f"C{color}", alpha=0.35, linewidths=0
        )
        right.scatter(*zip(*middle), s=sizes, marker=marker, color=f"C{color}", label=f"V = {v}")
        means += middle
    # Of means: a front over single runs would be one over lucky seeds.
    right.step(*zip(*front(means)), where="post", color="0.4", linewidth=1, zorder=0, label="Pareto front")
    left.set(
        xscale="log", xlabel="share of the training images", ylabel="linear, % (test)", title="4. Views against images"
    )
    ticks(left, fractions, [f"{100 * f:g}%" for f in fractions])
    right.set(
        xlabel="core-seconds of training", ylabel="error, %", title="Error against time (means; larger: more images)"
    )
    left.legend()
    right.legend()
    save(figure, picture)

    few, most = fractions[0], fractions[-1]
    body = [[f"{f:.2%}", *(cell(spread, at[v, f]) for v in vs)] for f in fractions]
    gains = [[f"{f:.2%}", *(spread.difference(at[v, f], at[vs[0], f]) or "-" for v in vs[1:])] for f in fractions]
    return [
        *section(
            "### 4. More views replace data",
            f"![views against images](paper/{picture.name})",
            "Linear top-1 on the test split, %, at an equal budget of views (so equal time within the cost of claim 5: both"
            " controls in one), against the share of the images (down) and V (across):",
            table(["images", *(f"V = {v}" for v in vs)], body),
        ),
        *instead(rows, spread),
        f"- What views have to replace: on {few:.2%} of the images instead of {most:.0%}, V = {vs[0]} changes by "
        f"{spread.difference(at[vs[0], few], at[vs[0], most]) or '-'} points. Where that is little, the lines above hold for"
        " want of a loss.",
        "",
        *section(
            f"Where the curves cross: points gained over V = {vs[0]} on the same images, at the same budget of views:",
            table(["images", *(f"V = {v}" for v in vs[1:])], gains),
        ),
    ]


def instead(rows: list[Row], spread: Spread) -> Lines:
    """More views of fewer images, in proportion: at an equal budget of views, so at equal epochs too."""
    first, *others = values(rows, "views")
    lines: Lines = []
    for v, f in ((v, f) for v in others for f in values(rows, "fraction")):
        share = float(f * v / first)
        whole, part = (
            by_seed(rows, "linear", views=first, fraction=share),
            by_seed(rows, "linear", views=v, fraction=float(f)),
        )
        if whole and part:
            text = f"V = {v} on {f:.2%} against V = {first} on {share:.2%}, within {POINT:g} point"
            lines.append(Claim(text, spread.difference(part, whole), -POINT, POINT))
    return lines


def equal_steps(fewer: list[Row], rows: list[Row], spread: Spread) -> Lines:
    """The paper's comparison, all images and as many steps for every V, beside the control of as many views."""
    rows = select(rows, fraction=max(values(rows, "fraction")))
    vs, steps = values(rows, "views"), min(values(rows, "steps"))
    same = [r for r in [*fewer, *rows] if abs(r["steps"] - steps) <= 1]
    if len(values(same, "views")) < 2:
        return []
    both = {v: (by_seed(same, "linear", views=v), by_seed(rows, "linear", views=v)) for v in vs}
    names = (f"as many steps ({steps:,}), so V times the views", "as many views")
    return [
        *section(
            "At equal epochs, the paper's comparison, a larger V sees more views and pays for them. Test split, %, all images:",
            table(
                ["equal", *(f"V = {v}" for v in vs)],
                [[name, *(cell(spread, both[v][i]) for v in vs)] for i, name in enumerate(names)],
            ),
        ),
        *(
            f"- at equal steps V = {v} over V = {vs[0]}: {spread.difference(both[v][0], both[vs[0]][0]) or '-'} points"
            for v in vs[1:]
        ),
        "",
    ]


def longer(rows: list[Row], shorter: list[Row], spread: Spread) -> Lines:
    """What becomes of the difference between numbers of views when training goes on."""
    if not rows:
        return []
    every, vs, fractions = [*shorter, *rows], values(rows, "views"), values(rows, "fraction")
    body, lost = [], []
    for budget in values(every, "budget"):
        at = {(f, v): by_seed(every, "linear", views=v, fraction=f, budget=budget) for f in fractions for v in vs}
        for f in (f for f in fractions if any(at[f, v] for v in vs)):
            gap = spread.difference(at[f, vs[-1]], at[f, vs[0]]) or "-"
            body.append([f"{budget:,} views, {100 * f:g}% of the images", *(cell(spread, at[f, v]) for v in vs), gap])
        for v in vs if len(fractions) > 1 else []:
            if change := spread.difference(at[fractions[0], v], at[fractions[-1], v]):
                lost.append(
                    f"- {budget:,} views, V = {v}, {100 * fractions[0]:g}% of the images instead of all: {change} points"
                )
    head = ["training longer", *(f"V = {v}" for v in vs), f"V = {vs[-1]} over V = {vs[0]}"]
    return [*section("Training longer, test split, %:", table(head, body)), *lost, *instead(rows, spread), ""]


def costs(rows: list[Row]) -> Lines:
    per = {"core-ms a view": ("core_seconds", "views_seen", 1e3), "core-ms a step": ("core_seconds", "steps", 1e3),
           "peak MiB of the process": ("peak_bytes", "", 2**-20)}  # fmt: skip
    body = [
        [f"V = {v}", *(f"{np.median([scale * r[what] / r.get(by, 1) for r in select(rows, views=v)]):.3g}"
                       for what, by, scale in per.values())]
        for v in values(rows, "views")
    ]  # fmt: skip
    return section(
        "### 5. What it costs",
        "Medians over the runs above, whole step (data, backbone, projector, loss, optimizer); the loss and the projector alone"
        " are in [objective.md](objective.md), memory in [trainer.md](trainer.md).",
        table(["", *per], body),
    )


def forms(rows: list[Row], spread: Spread) -> Lines:
    """Barlow's three off-diagonals: which is the default?"""
    vs, names = values(rows, "views"), values(rows, "form")
    at = {(name, v): by_seed(rows, "linear", views=v, form=name) for name in names for v in vs}
    gaps = [
        (name, v, spread.difference(at[name, v], at.get(("pairs", v), {})))
        for name in names
        if name != "pairs"
        for v in vs
    ]
    return [
        *section(
            "### Which off-diagonal",
            "The default form of `barlow`, by accuracy: linear top-1 on the test split, %, at an equal budget of views.",
            table(
                ["form", *(f"V = {v}" for v in vs)],
                [[name, *(cell(spread, at[name, v]) for v in vs)] for name in names],
            ),
        ),
        *(
            f"- `{name}` against `pairs` at V = {v}: {f'{gap} points' if gap else 'not measured'}"
            for name, v, gap in gaps
        ),
        "",
    ]
