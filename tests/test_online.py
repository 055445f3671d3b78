from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch

from manyview.evaluation import online
from manyview.model import backbone
from manyview.pipeline.store import Store


def state(module: torch.nn.Module) -> list[torch.Tensor]:
    return [t.clone() for t in module.state_dict().values()]


def test_probe_scores_above_chance_and_touches_nothing(digits):
    probe = online.Probe(Store(digits), 8, seed=0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(192)).train()  # pixels: 95 % and more
    before = state(model)
    first = probe(model, contextlib.nullcontext)
    assert first == probe(model, contextlib.nullcontext)
    assert 0.9 < first["knn"] <= 1 and 0.8 < first["linear"] <= 1  # chance is 0.1
    assert model.training and all(torch.equal(a, b) for a, b in zip(before, state(model)))
    assert all(p.grad is None for p in model.parameters())
    assert probe.eigenvalues is not None and (probe.eigenvalues[:-1] >= probe.eigenvalues[1:]).all()


def test_bank_and_queries_are_disjoint_training_images(digits):
    store = Store(digits)
    probe = online.Probe(store, 8, seed=0)
    assert len(probe.labels) == len(store) and 0 < probe.bank < len(store)
    assert (probe.labels.bincount() == torch.tensor(store.labels).bincount()).all()


def test_the_line_says_what_the_majority_class_scores(digits):
    """Of the bank, on the queries: here 3/5 of the bank are class 7 and 10 queries of 287."""
    store = Store(digits)
    probe = online.Probe(store, 8, seed=0)
    ids = np.random.Generator(np.random.Philox(key=0)).permutation(len(store))
    labels = np.array(store.labels) % 7
    labels[ids[: probe.bank * 3 // 5]] = 7
    labels[ids[-10:]] = 7
    store.labels = labels
    assert online.Probe(store, 8, seed=0).text.endswith(f"majority class {10 / (len(ids) - probe.bank):.2%}")


def test_without_labels_there_is_a_spectrum_and_no_score(digits):
    store = Store(digits)
    store.labels = store.labels * 0 - 1
    probe = online.Probe(store, 8, seed=0)
    assert probe(backbone.create("resnet10-narrow", image_size=8), contextlib.nullcontext) == {}
    assert probe.eigenvalues is not None


def test_collapse_measures():
    torch.manual_seed(0)
    full, spread = online.collapse(torch.randn(4000, 16))
    assert full == pytest.approx(16, abs=0.2) and spread == pytest.approx(1, abs=0.05)
    line, _ = online.collapse(torch.randn(100, 1) * torch.ones(1, 16))
    assert line == pytest.approx(1, abs=1e-3)
    point, spread = online.collapse(torch.ones(10, 4))
    assert spread == 0 and point == pytest.approx(1, abs=1e-3)
    assert math.isnan(online.collapse(torch.full((4, 2), float("nan")))[0])


def test_features_that_are_not_finite_are_not_scored(digits):
    probe = online.Probe(Store(digits), 8, seed=0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(192))
    assert probe(model, contextlib.nullcontext) and probe.eigenvalues is not None
    torch.nn.init.constant_(model[1].weight, float("nan"))
    assert probe(model, contextlib.nullcontext) == {} and probe.eigenvalues is None
