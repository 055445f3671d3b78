"""The command line of train.py, the saved config.json and the documentation of every setting: one dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
import yaml

from manyview.pipeline import engines, storage
from manyview.pipeline.errors import UserError, in_one_line, nearest, refuse
from manyview.pipeline.store import Store, training_split
from manyview.training.monitor import TRACKERS

CHOICES = {
    "form": ("auto", "mean", "cross", "pairs", "view", "pooled"),
    "standardize": ("auto", "view", "pooled"),
    "stem": ("auto", "small", "standard"),
    "optimizer": ("adamw", "sgd", "lars", "muon"),
    "bn": ("pooled", "view"),
    "order": ("random", "blocks"),
    "engine": engines.NAMES,
    "device": ("auto", "cpu", "cuda"),
    "precision": ("auto", "bf16", "fp16", "fp32"),
}
# Both ends are allowed.
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("views", "batch_size", "projector_dim"), (2, math.inf)),
    **dict.fromkeys(("prefetch", "log_every", "save_every"), (1, math.inf)),
    **dict.fromkeys(("projector_hidden", "size", "steps", "threads", "view_chunk", "keep_every"), (0, math.inf)),
    **dict.fromkeys(("lr", "final_lr", "weight_decay"), (0, 1e30)),
    **dict.fromkeys(("fraction", "warmup", "ema", "max_bad"), (0, 1)),
    "epochs": (0, 1e9),
    "seed": (0, 2**63 - 1),
    "eval_every": (-1, math.inf),
}
SPEED = ["engine", "device", "precision", "compile", "threads", "prefetch", "view_chunk"]
BOOKKEEPING = ["out", "resume", "overwrite", "init_from", "dry_run", "log", "log_every", "save_every", "keep_every",
               "eval_every", "max_bad", "preset"]  # fmt: skip


SMALL = 32  # pixels of a view up to which `small_defaults` hold


@dataclass
class Config:
    """Pretrain a vision encoder on shards, with many views an image."""

    # --- what is learned: a resumed run must agree on all of these ---

    data: Path = Path("shards/imagenet")
    """Shard directory, as `make shards` writes it, or a bucket's address such as s3://bucket/name. Its split `unlabelled` is
    trained on where it has one (STL-10), else `train`."""
    views: int = 4
    """Views an image (V); under multicrop two are global and the rest local crops."""
    policy: str = "simclr"
    """Augmentation policy: simclr, byol, barlow, cifar, stl, imagenet100, multicrop, or auto: by view size and whether pictures
    are grey. Without --preset auto for ResNets on views of up to 32 px, as --optimizer and --beta are then others."""
    augment: tuple[str, ...] = ()
    """Changes to the policy as name=value or YAML files, e.g. `--augment blur=0 hue=0.1 local.scale=[0.05,0.3]`."""
    size: int = 0
    """View side in pixels; 0 = the median short side of the images, at most 224."""
    fraction: float = 1.0
    """Share of the images to train on: a seeded, nested, class-balanced subset."""
    batch_size: int = 256
    """Images a step over all ranks; the network sees V times as many views."""
    epochs: float = 100.0
    """Passes over the (fraction of the) images."""
    steps: int = 0
    """Optimizer steps instead of epochs; 0 = from epochs."""
    backbone: str = "resnet18"
    """Any timm model with features, with keyword arguments as in resnet18:layers=[1,1,1,1], or torchvision:NAME."""
    stem: str = "auto"
    """small = 3x3 stride 1, no max-pool (ResNets), small patches (ViTs); auto = small up to 64 px."""
    projector_dim: int = 256
    """Embedding dimensions (D). Small is enough when decorrelation is strong."""
    projector_hidden: int = 0
    """Hidden width of the projector; 0 = projector_dim."""
    objective: str = "barlow"
    """barlow, vicreg, spectral, or paper (the authors' biased estimator)."""
    form: str = "auto"
    """Which correlation is decorrelated; barlow: mean, cross, pairs; vicreg: view, pooled. auto = the objective's own."""
    beta: str = "auto"
    """Strength of decorrelation: a number, one divided by the dimensions such as `5/D`, or auto = 3/D (vicreg, spectral: 1).
    Up to 32 px without --preset 20/D (docs/recipes.md)."""
    standardize: str = "auto"
    """Barlow's embedding statistics per view (auto: the textbook's), or pooled over all views."""
    bn: str = "pooled"
    """Batch-norm statistics pooled over views (one forward pass, less noise), or per view."""
    optimizer: str = "adamw"
    """adamw, sgd, lars, muon. In short runs on small images muon is far ahead (30 core-seconds on CIFAR-10: 40.0 % kNN, adamw
    33.3; docs/recipes.md), but wants 256 views a step or more. Up to 32 px without --preset it is the default."""
    lr: float = 0.0
    """Peak learning rate; 0 = the optimizer's rule, which is printed."""
    final_lr: float = 0.001
    """Learning rate at the end, as a share of the peak; 1 with --warmup 0 is a constant rate."""
    warmup: float = 0.05
    """Share of the steps spent on linear warm-up."""
    weight_decay: float = 1e-4
    """On weight matrices and kernels only."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, exported instead of them; 0 = none."""
    order: str = "random"
    """Order of images: random, or blocks of shards where random reads are dear."""
    seed: int = 0
    """Seed of weights, order and views."""

    # --- how fast: none of these changes what is learned beyond rounding ---

    engine: str = "auto"
    """What makes the views: dali, cpu, resident, fused (Triton behind DALI's decoder), auto."""
    device: str = "auto"
    """cpu, cuda, auto."""
    precision: str = "auto"
    """bf16, fp16, fp32; auto = bf16 where the GPU or the processor (AMX, AVX-512) multiplies it itself, fp16 on older GPUs,
    else fp32, as for depthwise networks on a processor."""
    compile: bool = False
    """torch.compile the encoder: off, as it takes its time first and pays for some networks only (results/trainer.md)."""
    threads: int = 0
    """Threads of the engine; 0 = all cores this process may use."""
    prefetch: int = 2
    """Batches made ahead."""
    view_chunk: int = 0
    """Views in the graph at a time, for memory; needs --bn view. 0 = all."""

    # --- bookkeeping ---

    out: Path | None = None
    """Run directory; default runs/DATA-OBJECTIVE-vV-seedS."""
    preset: Path | None = None
    """YAML file of settings, e.g. presets/cifar10.yaml; flags win over it."""
    resume: bool = False
    """Go on from the newest checkpoint in --out (or start, if there is none)."""
    overwrite: bool = False
    """Empty a used --out first."""
    init_from: Path | None = None
    """Weights to start a new run from: a run's backbone.safetensors or checkpoint (with its projector), a file of someone
    else's (FILE, or FILE:teacher of several networks), timm:NAME or torchvision:NAME."""
    dry_run: bool = False
    """Print the plan with memory and time estimates, then stop."""
    log: tuple[str, ...] = ()
    """Trackers, with commas or spaces between: tensorboard, wandb, trackio."""
    log_every: int = 50
    """Steps between metrics."""
    save_every: int = 1000
    """Steps between checkpoints; the last two are kept."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are kept for ever."""
    eval_every: int = 0
    """Steps between online probes; 0 = ten times a run, -1 = never."""
    max_bad: float = 0.01
    """Share of unreadable images above which the run stops."""

    def learned(self) -> dict[str, Any]:
        """The settings that decide what is learned: what a checkpoint must agree with, name by name."""
        return {k: v for k, v in to_json(self).items() if k not in (*SPEED, *BOOKKEEPING, "data")}


def parse(argv: list[str] | None = None) -> Config:
    """The configuration: defaults < preset < flags. UserError with one line for each thing that is wrong."""
    argv = sys.argv[1:] if argv is None else argv
    errors: list[str] = []
    base = _with_preset(argv, errors)
    config, unknown = _flags(argv, base)
    if not config.preset and (small := small_defaults(config)):
        config, unknown = _flags(argv, dataclasses.replace(base, **small))
    flags = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(Config)]
    for word in unknown:
        close = difflib.get_close_matches(word.split("=")[0], flags, n=3, cutoff=0.5)
        errors.append(f"unknown flag {word!r}" + (f"; nearest: {', '.join(close)}" if close else "; see --help"))
    config.log = tuple(name for word in config.log for name in word.split(",") if name)
    errors += check(config)
    refuse(errors)
    return config


def _flags(argv: list[str], base: Config) -> tuple[Config, list[str]]:
    return tyro.cli(
        Config, args=argv, default=base, description=Config.__doc__, prog="train.py", return_unknown_args=True
    )


def small_defaults(config: Config, size: int = 0) -> dict[str, Any]:
    """What the defaults are, on the command line and without a preset, where a ResNet is to see views of up to 32 px; {}
    elsewhere. `size`: of the views, if it is known already.

    Measured on CIFAR-10 by core-seconds (docs/recipes.md): Muon at its best rate is 7 points ahead of AdamW at 2e-3 by kNN;
    the textbook's c = 3 is behind 20 (results/paper.md); and there is no blur, as SimCLR itself has none for CIFAR."""
    if "resnet" not in config.backbone or config.size > SMALL:
        return {}
    try:
        size = size or config.size or Store(config.data, training_split(config.data)).default_size()
    except UserError:
        return {}  # of shards that cannot be opened: `check` or train.py says why
    if size > SMALL:
        return {}
    plain = config.objective == "barlow" and config.form == "auto"  # what beta was measured with
    return {"optimizer": "muon", "policy": "auto"} | ({"beta": "20/D"} if plain else {})


def _with_preset(argv: list[str], errors: list[str]) -> Config:
    """Defaults, overlaid with the file after --preset if there is one."""
    words = [w for arg in argv for w in arg.split("=", 1)]
    if "--preset" not in words[:-1]:
        return Config()
    path = Path(words[words.index("--preset") + 1])
    if not path.is_file():
        errors.append(
            f"no preset file {path}; presets: {', '.join(sorted(str(p) for p in Path('presets').glob('*.yaml')))}"
        )
        return Config()
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        settings = f"not YAML: {in_one_line(error)}"
    if not isinstance(settings, dict):
        errors.append(f"{path}: expected lines of `setting: value`, as in `views: 8`, not {str(settings)[:300]}")
        return Config()
    types = {f.name: str(f.type) for f in dataclasses.fields(Config)}
    known: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in types:
            errors.append(f"{path}: {nearest('setting', str(key), types)}")
            continue
        try:
            known[key] = _typed(types[key], value)
        except (TypeError, ValueError):
            errors.append(f"{path}: {key}: {value!r} is not of type {types[key]}")
    return dataclasses.replace(Config(), **known)


def _typed(kind: str, value: Any) -> Any:
    """A value from YAML as the field's type; ValueError or TypeError where it is none (`"false"` is no bool, 4.7 no int)."""
    if value is None or isinstance(value, dict):
        raise TypeError(value)
    if "tuple" in kind:
        return tuple(str(v) for v in value) if isinstance(value, list) else tuple(str(value).split())
    if isinstance(value, list) or isinstance(value, bool) != (kind == "bool"):
        raise TypeError(value)
    if "Path" in kind:
        return Path(value)
    if kind == "int" and int(value) != float(value):
        raise ValueError(value)
    return {"str": str, "float": float, "int": int, "bool": bool}[kind](value)


def check(config: Config) -> list[str]:
    """One line for every setting that cannot be right; what needs the data or the model is checked when they are opened."""
    errors = []
    for name, valid in CHOICES.items():
        if getattr(config, name) not in valid:
            errors.append(f"--{name}: {nearest(name, getattr(config, name), valid)}")
    errors += [f"--log: {nearest('tracker', name, TRACKERS)}" for name in config.log if name not in TRACKERS]
    for name, (low, high) in RANGES.items():
        if not low <= getattr(config, name) <= high:  # nan is in no range
            text = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            errors.append(f"--{name.replace('_', '-')} must be {text}, not {getattr(config, name)}")
    if config.fraction == 0:
        errors.append("--fraction must be above 0")
    if config.ema == 1:
        errors.append("--ema must be below 1: an average that never moves")
    if config.beta != "auto" and beta(config) is None:
        errors.append(f"--beta must be a number, a number like 5/D, or auto, not {config.beta!r}")
    if config.epochs == 0 and config.steps == 0:
        errors.append("--epochs must be above 0 (or give --steps)")
    if config.view_chunk and config.bn != "view":
        errors.append("--view-chunk needs --bn view: statistics pooled over views cannot be cut into chunks exactly")
    if config.resume and config.overwrite:
        errors.append("--resume and --overwrite exclude each other")
    if storage.address(config.data) is None and not (config.data / "manifest.json").is_file():
        errors.append(
            f"--data {config.data}: no shards there; make some: make shards DATASET={config.data.name} OUT={config.data}"
        )
    errors += _check_names(config)
    return errors


def _check_names(config: Config) -> list[str]:
    """Names that the data and model packages know best."""
    from manyview.model import backbone, objective
    from manyview.pipeline import views

    def check_policy() -> None:
        size, changes = config.size or 224, views.overrides(config.augment)
        chosen = views.policy(config.policy, max(2, config.views), size, changes)
        if chosen.views < 2:
            raise UserError(f"{chosen.views} view of an image; the objective wants two that agree")

    errors = []
    for flag, test in (
        ("--backbone", lambda: backbone.check(config.backbone)),
        ("--objective", lambda: objective.create(config.objective, **objective_options(config))),
        ("--policy", check_policy),
    ):
        try:
            test()
        except UserError as error:
            errors += [f"{flag}: {line}" for line in str(error).splitlines()]
    return errors


def objective_options(config: Config) -> dict[str, Any]:
    """What the flags say of the objective: settings named as its options; None where the objective's own default holds."""
    from manyview.model import objective

    own = objective.options_of(config.objective) if config.objective in objective.OBJECTIVES else []
    every = dict.fromkeys(name for key in objective.OBJECTIVES for name in objective.options_of(key))
    options: dict[str, Any] = {}
    for name in (name for name in every if hasattr(config, name)):
        value = getattr(config, name)
        untouched = value == "auto" or (name not in own and value == getattr(Config, name))
        options[name] = None if untouched else beta(config) if name == "beta" else value
    return options


def beta(config: Config) -> float | None:
    """The number behind `--beta 0.01` or `--beta 5/D` (over projector_dim); None where it is neither."""
    text = config.beta.strip()
    try:
        return float(text.removesuffix("/D")) / (config.projector_dim if text.endswith("/D") else 1)
    except ValueError:
        return None


def to_json(config: Config) -> dict[str, Any]:
    """Plain values, in the order of the fields."""

    def plain(value: Any) -> Any:
        return storage.where(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value

    return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
