"""Checkpoints that survive SIGKILL, a full disk and a suspicious reader.

A file appears under its name only when it is complete (temporary file, fsync, rename), holds tensors and plain values
alone (`torch.load(weights_only=True)` reads it), and the newest complete one is always the one resumed from.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import torch

from manyview.pipeline import files
from manyview.pipeline.errors import UserError, first_line


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}.pt"


def steps_in(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, oldest first."""
    matches = (re.fullmatch(r"step-(\d{9})\.pt", p.name) for p in folder.glob("step-*.pt"))
    return sorted(int(match[1]) for match in matches if match)


def save(folder: Path, state: dict[str, Any], keep_last: int, keep_every: int) -> None:
    """Write `state` (with its "step") and drop all but the newest `keep_last` and the multiples of `keep_every`.

    Raises OSError if the disk is full; the older checkpoints are then untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()  # not straight to the file: torch.save turns a full disk into an error of its own
    torch.save(state, buffer)
    files.write(path_of(folder, state["step"]), buffer.getbuffer())
    for step in steps_in(folder)[:-keep_last]:
        if not (keep_every and step % keep_every == 0):
            path_of(folder, step).unlink()


def load(path: Path) -> dict[str, Any]:
    """The state in `path`, on the CPU. UserError if it is not one of ours."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types here, none of which tells the user which file
        what = f"cannot be read as a checkpoint ({first_line(error)})"
        raise UserError(f"{path} {what}; remove it to go on from the one before") from error


def random_state() -> dict[str, Any]:
    """State of every generator the training loop can draw from (data needs none: order and views are pure functions)."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
