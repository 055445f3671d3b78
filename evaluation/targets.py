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
    "aircraft": Target(6_667, 3_333, 100, "aircraft, fine classes", "mean_per_class", pixels=False),
    "caltech101": Target(3_030, 5_647, 101, "objects, as for ImageNet encoders", "mean_per_class", pixels=False),
    "caltech256": Target(24_485, 6_122, 257, "objects, as for ImageNet encoders", pixels=False),
    "cars": Target(8_144, 8_041, 196, "cars, fine classes", pixels=False),
    "cub200": Target(5_994, 5_794, 200, "birds, fine classes", pixels=False),
    "domainnet-clipart": Target(33_525, 14_604, 345, "drawings", pixels=False),
    "domainnet-infograph": Target(36_023, 15_582, 345, "infographics", pixels=False),
    "domainnet-painting": Target(50_416, 21_850, 345, "paintings", pixels=False),
    "domainnet-quickdraw": Target(120_750, 51_750, 345, "strokes of a pen, black on white", pixels=False),
    "domainnet-real": Target(120_906, 52_041, 345, "photographs from the web", pixels=False),
    "domainnet-sketch": Target(48_212, 20_916, 345, "sketches", pixels=False),
    "dtd": Target(3_760, 1_880, 47, "textures", pixels=False),
    "eurosat": Target(21_600, 5_400, 10, "satellite pictures, 64 px", pixels=False),
    "flowers102": Target(2_040, 6_149, 102, "flowers, fine classes", "mean_per_class", pixels=False),
    "food101": Target(75_750, 25_250, 101, "dishes; training labels with errors", pixels=False),
    "inat21-mini-family": Target(500_000, 100_000, 1_103, "species, by family, unequal classes", pixels=False),
    "pets": Target(3_680, 3_669, 37, "cats and dogs, fine classes", "mean_per_class", pixels=False),
    "sun397": Target(19_850, 19_850, 397, "scenes", pixels=False),
    "svhn": Target(73_257, 26_032, 10, "house numbers, 32 px"),
    "voc2012": Target(1_464, 1_449, 20, "scenes of several objects, by the largest", pixels=False),
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
        counts = {"training images": (len(train_labels), known.train), "test images": (len(test_labels), known.test),
                 "classes": (classes, known.classes)}  # fmt: skip
        if jpeg and known.pixels:
            notes.append("a JPEG copy of the exact images, so not strictly comparable with published numbers")
        notes += [f"{a:,} {what}, where the set has {b:,}" for what, (a, b) in counts.items() if a != b]
    return notes
