"""Every command line of tools/bench.sh and of results/PENDING.md is understood by what it calls; nothing is measured."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import tyro

from manyview.tools import profile

ROOT = Path(__file__).resolve().parents[1]
VALUES = {"PHOTOS": "photos", "small": "shards/cifar10", "data": "shards/photos"}


def lines() -> list[list[str]]:
    """The words of each call of a tool, variables filled in."""
    text = re.sub(r"\\\n", " ", (ROOT / "tools" / "bench.sh").read_text())
    calls = re.findall(r"\$python (tools/.*)$", text, re.MULTILINE)
    filled = [re.sub(r"\$\{?(\w+)\}?", lambda found: VALUES[found[1]], call) for call in calls]
    return [shlex.split(call) for call in filled]


def parse(words: list[str]) -> Any:
    """What the tool's own parser makes of them; SystemExit where it does not understand."""
    tool, *rest = words
    if tool == "tools/profile.py":
        name = profile.MODULES.get(rest[0], rest[0])
        return tyro.cli(importlib.import_module(f"manyview.bench.{name}").Args, args=rest[1:])
    spec = importlib.util.spec_from_file_location("tool", ROOT / tool)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["tool"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return tyro.extras.subcommand_cli_from_dict(module.COMMANDS, args=rest, config=(tyro.conf.OmitArgPrefixes,))


def test_there_are_lines():
    found = [" ".join(words[:2]) for words in lines()]
    assert len(found) >= 6 and {
        "tools/profile.py peers",
        "tools/profile.py trainer",
        "tools/profile.py objective",
    } <= set(found)


def pending() -> list[list[str]]:
    """The words of each profiling command that waits for other hardware."""
    calls = re.findall(r"`python (tools/profile\.py [^`]*)`", (ROOT / "results" / "PENDING.md").read_text())
    assert len(calls) >= 3
    return [shlex.split(call) for call in calls]


@pytest.mark.parametrize("words", [*lines(), *pending()], ids=lambda words: " ".join(words[:2]))
def test_its_parser_takes_the_line(words, monkeypatch):
    monkeypatch.setattr(
        sys, "path", sys.path[:]
    )  # tools put the project in its first place, where the tests' folder is
    assert parse(words) is not None


def test_a_flag_that_is_not_there_is_noticed():
    with pytest.raises(SystemExit):
        parse(["tools/profile.py", "stages", "--data", "x", "--batch", "y"])
