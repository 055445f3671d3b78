"""What each framework gains by `manyview.Views`: python examples/measure.py shards/photos --out results/frontdoor.md

Each framework trains the same network on the same photos, once fed as its own documentation has it (a DataLoader with
torchvision's or its own transforms) and once by `Views`; one epoch each, in turn, round after round. On a CPU network and data
share the cores, so the larger the network, the less there is to gain. A network that costs nothing (`none`: pooled pixels and
one linear layer) shows what is left where another chip trains.
"""

from __future__ import annotations

import itertools
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import manyview
from manyview.bench import output
from manyview.bench.contenders import Photos, pil, transforms
from manyview.bench.harness import Spent, interleaved, interval, spent, tree_seconds
from manyview.bench.peers import extract
from manyview.model import backbone
from manyview.pipeline.convert.write import write_shards
from manyview.pipeline.files import write
from manyview.pipeline.manifest import Options
from manyview.pipeline.store import Store
from manyview.pipeline.views import policy

OWN = dict.fromkeys(("torch", "lightning", "accelerate"), "torchvision")  # whose transforms a framework is used with
OWN |= {"lightly": "lightly", "timm": "timm"}
Name = tuple[str, str, str]  # network, framework, who feeds it
CLASSES = 1000  # of the classifier; which class an image has does not matter here


@dataclass
class Args:
    data: tyro.conf.Positional[Path]
    """Shards of photos, stored as JPEG."""
    images: int = 128
    size: int = 224
    views: int = 4
    batch: int = 32
    workers: int = 2
    rounds: int = 5
    frameworks: tuple[str, ...] = tuple(OWN)
    networks: tuple[str, ...] = ("resnet10-narrow", "none")
    out: Path | None = None


def transform_of(framework: str, size: int) -> Callable:
    """SimCLR's augmentation as the framework has it; timm's crop and flip."""
    if framework == "lightly":
        from lightly.transforms.simclr_transform import SimCLRViewTransform

        return SimCLRViewTransform(input_size=size)
    if framework == "timm":
        return timm.data.create_transform(size, is_training=True, color_jitter=None, interpolation="bilinear")
    return transforms(policy("simclr", 2, size).groups[0], [v2.ToImage()])


def loss_of(framework: str, network: nn.Module, batch: Any) -> Tensor:
    z = manyview.encode(network, batch.views if isinstance(batch, manyview.Batch) else torch.stack(batch))
    if framework == "timm":
        return F.cross_entropy(z[0], torch.zeros(len(z[0]), dtype=torch.int64))
    if framework == "lightly":
        from lightly.loss import NTXentLoss

        return torch.stack([NTXentLoss()(z[0], other) for other in z[1:]]).mean()
    return manyview.barlow(z).total


def epoch(framework: str, network: nn.Module, batches: Iterable) -> None:
    """One epoch as this framework runs it."""
    optimizer: Any = torch.optim.AdamW(network.parameters(), 1e-3)
    backward: Callable = Tensor.backward
    if framework == "lightning":
        import pytorch_lightning as L

        module: Any = L.LightningModule()
        module.network, module.configure_optimizers = network, lambda: optimizer
        module.training_step = lambda batch, batch_idx: loss_of(framework, network, batch)
        shown = ("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary")
        quiet: dict[str, Any] = dict.fromkeys(shown, False)
        L.Trainer(max_epochs=1, accelerator="cpu", **quiet).fit(module, batches)
        return
    if framework == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        network, optimizer = accelerator.prepare(network, optimizer)
        batches = accelerator.prepare(batches) if isinstance(batches, DataLoader) else batches
        backward = accelerator.backward
    for batch in batches:
        backward(loss_of(framework, network, batch))
        optimizer.step()
        optimizer.zero_grad()


def contenders(args: Args, folder: Path) -> dict[Name, Callable[[], None]]:
    (folder / "photos").mkdir()
    calls: dict[Name, Callable[[], None]] = {}
    files = extract(Store(args.data, "train"), args.images, folder / "photos")
    write_shards(Options("folder"), folder / "photos", folder / "shards", quiet=True)
    for name, framework in itertools.product(args.networks, args.frameworks):
        views, augmented = (1, "supervised") if framework == "timm" else (args.views, "simclr")
        network = network_of(name, args.size, CLASSES if framework == "timm" else 256)
        photos = Photos(files, pil, transform_of(framework, args.size), views)
        own = DataLoader(photos, args.batch, True, drop_last=True, num_workers=args.workers, persistent_workers=True)
        ours = manyview.Views(
            folder / "shards", views, args.batch, policy=augmented, size=args.size, threads=args.workers
        )
        calls[name, framework, OWN[framework]] = partial(epoch, framework, network, own)
        calls[name, framework, "manyview.Views"] = partial(epoch, framework, network, ours)
    return calls


def network_of(name: str, size: int, out: int) -> nn.Module:
    if name == "none":
        return nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(3 * 8 * 8, out))
    trunk: Any = backbone.create(name, image_size=size)
    return nn.Sequential(trunk, nn.Linear(trunk.num_features, out))


def page(args: Args, samples: dict[Name, list[Spent]]) -> str:
    tables = []
    for network in args.networks:
        rows = []
        for (trained, framework, source), times in samples.items():
            if trained != network:
                continue
            views = args.images // args.batch * args.batch * (1 if framework == "timm" else args.views)
            own = samples[network, framework, OWN[framework]]
            ratios = [theirs.wall / mine.wall for theirs, mine in zip(own, times)]
            low, high = interval(ratios)
            gain = "1" if times is own else f"{median(ratios):.2f} [{low:.2f}, {high:.2f}]"
            wall, core = median(time.wall for time in times), median(time.core for time in times)
            rows.append([framework, source, f"{views / wall:,.0f}", f"{1e3 * core / views:.2f}", gain])
        heads = ["framework", "fed by", "views/s", "core-ms a view", "faster by (95 %)"]
        tables += [f"Network: {network}", output.table(heads, rows, left=2)]
    env = output.environment(torch.device("cpu"), "", [])
    about = f"""`python examples/measure.py {" ".join(sys.argv[1:])}` at commit {env["commit"]}, {output.hardware(env)},
load {env["load"]:.1f}. {args.images} photos, {args.size} px, {args.views} views (timm: 1), batches of {args.batch},
{args.workers} workers or threads; medians of {args.rounds} interleaved epochs. A framework's own way is a DataLoader of PIL
images with the transforms named. Frameworks differ in their loss."""
    return output.document("# The front door", str(__doc__).partition("\n\n")[2], about, *tables)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        calls = contenders(args, Path(folder))
        for call in calls.values():
            call()  # workers and threads begin, kernels are compiled
        samples = interleaved(calls, args.rounds, partial(spent, core_clock=tree_seconds))
    text = page(args, samples)
    print(text)
    if args.out:
        _, mark, below = args.out.read_text().partition("\n## ") if args.out.exists() else ("", "", "")
        write(args.out, text + mark + below)  # what was written by hand stays


if __name__ == "__main__":
    main()
