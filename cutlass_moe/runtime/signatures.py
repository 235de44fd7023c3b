"""The signatures of calls, which decide their kernels, and a cache of these decisions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Generic, TypeVar

from torch import Tensor

Signature = tuple[Any, ...]
T = TypeVar("T")


def signature(others: tuple[Any, ...], tensors: Iterable[Tensor | None]) -> Signature:
    """The signature of a call: `others`, and dtype, shape, strides and device of each tensor."""
    parts: list[Any] = [*others]
    for tensor in tensors:
        if tensor is None:
            parts.append(None)
        else:
            parts += (tensor.dtype, tensor.shape, tensor.stride(), tensor.get_device())
    return tuple(parts)


class Signatures(Generic[T]):
    """The decisions of an op, by signature.

    When there are more than `limit`, all are forgotten: so an op with shapes that never repeat uses
    little memory, and `get` is a single lookup in a dict.
    """

    def __init__(self, limit: int = 8192) -> None:
        self._limit = limit
        self._kept: dict[Signature, T] = {}
        self.get = self._kept.get

    def keep(self, key: Signature, decided: T) -> T:
        """Keeps a decision and returns it."""
        if len(self._kept) >= self._limit:
            self._kept.clear()
        self._kept[key] = decided
        return decided
