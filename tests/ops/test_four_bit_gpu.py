"""Packed 4-bit weights on a GPU: products, layers, packing."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe.choose import heuristics_sm90 as heuristics
from cutlass_moe.ops import dispatch
from emitters.spec.config_packed_sm90 import GemmPackedSm90Config
from emitters.spec.packing import E8M0_LARGEST, Packing
from emitters.spec.registry import Config, GemmConfig, Problem, why_illegal
from tests.ops.test_pack import int4, mxfp4
from tests.support.cases import PACKED, PACKED_CASES, RAGGED, Case, make_inputs
from tests.support.layer_cases import PACKED_LAYERS, packed_images, packed_weights, tokens
from tests.support.numerics import check, opcheck, poisoned, same_bits

pytestmark = pytest.mark.gpu
EVERY = (
    *(replace(PACKED, packing=packing, counts=RAGGED, n=224, k=1160) for packing in Packing),
    replace(PACKED_CASES["swiglu"], k=1160),
)
OF_COLUMNS = (  # with biases, or scales as well
    PACKED_CASES["gpt_oss_up"],
    PACKED_CASES["gpt_oss_down"],
    replace(PACKED_CASES["swiglu_few_rows"], k=1160),
)
REPEATED = {packing: replace(PACKED_CASES[f"{packing}_20"], spare=0) for packing in Packing}


def every_config(case: Case) -> list[GemmConfig]:
    shapes = product((8, 16, 32, 96), (64, 128, 256), (1, 2, 4))
    configs = [
        GemmPackedSm90Config(m, n, ctas_per_sm=ctas, k_boxes=2 + 2 * (ctas % 2))
        for m, n, ctas in shapes
    ]
    configs += [
        *(GemmPackedSm90Config(m, 64, split_k=2, ctas_per_sm=2) for m in (8, 16)),
        *(
            GemmPackedSm90Config(8, 64, k_boxes=2, split_k=split, k_groups=groups, stages=8)
            for split, groups in ((1, 2), (1, 4), (2, 2))
        ),
        *(
            GemmPackedSm90Config(8, 32, k_boxes=2, split_k=split, k_groups=groups, ctas_per_sm=ctas)
            for split, groups, ctas in ((1, 1, 4), (1, 2, 4), (1, 4, 2), (2, 2, 2))
        ),
        GemmPackedSm90Config(8, 32, k_groups=2, ctas_per_sm=4),
        GemmPackedSm90Config(32, 128, k_boxes=2, k_groups=2, one_producer=True),
        *(
            GemmPackedSm90Config(m, n, k_boxes=2, one_producer=True, ctas_per_sm=ctas)
            for m in (32, 144, 176, 208)
            for n, ctas in ((64, 2), (128, 1), (192, 1), (256, 1))
        ),
    ]
    configs = [c for c in configs if why_illegal(case.problem, c) is None]
    return list(dict.fromkeys((*heuristics.candidates(case.problem), *configs)))


FORCED = [
    *((case, config) for case in EVERY for config in every_config(case)),
    *((case, config) for case in OF_COLUMNS for config in heuristics.candidates(case.problem)),
]


def images() -> set[tuple[Problem, Config]]:
    """Every (problem, config) that these tests run."""
    found: set[tuple[Problem, Config]] = {
        (case.problem, case.config) for case in PACKED_CASES.values()
    }
    found |= {(case.problem, case.config) for case in REPEATED.values()}
    found |= {(case.problem, config) for case, config in FORCED}
    return found | packed_images()


def launch(case: Case, inputs: dict[str, Any]) -> Tensor:
    out = poisoned(case.rows, case.problem.out_columns, inputs["out_dtype"], "cuda")
    cm.grouped_matmul_out(out, **inputs)
    return out


@pytest.mark.parametrize("exact", [False, True], ids=["normal", "exact"])
@pytest.mark.parametrize("case", PACKED_CASES.values(), ids=PACKED_CASES.keys())
def test_cases(case: Case, exact: bool) -> None:
    inputs = make_inputs(case, "cuda", exact)
    check(launch(case, inputs), case, inputs, exact)


@pytest.mark.parametrize(("case", "config"), FORCED)
def test_every_config_gives_the_same(case: Case, config: GemmConfig) -> None:
    inputs = make_inputs(case, "cuda", exact=True)
    with dispatch.forced_config(config):
        check(launch(case, inputs), case, inputs, exact=True)


@pytest.mark.parametrize("packing", Packing)
def test_results_are_the_same_bits_in_every_launch_and_in_graphs(packing: Packing) -> None:
    case = REPEATED[packing]
    inputs = make_inputs(case, "cuda")
    first = cm.grouped_matmul(**inputs)
    assert all(same_bits(cm.grouped_matmul(**inputs), first) for _ in range(20))
    out, graph = torch.empty_like(first), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cm.grouped_matmul_out(out, **inputs)
    out.zero_()
    graph.replay()
    assert same_bits(out, first)
    opcheck(case, "cuda")


def test_scales_of_mxfp4() -> None:
    """Up to the largest; each column of the output has one."""
    case = REPEATED[Packing.MXFP4]
    inputs = make_inputs(case, "cuda")
    experts, blocks = len(case.counts), (case.n, -(-case.k // 32))
    scale = torch.linspace(64, E8M0_LARGEST, case.n, device="cuda").round().byte()
    scale = scale[:, None].expand(experts, *blocks).contiguous()
    codes = torch.randint(0, 256, (experts, *blocks, 16), dtype=torch.uint8, device="cuda")
    inputs["weight"] = cm.pack_weights(codes, scale)
    out, wanted = (f(**inputs).double() for f in (cm.grouped_matmul, cm.grouped_matmul_reference))
    errors = (out - wanted).norm(dim=0) / wanted.norm(dim=0)
    assert errors.isfinite().all() and errors.max() < 6e-3


def test_lists_of_packed_weights() -> None:
    inputs = make_inputs(REPEATED[Packing.MXFP4], "cuda")
    wanted = cm.grouped_matmul(**inputs)
    out = torch.zeros_like(wanted)
    arguments = inputs["x"], list(inputs["weight"]), None, None, inputs["offsets"], out
    cm.index_group_matmul(*arguments, index=inputs["index"])
    assert same_bits(out, wanted)


@pytest.mark.parametrize("count", [0, 1, 7, 128, 1024])
@pytest.mark.parametrize("name", PACKED_LAYERS)
def test_layers(name: str, count: int) -> None:
    case, packing = PACKED_LAYERS[name]
    given = {**tokens(case, count, "cuda"), **packed_weights(case, packing, "cuda")}
    out = cm.fused_moe(**given)
    if not count:
        return
    wanted = cm.fused_moe_reference(**given, compute_dtype=torch.float64)
    assert float((out.double() - wanted).norm() / wanted.norm()) < 4e-3
    assert same_bits(cm.fused_moe(**given, pdl=False), out)


def test_packing_on_the_gpu_is_that_on_the_cpu() -> None:
    for values, scale in (mxfp4(3, 64, 384), int4(3, 64, 384, 128), int4(3, 64, 384, 32)):
        packed = cm.pack_weights(values, scale, interleaved=True)
        assert torch.equal(
            cm.pack_weights(values.cuda(), scale.cuda(), interleaved=True).cpu(), packed
        )
        back = cm.unpack_weights(packed.cuda(), interleaved=True)
        assert torch.equal(back[0].cpu(), values) and torch.equal(back[1].cpu(), scale)
    weight = torch.randn(2, 64, 256).bfloat16()
    for packing in Packing:
        packed = cm.quantize_packed(weight, str(packing))
        assert torch.equal(cm.quantize_packed(weight.cuda(), str(packing)).cpu(), packed)


def test_packing_takes_little_memory() -> None:
    """Beside what goes in and what comes out: a share of the packed layer's bytes."""
    values = torch.empty((64, 1536, 64, 16), dtype=torch.uint8, device="cuda")
    scale = torch.zeros((64, 1536, 64), dtype=torch.uint8, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    packed = cm.pack_weights(values, scale)
    assert torch.cuda.max_memory_allocated() - before < 1.3 * packed.nbytes
