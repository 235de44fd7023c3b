"""The systems that are compared: one function each, that prepares a case or says why it can't.

A system gets the operands in its own preferred form: whatever it needs done beforehand, and would
be done once per layer or per model in serving (offsets, block tables, weights' layout), is done
before the clock starts. What is charged to whom is said in each function.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch

import cutlass_moe
from cutlass_moe.choose import heuristics_sm90 as heuristics
from perf.product.cases import SCHEDULES, Case
from perf.product.operands import Operands
from perf.suites import DECODE_TOKENS
from perf.timing import quick_us


class Absent(Exception):
    """A system can't be measured here, for the reason given."""


@dataclass(frozen=True)
class Prepared:
    """launch(weight) computes the product once; rows(numbers) reads those rows of it afterwards.

    Row numbers count rows sorted by expert. note: what the system chose, for the record.
    """

    launch: Callable[[torch.Tensor], object]
    rows: Callable[[torch.Tensor], torch.Tensor]
    note: str = ""


def ours(
    case: Case, operands: Operands, flush: torch.Tensor, schedule: str | None = None
) -> Prepared:
    """This library, gather and scales in the kernel, as a user calls it; may name a schedule."""
    out = poisoned(case.rows, operands)
    named = {} if schedule is None else {"schedule": schedule}

    def launch(weight: torch.Tensor) -> None:
        cutlass_moe.grouped_matmul_out(out, operands.x, weight, **operands.options, **named)

    config = heuristics.choose(case.problem, case.x_rows, case.rows / case.num_experts, **named)
    note = " ".join(f"{name}={value}" for name, value in config.to_json().items())
    return Prepared(launch, lambda numbers: out[numbers], note)


def triton_gather(case: Case, operands: Operands, flush: torch.Tensor) -> Prepared:
    """Our Triton kernel, gather and scales inside. Padding the routing is not charged."""
    require("triton")
    from perf.product import triton

    out = poisoned(case.rows, operands)  # in the order of the pairs
    launch, tiling = triton.fastest(case, operands, out, flush)
    return Prepared(launch, lambda numbers: out[operands.order[numbers]], str(tiling))


def torch_grouped(case: Case, operands: Operands, flush: torch.Tensor) -> Prepared:
    """torch's grouped product and, before it, x[index]: what it takes from the same inputs."""
    return _torch(case, operands, lambda: gathered(operands))


def torch_pregathered(case: Case, operands: Operands, flush: torch.Tensor) -> Prepared:
    """torch's grouped product alone: the gather is not charged."""
    rows = gathered(operands)
    return _torch(case, operands, lambda: rows)


def deepgemm(case: Case, operands: Operands, flush: torch.Tensor) -> Prepared:
    """DeepGEMM's contiguous layout. Permuting, padding and laying out the scales are not charged.

    Its scales are per 1x128 of x and 128x128 of the weights: per-token scales fit the former, the
    latter are ones, and the check multiplies by the channels' scales afterwards.
    """
    if case.dtype != "fp8":
        raise Absent("measured with fp8 only")
    deep_gemm = require("deep_gemm")
    alignment = deep_gemm.get_mk_alignment_for_contiguous_layout()
    place, experts, padded = aligned_rows(operands.offsets, alignment)
    x = operands.x.new_zeros((padded, case.k))
    rows_of_x, row_scale = gathered(operands)
    scale = operands.scale
    assert row_scale is not None and scale is not None
    x.view(torch.uint8)[place] = rows_of_x.view(torch.uint8)
    x_scale = torch.zeros((padded, -(-case.k // 128)), device="cuda")
    x_scale[place] = row_scale[:, None]
    x_scale = deep_gemm.get_mn_major_tma_aligned_tensor(x_scale)
    blocks = (case.num_experts, -(-case.n // 128), -(-case.k // 128))
    w_scale = torch.ones(blocks, device="cuda")
    layout = torch.full((padded,), -1, dtype=torch.int32, device="cuda")
    layout[place] = experts
    out = poisoned(padded, operands)

    def launch(weight: torch.Tensor) -> None:
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous((x, x_scale), (weight, w_scale), out, layout)

    def rows(numbers: torch.Tensor) -> torch.Tensor:
        return out[place[numbers]].float() * scale[experts[numbers].long()]

    return Prepared(launch, rows, f"{padded} rows with padding")


def quack(case: Case, operands: Operands, flush: torch.Tensor) -> Prepared:
    """QuACK, gather in the kernel, autotuned at its first launch."""
    if case.dtype != "bf16":
        raise Absent("scales of 8-bit operands are not among its epilogues")
    gemm = require("quack.gemm_interface").gemm
    out = poisoned(case.rows, operands)
    ends = torch.nn.functional.pad(operands.offsets, (1, 0))

    def launch(weight: torch.Tensor) -> None:
        gemm(operands.x, weight.mT, out=out, cu_seqlens_m=ends, A_idx=operands.index)

    return Prepared(launch, lambda numbers: out[numbers])


def padded_bmm(case: Case, operands: Operands, flush: torch.Tensor) -> Prepared:
    """A batched product, each expert's rows padded to the most of any: the fastest of torch's ways.

    Gather and padding are not charged, nor are int8's scales, which torch's product leaves out.
    """
    device = operands.x.device
    ends = operands.offsets.long()
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    most = -(-int(counts.max()) // 16) * 16  # each expert's scales begin on 16 bytes
    names = torch.arange(case.num_experts, device=device)
    experts = torch.repeat_interleave(names, counts)
    shift = names * most - (ends - counts)
    place = torch.arange(case.rows, device=device) + shift[experts]
    rows_of_x, row_scale = gathered(operands)
    x = operands.x.new_zeros((case.num_experts * most, case.k))
    x.view(torch.uint8)[place] = rows_of_x.view(torch.uint8)
    x_scale = None
    if row_scale is not None:
        x_scale = row_scale.new_zeros(len(x)).index_copy(0, place, row_scale)
        x_scale = x_scale.view(case.num_experts, most)
    ways = batched_products(case.dtype, x.view(-1, most, case.k), x_scale, operands.scale)
    best = min(ways, key=lambda way: quick_us(partial(way, operands.weight), flush))
    result: list[torch.Tensor] = []

    def launch(weight: torch.Tensor) -> None:
        result[:] = best(weight)

    def rows(numbers: torch.Tensor) -> torch.Tensor:
        out = torch.cat(result)[place[numbers]]
        if case.dtype != "int8" or row_scale is None or operands.scale is None:
            return out
        return out * row_scale[numbers, None] * operands.scale[experts[numbers]]

    return Prepared(launch, rows, f"{best.__name__}, {most} rows an expert")


def batched_products(
    dtype: str, x: torch.Tensor, x_scale: torch.Tensor | None, scale: torch.Tensor | None
) -> list[Callable[[torch.Tensor], Iterable[torch.Tensor]]]:
    """Functions of weight [E, N, K] that multiply x [E, M, K] with it, each expert's [M, N].

    x_scale [E, M] and scale [E, N] for fp8; int8 gives int32 without scales.
    """
    options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}

    def bmm(weight: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, weight.mT)

    def int_mm(weight: torch.Tensor) -> list[torch.Tensor]:
        return [torch._int_mm(a, b) for a, b in zip(x, weight.mT, strict=True)]

    def scaled_mm(weight: torch.Tensor) -> list[torch.Tensor]:
        each = zip(x, weight.mT, x_scale[:, :, None], scale[:, None], strict=True)
        return [torch._scaled_mm(*operands, **options) for operands in each]

    def scaled_grouped_mm(weight: torch.Tensor) -> torch.Tensor:
        return torch._scaled_grouped_mm(x, weight.mT, x_scale, scale, **options)

    return {"bf16": [bmm], "int8": [int_mm], "fp8": [scaled_mm, scaled_grouped_mm]}[dtype]


def stream(case: Case, operands: Operands, flush: torch.Tensor) -> Prepared:
    """No peer but the yardstick: reads the active weights, which is checked by their sum, and
    computes nothing. Its rows are the reference's."""
    require("triton")
    from perf.product.stream import fastest

    expected = operands.expected()
    launch, share = fastest(operands, flush)
    return Prepared(launch, lambda numbers: expected, str(share))


OURS = "cutlass_moe"
SYSTEMS: dict[str, Callable[[Case, Operands, torch.Tensor], Prepared]] = {
    OURS: ours,
    **{schedule: partial(ours, schedule=schedule) for schedule in SCHEDULES},
    "triton": triton_gather,
    "torch": torch_grouped,
    "torch_gemm": torch_pregathered,
    "deepgemm": deepgemm,
    "quack": quack,
    "padded_bmm": padded_bmm,
    "stream": stream,
}


def usual_systems(case: Case) -> tuple[str, ...]:
    """What a case is measured with unless a run names systems."""
    if case.suite == "schedules":
        return (OURS, *SCHEDULES)
    unusual = {*SCHEDULES, "padded_bmm", "stream"}
    if case.suite == "tutorial":
        unusual.remove("padded_bmm")
    if case.suite == "gemm" and case.tokens <= max(DECODE_TOKENS):
        unusual.remove("stream")
    return tuple(name for name in SYSTEMS if name not in unusual)


def require(module: str) -> ModuleType:
    """The module. Raises Absent where it, or anything it needs, can't be imported."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, AssertionError) as error:  # DeepGEMM asserts that nvcc is there
        raise Absent(f"not importable: {error}") from error


def poisoned(rows: int, operands: Operands) -> torch.Tensor:
    """An output bf16 [rows, N] in which whatever a kernel leaves unwritten is NaN."""
    shape = (rows, operands.weight.shape[1])
    return torch.full(shape, torch.nan, dtype=torch.bfloat16, device=operands.x.device)


def gathered(operands: Operands) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x[index] and its scales: two copies. torch can't index fp8, but its bytes."""
    x, scale, index = operands.x, operands.per_token_scale, operands.tokens
    rows = (x.view(torch.uint8) if x.element_size() == 1 else x)[index].view(x.dtype)
    return rows, None if scale is None else scale[index]


def _torch(
    case: Case,
    operands: Operands,
    gather: Callable[[], tuple[torch.Tensor, torch.Tensor | None]],
) -> Prepared:
    if case.dtype == "int8":
        raise Absent("torch has no grouped product of int8")
    result: list[torch.Tensor] = []

    def launch(weight: torch.Tensor) -> None:
        rows, scale = gather()
        if scale is None or operands.scale is None:
            out = torch._grouped_mm(rows, weight.mT, offs=operands.offsets)
        else:
            out = torch._scaled_grouped_mm(
                rows,
                weight.mT,
                scale,
                operands.scale,
                offs=operands.offsets,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
        result[:] = [out]

    return Prepared(launch, lambda numbers: result[0][numbers])


def aligned_rows(offsets: torch.Tensor, alignment: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Where rows go when each expert's are padded to a multiple of `alignment`.

    offsets int32 [E]. Returns place int64 [rows], the expert of each row int32 [rows], and the
    number of rows with padding. Reads counts on the host.
    """
    counts = torch.diff(offsets.long(), prepend=offsets.new_zeros(1).long())
    padded = (counts + alignment - 1) // alignment * alignment
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
    names = torch.arange(len(offsets), device=offsets.device)
    experts = torch.repeat_interleave(names, counts)
    place = torch.arange(len(experts), device=offsets.device) + shift[experts]
    return place, experts.int(), int(padded.sum())
