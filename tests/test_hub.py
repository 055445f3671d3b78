"""Data sets and shards of a Hugging Face hub, by its own client, from a hub on loopback."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hub import serving
from pictures import jpeg

import manyview
from manyview.pipeline.convert.sources import Reading, datasets
from manyview.pipeline.convert.write import write_shards
from manyview.pipeline.errors import UserError
from manyview.pipeline.manifest import Options
from manyview.pipeline.storage import Storage


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """With hf://datasets/me/photos: an image folder with metadata, and shards of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MANYVIEW_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "hub/datasets/me/photos"
    for split, count in (("train", 6), ("test", 3)):
        names = [f"sub/{i}.jpg" if i % 2 else f"{i}.jpg" for i in range(count)]
        (folder / split / "sub").mkdir(parents=True)
        for i, name in enumerate(names):
            (folder / split / name).write_bytes(jpeg(i + 50 * (split == "test")))
        rows = [f"{name},{i % 3}" for i, name in enumerate(names)]
        (folder / split / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    write_shards(Options("folder"), folder, folder / "shards", quiet=True)
    with serving(tmp_path / "hub", monkeypatch) as server:
        yield server


def fetched(hub) -> list[str]:
    names = [path.partition("/resolve/main/")[2] for path in hub.log if "/resolve/" in path]
    hub.log.clear()
    return sorted(names)


def test_an_image_folder_on_the_hub_is_fetched_once_and_only_where_asked_for(hub, capsys):
    address = Path("hf://datasets/me/photos/train")
    with pytest.raises(UserError, match=r"is an address: --download \(DOWNLOAD=1\) fetches it into data/datasets/me"):
        datasets.load("folder", address)
    assert hub.log == []
    (split,) = datasets.load("folder", address, Reading(download=True)).splits
    assert split.names == ["0.jpg", "2.jpg", "4.jpg", "sub/1.jpg", "sub/3.jpg", "sub/5.jpg"]
    assert split.labels.tolist() == [0, 2, 1, 1, 0, 2]
    assert split.read(3).tobytes() == (hub.folder / "datasets/me/photos/train/sub/1.jpg").read_bytes()
    assert len(fetched(hub)) == 7 and "fetching 7 of 7 files" in capsys.readouterr().err
    Path("data/datasets/me/photos/train/2.jpg").write_bytes(b"cut off")
    datasets.load("folder", address, Reading(download=True))
    assert fetched(hub) == ["train/2.jpg"]
    with pytest.raises(UserError, match="hf://datasets/me/none is no folder with files"):
        datasets.load("folder", Path("hf://datasets/me/none"), Reading(download=True))


@pytest.mark.parametrize("name", ["../x.jpg", "/x.jpg", "a/../../x.jpg"])
def test_a_name_that_leads_out_of_the_folder_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Storage, "sizes", lambda _: {"fine.jpg": 3, name: 3})
    with pytest.raises(UserError, match="which would lead out of data/me/x"):
        datasets.fetched("memory://me/x")
    assert list(tmp_path.iterdir()) == []


def test_shards_on_the_hub_are_read_where_they_lie(hub):
    here = [batch.views for batch in manyview.Views(hub.folder / "datasets/me/photos/shards", 2, 3, size=16)]
    there = [batch.views for batch in manyview.Views("hf://datasets/me/photos/shards", 2, 3, size=16)]
    assert len(here) == 2 and all(map(torch.equal, here, there))
    assert "shards/train-00000.tar" in fetched(hub)
