"""All runs side by side, as a table and as one page: `python tools/runs.py runs/* --out runs.html`

The page is one file that fetches nothing: open it from the disk, send it to somebody.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # the checkout on the path instead of this folder, whose profile.py would hide the library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import base64
import io
import json
import math
from dataclasses import dataclass, field
from typing import Any

import tyro
from jinja2 import Environment, FileSystemLoader

from manyview.pipeline import errors, files
from manyview.pipeline.errors import UserError

FILES = ("config.json", "metrics.jsonl")
CURVES = ("knn", "linear", "loss", "rank", "views_per_s")
POINTS = 300  # of a curve, at most
TESTS = {"kNN": ("knn-cosine-exp k=20", "l2"), "linear": ("linear-sweep", "bn")}  # eval.json's rows that have a column
UNTOLD = {"out", "resume", "overwrite", "dry_run", "preset", "log", "log_every", "save_every", "keep_every", "eval_every",
          "prefetch", "threads", "data"}  # settings that say nothing about what was learned  # fmt: skip
SHEET = 640  # pixels: width of a contact sheet on the page
COLLAPSED = 2.0  # effective rank of the embeddings below which nothing is left of them
WAITING = 0.1  # share of the time spent waiting for data from which on it is said


@dataclass
class Run:
    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    steps: list[dict[str, Any]]  # rows of metrics.jsonl of training
    probes: list[dict[str, Any]]  # and of the online probes
    scores: list[dict[str, Any]] = field(default_factory=list)  # eval.json's table
    name: str = ""

    @property
    def last(self) -> dict[str, Any]:
        return self.steps[-1] if self.steps else {}

    def total(self, key: str, unit: float = 1.0) -> float | None:
        return self.last[key] / unit if self.last.get(key) is not None else None

    @property
    def speed(self) -> float | None:
        """Views a second, the median over the run: the first rows hold compilation and warm-up."""
        rates = sorted(row["views_per_s"] for row in self.steps if row.get("views_per_s"))
        return rates[len(rates) // 2] if rates else None

    def score(self, column: str) -> dict[str, Any] | None:
        """The test score of a column of the table, on the data that the run was trained on, or else the first there is."""
        rows = [row for row in self.scores if (row["protocol"], row["norm"]) == TESTS[column]]
        own = [row for row in rows if row["dataset"] == self.config.get("dataset")]
        return next(iter([*own, *rows]), None)

    @property
    def verdict(self) -> list[tuple[str, str]]:
        """(good, fair or bad; what is to be said) of this run, worst first."""
        wanted, step = self.config.get("steps") or 0, self.last.get("step", 0)
        said = [("good", "finished")] if step and step >= wanted else [("fair", f"at step {step:,} of {wanted:,}")]
        rank = self.last.get("rank")
        if self.last and (rank is None or rank < COLLAPSED):
            text = "diverged: embeddings are not finite" if rank is None else f"collapsed: rank {rank:.1f}"
            said.append(("bad", text))
        if skipped := self.last.get("skipped"):
            said.append(("fair", f"{skipped:,} steps skipped as not finite"))
        if self.last.get("bad"):
            said.append(("fair", f"{self.last['bad']:,} unreadable images"))
        waits = [row["data_wait"] for row in self.steps if row.get("data_wait") is not None]
        if waits and (share := sum(waits) / len(waits)) >= WAITING:
            said.append(("fair", f"waited for data {share:.0%} of the time"))
        return sorted(said, key=lambda one: ("bad", "fair", "good").index(one[0]))


def read(folder: Path) -> Run:
    """A run directory of train.py, finished or not. UserError where it is damaged."""
    rows = metrics(folder / "metrics.jsonl")
    scores = files.facts(folder / "eval.json").get("table", [])
    steps, probes = ([row for row in rows if key in row] for key in ("loss", "knn"))
    return Run(folder, files.facts(folder / "config.json"), files.facts(folder / "env.json"), steps, probes, scores)


def metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, what is not finite as None; a line that a kill cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})
    return rows


def find(paths: list[Path]) -> list[Run]:
    """The runs at these paths or one or two folders below them, by name; names are as long as they must be to differ."""
    folders = []
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is no folder")
        below = [path] if (path / "config.json").is_file() else sorted({*path.glob("*/"), *path.glob("*/*/")})
        folders += [folder for folder in below if all((folder / name).is_file() for name in FILES)]
    if not folders:
        raise UserError(f"no runs in {', '.join(map(str, paths))}: a run has a {' and a '.join(FILES)}")
    runs = [read(folder) for folder in dict.fromkeys(folder.resolve() for folder in folders)]
    short = [run.folder.name for run in runs]
    for run, name in zip(runs, short):
        run.name = f"{run.folder.parent.name}/{name}" if short.count(name) > 1 else name
    return runs


def differences(runs: list[Run]) -> list[str]:
    """Settings in which these runs differ, in the order of the configuration."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key not in UNTOLD)
    return [key for key in keys if len({json.dumps(run.config.get(key), sort_keys=True) for run in runs}) > 1]


def setting(value: Any) -> str:
    """As it is shown."""
    if value is None or value == []:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def table(runs: list[Run]) -> str:
    """For the terminal."""
    keys = differences(runs)
    head = ["run", *(key.replace("_", "-") for key in keys), "M views", "core-h", "views/s", *TESTS, "verdict"]
    rows = [head]
    for run in runs:
        totals = {".3g": run.total("views", 1e6), ".2g": run.total("core_seconds", 3600), ",.0f": run.speed}
        numbers = [format(n, form) if n is not None else "-" for form, n in totals.items()]
        scores = [f"{100 * row['top1']:.1f}" if (row := run.score(column)) else "-" for column in TESTS]
        said = "; ".join(text for _, text in run.verdict)
        rows.append([run.name, *(setting(run.config.get(key)) for key in keys), *numbers, *scores, said])
    forms = [f"{'<' if i in (0, len(head) - 1) else '>'}{max(map(len, column))}" for i, column in enumerate(zip(*rows))]
    return "\n".join("  ".join(map(format, row, forms)).rstrip() for row in rows)


def curves(run: Run) -> dict[str, Any]:
    """Points of each curve: [views, hours, core-hours, value], thinned."""
    points: dict[str, list] = {}
    for key in CURVES:
        rows = [row for row in (run.probes if key in ("knn", "linear") else run.steps) if row.get(key) is not None]
        every = math.ceil(len(rows) / POINTS) or 1
        rows = [*rows[:-1:every], *rows[-1:]]  # the last always
        points[key] = [[row["views"], row["seconds"] / 3600, row["core_seconds"] / 3600, row[key]] for row in rows]
    return points


def sheet(run: Run) -> str:
    """The run's contact sheet as a data address; "" if there is none."""
    path = run.folder / "plots" / "views.png"
    if not path.is_file():
        return ""
    from PIL import Image

    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((SHEET, 2 * SHEET))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def page(runs: list[Run]) -> str:
    """The page as HTML."""
    loader = FileSystemLoader(Path(__file__).parent)
    templates = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    templates.filters["setting"] = setting
    data = [{"config": run.config, "curves": curves(run)} for run in runs]
    page, sheets = templates.get_template("runs.html"), [sheet(run) for run in runs]
    return page.render(runs=runs, keys=differences(runs), tests=list(TESTS), data=data, sheets=sheets)


@dataclass
class Config:
    runs: tyro.conf.Positional[list[Path]]
    """Run directories, or folders that hold some."""
    out: Path | None = None
    """Also write the page there, as one HTML file."""


def main() -> int:
    config = tyro.cli(Config, description=__doc__)
    runs = find(config.runs or [Path("runs")])
    print(table(runs))
    if config.out:
        files.write(config.out, page(runs))
        print(f"\n{config.out}: {len(runs)} runs")
    return 0


if __name__ == "__main__":
    errors.run(main)
