"""Other people's kernels, as far as a CPU can tell: where they are found, what they are asked."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from perf.cases import of_shape
from perf.operands import WORST_ERROR, LayerInputs, ProductInputs, weights_of
from perf.peers import deepgemm, humming, prepared, unpacked, vllm
from perf.peers.prepared import Absent, fastest, require
from perf.systems import named, systems_of
from tests.perf.samples import UP

KERNELS = """
import json
import os
import vllm.envs as envs
from vllm import _custom_ops as ops
from vllm.platforms import current_platform
from vllm.server import Engine, decorate
from vllm.triton_utils import triton

@decorate
def get_moe_configs(E, N, dtype, block_n=None, block_k=None):
    name = f"E={E},N={N},device_name=NVIDIA_H200"
    name += f",dtype={dtype}" if dtype else ""
    name += f",block_shape=[{block_n},{block_k}]" if block_n else ""
    path = os.path.join(os.path.dirname(__file__), "configs", name + ".json")
    return json.load(open(path)) if os.path.exists(path) else None

def try_get_optimal_moe_config(w1, w2, top_k, dtype, M, block_shape=None):
    from vllm.model_executor.layers.fused_moe import get_config
    assert envs.VLLM_BATCH_INVARIANT is False and envs.VLLM_TUNED_CONFIG_FOLDER is None
    assert ops.here and current_platform.is_cuda() and not current_platform.is_rocm()
    return get_config() or config(16)

def config(block):
    return dict(BLOCK_SIZE_M=block, BLOCK_SIZE_N=64, BLOCK_SIZE_K=128, GROUP_SIZE_M=1,
                num_warps=4, num_stages=3)

class Derived(Engine):
    pass
"""
MOVES = """
import torch

def compute_aligned_M(tokens, top_k, experts, alignment, meta):
    return -(-(tokens * top_k + experts * (alignment - 1)) // alignment) * alignment

def deepgemm_moe_permute(x, scale, ids, experts, expert_map, meta, use_psum_layout):
    assert use_psum_layout and expert_map is meta is None
    rows = compute_aligned_M(*ids.shape, experts, 128, None)
    counts = torch.bincount(ids.flatten(), minlength=experts)
    padded = (counts + 127) // 128 * 128
    starts = padded.cumsum(0) - padded
    order = torch.empty(ids.numel(), dtype=torch.int32)
    for expert in range(experts):
        pairs = (ids.flatten() == expert).nonzero().flatten()
        order[pairs] = starts[expert].int() + torch.arange(len(pairs), dtype=torch.int32)
    token = torch.arange(len(x)).repeat_interleave(ids.shape[1])
    out, out_scale = x.new_zeros(rows, x.shape[1]), scale.new_zeros(rows, scale.shape[1])
    out.view(torch.uint8)[order.long()] = x.view(torch.uint8)[token]
    out_scale[order.long()] = scale[token]
    return out, out_scale, (starts + counts).int(), order.view(ids.shape), 128

def deepgemm_unpermute_and_reduce(y, ids, weights, order, expert_map, out):
    assert expert_map is None
    out.copy_((y[order.long()].float() * weights[..., None]).sum(1))
"""
QUANTISERS = """
import torch
import cutlass_moe as cm

def per_token_group_quant_fp8(x, size):
    assert size == 128
    return cm.quantize_per_token_group(x)

def silu_mul_per_token_group_quant_fp8_colmajor(h, expert_ends, expert_alignment):
    assert expert_alignment == 128 and len(expert_ends) == 5
    gate, up = h.nan_to_num().float().chunk(2, 1)
    act = torch.nn.functional.silu(gate) * up
    return cm.quantize_per_token_group(act, column_major=True)
"""
DEEP_GEMM = "from cutlass_moe.compat.deep_gemm import m_grouped_fp8_gemm_nt_contiguous"
PACKAGES = ("deep_gemm", "triton", "vllm")
TRITON = {
    "__init__.py": "",
    "language.py": "bfloat16 = None",
    "runtime/__init__.py": "",
    "runtime/errors.py": "class OutOfResources(Exception): pass",
}


@pytest.fixture
def peers(tmp_path, monkeypatch) -> Path:
    """A folder with a small vLLM and a small triton; what was imported is forgotten afterwards."""
    moe = tmp_path / "src" / vllm.MOE.replace(".", "/")
    (moe / "configs").mkdir(parents=True)
    (moe / "fused_moe.py").write_text(KERNELS)
    (tmp_path / "src/vllm/_custom_ops.py").write_text("here = True")
    for name, text in TRITON.items():
        path = tmp_path / "site/triton" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    before = set(sys.modules), list(sys.path), list(sys.meta_path)
    monkeypatch.setenv(unpacked.FOLDER, str(tmp_path))
    for variable in ("DG_JIT_CACHE_DIR", "TRITON_CACHE_DIR", "HUMMING_CACHE_DIR", "CUDA_HOME"):
        monkeypatch.setenv(variable, "x")
    saved = {n: m for n, m in sys.modules.items() if n.partition(".")[0] in PACKAGES}
    for name in saved:
        del sys.modules[name]
    caches = (unpacked.make_importable, vllm.vllm, vllm.shipped_configs)
    for cached in caches:
        cached.cache_clear()
    yield tmp_path
    for name in set(sys.modules) - before[0]:
        if name.partition(".")[0] in PACKAGES:
            del sys.modules[name]
    sys.modules.update(saved)
    sys.path[:], sys.meta_path[:] = before[1:]
    for cached in caches:
        cached.cache_clear()


def ship(peers: Path, name: str, table: dict[str, dict]) -> None:
    folder = peers / "src" / vllm.MOE.replace(".", "/") / "configs"
    (folder / f"{name}.json").write_text(json.dumps(table))


def config(block: int) -> dict[str, int]:
    sizes = {"BLOCK_SIZE_M": block, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128}
    return {**sizes, "GROUP_SIZE_M": 1, "num_warps": 4, "num_stages": 3}


def test_files_are_real_and_the_rest_of_vllm_is_stubbed(peers) -> None:
    module = vllm.vllm().fused_moe
    assert module.__file__.startswith(str(peers))
    assert module.get_moe_configs(8, 2, None) is None  # what a stub decorates is as it was
    assert isinstance(module.Derived, type)
    with pytest.raises(AttributeError):
        _ = sys.modules["vllm.server"].__wrapped__


def test_without_the_folder_and_without_vllm_it_is_absent(monkeypatch) -> None:
    monkeypatch.delenv(unpacked.FOLDER, raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    vllm.vllm.cache_clear()
    with pytest.raises(Absent, match="not importable"):
        vllm.vllm()


def test_vllms_own_choice_comes_before_eight_shipped_ones(peers) -> None:
    case = of_shape("mixtral", "up", "fp8", 16)
    assert vllm.own_config(case) == (config(16), "default")
    for block in range(10):
        table = {"1": config(100 + block), "16": config(32 + block), "4096": config(256)}
        table["triton_version"] = {}
        ship(peers, f"E=9,N={block},device_name=NVIDIA_H200,dtype=fp8_w8a8", table)
    ship(peers, "E=9,N=1,device_name=NVIDIA_A100,dtype=fp8_w8a8", {"16": config(7)})
    ship(peers, "E=9,N=1,device_name=NVIDIA_H200", {"16": config(8)})
    for _ in range(2):  # two H100 tables weigh as much as one of an H200
        ship(
            peers, f"E=9,N={_},device_name=NVIDIA_H100_80GB_HBM3,dtype=fp8_w8a8", {"16": config(41)}
        )
    found = vllm.candidates(case)
    assert found[0] == {**config(16), "SPLIT_K": 1}
    assert found[1] == {**config(41), "SPLIT_K": 1}
    assert len(found) == 9 and len({vllm.words(one) for one in found}) == 9
    assert all(32 <= one["BLOCK_SIZE_M"] < 42 for one in found[1:])


def test_a_layers_config_is_forced_and_let_go(peers) -> None:
    calls = []
    module = vllm.vllm().fused_moe

    def impl(*tensors, **options):
        shapes = (8, 4, 2), (8, 2, 2)
        calls.append(module.try_get_optimal_moe_config(*shapes, 2, "fp8_w8a8", 16))
        return torch.zeros(1)

    module.fused_experts_impl = impl
    case = replace(UP, part="layer")
    inputs = LayerInputs(case, weights_of(case, "cpu"))
    vllm.layer_call(inputs, [], config(77))()
    assert calls == [config(77)]
    assert module.try_get_optimal_moe_config((8, 4, 2), (8, 2, 2), 2, None, 16) == config(16)


def test_the_fastest_variant_that_runs_is_taken(peers) -> None:
    resources = require("triton.runtime.errors").OutOfResources
    times = {"a": 3.0, "b": 1.0, "c": 2.0}

    def quick(call) -> float:
        name = call()
        if name == "b":
            raise resources
        return times[name]

    variants = {name: (lambda name=name: name) for name in times}
    call, name = fastest(variants, quick)
    assert (call(), name) == ("c", "c")
    with pytest.raises(Absent, match="no variant runs"):
        fastest({"b": variants["b"]}, quick)


def test_versions_are_read_from_the_folder(peers) -> None:
    assert unpacked.versions() == {}
    (peers / unpacked.VERSIONS).write_text("vllm 0.33.0\n\ndeep_gemm 2.8.1\n")
    assert unpacked.versions() == {"vllm": "0.33.0", "deep_gemm": "2.8.1"}


def test_the_layer_of_deepgemm_is_put_together(peers) -> None:
    """From parts in plain torch, with the arguments that vLLM's and DeepGEMM's have."""
    case = replace(UP, part="layer", dtype="fp8_block", hidden=256, inter=128)
    inputs = LayerInputs(case, weights_of(case, "cpu"))
    with pytest.raises(Absent, match="deep_gemm"):
        deepgemm.layer(inputs, lambda call: 0.0)
    (peers / "site/deep_gemm.py").write_text(DEEP_GEMM)
    with pytest.raises(Absent, match="unpacked vLLM lacks the file of .*deep_gemm_utils"):
        deepgemm.layer(inputs, lambda call: 0.0)
    sources = peers / "src"
    parts = {f"{vllm.MOE}.deep_gemm_utils": MOVES, f"{vllm.UTILS}.fp8_utils": QUANTISERS}
    for name, text in parts.items():
        path = sources / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        sys.modules.pop(name, None)  # the stub
    layer = deepgemm.layer(inputs, lambda call: 0.0)
    layer.launch()
    got, want = layer.rows(inputs.picked).double(), inputs.expected()
    assert (got - want).norm() <= WORST_ERROR["layer"]["fp8_block"] * want.norm()
    layer.clear()
    assert layer.rows(inputs.picked).isnan().all()
    with pytest.raises(Absent, match="hidden size must be a multiple of 128, got 64"):
        narrow = replace(case, hidden=64)
        deepgemm.layer(LayerInputs(narrow, weights_of(narrow, "cpu")), lambda call: 0.0)


def test_padded_rows_of_deepgemm_are_apart(monkeypatch) -> None:
    inputs = ProductInputs(UP, weights_of(UP, "cpu"))
    monkeypatch.setattr(deepgemm, "DEVICE", "cpu")
    padded = (inputs.counts + 127) // 128 * 128
    targets = deepgemm._targets(inputs, padded.cumsum(0) - padded)
    x, x_scale, w_scale = deepgemm._operands(inputs, targets, int(padded.sum()))
    rows, scale = inputs.gathered()
    assert torch.equal(x.view(torch.uint8)[targets], rows.view(torch.uint8))
    assert scale is not None and x_scale is not None and w_scale is not None
    assert torch.equal(x_scale[targets], scale[:, None])
    assert int((x_scale != 0).sum()) == UP.rows
    experts = targets // 128
    assert torch.equal(experts, inputs.expert_of)  # each has at most 128 rows
    assert w_scale.shape == (5, 1, 1)


def test_a_module_that_asserts_is_absent(tmp_path, monkeypatch) -> None:
    (tmp_path / "asserting_peer.py").write_text("assert False, 'needs nvcc'")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Absent, match="needs nvcc"):
        prepared.require("asserting_peer")


def test_4_bit_weights_have_systems_of_their_own() -> None:
    packed, others = of_shape("mixtral", "layer", "mxfp4", 1), of_shape("mixtral", "up", "fp8", 1)
    assert named([packed]) == ["cutlass_moe", "humming", "triton_kernels"]
    assert "triton_kernels" not in systems_of(others) and "deepgemm" in named([packed, others])


@pytest.mark.parametrize("dtype", ["mxfp4", "int4_g128"])
def test_humming_gets_a_checkpoints_bits(dtype: str) -> None:
    weight = weights_of(replace(UP, dtype=dtype), "cpu")["up"]
    tensors = humming.tensors_of(weight, dtype)
    assert tensors["weight"].shape == (5, 128, 128 // 8)
    assert torch.equal(tensors["weight"], weight.w.flatten(2).view(torch.int32))
    assert torch.equal(tensors["weight_scale"].view(weight.scale.dtype), weight.scale)


@pytest.mark.parametrize("part", ["up", "layer"])
def test_triton_kernels_take_mxfp4_alone(part: str) -> None:
    case = replace(UP, dtype="int4_g128", part=part, inter=128)
    kind = LayerInputs if case.is_layer else ProductInputs
    with pytest.raises(Absent, match="mxfp4 only"):
        systems_of(case)["triton_kernels"](kind(case, weights_of(case, "cpu")), None)
