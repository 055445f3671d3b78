"""Reading shards from a bucket: python tools/profile.py bucket --data s3://bucket/NAME

Records are read as training reads them, announced ahead and by several threads, but nothing is decoded. Two epochs for each
order and each size of the cache, which begins empty: the first shows what the storage gives, the second what was kept.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tyro

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
    batch: int = 256
    """Images a step."""
    steps: int = 0
    """Steps an epoch; 0 = all of them."""
    threads: int = 0
    """Threads that read; 0 = one a core."""
    caches: tuple[float, ...] = (1.5, 0.5)
    """Sizes of the cache, in sizes of the split."""
    window: int = plans.WINDOW
    """Blocks of 512 images that `blocks` order mixes; fewer than in training where the set is too small to show anything."""
    write: Path | None = None
    """A markdown file for the table."""


def main(argv: list[str]) -> None:
    args = tyro.cli(Args, args=argv, description=__doc__, prog="profile.py bucket")
    if storage.address(args.data) is None:
        raise UserError(
            f"--data {args.data} is a folder; `profile.py bucket` reads from an address such as s3://bucket/name"
        )
    plans.MIXED = plans.BLOCK * args.window
    lines = ["| order | cache | epoch | images/s | MB/s | fetched / read | requests | in the cache |", "|" + "---|" * 8]
    for order in plans.ORDERS:
        for share in args.caches:
            with tempfile.TemporaryDirectory() as folder:
                lines += [f"| {order} | {share:g} x the split | {row} |" for row in rows(args, order, share, folder)]
    print("\n".join(lines))
    if args.write:
        store = Store(args.data)
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout
        about = [
            f"`python tools/profile.py bucket {' '.join(argv)}`, commit {commit.strip()}, {cores()} cores, load "
            f"{os.getloadavg()[0]:.1f}: {len(store):,} images, {store.nbytes() / 1e6:,.0f} MB in {len(store.shards)} shards.",
            "",
        ]
        args.write.write_text("\n".join([*about, *lines, ""]))


def rows(args: Args, order: str, share: float, folder: str) -> list[str]:
    """Table rows of two epochs through one cache."""
    os.environ["MANYVIEW_CACHE"] = folder
    size = sum(shard["bytes"] for shard in Store(args.data).shards)
    os.environ["MANYVIEW_CACHE_GB"] = str(share * size / 1e9)
    found = []
    for epoch in range(2):
        store = Store(args.data)
        counts, seconds, images, read = one_epoch(args, store, order, epoch)
        store.close()
        hits = counts["hits"] / (counts["hits"] + counts["misses"])
        found.append(
            f"{epoch + 1} | {images / seconds:,.0f} | {read / seconds / 1e6:,.0f} | {counts['bytes'] / read:.2f} | "
            f"{counts['requests']} | {hits:.1%}"
        )
    return found


def one_epoch(args: Args, store: Store, order: str, epoch: int) -> tuple[dict[str, int], float, int, int]:
    """(the bucket's counts, seconds, images, bytes of their payloads), read and announced as `Loader` does."""
    plan = plans.plan(len(store), seed=0, batch=args.batch, order=order)
    steps = args.steps or plan.steps(1)
    first = told = epoch * steps
    reading = plan.reading(first, first + steps)
    images = size = 0
    begun = time.perf_counter()
    with ThreadPoolExecutor(args.threads or cores()) as pool:
        for step in range(first, first + steps):
            for ids in islice(reading, min(CATCH_UP, step + plan.ahead - told)):
                store.prefetch(ids)
                told += 1
            payloads = list(pool.map(store.read, plan.batch(step)[0].tolist()))
            images, size = images + len(payloads), size + sum(payload.nbytes for payload in payloads)
    seconds = time.perf_counter() - begun
    assert store.bucket is not None
    return store.bucket.counts, seconds, images, size
