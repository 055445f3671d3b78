from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pictures import class_folders, jpeg

from manyview.pipeline import files
from manyview.pipeline.convert.sources import Reading, Source, datasets
from manyview.pipeline.errors import UserError


def names(source: Source) -> dict[str, list[str]]:
    return {split.name: split.names for split in source.splits}


def test_class_folders_with_splits(tmp_path):
    class_folders(class_folders(tmp_path, 2, 2), 1, 3, split="test")
    (tmp_path / "train" / "class0" / "notes.txt").write_text("no image")
    loaded = datasets.load("folder", tmp_path)
    assert loaded.classes == ["class0", "class1", "class2"] and loaded.ignored == 1
    assert names(loaded)["train"] == [f"class{label}/photo{i}.jpg" for label in (0, 1) for i in (0, 1)]
    assert loaded.splits[0].labels.tolist() == [0, 0, 1, 1] and loaded.splits[1].name == "val"
    for split, folder in zip(loaded.splits, ("train", "test")):
        for i, name in enumerate(split.names):
            data = (tmp_path / folder / name).read_bytes()
            assert split.read(i).tobytes() == data and split.sizes[i] == len(data)


def test_a_tree_without_class_folders_has_no_labels(tmp_path):
    for name in ("a.jpg", "b.png"):
        (tmp_path / name).write_bytes(jpeg(1))
    (tmp_path / "empty").mkdir()
    loaded = datasets.load("folder", tmp_path)
    assert names(loaded) == {"train": ["a.jpg", "b.png"]}
    assert loaded.classes == [] and (loaded.splits[0].labels == -1).all() and not loaded.problems
    class_folders(tmp_path / "other", 1, 2)
    assert (datasets.load("folder", tmp_path / "other", Reading(unlabelled=True)).splits[0].labels == -1).all()


def test_an_image_beside_the_class_folders_is_a_problem_and_the_others_keep_their_labels(tmp_path):
    (class_folders(tmp_path, 1, 2) / "train" / "stray.jpg").write_bytes(jpeg(1))
    (class_folders(tmp_path, 1, 2, split="val") / "val" / "class1" / "deep").mkdir()
    (tmp_path / "val" / "class1" / "deep" / "x.jpg").write_bytes(jpeg(2))
    loaded = datasets.load("folder", tmp_path)
    assert names(loaded)["train"] == ["class0/photo0.jpg", "class1/photo0.jpg"]
    assert [split.labels.tolist() for split in loaded.splits] == [[0, 1], [0, 1, 1]]
    assert [(item["split"], item["name"]) for item in loaded.problems] == [("train", "stray.jpg")]
    assert "beside the class folders" in loaded.problems[0]["reason"] and "--unlabelled" in loaded.problems[0]["reason"]
    everything = datasets.load("folder", tmp_path, Reading(unlabelled=True))
    assert names(everything)["train"][-1] == "stray.jpg" and not everything.problems and everything.classes == []


def test_a_class_named_like_a_split_is_asked_about(tmp_path):
    for name in ("bus", "car", "Train"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jpg").write_bytes(jpeg(1))
    with pytest.raises(
        UserError, match=r"holds Train and also images in bus, car: splits or classes\? Move them apart"
    ):
        datasets.load("folder", tmp_path)
    (tmp_path / "car").rename(tmp_path / ".car")
    (tmp_path / "bus").rename(tmp_path / "lost+found")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "readme.txt").write_text("no image")
    assert names(datasets.load("folder", tmp_path)) == {"train": ["x.jpg"]}


@pytest.mark.parametrize(
    "train,val",
    [("Training", "Testing"), ("Train", "Test"), ("TRAIN", "VALIDATION"), ("train", "dev"), ("training", "Eval"),
     ("train", "evaluation"), ("Train", "Valid"), ("seg_train", "seg_test"), ("training_set", "test_set"),
     ("train2017", "val2017"), ("pets/train", "pets/val"), ("a/b/Train", "a/b/Test"), ("train/train", "test/test"),
     ("x/seg_train/seg_train", "x/seg_test/seg_test")],
)  # fmt: skip
def test_splits_have_the_names_that_people_give_them(tmp_path, train, val):
    class_folders(class_folders(tmp_path, 1, 2, split=train), 1, 2, split=val)
    source = datasets.load("folder", tmp_path)
    assert source.classes == ["class0", "class1"]
    assert names(source) == {split: ["class0/photo0.jpg", "class1/photo0.jpg"] for split in ("train", "val")}


@pytest.mark.parametrize(
    "folders", [("bus_stop", "train_station"), ("ant", "bee", "val_halla"), ("train_a", "train_b")]
)
def test_classes_that_sound_like_splits_are_classes(tmp_path, folders):
    for name in folders:
        (tmp_path / name).mkdir()
        for i in range(2):
            (tmp_path / name / f"{i}.jpg").write_bytes(jpeg(i))
    assert datasets.load("folder", tmp_path).classes == list(folders)


def test_images_beside_the_splits_are_told_of(tmp_path):
    (class_folders(tmp_path, 2, 2) / "stray.jpg").write_bytes(jpeg(1))
    source = datasets.load("folder", tmp_path)
    assert len(source.splits[0].names) == 4
    assert source.notes == ["1 images beside the folders of the splits left out"]


def test_two_folders_of_one_split_are_asked_about(tmp_path):
    class_folders(class_folders(tmp_path, 1, 2, split="train"), 1, 2, split="Training")
    with pytest.raises(UserError, match="holds Training and train: which of them is train"):
        datasets.load("folder", tmp_path)


HIDDEN = (
    ".ipynb_checkpoints/a-checkpoint.jpg", "@eaDir/cat/SYNO.jpg", "@EADIR/x.jpg", ".Trash-1000/files/old.jpg", "#recycle/x.png",
    ".thumbnails/a.jpg", "__MACOSX/._photo0.jpg", "$RECYCLE.BIN/x.jpg", "System Volume Information/x.jpg", "lost+found/x.jpg",
    "@Recently-Snapshot/x.jpg", ".git/x.jpg", "._photo0.jpg", ".DS_Store", ".hidden.jpg",
)  # fmt: skip


@pytest.mark.parametrize("place", ["", "train", "train/class0", "train/class0/deeper"])
@pytest.mark.parametrize("name", HIDDEN)
def test_what_tools_leave_behind_is_neither_class_nor_image(hidden_root, place, name):
    path = hidden_root / place / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"no image")
    try:
        source = datasets.load("folder", hidden_root)
        assert source.classes == ["class0"] and not source.problems
        assert names(source)["train"] == ["class0/photo0.jpg", "class0/photo1.jpg"]
        shown = "._*" if name.startswith("._") else name.split("/")[0]
        assert not place or source.notes[0] == f"1 hidden files and tools' folders left out ({shown}: 1)"
    finally:
        path.unlink()
        for folder in path.parents[: len(Path(name).parts) - 1]:
            folder.rmdir()


@pytest.fixture(scope="module")
def hidden_root(tmp_path_factory) -> Path:
    return class_folders(tmp_path_factory.mktemp("hidden"), 2, 1)


def test_a_class_without_an_image_keeps_its_number_and_is_named(tmp_path, capsys):
    class_folders(tmp_path, 2, 2)
    phone = tmp_path / "train" / "ant"
    phone.mkdir()
    for i in range(4):
        (phone / f"IMG_{i}.HEIC").write_bytes(b"ftypheic")
    (phone / "list").write_text("")
    (tmp_path / "train" / "bee").mkdir()
    source = datasets.load("folder", tmp_path)
    assert source.classes == ["ant", "bee", "class0", "class1"] and source.splits[0].labels.tolist() == [2, 2, 3, 3]
    assert source.notes == [
        "5 files left out by their type (.heic: 4, no suffix: 1)", "2 of 4 classes have no image: ant, bee",
    ]  # fmt: skip
    assert "warning: 2 of 4 classes have no image: ant, bee" in capsys.readouterr().err


def test_a_split_without_an_image_is_named(tmp_path):
    (class_folders(tmp_path, 2, 1) / "val" / "class0").mkdir(parents=True)
    assert "val holds no image" in datasets.load("folder", tmp_path).notes


def test_a_folder_of_which_the_system_cannot_say_what_it_is_is_no_file(tmp_path, monkeypatch):
    class_folders(tmp_path, 1, 2)
    broken = SimpleNamespace(
        name="class2", path=str(tmp_path / "train" / "class2"), is_dir=lambda: os.stat("/proc/self/mem/x")
    )
    real = os.scandir
    monkeypatch.setattr(
        os, "scandir", lambda path: [*real(path), broken] if str(path).endswith("train") else real(path)
    )
    with pytest.raises(UserError, match="cannot be read"):
        datasets.load("folder", tmp_path)


def test_where_every_image_is_of_another_type_it_is_named(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"ftypheic")
    with pytest.raises(UserError, match=r"no images in .*1 files left out by their type \(.heic: 1\)"):
        datasets.load("folder", tmp_path)


@pytest.mark.parametrize("place", ["bee", "n.01", "class1/more", "../val"])
def test_a_link_to_a_folder_that_is_not_there_is_refused_by_name(tmp_path, place):
    class_folders(tmp_path, 1, 2)
    link = tmp_path / "train" / place
    link.symlink_to(tmp_path / "not-mounted" / Path(place).name)
    with pytest.raises(
        UserError, match=rf"{re.escape(link.name)} cannot be read \(it is a link to what is not there\)"
    ):
        datasets.load("folder", tmp_path)
    link.unlink()
    link.symlink_to(tmp_path / "notes.txt")  # of a file: that is nothing to do with images
    assert datasets.load("folder", tmp_path).classes == ["class0", "class1"]


def test_a_class_is_the_same_in_both_ways_to_write_a_letter(tmp_path):
    for split, word in (("train", "u\u0308"), ("val", "\u00fc")):
        for name in (word, "x"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "1.jpg").write_bytes(jpeg(1))
    source = datasets.load("folder", tmp_path)
    assert source.classes == ["x", "\u00fc"] and [split.labels.tolist() for split in source.splits] == [[1, 0], [0, 1]]
    assert all(split.read(i).tobytes() == jpeg(1) for split in source.splits for i in range(2))


def test_a_split_that_shares_no_class_is_refused(tmp_path):
    class_folders(tmp_path, 2, 2)
    (tmp_path / "val" / "images").mkdir(parents=True)
    (tmp_path / "val" / "images" / "1.jpg").write_bytes(jpeg(1))
    with pytest.raises(UserError, match=r"val \(images\) shares no class with train \(class0, class1\)"):
        datasets.load("folder", tmp_path)
    assert datasets.load("folder", tmp_path, Reading(disjoint=True)).splits[1].labels.tolist() == [2]
    assert datasets.load("folder", tmp_path, Reading(unlabelled=True)).classes == []


class Flaky:
    """`os.scandir` or `os.open` that fails so many times for a path, then works."""

    def __init__(self, real, path: Path, code: int, times: int) -> None:
        self.real, self.path, self.code, self.left = real, str(path), code, times

    def __call__(self, path, *args, **kwargs):
        if str(path) == self.path and self.left:
            self.left -= 1
            raise OSError(self.code, os.strerror(self.code), str(path))
        return self.real(path, *args, **kwargs)


FAULTS = [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENOMEM]


@pytest.mark.parametrize("code", FAULTS, ids=errno.errorcode.get)
def test_what_passes_is_tried_again_and_what_stays_stops_with_its_path(tmp_path, monkeypatch, code):
    monkeypatch.setattr(files, "PAUSES", (0.001,) * 3)
    path = class_folders(tmp_path, 1, 1) / "train" / "class0" / "photo0.jpg"
    split = datasets.load("folder", tmp_path).splits[0]
    monkeypatch.setattr(os, "open", Flaky(os.open, path, code, 3))
    assert split.read(0).tobytes() == path.read_bytes()
    monkeypatch.setattr(os, "open", Flaky(os.open, path, code, 99))
    with pytest.raises(UserError, match=f"{path}.*{os.strerror(code)}"):
        split.read(0)
    monkeypatch.setattr(os, "scandir", Flaky(os.scandir, tmp_path / "train", code, 2))
    assert len(datasets.load("folder", tmp_path).splits[0].names) == 1


def test_beside_val_the_test_split_is_left_out_and_two_of_val_are_refused(tmp_path):
    for split in ("train", "valid", "test"):
        class_folders(tmp_path, 1, 2, split=split)
    loaded = datasets.load("folder", tmp_path)
    assert [split.name for split in loaded.splits] == ["train", "val"]
    path = tmp_path / "valid" / "class0" / "photo0.jpg"
    path.write_bytes(jpeg(99))
    assert loaded.splits[1].read(0).tobytes() == path.read_bytes()
    assert loaded.notes == ["test is left out, val is valid"]
    class_folders(tmp_path, 1, 2, split="val")
    with pytest.raises(UserError, match="holds val and valid: which of them is val"):
        datasets.load("folder", tmp_path)


def test_links_are_followed_once_and_loops_end(tmp_path):
    class_folders(tmp_path / "set", 1, 2)
    train = tmp_path / "set" / "train"
    (train / "class0" / "back").symlink_to(train)
    (train / "class0" / "self.jpg").symlink_to("self.jpg")
    (train / "class0" / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jpg").write_bytes(jpeg(2))
    (train / "class2").symlink_to(tmp_path / "elsewhere")
    loaded = datasets.load("folder", tmp_path / "set")
    assert names(loaded)["train"] == ["class0/photo0.jpg", "class1/photo0.jpg", "class2/x.jpg"]
    assert {item["name"] for item in loaded.problems} == {"class0/back", "class0/self.jpg", "class0/gone.jpg"}


def test_an_unreadable_folder_is_refused_by_name(tmp_path, monkeypatch):
    """It may hold thousands, and without it the classes would have other numbers."""
    class_folders(tmp_path, 1, 2)
    denied = tmp_path / "train" / "class1"
    real = os.scandir

    def scandir(path):  # permissions do not stop root, who may be running this
        if Path(path) == denied:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(
        UserError, match=r"class1 cannot be read \(Permission denied\): make it readable or move it away"
    ):
        datasets.load("folder", tmp_path)
    denied = denied.rename(tmp_path / "train" / "lost+found")
    assert datasets.load("folder", tmp_path).classes == ["class0"]
    denied = denied.rename(tmp_path / "beside")
    with pytest.raises(UserError, match="beside cannot be read"):
        datasets.load("folder", tmp_path)


def test_names_that_are_not_text_survive(tmp_path):
    folder = tmp_path / "train" / "one"
    folder.mkdir(parents=True)
    raw = [b"sp ace.jpg", b"new\nline.jpg", b"\xff\xfe.jpg", b"many.dots.in.it.jpg", "ümlaut.jpg".encode()]
    for name in raw:
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(jpeg(3))
    split = datasets.load("folder", tmp_path).splits[0]
    assert sorted(os.fsencode(name) for name in split.names) == sorted(b"one/" + name for name in raw)
    assert all(split.read(i).tobytes() == jpeg(3) for i in range(5))


def test_a_file_that_vanishes_is_a_value_error(tmp_path):
    class_folders(tmp_path, 1, 1)
    split = datasets.load("folder", tmp_path).splits[0]
    (tmp_path / "train" / "class0" / "photo0.jpg").unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        split.read(0)


def test_a_held_out_share_of_each_class_becomes_val(tmp_path):
    class_folders(tmp_path, 10, 2)
    whole = datasets.load("folder", tmp_path / "train").splits[0]
    source = datasets.load("folder", tmp_path / "train", Reading(holdout=0.3, seed=1))
    train, val = source.splits
    assert [np.bincount(split.labels).tolist() for split in (train, val)] == [[7, 7], [3, 3]]
    assert sorted(train.names + val.names) == whole.names and "6 images held out as val" in source.notes[0]
    for name, label, i in zip(val.names, val.labels, range(6)):
        assert val.read(i).tobytes() == (tmp_path / "train" / name).read_bytes() and name.startswith(f"class{label}")
    again, other = (datasets.load("folder", tmp_path / "train", Reading(holdout=0.3, seed=i)).splits[1] for i in (1, 2))
    assert again.names == val.names != other.names
    assert len({Reading(holdout=0.3, seed=i).digest() for i in (1, 2)} | {Reading().digest()}) == 3  # a rerun sees it
    class_folders(tmp_path, 1, 2, split="val")
    with pytest.raises(UserError, match="--holdout: the source has splits already: train, val"):
        datasets.load("folder", tmp_path, Reading(holdout=0.3))
