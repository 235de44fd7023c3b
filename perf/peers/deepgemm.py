"""DeepGEMM's contiguous and masked grouped products, and the layer that vLLM makes of them. vLLM's
wheel has it, compiled at run time.

Of products, permuting, padding and laying out the scales are not charged. With fp8 its scales are
per 1x128 of x and per 128x128 of the weights: of a product with a scale per token and channel it
gets the token's for each 128, and ones, so that the check multiplies by the channels' afterwards.
"""

from __future__ import annotations

import torch

from perf.cases import BLOCK
from perf.operands import LayerInputs, ProductInputs
from perf.peers.prepared import Absent, Prepared, Quick, only, require
from perf.peers.vllm import MOE, UTILS, module_of

DEVICE = "cuda"
ALIGNMENT = 128
MOST_PADDING = 4  # masked layouts with more rows than this times the product's are left out


def contiguous(inputs: ProductInputs, quick: Quick) -> Prepared:
    """Each expert's rows padded to a multiple of the alignment."""
    deep_gemm = _deep_gemm(inputs)
    get = getattr(deep_gemm, "get_mk_alignment_for_contiguous_layout", lambda: ALIGNMENT)
    alignment = get()
    padded = (inputs.counts + alignment - 1) // alignment * alignment
    firsts, total = padded.cumsum(0) - padded, int(padded.sum())
    targets = _targets(inputs, firsts)
    x, x_scale, w_scale = _operands(inputs, targets, total)
    layout = torch.full((total,), -1, dtype=torch.int32, device=DEVICE)
    layout[targets] = inputs.expert_of.int()
    out, w = inputs.new_out(total, inputs.n), inputs.weight.w
    if x_scale is None:

        def launch() -> None:
            deep_gemm.m_grouped_bf16_gemm_nt_contiguous(x, w, out, layout)
    else:
        x_scale = deep_gemm.get_mn_major_tma_aligned_tensor(x_scale)

        def launch() -> None:
            deep_gemm.m_grouped_fp8_gemm_nt_contiguous((x, x_scale), (w, w_scale), out, layout)

    return _prepared(inputs, launch, out, targets)


def masked(inputs: ProductInputs, quick: Quick) -> Prepared:
    """Every expert has room for the most rows of any."""
    deep_gemm, case = _deep_gemm(inputs), inputs.case
    experts = case.num_experts
    most = -(-int(inputs.counts.max()) // ALIGNMENT) * ALIGNMENT
    total = experts * most
    if total > MOST_PADDING * case.rows + ALIGNMENT * experts:
        raise Absent(f"more than {MOST_PADDING} times as many rows with padding")
    targets = _targets(inputs, torch.arange(experts, device=DEVICE) * most)
    x, x_scale, w_scale = _operands(inputs, targets, total)
    out, w = inputs.new_out(total, inputs.n), inputs.weight.w
    x, y = x.view(experts, most, -1), out.view(experts, most, -1)
    counts, mean = inputs.counts.int(), max(1, case.rows // experts)
    if x_scale is None:

        def launch() -> None:
            deep_gemm.m_grouped_bf16_gemm_nt_masked(x, w, y, counts, mean)
    else:
        x_scale = deep_gemm.get_mn_major_tma_aligned_tensor(x_scale.view(experts, most, -1))

        def launch() -> None:
            deep_gemm.m_grouped_fp8_gemm_nt_masked((x, x_scale), (w, w_scale), y, counts, mean)

    return _prepared(inputs, launch, out, targets)


def layer(inputs: LayerInputs, quick: Quick) -> Prepared:
    """As vLLM's own class for it: quantise, permute to padded rows, product, SwiGLU and quantise,
    product, weighted sum. Rows of padding are neither multiplied nor quantised."""
    only(inputs, "fp8_block")
    case, deep_gemm = inputs.case, _deep_gemm(inputs)
    if case.hidden % BLOCK:
        raise Absent(f"the hidden size must be a multiple of {BLOCK}, got {case.hidden}")
    moves, quantisers = module_of(f"{MOE}.deep_gemm_utils"), module_of(f"{UTILS}.fp8_utils")
    experts, count = case.num_experts, case.tokens
    rows = moves.compute_aligned_M(count, case.top_k, experts, ALIGNMENT, None)
    h, y = inputs.new_out(rows, 2 * case.inter), inputs.new_out(rows, case.hidden)
    out = torch.full_like(inputs.hidden, torch.nan)

    def multiply(x, weights, result, layout) -> None:  # type: ignore[no-untyped-def]
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
            x, (weights.w, weights.scale), result, layout, use_psum_layout=True
        )

    def launch() -> None:
        x = quantisers.per_token_group_quant_fp8(inputs.hidden, BLOCK)
        *x, ends, order, alignment = moves.deepgemm_moe_permute(
            *x, inputs.ids, experts, None, None, use_psum_layout=True
        )
        multiply(x, inputs.up, h, ends)
        act = quantisers.silu_mul_per_token_group_quant_fp8_colmajor(
            h, expert_ends=ends, expert_alignment=alignment
        )
        multiply(act, inputs.down, y, ends)
        moves.deepgemm_unpermute_and_reduce(y, inputs.ids, inputs.topk_weights, order, None, out)

    note = f"{rows} rows with padding"
    return Prepared(launch, lambda tokens: out[tokens], note, lambda: out.fill_(torch.nan))


def _deep_gemm(inputs: ProductInputs | LayerInputs):  # type: ignore[no-untyped-def]
    only(inputs, "fp8", "fp8_block", "bf16")
    return require("deep_gemm")


def _targets(inputs: ProductInputs, firsts: torch.Tensor) -> torch.Tensor:
    """Where the sorted rows go when each expert's begin at `firsts`."""
    within = (
        torch.arange(inputs.case.rows, device=DEVICE)
        - (inputs.ends - inputs.counts)[inputs.expert_of]
    )
    return firsts[inputs.expert_of] + within


def _operands(
    inputs: ProductInputs, targets: torch.Tensor, total: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """x [total, K] with its scale [total, K / BLOCK], and the weights' scale."""
    rows, row_scale = inputs.gathered()
    x = torch.zeros((total, inputs.k), dtype=rows.dtype, device=DEVICE)
    x.view(torch.uint8)[targets] = rows.view(torch.uint8)
    if row_scale is None:
        return x, None, None
    groups = -(-inputs.k // BLOCK)
    x_scale = torch.zeros((total, groups), device=DEVICE)
    x_scale[targets] = row_scale if row_scale.dim() == 2 else row_scale[:, None]
    if inputs.case.dtype == "fp8_block":
        return x, x_scale, inputs.weight.scale
    blocks = (inputs.case.num_experts, -(-inputs.n // BLOCK), groups)
    return x, x_scale, torch.ones(blocks, device=DEVICE)


def _prepared(inputs: ProductInputs, launch, out: torch.Tensor, targets: torch.Tensor) -> Prepared:  # type: ignore[no-untyped-def]
    def rows(numbers: torch.Tensor) -> torch.Tensor:
        got = out[targets[numbers]].float()
        scale = inputs.weight.scale if inputs.case.dtype == "fp8" else None
        return got if scale is None else got * scale[inputs.expert_of[numbers]]

    return Prepared(launch, rows, f"{len(out)} rows with padding")
