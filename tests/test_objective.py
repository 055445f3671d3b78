"""The objectives against the textbooks and against slow, obvious loops; all references are written here, in fp64."""

import dataclasses
import itertools
import math
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from manyview.model import objective
from manyview.model.objective import Loss
from manyview.pipeline.errors import UserError
from manyview.training import config

FORMS: dict[str, Callable[..., objective.Loss]] = {
    "barlow-mean": partial(objective.barlow, form="mean"),
    "barlow-cross": partial(objective.barlow, form="cross"),
    "barlow-pairs": partial(objective.barlow, form="pairs"),
    "barlow-pooled": partial(objective.barlow, standardize="pooled"),
    "barlow-cross-pooled": partial(objective.barlow, form="cross", standardize="pooled"),
    "vicreg": objective.vicreg,
    "vicreg-pooled": partial(objective.vicreg, form="pooled"),
    "spectral": objective.spectral,
    "paper": objective.paper,
}

quick = settings(deadline=None, max_examples=40)  # a shared machine has no deadlines
shapes = st.tuples(st.integers(2, 8), st.integers(2, 12), st.integers(1, 12), st.integers(0, 2**31))


def views(v: int, b: int, d: int, seed: int, dtype=torch.float64) -> Tensor:
    """Correlated views of different scale and shift in every dimension, (V, B, D)."""
    g = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=g, dtype=torch.float64)
    shared, noise = normal(1, b, d), normal(v, b, d)
    mixed = (shared + 0.5 * noise) @ (torch.eye(d, dtype=torch.float64) + 0.3 * normal(d, d))
    return (mixed * normal(d).exp() + normal(d)).to(dtype)


def with_gradient(f: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    value = f(z)
    return value.detach(), torch.autograd.grad(value, z)[0]


def assert_same(f: Callable[[Tensor], Tensor], g: Callable[[Tensor], Tensor], z: Tensor, tolerance=1e-10) -> None:
    """Equal in value and in gradient, relative to their size."""
    for ours, theirs in zip(with_gradient(f, z), with_gradient(g, z)):
        assert (ours - theirs).abs().max() <= tolerance * (1 + theirs.abs().max())


# ---------------------------------------------------------------------------------------------------------- references


def off_diagonal(c: Tensor) -> Tensor:
    return (c * (1 - torch.eye(len(c), dtype=c.dtype))).square().sum()


def batch_norm(z: Tensor) -> Tensor:
    return nn.functional.batch_norm(z, None, None, training=True, eps=1e-5)


def barlow_twins(a: Tensor, b: Tensor, beta: float, normalize=batch_norm) -> Tensor:
    """Zbontar et al. 2021, algorithm 1."""
    c = normalize(a).T @ normalize(b) / len(a)
    return (c.diagonal() - 1).square().sum() + beta * off_diagonal(c)


def vicreg_textbook(a: Tensor, b: Tensor, covariance_weight=1.0) -> Tensor:
    """Bardes et al. 2022, algorithm 1, with its weights 25, 25, 1."""
    n, d = a.shape
    invariance = nn.functional.mse_loss(a, b)
    variance = sum((1 - (x.var(dim=0) + 1e-4).sqrt()).clamp(min=0).mean() for x in (a, b)) / 2
    covariance = sum(off_diagonal((x - x.mean(0)).T @ (x - x.mean(0)) / (n - 1)) / d for x in (a, b))
    return 25 * invariance + 25 * variance + covariance_weight * covariance


def standardized(z: Tensor, over: str) -> list[Tensor]:
    if over == "pooled":
        return list(batch_norm(z.flatten(0, 1)).reshape(z.shape))
    return [batch_norm(x) for x in z]


def barlow_loop(z: Tensor, beta: float, form: str, over: str) -> Tensor:
    zs = standardized(z, over)
    v, n = len(zs), z.shape[1]
    on = sum(((x * (sum(zs) - x) / (v - 1)).mean(0) - 1).square().sum() for x in zs) / v
    if form == "mean":
        c = sum(a.T @ b for a in zs for b in zs) / v**2 / n
    else:
        c = sum(a.T @ b for a, b in itertools.permutations(zs, 2)) / (v * (v - 1)) / n
    return on + beta * off_diagonal(c)


def pairs_loop(z: Tensor, beta: float, over: str) -> Tensor:
    pairs = list(itertools.combinations(standardized(z, over), 2))
    return sum(barlow_twins(a, b, beta, normalize=lambda x: x) for a, b in pairs) / len(pairs)


def vicreg_loop(z: Tensor, beta: float) -> Tensor:
    """The mean over pairs of views of the two-view loss."""
    pairs = list(itertools.combinations(z, 2))
    return sum(vicreg_textbook(a, b, beta) for a, b in pairs) / len(pairs)


def paper_loop(z: Tensor, beta: float) -> Tensor:
    """The authors' multi-view loss as published: one view at a time against the mean of all."""
    rows = z.flatten(0, 1)
    z = (z - rows.mean(0)) / rows.std(0)
    mean = z.mean(0)
    n = z.shape[1]
    on = sum(((x.T @ mean / n).diagonal() - 1).square().sum() for x in z) / len(z)
    return on + beta * off_diagonal(mean.T @ mean / n)


def spectral_loop(z: Tensor, beta: float) -> Tensor:
    _, b, d = z.shape
    within = sum(z[:, i].var(dim=0).sum() for i in range(b)) / b
    cov = torch.cov(z.flatten(0, 1).T, correction=0).reshape(d, d)
    return within + beta * (cov - torch.eye(d, dtype=z.dtype)).square().sum()


# ------------------------------------------------------------------------------------------------------ textbook, V = 2


@quick
@given(shapes)
def test_two_views_are_barlow_twins(shape):
    z = views(2, *shape[1:])
    assert_same(lambda z: objective.barlow(z, beta=0.1, form="pairs").total, lambda z: barlow_twins(*z, 0.1), z)


@quick
@given(shapes)
def test_two_views_share_barlow_twins_diagonal_in_every_form(shape):
    z = views(2, *shape[1:])
    for form in ("mean", "cross", "pairs"):
        ours = partial(objective.barlow, beta=0, form=form)
        assert_same(lambda z, ours=ours: ours(z).total, lambda z: barlow_twins(*z, 0), z)


@quick
@given(shapes)
def test_two_views_cross_is_barlow_twins_symmetrised_and_mean_has_half_of_the_within_view_correlation(shape):
    def reference(z, within):
        a, b = batch_norm(z[0]), batch_norm(z[1])
        across, same = (a.T @ b + b.T @ a) / 2 / len(a), (a.T @ a + b.T @ b) / 2 / len(a)
        return barlow_twins(a, b, 0, normalize=lambda x: x) + off_diagonal(within * same + (1 - within) * across)

    z = views(2, *shape[1:])
    assert_same(lambda z: objective.barlow(z, beta=1, form="cross").total, lambda z: reference(z, 0.0), z)
    assert_same(lambda z: objective.barlow(z, beta=1, form="mean").total, lambda z: reference(z, 0.5), z)


@quick
@given(shapes)
def test_two_views_are_vicreg(shape):
    z = views(2, *shape[1:])
    assert_same(lambda z: objective.vicreg(z).total, lambda z: vicreg_textbook(*z), z)


def test_textbook_in_fp32():
    z = views(2, 64, 32, 0, torch.float32)
    exact = z.double()
    for ours, theirs in (
        (objective.barlow(z, beta=0.1, form="pairs").total, barlow_twins(*exact, 0.1)),
        (objective.vicreg(z).total, vicreg_textbook(*exact)),
    ):
        assert ours.dtype == torch.float32
        assert abs(ours.item() - theirs.item()) < 1e-5 * theirs.item()


# --------------------------------------------------------------------------------------------------- loops, V = 2 ... 8


@quick
@given(shapes, st.sampled_from(["mean", "cross"]), st.sampled_from(["view", "pooled"]))
def test_barlow_is_the_loop_over_views(shape, form, over):
    ours = partial(objective.barlow, beta=0.2, form=form, standardize=over)
    assert_same(lambda z: ours(z).total, lambda z: barlow_loop(z, 0.2, form, over), views(*shape))


@quick
@given(shapes, st.sampled_from(["view", "pooled"]))
def test_pairs_is_the_loop_over_pairs(shape, over):
    ours = partial(objective.barlow, beta=0.2, form="pairs", standardize=over)
    assert_same(lambda z: ours(z).total, lambda z: pairs_loop(z, 0.2, over), views(*shape))


@quick
@given(shapes)
def test_vicreg_is_the_loop_over_pairs(shape):
    assert_same(lambda z: objective.vicreg(z, beta=2.0).total, lambda z: vicreg_loop(z, 2.0), views(*shape), 1e-9)


@quick
@given(shapes)
def test_pooled_vicreg_has_the_covariance_of_all_rows(shape):
    def reference(z):
        rows = z.flatten(0, 1)
        cov = torch.cov(rows.T).reshape(z.shape[2], z.shape[2])
        pairs = list(itertools.combinations(z, 2))
        invariance = sum(nn.functional.mse_loss(a, b) for a, b in pairs) / len(pairs)
        variance = (1 - (rows.var(0) + 1e-4).sqrt()).clamp(min=0).mean()
        return 25 * invariance + 25 * variance + 2 * off_diagonal(cov) / z.shape[2]

    assert_same(lambda z: objective.vicreg(z, form="pooled").total, reference, views(*shape), 1e-9)


@quick
@given(shapes)
def test_paper_is_the_authors_loop(shape):
    assert_same(lambda z: objective.paper(z, beta=0.2).total, lambda z: paper_loop(z, 0.2), views(*shape), 1e-9)


@quick
@given(shapes)
def test_spectral_is_the_idealised_loss(shape):
    assert_same(lambda z: objective.spectral(z, beta=0.7).total, lambda z: spectral_loop(z, 0.7), views(*shape))


# ------------------------------------------------------------------------------------------------- identities, 1.2 (3-7)


@quick
@given(shapes)
def test_identity_pairs_of_views_cost_one_mean(shape):
    z = views(*shape)
    pairs = sum((a - b).square().sum() for a, b in itertools.combinations(z, 2))
    torch.testing.assert_close(len(z) * (z - z.mean(0)).square().sum(), pairs, rtol=1e-10, atol=1e-10)


@quick
@given(shapes)
def test_identity_leave_one_out(shape):
    z, v = views(*shape), shape[0]
    loo = torch.stack([(z.sum(0) - x) / (v - 1) for x in z])
    expected = (v / (v - 1)) ** 2 * (z - z.mean(0)).square().sum()
    torch.testing.assert_close((z - loo).square().sum(), expected, rtol=1e-10, atol=1e-10)


@quick
@given(shapes)
def test_identity_mean_mixes_within_and_cross_correlation(shape):
    z, (v, b, _, _) = torch.stack(standardized(views(*shape), "view")), shape
    mean = z.mean(0)
    c = mean.T @ mean / b
    within = sum(x.T @ x for x in z) / v / b
    cross = sum(x.T @ y for x, y in itertools.permutations(z, 2)) / (v * (v - 1)) / b
    torch.testing.assert_close(sum(x.T @ mean / b for x in z) / v, c, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(within / v + cross * (v - 1) / v, c, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(objective._cross(z, mean), cross, rtol=1e-10, atol=1e-10)


def test_more_views_estimate_the_same_thing_with_less_spread():
    """Identity 7: the mean stays within 3 standard errors of the truth, the spread falls; the 1/V one is biased."""
    g = torch.Generator().manual_seed(0)
    spreads, repeats, truth = [], 2000, 0.9
    for v in (2, 4, 8, 16):
        z = torch.randn(repeats, 1, 8, 1, generator=g, dtype=torch.float64)
        z = z + truth**0.5 * torch.randn(repeats, v, 8, 1, generator=g, dtype=torch.float64)
        estimates = torch.stack([objective._spread(x, v) for x in z])
        error = estimates.std() / repeats**0.5
        assert abs(estimates.mean() - truth) < 3 * error
        assert abs(estimates.mean() * (v - 1) / v - truth) > 3 * error  # what dividing by V would give
        spreads.append(estimates.std().item())
    assert spreads == sorted(spreads, reverse=True)


# ---------------------------------------------------------------------------------------------- no jump, no pair, no order


def population(v: int) -> Tensor:
    """Many images, so that sampling noise is small beside what is looked at."""
    g = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=g, dtype=torch.float64)
    return normal(1, 4096, 16) + 0.5 * normal(v, 4096, 16)


@pytest.mark.parametrize("name", [name for name in FORMS if name != "paper"])
def test_the_scale_does_not_jump_with_the_number_of_views(name):
    z = population(6)
    total = [FORMS[name](z[:v]).total.item() for v in range(2, 7)]
    assert max(total) < 1.08 * min(total)


def test_the_papers_own_scale_is_off_by_the_share_of_the_other_views():
    """Its residual is (V - 1) / V of the unbiased one, squared in the loss."""
    z = population(6)
    for v in range(2, 7):
        ratio = objective.paper(z[:v]).invariance / objective.barlow(z[:v], standardize="pooled").invariance
        assert abs(ratio - ((v - 1) / v) ** 2) < 0.01


@pytest.mark.parametrize("name", FORMS)
@given(shape=shapes)
@settings(deadline=None, max_examples=15)
def test_order_of_views_and_of_images_is_irrelevant(name, shape):
    z = views(*shape)
    g = torch.Generator().manual_seed(shape[3])
    shuffled = z[torch.randperm(len(z), generator=g)][:, torch.randperm(z.shape[1], generator=g)]
    torch.testing.assert_close(FORMS[name](shuffled), FORMS[name](z), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FORMS)
def test_identical_views_have_no_invariance_loss(name):
    z = views(1, 50, 6, 1).expand(4, -1, -1) * 1e3  # so large that eps is nothing
    invariance = FORMS[name](z).invariance
    assert invariance < (1e-3 if name == "paper" else 1e-8)  # the paper's unbiased deviation leaves (1/n)^2


@pytest.mark.parametrize("name", [n for n in FORMS if n.startswith(("barlow", "paper"))])
@given(shape=shapes)
@settings(deadline=None, max_examples=15)
def test_correlations_ignore_shift_and_scale(name, shape):
    v, b, d, seed = shape
    z = views(v, max(b, 3), d, seed) * 1e4
    torch.testing.assert_close(FORMS[name](7 * z - 3).total, FORMS[name](z).total, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_parts_add_up_and_only_the_total_has_a_gradient(name):
    loss = FORMS[name](views(4, 16, 8, 0).requires_grad_())
    torch.testing.assert_close(loss.invariance + loss.decorrelation, loss.total.detach(), rtol=1e-12, atol=0)
    assert loss.total.requires_grad and not loss.invariance.requires_grad and not loss.decorrelation.requires_grad
    assert all(part.ndim == 0 for part in loss)


@pytest.mark.parametrize("name", FORMS)
def test_gradient_is_the_numerical_one(name):
    z = views(3, 5, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: FORMS[name](z).total, (z,))


CONSTANT = ("barlow-mean", "barlow-pooled", "paper")


@pytest.mark.parametrize("name", [n for n in FORMS if n != "barlow-pairs"])
@pytest.mark.parametrize(("batch", "dim"), [(64, 16), (16, 64)])
def test_work_and_memory_grow_at_most_linearly_in_views(name, batch, dim):
    """Counted, not timed: the largest tensor is O(V B D + D^2), and products of D x D do not multiply."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, Tensor):
                    self.numel = max(self.numel, x.numel())
            return out

    flops = {}
    for v in (2, 4, 8, 16):
        z = views(v, batch, dim, 0).requires_grad_()
        with Largest() as largest, FlopCounterMode(display=False) as counter:
            FORMS[name](z).total.backward()
        assert largest.numel <= v * batch * dim + dim**2
        flops[v] = counter.get_total_flops()
        product = 3 * 2 * batch * dim**2  # of one view's rows, forward and backward
        assert 0 < flops[v] <= (1 if name in CONSTANT else v + 1) * product
    if name in CONSTANT:
        assert flops[16] == flops[2]
    if name == "vicreg":
        assert flops[16] == 8 * flops[2]


def test_pairs_grow_quadratically():
    """The same count sees the pairwise form for what it is."""
    from torch.utils.flop_counter import FlopCounterMode

    flops = []
    for v in (2, 8):
        with FlopCounterMode(display=False) as counter:
            objective.barlow(views(v, 64, 16, 0), form="pairs")
        flops.append(counter.get_total_flops())
    assert flops[1] > 10 * flops[0]  # 28 pairs


# --------------------------------------------------------------------------------------------------------- local views


def local_reference(z: Tensor, local: list[bool]) -> Tensor:
    zs = standardized(z, "view")
    glob = [x for x, is_local in zip(zs, local) if not is_local]
    mean = sum(glob) / len(glob)
    on = 0
    for x, is_local in zip(zs, local):
        other = mean if is_local else (sum(glob) - x) / (len(glob) - 1)
        on = on + ((x * other).mean(0) - 1).square().sum() / len(zs)
    return on + 0.3 * off_diagonal(mean.T @ mean / z.shape[1])


@quick
@given(st.data(), shapes)
def test_local_views_are_pulled_to_the_global_mean(data, shape):
    v, b, d, seed = shape
    local = data.draw(st.permutations([False] * 2 + [True] * v))
    z = views(v + 2, b, d, seed)
    assert_same(
        lambda z: objective.barlow(z, beta=0.3, local=local).total, lambda z: local_reference(z, local), z, 1e-9
    )
    torch.testing.assert_close(
        objective.barlow(z, beta=0.3, local=torch.tensor(local)), objective.barlow(z, beta=0.3, local=local)
    )


@pytest.mark.parametrize("name", FORMS)
def test_local_views_enter_the_invariance_only(name):
    z = views(5, 12, 6, 0)
    local = [False, True, False, True, True]
    with_locals, without = FORMS[name](z, local=local), FORMS[name](z[[0, 2]])
    if name not in ("barlow-pooled", "barlow-cross-pooled", "paper"):  # pooled statistics know every view
        torch.testing.assert_close(with_locals.decorrelation, without.decorrelation)
    moved = z.clone()
    moved[1] += torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    assert FORMS[name](moved, local=local).invariance != with_locals.invariance
    assert FORMS[name](z, local=[False] * 5) == FORMS[name](z)


def test_local_views_of_the_same_distribution_leave_the_spread_unbiased():
    g = torch.Generator().manual_seed(0)
    shared = torch.randn(1, 20000, 1, generator=g, dtype=torch.float64)
    z = shared + torch.randn(6, 20000, 1, generator=g, dtype=torch.float64)
    for n_global in (2, 3, 5):
        assert abs(objective._spread(z, n_global) - 1) < 0.03


# ---------------------------------------------------------------------------------------------------- hard and bad input


HARD = {
    "dead dimensions": lambda: torch.cat([torch.randn(4, 16, 6), torch.full((4, 16, 2), 0.7)], dim=2),
    "batch of two": lambda: torch.randn(4, 2, 8),
    "constant": lambda: torch.full((4, 16, 8), 3.1),
    "zero": lambda: torch.zeros(4, 16, 8),
    "huge constant": lambda: torch.full((2, 7, 8), 6e4),
    "tiny": lambda: torch.randn(4, 16, 8) * 1e-12,
    "fp16 range": lambda: (torch.randn(4, 256, 8) * 3e4).clamp(-6.5e4, 6.5e4).half(),
    "bf16": lambda: torch.randn(4, 16, 8).bfloat16() * 1e4,
    "equal views": lambda: torch.randn(1, 16, 8).expand(4, -1, -1),
    "one dimension": lambda: torch.randn(4, 16, 1),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("case", HARD)
def test_finite_with_finite_gradient(name, case):
    torch.manual_seed(0)
    z = HARD[case]().requires_grad_()
    loss = FORMS[name](z)
    loss.total.backward()
    assert loss.total.dtype == torch.float32 and all(part.isfinite() for part in loss)
    if case not in ("fp16 range", "bf16"):  # the gradient is cast back to z's own dtype on its way out
        assert z.grad.isfinite().all()
    z32 = z.detach().float().requires_grad_()
    FORMS[name](z32).total.backward()
    assert z32.grad.isfinite().all()


@pytest.mark.parametrize("name", FORMS)
def test_autocast_outside_changes_nothing(name):
    z = views(4, 32, 16, 0, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = FORMS[name](z)
    assert inside == FORMS[name](z)


def test_beta_auto_is_three_over_dim_and_the_collapse_edge_warns():
    z = views(2, 16, 64, 0)
    assert objective.barlow(z) == objective.barlow(z, beta=3 / 64)
    assert objective.paper(z) == objective.paper(z, beta=3 / 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective.barlow(z, beta=25 / 64)  # the authors' runs still train well here
    for f in (objective.barlow, objective.paper):
        with pytest.warns(UserWarning, match=r"beta \* D = 102 .*collapse.*0\.0469") as told:
            f(z, beta=102 / 64)
        assert told[0].filename == __file__  # where it is called, not in here
    with pytest.raises(UserError, match="no option 'local'"):
        objective.create("barlow", local=[True, False])


@pytest.mark.parametrize("name", objective.OBJECTIVES)
@pytest.mark.parametrize(
    "options", [{"form": "mena"}, {"beta": -1.0}, {"beta": float("nan")}, {"beta": "high"}, {"bta": 1}]
)
def test_an_option_that_is_none_is_refused_where_the_loss_is_called_by_itself(name, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        objective.OBJECTIVES[name](torch.randn(2, 4, 3), **options)
    assert torch.isfinite(objective.OBJECTIVES[name](torch.randn(2, 4, 3), beta=np.float32(0.5)).total)


def test_wrong_shapes_are_refused():
    for z in (torch.zeros(4, 8), torch.zeros(4, 1, 8), torch.zeros(1, 4, 8)):
        with pytest.raises(ValueError, match="views"):
            objective.barlow(z)
    with pytest.raises(ValueError, match="1 of 3"):
        objective.vicreg(torch.zeros(3, 4, 8), local=[False, True, True])
    with pytest.raises(ValueError, match="floating point"):
        objective.barlow(torch.ones(2, 4, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="marks 2"):
        objective.vicreg(torch.zeros(3, 4, 8), local=[False, True])


def test_create_binds_options_and_none_keeps_the_default():
    z = views(4, 16, 8, 0)
    assert objective.create("barlow", form="cross", beta=0.1, standardize=None)(z) == objective.barlow(
        z, form="cross", beta=0.1
    )
    local = torch.tensor([False, False, True, True])
    assert objective.create("vicreg", form="pooled")(z, local=local) == objective.vicreg(z, form="pooled", local=local)


def test_create_names_every_mistake_at_once():
    with pytest.raises(UserError, match="unknown objective 'barlo'; nearest: barlow"):
        objective.create("barlo")
    with pytest.raises(UserError) as caught:
        objective.create("vicreg", form="mean", standardize="view", beta=float("nan"))
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and all(word in str(caught.value) for word in ("'mean'", "'standardize'", "beta"))


def test_described_is_what_runs():
    z = views(4, 16, 8, 0)
    for name, options in (("barlow", {"form": "cross"}), ("vicreg", {}), ("spectral", {"beta": 0.5}), ("paper", {})):
        made = objective.create(name, **options)
        text, resolved = objective.describe(made, 8)
        assert "auto" not in text and "auto" not in resolved.values() and "warning" not in text
        assert objective.OBJECTIVES[name](z, **resolved) == made(z)
    assert objective.describe(objective.create("barlow"), 8)[0] == "beta 0.375, form mean, standardize view"
    assert "beta * D = 80 is past 50" in objective.describe(objective.create("paper", beta=10), 8)[0]
    assert "warning" not in objective.describe(objective.create("vicreg", beta=10), 8)[0]


def test_a_new_objective_is_one_function_one_entry_and_one_setting(monkeypatch):
    """All that --objective needs: a function of z with typed options, in `OBJECTIVES`; a field of Config for a flag."""

    def margin(z: Tensor, *, gap: float = 0.5, rounds: int = 1, kind: Literal["a", "b"] = "a", local=None) -> Loss:
        total = (z.square().mean() - gap * rounds).relu()
        return Loss(total, total.detach(), total.detach() * 0)

    @dataclasses.dataclass
    class Config(config.Config):
        gap: float = 0.5

    monkeypatch.setitem(objective.OBJECTIVES, "margin", margin)
    monkeypatch.setattr(config, "Config", Config)
    z = torch.full((2, 4, 3), 2.0)
    for gap, total in ((0.5, 3.5), (1, 3.0)):
        loss = objective.create("margin", **config.objective_options(Config(objective="margin", gap=gap)))
        assert loss(z).total == total and objective.describe(loss, 3)[1] == {"gap": gap, "rounds": 1, "kind": "a"}
    assert objective.create("margin", rounds=2)(z).total == 3.0
    for options, said in (
        ({"gap": "wide"}, "gap must be a number, got 'wide'"),
        ({"gap": math.nan}, "gap must be a number, got nan"),
        ({"rounds": 1.5}, "rounds must be a whole number, got 1.5"),
        ({"rounds": True}, "rounds must be a whole number, got True"),
        ({"kind": "c"}, "unknown kind of margin 'c'; valid: a, b"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            objective.create("margin", **options)
    with pytest.raises(UserError, match="objective 'barlow' has no option 'gap'"):
        objective.create("barlow", **config.objective_options(Config(gap=0.7)))
    assert objective.create("barlow", **config.objective_options(Config()))(torch.randn(2, 8, 4)).total > 0
