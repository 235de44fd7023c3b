"""What configs are chosen on GPUs that nobody tuned for, and that an H200's did not change."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cutlass_moe.choose import gpus
from cutlass_moe.choose import heuristics_sm90 as heuristics
from cutlass_moe.choose.gpus import gpu_of
from cutlass_moe.models.problems import gemm_problems
from cutlass_moe.models.shapes import MODELS
from emitters.spec.arch import GPUS, H200
from emitters.spec.config_sm90 import GemmSm90Config
from emitters.spec.config_swap_sm90 import GemmSwapSm90Config
from emitters.spec.dtypes import Accumulation
from emitters.spec.epilogue import Activation, ActivationFunction
from emitters.spec.gemm import GemmProblem, Major
from emitters.spec.registry import GemmConfig

H20, H100 = GPUS["NVIDIA H20"], GPUS["NVIDIA H100 80GB HBM3"]
ROWS = [2 ** (i / 2) for i in range(-8, 24)]  # per expert
PROBLEMS = [
    problem
    for shape in MODELS.values()
    for dtype in ("fp8", "int8", "bf16")
    for problem in gemm_problems(shape, dtype).values()
]


def chosen(gpu: str, choose=heuristics.choose) -> list[str]:
    return [
        choose(p, max(1, int(rows * p.num_experts)), rows, gpu=gpu).words
        for p in PROBLEMS
        for rows in ROWS
    ]


def test_choices_for_an_h200_are_those_that_were_measured() -> None:
    """A digest of 3,456 choices by table and by estimate: change it with what you measured."""
    words = "\n".join(chosen(H200.name) + chosen(H200.name, heuristics.estimate))
    assert len(PROBLEMS) * len(ROWS) == 3456
    assert hashlib.sha256(words.encode()).hexdigest()[:16] == "7e9254c979cb9fa1"


def test_two_level_sums_have_choices_of_their_own() -> None:
    """As measured: perf/EXPERIMENTS.md, "Slices of a tile together" and what it refers to."""
    products = gemm_problems(MODELS["mixtral"], "fp8_block")
    gathered, blocks = products["up"], products["down"]
    channels = gemm_problems(MODELS["qwen3-30b"], "fp8")["down"]
    channels = replace(channels, accumulation=Accumulation.TWO_LEVEL)
    tiles = (128, 256), (192, 128), (128, 128)
    wide, three, square = (GemmSm90Config(m, n, tma_x=True) for m, n in tiles)
    small = GemmSm90Config(64, 128, ctas_per_sm=2, tma_x=True)

    def estimate(problem: GemmProblem, rows: int) -> GemmConfig:
        return heuristics.estimate(problem, rows * problem.num_experts, rows)

    assert isinstance(estimate(blocks, 32), GemmSwapSm90Config)
    in_order = [estimate(blocks, rows) for rows in (128, 256, 512, 8192)]
    assert in_order == [three, square, three, three]
    assert [estimate(channels, rows) for rows in (64, 256, 512)] == [small, small, wide]
    assert estimate(gathered, 8192) == GemmSm90Config(128, 256, scale_span=4)
    assert heuristics.choose(gathered, 1, 512, wide_scales=False) == GemmSm90Config(128, 256)
    row_major = heuristics.choose(replace(blocks, n=8192), 1, 512, wide_scales=False)
    assert row_major.tile_m == 128 and not row_major.tma_x


def test_few_tiles_of_packed_weights_have_choices_of_their_own() -> None:
    """As measured at one token: perf/EXPERIMENTS.md, "Tiles of 32 columns by mma.sync"."""

    def words(model: str, part: str, packing: str = "mxfp4") -> str:
        problem = gemm_problems(MODELS[model], packing)[part]
        rows = MODELS[model].top_k / problem.num_experts
        config = heuristics.estimate(problem, 1, rows)
        assert config in heuristics.candidates(problem)
        return config.words

    two, four = "packed swap 8x32 K/1 2/SM 4 in turn", "packed swap 8x32 K/1 4/SM 2 in turn"
    assert words("dsv3-ep8", "up") == words("dsv3-ep8", "down") == two
    assert words("llama4-maverick", "down") == "packed swap 8x64 K/1 2/SM 2 in turn"
    assert words("llama4-maverick", "down", "int4_g32") == two
    assert words("qwen3-30b", "up", "int4_g128") == words("gpt-oss-20b", "down") == four
    assert words("qwen3-30b", "activated", "int4_g32") == four.replace("4/SM", "3/SM")
    assert words("qwen3-30b", "down") == words("gpt-oss-20b", "up") == "packed swap 8x64 K/1 4/SM"


def test_long_sums_of_training_have_choices_of_their_own() -> None:
    """As measured: perf/EXPERIMENTS.md, "The energy of training"."""
    in_turn = GemmSm90Config(64, 256, pingpong=True, group_m=16, cluster_m=2)
    shared = GemmSm90Config(128, 256, group_m=16, cluster_m=2)
    for model, wanted in (("qwen3-30b", in_turn), ("mixtral", shared)):  # K 2,048 and 4,096
        up = gemm_problems(MODELS[model], "bf16")["up"]
        turned = replace(up, weight=replace(up.weight, major=Major.N), epilogue=(), gather=False)
        stored = replace(up, epilogue=(Activation(ActivationFunction.SWIGLU, stored=True),))
        for problem in (stored, turned):
            config = heuristics.estimate(problem, 16384, 1024)
            assert config == replace(wanted, tma_x=not problem.gather)
            assert config in heuristics.candidates(problem)
        assert heuristics.estimate(up, 16384, 1024) == in_turn


@pytest.mark.parametrize("gpu", GPUS)
def test_one_build_serves_every_gpu(gpu: str) -> None:
    for problem in PROBLEMS[::3]:
        for rows in ROWS:
            config = heuristics.estimate(problem, 1, rows, gpu)
            assert config in heuristics.candidates(problem)


def test_a_gpu_with_much_bandwidth_per_operation_fills_no_half_empty_tiles() -> None:
    problem = gemm_problems(MODELS["qwen3-30b"], "fp8")["up"]
    one_tile = heuristics.estimate(problem, 1, 64, H200.name)
    assert one_tile.tile_m == 128
    assert heuristics.estimate(problem, 1, 64, H100.name) == one_tile
    assert heuristics.estimate(problem, 1, 64, H20.name).tile_m == 64
    # and fewer SMs are full with fewer tiles
    few = gemm_problems(MODELS["mixtral"], "fp8")["down"]
    assert heuristics.estimate(few, 1, 0.25, H20.name) != heuristics.estimate(few, 1, 0.25)


@pytest.fixture
def device(monkeypatch):
    """A device of a name, so many SMs and, of its memory, clock in kHz and bits."""

    def pretend(name: str, sms: int, **more: int) -> None:
        found = SimpleNamespace(
            name=name, multi_processor_count=sms, L2_cache_size=48 << 20, **more
        )
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)

    gpus.gpu_of.cache_clear()
    yield pretend
    gpus.gpu_of.cache_clear()


def test_known_gpus_are_not_asked(device) -> None:
    device("NVIDIA H200", 7)
    assert gpu_of("NVIDIA H200") is H200


def test_an_unknown_device_is_asked(device) -> None:
    name = "NVIDIA H100 NVL"
    device(name, 120, memory_clock_rate=2_619_000, memory_bus_width=6144)
    gpu = gpu_of(name)
    assert (gpu.name, gpu.sms, gpu.l2) == (name, 120, 48 << 20)
    assert gpu.bandwidth == pytest.approx(4.02e12, rel=0.01)
    assert gpu.flops == pytest.approx(H200.flops * 120 / 132)


def test_without_a_memory_clock_bandwidth_goes_with_the_sms(device) -> None:
    device("NVIDIA H800", 66)
    assert gpu_of("NVIDIA H800").bandwidth == pytest.approx(H200.bandwidth / 2)


def test_a_slice_is_the_share_of_its_gpu_that_its_sms_are(device) -> None:
    name = "NVIDIA H20 MIG 3g.48gb"
    device(name, 39, memory_clock_rate=2_619_000, memory_bus_width=6144)
    gpu = gpu_of(name)
    assert (gpu.sms, gpu.bandwidth, gpu.l2) == (39, H20.bandwidth / 2, H20.l2 // 2)
    assert gpu.balance == pytest.approx(H20.balance)


def test_a_gpu_that_is_not_here_is_taken_for_an_h200(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpus.gpu_of.cache_clear()
    assert gpu_of("NVIDIA H300") is H200
