"""The products of a layer in training on a driver without a GPU: every kernel finds its tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe.layer.products import Factor, How, project_gradient, project_up
from cutlass_moe.runtime import library
from emitters.spec.epilogue import Activation, ActivationGradient
from tests.support.fake_driver import FakeDriver, parameters_of

HOW = How("swiglu", False, None, None, None, None, None, 1000)
CLAMPED = HOW._replace(limit=2.0)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """One that takes the CPU's tensors for the GPU's; `posed` lists the problems of its kernels."""
    fake: Any = FakeDriver().patch(monkeypatch)
    fake.posed = []

    def load(problem: Any, config: Any, device: int) -> Any:
        fake.posed.append(problem)
        kernel = fake.kernel(parameters_of(problem, config), config.threads)
        kernel.record.config.update(config.to_json())
        return kernel

    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(library, "load", load)
    monkeypatch.setattr(library, "device_arch", lambda device: "sm_90a")
    monkeypatch.setattr(library, "device_name", lambda device: "a GPU without a table")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(Tensor, "get_device", lambda tensor: 0)
    return fake


def bf16(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


@pytest.fixture
def table() -> Any:
    return cm.route(torch.tensor([[0, 1], [1, 3], [2, 0]], dtype=torch.int32), 4)


@pytest.mark.parametrize("how", [HOW, CLAMPED])
def test_up(table: Any, driver: Any, how: How) -> None:
    x, w13 = bf16(3, 64), bf16(4, 96, 64)
    up = Factor(w13, None, torch.zeros(4, 96))
    for _ in range(2):
        h, active = project_up(x, up, how, table, torch.bfloat16)
        assert (h.shape, active.shape) == ((6, 96), (6, 48))
        seen = driver.launches[-1].values
        assert seen["h"] == h.data_ptr() and seen["out"] == active.data_ptr()
        assert seen["h_map"] == (h.data_ptr(), (48, 2, 6), (2 * 48, 2 * 96))
        assert seen["x"] == x.data_ptr() and seen["bias"] == up.bias.data_ptr()
    (problem,) = driver.posed
    assert problem.epilogue[-1] == Activation(how.options.function, stored=True)
    assert ("limit" in seen) == (how is CLAMPED)


@pytest.mark.parametrize("how", [HOW, CLAMPED])
def test_gradient(table: Any, driver: Any, how: How) -> None:
    grad, w2, h, grad_h = bf16(3, 64), bf16(4, 64, 264), bf16(6, 528), bf16(6, 528)
    weights = torch.ones(3, 2)
    found = project_gradient(grad, w2, h, weights, table, how, grad_h)
    assert found is not None
    active, by_weight = found
    assert (active.shape, by_weight.shape) == ((6, 264), (3, 2))
    seen = driver.launches[-1].values
    of_h = (264, 2, 6), (2 * 264, 2 * 528)
    assert seen["h_map"] == (h.data_ptr(), *of_h)
    assert seen["grad_h_map"] == (grad_h.data_ptr(), *of_h) and seen["grad_h"] == grad_h.data_ptr()
    assert seen["topk_weights"] == weights.data_ptr() and seen["choices"] == 2
    assert seen["inverse"] == table.inverse.data_ptr() and seen["out"] == active.data_ptr()
    (problem,) = driver.posed
    assert problem.epilogue == (ActivationGradient(how.options.function),)
    assert problem.gather and (problem.n, problem.k) == (264, 64)


def test_few_rows_have_the_gradient_as_a_step(table: Any, driver: Any) -> None:
    grad, w2, h = bf16(3, 64), bf16(4, 64, 264), bf16(6, 528)
    few = HOW._replace(expected_rows=8)
    assert project_gradient(grad, w2, h, torch.ones(3, 2), table, few, h) is None
    alternating = HOW._replace(interleaved=True)
    assert project_gradient(grad, w2, h, torch.ones(3, 2), table, alternating, h) is None
    project_up(grad, Factor(bf16(4, 96, 64), None, None), few, table, torch.bfloat16)
    assert [problem.op for problem in driver.posed] == ["grouped_gemm", "activate"]
    assert not driver.posed[0].epilogue


def test_8_bit_weights_have_the_activation_as_a_step(table: Any, driver: Any) -> None:
    w13 = torch.zeros(4, 96, 64, dtype=torch.float8_e4m3fn)
    up = Factor(w13, torch.ones(4, 96), None)
    project_up(bf16(3, 64), up, HOW._replace(quant="fp8"), table, torch.bfloat16)
    product, step = driver.posed[-2:]
    assert (product.op, step.op) == ("grouped_gemm", "activate") and not product.epilogue
