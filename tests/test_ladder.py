"""The ladder: its rows made and resumed, its page; k-means features and EMP-SSL's loss held against their definitions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import conftest
import pytest
import torch
import torch.nn.functional as F

from manyview.pipeline.errors import UserError
from manyview.study import kmeans, ladder, peers

TEXT = """
data: {data}
notes: [of handwritten digits]
rows:
  pixels: {{pixels: true}}
  k-means: {{kmeans: 12, seeds: [0, 1]}}
  ours:
    train: {{backbone: "resnet18:layers=[1,1,1,1],channels=[4,4,4,8]", size: 8, augment: [size=6], batch_size: 16, projector_dim: 8}}
    core_hours: [0.0001]
"""  # noqa: E501


@pytest.fixture
def file(tmp_path: Path, digits: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TEXT.format(data=digits))
    return path


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(256, (12, 3, 11, 11), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_kmeans_features_are_sums_over_quadrants_of_how_much_nearer_than_the_mean(images, monkeypatch):
    monkeypatch.setattr(kmeans, "SAMPLES", 500)
    found = kmeans.KMeans(images, 7, seed=0)
    features = found(images)
    assert features.shape == (12, 4 * 7)
    expected = torch.zeros(2, 2, 7)
    for top in range(6):
        for left in range(6):
            patch = images[5, :, top : top + 6, left : left + 6].float().flatten()
            patch = (patch - patch.mean()) / (patch.var() + 10).sqrt()
            distance = (((patch - found.mean) @ found.whiten) - found.centroids).norm(dim=1)
            expected[top // 3, left // 3] += (distance.mean() - distance).clamp_min(0)
    torch.testing.assert_close(features[5], expected.flatten(), rtol=1e-3, atol=1e-3)


def test_kmeans_whitens_and_each_centroid_is_the_mean_of_its_patches(images, monkeypatch):
    monkeypatch.setattr(kmeans, "SAMPLES", 3000)
    monkeypatch.setattr(kmeans, "WHITENING", 1e-6)
    found = kmeans.KMeans(images, 3, seed=1)
    x = kmeans._sample(images, torch.Generator().manual_seed(1))
    white = (x - found.mean) @ found.whiten
    spectrum = torch.linalg.eigvalsh(torch.cov(white.T))
    assert spectrum[-1] == pytest.approx(1, abs=1e-2) and (spectrum > 0.9).sum() >= 100  # 3 of 108: a patch's own mean
    apart = torch.cdist(white, found.centroids)
    moved = [white[apart.argmin(1) == k].mean(0) for k in range(3)]
    before = apart.min(1).values.square().mean()
    assert torch.cdist(white, torch.stack(moved)).min(1).values.square().mean() <= before


def test_the_coding_rate_is_that_of_the_definition():
    z = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    unit = F.normalize(z, dim=-1)
    rate = [torch.logdet(torch.eye(4) + 4 / (5 * 0.2) * w.T @ w) / 2 for w in unit]
    mean = unit.mean(0)
    alike = torch.stack([F.cosine_similarity(w, mean, dim=-1).mean() for w in unit]).mean()
    torch.testing.assert_close(peers.coding_rate(list(z)), -200 * alike - torch.stack(rate).mean())


def test_a_peers_rate_rises_and_falls():
    assert [peers.schedule(done, 0.1) for done in (0.05, 0.1, 0.55, 1, 2)] == pytest.approx([0.5, 1, 0.5, 0, 0])
    assert [peers.schedule(done, 0) for done in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])


@pytest.mark.parametrize("name", peers.RECIPES)
def test_a_peer_trains_by_its_own_views_head_and_loss_and_goes_on(name, digits, tmp_path, monkeypatch):
    recipe = dataclasses.replace(peers.RECIPES[name], batch=4)
    monkeypatch.setitem(peers.RECIPES, name, recipe)
    monkeypatch.setattr(peers, "SAVE_EVERY", 0)
    monkeypatch.setattr(peers, "SIZE", 8)
    first = peers.train(name, digits, tmp_path, 0.1, 0, "fp32")
    again = peers.train(name, digits, tmp_path, first["core_seconds"] + 0.1, 0, "fp32")
    assert again["steps"] > first["steps"] >= 1 and again["core_seconds"] > first["core_seconds"]
    assert again["views"] == again["steps"] * 4 * (20 if name == "emp-ssl" else 2)
    assert (tmp_path / "backbone.safetensors").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("pixels: true", "pixls: true", "pixls"),
        ("pixels: true", "seeds: [0]", "one of train, peer, kmeans, pixels"),
        ("rows:", "row:", "has `data` and `rows`"),
        ("{pixels: true}", "null", "not a dict"),
        ("pixels: true", "pixels: true, seeds: 0", "'seeds'.*not a list"),
        ("pixels: true", "pixels: true, core_hours: [long]", "'core_hours'.*float"),
        ("{pixels: true}", "[", "is not YAML.*line"),
    ],
)
def test_a_ladder_that_cannot_be_is_refused(file, old, new, words):
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(UserError, match=words):
        ladder.read(file)


def test_a_rung_or_a_seed_that_no_row_has_is_said(file, tmp_path):
    for words in (["--core-hours", "7"], ["--only", "ours", "--core-hours", "0"], ["--only", "ours", "--seeds", "5"]):
        done = conftest.program("tools/ladder.py", file, "--out", tmp_path / "l.csv", *words)
        assert done.returncode == 2 and "no row has these --core-hours and --seeds; rungs" in done.stderr, done.stderr
    assert not (tmp_path / "l.md").exists()


@pytest.mark.slow
def test_rows_are_made_once_and_the_page_says_what_is_pending(file, tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "TRIAL", 0.1)
    monkeypatch.setattr(kmeans, "PATCH", 4)
    monkeypatch.setattr(kmeans, "SAMPLES", 2000)
    monkeypatch.setattr(
        ladder, "_call", lambda flags: conftest.train(*flags)
    )  # without the seconds that a process takes
    found, out = ladder.read(file), tmp_path / "ladder.csv"
    assert [row.key for row in found.rows][1:3] == [("k-means", "0", "0"), ("k-means", "0", "1")]
    assert ladder.run(found, out, tmp_path / "runs", found.rows, "fp32") == 0
    lines = ladder.finished(out)
    pixels, ours = lines["pixels", "0", "0"], lines["ours", "0.0001", "0"]
    assert float(pixels["linear"]) > 0.9 and float(lines["k-means", "0", "1"]["linear"]) > 0.9
    assert 0.1 < float(ours["core_seconds"]) < 5 and int(ours["views"]) == int(ours["steps"]) * 4 * 16
    assert "--augment size=6" in ours["command"] and float(ours["tflop"]) > 0 and ours["features"] == "8"
    before = out.read_text()
    monkeypatch.setattr(ladder, "make", None)
    assert ladder.run(found, out, tmp_path / "runs", found.rows, "fp32") == 0 and out.read_text() == before
    page = ladder.report(found, out, "make it so")
    assert "pending" not in page and "of handwritten digits" in page and f"{100 * float(pixels['knn']):.2f}" in page
    file.write_text(file.read_text().replace("kmeans: 12", "kmeans: 13"))
    assert "| k-means | - | 0 of 2 | pending" in ladder.report(ladder.read(file), out, "make it so")
