from __future__ import annotations

import itertools
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyview.pipeline import plan as module
from manyview.pipeline.errors import UserError
from manyview.pipeline.plan import permutation, plan, shuffle_quality

numbers = st.integers(1, 60)


@pytest.mark.parametrize("order", module.ORDERS)
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 7, 24, 101, 1000])
def test_every_sample_once_an_epoch_over_all_ranks(n, world, order):
    batch, epochs = 24, 3
    plans = [plan(n, seed=3, batch=batch, world=world, rank=r, order=order) for r in range(world)]
    steps = -(-n * epochs // batch)  # enough to cover; what is beyond belongs to the fourth epoch
    seen: Counter = Counter()
    for step in range(steps):
        for p in plans:
            ids, epoch = p.batch(step)
            assert len(ids) == len(epoch) == batch // world
            seen.update(zip(epoch.tolist(), ids.tolist()))
    assert all(seen[e, i] == 1 for e in range(epochs) for i in range(n))
    assert sum(seen.values()) == steps * batch and max(seen.values()) == 1


@settings(max_examples=60, deadline=None)
@given(n=numbers, share=st.integers(1, 9), world=st.sampled_from([1, 2, 3, 8]), step=st.integers(0, 1000))
def test_ranks_share_the_batch_of_one_process(n, share, world, step):
    whole = plan(n, seed=1, batch=share * world)
    parts = [plan(n, seed=1, batch=share * world, world=world, rank=r).batch(step) for r in range(world)]
    ids, epochs = whole.batch(step)
    assert np.array_equal(ids, np.concatenate([p[0] for p in parts]))
    assert np.array_equal(epochs, np.concatenate([p[1] for p in parts]))


def test_a_batch_straddles_epochs_and_needs_no_memory():
    p = plan(10, seed=0, batch=7)
    stream = [p.batch(s) for s in range(4)]
    assert sorted(stream[1][1].tolist()) == [0, 0, 0, 1, 1, 1, 1]
    assert all((np.diff(ids) >= 0).all() for ids, _ in stream)  # ascending, as they lie in storage
    permutation.cache_clear()
    again = plan(10, seed=0, batch=7).batch(3)
    assert np.array_equal(again[0], stream[3][0])


def test_seed_and_epoch_change_the_order():
    a, b, c = permutation(1000, 0, 0), permutation(1000, 0, 1), permutation(1000, 1, 0)
    assert not np.array_equal(a, b) and not np.array_equal(a, c)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.1 and abs(np.corrcoef(a, c)[0, 1]) < 0.1


def test_permutations_are_uniform():
    counts = Counter(tuple(permutation(4, 5, e).tolist()) for e in range(4800))
    assert len(counts) == 24
    chi2 = sum((c - 200) ** 2 / 200 for c in counts.values())
    assert chi2 < 49.7  # 99.9 % of 23 degrees of freedom


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-1, 4), min_size=1, max_size=80), st.integers(0, 5))
def test_a_fraction_is_nested_and_balanced(labels, seed):
    labels = np.array(labels)
    kept = [plan(labels, seed=seed, batch=1, fraction=f).ids for f in (0.1, 0.25, 0.5, 0.9, 1.0)]
    for small, large in itertools.pairwise(kept):
        assert set(small) <= set(large)
    for fraction, ids in zip((0.1, 0.25, 0.5, 0.9, 1.0), kept):
        assert np.all(np.diff(ids) > 0)
        for label in np.unique(labels):
            want = max(1, np.floor((labels == label).sum() * fraction + 0.5))
            assert (labels[ids] == label).sum() == want


def test_a_fraction_is_random():
    kept = plan(10_000, seed=0, batch=1, fraction=0.25).ids
    other = plan(10_000, seed=1, batch=1, fraction=0.25).ids
    assert len(kept) == 2500 and abs(kept.mean() - 5000) < 200
    assert 400 < len(set(kept) & set(other)) < 850


def test_blocks_stay_together_and_are_mixed():
    n = module.BLOCK * module.WINDOW * 3 + 77
    order = permutation(n, 0, 0, "blocks")
    assert np.array_equal(np.sort(order), np.arange(n))
    first = np.unique(order[: module.BLOCK * module.WINDOW] // module.BLOCK)
    assert len(first) <= module.WINDOW + 1  # a window reads so many blocks and no others
    assert 0.99 < shuffle_quality(permutation(n, 0, 0)) < 1.01
    assert 0.2 < shuffle_quality(order) < 0.9
    assert shuffle_quality(np.arange(n)) < 1e-3


@pytest.mark.parametrize("order", module.ORDERS)
def test_a_rank_stays_in_its_part_of_the_storage(order):
    """Its cache then holds what it will ask for, in this epoch and the next."""
    n, world, batch = 200_000, 8, 4096
    for rank in range(world):
        p = plan(n, seed=0, batch=batch, world=world, rank=rank, order=order)
        ids = np.concatenate([p.batch(step)[0] for step in range(2 * n // batch)])
        seen = len(np.unique(ids // 100)) / (n // 100)
        assert seen < 2.5 / world if order == "blocks" else seen < 1.6 / world
        inside = (ids >= n * rank // world - n // 10) & (ids < n * (rank + 1) // world + n // 10)
        assert inside.mean() > 0.95


@pytest.mark.parametrize("n", [1, 513, 32_768, 33_000, 98_305, 131_071])
def test_windows_make_up_the_order(n):
    """Also behind the set's last block, which may be short: worked out alone they are what they are together."""
    blocks, short = module._blocks(n, 0, 4)
    rows = (blocks[:, None] * module.BLOCK + np.arange(module.BLOCK)).ravel()
    rows = rows[rows < n]
    whole = permutation(n, 0, 4, "blocks")
    assert np.array_equal(np.sort(whole), np.arange(n)) and blocks[short] == len(blocks) - 1
    for first in range(0, n, module.MIXED):
        part = slice(first, first + module.MIXED)
        assert np.array_equal(np.sort(whole[part]), np.sort(rows[part]))


def test_four_hundred_million_samples_in_blocks_cost_nothing():
    plan(np.arange(10), seed=0, batch=2, order="blocks").batch(0)  # compiled
    tracemalloc.start()
    begun = time.process_time()
    p = plan(400_000_000, seed=0, batch=32_768, world=512, rank=511, order="blocks")
    found = [p.batch(step) for step in (0, 12_207, 100_000)]
    seconds, (_, peak) = time.process_time() - begun, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found[1][1].tolist().count(1) and found[2][1][0] == 8 and max(ids.max() for ids, _ in found) < 4e8
    assert peak < 50e6, f"{peak / 1e6:.0f} MB"
    assert seconds < 2, f"{seconds:.2f} s"


def test_more_samples_than_32_bits_count():
    n = 5_000_000_000
    p = plan(n, seed=0, batch=32_768, world=8, rank=7, order="blocks")
    ids = np.concatenate([p.batch(step)[0] for step in (0, 70_000, 152_000)])
    assert ids.min() >= 0 and 2**32 < ids.max() < n and len(np.unique(ids)) == len(ids)
    for options in ({"order": "random"}, {"order": "blocks", "fraction": 0.5}):
        with pytest.raises(UserError, match="more than 2,147,483,647: only order blocks"):
            plan(n, seed=0, batch=2, **options)


def test_the_order_says_how_well_it_mixes():
    assert plan(100, seed=0, batch=2).describe() == "random (uniform)"
    assert "as far apart" in plan(100_000, seed=0, batch=2, order="blocks").describe()


def test_steps_round_down_to_at_least_one():
    p = plan(100, seed=0, batch=32)
    assert [p.steps(e) for e in (0.1, 1, 2.5, 8)] == [1, 3, 7, 25]


def test_bad_input_is_named_all_at_once():
    with pytest.raises(UserError) as error:
        plan(10, seed=0, batch=9, world=2, fraction=0, order="bloks")
    lines = str(error.value).splitlines()
    assert len(lines) == 3 and "fraction" in lines[0] and "nearest: 8" in lines[1] and "blocks" in lines[2]
    with pytest.raises(UserError, match="no samples"):
        plan(0, seed=0, batch=2)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"fraction": 0.5}, {"order": "blocks"}], ids=str)
def test_fourteen_million_samples(options):
    labels = np.arange(14_000_000) % 21_841
    plan(np.arange(10), seed=0, batch=2, fraction=0.5).batch(0)  # compiled
    tracemalloc.start()
    begun = time.process_time()
    plan(labels, seed=0, batch=4096, **options).batch(10)
    seconds, (_, peak) = time.process_time() - begun, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    permutation.cache_clear()
    assert peak < 500e6, f"{peak / 1e6:.0f} MB"
    assert seconds < 2, f"{seconds:.2f} s"


@pytest.mark.parametrize("order", module.ORDERS)
@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("n", [7, 1000, 100_000])
def test_storage_is_told_of_every_sample_before_its_batch(n, world, order):
    plans = [plan(n, seed=3, batch=300, world=world, rank=r, order=order) for r in range(world)]
    start, stop = 5, 5 + 2 * plans[0].ahead + 1
    for p in plans:
        told: Counter = Counter()
        pieces = list(p.reading(start, stop))
        for step in range(start, stop):
            for ids in pieces[max(0, step - 1 - start + p.ahead) if step > start else 0 : step - start + p.ahead]:
                assert len(ids) == 300 // world and (np.diff(ids) >= 0).all()
                told.update(ids.tolist())
            told.subtract(p.batch(step)[0].tolist())
            assert min(told.values()) >= 0
        assert max(told.values()) == 0  # all that was told was used


def test_blocks_are_fetched_in_one_piece():
    p = plan(200_000, seed=0, batch=512, order="blocks")
    steps = list(p.reading(0, p.ahead))
    jumps = sum(int((np.diff(ids) > 1).sum()) for ids in steps)
    assert jumps < module.WINDOW  # block to block; in the order of the batches it would be one a sample


def test_a_fraction_that_leaves_less_than_one_of_a_class_says_so():
    labels = np.repeat(np.arange(24), [1] * 20 + [50] * 4)
    few = plan(labels, seed=0, batch=4, fraction=0.1)
    assert few.n == 20 + 4 * 5 and few.kept == 20
    assert few.describe() == "random (uniform), 20 more than the fraction: each class keeps at least one"
    assert plan(labels, seed=0, batch=4, fraction=0.5).describe() == "random (uniform)"  # a half is rounded up
