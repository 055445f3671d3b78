"""What only a GPU can show of training; the engines' pixels there are in test_engines.py."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from conftest import command

from manyview.model import backbone, objective
from manyview.model.projector import Projector
from manyview.pipeline import engines
from manyview.pipeline.loader import Loader, normalize
from manyview.pipeline.machine import tune
from manyview.pipeline.plan import plan
from manyview.pipeline.store import Store
from manyview.pipeline.views import policy
from manyview.training import optim
from manyview.training.step import PretrainingModel, Update, backward, backward_chunked

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda", 0)
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def encoder() -> PretrainingModel:
    torch.manual_seed(0)
    trunk = backbone.create("resnet10-narrow", image_size=32)
    return PretrainingModel(trunk, Projector(trunk.num_features, 64, 64)).to(GPU, memory_format=torch.channels_last)


def views(count: int = 4, batch: int = 32) -> torch.Tensor:
    return torch.randint(256, (count, batch, 32, 32, 3), dtype=torch.uint8, device=GPU).permute(0, 1, 4, 2, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_step_on_the_gpu_never_waits_for_it(name, dtype):
    tune(GPU)
    model, mean = encoder(), [120.0, 120.0, 120.0]
    optimizer = optim.create(name, model, 1e-3, 1e-4)
    update, loss_of = Update(model, optimizer, dtype), objective.create("barlow")

    def step() -> torch.Tensor:
        groups = [normalize(made, mean, mean, torch.float32)]
        loss, _ = backward(model, groups, loss_of, update.scale, False, partial(torch.autocast, "cuda", dtype))
        return update(loss.total)

    made = views()
    for _ in range(20):
        step()  # under fp16 the first are skipped, until the scaler has found its scale
    torch.cuda.set_sync_debug_mode("error")
    try:
        skipped = [step() for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.stack(skipped).any()


@pytest.mark.parametrize("name", ["cpu", "dali", "resident"])
def test_making_views_for_the_gpu_never_waits_for_it(digits, name):
    """torch's own check does not see CUDA wait before it copies from memory that is not pinned."""
    store = Store(digits)
    engine, _ = engines.create(name, store, GPU)
    made = Loader(store, plan(len(store), seed=0, batch=256), policy("simclr", 8, 32), engine, seed=0)
    batches = made.batches(0, 10)
    for _ in range(5):
        next(batches)  # compiled, and memory taken
    torch.cuda.synchronize()
    torch.cuda._sleep(2 * 10**9)  # cycles: about a second
    for _ in range(2):
        next(batches)
    assert not torch.cuda.current_stream().query()  # it still sleeps
    torch.cuda.synchronize()
    engine.close()


def test_chunks_on_the_gpu_leave_the_gradient_of_the_whole():
    model, loss_of = encoder().double(), objective.create("barlow")
    pixels, gradients = views().double() / 255, []
    autocast = partial(torch.autocast, "cuda", enabled=False)
    for step in (partial(backward, per_view=True), partial(backward_chunked, chunk=1)):
        step(model, [pixels], objective=loss_of, scale=lambda loss: loss, autocast=autocast)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        model.zero_grad()
    whole, chunked = gradients
    assert (whole - chunked).norm() < 1e-9 * whole.norm()


@pytest.mark.parametrize("name", ["barlow", "vicreg", "spectral", "paper"])
def test_an_objective_on_the_gpu_is_fp32_under_autocast(name):
    tune(GPU)
    loss_of, z = objective.create(name), torch.randn(4, 256, 128, generator=torch.Generator().manual_seed(0))
    exact = z.double().requires_grad_()
    loss_of(exact).total.backward()
    found = z.to(GPU).requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        loss = loss_of(found).total
    loss.backward()
    assert (found.grad.cpu() - exact.grad).norm() < 1e-5 * exact.grad.norm()  # TF32 would be 3e-4 away


def test_a_run_on_the_gpu_stops_and_goes_on(digits, tmp_path):
    out = tmp_path / "run"
    words = ["train.py", "--data", digits, "--out", out, "--views", 4, "--batch-size", 64, "--size", 32, "--steps", 40]
    words += ["--backbone", "resnet10-narrow", "--log-every", 10, "--save-every", 20, "--device", "cuda"]
    first = command(*words)
    assert first.returncode == 0, first.stderr
    assert "resident: auto" in first.stdout and "bf16" in first.stdout
    for checkpoint in (out / "checkpoints").glob("*40*"):
        checkpoint.unlink()
    again = command(*words, "--resume")
    assert again.returncode == 0 and "resumed at step 20" in again.stdout, again.stderr
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [10, 20, 30, 40]
    assert (out / "backbone.safetensors").stat().st_size > 10_000
