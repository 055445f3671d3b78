"""Several processes and 'nodes' of this machine under torchrun and submitit: killed, preempted, gone on with by fewer.

Every run here must give the losses of one undisturbed process: the batches are the same for any number of ranks, so a
batch lost, doubled or taken from elsewhere would show.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import conftest
import psutil
import pytest
from conftest import ROOT

import train
from manyview.pipeline.errors import UserError
from manyview.training import checkpoint, config, run

pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
STEPS = 42
SMALL = "--backbone resnet10-narrow --batch-size 48 --views 2 --projector-dim 16 --size 8 --engine cpu --device cpu"
SMALL += f" --precision fp32 --eval-every -1 --log-every 1 --fraction 0.25 --steps {STEPS} --save-every 6"
SMALL += " --optimizer adamw --lr 3e-5 --beta 3/D --policy simclr --resume"


def line(data: Path, out: Path) -> list[str]:
    """train.py's part of every command: always the same."""
    return ["train.py", "--data", str(data), "--out", str(out), *SMALL.split()]


running: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    yield
    for process in running:
        if process.poll() is None:  # the test failed
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                one.kill()
    running.clear()


def start(*words: object) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen([*map(str, words)], cwd=ROOT, env=env, text=True, **pipes)  # type: ignore[call-overload]
    running.append(process)
    return process


def read_until(process: subprocess.Popen[str], looked_for: Callable[[str], bool]) -> str:
    """Its output up to the line that was looked for."""
    assert process.stdout
    text = ""
    for row in process.stdout:
        text += row
        if looked_for(row):
            return text
    raise AssertionError(f"ended with {process.wait()} before that\n{text[-3000:]}")


def at_step(step: int) -> Callable[[str], bool]:
    return lambda row: row.startswith("step ") and int(row.split()[1].split("/")[0]) >= step


def rank_of(agent: subprocess.Popen[str], rank: int) -> psutil.Process:
    workers = [child for child in psutil.Process(agent.pid).children() if "train.py" in child.cmdline()]
    return next(worker for worker in workers if worker.environ()["RANK"] == str(rank))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def losses(out: Path) -> dict[int, float]:
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))  # none missing, none twice
    return {row["step"]: row["loss"] for row in rows}


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory) -> dict[int, float]:
    """One process without torch.distributed, never stopped: five epochs of 362 images."""
    out = tmp_path_factory.mktemp("run") / "one"
    assert conftest.train(*line(digits, out)[1:]) == 0
    assert "no checkpoint there: from the start" in (out / "log.txt").read_text()
    return losses(out)


def assert_same(out: Path, undisturbed: dict[int, float]) -> None:
    assert losses(out) == pytest.approx(undisturbed, rel=1e-5)  # measured: 3e-7
    assert (out / "backbone.safetensors").exists()


def resumed_at(text: str) -> int:
    return int(text.split("resumed at step ")[1].split(maxsplit=1)[0])


def test_a_killed_rank_a_preemption_and_fewer_ranks_leave_no_trace(digits, undisturbed, tmp_path):
    """Two ranks; one is killed, both start again; SIGTERM; one process alone goes on."""
    out = tmp_path / "run"
    agent = start(*TORCHRUN, "--nnodes=1", "--nproc-per-node=2", "--max-restarts=2", *line(digits, out))
    read_until(agent, at_step(8))
    rank_of(agent, 1).kill()
    text = read_until(agent, at_step(14))
    assert "2 process(es)" in text and resumed_at(text) in (6, 12, 18, 24)
    agent.terminate()
    saved = int(read_until(agent, lambda row: "stopped by a signal" in row).split("saved at step ")[1].split()[0])
    agent.communicate(timeout=60)
    assert agent.returncode != 0 and checkpoint.steps_in(out / "checkpoints")[-1] == saved

    assert conftest.train(*line(digits, out)[1:]) == 0
    assert resumed_at((out / "log.txt").read_text().rsplit(", 1 process(es)", 1)[1]) == saved
    assert_same(out, undisturbed)


def test_a_node_that_leaves_stops_all_and_the_others_go_on_without_it(digits, undisturbed, tmp_path):
    """Elastic nodes of one rank each: SIGTERM to the torchrun of one; the other one's starts again, alone."""
    out, port = tmp_path / "run", free_port()
    where = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=x"]
    where.append(f"--rdzv-endpoint=127.0.0.1:{port}")
    stays, leaves = (  # one keeps the rendezvous and stays
        start(*TORCHRUN, *where, f"--rdzv-conf=last_call_timeout=3,is_host={host}", *line(digits, out))
        for host in (1, 0)
    )
    log = out / "log.txt"
    wait_until(lambda: log.exists() and "2 process(es)" in log.read_text() and (out / "checkpoints").exists())
    leaves.terminate()
    text = stays.communicate(timeout=200)[0]
    leaves.communicate(timeout=60)
    assert stays.returncode == 0 and leaves.returncode != 0, text
    said = log.read_text().rsplit("2 process(es)", 1)[1]
    assert "stopped by a signal" in said and "1 process(es)" in said and resumed_at(said) >= 6
    assert_same(out, undisturbed)


def wait_until(true: Callable[[], bool]) -> None:
    end = time.time() + 200
    while not true():
        assert time.time() < end
        time.sleep(0.02)


def test_submitit_saves_requeues_and_goes_on(digits, undisturbed, tmp_path):
    """Its own executor for this machine; SIGUSR2 is what SLURM is told to send."""
    out, logs = tmp_path / "run", tmp_path / "logs"
    flags = ["--cluster", "local", "--processes", "1", "--logs", str(logs)]
    submit = start(sys.executable, "tools/submit.py", *flags, "--", *line(digits, out)[1:-1])
    row = read_until(submit, lambda row: row.startswith("job ")).splitlines()[-1]
    job = psutil.Process(int(row.split()[1].rstrip(":")))
    try:
        wait_until((out / "checkpoints").exists)
        job.children()[0].send_signal(signal.SIGUSR2)
        wait_until(lambda: not job.is_running() or job.status() == psutil.STATUS_ZOMBIE)
    finally:
        for one in [*job.children(recursive=True), job] if job.is_running() else []:
            one.kill()
    text = "".join(path.read_text() for path in logs.glob("*.out"))
    assert "stopped by a signal" in text and "Requeued job" in text and resumed_at(text) >= 6
    assert_same(out, undisturbed)


def test_restarts_that_would_hang_or_erase_are_refused(digits, tmp_path, monkeypatch):
    words = line(digits, tmp_path / "run")[1:-1]
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(UserError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        train.start_processes(config.parse(words))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="--overwrite would empty"):
        run.refuse(config.parse([*words, "--overwrite"]), tmp_path)
