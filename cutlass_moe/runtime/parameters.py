"""The values of a kernel's parameters."""

from __future__ import annotations

from torch import Tensor

from cutlass_moe.operands import Operands
from cutlass_moe.runtime.tensor_map import WeightView
from emitters.spec.gemm import GemmProblem
from emitters.spec.weight_map import gate_strides


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
