"""Writing shards: a deterministic plan, then one shard at a time on a pool of processes.

A shard is the unit of work. It is written to a temporary file, synced, renamed, and only then recorded; so a
conversion killed anywhere goes on from the finished shards, and ends byte for byte like an undisturbed one. Nothing
that is written depends on the number of processes, on time or on where the folders are.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32  # the CRC-32 of zlib, four times as fast

from manyview.pipeline import bucket, codec, files, index, storage, tar
from manyview.pipeline.convert import bands, encode, moments, pool, source_state, summary
from manyview.pipeline.convert.shard_plan import FORMATS, Row, plan_shards, safe_keys
from manyview.pipeline.convert.sources import AS_IT_IS, Reading, Source, datasets
from manyview.pipeline.errors import UserError, nearest, refuse
from manyview.pipeline.manifest import (
    MANIFEST,
    Options,
    finish_split,
    layout,
    read_manifest,
    write_manifest,
    write_rejected,
)

WORK = ".work"
# Loaded when asked for: Ray is an extra.
EXECUTORS = {"local": "manyview.pipeline.convert.pool", "ray": "manyview.pipeline.convert.cluster"}
SHARD = re.compile(r"(train|val|unlabelled)-\d{5,}\.(tar|idx|beton)")
LEFT = ".*.[0-9]*.tmp"  # what `files.whole` leaves where it is killed
CHECKS = {"decode": "thumbnail", "headers": "headers"}  # of JPEGs that keep their bytes, see `encode.convert`


@dataclass
class Job:
    options: Options
    out: Path
    source: Source
    keys: list[list[str]]
    rows: list[Row]
    listed: int  # when the source was, see `source_state`
    layout: codec.Layout
    url: str | None = None  # of the bucket that finished shards move to


# --- one shard ------------------------------------------------------------------------------------------------------


@dataclass
class Contents:
    """What went into a shard, in order, and what did not."""

    rows: list[tuple] = field(default_factory=list)  # as in index.COLUMNS
    keys: list[str] = field(default_factory=list)
    rejected: list[dict] = field(default_factory=list)
    moments: np.ndarray = field(default_factory=moments.nothing)
    unseen: int = 0  # JPEGs whose pixels nobody needed
    notes: Counter = field(default_factory=Counter)  # what conversion cost, see `encode.Converted`


def convert_shard(job: Job, row: Row) -> dict:
    """Make one shard and record it beside. Returns its part of the manifest, rejected images and pixel sums."""
    final, work = job.out / row.name, job.out / WORK
    with files.whole(final, buffering=1 << 20) as file:
        planar = job.options.encoding == "yuv420" or job.layout != codec.RGB
        writer = FORMATS[job.options.format].Writer(file, len(row.samples), planar)
        contents = _fill(writer, row, job)
        digest = writer.finish()
        size = file.seek(0, os.SEEK_END)
    shard: dict = {"file": row.name, "count": len(contents.rows), "bytes": size, "sha256": digest}
    if isinstance(writer, tar.Writer):
        shard["idx"] = final.with_suffix(".idx").name
        files.write(job.out / shard["idx"], writer.index_text())
    if job.url:  # in S3 and its like an object is there whole or not at all
        bucket = storage.Storage(job.url)
        for path in filter(Path.exists, (final.with_suffix(".idx"), final)):
            bucket.write(path, path.name)
            path.unlink()
    index.write(index.build(contents.rows, contents.keys), work / f"{row.name}.index")
    result = {"digest": row.digest, "shard": shard, "rejected": contents.rejected, "moments": contents.moments.tolist(),
              "listed": job.listed, "notes": contents.notes}  # fmt: skip
    files.write(work / f"{row.name}.json", json.dumps(result))  # the last step
    return result


def _fill(writer, row: Row, job: Job) -> Contents:
    split, keys = job.source.splits[row.split], job.keys[row.split]
    contents = Contents(moments=moments.nothing(job.layout.channels))
    for i in row.samples:
        pool.check_stop()
        key, label = keys[i], int(split.labels[i])
        try:
            data = split.read(i)
            image = bands.convert(data, job.options, job.layout, CHECKS[job.options.check])
            contents.moments += _moments(image, contents)
        except ValueError as error:
            contents.rejected.append({"split": split.name, "name": split.names[i], "key": key, "reason": str(error)})
            pool.count(0, 0, 1)
            continue
        payload = image.payload
        offset, crc = writer.add(key, label, payload), crc32(payload)
        contents.rows.append((label, offset, payload.nbytes, 0, image.height, image.width, crc, codec.kind(payload)))
        contents.keys.append(key)
        contents.notes.update([image.note] if image.note else [])
        pool.count(1, data.nbytes, 0)
    return contents


def _moments(image: encode.Converted, contents: Contents) -> np.ndarray:
    """What one image adds to the statistics; see `moments`. ValueError if it has to be decoded for that and cannot be."""
    if image.pixels is not None:
        return moments.of_pixels(image.pixels)
    contents.unseen += 1
    pixels = codec.decode(image.payload) if contents.unseen % moments.SAMPLED == 1 else None
    if image.thumbnail is not None:
        return moments.of_thumbnail(image.thumbnail, image.height * image.width, pixels)
    return moments.nothing() if pixels is None else moments.of_pixels(pixels)


# --- all of them ----------------------------------------------------------------------------------------------------


def check_options(options: Options, jobs: int = 0) -> None:
    """UserError with one line for every option that cannot be."""
    errors = []
    if options.format not in FORMATS:
        errors.append(nearest("format", options.format, FORMATS))
    if options.encoding not in (*codec.ENCODINGS, codec.ARRAY):
        errors.append(nearest("encoding", options.encoding, (*codec.ENCODINGS, codec.ARRAY)))
    if options.check not in CHECKS:
        errors.append(nearest("check", options.check, CHECKS))
    if options.size < 0 or 0 < options.size < 8:
        errors.append(f"size is the short side in pixels, 0 or at least 8, not {options.size}")
    if not 1 <= options.quality <= 100:
        errors.append(f"quality is 1 to 100, not {options.quality}")
    if not 0 <= options.seed < 1 << 64:
        errors.append(f"seed is 0 or a positive number of 64 bits, not {options.seed}")
    if not 0 <= options.white < float("inf"):
        errors.append(f"white is 0 (what the type holds) or the value that becomes white, not {options.white:g}")
    if options.white and options.encoding == codec.ARRAY:
        errors.append(f"white narrows values to 8 bits, encoding {codec.ARRAY} keeps them: one of the two")
    if jobs < 0:
        errors.append(f"jobs is a number of processes, 0 for one a core, not {jobs}")
    if options.shard_mb < 0 or options.shard_mb > 1 << 20:
        errors.append(f"shard-mb is 0 (chosen) or a size in megabytes, not {options.shard_mb}")
    refuse(errors)


def write_shards(
    options: Options,
    source: Path | None,
    out: Path,
    *,
    jobs: int = 0,
    max_rejected: float = 0.01,
    reading: Reading = AS_IT_IS,
    quiet: bool = False,
    executor: str = "local",
) -> dict:
    """Convert a dataset to shards in `out`; go on where an earlier run stopped. Returns the manifest.

    `out` may be the address of a bucket (see `storage`): each shard is made here and moves there, the manifest comes last.
    UserError: bad options or source, other shards in `out`, too many rejected images, disk full, a worker that died.
    """
    options = replace(options, labels=reading.digest())
    reading = replace(reading, unlabelled=options.unlabelled, arrays=options.encoding == codec.ARRAY)
    check_options(options, jobs)
    bucket = storage.open_storage(out)
    if bucket and executor != "local":
        raise UserError(f"executor {executor} writes to a folder that its nodes share, not to {bucket.url}")
    if options.dataset == "shards" and source is not None and bucket is None:
        _refuse_itself(source, out)
    if executor not in EXECUTORS:
        raise UserError(nearest("executor", executor, EXECUTORS))
    before, here = read_manifest(out), workshop(out)
    if before is None:
        _refuse_foreign(out)
    elif _whole(options, out, before, idx=True) and source_state.untouched(source_state.read(here, source)):
        _tidy(here)
        return before
    listed = source_state.now()
    now = datasets.load(options.dataset, source, reading)
    _check_same(now, source, before)
    with _alone(here):
        before = read_manifest(out)  # again: another process may have finished since
        finished = before is not None
        try:
            if before is not None and _check_same(now, source, before) and _whole(options, out, before):
                _check_source(options, now, source, out, before)
                manifest = before
            else:
                finished = False
                keys = [safe_keys(split.names) for split in now.splits]
                url = bucket.url if bucket else None
                pixels = bands.layout(options, now)
                job = Job(options, here, now, keys, plan_shards(options, now, keys, pixels), listed, pixels, url)
                manifest = _write_alone(job, max_rejected, jobs, quiet, executor)
            source_state.write(here, source, now, listed)
            finished = True
        finally:
            if finished:
                _remove_work(here)
    return manifest


def _tidy(out: Path) -> None:
    """Whole shards whose run was killed while it removed its workshop: nobody else would."""
    if (out / WORK).exists():
        with contextlib.suppress(UserError, OSError), _alone(out):  # that run is still at it, or nobody may write there
            _remove_work(out)


def _remove_work(out: Path) -> None:
    """To be called by who is `_alone`."""
    for path in out.glob(LEFT):
        path.unlink()
    shutil.rmtree(out / WORK)


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Nobody else writes to `out`, as far as its file system has locks. UserError if somebody does."""
    with contextlib.ExitStack() as stack:
        held: int | None = -1
        while held == -1:
            (out / WORK).mkdir(parents=True, exist_ok=True)
            try:
                held = stack.enter_context(files.locked(out / WORK / "lock", wait=False))
            except FileNotFoundError:  # another process has just finished and removed it
                continue
            except OSError as error:
                if error.errno not in files.UNLOCKABLE:
                    raise
                print(f"note: {out} has no locks ({error.strerror}): let no other process write there", file=sys.stderr)
                break
        if held is None:
            raise UserError(f"another process is writing shards to {out}")
        yield


def _write_alone(job: Job, max_rejected: float, jobs: int, quiet: bool, executor: str) -> dict:
    """Make the shards that are not there yet, and the manifest."""
    # What could not even be listed is known now: if it is too much, this need not be said after hours of work.
    write_rejected(job.out, job.source.problems, _count(job.source), max_rejected)
    results = _finished(job)
    bucket = storage.Storage(job.url) if job.url else None
    (job.out / MANIFEST).unlink(missing_ok=True)  # of shards of which some are lost; from here on it would be wrong
    if bucket:
        bucket.remove(MANIFEST)
    _clean(job.out, bucket, {row.name for row in job.rows})
    todo = {row.name: row for row in job.rows if row.name not in results}
    total = sum(len(row.samples) for row in todo.values())
    run = importlib.import_module(EXECUTORS[executor]).run
    new = run(partial(convert_shard, job), todo, jobs=jobs, total=total, quiet=quiet)
    _seen(job, new)
    results |= new
    manifest = _finish(job, results, max_rejected)
    if bucket:
        for name in ("rejected.jsonl", *(f"{split}.index" for split in manifest["splits"]), MANIFEST):
            bucket.write(job.out / name, name)
    return manifest


def _seen(job: Job, results: dict[str, dict]) -> None:
    """UserError: a shard that was written by another node is not here."""
    for name, result in results.items() if not job.url else ():
        if not (job.out / name).exists() or (job.out / name).stat().st_size != result["shard"]["bytes"]:
            raise UserError(
                f"{job.out / name} was written by another node and is not seen here: the nodes must share {job.out}"
            )


def _refuse_itself(source: Path, out: Path) -> None:
    """UserError if shards would be converted into the folder that they lie in: what is written may have their names."""
    here, there = out.resolve(), source.resolve()
    if here == there or there in here.parents or (there.parent == here and SHARD.fullmatch(there.name)):
        raise UserError(f"{source} would be converted into its own folder, {out}: choose another OUT")


def _refuse_foreign(out: Path) -> None:
    """UserError if `out` holds shards of which nothing says that we made them: they would be removed or overwritten."""
    if (workshop(out) / WORK / "lock").exists():
        return  # of an interrupted run, which goes on
    bucket = storage.open_storage(out)
    names = bucket.sizes() if bucket else os.listdir(out) if out.is_dir() else []
    if foreign := sorted(filter(SHARD.fullmatch, names)):
        raise UserError(
            f"{storage.where(out)} holds {foreign[0]} and no {MANIFEST}, so it is not ours to overwrite: choose another OUT"
        )


def _whole(options: Options, out: Path, manifest: dict, idx: bool = False) -> bool:
    """Whether all shards are there, and DALI's indexes beside them if `idx`. UserError if they are others than would be made."""
    then, now = {**asdict(Options("")), **manifest["options"]}, asdict(options)  # older ones lack the newest options
    if changed := [f"{name} {then[name]!r}, now {value!r}" for name, value in now.items() if then[name] != value]:
        raise UserError(
            f"{storage.where(out)} holds shards made otherwise ({'; '.join(changed)}): choose another OUT or remove it"
        )
    size_of = _sizes(out)
    whole = all(size_of(row["file"]) == row["bytes"] for row in _shards(manifest))
    return whole and not (idx and _lost_indexes(out, manifest))


def _shards(manifest: dict) -> list[dict]:
    return [row for split in manifest["splits"].values() for row in split["shards"]]


def _lost_indexes(out: Path, manifest: dict) -> list[dict]:
    """Shards of a folder beside which DALI's index is missing."""
    rows = [] if storage.address(out) else _shards(manifest)
    return [row for row in rows if "idx" in row and not (out / row["idx"]).exists()]


def _sizes(out: Path) -> Callable[[str], int | None]:
    """Bytes of a file of `out`, None if there is no such."""
    if bucket := storage.open_storage(out):
        return bucket.sizes().get
    return lambda name: (out / name).stat().st_size if (out / name).exists() else None


def _check_source(options: Options, now: Source, source: Path | None, out: Path, manifest: dict) -> None:
    """UserError if a source is no longer what the shards were made from, by the content of what is younger."""
    bucket, here = storage.open_storage(out), workshop(out)
    since = source_state.read(here, source)["at"]
    convert = partial(bands.convert, options=options, wanted=layout(manifest), look=CHECKS[options.check])
    for row in _lost_indexes(out, manifest):
        files.write(out / row["idx"], tar.dali_index(out / row["file"]))
    for split in now.splits:
        about = manifest["splits"][split.name]["index"]
        if bucket:
            bucket.fetch(about["file"], here / about["file"])
        rows = index.read(here / about["file"], about["sha256"])
        if names := source_state.rewritten(split, safe_keys(split.names), rows, since, convert):
            raise UserError(
                f"{len(names)} images of {source} were rewritten since the shards were made from it, the first is "
                f"{names[0]!r}: choose another OUT or remove them"
            )


def _check_same(now: Source, source: Path | None, manifest: dict | None) -> bool:
    """Whether there is a manifest. UserError where the source is no longer what it tells of, by its list."""
    if manifest is not None and now.fingerprint() != manifest["source"].get("fingerprint"):
        raise UserError(f"{source} has changed since the shards were made from it: choose another OUT or remove them")
    return manifest is not None


def _finished(job: Job) -> dict[str, dict]:
    """Rows of an earlier run that this plan would make again, and whose shards are there."""
    results, size_of = {}, _sizes(Path(job.url or job.out))
    for row in job.rows:
        with contextlib.suppress(FileNotFoundError, ValueError):  # none, or cut off by a machine that lost power
            result = json.loads((job.out / WORK / f"{row.name}.json").read_bytes())
            times = job.source.splits[row.split].times
            altered = bool((times[row.samples] > result["listed"]).any())
            whole = size_of(row.name) == result["shard"]["bytes"]
            if result["digest"] == row.digest and whole and not altered:
                results[row.name] = result
    return results


def _clean(out: Path, bucket: storage.Storage | None, planned: set[str]) -> None:
    """Remove what an interrupted run left: temporary files, and shards of another plan."""
    for path in (*out.glob(LEFT), *(path for path in out.iterdir() if _stray(path.name, planned))):
        path.unlink()
    if bucket:
        for name in bucket.sizes():
            if _stray(name, planned):
                bucket.remove(name)


def _stray(name: str, planned: set[str]) -> bool:
    """Whether this is a shard, or DALI's index of one, that the plan does not have."""
    return SHARD.fullmatch(name) is not None and not {name, name.removesuffix(".idx") + tar.SUFFIX} & planned


def _finish(job: Job, results: dict[str, dict], max_rejected: float) -> dict:
    rejected = list(job.source.problems)
    for row in job.rows:
        rejected += results[row.name]["rejected"]
    write_rejected(job.out, rejected, _count(job.source), max_rejected)
    splits = {split.name: _finish_split(job, number, results) for number, split in enumerate(job.source.splits)}
    costs = sum((Counter(results[row.name].get("notes", {})) for row in job.rows), Counter())
    source = job.source
    notes = [*source.notes, *(f"{count} images: {what}" for what, count in sorted(costs.items()))]
    notes += summary.lost(source, rejected)
    return write_manifest(job.out, job.options, source.classes, splits, len(rejected), source.fingerprint(), source.ignored,
                          notes, job.layout)  # fmt: skip


def _count(source: Source) -> int:
    return sum(len(split.names) for split in source.splits) + len(source.problems)


def _finish_split(job: Job, number: int, results: dict[str, dict]) -> dict:
    rows = [row for row in job.rows if row.split == number]
    indexes = index.concatenate([index.read(job.out / WORK / f"{row.name}.index") for row in rows])
    total = sum((np.array(results[row.name]["moments"]) for row in rows), moments.nothing(job.layout.channels))
    shards = [results[row.name]["shard"] for row in rows]
    rejects = sum(len(results[row.name]["rejected"]) for row in rows)
    return finish_split(job.out, job.source.splits[number].name, indexes, shards, moments.average(total), rejects)


def workshop(out: Path) -> Path:
    """Where shards are made: `out` itself if it is a folder; for a bucket, a folder of its name on local disk."""
    url = storage.address(out)
    return bucket.home() / "making" / hashlib.sha256(url.encode()).hexdigest()[:16] / out.name if url else out
