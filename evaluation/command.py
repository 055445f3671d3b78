"""The command line of tools/evaluate.py."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import tyro

from manyview.evaluation import compare, encoder, figures, finetune, protocols, report, suite, tables
from manyview.evaluation.data import Data, open_data
from manyview.evaluation.labels import Labels
from manyview.model.weights import split_key
from manyview.pipeline import engines
from manyview.pipeline.errors import UserError, nearest
from manyview.training.monitor import environment

QUICK_LIMIT = 5_000


@dataclass
class Config:
    """Evaluate encoders: accuracies with intervals, the untrained network beside them, plots and a report."""

    targets: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run directories, their checkpoints (.pt), .safetensors files, timm:NAME or torchvision:NAME; or the word `compare`
    and run directories."""
    data: tuple[Path, ...] = ()
    """Shards to evaluate on; default: those that the run was trained on."""
    labels: Path | None = None
    """A table (.csv) of file names and labels instead of those in the shards; several labels an image, with `;` between, are
    scored by mean average precision."""
    protocols: tuple[str, ...] = ("quick",)
    """knn, linear, ridge, label-free, overlap (these five: quick), lidar, averaged, in-domain, fewshot, full (these ten: all),
    transductive."""
    limit: int | None = None
    """At most this many training images and half as many test images, class-balanced; 0 = all. Default: 5000 where every
    protocol is of the quick five, else all."""
    seed: int = 0
    """Of sub-samples, heads, held-out splits and the untrained network."""
    epochs: int = 100
    """Of the linear probes."""
    preset: str = "byol2"
    """Of few-shot fine-tuning: byol2, byol1, swav, barlowtwins."""
    finetune_bn: bool = False
    """A BatchNorm before the head in fine-tuning."""
    finetune_epochs: int = 0
    """Of few-shot and full fine-tuning; 0 = the presets' 30 and 100."""
    batch: int = 256
    """Images a forward pass."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one."""
    engine: str = "auto"
    """What decodes the images: auto, cpu, dali, resident."""
    threads: int | None = None
    """Of the engine."""
    weights: str | None = None
    """A local file with the weights of a timm or torchvision target, instead of the download; FILE:teacher takes one of several
    networks inside."""
    weights_key: str | None = None
    """Which network inside a file of several: a part of the prefix of its tensors."""
    image_size: int | None = None
    """Pixels; default: those the encoder was trained on."""
    mean: tuple[float, float, float] | None = None
    """Of the input, in 0..1; default: what comes with the weights, and it is printed."""
    std: tuple[float, float, float] | None = None
    """As the mean."""
    crop: float | None = None
    """The share of the short side that the evaluation view shows; default: what comes with the weights."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Of the evaluation view; default: what comes with the weights."""
    layers: str = "pooled"
    """What the features are: pooled, last:N (the last N blocks or stages, concatenated) or layer:N (one of them)."""
    pretrained_on: str | None = None
    """The name of the data that foreign weights were trained on, for the tables and `compare`."""
    out: Path | None = None
    """Where to write; default: the run directory (runs/TARGET for public weights, runs/comparison for `compare`)."""
    write: Path | None = None
    """Also write the tables of all targets as Markdown, with command, commit, versions and hardware."""
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
        write_markdown(config.write, contents, device)


LEAST = {"limit": 0, "seed": 0, "epochs": 1, "finetune_epochs": 0, "batch": 1, "threads": 1, "image_size": 8}


def check(config: Config) -> None:
    """UserError with one line for every flag that cannot be."""
    values = {name: getattr(config, name) for name in LEAST}
    errors = [
        f"--{name.replace('_', '-')} must be at least {LEAST[name]}, not {value}"
        for name, value in values.items()
        if value is not None and value < LEAST[name]
    ]
    if config.limit == 1:
        errors.append("--limit 1 leaves no test image: it must be 0 (all) or at least 2")
    if config.crop is not None and not 0 < config.crop <= 1:
        errors.append(f"--crop must be a share in (0, 1], not {config.crop}")
    if config.std is not None and min(config.std) <= 0:
        errors.append(f"--std must be above 0, not {' '.join(map(str, config.std))}")
    if config.out and len(config.targets) > 1:
        errors.append(f"--out is the folder of one target, and these are {len(config.targets)}")
    if errors:
        raise UserError("\n".join(errors))


def start(wanted: str) -> torch.device:
    """The device, and the process group where torchrun started several."""
    device = engines.device_of(wanted)
    if "RANK" in os.environ:
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device.type == "cuda" else device
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
            try:
                for data in datasets:
                    work.embed(data, own)
            finally:
                work.close()
    finally:
        dist.destroy_process_group()
    return first


def prepare(
    target: str, config: Config, device: torch.device, say: Callable[[str], None] = print
) -> tuple[suite.Suite, list[Data], Data | None, Path | None]:
    """(the work to do, the datasets, the one the encoder was trained on if it is here, the run directory if any)."""
    trained = encoder.load(target, encoder.Asked(
        config.weights, config.weights_key, config.image_size, config.mean, config.std, config.crop, config.interpolation,
        config.pretrained_on, config.layers,
    ))  # fmt: skip
    say(f"encoder    {trained.run}: {trained.transform}")
    if trained.loaded:
        say(f"weights    {trained.loaded}")
    run = run_directory(target)
    settings = encoder.facts(run, "config.json") if run else {}
    own_path = Path(settings["data"]) if "data" in settings else None
    paths = list(config.data) or ([own_path] if own_path else [])
    if not paths:
        raise UserError(f"{target}: say what to evaluate on, as in `--data shards/cifar10`")
    options = suite.Options(
        seed=config.seed, batch=config.batch, epochs=config.epochs, preset=few_shot_preset(config.preset),
        finetune_bn=config.finetune_bn, finetune_epochs=config.finetune_epochs,
        engine=config.engine, device=str(device), threads=config.threads, policy=settings.get("policy", "simclr"),
        augment=tuple(settings.get("augment", ())),
    )  # fmt: skip
    asked = protocols.choose(config.protocols)
    quick = all(p.group == "quick" for p in asked)
    limit = config.limit if config.limit is not None else QUICK_LIMIT if quick else 0
    groups = set(config.protocols) <= protocols.GROUPS.keys()
    table = Labels(config.labels) if config.labels else None
    datasets = opened(
        paths, partial(open_data, protocols=asked, groups=groups, limit=limit, seed=config.seed, table=table)
    )
    annotate(datasets, config.notes)
    own = next((d for d in datasets if own_path and d.path.resolve() == own_path.resolve()), None)
    if own is None and own_path and own_path.is_dir():
        own = open_data(own_path, limit=limit, seed=config.seed)  # its training images alone; they may have no labels
    work = suite.Suite(trained, config.out or directory_for(target, run, trained), options, say)
    for data in datasets:
        work.plan(data, own)  # what cannot be done is refused before anything is
    return work, datasets, own, run


def evaluate(target: str, config: Config, device: torch.device) -> dict:
    """One target; returns the content of its eval.json."""
    begun = time.perf_counter()
    work, datasets, own, run = prepare(target, config, device)
    try:
        pictures = []
        for data in datasets:
            work.run(data, own)
            pictures += figures.draw(work, data) if config.plots else []
    finally:
        work.close()
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


def few_shot_preset(name: str) -> str:
    known = sorted({p.partition("-")[0] for p in finetune.PRESETS} - {"full"})
    if name not in known:
        raise UserError(nearest("preset", name, known))
    return name


def opened(paths: list[Path], open_one: Callable[[Path], Data]) -> list[Data]:
    """All datasets, or every reason why not at once."""
    datasets, errors = [], []
    for path in paths:
        try:
            datasets.append(open_one(path))
        except UserError as error:
            errors.append(str(error))
    names = [d.name for d in datasets]
    errors += [
        f"two sets of shards are called {name}: write one under another name"
        for name in set(names)
        if names.count(name) > 1
    ]
    if errors:
        raise UserError("\n".join(errors))
    return datasets


def run_directory(target: str) -> Path | None:
    """The run that a target belongs to."""
    path, _ = split_key(target)
    if path.is_dir():
        return path
    return next((p for p in path.parents if (p / "config.json").is_file()), None) if path.is_file() else None


def directory_for(target: str, run: Path | None, trained: encoder.Encoder) -> Path:
    """Where results go: weights that share an architecture, or a file's name, do not share a folder."""
    path, _ = split_key(target)
    if run is None:
        return Path("runs") / trained.run.replace(":", "-").replace("/", "-")
    return run if path.is_dir() or path.name == "backbone.safetensors" else run / f"eval-{path.stem}"


def compare_runs(config: Config) -> None:
    out = config.out or Path("runs") / "comparison"
    rows = compare.read([Path(t) for t in config.targets[1:]])
    correlations = compare.write(rows, out, seed=config.seed)
    pictures = figures.comparison(rows, correlations, out)
    page = report.comparison(out, correlations, compare.averages(correlations), pictures)
    print(tables.correlations(correlations))
    print(f"\n{out / 'results.csv'}, {out / 'correlations.csv'}, {page}")


def write_markdown(path: Path, contents: list[dict], device: torch.device) -> None:
    """Tables that can be made again by the command they begin with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = environment(device)
    words = [Path(sys.argv[0]).as_posix(), *sys.argv[1:]]
    words[0] = "tools/evaluate.py"
    path.write_text(tables.markdown(contents, f"python {shlex.join(words)}", facts))
    print(f"wrote {path}")
