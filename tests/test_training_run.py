from __future__ import annotations

import time

from manyview.training.run import Clock


def test_the_clock_counts_training_over_resumes_and_nothing_else(monkeypatch):
    now = {"wall": 1000.0, "core": 50.0}
    monkeypatch.setattr(time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(time, "process_time", lambda: now["core"])

    def passes(wall: float, core: float) -> None:
        now["wall"] += wall
        now["core"] += core

    clock = Clock(seconds=60.0, core_seconds=90.0)  # of the checkpoint
    passes(7, 7)  # start-up
    assert (clock.seconds, clock.core_seconds) == (60, 90)
    clock.start()
    passes(10, 15)
    assert (clock.seconds, clock.core_seconds) == (70, 105)
    clock.stop()
    passes(5, 9)  # probes
    clock.start()
    passes(1, 2)
    assert (clock.seconds, clock.core_seconds) == (71, 107)
