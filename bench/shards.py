"""Conversion and reading of shards against their peers: python tools/profile.py shards --source FOLDER

Conversion: images/s and core-ms an image (CPU time of the whole process tree) for the same photos, each contender in a fresh
process with its imports done before the clock starts, rounds interleaved, medians. Two kinds of row, because a writer that
looks at nothing cannot be compared with one that decodes every image:
`checked`  no image comes in whose data do not decode to their end
`copied`   bytes are moved as they are
In both, `webdataset.ShardWriter` is there twice: as it is, and doing by hand all that ours does, so that only the writers differ.
Pieces: what each part of that work costs alone. Statistics: how far ours are from those of all pixels.
Reading: random reads through `Store` (map, checksum, array) against plain `pread` of the same ranges in the same order.
Index: 14 million samples made, opened and read. Writes results/shards.md, .json and .csv.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tyro

from manyview.bench.writers import CONTENDERS, photos
from manyview.pipeline.convert.sources import read_bytes
from manyview.pipeline.convert.write import CHECKS, FORMATS, write_shards
from manyview.pipeline.errors import UserError
from manyview.pipeline.manifest import Options, finish_split, write_manifest

ROOT = Path(__file__).resolve().parents[1]


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
    rows: int = 14_000_000
    """Samples of the large index."""
    contender: str = ""
    """Run this one alone, in this process, and print its numbers (used by the program itself)."""
    target: Path | None = None
    """With --contender: where it writes."""


# --- conversion -----------------------------------------------------------------------------------------------------


def run_one(args: Args) -> None:
    """One contender in this process: wall and CPU seconds of the call itself, and what it left on the disk."""
    assert args.target is not None
    call = CONTENDERS[args.contender].prepare(args, args.target)
    before, begun = cpu_seconds(), time.perf_counter()
    call()
    for child in multiprocessing.active_children():  # some leave their workers behind; their time counts too
        child.join()
    wall, core = time.perf_counter() - begun, cpu_seconds() - before
    size = sum(path.stat().st_size for path in args.target.rglob("*") if path.is_file())
    print("RESULT " + json.dumps({"wall": wall, "core": core, "bytes": size}))


def cpu_seconds() -> float:
    parts = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(part.ru_utime + part.ru_stime for part in parts)


def conversion(args: Args, scratch: Path) -> dict:
    found: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
    for _ in range(args.rounds):
        for name in CONTENDERS:
            target = scratch / "target"
            target.mkdir()
            words = ["--source", args.source, "--jobs", args.jobs, "--contender", name, "--target", target]
            command = [sys.executable, ROOT / "tools" / "profile.py", "shards", *words]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            # litdata empties these folders when it starts, and unless told otherwise they are data/ and chunks/ in /tmp.
            env |= {
                "DATA_OPTIMIZER_CACHE_FOLDER": str(scratch / "chunks"),
                "DATA_OPTIMIZER_DATA_CACHE_FOLDER": str(scratch / "data"),
            }
            done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, env=env)
            line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
            if line is None:
                raise RuntimeError(f"{name} failed: {done.stderr[-2000:]}")
            found[name].append(json.loads(line[7:]))
            shutil.rmtree(target)
            os.sync()  # nobody starts with another's unwritten pages
    return found


def pieces(args: Args) -> dict[str, float]:
    """Core-ms an image of each part of the work alone, one thread."""
    import hashlib

    import cv2
    import simplejpeg
    from isal.isal_zlib import crc32

    from manyview.pipeline import codec
    from manyview.pipeline.convert import moments

    cv2.setNumThreads(0)
    paths = [path for path, _ in photos(args.source)][:200]
    data = [array for array in map(read_bytes, paths) if (jpeg := codec.jpeg_header(array)) and jpeg.plain]
    pixels = [codec.decode(array) for array in data]
    parts: dict[str, tuple[Callable, list]] = {
        "read the file (cached)": (read_bytes, paths),
        "parse the header": (codec.jpeg_header, data),
        "decode completely": (codec.decode, data),
        "decode completely, libjpeg's fast transform and upsampling": (
            lambda array: simplejpeg.decode_jpeg(array, "RGB", fastdct=True, fastupsample=True),
            data,
        ),
        "decode at an eighth": (codec.thumbnail, data),
        "statistics of all pixels": (moments.sums, pixels),
        "CRC-32": (crc32, data),
        "SHA-256": (lambda array: hashlib.sha256(array).digest(), data),
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(args.rounds):
        for name, (work, items) in parts.items():
            begun = time.process_time()
            for item in items:
                work(item)
            times[name].append((time.process_time() - begun) / len(items) * 1e3)
    return {name: median(values) for name, values in times.items()}


def statistics(args: Args, scratch: Path) -> dict[str, list[list[float]]]:
    """Mean and standard deviation a channel: of all pixels, and as each kind of check has them."""
    from manyview.pipeline import codec, store
    from manyview.pipeline.convert import moments

    found = {}
    for check in CHECKS:
        out = scratch / check
        write_shards(Options("folder", check=check), args.source, out, jobs=args.jobs, quiet=True)
        data = store.Store(out)
        found[f"--check {check}"] = [list(data.mean), list(data.std)]
    total = sum((moments.of_pixels(codec.decode(data.read(i))) for i in range(len(data))), moments.nothing())
    mean, square = moments.average(total)
    return {"all pixels": [mean.tolist(), np.sqrt(square - mean**2).tolist()], **found}


# --- reading --------------------------------------------------------------------------------------------------------


def reading(args: Args, scratch: Path) -> dict:
    """Microseconds a random read: `Store.read` (checksum included) and `os.pread`, with the files in memory and not."""
    from manyview.pipeline import store

    result: dict = {}
    for format in FORMATS:
        out = scratch / format
        write_shards(Options("folder", format), args.source, out, jobs=args.jobs, quiet=True)
        data = store.Store(out)
        files = [os.open(out / shard["file"], os.O_RDONLY) for shard in data.shards]
        times: dict[str, list[float]] = {}
        for number in range(args.rounds):
            for state in ("cold", "warm"):
                for name, seconds in read_both(data, files, number, state == "cold").items():
                    times.setdefault(f"{name} {state}", []).append(seconds / len(data) * 1e6)
        result[format] = {name: median(values) for name, values in times.items()}
        for state in ("cold", "warm"):
            pairs = zip(times[f"pread {state}"], times[f"store {state}"])
            result[format][f"rate of pread {state}"] = median(plain / ours for plain, ours in pairs)
        result[format]["mean bytes"] = data.nbytes() / len(data)
        for file in files:
            os.close(file)
    return result


def read_both(data, files: list[int], seed: int, cold: bool) -> dict[str, float]:
    """Seconds for every sample once, in random order: by pread and by the store."""
    order = np.random.default_rng(seed).permutation(len(data)).tolist()
    lengths, offsets = (data._rows[name].tolist() for name in ("length", "offset"))
    ranges = [(files[data.shard_of[i]], lengths[i], offsets[i]) for i in order]
    seconds = {}
    for name in ("pread", "store") if seed % 2 else ("store", "pread"):
        if cold:
            data.close()  # pages that are mapped stay
            forget(files)
        begun = time.perf_counter()
        if name == "pread":
            for file, length, offset in ranges:
                os.pread(file, length, offset)
        else:
            for i in order:
                data.read(i)
        seconds[name] = time.perf_counter() - begun
    return seconds


def forget(files: list[int]) -> None:
    """Drop the files from the page cache (what is written and not mapped)."""
    for file in files:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def encodings(args: Args, scratch: Path) -> dict:
    """What each encoding costs on the disk and saves in decoding."""
    from manyview.pipeline import codec, store

    opened = {}
    for name in codec.ENCODINGS:
        options = Options("folder", "webdataset", name)
        write_shards(options, args.source, scratch / name, jobs=args.jobs, quiet=True)
        opened[name] = store.Store(scratch / name)
    times: dict[str, list[float]] = {name: [] for name in opened}
    for _ in range(args.rounds):
        for name, data in opened.items():
            begun = time.process_time()
            for i in range(len(data)):
                codec.decode(data.read(i)).max()  # raw pixels are only looked at when somebody does
            times[name].append((time.process_time() - begun) / len(data) * 1e3)
    result = {}
    for name, data in opened.items():
        result[name] = {
            "core_ms": median(times[name]),
            "bytes": data.nbytes() / len(data),
            "psnr": psnr(opened["jpeg"], data),
        }
    return result


def psnr(reference, data) -> float | None:
    """Decibels between the pixels of two stores of the same images; None where they are equal."""
    from manyview.pipeline import codec

    errors = []
    for i in range(0, len(data), 10):
        a, b = codec.decode(reference.read(i)), codec.decode(data.read(i))
        errors.append(float(((a.astype(int) - b[: a.shape[0], : a.shape[1]]) ** 2).mean()))
    mean = float(np.mean(errors))
    return 10 * float(np.log10(255**2 / mean)) if mean else None


# --- the large index ------------------------------------------------------------------------------------------------

SAMPLE, A_SHARD = 100_000, 2500  # bytes a sample, samples a shard


def large_index(args: Args, scratch: Path) -> dict:
    """A store of `rows` samples (its shards are holes of the right size), opened by a fresh process."""
    from manyview.pipeline import index

    out = scratch / "large"
    out.mkdir()
    begun = time.perf_counter()
    part = finish_split(out, "train", generated(args.rows, index), hollow_shards(args.rows, out), np.zeros((2, 3)), 0)
    write_manifest(out, Options("imagenet"), [], {"train": part}, 0, "")
    made = time.perf_counter() - begun
    code = (
        "import json, sys, time, psutil; from pipeline.store import Store; me = psutil.Process(); "
        "empty = me.memory_info().rss; t = time.perf_counter(); s = Store(sys.argv[1]); o = time.perf_counter() - t; "
        "r = me.memory_info().rss; t = time.perf_counter(); "
        "n = sum(s.read(i * 9973 % len(s)).nbytes for i in range(1000)); k = s.key(len(s) - 1); d = time.perf_counter() - t; "
        "s.labels.sum(); print(json.dumps(dict(open_s=o, open_bytes=r - empty, rss_bytes=me.memory_info().rss, "
        "read_us=d * 1e3, rows=len(s), last_key=k, empty_bytes=empty)))"
    )
    found = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", code, str(out)], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout
        )
        for _ in range(args.rounds)
    ]
    result = {key: median(row[key] for row in found) for key in found[0] if key != "last_key"}
    return {
        **result,
        "made_s": made,
        "file_bytes": (out / "train.index").stat().st_size,
        "last_key": found[0]["last_key"],
    }


def generated(n: int, index):
    """An index like ImageNet's: keys of 28 characters, payloads of zeros."""
    from isal.isal_zlib import crc32

    number = np.arange(n, dtype=np.int64)
    values: dict[str, Any] = {
        "label": number % 1000, "offset": number % A_SHARD * SAMPLE, "length": SAMPLE, "shard": number // A_SHARD,
        "height": 375, "width": 500, "crc": crc32(bytes(SAMPLE)), "kind": 0,
    }  # fmt: skip
    columns = {name: np.broadcast_to(values[name], n).astype(kind) for name, kind in index.COLUMNS.items()}
    keys = np.full((n, 28), ord("n"), np.uint8)
    keys[:, 9] = ord("/")
    for digit in range(8):
        keys[:, 27 - digit] = keys[:, 8 - digit] = number // 10**digit % 10 + ord("0")
    return index.Index(columns, np.arange(n + 1, dtype=np.uint64) * 28, keys.reshape(-1).data)


def hollow_shards(n: int, out: Path) -> list[dict]:
    rows = []
    for number in range(-(-n // A_SHARD)):
        count = min(A_SHARD, n - number * A_SHARD)
        name = f"train-{number:05d}.tar"
        with open(out / name, "wb") as file:
            file.truncate(count * SAMPLE)
        rows.append({"file": name, "count": count, "bytes": count * SAMPLE, "sha256": ""})
    return rows


# --- results --------------------------------------------------------------------------------------------------------


def environment(args: Args) -> dict:
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = ("webdataset", "ffcv", "litdata", "simplejpeg", "isal", "numpy", "torch", "opencv-python-headless")
    with open("/proc/cpuinfo") as file:
        cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    return {
        "command": f"python tools/profile.py shards --source {args.source.name} --rounds {args.rounds} --jobs {args.jobs}",
        "commit": git.stdout.strip(),
        "cpu": f"{len(os.sched_getaffinity(0))} cores of {cpu}",
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def conversion_rows(found: dict, n: int) -> list[dict]:
    rows = []
    for name, runs in found.items():
        who = CONTENDERS[name]
        wall, core, size = (median(run[key] for run in runs) for key in ("wall", "core", "bytes"))
        spread = [max(run["core"] for run in runs) - min(run["core"] for run in runs)]
        rows.append({
            "group": who.group, "name": who.name, "does": who.does, "images_per_s": n / wall, "core_ms": core / n * 1e3,
            "core_ms_spread": spread[0] / n * 1e3, "megabytes": size / 1e6,
        })  # fmt: skip
    return sorted(rows, key=lambda row: (row["group"], row["core_ms"]))


def page(result: dict) -> str:
    """results/shards.md"""
    index, where = result["index"], result["environment"]
    parts = ["# Shards: conversion, reading, index\n"]
    parts.append(
        f"`{where['command']}`, commit {where['commit'][:12]}, {where['cpu']}, no GPU; load when it began {where['load']:.1f}."
    )
    parts.append("Versions: " + ", ".join(f"{key} {where[key]}" for key in list(where)[4:]) + ".\n")
    parts.append(f"## Conversion of {result['images']} photos, {result['megabytes']:.0f} MB\n")
    texts = {
        "checked": "No image comes in whose data do not decode to their end; libjpeg-turbo for everybody. Ours asks it for an "
        "eighth of the size, for which it reads and checks every code of every block all the same, so the same damage is found "
        "with the same words (`tests/test_codec.py`); the others decode as their users do, completely.",
        "copied": "Bytes are moved as they are. Ours cannot leave out what makes its shards verifiable and its statistics: every "
        "header parsed, a sixteenth decoded, all of it checksummed and synced; the bare writers do none of that.",
    }
    for group, text in texts.items():
        rows = [
            [
                row["name"],
                row["does"],
                f"{row['images_per_s']:.0f}",
                f"{row['core_ms']:.2f} ± {row['core_ms_spread'] / 2:.2f}",
                f"{row['megabytes']:.0f}",
            ]
            for row in result["conversion"]
            if row["group"] == group
        ]
        parts.append(text + "\n\n" + table(["writer", "does", "images/s", "core-ms/image", "MB written"], rows))
    parts.append(
        "Ours syncs every shard to the disk before it counts; the others leave that to the kernel. Medians; ± half the range.\n"
    )
    parts.append(bounds(result))
    parts.append("## Encodings\n")
    rows = [
        [name, f"{row['bytes'] / 1e3:.0f}", f"{row['core_ms']:.2f}", f"{row['psnr']:.1f}" if row["psnr"] else "equal"]
        for name, row in result["encodings"].items()
    ]
    parts.append(table(["ENCODING", "kB/image", "read and decode, core-ms/image", "PSNR, dB"], rows))
    parts.append("## Random reads through the store, checksum included\n")
    rows = [
        [
            name,
            state,
            f"{row[f'store {state}']:.0f}",
            f"{row[f'pread {state}']:.0f}",
            f"{row[f'rate of pread {state}']:.0%}",
        ]
        for name, row in result["reading"].items()
        for state in ("warm", "cold")
    ]
    parts.append(table(["format", "files", "Store.read, µs", "os.pread, µs", "rate of pread"], rows))
    parts.append(f"## An index of {index['rows']:,.0f} samples\n")
    parts.append(
        f"{index['file_bytes'] / 1e9:.2f} GB on disk; opens in {index['open_s']:.3f} s and "
        f"{index['open_bytes'] / 1e6:.0f} MB. After 1000 random reads and a pass over all labels the whole process has "
        f"{index['rss_bytes'] / 1e6:.0f} MB resident, {index['empty_bytes'] / 1e6:.0f} MB of them Python and its modules.\n"
    )
    return "\n".join(parts)


def bounds(result: dict) -> str:
    """What the conversion consists of, whether ours is first, and how good its statistics are."""
    rows = [[name, f"{value:.3f}"] for name, value in result["pieces"].items()]
    lines = ["## What it consists of\n", table(["part of the work, alone", "core-ms/image"], rows)]
    for group, label in (("checked", "all decoded"), ("copied", "bytes moved")):
        mine = [row for row in result["conversion"] if row["group"] == group and row["name"] != "cp -r"]
        for what, sign, unit in (("images_per_s", -1, "images/s"), ("core_ms", 1, "core-ms/image")):
            first, second = sorted(mine, key=lambda row: sign * row[what])[:2]
            lines.append(
                f"- {label}, {unit}: {first['name']} is first with {first[what]:.4g}, then {second['name']}, {second[what]:.4g}"
            )
    cost = result["pieces"]
    extra = cost["SHA-256"] + cost["CRC-32"] + cost["parse the header"]
    extra += (cost["decode completely"] + cost["statistics of all pixels"]) / 16
    lines.append(
        f"\nWhere bytes are only moved, ours spends {extra:.2f} core-ms an image on what the bare writers leave out (header, "
        "CRC, SHA-256, a sixteenth decoded with its statistics), and waits for the disk; beside a writer that does so by hand "
        "only the writing differs. Tried: libjpeg's fast transform and upsampling (no faster than the exact ones, which have "
        "vector code too); one system call a sample or a megabyte (no difference in the sum); fewer, larger hash updates and a "
        "header in one piece (a few microseconds each, kept).\n"
    )
    rows = [
        [name, *("/".join(f"{value:.2f}" for value in values) for values in pair)]
        for name, pair in result["statistics"].items()
    ]
    lines.append("## Statistics\n")
    lines.append(
        "Mean and deviation a channel, from thumbnails of all photos and the pixels of a sixteenth (`decode`), and from a "
        "sixteenth alone (`headers`).\n"
    )
    return "\n".join([*lines, table(["from", "mean", "standard deviation"], rows)])


def write_results(out: Path, result: dict) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "shards.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "shards.md").write_text(page(result))
    with open(out / "shards.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(result["conversion"][0]))
        writer.writeheader()
        writer.writerows(result["conversion"])


def check(args: Args) -> None:
    """UserError, a line for each value that makes no sense."""
    least = {"rounds": 1, "jobs": 1, "rows": 1}
    errors = [
        f"--{k} is a number from {v} on, not {getattr(args, k)}" for k, v in least.items() if getattr(args, k) < v
    ]
    if not args.source.is_dir():
        errors.append(f"--source {args.source} is no folder")
    elif not photos(args.source):
        errors.append(f"--source {args.source} holds no photos")
    if args.scratch is not None and not args.scratch.is_dir():
        errors.append(f"--scratch {args.scratch} is no folder")
    if errors:
        raise UserError("\n".join(errors))


def main(argv: list[str]) -> None:
    args = tyro.cli(Args, args=argv, description=__doc__, prog="profile.py shards")
    if args.contender:
        run_one(args)
        return
    check(args)
    import cv2

    cv2.setNumThreads(0)  # this process forks: it must have no threads then
    result: dict = {"environment": environment(args)}
    files = photos(args.source)
    result["images"], result["megabytes"] = len(files), sum(os.path.getsize(path) for path, _ in files) / 1e6
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        result["index"] = large_index(args, Path(scratch))
        shutil.rmtree(Path(scratch) / "large")
        result["reading"] = reading(args, Path(scratch))
        result["encodings"] = encodings(args, Path(scratch))
        result["statistics"] = statistics(args, Path(scratch))
        result["pieces"] = pieces(args)
        result["conversion"] = conversion_rows(conversion(args, Path(scratch)), len(files))
    write_results(args.out, result)
    print(page(result))
