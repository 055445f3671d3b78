"""Weights for strangers: a folder that timm and the Hugging Face hub read, with a card that says what is in it.

config.json        architecture, its arguments, mean, std, size and crop: timm.create_model("local-dir:FOLDER") needs no more
model.safetensors  the weights
README.md          the model card: how to use it, its scores by protocol, how it was trained
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from manyview.model import backbone
from manyview.pipeline import files
from manyview.pipeline.codec import RGB
from manyview.pipeline.errors import UserError

FILES = ["config.json", "model.safetensors", "README.md"]
TRAINED = ("dataset", "fraction", "objective", "beta", "views", "policy", "augment", "batch_size", "steps", "optimizer", "lr",
           "weight_decay", "projector_dim", "precision", "seed")  # fmt: skip


def write(model: nn.Module, file: Path, header: dict[str, str], out: Path) -> str:
    """Fill the folder `out` with a network that was read from `file` (a run's backbone.safetensors or a checkpoint) and its
    header; returns the lines of Python that load it.

    Where timm has no argument for the network (a ResNet with the small stem) there is no config.json, so that timm
    cannot load something else by mistake, and the lines say how the stem is changed.
    """
    out.mkdir(parents=True, exist_ok=True)
    backbone.save(model, out / "model.safetensors", header)
    (out / "config.json").unlink(missing_ok=True)
    if backbone.stem_lines(header):
        lines = backbone.timm_snippet(header, str(out / "model.safetensors"))
    else:
        (out / "config.json").write_text(json.dumps(config(header), indent=2) + "\n")
        lines = f"import timm\nmodel = timm.create_model({'local-dir:' + str(out)!r}, pretrained=True)"
    (out / "README.md").write_text(card(file, header, lines), encoding="utf-8")
    return lines


def config(header: dict[str, str]) -> dict[str, Any]:
    """timm's description of the network and of the images it wants."""
    name, arguments = backbone.timm_arguments(header)
    images = {**backbone.images(header), "fixed_input_size": "img_size" in arguments}
    described: dict[str, Any] = {"architecture": name, "num_classes": 0, "num_features": int(header["num_features"])}
    if arguments:
        described["model_args"] = arguments
    return {**described, "pretrained_cfg": {**images, "num_classes": 0}}


def card(file: Path, header: dict[str, str], lines: str) -> str:
    """The model card in Markdown. What is not known (no eval.json, no config.json) is said to be so."""
    run, size = file.parent.parent if file.suffix == ".pt" else file.parent, int(header["image_size"])
    evaluated = run / f"eval-{file.stem}" if file.suffix == ".pt" else run
    wanted = backbone.images(header)
    trained = files.facts(run / "config.json")
    named = trained.get("dataset") or header.get("source", "images")
    pixels = backbone.layout(header)
    kind = f" of {pixels}" if pixels != RGB else ""
    by_timm = " `timm.data.create_transform(**timm.data.resolve_model_data_config(model))` does it."
    parts = [
        "---\nlibrary_name: timm\npipeline_tag: image-feature-extraction\ntags:\n- self-supervised\n- manyview\n---",
        f"# {header['backbone']}, pretrained without labels on {named}",
        f"A backbone of {header['num_features']} features for {size} px images{kind}, trained by manyview.",
        f"## Use\n\n```python\n{lines}\nmodel.eval()\n```",
        f"Images: the centre square of {wanted['crop_pct']:g} of the short side, resized to {size} px "
        f"({wanted['interpolation']}, antialiased), "
        f"0..{pixels.white} made 0..1, then normalized by mean {wanted['mean']} and std {wanted['std']}."
        + (by_timm if backbone.made_by_timm(header) and not backbone.stem_lines(header) else ""),
        f"## Scores\n\n{scores(file, evaluated)}",
        f"## Training\n\n{training(run, trained)}",
    ]
    return "\n\n".join(parts) + "\n"


def scores(file: Path, evaluated: Path) -> str:
    """A table of the accuracies in the eval.json of a folder, if it is of these very weights."""
    results = files.facts(evaluated / "eval.json")
    if not results.get("table"):
        return "These weights were not evaluated."
    if results.get("sha256") != hashlib.sha256(file.read_bytes()).hexdigest():
        return "The evaluation beside these weights is of other ones, so it is not shown."
    rows = [
        "| dataset | protocol | features | top-1 % | 95 % interval | untrained network % |",
        "|---|---|---|--:|--:|--:|",
    ]
    for row in results["table"]:
        top1, low, high, untrained = (percent(row[name]) for name in ("top1", "low", "high", "untrained"))
        between = f"{low} to {high}" if low else ""
        rows.append(f"| {row['dataset']} | {row['protocol']} | {row['norm']} | {top1} | {between} | {untrained} |")
    said = dict.fromkeys(f"- {row['protocol']} ({row['norm']}): {row['text']}" for row in results["table"])
    return "\n".join([*rows, "", f"The view: {results['transform']}.", "", *said])


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def training(run: Path, config: dict[str, Any]) -> str:
    """The run's settings, time and command."""
    if not config:
        return "Not known: no config.json lay beside the weights."
    known = [name for name in TRAINED if config.get(name) not in (None, [], "")]
    lines = [f"- {name.replace('_', ' ')}: {config[name]}" for name in known]
    if last := last_metrics(run / "metrics.jsonl"):
        lines.append(
            f"- seen: {last['images']:,} images, {last['views']:,} views, in {last['seconds'] / 3600:.2f} h and "
            f"{last['core_seconds'] / 3600:.2f} core-hours"
        )
    if environment := files.facts(run / "env.json"):
        program, space, flags = environment["command"].partition(" ")
        version = environment["versions"]["torch"]
        lines.append(f"- on {environment['device']}, torch {version}, commit {environment['commit']}")
        lines.append(f"- command: `python {Path(program).name}{space}{flags}`")
    return "\n".join(lines)


def last_metrics(path: Path) -> dict[str, Any]:
    """The last line of metrics.jsonl that is a training step; {} if there is none."""
    rows = path.read_text().splitlines() if path.is_file() else []
    for row in reversed(rows):
        try:
            values = json.loads(row)
        except ValueError:  # what a kill cut off
            continue
        if "images" in values and "core_seconds" in values:
            return values
    return {}


def push(folder: Path, repository: str) -> str:
    """Upload a folder that `write` filled to the Hugging Face hub, as the account that is logged in; returns the address."""
    from huggingface_hub import HfApi  # comes with timm; slow

    api = HfApi()
    readme = (folder / "README.md").read_text().replace(f"local-dir:{folder}", f"hf-hub:{repository}")
    if (here := repr(str(folder / "model.safetensors"))) in readme:
        readme = readme.replace(here, f"hf_hub_download({repository!r}, 'model.safetensors')")
        readme = readme.replace("```python\n", "```python\nfrom huggingface_hub import hf_hub_download\n")
    (folder / "README.md").write_text(readme)
    try:
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=FILES)
    except Exception as error:  # its client raises many kinds; what helps is the same for all
        text = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder} is written, but not pushed to {repository}: {text}; `hf auth login`, and try again"
        ) from None
    return str(address)
