"""Seeded damage to tars, betons, indexes and manifests. What comes of it is the same as before, or named and set aside, or
refused in one line; never a crash, a hang or something else without a word. What might crash runs in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from damage import damaged
from pictures import class_folders, jpeg
from test_foreign_shards import samples, tar_bytes

from manyview.pipeline import beton, tar
from manyview.pipeline.convert.sources import datasets
from manyview.pipeline.convert.write import FORMATS, write_shards
from manyview.pipeline.errors import UserError
from manyview.pipeline.manifest import Options
from manyview.pipeline.store import Corrupt, Store


def contents(source: Path) -> dict[str, tuple[int, bytes]]:
    """Label and bytes of every image, by key."""
    split = datasets.load("shards", source).splits[0]
    return {
        name.rpartition(".")[0]: (int(split.labels[i]), split.read(i).tobytes()) for i, name in enumerate(split.names)
    }


def test_tars_whose_headers_are_damaged(tmp_path):
    """A header has a checksum: no change of one goes unseen, and no member is lost."""
    data, path = tar_bytes(samples("jpg", "cls", n=8)), tmp_path / "x.tar"
    path.write_bytes(data)
    expected, headers = contents(path), [member.offset - tar.BLOCK for member in tar.members(path)]
    outcomes: Counter[str] = Counter()
    rng = np.random.default_rng(1)
    for _ in range(600):
        at = int(rng.choice([*headers, len(data.rstrip(b"\0")) // 512 * 512 + 512]))
        path.write_bytes(damaged(rng, data, at, at + tar.BLOCK))
        try:
            source = datasets.load("shards", path)
        except UserError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
            continue
        found, aside = contents(path), {item["name"] for item in source.problems}
        different = {key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)}
        assert different <= aside, (at, different, source.problems)
        outcomes["set aside" if aside else "equal"] += 1
    assert outcomes["refused"] > 300, outcomes


def test_tars_damaged_anywhere_end_in_words(tmp_path):
    """What is no header has no checksum in a foreign tar: labels and images may change, but nothing crashes or is lost."""
    data, path = (
        tar_bytes(samples("jpg", "cls", "json", n=6, text=lambda i: json.dumps({"label": i}))),
        tmp_path / "x.tar",
    )
    rng = np.random.default_rng(2)
    for _ in range(400):
        path.write_bytes(damaged(rng, damaged(rng, data)))
        try:
            source = datasets.load("shards", path)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        known = sum(len(split.names) for split in source.splits) + len(source.problems)
        assert known >= 6 or source.ignored, "samples were lost without a word"
        for split in source.splits:
            assert all(-1 <= label < len(source.classes) for label in split.labels)
            for i in range(len(split.names)):
                assert len(split.read(i)) == split.sizes[i]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    class_folders(root / "in", 2, 2)
    for format in FORMATS:
        write_shards(Options("folder", format), root / "in", root / format, quiet=True)
    return root


def test_betons_damaged_in_front_or_in_their_table(written, tmp_path):
    original = (written / "ffcv" / "train-00000.beton").read_bytes()
    (tmp_path / "x.beton").write_bytes(original)
    whole, size = beton.read(tmp_path / "x.beton"), len(original)
    front = beton.HEADER.itemsize + 2 * beton.FIELD.itemsize + 32 * len(whole.label)
    rng, path, outcomes = np.random.default_rng(3), tmp_path / "x.beton", Counter()
    for number in range(200):
        first, last = (0, front) if number % 2 else (whole.table, size)
        path.write_bytes(damaged(rng, original, first, last))
        try:
            source = datasets.load("shards", path)
        except UserError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        assert sum(len(split.names) for split in source.splits) + len(source.problems) > 0
        for split in source.splits:
            for i in range(len(split.names)):
                try:
                    assert split.read(i).nbytes == split.sizes[i]
                except ValueError as error:
                    assert str(error)
    assert min(outcomes["refused"], outcomes["read"]) > 20, outcomes


READER = """
import json, sys
import numpy as np
from collections import Counter
from pathlib import Path
sys.path.insert(0, "tests")
from damage import damaged
from test_fuzz_shards import outcome
from manyview.pipeline import index
results = []
for number, folder in enumerate(sorted(Path(sys.argv[1]).iterdir())):
    original = (folder / "train.index").read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    for sealed in (False, True):
        rng, outcomes = np.random.default_rng(number), Counter()
        for _ in range(int(sys.argv[2])):
            (folder / "train.index").write_bytes(damaged(rng, original))
            if sealed:
                with open(folder / "train.index", "rb") as file:
                    manifest["splits"]["train"]["index"]["sha256"] = index.sha256(file)
                (folder / "manifest.json").write_text(json.dumps(manifest))
            outcomes[outcome(folder, sealed)] += 1
        results.append((sealed, outcomes))
print(json.dumps(results))
"""


def outcome(folder: Path, sealed: bool) -> str:
    """What comes of opening and reading everything, and of making views on the CPU."""
    from manyview.pipeline.engines.cpu import CPUEngine
    from manyview.pipeline.views import parameters, policy

    expected = json.loads((folder / "expected.json").read_text())
    try:
        store = Store(folder)
    except UserError as error:
        assert "\n" not in str(error)
        return "refused"
    named, engine = False, CPUEngine(store, threads=1)
    for i in range(len(store)):
        ids = np.array([i])
        told = parameters(policy("simclr", 1, 8), 0, ids * 0, ids, store.heights[ids], store.widths[ids])
        try:
            payload = store.read(i)
            assert sealed or expected[i] == [store.key(i), int(store.labels[i]), int(payload.sum(dtype=np.int64))]
            engine(ids, told)
        except Corrupt as error:
            assert "\n" not in str(error)
            named = True
    engine.close()
    return "named" if named else "equal"


@pytest.mark.slow
def test_damaged_indexes(written, tmp_path):
    """As they are, and sealed by whoever means harm: their checksums are right."""
    for format in FORMATS:
        folder = shutil.copytree(written / format, tmp_path / format)
        store = Store(folder)
        rows = [[store.key(i), int(store.labels[i]), int(store.read(i).sum(dtype=np.int64))] for i in range(len(store))]
        (folder / "expected.json").write_text(json.dumps(rows))
    line = [sys.executable, "-c", READER, tmp_path, "120"]
    done = subprocess.run([*map(str, line)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    for sealed, outcomes in json.loads(done.stdout):
        assert outcomes["refused"] > (40 if sealed else 112), (sealed, outcomes)


def test_damaged_manifests(written, tmp_path):
    """Text with a byte changed, and values exchanged for others: refused, or the same samples."""
    folder = shutil.copytree(written / "webdataset", tmp_path / "x")
    text, whole = (folder / "manifest.json").read_bytes(), Store(folder)
    expected = [(whole.key(i), int(whole.labels[i]), whole.read(i).tobytes()) for i in range(len(whole))]
    rng, outcomes = np.random.default_rng(5), Counter()
    values = [None, -1, 2**40, 1e400, "", "../x", [], {}, [[]], "\ud800", True, "x" * 5000, 0.5]
    for number in range(400):
        if number % 2:
            (folder / "manifest.json").write_bytes(damaged(rng, text))
        else:
            manifest = json.loads(text)
            exchange(rng, manifest, values[int(rng.integers(len(values)))])
            (folder / "manifest.json").write_text(json.dumps(manifest))
        try:
            store = Store(folder)
            found = [(store.key(i), int(store.labels[i]), store.read(i).tobytes()) for i in range(len(store))]
            assert found == expected
            outcomes["equal"] += 1
        except UserError as error:
            assert len(str(error).splitlines()) <= 2 and len(str(error)) < 10_000
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 30, outcomes


def exchange(rng: np.random.Generator, inner: dict | list, value: object) -> None:
    """Put `value` somewhere into nested lists and dictionaries."""
    while True:
        keys = list(inner) if isinstance(inner, dict) else range(len(inner))
        key = keys[int(rng.integers(len(keys)))]
        if not isinstance(inner[key], dict | list) or not inner[key] or rng.random() < 0.2:
            inner[key] = value
            return
        inner = inner[key]


JPEGS = """
import sys
import numpy as np
from pathlib import Path
sys.path.insert(0, "tests")
from damage import damaged
from manyview.pipeline import codec
from manyview.pipeline.convert import encode
from manyview.pipeline.manifest import Options
rng, refused, options = np.random.default_rng(6), 0, Options("folder", max_pixels=4_000_000)
originals = [path.read_bytes() for path in sorted(Path(sys.argv[1]).iterdir())]
for number in range(int(sys.argv[2])):
    original = originals[number % len(originals)]
    data = np.frombuffer(damaged(rng, original, 2, original.index(bytes([255, 218])) + 12), np.uint8)
    codec.jpeg_header(data)
    for look in ("pixels", "thumbnail", "headers"):
        try:
            found = encode.convert(data, options, look)
        except ValueError as error:
            assert str(error)
            refused += look == "pixels"
            continue
        try:
            shape = codec.decode(found.payload).shape[:2]
        except ValueError:
            assert look == "headers", "converted, and then not to be decoded"
            continue
        assert shape == (found.height, found.width), (number, look, shape, found.height, found.width)
print(refused)
"""


def test_jpegs_whose_headers_are_damaged(tmp_path):
    """The size that is put down is the decoder's, whatever the headers say."""
    turned = b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
    for name, options in (("a", {}), ("b", {"progressive": True}), ("c", {"exif": turned}), ("d", {"subsampling": 0})):
        (tmp_path / name).write_bytes(jpeg(1, 90, 120, **options))
    line = [sys.executable, "-c", JPEGS, tmp_path, "1200"]
    done = subprocess.run([*map(str, line)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert 120 < int(done.stdout) < 1200
