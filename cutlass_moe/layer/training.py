"""fused_moe with gradients: a forward and a backward op, each a few launches, for torch's autograd.

  forward                                         backward, from the output's gradient g [T, H]
  h = x[index] @ w13 + bias        [R, 2I or I]   ga = g[index] @ w2
  a = activation(h)                [R, I]         gh = w * ga * activation'(h); w's: sum of ga * a
  rows = a @ w2 + bias             [R, H]         w2's: g[index] x (w * a); w13's: gh x x[index]
  out = residual + sum of w * rows [T, H]         x's: sum of a token's rows of gh @ w13

x is `hidden`. There are R = T * k rows, sorted by expert, and w is the router weight of a row. It
multiplies `a` instead of g, so nothing of R x H is kept for its gradient. One kernel makes h and a,
and one gh and w * a without storing ga; products.py says where they can't.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cutlass_moe.layer.accept import Conversion, conversions, convert, weigh_input, widened
from cutlass_moe.layer.backward import GradInto, LayerBackward, Needs, Saved
from cutlass_moe.layer.chain import INVARIANT_ROWS
from cutlass_moe.layer.checks import convert_checked, why_no_gradient
from cutlass_moe.layer.products import Factor, How, project, project_up, rows_dtype
from cutlass_moe.operands import LAYER_SCHEMA, LayerOperands, LayerOptions
from cutlass_moe.ops._checks import expect
from cutlass_moe.ops._define import define, define_gradient
from cutlass_moe.ops.combine import combine
from cutlass_moe.ops.grouped_matmul import is_plain_eager
from cutlass_moe.ops.route import RoutingTable, route
from cutlass_moe.runtime.signatures import Signatures, signature

_COUNT = len(LayerOperands._fields)


def differentiable_layer(
    layer: LayerOperands, options: LayerOptions, recompute: bool, into: GradInto
) -> Tensor:
    """`fused_moe` of arguments of which one requires a gradient. into: from `check_into`.

    Raises RuntimeError where a gradient would be lost, and what `fused_moe` raises.
    """
    reason = why_no_gradient(layer, options)
    if reason is not None:
        raise RuntimeError(reason)
    shape = layer.hidden.shape
    for name in ("hidden", "residual", "topk_ids", "topk_weights"):
        tensor = getattr(layer, name)
        if tensor is not None and tensor.dim() > 2:
            layer = layer._replace(**{name: tensor.flatten(0, -2)})
    layer = widened(layer)
    if options.quant is not None:
        for name, conversion in conversions(layer, options):
            if name in ("w13_scale", "w2_scale"):  # the backward reads them too
                layer = layer._replace(**{name: conversion(getattr(layer, name))})
    if options.weight_on_input and layer.topk_ids.shape[-1] == 1:
        layer = weigh_input(layer)
        layer = layer._replace(topk_weights=torch.ones_like(layer.topk_weights))
        options = options._replace(weight_on_input=False)
    plain = is_plain_eager(layer.hidden, layer.w13) and not layer.hidden.is_meta
    if plain or into != (None, None):
        out = _Layer.apply(into, options, recompute, *layer)
    else:
        out = _train_op(*layer, *options, recompute)[0]
    return out[:, : shape[-1]].reshape(shape)


def check_into(layer: LayerOperands, grad_into: GradInto) -> GradInto:
    """Checks and returns `grad_into` of `fused_moe`.

    Raises TypeError, ValueError or, under torch.compile, RuntimeError.
    """
    if not isinstance(grad_into, tuple) or len(grad_into) != 2:
        raise TypeError(
            "grad_into must be a tuple of two, of tensors or None, for w13 and w2, got "
            f"{type(grad_into).__name__}"
        )
    if torch.compiler.is_compiling():
        raise RuntimeError("grad_into must be None under torch.compile, which cannot trace it")
    for name, into in zip(("w13", "w2"), grad_into, strict=True):
        weight: Tensor = getattr(layer, name)
        if into is None:
            continue
        if not isinstance(into, Tensor):
            raise TypeError(f"grad_into of {name} must be a tensor, got {type(into).__name__}")
        expect(
            f"grad_into of {name}",
            into,
            weight.get_device(),
            (torch.float32, weight.dtype),
            (tuple(weight.shape),),
            dense=False,
        )
        if not owner(weight).is_leaf:
            raise ValueError(
                f"grad_into needs a {name} that is a leaf of the graph or a view of one, got the "
                "result of an operation"
            )
    return grad_into


def owner(weight: Tensor) -> Tensor:
    """The tensor that a view shows, such as the parameter of a transpose; else the tensor."""
    return weight if weight._base is None else weight._base


# The forward.


def _train(layer: LayerOperands, options: LayerOptions, recompute: bool) -> tuple[Tensor, ...]:
    """Returns the output, and what `Saved` has of the forward."""
    layer = _checked(layer, options)
    hidden, how = layer.hidden, _how(layer, options)
    up = Factor(layer.w13, layer.w13_scale, layer.w13_bias)
    down = Factor(layer.w2, layer.w2_scale, layer.w2_bias)
    table = _route(layer, options)
    index, offsets, inverse = table.index, table.offsets, table.inverse
    if recompute:
        h = hidden.new_empty(0, layer.w13.shape[1], dtype=_stored(hidden, options))
        active = project(hidden, up, how, offsets, index, h.dtype, activated=True)
    else:
        h, active = project_up(hidden, up, how, table, _stored(hidden, options))
    wide = rows_dtype(hidden)
    rows = project(active, down, how, offsets, out_dtype=wide)
    residual = None if layer.residual is None else layer.residual.to(wide)
    out = combine(rows, layer.topk_weights, inverse, residual=residual)
    return out.to(hidden.dtype), h, index, offsets, inverse


def _stored(hidden: Tensor, options: LayerOptions) -> torch.dtype:
    """The dtype of the up projection as it is kept."""
    return hidden.dtype if options.quant is None else torch.bfloat16


def _how(layer: LayerOperands, options: LayerOptions) -> How:
    numbers = options.limit, options.alpha, options.beta
    return How(
        options.activation,
        options.interleaved,
        *numbers,
        options.quant,
        options.accumulation,
        _expected_rows(layer, options),
    )


def _train_impl(*arguments: Any) -> tuple[Tensor, ...]:
    return _train(*_split(arguments))


_conversions: Signatures[list[tuple[str, Conversion]]] = Signatures()


def _checked(layer: LayerOperands, options: LayerOptions) -> LayerOperands:
    """The arguments as kernels read them, checked once per signature."""
    key = signature(options, layer)
    needed = _conversions.get(key)
    if needed is None:
        layer, needed = convert_checked(layer, options)
        _conversions.keep(key, needed)
        return layer
    return convert(layer, needed)


def _route(layer: LayerOperands, options: LayerOptions) -> RoutingTable:
    """The routing table, of at most `max_rows` rows."""
    table = route(
        layer.topk_ids,
        len(layer.w2),
        expert_map=layer.expert_map,
        capacity_factor=options.capacity_factor,
    )
    most = options.rows(layer.topk_ids.numel())
    if most == len(table.index):
        return table
    return RoutingTable(
        table.index[:most].clone(),
        table.offsets.clamp(max=most),
        table.inverse.where(table.inverse < most, -1),
    )


def _expected_rows(layer: LayerOperands, options: LayerOptions) -> int:
    """The rows per expert that configs are chosen for."""
    if options.batch_invariant:
        return INVARIANT_ROWS
    experts = len(layer.w2) if layer.expert_map is None else layer.expert_map.numel()
    return -(-layer.topk_ids.numel() // max(experts, 1))


def _train_fake(*arguments: Any) -> tuple[Tensor, ...]:
    layer, options, recompute = _split(arguments)
    layer, _ = convert_checked(layer, options)
    hidden, ids = layer.hidden, layer.topk_ids
    rows = options.rows(ids.numel())
    return (
        hidden.new_empty(hidden.shape[0], layer.w2.shape[1]),
        hidden.new_empty(
            0 if recompute else rows, layer.w13.shape[1], dtype=_stored(hidden, options)
        ),
        ids.new_empty(rows, dtype=torch.int32),
        ids.new_empty(layer.w2.shape[0], dtype=torch.int32),
        ids.new_empty(ids.shape, dtype=torch.int32),
    )


def _split(arguments: tuple[Any, ...]) -> tuple[LayerOperands, LayerOptions, bool]:
    options = LayerOptions(*arguments[_COUNT:-1])
    return LayerOperands(*arguments[:_COUNT]), options, arguments[-1]


# The backward.


def _backward_impl(grad: Tensor, *arguments: Any) -> list[Tensor]:
    saved, how, needs = _split_backward(arguments)
    found = LayerBackward(grad, saved, how).gradients(needs)
    return [gradient for gradient in found if gradient is not None]


def _backward_fake(grad: Tensor, *arguments: Any) -> list[Tensor]:
    saved, _, needs = _split_backward(arguments)
    inputs = zip(saved.inputs, needs, strict=True)
    return [torch.empty_like(tensor) for tensor, need in inputs if need and tensor is not None]


def _split_backward(arguments: tuple[Any, ...]) -> tuple[Saved, How, Needs]:
    count = len(Saved._fields)
    return Saved(*arguments[:count]), How(*arguments[count:-1]), Needs(*arguments[-1])


# Autograd.


def _keep(
    ctx: Any,
    layer: LayerOperands,
    options: LayerOptions,
    forward: tuple[Tensor, ...],
    into: GradInto = (None, None),
) -> None:
    """Keeps what the backward needs. forward: h and the routing table."""
    ctx.set_materialize_grads(False)
    inputs = Saved._fields[: -len(forward)]
    ctx.save_for_backward(*(getattr(layer, name) for name in inputs), *forward)
    ctx.how = _how(layer, options)
    ctx.into = into
    ctx.owners = [
        None if place is None else owner(weight)
        for weight, place in zip((layer.w13, layer.w2), into, strict=True)
    ]


def _gradients(
    ctx: Any, grad: Tensor | None, wanted: tuple[bool, ...], by_op: bool
) -> tuple[Tensor | None, ...]:
    """The gradients of `LayerOperands`, those that are wanted. by_op: for torch's dispatcher."""
    if grad is None:
        return (None,) * _COUNT
    want = dict(zip(LayerOperands._fields, wanted, strict=True))
    needs = Needs(*(want[name] for name in Needs._fields))
    found: dict[str, Tensor | None] = {"residual": grad if want["residual"] else None}
    if any(needs) and by_op:
        computed = iter(_backward_op(grad, *ctx.saved_tensors, *ctx.how, list(needs)))
        for name, need in needs._asdict().items():
            found[name] = next(computed) if need else None
    elif any(needs):
        owned = not torch._C._autograd._get_current_graph_task_keep_graph()
        with torch.no_grad():
            backward = LayerBackward(grad, Saved(*ctx.saved_tensors), ctx.how, owned)
            if owned:
                ctx.maybe_clear_saved_tensors()  # which would keep h until the end
            gradients = backward.gradients(needs, ctx.into)
        found.update(zip(Needs._fields, gradients, strict=True))
        for name, weight in zip(("w13", "w2"), ctx.owners, strict=True):
            if want[name] and weight is not None:
                found[name] = _added(weight, getattr(backward.saved, name))
    return tuple(found.get(name) for name in LayerOperands._fields)


class _Layer(torch.autograd.Function):
    """The layer without torch's dispatcher, which takes longer than all else on the host.

    The op below is for what traces, and for what chooses by op what to keep.
    """

    @staticmethod
    def forward(
        ctx: Any, into: GradInto, options: LayerOptions, recompute: bool, *tensors: Tensor | None
    ) -> Tensor:
        layer = LayerOperands(*tensors)  # type: ignore[arg-type]
        out, *rest = _train(layer, options, recompute)
        _keep(ctx, layer, options, tuple(rest), into)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()  # then the op refuses
        if again and ctx.into != (None, None):
            raise RuntimeError("grad_into must be None where a gradient has a gradient")
        return None, None, None, *_gradients(ctx, grad, ctx.needs_input_grad[3:], by_op=again)


def _added(parameter: Tensor, weight: Tensor) -> Tensor | None:
    """What autograd gets for a weight whose gradient was added elsewhere, by Megatron's convention.

    A parameter with the attribute `grad_added_to_main_grad` is told, and gets a gradient that only
    makes hooks run: zeros if its `zero_out_wgrad` is true, else uninitialised.
    """
    if not hasattr(parameter, "grad_added_to_main_grad"):
        return None
    parameter.grad_added_to_main_grad = True
    zeros = getattr(parameter, "zero_out_wgrad", False)
    return torch.zeros_like(weight) if zeros else torch.empty_like(weight)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    layer, options, _ = _split(inputs)
    _, *forward = output
    ctx.mark_non_differentiable(*forward)
    _keep(ctx, layer, options, tuple(forward))


def _op_gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    others = len(ctx.needs_input_grad) - _COUNT
    found = _gradients(ctx, grad, ctx.needs_input_grad[:_COUNT], by_op=True)
    return (*found, *(None,) * others)


def _no_second_gradient(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("fused_moe is differentiable once, got a gradient of its gradient")


_train_op = define(
    f"fused_moe_train({LAYER_SCHEMA}, bool recompute) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _train_impl,
    _train_fake,
)
_backward_op = define(
    "fused_moe_backward(Tensor grad, Tensor hidden, Tensor w13, Tensor w2, Tensor topk_weights, "
    "Tensor? w13_bias, Tensor? w2_bias, Tensor? w13_scale, Tensor? w2_scale, Tensor h, "
    "Tensor index, Tensor offsets, Tensor inverse, "
    "str activation, bool interleaved, float? limit, float? alpha, float? beta, str? quant, "
    "str? accumulation, SymInt expected_rows, bool[] needs) -> Tensor[]",
    _backward_impl,
    _backward_fake,
)
define_gradient("fused_moe_train", _op_gradients, _save_for_backward)
define_gradient("fused_moe_backward", _no_second_gradient)
