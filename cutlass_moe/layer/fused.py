"""The up projection of a layer in training, and its activation, as one kernel."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cutlass_moe.layer.activate import activate_rows
from cutlass_moe.layer.backward import Factor, How, project, quantized
from cutlass_moe.layer.steps import with_stored_columns
from cutlass_moe.operands import Operands, Options
from cutlass_moe.ops._checks import check
from cutlass_moe.ops._copies import aligned, reads_in_place
from cutlass_moe.ops.dispatch import Choice, choose_launch, pose, strides_of
from cutlass_moe.ops.reasons import why_no_product
from cutlass_moe.ops.route import RoutingTable
from cutlass_moe.runtime import library
from cutlass_moe.runtime.device import on_device
from cutlass_moe.runtime.parameters import MisalignedAddress, operand_addresses
from cutlass_moe.runtime.signatures import Signatures, signature


def project_up(
    x: Tensor, up: Factor, how: How, table: RoutingTable, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The up projection before its activation, [R, 2I or I], and after it, [R, I].

    One kernel stores both, and applies the activation to its float32 sums. Where there is none, a
    step applies it to what a product has stored: with gate and up columns that alternate, and where
    there are no kernels at all.
    """
    if x.is_cuda and len(table.index) and not how.interleaved:
        operands, options = _arguments(x, up, how, table, out_dtype)
        key = signature(options, operands)
        decided = _decisions.get(key)
        if decided is None:
            decided = _decisions.keep(key, _decide(operands, options))
        if decided.choice is not None:
            return _launch(decided.choice, operands, out_dtype)
    h = project(x, up, how, table.offsets, table.index, out_dtype)
    return h, activate_rows(h, table.inverse, how.options)


class _Decision(NamedTuple):
    """What the signature of a call decides: its kernel, None if it has none."""

    choice: Choice | None


_decisions: Signatures[_Decision] = Signatures()


def _arguments(
    x: Tensor, up: Factor, how: How, table: RoutingTable, out_dtype: torch.dtype
) -> tuple[Operands, Options]:
    x, per_token_scale = quantized(x, how)
    operands = Operands(
        x, up.weight, table.index, table.offsets, per_token_scale, up.scale, up.bias
    )
    options = Options(
        out_dtype=out_dtype,
        accumulation=how.accumulation,
        expected_rows=how.expected_rows,
        activation=how.activation,
        limit=how.limit,
        alpha=how.alpha,
        beta=how.beta,
    )
    return operands, options


def _decide(operands: Operands, options: Options) -> _Decision:
    """Chooses a config and loads the kernel. Raises what `check` and `library.load` raise."""
    if not reads_in_place(operands):
        return _Decision(None)
    device = operands.x.get_device()
    problem = with_stored_columns(pose(operands, check(operands, options), options))
    if why_no_product(problem, library.device_arch(device)) is not None:
        return _Decision(None)  # which the product says
    strides, weight_strides = strides_of(operands, problem), operands.weight.stride()
    tokens, rows = len(operands.x), operands.rows
    return _Decision(choose_launch(problem, device, tokens, rows, weight_strides, options, strides))


def _launch(choice: Choice, operands: Operands, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    columns = operands.weight.shape[1]
    h = operands.x.new_empty(operands.rows, columns, dtype=dtype)
    active = h.new_empty(operands.rows, choice.views["out_map"].extents[0])
    try:
        addresses = operand_addresses(operands, active)
    except MisalignedAddress:
        operands = aligned(operands)
        addresses = operand_addresses(operands, active)
    addresses["h"] = addresses["h_map"] = h.data_ptr()
    on_device(h.get_device(), partial(choice.launch, addresses))
    return h, active
