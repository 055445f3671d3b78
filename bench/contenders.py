# mypy: disable-error-code="attr-defined,call-overload,list-item,arg-type"
"""The pipelines that `peers` compares, each written as its own documentation would have it.

A contender is built once for a number of views and then run: one run goes over all photos, makes V views of each as a
training loop would get them, and returns the number of views made.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image, decode_jpeg
from torchvision.transforms import v2

from manyview.pipeline import engines
from manyview.pipeline.loader import Loader, normalize
from manyview.pipeline.plan import plan
from manyview.pipeline.store import Store
from manyview.pipeline.views import Group, Policy, ViewParameters, parameters

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclass
class Setting:
    """What every contender is given."""

    store: Store
    files: list[Path]  # the same photos as files
    policy: Policy
    views: int
    batch: int
    threads: int
    device: str = "cpu"
    beton: Path | None = None  # the same photos for ffcv

    @property
    def group(self) -> Group:
        return self.policy.groups[0]

    @property
    def batches(self) -> Iterator[range]:
        for first in range(0, len(self.files), self.batch):
            yield range(first, min(first + self.batch, len(self.files)))


Contender = Callable[[], int]


@contextlib.contextmanager
def ours(name: str, s: Setting, normalized: bool = True) -> Iterator[Contender]:
    """This project's engine behind its loader; as float32, or as the uint8 that the engine makes."""
    engine, _ = engines.create(name, s.store, s.device, threads=s.threads)
    order = plan(len(s.files), seed=0, batch=s.batch)  # of the first images
    loader = Loader(s.store, order, s.policy, engine, seed=0)

    def run() -> int:
        made = 0
        for batch in loader.batches(0, order.steps(1)):
            for group in batch.views:
                made += group.shape[0] * group.shape[1]
                if normalized:
                    normalize(group, MEAN, STD, torch.float32)
        if s.device == "cuda":
            torch.cuda.synchronize()
        return made

    run.engine = engine
    try:
        yield run
    finally:
        engine.close()


class Photos(Dataset):
    """Files -> V views of each by `transform`, from a PIL image, a decoded tensor, or whatever `load` gives."""

    def __init__(self, files: list[Path], load: Callable[[Path], Any], transform: Callable[[Any], Any], count: int):
        self.files, self.load, self.transform, self.count = files, load, transform, count

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> list[torch.Tensor]:
        image = self.load(self.files[i])
        return [self.transform(image) for _ in range(self.count)]


def pil(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def tensor(path: Path) -> torch.Tensor:
    return decode_image(str(path), ImageReadMode.RGB)


@contextlib.contextmanager
def _dataloader(s: Setting, load: Callable, transform: Callable) -> Iterator[Contender]:
    loader = DataLoader(
        Photos(s.files, load, transform, s.views), s.batch, num_workers=s.threads, persistent_workers=True
    )

    def run() -> int:
        return sum(len(view) for batch in loader for view in batch)

    try:
        yield run
    finally:
        if loader._iterator is not None:
            loader._iterator._shutdown_workers()


def _torchvision_policy(g: Group) -> list[Any]:
    """The policy in torchvision's own transforms, up to pixels 0..255."""
    kernel = max(3, g.size // 10 // 2 * 2 + 1)  # SimCLR: a tenth of the side, 23 at 224
    steps: list[Any] = [v2.RandomResizedCrop(g.size, g.scale, g.ratio, antialias=True), v2.RandomHorizontalFlip(g.flip)]
    if g.jitter:
        jitter = v2.ColorJitter(g.brightness, g.contrast, g.saturation, g.hue)
        steps += [v2.RandomApply([jitter], g.jitter), v2.RandomGrayscale(g.grey)]
    if max(g.blur):
        steps.append(v2.RandomApply([v2.GaussianBlur(kernel, g.sigma)], max(g.blur)))
    return steps


def torchvision_pil(s: Setting) -> Any:
    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*_unit())]
    return _dataloader(s, pil, v2.Compose(_torchvision_policy(s.group) + finish))


def torchvision_tensor(s: Setting) -> Any:
    finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(*_unit())]
    return _dataloader(s, tensor, v2.Compose(_torchvision_policy(s.group) + finish))


def lightly(s: Setting) -> Any:
    from lightly.transforms.simclr_transform import SimCLRViewTransform

    g = s.group
    transform = SimCLRViewTransform(
        input_size=g.size, cj_prob=g.jitter, cj_strength=1.0, cj_bright=g.brightness, cj_contrast=g.contrast,
        cj_sat=g.saturation, cj_hue=g.hue, min_scale=g.scale[0], random_gray_scale=g.grey,
        gaussian_blur=max(g.blur), sigmas=g.sigma, hf_prob=g.flip,
    )  # fmt: skip
    return _dataloader(s, pil, transform)


def _unit() -> tuple[list[float], list[float]]:
    return [m / 255 for m in MEAN], [d / 255 for d in STD]


@contextlib.contextmanager
def stock_dali(s: Setting) -> Iterator[Contender]:
    """DALI's stock operators in the usual way: random_resized_crop, color_twist, hsv for grey, gaussian_blur of
    SimCLR's 23 taps, crop_mirror_normalize; each chance as a conditional, as in DALI's documentation."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    g = s.group

    def chance(p: float) -> Any:
        return fn.random.coin_flip(probability=p, dtype=types.BOOL)

    def factor(strength: float) -> Any:
        return fn.random.uniform(range=(1 - strength, 1 + strength))

    def one(images: Any) -> Any:
        out = fn.random_resized_crop(images, size=g.size, random_area=g.scale, random_aspect_ratio=g.ratio)
        if chance(g.jitter):
            out = fn.color_twist(
                out,
                brightness=factor(g.brightness),
                contrast=factor(g.contrast),
                saturation=factor(g.saturation),
                hue=fn.random.uniform(range=(-360 * g.hue, 360 * g.hue)),
            )
        if chance(g.grey):
            out = fn.hsv(out, saturation=0.0)
        if chance(max(g.blur)):
            out = fn.gaussian_blur(out, window_size=g.size // 10 // 2 * 2 + 1, sigma=fn.random.uniform(range=g.sigma))
        mirror = fn.random.coin_flip(probability=g.flip)
        return fn.crop_mirror_normalize(out, mirror=mirror, mean=MEAN, std=STD, dtype=types.FLOAT, output_layout="CHW")

    # Nothing ahead of time: else two batches of a short pass would be made while another contender is measured.
    @pipeline_def(
        batch_size=s.batch, num_threads=s.threads, device_id=None, enable_conditionals=True, seed=0,
        prefetch_queue_depth=1, exec_pipelined=False, exec_async=False,
    )  # fmt: skip
    def graph() -> Any:
        data, _ = fn.readers.file(files=[str(f) for f in s.files], name="reader", pad_last_batch=True)
        images = fn.decoders.image(data, output_type=types.RGB)
        return tuple(one(images) for _ in range(s.views))

    names = [f"view{v}" for v in range(s.views)]
    iterator = DALIGenericIterator(
        graph(), names, reader_name="reader", last_batch_policy=LastBatchPolicy.PARTIAL, auto_reset=True,
        prepare_first_batch=False,
    )  # fmt: skip

    def run() -> int:
        return sum(len(view) for batch in iterator for view in batch[0].values())

    yield run


@contextlib.contextmanager
def floor(s: Setting) -> Iterator[Contender]:
    """What threads and native kernels give with nothing around them: decode once, torch's exact antialiased resize,
    OpenCV's color matrix and blur of the smallest window. No shards, no checksums, no fixed order, uint8 out."""
    cv2.setNumThreads(0)
    data = [torch.from_numpy(np.fromfile(f, np.uint8)) for f in s.files]

    def image(i: int, drawn: ViewParameters, b: int, out: np.ndarray) -> None:
        pixels = decode_jpeg(data[i], mode=ImageReadMode.RGB)
        for v, view_of in enumerate(drawn.views[:, b]):
            top, left, height, width = view_of["box"].tolist()
            crop = pixels[None, :, top : top + height, left : left + width]
            view = torch.nn.functional.interpolate(crop, out.shape[2:4], mode="bilinear", antialias=True)
            flat = cv2.transform(view[0].permute(1, 2, 0).numpy(), view_of["color"])
            if (sigma := float(view_of["sigma"])) > 0:
                window = 2 * int(np.ceil(3 * sigma)) + 1
                flat = cv2.GaussianBlur(flat, (window, window), sigma)
            out[v, b] = flat[:, ::-1] if view_of["flip"] else flat

    def run() -> int:
        made = 0
        torch.set_num_threads(1)
        for rows in s.batches:
            ids = np.asarray(rows)
            drawn = parameters(s.policy, 0, 0 * ids, ids, sizes[ids, 0], sizes[ids, 1])
            out = np.empty((s.views, len(ids), s.group.size, s.group.size, 3), np.uint8)
            list(pool.map(lambda b, ids=ids, drawn=drawn, out=out: image(ids[b], drawn, b, out), range(len(ids))))
            made += out.shape[0] * out.shape[1]
        torch.set_num_threads(s.threads)
        return made

    sizes = np.array([pil(f).size[::-1] for f in s.files])
    with ThreadPoolExecutor(s.threads) as pool:
        yield run


@contextlib.contextmanager
def ffcv(s: Setting) -> Iterator[Contender]:
    """The stock ffcv Loader with one pipeline a view; each decodes the JPEG again."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader as FFCVLoader
    from ffcv.loader import OrderOption
    from ffcv.pipeline import PipelineSpec
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage

    def spec() -> Any:
        crop = RandomResizedCropRGBImageDecoder((s.group.size, s.group.size), s.group.scale, s.group.ratio)
        flip = RandomHorizontalFlip(s.group.flip)
        return [crop, flip, NormalizeImage(np.array(MEAN), np.array(STD), np.float32), ToTensor(), ToTorchImage()]

    pipelines: dict[str, Any] = {f"view{v}": PipelineSpec("image", transforms=spec()) for v in range(s.views)}
    with contextlib.redirect_stderr(io.StringIO()):
        loader = FFCVLoader(
            str(s.beton), s.batch, num_workers=s.threads, order=OrderOption.RANDOM, os_cache=True,
            indices=range(len(s.files)),
            pipelines=pipelines | {"image": None, "label": None},
        )  # fmt: skip

    def run() -> int:
        return sum(len(view) for batch in loader for view in batch)

    yield run


@contextlib.contextmanager
def kornia(s: Setting) -> Iterator[Contender]:
    """kornia works on batches of equal, decoded images: it is given 256 px float tensors, decode and resize not counted."""
    import kornia.augmentation as K

    g = s.group
    steps = [K.RandomResizedCrop((g.size, g.size), g.scale, g.ratio), K.RandomHorizontalFlip(g.flip)]
    if g.jitter:
        steps += [K.ColorJitter(g.brightness, g.contrast, g.saturation, g.hue, p=g.jitter), K.RandomGrayscale(p=g.grey)]
    if max(g.blur):
        kernel = g.size // 10 // 2 * 2 + 1
        steps.append(K.RandomGaussianBlur((kernel, kernel), g.sigma, p=max(g.blur)))
    steps.append(K.Normalize(*(torch.tensor(x) for x in _unit())))
    augment = K.AugmentationSequential(*steps, data_keys=["input"])
    side = min(256, *pil(s.files[0]).size)
    prepare = v2.Compose([v2.Resize(side, antialias=True), v2.CenterCrop(side)])
    images = torch.stack([prepare(tensor(f)) for f in s.files[: 2 * s.batch]]).to(s.device)

    def run() -> int:
        made = 0
        for rows in s.batches:
            part = images[[i % len(images) for i in rows]].float() / 255
            made += sum(len(augment(part)) for _ in range(s.views))
        if s.device == "cuda":
            torch.cuda.synchronize()
        return made

    yield run


@contextlib.contextmanager
def decode_ceiling(s: Setting) -> Iterator[Contender]:
    """Our engine's decoding on the GPU, batches as close to each other, and nothing else: no pipeline with these pixels is
    faster at one view."""
    from nvidia.dali import pipeline_def

    from manyview.pipeline.engines.dali import DEPTH, decode

    data = [np.fromfile(f, np.uint8) for f in s.files]

    @pipeline_def(exec_dynamic=True, exec_pipelined=False)
    def graph() -> Any:
        return decode(s.device)

    pipeline = graph(batch_size=s.batch, num_threads=s.threads, device_id=0, prefetch_queue_depth=DEPTH)
    pipeline.build()

    def run() -> int:
        waiting = 0
        for rows in s.batches:
            if waiting == DEPTH:
                pipeline.outputs()
                waiting -= 1
            pipeline.feed_input("images", [data[i] for i in rows])
            pipeline.schedule_run()
            waiting += 1
        for _ in range(waiting):
            pipeline.outputs()
        torch.cuda.synchronize()
        return len(s.files) * s.views

    yield run
