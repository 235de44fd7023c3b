"""A module whose parameters FSDP2 shards is trained as a whole one: two processes, on gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh

from cutlass_moe.nn import MoeFeedForward
from tests.layer.test_nn import D, make, tokens
from tests.support.ranks import run_ranks
from tests.support.training_cases import relative

fsdp = pytest.importorskip("torch.distributed.fsdp")
pytestmark = pytest.mark.skipif(
    not hasattr(fsdp, "fully_shard"), reason="needs torch.distributed.fsdp.fully_shard"
)

RANKS, TOKENS = 2, 24
NAMES = ("mixtral", "deepseek", "shared")


def layer_of(name: str) -> MoeFeedForward:
    return make(name, torch.bfloat16, use_grouped_gemm=True)


def step(layer: MoeFeedForward, x: Tensor) -> None:
    layer(x).float().square().mean().backward()


def run(rank: int, directory: Path) -> None:
    """One rank, with its half of the tokens: writes the gradients of all parameters."""
    torch.set_num_threads(1)
    MoeFeedForward._why_no_kernel = lambda *_: None  # type: ignore[method-assign]
    distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=RANKS
    )
    found = {}
    for name in NAMES:
        layer = layer_of(name)
        fsdp.fully_shard(layer, mesh=init_device_mesh("cpu", (RANKS,)))
        step(layer, tokens(RANKS, TOKENS, D, dtype=torch.bfloat16)[rank])
        gradients = {part: p.grad.full_tensor() for part, p in layer.named_parameters()}
        found[name] = gradients
    torch.save(found, directory / f"rank{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_train_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_ranks(run, (tmp_path,), RANKS)
    monkeypatch.setattr(MoeFeedForward, "_why_no_kernel", lambda *_: None)
    for name in NAMES:
        total: dict[str, Tensor] = {}
        for x in tokens(RANKS, TOKENS, D, dtype=torch.bfloat16):
            layer = layer_of(name)
            step(layer, x)
            for part, parameter in layer.named_parameters():
                assert parameter.grad is not None
                total[part] = total.get(part, 0) + parameter.grad.double() / RANKS
        for rank in range(RANKS):
            gradients = torch.load(tmp_path / f"rank{rank}.pt")[name]
            assert gradients.keys() == total.keys()
            for part, gradient in gradients.items():
                assert relative(gradient, total[part]) < 1e-2, (name, part)
