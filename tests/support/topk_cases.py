"""What routers are asked in tests of topk_router and route_logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cutlass_moe.operands import DTYPES
from emitters.spec.layer_steps import RouteLogitsProblem, TopkProblem

OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": {"scoring": "sigmoid"},
    "sqrtsoftplus": {"scoring": "sqrtsoftplus", "bias": True, "scale": 1.5},
    "as_is": {"renormalize": False, "scale": 0.5},
    "threshold": {"threshold": 0.1},
    "groups": {"num_groups": 4, "topk_groups": 2},
    "bias": {"scoring": "sigmoid", "bias": True},
    "deepseek": {
        "scoring": "sigmoid", "bias": True, "num_groups": 8, "topk_groups": 4, "scale": 2.5
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """how: "random" logits; "ties", whole numbers; "special", with NaNs and infinities, and a token
    of NaNs alone."""

    tokens: int
    experts: int
    k: int
    dtype: torch.dtype = torch.float32
    how: str = "random"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Experts are chosen by their logits, which are not rounded."""
        return not self.options.get("bias") and "num_groups" not in self.options

    def make(self, seed: int = 0) -> tuple[Tensor, dict[str, Any]]:
        """-> logits, options of topk_router"""
        draw = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn(self.tokens, self.experts, generator=draw)
        options = dict(self.options)
        if options.pop("bias", False):
            options["correction_bias"] = torch.randn(self.experts, generator=draw) / 4
        if self.how == "ties":
            logits.round_()
        if self.how == "special":
            drawn = torch.rand(logits.shape, generator=draw)
            logits[drawn < 0.3] = torch.nan
            logits[drawn > 0.6] = -torch.inf
            logits[drawn > 0.95] = torch.inf
            logits[:1] = torch.nan
        return logits.to(self.dtype), options

    def problem(self, kind: type[TopkProblem] = TopkProblem) -> TopkProblem:
        scoring = self.options.get("scoring", "softmax")
        return kind(self.experts, DTYPES[self.dtype], scoring, self.options.get("num_groups", 1))

    def fused(self) -> RouteLogitsProblem:
        problem = self.problem(RouteLogitsProblem)
        assert isinstance(problem, RouteLogitsProblem)
        return problem


def check(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], exact: bool) -> None:
    """Weights and ids; where scores were rounded, one token of a hundred may choose otherwise."""
    (weights, ids), (want_weights, want_ids) = got, want
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    same = (ids == want_ids).all(1)
    assert same.all() if exact else same.sum() >= 0.99 * len(same)
    torch.testing.assert_close(weights[same], want_weights[same], rtol=1e-5, atol=1e-6)
