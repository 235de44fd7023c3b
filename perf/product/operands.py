"""A case's tensors on the GPU, and what its product must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import cutlass_moe
from perf.cases import BenchCase
from perf.product.cases import ProductCase
from perf.product.routing import draw_topk_ids
from perf.systems import sample_rows

WORST_ERROR = 1e-2  # fast fp8 accumulation reaches 2.5e-3 at K 7168 and grows with K


@dataclass(frozen=True)
class ProductWeights:
    """weight [E, N, K] and, for 8-bit ones, scale float32 [E, N]."""

    weight: torch.Tensor
    scale: torch.Tensor | None

    @classmethod
    def of(cls, case: ProductCase, device: str = "cuda") -> ProductWeights:
        generator = torch.Generator(device).manual_seed(1)
        shape = (case.num_experts, case.n, case.k)
        weight = torch.empty(shape, dtype=case.torch_dtype, device=device)
        for expert in weight:
            expert.copy_(random_values(case, (case.n, case.k), generator))
        return cls(weight, random_scale(case, shape[:2], generator))


@dataclass(frozen=True)
class ProductTensors:
    """What one product needs. Its rows are sorted by expert; (token, expert) pairs are not.

    topk_ids int64 [x_rows, slots]; order int64 [rows]: the pair behind each row; index int32
    [rows] and tokens, the same as int64: the row of x behind each row; offsets int32 [E]; sample:
    the sorted numbers of the rows that are checked.
    """

    x: torch.Tensor
    per_token_scale: torch.Tensor | None
    weight: torch.Tensor
    scale: torch.Tensor | None
    topk_ids: torch.Tensor
    order: torch.Tensor
    index: torch.Tensor
    tokens: torch.Tensor
    offsets: torch.Tensor
    sample: torch.Tensor

    @classmethod
    def of(cls, case: ProductCase, weights: ProductWeights) -> ProductTensors:
        device = weights.weight.device
        generator = torch.Generator(device).manual_seed(case.seed)
        topk_ids = draw_topk_ids(case).to(device).reshape(case.x_rows, case.slots)
        experts, order = torch.sort(topk_ids.flatten(), stable=True)
        x = random_values(case, (case.x_rows, case.k), generator).to(case.torch_dtype)
        sample = sample_rows(case.rows, generator)
        ends = torch.arange(case.num_experts, device=device)
        return cls(
            x=x,
            per_token_scale=random_scale(case, (case.x_rows,), generator),
            weight=weights.weight,
            scale=weights.scale,
            topk_ids=topk_ids,
            order=order,
            index=(order // case.slots).int(),
            tokens=order // case.slots,
            offsets=torch.searchsorted(experts, ends, right=True).int(),
            sample=sample,
        )

    @property
    def options(self) -> dict[str, Any]:
        """What the library's op takes besides x and weight, in its order."""
        return {
            "index": self.index,
            "offsets": self.offsets,
            "per_token_scale": self.per_token_scale,
            "scale": self.scale,
        }

    def expected(self) -> torch.Tensor:
        """The sampled rows of the product, float32 [len(sample), N], by the reference."""
        sampled = {
            "index": self.index[self.sample],
            "offsets": torch.searchsorted(self.sample, self.offsets.long()).int(),
            "out_dtype": torch.float32,
        }
        return cutlass_moe.grouped_matmul_reference(
            self.x, self.weight, **{**self.options, **sampled}
        )


def random_values(
    case: BenchCase, shape: tuple[int, ...], generator: torch.Generator
) -> torch.Tensor:
    """Normal values; for int8 of standard deviation 40, within -127 ... 127.

    What the bits are changes a GPU's power and so its clocks: every dtype gets a bell curve, not
    zeros.
    """
    values = torch.randn(shape, device=generator.device, generator=generator)
    return (values * 40).round().clamp(-127, 127) if case.dtype == "int8" else values


def random_scale(
    case: BenchCase, shape: tuple[int, ...], generator: torch.Generator
) -> torch.Tensor | None:
    if case.dtype == "bf16":
        return None
    return torch.rand(shape, device=generator.device, generator=generator) + 0.5
