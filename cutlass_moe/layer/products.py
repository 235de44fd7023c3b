"""The products of a layer in training, and those whose kernels do the step beside them too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cutlass_moe.layer.activate import activate_rows
from cutlass_moe.layer.steps import with_gradient, with_stored_columns
from cutlass_moe.operands import QUANTS, LayerOptions, Operands, Options
from cutlass_moe.ops._checks import check, reads_in_place
from cutlass_moe.ops._copies import aligned
from cutlass_moe.ops.dispatch import Choice, choose_launch, enqueue, pose, strides_of
from cutlass_moe.ops.grouped_matmul import grouped_matmul
from cutlass_moe.ops.quantize import quantize_per_token
from cutlass_moe.ops.reasons import why_no_product
from cutlass_moe.ops.route import RoutingTable
from cutlass_moe.runtime import library
from cutlass_moe.runtime.parameters import MisalignedAddress
from cutlass_moe.runtime.signatures import Signatures, signature

# Rows per expert from which an up projection stores its columns before the activation too, and the
# gradient of an activation's result becomes that of its input: with fewer, experts don't fill their
# tiles. Measured on an H200 with 256 rows and more (perf/EXPERIMENTS.md).
STORED_ROWS, GRADIENT_ROWS = 256, 128


class How(NamedTuple):
    """What the backward knows of the call besides tensors, in the order of its op's schema."""

    activation: str
    interleaved: bool
    limit: float | None
    alpha: float | None
    beta: float | None
    quant: str | None
    accumulation: str | None
    expected_rows: int

    @property
    def options(self) -> LayerOptions:
        activation, interleaved, limit, alpha, beta, quant, accumulation, _ = self
        return LayerOptions(
            quant=quant,
            activation=activation,
            interleaved=interleaved,
            accumulation=accumulation,
            limit=limit,
            alpha=alpha,
            beta=beta,
        )


class Factor(NamedTuple):
    """What rows are multiplied with: w13 or w2, and its scale and bias."""

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None


def project(
    x: Tensor,
    factor: Factor,
    how: How,
    offsets: Tensor,
    index: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activated: bool = False,
) -> Tensor:
    """Rows of x, gathered if there is an index, times a factor; x is quantised if the factor is.

    out_dtype: default x's, or bfloat16 where it is quantised.
    """
    x, per_token_scale = quantized(x, how)
    activation: dict[str, Any] = {}
    if activated:
        names = ("activation", "interleaved", "limit", "alpha", "beta")
        activation = {name: getattr(how, name) for name in names}
    return grouped_matmul(
        x,
        factor.weight,
        index=index,
        offsets=offsets,
        per_token_scale=per_token_scale,
        scale=factor.scale,
        bias=factor.bias,
        out_dtype=out_dtype,
        accumulation=how.accumulation,
        expected_rows=how.expected_rows,
        **activation,
    )


def quantized(x: Tensor, how: How) -> tuple[Tensor, Tensor | None]:
    """The rows of x as a product reads them, and their scales if it is one of 8 bits."""
    return (x, None) if how.quant is None else quantize_per_token(x, QUANTS[how.quant])


def rows_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of rows that are summed: one may exceed float16 where their sum does not."""
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


def project_up(
    x: Tensor, up: Factor, how: How, table: RoutingTable, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The up projection before its activation, [R, 2I or I], and after it, [R, I].

    With many rows per expert one kernel stores both, and applies the activation to its float32
    sums. Else a step applies it to what a product has stored; so it does with gate and up columns
    that alternate, and with 8-bit weights, whose scales leave a kernel no registers for wide tiles.
    """
    alone = how.interleaved or how.quant is not None or how.expected_rows < STORED_ROWS
    if x.is_cuda and len(table.index) and not alone:
        operands = Operands(x, up.weight, table.index, table.offsets, bias=up.bias)
        options = Options(out_dtype=out_dtype, expected_rows=how.expected_rows)
        choice = _chosen(operands, options, how, backward=False)
        if choice is not None:
            h = x.new_empty(len(table.index), up.weight.shape[1], dtype=out_dtype)
            active = h.new_empty(_shape(choice))
            _launch(choice, operands, active, {"h": h})
            return h, active
    h = project(x, up, how, table.offsets, table.index, out_dtype)
    return h, activate_rows(h, table.inverse, how.options)


def project_gradient(
    grad: Tensor,
    w2: Tensor,
    h: Tensor,
    weights: Tensor,
    table: RoutingTable,
    how: How,
    grad_h: Tensor,
) -> tuple[Tensor, Tensor] | None:
    """The gradient of the down projection's rows, turned into that of h by the same kernel.

    grad [T, H]: of the layer's output. w2 [E, H, I]. weights float32 [T, k], contiguous: the router
    weight of each pair. grad_h: is written, see `activate_rows_backward`; it may be h. Returns
    active [R, I] and the gradient of weights, as that does; None if there is no kernel, or a step
    of its own is faster.
    """
    if not grad.is_cuda or not len(table.index) or how.interleaved:
        return None
    if how.expected_rows < GRADIENT_ROWS:
        return None
    operands = Operands(grad, w2.transpose(1, 2), table.index, table.offsets)
    options = Options(expected_rows=how.expected_rows)
    choice = _chosen(operands, options, how, backward=True)
    if choice is None:
        return None
    active = grad.new_empty(_shape(choice))
    tiles = -(-active.shape[1] // choice.kernel.record.config["tile_n"])
    shares = weights.new_zeros(*weights.shape, tiles)  # of pairs without a row nobody writes any
    tensors = {"h": h, "grad_h": grad_h, "topk_weights": weights, "inverse": table.inverse}
    _launch(choice, operands, active, {**tensors, "shares": shares})
    return active, shares.sum(-1)


class _Decision(NamedTuple):
    """What the signature of a call decides: its kernel, None if it has none."""

    choice: Choice | None


_decisions: Signatures[_Decision] = Signatures()


def _chosen(operands: Operands, options: Options, how: How, backward: bool) -> Choice | None:
    """The kernel of a product with the activation, or its gradient, in its epilogue.

    Decided once per signature; raises what `check` and `library.load` raise.
    """
    key = signature((backward, *options, *how), operands)
    decided = _decisions.get(key)
    if decided is None:
        decided = _decisions.keep(key, _Decision(_choose(operands, options, how, backward)))
    return decided.choice


def _choose(operands: Operands, options: Options, how: How, backward: bool) -> Choice | None:
    if not reads_in_place(operands):
        return None
    activated = options._replace(
        activation=how.activation, limit=how.limit, alpha=how.alpha, beta=how.beta
    )
    asked = options if backward else activated
    (rows, _), dtype = check(operands, asked)
    problem = pose(operands, dtype, asked)
    if backward:
        problem = with_gradient(problem, how.options.function)
    else:
        problem = with_stored_columns(problem)
    device = operands.x.get_device()
    if why_no_product(problem, library.device_arch(device)) is not None:
        return None  # which a product without it says
    strides, weight_strides = strides_of(operands, problem), operands.weight.stride()
    tokens = len(operands.x)
    return choose_launch(problem, device, tokens, rows, weight_strides, activated, strides)


def _shape(choice: Choice) -> tuple[int, ...]:
    """The rows and columns of the output."""
    return choice.views["out_map"].extents[::-1]


def _launch(choice: Choice, operands: Operands, out: Tensor, others: Mapping[str, Tensor]) -> None:
    """Enqueues the kernel. others: of what it reads or writes, by parameter."""
    values: dict[str, int] = {}
    for name, tensor in others.items():
        values[name] = values[f"{name}_map"] = tensor.data_ptr()
    if "inverse" in others:
        values["choices"] = others["inverse"].shape[1]
    try:
        enqueue(choice, out, operands, values)
    except MisalignedAddress:
        enqueue(choice, out, aligned(operands), values)
