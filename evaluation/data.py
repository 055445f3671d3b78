"""What is evaluated on: the images to learn from and those to score, and which of them are used."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from manyview.evaluation import folder, linear, targets
from manyview.evaluation.labels import Labels
from manyview.pipeline import plan, storage
from manyview.pipeline.codec import RGB, Layout
from manyview.pipeline.errors import UserError
from manyview.pipeline.store import Store

if TYPE_CHECKING:
    from manyview.evaluation.protocols import Protocol


@dataclass
class Data:
    """Images to learn from and, where a protocol scores any, to test on; they may lie in one store."""

    path: Path
    train: Store
    test: Store
    train_ids: np.ndarray
    test_ids: np.ndarray  # none where nothing is scored
    protocols: tuple[Protocol, ...] = ()  # that are measured on it
    notes: list[str] = field(default_factory=list)
    table: Labels | None = None  # that the labels come from, instead of the shards
    truth: dict[str, np.ndarray] = field(default_factory=dict)  # of several labels an image: (n, C) by split

    @property
    def name(self) -> str:
        return self.train.name

    @property
    def classes(self) -> int:
        return len(self.train.classes)

    @property
    def labelled(self) -> bool:
        return bool((self.train.labels >= 0).any()) and self.classes > 1

    @property
    def multilabel(self) -> bool:
        return self.table is not None and self.table.several

    def facts(self) -> dict[str, Any]:
        known = targets.TARGETS.get(self.name)
        return {"train": len(self.train_ids), "test": len(self.test_ids), "classes": self.train.classes,
                "shift": known.shift if known else "unknown", "metric": known.metric if known else "top1",
                "notes": self.notes}  # fmt: skip

    @cached_property
    def sample(self) -> str:
        """The identity of the images that are used."""
        labels = self.table.digest if self.table else ""
        parts = (labels, self.train.fingerprint, digest(self.train_ids), self.test.fingerprint, digest(self.test_ids))
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]

    def of(self, split: str) -> tuple[Store, np.ndarray]:
        """The store and the ids of `train` or `test`."""
        return (self.train, self.train_ids) if split == "train" else (self.test, self.test_ids)

    def labels(self, split: str) -> Tensor:
        """(n,) class numbers, or (n, C) bool where an image may have several."""
        store, ids = self.of(split)
        if self.multilabel:
            return torch.from_numpy(self.truth[store.split][ids])
        return torch.from_numpy(np.asarray(store.labels[ids], np.int64))


def open_data(
    path: Path, protocols: Sequence[Protocol] = (), *, groups: bool = False, limit: int = 0, seed: int = 0,
    table: Labels | None = None, layout: Layout = RGB,
) -> Data:  # fmt: skip
    """Open shards, or a folder of image files, for these protocols: a split is asked for only where one of them reads it.

    Of images without labels, those that need labels are left out where they were asked for by a group's name alone
    (`groups`). Without a split `val` a seeded tenth of the labelled training images is held out to be scored.
    `limit`: at most so many training images and half as many test images, class-balanced. `table`: labels instead of the
    shards' own. `layout`: of files; shards say theirs. UserError where the labels cannot carry what is asked for.
    """
    present = folder.opened(path, layout)
    needed = any(p.labels for p in protocols) and not groups
    split = "unlabelled" if "train" not in present and not needed else "train"
    if split not in present:
        raise UserError(f"{storage.where(path)} has no split {split!r}; it has {', '.join(present)}")
    train = present[split]()
    truth = {train.split: table.apply(train)} if table else {}
    data = Data(path, train, train, _known(train), np.arange(0), tuple(protocols), table=table, truth=truth)
    data.notes += getattr(train, "notes", [])
    if any(p.labels for p in protocols):
        _check_labels(data, present, groups)
    if any(p.test for p in data.protocols):
        _choose_test(data, present, seed)
    data.train_ids = _limited(data, "train", limit, seed)
    data.test_ids = _limited(data, "test", limit // 2, seed)
    least = max((p.least for p in data.protocols), default=0)
    if len(data.train_ids) < least:
        raise UserError(f"{path}: kNN needs at least {least} training images, and these are {len(data.train_ids)}")
    return data


def _known(store: Any) -> np.ndarray:
    """The ids of the images with labels, of all where none has one; files that are no images aside."""
    ids = np.delete(np.arange(len(store)), np.array(sorted(getattr(store, "unusable", ())), np.int64))
    known = ids[store.labels[ids] >= 0]
    return known if len(known) else ids


def _check_labels(data: Data, present: dict[str, Any], groups: bool) -> None:
    """UserError, or where the protocols were no explicit wish, fewer of them, if there are no labels to learn from."""
    if not (data.train.labels >= 0).any():
        reason = "its train split has no labels"
    elif "val" in present and not data.table and not (present["val"]().labels >= 0).any():
        reason = "its val split has no labels"
    elif data.classes < 2:
        reason = f"one class ({data.train.classes[0]}), so every answer would be right"
    else:
        return
    if not groups:
        raise UserError(f"{data.path}: {reason}: only `--protocols label-free lidar` can be measured here")
    data.protocols = tuple(p for p in data.protocols if not p.labels and (not p.test or "val" in present))
    data.notes.append(f"{reason}: only {', '.join(p.name for p in data.protocols)} can be measured here")


def _choose_test(data: Data, present: dict[str, Any], seed: int) -> None:
    """The split `val`, or a part of the training images that is then not learnt from."""
    if "val" in present:
        data.test = present["val"]()
        if data.table:
            data.truth["val"] = data.table.apply(data.test)
        data.notes += [note for note in getattr(data.test, "notes", []) if note not in data.notes]
        data.test_ids = _known(data.test)
    else:
        out = linear.held_out(torch.from_numpy(np.asarray(data.train.labels[data.train_ids], np.int64)), seed).numpy()
        data.train_ids, data.test_ids = data.train_ids[~out], data.train_ids[out]
        data.notes.append(f"no val split: a tenth of each class (seed {seed}) is held out to be tested on")
    learnt, scored = (s.labels if "val" in present else s.labels[ids] for s, ids in map(data.of, ("train", "test")))
    jpeg = len(data.train_ids) > 0 and data.train.read(int(data.train_ids[0])).ndim == 1
    data.notes += targets.differences(data.name, learnt, scored, data.classes, jpeg)


def _limited(data: Data, what: str, limit: int, seed: int) -> np.ndarray:
    store, pool = data.of(what)
    ids = sample(store.labels, pool, limit, seed)
    if len(ids) < len(pool) or (0 < len(pool) < len(store) and data.test is not data.train):
        why = f"seed {seed}, class-balanced" if limit else "those with labels"
        data.notes.append(f"{len(ids):,} of {len(store):,} {'training' if what == 'train' else what} images ({why})")
    return ids


def sample(labels: np.ndarray, pool: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """At most `limit` of the ids `pool`, class-balanced; all where `limit` is 0."""
    if not limit or len(pool) <= limit:
        return pool
    return pool[plan.subset(labels[pool], limit / len(pool), seed)]


def digest(ids: np.ndarray) -> str:
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16]
