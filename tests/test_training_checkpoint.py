from __future__ import annotations

import errno
import os

import pytest
import torch

from manyview.pipeline.errors import UserError
from manyview.training import checkpoint


def state(step: int) -> dict:
    return {"step": step, "encoder": {"w": torch.full((3,), float(step))}}


def test_keeps_the_last_and_every(tmp_path):
    for step in range(10, 80, 10):
        checkpoint.save(tmp_path, state(step), keep_last=2, keep_every=30)
    assert checkpoint.steps_in(tmp_path) == [30, 60, 70]
    assert checkpoint.load(checkpoint.path_of(tmp_path, 70))["encoder"]["w"][0] == 70


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, state(1), keep_last=1, keep_every=0)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, state(2), keep_last=1, keep_every=0)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001.pt"]
    assert checkpoint.load(checkpoint.path_of(tmp_path, 1))["step"] == 1


def test_refuses_what_is_not_a_checkpoint_and_pickles(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "owned"),)

    for name, content in (("a.pt", Evil()), ("b.pt", None)):
        path = tmp_path / name
        if content is None:
            path.write_bytes(b"half a file")
        else:
            torch.save(content, path)
        with pytest.raises(UserError, match=name):
            checkpoint.load(path)
    assert not (tmp_path / "owned").exists()


def test_random_state_round_trip():
    torch.manual_seed(3)
    saved = checkpoint.random_state()
    first = torch.rand(4)
    checkpoint.restore_random_state(saved)
    assert torch.equal(torch.rand(4), first)
