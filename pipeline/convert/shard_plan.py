"""Which samples go into which shard, in which order, under which keys: the same for ever for the same source and options."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np

from manyview.pipeline import beton, codec, tar
from manyview.pipeline.convert.sources import Source
from manyview.pipeline.manifest import VERSION, Options

FORMATS = {"webdataset": tar, "ffcv": beton}
MIN_SHARD, MAX_SHARD = 16 << 20, 256 << 20
KEY_LENGTH = 90  # a ustar name has 100 bytes
SAFE = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")


@dataclass(frozen=True)
class Row:
    """One shard of the plan: which samples of its split, in which order."""

    split: int
    name: str
    samples: np.ndarray
    digest: str  # of everything that decides the shard's bytes


def safe_keys(names: list[str]) -> list[str]:
    """Unique keys of ASCII letters, digits, `_`, `-` and `/`, for any file names.

    WebDataset takes everything after a key's first dot for the type, and the index of DALI's reader is split at spaces.
    A name that had to be changed, or whose stem occurs twice, gets eight digits of its hash.
    """
    plain = [os.path.splitext(name)[0] for name in names]
    counts = Counter(plain)
    keys = [
        stem if counts[stem] == 1 and len(stem) <= KEY_LENGTH and SAFE.fullmatch(stem) else _hashed(stem, name)
        for stem, name in zip(plain, names)
    ]
    if len(set(keys)) != len(keys):  # a file named like another's hash: possible, so not ignored
        keys = [f"{key[:60]}-{_hash(name, 16)}" for key, name in zip(keys, names)]
    return keys


def _hash(name: str, digits: int) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:digits]


def _hashed(stem: str, name: str) -> str:
    clean = "/".join(part or "_" for part in re.sub(r"[^A-Za-z0-9_/-]", "_", stem).split("/"))
    return f"{clean[: KEY_LENGTH - 9]}-{_hash(name, 8)}"


def shuffled(n: int, seed: int, split: str) -> np.ndarray:
    """A permutation that stays the same for ever: raw Philox numbers, sorted."""
    key = [seed, zlib.crc32(split.encode())]
    return np.argsort(np.random.Philox(key=np.array(key, np.uint64)).random_raw(n), kind="stable")


def plan_shards(options: Options, source: Source, keys: list[list[str]], layout: codec.Layout = codec.RGB) -> list[Row]:
    """Cut each split, shuffled, into shards of about equal size in source bytes."""
    total = sum(int(split.sizes.sum()) for split in source.splits)
    target = options.shard_mb << 20 or min(max(total // 64, MIN_SHARD), MAX_SHARD)
    rows = []
    pixels = layout if layout != codec.RGB else ()
    settings = json.dumps([VERSION, "moments", asdict(options), source.classes, *pixels])
    for number, split in enumerate(source.splits):
        samples = shuffled(len(split.names), options.seed, split.name)
        sizes = split.sizes[samples]
        count = max(1, round(int(sizes.sum()) / target))
        cuts = np.flatnonzero(np.diff((np.cumsum(sizes) - sizes) * count // max(1, int(sizes.sum())))) + 1
        for shard, part in enumerate(np.split(samples, cuts)):
            digest = hashlib.sha256(settings.encode())
            digest.update("\0".join(keys[number][i] for i in part).encode())
            digest.update(split.labels[part].tobytes() + split.sizes[part].tobytes())
            name = f"{split.name}-{shard:05d}{FORMATS[options.format].SUFFIX}"
            rows.append(Row(number, name, part, digest.hexdigest()))
    return rows
