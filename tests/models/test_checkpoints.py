"""The reader of checkpoints, against what was written: families, formats, shares, errors, bytes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import cutlass_moe as cm
from cutlass_moe.layer.checks import problems_of
from cutlass_moe.models.checkpoints import Checkpoint, Share
from cutlass_moe.models.expert_weights import ExpertWeights
from cutlass_moe.models.files import read_model
from cutlass_moe.models.problems import problems_of_shape
from cutlass_moe.operands import PACKINGS, LayerOperands, LayerOptions
from tests.support import checkpoints
from tests.support.checkpoints import (
    BLOCK,
    DEEPSEEK,
    EXPERTS,
    FORMS,
    GPT_OSS,
    LAYERS,
    MINIMAX,
    MIXTRAL,
    NEMOTRON,
    QUANTIZATION,
    QWEN3,
    STACKED,
    TOP_K,
    ZERO_EXPERTS,
    Form,
    Written,
    write_checkpoint,
)

safetensors = pytest.importorskip("safetensors")
LAYER = LAYERS[1]
FLOATS = ("bf16", "fp16")
WIDE = {"hidden": 160, "inter": 192}  # no multiples of a block


def read(directory: Path, **arguments: Any) -> ExpertWeights:
    with Checkpoint(directory) as checkpoint:
        return checkpoint.read(LAYER, **arguments)


def dense(weights: ExpertWeights) -> tuple[Tensor, Tensor]:
    """By definition, block by block: w13 [E, 2I or I, H] and w2 [E, H, I] in float32."""
    w13, w2, scale13, scale2 = weights.experts[:4]
    if scale13 is None or scale2 is None:
        return w13.float(), w2.float()
    if weights.block_inter is None:
        return w13.float() * scale13[..., None], w2.float() * scale2[..., None]
    inter, size = w2.shape[2], weights.block_inter
    row, hidden, column = (torch.arange(n) for n in (w13.shape[1], *w2.shape[1:]))
    row = row // inter * -(-inter // size) + row % inter // size  # up's blocks begin anew
    scale13 = scale13[:, row][:, :, hidden // BLOCK]
    scale2 = scale2[:, hidden // BLOCK][:, :, column // BLOCK]
    return w13.float() * scale13, w2.float() * scale2


def expected(written: Written, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    if written.gate is None:
        return written.up, written.down
    if interleaved:
        return torch.stack((written.gate, written.up), 2).flatten(1, 2), written.down
    return torch.cat((written.gate, written.up), 1), written.down


# Families and formats


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_family(form: Form, tmp_path: Path) -> None:
    layers = write_checkpoint(tmp_path, form)
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.layers == LAYERS
        for layer, written in layers.items():
            weights = checkpoint.read(layer)
            assert weights.quant == checkpoint.stored(layer) == "bf16"
            assert weights.interleaved == (form.style == "interleaved")
            w13, w2 = expected(written, weights.interleaved)
            assert torch.equal(weights.w13, w13.bfloat16()) and weights.w13.is_contiguous()
            assert torch.equal(weights.w2, w2.bfloat16()) and weights.w2.is_contiguous()
            check_biases(weights, written)
            check_beside(checkpoint, layer, form, written)


def check_biases(weights: ExpertWeights, written: Written) -> None:
    assert (weights.w13_bias is None) == (written.gate_bias is None)
    if weights.w13_bias is not None and weights.w2_bias is not None:
        assert torch.equal(weights.w13_bias[:, ::2], written.gate_bias)
        assert torch.equal(weights.w13_bias[:, 1::2], written.up_bias)
        assert torch.equal(weights.w2_bias, written.down_bias)


def check_beside(checkpoint: Checkpoint, layer: int, form: Form, written: Written) -> None:
    router = checkpoint.read_router(layer)
    assert torch.equal(router.weight, written.tensors[form.router])
    assert (router.bias is None) == (form is not GPT_OSS)
    assert (router.correction_bias is None) == (form.bias is None)
    if router.correction_bias is not None:
        whole = written.tensors[str(form.bias)]
        assert torch.equal(router.correction_bias, whole[0] if whole.dim() > 1 else whole)
    shared = checkpoint.read_shared(layer)
    assert set(shared) == set(form.shared)
    assert all(torch.equal(shared[name], written.tensors[name]) for name in shared)


FORMATS = [
    *[
        (form, quant)
        for form in (QWEN3, MIXTRAL, DEEPSEEK)
        for quant in QUANTIZATION
        if quant not in PACKINGS  # test_packed_checkpoints.py
    ],
    *[(form, "fp8_block") for form in (MINIMAX, NEMOTRON)],
    *[
        (replace(STACKED, style="apart"), quant)
        for quant in ("fp8_tensor", "fp8_block", "fp8_block_compressed", "int8")
    ],
    *[(replace(STACKED, style="transposed"), quant) for quant in ("fp8", "fp16", "int8")],
    *[(STACKED, quant) for quant in ("fp8", "int8")],
]


@pytest.mark.parametrize(("form", "quant"), FORMATS, ids=lambda one: str(one))
def test_format(form: Form, quant: str, tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, form, quant, **WIDE)[LAYER]
    weights = read(tmp_path)
    in_blocks = quant.startswith("fp8_block")
    assert weights.quant == "fp8_block" if in_blocks else quant.removesuffix("_tensor")
    with Checkpoint(tmp_path) as checkpoint:
        assert weights.quant == checkpoint.model.dtype or quant in FLOATS
    assert weights.block_inter == (64 if in_blocks else None)
    for got, own, right in zip(
        dense(weights), zip(*map(weights.dense, range(EXPERTS)), strict=True),
        expected(written), strict=True,
    ):  # fmt: skip
        assert torch.equal(got, right)
        assert torch.equal(torch.stack(own), right)
    if quant not in FLOATS:
        assert weights.w13_scale is not None and weights.w13_scale.dtype == torch.float32
        rows = weights.w13.shape[1]
        halves = rows // weights.w2.shape[2]
        shape13 = (halves * 3, 2) if in_blocks else (rows,)
        shape2 = (2, 2) if in_blocks else (160,)
        assert weights.w13_scale.shape == (EXPERTS, *shape13)
        assert weights.w2_scale is not None and weights.w2_scale.shape == (EXPERTS, *shape2)


def test_joint_blocks(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, STACKED, "fp8_block", hidden=160, inter=256)[LAYER]
    for got, right in zip(dense(read(tmp_path)), expected(written), strict=True):
        assert torch.equal(got, right)


@pytest.mark.parametrize("inter", [192, 48])
def test_joint_blocks_with_rows_of_both(inter: int, tmp_path: Path) -> None:
    """gate and up in one tensor and in one block: only where smaller blocks keep them apart."""
    write_checkpoint(tmp_path, STACKED, hidden=160, inter=256)
    tensors = {"gate_up_proj": torch.randn(EXPERTS, 2 * inter, 160)}
    tensors |= {"down_proj": torch.zeros(EXPERTS, 160, inter)}
    scales = {
        name: torch.rand(EXPERTS, *(-(-size // BLOCK) for size in tensor.shape[1:]))
        for name, tensor in tensors.items()
    }
    edit(tmp_path, "layers.3.mlp.experts.", lambda name, _: None)
    for name, tensor in tensors.items():
        add(tmp_path, f"mlp.experts.{name}", tensor.to(torch.float8_e4m3fn))
        add(tmp_path, f"mlp.experts.{name}_scale_inv", scales[name])
    change_config(tmp_path, moe_intermediate_size=inter)
    if inter == 48:
        with pytest.raises(ValueError, match="up begins at 48"):
            read(tmp_path)
        return
    row, column = torch.arange(2 * inter) // BLOCK, torch.arange(160) // BLOCK
    stored = tensors["gate_up_proj"].to(torch.float8_e4m3fn).float()
    assert torch.equal(
        dense(read(tmp_path))[0], stored * scales["gate_up_proj"][:, row][..., column]
    )


def test_one_file_without_an_index(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, MIXTRAL, shards=0)[LAYER]
    assert torch.equal(read(tmp_path).w13, expected(written)[0].bfloat16())


def test_model_of_no_family(tmp_path: Path) -> None:
    """Its names are those of the family whose tensors it has."""
    for form in (QWEN3, MIXTRAL):
        directory = tmp_path / str(form)
        written = write_checkpoint(
            directory, form, changes={"model_type": "new", "architectures": ["New"]}
        )[LAYER]
        if form is MIXTRAL:
            change_config(directory, moe_intermediate_size=checkpoints.INTER)
        assert torch.equal(read(directory).w2, expected(written)[1].bfloat16())


# Shares of ranks


SHARED = [
    (QWEN3, "bf16"), (QWEN3, "fp8_block"), (QWEN3, "int8"), (DEEPSEEK, "fp8_tensor"),
    (GPT_OSS, "bf16"), (NEMOTRON, "fp8_block"),
    (replace(STACKED, style="transposed"), "fp8"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "quant"), SHARED, ids=lambda one: str(one))
@pytest.mark.parametrize(("tp", "ep"), [(1, 4), (2, 1), (3, 2), (6, 1)])
def test_shares_are_the_whole(form: Form, quant: str, tp: int, ep: int, tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, form, quant, **WIDE)[LAYER]
    parts = [[read(tmp_path, share=Share(tp, i, ep, j)) for j in range(ep)] for i in range(tp)]
    size, inter = EXPERTS // ep, 192 // tp
    ranks = []
    for i, row in enumerate(parts):
        for j, weights in enumerate(row):
            check_map(weights, j, ep)
            if quant == "fp8_block":
                assert weights.block_inter == {1: 64, 2: 32, 3: 64, 6: 32}[tp]
            if weights.w13_bias is not None and weights.w2_bias is not None:
                gate = written.gate_bias[j * size :][:size, i * inter :][:, :inter]  # type: ignore
                assert torch.equal(weights.w13_bias[:, ::2], gate)
                assert bool(weights.w2_bias.any()) == (i == 0)
        each = [dense(weights) for weights in row]
        ranks.append([torch.cat(tensors) for tensors in zip(*each, strict=True)])
    gated = written.gate is not None
    halves = 2 if gated and form.style != "interleaved" else 1
    rows = [rank[0].chunk(halves, 1) for rank in ranks]
    w13 = torch.cat([torch.cat(half, 1) for half in zip(*rows, strict=True)], 1)
    right = expected(written, form.style == "interleaved")
    assert torch.equal(w13, right[0])
    for rank, got in enumerate(rank[1] for rank in ranks):
        w2 = right[1][..., rank * inter : (rank + 1) * inter]
        cuts_blocks = quant == "fp8_block" and rank * inter % BLOCK
        # several scales may meet in one of the share's blocks, which has the largest
        assert (got - w2).norm() <= (0.03 if cuts_blocks else 0) * w2.norm()


def check_map(weights: ExpertWeights, rank: int, ep: int) -> None:
    if ep == 1:
        assert weights.expert_map is None
        return
    assert weights.expert_map is not None and weights.expert_map.dtype == torch.int32
    size = EXPERTS // ep
    here = [e - rank * size if e // size == rank else -1 for e in range(EXPERTS)]
    assert weights.expert_map.tolist() == here


def test_map_of_ids_that_are_no_experts(tmp_path: Path) -> None:
    form = next(form for form in FORMS if form.file == "longcat-flash")
    write_checkpoint(tmp_path, form)
    table = read(tmp_path, share=Share(ep=2, ep_rank=1)).expert_map
    assert table is not None
    assert table.tolist() == [-1] * 4 + [0, 1, 2, 3] + [-1] * ZERO_EXPERTS


# What a layer computes with them


def by_definition(
    x: Tensor, written: Written, weights: Tensor, ids: Tensor, activation: str
) -> Tensor:
    """The layer in float32, a pair of a token and an expert at a time."""
    out = torch.zeros_like(x)
    zero = torch.zeros(())
    for t in range(len(x)):
        for weight, e in zip(weights[t], ids[t].tolist(), strict=True):
            up = written.up[e] @ x[t] + (zero if written.up_bias is None else written.up_bias[e])
            if written.gate is None:
                active = functional.relu(up).square()
            else:
                bias = zero if written.gate_bias is None else written.gate_bias[e]
                gate = written.gate[e] @ x[t] + bias
                if activation == "swiglu_oai":
                    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
                    active = gate * torch.sigmoid(1.702 * gate) * (up + 1)
                else:
                    active = functional.silu(gate) * up
            bias = zero if written.down_bias is None else written.down_bias[e]
            out[t] += weight * (written.down[e] @ active + bias)
    return out


LAYER_CASES = [
    (QWEN3, "bf16", 5e-3), (DEEPSEEK, "fp8", 6e-2), (MIXTRAL, "int8", 3e-2),
    (GPT_OSS, "bf16", 5e-3), (NEMOTRON, "fp8", 6e-2),
    (QWEN3, "fp8_block", 6e-2), (NEMOTRON, "fp8_block", 6e-2),
]  # fmt: skip


@pytest.mark.parametrize(("form", "quant", "limit"), LAYER_CASES, ids=lambda one: str(one))
@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (1, 2)])
def test_layer(form: Form, quant: str, limit: float, tp: int, ep: int, tmp_path: Path) -> None:
    """The sum of what ranks compute is the model's layer."""
    written = write_checkpoint(tmp_path, form, quant, hidden=128, inter=192)[LAYER]
    torch.manual_seed(0)
    hidden = torch.randn(7, 128).bfloat16()
    weights, ids = torch.rand(7, TOP_K), torch.rand(7, EXPERTS).topk(TOP_K).indices
    total = torch.zeros(7, 128)
    with Checkpoint(tmp_path) as checkpoint:
        activation = str(checkpoint.model.shape.activation)
        for rank in range(tp * ep):
            experts = checkpoint.read(LAYER, share=Share(tp, rank % tp, ep, rank // tp))
            arguments = {**experts.arguments, "activation": activation}
            out = cm.fused_moe(hidden, topk_weights=weights, topk_ids=ids, **arguments)
            total += out.float()
    right = by_definition(hidden.float(), written, weights, ids, activation)
    assert (total - right).norm() <= limit * right.norm()


@pytest.mark.parametrize("stored", ["bf16", "fp8_block"])
@pytest.mark.parametrize("tp", [1, 2, 3])
def test_blocks_pose_what_is_built(stored: str, tp: int, tmp_path: Path) -> None:
    """The products of a rank's share are those that `build --tp` compiles, also if converted."""
    write_checkpoint(tmp_path, QWEN3, stored, **WIDE)
    shape = read_model(tmp_path).shape.shard(tp)
    built = problems_of_shape(shape, "fp8_block")
    weights = read(tmp_path, quant="fp8_block", share=Share(tp, tp - 1)).experts
    hidden, ids = torch.zeros(3, 160).bfloat16(), torch.zeros(3, TOP_K, dtype=torch.int32)
    layer = LayerOperands(hidden, weights.w13, weights.w2, torch.zeros(3, TOP_K), ids, *weights[2:])
    posed = problems_of(layer, LayerOptions("fp8_block", "swiglu"))
    assert (posed.up, posed.down) == (built.up, built.down)


@pytest.mark.parametrize("stored", ["bf16", "fp16", "fp8_block", "fp8"])
@pytest.mark.parametrize(
    ("quant", "limit"), [("bf16", 3e-3), ("fp8", 3e-2), ("int8", 1e-2), ("fp8_block", 3e-2)]
)
def test_quantised_again(stored: str, quant: str, limit: float, tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, QWEN3, stored, **WIDE)[LAYER]
    weights = read(tmp_path, quant=quant)
    assert weights.quant == quant
    assert weights.block_inter == (64 if quant == "fp8_block" else None)
    assert (weights.arguments["quant"] is None) == (quant == "bf16")
    for got, right in zip(dense(weights), expected(written), strict=True):
        assert (got - right).norm() <= (0 if stored == quant else limit) * right.norm()
    whole = read(tmp_path).requantized(quant)
    for one, other in zip(weights.experts, whole.experts, strict=True):
        assert one is other is None or torch.equal(one, other)  # type: ignore[arg-type]


def test_quantised_again_with_biases(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, GPT_OSS)[LAYER]
    weights = read(tmp_path, quant="fp8", share=Share(ep=2))
    assert weights.interleaved and weights.expert_map is not None
    assert torch.equal(weights.w13_bias[:, 1::2], written.up_bias[:4])  # type: ignore[index]
    assert torch.equal(weights.w2_bias, written.down_bias[:4])  # type: ignore[index,arg-type]
    again = read(tmp_path, share=Share(ep=2)).requantized("fp8")
    assert again.expert_map is not None and torch.equal(again.w13_bias, weights.w13_bias)  # type: ignore


def test_padded(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, QWEN3, "int8", inter=36)
    weights = read(tmp_path)
    padded = weights.padded()
    assert (padded.w13.shape[1], padded.w2.shape[2], padded.quant) == (96, 48, "int8")
    assert torch.equal(padded.w2[:, :, :36], weights.w2)


# Errors


def edit(directory: Path, part: str, change: Any) -> None:
    """Changes the tensors with this part in their names: to what change returns, None: away."""
    from safetensors.torch import load_file, save_file

    index = directory / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"] if index.exists() else None
    for path in directory.glob("*.safetensors"):
        old = load_file(path)
        new = {name: change(name, t) if part in name else t for name, t in old.items()}
        new = {name: tensor for name, tensor in new.items() if tensor is not None}
        save_file(new, path)
        for name in old.keys() - new.keys():
            if files:
                del files[name]
    if files:
        index.write_text(json.dumps({"weight_map": files}))


def add(directory: Path, name: str, tensor: Tensor, root: str | None = None) -> None:
    """One tensor more in layer 3, in a file of its own."""
    from safetensors.torch import save_file

    index = directory / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    file = f"more-{len(list(directory.iterdir()))}.safetensors"
    if root is None:
        found = next(n for n in files if ".1.self_attn" in n)
        root = found.partition(".1.self_attn")[0]
    files[f"{root}.3.{name}"] = file
    save_file({f"{root}.3.{name}": tensor}, directory / file)
    index.write_text(json.dumps({"weight_map": files}))


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    plain = json.loads(path.read_text())
    plain.get("text_config", plain).update(changes)
    path.write_text(json.dumps(plain))


E3 = "model.layers.3.mlp.experts"
GONE: Any = lambda name, tensor: None  # noqa: E731
CHANGES = [
    ("missing", "3.mlp.experts.5.up_proj.weight", GONE, f"missing: {E3}.5.up_proj.weight"),
    (
        "missing_scales",
        "3.mlp.experts.2.down_proj.weight_scale_inv",
        GONE,
        f"missing: {E3}.2.down_proj.weight_scale_inv",
    ),
    ("no_scales", "_scale_inv", GONE, "must have scales, .*down_proj.weight_scale is missing"),
    ("many_missing", "3.mlp.experts.5.", GONE, f"missing: {E3}.5.down_proj.weight, .* and 3 more"),
    (
        "shape",
        "3.mlp.experts.5.up_proj.weight",
        lambda name, t: t[:-1].contiguous() if name.endswith("weight") else t,
        r"5.up_proj.weight must be torch.float8_e4m3fn \[192, 160\], got .* \[191, 160\]",
    ),
    (
        "shapes",
        ".up_proj.weight",
        lambda name, t: t[:-1].contiguous() if "inv" not in name and "experts" in name else t,
        r"0.up_proj.weight must be .*; wrong too: .*1.up_proj.weight, .* and 4 more",
    ),
    (
        "scale_shape",
        "3.mlp.experts.5.up_proj.weight_scale_inv",
        lambda name, t: t[:1].contiguous(),
        r"5.up_proj.weight_scale_inv must be floats \[2, 2\], got torch.float32 \[1, 2\]",
    ),
    (
        "scale_dtype",
        "3.mlp.experts.5.up_proj.weight_scale_inv",
        lambda name, t: t.to(torch.int8),
        "must be floats .* got torch.int8",
    ),
    (
        "dtypes",
        "3.mlp.experts.5.up_proj.weight",
        lambda name, t: t if "inv" in name else t.bfloat16(),
        "5.up_proj.weight must be torch.float8_e4m3fn .*, got torch.bfloat16",
    ),
    (
        "dtype",
        "down_proj.weight",
        lambda name, t: t if "inv" in name else t.float(),
        "0.down_proj.weight must be bfloat16, float16, float8_e4m3fn or int8, got torch.float32",
    ),
    (
        "unknown_dtype",
        "down_proj.weight",
        lambda name, t: t if "inv" in name else t.float().to(torch.float8_e5m2),
        "must be bfloat16, float16, float8_e4m3fn or int8, got F8_E5M2",
    ),
    (
        "scales_of_floats",
        "_proj.weight",
        lambda name, t: t if "inv" in name else t.bfloat16(),
        "torch.bfloat16 weights must have no scales, .*_scale_inv is there",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("part", "change", "message"), [one[1:] for one in CHANGES], ids=[one[0] for one in CHANGES]
)
def test_tensors_that_are_wrong(part: str, change: Any, message: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, QWEN3, "fp8_block", **WIDE)
    edit(tmp_path, part, change)
    with pytest.raises(ValueError, match=message) as raised:
        read(tmp_path)
    assert f"{tmp_path}, layer 3: " in str(raised.value)
    assert "quantization_config" not in str(raised.value)  # which asks for what kernels have


EXTRA = [
    ("expert", "mlp.experts.8.up_proj.weight"),
    ("projection", "mlp.experts.0.side_proj.weight"),
    ("static_scale", "mlp.experts.0.up_proj.input_scale"),
    ("zero_point", "mlp.experts.0.up_proj.weight_zero_point"),
]


@pytest.mark.parametrize("name", [one[1] for one in EXTRA], ids=[one[0] for one in EXTRA])
def test_tensors_that_are_not_understood(name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, QWEN3, "fp8")
    read(tmp_path)
    add(tmp_path, name, torch.ones(1))
    with pytest.raises(ValueError, match=f"not understood: model.layers.3.{name}$"):
        read(tmp_path)


def test_four_bits_without_scales_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, GPT_OSS)
    for name in ("gate_up_proj", "down_proj"):
        edit(tmp_path, f"3.mlp.experts.{name}", lambda n, t: t if "bias" in n else None)
        add(tmp_path, f"mlp.experts.{name}_blocks", torch.zeros(2, dtype=torch.uint8))
    change_config(tmp_path, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(ValueError) as raised:
        read(tmp_path)
    for words in ("missing: ", "mlp.experts.gate_up_proj_scales", "down_proj_scales"):
        assert words in str(raised.value)


def test_stacks_of_another_shape(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, STACKED)
    change_config(tmp_path, moe_intermediate_size=40)
    with pytest.raises(ValueError, match=r"must be .* \[8, 64, 40\] or \[8, 40, 64\], got .*48\]"):
        read(tmp_path)


def test_bias_of_another_shape(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, GPT_OSS)
    edit(tmp_path, "3.mlp.experts.down_proj_bias", lambda _, tensor: tensor[:, 1:].contiguous())
    with pytest.raises(ValueError, match=r"_bias must be bfloat16, .* \[8, 64\], got .* \[8, 63\]"):
        read(tmp_path)


def test_router_that_is_wrong(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, DEEPSEEK)
    edit(tmp_path, "3.mlp.gate.weight", lambda _, tensor: tensor[:3].contiguous())
    edit(tmp_path, "1.mlp.gate.e_score", lambda _, tensor: tensor[:3].contiguous())
    with Checkpoint(tmp_path) as checkpoint:
        with pytest.raises(ValueError, match=r"mlp.gate.weight must be \[8, hidden\], got \[3, 64"):
            checkpoint.read_router(3)
        with pytest.raises(ValueError, match=r"correction_bias must be \[8\], got \[3\]"):
            checkpoint.read_router(1)
    edit(tmp_path, "3.mlp.gate.weight", GONE)
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(ValueError, match="no tensor .*gate.w"):
        checkpoint.read_router(3)


ARGUMENTS = [
    ({"layer": 0}, "layer must be one of those with experts, 1 to 3, got 0"),
    ({"share": Share(tp=5)}, "tp must divide 192 of the intermediate size .* got tp 5"),
    ({"share": Share(tp=2, tp_rank=2)}, r"tp_rank be in \[0, tp\), got tp 2 and tp_rank 2"),
    ({"share": Share(ep=3)}, "ep must divide 8 experts"),
    ({"share": Share(ep=2, ep_rank=-1)}, "got ep 2 and ep_rank -1"),
    (
        {"share": Share(tp=8)},
        "a multiple of 32 of the intermediate size, got tp 8, which leaves 24",
    ),
    ({"quant": "fp4"}, "quant must be one of fp8, int8, bf16, fp8_block, .*, got 'fp4'"),
]


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS)
def test_arguments_that_are_wrong(arguments: Any, message: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, QWEN3, "fp8_block", **WIDE)
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(ValueError, match=message):
        checkpoint.read(**{"layer": LAYER, **arguments})


def test_family_whose_layout_is_not_known(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, QWEN3)
    config = (checkpoints.CONFIGS / "dbrx.json").read_text()
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match="layout of checkpoints of dbrx is not known"):
        Checkpoint(tmp_path)


def test_directory_without_experts(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, QWEN3)
    edit(tmp_path, "mlp.experts", GONE)
    with pytest.raises(ValueError, match="named like model.layers.0.mlp.experts.0.down_proj.w"):
        Checkpoint(tmp_path)


# Files


def test_directory_without_weights(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, QWEN3)
    for path in tmp_path.glob("model*"):
        path.unlink()
    with pytest.raises(ValueError, match="must hold model.safetensors or model.safetensors.index"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "weight_map names each tensor's file"),
        ("[]", "weight_map names each tensor's file"),
        ('{"weight_map": ["a"]}', "weight_map names each tensor's file"),
        ('{"weight_map": {"a": 1}}', "weight_map names each tensor's file"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "files of its own directory, got ../a.safe"),
    ],
)
def test_index_that_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, QWEN3)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Checkpoint(tmp_path)


def test_shards_that_are_wrong(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, QWEN3)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{shard} must be a safetensors file: "):
        read(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard} is missing, model.safetensors.index.json names"):
        read(tmp_path)
    shard.write_bytes((tmp_path / "model-00001-of-00003.safetensors").read_bytes())
    with pytest.raises(ValueError, match=f"{shard} must have the tensor model.layers.3.mlp"):
        read(tmp_path)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, QWEN3)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'cutlass-moe\[checkpoints\]'"):
        read(tmp_path)


# What is read


class Counted:
    """safe_open, with the files that it opens and the bytes that are taken of each tensor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: list[str] = []
        self.bytes: dict[str, int] = {}
        self._open = safetensors.safe_open
        monkeypatch.setattr(safetensors, "safe_open", self.open)

    def open(self, path: str, *arguments: Any, **more: Any) -> Any:
        self.opened.append(Path(path).name)
        file, counted = self._open(path, *arguments, **more), self

        class Slice:
            def __init__(self, name: str) -> None:
                self.name, self.slice = name, file.get_slice(name)
                self.get_shape, self.get_dtype = self.slice.get_shape, self.slice.get_dtype

            def __getitem__(self, index: Any) -> Tensor:
                part = self.slice[index]
                counted.bytes[self.name] = counted.bytes.get(self.name, 0) + part.nbytes
                return part

        class File:
            get_slice = Slice
            keys = file.keys

        return File

    def total(self) -> int:
        return sum(self.bytes.values())


@pytest.mark.parametrize(
    "form", [QWEN3, replace(STACKED, style="transposed"), GPT_OSS], ids=lambda form: form.style
)
@pytest.mark.parametrize("share", [Share(), Share(tp=4, tp_rank=3), Share(ep=8, ep_rank=2)])
def test_only_the_share_is_read(
    form: Form, share: Share, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, form)
    counted = Counted(monkeypatch)
    weights = read(tmp_path, share=share)
    experts = [tensor for tensor in weights.experts if tensor is not None]
    assert counted.total() == sum(tensor.nbytes for tensor in experts)
    assert len(set(counted.opened)) == len(counted.opened)  # each once
    assert all(".3." in name for name in counted.bytes)


def test_each_expert_is_done_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And files are opened when a layer needs them: the rest of the shards may be elsewhere."""
    layers = write_checkpoint(tmp_path, QWEN3, "fp8_block", shards=0)
    from safetensors.torch import save_file

    (tmp_path / "model.safetensors").unlink()
    files = {}
    for layer, written in layers.items():
        tensors = {f"model.layers.{layer}.{n}": t for n, t in written.tensors.items()}
        save_file(tensors, tmp_path / f"{layer}.safetensors")
        files |= dict.fromkeys(tensors, f"{layer}.safetensors")
    (tmp_path / "1.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    counted = Counted(monkeypatch)
    seen: list[int] = []

    def track(experts: Any) -> Any:
        for expert in experts:
            started = {name.split(".")[5] for name in counted.bytes}
            assert started == {str(e) for e in seen}
            seen.append(expert)
            yield expert

    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.layers == LAYERS
        assert counted.opened == []
        checkpoint.read(3, track=track, share=Share(ep=2, ep_rank=1))
    assert seen == [4, 5, 6, 7]
    assert counted.opened == ["3.safetensors"]
