"""fused_moe: a whole mixture-of-experts layer as one chain of kernels in one workspace."""

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
    """Computes a whole mixture-of-experts layer from each token's experts and weights.

      out[t] = residual[t] + sum over j of topk_weights[t, j] * expert(topk_ids[t, j], hidden[t])
      expert(e, h) = w2[e] @ activation(w13[e] @ h + w13_bias[e]) + w2_bias[e]

    hidden [T, H]: bfloat16 or float16, contiguous.
    topk_weights float32 [T, k], topk_ids int32 or int64 [T, k]: contiguous. An id outside [0, E)
      adds nothing. The host reads neither.
    w13 [E, 2I, H] for a gated activation, else [E, I, H]; w2 [E, H, I]. Without quant they have
      hidden's dtype, and either dimension of a matrix may be dense: `w.transpose(1, 2)` of a
      contiguous w [E, K, N] will do.
    quant: "fp8" (float8_e4m3fn weights) or "int8". Needs w13_scale float32 [E, 2I or I] or [E], and
      w2_scale float32 [E, H] or [E]. Tokens, and the activation's float16 results, are quantised
      as `quantize_per_token` does.
    activation: "swiglu", "geglu", "reglu" or "swiglu_oai", which are gated, or "gelu", "silu",
      "relu" or "relu2"; formulas in `grouped_matmul`.
    interleaved: the rows of w13 are gate, up, gate, up, ... instead of all gates, then all ups.
    w13_bias [E, 2I or I], w2_bias [E, H]: bfloat16, float16 or float32.
    expert_map int32 [experts of all ranks]: the local id in [0, E) of each id, or -1.
    capacity_factor: limits the rows of an expert, as in `route`; later tokens are dropped.
    residual [T, H]: hidden's dtype; default zeros.
    accumulation: of both products, as in `grouped_matmul`.
    out [T, H]: hidden's dtype; default a new tensor.
    workspace uint8 [`fused_moe_workspace_size` or more]: default a new one. Calls that may run at
      the same time need one each. With out and workspace, a call allocates nothing.
    pdl: lets kernels start before their predecessors end (programmatic dependent launch).

    Returns out. CPU tensors, and problems without a kernel, take `fused_moe_reference`. Raises
    TypeError or ValueError that says what must be and what came, and RuntimeError where a gradient
    would be lost: this function is not differentiable, the modules of `cutlass_moe.nn` are.
    """
    layer = LayerOperands(
        hidden, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale, w13_bias, w2_bias,
        expert_map, residual,
    )  # fmt: skip
    options = LayerOptions(quant, activation, interleaved, capacity_factor, accumulation, pdl)
    if wants_gradient(layer):
        raise RuntimeError(
            "fused_moe has no gradient and an argument requires one: use a module of "
            "cutlass_moe.nn, or call under torch.no_grad()"
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
    """The bytes of workspace that `fused_moe` needs for these arguments.

    That is also enough for fewer tokens of the same layer. Takes the arguments of `fused_moe`;
    tensors may be on the meta device. Raises what `fused_moe` raises.
    """
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
