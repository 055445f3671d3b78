"""What the hardware could do at best, measured here, and how much of it the composed run uses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from manyview.bench.host import interval, spent
from manyview.bench.workload import Setup, Workload
from manyview.pipeline import storage
from manyview.pipeline.errors import UserError
from manyview.pipeline.machine import cores
from manyview.pipeline.store import Store, training_split

ALL_REDUCE_BYTES = 64 << 20


def disk(setup: Setup, seconds: float = 3.0, repeats: int = 5) -> dict[str, Any]:
    """Cold reads: sequential (4 MiB at a time) and sample by sample, in turn, `repeats` times each within `seconds`.

    Before each the page cache is told to forget the shards. It keeps what is mapped, so this must come before anything maps
    them. A host's or a disk's own cache may still answer; then this is what it gives. Medians, and their intervals.
    """
    if storage.address(setup.data):
        raise UserError(f"{storage.where(setup.data)}: here a disk is measured; for a bucket: tools/profile.py bucket")
    store = Store(setup.data, setup.split or training_split(setup.data))
    paths = [store.path / shard["file"] for shard in store.shards]
    store.close()
    sequential, sampled, images = [], [], []
    for number in range(repeats):
        forget(paths)
        n_bytes, wall = _sequential(paths, seconds / repeats / 2)
        sequential.append(n_bytes / wall)
        forget(paths)
        store = Store(setup.data, setup.split or training_split(setup.data))
        count, payload, took = _samples(store, seconds / repeats / 2, number)
        store.close()
        sampled.append(payload / took)
        images.append(count / took)
    return {
        "sequential_bytes_per_s": median(sequential),
        "sequential_interval": interval(sequential),
        "random_bytes_per_s": median(sampled),
        "random_interval": interval(sampled),
        "images_per_s": median(images),
        "threads": cores(),
    }


def forget(paths: list[Path]) -> None:
    """Drop files from the page cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _sequential(paths: list[Path], seconds: float) -> tuple[int, float]:
    total, begun = 0, time.perf_counter()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(4 << 20):
                total += len(chunk)
                if time.perf_counter() - begun > seconds:
                    return total, time.perf_counter() - begun
    return total, max(1e-9, time.perf_counter() - begun)


def _samples(store: Store, seconds: float, seed: int = 0) -> tuple[int, int, float]:
    """(images, bytes, seconds) of random samples, each once, in as many threads as cores."""
    order = np.random.default_rng(seed).permutation(len(store))
    begun, threads = time.perf_counter(), cores()

    def some(first: int) -> tuple[int, int]:
        images, total = 0, 0
        for i in order[first::threads]:
            total += store.read(int(i)).nbytes
            images += 1
            if time.perf_counter() - begun > seconds:
                break
        return images, total

    with ThreadPoolExecutor(threads) as pool:
        done = list(pool.map(some, range(threads)))
    return sum(d[0] for d in done), sum(d[1] for d in done), time.perf_counter() - begun


def memory_bandwidth(size: int = 128 << 20, repeats: int = 5) -> float:
    """Bytes a second read plus written by copying arrays larger than any cache, on all cores; the best of a few."""
    n = cores()
    sources = [np.ones(size // n, np.uint8) for _ in range(n)]
    targets = [np.zeros(size // n, np.uint8) for _ in range(n)]
    best = 0.0
    with ThreadPoolExecutor(n) as pool:
        for _ in range(repeats):
            begun = time.perf_counter()
            list(pool.map(np.copyto, targets, sources))
            best = max(best, 2 * size / (time.perf_counter() - begun))
    return best


def jpeg(store: Store, seconds: float = 1.0) -> dict[str, float] | None:
    """Pixels a core second that libjpeg-turbo decodes, called straight from one thread on this set's own bytes.

    None where the payloads are not JPEG.
    """
    import simplejpeg

    payloads = [store.read(int(i)) for i in np.linspace(0, len(store) - 1, min(64, len(store))).astype(int)]
    if payloads[0].ndim != 1:
        return None
    decode = lambda: [simplejpeg.decode_jpeg(p, "RGB", strict=False) for p in payloads]  # noqa: E731
    pixels = sum(image.shape[0] * image.shape[1] for image in decode())
    rate = pixels / _core_seconds(decode, seconds)
    return {"pixels_per_core_s": rate, "pixels_per_image": pixels / len(payloads)}


def _core_seconds(call: Any, seconds: float) -> float:
    """Core seconds of one call, the median of several."""
    call()
    taken: list[float] = []
    begun = time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - begun < seconds:
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    return median(taken)


def nvjpeg(store: Store, device: torch.device) -> float:
    """Images a second that nvJPEG decodes in batches of 64."""
    from torchvision.io import decode_jpeg

    payloads = [torch.from_numpy(store.read(int(i)).copy()) for i in range(min(64, len(store)))]
    for _ in range(3):
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        decode_jpeg(payloads, device=device)
        torch.cuda.synchronize(device)
        wall = time.perf_counter() - begun
    return len(payloads) / wall


def host_to_device(device: torch.device, size: int = 256 << 20) -> float:
    """Bytes a second from pinned memory to the device."""
    source = torch.empty(size, dtype=torch.uint8).pin_memory()
    for _ in range(3):
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        source.to(device, non_blocking=True)
        torch.cuda.synchronize(device)
        wall = time.perf_counter() - begun
    return size / wall


def flops_per_view(work: Workload) -> float:
    """Operations (a multiply-add is two) of one view, forward and backward, counted on two rows."""
    assert work.training is not None
    with torch.no_grad():
        x = [group[:1, :1].expand(1, 2, -1, -1, -1) for group in work.training.normalized(_pixels(work))]
    total = 0.0
    for one, group in zip(x, work.policy.groups):
        with FlopCounterMode(display=False) as counter, work.training.autocast():
            work.training.plain(one.flatten(0, 1)).float().square().mean().backward()
        total += group.count * counter.get_total_flops() / 2
    work.training.optimizer.zero_grad(set_to_none=True)
    return total / work.policy.views


def _pixels(work: Workload) -> list[torch.Tensor]:
    sizes = [group.size for group in work.policy.groups]
    return [torch.randint(256, (1, 1, 3, s, s), dtype=torch.uint8, device=work.device) for s in sizes]


def peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.6) -> float:
    """Operations a second of a large matrix product in the training's precision: the most this machine gives.

    On the CPU from core time, so that what other processes take does not lower it.
    """
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < seconds:
        taken = spent(lambda: a @ b, device)
        best = min(best, taken.wall if device.type == "cuda" else taken.core / cores())
    return 2 * n**3 / best


def traffic(work: Workload) -> float:
    """Bytes that must move through memory for one image, at the least: its payload, the decoded pixels written and read
    once a view's box, the views written, and each turned into fp32."""
    store, policy = work.store, work.policy
    pixels = float((store.heights.astype(np.float64) * store.widths).mean())
    decoded = 3 * pixels if store.manifest["encoding"] != "raw" else 0.0
    total = store.nbytes() / len(store) + decoded
    for group in policy.groups:
        box = 3 * pixels * sum(group.scale) / 2
        view = 3 * group.size**2
        total += group.count * (box + view + (1 + 4) * view)
    return total


def shares(found: dict[str, Any], images_per_s: float) -> list[dict[str, Any]]:
    """Every limit as the images a second that it alone would allow, and the share of it that is used."""
    rows = []

    def row(name: str, limit: float, unit: str, per_image: float, between: Any = None) -> None:
        allowed = limit / per_image
        rows.append({"name": name, "limit": limit, "interval": between, "unit": unit, "per_image": per_image,
                     "images_per_s": allowed, "share": images_per_s / allowed})  # fmt: skip

    cold, size = found["disk"], found["bytes_per_image"]
    row("disk, cold, sequential", cold["sequential_bytes_per_s"], "B/s", size, cold.get("sequential_interval"))
    row("disk, cold, sample by sample", cold["random_bytes_per_s"], "B/s", size, cold.get("random_interval"))
    row("memory", found["memory_bytes_per_s"], "B/s", found["traffic_per_image"])
    if found.get("jpeg"):
        row("libjpeg-turbo on all cores", found["jpeg"]["pixels_per_core_s"] * found["cores"], "px/s",
            found["jpeg"]["pixels_per_image"])  # fmt: skip
    if found.get("nvjpeg"):
        row("nvJPEG", found["nvjpeg"], "images/s", 1.0)
    if found.get("host_to_device_bytes_per_s"):
        row("host to device", found["host_to_device_bytes_per_s"], "B/s", found["view_bytes_per_image"])
    if found.get("peak_flops"):
        row(f"matrix product, {found['precision']}", found["peak_flops"], "FLOP/s", found["flops_per_image"])
    if found.get("all_reduce") and found.get("gradient_bytes"):
        row(f"all-reduce ({found['all_reduce']['backend']})", found["all_reduce"]["bytes_per_s"], "B/s",
            found["gradient_bytes"] / found["batch"], found["all_reduce"].get("interval"))  # fmt: skip
    return rows


def measure(work: Workload, cold: dict[str, float], network: dict[str, Any] | None) -> dict[str, Any]:
    """All limits that apply to this workload on this machine."""
    found: dict[str, Any] = {
        "disk": cold, "cores": cores(), "memory_bytes_per_s": memory_bandwidth(), "traffic_per_image": traffic(work),
        "bytes_per_image": work.store.nbytes() / len(work.store), "jpeg": jpeg(work.store), "all_reduce": network,
        "view_bytes_per_image": sum(3.0 * g.count * g.size**2 for g in work.policy.groups), "batch": work.setup.batch_size,
    }  # fmt: skip
    if work.device.type == "cuda":
        found["host_to_device_bytes_per_s"] = host_to_device(work.device)
        if found["jpeg"]:
            found["nvjpeg"] = nvjpeg(work.store, work.device)
    if work.training is not None:
        dtype = work.training.dtype
        found["precision"] = str(dtype).removeprefix("torch.")
        found["flops_per_image"] = flops_per_view(work) * work.policy.views
        found["peak_flops"] = peak_flops(work.device, dtype)
        found["gradient_bytes"] = sum(4 * p.numel() for p in work.training.plain.parameters() if p.requires_grad)
    return found


def all_reduce(world: int = 2, n_bytes: int = ALL_REDUCE_BYTES) -> dict[str, Any]:
    """Bytes a second of gradients that `world` processes on this machine average: NCCL over its GPUs, else gloo."""
    folder = tempfile.mkdtemp()
    address = f"file://{folder}/meet"
    command = [sys.executable, "-c", _RANK, address, str(world), str(n_bytes)]
    root = str(Path(__file__).resolve().parents[1])
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(r)], stdout=subprocess.PIPE, text=True, cwd=root, env=env) for r in range(world)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    shutil.rmtree(folder)
    if any(rank.returncode for rank in ranks):
        raise RuntimeError("all-reduce between processes of this machine failed")
    backend, *seconds = outputs[0].split()
    rates = [n_bytes / float(s) for s in seconds]
    return {"bytes_per_s": median(rates), "interval": interval(rates), "samples": rates, "world": world,
            "backend": backend, "bytes": n_bytes}  # fmt: skip


_RANK = """
import sys, time, torch, torch.distributed as dist
address, world, size, rank = sys.argv[1], *map(int, sys.argv[2:])
gpu = torch.cuda.device_count() >= world
dist.init_process_group("nccl" if gpu else "gloo", init_method=address, world_size=world, rank=rank)
x = torch.ones(size // 4, device=torch.device("cuda", rank) if gpu else "cpu")
taken = []
for _ in range(13):
    dist.barrier()
    begun = time.perf_counter()
    dist.all_reduce(x)
    if gpu: torch.cuda.synchronize()
    taken.append(time.perf_counter() - begun)
if rank == 0: print("nccl" if gpu else "gloo", *taken[1:])
dist.destroy_process_group()
"""
