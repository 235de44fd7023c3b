"""The activation of a layer in training, and its gradients, as kernels with their references."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cutlass_moe.operands import DTYPES, LayerOptions
from cutlass_moe.ops.activations import activate, activate_backward, is_gated
from cutlass_moe.ops.dispatch import launch_step, step_kernel
from cutlass_moe.runtime.parameters import activate_values
from emitters.spec.layer_steps import ActivateBackwardProblem, ActivateProblem


def activate_rows(h: Tensor, inverse: Tensor, options: LayerOptions) -> Tensor:
    """Applies the activation of `options` to the rows of an up projection.

    h [R, 2I or I]: bfloat16 or float16, contiguous. inverse int32 [T, k], contiguous: the row of
    each (token, choice) pair, or -1. Returns [R, I] of h's dtype; computed in float32. Rows that no
    pair has are undefined.
    """
    inter = h.shape[1] // 2 if is_gated(options.activation) else h.shape[1]
    active = h.new_empty(len(h), inter)
    tensors = {"h": h, "inverse": inverse, "active": active}
    if _launched(ActivateProblem, tensors, inter, options):
        return active
    return activate_rows_reference(h, inverse, options)


def activate_rows_backward(
    h: Tensor,
    grad_active: Tensor,
    weights: Tensor,
    inverse: Tensor,
    options: LayerOptions,
    grad_h: Tensor,
    active: Tensor | None,
) -> Tensor:
    """The gradients of the activation in a layer whose router weights multiply its result.

      grad_h = w * grad_active * derivative     active = w * activation(h)
      gradient of w = sum over columns of grad_active * activation(h)

    h, inverse, options: as in `activate_rows`. grad_active [R, I]: h's dtype, the gradient of the
    unweighted result. weights float32 [T, k]: the router weight w of each pair. All contiguous.
    grad_h [R, 2I or I], active [R, I] or None: are written, of h's dtype; they may be h and
    grad_active. Returns the gradient of weights, float32 [T, k], 0 for pairs without a row.
    """
    grad_weights = torch.empty_like(weights)
    tensors = {
        "h": h,
        "grad_active": grad_active,
        "weights": weights,
        "inverse": inverse,
        "grad_h": grad_h,
        "active": active,
        "grad_weights": grad_weights,
    }
    if not _launched(ActivateBackwardProblem, tensors, grad_active.shape[1], options):
        found = activate_rows_backward_reference(h, grad_active, weights, inverse, options)
        grad_h.copy_(found[0])
        if active is not None:
            active.copy_(found[1])
        return found[2]
    return grad_weights


def activate_rows_reference(h: Tensor, inverse: Tensor, options: LayerOptions) -> Tensor:
    """`activate_rows` in plain PyTorch, for float64 too; rows that no pair has are zeros."""
    _, rows = _pairs_with_rows(inverse, len(h))
    wide = h[rows].to(torch.promote_types(h.dtype, torch.float32))
    active = activate(wide, options.activation, options.interleaved, options.numbers)
    return h.new_zeros(len(h), active.shape[1]).index_copy(0, rows, active.to(h.dtype))


def activate_rows_backward_reference(
    h: Tensor, grad_active: Tensor, weights: Tensor, inverse: Tensor, options: LayerOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """`activate_rows_backward` in plain PyTorch, for float64 too.

    Returns grad_h, active and the gradient of weights; rows that no pair has are zeros.
    """
    pairs, rows = _pairs_with_rows(inverse, len(h))
    wide = torch.promote_types(h.dtype, torch.float32)
    before, grad = h[rows].to(wide), grad_active[rows].to(wide)
    weight = weights.flatten()[pairs, None].to(wide)
    how = options.activation, options.interleaved, options.numbers
    value = activate(before, *how)
    slopes = activate_backward(grad * weight, before, *how)
    grad_weights = weights.new_zeros(weights.numel())
    grad_weights[pairs] = (grad * value).sum(1).to(weights.dtype)
    return (
        torch.zeros_like(h).index_copy(0, rows, slopes.to(h.dtype)),
        torch.zeros_like(grad_active).index_copy(0, rows, (value * weight).to(h.dtype)),
        grad_weights.view(weights.shape),
    )


def _pairs_with_rows(inverse: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The pairs that have one of `count` rows, and these rows; int64."""
    row = inverse.flatten().long()
    pairs = ((row >= 0) & (row < count)).nonzero()[:, 0]
    return pairs, row[pairs]


def _launched(
    kind: type[ActivateProblem],
    tensors: Mapping[str, Tensor | None],
    inter: int,
    options: LayerOptions,
) -> bool:
    """Launches the kernel of this kind; False, on a GPU after a warning, if there is none.

    tensors: by the kernel's parameters.
    """
    h, inverse = tensors["h"], tensors["inverse"]
    assert h is not None and inverse is not None
    if not h.is_cuda or not inverse.numel():
        return False
    problem = kind(options.function, DTYPES[h.dtype], inter, options.interleaved)
    kernel = step_kernel(problem, h.get_device())
    if kernel is None:
        return False
    addresses = {name: 0 if t is None else t.data_ptr() for name, t in tensors.items()}
    pairs, numbers = inverse.numel(), options.numbers
    values = activate_values(addresses, len(h), pairs, numbers._asdict() if numbers else {})
    launch_step(kernel, values, problem.ctas(pairs, kernel.record.threads), h.get_device())
    return True
