"""`python -m perf.vllm_layer`: a layer of experts inside vLLM, with our experts and with its own.

Both run in vLLM's own kernel class, `FusedMoEKernel`, as a model calls it: preparation, experts and
the weighted sum, captured in a CUDA graph. Two systems are compared:

  cutlass_moe   the class that our plug-in puts first
  vllm          what vLLM chooses without it, with the configs that it ships for this GPU and shape

Weights, routing, checks and timing are those of `python -m perf run` (README.md). Models that run
on several ranks are measured as one of them: tokens choose among the experts of all ranks, and an
expert_map names those that are here. Needs vLLM; `--build DIR` compiles our images, which needs the
DSL and no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import cutlass_moe as cm
from cutlass_moe.choose.heuristics_sm90 import every_config
from cutlass_moe.images.cache import Cache
from cutlass_moe.images.compiler import Request, build_images
from cutlass_moe.integrations import serving
from cutlass_moe.integrations.experts import ActivationArguments
from cutlass_moe.integrations.serving import ServedExperts
from cutlass_moe.tune.timing import flush_buffer
from perf.cases import MODELS, UNPACKED, Case, of_shape
from perf.machine import versions
from perf.measure import SECONDS, Measurement
from perf.operands import LayerInputs, Weights, weights_of
from perf.peers.prepared import Call, Prepared, Quick
from perf.report import text_table
from perf.systems import OURS
from perf.timing import interleaved

THEIRS = "vllm"
SERVED = ("qwen3-30b", "glm-4.5-air", "dsv3-ep8")
TOKENS = (1, 16, 128, 1024, 8192)
WORKSPACE = 4 << 30  # bytes
HEADER = ("model", "dtype", "tokens", OURS, THEIRS, f"{OURS} / {THEIRS}", "vLLM's experts")


def quant_of(case: Case) -> str | None:
    return None if case.dtype == "bf16" else case.dtype


def served(case: Case) -> ServedExperts:
    """The layer as the integration sees it."""
    routed = MODELS[case.model].routed
    sizes = (case.num_experts, routed.top_k, case.hidden, case.inter)
    return ServedExperts(*sizes, torch.bfloat16, quant_of(case), ActivationArguments("swiglu"))


class RankInputs(LayerInputs):
    """A layer's tensors on one rank: ids of all ranks' experts, of which the first are here.

    The first token visits an expert of this rank.
    """

    def __init__(self, case: Case, weights: dict[str, Weights]) -> None:
        super().__init__(case, weights)
        routed = MODELS[case.model].routed
        self.global_experts, self.expert_map = routed.num_experts, None
        self.here = torch.ones_like(self.ids, dtype=torch.bool)
        if routed.num_experts == case.num_experts:
            return
        generator = torch.Generator().manual_seed(case.seed)
        chances = torch.ones(case.tokens, routed.num_experts)
        chances[0, 1 : case.num_experts] = 0  # of this rank's the first alone, and surely that
        chances[0, 0] = 1e6
        ids = torch.multinomial(chances, routed.top_k, generator=generator).int()
        self.ids = ids.to(self.device)
        self.here = self.ids < case.num_experts
        self.topk_weights = torch.randn(ids.shape, device=self.device).softmax(-1)
        local = torch.arange(routed.num_experts, dtype=torch.int32, device=self.device)
        self.expert_map = torch.where(local < case.num_experts, local, -1)
        self.picked = self.here.any(1).nonzero().flatten()[: len(self.picked)]

    def expected(self) -> torch.Tensor:
        ids, weights = self.ids, self.topk_weights
        self.ids, self.topk_weights = ids * self.here, weights * self.here
        found = super().expected()
        self.ids, self.topk_weights = ids, weights
        return found


class Engine:
    """vLLM's modules, and its kernels around classes of experts."""

    def __init__(self) -> None:
        sys.modules.setdefault("vllm.vllm_flash_attn", _Attention("vllm.vllm_flash_attn"))
        import vllm
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.model_executor.layers.fused_moe import activation, config, fused_moe
        from vllm.model_executor.layers.fused_moe.oracle import fp8, int8, unquantized
        from vllm.model_executor.layers.quantization.utils import quant_utils
        from vllm.v1.worker.workspace import current_workspace_manager, init_workspace_manager

        from cutlass_moe.integrations.vllm_experts import CutlassMoeExperts

        init_workspace_manager(torch.device("cuda:0"))
        # All captured graphs share it, so that it must not move: as large as any case needs.
        current_workspace_manager().get_simultaneous(((WORKSPACE,), torch.uint8))
        self.version = vllm.__version__
        self.context = set_current_vllm_config(VllmConfig())
        self.fp8, self.int8, self.unquantized = fp8, int8, unquantized
        self.config, self.fused_moe, self.keys = config, fused_moe, quant_utils
        self.silu, self.ours = activation.MoEActivation.SILU, CutlassMoeExperts

    def moe_config(self, case: Case, inputs: RankInputs) -> Any:
        """vLLM's description of the layer. Ranks share experts without all-to-all."""
        return self.config.FusedMoEConfig(
            num_experts=inputs.global_experts,
            experts_per_token=inputs.ids.shape[1],
            hidden_dim=case.hidden,
            intermediate_size=case.inter,
            num_local_experts=case.num_experts,
            num_logical_experts=inputs.global_experts,
            activation=self.silu,
            device="cuda",
            routing_method=self.config.RoutingMethodType.TopK,
            moe_parallel_config=self.config.FusedMoEParallelConfig.make_no_parallel(),
            in_dtype=torch.bfloat16,
        )

    def choose(self, case: Case, moe: Any) -> tuple[Any, type]:
        """The backend and the experts that vLLM takes by itself."""
        if case.dtype == "bf16":
            return self.unquantized.select_unquantized_moe_backend(moe)
        if case.dtype == "int8":
            return self.int8.select_int8_moe_backend(moe)
        keys, blocks = self.keys, case.dtype == "fp8_block"
        channel = (keys.kFp8StaticChannelSym, keys.kFp8DynamicTokenSym)
        scheme = (keys.kFp8Static128BlockSym, keys.kFp8Dynamic128Sym) if blocks else channel
        return self.fp8.select_fp8_moe_backend(moe, *scheme, allow_vllm_cutlass=not blocks)

    def quant_config(self, case: Case, inputs: RankInputs) -> Any:
        if case.dtype == "bf16":
            return self.config.FUSED_MOE_UNQUANTIZED_CONFIG
        scales = {"w1_scale": inputs.up.scale, "w2_scale": inputs.down.scale}
        if case.dtype == "fp8_block":
            return self.config.fp8_w8a8_moe_quant_config(**scales, block_shape=[128, 128])
        given = {name: scale[..., None] for name, scale in scales.items() if scale is not None}
        given["per_act_token_quant"] = True
        if case.dtype == "int8":
            return self.config.int8_w8a8_moe_quant_config(**given, a1_scale=None, a2_scale=None)
        return self.config.fp8_w8a8_moe_quant_config(**given, per_out_ch_quant=True)

    def kernel(self, case: Case, inputs: RankInputs, ours: bool) -> Any:
        moe, quant = self.moe_config(case, inputs), self.quant_config(case, inputs)
        backend, experts = (self.triton(case), self.ours) if ours else self.choose(case, moe)
        if case.dtype == "bf16":
            return self.unquantized.make_unquantized_moe_kernel(quant, moe, backend, experts)
        if case.dtype == "int8":
            return self.int8.make_int8_moe_kernel(backend, quant, moe, experts)
        return self.fp8.make_fp8_moe_kernel(quant, moe, experts, backend)

    def triton(self, case: Case) -> Any:
        """The backend in whose place our experts are chosen."""
        if case.dtype == "bf16":
            return self.unquantized.UnquantizedMoeBackend.TRITON
        if case.dtype == "int8":
            return self.int8.Int8MoeBackend.TRITON
        return self.fp8.Fp8MoeBackend.TRITON

    def note(self, case: Case, kernel: Any, ours: bool) -> str:
        """The class of experts, and whether vLLM ships a Triton config for the layer."""
        name = type(kernel.fused_experts).__name__
        if ours:
            if not kernel.fused_experts.is_ours:
                raise RuntimeError("our experts must take the layer, vLLM's own did")
            return name
        dtype = "fp8_w8a8" if case.dtype.startswith("fp8") else None
        dtype = "int8_w8a8" if case.dtype == "int8" else dtype
        block = (128, 128) if case.dtype == "fp8_block" else ()
        found = self.fused_moe.get_moe_configs(case.num_experts, case.inter, dtype, *block)
        return f"{name}, {'shipped' if found else 'default'} config"

    def prepare(self, inputs: RankInputs, ours: bool, quick: Quick) -> Prepared:
        case = inputs.case
        kernel = self.kernel(case, inputs, ours)
        outs: list[torch.Tensor] = []

        def launch() -> None:
            outs[:] = [
                kernel.apply(
                    inputs.hidden,
                    inputs.up.w,
                    inputs.down.w,
                    topk_ids=inputs.ids,
                    topk_weights=inputs.topk_weights,
                    activation=self.silu,
                    global_num_experts=inputs.global_experts,
                    expert_map=inputs.expert_map,
                    apply_router_weight_on_input=False,
                )
            ]

        note = self.note(case, kernel, ours)
        return Prepared(
            launch, lambda tokens: outs[0][tokens], note, lambda: outs[0].fill_(torch.nan)
        )


class _Attention(ModuleType):
    """vLLM's attention kernels, which a layer of experts does not need."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Call:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_: None


class EngineMeasurement(Measurement):
    """A case of vLLM's kernel class."""

    def __init__(self, case: Case, weights: dict[str, Weights], flush: torch.Tensor) -> None:
        super().__init__(case, weights, flush)
        self.inputs = RankInputs(case, weights)
        self.expected = self.inputs.expected()


def cases(models: Sequence[str], dtypes: Sequence[str], tokens: Sequence[int]) -> list[Case]:
    return [of_shape(m, "layer", d, t) for d in dtypes for m in models for t in tokens]


def measure(engine: Engine, asked: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """A record of each case."""
    flush, unit, weights = flush_buffer(), None, dict[str, Weights]()
    for case in asked:
        if case.unit != unit:
            weights.clear()  # freed before the next ones are made
            unit, weights = case.unit, weights_of(case)
        measurement = EngineMeasurement(case, weights, flush)
        for name in (OURS, THEIRS):
            make = partial(engine.prepare, measurement.inputs, name == OURS, measurement.quick)
            measurement.admit(name, make)
        timings = interleaved(measurement.calls, SECONDS, flush)
        yield {
            "case": asdict(case),
            "systems": {n: {**asdict(timings[n]), **measurement.checked[n]} for n in timings},
            "absent": measurement.absent,
        }
        del measurement
        torch.cuda.empty_cache()


def lines(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Under HEADER; then geometric means over models, of each number of tokens and dtype."""
    found, ratios = [], dict[tuple[str, int], list[float]]()
    for record in records:
        case, systems = record["case"], record["systems"]
        cells = [f"{systems[n]['us']:.1f}" if n in systems else "-" for n in (OURS, THEIRS)]
        ratio = "-"
        if len(systems) == 2:
            value = systems[OURS]["us"] / systems[THEIRS]["us"]
            ratios.setdefault((case["dtype"], case["tokens"]), []).append(value)
            ratio = f"{value:.2f}"
        note = systems.get(THEIRS, {}).get("note", "") or str(record["absent"])
        found.append([case["model"], case["dtype"], str(case["tokens"]), *cells, ratio, note])
    for (dtype, tokens), values in ratios.items():
        mean = math.exp(sum(map(math.log, values)) / len(values))
        found.append(["mean", dtype, str(tokens), "", "", f"{mean:.2f}", f"of {len(values)}"])
    return found


def build(directory: str, asked: Sequence[Case]) -> int:
    """Compiles what the integration loads for the cases; the number that failed."""
    layers = {served(case) for case in asked}
    problems = {p for one in layers for p in cm.fused_moe_problems(**serving.arguments(one, 1))}
    requests = [Request(p, config) for p in problems for config in every_config(p)]
    results = list(build_images(Cache([directory]), requests, None))
    failed = [result for result in results if result.error is not None]
    for result in failed:
        print(f"{result.request}\n{result.error}", file=sys.stderr)
    print(f"{len(results) - len(failed)} images in {directory}")
    return len(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=",".join(SERVED), help="names, by comma")
    parser.add_argument("--dtype", default=",".join(UNPACKED))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--output", type=Path, help="where to write the records as JSON")
    parser.add_argument("--build", metavar="DIR", help="compile our images instead")
    given = parser.parse_args()
    tokens = [int(number) for number in given.tokens.split(",")]
    asked = cases(given.model.split(","), given.dtype.split(","), tokens)
    if given.build:
        return build(given.build, asked)
    engine, records = Engine(), []
    with engine.context:
        for record in measure(engine, asked):
            records.append(record)
            print(" ".join(lines([record])[0]), flush=True)
            if given.output:
                about = {"gpu": torch.cuda.get_device_name(), **versions(), "vllm": engine.version}
                given.output.write_text(json.dumps({**about, "records": records}, indent=1))
    print(text_table(HEADER, lines(records)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
