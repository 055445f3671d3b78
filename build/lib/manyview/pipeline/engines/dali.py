# mypy: disable-error-code="attr-defined"
"""Views by NVIDIA DALI: one graph for the GPU (nvJPEG decodes, views never touch the host) and for the CPU."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, math, pipeline_def, types

from manyview.pipeline.engines.cpu import decoded
from manyview.pipeline.engines.pixels import finish
from manyview.pipeline.machine import cores
from manyview.pipeline.store import Corrupt, Store
from manyview.pipeline.views import Parameters

HARDWARE_SHARE = 0.65  # of a batch, for the GPU's JPEG hardware: 46 % faster than DALI's default (results/cuda.md)
DEPTH = 3  # batches inside DALI at a time: one being fed, one being made, one ready


class DALIEngine:
    """`engine(ids, parameters)` -> a group: uint8 (V, B, 3, S, S) on `device`, channels-last memory.

    Raises `store.Corrupt`. `decoded` counts images. A graph is built for each new list of sizes. Call it from one thread.
    """

    name = "dali"

    def __init__(self, store: Store, device: str | torch.device = "cpu", threads: int | None = None):
        self.store, self.device = store, torch.device(device)
        self.threads = threads or cores()
        self.decoded = 0
        self.seconds = {"read": 0.0, "feed": 0.0}
        self._readers = ThreadPoolExecutor(min(self.threads, 8), "read")
        self.fused = self.device.type != "cuda"  # DALI's own color and blur are slow on the CPU: one operator does both
        self._graphs: dict[tuple, _Graph] = {}

    def __call__(self, ids: np.ndarray, parameters: Parameters) -> list[torch.Tensor]:
        return self.submit(ids, parameters).result()

    def submit(self, ids: np.ndarray, parameters: Parameters) -> Pending:
        """Start a batch; `result()` of what is returned waits for it, `cancel()` drops it."""
        pending = Pending(self, ids, parameters)
        begun = time.perf_counter()
        try:
            payloads = list(self._readers.map(self.store.read, ids.tolist()))
        except Corrupt as error:
            pending.error = error
            return pending
        self.seconds["read"] += time.perf_counter() - begun
        begun = time.perf_counter()
        if any(p.ndim != 1 for p in payloads):
            payloads = list(self._readers.map(partial(decoded, self.store), ids.tolist(), payloads))
        self._start(pending, payloads)
        self.seconds["feed"] += time.perf_counter() - begun
        self.decoded += len(ids)
        return pending

    def _start(self, pending: Pending, payloads: list[np.ndarray]) -> None:
        key = (pending.parameters.sizes, payloads[0].ndim)
        graph = self._graphs.get(key)
        if graph is None or graph.batch < len(payloads):
            if graph is not None:
                graph.close()
            graph = _Graph(pending.parameters, payloads, self.device, self.fused, self.threads)
            self._graphs[key] = graph
        graph.feed(pending, payloads)

    def again(self, pending: Pending) -> None:
        """Make a batch that DALI's decoder refused from images decoded on the host; names the culprit if there is one."""
        payloads = [decoded(self.store, i, self.store.read(i)) for i in pending.ids.tolist()]
        self._start(pending, payloads)

    def close(self) -> None:
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        self._readers.shutdown(cancel_futures=True)


class Pending:
    """One batch under way. Its tensors come when it is their turn in the graph."""

    def __init__(self, engine: DALIEngine, ids: np.ndarray, parameters: Parameters):
        self.engine, self.ids, self.parameters = engine, ids, parameters
        self.graph: _Graph | None = None
        self.views: list[torch.Tensor] | None = None
        self.error: Exception | None = None
        self.tried = False

    def result(self) -> list[torch.Tensor]:
        if self.graph is not None:
            self.graph.collect(self)
        if isinstance(self.error, RuntimeError) and not self.tried:  # a second time it is not an image's fault
            self.error, self.graph, self.tried = None, None, True
            self.engine.again(self)
            return self.result()
        if self.error is not None:
            raise self.error
        assert self.views is not None
        return self.views

    def cancel(self) -> None:
        """Drop the batch."""
        if self.graph is not None:
            self.graph.collect(self)
        self.views = None


class _Graph:
    """A DALI pipeline and the batches in it, oldest first."""

    def __init__(
        self, parameters: Parameters, payloads: list[np.ndarray], device: torch.device, fused: bool, threads: int
    ):
        self.batch, self.device, self.fused, self.waiting = len(payloads), device, fused, deque[Pending]()
        index = (device.index or 0) if device.type == "cuda" else None
        # Not "pipelined", because then the first run would wait for DEPTH batches: here each is scheduled as it comes.
        self.pipeline = build(
            parameters, payloads[0].ndim, device.type, fused, batch_size=self.batch, num_threads=threads, device_id=index,
            prefetch_queue_depth=DEPTH, exec_dynamic=True, exec_pipelined=False,
        )  # fmt: skip
        self.pipeline.build()

    def feed(self, pending: Pending, payloads: list[np.ndarray]) -> None:
        while len(self.waiting) >= DEPTH:
            self._collect_oldest()
        for name, value in inputs(pending.parameters, self.fused).items():
            self.pipeline.feed_input(name, value)
        self.pipeline.feed_input("images", payloads)
        self.pipeline.schedule_run()
        pending.graph = self
        self.waiting.append(pending)

    def collect(self, pending: Pending) -> None:
        while pending in self.waiting:
            self._collect_oldest()

    def _collect_oldest(self) -> None:
        pending = self.waiting.popleft()
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        try:
            outputs = [torch.from_dlpack(view.as_tensor()) for view in self.pipeline.outputs(cuda_stream=stream)]
        except RuntimeError as error:  # an image that DALI's decoder refuses costs the batch; the graph goes on
            pending.error = error
            return
        if self.fused:
            outputs = [output.transpose(0, 1).contiguous() for output in outputs]
        else:
            outputs = [torch.stack(outputs[group]) for group in pending.parameters.groups]
        pending.views = [output.permute(0, 1, 4, 2, 3) for output in outputs]

    def close(self) -> None:
        while self.waiting:
            self._collect_oldest()
        del self.pipeline


def inputs(p: Parameters, fused: bool) -> dict[str, np.ndarray]:
    """What the graph is told: arrays whose first axis is the batch."""
    start, end = np.zeros((*p.flip.shape, 2), np.float32), np.ones((*p.flip.shape, 2), np.float32)
    start[..., 1], end[..., 1] = p.flip, ~p.flip  # DALI mirrors what starts beyond its end
    result: dict[str, np.ndarray] = {}
    for v in range(len(p.sizes)):
        result |= {f"corner{v}": p.box[v, :, :2], f"shape{v}": p.box[v, :, 2:]}
        result |= {f"start{v}": start[v], f"end{v}": end[v]}
        if not fused:
            result |= {f"matrix{v}": p.color[v, :, :, :3], f"offset{v}": p.color[v, :, :, 3]}
            result |= {f"sigma{v}": p.sigma[v], f"solarize{v}": p.solarize[v]}
    if fused:
        for g, group in enumerate(p.groups):
            named = {"color": p.color, "sigma": p.sigma, "solarize": p.solarize}
            result |= {f"{name}{g}": np.swapaxes(value[group], 0, 1) for name, value in named.items()}
    return {name: np.ascontiguousarray(value) for name, value in result.items()}


@pipeline_def(enable_conditionals=True)
def build(parameters: Parameters, ndim: int, device: str, fused: bool) -> Any:
    """The graph: bytes or pixels in; out, uint8, (B, S, S, 3) a view, or `fused` (B, V, S, S, 3) a group."""
    if ndim == 1:
        images = decode(device)
    else:
        images = fn.external_source(name="images", dtype=types.UINT8, ndim=3, layout="HWC")
        images = images.gpu() if device == "cuda" else images
    crops = [_crop(images, v, size) for v, size in enumerate(parameters.sizes)]
    if fused:
        return tuple(_fused(crops[group], g) for g, group in enumerate(parameters.groups))
    return tuple(_finish(crop, v, size) for v, (crop, size) in enumerate(zip(crops, parameters.sizes)))


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
        _numbers(f"color{g}", 3),
        _numbers(f"sigma{g}", 1),
        fn.external_source(name=f"solarize{g}", dtype=types.BOOL, ndim=1),
        run_fn=_run,
        setup_fn=_shape,
        out_types=[types.UINT8],
        in_types=[types.UINT8, types.FLOAT, types.FLOAT, types.BOOL],
        outs_ndim=[4],
        ins_ndim=[4, 3, 1, 1],
        device="cpu",
    )


def _run(out: Any, crops: Any, color: Any, sigma: Any, solarize: Any) -> None:
    finish(crops, color, sigma, solarize, out)


def _shape(outs: Any, ins: Any) -> None:
    for i in range(len(outs[0])):
        for axis in range(4):
            outs[0][i][axis] = ins[0][i][axis]


def _numbers(name: str, ndim: int) -> Any:
    return fn.external_source(name=name, dtype=types.FLOAT, ndim=ndim)
