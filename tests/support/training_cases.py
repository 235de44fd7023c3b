"""Layers to train in tests: arguments of fused_moe, their gradients, and those of float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe.choose.heuristics_sm90 import choose, every_config
from cutlass_moe.layer.steps import (
    Forms,
    LayerProblems,
    LayerSizes,
    Projection,
    layer_problems,
    training_problems,
)
from cutlass_moe.operands import DTYPES
from emitters.spec.dtypes import DType
from emitters.spec.epilogue import ActivationFunction
from emitters.spec.gemm import GemmProblem
from emitters.spec.registry import Config, Problem
from emitters.spec.weight_grad import WeightGradProblem

DIFFERENTIABLE = ("hidden", "w13", "w2", "topk_weights", "w13_bias", "w2_bias", "residual")


@dataclass(frozen=True)
class TrainingCase:
    """routing: "random", where some pairs have no expert; "one_expert"; "foreign", with the map of
    one of three ranks; "nobody", where no pair has an expert. weights: dtype of topk_weights.
    options: more arguments of fused_moe."""

    activation: str = "swiglu"
    tokens: int = 12
    top_k: int = 3
    experts: int = 5
    hidden: int = 64
    inter: int = 48
    dtype: torch.dtype = torch.bfloat16
    weights: torch.dtype = torch.float32
    interleaved: bool = False
    n_major: bool = False
    bias: bool = False
    routing: str = "random"
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def arguments(self, device: str, tokens: int | None = None) -> dict[str, Any]:
        tokens = self.tokens if tokens is None else tokens
        top_k = 1 if self.options.get("weight_on_input") else self.top_k
        generator = torch.Generator(device).manual_seed(0)
        width = self.inter * (2 if ActivationFunction(self.activation).gated else 1)

        def random(*shape: int, size: float = 1.0) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device)
            return (size * values).to(self.dtype)

        w13 = random(self.experts, width, self.hidden, size=1.5 * self.hidden**-0.5)
        w2 = random(self.experts, self.hidden, self.inter, size=1.5 * self.inter**-0.5)
        if self.n_major:
            w13, w2 = (w.mT.contiguous().mT for w in (w13, w2))
        scores = torch.rand(tokens, top_k, generator=generator, device=device)
        found: dict[str, Any] = {
            "hidden": random(tokens, self.hidden),
            "w13": w13,
            "w2": w2,
            "topk_weights": (scores + 0.1).to(self.weights),
            "residual": random(tokens, self.hidden),
            **self._routing(tokens, top_k, generator),
            "activation": self.activation,
            "interleaved": self.interleaved,
            **self.options,
        }
        if self.bias:
            found["w13_bias"] = random(self.experts, width)
            found["w2_bias"] = random(self.experts, self.hidden)
        return found

    def _routing(self, tokens: int, top_k: int, generator: torch.Generator) -> dict[str, Tensor]:
        device, ranks = generator.device, 3 if self.routing == "foreign" else 1
        experts = ranks * self.experts
        scores = torch.rand(tokens, experts, generator=generator, device=device)
        ids = scores.argsort(1)[:, :top_k].int().contiguous()
        if self.routing == "one_expert":
            ids.fill_(1)
        elif self.routing == "nobody":
            ids.fill_(experts + 1)
        elif self.routing == "random":
            ids.view(-1)[::5] = -1
        if ranks == 1:
            return {"topk_ids": ids}
        local = torch.arange(experts, device=device) - self.experts
        inside = (local >= 0) & (local < self.experts)
        return {"topk_ids": ids, "expert_map": local.where(inside, -1).int()}


def leaves_of(given: dict[str, Any]) -> dict[str, Tensor]:
    """Copies of the tensors that have gradients, in their layouts, which require one."""
    return {
        name: given[name].detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for name in DIFFERENTIABLE
        if name in given
    }


def gradients(
    given: dict[str, Any], call: Callable[..., Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of all leaves for a gradient that follows from its shape."""
    leaves = {name: given[name] for name in DIFFERENTIABLE if name in given}
    leaves = {name: tensor for name, tensor in leaves.items() if tensor.requires_grad}
    out = (call or cm.fused_moe)(**given)
    found = torch.autograd.grad(out, list(leaves.values()), _grad_like(out))
    return out, dict(zip(leaves, found, strict=True))


def reference_gradients(given: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The same in float64, by autograd of the reference."""
    leaves = {name: leaf.detach().double() for name, leaf in leaves_of(given).items()}
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    options = {name: value for name, value in given.items() if name != "recompute"}
    out = cm.fused_moe_reference(**{**options, **leaves}, compute_dtype=torch.float64)
    grad = _grad_like(out).to(given["hidden"].dtype).double()
    found = torch.autograd.grad(out, list(leaves.values()), grad, materialize_grads=True)
    return out, dict(zip(leaves, found, strict=True))


def relative(found: Tensor, wanted: Tensor) -> float:
    """The relative error, in the norm; of zeros the norm."""
    size = wanted.norm().item()
    return ((found.double() - wanted).norm() / (size or 1)).item()


def _grad_like(out: Tensor) -> Tensor:
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return grad.to(out.device, out.dtype)


def images_of(case: TrainingCase, tokens: int) -> set[tuple[Problem, Config]]:
    """The kernels of a case's forward and backward, main gradients included."""
    operand, biased = DTYPES[case.dtype], DTYPES[case.dtype] if case.bias else None
    each = Projection(None, biased, case.n_major)
    top_k = 1 if case.options.get("weight_on_input") else case.top_k
    layer = layer_problems(
        LayerSizes(case.experts, top_k, case.hidden, case.inter),
        operand,
        operand,
        _function(case),
        each,
        each,
        forms=Forms(weights=DTYPES[case.weights]),
    )
    problems = trained_problems(layer, case.interleaved)
    if case.options.get("recompute"):
        problems.append(layer.up)
    pairs = tokens * top_k
    per_expert = -(-pairs // (case.experts * (3 if case.routing == "foreign" else 1)))
    found: set[tuple[Problem, Config]] = set()
    for problem in problems:
        if isinstance(problem, GemmProblem):
            x_rows = tokens if problem.gather else pairs
            found.add((problem, choose(problem, x_rows, per_expert)))
        else:
            found |= {(problem, config) for config in every_config(problem)}
    return found


def trained_problems(layer: LayerProblems, interleaved: bool = False) -> list[Problem]:
    """Of a layer's forward and backward, with weights' gradients added to main gradients too."""
    problems = [*training_problems(layer, interleaved).values()]
    added = [
        replace(problem, out=DType.FP32, accumulate=True)
        for problem in problems
        if isinstance(problem, WeightGradProblem)
    ]
    return problems + added


def _function(case: TrainingCase) -> str:
    return "swiglu_oai" if "limit" in case.options else case.activation
