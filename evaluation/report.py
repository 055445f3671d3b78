"""The HTML report: one file that holds everything it shows and fetches nothing."""

from __future__ import annotations

import base64
import html
from itertools import product
from pathlib import Path

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
STYLE = """
:root {
  --ink: #111827; --soft: #6b7280; --line: #e5e7eb; --blue: #2563eb; --grey: #9ca3af; --paper: #ffffff; --back: #f6f7f9;
}
* { box-sizing: border-box }
body {
  margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 36px 24px 64px }
h1 { font-size: 30px; margin: 0 0 4px; letter-spacing: -0.02em }
h2 { font-size: 20px; margin: 44px 0 12px; letter-spacing: -0.01em }
p { margin: 6px 0; max-width: 95ch }
.soft, figcaption, small { color: var(--soft) }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 14px; margin: 24px 0 }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 14px 16px }
.card b { display: block; font-size: 28px; letter-spacing: -0.02em; font-variant-numeric: tabular-nums }
.card span { color: var(--soft); font-size: 13px; display: block }
.box {
  background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 6px 16px; margin: 14px 0;
  overflow-x: auto;
}
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums }
th {
  text-align: left; color: var(--soft); font-weight: 500; padding: 9px 8px; border-bottom: 1px solid var(--line);
  white-space: nowrap;
}
td { padding: 7px 8px; border-bottom: 1px solid var(--line); vertical-align: top }
tr:last-child td { border-bottom: 0 }
td.n { white-space: nowrap }
td:first-child { width: 44% }
td small { display: block; max-width: 62ch; line-height: 1.35; font-size: 11.5px }
td small.long { max-width: 95ch }
.bar { position: relative; height: 10px; width: 150px; background: #eef0f3; border-radius: 5px; margin-top: 6px }
.bar i { position: absolute; left: 0; top: 0; bottom: 0; background: var(--blue); border-radius: 5px }
.bar u, .bar s { position: absolute; top: -3px; bottom: -3px; width: 2px; background: var(--ink) }
.bar s { background: #f59e0b }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 16px }
figure { margin: 0; background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 14px }
figure.wide { grid-column: 1 / -1 }
figure img { display: block; max-width: 100%; margin: 0 auto }
figcaption { font-size: 13px; margin-top: 8px }
pre {
  background: #111827; color: #e5e7eb; border-radius: 12px; padding: 16px; overflow-x: auto; font-size: 13px;
  line-height: 1.55;
}
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; font-size: 13.5px; margin: 8px 0 }
dt { color: var(--soft) }
dd { margin: 0; overflow-wrap: anywhere }
@media (max-width: 560px) { .grid { grid-template-columns: 1fr } }
"""


def write(out: Path, content: dict, run: Path | None, drawn: list[dict]) -> Path:
    """report.html in `out`, from the content of eval.json, the pictures drawn and, for a run, its training curves."""
    body = [_head(content), *(_dataset(name, content, drawn, out) for name in _own_first(content))]
    if run is not None:
        body += [_training(run), _weights(run)]
    body.append(_facts(content))
    return _page(out / "report.html", content["run"], body)


def _page(path: Path, title: str, body: list[str]) -> Path:
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    # An empty icon, or the browser would ask for one.
    icon = '<link rel="icon" href="data:,">'
    path.write_text(
        f'<!doctype html><html lang="en"><head>{head}{icon}<style>{STYLE}</style></head><body><main>'
        + "\n".join(filter(None, body))
        + "</main></body></html>\n"
    )
    return path


def _head(content: dict) -> str:
    trained_on = f" trained on {content['pretrained_on']}" if content["pretrained_on"] else ""
    method = f" with {content['method']}" if content["method"] else ""
    line = f"{content['backbone']}{trained_on}{method}, {content['image_size']} px"
    return f"<h1>{html.escape(content['run'])}</h1><p class=soft>{html.escape(line)}</p>{_cards(content)}"


def _own_first(content: dict) -> list[str]:
    """The datasets by name, the one the network was trained on before the others."""
    return sorted(content["datasets"], key=lambda name: (name != content["pretrained_on"], name))


def _cards(content: dict) -> str:
    """Of every dataset the linear probe and kNN; of the first one what needs no labels too."""
    found = tables.lines(content["results"])
    names = _own_first(content)
    made = []
    for name, (protocol, norm) in product(names, (("linear-sweep", "bn"), ("knn-cosine-exp k=20", "l2"))):
        for line in found:
            if (line.dataset, line.protocol, line.norm, line.mode) == (name, protocol, norm, "retrained"):
                lift = "" if line.lift is None else f"; {100 * line.lift:+.1f} over untrained"
                made.append((f"{100 * line.top1:.1f} %", f"{name}: {protocol} ({norm}) {tables.spread(line)}{lift}"))
    for row in tables.others(content["results"], names[0]) if names else []:
        if row["weights"] == "trained" and row["protocol"] in ("rankme", "alpha-req"):
            words = (
                "effective dimensions of the features" if row["protocol"] == "rankme" else "slope of the eigenspectrum"
            )
            made.append((f"{row['value']:.3g}", f"{names[0]}: {row['protocol']}, {words}"))
    return (
        "<div class=cards>"
        + "".join(f"<div class=card><b>{a}</b><span>{html.escape(b)}</span></div>" for a, b in made)
        + "</div>"
    )


def _dataset(name: str, content: dict, drawn: list[dict], out: Path) -> str:
    facts = content["datasets"][name]
    about = tables.heading(name, content).partition(": ")[2].split("; ")
    about += [] if facts["shift"] == "unknown" else [f"shift: {facts['shift']}"]
    notes = "<br>".join(map(html.escape, about))
    found = [line for line in tables.lines(content["results"]) if line.dataset == name]
    table = "".join(_row(line) for line in found)
    legend = (
        "<p><small>Bar: top-1; black mark: the same network untrained; orange mark: majority class. "
        "One clean view an image unless the protocol says otherwise; the test split is scored once.</small></p>"
    )
    head = "".join(
        f"<th>{h}</th>" for h in ("protocol", "features", "top-1 %", "", "untrained", "lift", "top-5", "per class")
    )
    pictures = [p for p in drawn if p["dataset"] == name]
    return (
        f"<h2>{html.escape(name)}</h2><p class=soft>{notes}</p>"
        + (f"<div class=box><table><tr>{head}</tr>{table}</table></div>{legend}" if found else "")
        + _others(name, content)
        + "<div class=grid>"
        + "".join(
            _figure(out / "plots" / p["file"], p["text"], wide=p["kind"] in ("map", "neighbours")) for p in pictures
        )
        + "</div>"
    )


def _row(line: tables.Line) -> str:
    marks = f"<i style='width:{100 * line.top1:.2f}%'></i>"
    marks += "" if line.majority is None else f"<s style='left:{100 * line.majority:.2f}%'></s>"
    marks += "" if line.untrained is None else f"<u style='left:{100 * line.untrained:.2f}%'></u>"
    name, norm, top1, between, *numbers = (html.escape(c) for c in tables.cells(line))
    return (
        f"<tr><td>{name}<small>{html.escape(line.text)}</small></td><td>{norm}</td>"
        f"<td class=n><b>{top1}</b><small>{between}</small></td><td><div class=bar>{marks}</div></td>"
        + "".join(f"<td class=n>{number}</td>" for number in numbers)
        + "</tr>"
    )


def _others(name: str, content: dict) -> str:
    found: dict[str, dict[str, dict]] = {}
    for row in tables.others(content["results"], name):
        found.setdefault(row["protocol"], {})[row["weights"]] = row
    if not found:
        return ""
    rows = ""
    for protocol, by in found.items():
        numbers = "".join(
            f"<td class=n>{by[w]['value']:.4g}</td>" if w in by else "<td></td>" for w in ("trained", "untrained")
        )
        text = html.escape((by.get("trained") or by["untrained"])["text"])
        rows += f"<tr><td>{protocol}<small class=long>{text}</small></td>{numbers}</tr>"
    head = "<tr><th>without labels</th><th>trained</th><th>untrained</th></tr>"
    return f"<div class=box><table>{head}{rows}</table></div>"


def _training(run: Path) -> str:
    """Curves from metrics.jsonl and whatever else the trainer drew."""
    if (run / "metrics.jsonl").is_file() and not (run / "plots" / "loss.png").is_file():
        plots.draw(run)
    files = [p for p in sorted((run / "plots").glob("*.png")) if not p.name.startswith("eval-")]
    if not files:
        return ""
    order = list(CAPTIONS)
    files.sort(key=lambda p: (order.index(p.stem) if p.stem in order else len(order), p.name))
    pictures = "".join(_figure(p, CAPTIONS.get(p.stem, p.stem), wide=p.stem == "views") for p in files)
    return f"<h2>Training</h2><div class=grid>{pictures}</div>"


def _weights(run: Path) -> str:
    file = run / "backbone.safetensors"
    if not file.is_file():
        return ""
    lines = backbone.timm_snippet(backbone.metadata(file), file.as_posix())
    return f"<h2>Load the weights</h2><p class=soft>In timm, with nothing of this project:</p><pre>{html.escape(lines)}</pre>"


def _facts(content: dict) -> str:
    facts = {
        "weights": f"{content['source']} {content['sha256']}",
        "trained by": content["trained_by"],
        "parameters and buffers": content["checkpoint"],
        "evaluation view": content["transform"],
        "step": content["step"],
    }
    rows = "".join(f"<dt>{k}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items() if v)
    return f"<h2>Exactly</h2><div class=box><dl>{rows}</dl></div>"


def _figure(file: Path, text: str, *, wide: bool = False) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    kind = " class=wide" if wide else ""
    return (
        f"<figure{kind}><img alt='{html.escape(file.stem)}' src='data:image/png;base64,{data}'>"
        f"<figcaption>{html.escape(text)}</figcaption></figure>"
    )


def comparison(out: Path, found: list[Correlation], averages: list[dict], pictures: list[str]) -> Path:
    """report.html of `compare`."""
    head = (
        "<h1>How well one evaluation predicts another</h1><p class=soft>Intervals: 95 %, from drawing whole runs.</p>"
    )
    rows = "".join(
        f"<tr><td>{html.escape(c.pretrained_on)}</td><td>{html.escape(c.group)}</td><td>{html.escape(c.predictor)}</td>"
        f"<td>{html.escape(c.dataset)}</td>"
        f"<td>{html.escape(c.target)}</td><td>{c.kind}</td><td class=n>{'none' if c.r is None else f'{c.r:+.3f}'}</td>"
        f"<td class=n>{'' if c.low is None else f'[{c.low:+.2f}, {c.high:+.2f}]'}</td>"
        f"<td class=n>{c.n} ({c.runs} runs)</td><td><small>{html.escape(c.note)}</small></td></tr>"
        for c in found
    )
    names = ("pre-trained on", "models", "protocol there", "dataset", "protocol", "coefficient", "r", "95 %", "n", "")
    table = "".join(f"<th>{n}</th>" for n in names)
    mean_names = ("pre-trained on", "models", "protocol", "coefficient", "mean r", "on each", "n")
    means = "".join(
        f"<tr><td>{html.escape(a['pretrained_on'])}</td><td>{html.escape(a['group'])}</td>"
        f"<td>{html.escape(a['predictor'])}</td><td>{a['kind']}</td><td class=n>{a['mean']:+.3f}</td>"
        f"<td>{html.escape(', '.join(f'{name} {r:+.3f}' for name, r in a['per_dataset'].items()))}</td>"
        f"<td class=n>n &ge; {a['n']}</td></tr>"
        for a in averages
    )
    means = f"<tr>{''.join(f'<th>{n}</th>' for n in mean_names)}</tr>{means}" if means else ""
    return _page(out / "report.html", "comparison", [
        head,
        "<div class=grid>" + "".join(_figure(out / p, p.partition(".")[0], wide=True) for p in pictures) + "</div>",
        f"<h2>Mean over the other datasets</h2><div class=box><table>{means}</table></div>" if means else "",
        f"<h2>All pairs</h2><div class=box><table><tr>{table}</tr>{rows}</table></div>",
    ])  # fmt: skip
