import math

import numpy as np
import pytest
import torch

from manyview.evaluation import label_free

GOLDEN_HARMONIC = {512: 117.27, 768: 152.05, 2048: 281.81}


@pytest.mark.parametrize("k", GOLDEN_HARMONIC)
def test_rankme_golden_values(k):
    harmonic = 1 / torch.arange(1, k + 1).double()
    assert label_free.effective_rank(harmonic, 1e-7) == pytest.approx(GOLDEN_HARMONIC[k], rel=1e-3)
    one = torch.zeros(k).double()
    one[0] = 1
    assert label_free.effective_rank(one, 1e-7) == pytest.approx({512: 1.0008, 768: 1.0012, 2048: 1.0033}[k], abs=1e-4)
    assert label_free.effective_rank(one, 1e-5) == pytest.approx({512: 1.0606, 768: 1.0923, 2048: 1.2657}[k], abs=1e-4)
    wrong = {512: 5.06, 768: 5.09, 2048: 5.13}[k]  # what eigenvalues instead of singular values would give
    assert label_free.effective_rank(harmonic**2, 1e-7) == pytest.approx(wrong, abs=0.01)


def test_flat_spectrum():
    assert label_free.effective_rank(torch.ones(512), 1e-7) == pytest.approx(512.137, abs=1e-3)


def with_singular_values(values: torch.Tensor, n: int, centered: bool = False) -> torch.Tensor:
    """(n, K) float64 features of exactly these singular values (of the covariance too, if `centered`)."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(n, len(values), generator=generator, dtype=torch.float64)
    u = torch.linalg.qr(u - u.mean(0) if centered else u)[0]
    v = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    return u * values @ v.T


@pytest.mark.parametrize("n", [40, 700])
def test_rankme_of_features_is_that_of_their_singular_values(n):
    """From fewer samples than dimensions too."""
    values = 1 / torch.arange(1, min(n, 64) + 1).double()
    z = with_singular_values(values, n)
    z = torch.cat([z, torch.zeros(n, 64 - z.shape[1])], 1)
    assert label_free.rankme(z) == pytest.approx(label_free.effective_rank(torch.linalg.svdvals(z), 1e-7), rel=1e-6)
    torch.testing.assert_close(label_free.singular_values(z)[: len(values)], values, rtol=1e-6, atol=1e-9)


def test_an_offset_hides_the_rank_unless_centred():
    """The documented trap: Gaussian features with sigma_k = k^-0.5, K = 256; with + 5 everywhere rank falls to 7.8."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, 257).double() ** -0.5
    z = torch.randn(25_600, 256, generator=generator, dtype=torch.float64) * scale
    assert label_free.rankme(z) == pytest.approx(208.7, rel=0.005)
    assert label_free.rankme(z[:512]) == pytest.approx(192.2, rel=0.02)  # few samples: biased down
    assert label_free.rankme(z + 5) == pytest.approx(7.8, abs=0.1)
    assert label_free.rankme(z + 5, centered=True) == pytest.approx(208.5, rel=0.005)


@pytest.mark.parametrize("k", [50, 512, 2048])
def test_alpha_of_a_power_law(k):
    found = label_free.power_law(torch.arange(1, k + 1).double() ** -1.3)
    assert found.alpha == pytest.approx(1.3, abs=1e-9)
    assert found.r2 == pytest.approx(1)
    assert (found.first, found.last) == (11, min(k, 100))


def test_alpha_of_features_states_its_range():
    values = torch.arange(1, 65).double() ** -0.65  # eigenvalues i^-1.3
    found = label_free.power_law(label_free.eigenspectrum(with_singular_values(values, 500, centered=True)))
    assert found.alpha == pytest.approx(1.3, abs=1e-6)
    assert (found.first, found.last) == (11, 64)


def test_alpha_of_too_few_dimensions():
    spectrum = label_free.eigenspectrum(torch.ones(10, 4))
    assert math.isnan(label_free.power_law(spectrum).alpha)  # all features equal: no spectrum
    narrow = label_free.power_law(torch.tensor([1.0, 0.5, 0.25, 0.0, 0.0]))
    assert (narrow.first, narrow.last) == (1, 3)


def test_lidar_against_its_definition():
    generator = torch.Generator().manual_seed(0)
    n, q, k = 40, 5, 8
    z = torch.randn(n, 1, k, generator=generator).double() + 0.3 * torch.randn(n, q, k, generator=generator).double()
    means, mean = z.mean(1), z.mean((0, 1))
    between = sum(torch.outer(m - mean, m - mean) for m in means) / (n - 1)
    within = sum(torch.outer(z[i, j] - means[i], z[i, j] - means[i]) for i in range(n) for j in range(q)) / (
        n * (q - 1)
    )
    values, vectors = torch.linalg.eigh(within + 1e-4 * torch.eye(k))
    root = vectors @ torch.diag(values**-0.5) @ vectors.T
    p = torch.linalg.eigvalsh(root @ between @ root)
    p = p / p.sum() + 1e-8
    assert label_free.lidar(z) == pytest.approx(math.exp(-float((p * p.log()).sum())), rel=1e-6)


def test_lidar_needs_views_of_the_same_image_together():
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(3, 16, generator=generator)
    z = torch.randn(200, 1, 3, generator=generator) @ basis + 0.01 * torch.randn(200, 10, 16, generator=generator)
    assert label_free.lidar(z) < 3.1  # three directions tell the images apart
    shuffled = z.flatten(0, 1)[torch.randperm(2000, generator=generator)].view(200, 10, 16)
    assert label_free.lidar(shuffled) > 10
    with pytest.raises(ValueError, match="2 images with 2 views"):
        label_free.lidar(z[:, :1])


def test_spectrum_has_the_variances():
    z = torch.randn(300, 12, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(label_free.eigenspectrum(z), torch.linalg.eigvalsh(torch.cov(z.T)).flip(0))


def test_the_fit_is_weighted_by_one_over_rank():
    """On a spectrum that is no power law, against numpy's weighted fit."""
    ranks = np.arange(1, 201)
    values = ranks**-1.0 * np.exp(-ranks / 60)
    chosen = slice(10, 100)
    slope = np.polyfit(-np.log(ranks[chosen]), np.log(values[chosen]), 1, w=np.sqrt(1 / ranks[chosen]))[0]
    found = label_free.power_law(torch.from_numpy(values))
    assert found.alpha == pytest.approx(slope, rel=1e-9)
    assert 0.9 < found.r2 < 1
