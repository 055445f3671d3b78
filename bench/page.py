"""The report as one HTML file that needs nothing else: no script, no font, no picture from anywhere."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from manyview.bench import terminal
from manyview.bench.expected import RESOURCES
from manyview.bench.terminal import number, quantity
from manyview.bench.waterfall import bars

STYLE = """
:root {
  --ink:#1f2933; --muted:#66727f; --line:#e4e7eb; --paper:#ffffff; --tile:#f5f7fa; --data:#2f6db5;
  --train:#d9822b; --total:#9aa5b1; --seen:#3e4c59; --good:#1b7f4b; --goodbg:#e3f6ec; --bad:#9a5b00;
  --badbg:#fff3dc;
}
@media (prefers-color-scheme: dark) { :root {
  --ink:#e4e7eb; --muted:#9aa5b1; --line:#323f4b; --paper:#171d23; --tile:#1f2831; --data:#5b9be0;
  --train:#eba25a; --total:#616e7c; --seen:#cbd2d9; --good:#7ddcab; --goodbg:#143527; --bad:#ffd38a;
  --badbg:#3d2d0c;
} }
* { box-sizing:border-box }
body {
  margin:0; background:var(--paper); color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
}
main { max-width:1040px; margin:0 auto; padding:40px 28px 64px }
h1 { font-size:28px; line-height:1.2; margin:0 0 6px; letter-spacing:-.01em }
h2 { font-size:17px; margin:44px 0 4px }
p.note { color:var(--muted); margin:0 0 14px; font-size:13.5px; max-width:76ch }
p.verdict {
  font-size:18px; line-height:1.5; margin:18px 0 0; max-width:78ch; border-left:4px solid var(--data);
  padding-left:16px;
}
.badge {
  display:inline-block; font-size:12.5px; font-weight:600; border-radius:99px; padding:3px 11px; margin-top:12px;
}
.good { color:var(--good); background:var(--goodbg) }
.bad { color:var(--bad); background:var(--badbg) }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(150px,1fr)); gap:12px; margin-top:24px }
.tile { background:var(--tile); border-radius:10px; padding:13px 15px }
.tile b { display:block; font-size:24px; line-height:1.2; letter-spacing:-.01em }
.tile span { color:var(--muted); font-size:12.5px; display:block }
.tile i { font-style:normal; font-size:12.5px; color:var(--muted) }
.row { display:grid; grid-template-columns:110px 1fr; align-items:center; font-size:13.5px; height:27px }
.row.wide { grid-template-columns:220px 1fr }
.track {
  position:relative; height:19px; background:linear-gradient(var(--line),var(--line)) 0 100%/100% 1px no-repeat;
}
.bar { position:absolute; top:0; height:18px; border-radius:2px }
.tag { position:absolute; top:-1px; white-space:nowrap; padding-left:7px; font-variant-numeric:tabular-nums }
.tag em { font-style:normal; color:var(--muted) }
.key { font-size:12.5px; color:var(--muted); margin-top:8px }
.key s { display:inline-block; width:10px; height:10px; border-radius:2px; margin:0 5px 0 14px }
.key s:first-child { margin-left:0 }
.scroll { overflow-x:auto }
table { border-collapse:collapse; font-size:13px; width:100%; font-variant-numeric:tabular-nums }
th,td { text-align:right; padding:5px 9px; border-bottom:1px solid var(--line); white-space:nowrap }
th { color:var(--muted); font-weight:500 }
th:first-child,td:first-child,td.l,th.l { text-align:left }
tr.top td { font-weight:650 }
.plots { display:grid; grid-template-columns:repeat(auto-fit,minmax(230px,1fr)); gap:16px }
svg text { fill:var(--muted); font-size:11px }
svg .ax { stroke:var(--line) }
svg .ln { stroke:var(--data); fill:none; stroke-width:2 }
svg circle { fill:var(--data) }
svg .pick { fill:var(--train) }
pre {
  background:var(--tile); border-radius:10px; padding:13px 15px; white-space:pre-wrap; overflow-wrap:anywhere;
  font-size:13px; margin:8px 0 0;
}
details { margin-top:40px; color:var(--muted); font-size:13px }
@media print { main { padding:0 } }
"""


def html(report: dict[str, Any]) -> str:
    """A whole page."""
    sections = (
        header, tiles, section_waterfall, section_what_if, section_queues, section_limits, section_sweep, section_table,
        section_baseline, footer,
    )  # fmt: skip
    parts = [section(report) for section in sections]
    title = f"Throughput of {report['data']['name']}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def header(report: dict[str, Any]) -> str:
    noise = report["noise"]
    said = report["verdict"].split("): ", 1)[1] if not noise["certified"] else report["verdict"]
    badge = (
        f'<span class="badge good">certified: other processes {noise["others"]:.1%}, repeats agree to'
        f" {report['composed']['core_ms_spread']:.1%}</span>"
        if noise["certified"]
        else f'<span class="badge bad">not certified: {escape("; ".join(noise["reasons"]))}</span>'
    )
    stage, name = report["bottleneck"]["stage"], report["data"]["name"]
    return (
        f'<h1>{escape(stage.capitalize())} holds {escape(name)} back</h1><p class="note">{escape(terminal.heading(report))}</p>'
        f'{badge}<p class="verdict">{code(said[0].upper() + said[1:])}</p>'
    )


def code(text: str) -> str:
    """Text with `words` in backquotes as code."""
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))


def tiles(report: dict[str, Any]) -> str:
    c, n_views = report["composed"], report["shape"]["views"]
    found = [
        ("observed", f"{number(c['images_per_s'])}", f"images/s, {number(c['images_per_s'] * n_views)} views/s"),
        (
            "of expected",
            f"{c['efficiency']:.0%}",
            f"{number(c['expected_images_per_s'])} images/s from the stages",
        ),
        ("cost", f"{number(c['core_ms'])}", f"core-ms an image, {number(c['core_ms'] / n_views)} a view"),
        ("waiting for data", f"{c['data_wait']:.0%}", f"{c['ready']:.0%} of batches were ready"),
    ]
    if c["device_idle"] is not None:
        found.append(("GPU idle", f"{c['device_idle']:.0%}", "of the time, between steps"))
    elif c["engine_busy"] is not None:
        found.append(("engine busy", f"{c['engine_busy']:.0%}", f"{report['data']['threads']} threads"))
    found.append(("peak memory", f"{report['peak_bytes'] / 2**30:.2f}", "GiB"))
    return '<div class="tiles">' + "".join(
        f'<div class="tile"><span>{a}</span><b>{b}</b><i>{escape(d)}</i></div>' for a, b, d in found
    ) + "</div>"  # fmt: skip


def bar(name: str, left: float, width: float, color: str, tag: str, more: str = "", wide: bool = False) -> str:
    """One row: a bar from `left` of `width` (shares of the track), a tag behind it."""
    return (
        f'<div class="row{" wide" if wide else ""}"><div>{escape(name)}</div><div class="track"><div class="bar" style="left:'
        f'{100 * left:.3f}%;width:{max(0.15, 100 * width):.3f}%;background:var(--{color})"></div><div class="tag" style="left:'
        f'{100 * (left + width):.3f}%">{escape(tag)} <em>{escape(more)}</em></div></div></div>'
    )


def section_waterfall(report: dict[str, Any]) -> str:
    rows, c = bars(report), report["composed"]
    expected, observed = 1e3 / c["expected_images_per_s"], 1e3 / c["images_per_s"]
    span = 1.26 * max(expected, observed)
    resource = RESOURCES[report["bottleneck"]["resource"]]
    lines = [
        bar(r["name"], r["from"] / span, r["ms"] / span, {True: "train", False: "data", None: "total"}[r["training"]],
            f"{number(r['ms'])} ms", f"{r['share']:.0%}")
        for r in rows
    ]  # fmt: skip
    lines.append(
        bar("expected", 0, expected / span, "total", f"{number(expected)} ms", f"{number(1e3 / expected)} images/s")
    )
    lines.append(
        bar("observed", 0, observed / span, "seen", f"{number(observed)} ms", f"{number(1e3 / observed)} images/s")
    )
    loads = "; ".join(
        f"{RESOURCES[k].removeprefix('the ')} {number(1e3 / v)} images/s" for k, v in report["loads"].items() if v
    )
    return (
        "<h2>Where the time of one image goes</h2>"
        f'<p class="note">Milliseconds of {resource}, which set the pace, by stage measured alone. What each resource would'
        f" allow: {escape(loads)}.</p>{''.join(lines)}"
        '<div class="key"><s style="background:var(--data)"></s>data path<s style="background:var(--train)"></s>training</div>'
    )


def section_what_if(report: dict[str, Any]) -> str:
    rows = [row for row in report["what_if"] if row["gain"] > 1.005][:7]
    observed = report["composed"]["images_per_s"]
    if not rows:
        return ""
    span = 1.75 * rows[0]["images_per_s"]
    lines = []
    for row in rows:
        more = f"{row['gain']:.2f}x, then {row['next']}"
        lines.append(bar(row["stage"], observed / span, (row["images_per_s"] - observed) / span, "data",
                         f"{number(observed)} → {number(row['images_per_s'])} images/s", more))  # fmt: skip
    return (
        "<h2>If one stage cost nothing</h2>"
        f'<p class="note">From the observed {number(observed)} images/s, and what would hold the run back next.</p>'
        + "".join(lines)
    )


def section_queues(report: dict[str, Any]) -> str:
    c, start = report["composed"], report["startup"]
    rows = []
    for name, key in (("waiting for a batch", "latency_ms"), ("a whole step", "step_ms")):
        p = c[key]
        rows.append(
            f"<tr><td>{name}</td><td>{number(p['p50'])}</td><td>{number(p['p95'])}</td><td>{number(p['p99'])}</td><td>{p['n']}</td></tr>"
        )
    engine = ", ".join(f"{k} {number(v)} ms" for k, v in c["engine_ms"].items())
    return (
        f'<h2>Queues and latency</h2><p class="note">{c["ready"]:.0%} of batches were ready when asked for.'
        + (f" In the composed run the engine's threads spent, an image: {escape(engine)}." if engine else "")
        + f" Start-up: imports {start['imports_s']:.1f} s, build {start['build_s']:.1f} s,"
        f" first batch {start['first_batch_s']:.2f} s.</p>"
        '<div class="scroll"><table><tr><th>milliseconds</th><th>p50</th><th>p95</th><th>p99</th><th>of</th></tr>'
        + "".join(rows) + "</table></div>"
    )  # fmt: skip


def section_limits(report: dict[str, Any]) -> str:
    if not report.get("limits"):
        return ""
    lines = [
        bar(r["name"], 0, min(1.0, r["share"]) * 0.4, "data", f"{r['share']:.1%}",
            f"of {quantity(r['limit'], r['unit'])}, which allows {number(r['images_per_s'])} images/s", wide=True)
        for r in report["limits"]["shares"]
    ]  # fmt: skip
    return (
        "<h2>How far the hardware's limits are</h2>"
        '<p class="note">Share of each measured limit that the composed run uses, as if it had the resource to itself.</p>'
        + "".join(lines)
    )


def plot(
    title: str,
    points: list[tuple[float, float]],
    unit: str,
    line: tuple[float, float] | None = None,
    pick: float | None = None,
) -> str:
    """A small line chart, from zero up; `line`: (a, b) of a fitted a + b x; `pick`: the x of the point to mark."""
    points = sorted(points)
    width, height, left, bottom, top = 250, 170, 42, 24, 30
    x_top, y_top = max(p[0] for p in points), 1.12 * max(p[1] for p in points)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (width - left - 12) * x / x_top, height - bottom - (height - bottom - top) * y / y_top

    marks = ""
    for x, y in points:
        kind, radius = (' class="pick"', 5) if x == pick else ("", 3.5)
        marks += f'<circle cx="{at(x, y)[0]:.1f}" cy="{at(x, y)[1]:.1f}" r="{radius}"{kind}/>'
        marks += f'<text x="{at(x, y)[0]:.1f}" y="{height - 8}" text-anchor="middle">{x:g}</text>'
    ends = [at(0, line[0]), at(x_top, line[0] + line[1] * x_top)] if line else [at(*p) for p in points]
    path = " ".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(ends))
    ticks = "".join(
        f'<line class="ax" x1="{left}" x2="{width - 6}" y1="{at(0, y)[1]:.1f}" y2="{at(0, y)[1]:.1f}"/>'
        f'<text x="{left - 6}" y="{at(0, y)[1] + 4:.1f}" text-anchor="end">{number(y)}</text>'
        for y in (0, y_top / 2.24, y_top / 1.12)
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}"><text x="0" y="12" style="fill:var(--ink);'
        f'font-weight:600;font-size:12px">{escape(title)}</text><text x="0" y="25">{escape(unit)}</text>{ticks}'
        f'<path class="ln" d="{path}"/>{marks}</svg>'
    )


def section_sweep(report: dict[str, Any]) -> str:
    sweep = report.get("sweep")
    if not sweep:
        return ""
    fit, knees = sweep["fit"], sweep["knees"]
    pictures = []
    if fit:
        pictures.append(
            plot("views an image", list(zip(fit["views"], fit["core_ms"])), "core-ms an image", (fit["a"], fit["b"]))
        )
    for name in ("threads", "batch", "prefetch"):
        points = [(p["value"], p["images_per_s"]) for p in sweep["lines"][name]]
        if len(points) > 1:
            pictures.append(plot(name, points, "images/s", pick=knees[name]))
    law = (
        f" An image costs {number(fit['a'])} + {number(fit['b'])} V core-ms (95 %: {number(fit['a_interval'][0])} to"
        f" {number(fit['a_interval'][1])}, and {number(fit['b_interval'][0])} to {number(fit['b_interval'][1])})."
        if fit
        else ""
    )
    return (
        f'<h2>Other settings</h2><p class="note">The data path alone, one setting changed at a time.{law} Marked: the smallest'
        f' setting within 3 % of the best.</p><div class="plots">{"".join(pictures)}</div>'
        f"<pre>{escape(terminal.command(report))}</pre>"
    )


def section_table(report: dict[str, Any]) -> str:
    gone = {row["stage"]: row for row in report["what_if"]}
    head = ("stage", "runs on", "core-ms", "per", "95 %", "images/s", "views/s", "core-ms/image", "without it")
    body = []
    for row in report["stages"]:
        low, high = (max(0.0, x) for x in row["core_interval"])
        cells = [row["name"], row["where"], number(row["core_ms"]), row["per"], f"{number(low)} .. {number(high)}",
                 terminal.rate(row), number(row["views_per_s"]) if row["images_per_s"] else "-", number(row["core_ms_image"]),
                 number(gone[row["name"]]["images_per_s"]) if gone[row["name"]]["gain"] > 1.001 else "same"]  # fmt: skip
        mark = ' class="top"' if row["name"] == report["bottleneck"]["stage"] else ""
        body.append(f"<tr{mark}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return (
        '<h2>Every stage alone</h2><p class="note">The median over rounds with its 95 % interval; images/s is what the stage'
        ' would give with the machine to itself.</p><div class="scroll"><table><tr>'
        + "".join(f"<th>{h}</th>" for h in head) + "</tr>" + "".join(body) + "</table></div>"
    )  # fmt: skip


def section_baseline(report: dict[str, Any]) -> str:
    if "baseline" not in report:
        return ""
    rows = "".join(
        f"<tr><td>{r['stage']}</td><td>{number(r['before_ms'])}</td><td>{number(r['after_ms'])}</td><td>{r['ratio']:.2f}x</td>"
        f"<td>{'yes' if r['changed'] else 'no'}</td><td>{number(r['images_per_s'])}</td></tr>"
        for r in report["baseline"]["rows"]
    )
    return (
        '<h2>Against the baseline</h2><p class="note">Changed: the intervals are apart, by more than 5 %.</p>'
        '<div class="scroll"><table>'
        "<tr><th>stage</th><th>core-ms before</th><th>now</th><th>ratio</th><th>changed</th><th>images/s if undone</th></tr>"
        f"{rows}</table></div>"
    )


def footer(report: dict[str, Any]) -> str:
    env = report["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in env["versions"].items())
    return (
        f"<details><summary>Environment and data of this report</summary><p>{escape(env['device'])}; {escape(env['platform'])};"
        f" python {env['python']}; {escape(versions)}; commit {escape(env['commit'])}; {escape(env['started'])}; command"
        f" <code>{escape(env['command'])}</code></p><pre>{escape(json.dumps(report, indent=1))}</pre></details>"
    )
