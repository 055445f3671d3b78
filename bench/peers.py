"""Views a second beside other pipelines: python tools/profile.py peers --data shards/photos --json results/pipeline.json

All contenders get the same photos: ours as shards, the peers as files in a temporary folder (ffcv as a .beton, TurboLoader
as a tar). For each number of views all are built and warmed, then measured in turn, each round in another order, so that a
noisy neighbour hits all. Wall time and the core time of the process tree are both kept; ratios are medians over rounds of the
same round's ratio. Another call with the same `--json` adds its rows, if commit and machine are the same.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import stats

from manyview.bench import output
from manyview.bench.contenders import CONTENDERS, Contender, Run, Setting
from manyview.bench.harness import Spent, interleaved, now, tree_seconds
from manyview.pipeline import engines
from manyview.pipeline.codec import decode
from manyview.pipeline.engines import reference
from manyview.pipeline.errors import UserError
from manyview.pipeline.machine import cores
from manyview.pipeline.store import Store
from manyview.pipeline.views import parameters, policy

PLAIN = {"jitter": 0, "grey": 0, "blur": 0}  # crop, flip and normalize: what the stock ffcv loader can do
TICK = 0.01  # seconds, of the CPU clock that sees worker processes: a shorter pass may read 0
PACKAGES = (
    "torch", "torchvision", "numpy", "numba", "simplejpeg", "opencv-python-headless", "pillow", "lightly", "kornia", "ffcv",
    "nvidia-dali-cuda130", "nvidia-dali-cuda120", "variopinta", "turboloader",
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
    batch_size: int = 32
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


@dataclass(frozen=True)
class Case:
    """One set of images under one policy, and who is compared on it."""

    args: Args
    store: Store
    policy: str
    size: int
    contenders: list[Contender]

    def title(self, one: Contender) -> str:
        """What a table is called: the policy, and what becomes of the views."""
        name = ("crop+flip+normalize" if one.floats else "crop+flip") if one.plain else self.policy
        return name if one.floats else f"{name}, uint8 out"


def main(argv: list[str]) -> None:
    args = output.parse(Args, argv, __doc__, "peers", rounds=1, batch_size=1, threads=1, images=1, size=1)
    counts = output.whole_numbers("--views", args.views, 1)
    result = begun(args, output.environment(engines.device_of(args.device), "peers", argv))
    for case in cases(args):
        result["does"] |= {one.name: one.does for one in case.contenders if one.does}
        result["parity"] |= parity(case)
        for views in counts:
            compare(case, views, result)
            result["fits"] = fits(result["rows"]) if args.device == "cpu" else []
            output.write(args.json, result, markdown(result))  # what there is, should it be stopped
    print(markdown(result), end="")


def begun(args: Args, env: dict[str, Any]) -> dict[str, Any]:
    """What `--json` holds of this commit, machine and settings, to be added to, or an empty result."""
    alike = {"commit": env["commit"], "hardware": f"{output.hardware(env)} ({env['cores']} cores)", "rounds": args.rounds,
             "batch": args.batch_size, "threads": args.threads,
             "versions": {name: version for name in PACKAGES if (version := output.version(name))}}  # fmt: skip
    empty = alike | {"commands": [], "environment": env, "rows": [], "ratios": [], "parity": {}, "does": {}}
    there = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    result = there if alike.items() <= there.items() else empty
    result["commands"].append(f"python {env['command']}")
    return result


def add(result: dict[str, Any], kind: str, rows: list[dict[str, Any]]) -> None:
    """Rows, instead of those of the same pipelines, policy and views."""
    same = ("pipeline", "ours", "peer", "policy", "size", "views")
    result[kind] = list({tuple(row.get(key) for key in same): row for row in [*result[kind], *rows]}.values())


def cases(args: Args) -> list[Case]:
    """The sets of images that were asked for. UserError where one cannot be compared."""
    asked = []
    wanted = [part for part in args.only.split(",") if part] or [""]
    for path, name, size in ((args.data, "simclr", args.size), (args.small, "cifar", 0)):
        if path is None:
            continue
        store = Store(path)
        store.refuse_other_than_rgb("the comparison with peers")
        side = size or int(store.heights[0])
        if not size and side > engines.SMALL:
            raise UserError(f"--small {path}: its images have {side} px, more than {engines.SMALL}")
        if len(store) < args.batch_size:
            raise UserError(f"{store.name} has {len(store)} images, fewer than one --batch-size of {args.batch_size}")
        kind = "tiny" if side <= engines.SMALL else "photos"
        who = [one for one in CONTENDERS if one.fits(kind, args.device) and any(part in one.name for part in wanted)]
        if not who:
            raise UserError(f"--only {args.only}: no pipeline here has that in its name")
        asked.append(Case(args, store, name, side, who))
    return asked


def compare(case: Case, views: int, result: dict[str, Any]) -> None:
    """Build every contender for so many views, measure them in turn, and add their rows and ratios."""
    args = case.args
    images = min(len(case.store), args.images * (5 if case.size <= engines.SMALL else 1))  # small ones take no time
    even = args.batch_size * args.threads  # every worker of a peer gets as many batches
    images = images // even * even or images // args.batch_size * args.batch_size
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = extract(case.store, images, folder)
        running: dict[Contender, Callable[[], Spent]] = {}
        for one in case.contenders:
            chosen = policy(case.policy, views, case.size, PLAIN if one.plain else None)
            how = (args.batch_size, args.threads, args.device, one.floats, folder)
            setting = Setting(case.store, files, chosen, views, *how)
            run = stack.enter_context(one.build(setting))
            running[one] = partial(measure, run, images * views, time.process_time if one.engine else tree_seconds)
            running[one]()
        taken = interleaved(running, args.rounds, lambda call: call(), shuffled=True)
    rows = []
    for one, times in taken.items():
        walls, core_ms = [t.wall for t in times], 1e3 * median(t.core for t in times) / images
        speed, policy_of = images * views / median(walls), case.title(one)
        rows.append({
            "pipeline": one.name, "policy": policy_of, "size": case.size, "views": views,
            "views_per_s": round(speed, 1), "core_ms_per_image": round(core_ms, 4),
            "spread": round((max(walls) - min(walls)) / median(walls), 3), "images": images,
        })  # fmt: skip
        print(f"{policy_of:20s} {case.size:4d} px  V={views:<3d} {one.name:40s} {speed:10,.0f} views/s  "
              f"{core_ms:8.3f} core-ms/image", file=sys.stderr)  # fmt: skip
    add(result, "rows", rows)
    add(result, "ratios", ratios(case, views, taken))


def measure(run: Run, count: int, core_clock: Callable[[], float]) -> Spent:
    """A pass that makes `count` views. Ours has no worker processes and is read in nanoseconds, peers in ticks of 10 ms."""
    begun, views = now(core_clock), run()
    taken = now(core_clock) - begun
    assert views == count, f"{views} views instead of {count}"
    return taken


def ratios(case: Case, views: int, taken: dict[Contender, list[Spent]]) -> list[dict[str, Any]]:
    """Of ours to every peer that makes the same."""
    rows = []
    for ours, mine in taken.items():
        for peer, theirs in taken.items():
            if not ours.engine or peer.engine or (ours.plain, ours.floats) != (peer.plain, peer.floats):
                continue
            wall = median(b.wall / max(a.wall, TICK) for a, b in zip(mine, theirs))
            core = median(b.core / max(a.core, TICK) for a, b in zip(mine, theirs))
            rows.append({
                "ours": ours.name, "peer": peer.name, "policy": case.title(ours), "size": case.size, "views": views,
                "times_the_views_per_s": round(wall, 2), "times_less_core_time": round(core, 2),
            })  # fmt: skip
    return rows


def fits(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """core-ms an image = a + b V for each of our pipelines: decode once means that V does not touch `a`."""
    laws, ours = [], {one.name for one in CONTENDERS if one.engine}
    for (pipeline, name, size), mine in output.by(rows, "pipeline", "policy", "size").items():
        if pipeline in ours and len(mine) >= 3:
            line = stats.linregress([r["views"] for r in mine], [r["core_ms_per_image"] for r in mine])
            laws.append({"pipeline": pipeline, "policy": name, "size": size, "a": round(line.intercept, 4),
                         "b": round(line.slope, 4), "r2": round(line.rvalue**2, 5)})  # fmt: skip
    return laws


def parity(case: Case) -> dict[str, Any]:
    """Least and mean PSNR of our engines' views against the reference, and whether each image was decoded once."""
    store, result = case.store, {}
    ids = np.arange(min(32, len(store)))
    every = policy(case.policy, 4, case.size, {"solarize": 0.2, "blur": 0.5})  # views that use every step
    views_of = parameters(every, 0, 0 * ids, ids, store.heights[ids], store.widths[ids])
    truth = reference.engine(store, ids, views_of)[0].double()
    for name in dict.fromkeys(one.engine for one in case.contenders if one.engine):
        engine, _ = engines.create(name, store, case.args.device, threads=case.args.threads)
        before = engine.decoded if name != "resident" else engine.decoded - len(ids)
        views = engine(ids, views_of)[0].cpu().double()
        psnr = 10 * torch.log10(255**2 / ((views - truth) ** 2).mean((2, 3, 4)).clamp_min(1e-9))
        result[f"manyview {name} {case.size} px"] = {
            "min_db": round(float(psnr.min()), 1), "mean_db": round(float(psnr.mean()), 1),
            "decodes_per_image": (engine.decoded - before) / len(ids),
        }  # fmt: skip
        engine.close()
    return result


def extract(store: Store, images: int, folder: Path) -> list[Path]:
    """The photos as files: the JPEGs as they are, raw pixels as PNG."""
    files = []
    for i in range(images):
        payload = store.read(i)
        files.append(folder / f"{i:06d}.{'jpg' if payload.ndim == 1 else 'png'}")
        if payload.ndim == 1:
            payload.tofile(files[-1])
        else:
            Image.fromarray(decode(payload)).save(files[-1])
    return files


def markdown(result: dict[str, Any]) -> str:
    counts = sorted({row["views"] for row in result["rows"]})
    ratios = by_views(result["ratios"], counts, ("ours", "peer", "policy", "size"),
                      lambda r: f"{r['times_the_views_per_s']:.3g} ({r['times_less_core_time']:.3g})")  # fmt: skip
    tables = [speeds(policy, size, rows, counts, result["hardware"])
              for (policy, size), rows in output.by(result["rows"], "policy", "size").items()]  # fmt: skip
    laws = [[*(f[key] for key in ("pipeline", "policy", "size")), *(f"{f[key]:.4g}" for key in ("a", "b", "r2"))]
            for f in result["fits"]]  # fmt: skip
    pixels = [[name, *(f"{p[key]} dB" for key in ("min_db", "mean_db")), f"{p['decodes_per_image']:g}"]
              for name, p in result["parity"].items()]  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return output.document(
        "# Views a second",
        "\n".join(f"    {command}" for command in result["commands"]),
        f"Commit {result['commit']}, {result['hardware']}; {result['rounds']} rounds in turn,"
        f" batches of {result['batch']}, {result['threads']} threads or workers; {versions}.\n"
        "Core-ms is the time of all cores, worker processes included; it moves less than wall time on a shared machine. Every "
        "pipeline makes normalized float32, as a network takes it, except in the tables `uint8 out`: what is sent to a GPU and "
        "normalized there. Nothing is made ahead of a pass, so DALI's stock graph runs without prefetching.",
        *tables,
        "## How many times as fast",
        "Views a second of ours over the peer's, and in brackets the peer's core time over ours, of the same rounds.",
        output.table(("ours", "peer", "policy", "px", *(f"V={v}" for v in counts)), ratios, left=3),
        "## Cost is a + b V core-ms an image",
        output.table(("pipeline", "policy", "px", "a", "b", "R2"), laws, left=2),
        "## Pixels against the slow reference",
        output.table(("engine", "least PSNR", "mean PSNR", "decodes an image"), pixels),
        "## What each does",
        output.table(("pipeline", ""), result["does"].items(), left=2),
    )


def by_views(rows: list[dict], counts: list[int], keys: tuple[str, ...], told: Callable[[dict], str]) -> list[list]:
    """A line for each group of rows that agree in `keys`, a column for each number of views."""
    lines = []
    for group in output.by(rows, *keys).values():
        at = {row["views"]: told(row) for row in group}
        lines.append([*(group[0][key] for key in keys), *(at.get(v, "") for v in counts)])
    return lines


def speeds(policy: str, size: int, rows: list[dict[str, Any]], counts: list[int], hardware: str) -> str:
    """The table of those that make the same."""
    body = by_views(rows, counts, ("pipeline",), lambda r: f"{r['views_per_s']:,.0f} ({r['core_ms_per_image']:.3g})")
    widest = max(rows, key=lambda r: r["spread"])
    return output.document(
        f"## {policy}, {size} px",
        output.table(["pipeline", *(f"V={v}" for v in counts)], body),
        f"views/s (core-ms an image) on {hardware}, passes over {rows[0]['images']:,} images; the widest"
        f" spread over rounds is {widest['spread']:.0%} of the median ({widest['pipeline']}, V={widest['views']}).",
    )
