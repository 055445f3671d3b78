from __future__ import annotations

import copy
import json

import pytest
import slowdowns

from manyview.bench import capacity, diff, stages, verdict
from manyview.pipeline.errors import UserError


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A small profile, measured."""
    data = slowdowns.small_data(tmp_path_factory.mktemp("photos"))
    return stages.measure(slowdowns.settings(data, 1.0), extras=False)


def changed(report: dict, name: str, factor: float) -> dict:
    """The same profile with one stage `factor` times as dear, alone and composed."""
    other = copy.deepcopy(report)
    extra = 0.0
    for row in other["stages"]:
        if row["name"] == name:
            extra = (factor - 1) * row["core_ms_image"]
            for key in ("core", "wall", "core_interval"):
                row[key] = [factor * x for x in row[key]]
            row["core_ms"] *= factor
    together = other["composed"]
    together["core_ms"] += extra
    together["core_ms_interval"] = [x + extra for x in together["core_ms_interval"]]
    return other


@pytest.fixture
def steady(report):
    """The profile with narrow intervals and a certificate, as a quiet machine gives it."""
    other = copy.deepcopy(report)
    for row in other["stages"]:
        row["core_interval"] = [0.99 * row["core_ms"], 1.01 * row["core_ms"]]
    together = other["composed"]
    together["core_ms_interval"] = [0.99 * together["core_ms"], 1.01 * together["core_ms"]]
    other["noise"] = {"others": 0.0, "certified": True, "reasons": []}
    return other


def test_a_slower_stage_is_named_with_what_undoing_it_brings(steady):
    after = changed(steady, "backward", 3.0)
    result = diff.differences(steady, after)
    assert result["stages"]["culprit"]["stage"] == "backward"
    assert result["stages"]["culprit"]["ratio"] == pytest.approx(3.0, rel=1e-3)
    assert result["slower"] and "backward" in diff.text(result)
    costs, shape = verdict.costs_of(after), verdict.shape_of(after)
    from manyview.bench import expected

    gain = expected.milliseconds(costs, shape) / expected.milliseconds(verdict.costs_of(steady), shape)
    assert result["stages"]["culprit"]["gain"] == pytest.approx(gain, rel=1e-3)
    # Where the slow stage also spoils how the others work together, undoing it brings that back too.
    after["composed"]["efficiency"] = 0.8 * steady["composed"]["efficiency"]
    culprit = diff.differences(steady, after)["stages"]["culprit"]
    assert culprit["gain"] == pytest.approx(gain / 0.8, rel=1e-3)
    assert culprit["images_per_s"] == pytest.approx(culprit["gain"] * after["composed"]["images_per_s"])


def test_a_faster_stage_is_no_culprit(steady):
    result = diff.differences(steady, changed(steady, "backward", 0.5))
    assert result["stages"]["culprit"] is None and not result["slower"] and "faster" in diff.text(result)


def test_a_change_inside_the_noise_is_none(steady):
    result = diff.differences(steady, changed(steady, "backward", 1.04))
    assert not any(row["changed"] for row in result["stages"]["rows"])
    assert result["stages"]["culprit"] is None and not result["slower"]


def test_rates_of_a_noisy_run_are_not_compared(steady):
    noisy = copy.deepcopy(steady)
    noisy["noise"]["certified"] = False
    assert diff.differences(steady, steady)["images_per_s"]
    result = diff.differences(steady, noisy)
    assert result["images_per_s"] is None and "not compared" in diff.text(result)


def test_what_does_not_match_is_said(steady):
    other = copy.deepcopy(steady)
    other["settings"]["views"], other["data"]["fingerprint"] = 8, "another"
    assert [line.split(":")[0] for line in diff.mismatch(steady, other)] == ["views", "data"]


def test_exit_codes_and_files(steady, tmp_path, capsys):
    for name, one in (("a", steady), ("b", changed(steady, "forward", 4.0))):
        (tmp_path / f"{name}.json").write_text(json.dumps(one))
    a, b = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    assert diff.main([a, a]) == 0
    assert diff.main([a, b, "--json", str(tmp_path / "out" / "diff.json")]) == 1
    assert json.loads((tmp_path / "out" / "diff.json").read_text())["slower"]
    assert "forward costs 4x of before" in capsys.readouterr().out
    (tmp_path / "old.json").write_text(json.dumps(steady | {"schema": 0}))
    (tmp_path / "part.json").write_text(json.dumps({"schema": steady["schema"]}))
    for bad, said in (
        ("old.json", "schema 0"), ("missing.json", "is no profile"), ("part.json", "is no whole profile, without settings, ")
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            diff.main([a, str(tmp_path / bad)])


def test_the_verdict_tells_of_the_baseline(steady):
    after = changed(steady, "optimizer", 40.0)
    after["baseline"] = verdict.compare(steady, after)
    assert "Since the baseline optimizer costs 40x" in verdict.sentence(after)
    steady["baseline"] = verdict.compare(steady, steady)
    assert "Nothing that matters has changed" in verdict.sentence(steady)


# ------------------------------------------------------------------------------------------------------------- capacity


def test_the_plan_is_arithmetic_on_the_profile(steady):
    args = capacity.Args(profile=None, images=1000, epochs=10, gpus=4, batch_size=steady["composed"]["batch"])  # type: ignore[arg-type]
    plan = capacity.plan(steady, args)
    assert plan["images_per_s"] == pytest.approx(
        4 * steady["composed"]["images_per_s"], rel=1e-3
    )  # the same shape: what was observed
    assert plan["hours"] == pytest.approx(1000 * 10 / plan["images_per_s"] / 3600)
    assert plan["storage_bytes"] == pytest.approx(1000 * steady["data"]["bytes_per_image"])
    assert plan["read_bytes_per_s"] == pytest.approx(plan["images_per_s"] * steady["data"]["bytes_per_image"])
    double = capacity.plan(
        steady, capacity.Args(profile=None, images=1000, epochs=10, gpus=8, batch_size=args.batch_size)
    )  # type: ignore[arg-type]
    assert double["hours"] == pytest.approx(plan["hours"] / 2)
    more = capacity.plan(
        steady, capacity.Args(profile=None, images=1000, epochs=10, gpus=4, views=16, batch_size=args.batch_size)
    )  # type: ignore[arg-type]
    assert more["hours"] > 2 * plan["hours"]  # four times the views, and little that is paid once


def test_a_deadline_gives_gpus_and_views(steady):
    free = capacity.plan(steady, capacity.Args(profile=None, images=10**6, epochs=10))  # type: ignore[arg-type]
    tight = capacity.Args(profile=None, images=10**6, epochs=10, hours=free["hours"] / 3)  # type: ignore[arg-type]
    plan = capacity.plan(steady, tight)
    assert plan["gpus_for_deadline"] == 3
    assert 0 <= plan["views_for_deadline"] < steady["shape"]["views"]
    assert "deadline" in capacity.text(plan) and "hours" in capacity.text(plan)
    roomy = capacity.Args(profile=None, images=10**6, epochs=10, hours=1.01 * free["hours"])  # type: ignore[arg-type]
    assert capacity.plan(steady, roomy)["views_for_deadline"] == steady["shape"]["views"]


def test_bad_targets_are_named_all_at_once(tmp_path):
    with pytest.raises(UserError, match=r"--images must be at least 1, not 0\n--gpus must be at least 1, not -1"):
        capacity.main(["--profile", str(tmp_path / "none.json"), "--images", "0", "--gpus", "-1"])
    with pytest.raises(UserError, match=r"--views must be at least 0, not -1\n--hours must be at least 0, not -2"):
        capacity.main(["--profile", str(tmp_path / "none.json"), "--images", "1", "--views", "-1", "--hours", "-2"])
