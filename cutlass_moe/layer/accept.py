"""What callers of fused_moe hand over, in the forms that its kernels read.

Each conversion is a launch or a copy in every call; `fused_moe` says which there are. Where a
tensor is constant, convert it once at load.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from cutlass_moe.operands import DTYPES, FP8_BLOCK, LayerOperands, LayerOptions, padded
from cutlass_moe.ops._copies import (
    NARROW,
    as_int32,
    at_address,
    refuse_misaligned,
    refuse_other_devices,
    token_scale,
    weight_scale,
)
from cutlass_moe.ops.activations import is_gated

Conversion = Callable[[Tensor], Tensor]
_SMALL_INTEGERS = (torch.int16, torch.uint8, torch.int8, torch.uint16, torch.uint32)
ALIGNMENTS = {  # bytes that addresses must be multiples of
    **dict.fromkeys(("hidden", "w13", "w2", "residual", "out"), 16),
    **dict.fromkeys(("w13_scale", "w2_scale", "w13_bias", "w2_bias"), 8),
}
_WEIGHTS = ("w13", "w2")  # too large to copy


def conversions(layer: LayerOperands, options: LayerOptions) -> list[tuple[str, Conversion]]:
    """The conversions that arguments of these dtypes, shapes and strides need, by name."""
    found: list[tuple[str, Conversion]] = []

    def add(name: str, convert: Conversion | None) -> None:
        tensor = getattr(layer, name)
        if convert is None or tensor is None or (convert is _contiguous and tensor.is_contiguous()):
            return
        found.append((name, convert))

    for name in ("hidden", "residual", "topk_ids", "topk_weights"):
        tensor = getattr(layer, name)
        if tensor is not None and tensor.dim() > 2:
            add(name, lambda t: t.flatten(0, -2))
    add("hidden", None if _strided_rows(layer.hidden, 16) else _contiguous)
    add("residual", _contiguous)
    ids = layer.topk_ids
    add("topk_ids", _to_int32 if ids.dtype in _SMALL_INTEGERS else _contiguous)
    whole = options.reduce != "sum" or not _strided_rows(layer.topk_weights, 1)
    add("topk_weights", _contiguous if whole else None)
    if layer.expert_map is not None:
        add("expert_map", _to_int32 if layer.expert_map.dtype == torch.int64 else _contiguous)
    for name, weight in (("w13", layer.w13), ("w2", layer.w2)):
        scale = getattr(layer, f"{name}_scale")
        add(f"{name}_bias", _contiguous)
        if scale is not None and options.quant == FP8_BLOCK:
            add(f"{name}_scale", _contiguous if scale.dtype not in NARROW else _float32)
        elif scale is not None:
            gated = name == "w13" and is_gated(options.activation)
            to_kernels_form = _per_channel(weight, gated, options.interleaved)
            plain = to_kernels_form(scale) is scale
            add(f"{name}_scale", None if plain else to_kernels_form)
    tokens = layer.hidden.shape[:-1].numel()
    one_per_token = layer.hidden.dtype.itemsize == 1
    if options.quant != FP8_BLOCK:
        add("hidden_scale", _per_token(tokens) if one_per_token else _one_value)
        add("active_scale", _one_value)
    return found


def converted(
    layer: LayerOperands, options: LayerOptions
) -> tuple[LayerOperands, list[tuple[str, Conversion]]]:
    """The arguments in the forms that kernels read, and the conversions that this took."""
    found = conversions(layer, options)
    return convert(layer, found), found


def convert(layer: LayerOperands, found: list[tuple[str, Conversion]]) -> LayerOperands:
    """The arguments after these conversions."""
    for name, conversion in found:
        layer = layer._replace(**{name: conversion(getattr(layer, name))})
    return layer


def widened(layer: LayerOperands) -> LayerOperands:
    """The arguments with hidden and residual as wide as `pad_experts` made the weights."""
    hidden, residual, w13, w2 = layer.hidden, layer.residual, layer.w13, layer.w2
    if w13.dim() != 3 or w2.dim() != 3 or hidden.dtype not in DTYPES:
        return layer
    width = w13.shape[2] if hidden.dtype.itemsize == 1 else w2.shape[1]
    if width == hidden.shape[-1] or width != padded(hidden.shape[-1], DTYPES[hidden.dtype]):
        return layer  # the usual case, or one that check_layer refuses
    if residual is not None:
        residual = functional.pad(residual, (0, w2.shape[1] - residual.shape[-1]))
    hidden = functional.pad(hidden, (0, width - hidden.shape[-1]))
    return layer._replace(hidden=hidden, residual=residual)


def weigh_input(layer: LayerOperands) -> LayerOperands:
    """The arguments with each token's only weight applied to the token."""
    hidden, weights = layer.hidden, layer.topk_weights
    if hidden.dtype.itemsize == 1:
        assert layer.hidden_scale is not None
        weight = weights[:, :1] if layer.hidden_scale.dim() == 2 else weights[:, 0]
        return layer._replace(hidden_scale=layer.hidden_scale * weight.float())
    return layer._replace(hidden=hidden * weights.to(hidden.dtype))


def aligned(layer: LayerOperands) -> LayerOperands:
    """The arguments at addresses that kernels can read: copies, with one warning, of the others.

    Weights are not copied, and the output is none of these arguments.
    """
    for name, multiple in ALIGNMENTS.items():
        tensor = None if name in _WEIGHTS else getattr(layer, name, None)
        if tensor is not None and tensor.data_ptr() % multiple:
            layer = layer._replace(**{name: at_address(name, tensor, multiple)})
    return layer


def refuse_unreadable(layer: LayerOperands) -> None:
    """Raises ValueError where a GPU would: weights at odd addresses, tensors without memory."""
    for name in _WEIGHTS:
        refuse_misaligned(name, getattr(layer, name), ALIGNMENTS[name])
    refuse_other_devices(layer._asdict(), layer.hidden.device)


def _strided_rows(tensor: Tensor, multiple: int) -> bool:
    """Whether rows are dense, and `multiple` bytes divide the distance between them."""
    if tensor.dim() < 2:
        return False
    if tensor.dim() > 2 and not tensor.is_contiguous():
        return False
    dense = tensor.shape[-1] == 1 or tensor.stride(-1) == 1
    return dense and tensor.stride(-2) * tensor.element_size() % multiple == 0


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def _float32(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()


def _to_int32(tensor: Tensor) -> Tensor:
    return as_int32(tensor.long())


def _one_value(scale: Tensor) -> Tensor:
    """One scale for all rows: the largest, where each expert has its own."""
    return scale.float().max().reshape(1)


def _per_token(tokens: int) -> Conversion:
    """A float32 scale per token, from [T], [T, 1] or one value."""

    def expand(scale: Tensor) -> Tensor:
        scale = token_scale(scale, tokens)
        return scale.flatten() if scale.shape[1:] == (1,) else scale

    return expand


def _per_channel(weight: Tensor, gated: bool, interleaved: bool) -> Conversion:
    """Weights' scales as float32 [E, N] or [E], from all that `weight_scale` takes.

    Where gated, [E, 2] has one of the gates and one of the ups.
    """
    experts, n, _ = weight.shape

    def to_kernels_form(scale: Tensor) -> Tensor:
        if gated and n != 2 and scale.shape in ((experts, 2), (experts, 2, 1)):
            halves = scale.reshape(experts, 2, 1).expand(experts, 2, n // 2)
            scale = (halves.mT if interleaved else halves).reshape(experts, n)
        scale = weight_scale(scale, experts)
        return scale.squeeze(-1) if scale.dim() == 3 else scale

    return to_kernels_form
