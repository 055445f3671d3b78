"""manifest.json: what a folder of shards holds. Written last, so with it the shards are complete."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

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
    labels: str = ""  # digest of what decides them besides the source, see `sources.Reading`
    white: float = 0.0  # the value that becomes 255 in pictures of more than 8 bits; 0 = what their type says


def read_manifest(out: Path) -> dict | None:
    """None if there is none. UserError if it is of another version, damaged, or not to be trusted: a manifest names files."""
    bucket, where = storage.open_storage(out), storage.where(out / MANIFEST)
    try:
        text = bucket.read(MANIFEST).decode() if bucket else (out / MANIFEST).read_bytes().decode()
        manifest = json.loads(text)
    except (FileNotFoundError, storage.Missing):
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is damaged: {error}") from None
    if isinstance(manifest, dict) and manifest.get("version", VERSION) != VERSION:
        version = str(manifest["version"])[:20]
        raise UserError(
            f"{storage.where(out)} holds shards of version {version}, this program {VERSION}: make them again"
        )
    if odd := _odd(manifest):
        raise UserError(f"{where} is no manifest of shards: its {odd} is not what it should be (another program's?)")
    return manifest


def layout(manifest: dict) -> codec.Layout:
    """Of a set's pixels. Sets of RGB, and older ones, do not say it."""
    return codec.Layout(manifest.get("channels", 3), manifest.get("bits", 8))


KEYS = {"name": str, "format": str, "options": dict, "classes": list, "source": dict, "rejected": int, "splits": dict}
PART_KEYS = {"count": int, "mean": list, "std": list, "fingerprint": str, "index": dict, "shards": list}
SHARD_KEYS = {"file": str, "count": int, "bytes": int, "sha256": str}


def _odd(manifest: Any) -> str:
    """What of a manifest cannot be, by name; empty if all is well."""
    if odd := _lacking(manifest, KEYS):
        return odd
    if not all(_text(name) for name in (manifest["name"], *manifest["classes"], *manifest["splits"])):
        return "name"
    if manifest["format"] not in ("webdataset", "ffcv") or not manifest["splits"]:
        return "splits" if not manifest["splits"] else "format"
    channels, bits = layout(manifest)
    if type(channels) is not int or not 1 <= channels <= codec.MAX_CHANNELS or bits not in (8, 16):
        return "channels or bits"
    anywhere = manifest["options"].get("dataset") == "shards"  # what was indexed lies where it lies
    odd_parts = ((name, _odd_part(part, channels, anywhere)) for name, part in manifest["splits"].items())
    return next((f"split {name}, {odd}," for name, odd in odd_parts if odd), "")


def _odd_part(part: Any, channels: int, anywhere: bool) -> str:
    if odd := _lacking(part, PART_KEYS) or _lacking(part["index"], {"file": str, "sha256": str}):
        return odd
    numbers = [*part["mean"], *part["std"]]
    finite = all(type(value) in (int, float) and abs(value) < 1e6 for value in numbers)
    if not len(part["mean"]) == len(part["std"]) == channels or not finite:
        return "mean or std"
    names = [part["index"]["file"]]
    for shard in part["shards"]:
        if odd := _lacking(shard, SHARD_KEYS) or ("" if isinstance(shard.get("idx", ""), str) else "idx"):
            return f"a shard's {odd}"
        above = re.match(r"(\.\./)*", shard["file"]).end() if anywhere else 0  # type: ignore[union-attr]
        names += [shard["file"][above:], shard.get("idx", "idx")]
    return next((f"file {name[:80]!a}" for name in names if not _inside(name)), "")


def _lacking(value: Any, keys: dict[str, type]) -> str:
    """The first of these keys that is missing or of another type; a number is whole, not negative, and one a file can have."""
    if not isinstance(value, dict):
        return "content"
    right = {
        key: type(value.get(key)) is kind and (kind is not int or 0 <= value[key] < 1 << 62)
        for key, kind in keys.items()
    }
    return next((key for key, well in right.items() if not well), "")


def _text(value: Any) -> bool:
    """Whether this can be printed."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _inside(name: str) -> bool:
    """Whether a file's name is one, and leads nowhere but into the folder."""
    path = PurePosixPath(name)
    well = _text(name) and "\0" not in name and len(name) < 4096
    return bool(well and path.name) and not path.is_absolute() and ".." not in path.parts


def write_rejected(out: Path, rejected: list[dict], total: int, allowed: float) -> None:
    """`rejected.jsonl`; UserError if there are more than the allowed fraction of `total`."""
    files.write(out / "rejected.jsonl", "".join(json.dumps(item) + "\n" for item in rejected))
    if len(rejected) > allowed * total:
        raise UserError(
            f"{len(rejected)} of {total} images were rejected, more than {allowed:.2%}, the first is {rejected[0]['name']!r}: "
            f"{rejected[0]['reason']}. See {out / 'rejected.jsonl'}, then repair them or raise --max-rejected"
        )


def finish_split(out: Path, name: str, rows: index.Index, shards: list[dict], average, rejected: int) -> dict:
    """Write a split's index; returns its part of the manifest. `average`: (2, C), mean and mean square a channel."""
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
    pixels: codec.Layout = codec.RGB,
    **about: Any,
) -> dict:
    """The last thing to be written: with it the shards are complete. `source`: fingerprint of where they come from;
    `ignored`: files there that are no images by their names; `notes`: what whoever converted should know, a line each;
    `about`: more about the source."""
    whole = hashlib.sha256(json.dumps([[key, split["fingerprint"]] for key, split in sorted(splits.items())]).encode())
    manifest = {
        "name": out.resolve().name,
        "version": VERSION,
        "format": options.format,
        "encoding": options.encoding,
        **(pixels._asdict() if pixels != codec.RGB else {}),
        "encoder": {
            "quality": options.quality,
            "subsampling": codec.SUBSAMPLING,
            "resize": "area",
            "size": options.size,
        },
        "options": asdict(options),
        "fingerprint": whole.hexdigest(),
        "classes": list(classes),
        "source": {"dataset": options.dataset, "fingerprint": source, "ignored": ignored, **about},
        "rejected": rejected,
        "notes": list(notes),
        "splits": splits,
    }
    files.write(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest
