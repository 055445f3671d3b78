from __future__ import annotations

import numpy as np
import pytest
import slowdowns
import torch

from manyview.bench import limits, sweep, workload
from manyview.pipeline.store import Store


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    found = workload.build(slowdowns.settings(slowdowns.small_data(tmp_path_factory.mktemp("photos")), 1.0), 0.05)
    yield found
    found.close()


def test_flops_of_a_view_are_those_of_its_layers(work):
    """Forward and backward (twice the forward, but for the first layer's input gradient) of every layer, two a multiply-add."""
    forward, first = 0.0, []

    def count(layer, inputs, output):
        nonlocal forward
        per_output = layer.weight[0].numel()
        forward += 2 * per_output * output[0].numel()
        first.append(2 * per_output * output[0].numel())

    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    hooks = [m.register_forward_hook(count) for m in work.training.model.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        work.training.model(torch.zeros(2, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    assert limits.flops_per_view(work) == pytest.approx(3 * forward - first[0], rel=1e-6)


def test_bandwidths_and_rates_are_of_this_world(work):
    assert 1e9 < limits.memory_bandwidth(32 << 20, 2) < 5e12
    assert 1e8 < limits.peak_flops(torch.device("cpu"), torch.float32, 0.2) < 1e15
    jpeg = limits.jpeg(work.store, 0.3)
    assert 1e6 < jpeg["pixels_per_core_s"] < 1e10
    mean = (work.store.heights.astype(float) * work.store.widths).mean()
    assert jpeg["pixels_per_image"] == pytest.approx(mean, rel=0.1)


def test_stored_pixels_have_no_jpeg_limit(digits):
    assert limits.jpeg(Store(digits), 0.1) is None


def test_cold_reads_read_what_there_is(work):
    cold = limits.disk(work.setup, 0.5)
    assert cold["images_per_s"] > 0
    mean = work.store.nbytes() / len(work.store)
    assert cold["random_bytes_per_s"] / cold["images_per_s"] == pytest.approx(mean, rel=0.2)
    assert cold["sequential_bytes_per_s"] > 0
    for name in ("sequential", "random"):
        low, high = cold[f"{name}_interval"]
        assert 0 < low <= cold[f"{name}_bytes_per_s"] <= high


def test_shares_are_the_rate_over_what_a_limit_allows(work):
    found = {
        "disk": {"sequential_bytes_per_s": 100e6, "random_bytes_per_s": 50e6, "sequential_interval": (9e7, 2e8)},
        "bytes_per_image": 1e5, "cores": 2,
        "memory_bytes_per_s": 10e9, "traffic_per_image": 1e6,
        "jpeg": {"pixels_per_core_s": 1e8, "pixels_per_image": 2e5}, "peak_flops": 1e11, "flops_per_image": 1e8,
        "precision": "float32", "batch": 10,
    }  # fmt: skip
    rows = {row["name"]: row for row in limits.shares(found, images_per_s=100.0)}
    assert rows["disk, cold, sequential"]["images_per_s"] == pytest.approx(1000)
    assert rows["disk, cold, sequential"]["share"] == pytest.approx(0.1)
    assert rows["disk, cold, sequential"]["interval"] == (9e7, 2e8)
    assert rows["libjpeg-turbo on all cores"]["share"] == pytest.approx(100 / 1000)
    assert rows["matrix product, float32"]["share"] == pytest.approx(0.1)  # MFU


# ---------------------------------------------------------------------------------------------------------------- sweep


def test_the_fit_finds_a_and_b():
    base = {"views": 4, "threads": 2, "batch": 8, "prefetch": 2}
    rng = np.random.default_rng(0)
    rows = [base | {"views": v, "core": list((1.5 + 0.25 * v) * rng.normal(1, 0.01, 5))} for v in (1, 2, 4, 8)]
    found = sweep.fit(rows, base)
    assert found["a"] == pytest.approx(1.5, rel=0.05) and found["b"] == pytest.approx(0.25, rel=0.05)
    assert found["a_interval"][0] <= found["a"] <= found["a_interval"][1]
    assert found["worst_error"] < 0.03


def test_the_knee_is_the_smallest_setting_that_is_as_good_as_the_best():
    line = [{"value": v, "images_per_s": r} for v, r in ((1, 50.0), (2, 98.0), (4, 100.0), (8, 99.0))]
    assert sweep.knee(line) == 2


def test_the_sweep_changes_one_setting_at_a_time(work):
    base = {"views": 4, "threads": work.threads, "batch": work.batch, "prefetch": 2}
    found = sweep.points(work, base)
    assert all(sum(p[k] != base[k] for k in base) <= 1 for p in found)
    assert {p["views"] for p in found} == {1, 2, 4} and len(found) == len({tuple(p.items()) for p in found})
