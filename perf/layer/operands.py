"""A layer's tensors on the GPU, and what its output must be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import cutlass_moe
from perf.layer.cases import MoeLayerCase
from perf.product.operands import random_values
from perf.product.routing import draw_topk_ids
from perf.systems import sample_rows

# Relative, more than is right and less than is wrong: where the products between the projections
# are rounded to bf16, values that lie between two 8-bit ones change sides. That made up to 1.9e-2
# with fp8, 1.4e-2 with int8 and, of bf16's own roundings, 4.3e-3 (Triton, H200).
WORST_ERROR = {"fp8": 3e-2, "int8": 2e-2, "bf16": 8e-3}
Choice = tuple[torch.Tensor, torch.Tensor]  # topk_weights float32 [T, k], topk_ids int32 [T, k]
Router = Callable[[torch.Tensor], Choice]  # of logits float32 [T, E]


@dataclass(frozen=True)
class LayerWeights:
    """w13 [E, 2I, H] (gate, then up), w2 [E, H, I]; 8-bit ones with scales [E, 2I] and [E, H]."""

    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor | None
    w2_scale: torch.Tensor | None

    @classmethod
    def of(cls, case: MoeLayerCase, seed: int, device: str = "cuda") -> LayerWeights:
        """Random ones, such that the products of normal values are about normal."""
        generator = torch.Generator(device).manual_seed(seed)
        w13, w13_scale = random_weights(case, "up", generator)
        w2, w2_scale = random_weights(case, "down", generator)
        return cls(w13, w2, w13_scale, w2_scale)

    @property
    def options(self) -> dict[str, Any]:
        """The scales as `fused_moe` takes them."""
        if self.w13_scale is None or self.w2_scale is None:
            return {}
        return {"w13_scale": self.w13_scale, "w2_scale": self.w2_scale}


def random_weights(
    case: MoeLayerCase, gemm: str, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor | None]:
    n, k = case.shape.gemms[gemm]
    experts, device = case.shape.num_experts, generator.device
    weight = torch.empty((experts, n, k), dtype=case.torch_dtype, device=device)
    unit = k**-0.5
    for expert in weight:
        values = random_values(case, (n, k), generator)
        expert.copy_(values if case.element.quantized else values * unit)
    if not case.element.quantized:
        return weight, None
    spread = torch.rand((experts, n), device=device, generator=generator) + 0.5
    return weight, spread * unit / (40 if case.dtype == "int8" else 1)


@dataclass(frozen=True)
class LayerInputs:
    """hidden bf16 [T, H]; choice: of the one layer, or logits: float32 [T, E] of each layer."""

    hidden: torch.Tensor
    choice: Choice | None
    logits: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, case: MoeLayerCase, device: str = "cuda") -> LayerInputs:
        generator = torch.Generator(device).manual_seed(case.up.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device, generator=generator)

        hidden = normal(case.tokens, case.shape.hidden).bfloat16()
        if case.suite == "chain":
            experts = case.shape.num_experts
            return cls(
                hidden, None, tuple(normal(case.tokens, experts) for _ in range(case.layers))
            )
        ids = draw_topk_ids(case.up).int().to(device)
        return cls(hidden, (normal(*ids.shape).softmax(-1), ids), ())

    def choices(self, router: Router) -> Iterator[Choice]:
        """Each layer's, made by the router when it is asked for, or the given one."""
        if self.choice is not None:
            yield self.choice
        for logits in self.logits:
            yield router(logits)

    def sample(self) -> torch.Tensor:
        """Numbers of the tokens that are checked, sorted."""
        tokens = len(self.hidden)
        return sample_rows(tokens, torch.Generator(self.hidden.device).manual_seed(tokens))


def chosen_by_torch(logits: torch.Tensor, top_k: int) -> Choice:
    values, ids = logits.topk(top_k)
    return values.softmax(-1), ids.int()


def expected(
    case: MoeLayerCase, weights: Sequence[LayerWeights], inputs: LayerInputs, sample: torch.Tensor
) -> torch.Tensor:
    """The sampled tokens' output, by the reference in float64."""
    out = inputs.hidden[sample]
    router = partial(chosen_by_torch, top_k=case.shape.top_k)
    for layer, choice in zip(weights, inputs.choices(router), strict=True):
        hidden = out.bfloat16()
        topk_weights, topk_ids = (each[sample] for each in choice)
        out = cutlass_moe.fused_moe_reference(
            hidden, layer.w13, layer.w2, topk_weights, topk_ids,
            quant=case.quant, residual=hidden if inputs.logits else None,
            compute_dtype=torch.float64, **layer.options,
        )  # fmt: skip
    return out
