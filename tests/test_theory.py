"""The spectral objective on finite augmentation graphs, where what it must find is known (arXiv 2312.10725)."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyview.model import objective

graphs = st.tuples(st.integers(3, 12), st.integers(2, 6), st.integers(0, 2**31))
quick = settings(deadline=None, max_examples=40)


@dataclass
class Graph:
    """Images whose augmentations are nodes: row b of `nodes` (B, V) are the nodes that image b can turn into."""

    nodes: Tensor
    n: int

    def transition(self) -> Tensor:
        """p(x | x0), (B, n)."""
        images, views = self.nodes.shape
        p = torch.zeros(images, self.n, dtype=torch.float64)
        return p.scatter_add_(1, self.nodes, torch.full((images, views), 1 / views, dtype=torch.float64))

    def marginal(self) -> Tensor:
        """rho(x), (n,)."""
        return self.transition().mean(0)

    def kernel(self) -> Tensor:
        """K = T* T as the symmetric matrix sqrt(rho) k sqrt(rho), (n, n): the same eigenvalues, in 0..1."""
        p, rho = self.transition(), self.marginal()
        return p.T @ p / len(p) / torch.outer(rho, rho).sqrt()

    def eigenfunctions(self, count: int) -> tuple[Tensor, Tensor]:
        """The top eigenvalues (count,) after the constant's, and their functions (n, count), orthonormal under rho."""
        values, vectors = torch.linalg.eigh(self.kernel())
        order = values.argsort(descending=True)[1 : count + 1]
        return values[order], vectors[:, order] / self.marginal().sqrt()[:, None]


def path_graph(n: int = 48, reach: int = 6) -> Graph:
    """Images on a line, augmented into their neighbors up to `reach` away, reflected at the ends."""
    shifted = torch.arange(n)[:, None] + torch.arange(-reach, reach + 1)
    shifted = torch.where(shifted < 0, -1 - shifted, shifted)
    return Graph(torch.where(shifted >= n, 2 * n - 1 - shifted, shifted), n)


def minimise_spectral(graph: Graph, dim: int, seed: int = 0) -> Tensor:
    """A table of embeddings (n, dim) that minimises `objective.spectral` over all views of all images."""
    g = torch.Generator().manual_seed(seed)
    table = torch.randn(graph.n, dim, generator=g, dtype=torch.float64).requires_grad_()
    solver = torch.optim.LBFGS(
        [table], max_iter=5000, history_size=50, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = objective.spectral(table[graph.nodes.T]).total
        loss.backward()
        return loss

    solver.step(closure)
    return table.detach()


def principal_angles(graph: Graph, f: Tensor, g: Tensor) -> Tensor:
    """Angles (radians) between the spans of two sets of functions (n, d), under rho and after centering."""
    rho = graph.marginal()
    a, b = (torch.linalg.qr((x - rho @ x) * rho.sqrt()[:, None]).Q for x in (f, g))
    return torch.linalg.svdvals(b - a @ (a.T @ b)).clamp(max=1).asin()


def rotated_onto(graph: Graph, f: Tensor, target: Tensor) -> Tensor:
    """An orthonormal basis under rho of f's span, turned to lie as near to `target` (n, d) as it can."""
    root = graph.marginal().sqrt()[:, None]
    q = torch.linalg.qr((f - graph.marginal() @ f) * root).Q
    u, _, v = torch.linalg.svd(q.T @ (target * root))
    return q @ u @ v / root


def random_graph(images: int, views: int, seed: int) -> Graph:
    """Every image turns into `views` random nodes, and every node is reached by some image."""
    g = torch.Generator().manual_seed(seed)
    _, nodes = torch.randint(images + views, (images, views), generator=g).unique(return_inverse=True)
    return Graph(nodes, int(nodes.max()) + 1)


@quick
@given(graphs)
def test_invariance_is_half_the_distance_of_two_draws(shape):
    graph = random_graph(*shape)
    g = torch.Generator().manual_seed(shape[2])
    z = torch.randn(graph.n, 3, generator=g, dtype=torch.float64)[graph.nodes]  # (images, views, 3)
    pairs = (z[:, :, None] - z[:, None]).square().sum(-1).mean() / 2
    views = graph.nodes.shape[1]
    ours = objective.spectral(z.transpose(0, 1), beta=0).total  # unbiased: as if views had been drawn
    torch.testing.assert_close(ours, pairs * views / (views - 1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("graph", "dim"), [(path_graph(48, 6), 4), (path_graph(20, 3), 2), (None, 3)])
def test_minimising_spectral_finds_the_top_eigenspace(graph, dim):
    graph = graph or random_graph(14, 5, 3)
    values, true = graph.eigenfunctions(dim + 1)
    assert values[dim - 1] - values[dim] > 1e-2  # else there is no top-D space
    for seed in range(2):
        learned = minimise_spectral(graph, dim, seed)
        assert principal_angles(graph, learned, true[:, :dim]).max() < 1e-3
        turned = rotated_onto(graph, learned, true[:, :dim])
        torch.testing.assert_close(turned, true[:, :dim], rtol=0, atol=1e-3)
        # Each function is shrunk to the variance that its eigenvalue says.
        z = learned[graph.nodes].flatten(0, 1)
        v = graph.nodes.shape[1]
        expected = 1 - (1 - values[:dim]) * v / (v - 1) / 2
        shrunk = torch.linalg.eigvalsh(torch.cov(z.T, correction=0)).flip(0)
        torch.testing.assert_close(shrunk, expected, rtol=1e-4, atol=1e-4)


def test_angles_see_a_wrong_space():
    graph = path_graph()
    _, true = graph.eigenfunctions(5)
    assert principal_angles(graph, true[:, :4], true[:, :4]).max() < 1e-7
    assert principal_angles(graph, true[:, 1:5], true[:, :4]).max() > 1.5


def invariance_estimates(views: int, repeats: int, images: int = 8, variance: float = 0.9) -> Tensor:
    """`repeats` estimates (repeats,) of a known within-image variance, each from one batch of `images` images."""
    g = torch.Generator().manual_seed(views)
    shared = torch.randn(repeats, 1, images, 1, generator=g, dtype=torch.float64)
    noise = torch.randn(repeats, views, images, 1, generator=g, dtype=torch.float64)
    return torch.stack([objective.spectral(z, beta=0).total for z in shared + math.sqrt(variance) * noise])


def test_spread_falls_with_views_and_the_mean_stays():
    estimates = {v: invariance_estimates(v, 1000) for v in (2, 4, 8, 16)}
    for x in estimates.values():
        assert abs(x.mean() - 0.9) < 3 * x.std() / math.sqrt(len(x))
    spreads = [x.std() for x in estimates.values()]
    assert spreads == sorted(spreads, reverse=True) and spreads[0] > 2 * spreads[-1]
