from __future__ import annotations

import numpy as np
import pytest

from manyview.pipeline import store
from manyview.pipeline.convert import summary
from manyview.pipeline.convert.sources import Source, Split
from manyview.pipeline.errors import UserError

ABC = ["ant", "bee", "cat"]


def check(classes: list[str], disjoint: bool = False, **labels: list[int]) -> list[str]:
    return summary.check(classes, {split: np.array(values, np.int64) for split, values in labels.items()}, disjoint)


def test_a_good_set_is_not_talked_about(capsys):
    assert check(ABC, train=[0, 1, 2, 0], val=[2, 1]) == check([], train=[-1, -1]) == []
    assert check(ABC, train=[0, 1, 2, 2], unlabelled=[-1] * 5, val=[1]) == [] and capsys.readouterr().err == ""


ODD = {  # classes, labels, the line
    "one class": (
        ["images"],
        {"train": [0, 0, 0]},
        "all images are of one class, 'images'; if it is none: --unlabelled",
    ),
    "each its own": (
        ABC,
        {"train": [0, 1, 2]},
        "each of 3 labelled images has a class of its own; if they are none: --unlabelled",
    ),
    "an empty class": (ABC, {"train": [0, 2, 2], "val": [0]}, "1 of 3 classes have no image: bee"),
    "of one split alone": (ABC, {"train": [0, 1, 1], "val": [1, 2]}, "1 classes of val have no image in train: cat"),
    "twins": (["Cat", "ant", "cat"], {"train": [0, 0, 1, 2]}, "2 classes differ only in capitals or spaces: Cat, cat"),
    "many": ([*"abcdefgh"], {"train": [0, 0]}, "7 of 8 classes have no image: b, c, d and 4 more"),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_labels_are_warned_of_by_name(case, capsys):
    classes, labels, line = ODD[case]
    assert check(classes, **labels) == [line]
    assert capsys.readouterr().err == f"warning: {line}\n"


@pytest.mark.parametrize("splits", [("train", "val"), ("val", "train"), ("unlabelled", "val")])
def test_splits_without_a_common_class_are_refused_unless_meant(splits):
    first, second = splits
    labels = {first: [0, 1, 1], second: [2, 2]}
    with pytest.raises(
        UserError, match=r"\((ant, bee|cat)\) shares no class with .* --labels FILE .* --unlabelled .* --disjoint"
    ):
        check(ABC, **labels)
    assert len(check(ABC, disjoint=True, **labels)) == 1  # still told of


def test_a_class_of_which_every_image_was_set_aside_is_named(capsys):
    splits = [
        Split("train", ["a", "b", "c"], np.array([0, 1, 1]), np.ones(3), lambda i: np.zeros(1), np.ones(3)),
        Split("val", ["a"], np.array([2]), np.ones(1), lambda i: np.zeros(1), np.ones(1)),
    ]
    rejected = [{"split": "train", "name": "a"}, {"split": "train", "name": "b"}]
    line = "every image of ant was set aside: see rejected.jsonl"
    assert summary.lost(Source(ABC, splits), rejected) == [line] and line in capsys.readouterr().err
    assert summary.lost(Source(ABC, splits), rejected[1:]) == summary.lost(Source(ABC, splits), []) == []


def manifest(std: list[float], **more) -> dict:
    part = {"count": 4, "labelled": 3, "mean": [100.0, 90.0, 0.0], "std": std}
    return {"splits": {"train": part}, "classes": ABC, "format": "webdataset", "rejected": 0, **more}


def test_the_lines_at_the_end(tmp_path):
    lines = summary.text(
        tmp_path, manifest([60.0, 55.0, 50.0], notes=["4 files left out by their type (.heic: 4)"])
    ).splitlines()
    assert lines == [
        f"{tmp_path}: 4 train images, webdataset, 0 rejected",
        "3 classes (ant, bee, cat); labelled: 3 of train",
        "note: 4 files left out by their type (.heic: 4)",
    ]


@pytest.mark.parametrize("blue", [0.0, 0.002, 3.0])
def test_a_channel_that_hardly_varies_does_not_drown_the_others_and_is_named(tmp_path, blue):
    flat = manifest([60.0, 55.0, blue])
    assert store.statistics(flat) == ((100.0, 90.0, 0.0), (60.0, 55.0, 6.0))
    assert f"note: channel blue (deviation {blue:.2g} of 255) hardly varies" in summary.text(tmp_path, flat)
    assert store.statistics(manifest([0.0] * 3))[1] == (1.0, 1.0, 1.0)
    assert store.statistics(manifest([60.0, 30.0, 20.0]))[1] == (60.0, 30.0, 20.0)
