from __future__ import annotations

import math
from collections import OrderedDict

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from manyview.training import optim
from manyview.training.step import Update


@given(st.integers(1, 500), st.integers(0, 100), st.floats(0, 1))
def test_schedule_warms_up_and_ends_where_it_says(steps, warmup, final):
    warmup = min(warmup, steps - 1)
    at = optim.schedule(2.0, steps, warmup, final)
    rates = [at(s) for s in range(steps)]
    assert all(0 <= r <= 2.0 + 1e-12 for r in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert math.isclose(at(warmup), 2.0)
    assert math.isclose(at(steps), 2.0 * final, abs_tol=1e-9)


def test_constant_rate():
    at = optim.schedule(1e-3, 100, 0, 1.0)
    assert {at(s) for s in range(101)} == {1e-3}


def test_rule_is_printed_with_its_numbers():
    lr, text = optim.learning_rate("lars", 0, 1024)
    assert lr == pytest.approx(1.2)
    assert "0.3" in text and "1024" in text
    assert optim.learning_rate("lars", 0.7, 1024) == (0.7, "lr 0.7 (given)")
    assert optim.learning_rate("adamw", 0, 1024)[0] == pytest.approx(2e-3)
    assert optim.learning_rate("muon", 0, 64) == (0.03, "lr 0.03 for muon, whatever the batch")


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars", "muon"])
def test_biases_and_norms_do_not_decay(name):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = optim.create(name, model, 0.1, 0.5)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters())]
    assert moved == [True, False, False, False]


@pytest.mark.parametrize(
    ("network", "exempt"),
    [
        ("vit_tiny_patch16_224", {"cls_token", "pos_embed"}),
        ("vit_small_patch14_reg4_dinov2", {"cls_token", "pos_embed", "reg_token"}),
        ("convnext_atto", set()),  # layer scales are 1-D
        ("poolformerv2_s12", set()),
        (
            "swinv2_tiny_window8_256",
            {"logit_scale", "cpb_mlp.0.weight", "cpb_mlp.2.weight"},
        ),  # in its no_weight_decay()
        ("levit_128s", {"attention_biases"}),
    ],
)
def test_tokens_positions_and_what_networks_exempt_do_not_decay(network, exempt):
    with torch.device("meta"):
        model = nn.Sequential(OrderedDict(backbone=timm.create_model(network, num_classes=0)))
    weights, others = optim.by_decay(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(weights) + len(others) == len(names)
    assert all(names[id(p)].endswith(".weight") for p in weights)
    wide = {names[id(p)] for p in others if p.ndim > 1}
    assert {next((end for end in exempt if name.endswith(end)), name) for name in wide} == exempt


def test_lars_adapts_the_rate_of_weights_and_not_of_biases():
    """You et al. 2017: a step's length is the rate times 0.001 times the weights' norm, whatever the gradient's; without
    weight decay too. Biases move by plain SGD."""
    for decay in (0.0, 1e-9):
        for scale in (1.0, 1000.0):
            layer = nn.Linear(6, 5)
            before = [p.detach().clone() for p in layer.parameters()]
            optimizer = optim.create("lars", layer, 0.5, decay)
            for p in layer.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * scale
            optimizer.step()
            weight, bias = ((a - b.detach()) for a, b in zip(before, layer.parameters()))
            assert weight.norm().item() == pytest.approx(0.5 * 0.001 * before[0].norm().item(), rel=1e-4)
            torch.testing.assert_close(bias, 0.5 * layer.bias.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars", "muon"])
def test_scaler_skips_a_non_finite_step_and_takes_the_next(name):
    model = nn.Linear(3, 2)
    optimizer = optim.create(name, model, 0.1, 0.0)
    update = Update(model, optimizer, torch.float32)
    before = model.weight.detach().clone()
    for value, moves in ((float("nan"), False), (1.0, True)):
        loss = model(torch.ones(1, 3)).sum() * value
        update.scale(loss).backward()
        assert bool(update(loss)) is not moves
        assert torch.equal(before, model.weight) is not moves
        assert update.scaler.get_scale() == 1.0 and model.weight.grad is None


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars", "muon"])
def test_a_first_step_that_is_skipped_leaves_nothing_in_the_optimizer(name):
    def weights(*losses: float) -> torch.Tensor:
        torch.manual_seed(0)
        module = nn.Linear(8, 4)
        update = Update(module, optim.create(name, module, 0.1, 0.0), torch.float32)
        for factor in losses:
            loss = module(torch.ones(2, 8)).square().sum() * factor
            update.scale(loss).backward()
            update(loss)
        return module.weight.detach()

    torch.use_deterministic_algorithms(True)  # memory that nobody has written is NaN
    try:
        assert torch.equal(weights(math.inf, 1.0, 1.0), weights(1.0, 1.0))
    finally:
        torch.use_deterministic_algorithms(False)


def test_muon_moves_a_kernel_by_an_orthogonal_matrix_and_a_norm_as_adam_does():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16))
    kernel, scale = model[0].weight.detach().clone(), model[1].weight.detach().clone()
    optimizer = optim.create("muon", model, 0.01, 0.0)
    model(torch.randn(4, 8, 6, 6)).square().mul(torch.rand(4, 16, 4, 4)).sum().backward()
    gradient = torch.linalg.svdvals(model[0].weight.grad.flatten(1))
    optimizer.step()
    moved = torch.linalg.svdvals((model[0].weight.detach() - kernel).flatten(1))
    assert (
        gradient.max() / gradient.min() > 3 * moved.max() / moved.min()
    )  # five rounds of Newton-Schulz: to a third or so
    rms = (model[0].weight.detach() - kernel).square().mean().sqrt()
    assert 0.1 < rms / 0.01 < 0.3  # AdamW's own steps have about 0.2 of the rate
    step = (model[1].weight.detach() - scale) * model[1].weight.grad.sign()
    torch.testing.assert_close(
        step, step[:1].expand(16), rtol=0.01, atol=0
    )  # as large for a small gradient as for a large
    assert step[0] < 0


def test_a_run_that_goes_on_in_fp16_starts_a_fresh_scale():
    def update(dtype: torch.dtype) -> Update:
        module = nn.Linear(2, 2)
        return Update(module, optim.create("sgd", module, 0.1, 0.0), dtype)

    def scale_after(before: torch.dtype, after: torch.dtype, drop: bool = False) -> float:
        state = update(before).state_dict()
        state["scale"] /= 4  # as after two overflows
        if drop:
            del state["half"]  # a checkpoint of an older version
        resumed = update(after)
        resumed.load_state_dict(state)
        return resumed.scale(torch.ones(())).item()

    half, brain = torch.float16, torch.bfloat16
    assert scale_after(half, half) == scale_after(half, half, drop=True) == 2.0**14
    assert scale_after(brain, half) == 2.0**16
    assert scale_after(half, brain) == scale_after(half, brain, drop=True) == 1.0
