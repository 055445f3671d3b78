"""results/paper.md and its pictures from the committed CSVs: what `tools/report.py` does. Computes nothing but statistics."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import EngFormatter, LogLocator

from manyview.pipeline.errors import UserError
from manyview.study import claims, sweep
from manyview.study.claims import Estimate, Row, by_seed, difference, estimate, values
from manyview.study.sweep import Study
from manyview.training.plots import STYLE

POINT = 1.0  # percentage points within which two accuracies count as the same, as the paper's claims are worded
MARGIN = 0.05  # of accuracy, by which anything trained must beat the untrained network
MARKERS = "osD^v<>"


def main(studies: list[Path], out: Path, must_hold: bool = False) -> int:
    if missing := [path for path in studies if not path.is_file()]:
        raise UserError(f"no study {missing[0]}")
    wrong: list[str] = []
    text = ["# The paper's claims, measured", "", (Path(__file__).parent / "paper.md").read_text().strip(), ""]
    for path in studies:
        table = out.parent / f"{path.stem}.csv"
        if table.exists():
            text += page(sweep.read(path), path, table, out.parent / "paper")
            wrong += check(sweep.read(path), table) if must_hold else []
        else:
            text += [f"## {path.stem}", "", f"Not run yet: `python tools/sweep.py {path.as_posix()}`.", ""]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(text).rstrip() + "\n")
    print(out)
    print("".join(f"does not hold: {line}\n" for line in wrong), end="", file=sys.stderr)
    return 1 if wrong else 0


def page(study: Study, path: Path, table: Path, pictures: Path) -> list[str]:
    """One study's part of the page; its pictures are written beside."""
    pictures.mkdir(parents=True, exist_ok=True)
    rows = {grid: claims.rows_of(study, table, grid) for grid in study.grids}
    done = sum(len(r) for r in rows.values())
    total = sum(len(g) for g in study.grids.values())
    text = [f"## {study.name}", "", *setup(study, path, table, done, total)]
    with plt.rc_context(STYLE):
        if rows.get("projector"):
            text += projector(rows["projector"], baseline(rows), pictures / f"{study.name}-projector.png")
        if rows.get("views"):
            text += convergence(study, rows["views"], table, pictures / f"{study.name}-convergence.png")
            text += data(rows["views"], pictures / f"{study.name}-data.png")
            text += equal_steps(rows.get("steps", []), rows["views"])
            text += longer(rows.get("longer", []), rows["views"])
            text += costs(rows["views"])
        if rows.get("forms"):
            text += forms(rows["forms"])
    reading = path.with_suffix(".md")  # what a person makes of it
    return [*text, "### What this says", "", reading.read_text().strip(), ""] if reading.exists() else text


def check(study: Study, table: Path) -> list[str]:
    """What must be true of any study that learns: a regression test of the science, in sentences that fail."""
    rows = [row for grid in study.grids if grid != "untrained" for row in claims.rows_of(study, table, grid)]
    before = [row["linear"] for row in claims.rows_of(study, table, "untrained")]
    wrong = [] if rows and before else ["no trained or no untrained rows"]
    wrong += [
        f"{sweep.name_of({c: row[c] for c in study.columns if c in row})}: {row['linear']:.1%}, untrained {max(before):.1%}"
        for row in rows
        if before and row["linear"] < max(before) + MARGIN
    ]
    strong = claims.rows_of(study, table, "projector")
    if strong:
        dim, cs = min(values(strong, "projector_dim")), values(strong, "c")
        weak, right = (
            estimate(list(by_seed(strong, "linear", projector_dim=dim, c=float(c)).values())) for c in cs[:2]
        )
        if right.mean < weak.mean:
            wrong.append(
                f"D = {dim}: {right} with c = {cs[1]:g}, yet {weak} with c = {cs[0]:g}: weak decorrelation should lose"
            )
    return wrong


def setup(study: Study, path: Path, table: Path, done: int, total: int) -> list[str]:
    """Who made the numbers: command, commits, machines, what all runs share."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    commits, machines = (sorted({row[key] for row in rows}) for key in ("commit", "machine"))
    core = sum(float(row["core_seconds"] or 0) for row in rows) / 3600
    shared = ", ".join(f"{k} {v}" for k, v in study.train.items() if not k.endswith("every"))
    before = baseline({"untrained": claims.rows_of(study, table, "untrained")})
    return [
        f"`python tools/sweep.py {path.as_posix()}`: {done} of {total} runs, {core:.1f} core-hours of training; commit "
        f"{', '.join(commits)}; {', '.join(machines)}. All runs: {shared}. The untrained network: "
        f"{estimate(before) if before else 'not scored'} % linear.",
        "",
    ]


def baseline(rows: dict[str, list[Row]]) -> list[float]:
    """Linear accuracy in percent of the untrained networks of the study."""
    return [100 * row["linear"] for row in rows.get("untrained", [])]


def markdown(head: Iterable[Any], body: Iterable[Iterable[Any]]) -> list[str]:
    head = [str(h) for h in head]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" + "--:|" * (len(head) - 1)]
    return [*lines, *("| " + " | ".join(str(c) for c in row) + " |" for row in body), ""]


def cell(found: dict[int, float]) -> str:
    return str(estimate(list(found.values()))) if found else "-"


def verdict(found: Estimate | None, at_least: float) -> str:
    """Is the difference at least this? By its interval."""
    if found is None:
        return "not measured"
    word = "holds" if found.low >= at_least else "does not hold" if found.high < at_least else "undecided"
    return f"{word} ({found})"


def within(found: Estimate, low: float, high: float) -> str:
    if low <= found.low and found.high <= high:
        return "the interval is inside"
    return "the mean is inside, the interval reaches out" if low <= found.mean <= high else "the mean is outside"


def bars(axis: Any, x: list[float], found: list[dict[int, float]], label: str, marker: str) -> None:
    points = [(a, estimate(list(f.values()))) for a, f in zip(x, found) if f]
    half = [e.half if np.isfinite(e.half) else 0 for _, e in points]
    axis.errorbar([a for a, _ in points], [e.mean for _, e in points], half, marker=marker, capsize=3, label=label)


def band(axis: Any, x: list[float], found: list[dict[int, float]], label: str, marker: str) -> None:
    """As `bars`, for curves of many points: the interval is shaded."""
    middle = [estimate(list(f.values())) for f in found]
    (line,) = axis.plot(x, [e.mean for e in middle], marker=marker, label=label)
    if all(np.isfinite(e.half) for e in middle):
        axis.fill_between(
            x, [e.low for e in middle], [e.high for e in middle], color=line.get_color(), alpha=0.12, lw=0
        )


def ticks(axis: Any) -> None:
    """Plain numbers at 1, 2 and 5 on a logarithmic axis."""
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.minorticks_off()


# --- claims 1 and 2


def projector(rows: list[Row], untrained: list[float], picture: Path) -> list[str]:
    rows = claims.complete(rows)
    if len(values(rows, "projector_dim")) < 2:
        return ["### 1. and 2. Small projectors", "", "Too few runs yet to compare two D.", ""]
    dims, cs = values(rows, "projector_dim"), sorted({round(r["c"], 6) for r in rows})
    c = claims.tuned(rows, lambda r: r["c"])
    largest = [r for r in rows if r["projector_dim"] == dims[-1]]
    beta = claims.tuned(largest, lambda r: r["beta"])
    scaled = {d: by_seed(rows, "linear", projector_dim=d, c=float(c)) for d in dims}
    fixed = {d: by_seed(rows, "linear", projector_dim=d, beta=float(beta)) for d in dims}
    law = claims.slope(rows)

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    bars(left, dims, list(scaled.values()), f"beta = {c:g} / D", "o")
    bars(left, dims, list(fixed.values()), f"beta = {beta:.3g}, best at D = {dims[-1]}", "s")
    if untrained:
        left.axhline(float(np.mean(untrained)), color="grey", ls=":", label="untrained")
    left.set(xscale="log", xlabel="projector dimensions D", ylabel="linear, % (test)", title="1. Accuracy against D")
    left.set_xticks(dims, [str(d) for d in dims], minor=False)
    left.minorticks_off()
    left.legend()
    for marker, d in zip(MARKERS, dims):
        betas = sorted({r["beta"] for r in rows if r["projector_dim"] == d})
        found = [by_seed(rows, "held_out", projector_dim=d, beta=float(b)) for b in betas]
        bars(right, betas, found, f"D = {d}", marker)
    right.set(
        xscale="log",
        xlabel="beta",
        ylabel="linear, % (held-out training)",
        title=f"2. Best beta ~ D^({law.mean:.2f} ± {law.half:.2f})",
    )
    right.legend()
    save(figure, picture)

    table = [[d, *(cell(by_seed(rows, "linear", projector_dim=d, c=float(x))) for x in cs)] for d in dims]
    small = [(d, difference(scaled[d], scaled[dims[-1]])) for d in dims if d <= 256 and d != dims[-1]]
    lost = difference(fixed[dims[-1]], fixed[dims[0]])
    best = [[d, *(marked(rows, d, s, cs) for s in values(rows, "seed"))] for d in dims]
    edges = sum(text.endswith("*") for line in best for text in line[1:])
    return [
        "### 1. Small projectors suffice",
        "",
        f"![accuracy against D, and against beta](paper/{picture.name})",
        "",
        f"Linear top-1 on the test split, %, against D (down) and c = beta x D (across); c = {c:g} is best on held-out training"
        " images over all D:",
        "",
        *markdown(["D", *(f"c = {x:g}" for x in cs)], table),
        *(f"- D = {d} within {POINT:g} point of D = {dims[-1]} at {c:g}/D: {verdict(gap, -POINT)}" for d, gap in small),
        f"- With beta fixed at {beta:.3g}, the best of D = {dims[-1]}, D = {dims[0]} loses: {verdict(lost, POINT)}",
        "",
        "### 2. The best beta falls as 1/D",
        "",
        *markdown(["D", *(f"best beta, seed {s}" for s in values(rows, "seed"))], best),
        f"Slope of log beta* on log D: {law}. Claimed: within [-1.3, -0.7]; {within(law, -1.3, -0.7)}."
        + (f" {edges} best betas (*) lie at an edge of the grid: the optimum may be beyond it." if edges else ""),
        "",
    ]  # fmt: skip


def marked(rows: list[Row], dim: int, seed: int, cs: list[float]) -> str:
    """The best beta, with a star where it is the first or the last of the grid."""
    beta = claims.best_beta(rows, dim, seed)
    at_edge = any(math.isclose(beta * dim, c, rel_tol=1e-4) for c in (cs[0], cs[-1]))
    return f"{beta:.4g}" + ("*" if at_edge else "")


# --- claims 3, 4, 5


def convergence(study: Study, rows: list[Row], table: Path, picture: Path) -> list[str]:
    """Accuracy on held-out training images while training, on all of the data, against views, steps and core-seconds."""
    path = table.with_suffix(".curves.csv")
    if not path.exists():
        return []
    with path.open(newline="") as file:
        points = [claims.typed(row) for row in csv.DictReader(file)]
    most = max(r["fraction"] for r in rows)
    points = [p for p in points if p["fraction"] == most]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True)
    names = (("views_seen", "views seen"), ("step", "steps"), ("core_seconds", "core-seconds of training"))
    for axis, (key, label) in zip(axes, names):
        for marker, v in zip(MARKERS, values(points, "views")):
            mine = [p for p in points if p["views"] == v]
            steps = values(mine, "step")
            x = [float(np.mean([p[key] for p in mine if p["step"] == s])) for s in steps]
            band(axis, x, [by_seed(mine, "linear", step=s) for s in steps], f"V = {v}", marker)
        axis.set(xlabel=label, xscale="log")
        ticks(axis)
    axes[0].set(ylabel="online linear, % (held-out training)", title="3. More views, faster?")
    axes[0].legend()
    save(figure, picture)
    text = ["### 3. More views converge faster", "", f"![convergence](paper/{picture.name})", ""]
    head = ["images a step x V", "linear, %", "kNN, %", "steps", "core-seconds"]
    chosen = [r for r in rows if r["fraction"] == most]
    body = [
        [f"V = {v}, {r['views_seen']:,} views", cell(by_seed(chosen, "linear", views=v)), cell(by_seed(chosen, "knn", views=v)),
         f"{r['steps']:,}", f"{claims.cost(chosen, views=v)['core_seconds']:.0f}"]
        for v in values(chosen, "views") for r in [next(r for r in chosen if r["views"] == v)]
    ]  # fmt: skip
    return [*text, f"At the end, on {most:.0%} of the images, test split, one clean view:", "", *markdown(head, body)]


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (time, error) points that no other is better than in both, in order of time."""
    found: list[tuple[float, float]] = []
    for time, error in sorted(points):
        if not found or error < found[-1][1]:
            found.append((time, error))
    return found


def data(rows: list[Row], picture: Path) -> list[str]:
    """Views against images at an equal budget of views; the halves and quarters of the claim; error against time."""
    fractions, vs = values(rows, "fraction"), values(rows, "views")

    def at(v: int, fraction: float) -> dict[int, float]:
        return by_seed(rows, "linear", views=v, fraction=fraction)

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    points: list[tuple[float, float]] = []
    for marker, v in zip(MARKERS, vs):
        bars(left, fractions, [at(v, f) for f in fractions], f"V = {v}", marker)
        cells = [[r for r in rows if r["views"] == v and r["fraction"] == f] for f in fractions]
        means = [(float(np.mean([r["core_seconds"] for r in c])), 100 - 100 * float(np.mean([r["linear"] for r in c])))
                 for c in cells if c]  # fmt: skip
        sizes = [12 + 40 * np.sqrt(c[0]["fraction"] / fractions[-1]) for c in cells if c]
        seeds = [(r["core_seconds"], 100 - 100 * r["linear"]) for c in cells for r in c]
        right.scatter(*zip(*seeds), s=6, marker=marker, color=f"C{vs.index(v)}", alpha=0.35, linewidths=0)
        right.scatter(*zip(*means), s=sizes, marker=marker, color=f"C{vs.index(v)}", label=f"V = {v}")
        points += means
    best = front(points)  # of means: a front over single runs would be one over lucky seeds
    right.step(*zip(*best), where="post", color="0.4", linewidth=1, zorder=0, label="Pareto front")
    left.set(
        xscale="log", xlabel="share of the training images", ylabel="linear, % (test)", title="4. Views against images"
    )
    left.set_xticks(fractions, [f"{100 * f:g}%" for f in fractions])
    left.minorticks_off()
    left.legend()
    right.set(
        xlabel="core-seconds of training", ylabel="error, %", title="Error against time (means; larger: more images)"
    )
    right.legend()
    save(figure, picture)

    few, most = fractions[0], fractions[-1]
    text = [
        "### 4. More views replace data",
        "",
        f"![views against images](paper/{picture.name})",
        "",
        "Linear top-1 on the test split, %, at an equal budget of views (so equal time within the cost of claim 5: both controls "
        "in one), against the share of the images (down) and V (across):",
        "",
        *markdown(
            ["images", *(f"V = {v}" for v in vs)], [[f"{f:.2%}", *(cell(at(v, f)) for v in vs)] for f in fractions]
        ),
    ]
    text += instead(rows)
    gains = [[f"{f:.2%}", *(difference(at(v, f), at(vs[0], f)) or "-" for v in vs[1:])] for f in fractions]
    return [
        *text,
        f"- What views have to replace: on {few:.2%} of the images instead of {most:.0%}, V = {vs[0]} changes by "
        f"{difference(at(vs[0], few), at(vs[0], most)) or '-'} points. Where that is little, the lines above hold for want of "
        "a loss.",
        "",
        f"Where the curves cross: points gained over V = {vs[0]} on the same images, at the same budget of views:",
        "",
        *markdown(["images", *(f"V = {v}" for v in vs[1:])], gains),
    ]


def instead(rows: list[Row]) -> list[str]:
    """More views of fewer images, in proportion: at an equal budget of views, so at equal epochs too."""
    vs, fractions, text = values(rows, "views"), values(rows, "fraction"), []
    for v in vs[1:]:
        for f in fractions:
            whole = by_seed(rows, "linear", views=vs[0], fraction=float(f * v / vs[0]))
            part = by_seed(rows, "linear", views=v, fraction=float(f))
            if whole and part:
                text.append(
                    f"- V = {v} on {f:.2%} against V = {vs[0]} on {f * v / vs[0]:.2%}, within {POINT:g} point: "
                    + verdict(difference(part, whole), -POINT)
                )
    return text


def equal_steps(fewer: list[Row], rows: list[Row]) -> list[str]:
    """The paper's comparison, all images and as many steps for every V, beside the control of as many views."""
    most = max(r["fraction"] for r in rows)
    rows = [r for r in rows if r["fraction"] == most]
    vs = values(rows, "views")
    steps = min(r["steps"] for r in rows)
    same = [r for r in [*fewer, *rows] if abs(r["steps"] - steps) <= 1]
    if len(values(same, "views")) < 2:
        return []
    body = [
        [f"as many steps ({steps:,}), so V times the views", *(cell(by_seed(same, "linear", views=v)) for v in vs)],
        ["as many views", *(cell(by_seed(rows, "linear", views=v)) for v in vs)],
    ]
    text = "At equal epochs, the paper's comparison, a larger V sees more views and pays for them. Test split, %, all images:"
    first = by_seed(same, "linear", views=vs[0])
    gains = [f"- at equal steps V = {v} over V = {vs[0]}: {difference(by_seed(same, 'linear', views=v), first) or '-'} points"
             for v in vs[1:]]  # fmt: skip
    return [text, "", *markdown(["equal", *(f"V = {v}" for v in vs)], body), *gains, ""]


def longer(rows: list[Row], shorter: list[Row]) -> list[str]:
    """What becomes of the difference between numbers of views when training goes on."""
    if not rows:
        return []
    every, vs, fractions = [*shorter, *rows], values(rows, "views"), values(rows, "fraction")
    body, lines = [], []
    for budget in values(every, "budget"):
        found = {(f, v): by_seed(every, "linear", views=v, fraction=f, budget=budget) for f in fractions for v in vs}
        for f in (f for f in fractions if any(found[f, v] for v in vs)):
            gap = difference(found[f, vs[-1]], found[f, vs[0]]) or "-"
            body.append([f"{budget:,} views, {100 * f:g}% of the images", *(cell(found[f, v]) for v in vs), gap])
        for v in vs:
            lost = difference(found[fractions[0], v], found[fractions[-1], v])
            if lost:
                lines.append(
                    f"- {budget:,} views, V = {v}, {100 * fractions[0]:g}% of the images instead of all: {lost} points"
                )
    head = ["training longer", *(f"V = {v}" for v in vs), f"V = {vs[-1]} over V = {vs[0]}"]
    lines = [*(lines if len(fractions) > 1 else []), *instead(rows)]
    return ["Training longer, test split, %:", "", *markdown(head, body), *lines, ""]


def costs(rows: list[Row]) -> list[str]:
    vs = values(rows, "views")
    found = {v: claims.cost(rows, views=v) for v in vs}
    body = [[f"V = {v}", *(f"{found[v][k]:.3g}" for k in ("core_ms_a_view", "core_ms_a_step")), f"{found[v]['peak_mib']:.0f}"]
            for v in vs]  # fmt: skip
    return [
        "### 5. What it costs",
        "",
        "Medians over the runs above, whole step (data, backbone, projector, loss, optimizer); the loss and the projector alone "
        "are in [objective.md](objective.md), memory in [trainer.md](trainer.md).",
        "",
        *markdown(["", "core-ms a view", "core-ms a step", "peak MiB of the process"], body),
    ]


def forms(rows: list[Row]) -> list[str]:
    """Barlow's three off-diagonals: which is the default?"""
    vs, names = values(rows, "views"), values(rows, "form")
    table = [[name, *(cell(by_seed(rows, "linear", views=v, form=name)) for v in vs)] for name in names]
    text = [
        "### Which off-diagonal",
        "",
        "The default form of `barlow`, by accuracy: linear top-1 on the test split, %, at an equal budget of views.",
        "",
        *markdown(["form", *(f"V = {v}" for v in vs)], table),
    ]
    for name in names:
        if name != "pairs":
            for v in vs:
                found = difference(
                    by_seed(rows, "linear", views=v, form=name), by_seed(rows, "linear", views=v, form="pairs")
                )
                text.append(f"- `{name}` against `pairs` at V = {v}: {found if found else 'not measured'} points")
    return [*text, ""]


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
