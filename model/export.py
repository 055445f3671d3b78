"""Give trained weights to somebody else: timm, the hub, torchvision or ONNX, loaded there and compared before it is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from manyview.model import backbone, card
from manyview.pipeline.errors import UserError

TOLERANCE = 1e-5  # largest difference of a feature, relative to the largest feature


def export(source: str | Path, to: str, out: str | Path | None = None) -> tuple[Path, str, float | None]:
    """Export the backbone in a run directory or safetensors file `source`.

    to: "timm", "hub", "torchvision" or "onnx". out: the file (of "hub": the folder) to write, by default in `export/` beside
    the weights. Returns it, the lines of Python that use it, and how far its features are from ours on random images, relative
    to the largest feature (None: onnxruntime is not installed, so nobody looked). UserError where the other
    library has no such network, or where the features differ by more than TOLERANCE.
    """
    if to not in EXPORTS:
        raise UserError(f"unknown target {to!r}; valid: {', '.join(EXPORTS)}")
    file = backbone.locate(source)
    model, header = backbone.load(file)
    out = Path(out) if out else file.parent / "export" / EXPORTS[to][0]
    out.parent.mkdir(parents=True, exist_ok=True)
    snippet, other = EXPORTS[to][1](model, file, header, out)
    size = int(header["image_size"])
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = model(images), other(images)
    if theirs is None:
        return out, snippet, None
    difference = ((ours - theirs).abs().max() / ours.abs().max()).item()
    if not difference <= TOLERANCE:
        raise UserError(f"{out}: features in {to} differ by {difference:.1e} of the largest one")
    return out, snippet, difference


def _run(snippet: str) -> nn.Module:
    """The model that the printed lines make."""
    names: dict[str, Any] = {}
    exec(snippet, names)
    return names["model"].eval()


def _to_timm(model: nn.Module, file: Path, header: dict[str, str], out: Path):
    save_file(load_file(file), out, metadata=header)
    snippet = backbone.timm_snippet(header, str(out))
    return snippet, _run(snippet)


def _to_hub(model: nn.Module, file: Path, header: dict[str, str], out: Path):
    snippet = card.write(file, header, out)
    return snippet, _run(snippet)


def _to_torchvision(model: nn.Module, file: Path, header: dict[str, str], out: Path):
    name = header["backbone"].removeprefix("torchvision:")
    if f"torchvision:{name}" not in backbone.names():
        raise UserError(f"torchvision has no {name!r}; `--to timm` and `--to onnx` take any backbone")
    save_file(load_file(file), out, metadata=header)
    lines = ["import torch, torchvision", "from safetensors.torch import load_file"]
    lines += [f"model = torchvision.models.{name}()", "model.fc = torch.nn.Identity()"]
    lines += backbone.stem_lines(header)
    lines += [f"model.load_state_dict(load_file({str(out)!r}), strict=True)"]
    snippet = "\n".join(lines)
    return snippet, _run(snippet)


def _to_onnx(model: nn.Module, file: Path, header: dict[str, str], out: Path):
    size = int(header["image_size"])
    try:
        torch.onnx.export(
            model,
            (torch.zeros(2, 3, size, size),),
            out,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    except ImportError as error:
        raise UserError(f"ONNX export needs: pip install onnx onnxscript ({error})") from error
    snippet = (
        f"import onnxruntime\nsession = onnxruntime.InferenceSession({str(out)!r})\n"
        f'features = session.run(None, {{"images": images}})[0]  # float32 (N, 3, {size}, {size}), normalized'
    )
    return snippet, lambda images: _onnx_features(out, images.numpy())


def _onnx_features(file: Path, images: np.ndarray) -> torch.Tensor | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    return torch.from_numpy(onnxruntime.InferenceSession(file).run(None, {"images": images})[0])


EXPORTS = {
    "timm": ("timm.safetensors", _to_timm),
    "hub": ("hub", _to_hub),
    "torchvision": ("torchvision.safetensors", _to_torchvision),
    "onnx": ("backbone.onnx", _to_onnx),
}
