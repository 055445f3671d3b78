"""The paper's headline: how much less a run with more views and a smaller projector needs to be as good as the baseline."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from manyview.bench.output import table
from manyview.study import claims, figures
from manyview.study.claims import Claim, Estimate, Lines, Row, Spread, percent, select, values


def crossing(spread: Spread, rows: list[Row], target: Estimate) -> Estimate | None:
    """log(views) at which the mean accuracy of `rows` (of several budgets) first reaches `target`: on the line through the two
    budgets on both sides of it, with the errors of all three. None where it never does, or already at the smallest budget.
    """
    budgets = values(rows, "budget")
    at = [spread.estimate(percent(rows, budget=budget)) for budget in budgets]
    for i in range(1, len(budgets)):
        (below, above), (x0, x1) = at[i - 1 : i + 1], np.log(budgets[i - 1 : i + 1])
        if below.mean < target.mean <= above.mean:
            gain = above.mean - below.mean
            t = (target.mean - below.mean) / gain
            error = math.hypot((1 - t) * below.error, t * above.error, target.error) * (x1 - x0) / gain
            return Estimate(float(x0 + t * (x1 - x0)), error, min(below.dof, above.dof, target.dof))
    return None


def section(rows: list[Row], spread: Spread, picture: Path) -> Lines:
    """The baseline is the smallest V with the largest D, after the most views; all on all of the images.

    A share of its views or core-seconds is a ratio, whose error is taken from that of its logarithm. Core-seconds are those of
    the fastest run (`claims.cost`), so both shares are uncertain by the same factor.
    """
    rows = select(rows, fraction=max(values(rows, "fraction")))
    first, most = values(rows, "views")[0], values(rows, "projector_dim")[-1]
    baseline = select(rows, views=first, projector_dim=most)
    if not baseline:
        return []
    budget = values(baseline, "budget")[-1]
    baseline = select(baseline, budget=budget)
    target, seconds = spread.estimate(percent(baseline)), claims.cost(baseline) * budget
    figures.convergence([], rows, picture)
    body, verdicts = [], []
    for v, b, d in sorted({(row["views"], row["batch_size"], row["projector_dim"]) for row in rows}):
        mine = select(rows, views=v, batch_size=b, projector_dim=d)
        name = f"V = {v}, {b} images a step, D = {d}"
        if (v, d) == (first, most) or len(values(mine, "budget")) < 2:
            continue
        if (at := crossing(spread, mine, target)) is None:
            body.append([name, "not seen to cross it", "", ""])
            continue
        views = math.exp(at.mean)
        share, cost = (100 * x for x in (views / budget, claims.cost(mine) * views / seconds))
        views_share, cost_share = (Estimate(x, x * at.error, at.dof) for x in (share, cost))
        body.append([name, f"{views:,.0f}", f"{views_share} %", f"{cost_share} %"])
        verdicts.append(Claim(f"{name}: as good as the baseline after fewer views, in %", views_share, high=100))
        verdicts.append(Claim(f"{name}: as good as the baseline after fewer core-seconds, in %", cost_share, high=100))
    return claims.section(
        "### The headline: how soon is the baseline reached?",
        f"![accuracy against views, steps and core-seconds](paper/{picture.name})",
        f"The baseline: V = {first}, D = {most}, {budget:,} views, {seconds:.0f} core-seconds, {target} % linear. Views"
        " after which the others are as good, between the budgets that they were trained for, and the shares of the baseline's:",
        table(["", "views", "share of the views", "share of the core-seconds"], body),
        verdicts,
    )
