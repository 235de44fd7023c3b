"""grouped_matmul and grouped_matmul_out: the public ops, their registration and gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from cutlass_moe.operands import Operands, Options, ProductArguments, split_product
from cutlass_moe.ops._checks import check, readable
from cutlass_moe.ops._define import define
from cutlass_moe.ops._types import check_types, typed
from cutlass_moe.ops.dispatch import multiply, pose
from emitters.spec.gemm import GemmProblem

if TYPE_CHECKING:
    from typing_extensions import Unpack

COUNT = len(Operands._fields)


def grouped_matmul(
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
    limit: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    starts: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    accumulation: str | None = None,
    expected_rows: int | None = None,
    num_sms: int | None = None,
    schedule: str | None = None,
) -> Tensor:
    """Multiplies tokens with the weights of their experts, in one kernel that copies no token.

    Row r of expert e, where offsets[e - 1] <= r < offsets[e], reads token t = index[r]:

      out[r] = activation(per_token_scale[t] * scale[e] * (x[t] @ weight[e].T) + bias[e])

    x [T, K]: float8_e4m3fn, float8_e5m2, int8, bfloat16 or float16.
    weight [E, N, K]: x's dtype; K dense (stride 1). bfloat16 and float16 weights may have N dense
      instead. Beside bfloat16 x also packed 4-bit weights of `pack_weights` or `quantize_packed`,
      which hold scales of their own: a contiguous uint8 [E, N / 32, K / 128 rounded up, block
      bytes].
    index int32 or int64 [rows]: the row of x that each row of the product reads, sorted by expert;
      None: row r reads x[r]. An index outside [0, T) gives a row of zeros, without bias.
    offsets int32 or int64 [E]: cumulative ends of the experts' rows; the host never reads them.
    per_token_scale [T], [T, 1] or one value; scale [E, N], [E, N, 1], [E], [E, 1] or one value:
      float32, bfloat16 or float16. 8-bit operands need both, others may have either.
      float8 operands may have scales that vary along K instead, of `quantize_per_token_group` and
      `quantize_per_block`: per_token_scale [T, K / 128] of any strides, and scale
      [E, blocks of N, K / 128] of blocks of 128, 64 or 32 rows; sums are then "two_level". With a
      gated activation gates and ups have blocks of their own; without one all N rows have blocks
      from the first on, so that scales of gates and ups apart fit only if the rows of a block
      divide I.
    bias [E, N]: bfloat16, float16 or float32.
    activation: computed in float32. A gated one takes a gate g and an up value u, and N = 2 I:

      "gelu" (erf), "gelu_tanh", "silu", "relu", "relu2" (squared)  -> [rows, N]
      "swiglu"      silu(g) * u                                     -> [rows, I]
      "geglu"       gelu(g) * u; "geglu_tanh": gelu_tanh(g) * u      -> [rows, I]
      "reglu"       relu(g) * u                                     -> [rows, I]
      "swiglu_oai"  g * sigmoid(alpha g) * (u + beta), with g clamped
                    to at most limit and u to [-limit, limit]       -> [rows, I]

    limit, alpha, beta: the numbers of "swiglu_oai", default 7, 1.702 and 1 (gpt-oss's). Given with
      "swiglu" they make it the same formula, with infinity, 1 and 0 for those that are not given.
      They are no part of the kernel: one image serves all numbers.

    interleaved: N holds gate, up, gate, up, ... instead of I gates, then I ups; this is the order
      of weight, scale and bias. Packed weights always hold gates, then ups; it is then the order
      of scale and bias alone.
    starts int32 or int64 [E]: the first row of each expert, for layouts with gaps (masked or
      aligned); default: the end of the expert before. Rows in gaps are undefined.
    out_dtype: bfloat16, float16 or float32; default: bfloat16 for 8-bit operands, else x's dtype.
    accumulation: how float8 products are summed: "fast" (default; in the tensor core, about 14
      bits) or "two_level" (added to float32 every 128 elements). Other dtypes have one way only.
    expected_rows: rows per expert to expect, if rows / E misleads; changes speed only.
    num_sms: SMs to use, default all; the others stay free, for communication say.
    schedule: which CTA computes which tile: "static" (equal runs of neighbours), "tile" (in turns)
      or "dynamic" (whichever is free); None chooses. Changes speed only.

    Copies: weight is never copied; it must lie as above, at an address that is a multiple of 16
      bytes. Every other operand is copied in every call if kernels cannot read it where it lies: if
      it is not contiguous, is int64, is a scale that is not float32 or stands for several, or lies
      at an address that is no multiple of 16 bytes (8 for scale and bias; this warns once). Rows of
      x that are contiguous, at a stride of a multiple of 16 bytes, such as `padded[:, :K]`, are
      read in place. A copy costs a launch, of int64 values two. CPU tensors are treated alike.

    All tensors are on one device. Returns [rows, N] or [rows, I]; rows past offsets[-1] are
    undefined. Raises ValueError or TypeError that says what must be and what came. bfloat16 and
    float16 products are differentiable once, in x, weight, scales and bias. Without scales and
    activation kernels compute the gradients, in x's dtype and in a fixed order, whatever tokens the
    index names how often, and the host waits for nothing; else plain PyTorch does, expert by
    expert, and reads offsets back to the host.
    """
    operands = Operands(x, weight, index, offsets, per_token_scale, scale, bias, starts)
    options = Options(
        out_dtype, accumulation, expected_rows, num_sms, schedule, activation, interleaved,
        limit, alpha, beta,
    )  # fmt: skip
    try:
        if is_plain_eager(x, weight) and not wants_gradient(operands):
            return multiply(operands, options)
        return _grouped_matmul_op(*operands, *options)
    except Exception:
        check_types(grouped_matmul, locals())
        raise


def grouped_matmul_out(
    out: Tensor, x: Tensor, weight: Tensor, **arguments: Unpack[ProductArguments]
) -> None:
    """`grouped_matmul` that writes its result to `out`; leaves rows that have no expert untouched.

    out: of the shape that `grouped_matmul` returns; if it is not contiguous or its address no
    multiple of 16 bytes, it is copied and written back. out_dtype: default out's dtype, and it must
    be that. Raises what `grouped_matmul` raises, and RuntimeError where a gradient would be
    lost: this function is not differentiable.
    """
    operands, options = split_product(x, weight, arguments)
    try:
        if out is None:  # `multiply` would make a tensor
            check_types(grouped_matmul_out, locals())
        loses_gradient = wants_gradient((out, *operands))
        if is_plain_eager(x, weight) and not loses_gradient:
            multiply(operands, options, out)
            return
        if loses_gradient:
            raise RuntimeError(
                "grouped_matmul_out has no gradient and an argument requires one: "
                "use grouped_matmul, or call under torch.no_grad()"
            )
        _grouped_matmul_out_op(out, *operands, *options)
    except Exception:
        check_types(grouped_matmul_out, locals())
        raise


def wants_gradient(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether autograd would record a function of these tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def is_plain_eager(x: Tensor, weight: Tensor) -> bool:
    """Whether a call may skip torch's dispatcher, because nothing there wants to see it.

    Nothing traces, compiles, profiles or overrides it. The dispatcher and the autograd layer take
    longer than the rest of a call on the host (perf/README.md).
    """
    return not (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or type(weight) not in (Tensor, Parameter)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
    )


@typed
def grouped_matmul_problem(
    x: Tensor, weight: Tensor, **arguments: Unpack[ProductArguments]
) -> GemmProblem:
    """The problem that a call of `grouped_matmul` with these arguments poses; `warmup` takes it.

    Raises what `grouped_matmul` raises.
    """
    operands, options = split_product(x, weight, arguments)
    operands = readable(operands)
    return pose(operands, check(operands, options).dtype, options)


# Implementations.


def _grouped_matmul_impl(*arguments: Any) -> Tensor:
    return multiply(*split(arguments))


def _grouped_matmul_out_impl(out: Tensor, *arguments: Any) -> None:
    multiply(*split(arguments), out)


def split(arguments: tuple[Any, ...]) -> tuple[Operands, Options]:
    return Operands(*arguments[:COUNT]), Options(*arguments[COUNT:])


# Fakes; gradients are in grouped_matmul_gradient.py.


def _grouped_matmul_fake(*arguments: Any) -> Tensor:
    operands, options = split(arguments)
    shape, dtype = check(readable(operands), options)
    return operands.x.new_empty(shape, dtype=dtype)


def _grouped_matmul_out_fake(out: Tensor, *arguments: Any) -> None:
    operands, options = split(arguments)
    check(readable(operands), options, out)


TENSORS = (
    "Tensor x, Tensor weight, Tensor? index, Tensor offsets, Tensor? per_token_scale, "
    "Tensor? scale, Tensor? bias, Tensor? starts"
)
_INPUTS = (
    f"{TENSORS}, ScalarType? out_dtype, str? accumulation, SymInt? expected_rows, int? num_sms, "
    "str? schedule, str? activation, bool interleaved, float? limit=None, float? alpha=None, "
    "float? beta=None"
)
_grouped_matmul_op = define(
    f"grouped_matmul({_INPUTS}) -> Tensor", _grouped_matmul_impl, _grouped_matmul_fake
)
_grouped_matmul_out_op = define(
    f"grouped_matmul_out(Tensor(a!) out, {_INPUTS}) -> ()",
    _grouped_matmul_out_impl,
    _grouped_matmul_out_fake,
)
