"""The doctor, on this machine and on worse ones."""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path

import pytest

from manyview.tools import doctor


def test_this_machine(capsys):
    assert doctor.main() == 0
    out = capsys.readouterr().out
    assert "fit each other" in out and "engines cpu, resident" in out and "formats webdataset and ffcv" in out
    assert not [line for line in out.splitlines() if line.startswith("no ")]


@pytest.mark.parametrize("requirement", ["numba>=9000", "not-a-package>=1", "not-a-package"])
def test_a_package_without_which_nothing_works(requirement, monkeypatch, capsys):
    requires = importlib.metadata.requires("manyview")
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: [*requires, requirement])
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert f"lacks {requirement}: nothing trains" in out and f"-> pip install {requirement!r}" in out


def test_optional_packages_are_named_with_what_is_lost(monkeypatch, capsys):
    away = {name.partition(".")[0] for name, *_ in doctor.OPTIONAL}
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module in away else find(module))
    assert doctor.main() == 0
    out = capsys.readouterr().out
    assert "without it no engine dali" in out and "-> pip install nvidia-dali-cuda130" in out
    assert "engines cpu, resident;" in out
    assert all(f"without it no {lost}" in out for _, lost, _ in doctor.OPTIONAL)


def test_a_torchvision_of_another_torch_is_said(monkeypatch):
    load = importlib.import_module

    def broken(name):
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        return load(name)

    monkeypatch.setattr(importlib, "import_module", broken)
    row = doctor.fits()
    assert not row.good and row.needed and "nms does not exist" in row.text and "torch torchvision" in row.fix


def test_little_shared_memory_is_said(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 64 << 20}))
    shared = doctor.shared_memory()
    assert not shared.good and "0.1 GiB free" in shared.text and "--shm-size" in shared.fix


def test_the_processor_is_read_as_the_kernel_says_it(monkeypatch):
    text = "processor : 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512f amx_tile amx_bf16\n"
    monkeypatch.setattr(Path, "is_file", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda _: text)
    row = doctor.processor()
    assert row.good and row.text.startswith("Some CPU, ") and row.text.endswith("amx_bf16, AVX-512")
    monkeypatch.setattr(Path, "read_text", lambda _: text.replace(" avx512f amx_tile amx_bf16", ""))
    assert "no bf16, no AVX-512; bf16 is no faster" in doctor.processor().text and not doctor.processor().good
