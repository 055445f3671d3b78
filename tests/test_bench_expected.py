from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyview.bench import expected
from manyview.bench.expected import Shape
from manyview.bench.stage_cost import Cost


def cost(name: str, where: str, per: str, core: float, wall: float | None = None) -> Cost:
    return Cost(name, where, per, [core] * 3, [core if wall is None else wall] * 3)


HOST = Shape(views=4, batch=10, cores=2, parallel=2)


def test_stages_that_share_the_cores_add_up():
    costs = [
        cost("decode", "engine", "image", 2.0),
        cost("resize", "engine", "view", 1.0),
        cost("forward", "main", "view", 3.0, 1.5),
    ]
    # (2 + 4 x 1 + 4 x 3) core-ms on two cores
    assert expected.milliseconds(costs, HOST) == pytest.approx(9.0)
    assert expected.bottleneck(costs, HOST) == ("cores", "forward")


def test_costs_a_step_are_shared_by_the_batch():
    assert expected.core_ms([cost("optimizer", "main", "step", 50.0)], HOST) == pytest.approx(5.0)


def test_the_slowest_of_separate_resources_sets_the_pace():
    shape = Shape(views=2, batch=10, cores=16, parallel=16)
    costs = [
        cost("decode", "engine", "image", 8.0), cost("copy", "copy", "view", 0.01, 0.1),
        cost("forward", "device", "view", 0.05, 1.0), cost("backward", "device", "view", 0.05, 2.0),
    ]  # fmt: skip
    assert expected.milliseconds(costs, shape) == pytest.approx(6.0)  # the device: 2 x (1 + 2); the cores need 8 / 16
    assert expected.bottleneck(costs, shape) == ("device", "backward")
    gone = expected.what_if(costs, shape, "backward", 0.0, observed=100.0)
    assert gone["images_per_s"] == pytest.approx(300.0) and gone["next"] == "forward"
    # without forward and backward the cores' half a millisecond is what is left
    without = expected.scaled(expected.scaled(costs, "backward", 0), "forward", 0)
    assert expected.bottleneck(without, shape)[1] == "decode"


def test_one_thread_that_trains_is_a_resource_of_its_own():
    shape = Shape(views=1, batch=1, cores=16, parallel=16)
    costs = [cost("parameters", "main", "view", 3.0), cost("decode", "engine", "image", 16.0)]
    assert expected.bottleneck(costs, shape) == ("main", "parameters")
    assert expected.milliseconds(costs, shape) == pytest.approx(3.0)


def test_an_engine_that_fills_one_core_is_no_faster_with_more():
    costs = [cost("decode", "engine", "image", 2.0)]
    assert expected.milliseconds(costs, Shape(1, 1, cores=8, parallel=1.0)) == pytest.approx(2.0)


def test_work_on_the_device_counts_for_the_device_when_the_engine_runs_there():
    costs = [cost("decode", "engine", "image", 0.1, 2.0), cost("forward", "device", "view", 0.1, 1.0)]
    assert expected.milliseconds(costs, Shape(1, 1, 8, 8, engine_on_device=True)) == pytest.approx(3.0)


costs_strategy = st.lists(
    st.tuples(st.sampled_from(["engine", "main", "device"]), st.sampled_from(["image", "view", "step"]), st.floats(0.01, 50)),
    min_size=2, max_size=8,
)  # fmt: skip


@given(costs_strategy, st.integers(1, 8), st.integers(1, 64), st.integers(1, 32))
def test_predictions_are_consistent(rows, views, batch, n_cores):
    costs = [cost(f"stage{i}", where, per, ms) for i, (where, per, ms) in enumerate(rows)]
    shape = Shape(views, batch, n_cores, float(n_cores))
    whole = expected.milliseconds(costs, shape)
    resource, stage = expected.bottleneck(costs, shape)
    assert sum(expected.loads(costs, shape)[resource].values()) == pytest.approx(whole)
    for one in costs:
        gone = expected.what_if(costs, shape, one.name, 0.0, observed=10.0)
        assert gone["gain"] >= 1 - 1e-9  # less work is never slower
        assert expected.what_if(costs, shape, one.name, 1.0, observed=10.0)["gain"] == pytest.approx(1.0)
        slowed = expected.scaled(costs, one.name, 3.0)
        back = expected.what_if(slowed, shape, one.name, 1 / 3, observed=10.0)
        assert back["gain"] == pytest.approx(expected.milliseconds(slowed, shape) / whole)
    best = expected.removed(costs, shape, 10.0)[0]
    assert best["gain"] >= expected.what_if(costs, shape, stage, 0.0, 10.0)["gain"] - 1e-9


def test_more_views_cost_more_and_the_image_is_paid_once():
    costs = [cost("decode", "engine", "image", 2.0), cost("resize", "engine", "view", 0.5)]
    at = [expected.core_ms(costs, Shape(v, 1, 1, 1)) for v in (1, 2, 4)]
    assert at == pytest.approx([2.5, 3.0, 4.0])
