"""What a template is compiled with: stand-ins for its arguments, and the parameters they become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.runtime import make_ptr

from emitters.spec.image import ParamKind


@dataclass(frozen=True)
class Argument:
    """One of a template's `__call__`. params: (name, kind) of the kernel parameters that it
    becomes, in order; none where it is absent."""

    stand_in: Any
    params: tuple[tuple[str, ParamKind], ...]


ABSENT = Argument(None, ())


def pointer(name: str, element: type, align: int) -> Argument:
    """Into global memory; align: bytes."""
    stand_in = make_ptr(element, align, cute.AddressSpace.gmem, assumed_align=align)
    return Argument(stand_in, ((name, ParamKind.POINTER),))


def integer(name: str) -> Argument:
    return Argument(Int32(1), ((name, ParamKind.INT32),))


def several(*arguments: Argument) -> Argument:
    """A tuple of them, or what stands for none."""
    if not arguments:
        return ABSENT
    params = tuple(param for argument in arguments for param in argument.params)
    return Argument(tuple(argument.stand_in for argument in arguments), params)
