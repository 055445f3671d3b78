"""The command line of tools/evaluate.py."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro

from manyview.evaluation import compare, encoder, figures, finetune, folder, protocols, report, suite, tables
from manyview.evaluation.data import Data, open_data
from manyview.evaluation.labels import Labels
from manyview.model.weights import split_key
from manyview.pipeline import engines, files
from manyview.pipeline.errors import UserError, nearest, refuse
from manyview.training.monitor import environment

QUICK_LIMIT = 5_000


@dataclass
class Config(encoder.Asked, suite.Options):
    """Evaluate encoders: accuracies with intervals, the untrained network beside them, plots and a report."""

    targets: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run directories, their checkpoints (.pt), .safetensors files, timm:NAME or torchvision:NAME; or the word `compare`
    and run directories."""
    data: tuple[Path, ...] = ()
    """Shards, or plain folders of images, to evaluate on; default: what the run was trained on."""
    labels: Path | None = None
    """A table (.csv) of file names and labels instead of those in the shards; several labels an image, with `;` between, are
    scored by mean average precision."""
    protocols: tuple[str, ...] = ("quick",)
    """knn, linear, ridge, label-free, overlap (these five: quick), lidar, averaged, in-domain, fewshot, full (these ten: all),
    transductive."""
    limit: int | None = None
    """At most this many training images and half as many test images, class-balanced; 0 = all. Default: 5000 where every
    protocol is of the quick five, else all."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one."""
    reference: str | None = None
    """With `compare`: the dataset whose scores are held against the others', over all encoders; default: the one that each was
    trained on."""
    out: Path | None = None
    """Where to write; default: the run directory (runs/TARGET for public weights, runs/comparison for `compare`)."""
    write: Path | None = None
    """Also write the tables of all targets (or of `compare`) as Markdown, with command, commit, versions and hardware."""
    notes: tuple[str, ...] = ()
    """What has to be known about a dataset, as `NAME: text`; stands beside its numbers."""
    plots: bool = True
    """Draw the pictures and write report.html."""


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    if not config.targets:
        raise UserError("nothing to evaluate: give a run directory, as in `python tools/evaluate.py runs/NAME`")
    if config.targets[0] == "compare":
        compare_runs(config)
        return
    check(config)
    device = start(config.device)
    if dist.is_initialized() and not embed_together(config, device):
        return
    contents = [evaluate(target, config, device) for target in config.targets]
    if config.write:
        write_markdown(config.write, partial(tables.markdown, contents), device)


LEAST = {"limit": 0, "seed": 0, "epochs": 1, "finetune_epochs": 0, "batch": 1, "threads": 1}


def check(config: Config) -> None:
    """UserError with one line for every flag that cannot be."""
    errors = []
    for name, least in LEAST.items():
        if (value := getattr(config, name)) is not None and value < least:
            errors.append(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    if config.limit == 1:
        errors.append("--limit 1 leaves no test image: it must be 0 (all) or at least 2")
    errors += config.check()
    if config.out and len(config.targets) > 1:
        errors.append(f"--out is the folder of one target, and these are {len(config.targets)}")
    if config.preset not in (known := sorted({p.partition("-")[0] for p in finetune.PRESETS} - {"full"})):
        errors.append(nearest("preset", config.preset, known))
    refuse(errors)


def start(wanted: str) -> torch.device:
    """The device, and the process group where torchrun started several."""
    device = engines.device_of(wanted)
    if "RANK" in os.environ:
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else every process would also hold memory of the first GPU
    return device


def embed_together(config: Config, device: torch.device) -> bool:
    """With torchrun: all features of all targets, each process its share. True in the one process that then goes on
    alone, with the features from the cache: probes are small beside them, and only one may write."""
    first = dist.get_rank() == 0
    try:
        for target in config.targets:
            work, datasets, own, _ = prepare(target, config, device, print if first else lambda _: None)
            with closing(work):
                for data in datasets:
                    work.embed(data, own)
    finally:
        dist.destroy_process_group()
    return first


def prepare(
    target: str, config: Config, device: torch.device, say: Callable[[str], None] = print
) -> tuple[suite.Suite, list[Data], Data | None, Path | None]:
    """(the work to do, the datasets, the one the encoder was trained on if it is here, the run directory if any)."""
    trained = encoder.load(target, config)
    say(f"encoder    {trained.run}: {trained.transform}")
    if trained.loaded:
        say(f"weights    {trained.loaded}")
    run = run_directory(target)
    settings = files.facts(run / "config.json") if run else {}
    own_path = Path(settings["data"]) if "data" in settings else None
    paths = list(config.data) or ([own_path] if own_path else [])
    if not paths:
        raise UserError(f"{target}: say what to evaluate on, as in `--data shards/cifar10`")
    asked = protocols.choose(config.protocols)
    quick = all(p.group == "quick" for p in asked)
    limit = config.limit if config.limit is not None else QUICK_LIMIT if quick else 0
    groups = set(config.protocols) <= protocols.GROUPS.keys()
    table = Labels(config.labels) if config.labels else None
    how: dict[str, Any] = {"protocols": asked, "groups": groups, "limit": limit, "seed": config.seed, "table": table,
                           "layout": trained.layout}  # fmt: skip
    datasets = opened(paths, partial(open_data, **how))
    annotate(datasets, config.notes)
    own = next((d for d in datasets if own_path and d.path.resolve() == own_path.resolve()), None)
    if own is None and own_path and own_path.is_dir() and not folder.is_folder(own_path):
        own = open_data(own_path, limit=limit, seed=config.seed)  # its training images alone; they may have no labels
    facts = environment(device)
    by = f"{command_line()} (commit {facts['commit']}; {facts['device']})"
    out = config.out or directory_for(target, run, trained)
    work = suite.Suite(trained, out, replace(config, device=str(device)), say, by)
    for data in datasets:
        work.plan(data, own)  # what cannot be done is refused before anything is
    return work, datasets, own, run


def evaluate(target: str, config: Config, device: torch.device) -> dict:
    """One target; returns the content of its eval.json."""
    begun = time.perf_counter()
    work, datasets, own, run = prepare(target, config, device)
    pictures = []
    with closing(work):
        for data in datasets:
            work.run(data, own)
            pictures += figures.draw(work, data) if config.plots else []
    if own is None and any(p.name == "overlap" for d in datasets for p in d.protocols):
        print("overlap with the pre-training data: not checked, that data is not here")
    work.write()
    content = work.content()
    print(tables.console(content))
    written = [work.file, report.write(work.out, content, run, pictures)] if config.plots else [work.file]
    print(f"\n{', '.join(map(str, written))}: {time.perf_counter() - begun:.0f} s")
    return content


def annotate(datasets: list[Data], notes: tuple[str, ...]) -> None:
    """Add the user's notes `NAME: text` to their datasets."""
    named = {data.name: data for data in datasets}
    for note in notes:
        name, _, text = note.partition(":")
        if name not in named:
            raise UserError(f"--notes {note!r}: {nearest('dataset', name, named)}; a note is `NAME: text`")
        named[name].notes.append(text.strip())


def opened(paths: list[Path], open_one: Callable[[Path], Data]) -> list[Data]:
    """All datasets, or every reason why not at once."""
    datasets, errors = [], []
    for path in paths:
        try:
            datasets.append(open_one(path))
        except UserError as error:
            errors.append(str(error))
    for name, count in Counter(data.name for data in datasets).items():
        if count > 1:
            errors.append(f"two sets of shards are called {name}: write one under another name")
    refuse(errors)
    return datasets


def run_directory(target: str) -> Path | None:
    """The run that a target belongs to."""
    path, _ = split_key(target)
    if path.is_dir():
        return path
    return next((p for p in path.parents if (p / "config.json").is_file()), None) if path.is_file() else None


def directory_for(target: str, run: Path | None, trained: encoder.Encoder) -> Path:
    """Where results go: other weights of an architecture or file name, sizes, transforms and layers have folders of their own."""
    path, key = split_key(target)
    if run is None:
        return Path("runs") / "-".join(filter(None, [trained.run.replace(":", "-").replace("/", "-"), trained.variant]))
    own = [] if path.is_dir() or path.name == "backbone.safetensors" else [path.stem, key]
    parts = list(filter(None, [*own, trained.variant]))
    return run / "-".join(["eval", *parts]) if parts else run


def compare_runs(config: Config) -> None:
    out = config.out or Path("runs") / "comparison"
    contents = compare.contents([Path(t) for t in config.targets[1:]])
    rows = compare.rows(contents)
    for name, text in (map(str.strip, note.split(":", 1)) for note in config.notes if ":" in note):
        for content in (content for content in contents if name in content["datasets"]):
            content["datasets"][name]["notes"].append(text)
    correlations = compare.write(rows, out, seed=config.seed, reference=config.reference)
    pictures = figures.comparison(rows, correlations, out)
    page = report.comparison(out, correlations, compare.averages(correlations), pictures)
    print(tables.correlations(correlations))
    print(f"\n{out / 'results.csv'}, {out / 'correlations.csv'}, {page}")
    if config.write:
        write_markdown(config.write, partial(tables.comparison, contents, correlations), torch.device("cpu"))


def write_markdown(path: Path, text: Callable[[str, dict], str], device: torch.device) -> None:
    """`text` of the command that makes it again, and of commit, versions and hardware."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(command_line(), environment(device)))
    print(f"wrote {path}")


def command_line() -> str:
    return f"python {shlex.join(['tools/evaluate.py', *sys.argv[1:]])}"
