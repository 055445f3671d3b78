from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from conftest import command
from pictures import class_folders, jpeg

from manyview.bench import peers
from manyview.bench.contenders import Contender
from manyview.bench.harness import Spent
from manyview.pipeline.convert.write import write_shards
from manyview.pipeline.errors import UserError
from manyview.pipeline.manifest import Options


def test_the_fit_finds_what_was_put_in():
    rows = [
        {"pipeline": "manyview cpu", "policy": "p", "size": 8, "views": v, "core_ms_per_image": 1.5 + 0.25 * v}
        for v in (1, 2, 4, 8)
    ]
    others = [{**row, "pipeline": "stock ffcv Loader"} for row in rows]  # decodes a view, not an image
    (fit,) = peers.fits([*rows, *others, {**rows[0], "policy": "q"}])  # of one number of views: nothing to fit
    assert (fit["a"], fit["b"], fit["r2"]) == (1.5, 0.25, 1.0)


def test_ratios_are_of_the_same_round():
    build: Any = None
    mine, uint8 = (Contender("manyview cpu", build, engine="cpu", floats=floats) for floats in (True, False))
    taken = {
        mine: [Spent(1, 2), Spent(10, 2), Spent(1, 2)],
        uint8: [Spent(1, 1)] * 3,  # another thing than the peer makes
        Contender("peer", build): [Spent(3, 8), Spent(30, 8), Spent(3, 8)],
    }
    case: Any = peers.Case(peers.Args(), build, "simclr", 224, list(taken))
    (ratio,) = peers.ratios(case, 8, taken)
    assert (ratio["ours"], ratio["peer"], ratio["policy"]) == ("manyview cpu", "peer", "simclr")
    assert ratio["times_the_views_per_s"] == 3 and ratio["times_less_core_time"] == 4


def test_another_call_adds_its_rows_at_the_same_commit_and_machine_only(tmp_path):
    args = peers.Args(json=tmp_path / "x.json")
    env = {"commit": "a", "device": "d", "vectors": "", "cores": 2, "command": "one"}
    first = peers.begun(args, env)
    row = {"pipeline": "p", "policy": "q", "size": 8, "views": 1}
    peers.add(first, "rows", [row | {"views_per_s": 1}])
    args.json.write_text(json.dumps(first))
    second = peers.begun(args, env | {"command": "two"})
    assert second["commands"] == ["python one", "python two"]
    peers.add(second, "rows", [row | {"views_per_s": 2}, row | {"views": 2, "views_per_s": 3}])
    assert [(r["views"], r["views_per_s"]) for r in second["rows"]] == [(1, 2), (2, 3)]
    assert peers.begun(args, env | {"commit": "b"})["rows"] == []
    assert peers.begun(peers.Args(json=args.json, rounds=99), env)["rows"] == []


@pytest.mark.slow
def test_the_command_measures_and_writes_its_tables(tmp_path):
    root = class_folders(tmp_path / "in", 12, 2)
    write_shards(Options("folder"), root, tmp_path / "photos", quiet=True)
    out = tmp_path / "result.json"
    words = [
        "--data",
        tmp_path / "photos",
        "--views",
        "1,2,3",
        "--size",
        48,
        "--batch-size",
        6,
        "--rounds",
        1,
        "--images",
        18,
    ]
    only = ["--threads", 2, "--only", "manyview cpu,floor,torchvision v2 PIL"]
    done = command("tools/profile.py", "peers", *words, *only, "--json", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert {"pipeline", "policy", "views", "views_per_s", "core_ms_per_image"} <= set(result["rows"][0])
    names = {row["pipeline"] for row in result["rows"]}
    assert names >= {"manyview cpu", "torchvision v2 PIL + DataLoader"} and len(result["rows"]) >= 6
    assert all(row["views_per_s"] > 0 and np.isfinite(row["core_ms_per_image"]) for row in result["rows"])
    assert result["parity"]["manyview cpu 48 px"]["min_db"] > 40
    assert result["parity"]["manyview cpu 48 px"]["decodes_per_image"] == 1
    assert {row["images"] for row in result["rows"]} == {24}  # whole batches, as many for both workers
    ratios = {(ratio["peer"], ratio["policy"]) for ratio in result["ratios"]}
    assert ratios == {("torchvision v2 PIL + DataLoader", "simclr")}  # what makes the same, float32
    assert {row["policy"] for row in result["rows"]} == {"simclr", "simclr, uint8 out"}
    fits = {(fit["pipeline"], fit["policy"]): fit for fit in result["fits"]}
    assert len(fits) == 2  # of milliseconds beside other tests: what it says is for a quiet machine
    assert all(np.isfinite(fits["manyview cpu", "simclr"][key]) for key in ("a", "b"))
    assert out.with_suffix(".md").read_text() == done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--views", "1,two"], "--views 1,two"), (["--rounds", "0"], "--rounds must be"),
        (["--batch-size", "0"], "--batch-size must"),
        (["--only", "nosuch"], "--only nosuch: no pipeline"),
    ],
)  # fmt: skip
def test_bad_flags_are_named(digits, words, said):
    with pytest.raises(UserError, match=said):
        peers.main(["--data", str(digits), *words])


def test_large_images_are_not_small(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "photo.jpg").write_bytes(jpeg(0, 120, 130))
    write_shards(Options("folder"), tmp_path / "in", tmp_path / "photos", quiet=True)
    with pytest.raises(UserError, match=r"--small .* 120 px, more than 96"):
        peers.main(["--data", "None", "--small", str(tmp_path / "photos"), "--views", "1"])
