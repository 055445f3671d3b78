# mypy: disable-error-code="attr-defined,call-overload,list-item,arg-type"
"""The pipelines that `peers` compares, each written as its own documentation would have it.

A contender is built once for a number of views and then run: one run goes over all photos, makes V views of each as a
training loop would get them, and returns the number of views made. `CONTENDERS`, at the end, says what each can do.
"""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from manyview.bench import output
from manyview.bench.harness import synchronize
from manyview.pipeline import engines
from manyview.pipeline.codec import decode
from manyview.pipeline.convert.write import write_shards
from manyview.pipeline.loader import Loader, normalize
from manyview.pipeline.manifest import Options
from manyview.pipeline.plan import plan
from manyview.pipeline.store import Store
from manyview.pipeline.views import Group, Policy, parameters

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
UNIT = [m / 255 for m in MEAN], [d / 255 for d in STD]


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
    floats: bool = True  # normalized float32 is to come out, else uint8
    scratch: Path = Path()

    @property
    def group(self) -> Group:
        return self.policy.groups[0]

    @property
    def batches(self) -> Iterator[range]:
        for first in range(0, len(self.files), self.batch):
            yield range(first, min(first + self.batch, len(self.files)))

    @property
    def beton(self) -> Path:
        """The same photos for ffcv."""
        out = self.scratch / "beton"
        if not out.exists():
            write_shards(Options("shards", "ffcv", shard_mb=100_000), self.store.path, out, quiet=True)
        return next(out.glob("train-*.beton"))

    @property
    def tar(self) -> Path:
        """The same photos in one tar."""
        path = self.scratch / "photos.tar"
        if not path.exists():
            with tarfile.open(path, "w") as file:
                for photo in self.files:
                    file.add(photo, photo.name)
        return path


Run = Callable[[], int]
Build = Callable[[Setting], AbstractContextManager[Run]]


@contextlib.contextmanager
def ours(name: str, s: Setting) -> Iterator[Run]:
    """This project's engine behind its loader; as float32, or as the uint8 that the engine makes."""
    engine, _ = engines.create(name, s.store, s.device, threads=s.threads)
    order = plan(len(s.files), seed=0, batch=s.batch)  # of the first images
    loader = Loader(s.store, order, s.policy, engine, seed=0)

    def run() -> int:
        count = 0
        for batch in loader.batches(0, order.steps(1)):
            for group in batch.views:
                count += group.shape[0] * group.shape[1]
                if s.floats:
                    normalize(group, MEAN, STD, torch.float32)
        synchronize(torch.device(s.device))
        return count

    with contextlib.closing(engine):
        yield run


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
    """(3, H, W) uint8. By libjpeg-turbo itself: torchvision's own decoders are deprecated."""
    if path.suffix != ".jpg":
        return v2.functional.pil_to_tensor(pil(path))
    return torch.from_numpy(decode(np.fromfile(path, np.uint8))).permute(2, 0, 1)


@contextlib.contextmanager
def _dataloader(s: Setting, load: Callable, transform: Callable) -> Iterator[Run]:
    photos = Photos(s.files, load, transform, s.views)
    loader = DataLoader(photos, s.batch, num_workers=s.threads, persistent_workers=True)
    try:
        yield lambda: sum(len(view) for batch in loader for view in batch)
    finally:
        if loader._iterator is not None:
            loader._iterator._shutdown_workers()


def kernel(g: Group) -> int:
    """Taps of SimCLR's blur: a tenth of the side, 23 at 224."""
    return max(3, g.size // 10 // 2 * 2 + 1)


def transforms(g: Group, first: list[Any]) -> v2.Compose:
    """The policy in torchvision's own transforms; `first`, before the floats: what makes the image a tensor."""
    steps: list[Any] = [v2.RandomResizedCrop(g.size, g.scale, g.ratio, antialias=True), v2.RandomHorizontalFlip(g.flip)]
    if g.jitter:
        jitter = v2.ColorJitter(g.brightness, g.contrast, g.saturation, g.hue)
        steps += [v2.RandomApply([jitter], g.jitter), v2.RandomGrayscale(g.grey)]
    if max(g.blur):
        steps.append(v2.RandomApply([v2.GaussianBlur(kernel(g), g.sigma)], max(g.blur)))
    return v2.Compose([*steps, *first, v2.ToDtype(torch.float32, scale=True), v2.Normalize(*UNIT)])


def torchvision(load: Callable, first: list[Any], s: Setting) -> AbstractContextManager[Run]:
    return _dataloader(s, load, transforms(s.group, first))


def lightly(s: Setting) -> AbstractContextManager[Run]:
    from lightly.transforms.simclr_transform import SimCLRViewTransform

    g = s.group
    transform = SimCLRViewTransform(
        input_size=g.size, cj_prob=g.jitter, cj_strength=1.0, cj_bright=g.brightness, cj_contrast=g.contrast,
        cj_sat=g.saturation, cj_hue=g.hue, min_scale=g.scale[0], random_gray_scale=g.grey,
        gaussian_blur=max(g.blur), sigmas=g.sigma, hf_prob=g.flip,
    )  # fmt: skip
    return _dataloader(s, pil, transform)


@contextlib.contextmanager
def stock_dali(s: Setting) -> Iterator[Run]:
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
                out, brightness=factor(g.brightness), contrast=factor(g.contrast), saturation=factor(g.saturation),
                hue=fn.random.uniform(range=(-360 * g.hue, 360 * g.hue)),
            )  # fmt: skip
        if chance(g.grey):
            out = fn.hsv(out, saturation=0.0)
        if chance(max(g.blur)):
            out = fn.gaussian_blur(out, window_size=kernel(g), sigma=fn.random.uniform(range=g.sigma))
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

    yield lambda: sum(len(view) for batch in iterator for view in batch[0].values())


@contextlib.contextmanager
def floor(s: Setting) -> Iterator[Run]:
    """What threads and native kernels give with nothing around them: decode once, torch's exact antialiased resize,
    OpenCV's color matrix and blur of the smallest window. No shards, no checksums, no fixed order, uint8 out."""
    cv2.setNumThreads(0)
    data = [np.fromfile(f, np.uint8) for f in s.files]

    def image(i: int, views: np.ndarray, out: np.ndarray) -> None:
        pixels = torch.from_numpy(decode(data[i])).permute(2, 0, 1)
        for v, view_of in enumerate(views):
            top, left, height, width = view_of["box"].tolist()
            crop = pixels[None, :, top : top + height, left : left + width]
            view = torch.nn.functional.interpolate(crop, out.shape[1:3], mode="bilinear", antialias=True)
            flat = cv2.transform(view[0].permute(1, 2, 0).numpy(), view_of["color"])
            if (sigma := float(view_of["sigma"])) > 0:
                window = 2 * int(np.ceil(3 * sigma)) + 1
                flat = cv2.GaussianBlur(flat, (window, window), sigma)
            out[v] = flat[:, ::-1] if view_of["flip"] else flat

    def run() -> int:
        torch.set_num_threads(1)
        for rows in s.batches:
            ids = np.asarray(rows)
            views = parameters(s.policy, 0, 0 * ids, ids, sizes[ids, 0], sizes[ids, 1]).views
            out = np.empty((s.views, len(ids), s.group.size, s.group.size, 3), np.uint8)
            list(pool.map(image, rows, views.T, out.swapaxes(0, 1)))
        torch.set_num_threads(s.threads)
        return len(data) * s.views

    sizes = np.array([pil(f).size[::-1] for f in s.files])
    with ThreadPoolExecutor(s.threads) as pool:
        yield run


@contextlib.contextmanager
def ffcv(s: Setting) -> Iterator[Run]:
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
    pipelines |= {"image": None, "label": None}
    with contextlib.redirect_stderr(io.StringIO()):
        loader = FFCVLoader(str(s.beton), s.batch, num_workers=s.threads, order=OrderOption.RANDOM, os_cache=True,
                            indices=range(len(s.files)), pipelines=pipelines)  # fmt: skip

    yield lambda: sum(len(view) for batch in loader for view in batch)


@contextlib.contextmanager
def kornia(s: Setting) -> Iterator[Run]:
    """kornia works on batches of equal, decoded images: it is given 256 px float tensors, decode and resize not counted."""
    import kornia.augmentation as K

    g = s.group
    steps = [K.RandomResizedCrop((g.size, g.size), g.scale, g.ratio), K.RandomHorizontalFlip(g.flip)]
    if g.jitter:
        steps += [K.ColorJitter(g.brightness, g.contrast, g.saturation, g.hue, p=g.jitter), K.RandomGrayscale(p=g.grey)]
    if max(g.blur):
        steps.append(K.RandomGaussianBlur((kernel(g), kernel(g)), g.sigma, p=max(g.blur)))
    steps.append(K.Normalize(*(torch.tensor(x) for x in UNIT)))
    augment = K.AugmentationSequential(*steps, data_keys=["input"])
    side = min(256, *pil(s.files[0]).size)
    prepare = v2.Compose([v2.Resize(side, antialias=True), v2.CenterCrop(side)])
    images = torch.stack([prepare(tensor(f)) for f in s.files[: 2 * s.batch]]).to(s.device)

    def run() -> int:
        count = 0
        for rows in s.batches:
            part = images[[i % len(images) for i in rows]].float() / 255
            count += sum(len(augment(part)) for _ in range(s.views))
        synchronize(torch.device(s.device))
        return count

    yield run


@contextlib.contextmanager
def decode_ceiling(s: Setting) -> Iterator[Run]:
    """Our engine's decoding on the GPU, batches as close to each other, and nothing else: no pipeline with these pixels is
    faster at one view."""
    from nvidia.dali import pipeline_def

    from manyview.pipeline.engines import dali

    data = [np.fromfile(f, np.uint8) for f in s.files]

    @pipeline_def(exec_dynamic=True, exec_pipelined=False)
    def graph() -> Any:
        return dali.decode(s.device)

    pipeline = graph(batch_size=s.batch, num_threads=s.threads, device_id=0, prefetch_queue_depth=dali.DEPTH)
    pipeline.build()

    def run() -> int:
        batches = list(s.batches)
        for step, rows in enumerate(batches):
            if step >= dali.DEPTH:
                pipeline.outputs()
            pipeline.feed_input("images", [data[i] for i in rows])
            pipeline.schedule_run()
        for _ in batches[-dali.DEPTH :]:
            pipeline.outputs()
        torch.cuda.synchronize()
        return len(s.files) * s.views

    yield run


@contextlib.contextmanager
def variopinta(s: Setting) -> Iterator[Run]:
    """Its compiled pipeline in threads: decode once, a call a view, the key of which replays it. uint8, or float32 (H, W, 3)."""
    import variopinta as vp

    g = s.group
    around = lambda strength: (1 - strength, 1 + strength)  # noqa: E731
    crop = vp.RandomResizedCrop(g.size, g.size, area_range=g.scale, aspect_ratio_range=g.ratio, antialias=True)
    steps: list[Any] = [crop, vp.HorizontalFlip(p=g.flip)]
    if g.jitter:
        steps.append(vp.ColorJitter(
            brightness_range=around(g.brightness), contrast_range=around(g.contrast), saturation_range=around(g.saturation),
            hue_range=(-g.hue, g.hue), p=g.jitter,
        ))  # fmt: skip
        steps.append(vp.Grayscale(p=g.grey))
    if max(g.blur):
        steps.append(vp.GaussianBlur(kernel_size=kernel(g), sigma_range=g.sigma, p=max(g.blur)))
    if s.floats:
        steps.append(vp.Normalize(mean=UNIT[0], std=UNIT[1]))
    pipeline = vp.Pipeline(steps, seed=0).compile()
    data = [f.read_bytes() for f in s.files]
    shape, dtype = (g.size, g.size, 3), np.float32 if s.floats else np.uint8

    def image(i: int, out: np.ndarray) -> None:
        pixels = vp.decode_image(data[i])
        for v in range(s.views):
            out[v] = pipeline(pixels, key=i * s.views + v)

    def run() -> int:
        for rows in s.batches:
            out = np.empty((s.views, len(rows), *shape), dtype)
            list(pool.map(image, rows, out.swapaxes(0, 1)))
        return len(data) * s.views

    with ThreadPoolExecutor(s.threads) as pool:
        yield run


@contextlib.contextmanager
def turboloader(s: Setting) -> Iterator[Run]:
    """Its DataLoader over a tar, fused crop, flip and normalize (torchvision's ranges of the crop), one pass and so one
    decode a view: it makes one view of an image."""
    import turboloader as tl

    loaders = [
        tl.DataLoader(
            str(s.tar), batch_size=s.batch, num_workers=s.threads, image_size=s.group.size, output_format="pytorch", shuffle=True,
            transform=tl.ImageNetNormalize(), train_aug=True, hflip_prob=s.group.flip, antialias=True, seed=seed,
        )
        for seed in range(s.views)
    ]  # fmt: skip
    yield lambda: sum(len(images) for loader in loaders for images, _ in loader)


ANY, PHOTOS, TINY = ("photos", "tiny"), ("photos",), ("tiny",)  # what a contender can be given
DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")


@dataclass(frozen=True)
class Contender:
    """One row of the comparison. Ratios are of ours to peers that make the same: all of the policy or crop and flip alone
    (`plain`), normalized `floats` or uint8."""

    name: str
    build: Build
    does: str = ""  # what is special about it, for the page
    engine: str = ""  # of ours, which a peer has not
    plain: bool = False
    floats: bool = True
    images: tuple[str, ...] = ANY
    devices: tuple[str, ...] = ("cpu",)
    packages: tuple[str, ...] = ()  # one of them must be there

    def fits(self, images: str, device: str) -> bool:
        there = not self.packages or any(output.version(package) for package in self.packages)
        return images in self.images and device in self.devices and there


def _ours(engine: str, does: str, **others: Any) -> list[Contender]:
    """All of the policy, as floats and as uint8."""
    others = {"devices": ("cpu", "cuda"), **others}
    both = [Contender(f"manyview {engine}", partial(ours, engine), does, engine, **others)]
    return [*both, replace(both[0], floats=False)]


_CPU = Contender("manyview cpu", partial(ours, "cpu"), "one decode an image; the same views from the same seed", "cpu",
                 plain=True, images=PHOTOS)  # fmt: skip
_VARIOPINTA = Contender("variopinta in threads", variopinta, "one decode an image; compiled Rust; a key replays a view",
                        plain=True, images=PHOTOS, packages=("variopinta",))  # fmt: skip
CONTENDERS = [  # ours first in each kind
    *_ours("cpu", _CPU.does),
    *_ours("dali", "the same views by DALI's graph", packages=DALI),
    *_ours("fused", "the same views by two Triton kernels", devices=("cuda",)),
    *_ours("resident", "the same views from pixels that stay in memory", images=TINY),
    _CPU,
    replace(_CPU, floats=False),
    Contender("decode ceiling (nvJPEG)", decode_ceiling, images=PHOTOS, devices=("cuda",), packages=DALI),
    Contender("torchvision v2 PIL + DataLoader", partial(torchvision, pil, [v2.ToImage()]),
              "one decode an image, in worker processes"),
    Contender("torchvision v2 tensor + DataLoader", partial(torchvision, tensor, []),
              "the same on tensors, decoded by libjpeg-turbo"),
    Contender("lightly + DataLoader", lightly, "its SimCLR transform", packages=("lightly",)),
    Contender("stock DALI CPU graph", stock_dali, "one decode an image", images=PHOTOS, packages=DALI),
    replace(_VARIOPINTA, plain=False),
    _VARIOPINTA,
    replace(_VARIOPINTA, floats=False),
    Contender("stock ffcv Loader", ffcv, "a decode a view; no color, no blur", plain=True, images=PHOTOS, packages=("ffcv",)),
    Contender("TurboLoader, a pass a view", turboloader, "a decode a view; crop, flip and normalize, torchvision's ranges",
              plain=True, images=PHOTOS, packages=("turboloader",)),
    Contender("kornia (decode not counted)", kornia, "batches of decoded images", devices=("cpu", "cuda"), packages=("kornia",)),
    Contender("floor: threads, torch resize, OpenCV", floor, "one decode an image; no shards, no checksums, no fixed order",
              floats=False, images=PHOTOS),
]  # fmt: skip
