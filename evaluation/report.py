"""The HTML report: one file that holds everything it shows and fetches nothing. `report.html` beside this is its template."""

from __future__ import annotations

import base64
from itertools import product
from pathlib import Path
from typing import Any

import jinja2

from manyview.evaluation import tables
from manyview.evaluation.compare import Correlation
from manyview.model import backbone
from manyview.training import plots

CAPTIONS = {
    "loss": "Loss and its two terms over the steps.",
    "accuracy": "Online probes on held-out training images.",
    "collapse": "Effective rank and spread of the embeddings: falling towards nothing would be collapse.",
    "throughput": "Images a second, and the share of time spent waiting for data.",
    "views": "What the network was trained on: each row is one image and its views.",
    "spectrum": "Eigenspectrum of the features at the end of training.",
}
MEANINGS = {"rankme": "effective dimensions of the features", "alpha-req": "slope of the eigenspectrum"}


def write(out: Path, content: dict, run: Path | None, pictures: list[dict]) -> Path:
    """report.html in `out`, from the content of eval.json, the pictures drawn and, for a run, its training curves."""
    names = sorted(content["datasets"], key=lambda name: (name != content["pretrained_on"], name))  # its own first
    weights = run / "backbone.safetensors" if run else None
    facts = {
        "weights": f"{content['source']} {content['sha256']}",
        "taken from the file": content["loaded"],
        "trained by": content["trained_by"],
        "parameters and buffers": content["checkpoint"],
        "evaluation view": content["transform"],
        "step": content["step"],
    }
    trained_on = f" trained on {content['pretrained_on']}" if content["pretrained_on"] else ""
    method = f" with {content['method']}" if content["method"] else ""
    return _render(
        out / "report.html",
        title=content["run"],
        headlines=list(filter(None, (tables.headline(content, name) for name in names))),
        warnings=list(filter(None, (tables.below_pixels(content, name) for name in names))),
        about=f"{content['backbone']}{trained_on}{method}, {content['image_size']} px",
        cards=_cards(content, names),
        datasets=[_dataset(name, content, pictures, out) for name in names],
        curves=_curves(run) if run else [],
        snippet=backbone.timm_snippet(backbone.metadata(weights), str(weights))
        if weights and weights.is_file()
        else "",
        facts=[(name, value) for name, value in facts.items() if value],
    )


def comparison(out: Path, correlations: list[Correlation], averages: list[dict], pictures: list[str]) -> Path:
    """report.html of `compare`."""
    shown = [_picture(out / name, name.partition(".")[0], wide=True) for name in pictures]
    return _render(out / "report.html", title="comparison", comparison=True, pictures=shown, averages=averages,
                   correlations=correlations)  # fmt: skip


def _render(path: Path, **content: Any) -> Path:
    template = Path(__file__).with_name("report.html").read_text()
    path.write_text(jinja2.Environment(autoescape=True).from_string(template).render(**content) + "\n")
    return path


def _cards(content: dict, names: list[str]) -> list[dict]:
    """Of every dataset the linear probe and kNN; of the first one what needs no labels too."""
    cards = []
    lines = tables.lines(content["results"])
    for name, (protocol, norm) in product(names, (("linear-sweep", "bn"), ("knn-cosine-exp k=20", "l2"))):
        for line in lines:
            if (line.dataset, line.protocol, line.norm, line.mode) == (name, protocol, norm, "retrained"):
                lift = "" if line.lift is None else f"; {100 * line.lift:+.1f} over untrained"
                text = f"{name}: {protocol} ({norm}) {tables.spread(line)}{lift}"
                cards.append({"number": f"{100 * line.top1:.1f} %", "text": text})
    for row in tables.others(content["results"], names[0]) if names else []:
        if row["weights"] == "trained" and row["protocol"] in MEANINGS:
            text = f"{names[0]}: {row['protocol']}, {MEANINGS[row['protocol']]}"
            cards.append({"number": tables.number(row["value"]), "text": text})
    return cards


def _dataset(name: str, content: dict, pictures: list[dict], out: Path) -> dict:
    facts = content["datasets"][name]
    about = tables.heading(name, content).partition(": ")[2].split("; ")
    about += [] if facts["shift"] == "unknown" else [f"shift: {facts['shift']}"]
    own = [p for p in pictures if p["dataset"] == name]
    return {
        "name": name,
        "about": about,
        "lines": [(line, tables.cells(line)) for line in tables.lines(content["results"]) if line.dataset == name],
        "two_classes": tables.two_classes(content["results"], name),
        "others": _others(name, content),
        "pictures": [_picture(out / "plots" / p["file"], p["text"], p["kind"] in ("map", "neighbours")) for p in own],
    }


def _others(name: str, content: dict) -> list[dict]:
    """The scores that are no accuracies, a row each, with the baselines' beside the trained network's."""
    by_protocol: dict[str, dict[str, dict]] = {}
    for row in tables.others(content["results"], name):
        by_protocol.setdefault(row["protocol"], {})[row["weights"]] = row
    return [
        {"protocol": protocol, "text": next(iter(sorted(by.items(), key=lambda item: item[0] != "trained")))[1]["text"],
         "values": [by[w]["value"] if w in by else None for w in ("trained", "untrained", "pixels")]}
        for protocol, by in by_protocol.items()
    ]  # fmt: skip


def _curves(run: Path) -> list[dict]:
    """Curves from metrics.jsonl and whatever else the trainer drew."""
    if (run / "metrics.jsonl").is_file() and not (run / "plots" / "loss.png").is_file():
        plots.draw(run)
    files = [p for p in sorted((run / "plots").glob("*.png")) if not p.name.startswith("eval-")]
    order = list(CAPTIONS)
    files.sort(key=lambda p: (order.index(p.stem) if p.stem in order else len(order), p.name))
    return [_picture(p, CAPTIONS.get(p.stem, p.stem), p.stem == "views") for p in files]


def _picture(file: Path, text: str, wide: bool = False) -> dict:
    return {"name": file.stem, "data": base64.b64encode(file.read_bytes()).decode(), "text": text, "wide": wide}
