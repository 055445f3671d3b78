"""One run of a study in its own process: train, then score the frozen backbone by one clean view."""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train
from manyview.evaluation import encoder as encoders
from manyview.evaluation import features, knn, linear
from manyview.evaluation.metrics import score
from manyview.model import backbone
from manyview.pipeline import engines, errors, files, plan
from manyview.pipeline.engines.cpu import CPUEngine
from manyview.pipeline.machine import cores
from manyview.pipeline.store import Store
from manyview.training import config, monitor


def work(probe: dict[str, Any], flags: list[str], settings: dict[str, Any], folder: Path, jobs: int) -> None:
    """Train by `flags` into `folder` (or go on there), score, leave `folder`/row.json. Ends the process, as a command does."""
    errors.run(partial(_work, probe, flags, settings, folder, jobs))


def _work(probe: dict[str, Any], flags: list[str], settings: dict[str, Any], folder: Path, jobs: int) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    threads = max(1, cores() // jobs)
    torch.set_num_threads(threads)
    sys.argv = ["train.py", *flags, "--threads", str(threads), "--out", str(folder), "--resume"]
    print("python", *sys.argv, flush=True)
    row: dict[str, Any] = {}
    if settings.get("budget") != 0:
        if code := train.main():
            return code
        row = trained(folder)
    row |= scores(config.parse(sys.argv[1:]), folder, row != {}, threads, **probe)
    files.write(folder / "row.json", json.dumps(row) + "\n")
    return 0


def trained(folder: Path) -> dict[str, Any]:
    """What the run's own record says: cost and last loss."""
    last = [row for row in monitor.read_metrics(folder / "metrics.jsonl") if "loss" in row][-1]
    kept = {key: last[key] for key in ("loss", "rank", "core_seconds", "seconds", "peak_bytes")}
    return {**kept, "steps": last["step"], "views_seen": last["views"]}


def scores(
    cfg: config.Config, folder: Path, is_trained: bool, threads: int, epochs: int = linear.EPOCHS, images: int = 0
) -> dict[str, Any]:
    """Top-1 of evaluation's kNN (`knn-cosine-exp k=20`) and linear probe (`linear-sweep bn`), by one clean view of each image.

    linear and knn: on the test split; held_out, by which anything may be tuned: the probe on the training images that are
    not in its bank, or where it has all of them on the tenth that its rate was chosen on. `images`: of the training images
    in the bank, and half as many of the test split's (0 = all of both).
    """
    train_split, test = Store(cfg.data, "train"), Store(cfg.data, "val")
    bank = some(train_split, images)
    others = np.setdiff1d(some(train_split, 0), bank)
    device = engines.device_of(cfg.device)
    network = encoders.load(str(folder)) if is_trained else untrained(cfg, train_split)
    if not is_trained:
        with closing(CPUEngine(train_split, threads=threads)) as engine:
            features.calibrate(network, train_split, bank, engine, device=device)

    def embed(store: Store, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        with closing(CPUEngine(store, threads=threads)) as engine:
            x = features.embed(network, store, ids, engine, device=device)[:, 0]
        return x.to(device), torch.from_numpy(store.labels[ids]).to(device)

    x, y = embed(train_split, bank)
    queries, truth = embed(test, some(test, images // 2))
    more, labels = embed(train_split, others) if len(others) else (queries[:0], truth[:0])
    classes = len(train_split.classes)
    probe = linear.sweep(x, y, torch.cat((queries, more)), classes, bn=True, epochs=epochs, seed=cfg.seed)
    votes = knn.cosine_exp(x, y, queries, k=20, classes=classes)
    tested, tuned = probe.scores.split([len(queries), len(more)])
    environment = monitor.environment(device)
    return {
        "held_out": score(tuned, labels).top1 if len(others) else max(probe.held_out),
        "linear": score(tested, truth).top1, "knn": score(votes, truth).top1,
        "probe": f"linear-sweep bn, {epochs} epochs, rate {probe.rate:g}, {len(x)} images"
                 f", held out {len(others) or len(x) // 10}",
        "machine": f"{environment['device']}, {threads} threads",
    }  # fmt: skip


def untrained(cfg: config.Config, store: Store) -> encoders.Encoder:
    """The architecture with random weights, as evaluation's baseline has it; calibrate it before use."""
    size = cfg.size or store.default_size()
    fresh = partial(backbone.create, cfg.backbone, image_size=size, stem=cfg.stem)
    (r, g, b), (dr, dg, db) = store.mean, store.std
    network = encoders.Encoder(fresh().eval(), fresh, "untrained", cfg.backbone, size, (r, g, b), (dr, dg, db))
    return encoders.untrained(network, cfg.seed, f"{store.name}'s training images")


def some(store: Store, n: int) -> np.ndarray:
    """Ids of at most `n` labelled samples, seeded and class-balanced; 0 = all."""
    labelled = np.flatnonzero(store.labels >= 0)
    return labelled[plan.subset(store.labels[labelled], n / len(labelled), 0)] if 0 < n < len(labelled) else labelled
