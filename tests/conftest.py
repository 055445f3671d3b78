"""Small real shards that several tests share, made once a session by the project's own converter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
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
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=env, timeout=280, **kwargs)


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """scikit-learn's 1797 digits as WebDataset shards."""
    out = tmp_path_factory.mktemp("shards") / "digits"
    done = command("tools/shards.py", "write", "--dataset", "digits", "--out", out)
    assert done.returncode == 0, done.stderr
    return out
