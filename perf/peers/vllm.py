"""vLLM's kernels: its Triton product as users get it and at its best config, and its CUTLASS one.

vLLM chooses a config by a table that it ships for some GPUs and shapes, else by a rule. `vllm` is
that choice. `vllm_best` is the fastest, in each case, of it and of the eight configs that the
tables shipped for H200 and H100 give most often for so many tokens: what users get who tune.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections import Counter
from functools import cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch

from perf.cases import BLOCK, TOKEN_SETS, Case
from perf.operands import LARGEST, LayerInputs, ProductInputs
from perf.peers.prepared import Absent, Call, Prepared, Quick, fastest, only, require
from perf.peers.unpacked import Stubs, load_compiled_ops, nothing, vllm_sources

MOE = "vllm.model_executor.layers.fused_moe"
UTILS = "vllm.model_executor.layers.quantization.utils"
FILES = frozenset(  # what is loaded of an unpacked vLLM
    f"{MOE}.{name}"
    for name in (
        "fused_moe", "activation", "config", "utils", "moe_align_block_size", "moe_fused_mul_sum",
        "moe_permute_unpermute", "deep_gemm_utils", "experts.cutlass_moe",
    )
) | {
    "vllm._custom_ops", "vllm.scalar_type", "vllm.utils.math_utils", f"{UTILS}.int8_utils",
    f"{UTILS}.fp8_utils",
}  # fmt: skip
NUMBER = 8  # of shipped configs that vllm_best tries besides vLLM's own choice
BATCHES = sorted({tokens for some in TOKEN_SETS for tokens in some})
Config = dict[str, int]

_forced: list[Config] = []  # what vLLM's own lookup is to answer, if anything


@cache
def vllm() -> SimpleNamespace:
    """The modules that are called. Raises Absent without them."""
    require("triton")
    sources = vllm_sources()
    if sources is not None:
        try:
            load_compiled_ops()
        except OSError as error:
            raise Absent(str(error)) from error
        sys.meta_path.insert(0, Stubs(sources, FILES, _known()))
        root = importlib.import_module("vllm")  # a stub: it must be told what it has
        root.envs = sys.modules["vllm.envs"] = _Environment("vllm.envs")  # type: ignore[attr-defined]
        root._custom_ops = require("vllm._custom_ops")  # type: ignore[attr-defined]
    ops = require("vllm._custom_ops")
    names = ("fused_moe", "activation", "moe_align_block_size", "moe_permute_unpermute")
    modules = {name: require(f"{MOE}.{name}") for name in names}
    modules["cutlass"] = require(f"{MOE}.experts.cutlass_moe")
    modules["sum"] = require(f"{MOE}.moe_fused_mul_sum")
    if sources is None:
        sys.modules[MOE].get_config = _force  # type: ignore[attr-defined]
    return SimpleNamespace(ops=ops, **modules)


def module_of(name: str) -> Any:
    """Another module of vLLM. Raises Absent if an unpacked vLLM lacks its file."""
    vllm()
    module = require(name)
    if not Path(str(module.__file__)).exists():
        raise Absent(f"the unpacked vLLM lacks the file of {name}")
    return module


def _force() -> Config | None:
    return _forced[0] if _forced else None


class _Capability(NamedTuple):
    major: int
    minor: int

    def to_int(self) -> int:
        return 10 * self.major + self.minor


class _Platform:
    """vLLM's description of a Hopper GPU; it is none of the others."""

    is_cuda = is_cuda_alike = supports_fp8 = staticmethod(lambda: True)
    fp8_dtype = staticmethod(lambda: torch.float8_e4m3fn)
    is_device_capability = staticmethod(lambda wanted, *_: wanted in (90, (9, 0)))
    is_device_capability_family = staticmethod(lambda wanted, *_: wanted == 90)
    has_device_capability = staticmethod(lambda wanted, *_: wanted in (90, (9, 0)) or wanted == 80)
    get_device_capability = staticmethod(lambda *_: _Capability(9, 0))

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: False


class _Environment(ModuleType):
    """vLLM's variables, all unset."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None if name.endswith("FOLDER") else False


class _Silent:
    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def _known() -> dict[str, dict[str, Any]]:
    """What the kernels' files ask of the rest of vLLM, by module."""
    triton, language = importlib.import_module("triton"), importlib.import_module("triton.language")
    name, sms = "NVIDIA_H200", 132
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name().replace(" ", "_")
        sms = torch.cuda.get_device_properties(0).multi_processor_count
    experts = nothing("FusedMoEExpertsModular")
    halved = staticmethod(lambda n, activation: n // 2 if activation.is_gated else n)
    experts.adjust_N_for_activation = halved  # type: ignore[attr-defined]
    return {
        "vllm.platforms": {"current_platform": _Platform()},
        "vllm.triton_utils": {"tl": language, "triton": triton},
        "vllm.logger": {"init_logger": lambda name: _Silent()},
        "vllm.utils.platform_utils": {
            "get_device_name_as_file_name": lambda: name,
            "num_compute_units": lambda *_: sms,
        },
        "vllm.utils.torch_utils": {"direct_register_custom_op": lambda **_: None},
        "vllm.utils.deep_gemm": {
            "is_deep_gemm_e8m0_used": lambda: False,
            "get_mk_alignment_for_contiguous_layout": lambda: [BLOCK, BLOCK],
        },
        f"{UTILS}.quant_utils": {"get_fp8_min_max": lambda: (-LARGEST["fp8"], LARGEST["fp8"])},
        "vllm.v1.worker.workspace": {"is_workspace_manager_initialized": lambda: False},
        MOE: {"get_config": _force},
        f"{MOE}.modular_kernel": {"FusedMoEExpertsModular": experts},
        f"{MOE}.topk_weight_and_reduce": {},
    }


def block_shape(case: Case) -> list[int] | None:
    return [BLOCK, BLOCK] if case.dtype == "fp8_block" else None


def own_config(case: Case) -> tuple[Config, str]:
    """vLLM's choice for a layer of these sizes, and where it has it from."""
    module, block = vllm().fused_moe, block_shape(case)
    dtype = "fp8_w8a8" if case.dtype.startswith("fp8") else None
    e, inter, hidden = case.num_experts, case.inter, case.hidden
    shipped = module.get_moe_configs(e, inter, dtype, *(block or ())) is not None
    shapes = (e, 2 * inter, hidden), (e, hidden, inter)
    config = module.try_get_optimal_moe_config(*shapes, case.top_k, dtype, case.tokens, block)
    return config, "shipped" if shipped else "default"


def words(config: Config) -> str:
    names = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps")
    return "x".join(str(config.get(name, "")) for name in (*names, "num_stages"))


@cache
def shipped_configs(dtype: str) -> dict[int, Counter[tuple[tuple[str, int], ...]]]:
    """By number of tokens, how many shipped tables have a config for it; an H200's count twice."""
    marks = {"fp8": "dtype=fp8_w8a8.json", "fp8_block": "block_shape=[128,128].json"}
    mark, found = marks.get(dtype), {tokens: Counter() for tokens in BATCHES}
    tables = Path(vllm().fused_moe.__file__).with_name("configs").glob("*device_name=NVIDIA_H[12]*")
    for path in sorted(tables):
        if not path.name.endswith(mark) if mark else re.search("int|fp8|float8", path.name):
            continue
        table = {int(k): v for k, v in json.loads(path.read_text()).items() if k.isdigit()}
        for tokens in BATCHES:
            config = table[min(table, key=lambda batch: abs(batch - tokens))]
            key = tuple(sorted((k, v) for k, v in config.items() if k != "SPLIT_K"))
            found[tokens][key] += 2 if "H200" in path.name else 1
    return found


def candidates(case: Case) -> list[Config]:
    """vLLM's own choice first."""
    near = min(BATCHES, key=lambda tokens: abs(tokens - case.tokens))
    listed = [dict(key) for key, _ in shipped_configs(case.dtype)[near].most_common(NUMBER)]
    own = {k: v for k, v in own_config(case)[0].items() if k != "SPLIT_K"}
    return [{**config, "SPLIT_K": 1} for config in (own, *(c for c in listed if c != own))]


def product_call(inputs: ProductInputs, out: torch.Tensor, config: Config) -> Call:
    """Its kernel gathers and scales; sorting the ids beforehand is not charged."""
    case, weight, v = inputs.case, inputs.weight, vllm()
    block = block_shape(case)
    ids, experts, padded = v.fused_moe._prepare_expert_assignment(
        inputs.ids, config, case.tokens, case.top_k, case.num_experts, None,
        block_shape=block, ignore_invalid_experts=True,
    )  # fmt: skip
    x_scale = inputs.x_scale
    if x_scale is not None and x_scale.dim() == 1:
        x_scale = x_scale[:, None]
    return partial(
        v.fused_moe.invoke_fused_moe_triton_kernel,
        inputs.x, weight.w, out.view(-1, case.slots, inputs.n), x_scale, weight.scale, None,
        ids, experts, padded, False, case.slots, config, compute_type=v.fused_moe.tl.bfloat16,
        use_fp8_w8a8=case.dtype.startswith("fp8"), use_int8_w8a8=case.dtype == "int8",
        use_int8_w8a16=False, use_int4_w4a16=False,
        per_channel_quant=case.dtype in ("fp8", "int8"), block_shape=block,
    )  # fmt: skip


def product(inputs: ProductInputs, quick: Quick) -> Prepared:
    config, source = own_config(inputs.case)
    out = inputs.new_out(inputs.case.rows, inputs.n)  # in the order of pairs
    call = product_call(inputs, out, config)
    return Prepared(call, lambda rows: out[inputs.order[rows]], f"{source} {words(config)}")


def best_product(inputs: ProductInputs, quick: Quick) -> Prepared:
    out = inputs.new_out(inputs.case.rows, inputs.n)
    calls = {words(c): product_call(inputs, out, c) for c in candidates(inputs.case)}
    call, note = fastest(calls, quick)
    return Prepared(call, lambda rows: out[inputs.order[rows]], note)


def cutlass_product(inputs: ProductInputs, quick: Quick) -> Prepared:
    """What vLLM runs on Hopper for fp8 per token and channel; the gather of up is charged."""
    only(inputs, "fp8")
    case, weight, ops = inputs.case, inputs.weight, vllm().ops
    firsts = torch.nn.functional.pad(inputs.ends.long(), (1, 0))
    sizes = [firsts.new_empty((case.num_experts, 3), dtype=torch.int32) for _ in range(2)]
    ops.get_cutlass_moe_mm_problem_sizes_from_expert_offsets(
        firsts, *sizes, case.inter, case.hidden, case.rows <= 64
    )
    assert weight.scale is not None
    stride_k, stride_n = (firsts.new_full((case.num_experts,), s) for s in (inputs.k, inputs.n))
    scale, first = weight.scale[..., None], firsts[:-1].contiguous()
    out, ready = inputs.new_out(case.rows, inputs.n), inputs.gathered()

    def launch() -> None:
        x, x_scale = inputs.gathered() if case.part == "up" else ready
        assert x_scale is not None
        ops.cutlass_moe_mm(
            out, x, weight.w, x_scale[:, None], scale, first, sizes[case.part == "down"],
            stride_k, stride_k, stride_n, True, True,
        )  # fmt: skip

    return Prepared(launch, lambda rows: out[rows])


def layer_call(inputs: LayerInputs, result: list[torch.Tensor], config: Config) -> Call:
    """Its whole layer; `config` is what its lookup answers."""
    case, impl = inputs.case, vllm().fused_moe.fused_experts_impl
    scales = {}
    for name, scale in (("w1_scale", inputs.up.scale), ("w2_scale", inputs.down.scale)):
        scales[name] = scale[..., None] if scale is not None and scale.dim() == 2 else scale
    options = {
        "use_fp8_w8a8": case.dtype.startswith("fp8"),
        "use_int8_w8a8": case.dtype == "int8",
        "per_channel_quant": case.dtype in ("fp8", "int8"),
        "block_shape": block_shape(case),
    }

    def launch() -> None:
        _forced[:] = [config]
        try:
            result[:] = [
                impl(
                    inputs.hidden, inputs.up.w, inputs.down.w, inputs.topk_weights, inputs.ids,
                    **options, **scales,
                )
            ]  # fmt: skip
        finally:
            _forced.clear()

    return launch


def layer(inputs: LayerInputs, quick: Quick) -> Prepared:
    config, source = own_config(inputs.case)
    result: list[torch.Tensor] = []
    call = layer_call(inputs, result, config)
    return _prepared(call, result, f"{source} {words(config)}")


def best_layer(inputs: LayerInputs, quick: Quick) -> Prepared:
    result: list[torch.Tensor] = []
    calls = {words(c): layer_call(inputs, result, c) for c in candidates(inputs.case)}
    call, note = fastest(calls, quick)
    return _prepared(call, result, note)


def _prepared(call: Call, result: list[torch.Tensor], note: str) -> Prepared:
    return Prepared(call, lambda t: result[0][t], note, lambda: result[0].fill_(torch.nan))


def cutlass_layer(inputs: LayerInputs, quick: Quick) -> Prepared:
    """Quantise, then its own permute, product, activation, product and weighted sum."""
    only(inputs, "fp8")
    v, case = vllm(), inputs.case
    e, pairs, inter, hidden = case.num_experts, case.rows, case.inter, case.hidden
    strides = {s: torch.full((e,), s, device="cuda") for s in (hidden, inter, 2 * inter)}
    one = inputs.new_out(pairs, max(2 * inter, hidden))
    two, out = inputs.new_out(pairs, max(inter, hidden)), torch.full_like(inputs.hidden, torch.nan)
    scratch = v.moe_permute_unpermute.MoEPermuteScratch(
        num_experts=e, num_local_experts=e, device=out.device
    )
    assert inputs.up.scale is not None and inputs.down.scale is not None
    scales = inputs.up.scale[..., None], inputs.down.scale[..., None]

    def launch() -> None:
        x, x_scale = v.ops.scaled_fp8_quant(inputs.hidden, None, use_per_token_if_dynamic=True)
        v.cutlass.run_cutlass_moe_fp8(
            out, x, inputs.up.w, inputs.down.w, inputs.ids, v.activation.MoEActivation.SILU, e,
            None, *scales, x_scale, None, strides[hidden], strides[inter], strides[2 * inter],
            strides[hidden], one, two, None, torch.bfloat16, True, True, False,
            inputs.topk_weights, scratch,
        )  # fmt: skip

    return Prepared(launch, lambda tokens: out[tokens], clear=lambda: out.fill_(torch.nan))
