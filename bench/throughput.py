"""This project under its own profiler: python tools/profile.py throughput --photos DIR --cifar DIR --before CHECKOUT

Profiles three workloads twice each, and once in an earlier checkout (`git worktree add CHECKOUT COMMIT`), then slows known
stages to see whether they are named; writes results/throughput.md and what it was made of into results/throughput/.
About half an hour; wants a quiet machine. `--page-only` writes the page again from the files.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from manyview.bench.stages import read
from manyview.bench.terminal import number

ROOT = Path(__file__).resolve().parents[1]


@dataclass(kw_only=True)
class Args:
    """Write results/throughput.md."""

    photos: Path = Path("shards/photos")
    """Shards of photographs, for 224 px views."""
    cifar: Path = Path("shards/cifar10")
    """Shards of CIFAR-10."""
    before: Path | None = None
    """Checkout of the commit to compare with; without it the earlier files are kept."""
    runs: int = 20
    """Slowed runs a stage; 0 keeps the earlier file."""
    seconds: float = 70.0
    """Of measuring, a profile."""
    out: Path = ROOT / "results" / "throughput"
    """Folder; the page is written beside it, under its name and .md."""
    page_only: bool = False
    """Measure nothing."""


CASES = {
    "photos, the data path alone": ("photos", "--size 224 --views 8 --backbone none"),
    "photos, ResNet-50": ("photos", "--size 224 --views 8 --backbone resnet50 --projector-dim 256"),
    "CIFAR-10, ResNet-18": ("cifar", "--views 4 --policy cifar --backbone resnet18"),
}


def main(argv: list[str]) -> None:
    args = tyro.cli(Args, args=argv, description=__doc__, prog="profile.py throughput")
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.page_only:
        for name, (data, flags) in CASES.items():
            for repeat in ("1", "2"):
                profile(args, ROOT, name, repeat, getattr(args, data), flags)
            if args.before:
                profile(args, args.before, name, "before", getattr(args, data), flags)
        if args.runs:
            subprocess.run(
                [sys.executable, "tests/slowdowns.py", "--runs", str(args.runs), "--out", args.out.resolve()],
                cwd=ROOT,
                check=True,
            )
    page = args.out.with_suffix(".md")
    page.write_text(text(args.out))
    print(page)


def profile(args: Args, checkout: Path, name: str, repeat: str, data: Path, flags: str) -> None:
    """One run of `stages` in its own process; its JSON and picture go to the folder."""
    made = args.out / "made"
    command = [sys.executable, "tools/profile.py", "stages", "--data", str(data.resolve()), *flags.split()]
    subprocess.run([*command, "--seconds", str(args.seconds), "--out", str(made.resolve())], cwd=checkout, check=True)
    stem = f"{slug(name)}-{repeat}"
    report = (made / "profile.json").read_text()
    for path, short in ((data, f"shards/{data.name}"), (made, "made")):  # where this machine keeps them says nothing
        report = report.replace(str(path.resolve()), short)
    (args.out / f"{stem}.json").write_text(report)
    if repeat != "2":
        shutil.move(made / "waterfall.png", args.out / f"{stem}.png")
    shutil.rmtree(made)


def slug(name: str) -> str:
    return name.lower().replace(",", "").replace(" ", "-")


def text(folder: Path) -> str:
    """The page, from the files in `folder`."""
    found: dict[str, list[Any]] = {
        name: [load(folder, name, which) for which in ("1", "2", "before")] for name in CASES
    }
    first = next(iter(found.values()))[0]
    env = first["environment"]
    hardware = env["device"] + (", no GPU" if first["data"]["device"] == "cpu" else "")
    versions = ", ".join(f"{k} {v}" for k, v in env["versions"].items())
    parts = [
        "# Throughput: what the profiler found here",
        "Written by `python tools/profile.py throughput`, which measures everything on this page again. "
        f"{hardware}; python {env['python']}, {versions}; commit {env['commit']}; seed 0; {env['started'][:10]}.",
        "`photos` are 1000 ImageNet photos (mean 110 kB, median 500x375); their views are 224 px with the full SimCLR"
        " augmentation. CIFAR-10 is a JPEG copy, stored as pixels. core-ms is CPU time of the whole process an image.",
        "## Where the time goes",
        rates(found),
        *[
            f"**{name}.** {runs[0]['verdict']}\n\n![{name}]({folder.name}/{slug(name)}-1.png)"
            for name, runs in found.items()
        ],
        "## What was changed because of it",
        STORY,
        changes(found),
        "## Is the profiler right?",
        validity(folder),
        repeatability(found),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


STORY = """\
- **Normalize was the largest stage of the data path** on 224 px views: its kernel repeated three numbers. It now works
  along whole rows of 3 S, with identical values, and glibc keeps the pages that a step frees instead of mapping and
  zeroing them anew. It was still 47 % of the whole, because batches of photos are larger than what glibc keeps: normalized
  views now go into memory that is used again, at about a quarter of the cost.
- **Forward and backward took several times their CPU time** whenever the engine's threads, or any other process, were at
  work: idle OpenMP threads spin by default. train.py now sets `OMP_WAIT_POLICY=passive` before torch is loaded.
- **Its own test found the profiler wrong**: slowing the plan cost twice what its ceiling said, because reading ahead plans
  every batch once more (the ceiling now measures both); the gain in images/s from undoing a slowdown ignored that stages
  lose more together where one of them is slow; and steps of two images, cut down to save time, hid what the
  stages cost together: the test now runs whole batches."""


def load(folder: Path, name: str, which: str) -> dict[str, Any] | None:
    path = folder / f"{slug(name)}-{which}.json"
    return read(path) if path.exists() or which != "before" else None


def rates(found: dict[str, list]) -> str:
    lines = ["| workload | images/s | views/s | of expected | core-ms an image | bottleneck | next | data wait | certified |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, (report, *_) in found.items():
        c, stage = report["composed"], report["bottleneck"]["stage"]
        following = next(row["next"] for row in report["what_if"] if row["stage"] == stage)
        quiet = "yes" if report["noise"]["certified"] else "no: " + report["noise"]["reasons"][0]
        lines.append(
            f"| {name}, V = {report['shape']['views']} | {number(c['images_per_s'])} |"
            f" {number(c['images_per_s'] * report['shape']['views'])} | {c['efficiency']:.0%} | {number(c['core_ms'])} |"
            f" {stage} | {following} | {c['data_wait']:.0%} | {quiet} |"
        )
    return "\n".join(lines)


def changes(found: dict[str, list]) -> str:
    lines = ["| workload | stage | core-ms before | after | |", "|---|---|---|---|---|"]
    for name, (after, _, before) in found.items():
        if before is None:
            continue
        old = {row["name"]: row["core_ms_image"] for row in before["stages"]}
        rows = [(row["name"], old.get(row["name"], 0.0), row["core_ms_image"]) for row in after["stages"]]
        total = after["composed"]["core_ms"]
        rows = [row for row in rows if abs(row[1] - row[2]) > 0.02 * total] + [
            ("**together**", before["composed"]["core_ms"], total)
        ]
        lines += [f"| {name} | {s} | {number(a)} | {number(b)} | {a / b:.2f}x |" for s, a, b in rows if b]
        a, b = before["composed"]["images_per_s"], after["composed"]["images_per_s"]
        lines.append(f"| {name} | images/s | {number(a)} | {number(b)} | {b / a:.2f}x |")
    if len(lines) == 2:
        return ""
    commits = {before["environment"]["commit"] for _, _, before in found.values() if before}
    return f"An image, before (commit {', '.join(sorted(commits))}) and after:\n\n" + "\n".join(lines)


def validity(folder: Path) -> str:
    path = folder / "validity.json"
    if not path.exists():
        return ""
    v = json.loads(path.read_text())
    lines = [
        f"Each stage in turn was made slower by a known factor (its own function did its work several times; see"
        f" `tests/slowdowns.py`; torch on one thread), {v['runs']} runs in all."
        f" The slowed stage was named in **{v['named']} of {v['runs']}**; the"
        f" predicted gain from undoing it was within 15 % of the measured one in {v['core_within_15']} (core-ms) and"
        f" {v['wall_within_15']} (images/s) of them, typically within {v['core_error_median']:.1%} and"
        f" {v['wall_error_median']:.1%}.",
        "",
        "| stage | named | largest error, core-ms | largest error, images/s |",
        "|---|---|---|---|",
    ]
    for stage, row in v["by_stage"].items():
        lines.append(
            f"| {stage} | {row['named']} of {row['runs']} | {row['worst_core_error']:.1%} | {row['worst_error']:.1%} |"
        )
    return "\n".join(lines)


def repeatability(found: dict[str, list]) -> str:
    lines = ["Two runs of each workload:", "", "| workload | core-ms | again | differ by |", "|---|---|---|---|"]
    for name, (one, two, _) in found.items():
        a, b = one["composed"]["core_ms"], two["composed"]["core_ms"]
        lines.append(f"| {name} | {number(a)} | {number(b)} | {abs(b / a - 1):.1%} |")
    took = max(report["took_s"] for runs in found.values() for report in runs[:2])
    lines += ["", f"The longest of these runs took {took:.0f} s. Training needs no profiling mode: the loader's timings"
              " are always kept and go to metrics.jsonl, so `python tools/profile.py stages --run runs/NAME` asks a run"
              " afterwards (a few microseconds an image; a test holds it under 1 % of the smallest training step)."]  # fmt: skip
    return "\n".join(lines)
