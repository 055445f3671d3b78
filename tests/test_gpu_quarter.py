"""tools/gpu.py: what a rehearsal does, and that a run goes on where it was stopped."""

from __future__ import annotations

import contextlib
import json
import runpy
import sys
from pathlib import Path

import pytest
from conftest import ROOT, command

from manyview.tools import gpu

NAMES = ["prepare", "tests", "accuracy", "views", "step", "objective", "probes"]


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]


def run(*words: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tools/gpu.py", *map(str, words)])
        return gpu.main()


def in_this_process(line: list[str], log: Path, seconds: float, call=gpu.call) -> int | None:
    """The same words to the same programs as `gpu.call`, without the seconds that each would take to start."""
    if line[1] == "-m":
        return call(line, log, seconds)
    with pytest.MonkeyPatch.context() as patch, open(log, "a") as file:
        patch.setattr(sys, "argv", line[1:])
        patch.setattr(sys, "path", list(sys.path))
        patch.chdir(ROOT)
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file), pytest.raises(SystemExit) as ended:
            runpy.run_path(line[1], run_name="__main__")
    return int(ended.value.code or 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_rehearsal_runs_every_step_and_a_second_one_none(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "call", in_this_process)
    monkeypatch.setattr(
        gpu, "environment", lambda device: {"commit": "one", "device": "x"}
    )  # also if someone commits meanwhile
    words = ("--rehearse", "--out", tmp_path, "--minutes", 20)
    assert run(*words) == 0, [log.read_text()[-2000:] for log in tmp_path.glob("*.txt")]
    assert [(row["step"], row["status"]) for row in rows(tmp_path)] == [(name, "done") for name in NAMES]
    page = (tmp_path / "README.md").read_text()
    assert all(f"| {name} |" in page for name in NAMES) and "| not begun |" not in page
    assert json.loads((tmp_path / "accuracy" / "eval.json").read_text())
    assert run(*words) == 0 and len(rows(tmp_path)) == len(NAMES)


def test_a_later_run_goes_on_with_what_has_not_ended_well(tmp_path, monkeypatch):
    ends = {"one": [0], "two": [None, 0], "three": [1, 0]}  # exit codes, run after run; None: out of time
    begun = []

    def call(line: list[str], log: Path, seconds: float) -> int | None:
        begun.append(line[0])
        return ends[line[0]].pop(0)

    steps = [gpu.Step(name, 60, "", lambda options, seconds, name=name: [[name]]) for name in ends]
    steps.append(gpu.Step("four", 60, "", steps[0].commands, lambda options: "no DALI"))
    monkeypatch.setattr(gpu, "STEPS", steps)
    monkeypatch.setattr(gpu, "call", call)
    words = ("--rehearse", "--out", tmp_path)
    assert run(*words) == 1 and begun == ["one", "two", "three"]
    assert [row["status"] for row in rows(tmp_path)] == ["done", "out of time", "failed", "left out"]
    assert "left out: no DALI" in (tmp_path / "README.md").read_text()
    assert run(*words) == 0 and begun[3:] == ["two", "three"]
    monkeypatch.setattr(gpu, "environment", lambda device: {"commit": "another", "device": "x"})
    ends.update(one=[0], two=[0], three=[0])
    assert run(*words) == 0 and begun[5:] == ["one", "two", "three"]


def test_a_command_ends_by_itself_or_at_its_deadline(tmp_path, monkeypatch):
    log = tmp_path / "log.txt"
    assert gpu.call([sys.executable, "-c", "print('said'); raise SystemExit(3)"], log, 20) == 3
    assert log.read_text().splitlines()[-1] == "said"
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    assert gpu.call([sys.executable, "-c", stubborn], log, 0) is None


def test_what_cannot_run_is_named_and_passed_over(tmp_path):
    listed = command("tools/gpu.py", "--list")
    assert listed.returncode == 0 and [line.split()[0] for line in listed.stdout.splitlines()] == NAMES
    assert run("--rehearse", "--out", tmp_path, "--steps", "tests", "--minutes", 0.01) == 0
    assert rows(tmp_path)[0]["status"] == "left out" and "may take 60" in rows(tmp_path)[0]["reason"]
    with pytest.raises(gpu.UserError, match="no step tets; there are prepare, tests"):
        run("--rehearse", "--out", tmp_path, "--steps", "tets")
