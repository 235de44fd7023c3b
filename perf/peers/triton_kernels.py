"""triton_kernels' products and layers of MXFP4 weights, called as gpt-oss and vLLM do on Hopper.

Weights and scales are in its layout for Hopper. In a layer, routing starts from logits and includes
what its `routing` does; the activation is in the up projection's kernel, and the down projection
writes rows that a last kernel adds up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from cutlass_moe.operands import Numbers
from perf.operands import LayerInputs, ProductInputs, Weights
from perf.peers.prepared import Prepared, Quick, only, require

WARPS = 8  # what the layout of scales is made for


class RaggedRows(NamedTuple):
    """What `routing` returns."""

    data: Any
    gather: Any
    scatter: Any


def routing(inputs: ProductInputs | LayerInputs, topk_weights: torch.Tensor) -> RaggedRows:
    """The routing of the case's ids; the softmax of a token's logits gives its topk_weights."""
    case = inputs.case
    logits = torch.zeros((case.tokens, case.num_experts), device=inputs.ids.device)
    logits.scatter_(1, inputs.ids.long(), topk_weights.log())
    # ids of 32 bits: the kernel shifts a 1 of their type by up to 31
    made = require("triton_kernels.routing").routing(logits, case.top_k, expt_indx=inputs.ids)
    return RaggedRows(*made)


def swizzled(weights: Weights, alternating: bool = False) -> tuple[Any, Any]:
    """Weights [E, K, N] in its layout, and a config with their scales; made once a layer.

    alternating: rows are made gate, up, gate, up, ..., as its activation takes them.
    """
    key = f"triton_kernels {alternating}"
    if key not in weights.made:
        ogs, numerics = require("triton_kernels.matmul_ogs"), require("triton_kernels.numerics")
        tensor, layout = (
            require("triton_kernels.tensor"),
            require("triton_kernels.tensor_details.layout"),
        )
        ogs.update_opt_flags_constraints({"split_k": 1})
        assert weights.scale is not None
        both = [weights.w.flatten(2), weights.scale]
        if alternating:
            both = [t.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2) for t in both]
        values, scale = both
        scale = torch.nn.functional.pad(scale, (0, -scale.shape[2] % 4))
        kind, options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
        values = tensor.wrap_torch_tensor(values.mT, dtype=tensor.FP4)
        values = tensor.convert_layout(values, kind, **options)
        kind, options = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=WARPS)
        scale = tensor.convert_layout(tensor.wrap_torch_tensor(scale.mT), kind, **options)
        flex = ogs.FlexCtx(rhs_data=numerics.InFlexData())
        weights.made[key] = values, ogs.PrecisionConfig(weight_scale=scale, flex_ctx=flex)
    return weights.made[key]


def product(inputs: ProductInputs, quick: Quick) -> Prepared:
    """Its kernel gathers; routing is not charged. "down" reads its rows in its order."""
    only(inputs, "mxfp4")
    matmul, case = require("triton_kernels.matmul_ogs").matmul_ogs, inputs.case
    values, config = swizzled(inputs.weight)
    table = routing(inputs, torch.full_like(inputs.ids, 1 / case.top_k, dtype=torch.float32))
    out, x, gather = inputs.new_out(case.rows, inputs.n), inputs.x, table.gather
    if case.part == "down":
        x, gather = x[table.gather.src_indx.long()], None

    def launch() -> None:
        matmul(
            x, values, None, table.data, gather_indx=gather, precision_config=config, y=out[None]
        )

    place = table.gather.dst_indx.long()  # of a pair, in its order
    return Prepared(launch, lambda rows: out[place[inputs.order[rows]]])


def layer(inputs: LayerInputs, quick: Quick) -> Prepared:
    """Routing, up with its activation, down with the weighted sum."""
    only(inputs, "mxfp4")
    ogs, swiglu = require("triton_kernels.matmul_ogs"), require("triton_kernels.swiglu").swiglu_fn
    case, numbers = inputs.case, Numbers()
    w13, w13_config = swizzled(inputs.up, alternating=True)
    w2, w2_config = swizzled(inputs.down)
    specs = ogs.FnSpecs("swiglu", swiglu, ("alpha", "limit"))
    active = ogs.FusedActivation(specs, (numbers.alpha, numbers.limit), 2)
    act, out = inputs.new_out(case.rows, case.inter), torch.full_like(inputs.hidden, torch.nan)

    def launch() -> None:
        table = routing(inputs, inputs.topk_weights)
        ogs.matmul_ogs(
            inputs.hidden, w13, None, table.data, gather_indx=table.gather,
            precision_config=w13_config, fused_activation=active, y=act[None],
        )  # fmt: skip
        ogs.matmul_ogs(
            act, w2, None, table.data, scatter_indx=table.scatter, precision_config=w2_config,
            gammas=table.data.gate_scal, y=out[None],
        )  # fmt: skip

    return Prepared(launch, lambda tokens: out[tokens], clear=lambda: out.fill_(torch.nan))
