"""The evaluation sets, read from tiny archives that have the true layout: official lists, odd names, labels from 1."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pictures import jpeg
from PIL import Image
from scipy.io import savemat
from torchvision import datasets as torchvision_datasets

from manyview.evaluation.targets import TARGETS
from manyview.pipeline.convert.sources import benchmarks, datasets
from manyview.pipeline.convert.sources.benchmarks import BENCHMARKS
from manyview.pipeline.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def without_checksums(monkeypatch):
    """The true archives' md5 sums, which tiny ones cannot have."""
    for kind in ("Flowers102", "SVHN"):
        monkeypatch.setattr(getattr(torchvision_datasets, kind), "_check_integrity", lambda self: True)


def put(root: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number, 20, 24))


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def contents(name: str, source: Path) -> dict[str, list[tuple[str, str]]]:
    """{split: [(file, class)]}, after every image was read as it lies there."""
    result = {}
    found = datasets.load(name, source)
    for split in found.splits:
        for i, file in enumerate(split.names):
            assert split.read(i).tobytes() in {path.read_bytes() for path in source.rglob(Path(file).name)}
        result[split.name] = [(file, found.classes[label]) for file, label in zip(split.names, split.labels)]
    return result


def classes_of(rows: list[tuple[str, str]]) -> list[str]:
    return [label for _, label in rows]


def test_flowers_labels_begin_at_1_and_validation_is_for_training(tmp_path):
    root = tmp_path / "flowers-102"
    put(root, [f"jpg/image_{i:05d}.jpg" for i in range(1, 7)])
    savemat(root / "imagelabels.mat", {"labels": np.array([[77, 1, 1, 102, 77, 2]])})
    savemat(root / "setid.mat", {"trnid": np.array([[1, 2]]), "valid": np.array([[4, 6]]), "tstid": np.array([[3, 5]])})
    found = datasets.load("flowers102", tmp_path)
    labels = {split.name: dict(zip(split.names, split.labels.tolist())) for split in found.splits}
    assert labels["train"] == {f"flowers-102/jpg/image_0000{i}.jpg": n for i, n in ((1, 76), (2, 0), (4, 101), (6, 1))}
    assert labels["val"] == {"flowers-102/jpg/image_00003.jpg": 0, "flowers-102/jpg/image_00005.jpg": 76}
    assert len(found.classes) == 102


def test_pets_have_classes_in_the_names_of_their_files(tmp_path):
    root = tmp_path / "oxford-iiit-pet"
    put(root, ["images/Abyssinian_1.jpg", "images/american_bulldog_10.jpg", "images/american_bulldog_2.jpg"])
    write(root, {"annotations/trainval.txt": "Abyssinian_1 1 1 1\namerican_bulldog_10 2 2 1\n", "annotations/test.txt":
                 "american_bulldog_2 2 2 1\nAbyssinian_9 1 1 1\n"})  # fmt: skip
    found = contents("pets", tmp_path)
    assert found["train"] == [("oxford-iiit-pet/images/Abyssinian_1.jpg", "Abyssinian"),
                              ("oxford-iiit-pet/images/american_bulldog_10.jpg", "American Bulldog")]  # fmt: skip
    assert contents("pets", root.parent)["val"] == [
        ("oxford-iiit-pet/images/american_bulldog_2.jpg", "American Bulldog")
    ]
    (problem,) = datasets.load("pets", root).problems  # SOURCE may be the set's own folder too
    assert problem["name"].endswith("Abyssinian_9.jpg") and "not there" in problem["reason"]


def test_textures_first_partition(tmp_path):
    root = tmp_path / "dtd/dtd"
    names = [f"{c}/{c}_000{i}.jpg" for c in ("banded", "zigzagged") for i in range(3)]
    put(root / "images", names)
    write(
        root, {f"labels/{part}1.txt": "\n".join(names[i::3]) + "\n" for i, part in enumerate(("train", "val", "test"))}
    )
    found = contents("dtd", tmp_path)
    assert [name.rpartition("/")[2] for name, _ in found["train"]] == [
        n.split("/")[1] for n in sorted(names[0::3] + names[1::3])
    ]
    assert classes_of(found["val"]) == ["banded", "zigzagged"]


def test_aircraft_variants_have_spaces_and_slashes(tmp_path):
    root = tmp_path / "fgvc-aircraft-2013b/data"
    put(root, [f"images/{i:07d}.jpg" for i in range(1, 5)])
    write(root, {
        "variants.txt": "707-320\nF/A-18\nSaab 2000\n", "images_variant_trainval.txt": "0000001 Saab 2000\n0000003 F/A-18\n",
        "images_variant_test.txt": "0000002 F/A-18\n0000004 707-320\n",
    })  # fmt: skip
    found = contents("aircraft", tmp_path)
    assert classes_of(found["train"]) == ["Saab 2000", "F/A-18"] and classes_of(found["val"]) == ["F/A-18", "707-320"]


def test_food(tmp_path):
    root = tmp_path / "food-101"
    put(root, ["images/waffles/5.jpg", "images/waffles/6.jpg", "images/apple_pie/7.jpg"])
    write(root, {"meta/train.json": json.dumps({"waffles": ["waffles/5"], "apple_pie": ["apple_pie/7"]}),
                 "meta/test.json": json.dumps({"waffles": ["waffles/6"], "apple_pie": []})})  # fmt: skip
    found = contents("food101", tmp_path)
    assert classes_of(found["train"]) == ["apple_pie", "waffles"] and found["val"] == [
        ("food-101/images/waffles/6.jpg", "waffles")
    ]


def test_cars(tmp_path):
    root = tmp_path / "stanford_cars"
    put(root, ["cars_train/00001.jpg", "cars_train/00002.jpg", "cars_test/00001.jpg"])
    (root / "devkit").mkdir()

    def annotations(rows):
        kind = [("fname", object), ("class", np.uint8)]
        return {"annotations": np.array([rows], dtype=kind)}

    savemat(root / "devkit/cars_train_annos.mat", annotations([("00001.jpg", 2), ("00002.jpg", 1)]))
    savemat(root / "cars_test_annos_withlabels.mat", annotations([("00001.jpg", 2), ("00009.jpg", 1)]))
    classes = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012"]
    savemat(root / "devkit/cars_meta.mat", {"class_names": np.array(classes, object)})
    found = contents("cars", tmp_path)
    assert classes_of(found["train"]) == classes[::-1]
    assert [name for name, _ in found["val"]] == ["stanford_cars/cars_test/00001.jpg"]


def test_house_numbers_call_the_zero_ten(tmp_path):
    for part, labels in (("train", [10, 1, 9]), ("test", [10, 2])):
        images = np.random.default_rng(len(labels)).integers(0, 256, (32, 32, 3, len(labels)), np.uint8)
        savemat(tmp_path / f"{part}_32x32.mat", {"X": images, "y": np.array(labels, np.uint8)[:, None]})
    found = datasets.load("svhn", tmp_path)
    assert [split.labels.tolist() for split in found.splits] == [[0, 1, 9], [0, 2]]
    assert np.array_equal(found.splits[1].read(1), images[..., 1])


def test_voc_takes_the_largest_object_of_the_mask(tmp_path):
    root = tmp_path / "VOCdevkit/VOC2012"
    names = ["2007_000032", "2007_000039", "2007_000063", "2008_000001", "2008_000002"]
    put(root, [f"JPEGImages/{name}.jpg" for name in names])
    (root / "SegmentationClass").mkdir()
    for name, blocks in zip(names, ({1: 40, 15: 90}, {20: 5}, {0: 100}, {7: 3, 255: 400}, {15: 9})):
        mask = np.zeros(600, np.uint8)
        mask[: sum(blocks.values())] = np.repeat(list(blocks), list(blocks.values()))
        image = Image.fromarray(mask.reshape(20, 30))
        image.putpalette([v for i in range(256) for v in (i, 255 - i, 7)])
        image.save(root / "SegmentationClass" / f"{name}.png")
    lists = {"train": names[:3], "val": names[3:]}
    write(root, {f"ImageSets/Segmentation/{split}.txt": "\n".join(part) + "\n" for split, part in lists.items()})
    found = contents("voc2012", tmp_path)
    assert classes_of(found["train"]) == ["person", "tvmonitor"] and classes_of(found["val"]) == ["car", "person"]
    (problem,) = datasets.load("voc2012", tmp_path).problems
    assert problem["name"].endswith("2007_000063.jpg") and "no class" in problem["reason"]
    (root / "SegmentationClass/2007_000039.png").write_bytes(b"\x89PNG\r\n\x1a\ncut")
    assert len(datasets.load("voc2012", tmp_path).problems) == 2


def test_birds(tmp_path):
    root = tmp_path / "CUB_200_2011"
    black, laysan = "001.Black_footed_Albatross", "002.Laysan_Albatross"
    names = [
        f"{black}/Black_Footed_Albatross_0046_18.jpg",
        f"{laysan}/Laysan_0001_545.jpg",
        f"{black}/Black_0002_55.jpg",
    ]
    put(root / "images", names)
    write(root, {
        "images.txt": "".join(f"{i} {name}\n" for i, name in enumerate(names, 1)), "image_class_labels.txt": "1 1\n2 2\n3 1\n",
        "train_test_split.txt": "1 0\n2 1\n3 1\n", "classes.txt": f"1 {black}\n2 {laysan}\n",
    })  # fmt: skip
    for source in (tmp_path, root):
        found = datasets.load("cub200", source)
        assert found.classes == ["Black_footed_Albatross", "Laysan_Albatross"]
        assert [split.labels.tolist() for split in found.splits] == [[0, 1], [0]]
        assert found.splits[1].names == [f"images/{names[0]}"]
    (root / "image_class_labels.txt").write_text("1 1\n2 2\n3\n")
    with pytest.raises(
        UserError, match=r"CUB-200-2011 is not in .*not whole \(ValueError: image_class_labels.txt, line 3"
    ):
        datasets.load("cub200", tmp_path)


def test_domains(tmp_path):
    names = [
        f"real/{name}.jpg"
        for name in ("aircraft_carrier/real_001_1", "The_Eiffel_Tower/real_300_2", "zebra/real_343_9")
    ]
    put(tmp_path, names)
    lists = {"real_train.txt": f"{names[0]} 0\n{names[2]} 2\n", "real_test.txt": f"{names[1]} 1\n{names[0]} 0\n"}
    write(tmp_path, lists)
    found = contents("domainnet-real", tmp_path)
    assert classes_of(found["train"]) == ["aircraft_carrier", "zebra"]
    assert classes_of(found["val"]) == ["The_Eiffel_Tower", "aircraft_carrier"]
    write(tmp_path, {"real_test.txt": f"{names[1]} 0\n"})
    with pytest.raises(UserError, match="label 0 is aircraft_carrier and The_Eiffel_Tower"):
        datasets.load("domainnet-real", tmp_path)


def test_species_are_counted_by_family(tmp_path):
    birds = "Animalia_Chordata_Aves_Piciformes_Picidae"
    species = [f"00000_{birds}_Picus_viridis", f"00001_{birds}_Dryocopus_martius",
               "00002_Plantae_Tracheophyta_Liliopsida_Poales_Cyperaceae_Carex_flava"]  # fmt: skip
    put(tmp_path, [f"train_mini/{name}/a-{i}.jpg" for i, name in enumerate(species)])
    put(tmp_path, [f"val/{species[2]}/x.jpg", f"val/{species[1]}/y.jpg"])
    found = contents("inat21-mini-family", tmp_path)
    assert classes_of(found["train"]) == ["Picidae", "Picidae", "Cyperaceae"]
    assert classes_of(found["val"]) == ["Picidae", "Cyperaceae"]
    (tmp_path / "val/birds").mkdir()
    put(tmp_path, ["val/birds/z.jpg"])
    with pytest.raises(UserError, match="names no family"):
        datasets.load("inat21-mini-family", tmp_path)


def test_scenes_of_the_first_partition(tmp_path):
    root = tmp_path / "SUN397"
    names = ["a/abbey/sun_aa.jpg", "a/apartment_building/outdoor/sun_bb.jpg", "a/abbey/sun_cc.jpg"]
    put(root, names)
    write(root, {"ClassName.txt": "/a/abbey\n/a/apartment_building/outdoor\n"})
    with pytest.raises(UserError, match=r"Training_01\.txt"):
        datasets.load("sun397", tmp_path)
    for place in (tmp_path / "Partitions", root):
        write(place, {"Training_01.txt": f"/{names[0]}\n/{names[1]}\n", "Testing_01.txt": f"/{names[2]}\n"})
        found = contents("sun397", tmp_path)
        assert classes_of(found["train"]) == ["abbey", "apartment_building/outdoor"] and len(found["val"]) == 1
        (place / "Training_01.txt").unlink()


@pytest.mark.parametrize(("name", "folder", "train"), [
    ("caltech101", "caltech101/101_ObjectCategories", 60), ("caltech256", "caltech256/256_ObjectCategories", 64),
    ("eurosat", "eurosat/2750", 64),
])  # fmt: skip
def test_sets_without_a_split_are_divided_once(tmp_path, name, folder, train):
    root = tmp_path / folder
    put(root, [f"{c}/image_{i:04d}.jpg" for c in ("airplanes", "Faces_easy") for i in range(40)])
    if name == "caltech101":
        put(root, ["BACKGROUND_Google/image_0001.jpg"])
    for source in (tmp_path, root):
        found = datasets.load(name, source)
        parts = {split.name: set(split.names) for split in found.splits}
        assert (
            found.classes == ["Faces_easy", "airplanes"]
            and len(parts["train"]) == train
            and len(parts["val"]) == 80 - train
        )
        assert not parts["train"] & parts["val"]
    again = datasets.load(name, root)
    assert [split.names for split in again.splits] == [split.names for split in found.splits]
    counts = np.bincount(found.splits[0].labels).tolist()
    assert counts == [train // 2] * 2 or name == "caltech256"  # that one as its benchmark has it: whatever the class


def test_lists_lead_nowhere_else(tmp_path):
    put(tmp_path, ["secret.jpg", "set/here.jpg"])
    names = ["here.jpg", "../secret.jpg", str(tmp_path / "secret.jpg"), "./here.jpg", "gone.jpg"]
    found = benchmarks.listed(tmp_path / "set", ["one"], {"train": [(name, 0) for name in names]})
    assert found.splits[0].names == ["here.jpg"]
    reasons = [problem["reason"] for problem in found.problems]
    assert [("out of" in r, "twice" in r, "not there" in r) for r in reasons] == [
        (1, 0, 0),
        (1, 0, 0),
        (0, 1, 0),
        (0, 0, 1),
    ]
    with pytest.raises(UserError, match=r"the list of train gives class 1 of 1"):
        benchmarks.listed(tmp_path / "set", ["one"], {"train": [("here.jpg", 1)]})


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_what_is_not_there_is_said_in_one_line(name, tmp_path):
    with pytest.raises(UserError) as caught:
        datasets.load(name, tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    with pytest.raises(UserError, match="needs SOURCE"):
        datasets.load(name, None)


def test_every_set_is_in_the_table_of_the_docs():
    rows = [
        line.split("|")[1:-1] for line in (ROOT / "docs/datasets.md").read_text().splitlines() if line.startswith("| `")
    ]
    table = {name.strip(" `"): [cell.strip().replace(",", "") for cell in cells] for name, *cells in rows}
    assert set(table) == set(datasets.DATASETS) - {"folder", "shards"}
    for name, (train, test, classes, metric, *_) in table.items():
        known = TARGETS[name]
        assert [train, test, classes, metric] == [
            str(known.train),
            str(known.test),
            str(known.classes),
            known.metric,
        ], name
