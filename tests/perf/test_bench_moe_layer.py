"""The benchmark of one layer, on the CPU: what it computes and says. Nothing is timed."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

import cutlass_moe
from perf.bench_moe_layer import Bench, main, over_padded

SMALL = "--batch-size 2 --seq-len 19 --embed-dim 32 --hidden-dim 48 --num-experts 5 --top-k 2"

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU prints"),
    pytest.mark.filterwarnings("ignore:no kernel"),
]


@pytest.fixture(autouse=True)
def router(monkeypatch) -> None:
    reference = cutlass_moe.topk_router_reference
    monkeypatch.setattr(cutlass_moe, "topk_router", reference, raising=False)


def run(options: str = "") -> dict[str, list[str]]:
    """Words of each line by the first."""
    answer = CliRunner().invoke(main, f"{SMALL} {options}".split())
    assert answer.exit_code == 0, answer.output
    assert "no CUDA device: errors alone" in answer.output
    lines = (line.split() for line in answer.output.splitlines())
    return {words[0]: words[1:] for words in lines if words}


@pytest.mark.parametrize("options", ["", "--gated", "--num-shared 2", "--gated --num-shared 1"])
def test_every_way_computes_the_layer(options: str) -> None:
    printed = run(options)
    for system in ("padded_bmm", "torch", "cutlass_moe"):
        assert 0 < float(printed[system][0]) < 1e-2
        assert printed[system][1:] == ["-"] * 4
    assert "triton:" not in printed


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_quantised_layers(dtype: str) -> None:
    printed = run(f"--gated --dtype {dtype}")
    assert 0 < float(printed["padded_bmm"][0]) < 2e-2
    assert "".join(printed["torch:"]) == "measuredwithbf16only"


def test_a_failure_is_shown_and_a_wrong_result_has_its_error(monkeypatch) -> None:
    def by_module(bench: Bench, use_grouped_gemm: bool) -> torch.Tensor:
        if use_grouped_gemm:
            raise RuntimeError("out of memory")
        return 2 * bench.x

    monkeypatch.setattr(Bench, "by_module", by_module)
    printed = run()
    assert float(printed["padded_bmm"][0]) > 0.5
    assert " ".join(printed["cutlass_moe:"]) == "FAILED: RuntimeError: out of memory"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--top-k 6", "must be 1 to 5"),
        ("--num-experts 0", "num_experts must be a positive integer"),
        ("--batch-size 0", "batch size and length must be positive, got 0 and 19"),
        ("--dtype fp4", "fp4"),
    ],
)
def test_wrong_options_are_refused(options: str, message: str) -> None:
    answer = CliRunner().invoke(main, f"{SMALL} {options}".split())
    assert answer.exit_code == 2
    assert message in answer.output


def test_ratios_are_to_the_padded_product() -> None:
    assert over_padded({"padded_bmm": 4.0, "torch": 3.0}, "torch") == "0.75"
    assert over_padded({"torch": 3.0}, "torch") == "-"
