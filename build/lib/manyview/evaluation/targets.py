"""Known evaluation sets: what their splits should hold, the usual metric, and how they differ from photographs.

Any other shards can be evaluated too; then there is nothing to hold their counts against.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Target:
    train: int
    test: int
    classes: int
    shift: str  # against ImageNet or CIFAR photographs
    metric: str = "top1"
    pixels: bool = True  # published as exact pixels, not as JPEG


TARGETS = {
    "cifar10": Target(50_000, 10_000, 10, "none for CIFAR encoders; tiny photographs for ImageNet ones"),
    "cifar100": Target(50_000, 10_000, 100, "finer classes, same kind of picture as CIFAR-10"),
    "stl10": Target(5_000, 8_000, 10, "other photographs, 96 px, mostly CIFAR-10's classes, few labels"),
    "fashion-mnist": Target(60_000, 10_000, 10, "grey product pictures on black"),
    "digits": Target(1_438, 359, 10, "8x8 handwritten digits: no photographs, no color"),
    "imagenet": Target(1_281_167, 50_000, 1000, "none for ImageNet encoders", pixels=False),
    "imagenet100": Target(126_689, 5_000, 100, "100 of ImageNet's classes", pixels=False),
}


def differences(
    name: str, train_labels: np.ndarray, test_labels: np.ndarray, classes: int, jpeg: bool = False
) -> list[str]:
    """Where shards called `name` differ from what is known of the set; classes that no label has are named too."""
    notes = []
    for split, labels in (("train", train_labels), ("test", test_labels)):
        absent = classes - len(np.unique(labels[labels >= 0]))
        if absent:
            notes.append(f"{absent} of {classes} classes have no {split} image")
    if name in TARGETS:
        known = TARGETS[name]
        found = {"training images": (len(train_labels), known.train), "test images": (len(test_labels), known.test),
                 "classes": (classes, known.classes)}  # fmt: skip
        if jpeg and known.pixels:
            notes.append("a JPEG copy of the exact images, so not strictly comparable with published numbers")
        notes += [f"{a:,} {what}, where the set has {b:,}" for what, (a, b) in found.items() if a != b]
    return notes
