"""From a call's arguments to a launch: checked and chosen once a signature, enqueued every time."""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cutlass_moe import kernels
from cutlass_moe.arguments import Operands, Options, check, check_out, pose, product_shape
from cutlass_moe.launch import GemmKernel
from emitters.legality import why_illegal
from emitters.problem import gate_strides


class Call(NamedTuple):
    """What is known of a call before its addresses are: all that its signature decides."""

    shape: tuple[int, int]
    dtype: torch.dtype
    kernel: GemmKernel | None  # None: the reference
    grid: int


_calls: dict[tuple[Any, ...], Call] = {}
_MAX_CALLS = 8192


def find_call(operands: Operands, out: Tensor | None, options: Options) -> Call:
    """Checks arguments and chooses a kernel, once a signature: dtypes, shapes, strides, devices."""
    signature: list[Any] = [*options, kernels.forced]
    for tensor in (out, *operands):
        if tensor is None:
            signature.append(None)
        else:
            signature += (tensor.dtype, tensor.shape, tensor.stride(), tensor.get_device())
    key = tuple(signature)
    call = _calls.get(key)
    if call is None:
        if out is not None and options.out_dtype is None:
            options = options._replace(out_dtype=out.dtype)
        dtype = check(operands, options)
        if out is not None:
            check_out(out, operands, options, dtype)
        call = _choose(operands, dtype, options)
        if call.kernel is not None or not operands.x.is_cuda:  # else the fallback is told each time
            if len(_calls) >= _MAX_CALLS:
                _calls.clear()
            _calls[key] = call
    return call


def _choose(operands: Operands, dtype: torch.dtype, options: Options) -> Call:
    shape = product_shape(operands, options)
    device = operands.x.get_device()
    if device < 0 or operands.rows == 0:
        return Call(shape, dtype, None, 0)
    problem = pose(operands, dtype, options.accumulation, options.activation_node)
    reason = why_illegal(problem, arch=kernels.device_arch(device))
    if reason is not None:
        announce_fallback(reason)
        return Call(shape, dtype, None, 0)
    plan = kernels.plan(problem, device, operands.x.shape[0], operands.rows, options)
    return Call(shape, dtype, *plan)


def enqueue(
    kernel: GemmKernel,
    grid: int,
    out: Tensor,
    operands: Operands,
    *,
    table: int = 0,
    interleaved: bool = False,
) -> None:
    """Launches the kernel of checked arguments on torch's current stream; returns at once.

    table: address of E tensor maps on the device, which a kernel of unstacked weights reads instead
    of `operands.weight`. interleaved: as in `grouped_matmul`.
    """
    x, weight, index, offsets, per_token_scale, scale, bias, starts = operands
    device, rows = out.get_device(), out.shape[0]
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            enqueue(kernel, grid, out, operands, table=table, interleaved=interleaved)
        return
    values = [table, x.data_ptr()]
    if index is not None:
        values.append(index.data_ptr())
    out_pointer = out.data_ptr()
    values += (
        0 if starts is None else starts.data_ptr(),
        offsets.data_ptr(),
        out_pointer,
        0,  # its tensor map
        x.shape[0],
        rows,
    )
    if kernel.problem.gated:
        values += gate_strides(weight.shape[1], interleaved)
    if per_token_scale is not None:
        values.append(per_token_scale.data_ptr())
    for tensor in (scale, bias):
        if tensor is not None:
            values.append(tensor.data_ptr())
            if values[-1] % 8:
                raise ValueError("scale and bias: expected addresses in multiples of 8 bytes")
    weight_pointer = table or weight.data_ptr()
    if (values[1] | out_pointer | weight_pointer) % 16:
        raise ValueError("x, weight and out: expected addresses in multiples of 16 bytes")
    stream = torch._C._cuda_getCurrentRawStream(device)
    weights = None if table else (weight_pointer, weight.stride(), interleaved)
    kernel.launch_gemm(values, weights, (out_pointer, rows), grid, stream)


def announce_fallback(reason: str) -> None:
    """Once a reason: a warning. Under capture, or with CUTLASS_MOE_STRICT=1: an error."""
    if os.environ.get("CUTLASS_MOE_STRICT") == "1":
        raise RuntimeError(f"no kernel for this problem (CUTLASS_MOE_STRICT=1): {reason}")
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"no kernel for this problem, and the torch path cannot be captured: {reason}"
        )
    _warn_once(reason)


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"no kernel for this problem, slow torch path taken: {reason}", stacklevel=2)
