"""Mixture-of-experts grouped GEMM for PyTorch: no token is copied, kernels come from a cache."""

import cutlass_moe.ops.grouped_matmul_gradient  # noqa: F401  # registers it
from cutlass_moe.layer.fused_moe import fused_moe, fused_moe_problems, fused_moe_workspace_size
from cutlass_moe.layer.pad import pad_experts
from cutlass_moe.layer.reference import fused_moe_reference
from cutlass_moe.layer.why_not import why_not
from cutlass_moe.ops.combine import combine, combine_reference
from cutlass_moe.ops.grouped_matmul import (
    grouped_matmul,
    grouped_matmul_out,
    grouped_matmul_problem,
)
from cutlass_moe.ops.grouped_matmul_reference import grouped_matmul_reference
from cutlass_moe.ops.grouped_mm import grouped_mm, grouped_mm_reference
from cutlass_moe.ops.index_group_matmul import index_group_matmul, index_group_matmul_workspace_size
from cutlass_moe.ops.pack import (
    dequantize_packed,
    pack_weights,
    quantize_packed,
    unpack_weights,
)
from cutlass_moe.ops.plan import Plan, plan
from cutlass_moe.ops.quantize import (
    quantize_per_channel,
    quantize_per_token,
    quantize_per_token_reference,
)
from cutlass_moe.ops.quantize_groups import (
    quantize_per_block,
    quantize_per_token_group,
    quantize_per_token_group_reference,
)
from cutlass_moe.ops.route import RoutingTable, renormalize_kept, route, route_reference
from cutlass_moe.ops.router import route_logits, topk_router, topk_router_reference
from cutlass_moe.ops.router_losses import load_balancing_loss, router_z_loss
from cutlass_moe.ops.weight_grad import grouped_weight_grad, grouped_weight_grad_reference
from cutlass_moe.warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "Plan",
    "RoutingTable",
    "combine",
    "combine_reference",
    "dequantize_packed",
    "fused_moe",
    "fused_moe_problems",
    "fused_moe_reference",
    "fused_moe_workspace_size",
    "grouped_matmul",
    "grouped_matmul_out",
    "grouped_matmul_problem",
    "grouped_matmul_reference",
    "grouped_mm",
    "grouped_mm_reference",
    "grouped_weight_grad",
    "grouped_weight_grad_reference",
    "index_group_matmul",
    "index_group_matmul_workspace_size",
    "load_balancing_loss",
    "pack_weights",
    "pad_experts",
    "plan",
    "quantize_packed",
    "quantize_per_block",
    "quantize_per_channel",
    "quantize_per_token",
    "quantize_per_token_group",
    "quantize_per_token_group_reference",
    "quantize_per_token_reference",
    "renormalize_kept",
    "route",
    "route_logits",
    "route_reference",
    "router_z_loss",
    "topk_router",
    "topk_router_reference",
    "unpack_weights",
    "warmup",
    "why_not",
]
