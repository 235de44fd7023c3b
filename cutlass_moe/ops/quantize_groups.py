"""8-bit quantisation with scales that vary along K: one per 128 of a row, one per block of weights.

These are the formats of DeepSeek-V3's FP8 checkpoints and of those that follow it: activations
quantised by 1 x 128, weights by 128 x 128 (`weight_block_size` in config.json).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cutlass_moe.operands import DTYPES
from cutlass_moe.ops._define import define
from cutlass_moe.ops._types import check_types, typed
from cutlass_moe.ops.block_scales import BLOCKS
from cutlass_moe.ops.dispatch import launch_step, step_kernel
from cutlass_moe.ops.quantize import LARGEST, check_values
from cutlass_moe.runtime.parameters import column_stride, quantize_groups_values
from emitters.spec.gemm import K_BLOCK
from emitters.spec.layer_steps import QuantizeGroupsProblem

_E4M3 = torch.float8_e4m3fn


def quantize_per_token_group(
    x: Tensor,
    dtype: torch.dtype = _E4M3,
    *,
    power_of_two: bool = False,
    column_major: bool = False,
) -> tuple[Tensor, Tensor]:
    """Quantises each 128 values of a row of x to 8 bits with a scale of their own.

      scale[t, b] = max |x[t, 128 b : 128 b + 128]| / largest, or 1 for zeros
      q[t, k] = x[t, k] / scale[t, k / 128], to nearest, ties to even

    x [T, K]: bfloat16, float16 or float32; the last group of a row may be shorter. dtype:
    torch.float8_e4m3fn, torch.float8_e5m2 or torch.int8, with largest 448, 57344 and 127.
    power_of_two: scales are rounded up to powers of two (DeepSeek-V3.1's UE8M0, still float32).
    column_major: neighbours in memory are the scales of neighbouring tokens, and columns start at
    multiples of 16 bytes; the shape stays. `grouped_matmul` without an index is faster with these,
    and DeepGEMM reads them.

    Returns (q [T, K] of `dtype`, scale float32 [T, K / 128, rounded up]), which `grouped_matmul`
    takes as x and per_token_scale. A group with an infinity or a NaN gets a scale that is not
    finite either. Raises TypeError for other dtypes, ValueError if x is not [T, K] or requires a
    gradient.
    """
    try:
        if x.dim() != 2:
            raise ValueError(f"x must be [T, K], got {list(x.shape)}")
        check_values(x, dtype)
        if type(power_of_two) is not bool or type(column_major) is not bool:  # torch takes numbers
            raise TypeError
        return _quantize_op(x, dtype, power_of_two, column_major)
    except Exception:
        check_types(quantize_per_token_group, locals())
        raise


@typed
def quantize_per_token_group_reference(
    x: Tensor,
    dtype: torch.dtype = _E4M3,
    *,
    power_of_two: bool = False,
    column_major: bool = False,
) -> tuple[Tensor, Tensor]:
    """`quantize_per_token_group` in plain PyTorch; gives the same bits for every finite group.

    x [..., K] may have any number of dimensions.
    """
    k = x.shape[-1]
    groups = functional.pad(x.float(), (0, -k % K_BLOCK)).unflatten(-1, (-1, K_BLOCK))
    scale = _scale(groups.abs().amax(-1), dtype, power_of_two)
    q = _divide(groups, scale[..., None], dtype).flatten(-2)[..., :k]
    if column_major:
        scale = _new_scale(scale, scale.shape, column_major).copy_(scale)
    return q.contiguous(), scale


@typed
def quantize_per_block(
    weight: Tensor,
    dtype: torch.dtype = _E4M3,
    *,
    rows: int = 128,
    gated: bool = False,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor]:
    """Quantises each block of so many rows x 128 columns of experts' weights to 8 bits.

    weight [E, N, K], bfloat16, float16 or float32 -> (q [E, N, K] of `dtype`, scale float32
    [E, blocks of N, K / 128]), which `grouped_matmul` takes as weight and scale. Blocks at the end
    of N and K may be smaller. rows: 128, or 64 or 32, for shares of a layer that cut a block.
    gated: weight is [gates; ups], and each half has blocks of its own; where I is a multiple of
    `rows` that changes nothing. dtype, power_of_two and errors: as in `quantize_per_token_group`.
    """
    if weight.dim() != 3:
        raise ValueError(f"weight must be [E, N, K], got {list(weight.shape)}")
    if rows not in BLOCKS:
        raise ValueError(f"rows must be one of {', '.join(map(str, BLOCKS))}, got {rows}")
    if gated and weight.shape[1] % 2:
        raise ValueError(f"weight must have as many gates as ups, got N = {weight.shape[1]}")
    check_values(weight, dtype)
    if gated:
        halves = (
            quantize_per_block(half, dtype, rows=rows, power_of_two=power_of_two)
            for half in weight.chunk(2, 1)
        )
        values, scales = zip(*halves, strict=True)
        return torch.cat(values, 1), torch.cat(scales, 1)
    experts, n, k = weight.shape
    q = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    scale = weight.new_empty((experts, -(-n // rows), -(-k // K_BLOCK)), dtype=torch.float32)
    for e in range(experts):  # one expert's float32 copy at a time
        padded = functional.pad(weight[e].float(), (0, -k % K_BLOCK, 0, -n % rows))
        blocks = padded.unflatten(1, (-1, K_BLOCK)).unflatten(0, (-1, rows)).transpose(1, 2)
        scale[e] = _scale(blocks.abs().amax((2, 3)), dtype, power_of_two)
        whole = _divide(blocks, scale[e][..., None, None], dtype).transpose(1, 2)
        q[e] = whole.reshape(padded.shape)[:n, :k]
    return q, scale


def _scale(magnitude: Tensor, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    """The scales of groups with these largest magnitudes."""
    # divides by a tensor, because CUDA's division by a number multiplies by its reciprocal
    scale = magnitude / torch.full((), LARGEST[dtype], device=magnitude.device)
    scale = scale.where(scale != 0, 1.0)
    if power_of_two:
        bits = scale.view(torch.int32)
        rounded = ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)
        scale = rounded.where(scale.isfinite(), scale)
    return scale


def _divide(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    scaled = (values / scale).clamp_(-LARGEST[dtype], LARGEST[dtype])
    if dtype == torch.int8:
        scaled.round_()  # ties to even; the conversion alone would truncate
    return scaled.to(dtype)


def _quantize_cpu(
    x: Tensor, dtype: torch.dtype, power_of_two: bool, column_major: bool
) -> tuple[Tensor, Tensor]:
    return quantize_per_token_group_reference(
        x, dtype, power_of_two=power_of_two, column_major=column_major
    )


def _quantize_fake(
    x: Tensor, dtype: torch.dtype, power_of_two: bool, column_major: bool
) -> tuple[Tensor, Tensor]:
    rows, groups = x.shape[0], -(-x.shape[1] // K_BLOCK)
    return x.new_empty(x.shape, dtype=dtype), _new_scale(x, (rows, groups), column_major)


def _new_scale(like: Tensor, shape: tuple[int, ...], column_major: bool) -> Tensor:
    """Memory for a scale [..., T, K / 128] on the device of a tensor."""
    *others, rows, groups = shape
    if not column_major:
        return like.new_empty(shape, dtype=torch.float32)
    columns = like.new_empty((*others, groups, column_stride(rows)), dtype=torch.float32)
    return columns[..., :rows].mT


def _quantize_cuda(
    x: Tensor, dtype: torch.dtype, power_of_two: bool, column_major: bool
) -> tuple[Tensor, Tensor]:
    rows, k = x.shape
    problem = QuantizeGroupsProblem(DTYPES[x.dtype], DTYPES[dtype], k)
    if x.numel() == 0 or rows * problem.groups >= 2**31:
        return _quantize_cpu(x, dtype, power_of_two, column_major)
    if x.stride(1) != 1 or x.stride(0) * x.element_size() % 16 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    kernel = step_kernel(problem, x.get_device())
    if kernel is None:
        return _quantize_cpu(x, dtype, power_of_two, column_major)
    q, scale = _quantize_fake(x, dtype, power_of_two, column_major)
    values = quantize_groups_values(
        {"source": x.data_ptr(), "q": q.data_ptr(), "scale": scale.data_ptr()},
        rows,
        x.stride(0) * x.element_size(),
        scale.stride(),
        power_of_two=power_of_two,
    )
    launch_step(kernel, values, problem.ctas(rows, kernel.record.threads), x.get_device())
    return q, scale


_quantize_op = define(
    "quantize_per_token_group(Tensor x, ScalarType dtype, bool power_of_two, bool column_major) "
    "-> (Tensor, Tensor)",
    _quantize_cpu,
    _quantize_fake,
    cuda=_quantize_cuda,
)
