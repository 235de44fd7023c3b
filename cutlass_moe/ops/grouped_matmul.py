"""grouped_matmul: the public ops, their registration with torch, and the way to a launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from cutlass_moe.operands import Operands, Options, ProductArguments, split_product
from cutlass_moe.ops._checks import check, check_out, product_shape
from cutlass_moe.ops._define import define, define_gradient
from cutlass_moe.ops.dispatch import enqueue, find_call, pose
from cutlass_moe.ops.grouped_matmul_reference import (
    fill_product,
    grouped_matmul_backward,
)
from emitters.spec.gemm import GemmProblem

if TYPE_CHECKING:
    from typing_extensions import Unpack

_COUNT = len(Operands._fields)


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
    starts: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    accumulation: str | None = None,
    expected_rows: int | None = None,
    num_sms: int | None = None,
    schedule: str | None = None,
) -> Tensor:
    """out[r] = activation(per_token_scale[index[r]] * scale[e] * (x[index[r]] @ weight[e].T) +
    bias[e]) for the rows r of expert e, which are offsets[e - 1] <= r < offsets[e].

    x [T, K], contiguous: float8_e4m3fn, float8_e5m2, int8, bfloat16 or float16. weight [E, N, K]:
      of the same dtype, K dense, or N where it is bfloat16 or float16 and not interleaved.
    index int32 [rows]: the row of x that each row of the product reads, rows sorted by expert;
      without it row r reads x[r]. An index outside [0, T) gives a row of zeros, without bias.
    offsets int32 [E]: cumulative ends of the experts' rows, on x's device; never read by the host.
    per_token_scale float32 [T] or [T, 1]; scale float32 [E, N], [E, N, 1] or [E]: both are needed
      for 8-bit operands. bias [E, N]: bfloat16, float16 or float32.
    activation, in float32: "gelu" (by erf), "silu", "relu", "relu2" (relu squared), or gated, of a
      gate g and an up u: "swiglu" silu(g) * u, "geglu" gelu(g) * u, "reglu" relu(g) * u,
      "swiglu_oai" g * sigmoid(1.702 g) * (u + 1) with g clamped to at most 7, u to [-7, 7]. N is
      then 2 I: I gate rows of a weight and I up rows or, if interleaved, gate, up, gate, up, ...;
      scale and bias alike, out has I columns.
    starts int32 [E]: first rows of the experts where they are not the ends before, as in masked and
      aligned layouts. Rows between experts are undefined.
    out_dtype: bfloat16, float16 or float32; default bfloat16 for 8-bit operands, x's dtype for
      others.
    accumulation: for float8 "fast" (the default: in the tensor core, about 14 bits) or "two_level"
      (promoted to float32 every 128 elements); others have one only.
    expected_rows: rows an expert is expected to have, where rows / E misleads; changes speed alone.
    num_sms: SMs to use (default all), the rest stay free for communication.
    schedule: who computes which tile: "static" (equal runs of neighbours), "tile" (in turns) or
      "dynamic" (whoever is free); changes speed alone, and None chooses.

    Returns [rows, N] or [rows, I]; rows past offsets[-1] are undefined. Raises ValueError or
    TypeError, with what was expected and what came, for malformed arguments. bfloat16 and float16
    are differentiable.
    """
    operands = Operands(x, weight, index, offsets, per_token_scale, scale, bias, starts)
    options = Options(
        out_dtype, accumulation, expected_rows, num_sms, schedule, activation, interleaved
    )
    if is_plain_eager(x, weight) and not wants_gradient(operands):
        return _product(operands, options)
    return _grouped_matmul_op(*operands, *options)


def grouped_matmul_out(
    out: Tensor, x: Tensor, weight: Tensor, **arguments: Unpack[ProductArguments]
) -> None:
    """`grouped_matmul` into its result's shape, contiguous; rows of no expert are left untouched.

    out_dtype, if given, must be out's. Not differentiable: raises RuntimeError where a gradient
    would be lost.
    """
    operands, options = split_product(x, weight, arguments)
    loses_gradient = wants_gradient((out, *operands))
    if is_plain_eager(x, weight) and not loses_gradient:
        _product_into(out, operands, options)
        return
    if loses_gradient:
        raise RuntimeError(
            "grouped_matmul_out has no gradient and an argument requires one: "
            "use grouped_matmul, or torch.no_grad()"
        )
    _grouped_matmul_out_op(out, *operands, *options)


def wants_gradient(tensors: tuple[Tensor | None, ...]) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def is_plain_eager(x: Tensor, weight: Tensor) -> bool:
    """Nobody but the op's implementation wants to see this call.

    It then goes past torch's dispatcher and autograd layer, which take longer than the rest of the
    call on the host (perf/README.md).
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


def grouped_matmul_problem(
    x: Tensor, weight: Tensor, **arguments: Unpack[ProductArguments]
) -> GemmProblem:
    """The problem that `grouped_matmul` with these arguments poses: what `warmup` takes.

    Raises as the op does.
    """
    operands, options = split_product(x, weight, arguments)
    dtype = check(operands, options)
    return pose(operands, dtype, options)


# Implementations: CPU tensors take the reference, CUDA tensors a kernel.


def _product(operands: Operands, options: Options) -> Tensor:
    call = find_call(operands, None, options)
    out = operands.x.new_empty(call.shape, dtype=call.dtype)
    if call.choice is not None:
        enqueue(call.choice, out, operands)
    else:
        fill_product(out.zero_(), operands, options)
    return out


def _product_into(out: Tensor, operands: Operands, options: Options) -> None:
    call = find_call(operands, out, options)
    if call.choice is not None:
        enqueue(call.choice, out, operands)
    else:
        fill_product(out, operands, options)


def _grouped_matmul_impl(*arguments: Any) -> Tensor:
    return _product(*_split(arguments))


def _grouped_matmul_out_impl(out: Tensor, *arguments: Any) -> None:
    _product_into(out, *_split(arguments))


def _split(arguments: tuple[Any, ...]) -> tuple[Operands, Options]:
    return Operands(*arguments[:_COUNT]), Options(*arguments[_COUNT:])


# Fakes and gradients.


def _grouped_matmul_fake(*arguments: Any) -> Tensor:
    operands, options = _split(arguments)
    dtype = check(operands, options)
    return operands.x.new_empty(product_shape(operands, options), dtype=dtype)


def _grouped_matmul_out_fake(out: Tensor, *arguments: Any) -> None:
    operands, options = _split(arguments)
    dtype = check(operands, options._replace(out_dtype=options.out_dtype or out.dtype))
    check_out(out, operands, options, dtype)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    operands, options = _split(inputs)
    if operands.x.dtype.itemsize == 1:
        raise RuntimeError(
            f"no gradient through {operands.x.dtype} operands, and an argument requires one: "
            "detach it, or use bfloat16 or float16"
        )
    ctx.save_for_backward(*operands)
    ctx.activation = options.activation, options.interleaved


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    operands = Operands(*ctx.saved_tensors)
    x, weight, _, _, per_token_scale, scale, bias, _ = ctx.needs_input_grad[:_COUNT]
    needs = [x, weight, per_token_scale, scale, bias]
    found = iter(_backward_op(grad.contiguous(), *operands, *ctx.activation, needs))
    gradients = [next(found) if need else None for need in needs]
    return (*gradients[:2], None, None, *gradients[2:], None, *(None for _ in Options._fields))


def _no_second_gradient(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("grouped_matmul is differentiable once: no gradient of its gradient")


def _split_backward(arguments: tuple[Any, ...]) -> tuple[Operands, tuple[Any, ...]]:
    return Operands(*arguments[:_COUNT]), arguments[_COUNT:]


def _backward_impl(grad: Tensor, *arguments: Any) -> list[Tensor]:
    """Gradients of those of x, weight, per_token_scale, scale, bias that `needs` names."""
    operands, (activation, interleaved, needs) = _split_backward(arguments)
    options = Options(activation=activation, interleaved=interleaved)
    found = grouped_matmul_backward(grad, operands, options, tuple(needs))
    return [gradient for gradient in found if gradient is not None]


def _backward_fake(grad: Tensor, *arguments: Any) -> list[Tensor]:
    operands, (_, _, needs) = _split_backward(arguments)
    x, weight, _, _, per_token_scale, scale, bias, _ = operands
    inputs = zip((x, weight, per_token_scale, scale, bias), needs, strict=True)
    return [torch.empty_like(tensor) for tensor, need in inputs if need and tensor is not None]


_TENSORS = (
    "Tensor x, Tensor weight, Tensor? index, Tensor offsets, Tensor? per_token_scale, "
    "Tensor? scale, Tensor? bias, Tensor? starts"
)
_INPUTS = (
    f"{_TENSORS}, ScalarType? out_dtype, str? accumulation, SymInt? expected_rows, int? num_sms, "
    "str? schedule, str? activation, bool interleaved"
)
_grouped_matmul_op = define(
    f"grouped_matmul({_INPUTS}) -> Tensor", _grouped_matmul_impl, _grouped_matmul_fake
)
_grouped_matmul_out_op = define(
    f"grouped_matmul_out(Tensor(a!) out, {_INPUTS}) -> ()",
    _grouped_matmul_out_impl,
    _grouped_matmul_out_fake,
)
_backward_op = define(
    f"grouped_matmul_backward(Tensor grad, {_TENSORS}, str? activation, bool interleaved, "
    "bool[] needs) -> Tensor[]",
    _backward_impl,
    _backward_fake,
)
define_gradient("grouped_matmul", _gradients, _save_for_backward)
define_gradient("grouped_matmul_backward", _no_second_gradient)
