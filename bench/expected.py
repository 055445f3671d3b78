"""From what each stage costs alone to what they should do together, what holds them back, and what a change would bring.

Stages that share a resource add up; resources work at the same time, so the slowest one sets the pace:

    cores    all core time of all stages, over the number of cores
    engine   core time of the engine's stages, over the cores that the engine alone was seen to fill
    main     time of the stages in the thread that trains (what it launches counts, what runs on the device does not)
    device   time of the stages on the device
    copy     time of host-to-device copies

A prediction is the observed rate times the ratio of two expectations: what the whole loses against the expectation (its
efficiency) is taken to stay as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from manyview.bench.stage_cost import Cost

RESOURCES = {
    "cores": "the cores", "engine": "the engine's threads", "main": "the training thread", "device": "the GPU",
    "copy": "the copy engine",
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What turns costs a unit into milliseconds an image."""

    views: int
    batch: int
    cores: float  # what other processes leave of them
    parallel: float  # cores that the engine alone fills
    engine_on_device: bool = False


def loads(costs: Iterable[Cost], shape: Shape) -> dict[str, dict[str, float]]:
    """Milliseconds an image of every resource, by stage; resources that nothing uses are left out."""
    by_resource: dict[str, dict[str, float]] = {name: {} for name in RESOURCES}
    for cost in costs:
        units = cost.units(shape.views, shape.batch)
        core, wall = cost.core_ms * units, cost.wall_ms * units
        by_resource["cores"][cost.name] = core / shape.cores
        if cost.where == "engine" and not shape.engine_on_device:
            by_resource["engine"][cost.name] = core / shape.parallel
        else:
            by_resource["device" if cost.where == "engine" else cost.where][cost.name] = wall
        if cost.where == "device":
            by_resource["main"][cost.name] = min(core, wall)
    return {name: stages for name, stages in by_resource.items() if sum(stages.values()) > 0}


def milliseconds(costs: Iterable[Cost], shape: Shape) -> float:
    """Expected milliseconds an image of everything together."""
    return max((sum(stages.values()) for stages in loads(costs, shape).values()), default=0.0)


def bottleneck(costs: Iterable[Cost], shape: Shape) -> tuple[str, str]:
    """(resource, stage): the resource that sets the pace, and what it spends most of its time on."""
    by_resource = loads(costs, shape)
    resource = max(by_resource, key=lambda name: sum(by_resource[name].values()))
    return resource, max(by_resource[resource], key=by_resource[resource].__getitem__)


def core_ms(costs: Iterable[Cost], shape: Shape) -> float:
    """Core milliseconds an image of all stages."""
    return sum(cost.core_ms * cost.units(shape.views, shape.batch) for cost in costs)


def scaled(costs: Iterable[Cost], name: str, factor: float) -> list[Cost]:
    """The costs with one stage at `factor` of its own: 0 takes it away."""
    times = lambda samples: [factor * x for x in samples]  # noqa: E731
    return [replace(c, core=times(c.core), wall=times(c.wall)) if c.name == name else c for c in costs]


def what_if(costs: list[Cost], shape: Shape, name: str, factor: float, observed: float) -> dict:
    """Stage `name` at `factor` of its cost: images a second, the gain, and the bottleneck then."""
    changed = scaled(costs, name, factor)
    gain = milliseconds(costs, shape) / milliseconds(changed, shape)
    resource, stage = bottleneck(changed, shape)
    return {"stage": name, "factor": factor, "images_per_s": observed * gain, "gain": gain,
            "next": stage, "next_resource": resource}  # fmt: skip


def ceiling(cost: Cost, shape: Shape) -> float:
    """Images a second of a stage that has the machine to itself; 0 = it costs nothing that was seen."""
    own = milliseconds([cost], shape)
    return 1e3 / own if own else 0.0


def removed(costs: list[Cost], shape: Shape, observed: float) -> list[dict]:
    """`what_if` of taking each stage away, largest gain first."""
    rows = [what_if(costs, shape, cost.name, 0.0, observed) for cost in costs]
    return sorted(rows, key=lambda row: -row["gain"])
