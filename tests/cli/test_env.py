"""`cutlass-moe env` and `inspect`: what they show of this machine and of an image."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner, Result

import cutlass_moe
from cutlass_moe.cli import env
from cutlass_moe.cli import inspect as inspecting
from cutlass_moe.cli import main as cli
from cutlass_moe.images.cache import Cache
from cutlass_moe.images.compiler import compile_image
from cutlass_moe.images.toolchains import default_build
from cutlass_moe.models.problems import gemm_problems
from cutlass_moe.models.shapes import MoeShape
from emitters.spec.config_sm90 import GemmSm90Config
from emitters.spec.config_swap_sm90 import GemmSwapSm90Config
from emitters.spec.image import IMAGE_ABI, image_key
from tests.support.fake_images import ARCH, image_for

PROBLEM = gemm_problems(MoeShape("tiny", 8, 2, 256, 128), "fp8")["up"]
CONFIGS = (GemmSm90Config(), GemmSwapSm90Config())
KEYS = [image_key(PROBLEM, config, ARCH) for config in CONFIGS]


def call(*words: str) -> Result:
    return CliRunner().invoke(cli.main, words)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("JIT", "STRICT", "TUNING", "TRUST_ROOT"):
        monkeypatch.delenv(f"CUTLASS_MOE_{name}", raising=False)
    monkeypatch.setenv("CUTLASS_MOE_CACHE_DIR", str(tmp_path / "root"))
    return tmp_path / "root"


@pytest.fixture
def filled(root: Path) -> Path:
    for config in CONFIGS:
        Cache([root]).store(ARCH, *image_for(PROBLEM, config))
    return root


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cuda: int) -> None:
    properties = SimpleNamespace(
        name="Some GPU",
        major=capability[0],
        minor=capability[1],
        multi_processor_count=132,
        total_memory=2**37,
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(env, "driver_cuda", lambda: cuda)


def missing() -> dict[str, str]:
    report = json.loads(call("env", "--json").output)
    return {entry["what"]: entry["mend"] for entry in report["missing"]}


def test_report_is_json_and_a_table(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTLASS_MOE_STRICT", "1")
    report = json.loads(call("env", "--json").output)
    assert report["cutlass_moe"] == cutlass_moe.__version__
    assert report["image_abi"] == IMAGE_ABI
    assert report["packages"]["torch"] == torch.__version__
    assert report["variables"]["CUTLASS_MOE_STRICT"] == "1"
    assert report["roots"] == [
        {"path": str(filled), "exists": True, "writable": True, "images": 2, "fault": None}
    ]
    shown = call("env")
    assert shown.exit_code == 0
    for words in (cutlass_moe.__version__, "2 images", "CUTLASS_MOE_STRICT"):
        assert words in shown.output


def test_nothing_is_missing_on_a_machine_that_has_all(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, (9, 0), 12080)
    monkeypatch.setattr(env, "installed_toolchains", lambda: ("cu12",))
    monkeypatch.setattr(env, "default_toolchain", lambda: "cu12")
    assert missing() == {}
    assert "Nothing is missing" in call("env").output


def cases() -> Iterator[tuple[str, tuple[int, int], int, tuple[str, ...], str, str, str]]:
    yield "other_gpu", (8, 0), 12080, ("cu12",), "1", "no kernels for Some GPU (sm_80)", "GPU"
    yield "old_driver", (9, 0), 12080, ("cu13",), "1", "loads no images of toolchain cu13", "[jit]"
    yield "no_compiler", (9, 0), 12080, (), "1", "the roots hold no images", "[jit]"
    yield "no_images", (9, 0), 12080, ("cu12",), "0", "the roots hold no images", "build --model"


@pytest.mark.parametrize(
    ("capability", "cuda", "toolchains", "jit", "what", "mend"),
    [case[1:] for case in cases()],
    ids=[case[0] for case in cases()],
)
def test_what_is_missing_and_what_mends_it(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    cuda: int,
    toolchains: tuple[str, ...],
    jit: str,
    what: str,
    mend: str,
) -> None:
    on_a_gpu(monkeypatch, capability, cuda)
    monkeypatch.setattr(env, "installed_toolchains", lambda: toolchains)
    monkeypatch.setattr(env, "default_toolchain", lambda: next(iter(toolchains), None))
    monkeypatch.setenv("CUTLASS_MOE_JIT", jit)
    ((said, remedy),) = missing().items()
    assert what in said
    assert mend in remedy


def test_root_that_others_can_write_is_told(filled: Path) -> None:
    filled.chmod(0o777)
    assert any("can't be used" in what for what in missing())


def test_without_a_gpu_the_report_says_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(env, "driver_cuda", lambda: None)
    assert any("only the PyTorch reference runs" in what for what in missing())


def test_inspect_shows_an_image(filled: Path) -> None:
    shown = call("inspect", KEYS[0][:10].upper())
    assert shown.exit_code == 0, shown.output
    for words in (KEYS[0], str(filled), PROBLEM.words, CONFIGS[0].words, "registers"):
        assert words in shown.output
    assert call("inspect", KEYS[0], "--root", str(filled)).output == shown.output


def test_inspect_needs_one_image(filled: Path) -> None:
    many, none = call("inspect", ""), call("inspect", "xyz")
    assert many.exit_code == none.exit_code == 1
    assert "must name one image, but 2 match" in many.output
    assert f"no image's key begins with 'xyz' in {filled}" in none.output
    assert "expected --ptx or --sass, got both" in call("inspect", "x", "--ptx", "--sass").output


def test_inspect_disassembles_with_the_toolkits_program(
    filled: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "bin" / "nvdisasm"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$1"; cat "$2"\n')
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(inspecting, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "/bin:/usr/bin")
    cubin = image_for(PROBLEM, CONFIGS[1])[1].cubin
    shown = call("inspect", KEYS[1], "--sass")
    assert shown.exit_code == 0, shown.output
    assert shown.output.splitlines()[0] == "--print-code"
    assert cubin.decode(errors="replace")[:4] in shown.output
    program.unlink()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    assert "--sass needs nvdisasm" in call("inspect", KEYS[1], "--sass").output


@pytest.mark.skipif(default_build() is None, reason="needs nvidia-cutlass-dsl")
def test_inspect_prints_ptx_with_the_lines_of_its_source(root: Path) -> None:
    Cache([root]).store(ARCH, KEYS[1], compile_image(PROBLEM, CONFIGS[1]))
    shown = call("inspect", KEYS[1], "--ptx")
    assert shown.exit_code == 0, shown.output
    assert ".target sm_90a" in shown.output
    assert "gemm_swap_sm90.py" in shown.output
