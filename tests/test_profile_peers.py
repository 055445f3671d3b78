from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import command
from pictures import class_folders

from pipeline import shards
from pipeline.errors import UserError
from profiling import peers


def test_the_fit_finds_what_was_put_in():
    rows = [
        {"pipeline": "manyview cpu", "policy": "p", "size": 8, "views": v, "core_ms_per_image": 1.5 + 0.25 * v}
        for v in (1, 2, 4, 8)
    ]
    (fit,) = peers.fits([*rows, {**rows[0], "pipeline": "another"}])  # of one number of views: nothing to fit
    assert (fit["a"], fit["b"], fit["r2"]) == (1.5, 0.25, 1.0)


def test_ratios_are_of_the_same_round():
    result: dict = {"ratios": []}
    taken = {("manyview cpu", False): [(1, 2), (10, 2), (1, 2)], ("peer", False): [(3, 8), (30, 8), (3, 8)]}
    peers.add_ratios(taken, "simclr", 224, 8, result)
    (ratio,) = result["ratios"]
    assert ratio["times_the_views_per_s"] == 3 and ratio["times_less_core_time"] == 4


@pytest.mark.slow
def test_the_command_measures_and_writes_its_tables(tmp_path):
    root = class_folders(tmp_path / "in", 12, 2)
    shards.write(shards.Options("folder"), root, tmp_path / "photos", quiet=True)
    out = tmp_path / "result.json"
    line = ["tools/profile.py", "peers", "--data", tmp_path / "photos", "--views", "1,2,3", "--size", 48, "--batch", 6]
    line = [
        "--rounds",
        1,
        "--work",
        36,
        "--threads",
        2,
        "--json",
        out,
        "--only",
        "manyview cpu,floor,torchvision v2 PIL",
        *line,
    ]
    done = command(*line[10:], *line[:10])
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert {"pipeline", "policy", "views", "views_per_s", "core_ms_per_image"} <= set(result["rows"][0])
    names = {row["pipeline"] for row in result["rows"]}
    assert names >= {"manyview cpu", "torchvision v2 PIL + DataLoader"} and len(result["rows"]) >= 6
    assert all(row["views_per_s"] > 0 and np.isfinite(row["core_ms_per_image"]) for row in result["rows"])
    assert result["parity"]["manyview cpu 48 px"]["min_db"] > 40
    assert result["parity"]["manyview cpu 48 px"]["decodes_per_image"] == 1
    assert {row["images"] for row in result["costs"]} == {24}  # the same at every number of views
    fits = {(fit["pipeline"], fit["policy"]): fit for fit in result["fits"]}
    assert len(fits) == 1  # of milliseconds beside other tests: what it says is for a quiet machine
    assert all(np.isfinite(fits["manyview cpu", "simclr"][key]) for key in ("a", "b"))
    table = command("tools/profile.py", "peers", "--table", out)
    assert table.stdout.strip() == out.with_suffix(".md").read_text().strip()


def test_bad_flags_are_named():
    with pytest.raises(UserError, match="--views 1,two"):
        peers.main(["--views", "1,two"])
