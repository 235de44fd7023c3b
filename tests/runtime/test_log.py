"""CUTLASS_MOE_LOG=1: what was chosen for a call is printed once per signature."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cutlass_moe.images.cache import Cache
from cutlass_moe.models.problems import gemm_problems
from cutlass_moe.models.shapes import MODELS
from cutlass_moe.operands import Options
from cutlass_moe.ops.dispatch import choose_launch, forced_config
from cutlass_moe.runtime import fallback, library
from emitters.spec.config_sm90 import GemmSm90Config
from emitters.spec.gemm import GemmProblem
from emitters.spec.image import image_key
from tests.support.fake_driver import FakeDriver, parameters_of
from tests.support.fake_images import ARCH, image_for

PROBLEM = gemm_problems(MODELS["mixtral"], "fp8")["up"]
CONFIG = GemmSm90Config(128, 256)
KEY = image_key(PROBLEM, CONFIG, ARCH)
GPU = "NVIDIA H200"


@pytest.fixture(autouse=True)
def machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A GPU with a fake driver, an empty cache, and a logger that is heard."""
    caplog.set_level(logging.INFO, logger="cutlass_moe")
    monkeypatch.setenv("CUTLASS_MOE_CACHE_DIR", str(tmp_path / "root"))
    monkeypatch.setattr(library, "_kernels", {})
    monkeypatch.setattr(library, "device_arch", lambda device: ARCH)
    monkeypatch.setattr(library, "device_name", lambda device: GPU)
    monkeypatch.setattr(library, "default_build", lambda: "today")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    sms = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: sms)
    kernel = FakeDriver().patch(monkeypatch).kernel(parameters_of(PROBLEM, CONFIG))
    monkeypatch.setattr(library, "Kernel", lambda image, device: kernel)


def choose(problem: GemmProblem = PROBLEM) -> None:
    stride = (problem.n * problem.k, problem.k, 1)
    choose_launch(problem, 0, 4096, 8192, stride, Options())


def test_choice_and_image_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Cache([tmp_path / "root"]).store(ARCH, *image_for(PROBLEM, CONFIG, "today"))
    with forced_config(CONFIG):
        choose()
    chosen, loaded = (record.getMessage() for record in caplog.records)
    assert f"{PROBLEM.words}, {CONFIG.words}: image {KEY[:12]} ready on device 0 in 0." in loaded
    assert f"{PROBLEM.words}: 4096 tokens, 8192 rows, 1024 per expert -> {CONFIG.words}" in chosen
    assert "from forced_config, " in chosen
    assert chosen.endswith(" CTAs")


def test_where_a_config_comes_from_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "load", lambda *_: None)
    choose()
    choose(dataclasses.replace(PROBLEM, num_experts=9))  # that no table knows
    tuned, estimated = (record.getMessage() for record in caplog.records)
    assert "from tuning table, " in tuned
    assert "from estimate, " in estimated


def test_compiling_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, image = image_for(PROBLEM, CONFIG, "today")
    monkeypatch.setattr(library, "compile_image", lambda *_: image)
    library.find_image(PROBLEM, CONFIG, ARCH)
    assert caplog.messages[0].startswith(f"image {KEY[:12]} compiled in 0.")


def test_fallback_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    reason = "K must be a multiple of 16 bytes, got 17"
    with pytest.warns(UserWarning, match=reason):
        fallback.announce_fallback(reason)
    fallback.announce_fallback(reason)
    assert caplog.messages == [f"no kernel, slow torch path: {reason}"]


def test_variable_prints_to_stderr() -> None:
    program = """
import importlib, os
from cutlass_moe.runtime import log
for value in ("0", "", "1"):
    os.environ["CUTLASS_MOE_LOG"] = value
    importlib.reload(log).logger.info("chosen with %r", value)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "CUTLASS_MOE_LOG": ""},
        check=True,
    )
    assert (ended.stdout, ended.stderr) == ("", "cutlass_moe: chosen with '1'\n")
