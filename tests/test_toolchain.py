"""Which of the DSL's flavours makes an image."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from emitters import image
from emitters.toolchain import load_toolchain, loaded_toolchain

CHOICES = [  # installed, CUDA of the driver, chosen
    ("none", [], None, None),
    ("cu12", ["cu12"], None, "cu12"),
    ("newest_without_a_driver", ["cu12", "cu13"], None, "cu13"),
    ("newest_that_runs", ["cu12", "cu13"], 12, "cu12"),
    ("newest_of_all", ["cu12", "cu13"], 14, "cu13"),
    ("none_that_runs", ["cu13"], 12, "cu13"),
]


@pytest.mark.parametrize(
    ("installed", "driver", "chosen"), [c[1:] for c in CHOICES], ids=[c[0] for c in CHOICES]
)
def test_choice(monkeypatch, installed, driver, chosen):
    packages = {"nvidia-cutlass-dsl", *(f"nvidia-cutlass-dsl-libs-{name}" for name in installed)}
    monkeypatch.setattr(image, "_installed", packages.__contains__)
    monkeypatch.setattr(image, "_driver_cuda", lambda: driver)
    monkeypatch.setattr(image.metadata, "version", lambda package: "4.8.1")
    assert image.default_toolchain() == chosen
    identity = image.build_identity()
    assert identity == (image.build_identity(chosen) if chosen else None)
    for name in image.TOOLCHAINS:
        identity = image.build_identity(name)
        assert (identity is not None) == (name in installed)
        assert identity is None or f"nvidia-cutlass-dsl 4.8.1 {name} emitters" in identity


def test_a_process_has_one(monkeypatch):
    loaded = SimpleNamespace(__file__="/dsl/_cutlass_ir.cu12.cpython-311-x86_64-linux-gnu.so")
    monkeypatch.setitem(sys.modules, "cutlass._mlir._mlir_libs._cutlass_ir", loaded)
    assert loaded_toolchain() == "cu12"
    load_toolchain("cu12")
    with pytest.raises(ValueError, match="has loaded cu12, it can't load cu13 too"):
        load_toolchain("cu13")
