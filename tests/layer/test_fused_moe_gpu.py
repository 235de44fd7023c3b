"""fused_moe on a GPU. `python -m tests.build_images DIR` builds the images it needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe.layer.reference import fused_moe_reference
from cutlass_moe.operands import FP8_BLOCK
from tests.support.layer_cases import (
    ALL_QUANTS,
    CASES,
    LIMITS,
    SMALL,
    TOKENS,
    LayerCase,
    tokens,
    weights,
)
from tests.support.numerics import poisoned, same_bits, untouched

pytestmark = pytest.mark.gpu
quants = pytest.mark.parametrize("quant", ALL_QUANTS)


def arguments(case: LayerCase, count: int, quant: str | None, **others: Any) -> dict[str, Any]:
    return {
        **tokens(case, count, "cuda"),
        **weights(case, quant, "cuda"),
        "quant": quant,
        **others,
    }


def launch(given: dict[str, Any]) -> Tensor:
    """The output, written over poison, with a poisoned workspace."""
    names = ("hidden", "w13", "w2", "topk_weights", "topk_ids", "out", "workspace")
    rest = {name: value for name, value in given.items() if name not in names}
    tensors = [given[name] for name in names[:5]]
    size = cm.fused_moe_workspace_size(*tensors, **rest)
    workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")
    hidden = given["hidden"]
    out = poisoned(*hidden.shape, hidden.dtype, "cuda")
    result = cm.fused_moe(*tensors, **rest, out=out, workspace=workspace)
    assert result is out
    assert untouched(out, torch.zeros(len(hidden), dtype=torch.bool, device="cuda"))
    return out


def error(out: Tensor, given: dict[str, Any]) -> float:
    expected = fused_moe_reference(**given, compute_dtype=torch.float64)
    return float((out.double() - expected).norm() / expected.norm())


def limit(given: dict[str, Any]) -> float:
    few = 1.5 if given["topk_ids"].numel() < 100 else 1  # of rows: their errors scatter
    return few * LIMITS[given["quant"], given.get("accumulation")]


@pytest.mark.parametrize(
    ("quant", "accumulation"), LIMITS, ids=["bf16", "int8", "fp8-two_level", "fp8", "fp8_block"]
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_models(
    case: LayerCase, quant: str | None, accumulation: str | None, record_property: Any
) -> None:
    if case.interleaved and quant == FP8_BLOCK:
        pytest.skip("fused_moe refuses interleaved weights with scales of blocks")
    for count in TOKENS:
        given = arguments(case, count, quant, accumulation=accumulation)
        out = launch(given)
        if not count:
            continue
        found = error(out, given)
        record_property(f"{count} tokens", f"{found:.2e}")
        assert found <= limit(given), count
        assert same_bits(out, launch(given))
        assert same_bits(out, launch({**given, "pdl": False}))


@quants
def test_one_hot_expert(quant: str | None) -> None:
    given = arguments(SMALL, 300, quant)
    given["topk_ids"] = torch.full_like(given["topk_ids"], 5)
    assert error(launch(given), given) <= limit(given)


@quants
@pytest.mark.parametrize("count", [1, 7, 200])
def test_ids_outside_add_nothing(quant: str | None, count: int) -> None:
    given = arguments(SMALL, count, quant)
    given["topk_ids"][:, 1] = SMALL.shape.num_experts
    given["topk_ids"][::2, 2] = -1
    given["topk_weights"][:, 1] = float("nan")
    out = launch(given)
    given["topk_weights"][:, 1] = 0
    assert error(out, given) <= limit(given)
    given["topk_ids"].fill_(-1)
    assert not launch(given).any()


@quants
def test_expert_map_and_residual(quant: str | None) -> None:
    given = arguments(SMALL, 130, quant)
    experts = SMALL.shape.num_experts
    given["expert_map"] = torch.full((4 * experts,), -1, dtype=torch.int32, device="cuda")
    given["expert_map"][experts : 2 * experts] = torch.randperm(experts, device="cuda").int()
    given["topk_ids"] = torch.randint_like(given["topk_ids"], 4 * experts)
    given["residual"] = torch.randn_like(given["hidden"])
    assert error(launch(given), given) <= limit(given)


@quants
def test_capacity(quant: str | None) -> None:
    given = arguments(SMALL, 200, quant, capacity_factor=0.5)
    assert error(launch(given), given) <= limit(given)


@quants
@pytest.mark.parametrize("activation", ["geglu", "reglu", "gelu", "silu", "relu", "relu2"])
def test_activations(quant: str | None, activation: str) -> None:
    given = arguments(SMALL, 100, quant, activation=activation)
    if activation in ("gelu", "silu", "relu", "relu2"):
        given["w13"] = given["w13"][:, : SMALL.shape.inter].contiguous()
        if quant:
            given["w13_scale"] = given["w13_scale"].chunk(2, 1)[0].contiguous()
    assert error(launch(given), given) <= limit(given)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("count", [3, 500])
def test_n_major_weights_in_place(count: int, interleaved: bool) -> None:
    given = arguments(replace(SMALL, interleaved=interleaved), count, None)
    for name in ("w13", "w2"):
        given[name] = given[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert error(launch(given), given) <= limit(given)


@quants
@pytest.mark.parametrize("pdl", [True, False])
def test_graph_replay_with_new_ids(quant: str | None, pdl: bool) -> None:
    given = arguments(SMALL, 64, quant, pdl=pdl)
    second = {**given, **tokens(SMALL, 64, "cuda", seed=1)}
    given = {k: v.clone() if isinstance(v, Tensor) else v for k, v in given.items()}
    launch(given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):  # layers one after the other: the next reads what this one wrote
            out = cm.fused_moe(**given)
    for name in ("hidden", "topk_ids", "topk_weights"):
        given[name].copy_(second[name])
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    assert same_bits(out, launch(second))


@quants
@pytest.mark.parametrize("count", [33, 60])
def test_layers_in_a_row_are_the_same_with_and_without_overlap(
    quant: str | None, count: int
) -> None:
    """Each reads what the one before wrote, in one workspace: what overlaps wrongly shows. With 60
    tokens, 20 rows per expert, up projections may quantise."""
    given = arguments(SMALL, count, quant)
    size = cm.fused_moe_workspace_size(**given)
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
    results = []
    for pdl in (False, True, True):
        x = given["hidden"]
        for _ in range(50):
            x = cm.fused_moe(**{**given, "hidden": x, "pdl": pdl}, workspace=workspace)
            x = x / x.float().norm(dim=1, keepdim=True).bfloat16() * 16
        results.append(x)
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


def test_nothing_is_allocated_with_out_and_workspace() -> None:
    given = arguments(SMALL, 64, "fp8")
    size = cm.fused_moe_workspace_size(**given)
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
    out = torch.empty_like(given["hidden"])
    cm.fused_moe(**given, out=out, workspace=workspace)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    cm.fused_moe(**given, out=out, workspace=workspace)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_compiled() -> None:
    given = arguments(SMALL, 20, "int8")
    compiled = torch.compile(cm.fused_moe, fullgraph=True)
    assert same_bits(compiled(**given), cm.fused_moe(**given))
