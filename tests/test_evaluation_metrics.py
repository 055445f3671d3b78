import json

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, balanced_accuracy_score

from manyview.evaluation import metrics, tables, targets


def scores_of(predictions: list[int], classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(predictions), classes).double()


def test_hand_counted_scores():
    truth = torch.tensor([0, 0, 0, 1, 2, 2])
    found = metrics.score(scores_of([0, 0, 1, 1, 2, 0], 3), truth)
    assert found.top1 == pytest.approx(4 / 6)
    assert found.mean_per_class == pytest.approx((2 / 3 + 1 + 1 / 2) / 3)
    assert found.top5 is None  # fewer than five classes
    assert found.n == 6
    assert metrics.confusion(scores_of([0, 0, 1, 1, 2, 0], 3), truth).tolist() == [[2, 1, 0], [0, 1, 0], [1, 0, 1]]


def test_top5_and_classes_without_test_images():
    scores = torch.arange(8.0).repeat(8, 1)  # always 7, 6, 5, 4, 3
    found = metrics.score(scores, torch.arange(8))
    assert (found.top1, found.top5) == (1 / 8, 5 / 8)
    assert metrics.score(scores[:3], torch.tensor([7, 7, 0])).mean_per_class == 0.5  # of the two classes that occur


def test_wilson_interval():
    """Against Newcombe 1998, table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for correct, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert metrics.wilson(correct, n) == pytest.approx((low, high), abs=1e-4)
    assert metrics.wilson(20, 20)[1] == 1


def test_lift_interval():
    """Against Newcombe 1998 (differences), method 10: 56/70 - 48/80 = 0.2 [0.0524, 0.3339]."""
    a, b = (metrics.Score(c / n, None, 0, *metrics.wilson(c, n), n) for c, n in ((56, 70), (48, 80)))
    assert metrics.lift(a, b) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)


@pytest.mark.parametrize("n,distinct", [(80, 1000), (200, 3), (500, 40)])
def test_detection_of_the_rarer_of_two_classes(n, distinct):
    """Average precision against scikit-learn's, with ties too; its interval against resampling by hand; balanced accuracy."""
    random = np.random.default_rng(n)
    truth = (random.random(n) < 0.65).astype(int)
    ahead = np.floor(distinct * (0.4 * truth + random.random(n))) / distinct
    scores = torch.tensor(np.stack([1.3 - ahead, ahead], 1))
    found = metrics.score(scores, torch.from_numpy(truth))
    value, low, high = found.detection
    assert value == pytest.approx(average_precision_score(truth == 0, -ahead), abs=1e-12)  # class 0 is the rarer one
    again = [random.integers(n, size=n) for _ in range(500)]
    by_hand = np.quantile([average_precision_score(truth[i] == 0, -ahead[i]) for i in again], (0.025, 0.975))
    assert (low, high) == pytest.approx(tuple(by_hand), abs=0.05) and low < value < high
    answers = scores.argmax(1).numpy()
    assert found.mean_per_class == pytest.approx(balanced_accuracy_score(truth, answers))
    drawn = [balanced_accuracy_score(truth[i], answers[i]) for i in again]
    assert (found.mean_low, found.mean_high) == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))), abs=0.06)
    assert metrics.score(scores, torch.ones(n, dtype=torch.long)).detection is None  # nothing to be detected
    votes = scores.clamp(0) * torch.tensor(random.integers(1, 9, (n, 1)))  # as kNN gives: their share counts
    assert metrics.score(votes, torch.from_numpy(truth)).detection[0] == pytest.approx(
        average_precision_score(truth == 0, (votes[:, 0] / votes.sum(1)).numpy().round(9)), abs=1e-12
    )


def test_two_classes_have_a_table_of_their_own():
    rows = [row("trained", 0.8), row("untrained", 0.5), row("trained", 0.9, metric="top5")]
    assert tables.two_classes(rows, "d") == []
    for metric in ("mean_per_class", "average_precision"):
        rows += [row("trained", 0.75, metric=metric), row("untrained", 0.6, metric=metric)]
    header, line = tables.two_classes(rows, "d")
    assert line == ("knn k=20", "l2", *2 * ("75.00 [65.70, 82.45]", "", "60.00 [50.20, 69.06]"))
    assert header[2] == "balanced %, trained" and header[-1] == "AP %, untrained"


def test_majority_class():
    found = metrics.majority(torch.tensor([0, 1, 1, 2]), torch.tensor([1, 0, 1, 1]), 5)
    assert found.top1 == 0.75


def row(weights: str, value: float, *, seed: int = 0, protocol: str = "knn k=20", metric: str = "top1") -> dict:
    low, high = metrics.wilson(round(value * 100), 100)
    return {"dataset": "d", "mode": "retrained", "protocol": protocol, "norm": "l2", "text": "t", "seed": seed, "n": 100,
            "weights": weights, "metric": metric, "value": value, "low": low, "high": high}  # fmt: skip


def test_lines_put_the_baselines_beside_the_number():
    rows = [row("trained", 0.8), row("untrained", 0.5), row("untrained", 0.1, protocol="majority class")]
    rows += [row("trained", 0.75, metric="mean_per_class"), row("trained", 0.9, metric="top5"), row("pixels", 0.85)]
    (line,) = tables.lines(rows)
    assert (line.top1, line.untrained, line.majority, line.mean_per_class) == (0.8, 0.5, 0.1, 0.75)
    assert line.lift == pytest.approx(0.3)
    assert line.lift_low < 0.3 < line.lift_high
    assert tables.cells(line)[2:6] == ("80.00", "[71.12, 86.66]", "85.00", "50.00")
    assert tables.cells(line)[6] == "+30.00 [+16.91, +41.70]"
    content = {"results": rows}
    assert tables.headline(content, "d") == "d, knn k=20 (l2): pixels 85.0 %, untrained 50.0 %, trained 80.0 %"
    assert tables.below_pixels(content, "d") == (
        "d: the trained encoder is below plain pixels in 1 of 1 protocols, most in knn k=20 (l2), 80.00 against 85.00 %"
    )
    assert tables.below_pixels({"results": [r for r in rows if r["weights"] != "pixels"]}, "d") == ""


def test_lines_of_several_draws_have_a_deviation_instead():
    rows = [row("trained", v, seed=i) for i, v in enumerate((0.4, 0.5, 0.6))]
    rows += [row("trained", 0.5, seed=i, metric=m) for i in range(3) for m in ("top5", "mean_per_class")]
    (line,) = tables.lines(rows)
    assert (line.top1, line.std, line.draws, line.low) == (pytest.approx(0.5), pytest.approx(0.1), 3, None)
    assert tables.spread(line) == "± 10.00 (3 draws)"
    assert tables.lifted(line) == ""  # nothing to hold it against


def test_markdown_names_its_command():
    rows = [row("trained", 0.8), row("untrained", 0.5)] + [
        row("trained", 0.7, metric=m) for m in ("top5", "mean_per_class")
    ]
    facts = {
        "train": 400,
        "test": 100,
        "classes": ["a", "b"],
        "shift": "unknown",
        "notes": ["a note"],
        "untrained": "random",
    }
    content = {"run": "r", "backbone": "net", "pretrained_on": "d", "image_size": 32, "transform": "t", "sha256": "f" * 64,
               "source": "s", "checkpoint": "c" * 64, "trained_by": "python train.py",
               "datasets": {"d": facts}, "results": rows}  # fmt: skip
    facts = {"versions": {"torch": "9"}, "commit": "abc", "python": "3", "device": "cpu", "threads": 2}
    text = tables.markdown([json.loads(json.dumps(content))], "python tools/evaluate.py runs/r", facts)
    assert "Made by `python tools/evaluate.py runs/r`" in text
    assert "| knn k=20 | l2 | 80.00 | [71.12, 86.66] |  | 50.00 |" in text
    assert "400 training and 100 test images, 2 classes; untrained: random; a note" in text


def test_what_a_known_dataset_lacks_is_said():
    train, test = np.repeat(np.arange(10), 5000), np.repeat(np.arange(10), 1000)
    assert targets.differences("cifar10", train, test, 10) == []
    assert "JPEG copy" in targets.differences("cifar10", train, test, 10, jpeg=True)[0]
    assert targets.differences("cifar10", train[:40000], test, 10) == [
        "2 of 10 classes have no train image",
        "40,000 training images, where the set has 50,000",
    ]
    assert targets.differences("mine", train, test[:9000], 10) == ["1 of 10 classes have no test image"]
    assert len(targets.TARGETS) >= 5


def test_a_class_without_a_vote_is_no_hit():
    """Of votes and counts; a logit of 0 or less is an answer like any other."""
    votes = torch.zeros(4, 20)
    votes[:, 7] = 3.0
    votes[1, 2] = 1.0
    found = metrics.score(votes, torch.tensor([7, 2, 0, 1]))
    assert (found.top1, found.top5) == (0.25, 0.5)
    assert metrics.score(torch.zeros(3, 6), torch.tensor([0, 0, 0])).top1 == 0
    logits = -torch.arange(20.0).repeat(4, 1)
    assert metrics.score(logits, torch.tensor([0, 1, 4, 5])).top5 == 0.75
    assert metrics.majority(torch.tensor([3, 3, 2]), torch.tensor([3, 0]), 10).top5 == 0.5
