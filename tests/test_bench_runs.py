from __future__ import annotations

import json

import pytest
from conftest import program

from manyview.bench import runs, stages
from manyview.pipeline.errors import UserError


def write(folder, rows, threads=2, cores=2):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps({"batch_size": 10, "views": 4, "threads": threads}))
    (folder / "env.json").write_text(json.dumps({"cores": cores}))
    return folder


def row(step, seconds, wait, decode=0.0, render=0.0, core=0.0):
    timings = {
        "wait": wait,
        "parameters": 0.01 * step,
        "batches": step,
        "read": 0.0,
        "decode": decode,
        "render": render,
    }
    return {"step": step, "images": 10 * step, "seconds": seconds, "core_seconds": core, "timings": timings}


def test_a_run_that_waited_is_told_for_what(tmp_path):
    found = runs.summary(
        write(tmp_path / "a", [row(10, 10.0, 6.0, 2.0, 17.0, 19.0), row(20, 20.0, 12.0, 4.0, 34.0, 38.0)])
    )
    assert found["data_wait"] == pytest.approx(0.6)
    assert found["engine_ms"]["render"] == pytest.approx(170.0) and found["ms"] == pytest.approx(100.0)
    assert found["core_ms"] == pytest.approx(190.0) and found["cores_used"] == pytest.approx(1.9)
    said = runs.sentence(found)
    assert "data path held it back, mostly render" in said and "25.0 images/s would be possible" in said


def test_a_run_that_did_not_wait_was_held_back_by_training(tmp_path):
    found = runs.summary(write(tmp_path / "b", [row(10, 10.0, 0.1, 1.0, 2.0), row(20, 20.0, 0.2, 2.0, 4.0)]))
    assert "training held it back" in runs.sentence(found)


def test_a_resumed_run_counts_anew(tmp_path):
    rows = [
        row(10, 10.0, 1.0),
        row(20, 20.0, 2.0),
        row(30, 30.0, 0.5) | {"timings": row(10, 0, 0.5)["timings"]},
        row(40, 40.0, 1.5),
    ]
    rows[3]["timings"]["batches"] = 20
    found = runs.summary(write(tmp_path / "c", rows))
    assert found["steps"] == 20 and found["data_wait"] == pytest.approx(0.1)


def test_what_cannot_be_asked_is_said(tmp_path):
    with pytest.raises(UserError, match="is no run of train"):
        runs.ask(tmp_path)
    with pytest.raises(UserError, match="too few"):
        runs.ask(write(tmp_path / "d", [row(10, 10.0, 1.0)]))


@pytest.mark.slow
def test_a_finished_run_can_be_asked(digits, tmp_path, capsys):
    out = tmp_path / "run"
    done = program(
        "train.py", "--data", digits, "--out", out, "--backbone", "resnet10-narrow", "--views", "2", "--batch-size", "64",
        "--steps", "24", "--log-every", "4", "--eval-every", "-1", "--projector-dim", "32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stages.main(["--run", str(out)])
    asked = capsys.readouterr().out
    assert "where the time went" in asked and "held it back" in asked
    found = runs.summary(out)
    assert found["steps"] == 20 and found["core_ms"] > 0 and 0 <= found["data_wait"] <= 1
    assert set(found["engine_ms"]) and found["training_ms"] > 0
