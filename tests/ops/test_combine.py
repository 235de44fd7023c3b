"""combine on the CPU: its definition, its contract as an op, its errors."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe.runtime import fallback
from emitters.spec.dtypes import DType
from emitters.spec.layer_steps import CombineProblem
from emitters.spec.registry import problem_from_json, why_illegal
from tests.support.layouts import misaligned, padded, strided

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def inputs(
    tokens: int, top_k: int, rows: int, n: int, dtype: torch.dtype, seed: int = 0
) -> dict[str, Any]:
    """Whole numbers, whose sums are exact; NaN where nothing may be read."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator).float()

    inverse = torch.randint(-1, rows + 1, (tokens, top_k), generator=generator).int()
    kept = (inverse >= 0) & (inverse < rows)
    values = numbers(rows, n)
    values[~torch.isin(torch.arange(rows), inverse)] = float("nan")
    return {
        "rows": values.to(dtype),
        "topk_weights": numbers(tokens, top_k).masked_fill(~kept, float("nan")),
        "inverse": inverse,
        "residual": numbers(tokens, n).to(dtype) if seed % 2 else None,
    }


def definition(
    rows: Tensor, topk_weights: Tensor, inverse: Tensor, residual: Tensor | None
) -> list[list[float]]:
    """Number by number."""
    out = []
    for token, pairs in enumerate(inverse.tolist()):
        total = [0.0] * rows.shape[1] if residual is None else residual[token].tolist()
        for weight, row in zip(topk_weights[token].tolist(), pairs, strict=True):
            if 0 <= row < len(rows):
                total = [t + weight * v for t, v in zip(total, rows[row].tolist(), strict=True)]
        out.append(total)
    return out


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 6),
    top_k=st.integers(1, 9),
    rows=st.integers(0, 12),
    n=st.integers(0, 9),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 1000),
)
def test_definition(
    tokens: int, top_k: int, rows: int, n: int, dtype: torch.dtype, seed: int
) -> None:
    arguments = inputs(tokens, top_k, rows, n, dtype, seed)
    got = cm.combine(**arguments)
    assert got.dtype == dtype and got.shape == (tokens, n)
    assert got.tolist() == definition(**arguments)
    out = torch.full_like(got, float("nan"))
    assert cm.combine(**arguments, out=out) is out
    assert torch.equal(out, got)


def test_sums_run_in_order_from_the_residual() -> None:
    large = 2.0**24  # in float32, 1 vanishes beside it
    rows = torch.tensor([[large] * 8, [1.0] * 8])
    inverse = torch.tensor([[0, 1, 1], [1, 1, 0]], dtype=torch.int32)
    weights = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    assert cm.combine(rows, weights, inverse)[:, 0].tolist() == [large, large + 2]
    residual = torch.full((2, 8), -large)
    assert cm.combine(rows, weights, inverse, residual=residual)[:, 0].tolist() == [2.0, 2.0]


def test_out_may_be_the_residual() -> None:
    arguments = inputs(5, 3, 9, 16, torch.bfloat16, seed=1)
    want = cm.combine(**arguments)
    residual = arguments["residual"]
    assert cm.combine(**arguments, out=residual) is residual
    assert torch.equal(residual, want)


@pytest.mark.parametrize("seed", [0, 1], ids=["plain", "residual"])
def test_op(seed: int) -> None:
    rows, weights, inverse, residual = inputs(5, 2, 7, 8, torch.float32, seed).values()
    weights, rows = weights.nan_to_num(), rows.nan_to_num()  # opcheck compares NaNs as different
    torch.library.opcheck(torch.ops.cutlass_moe.combine.default, (rows, weights, inverse, residual))
    torch.library.opcheck(
        torch.ops.cutlass_moe.combine_out.default,
        (torch.zeros(5, 8), rows, weights, inverse, residual),
    )


def test_compiled() -> None:
    arguments = inputs(6, 3, 9, 16, torch.bfloat16, seed=1)
    compiled = torch.compile(cm.combine, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(**arguments), cm.combine(**arguments))
    out = torch.empty(6, 16, dtype=torch.bfloat16)
    compiled(**arguments, out=out)
    assert torch.equal(out, cm.combine(**arguments))


ROWS, WEIGHTS = torch.zeros(6, 8), torch.zeros(3, 2)
INVERSE, I64 = torch.zeros(3, 2, dtype=torch.int32), torch.int64
ERRORS: dict[str, tuple[dict[str, Tensor], type[Exception], str]] = {
    "float64 rows": ({"rows": ROWS.double()}, TypeError, "rows must be .* got torch.float64"),
    "rows 1-D": ({"rows": ROWS[0]}, ValueError, r"\[R, N\] .* got \(8,\)"),
    "inverse 1-D": ({"inverse": INVERSE[0]}, ValueError, r"inverse \[T, k\], got"),
    "int16 inverse": ({"inverse": INVERSE.short()}, TypeError, "must be torch.int32, got"),
    "int weights": ({"topk_weights": WEIGHTS.int()}, TypeError, "topk_weights must be .*float32"),
    "weights of others": ({"topk_weights": WEIGHTS.T.contiguous()}, ValueError, r"shape \(3, 2\)"),
    "half residual": ({"residual": ROWS[:3].half()}, TypeError, "must be torch.float32, got"),
    "long residual": ({"residual": ROWS}, ValueError, r"must have shape \(3, 8\), got \(6, 8\)"),
    "narrow out": ({"out": torch.zeros(3, 4)}, ValueError, r"out must have shape \(3, 8\)"),
    "another device": ({"inverse": INVERSE.to("meta")}, ValueError, "on cpu, got one on meta"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    changes, error, message = ERRORS[name]
    arguments = {"rows": ROWS, "topk_weights": WEIGHTS, "inverse": INVERSE, **changes}
    with pytest.raises(error, match=message):
        cm.combine(**arguments)


# What callers hand over in other forms. Whole numbers, so bfloat16 weights change nothing.

GIVEN: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": padded,
    "topk_weights": padded,
    "topk_weights, every second": strided,
    "topk_weights, bfloat16": lambda weights: weights.bfloat16(),
    "topk_weights, float16": lambda weights: padded(weights.half()),
    "inverse": padded,
    "inverse, int64": lambda inverse: inverse.long().where(inverse >= 0, 2**32),
    "residual": strided,
    "out": padded,
}


@pytest.mark.parametrize("given", GIVEN)
def test_other_forms_give_the_same_sums(given: str) -> None:
    arguments = inputs(5, 3, 9, 16, torch.bfloat16, seed=1)
    arguments["out"] = torch.zeros(5, 16, dtype=torch.bfloat16)
    want = cm.combine(**arguments).clone()
    name = given.partition(",")[0]
    other = {**arguments, name: GIVEN[given](arguments[name])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cm.combine(**other) is other["out"]
        assert torch.equal(other["out"], want)
        del other["out"]
        assert torch.equal(cm.combine(**other), want)


@pytest.mark.parametrize("name", ["rows", "residual", "out"])
def test_misaligned_tensors_are_copied_with_one_warning(name: str) -> None:
    fallback.announce_copy.cache_clear()
    arguments = inputs(5, 3, 9, 16, torch.bfloat16, seed=1)
    arguments["out"] = torch.zeros(5, 16, dtype=torch.bfloat16)
    want = cm.combine(**arguments).clone()
    other = {**arguments, name: misaligned(arguments[name])}
    with pytest.warns(UserWarning, match=f"address of {name} is not a multiple of 16 bytes"):
        assert torch.equal(cm.combine(**other), want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(cm.combine(**other), want)


@pytest.mark.parametrize("name", ["rows", "topk_weights", "residual", "out"])
def test_a_gradient_is_not_lost_in_silence(name: str) -> None:
    arguments = {"rows": ROWS, "topk_weights": WEIGHTS, "inverse": INVERSE}
    like = WEIGHTS if name == "topk_weights" else ROWS if name == "rows" else ROWS[:3]
    arguments[name] = like.clone().requires_grad_()
    arguments.setdefault("out", ROWS[:3].clone())
    with pytest.raises(RuntimeError, match="no gradient into out"):
        cm.combine(**arguments)
    with torch.no_grad():
        assert not cm.combine(**arguments).any()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients(dtype: torch.dtype, weights: torch.dtype, compiled: bool) -> None:
    """As autograd of the reference in float64; NaN of pairs without a row does not spread."""
    generator = torch.Generator().manual_seed(0)
    inverse = torch.tensor([[0, 3], [-1, 5], [9, 1], [3, 4], [2, -1]])  # row 3 twice, 6 never
    dropped = (inverse < 0) | (inverse > 6)
    leaves = {
        "rows": torch.randn(7, 24, generator=generator).to(dtype),
        "topk_weights": torch.rand(5, 2, generator=generator).to(weights),
        "residual": torch.randn(5, 24, generator=generator).to(dtype),
    }
    leaves["rows"][6] = torch.nan
    grad = torch.randn(5, 24, generator=generator).to(dtype)
    wide = {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}
    out = cm.combine_reference(inverse=inverse, **wide)
    want = torch.autograd.grad(out, list(wide.values()), grad.double())
    leaves["topk_weights"][dropped] = torch.nan
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    torch._dynamo.reset()
    call = cm.combine
    if compiled:
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(call(inverse=inverse, **leaves), list(leaves.values()), grad)
    loose = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
    for (name, leaf), got, right in zip(leaves.items(), found, want, strict=True):
        assert got.dtype == leaf.dtype
        limit = loose[leaf.dtype]
        torch.testing.assert_close(got.double(), right, rtol=limit, atol=limit, msg=name)


def test_gradients_of_one_alone_and_of_gradients() -> None:
    arguments = {"rows": ROWS, "topk_weights": WEIGHTS, "inverse": INVERSE}
    for name in ("rows", "topk_weights"):
        leaf = arguments[name].clone().requires_grad_()
        out = cm.combine(**{**arguments, name: leaf})
        (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="combine is differentiable once"):
            first.sum().backward()


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (CombineProblem(DType.INT8, DType.BF16, 64, 2), "rows must be .* fp32, got int8"),
        (CombineProblem(DType.BF16, DType.INT8, 64, 2), "out must be .* fp32, got int8"),
        (CombineProblem(DType.BF16, DType.BF16, 64, 2, DType.INT8), "weights must be .* got int8"),
        (CombineProblem(DType.BF16, DType.BF16, 60, 2), "N must be a multiple of 8 .* got 60"),
        (CombineProblem(DType.BF16, DType.BF16, 65536, 2), "up to 32768"),
        (CombineProblem(DType.BF16, DType.BF16, 64, 0), "top_k must be 1 to 32, got 0"),
        (CombineProblem(DType.FP32, DType.FP16, 64, 33), "top_k must be 1 to 32, got 33"),
    ],
    ids=["int8_rows", "int8_out", "int8_weights", "ragged", "wide", "no_choice", "many_choices"],
)
def test_illegal_problems_have_a_reason(problem: CombineProblem, reason: str) -> None:
    assert re.search(reason, why_illegal(problem) or "")


def test_problems_round_trip() -> None:
    problem = CombineProblem(DType.FP32, DType.FP16, 2880, 4)
    assert problem_from_json(problem.to_json()) == problem
    assert why_illegal(problem) is None


def test_a_meta_tensor_among_cpu_tensors_is_refused_in_every_call() -> None:
    """Their signatures are the same as those of CPU tensors alone."""
    residual = torch.zeros(3, ROWS.shape[1], dtype=ROWS.dtype)
    arguments = {"topk_weights": WEIGHTS, "inverse": INVERSE}
    for _ in range(2):
        assert cm.combine(ROWS, **arguments, residual=residual).shape == residual.shape
        with pytest.raises(ValueError, match="residual must be on cpu, got one on meta"):
            cm.combine(ROWS, **arguments, residual=residual.to("meta"))
    on_meta = {name: tensor.to("meta") for name, tensor in arguments.items()}
    assert cm.combine(ROWS.to("meta"), **on_meta).is_meta
