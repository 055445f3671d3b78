"""The Triton kernels, played by Python where there is no GPU (see conftest), and compiled for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import pixels

from manyview.pipeline import views
from manyview.pipeline.engines import fused, reference

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(40, 60), (5, 90), (33, 32), (120, 37)]  # ragged, thin, smaller and larger than the views


def images() -> list[np.ndarray]:
    return [np.array(pixels(i, height, width)) for i, (height, width) in enumerate(SHAPES)]


def parameters(name: str, count: int, size: int, changes: dict | None = None) -> views.ViewParameters:
    heights, widths = (np.array(column) for column in zip(*SHAPES))
    ids = np.arange(len(SHAPES))
    return views.parameters(views.policy(name, count, size, changes), 3, 0 * ids, ids, heights, widths)


def render(pictures: list[torch.Tensor], strides: list[list[int]], p: views.ViewParameters) -> list[torch.Tensor]:
    """A group of views each: (V, B, 3, S, S)."""
    where = torch.tensor([[x.data_ptr(), *steps] for x, steps in zip(pictures, strides, strict=True)]).to(DEVICE)
    groups = []
    for part, size in p.groups:
        rows = torch.from_numpy(fused.table(p.views[part])).to(DEVICE)
        blurred = int((p.views["sigma"][part] > 0).sum())
        groups.append(fused.render(where, rows, size, blurred).permute(0, 1, 4, 2, 3).cpu())
    return groups


def truth(p: views.ViewParameters) -> list[torch.Tensor]:
    def views_of(row, size):
        return torch.stack([reference.render(image, view, size) for image, view in zip(images(), row, strict=True)])

    return [torch.stack([views_of(row, size) for row in p.views[part]]) for part, size in p.groups]


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((10 * torch.log10(255**2 / ((a.double() - b.double()) ** 2).mean((-1, -2, -3)).clamp_min(1e-6))).min())


@pytest.mark.parametrize(
    ("name", "count", "size", "changes"),
    [
        ("simclr", 2, 32, {"blur": 0.5}),
        ("byol", 3, 17, {"solarize": 0.5, "vflip": 0.5, "turn": 0.7}),
        ("multicrop", 4, 28, None),
        ("simclr", 1, 1, {"scale": [0.01, 0.05]}),
        ("none", 1, 40, None),
    ],
)
def test_every_view_against_the_reference(name, count, size, changes):
    p = parameters(name, count, size, changes)
    pictures = [torch.from_numpy(image).to(DEVICE) for image in images()]
    for mine, theirs in zip(render(pictures, [[3 * x.shape[1], 3, 1] for x in pictures], p), truth(p), strict=True):
        assert mine.shape == theirs.shape and psnr(mine, theirs) > 40


def test_planar_and_padded_images_give_the_same_pixels():
    p = parameters("byol", 2, 24)
    packed = [torch.from_numpy(image).to(DEVICE) for image in images()]
    (expected,) = render(packed, [[3 * x.shape[1], 3, 1] for x in packed], p)
    planar = [x.permute(2, 0, 1).contiguous() for x in packed]
    (of_planes,) = render(planar, [[x.shape[2], 1, x.shape[1] * x.shape[2]] for x in planar], p)
    wide = [torch.nn.functional.pad(x, (0, 0, 0, 7, 0, 2)).contiguous() for x in packed]
    (of_padded,) = render(wide, [[3 * x.shape[1], 3, 1] for x in wide], p)
    assert torch.equal(of_planes, expected) and torch.equal(of_padded, expected)


def test_a_box_at_the_edge_reads_nothing_beyond_it():
    """What lies around the image is 255; a filter that reached there would show it."""
    p = parameters("none", 1, 20, {"scale": [0.2, 0.5]})
    around = [torch.full((x.shape[0] + 4, x.shape[1] + 4, 3), 255, dtype=torch.uint8) for x in images()]
    inner = [x[2:-2, 2:-2] for x in around]
    for x in inner:
        x.zero_()
    (black,) = render([x.to(DEVICE) for x in inner], [[3 * x.shape[1], 3, 1] for x in around], p)
    assert int(black.max()) == 0


def test_the_number_of_blurred_views_is_what_scratch_is_for():
    p = parameters("byol", 3, 8)
    slots = fused.table(p.views).reshape(*p.views.shape, -1)[..., -1]
    blurred = p.views["sigma"] > 0
    assert sorted(slots[blurred].tolist()) == list(range(blurred.sum())) and (slots[~blurred] == -1).all()


@pytest.mark.slow
def test_the_kernels_compile_for_gpus_that_are_not_here():
    """What Python plays may still be refused by the compiler. Turing, Ampere, Hopper: ptxas comes with Triton."""
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from manyview.pipeline.engines import fused
crop = dict(images="*i64", rows="*i32", out="*u8", scratch="*u8", batch="i32", size="i32", BLOCK="constexpr")
blur = dict(rows="*i32", scratch="*u8", half="*fp32", out="*u8", batch="i32", size="i32", DOWN="constexpr", BLOCK="constexpr")
for kernel, signature, constants in [
    (fused._crop, crop, {}), (fused._blur, blur, {"DOWN": True}), (fused._blur, blur | {"out": "*fp32"}, {"DOWN": False})
]:
    source = ASTSource(kernel, signature, constexprs={"BLOCK": fused.BLOCK, **constants})
    for capability in (75, 80, 90):
        assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
"""
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
