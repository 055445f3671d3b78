import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from manyview.evaluation import fewshot
from manyview.pipeline.errors import UserError


def test_cifar100_sizes():
    labels = np.repeat(np.arange(100), 500)
    small, large = (fewshot.subset(labels, share, 0) for share in (0.01, 0.1))
    assert (len(small.ids), len(large.ids)) == (500, 5000)
    assert set(small.ids) < set(large.ids)
    assert (np.bincount(labels[small.ids]) == 5).all()


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 300), min_size=2, max_size=12), seed=st.integers(0, 5), unlabelled=st.integers(0, 50)
)
def test_subsets_of_any_labels(counts, seed, unlabelled):
    """Stratified to within one sample, never empty, nested, and without unlabelled samples."""
    labels = np.concatenate([np.repeat(np.arange(len(counts)), counts), np.full(unlabelled, -1)])
    np.random.default_rng(seed).shuffle(labels)
    one, ten = (fewshot.subset(labels, share, seed) for share in (0.01, 0.1))
    assert set(one.ids) <= set(ten.ids)
    for subset, share in ((one, 0.01), (ten, 0.1)):
        assert (labels[subset.ids] >= 0).all()
        found = np.bincount(labels[subset.ids], minlength=len(counts))
        for n, total in zip(found, counts):
            assert n >= 1
            assert abs(n - max(1, share * total)) <= 1
        assert subset.true_fraction == pytest.approx(len(subset.ids) / sum(counts))


def test_subset_is_seeded_written_and_needs_labels(tmp_path):
    labels = np.repeat(np.arange(5), 60)
    first, again, other = (fewshot.subset(labels, 0.1, seed) for seed in (0, 0, 1))
    assert first.sha256 == again.sha256 != other.sha256
    first.save(tmp_path / "subsets" / "s.json")
    written = json.loads((tmp_path / "subsets" / "s.json").read_text())
    assert written["ids"] == first.ids.tolist()
    assert written["sha256"] == first.sha256
    with pytest.raises(UserError, match="has none"):
        fewshot.subset(np.full(10, -1), 0.1, 0)


def test_shots_are_nested_and_balanced():
    labels = torch.tensor([0] * 30 + [1] * 30 + [2] * 3)
    chosen = [fewshot.shots(labels, n, 0) for n in fewshot.SHOTS]
    for small, large in pairwise(chosen):
        assert set(small.tolist()) <= set(large.tolist())
    assert [torch.bincount(labels[c]).tolist() for c in chosen] == [[1, 1, 1], [5, 5, 3], [10, 10, 3], [25, 25, 3]]
    assert fewshot.shots(labels, 5, 0).tolist() != fewshot.shots(labels, 5, 1).tolist()


@pytest.mark.parametrize(("n", "features"), [(30, 200), (200, 30)])
def test_ridge_is_scikit_learns(n, features):
    """Both ways to solve it, with a constant dimension."""
    generator = torch.Generator().manual_seed(0)
    x, q = (
        torch.randn(n, features, generator=generator).double(),
        torch.randn(50, features, generator=generator).double(),
    )
    x[:, 3], q[:, 3] = 2.0, 2.0
    y = torch.arange(n) % 4
    ours = fewshot.ridge(x, y, q, 4)
    scaler = StandardScaler().fit(x.numpy())
    targets = 2 * np.eye(4)[y.numpy()] - 1
    theirs = Ridge(alpha=1024).fit(scaler.transform(x.numpy()), targets).predict(scaler.transform(q.numpy()))
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-8, atol=1e-10)
