from __future__ import annotations

import errno
import gzip
import io
import os
import pickle
import re
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import command
from pictures import class_folders, encoded, jpeg, pixels

from manyview.pipeline import files
from manyview.pipeline.convert.sources import Reading, Source, arrays, datasets, imagenet, shards
from manyview.pipeline.errors import UserError


def names(source: Source) -> dict[str, list[str]]:
    return {split.name: split.names for split in source.splits}


def test_class_folders_with_splits(tmp_path):
    class_folders(class_folders(tmp_path, 2, 2), 1, 3, split="test")
    (tmp_path / "train" / "class0" / "notes.txt").write_text("no image")
    found = datasets.load("folder", tmp_path)
    assert found.classes == ["class0", "class1", "class2"] and found.ignored == 1
    assert names(found)["train"] == [f"class{label}/photo{i}.jpg" for label in (0, 1) for i in (0, 1)]
    assert found.splits[0].labels.tolist() == [0, 0, 1, 1] and found.splits[1].name == "val"
    for split, folder in zip(found.splits, ("train", "test")):
        for i, name in enumerate(split.names):
            data = (tmp_path / folder / name).read_bytes()
            assert split.read(i).tobytes() == data and split.sizes[i] == len(data)


def test_a_tree_without_class_folders_has_no_labels(tmp_path):
    for name in ("a.jpg", "b.png"):
        (tmp_path / name).write_bytes(jpeg(1))
    (tmp_path / "empty").mkdir()
    found = datasets.load("folder", tmp_path)
    assert names(found) == {"train": ["a.jpg", "b.png"]}
    assert found.classes == [] and (found.splits[0].labels == -1).all() and not found.problems
    class_folders(tmp_path / "other", 1, 2)
    assert (datasets.load("folder", tmp_path / "other", Reading(unlabelled=True)).splits[0].labels == -1).all()


def test_an_image_beside_the_class_folders_is_a_problem_and_the_others_keep_their_labels(tmp_path):
    (class_folders(tmp_path, 1, 2) / "train" / "stray.jpg").write_bytes(jpeg(1))
    (class_folders(tmp_path, 1, 2, split="val") / "val" / "class1" / "deep").mkdir()
    (tmp_path / "val" / "class1" / "deep" / "x.jpg").write_bytes(jpeg(2))
    found = datasets.load("folder", tmp_path)
    assert names(found)["train"] == ["class0/photo0.jpg", "class1/photo0.jpg"]
    assert [split.labels.tolist() for split in found.splits] == [[0, 1], [0, 1, 1]]
    assert [(item["split"], item["name"]) for item in found.problems] == [("train", "stray.jpg")]
    assert "beside the class folders" in found.problems[0]["reason"] and "--unlabelled" in found.problems[0]["reason"]
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
    found = datasets.load("folder", tmp_path)
    assert [split.name for split in found.splits] == ["train", "val"]
    path = tmp_path / "valid" / "class0" / "photo0.jpg"
    path.write_bytes(jpeg(99))
    assert found.splits[1].read(0).tobytes() == path.read_bytes()
    assert found.notes == ["test is left out, val is valid"]
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
    found = datasets.load("folder", tmp_path / "set")
    assert names(found)["train"] == ["class0/photo0.jpg", "class1/photo0.jpg", "class2/x.jpg"]
    assert {item["name"] for item in found.problems} == {"class0/back", "class0/self.jpg", "class0/gone.jpg"}


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


@pytest.mark.parametrize(
    "dataset,source,message",
    [
        ("imagnet", "x", "unknown dataset 'imagnet'; nearest: imagenet"),
        ("folder", None, "needs SOURCE"),
        ("folder", "nowhere", "does not exist"),
        ("folder", ".", "no images"),
        ("imagenet100", ".", "lacks 100 of 100 classes"),
        ("cifar10", ".", "--download"),
        ("stl10", ".", "--download"),
        ("shards", ".", "holds no .tar and no .beton"),
        ("cifar10", "s3:/bucket/x", "source s3://bucket/x is an address"),
    ],
)
def test_bad_requests_are_user_errors(tmp_path, dataset, source, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.").replace("(", r"\(")):
        datasets.load(dataset, source and (Path(source) if ":" in source else tmp_path / source))


def test_imagenet100_is_the_pinned_list(tmp_path):
    classes = imagenet.imagenet100_classes()
    assert len(classes) == 100 and {"n02869837", "n02090622", "n01558993"} <= classes
    for wnid in [*classes, "n01440764"]:
        (tmp_path / "train" / wnid).mkdir(parents=True)
        (tmp_path / "train" / wnid / f"{wnid}_1.JPEG").write_bytes(jpeg(1))
    found = datasets.load("imagenet100", tmp_path)
    assert found.classes == sorted(classes) and len(found.splits[0].names) == 100


# --- ImageNet's archives --------------------------------------------------------------------------------------------


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def official(root: Path, folder: Path) -> None:
    """The official layout and, in `folder`, the class folders that unpacking it gives."""
    from scipy.io import savemat

    wnids = ["n02", "n01", "n03"]  # the kit's numbers are not in alphabetical order
    train = {wnid: {f"{wnid}_{i}.JPEG": jpeg(10 * n + i) for i in range(3)} for n, wnid in enumerate(wnids)}
    val = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(50 + i) for i in range(1, 5)}
    truth = [3, 1, 2, 2]
    (root / imagenet.TRAIN).write_bytes(tar_of({f"{wnid}.tar": tar_of(images) for wnid, images in train.items()}))
    (root / imagenet.VAL).write_bytes(tar_of(dict(reversed(val.items()))))
    synsets = np.zeros(3, [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")])
    for i, wnid in enumerate(wnids):
        synsets[i] = (i + 1, wnid, "a thing")
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    kit = {"data/meta.mat": meta.getvalue(), "data/ILSVRC2012_validation_ground_truth.txt": b"3\n1\n2\n2\n"}
    (root / imagenet.DEVKIT).write_bytes(gzip.compress(tar_of(kit)))
    for wnid, images in train.items():
        for name, data in images.items():
            (folder / "train" / wnid).mkdir(parents=True, exist_ok=True)
            (folder / "train" / wnid / name).write_bytes(data)
    for (name, data), number in zip(val.items(), truth):
        (folder / "val" / wnids[number - 1]).mkdir(parents=True, exist_ok=True)
        (folder / "val" / wnids[number - 1] / name).write_bytes(data)


def test_official_archives_are_read_without_unpacking_and_equal_the_folders(tmp_path):
    for name in ("tars", "folders"):
        (tmp_path / name).mkdir()
    official(tmp_path / "tars", tmp_path / "folders")
    before = sorted((tmp_path / "tars").iterdir())
    one, other = (datasets.load("imagenet", tmp_path / name) for name in ("tars", "folders"))
    assert one.classes == other.classes == ["n01", "n02", "n03"]
    assert one.fingerprint() == other.fingerprint() and names(one) == names(other)
    for a, b in zip(one.splits, other.splits):
        assert a.labels.tolist() == b.labels.tolist()
        assert all(a.read(i).tobytes() == b.read(i).tobytes() for i in range(len(a.names)))
    assert sorted((tmp_path / "tars").iterdir()) == before


def test_damaged_official_archives_are_refused_by_name(tmp_path):
    (tmp_path / "f").mkdir()
    official(tmp_path, tmp_path / "f")
    (tmp_path / imagenet.DEVKIT).rename(tmp_path / "kit")
    with pytest.raises(UserError, match=imagenet.DEVKIT):
        datasets.load("imagenet", tmp_path)
    for kit in (b"<html>not found</html>", (tmp_path / "kit").read_bytes()[:-40]):
        (tmp_path / imagenet.DEVKIT).write_bytes(kit)
        with pytest.raises(UserError, match=rf"{imagenet.DEVKIT} is no whole \.tar\.gz"):
            datasets.load("imagenet", tmp_path)
    (tmp_path / "kit").rename(tmp_path / imagenet.DEVKIT)
    data = (tmp_path / imagenet.TRAIN).read_bytes()
    (tmp_path / imagenet.TRAIN).write_bytes(data[:9000])
    with pytest.raises(UserError, match=imagenet.TRAIN):
        datasets.load("imagenet", tmp_path)


def test_members_that_climb_out_or_link_are_set_aside(tmp_path):
    (tmp_path / "x.tar").write_bytes(
        tar_of({"../../evil.jpg": jpeg(1), "/root.jpg": jpeg(1), "good.jpg": jpeg(2), "good.cls": b"4"})
    )
    with tarfile.open(tmp_path / "x.tar", "a") as archive:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    found = datasets.load("shards", tmp_path)
    assert names(found) == {"train": ["good.jpg"]} and found.splits[0].labels.tolist() == [4]
    assert [item["reason"] for item in found.problems] == ["its name climbs out of the archive"] * 2 + ["is a link"]


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_samples_of_foreign_tars_that_make_no_sense_are_set_aside_one_by_one(tmp_path):
    images = {
        "id.jpg": jpeg(1), "id.cls": b"99999999999999999999", "many.jpg": jpeg(1), "many.cls": b"2000000000",
        "below.jpg": jpeg(1), "below.cls": b"-7", "five.jpg": jpeg(1), "five.json": b"5", "good.jpg": jpeg(2), "good.cls": b"4",
    }  # fmt: skip
    arrays = {
        "zero.npy": npy(np.zeros((0, 4, 3), np.uint8)), "empty.npy": b"", "cut.npy": npy(np.zeros((70, 70, 3), np.uint8))[:500],
        "header.npy": b"\x93NUMPY\x01\x00v\x00{(garbage" + b" " * 120, "zip.npy": b"PK\x03\x04" + bytes(40),
        "whole.npy": npy(pixels(1)),
    }  # fmt: skip
    (tmp_path / "x.tar").write_bytes(tar_of({**images, **arrays}))
    found = datasets.load("shards", tmp_path)
    reasons = {item["name"]: item["reason"] for item in found.problems}
    assert set(reasons) == {"id", "many", "below"} and all("is no class's number" in text for text in reasons.values())
    (split,) = found.splits
    assert dict(zip(split.names, split.labels.tolist()))["good.jpg"] == 4 and len(found.classes) == 5
    for name in arrays:
        if name == "whole.npy":
            assert np.array_equal(split.read(split.names.index(name)), pixels(1))
        else:
            with pytest.raises(ValueError, match=r"is no array|is no 8-bit image"):
                split.read(split.names.index(name))


def test_where_nothing_can_be_used_the_first_reason_is_given(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar_of({"a.jpg": jpeg(1), "a.cls": b"-7"}))
    with pytest.raises(UserError, match=r"not one of 1 images in .* the first is 'a': label -7 is no class's number"):
        datasets.load("shards", tmp_path)


# --- existing shards ------------------------------------------------------------------------------------------------


def test_shards_of_webdataset_are_a_source(tmp_path):
    import webdataset

    with webdataset.ShardWriter(str(tmp_path / "some-%03d.tar"), maxcount=4, verbose=0) as writer:
        for i in range(9):
            image = {"jpg": jpeg(i)} if i % 3 else {"png": encoded(pixels(i), "PNG")}
            writer.write({"__key__": f"s{i % 4}", **image, "json": {"label": "cat" if i % 2 else "ant"}})
    split = datasets.load("shards", tmp_path).splits[0]
    assert len(split.names) == 9 and "some-000/s0.png" in split.names  # keys that begin anew in every shard
    assert split.labels.tolist() == [0, 1, 0, 1] * 2 + [0]
    assert split.read(split.names.index("some-001/s1.jpg")).tobytes() == jpeg(5)


@pytest.mark.parametrize(
    "path,split",
    [("train-0001.tar", "train"), ("imagenet_val_3.tar", "val"), ("test/00.tar", "val"), ("carnival.tar", "train")],
)
def test_the_path_tells_the_split(tmp_path, path, split):
    assert shards.split_of(tmp_path / path, tmp_path) == split


# --- arrays ---------------------------------------------------------------------------------------------------------


def test_digits_are_all_there():
    found = datasets.load("digits", None)
    assert [len(split.names) for split in found.splits] == [1438, 359]
    assert found.splits[0].read(0).shape == (8, 8)
    assert max(int(found.splits[0].read(i).max()) for i in range(50)) == 255
    assert {int(label) for label in found.splits[1].labels} == set(range(10))


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_from_idx_files(tmp_path, packed):
    rng = np.random.default_rng(0)
    for part, n in (("train", 7), ("t10k", 3)):
        images, labels = rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n, np.uint8)
        for name, values in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            data = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()
            (tmp_path / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(data) if packed else data)
    found = datasets.load("fashion-mnist", tmp_path)
    assert_watched(found, tmp_path, 4)
    assert [len(split.names) for split in found.splits] == [7, 3] and found.classes[0] == "T-shirt/top"
    assert np.array_equal(found.splits[1].read(2), images[2]) and found.splits[1].labels.tolist() == labels.tolist()
    cut = tmp_path / ("t10k-images-idx3-ubyte" + (".gz" if packed else ""))
    whole = gzip.decompress(cut.read_bytes()) if packed else cut.read_bytes()
    stored = cut.read_bytes()
    cut.write_bytes(gzip.compress(whole[:-1]) if packed else whole[:-1])
    with pytest.raises(UserError, match="cut off"):
        datasets.load("fashion-mnist", tmp_path)
    if packed:
        cut.write_bytes(stored[: len(stored) // 2])
        with pytest.raises(UserError, match="is no whole gzip file"):
            datasets.load("fashion-mnist", tmp_path)
    cut.write_bytes(stored)
    few = tmp_path / ("train-labels-idx1-ubyte" + (".gz" if packed else ""))
    data = bytes([0, 0, 8, 1, 0, 0, 0, 5]) + bytes(5)
    few.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(UserError, match="has 7 images and 5 labels"):
        datasets.load("fashion-mnist", tmp_path)


def assert_watched(found: Source, folder: Path, files: int) -> None:
    """The files that the arrays came from are watched, and each image is as young as the youngest of its own."""
    paths = [Path(path) for path in found.watch]
    assert len(set(paths)) == files and {path.parent for path in paths} == {folder.resolve()}
    youngest = max(path.stat().st_ctime_ns for path in paths)
    assert max(split.times.max() for split in found.splits) == youngest
    assert all(len(split.times) == len(split.names) for split in found.splits)


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["cifar10", "stl10", "fashion-mnist"])
def test_fetching_without_a_network_is_one_line(tmp_path, dataset):
    nobody = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9") | {"no_proxy": "", "NO_PROXY": ""}
    words = ["write", "--dataset", dataset, "--source", tmp_path, "--out", tmp_path / "out", "--download"]
    done = command("tools/shards.py", *words, env=nobody)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: {dataset} cannot be fetched into {tmp_path}: " in done.stderr and "refused" in done.stderr


def test_fashion_mnist_nowhere_names_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(arrays, "DEBIAN_FASHION_MNIST", tmp_path / "none")
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        datasets.load("fashion-mnist", None)


def unchecked(monkeypatch, kind, **lists) -> None:
    """torchvision's own parser on files we made: only their checksums are not asked for."""
    for name, values in lists.items():
        monkeypatch.setattr(kind, name, values)
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)


def test_cifar_by_torchvision(tmp_path, monkeypatch):
    from torchvision import datasets as torchvision_datasets

    rng = np.random.default_rng(1)
    root = tmp_path / torchvision_datasets.CIFAR10.base_folder
    root.mkdir()
    blocks = {}
    for name, n in (("data_batch_1", 6), ("test_batch", 4)):
        blocks[name] = {"data": rng.integers(0, 256, (n, 3072), np.uint8), "labels": [i % 10 for i in range(n)]}
        (root / name).write_bytes(pickle.dumps(blocks[name]))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    unchecked(
        monkeypatch, torchvision_datasets.CIFAR10, train_list=[["data_batch_1", None]], test_list=[["test_batch", None]],
        meta={"filename": "batches.meta", "key": "label_names", "md5": None},
    )  # fmt: skip
    found = datasets.load("cifar10", tmp_path)
    assert_watched(found, root, 3)
    assert found.classes == list("abcdefghij") and [len(split.names) for split in found.splits] == [6, 4]
    expected = blocks["test_batch"]["data"][3].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(found.splits[1].read(3), expected)


def test_stl10_keeps_its_unlabelled_images_apart(tmp_path, monkeypatch):
    from torchvision import datasets as torchvision_datasets

    root = tmp_path / torchvision_datasets.STL10.base_folder
    root.mkdir()
    sizes = {"train": 5, "test": 4, "unlabeled": 6}
    for part, n in sizes.items():
        images = np.random.default_rng(n).integers(0, 256, (n, 3, 96, 96), np.uint8)
        images.transpose(0, 1, 3, 2).tofile(root / f"{part}_X.bin")
        if part != "unlabeled":
            (np.arange(n, dtype=np.uint8) % 10 + 1).tofile(root / f"{part}_y.bin")
    (root / "class_names.txt").write_text("\n".join(f"name{i}" for i in range(10)))
    unchecked(monkeypatch, torchvision_datasets.STL10)
    found = datasets.load("stl10", tmp_path)
    assert_watched(found, root, 6)
    assert {split.name: len(split.names) for split in found.splits} == {"train": 5, "val": 4, "unlabelled": 6}
    by_name = {split.name: split for split in found.splits}
    assert (by_name["unlabelled"].labels == -1).all() and by_name["train"].labels.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(by_name["unlabelled"].read(5), images[5].transpose(1, 2, 0))


def test_cifar_from_class_folders(tmp_path):
    class_folders(class_folders(tmp_path, 1, 2), 1, 2, split="test")
    assert datasets.load("cifar10", tmp_path).classes == ["class0", "class1"]
