"""What of a call's tensors decides its kernel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def signature(others: tuple[Any, ...], tensors: Iterable[Tensor | None]) -> tuple[Any, ...]:
    """What decides a kernel: `others`, and dtypes, shapes, strides and devices of the tensors."""
    found: list[Any] = [*others]
    for tensor in tensors:
        if tensor is None:
            found.append(None)
        else:
            found += (tensor.dtype, tensor.shape, tensor.stride(), tensor.get_device())
    return tuple(found)
