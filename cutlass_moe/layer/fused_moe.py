"""fused_moe: a whole mixture-of-experts layer as one chain of kernels in one workspace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cutlass_moe.layer.accept import widened
from cutlass_moe.layer.backward import GradInto
from cutlass_moe.layer.chain import launch_layer, plan_workspace
from cutlass_moe.layer.checks import accept_layer, convert_checked
from cutlass_moe.layer.training import check_into, differentiable_layer
from cutlass_moe.operands import (
    LAYER_SCHEMA,
    LayerArguments,
    LayerOperands,
    LayerOptions,
    split_layer,
)
from cutlass_moe.ops._checks import expect
from cutlass_moe.ops._define import define
from cutlass_moe.ops._types import check_types, typed
from cutlass_moe.ops.grouped_matmul import is_plain_eager, wants_gradient
from emitters.spec.registry import Problem

if TYPE_CHECKING:
    from typing_extensions import Unpack

_NOT_INTO = (
    "fused_moe has no gradient into out or workspace and an argument requires one: leave them out, "
    "or call under torch.no_grad()"
)


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
    limit: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    hidden_scale: Tensor | None = None,
    active_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    max_rows: int | None = None,
    overflow: Tensor | None = None,
    reduce: str = "sum",
    weight_on_input: bool = False,
    batch_invariant: bool = False,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    pdl: bool = True,
    recompute: bool = False,
    grad_into: GradInto | None = None,
) -> Tensor:
    """Computes a whole mixture-of-experts layer from each token's experts and weights.

      out[t] = residual[t] + sum over j of topk_weights[t, j] * expert(topk_ids[t, j], hidden[t])
      expert(e, h) = w2[e] @ activation(w13[e] @ h + w13_bias[e]) + w2_bias[e]

    hidden [T, H] or [..., H]: bfloat16 or float16; with quant also of the weights' dtype.
    topk_weights [T, k]: bfloat16, float16 or float32. topk_ids [T, k]: int32, int64 or any integers
      of 8 or 16 bits. An id outside [0, E) adds nothing. The host reads neither.
    w13 [E, 2I, H] for a gated activation, else [E, I, H]; w2 [E, H, I]. Without quant they have
      hidden's dtype, and either dimension of a matrix may be dense: `w.transpose(1, 2)` of a
      contiguous w [E, K, N] will do. Or both are packed 4-bit weights, of `pack_weights` or
      `quantize_packed`, beside bfloat16 hidden: then quant is None, I and H are multiples of 32,
      and w13's rows are gates, then ups.
    quant: "fp8" (float8_e4m3fn weights) or "int8". Needs w13_scale float32 [E, 2I or I] or [E], and
      w2_scale float32 [E, H] or [E]. Tokens, and the activation's results in bfloat16, are
      quantised as `quantize_per_token` does. "fp8_block" (float8_e4m3fn) needs w13_scale float32
      [E, blocks of 2I or I, H / 128] and w2_scale [E, blocks of H, I / 128] as
      `quantize_per_block(gated=True)` and checkpoints with `weight_block_size` have them: blocks of
      128, 64 or 32 rows, those of gates and of ups apart; hidden_scale is then [T, H / 128], and
      quantisation that of `quantize_per_token_group`, of activations in float32. Scales per channel
      may have other shapes, [E, N, 1], [E, 1], [E, 2] (one for the gates, one for the ups) or [1],
      and all scales may be bfloat16 or float16: they are converted.
    hidden_scale: float32 [T] or [T, 1], the scales of 8-bit hidden, which needs them. With 16-bit
      hidden it is a static scale: one value, or [E], of which the largest serves all tokens.
    active_scale: a static scale of the activation's results, float32, one value or [E], as above.
    activation: "swiglu", "geglu", "geglu_tanh", "reglu" or "swiglu_oai", which are gated, or
      "gelu", "gelu_tanh", "silu", "relu" or "relu2"; formulas in `grouped_matmul`, and limit, alpha
      and beta too.
    interleaved: the rows of w13 are gate, up, gate, up, ... instead of all gates, then all ups; of
      packed weights, those of w13_bias alone.
    w13_bias [E, 2I or I], w2_bias [E, H]: bfloat16, float16 or float32.
    expert_map int32 or int64 [experts of all ranks]: the local id in [0, E) of each id, or -1.
    capacity_factor: limits the rows of an expert, as in `route`; later tokens are dropped.
    residual [T, H]: hidden's dtype; default zeros.
    accumulation: of both products, as in `grouped_matmul`.
    out_dtype: of the output: hidden's dtype, or for 8-bit hidden bfloat16 (default) or float16.
    max_rows: a bound of the rows that the experts here get together, for workspaces and grids that
      are smaller than all T * k pairs need; rows beyond it are dropped, and their number is written
      to overflow int32 [1], on the device.
    reduce: "sum"; or "weighted" and "none" for [..., k, H] like topk_ids, the rows of each pair
      with and without their weight, zeros where a pair has none.
    weight_on_input: a token's only weight (k = 1) multiplies the token, not the result.
    batch_invariant: a token's result does not depend on T or on other tokens: configs are those
      for 64 rows per expert, whatever comes. Fewer tokens then take longer.
    out: of the output's dtype and shape; default a new tensor.
    workspace uint8 [`fused_moe_workspace_size` or more]: default a new one. Calls that may run at
      the same time need one each. With out and workspace, a call allocates nothing.
    pdl: lets kernels start before their predecessors end (programmatic dependent launch).

    Gradients: of hidden, w13, w2, topk_weights, the biases and residual, once, by kernels, under
    torch.compile and activation checkpointing too. Kept for them are hidden, the up projection
    before its activation [rows, 2I or I], and the routing table; nothing of rows x H. The
    activation then reads that projection as it was rounded to hidden's dtype. Weights that need no
    gradient cost no product. The gradient of a pair that was dropped is 0. With quant "fp8" and
    "int8" weights are frozen, quantisations of tokens and activations have the gradient of the
    identity, and the backward makes bfloat16 of 128 MiB of weights at a time. Calls that want a
    gradient take no out, workspace, overflow and static scales, and reduce="sum" only.
    recompute: keeps hidden and the table alone, and computes the up projection again.
    grad_into: a tuple of two tensors of the shapes of w13 and w2, float32 or of their dtype, one of
      which may be None: the gradients of the weights are added to these, and `w13.grad` and
      `w2.grad` stay as they are. Where a weight, or the tensor that it is a view of, has an
      attribute `grad_added_to_main_grad`, Megatron's convention holds: it is set to True, and
      autograd gets a gradient without meaning, for its hooks. Not under torch.compile.

    Read in place: hidden with a row stride that is a multiple of 16 bytes, and topk_weights with
    any row stride. Every other layout or dtype that is not the first named is converted by a launch
    of its own in every call: scales and maps that are constant should be converted once, at load.
    hidden, residual, scales and biases whose addresses kernels can't read are copied, with one
    warning; weights must be aligned to 16 bytes.

    Returns out. CPU tensors, and problems without a kernel, take `fused_moe_reference`; `why_not`
    says which these are, and `pad_experts` mends those whose I or H makes no rows of 16 bytes.
    Raises TypeError or ValueError that says what must be and what came, and RuntimeError where a
    gradient would be lost.
    """
    layer = LayerOperands(
        hidden, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale, w13_bias, w2_bias,
        expert_map, residual, hidden_scale, active_scale, overflow,
    )  # fmt: skip
    options = LayerOptions(
        quant, activation, interleaved, capacity_factor, accumulation, pdl, limit, alpha, beta,
        out_dtype, max_rows, reduce, weight_on_input, batch_invariant,
    )  # fmt: skip
    try:
        if type(recompute) is not bool:
            check_types(fused_moe, locals())
        into = (None, None) if grad_into is None else check_into(layer, grad_into)
        gradient, plain = wants_gradient((*layer, out, workspace)), is_plain_eager(hidden, w13)
        if gradient:
            if out is not None or workspace is not None:
                raise RuntimeError(_NOT_INTO)
            return differentiable_layer(layer, options, recompute, into)
        out = _empty(layer, options) if out is None else out
        written = out.view(-1, *out.shape[(-1 if reduce == "sum" else -2) :])
        if plain:
            _run(written, workspace, layer, options)
        else:
            _fused_moe_out_op(written, workspace, *layer, *options)
        return out
    except Exception:
        check_types(fused_moe, locals())
        raise


@typed
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
    layer, _, problems = accept_layer(widened(layer), options)
    return plan_workspace(layer, options, problems).layout.size


@typed
def fused_moe_problems(
    hidden: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    **arguments: Unpack[LayerArguments],
) -> list[Problem]:
    """The problems that these arguments pose, for `warmup`; they are the same for any T.

    Takes the arguments of `fused_moe`; tensors may be on the meta device. Raises what `fused_moe`
    raises.

        cutlass_moe.warmup(cutlass_moe.fused_moe_problems(hidden, w13, w2, topk_weights, topk_ids))
    """
    layer, options = split_layer(hidden, w13, w2, topk_weights, topk_ids, arguments)
    return [problem for problem in accept_layer(widened(layer), options).problems if problem]


def _empty(layer: LayerOperands, options: LayerOptions) -> Tensor:
    """A new tensor for the output of arguments that are not checked yet."""
    hidden = layer.hidden
    shape = hidden.shape
    if options.reduce != "sum":
        shape = torch.Size((*layer.topk_ids.shape, hidden.shape[-1]))
    return hidden.new_empty(shape, dtype=options.outside(hidden.dtype))


def _run(
    out: Tensor, workspace: Tensor | None, layer: LayerOperands, options: LayerOptions
) -> None:
    if layer.hidden.is_meta:
        _check(out, layer, options)
        return
    wide = widened(layer)
    if wide is not layer and wide.w2.shape[1] != out.shape[-1]:
        _check_narrow(out, layer, options)
        room = out.new_empty((*out.shape[:-1], wide.w2.shape[1]))
        _run(room, workspace, wide, options)
        out.copy_(room[..., : out.shape[-1]])
        return
    launch_layer(wide, options, out, workspace)


def _fused_moe_out_impl(out: Tensor, workspace: Tensor | None, *arguments: Any) -> None:
    count = len(LayerOperands._fields)
    _run(out, workspace, LayerOperands(*arguments[:count]), LayerOptions(*arguments[count:]))


def _fused_moe_out_fake(out: Tensor, workspace: Tensor | None, *arguments: Any) -> None:
    count = len(LayerOperands._fields)
    _check(out, LayerOperands(*arguments[:count]), LayerOptions(*arguments[count:]))


def _check(out: Tensor, layer: LayerOperands, options: LayerOptions) -> None:
    """Checks arguments that have no values."""
    wide = widened(layer)
    narrow = wide is not layer and wide.w2.shape[1] != out.shape[-1]
    if narrow:
        _check_narrow(out, layer, options)
    convert_checked(wide, options, None if narrow else out)


def _check_narrow(out: Tensor, layer: LayerOperands, options: LayerOptions) -> None:
    """Checks `out` of a layer whose experts are padded to more columns than hidden has."""
    tokens, hidden = layer.hidden.shape[:-1].numel(), layer.hidden
    shape = (tokens, *layer.topk_ids.shape[-1:] * (options.reduce != "sum"), hidden.shape[-1])
    expect("out", out, hidden.get_device(), (options.outside(hidden.dtype),), (shape,))


_fused_moe_out_op = define(
    "fused_moe_out(Tensor(a!) out, Tensor(b!)? workspace, "
    f"{LAYER_SCHEMA.replace('Tensor? overflow', 'Tensor(c!)? overflow')}) -> ()",
    _fused_moe_out_impl,
    _fused_moe_out_fake,
)
