"""fused_moe: a whole mixture-of-experts layer as one chain of kernels, in one workspace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cutlass_moe.layer.chain import LayerWorkspace, find_chain
from cutlass_moe.layer.checks import check_layer
from cutlass_moe.operands import LayerArguments, LayerOperands, LayerOptions, split_layer
from cutlass_moe.ops._define import define
from cutlass_moe.ops.grouped_matmul import is_plain_eager, wants_gradient

if TYPE_CHECKING:
    from typing_extensions import Unpack


def fused_moe(
    hidden: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    quant: str | None = None,
    w13_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    activation: str = "swiglu",
    interleaved: bool = False,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    expert_map: Tensor | None = None,
    capacity_factor: float | None = None,
    residual: Tensor | None = None,
    accumulation: str | None = None,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    pdl: bool = True,
) -> Tensor:
    """residual[t] + sum over j of topk_weights[t, j] * expert topk_ids[t, j] of hidden[t].

    An expert is w2[e] @ activation(w13[e] @ hidden[t] + w13_bias[e]) + w2_bias[e].

    hidden [T, H], contiguous: bfloat16 or float16. topk_weights float32 [T, k], topk_ids int32 or
      int64 [T, k], contiguous; an id outside [0, E) adds nothing. Nothing is read by the host.
    w13 [E, 2I, H], or [E, I, H] where the activation has no gate; w2 [E, H, I]. Without quant of
      hidden's dtype, either dimension of a matrix dense (N-major: `w[E, K, N].transpose(1, 2)`).
    quant: "fp8" or "int8": float8_e4m3fn or int8 weights with w13_scale float32 [E, 2I] or [E],
      w2_scale [E, H] or [E]. Tokens are quantised, and so are activations, from their float16
      values, each by `quantize_per_token`.
    activation: "swiglu", "geglu", "reglu", "swiglu_oai", or without a gate "gelu", "silu", "relu",
      "relu2", as in `grouped_matmul`. w13 is [gate; up], or gate, up, gate, up, ... if interleaved.
    w13_bias [E, 2I], w2_bias [E, H]: bfloat16, float16 or float32.
    expert_map int32 [experts of all ranks]: the local id in [0, E) of each id, or -1.
    capacity_factor: at most ceil(T * k / experts * capacity_factor) rows an expert; later tokens
      are dropped. residual [T, H] of hidden's dtype.
    accumulation: as in `grouped_matmul`, of both products.
    out [T, H]: what is returned; else it is new. workspace uint8, at least
      `fused_moe_workspace_size` of the same arguments: with both, nothing is allocated, and calls
      that may run at once need one each. pdl: kernels start before their predecessors end
      (programmatic dependent launch).

    Returns [T, H] of hidden's dtype. Not differentiable: raises RuntimeError where a gradient would
    be lost. Raises TypeError or ValueError, with what was expected and what came. CPU tensors, and
    problems that no kernel exists for, take `fused_moe_reference`.
    """
    layer = LayerOperands(
        hidden, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale, w13_bias, w2_bias,
        expert_map, residual,
    )  # fmt: skip
    options = LayerOptions(quant, activation, interleaved, capacity_factor, accumulation, pdl)
    if wants_gradient(layer):
        raise RuntimeError(
            "fused_moe has no gradient and an argument requires one: use cutlass_moe.nn's modules, "
            "or torch.no_grad()"
        )
    if out is None:
        out = torch.empty_like(hidden)
    if is_plain_eager(hidden, w13):
        _run(out, workspace, layer, options)
    else:
        _fused_moe_out_op(out, workspace, *layer, *options)
    return out


def fused_moe_workspace_size(
    hidden: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    **arguments: Unpack[LayerArguments],
) -> int:
    """Bytes of workspace that `fused_moe` needs for these arguments, and for fewer tokens of the
    same layer. Tensors on the meta device will do. Raises as `fused_moe` does."""
    layer, options = split_layer(hidden, w13, w2, topk_weights, topk_ids, arguments)
    check_layer(layer, options)
    return LayerWorkspace(layer, options.quant).layout.size


def _run(
    out: Tensor, workspace: Tensor | None, layer: LayerOperands, options: LayerOptions
) -> None:
    chain = find_chain(layer, options, out)
    layout = chain.workspace.layout
    if workspace is None:
        workspace = out.new_empty(layout.size, dtype=torch.uint8)
    chain.launch(layer, out, layout.aligned(workspace).data_ptr())


def _fused_moe_out_impl(out: Tensor, workspace: Tensor | None, *arguments: Any) -> None:
    count = len(LayerOperands._fields)
    _run(out, workspace, LayerOperands(*arguments[:count]), LayerOptions(*arguments[count:]))


def _fused_moe_out_fake(out: Tensor, workspace: Tensor | None, *arguments: Any) -> None:
    count = len(LayerOperands._fields)
    check_layer(LayerOperands(*arguments[:count]), LayerOptions(*arguments[count:]), out)


_fused_moe_out_op = define(
    "fused_moe_out(Tensor(a!) out, Tensor(b!)? workspace, Tensor hidden, Tensor w13, Tensor w2, "
    "Tensor topk_weights, Tensor topk_ids, Tensor? w13_scale, Tensor? w2_scale, Tensor? w13_bias, "
    "Tensor? w2_bias, Tensor? expert_map, Tensor? residual, str? quant, str activation, "
    "bool interleaved, float? capacity_factor, str? accumulation, bool pdl) -> ()",
    _fused_moe_out_impl,
    _fused_moe_out_fake,
)
