"""grouped_weight_grad: the gradient of the experts' weights, a product that sums over rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cutlass_moe.choose.weight_grads_sm90 import weight_grad_config
from cutlass_moe.operands import DTYPES
from cutlass_moe.ops._checks import expect, reads_rows
from cutlass_moe.ops._copies import as_int32, at_address, refuse_other_devices, writable
from cutlass_moe.ops._define import define
from cutlass_moe.ops._types import check_types, typed
from cutlass_moe.ops.dispatch import Choice
from cutlass_moe.ops.grouped_matmul import is_plain_eager, wants_gradient
from cutlass_moe.ops.grouped_matmul_reference import expert_rows, inside
from cutlass_moe.runtime import library
from cutlass_moe.runtime.device import on_device
from cutlass_moe.runtime.fallback import announce_fallback
from cutlass_moe.runtime.log import logger
from cutlass_moe.runtime.parameters import weight_grad_values, weight_grad_views
from cutlass_moe.runtime.signatures import Signatures, signature
from emitters.spec.registry import why_illegal
from emitters.spec.weight_grad import Side, WeightGradProblem, WeightGradSm90Config

_DTYPES = (torch.bfloat16, torch.float16)
_ALIGNMENT = 16  # bytes, of the addresses of left, right and out


class SummedOperands(NamedTuple):
    """The tensors that the op reads, in the order of its schema."""

    left: Tensor
    right: Tensor
    offsets: Tensor
    left_index: Tensor | None = None
    right_index: Tensor | None = None
    starts: Tensor | None = None

    @property
    def rows(self) -> int:
        """The number of rows that are summed over."""
        ordered = self.left if self.left_index is None else self.right
        return ordered.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of the result."""
        return self.offsets.shape[0], self.left.shape[1], self.right.shape[1]

    def problem(self, out: torch.dtype, accumulate: bool) -> WeightGradProblem:
        """The problem that the operands pose, for a result of this dtype."""
        experts, m, n = self.shape
        gathered = None
        if self.left_index is not None or self.right_index is not None:
            gathered = Side.RIGHT if self.left_index is None else Side.LEFT
        operand = DTYPES[self.left.dtype]
        return WeightGradProblem(operand, DTYPES[out], m, n, experts, gathered, accumulate)

    def addresses(self, out: Tensor) -> dict[str, int]:
        """The addresses of the kernel's tensors."""
        index = self.right_index if self.left_index is None else self.left_index
        tensors = {"index": index, "starts": self.starts}
        return {
            "left": self.left.data_ptr(),
            "right": self.right.data_ptr(),
            "offsets": self.offsets.data_ptr(),
            "out": out.data_ptr(),
            **{name: x.data_ptr() for name, x in tensors.items() if x is not None},
        }


def grouped_weight_grad(
    left: Tensor,
    right: Tensor,
    offsets: Tensor,
    *,
    left_index: Tensor | None = None,
    right_index: Tensor | None = None,
    starts: Tensor | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiplies the rows of each expert with one another: the gradient of its weights.

      out[e] = sum over the rows r of expert e of left[r].T @ right[r]

    An expert e has the rows offsets[e - 1] <= r < offsets[e]. For `grouped_matmul(x, weight,
    index=index, offsets=offsets)` and the gradient `grad` [rows, N] of its result, that of weight
    [E, N, K] is `grouped_weight_grad(grad, x, offsets, right_index=index)`, and that of weights
    stored as [E, K, N] is `grouped_weight_grad(x, grad, offsets, left_index=index)`.

    left [R, M], right [R, N]: bfloat16 or float16, both the same.
    offsets int32 or int64 [E]: cumulative ends of the experts' rows; the host never reads them.
    left_index or right_index, not both, int32 or int64 [R]: row r reads row index[r] of that
      operand, which then is [T, M] or [T, N] with any T. A row with an index outside [0, T) adds
      nothing, as long as the other operand's row is finite: 0 * NaN is NaN.
    starts int32 or int64 [E]: the first row of each expert, for layouts with gaps; default: the end
      of the expert before.
    out [E, M, N]: the operands' dtype or float32; default: a new tensor of `out_dtype`. If it is
      not contiguous or its address no multiple of 16 bytes, it is copied and written back.
    accumulate: add to `out`, which must be given, instead of writing to it. The addition is
      float32, and its result is rounded once, to out's dtype.
    out_dtype: the operands' dtype or float32; default: out's dtype, else the operands'.

    Rows of no expert are never read. An expert without rows gets zeros, or adds nothing. Products
    are summed in float32 in one order, so that equal calls give equal bits.

    Copies: left and right are read in place if their rows are contiguous, at a stride of a multiple
      of 16 bytes; else they are copied in every call, and so are operands at an address that is no
      multiple of 16 bytes (this warns once), and int64 indices, offsets and starts.

    All tensors are on one device. Returns out. Raises ValueError or TypeError that says what must
    be and what came, and RuntimeError where a gradient would be lost: this function has none.
    """
    operands = SummedOperands(left, right, offsets, left_index, right_index, starts)
    try:
        if wants_gradient((*operands, out)):
            raise RuntimeError(
                "grouped_weight_grad has no gradient and an argument requires one: use "
                "grouped_weight_grad_reference, or call under torch.no_grad()"
            )
        if out is None and accumulate:
            raise ValueError("out must be given with accumulate=True, got None")
        if is_plain_eager(left, right):
            return _weight_grad(out, operands, accumulate, out_dtype)
        if out is None:
            return _weight_grad_op(*operands, out_dtype)
        _weight_grad_out_op(out, *operands, accumulate, out_dtype)
        return out
    except Exception:
        check_types(grouped_weight_grad, locals())
        raise


@typed
def grouped_weight_grad_reference(
    left: Tensor,
    right: Tensor,
    offsets: Tensor,
    *,
    left_index: Tensor | None = None,
    right_index: Tensor | None = None,
    starts: Tensor | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`grouped_weight_grad` in plain PyTorch, unchecked, for any floating dtype; differentiable.

    The host reads offsets. Sums are float32, or float64 for float64 operands. A row with an index
    outside [0, T) is left out, so that the other operand's row may be NaN.
    """
    operands = SummedOperands(left, right, offsets, left_index, right_index, starts)
    if out is None:
        wide = torch.promote_types(left.dtype, torch.float32)
        parts = [left.new_zeros(operands.shape[1:], dtype=wide)] * len(offsets)
        for expert, part in _sums(operands, wide):
            parts[expert] = part
        dtype = out_dtype or left.dtype
        return (
            torch.stack(parts).to(dtype) if parts else left.new_zeros(operands.shape, dtype=dtype)
        )
    if not accumulate:
        out.zero_()
    for expert, part in _sums(operands, torch.promote_types(left.dtype, torch.float32)):
        out[expert] += part
    return out


def _sums(operands: SummedOperands, wide: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Yields (expert, sum) for every expert that has rows. wide: the dtype of the sums."""
    left, right, offsets, left_index, right_index, starts = operands
    for expert, first, last in expert_rows(starts, offsets, operands.rows):
        if left_index is not None:
            right_rows, left_rows = inside(left_index, first, last, left)
        else:
            left_rows, right_rows = inside(right_index, first, last, right)
        yield expert, left[left_rows].to(wide).T @ right[right_rows].to(wide)


def _plain(operands: SummedOperands) -> SummedOperands:
    """The operands as kernels read them, but for their addresses; copies of those that are not so.

    What can't be made so stays, for `_check` to refuse. Extents may be symbolic.
    """
    left, right, offsets, *rest = operands
    left_index, right_index, starts = (None if i is None else as_int32(i) for i in rest)
    left, right = (x if reads_rows(x) else x.contiguous() for x in (left, right))
    return SummedOperands(left, right, as_int32(offsets), left_index, right_index, starts)


def _check(
    operands: SummedOperands, out: Tensor | None, out_dtype: torch.dtype | None
) -> torch.dtype:
    """Checks the arguments and returns the dtype of the result. Raises ValueError or TypeError."""
    left, right, offsets, left_index, right_index, starts = operands
    device = left.get_device()
    if left.dtype not in _DTYPES:
        raise TypeError(f"left must be {' or '.join(map(str, _DTYPES))}, got {left.dtype}")
    if left.dim() != 2 or right.dim() != 2:
        got = f"{tuple(left.shape)} and {tuple(right.shape)}"
        raise ValueError(f"left must be [R, M] and right [R, N], got {got}")
    if left_index is not None and right_index is not None:
        raise ValueError("left_index or right_index must be None, got both")
    expect("right", right, device, (left.dtype,), (right.shape,), dense=False)
    rows, columns = operands.rows, right.shape[1]
    if left_index is not None:
        expect("left_index", left_index, device, (torch.int32,), ((rows,),))
    elif right_index is not None:
        expect("right_index", right_index, device, (torch.int32,), ((rows,),))
    elif right.shape[0] != rows:
        wanted = (rows, columns)
        raise ValueError(f"right must have shape {wanted} like left, got {tuple(right.shape)}")
    if offsets.dim() != 1 or offsets.shape[0] == 0:
        raise ValueError(f"offsets must have shape (E > 0,), got {tuple(offsets.shape)}")
    experts = offsets.shape[0]
    expect("offsets", offsets, device, (torch.int32,), ((experts,),))
    if starts is not None:
        expect("starts", starts, device, (torch.int32,), ((experts,),))
    allowed = (left.dtype, torch.float32)
    if out is not None:
        expect("out", out, device, allowed, (operands.shape,), dense=False)
        if out_dtype not in (None, out.dtype):
            raise TypeError(f"out_dtype must be {out.dtype} like out, got {out_dtype}")
        return out.dtype
    if out_dtype is not None and out_dtype not in allowed:
        names = " or ".join(map(str, allowed))
        raise TypeError(f"out_dtype must be {names}, got {out_dtype}")
    return out_dtype or left.dtype


class _WeightGradCall(NamedTuple):
    """What the signature of a call decides: the dtype of the result, the kernel.

    copied: operands or out must be made plain first, so the choice is that of another signature.
    """

    dtype: torch.dtype
    choice: Choice | None  # None: the reference serves it, unless `copied`
    copied: bool = False


_calls: Signatures[_WeightGradCall] = Signatures()


def _find_call(
    out: Tensor | None, operands: SummedOperands, accumulate: bool, out_dtype: torch.dtype | None
) -> _WeightGradCall:
    """Checks arguments and chooses a kernel, once per signature."""
    key = signature((accumulate, out_dtype), (out, *operands))
    call = _calls.get(key)
    if call is None:
        plain = _plain(operands)
        dtype = _check(plain, out, out_dtype)
        copied = any(a is not b for a, b in zip(plain, operands, strict=True))
        if copied or not (out is None or out.is_contiguous()):
            return _calls.keep(key, _WeightGradCall(dtype, None, copied=True))
        call = _WeightGradCall(dtype, _choose(operands, dtype, accumulate))
        if call.choice is not None or not operands.left.is_cuda:  # else it is told each time
            _calls.keep(key, call)
    return call


def _choose(operands: SummedOperands, out: torch.dtype, accumulate: bool) -> Choice | None:
    left, rows = operands.left, operands.rows
    if not left.is_cuda or not rows:
        return None
    problem = operands.problem(out, accumulate)
    reason = why_illegal(problem, arch=library.device_arch(left.get_device()))
    if reason is not None:
        announce_fallback(reason)
        return None
    config = weight_grad_config(problem, rows / problem.num_experts)
    logger.info("%s: %d rows -> %s", problem.words, rows, config.words)
    return weight_grad_launch(operands, problem, config)


def weight_grad_launch(
    operands: SummedOperands, problem: WeightGradProblem, config: WeightGradSm90Config
) -> Choice:
    """Loads the kernel of this config, for operands that pose this problem.

    Raises what `library.load` raises.
    """
    left, right, device = operands.left, operands.right, operands.left.get_device()
    gathered = left if operands.left_index is not None else right
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    return Choice(
        library.load(problem, config, device),
        min(sms // config.cluster, config.units(problem)) * config.cluster,
        weight_grad_values(problem, {}, len(gathered), operands.rows, _row_stride(gathered)),
        weight_grad_views(problem, _row_stride(left), _row_stride(right)),
    )


def _row_stride(x: Tensor) -> int:
    return x.shape[1] if x.is_contiguous() else x.stride(0)  # of one row it may be anything


def _weight_grad(
    out: Tensor | None, operands: SummedOperands, accumulate: bool, out_dtype: torch.dtype | None
) -> Tensor:
    call = _find_call(out, operands, accumulate, out_dtype)
    if out is None:
        out = operands.left.new_empty(operands.shape, dtype=call.dtype)
    if call.copied:
        with writable(out) as room:
            _weight_grad(room, _plain(operands), accumulate, None)
        return out
    left, right = operands[:2]
    addresses = operands.addresses(out)
    if (addresses["left"] | addresses["right"] | addresses["out"]) % _ALIGNMENT:
        left = at_address("left", left, _ALIGNMENT)
        right = at_address("right", right, _ALIGNMENT)
        with writable(out) as room:
            _weight_grad(room, operands._replace(left=left, right=right), accumulate, None)
    elif call.choice is not None:
        on_device(left.get_device(), partial(call.choice.launch, addresses))
    else:
        # signatures do not tell the CPU from the meta device
        refuse_other_devices({**operands._asdict(), "out": out}, left.device)
        if not out.is_meta:
            given = operands._asdict()
            grouped_weight_grad_reference(**given, out=out, accumulate=accumulate)
    return out


def _weight_grad_impl(*arguments: Any) -> Tensor:
    *operands, out_dtype = arguments
    return _weight_grad(None, SummedOperands(*operands), False, out_dtype)


def _weight_grad_out_impl(out: Tensor, *arguments: Any) -> None:
    *operands, accumulate, out_dtype = arguments
    _weight_grad(out, SummedOperands(*operands), accumulate, out_dtype)


def _weight_grad_fake(*arguments: Any) -> Tensor:
    *tensors, out_dtype = arguments
    operands = _plain(SummedOperands(*tensors))
    dtype = _check(operands, None, out_dtype)
    return operands.left.new_empty(operands.shape, dtype=dtype)


def _weight_grad_out_fake(out: Tensor, *arguments: Any) -> None:
    *tensors, _, out_dtype = arguments
    _check(_plain(SummedOperands(*tensors)), out, out_dtype)


_INPUTS = (
    "Tensor left, Tensor right, Tensor offsets, Tensor? left_index, Tensor? right_index, "
    "Tensor? starts"
)
_weight_grad_op = define(
    f"grouped_weight_grad({_INPUTS}, ScalarType? out_dtype) -> Tensor",
    _weight_grad_impl,
    _weight_grad_fake,
)
_weight_grad_out_op = define(
    f"grouped_weight_grad_out(Tensor(a!) out, {_INPUTS}, bool accumulate, ScalarType? out_dtype) "
    "-> ()",
    _weight_grad_out_impl,
    _weight_grad_out_fake,
)
