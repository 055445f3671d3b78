"""Our colors against torchvision's: the command from end to end, on little."""

from __future__ import annotations

import json

import pytest
from pictures import class_folders

from manyview.bench import jitter
from manyview.pipeline.convert.write import write_shards
from manyview.pipeline.manifest import Options


@pytest.mark.slow
def test_the_command_compares_and_trains(digits, tmp_path, capsys):
    root = class_folders(tmp_path / "in", 4, 2)
    write_shards(Options("folder"), root, tmp_path / "photos", quiet=True)
    out = tmp_path / "jitter.json"
    words = f"--data {tmp_path}/photos --small {digits} --images 8 --size 32 --json {out}".split()
    jitter.main([*words, "--seeds", "2", "--train-images", "250", "--epochs", "1"])
    result = json.loads(out.read_text())
    accuracy = result["training"]["accuracy"]
    assert {"ours", "no jitter", "untrained"} <= accuracy.keys() and all(len(a) == 2 for a in accuracy.values())
    assert out.with_suffix(".md").read_text() in capsys.readouterr().out
