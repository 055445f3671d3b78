"""What a report of `stages` says, worked out once for the terminal, the page and the picture: tables, bars and sentences."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from manyview.bench import verdict
from manyview.bench.expected import RESOURCES, loads
from manyview.bench.output import number, quantity
from manyview.bench.stage_cost import TRAINED
from manyview.training.config import BOOKKEEPING, Config

Report = dict[str, Any]
Table = tuple[Sequence[str], list[list[str]]]  # head, rows
ALWAYS = ("data", "views", "backbone", "batch_size", "threads", "prefetch")  # said even where they are the defaults


def heading(report: Report) -> str:
    data, settings = report["data"], report["settings"]
    sizes, batch = "+".join(str(size) for size in data["sizes"]), settings["batch_size"]
    batches = f"{batch} (measured with {data['batch']})" if data["batch"] != batch else batch
    return (
        f"{data['name']} ({data['images']:,} images, {data['encoding']}, {data['bytes_per_image'] / 1e3:.0f} kB), "
        f"{settings['views']} views of {sizes} px, policy {settings['policy']}, backbone {settings['backbone']}, "
        f"batch {batches}, engine {data['engine']} with {data['threads']} threads on {data['device']}"
    )


def rate(images_per_s: float, n_views: int) -> str:
    return f"{number(images_per_s)} images/s, {number(images_per_s * n_views)} views/s"


def stages(report: Report) -> Table:
    """Every stage alone, and the rate without it."""
    head = ("stage", "runs on", "core-ms", "per", "95 %", "images/s", "views/s", "core-ms/image", "without it")
    gone, rows = {row["stage"]: row for row in report["what_if"]}, []
    for row in report["stages"]:
        low, high = (number(max(0.0, x)) for x in row["core_interval"])
        rates = [number(row[key]) if row["images_per_s"] else "-" for key in ("images_per_s", "views_per_s")]
        after = gone[row["name"]]
        without = number(after["images_per_s"]) if after["gain"] > 1.001 else "same"
        rows.append([row["name"], row["where"], number(row["core_ms"]), row["per"], f"{low} .. {high}", *rates,
                     number(row["core_ms_image"]), without])  # fmt: skip
    return head, rows


def queues(report: Report) -> Table:
    waits = {"waiting for a batch": report["composed"]["latency_ms"], "a whole step": report["composed"]["step_ms"]}
    percentiles = ("p50", "p95", "p99")
    rows = [[name, *(number(ms[p]) for p in percentiles), str(ms["n"])] for name, ms in waits.items()]
    return ("milliseconds", *percentiles, "of"), rows


def limits(report: Report) -> Table:
    """What the hardware could do, and how much of it is used; no rows where that was not measured."""
    rows = []
    for row in (report.get("limits") or {"shares": []})["shares"]:
        between = " .. ".join(quantity(x, row["unit"]) for x in row.get("interval") or ())
        allowed = number(row["images_per_s"])
        rows.append([row["name"], quantity(row["limit"], row["unit"]), between, allowed, f"{row['share']:.1%}"])
    return ("limit", "measured", "95 %", "allows images/s", "used"), rows


def changes(comparison: dict[str, Any]) -> Table:
    """Of `verdict.compare`."""
    rows = []
    for row in comparison["rows"]:
        mark = "" if not row["changed"] else "slower" if row["ratio"] > 1 else "faster"
        ratio = f"{row['ratio']:.2f}x" if row["before_ms"] > 0 else "new"
        before, after, undone = (number(row[key]) for key in ("before_ms", "after_ms", "images_per_s"))
        rows.append([row["stage"], before, after, ratio, mark, undone])
    return ("stage", "core-ms before", "after", "ratio", "changed", "images/s if undone"), rows


def settings(report: Report) -> Table:
    """What other settings brought, and which is the smallest that is as good as the best."""
    sweep, rows = report["sweep"], []
    for name, line in sweep["lines"].items():
        for point in line if len(line) > 1 else []:
            mark = "enough" if point["value"] == sweep["knees"].get(name) else ""
            rows.append([name, f"{point['value']:g}", number(point["images_per_s"]), number(point["core_ms"]), mark])
    return ("setting", "value", "images/s", "core-ms an image", ""), rows


def by_resource(report: Report) -> str:
    return ", ".join(f"{RESOURCES[k].removeprefix('the ')} {number(1e3 / v)}" for k, v in report["loads"].items() if v)


def start_up(report: Report) -> str:
    start = report["startup"]
    return f"imports {start['imports_s']:.1f} s, build {start['build_s']:.1f} s, first batch {start['first_batch_s']:.2f} s"


def law(report: Report) -> str:
    """What a view costs on top of an image; empty where other numbers of views were not tried."""
    fit = report.get("sweep", {}).get("fit")
    if not fit:
        return ""
    a, b = ("{} .. {}".format(*map(number, fit[f"{name}_interval"])) for name in "ab")
    formula = f"{number(fit['a'])} + {number(fit['b'])} V"
    return f"data path, core-ms an image = {formula}  (a {a}, b {b}; worst point {fit['worst_error']:.0%} off)"


def tiles(report: Report) -> list[tuple[str, str, str]]:
    """(what, value, detail) of the numbers that sum a run up."""
    c, n_views, asked = report["composed"], report["shape"]["views"], report["settings"]["batch_size"]
    between = " .. ".join(map(number, c["images_per_s_interval"]))
    whole = f"; at batch {asked} {number(c['full_batch_images_per_s'])}" if c["batch"] != asked else ""
    shown = [
        ("observed", number(c["images_per_s"]), f"images/s ({between}), {number(c['images_per_s'] * n_views)} views/s{whole}"),
        ("of expected", f"{c['efficiency']:.0%}", f"{number(c['expected_images_per_s'])} images/s from the stages"),
        ("cost", number(c["core_ms"]), f"core-ms an image, {number(c['core_ms'] / n_views)} a view;"
                                       f" the stages alone {number(c['expected_core_ms'])}"),
        ("waiting for data", f"{c['data_wait']:.0%}", f"{c['ready']:.0%} of batches were ready"),
    ]  # fmt: skip
    if c["device_idle"] is not None:
        shown.append(("GPU idle", f"{c['device_idle']:.1%}", "of the time, between steps"))
    if c["engine_busy"] is not None:
        shown.append(("engine busy", f"{c['engine_busy']:.0%}", f"{report['data']['threads']} threads"))
    return [*shown, ("peak memory", f"{report['peak_bytes'] / 2**30:.2f}", "GiB")]


def bars(report: Report) -> list[dict[str, Any]]:
    """A waterfall of the resource that sets the pace: milliseconds an image, from where on, and of which `kind` (data,
    train, rest); stages under half a percent are one bar, `the rest`. Then what they make together, and what was observed."""
    costs, shape = verdict.costs_of(report), verdict.shape_of(report)
    stages = loads(costs, shape)[report["bottleneck"]["resource"]]
    total = sum(stages.values())
    kept = {name: ms for name, ms in stages.items() if ms >= 0.005 * total}
    rest = total - sum(kept.values())
    rows, at = [], 0.0
    for name, ms in (kept | ({"the rest": rest} if rest > 0.0005 * total else {})).items():
        kind = "train" if name in ("normalize", *TRAINED) else "data" if name in kept else "rest"
        rows.append({"name": name, "from": at, "ms": ms, "kind": kind, "more": f"{ms / total:.0%}"})
        at += ms
    for name, key in (("expected", "expected_images_per_s"), ("observed", "images_per_s")):
        per_s = report["composed"][key]
        rows.append({"name": name, "from": 0.0, "ms": 1e3 / per_s, "kind": name, "more": f"{number(per_s)} images/s"})
    return rows


def command(report: Report) -> str:
    """The flags that were found best beside those that were profiled, as a command to run."""
    best = report["settings"] | {name: int(report["sweep"]["knees"][name]) for name in ("threads", "prefetch")}
    words = ["python", "train.py"]
    for field in fields(Config):
        value = best.get(field.name, field.default)
        value = tuple(value) if isinstance(value, list) else value
        if (field.name not in ALWAYS and value == field.default) or value == "none" or field.name in BOOKKEEPING:
            continue
        words.append(f"--{field.name.replace('_', '-')}")
        words += [] if value is True else map(str, value) if isinstance(value, tuple) else [str(value)]
    return shlex.join(words)


# --- as text


def columns(table: Table) -> list[str]:
    """A table in columns, the first to the left, the others to the right; nothing where there are no rows."""
    head, rows = table
    forms = [f"{'>' if i else '<'}{max(map(len, column)) + 2}" for i, column in enumerate(zip(head, *rows))]
    return ["".join(map(format, line, forms)) for line in (head, *rows)] if rows else []


def text(report: Report) -> str:
    """Stages, then the whole run, limits, cost model, the recommended command and the verdict."""
    env = report["environment"]
    lines = [heading(report), "", *columns(stages(report)), ""]
    lines += [f"{what}: {value} {detail}" for what, value, detail in tiles(report)]
    lines += [f"limits by resource, images/s: {by_resource(report)}", f"start-up: {start_up(report)}", ""]
    for more in (columns(queues(report)), columns(limits(report)), [law(report)] if law(report) else []):
        lines += [*more, ""] if more else []
    if report.get("sweep"):
        lines.append("recommended: " + command(report))
    lines.append(f"environment: {env['device']}, commit {env['commit']}, other processes {report['noise']['others']:.1%} of the"
                 f" cores, measured in {report['took_s']:.0f} s")  # fmt: skip
    return "\n".join([*lines, "", report["verdict"]])
