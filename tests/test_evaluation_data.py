"""What is evaluated on, what the encoder is shown, and what is refused before anything is measured."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms

from manyview.evaluation import command as cli
from manyview.evaluation import compare, features, finetune, knn, protocols, suite
from manyview.evaluation import encoder as encoders
from manyview.evaluation.data import open_data
from manyview.evaluation.encoder import Asked
from manyview.evaluation.features import BicubicEngine
from manyview.model import backbone
from manyview.pipeline import engines, views
from manyview.pipeline.convert.write import write_shards
from manyview.pipeline.errors import UserError
from manyview.pipeline.manifest import Options
from manyview.pipeline.store import Store
from tests import patterns


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return patterns.shared(tmp_path_factory)


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """60 images without labels, in one folder: no val split."""
    folder = tmp_path_factory.mktemp("flat")
    images = patterns.images(folder / "images", per_class={"train": 12})
    (folder / "all").mkdir()
    for path in images.glob("train/*/*.png"):
        shutil.move(path, folder / "all" / f"{path.parent.name}-{path.name}")
    write_shards(Options("folder", encoding="raw"), folder / "all", folder / "shards", jobs=1, quiet=True)
    return folder / "shards"


def evaluate(target, out, **settings) -> dict:
    settings = {"device": "cpu", "plots": False, "epochs": 5, "out": out} | settings
    return cli.evaluate(str(target), cli.Config(targets=(str(target),), **settings), cli.start("cpu"))


# ---------------------------------------------------------------------------------------------------------- datasets


def test_a_labelled_set_without_val_gives_a_tenth(made, tmp_path):
    """Of each class, disjoint from what is learnt from, the same for one seed, and said; they are other images than all."""
    path = patterns.make_shards(tmp_path / "images", tmp_path / "shards", per_class={"train": 30})
    asked = protocols.choose(["knn"])
    data = open_data(path, asked)
    assert (len(data.train_ids), len(data.test_ids)) == (135, 15)
    assert not set(data.train_ids) & set(data.test_ids)
    assert torch.bincount(data.labels("test")).tolist() == [3] * 5
    assert data.notes == ["no val split: a tenth of each class (seed 0) is held out to be tested on"]
    assert np.array_equal(open_data(path, asked).test_ids, data.test_ids)
    assert not np.array_equal(open_data(path, asked, seed=1).test_ids, data.test_ids)
    assert open_data(path, asked, seed=1).sample != data.sample
    content = evaluate(made[0][0], tmp_path / "out", data=(path,), protocols=("knn",))
    assert {line["n"] for line in content["table"]} == {15}


def test_images_without_labels_are_measured_without(made, flat, tmp_path):
    """By default what can be is, and it is said; what needs labels, asked for by name, is refused."""
    content = evaluate(made[0][0], tmp_path / "a", data=(flat,))
    assert {row["protocol"] for row in content["results"]} == {"rankme", "rankme centred", "alpha-req"}
    assert content["datasets"]["shards"]["notes"] == [
        "its train split has no labels: only label-free can be measured here"
    ]
    with pytest.raises(UserError, match="its train split has no labels: only `--protocols label-free lidar`"):
        evaluate(made[0][0], tmp_path / "b", data=(flat,), protocols=("knn",))
    assert not (tmp_path / "b").exists()


def test_an_encoder_of_a_flat_folder(made, flat, tmp_path):
    """Its own data have no val split and no labels: they are read for the overlap alone, and for label-free scores."""
    run = patterns.make_run(tmp_path / "run", flat, "smoke-resnet")
    content = evaluate(run, tmp_path / "out", data=(made[1][1],), protocols=("ridge", "overlap"))
    assert {row["protocol"].split()[0] for row in content["results"]} == {"majority", "ridge", "overlap"}
    own = evaluate(run, tmp_path / "own", protocols=("label-free", "lidar"))
    assert {row["metric"] for row in own["results"]} == {"rankme", "alpha", "lidar"}


# ------------------------------------------------------------------------------------------------------- plain folders


def test_a_folder_of_files_is_evaluated_as_its_shards_are(made, tmp_path):
    """The same scores, whatever the order; what is no image is left out and said; other bytes are other images."""
    folder = patterns.images(tmp_path / "images", per_class={"train": 8, "val": 4})
    write_shards(Options("folder", encoding="raw"), folder, tmp_path / "shards", jobs=1, quiet=True)
    (folder / "train" / "blob" / "0.png").write_text("no image")
    run, asked = made[0][0], {"protocols": ("knn", "label-free", "overlap")}
    files, shards = (evaluate(run, tmp_path / name, data=(tmp_path / name,), **asked) for name in ("images", "shards"))
    values = [
        {
            (r["protocol"], r["norm"], r["weights"], r["metric"]): r["value"]
            for r in c["results"]
            if r["weights"] != "untrained"
        }
        for c in (files, shards)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-4) and len(values[0]) > 12
    (facts,) = files["datasets"].values()
    assert (facts["train"], facts["test"], facts["classes"]) == (40, 20, sorted(patterns.CLASSES))
    assert "1 files of train left out, first blob/0.png: not an image" in "; ".join(facts["notes"])
    before = open_data(folder, protocols.choose(["knn"])).sample
    assert before == open_data(folder, protocols.choose(["knn"])).sample
    shutil.copy(folder / "val" / "ring" / "0001.png", folder / "val" / "ring" / "0002.png")
    assert open_data(folder, protocols.choose(["knn"])).sample != before


def test_folders_without_val_without_labels_and_with_a_table(made, tmp_path):
    """A tenth held out, label-free, and labels by name; a folder of nothing is refused."""
    folder = patterns.images(tmp_path / "images", per_class={"train": 10}) / "train"
    data = open_data(folder, protocols.choose(["knn"]))
    assert (len(data.train_ids), len(data.test_ids), data.name) == (45, 5, "train")
    assert "a tenth of each class (seed 0) is held out" in data.notes[0]
    content = evaluate(made[0][0], tmp_path / "a", data=(folder / "ring",))
    assert {row["protocol"] for row in content["results"]} == {"rankme", "rankme centred", "alpha-req"}
    table = tmp_path / "labels.csv"
    table.write_text("file,label\n" + "".join(f"{i:04}.png,{'even' if i % 2 else 'odd'}\n" for i in range(10)))
    content = evaluate(made[0][0], tmp_path / "b", data=(folder / "ring",), protocols=("ridge",), labels=table)
    assert content["datasets"]["ring"]["classes"] == ["even", "odd"] and content["datasets"]["ring"]["test"] == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: neither shards nor a folder of images"):
        evaluate(made[0][0], tmp_path / "c", data=(tmp_path / "empty",))


# ---------------------------------------------------------------------------------------------------------- baselines


def test_pixels_stand_beside_every_score(made, tmp_path):
    """The same protocol on the pixels themselves, by hand."""
    content = evaluate(made[0][0], tmp_path, data=(made[1][1],), protocols=("knn", "label-free"))
    assert all(line["pixels"] is not None for line in content["table"])
    bank, queries = (Store(made[1][1], split) for split in ("train", "val"))
    x, q = (
        torch.stack([torch.from_numpy(s.read(i).copy()) for i in range(len(s))]).permute(0, 3, 1, 2).flatten(1) / 255
        for s in (bank, queries)
    )
    votes = knn.cosine_exp(x, torch.from_numpy(np.array(bank.labels)), q, k=20, classes=5)
    accuracy = (votes.argmax(1).numpy() == queries.labels).mean()
    line = next(line for line in content["table"] if line["protocol"] == "knn-cosine-exp k=20")
    assert line["pixels"] == pytest.approx(accuracy)
    assert content["datasets"]["shifted"]["pixels"] == "pixels at 32 px"
    rows = [r for r in content["results"] if r["weights"] == "pixels"]
    assert "pixels at 32 px" in rows[0]["text"] and {"rankme", "top1"} <= {r["metric"] for r in rows}


def test_pixels_are_smaller_where_memory_asks(made):
    encoder = encoders.load(str(made[0][0]))
    assert encoders.pixels(encoder, 50_000).image_size == 32
    many = encoders.pixels(encoder, 1_300_000)
    assert many.image_size == 11 and many.source == "pixels at 11 px"
    assert encoders.pixels(replace(encoder, image_size=224), 1000).image_size == 32


def test_a_new_protocol_is_a_function_and_a_row(made, tmp_path, monkeypatch):
    """On every network, in the tables and in the features that several processes share, with no other line."""

    def nearest_mean(cell):
        p = cell.problem()
        means = torch.stack([p.x[p.labels == c].mean(0) for c in range(p.classes)])
        yield protocols.Result(
            "nearest mean", "raw", "of a class", protocols.score(-torch.cdist(p.queries, means), p.truth)
        )

    monkeypatch.setattr(
        protocols, "PROTOCOLS", (*protocols.PROTOCOLS, protocols.Protocol("mean", nearest_mean, group="none"))
    )
    (line,) = evaluate(made[0][0], tmp_path, data=(made[1][0],), protocols=("mean",))["table"]
    assert line["protocol"] == "nearest mean" and None not in (line["untrained"], line["pixels"], line["majority"])


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_diverged_encoder_is_refused_by_name(made, tmp_path):
    """NaN weights when they are loaded; weights so large that the features overflow when those are computed."""
    run = tmp_path / "run"
    shutil.copytree(made[0][0], run, ignore=shutil.ignore_patterns("eval*", "features"))
    header = {k: v for k, v in backbone.metadata(run).items() if k not in ("format", "num_features")}
    module, tensors = encoders.load(str(run)).module, load_file(run / "backbone.safetensors")
    for value, words in ((float("nan"), r"^run: 1 of its tensors are not finite \(first: layer1.0.conv1.weight\)"),
                         (3e38, r"^run \(trained\): the features of \d+ of \d+ images of patterns are not finite")):  # fmt: skip
        module.load_state_dict(
            tensors | {"layer1.0.conv1.weight": torch.full_like(tensors["layer1.0.conv1.weight"], value)}
        )
        backbone.save(module, run / "backbone.safetensors", header)
        with pytest.raises(UserError, match=words):
            evaluate(run, tmp_path / "out", protocols=("knn",))


def test_a_collapsed_encoder_is_measured_in_json(made, tmp_path, capsys):
    """The same features for all images: what is then not defined is null, never NaN, and is said."""
    run = tmp_path / "run"
    shutil.copytree(made[0][0], run, ignore=shutil.ignore_patterns("eval*", "features"))
    header = {k: v for k, v in backbone.metadata(run).items() if k not in ("format", "num_features")}
    module = encoders.load(str(run)).module
    torch.nn.init.zeros_(module.layer4[-1].bn2.weight)
    torch.nn.init.zeros_(module.layer4[-1].downsample[1].weight)
    backbone.save(module, run / "backbone.safetensors", header)
    evaluate(run, tmp_path / "out", protocols=("knn", "label-free"), plots=True)
    text = (tmp_path / "out" / "eval.json").read_text()
    rows = json.loads(text, parse_constant=pytest.fail)["results"]
    assert [r["value"] for r in rows if r["metric"] == "alpha" and r["weights"] == "trained"] == [None]
    assert "alpha-req (trained) undefined alpha" in capsys.readouterr().out


def test_fine_tuning_refuses_before_anything_is_measured(made, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "DROP_PATHS", ("no such place",))
    with pytest.raises(UserError, match="has no place for drop path"):
        evaluate(made[0][1], tmp_path / "out", protocols=("knn", "full"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="leave out --layers"):
        evaluate(made[0][1], tmp_path / "out", protocols=("full",), layers="last:2")


# ------------------------------------------------------------------------------------------------------------- its input


def test_bicubic_is_torchvisions(tmp_path):
    """Resize and CenterCrop of a picture where the box falls on whole pixels; the triangle's filter is another."""
    rng = np.random.default_rng(0)
    picture = np.asarray(
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).resize((256, 256), Image.BILINEAR)
    )
    (tmp_path / "images" / "train" / "a").mkdir(parents=True)
    Image.fromarray(picture).save(tmp_path / "images" / "train" / "a" / "x.png")
    write_shards(Options("folder", encoding="raw"), tmp_path / "images", tmp_path / "shards", jobs=1, quiet=True)
    store = Store(tmp_path / "shards")
    box = views.clean(56, store.heights, store.widths, 0.875)
    by = (BicubicEngine(store, 1), engines.create("cpu", store)[0])
    both = [engine.submit(np.array([0]), box).result()[0][0, 0].float() for engine in by]
    steps = [transforms.Resize(64, InterpolationMode.BICUBIC), transforms.CenterCrop(56)]
    theirs = transforms.Compose(steps)(Image.fromarray(picture))
    theirs = torch.from_numpy(np.array(theirs)).permute(2, 0, 1).float()
    assert (both[0] - theirs).abs().mean() < 0.5 < (both[1] - theirs).abs().mean()


def test_the_transform_is_what_was_asked_for_and_is_said(made, tmp_path, capsys):
    """Printed beside the scores, part of the features' identity, and of no other run's cache."""
    run = str(made[0][0])
    own = encoders.load(run)
    asked = Asked(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), crop=0.8, interpolation="bicubic")
    other = encoders.load(run, asked)
    assert other.mean == (127.5,) * 3 and (other.crop_ratio, other.interpolation) == (0.8, "bicubic")
    store = Store(made[1][0])
    assert features.describe(own, store, np.arange(3)) != features.describe(other, store, np.arange(3))
    evaluate(run, tmp_path, protocols=("ridge",), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), crop=0.8)
    said = capsys.readouterr().out
    assert said.count("centre square of 0.8 of the short side, bilinear to 32 px, mean (0.500, 0.500, 0.500)") == 2
    assert json.loads((tmp_path / "eval.json").read_text())["transform"].endswith("mean, std, crop as asked for")


@pytest.mark.parametrize("network", [0, 1], ids=["resnet", "vit"])
def test_another_image_size(made, tmp_path, network):
    """A ViT's position embeddings are resampled and said; the features are those of the larger picture."""
    encoder = encoders.load(str(made[0][network]), Asked(image_size=64))
    assert encoder.image_size == 64 and encoder.module(torch.zeros(1, 3, 64, 64)).shape[0] == 1
    assert ("position embeddings resampled from 32 px" in encoder.loaded) == (network == 1)
    assert encoders.untrained(encoder, 0).module(torch.zeros(1, 3, 64, 64)).shape[0] == 1
    content = evaluate(made[0][network], tmp_path, data=(made[1][0],), protocols=("ridge",), image_size=64)
    assert content["image_size"] == 64 and content["results"]
    if network == 1:
        with pytest.raises(UserError, match="does not take 50 px images"):
            encoders.load(str(made[0][1]), Asked(image_size=50))


def test_weights_of_one_architecture_have_folders_of_their_own(made, tmp_path, monkeypatch):
    """Two files of one name too: results are named by what was loaded, and `compare` is told what it was trained on."""
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        torch.manual_seed(i)
        torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / str(i) / "checkpoint.pth")
    runs = []
    for i in range(2):
        content = evaluate("torchvision:squeezenet1_1", None, data=(made[1][1],), protocols=("ridge",), image_size=32,
                           weights=f"{i}/checkpoint.pth", pretrained_on="photos")  # fmt: skip
        runs.append(content["run"])
        assert content["pretrained_on"] == "photos" and "assumed" in content["transform"]
        assert "left out: classifier" in content["loaded"]
    assert len(set(runs)) == 2 and len(list(tmp_path.glob("runs/*/eval.json"))) == 2
    assert runs[0].startswith("torchvision:squeezenet1_1-checkpoint-")


def test_variants_of_the_same_weights_do_not_overwrite_each_other(made, tmp_path):
    """Another size, other layers or another transform: other folders, other models for `compare`, and no old results beside."""
    run = tmp_path / "run"
    shutil.copytree(made[0][0], run, ignore=shutil.ignore_patterns("eval*", "features"))
    variants: list[dict] = [{}, {"image_size": 48}, {"layers": "last:2"}, {"crop": 0.8, "interpolation": "bicubic"}]
    for settings in variants:
        evaluate(run, None, protocols=("ridge",), limit=60, **settings)
    assert {p.parent.name for p in run.rglob("eval.json")} == {
        "run",
        "eval-48px",
        "eval-last-2",
        "eval-crop0.8-bicubic",
    }
    columns = compare.table(compare.rows(compare.contents([run])))
    assert all(len({m[1] for m in models}) == 4 and {m[0] for m in models} == {"run"} for models in columns.values())
    content = evaluate(run, run, protocols=("knn",), limit=60, image_size=48)
    assert not any(row["protocol"].startswith("ridge") for row in content["results"])


def test_suite_of_several_processes_embeds_all_that_is_read(made, tmp_path):
    """`embed` leaves nothing to `run`: the pixels too."""
    options = suite.Options(epochs=2)
    data = open_data(made[1][1], protocols.choose(["quick", "lidar", "averaged"]))
    said: list[str] = []
    for step in ("embed", "run"):
        work = suite.Suite(encoders.load(str(made[0][0])), tmp_path, options, said.append)
        getattr(work, step)(data, None)
        work.close()
    assert sum("embedded in" in line for line in said) == sum("read from the cache" in line for line in said) > 8


def test_labels_from_a_table(made, tmp_path):
    """Other classes than the shards', images that it does not name left out; several labels are scored by mean average
    precision, scikit-learn's, by the protocols that know them."""
    train = Store(made[1][1])
    keys = sorted({store.key(i) for store in (train, Store(made[1][1], "val")) for i in range(len(store))})
    kinds = {k: "round" if k.split("/")[0] in ("ring", "blob") else "straight" for k in keys if not k.endswith("/0024")}
    table = tmp_path / "labels.csv"
    table.write_text("file,label\n" + "".join(f"{key}.png,{kind}\n" for key, kind in kinds.items()))
    content = evaluate(made[0][0], tmp_path / "a", data=(made[1][1],), protocols=("ridge",), labels=table)
    assert content["datasets"]["shifted"]["classes"] == ["round", "straight"]
    assert content["datasets"]["shifted"]["train"] == len(train) - 5
    both = {key: f"{key.split('/')[0]};{kind}" for key, kind in kinds.items()}
    table.write_text("file,label\n" + "".join(f"{key}.png,{names}\n" for key, names in both.items()))
    content = evaluate(
        made[0][0], tmp_path / "a", data=(made[1][1],), protocols=("knn", "linear", "ridge"), labels=table
    )
    rows = {(r["protocol"], r["weights"]): r for r in content["results"]}
    assert {r["metric"] for r in content["results"]} == {"mAP"} and ("linear-sweep", "pixels") in rows
    assert any("which ridge cannot be asked about" in note for note in content["datasets"]["shifted"]["notes"])
    assert 0.2 < rows["knn-cosine-exp k=20", "trained"]["value"] <= 1
    table.write_text("file,label\nnobody.png,x\n")
    with pytest.raises(UserError, match="names no image of shifted train: its first is nobody"):
        evaluate(made[0][0], tmp_path / "b", data=(made[1][1],), protocols=("knn",), labels=table)
