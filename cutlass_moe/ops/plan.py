"""plan: a grouped_matmul that is checked and prepared once, then launched many times."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cutlass_moe.operands import Operands, Options, ProductArguments, split_product
from cutlass_moe.ops._checks import readable
from cutlass_moe.ops._copies import refuse_other_devices
from cutlass_moe.ops._types import expect_tensors, typed
from cutlass_moe.ops.dispatch import Choice, find_call, operand_addresses
from cutlass_moe.ops.grouped_matmul import wants_gradient
from cutlass_moe.ops.grouped_matmul_reference import grouped_matmul_reference_out
from cutlass_moe.runtime.device import on_device
from cutlass_moe.runtime.parameters import alignment, misaligned

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
            name: (t.shape, t.dtype, t.stride(), alignment(name, t))
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
        planned; RuntimeError where a gradient would be lost. A call that is refused replaces
        nothing.
        """
        before: dict[str, Tensor] = {}
        try:
            if x is not None:
                before["x"] = self._replace("x", x)
            if out is not None:
                before["out"] = self._replace("out", out)
            for name in others:
                before[name] = self._replace(name, others[name])
        except Exception:
            for name, tensor in before.items():
                self._put(name, tensor)
            expect_tensors({"x": x, "out": out}, optional=True)
            expect_tensors(others)
            raise
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

    def _replace(self, name: str, tensor: Tensor) -> Tensor:
        """Replaces the tensor of this name, and returns the one before."""
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
        address = tensor.data_ptr()
        if address % alignment:
            raise misaligned(name, alignment, address)
        before = self._tensors[name]
        if self._kernel is not None:
            self._kernel.move(self._launch, name, address, self._views)
        self._tensors[name] = tensor
        return before

    def _put(self, name: str, tensor: Tensor) -> None:
        if self._kernel is not None:
            self._kernel.move(self._launch, name, tensor.data_ptr(), self._views)
        self._tensors[name] = tensor


@typed
def plan(
    x: Tensor, weight: Tensor, *, out: Tensor | None = None, **arguments: Unpack[ProductArguments]
) -> Plan:
    """Prepares a `grouped_matmul_out` with these arguments, to be called many times.

      p = plan(x, weight, offsets=offsets)
      p()                          # the planned tensors, with what they hold now
      p(x, out, index=index)       # other tensors of the same shapes, by name

    A call checks only the tensors it is given, allocates nothing, and CUDA graphs can capture it.
    Every call writes to `out`, which is allocated now if none is given. The plan keeps its tensors
    alive. It is not differentiable, and torch.compile cannot trace it.

    A plan reads its tensors where they lie. Raises ValueError for those that `grouped_matmul` would
    copy, because the copy would go stale, and what `grouped_matmul_out` raises.
    """
    operands, options = split_product(x, weight, arguments)
    if wants_gradient((out, *operands)):
        raise RuntimeError(
            "a plan has no gradient and an argument requires one: use grouped_matmul, or call "
            "under torch.no_grad()"
        )
    call = find_call(_in_place(operands, out), out, options)
    if out is None:
        out = x.new_empty(call.shape, dtype=call.dtype)
    operand_addresses(operands, out)  # refused without a kernel too
    return Plan(operands, options, out, call.choice)


def _in_place(operands: Operands, out: Tensor | None) -> Operands:
    """Views of the operands as kernels read them; raises ValueError where that takes a copy."""
    refuse_other_devices({**operands._asdict(), "out": out}, operands.x.device)
    if operands.x.is_meta:
        raise ValueError("x must be on the CPU or a GPU for a plan, got one on meta")
    views = readable(operands)
    pairs = {name: (t, getattr(views, name)) for name, t in operands._asdict().items()}
    if out is not None:
        pairs["out"] = out, out.contiguous()
    for name, (given, read) in pairs.items():
        if given is not None and (given.data_ptr(), given.dtype) != (read.data_ptr(), read.dtype):
            raise ValueError(
                f"{name} must be a contiguous tensor for a plan, of {read.dtype} {list(read.shape)}"
                f", because a copy would go stale: got {given.dtype} {list(given.shape)} with "
                f"strides {given.stride()}"
            )
    return views
