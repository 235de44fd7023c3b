"""transformers: importing this registers `experts_implementation="cutlass_moe"`.

transformers calls a registered function in place of the forward of each module of experts. Ours
takes one of three ways, module by module and once for all calls of the same kind:

  fused_moe       bfloat16, float16 or quantised experts whose gate is one that kernels have
  two products    the same with another gate or a norm after the experts: the module's own gate
                  runs between two grouped products
  transformers'   where no kernel serves a call, or has the gradient that is wanted

README.md in this folder says how to see which one was taken.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import (
    FP8ExpertsInterface,
    fp8_grouped_mm_experts_forward,
)
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward
from transformers.utils.logging import tqdm

import cutlass_moe as cm
from cutlass_moe.environment import STRICT
from cutlass_moe.integrations.experts import (
    GATED,
    NOT_GATED,
    QUANTS,
    ActivationArguments,
    Experts,
    experts_of,
    find_activation,
    held_quant,
    is_interleaved,
    is_packed,
    make_readable,
    quant_of,
    quantize,
    store,
    weights_of,
    why_not_blocks,
)
from cutlass_moe.integrations.stored import tensors_without_experts
from cutlass_moe.models.checkpoints import Checkpoint
from cutlass_moe.models.quantization import block_size
from cutlass_moe.models.shapes import FP8_BLOCK, PACKINGS
from cutlass_moe.models.shards import Shards

NAME = "cutlass_moe"
OLDEST, NEWER = Version("5.17"), Version("5.25")  # tested from the one to below the other
_QUANTS = (*QUANTS, FP8_BLOCK, *PACKINGS)
_NAMES = ", ".join(map(repr, _QUANTS))
SUMS_QUANTIZED = Version("5.24")  # the first seen to sum over ranks whatever the parameters are
_LAYER = re.compile(r"\.(\d+)\.")
_NO_GRADIENT = (
    "kernels have no gradient of experts with scales of blocks, with 4 bits, with 8 bits and their "
    "own gate, or with a norm, and one may be asked for: call under torch.no_grad()"
)
_logger = logging.getLogger("cutlass_moe")

Forward = Callable[..., Tensor]


class _Found(NamedTuple):
    """What is found out about a module of experts once, and kept in it."""

    activation: ActivationArguments | None  # None: kernels have none that computes the same
    reasons: dict[tuple[Any, ...], str | None]  # by kind of call: why no kernel serves it


def prepare_(model: nn.Module) -> nn.Module:
    """Readies all experts of a model for kernels, in place; returns the model.

    Each module's gate is compared with those that kernels have. Weights that are stored transposed
    (gpt-oss, Aria) are copied to K dense, once, under the same logical shape: images that are built
    for a model have that order. The first call of a module outside torch.compile and CUDA graphs
    does the same. A module whose first call is compiled or captured works without.
    """
    for experts in experts_of(model):
        _find_out(experts)
    return model


def quantize_(model: transformers.PreTrainedModel, quant: str) -> transformers.PreTrainedModel:
    """Quantises the experts of a loaded model, in place, with a progress bar; returns the model.

    quant: "fp8" (float8_e4m3fn) or "int8", with one float32 scale per output channel, or
    "fp8_block" with one per 128 x 128 (of gate_up_proj per 64 or 32 rows where 128 does not divide
    I). Tokens, and the activation's results, are then quantised one by one in every call, for
    "fp8_block" by 128 values. Experts that have 8-bit weights already are quantised again, from
    their values.
    Or 4 bits with bfloat16 activations: "mxfp4", "int4_g32" or "int4_g128", as `quantize_packed`
    rounds them; values that are MXFP4's already stay what they are.

      parameter               buffers that replace it, of the same name and logical shape
      gate_up_proj, up_proj   8-bit, K dense; and NAME_scale_inv float32 [E, 2I] or [E, I]
      down_proj               8-bit, K dense; and down_proj_scale_inv float32 [E, H]
                              of "fp8_block" [E, rows of blocks, columns of blocks]
      of 4 bits               uint8 as `pack_weights` has them, with their scales; their biases,
                              too, have gates before ups

    I is padded to a multiple of 16 where it is none. Biases, routers, shared experts and attention
    stay as they are. The model selects `experts_implementation="cutlass_moe"`; its experts run
    under no other and are frozen. Cast the model before, not after; `save_pretrained` is
    refused from then on, since no loader would understand the files, but the state dict loads into
    a model that was quantised in the same way.

    Raises ValueError for another `quant`, for "fp8_block" where gates and ups are interleaved or in
    one block, for 4 bits where H or I is no multiple of 32, for a model without experts of this
    kind, for one that is quantised already, whose weights are not loaded, or whose experts ranks
    share with transformers before 5.24, and TypeError for other objects.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(f"model must be a transformers.PreTrainedModel, got {type(model)}")
    if quant not in _QUANTS:
        raise ValueError(f"quant must be one of {_NAMES}, got {quant!r}")
    experts = list(experts_of(model))
    done = [module for module in experts if quant_of(module)]
    if not experts or done:
        got = f"one that is {quant_of(done[0])} already" if done else type(model).__name__
        raise ValueError(f"model must contain experts that are not quantised, got {got}")
    if any(parameter.is_meta for module in experts for parameter in module.parameters()):
        raise ValueError("the weights of model must be loaded, got some on the meta device")
    sharded = any(hasattr(one, "to_local") for module in experts for one in module.parameters())
    if sharded and Version(transformers.__version__) < SUMS_QUANTIZED:
        raise ValueError(
            f"transformers must be {SUMS_QUANTIZED} or later for experts that ranks share: earlier "
            f"ones sum over ranks only while parameters are sharded, got {transformers.__version__}"
        )
    model.set_experts_implementation(NAME)
    for module in tqdm(experts, desc=f"Experts to {quant}", unit="layer"):
        _find_out(module)
        quantize(module, quant)
    model.save_pretrained = _refuse_to_save
    return model


def load_quantized(
    directory: str | Path,
    quant: str | None = None,
    *,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> transformers.PreTrainedModel:
    """Loads a model whose experts are stored in 8 or 4 bits, or quantises them while they are read.

    directory: config.json and safetensors files, as they are published: compressed-tensors with a
      scale per channel, FP8 with a scale per block of 128 x 128, gpt-oss's MXFP4, INT4 of
      compressed-tensors in groups of 32 or 128, or 16 bits.
    quant: one of those of `quantize_`; default as the experts are stored, which must be one of
      these. 4-bit weights then keep their bits; weights that are stored in another of them are
      rounded once more.
    dtype: of everything else. What of it is stored in 8 bits is converted, once.

    The experts are read one by one, so that no more than one is ever held in 16 bits. The result is
    a model as `quantize_` makes it. Raises ValueError for a directory that is not understood, and
    for "fp8_block" where gates and ups are interleaved.
    """
    directory = Path(directory)
    if quant is not None and quant not in _QUANTS:
        raise ValueError(f"quant must be None or one of {_NAMES}, got {quant!r}")
    with Checkpoint(directory) as checkpoint:
        stored = quant or checkpoint.stored(checkpoint.layers[0])
        if stored not in _QUANTS:
            raise ValueError(
                f"quant must be one of {_NAMES} for experts stored as {stored}, got None"
            )
        model = _load_all_but_experts(directory, dtype).to(device)
        named = {id(module): name for name, module in model.named_modules()}
        for module in tqdm(list(experts_of(model)), desc=f"Experts as {stored}", unit="layer"):
            layer = _LAYER.search(f".{named[id(module)]}.")
            assert layer is not None, named[id(module)]
            weights = checkpoint.read(int(layer[1]), device=device, quant=quant).padded()
            if stored not in PACKINGS and weights.interleaved != is_interleaved(module):
                raise ValueError(f"{directory}: gate and up must lie as {type(module)} has them")
            store(module, weights, stored)
    model.save_pretrained = _refuse_to_save
    return model


def _load_all_but_experts(directory: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The model with modules of experts that have no parameters."""
    config = transformers.AutoConfig.from_pretrained(directory)
    asked = getattr(config, "quantization_config", None) or {}
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if kind is None:
        raise ValueError(f"{directory}: transformers has no class {config.architectures}")

    def without_experts(self: Any, *args: Any, **options: Any) -> None:
        kind.__init__(self, *args, **options)
        for module in experts_of(self):
            for name in list(module._parameters):
                delattr(module, name)
            module._is_hf_initialized = True  # transformers' word for: draw no random weights

    parts = {"__init__": without_experts, "__module__": kind.__module__}
    bare: Any = type(kind.__name__, (kind,), parts)
    state = tensors_without_experts(Shards(directory), dtype, block_size(asked))
    model = bare.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, experts_implementation=NAME
    )
    model.__class__ = kind
    if (directory / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    return model


# The forward of a module of experts. transformers passes the arguments by position or name.


def experts_forward(
    self: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The function that `ExpertsInterface` has under our name.

    hidden_states [T, H], top_k_index [T, k], top_k_weights [T, k]: returns [T, H] of the
    dtype of hidden_states. Ids outside [0, E) add nothing.
    """
    return _forward(grouped_mm_experts_forward, self, hidden_states, top_k_index, top_k_weights)


def fp8_experts_forward(
    self: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The same for `FP8ExpertsInterface`, whose modules hold float8_e4m3fn weights."""
    return _forward(fp8_grouped_mm_experts_forward, self, hidden_states, top_k_index, top_k_weights)


def _forward(
    library: Forward, self: Experts, hidden: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    found = getattr(self, "_cutlass_moe", None)
    if not torch.compiler.is_compiling():
        found = _find_out(self)
    experts = weights_of(self)
    trained = torch.is_grad_enabled() and _wants_gradient(experts, hidden, weights)
    quant, packed = held_quant(self, experts["w13"]), is_packed(self)
    ours = quant_of(self)
    if ours and quant != ours:
        raise RuntimeError(
            f"experts must have the {ours} weights that quantize_ gave them, got "
            f"{experts['w13'].dtype}: cast a model before it is quantised, not after"
        )
    if quant and torch.is_grad_enabled():
        experts = {name: tensor.detach() for name, tensor in experts.items()}
    activation = found.activation if found else None
    if _has_norm(self):
        activation = None
    x, w13 = hidden, experts["w13"]
    if packed or not quant:
        x = hidden.to(torch.bfloat16 if packed else w13.dtype)
    call = {
        **{"hidden": x, "topk_weights": weights, "topk_ids": ids, **experts},
        "quant": None if packed else quant,
        # two products have kernels where a layer with a plain activation has
        **(activation or (GATED if self.has_gate else NOT_GATED)[0])._asdict(),
        "interleaved": is_interleaved(self) and activation is not None and not packed,
    }
    reason = None if ours else _why_not(self, found, call)
    no_gradient = packed or quant == FP8_BLOCK or (quant and activation is None)
    if trained and (_has_norm(self) or no_gradient):
        reason = reason or _NO_GRADIENT
        if ours:
            raise RuntimeError(f"experts are quantised to {ours}; {reason}")
    if reason is not None:
        _announce(self, reason, strict=not (trained and self.training))
        return library(self, hidden, ids, weights)
    out = cm.fused_moe(**call) if activation else _two_products(self, call)
    return out.to(hidden.dtype)


def _two_products(self: Experts, call: dict[str, Any]) -> Tensor:
    """A layer with the module's own gate, and norm, between and after two grouped products."""
    table = cm.route(call["topk_ids"], len(call["w13"]))

    def multiply(x: Tensor, name: str, index: Tensor | None = None) -> Tensor:
        rows: Any = {"index": index, "offsets": table.offsets, "bias": call.get(f"{name}_bias")}
        dtype = x.dtype
        if call["quant"] == FP8_BLOCK:
            x, rows["per_token_scale"] = cm.quantize_per_token_group(x)
            rows["scale"] = call[f"{name}_scale"]
        elif call["quant"]:
            x, rows["per_token_scale"] = cm.quantize_per_token(x, QUANTS[call["quant"]])
            scale, columns = call[f"{name}_scale"], call[name].shape[1]
            rows["scale"] = scale.repeat_interleave(columns // scale.shape[1], 1)
        return cm.grouped_matmul(x, call[name], out_dtype=dtype, **rows)

    up = multiply(call["hidden"], "w13", table.index)
    if is_packed(self) and is_interleaved(self):  # its own gate takes gate, up, gate, up, ...
        up = torch.stack(up.chunk(2, 1), 2).flatten(1)
    down = multiply(self._apply_gate(up) if self.has_gate else self.act_fn(up), "w2")
    if _has_norm(self):
        down = self.post_expert_norm(down)
    return cm.combine(down, call["topk_weights"], table.inverse)


def _why_not(self: Experts, found: _Found | None, call: dict[str, Any]) -> str | None:
    """Why no kernel serves a call; asked once for each kind of call of a module."""
    if getattr(self, "activation_scheme", "dynamic") != "dynamic":
        return f"tokens must be quantised by scales of their own, got {self.activation_scheme} ones"
    if call["quant"] == FP8_BLOCK:
        reason = why_not_blocks(self, call["w2"].shape[2])
        if reason is not None:
            return reason
    if found is None or torch.compiler.is_compiling():
        return cm.why_not(**call)
    x, w13, weights, ids = (call[name] for name in ("hidden", "w13", "topk_weights", "topk_ids"))
    key: tuple[Any, ...] = (x.dtype, x.device, w13.dtype, w13.shape, w13.stride())
    key += (weights.dtype, ids.dtype, ids.shape[1], torch.is_grad_enabled())
    if key not in found.reasons:
        found.reasons[key] = cm.why_not(**call)
    return found.reasons[key]


def _wants_gradient(experts: dict[str, Tensor], hidden: Tensor, weights: Tensor) -> bool:
    """Whether a gradient may be asked for; quantised weights and their scales have none."""
    trained = () if experts["w13"].dtype.itemsize == 1 else experts.values()
    return any(tensor.requires_grad for tensor in (hidden, weights, *trained))


def _has_norm(self: Experts) -> bool:
    return getattr(self, "has_post_expert_norm", False)  # transformers 5.17 has no such mark


def _find_out(self: Experts) -> _Found:
    """What is kept in a module, found out at its first call; makes its weights readable."""
    found = getattr(self, "_cutlass_moe", None)
    if found is None:
        found = self._cutlass_moe = _Found(find_activation(self), {})
        gate = found.activation.activation if found.activation else "a gate of its own"
        _logger.info("experts of %s: %s", type(self).__name__, gate)
    if not quant_of(self):
        make_readable(self)
    return found


def _refuse_to_save(*args: Any, **options: Any) -> None:
    raise NotImplementedError(
        "a model must be saved before quantize_: no loader understands its quantised experts; "
        "its state_dict() loads into a model that was quantised in the same way"
    )


# What falls back.


def _announce(self: Experts, reason: str, strict: bool = True) -> None:
    """Says, once per module class and reason, that transformers' own function is taken.

    strict: raises RuntimeError instead if CUTLASS_MOE_STRICT=1.
    """
    if torch.compiler.is_compiling():
        return
    if strict and STRICT.on():
        raise RuntimeError(f"no kernel for these experts (CUTLASS_MOE_STRICT=1): {reason}")
    _warn_once(f"transformers' own function runs the experts of {type(self).__name__}: {reason}")


@cache
def _warn_once(message: str) -> None:
    _logger.info(message)
    warnings.warn(message, stacklevel=2)


def _register() -> None:
    version = Version(transformers.__version__)
    if version < OLDEST:
        raise ImportError(f"transformers must be {OLDEST} or later, got {version}")
    if version >= NEWER:
        _warn_once(f"transformers {version} is newer than those tested, which are below {NEWER}")
    ExpertsInterface.register(NAME, experts_forward)
    FP8ExpertsInterface.register(NAME, fp8_experts_forward)


_register()
