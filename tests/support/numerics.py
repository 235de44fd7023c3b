"""What outputs are compared with, how errors are measured, and how large they may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cutlass_moe import dequantize_packed
from cutlass_moe.ops.grouped_matmul_reference import grouped_matmul_reference
from cutlass_moe.ops.quantize_groups import quantize_per_token_group_reference
from emitters.spec.dtypes import LARGEST, Accumulation, DType
from emitters.spec.gemm import GemmProblem
from tests.support.cases import Case, make_inputs


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def _gelu_tanh(x: Tensor) -> Tensor:
    return x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2


def _oai(gate: Tensor, up: Tensor, limit: float, alpha: float, beta: float) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate / (1 + torch.exp(-alpha * gate)) * (up + beta)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0) ** 2,
}
GATES: dict[str, Callable[..., Tensor]] = {
    "swiglu": lambda gate, up: _silu(gate) * up,
    "geglu": lambda gate, up: _gelu(gate) * up,
    "geglu_tanh": lambda gate, up: _gelu_tanh(gate) * up,
    "reglu": lambda gate, up: gate.clamp(min=0) * up,
    "swiglu_oai": _oai,
}


def naive(
    x: Tensor,
    weight: Tensor,
    *,
    index: Tensor | None = None,
    offsets: Tensor,
    per_token_scale: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    interleaved: bool = False,
    limit: float = 7.0,
    alpha: float = 1.702,
    beta: float = 1.0,
    starts: Tensor | None = None,
) -> Tensor:
    """The definition, float64 [rows, columns], row by row with a copy of its weights;
    differentiable.

    Zeros in rows of no expert and of an index outside [0, T).
    """
    if weight.dim() == 4:  # packed: all gates, then all ups
        weight = dequantize_packed(weight, x.shape[1], torch.float64)
        if interleaved:
            weight = weight.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    rows = len(x) if index is None else len(index)
    columns = weight.shape[1] // (2 if activation in GATES else 1)
    starts = torch.cat([offsets.new_zeros(1), offsets[:-1]]) if starts is None else starts
    out = []
    for row in range(rows):
        owners = ((starts <= row) & (row < offsets)).nonzero().flatten().tolist()
        token = row if index is None else int(index[row])
        if not owners or not 0 <= token < len(x):
            out.append(torch.zeros(columns, dtype=torch.float64))
            continue
        expert = owners[0]
        a, b = x[token].double(), weight[expert].double()
        if scale is not None and scale.dim() == 3 and scale.shape[2] > 1:
            a, b = _scaled_blocks(a, per_token_scale[token], b, scale[expert], activation in GATES)
            result = b @ a
        else:
            result = b @ a
            if per_token_scale is not None:
                result = result * per_token_scale[token].double()
            if scale is not None:
                result = result * scale[expert].double().reshape(-1)
        if bias is not None:
            result = result + bias[expert].double()
        if activation in GATES:
            pairs = result.reshape(-1, 2) if interleaved else result.reshape(2, -1).T
            numbers = (limit, alpha, beta) if activation == "swiglu_oai" else ()
            result = GATES[activation](*pairs.unbind(1), *numbers)
        elif activation is not None:
            result = FUNCTIONS[activation](result)
        out.append(result)
    return torch.stack(out) if out else torch.zeros(0, columns, dtype=torch.float64)


def _scaled_blocks(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, gated: bool
) -> tuple[Tensor, Tensor]:
    """A token [K] and an expert's weights [N, K] times their scales, one per 128 of K."""
    of_k = torch.arange(len(a)) // 128
    halves = b.chunk(2) if gated else (b,)
    blocks = b_scale.chunk(2) if gated else (b_scale,)
    rows = next(r for r in (128, 64, 32) if -(-len(halves[0]) // r) == len(blocks[0]))
    of_n = torch.arange(len(halves[0])) // rows
    scaled = [w * s.double()[of_n][:, of_k] for w, s in zip(halves, blocks, strict=True)]
    return a * a_scale.double()[of_k], torch.cat(scaled)


# NaNs of a payload that no arithmetic produces: what has them was not written.
# FP8 has one NaN of each sign, of which arithmetic produces the other.
_POISON = {1: (torch.uint8, 0xFF), 2: (torch.int16, 0x7FA5), 4: (torch.int32, 0x7FA5A5A5)}


def poisoned(rows: int, n: int, dtype: torch.dtype, device: str) -> Tensor:
    """[rows, n] of NaNs, with room for 8 rows behind it that `untouched` looks at too."""
    whole = torch.empty((rows + 8, n), dtype=dtype, device=device)
    bits, pattern = _POISON[dtype.itemsize]
    whole.view(bits).fill_(pattern)
    return whole[:rows]


def untouched(out: Tensor, rows: Tensor) -> bool:
    """Whether those rows (bool) of a `poisoned` tensor, and the room behind, are unwritten."""
    n = out.shape[1]
    behind = out.as_strided((8, n), (n, 1), len(out) * n)
    bits, pattern = _POISON[out.element_size()]
    return all(bool((part.view(bits) == pattern).all()) for part in (out[rows], behind))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bytes, NaNs included."""
    same = a.shape == b.shape and a.dtype == b.dtype
    # one row or column keeps any stride through `contiguous`, but not through `flatten`
    a, b = (tensor.contiguous().flatten() for tensor in (a, b))
    return same and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@dataclass(frozen=True)
class Errors:
    """Relative errors: Frobenius norm of all, of the worst row, and of the worst element.

    A row's error is taken relative to its norm but at least half a typical row's; an element's
    relative to itself plus a typical element. (Sums that cancel keep the error of their terms.)
    """

    whole: float
    worst_row: float
    worst_element: float


def errors(got: Tensor, want: Tensor) -> Errors:
    """Of got [rows, N] against want float64 [rows, N]; NaN in `got` gives NaN."""
    if not want.numel():
        return Errors(0.0, 0.0, 0.0)
    row_norms = torch.linalg.vector_norm(want, dim=1)
    written = row_norms > 0  # not the rows of indices outside [0, T)
    typical = row_norms.square().sum().div(written.sum().clamp(min=1)).sqrt().clamp(min=1e-30)
    row_errors = torch.empty_like(row_norms)
    worst = want.new_zeros(())
    step = max(1, 2**26 // want.shape[1])
    for start in range(0, len(want), step):
        block = slice(start, start + step)
        error = (got[block].double() - want[block]).abs_()
        row_errors[block] = torch.linalg.vector_norm(error, dim=1)
        error /= want[block].abs() + typical / want.shape[1] ** 0.5
        worst = torch.maximum(worst, error.max())
    whole = torch.linalg.vector_norm(row_errors) / torch.linalg.vector_norm(want).clamp(min=1e-30)
    row = (row_errors / row_norms.clamp(min=typical / 2)).max()
    return Errors(whole.item(), row.item(), worst.item())


# Of the whole. Rounding alone makes 1.66e-3 in bf16, 2.07e-4 in fp16.
_EXACT_LIMITS = {DType.BF16: 2e-3, DType.FP16: 3e-4, DType.FP32: 1e-5}
_TWO_LEVEL_LIMITS = {DType.BF16: 2e-3, DType.FP16: 1e-3, DType.FP32: 1e-3}
_FAST_LIMIT = 4e-3  # measured with bf16 output: 1.9e-3 at K 2048, 2.5e-3 at K 7168
_ELEMENT_FACTOR = 6  # errors of sums are normally distributed; of 10^8 the worst is 5.7 sigma


def limits(problem: GemmProblem, exact: bool = False) -> Errors:
    """The largest errors a right kernel may show, by accumulation and output dtype; exact: where
    the sums are."""
    if exact:
        whole = _EXACT_LIMITS[problem.out]
    elif problem.accumulation is Accumulation.FAST:
        whole = _FAST_LIMIT
    elif problem.accumulation is Accumulation.TWO_LEVEL:
        whole = _TWO_LEVEL_LIMITS[problem.out]
    else:
        whole = _EXACT_LIMITS[problem.out]
    if problem.activation is not None:
        whole *= 2  # products of columns: few large ones, and their roundings, make the norm
    # The mean of a row's N roundings scatters: of 10^5 rows the worst was 1 + 5.5 / sqrt(N) times
    # the typical one, for every N from 4 to 2048. From N 1024 on the limits above have room for it.
    n = problem.out_columns
    scatter = 1 + 6 / n**0.5 if n < 1024 else 1
    return Errors(whole, whole * scatter, whole * _ELEMENT_FACTOR)


def check(out: Tensor, case: Case, inputs: dict[str, Any], exact: bool = False) -> None:
    """Asserts that `out`, from `poisoned`, is what grouped_matmul_out must make of `inputs`."""
    owned: Any = case.owned.to(out.device)
    assert untouched(out, ~owned), "rows that belong to no expert were written"
    if not case.apart:
        owned = slice(sum(case.counts))  # a view: of big cases there is no room for a copy
    if exact and case.problem.activation is None:
        want = grouped_matmul_reference(**inputs)[owned]
        torch.testing.assert_close(out[owned], want, rtol=0, atol=0)
        return
    want = grouped_matmul_reference(**{**inputs, "out_dtype": torch.float64})[owned]
    if case.reads == "outside":
        outside = (inputs["index"][owned] < 0) | (inputs["index"][owned] >= case.tokens)
        assert not out[owned][outside].any(), "rows of an index outside [0, T) must be zeros"
    found, allowed = errors(out[owned], want), limits(case.problem, exact)
    assert found.whole <= allowed.whole, (found, allowed)
    assert found.worst_row <= allowed.worst_row, (found, allowed)
    assert found.worst_element <= allowed.worst_element, (found, allowed)


def check_quantized(
    q: Tensor, scale: Tensor, case: Case, inputs: dict[str, Any], exact: bool = False
) -> None:
    """Asserts that q and scale [rows, columns / 128], both from `poisoned`, are the product of the
    case, quantised: its values to the nearest of 8 bits. exact: where the sums are."""
    owned = case.owned.to(q.device)
    assert untouched(q, ~owned) and untouched(scale, ~owned), "rows of no expert were written"
    want = grouped_matmul_reference(**{**inputs, "out_dtype": torch.float64})[owned]
    values, want_scale = quantize_per_token_group_reference(want.float())
    if exact and case.problem.activation is None:
        assert torch.equal(scale[owned], want_scale)
        other = q[owned].view(torch.uint8) != values.view(torch.uint8)
        assert other.float().mean() < 1e-3, "more than what lies between two values differs"
    allowed = 1e-6 if exact else _TWO_LEVEL_LIMITS[DType.FP32] * _ELEMENT_FACTOR
    torch.testing.assert_close(scale[owned], want_scale, rtol=allowed, atol=0)
    columns = torch.arange(want.shape[1], device=q.device) // 128
    scale = scale[owned].double()[:, columns]
    error = (q[owned].double() * scale - want).abs()
    rounded = torch.maximum(want.abs() / 16, scale / 1024)  # 3 bits; 2^-9 apart from 0 on
    largest = want_scale.double()[:, columns] * LARGEST[DType.E4M3]
    assert (error <= rounded * (1 + 1e-5) + allowed * largest / 4).all()


SCHEMA_ORDER = (
    "x", "weight", "index", "offsets", "per_token_scale", "scale", "bias", "starts",
    "out_dtype", "accumulation", "expected_rows", "num_sms", "schedule",
    "activation", "interleaved", "limit", "alpha", "beta",
)  # fmt: skip
_CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def opcheck(case: Case, device: str) -> None:
    """torch.library.opcheck of both forms; of the functional one also with gradients.

    The case must have no spare rows: opcheck compares whole outputs.
    """
    inputs = make_inputs(case, device)
    # torch.allclose, by which opcheck sees whether inputs were written, does not take float8.
    float8 = case.operand in (DType.E4M3, DType.E5M2)
    checks = _CHECKS if float8 else ("test_schema", *_CHECKS)
    ops = torch.ops.cutlass_moe
    out = poisoned(case.rows, case.problem.out_columns, inputs["out_dtype"], device)
    arguments = tuple({"interleaved": False, **inputs}.get(name) for name in SCHEMA_ORDER)
    torch.library.opcheck(ops.grouped_matmul_out.default, (out, *arguments), test_utils=checks)
    torch.library.opcheck(ops.grouped_matmul.default, arguments, test_utils=checks)
    if not case.operand.quantized and case.packing is None:
        for name in ("x", "weight", "per_token_scale", "scale", "bias"):
            if inputs.get(name) is not None:
                inputs[name].requires_grad_()
        torch.library.opcheck(ops.grouped_matmul.default, arguments, test_utils=checks)


DIFFERENTIABLE = ("x", "weight", "per_token_scale", "scale", "bias")
GRADIENTS: dict[str, dict[str, Any]] = {  # routings of 5 tokens to 3 experts
    "no_rows": {"index": [], "offsets": [0, 0, 0]},
    "no_index": {"index": None, "offsets": [2, 2, 5]},
    "spare_rows": {"index": [4, 0, 1, 3, 2], "offsets": [1, 1, 3]},
    "duplicates": {"index": [1, 1, 4, 1, 4, 4, 1], "offsets": [3, 3, 7]},
    "outside": {"index": [1, -1, 5, 2, 2**31 - 1, 0], "offsets": [2, 4, 6]},
}


def gradient_inputs(
    index: list[int] | None, offsets: list[int], dtype: torch.dtype, shapes: str = "flat"
) -> dict[str, Any]:
    """T 5, E 3, N 4, K 8; `shapes` of scales: flat, column ([T, 1], [E, N, 1]) or expert ([E])."""
    generator = torch.Generator().manual_seed(4)

    def rand(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    scale_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    scale_shape = {"flat": (3, 4), "column": (3, 4, 1), "expert": (3,)}[shapes]
    return {
        "x": rand(5, 8),
        "weight": rand(3, 4, 8),
        "index": None if index is None else torch.tensor(index, dtype=torch.int32),
        "offsets": torch.tensor(offsets, dtype=torch.int32),
        "per_token_scale": rand(*((5, 1) if shapes == "column" else (5,)), dtype=scale_dtype),
        "scale": rand(*scale_shape, dtype=scale_dtype),
        "bias": rand(3, 4),
    }


def naive_gradients(grad: Tensor, inputs: dict[str, Any]) -> list[Tensor]:
    """Autograd of `naive`: float64 gradients of the DIFFERENTIABLE inputs there are."""
    wide = {k: inputs[k].double().requires_grad_() for k in DIFFERENTIABLE if k in inputs}
    out = naive(**{**inputs, **wide})
    anchor = sum(tensor.sum() for tensor in wide.values()) * 0  # where no row reads an input
    return list(torch.autograd.grad((out * grad.double()).sum() + anchor, list(wide.values())))
