from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from conftest import program
from pictures import class_folders, encoded, jpeg, pixels

from manyview.pipeline.convert.sources import Source, arrays, datasets, imagenet, shards
from manyview.pipeline.errors import UserError


def names(source: Source) -> dict[str, list[str]]:
    return {split.name: split.names for split in source.splits}


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
    loaded = datasets.load("imagenet100", tmp_path)
    assert loaded.classes == sorted(classes) and len(loaded.splits[0].names) == 100


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
    loaded = datasets.load("shards", tmp_path)
    assert names(loaded) == {"train": ["good.jpg"]} and loaded.splits[0].labels.tolist() == [4]
    assert [item["reason"] for item in loaded.problems] == ["its name climbs out of the archive"] * 2 + ["is a link"]


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
    loaded = datasets.load("shards", tmp_path)
    reasons = {item["name"]: item["reason"] for item in loaded.problems}
    assert set(reasons) == {"id", "many", "below"} and all("is no class's number" in text for text in reasons.values())
    (split,) = loaded.splits
    assert dict(zip(split.names, split.labels.tolist()))["good.jpg"] == 4 and len(loaded.classes) == 5
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
    loaded = datasets.load("digits", None)
    assert [len(split.names) for split in loaded.splits] == [1438, 359]
    assert loaded.splits[0].read(0).shape == (8, 8)
    assert max(int(loaded.splits[0].read(i).max()) for i in range(50)) == 255
    assert {int(label) for label in loaded.splits[1].labels} == set(range(10))


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_from_idx_files(tmp_path, packed):
    rng = np.random.default_rng(0)
    for part, n in (("train", 7), ("t10k", 3)):
        images, labels = rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n, np.uint8)
        for name, values in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            data = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()
            (tmp_path / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(data) if packed else data)
    loaded = datasets.load("fashion-mnist", tmp_path)
    assert_watched(loaded, tmp_path, 4)
    assert [len(split.names) for split in loaded.splits] == [7, 3] and loaded.classes[0] == "T-shirt/top"
    assert np.array_equal(loaded.splits[1].read(2), images[2]) and loaded.splits[1].labels.tolist() == labels.tolist()
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


def assert_watched(loaded: Source, folder: Path, files: int) -> None:
    """The files that the arrays came from are watched, and each image is as young as the youngest of its own."""
    paths = [Path(path) for path in loaded.watch]
    assert len(set(paths)) == files and {path.parent for path in paths} == {folder.resolve()}
    youngest = max(path.stat().st_ctime_ns for path in paths)
    assert max(split.times.max() for split in loaded.splits) == youngest
    assert all(len(split.times) == len(split.names) for split in loaded.splits)


@pytest.mark.parametrize("dataset", ["cifar10", "stl10", "fashion-mnist"])
def test_fetching_without_a_network_is_one_line(tmp_path, dataset, monkeypatch):
    for name in ("http_proxy", "https_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9" if name.startswith("http") else "")
    monkeypatch.setattr(urllib.request, "_opener", None)  # which remembers the proxies that there were
    words = ["write", "--dataset", dataset, "--source", tmp_path, "--out", tmp_path / "out", "--download"]
    done = program("tools/shards.py", *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: {dataset} cannot be fetched into {tmp_path}: " in done.stderr and "Connection refu" in done.stderr


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
    loaded = datasets.load("cifar10", tmp_path)
    assert_watched(loaded, root, 3)
    assert loaded.classes == list("abcdefghij") and [len(split.names) for split in loaded.splits] == [6, 4]
    expected = blocks["test_batch"]["data"][3].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(loaded.splits[1].read(3), expected)


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
    loaded = datasets.load("stl10", tmp_path)
    assert_watched(loaded, root, 6)
    assert {split.name: len(split.names) for split in loaded.splits} == {"train": 5, "val": 4, "unlabelled": 6}
    by_name = {split.name: split for split in loaded.splits}
    assert (by_name["unlabelled"].labels == -1).all() and by_name["train"].labels.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(by_name["unlabelled"].read(5), images[5].transpose(1, 2, 0))


def test_cifar_from_class_folders(tmp_path):
    class_folders(class_folders(tmp_path, 1, 2), 1, 2, split="test")
    assert datasets.load("cifar10", tmp_path).classes == ["class0", "class1"]
