"""The fault matrix: every damage to shards is found, and said with shard and key."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from pictures import class_folders

from manyview.pipeline import beton, index, tar
from manyview.pipeline.convert.verify import verify
from manyview.pipeline.convert.write import FORMATS, write_shards
from manyview.pipeline.errors import UserError
from manyview.pipeline.manifest import Options
from manyview.pipeline.store import Corrupt, Store

SUFFIX = {name: module.SUFFIX for name, module in FORMATS.items()}


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("verify")
    class_folders(root / "in", 4, 3)
    for format in FORMATS:
        write_shards(Options("folder", format), root / "in", root / format, quiet=True)
    return root


@pytest.fixture(params=FORMATS)
def folder(request, originals, tmp_path) -> Path:
    """A copy to break."""
    shutil.copytree(originals / request.param, tmp_path / request.param)
    return tmp_path / request.param


def shard_of(folder: Path) -> Path:
    return folder / f"train-00000{SUFFIX[folder.name]}"


def change(path: Path, at: int, data: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[at : at + len(data)] = data
    path.write_bytes(whole)


def reindex(folder: Path, edit) -> None:
    """Change columns or keys of the index and make its checksum right again: damage that only contents betray."""
    found = index.read(folder / "train.index")
    columns = {name: np.array(found[name]) for name in index.COLUMNS}
    keys = [found.key(i) for i in range(len(found))]
    edit(columns, keys)
    rows = list(zip(*(columns[name].tolist() for name in index.COLUMNS)))
    built = index.build(rows, keys)
    seal(folder, lambda part: part["index"].update(sha256=index.write(built, folder / "train.index")))
    seal(folder, lambda part: part.update(fingerprint=built.fingerprint(), count=len(built)))


def seal(folder: Path, edit) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest["splits"]["train"])
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_whole_folder_has_no_problems(folder):
    assert verify(folder) == []


def test_every_flipped_byte_of_a_payload_is_found_with_its_key(folder):
    store = Store(folder)
    rng = np.random.default_rng(0)
    for i in range(len(store)):
        row = {name: int(store._rows[name][i]) for name in ("offset", "length")}
        at = row["offset"] + int(rng.integers(row["length"]))
        original = shard_of(folder).read_bytes()
        change(shard_of(folder), at, bytes([original[at] ^ (1 << int(rng.integers(8)))]))
        problems = verify(folder)
        assert any(f"{shard_of(folder).name}: key {store.key(i)}: its bytes have changed" in line for line in problems)
        with pytest.raises(Corrupt, match=store.key(i)) as error:
            Store(folder).read(i)
        assert error.value.id == i and error.value.key == store.key(i)
        shard_of(folder).write_bytes(original)
    assert verify(folder) == []


def test_any_flipped_byte_anywhere_is_found(folder):
    rng = np.random.default_rng(1)
    original = shard_of(folder).read_bytes()
    for at in [0, 5, 16, 25, 100, 1100, len(original) - 1, *rng.integers(0, len(original), 10).tolist()]:
        change(shard_of(folder), at, bytes([original[at] ^ 0xFF]))
        assert any(shard_of(folder).name in line for line in verify(folder)), at
        shard_of(folder).write_bytes(original)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, -1])
def test_truncation_is_found_and_refused_by_name(folder, keep):
    data = shard_of(folder).read_bytes()
    shard_of(folder).write_bytes(data[: -1 if keep == -1 else int(len(data) * keep)])
    assert any("cut off" in line and shard_of(folder).name in line for line in verify(folder))
    with pytest.raises(UserError, match=shard_of(folder).name):
        Store(folder)


def test_a_missing_shard_is_named(folder):
    shard_of(folder).unlink()
    assert any("is missing" in line for line in verify(folder))


def test_a_key_missing_from_the_index_is_named(folder):
    """A .beton has no keys: there it is the place that is named."""
    row = Store(folder)._rows
    key, label, offset = row.key(3), row["label"][3], row["offset"][3]

    def edit(columns, keys):
        del keys[3]
        for name in columns:
            columns[name] = np.delete(columns[name], 3)

    reindex(folder, edit)
    lines = verify(folder)
    named = f"key {key}" if folder.name == "webdataset" else f"sample 3 at {offset}, label {label}"
    assert f"train: {shard_of(folder).name}: 11 of its 12 samples are in the index" in lines
    assert [line for line in lines if "missing from the index" in line] == [
        f"train: {shard_of(folder).name}: {named}: missing from the index"
    ]


def test_a_key_missing_from_the_archive_is_named(originals, tmp_path):
    folder = tmp_path / "webdataset"
    shutil.copytree(originals / "webdataset", folder)
    store = Store(folder)
    start = int(store._rows["offset"][3]) - tar.BLOCK
    end = int(store._rows["offset"][4]) - tar.BLOCK  # the next sample's header
    data = shard_of(folder).read_bytes()
    shard_of(folder).write_bytes(data[:start] + data[end:])
    resealed(folder)
    assert f"train: train-00000.tar: key {store.key(3)}: missing from the archive" in verify(folder)


def test_a_doubled_key_is_named_with_its_shards(folder):
    def edit(columns, keys):
        keys[5] = keys[2]

    key, name = Store(folder).key(2), shard_of(folder).name
    reindex(folder, edit)
    assert f"train: train.index: key {key} occurs twice, in {name} and in {name}" in verify(folder)


def test_overlapping_records_are_named(folder):
    def edit(columns, keys):
        columns["length"][0] += 2_000
        columns["crc"][0] = 0

    key = Store(folder).key(1)
    reindex(folder, edit)
    assert any(f"key {key}: overlaps key" in line for line in verify(folder))


@pytest.mark.parametrize("column", ["label", "offset", "length", "shard", "height", "width", "crc", "kind"])
def test_every_wrong_column_of_the_index_is_found(folder, column):
    def edit(columns, keys):
        columns[column][4] += 1

    reindex(folder, edit)
    assert verify(folder), column


def test_an_altered_or_foreign_index_is_found(folder):
    change(folder / "train.index", 200, b"\xff\xff\xff")
    assert any("train.index: altered" in line for line in verify(folder))
    (folder / "train.index").write_bytes(b"nonsense" * 50)
    assert any("not an index" in line for line in verify(folder))
    (folder / "train.index").unlink()
    assert any("train.index" in line for line in verify(folder))


def resealed(folder: Path) -> None:
    """As above, for a shard: its checksum and size are those of the damaged file."""
    with open(shard_of(folder), "rb") as file:
        digest = index.sha256(file)
    size = shard_of(folder).stat().st_size
    seal(folder, lambda part: part["shards"][0].update(sha256=digest, bytes=size))


def test_an_unfinished_header_is_found(originals, tmp_path):
    folder = tmp_path / "ffcv"
    shutil.copytree(originals / "ffcv", folder)
    change(shard_of(folder), 16, bytes(8))
    resealed(folder)
    assert any("unfinished" in line for line in verify(folder))


def test_an_allocation_that_crosses_or_overlaps_is_found(originals, tmp_path):
    folder = tmp_path / "ffcv"
    shutil.copytree(originals / "ffcv", folder)
    found = beton.read(shard_of(folder))
    change(shard_of(folder), found.table + 16, (int(found.length[0]) + 3_000_000).to_bytes(8, "little"))
    resealed(folder)
    lines = verify(folder)
    assert any("crosses" in line for line in lines) and any("overlap" in line for line in lines)


def test_a_label_changed_in_the_archive_is_found(originals, tmp_path):
    for format in FORMATS:
        folder = tmp_path / format
        shutil.copytree(originals / format, folder)
        store = Store(folder)
        label = int(store.labels[0])
        if format == "webdataset":
            at = int(store._rows["offset"][0]) + int(store._rows["length"][0])
            at += -at % tar.BLOCK + tar.BLOCK
            change(shard_of(folder), at, b"%d" % (label + 1))
        else:
            at = beton.HEADER.itemsize + 2 * beton.FIELD.itemsize + 16
            change(shard_of(folder), at, bytes([label + 1]))
        resealed(folder)
        assert any(f"key {store.key(0)}: label {label + 1}" in line for line in verify(folder))


def test_a_wrong_dali_index_is_found(originals, tmp_path):
    folder = tmp_path / "webdataset"
    shutil.copytree(originals / "webdataset", folder)
    path = folder / "train-00000.idx"
    path.write_text(path.read_text().replace("jpg 512", "jpg 1024"))
    assert any("train-00000.idx: does not fit" in line for line in verify(folder))
    path.write_bytes(b"\xff\xfe")
    assert any("train-00000.idx: does not fit" in line for line in verify(folder))
    path.unlink()
    assert verify(folder) == ["train: train-00000.tar: train-00000.idx: is missing"]
    write_shards(Options("folder"), originals / "in", folder, quiet=True)
    assert verify(folder) == []


def test_a_bucket_is_verified_like_a_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "scratch").mkdir()
    address = Path(f"file://{folder}")
    assert verify(address) == []
    store = Store(folder)
    change(shard_of(folder), int(store._rows["offset"][7]) + 9, b"\0\1\2")
    assert verify(address) == verify(folder)
    assert any(f"key {store.key(7)}: its bytes have changed" in line for line in verify(address))
    shard_of(folder).unlink()
    assert verify(address) == [f"train: {shard_of(folder).name}: is missing"]
    (folder / "train.index").unlink()
    assert verify(address) == ["train: train.index: is missing"] == verify(folder)
    assert not list((tmp_path / "scratch").iterdir())


def test_the_command_says_so_and_exits_1(folder):
    tool = [sys.executable, str(Path(__file__).resolve().parents[1] / "tools" / "shards.py")]
    done = subprocess.run([*tool, "verify", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "0 problems" in done.stdout
    change(shard_of(folder), int(Store(folder)._rows["offset"][7]) + 9, b"\0\1\2")
    done = subprocess.run([*tool, "verify", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and f"key {Store(folder).key(7)}" in done.stdout and "Traceback" not in done.stderr
    done = subprocess.run([*tool, "ls", folder, "--records", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "12 images of 3 classes" in done.stdout and Store(folder).key(0) in done.stdout


def test_damage_to_the_manifest_is_a_user_error(folder):
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        verify(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no manifest\.json"):
        verify(folder)
