"""Views a second beside other pipelines: python tools/profile.py peers --data shards/photos --json results/pipeline.json

All contenders get the same photos: ours as shards, the peers as files in a temporary folder (ffcv as a .beton). For each
number of views all are built and warmed, then measured in turn, round after round, so that a noisy neighbour hits all.
Wall time and the core time of the process tree are both kept; ratios are medians over rounds of the same round's ratio.
`--table FILE.json` only prints the Markdown of an earlier run. On CUDA: `--device cuda`.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import tyro
from PIL import Image

from manyview.bench import contenders
from manyview.bench.contenders import Setting
from manyview.pipeline import engines
from manyview.pipeline.codec import decode
from manyview.pipeline.engines import reference
from manyview.pipeline.errors import UserError
from manyview.pipeline.machine import cores
from manyview.pipeline.store import Store
from manyview.pipeline.views import Policy, parameters, policy
from manyview.training.monitor import environment

# What a contender makes: float32 as a network takes it, the same of crop and flip alone, or uint8 as it goes to a GPU.
FULL, SIMPLE, UINT8 = "", "crop+flip+normalize", ", uint8 out"
PLAIN = {"jitter": 0, "grey": 0, "blur": 0}  # crop, flip and normalize: what the stock ffcv loader can do
FIT_SECONDS, FIT_ROUNDS = 0.15, 5  # of core time at the least number of views; passes over the numbers of views
PACKAGES = (
    "torch", "torchvision", "numpy", "numba", "simplejpeg", "opencv-python-headless", "pillow", "lightly",
    "kornia", "ffcv", "nvidia-dali-cuda130", "nvidia-dali-cuda120",
)  # fmt: skip


@dataclass
class Args:
    data: Path | None = Path("shards/photos")
    """Shards of photos; None leaves their table out."""
    small: Path | None = None
    """Shards of images of at most 96 px, for the second table (policy `cifar`, at their size)."""
    views: str = "1,2,4,8,16"
    """Numbers of views."""
    size: int = 224
    """Pixels of a view of the photos."""
    batch: int = 32
    threads: int = cores()
    """Threads, or worker processes of the peers."""
    rounds: int = 3
    images: int = 384
    """Photos a pass goes over, the same for every pipeline and number of views; five times as many of the small images."""
    only: str = ""
    """Contenders to take, by parts of their names; all if empty."""
    device: str = "cpu"
    json: Path | None = None
    """Where the result goes; the same name with .md gets the tables."""
    table: Path | None = None
    """Print the tables of this earlier result and measure nothing."""


def main(argv: list[str]) -> None:
    args = tyro.cli(Args, args=argv, description=__doc__, prog="profile.py peers")
    if args.table:
        if not args.table.is_file():
            raise UserError(f"--table {args.table}: no such file")
        print(markdown(json.loads(args.table.read_text())))
        return
    counts = _counts(args.views)
    for name in ("rounds", "batch", "threads", "images", "size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")
    result: dict[str, Any] = {
        "command": "python tools/profile.py peers " + shlex.join(argv),
        "environment": environment(engines.device_of(args.device)),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "rounds": args.rounds, "batch": args.batch, "threads": args.threads, "rows": [], "ratios": [], "costs": [], "parity": {},
    }  # fmt: skip
    for path, name, size in [(args.data, "simclr", args.size), (args.small, "cifar", 0)]:
        if path is not None:
            store = Store(path)
            side = size or int(store.heights[0])
            if not size and side > engines.SMALL:
                raise UserError(f"--small {path}: its images have {side} px, more than {engines.SMALL}")
            if not chosen(args, side):
                raise UserError(f"--only {args.only}: no pipeline here has that in its name")
            result["parity"] |= parity(args, store, name, side)
            for count in counts:
                compare(args, store, name, side, count, result)
            if args.device == "cpu":
                result["costs"] += costs(args, store, name, side, counts)
    result["fits"] = fits(result["costs"])
    text = markdown(result)
    print(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
        args.json.with_suffix(".md").write_text(text)


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise UserError(f"--views {text}: expected numbers such as 1,2,4,8,16")
    return counts


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def chosen(args: Args, size: int) -> list[tuple[str, str, Any]]:
    """(name, what it makes, context manager to build it): ours first, as ratios are of those, to peers that make the same."""
    ours, gpu, small = contenders.ours, args.device == "cuda", size <= engines.SMALL
    dali = bool(_version("nvidia-dali-cuda130") or _version("nvidia-dali-cuda120"))
    names = ["cpu", *(["dali"] if dali else []), *(["resident"] if small else [])]
    found: list[tuple[str, str, Any]] = [(f"manyview {name}", FULL, partial(ours, name)) for name in names]
    if gpu and not small:
        found.append(("decode ceiling (nvJPEG)", FULL, contenders.decode_ceiling))
    if not gpu:
        found += [
            ("torchvision v2 PIL + DataLoader", FULL, contenders.torchvision_pil),
            ("torchvision v2 tensor + DataLoader", FULL, contenders.torchvision_tensor),
        ]
        found += [("lightly + DataLoader", FULL, contenders.lightly)] if _version("lightly") else []
    if not gpu and not small:
        found += [("stock DALI CPU graph", FULL, contenders.stock_dali)] if dali else []
        found.append(("manyview cpu", SIMPLE, partial(ours, "cpu")))
        found += [("stock ffcv Loader", SIMPLE, contenders.ffcv)] if _version("ffcv") else []
    found += [("kornia (decode not counted)", FULL, contenders.kornia)] if _version("kornia") else []
    found += [(f"manyview {name}", UINT8, partial(ours, name, normalized=False)) for name in names]
    if not gpu and not small:
        found.append(("floor: threads, torch resize, OpenCV", UINT8, contenders.floor))
    wanted = [part for part in args.only.split(",") if part]
    return [one for one in found if not wanted or any(part in one[0] for part in wanted)]


def compare(args: Args, store: Store, name: str, size: int, count: int, result: dict[str, Any]) -> None:
    """Build every contender for `count` views, measure them in turn, and add their rows and ratios."""
    images = min(len(store), args.images * (1 if size > engines.SMALL else 5))  # small images are made in no time
    even = args.batch * args.threads  # every worker of a peer gets as many batches
    images = images // even * even or images // args.batch * args.batch
    if images == 0:
        raise UserError(f"{store.name} has {len(store)} images, fewer than one --batch of {args.batch}")
    full, plain = policy(name, count, size), policy(name, count, size, PLAIN)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = extract(store, images, folder)
        setting = Setting(store, files, full, count, args.batch, args.threads, args.device)
        running = {}
        for label, kind, build in chosen(args, size):
            if label.startswith("stock ffcv"):
                setting.beton = beton(store.path, folder)
            made = build(replace(setting, policy=plain if kind == SIMPLE else full))
            running[label, kind] = stack.enter_context(made)
            running[label, kind]()
        taken: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in running}
        for _ in range(args.rounds):
            for key, run in running.items():
                taken[key].append(spend(run, images * count))
    for (label, kind), times in taken.items():
        walls, core = zip(*times)
        row = {
            "pipeline": label, "policy": titled(name, kind), "size": size, "views": count,
            "views_per_s": round(images * count / statistics.median(walls), 1),
            "core_ms_per_image": round(1e3 * statistics.median(core) / images, 4),
            "spread": round((max(walls) - min(walls)) / statistics.median(walls), 3), "images": images,
        }  # fmt: skip
        result["rows"].append(row)
        print(f"{row['policy']:20s} {size:4d} px  V={count:<3d} {label:40s} {row['views_per_s']:10,.0f} views/s  "
              f"{row['core_ms_per_image']:8.3f} core-ms/image", file=sys.stderr)  # fmt: skip
    add_ratios(taken, name, size, count, result)


def titled(name: str, kind: str) -> str:
    """What a table is called: the policy, and what becomes of the views."""
    return kind if kind == SIMPLE else name + kind


def spend(run: contenders.Contender, expected: int) -> tuple[float, float]:
    """(wall, core) seconds of a measured run, worker processes included."""
    core, begun = core_seconds(), time.perf_counter()
    made = run()
    assert made == expected, f"{made} views instead of {expected}"
    return time.perf_counter() - begun, core_seconds() - core


def core_seconds() -> float:
    """Seconds of all cores spent by this process and its children that are alive."""
    total = 0.0
    for process in (me := psutil.Process(), *me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def add_ratios(taken: dict, name: str, size: int, count: int, result: dict[str, Any]) -> None:
    for (ours, kind), mine in taken.items():
        for (peer, alike), theirs in taken.items():
            if not ours.startswith("manyview") or peer.startswith("manyview") or kind != alike:
                continue
            tick = 0.01  # seconds, of the CPU clock: a shorter pass may read 0
            wall, core = (statistics.median(b[k] / max(a[k], tick) for a, b in zip(mine, theirs)) for k in (0, 1))
            result["ratios"].append({
                "ours": ours, "peer": peer, "policy": titled(name, kind), "size": size,
                "views": count, "times_the_views_per_s": round(wall, 2), "times_less_core_time": round(core, 2),
            })  # fmt: skip


def costs(args: Args, store: Store, name: str, size: int, counts: list[int]) -> list[dict[str, Any]]:
    """core-ms an image of each of our pipelines at every number of views, to fit a + b V to.

    Of the same images at every V, because photos differ in size; enough of them that the least V takes `FIT_SECONDS`,
    the numbers of views in turn, and the median of `FIT_ROUNDS`. Our pipelines have no worker processes, so the clock is
    the process's own, in nanoseconds: the one that sees children ticks every 10 ms.
    """
    rows = []
    for label, kind, build in chosen(args, size):
        if not label.startswith("manyview"):
            continue
        policies = {v: policy(name, v, size, PLAIN if kind == SIMPLE else None) for v in counts}
        with contextlib.ExitStack() as stack:

            def built(images: int, v: int) -> contenders.Contender:
                setting = Setting(store, [Path()] * images, policies[v], v, args.batch, args.threads)  # noqa: B023
                run = stack.enter_context(build(setting))  # noqa: B023
                run()
                return run

            few = min(len(store), 4 * args.batch) // args.batch * args.batch
            once = core_time(built(few, min(counts))) / few
            images = int(np.clip(FIT_SECONDS / once, few, len(store))) // args.batch * args.batch
            running = {v: built(images, v) for v in counts}
            taken: dict[int, list[float]] = {v: [] for v in counts}
            for _ in range(FIT_ROUNDS):
                for v, run in running.items():
                    taken[v].append(core_time(run))
        for v in counts:
            cost = round(1e3 * statistics.median(taken[v]) / images, 5)
            rows.append({"pipeline": label, "policy": titled(name, kind), "size": size, "views": v, "core_ms_per_image": cost,
                         "images": images, "rounds": FIT_ROUNDS})  # fmt: skip
    return rows


def core_time(run: contenders.Contender) -> float:
    """Seconds of all cores that this process spends in a run."""
    begun = time.process_time()
    run()
    return time.process_time() - begun


def fits(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """core-ms an image = a + b V for each pipeline: decode once means that V does not touch `a`."""
    found = []
    for key in dict.fromkeys((r["pipeline"], r["policy"], r["size"]) for r in rows):
        mine = [r for r in rows if (r["pipeline"], r["policy"], r["size"]) == key]
        if len(mine) < 3:
            continue
        v, t = np.array([r["views"] for r in mine]), np.array([r["core_ms_per_image"] for r in mine])
        b, a = np.polyfit(v, t, 1)
        r2 = 1 - ((t - a - b * v) ** 2).sum() / ((t - t.mean()) ** 2).sum()
        found.append({"pipeline": key[0], "policy": key[1], "size": key[2],
                      "a": round(float(a), 4), "b": round(float(b), 4), "r2": round(float(r2), 5)})  # fmt: skip
    return found


def parity(args: Args, store: Store, name: str, size: int) -> dict[str, Any]:
    """Least and mean PSNR of our engines' views against the reference, and whether each image was decoded once."""
    ids = np.arange(min(32, len(store)))
    drawn = parameters(_with_solarize(name, size), 0, 0 * ids, ids, store.heights[ids], store.widths[ids])
    truth = reference.engine(store, ids, drawn)[0].double()
    result = {}
    for label in dict.fromkeys(label for label, *_ in chosen(args, size) if label.startswith("manyview")):
        engine, _ = engines.create(label.split()[1], store, args.device, threads=args.threads)
        before = engine.decoded if label != "manyview resident" else engine.decoded - len(ids)
        made = engine(ids, drawn)[0].cpu().double()
        error = ((made - truth) ** 2).mean((2, 3, 4)).clamp_min(1e-9)
        psnr = 10 * torch.log10(255**2 / error)
        result[f"{label} {size} px"] = {
            "min_db": round(float(psnr.min()), 1), "mean_db": round(float(psnr.mean()), 1),
            "decodes_per_image": (engine.decoded - before) / len(ids),
        }  # fmt: skip
        engine.close()
    return result


def _with_solarize(name: str, size: int) -> Policy:
    """Four views that use every step."""
    return policy(name, 4, size, {"solarize": 0.2, "blur": 0.5})


def extract(store: Store, images: int, folder: Path) -> list[Path]:
    """The photos as files: the JPEGs as they are, raw pixels as PNG."""
    files = []
    for i in range(images):
        payload = store.read(i)
        files.append(folder / f"{i:06d}.{'jpg' if payload.ndim == 1 else 'png'}")
        if payload.ndim == 1:
            files[-1].write_bytes(payload.tobytes())
        else:
            Image.fromarray(decode(payload)).save(files[-1])
    return files


def beton(data: Path, folder: Path) -> Path:
    """The photos in one .beton."""
    command = [
        "write",
        "--dataset",
        "shards",
        "--source",
        str(data),
        "--out",
        str(folder / "beton"),
        "--format",
        "ffcv",
    ]
    program = str(Path(__file__).resolve().parents[1] / "tools" / "shards.py")
    subprocess.run([sys.executable, program, *command, "--shard-mb", "100000"], check=True, capture_output=True)
    return next((folder / "beton").glob("train-*.beton"))


def markdown(result: dict[str, Any]) -> str:
    env = result["environment"]
    lines = [
        "# Views a second", "",
        f"`{result['command']}`", "",
        f"Commit {env['commit']}, {env['device']} ({env['cores']} cores); {result['rounds']} rounds in turn, batches of "
        f"{result['batch']}, {result['threads']} threads or workers; "
        + ", ".join(f"{k} {v}" for k, v in result["versions"].items()) + ".",
        "Core-ms is the time of all cores, worker processes included; it moves less than wall time on a shared machine. Every "
        "pipeline makes normalized float32, as a network takes it, except in the tables `uint8 out`: what is sent to a GPU and "
        "normalized there. Nothing is made ahead of a pass, so DALI's stock graph runs without prefetching.",
    ]  # fmt: skip
    for policy_, size in dict.fromkeys((r["policy"], r["size"]) for r in result["rows"]):
        rows = [r for r in result["rows"] if (r["policy"], r["size"]) == (policy_, size)]
        counts = sorted({r["views"] for r in rows})
        lines += ["", f"## {policy_}, {size} px", "", "| pipeline | " + " | ".join(f"V={v}" for v in counts) + " |"]
        lines += ["|---|" + "---:|" * len(counts)]
        for label in dict.fromkeys(r["pipeline"] for r in rows):
            mine = {r["views"]: r for r in rows if r["pipeline"] == label}
            cells = (
                f"{mine[v]['views_per_s']:,.0f} ({mine[v]['core_ms_per_image']:.3g})" if v in mine else ""
                for v in counts
            )
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        widest = max(rows, key=lambda r: r["spread"])
        lines += ["", f"views/s (core-ms an image), passes over {rows[0]['images']:,} images; the widest spread over rounds is "
                  f"{widest['spread']:.0%} of the median ({widest['pipeline']}, V={widest['views']})."]  # fmt: skip
    lines += [
        "",
        "## Ratios",
        "",
        "| ours | peer | policy | px | V | views/s | core time |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {r['ours']} | {r['peer']} | {r['policy']} | {r['size']} | {r['views']} | {r['times_the_views_per_s']:.3g}x | "
        f"{r['times_less_core_time']:.3g}x less |"
        for r in result["ratios"]
    ]
    lines += [
        "",
        "## Cost is a + b V core-ms an image",
        "",
        f"Of the same images at every V, the numbers of views in turn, median of {FIT_ROUNDS} passes of at least "
        f"{FIT_SECONDS:g} s of core time.",
        "",
        "| pipeline | policy | px | a | b | R2 |",
        "|---|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {f['pipeline']} | {f['policy']} | {f['size']} | {f['a']:.3g} | {f['b']:.3g} | {f['r2']:.4f} |"
        for f in result["fits"]
    ]
    lines += ["", "## Pixels against the slow reference", "", "| engine | least PSNR | mean PSNR | decodes an image |"]
    lines += ["|---|--:|--:|--:|"]
    lines += [
        f"| {name} | {p['min_db']} dB | {p['mean_db']} dB | {p['decodes_per_image']:g} |"
        for name, p in result["parity"].items()
    ]
    return "\n".join(lines) + "\n"
