"""The theory on finite augmentation graphs and in a toy model: what the objectives stand on."""

import csv
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyview.bench import theory
from manyview.model import objective

graphs = st.tuples(st.integers(3, 12), st.integers(2, 6), st.integers(0, 2**31))
quick = settings(deadline=None, max_examples=40)


def random_graph(images: int, views: int, seed: int) -> theory.Graph:
    """Every image turns into `views` random nodes, and every node is reached by some image."""
    g = torch.Generator().manual_seed(seed)
    _, nodes = torch.randint(images + views, (images, views), generator=g).unique(return_inverse=True)
    return theory.Graph(nodes, int(nodes.max()) + 1)


def functions(graph: theory.Graph, count: int, seed: int) -> torch.Tensor:
    return torch.randn(graph.n, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@quick
@given(graphs)
def test_the_kernel_is_the_one_of_augmentations(shape):
    graph = random_graph(*shape)
    rho, p = graph.marginal(), graph.transition()
    values = torch.linalg.eigvalsh(graph.kernel())
    assert values.min() > -1e-12 and abs(values.max() - 1) < 1e-12
    assert (values > 1e-10).sum() <= len(graph.nodes)
    torch.testing.assert_close(graph.kernel() @ rho.sqrt(), rho.sqrt(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(p.sum(1), torch.ones(len(p), dtype=p.dtype), rtol=1e-12, atol=0)


@quick
@given(graphs)
def test_identity_invariance_is_what_the_kernel_leaves(shape):
    """1: E|f - T f|^2 = |f|^2 - |T f|^2 = <f, (I - K) f> = half the mean squared distance of two views."""
    graph = random_graph(*shape)
    f, rho = functions(graph, 3, shape[2]), graph.marginal()
    z = f[graph.nodes]  # (images, views, 3)
    mean = z.mean(1, keepdim=True)
    direct = (z - mean).square().sum(-1).mean()
    norms = (rho @ f.square()).sum() - mean.square().sum(-1).mean()
    weighted = rho.sqrt()[:, None] * f
    quadratic = (weighted * (weighted - graph.kernel() @ weighted)).sum()
    pairs = (z[:, :, None] - z[:, None]).square().sum(-1).mean() / 2
    for other in (norms, quadratic, pairs):
        torch.testing.assert_close(direct, other, rtol=1e-10, atol=1e-10)
    views = graph.nodes.shape[1]
    ours = objective.spectral(z.transpose(0, 1), beta=0).total  # unbiased: as if views had been drawn
    torch.testing.assert_close(ours, direct * views / (views - 1), rtol=1e-10, atol=1e-10)


@quick
@given(graphs, st.integers(1, 3))
def test_identity_ky_fan(shape, dim):
    """2: no orthonormal frame has less invariance loss than the top eigenfunctions, which have sum (1 - lambda)."""
    graph = random_graph(*shape)
    dim = min(dim, graph.n - 1)
    values, top = graph.eigenfunctions(dim)
    root = graph.marginal().sqrt()[:, None]

    def loss(f):
        return (root * f).square().sum() - (graph.transition() @ f).square().sum(1).mean()

    least = (1 - values).sum()
    torch.testing.assert_close(loss(top), least, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((root * top).T @ (root * top), torch.eye(dim, dtype=top.dtype), rtol=1e-9, atol=1e-9)
    rotation = torch.linalg.qr(functions(graph, dim, shape[2])[:dim]).Q
    torch.testing.assert_close(loss(top @ rotation), least, rtol=1e-9, atol=1e-9)
    f = root * functions(graph, dim, shape[2])
    frame = torch.linalg.qr(f - root @ (root.T @ f)).Q / root  # orthonormal and without the constant
    assert loss(frame) >= least - 1e-9


@pytest.mark.parametrize(("graph", "dim"), [(theory.path_graph(48, 6), 4), (theory.path_graph(20, 3), 2), (None, 3)])
def test_minimising_spectral_finds_the_top_eigenspace(graph, dim):
    graph = graph or random_graph(14, 5, 3)
    values, true = graph.eigenfunctions(dim + 1)
    assert values[dim - 1] - values[dim] > 1e-2  # else there is no top-D space
    for seed in range(2):
        learned = theory.minimise_spectral(graph, dim, seed)
        assert theory.principal_angles(graph, learned, true[:, :dim]).max() < 1e-3
        found = theory.rotated_onto(graph, learned, true[:, :dim])
        torch.testing.assert_close(found, true[:, :dim], rtol=0, atol=1e-3)
        # Each function is shrunk to the variance that its eigenvalue says.
        z = learned[graph.nodes].flatten(0, 1)
        v = graph.nodes.shape[1]
        expected = 1 - (1 - values[:dim]) * v / (v - 1) / 2
        shrunk = torch.linalg.eigvalsh(torch.cov(z.T, correction=0)).flip(0)
        torch.testing.assert_close(shrunk, expected, rtol=1e-4, atol=1e-4)


def test_angles_see_a_wrong_space():
    graph = theory.path_graph()
    _, true = graph.eigenfunctions(5)
    assert theory.principal_angles(graph, true[:, :4], true[:, :4]).max() < 1e-7
    assert theory.principal_angles(graph, true[:, 1:5], true[:, :4]).max() > 1.5


def test_gradient_flow_fills_dimensions_with_beta_and_with_width():
    """Effective rank and decorrelation against beta and D, in order, and to 15 % of an independent program's values."""
    betas = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
    reference = {
        4: [1.65, 2.35, 3.22, 3.59, 3.59, 3.59],
        8: [2.17, 3.57, 5.02, 7.04, 6.88, 6.88],
        16: [3.14, 5.07, 7.52, 11.3, 13.9, 13.3],
        32: [4.22, 6.97, 10.6, 17.2, 23.5, 26.9],
    }
    ranks, coupling = {}, {}
    for dim, expected in reference.items():
        f = theory.gradient_flow(dim, betas)
        ranks[dim] = theory.effective_rank(f).mean(1).tolist()
        c = f.mT @ (f / torch.arange(1, 65)[:, None])
        off = c - torch.diag_embed(c.diagonal(dim1=-2, dim2=-1))
        coupling[dim] = (off.abs().sum((-2, -1)) / (dim * (dim - 1))).mean(1).tolist()
        for ours, theirs in zip(ranks[dim], expected):
            assert abs(ours - theirs) < 0.15 * theirs
        assert all(b > a * 0.96 for a, b in itertools.pairwise(ranks[dim]))  # rises with beta, then stays
        assert all(b < a + 1e-3 for a, b in itertools.pairwise(coupling[dim]))  # decorrelates with beta
    for narrow, wide in itertools.pairwise(reference):
        assert all(a < b for a, b in zip(ranks[narrow], ranks[wide]))  # rises with D


def test_effective_rank_of_known_spectra():
    assert abs(theory.effective_rank(torch.eye(7)) - 7) < 1e-5
    assert abs(theory.effective_rank(torch.ones(5, 4)) - 1) < 1e-5


def test_spread_falls_with_views_and_the_mean_stays():
    estimates = {v: theory.invariance_estimates(v, 1000) for v in (2, 4, 8, 16)}
    for x in estimates.values():
        assert abs(x.mean() - 0.9) < 3 * x.std() / math.sqrt(len(x))
    spreads = [x.std() for x in estimates.values()]
    assert spreads == sorted(spreads, reverse=True) and spreads[0] > 2 * spreads[-1]


@pytest.mark.slow
def test_command_writes_the_figure_and_redraws_it_from_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(theory, "COST_DIM", 32)
    monkeypatch.setattr(theory, "COST_BATCH", 16)
    monkeypatch.setattr(theory, "VIEWS", [2, 4])
    theory.main(["--out", str(tmp_path)])
    with (tmp_path / "theory.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {row["panel"] for row in rows} == {"rank", "spread", "eigenfunctions", "cost"}
    first = (tmp_path / "theory.png").read_bytes()
    (tmp_path / "theory.png").unlink()
    theory.main(["--out", str(tmp_path), "--redraw"])
    assert (tmp_path / "theory.png").read_bytes() == first
