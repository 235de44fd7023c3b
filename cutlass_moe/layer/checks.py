"""Checks of the arguments of fused_moe, and the problems that they pose."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cutlass_moe.layer.accept import ALIGNMENTS, Conversion, converted
from cutlass_moe.layer.steps import Forms, LayerProblems, LayerSizes, Projection, layer_problems
from cutlass_moe.operands import (
    DTYPES,
    FLOATS,
    FP8_BLOCK,
    IDS,
    QUANTS,
    LayerOperands,
    LayerOptions,
    padded,
)
from cutlass_moe.ops._checks import (
    check_accumulation,
    check_activation,
    check_packed,
    check_weight,
    expect,
    is_n_major,
)
from cutlass_moe.ops._packed import block_sizes, packing_of
from cutlass_moe.ops._packed import columns as columns_of
from cutlass_moe.ops.activations import is_gated
from cutlass_moe.ops.block_scales import block_granularity, block_shapes
from cutlass_moe.ops.route import check_capacity
from cutlass_moe.runtime.parameters import misaligned
from emitters.spec.dtypes import DType
from emitters.spec.gemm import K_BLOCK, weight_granularity

_HIDDEN = (torch.bfloat16, torch.float16)
REDUCES = ("sum", "weighted", "none")


class Accepted(NamedTuple):
    """Checked arguments of `fused_moe`, in the forms that its kernels read."""

    layer: LayerOperands
    conversions: list[tuple[str, Conversion]]  # that every call with such arguments needs
    problems: LayerProblems


def accept_layer(
    layer: LayerOperands, options: LayerOptions, out: Tensor | None = None
) -> Accepted:
    """Converts and checks arguments that are `widened`, and poses their problems.

    Raises what `check_layer` raises.
    """
    layer, needed = convert_checked(layer, options, out)
    return Accepted(layer, needed, problems_of(layer, options))


def convert_checked(
    layer: LayerOperands, options: LayerOptions, out: Tensor | None = None
) -> tuple[LayerOperands, list[tuple[str, Conversion]]]:
    """Arguments that are `widened` as kernels read them, and the conversions that this took.

    Raises what `check_layer` raises.
    """
    layer, needed = converted(layer, options)
    check_layer(layer, options, out)
    return layer, needed


def check_layer(layer: LayerOperands, options: LayerOptions, out: Tensor | None = None) -> None:
    """Checks the arguments of `fused_moe`, widened and converted as accept.py says.

    Extents may be symbolic. Raises ValueError or TypeError that says what must be and what came.
    """
    hidden, w13, w2 = layer.hidden, layer.w13, layer.w2
    device = hidden.get_device()
    if options.quant is not None and options.quant not in QUANTS:
        names = ", ".join(map(repr, QUANTS))
        raise ValueError(f"quant must be None or one of {names}, got {options.quant!r}")
    check_capacity(options.capacity_factor)
    packed = _check_dims(layer)
    check_activation("w13", w13, options.activation, options.interleaved)
    if options.quant == FP8_BLOCK:
        _check_block_options(options)
    gates = 2 if is_gated(options.activation) else 1
    tokens, width = hidden.shape
    experts, inter = len(w2), inner_size(w13, w2, gates == 2)
    choices = (tokens, layer.topk_ids.shape[1])
    dtype = QUANTS[options.quant] if options.quant else hidden.dtype
    read, columns = _widths(layer, dtype)
    allowed = (*_HIDDEN, dtype) if options.quant else _HIDDEN
    expect("hidden", hidden, device, allowed, (hidden.shape,), dense=False)
    expect("topk_ids", layer.topk_ids, device, IDS, (choices,))
    expect("topk_weights", layer.topk_weights, device, FLOATS, (choices,), dense=False)
    _check_scales(layer, options)
    _check_options(layer, options)
    outside = options.outside(hidden.dtype)
    check_accumulation(options.accumulation, dtype)
    if packed and hidden.dtype is not torch.bfloat16:
        raise TypeError(f"hidden must be {torch.bfloat16} for packed weights, got {hidden.dtype}")
    for name, weight, shape in (
        ("w13", w13, (experts, gates * inter, read)),
        ("w2", w2, (experts, columns, inter)),
    ):
        if packed:
            _check_packed(name, weight, device, shape)
        else:
            check_weight(name, weight, device, shape, dtype)
        scale, bias = getattr(layer, f"{name}_scale"), getattr(layer, f"{name}_bias")
        if (scale is None) != (options.quant is None):
            got = "None" if scale is None else "a tensor"
            raise ValueError(
                f"{name}_scale must be given with quant and only then, got {got} with quant "
                f"{options.quant!r}"
            )
        if scale is not None:
            gated = name == "w13" and gates == 2
            shapes = _scale_shapes(weight, gated, options)
            expect(f"{name}_scale", scale, device, (torch.float32,), shapes)
        if bias is not None:
            expect(f"{name}_bias", bias, device, FLOATS, (shape[:2],))
    if layer.expert_map is not None:
        count = layer.expert_map.numel()
        expect("expert_map", layer.expert_map, device, (torch.int32,), ((count,),))
    if layer.residual is not None:
        expect("residual", layer.residual, device, (outside,), ((tokens, columns),))
    if out is not None:
        expect("out", out, device, (outside,), (out_shape(layer, options),))


def _check_dims(layer: LayerOperands) -> bool:
    """Checks the numbers of dimensions; returns whether the weights are packed."""
    hidden, w13, w2 = layer.hidden, layer.w13, layer.w2
    packed = packing_of(w13) is not None and packing_of(w2) is not None
    dims = (4, 4) if packed else (3, 3)
    if hidden.dim() != 2 or (w13.dim(), w2.dim()) != dims or layer.topk_ids.dim() != 2:
        raise ValueError(
            "hidden must be [T, H], w13 [E, 2I or I, H], w2 [E, H, I] (or both packed uint8 of "
            f"block bytes {block_sizes()}) and topk_ids [T, k], got "
            + ", ".join(str(tuple(t.shape)) for t in (hidden, w13, w2, layer.topk_ids))
        )
    return packed


def inner_size(w13: Tensor, w2: Tensor, gated: bool) -> int:
    """I of a layer's experts, packed or not."""
    if packing_of(w2) is None:
        return w2.shape[2]
    return columns_of(w13) // (2 if gated else 1)


def _check_packed(name: str, weight: Tensor, device: int, shape: tuple[int, ...]) -> None:
    check_packed(name, weight, device, shape[2])
    if (len(weight), columns_of(weight)) != shape[:2]:
        raise ValueError(
            f"packed {name} must have E {shape[0]} and N {shape[1]} (N / 32 blocks), got "
            f"{tuple(weight.shape)}"
        )


def _check_block_options(options: LayerOptions) -> None:
    if options.interleaved:
        raise ValueError(f"interleaved must be False for {FP8_BLOCK!r}, got True")
    if options.accumulation not in (None, "two_level"):
        raise ValueError(
            f"accumulation must be None or 'two_level' for {FP8_BLOCK!r}, got "
            f"{options.accumulation!r}"
        )


def _scale_shapes(
    weight: Tensor, gated: bool, options: LayerOptions
) -> tuple[tuple[int, ...], ...]:
    """The shapes that the scale of w13 or w2 may have."""
    if options.quant != FP8_BLOCK:
        return weight.shape[:2], weight.shape[:1]
    return tuple(block_shapes(weight, gated).values())


def _widths(layer: LayerOperands, dtype: torch.dtype) -> tuple[int, int]:
    """K of w13 and N of w2: the width of hidden, or that and what `pad_experts` makes of it.

    dtype: of the weights.
    """
    width = layer.hidden.shape[1]
    if packing_of(layer.w2) is not None:
        return width, width
    read, columns = layer.w13.shape[2], layer.w2.shape[1]
    if layer.hidden.dtype.itemsize == 1 and padded(columns, DTYPES[dtype]) == width:
        return width, columns
    if padded(width, DTYPES.get(dtype, DType.BF16)) == read:
        return read, width
    return width, width


def out_shape(layer: LayerOperands, options: LayerOptions) -> tuple[int, ...]:
    """The shape of the layer's output: [T, H], or [T, k, H] of rows that are not summed."""
    tokens, choices = layer.topk_ids.shape
    columns = columns_of(layer.w2)
    return (tokens, columns) if options.reduce == "sum" else (tokens, choices, columns)


def _check_scales(layer: LayerOperands, options: LayerOptions) -> None:
    """Checks the scales of activations: of tokens, and of what is between the products."""
    hidden, given = layer.hidden, layer.hidden_scale
    device, quantized = hidden.get_device(), hidden.dtype.itemsize == 1
    if quantized and given is None:
        raise ValueError(f"hidden_scale must be given with {hidden.dtype} hidden, got None")
    for name in ("hidden_scale", "active_scale"):
        scale = getattr(layer, name)
        if scale is None:
            continue
        if options.quant is None:
            raise ValueError(f"{name} needs quant 'fp8' or 'int8', got quant None")
        of_tokens = quantized and name == "hidden_scale"
        if options.quant != FP8_BLOCK:
            count = hidden.shape[0] if of_tokens else 1
            expect(name, scale, device, (torch.float32,), ((count,),))
        elif of_tokens:
            shape = (hidden.shape[0], -(-hidden.shape[1] // K_BLOCK))
            expect(name, scale, device, (torch.float32,), (shape,), dense=False)
        else:
            raise ValueError(
                f"{name} must be None for {FP8_BLOCK!r}, which has no static scales, got a tensor"
            )


def _check_options(layer: LayerOperands, options: LayerOptions) -> None:
    options.numbers  # noqa: B018  # raises where the activation has none
    hidden, choices = layer.hidden, layer.topk_ids.shape[1]
    outside = options.outside(hidden.dtype)
    if options.out_dtype not in (None, outside) or outside not in _HIDDEN:
        raise TypeError(
            "out_dtype must be hidden's dtype, or bfloat16 or float16 if hidden has 8 bits, got "
            f"{options.out_dtype} with {hidden.dtype}"
        )
    if options.reduce not in REDUCES:
        raise ValueError(f"reduce must be one of {', '.join(REDUCES)}, got {options.reduce!r}")
    if options.reduce != "sum" and layer.residual is not None:
        raise ValueError(f"residual needs reduce='sum', got {options.reduce!r}")
    if options.weight_on_input and choices != 1:
        raise ValueError(f"weight_on_input needs one expert per token, got k = {choices}")
    if options.max_rows is not None and options.max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {options.max_rows}")
    if layer.overflow is not None:
        expect("overflow", layer.overflow, hidden.get_device(), (torch.int32,), ((1,),))
        if options.max_rows is None:
            raise ValueError("overflow needs max_rows, got max_rows None")


def why_no_gradient(layer: LayerOperands, options: LayerOptions) -> str | None:
    """Why `fused_moe` has no gradient for these arguments, in words, or None if it has one."""
    for name, given, served in (
        ("quant", options.quant, (None, "fp8", "int8")),
        ("reduce", options.reduce, ("sum",)),
        ("overflow", _said(layer.overflow), (None,)),
        ("hidden_scale", _said(layer.hidden_scale), (None,)),
        ("active_scale", _said(layer.active_scale), (None,)),
    ):
        if given not in served:
            return _no_gradient(f"{name} must be {' or '.join(map(repr, served))}, got {given!r}")
    if packing_of(layer.w13) is not None:
        return _no_gradient("w13 must not be packed, got 4-bit weights")
    if options.quant is None:
        return None
    for name in ("w13", "w2", "w13_scale", "w2_scale"):
        tensor = getattr(layer, name)
        if tensor is not None and tensor.requires_grad:
            return _no_gradient(f"{name} must be frozen with quant, got one that requires one")
    if layer.w13.shape[-1] != layer.hidden.shape[-1]:
        return _no_gradient(
            f"w13 must have the width of hidden with quant, {layer.hidden.shape[-1]}, got "
            f"{layer.w13.shape[-1]}"
        )
    return None


def _said(tensor: Tensor | None) -> str | None:
    return None if tensor is None else "a tensor"


def _no_gradient(why: str) -> str:
    return (
        f"fused_moe has no gradient here and an argument requires one: {why}; or call under "
        "torch.no_grad()"
    )


def layer_addresses(layer: LayerOperands, out: Tensor) -> dict[str, int]:
    """The addresses of a layer's tensors, by name; 0 for an optional tensor that is None.

    Raises ValueError for an address that is not aligned as kernels need.
    """
    addresses = {
        name: 0 if tensor is None else tensor.data_ptr()
        for name, tensor in zip(layer._fields, layer, strict=True)
    }
    addresses["out"] = out.data_ptr()
    for name, multiple in ALIGNMENTS.items():
        if addresses[name] % multiple:
            raise misaligned(name, multiple, addresses[name])
    return addresses


def problems_of(layer: LayerOperands, options: LayerOptions) -> LayerProblems:
    """The problems that checked arguments of `fused_moe` pose."""

    def projection(
        weight: Tensor, scale: Tensor | None, bias: Tensor | None, gated: bool = False
    ) -> Projection:
        granularity = weight_granularity(0 if scale is None else scale.dim())
        if scale is not None and options.quant == FP8_BLOCK:
            granularity = block_granularity(scale, weight, gated)
        n_major = is_n_major(weight)
        return Projection(
            granularity,
            None if bias is None else DTYPES[bias.dtype],
            n_major,
            n_major and gated and options.interleaved,
            packing_of(weight),
        )

    packed = packing_of(layer.w2) is not None
    inter = inner_size(layer.w13, layer.w2, is_gated(options.activation))
    hidden, read = columns_of(layer.w2), None if packed else layer.w13.shape[2]
    return layer_problems(
        LayerSizes(len(layer.w2), layer.topk_ids.shape[1], hidden, inter, read),
        DTYPES[(layer.hidden if packed else layer.w2).dtype],
        DTYPES[options.outside(layer.hidden.dtype)],
        options.function,
        projection(layer.w13, layer.w13_scale, layer.w13_bias, is_gated(options.activation)),
        projection(layer.w2, layer.w2_scale, layer.w2_bias),
        options.accumulation,
        Forms(
            8 * layer.topk_ids.dtype.itemsize,
            DTYPES[layer.topk_weights.dtype],
            layer.hidden.dtype.itemsize == 1,
            options.reduce == "sum",
        ),
    )
