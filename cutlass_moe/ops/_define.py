"""The one way to define a torch op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_NAMESPACE = "cutlass_moe"
_library = torch.library.Library(_NAMESPACE, "DEF")


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    cuda: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Defines a torch op from its schema, "name(Tensor x, ...) -> ...", and returns it.

    implementation: for CPU tensors, and for CUDA tensors too unless `cuda` is given.
    fake: for torch.compile; makes results without values, from extents that may be symbolic.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CPU")
    _library.impl(name, cuda or implementation, "CUDA")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, _NAMESPACE), name).default


def define_gradient(
    name: str,
    gradient: Callable[..., Any],
    save: Callable[..., None] | None = None,
) -> None:
    """Registers the gradient of an op that `define` made.

    save: stores what the gradient needs; it is `setup_context` of
    `torch.library.register_autograd`.
    """
    torch.library.register_autograd(
        f"{_NAMESPACE}::{name}", gradient, setup_context=save, lib=_library
    )
