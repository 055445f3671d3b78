"""Features of any images into one file, a part at a time: what `tools/embed.py` does.

Parts of `PART` images lie in a folder beside the file until all are there, so a run that was killed goes on where it stopped,
and memory holds one part, however many images there are.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manyview.evaluation.bicubic import clean_engine
from manyview.evaluation.encoder import Encoder
from manyview.evaluation.features import finite
from manyview.pipeline import engines, files
from manyview.pipeline.convert import encode
from manyview.pipeline.convert.sources import Split
from manyview.pipeline.convert.sources.folders import folder
from manyview.pipeline.errors import UserError
from manyview.pipeline.loader import normalize
from manyview.pipeline.machine import cores
from manyview.pipeline.manifest import MANIFEST, Options
from manyview.pipeline.store import Corrupt, Store, splits
from manyview.pipeline.views import clean

PART = 8192  # images


class FileStore:
    """Image files in the place of a `Store`: what is `load`ed can be read, by the engine for the CPU."""

    def __init__(self, split: Split, classes: list[str], name: str):
        self.files, self.split, self.classes, self.name = split, split.name, classes, name
        self.labels = split.labels
        self.heights, self.widths = np.zeros(len(split.names), np.int32), np.zeros(len(split.names), np.int32)
        self.payloads: dict[int, np.ndarray] = {}
        self.unusable: dict[int, str] = {}
        self._options = Options("folder")

    def __len__(self) -> int:
        return len(self.files.names)

    def key(self, i: int) -> str:
        return self.files.names[i]

    def read(self, i: int) -> np.ndarray:
        return self.payloads[i]

    def load(self, ids: np.ndarray, pool: ThreadPoolExecutor) -> None:
        """Read these files and forget others; what is no image is put down in `unusable`."""
        loaded = dict(zip(ids.tolist(), pool.map(self._payload, ids.tolist())))
        self.payloads = {i: payload for i, payload in loaded.items() if payload is not None}

    def _payload(self, i: int) -> np.ndarray | None:
        try:
            converted = encode.convert(self.files.read(i), self._options, look="headers")
        except ValueError as error:
            self.unusable[i] = str(error)
            return None
        self.heights[i], self.widths[i] = converted.height, converted.width
        return converted.payload


@dataclass
class Rows:
    """Some images: their names, the splits they are of, their labels (-1: none), features (n, ...) float32."""

    names: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    features: list[np.ndarray] = field(default_factory=list)


def open_images(path: Path, wanted: str | None) -> tuple[list[Any], str]:
    """Stores of all splits (or the one that is wanted) of shards or of a folder of image files, and their fingerprint."""
    if (path / MANIFEST).exists() or "://" in str(path):
        stores: list[Any] = [Store(path, name) for name in splits(path) if wanted in (None, name)]
        fingerprint = " ".join(store.fingerprint for store in stores)
    elif path.is_dir():
        source = folder(path)
        stores = [
            FileStore(split, source.classes, path.name) for split in source.splits if wanted in (None, split.name)
        ]
        fingerprint = source.fingerprint()
    else:
        raise UserError(f"{path}: neither shards nor a folder of images")
    if not sum(map(len, stores)):
        raise UserError(f"{path}: no images{f' in a split {wanted!r}' if wanted else ''}")
    return stores, fingerprint


def embed(
    encoder: Encoder, data: Path, to: Path, *, split: str | None = None, batch: int = 256, device: torch.device, engine: str,
    threads: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write `to` (.parquet or .npz) and return what it says about itself. UserError where nothing could be embedded."""
    _check(to)
    stores, fingerprint = open_images(data, split)
    about = {
        "encoder": encoder.run, "weights": encoder.checkpoint, "source": encoder.source, "transform": encoder.transform,
        "layers": encoder.layers, "data": str(data), "fingerprint": fingerprint, "classes": stores[0].classes,
        "images": sum(map(len, stores)),
    }  # fmt: skip
    parts = to.with_name(f"{to.name}.parts")
    begun = _begun(parts, about)
    module = encoder.module.to(device).to(memory_format=torch.channels_last).eval()
    places = [(store, start) for store in stores for start in range(0, len(store), PART)]
    if begun:
        print(f"going on after {begun} of {len(places)} parts")
    for number, (store, start) in enumerate(places):
        if number >= begun:
            ids = np.arange(start, min(start + PART, len(store)))
            rows = _part(encoder, module, store, ids, batch, device, engine, threads)
            _save(parts / f"{number:06d}.npz", rows)
            print(f"part {number + 1} of {len(places)}: {len(rows.names):,} images")
    with files.whole(to) as file:
        (_parquet if to.suffix == ".parquet" else _npz)(
            file, [parts / f"{n:06d}.npz" for n in range(len(places))], about
        )
    shutil.rmtree(parts)
    return about


def _check(to: Path) -> None:
    if to.suffix not in (".parquet", ".npz"):
        raise UserError(f"--to {to}: the file must end in .parquet or .npz")
    if to.exists():
        raise UserError(f"{to} exists: remove it, or give another --to")
    if to.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise UserError("a .parquet needs pyarrow: pip install pyarrow, or write an .npz") from None


def _begun(parts: Path, about: dict[str, Any]) -> int:
    """How many parts of the same work are there already. UserError where they are of another."""
    note = parts / "about.json"
    if note.exists():
        before = json.loads(note.read_text())
        other = [name for name in about if before.get(name) != about[name]]
        if other:
            raise UserError(
                f"{parts} holds a part of something else (other {', '.join(other)}): remove it, or give another --to"
            )
    parts.mkdir(parents=True, exist_ok=True)
    files.write(note, json.dumps(about))
    done = {int(path.stem) for path in parts.glob("[0-9]*.npz")}
    return next(n for n in range(len(done) + 1) if n not in done)


def _part(
    encoder: Encoder, module: Any, store: Any, ids: np.ndarray, batch: int, device: torch.device, engine: str,
    threads: int | None,
) -> Rows:  # fmt: skip
    rows = Rows()
    name = "cpu" if isinstance(store, FileStore) else engine
    shown = engines.create(name, store, device, threads=threads)[0]
    pool = ThreadPoolExecutor(threads or cores(), "files")
    try:
        for some in np.array_split(ids, -(-len(ids) // batch)):
            if isinstance(store, FileStore):
                store.load(some, pool)
                for i in sorted(store.unusable.keys() & set(some.tolist())):
                    print(f"left out: {store.key(i)}: {store.unusable[i]}")
                some = np.array([i for i in some if int(i) in store.payloads], np.int64)  # noqa: PLW2901
            kept, features = _features(encoder, module, store, some, shown, device)
            rows.names += [
                store.key(int(i)).encode("utf-8", "surrogateescape").decode("utf-8", "replace") for i in kept
            ]
            rows.splits += [store.split] * len(kept)
            rows.labels += np.asarray(store.labels[kept], np.int64).tolist()
            rows.features += [features.numpy()] if len(kept) else []
    finally:
        pool.shutdown()
        shown.close()
    return rows


@torch.inference_mode()
def _features(
    encoder: Encoder, module: Any, store: Any, ids: np.ndarray, engine: Any, device: torch.device
) -> tuple[np.ndarray, Tensor]:
    """(ids that could be read, features) of the clean views."""
    with clean_engine(encoder, store, engine) as views:
        while len(ids):
            boxes = clean(encoder.image_size, store.heights[ids], store.widths[ids], encoder.crop_ratio)
            try:
                images = views.submit(ids, boxes).result()[0][0]
            except Corrupt as error:
                print(f"left out: {error.key}: {error.reason}")
                ids = ids[ids != error.id]
                continue
            x = normalize(images.to(device), encoder.mean, encoder.std, torch.float32)
            y = module(x.contiguous(memory_format=torch.channels_last)).float().cpu()
            return ids, finite(y, encoder, store)
    return ids, torch.zeros(0)


# ------------------------------------------------------------------------------------------------------------- files


def _save(path: Path, rows: Rows) -> None:
    features = np.concatenate(rows.features) if rows.features else np.zeros((0, 0), np.float32)
    with files.whole(path) as file:
        np.savez(file, names=np.array(rows.names, dtype=np.str_), splits=np.array(rows.splits, dtype=np.str_),
                 labels=np.array(rows.labels, np.int64), features=features)  # fmt: skip


def _read(paths: list[Path]) -> Iterator[dict[str, np.ndarray]]:
    """The parts that hold any image, one after the other."""
    for path in paths:
        with np.load(path) as content:
            if len(content["names"]):
                yield {name: content[name] for name in content.files}


def _parquet(file: Any, paths: list[Path], about: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer: Any = None
    for part in _read(paths):
        shape = part["features"].shape[1:]
        width = int(np.prod(shape))
        if writer is None:
            kind = pa.list_(pa.float32(), width)
            columns = [
                ("name", pa.string()),
                ("split", pa.string()),
                ("label", pa.int64()),
                ("class", pa.string()),
                ("features", kind),
            ]
            schema = pa.schema(columns, metadata={"manyview": json.dumps(about | {"shape": shape})})
            writer = pq.ParquetWriter(file, schema)
        known = part["labels"] >= 0
        names = [about["classes"][label] if label >= 0 else None for label in part["labels"]]
        features = pa.FixedSizeListArray.from_arrays(pa.array(part["features"].reshape(-1)), width)
        columns = [pa.array(part["names"].tolist()), pa.array(part["splits"].tolist()), pa.array(part["labels"], mask=~known),
                   pa.array(names, pa.string()), features]  # fmt: skip
        writer.write_table(pa.Table.from_arrays(columns, schema=writer.schema))
    if writer is None:
        raise UserError("not one of the images could be read")
    writer.close()


def _npz(file: Any, paths: list[Path], about: dict[str, Any]) -> None:
    shapes = [(part["features"].shape, {k: part[k].dtype for k in part}) for part in _read(paths)]
    if not shapes:
        raise UserError("not one of the images could be read")
    total = sum(shape[0] for shape, _ in shapes)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name in ("names", "splits", "labels", "features"):
            dtype = np.result_type(*(kinds[name] for _, kinds in shapes))
            shape = (total, *shapes[0][0][1:]) if name == "features" else (total,)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as out:
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_2_0(out, header)
                for part in _read(paths):
                    out.write(np.ascontiguousarray(part[name], dtype).tobytes())
        for name, value in (
            ("classes", np.array(about["classes"], dtype=np.str_)),
            ("about", np.array(json.dumps(about))),
        ):
            with archive.open(f"{name}.npy", "w") as out:
                np.lib.format.write_array(out, value)
