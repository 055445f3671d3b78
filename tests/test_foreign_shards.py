"""Tars and betons as other people make them: what becomes the image, what the label, and what is said."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pictures import encoded, jpeg, pixels
from PIL import Image
from test_sources import official

from manyview.pipeline import beton, codec, tar
from manyview.pipeline.convert.index_foreign import index_foreign
from manyview.pipeline.convert.sources import Reading, datasets, imagenet
from manyview.pipeline.convert.verify import verify
from manyview.pipeline.convert.write import write_shards
from manyview.pipeline.errors import UserError
from manyview.pipeline.manifest import Options, read_manifest
from manyview.pipeline.store import Store, splits

SMALL = jpeg(1, 72, 96)


def tar_bytes(members: list[tuple[str, bytes]], **options) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def tar_of(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members, **options))
    return path


def samples(*parts: str, n: int = 6, text=lambda i: str(i % 3)) -> list[tuple[str, bytes]]:
    """Parts of n samples: images by their last suffix, texts otherwise."""

    def content(part: str, i: int) -> bytes:
        kind = {"jpg": "JPEG", "png": "PNG", "bmp": "BMP", "webp": "WEBP"}.get(part.rpartition(".")[2])
        return encoded(pixels(len(part), 72, 96), kind) if kind else text(i).encode()

    return [(f"{i:04d}.{part}", content(part, i)) for i in range(n) for part in parts]


def labels(source: Path, **parts) -> dict[str, int]:
    """Label by key, as `import` and `index` both have it."""
    loaded = datasets.load("shards", source, Reading(**parts))
    return {
        name.rpartition(".")[0]: int(label) for split in loaded.splits for name, label in zip(split.names, split.labels)
    }


def both_ways(source: Path, tmp_path: Path, **parts) -> dict[str, int]:
    """The same by `import` and by `index`, each verified; labels by key."""
    reading = Reading(**parts)
    write_shards(Options("shards"), source, tmp_path / "import", reading=reading, quiet=True, max_rejected=0.5)
    index_foreign(source, tmp_path / "index", reading=reading, quiet=True, max_rejected=0.5)
    found = []
    for out in (tmp_path / "import", tmp_path / "index"):
        assert verify(out) == []
        stores = [Store(out, split) for split in splits(out)]
        found.append({store.key(i): int(store.labels[i]) for store in stores for i in range(len(store))})
    assert found[0] == found[1]
    return dict(sorted(found[0].items()))


# --- labels -----------------------------------------------------------------------------------------------------------


def notes(source: Path, **parts) -> str:
    return "; ".join(datasets.load("shards", source, Reading(**parts)).notes)


def test_free_text_is_no_class_unless_asked_for(tmp_path):
    tar_of(
        tmp_path / "in" / "00000.tar", samples("jpg", "txt", "json", text=lambda i: json.dumps({"caption": f"a {i}"}))
    )
    assert set(both_ways(tmp_path / "in", tmp_path).values()) == {-1}
    for out in ("import", "index"):
        assert "6 images without labels: their .txt hold text" in read_manifest(tmp_path / out)["notes"][0]
    tar_of(tmp_path / "in" / "00000.tar", samples("jpg", "txt", text=lambda i: "cat" if i % 2 else "ant"))
    assert set(labels(tmp_path / "in").values()) == {-1}
    assert list(labels(tmp_path / "in", label_part="txt").values()) == [0, 1] * 3


def test_captions_that_are_numbers_by_chance_are_captions(tmp_path):
    tar_of(tmp_path / "x.tar", samples("jpg", "txt", text=lambda i: "1984" if i == 2 else f"a book of {i}"))
    assert set(labels(tmp_path).values()) == {-1}
    tar_of(tmp_path / "x.tar", samples("jpg", "txt"))
    assert list(labels(tmp_path).values()) == [0, 1, 2] * 2


@pytest.mark.parametrize("odd", ["", "cat", "1.5", "3,4", "\x00", "--", "1e9", "nan"])
@pytest.mark.parametrize("part", ["cls", "label", "txt", "output.cls"])
def test_an_odd_label_sets_its_sample_aside_and_renumbers_nobody(tmp_path, odd, part):
    tar_of(tmp_path / "x.tar", samples("jpg", part, text=lambda i: odd if i == 4 else str(i % 3)))
    loaded = datasets.load("shards", tmp_path)
    assert loaded.splits[0].labels.tolist() == [0, 1, 2, 0, 2] and loaded.classes == ["0", "1", "2"]
    assert [item["name"] for item in loaded.problems] == ["0004"]


def test_a_number_among_names_is_set_aside_too(tmp_path):
    names = ["bee", "ant", "cat", "7", "ant", "bée"]
    tar_of(tmp_path / "x.tar", samples("jpg", "cls", text=lambda i: names[i]))
    loaded = datasets.load("shards", tmp_path)
    assert loaded.classes == ["ant", "bee", "bée", "cat"] and loaded.splits[0].labels.tolist() == [1, 0, 3, 0, 2]
    assert [item["reason"] for item in loaded.problems] == ["its label '7' is a number among names"]


def test_the_same_name_in_two_spellings_of_unicode_is_one_class(tmp_path):
    tar_of(tmp_path / "x.tar", samples("jpg", "cls", text=lambda i: ["caf\u00e9", "cafe\u0301"][i % 2]))
    assert set(labels(tmp_path).values()) == {0}


@pytest.mark.parametrize(
    "said,label",
    [
        ({"label": 2}, 2),
        ({"cls": "2"}, 2),
        ({"class": 2.0}, 2),
        ({"label": None}, -1),
        ({"id": 7}, -1),
        ([2], -1),
        (2, -1),
    ],
)
def test_what_a_json_says(tmp_path, said, label):
    tar_of(tmp_path / "x.tar", samples("jpg", "json", text=lambda _: json.dumps(said)))
    assert set(labels(tmp_path).values()) == {label}


@pytest.mark.parametrize(
    "text", ["{", "[" * 100_000, '{"label": [1, 0]}', '{"label": true}', '{"label": 1.5}', "9" * 5000 + "x"]
)
def test_a_json_that_is_no_label_sets_its_sample_aside(tmp_path, text):
    tar_of(tmp_path / "x.tar", samples("jpg", "json", text=lambda i: text if i == 1 else '{"label": 3}'))
    loaded = datasets.load("shards", tmp_path)
    assert loaded.splits[0].labels.tolist() == [3] * 5 and [item["name"] for item in loaded.problems] == ["0001"]


def test_class_folders_in_a_tar(tmp_path):
    members = [(f"./train/{name}/{name}{i}.jpg", SMALL) for name in ("cat", "10", "9") for i in range(2)]
    tar_of(tmp_path / "in" / "x.tar", members)
    assert set(labels(tmp_path / "in").values()) == {-1}
    assert "no .cls, .json or .txt; --label-part folder takes 10, 9, cat" in notes(tmp_path / "in")
    found = labels(tmp_path / "in", label_part="folder")
    assert {key.split("/")[2]: label for key, label in found.items()} == {"10": 0, "9": 1, "cat": 2}
    with pytest.raises(UserError, match="lies in no folder"):
        labels(tar_of(tmp_path / "flat.tar", samples("jpg")), label_part="folder")


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts,image",
    [
        (("input.jpg", "output.cls"), "input.jpg"), (("jpg", "png", "cls"), "jpg"), (("jpg", "bmp", "cls"), "jpg"),
        (("webp", "png", "cls"), "webp"), (("png", "seg.jpg", "cls"), "png"), (("mask.png", "rgb.jpg", "cls"), "rgb.jpg"),
    ],
)  # fmt: skip
def test_which_part_is_the_image(tmp_path, parts, image):
    tar_of(tmp_path / "x.tar", samples(*parts))
    split = datasets.load("shards", tmp_path).splits[0]
    expected = encoded(
        pixels(len(image), 72, 96), {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[image.rpartition(".")[2]]
    )
    assert split.read(0).tobytes() == expected and split.labels.tolist() == [0, 1, 2] * 2
    several = len(parts) > 2
    assert (f"6 samples have several images: {image} is taken" in notes(tmp_path)) == several


@pytest.mark.parametrize("parts", [("left.jpg", "right.jpg"), ("jpg", "webp"), ("png", "bmp"), ("a.png", "b.bmp")])
def test_images_of_equal_rank_are_refused_and_named(tmp_path, parts):
    tar_of(tmp_path / "in" / "x.tar", samples(*parts, "cls"))
    names = ", ".join(sorted(parts)).replace(".", r"\.")
    with pytest.raises(UserError, match=rf"has several images \({names}\): --image-part names"):
        datasets.load("shards", tmp_path / "in")
    split = datasets.load("shards", tmp_path / "in", Reading(image_part=parts[1])).splits[0]
    assert len(split.read(0)) == len(dict(samples(*parts))[f"0000.{parts[1]}"])
    with pytest.raises(UserError, match=r"has no image 'middle\.jpg', only"):
        datasets.load("shards", tmp_path / "in", Reading(image_part="middle.jpg"))
    with pytest.raises(UserError, match=r"has no part 'fine\.cls', only"):
        datasets.load("shards", tmp_path / "in", Reading(image_part=parts[1], label_part="fine.cls"))


def test_several_labels_are_refused_and_one_is_taken_when_named(tmp_path):
    tar_of(tmp_path / "in" / "x.tar", samples("jpg", "coarse.cls", "fine.cls"))
    with pytest.raises(UserError, match=r"has several labels \(coarse\.cls, fine\.cls\): --label-part names"):
        labels(tmp_path / "in")
    assert list(both_ways(tmp_path / "in", tmp_path, label_part="fine.cls").values()) != []
    assert set(labels(tmp_path / "in", label_part="none").values()) == {-1}


def test_what_a_mac_and_other_systems_add_is_no_sample(tmp_path):
    members = []
    for name in (
        "./.DS_Store",
        "./README",
        "./__meta__.json",
        "__MACOSX/._x",
        "a/.cache/x.jpg",
        "Thumbs.db",
        "@eaDir/0.jpg",
    ):
        members.append((name, SMALL))
    for name, data in samples("jpg", "cls", n=10):
        members += [(f"./._{name}", bytes.fromhex("0005160700020000") + bytes(60)), (f"./{name}", data)]
    tar_of(tmp_path / "in" / "x.tar", members)
    (tmp_path / "in" / "._x.tar").write_bytes(b"\0\5\x16\7")
    loaded = datasets.load("shards", tmp_path / "in")
    assert loaded.splits[0].labels.tolist() == [i % 3 for i in range(10)] and not loaded.problems
    assert loaded.ignored == 7 + 20


def test_parts_of_a_sample_need_not_lie_together(tmp_path):
    members = samples("jpg", "cls")
    tar_of(tmp_path / "in" / "x.tar", sorted(members, key=lambda member: member[0].rpartition(".")[2]))
    assert both_ways(tmp_path / "in", tmp_path) == {f"{i:04d}": i % 3 for i in range(6)}
    tar_of(tmp_path / "in" / "x.tar", members + members[:2])
    loaded = datasets.load("shards", tmp_path / "in")
    assert [(item["name"], item["reason"]) for item in loaded.problems] == [
        ("0000", "its key occurs twice in this shard")
    ]
    assert loaded.splits[0].labels.tolist() == [0, 1, 2] * 2


@pytest.mark.parametrize("folders", [("a", "b"), ("train", "val"), ("x/1", "x/2", "y/1")])
def test_shards_of_the_same_name(tmp_path, folders):
    for folder in folders:
        tar_of(tmp_path / "in" / folder / "00000.tar", samples("jpg", "cls"))
    found = both_ways(tmp_path / "in", tmp_path)
    expected = {f"{i:04d}" for i in range(6)}
    if folders[0] != "train":
        expected = {f"{folder}/00000/{key}" for folder in folders for key in expected}
    assert set(found) == expected
    index_foreign(tmp_path / "in", quiet=True)  # in place
    assert verify(tmp_path / "in") == [] and len(list((tmp_path / "in").rglob("*.idx"))) == len(folders)


@pytest.mark.parametrize("names", [("train-0.tar.gz",), ("a.tgz", "b.tar"), ("A.TAR.XZ",), ("x.tar.zst",)])
def test_packed_shards_are_refused_in_one_line(tmp_path, names):
    for name in names:
        (tmp_path / name).write_bytes(b"\x1f\x8b" + bytes(100))
    for use in (labels, index_foreign):
        with pytest.raises(UserError, match="1 compressed tars, which cannot be read at random: unpack them"):
            use(tmp_path)
    with pytest.raises(UserError, match="compressed"):
        labels(tmp_path / names[0])


def test_a_packed_tar_under_a_plain_name_is_known_by_its_bytes(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(UserError, match="is compressed with gzip"):
        labels(tmp_path)


# --- the archive ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(tmp_path, kind):
    names = ["a.jpg", "folder/" + "k" * 80 + ".cls", "p" * 90 + "/" + "n" * 90 + ".jpg", "plain", "b/"]
    if kind != tarfile.USTAR_FORMAT:
        names += ["d" * 300 + ".jpg", "f\u00fcr/\u6f22\u5b57.jpg", "e/" * 200 + "x.cls"]
    path = tar_of(tmp_path / "x.tar", [(name, bytes(i * 211)) for i, name in enumerate(names)], format=kind)
    with tarfile.open(path, "a", format=kind) as archive:
        for type, name in ((tarfile.DIRTYPE, "dir"), (tarfile.SYMTYPE, "link"), (tarfile.FIFOTYPE, "pipe")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = type, "l" * (90 if kind == tarfile.USTAR_FORMAT else 150)
            archive.addfile(info)
    with tarfile.open(path) as archive:
        expected = [(info.name, info.type, info.offset_data, info.size) for info in archive]
    assert [tuple(member) for member in tar.members(path)] == expected
    refused = [member.refused() for member in tar.members(path)]
    assert refused[-3:] == ["", "is a link", "is no regular file"] and not any(refused[:-3])


@pytest.mark.parametrize("gap", [0, 512, 1024, 10_240])
def test_archives_one_behind_the_other_are_one(tmp_path, gap):
    first, second = (tar_bytes(samples("jpg", "cls", n=8)[i : i + 8]) for i in (0, 8))
    path = tmp_path / "in" / "x.tar"
    path.parent.mkdir()
    path.write_bytes(first + bytes(gap) + second)
    assert both_ways(tmp_path / "in", tmp_path) == {f"{i:04d}": i % 3 for i in range(8)}


@pytest.mark.parametrize("junk", [b"x" * 512, b"\1" + bytes(600), b"PK\3\4" + bytes(2000)])
def test_what_is_no_archive_behind_one_is_refused_with_its_place(tmp_path, junk):
    data = tar_bytes(samples("jpg", "cls"))
    (tmp_path / "x.tar").write_bytes(data + junk)
    for use in (labels, index_foreign):
        with pytest.raises(UserError, match=rf"x\.tar: .*byte {len(data)}"):
            use(tmp_path)


def test_a_damaged_header_is_refused_wherever_it_is(tmp_path):
    members = samples("jpg", "cls")
    data, path = tar_bytes(members), tmp_path / "x.tar"
    path.write_bytes(data)
    headers = [member.offset - tar.BLOCK for member in tar.members(path)]
    rng = np.random.default_rng(0)
    for at in headers:
        damaged = bytearray(data)
        if at % 3:
            damaged[at + int(rng.integers(0, 100))] ^= 1 << int(rng.integers(8))
        else:
            damaged[at : at + tar.BLOCK] = bytes(tar.BLOCK)  # as if the archive ended there
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"x\.tar: no header of a tar at byte {at}\b"):
            labels(tmp_path)


@pytest.mark.parametrize("parts", [("jpg", "cls"), ("cls", "jpg"), ("jpg",)])
def test_a_tar_that_was_cut_off_is_refused_unless_allowed(tmp_path, parts):
    path = tar_of(tmp_path / "x.tar", samples(*parts))
    data = path.read_bytes()
    ends = [member.offset + -(-member.size // 512) * 512 for member in tar.members(path)]
    for number, end in enumerate(ends):
        for cut in (end - 600, end, end + 100)[
            : 3 if number + 1 < len(ends) else 2
        ]:  # inside, behind, in the next header
            path.write_bytes(data[:cut])
            with pytest.raises(UserError, match=r"is cut off after \d+ samples .*--allow-cut takes those"):
                labels(path)
            whole = (number + (cut >= end)) // len(parts)
            if whole > 1:  # of the first one nobody knows what parts it had
                expected = {f"{i:04d}": i % 3 if "cls" in parts else -1 for i in range(whole)}
                assert labels(path, allow_cut=True) == expected
    assert labels(path, allow_cut=True).keys() == {f"{i:04d}" for i in range(6)}


def test_index_of_a_tar_that_was_cut_off_verifies(tmp_path):
    path = tar_of(tmp_path / "in" / "x.tar", samples("jpg", "cls"))
    path.write_bytes(path.read_bytes()[: [*tar.members(path)][7].offset + 512])
    assert both_ways(tmp_path / "in", tmp_path, allow_cut=True) == {f"{i:04d}": i % 3 for i in range(4)}


def hostile(name: str, size: bytes, type: bytes = b"0") -> bytes:
    """A header with a right checksum whose size field is these 12 bytes."""
    block = bytearray(tar.header(name, 0))
    block[124:136], block[156:157] = size, type
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "size",
    [
        b"\xff" * 12, b"\xff" * 11 + b"\x00", b"\x80" + bytes(3) + (2**62).to_bytes(8, "big"), b"\x80" + b"\x7f" * 11,
        b"77777777777\0", b"-0000000001\0", b"0000000zzz\0\0", b"\x80" + bytes(3) + (2**40).to_bytes(8, "big"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("type", [b"0", b"L", b"x", b"g", b"S", b"K"])
def test_sizes_that_cannot_be_are_refused(tmp_path, size, type):
    (tmp_path / "x.tar").write_bytes(
        tar_bytes(samples("jpg", "cls"))[:-10_240] + hostile("b.jpg", size, type) + bytes(2048)
    )
    with pytest.raises(UserError, match=r"x\.tar: "):
        labels(tmp_path)


def test_a_label_of_64_gigabytes_of_holes_is_not_read(tmp_path):
    data = tar_bytes(samples("jpg", "cls"))
    body = data[: len(data.rstrip(b"\0")) // 512 * 512 + 512]
    with open(tmp_path / "x.tar", "wb") as file:
        file.write(body + tar.header("b.jpg", len(SMALL)) + SMALL + bytes(-len(SMALL) % 512))
        file.write(hostile("b.cls", b"\x80" + bytes(3) + (64 << 30).to_bytes(8, "big")))
        file.truncate(file.tell() + (64 << 30))
        file.seek(0, 2)
        file.write(bytes(1024))
    loaded = datasets.load("shards", tmp_path)
    assert (
        len(loaded.splits[0].names) == 6 and "68,719,476,736 bytes, which is no label" in loaded.problems[0]["reason"]
    )


# --- betons -----------------------------------------------------------------------------------------------------------


class Photos:
    """What the stock writer takes: an image, its number, a class, the class as a float, a fraction, one of four as an array."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int):
        return (
            pixels(i, 72, 96),
            i,
            i % 5,
            0.5 if i == 3 else float(i % 4),
            i + 0.25,
            np.eye(4, dtype=np.float32)[i % 4],
        )


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> bytes:
    from ffcv.fields import FloatField, IntField, NDArrayField, RGBImageField
    from ffcv.writer import DatasetWriter

    path = tmp_path_factory.mktemp("beton") / "x.beton"
    fields = {"image": RGBImageField(write_mode="jpg"), "index": IntField(), "label": IntField()}
    fields |= {"whole": FloatField(), "score": FloatField(), "hot": NDArrayField(np.dtype("float32"), (4,))}
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(Photos())
    return path.read_bytes()


def renamed(stock: bytes, path: Path, *names: str, types: tuple[int, ...] = ()) -> Path:
    """The same with these names for its fields; `types`: other types, of the same layout."""
    data, fields = bytearray(stock), beton.HEADER.itemsize
    for i, name in enumerate(names):
        at = fields + i * beton.FIELD.itemsize + 1
        data[at : at + 16] = name.encode().ljust(16, b"\0")
    for i, type in enumerate(types):
        data[fields + i * beton.FIELD.itemsize] = type
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return path.parent


@pytest.mark.slow
def test_the_label_of_a_beton_is_the_field_of_that_name(tmp_path, stock):
    classes = [i % 5 for i in range(12)]
    given = renamed(stock, tmp_path / "in" / "x.beton")
    assert list(both_ways(given, tmp_path / "1").values()) == classes
    assert list(labels(given, label_part="index").values()) == list(range(12))
    for name in ("target", "class", "cls"):
        assert list(labels(renamed(stock, tmp_path / name / "x.beton", "image", "id", name)).values()) == classes
    unnamed = renamed(stock, tmp_path / "unnamed" / "x.beton", "image", "a", "b")
    with pytest.raises(UserError, match=r"several fields of whole numbers \(a, b\): --label-part names"):
        labels(unnamed)
    assert list(both_ways(unnamed, tmp_path / "2", label_part="b").values()) == classes
    with pytest.raises(UserError, match=r"no field 'c' that could be the label, only a, b, whole, score, hot"):
        labels(unnamed, label_part="c")
    assert not notes(given)


@pytest.mark.slow
def test_numbers_of_a_beton_that_are_no_classes(tmp_path, stock):
    given = renamed(stock, tmp_path / "in" / "x.beton", "image", "a", "b", "label")
    expected = {f"{i:08d}": i % 4 for i in range(12) if i != 3}  # the odd one is set aside
    assert both_ways(given, tmp_path / "1") == expected and not notes(given)
    for place, why in ((4, "holds fractions"), (5, "is an array")):
        names = ["image", "a", "b", "c", "d", "e"]
        names[place] = "label"
        given = renamed(stock, tmp_path / why / "x.beton", *names)
        assert set(both_ways(given, tmp_path / f"{why} out").values()) == {-1}
        assert f"12 images without labels: field label {why}" in notes(given)


def test_imagenets_own_archives_are_whole_or_refused(tmp_path):
    """Outer and inner archives: a damaged header, a cut and a lost end are refused by archive and byte."""
    official(tmp_path, tmp_path / "folders")
    path = tmp_path / imagenet.TRAIN
    data = path.read_bytes()
    outer = list(tar.members(path))
    inner = [member for place in outer for member in tar.members(path, place.offset, place.offset + place.size)]
    assert len(outer) == 3 and len(inner) == 9 and len(imagenet.imagenet(tmp_path).splits[0].names) == 9
    for member in (*outer, *inner):
        at = member.offset - tar.BLOCK
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(UserError, match=rf"{imagenet.TRAIN} is no whole tar archive.*byte {at}\b"):
            imagenet.imagenet(tmp_path)
    path.write_bytes(data[: inner[-1].offset + 700])
    with pytest.raises(UserError, match=f"{imagenet.TRAIN} is no whole tar archive"):
        imagenet.imagenet(tmp_path)


def grey_of_sampling(luma: int) -> bytes:
    """A JPEG of one grey, of a chroma sampling that no encoder at hand writes: its only MCU, code by code."""
    across, down = luma >> 4, luma & 15
    data = encoded(Image.new("RGB", (8 * across, 8 * down), (128, 128, 128)), subsampling=0)
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda") + 14
    bits = "001010" * (across * down) + "0000" * 2  # DC 0 and end of block, of luma and of both chromas
    codes = int(bits.ljust(-(-len(bits) // 8) * 8, "1"), 2).to_bytes(-(-len(bits) // 8), "big")
    return data[: frame + 11] + bytes([luma]) + data[frame + 12 : scan] + codes + b"\xff\xd9"


@pytest.mark.parametrize("luma", [0x42, 0x24, 0x31])
def test_kinds_of_jpeg_that_only_import_reads_are_not_damaged(tmp_path, luma):
    tar_of(tmp_path / "in" / "x.tar", [("a.jpg", grey_of_sampling(luma)), ("a.cls", b"0"), ("b.jpg", SMALL)])
    write_shards(Options("shards"), tmp_path / "in", tmp_path / "out", quiet=True)
    store = Store(tmp_path / "out")
    image = codec.decode(store.read([store.key(i) for i in range(2)].index("a")))
    assert image.shape == (8 * (luma & 15), 8 * (luma >> 4), 3) and np.abs(image.astype(int) - 128).max() <= 1
    with pytest.raises(UserError, match=r"1 images cannot be read where they are.*: a; .* import "):
        index_foreign(tmp_path / "in", tmp_path / "index", quiet=True)
