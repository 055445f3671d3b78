"""tools/gpu.py: what a rehearsal does, and that a run goes on where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import command

NAMES = ["prepare", "tests", "accuracy", "views", "step", "objective", "probes"]


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_rehearsal_runs_every_step_and_a_second_one_none(tmp_path):
    words = ("tools/gpu.py", "--rehearse", "--out", tmp_path, "--minutes", 20)
    done = command(*words, timeout=600)
    assert done.returncode == 0, done.stdout + (tmp_path / "steps.jsonl").read_text()
    assert [(row["step"], row["status"]) for row in rows(tmp_path)] == [(name, "done") for name in NAMES]
    page = (tmp_path / "README.md").read_text()
    assert all(f"| {name} |" in page for name in NAMES) and "| not begun |" not in page
    assert json.loads((tmp_path / "accuracy" / "eval.json").read_text())
    assert command(*words).returncode == 0 and len(rows(tmp_path)) == len(NAMES)


def test_what_cannot_run_is_named_and_passed_over(tmp_path):
    done = command("tools/gpu.py", "--rehearse", "--out", tmp_path, "--steps", "tests", "--minutes", 0.01)
    assert done.returncode == 0
    assert rows(tmp_path)[0]["status"] == "left out" and "may take 60" in rows(tmp_path)[0]["reason"]
    wrong = command("tools/gpu.py", "--rehearse", "--out", tmp_path, "--steps", "tets")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: no step tets; there are prepare, tests")
