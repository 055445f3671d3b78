"""What has become faster or slower: python tools/profile.py diff before.json after.json

Compares two profiles of `tools/profile.py stages` in core-ms, which a busy machine moves least; rates are compared only
where both runs were certified. A stage has changed when its intervals are apart and its cost differs by more than 5 %.
Exit code 1 when the whole has become slower, so that it can stand in a CI job.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from manyview.bench import output, view
from manyview.bench.harness import apart
from manyview.bench.output import number
from manyview.bench.stages import read
from manyview.bench.verdict import CHANGE, compare

SAME = ("views", "policy", "augment", "size", "backbone", "batch_size", "projector_dim", "objective", "optimizer",
        "precision")  # fmt: skip


@dataclass
class Args:
    """Compare two profiles."""

    before: Annotated[Path, tyro.conf.Positional]
    """profile.json of the earlier run."""
    after: Annotated[Path, tyro.conf.Positional]
    """profile.json of the later run."""
    json: Path | None = None
    """Also write the comparison here."""


def main(argv: list[str]) -> int:
    args = output.parse(Args, argv, __doc__, "diff")
    result = differences(read(args.before), read(args.after))
    print(text(result))
    output.write(args.json, result)
    return 1 if result["slower"] else 0


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Stages (see `verdict.compare`), core-ms end to end, rates where they may be compared, and what does not match."""
    old, new = before["composed"], after["composed"]
    ratio = new["core_ms"] / old["core_ms"]
    changed = apart(new["core_ms_interval"], old["core_ms_interval"]) and abs(ratio - 1) > CHANGE
    certified = before["noise"]["certified"] and after["noise"]["certified"]
    return {
        "stages": compare(before, after),
        "core_ms": {"before": old["core_ms"], "after": new["core_ms"], "ratio": ratio, "changed": changed},
        "slower": changed and ratio > 1,
        "images_per_s": {"before": old["images_per_s"], "after": new["images_per_s"]} if certified else None,
        "mismatch": mismatch(before, after),
    }


def mismatch(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Settings, data or hardware that differ: the comparison is then one of those too."""
    one, two = (
        {key: report["settings"][key] for key in SAME}
        | {"data": report["data"]["fingerprint"], "engine": report["data"]["engine"]}
        | {"images a step": report["data"]["batch"], "machine": report["environment"]["device"]}
        for report in (before, after)
    )
    return [f"{name}: {str(one[name])[:40]} / {str(two[name])[:40]}" for name in one if one[name] != two[name]]


def text(result: dict[str, Any]) -> str:
    whole, culprit, rates = result["core_ms"], result["stages"]["culprit"], result["images_per_s"]
    said = "no change" if not whole["changed"] else "slower" if whole["ratio"] > 1 else "faster"
    lines = [
        *view.columns(view.changes(result["stages"])), "",
        f"together, core-ms an image: {number(whole['before'])} -> {number(whole['after'])}, {whole['ratio']:.2f}x, {said}",
        f"images/s: {number(rates['before'])} -> {number(rates['after'])}, {rates['after'] / rates['before']:.2f}x" if rates
        else "images/s are not compared: one of the runs is not certified",
        *(f"differs: {what}" for what in result["mismatch"]),
    ]  # fmt: skip
    if culprit:
        lines.append(f"\n{culprit['stage']} costs {culprit['ratio']:.2g}x of before; undoing that would bring"
                     f" {number(culprit['images_per_s'])} images/s ({culprit['gain']:.2f}x).")  # fmt: skip
    return "\n".join(lines)
