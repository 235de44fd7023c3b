"""The systems that are compared: one function each, that prepares a case or says why it can't.

A system gets the operands in its own preferred form: whatever it needs done beforehand, and would
be done once per layer or per model in serving (offsets, block tables, weights' layout), is done
before the clock starts. What is charged to whom is said in each function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import cutlass_moe
from cutlass_moe.choose import heuristics_sm90 as heuristics
from perf.product.cases import DECODE_TOKENS, SCHEDULES, ProductCase
from perf.product.operands import ProductTensors
from perf.systems import OURS, STREAM, TRITON, Absent, require
from perf.timing import quick_us


@dataclass(frozen=True)
class PreparedProduct:
    """launch(weight) computes the product once; rows(numbers) reads those rows of it afterwards.

    Row numbers count rows sorted by expert. note: what the system chose, for the record.
    """

    launch: Callable[[torch.Tensor], object]
    rows: Callable[[torch.Tensor], torch.Tensor]
    note: str = ""


def ours(
    case: ProductCase, tensors: ProductTensors, flush: torch.Tensor, schedule: str | None = None
) -> PreparedProduct:
    """This library, gather and scales in the kernel, as a user calls it; may name a schedule."""
    out = poisoned(case.rows, tensors)
    named: dict[str, Any] = {} if schedule is None else {"schedule": schedule}

    def launch(weight: torch.Tensor) -> None:
        cutlass_moe.grouped_matmul_out(out, tensors.x, weight, **tensors.options, **named)

    config = heuristics.choose(case.problem, case.x_rows, case.rows / case.num_experts, **named)
    note = " ".join(f"{name}={value}" for name, value in config.to_json().items())
    return PreparedProduct(launch, lambda numbers: out[numbers], note)


def triton_gather(
    case: ProductCase, tensors: ProductTensors, flush: torch.Tensor
) -> PreparedProduct:
    """Our Triton kernel, gather and scales inside. Padding the routing is not charged."""
    require("triton")
    from perf.product import triton

    out = poisoned(case.rows, tensors)  # in the order of the pairs
    launch, tiling = triton.fastest(case, tensors, out, flush)
    return PreparedProduct(launch, lambda numbers: out[tensors.order[numbers]], str(tiling))


def torch_grouped(
    case: ProductCase, tensors: ProductTensors, flush: torch.Tensor
) -> PreparedProduct:
    """torch's grouped product and, before it, x[index]: what it takes from the same inputs."""
    return _torch(case, tensors, lambda: gathered(tensors))


def torch_pregathered(
    case: ProductCase, tensors: ProductTensors, flush: torch.Tensor
) -> PreparedProduct:
    """torch's grouped product alone: the gather is not charged."""
    rows = gathered(tensors)
    return _torch(case, tensors, lambda: rows)


def deepgemm(case: ProductCase, tensors: ProductTensors, flush: torch.Tensor) -> PreparedProduct:
    """DeepGEMM's contiguous layout. Permuting, padding and laying out the scales are not charged.

    Its scales are per 1x128 of x and 128x128 of the weights: per-token scales fit the former, the
    latter are ones, and the check multiplies by the channels' scales afterwards.
    """
    if case.dtype != "fp8":
        raise Absent("measured with fp8 only")
    deep_gemm = require("deep_gemm")
    alignment = deep_gemm.get_mk_alignment_for_contiguous_layout()
    targets, experts, padded = aligned_rows(tensors.offsets, alignment)
    x = tensors.x.new_zeros((padded, case.k))
    rows_of_x, row_scale = gathered(tensors)
    scale = tensors.scale
    assert row_scale is not None and scale is not None
    x.view(torch.uint8)[targets] = rows_of_x.view(torch.uint8)
    x_scale = torch.zeros((padded, -(-case.k // 128)), device="cuda")
    x_scale[targets] = row_scale[:, None]
    x_scale = deep_gemm.get_mn_major_tma_aligned_tensor(x_scale)
    blocks = (case.num_experts, -(-case.n // 128), -(-case.k // 128))
    w_scale = torch.ones(blocks, device="cuda")
    layout = torch.full((padded,), -1, dtype=torch.int32, device="cuda")
    layout[targets] = experts
    out = poisoned(padded, tensors)

    def launch(weight: torch.Tensor) -> None:
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous((x, x_scale), (weight, w_scale), out, layout)

    def rows(numbers: torch.Tensor) -> torch.Tensor:
        return out[targets[numbers]].float() * scale[experts[numbers].long()]

    return PreparedProduct(launch, rows, f"{padded} rows with padding")


def quack(case: ProductCase, tensors: ProductTensors, flush: torch.Tensor) -> PreparedProduct:
    """QuACK, gather in the kernel, autotuned at its first launch."""
    if case.dtype != "bf16":
        raise Absent("scales of 8-bit operands are not among its epilogues")
    gemm = require("quack.gemm_interface").gemm
    out = poisoned(case.rows, tensors)
    ends = torch.nn.functional.pad(tensors.offsets, (1, 0))

    def launch(weight: torch.Tensor) -> None:
        gemm(tensors.x, weight.mT, out=out, cu_seqlens_m=ends, A_idx=tensors.index)

    return PreparedProduct(launch, lambda numbers: out[numbers])


def padded_bmm(case: ProductCase, tensors: ProductTensors, flush: torch.Tensor) -> PreparedProduct:
    """A batched product, each expert's rows padded to the most of any: the fastest of torch's ways.

    Gather and padding are not charged, nor are int8's scales, which torch's product leaves out.
    """
    device = tensors.x.device
    ends = tensors.offsets.long()
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    most = -(-int(counts.max()) // 16) * 16  # each expert's scales begin on 16 bytes
    names = torch.arange(case.num_experts, device=device)
    experts = torch.repeat_interleave(names, counts)
    shift = names * most - (ends - counts)
    targets = torch.arange(case.rows, device=device) + shift[experts]
    rows_of_x, row_scale = gathered(tensors)
    x = tensors.x.new_zeros((case.num_experts * most, case.k))
    x.view(torch.uint8)[targets] = rows_of_x.view(torch.uint8)
    x_scale = None
    if row_scale is not None:
        x_scale = row_scale.new_zeros(len(x)).index_copy(0, targets, row_scale)
        x_scale = x_scale.view(case.num_experts, most)
    ways = batched_products(case.dtype, x.view(-1, most, case.k), x_scale, tensors.scale)
    best = min(ways, key=lambda way: quick_us(partial(way, tensors.weight), flush))
    result: list[torch.Tensor] = []

    def launch(weight: torch.Tensor) -> None:
        result[:] = best(weight)

    def rows(numbers: torch.Tensor) -> torch.Tensor:
        out = torch.cat(result)[targets[numbers]]
        if case.dtype != "int8" or row_scale is None or tensors.scale is None:
            return out
        return out * row_scale[numbers, None] * tensors.scale[experts[numbers]]

    return PreparedProduct(launch, rows, f"{best.__name__}, {most} rows an expert")


def batched_products(
    dtype: str, x: torch.Tensor, x_scale: torch.Tensor | None, scale: torch.Tensor | None
) -> list[Callable[[torch.Tensor], Iterable[torch.Tensor]]]:
    """Functions of weight [E, N, K] that multiply x [E, M, K] with it, each expert's [M, N].

    x_scale [E, M] and scale [E, N] for fp8; int8 gives int32 without scales.
    """

    def bmm(weight: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, weight.mT)

    def int_mm(weight: torch.Tensor) -> list[torch.Tensor]:
        return [torch._int_mm(a, b) for a, b in zip(x, weight.mT, strict=True)]

    if dtype == "fp8":
        assert x_scale is not None and scale is not None
        return scaled_products(x, x_scale, scale)
    return [bmm] if dtype == "bf16" else [int_mm]


def scaled_products(
    x: torch.Tensor, x_scale: torch.Tensor, scale: torch.Tensor
) -> list[Callable[[torch.Tensor], Iterable[torch.Tensor]]]:
    """The same of fp8."""
    options: dict[str, Any] = {"out_dtype": torch.bfloat16, "use_fast_accum": True}

    def scaled_mm(weight: torch.Tensor) -> list[torch.Tensor]:
        each = zip(x, weight.mT, x_scale[:, :, None], scale[:, None], strict=True)
        return [torch._scaled_mm(*operands, **options) for operands in each]

    def scaled_grouped_mm(weight: torch.Tensor) -> torch.Tensor:
        return torch._scaled_grouped_mm(x, weight.mT, x_scale, scale, **options)

    return [scaled_mm, scaled_grouped_mm]


def stream(case: ProductCase, tensors: ProductTensors, flush: torch.Tensor) -> PreparedProduct:
    """No peer but the yardstick: reads the active weights, which is checked by their sum, and
    computes nothing. Its rows are the reference's."""
    require("triton")
    from perf.product.stream import fastest

    expected = tensors.expected()
    launch, share = fastest(tensors, flush)
    return PreparedProduct(launch, lambda numbers: expected, str(share))


SYSTEMS: dict[str, Callable[[ProductCase, ProductTensors, torch.Tensor], PreparedProduct]] = {
    OURS: ours,
    **{schedule: partial(ours, schedule=schedule) for schedule in SCHEDULES},
    TRITON: triton_gather,
    "torch": torch_grouped,
    "torch_gemm": torch_pregathered,
    "deepgemm": deepgemm,
    "quack": quack,
    "padded_bmm": padded_bmm,
    STREAM: stream,
}


def usual_systems(case: ProductCase) -> tuple[str, ...]:
    """What a case is measured with unless a run names systems."""
    if case.suite == "schedules":
        return (OURS, *SCHEDULES)
    unusual = {*SCHEDULES, "padded_bmm", STREAM}
    if case.suite == "tutorial":
        unusual.remove("padded_bmm")
    if case.suite == "gemm" and case.tokens <= max(DECODE_TOKENS):
        unusual.remove(STREAM)
    return tuple(name for name in SYSTEMS if name not in unusual)


def poisoned(rows: int, tensors: ProductTensors) -> torch.Tensor:
    """An output bf16 [rows, N] in which whatever a kernel leaves unwritten is NaN."""
    shape = (rows, tensors.weight.shape[1])
    return torch.full(shape, torch.nan, dtype=torch.bfloat16, device=tensors.x.device)


def gathered(tensors: ProductTensors) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x[index] and its scales: two copies. torch can't index fp8, but its bytes."""
    x, scale, index = tensors.x, tensors.per_token_scale, tensors.tokens
    rows = (x.view(torch.uint8) if x.element_size() == 1 else x)[index].view(x.dtype)
    return rows, None if scale is None else scale[index]


def _torch(
    case: ProductCase,
    tensors: ProductTensors,
    gather: Callable[[], tuple[torch.Tensor, torch.Tensor | None]],
) -> PreparedProduct:
    if case.dtype == "int8":
        raise Absent("torch has no grouped product of int8")
    result: list[torch.Tensor] = []

    def launch(weight: torch.Tensor) -> None:
        rows, scale = gather()
        if scale is None or tensors.scale is None:
            out = torch._grouped_mm(rows, weight.mT, offs=tensors.offsets)
        else:
            out = torch._scaled_grouped_mm(
                rows,
                weight.mT,
                scale,
                tensors.scale,
                offs=tensors.offsets,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
        result[:] = [out]

    return PreparedProduct(launch, lambda numbers: result[0][numbers])


def aligned_rows(offsets: torch.Tensor, alignment: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Where rows go when each expert's are padded to a multiple of `alignment`.

    offsets int32 [E]. Returns each row's target int64 [rows] and its expert int32 [rows], and the
    number of rows with padding. Reads counts on the host.
    """
    counts = torch.diff(offsets.long(), prepend=offsets.new_zeros(1).long())
    padded = (counts + alignment - 1) // alignment * alignment
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
    names = torch.arange(len(offsets), device=offsets.device)
    experts = torch.repeat_interleave(names, counts)
    targets = torch.arange(len(experts), device=offsets.device) + shift[experts]
    return targets, experts.int(), int(padded.sum())
