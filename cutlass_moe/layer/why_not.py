"""Why a layer or a product has no kernel: what fallbacks say, and callers may ask before."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from cutlass_moe.layer.accept import widened
from cutlass_moe.layer.checks import accept_layer, why_no_gradient
from cutlass_moe.layer.steps import LayerProblems, training_problems
from cutlass_moe.operands import (
    LayerArguments,
    LayerOperands,
    LayerOptions,
    Operands,
    Options,
    ProductArguments,
    split_layer,
    split_product,
)
from cutlass_moe.ops._checks import check
from cutlass_moe.ops._types import check_types
from cutlass_moe.ops.dispatch import pose
from cutlass_moe.ops.grouped_matmul import wants_gradient
from cutlass_moe.ops.reasons import why_no_product
from cutlass_moe.runtime import library
from cutlass_moe.runtime.signatures import Signatures, signature
from emitters.spec.arch import DEFAULT_ARCH
from emitters.spec.registry import why_illegal

if TYPE_CHECKING:
    from typing_extensions import Unpack

_PRODUCT, _LAYER = ("x", "weight"), LayerOperands._fields[:5]
_reasons: Signatures[tuple[str | None]] = Signatures()


@overload
def why_not(
    x: Tensor, weight: Tensor, *, arch: str | None = None, **arguments: Unpack[ProductArguments]
) -> str | None: ...


@overload
def why_not(
    hidden: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    arch: str | None = None,
    **arguments: Unpack[LayerArguments],
) -> str | None: ...


def why_not(*tensors: Tensor, arch: str | None = None, **arguments: Any) -> str | None:
    """Says why a layer or a product has no kernel, in a sentence, or None if kernels serve it.

    Takes the arguments of `fused_moe` (hidden [T, H], w13 [E, 2I or I, H], w2 [E, H, I],
    topk_weights and topk_ids [T, k], ...) or those of `grouped_matmul` (x [T, K], weight [E, N, K],
    offsets=, ...), by position or by name, without `out` and `workspace`. Only dtypes, shapes and
    strides matter: tensors may be on the CPU or the meta device.

    arch: "sm_90a"; default that of the tensors' GPU, and "sm_90a" for tensors that are on none.

    What kernels cannot do is a reason, with the padding that mends it, if one does; what the op
    refuses is one too, in the words of its error. Nothing is loaded or compiled: whether the cache
    has the kernel is not asked. Answers are kept by signature, so asking before each call is cheap.
    Raises TypeError for names that the op does not have, for arguments of wrong Python types, and
    if tensors are missing.

        x = torch.empty(8, 256, dtype=torch.bfloat16, device="meta")
        weight = torch.empty(4, 500, 256, dtype=torch.bfloat16, device="meta")
        ends = torch.empty(4, dtype=torch.int32, device="meta")
        cutlass_moe.why_not(x, weight, offsets=ends)  # "N must be a multiple of 8 ..."
    """
    of_layer = len(tensors) > len(_PRODUCT) or "w13" in arguments
    names = _LAYER if of_layer else _PRODUCT
    by_name = {name: arguments.pop(name) for name in names[len(tensors) :] if name in arguments}
    if len(tensors) + len(by_name) != len(names):
        got = ", ".join([f"{len(tensors)} by position", *by_name])
        raise TypeError(f"{', '.join(_PRODUCT)} or {', '.join(_LAYER)} must be given, got {got}")
    given: Any = (*tensors, *by_name.values(), arguments)
    if of_layer:
        return _ask(_why_no_layer, *split_layer(*given), arch)
    return _ask(_why_no_product, *split_product(*given), arch)


def why_no_layer(problems: LayerProblems, arch: str) -> str | None:
    """Why no kernels for `arch` serve a layer, and which padding mends it; None if they do."""
    reason = problems.why_illegal(arch)
    mended = problems.padded()
    if reason is None or mended == problems or mended.why_illegal(arch) is not None:
        return reason
    sizes = {"inner": (problems.down.k, mended.down.k), "hidden": (problems.up.k, mended.up.k)}
    said = [f"{name} size to {new}" for name, (old, new) in sizes.items() if old != new]
    return f"{reason}; cutlass_moe.pad_experts pads the experts' {' and '.join(said)}, once at load"


def _ask(ask: Callable[..., str | None], given: Any, options: Any, arch: str | None) -> str | None:
    """Asks once per signature; what the op refuses is a reason too."""
    compiling = torch.compiler.is_compiling()  # which neither needs nor traces what is kept
    try:
        if arch is None:
            first = given[0]
            arch = library.device_arch(first.get_device()) if first.is_cuda else DEFAULT_ARCH
        key = signature((ask, arch, *options, wants_gradient(given)), given)
        known = None if compiling else _reasons.get(key)
    except Exception:
        _check_types(given, options)
        raise
    if known is None:
        if not compiling:
            _check_types(given, options)
        try:
            known = (ask(given, options, arch),)
        except (TypeError, ValueError) as error:
            known = (str(error),)
        if not compiling:
            _reasons.keep(key, known)
    return known[0]


def _check_types(given: Any, options: Any) -> None:
    check_types(type(given), given._asdict())
    check_types(type(options), options._asdict())


def _why_no_layer(layer: LayerOperands, options: LayerOptions, arch: str) -> str | None:
    trained = wants_gradient(layer)
    reason = why_no_gradient(layer, options) if trained else None
    if reason is not None:
        return reason
    problems = accept_layer(widened(layer), options).problems
    reason = why_no_layer(problems, arch)
    compiling = torch.compiler.is_compiling()  # the ops then say it when they run
    if reason is None and trained and options.quant is None and not compiling:
        needed = training_problems(problems, options.interleaved).values()
        reason = next(filter(None, (why_illegal(problem, arch=arch) for problem in needed)), None)
    return reason


def _why_no_product(operands: Operands, options: Options, arch: str) -> str | None:
    return why_no_product(pose(operands, check(operands, options).dtype, options), arch)
