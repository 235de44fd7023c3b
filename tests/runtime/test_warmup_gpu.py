"""Warmup on a GPU, from an archive and with compiling forbidden."""

from __future__ import annotations

import pytest
from cuda.bindings import driver

import cutlass_moe as cm
from cutlass_moe.choose.heuristics_sm90 import every_config
from cutlass_moe.images.archive import write
from cutlass_moe.models.problems import gemm_problems, model_problems
from cutlass_moe.models.shapes import MODELS
from cutlass_moe.runtime import library
from emitters.spec.arch import DEFAULT_ARCH
from emitters.spec.image import image_key
from emitters.spec.registry import Config, Problem
from tests.support.cases import Case, make_inputs, skewed
from tests.support.numerics import check, poisoned

pytestmark = pytest.mark.gpu

MODEL, DTYPE = "qwen3-30b", "fp8"
PROBLEMS = model_problems(MODELS[MODEL], DTYPE)


def images() -> set[tuple[Problem, Config]]:
    """Every (problem, config) that these tests load."""
    return {(problem, config) for problem in PROBLEMS.values() for config in every_config(problem)}


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """An archive of the model's images, which alone is searched; nothing is loaded or compiled."""
    path, arch = tmp_path / "images.zip", DEFAULT_ARCH
    found = [(p, c, library.find_image(p, c, arch)) for p, c in images()]
    write(path, ((arch, image_key(p, c, arch), image) for p, c, image in found))
    monkeypatch.setenv("CUTLASS_MOE_CACHE_DIR", str(path))
    monkeypatch.setenv("CUTLASS_MOE_JIT", "0")
    monkeypatch.setattr(library, "_kernels", {})
    return path


def test_warmup_leaves_nothing_to_load(archive):
    cm.warmup(MODEL, dtype=DTYPE)
    assert {(problem, config) for problem, config, _ in library._kernels} == images()
    loaded = driver.CUfunctionLoadingState.CU_FUNCTION_LOADING_STATE_LOADED
    for kernel in library._kernels.values():
        assert driver.cuFuncIsLoaded(kernel.function) == (driver.CUresult.CUDA_SUCCESS, loaded)


@pytest.mark.parametrize("name", ["up", "down"])
def test_calls_after_warmup_find_their_kernels(archive, monkeypatch, name):
    problem = gemm_problems(MODELS[MODEL], DTYPE)[name]
    cm.warmup(problem)
    archive.unlink()
    monkeypatch.setattr(library, "find_image", None)
    used = set()
    for tokens in (1, 16, 256, 1024, 4096, 16384):
        counts = skewed(problem.num_experts, tokens * MODELS[MODEL].top_k)
        case = Case(tokens, counts, problem.n, problem.k, gather=problem.gather, spare=0)
        assert case.problem == problem
        used.add(case.config)
        inputs = make_inputs(case, "cuda")
        out = poisoned(case.rows, case.problem.out_columns, inputs["out_dtype"], "cuda")
        cm.grouped_matmul_out(out, **inputs)
        check(out, case, inputs)
    assert len(used) > 2 and used <= set(every_config(problem))
