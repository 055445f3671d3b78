"""manifest.json: what a folder of shards holds. Written last, so with it the shards are complete."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from manyview.pipeline import codec, files, index, storage
from manyview.pipeline.errors import UserError

VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Options:
    """Everything that decides what is written."""

    dataset: str
    format: str = "webdataset"
    encoding: str = "jpeg"
    size: int = 0
    quality: int = codec.QUALITY
    max_pixels: int = 100_000_000
    seed: int = 0
    shard_mb: int = 0  # 0 = a 64th of the source, between 16 and 256 MB
    unlabelled: bool = False
    check: str = "decode"
    labels: str = ""  # of a table that gives them, a digest
    white: float = 0  # the value that becomes 255 in pictures of more than 8 bits; 0 = what their type says


def read_manifest(out: Path) -> dict | None:
    """None if there is none. UserError if it is of another version or damaged."""
    bucket = storage.open_storage(out)
    try:
        text = bucket.read(MANIFEST).decode() if bucket else (out / MANIFEST).read_text()
        manifest = json.loads(text)
    except (FileNotFoundError, storage.Missing):
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{storage.where(out / MANIFEST)} is damaged: {error}") from None
    if isinstance(manifest, dict) and manifest.get("version", VERSION) != VERSION:
        raise UserError(
            f"{storage.where(out)} holds shards of version {manifest['version']}, this program {VERSION}: make them again"
        )
    if not _has(manifest, KEYS) or not all(_has(part, PART_KEYS) for part in manifest["splits"].values() or [None]):
        raise UserError(f"{storage.where(out / MANIFEST)} is no manifest of shards: another program's?")
    return manifest


KEYS = {"name": str, "format": str, "options": dict, "classes": list, "source": dict, "rejected": int, "splits": dict}
PART_KEYS = {"count": int, "mean": list, "std": list, "fingerprint": str, "index": dict, "shards": list}


def _has(found: object, keys: dict[str, type]) -> bool:
    return isinstance(found, dict) and all(isinstance(found.get(name), kind) for name, kind in keys.items())


def write_rejected(out: Path, rejected: list[dict], total: int, allowed: float) -> None:
    """`rejected.jsonl`; UserError if there are more than the allowed fraction of `total`."""
    files.write(out / "rejected.jsonl", "".join(json.dumps(item) + "\n" for item in rejected))
    if len(rejected) > allowed * total:
        raise UserError(
            f"{len(rejected)} of {total} images were rejected, more than {allowed:.2%}, the first is {rejected[0]['name']!r}: "
            f"{rejected[0]['reason']}. See {out / 'rejected.jsonl'}, then repair them or raise --max-rejected"
        )


def finish_split(out: Path, name: str, rows: index.Index, shards: list[dict], average, rejected: int) -> dict:
    """Write a split's index; returns its part of the manifest. `average`: (2, 3), mean and mean square a channel."""
    if not len(rows):
        raise UserError(f"not one image of split {name} could be used: see {out / 'rejected.jsonl'}")
    digest = index.write(rows, out / f"{name}.index")
    mean, square = np.asarray(average)
    return {
        "count": len(rows),
        "rejected": rejected,
        "labelled": int((rows["label"] >= 0).sum()),
        "mean": mean.tolist(),
        "std": np.sqrt(np.maximum(square - mean**2, 0)).tolist(),
        "fingerprint": rows.fingerprint(),
        "index": {"file": f"{name}.index", "sha256": digest},
        "shards": shards,
    }


def write_manifest(
    out: Path,
    options: Options,
    classes,
    splits: dict,
    rejected: int,
    source: str,
    ignored: int = 0,
    notes: Iterable[str] = (),
) -> dict:
    """The last thing to be written: with it the shards are complete. `source`: fingerprint of where they come from;
    `ignored`: files there that are no images by their names; `notes`: what whoever converted should know, a line each."""
    whole = hashlib.sha256(json.dumps([[key, split["fingerprint"]] for key, split in sorted(splits.items())]).encode())
    manifest = {
        "name": out.resolve().name,
        "version": VERSION,
        "format": options.format,
        "encoding": options.encoding,
        "encoder": {
            "quality": options.quality,
            "subsampling": codec.SUBSAMPLING,
            "resize": "area",
            "size": options.size,
        },
        "options": asdict(options),
        "fingerprint": whole.hexdigest(),
        "classes": list(classes),
        "source": {"dataset": options.dataset, "fingerprint": source, "ignored": ignored},
        "rejected": rejected,
        "notes": list(notes),
        "splits": splits,
    }
    files.write(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest
