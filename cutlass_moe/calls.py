"""From a call's arguments to a launch: checked and chosen once a signature, enqueued every time."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cutlass_moe import heuristics, kernels
from cutlass_moe.arguments import Operands, Options, check, check_out, pose, product_shape
from cutlass_moe.cache import MissingImage
from cutlass_moe.launch import GemmKernel, Kernel, WeightView
from emitters.legality import why_illegal
from emitters.problem import GemmProblem, gate_strides
from emitters.steps import Step


class Call(NamedTuple):
    """What is known of a call before its addresses are: all that its signature decides."""

    shape: tuple[int, int]
    dtype: torch.dtype
    kernel: GemmKernel | None  # None: the reference
    grid: int


_calls: dict[tuple[Any, ...], Call] = {}
_MAX_CALLS = 8192


def signature(others: tuple[Any, ...], tensors: Iterable[Tensor | None]) -> tuple[Any, ...]:
    """What decides a kernel: `others`, and dtypes, shapes, strides and devices of the tensors."""
    found: list[Any] = [*others]
    for tensor in tensors:
        if tensor is None:
            found.append(None)
        else:
            found += (tensor.dtype, tensor.shape, tensor.stride(), tensor.get_device())
    return tuple(found)


def find_call(operands: Operands, out: Tensor | None, options: Options) -> Call:
    """Checks arguments and chooses a kernel, once a signature: dtypes, shapes, strides, devices."""
    key = signature((*options, kernels.forced), (out, *operands))
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
    device = out.get_device()
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            enqueue(kernel, grid, out, operands, table=table, interleaved=interleaved)
        return
    stream = torch._C._cuda_getCurrentRawStream(device)
    values = parameters(kernel.problem, out, operands, table=table, interleaved=interleaved)
    kernel.launch_gemm(*values, grid, stream)


def parameters(
    problem: GemmProblem, out: Tensor, operands: Operands, *, table: int = 0, interleaved: bool
) -> tuple[list[int], WeightView | None, tuple[int, int]]:
    """The first three arguments of `GemmKernel.launch_gemm`; those of this as of `enqueue`."""
    x, weight, index, offsets, per_token_scale, scale, bias, starts = operands
    rows = out.shape[0]
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
        0,  # early
    )
    if problem.gated:
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
    weights = None if table else WeightView(weight_pointer, weight.stride(), interleaved)
    return values, weights, (out_pointer, rows)


def step_kernel(problem: Step, device: int, few: bool = False) -> Kernel | None:
    """None, and a warning, where there is no kernel and the op's torch path must do.

    few: as of `step_config`. Raises what `kernels.load` raises but MissingImage.
    """
    reason = why_illegal(problem, arch=kernels.device_arch(device))
    if reason is None:
        try:
            return kernels.load(problem, heuristics.step_config(problem, few), device)
        except MissingImage as error:
            reason = str(error)
    announce_fallback(reason, capturable=True)
    return None


def launch_step(
    kernel: Kernel, values: list[int], grid: int, device: int, overlap: bool = False
) -> None:
    """On torch's current stream of the device."""
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            launch_step(kernel, values, grid, device, overlap)
        return
    kernel.launch(values, grid, torch._C._cuda_getCurrentRawStream(device), overlap)


def announce_fallback(reason: str, capturable: bool = False) -> None:
    """Once a reason: a warning. With CUTLASS_MOE_STRICT=1, or under capture unless the torch path
    is capturable: an error."""
    if os.environ.get("CUTLASS_MOE_STRICT") == "1":
        raise RuntimeError(f"no kernel for this problem (CUTLASS_MOE_STRICT=1): {reason}")
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    if capturing and not capturable:
        raise RuntimeError(
            f"no kernel for this problem, and the torch path cannot be captured: {reason}"
        )
    _warn_once(reason)


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"no kernel for this problem, slow torch path taken: {reason}", stacklevel=2)
