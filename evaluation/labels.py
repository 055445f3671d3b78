"""Labels from a table at evaluation: other ones than the shards hold, or several an image."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from manyview.pipeline.convert.sources import tables
from manyview.pipeline.errors import UserError


class Labels:
    """A table of file names and classes, several of them with `;` or `|` between. UserError where it is none."""

    def __init__(self, path: Path):
        table = tables.read(path, ("", ""))
        if table is None:
            raise UserError(f"{path} has no column of labels: call it label, class or category")
        self.path, self.digest = path, hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        self.by_name: dict[str, list[str]] = {}
        for parts, text in zip(table.paths, table.labels):
            names = [name.strip() for name in re.split(r"[;|]", text or "")]
            self.by_name[os.path.splitext("/".join(parts))[0]] = list(filter(None, names))
        self.classes = tables.classes(sorted({name for names in self.by_name.values() for name in names}))
        self.several = any(len(names) > 1 for names in self.by_name.values())
        last = [name.rpartition("/")[2] for name in self.by_name]
        count = Counter(last)
        self.by_last = {name: key for name, key in zip(last, self.by_name) if count[name] == 1}

    def apply(self, store: Any) -> np.ndarray:
        """Give `store` these labels and classes; returns (n, C) bool, all False of an image that the table does not name.

        UserError where it names none of them.
        """
        number = {name: i for i, name in enumerate(self.classes)}
        truth = np.zeros((len(store), len(self.classes)), bool)
        for i in range(len(store)):
            key = os.path.splitext(store.key(i))[0]  # of a file; keys of shards have no dots
            alike = (f"{store.split}/{key}", key, self.by_last.get(key.rpartition("/")[2], ""))
            names = next((self.by_name[name] for name in alike if name in self.by_name), [])
            truth[i, [number[name] for name in names]] = True
        if not truth.any():
            first = next(iter(self.by_name), "missing")
            raise UserError(f"{self.path} names no image of {store.name} {store.split}: its first is {first}")
        store.labels = np.where(truth.any(1), truth.argmax(1), -1)
        store.classes = self.classes
        return truth
