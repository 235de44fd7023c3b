"""plan: a grouped_matmul that is checked and prepared once, then launched many times."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cutlass_moe.operands import Operands, Options, ProductArguments, split_product
from cutlass_moe.ops.dispatch import Choice, find_call
from cutlass_moe.ops.grouped_matmul import wants_gradient
from cutlass_moe.ops.grouped_matmul_reference import grouped_matmul_reference_out
from cutlass_moe.runtime.device import on_device
from cutlass_moe.runtime.parameters import ALIGNMENTS, misaligned, operand_addresses

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Plan:
    """A prepared `grouped_matmul_out`, made by `plan`; one thread at a time may use it."""

    def __init__(
        self, operands: Operands, options: Options, out: Tensor, choice: Choice | None
    ) -> None:
        named = {**operands._asdict(), "out": out}
        self._tensors = {name: t for name, t in named.items() if t is not None}
        self._slots = {
            name: (t.shape, t.dtype, t.stride(), ALIGNMENTS.get(name, 4))
            for name, t in self._tensors.items()
        }
        self._device = out.get_device()
        self._options = options
        self._kernel = None if choice is None else choice.kernel
        if choice is not None:
            self._views = choice.views
            self._launch = choice.prepare(operand_addresses(operands, out))

    def __call__(
        self, x: Tensor | None = None, out: Tensor | None = None, **others: Tensor
    ) -> Tensor:
        """Enqueues the product on torch's current stream and returns `out`.

        A tensor that is given, by its name in `plan`, replaces the planned one in this and later
        calls. It must have the same shape, dtype, strides and device. Raises ValueError if it has
        not, or if its address is not aligned as the kernel needs; TypeError for a name that was not
        planned; RuntimeError where a gradient would be lost.
        """
        if x is not None:
            self._replace("x", x)
        if out is not None:
            self._replace("out", out)
        for name, tensor in others.items():
            self._replace(name, tensor)
        tensors = self._tensors
        if self._kernel is None:
            grouped_matmul_reference_out(
                **tensors,
                activation=self._options.activation,
                interleaved=self._options.interleaved,
            )
        else:
            on_device(self._device, self._launch)
        return tensors["out"]

    def _replace(self, name: str, tensor: Tensor) -> None:
        slot = self._slots.get(name)
        if slot is None:
            names = ", ".join(self._tensors)
            raise TypeError(f"a tensor's name must be one that was planned, {names}, got {name!r}")
        shape, dtype, strides, alignment = slot
        if (
            tensor.dtype is not dtype
            or tensor.shape != shape
            or tensor.stride() != strides
            or tensor.get_device() != self._device
        ):
            raise ValueError(
                f"{name} must be {dtype} {list(shape)} with strides {strides} on "
                f"{self._tensors[name].device}, as planned; got {tensor.dtype} "
                f"{list(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"a plan has no gradient and {name} requires one: detach it, or call under "
                "torch.no_grad()"
            )
        if self._kernel is not None:
            address = tensor.data_ptr()
            if address % alignment:
                raise misaligned(name, alignment, address)
            self._kernel.move(self._launch, name, address, self._views)
        self._tensors[name] = tensor


def plan(
    x: Tensor, weight: Tensor, *, out: Tensor | None = None, **arguments: Unpack[ProductArguments]
) -> Plan:
    """Prepares a `grouped_matmul_out` with these arguments, to be called many times.

      p = plan(x, weight, offsets=offsets)
      p()                          # the planned tensors, with what they hold now
      p(x, out, index=index)       # other tensors of the same shapes, by name

    A call checks only the tensors it is given, allocates nothing, and CUDA graphs can capture it.
    Every call writes to `out`, which is allocated now if none is given. The plan keeps its tensors
    alive. It is not differentiable, and torch.compile cannot trace it. Raises what
    `grouped_matmul_out` raises.
    """
    operands, options = split_product(x, weight, arguments)
    if wants_gradient((out, *operands)):
        raise RuntimeError(
            "a plan has no gradient and an argument requires one: use grouped_matmul, or call "
            "under torch.no_grad()"
        )
    call = find_call(operands, out, options)
    if out is None:
        out = x.new_empty(call.shape, dtype=call.dtype)
    return Plan(operands, options, out, call.choice)
