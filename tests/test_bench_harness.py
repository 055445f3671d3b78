"""What all measurements stand on: whose turn it is, whose seconds are counted, and what is written."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest

from manyview.bench import harness, output
from manyview.pipeline.errors import UserError

BURN = "import time\nwhile time.process_time() < 0.4: pass\nprint(flush=True)\nimport sys; sys.stdin.read()"


def test_contenders_are_taken_in_turn():
    turns: list[str] = []
    contenders = {name: lambda name=name: turns.append(name) or len(turns) for name in "abc"}
    taken = harness.interleaved(contenders, 4, lambda call: call())
    assert turns == list("abc") * 4 and taken == {"a": [1, 4, 7, 10], "b": [2, 5, 8, 11], "c": [3, 6, 9, 12]}
    turns.clear()
    harness.interleaved(contenders, 20, lambda call: call(), shuffled=True)
    rounds = ["".join(turns[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(one) == list("abc") for one in rounds) and len(set(rounds)) > 3


def test_worker_processes_are_counted_while_they_live_and_after():
    before, own = harness.tree_seconds(), time.process_time()
    with subprocess.Popen([sys.executable, "-S", "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        alive = harness.tree_seconds() - before
        child.stdin.close()
    ended = harness.tree_seconds() - before
    mine = time.process_time() - own
    assert 0.38 <= alive - mine < 0.8 and 0.38 <= ended - mine < 0.8


def test_the_interval_is_of_the_median():
    samples = np.random.default_rng(0).normal(10, 1, 41).tolist()
    low, high = harness.interval(samples)
    assert low < float(np.median(samples)) < high
    assert high - low == pytest.approx(2 * 1.96 * 1.253 / np.sqrt(41), rel=0.5)  # the normal's median, in large samples
    assert harness.interval([3.0]) == harness.interval([3.0, 3.0]) == (3.0, 3.0)
    assert harness.apart((1, 2), (3, 4)) and harness.apart((3, 4), (1, 2)) and not harness.apart((1, 3), (2, 4))


def test_a_result_is_written_as_json_page_and_rows(tmp_path):
    rows = [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    text = output.document("# Title", output.table(("a", "b"), [row.values() for row in rows]), "")
    assert text == "# Title\n\n| a | b |\n| --- | --: |\n| 1 | x |\n| 2 | y |\n"
    output.write(tmp_path / "new" / "one.json", {"rows": rows}, text, rows)
    assert json.loads((tmp_path / "new" / "one.json").read_text()) == {"rows": rows}
    assert (tmp_path / "new" / "one.md").read_text() == text
    with open(tmp_path / "new" / "one.csv") as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": "x"}, {"a": "2", "b": "y"}]
    output.write(None, {})  # nowhere, where nobody asked


@dataclass
class Args:
    rounds: int = 1
    share: float = 0.5
    nodes: tuple[int, ...] = (1, 2)


def test_all_bad_numbers_are_named_at_once():
    least = {"rounds": 1, "share": 1e-9, "nodes": 1}
    assert output.parse(Args, ["--rounds", "3"], None, "x", **least).rounds == 3
    said = "--rounds must be at least 1, not 0\n--share must be positive, not nan\n--nodes must be at least 1, not 1 0"
    with pytest.raises(UserError) as error:
        output.parse(Args, ["--rounds", "0", "--share", "nan", "--nodes", "1", "0"], None, "x", **least)
    assert str(error.value) == said
    assert output.whole_numbers("--views", "8,2,2", 1) == [2, 8]
