"""Experts that a checkpoint holds in 4 bits, read into packed weights."""

from __future__ import annotations

import torch
from torch import Tensor

from cutlass_moe.models.expert_weights import ExpertWeights
from cutlass_moe.models.layouts import Layout, Matrix
from cutlass_moe.models.shards import Shards
from cutlass_moe.ops.pack import pack_weights
from emitters.spec.packing import Packing


def fill_packed(
    weights: ExpertWeights, slot: int, shards: Shards, layout: Layout, expert: int, part: slice
) -> None:
    """Reads an expert's weights to index `slot`. part: of the intermediate size.

    Rows become all gates, then all ups, whatever their order in the checkpoint.
    """
    packing = Packing(layout.quant)
    group = packing.group
    if part.start % group or part.stop % group:
        raise ValueError(
            f"with a scale per {group} of a row, tp must leave each rank a multiple of {group} of "
            f"the intermediate size, got {part.stop - part.start}"
        )

    def read(matrix: Matrix, rows: slice, columns: slice) -> tuple[Tensor, ...]:
        name, lead = matrix.weight(expert), (expert,) if matrix.stacked else ()
        per_value = 32 if packing is Packing.MXFP4 else 8  # columns per index of the tensor
        return tuple(
            shards.read(
                name + ending, *lead, rows, slice(columns.start // count, columns.stop // count)
            ).to(weights.w13.device)
            for ending, count in ((layout.values, per_value), (layout.ending, group))
        )

    up = [
        read(matrix, rows, slice(0, matrix.columns))
        for matrix in layout.up
        for rows in layout.row_ranges(matrix, part.start, part.stop)
    ]
    values, scale = (torch.cat(tensors)[None] for tensors in zip(*up, strict=True))
    out = weights.w13[slot : slot + 1]
    pack_weights(values, scale, interleaved=layout.interleaved, out=out)
    values, scale = read(layout.down, slice(0, layout.down.rows), part)
    pack_weights(values[None], scale[None], out=weights.w2[slot : slot + 1])
