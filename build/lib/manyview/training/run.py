"""The run directory: one object that writes everything a run leaves behind except checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manyview.evaluation import online
from manyview.model.objective import Loss
from manyview.training import monitor, plots
from manyview.training.config import Config, to_json


class Run:
    """Console, metrics, tracker and clock of one run; ranks other than 0 keep the clock and write nothing.

    steps: total; images, views: a step, over all ranks; start: the step gone on from; seconds, core_seconds: trained
    before that.
    """

    def __init__(
        self,
        cfg: Config,
        folder: Path,
        rank: int,
        device: torch.device,
        *,
        steps: int,
        images: int,
        views: int,
        start: int,
        seconds: float,
        core_seconds: float,
    ):
        self.folder, self.device, self.dim = folder, device, cfg.projector_dim
        self.steps, self.images, self.views = steps, images, views
        self.writes = rank == 0
        self.console = monitor.Console(folder / "log.txt" if self.writes else None, quiet=not self.writes)
        if self.writes:
            (folder / "plots").mkdir(exist_ok=True)
            (folder / "env.json").write_text(json.dumps(monitor.environment(device), indent=2) + "\n")
            self.metrics = monitor.Metrics(folder / "metrics.jsonl", start)
            self.tracker = monitor.Tracker(cfg.log, folder, to_json(cfg), start)
        self.say = self.console.say
        self.alarmed = False
        self.before, self.began, self.paused = seconds, time.perf_counter(), 0.0
        self.before_core, self.began_core, self.paused_core = core_seconds, time.process_time(), 0.0
        self.last_time, self.last_step, self.last_wait = self.began, start, 0.0

    @property
    def seconds(self) -> float:
        """Spent training, over all resumes; evaluation and start-up left out."""
        return self.before + time.perf_counter() - self.began - self.paused

    @property
    def core_seconds(self) -> float:
        """CPU time of this process for the same: what a run costs on a machine that others use too."""
        return self.before_core + time.process_time() - self.began_core - self.paused_core

    def start_clock(self) -> None:
        self.began = self.last_time = time.perf_counter()
        self.began_core = time.process_time()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside is not training time."""
        begun, core = time.perf_counter(), time.process_time()
        yield
        taken = time.perf_counter() - begun
        self.paused += taken
        self.paused_core += time.process_time() - core
        self.last_time += taken

    def row(self, step: int, **numbers: Any) -> None:
        """One line of metrics.jsonl and of the tracker."""
        row: dict[str, Any] = {"step": step, "images": step * self.images, "views": step * self.views}
        row |= {"seconds": round(self.seconds, 3), "core_seconds": round(self.core_seconds, 3), **numbers}
        self.metrics.write(row)
        self.tracker.write(row)

    def log(
        self, step: int, loss: Loss, z: Tensor, lr: float, timings: dict[str, float], skipped: Tensor, bad: int
    ) -> None:
        """Metrics of this very step (no running mean: nothing to restore) and speeds since the last call.

        z: embeddings (V, B, D) of this rank; skipped, bad: steps and images so far. The one place of the loop that
        waits for the device.
        """
        if not self.writes:
            return
        total, invariance, decorrelation = (float(x.detach()) for x in loss)
        now, taken = time.perf_counter(), step - self.last_step
        elapsed = now - self.last_time
        rank, spread = online.collapse(z[0])
        images_per_s = taken * self.images / elapsed
        wait = (timings["wait"] - self.last_wait) / elapsed
        peak = monitor.peak_memory(self.device)
        self.row(
            step, loss=total, invariance=invariance, decorrelation=decorrelation, lr=lr, rank=rank, spread=spread,
            skipped=int(skipped), bad=bad, images_per_s=round(images_per_s, 1),
            views_per_s=round(taken * self.views / elapsed, 1), data_wait=round(wait, 4), peak_bytes=peak,
            timings={k: round(v, 3) for k, v in timings.items()},
        )  # fmt: skip
        self.console.live(
            f"step {step:>{len(str(self.steps))}}/{self.steps}  loss {total:8.3f}  lr {lr:.1e}  {images_per_s:5.0f} img/s"
            f"  {taken * self.views / elapsed:6.0f} views/s  data wait {wait:4.0%}  rank {rank:5.1f}  {peak / 2**30:.1f} GiB"
            f"  ETA {monitor.duration((self.steps - step) * elapsed / taken)}"
        )
        self.watch_collapse(step, rank, spread, z.shape[1])
        self.last_time, self.last_step, self.last_wait = time.perf_counter(), step, timings["wait"]

    def watch_collapse(self, step: int, rank: float, spread: float, rows: int) -> None:
        """Say once, after the first tenth of the run, that the embeddings live on hardly any dimensions."""
        # rows of one view on one rank bound the rank too; below 1.5 there is one direction, whatever the sizes
        few = max(1.5, min(4.0, 0.1 * min(self.dim, rows)))
        if not self.alarmed and step > self.steps // 10 and (rank < few or spread < 1e-4):
            self.alarmed = True
            self.say(
                f"warning: collapse? effective rank {rank:.1f} of {self.dim} dimensions, median spread {spread:.1e}; "
                "a lower --lr, a longer --warmup or another --beta helps most often"
            )

    def evaluate(
        self, step: int, probe: online.Probe, backbone: nn.Module, autocast: Callable[[], AbstractContextManager]
    ) -> None:
        """Online probes and plots, off the clock."""
        with self.pause():
            scores = probe(backbone, autocast)
            if scores:
                self.row(step, **scores)
                text = ", ".join(f"{name} {value:.2%}" for name, value in scores.items())
                self.say(f"step {step}: {text} (online: {probe.text})")
            if probe.eigenvalues is None:
                return self.say(f"step {step}: features are not finite: nothing to probe")
            try:
                plots.draw(self.folder)
                path = self.folder / "plots" / "spectrum.png"
                plots.spectrum(probe.eigenvalues, path, f"Eigenspectrum of the features at step {step}")
            except OSError as error:
                self.say(f"warning: plots not written ({error.strerror})")

    def close(self) -> None:
        if self.writes:
            self.metrics.close()
            self.tracker.close()
        self.console.close()
