"""What a call of grouped_matmul may look like, and which problem it poses."""

from __future__ import annotations

import torch
from torch import Tensor

from cutlass_moe.operands import DTYPES, FLOATS, Operands, Options
from cutlass_moe.ops.activations import ACTIVATIONS, is_gated
from emitters.spec.config_sm90 import Schedule
from emitters.spec.dtypes import ACCUMULATIONS

_ACCUMULATIONS = {
    dtype: tuple(map(str, ACCUMULATIONS[operand]))
    for dtype, operand in DTYPES.items()
    if operand in ACCUMULATIONS
}
_SCHEDULES = tuple(map(str, Schedule))
_FLOAT32, _INT32 = (torch.float32,), (torch.int32,)


def product_shape(operands: Operands, options: Options) -> tuple[int, int]:
    n = operands.weight.shape[1]
    return operands.rows, n // 2 if is_gated(options.activation) else n


def check(operands: Operands, options: Options) -> torch.dtype:
    """The dtype of the product. Extents may be symbolic.

    Raises ValueError or TypeError, with what was expected and what came, for malformed arguments.
    """
    x, weight, index, offsets, per_token_scale, scale, bias, starts = operands
    out_dtype, accumulation, _, num_sms, schedule, activation, interleaved = options
    device = x.get_device()
    allowed = _ACCUMULATIONS.get(x.dtype)
    if allowed is None:
        names = ", ".join(map(str, _ACCUMULATIONS))
        raise TypeError(f"x must be one of {names}, got {x.dtype}")
    if x.dim() != 2 or weight.dim() != 3:
        got = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"x must be [T, K] and weight [E, N, K], got {got}")
    tokens = x.shape[0]
    experts, n, _ = weight.shape
    if not x.is_contiguous():
        raise ValueError(f"x must be a contiguous tensor, got strides {x.stride()}")
    check_weight("weight", weight, x, (*weight.shape[:2], x.shape[1]), x.dtype)
    expect("offsets", offsets, device, _INT32, ((experts,),))
    if starts is not None:
        expect("starts", starts, device, _INT32, ((experts,),))
    if index is not None:
        expect("index", index, device, _INT32, ((index.numel(),),))
    if per_token_scale is not None:
        shapes = ((tokens,), (tokens, 1))
        expect("per_token_scale", per_token_scale, device, _FLOAT32, shapes)
    if scale is not None:
        expect("scale", scale, device, _FLOAT32, ((experts, n), (experts, n, 1), (experts,)))
    if bias is not None:
        expect("bias", bias, device, FLOATS, ((experts, n),))
    if x.dtype.itemsize == 1 and (per_token_scale is None or scale is None):
        missing = "per_token_scale" if per_token_scale is None else "scale"
        raise ValueError(f"{missing}: {x.dtype} operands need per_token_scale and scale, got None")
    if activation is not None:
        check_activation("weight", weight, activation, interleaved)
    elif interleaved:
        raise ValueError("interleaved must come with a gated activation, got None")
    if num_sms is not None and num_sms < 1:
        raise ValueError(f"num_sms must be a positive number, got {num_sms}")
    if schedule is not None and schedule not in _SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(_SCHEDULES)}, got {schedule!r}")
    check_accumulation(accumulation, x.dtype)
    if out_dtype is None:
        return torch.bfloat16 if x.dtype.itemsize == 1 else x.dtype
    if out_dtype not in FLOATS:
        raise TypeError(f"out_dtype must be bfloat16, float16 or float32, got {out_dtype}")
    return out_dtype


def check_accumulation(accumulation: str | None, dtype: torch.dtype) -> None:
    allowed = _ACCUMULATIONS[dtype]
    if accumulation is not None and accumulation not in allowed:
        raise ValueError(
            f"accumulation must be {' or '.join(allowed)} for {dtype}, got {accumulation!r}"
        )


def check_out(out: Tensor, operands: Operands, options: Options, dtype: torch.dtype) -> None:
    """Raises as `check` does where `out` cannot take the product, of this dtype, of operands."""
    shape = product_shape(operands, options)
    expect("out", out, operands.x.get_device(), (dtype,), (shape,))


def check_activation(name: str, weight: Tensor, activation: str, interleaved: bool) -> None:
    """Of the product with these weights [E, N, K]."""
    n = weight.shape[1]
    if activation not in ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation must be one of {names}, got {activation!r}")
    if is_gated(activation):
        if n % 2:
            raise ValueError(
                f"{name} must have gate and up rows for {activation}, got an odd N {n}"
            )
        if interleaved and is_n_major(weight):
            raise ValueError(
                "interleaved weights must have K dense, whose gate and up rows can be told "
                f"apart, got strides {weight.stride()}; a contiguous copy has K dense"
            )
    elif interleaved:
        raise ValueError(f"interleaved must come with a gated activation, got {activation!r}")


def is_n_major(weight: Tensor) -> bool:
    """Whether kernels read it as N-major: bfloat16 or float16 [E, N, K], N dense and not K."""
    return weight.dtype.itemsize == 2 and weight.stride(1) == 1 and weight.stride(2) != 1


def check_weight(
    name: str, weight: Tensor, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Weights of this dtype and shape [E, N, K] on `like`'s device, in memory as kernels read
    them."""
    if weight.dtype is not dtype:
        raise TypeError(f"{name} must be {dtype}, got {weight.dtype}")
    if weight.shape != shape or shape[0] == 0:
        raise ValueError(f"{name} must be [E > 0, N, K] {tuple(shape)}, got {tuple(weight.shape)}")
    if weight.get_device() != like.get_device():
        raise ValueError(f"{name} must be on {like.device}, got one on {weight.device}")
    to_16 = 16 // weight.dtype.itemsize
    either = "K or N" if weight.dtype.itemsize == 2 else "K"
    expert_stride, pitch, dense_stride = weight.stride()
    dense, other = shape[2], "N"
    if is_n_major(weight):
        pitch, dense_stride = dense_stride, pitch
        dense, other = shape[1], "K"
    ragged = pitch % to_16 or expert_stride % to_16
    if dense_stride != 1 or pitch < dense or (ragged and dense % to_16 == 0):
        # where `dense` is ragged, the problem is illegal
        raise ValueError(
            f"{name} must have {either} dense, strides of E and {other} in multiples of {to_16} "
            f"elements, got strides {weight.stride()}"
        )


def expect(
    name: str,
    tensor: Tensor,
    device: int,
    dtypes: tuple[torch.dtype, ...],
    shapes: tuple[tuple[int, ...], ...],
) -> None:
    """A contiguous tensor of one of these dtypes and shapes; device: its index, -1 for the CPU."""
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.shape not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be a contiguous tensor, got strides {tensor.stride()}")
    if tensor.get_device() != device:
        wanted = "cpu" if device < 0 else f"cuda:{device}"
        raise ValueError(f"{name} must be on {wanted}, got one on {tensor.device}")
