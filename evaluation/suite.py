"""One encoder on several datasets, by several protocols: what `tools/evaluate.py TARGET` does.

The work is cut into cells (a protocol on a dataset with the trained network, an untrained one, or plain pixels). A finished
cell is written to eval.json under a key of all it depends on: an interrupted evaluation goes on, a repeated one reads.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manyview.evaluation import encoder as encoders
from manyview.evaluation import features, folder, knn, metrics, tables
from manyview.evaluation.data import Data, digest, sample
from manyview.evaluation.encoder import Encoder
from manyview.evaluation.protocols import MAJORITY, Problem, Protocol, Result
from manyview.pipeline import engines, files
from manyview.pipeline.store import Store, training_split

VERSION = 5
ENCODER = ("run", "checkpoint", "sha256", "source", "loaded", "step", "backbone", "method", "pretrained_on", "trained_by",
           "image_size", "transform", "layers")  # fmt: skip
CONFUSED = 100  # classes, up to which a confusion matrix is kept
BASELINES: dict[tuple[str, str], list[Result]] = {}  # of this process, by protocol and key of the cell


@dataclass(kw_only=True)
class Options:
    """What belongs neither to the encoder nor to the data: flags of tools/evaluate.py."""

    seed: int = 0
    """Of sub-samples, heads, held-out splits and the untrained network."""
    epochs: int = 100
    """Of the linear probes."""
    preset: str = "byol2"
    """Of few-shot fine-tuning: byol2, byol1, swav, barlowtwins."""
    finetune_bn: bool = False
    """A BatchNorm before the head in fine-tuning."""
    finetune_epochs: int = 0
    """Of few-shot and full fine-tuning; 0 = the presets' 30 and 100."""
    batch: int = 256
    """Images a forward pass."""
    device: str = "cpu"
    """cpu, cuda, or auto: a GPU where there is one."""
    engine: str = "auto"
    """What decodes the images: auto, cpu, dali, resident."""
    threads: int | None = None
    """Of the engine."""


@dataclass
class Cell:
    """What a protocol works with: a dataset, a network (`trained`, `untrained`, `pixels`), and its own part of the work."""

    suite: Suite
    protocol: Protocol
    data: Data
    network: str
    own: Data | None = None  # the data that the encoder was trained on, if it is here
    part: Any = None

    @property
    def options(self) -> Options:
        return self.suite.options

    @property
    def bank(self) -> Data:
        """Whose training images are learnt from."""
        return self.own if self.own and self.protocol.learns_from_own else self.data

    @property
    def seen(self) -> Store:
        """The split of the pre-training data that the encoder was trained on."""
        assert self.own is not None
        split = training_split(self.own.path)
        return self.own.train if split == self.own.train.split else Store(self.own.path, split)

    @property
    def inputs(self) -> list[tuple[Data, str]]:
        """The images whose features are read."""
        every = [(self.bank, "train"), (self.data, "test")]
        return every[: 2 if self.protocol.test else 1] if self.protocol.reads else []

    @property
    def encoder(self) -> Encoder:
        return self.suite.encoder(self.network, self.bank)

    def features(self, split: str) -> Tensor:
        """(N, V, F) on the CPU, of the kind that the protocol reads."""
        data = self.bank if split == "train" else self.data
        return self.suite.features(self.network, data, split, self.protocol.reads, self.bank)

    def problem(self) -> Problem:
        """Features averaged over views, on the device; labels are numbers of the bank's classes."""
        x, queries = (self.features(split).mean(1).to(self.options.device) for split in ("train", "test"))
        place = {name: i for i, name in enumerate(self.bank.train.classes)}
        truth = self.data.labels("test")
        if self.bank is not self.data:  # neither has several labels an image
            truth = torch.tensor([place[name] for name in self.data.train.classes])[truth]
        device = self.options.device
        return Problem(x, self.bank.labels("train").to(device), queries, truth.to(device), self.bank.classes)

    @property
    def name(self) -> str:
        parts = [self.protocol.name, *(map(str, self.part) if self.part else ())]
        return f"{self.data.name}/{'-'.join(parts)}/{self.network}"

    def key(self) -> str:
        """Of everything that the results depend on."""
        depends: dict[str, Any] = {"version": VERSION, "sample": self.data.sample, **self.protocol.depends(self)}
        for data, split in [(self.bank, "train"), (self.data, "test")]:
            store, ids = data.of(split)
            shown = self.suite.views(self.protocol.reads or "clean", self.encoder)
            depends[split] = features.describe(self.encoder, store, ids, shown)
        return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]


class Suite:
    """The evaluation of one encoder into one directory."""

    def __init__(self, trained: Encoder, out: Path, options: Options, say: Callable[[str], None] = print,
                 by: str = ""):  # fmt: skip
        self.options, self.out, self.say, self.trained = options, out, say, trained
        self.by = self.measured_by = by  # the command that is running, and the last one that measured anything
        self.cells: dict[str, list[dict]] = {}
        self.datasets: dict[str, dict] = {}
        self._baselines: dict[tuple[str, str], Encoder] = {}
        self._calibrated: set[str] = set()
        self._features: dict[tuple, Tensor] = {}
        self._engines: dict[int, Any] = {}
        self._read()

    # ---------------------------------------------------------------------------------------------------- on disk

    @property
    def file(self) -> Path:
        return self.out / "eval.json"

    def _read(self) -> None:
        """Cells of an earlier call, if they are of the same weights."""
        if not self.file.is_file():
            return
        try:
            content = json.loads(self.file.read_text())
            of = self.trained
            before = (content["checkpoint"], content["transform"], content["layers"], content["version"])
            same = before == (of.checkpoint, of.transform, of.layers, VERSION)
        except (ValueError, KeyError):
            same = False
        if not same:
            self.say(f"{self.file}: not used, it is of other weights, another input or version; evaluating again")
            return
        self.datasets, self.measured_by = content["datasets"], content.get("evaluated_by", "")
        for row in content["results"]:
            self.cells.setdefault(row["cell"], []).append(row)

    def content(self) -> dict[str, Any]:
        rows = [row for name in sorted(self.cells) for row in self.cells[name]]
        return {
            "version": VERSION,
            **{name: getattr(self.trained, name) for name in ENCODER},
            "evaluated_by": self.measured_by,
            "datasets": dict(sorted(self.datasets.items())),
            "table": [asdict(line) for line in tables.lines(rows)],
            "results": rows,
        }

    def write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        files.write(self.file, json.dumps(self.content(), indent=1) + "\n")

    # --------------------------------------------------------------------------------------------------- networks

    def engine(self, store: Store) -> Any:
        if id(store) not in self._engines:
            o, name = self.options, folder.engine_name(store, self.options.engine)
            self._engines[id(store)], _ = engines.create(name, store, o.device, threads=o.threads)
        return self._engines[id(store)]

    def encoder(self, network: str, data: Data) -> Encoder:
        """The network to be held against this dataset. An untrained one has batch-norm statistics of the dataset's training
        images, measured when they are first needed (`ready`)."""
        if network == "trained":
            return self.trained
        if (network, data.name) not in self._baselines:
            if network == "pixels":
                baseline = encoders.pixels(self.trained, len(data.train_ids) + len(data.test_ids))
            else:
                ids = self._calibration(data)
                text = f"{len(ids):,} training images of {data.name}"
                fresh = encoders.untrained(self.trained, self.options.seed, text)
                baseline = replace(fresh, recipe=f"{fresh.recipe} {data.train.fingerprint} {digest(ids)}")
            self._baselines[network, data.name] = baseline
        return self._baselines[network, data.name]

    def ready(self, network: str, data: Data) -> Encoder:
        encoder = self.encoder(network, data)
        if network == "untrained" and data.name not in self._calibrated and encoders.norms(encoder.module):
            ids, engine = self._calibration(data), self.engine(data.train)
            features.calibrate(encoder, data.train, ids, engine, device=self.options.device)
            self._calibrated.add(data.name)
        return encoder

    def _calibration(self, data: Data) -> np.ndarray:
        return sample(data.train.labels, data.train_ids, features.CALIBRATION, self.options.seed)

    # --------------------------------------------------------------------------------------------------- features

    def views(self, kind: str, encoder: Encoder) -> features.Views:
        return features.views_of(kind, encoder.policy, encoder.image_size, encoder.augment, self.options.seed)

    def features(self, network: str, data: Data, split: str, kind: str = "clean", by: Data | None = None) -> Tensor:
        """(N, V, F) on the CPU, from memory, the cache or the network. `by`: the dataset of the baselines' networks."""
        by = by or data
        key = (data.name, split, kind, network, *([by.name] if by is not data else []))
        if key in self._features:
            return self._features[key]
        begun, (store, ids), encoder = time.perf_counter(), data.of(split), self.encoder(network, by)
        if kind == "lidar":
            ids = sample(store.labels, ids, features.LIDAR_IMAGES, self.options.seed)
        shown = self.views(kind, encoder)

        def embed() -> Tensor:
            return features.embed(self.ready(network, by), store, ids, self.engine(store), batch=self.options.batch,
                                  device=self.options.device, views=shown)  # fmt: skip

        path = self.out / "features" / f"{'-'.join(key)}.safetensors"
        x, read = features.cached(path, features.describe(encoder, store, ids, shown), embed)
        how = f"{'read from the cache' if read else 'embedded'} in {time.perf_counter() - begun:.1f} s"
        self.say(f"features   {data.name} {split}, {network}, {kind}: {len(ids):,} images {how}")
        self._features[key] = x
        return x

    # ------------------------------------------------------------------------------------------------------ cells

    def plan(self, data: Data, own: Data | None) -> list[Cell]:
        """What there is to do on a dataset, in order. UserError where a part of it cannot be done."""
        self.trained.check(data.train)
        scored = data.labelled and not data.multilabel and any(p.labels for p in data.protocols)
        cells = [Cell(self, MAJORITY, data, "untrained")] if scored else []
        for network in ("trained", "untrained", "pixels"):
            for p in data.protocols:
                usable = (data.labelled or not p.labels) and (own is not None or not p.needs_own)
                usable &= not p.labels or p.several or not data.multilabel
                usable &= not p.learns_from_own or (own is not None and contained(data, own) and own.name != data.name)
                if usable and network in p.networks:
                    cells += [Cell(self, p, data, network, own, part) for part in p.parts]
        for cell in cells:
            cell.protocol.refuse(cell)
        return cells

    def run(self, data: Data, own: Data | None) -> None:
        """Every protocol on a dataset. `own`: the data the encoder was trained on, if it is here."""
        self._features.clear()
        self._forget(data)
        cells = self.plan(data, own)
        data.notes += _left_out(data, own)
        if data.classes == 2 and data.labelled and len(data.test_ids):
            rarer = data.train.classes[metrics.rarer(data.labels("test"))]
            data.notes.append(f"AP: average precision of {rarer}, the rarer class")
        sources = {name: self.encoder(name, data).source for name in ("untrained", "pixels")}
        self.datasets[data.name] = data.facts() | sources
        for cell in cells:
            self.measure(cell)

    def embed(self, data: Data, own: Data | None) -> None:
        """Every feature that `run` will read, into the cache: the part that several processes share."""
        self._features.clear()
        for cell in self.plan(data, own):
            for source, split in cell.inputs:
                self.features(cell.network, source, split, cell.protocol.reads, cell.bank)

    def measure(self, cell: Cell) -> None:
        """Write a cell's rows, unless the same was done before."""
        name, key = cell.name, cell.key()
        if self.cells.get(name) and self.cells[name][0]["key"] == key:
            return
        begun = time.perf_counter()
        self.measured_by = self.by
        results = self._results(cell, key)
        common = {
            "cell": name, "key": key, "run": self.trained.run,
            "checkpoint": f"{self.trained.checkpoint[:16]} {self.trained.variant}".strip(),
            "step": cell.encoder.step, "backbone": self.trained.backbone, "method": self.trained.method,
            "pretrained_on": self.trained.pretrained_on, "dataset": cell.data.name, "sample": cell.data.sample,
            "mode": "in-domain probe" if cell.protocol.learns_from_own else "retrained", "weights": cell.network,
        }  # fmt: skip
        added = "" if cell.network == "trained" or cell.protocol is MAJORITY else f"; {cell.encoder.source}"
        self.cells[name] = [common | row for r in results for row in rows(replace(r, text=r.text + added), cell.data)]
        self.say(f"{name}: {time.perf_counter() - begun:.1f} s" + "".join(
            f"\n    {r.protocol} ({r.norm}{f', draw {r.seed}' if r.seed else ''}): {_shown(r)}" for r in results))  # fmt: skip
        if self.cells[name]:
            self.write()

    def _results(self, cell: Cell, key: str) -> list[Result]:
        """What a protocol yields. A baseline that several targets of one command have in common is measured once."""
        shared = cell.network != "trained" and cell.protocol.reads == "clean"
        same = (cell.protocol.name, key)
        results = BASELINES[same] if shared and same in BASELINES else list(cell.protocol.run(cell))
        if shared:
            few = cell.data.classes <= CONFUSED  # of more, the scores are large and not shown
            BASELINES[same] = results if few else [replace(r, scores=None) for r in results]
        return results

    def _forget(self, data: Data) -> None:
        """Drop results on other images of this dataset: they would stand under numbers of images that are not theirs."""
        others = [name for name, rows in self.cells.items()
                  if rows and rows[0]["dataset"] == data.name and rows[0]["sample"] != data.sample]  # fmt: skip
        for name in others:
            del self.cells[name]
        if others:
            self.say(f"{self.file}: {len(others)} results on other images of {data.name} (--limit, --seed) are dropped")

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()


def contained(data: Data, own: Data) -> bool:
    """Whether a classifier of `own`'s classes can be tested on `data`."""
    return data.labelled and own.labelled and set(data.train.classes) <= set(own.train.classes)


def _left_out(data: Data, own: Data | None) -> list[str]:
    """What was asked for and is not measured on a dataset, and why."""
    notes = []
    few = [str(k) for k in knn.KS if k > len(data.train_ids)]
    if few and any(p.name == "knn" for p in data.protocols):
        notes.append(f"no kNN with k = {', '.join(few)}: only {len(data.train_ids)} training images")
    if data.multilabel and (single := [p.name for p in data.protocols if p.labels and not p.several]):
        notes.append(f"images have several labels, which {', '.join(single)} cannot be asked about")
    elsewhere = any(p.learns_from_own for p in data.protocols) and own is not None and own.name != data.name
    if elsewhere and own is not None and not contained(data, own):
        notes.append(f"no in-domain probe: its classes are not those of {own.name}")
    return notes


def _shown(r: Result) -> str:
    if r.score is None:
        return f"{tables.number(r.value)} {r.metric}"
    return f"{r.score.top1:.2%} [{r.score.low:.2%}, {r.score.high:.2%}]"


def rows(r: Result, data: Data) -> list[dict]:
    """One result as rows of the results table: one a metric."""
    common = {"protocol": r.protocol, "norm": r.norm, "seed": r.seed, "text": r.text,
              "n_train": len(data.train_ids)}  # fmt: skip
    if r.score is None:
        value = r.value if math.isfinite(r.value) else None  # JSON has no NaN
        return [common | {"metric": r.metric, "value": value, "low": None, "high": None, "n": len(data.train_ids)}]
    s = r.score
    estimates: dict[str, tuple] = {"top1": (s.top1, s.low, s.high), "top5": (s.top5, None, None),
                                   "mean_per_class": (s.mean_per_class, s.mean_low, s.mean_high)}  # fmt: skip
    if s.detection:
        estimates["average_precision"] = s.detection
    accuracies: list[dict] = [common | {"metric": metric, "value": value, "low": low, "high": high, "n": s.n}
                              for metric, (value, low, high) in estimates.items()]  # fmt: skip
    if r.scores is not None and data.classes <= CONFUSED:
        accuracies[0]["confusion"] = metrics.confusion(r.scores, data.labels("test")).tolist()
    return accuracies
