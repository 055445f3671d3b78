"""The trainer's benchmarks: what they write, and that what they time is train.py's step."""

from __future__ import annotations

import csv
import json

import pytest

from manyview.bench import memory, step, trainer
from manyview.pipeline.errors import UserError

SMALL = ["--backbone", "resnet10-narrow", "--device", "cpu"]


@pytest.mark.slow
def test_step_and_memory_write_what_the_page_shows(digits, tmp_path):
    words = [
        "--size",
        "8",
        "--views",
        "2",
        "--batch-size",
        "8",
        "--rounds",
        "3",
        "--projector-dim",
        "8",
        "--engine",
        "cpu",
    ]
    step.main(["--data", str(digits), *SMALL, *words, "--json", str(tmp_path / "a" / "step.json")])
    result = json.loads((tmp_path / "a" / "step.json").read_text())
    assert list(result["rows"]) == ["bare", "step", "data"] and result["rows"]["bare"]["ratio"] == 1
    for row in result["rows"].values():
        low, high = row["interval"]
        assert row["core_ms"] > 0 and low <= row["ratio"] <= high

    words = ["--views", "4", "--chunks", "0", "1", "4", "--batch-size", "64", "--json", str(tmp_path / "b" / "m.json")]
    memory.main([*SMALL, *words])
    with open(tmp_path / "b" / "m.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["views"], row["chunk"]) for row in rows] == [
        ("4", "0"),
        ("4", "1"),
    ]  # a chunk of all views is no chunk
    assert int(rows[0]["peak_bytes"]) > 1.5 * int(rows[1]["peak_bytes"]) > 0  # four views in the graph against one

    peaks = json.loads((tmp_path / "b" / "m.json").read_text())
    page = trainer.page([result], peaks, trainer.Args(data=digits))
    assert "| resnet10-narrow, 8 px | 2 x 8 | cpu | step |" in page and "| 4 | all |" in page


@pytest.mark.parametrize("main", [step.main, memory.main])
def test_a_network_that_is_not_there_is_one_line(digits, main):
    data = ["--data", str(digits)] if main is step.main else ["--views", "2", "--chunks", "0"]
    with pytest.raises(UserError, match="unknown backbone 'resnet19'"):
        main([*data, "--backbone", "resnet19", "--device", "cpu"])
