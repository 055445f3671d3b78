"""One run of a study in its own process: train, then score the frozen backbone by one clean view."""

from __future__ import annotations

import json
import os
import sys
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
from manyview.pipeline import engines, files, plan
from manyview.pipeline.engines.cpu import CPUEngine
from manyview.pipeline.machine import cores
from manyview.pipeline.store import Store
from manyview.training import config, monitor


def work(probe: dict[str, Any], flags: list[str], settings: dict[str, Any], folder: Path, jobs: int) -> None:
    """Train by `flags` into `folder` (or go on there), score, leave `folder`/row.json. Ends the process."""
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
            sys.exit(code)
        row = trained(folder)
    row |= scores(config.parse(sys.argv[1:]), folder, row != {}, threads, **probe)
    files.write(folder / "row.json", json.dumps(row) + "\n")


def trained(folder: Path) -> dict[str, Any]:
    """What the run's own record says: cost and last loss."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "loss" in row][-1]
    kept = {key: last[key] for key in ("loss", "rank", "core_seconds", "seconds", "peak_bytes")}
    return {**kept, "steps": last["step"], "views_seen": last["views"]}


def scores(
    cfg: config.Config, folder: Path, is_trained: bool, threads: int, epochs: int = linear.EPOCHS, images: int = 0
) -> dict[str, Any]:
    """Top-1 of evaluation's kNN (`knn-cosine-exp k=20`) and linear probe (`linear-sweep bn`), by one clean view of each image.

    held_out: the probe on a tenth of the training images, by which anything may be tuned; linear and knn: on the test
    split. `images`: of the training images, and half as many of the test split's (0 = all of both).
    """
    bank, test = Store(cfg.data, "train"), Store(cfg.data, "val")
    ids = [some(store, n) for store, n in ((bank, images), (test, images // 2))]
    device = engines.device_of(cfg.device)
    network = encoders.load(str(folder)) if is_trained else untrained(cfg, bank)
    embedded = []
    for store, chosen in zip((bank, test), ids):
        engine = CPUEngine(store, threads=threads)
        if not is_trained and store is bank:
            features.calibrate(network, store, chosen, engine, device=device)
        embedded.append(features.embed(network, store, chosen, engine, device=device)[:, 0].to(device))
        engine.close()
    (x, queries), (y, truth) = embedded, [torch.from_numpy(s.labels[i]).to(device) for s, i in zip((bank, test), ids)]
    classes = len(bank.classes)
    probe = linear.sweep(x, y, queries, classes, bn=True, epochs=epochs, seed=cfg.seed)
    votes = knn.cosine_exp(x, y, queries, k=20, classes=classes)
    environment = monitor.environment(device)
    return {
        "held_out": max(probe.held_out), "linear": score(probe.scores, truth).top1, "knn": score(votes, truth).top1,
        "probe": f"linear-sweep bn, {epochs} epochs, rate {probe.rate:g}, {len(x)} images",
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
