"""What a training run will need: python tools/profile.py capacity --profile FILE --images 1281167 --views 8 --epochs 100 --gpus 8

From a profile of `tools/profile.py stages` (profile.json): the time, the cores that feed the GPUs, the storage and its
bandwidth, and with `--hours` how much of each would meet a deadline. Costs a view and an image come from the profile, so
other numbers of views and other batches are predictions; what the whole lost against its stages is taken along.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from manyview.bench import expected, output
from manyview.bench.output import quantity
from manyview.bench.stages import read
from manyview.bench.verdict import costs_of, shape_of


@dataclass(kw_only=True)
class Args:
    """Plan a training run from a profile."""

    profile: Path
    """profile.json of a run of `stages` on the kind of machine that will train."""
    images: int
    """Images of the data set."""
    views: int = 0
    """Views an image; 0 = the profile's."""
    epochs: float = 100.0
    """Passes over the images."""
    gpus: int = 1
    """GPUs (or, for a profile taken without one, machines), each fed by its own share of the host."""
    batch_size: int = 0
    """Images a step and GPU; 0 = the profile's `--batch-size`."""
    hours: float = 0.0
    """Deadline; 0 = none."""
    json: Path | None = None
    """Also write the plan here."""


def main(argv: list[str]) -> None:
    args = output.parse(Args, argv, __doc__, "capacity", images=1, gpus=1, epochs=1e-9, views=0, batch_size=0, hours=0)
    result = plan(read(args.profile), args)
    print(text(result))
    output.write(args.json, result)


def plan(report: dict[str, Any], args: Args) -> dict[str, Any]:
    """Everything `text` says, as numbers: rates are for all GPUs together, bandwidths in bytes a second."""
    costs, measured = costs_of(report), shape_of(report)
    batch = args.batch_size or report["settings"]["batch_size"]
    shape = replace(measured, views=args.views or measured.views, batch=batch)
    efficiency = report["composed"]["efficiency"]
    resource, stage = expected.bottleneck(costs, shape)
    rate = args.gpus * efficiency * 1e3 / expected.milliseconds(costs, shape)
    seconds = args.images * args.epochs / rate
    on_host = expected.loads(costs, shape).get("cores", {})
    core_ms = shape.cores * sum(on_host.values()) / efficiency
    bytes_per_image, limits = report["data"]["bytes_per_image"], report.get("limits") or {}
    result = {
        "images": args.images, "views": shape.views, "epochs": args.epochs, "gpus": args.gpus, "batch": shape.batch,
        "device": report["data"]["device"], "certified": report["noise"]["certified"],
        "images_per_s": rate, "views_per_s": rate * shape.views, "hours": seconds / 3600,
        "bottleneck": stage, "resource": resource, "efficiency": efficiency,
        "storage_bytes": bytes_per_image * args.images, "read_bytes_per_s": bytes_per_image * rate,
        "disk_bytes_per_s": limits["disk"]["random_bytes_per_s"] if limits else None,
        "cores": rate * core_ms / 1e3, "core_hours": args.images * args.epochs * core_ms / 3.6e6,
    }  # fmt: skip
    if limits.get("gradient_bytes") and args.gpus > 1:
        steps_per_s = rate / args.gpus / shape.batch
        result["network_bytes_per_s"] = 2 * limits["gradient_bytes"] * (args.gpus - 1) / args.gpus * steps_per_s
    if args.hours:
        factor = result["hours"] / args.hours
        result |= {"deadline_hours": args.hours, "gpus_for_deadline": math.ceil(args.gpus * factor - 1e-9),
                   "views_for_deadline": views_that_fit(costs, shape, efficiency, args)}  # fmt: skip
    return result


def views_that_fit(costs: list[expected.Cost], shape: expected.Shape, efficiency: float, args: Args) -> int:
    """The most views with which the run still ends in time; 0 = not even one."""
    budget_ms = args.hours * 3.6e6 * args.gpus * efficiency / (args.images * args.epochs)
    fits = [v for v in range(1, 257) if expected.milliseconds(costs, replace(shape, views=v)) <= budget_ms]
    return max(fits, default=0)


def text(r: dict[str, Any]) -> str:
    kind = "GPU(s)" if r["device"].startswith("cuda") else "machine(s) without a GPU"
    disk, reads = r["disk_bytes_per_s"], r["read_bytes_per_s"]
    lines = [
        f"{r['images']:,} images x {r['views']} views x {r['epochs']:g} epochs on {r['gpus']} {kind}, batch {r['batch']} each",
        f"  time       {r['hours']:,.1f} hours at {r['images_per_s']:,.0f} images/s ({r['views_per_s']:,.0f} views/s);"
        f" {r['bottleneck']} holds it back",
        f"  cores      {r['cores']:,.1f} kept busy, {r['core_hours']:,.0f} core-hours",
        f"  storage    {quantity(r['storage_bytes'], 'B')}",
        f"  reads      {quantity(reads, 'B/s')}" + (f" (measured here, cold: {quantity(disk, 'B/s')})" if disk else ""),
    ]
    if network := r.get("network_bytes_per_s"):
        lines.append(f"  gradients  {quantity(network, 'B/s')} in and out of each, if averaged by a ring")
    if disk and reads > disk:
        lines.append("  the disk measured here is too slow for that unless the data fits in memory")
    if "deadline_hours" in r:
        fits = r["views_for_deadline"]
        lines.append(f"  deadline   {r['deadline_hours']:g} hours take {r['gpus_for_deadline']} of them, or"
                     + (f" {fits} views at most" if fits else " fewer images or epochs: one view is too many"))  # fmt: skip
    if not r["certified"]:
        lines.append("  the profile is not certified: these numbers are as noisy as it was")
    return "\n".join(lines)
