"""What has become faster or slower: python tools/profile.py diff before.json after.json

Compares two profiles of `tools/profile.py stages` in core-ms, which a busy machine moves least; rates are compared only
where both runs were certified. A stage has changed when its intervals are apart and its cost differs by more than 5 %.
Exit code 1 when the whole has become slower, so that it can stand in a CI job.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from manyview.bench.stages import read
from manyview.bench.terminal import number
from manyview.bench.verdict import CHANGE, compare


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
    args = tyro.cli(Args, args=argv, description=__doc__, prog="profile.py diff")
    result = differences(read(args.before), read(args.after))
    print(table(result))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["slower"] else 0


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Stages (see `verdict.compare`), the composed run's core-ms, rates where they may be compared, and what does not match."""
    old, new = before["composed"], after["composed"]
    ratio = new["core_ms"] / old["core_ms"]
    apart = (
        new["core_ms_interval"][0] > old["core_ms_interval"][1]
        or new["core_ms_interval"][1] < old["core_ms_interval"][0]
    )
    certified = before["noise"]["certified"] and after["noise"]["certified"]
    return {
        "stages": compare(before, after),
        "core_ms": {"before": old["core_ms"], "after": new["core_ms"], "ratio": ratio,
                    "changed": bool(apart and abs(ratio - 1) > CHANGE)},
        "slower": bool(apart and ratio > 1 + CHANGE),
        "images_per_s": {"before": old["images_per_s"], "after": new["images_per_s"]} if certified else None,
        "mismatch": mismatch(before, after),
    }  # fmt: skip


def mismatch(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Settings, data or hardware that differ: the comparison is then one of those too."""
    found = []
    for key in (
        "views",
        "policy",
        "augment",
        "size",
        "backbone",
        "batch_size",
        "projector_dim",
        "objective",
        "optimizer",
        "precision",
    ):
        one, two = before["settings"][key], after["settings"][key]
        if one != two:
            found.append(f"{key}: {one} / {two}")
    for name, one, two in (
        ("data", before["data"]["fingerprint"], after["data"]["fingerprint"]),
        ("engine", before["data"]["engine"], after["data"]["engine"]),
        ("images a step", before["data"]["batch"], after["data"]["batch"]),
        ("machine", before["environment"]["device"], after["environment"]["device"]),
    ):
        if one != two:
            found.append(f"{name}: {str(one)[:40]} / {str(two)[:40]}")
    return found


def table(result: dict[str, Any]) -> str:
    lines = [f"{'stage':12s}{'before':>10s}{'after':>10s}{'ratio':>8s}  core-ms a unit"]
    for row in result["stages"]["rows"]:
        mark = "" if not row["changed"] else "slower" if row["ratio"] > 1 else "faster"
        ratio = f"{row['ratio']:.2f}x" if row["before_ms"] > 0 else "new"
        lines.append(
            f"{row['stage']:12s}{number(row['before_ms']):>10s}{number(row['after_ms']):>10s}{ratio:>8s}  {mark}"
        )
    whole = result["core_ms"]
    said = "no change" if not whole["changed"] else "slower" if whole["ratio"] > 1 else "faster"
    lines.append(f"{'together':12s}{number(whole['before']):>10s}{number(whole['after']):>10s}{whole['ratio']:>7.2f}x  {said},"
                 " core-ms an image")  # fmt: skip
    if rates := result["images_per_s"]:
        lines.append(
            f"{'images/s':12s}{number(rates['before']):>10s}{number(rates['after']):>10s}"
            f"{rates['after'] / rates['before']:>7.2f}x"
        )
    else:
        lines.append("images/s are not compared: one of the runs is not certified")
    lines += [f"differs: {text}" for text in result["mismatch"]]
    if culprit := result["stages"]["culprit"]:
        lines.append(f"\n{culprit['stage']} costs {culprit['ratio']:.2g}x of before; undoing that would bring"
                     f" {number(culprit['images_per_s'])} images/s ({culprit['gain']:.2f}x).")  # fmt: skip
    return "\n".join(lines)
