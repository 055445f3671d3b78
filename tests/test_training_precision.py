"""`--precision auto` asks the processor."""

from __future__ import annotations

import pytest
import timm
import torch

from manyview.pipeline.errors import UserError
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
    chosen, why = precision.choose("auto", torch.device("cpu"), network, [(3, 64, 64)])
    assert chosen is dtype and "auto" in why and ("_bf16, which" in why) == (dtype is torch.bfloat16)
    assert precision.choose("fp32", torch.device("cpu"), network, [(3, 64, 64)]) == (torch.float32, "fp32 (asked for)")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("mobilenetv3_small_050", torch.float32), ("efficientnet_lite0", torch.float32), ("convnext_atto", torch.bfloat16),
     ("resnext50_32x4d", torch.bfloat16), ("vit_tiny_patch16_224", torch.bfloat16)],
)  # fmt: skip
def test_auto_is_fp32_for_depthwise_convolutions(name, dtype, monkeypatch):
    monkeypatch.setattr(precision, "cpu_features", lambda: {"avx512_bf16"})
    with torch.device("meta"):
        network = timm.create_model(name)
    assert precision.choose("auto", torch.device("cpu"), network, [(3, 224, 224)])[0] is dtype
    assert precision.choose("bf16", torch.device("cpu"), network, [(3, 224, 224)])[0] is torch.bfloat16


@pytest.mark.parametrize(
    ("name", "sizes", "layer"),
    [("resnet18", [32], None), ("resnet18", [16], "layer4.0.conv1"), ("resnet18", [32, 16], "layer4.0.conv1"),
     ("resnet18", [8], "layer3.0.conv1"), ("convnext_atto", [32], None), ("mobilenetv3_small_050", [16], "blocks.")],
)  # fmt: skip
def test_no_bf16_where_a_processor_gets_a_gradient_wrong(name, sizes, layer, monkeypatch):
    """A stride over a single pixel: seen as gradients that are not finite, or finite and wrong."""
    monkeypatch.setattr(precision, "cpu_features", lambda: {"avx512_bf16"})
    network, cpu = timm.create_model(name), torch.device("cpu")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    inputs = [(3, size, size) for size in sizes]
    if layer is None:
        assert precision.choose("bf16", cpu, network, inputs)[0] is torch.bfloat16
    else:
        dtype, why = precision.choose("auto", cpu, network, inputs)
        assert dtype is torch.float32 and layer in why
        with pytest.raises(UserError, match=f"--precision bf16: .*{layer}"):
            precision.choose("bf16", cpu, network, inputs)
        assert precision.choose("bf16", torch.device("cuda"), network, inputs)[0] is torch.bfloat16
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert network.training and not any(module._forward_pre_hooks for module in network.modules())
