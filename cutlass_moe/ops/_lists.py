"""Checks of operands that are tensors, lists of one tensor, or lists of one tensor per expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cutlass_moe.operands import Options
from cutlass_moe.ops._checks import is_n_major
from cutlass_moe.ops._copies import NARROW
from cutlass_moe.ops._packed import packing_of
from cutlass_moe.ops.grouped_matmul import wants_gradient
from cutlass_moe.runtime.workspace import view_of_slices

Tensors = Tensor | Sequence[Tensor]


class ListArguments(NamedTuple):
    """The arguments of `index_group_matmul`, in its order."""

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
    """Checks weights; returns one tensor [E, N, K] if that takes no copy, else [N, K] per expert.

    Packed weights come as one tensor. Raises TypeError or ValueError for tensors that differ in
    dtype, shape or dense dimension, and for packed ones apart from each other.
    """
    single = isinstance(value, Tensor)
    entries = entries_of("weight", value, 1 if single else len(value))
    shape = entries[0].shape
    if packing_of(entries[0] if single else entries[0][None]):
        return entries[0] if single else _one_packed(entries)
    if len(entries) == 1 and len(shape) == 3:
        return entries[0]
    for e, entry in enumerate(entries):
        if single or len(shape) != 2 or entry.shape != shape:
            name = "weight" if single else f"weight[{e}]"
            wanted = "[E, N, K]" if single else f"[N, K] like weight[0], {tuple(shape)}"
            raise ValueError(f"{name} must be {wanted}, got {tuple(entry.shape)}")
    if len(entries) == 1:
        return entries[0][None]
    stacked = view_of_slices(entries)
    if stacked is not None:
        return stacked
    n_major = is_n_major(entries[0][None])
    for e, entry in enumerate(entries):  # one kernel reads all of them
        if is_n_major(entry[None]) != n_major:
            raise ValueError(
                f"weight[{e}] must have {'N' if n_major else 'K'} dense (stride 1) like weight[0], "
                f"got strides {entry.stride()}"
            )
    return entries


def _one_packed(entries: list[Tensor]) -> Tensor:
    """Packed weights of all experts, of a list of each one's, which lie end to end."""
    first = entries[0]
    whole = first[None] if len(entries) == 1 else view_of_slices(entries)
    if whole is None or any(entry.shape != first.shape for entry in entries):
        raise ValueError(
            "a list of packed weights must be slices of one tensor [E, N / 32, K / 128, block "
            "bytes] in order: no kernel reads them through a table"
        )
    return whole


def find_scales(value: Tensors | None, experts: int, n: int) -> list[Tensor]:
    """Checks scales; returns a list of one tensor for `grouped_matmul`, or of one row per expert.

    A row is [1, N], or [1] if the expert has one scale. None gives an empty list. One tensor
    [E, 1] or [E, 1, 1] becomes [E], and so does one value for all experts.
    """
    entries = entries_of("scale", value, experts)
    if len(entries) == 1 and experts > 1:
        (scale,) = entries
        if scale.dim() in (2, 3) and scale.numel() == experts == len(scale):
            scale = scale.select(-1, 0)
            return [scale.select(-1, 0) if scale.dim() == 2 else scale]
        if scale.dim() < 2 and scale.numel() == 1:
            return [scale.reshape(1).expand(experts)]
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
    """Makes a list of an argument: empty for None, of one tensor, or of one tensor per expert.

    Raises TypeError or ValueError for another number of tensors, and for tensors that differ in
    dtype or shape; only their first extents may differ.
    """
    entries = _listed(value)
    if value is not None and (not entries or len(entries) not in (1, experts)):
        wanted = f"a tensor or a list of 1 or {experts} tensors"
        raise ValueError(f"{name} must be {wanted}, got a list of {len(entries)}")
    for e, entry in enumerate(entries):
        if not isinstance(entry, Tensor):
            raise TypeError(f"{name}[{e}] must be a tensor, got {type(entry).__name__}")
        first = entries[0]
        if entry.dtype != first.dtype:
            raise TypeError(f"{name}[{e}] must be {first.dtype} like {name}[0], got {entry.dtype}")
        if entry.dim() != first.dim() or entry.shape[1:] != first.shape[1:]:
            wanted = f"the shape of {name}[0], {tuple(first.shape)}, but for the first extent"
            raise ValueError(f"{name}[{e}] must have {wanted}, got {tuple(entry.shape)}")
    return entries


def _listed(value: Tensors | None) -> list[Tensor]:
    return [] if value is None else [value] if isinstance(value, Tensor) else list(value)


def find_token_scales(value: Tensors | None, x: list[Tensor], experts: int) -> list[Tensor]:
    """Checks per_token_scale; returns its tensors, [T] where one value stands for all of x."""
    entries = entries_of("per_token_scale", value, experts)
    tokens = sum(len(entry) for entry in x if entry.dim())
    if len(entries) == 1 and entries[0].dim() < 3 and entries[0].numel() == 1 and tokens != 1:
        return [entries[0].reshape(1).expand(tokens)]
    return entries


def scale_dtype(entries: list[Tensor]) -> torch.dtype:
    """The dtype that scales are read in: float32 for those that it holds."""
    dtype = entries[0].dtype
    return torch.float32 if dtype in NARROW else dtype


def find_lengths(lists: dict[str, list[Tensor]], index: Tensor | None) -> list[int]:
    """The number of rows of each expert's tensor, or [] if no list has one tensor per expert.

    lists: by argument; all with one tensor per expert must have the same numbers of rows.
    """
    lengths: list[int] = []
    for name, entries in lists.items():
        if len(entries) < 2:
            continue
        if index is not None and name != "out":
            wanted = "one tensor if index is given"
            raise ValueError(f"{name} must be {wanted}, got a list of {len(entries)} tensors")
        if not entries[0].dim():
            raise ValueError(f"{name}[0] must have rows, got a scalar")
        rows = [len(entry) for entry in entries]
        if lengths and rows != lengths:
            raise ValueError(
                f"{name} must have as many rows per expert as the other lists, {lengths}, "
                f"got {rows}"
            )
        lengths = rows
    return lengths


def check_tensors(arguments: ListArguments) -> torch.device:
    """Checks that all tensors are on one device, and returns it.

    Raises ValueError if they are not, and RuntimeError where a gradient would be lost.
    """
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
            "use grouped_matmul, or call under torch.no_grad()"
        )
    return device


def check_groups(arguments: ListArguments, experts: int) -> None:
    """Checks group_list and group_list_type; raises TypeError or ValueError."""
    group_list, kind = arguments.group_list, arguments.group_list_type
    if kind not in ("cumsum", "count"):
        raise ValueError(f"group_list_type must be 'cumsum' or 'count', got {kind!r}")
    if group_list.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"group_list must be torch.int32 or torch.int64, got {group_list.dtype}")
    if group_list.shape != (experts,):
        got = tuple(group_list.shape)
        raise ValueError(f"group_list must have shape ({experts},), got {got}")
