"""A study: a grid of real runs into a CSV, killed and gone on with; the statistics; the page."""

from __future__ import annotations

import csv
import math
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from manyview.pipeline.errors import UserError
from manyview.pipeline.store import Store
from manyview.study import claims, figures, headline, report, sweep

ROOT = Path(__file__).resolve().parents[1]
TEXT = """
train: {{data: {data}, backbone: resnet10-narrow, stem: standard, size: 8, batch_size: 32, projector_dim: 16, save_every: 5}}
probe: {{epochs: 2, images: 200}}
grids:
  untrained: [{{views: 2, fraction: 1.0, budget: 0, seed: 0}}]
  views: [{{views: [2, 4], fraction: [0.5, 1.0], budget: 640, eval_every: 5, seed: 0}}]
  forms: [{{views: 2, fraction: 1.0, budget: 640, eval_every: -1, form: [mean, pairs], seed: 0}}]
  again: [{{views: 2, fraction: 1.0, budget: 640, eval_every: 5, seed: 0}}]
"""


@pytest.fixture
def study(tmp_path: Path, digits: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TEXT.format(data=digits))
    return path


def test_a_grid_is_every_combination_and_a_run_is_counted_once(study: Path):
    found = sweep.read(study)
    assert len(found.grids["views"]) == 4 and len(found.runs) == 7  # the run of `again` is one of `views`
    assert found.columns == ["views", "fraction", "budget", "seed", "eval_every", "form"]
    words = sweep.flags(found.train | found.grids["views"][0])
    assert words[words.index("--steps") + 1] == "10"  # 640 views / (2 views x 32 images)
    assert words[: words.index("--data")] == [
        "--optimizer",
        "adamw",
        "--policy",
        "simclr",
        "--beta",
        "auto",
    ]  # whatever its size


def test_an_unknown_setting_is_refused_by_name(study: Path):
    study.write_text(study.read_text().replace("budget: 0", "bugdet: 0"))
    with pytest.raises(UserError, match=r"bugdet.*budget"):
        sweep.read(study)


def test_rows_of_other_shared_settings_are_refused(study: Path, tmp_path: Path):
    found = sweep.read(study)
    row = {**found.runs[0], "shared": found.shared}
    sweep.write(found, tmp_path / "a.csv", {sweep.name_of(found.runs[0]): row})
    assert len(sweep.finished(found, tmp_path / "a.csv")) == 1
    study.write_text(study.read_text().replace("size: 8", "size: 9"))
    with pytest.raises(UserError, match="other shared settings"):
        sweep.finished(sweep.read(study), tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"name,score\n", "without the column 'held_out'; move it away"),  # no row, but somebody's file all the same
        (b"\xff\xfe\x00", "no CSV"),
        (b"views,seed,%s\n2,0,0.5\n" % ",".join(sweep.RESULTS).encode(), "row 1 ends too early"),
    ],
)
def test_a_table_that_is_not_the_studys_is_refused_and_left(study: Path, tmp_path: Path, content: bytes, words: str):
    table = tmp_path / "a.csv"
    table.write_bytes(content)
    with pytest.raises(UserError, match=words):
        sweep.run(sweep.read(study), table, tmp_path / "runs", 1)
    assert table.read_bytes() == content


def command(study: Path, tmp_path: Path, *more: str) -> list[str]:
    out, folder = str(tmp_path / "tiny.csv"), str(tmp_path / "runs")
    return [sys.executable, str(ROOT / "tools" / "sweep.py"), str(study), "--out", out, "--folder", folder, *more]


@pytest.mark.slow
def test_a_killed_study_goes_on_past_a_run_that_fails_and_the_page_is_written(study: Path, tmp_path: Path):
    study.write_text(study.read_text().replace("fraction: [0.5, 1.0]", "fraction: 1.0"))  # five runs
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(study, tmp_path), cwd=ROOT, env=environment, start_new_session=True)
    table = tmp_path / "tiny.csv"
    while not table.exists() or table.read_text().count("\n") < 3:  # two rows are there
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = list(csv.DictReader(table.open()))
    assert len(before) < 5
    study.write_text(
        study.read_text() + "  bad: [{views: 2, fraction: [1.5, 2.0], budget: 640, eval_every: -1, seed: 0}]\n"
    )
    again = partial(subprocess.run, cwd=ROOT, env=environment, capture_output=True, text=True)
    done = again(command(study, tmp_path, "--jobs", "2"))
    assert done.returncode == 1 and done.stdout.count("FAILED") == 2, done.stdout + done.stderr
    assert "--fraction must be from 0 to 1, not 2.0" in done.stdout
    study.write_text(study.read_text().split("  bad:")[0])
    done = again(command(study, tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr  # all that can be run has been

    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 5 and all(row in rows for row in before)  # what was done is not done again
    assert all(0 <= float(row["linear"]) <= 1 for row in rows)
    bank, held_out = (int(n) for n in re.findall(r"(\d+) images, held out (\d+)", rows[0]["probe"])[0])
    assert 190 < bank <= 200 and bank + held_out == len(Store(sweep.read(study).train["data"], "train").labels)
    trained = [row for row in rows if row["budget"] != "0"]
    assert all(int(row["views_seen"]) == 640 and float(row["core_seconds"]) > 0 for row in trained)
    points = 10 // 5 + 5 // 5  # V = 4 takes 5 steps
    assert (tmp_path / "tiny.curves.csv").read_text().count("\n") == 1 + points
    report.main([study], tmp_path / "paper.md")
    page = (tmp_path / "paper.md").read_text()
    assert "5 of 5 runs" in page and "Pending" not in page and "Which off-diagonal" in page
    assert "More views replace data" in page and (tmp_path / "paper" / "tiny-convergence.png").exists()


# --- statistics


def test_an_interval_is_students():
    found = claims.estimate([1.0, 2.0, 3.0])
    assert found.mean == 2 and math.isclose(found.half, 4.302652729911275 * 1 / math.sqrt(3), rel_tol=1e-9)
    assert claims.estimate([1.0]).half == math.inf and str(claims.estimate([1.0])) == "1.00 (one seed)"


def rows(cells: dict[int, list[float]]) -> list[claims.Row]:
    """{views: percent of each seed} as rows."""
    return [{"views": v, "seed": s, "linear": x / 100} for v, xs in cells.items() for s, x in enumerate(xs)]


def test_equal_spreads_are_pooled_and_a_difference_has_all_their_degrees_of_freedom():
    cells = {v: [10.0 * v, 10.0 * v + 1, 10.0 * v + 3] for v in (1, 2, 3, 4)}
    found = claims.spread(rows(cells))
    own = stats.ttest_ind(cells[2], cells[1], equal_var=True)  # of two cells alone: 4 degrees of freedom
    assert found.pooled and (found.dof, found.settings) == (8, 4)
    assert math.isclose(found.deviation, math.sqrt(7 / 3), rel_tol=1e-9)
    a, b = (claims.percent(rows(cells), views=v) for v in (2, 1))
    gap = found.difference(a, b)
    assert gap is not None and gap.dof == 8 and math.isclose(gap.error, 10 / own.statistic, rel_tol=1e-9)
    assert found.difference(a, []) is None


def test_unequal_spreads_are_not_pooled_and_a_difference_is_welchs():
    generator = np.random.default_rng(0)
    cells = {v: (50 + generator.normal(0, 0.01 if v < 3 else 5, 6)).tolist() for v in range(1, 5)}
    found = claims.spread(rows(cells))
    gap = found.difference(*(claims.percent(rows(cells), views=v) for v in (4, 1)))
    welch = stats.ttest_ind(cells[4], cells[1], equal_var=False).confidence_interval(0.95)
    assert not found.pooled and gap is not None
    assert math.isclose(gap.low, welch.low, rel_tol=1e-6) and math.isclose(gap.high, welch.high, rel_tol=1e-6)
    assert "Welch" in report.pooling(found) and not claims.spread(rows({1: [1.0, 2.0]})).pooled


@pytest.mark.parametrize("sample", [[0.1, 0.3, -0.2, 0.2], [1.5, 1.9, 1.2, 2.1], [-1.2, 0.8, 0.1, -0.4]])
def test_a_margin_test_is_two_one_sided_t_tests(sample):
    claim = claims.Claim("x", claims.estimate(sample), -1, 1)
    above, below = (stats.ttest_1samp(sample, m, alternative=side).pvalue for m, side in ((-1, "greater"), (1, "less")))
    assert claim.ps == pytest.approx((max(above, below), min(1 - above, 1 - below)))
    assert claims.Claim("x", claims.estimate(sample), 1).ps[0] == pytest.approx(1 - below)  # at least one point


def test_verdicts_are_corrected_for_each_other():
    assert claims.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06]) and claims.holm([]) == []
    good = claims.Claim("good", claims.Estimate(0.0, 0.45, 100), -1, 1)  # p = 0.029 twice
    assert claims.decide([good])[0].startswith("- good: undecided") is (good.p >= 0.05)
    sure = claims.Claim("sure", claims.Estimate(0.0, 0.4, 100), -1, 1)
    assert 0.01 < sure.p < 0.05
    alone, among = (
        claims.decide([sure])[0],
        claims.decide(
            ["text", *[sure] * 1, *(claims.Claim(f"{i}", claims.Estimate(0, 0.4, 100), -1, 1) for i in range(5))]
        ),
    )
    assert alone == "- sure: holds (0.00 ± 0.79)" and among[0] == "text"
    assert among[1] == "- sure: undecided (0.00 ± 0.79, no difference larger than 0.79)"
    assert claims.decide([claims.Claim("lost", claims.Estimate(-3.0, 0.3, 100), -1, 1)])[0].startswith(
        "- lost: does not hold"
    )
    assert claims.decide([claims.Claim("nothing", None, -1)]) == ["- nothing: not measured"]


def planted(c: float = 5.0) -> list[claims.Row]:
    """Rows whose held-out accuracy is a parabola in log beta with its top at beta = c / D."""
    return [
        {"projector_dim": d, "beta": x / d, "c": x, "seed": s, "held_out": 0.5 - 0.01 * math.log(x / c) ** 2,
         "linear": 0.5 - 0.01 * math.log(x / c) ** 2, "core_seconds": 1.0}
        for d in (64, 256, 1024) for x in (0.3125, 1.25, 5.0, 20.0, 80.0) for s in (0, 1, 2)
    ]  # fmt: skip


def projector(rows: list[claims.Row], folder: Path) -> str:
    lines = report.projector(rows, [20.0], claims.spread(rows), folder / "x.png")
    return "\n".join(claims.decide([*lines, *report.law(claims.gridded(rows))]))


def test_a_planted_law_is_found():
    rows = planted(c=7.0)
    assert math.isclose(claims.best_beta(rows, 256, 0), 7 / 256, rel_tol=1e-6)
    assert math.isclose(claims.slope(rows).mean, -1.0, rel_tol=1e-6)
    assert claims.tuned(rows, "c") == 5.0


def test_the_page_says_what_a_planted_law_implies(tmp_path: Path):
    text = projector(planted(), tmp_path)
    assert "D = 64, tuned, within 1 point of D = 1024, tuned: holds" in text
    assert "between -1.3 and -0.7, as claimed: holds" in text
    loss = 1.0 * math.log(16) ** 2  # points lost at D = 64 with D = 1024's beta
    assert f"best at D = 1024, D = 64 loses at least 5 points against D = 1024: holds ({loss:.2f} ± 0.00)" in text


def test_a_best_beta_at_the_edge_of_the_grid_is_marked(tmp_path: Path):
    text = projector(planted(c=7.0), tmp_path)
    assert "* |" not in text.split("### 2.")[1]
    text = projector(planted(c=1000.0), tmp_path)
    assert "* |" in text.split("### 2.")[1] and "best betas (*) lie at an edge of the grid" in text


@pytest.mark.parametrize("content", [None, "", "train: {}", "a: b: c"])
def test_a_study_that_is_none_is_one_line(tmp_path: Path, content: str | None):
    path = tmp_path / "study.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="study"):
        sweep.read(path)
    if content is None:
        with pytest.raises(UserError, match="no study"):
            report.main([path], tmp_path / "page.md")
        assert not (tmp_path / "page.md").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("views: 2, fraction: 1.0, budget: 0,", "fraction: 1.0, budget: 0,", "every run needs `views`.*not None"),
        ("views: [2, 4]", "views: two", "every run needs `views`.*not 'two'"),
        ("batch_size: 32", "batch_size: 0", "every run needs `batch_size`, a number of at least 1, not 0"),
        ("budget: 0", "budget: .nan", "every run needs `budget`"),
        ("epochs: 2", "epoch: 2", "epoch"),  # before anything is trained
        ("epochs: 2", "epochs: many", "'epochs'.*not an instance of int"),
        ("untrained: [{", "untrained: {a: [{", "line 5"),
        ("  untrained: [{", "  more: {views: 2}\n  untrained: [{", "'more'.*not a list"),
        ("train: {", "train: [{", "line 2"),
    ],
)
def test_a_study_that_cannot_be_is_one_line(study: Path, old: str, new: str, words: str):
    assert old in study.read_text()
    study.write_text(study.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=words) as refused:
        sweep.read(study)
    assert "\n" not in str(refused.value)


def run_of(v: int, b: int, fraction: float, budget: int, seed: int, linear: float) -> claims.Row:
    return {"views": v, "batch_size": b, "fraction": fraction, "budget": budget, "seed": seed, "linear": linear + 0.002 * seed,
            "steps": budget // b // v, "views_seen": budget, "core_seconds": budget / 1e4 / v, "peak_bytes": 2**20}  # fmt: skip


def text_of(lines: report.Lines) -> str:
    return "\n".join(claims.decide(lines))


def test_views_are_compared_at_equal_views_and_at_equal_epochs_by_both_batches(tmp_path: Path):
    cells = [(2, 100, 500, 0.30), (2, 100, 1000, 0.36), (4, 100, 1000, 0.33), (4, 50, 1000, 0.37), (8, 25, 1000, 0.38)]
    rows = [run_of(v, b, 1.0, budget, s, linear) for v, b, budget, linear in cells for s in (0, 1)]
    text = text_of(report.convergence(rows, [], claims.spread(rows), tmp_path / "x.png"))
    assert "| 1,000 | 100 images a step | 36.10 ± 0.26 | 33.10 ± 0.26 | - |" in text
    assert "| 1,000 | 200 views a step | 36.10 ± 0.26 | 37.10 ± 0.26 | 38.10 ± 0.26 |" in text
    assert "| 500 |" not in text  # nothing to compare with
    level = "at least level (0.5 below at most) with V = 2"
    assert f"100 images a step, 1,000 views: V = 4 {level}: does not hold (-3.00 ± 0.36)" in text
    assert f"200 views a step, 1,000 views: V = 4 {level}: holds (1.00 ± 0.36)" in text
    assert f"100 images a step, 1,000 views against 500: V = 4 {level}: holds (3.00 ± 0.36)" in text
    assert f"200 views a step, 1,000 views against 500: V = 4 {level}: holds (7.00 ± 0.36)" in text


def test_views_replace_images_only_where_images_are_worth_something(tmp_path: Path):
    cells = [(2, 100, 0.2, 0.30), (2, 100, 0.4, 0.36), (4, 50, 0.2, 0.355), (4, 50, 0.4, 0.40)]
    rows = [run_of(v, b, f, 1000, s, linear) for v, b, f, linear in cells for s in range(8)]
    text = text_of(report.images(rows, rows, claims.spread(rows), tmp_path / "x.png"))
    assert "V = 4 on 20% against V = 2 on 40%, within 1 point: undecided (-0.50" in text
    assert (
        "V = 2 on 20% loses against 40%: holds (6.00" in text
        and "V = 4 on 20% gains over V = 2 on 20%: holds (5.50" in text
    )
    assert (tmp_path / "x.png").exists()
    assert "against V" not in text_of(report.images(rows, [], claims.spread(rows), tmp_path / "x.png"))


def test_what_was_tuned_is_shown_for_each_v():
    rows = [{"views": v, "c": c, "held_out": (v + c) / 100} for v in (2, 4) for c in (5, 20)]
    text = text_of(report.tuning([*rows, {"views": 4, "c": 20, "lr": 0.1, "held_out": 0.5}]))
    assert "|  | c = 5 | c = 20 | c = 20, lr = 0.1 |" in text
    assert "| V = 2 | 7.00 | 22.00 | - |" in text and "| V = 4 | 9.00 | 24.00 | 50.00 |" in text
    assert report.tuning([]) == []


def test_numbers_come_back_as_they_were(tmp_path: Path, study: Path):
    found = sweep.read(study)
    rows = {sweep.name_of(s): {**s, "linear": 0.25, "shared": found.shared} for s in found.runs}
    sweep.write(found, tmp_path / "tiny.csv", rows)
    back = claims.rows_of(found, tmp_path / "tiny.csv", "views")
    assert len(claims.rows_of(found, tmp_path / "tiny.csv", "views", "again")) == 4  # a run of two grids counts once
    assert len(back) == 4 and np.mean([row["linear"] for row in back]) == 0.25
    assert {row["fraction"] for row in back} == {0.5, 1.0} and back[0]["views"] == 2


def test_the_front_is_what_nothing_beats():
    points = [(1.0, 9.0), (2.0, 9.5), (2.0, 7.0), (3.0, 8.0), (4.0, 7.0), (5.0, 1.0)]
    assert figures.front(points) == [(1.0, 9.0), (2.0, 7.0), (5.0, 1.0)]


def test_a_best_beta_among_too_few_is_left_out():
    rows = [r for r in planted() if r["projector_dim"] != 1024 or r["c"] < 2]
    extra = [{**planted()[0], "seed": 7}]  # more seeds of one cell, for its accuracy
    kept = claims.gridded([*rows, *extra])
    assert claims.values(kept, "projector_dim") == [64, 256] and claims.values(kept, "seed") == [0, 1, 2]
    assert claims.gridded(extra) == [] and report.law([]) == []


def test_the_headline_is_where_a_planted_curve_crosses_the_baseline(tmp_path: Path):
    """The mean grows by 2 points for every doubling of the views; V = 4 is 1 point ahead, so it needs 1/sqrt(2) of them."""

    def runs(v: int, d: int, budget: int, ahead: float) -> list[claims.Row]:
        accuracy = 0.3 + 0.02 * math.log2(budget / 1000) + ahead / 100
        return [run_of(v, 100 // v, 1.0, budget, seed, accuracy) | {"projector_dim": d} for seed in range(5)]

    rows = [*runs(2, 512, 4000, 0)]
    for budget in (1000, 2000, 4000):
        rows += [*runs(2, 64, budget, 0.0), *runs(4, 64, budget, 1.0), *runs(8, 64, budget, -3.0)]
    lines = headline.section(rows, claims.spread(rows), tmp_path / "x.png")
    text = text_of(lines)
    assert "The baseline: V = 2, D = 512, 4,000 views" in text
    assert "| V = 8, 12 images a step, D = 64 | not seen to cross it |" in text
    four = next(line for line in lines if isinstance(line, claims.Claim) and "V = 4" in line.text)
    assert four.value and four.value.mean == pytest.approx(100 / math.sqrt(2), rel=1e-3)
    # seeds are 0.2 points apart; three means, two of them half-way between; 2 points a doubling
    error = 0.2 * math.sqrt(2.5) / math.sqrt(5) * math.sqrt(1 + 0.5) * math.log(2) / 2
    assert four.value.error == pytest.approx(four.value.mean * error)
    assert "fewer views, in %: holds" in text
