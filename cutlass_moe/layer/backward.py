"""The backward of a layer, as a list of launches; training.py says which."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cutlass_moe.layer.activate import activate_rows_backward
from cutlass_moe.layer.products import Factor, How, project, project_gradient, rows_dtype
from cutlass_moe.ops._checks import is_n_major, reads_rows
from cutlass_moe.ops._row_sums import sum_by_expert, two_parts
from cutlass_moe.ops.combine import combine
from cutlass_moe.ops.grouped_matmul import grouped_matmul, grouped_matmul_out
from cutlass_moe.ops.route import RoutingTable
from cutlass_moe.ops.weight_grad import grouped_weight_grad

_SOME_BYTES = 128 << 20  # of bfloat16 weights that are there at a time
GradInto = tuple[Tensor | None, Tensor | None]


class Saved(NamedTuple):
    """The tensors that the backward reads, in the order of its op's schema.

    h: the up projection before its activation; without rows where it is to be computed again.
    index, offsets, inverse: the routing table.
    """

    hidden: Tensor
    w13: Tensor
    w2: Tensor
    topk_weights: Tensor
    w13_bias: Tensor | None
    w2_bias: Tensor | None
    w13_scale: Tensor | None
    w2_scale: Tensor | None
    h: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    offsets: Tensor
    inverse: Tensor

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """Those that may want a gradient, in the order of `Needs`."""
        return self[: len(Needs._fields)]


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    w13: bool
    w2: bool
    topk_weights: bool
    w13_bias: bool
    w2_bias: bool


class LayerBackward:
    """The backward of one call. owned: nobody reads what was saved again, so that the gradient of
    h may take its place."""

    def __init__(self, grad: Tensor, saved: Saved, how: How, owned: bool = False) -> None:
        grad = grad if how.quant is None else grad.bfloat16()  # as what is not quantised
        self.grad, self.saved, self.how = grad.contiguous(), saved, how
        self.owned = owned
        hidden = saved.hidden
        self.hidden = hidden if reads_rows(hidden) else hidden.contiguous()

    def gradients(self, needs: Needs, into: GradInto = (None, None)) -> list[Tensor | None]:
        """The gradients that are wanted, in the order of `Needs`; None for those that are not.

        into: gradients of w13 and w2 that theirs are added to, instead of being returned.
        """
        saved = self.saved
        h, again = saved.h, len(saved.h) < len(saved.index)
        self.saved = saved = saved._replace(h=h.new_empty(0))  # this call lets go of it
        if again:
            up = Factor(saved.w13, saved.w13_scale, saved.w13_bias)
            h = project(self.hidden, up, self.how, saved.offsets, saved.index)
        grad_h = h if again or self.owned else torch.empty_like(h)
        weights = saved.topk_weights.float().contiguous()
        active, by_weight = self.through_activation(h, weights, grad_h)
        del h
        found: dict[str, Tensor | None] = {}
        if needs.topk_weights:
            if saved.w2_bias is not None:
                by_weight += self.share_of_bias(saved.w2_bias)
            found["topk_weights"] = by_weight.to(saved.topk_weights.dtype)
        # What takes more memory, active or the gradient of w2, is there for the shorter time.
        w2_bytes = saved.w2.nbytes if needs.w2 and into[1] is None else 0
        if active.nbytes <= w2_bytes:
            found |= self.of_up(grad_h, needs, into[0])
            del grad_h
            found |= self.of_down(active, weights, needs, into[1])
        else:
            found |= self.of_down(active, weights, needs, into[1])
            del active
            found |= self.of_up(grad_h, needs, into[0])
        for name in ("w13_bias", "w2_bias"):
            bias, gradient = getattr(saved, name), found.get(name)
            found[name] = None if gradient is None else gradient.to(bias.dtype)
        return [found.get(name) for name in Needs._fields]

    def of_up(self, grad_h: Tensor, needs: Needs, into: Tensor | None) -> dict[str, Tensor | None]:
        """The gradients of what the up projection multiplies and adds. into: as in `gradients`."""
        saved, found = self.saved, dict[str, Tensor | None]()
        if needs.hidden:
            found["hidden"] = self.hidden_grad(grad_h)
        if needs.w13:
            found["w13"] = self.weight_grad(saved.w13, grad_h, self.hidden, False, into)
        if needs.w13_bias:
            found["w13_bias"] = sum_by_expert(grad_h, saved.offsets)
        return found

    def of_down(
        self, active: Tensor, weights: Tensor, needs: Needs, into: Tensor | None
    ) -> dict[str, Tensor | None]:
        """The gradients of the down projection's weights and bias. into: as in `gradients`."""
        saved, found = self.saved, dict[str, Tensor | None]()
        if needs.w2:
            found["w2"] = self.weight_grad(saved.w2, self.grad, active, True, into)
        if needs.w2_bias:
            by_row = self.weights_by_row(weights)
            found["w2_bias"] = sum_by_expert(
                self.grad, saved.offsets, index=saved.index, weights=by_row
            )
        return found

    def through_activation(
        self, h: Tensor, weights: Tensor, grad_h: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Writes the gradient of h, which may be h; returns the activation's result times the
        router weight, [R, I], and the gradient of the weights, float32 [T, k]."""
        saved, table = self.saved, RoutingTable(*self.saved[-3:])
        if saved.w2_scale is None:
            found = project_gradient(self.grad, saved.w2, h, weights, table, self.how, grad_h)
            if found is not None:
                return found
        active = self.turned(self.grad, saved.w2, saved.w2_scale, gather=True)
        by_weight = activate_rows_backward(
            h, active, weights, saved.inverse, self.how.options, grad_h, active
        )
        return active, by_weight

    def product(
        self, x: Tensor, weight: Tensor, gather: bool, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        """The rows of x, gathered or in order, times their experts' weights."""
        return grouped_matmul(
            x,
            weight,
            index=self.saved.index if gather else None,
            offsets=self.saved.offsets,
            out_dtype=out_dtype,
            expected_rows=self.how.expected_rows,
        )

    def turned(
        self,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        gather: bool,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The rows of x times their experts' transposed weights.

        8-bit weights become bfloat16 some experts at a time, so that there is no copy of all.
        """
        if scale is None:
            return self.product(x, weight.transpose(1, 2), gather, out_dtype)
        index, ends = self.saved.index, self.saved.offsets
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        out = x.new_empty(index.shape[0], weight.shape[2], dtype=out_dtype or x.dtype)
        some = max(1, _SOME_BYTES // max(1, 2 * weight[0].numel()))
        for first in range(0, len(weight), some):
            part = slice(first, first + some)
            scales = scale[part].view(len(weight[part]), -1, 1)
            wide = (weight[part].float() * scales).to(x.dtype)
            grouped_matmul_out(
                out,
                x,
                wide.transpose(1, 2),
                index=index if gather else None,
                offsets=ends[part],
                starts=starts[part],
                expected_rows=self.how.expected_rows,
            )
        return out

    def weight_grad(
        self, weight: Tensor, grad: Tensor, x: Tensor, gather_grad: bool, into: Tensor | None
    ) -> Tensor | None:
        """The gradient of weight [E, N, K], in its layout, or None where it is added to `into`.

        grad [., N]: of the product's rows; x [., K]: what it multiplied. One of them is gathered.
        """
        index, offsets, swapped = self.saved.index, self.saved.offsets, is_n_major(weight)
        left, right, gather_left = grad, x, gather_grad
        if swapped:
            left, right, gather_left = x, grad, not gather_grad
        out = into if into is None or not swapped else into.transpose(1, 2)
        found = grouped_weight_grad(
            left,
            right,
            offsets,
            left_index=index if gather_left else None,
            right_index=None if gather_left else index,
            out=out,
            accumulate=into is not None,
        )
        if into is not None:
            return None
        return found.transpose(1, 2) if swapped else found

    def hidden_grad(self, grad_h: Tensor) -> Tensor:
        """Each token's sum of the gradients of its rows."""
        saved = self.saved
        dtype = rows_dtype(saved.hidden)
        rows = self.turned(grad_h, saved.w13, saved.w13_scale, gather=False, out_dtype=dtype)
        ones = torch.ones_like(saved.inverse, dtype=torch.float32)
        return combine(rows, ones, saved.inverse).to(saved.hidden.dtype)

    def share_of_bias(self, bias: Tensor) -> Tensor:
        """For each pair the product of the output's gradient with the bias of its expert's w2."""
        thin = self.grad.new_zeros(len(bias), 8, bias.shape[1])  # the least columns of a product
        thin[:, :2] = two_parts(bias.float(), thin.dtype).movedim(-1, 1)
        rows = self.product(self.grad, thin, gather=True, out_dtype=torch.float32)
        inverse = self.saved.inverse
        shares = rows[:, :2].sum(1)[inverse.clamp(min=0).long()] if len(rows) else inverse.float()
        return shares.where(inverse >= 0, 0)

    def weights_by_row(self, weights: Tensor) -> Tensor:
        """The router weight of each row, float32 [R]; zero in rows of no pair."""
        inverse, count = self.saved.inverse.flatten(), self.saved.index.shape[0]
        row = inverse.where(inverse >= 0, count).long()
        return weights.new_zeros(count + 1).scatter_(0, row, weights.flatten())[:count]
