"""Features of any images into one file, a part at a time: what `tools/embed.py` does.

Parts of `PART` images lie in a folder beside the file until all are there, so a run that was killed goes on where it stopped,
and memory holds one part, however many images there are.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manyview.evaluation.encoder import Encoder
from manyview.evaluation.features import clean_engine, finite
from manyview.evaluation.folder import FileStore, engine_name, is_folder, listed
from manyview.pipeline import engines, files
from manyview.pipeline.codec import RGB, Layout
from manyview.pipeline.errors import UserError
from manyview.pipeline.loader import clean_views, normalize
from manyview.pipeline.store import Store, splits

PART = 8192  # images


def open_images(path: Path, wanted: str | None, layout: Layout = RGB) -> tuple[list[Any], str]:
    """Stores of all splits (or the one that is wanted) of shards or of a folder of image files, and their fingerprint."""
    if is_folder(path):
        source = listed(path, layout)
        splits_wanted = [split for split in source.splits if wanted in (None, split.name)]
        stores: list[Any] = [FileStore(split, source.classes, path, layout) for split in splits_wanted]
        fingerprint = source.fingerprint()
    else:
        stores = [Store(path, name) for name in splits(path) if wanted in (None, name)]
        fingerprint = " ".join(store.fingerprint for store in stores)
    if not sum(map(len, stores)):
        raise UserError(f"{path}: no images in a split {wanted!r}")
    return stores, fingerprint


def embed(
    encoder: Encoder, data: Path, to: Path, *, split: str | None = None, batch: int = 256, device: torch.device, engine: str,
    threads: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write `to` (.parquet or .npz) and return what it says about itself. UserError where nothing could be embedded."""
    _check(to)
    stores, fingerprint = open_images(data, split, encoder.layout)
    for store in stores:
        encoder.check(store)
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
            with files.whole(parts / f"{number:06d}.npz") as file:
                np.savez(file, **rows)  # type: ignore[arg-type]  # numpy's stub takes any name for allow_pickle
            print(f"part {number + 1} of {len(places)}: {len(rows['names']):,} images")
    write = _parquet if to.suffix == ".parquet" else _npz
    with files.whole(to) as file:
        write(file, [parts / f"{n:06d}.npz" for n in range(len(places))], about)
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
) -> dict[str, np.ndarray]:  # fmt: skip
    """Names, splits, labels (-1: none) and features (n, ...) float32 of what can be read of these samples."""
    kept, features = [], []
    shown, _ = engines.create(engine_name(store, engine), store, device, threads=threads)
    with closing(shown):
        for some in np.array_split(ids, -(-len(ids) // batch)):
            readable = _loaded(store, some) if isinstance(store, FileStore) else some
            readable, y = _features(encoder, module, store, readable, shown, device)
            kept.append(readable)
            features += [y.numpy()] if len(readable) else []
    ids = np.concatenate(kept)
    names = [store.key(int(i)).encode("utf-8", "surrogateescape").decode("utf-8", "replace") for i in ids]
    x = np.concatenate(features) if features else np.zeros((0, 0), np.float32)
    labels, splits = store.labels[ids].astype(np.int64), np.full(len(ids), store.split)
    return {"names": np.array(names, np.str_), "splits": splits, "labels": labels, "features": x}


def _loaded(store: FileStore, ids: np.ndarray) -> np.ndarray:
    """Those of these files that are images, in memory instead of the ones before."""
    store.forget()
    store.load(ids)
    for i in sorted(store.unusable.keys() & set(ids.tolist())):
        _left_out(f"{store.key(i)}: {store.unusable[i]}")
    return np.array([i for i in ids if int(i) not in store.unusable], np.int64)


@torch.inference_mode()
def _features(
    encoder: Encoder, module: Any, store: Any, ids: np.ndarray, engine: Any, device: torch.device
) -> tuple[np.ndarray, Tensor]:
    """(ids that could be read, features) of the clean views."""
    with clean_engine(encoder, store, engine) as own:
        ids, images = clean_views(store, own, encoder.image_size, ids, encoder.crop_ratio, _left_out)
    if not len(ids):
        return ids, torch.zeros(0)
    x = normalize(images.to(device), encoder.mean, encoder.std, torch.float32)
    return ids, finite(module(x.contiguous(memory_format=torch.channels_last)).float().cpu(), encoder, store)


def _left_out(why: str) -> None:
    print(f"left out: {why}")


# ------------------------------------------------------------------------------------------------------------- files


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
            text, number = pa.string(), pa.int64()
            columns = [("name", text), ("split", text), ("label", number), ("class", text), ("features", kind)]
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
        classes, facts = np.array(about["classes"], dtype=np.str_), np.array(json.dumps(about))
        for name, value in (("classes", classes), ("about", facts)):
            with archive.open(f"{name}.npy", "w") as out:
                np.lib.format.write_array(out, value)
