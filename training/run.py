"""The run directory: refused where it is in use, made, and written by one object, except for checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manyview.model.objective import Loss
from manyview.pipeline import files
from manyview.pipeline.errors import UserError
from manyview.training import monitor, plots
from manyview.training.config import Config, to_json

CONSTANT = 1e-12  # variance of the features along their first direction, below which they are one point


def refuse(cfg: Config, folder: Path) -> None:
    """UserError where `folder` cannot take this run; writes nothing."""
    monitor.check_trackers(cfg.log)
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--out {folder}: {parent} is not a folder that can be written to")
    if not folder.exists() or not any(folder.iterdir()) or cfg.resume:
        return
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} holds files but no run (no config.json): choose another --out")
    if not cfg.overwrite:
        raise UserError(
            f"{folder} is in use; go on with --resume, or empty it with --overwrite, or choose another --out"
        )
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        raise UserError(f"torchrun started this again, and --overwrite would empty {folder}: go on with --resume")


def make(cfg: Config, folder: Path, settings: dict[str, Any]) -> None:
    """The directory with its config.json: the settings, and what they came to. The first thing there, so that whatever
    fails later has left a run that --resume and --overwrite take."""
    if cfg.overwrite and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / "config.json", json.dumps({**to_json(cfg), **settings}, indent=2) + "\n")


class Clock:
    """Wall and CPU seconds spent training, over all resumes: it stands still before `start` and from `stop` on.

    CPU seconds are this process's: what a run costs on a machine that others use too.
    """

    def __init__(self, seconds: float = 0.0, core_seconds: float = 0.0):
        self.stopped_at = (seconds, core_seconds)
        self.started: tuple[float, float] | None = None

    def start(self) -> None:
        self.started = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.stopped_at, self.started = (self.seconds, self.core_seconds), None

    @property
    def seconds(self) -> float:
        return self.stopped_at[0] + (time.perf_counter() - self.started[0] if self.started else 0.0)

    @property
    def core_seconds(self) -> float:
        return self.stopped_at[1] + (time.process_time() - self.started[1] if self.started else 0.0)


class Run:
    """Console, metrics, tracker and clock of one run; ranks other than 0 keep the clock and write nothing.

    steps: of the whole run; views: of an image; state: the checkpoint gone on from.
    """

    def __init__(
        self,
        cfg: Config,
        folder: Path,
        rank: int,
        device: torch.device,
        steps: int,
        views: int,
        state: dict[str, Any] | None,
    ):
        self.folder, self.device, self.dim = folder, device, cfg.projector_dim
        self.steps, self.images, self.views = steps, cfg.batch_size, cfg.batch_size * views  # the latter two a step
        self.writes = rank == 0
        start = state["step"] if state else 0
        self.clock = Clock(state["seconds"], state["core_seconds"]) if state else Clock()
        self.last_step, self.last_seconds, self.last_wait = start, self.clock.seconds, 0.0  # when `log` was called
        self.console = monitor.Console(folder / "log.txt" if self.writes else None, quiet=not self.writes)
        self.say = self.console.say
        self.alarmed = False
        if self.writes:
            files.write(folder / "env.json", json.dumps(monitor.environment(device), indent=2) + "\n")
            self.metrics = monitor.Metrics(folder / "metrics.jsonl", start)
            self.tracker = monitor.Tracker(cfg.log, folder, to_json(cfg), start)

    def row(self, step: int, **numbers: Any) -> None:
        """One line of metrics.jsonl and of the tracker."""
        row: dict[str, Any] = {"step": step, "images": step * self.images, "views": step * self.views}
        row |= {"seconds": round(self.clock.seconds, 3), "core_seconds": round(self.clock.core_seconds, 3), **numbers}
        self.metrics.row(row)
        self.tracker.write(row)

    def log(
        self,
        step: int,
        loss: Loss,
        *,
        lr: float,
        rank: float,
        spread: float,
        timings: dict[str, float],
        skipped: int,
        bad: int,
    ) -> None:
        """Metrics of this very step (no running mean: nothing to restore) and speeds since the last call.

        rank, spread: of the embeddings; timings: seconds of the loader so far; skipped, bad: steps and images so far.
        """
        total, invariance, decorrelation = (float(x.detach()) for x in loss)
        steps, seconds = step - self.last_step, self.clock.seconds - self.last_seconds
        images_per_s, views_per_s = steps * self.images / seconds, steps * self.views / seconds
        waited = timings.get("device_wait", timings["wait"])  # by the clock of what trains
        wait = (waited - self.last_wait) / seconds
        peak = monitor.peak_memory(self.device)
        self.row(
            step, loss=total, invariance=invariance, decorrelation=decorrelation, lr=lr, rank=rank, spread=spread,
            skipped=skipped, bad=bad, images_per_s=round(images_per_s, 1), views_per_s=round(views_per_s, 1),
            data_wait=round(wait, 4), peak_bytes=peak, timings={k: round(v, 3) for k, v in timings.items()},
        )  # fmt: skip
        self.console.live(
            f"step {step:>{len(str(self.steps))}}/{self.steps}  loss {total:8.3f}  lr {lr:.1e}  {images_per_s:5.0f} img/s"
            f"  {views_per_s:6.0f} views/s  data wait {wait:4.0%}  rank {rank:5.1f}  {peak / 2**30:.1f} GiB"
            f"  ETA {monitor.duration((self.steps - step) * seconds / steps)}"
        )
        self.last_step, self.last_seconds, self.last_wait = step, self.clock.seconds, waited

    def watch_collapse(self, step: int, rank: float, spread: float, rows: int) -> None:
        """Say once, after the first tenth of the run, that the embeddings (of `rows` images) live on hardly any dimensions."""
        # rows of one view on one rank bound the rank too; below 1.5 there is one direction, whatever the sizes
        few = max(1.5, min(4.0, 0.1 * min(self.dim, rows)))
        if not self.alarmed and step > self.steps // 10 and (rank < few or spread < 1e-4):
            self.alarmed = True
            self.say(
                f"warning: collapse? effective rank {rank:.1f} of {self.dim} dimensions, median spread {spread:.1e}; "
                "a lower --lr, a longer --warmup or another --beta helps most often"
            )

    @contextmanager
    def aside(self, what: str) -> Iterator[None]:
        """What only watches the run (`what`: probes, pictures) is off the clock, and costs a warning where it fails."""
        running = self.clock.started is not None
        self.clock.stop()
        try:
            yield
        except Exception as error:  # drawing and linear algebra raise many kinds; no picture is worth a run
            self.say(f"warning: {what} left out ({type(error).__name__}: {error})")
        finally:
            if running:
                self.clock.start()

    def probed(self, step: int, scores: dict[str, float], text: str, eigenvalues: np.ndarray | None) -> None:
        """Scores of the online probes (shares of 1), their `text`, and the features' spectrum, largest first, where finite."""
        if scores:
            self.row(step, **scores)
            numbers = ", ".join(f"{name} {value:.2%}" for name, value in scores.items())
            self.say(f"step {step}: {numbers} (online: {text})")
        if eigenvalues is None:
            return self.say(f"step {step}: features are not finite: nothing to probe")
        if eigenvalues[0] < CONSTANT:
            return self.say(f"step {step}: features are the same for all images (collapsed): no spectrum to draw")
        if step < self.steps:  # they are drawn at the end of every run
            plots.draw(self.folder)
        path = self.folder / "plots" / "spectrum.png"
        plots.spectrum(eigenvalues, path, f"Eigenspectrum of the features at step {step}")

    def close(self) -> None:
        if self.writes:
            self.metrics.close()
            self.tracker.close()
        self.console.close()
