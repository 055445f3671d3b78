"""The objective's profiler: the peers are what they say, memory and work are counted right, and the rows are whole."""

import json

import pytest
import torch

from manyview.bench import objective as profiler
from manyview.pipeline.errors import UserError

CPU = torch.device("cpu")


def tasks(v: int, b: int, d: int, left_out=None) -> dict[str, profiler.Task]:
    torch.manual_seed(0)
    return {task.form: task for task in profiler.tasks_of([v], d, b, CPU, [] if left_out is None else left_out)}


def value(task: profiler.Task) -> float:
    argument = task.leaves[0] if len(task.leaves) == 1 else task.leaves
    return sum(term.item() for term in task.terms(argument))


def test_every_form_is_there_and_peers_compute_the_same_loss():
    left_out: list[str] = []
    found = tasks(4, 256, 8, left_out)
    assert {"ours-mean", "ours-cross", "ours-vicreg", "pairwise", "leave-one-out", "lightly-pairs"} <= set(found)
    assert not left_out
    z = torch.randn(1, 256, 8) + 0.5 * torch.randn(4, 256, 8)
    for task in found.values():
        task.leaves = [z] if len(task.leaves) == 1 else list(z)
    # Six pairs, and deviations divided by B - 1 or B: the same sum to a few per cent.
    assert abs(value(found["pairwise"]) / value(found["lightly-pairs"]) - 1) < 0.05
    assert abs(value(found["pairwise"]) / (6 * value(found["ours-pairs"])) - 1) < 0.05
    two = tasks(2, 256, 8)
    for task in two.values():
        task.leaves = [z[:2]] if len(task.leaves) == 1 else list(z[:2])
    assert abs(value(two["leave-one-out"]) / value(two["pairwise"]) - 1) < 1e-5


def test_peak_memory_and_work_of_a_known_step():
    """exp keeps its result for the backward, whose own result is the gradient: twice the input, and one product."""
    x = torch.randn(1000, 1000, requires_grad=True)
    task = profiler.Task("known", lambda z: [z.exp().sum() + (z[:8] @ z).sum()], [x], 2, 1000, 8, at_once=True)
    profiler.run([task], 2, CPU)
    row, square = task.row(), 4 * 1000 * 1000
    assert 2 * square <= row["peak_bytes"] < 4.2 * square  # the product's gradient of z is added to exp's
    assert row["product_flops"] == 3 * 2 * 8 * 1000 * 1000
    assert row["product_ms"] > 0 and row["repeats"] == 2
    task.terms = lambda z: [z.exp().sum()]
    profiler.look(task, CPU)
    assert task.peak_bytes == pytest.approx(2 * square, rel=0.01)


def test_backward_after_each_term_gives_the_same_gradient():
    gradients = []
    for at_once in (True, False):
        task = tasks(3, 16, 8)["pairwise"]
        task.at_once = at_once
        task.step()
        gradients.append(torch.stack([leaf.grad for leaf in task.leaves]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_what_does_not_fit_is_said(monkeypatch):
    monkeypatch.setattr(profiler, "free_bytes", lambda device: 2 * 4 * 4 * 64**2 * 3)  # room for under three products
    left_out: list[str] = []
    found = tasks(4, 8, 64, left_out)
    assert "ours-pairs" not in found and left_out[0].startswith("ours-pairs at V=4, D=64")
    assert not found["pairwise"].at_once and found["pairwise"].notes == ["apart"]
    assert found["ours-mean"].at_once


@pytest.mark.slow
def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(profiler, "CLAIMED_DIM", 16)
    file = tmp_path / "objective.json"
    small = ["--batch-size", "8", "--rounds", "2", "--backbone", "resnet10-narrow", "--sizes", "16"]
    profiler.main(["--views", "2,8", "--dim", "16", "--json", str(file), *small])
    result = json.loads(file.read_text())
    assert {"form", "views", "dim", "batch", "ms", "peak_bytes"} <= set(result["rows"][0])
    forms = {row["form"] for row in result["rows"]}
    assert len(result["rows"]) == len(forms) * 2 and all(row["ms"] > 0 for row in result["rows"])
    assert {row["dim"] for row in result["share"]} == {16}
    assert all(0 < row["objective_share"] < 1 for row in result["share"])
    page = (tmp_path / "objective.md").read_text()
    assert page.strip() == capsys.readouterr().out.strip()
    assert "`mean` against `pairwise` at V = 8" in page and "Share of a resnet10-narrow step" in page


def test_bad_numbers_are_named():
    for flag, text in (("--views", "2,x"), ("--views", "1,2"), ("--dim", "0"), ("--dim", "")):
        with pytest.raises(UserError, match=flag):
            profiler.main([flag, text])
