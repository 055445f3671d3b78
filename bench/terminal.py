"""The report of `stages` as text."""

from __future__ import annotations

from typing import Any

from manyview.bench import view


def columns(table: view.Table) -> list[str]:
    """A table in columns, the first to the left, the others to the right; nothing where there are no rows."""
    head, rows = table
    if not rows:
        return []
    widths = [max(len(line[i]) for line in (head, *rows)) + 2 for i in range(len(head))]
    return ["".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths)))
            for line in (head, *rows)]  # fmt: skip


def text(report: dict[str, Any]) -> str:
    """Stages, then the whole run, limits, cost model, the recommended command and the verdict."""
    env = report["environment"]
    lines = [view.heading(report), "", *columns(view.stages(report)), "", *view.end_to_end(report), ""]
    if limits := columns(view.limits(report)):
        lines += [*limits, ""]
    if law := view.law(report):
        lines += [law, ""]
    if report.get("sweep"):
        lines.append("recommended: " + view.command(report))
    lines.append(f"environment: {env['device']}, commit {env['commit']}, other processes {report['noise']['others']:.1%} of the"
                 f" cores, measured in {report['took_s']:.0f} s")  # fmt: skip
    return "\n".join([*lines, "", report["verdict"]])
