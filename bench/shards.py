"""Conversion and reading of shards against their peers: python tools/profile.py shards --source FOLDER

Conversion: images/s and core-ms an image (CPU time of the whole process tree) for the same photos, each contender in a fresh
process with its imports done before the clock starts, rounds interleaved, medians. Two kinds of row, because a writer that
looks at nothing cannot be compared with one that decodes every image:
`checked`  no image comes in whose data do not decode to their end
`copied`   bytes are moved as they are
In both, `webdataset.ShardWriter` is there twice: as it is, and doing by hand all that ours does, so that only the writers differ.
Pieces: what each part of that work costs alone.
Reading: random reads through `Store` (map, checksum, array) against plain `pread` of the same ranges in the same order.
Writes results/shards.md, .json and .csv.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from manyview.bench import output
from manyview.bench.harness import CPU, Call, alone, interleaved, spent, tree_seconds
from manyview.bench.limits import forget
from manyview.bench.writers import CONTENDERS, photos
from manyview.pipeline import codec
from manyview.pipeline.convert import moments
from manyview.pipeline.convert.sources import read_bytes
from manyview.pipeline.convert.write import FORMATS, write_shards
from manyview.pipeline.errors import UserError
from manyview.pipeline.manifest import Options
from manyview.pipeline.store import Store

PACKAGES = ("webdataset", "ffcv", "litdata", "simplejpeg", "isal", "numpy", "torch", "opencv-python-headless")


@dataclass
class Args:
    source: Path
    """Class folders of JPEG photos, below train/ or not."""
    out: Path = Path("results")
    """Where shards.md, shards.json and shards.csv go."""
    scratch: Path | None = None
    """Where shards are written and removed; a temporary folder if not given."""
    rounds: int = 5
    """Interleaved rounds of every contender."""
    jobs: int = 2
    """Processes of every contender."""


def main(argv: list[str]) -> None:
    args = output.parse(Args, argv, __doc__, "shards", rounds=1, jobs=1)
    if not args.source.is_dir() or not photos(args.source):
        raise UserError(f"--source {args.source} {'holds no photos' if args.source.is_dir() else 'is no folder'}")
    if args.scratch is not None and not args.scratch.is_dir():
        raise UserError(f"--scratch {args.scratch} is no folder")
    import cv2

    cv2.setNumThreads(0)  # this process forks: it must have no threads then
    files = photos(args.source)
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        scratch = Path(folder)
        result: dict[str, Any] = {
            "environment": output.environment(CPU, "shards", argv),
            "packages": {name: output.version(name) or "none" for name in PACKAGES},
            "images": len(files), "megabytes": sum(os.path.getsize(path) for path, _ in files) / 1e6,
            "reading": reading(args, scratch), "encodings": encodings(args, scratch), "pieces": pieces(args),
            "conversion": conversion(args, scratch, len(files)),
        }  # fmt: skip
    text = page(result)
    output.write(args.out / "shards.json", result, text, result["conversion"])
    print(text)


def in_turn(contenders: Mapping[str, Call], args: Args, per: int) -> dict[str, float]:
    """Core-ms of each, the median over rounds, for each of `per` items that it goes over."""
    taken = interleaved(contenders, args.rounds, spent)
    return {name: 1e3 * median(one.core for one in times) / per for name, times in taken.items()}


def written(args: Args, out: Path, options: Options) -> Store:
    write_shards(options, args.source, out, jobs=args.jobs, quiet=True)
    return Store(out)


# --- conversion -----------------------------------------------------------------------------------------------------


def convert(number: int, source: Path, target: Path, jobs: int) -> dict[str, float]:
    """One contender, in a process of its own: wall and CPU seconds of the call itself, and what it left on the disk."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, sys.stdout.fileno())
    call = CONTENDERS[number].prepare(source, target, jobs)

    def whole() -> None:
        call()
        for child in multiprocessing.active_children():  # some leave their workers behind; their time counts too
            child.join()

    taken = spent(whole, core_clock=tree_seconds)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return {"wall": taken.wall, "core": taken.core, "bytes": size}


def conversion(args: Args, scratch: Path, n: int) -> list[dict[str, Any]]:
    """A row a contender, in order of core time."""
    # litdata empties these folders when it starts, and unless told otherwise they are data/ and chunks/ in /tmp.
    os.environ |= {"OMP_NUM_THREADS": "1", "DATA_OPTIMIZER_CACHE_FOLDER": str(scratch / "chunks"),
                   "DATA_OPTIMIZER_DATA_CACHE_FOLDER": str(scratch / "data")}  # fmt: skip

    def fresh(number: int) -> dict[str, float]:
        with tempfile.TemporaryDirectory(dir=scratch) as target:
            run = alone(convert, number, args.source, Path(target), args.jobs)
        os.sync()  # nobody starts with another's unwritten pages
        return run

    rows = []
    taken = interleaved({i: partial(fresh, i) for i in range(len(CONTENDERS))}, args.rounds, lambda call: call())
    for who, runs in zip(CONTENDERS, taken.values()):
        wall, core, size = (median(run[key] for run in runs) for key in ("wall", "core", "bytes"))
        spread = max(run["core"] for run in runs) - min(run["core"] for run in runs)
        rows.append({
            "group": who.group, "name": who.name, "does": who.does, "images_per_s": n / wall, "core_ms": core / n * 1e3,
            "core_ms_spread": spread / n * 1e3, "megabytes": size / 1e6,
        })  # fmt: skip
    return sorted(rows, key=lambda row: (row["group"], row["core_ms"]))


def pieces(args: Args) -> dict[str, float]:
    """Core-ms an image of each part of the work alone, one thread."""
    import hashlib

    import simplejpeg
    from isal.isal_zlib import crc32

    paths = [path for path, _ in photos(args.source)][:200]
    data = [array for array in map(read_bytes, paths) if (jpeg := codec.jpeg_header(array)) and jpeg.plain]
    pixels = [codec.decode(array) for array in data]
    fast = partial(simplejpeg.decode_jpeg, colorspace="RGB", fastdct=True, fastupsample=True)
    parts: dict[str, tuple[Callable, list]] = {
        "read the file (cached)": (read_bytes, paths[: len(data)]),
        "parse the header": (codec.jpeg_header, data),
        "decode completely": (codec.decode, data),
        "decode completely, libjpeg's fast transform and upsampling": (fast, data),
        "decode at an eighth": (codec.thumbnail, data),
        "statistics of all pixels": (moments.sums, pixels),
        "CRC-32": (crc32, data),
        "SHA-256": (lambda array: hashlib.sha256(array).digest(), data),
    }
    return in_turn({name: partial(each, *part) for name, part in parts.items()}, args, len(data))


def each(work: Callable, items: list) -> None:
    for item in items:
        work(item)


# --- reading --------------------------------------------------------------------------------------------------------


def reading(args: Args, scratch: Path) -> dict[str, Any]:
    """Microseconds a random read: `Store.read` (checksum included) and `os.pread`, with the files in memory and not."""
    result = {}
    for format in FORMATS:
        data = written(args, scratch / format, Options("folder", format))
        paths = [data.path / shard["file"] for shard in data.shards]
        files = [os.open(path, os.O_RDONLY) for path in paths]
        order = np.random.default_rng(0).permutation(len(data)).tolist()
        lengths, offsets = (data._rows[name].tolist() for name in ("length", "offset"))
        ranges = [(files[data.shard_of[i]], lengths[i], offsets[i]) for i in order]

        reads = {"pread": partial(each, lambda part: os.pread(*part), ranges), "store": partial(each, data.read, order)}

        def read(who: str, state: str) -> float:
            if state == "cold":
                data.close()  # noqa: B023  (pages that are mapped stay)
                forget(paths)  # noqa: B023
            return spent(reads[who]).wall  # noqa: B023

        contenders = {f"{who} {state}": partial(read, who, state) for who in reads for state in ("cold", "warm")}
        taken = interleaved(contenders, args.rounds, lambda call: call(), shuffled=True)
        for file in files:
            os.close(file)
        times = {name: 1e6 * median(seconds) / len(data) for name, seconds in taken.items()}
        rates = {f"rate of pread {state}": median(a / b for a, b in zip(taken[f"pread {state}"], taken[f"store {state}"]))
                 for state in ("cold", "warm")}  # fmt: skip
        result[format] = times | rates | {"mean bytes": data.nbytes() / len(data)}
    return result


def encodings(args: Args, scratch: Path) -> dict[str, Any]:
    """What each encoding costs on the disk and saves in decoding."""
    stores = {name: written(args, scratch / name, Options("folder", "webdataset", name)) for name in codec.ENCODINGS}

    def decode(data: Store) -> None:
        for i in range(len(data)):
            codec.decode(data.read(i)).max()  # raw pixels are only looked at when somebody does

    n = len(stores["jpeg"])
    core_ms = in_turn({name: partial(decode, data) for name, data in stores.items()}, args, n)
    return {name: {"core_ms": core_ms[name], "bytes": data.nbytes() / n, "psnr": psnr(stores["jpeg"], data)}
            for name, data in stores.items()}  # fmt: skip


def psnr(reference: Store, data: Store) -> float | None:
    """Decibels between the pixels of two stores of the same images; None where they are equal."""
    errors = []
    for i in range(0, len(data), 10):
        a, b = codec.decode(reference.read(i)), codec.decode(data.read(i))
        errors.append(float(((a.astype(int) - b[: a.shape[0], : a.shape[1]]) ** 2).mean()))
    mean = float(np.mean(errors))
    return 10 * float(np.log10(255**2 / mean)) if mean else None


# --- results --------------------------------------------------------------------------------------------------------

TEXTS = {
    "checked": "No image comes in whose data do not decode to their end; libjpeg-turbo for everybody. Ours asks it for an "
    "eighth of the size, for which it reads and checks every code of every block all the same, so the same damage is found "
    "with the same words (`tests/test_codec.py`); the others decode as their users do, completely.",
    "copied": "Bytes are moved as they are. Ours cannot leave out what makes its shards verifiable and its statistics: every "
    "header parsed, a sixteenth decoded, all of it checksummed and synced; the bare writers do none of that.",
}


def page(result: dict[str, Any]) -> str:
    """results/shards.md"""
    env = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in result["packages"].items())
    conversions = []
    for group, text in TEXTS.items():
        rows = [
            [row["name"], row["does"], f"{row['images_per_s']:.0f}",
             f"{row['core_ms']:.2f} ± {row['core_ms_spread'] / 2:.2f}", f"{row['megabytes']:.0f}"]
            for row in result["conversion"] if row["group"] == group
        ]  # fmt: skip
        conversions += [text, output.table(["writer", "does", "images/s", "core-ms/image", "MB written"], rows, left=2)]
    encoded = [[name, f"{row['bytes'] / 1e3:.0f}", f"{row['core_ms']:.2f}", f"{row['psnr']:.1f}" if row["psnr"] else "equal"]
               for name, row in result["encodings"].items()]  # fmt: skip
    reads = [[name, state, f"{row[f'store {state}']:.0f}", f"{row[f'pread {state}']:.0f}", f"{row[f'rate of pread {state}']:.0%}"]
             for name, row in result["reading"].items() for state in ("warm", "cold")]  # fmt: skip
    return output.document(
        "# Shards: conversion and reading",
        f"`python {env['command']}`, commit {env['commit']}, {env['device']}, no GPU; load when it began {env['load']:.1f}.\n"
        f"Versions: python {env['python']}, {versions}.",
        f"## Conversion of {result['images']} photos, {result['megabytes']:.0f} MB",
        *conversions,
        "Ours syncs every shard to the disk before it counts; the others leave that to the kernel. Medians; ± half the range.",
        *parts(result),
        "## Encodings",
        output.table(["ENCODING", "kB/image", "read and decode, core-ms/image", "PSNR, dB"], encoded),
        "## Random reads through the store, checksum included",
        output.table(["format", "files", "Store.read, µs", "os.pread, µs", "rate of pread"], reads, left=2),
    )


def parts(result: dict[str, Any]) -> list[str]:
    """What the conversion consists of, whether ours is first, and how good its statistics are."""
    cost, lines = result["pieces"], []
    for group, label in (("checked", "all decoded"), ("copied", "bytes moved")):
        mine = [row for row in result["conversion"] if row["group"] == group and row["name"] != "cp -r"]
        for what, sign, unit in (("images_per_s", -1, "images/s"), ("core_ms", 1, "core-ms/image")):
            first, second = sorted(mine, key=lambda row: sign * row[what])[:2]
            lines.append(f"- {label}, {unit}: {first['name']} is first with {first[what]:.4g}, then {second['name']},"
                         f" {second[what]:.4g}")  # fmt: skip
    extra = cost["SHA-256"] + cost["CRC-32"] + cost["parse the header"]
    extra += (cost["decode completely"] + cost["statistics of all pixels"]) / 16
    rows = [[name, f"{value:.3f}"] for name, value in cost.items()]
    return [
        "## What it consists of",
        output.table(["part of the work, alone", "core-ms/image"], rows),
        "\n".join(lines),
        f"Where bytes are only moved, ours spends {extra:.2f} core-ms an image on what the bare writers leave out (header, CRC,"
        " SHA-256, a sixteenth decoded with its statistics), and waits for the disk; beside a writer that does so by hand only"
        " the writing differs. Tried: libjpeg's fast transform and upsampling (no faster than the exact ones, which have vector"
        " code too); one system call a sample or a megabyte (no difference in the sum); fewer, larger hash updates and a header"
        " in one piece (a few microseconds each, kept).",
    ]
