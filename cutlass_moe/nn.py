"""Mixture-of-experts feed-forward layers as torch modules, and their quantisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import cutlass_moe as cm
from cutlass_moe.layer.padded import feed_forward, quantized
from cutlass_moe.operands import FP8_BLOCK, PACKINGS, QUANTS, Experts
from cutlass_moe.ops._types import typed
from cutlass_moe.ops.activations import GATED, NOT_GATED
from cutlass_moe.ops.combine import combine_reference
from cutlass_moe.ops.grouped_matmul import wants_gradient
from cutlass_moe.ops.quantize import quantize_per_token
from cutlass_moe.ops.quantize_groups import quantize_per_block
from cutlass_moe.ops.route import check_capacity
from cutlass_moe.ops.router import topk_router_reference
from cutlass_moe.runtime.fallback import announce_fallback
from emitters.spec.packing import BLOCK_ROWS

_QUANTIZED = ("w1_quantized", "w1_scale", "w2_quantized", "w2_scale")


class MoeFeedForward(nn.Module):
    """A mixture-of-experts feed-forward layer with its router.

      out[t] = sum over the top_k experts e of t: weight[t, e] * (act(x[t] @ w1[e] + b1[e]) @ w2[e]
               + b2[e]), plus the unweighted sum over shared experts

      parameter              shape                    exists if
      w1, w2                 [E, D, F], [E, H, D]     always
      b1, b2                 [E, F], [E, D]           bias
      shared_w1, shared_w2   [S, D, F], [S, H, D]     num_shared_experts > 0
      shared_b1, shared_b2   [S, F], [S, D]           num_shared_experts > 0 and bias
      router                 Linear from D to E       always; it has a bias if router_bias
      correction_bias        [E], a float32 buffer    correction_bias

    D is embed_dim, H hidden_dim, E num_experts and S num_shared_experts. F is H here and 2 H in
    `GatedMoeFeedForward`.

    activation: "gelu" (erf, the default), "silu", "relu" or "relu2" (relu squared).
    top_k, router_options (scoring, renormalize, num_groups, topk_groups, scale, threshold) and
      correction_bias: as in `topk_router`. capacity_factor: as in `route`.
    use_grouped_gemm: False always takes the padded path.
    recompute: computes the up projection again in the backward, instead of keeping it.
    accumulate_into_main_grad: the gradients of w1 and w2 are added to the tensors `w1.main_grad`
      and `w2.main_grad`, of their shapes and float32, as in Megatron; see `grad_into` of
      `fused_moe`. The padded path gives them to `grad`, as ever.

    Kernels serve bfloat16, float16 and quantised layers (`quantize_`) on a GPU, forward and
    backward, and under autocast to these dtypes layers of any dtype. Where no gradient is wanted,
    call under torch.no_grad(): the forward is then faster. Other calls take the padded path, after
    one warning unless use_grouped_gemm is False. It copies tokens to [E, longest, D] and runs the
    experts as batched matrix products; the host waits for the device once. It takes any floating
    dtype and is differentiable in the input and all parameters. Quantised layers ("fp8", "int8")
    have the gradients of the input and of what is not quantised, by kernels alone.
    """

    activations = NOT_GATED  # the first is the default
    correction_bias: Tensor | None

    @typed
    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        num_experts: int,
        activation: str | None = None,
        top_k: int = 1,
        num_shared_experts: int = 0,
        bias: bool = False,
        use_grouped_gemm: bool = True,
        *,
        correction_bias: bool = False,
        router_bias: bool = False,
        capacity_factor: float | None = None,
        recompute: bool = False,
        accumulate_into_main_grad: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **router_options: Any,
    ) -> None:
        super().__init__()
        sizes = {"embed_dim": embed_dim, "hidden_dim": hidden_dim, "num_experts": num_experts}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be a positive number, got {size}")
        if num_shared_experts < 0:
            raise ValueError(f"num_shared_experts must be 0 or more, got {num_shared_experts}")
        check_capacity(capacity_factor)
        activation = self.activations[0] if activation is None else activation
        if activation not in self.activations:
            expected = ", ".join(self.activations)
            raise ValueError(f"activation must be one of {expected}, got {activation!r}")
        self.embed_dim, self.hidden_dim, self.num_experts = embed_dim, hidden_dim, num_experts
        self.activation, self.top_k = activation, top_k
        self.num_shared_experts = num_shared_experts
        self.use_grouped_gemm = use_grouped_gemm
        self.capacity_factor, self.recompute = capacity_factor, recompute
        self.accumulate_into_main_grad = accumulate_into_main_grad
        self.quant: str | None = None  # what `quantize_` made of it
        self.router_options = router_options
        logits = torch.zeros(1, num_experts, device="cpu")
        topk_router_reference(logits, top_k, **router_options)  # checks their names
        cm.topk_router(logits, top_k, **router_options)  # and their values

        for prefix, count in (("", num_experts), ("shared_", num_shared_experts)):
            for name, shape in self._shapes().items():
                exists = count > 0 and (bias or name.startswith("w"))
                empty = torch.empty((count, *shape), device=device, dtype=dtype)
                self.register_parameter(prefix + name, nn.Parameter(empty) if exists else None)
        self.router = nn.Linear(embed_dim, num_experts, router_bias, device, dtype)
        zeros = torch.zeros(num_experts, device=device, dtype=torch.float32)
        self.register_buffer("correction_bias", zeros if correction_bias else None)
        for name in _QUANTIZED:
            self.register_buffer(name, None)
        self.reset_parameters()

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of one expert's parameters, by name."""
        d, h = self.embed_dim, self.hidden_dim
        width = 2 * h if self.activation in GATED else h
        return {"w1": (d, width), "w2": (h, d), "b1": (width,), "b2": (d,)}

    def reset_parameters(self) -> None:
        """Draws weights as `nn.Linear` does, expert by expert, and sets biases to zero."""
        self.router.reset_parameters()
        for parameter in self.parameters(recurse=False):
            bound = parameter.shape[1] ** -0.5 if parameter.dim() == 3 else 0.0
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, hidden: Tensor) -> Tensor:
        """Applies the layer to hidden [..., D]; returns the same shape and dtype.

        hidden has the parameters' dtype; under autocast, and in a quantised layer, any floating
        dtype. Raises TypeError or ValueError for other inputs, and RuntimeError where a gradient
        through a quantised layer would be lost.
        """
        self._check(hidden)
        x = hidden.reshape(-1, self.embed_dim)
        if self.quant in PACKINGS:
            x = x.bfloat16()
        logits = self.router(x.to(self.router.weight.dtype))  # may be wider than the experts
        weights, ids = cm.topk_router(
            logits, self.top_k, correction_bias=self.correction_bias, **self.router_options
        )
        residual = None
        if self.num_shared_experts:
            every = x.expand(self.num_shared_experts, *x.shape)
            shared = self._experts("shared_")
            residual = feed_forward(every, None, shared, self.activation).sum(0)
        reason = "use_grouped_gemm must be True, got False"
        if self.use_grouped_gemm:
            call = self._fused(x, weights, ids, residual)
            why_not = self._why_no_kernel(call)
            if why_not is None:
                out = cm.fused_moe(**call, recompute=self.recompute, grad_into=self._main_grads())
                return out.to(hidden.dtype).view(hidden.shape)
            reason = why_not
        if self.quant and wants_gradient((x,)):
            raise RuntimeError(
                "a quantised layer has no gradient without kernels and its input requires one: "
                f"{reason}; or detach it, or call under torch.no_grad()"
            )
        if self.use_grouped_gemm:
            announce_fallback(reason)
        out = self._padded(x, weights, ids, residual)
        return out.to(hidden.dtype).view(hidden.shape)

    def _check(self, hidden: Tensor) -> None:
        if hidden.shape[-1:] != (self.embed_dim,):
            raise ValueError(f"hidden must be [..., {self.embed_dim}], got {list(hidden.shape)}")
        autocast = torch.is_autocast_enabled(hidden.device.type)
        if not self.quant and hidden.dtype != self.w1.dtype and not autocast:
            raise TypeError(
                f"hidden must be {self.w1.dtype} (the parameters' dtype), got {hidden.dtype}"
            )

    def _why_no_kernel(self, call: dict[str, Any]) -> str | None:
        """Why no kernel serves this call of `fused_moe`, or None."""
        x: Tensor = call["hidden"]
        return cm.why_not(**call) if x.is_cuda else f"tensors must be on a GPU, got {x.device}"

    def _fused(
        self, x: Tensor, weights: Tensor, ids: Tensor, residual: Tensor | None
    ) -> dict[str, Any]:
        """The call of `fused_moe` that is this layer."""
        experts, device = self._experts(), x.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x = x.to(dtype)
            if self.quant is None:
                w13, w2 = experts.w13.to(dtype), experts.w2.to(dtype)
                experts = experts._replace(w13=w13, w2=w2)
        return {
            "hidden": x.contiguous(),
            "topk_weights": weights,
            "topk_ids": ids,
            **experts._asdict(),
            "quant": None if self.quant in PACKINGS else self.quant,
            "activation": self.activation,
            "capacity_factor": self.capacity_factor,
            "residual": None if residual is None else residual.to(x.dtype),
        }

    def _main_grads(self) -> tuple[Tensor | None, Tensor | None] | None:
        """Where the gradients of the weights are added, in the layout of `_experts`."""
        if not self.accumulate_into_main_grad or self.quant:
            return None
        found: list[Tensor | None] = []
        for name in ("w1", "w2"):
            parameter = getattr(self, name)
            main = getattr(parameter, "main_grad", None) if parameter.requires_grad else None
            if parameter.requires_grad and not isinstance(main, Tensor):
                raise ValueError(
                    f"{name}.main_grad must be a tensor with accumulate_into_main_grad, got {main}"
                )
            found.append(None if main is None else main.transpose(1, 2))
        return found[0], found[1]

    def _padded(self, x: Tensor, weights: Tensor, ids: Tensor, residual: Tensor | None) -> Tensor:
        table = cm.route(ids, self.num_experts, capacity_factor=self.capacity_factor)
        ends = table.offsets.long()
        counts = ends.diff(prepend=ends.new_zeros(1))
        longest, rows = torch.stack([counts.max(), ends[-1]]).tolist()
        row = torch.arange(rows, device=x.device)
        expert = torch.searchsorted(ends, row, right=True)
        slot = expert * longest + row - (ends - counts)[expert]  # in [E * longest]
        token = table.index[:rows].long()

        def padded(values: Tensor) -> Tensor:
            """Copies each token to its experts' rows: [T, ...] -> [E, longest, ...]."""
            spread = values.new_zeros(self.num_experts * longest, *values.shape[1:])
            spread.index_copy_(0, slot, values[token])
            return spread.view(self.num_experts, longest, *values.shape[1:])

        experts = self._experts()
        values, scale = x, None
        if self.quant in PACKINGS:
            w13 = cm.dequantize_packed(experts.w13, self.embed_dim, x.dtype)
            w2 = cm.dequantize_packed(experts.w2, self.hidden_dim, x.dtype)
            experts = experts._replace(w13=w13, w2=w2)
        elif self.quant:
            blocks = self.quant == FP8_BLOCK
            values, scale = quantized(x, experts.w13.dtype, torch.float32, blocks=blocks)
        out = feed_forward(
            padded(values), None if scale is None else padded(scale), experts, self.activation
        )
        inverse = table.inverse
        if rows:
            inverse = slot[inverse.clamp(min=0)].where(inverse >= 0, -1)
        return combine_reference(out.flatten(0, 1).to(x.dtype), weights, inverse, residual=residual)

    def _experts(self, prefix: str = "") -> Experts:
        """The experts' weights for `fused_moe`: views of the parameters, or quantised buffers."""
        b1, b2 = getattr(self, f"{prefix}b1"), getattr(self, f"{prefix}b2")
        if self.quant and not prefix:
            q1, scale1, q2, scale2 = (getattr(self, name) for name in _QUANTIZED)
            return Experts(q1, q2, scale1, scale2, b1, b2)
        w1, w2 = getattr(self, f"{prefix}w1"), getattr(self, f"{prefix}w2")
        return Experts(w1.transpose(1, 2), w2.transpose(1, 2), w13_bias=b1, w2_bias=b2)

    def _pack(self, quant: str) -> None:
        """Quantises to packed 4-bit weights."""
        for name in ("w1", "w2"):
            weight = getattr(self, name).detach().transpose(1, 2)
            setattr(self, f"{name}_quantized", cm.quantize_packed(weight, quant))
            setattr(self, name, None)
        self.quant = quant
        self.requires_grad_(False)

    def _quantize(self, quant: str) -> None:
        found: dict[str, Any] = {"w13_bias": self.b1, "w2_bias": self.b2}  # may be None
        for name, into in (("w1", "w13"), ("w2", "w2")):
            weight = getattr(self, name).detach().transpose(1, 2)
            if quant == FP8_BLOCK:
                gated = name == "w1" and self.activation in GATED
                values, scale = quantize_per_block(weight, gated=gated)
            else:
                values = torch.empty(weight.shape, dtype=QUANTS[quant], device=weight.device)
                scale = torch.empty(weight.shape[:2], dtype=torch.float32, device=weight.device)
                for e, expert in enumerate(weight):  # a float32 copy of all may not fit
                    q = quantize_per_token(expert.contiguous().float(), values.dtype)
                    values[e], scale[e] = q
            found |= {into: values, f"{into}_scale": scale}
            setattr(self, name, None)
        q1, q2, scale1, scale2, b1, b2 = cm.pad_experts(**found)
        for name, buffer in zip(_QUANTIZED, (q1, scale1, q2, scale2), strict=True):
            setattr(self, name, buffer)
        for name, old, wide in (("b1", self.b1, b1), ("b2", self.b2, b2)):
            if wide is not None and wide is not old:
                setattr(self, name, nn.Parameter(wide))
        self.quant = quant
        self.requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoeFeedForward:
        """Moves the module and casts its parameters; buffers keep their dtypes and values."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in _QUANTIZED:  # torch would convert 8-bit values of one kind to another
            buffer, loaded = getattr(self, name), state_dict.get(prefix + name)
            if buffer is not None and loaded is not None and buffer.dtype != loaded.dtype:
                raise TypeError(f"{prefix}{name} must be {buffer.dtype}, got {loaded.dtype}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        parts = [
            f"embed_dim={self.embed_dim}, hidden_dim={self.hidden_dim}",
            f"num_experts={self.num_experts}, activation={self.activation!r}, top_k={self.top_k}",
            f"num_shared_experts={self.num_shared_experts}, quant={self.quant!r}",
        ]
        return ", ".join(parts)


class GatedMoeFeedForward(MoeFeedForward):
    """A `MoeFeedForward` with a gated activation: act(x @ gate) * (x @ up), then w2.

    w1 [E, D, 2 H] is [gate | up], and so are b1 [E, 2 H], shared_w1 and shared_b1. activation:
    "swiglu" (the default), "geglu", "reglu" or "swiglu_oai" (gpt-oss), as in `grouped_matmul`.
    """

    activations = GATED


@typed
def quantize_(module: nn.Module, quant: str) -> nn.Module:
    """Quantises the experts of every MoeFeedForward in a module, in place; returns the module.

      parameter      buffers that replace it
      w1 [E, D, F]   w1_quantized [E, F, D], w1_scale float32 [E, F]
      w2 [E, H, D]   w2_quantized [E, D, H], w2_scale float32 [E, D]
      4 bits         w1_quantized, w2_quantized uint8, packed with their scales

    Where H or D is no multiple of 16, it is padded with zeros in these buffers, b1 and b2, as
    kernels need it (`cutlass_moe.pad_experts`); inputs and outputs keep their D.

    quant: "fp8" (float8_e4m3fn), "int8" or "fp8_block" (float8_e4m3fn; w1_scale and w2_scale are
    [E, blocks of rows, columns / 128], see `quantize_per_block`). From then on inputs and
    activations are quantised per token, or per token and 128 values, and nothing in the layers
    requires a gradient; inputs, and what you unfreeze of biases, routers and shared experts, may
    for "fp8" and "int8". "int4_g128", "int4_g32" and "mxfp4" make 4-bit weights of
    `quantize_packed` instead and leave activations in bfloat16, to which inputs are converted; D
    must then be a multiple of 32, and so must H. Biases, routers and shared experts stay as they
    are. The state dict loads into a module that was quantised in the same way.

    Raises ValueError for another `quant`, for a module without a MoeFeedForward, and for one that
    is quantised already.
    """
    if quant not in (*QUANTS, *PACKINGS):
        expected = ", ".join(map(repr, (*QUANTS, *PACKINGS)))
        raise ValueError(f"quant must be {expected}, got {quant!r}")
    layers = [layer for layer in module.modules() if isinstance(layer, MoeFeedForward)]
    done = [layer for layer in layers if layer.quant]
    if not layers or done:
        got = f"one that is {done[0].quant} already" if done else type(module).__name__
        raise ValueError(f"module must contain unquantised MoeFeedForward layers, got {got}")
    for layer in layers if quant in PACKINGS else ():
        sizes = layer.embed_dim, layer.hidden_dim
        if sizes[0] % BLOCK_ROWS or sizes[1] % BLOCK_ROWS:
            raise ValueError(
                f"embed_dim and hidden_dim must be multiples of {BLOCK_ROWS} for {quant!r}, got "
                f"{sizes[0]} and {sizes[1]}"
            )
    for layer in layers:
        if quant in PACKINGS:
            layer._pack(quant)
        else:
            layer._quantize(quant)
    return module
