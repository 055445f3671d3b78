"""An index of any number of samples, generated, and what a fresh process takes to start on it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from isal.isal_zlib import crc32

from manyview.bench.harness import memory
from manyview.pipeline import index
from manyview.pipeline.manifest import Options, write_manifest
from manyview.pipeline.plan import plan
from manyview.pipeline.store import Store

KEY = 28  # bytes of a key, as ImageNet's
CHUNK = 4_000_000  # rows of an index that are generated at a time


def generate(out: Path, n: int, image_bytes: int, per_shard: int) -> None:
    """Shards whose index is written row by row and whose tars are files of the right length with nothing in them."""
    rows: list[dict[str, Any]] = []
    for i, first in enumerate(range(0, n, per_shard)):
        count = min(per_shard, n - first)
        rows.append({"file": f"train-{i:06d}.tar", "count": count, "bytes": count * image_bytes, "sha256": ""})
        with open(out / rows[-1]["file"], "wb") as file:
            file.truncate(count * image_bytes)
    write_index(out / "train.index", n, image_bytes, per_shard)
    part = {"count": n, "rejected": 0, "mean": [0.0] * 3, "std": [1.0] * 3, "fingerprint": "", "shards": rows}
    with open(out / "train.index", "rb") as file:
        part["index"] = {"file": "train.index", "sha256": index.sha256(file)}
    write_manifest(out, Options("imagenet"), [], {"train": part}, 0, "")


def write_index(path: Path, n: int, image_bytes: int, per_shard: int) -> None:
    """An index as `index.write` makes it, a chunk of rows at a time: hundreds of millions do not fit in memory."""
    with open(path, "wb") as file:
        file.write(np.array([(index.MAGIC, index.VERSION, n, n * KEY)], index.HEADER).tobytes())
        file.truncate(64)
        at, crc = 64, crc32(bytes(image_bytes))
        for name, kind in (*index.COLUMNS.items(), ("key_starts", np.uint64), ("keys", np.uint8)):
            file.seek(at)
            end = n + (name == "key_starts")
            for first in range(0, end, CHUNK):
                row = np.arange(first, min(first + CHUNK, end))
                column(name, row, image_bytes, per_shard, crc).astype(kind).tofile(file)
            file.flush()
            at = -(-file.tell() // 64) * 64
        file.truncate(at)


def column(name: str, row: np.ndarray, image_bytes: int, per_shard: int, crc: int) -> np.ndarray:
    """The values of these rows: photos of a thousand classes and of several sizes."""
    if name == "keys":
        keys = np.full((len(row), KEY), ord("n"), np.uint8)
        for digit in range(10):
            keys[:, -1 - digit] = row // 10**digit % 10 + ord("0")
        return keys
    values: dict[str, Any] = {
        "label": row % 1000, "offset": row % per_shard * image_bytes, "length": image_bytes, "shard": row // per_shard,
        "height": 300 + row % 201, "width": 500 - row % 101, "crc": crc, "kind": 0, "key_starts": row * KEY,
    }  # fmt: skip
    return np.broadcast_to(values[name], len(row))


def started(folder: str, order: str, batch: int, world: int) -> dict[str, float]:
    """In a process of its own: what train.py does before its first step with the last of `world` ranks, and what it takes.

    `own_bytes`: memory that every rank has for itself; `peak_bytes`: at most, pages of the index included, which are shared.
    """
    plan(10, seed=0, batch=2, order=order).batch(0)  # compiled
    before = memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    times = [time.perf_counter()]
    store = Store(folder)
    times.append(time.perf_counter())
    store.default_size()
    times.append(time.perf_counter())
    order_of = plan(store.labels, seed=0, batch=batch, world=world, rank=world - 1, order=order)
    order_of.batch(0)
    times.append(time.perf_counter())
    after, steps = memory(), order_of.steps(1) + 1
    times.append(time.perf_counter())
    order_of.batch(steps)
    times.append(time.perf_counter())
    for step in range(10):
        order_of.batch(steps + step)
    times.append(time.perf_counter())
    took = np.diff(times).tolist()
    return {
        "open_s": took[0], "size_s": took[1], "plan_s": took[2], "epoch_s": took[4], "batch_ms": 100 * took[5],
        "own_bytes": after["RssAnon"] - before["RssAnon"], "peak_bytes": after["VmHWM"] - before["VmRSS"],
    }  # fmt: skip
