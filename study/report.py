"""results/paper.md and its pictures from the committed CSVs: what `tools/report.py` does. Computes nothing but statistics."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from manyview.bench.output import table
from manyview.pipeline.errors import UserError
from manyview.study import claims, figures, headline, sweep
from manyview.study.claims import Claim, Lines, Row, Sample, Spread, estimate, percent, section, select, values
from manyview.study.sweep import Settings, Study
from manyview.training.plots import STYLE

POINT = 1.0  # percentage points within which two accuracies count as the same, as the paper's claims are worded
MARGIN = 0.05  # of accuracy, by which anything trained must beat the untrained network
LOSS = 5.0  # points that a beta which suits the largest D should cost a small one
LEVEL = 0.5  # points that "at least level" may be below
LEVELS = f"at least level ({LEVEL:g} below at most) with"


def main(studies: list[Path], out: Path, must_hold: bool = False) -> int:
    if missing := [path for path in studies if not path.is_file()]:
        raise UserError(f"no study {missing[0]}")
    wrong: list[str] = []
    lines: Lines = ["# The paper's claims, measured", "", (Path(__file__).parent / "paper.md").read_text().strip(), ""]
    for path in studies:
        rows = out.parent / f"{path.stem}.csv"
        study = sweep.read(path)
        if rows.exists():
            with plt.rc_context(STYLE):
                lines += page(study, path, rows, out.parent / "paper")
            wrong += check(study, rows) if must_hold else []
        else:
            command = f"python tools/sweep.py {path.as_posix()}"
            lines += section(f"## {path.stem}", f"Not run yet, all {len(study.runs)} runs: `{command}`.")
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
            more, less = (f"{mean} with c = {c:g}" for mean, c in zip((right, weak), (cs[1], cs[0])))
            wrong.append(f"D = {dim}: {more}, yet {less}: weak decorrelation should lose")
    return wrong


def page(study: Study, path: Path, rows_csv: Path, pictures: Path) -> Lines:
    """One study's part of the page; its pictures are written beside."""
    spread = claims.spread(claims.rows_of(study, rows_csv, *study.grids))
    untrained, strong, forms = (claims.rows_of(study, rows_csv, grid) for grid in ("untrained", "projector", "forms"))
    views = claims.rows_of(study, rows_csv, "views", "steps", "scarce")
    scarce = claims.rows_of(study, rows_csv, "scarce")
    pictures.mkdir(parents=True, exist_ok=True)
    picture = {what: pictures / f"{study.name}-{what}.png" for what in ("projector", "convergence", "data", "headline")}
    lines = setup(study, path, sweep.finished(study, rows_csv), percent(untrained), spread)
    lines += tuning(claims.rows_of(study, rows_csv, "tune"))
    if len(values(strong, "projector_dim")) > 1:
        lines += [*projector(strong, percent(untrained), spread, picture["projector"]), *law(claims.gridded(strong))]
    if views:
        online = sweep.read_rows(rows_csv.with_suffix(".curves.csv"))  # probes on held-out training images
        curves = [claims.row_of(study, point) for point in online]
        lines += convergence(views, curves, spread, picture["convergence"])
        lines += [*images(views, scarce, spread, picture["data"]), *costs(views)]
    if soon := claims.rows_of(study, rows_csv, "baseline"):
        lines += headline.section([*views, *soon], spread, picture["headline"])
    if forms:
        lines += off_diagonals(forms, spread)
    reading = path.with_suffix(".md")  # what a person makes of it
    return [*lines, *(section("### What this says", reading.read_text().strip()) if reading.exists() else [])]


def setup(study: Study, path: Path, done: dict[str, Settings], untrained: Sample, spread: Spread) -> Lines:
    """Who made the numbers: command, commits, machines, what all runs share; what is pending; how they are judged."""
    commits, machines = (", ".join(sorted({row[key] for row in done.values()})) for key in ("commit", "machine"))
    train = {k: v for k, v in study.train.items() if not k.endswith("every")}
    shared, probe = (", ".join(f"{k} {v}" for k, v in settings.items()) for settings in (train, study.probe))
    return section(
        f"## {study.name}",
        f"`python tools/sweep.py {path.as_posix()}`: {len(done)} of {len(study.runs)} runs,"
        f" {total(done, 'core_seconds') / 3600:.1f} core-hours of training; commit {commits}; {machines}. All runs: {shared}."
        f" Probe: evaluation's linear-sweep (bn), {probe or 'as it is'}. Untrained: {cell(spread, untrained)} % linear.",
        pending(study, done),
        pooling(spread) if spread.dof else "",
    )


def pending(study: Study, done: dict[str, Settings]) -> str:
    """What is missing, and the core-hours that it needs at the pace of what is there."""
    missing = [run for run in study.runs if sweep.name_of(run) not in done]
    if not missing:
        return ""
    counts = {grid: sum(run in missing for run in runs) for grid, runs in study.grids.items()}
    parts = ", ".join(f"{count} of {len(study.grids[grid])} in {grid}" for grid, count in counts.items() if count)
    pace = total(done, "core_seconds") / max(1, total(done, "views_seen"))
    hours = pace * sum(run["budget"] for run in missing) / 3600
    return f"**Pending**: {parts}; {hours:.1f} core-hours of training. The same command does only what is missing."


def tuning(rows: list[Row]) -> Lines:
    """What c and learning rate were chosen by, for each V."""
    if not rows:
        return []
    at = {(row["views"], row.get("lr", 0.0), row["c"]): f"{100 * row['held_out']:.2f}" for row in rows}
    vs, settings = values(rows, "views"), sorted({(lr, c) for _, lr, c in at})
    head = [f"c = {c:g}" + (f", lr = {lr:g}" if lr else "") for lr, c in settings]
    body = [[f"V = {v}", *(at.get((v, *one), "-") for one in settings)] for v in vs]
    told = "Linear top-1 on held-out training images, %, one seed:"
    return section("### Tuned on held-out images", told, table(["", *head], body))


def total(done: dict[str, Settings], key: str) -> float:
    return sum(float(row[key] or 0) for row in done.values())


def pooling(spread: Spread) -> str:
    return (
        f"Between seeds linear spreads by {spread.deviation:.2f} points, over {spread.settings} settings ({spread.dof} degrees of"
        f" freedom). Bartlett's test that it is the same in all of them: p = {spread.p_equal:.2f}, so "
        + ("it is pooled." if spread.pooled else "each setting keeps its own, and differences are Welch's.")
    )


def cell(spread: Spread, sample: Sample) -> str:
    return str(spread.estimate(sample)) if sample else "-"


# --- claims 1 and 2


def projector(rows: list[Row], untrained: Sample, spread: Spread, picture: Path) -> Lines:
    dims, cs = values(rows, "projector_dim"), values(rows, "c")
    most = dims[-1]
    tuned = {d: claims.tuned(select(rows, projector_dim=d), "c") for d in dims}
    best, weak = tuned[most] / most, min(values(select(rows, projector_dim=most), "beta"))
    betas = {weak: f"beta = {weak:.3g}, weak", best: f"beta = {best:.3g}, best at D = {most}"}  # one, if equal
    scaled = {d: percent(rows, projector_dim=d, c=tuned[d]) for d in dims}
    fixed = {name: {d: percent(rows, projector_dim=d, beta=beta) for d in dims} for beta, name in betas.items()}
    small = [d for d in dims[:-1] if d <= 64]
    losses = [(f"At {name}, D = {d}", spread.difference(at[most], at[d])) for name, at in fixed.items() for d in small]
    body = [[d, *(cell(spread, percent(rows, projector_dim=d, c=c)) for c in cs), f"{tuned[d]:g}"] for d in dims]

    same = f"within {POINT:g} point of D = {most}, tuned"
    level = [Claim(f"D = {d}, tuned, {same}", spread.difference(scaled[d], scaled[most]), -POINT, POINT)
             for d in dims[:-1] if 64 <= d <= 256]  # fmt: skip
    lost = [
        Claim(f"{name} loses at least {LOSS:g} points against D = {most}", gap, LOSS) for name, gap in losses if gap
    ]
    figures.projector(rows, {"beta best for each D": scaled, **fixed}, untrained, spread, picture)
    return section(
        "### 1. Small projectors suffice",
        f"![accuracy against D, and against beta](paper/{picture.name})",
        "Linear top-1 on the test split, %, against D (down) and c = beta x D (across). Tuned is the c that is best on"
        " held-out training images:",
        table(["D", *(f"c = {c:.4g}" for c in cs), "tuned c"], body),
        [*level, *lost],
    )


def law(rows: list[Row]) -> Lines:
    if len(dims := values(rows, "projector_dim")) < 2:
        return []
    seeds = values(rows, "seed")
    body = [[d, *(marked(rows, d, seed) for seed in seeds)] for d in dims]
    at_edge = sum(text.endswith("*") for line in body for text in line[1:])
    claim = "Slope of log beta* on log D between -1.3 and -0.7, as claimed"
    said: Lines = [Claim(claim, claims.slope(rows), -1.3, -0.7)]
    if at_edge:
        said.append(f"- {at_edge} best betas (*) lie at an edge of the grid: the optimum may be beyond it.")
    head = ["D", *(f"best beta, seed {s}" for s in seeds)]
    return section("### 2. The best beta falls as 1/D", table(head, body), said)


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
    rows = select(rows, fraction=max(values(rows, "fraction")))
    vs, first = values(rows, "views"), min(values(rows, "views"))
    figures.convergence(select(points, fraction=rows[0]["fraction"]), rows, picture)
    body: list[list[str]] = []
    at_equal_views: Lines = []
    at_equal_epochs: Lines = []
    for batch, alike in batches(rows).items():
        budgets = values(alike, "budget")
        at = {(v, budget): percent(alike, views=v, budget=budget) for v in vs for budget in budgets}
        for (v, budget), sample in at.items():
            fewer = budget * first // v
            if v != first and (gap := spread.difference(sample, at[first, budget])):
                at_equal_views.append(Claim(f"{batch}, {budget:,} views: V = {v} {LEVELS} V = {first}", gap, -LEVEL))
            if v != first and (gap := spread.difference(sample, at.get((first, fewer), []))):
                text = f"{batch}, {budget:,} views against {fewer:,}: V = {v} {LEVELS} V = {first}"
                at_equal_epochs.append(Claim(text, gap, -LEVEL))
        shared = [budget for budget in budgets if sum(bool(at[v, budget]) for v in vs) > 1]
        body += [[f"{budget:,}", batch, *(cell(spread, at[v, budget]) for v in vs)] for budget in shared]
    paper = next(iter(batches(rows)))
    return section(
        "### 3. More views converge faster",
        f"![convergence](paper/{picture.name})",
        "At an equal number of views, so at about equal time. Linear top-1 on the test split, %, all images:",
        table(["views seen", "alike", *(f"V = {v}" for v in vs)], body),
        at_equal_views,
        f"At equal epochs, where a larger V sees more views and pays for them (of {paper}, the paper's comparison):",
        at_equal_epochs or ["- not measured"],
    )


def images(rows: list[Row], scarce: list[Row], spread: Spread, picture: Path) -> Lines:
    """Views against images at an equal number of views; the halves of the claim where images are worth something."""
    vs, paper = values(rows, "views"), next(iter(batches(rows)))
    body = [
        [f"{budget:,}", f"{100 * f:g}%", batch, *(against(spread, at, v, vs[0]) for v in vs)]
        for batch, alike in batches(rows).items()
        for budget in values(alike, "budget")
        for f in values(alike, "fraction")
        if len(values(at := select(alike, budget=budget, fraction=f), "views")) > 1 or (at and batch == paper)
    ]
    pictured = len(values(rows, "fraction")) > 1
    if pictured:
        figures.images(rows, spread, picture)
    return section(
        "### 4. More views replace data",
        f"![views against images](paper/{picture.name})" if pictured else "",
        f"Linear top-1 on the test split, %, at an equal number of views, so about equal time (over V = {vs[0]}):",
        table(["views seen", "images", "alike", *(f"V = {v}" for v in vs)], body),
        instead(scarce, spread),
    )


def instead(rows: list[Row], spread: Spread) -> Lines:
    """More views of fewer images, in proportion: at an equal number of views, so at equal epochs too."""
    lines: Lines = []
    vs = values(rows, "views")
    for v, f in ((v, f) for v in vs[1:] for f in values(rows, "fraction")):
        first = vs[0]
        share = f * v / first
        whole, control, part = (percent(rows, views=n, fraction=s) for n, s in ((first, share), (first, f), (v, f)))
        few, more, ahead = f"{100 * f:g}%", f"{100 * share:g}%", (0, math.inf)
        halves = (
            (f"V = {v} on {few} against V = {first} on {more}, within {POINT:g} point", part, whole, -POINT, POINT),
            (f"Images are worth something: V = {first} on {few} loses against {more}", whole, control, *ahead),
            (f"Views are worth something: V = {v} on {few} gains over V = {first} on {few}", part, control, *ahead),
        )
        lines += [Claim(text, gap, *margins) for text, a, b, *margins in halves if (gap := spread.difference(a, b))]
    return lines


def costs(rows: list[Row]) -> Lines:
    body = []
    for v, b in sorted({(row["views"], row["batch_size"]) for row in rows}):
        mine = select(rows, views=v, batch_size=b)
        peak, ms = np.median([row["peak_bytes"] for row in mine]) / 2**20, 1e3 * claims.cost(mine)
        body.append([f"V = {v}, {b} images a step", f"{ms:.3g}", f"{ms * v * b:.3g}", f"{peak:.0f}"])
    return section(
        "### 5. What it costs",
        "Whole step (data, backbone, projector, loss, optimizer) of the fastest run, since neighbours on the machine can only"
        " slow one; the loss and the projector alone are in [objective.md](objective.md), memory in [trainer.md](trainer.md).",
        table(["", "core-ms a view", "core-ms a step", "peak MiB of the process"], body),
    )


def off_diagonals(rows: list[Row], spread: Spread) -> Lines:
    """Barlow's three off-diagonals."""
    vs, names = values(rows, "views"), values(rows, "form")
    strength = f"c = {rows[0]['c']:g}" if "c" in rows[0] else "the default beta"
    body = [[name, *(cell(spread, percent(rows, form=name, views=v)) for v in vs)] for name in names]
    gaps = [
        f"- `{name}` against `pairs` at V = {v}: {gap} points"
        for name in names if name != "pairs" for v in vs
        if (gap := spread.difference(*(percent(rows, form=n, views=v) for n in (name, "pairs"))))
    ]  # fmt: skip
    return section(
        "### Which off-diagonal",
        "The default of `barlow` is `mean`, chosen by its cost ([objective.md](objective.md)). What accuracy says, at an equal"
        f" number of views and {strength} for all, linear top-1 on the test split, %:",
        table(["form", *(f"V = {v}" for v in vs)], body),
        gaps,
    )
