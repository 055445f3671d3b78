"""A grid of runs from a small file, one CSV row a run: what `tools/sweep.py` does.

A study file says what every run shares and what varies:

    train: {data: shards/cifar10, backbone: resnet10-narrow, batch_size: 128, …}   # settings of train.py
    probe: {epochs: 30, images: 0}                    # of the linear probe; images: to train on, 0 = all
    grids:
      views:                                          # what tools/report.py knows these runs by
        - {views: [2, 4, 8], beta: [1/D, 5/D], budget: [400000], seed: [0, 1, 2]}   # every combination is a run

`budget` is the number of views that a run sees (steps = budget / (views x batch)); 0 scores the untrained network.
Finished rows are never run again, a killed run goes on from its checkpoint, and each run is a process of its own: it
is forked from a server that has imported everything, which saves the ten core-seconds that importing takes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import signal
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import yaml
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from manyview.pipeline import files
from manyview.pipeline.errors import UserError, in_one_line, nearest
from manyview.study import worker
from manyview.training import config, monitor

Settings = dict[str, Any]
RESULTS = ("held_out", "linear", "knn", "rank", "loss", "steps", "views_seen", "core_seconds", "seconds", "peak_bytes",
           "commit", "machine", "shared", "probe")  # fmt: skip
DEFAULTS = {name: getattr(config.Config, name) for name in ("optimizer", "policy", "beta")}
CURVE = ("step", "views_seen", "core_seconds", "knn", "linear")


class Probe(TypedDict, total=False):
    epochs: int
    images: int


@dataclass
class Study:
    """What a study file says."""

    name: str
    train: Settings
    grids: dict[str, list[Settings]]  # without what all share
    probe: Probe = field(default_factory=Probe)

    @cached_property
    def runs(self) -> list[Settings]:
        """Every run once, however many grids hold it."""
        return list({name_of(s): s for grid in self.grids.values() for s in grid}.values())

    @cached_property
    def columns(self) -> list[str]:
        """What varies, in the order of the file."""
        return list(dict.fromkeys(key for run in self.runs for key in run))

    @property
    def shared(self) -> str:
        """Identity of what all runs share: rows made under other settings are not these rows."""
        return hashlib.sha256(json.dumps([self.train, self.probe], sort_keys=True).encode()).hexdigest()[:8]


class Parts(TypedDict, total=False):
    """Of a study file."""

    train: Settings
    probe: Probe
    grids: dict[str, list[Settings]]


def read(path: Path) -> Study:
    """The study in a YAML file. `UserError` for unknown settings and for runs of no known length."""
    content = load(path, "study", Parts, "train", "grids")
    train, grids = content["train"], content["grids"]
    known = {*config.to_json(config.Config()), "budget"}
    for key in (*train, *(key for grid in grids.values() for part in grid for key in part)):
        if key not in known:
            raise UserError(f"{path}: {nearest('setting', str(key), known)}")
    study = Study(path.stem, train, {name: [run for part in grid for run in product(part)] for name, grid in grids.items()},
                  content.get("probe", {}))  # fmt: skip
    if not study.runs:
        raise UserError(f"{path}: its grids have no runs")
    for run in study.runs:
        for key, least in (("views", 1), ("batch_size", 1), ("budget", 0)):
            value = ({"batch_size": 1} | train | run).get(key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
                raise UserError(
                    f"{path}: every run needs `{key}`, a number of at least {least}, not {value!r}: {name_of(run)}"
                )
    return study


Content = TypeVar("Content", bound=Mapping[str, Any])


def load(path: Path, what: str, parts: type[Content], *needed: str) -> Content:
    """What a YAML file holds that has the parts of a TypedDict. `UserError` where it is none, or has others."""
    if not path.is_file():
        raise UserError(f"no {what} {path}")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {in_one_line(error)}") from None
    if not isinstance(content, dict) or not content.keys() >= set(needed):
        raise UserError(f"{path}: a {what} has {' and '.join(f'`{part}`' for part in needed)}")
    if unknown := content.keys() - parts.__annotations__.keys():
        raise UserError(f"{path}: {nearest('part', str(unknown.pop()), parts.__annotations__)}")
    try:
        return check_type(content, parts, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError as error:
        raise UserError(f"{path}: {error}") from None


def product(part: Settings) -> list[Settings]:
    """Every combination of the values."""
    lists = [v if isinstance(v, list) else [v] for v in part.values()]
    return [dict(zip(part, values)) for values in itertools.product(*lists)]


def name_of(settings: Settings) -> str:
    """The run's folder: what distinguishes it."""
    return " ".join(f"{k}={v}" for k, v in sorted(settings.items())).replace("/", "_over_").replace(" ", ",")


def flags(settings: Settings) -> list[str]:
    """The command line of train.py. Settings that a study does not name are those of large pictures, whatever its size."""
    merged = DEFAULTS | settings
    if "budget" in merged:
        images = merged["views"] * merged.get("batch_size", config.Config.batch_size)
        merged["steps"] = max(1, round(float(merged.pop("budget")) / images))
    words: list[str] = []
    for key, value in merged.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return words


def run(study: Study, out: Path, folder: Path, jobs: int) -> int:
    """Do what is missing in the CSV `out`, `jobs` runs at a time; the number of runs that failed."""
    rows = finished(study, out)
    todo = [s for s in study.runs if name_of(s) not in rows]
    todo.sort(key=lambda settings: settings.get("seed", 0))  # every setting once before any twice
    print(f"{study.name}: {len(study.runs)} runs, {len(study.runs) - len(todo)} done; {jobs} at a time", flush=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["manyview.study.worker"])
    begun, failed = time.perf_counter(), 0
    commit = monitor.commit()  # of the code that the server is about to load, whatever the checkout becomes meanwhile
    children: set[Any] = set()
    stopped = on_sigterm(children)

    def child(settings: Settings) -> int:
        """One run in a process of its own; its exit code."""
        if stopped:
            return 75
        words, place = flags(study.train | settings), folder / study.name / name_of(settings)
        process = context.Process(target=worker.work, args=(study.probe, words, settings, place, jobs))
        process.start()
        children.add(process)
        process.join()
        children.discard(process)
        return process.exitcode or 0

    with ThreadPoolExecutor(jobs) as pool:
        work = {pool.submit(child, settings): settings for settings in todo}
        for n, future in enumerate(as_completed(work), 1):
            settings, code = work[future], future.result()
            left = monitor.duration((time.perf_counter() - begun) / n * (len(todo) - n))
            place = folder / study.name / name_of(settings)
            if code == 0:
                row = settings | json.loads((place / "row.json").read_text())
                rows[name_of(settings)] = row | {"commit": commit, "shared": study.shared}
                write(study, out, rows)
                text = f"linear {row['linear']:.2%}, kNN {row['knn']:.2%}, {row.get('core_seconds', 0):.0f} core-s"
            elif not stopped:
                failed += 1
                log = Path(f"{place}.log")
                said = log.read_text().splitlines()[-5:] if log.exists() else []
                text = f"FAILED ({code}); the end of {place}.log:\n" + "\n".join(f"    {line}" for line in said)
            else:
                text = "stopped; the same command goes on"
            print(f"{n}/{len(todo)} {name_of(settings)}: {text}; {left} left", flush=True)
    return failed


def on_sigterm(children: set[Any]) -> list[int]:
    """Ctrl-C or SIGTERM: the runs save and leave; nothing new begins. A list that is then no longer empty."""
    stopped: list[int] = []

    def stop(number: int, frame: Any) -> None:
        stopped.append(number)
        for process in list(children):
            process.terminate()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    return stopped


def finished(study: Study, out: Path) -> dict[str, Settings]:
    """Rows of the CSV by run. `UserError` where the file is of another study."""
    rows = read_rows(out, *RESULTS[:-1])  # the oldest rows do not say how they were probed
    if any(row["shared"] != study.shared for row in rows):
        what = "rows made with other shared settings: of another study, or of an earlier state of it"
        raise UserError(f"{out}: {what}; move it away, or give --out")
    return {run_of(study, row): row for row in rows}


def run_of(study: Study, row: Settings) -> str:
    """The name of the run that a row of a CSV is of."""
    return name_of({column: row[column] for column in study.columns if row.get(column, "") != ""})


def write(study: Study, out: Path, rows: dict[str, Settings]) -> None:
    """All rows, in the order of the study, the file replaced at once."""
    order = [name_of(s) for s in study.runs]
    names = sorted(rows, key=lambda n: order.index(n) if n in order else len(order))
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write(out, table([*study.columns, *RESULTS], [rows[name] for name in names]))


def read_rows(path: Path, *needed: str) -> list[Settings]:
    """Of a CSV; none where there is no such file. `UserError` where it has not the columns `needed`."""
    if not path.exists():
        return []
    try:
        reader = csv.DictReader(io.StringIO(path.read_text()), strict=True)
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV: {error}") from None
    if missing := [column for column in needed if column not in (reader.fieldnames or ())]:
        raise UserError(
            f"{path}: a CSV of something else, without the column {missing[0]!r}; move it away, or give --out"
        )
    if cut := [i for i, row in enumerate(rows, 1) if any(row[column] is None for column in needed)]:
        raise UserError(f"{path}: row {cut[0]} ends too early")
    return rows


def table(columns: list[str], rows: list[Settings]) -> str:
    """CSV with these columns of the rows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def curves(study: Study, folder: Path, out: Path) -> None:
    """The online probes of all runs that have some, in one CSV: held-out *training* images while training.

    Curves that are there of runs whose folders are not (made elsewhere, or cleaned away) are kept.
    """
    lines: dict[str, list[Settings]] = {}
    for row in read_rows(out):
        lines.setdefault(run_of(study, row), []).append(row)
    for settings in study.runs:
        metrics = folder / study.name / name_of(settings) / "metrics.jsonl"
        rows = monitor.read_metrics(metrics) if metrics.exists() else []
        if probes := [{**row, "views_seen": row["views"], **settings} for row in rows if "linear" in row]:
            lines[name_of(settings)] = probes
    if lines:
        files.write(out, table([*study.columns, *CURVE], [row for rows in lines.values() for row in rows]))
