"""The results as a person reads them: one line a protocol, with the untrained network and the lift beside it."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from itertools import product
from typing import Any

from manyview.evaluation.compare import Correlation
from manyview.evaluation.metrics import Score, lift

ACCURACIES = ("top1", "top5", "mean_per_class", "average_precision")
FIRST = ("linear-sweep", "linear-paper", "knn", "ridge", "finetune", "averaged", "majority")


@dataclass(frozen=True)
class Line:
    """Accuracies in 0..1; with several draws their mean, `std` between them, and no interval."""

    dataset: str
    mode: str
    protocol: str
    norm: str
    text: str
    draws: int
    n: int
    top1: float
    low: float | None
    high: float | None
    std: float | None
    top5: float | None
    mean_per_class: float | None
    untrained: float | None
    lift: float | None
    lift_low: float | None
    lift_high: float | None
    pixels: float | None
    majority: float | None


def lines(rows: list[dict]) -> list[Line]:
    """From the rows of eval.json; datasets by name, protocols in the order of `FIRST`."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["metric"] in ACCURACIES:
            groups.setdefault((row["dataset"], row["mode"], row["protocol"], row["norm"]), []).append(row)
    always = [row for row in rows if row["protocol"] == "majority class" and row["metric"] == "top1"]
    chance = {row["dataset"]: row["value"] for row in always}
    every = [_line(key, own, chance.get(key[0])) for key, own in groups.items() if key[2] != "majority class"]
    return sorted((line for line in every if line), key=_order)


def _order(line: Line) -> tuple:
    place = next((i for i, name in enumerate(FIRST) if line.protocol.startswith(name)), len(FIRST))
    number = [int("".join(filter(str.isdigit, word)) or 0) for word in line.protocol.replace("=", " ").split()]
    return line.dataset, line.mode, place, line.protocol.split()[0], number, line.norm


def _values(rows: list[dict], weights: str, metric: str) -> list[dict]:
    return [row for row in rows if row["weights"] == weights and row["metric"] == metric]


def _mean(rows: list[dict]) -> float | None:
    """Of their values; None where there is none, or they are not known."""
    values = [row["value"] for row in rows]
    return statistics.fmean(values) if values and None not in values else None


def _line(key: tuple, rows: list[dict], majority: float | None) -> Line | None:
    trained, fresh, pixels = (_values(rows, weights, "top1") for weights in ("trained", "untrained", "pixels"))
    if not trained:
        return None
    values = [row["value"] for row in trained]
    one = trained[0] if len(trained) == 1 else None
    top1, untrained = statistics.fmean(values), _mean(fresh)
    spread = math.sqrt(sum((v - top1) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else None
    between: tuple = (None, None)
    if one and len(fresh) == 1:
        between = lift(_score(one), _score(fresh[0]))[1:]
    top5, mean_per_class = (_mean(_values(rows, "trained", metric)) for metric in ("top5", "mean_per_class"))
    dataset, mode, protocol, norm = key
    return Line(
        dataset, mode, protocol, norm, trained[0]["text"], len(trained), trained[0]["n"], top1,
        one["low"] if one else None, one["high"] if one else None, spread, top5=top5, mean_per_class=mean_per_class,
        untrained=untrained, lift=None if untrained is None else top1 - untrained, lift_low=between[0], lift_high=between[1],
        pixels=_mean(pixels), majority=majority,
    )  # fmt: skip


def _score(row: dict) -> Score:
    return Score(row["value"], None, 0.0, row["low"], row["high"], row["n"])


def number(value: float | None) -> str:
    return "undefined" if value is None or not math.isfinite(value) else f"{value:.4g}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def spread(line: Line) -> str:
    """What stands beside top-1: its interval, or the deviation between draws."""
    if line.std is not None:
        return f"± {percent(line.std)} ({line.draws} draws)"
    return f"[{percent(line.low)}, {percent(line.high)}]"


def lifted(line: Line) -> str:
    known = line.lift_low is not None and line.lift_high is not None
    between = f" [{100 * line.lift_low:+.2f}, {100 * line.lift_high:+.2f}]" if known else ""  # type: ignore[operator]
    return "" if line.lift is None else f"{100 * line.lift:+.2f}{between}"


def headline(content: dict, name: str) -> str:
    """Pixels, untrained and trained of a dataset's first accuracy; "" where it has none with all three."""
    for line in lines(content["results"]):
        if line.dataset == name and line.mode == "retrained" and None not in (line.pixels, line.untrained):
            numbers = (("pixels", line.pixels), ("untrained", line.untrained), ("trained", line.top1))
            said = ", ".join(f"{what} {100 * (value or 0):.1f} %" for what, value in numbers)
            return f"{name}, {line.protocol} ({line.norm}): {said}"
    return ""


def below_pixels(content: dict, name: str) -> str:
    """Where the trained encoder is worth less than no encoder at all; "" where it nowhere is."""
    held = [line for line in lines(content["results"]) if line.dataset == name and line.pixels is not None]
    below = [line for line in held if line.top1 < (line.pixels or 0)]
    if not below:
        return ""
    worst = max(below, key=lambda line: (line.pixels or 0) - line.top1)
    return (
        f"{name}: the trained encoder is below plain pixels in {len(below)} of {len(held)} protocols, most in {worst.protocol} "
        f"({worst.norm}), {percent(worst.top1)} against {percent(worst.pixels)} %"
    )


HEADER = ("protocol", "features", "top-1 %", "95 % interval or spread", "pixels", "untrained", "lift", "top-5",
          "per class")  # fmt: skip


def cells(line: Line) -> tuple[str, ...]:
    name = f"{line.protocol} · {line.mode}" if line.mode != "retrained" else line.protocol
    return (name, line.norm, percent(line.top1), spread(line), percent(line.pixels), percent(line.untrained), lifted(line),
            percent(line.top5), percent(line.mean_per_class))  # fmt: skip


def two_classes(rows: list[dict], dataset: str) -> list[tuple[str, ...]]:
    """Balanced accuracy and average precision of the rarer class, with intervals, of a dataset of two classes: the trained
    network, pixels and the untrained one; the first row is the header. [] where there are more."""
    own = [row for row in rows if row["dataset"] == dataset and row["protocol"] != "majority class"]
    if not any(row["metric"] == "average_precision" for row in own):
        return []
    columns = list(product(("mean_per_class", "average_precision"), ("trained", "pixels", "untrained")))
    body = []
    for line in (line for line in lines(rows) if line.dataset == dataset):
        same = [r for r in own if (r["mode"], r["protocol"], r["norm"]) == (line.mode, line.protocol, line.norm)]
        numbers = [_estimate(_values(same, network, metric)) for metric, network in columns]
        body.append((*cells(line)[:2], *numbers))
    short = {"mean_per_class": "balanced %", "average_precision": "AP %"}
    return [("protocol", "features", *(f"{short[metric]}, {network}" for metric, network in columns)), *body]


def _estimate(rows: list[dict]) -> str:
    """A value with its interval, or the mean of several draws with their deviation."""
    values = [row["value"] for row in rows]
    if len(values) > 1:
        return f"{percent(statistics.fmean(values))} ± {percent(statistics.stdev(values))}"
    return f"{percent(values[0])} [{percent(rows[0]['low'])}, {percent(rows[0]['high'])}]" if values else ""


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of text: columns of one width, the first two from the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  " + "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
        for row in rows
    ]


def table(rows: list[tuple[str, ...]]) -> str:
    """Markdown; the first row is the header."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [*rows[:1], tuple("---" for _ in rows[0]), *rows[1:]])


def console(content: dict) -> str:
    """All tables of an eval.json as text, each protocol's own words under its numbers."""
    text = [f"\n{content['run']}: {content['transform']}"]
    rows = content["results"]
    for dataset in content["datasets"]:
        own = [line for line in lines(rows) if line.dataset == dataset]
        text.append(f"\n{heading(dataset, content)}")
        for row, line in zip(aligned([HEADER, *map(cells, own)] if own else []), [None, *own]):
            text += [row, f"      {line.text}"] if line else [row]
        text += aligned(two_classes(rows, dataset))
        text += filter(None, [headline(content, dataset), below_pixels(content, dataset)])
        for r in others(rows, dataset):
            text.append(f"  {r['protocol']} ({r['weights']}) {number(r['value'])} {r['metric']}\n      {r['text']}")
    return "\n".join(text)


def heading(dataset: str, content: dict) -> str:
    """Name, sizes, what the baselines are, and whatever is unusual about the data."""
    facts = content["datasets"][dataset]
    chance = [r["value"] for r in content["results"] if r["dataset"] == dataset and r["protocol"] == "majority class"
              and r["metric"] == "top1"]  # fmt: skip
    parts = [f"{dataset}: {_sizes(facts)}"]
    parts += [f"majority class {percent(chance[0])} %"] if chance else []
    parts += [f"untrained: {facts['untrained']}", *([facts["pixels"]] if "pixels" in facts else [])]
    return "; ".join([*parts, *facts["notes"]])


def _sizes(facts: dict) -> str:
    return f"{facts['train']:,} training and {facts['test']:,} test images, {len(facts['classes'])} classes"


def others(rows: list[dict], dataset: str) -> list[dict]:
    """A dataset's results that are no accuracies: label-free scores and overlaps."""
    return [row for row in rows if row["dataset"] == dataset and row["metric"] not in ACCURACIES]


def markdown(contents: list[dict], command: str, facts: dict[str, Any]) -> str:
    """All targets' tables, beginning with the command that makes the file again."""
    text = [
        *_opening("Evaluation", command, facts),
        "Every number is of one clean view an image; the test split is scored once. Intervals: 95 %, Wilson for an "
        "accuracy, Newcombe for a lift over the same network untrained. Percent everywhere.",
    ]
    for content in contents:
        trained_on = f", trained on {content['pretrained_on']}" if content["pretrained_on"] else ""
        text.append(f"## {content['run']}: {content['backbone']}{trained_on}")
        weights = f"weights `{content['sha256'][:16]}`" if content["sha256"] else f"weights from {content['source']}"
        text.append(f"{content['transform']}; {weights}; parameters `{content['checkpoint'][:16]}`.")
        if content["trained_by"]:
            text.append(f"Trained by `{content['trained_by']}`.")
        for dataset in content["datasets"]:
            text += _markdown_table(dataset, content)
    return "\n\n".join(filter(None, text)) + "\n"


def _markdown_table(dataset: str, content: dict) -> list[str]:
    own = [line for line in lines(content["results"]) if line.dataset == dataset]
    both = [[HEADER, *map(cells, own)] if own else [], two_classes(content["results"], dataset)]
    texts = dict.fromkeys((f"{line.protocol} ({line.norm})", line.text) for line in own)
    described = "\n".join(f"- {name}: {text}" for name, text in texts)
    free = "\n".join(f"- {row['protocol']} ({row['weights']}): {number(row['value'])} {row['metric']}; {row['text']}"
                     for row in others(content["results"], dataset))  # fmt: skip
    return [
        f"### {heading(dataset, content)}",
        *(table(rows) for rows in both if rows),
        below_pixels(content, dataset),
        described,
        free,
    ]


SHOWN = ("linear-sweep (bn)", "linear-sweep (raw)", "knn-cosine-exp k=20 (l2)", "knn-euclid-invdist k=20 (zscore)",
         "ridge 5-shot (zscore)", "ridge 25-shot (zscore)")  # fmt: skip


def comparison(contents: list[dict], pairs: list[Correlation], command: str, facts: dict[str, Any]) -> str:
    """All encoders of some eval.json files, a row each in a table for every dataset, and what predicts what, as Markdown."""
    text = _opening("Evaluation of encoders, side by side", command, facts)
    text.append(
        "One clean view an image; the test split is scored once. Percent, top-1; ± half the 95 % interval, or of ridge the "
        "deviation between three draws of labels."
    )
    for dataset in dict.fromkeys(name for content in contents for name in content["datasets"]):
        text += _side_by_side(dataset, contents)
    if pairs:
        text += _predictions(pairs)
    text.append("## The encoders")
    text.append("\n".join(f"- **{_encoder_name(c)}**: {_described(c)}" for c in contents))
    return "\n\n".join(text) + "\n"


def _encoder_name(content: dict) -> str:
    """The run's name, the step where it is one of its checkpoints, and the size, layers or transform that were asked for."""
    unknown = {"run": content["run"], "checkpoint": ""}
    trained = next((row for row in content["results"] if row["weights"] == "trained"), unknown)
    step = f"step {content['step']}" if content["step"] and ".pt" in content["source"] else ""
    return ", ".join(filter(None, [trained["run"], step, trained["checkpoint"].partition(" ")[2]]))


def _described(content: dict) -> str:
    parts = {
        "": content["backbone"], "trained on ": content["pretrained_on"], "input: ": content["transform"],
        "weights: ": content["source"], "SHA-256 ": content["sha256"][:16], "of the file: ": content["loaded"],
        "trained by: ": content["trained_by"], "evaluated by: ": content.get("evaluated_by", ""),
    }  # fmt: skip
    return "; ".join(f"{name}{value}" for name, value in parts.items() if value)


def _side_by_side(dataset: str, contents: list[dict]) -> list[str]:
    """A dataset's heading and table, the best first; baselines that several encoders share stand there once."""
    measured = [content for content in contents if dataset in content["datasets"]]
    facts = measured[0]["datasets"][dataset]
    shown: dict[str, dict[str, str]] = {}
    order: dict[str, float] = {}
    for content in measured:
        rows = [row for row in content["results"] if row["dataset"] == dataset and row["mode"] == "retrained"]
        kinds = {"trained": _encoder_name(content), "untrained": f"*{content['backbone']} untrained, {content['image_size']} px*",
                 "pixels": f"*{facts['pixels'] if len(measured) == 1 else content['datasets'][dataset]['pixels']}*"}  # fmt: skip
        for weights, name in kinds.items():
            if weights != "trained" and name in shown:
                continue
            own = [{**row, "weights": "trained"} for row in rows if row["weights"] == weights]
            for line in lines(own):
                column = f"{line.protocol} ({line.norm})"
                half = line.std if line.std is not None else ((line.high or 0) - (line.low or 0)) / 2
                shown.setdefault(name, {})[column] = f"{percent(line.top1)} ± {percent(half)}"
                order[name] = max(order.get(name, 0.0), line.top1 if column == SHOWN[0] else 0.0)
            for row in own:
                if row["protocol"] == "rankme":
                    shown.setdefault(name, {})["RankMe"] = number(row["value"])
    columns = [c for c in (*SHOWN, "RankMe") if any(c in cells for cells in shown.values())]
    ranked = sorted(shown, key=lambda name: -order.get(name, 0.0))
    body = [(name, *(shown[name].get(c, "") for c in columns)) for name in ranked]
    notes = "; ".join(dict.fromkeys(note for content in measured for note in content["datasets"][dataset]["notes"]))
    return [f"## {dataset}: {_sizes(facts)}", *([notes] if notes else []), table([("encoder", *columns), *body])]


def _predictions(pairs: list[Correlation]) -> list[str]:
    """Spearman's rho of each shown protocol on the dataset that predicts with the same one on every other."""
    same = [
        c
        for c in pairs
        if c.kind == "spearman" and c.group == "all" and c.target == c.predictor and c.predictor in SHOWN
    ]
    if not same:
        return []
    names = sorted({c.dataset for c in same if c.dataset != c.measured_on})
    cell = {(c.measured_on, c.predictor, c.dataset): _coefficient(c) for c in same}
    body = [(own, predictor, *(cell.get((own, predictor, name), "") for name in names))
            for own, predictor in dict.fromkeys((c.measured_on, c.predictor) for c in same)]  # fmt: skip
    n = f"{min(c.n for c in same)} to {max(c.n for c in same)} encoders of {max(c.runs for c in same)} runs"
    said = f"Spearman's rho of a protocol on one dataset with itself on another, over {n}; 95 % intervals by drawing"
    said += " whole runs. All pairs and coefficients are in correlations.csv."
    return ["## What predicts what", said, table([("measured on", "protocol", *names), *body])]


def _opening(title: str, command: str, facts: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return [
        f"# {title}",
        f"Made by `{command}`",
        f"Commit {facts['commit']}; Python {facts['python']}, {versions}; {facts['device']}, {facts['threads']} threads.",
    ]


def _coefficient(c: Correlation) -> str:
    """`+0.95 [+0.81, +0.99]`."""
    return ("none" if c.r is None else f"{c.r:+.2f}") + ("" if c.low is None else f" [{c.low:+.2f}, {c.high:+.2f}]")


def correlations(pairs: list[Correlation]) -> str:
    """Correlations as text, one line a pair and coefficient."""
    text = []
    for c in pairs:
        note = f"  {c.note}" if c.note else ""
        text.append(f"{c.measured_on}, {c.group}: {c.predictor} -> {c.dataset} {c.target}: {c.kind} {_coefficient(c)}, "
                    f"n = {c.n}, {c.runs} runs{note}")  # fmt: skip
    return "\n".join(text) or "nothing to correlate: no column was measured on the pre-training data"
