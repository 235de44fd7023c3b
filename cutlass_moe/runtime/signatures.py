"""What of a call's arguments decides its kernels, and what was decided."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Generic, TypeVar

from torch import Tensor

Signature = tuple[Any, ...]
T = TypeVar("T")


def signature(others: tuple[Any, ...], tensors: Iterable[Tensor | None]) -> Signature:
    """All that decides: `others`, and dtypes, shapes, strides and devices of the tensors."""
    found: list[Any] = [*others]
    for tensor in tensors:
        if tensor is None:
            found.append(None)
        else:
            found += (tensor.dtype, tensor.shape, tensor.stride(), tensor.get_device())
    return tuple(found)


class Signatures(Generic[T]):
    """What was decided for each signature that an op has seen.

    Where there are more than `limit`, all are forgotten: an op whose shapes never repeat keeps no
    memory, and looking one up stays a single lookup.
    """

    def __init__(self, limit: int = 8192) -> None:
        self._limit = limit
        self._kept: dict[Signature, T] = {}
        self.get = self._kept.get

    def keep(self, key: Signature, decided: T) -> T:
        if len(self._kept) >= self._limit:
            self._kept.clear()
        self._kept[key] = decided
        return decided
