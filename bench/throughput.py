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

from manyview.bench import output
from manyview.bench.output import number, table
from manyview.bench.stages import read

ROOT = Path(__file__).resolve().parents[1]
CASES = {
    "photos, the data path alone": ("photos", "--size 224 --views 8 --backbone none"),
    "photos, ResNet-50": ("photos", "--size 224 --views 8 --backbone resnet50 --projector-dim 256"),
    "CIFAR-10, ResNet-18": ("cifar", "--views 4 --policy cifar --backbone resnet18"),
}
Profiles = dict[str, list[Any]]  # of each case: a run, another one, and one of the earlier checkout or None


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


def main(argv: list[str]) -> None:
    args = output.parse(Args, argv, __doc__, "throughput", runs=0, seconds=1)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.page_only:
        for name, (data, flags) in CASES.items():
            for repeat, checkout in (("1", ROOT), ("2", ROOT), ("before", args.before)):
                if checkout:
                    profile(args, checkout, name, repeat, getattr(args, data), flags)
        if args.runs:
            words = ["tests/slowdowns.py", "--runs", str(args.runs), "--out", str(args.out.resolve())]
            subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    page = args.out.with_suffix(".md")
    page.write_text(text(args.out))
    print(page)


def profile(args: Args, checkout: Path, name: str, repeat: str, data: Path, flags: str) -> None:
    """One run of `stages` in its own process; its JSON and picture go to the folder."""
    fresh = args.out / "made"
    command = [sys.executable, "tools/profile.py", "stages", "--data", str(data.resolve()), *flags.split()]
    subprocess.run([*command, "--seconds", str(args.seconds), "--out", str(fresh.resolve())], cwd=checkout, check=True)
    report = (fresh / "profile.json").read_text()
    for path, short in ((data, f"shards/{data.name}"), (fresh, "made")):  # where this machine keeps them says nothing
        report = report.replace(str(path.resolve()), short)
    (args.out / f"{slug(name)}-{repeat}.json").write_text(report)
    if repeat != "2":
        shutil.move(fresh / "waterfall.png", args.out / f"{slug(name)}-{repeat}.png")
    shutil.rmtree(fresh)


def slug(name: str) -> str:
    return name.lower().replace(",", "").replace(" ", "-")


def load(folder: Path, name: str, which: str) -> dict[str, Any] | None:
    path = folder / f"{slug(name)}-{which}.json"
    return read(path) if path.exists() or which != "before" else None


def text(folder: Path) -> str:
    """The page, from the files in `folder`."""
    profiles: Profiles = {name: [load(folder, name, which) for which in ("1", "2", "before")] for name in CASES}
    first = next(iter(profiles.values()))[0]
    env = first["environment"]
    hardware = env["device"] + (", no GPU" if first["data"]["device"] == "cpu" else "")
    versions = ", ".join(f"{k} {v}" for k, v in env["versions"].items())
    return output.document(
        "# Throughput: what the profiler found here",
        "Written by `python tools/profile.py throughput`, which measures everything on this page again. "
        f"{hardware}; python {env['python']}, {versions}; commit {env['commit']}; seed 0; {env['started'][:10]}.",
        "`photos` are 1000 ImageNet photos (mean 110 kB, median 500x375); their views are 224 px with the full SimCLR"
        " augmentation. CIFAR-10 is a JPEG copy, stored as pixels. core-ms is CPU time of the whole process an image.",
        "## Where the time goes",
        rates(profiles),
        *(
            f"**{name}.** {runs[0]['verdict']}\n\n![{name}]({folder.name}/{slug(name)}-1.png)"
            for name, runs in profiles.items()
        ),
        "## What was changed because of it",
        STORY,
        changes(profiles),
        "## Is the profiler right?",
        validity(folder / "validity.json"),
        repeatability(profiles),
    )


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


def rates(profiles: Profiles) -> str:
    rows = []
    for name, (report, *_) in profiles.items():
        c, stage, n_views = report["composed"], report["bottleneck"]["stage"], report["shape"]["views"]
        following = next(row["next"] for row in report["what_if"] if row["stage"] == stage)
        quiet = "yes" if report["noise"]["certified"] else "no: " + report["noise"]["reasons"][0]
        rows.append([
            f"{name}, V = {n_views}", number(c["images_per_s"]), number(c["images_per_s"] * n_views), f"{c['efficiency']:.0%}",
            number(c["core_ms"]), stage, following, f"{c['data_wait']:.0%}", quiet,
        ])  # fmt: skip
    head = [
        "workload",
        "images/s",
        "views/s",
        "of expected",
        "core-ms an image",
        "bottleneck",
        "next",
        "data wait",
        "certified",
    ]
    return table(head, rows)


def changes(profiles: Profiles) -> str:
    """What stages cost in the earlier checkout and now, where that was measured."""
    rows, commits = [], set()
    for name, (after, _, before) in profiles.items():
        if before is None:
            continue
        commits.add(before["environment"]["commit"])
        old, total = {row["name"]: row["core_ms_image"] for row in before["stages"]}, after["composed"]["core_ms"]
        costs = [(row["name"], old.get(row["name"], 0.0), row["core_ms_image"]) for row in after["stages"]]
        costs = [one for one in costs if abs(one[1] - one[2]) > 0.02 * total]
        costs.append(("**together**", before["composed"]["core_ms"], total))
        rows += [[name, stage, number(a), number(b), f"{a / b:.2f}x"] for stage, a, b in costs if b]
        a, b = before["composed"]["images_per_s"], after["composed"]["images_per_s"]
        rows.append([name, "images/s", number(a), number(b), f"{b / a:.2f}x"])
    said = f"An image, before (commit {', '.join(sorted(commits))}) and after:\n\n"
    return said + table(("workload", "stage", "core-ms before", "after", ""), rows, left=2) if rows else ""


def validity(path: Path) -> str:
    """What slowing stages on purpose showed (tests/slowdowns.py)."""
    if not path.exists():
        return ""
    v = json.loads(path.read_text())
    rows = [[stage, f"{row['named']} of {row['runs']}", f"{row['worst_core_error']:.1%}", f"{row['worst_error']:.1%}"]
            for stage, row in v["by_stage"].items()]  # fmt: skip
    return (
        f"Each stage in turn was made slower by a known factor (its own function did its work several times; see"
        f" `tests/slowdowns.py`; torch on one thread), {v['runs']} runs in all. The slowed stage was named in"
        f" **{v['named']} of {v['runs']}**; the predicted gain from undoing it was within 15 % of the measured one in"
        f" {v['core_within_15']} (core-ms) and {v['wall_within_15']} (images/s) of them, typically within"
        f" {v['core_error_median']:.1%} and {v['wall_error_median']:.1%}.\n\n"
    ) + table(("stage", "named", "largest error, core-ms", "largest error, images/s"), rows)


def repeatability(profiles: Profiles) -> str:
    pairs = {name: (one["composed"]["core_ms"], two["composed"]["core_ms"]) for name, (one, two, _) in profiles.items()}
    rows = [[name, number(a), number(b), f"{abs(b / a - 1):.1%}"] for name, (a, b) in pairs.items()]
    took = max(report["took_s"] for runs in profiles.values() for report in runs[:2])
    return output.document(
        "Two runs of each workload:",
        table(("workload", "core-ms", "again", "differ by"), rows),
        f"The longest of these runs took {took:.0f} s. Training needs no profiling mode: the loader's timings are always kept"
        " and go to metrics.jsonl, so `python tools/profile.py stages --run runs/NAME` asks a run afterwards (a few"
        " microseconds an image; a test holds it under 1 % of the smallest training step).",
    )
