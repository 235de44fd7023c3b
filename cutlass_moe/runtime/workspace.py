"""The layout of a caller's workspace, known before the memory is: new tensors, copies of others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cutlass_moe.runtime.fallback import announce_copy
from cutlass_moe.runtime.parameters import ALIGNMENTS

ALIGNMENT = 128  # bytes, of every region, because tensor maps in memory need it
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class WorkspaceRegion:
    """A tensor in a workspace, `offset` bytes after the workspace's aligned beginning."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def of(self, workspace: Tensor) -> Tensor:
        """The tensor, as a view of an aligned workspace."""
        contents = workspace[self.offset : self.offset + self.bytes]
        return contents.view(self.dtype).view(self.shape)


def resolve(source: Tensor | WorkspaceRegion | None, workspace: Tensor) -> Any:
    """The tensor itself, or the tensor of a region in the workspace."""
    return source.of(workspace) if isinstance(source, WorkspaceRegion) else source


def stand_in(source: Tensor | WorkspaceRegion | None) -> Any:
    """The tensor without memory, on the meta device, for checks before there is a workspace."""
    if source is None:
        return None
    if isinstance(source, WorkspaceRegion):
        return torch.empty(source.shape, dtype=source.dtype, device="meta")
    return torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device="meta")


class WorkspaceLayout:
    """The regions of a workspace, and the copies to make there before each run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._bytes = 0
        self._copies: list[tuple[WorkspaceRegion, list[Tensor]]] = []
        self._host_values: list[tuple[WorkspaceRegion, Tensor]] = []

    @property
    def size(self) -> int:
        """Bytes of workspace, enough for one that begins at any address."""
        return self._bytes and self._bytes + ALIGNMENT - 1

    def region(self, shape: tuple[int, ...], dtype: torch.dtype) -> WorkspaceRegion:
        """Reserves a region for a tensor."""
        region = WorkspaceRegion(self._bytes, shape, dtype)
        self._bytes += -(-region.bytes // ALIGNMENT) * ALIGNMENT
        return region

    def join(
        self,
        entries: list[Tensor],
        name: str = "",
        dtype: torch.dtype | None = None,
        reads: Callable[[Tensor], bool] = Tensor.is_contiguous,
    ) -> Tensor | WorkspaceRegion:
        """Joins the rows of tensors: a view if kernels can read one, else a region that runs fill.

        The tensors may differ in their first extent only. name: of the operand, whose address a
        kernel needs aligned; default none. dtype: of the region, if it must be another one. reads:
        whether a kernel reads a tensor with such strides.
        """
        dtype = dtype or entries[0].dtype
        joined = entries[0] if len(entries) == 1 else view_of_rows(entries)
        if joined is not None and joined.dtype == dtype and reads(joined):
            multiple = ALIGNMENTS.get(name, 1)
            if joined.data_ptr() % multiple == 0:
                return joined
            announce_copy(name, multiple)
        rows = sum(len(entry) for entry in entries)
        region = self.region((rows, *entries[0].shape[1:]), dtype)
        self._copies.append((region, entries))
        return region

    def from_host(self, values: Tensor) -> WorkspaceRegion:
        """Reserves a region for values that are on the host; every run copies them there.

        Raises RuntimeError while a CUDA graph is captured, because the graph would read host memory
        that is freed after the call.
        """
        if self.device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "a CUDA graph is being captured and this call needs tables from the host: "
                    "prepare it before the capture (index_group_matmul_workspace_size), and "
                    "capture only executor.run"
                )
            values = values.pin_memory()
        region = self.region(tuple(values.shape), values.dtype)
        self._host_values.append((region, values))
        return region

    def aligned(self, workspace: Tensor | None) -> Tensor:
        """The workspace from its aligned beginning on.

        workspace: may be None if `size` is 0. Raises ValueError if it is not contiguous uint8 [size
        or more] on the layout's device.
        """
        if workspace is None and not self.size:
            return torch.empty(0, dtype=torch.uint8, device=self.device)
        if (
            workspace is None
            or workspace.dtype != torch.uint8
            or workspace.dim() != 1
            or not workspace.is_contiguous()
            or len(workspace) < self.size
            or workspace.device != self.device
        ):
            got = "None"
            if workspace is not None:
                got = f"{workspace.dtype} {list(workspace.shape)} on {workspace.device}"
            raise ValueError(
                f"workspace must be contiguous torch.uint8 [{self.size} or more] on "
                f"{self.device}, got {got}"
            )
        return workspace[-workspace.data_ptr() % ALIGNMENT :]

    def fill(self, workspace: Tensor) -> None:
        """Enqueues all copies into an aligned workspace."""
        for region, values in self._host_values:
            region.of(workspace).copy_(values, non_blocking=True)
        for region, entries in self._copies:
            _copy(_split(region.of(workspace), entries), entries)

    def write_back(self, joined: Tensor | WorkspaceRegion, workspace: Tensor) -> None:
        """Enqueues the copies from a region that `join` made back to its tensors."""
        for region, entries in self._copies:
            if region is joined:
                _copy(entries, _split(region.of(workspace), entries))


def view_of_rows(entries: list[Tensor]) -> Tensor | None:
    """Joins the rows of tensors as a view, if they lie end to end in one storage."""
    filled = [entry for entry in entries if entry.numel()] or entries[:1]
    first, end = filled[0], filled[0].storage_offset()
    for entry in filled:
        if not (_share_storage(entry, first) and entry.is_contiguous()):
            return None
        if entry.storage_offset() != end:
            return None
        end += entry.numel()
    flat = first.as_strided((end - first.storage_offset(),), (1,))
    return flat.view(sum(len(entry) for entry in filled), *first.shape[1:])


def view_of_slices(entries: list[Tensor]) -> Tensor | None:
    """Stacks tensors of one shape as a view, if they lie at equal distances in one storage."""
    first = entries[0]
    step = entries[1].storage_offset() - first.storage_offset()
    for i, entry in enumerate(entries):
        if not (_share_storage(entry, first) and entry.stride() == first.stride()):
            return None
        if step <= 0 or entry.storage_offset() != first.storage_offset() + i * step:
            return None
    return first.as_strided((len(entries), *first.shape), (step, *first.stride()))


def _share_storage(a: Tensor, b: Tensor) -> bool:
    storage, other = a.untyped_storage(), b.untyped_storage()
    return storage.data_ptr() == other.data_ptr() and storage.nbytes() == other.nbytes()


def _split(joined: Tensor, entries: list[Tensor]) -> list[Tensor]:
    return list(joined.split([len(entry) for entry in entries]))


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copies tensors in one kernel, as integers if they have one dtype.

    torch's kernel knows no float8, and as floats it would rewrite NaNs.
    """
    if targets[0].dtype == sources[0].dtype:
        bits = _BITS[targets[0].dtype.itemsize]
        targets, sources = ([t.view(bits) for t in tensors] for tensors in (targets, sources))
    torch._foreach_copy_(targets, sources)
