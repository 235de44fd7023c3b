"""Forms in which callers hand the arguments of fused_moe over: pairs that must give equal bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Given = dict[str, Any]


@dataclass(frozen=True)
class LayerForm:
    """make: from plain arguments the plain ones that are meant, and the form to hand over."""

    make: Callable[[Given], tuple[Given, Given]]
    quant: str | None = None
    warns: bool = False


def _same(**changes: Callable[[Tensor], Tensor]) -> Callable[[Given], tuple[Given, Given]]:
    """Arguments in another form, which mean what they meant."""
    return lambda given: (given, given | {n: change(given[n]) for n, change in changes.items()})


def _wide(tensor: Tensor) -> Tensor:
    """The first columns of a matrix that has 8 more."""
    spare = tensor.new_zeros(*tensor.shape[:-1], 8)
    return torch.cat([tensor, spare], -1)[..., : tensor.shape[-1]]


def _odd(tensor: Tensor) -> Tensor:
    """At an address that 16 bytes do not divide."""
    buffer = tensor.new_empty(tensor.numel() + 1)
    return buffer[1:].view(tensor.shape).copy_(tensor)


def _rounded(dtype: torch.dtype, name: str) -> Callable[[Given], tuple[Given, Given]]:
    def make(given: Given) -> tuple[Given, Given]:
        rounded = given[name].to(dtype)
        return given | {name: rounded.float()}, given | {name: rounded}

    return make


def _halves(given: Given) -> tuple[Given, Given]:
    """A scale for all gates of an expert and one for all ups."""
    two = given["w13_scale"][:, :2].contiguous()
    n = given["w13"].shape[1]
    return given | {"w13_scale": two.repeat_interleave(n // 2, 1)}, given | {"w13_scale": two}


def _one_each(given: Given) -> tuple[Given, Given]:
    scale = given["w2_scale"][:, :1].contiguous()
    return given | {"w2_scale": scale.flatten()}, given | {"w2_scale": scale}


def _one(given: Given) -> tuple[Given, Given]:
    scale = given["w2_scale"][0, :1].clone()
    return given | {"w2_scale": scale.expand(len(given["w2"])).contiguous()}, given | {
        "w2_scale": scale
    }


def _mapped(given: Given) -> tuple[Given, Given]:
    experts = len(given["w2"])
    order = torch.arange(experts, device=given["w2"].device).flip(0)
    plain = given | {"expert_map": order.int()}
    return plain, given | {"expert_map": order.long()}


def _quantized(given: Given) -> tuple[Given, Given]:
    from cutlass_moe import quantize_per_token

    q, scale = quantize_per_token(given["hidden"], given["w13"].dtype)
    return given, given | {"hidden": q, "hidden_scale": scale[:, None]}


FORMS = {
    "bf16_weights": LayerForm(_rounded(torch.bfloat16, "topk_weights")),
    "fp16_weights": LayerForm(_rounded(torch.float16, "topk_weights"), "int8"),
    "wide_hidden": LayerForm(_same(hidden=_wide)),
    "wide_hidden_quantized": LayerForm(_same(hidden=_wide), "fp8"),
    "columns_of_hidden": LayerForm(_same(hidden=lambda t: t.t().contiguous().t())),
    "hidden_at_odd_address": LayerForm(_same(hidden=_odd), warns=True),
    "scale_at_odd_address": LayerForm(_same(w13_scale=_odd), "int8", warns=True),
    "batched_hidden": LayerForm(
        _same(
            hidden=lambda t: t[None],
            topk_ids=lambda t: t[None],
            topk_weights=lambda t: t[None],
        )
    ),
    "wide_ids_and_weights": LayerForm(_same(topk_ids=_wide, topk_weights=_wide)),
    "int16_ids": LayerForm(_same(topk_ids=lambda t: t.short())),
    "uint8_ids": LayerForm(_same(topk_ids=lambda t: t.to(torch.uint8))),
    "uint32_ids": LayerForm(_same(topk_ids=lambda t: t.to(torch.uint32))),
    "int64_expert_map": LayerForm(_mapped, "int8"),
    "scale_e_n_1": LayerForm(
        _same(w13_scale=lambda t: t[..., None], w2_scale=lambda t: t[..., None]), "fp8"
    ),
    "scale_e_2": LayerForm(_halves, "int8"),
    "scale_e_1": LayerForm(_one_each, "int8"),
    "scale_1": LayerForm(_one, "fp8"),
    "bf16_scale": LayerForm(_rounded(torch.bfloat16, "w13_scale"), "int8"),
    "sliced_scale": LayerForm(_same(w2_scale=_wide), "fp8"),
    "quantized_hidden": LayerForm(_quantized, "fp8"),
    "quantized_hidden_int8": LayerForm(_quantized, "int8"),
}
