"""The reader of checkpoints, onto a GPU: the bits that it reads onto the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cutlass_moe.models.checkpoints import Checkpoint, Share
from tests.support.checkpoints import GPT_OSS, LAYERS, QWEN3, STACKED, Form, write_checkpoint

pytestmark = pytest.mark.gpu
CASES = [
    (QWEN3, "fp8_block", None),
    (QWEN3, "fp8_block", "int8"),
    (replace(STACKED, style="transposed"), "fp8", None),
    (replace(STACKED, style="transposed"), "bf16", "fp8"),
    (GPT_OSS, "bf16", None),
]


@pytest.mark.parametrize(("form", "stored", "quant"), CASES, ids=lambda one: str(one))
def test_device(form: Form, stored: str, quant: str | None, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    write_checkpoint(tmp_path, form, stored, hidden=160, inter=192)
    share = Share(tp=2, tp_rank=1, ep=2, ep_rank=1)
    with Checkpoint(tmp_path) as checkpoint:
        here, there = (
            checkpoint.read(LAYERS[0], device=device, share=share, quant=quant)
            for device in ("cpu", "cuda")
        )
        router = checkpoint.read_router(LAYERS[0], "cuda")
    assert router.weight.is_cuda
    tensors = zip((*here.experts, here.expert_map), (*there.experts, there.expert_map), strict=True)
    for one, other in tensors:
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert other.is_cuda and other.is_contiguous() and torch.equal(one, other.cpu())
