"""What `write`, `import` and `index` say of a set: are its labels what was meant, before; what there is, after."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np

from manyview.pipeline import storage, store
from manyview.pipeline.codec import RGB
from manyview.pipeline.convert.sources import Source
from manyview.pipeline.errors import UserError
from manyview.pipeline.manifest import layout

SHOWN = 3  # names that stand for many


def check(classes: list[str], labels: dict[str, np.ndarray], disjoint: bool = False) -> list[str]:
    """Print and return warnings, a line each, about a set's `classes` and its splits' `labels` ((n,) int64, -1 = none).

    UserError: two splits that share no class, unless `disjoint` says that this is meant.
    """
    present = {split: set(np.unique(values[values >= 0]).tolist()) for split, values in labels.items()}
    present = {split: numbers for split, numbers in present.items() if numbers}
    known = max(present.values(), key=len, default=set())
    first = "train" if "train" in present else next((split for split in present if present[split] is known), "")
    warnings = []
    for split, numbers in present.items():
        if split != first and not numbers & present[first] and not disjoint:
            theirs, ours = (names(classes, present[each]) for each in (split, first))
            raise UserError(
                f"{split} ({theirs}) shares no class with {first} ({ours}): --labels FILE gives labels, --unlabelled takes "
                "folders for no classes, --disjoint if it is meant so"
            )
        if strange := numbers - present[first]:
            warnings.append(f"{len(strange)} classes of {split} have no image in {first}: {names(classes, strange)}")
    return _warned(warnings + _odd(classes, labels, present))


def _warned(warnings: list[str]) -> list[str]:
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)
    return warnings


def lost(source: Source, rejected: list[dict]) -> list[str]:
    """Print and return a warning, if there are classes of which every image was set aside."""
    gone = {(item["split"], item["name"]) for item in rejected}
    before: set[int] = set()
    after: set[int] = set()
    for split in source.splits if gone else ():
        kept = np.array([(split.name, name) not in gone for name in split.names])
        before |= set(np.unique(split.labels).tolist())
        after |= set(np.unique(split.labels[kept]).tolist())
    missing = before - after - {-1}
    text = f"every image of {names(source.classes, missing)} was set aside: see rejected.jsonl"
    return _warned([text] if missing else [])


def text(out: Path, manifest: dict) -> str:
    """The lines at the end of a conversion: splits, classes, labelled images, and what was left out or lost."""
    splits, classes = manifest["splits"], manifest["classes"]
    counts = ", ".join(f"{part['count']:,} {split}" for split, part in splits.items())
    pixels = f", {layout(manifest)}" if layout(manifest) != RGB else ""
    lines = [f"{storage.where(out)}: {counts} images{pixels}, {manifest['format']}, {manifest['rejected']} rejected"]
    named = f" ({names(classes, set(range(len(classes))))})" if classes else ""
    # Older manifests do not say it.
    labelled = [f"{part['labelled']:,} of {split}" for split, part in splits.items() if "labelled" in part]
    lines.append(f"{len(classes)} classes{named}" + f"; labelled: {', '.join(labelled)}" * bool(labelled))
    notes = [*manifest.get("notes", ()), *store.flat_channels(manifest)]
    return "\n".join([*lines, *(f"note: {note}" for note in notes)])


def _odd(classes: list[str], labels: dict[str, np.ndarray], present: dict[str, set[int]]) -> list[str]:
    warnings = []
    values = np.concatenate([values[values >= 0] for values in labels.values()] or [np.zeros(0, np.int64)])
    used = set().union(*present.values())
    if len(classes) == 1 and len(values):
        warnings.append(f"all images are of one class, {classes[0]!r}; if it is none: --unlabelled")
    elif len(values) > 1 and len(used) == len(values):
        warnings.append(f"each of {len(values)} labelled images has a class of its own; if they are none: --unlabelled")
    alike = Counter(name.strip().casefold() for name in classes)
    if twins := {number for number, name in enumerate(classes) if alike[name.strip().casefold()] > 1}:
        warnings.append(f"{len(twins)} classes differ only in capitals or spaces: {names(classes, twins)}")
    if empty := set(range(len(classes))) - used:
        warnings.append(f"{len(empty)} of {len(classes)} classes have no image: {names(classes, empty)}")
    return warnings


def names(classes: list[str], numbers: set[int]) -> str:
    """`ant, bee, cat and 7 more`."""
    some = ", ".join(classes[number] for number in sorted(numbers)[:SHOWN])
    return some + (f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else "")
