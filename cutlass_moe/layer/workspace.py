"""The memory of a layer between its kernels: one workspace with a region for each tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from cutlass_moe.layer.steps import LayerProblems
from cutlass_moe.operands import QUANTS, TORCH_DTYPES, LayerOperands, LayerOptions
from cutlass_moe.ops.route import route_scratch
from cutlass_moe.runtime.parameters import column_stride
from cutlass_moe.runtime.workspace import ALIGNMENT, WorkspaceLayout
from emitters.spec.gemm import GemmProblem

# With more rows per expert up projections have tiles that hold whole groups of 128 outputs: those
# whose outputs get scales along K then quantise them.
_QUANTIZING_ROWS = 12


def id_count(layer: LayerOperands) -> int:
    """The experts that ids may name."""
    return len(layer.w2) if layer.expert_map is None else layer.expert_map.numel()


def up_projection(problems: LayerProblems, expected_rows: float) -> GemmProblem:
    """The up projection to launch with so many rows per expert; `quantize_active` follows it only
    where it does not quantise its output."""
    if problems.quantized_up is None or expected_rows <= _QUANTIZING_ROWS:
        return problems.up
    return problems.quantized_up


class LayerWorkspace:
    """The layout of a layer's workspace: the offset in bytes of each of its regions, by name."""

    def __init__(
        self, layer: LayerOperands, options: LayerOptions, problems: LayerProblems
    ) -> None:
        tokens, experts = len(layer.hidden), len(layer.w2)
        hidden, inter = problems.down.n, problems.down.k
        pairs, quant = layer.topk_ids.numel(), options.quant
        rows = options.rows(pairs)
        self.layout = layout = WorkspaceLayout(layer.hidden.device)
        offsets = layout.region((experts,), torch.int32)
        self._offset = {
            "offsets": offsets.offset,
            "last_end": offsets.offset + 4 * (experts - 1),
        }
        self._add("index", (rows,), torch.int32)
        self._add("inverse", (pairs,), torch.int32)
        self._add("histograms", (route_scratch(pairs, experts),), torch.int32)
        unquantized = _most_unquantized(layer, options, problems)
        self._add("active", (unquantized, inter), TORCH_DTYPES[problems.up.out])
        self._add("rows", (rows, hidden), TORCH_DTYPES[problems.down.out])
        if quant:
            if layer.hidden.dtype.itemsize > 1:
                self._add("hidden_q", (tokens, layer.w13.shape[2]), QUANTS[quant])
                self._add("hidden_q_scale", _scales(tokens, problems.up), torch.float32)
            self._add("active_q", (rows, inter), QUANTS[quant])
            self._add("active_q_scale", _scales(rows, problems.down), torch.float32)

    def _add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._offset[name] = self.layout.region(shape, dtype).offset

    def addresses(self, base: int) -> dict[str, int]:
        """The addresses of the regions, by name, in an aligned workspace at address `base`."""
        return {name: base + offset for name, offset in self._offset.items()}

    def base(self, workspace: Tensor) -> int:
        """The address of the aligned part of a workspace. Raises ValueError for one too small."""
        layout, address = self.layout, workspace.data_ptr()
        if (
            workspace.dtype is not torch.uint8
            or workspace.dim() != 1
            or workspace.numel() < layout.size
            or not workspace.is_contiguous()
            or workspace.device != layout.device
        ):
            layout.aligned(workspace)  # says what is wrong
        return address + -address % ALIGNMENT


def _most_unquantized(layer: LayerOperands, options: LayerOptions, problems: LayerProblems) -> int:
    """The most rows of this layer, with so many tokens or fewer, whose activation is stored before
    it is quantised."""
    rows = options.rows(layer.topk_ids.numel())
    if problems.quantized_up is None:
        return rows
    return 0 if options.batch_invariant else min(rows, _QUANTIZING_ROWS * id_count(layer))


def _scales(rows: int, problem: GemmProblem) -> tuple[int, ...]:
    """The shape of the memory for the scales of so many rows of x."""
    if not problem.block_rows:
        return (rows,)
    columns = problem.scale_blocks[1]
    return (rows, columns) if problem.gather else (columns, column_stride(rows))


def scale_strides(rows: int, problem: GemmProblem) -> tuple[int, int]:
    """The strides of the scales along K of so many rows of x.

    Those of rows in order, which TMA loads, lie column by column.
    """
    return (problem.scale_blocks[1], 1) if problem.gather else (1, column_stride(rows))
