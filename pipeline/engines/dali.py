# mypy: disable-error-code="attr-defined"
"""Views by NVIDIA DALI: one graph for the GPU (nvJPEG decodes, views never touch the host) and for the CPU."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, math, pipeline_def, types

from manyview.pipeline.engines import Engine, Pending
from manyview.pipeline.engines.cpu import check_size, decoded
from manyview.pipeline.engines.pixels import finish
from manyview.pipeline.machine import cores
from manyview.pipeline.store import Corrupt, Store
from manyview.pipeline.views import VIEW, ViewParameters

HARDWARE_SHARE = 0.65  # of a batch, for the GPU's JPEG hardware: 46 % faster than DALI's default (results/cuda.md)
DEPTH = 3  # batches inside DALI at a time: one being fed, one being made, one ready


class DALIEngine(Engine):
    """An `Engine`; `seconds` has read and feed. A graph is built for each new list of sizes. Call it from one thread."""

    name, holds_all = "dali", False

    def __init__(self, store: Store, device: str | torch.device = "cpu", threads: int | None = None):
        self.store, self.device = store, torch.device(device)
        self.threads = threads or cores()
        self.decoded = 0
        self.seconds = {"read": 0.0, "feed": 0.0}
        self._readers = ThreadPoolExecutor(min(self.threads, 8), "read")
        self.fused = self.device.type != "cuda"  # DALI's own color and blur are slow on the CPU: one operator does both
        self._graphs: dict[tuple, Graph] = {}

    def submit(self, ids: np.ndarray, parameters: ViewParameters) -> Pending:
        begun = time.perf_counter()
        try:
            payloads = list(self._readers.map(self.store.read, ids.tolist()))
            self.seconds["read"] += time.perf_counter() - begun
            begun = time.perf_counter()
            if any(p.ndim != 1 for p in payloads):
                decode_one = partial(decoded, self.store)
                payloads = list(self._readers.map(decode_one, ids.tolist(), payloads, parameters.shapes()))
        except Corrupt as error:
            return Pending.failed(error)
        batch = self._start(parameters, payloads)
        self.seconds["feed"] += time.perf_counter() - begun
        self.decoded += len(ids)
        return Pending([], lambda: self._views(ids, parameters, batch))

    def _start(self, parameters: ViewParameters, payloads: list[np.ndarray]) -> Batch:
        key = (str(parameters.groups), payloads[0].ndim)
        graph = self._graphs.get(key)
        if graph is None or graph.size < len(payloads):
            if graph is not None:
                graph.close()
            make = partial(build, parameters, payloads[0].ndim, self.device.type, self.fused)
            graph = self._graphs[key] = Graph(make, len(payloads), self.device, self.threads)
        return graph.feed({**inputs(parameters, self.fused), "images": payloads})

    def _views(self, ids: np.ndarray, parameters: ViewParameters, batch: Batch) -> list[torch.Tensor]:
        """A batch that DALI's decoder refused is made from images decoded on the host, which names the culprit if there
        is one; a second time it is not an image's fault."""
        if isinstance(batch.wait(), RuntimeError):
            payloads = [
                decoded(self.store, i, self.store.read(i), of) for i, of in zip(ids.tolist(), parameters.shapes())
            ]
            batch = self._start(parameters, payloads)
        outputs = batch.wait()
        if isinstance(outputs, Exception):
            raise outputs
        *outputs, shapes = outputs
        for i, shape, told in zip(ids.tolist(), np.array(shapes.as_tensor())[:, :2].tolist(), parameters.shapes()):
            check_size(self.store, i, shape, told)
        views = [torch.from_dlpack(output.as_tensor()) for output in outputs]
        if self.fused:
            groups = [view.transpose(0, 1).contiguous() for view in views]
        else:
            groups = [torch.stack(views[part]) for part, _ in parameters.groups]
        return [group.permute(0, 1, 4, 2, 3) for group in groups]

    def close(self) -> None:
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        self._readers.shutdown(cancel_futures=True)


@dataclass(eq=False)
class Batch:
    """A batch in a graph; DALI's outputs, or why there are none, come when it is its turn."""

    graph: Graph
    outputs: tuple | RuntimeError | None = None

    def wait(self) -> Any:
        while self.outputs is None:
            self.graph.collect_oldest()
        return self.outputs


class Graph:
    """A DALI pipeline for up to `size` images and the batches in it, oldest first. `make`: a function of `pipeline_def`."""

    def __init__(self, make: Callable[..., Any], size: int, device: torch.device, threads: int):
        self.size, self.device, self.waiting = size, device, deque[Batch]()
        index = (device.index or 0) if device.type == "cuda" else None
        # Not "pipelined", because then the first run would wait for DEPTH batches: here each is scheduled as it comes.
        self.pipeline = make(
            batch_size=size, num_threads=threads, device_id=index,
            prefetch_queue_depth=DEPTH, exec_dynamic=True, exec_pipelined=False,
        )  # fmt: skip
        self.pipeline.build()

    def feed(self, arrays: dict[str, Any]) -> Batch:
        while len(self.waiting) >= DEPTH:
            self.collect_oldest()
        for name, value in arrays.items():
            self.pipeline.feed_input(name, value)
        self.pipeline.schedule_run()
        self.waiting.append(Batch(self))
        return self.waiting[-1]

    def collect_oldest(self) -> None:
        batch = self.waiting.popleft()
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        try:
            batch.outputs = self.pipeline.outputs(cuda_stream=stream)
        except RuntimeError as error:  # an image that DALI's decoder refuses costs the batch; the graph goes on
            batch.outputs = error

    def close(self) -> None:
        while self.waiting:
            self.collect_oldest()
        del self.pipeline


@pipeline_def
def images_alone(device: str) -> Any:
    """Bytes in, RGB images out, each of its own size: for engines that make views by other means."""
    return decode(device)


def inputs(p: ViewParameters, fused: bool) -> dict[str, np.ndarray]:
    """What the graph is told: arrays whose first axis is the batch."""
    start = np.stack([p.views["vflip"], p.views["flip"]], -1).astype(np.float32)
    end = 1 - start  # DALI mirrors what starts beyond its end
    result: dict[str, np.ndarray] = {}
    for v, view in enumerate(p.views):
        result |= {f"corner{v}": view["box"][:, :2], f"shape{v}": view["box"][:, 2:]}
        result |= {f"start{v}": start[v], f"end{v}": end[v]}
        if not fused:
            result |= {f"matrix{v}": view["color"][:, :, :3], f"offset{v}": view["color"][:, :, 3]}
            result |= {f"{name}{v}": view[name] for name in ("transposed", "sigma", "solarize")}
    if fused:
        for g, (part, _) in enumerate(p.groups):
            views = np.ascontiguousarray(p.views[part].swapaxes(0, 1))
            result[f"views{g}"] = views.view(np.uint8).reshape(*views.shape, VIEW.itemsize)
    return {name: np.ascontiguousarray(value) for name, value in result.items()}


@pipeline_def(enable_conditionals=True)
def build(parameters: ViewParameters, ndim: int, device: str, fused: bool) -> Any:
    """The graph: bytes or pixels in; out, uint8, (B, S, S, 3) a view, or `fused` (B, V, S, S, 3) a group; last the images'
    shapes."""
    if ndim == 1:
        images = decode(device)
    else:
        images = fn.external_source(name="images", dtype=types.UINT8, ndim=3, layout="HWC")
        images = images.gpu() if device == "cuda" else images
    outputs = []
    for g, (part, size) in enumerate(parameters.groups):
        crops = {v: _crop(images, v, size) for v in range(part.start, part.stop)}
        outputs += [_fused([*crops.values()], g)] if fused else [_finish(crop, v, size) for v, crop in crops.items()]
    return (*outputs, images.shape())


def decode(device: str) -> Any:
    """JPEG bytes, fed as `images`, to RGB with libjpeg's pixels; on the GPU by nvJPEG and its JPEG hardware, if any."""
    return fn.decoders.image(
        fn.external_source(name="images", dtype=types.UINT8, ndim=1),
        device="mixed" if device == "cuda" else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,  # done at conversion
        jpeg_fancy_upsampling=True,  # as libjpeg does; without it the least PSNR is 36 dB, and decoding twice as fast
        hw_decoder_load=HARDWARE_SHARE,
    )


def _crop(images: Any, v: int, size: int) -> Any:
    """Cut, then resize: `resize` alone, told the box, would mix in what lies outside (30 dB on small images)."""
    corner, shape = (fn.external_source(name=f"{name}{v}", dtype=types.INT32, ndim=1) for name in ("corner", "shape"))
    box = fn.slice(images, corner, shape, axes=(0, 1), normalized_anchor=False, normalized_shape=False)
    return fn.resize(
        box,
        size=(size, size),
        roi_start=_numbers(f"start{v}", 1),
        roi_end=_numbers(f"end{v}", 1),
        roi_relative=True,
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )


def _finish(crop: Any, v: int, size: int) -> Any:
    """Color, blur and solarize by DALI's operators."""
    points = fn.reshape(crop, shape=[size * size, 3], layout="")
    points = fn.coord_transform(points, M=_numbers(f"matrix{v}", 2), T=_numbers(f"offset{v}", 1), dtype=types.UINT8)
    view = fn.reshape(points, shape=[size, size, 3], layout="HWC")
    if fn.external_source(name=f"transposed{v}", dtype=types.BOOL, ndim=0):
        view = fn.transpose(view, perm=[1, 0, 2], output_layout="HWC")
    sigma = _numbers(f"sigma{v}", 0)
    if sigma > 0:
        view = fn.gaussian_blur(view, sigma=sigma)
    if fn.external_source(name=f"solarize{v}", dtype=types.BOOL, ndim=0):
        view = math.min(view, types.Constant(255, dtype=types.UINT8) - view)
    return view


def _fused(crops: list[Any], g: int) -> Any:
    """The same in one operator for the views of a group: on the CPU DALI's own cost 3 ms a view, this 0.2."""
    from nvidia.dali.plugin.numba.fn.experimental import numba_function

    return numba_function(
        fn.stack(*crops),
        fn.external_source(name=f"views{g}", dtype=types.UINT8, ndim=2),  # the bytes of (V,) of `views.VIEW`
        run_fn=_run,
        setup_fn=_shape,
        out_types=[types.UINT8],
        in_types=[types.UINT8, types.UINT8],
        outs_ndim=[4],
        ins_ndim=[4, 2],
        device="cpu",
    )


def _run(out: Any, crops: Any, views: Any) -> None:
    finish(crops, views.reshape(views.size).view(VIEW), out)


def _shape(outs: Any, ins: Any) -> None:
    for i in range(len(outs[0])):
        for axis in range(4):
            outs[0][i][axis] = ins[0][i][axis]


def _numbers(name: str, ndim: int) -> Any:
    return fn.external_source(name=name, dtype=types.FLOAT, ndim=ndim)
