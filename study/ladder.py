"""Accuracy for every core-second: rows of ours and of others after equal core-hours, what `tools/ladder.py` does.

A ladder file says where the images are and what its rows are:

    data: shards/cifar10
    rows:
      ours:    {train: {backbone: …, views: 8, batch_size: 64, …}, core_hours: [0.1, 1, 10], seeds: [0, 1, 2]}
      peer:    {peer: lightly-barlow, core_hours: [0.1], seeds: [0]}      # a recipe of study/peers.py
      kmeans:  {kmeans: 1600, seeds: [0]}                                 # features of study/kmeans.py
      pixels:  {pixels: true}

Every row is scored alike: one clean view of each image, features of the whole training split as the bank, the test split
once; kNN (cosine, k = 20, T = 0.07) and a linear probe with BatchNorm, its rate chosen on a tenth of the training images.
Training is cut by core-seconds: `train.py` counts steps, so a short trial measures its speed first. Rows that are in the
CSV are not made again, and a killed run goes on from its checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from manyview.bench import output
from manyview.evaluation import encoder as encoders
from manyview.evaluation import features, knn, linear
from manyview.evaluation.metrics import score
from manyview.model import backbone, projector
from manyview.pipeline import files
from manyview.pipeline.engines.cpu import CPUEngine
from manyview.pipeline.errors import UserError, nearest
from manyview.pipeline.loader import clean_views
from manyview.pipeline.store import Store
from manyview.study import sweep
from manyview.study.kmeans import KMeans
from manyview.training import monitor

KINDS = ("train", "peer", "kmeans", "pixels")
COLUMNS = ("row", "core_hours", "seed", "knn", "linear", "held_out", "core_seconds", "views", "steps", "tflop",
           "features", "machine", "commit", "settings", "command")  # fmt: skip
TRIAL = 10  # core-seconds or so of the trial that measures a recipe's speed
EPOCHS = 30  # of the linear probe
BATCH = 500  # images at a time where there is no network
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Row:
    """One row to make. `core_hours` 0: what needs no training by time."""

    name: str
    kind: str
    value: Any  # settings of train.py, a peer's name, a number of features
    core_hours: float
    seed: int

    @property
    def key(self) -> tuple[str, str, str]:
        return self.name, f"{self.core_hours:g}", str(self.seed)

    @property
    def settings(self) -> str:
        """Identity of what it was made by: a row under other settings is another row."""
        return hashlib.sha256(json.dumps([self.kind, self.value], sort_keys=True).encode()).hexdigest()[:8]

    def folder(self, runs: Path) -> Path:
        name = re.sub(r"[^\w.]+", "-", self.name).strip("-")
        return runs / f"{name}-{self.core_hours:g}h-s{self.seed}-{self.settings}"


@dataclass(frozen=True)
class Ladder:
    data: Path
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


class Part(TypedDict, total=False):
    """Of a ladder file: rows of one name. One of the first four, which are KINDS."""

    train: dict[str, Any]
    peer: str
    kmeans: int
    pixels: bool
    core_hours: list[float]
    seeds: list[int]


class Parts(TypedDict, total=False):
    """Of a ladder file."""

    data: str
    rows: dict[str, Part]
    notes: list[str]


def read(path: Path, data: Path | None = None) -> Ladder:
    """The ladder in a YAML file; `data` instead of the file's. UserError for what it cannot hold."""
    content = sweep.load(path, "ladder", Parts, "data", "rows")
    rows = [row for name, part in content["rows"].items() for row in _rows(path, name, part)]
    return Ladder(data or Path(content["data"]), rows, content.get("notes", []))


def _rows(path: Path, name: str, part: Part) -> list[Row]:
    kinds = [(kind, value) for kind, value in part.items() if kind in KINDS]
    if len(kinds) != 1:
        raise UserError(f"{path}: {name}: a row has one of {', '.join(KINDS)}")
    hours, seeds = part.get("core_hours", [0]), part.get("seeds", [0])
    return [Row(name, *kinds[0], float(hour), seed) for hour in hours for seed in seeds]


def run(ladder: Ladder, out: Path, runs: Path, todo: list[Row], precision: str) -> int:
    """Make the rows of `todo` that the CSV `out` lacks, one after the other; the number of those that failed."""
    failed = 0
    for row in todo:
        if _is_there(row, finished(out)):
            continue
        print(f"{row.name}, {row.core_hours:g} core-hours, seed {row.seed}", flush=True)
        try:
            result = make(row, ladder.data, row.folder(runs), precision)
        except subprocess.CalledProcessError as error:
            print(f"  FAILED ({error.returncode}): {error.cmd}", file=sys.stderr)
            failed += 1
            continue
        write(out, finished(out) | {row.key: result})
        print(f"  kNN {float(result['knn']):.2%}, linear {float(result['linear']):.2%}", flush=True)
    return failed


def make(row: Row, data: Path, folder: Path, precision: str) -> dict[str, Any]:
    """Train if that is what the row does, then score; the CSV's line."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "trained.json").exists():  # the commit is the one that trained
        commit, how = monitor.commit(), {"train": _train, "peer": _peer, "kmeans": _fit}.get(row.kind)
        trained = how(row, data, folder, precision) if how else NO_STEPS
        files.write(folder / "trained.json", json.dumps(trained | {"commit": commit}))
    trained = json.loads((folder / "trained.json").read_text())
    bank, test = Store(data, "train"), Store(data, "val")
    x, queries = (_features(row, folder, store) for store in (bank, test))
    y, truth = (torch.from_numpy(np.array(store.labels, np.int64)) for store in (bank, test))
    classes = len(bank.classes)
    probe = linear.sweep(x, y, queries, classes, bn=True, epochs=EPOCHS, seed=row.seed)
    votes = knn.cosine_exp(x, y, queries, k=20, classes=classes)
    return {
        "row": row.name, "core_hours": f"{row.core_hours:g}", "seed": row.seed, "settings": row.settings,
        "knn": score(votes, truth).top1, "linear": score(probe.scores, truth).top1, "held_out": max(probe.held_out),
        "features": x.shape[1], "machine": monitor.cpu_name(), **trained,
    }  # fmt: skip


NO_STEPS = {"core_seconds": 0.0, "views": 0, "steps": 0, "tflop": 0, "command": "none: the pixels of the clean view"}


def _fit(row: Row, data: Path, folder: Path, precision: str) -> dict[str, Any]:
    begun, store = time.process_time(), Store(data)
    kmeans = KMeans(_pixels(store), row.value, row.seed)
    torch.save(vars(kmeans), folder / "kmeans.pt")
    used = time.process_time() - begun
    return NO_STEPS | {"core_seconds": used, "command": f"study/kmeans.py, {row.value} centroids"}


def _peer(row: Row, data: Path, folder: Path, precision: str) -> dict[str, Any]:
    try:  # here, since it needs lightly
        from manyview.study import peers
    except ImportError as error:
        raise UserError(f"{row.name}: {error}") from None
    if row.value not in peers.RECIPES:
        raise UserError(f"{row.name}: {nearest('peer', row.value, peers.RECIPES)}")
    result = peers.train(row.value, data, folder, 3600 * row.core_hours, row.seed, precision)
    tflop = _tflop(folder, peers.RECIPES[row.value].head(), peers.SIZE, result["views"])
    return result | {"tflop": tflop, "command": f"study/peers.py, {row.value}, {precision}"}


def _train(row: Row, data: Path, folder: Path, precision: str) -> dict[str, Any]:
    """train.py for as many steps as fit, in a process of its own."""
    settings = {"precision": precision} | row.value | {"data": str(data), "seed": row.seed}
    rate = _speed(settings, folder)
    steps = max(1, round(3600 * row.core_hours * rate))
    flags = [*sweep.flags(settings), "--steps", str(steps), "--log-every", str(max(1, min(100, steps // 20)))]
    flags += ["--save-every", str(max(1, min(steps // 4, round(200 * rate)))), "--eval-every", str(max(1, steps // 4))]
    _call([*flags, "--out", str(folder), "--resume"])
    last = [line for line in monitor.read_metrics(folder / "metrics.jsonl") if "loss" in line][-1]
    config = json.loads((folder / "config.json").read_text())
    width = int(backbone.metadata(folder)["num_features"])
    head = projector.Projector(width, config["projector_dim"], config["projector_hidden"] or config["projector_dim"])
    side = _side(row.value, config["size"])
    return {
        "core_seconds": last["core_seconds"], "views": last["views"], "steps": last["step"],
        "tflop": _tflop(folder, head, side, last["views"]), "command": "python train.py " + shlex.join(flags),
    }  # fmt: skip


def _side(settings: dict[str, Any], size: int) -> int:
    """Pixels of a training view: `--augment size=16` makes them smaller than what the network is evaluated at."""
    given = [word.partition("=")[2] for word in settings.get("augment", ()) if word.startswith("size=")]
    return int(given[-1]) if given else size


def _speed(settings: dict[str, Any], folder: Path) -> float:
    """Steps a core-second, from a trial whose second half alone counts; measured once a row."""
    file, place, steps = folder / "speed.json", Path(f"{folder}-trial"), 4
    while not file.exists():
        every = steps // 2
        _call([*sweep.flags(settings), "--steps", str(steps), "--log-every", str(every), "--eval-every", "-1",
               "--out", str(place), "--overwrite"])  # fmt: skip
        first, second = (r["core_seconds"] for r in monitor.read_metrics(place / "metrics.jsonl") if "loss" in r)
        if second - first > TRIAL / 2:
            files.write(file, json.dumps({"steps_per_core_second": every / (second - first)}))
        steps *= max(2, min(16, round(1.3 * TRIAL / max(second, 0.1))))  # never the same again
    return json.loads(file.read_text())["steps_per_core_second"]


def _call(flags: list[str]) -> None:
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(ROOT / "train.py"), *flags], check=True, env=alone)


def _tflop(folder: Path, head: Any, side: int, views: int) -> float:
    """Of training: three times the forward pass of backbone and head, counted on views of `side` pixels."""
    network, _ = backbone.load(folder)
    cost = projector.cost(network.train(), head, side)
    return round(3 * (cost.backbone_flops + cost.projector_flops) * views / 1e12, 3)


def _features(row: Row, folder: Path, store: Store) -> Tensor:
    """(N, F) float32 of every image of a split, by one clean view."""
    if row.kind == "pixels":
        return _pixels(store).flatten(1).float()
    if row.kind == "kmeans":
        kmeans = KMeans.__new__(KMeans)
        vars(kmeans).update(torch.load(folder / "kmeans.pt", weights_only=True))
        return kmeans(_pixels(store))
    with closing(CPUEngine(store, threads=1)) as engine:
        return features.embed(encoders.load(str(folder)), store, np.arange(len(store)), engine)[:, 0]


def _pixels(store: Store) -> Tensor:
    """(N, 3, S, S) uint8: the clean view of every image."""
    size, ids = store.default_size(), np.arange(len(store))
    with closing(CPUEngine(store, threads=1)) as engine:
        batches = (ids[i : i + BATCH] for i in range(0, len(store), BATCH))
        return torch.cat([clean_views(store, engine, size, batch)[1].clone() for batch in batches])


def finished(out: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Lines of the CSV by (row, core-hours, seed)."""
    return {(line["row"], line["core_hours"], line["seed"]): line for line in sweep.read_rows(out, *COLUMNS)}


def write(out: Path, lines: dict[tuple[str, str, str], dict[str, Any]]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write(out, sweep.table(list(COLUMNS), list(lines.values())))


def _is_there(row: Row, lines: dict[tuple[str, str, str], dict[str, Any]]) -> bool:
    return row.key in lines and lines[row.key]["settings"] == row.settings


HEAD = ("row", "core-hours", "seeds", "kNN %", "linear %", "core-seconds", "TFLOP", "million views", "steps",
        "features")  # fmt: skip


def report(ladder: Ladder, out: Path, command: str) -> str:
    """Markdown: a line for every row of the ladder, seeds together; rows that are not there yet are said to be pending."""
    lines = finished(out)
    cells = []
    for hours, name in sorted(dict.fromkeys((row.core_hours, row.name) for row in ladder.rows), key=lambda key: key[0]):
        rows = [row for row in ladder.rows if (row.core_hours, row.name) == (hours, name)]
        there = [lines[row.key] for row in rows if _is_there(row, lines)]
        cells.append([name, f"{hours:g}" if hours else "-", f"{len(there)} of {len(rows)}", *_scores(there)])
    machines, commits = (", ".join(sorted({line[key] for line in lines.values()})) for key in ("machine", "commit"))
    return output.document(
        "# The ladder: accuracy for every core-second",
        f"Made by `{command}`; every row with its command and commit is in [{out.name}]({out.name}).",
        "\n".join(f"- {note}" for note in ladder.notes),
        output.table(HEAD, cells),
        f"Processor: {machines}, one thread. Commits: {commits}.",
    )


def _scores(lines: list[dict[str, Any]]) -> list[str]:
    """The columns from kNN on, of the seeds of one row."""
    if not lines:
        return ["pending", "pending", *5 * [""]]
    keys = ("core_seconds", "tflop", "views", "steps")
    seconds, tflop, views, steps = (np.mean([float(line[key]) for line in lines]) for key in keys)
    accuracies = [_accuracy([100 * float(line[key]) for line in lines]) for key in ("knn", "linear")]
    costs = [f"{seconds:,.0f}", f"{tflop:,.0f}", f"{views / 1e6:.2f}", f"{steps:,.0f}"]
    return [*accuracies, *costs, lines[0]["features"]]


def _accuracy(values: list[float]) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")
