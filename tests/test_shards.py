from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import class_folders, encoded, jpeg, pixels

from manyview.pipeline import codec
from manyview.pipeline.convert import pool, source_state
from manyview.pipeline.convert.shard_plan import FORMATS, KEY_LENGTH, SAFE, plan_shards, safe_keys, shuffled
from manyview.pipeline.convert.sources import datasets
from manyview.pipeline.convert.verify import verify
from manyview.pipeline.convert.write import CHECKS, WORK, check_options, write_shards
from manyview.pipeline.errors import UserError
from manyview.pipeline.manifest import MANIFEST, Options
from manyview.pipeline.store import Store

ROOT = Path(__file__).resolve().parents[1]
TOOL = [sys.executable, str(ROOT / "tools" / "shards.py")]


def digests(out: Path) -> dict[str, str]:
    """Every file of a folder but the stamp, which holds times."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != source_state.NAME]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write(source: Path, out: Path, jobs: int = 2, max_rejected: float = 0.01, **options) -> dict:
    options = {"dataset": "folder", "shard_mb": 1, **options}
    return write_shards(Options(**options), source, out, jobs=jobs, max_rejected=max_rejected, quiet=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """About 14 shards of a megabyte: 3 classes, 2 splits."""
    root = tmp_path_factory.mktemp("photos")
    for split, n in (("train", 60), ("val", 12)):
        for i in range(n):
            folder = root / split / f"class{i % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i}.jpg").write_bytes(encoded(_noisy(i), quality=97))
    return root


def _noisy(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (260, 300, 3), np.uint8)


# --- the plan -------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=120).filter(lambda name: b"\0" not in name), unique=True, max_size=30))
def test_keys_are_safe_and_unique_for_any_file_names(raw):
    names = [os.fsdecode(name) + ".jpg" for name in raw]
    keys = safe_keys(names)
    assert len(set(keys)) == len(keys) == len(names)
    for key in keys:
        assert SAFE.fullmatch(key) and len(key) <= KEY_LENGTH


def test_keys_are_the_names_wherever_they_can_be():
    names = ["n01/n01_3.JPEG", "a/x.jpg", "a/x.png", "with space.jpg", "dots.in.name.jpg", "../up.jpg", "/root.jpg"]
    keys = safe_keys(names)
    assert keys[0] == "n01/n01_3" and keys[1] != keys[2] and all(key.startswith("a/x-") for key in keys[1:3])
    assert keys[3].startswith("with_space-") and keys[4].startswith("dots_in_name-")
    assert not any(part in ("..", ".", "") for key in keys for part in key.split("/"))
    assert keys == safe_keys(names)


def test_a_file_named_like_anothers_hash_is_no_collision():
    first = safe_keys(["x.jpg", "x.png"])
    keys = safe_keys(["x.jpg", "x.png", f"{first[0]}.jpg"])
    assert len(set(keys)) == 3


def test_the_order_is_a_permutation_that_never_changes():
    assert shuffled(10, 0, "train").tolist() == [2, 5, 9, 6, 1, 8, 0, 4, 7, 3]
    assert sorted(shuffled(1000, 3, "val")) == list(range(1000))
    assert shuffled(1000, 3, "val").tolist() != shuffled(1000, 4, "val").tolist()


def test_shards_are_of_about_equal_size_and_hold_everything_once(photos):
    source = datasets.load("folder", photos)
    keys = [safe_keys(split.names) for split in source.splits]
    rows = plan_shards(Options("folder", shard_mb=1), source, keys)
    for number, split in enumerate(source.splits):
        mine = [row for row in rows if row.split == number]
        assert sorted(np.concatenate([row.samples for row in mine])) == list(range(len(split.names)))
        sizes = [split.sizes[row.samples].sum() for row in mine]
        assert max(sizes) < 1.4 * min(sizes)
    assert len(rows) > 5


# --- what comes out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_bytes_labels_and_statistics_are_those_of_the_source(photos, tmp_path, format):
    manifest = write(photos, tmp_path / "out", format=format)
    store = Store(tmp_path / "out")
    assert len(store) == 60 and len(Store(tmp_path / "out", "val")) == 12 and store.classes == manifest["classes"]
    everything = []
    for i in range(len(store)):
        path = photos / "train" / f"{store.key(i)}.jpg"
        assert store.read(i).tobytes() == path.read_bytes()
        assert store.classes[store.labels[i]] == path.parent.name
        everything.append(codec.decode(store.read(i)).reshape(-1, 3))
    values = np.concatenate(everything)
    # Of most photos only an eighth of the size is looked at (see `moments`); these are pure noise, the worst there is.
    assert np.allclose(store.mean, values.mean(0), atol=0.2) and np.allclose(store.std, values.std(0), rtol=0.01)
    assert verify(tmp_path / "out") == []


def test_statistics_of_what_is_stored_as_pixels_are_exact(photos, tmp_path):
    write(photos, tmp_path / "out", encoding="raw")
    store = Store(tmp_path / "out")
    values = np.concatenate([store.read(i).reshape(-1, 3) for i in range(len(store))])
    assert np.allclose(store.mean, values.mean(0)) and np.allclose(store.std, values.std(0))


def test_checking_headers_alone_makes_the_same_shards(photos, tmp_path):
    one, other = (write(photos, tmp_path / check, check=check) for check in CHECKS)
    assert (
        one["fingerprint"] == other["fingerprint"]
        and one["splits"]["train"]["shards"] == other["splits"]["train"]["shards"]
    )
    assert np.allclose(Store(tmp_path / "decode").mean, Store(tmp_path / "headers").mean, atol=2)
    assert verify(tmp_path / "headers") == []


@pytest.mark.slow
def test_both_formats_are_the_same_samples(photos, tmp_path):
    one, other = (write(photos, tmp_path / name, format=name) for name in FORMATS)
    assert one["fingerprint"] == other["fingerprint"]
    assert write(photos, tmp_path / "raw", encoding="raw")["fingerprint"] != one["fingerprint"]


@pytest.mark.slow
def test_the_result_does_not_depend_on_jobs_or_place(photos, tmp_path):
    for name, jobs in (("one/x", 1), ("three/x", 3)):
        write(photos, tmp_path / name, jobs=jobs)
    assert digests(tmp_path / "one" / "x") == digests(tmp_path / "three" / "x")


def test_doing_it_again_does_nothing_and_takes_no_time(photos, tmp_path):
    out = tmp_path / "out"
    command = [*TOOL, "write", "--dataset", "folder", "--source", str(photos), "--out", str(out), "--shard-mb", "1"]
    subprocess.run(command, check=True, capture_output=True)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    before_cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before_cpu.ru_utime - before_cpu.ru_stime
    assert cpu < 2 and "60 train, 12 val" in done.stdout  # CPU time: a busy machine must not fail it
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_other_settings_or_another_source_are_refused(tmp_path):
    class_folders(tmp_path / "in", 2, 2)
    write(tmp_path / "in", tmp_path / "out")
    with pytest.raises(UserError, match="size 0, now 40"):
        write(tmp_path / "in", tmp_path / "out", size=40)
    (tmp_path / "in" / "train" / "class0" / "new.jpg").write_bytes(jpeg(70))
    with pytest.raises(UserError, match="has changed since"):
        write(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "train" / "class0" / "new.jpg").unlink()
    write(tmp_path / "in", tmp_path / "out")  # the folder's time is new, but what it holds is not


def test_a_file_rewritten_with_the_same_size_is_noticed_and_one_touched_is_no_change(tmp_path):
    class_folders(tmp_path / "in", 3, 2)
    before = write(tmp_path / "in", tmp_path / "out")
    path = tmp_path / "in" / "train" / "class1" / "photo1.jpg"
    original, times = path.read_bytes(), path.stat()
    os.utime(path)
    assert write(tmp_path / "in", tmp_path / "out") == before
    path.write_bytes(jpeg(200)[: len(original) - 2].ljust(len(original) - 2, b"\0") + b"\xff\xd9")
    assert path.stat().st_size == len(original)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a careless copy leaves it
    for _ in range(2):
        with pytest.raises(UserError, match=r"1 images of .* were rewritten since .*class1/photo1"):
            write(tmp_path / "in", tmp_path / "out")
    path.write_bytes(original)
    assert write(tmp_path / "in", tmp_path / "out") == before
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    assert write(tmp_path / "elsewhere", tmp_path / "out") == before


def fashion(folder: Path, seed: int) -> Path:
    """Fashion-MNIST's files, tiny; the labels and sizes are the same for every seed."""
    folder.mkdir(exist_ok=True)
    for part, n in (("train", 200), ("t10k", 20)):
        images = np.random.default_rng(seed).integers(0, 256, (n, 28, 28), np.uint8)
        for name, values in (("images-idx3", images), ("labels-idx1", np.arange(n, dtype=np.uint8) % 10)):
            header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
            (folder / f"{part}-{name}-ubyte").write_bytes(header + values.tobytes())
    return folder


def test_arrays_that_were_rewritten_are_noticed(tmp_path, monkeypatch):
    source, out = fashion(tmp_path / "in", 0), tmp_path / "out"
    time.sleep(0.06)  # the stamp's tick
    before = write(source, out, dataset="fashion-mnist")
    monkeypatch.setattr(datasets, "load", lambda *_: sys.exit("untouched, and yet it was listed"))
    assert write(source, out, dataset="fashion-mnist") == before
    monkeypatch.undo()
    fashion(source, 0)  # copied anew
    assert write(source, out, dataset="fashion-mnist") == before
    fashion(source, 1)
    with pytest.raises(UserError, match=r"200 images of .* were rewritten"):
        write(source, out, dataset="fashion-mnist")


def test_an_interrupted_run_does_not_mix_old_arrays_with_new(tmp_path, monkeypatch):
    source, out = fashion(tmp_path / "in", 0), tmp_path / "out"
    time.sleep(0.06)
    monkeypatch.setattr("manyview.pipeline.convert.write._finish", lambda *_: sys.exit(9))
    with pytest.raises(SystemExit):
        write(source, out, dataset="fashion-mnist")
    monkeypatch.undo()
    fashion(source, 1)
    write(source, out, dataset="fashion-mnist")
    write(fashion(tmp_path / "in", 1), tmp_path / "fresh" / "out", dataset="fashion-mnist")
    assert digests(out) == digests(tmp_path / "fresh" / "out")


def test_our_shards_rewritten_beneath_an_import_are_noticed(tmp_path):
    class_folders(tmp_path / "in", 3, 2)
    write(tmp_path / "in", tmp_path / "ours")
    time.sleep(0.06)
    before = write(tmp_path / "ours", tmp_path / "out", dataset="shards")
    shard = tmp_path / "ours" / "train-00000.tar"
    shard.write_bytes(shard.read_bytes())
    assert write(tmp_path / "ours", tmp_path / "out", dataset="shards") == before
    row = Store(tmp_path / "ours")._rows
    data = bytearray(shard.read_bytes())
    data[int(row["offset"][0]) + 200] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"1 images of .* were rewritten"):
        write(tmp_path / "ours", tmp_path / "out", dataset="shards")


def test_shards_of_others_are_neither_removed_nor_overwritten(photos, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("train-00000.tar", "val-00007.idx", "unlabelled-123456.beton", ".mine.tmp"):
        (out / name).write_text("of somebody else")
    before = digests(out)
    with pytest.raises(UserError, match=r"out holds train-00000\.tar and no manifest\.json"):
        write(photos, out)
    assert digests(out) == before and not (out / WORK).exists()
    for path in out.glob("*-*"):
        path.unlink()
    write(photos, out)
    assert (out / ".mine.tmp").exists()


def test_shards_are_not_imported_into_their_own_folder(photos, tmp_path):
    source = tmp_path / "source"
    write(photos, source)
    before = digests(source)
    for out in (source, source / "new", tmp_path / "x" / ".." / "source"):
        for format in FORMATS:
            with pytest.raises(UserError, match="its own folder"):
                write(source, out, dataset="shards", format=format)
    with pytest.raises(UserError, match="its own folder"):
        write(source / "train-00001.tar", source, dataset="shards")
    (source / MANIFEST).unlink()
    (source / WORK).mkdir()
    (source / WORK / "lock").touch()  # as if a run of ours had been interrupted
    with pytest.raises(UserError, match="its own folder"):
        write(source / "train-00001.tar", source, dataset="shards")
    assert digests(source) == {name: value for name, value in before.items() if name != MANIFEST} | {
        f"{WORK}/lock": hashlib.sha256(b"").hexdigest()
    }


def test_with_a_shard_lost_another_source_is_still_refused(tmp_path):
    class_folders(tmp_path / "in", 2, 2)
    class_folders(tmp_path / "other", 3, 2)
    write(tmp_path / "in", tmp_path / "out")
    (tmp_path / "out" / "train-00000.idx").rename(tmp_path / "kept")
    (tmp_path / "out" / "train-00000.tar").unlink()
    before = digests(tmp_path / "out")
    with pytest.raises(UserError, match="has changed since"):
        write(tmp_path / "other", tmp_path / "out")
    assert digests(tmp_path / "out") == before


ODD = {  # a place in a manifest, and what it must not be
    "version": [2, "1", None, [1]], "name": [3, "\ud800"], "format": ["zip", 1], "classes": [{}, [1], ["\udcff"]],
    "splits": [{}, [], {"train": 3}, {"train": {}}], "rejected": [-1, "0", True, 1.5], "source": [[]], "options": [None],
    "splits.train.count": [-1, 1e9, "12"], "splits.train.mean": [[1, 2], [1, 2, float("nan")], [1, 2, "3"], [1, 2, 10**40]],
    "splits.train.std": [3, [1, 2, float("inf")]], "splits.train.index": [[], {"file": "train.index"}],
    "splits.train.index.file": ["../x.index", "/etc/passwd", "", ".", "a\0b", 5, "x" * 9999],
    "splits.train.shards": [[], {}, [5], [[]]], "splits.train.shards.0.bytes": [-1, "9"],
    "splits.train.shards.0.count": [0, 2**70],
    "splits.train.shards.0.file": ["../train-00000.tar", "/dev/zero", "x/../../y", "", 7, "a\0b"],
    "splits.train.shards.0.idx": ["../evil.idx", "/tmp/evil.idx", "..", "a/../../evil", 3],
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("small")
    class_folders(root / "in", 2, 2)
    write(root / "in", root / "out")
    return root


@pytest.mark.parametrize("place", ODD)
def test_a_manifest_that_cannot_be_is_one_line_and_nothing_is_written(small, tmp_path, place):
    manifest = json.loads((small / "out" / MANIFEST).read_text())
    for value in ODD[place]:
        changed = json.loads(json.dumps(manifest))
        *way, last = [int(word) if word.isdigit() else word for word in place.split(".")]
        inner = changed
        for word in way:
            inner = inner[word]
        inner[last] = value
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        shutil.copytree(small / "out", tmp_path / "x" / "out")
        (tmp_path / "x" / "out" / MANIFEST).write_text(json.dumps(changed))
        (tmp_path / "x" / "out" / "train-00000.idx").unlink()
        before = digests(tmp_path / "x")
        with pytest.raises(UserError) as error:
            Store(tmp_path / "x" / "out")
        assert "\n" not in str(error.value).strip() and len(str(error.value)) < 500
        for use in (verify, lambda path: write(small / "in", path)):
            with contextlib.suppress(UserError):  # counts that do not fit are verify's to say, and mended by write
                use(tmp_path / "x" / "out")
        after = digests(tmp_path / "x")
        assert {name for name in after.keys() | before.keys() if after.get(name) != before.get(name)} <= {
            f"out/{name}" for name in (MANIFEST, "train-00000.tar", "train-00000.idx", "train.index", "rejected.jsonl")
        }
        assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("text", ['"x"', "[]", "5", "[" * 200_000, "{", "\xff", '{"version": ' + "9" * 5000 + "}", ""])
def test_a_manifest_that_is_not_ours_is_one_line(photos, tmp_path, text):
    (tmp_path / MANIFEST).write_text(text, "latin-1")
    for use in (Store, verify, lambda path: write(photos, path)):
        with pytest.raises(UserError, match=r"manifest\.json is (no manifest of shards|damaged)") as error:
            use(tmp_path)
        assert "\n" not in str(error.value)


def test_make_hands_paths_on_as_they_are(tmp_path):
    # --no-print-directory: under `make test` this make is a sub-make, which would end with "Leaving directory"
    line = ["make", "--no-print-directory", "-n", "shards", "DATASET=digits", f"OUT={tmp_path}/a b", "SOURCE=c d"]

    def flags(*more: str) -> list[str]:
        done = subprocess.run([*line, *more], cwd=ROOT, capture_output=True, text=True, check=True)
        return shlex.split(done.stdout.splitlines()[-1])

    plain = flags()
    assert plain[plain.index("--out") + 1] == f"{tmp_path}/a b" and plain[plain.index("--source") + 1] == "c d"
    assert flags("DOWNLOAD=0") == plain and flags("DOWNLOAD=1") == [*plain, "--download"]


def test_a_file_rewritten_before_an_interrupted_run_goes_on_is_read_again(photos, tmp_path, monkeypatch):
    source, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(photos, source)
    time.sleep(0.06)  # the stamp's tick
    monkeypatch.setattr("manyview.pipeline.convert.write._finish", lambda *_: sys.exit(9))
    with pytest.raises(SystemExit):
        write(source, out)
    monkeypatch.undo()
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    victim = source / "train" / "class0" / "3.jpg"
    data = bytearray(victim.read_bytes())
    data[-500] ^= 1
    victim.write_bytes(data)
    write(source, out, max_rejected=0.1)
    assert sum(path.stat().st_mtime_ns != times[path] for path in times) == 1 and verify(out) == []
    store = Store(out)
    stored = {store.key(i): store.read(i).tobytes() for i in range(len(store))}
    assert stored.get("class0/3") in (None, bytes(data))  # None: if the flipped bit made it undecodable


def test_a_lost_shard_is_made_again(photos, tmp_path):
    write(photos, tmp_path / "out")
    before = digests(tmp_path / "out")
    (tmp_path / "out" / "train-00002.tar").unlink()
    write(photos, tmp_path / "out")
    assert digests(tmp_path / "out") == before


def test_every_bad_option_is_named_at_once():
    with pytest.raises(UserError) as error:
        check_options(Options("folder", "webdatset", "jpg", -1, 0, seed=-1, shard_mb=-1), jobs=-1)
    lines = str(error.value).splitlines()
    assert len(lines) == 7 and "nearest: webdataset" in lines[0]


@pytest.mark.slow
def test_bad_flags_exit_2_without_a_traceback(tmp_path):
    for words in (
        ["write", "--dataset", "foldr"], ["write", "--datset", "x"], ["verify", str(tmp_path)], ["lst"],
        ["write", "--dataset", "digits", "--jobs", "-1"], ["index", str(tmp_path), "--jobs", "-1"],
        ["import", "--source", "s3://bucket/x", "--out", str(tmp_path)], ["index", "s3://bucket/x"],
    ):  # fmt: skip
        done = subprocess.run([*TOOL, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr


# --- rejected images ------------------------------------------------------------------------------------------------


def test_rejected_images_are_listed_with_their_reasons(tmp_path):
    class_folders(tmp_path / "in", 30, 1)
    folder = tmp_path / "in" / "train" / "class0"
    bad = {
        "empty.jpg": b"",
        "html.jpg": b"<html>not found</html>",
        "cut.jpg": jpeg(1)[:900],
        "sp ace\n.jpg": jpeg(1)[:-30],
    }
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    (folder / "notes.txt").write_text("no image")
    (folder / "fine.png").write_bytes(encoded(pixels(1), "PNG"))
    with pytest.raises(UserError, match=r"4 of 35 images were rejected, more than 1\.00%, the first is 'class0/.*': "):
        write(tmp_path / "in", tmp_path / "out")
    (folder / "loop").symlink_to(folder)
    manifest = write(tmp_path / "in", tmp_path / "out", max_rejected=0.2)
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert {line["name"] for line in lines} == {f"class0/{name}" for name in bad} | {"class0/loop"}
    assert all(line["reason"] and line["split"] == "train" for line in lines)
    assert (
        manifest["rejected"] == 5 and manifest["source"]["ignored"] == 1 and manifest["splits"]["train"]["count"] == 31
    )
    assert verify(tmp_path / "out") == []


def test_too_much_that_cannot_be_listed_is_said_before_anything_is_converted(tmp_path):
    class_folders(tmp_path / "in", 2, 2)
    (tmp_path / "in" / "train" / "stray.jpg").write_bytes(jpeg(1))
    with pytest.raises(UserError, match=r"1 of 5 images .* 'stray\.jpg': lies beside the class folders.*--unlabelled"):
        write(tmp_path / "in", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))
    assert write(tmp_path / "in", tmp_path / "out", unlabelled=True)["splits"]["train"]["count"] == 5


def test_a_split_with_nothing_left_is_an_error(tmp_path):
    folder = tmp_path / "in" / "train" / "a"
    folder.mkdir(parents=True)
    (folder / "x.jpg").write_bytes(b"no")
    with pytest.raises(UserError, match="not one image"):
        write(tmp_path / "in", tmp_path / "out", max_rejected=1.0)


# --- interrupted ----------------------------------------------------------------------------------------------------


def start(photos: Path, out: Path, *words: str) -> subprocess.Popen:
    command = [*TOOL, "write", "--dataset", "folder", "--source", str(photos), "--out", str(out), "--shard-mb", "1"]
    return subprocess.Popen([*command, "--jobs", "2", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


KILLS = 10  # a format


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_killed_at_random_points_it_ends_as_if_undisturbed(photos, tmp_path, format):
    """Folders that are killed again and again, anywhere between the first moment and the last, until there were ten kills."""
    source = many(photos, tmp_path / "in")
    process = start(source, tmp_path / "whole" / "x", "--format", format)
    wait_for((tmp_path / "whole" / "x" / WORK / "lock").exists, process)
    began = time.time()
    process.communicate()
    took = time.time() - began
    expected = digests(tmp_path / "whole" / "x")
    rng, kills, folders = random.Random(format), 0, 0
    while kills < KILLS:
        out = tmp_path / str(folders) / "x"
        while kills < KILLS and start_and_kill(source, out, format, rng.uniform(0, took)):
            kills += 1
            for path in (*out.glob("*.tar"), *out.glob("*.beton")):  # what has its final name is whole
                assert expected[path.name] == hashlib.sha256(path.read_bytes()).hexdigest()
        write(source, out, format=format)
        assert digests(out) == expected
        folders += 1
        assert folders < 5 * KILLS, "it was hardly ever killed"


def test_killed_while_it_tidied_up(photos, tmp_path):
    """The shards are whole and the next run has nothing to make; what the killed one left goes all the same."""
    out = tmp_path / "x"
    write(photos, out, format="webdataset")
    expected = digests(out)
    (out / WORK).mkdir()
    (out / WORK / "train-00000.tar.index").write_bytes(b"left")
    (out / ".stamp.json.123.tmp").write_bytes(b"left")
    write(photos, out, format="webdataset")
    assert digests(out) == expected


def start_and_kill(photos: Path, out: Path, format: str, delay: float) -> bool:
    """SIGKILL to the parent alone; whether it was still running. Its workers must go with it."""
    process = start(photos, out, "--format", format)
    wait_for((out / WORK / "lock").exists, process)
    time.sleep(delay)
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    process.communicate()
    psutil.wait_procs(children, timeout=5)
    assert not [child for child in children if child.is_running()], "orphans"
    assert process.returncode in (0, -signal.SIGKILL)
    return process.returncode == -signal.SIGKILL


def wait_for(condition, process: subprocess.Popen) -> None:
    end = time.time() + 30
    while not condition() and process.poll() is None and time.time() < end:
        time.sleep(0.01)


def test_finished_shards_are_not_made_twice(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(
        "manyview.pipeline.convert.write._finish", lambda *_: sys.exit(9)
    )  # as if killed before the manifest
    with pytest.raises(SystemExit):
        write(photos, out)
    monkeypatch.undo()
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(times) > 5 and not (out / MANIFEST).exists()
    (out / ".train-00001.tar.77.tmp").write_bytes(b"half")
    victim = sorted(times)[0]
    victim.write_bytes(victim.read_bytes()[:-1])
    write(photos, out)
    assert {path for path in times if path.stat().st_mtime_ns != times[path]} == {victim}
    assert verify(out) == [] and not list(out.glob(".*.tmp")) and not (out / WORK).exists()


def test_leftovers_of_another_plan_are_removed(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr("manyview.pipeline.convert.write._finish", lambda *_: sys.exit(9))
    with pytest.raises(SystemExit):
        write(photos, out)
    monkeypatch.undo()
    write(photos, out, format="ffcv")
    assert not list(out.glob("*.tar")) and not list(out.glob("*.idx")) and verify(out) == []


def test_shards_of_an_interrupted_run_with_other_settings_are_not_taken(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr("manyview.pipeline.convert.write._finish", lambda *_: sys.exit(9))
    with pytest.raises(SystemExit):
        write(photos, out, encoding="raw")
    monkeypatch.undo()
    write(photos, out, encoding="yuv420")
    assert Store(out).read(0).ndim == 2 and verify(out) == []


def meanwhile(monkeypatch, act) -> None:
    """`act` while a conversion lists its source: after it has looked for shards, before it writes any."""
    load = datasets.load

    def slow(*words):
        monkeypatch.setattr(datasets, "load", load)
        act()
        return load(*words)

    monkeypatch.setattr(datasets, "load", slow)


def test_shards_that_another_process_finishes_meanwhile_are_kept(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    meanwhile(monkeypatch, lambda: write(photos, out, size=100))
    with pytest.raises(UserError, match="holds shards made otherwise"):
        write(photos, out)
    assert Store(out).heights.max() == 100 and verify(out) == []
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    out.joinpath(MANIFEST).rename(tmp_path / "kept")
    (out / WORK).mkdir()
    (out / WORK / "lock").touch()
    meanwhile(monkeypatch, lambda: (tmp_path / "kept").rename(out / MANIFEST))
    assert write(photos, out, size=100)["options"]["size"] == 100
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.tar")} == before and not (out / WORK).exists()


def test_a_file_system_without_locks_is_no_other_process(tmp_path, monkeypatch, capsys):
    class_folders(tmp_path / "in", 2, 2)
    for code in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):

        def refuse(*_, code=code):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr("fcntl.flock", refuse)
        write(tmp_path / "in", tmp_path / str(code))
        assert f"has no locks ({os.strerror(code)}): let no other process write there" in capsys.readouterr().err
        assert verify(tmp_path / str(code)) == []


@pytest.mark.parametrize("how", ["folders", "links", "deep"])
def test_swapped_folders_of_equal_names_and_sizes_are_noticed(tmp_path, how):
    root = tmp_path / "in" / "train"
    same = [jpeg(7)[:-2].ljust(5000, b"\xff") + b"\xff\xd9", jpeg(8)[:-2].ljust(5000, b"\xff") + b"\xff\xd9"]
    for name, data in zip(("a", "b"), same):
        folder = (tmp_path / "elsewhere" / name if how == "links" else root / name) / ("x/y" if how == "deep" else "")
        folder.mkdir(parents=True)
        (folder / "photo.jpg").write_bytes(data)
        if how == "links":
            root.mkdir(parents=True, exist_ok=True)
            (root / name).symlink_to(folder)
    time.sleep(0.06)
    before = write(tmp_path / "in", tmp_path / "out", max_rejected=0.5)
    assert write(tmp_path / "in", tmp_path / "out") == before
    for old, new in (("a", "c"), ("b", "a"), ("c", "b")):
        (root / old).rename(root / new)
    with pytest.raises(UserError, match=r"2 images of .* were rewritten"):
        write(tmp_path / "in", tmp_path / "out")


def test_swapped_folders_of_shards_are_noticed(tmp_path):
    for name, seed in (("a", 1), ("b", 5)):
        class_folders(tmp_path / name / "in", 2, 2, seed=seed)
        write(tmp_path / name / "in", tmp_path / name / "made")
        (tmp_path / "in" / name).mkdir(parents=True)
        data = (tmp_path / name / "made" / "train-00000.tar").read_bytes()
        (tmp_path / "in" / name / "train-00000.tar").write_bytes(data.ljust(1 << 17, b"\0"))
    time.sleep(0.06)
    before = write(tmp_path / "in", tmp_path / "out", dataset="shards")
    assert write(tmp_path / "in", tmp_path / "out", dataset="shards") == before
    for old, new in (("a", "c"), ("b", "a"), ("c", "b")):
        (tmp_path / "in" / old).rename(tmp_path / "in" / new)
    with pytest.raises(UserError, match=r"were rewritten|has changed since"):
        write(tmp_path / "in", tmp_path / "out", dataset="shards")


def test_what_headers_let_pass_is_no_change_when_it_is_touched(tmp_path):
    class_folders(tmp_path / "in", 20, 1)
    victim = tmp_path / "in" / "train" / "class0" / "photo3.jpg"
    data = bytearray(jpeg(3, 200, 200))
    data[len(data) // 2 : len(data) // 2 + 300] = bytes(300)  # between its headers and its end
    victim.write_bytes(data)
    before = write(tmp_path / "in", tmp_path / "out", check="headers")
    assert before["rejected"] == 0
    os.utime(victim)
    assert write(tmp_path / "in", tmp_path / "out", check="headers") == before


def test_two_writers_of_one_folder_exclude_each_other(photos, tmp_path):
    import fcntl

    out = tmp_path / "out"
    (out / WORK).mkdir(parents=True)
    with open(out / WORK / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            write(photos, out)


def many(photos: Path, root: Path) -> Path:
    """The same photos often enough that a conversion is still under way when it is looked at."""
    for path in photos.rglob("*.jpg"):
        for copy in range(4):
            folder = root / path.parent.relative_to(photos) / f"{copy}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / path.name).hardlink_to(path)
    return root


def test_a_dead_worker_ends_the_run_within_ten_seconds(photos, tmp_path):
    photos, out = many(photos, tmp_path / "in"), tmp_path / "out"
    process = start(photos, out)
    me = psutil.Process(process.pid)
    wait_for(lambda: len(me.children()) == 2, process)
    began = time.time()
    me.children()[0].send_signal(signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert time.time() - began < 10 and process.returncode == 2
    assert b"a worker process died" in err and b"Traceback" not in err
    write(photos, out)
    assert verify(out) == []


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_its_cause(photos, tmp_path):
    """A limit on the size of files stands for it: writing fails in the same place, with another number."""
    source, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(photos, source)
    large = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)  # its shard, a late one, is too much
    (source / "val" / "class0" / "large.jpg").write_bytes(encoded(large, quality=97))
    limit = "import resource, sys, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000)); "
    code = limit + f"sys.argv = sys.argv[1:]; runpy.run_path({TOOL[1]!r}, run_name='__main__')"
    words = [
        "write",
        "--dataset",
        "folder",
        "--source",
        str(source),
        "--out",
        str(out),
        "--shard-mb",
        "1",
        "--jobs",
        "1",
    ]
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-c", code, TOOL[1], *words], capture_output=True, text=True, check=False, timeout=60
    )
    assert time.time() - began < 10
    assert done.returncode == 2 and "File too large" in done.stderr and "Traceback" not in done.stderr, done.stderr
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert out / "train-00000.tar" in kept and not list(out.glob(".*.tmp")) and not (out / MANIFEST).exists()
    write(source, out)
    assert verify(out) == [] and all(path.stat().st_mtime_ns == at for path, at in kept.items())


def fail_at_three(item: int) -> None:
    if item == 3:
        raise ZeroDivisionError("the cause")
    for _ in range(1000):
        pool.check_stop()
        time.sleep(0.005)


def test_an_exception_in_a_worker_is_the_one_that_is_raised():
    began = time.time()
    with pytest.raises(ZeroDivisionError, match="the cause"):
        pool.run(fail_at_three, {str(i): i for i in range(4)}, jobs=4, quiet=True)
    assert time.time() - began < 4


@pytest.mark.slow
def test_ctrl_c_leaves_no_process_behind(photos, tmp_path):
    process = start(many(photos, tmp_path / "in"), tmp_path / "out")
    me = psutil.Process(process.pid)
    wait_for(lambda: len(me.children()) == 2, process)
    children = me.children()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and b"Traceback" not in err, err
    assert not [child for child in children if child.is_running()]


def test_ctrl_c_while_the_workers_are_started_leaves_none_behind(photos, tmp_path):
    """The worst moment: right after the first fork."""
    code = "import os, runpy, signal, sys; sys.argv = sys.argv[1:]; "
    code += "os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGINT)); "
    code += f"runpy.run_path({TOOL[1]!r}, run_name='__main__')"
    words = ["write", "--dataset", "folder", "--source", str(photos), "--out", str(tmp_path / "out"), "--shard-mb", "1"]
    line = [sys.executable, "-c", code, TOOL[1], *words]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=20)  # orphans would hold its pipes
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
