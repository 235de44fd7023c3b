"""transformers' plans of tensor and expert parallelism with our experts: two processes, on gloo."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch
from torch import distributed

pytest.importorskip("accelerate", reason="transformers shares a model among ranks with accelerate")
pytest.importorskip("transformers", minversion="5.24")

import transformers

from cutlass_moe.integrations import transformers as ours
from tests.integrations.tiny_models import VOCAB, experts_of, make
from tests.support.ranks import run_ranks

RANKS = 2
LIMITS = {None: 2e-2, "int8": 5e-2, "fp8": 0.15, "fp8_block": 0.15}  # of the median token
PLANS: dict[tuple[str, str | None], dict[str, int]] = {
    ("tensor", None): {"tp_size": RANKS},
    ("tensor", "int8"): {"tp_size": RANKS},
    ("expert", None): {"tp_size": RANKS, "ep_size": RANKS},
    ("expert", "fp8"): {"tp_size": RANKS, "ep_size": RANKS},
    ("expert", "fp8_block"): {"tp_size": RANKS, "ep_size": RANKS},
}


def tokens() -> torch.Tensor:
    return torch.randint(2, VOCAB, (2, 17), generator=torch.Generator().manual_seed(3))


def run(rank: int, directory: Path) -> None:
    """One rank: writes the logits of each plan, and how many experts' weights it held."""
    from transformers.distributed import DistributedConfig

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=RANKS
    )
    found = {}
    for (plan, quant), sizes in PLANS.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.bfloat16,
            experts_implementation="cutlass_moe",
            distributed_config=DistributedConfig(**sizes),
        ).eval()
        if quant:
            ours.quantize_(model, quant)
        weight = experts_of(model)[0].gate_up_proj
        held = weight.to_local() if hasattr(weight, "to_local") else weight
        with torch.no_grad():
            logits = model(tokens()).logits
        with contextlib.suppress(AttributeError):
            logits = logits.full_tensor()
        found[plan, quant] = logits, tuple(held.shape)
    torch.save(found, directory / f"rank{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_give_what_one_gives(tmp_path: Path) -> None:
    model = make("qwen3-moe")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        want = model(tokens()).logits.double()
    experts, rows, hidden = experts_of(model)[0].gate_up_proj.shape
    run_ranks(run, (tmp_path,), RANKS)
    for rank in range(RANKS):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        for (plan, quant), (logits, shape) in found.items():
            whole = plan == "tensor"
            share = (experts, rows // RANKS, hidden) if whole else (experts // RANKS, rows, hidden)
            assert shape == share, (rank, plan, quant)
            errors = (logits.double() - want).norm(dim=-1) / want.norm(dim=-1)
            assert errors.median() <= LIMITS[quant], (rank, plan, quant)
