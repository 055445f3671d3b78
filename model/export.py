"""Give trained weights to somebody else: timm, the hub, torchvision or ONNX, loaded there and compared before it is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from manyview.model import backbone, card, weights
from manyview.pipeline import files
from manyview.pipeline.codec import RGB
from manyview.pipeline.errors import UserError

TOLERANCE = 1e-5  # largest difference of a feature, relative to the largest feature


def export(
    source: str | Path, to: str, out: str | Path | None = None, given: str | None = None
) -> tuple[Path, str, float | None]:
    """Export the backbone in a run directory, in a safetensors file or checkpoint of train.py's, or a public network
    (timm:NAME, torchvision:NAME), with the weights `given` in a file of someone else's or else its published ones.

    to: "timm", "hub", "torchvision" or "onnx". out: the file (of "hub": the folder) to write, by default in `export/` beside
    the weights; of a checkpoint in `export/step-…/` of its run. Returns it, the lines of Python that use it, and how far its
    features are from ours on random images, relative to the largest feature (None: onnxruntime is not installed, so nobody
    looked). UserError where the other library has no such network, or where the features differ by more than TOLERANCE.
    """
    if to not in EXPORTS:
        raise UserError(f"unknown target {to!r}; valid: {', '.join(EXPORTS)}")
    if to == "hub" and str(source).startswith(("timm:", "torchvision:")):
        raise UserError("--to hub is for what was trained here: its card tells of that training")
    model, header, file = _loaded(str(source), given)
    home = file.parent.parent / "export" / file.stem if "network" in header else file.parent / "export"
    out = Path(out) if out else home / EXPORTS[to][0]
    out.parent.mkdir(parents=True, exist_ok=True)
    snippet = EXPORTS[to][1](model, file, header, out)
    made_by: dict[str, Any] = {}
    if to != "onnx":
        exec(snippet, made_by)  # the model that the printed lines make
    size = int(header["image_size"])
    images = torch.randn(4, backbone.layout(header).channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model(images)
        theirs = _onnx_features(out, images.numpy()) if to == "onnx" else made_by["model"].eval()(images)
    if theirs is None:
        return out, snippet, None
    difference = ((ours - theirs).abs().max() / ours.abs().max()).item()
    if not difference <= TOLERANCE:
        raise UserError(f"{out}: features in {to} differ by {difference:.1e} of the largest one")
    return out, snippet, difference


def _loaded(source: str, given: str | None) -> tuple[nn.Module, dict[str, str], Path]:
    """The network, its header, and the file that it comes from."""
    if not source.startswith(("timm:", "torchvision:")):
        if given is not None:
            raise UserError("--weights goes with a source timm:NAME or torchvision:NAME")
        model, header = backbone.load(source)
        return model, header, backbone.locate(weights.split_key(source)[0])
    public = weights.public(source, local=given is not None)
    name, t = source.removeprefix("timm:").partition(".")[0], public.transform
    model = backbone.create(name, image_size=t.size, stem="standard")
    print(f"# {backbone.fill(model, name, given or source)}\n# {t.text}")
    header = {"backbone": name, "stem": "standard", "image_size": str(t.size), "source": public.name, "mean": json.dumps(t.mean),
              "std": json.dumps(t.std), "crop_pct": str(t.crop), "interpolation": t.interpolation}  # fmt: skip
    return model.eval(), header, Path(given or Path("runs") / public.name.replace(":", "-") / "published")


def _to_timm(model: nn.Module, file: Path, header: dict[str, str], out: Path) -> str:
    backbone.save(model, out, header)
    return backbone.timm_snippet(header, str(out))


def _to_torchvision(model: nn.Module, file: Path, header: dict[str, str], out: Path) -> str:
    name = header["backbone"].removeprefix("torchvision:")
    if f"torchvision:{name}" not in backbone.names():
        raise UserError(f"torchvision has no {name!r}; `--to timm` and `--to onnx` take any backbone")
    if (pixels := backbone.layout(header)) != RGB:
        raise UserError(f"torchvision's networks take {RGB}, this one {pixels}; `--to timm` and `--to onnx` take any")
    backbone.save(model, out, header)
    lines = ["import torch, torchvision", "from safetensors.torch import load_file"]
    lines += [f"model = torchvision.models.{name}()", "model.fc = torch.nn.Identity()"]
    lines += backbone.stem_lines(header)
    lines += [f"model.load_state_dict(load_file({str(out)!r}), strict=True)"]
    wanted = backbone.images(header)
    size, kind = wanted["input_size"][-1], wanted["interpolation"].upper()
    resize = f"v2.Resize({int(size / wanted['crop_pct'])}, v2.InterpolationMode.{kind})"
    lines += [
        "from torchvision.transforms import v2",
        f"transform = v2.Compose([{resize}, v2.CenterCrop({size}), v2.ToImage(), "
        f"v2.ToDtype(torch.float32, scale=True), v2.Normalize({wanted['mean']}, {wanted['std']})])  # of PIL images",
    ]
    return "\n".join(lines)


def _to_onnx(model: nn.Module, file: Path, header: dict[str, str], out: Path) -> str:
    wanted, white = backbone.images(header), backbone.layout(header).white
    shape = ", ".join(map(str, wanted["input_size"]))
    try:
        program = torch.onnx.export(
            model,
            (torch.zeros(2, *wanted["input_size"]),),
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    except ImportError as error:
        raise UserError(f"ONNX export needs: pip install onnx onnxscript ({error})") from error
    assert program is not None
    proto = program.model_proto
    for key, value in {**header, "pretrained_cfg": json.dumps(wanted)}.items():
        proto.metadata_props.add(key=key, value=value)
    files.write(out, proto.SerializeToString())
    return (
        f"import onnxruntime\nsession = onnxruntime.InferenceSession({str(out)!r})\n"
        f"# images: float32 (N, {shape}): the centre square of {wanted['crop_pct']:g} of the short side, resized\n"
        f"# ({wanted['interpolation']}, antialiased), 0..{white} made 0..1, less mean {wanted['mean']}, "
        f"divided by std {wanted['std']}\n"
        'features = session.run(None, {"images": images})[0]'
    )


def _onnx_features(file: Path, images: np.ndarray) -> torch.Tensor | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    return torch.from_numpy(onnxruntime.InferenceSession(file).run(None, {"images": images})[0])


EXPORTS = {
    "timm": ("timm.safetensors", _to_timm),
    "hub": ("hub", card.write),
    "torchvision": ("torchvision.safetensors", _to_torchvision),
    "onnx": ("backbone.onnx", _to_onnx),
}
