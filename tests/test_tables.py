from __future__ import annotations

import json
from pathlib import Path

import pytest
from pictures import jpeg

from manyview.pipeline.convert.sources import Reading, Source, datasets, tables
from manyview.pipeline.errors import UserError


def images(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(1))
    return root


def by_name(source: Source) -> dict[str, str | None]:
    """The class of every image, by split and name."""
    return {
        f"{split.name}/{name}": source.classes[label] if label >= 0 else None
        for split in source.splits
        for name, label in zip(split.names, split.labels.tolist())
    }


def load(root: Path, table: str = "", columns: tuple[str, str] = ("", ""), **options) -> Source:
    return datasets.load("folder", root, Reading(labels=root / table if table else None, columns=columns, **options))


PETS = ("cat", "dog", "cat")
WRITTEN = {
    "labels.csv": "id,breed\na,cat\nb,dog\nc,cat\n",
    "trainLabels.csv": "\ufeffImage;Label\na;cat\nb;dog\nc;cat\n",
    "labels.tsv": "filename\tx\tclass\na.jpg\t1\tcat\nb.jpg\t2\tdog\nc.jpg\t3\tcat\n",
    "list.txt": "./a.jpg cat\nb.jpg dog\nc.jpg cat\n",
    "no-header.csv": "a.jpg,cat\nb.jpg,dog\nc.jpg,cat\n",
    "absolute.csv": "path,label\n/kaggle/input/pets/a.jpg,cat\nC:\\pets\\b.jpg,dog\npets/c.jpg,cat\n",
    "rows.jsonl": "".join(f'{{"file_name": "{name}.jpg", "label": "{label}"}}\n' for name, label in zip("abc", PETS)),
    "rows.json": '[{"image": "a", "category": "cat"}, {"image": "b", "category": "dog"}, {"image": "c", "category": "cat"}]',
    "quoted.csv": 'id,text,label\na,"one, two",cat\nb,"say ""x""",dog\nc,,cat\n',
    "other-rows.csv": "id,label\na,cat\nb,dog\nc,cat\nz,emu\n",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_labels_from_every_kind_of_table(tmp_path, name):
    root = images(tmp_path / "pets", "a.jpg", "b.jpg", "c.jpg")
    (root / name).write_text(WRITTEN[name], encoding="utf-8")
    source = load(root, name)
    assert source.classes == ["cat", "dog"]  # none for a row without an image
    assert by_name(source) == {"train/a.jpg": "cat", "train/b.jpg": "dog", "train/c.jpg": "cat"}
    assert str(root / name) in source.watch and any(f"of {name}" in note for note in source.notes)
    assert any("1 rows have no image" in note for note in source.notes) == (name == "other-rows.csv")


def test_numbers_stay_what_they_are_and_missing_labels_are_none(tmp_path):
    root = images(tmp_path, *(f"{name}.jpg" for name in "abcde"))
    (root / "labels.csv").write_text("id,label\na,2\nb,5.0\nc,\nd,02\n")
    source = load(root, "labels.csv")
    assert source.classes == ["0", "1", "2", "3", "4", "5"] and source.splits[0].labels.tolist() == [2, 5, -1, 2, -1]
    assert any("1 images have no row" in note for note in source.notes)
    assert "4 of 6 classes have no image: 0, 1, 3 and 1 more" in source.notes
    (root / "labels.csv").write_text("id,label\na,2\nb,99999999999999999999\nc,2\n")
    with pytest.raises(UserError, match="is no class's number"):
        load(root, "labels.csv")


def test_a_table_labels_the_splits_that_it_names_and_folders_the_others(tmp_path):
    root = images(
        tmp_path, "train/cat/1.jpg", "train/cat/2.jpg", "train/dog/3.jpg", "val/7.jpg", "val/8.jpg", "val/9.jpg"
    )
    (root / "val.csv").write_text("image,label\n7,dog\n8,cat\n9,dog\n")
    assert by_name(load(root, "val.csv")) == {
        "train/cat/1.jpg": "cat", "train/cat/2.jpg": "cat", "train/dog/3.jpg": "dog",
        "val/7.jpg": "dog", "val/8.jpg": "cat", "val/9.jpg": "dog",
    }  # fmt: skip
    source = load(root, "val.csv", unlabelled=True)  # folders are not classes, the table's are
    assert source.splits[0].labels.tolist() == [-1] * 3 and source.splits[1].labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize("words", [("ümlaut", "u\u0308mlaut"), ("u\u0308mlaut", "ümlaut")])
def test_names_are_compared_as_people_see_them(tmp_path, words):
    on_disk, in_table = words
    root = images(
        tmp_path, f"train/{on_disk}/{on_disk}1.jpg", f"train/{on_disk}/2.jpg", "train/x/3.jpg", f"val/{on_disk}9.jpg"
    )
    (root / "val.csv").write_text(f"file,label\n{in_table}9.jpg,{in_table}\n", encoding="utf-8")
    source = load(root, "val.csv")
    assert source.classes == ["x", "ümlaut"] and source.splits[1].labels.tolist() == [1]


def tiny_imagenet(root: Path, annotations: str) -> Path:
    images(
        root,
        "train/n01/images/n01_0.JPEG",
        "train/n02/images/n02_0.JPEG",
        "train/n02/images/n02_1.JPEG",
        "test/images/t.JPEG",
    )
    images(root, "test/images/t.JPEG", *(f"val/images/val_{i}.JPEG" for i in range(3)))
    (root / "val" / "val_annotations.txt").write_text(annotations)
    return root


def test_tiny_imagenet_is_read_as_it_unpacks(tmp_path):
    lines = [f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62\n" for i, wnid in enumerate(("n02", "n01", "n02"))]
    source = load(tiny_imagenet(tmp_path, "".join(lines)))
    assert source.classes == ["n01", "n02"]
    assert [split.labels.tolist() for split in source.splits] == [[0, 1, 1], [1, 0, 1]]
    assert "test is left out, val is val" in source.notes


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_hugging_faces_metadata_are_labels_where_they_have_such_a_column(tmp_path, name):
    def write(column: str, values: list) -> None:
        rows = [{"file_name": f"{i}.jpg", column: value} for i, value in enumerate(values)]
        csv = "\n".join([f"file_name,{column}", *(f"{row['file_name']},{row[column]}" for row in rows)])
        (root / "train" / name).write_text("\n".join(map(json.dumps, rows)) if name.endswith("jsonl") else csv)

    root = images(tmp_path, "train/0.jpg", "train/1.jpg", "train/2.jpg")
    write("label", ["cat", "dog", "cat"])
    assert load(root).classes == ["cat", "dog"] and load(root).splits[0].labels.tolist() == [0, 1, 0]
    write("text", ["a cat", "a dog", "a cat"])
    source = load(root)
    assert source.classes == [] and (source.splits[0].labels == -1).all()
    assert any("has no column of labels" in note for note in source.notes)
    assert load(root, f"train/{name}", ("", "text")).classes == ["a cat", "a dog"]  # asked for


METADATA = {
    "one table above all splits": (
        {"metadata.csv": "file_name,label\ntrain/1.jpg,cat\ntrain/2.jpg,cat\ntrain/a/1.jpg,dog\nvalidation/1.jpg,dog\n"},
        {"train/1.jpg": "cat", "train/2.jpg": "cat", "train/a/1.jpg": "dog", "val/1.jpg": "dog"},
        "labels of train and val from column 'label' of metadata.csv",
    ),
    "names are whole paths": (  # 1.jpg is not a/1.jpg
        {"train/metadata.csv": "file_name,label\n1.jpg,cat\n2.jpg,cat\n"},
        {"train/1.jpg": "cat", "train/2.jpg": "cat", "train/a/1.jpg": None, "val/1.jpg": None},
        "1 images have no row",
    ),
    "rows that come twice": (
        {"train/metadata.csv": "file_name,labels\n1.jpg,cat\n1.jpg,cat\n2.jpg,cat\n./a/1.jpg,dog\n9.jpg,dog\n"},
        {"train/1.jpg": "cat", "train/2.jpg": "cat", "train/a/1.jpg": "dog", "val/1.jpg": None},
        "'labels' of metadata.csv; 1 rows have no image",
    ),
    "a caption of several lines": (
        {"train/metadata.csv": 'file_name,text,label\n1.jpg,"one\ntwo, ""three""",cat\n2.jpg,a\u2028b,cat\na/1.jpg,,dog\n',
         "validation/metadata.jsonl": '{"file_name": "1.jpg", "text": "a\u2028b\x85c", "label": "dog"}\r\n\n'},
        {"train/1.jpg": "cat", "train/2.jpg": "cat", "train/a/1.jpg": "dog", "val/1.jpg": "dog"},
        "labels of val from column 'label' of metadata.jsonl",
    ),
    "a test split of one image a class": (
        {"train/metadata.jsonl": '{"file_name": "1.jpg", "label": 1, "labels": 7}\n{"file_name": "2.jpg", "label": null}\n',
         "validation/metadata.jsonl": '{"file_name": "1.jpg", "label": 1}'},
        {"train/1.jpg": "1", "train/2.jpg": None, "train/a/1.jpg": None, "val/1.jpg": "1"},
        "labels of train from column 'label' of metadata.jsonl; 1 images have no row",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", METADATA)
def test_hugging_faces_metadata_as_people_write_them(tmp_path, case):
    tables, expected, note = METADATA[case]
    root = images(tmp_path, "train/1.jpg", "train/2.jpg", "train/a/1.jpg", "validation/1.jpg")
    for name, text in tables.items():
        (root / name).write_bytes(text.encode())
    source = load(root)
    assert by_name(source) == expected and any(note in line for line in source.notes), source.notes


REFUSED = {
    "captions": ("id,label\na,a cat on a mat\nb,a dog in fog\nc,one more\n", "no two images have the same 'label'"),
    "no label column": ("id,sex,age\na,f,1\nb,m,2\n", "which column of .* holds the labels"),
    "no file column": ("label,sex\ncat,f\n", "has no column of file names; it has label, sex"),
    "no image": ("id,label\nx,cat\ny,cat\n", "names no image: its first is x"),
    "two labels": ("id,label\na,cat\na,dog\n", "gives .*a.jpg two labels, 'cat' and 'dog'"),
    "empty": ("", "no column of file names"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_clear_is_asked_about(tmp_path, case):
    text, message = REFUSED[case]
    root = images(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    (root / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        load(root, "labels.csv")


def test_flags_name_columns_and_nonsense_is_one_line(tmp_path):
    root = images(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    (root / "t.csv").write_text("who,what\na,x\nb,y\nc,z\n")
    assert load(root, "t.csv", ("who", "what")).classes == ["x", "y", "z"]  # each its own, and asked for
    with pytest.raises(UserError, match=r"has no column whom; it has who, what: --name-column NAME"):
        load(root, "t.csv", ("whom", "what"))
    (root / "t.json").write_text('[{"id": "a", "label": ["x", "y"]}]')
    with pytest.raises(UserError, match="holds several values an image"):
        load(root, "t.json")
    (root / "t.json").write_text("[1")
    with pytest.raises(UserError, match="cannot be read as a table"):
        load(root, "t.json")
    with pytest.raises(UserError, match="cannot be read as a table: No such file"):
        load(root, "nowhere.csv")
    with pytest.raises(UserError, match="--labels is for the datasets folder, imagenet"):
        datasets.load("digits", None, Reading(labels=root / "t.csv"))


def test_a_table_that_nobody_asked_for_is_pointed_at(tmp_path):
    root = images(tmp_path, "train/1.jpg", "test/2.jpg")
    (root / "a.csv").write_text("")
    (root / "train_labels.csv").write_text("id,label\n1,cat\n")
    assert load(root).notes == ["no image has a label; --labels SOURCE/train_labels.csv would take them from there"]
    assert load(root, unlabelled=True).notes == []


def test_a_row_that_names_images_of_two_splits_is_refused(tmp_path):
    root = images(tmp_path, "train/1.jpg", "train/2.jpg", "test/1.jpg")
    (root / "labels.csv").write_text("id,label\n1,cat\n2,cat\n")
    with pytest.raises(UserError, match=r"1 in .*labels.csv names several images: put their folders before it"):
        load(root, "labels.csv")
    (root / "labels.csv").write_text("id,label\ntrain/1,cat\ntrain/2,cat\n")
    assert [split.labels.tolist() for split in load(root, "labels.csv").splits] == [[0, 0], [-1]]


def test_a_digest_changes_with_the_table_and_its_columns(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("id,label\na,1\n")
    digests = {Reading(labels=table).digest(), Reading(labels=table, columns=("id", "label")).digest()}
    table.write_text("id,label\na,2\n")
    assert len(digests | {Reading(labels=table).digest()}) == 3 and Reading().digest() == ""


def test_classes_of_numbers_and_of_words():
    assert tables.classes(["3", "1"]) == ["0", "1", "2", "3"] and tables.classes(["b", "a", "b"]) == ["a", "b"]
    assert tables.classes(["10", "x"]) == ["10", "x"] and tables.classes([]) == []
