"""The routing that each case draws, and what it makes of the case."""

from __future__ import annotations

import torch

from perf.cases import RAGGED_ROWS, WGMMA_ROWS, Case, Load


def draw_topk_ids(case: Case) -> torch.Tensor:
    """int64 [tokens, top_k] on the CPU, the same on every machine.

    A token's experts are distinct, but for half. balanced: every expert as likely as another. zipf:
    the i-th most popular expert 1/i as likely as the first. half: one expert has half of the
    (token, expert) pairs, several of some tokens, the rest are balanced. ragged: one of 8 experts a
    token, their rows in the proportion of RAGGED_ROWS.
    """
    generator = torch.Generator().manual_seed(case.seed)
    if case.routing == "ragged":
        base = torch.repeat_interleave(torch.arange(len(RAGGED_ROWS)), torch.tensor(RAGGED_ROWS))
        drawn = torch.randperm(case.tokens, generator=generator) * len(base) // case.tokens
        return base[drawn][:, None]
    weights = torch.ones(case.num_experts)
    if case.routing == "zipf":
        popularity = torch.randperm(case.num_experts, generator=generator)
        weights = 1.0 / (popularity + 1.0)
    if case.routing == "half":
        crowded = torch.randint(case.num_experts, (1,), generator=generator)
        weights[crowded] = 1e-9
    chances = weights.expand(case.tokens, -1).contiguous()
    ids = torch.multinomial(chances, case.top_k, generator=generator)
    if case.routing == "half":
        pairs = torch.randperm(case.rows, generator=generator)[: case.rows // 2]
        ids.view(-1)[pairs] = crowded
    return ids


def load_of(case: Case, topk_ids: torch.Tensor) -> Load:
    counts = torch.bincount(topk_ids.flatten(), minlength=case.num_experts)
    rounded = (counts + WGMMA_ROWS - 1) // WGMMA_ROWS * WGMMA_ROWS
    return Load(int((counts > 0).sum()), int(counts.max()), int(rounded.sum()))
