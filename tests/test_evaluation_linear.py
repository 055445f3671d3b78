import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from manyview.evaluation import linear
from manyview.evaluation.metrics import score
from manyview.pipeline.errors import UserError


def problem(n: int = 3000, features: int = 20, classes: int = 5, seed: int = 0, spread: float = 2.2):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, features, generator=torch.Generator().manual_seed(7))
    labels = torch.randint(classes, (n,), generator=generator)
    return centers[labels] + spread * torch.randn(n, features, generator=generator), labels


@pytest.mark.parametrize("bn", [False, True])
def test_packed_heads_train_as_torch_modules_do(bn):
    """Weights, biases, BatchNorm and its running statistics after many steps, for each of three rates."""
    x, y = problem(300, 7, 4)
    x = x - x.mean(0)  # the running mean starts at the overall mean, torch's at zero: here they are one
    rates = (0.05, 0.2, 1.0)
    heads = linear.train(x, y, 4, rates=rates, bn=bn, epochs=4, warmup=2, batch=64, seed=3)
    for h, rate in enumerate(rates):
        head = nn.Linear(7, 4)
        head.weight.data = linear.create(7, 1, 4, bn=bn, seed=3, device="cpu").weight[0].clone()
        head.bias.data.zero_()
        net = nn.Sequential(nn.BatchNorm1d(7), head) if bn else nn.Sequential(head)
        optimizer = torch.optim.SGD(net.parameters(), 1.0, momentum=0.9)
        generator = torch.Generator().manual_seed(3)
        for epoch in range(4):
            for group in optimizer.param_groups:
                group["lr"] = rate * 60 / 256 * linear.schedule(epoch, 4, 2)
            for ids in torch.randperm(300, generator=generator).tensor_split(5):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x[ids]), y[ids]).backward()
                optimizer.step()
        torch.testing.assert_close(heads.scores(x)[h], net.eval()(x).detach(), rtol=1e-4, atol=1e-5)


def test_schedule_is_the_papers():
    rates = [linear.schedule(e, 100) for e in range(100)]
    assert rates[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert rates[-1] == pytest.approx(0, abs=1e-3)
    assert sorted(rates[5:], reverse=True) == rates[5:]
    assert (linear.PAPER_RATE, linear.BATCH, linear.EPOCHS, linear.WARMUP, linear.MOMENTUM) == (0.1, 1024, 100, 5, 0.9)
    assert len(linear.RATES) >= 10


@pytest.mark.parametrize("bn", [False, True])
def test_within_a_point_of_logistic_regression(bn):
    (x, y), (q, truth) = problem(), problem(4000, seed=1)
    ours = linear.sweep(x, y, q, 5, bn=bn)
    theirs = LogisticRegression(max_iter=2000).fit(x, y).score(q, truth)
    assert abs(score(ours.scores, truth).top1 - theirs) < 0.01


def test_rate_zero_is_chance_and_a_wild_rate_loses():
    (x, y), (q, truth) = problem(), problem(2000, seed=1)
    still = linear.train(x, y, 5, rates=(0.0,), bn=False, epochs=3)
    assert score(still.scores(q)[0], truth).top1 == pytest.approx(0.2, abs=0.12)  # random weights guess
    wild = linear.train(x * 1e20, y, 5, rates=(1e30,), bn=False, epochs=2).scores(q)
    assert not wild.isfinite().all()
    kept = linear.sweep(x * 1e3, y, q * 1e3, 5, bn=False, epochs=30)  # most of the grid diverges here
    assert score(kept.scores, truth).top1 > 0.5


def test_the_rate_is_chosen_without_the_test_set():
    """A test curve that spikes at another rate changes nothing: test labels are no argument of the sweep, and test
    features do not move the choice either."""
    (x, y), (q, _) = problem(1500), problem(500, seed=1)
    first = linear.sweep(x, y, q, 5, bn=True, epochs=20)
    other = linear.sweep(x, y, q.flip(0) * 100, 5, bn=True, epochs=20)
    assert (first.rate, first.held_out) == (other.rate, other.held_out)
    out = linear.held_out(y, 0)
    assert 0.08 < out.float().mean() < 0.12
    assert (torch.bincount(y[out], minlength=5) > 0).all()
    heads = linear.train(x[~out], y[~out], 5, rates=linear.RATES, bn=True, epochs=20)
    by_hand = [score(s, y[out]).top1 for s in heads.scores(x[out])]
    assert first.held_out == tuple(by_hand)
    assert first.rate == linear.choose(tuple(by_hand))


def test_choice_of_the_rate_avoids_the_edge_of_divergence():
    stable = (0.7, 0.71, 0.72, 0.73, 0.73, 0.73, 0.72, 0.71)
    assert linear.choose((*stable, 0.74, 0.2, 0.2, 0.2, 0.2)) == linear.RATES[4]
    assert linear.choose((0.5,) * 13) == linear.RATES[0]
    assert linear.choose((*(0.5,) * 12, 0.9)) == linear.RATES[12]


def test_affine_features_leave_the_batchnorm_probe_alone():
    (x, y), (q, truth) = problem(), problem(4000, seed=1)
    scale, shift = torch.logspace(-3, 3, 20), 100 * torch.randn(20, generator=torch.Generator().manual_seed(0))
    plain = score(linear.sweep(x, y, q, 5, bn=True).scores, truth).top1
    changed = score(linear.sweep(x * scale + shift, y, q * scale + shift, 5, bn=True).scores, truth).top1
    assert abs(plain - changed) < 0.005


def test_constant_dimensions_and_tiny_sets():
    x, y = problem(130)
    x[:, 4] = 3.0
    scores = linear.train(x, y, 5, rates=(0.1,), bn=True, epochs=3, batch=64).scores(x)
    assert scores.isfinite().all()
    tiny = linear.sweep(x[:6], torch.tensor([0, 0, 0, 1, 1, 1]), x, 5, bn=True, epochs=3)
    assert tiny.scores.isfinite().all()
    with pytest.raises(UserError, match="at least 2 labelled"):
        linear.train(x[:1], y[:1], 5, rates=(0.1,), bn=True)
    with pytest.raises(UserError, match="in some class"):
        linear.sweep(x[:3], torch.arange(3), x, 5, bn=False)


def test_same_seed_same_bits():
    (x, y), (q, _) = problem(500), problem(100, seed=1)
    a, b = (linear.sweep(x, y, q, 5, bn=True, epochs=5, seed=4) for _ in range(2))
    assert torch.equal(a.scores, b.scores) and torch.equal(a.paper, b.paper)
    assert not torch.equal(a.scores, linear.sweep(x, y, q, 5, bn=True, epochs=5, seed=5).scores)


def test_quick_probe_learns():
    (x, y), (q, truth) = problem(), problem(500, seed=1)
    assert linear.quick(x, y, q, truth, 5) > 0.6


def test_the_final_head_is_trained_on_all_of_it():
    """One sample of a class of its own, which is never held out, and ten more that only the whole set has."""
    (x, y), (q, _) = problem(400), problem(50, seed=1)
    found = linear.sweep(x, y, q, 5, bn=False, epochs=5, seed=2)
    whole = linear.train(x, y, 5, rates=(found.rate, linear.PAPER_RATE), bn=False, epochs=5, seed=2)
    assert torch.equal(found.scores, whole.scores(q)[0]) and torch.equal(found.paper, whole.scores(q)[1])


def test_rates_follow_the_batches_that_are_taken():
    """1,030 samples are two batches of 515, not of 1,024: twice as many are the same batches, steps and rate apart."""
    x, y = problem(1030)
    two = linear.train(x, y, 5, rates=(0.1,), bn=False, epochs=2, batch=1024, seed=1)
    same = linear.train(x, y, 5, rates=(0.1,), bn=False, epochs=2, batch=515, seed=1)
    assert torch.equal(two.weight, same.weight)


def test_several_labels_a_sample():
    """Each class by itself, as scikit-learn's one-vs-rest; ranked by average precision."""
    x, y = problem(1500)
    labels = nn.functional.one_hot(y, 5).bool()
    labels[:, 4] = x[:, 0] > 0
    found = linear.sweep(x[:1000], labels[:1000], x[1000:], 5, bn=True, epochs=30)
    for c in range(5):
        theirs = LogisticRegression(max_iter=2000).fit(x[:1000], labels[:1000, c])
        agree = (found.scores[:, c] > 0).numpy() == theirs.predict(x[1000:])
        assert agree.mean() > 0.95
