"""show-config, build, verify and warmup mean the same kernels by every family's file."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import cutlass_moe
from cutlass_moe.cli import images
from cutlass_moe.cli import main as cli
from cutlass_moe.images.compiler import Request
from cutlass_moe.models.files import read_model
from cutlass_moe.runtime import library
from emitters.spec.image import image_key
from tests.models.test_families import CASES, CONFIGS, Case
from tests.support.fake_images import ARCH

every_case = pytest.mark.parametrize("one", CASES, ids=lambda one: one.file)


def call(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.main, [str(word) for word in words])


def told(result: Result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("warning: ")]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Keys of the images that a build or a warmup asks for. Nothing is compiled or loaded."""
    keys: list[str] = []

    def build_nothing(_cache: Any, requests: list[Request], *_: Any) -> Iterator[Any]:
        keys.extend(image_key(one.problem, one.config, one.arch) for one in requests)
        raise KeyboardInterrupt
        yield

    def find_nothing(problem: Any, config: Any, arch: str) -> None:
        keys.append(image_key(problem, config, arch))

    monkeypatch.setenv("CUTLASS_MOE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cli, "build_images", build_nothing)
    monkeypatch.setattr(images, "driver_cuda", lambda: None)
    monkeypatch.setattr(torch.cuda._utils, "_get_device_index", lambda *_, **__: 0)
    monkeypatch.setattr(library, "device_arch", lambda _: ARCH)
    monkeypatch.setattr(library, "is_loaded", lambda *_: False)
    monkeypatch.setattr(library, "find_image", find_nothing)
    monkeypatch.setattr(library, "load", lambda *_: None)
    return keys


def taken(keys: list[str]) -> set[str]:
    found = set(keys)
    keys.clear()
    return found


def check_agreement(file: Path, asked: list[str], tmp_path: Path, *dtype: str) -> None:
    option = ["--dtype", *dtype] if dtype else []
    build = call("build", "--model", file, *option)
    assert build.exit_code == 130, build.output  # interrupted, as build_nothing does
    built = taken(asked)
    (tmp_path / "empty").mkdir(exist_ok=True)
    verify = call("verify", tmp_path / "empty", "--model", file, *option, "--json")
    assert {need["key"] for need in json.loads(verify.stdout)["missing"]} == built
    shown = call("show-config", file, *option)
    assert shown.exit_code == 0, shown.output
    prefixes = set(re.findall(r"\b[0-9a-f]{12}\b", shown.stdout))
    assert prefixes and prefixes <= {key[:12] for key in built}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        cutlass_moe.warmup(str(file), dtype=dtype[0] if dtype else None)
    assert taken(asked) == built
    notes = read_model(file).notes
    assert told(build) == told(verify) == told(shown) == [f"warning: {file}: {n}" for n in notes]
    assert [str(w.message) for w in warned] == [f"{file.stem}: {note}" for note in notes]


@every_case
def test_all_mean_the_same_kernels(one: Case, asked: list[str], tmp_path: Path) -> None:
    check_agreement(CONFIGS / f"{one.file}.json", asked, tmp_path)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_with_a_dtype(dtype: str, asked: list[str], tmp_path: Path) -> None:
    check_agreement(CONFIGS / "gemma-4-26b-a4b.json", asked, tmp_path, dtype)


def test_default_dtype_is_the_file_s(asked: list[str], tmp_path: Path) -> None:
    plain = json.loads((CONFIGS / "olmoe.json").read_text())
    file = tmp_path / "olmoe.json"
    file.write_text(json.dumps({**plain, "quantization_config": {"quant_method": "w8a8_int8"}}))
    check_agreement(file, asked, tmp_path)
    call("build", "--model", file)
    of_file = taken(asked)
    call("build", "--model", file, "--dtype", "int8")
    assert taken(asked) == of_file
    call("build", "--model", file, "--dtype", "fp8")
    assert taken(asked) != of_file


def test_layers_are_shown() -> None:
    shown = call("show-config", CONFIGS / "nemotron-3-super.json", "--tokens", "1").stdout
    words = "nemotron-3-super: experts in 40 layers from 1 to 87 of 88, beside them one MLP"
    assert words in " ".join(shown.split())


def test_layer_without_an_activation(asked: list[str], tmp_path: Path) -> None:
    plain = json.loads((CONFIGS / "olmoe.json").read_text())
    file = tmp_path / "olmoe.json"
    file.write_text(json.dumps({**plain, "hidden_act": "relu2"}))
    check_agreement(file, asked, tmp_path)
    result = call("demo", "--model", file, "--tokens", "1")
    assert result.exit_code != 0
    assert "its experts' activation is reglu2" in result.stderr
