"""What a training run on many machines asks of its storage, without the machines:

    python tools/profile.py plan --images 1.28e6 14.2e6 4e8 --nodes 1 8 64 256

Measured: an index of that many samples is generated, and a fresh process opens it, plans and takes its first batch.
Replayed: what one node fetches from a bucket into its cache, step by step, through the plan of pipeline/plan.py and the
policy of pipeline/storage.py. Computed from that: bandwidths, and where more nodes stop helping. Writes scale.md, .json,
.csv and .png.
"""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from manyview.bench.replay import Cluster, Epoch, formula, replay
from manyview.bench.terminal import number, quantity
from manyview.pipeline import index
from manyview.pipeline.errors import UserError
from manyview.pipeline.manifest import Options, write_manifest
from manyview.pipeline.plan import MIXED, ORDERS, permutation, plan, shuffle_quality
from manyview.pipeline.storage import PIECE
from manyview.pipeline.store import Store
from manyview.training.monitor import environment

NAMES = {1_280_000: "ImageNet-1k", 14_200_000: "ImageNet-22k", 400_000_000: "LAION-400M"}
KEY = 28  # bytes of a key, as ImageNet's
CHUNK = 4_000_000  # rows of an index that are generated at a time
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
    """Where scale.md, scale.json, scale.csv and scale.png go."""


def main(argv: list[str]) -> None:
    args = tyro.cli(Args, args=argv, description=__doc__, prog="profile.py plan")
    check(args)
    args.out.mkdir(parents=True, exist_ok=True)
    sets: list[dict[str, Any]] = []
    for n in map(int, args.images):
        print(f"{name_of(n)}: an index of {n:,} samples, opened and planned")
        sets.append({"images": n, "start": startup(n, args), "quality": qualities(n), "rows": []})
        for order in ORDERS:
            for nodes in args.nodes:
                row = scaled(n, nodes, order, args)
                sets[-1]["rows"].append(row)
                print(f"  {order:6s} {nodes:5d} nodes: {row['later_gb']:.4g} GB a node and later epoch")
        permutation.cache_clear()
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()}
    result = {"settings": settings, "environment": environment(torch.device("cpu")), "sets": sets}
    (args.out / "scale.json").write_text(json.dumps(result, indent=1) + "\n")
    rows = [{"images": one["images"]} | row for one in sets for row in one["rows"]]
    with open(args.out / "scale.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (args.out / "scale.md").write_text(page(result))
    draw(result, args.out / "scale.png")
    print(page(result))


def check(args: Args) -> None:
    """UserError, a line for each value that makes no sense."""
    single = {k: v for k, v in asdict(args).items() if isinstance(v, int | float)}
    errors = [f"--{k.replace('_', '-')} must be positive, not {v:g}" for k, v in single.items() if not 0 < v < math.inf]
    if args.scratch is not None and not args.scratch.is_dir():
        errors.append(f"--scratch {args.scratch} is no folder")
    for name, least in (("images", args.gpus * args.batch_per_gpu), ("nodes", 1)):
        values = getattr(args, name)
        if not values or not all(least <= v < math.inf for v in values):
            errors.append(f"--{name} takes numbers from {least} on, got {' '.join(f'{v:g}' for v in values)}")
    if not errors and min(args.images) < max(args.nodes) * args.gpus * args.batch_per_gpu:
        errors.append(
            f"{max(args.nodes)} nodes take more images a step than the {min(args.images):g} there are: fewer --nodes"
        )
    if errors:
        raise UserError("\n".join(errors))


# --- measured: starting up ----------------------------------------------------------------------------------------------


def startup(n: int, args: Args) -> dict[str, Any]:
    """Generate shards of `n` samples (an index in full, tars that are holes), then start on them in a fresh process."""
    size = n * (sum(np.dtype(kind).itemsize for kind in index.COLUMNS.values()) + 8 + KEY)
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        free = shutil.disk_usage(folder).free
        if size * ROOM > free:
            raise UserError(
                f"an index of {n:,} samples takes {quantity(size, 'B')}, and {folder} has {quantity(free, 'B')}:"
                " name a larger disk with --scratch, or fewer --images"
            )
        begun = time.perf_counter()
        generate(Path(folder), n, round(1e3 * args.image_kb), max(1, round(1e3 * args.shard_mb / args.image_kb)))
        made = time.perf_counter() - begun
        found: dict[str, Any] = {"generated_s": made, "index_bytes": (Path(folder) / "train.index").stat().st_size}
        batch = args.gpus * args.batch_per_gpu * max(args.nodes)
        for order in ORDERS:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                found[order] = fresh.submit(start, folder, order, batch, max(args.nodes) * args.gpus).result()
    return found


def generate(out: Path, n: int, image_bytes: int, per_shard: int) -> None:
    """Shards whose index is written row by row and whose tars are files of the right length with nothing in them."""
    names = [f"train-{i:06d}.tar" for i in range(-(-n // per_shard))]
    rows = []
    for i, name in enumerate(names):
        count = min(per_shard, n - i * per_shard)
        with open(out / name, "wb") as file:
            file.truncate(count * image_bytes)
        rows.append({"file": name, "count": count, "bytes": count * image_bytes, "sha256": ""})
    write_index(out / "train.index", n, image_bytes, per_shard)
    part = {"count": n, "rejected": 0, "mean": [0.0] * 3, "std": [1.0] * 3, "fingerprint": "", "shards": rows}
    with open(out / "train.index", "rb") as file:
        part["index"] = {"file": "train.index", "sha256": index.sha256(file)}
    write_manifest(out, Options("imagenet"), [], {"train": part}, 0, "")


def write_index(path: Path, n: int, image_bytes: int, per_shard: int) -> None:
    """An index as `index.write` makes it, a chunk of rows at a time: hundreds of millions do not fit in memory."""
    with open(path, "wb") as file:
        file.write(np.array([(index.MAGIC, index.VERSION, n, n * KEY)], index.HEADER).tobytes())
        file.truncate(64)
        at = 64
        for name, kind in (*index.COLUMNS.items(), ("key_starts", np.uint64), ("keys", np.uint8)):
            file.seek(at)
            for first in range(0, n + (name == "key_starts"), CHUNK):
                row = np.arange(first, min(first + CHUNK, n + (name == "key_starts")))
                column(name, row, image_bytes, per_shard).astype(kind).tofile(file)
            file.flush()
            at = -(-file.tell() // 64) * 64
        file.truncate(at)


def column(name: str, row: np.ndarray, image_bytes: int, per_shard: int) -> np.ndarray:
    """The values of these rows: photos of a thousand classes and of several sizes."""
    if name == "keys":
        keys = np.full((len(row), KEY), ord("n"), np.uint8)
        for digit in range(10):
            keys[:, -1 - digit] = row // 10**digit % 10 + ord("0")
        return keys
    values: dict[str, Any] = {
        "label": row % 1000, "offset": row % per_shard * image_bytes, "length": image_bytes, "shard": row // per_shard,
        "height": 300 + row % 201, "width": 500 - row % 101, "crc": 0, "kind": 0, "key_starts": row * KEY,
    }  # fmt: skip
    return np.broadcast_to(values[name], len(row))


def start(folder: str, order: str, batch: int, world: int) -> dict[str, float]:
    """In a process of its own: what train.py does before its first step with the last of `world` ranks, and what it takes.

    `own_bytes`: memory that every rank has for itself; `peak_bytes`: at most, pages of the index included, which are shared.
    """

    plan(10, seed=0, batch=2, order=order).batch(0)  # compiled
    before = memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    times = [time.perf_counter()]
    store = Store(folder)
    times.append(time.perf_counter())
    store.default_size()
    times.append(time.perf_counter())
    order_of = plan(store.labels, seed=0, batch=batch, world=world, rank=world - 1, order=order)
    order_of.batch(0)
    times.append(time.perf_counter())
    after = memory()
    steps = order_of.steps(1) + 1
    begun = time.perf_counter()
    order_of.batch(steps)
    epoch = time.perf_counter() - begun
    again = time.perf_counter()
    for step in range(10):
        order_of.batch(steps + step)
    return {
        "open_s": times[1] - times[0], "size_s": times[2] - times[1], "plan_s": times[3] - times[2], "epoch_s": epoch,
        "batch_ms": 100 * (time.perf_counter() - again), "own_bytes": after["RssAnon"] - before["RssAnon"],
        "peak_bytes": after["VmHWM"] - before["VmRSS"],
    }  # fmt: skip


def memory() -> dict[str, float]:
    """Bytes of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return {key: 1024.0 * int(found[key].split()[0]) for key in ("VmHWM", "VmRSS", "RssAnon")}


def qualities(n: int) -> dict[str, float]:
    """`shuffle_quality` of the first epoch by order; of a large set extrapolated: `random` is that of `QUALITY` samples, and
    `blocks`, whose windows are as large in any set, falls with the set's size."""
    some = min(n, QUALITY)
    return {
        order: shuffle_quality(permutation(some, 0, 0, order)) * (some / n if order == "blocks" else 1)
        for order in ORDERS
    }


# --- replayed and computed ----------------------------------------------------------------------------------------------


def scaled(n: int, nodes: int, order: str, args: Args) -> dict[str, Any]:
    """One row: what a node fetches by replay and by formula, and what follows for bandwidths."""
    cluster = Cluster(n, nodes, nodes * args.gpus * args.batch_per_gpu, 1e3 * args.image_kb, 1e9 * args.cache_gb, order)
    epochs = replay(cluster, 3)
    first, later = epochs[0], epochs[-1]
    gigabytes = lambda epoch: epoch.fetched / epoch.share * cluster.piece_bytes / 1e9  # noqa: E731
    guessed = [pieces * cluster.piece_bytes / 1e9 for pieces in formula(cluster)]
    return {
        "nodes": nodes, "order": order, "batch": cluster.batch, "share": first.share, "own_gb": n * args.image_kb / 1e6 / nodes,
        "first_gb": gigabytes(first), "later_gb": gigabytes(later), "formula_first_gb": guessed[0],
        "formula_later_gb": guessed[1], "first_hits": first.hits, "later_hits": later.hits, "late": later.late / later.images,
        **bandwidth(cluster, first, later, args),
    }  # fmt: skip


def bandwidth(cluster: Cluster, first: Epoch, later: Epoch, args: Args) -> dict[str, Any]:
    """At full speed: bytes a second into a node and out of the storage; what of it can be had; and what is the limit."""
    full = args.gpus * args.images_per_s
    rates = [epoch.fetched * cluster.piece_bytes / epoch.images * full / 1e9 for epoch in (first, later)]
    possible = [
        min(1.0, args.node_gb_s / max(r, 1e-9), args.storage_gb_s / max(r * cluster.nodes, 1e-9)) for r in rates
    ]
    return {
        "first_node_gb_s": rates[0], "later_node_gb_s": rates[1], "first_storage_gb_s": rates[0] * cluster.nodes,
        "later_storage_gb_s": rates[1] * cluster.nodes, "first_speed": possible[0], "later_speed": possible[1],
        "images_per_s": cluster.nodes * full * possible[1], "steps": cluster.images / cluster.batch,
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


def name_of(n: int) -> str:
    return NAMES.get(n, f"{number(n)} images")


def basis(n: int) -> str:
    """What the figures of `qualities` rest on."""
    return "all samples, measured" if n <= QUALITY else f"extrapolated from {number(QUALITY)} samples"


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)) + "\n"


def page(result: dict[str, Any]) -> str:
    """results/scale.md: measured, replayed and computed apart."""
    s, about = result["settings"], result["environment"]
    images, nodes = " ".join(f"{x:g}" for x in s["images"]), " ".join(str(x) for x in s["nodes"])
    every = [(one, row) for one in result["sets"] for row in one["rows"]]
    pairs = [(one, order) for one in result["sets"] for order in ORDERS]
    limits = [[name_of(one["images"]), order, *bounds(one, order, s).values()] for one, order in pairs]
    mixing = [
        [name_of(x["images"]), *(f"{x['quality'][o]:.2%}" for o in ORDERS), basis(x["images"])] for x in result["sets"]
    ]
    parts = [
        "# Many machines, without the machines",
        f"`python tools/profile.py plan --images {images} --nodes {nodes}`, commit {about['commit']}, {about['device']},"
        f" {about['cores']} cores, seed 0. {s['gpus']} GPUs a node, {s['batch_per_gpu']} images a step and GPU,"
        f" {s['image_kb']:g} kB an image, shards of {s['shard_mb']:g} MB, a cache of {s['cache_gb']:g} GB a node.",
        "## Measured: starting up",
        "An index of that many samples is generated in full; the shards are empty files of the right length on a local disk."
        " A fresh process opens them, works out the view size, plans, and takes the first batch of the last of"
        f" {max(s['nodes']) * s['gpus']:,} ranks. Memory beyond imports: a rank's own, and the peak with the pages of the index"
        " that it touched, which ranks share. `next epoch`: the pause when a batch is the first of another epoch.",
        table(STARTED, [started(one, order) for one, order in pairs]),
        f"## Measured up to {QUALITY:,} samples, beyond extrapolated: how well an order mixes",
        "How far apart neighbours in storage come, as a share of what a uniform shuffle gives. `blocks` mixes"
        f" {MIXED:,} samples at a time, whatever the size of the set; storage is shuffled once, when it is written.",
        table(["set", *ORDERS, "basis"], mixing),
        "## Replayed: what a node fetches",
        f"Nothing is timed: the real plan's batches go through the cache's policy (pieces of {PIECE >> 20} MiB, announced"
        " ahead; what was announced longest ago goes). GB a node and epoch; `own` is its images' bytes, the least there is"
        " without a cache. The third epoch stands for all later ones. `hits`: announced images that were there, later."
        " `late`: images whose piece was fetched and gone again before it was read. Where `replayed` is below 100 %, that"
        " much of each epoch was, and the rest is in proportion. `formula`: from averages alone, what one would have guessed.",
        table(REPLAYED, [replayed(one, row) for one, row in every]),
        "## Computed: bandwidth, and where it stops",
        f"At {s['images_per_s']:g} images/s a GPU, from the bytes above. Taken as given: {s['node_gb_s']:g} GB/s into a node,"
        f" {s['storage_gb_s']:g} GB/s from the storage. `speed`: the share of full speed that these allow.",
        table(COMPUTED, [computed(one, row) for one, row in every]),
        "The number of nodes (of those above, or exactly) from which on something is the limit. Fewer shards than GPUs stop"
        " loaders that give each worker shards of its own; here samples are dealt, not shards, and it is no limit.",
        table(["set", "order", *bounds(result["sets"][0], ORDERS[0], s)], limits),
        "![share of full speed by nodes](scale.png)",
    ]  # fmt: skip
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


STARTED = [
    "set",
    "index",
    "order",
    "open",
    "view size",
    "plan and first batch",
    "a batch",
    "next epoch",
    "own memory",
    "peak",
]
REPLAYED = ["set", "order", "nodes", "own", "first", "formula", "later", "formula", "hits", "late", "replayed"]
COMPUTED = ["set", "order", "nodes", "into a node, GB/s: first", "later", "from the storage: first", "later",
            "speed: first", "later", "images/s, later", "steps an epoch", "global batch"]  # fmt: skip


def started(one: dict[str, Any], order: str) -> list[str]:
    x = one["start"][order]
    seconds = (
        f"{x['open_s']:.2f} s",
        f"{x['size_s']:.2f} s",
        f"{x['plan_s']:.2f} s",
        f"{x['batch_ms']:.1f} ms",
        f"{x['epoch_s']:.2f} s",
    )
    sizes = (quantity(max(0, x["own_bytes"]), "B"), quantity(x["peak_bytes"], "B"))
    return [name_of(one["images"]), quantity(one["start"]["index_bytes"], "B"), order, *seconds, *sizes]


def replayed(one: dict[str, Any], row: dict[str, Any]) -> list[str]:
    keys = ("own_gb", "first_gb", "formula_first_gb", "later_gb", "formula_later_gb")
    shares = [f"{row[key]:.1%}" for key in ("later_hits", "late")]
    sizes = [number(row[key]) for key in keys]
    return [name_of(one["images"]), row["order"], f"{row['nodes']}", *sizes, *shares, f"{row['share']:.0%}"]


def computed(one: dict[str, Any], row: dict[str, Any]) -> list[str]:
    keys = ("first_node_gb_s", "later_node_gb_s", "first_storage_gb_s", "later_storage_gb_s")
    speeds = [f"{row[key]:.0%}" for key in ("first_speed", "later_speed")]
    rates = [number(row[key]) for key in keys]
    counts = [f"{row['images_per_s']:,.0f}", number(row["steps"]), f"{row['batch']:,}"]
    return [name_of(one["images"]), row["order"], f"{row['nodes']}", *rates, *speeds, *counts]


def draw(result: dict[str, Any], path: Path) -> None:
    """The share of full speed against the number of nodes, a panel a set."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    nodes, sets = sorted(result["settings"]["nodes"]), result["sets"]
    figure, axes = plt.subplots(1, len(sets), figsize=(4.2 * len(sets), 3.8), sharey=True, squeeze=False)
    for axis, one in zip(axes[0], sets):
        for order, color, width in zip(
            ORDERS, ("tab:blue", "tab:orange"), (5, 2)
        ):  # both are seen where one lies on the other
            rows = sorted((row for row in one["rows"] if row["order"] == order), key=lambda row: row["nodes"])
            for epoch, style in (("first", "--"), ("later", "-")):
                label = f"{order}, {epoch} epoch{'s' if epoch == 'later' else ''}"
                y = [100 * row[f"{epoch}_speed"] for row in rows]
                axis.plot(nodes, y, style, color=color, linewidth=width, marker="o", markersize=width + 2, label=label)
        axis.set(xscale="log", xlabel="nodes", title=name_of(one["images"]), ylim=(0, 105), xticks=nodes)
        axis.set_xticklabels(nodes)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("% of full speed that storage and network allow")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
