"""The memory of a layer between its kernels: one workspace with a region for each tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from cutlass_moe.layer.steps import LayerProblems
from cutlass_moe.operands import TORCH_DTYPES
from cutlass_moe.ops.route import route_scratch
from cutlass_moe.runtime.parameters import column_stride
from cutlass_moe.runtime.workspace import ALIGNMENT, WorkspaceLayout
from emitters.spec.gemm import GemmProblem

# With more rows per expert up projections have tiles that hold whole groups of 128 outputs: those
# whose outputs get scales along K then quantise them.
_QUANTIZING_ROWS = 12
# So they do where the activation before it is quantised would take more memory than this: a call
# with few rows per expert has so many rows only of more experts than models have.
_STORED_BYTES = 64 << 20


def up_projection(problems: LayerProblems, expected_rows: float, rows: int) -> GemmProblem:
    """The up projection to launch; `quantize_active` follows it only where it does not quantise its
    output. expected_rows: per expert; rows: of all experts."""
    if problems.quantized_up is None:
        return problems.up
    few = expected_rows <= _QUANTIZING_ROWS and rows <= _most_stored(problems)
    return problems.up if few else problems.quantized_up


def _most_stored(problems: LayerProblems) -> int:
    """The most rows whose activation is stored before it is quantised."""
    return _STORED_BYTES // (problems.up.out.bytes * problems.down.k)


class LayerWorkspace:
    """The layout of a layer's workspace: the offset in bytes of each of its regions, by name."""

    def __init__(
        self, problems: LayerProblems, tokens: int, pairs: int, rows: int, device: torch.device
    ) -> None:
        """pairs: of a token with one of its experts; rows: the most that experts here have."""
        experts, hidden, inter = problems.down.num_experts, problems.down.n, problems.down.k
        self.layout = layout = WorkspaceLayout(device)
        offsets = layout.region((experts,), torch.int32)
        self._offset = {
            "offsets": offsets.offset,
            "last_end": offsets.offset + 4 * (experts - 1),
        }
        self._add("index", (rows,), torch.int32)
        self._add("inverse", (pairs,), torch.int32)
        self._add("histograms", (route_scratch(pairs, experts),), torch.int32)
        stored = rows if problems.quantized_up is None else min(rows, _most_stored(problems))
        self._add("active", (stored, inter), TORCH_DTYPES[problems.up.out])
        self._add("rows", (rows, hidden), TORCH_DTYPES[problems.down.out])
        for name, count, product, quantize in (
            ("hidden_q", tokens, problems.up, problems.quantize_hidden),
            ("active_q", rows, problems.down, problems.quantize_active),
        ):
            if quantize is not None:
                self._add(name, (count, product.k), TORCH_DTYPES[product.x])
                self._add(f"{name}_scale", _scales(count, product), torch.float32)

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
