"""What a checkpoint holds beside its experts, as modules of other libraries take it."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from cutlass_moe.integrations.experts import dequantize
from cutlass_moe.models.shards import Shards

_OF_EXPERTS = re.compile(r"(^|\.)experts\.")
_SCALES = ("_scale", "_scale_inv")  # what follows the name of a weight


def tensors_without_experts(
    shards: Shards, dtype: torch.dtype, blocks: Sequence[int] | None
) -> dict[str, Tensor]:
    """All tensors but those of experts, the 8-bit ones times their scales. blocks: the rows and
    columns of those that share one, where a scale is of such blocks."""
    state = {}
    for name in shards.files:
        if _OF_EXPERTS.search(name) or name.endswith(_SCALES):
            continue
        tensor = shards.read(name)
        if tensor.dtype.itemsize == 1 and tensor.dtype != torch.bool:
            scale = next((name + end for end in _SCALES if name + end in shards.files), None)
            if scale is None:
                raise ValueError(f"{name} is {tensor.dtype} and must have a scale, it has none")
            tensor = dequantize(tensor, shards.read(scale), blocks).to(dtype)
        state[name] = tensor
    return state
