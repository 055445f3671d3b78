from __future__ import annotations

import io
import time

import pytest

from manyview.pipeline.convert import pool
from manyview.pipeline.errors import UserError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch, stream: io.StringIO, quiet: bool = False) -> str:
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(pool, "LINE_SECONDS", 0.02)
    with pool.Progress(100, quiet) as progress:
        for images in (10, 40, 90):
            time.sleep(0.03)
            progress.update(images, images * 1000, 2)
        progress.update(98, 100_000, 2)
    return stream.getvalue()


def test_progress_is_lines_in_a_pipe_and_a_bar_on_a_terminal(monkeypatch):
    text = shown(monkeypatch, io.StringIO())
    lines = text.splitlines()
    assert "\r" not in text and len(lines) >= 3
    assert "12/100" in lines[0] and "100/100" in lines[-1] and "2 rejected" in lines[-1]
    assert "\r" in shown(monkeypatch, Terminal())
    assert shown(monkeypatch, io.StringIO(), quiet=True) == shown(monkeypatch, Terminal(), quiet=True) == ""


def out_of_memory(item: int) -> None:
    raise MemoryError("Unable to allocate 93.1 GiB")


def test_too_little_memory_stops_and_says_so():
    with pytest.raises(UserError, match=r"out of memory \(Unable to allocate 93.1 GiB\): fewer --jobs"):
        pool.run(out_of_memory, {"a": 1}, quiet=True)
