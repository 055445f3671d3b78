from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyview.pipeline import index


def rows(n: int) -> list[tuple]:
    return [(i % 5 - 1, 1 << 40 | i, i + 1, 0, i + 2, i + 3, (i * 2654435761) % 2**32, i % 3) for i in range(n)]


@settings(max_examples=40, deadline=None)
@given(keys=st.lists(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=30), max_size=20))
def test_what_is_written_is_read(keys, tmp_path_factory):
    path = tmp_path_factory.mktemp("index") / "train.index"
    built = index.build(rows(len(keys)), keys)
    digest = index.write(built, path)
    found = index.read(path)
    assert len(found) == len(keys) and [found.key(i) for i in range(len(found))] == keys
    for position, name in enumerate(index.COLUMNS):
        assert found[name].tolist() == [row[position] for row in rows(len(keys))]
        assert found[name].dtype == index.COLUMNS[name]
    with open(path, "rb") as file:
        assert index.sha256(file) == digest
    assert found.fingerprint() == built.fingerprint()
    assert [entry.name for entry in path.parent.iterdir()] == ["train.index"]


def test_concatenating_numbers_the_shards():
    parts = [index.build(rows(3), ["a", "b", "c"]), index.build(rows(2), ["dd", "e"])]
    whole = index.concatenate(parts)
    assert whole["shard"].tolist() == [0, 0, 0, 1, 1] and [whole.key(i) for i in range(5)] == ["a", "b", "c", "dd", "e"]


def test_the_fingerprint_is_of_samples_not_of_places():
    base = index.build(rows(4), list("abcd"))
    moved = index.build([(row[0], row[1] + 512, *row[2:]) for row in rows(4)], list("abcd"))
    assert base.fingerprint() == moved.fingerprint()
    for change in (index.build(rows(4), list("abce")), index.build([(9, *row[1:]) for row in rows(4)], list("abcd"))):
        assert change.fingerprint() != base.fingerprint()


@pytest.mark.parametrize("keep", [0, 10, 63, 64, 100, 0.5, 0.99])
def test_a_part_of_an_index_is_refused(tmp_path, keep):
    path = tmp_path / "train.index"
    index.write(index.build(rows(50), [f"key{i}" for i in range(50)]), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * (len(data) - 64)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"short|cut off"):
        index.read(path)


def test_another_file_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"PK" + bytes(500))
    with pytest.raises(ValueError, match="not an index"):
        index.read(tmp_path / "x")


def test_the_map_is_read_only(tmp_path):
    index.write(index.build(rows(3), list("abc")), tmp_path / "i")
    with pytest.raises(ValueError):
        index.read(tmp_path / "i")["label"][0] = 1
    assert isinstance(index.read(tmp_path / "i")["label"], np.ndarray)
