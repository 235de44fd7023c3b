"""Checkpoints in 4 bits: their weights are packed, and are those that were written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe.models.checkpoints import Checkpoint, Share
from cutlass_moe.models.expert_weights import ExpertWeights
from tests.support.checkpoints import (
    EXPERTS,
    GPT_OSS,
    LAYERS,
    QWEN3,
    Form,
    Written,
    write_checkpoint,
)

pytest.importorskip("safetensors")
FORMS = [(GPT_OSS, "mxfp4"), (QWEN3, "int4_g32"), (QWEN3, "int4_g128")]
HIDDEN, INTER = 256, 128
each_form = pytest.mark.parametrize(("form", "quant"), FORMS, ids=[quant for _, quant in FORMS])


def write(directory: Path, form: Form, quant: str, **options: Any) -> Written:
    sizes = {"hidden": HIDDEN, "inter": INTER, **options}
    return write_checkpoint(directory, form, quant, **sizes)[LAYERS[0]]


def read(directory: Path, **options: Any) -> ExpertWeights:
    with Checkpoint(directory) as checkpoint:
        return checkpoint.read(LAYERS[0], **options)


def check(weights: ExpertWeights, written: Written, experts: slice, inter: slice) -> None:
    assert written.gate is not None
    for part, name in ((written.gate, "gate"), (written.up, "up")):
        rows = slice(None, weights.inter) if name == "gate" else slice(weights.inter, None)
        dense = torch.stack([weights.dense(e)[0] for e in range(len(weights.w13))])[:, rows]
        assert torch.equal(dense, part[experts, inter]), name
    down = torch.stack([weights.dense(e)[1] for e in range(len(weights.w2))])
    assert torch.equal(down, written.down[experts, :, inter])
    if written.gate_bias is not None and written.up_bias is not None:
        biases = written.gate_bias[experts, inter], written.up_bias[experts, inter]
        assert weights.w13_bias is not None
        assert torch.equal(weights.w13_bias, torch.cat(biases, 1))


@each_form
def test_weights_are_those_that_were_written(tmp_path: Path, form: Form, quant: str) -> None:
    written = write(tmp_path, form, quant)
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.stored(LAYERS[0]) == quant == checkpoint.model.dtype
    weights = read(tmp_path)
    assert weights.quant == quant and weights.w13.dtype == torch.uint8
    assert weights.w13_scale is None and not weights.interleaved and weights.padded() is weights
    check(weights, written, slice(None), slice(None))


@each_form
def test_shares(tmp_path: Path, form: Form, quant: str) -> None:
    written = write(tmp_path, form, quant, inter=2 * INTER)
    weights = read(tmp_path, share=Share(tp=2, tp_rank=1, ep=2, ep_rank=1))
    check(weights, written, slice(EXPERTS // 2, None), slice(INTER, None))
    with pytest.raises(ValueError, match="tp must leave each rank a multiple of"):
        read(tmp_path, share=Share(tp=16))


@each_form
def test_layers_of_them_run(tmp_path: Path, form: Form, quant: str) -> None:
    written = write(tmp_path, form, quant)
    assert written.gate is not None
    hidden = torch.randn(5, HIDDEN, dtype=torch.bfloat16)
    topk_weights, topk_ids = cm.topk_router(torch.randn(5, EXPERTS), k=2)
    activation = "swiglu_oai" if form is GPT_OSS else "swiglu"
    arguments = {"topk_weights": topk_weights, "topk_ids": topk_ids, "activation": activation}
    out = cm.fused_moe(hidden, **read(tmp_path).arguments, **arguments)
    biases: dict[str, Tensor | None] = {}
    if written.gate_bias is not None and written.up_bias is not None:
        w13_bias = torch.cat([written.gate_bias, written.up_bias], 1)
        biases = {"w13_bias": w13_bias, "w2_bias": written.down_bias}
    w13 = torch.cat([written.gate, written.up], 1)
    wanted = cm.fused_moe_reference(hidden, w13, written.down, **arguments, **biases)
    assert float((out - wanted).norm() / wanted.norm()) < 4e-3


@pytest.mark.parametrize("quant", ["mxfp4", "int4_g32", "int4_g128"])
@pytest.mark.parametrize("form", [GPT_OSS, QWEN3], ids=str)
def test_other_weights_are_rounded(tmp_path: Path, form: Form, quant: str) -> None:
    written = write(tmp_path, form, "bf16")
    weights = read(tmp_path, quant=quant)
    assert written.gate is not None and weights.quant == quant
    w13 = cm.quantize_packed(torch.cat([written.gate, written.up], 1), quant)
    assert torch.equal(weights.w13, w13)
    assert torch.equal(weights.w2, cm.quantize_packed(written.down, quant))
    if written.gate_bias is not None and written.up_bias is not None:
        biases = torch.cat([written.gate_bias, written.up_bias], 1)
        assert weights.w13_bias is not None and torch.equal(weights.w13_bias, biases)


def test_packed_weights_become_others(tmp_path: Path) -> None:
    written = write(tmp_path, GPT_OSS, "mxfp4")
    weights = read(tmp_path, quant="bf16")
    assert written.gate is not None
    assert torch.equal(weights.w13.float(), torch.cat([written.gate, written.up], 1))
    assert torch.equal(weights.w2.float(), written.down)


def test_wrong_tensors_are_named(tmp_path: Path) -> None:
    write(tmp_path, QWEN3, "int4_g32", hidden=96, inter=64)
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.stored(LAYERS[0]) == "int4_g32"
    other = tmp_path / "other"
    write(other, QWEN3, "int4_g32", changes={"hidden_size": 512})
    with pytest.raises(ValueError, match="must be I32 .*, got I32"):
        read(other)
