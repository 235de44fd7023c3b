"""Modules of experts as transformers builds them: their weights, activation and quantisation.

They have the marks that its decorator sets (`has_gate`, `has_bias`, `is_transposed`,
`is_concatenated`) and parameters named

  gate_up_proj [E, 2I, H]   with a gate: gates, then ups; gate, up, gate, up if not concatenated
  up_proj      [E, I, H]    without
  down_proj    [E, H, I]

or, if transposed, with the last two dimensions swapped; with biases NAME_bias, and with scales
NAME_scale_inv if the weights have 8 bits. Packed 4-bit weights, which `store` puts there, have
gates before ups, and so has their bias; they are never transposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import cutlass_moe as cm
from cutlass_moe.models.expert_weights import ExpertWeights
from cutlass_moe.models.problems import block_rows
from cutlass_moe.models.shapes import FP8_BLOCK, PACKINGS

Experts = Any  # a module of experts: its classes are made by a decorator
QUANTS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}  # with a scale per channel
BLOCK = 128  # rows and columns that share a scale in the blocks that kernels have
_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
# Of values whose pairs tell activations apart: around zero, bends, clamps near and far.
_SIZES = (0.0, 0.01, 0.3, 1.0, 1.7, 2.3, 3.0, 6.0, 12.0, 90.0, 1e4, 1e15)


class ActivationArguments(NamedTuple):
    """What names an activation among the arguments of `fused_moe`."""

    activation: str
    limit: float | None = None
    alpha: float | None = None
    beta: float | None = None


GATED = tuple(map(ActivationArguments, ("swiglu", "geglu", "geglu_tanh", "reglu")))
NOT_GATED = tuple(map(ActivationArguments, ("silu", "gelu", "gelu_tanh", "relu", "relu2")))


def experts_of(model: nn.Module) -> Iterator[Experts]:
    """The modules of a model whose forward transformers looks up in one of its interfaces."""
    for module in model.modules():
        if all(hasattr(module, mark) for mark in _MARKS):
            yield module


def quant_of(module: Experts) -> str | None:
    """What `store` made of a module: "fp8", "int8", "fp8_block", a 4-bit format, or None."""
    return getattr(module, "_cutlass_moe_quant", None)


def is_packed(module: Experts) -> bool:
    return quant_of(module) in PACKINGS


def held_quant(module: Experts, weight: Tensor) -> str | None:
    """What a weight of a module is, by its dtype: as `quant_of`, or None for 16 bits."""
    if is_packed(module) and weight.dtype == torch.uint8:
        return quant_of(module)
    quant = next((name for name, dtype in QUANTS.items() if dtype == weight.dtype), None)
    return FP8_BLOCK if quant and has_blocks(module) else quant


def has_blocks(module: Experts) -> bool:
    """Whether the scales of 8-bit weights are those of blocks of 128 x 128."""
    if quant_of(module):
        return quant_of(module) == FP8_BLOCK
    return tuple(getattr(module, "block_size", None) or ()) == (BLOCK, BLOCK)


def why_not_blocks(module: Experts, inter: int, rows: int = BLOCK) -> str | None:
    """Why kernels can't read blocks of scales of a module, or None.

    rows: those of gate_up_proj that share a scale.
    """
    if is_interleaved(module):
        return "gates and ups must not be interleaved where scales are those of blocks"
    if module.has_gate and inter % rows:
        return f"blocks of {rows} rows must have gates or ups alone, got I = {inter}"
    return None


def is_interleaved(module: Experts) -> bool:
    """Whether the module's own gate takes gate, up, gate, up, ..."""
    return module.has_gate and not module.is_concatenated


def weights_of(module: Experts) -> dict[str, Tensor]:
    """Weights, scales and biases of a module, by their names in `fused_moe`; views."""
    found = {}
    packed = is_packed(module)
    for ours, name in _names(module).items():
        weight = getattr(module, name)
        found[ours] = weight.transpose(1, 2) if module.is_transposed and not packed else weight
        if module.has_bias:
            found[f"{ours}_bias"] = getattr(module, f"{name}_bias")
        if weight.dtype.itemsize == 1 and not packed:
            scale = getattr(module, f"{name}_scale_inv")
            plain = scale.dim() == 3 and not has_blocks(module)
            found[f"{ours}_scale"] = scale.squeeze(-1) if plain else scale
    return found


def make_readable(module: Experts) -> None:
    """Copies 16-bit weights, under the same shapes, to where and how kernels read them best.

    That is with K dense, and at addresses that are multiples of 16 bytes, which weights on the CPU
    that are mapped from a file may not have. Not while a CUDA graph is captured, and not of what is
    no plain parameter (a shard).
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    for name in _names(module).values():
        weight = getattr(module, name)
        turn = module.is_transposed and weight.stride(1) != 1
        if type(weight) is nn.Parameter and (turn or weight.data_ptr() % 16):
            with torch.inference_mode(False), torch.no_grad():  # else it can't be trained later
                weight.data = weight.data.mT.contiguous().mT if turn else weight.data.clone()


def find_activation(module: Experts) -> ActivationArguments | None:
    """The activation whose definition gives what the module's own code gives, or None.

    The code runs, on the CPU, with every pair of some values as gate and up of two channels.
    Another function, clamp, slope or order of channels shows.
    """
    limit, alpha = _number(module, "limit"), _number(module, "alpha")
    candidates = list(GATED if module.has_gate else NOT_GATED)
    if module.has_gate and (limit or alpha):
        clamped = [ActivationArguments("swiglu", limit, alpha or 1.0, beta) for beta in (0.0, 1.0)]
        candidates = clamped + candidates
    sizes = [*_SIZES, *(limit * part for part in (0.9, 1.1) if limit)]
    values = torch.tensor(sizes, dtype=torch.float64, device="cpu")
    values = torch.cat([values, -values])
    pairs = torch.cartesian_prod(values, values)
    x = torch.cat([pairs, pairs.roll(7, 0)], 1)  # of each channel gate and up
    if not is_interleaved(module):
        x = x[:, [0, 2, 1, 3]].contiguous()
    try:
        with torch.no_grad():
            want = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    except Exception:  # code of its own may need anything: another width, a GPU
        return None
    rows: Any = {"offsets": torch.tensor([len(x)], dtype=torch.int32, device="cpu")}
    rows |= {"interleaved": is_interleaved(module), "out_dtype": torch.float64}
    unit = torch.eye(4, dtype=torch.float64, device="cpu")[None]
    for candidate in candidates:
        got = cm.grouped_matmul_reference(x, unit, **candidate._asdict(), **rows)
        if got.shape == want.shape and torch.allclose(got, want.double(), rtol=1e-5, atol=1e-6):
            return candidate
    return None


def quantize(module: Experts, quant: str) -> None:
    """Replaces a module's weights by 8-bit buffers with the scales that `quant` names, or by packed
    ones.

    Raises ValueError where kernels could not read blocks of scales, and for sizes that no packed
    weights have.
    """
    before = {name: _local(tensor.detach()) for name, tensor in weights_of(module).items()}
    biases: Any = {name: value for name, value in before.items() if name.endswith("_bias")}
    interleaved = is_interleaved(module)
    held = ExpertWeights(before["w13"], before["w2"], None, None, "bf16", interleaved=interleaved)
    if quant == FP8_BLOCK:
        _check_blocks(module, held.w2.shape[2], block_rows(held.w2.shape[2]))
    block_size = getattr(module, "block_size", None)
    made = held.empty_like(len(held.w13), quant)
    for e in range(len(held.w13)):  # a float32 copy of all may not fit
        wide = {name: before[name][e] for name in _names(module)}
        for name, weight in wide.items():
            if f"{name}_scale" in before:
                wide[name] = dequantize(weight, before[f"{name}_scale"][e], block_size)
        one = replace(held, w13=wide["w13"][None], w2=wide["w2"][None])
        made.store(e, one, 0)
    if quant in PACKINGS and interleaved and "w13_bias" in biases:
        bias = biases["w13_bias"]
        biases["w13_bias"] = torch.cat([bias[:, ::2], bias[:, 1::2]], 1)
    store(module, replace(made, **biases).padded(), quant)


def store(module: Experts, weights: Any, quant: str) -> None:
    """Puts quantised weights, as `pad_experts` gives them, in the place of a module's own.

    Raises ValueError for blocks of scales that kernels can't read.
    """
    if quant == FP8_BLOCK:
        _check_blocks(module, weights.w2.shape[2], weights.block_inter)
    for ours, name in _names(module).items():
        for stale in (name, f"{name}_scale_inv"):
            if hasattr(module, stale):
                delattr(module, stale)
        values, bias = getattr(weights, ours), getattr(weights, f"{ours}_bias")
        turn = module.is_transposed and quant not in PACKINGS
        module.register_buffer(name, values.transpose(1, 2) if turn else values)
        if quant not in PACKINGS:
            module.register_buffer(f"{name}_scale_inv", getattr(weights, f"{ours}_scale"))
        if bias is not None:
            setattr(module, f"{name}_bias", nn.Parameter(bias))
    module._cutlass_moe_quant = quant
    module.requires_grad_(False)


def _check_blocks(module: Experts, inter: int, rows: int) -> None:
    reason = why_not_blocks(module, inter, rows)
    if reason is not None:
        raise ValueError(f"{type(module).__name__}: {reason}")


def _names(module: Experts) -> dict[str, str]:
    """The names of a module's two weights, by those in `fused_moe`."""
    return {"w13": "gate_up_proj" if module.has_gate else "up_proj", "w2": "down_proj"}


def _number(module: Experts, name: str) -> float | None:
    """A number of a clamped SwiGLU, which models call by one of two names."""
    for attribute in (f"swiglu_{name}", name):
        value = getattr(module, attribute, None)
        if isinstance(value, int | float):
            return float(value)
    return None


def dequantize(values: Tensor, scale: Tensor, block_size: Sequence[int] | None = None) -> Tensor:
    """float32 values [N, K] times their scales: one, one per row, or one per block.

    scale: of any number of dimensions if it is [1] or [N], else [ceil(N / n), ceil(K / k)].
    block_size: n and k, if the scale is of such blocks; default what divides N and K evenly.
    """
    scale = scale.detach().float()
    scale = scale if scale.dim() == 2 else scale.reshape(-1, 1)
    sizes = tuple(-(-a // b) for a, b in zip(values.shape, block_size or (), strict=False))
    if block_size is None or scale.shape != sizes:
        rows, columns = (-(-a // b) for a, b in zip(values.shape, scale.shape, strict=True))
    else:
        rows, columns = block_size
    scale = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return values.float() * scale[: values.shape[0], : values.shape[1]]


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
