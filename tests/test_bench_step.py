"""The trainer's benchmarks as commands: what they write, and that what they time is train.py's step."""

from __future__ import annotations

import csv
import json

import pytest
from conftest import command

from manyview.bench import trainer

NETWORK = ["--backbone", "resnet10-narrow", "--size", "8"]


@pytest.mark.slow
def test_step_and_memory_write_what_the_page_shows(digits, tmp_path):
    words = ["--views", 2, "--batch-size", 8, "--rounds", 3, "--projector-dim", 8, "--engine", "cpu", "--device", "cpu"]
    done = command(
        "tools/profile.py", "step", "--data", digits, *NETWORK, *words, "--json", tmp_path / "a" / "step.json"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "a" / "step.json").read_text())
    assert list(result["rows"]) == ["bare", "step", "data"] and result["rows"]["bare"]["ratio"] == 1
    assert all(row["core_ms"] > 0 and row["interval"][0] <= row["ratio"] <= row["interval"][1]
               for row in result["rows"].values())  # fmt: skip

    words = [
        "--views",
        2,
        4,
        "--chunks",
        0,
        1,
        "--batch-size",
        64,
        "--device",
        "cpu",
        "--json",
        tmp_path / "b" / "m.json",
    ]
    done = command("tools/profile.py", "memory", "--backbone", "resnet10-narrow", "--size", 32, *words)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "b" / "m.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["views"], row["chunk"]) for row in rows] == [("2", "0"), ("2", "1"), ("4", "0"), ("4", "1")]
    assert int(rows[2]["peak_bytes"]) > 1.5 * int(rows[3]["peak_bytes"]) > 0  # four views in the graph against one

    rows = json.loads((tmp_path / "b" / "m.json").read_text())
    page = trainer.page([result], rows, trainer.Args(data=digits))
    assert "| resnet10-narrow, 8 px | 2 x 8 | cpu | step |" in page and "| 4 | all |" in page


@pytest.mark.slow
def test_a_network_that_is_not_there_is_one_line():
    for words in (["step"], ["memory", "--views", "2", "--chunks", "0"]):
        done = command("tools/profile.py", *words, "--backbone", "resnet19", "--device", "cpu", "--data", "nowhere")
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
