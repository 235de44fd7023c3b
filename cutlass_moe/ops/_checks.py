"""Checks of the arguments of grouped_matmul, and of tensors in general."""

from __future__ import annotations

import torch
from torch import Tensor

from cutlass_moe.operands import DTYPES, FLOATS, Operands, Options, clamped_numbers
from cutlass_moe.ops._packed import block_sizes, columns, packing_of
from cutlass_moe.ops.activations import ACTIVATIONS, is_gated
from cutlass_moe.ops.block_scales import block_shapes, is_block_scaled
from cutlass_moe.runtime.parameters import reads_rows
from emitters.spec.config_sm90 import Schedule
from emitters.spec.dtypes import ACCUMULATIONS
from emitters.spec.gemm import K_BLOCK
from emitters.spec.packing import BLOCK_K

_ACCUMULATIONS = {
    dtype: tuple(map(str, ACCUMULATIONS[operand]))
    for dtype, operand in DTYPES.items()
    if operand in ACCUMULATIONS
}
_SCHEDULES = tuple(map(str, Schedule))
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FLOAT32, _INT32 = (torch.float32,), (torch.int32,)


def product_shape(operands: Operands, options: Options) -> tuple[int, int]:
    """The shape of the product: [rows, N], or [rows, N / 2] if the activation is gated."""
    n = columns(operands.weight)
    return operands.rows, n // 2 if is_gated(options.activation) else n


def check(operands: Operands, options: Options) -> torch.dtype:
    """Checks the arguments of `grouped_matmul` and returns the dtype of the product.

    Extents may be symbolic. Raises ValueError or TypeError that says what must be and what came.
    """
    x, weight, index, offsets, per_token_scale, scale, bias, starts = operands
    out_dtype, accumulation, expected_rows, num_sms, schedule, activation, interleaved = options[:7]
    clamped_numbers(activation, *options[7:])
    device = x.get_device()
    allowed = _ACCUMULATIONS.get(x.dtype)
    if allowed is None:
        names = ", ".join(map(str, _ACCUMULATIONS))
        raise TypeError(f"x must be one of {names}, got {x.dtype}")
    packed = packing_of(weight) is not None
    if x.dim() != 2 or not (weight.dim() == 3 or packed):
        got = f"{tuple(x.shape)} and {weight.dtype} {tuple(weight.shape)}"
        raise ValueError(
            "x must be [T, K] and weight [E, N, K], or packed uint8 [E, N / 32, K / 128, block "
            f"bytes] ({block_sizes()}), got {got}"
        )
    experts, n = weight.shape[0], columns(weight)
    if not reads_rows(x):
        raise ValueError(
            f"x must have contiguous rows at a stride of a multiple of 16 bytes, got {x.stride()}"
        )
    if packed:
        check_packed("weight", weight, x, x.shape[1])
    else:
        check_weight("weight", weight, x, (*weight.shape[:2], x.shape[1]), x.dtype)
    expect("offsets", offsets, device, _INT32, ((experts,),))
    if starts is not None:
        expect("starts", starts, device, _INT32, ((experts,),))
    if index is not None:
        expect("index", index, device, _INT32, ((index.numel(),),))
    if activation is not None:
        check_activation("weight", weight, activation, interleaved)
    elif interleaved:
        raise ValueError("interleaved=True needs a gated activation, got None")
    _check_scales(operands, options)
    if bias is not None:
        expect("bias", bias, device, FLOATS, ((experts, n),))
    if expected_rows is not None and expected_rows < 0:
        raise ValueError(f"expected_rows must be 0 or more, got {expected_rows}")
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


def _check_scales(operands: Operands, options: Options) -> None:
    x, weight, _, _, per_token_scale, scale, *_ = operands
    device, (tokens, k) = x.get_device(), x.shape
    experts, n = weight.shape[0], columns(weight)
    if x.dtype.itemsize == 1 and (per_token_scale is None or scale is None):
        missing = "per_token_scale" if per_token_scale is None else "scale"
        raise ValueError(
            f"{missing} must be given: {x.dtype} operands need per_token_scale and scale, got None"
        )
    gated = is_gated(options.activation)
    blocks = is_block_scaled(operands, gated)
    if blocks and x.dtype not in _FLOAT8:
        raise TypeError(f"x must be float8 for scales that vary along K, got {x.dtype}")
    if blocks and options.interleaved:
        raise ValueError("interleaved must be False for scales that vary along K, got True")
    if blocks and options.accumulation not in (None, "two_level"):
        raise ValueError(
            "accumulation must be None or 'two_level' for scales that vary along K, got "
            f"{options.accumulation!r}"
        )
    if scale is not None:
        of_weight: tuple[tuple[int, ...], ...] = ((experts, n), (experts, n, 1), (experts,))
        for shape in block_shapes(weight, gated).values() if x.dtype in _FLOAT8 else ():
            of_weight = of_weight if shape in of_weight else (*of_weight, shape)
        expect("scale", scale, device, _FLOAT32, of_weight)
    if per_token_scale is not None:
        of_x: tuple[tuple[int, ...], ...] = ((tokens,), (tokens, 1))
        if blocks:
            of_x = ((tokens, -(-k // K_BLOCK)),)
        expect("per_token_scale", per_token_scale, device, _FLOAT32, of_x, dense=not blocks)


def check_accumulation(accumulation: str | None, dtype: torch.dtype) -> None:
    """Raises ValueError if operands of this dtype have no such accumulation."""
    allowed = _ACCUMULATIONS[dtype]
    if accumulation is not None and accumulation not in allowed:
        raise ValueError(
            f"accumulation must be {' or '.join(allowed)} for {dtype}, got {accumulation!r}"
        )


def check_out(out: Tensor, operands: Operands, options: Options, dtype: torch.dtype) -> None:
    """Checks that `out` can take the product, which has this dtype; raises as `check` does.

    out may have any strides.
    """
    shape = product_shape(operands, options)
    expect("out", out, operands.x.get_device(), (dtype,), (shape,), dense=False)


def check_activation(name: str, weight: Tensor, activation: str, interleaved: bool) -> None:
    """Checks that an activation exists and fits weights [E, N, K]; raises ValueError if not."""
    n = columns(weight)
    if activation not in ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation must be one of {names}, got {activation!r}")
    if is_gated(activation):
        if n % 2:
            raise ValueError(
                f"{name} must have an even N for {activation}, half of it gate rows and half up "
                f"rows, got N = {n}"
            )
    elif interleaved:
        raise ValueError(f"interleaved=True needs a gated activation, got {activation!r}")


def is_n_major(weight: Tensor) -> bool:
    """Whether kernels read these weights as N-major: N dense and not K, in a 16-bit dtype.

    weight [E, N, K].
    """
    return weight.dtype.itemsize == 2 and weight.stride(1) == 1 and weight.stride(2) != 1


def check_packed(name: str, weight: Tensor, like: Tensor, k: int) -> None:
    """Checks packed weights that are multiplied by x of this K; raises as `check_weight` does."""
    if like.dtype is not torch.bfloat16:
        raise TypeError(f"x must be {torch.bfloat16} for packed weights, got {like.dtype}")
    experts, n_blocks, k_blocks, _ = weight.shape
    if k_blocks != -(-k // BLOCK_K) or 0 in (experts, n_blocks):
        raise ValueError(
            f"packed {name} must be [E > 0, N / 32 > 0, {-(-k // BLOCK_K)}, block bytes] for "
            f"K = {k}, got {tuple(weight.shape)}"
        )
    if not weight.is_contiguous():
        raise ValueError(
            f"packed {name} must be a contiguous tensor, got strides {weight.stride()}"
        )
    if weight.get_device() != like.get_device():
        raise ValueError(f"{name} must be on {like.device}, got one on {weight.device}")


def check_weight(
    name: str, weight: Tensor, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Checks the dtype, shape, device and strides of weights [E, N, K].

    shape, dtype: what they must have; like: a tensor on the device they must be on. Raises
    TypeError for the dtype, else ValueError.
    """
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
        # a dense extent that is itself no multiple of 16 bytes is refused later, by why_illegal
        raise ValueError(
            f"{name} must have {either} dense (stride 1) and strides of E and {other} in multiples "
            f"of {to_16} elements (16 bytes), without overlap, got strides {weight.stride()}; "
            f"{name}.contiguous() has them"
        )


def expect(
    name: str,
    tensor: Tensor,
    device: int,
    dtypes: tuple[torch.dtype, ...],
    shapes: tuple[tuple[int, ...], ...],
    dense: bool = True,
) -> None:
    """Checks that a tensor has one of these dtypes and shapes, is on a device, and is contiguous.

    dense: False for a tensor that is read by its strides. device: its CUDA index, or -1 for the
    CPU. Raises TypeError for the dtype, else ValueError.
    """
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.shape not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(tensor.shape)}")
    if dense and not tensor.is_contiguous():
        raise ValueError(f"{name} must be a contiguous tensor, got strides {tensor.stride()}")
    if tensor.get_device() != device:
        wanted = "cpu" if device < 0 else f"cuda:{device}"
        raise ValueError(f"{name} must be on {wanted}, got one on {tensor.device}")
