"""The same conversion on a Ray cluster: a task a shard, tried again where its worker dies.

Every node needs this checkout, its environment, the source and the output under the same paths, so a file system that
the nodes share. What is written is byte for byte what the local pool writes.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from itertools import islice
from typing import Any

from manyview.pipeline.convert import pool
from manyview.pipeline.errors import UserError

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before Ray is loaded: it reports to nobody
RETRIES = 3  # of a shard whose worker died


def run(work: Callable, items: dict, *, jobs: int = 0, total: int | None = None, quiet: bool = False) -> dict:
    """`work(row)` for every row on a Ray cluster: the one in RAY_ADDRESS, or that of this machine.

    Returns the results by the rows' names.

    jobs: tasks at a time; 0 = as many as the cluster has CPUs. UserError: no Ray or no cluster, the disk is full, or a
    shard's worker died again and again.
    """
    if not items:
        return {}
    ray, ours = _connect(quiet)
    under_way, results = {}, {}  # type: ignore[var-annotated]
    try:
        reference, task = ray.put(work), ray.remote(num_cpus=1, max_retries=RETRIES)(_work)
        rows, images = iter(items.items()), 0
        with pool.Progress(total, quiet) as progress:
            while len(results) < len(items):
                limit = jobs or 2 * int(ray.cluster_resources().get("CPU", 1))  # some in the queue: clusters grow by it
                for name, row in islice(rows, max(0, limit - len(under_way))):
                    under_way[task.remote([reference], row)] = name
                for done in ray.wait(list(under_way))[0]:
                    name = under_way.pop(done)
                    results[name] = _result(ray, done, name)
                    images += len(items[name].samples)
                    progress.update(images)
    finally:
        for unfinished in under_way:
            ray.cancel(unfinished, force=True)
        if ours:
            ray.shutdown()
    return results


def _connect(quiet: bool) -> tuple[Any, bool]:
    """(the ray module, connected; whether the connection is ours to close)."""
    try:
        import ray
    except ImportError:
        raise UserError("the executor ray needs Ray: pip install 'manyview[ray]', or pip install ray") from None
    if ray.is_initialized():
        return ray, False
    try:
        ray.init(address="auto", logging_level=logging.ERROR, log_to_driver=False)
    except ConnectionError as error:
        raise UserError(
            f"{str(error).splitlines()[0]}: start one here with `ray start --head`, or name one in RAY_ADDRESS;"
            " where it asks for a token, RAY_AUTH_MODE=token sends it"
        ) from None
    if not quiet:
        print(f"Ray: {len(ray.nodes())} node(s), {ray.cluster_resources().get('CPU', 0):g} CPUs", file=sys.stderr)
    return ray, True


def _work(reference: list, row: Any) -> dict:
    """In a worker: what a forked process of the local pool inherits, then the same work."""
    pool.workers = pool.Workers(_fetch(reference[0]), multiprocessing.Array("q", 4))
    return pool.workers.work(row)


@lru_cache(maxsize=1)
def _fetch(reference: Any) -> Any:
    """The work, unpacked once a worker: it holds the listing of the whole source."""
    import cv2
    import ray

    cv2.setNumThreads(0)  # the cores are the cluster's to share out
    return ray.get(reference)


def _result(ray: Any, done: Any, name: str) -> dict:
    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as error:  # raised by the work itself: no use in doing it again
        cause = error.cause
        if not isinstance(cause, OSError):
            raise cause from None
        text = f"{name}: {cause.strerror or cause}: {cause.filename or 'output'}; finished shards are kept"
    except ray.exceptions.RayError as error:  # killed, out of memory, a decoder crashed, a node without this program
        reason = str(error).splitlines()[0]
        text = (
            f"{name}, tried {RETRIES + 1} times: {reason} Finished shards are kept, the same command goes on from them"
        )
    raise UserError(text)
