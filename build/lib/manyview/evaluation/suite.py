"""One encoder on several datasets, by several protocols: what `tools/evaluate.py TARGET` does.

The work is cut into cells (a protocol on a dataset with trained or untrained weights). A finished cell is written to
eval.json under a key of everything it depends on, so an interrupted evaluation goes on and a repeated one reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manyview.evaluation import encoder as encoders
from manyview.evaluation import features, fewshot, finetune, knn, metrics, protocols, tables, targets
from manyview.evaluation.encoder import Encoder
from manyview.evaluation.features import CLEAN, Views
from manyview.evaluation.protocols import Problem, Result
from manyview.pipeline import engines, plan, views
from manyview.pipeline.errors import UserError, nearest
from manyview.pipeline.store import Store, training_split

VERSION = 3
QUICK = ("knn", "linear", "ridge", "label-free", "overlap")
ALL = (*QUICK, "lidar", "averaged", "in-domain", "fewshot", "full")
PROTOCOLS = (*ALL, "transductive")
QUICK_LIMIT = 5_000
LIDAR_IMAGES, LIDAR_VIEWS, AVERAGED_VIEWS = 1000, 8, 16
OVERLAP_LIMIT, THUMBNAIL = 100_000, 16


@dataclass
class Options:
    """What does not belong to the encoder or the data."""

    protocols: tuple[str, ...] = QUICK
    limit: int = 0  # training images, and half as many test images; 0 = all
    seed: int = 0
    batch: int = 256
    epochs: int = 100  # of the linear probes
    preset: str = "byol2"  # of few-shot fine-tuning
    finetune_bn: bool = False
    finetune_epochs: int = 0  # 0 = the presets'
    engine: str = "auto"
    device: str = "cpu"
    threads: int | None = None
    policy: str = "simclr"  # of the views for LiDAR and averaging: the one the run was trained with
    augment: tuple[str, ...] = ()


@dataclass
class Data:
    """A dataset's two splits, and which of their samples are used."""

    path: Path
    train: Store
    test: Store
    train_ids: np.ndarray
    test_ids: np.ndarray
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.train.name

    @property
    def classes(self) -> int:
        return len(self.train.classes)

    @property
    def labelled(self) -> bool:
        return bool((self.train.labels >= 0).any()) and self.classes > 1

    def facts(self) -> dict[str, Any]:
        known = targets.TARGETS.get(self.name)
        return {"train": len(self.train_ids), "test": len(self.test_ids), "classes": self.train.classes,
                "shift": known.shift if known else "unknown", "metric": known.metric if known else "top1",
                "notes": self.notes}  # fmt: skip

    @cached_property
    def sample(self) -> str:
        """The identity of the images that are used."""
        parts = (self.train.fingerprint, digest(self.train_ids), self.test.fingerprint, digest(self.test_ids))
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]

    def labels(self, split: str) -> Tensor:
        store, ids = (self.train, self.train_ids) if split == "train" else (self.test, self.test_ids)
        return torch.from_numpy(np.asarray(store.labels[ids], np.int64))


def choose(names: Iterable[str]) -> tuple[str, ...]:
    """Protocol names with `quick` and `all` spelled out, in the order of `PROTOCOLS`."""
    wanted: set[str] = set()
    for name in names:
        if name not in (*PROTOCOLS, "quick", "all"):
            raise UserError(nearest("protocol", name, (*PROTOCOLS, "quick", "all")))
        wanted |= set({"quick": QUICK, "all": ALL}.get(name, (name,)))
    return tuple(p for p in PROTOCOLS if p in wanted)


def open_data(path: Path, options: Options) -> Data:
    """Open shards. `UserError` where the labels cannot carry the protocols that were asked for."""
    train, test = Store(path, "train"), Store(path, "val")
    labelled = np.flatnonzero(train.labels >= 0)
    needs_labels = [p for p in options.protocols if p not in ("label-free", "lidar", "overlap")]
    help_text = "only `--protocols label-free lidar` can be measured here"
    if needs_labels and not len(labelled):
        raise UserError(f"{path}: its train split has no labels: {help_text}")
    if needs_labels and not (test.labels >= 0).any():
        raise UserError(f"{path}: its val split has no labels: {help_text}")
    if needs_labels and len(train.classes) < 2:
        raise UserError(f"{path}: one class ({train.classes[0]}), so every answer would be right: {help_text}")
    classes = len(train.classes)
    jpeg = train.read(0).ndim == 1
    notes = targets.differences(train.name, train.labels, test.labels, classes, jpeg)
    train_ids = _sample(train.labels, labelled if len(labelled) else np.arange(len(train)), options.limit, options.seed)
    test_pool = np.flatnonzero(test.labels >= 0) if len(labelled) else np.arange(len(test))
    test_ids = _sample(test.labels, test_pool, options.limit // 2, options.seed)
    least = 20 if "transductive" in options.protocols else min(knn.KS) if "knn" in options.protocols else 0
    if len(train_ids) < least:
        raise UserError(f"{path}: kNN needs at least {least} training images, and these are {len(train_ids)}")
    for what, ids, store in (("training", train_ids, train), ("test", test_ids, test)):
        if len(ids) < len(store):
            why = f"seed {options.seed}, class-balanced" if options.limit else "those with labels"
            notes.append(f"{len(ids):,} of {len(store):,} {what} images ({why})")
    return Data(path, train, test, train_ids, test_ids, notes)


def _sample(labels: np.ndarray, pool: np.ndarray, limit: int, seed: int) -> np.ndarray:
    if not limit or len(pool) <= limit:
        return pool
    return pool[plan.subset(labels[pool], limit / len(pool), seed)]


class Suite:
    """The evaluation of one encoder into one directory."""

    def __init__(self, trained: Encoder, out: Path, options: Options, say: Callable[[str], None] = print):
        self.options, self.out, self.say, self.trained = options, out, say, trained
        self.cells: dict[str, list[dict]] = {}
        self.datasets: dict[str, dict] = {}
        self.seconds: dict[str, float] = {}
        self._untrained: dict[str, Encoder] = {}
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
            found = json.loads(self.file.read_text())
            same = found["checkpoint"] == self.trained.checkpoint and found["version"] == VERSION
        except (ValueError, KeyError):
            same = False
        if not same:
            self.say(f"{self.file}: not used, it is of other weights or another version; evaluating again")
            return
        self.datasets = found["datasets"]
        for row in found["results"]:
            self.cells.setdefault(row["cell"], []).append(row)

    def content(self) -> dict[str, Any]:
        encoder = self.trained
        rows = [row for name in sorted(self.cells) for row in self.cells[name]]
        return {
            "version": VERSION,
            "run": encoder.run,
            "checkpoint": encoder.checkpoint,
            "sha256": encoder.sha256,
            "source": encoder.source,
            "step": encoder.step,
            "backbone": encoder.backbone,
            "method": encoder.method,
            "pretrained_on": encoder.pretrained_on,
            "trained_by": encoder.trained_by,
            "image_size": encoder.image_size,
            "transform": f"centre square of {encoder.crop_ratio:g} of the short side, resized to {encoder.image_size} px",
            "datasets": dict(sorted(self.datasets.items())),
            "table": [asdict(line) for line in tables.lines(rows)],
            "results": rows,
        }

    def write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content(), indent=1) + "\n")
        os.replace(temporary, self.file)

    # --------------------------------------------------------------------------------------------------- features

    def engine(self, store: Store) -> Any:
        if id(store) not in self._engines:
            o = self.options
            self._engines[id(store)] = engines.create(o.engine, store, o.device, threads=o.threads)[0]
        return self._engines[id(store)]

    def encoder(self, weights: str, data: Data) -> Encoder:
        """The network; untrained, one for each dataset, with batch-norm statistics of that dataset's training images.

        They are measured when they are first needed: `ready`.
        """
        if weights == "trained":
            return self.trained
        if data.name not in self._untrained:
            ids = self._calibration(data)
            whose = f"{len(ids):,} training images of {data.name}"
            made = encoders.untrained(self.trained, self.options.seed, whose)
            self._untrained[data.name] = replace(made, recipe=f"{made.recipe} {data.train.fingerprint} {digest(ids)}")
        return self._untrained[data.name]

    def ready(self, weights: str, data: Data) -> Encoder:
        encoder = self.encoder(weights, data)
        if weights == "untrained" and data.name not in self._calibrated and encoders.norms(encoder.module):
            features.calibrate(
                encoder, data.train, self._calibration(data), self.engine(data.train), device=self.options.device
            )
            self._calibrated.add(data.name)
        return encoder

    def _calibration(self, data: Data) -> np.ndarray:
        return _sample(data.train.labels, data.train_ids, features.CALIBRATION, self.options.seed)

    def features(self, weights: str, data: Data, split: str, kind: str = "clean", by: Data | None = None) -> Tensor:
        """(N, V, F) on the CPU: `clean` (V = 1), `averaged` or `lidar`. `by`: the dataset of the untrained network."""
        by = by if by is not None and weights == "untrained" else data
        key = (data.name, split, kind, weights, *([by.name] if by is not data else []))
        if key not in self._features:
            begun = time.perf_counter()
            encoder = self.encoder(weights, by)
            store, ids = (data.train, data.train_ids) if split == "train" else (data.test, data.test_ids)
            ids = ids if kind != "lidar" else _sample(store.labels, ids, LIDAR_IMAGES, self.options.seed)
            shown = self.views(kind)

            def make() -> Tensor:
                return features.embed(self.ready(weights, by), store, ids, self.engine(store), batch=self.options.batch,
                                      device=self.options.device, views=shown)  # fmt: skip

            path = self.out / "features" / f"{'-'.join(key)}.safetensors"
            self._features[key], old = features.cached(path, features.describe(encoder, store, ids, shown), make)
            taken = time.perf_counter() - begun
            self.seconds[f"features/{'/'.join(key)}"] = taken
            self.say(f"features   {data.name} {split}, {weights}, {kind}: {len(ids):,} images"
                     f" {'read from the cache' if old else 'embedded'} in {taken:.1f} s")  # fmt: skip
        return self._features[key]

    def views(self, kind: str) -> Views:
        if kind == "clean":
            return CLEAN
        count = LIDAR_VIEWS if kind == "lidar" else AVERAGED_VIEWS - 1
        size = self.trained.image_size
        chosen = views.policy(self.options.policy, max(count, 3), size, views.overrides(self.options.augment))
        chosen = replace(chosen, groups=(replace(chosen.groups[0], count=count, size=size),))
        return Views(kind == "averaged", chosen, self.options.seed)

    def problem(self, weights: str, data: Data, kind: str = "clean") -> Problem:
        device = self.options.device
        both = (self.features(weights, data, split, kind) for split in ("train", "test"))
        x, queries = ((z.mean(1) if z.shape[1] > 1 else z[:, 0]).to(device) for z in both)
        return Problem(x, data.labels("train").to(device), queries, data.labels("test").to(device), data.classes)

    # ------------------------------------------------------------------------------------------------------ cells

    def cell(
        self,
        name: str,
        weights: str,
        data: Data,
        depends: dict,
        make: Callable[[], Iterable[Result]],
        by: Data | None = None,
    ) -> None:
        """Compute `make()` unless the same was done before, and write its rows. `by`: as in `features`."""
        encoder = self.encoder(weights, by or data)
        depends = depends | {
            "version": VERSION,
            "train": features.describe(encoder, data.train, data.train_ids),
            "test": features.describe(encoder, data.test, data.test_ids),
        }
        key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
        name = f"{data.name}/{name}/{weights}"
        if self.cells.get(name) and self.cells[name][0]["key"] == key:
            return
        begun = time.perf_counter()
        mode = "in-domain probe" if name.split("/")[1].startswith("in-domain") else "retrained"
        results = list(make())
        common = {
            "cell": name, "key": key, "run": encoder.run, "checkpoint": self.trained.checkpoint[:16],
            "step": encoder.step, "backbone": encoder.backbone, "method": encoder.method,
            "pretrained_on": encoder.pretrained_on, "dataset": data.name, "sample": data.sample, "mode": mode,
            "weights": weights,
        }  # fmt: skip
        added = f"; {encoder.source}" if weights == "untrained" and name.split("/")[1] != "majority" else ""
        self.cells[name] = [common | row for r in results for row in rows(replace(r, text=r.text + added), data)]
        self.seconds[name] = time.perf_counter() - begun
        self.say(f"{name}: {self.seconds[name]:.1f} s" + "".join(
            f"\n    {r.protocol} ({r.norm}{f', draw {r.seed}' if r.seed else ''}): {_shown(r)}" for r in results))  # fmt: skip
        if self.cells[name]:
            self.write()

    @property
    def uses_features(self) -> bool:
        """Whether any protocol that was asked for looks at the clean features."""
        return bool(set(self.options.protocols) - {"lidar", "averaged", "fewshot", "full", "overlap"})

    def run(self, data: Data, own: Data | None) -> None:
        """Every protocol on a dataset. `own`: the data the encoder was trained on, if it is here."""
        self._features.clear()
        self._forget(data)
        self.datasets[data.name] = data.facts() | {"untrained": self.encoder("untrained", data).source}
        self.majority(data)
        for weights in ("trained", "untrained"):
            self.on_features(weights, data)
            self.finetuned(weights, data)
        if own is not None and "overlap" in self.options.protocols:
            self.overlap(data, own)
        if own is not None and own.name != data.name and "in-domain" in self.options.protocols:
            self.in_domain(data, own)

    def _forget(self, data: Data) -> None:
        """Drop results on other images of this dataset: they would stand under numbers of images that are not theirs."""
        others = [name for name, rows in self.cells.items() if rows[:1] and rows[0]["dataset"] == data.name]
        others = [name for name in others if self.cells[name][0]["sample"] != data.sample]
        for name in others:
            del self.cells[name]
        if others:
            self.say(f"{self.file}: {len(others)} results on other images of {data.name} (--limit, --seed) are dropped")

    def embed(self, data: Data, own: Data | None) -> None:
        """Every feature that `run` will read, into the cache: the part that several processes share."""
        self._features.clear()
        asked = self.options.protocols
        kinds = ["clean"] * self.uses_features + ["averaged"] * ("averaged" in asked)
        for weights in ("trained", "untrained"):
            for kind in kinds:
                for split in ("train", "test"):
                    self.features(weights, data, split, kind)
            if "lidar" in asked:
                self.features(weights, data, "train", "lidar")
            if own is not None and own.name != data.name and "in-domain" in asked and contained(data, own):
                self.features(weights, own, "train")
                self.features(weights, data, "test", by=own)

    def majority(self, data: Data) -> None:
        if data.labelled:
            chance = metrics.majority(data.labels("train"), data.labels("test"), data.classes)
            result = Result("majority class", "none", "always the most frequent class of the training data", chance)
            self.cell("majority", "untrained", data, {}, lambda: [result])

    def on_features(self, weights: str, data: Data) -> None:
        o, asked = self.options, self.options.protocols
        probe: dict[str, Any] = {"seed": o.seed, "epochs": o.epochs}
        if data.labelled and "knn" in asked:
            many = [str(k) for k in knn.KS if k > len(data.train_ids)]
            if many and weights == "trained":
                data.notes.append(f"no kNN with k = {', '.join(many)}: only {len(data.train_ids)} training images")
            self.cell("knn", weights, data, {}, lambda: protocols.nearest_neighbours(self.problem(weights, data)))
        if data.labelled and "linear" in asked:
            make = lambda: protocols.linear_probes(self.problem(weights, data), **probe)  # noqa: E731
            self.cell("linear", weights, data, probe, make)
        if data.labelled and "ridge" in asked:
            self.cell("ridge", weights, data, {}, lambda: protocols.few_shots(self.problem(weights, data)))
        if data.labelled and "transductive" in asked:
            self.cell("transductive", weights, data, {}, lambda: protocols.transductive(self.problem(weights, data)))
        if "label-free" in asked:
            make = lambda: protocols.without_labels(self.features(weights, data, "train")[:, 0].to(o.device))  # noqa: E731
            self.cell("label-free", weights, data, {}, make)
        if "lidar" in asked:
            shown = self.views("lidar")
            make = lambda: protocols.lidar(self.features(weights, data, "train", "lidar"), o.policy)  # noqa: E731
            self.cell("lidar", weights, data, {"views": shown.text}, make)
        if data.labelled and "averaged" in asked:
            shown = self.views("averaged")
            make = lambda: protocols.averaged(  # noqa: E731
                self.problem(weights, data, "averaged"), views=AVERAGED_VIEWS, **probe
            )
            self.cell("averaged", weights, data, probe | {"views": shown.text}, make)

    def finetuned(self, weights: str, data: Data) -> None:
        o = self.options
        if not data.labelled:
            return
        jobs = [(f, s) for f in (0.01, 0.1) for s in fewshot.SEEDS] if "fewshot" in o.protocols else []
        for share, seed in jobs:
            subset = fewshot.subset(data.train.labels, share, seed, data.train_ids)
            subset.save(self.out / "subsets" / f"{data.name}-{share * 100:g}pct-seed{seed}.json")
            preset = o.preset if o.preset in finetune.PRESETS else f"{o.preset}-{share * 100:g}%"
            self._tune(f"fewshot-{share * 100:g}%", f"finetune {share * 100:g}%", weights, data, subset, preset, seed)
        if "full" in o.protocols:
            everything = fewshot.Subset(data.train_ids, 1.0, o.seed, 1.0)
            self._tune("full", "finetune full", weights, data, everything, "full", o.seed)

    def _tune(
        self, cell: str, name: str, weights: str, data: Data, subset: fewshot.Subset, preset_name: str, seed: int
    ) -> None:
        preset = finetune.PRESETS[preset_name]
        preset = replace(preset, epochs=self.options.finetune_epochs or preset.epochs)
        vit = finetune.is_vit(self.trained.module)
        extras = ", layer decay 0.65, label smoothing 0.1, drop path 0.2" if vit else ""
        text = (
            f"whole network trained on {len(subset.ids):,} labels ({subset.true_fraction:.3%} of the training images), preset"
            f" {preset_name}: SGD {preset.backbone_rate:g} / head {preset.head_rate:g} per 256, {preset.epochs} epochs,"
            f" {preset.warmup} of warm-up{extras}; last epoch"
        )
        bn = self.options.finetune_bn

        def make() -> Iterator[Result]:
            encoder, device = self.ready(weights, data), self.options.device
            with encoders.frozen(encoder.module):  # the tuned network is a copy
                model = finetune.train(encoder, data.train, subset.ids, data.classes, self.engine(data.train), preset,
                                       bn=bn, seed=seed, device=device)  # fmt: skip
            found = finetune.predict(model, encoder, data.test, data.test_ids, self.engine(data.test),
                                     batch=self.options.batch, device=device)  # fmt: skip
            yield Result(name, "bn" if bn else "raw", text, metrics.score(found, data.labels("test")), seed=seed)

        cell = f"{cell}-bn" if bn else cell
        self.cell(f"{cell}-draw{seed}", weights, data, {"preset": asdict(preset), "subset": subset.sha256}, make)

    # ------------------------------------------------------------------------------------------- between datasets

    def overlap(self, data: Data, own: Data) -> None:
        """Test images that are also in the pre-training data: byte for byte, and nearly, by 16-pixel thumbnails."""

        split = training_split(own.path)
        seen = own.train if split == "train" else Store(own.path, split)

        def make() -> Iterator[Result]:
            pool = _sample(seen.labels, np.arange(len(seen)), OVERLAP_LIMIT, self.options.seed)
            among = f"among {len(data.test_ids):,} test images, against {len(pool):,} of {len(seen):,} of {own.name}"
            known = {_digest(seen, i) for i in pool}
            same = sum(_digest(data.test, i) in known for i in data.test_ids)
            yield Result("overlap exact", "none", f"same stored bytes, {among}", metric="images", value=same)
            close, _ = protocols.overlap(self._thumbnails(seen, pool), self._thumbnails(data.test, data.test_ids))
            text = f"16 px thumbnails with correlation of 0.999 or more, {among}"
            yield Result("overlap near", "none", text, metric="images", value=close)

        self.cell("overlap", "trained", data, {"own": seen.fingerprint}, make)

    def _thumbnails(self, store: Store, ids: np.ndarray) -> Tensor:
        engine, parts = self.engine(store), []
        for start in range(0, len(ids), 1024):
            part = ids[start : start + 1024]
            drawn = views.clean(THUMBNAIL, store.heights[part], store.widths[part])
            parts.append(engine(part, drawn)[0][0].flatten(1).cpu())
        return torch.cat(parts)

    def in_domain(self, data: Data, own: Data) -> None:
        """The probe of the pre-training data, tested on another dataset without being trained there."""
        place = {name: i for i, name in enumerate(own.train.classes)}
        if not contained(data, own):
            data.notes.append(f"no in-domain probe: its classes are not those of {own.name}")
            return
        to_own = torch.tensor([place[name] for name in data.test.classes])
        for weights in ("trained", "untrained"):

            def make(weights: str = weights) -> Iterator[Result]:
                device = self.options.device
                x, queries = self.features(weights, own, "train"), self.features(weights, data, "test", by=own)
                truth = to_own[data.labels("test")].to(device)
                p = Problem(
                    x[:, 0].to(device), own.labels("train").to(device), queries[:, 0].to(device), truth, own.classes
                )
                for r in [
                    *protocols.nearest_neighbours(p),
                    *protocols.linear_probes(p, self.options.seed, self.options.epochs),
                ]:
                    yield replace(r, text=f"{r.text}; trained on {own.name}, not on {data.name}", scores=None)

            depends = {"own": features.describe(self.encoder(weights, own), own.train, own.train_ids),
                       "epochs": self.options.epochs, "seed": self.options.seed}  # fmt: skip
            self.cell(f"in-domain-{own.name}", weights, data, depends, make, by=own)

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()


def contained(data: Data, own: Data) -> bool:
    """Whether a classifier of `own`'s classes can be tested on `data`."""
    return data.labelled and own.labelled and set(data.train.classes) <= set(own.train.classes)


def digest(ids: np.ndarray) -> str:
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16]


def _digest(store: Store, i: int) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(store.read(int(i))).data, digest_size=16).digest()


def _shown(r: Result) -> str:
    if r.score is None:
        return f"{r.value:.4g} {r.metric}"
    return f"{r.score.top1:.2%} [{r.score.low:.2%}, {r.score.high:.2%}]"


def rows(r: Result, data: Data) -> list[dict]:
    """One result as rows of the results table: one a metric."""
    common = {"protocol": r.protocol, "norm": r.norm, "seed": r.seed, "text": r.text,
              "n_train": len(data.train_ids)}  # fmt: skip
    if r.score is None:
        return [common | {"metric": r.metric, "value": r.value, "low": None, "high": None, "n": len(data.train_ids)}]
    s = r.score
    made = [
        common | {"metric": "top1", "value": s.top1, "low": s.low, "high": s.high, "n": s.n},
        common | {"metric": "top5", "value": s.top5, "low": None, "high": None, "n": s.n},
        common | {"metric": "mean_per_class", "value": s.mean_per_class, "low": None, "high": None, "n": s.n},
    ]
    if r.scores is not None and data.classes <= 100:
        made[0]["confusion"] = metrics.confusion(r.scores, data.labels("test")).tolist()
    return made
