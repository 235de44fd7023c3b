"""Operands of grouped_matmul in layouts that kernels cannot read, and that calls must take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def strided(tensor: Tensor) -> Tensor:
    """The same values as every second column of a wider tensor, as `padded[:, :K]` is one."""
    return torch.stack([tensor, tensor], 1 if tensor.dim() > 1 else -1).select(
        1 if tensor.dim() > 1 else -1, 0
    )


def padded(tensor: Tensor) -> Tensor:
    """The same values as the first columns of a wider tensor."""
    return torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]


def misaligned(tensor: Tensor) -> Tensor:
    """The same values at an address that is one element beyond a multiple of 16 bytes."""
    size = tensor.element_size()
    room = torch.zeros(tensor.nbytes + 32, dtype=torch.uint8, device=tensor.device)
    start = -room.data_ptr() % 16 + size
    moved = room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    moved.copy_(tensor)
    assert moved.data_ptr() % 16 == size
    return moved


def one_value(scale: Tensor) -> Tensor:
    """The first value of a scale, without dimensions."""
    return scale.flatten()[0]


# By argument and name, what a call may be given in its place; each holds the same values, or, for
# those in ONE_VALUE, its first value for all.
LAYOUTS: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {
    ("x", "padded"): padded,
    ("x", "transposed"): lambda x: (
        x.view(torch.uint8).T.contiguous().T.view(x.dtype)
        if x.element_size() == 1
        else x.T.contiguous().T
    ),
    ("x", "odd pitch"): lambda x: torch.cat([x, x[:, :1]], 1)[:, :-1],
    ("index", "int64"): lambda index: index.long(),
    ("index", "int64 past int32"): lambda index: index.long().where(
        torch.arange(len(index), device=index.device) % 3 > 0, 2**32
    ),
    ("index", "strided"): strided,
    ("offsets", "int64"): lambda offsets: offsets.long(),
    ("offsets", "strided"): strided,
    ("per_token_scale", "bfloat16"): lambda scale: scale.bfloat16(),
    ("per_token_scale", "float16 column"): lambda scale: scale.half()[:, None],
    ("per_token_scale", "strided"): strided,
    ("per_token_scale", "one value"): one_value,
    ("per_token_scale", "[1]"): lambda scale: scale[:1],
    ("per_token_scale", "[1, 1]"): lambda scale: scale[:1, None],
    ("per_token_scale", "expanded"): lambda scale: scale[:1].expand(len(scale)),
    ("scale", "bfloat16"): lambda scale: scale.bfloat16(),
    ("scale", "column"): lambda scale: scale[..., None],
    ("scale", "slice"): lambda scale: torch.cat([scale, scale], -1)[:, scale.shape[1] :],
    ("scale", "per expert"): lambda scale: scale[:, 0],
    ("scale", "per expert, column"): lambda scale: scale[:, :1],
    ("scale", "per expert, bfloat16"): lambda scale: scale[:, :1].bfloat16(),
    ("scale", "one value"): one_value,
    ("scale", "[1]"): lambda scale: scale[0, :1],
    ("bias", "slice"): lambda bias: torch.cat([bias, bias], -1)[:, bias.shape[1] :],
}
MISALIGNED = ("x", "scale", "bias")


def plain(name: str, given: Tensor, inputs: dict[str, Any]) -> Tensor:
    """What a call reads where it is given this: contiguous, float32 scales, int32 indices."""
    if name in ("index", "offsets"):
        return given.clamp(-1, 2**31 - 1).int().contiguous()
    if name == "per_token_scale":
        rows = len(inputs["x"])
        return given.float().flatten().expand(rows).contiguous()
    if name == "scale":
        experts, n = inputs["weight"].shape[:2]
        columns = given.float().reshape(-1, 1) if given.numel() <= experts else given.float()
        return columns.reshape(len(columns), -1).expand(experts, n).contiguous()
    return given.contiguous()
