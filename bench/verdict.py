"""The one sentence, and what has changed since an earlier profile."""

from __future__ import annotations

from typing import Any

from manyview.bench import expected
from manyview.bench.expected import RESOURCES, Shape
from manyview.bench.harness import apart
from manyview.bench.output import number
from manyview.bench.stage_cost import Cost

CHANGE = 0.05  # two runs of the same thing agree to this in core-ms; less is no change
FIX = {
    "read": "a faster disk, `--order blocks`, or smaller images (`make shards SIZE=…`)",
    "decode": "smaller images (`make shards SIZE=256`) or stored pixels (`ENCODING=raw`)",
    "dispatch": "a larger batch, or fewer engine threads",
    "resize": "smaller source images (`make shards SIZE=256`) or smaller views (`--size`)",
    "flip": "`--augment flip=0`",
    "color": "a lower share of jittered views (`--augment jitter=0.5`)",
    "blur": "a lower share of blurred views (`--augment blur=0.2`) or a smaller sigma",
    "solarize": "`--augment solarize=0`",
    "parameters": "fewer views",
    "copy": "uint8 views from an engine on the device (`--engine dali`)",
    "normalize": "fewer or smaller views",
    "forward": "a smaller backbone, `--precision bf16`, `--compile`, or fewer views",
    "backward": "a smaller backbone, `--precision bf16`, `--compile`, or fewer views",
    "objective": "a smaller `--projector-dim`",
    "optimizer": "a larger batch, or `--optimizer sgd`",
}


def costs_of(report: dict[str, Any]) -> list[Cost]:
    return [Cost(*(row[key] for key in ("name", "where", "per", "core", "wall"))) for row in report["stages"]]


def shape_of(report: dict[str, Any]) -> Shape:
    return Shape(**report["shape"])


def sentence(report: dict[str, Any]) -> str:
    """The verdict: what holds the run back, how far from expected it is, what removing the bottleneck would bring."""
    together, bottleneck = report["composed"], report["bottleneck"]
    stage, resource = bottleneck["stage"], bottleneck["resource"]
    share = expected.loads(costs_of(report), shape_of(report))[resource][stage] / report["loads"][resource]
    gone = next(row for row in report["what_if"] if row["stage"] == stage)
    rate, n_views = together["images_per_s"], report["shape"]["views"]
    text = (
        f"{stage} is the bottleneck, {share:.0%} of the time of {RESOURCES[resource]}: {number(rate)} images/s"
        f" ({number(rate * n_views)} views/s), {together['efficiency']:.0%} of what the stages alone let expect; without it"
        f" {number(rate)} would become {number(gone['images_per_s'])}, held back by {gone['next']} then"
    )
    if stage in FIX:
        text += f"; what helps: {FIX[stage]}"
    if changed := report.get("baseline", {}).get("culprit"):
        text += (
            f". Since the baseline {changed['stage']} costs {changed['ratio']:.2g}x; undoing that would bring"
            f" {number(changed['images_per_s'])} images/s ({changed['gain']:.2f}x)"
        )
    elif "baseline" in report:
        text += ". Nothing that matters has changed since the baseline"
    if not report["noise"]["certified"]:
        text = f"NOT CERTIFIED ({'; '.join(report['noise']['reasons'])}): {text}"
    return text + "."


def compare(baseline: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Stage by stage against an earlier profile of the same workload.

    `rows`: the ratio of costs, whether it is more than chance (intervals apart, and more than `CHANGE`), and the images
    a second that the earlier cost would bring, at the earlier profile's efficiency. `culprit`: the slower stage whose
    undoing would bring most, or None.
    """
    costs, shape, observed = costs_of(report), shape_of(report), report["composed"]["images_per_s"]
    whole = expected.core_ms(costs, shape)
    earlier = {row["name"]: row for row in baseline["stages"]}
    rows = []
    for cost, row in zip(costs, report["stages"]):
        if cost.name not in earlier:
            continue
        before = earlier[cost.name]
        ratio = cost.core_ms / before["core_ms"] if before["core_ms"] else float("inf") if cost.core_ms else 1.0
        back = expected.what_if(costs, shape, cost.name, min(1 / ratio, 1e6) if ratio else 1.0, observed)
        saved = whole - expected.core_ms(expected.scaled(costs, cost.name, back["factor"]), shape)
        # Together stages lose more where one of them is slow; what the earlier profile lost is what there is to go back to.
        rate = observed * back["gain"] * baseline["composed"]["efficiency"] / report["composed"]["efficiency"]
        changed = apart(row["core_interval"], before["core_interval"]) and abs(ratio - 1) > CHANGE
        rows.append({
            "stage": cost.name, "before_ms": before["core_ms"], "after_ms": cost.core_ms, "ratio": ratio, "changed": changed,
            "images_per_s": rate, "gain": rate / observed, "core_gain": whole / max(1e-12, whole - saved), "core_ms_saved": saved,
        })  # fmt: skip
    slower = [row for row in rows if row["changed"] and row["core_gain"] > 1.02]
    return {"rows": rows, "culprit": max(slower, key=lambda row: row["core_ms_saved"], default=None)}
