"""Inputs of grouped_weight_grad with exact sums, and its definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAN = float("nan")


def make_inputs(
    counts: list[int],
    m: int,
    n: int,
    gathered: str | None = None,
    *,
    tokens: int = 5,
    spare: int = 3,
    gaps: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> dict[str, Any]:
    """Whole numbers, whose sums are exact; NaN in rows that may not be read.

    spare: rows of no expert, at the end and, with gaps, between the experts.
    """
    generator = torch.Generator().manual_seed(seed)

    def numbers(rows: int, columns: int) -> Tensor:
        return torch.randint(-3, 4, (rows, columns), generator=generator).float()

    starts, ends, row = [], [], 0
    for count in counts:
        row += spare if gaps else 0
        starts.append(row)
        row += count
        ends.append(row)
    rows = row + spare
    unused = torch.ones(rows, dtype=torch.bool)
    for start, end in zip(starts, ends, strict=True):
        unused[start:end] = False
    arguments: dict[str, Any] = {"offsets": torch.tensor(ends, dtype=torch.int32)}
    if gaps:
        arguments["starts"] = torch.tensor(starts, dtype=torch.int32)
    index = torch.randint(-1, tokens + 1, (rows,), generator=generator).int()
    for name, columns in (("left", m), ("right", n)):
        values = numbers(tokens if name == gathered else rows, columns)
        if name == gathered:
            read = index[~unused]
            values[~torch.isin(torch.arange(tokens), read)] = NAN
            arguments[f"{name}_index"] = index
        else:
            values[unused] = NAN
        arguments[name] = values.to(dtype)
    return arguments


def definition(
    left: Tensor,
    right: Tensor,
    offsets: Tensor,
    left_index: Tensor | None = None,
    right_index: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """Row by row, in float64."""
    out = torch.zeros(len(offsets), left.shape[1], right.shape[1], dtype=torch.float64)
    for expert, end in enumerate(offsets.tolist()):
        before = offsets[expert - 1].item() if expert else 0
        for row in range(before if starts is None else starts[expert].item(), end):
            places = [row if i is None else i[row].item() for i in (left_index, right_index)]
            if all(0 <= p < len(x) for p, x in zip(places, (left, right), strict=True)):
                out[expert] += torch.outer(left[places[0]].double(), right[places[1]].double())
    return out
