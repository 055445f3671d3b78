import csv
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from manyview.evaluation import compare, figures, report, tables
from manyview.pipeline.errors import UserError


def scipys(x, y) -> np.ndarray:
    return np.array([stats.spearmanr(x, y)[0], stats.pearsonr(x, y)[0], stats.kendalltau(x, y)[0]])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.floats(-1, 1)), min_size=5, max_size=30))
def test_coefficients_are_scipys(points):
    """To 1e-12, ties included."""
    x = np.array([p[0] for p in points], float)
    y = np.array([p[1] + 0.5 * round(p[2], 3) for p in points])
    ours = compare.coefficients(x, y)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert np.isnan(ours).all()
    else:
        np.testing.assert_allclose(ours, scipys(x, y), atol=1e-12)


def test_resampled_coefficients_are_those_of_the_repeated_points():
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 6, 12).astype(float), generator.normal(size=12)
    weights = generator.multinomial(12, [1 / 12] * 12, size=20)
    for w, found in zip(weights, compare.resampled(x, y, weights)):
        np.testing.assert_allclose(found, scipys(np.repeat(x, w), np.repeat(y, w)), atol=1e-12)


def test_bootstrap_draws_whole_runs():
    """Copies of a run's checkpoint are no new evidence: the interval stays, where drawing points would shrink it."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=12)
    y = x + generator.normal(size=12)
    runs = [f"run{i}" for i in range(12)]
    once = compare.bootstrap(x, y, runs)
    copied = compare.bootstrap(np.tile(x, 8), np.tile(y, 8), runs * 8)
    np.testing.assert_allclose(once, copied, atol=1e-9)
    alone = compare.bootstrap(np.tile(x, 8), np.tile(y, 8), [str(i) for i in range(96)])
    assert (alone[:, 1] - alone[:, 0] < 0.6 * (once[:, 1] - once[:, 0])).all()
    assert np.isnan(compare.bootstrap(x, y, ["one"] * 12)).all()


def test_bootstrap_covers():
    """Of 60 samples of 25 independent points with r = 0.6, the 95 % interval holds r in most."""
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(60):
        x = generator.normal(size=25)
        y = 0.6 * x + 0.8 * generator.normal(size=25)
        low, high = compare.bootstrap(x, y, [str(i) for i in range(25)], resamples=400)[1]
        held += low <= 0.6 <= high
    assert 50 <= held <= 60


def test_analytic_intervals():
    """The documented widths: r = 0.84 gives [0.67, 0.93] at n = 26, [0.45, 0.96] at 10, [0.09, 0.98] at 6."""
    for n, low, high in ((26, 0.67, 0.93), (10, 0.45, 0.96), (6, 0.09, 0.98)):
        assert compare.analytic(0.84, n, "pearson") == pytest.approx((low, high), abs=0.006)
    assert compare.analytic(0.84, 26, "spearman") == pytest.approx((0.63, 0.94), abs=0.006)
    assert compare.fisher_mean([0.5, 0.9]) == pytest.approx(np.tanh((np.arctanh(0.5) + np.arctanh(0.9)) / 2))


def rows(models: int, *, seed: int = 0, datasets=("own", "far"), protocols=("knn", "linear")) -> list[dict]:
    """Results of runs of quality 0..1, two checkpoints each, two backbones."""
    generator = random.Random(seed)
    made = []
    for m in range(models):
        quality = generator.random()
        for dataset in datasets:
            for protocol in protocols:
                value = 0.3 + 0.5 * quality + 0.05 * generator.random()
                made.append({
                    "run": f"run{m // 2}", "checkpoint": f"c{m}", "step": str(m), "backbone": ("resnet", "vit")[m // 2 % 2],
                    "method": "barlow", "pretrained_on": "own", "dataset": dataset, "mode": "retrained", "protocol": protocol,
                    "norm": "l2", "seed": 0, "weights": "trained", "metric": "top1", "value": value, "low": value - 0.02,
                    "high": value + 0.02, "n": 1000, "n_train": 5000, "sample": "same"
                })  # fmt: skip
    return made


def test_order_of_rows_does_not_matter():
    first = rows(12)
    other = first[:]
    random.Random(1).shuffle(other)
    assert compare.correlate(first) == compare.correlate(other)


def test_groups_counts_and_warnings():
    found = compare.correlate(rows(24))
    assert {c.group for c in found} == {"all", "resnet", "vit"}
    everything = [c for c in found if c.group == "all"]
    assert {c.n for c in everything} == {24}
    assert {c.runs for c in everything} == {12}
    assert all(c.note == "" and c.low <= c.r <= c.high for c in everything)
    few = compare.correlate(rows(8))
    assert all("n = 8 is small" in c.note for c in few if c.group == "all")
    none = compare.correlate(rows(4))
    assert all(c.r is None and "too few models" in c.note for c in none)
    assert all(c.n for c in found + few + none)
    mean = [
        a for a in compare.averages(found) if (a["group"], a["predictor"], a["kind"]) == ("all", "knn (l2)", "pearson")
    ]
    assert mean[0]["per_dataset"].keys() == {"far"}


def test_only_encoders_of_the_same_pretraining_data_are_ranked_together():
    """Two families, opposite within each other's data: mixed, their columns of two datasets would be one."""
    first, second = rows(12), [row | {"pretrained_on": "far", "run": f"other-{row['run']}"} for row in rows(12, seed=1)]
    found = compare.correlate(first + second)
    assert {(c.pretrained_on, c.dataset) for c in found} == {("own", "far"), ("far", "own")}
    assert [c for c in found if c.pretrained_on == "own"] == compare.correlate(first)
    unknown = [row | {"pretrained_on": ""} for row in second]
    assert compare.correlate(first + unknown) == compare.correlate(first)


def read(paths) -> list[dict]:
    return compare.rows(compare.contents(paths))


def write(folder, results):
    folder.mkdir(parents=True)
    (folder / "eval.json").write_text(json.dumps({"results": results}))
    return folder


def test_runs_of_one_name_are_two_runs(tmp_path):
    one = [write(tmp_path / side / "x", [r | {"run": "x", "checkpoint": side} for r in rows(1)]) for side in "ab"]
    assert {row["run"] for row in read(one)} == {path.as_posix() for path in one}
    assert {row["run"] for row in read(one[:1])} == {"x"}
    sizes = [
        write(tmp_path / f"{n}px", [r | {"run": "y", "checkpoint": f"c {n}px"} for r in rows(1)]) for n in (64, 96)
    ]
    assert {row["run"] for row in read(sizes)} == {"y"}  # the same weights


@pytest.mark.parametrize("change", [{"n_train": 100, "sample": "part"}, {"sample": "other"}])
def test_other_images_are_not_mixed(tmp_path, change):
    """Nor where they are as many: another seed's test images are other questions."""
    full = write(tmp_path / "full", [r | {"run": "full"} for r in rows(1)])
    part = write(tmp_path / "part", [r | {"run": "part"} | change for r in rows(1)])
    with pytest.raises(UserError, match=r"far was measured on different images: (full|part) with .*, (full|part) with"):
        read([full, part])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"results": [{"run": "x"}]}', '{"results": 3}', '{"schema": 1}'])
def test_what_is_no_evaluation_gets_one_line(tmp_path, text):
    write(tmp_path / "run", [])
    (tmp_path / "run" / "eval.json").write_text(text)
    for path in (tmp_path / "run", tmp_path / "run" / "eval.json"):
        with pytest.raises(UserError, match=r"run/eval\.json: not an eval\.json of this version"):
            read([path])
    with pytest.raises(UserError, match=r"rnu: no such run"):
        read([tmp_path / "run", tmp_path / "rnu"])


def test_one_dataset_is_held_against_the_others_over_all_encoders():
    """By name, whatever they were pre-trained on; the same coefficients as over encoders of one pre-training set."""
    known = compare.correlate(rows(12))
    mixed = [row | {"pretrained_on": ("own", "imagenet", "")[int(row["step"]) % 3]} for row in rows(12)]
    found = compare.correlate(mixed, reference="own")
    assert [(c.r, c.low, c.n, c.group, c.dataset) for c in found] == [
        (c.r, c.low, c.n, c.group, c.dataset) for c in known
    ]
    assert {(c.pretrained_on, c.measured_on) for c in found} == {("any", "own")}
    assert {c.dataset for c in compare.correlate(mixed, reference="far")} == {"own"}
    assert compare.averages(found)[0]["per_dataset"].keys() == {"far"}
    with pytest.raises(UserError, match="unknown dataset 'owm'; nearest: own"):
        compare.correlate(mixed, reference="owm")


def test_encoders_side_by_side(tmp_path):
    """A row each, the best first, with its own interval; the baselines once; variants of the same weights are two encoders."""
    facts = {"train": 5000, "test": 1000, "classes": ["a", "b"], "shift": "unknown", "notes": ["a note"], "untrained": "random",
             "pixels": "pixels at 32 px"}  # fmt: skip
    for m in range(6):
        common = rows(1)[0] | {"run": f"run{m}", "checkpoint": f"c{m}" + " 64px" * (m == 5), "text": "",
                               "protocol": "linear-sweep", "norm": "bn"}  # fmt: skip
        own = [
            common | {"dataset": dataset, "weights": w, "metric": metric, "value": 0.3 + m / 10 + (w == "trained") / 20,
                      "low": 0.38, "high": 0.42}
            for dataset in ("own", "far") for w in ("trained", "untrained", "pixels")
            for metric in ("top1", "mean_per_class", "top5")
        ]  # fmt: skip
        content = {
            "run": f"run{m}", "backbone": "net", "pretrained_on": "own", "image_size": 32, "transform": "t", "sha256": "f" * 64,
            "source": "checkpoints/step-000000010.pt" if m == 4 else "s", "step": "10", "loaded": "", "trained_by": "",
            "evaluated_by": f"python evaluate {m}", "datasets": {"own": facts, "far": facts}, "results": own,
        }  # fmt: skip
        (tmp_path / f"run{m}").mkdir()
        (tmp_path / f"run{m}" / "eval.json").write_text(json.dumps(content))
    contents = compare.contents(sorted(tmp_path.glob("run*")))
    pairs = compare.correlate(compare.rows(contents), reference="own")
    facts = {"versions": {"torch": "9"}, "commit": "abc", "python": "3", "device": "cpu", "threads": 2}
    text = tables.comparison(contents, pairs, "python tools/evaluate.py compare", facts)
    names = [line.split(" |")[0] for line in text.partition("## far")[0].splitlines() if line.startswith("| ")]
    assert names[2:4] == ["| run5, 64px", "| *net untrained, 32 px*"] and names.count("| *pixels at 32 px*") == 1
    assert (
        "| run4, step 10 | 75.00 ± 2.00 |" in text
        and "a note" in text
        and text.count("evaluated by: python evaluate") == 6
    )
    assert "| own | linear-sweep (bn) | +1.00 [+1.00, +1.00] |" in text and "over 6 to 6 encoders of 6 runs" in text


def test_label_free_scores_untrained_networks_and_other_modes_are_not_ranked():
    extra = rows(12)
    for changed, change in zip(extra, ({"metric": "rankme"}, {"weights": "untrained"}, {"mode": "in-domain probe"})):
        changed.update(change)
    kept = {k: len(v) for k, v in compare.table(extra).items()}
    assert sum(kept.values()) == len(extra) - 3


def test_files_report_and_pictures(tmp_path):
    for i, part in enumerate(np.array_split(np.arange(96), 6)):
        folder = tmp_path / f"run{i}"
        folder.mkdir()
        (folder / "eval.json").write_text(json.dumps({"results": [rows(24)[j] for j in part]}))
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("beside the runs, as runs/* finds it")
    found = read(sorted(tmp_path.glob("*")))
    assert len(found) == 96
    out = tmp_path / "comparison"
    correlations = compare.write(found, out)
    pictures = figures.comparison(found, correlations, out)
    page = report.comparison(out, correlations, compare.averages(correlations), pictures).read_text()
    assert page.count("data:image/png;base64,") == len(pictures) == 2
    with (out / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 96
    with (out / "correlations.csv").open() as file:
        assert {r["n"] for r in csv.DictReader(file) if r["group"] == "all"} == {"24"}


def test_runs_without_results_are_named(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=r"a: no eval.json there; make it with `python tools/evaluate.py"):
        read([tmp_path / "a"])
