"""What a person sees of a run: one live line, metrics.jsonl, log.txt and, if asked for, a tracker."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
import uuid
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from manyview.pipeline import files
from manyview.pipeline.errors import UserError, first_line, to_nowhere

TRACKERS = ("tensorboard", "wandb", "trackio")
PACKAGES = ("torch", "torchvision", "timm", "numpy", "numba", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "ffcv")
ROOT = Path(__file__).resolve().parents[1]


class Appended:
    """A text file that grows by whole lines, each on the disk at once; on a full disk they wait in memory, said once."""

    def __init__(self, path: Path):
        self.path, self.left, self.warned = path, b"", False
        self.file = open(path, "ab", buffering=0)

    def write(self, line: str) -> None:
        self.left += line.encode() + b"\n"
        start, written = os.fstat(self.file.fileno()).st_size, 0
        try:
            while written < len(self.left):
                written += self.file.write(self.left[written:]) or 0
        except OSError as error:
            written = self.left.rfind(b"\n", 0, written) + 1
            os.truncate(self.path, start + written)  # no half line
            if not self.warned:
                say_on_stderr(f"warning: {self.path}: {error.strerror}; its lines wait for room")
            self.warned = True
        self.left = self.left[written:]

    def close(self) -> None:
        self.file.close()


class Metrics(Appended):
    """metrics.jsonl: one JSON object a line. JSON has neither NaN nor infinity: they are null.

    On resume the lines after `step` are cut off (the steps are taken again), so the file has no gap and no double.
    """

    def __init__(self, path: Path, step: int):
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            files.write(path, "".join(line + "\n" for line in kept))
        super().__init__(path)

    def row(self, row: dict[str, Any]) -> None:
        self.write(json.dumps(json.loads(json.dumps(row), parse_constant=lambda name: None)))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # the half line that a SIGKILL can leave at the end
        return float("inf")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a half-written last line is left out."""
    return [json.loads(line) for line in path.read_text().splitlines() if _step_of(line) < float("inf")]


class Console:
    """Messages to the terminal and log.txt; `live` rewrites one line on a terminal and prints plain lines elsewhere.

    A terminal or pipe that goes away costs the messages, not the run.
    """

    def __init__(self, path: Path | None, quiet: bool):
        self.file = Appended(path) if path else None
        self.quiet = quiet
        self.tty = sys.stdout.isatty()
        self.open_line = False

    def say(self, text: str) -> None:
        if self.file:
            self.file.write(text)
        self._print(("\n" if self.open_line else "") + text + "\n")
        self.open_line = False

    def live(self, text: str) -> None:
        if not self.tty:
            return self.say(text)
        if self.file:
            self.file.write(text)
        self._print("\r\x1b[2K" + text)
        self.open_line = True

    def _print(self, text: str) -> None:
        if self.quiet:
            return
        try:
            print(text, end="", flush=True)
        except OSError:
            self.quiet = True
            to_nowhere(sys.stdout)

    def close(self) -> None:
        if self.open_line:
            self._print("\n")
        if self.file:
            self.file.close()


def say_on_stderr(text: str) -> None:
    try:
        print(text, file=sys.stderr)
    except OSError:
        to_nowhere(sys.stderr)


def check_trackers(names: tuple[str, ...]) -> None:
    """UserError where one of them is not installed."""
    for name in names:
        try:
            importlib.import_module({"tensorboard": "torch.utils.tensorboard"}.get(name, name))
        except ImportError as error:
            raise UserError(f"--log {name}: not installed; run: pip install {name}") from error


class Tracker:
    """Thin adapters to experiment trackers, offline unless the user's own environment says otherwise.

    A run has one id, kept in its directory, under which a resumed run goes on. A tracker that fails while the run goes on
    is left out from then on, and said.
    """

    def __init__(self, names: tuple[str, ...], folder: Path, config: dict[str, Any], start: int = 0):
        check_trackers(names)
        self.folder, self.start = folder, start  # the step gone on from
        self.sinks: dict[str, Any] = {}
        for name in names:
            try:
                self.sinks[name] = getattr(self, f"_{name}")(folder, config)
            except Exception as error:  # they raise many kinds: no network, no login, a damaged database
                raise UserError(f"--log {name} does not start: {first_line(error)}") from error

    @property
    def id(self) -> str:
        """Made once."""
        path = self.folder / "tracker-id"
        if not path.exists():
            files.write(path, uuid.uuid4().hex + "\n")
        return path.read_text().strip()

    def _tensorboard(self, folder: Path, config: dict[str, Any]) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=self.start + 1 if self.start else None)

        def write(row: dict[str, Any]) -> None:
            for key, value in row.items():
                writer.add_scalar(key, value, row["step"])

        return write, writer.close

    def _wandb(self, folder: Path, config: dict[str, Any]) -> Any:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        run = wandb.init(project="manyview", dir=str(folder), config=config, mode=mode, name=folder.name, id=self.id,
                         resume="allow")  # fmt: skip
        return (lambda row: run.log(row, step=row["step"])), run.finish

    def _trackio(self, folder: Path, config: dict[str, Any]) -> Any:
        os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))
        import trackio

        # its runs are known by their names
        run = trackio.init(project="manyview", name=f"{folder.name}-{self.id[:8]}", config=config, resume="allow")
        return (lambda row: run.log(row, step=row["step"])), trackio.finish

    def write(self, row: dict[str, Any]) -> None:
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float)}
        for name, (write, _) in list(self.sinks.items()):
            self._try(name, write, numbers)

    def close(self) -> None:
        for name, (_, close) in list(self.sinks.items()):
            self._try(name, close)

    def _try(self, name: str, call: Any, *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:  # no tracker is worth a run
            del self.sinks[name]
            say_on_stderr(f"warning: --log {name} failed and is left out from now on: {first_line(error)}")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, commit and hardware: what someone needs to repeat the run."""
    installed = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            installed[name] = version(name)
    return {
        "command": " ".join(sys.argv),
        "commit": commit(),
        "python": platform.python_version(),
        "versions": installed,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def commit() -> str:
    """Short commit of this checkout, with `+` when files differ from it; `unknown` outside a checkout."""
    words = ["git", "describe", "--always", "--exclude=*", "--abbrev=10", "--dirty=+"]
    try:
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_name() -> str:
    """Model name of the processor and the number of cores this process may use."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.+)$", info.read_text(), re.M) if info.exists() else []
    name = models[0].strip() if models else platform.processor() or platform.machine()
    return f"{name} x {len(os.sched_getaffinity(0))} cores"


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of the CUDA allocator on a GPU, of this process's resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, s = divmod(int(max(0, seconds)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
