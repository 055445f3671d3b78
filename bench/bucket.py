"""Reading shards from a bucket: python tools/profile.py bucket --data s3://bucket/NAME

Records are read as training reads them, announced ahead and by several threads, but nothing is decoded. Two epochs for each
order and each size of the cache, which begins empty: the first shows what the storage gives, the second what was kept.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from manyview.bench import output
from manyview.bench.harness import CPU
from manyview.pipeline import plan as plans
from manyview.pipeline import storage
from manyview.pipeline.errors import UserError
from manyview.pipeline.loader import CATCH_UP
from manyview.pipeline.machine import cores
from manyview.pipeline.store import Store


@dataclass
class Args:
    data: Path
    """Address of shards, such as s3://bucket/name."""
    batch_size: int = 256
    """Images a step."""
    steps: int = 0
    """Steps an epoch; 0 = all of them."""
    threads: int = 0
    """Threads that read; 0 = one a core."""
    caches: tuple[float, ...] = (1.5, 0.5)
    """Sizes of the cache, in sizes of the split."""
    window: int = plans.WINDOW
    """Blocks of 512 images that `blocks` order mixes; fewer than in training where the set is too small to show anything."""
    json: Path | None = None
    """Where to write the result; the same name with .md gets the table."""


def main(argv: list[str]) -> None:
    args = output.parse(Args, argv, __doc__, "bucket", batch_size=1, steps=0, threads=0, caches=0, window=1)
    if storage.address(args.data) is None:
        raise UserError(f"--data {args.data} is a folder; this reads from an address such as s3://bucket/name")
    plans.MIXED = plans.BLOCK * args.window
    env = output.environment(CPU, "bucket", argv)
    rows: list[dict[str, Any]] = []
    for order, share in ((order, share) for order in plans.ORDERS for share in args.caches):
        with tempfile.TemporaryDirectory() as folder:
            rows += epochs(args, order, share, folder)
    with closing(Store(args.data)) as store:
        about = f"{len(store):,} images, {store.nbytes() / 1e6:,.0f} MB in {len(store.shards)} shards"
    command = f"`python {env['command']}`, commit {env['commit']}, {cores()} cores, load {env['load']:.1f}"
    text = page(rows, f"{command}: {about}.")
    print(text)
    output.write(args.json, {"environment": env, "rows": rows}, text)


def epochs(args: Args, order: str, share: float, folder: str) -> Iterator[dict[str, Any]]:
    """Rows of two epochs through one cache."""
    with closing(Store(args.data)) as store:
        size = sum(shard["bytes"] for shard in store.shards)
    os.environ |= {"MANYVIEW_CACHE": folder, "MANYVIEW_CACHE_GB": str(share * size / 1e9)}
    for epoch in range(2):
        with closing(Store(args.data)) as store:
            begun = time.perf_counter()
            images, payloads = one_epoch(args, store, order, epoch)
            seconds = time.perf_counter() - begun
            assert store.bucket is not None
            yield {"order": order, "cache": share, "epoch": epoch + 1, "images": images, "bytes": payloads,
                   "seconds": seconds} | {f"bucket_{name}": n for name, n in store.bucket.counts.items()}  # fmt: skip


def one_epoch(args: Args, store: Store, order: str, epoch: int) -> tuple[int, int]:
    """(images, bytes of their payloads), read and announced as `Loader` does."""
    plan = plans.plan(len(store), seed=0, batch=args.batch_size, order=order)
    steps = args.steps or plan.steps(1)
    first = told = epoch * steps
    reading = plan.reading(first, first + steps)
    images = size = 0
    with ThreadPoolExecutor(args.threads or cores()) as pool:
        for step in range(first, first + steps):
            for ids in islice(reading, min(CATCH_UP, step + plan.ahead - told)):
                store.prefetch(ids)
                told += 1
            payloads = list(pool.map(store.read, plan.batch(step)[0].tolist()))
            images, size = images + len(payloads), size + sum(payload.nbytes for payload in payloads)
    return images, size


def page(rows: list[dict[str, Any]], about: str) -> str:
    head = ("order", "cache", "epoch", "images/s", "MB/s", "fetched / read", "requests", "in the cache")
    lines = [
        [r["order"], f"{r['cache']:g} x the split", r["epoch"], f"{r['images'] / r['seconds']:,.0f}",
         f"{r['bytes'] / r['seconds'] / 1e6:,.0f}", f"{r['bucket_bytes'] / r['bytes']:.2f}", r["bucket_requests"],
         f"{r['bucket_hits'] / (r['bucket_hits'] + r['bucket_misses']):.1%}"]
        for r in rows
    ]  # fmt: skip
    return output.document(about, output.table(head, lines))
