"""`--precision auto` asks the processor."""

from __future__ import annotations

import pytest
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
    found, why = precision.choose("auto", torch.device("cpu"))
    assert found is dtype and "auto" in why and ("_bf16, which" in why) == (dtype is torch.bfloat16)
    assert precision.choose("fp32", torch.device("cpu")) == (torch.float32, "fp32 (asked for)")
