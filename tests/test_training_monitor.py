from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys

import pytest
import torch

from manyview.pipeline.errors import UserError
from manyview.training import monitor, plots


def test_metrics_are_cut_at_the_step_resumed_from(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": s}) + "\n" for s in (1, 2, 3)) + '{"step": 4, "lo')
    metrics = monitor.Metrics(path, 2)
    metrics.row({"step": 3, "loss": 30})
    metrics.close()
    assert [(r["step"], r["loss"]) for r in monitor.read_metrics(path)] == [(1, 1), (2, 2), (3, 30)]


def test_lines_wait_for_a_full_disk_and_lose_nothing(tmp_path, capsys):
    """A limit on the file's size cuts a write in the middle and fails the next, as a full disk does."""
    file = monitor.Appended(tmp_path / "log.txt")
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    lines = [f"line {i}" for i in range(10)]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
        for line in lines[:9]:
            file.write(line)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert (tmp_path / "log.txt").read_text() == "line 0\nline 1\n"  # the part of a third line was taken back
    file.write(lines[9])
    file.close()
    assert (tmp_path / "log.txt").read_text().splitlines() == lines
    assert capsys.readouterr().err.count("wait for room") == 1


def test_tensorboard_gets_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = monitor.Tracker(("tensorboard",), tmp_path, {})
    tracker.write({"step": 3, "loss": 0.25, "timings": {"wait": 1.0}})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 0.25)]


def test_a_missing_tracker_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        monitor.check_trackers(("wandb",))


def test_json_has_no_nan(tmp_path):
    metrics = monitor.Metrics(tmp_path / "metrics.jsonl", 0)
    metrics.row({"step": 1, "loss": math.nan, "timings": {"wait": math.inf, "decode": 0.5}})
    metrics.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=pytest.fail)
    assert row == {"step": 1, "loss": None, "timings": {"wait": None, "decode": 0.5}}


def test_a_pipe_that_nobody_reads_costs_the_messages_not_the_run(tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        console = monitor.Console(tmp_path / "log.txt", quiet=False)
        for line in ("one", "two"):
            console.say(line)
            console.live(line)
        console.close()
        stream.write("what the interpreter still holds at exit")
        stream.flush()
    assert (tmp_path / "log.txt").read_text() == "one\none\ntwo\ntwo\n"


class FakeRun:
    def log(self, row, step):
        assert "loss" in row, "no loss"

    def finish(self):
        pass


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_is_the_same_one_of_its_tracker(name, tmp_path, monkeypatch, capsys):
    """What the real ones are told: an id (trackio: a name) that stays, and to go on where it is known."""
    calls: list[dict] = []
    module = type(sys)(name)
    module.init = lambda **words: calls.append(words) or FakeRun()  # type: ignore[attr-defined]
    module.finish = FakeRun().finish  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    for folder in ("a/run", "a/run", "b/run"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        tracker = monitor.Tracker((name,), tmp_path / folder, {})
        tracker.write({"step": 1, "loss": 0.5})
        tracker.write({"step": 2})  # which this one cannot stand
        tracker.write({"step": 3})
        tracker.close()
    first, again, other = (words.get("id", words["name"]) for words in calls)
    assert first == again != other and {words["resume"] for words in calls} == {"allow"}
    assert capsys.readouterr().err.count(f"warning: --log {name} failed and is left out from now on: no loss") == 3


def test_console_writes_plain_lines_to_a_pipe_and_the_log(tmp_path, capsys):
    console = monitor.Console(tmp_path / "log.txt", quiet=False)
    console.live("step 1")
    console.say("hello")
    console.close()
    assert capsys.readouterr().out == "step 1\nhello\n" == (tmp_path / "log.txt").read_text()


def test_environment_names_versions_commit_and_hardware():
    about = monitor.environment(torch.device("cpu"))
    assert about["versions"]["timm"] and about["commit"] and "cores" in about["device"]
    json.dumps(about)


def test_plots_of_a_finished_and_of_a_just_started_run(tmp_path):
    row = {
        "loss": 2.0, "invariance": 1.0, "decorrelation": 1.0, "rank": 3.0, "spread": 0.1, "views_per_s": 9.0, "data_wait": 0.5,
        "seconds": 60.0, "views": 1000,
    }  # fmt: skip
    rows = [{"step": s, **row} for s in range(1, 30)]
    (tmp_path / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
    plots.draw(tmp_path)
    assert not list((tmp_path / "plots").iterdir())
    probes = [{"step": 30, "views": 9, "seconds": 1.0, "knn": 0.5, "linear": 0.6}]
    rows[3]["loss"] = rows[3]["rank"] = None  # a step that was not finite
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows + probes))
    plots.draw(tmp_path)
    names = sorted(p.name for p in (tmp_path / "plots").iterdir())
    assert names == ["accuracy.png", "collapse.png", "loss.png", "throughput.png"]


def test_duration():
    assert (monitor.duration(59.9), monitor.duration(3723)) == ("0:59", "1:02:03")
