"""Operands that come whole, as lists of one, or as lists of one tensor per expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cutlass_moe.operands import Options
from cutlass_moe.ops.grouped_matmul import wants_gradient
from cutlass_moe.runtime.workspace import view_of_slices

Tensors = Tensor | Sequence[Tensor]


class ListArguments(NamedTuple):
    """As `index_group_matmul` takes them."""

    x: Tensors
    weight: Tensors
    scale: Tensors | None
    per_token_scale: Tensors | None
    group_list: Tensor
    out: Tensors
    index: Tensor | None = None  # type: ignore[assignment]  # hides tuple.index
    group_list_type: str = "cumsum"
    bias: Tensor | None = None
    accumulation: str | None = None
    expected_rows: int | None = None
    num_sms: int | None = None

    @property
    def options(self) -> Options:
        return Options(
            accumulation=self.accumulation,
            expected_rows=self.expected_rows,
            num_sms=self.num_sms,
        )


def find_weights(value: Tensors) -> Tensor | list[Tensor]:
    """[E, N, K] where that takes no copy, else [N, K] of every expert."""
    single = isinstance(value, Tensor)
    entries = entries_of("weight", value, 1 if single else len(value))
    shape = entries[0].shape
    if len(entries) == 1 and len(shape) == 3:
        return entries[0]
    for e, entry in enumerate(entries):
        if single or len(shape) != 2 or entry.shape != shape:
            wanted = "[E, N, K]" if single else f"[N, K] as weight[0], {tuple(shape)}"
            raise ValueError(f"weight[{e}] must be {wanted}, got {tuple(entry.shape)}")
    if len(entries) == 1:
        return entries[0][None]
    stacked = view_of_slices(entries)
    return entries if stacked is None else stacked


def find_scales(value: Tensors | None, experts: int, n: int) -> list[Tensor]:
    """One tensor as `grouped_matmul` takes it, or a row of one, [1, N] or [1], for each expert."""
    entries = entries_of("scale", value, experts)
    wholes = ((experts, n), (experts, n, 1), (experts,))
    if len(entries) < experts or (len(entries) == 1 and entries[0].shape in wholes):
        return entries
    shapes = ((n,), (n, 1), (1,), ())
    for e, entry in enumerate(entries):
        if entry.shape not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"scale[{e}] must have shape {wanted}, got {tuple(entry.shape)}")
    return [entry.view(1) if entry.numel() == 1 else entry.view(1, n) for entry in entries]


def entries_of(name: str, value: Tensors | None, experts: int) -> list[Tensor]:
    """Of an argument: none, one tensor, or one for each expert, alike but for their first extent.

    Raises TypeError and ValueError for others.
    """
    entries = _listed(value)
    if value is not None and (not entries or len(entries) not in (1, experts)):
        wanted = f"a tensor or a list of 1 or {experts}"
        raise ValueError(f"{name} must be {wanted}, got a list of {len(entries)}")
    for e, entry in enumerate(entries):
        if not isinstance(entry, Tensor):
            raise TypeError(f"{name}[{e}] must be a tensor, got {type(entry).__name__}")
        first = entries[0]
        if entry.dtype != first.dtype:
            raise TypeError(f"{name}[{e}] must be {first.dtype} as {name}[0], got {entry.dtype}")
        if entry.dim() != first.dim() or entry.shape[1:] != first.shape[1:]:
            wanted = f"{name}[0]'s shape {tuple(first.shape)} but for the first extent"
            raise ValueError(f"{name}[{e}] must have {wanted}, got {tuple(entry.shape)}")
    return entries


def _listed(value: Tensors | None) -> list[Tensor]:
    return [] if value is None else [value] if isinstance(value, Tensor) else list(value)


def find_lengths(lists: dict[str, list[Tensor]], index: Tensor | None) -> list[int]:
    """Rows of each expert's tensor where rows come one tensor per expert, else nothing."""
    lengths: list[int] = []
    for name, entries in lists.items():
        if len(entries) < 2:
            continue
        if index is not None and name != "out":
            wanted = "one tensor, whose rows the index names"
            raise ValueError(f"{name} must be {wanted}, got a list of {len(entries)}")
        if not entries[0].dim():
            raise ValueError(f"{name}[0] must have rows, got a scalar")
        rows = [len(entry) for entry in entries]
        if lengths and rows != lengths:
            raise ValueError(f"{name} must be tensors of {lengths} rows, got {rows}")
        lengths = rows
    return lengths


def check_tensors(arguments: ListArguments) -> torch.device:
    """The device of all tensors."""
    names = ("x", "weight", "scale", "per_token_scale", "group_list", "out", "index", "bias")
    listed = [(name, _listed(getattr(arguments, name))) for name in names]
    tensors = [(name, t) for name, entries in listed for t in entries if isinstance(t, Tensor)]
    device = tensors[0][1].device
    for name, tensor in tensors:
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device}, got one on {tensor.device}")
    if wants_gradient(tuple(tensor for _, tensor in tensors)):
        raise RuntimeError(
            "index_group_matmul has no gradient and an argument requires one: "
            "use grouped_matmul, or torch.no_grad()"
        )
    return device


def check_groups(arguments: ListArguments, experts: int) -> None:
    group_list, kind = arguments.group_list, arguments.group_list_type
    if kind not in ("cumsum", "count"):
        raise ValueError(f"group_list_type must be 'cumsum' or 'count', got {kind!r}")
    if group_list.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"group_list must be torch.int32 or torch.int64, got {group_list.dtype}")
    if group_list.shape != (experts,) or not group_list.is_contiguous():
        got = f"shape {tuple(group_list.shape)}, strides {group_list.stride()}"
        raise ValueError(f"group_list must have shape ({experts},), contiguous, got {got}")
