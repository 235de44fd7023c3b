"""fused_moe without a GPU: the reference's results, what it checks, its fake, its workspace."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cutlass_moe as cm
from cutlass_moe.layer.checks import layer_addresses
from cutlass_moe.models.problems import problems_of_shape
from cutlass_moe.models.shapes import MODELS
from cutlass_moe.operands import LayerOperands, LayerOptions
from emitters.spec.registry import why_illegal
from tests.support.layer_cases import ALL_QUANTS, SMALL, tokens, weights

TENSORS = ("hidden", "w13", "w2", "topk_weights", "topk_ids")


def arguments(count: int = 5, quant: str | None = None, **others: Any) -> dict[str, Any]:
    return {**tokens(SMALL, count, "cpu"), **weights(SMALL, quant, "cpu"), "quant": quant, **others}


@pytest.mark.parametrize("quant", ALL_QUANTS)
@pytest.mark.parametrize("count", [0, 1, 20])
def test_cpu_takes_the_reference(quant: str | None, count: int) -> None:
    given = arguments(count, quant)
    expected = cm.fused_moe_reference(**given).bfloat16()
    assert torch.equal(cm.fused_moe(**given), expected)
    out = torch.full_like(given["hidden"], float("nan"))
    assert cm.fused_moe(**given, out=out) is out
    assert torch.equal(out, expected)


def test_ids_outside_add_nothing_to_the_residual() -> None:
    given = arguments(residual=torch.randn(5, SMALL.shape.hidden).bfloat16())
    given["topk_ids"] = torch.tensor([-1, SMALL.shape.num_experts, 99]).expand(5, 3).contiguous()
    assert torch.equal(cm.fused_moe(**given), given["residual"])


def changed(name: str, value: Any) -> dict[str, Any]:
    given = arguments(quant="int8" if name.endswith("scale") else None)
    given[name] = value(given[name]) if callable(value) else value
    return given


BAD = (
    ("hidden", lambda x: x.float(), TypeError, "hidden must be torch.bfloat16 or torch.float16"),
    ("hidden", lambda x: x[:, ::2], ValueError, "w13 must"),
    ("hidden", lambda x: x[:, 8:].contiguous(), ValueError, "w13 must"),
    ("hidden", lambda x: x[0], ValueError, r"hidden must be \[T, H\]"),
    ("w13", lambda w: w.half(), TypeError, "w13 must be torch.bfloat16, got torch.float16"),
    ("w13", lambda w: w[:, 1:], ValueError, "w13 must"),
    ("w2", lambda w: w[1:], ValueError, "w13 must"),
    ("topk_ids", lambda t: t.float(), TypeError, "topk_ids must be torch.int32 or torch.int64"),
    ("topk_ids", lambda t: t[1:], ValueError, "topk_ids must have shape"),
    ("topk_weights", lambda t: t.double(), TypeError, "topk_weights must be torch.bfloat16"),
    (
        "quant",
        "int4",
        ValueError,
        "quant must be None or one of 'fp8', .*, got 'int4'",
    ),
    ("quant", "fp8", TypeError, "w13 must be torch.float8_e4m3fn, got torch.bfloat16"),
    ("w13_scale", None, ValueError, "w13_scale must be given with quant"),
    ("w2_scale", lambda s: s[:, 1:], ValueError, "w2_scale must have shape"),
    ("activation", "tanh", ValueError, "activation must be one of swiglu"),
    ("activation", "relu", ValueError, "w13 must"),
    ("capacity_factor", -0.5, ValueError, "capacity_factor must be 0 or more and finite, got -0.5"),
    ("accumulation", "slow", ValueError, "accumulation must be"),
    ("residual", torch.zeros(4, 256).bfloat16(), ValueError, "residual must have shape"),
    ("expert_map", torch.zeros(9), TypeError, "expert_map must be torch.int32"),
    ("out", torch.zeros(5, 256), TypeError, "out must be torch.bfloat16"),
    ("workspace", torch.zeros(3), ValueError, "workspace must be"),
)


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD)
def test_refused(name: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cm.fused_moe(**changed(name, value) if name != "out" else arguments(out=value))


@pytest.mark.parametrize("name", ["hidden", "w13", "w2", "out", "w13_scale", "w2_scale"])
def test_addresses_that_kernels_cannot_take_are_refused(name: str) -> None:
    given = arguments(quant="int8")
    layer = LayerOperands(**{field: given.get(field) for field in LayerOperands._fields})
    out = torch.empty_like(layer.hidden)
    layer_addresses(layer, out)
    tensors = {**layer._asdict(), "out": out}
    buffer = tensors[name].new_empty(tensors[name].numel() + 1)
    tensors[name] = buffer[1:].view(tensors[name].shape)
    with pytest.raises(ValueError, match=f"the address of {name} must be a multiple of"):
        layer_addresses(
            LayerOperands(**{f: tensors[f] for f in LayerOperands._fields}), tensors["out"]
        )


@pytest.mark.parametrize("quant", [None, "int8", "fp8"])
def test_opcheck(quant: str | None) -> None:
    given = arguments(quant=quant)
    given["out"] = torch.empty_like(given["hidden"])
    defaults = LayerOptions()._asdict()
    names = ("out", "workspace", *LayerOperands._fields, *LayerOptions._fields)
    values = [given.get(name, defaults.get(name)) for name in names]
    op = torch.ops.cutlass_moe.fused_moe_out.default
    torch.library.opcheck(
        op, tuple(values), test_utils=("test_faketensor", "test_aot_dispatch_dynamic")
    )


def test_compiles_to_one_graph() -> None:
    given = arguments(quant="int8")
    compiled = torch.compile(cm.fused_moe, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**given), cm.fused_moe(**given))


@pytest.mark.parametrize(
    ("quant", "inters", "scales", "stored"), [("fp8", 3, 1, 0), ("fp8_block", 1, 2, 64 << 20)]
)
def test_workspace_grows_with_tokens_and_needs_no_memory_to_plan(
    quant: str, inters: int, scales: int, stored: int
) -> None:
    """inters: bytes per row and column of I. scales: of a row of x, and of the activation. stored:
    bytes for the activation of few rows, before it is quantised."""
    sizes = []
    for count in (0, 1, 8, 16, 32, 64, 128, 65536):
        given = {
            name: value.to("meta") if isinstance(value, torch.Tensor) else value
            for name, value in arguments(quant=quant).items()
        }
        for name in ("hidden", "topk_weights", "topk_ids"):
            given[name] = given[name][:1].expand(count, -1).contiguous()
        sizes.append(cm.fused_moe_workspace_size(**given))
        of_all_ranks = torch.zeros(512, dtype=torch.int32, device="meta")
        assert cm.fused_moe_workspace_size(**given, expert_map=of_all_ranks) == sizes[-1]
    rows, shape = 65536 * SMALL.shape.top_k, SMALL.shape
    needed = rows * (inters * shape.inter + 2 * shape.hidden + 8 + 4 * scales)
    needed += 65536 * (shape.hidden + 4 * scales) + stored
    assert sizes == sorted(sizes)
    assert needed <= sizes[-1] <= 1.01 * needed


@pytest.mark.parametrize("quant", ALL_QUANTS)
def test_problems_are_those_of_a_call_whatever_its_tokens(quant: str | None) -> None:
    problems = cm.fused_moe_problems(**arguments(quant=quant))
    assert problems == cm.fused_moe_problems(**arguments(70, quant=quant))
    shape = problems_of_shape(SMALL.shape, quant or "bf16")
    small = quant == "fp8_block" and SMALL.shape.inter % 128  # whose blocks the shape has smaller
    assert small or problems == [problem for problem in shape if problem]
    with pytest.raises(TypeError, match="a keyword argument must be one of"):
        cm.fused_moe_problems(**arguments(out=None))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", ["fp8", "int8", "bf16"])
def test_models_have_kernels(model: str, dtype: str) -> None:
    for problem in filter(None, problems_of_shape(MODELS[model], dtype)):
        assert why_illegal(problem) is None
