"""The modules trained by kernels on a GPU: gradients, a fine-tuning, and no wait of the host."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

from cutlass_moe.choose.heuristics_sm90 import every_config
from emitters.spec.dtypes import DType
from emitters.spec.layer_steps import TopkProblem
from emitters.spec.registry import Config, Problem
from tests.layer import test_nn_training as on_cpu
from tests.layer.test_nn_gpu import LAYERS, TOP_K, D, E, H, make, no_wait, no_warning, randn
from tests.support.training_cases import TrainingCase, images_of, relative

pytestmark = pytest.mark.gpu

TOKENS = 300
CASES = [
    TrainingCase("swiglu", top_k=TOP_K, experts=E, hidden=D, inter=H, n_major=True),
    TrainingCase("swiglu", top_k=TOP_K, experts=E, hidden=D, inter=H, n_major=True, bias=True),
    TrainingCase("swiglu_oai", top_k=TOP_K, experts=E, hidden=D, inter=H, n_major=True, bias=True),
    TrainingCase("relu2", top_k=TOP_K, experts=E, hidden=D, inter=H, n_major=True),
]
TOY = TrainingCase(top_k=2, experts=on_cpu.E, hidden=on_cpu.D, inter=2 * on_cpu.H, n_major=True)


def images() -> set[tuple[Problem, Config]]:
    found = {image for case in CASES for image in images_of(case, TOKENS)} | images_of(TOY, 256)
    for experts, scoring in ((E, "softmax"), (E, "sigmoid"), (on_cpu.E, "softmax")):
        for logits in (DType.FP32, DType.BF16):
            problem = TopkProblem(experts, logits, scoring, 1)
            found |= {(problem, config) for config in every_config(problem)}
    return found


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUTLASS_MOE_STRICT", "1")
    torch._dynamo.reset()
    yield


@pytest.mark.parametrize("name", LAYERS)
def test_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = make(name, None)
    x = randn(TOKENS, D)
    layer.train()
    found = on_cpu.gradients(layer, x)
    with no_warning(), no_wait():
        again = on_cpu.gradients(layer, x)
    monkeypatch.setenv("CUTLASS_MOE_STRICT", "0")  # float64 routers have no kernel
    wide = copy.deepcopy(layer).double()
    wide.use_grouped_gemm = False
    for part, want in on_cpu.gradients(wide, x.double()).items():
        assert relative(found[part], want) < 2e-2, part
        if not part.startswith(("shared", "router")):  # torch's own, by atomics or split sums
            assert part == "x" or torch.equal(found[part], again[part]), part


@pytest.mark.parametrize("compiled", [False, True])
def test_fine_tuning_follows_float32(compiled: bool) -> None:
    want = on_cpu.losses(torch.float32, False, device="cuda")
    backend = "inductor" if compiled else None
    on_cpu.check_losses(on_cpu.losses(torch.bfloat16, True, backend, "cuda"), want)
