"""The replay against brute force, against the cache that buckets are read through, and at the limits that are known."""

from __future__ import annotations

import json
from typing import BinaryIO
from zlib import crc32

import numpy as np
import pytest
from conftest import ROOT

from manyview.bench import large_index, replay, scale
from manyview.bench import shards as measure_shards
from manyview.bench.replay import LRU, Cluster
from manyview.pipeline import bucket, storage
from manyview.pipeline.errors import UserError
from manyview.pipeline.plan import ORDERS, Plan
from manyview.pipeline.store import Store


def cluster(images: int, nodes: int, cache: float, order: str, batch: int = 512) -> Cluster:
    """Images of a 20th of a piece; `cache`: a node's, as a share of the set."""
    size = storage.PIECE / 20
    return Cluster(images, nodes, batch, size, cache * images * size, order)


def pieces(c: Cluster) -> int:
    """Of the whole set."""
    return -(-c.images // c.per_piece)


def brute_force(c: Cluster, node: int, epochs: int) -> list[int]:
    """Pieces fetched an epoch: what each step announces and reads, on a list, with no short cut."""
    order = Plan(c.images, 0, c.batch, c.nodes, node, c.order)
    steps, fetched = c.images // c.batch, [0] * epochs
    held: list[int] = []

    def want(id: int, announced: bool, epoch: int) -> None:
        piece = id // c.per_piece
        if piece in held:
            if announced:
                held.append(held.pop(held.index(piece)))
            return
        fetched[epoch] += 1
        if len(held) == c.limit:
            while held and len(held) + 1 > c.limit * (1 - bucket.SLACK):
                held.pop(0)
        held.append(piece)

    for epoch in range(epochs):
        announcements = list(order.reading(epoch * steps, (epoch + 1) * steps))
        for step in range(-order.ahead, steps):
            if step + order.ahead < steps:
                for id in announcements[step + order.ahead].tolist():
                    want(id, True, epoch)
            if step >= 0:
                for id in order.batch(epoch * steps + step)[0].tolist():
                    want(id, False, epoch)
    return fetched


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("nodes", [1, 4])
@pytest.mark.parametrize("cache", [0.1, 0.5, 1.5])
def test_replay_is_brute_force(order, nodes, cache):
    c = cluster(20_000, nodes, cache, order)
    found = replay.replay(c, 2)
    assert [epoch.fetched for epoch in found] == brute_force(c, nodes // 2, 2)
    assert all(epoch.images == 20_000 // 512 * 512 // nodes and epoch.share == 1 for epoch in found)


def ten_bytes(file: BinaryIO) -> None:
    file.write(bytes(10))


def test_the_policy_is_that_of_the_cache(tmp_path):
    """The same requests, to the replay and to the folder that `pipeline.remote` keeps."""
    cache, simulated, rng = bucket.Cache(tmp_path, 400), LRU(40), np.random.default_rng(0)
    made = []
    for _ in range(250):
        piece, announced = int(rng.integers(60)), bool(rng.integers(2))
        if not (announced and cache.touch(f"a/{piece}")) and cache.read(f"a/{piece}", 0, 10) is None:
            cache.add(f"a/{piece}", ten_bytes)
            made.append(piece)
        (simulated.announce if announced else simulated.read)(piece)
        assert {int(path.name) for path in (tmp_path / "a").iterdir()} == set(simulated.held)
    assert len(made) == simulated.fetched > 60


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("nodes", [1, 8])
def test_a_cache_that_holds_the_set_reads_each_byte_once(order, nodes):
    c = cluster(60_000, nodes, 1.1, order)
    found = replay.replay(c, 8)
    assert sum(epoch.fetched for epoch in found) <= pieces(c) and sum(epoch.late for epoch in found) == 0
    if nodes == 1:
        assert found[0].fetched == pieces(c) and sum(epoch.fetched for epoch in found[1:]) == 0


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_at_random_the_hits_are_the_share_that_is_cached(share):
    c = cluster(100_000, 1, share, "random", batch=32)
    later = replay.replay(c, 2)[1]
    assert later.hits == pytest.approx(share, abs=0.05)


def test_at_random_several_nodes_need_little_more_than_their_part():
    """Each has its part of every batch, so a cache of a quarter serves five nodes as well as the whole set would."""
    small, whole = (replay.replay(cluster(400_000, 5, share, "random", 2000), 2) for share in (0.3, 1.1))
    assert [epoch.fetched for epoch in small] == [epoch.fetched for epoch in whole]
    assert small[0].fetched < 1.4 * pieces(cluster(400_000, 5, 1, "random")) / 5


def test_in_blocks_little_is_read_twice_without_a_cache():
    c = cluster(400_000, 4, 0.2, "blocks", 2048)
    found = replay.replay(c, 2)
    assert found[0].late == 0 and found[0].fetched < 1.35 * pieces(c) / 4
    assert replay.replay(cluster(400_000, 4, 0.02, "random", 2048), 1)[0].fetched > 10 * pieces(c) / 4


def test_a_part_of_an_epoch_stands_for_it():
    c = cluster(400_000, 2, 0.2, "blocks")
    whole, part = (replay.replay(c, 1, limit=limit)[0] for limit in (10**9, 100_000))
    assert whole.share == 1 and part.share == pytest.approx(0.5, abs=0.02)
    assert part.fetched / part.share == pytest.approx(whole.fetched, rel=0.15)  # it begins with an empty cache


def test_the_generated_index_is_an_index(tmp_path):
    large_index.generate(tmp_path, 10_007, 1000, 300)
    store = Store(tmp_path)
    assert len(store) == 10_007 and len(store.shards) == 34 and store.shards[-1]["count"] == 107
    assert store.key(10_006) == "n" * 18 + "0000010006" and store.key(0).endswith("n0000000000")
    last = {name: int(store._rows[name][-1]) for name in store._rows.columns}
    assert last == {"label": 6, "offset": 106_000, "length": 1000, "shard": 33, "height": 300 + 10_006 % 201,
                    "width": 500 - 10_006 % 101, "crc": crc32(bytes(1000)), "kind": 0}  # fmt: skip
    assert store.shard_of.tolist() == [i // 300 for i in range(10_007)]


@pytest.mark.slow
def test_the_command_writes_page_and_table(tmp_path, capsys):
    scale.main(["--images", "1e5", "2e5", "--nodes", "1", "16", "--out", str(tmp_path)])
    text = (tmp_path / "scale.md").read_text()
    assert text in capsys.readouterr().out and text.index("## Measured") < text.index("## Replayed") < text.index(
        "## Computed"
    )
    result = json.loads((tmp_path / "scale.json").read_text())
    (small, large) = result["sets"]
    assert large["start"]["index_bytes"] == pytest.approx(2 * small["start"]["index_bytes"], rel=0.01)
    for order in ORDERS:
        started = large["start"][order]
        assert 0 < started["open_s"] < 5 and started["peak_bytes"] > 1e6
    one = next(row for row in large["rows"] if row["nodes"] == 1)
    assert (
        one["own_gb"] == pytest.approx(22) and one["first_gb"] == pytest.approx(22, rel=0.01) and one["later_gb"] == 0
    )
    assert one["first_node_gb_s"] == pytest.approx(0.44, rel=0.01)  # 4,000 images/s of 110 kB
    assert len((tmp_path / "scale.csv").read_text().splitlines()) == 1 + 2 * 2 * 2


def test_bandwidth_and_where_it_stops():
    args = scale.Args(
        images=(1e6,), nodes=(1, 10), gpus=10, images_per_s=100, image_kb=storage.PIECE / 1000, storage_gb_s=2
    )
    c = Cluster(10**6, 10, 100, float(storage.PIECE), 1e9)
    found = scale.bandwidth(c, replay.Epoch(1000, 1000, 0, 1.0), replay.Epoch(1000, 250, 0, 1.0), args)
    assert found["first_node_gb_s"] == pytest.approx(1000 * storage.PIECE / 1e9)  # 8.4 GB/s into a node that takes 3
    assert found["first_speed"] == pytest.approx(2 / (10 * 1000 * storage.PIECE / 1e9))  # the storage is slower still
    assert found["first_storage_gb_s"] == pytest.approx(10 * found["first_node_gb_s"])
    assert found["later_storage_gb_s"] == pytest.approx(found["first_storage_gb_s"] / 4)
    assert found["later_speed"] == pytest.approx(4 * found["first_speed"])
    rows = [{"order": "random", "nodes": 10, **found}]
    assert found["images_per_s"] == pytest.approx(10_000 * found["later_speed"])
    settings = {"gpus": 10, "batch_per_gpu": 10, "image_kb": 100, "shard_mb": 100, "node_gb_s": 3, "storage_gb_s": 2}
    limits = scale.bounds({"images": 10**6, "rows": rows}, "random", settings)
    assert list(limits.values()) == ["-", "10", "10", "101", "101"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--gpus", "0"), "--gpus must be at least 1, not 0"),
        (("--images", "100"), r"256 nodes take .* more than the 100 of --images"),
        (("--nodes", "0"), "--nodes must be at least 1, not 0"),
        (
            ("--images", "1e6", "--nodes", "4096"),
            r"4096 nodes take 2,097,152 images a step, more than the 1e\+06 of --images",
        ),
        (("--images", "1e12", "--nodes", "1"), "name a larger disk with --scratch"),
        (("--images", "nan"), "--images must be at least 1, not nan"),
        (("--images", "1e6", "inf"), "--images must be at least 1, not 1e.06 inf"),
        (("--cache-gb", "nan"), "--cache-gb must be positive, not nan"),
        (("--storage-gb-s", "inf"), "--storage-gb-s must be positive, not inf"),
        (("--scratch", "nowhere"), "--scratch nowhere is no folder"),
    ],
)
def test_bad_input_is_said(tmp_path, flags, said):
    with pytest.raises(UserError, match=said):
        scale.main([*flags, "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--source", "nowhere"), "--source nowhere is no folder"),
        (("--source", "."), "--source . holds no photos"),
        (
            ("--source", ".", "--rounds", "0", "--jobs", "-1"),
            "--rounds must be at least 1, not 0\n--jobs must be at least 1, not -1",
        ),
    ],
)
def test_bad_input_to_the_measurement_of_shards_is_said(tmp_path, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        measure_shards.main([*flags, "--out", str(tmp_path)])


def test_what_is_extrapolated_is_marked():
    """The shuffle of more than twenty million samples is not measured, and the page must not say so."""
    result = json.loads((ROOT / "results" / "scale.json").read_text())
    text = scale.page(result)
    assert text == (ROOT / "results" / "scale.md").read_text()
    rows = {
        line.split(" | ")[0]: line for line in text.split("how well an order mixes")[1].split("## ")[0].splitlines()
    }
    assert "measured" in rows["| ImageNet-22k"] and "extrapolated from 20 M samples" in rows["| LAION-400M"]
