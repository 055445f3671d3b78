"""Small real shards that several tests share, made once a session by the project's own converter."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# A busy machine must not fail a property: no deadlines, no complaint about slow examples.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")
torch.set_num_threads(1)  # two cores, several workers
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Python plays the Triton kernels; looked at when they are defined
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as a shell starts what runs in its background, and what that starts
    signal.signal(signal.SIGINT, signal.default_int_handler)


def command(*words: object, **kwargs) -> subprocess.CompletedProcess[str]:
    """Run one of the project's commands as a user would."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **kwargs.pop("env", {})}
    line = [sys.executable, *map(str, words)]
    kwargs = {"timeout": 280, **kwargs}
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=env, **kwargs)


def program(*words: object) -> subprocess.CompletedProcess[str]:
    """The same in this process, which saves the seconds of importing torch; for tests to which a process makes no difference."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [str(word) for word in words])
        patch.setattr(sys, "path", sys.path[:])  # programs put the checkout in its first place
        with pytest.raises(SystemExit) as ending:
            runpy.run_path(str(ROOT / str(words[0])), run_name="__main__")
    code = ending.value.code
    return subprocess.CompletedProcess(words, code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())


def train(*words: object) -> int:
    """train.py in this process; its exit code."""
    import train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, words)])
        return train.main()


# The smallest run there is: what a test adds comes last, and wins.
SMALL = "--backbone resnet10-narrow --batch-size 16 --views 2 --projector-dim 16 --size 8 --engine cpu --precision fp32"
SMALL += " --eval-every -1 --log-every 1"


# Files that take longest come first, so that a worker is not left alone with one of them at the end.
LONG = (
    "evaluation_suite",
    "gpu_quarter",
    "train",
    "elastic",
    "study",
    "remote",
    "ladder",
    "loader",
    "package",
    "engines",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


def once(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """What `make` writes at the path given, made once for all workers of a session; nobody may change it."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out = root / "shared" / name
    out.parent.mkdir(exist_ok=True)
    with open(out.parent / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out.parent / f"{name}.made").exists():
            make(out)
            (out.parent / f"{name}.made").touch()
    return out


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """scikit-learn's 1797 digits as WebDataset shards."""

    def make(out: Path) -> None:
        done = command("tools/shards.py", "write", "--dataset", "digits", "--out", out)
        assert done.returncode == 0, done.stderr

    return once(tmp_path_factory, "digits", make)


@pytest.fixture(scope="session")
def trained_run(digits, tmp_path_factory) -> Path:
    """The run directory of 50 undisturbed steps on a quarter of the digits (22 an epoch), with `SMALL` flags, a checkpoint
    every 10 and probes after 25 and 50."""

    def make(out: Path) -> None:
        words = ["--steps", 50, "--save-every", 10, "--fraction", 0.25, "--eval-every", 25]
        assert train("--data", digits, "--out", out, *SMALL.split(), *words) == 0

    return once(tmp_path_factory, "trained_run", make)
