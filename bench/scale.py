"""What a training run on many machines asks of its storage, without the machines:

    python tools/profile.py plan --images 1.28e6 14.2e6 4e8 --nodes 1 8 64 256

Measured: an index of that many samples is generated, and a fresh process opens it, plans and takes its first batch.
Replayed: what one node fetches from a bucket into its cache, step by step, through the plan of pipeline/plan.py and the
policy of pipeline/bucket.py. Computed from that: bandwidths, and where more nodes stop helping. Writes scale.md, .json
and .csv.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from manyview.bench import large_index, output
from manyview.bench.harness import CPU, alone, spent
from manyview.bench.output import number, quantity, table
from manyview.bench.replay import Cluster, Epoch, replay
from manyview.pipeline import index
from manyview.pipeline.errors import UserError
from manyview.pipeline.plan import MIXED, ORDERS, permutation, shuffle_quality
from manyview.pipeline.storage import PIECE

NAMES = {1_280_000: "ImageNet-1k", 14_200_000: "ImageNet-22k", 400_000_000: "LAION-400M"}
ROOM = 1.3  # times the index's bytes that must be free on the disk
FEW = 100  # steps an epoch: with fewer, an epoch is hardly a schedule any more
QUALITY = 20_000_000  # samples of which the shuffle is measured; of a larger set the first so many


@dataclass(kw_only=True)
class Args:
    """What many machines would ask of the storage."""

    images: tuple[float, ...] = (1.28e6, 14.2e6, 400e6)
    """Images of the data sets."""
    nodes: tuple[int, ...] = (1, 8, 64, 256)
    """Numbers of machines."""
    gpus: int = 8
    """GPUs of a machine."""
    batch_per_gpu: int = 64
    """Images a step of each GPU; --batch-size of training is this times all GPUs."""
    images_per_s: float = 500.0
    """Images a second that a GPU trains on: about ResNet-50 with 8 views on a current one."""
    image_kb: float = 110.0
    """Kilobytes of an image."""
    shard_mb: float = 256.0
    """Megabytes of a shard."""
    cache_gb: float = 200.0
    """Gigabytes of a machine's cache of the bucket."""
    node_gb_s: float = 3.0
    """Gigabytes a second that a machine can take in (25 Gbit/s)."""
    storage_gb_s: float = 50.0
    """Gigabytes a second that the storage gives to all machines together."""
    scratch: Path | None = None
    """Where the generated index lies for a moment (75 bytes a sample); a temporary folder if not given."""
    out: Path = Path("results")
    """Where scale.md, scale.json and scale.csv go."""


def main(argv: list[str]) -> None:
    tiny = dict.fromkeys(("images_per_s", "image_kb", "shard_mb", "cache_gb", "node_gb_s", "storage_gb_s"), 1e-9)
    args = output.parse(Args, argv, __doc__, "plan", gpus=1, batch_per_gpu=1, nodes=1, images=1, **tiny)
    step = args.gpus * args.batch_per_gpu * max(args.nodes)
    if min(args.images) < step:
        most, least = max(args.nodes), min(args.images)
        raise UserError(f"{most} nodes take {step:,} images a step, more than the {least:g} of --images")
    if args.scratch is not None and not args.scratch.is_dir():
        raise UserError(f"--scratch {args.scratch} is no folder")
    args.out.mkdir(parents=True, exist_ok=True)
    sets: list[dict[str, Any]] = []
    for n in map(int, args.images):
        print(f"{name_of(n)}: an index of {n:,} samples, opened and planned")
        sets.append({"images": n, "start": startup(n, args), "quality": qualities(n)})
        sets[-1]["rows"] = [scaled(n, nodes, order, args) for order in ORDERS for nodes in args.nodes]
        permutation.cache_clear()
    result = {"settings": output.settings(args), "environment": output.environment(CPU, "plan", argv), "sets": sets}
    rows, text = [{"images": one["images"]} | row for one in sets for row in one["rows"]], page(result)
    output.write(args.out / "scale.json", result, text, rows)
    print(text)


# --- measured: starting up ----------------------------------------------------------------------------------------------


def startup(n: int, args: Args) -> dict[str, Any]:
    """Generate shards of `n` samples (an index in full, tars that are holes), then start on them in a fresh process."""
    size = n * (sum(np.dtype(kind).itemsize for kind in index.COLUMNS.values()) + 8 + large_index.KEY)
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        free = shutil.disk_usage(folder).free
        if size * ROOM > free:
            raise UserError(
                f"an index of {n:,} samples takes {quantity(size, 'B')}, and {folder} has {quantity(free, 'B')}:"
                " name a larger disk with --scratch, or fewer --images"
            )
        image_bytes, per_shard = round(1e3 * args.image_kb), max(1, round(1e3 * args.shard_mb / args.image_kb))
        seconds = spent(lambda: large_index.generate(Path(folder), n, image_bytes, per_shard)).wall
        times: dict[str, Any] = {"generated_s": seconds, "index_bytes": (Path(folder) / "train.index").stat().st_size}
        world = args.gpus * max(args.nodes)
        for order in ORDERS:
            times[order] = alone(large_index.started, folder, order, args.batch_per_gpu * world, world)
    return times


def qualities(n: int) -> dict[str, float]:
    """`shuffle_quality` of the first epoch by order; of a large set extrapolated: `random` is that of `QUALITY` samples, and
    `blocks`, whose windows are as large in any set, falls with the set's size."""
    some = min(n, QUALITY)
    quality = {order: shuffle_quality(permutation(some, 0, 0, order)) for order in ORDERS}
    return quality | {"blocks": quality["blocks"] * some / n}


# --- replayed and computed ----------------------------------------------------------------------------------------------


def scaled(n: int, nodes: int, order: str, args: Args) -> dict[str, Any]:
    """One row: what a node fetches, and what follows for bandwidths."""
    cluster = Cluster(n, nodes, nodes * args.gpus * args.batch_per_gpu, 1e3 * args.image_kb, 1e9 * args.cache_gb, order)
    first, _, later = replay(cluster, 3)
    gb = cluster.piece_bytes / 1e9
    print(f"  {order:6s} {nodes:5d} nodes: {later.fetched / later.share * gb:.4g} GB a node and later epoch")
    return {
        "nodes": nodes, "order": order, "batch": cluster.batch, "share": first.share, "own_gb": n * args.image_kb / 1e6 / nodes,
        "first_gb": first.fetched / first.share * gb, "later_gb": later.fetched / later.share * gb,
        "first_hits": first.hits, "later_hits": later.hits, "late": later.late / later.images,
        **bandwidth(cluster, first, later, args),
    }  # fmt: skip


def bandwidth(cluster: Cluster, first: Epoch, later: Epoch, args: Args) -> dict[str, Any]:
    """At full speed: bytes a second into a node and out of the storage; what of it can be had; and what is the limit."""
    full, nodes = args.gpus * args.images_per_s, cluster.nodes
    rates = [epoch.fetched * cluster.piece_bytes / epoch.images * full / 1e9 for epoch in (first, later)]
    speeds = [min(1.0, args.node_gb_s / max(r, 1e-9), args.storage_gb_s / max(r * nodes, 1e-9)) for r in rates]
    return {
        "first_node_gb_s": rates[0], "later_node_gb_s": rates[1], "first_storage_gb_s": rates[0] * nodes,
        "later_storage_gb_s": rates[1] * nodes, "first_speed": speeds[0], "later_speed": speeds[1],
        "images_per_s": nodes * full * speeds[1], "steps": cluster.images / cluster.batch,
    }  # fmt: skip


def bounds(one: dict[str, Any], order: str, s: dict[str, Any]) -> dict[str, str]:
    """From how many nodes on (of those replayed, or exactly) each limit slows the run down."""
    rows = [row for row in one["rows"] if row["order"] == order]

    def smallest(slow: Any) -> str:
        return next((f"{row['nodes']}" for row in rows if slow(row)), "-")

    an_image = s["gpus"] * s["batch_per_gpu"]
    return {
        "a node's network": smallest(lambda r: r["later_node_gb_s"] > s["node_gb_s"]),
        "the storage, first epoch": smallest(lambda r: r["first_storage_gb_s"] > s["storage_gb_s"]),
        "the storage, later": smallest(lambda r: r["later_storage_gb_s"] > s["storage_gb_s"]),
        f"under {FEW} steps an epoch": f"{math.floor(one['images'] / an_image / FEW) + 1:,}",
        "under one shard a GPU": f"{math.floor(one['images'] * s['image_kb'] / 1e3 / s['shard_mb'] / s['gpus']) + 1:,}",
    }


# --- the page -----------------------------------------------------------------------------------------------------------

STARTED = ("set", "index", "order", "open", "view size", "plan and first batch", "a batch", "next epoch", "own memory",
           "peak")  # fmt: skip
REPLAYED = ("set", "order", "nodes", "own", "first", "later", "hits", "late", "replayed")
COMPUTED = ("set", "order", "nodes", "into a node, GB/s: first", "later", "from the storage: first", "later",
            "speed: first", "later", "images/s, later", "steps an epoch", "global batch")  # fmt: skip


def name_of(n: int) -> str:
    return NAMES.get(n, f"{number(n)} images")


def page(result: dict[str, Any]) -> str:
    """results/scale.md: measured, replayed and computed apart."""
    s, about, sets = result["settings"], result["environment"], result["sets"]
    images, nodes = " ".join(f"{x:g}" for x in s["images"]), " ".join(str(x) for x in s["nodes"])
    every = [(one, row) for one in sets for row in one["rows"]]
    pairs = [(one, order) for one in sets for order in ORDERS]
    limits = [[name_of(one["images"]), order, *bounds(one, order, s).values()] for one, order in pairs]
    basis = ("all samples, measured", f"extrapolated from {number(QUALITY)} samples")
    mixing = [[name_of(x["images"]), *(f"{x['quality'][order]:.2%}" for order in ORDERS), basis[x["images"] > QUALITY]]
              for x in sets]  # fmt: skip
    return output.document(
        "# Many machines, without the machines",
        f"`python tools/profile.py plan --images {images} --nodes {nodes}`, commit {about['commit']}, {about['device']},"
        f" {about['cores']} cores, seed 0. {s['gpus']} GPUs a node, {s['batch_per_gpu']} images a step and GPU,"
        f" {s['image_kb']:g} kB an image, shards of {s['shard_mb']:g} MB, a cache of {s['cache_gb']:g} GB a node.",
        "## Measured: starting up",
        "An index of that many samples is generated in full; the shards are empty files of the right length on a local disk."
        " A fresh process opens them, works out the view size, plans, and takes the first batch of the last of"
        f" {max(s['nodes']) * s['gpus']:,} ranks. Memory beyond imports: a rank's own, and the peak with the pages of the index"
        " that it touched, which ranks share. `next epoch`: the pause when a batch is the first of another epoch.",
        table(STARTED, [started(one, order) for one, order in pairs], left=3),
        f"## Measured up to {QUALITY:,} samples, beyond extrapolated: how well an order mixes",
        "How far apart neighbours in storage come, as a share of what a uniform shuffle gives. `blocks` mixes"
        f" {MIXED:,} samples at a time, whatever the size of the set; storage is shuffled once, when it is written.",
        table(["set", *ORDERS, "basis"], mixing),
        "## Replayed: what a node fetches",
        f"Nothing is timed: the real plan's batches go through the cache's policy (pieces of {PIECE >> 20} MiB, announced"
        " ahead; what was announced longest ago goes). GB a node and epoch; `own` is its images' bytes, the least there is"
        " without a cache. The third epoch stands for all later ones. `hits`: announced images that were there, later."
        " `late`: images whose piece was fetched and gone again before it was read. Where `replayed` is below 100 %, that"
        " much of each epoch was, and the rest is in proportion.",
        table(REPLAYED, [replayed(one, row) for one, row in every], left=2),
        "## Computed: bandwidth, and where it stops",
        f"At {s['images_per_s']:g} images/s a GPU, from the bytes above. Taken as given: {s['node_gb_s']:g} GB/s into a node,"
        f" {s['storage_gb_s']:g} GB/s from the storage. `speed`: the share of full speed that these allow.",
        table(COMPUTED, [computed(one, row) for one, row in every], left=2),
        "The number of nodes (of those above, or exactly) from which on something is the limit. Fewer shards than GPUs stop"
        " loaders that give each worker shards of its own; here samples are dealt, not shards, and it is no limit.",
        table(["set", "order", *bounds(sets[0], ORDERS[0], s)], limits, left=2),
    )


def started(one: dict[str, Any], order: str) -> list[str]:
    x, index_size = one["start"][order], quantity(one["start"]["index_bytes"], "B")
    seconds = [f"{x[key]:.2f} s" for key in ("open_s", "size_s", "plan_s", "epoch_s")]
    sizes = (quantity(max(0, x["own_bytes"]), "B"), quantity(x["peak_bytes"], "B"))
    return [name_of(one["images"]), index_size, order, *seconds[:3], f"{x['batch_ms']:.1f} ms", seconds[3], *sizes]


def replayed(one: dict[str, Any], row: dict[str, Any]) -> list[str]:
    sizes = [number(row[f"{key}_gb"]) for key in ("own", "first", "later")]
    shares = [f"{row[key]:.1%}" for key in ("later_hits", "late")]
    return [name_of(one["images"]), row["order"], f"{row['nodes']}", *sizes, *shares, f"{row['share']:.0%}"]


def computed(one: dict[str, Any], row: dict[str, Any]) -> list[str]:
    rates = [number(row[f"{key}_gb_s"]) for key in ("first_node", "later_node", "first_storage", "later_storage")]
    speeds = [f"{row[key]:.0%}" for key in ("first_speed", "later_speed")]
    counts = [f"{row['images_per_s']:,.0f}", number(row["steps"]), f"{row['batch']:,}"]
    return [name_of(one["images"]), row["order"], f"{row['nodes']}", *rates, *speeds, *counts]
