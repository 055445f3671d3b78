"""`--precision auto` asks the processor."""

from __future__ import annotations

import pytest
import timm
import torch

from manyview.training import precision


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ({"avx2", "avx512f", "avx512_bf16", "amx_bf16"}, torch.bfloat16),
        ({"avx2", "avx512f", "avx512_bf16"}, torch.bfloat16),  # AMD since Zen 4
        ({"avx2", "avx512f", "avx512_vnni"}, torch.float32),
        (set(), torch.float32),
    ],
)
def test_auto_is_bf16_where_the_processor_multiplies_it(flags, dtype, monkeypatch):
    monkeypatch.setattr(precision, "cpu_features", lambda: flags)
    network = timm.create_model("resnet18")
    found, why = precision.choose("auto", torch.device("cpu"), network)
    assert found is dtype and "auto" in why and ("_bf16, which" in why) == (dtype is torch.bfloat16)
    assert precision.choose("fp32", torch.device("cpu"), network) == (torch.float32, "fp32 (asked for)")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("mobilenetv3_small_050", torch.float32), ("efficientnet_lite0", torch.float32), ("convnext_atto", torch.bfloat16),
     ("resnext50_32x4d", torch.bfloat16), ("vit_tiny_patch16_224", torch.bfloat16)],
)  # fmt: skip
def test_auto_is_fp32_for_depthwise_convolutions(name, dtype, monkeypatch):
    monkeypatch.setattr(precision, "cpu_features", lambda: {"avx512_bf16"})
    with torch.device("meta"):
        network = timm.create_model(name)
    assert precision.choose("auto", torch.device("cpu"), network)[0] is dtype
    assert precision.choose("bf16", torch.device("cpu"), network)[0] is torch.bfloat16
