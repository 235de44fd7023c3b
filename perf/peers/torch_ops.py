"""torch's own grouped product, and a padded batched one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch

from perf.operands import ProductInputs, Scale
from perf.peers.prepared import Absent, Prepared, Quick, only

FP8 = {"out_dtype": torch.bfloat16, "use_fast_accum": True}


def grouped(inputs: ProductInputs, quick: Quick) -> Prepared:
    """The gather of up is charged: torch takes rows in order."""
    only(inputs, "fp8", "bf16")
    w, scale, result, ready = inputs.weight.w, inputs.weight.scale, [], inputs.gathered()

    def launch() -> None:
        x, x_scale = inputs.gathered() if inputs.case.part == "up" else ready
        if x_scale is None:
            out = torch._grouped_mm(x, w.mT, offs=inputs.ends)
        else:
            out = torch._scaled_grouped_mm(x, w.mT, x_scale, scale, offs=inputs.ends, **FP8)
        result[:] = [out]

    return Prepared(launch, lambda rows: result[0][rows])


def padded_bmm(inputs: ProductInputs, quick: Quick) -> Prepared:
    """Every expert's rows padded to the most of any, in steps of 16: the faster of torch's ways.

    Neither gather nor padding is charged, nor int8's scales and its conversion from int32.
    """
    case, w = inputs.case, inputs.weight.w
    if case.suite != "tutorial":
        raise Absent("measured on the tutorial's shapes only")
    most = -(-int(inputs.counts.max()) // 16) * 16  # each expert's scales begin on 16 bytes
    within = (
        torch.arange(case.rows, device=w.device) - (inputs.ends - inputs.counts)[inputs.expert_of]
    )
    targets = inputs.expert_of * most + within
    rows, row_scale = inputs.gathered()
    x = rows.new_zeros((case.num_experts * most, inputs.k))
    x.view(torch.uint8)[targets] = rows.view(torch.uint8)
    x_scale = None
    if row_scale is not None:
        x_scale = row_scale.new_zeros(len(x)).index_copy(0, targets, row_scale)
        x_scale = x_scale.view(case.num_experts, most)
    ways = _ways(case.dtype, x.view(case.num_experts, most, -1), x_scale, w, inputs.weight.scale)
    best = min(ways, key=quick) if len(ways) > 1 else ways[0]
    result: list[torch.Tensor] = []

    def launch() -> None:
        result[:] = best()

    def read(numbers: torch.Tensor) -> torch.Tensor:
        out = torch.cat(result)[targets[numbers]]
        if case.dtype != "int8" or row_scale is None or inputs.weight.scale is None:
            return out
        experts = inputs.expert_of[numbers]
        return out * row_scale[numbers, None] * inputs.weight.scale[experts]

    return Prepared(launch, read, f"{most} rows an expert")


def _ways(
    dtype: str, x: torch.Tensor, x_scale: Scale, w: torch.Tensor, scale: Scale
) -> list[Callable[[], Iterable[torch.Tensor]]]:
    """Functions that multiply x [E, M, K] with w [E, N, K], each expert's [M, N]."""
    if dtype == "bf16":
        return [partial(torch.bmm, x, w.mT)]
    if dtype == "int8":
        return [lambda: [torch._int_mm(a, b) for a, b in zip(x, w.mT, strict=True)]]
    assert x_scale is not None and scale is not None
    each = list(zip(x, w.mT, x_scale[:, :, None], scale[:, None], strict=True))
    return [
        lambda: [torch._scaled_mm(*operands, **FP8) for operands in each],
        partial(torch._scaled_grouped_mm, x, w.mT, x_scale, scale, **FP8),
    ]
