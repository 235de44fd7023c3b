"""What the cases of products and of layers have in common: their names and their dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cutlass_moe.models.shapes import DTYPES
from cutlass_moe.operands import NAMED_DTYPES
from emitters.spec.dtypes import DType


@dataclass(frozen=True)
class BenchCase:
    """Something to measure. dtype is one of DTYPES: of the weights and of what they multiply."""

    suite: str
    model: str
    dtype: str
    tokens: int

    @property
    def weights_id(self) -> tuple[str, ...]:
        """Cases with the same one share their weights."""
        return (self.suite, self.model, self.dtype)

    @property
    def id(self) -> str:
        return "/".join(map(str, (*self.weights_id, self.tokens)))

    @property
    def name(self) -> str:
        """What tables call it, where the suite is known."""
        return " ".join(map(str, (*self.weights_id[1:], self.tokens)))

    @property
    def element(self) -> DType:
        return DTYPES[self.dtype]

    @property
    def torch_dtype(self) -> torch.dtype:
        return NAMED_DTYPES[self.dtype]
