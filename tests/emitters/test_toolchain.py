"""Which of the DSL's flavours makes an image."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from cutlass_moe.images import toolchains
from emitters.compile.toolchain import load_toolchain, loaded_toolchain
from emitters.spec import identity

CHOICES = [  # installed, CUDA of the driver, chosen
    ("none", [], None, None),
    ("cu12", ["cu12"], None, "cu12"),
    ("newest_without_a_driver", ["cu12", "cu13"], None, "cu13"),
    ("newest_that_runs", ["cu12", "cu13"], 12090, "cu12"),
    ("newest_of_all", ["cu12", "cu13"], 14000, "cu13"),
    ("none_that_runs", ["cu13"], 12090, "cu13"),
]


def test_machine_without_a_driver(monkeypatch):
    def none(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(toolchains.ctypes, "CDLL", none)
    assert toolchains.driver_cuda.__wrapped__() is None


@pytest.mark.parametrize(
    ("installed", "driver", "chosen"), [c[1:] for c in CHOICES], ids=[c[0] for c in CHOICES]
)
def test_choice(monkeypatch, installed, driver, chosen):
    packages = {"nvidia-cutlass-dsl", *(f"nvidia-cutlass-dsl-libs-{name}" for name in installed)}
    monkeypatch.setattr(identity, "_installed", packages.__contains__)
    monkeypatch.setattr(toolchains, "driver_cuda", lambda: driver)
    monkeypatch.setattr(identity.metadata, "version", lambda package: "4.8.1")
    assert toolchains.default_toolchain() == chosen
    assert toolchains.default_build() == (identity.build_identity(chosen) if chosen else None)
    for name in identity.TOOLCHAINS:
        build = identity.build_identity(name)
        assert (build is not None) == (name in installed)
        assert build is None or f"nvidia-cutlass-dsl 4.8.1 {name} emitters" in build


def test_a_process_has_one(monkeypatch):
    loaded = SimpleNamespace(__file__="/dsl/_cutlass_ir.cu12.cpython-311-x86_64-linux-gnu.so")
    monkeypatch.setitem(sys.modules, "cutlass._mlir._mlir_libs._cutlass_ir", loaded)
    assert loaded_toolchain() == "cu12"
    load_toolchain("cu12")
    with pytest.raises(ValueError, match="has loaded cu12, it can't load cu13 too"):
        load_toolchain("cu13")
