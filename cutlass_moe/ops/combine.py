"""combine: sums each token's rows of the product, weighted, to the token's output."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cutlass_moe.operands import DTYPES, FLOATS
from cutlass_moe.ops._copies import as_int32, at_address, writable
from cutlass_moe.ops._define import define, define_gradient
from cutlass_moe.ops._row_sums import sum_by_index
from cutlass_moe.ops._types import check_types, typed
from cutlass_moe.ops.dispatch import Choice, step_kernel
from cutlass_moe.ops.grouped_matmul import is_plain_eager, wants_gradient
from cutlass_moe.runtime.device import on_device
from cutlass_moe.runtime.parameters import combine_values
from cutlass_moe.runtime.signatures import Signatures, signature
from emitters.spec.layer_steps import CombineProblem

if TYPE_CHECKING:
    from typing_extensions import Unpack

_MAX_ELEMENTS = 2**33  # of out, exclusive: threads are counted in int32 and take 4 or 8 each


def combine(
    rows: Tensor,
    topk_weights: Tensor,
    inverse: Tensor,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Sums each token's rows of the product, weighted, to the token's output.

      out[t] = residual[t] + sum over j of topk_weights[t, j] * rows[inverse[t, j]]

    Sums are float32, in the order of j. All tensors are on one device.

    rows [R, N]: bfloat16, float16 or float32.
    topk_weights [T, k]: bfloat16, float16 or float32; weights of a token that lie side by side are
      read in place.
    inverse int32 or int64 [T, k]: the row of each (token, choice) pair, from
      `RoutingTable.inverse`. A pair with an inverse outside [0, R), such as -1, adds nothing, not
      even a NaN.
    residual [T, N]: rows' dtype; default zeros.
    out [T, N]: rows' dtype; default a new tensor. It may be the residual.

    Other tensors that are not contiguous, or are int64, are copied in every call, which costs a
    launch. So are rows, residual and out at an address that is no multiple of 16 bytes, on every
    device and with one warning.

    Returns out. Differentiable once in rows, topk_weights and residual, without `out`; gradients
    have the inputs' dtypes and a fixed order of sums. Raises TypeError or ValueError that says what
    must be and what came, and RuntimeError where a gradient would be lost.
    """
    try:
        trained = wants_gradient((rows, topk_weights, inverse, residual, out))
        if trained and out is not None:
            raise RuntimeError(
                "combine has no gradient into out and an argument requires one: leave it out, or "
                "call under torch.no_grad()"
            )
        if is_plain_eager(rows, topk_weights) and not trained:
            return _combine(out, rows, topk_weights, inverse, residual)
        if out is None:
            return _combine_op(rows, topk_weights, inverse, residual)
        _combine_out_op(out, rows, topk_weights, inverse, residual)
        return out
    except Exception:
        check_types(combine, locals())
        raise


def _plain(
    rows: Tensor, topk_weights: Tensor, inverse: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The inputs as kernels read them, but for their addresses; copies of those that are not so."""
    if topk_weights.dim() != 2 or topk_weights.stride(1) != 1:
        topk_weights = topk_weights.contiguous()
    residual = None if residual is None else residual.contiguous()
    return rows.contiguous(), topk_weights, as_int32(inverse), residual


def _check(
    rows: Tensor, topk_weights: Tensor, inverse: Tensor, residual: Tensor | None, out: Tensor | None
) -> None:
    if rows.dtype not in FLOATS:
        raise TypeError(f"rows must be one of {', '.join(map(str, FLOATS))}, got {rows.dtype}")
    if rows.dim() != 2 or inverse.dim() != 2:
        got = f"{tuple(rows.shape)} and {tuple(inverse.shape)}"
        raise ValueError(f"rows must be [R, N] and inverse [T, k], got {got}")
    pairs, shape = tuple(inverse.shape), (inverse.shape[0], rows.shape[1])
    if shape[0] * shape[1] >= _MAX_ELEMENTS:
        raise ValueError(f"out must have fewer than 2**33 elements, got {list(shape)}")
    if topk_weights.dtype not in FLOATS:
        names = ", ".join(map(str, FLOATS))
        raise TypeError(f"topk_weights must be one of {names}, got {topk_weights.dtype}")
    for name, tensor, dtype, wanted in (
        ("rows", rows, rows.dtype, tuple(rows.shape)),
        ("topk_weights", topk_weights, topk_weights.dtype, pairs),
        ("inverse", inverse, torch.int32, pairs),
        ("residual", residual, rows.dtype, shape),
        ("out", out, rows.dtype, shape),
    ):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
        if tensor.shape != wanted:
            raise ValueError(f"{name} must have shape {wanted}, got {tuple(tensor.shape)}")
        if tensor.device != rows.device:
            raise ValueError(f"{name} must be on {rows.device}, got one on {tensor.device}")


class _Call(NamedTuple):
    """What the signature of a call decides.

    copied: the tensors must be made plain first, so the choice is that of another signature.
    """

    choice: Choice | None  # None: the reference serves it, unless `copied`
    copied: bool = False


_calls: Signatures[_Call] = Signatures()
_Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _find_call(out: Tensor | None, inputs: _Inputs) -> _Call:
    """Checks arguments and chooses a kernel, once per signature."""
    key = signature((), (out, *inputs))
    call = _calls.get(key)
    if call is None:
        plain = _plain(*inputs)
        _check(*plain, out)
        if out is not None and not out.is_contiguous():
            return _calls.keep(key, _Call(None, copied=True))
        if not all(a is b for a, b in zip(plain, inputs, strict=True)):
            return _calls.keep(key, _Call(None, copied=True))
        call = _Call(_choose(*inputs))
        if call.choice is not None or not inputs[0].is_cuda:  # else the fallback is told each time
            _calls.keep(key, call)
    return call


def _choose(
    rows: Tensor, topk_weights: Tensor, inverse: Tensor, residual: Tensor | None
) -> Choice | None:
    if not rows.is_cuda or not inverse.shape[0] or not rows.shape[1]:
        return None
    dtype, weights = DTYPES[rows.dtype], DTYPES[topk_weights.dtype]
    problem = CombineProblem(dtype, dtype, rows.shape[1], inverse.shape[1], weights)
    kernel = step_kernel(problem, rows.get_device())
    if kernel is None:
        return None
    values = combine_values({}, len(rows), len(inverse), topk_weights.stride(0))
    return Choice(kernel, problem.ctas(len(inverse), kernel.record.threads), values, {})


def _combine(out: Tensor | None, *inputs: Unpack[_Inputs]) -> Tensor:
    call = _find_call(out, inputs)
    if call.copied:
        plain = _plain(*inputs)
        if out is None:
            return _combine(None, *plain)
        with writable(out) as room:
            _combine(room, *plain)
        return out
    rows, topk_weights, inverse, residual = inputs
    out = _empty(rows, inverse) if out is None else out
    addresses = {
        "rows": rows.data_ptr(),
        "weights": topk_weights.data_ptr(),
        "inverse": inverse.data_ptr(),
        "residual": 0 if residual is None else residual.data_ptr(),
        "out": out.data_ptr(),
    }
    if (addresses["rows"] | addresses["residual"] | addresses["out"]) % 16:
        rows, residual = at_address("rows", rows, 16), at_address("residual", residual, 16)
        with writable(out) as room:
            _combine(room, rows, topk_weights, inverse, residual)
    elif call.choice is not None:
        on_device(rows.get_device(), partial(call.choice.launch, addresses))
    else:
        _check(*inputs, out)  # again: signatures do not tell the CPU from the meta device
        if not out.is_meta:
            combine_reference(rows, topk_weights, inverse, residual=residual, out=out)
    return out


def _combine_impl(*inputs: Unpack[_Inputs]) -> Tensor:
    return _combine(None, *inputs)


def _combine_out_impl(out: Tensor, *inputs: Unpack[_Inputs]) -> None:
    _combine(out, *inputs)


def _empty(rows: Tensor, inverse: Tensor) -> Tensor:
    return rows.new_empty((inverse.shape[0], rows.shape[1]))


def _combine_fake(
    rows: Tensor, topk_weights: Tensor, inverse: Tensor, residual: Tensor | None
) -> Tensor:
    _check(*_plain(rows, topk_weights, inverse, residual), None)
    return _empty(rows, inverse)


def _combine_out_fake(
    out: Tensor, rows: Tensor, topk_weights: Tensor, inverse: Tensor, residual: Tensor | None
) -> None:
    _check(*_plain(rows, topk_weights, inverse, residual), out)


def _save_for_backward(ctx: Any, inputs: _Inputs, output: Tensor) -> None:
    rows, topk_weights, inverse, _ = inputs
    by_rows, by_weights = ctx.needs_input_grad[:2]
    ctx.save_for_backward(rows if by_weights else None, topk_weights, inverse)
    ctx.rows = rows.shape[0]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, topk_weights, inverse = ctx.saved_tensors
    by_rows, by_weights, _, by_residual = ctx.needs_input_grad[:4]
    found = iter(
        _backward_op(grad, rows, topk_weights, inverse, ctx.rows, [by_rows, by_weights])
        if by_rows or by_weights
        else ()
    )
    return (
        next(found) if by_rows else None,
        next(found) if by_weights else None,
        None,
        grad if by_residual else None,
    )


def _no_second_gradient(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("combine is differentiable once, got a gradient of its gradient")


def _backward_impl(
    grad: Tensor,
    rows: Tensor | None,
    topk_weights: Tensor,
    inverse: Tensor,
    count: int,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of those of (rows, topk_weights) that `needs` marks. count: of rows."""
    inverse, found = as_int32(inverse), []
    if needs[0]:
        pairs = grad.new_empty((*inverse.shape, grad.shape[1]))
        torch.mul(grad[:, None], topk_weights[:, :, None], out=pairs)  # no copy in float32
        found.append(sum_by_index(pairs.flatten(0, 1), inverse.flatten(), count, grad.dtype))
    if needs[1]:
        assert rows is not None
        kept = (inverse >= 0) & (inverse < count)
        place = inverse.where(kept, 0).long()
        shares = torch.zeros(inverse.shape, device=grad.device)
        wide = grad.float()
        for j in range(inverse.shape[1] if count else 0):
            shares[:, j] = (rows[place[:, j]].float() * wide).sum(1)
        found.append(shares.where(kept, 0).to(topk_weights.dtype))
    return found


def _backward_fake(
    grad: Tensor,
    rows: Tensor | None,
    topk_weights: Tensor,
    inverse: Tensor,
    count: int,
    needs: list[bool],
) -> list[Tensor]:
    found = [grad.new_empty(count, grad.shape[1])] if needs[0] else []
    return [*found, *([topk_weights.new_empty(topk_weights.shape)] if needs[1] else [])]


_INPUTS = "Tensor rows, Tensor topk_weights, Tensor inverse, Tensor? residual"
_combine_op = define(f"combine({_INPUTS}) -> Tensor", _combine_impl, _combine_fake)
_combine_out_op = define(
    f"combine_out(Tensor(a!) out, {_INPUTS}) -> ()", _combine_out_impl, _combine_out_fake
)
_backward_op = define(
    "combine_backward(Tensor grad, Tensor? rows, Tensor topk_weights, Tensor inverse, "
    "SymInt count, bool[] needs) -> Tensor[]",
    _backward_impl,
    _backward_fake,
)
define_gradient("combine", _gradients, _save_for_backward)
define_gradient("combine_backward", _no_second_gradient)


@typed
def combine_reference(
    rows: Tensor,
    topk_weights: Tensor,
    inverse: Tensor,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`combine` in plain PyTorch, differentiable, for any floating dtype.

    rows [R, N], topk_weights [T, k], residual [T, N]: floating point. inverse [T, k]: int32 or
    int64. Sums are float32, or float64 for float64 rows. out, if given, is written and returned,
    and may have another dtype; otherwise the result has rows' dtype.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    count = len(rows)
    if not count:
        rows = rows.new_zeros(1, rows.shape[1])  # for the pairs without a row to point at
    total = rows.new_zeros(len(inverse), rows.shape[1], dtype=wide)
    if residual is not None:
        total = total + residual.to(wide)
    for row, weight in zip(inverse.unbind(1), topk_weights.unbind(1), strict=True):
        kept = (row >= 0) & (row < count)
        values = rows[row.where(kept, 0).long()].to(wide)
        values = values.masked_fill(~kept[:, None], 0)
        total = total + values * weight.to(wide).masked_fill(~kept, 0)[:, None]
    return total.to(rows.dtype) if out is None else out.copy_(total)
