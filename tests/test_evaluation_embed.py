"""tools/embed.py: features as a file, from shards and from image files, killed and gone on with."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from manyview.evaluation import embed as embedding
from manyview.evaluation import encoder as encoders
from manyview.evaluation import features
from manyview.evaluation.encoder import Asked
from manyview.pipeline import engines
from manyview.pipeline.errors import UserError
from manyview.pipeline.store import Store
from tests import patterns
from tests.conftest import program

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return patterns.shared(tmp_path_factory)


def write(encoder, data, to, **settings) -> dict:
    return embedding.embed(encoder, data, to, device=CPU, engine="auto", threads=1, **settings)


def test_shards_to_both_formats(made, tmp_path, monkeypatch):
    """Every sample of both splits, its name, label and class, and the features that the evaluation uses."""
    monkeypatch.setattr(embedding, "PART", 64)
    encoder = encoders.load(str(made[0][0]))
    for name in ("x.parquet", "x.npz"):
        write(encoder, made[1][0], tmp_path / name, batch=50)
    table = pq.read_table(tmp_path / "x.parquet")
    about = json.loads(table.schema.metadata[b"manyview"])
    assert about["transform"] == encoder.transform and about["weights"] == encoder.checkpoint
    with np.load(tmp_path / "x.npz") as content:
        assert json.loads(str(content["about"]))["transform"] == encoder.transform
        x, names, labels, splits = (content[n] for n in ("features", "names", "labels", "splits"))
        assert content["classes"].tolist() == list(patterns.CLASSES) or sorted(content["classes"]) == sorted(
            patterns.CLASSES
        )
    assert table["name"].to_pylist() == names.tolist() and len(names) == 260
    assert np.array_equal(np.array(table["features"].to_pylist(), np.float32), x)
    for split in ("train", "val"):
        store, rows = Store(made[1][0], split), splits == split
        engine = engines.create("cpu", store, threads=1)[0]
        expected = features.embed(encoder, store, np.arange(len(store)), engine)[:, 0]
        engine.close()
        torch.testing.assert_close(torch.from_numpy(x[rows]), expected, rtol=1e-4, atol=1e-5)
        assert names[rows].tolist() == [store.key(i) for i in range(len(store))]
        assert np.array_equal(labels[rows], store.labels)
        classes = [store.classes[label] for label in store.labels]
        assert [c for c, row in zip(table["class"].to_pylist(), rows) if row] == classes


def test_a_folder_of_files(made, tmp_path, capsys):
    """The pixels of files are those of shards; what is no image is named and left out; no labels are no hindrance."""
    encoder = encoders.load(str(made[0][0]))
    folder = patterns.images(tmp_path / "images", per_class={"train": 3})
    (folder / "train" / "ring" / "zzz.png").write_text("no image")
    about = write(encoder, folder, tmp_path / "x.npz")
    assert "left out: ring/zzz.png: not an image" in capsys.readouterr().out
    with np.load(tmp_path / "x.npz") as content:
        names, x, labels = content["names"].tolist(), content["features"], content["labels"]
    assert len(names) == 15 and about["classes"][labels[names.index("ring/0001.png")]] == "ring"
    data = patterns.make_shards(tmp_path / "images2", tmp_path / "shards", per_class={"train": 3})
    write(encoder, data, tmp_path / "y.npz")
    with np.load(tmp_path / "y.npz") as content:
        same = {name.removesuffix(".png"): row for name, row in zip(content["names"], content["features"])}
    for name, row in zip(names, x):
        key = next(k for k in same if k.endswith(name.removesuffix(".png")))
        np.testing.assert_allclose(row, same[key], rtol=1e-4, atol=1e-5)
    write(encoder, folder / "train" / "blob", tmp_path / "z.parquet")
    table = pq.read_table(tmp_path / "z.parquet")
    assert table["label"].null_count == len(table) == 3


def test_killed_and_gone_on_with(made, tmp_path, monkeypatch):
    """The same bytes as without the interruption, nothing computed twice; other weights or data are refused."""
    monkeypatch.setattr(embedding, "PART", 32)
    encoder = encoders.load(str(made[0][0]))
    write(encoder, made[1][1], tmp_path / "whole.npz", split="train")
    part, calls = embedding._part, []
    to = tmp_path / "x.npz"

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return part(*arguments)

    monkeypatch.setattr(embedding, "_part", dies)
    with pytest.raises(KeyboardInterrupt):
        write(encoder, made[1][1], to, split="train")
    assert not to.exists()
    other = encoders.load(str(made[0][1]))
    with pytest.raises(UserError, match=r"holds a part of something else \(other .*weights"):
        write(other, made[1][1], to, split="train")
    write(encoder, made[1][1], to, split="train")
    assert len(calls) == 3 + 2  # 125 images are four parts
    assert to.read_bytes() == (tmp_path / "whole.npz").read_bytes() and not list(tmp_path.glob("*.parts"))
    with pytest.raises(UserError, match=r"x\.npz exists"):
        write(encoder, made[1][1], to)


@pytest.mark.parametrize("network", [0, 1], ids=["resnet", "vit"])
def test_layers(made, network):
    """The last blocks side by side, one of them, all tokens: each against the network's own steps."""
    plain = encoders.load(str(made[0][network]))
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    last, one, tokens = (encoders.load(str(made[0][network]), Asked(layers=s)) for s in ("last:2", "layer:0", "tokens"))
    with torch.no_grad():
        maps = plain.module.forward_features(x)
        expected = maps.flatten(2).mT if maps.ndim == 4 else maps
        torch.testing.assert_close(tokens.module(x), expected)
        both = last.module(x)
        pooled = maps.mean((2, 3)) if maps.ndim == 4 else maps[:, 0]
        torch.testing.assert_close(both[:, -pooled.shape[1] :], pooled)
        assert both.shape[1] == (64 + 128 if network == 0 else 2 * 64) and one.module(x).shape[0] == 3
    assert encoders.untrained(last, 0).module(x).shape == both.shape
    assert features.describe(last, Store(made[1][0]), np.arange(2)) != features.describe(
        plain, Store(made[1][0]), np.arange(2)
    )
    for spec, words in (("last:0", "unknown layers"), ("las:2", "unknown layers"), ("layer:99", "has no layer:99")):
        with pytest.raises(UserError, match=words):
            encoders.select(plain, spec)


def test_messages(made, tmp_path):
    for words, said in (
        (("--to", tmp_path / "x.csv"), "must end in .parquet or .npz"),
        (("--to", tmp_path / "x.npz", "--split", "vla"), "no images in a split 'vla'"),
    ):
        done = program("tools/embed.py", made[0][0], "--data", made[1][0], *words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and said in done.stderr
