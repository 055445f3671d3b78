"""Work on a pool of processes that neither hangs nor leaves anything behind: with a progress bar and one way to fail."""

from __future__ import annotations

import ctypes
import io
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from manyview.pipeline.errors import UserError
from manyview.pipeline.machine import cores, keep_memory

LINE_SECONDS = 10.0  # between lines of progress where there is no terminal


class Workers(NamedTuple):
    """What a process has from its parent: its work, and in shared memory how many images, bytes, rejected images; and stop."""

    work: Callable
    totals: Any


workers: Workers  # set before the processes fork, so nothing is copied


class Stopped(Exception):
    """Another worker failed."""


def count(images: int, size: int, rejected: int) -> None:
    with workers.totals.get_lock():
        totals = workers.totals.get_obj()
        totals[0] += images
        totals[1] += size
        totals[2] += rejected


def check_stop() -> None:
    if workers.totals.get_obj()[3]:
        raise Stopped


def run(work: Callable, items: dict, *, jobs: int = 0, total: int | None = None, quiet: bool = False) -> dict:
    """`work(item)` for every item on a pool of processes; returns its results by the items' names.

    Workers call `count` after each image and `check_stop` before. UserError: disk full, not enough memory, a dead worker.
    """
    global workers  # noqa: PLW0603  what is set before a fork, its processes have
    results: dict = {}
    if not items:
        return results
    context = multiprocessing.get_context("fork")
    workers = Workers(work, context.Array("q", 4))
    totals = workers.totals
    executor = ProcessPoolExecutor(
        min(jobs or cores(), len(items)), mp_context=context, initializer=_start_worker, initargs=(os.getpid(),)
    )
    try:
        # Ctrl-C waits: an executor that is stopped while it starts its workers cannot be shut down, and they stay.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures = {executor.submit(_work, item): name for name, item in items.items()}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        with Progress(total, quiet) as progress:
            for future in _as_completed(set(futures), lambda: progress.update(*totals[:3])):
                results[futures[future]] = future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process died (killed, out of memory, or a decoder crashed); "
            "finished shards are kept, the same command goes on from them"
        ) from None
    except MemoryError as error:
        raise UserError(f"out of memory ({error}): fewer --jobs or --max-pixels; finished shards are kept") from error
    except OSError as error:
        raise UserError(f"{error.strerror or error}: {error.filename or 'output'}; finished shards are kept") from error
    finally:
        totals[3] = 1
        executor.shutdown(wait=True, cancel_futures=True)
    return results


def _work(item):
    return workers.work(item)


def _as_completed(pending: set[Future], tick: Callable[[], None]) -> Iterator[Future]:
    while pending:
        done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
        tick()
        # The first error is the cause; those who stopped because of it are not.
        yield from sorted(done, key=lambda future: isinstance(future.exception(), Stopped))


def _start_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphans when the parent is killed
    keep_memory()
    if os.getppid() != parent:
        os._exit(1)
    import cv2

    cv2.setNumThreads(0)


class Progress:
    """How far it is, with images/s and time left, on stderr: a bar on a terminal; elsewhere, where a bar would be one endless
    line, a line now and then and at the end."""

    def __init__(self, total: int | None, quiet: bool) -> None:
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # no thread of its own
        self.lines, self.quiet, self.start, self.shown = not sys.stderr.isatty(), quiet, time.perf_counter(), 0.0
        self.bar = tqdm(
            total=total, unit="img", disable=quiet, smoothing=0.1, file=io.StringIO() if self.lines else sys.stderr
        )

    def update(self, images: int, size: int = 0, rejected: int = 0) -> None:
        """How many there are by now; `size`: of them, in bytes."""
        self.bar.update(images + rejected - self.bar.n)
        seconds = time.perf_counter() - self.start
        if size:
            self.bar.set_postfix_str(f"{size / 1e6 / seconds:.0f} MB/s, {rejected} rejected", refresh=False)
        if seconds - self.shown > LINE_SECONDS:
            self._line(seconds)

    def _line(self, seconds: float) -> None:
        self.shown = seconds
        if self.lines and not self.quiet:
            print(str(self.bar).replace("\r", ""), file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self._line(time.perf_counter() - self.start)
        self.bar.close()
