"""What the hardware could do at best, measured here, and how much of it the whole run uses."""

from __future__ import annotations

import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from manyview.bench.harness import Call, interleaved, interval, spent
from manyview.bench.workload import Setup, Workload
from manyview.pipeline import storage
from manyview.pipeline.errors import UserError
from manyview.pipeline.machine import cores
from manyview.pipeline.store import Store, training_split


def disk(setup: Setup, seconds: float = 3.0, repeats: int = 5) -> dict[str, Any]:
    """Cold reads: sequential (4 MiB at a time) and sample by sample, in turn, `repeats` times each within `seconds`.

    Before each the page cache is told to forget the shards. It keeps what is mapped, so this must come before anything maps
    them. A host's or a disk's own cache may still answer; then this is what it gives. Medians, and their intervals.
    """
    if storage.address(setup.data):
        raise UserError(f"{storage.where(setup.data)}: here a disk is measured; for a bucket: tools/profile.py bucket")
    split, share, seeds = setup.split or training_split(setup.data), seconds / repeats / 2, iter(range(repeats))
    with closing(Store(setup.data, split)) as store:
        paths = [store.path / shard["file"] for shard in store.shards]

    def samples() -> tuple[int, int, float]:
        with closing(Store(setup.data, split)) as store:
            return _samples(store, share, next(seeds))

    def cold(read: Call) -> Any:
        forget(paths)
        return read()

    taken = interleaved({"sequential": lambda: _sequential(paths, share), "random": samples}, repeats, cold)
    summary: dict[str, Any] = {"images_per_s": median(n / wall for n, _, wall in taken["random"]), "threads": cores()}
    for name, reads in taken.items():
        rates = [size / wall for _, size, wall in reads]
        summary |= {f"{name}_bytes_per_s": median(rates), f"{name}_interval": interval(rates)}
    return summary


def forget(paths: list[Path]) -> None:
    """Drop files from the page cache: what is written, and not mapped."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _sequential(paths: list[Path], seconds: float) -> tuple[int, int, float]:
    """(0, bytes, seconds) of whole files, one after the other."""
    total, begun = 0, time.perf_counter()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while time.perf_counter() - begun < seconds and (chunk := file.read(4 << 20)):
                total += len(chunk)
    return 0, total, time.perf_counter() - begun


def _samples(store: Store, seconds: float, seed: int) -> tuple[int, int, float]:
    """(images, bytes, seconds) of random samples, each once, in as many threads as cores."""
    order = np.random.default_rng(seed).permutation(len(store))
    begun, threads = time.perf_counter(), cores()

    def some(first: int) -> list[int]:
        in_time = itertools.takewhile(lambda _: time.perf_counter() - begun < seconds, order[first::threads])
        return [store.read(int(i)).nbytes for i in in_time]

    with ThreadPoolExecutor(threads) as pool:
        sizes = list(itertools.chain(*pool.map(some, range(threads))))
    return len(sizes), sum(sizes), time.perf_counter() - begun


def memory_bandwidth(size: int = 128 << 20, repeats: int = 5) -> float:
    """Bytes a second read plus written by copying arrays larger than any cache, on all cores; the best of a few."""
    n = cores()
    sources = [np.ones(size // n, np.uint8) for _ in range(n)]
    targets = [np.zeros(size // n, np.uint8) for _ in range(n)]
    with ThreadPoolExecutor(n) as pool:
        return 2 * size / min(spent(lambda: list(pool.map(np.copyto, targets, sources))).wall for _ in range(repeats))


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
    taken = [spent(decode)]
    while len(taken) < 3 or sum(one.wall for one in taken) < seconds:
        taken.append(spent(decode))
    core = median(one.core for one in taken)
    return {"pixels_per_core_s": pixels / core, "pixels_per_image": pixels / len(payloads)}


def nvjpeg(store: Store, device: torch.device) -> float:
    """Images a second that nvJPEG decodes in batches of 64."""
    from torchvision.io import decode_jpeg

    payloads = [torch.from_numpy(store.read(int(i)).copy()) for i in range(min(64, len(store)))]
    return len(payloads) / _third(lambda: decode_jpeg(payloads, device=device), device)


def host_to_device(device: torch.device, size: int = 256 << 20) -> float:
    """Bytes a second from pinned memory to the device."""
    source = torch.empty(size, dtype=torch.uint8).pin_memory()
    return size / _third(lambda: source.to(device, non_blocking=True), device)


def _third(call: Call, device: torch.device) -> float:
    """Wall seconds of the third call: the first ones load kernels."""
    return [spent(call, device).wall for _ in range(3)][-1]


def flops_per_view(work: Workload) -> float:
    """Operations (a multiply-add is two) of one view, forward and backward, counted on two rows."""
    assert work.training is not None
    total = 0.0
    for group in work.policy.groups:
        pixels = torch.randint(256, (1, 2, 3, group.size, group.size), dtype=torch.uint8, device=work.device)
        with FlopCounterMode(display=False) as counter, work.training.autocast():
            work.training.model(work.normalized([pixels])[0].flatten(0, 1)).float().square().mean().backward()
        total += group.count * counter.get_total_flops() / 2
    work.training.optimizer.zero_grad(set_to_none=True)
    return total / work.policy.views


def peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.6) -> float:
    """Operations a second of a large matrix product in the training's precision: the most this machine gives.

    On the CPU from core time, so that what other processes take does not lower it.
    """
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    taken, begun = [spent(lambda: a @ b, device)], time.perf_counter()
    while time.perf_counter() - begun < seconds:
        taken.append(spent(lambda: a @ b, device))
    return 2 * n**3 / min(one.wall if device.type == "cuda" else one.core / cores() for one in taken)


def traffic(work: Workload) -> float:
    """Bytes that must move through memory for one image, at the least: its payload, the decoded pixels written and read
    once a view's box, the views written, and each turned into fp32."""
    store = work.store
    pixels = float((store.heights.astype(np.float64) * store.widths).mean())
    decoded = 3 * pixels if store.manifest["encoding"] != "raw" else 0.0
    views = sum(g.count * (3 * pixels * sum(g.scale) / 2 + 6 * 3 * g.size**2) for g in work.policy.groups)
    return store.nbytes() / len(store) + decoded + views


def shares(of: dict[str, Any], images_per_s: float) -> list[dict[str, Any]]:
    """Every limit that was measured as the images a second that it alone would allow, and the share of it that is used."""
    cold, size = of["disk"], of["bytes_per_image"]
    jpeg = of.get("jpeg") or {}
    # name, what there is of it and its interval, unit, what an image takes of it
    limits = [
        ("disk, cold, sequential", cold["sequential_bytes_per_s"], cold.get("sequential_interval"), "B/s", size),
        ("disk, cold, sample by sample", cold["random_bytes_per_s"], cold.get("random_interval"), "B/s", size),
        ("memory", of["memory_bytes_per_s"], None, "B/s", of["traffic_per_image"]),
        ("libjpeg-turbo on all cores", jpeg.get("pixels_per_core_s", 0) * of["cores"], None, "px/s",
         jpeg.get("pixels_per_image")),
        ("nvJPEG", of.get("nvjpeg"), None, "images/s", 1.0),
        ("host to device", of.get("host_to_device_bytes_per_s"), None, "B/s", of.get("view_bytes_per_image")),
        (f"matrix product, {of.get('precision')}", of.get("peak_flops"), None, "FLOP/s", of.get("flops_per_image")),
    ]  # fmt: skip
    return [{"name": name, "limit": limit, "interval": between, "unit": unit, "per_image": per_image,
             "images_per_s": limit / per_image, "share": images_per_s * per_image / limit}
            for name, limit, between, unit, per_image in limits if limit and per_image]  # fmt: skip


def measure(work: Workload, cold: dict[str, float]) -> dict[str, Any]:
    """All limits that apply to this workload on this machine."""
    limits: dict[str, Any] = {
        "disk": cold, "cores": cores(), "memory_bytes_per_s": memory_bandwidth(), "traffic_per_image": traffic(work),
        "bytes_per_image": work.store.nbytes() / len(work.store), "jpeg": jpeg(work.store),
        "view_bytes_per_image": sum(3.0 * g.count * g.size**2 for g in work.policy.groups), "batch": work.setup.batch_size,
    }  # fmt: skip
    if work.device.type == "cuda":
        limits["host_to_device_bytes_per_s"] = host_to_device(work.device)
        if limits["jpeg"]:
            limits["nvjpeg"] = nvjpeg(work.store, work.device)
    if work.training is not None:
        dtype = work.training.dtype
        limits |= {
            "precision": str(dtype).removeprefix("torch."), "flops_per_image": flops_per_view(work) * work.policy.views,
            "peak_flops": peak_flops(work.device, dtype),
            "gradient_bytes": sum(4 * p.numel() for p in work.training.model.parameters() if p.requires_grad),
        }  # fmt: skip
    return limits
