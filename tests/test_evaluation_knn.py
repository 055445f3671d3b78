import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from manyview.evaluation import knn
from manyview.evaluation.features import zscore
from manyview.pipeline.errors import UserError


def clusters(n: int, features: int = 24, classes: int = 7, seed: int = 0, spread: float = 1.5):
    """Float64 features of overlapping classes, without ties."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, features, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    labels = torch.randint(classes, (n,), generator=generator)
    return centers[labels] + spread * torch.randn(n, features, generator=generator, dtype=torch.float64), labels


@pytest.mark.parametrize("norm", ["raw", "zscore"])
def test_euclid_invdist_is_scikit_learns(norm):
    (x, y), (q, _) = clusters(900), clusters(400, seed=1)
    if norm == "zscore":
        x, q = zscore(x, q)
    ours = knn.euclid_invdist(x, y, q, k=20, classes=7)
    theirs = KNeighborsClassifier(20, weights="distance", algorithm="brute").fit(x, y)
    assert (ours.argmax(1).numpy() == theirs.predict(q)).all()
    shares = ours / ours.sum(1, keepdim=True)
    torch.testing.assert_close(shares, torch.from_numpy(theirs.predict_proba(q)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k", knn.KS)
def test_cosine_exp_is_brute_force(k):
    (x, y), (q, _) = clusters(300), clusters(30, seed=1)
    scores = knn.cosine_exp(x, y, q, k=k, classes=7)
    for i, query in enumerate(q):
        votes = [0.0] * 7
        similarities = sorted(
            ((float(query @ row / query.norm() / row.norm()), int(label)) for row, label in zip(x, y)), reverse=True
        )
        for similarity, label in similarities[:k]:
            votes[label] += math.exp(similarity / 0.07)
        torch.testing.assert_close(scores[i], torch.tensor(votes, dtype=torch.float64), rtol=1e-9, atol=0)


def test_golden_votes(monkeypatch):
    similarities, labels = torch.tensor([[0.9, 0.8, 0.79]], dtype=torch.float64), torch.tensor([[0, 1, 1]])
    sharp = knn.vote(knn.cosine_weights(similarities), labels, 2)[0]
    monkeypatch.setattr(knn, "TEMPERATURE", 0.5)
    soft = knn.vote(knn.cosine_weights(similarities), labels, 2)[0]
    assert sharp.round().tolist() == [383518, 171586]
    assert [round(v, 2) for v in soft.tolist()] == [6.05, 9.81]


@pytest.mark.parametrize("metric", ["cosine", "euclid"])
@pytest.mark.parametrize("chunk", [1, 7, 400, None])
def test_chunks_do_not_matter(metric, chunk):
    (x, _), (q, _) = clusters(500), clusters(40, seed=1)
    values, ids = knn.neighbours(x, q, 200, metric=metric, chunk=chunk)
    expected_values, expected_ids = knn.neighbours(x, q, 200, metric=metric, chunk=40)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(values, expected_values, rtol=1e-12, atol=1e-12)


def test_float32_far_from_the_origin_keeps_the_nearest():
    """A common offset of 1000 deviations is where |q|^2 - 2qx + |x|^2 in float32 goes wrong."""
    (x, _), (q, _) = clusters(800), clusters(100, seed=1)
    near = knn.neighbours(x, q, 20, metric="euclid")[1]
    far = knn.neighbours((x + 1000).float(), (q + 1000).float(), 20, metric="euclid")[1]
    assert (near.sort(1).values == far.sort(1).values).float().mean() > 0.98


def test_a_duplicate_decides_alone():
    x = torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.0, 0.1]])
    scores = knn.euclid_invdist(x, torch.tensor([1, 0, 0]), x[:1], k=3, classes=2)
    assert scores.tolist() == [[0.0, 1.0]]


def test_affine_changes_of_a_dimension_leave_zscore_alone():
    (x, y), (q, _) = clusters(500), clusters(200, seed=1)
    scale, shift = torch.logspace(-3, 3, 24, dtype=torch.float64), 50 * torch.randn(24, dtype=torch.float64)
    plain = knn.euclid_invdist(*_with(y, *zscore(x, q)), k=20, classes=7)
    changed = knn.euclid_invdist(*_with(y, *zscore(x * scale + shift, q * scale + shift)), k=20, classes=7)
    assert torch.equal(plain.argmax(1), changed.argmax(1))
    raw = knn.euclid_invdist(x * scale, y, q * scale, k=20, classes=7)
    assert not torch.equal(plain.argmax(1), raw.argmax(1))  # the change is one that matters without it


def _with(labels, x, q):
    return x, labels, q


def test_constant_dimensions():
    (x, _), (q, _) = clusters(50), clusters(20, seed=1)
    x[:, 3], q[:, 3] = 0.1, 0.1
    for a, b in (zscore(x, q), zscore(x.float(), q.float())):
        assert a.isfinite().all() and b.isfinite().all()
        assert a[:, 3].abs().max() < 1e-6
    assert zscore(q)[0].mean(0).abs().max() < 1e-9  # of its own statistics
    assert zscore(x, q)[1].mean(0).abs().max() > 0.05


def test_permuted_labels_give_chance():
    # Wide clusters: queries that share their neighbours would not be independent draws.
    (x, y), (q, truth) = clusters(2000, classes=4, spread=8), clusters(1000, seed=1, classes=4, spread=8)
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    for scores in (knn.cosine_exp(x, y, q, k=20, classes=4), knn.euclid_invdist(x, y, q, k=20, classes=4)):
        accuracy = (scores.argmax(1) == truth).double().mean()
        assert abs(accuracy - 0.25) < 3 * math.sqrt(0.25 * 0.75 / 1000)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 40), queries=st.integers(1, 12), k=st.integers(1, 50), classes=st.integers(1, 5))
def test_any_size(n, queries, k, classes):
    """Few queries, few classes among more, k up to N and over."""
    (x, _), (q, _) = clusters(n), clusters(queries, seed=1)
    y = torch.zeros(n, dtype=torch.long)
    if k > n:
        with pytest.raises(UserError, match=f"k = {k}.*there are {n}"):
            knn.cosine_exp(x, y, q, k=k, classes=classes)
        return
    for scores in (knn.cosine_exp(x, y, q, k=k, classes=classes), knn.euclid_invdist(x, y, q, k=k, classes=classes)):
        assert scores.shape == (queries, classes)
        assert (scores.argmax(1) == 0).all()


@pytest.mark.parametrize("metric", ["cosine", "euclid"])
def test_ties_of_float32_are_ranked_exactly(metric):
    """300 rows that float32's products cannot tell apart, more than there are candidates."""
    generator = torch.Generator().manual_seed(0)
    offset = 100 * torch.ones(64)
    x = offset + 1e-3 * torch.randn(300, 64, generator=generator)
    q = offset + 1e-3 * torch.randn(5, 64, generator=generator)
    ids = knn.neighbours(x, q, 20, metric=metric)[1]
    a, b = x.double(), q.double()
    far = torch.cdist(b, a) if metric == "euclid" else -(b @ a.T) / b.norm(dim=1)[:, None] / a.norm(dim=1)
    assert torch.equal(ids, far.sort(dim=1, stable=True).indices[:, :20])
    twins = knn.neighbours(x[:1].expand(50, -1), q, 10, metric=metric)[1]
    assert torch.equal(twins, torch.arange(10).expand(5, -1))  # of equals the first


def test_ordinary_features_need_no_second_look(monkeypatch):
    """The slack of candidates is what makes the exact search rare: with none, every query would need it."""
    looks: list[int] = []
    among_all = knn._among_all
    monkeypatch.setattr(knn, "_among_all", lambda bank, q, *a: looks.append(len(q)) or among_all(bank, q, *a))
    (x, _), (q, _) = clusters(2000), clusters(300, seed=1)
    for metric in ("cosine", "euclid"):
        knn.neighbours(x.float(), q.float(), 20, metric=metric)
    assert sum(looks) < 6
