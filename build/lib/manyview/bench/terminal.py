"""The report as text."""

from __future__ import annotations

import shlex
import sys
from dataclasses import fields
from typing import Any

from manyview.bench.expected import RESOURCES
from manyview.training.config import BOOKKEEPING, Config


def tty() -> bool:
    return sys.stdout.isatty()


def number(x: float) -> str:
    """Three figures, thousands separated: 0.012, 1.23, 12.3, 1,234, 8.6 M; 0 where it is too small to matter."""
    if x >= 999_500:
        return f"{x / 1e6:.3g} M" if x < 999.5e6 else f"{x / 1e9:.3g} G"
    if x >= 99.95:
        return f"{x:,.0f}"
    return "0" if abs(x) < 5e-4 else f"{x:.3f}" if abs(x) < 0.0995 else f"{x:.3g}"


def quantity(x: float, unit: str) -> str:
    """`1.2 GB/s`, `95 Mpx/s`, `3.4 TFLOP/s`."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= factor:
            return f"{x / factor:.3g} {prefix}{unit}"
    return f"{x:.3g} {unit}"


def rate(row: dict[str, Any]) -> str:
    return number(row["images_per_s"]) if row["images_per_s"] else "-"


def table(report: dict[str, Any]) -> str:
    """Stages, then the composed run, limits, cost model and the recommended command."""
    together, gone = report["composed"], {row["stage"]: row for row in report["what_if"]}
    lines = [heading(report), ""]
    lines.append(f"{'stage':12s}{'runs on':>8s}{'core-ms':>10s} {'a':6s}{'95 %':>16s}{'images/s':>11s}{'views/s':>11s}"
                 f"{'core-ms/image':>15s}{'without it':>12s}")  # fmt: skip
    for row in report["stages"]:
        low, high = row["core_interval"]
        between = f"{number(max(0, low))} .. {number(max(0, high))}"
        without = number(gone[row["name"]]["images_per_s"]) if gone[row["name"]]["gain"] > 1.001 else "same"
        views = number(row["views_per_s"]) if row["images_per_s"] else "-"
        lines.append(f"{row['name']:12s}{row['where']:>8s}{number(row['core_ms']):>10s} {row['per']:6s}{between:>16s}"
                     f"{rate(row):>11s}{views:>11s}{number(row['core_ms_image']):>15s}{without:>12s}")  # fmt: skip
    lines += ["", *composed(report), *limits(report), *cost_model(report)]
    if report.get("sweep"):
        lines += ["", "recommended: " + command(report)]
    lines.append(f"environment: {report['environment']['device']}, commit {report['environment']['commit']}, other"
                 f" processes {report['noise']['others']:.1%} of the cores, measured in {report['took_s']:.0f} s")  # fmt: skip
    return "\n".join(lines) if together else ""


def heading(report: dict[str, Any]) -> str:
    data, settings = report["data"], report["settings"]
    sizes = "+".join(str(size) for size in data["sizes"])
    return (
        f"{data['name']} ({data['images']:,} images, {data['encoding']}, {data['bytes_per_image'] / 1e3:.0f} kB), "
        f"{settings['views']} views of {sizes} px, policy {settings['policy']}, backbone {settings['backbone']}, "
        f"batch {settings['batch_size']}"
        + (f" (measured with {data['batch']})" if data["batch"] != settings["batch_size"] else "")
        + f", engine {data['engine']} with {data['threads']} threads on {data['device']}"
    )


def composed(report: dict[str, Any]) -> list[str]:
    c, n_views = report["composed"], report["shape"]["views"]
    low, high = c["images_per_s_interval"]
    used = ", ".join(f"{RESOURCES[k].removeprefix('the ')} {1e3 / v:,.0f}" for k, v in report["loads"].items() if v)
    wait, step = c["latency_ms"], c["step_ms"]
    shrunk = c["batch"] != report["settings"]["batch_size"]
    lines = [
        f"observed {number(c['images_per_s'])} images/s ({number(low)} .. {number(high)}), {number(c['images_per_s'] * n_views)}"
        f" views/s; expected {number(c['expected_images_per_s'])}; efficiency {c['efficiency']:.0%}"
        + (
            f"; {number(c['full_batch_images_per_s'])} images/s at batch {report['settings']['batch_size']}"
            if shrunk
            else ""
        ),
        f"limits by resource, images/s: {used}",
        f"core-ms an image {number(c['core_ms'])} (stages alone: {number(c['expected_core_ms'])}); peak memory"
        f" {report['peak_bytes'] / 2**30:.2f} GiB",
        f"data wait {c['data_wait']:.0%} of the time; {c['ready']:.0%} of batches were ready when asked for"
        + (f"; engine threads busy {c['engine_busy']:.0%}" if c["engine_busy"] is not None else "")
        + (f"; GPU idle between steps {c['device_idle']:.1%}" if c["device_idle"] is not None else ""),
        f"batch wait p50 {number(wait['p50'])}, p95 {number(wait['p95'])}, p99 {number(wait['p99'])} ms; step p50"
        f" {number(step['p50'])}, p95 {number(step['p95'])}, p99 {number(step['p99'])} ms (of {step['n']})",
    ]
    start = report["startup"]
    lines.append(f"start-up: imports {start['imports_s']:.1f} s, build {start['build_s']:.1f} s, first batch"
                 f" {start['first_batch_s']:.2f} s")  # fmt: skip
    return lines


def limits(report: dict[str, Any]) -> list[str]:
    if not report.get("limits"):
        return []
    lines = ["", f"{'limit':32s}{'measured':>16s}{'95 %':>26s}{'allows images/s':>17s}{'used':>8s}"]
    for row in report["limits"]["shares"]:
        between = " .. ".join(quantity(x, row["unit"]) for x in row.get("interval") or ())
        lines.append(f"{row['name']:32s}{quantity(row['limit'], row['unit']):>16s}{between:>26s}"
                     f"{number(row['images_per_s']):>17s}{row['share']:>8.1%}")  # fmt: skip
    return lines


def cost_model(report: dict[str, Any]) -> list[str]:
    fit = report.get("sweep", {}).get("fit")
    if not fit:
        return []
    return [
        "",
        f"data path, core-ms an image = {number(fit['a'])} + {number(fit['b'])} V  (a {number(fit['a_interval'][0])} .."
        f" {number(fit['a_interval'][1])}, b {number(fit['b_interval'][0])} .. {number(fit['b_interval'][1])}; worst point"
        f" {fit['worst_error']:.0%} off)",
    ]


def command(report: dict[str, Any]) -> str:
    """The flags that the sweep found best beside those that were profiled, as a command to run."""
    best = report["settings"] | {name: int(report["sweep"]["knees"][name]) for name in ("threads", "prefetch")}
    words = ["python", "train.py"]
    for field in fields(Config):
        value, default = best.get(field.name, field.default), field.default
        value = tuple(value) if isinstance(value, list) else value
        if (field.name not in ALWAYS and value == default) or value == "none" or field.name in BOOKKEEPING:
            continue
        words.append(f"--{field.name.replace('_', '-')}")
        words += [] if value is True else map(str, value) if isinstance(value, tuple) else [str(value)]
    return shlex.join(words)


ALWAYS = ("data", "views", "backbone", "batch_size", "threads", "prefetch")
