"""Checks of arguments: of grouped_matmul, with what kernels read where it lies, and of tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cutlass_moe.operands import DTYPES, FLOATS, Operands, Options, clamped_numbers
from cutlass_moe.ops._copies import as_int32, refuse_misaligned, token_scale, weight_scale
from cutlass_moe.ops._packed import block_sizes, columns, packing_of
from cutlass_moe.ops.activations import ACTIVATIONS, is_gated
from cutlass_moe.ops.block_scales import block_shapes, is_block_scaled
from emitters.spec.dtypes import ACCUMULATIONS
from emitters.spec.gemm import K_BLOCK
from emitters.spec.packing import BLOCK_K
from emitters.spec.staged_sm90 import Schedule

_ACCUMULATIONS = {
    dtype: tuple(map(str, ACCUMULATIONS[operand]))
    for dtype, operand in DTYPES.items()
    if operand in ACCUMULATIONS
}
_SCHEDULES = tuple(map(str, Schedule))
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FLOAT32, _INT32 = (torch.float32,), (torch.int32,)


class TensorMeta(NamedTuple):
    """A tensor that is not there yet."""

    shape: tuple[int, int]
    dtype: torch.dtype


def accept(operands: Operands, options: Options, out: Tensor | None = None) -> TensorMeta | None:
    """Checks arguments as `check` does, unless some tensor must be copied first: then returns None.

    Kernels read the operands of a call that is accepted, and write `out`, where they lie. Raises
    ValueError too for weights at an address that kernels can't read.
    """
    if not reads_in_place(operands) or not (out is None or out.is_contiguous()):
        return None
    product = check(operands, options, out)
    refuse_misaligned("weight", operands.weight)
    return product


def reads_in_place(operands: Operands) -> bool:
    """Whether kernels read all of these operands where they lie, but for their addresses."""
    return all(a is b for a, b in zip(readable(operands), operands, strict=True))


def readable(operands: Operands) -> Operands:
    """The operands of `grouped_matmul` as kernels read them; weight stays what it is.

    x as `reads_rows` says; bias contiguous; scales contiguous float32 [T], [T, 1], [E, N],
    [E, N, 1] or [E], or [E, blocks of N, K / 128] beside [T, K / 128], which may have any strides;
    index, offsets and starts contiguous int32. What can't be made so stays, for
    `check` to refuse. Extents may be symbolic.
    """
    x, weight, index, offsets, per_token_scale, scale, bias, starts = operands
    if x.dim() != 2 or weight.dim() not in (3, 4):
        return operands
    return Operands(
        x if reads_rows(x) else x.contiguous(),
        weight,
        None if index is None else as_int32(index),
        as_int32(offsets),
        None if per_token_scale is None else token_scale(per_token_scale, x.shape[0]),
        None if scale is None else weight_scale(scale, weight.shape[0]),
        None if bias is None else bias.contiguous(),
        None if starts is None else as_int32(starts),
    )


def reads_rows(x: Tensor) -> bool:
    """Whether kernels read these rows of x [T, K] where they lie: each contiguous, at a stride.

    Addresses aside. The stride of rows is a multiple of 16 bytes, and fewer than 2**31 of them.
    """
    if x.is_contiguous():
        return True
    if x.dim() != 2 or x.stride(1) != 1:
        return False
    stride = x.stride(0) * x.dtype.itemsize
    return 0 < stride < 2**31 and stride % 16 == 0


def product_shape(operands: Operands, options: Options) -> tuple[int, int]:
    """The shape of the product: [rows, N], or [rows, N / 2] if the activation is gated."""
    x, index, n = operands.x, operands.index, columns(operands.weight)
    rows = x.shape[0] if index is None else index.shape[0]
    return rows, n // 2 if is_gated(options.activation) else n


def check(operands: Operands, options: Options, out: Tensor | None = None) -> TensorMeta:
    """Checks the arguments of `grouped_matmul`, or of `grouped_matmul_out`; returns the product.

    out: may have any strides. Extents may be symbolic. Raises ValueError or TypeError that says
    what must be and what came.
    """
    x, weight, index, offsets, _, _, bias, starts = operands
    activation, interleaved = options.activation, options.interleaved
    clamped_numbers(activation, options.limit, options.alpha, options.beta)
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
        if x.dtype is not torch.bfloat16:
            raise TypeError(f"x must be {torch.bfloat16} for packed weights, got {x.dtype}")
        check_packed("weight", weight, device, x.shape[1])
    else:
        check_weight("weight", weight, device, (*weight.shape[:2], x.shape[1]), x.dtype)
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
    _check_schedule(options)
    check_accumulation(options.accumulation, x.dtype)
    dtype = options.out_dtype if out is None else options.out_dtype or out.dtype
    if dtype is None:
        dtype = torch.bfloat16 if x.dtype.itemsize == 1 else x.dtype
    if dtype not in FLOATS:
        raise TypeError(f"out_dtype must be bfloat16, float16 or float32, got {dtype}")
    shape = product_shape(operands, options)
    if out is not None:
        expect("out", out, device, (dtype,), (shape,), dense=False)
    return TensorMeta(shape, dtype)


def _check_schedule(options: Options) -> None:
    expected_rows, num_sms, schedule = options.expected_rows, options.num_sms, options.schedule
    if expected_rows is not None and expected_rows < 0:
        raise ValueError(f"expected_rows must be 0 or more, got {expected_rows}")
    if num_sms is not None and num_sms < 1:
        raise ValueError(f"num_sms must be a positive number, got {num_sms}")
    if schedule is not None and schedule not in _SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(_SCHEDULES)}, got {schedule!r}")


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
    blocks = is_block_scaled(scale, weight, gated)
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


def check_packed(name: str, weight: Tensor, device: int, k: int) -> None:
    """Checks packed weights that are multiplied by x of this K; raises as `check_weight` does."""
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
    _check_device(name, weight, device)


def check_weight(
    name: str, weight: Tensor, device: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Checks the dtype, shape, device and strides of weights [E, N, K].

    shape, dtype: what they must have; device: as in `expect`. Raises TypeError for the dtype, else
    ValueError.
    """
    if weight.dtype is not dtype:
        raise TypeError(f"{name} must be {dtype}, got {weight.dtype}")
    if weight.shape != shape or shape[0] == 0:
        raise ValueError(f"{name} must be [E > 0, N, K] {tuple(shape)}, got {tuple(weight.shape)}")
    _check_device(name, weight, device)
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
    _check_device(name, tensor, device)


def _check_device(name: str, tensor: Tensor, device: int) -> None:
    if tensor.get_device() != device:
        wanted = "cpu" if device < 0 else f"cuda:{device}"
        raise ValueError(f"{name} must be on {wanted}, got one on {tensor.device}")
