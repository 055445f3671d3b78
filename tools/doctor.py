"""What there is on this machine, what is lost without the rest, and how to get it: `python tools/doctor.py`

Exit code 1 where something is missing without which nothing trains.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # the checkout on the path instead of this folder, whose profile.py would hide the library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

from manyview.pipeline import errors
from manyview.pipeline.machine import cores

OPTIONAL = (  # module, what is lost without it, the command
    ("nvidia.dali", "engine dali: views on the GPU", "pip install nvidia-dali-cuda130 (drivers before 580: -cuda120)"),
    ("ffcv", "check of .beton files by the stock reader", "pip install ffcv (it compiles)"),
    ("onnxruntime", "tools/export.py --to onnx", "pip install onnx onnxscript onnxruntime"),
    ("pyarrow", "tools/embed.py --to FILE.parquet", "pip install pyarrow"),
    ("s3fs", "shards in a bucket", "pip install fsspec s3fs"),
    ("ray", "conversion on many machines", "pip install ray"),
    ("submitit", "tools/submit.py: SLURM", "pip install submitit"),
    ("tensorboard", "--log tensorboard", "pip install tensorboard"),
    ("wandb", "--log wandb", "pip install wandb"),
    ("lightly", "examples/lightly_loss.py, and the bench of its losses", "pip install lightly"),
    ("pytorch_lightning", "examples/lightning_loop.py", "pip install pytorch-lightning"),
    ("accelerate", "examples/accelerate_loop.py", "pip install accelerate"),
)
JPEG_HARDWARE = {(8, 0), (9, 0), (10, 0)}  # compute capabilities: the data centre's cards that have nvJPEG's own engine
SHARED_MEMORY = 2 << 30


@dataclass
class Row:
    name: str
    good: bool
    text: str  # what there is; where it is not good also what is lost
    fix: str = ""
    needed: bool = False


def rows() -> Iterator[Row]:
    """All of it, in the order in which it is printed."""
    yield packages()
    torch_fits = fits()
    yield torch_fits
    if torch_fits.good:
        yield from gpu()
    yield processor()
    yield shared_memory()
    for name, lost, command in OPTIONAL:
        version = installed(name)
        yield Row(name, bool(version), version or f"not installed: without it no {lost}", command)


distributions = functools.cache(importlib.metadata.packages_distributions)  # slow


def installed(module: str) -> str:
    """Its version; "there" where it has none, "" where it is not installed."""
    top = module.partition(".")[0]
    if importlib.util.find_spec(top) is None or importlib.util.find_spec(module) is None:
        return ""
    names = distributions().get(top, [top])
    if module == "nvidia.dali":  # a dozen packages of CUDA's libraries share its first name
        names = [name for name in names if "dali" in name]
    try:
        return importlib.metadata.version(names[0])
    except (importlib.metadata.PackageNotFoundError, IndexError):
        return "there"


def packages() -> Row:
    python = ".".join(map(str, sys.version_info[:3]))
    try:
        wanted = [text for text in importlib.metadata.requires("manyview") or [] if "extra ==" not in text]
    except importlib.metadata.PackageNotFoundError:
        unknown = f"Python {python}; manyview is not installed, so what it needs is not known"
        return Row("packages", False, unknown, "pip install -e .")
    if wrong := [text for text in wanted if not satisfied(text)]:
        lacks = f"Python {python} lacks {', '.join(wrong)}: nothing trains"
        return Row("packages", False, lacks, f"pip install {' '.join(map(repr, wrong))}", needed=True)
    return Row("packages", True, f"Python {python}, and the {len(wanted)} packages that everything needs")


def satisfied(requirement: str) -> bool:
    """Whether a package is installed in a version that will do."""
    name = re.split(r"[<>=!~;\[ ]", requirement)[0]
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    try:
        from packaging.requirements import Requirement  # comes with matplotlib
    except ImportError:
        return True
    return Requirement(requirement).specifier.contains(version, prereleases=True)


def fits() -> Row:
    """Whether torchvision was built for this torch: of a pair that does not fit its operators are not there."""
    try:
        torch, torchvision = importlib.import_module("torch"), importlib.import_module("torchvision")
        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except Exception as error:  # by version: ImportError, RuntimeError, AttributeError, OSError
        text = " ".join(str(error).split())[:100]
        versions = f"torch {installed('torch')} and torchvision {installed('torchvision')}"
        fix = "pip install --force-reinstall torch torchvision  # both at once, so that pip chooses a pair"
        return Row("torch", False, f"{versions} do not fit: {text}", fix, needed=True)
    return Row("torch", True, f"torch {torch.__version__} and torchvision {torchvision.__version__} fit each other")


def gpu() -> Iterator[Row]:
    import torch

    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        lost = f"none: training is for small networks and images; this torch is built {built}"
        yield Row("GPU", False, lost, "an NVIDIA driver that fits torch")
        return
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        bf16 = "bf16" if about.major >= 8 else "fp16 only: with a loss scaler"
        yield Row(f"GPU {number}", about.major >= 8, f"{about.name}, {about.total_memory / 2**30:.0f} GiB, {bf16}")
        has = (about.major, about.minor) in JPEG_HARDWARE
        text = "nvJPEG decodes in hardware" if has else "no hardware decoder: the card's cores decode JPEGs"
        yield Row("JPEG engine", has, text)


def processor() -> Row:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    about = {line.split(":")[0].strip(): line.split(":")[1].strip() for line in reversed(lines) if ":" in line}
    name, flags = about.get("model name", "unknown"), about.get("flags", "").split()
    # As training/precision.py, which loads torch.
    units = [unit for unit in ("amx_bf16", "avx512_bf16") if unit in flags]
    wide = "avx512f" in flags
    text = f"{name}, {cores()} cores, {', '.join(units) or 'no bf16'}, {'AVX-512' if wide else 'no AVX-512'}"
    text += "" if units else "; bf16 is no faster than fp32 here"
    text += "" if wide else "; the views' kernels run on 256 bits"
    return Row("processor", bool(units) and wide, text)


def shared_memory() -> Row:
    shared, larger = Path("/dev/shm"), "docker run --shm-size=8g …"
    if not shared.is_dir() or not os.access(shared, os.W_OK):
        return Row("/dev/shm", False, "cannot be written: DALI and DataLoader's workers need it", larger)
    free = shutil.disk_usage(shared).free
    lost = "" if free >= SHARED_MEMORY else "; DataLoader's workers (of the bench's peers) and DALI may fail"
    return Row("/dev/shm", free >= SHARED_MEMORY, f"{free / 2**30:.1f} GiB free{lost}", larger)


def main() -> int:
    everything = list(rows())
    width = max(len(row.name) for row in everything)
    for row in everything:
        print(f"{'ok ' if row.good else 'no ' if row.needed else '-  '} {row.name:<{width}}  {row.text}")
        if row.fix and not row.good:
            print(f"    {'':<{width}}  -> {row.fix}")
    engines = ["cpu", "resident", *(["dali"] if installed("nvidia.dali") else [])]
    engines += ["fused"] if installed("triton") and any(row.name == "GPU 0" for row in everything) else []
    print(f"\nengines {', '.join(engines)}; formats webdataset and ffcv")
    return int(any(row.needed and not row.good for row in everything))


if __name__ == "__main__":
    errors.run(main)
