"""`cutlass-moe demo` with the weights of a directory; the rest of demo: test_cli.py."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from rich.console import Console

from cutlass_moe.cli import demo
from cutlass_moe.cli import main as cli
from cutlass_moe.cli.common import find_layers
from cutlass_moe.models.expert_weights import ExpertWeights
from tests.support.checkpoints import GPT_OSS, LAYERS, NEMOTRON, QWEN3, Form, write_checkpoint

pytest.importorskip("safetensors")


@pytest.fixture(autouse=True)
def no_gpu_and_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUTLASS_MOE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("emitters.spec.identity._installed", lambda package: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def call(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.main, ["demo", *map(str, words)])


CASES = [
    (QWEN3, "fp8_block", "fp8_block", ""),
    (QWEN3, "int8", "int8", ""),
    (QWEN3, "fp8_tensor", "fp8", ""),
    (QWEN3, "bf16", "fp8", "stored as bf16 and converted to fp8"),
    (NEMOTRON, "fp8", "fp8", ""),
    (GPT_OSS, "bf16", "fp8", "stored as bf16 and converted to fp8"),
]


@pytest.mark.parametrize(("form", "quant", "dtype", "words"), CASES, ids=lambda one: str(one))
def test_one_command(
    form: Form, quant: str, dtype: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory of config.json and safetensors files: its own dtype, its first layer."""
    written = write_checkpoint(tmp_path / "model", form, quant, hidden=160, inter=192)[LAYERS[0]]
    seen: list[ExpertWeights] = []
    read = demo.read_weights

    def remember(*arguments: object) -> ExpertWeights:
        seen.append(read(*arguments))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(demo, "read_weights", remember)
    result = call("--model", tmp_path / "model", "--tokens", "5")
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert f"Weights: layer {LAYERS[0]} of" in said and words in said
    assert ("converted" in said) == bool(words)
    assert result.output.count(" 10 ") >= 2, result.output  # rows: tokens x top_k
    (weights,) = seen
    assert weights.quant == dtype
    down = torch.stack([weights.dense(e)[1] for e in range(len(weights.w2))])
    assert (down - written.down).norm() <= 0.04 * written.down.norm()


def test_layer_and_dtype(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", QWEN3, "bf16", hidden=128)
    result = call("--model", tmp_path / "model", "--layer", LAYERS[1], "--dtype", "bf16")
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert f"Weights: layer {LAYERS[1]} of" in said and "converted" not in said
    result = call("--model", tmp_path / "model", "--layer", 2)
    assert result.exit_code == 1
    assert "layer must be one of those with experts, 1 to 3, got 2" in " ".join(
        result.output.split()
    )


def test_block_scales_of_other_weights(tmp_path: Path) -> None:
    """Random ones, converted ones, and an inner size whose blocks would have gates and ups."""
    for inter, quant in ((192, None), (192, "bf16"), (48, "fp8_block")):
        directory = tmp_path / f"{inter}-{quant}"
        write_checkpoint(directory, QWEN3, quant or "bf16", hidden=160, inter=inter)
        if quant is None:
            for path in directory.glob("model*"):
                path.unlink()
        result = call("--model", directory, "--dtype", "fp8_block")
        said = " ".join(result.output.split())
        assert result.exit_code == (inter == 48), said
        assert ("converted to fp8_block" in said) == (quant == "bf16")
        assert ("inter must be a multiple of 32 for fp8_block, got 48" in said) == (inter == 48)


def test_inner_size_is_padded(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", QWEN3, "int8", hidden=128, inter=36)
    result = call("--model", tmp_path / "model")
    assert result.exit_code == 0, result.output
    assert "No kernel" not in result.output


def test_a_config_alone_has_random_weights(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", QWEN3)
    for path in (tmp_path / "model").glob("model*"):
        path.unlink()
    result = call("--model", tmp_path / "model")
    assert result.exit_code == 0, result.output
    assert "Weights" not in result.output
    result = call("--model", tmp_path / "model", "--layer", "1")
    assert result.exit_code == 1
    assert "--layer needs a directory with weights" in result.output


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "model", QWEN3)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    result = call("--model", tmp_path / "model")
    assert result.exit_code == 1
    assert "pip install 'cutlass-moe[checkpoints]'" in result.output


def test_weights_that_are_wrong_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is of the weights that were read."""
    write_checkpoint(tmp_path / "model", QWEN3, "int8", hidden=128)
    (layer,) = find_layers([str(tmp_path / "model")])
    monkeypatch.setattr(demo, "ERROR_LIMIT", 1e-9)
    output = Console(file=io.StringIO(), width=200)
    assert not demo.run(layer.shape, "int8", output, model=str(tmp_path / "model"))
