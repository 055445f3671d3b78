from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pictures import class_folders, encoded, jpeg, pixels

from pipeline import archives, sources
from pipeline.errors import UserError


def names(source: sources.Source) -> dict[str, list[str]]:
    return {split.name: split.names for split in source.splits}


def test_class_folders_with_splits(tmp_path):
    class_folders(class_folders(tmp_path, 2, 2), 1, 3, split="test")
    (tmp_path / "train" / "class0" / "notes.txt").write_text("no image")
    found = sources.load("folder", tmp_path)
    assert found.classes == ["class0", "class1", "class2"] and found.ignored == 1
    assert names(found)["train"] == [f"class{label}/photo{i}.jpg" for label in (0, 1) for i in (0, 1)]
    assert found.splits[0].labels.tolist() == [0, 0, 1, 1] and found.splits[1].name == "val"
    for split, folder in zip(found.splits, ("train", "test")):
        for i, name in enumerate(split.names):
            data = (tmp_path / folder / name).read_bytes()
            assert split.read(i).tobytes() == data and split.sizes[i] == len(data)


def test_a_tree_without_class_folders_has_no_labels(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for place in ("a.jpg", "deep/b.png", "deep/er/c.JPEG"):
        (tmp_path / place).write_bytes(jpeg(1))
    found = sources.load("folder", tmp_path)
    assert names(found) == {"train": ["a.jpg", "deep/b.png", "deep/er/c.JPEG"]}
    assert found.classes == [] and (found.splits[0].labels == -1).all()
    class_folders(tmp_path / "other", 1, 2)
    assert (sources.load("folder", tmp_path / "other", unlabelled=True).splits[0].labels == -1).all()


def test_links_are_followed_once_and_loops_end(tmp_path):
    class_folders(tmp_path / "set", 1, 2)
    train = tmp_path / "set" / "train"
    (train / "class0" / "back").symlink_to(train)
    (train / "class0" / "self.jpg").symlink_to("self.jpg")
    (train / "class0" / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jpg").write_bytes(jpeg(2))
    (train / "class2").symlink_to(tmp_path / "elsewhere")
    found = sources.load("folder", tmp_path / "set")
    assert names(found)["train"] == ["class0/photo0.jpg", "class1/photo0.jpg", "class2/x.jpg"]
    assert {item["name"] for item in found.problems} == {"class0/back", "class0/self.jpg", "class0/gone.jpg"}


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    class_folders(tmp_path, 1, 2)
    denied = str(tmp_path / "train" / "class1")
    real = os.scandir

    def scandir(path):  # permissions do not stop root, who may be running this
        if path == denied:
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = sources.load("folder", tmp_path)
    assert found.problems == [{"split": "train", "name": "class1", "reason": "cannot be read: Permission denied"}]


def test_names_that_are_not_text_survive(tmp_path):
    folder = tmp_path / "train" / "one"
    folder.mkdir(parents=True)
    raw = [b"sp ace.jpg", b"new\nline.jpg", b"\xff\xfe.jpg", b"many.dots.in.it.jpg", "ümlaut.jpg".encode()]
    for name in raw:
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(jpeg(3))
    split = sources.load("folder", tmp_path).splits[0]
    assert sorted(os.fsencode(name) for name in split.names) == sorted(b"one/" + name for name in raw)
    assert all(split.read(i).tobytes() == jpeg(3) for i in range(5))


def test_a_file_that_vanishes_is_a_value_error(tmp_path):
    class_folders(tmp_path, 1, 1)
    split = sources.load("folder", tmp_path).splits[0]
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
    ],
)
def test_bad_requests_are_user_errors(tmp_path, dataset, source, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.").replace("(", r"\(")):
        sources.load(dataset, source and tmp_path / source)


def test_imagenet100_is_the_pinned_list(tmp_path):
    classes = sources.imagenet100_classes()
    assert len(classes) == 100 and {"n02869837", "n02090622", "n01558993"} <= classes
    for wnid in [*classes, "n01440764"]:
        (tmp_path / "train" / wnid).mkdir(parents=True)
        (tmp_path / "train" / wnid / f"{wnid}_1.JPEG").write_bytes(jpeg(1))
    found = sources.load("imagenet100", tmp_path)
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
    (root / archives.TRAIN).write_bytes(tar_of({f"{wnid}.tar": tar_of(images) for wnid, images in train.items()}))
    (root / archives.VAL).write_bytes(tar_of(dict(reversed(val.items()))))
    synsets = np.zeros(3, [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")])
    for i, wnid in enumerate(wnids):
        synsets[i] = (i + 1, wnid, "a thing")
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    kit = {"data/meta.mat": meta.getvalue(), "data/ILSVRC2012_validation_ground_truth.txt": b"3\n1\n2\n2\n"}
    (root / archives.DEVKIT).write_bytes(gzip.compress(tar_of(kit)))
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
    one, other = (sources.load("imagenet", tmp_path / name) for name in ("tars", "folders"))
    assert one.classes == other.classes == ["n01", "n02", "n03"]
    assert one.fingerprint() == other.fingerprint() and names(one) == names(other)
    for a, b in zip(one.splits, other.splits):
        assert a.labels.tolist() == b.labels.tolist()
        assert all(a.read(i).tobytes() == b.read(i).tobytes() for i in range(len(a.names)))
    assert sorted((tmp_path / "tars").iterdir()) == before


def test_damaged_official_archives_are_refused_by_name(tmp_path):
    (tmp_path / "f").mkdir()
    official(tmp_path, tmp_path / "f")
    (tmp_path / archives.DEVKIT).rename(tmp_path / "kit")
    with pytest.raises(UserError, match=archives.DEVKIT):
        sources.load("imagenet", tmp_path)
    (tmp_path / "kit").rename(tmp_path / archives.DEVKIT)
    data = (tmp_path / archives.TRAIN).read_bytes()
    (tmp_path / archives.TRAIN).write_bytes(data[:9000])
    with pytest.raises(UserError, match=archives.TRAIN):
        sources.load("imagenet", tmp_path)


def test_members_that_climb_out_or_link_are_set_aside(tmp_path):
    (tmp_path / "x.tar").write_bytes(
        tar_of({"../../evil.jpg": jpeg(1), "/root.jpg": jpeg(1), "good.jpg": jpeg(2), "good.cls": b"4"})
    )
    with tarfile.open(tmp_path / "x.tar", "a") as archive:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    found = sources.load("shards", tmp_path)
    assert names(found) == {"train": ["good.jpg"]} and found.splits[0].labels.tolist() == [4]
    assert [item["reason"] for item in found.problems] == ["its name climbs out of the archive"] * 2 + ["is a link"]


# --- existing shards ------------------------------------------------------------------------------------------------


def test_shards_of_webdataset_are_a_source(tmp_path):
    import webdataset

    with webdataset.ShardWriter(str(tmp_path / "some-%03d.tar"), maxcount=4, verbose=0) as writer:
        for i in range(9):
            image = {"jpg": jpeg(i)} if i % 3 else {"png": encoded(pixels(i), "PNG")}
            writer.write({"__key__": f"s{i % 4}", **image, "json": {"label": "cat" if i % 2 else "ant"}})
    split = sources.load("shards", tmp_path).splits[0]
    assert len(split.names) == 9 and "some-000/s0.png" in split.names  # keys that begin anew in every shard
    assert split.labels.tolist() == [0, 1, 0, 1] * 2 + [0]
    assert split.read(split.names.index("some-001/s1.jpg")).tobytes() == jpeg(5)


@pytest.mark.parametrize(
    "path,split",
    [("train-0001.tar", "train"), ("imagenet_val_3.tar", "val"), ("test/00.tar", "val"), ("carnival.tar", "train")],
)
def test_the_path_tells_the_split(tmp_path, path, split):
    assert archives.split_of(tmp_path / path, tmp_path) == split


# --- arrays ---------------------------------------------------------------------------------------------------------


def test_digits_are_all_there():
    found = sources.load("digits", None)
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
    found = sources.load("fashion-mnist", tmp_path)
    assert [len(split.names) for split in found.splits] == [7, 3] and found.classes[0] == "T-shirt/top"
    assert np.array_equal(found.splits[1].read(2), images[2]) and found.splits[1].labels.tolist() == labels.tolist()
    cut = tmp_path / ("t10k-images-idx3-ubyte" + (".gz" if packed else ""))
    whole = gzip.decompress(cut.read_bytes()) if packed else cut.read_bytes()
    cut.write_bytes(gzip.compress(whole[:-1]) if packed else whole[:-1])
    with pytest.raises(UserError, match="cut off"):
        sources.load("fashion-mnist", tmp_path)


def test_fashion_mnist_nowhere_names_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "DEBIAN_FASHION_MNIST", tmp_path / "none")
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        sources.load("fashion-mnist", None)


def unchecked(monkeypatch, kind, **lists) -> None:
    """torchvision's own parser on files we made: only their checksums are not asked for."""
    for name, values in lists.items():
        monkeypatch.setattr(kind, name, values)
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)


def test_cifar_by_torchvision(tmp_path, monkeypatch):
    from torchvision import datasets

    rng = np.random.default_rng(1)
    root = tmp_path / datasets.CIFAR10.base_folder
    root.mkdir()
    blocks = {}
    for name, n in (("data_batch_1", 6), ("test_batch", 4)):
        blocks[name] = {"data": rng.integers(0, 256, (n, 3072), np.uint8), "labels": [i % 10 for i in range(n)]}
        (root / name).write_bytes(pickle.dumps(blocks[name]))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    unchecked(
        monkeypatch, datasets.CIFAR10, train_list=[["data_batch_1", None]], test_list=[["test_batch", None]],
        meta={"filename": "batches.meta", "key": "label_names", "md5": None},
    )  # fmt: skip
    found = sources.load("cifar10", tmp_path)
    assert found.classes == list("abcdefghij") and [len(split.names) for split in found.splits] == [6, 4]
    expected = blocks["test_batch"]["data"][3].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(found.splits[1].read(3), expected)


def test_stl10_keeps_its_unlabelled_images_apart(tmp_path, monkeypatch):
    from torchvision import datasets

    root = tmp_path / datasets.STL10.base_folder
    root.mkdir()
    sizes = {"train": 5, "test": 4, "unlabeled": 6}
    for part, n in sizes.items():
        images = np.random.default_rng(n).integers(0, 256, (n, 3, 96, 96), np.uint8)
        images.transpose(0, 1, 3, 2).tofile(root / f"{part}_X.bin")
        if part != "unlabeled":
            (np.arange(n, dtype=np.uint8) % 10 + 1).tofile(root / f"{part}_y.bin")
    (root / "class_names.txt").write_text("\n".join(f"name{i}" for i in range(10)))
    unchecked(monkeypatch, datasets.STL10)
    found = sources.load("stl10", tmp_path)
    assert {split.name: len(split.names) for split in found.splits} == {"train": 5, "val": 4, "unlabelled": 6}
    by_name = {split.name: split for split in found.splits}
    assert (by_name["unlabelled"].labels == -1).all() and by_name["train"].labels.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(by_name["unlabelled"].read(5), images[5].transpose(1, 2, 0))


def test_cifar_from_class_folders(tmp_path):
    class_folders(class_folders(tmp_path, 1, 2), 1, 2, split="test")
    assert sources.load("cifar10", tmp_path).classes == ["class0", "class1"]
