"""The contract of grouped_matmul, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import cutlass_moe as cm
from emitters.spec.dtypes import ACCUMULATIONS
from emitters.spec.epilogue import Activation, ActivationFunction, Bias, EpilogueNode
from emitters.spec.gemm import Granularity
from tests.support.cases import BF16, CASES, FP16, FP32, SCALES, Case, make_inputs
from tests.support.numerics import (
    DIFFERENTIABLE,
    GRADIENTS,
    check,
    gradient_inputs,
    naive,
    naive_gradients,
    opcheck,
    poisoned,
    same_bits,
)

SMALL = Case(tokens=9, counts=(4, 0, 7), n=24, k=32, epilogue=(*SCALES, Bias(FP32)), spare=2)
FLOAT = replace(SMALL, operand=BF16, epilogue=())
I32, BFLOAT = torch.int32, torch.bfloat16

# What each argument of a good call of SMALL is replaced with, and what must come of it.
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x_dtype": ({"x": torch.ones(9, 32)}, TypeError, "x must be .*int8.* got torch.float32"),
    "x_1d": (
        {"x": torch.ones(9).to(torch.float8_e4m3fn)},
        ValueError,
        r"x must be \[T, K\].* got \(9,\)",
    ),
    "weight_dtype": (
        {"weight": torch.ones(3, 24, 32, dtype=BFLOAT)},
        TypeError,
        "weight must be torch.float8_e4m3fn.* got torch.bfloat16",
    ),
    "weight_2d": (
        {"weight": torch.ones(24, 32).to(torch.float8_e4m3fn)},
        ValueError,
        r"weight \[E, N, K\].* got .*\(24, 32\)",
    ),
    "weight_k": (
        {"weight": torch.ones(3, 24, 16).to(torch.float8_e4m3fn)},
        ValueError,
        r"weight must be .*32\).* got \(3, 24, 16\)",
    ),
    "weight_no_experts": (
        {"weight": torch.ones(0, 24, 32).to(torch.float8_e4m3fn)},
        ValueError,
        r"weight must be .*E > 0.* got \(0, 24, 32\)",
    ),
    "weight_n_major": (
        {"weight": torch.ones(3, 32, 24).to(torch.float8_e4m3fn).mT},
        ValueError,
        r"weight must have K dense.* got strides \(768, 1, 24\)",
    ),
    "weight_pitch": (
        {"weight": torch.ones(3, 24, 40).to(torch.float8_e4m3fn)[:, :, :32]},
        ValueError,
        r"weight must have .*multiples of 16.* got strides \(960, 40, 1\)",
    ),
    "offsets_shape": (
        {"offsets": torch.zeros(4, dtype=I32)},
        ValueError,
        r"offsets must have shape \(3,\), got \(4,\)",
    ),
    "index_2d": (
        {"index": torch.zeros(13, 1, dtype=I32)},
        ValueError,
        r"index must have shape \(13,\), got \(13, 1\)",
    ),
    "token_scale_missing": (
        {"per_token_scale": None},
        ValueError,
        "per_token_scale must be given: .*need per_token_scale and scale, got None",
    ),
    "token_scale_per_row": (
        {"per_token_scale": torch.ones(13)},
        ValueError,
        r"per_token_scale must have shape \(9,\) or \(9, 1\), got \(13,\)",
    ),
    "token_scale_dtype": (
        {"per_token_scale": torch.ones(9).double()},
        TypeError,
        "per_token_scale must be torch.float32, got torch.float64",
    ),
    "offsets_dtype": (
        {"offsets": torch.ones(3)},
        TypeError,
        "offsets must be torch.int32, got torch.float32",
    ),
    "index_dtype": (
        {"index": torch.zeros(13, dtype=torch.int16)},
        TypeError,
        "index must be torch.int32, got torch.int16",
    ),
    "scale_missing": (
        {"scale": None},
        ValueError,
        "scale must be given: .*need per_token_scale and scale, got None",
    ),
    "scale_dtype": (
        {"scale": torch.ones(3, 24).double()},
        TypeError,
        "scale must be torch.float32, got torch.float64",
    ),
    "scale_shape": (
        {"scale": torch.ones(24)},
        ValueError,
        r"scale must have shape \(3, 24\) or \(3, 24, 1\) or \(3,\) or \(3, 1, 1\), got \(24,\)",
    ),
    "bias_dtype": (
        {"bias": torch.ones(3, 24).double()},
        TypeError,
        "bias must be .*torch.float32.* got torch.float64",
    ),
    "bias_shape": (
        {"bias": torch.ones(24)},
        ValueError,
        r"bias must have shape \(3, 24\), got \(24,\)",
    ),
    "out_dtype": (
        {"out_dtype": torch.float64},
        TypeError,
        "out_dtype must be .*float32.* got torch.float64",
    ),
    "accumulation": (
        {"accumulation": "exact"},
        ValueError,
        "accumulation must be fast or two_level for torch.float8_e4m3fn, got 'exact'",
    ),
    "expected_rows": (
        {"expected_rows": -5},
        ValueError,
        "expected_rows must be 0 or more, got -5",
    ),
    "num_sms_negative": ({"num_sms": -1}, ValueError, "num_sms must be .* got -1"),
    "num_sms": ({"num_sms": 0}, ValueError, "num_sms must be .* got 0"),
    "schedule": ({"schedule": "fair"}, ValueError, "schedule must be .*tile.* got 'fair'"),
    "activation": (
        {"activation": "tanh"},
        ValueError,
        "activation must be one of swiglu, .*relu2, got 'tanh'",
    ),
    "gated_odd_n": (
        {
            "activation": "geglu",
            "weight": torch.ones(3, 23, 32).to(torch.float8_e4m3fn),
            "scale": torch.ones(3),
            "bias": None,
        },
        ValueError,
        "weight must have an even N for geglu, .* got N = 23",
    ),
    "n_major_pitch": (
        {
            "x": torch.ones(9, 32, dtype=BFLOAT),
            "weight": torch.ones(3, 32, 28).to(BFLOAT)[..., :24].mT,
        },
        ValueError,
        r"weight must have K or N dense .* strides of E and K in multiples of 8 .*\(896, 1, 28\)",
    ),
    "interleaved_plain": (
        {"interleaved": True},
        ValueError,
        "interleaved=True needs a gated activation, got None",
    ),
    "interleaved_ungated": (
        {"interleaved": True, "activation": "gelu"},
        ValueError,
        "interleaved=True needs a gated activation, got 'gelu'",
    ),
    "starts_dtype": (
        {"starts": torch.zeros(3)},
        TypeError,
        "starts must be torch.int32, got torch.float32",
    ),
    "starts_shape": (
        {"starts": torch.zeros(4, dtype=I32)},
        ValueError,
        r"starts must have shape \(3,\), got \(4,\)",
    ),
}
ERROR_TABLE = pytest.mark.parametrize(
    ("change", "error", "message"), ERRORS.values(), ids=ERRORS.keys()
)


@pytest.mark.parametrize("call", [cm.grouped_matmul, cm.grouped_matmul_problem])
@ERROR_TABLE
def test_errors(
    call: Callable[..., Any], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(**{**make_inputs(SMALL, "cpu"), **change})


@ERROR_TABLE
def test_errors_of_the_out_form(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    out = torch.empty(SMALL.rows, SMALL.n, dtype=BFLOAT)
    with pytest.raises(error, match=message):
        cm.grouped_matmul_out(out, **{**make_inputs(SMALL, "cpu"), **change})


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (torch.empty(13, 24), TypeError, "out must be torch.bfloat16, got torch.float32"),
        (
            torch.empty(12, 24, dtype=BFLOAT),
            ValueError,
            r"must have shape \(13, 24\), got \(12, 24",
        ),
    ],
    ids=["dtype", "shape"],
)
def test_errors_of_out(out: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cm.grouped_matmul_out(out, **make_inputs(SMALL, "cpu"))


@pytest.mark.parametrize(
    "name", ["weight", "index", "offsets", "per_token_scale", "scale", "bias", "out"]
)
def test_tensors_elsewhere_raise(name: str) -> None:
    with FakeTensorMode() as mode:  # a CUDA tensor without a GPU
        inputs = as_fake(mode, make_inputs(SMALL, "cpu"))
        inputs["out"] = torch.empty(13, 24, dtype=BFLOAT)
        inputs[name] = torch.empty_like(inputs[name], device="cuda")
        with pytest.raises(ValueError, match=f"{name} must be on cpu, got one on cuda"):
            cm.grouped_matmul_out(**inputs)


def as_fake(mode: FakeTensorMode, inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}


@pytest.mark.parametrize("operand", ACCUMULATIONS, ids=str)
def test_accumulation_of_each_operand(operand: Any) -> None:
    epilogue = SCALES if operand.quantized else ()
    inputs = make_inputs(replace(SMALL, operand=operand, epilogue=epilogue), "cpu")
    default = cm.grouped_matmul(**inputs)
    for accumulation in ("fast", "two_level", "fp32", "int32"):
        if accumulation in ACCUMULATIONS[operand]:
            assert torch.equal(cm.grouped_matmul(**inputs, accumulation=accumulation), default)
        else:
            with pytest.raises(ValueError, match=f"accumulation must be .*got '{accumulation}'"):
                cm.grouped_matmul(**inputs, accumulation=accumulation)


@pytest.mark.parametrize(
    "name", [n for n, c in CASES.items() if c.rows * c.n * c.k < 2**26 and len(c.counts) < 100]
)
def test_cases(name: str) -> None:
    case = CASES[name]
    inputs = make_inputs(case, "cpu")
    assert cm.grouped_matmul_problem(**inputs) == case.problem
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, Tensor)}
    out = poisoned(case.rows, case.problem.out_columns, inputs["out_dtype"], "cpu")
    assert torch.ops.cutlass_moe.grouped_matmul_out(out, **inputs, **_absent(inputs)) is None
    check(out, case, inputs)
    assert all(same_bits(inputs[name], tensor) for name, tensor in before.items())
    assert same_bits(cm.grouped_matmul(**inputs)[case.owned], out[case.owned])


def _absent(inputs: dict[str, Any]) -> dict[str, Any]:
    """What the schema, which has no defaults, wants besides."""
    names = (
        "per_token_scale", "scale", "bias", "starts",
        "accumulation", "expected_rows", "num_sms", "schedule", "activation", "interleaved",
    )  # fmt: skip
    return {name: False if name == "interleaved" else None for name in names if name not in inputs}


def test_scales_may_have_a_last_dimension_of_one() -> None:
    inputs = make_inputs(SMALL, "cpu")
    columns = {name: inputs[name][..., None] for name in ("scale", "per_token_scale")}
    assert torch.equal(cm.grouped_matmul(**{**inputs, **columns}), cm.grouped_matmul(**inputs))


def test_scale_of_an_expert_is_that_of_all_its_channels() -> None:
    inputs = make_inputs(replace(SMALL, epilogue=(Granularity.TOKEN, Granularity.EXPERT)), "cpu")
    channels = inputs["scale"][:, None].expand(3, 24).contiguous()
    want = cm.grouped_matmul(**{**inputs, "scale": channels})
    assert torch.equal(cm.grouped_matmul(**inputs), want)


def test_hints_change_nothing() -> None:
    inputs = make_inputs(SMALL, "cpu")
    got = cm.grouped_matmul(**inputs, expected_rows=1000, num_sms=3, schedule="dynamic")
    assert torch.equal(got, cm.grouped_matmul(**inputs))


def test_weight_may_be_a_strided_view() -> None:
    inputs = make_inputs(FLOAT, "cpu")
    want = cm.grouped_matmul(**inputs)
    wide = torch.cat([inputs["weight"]] * 2, dim=1)
    assert torch.equal(cm.grouped_matmul(**{**inputs, "weight": wide[:, 24:]}), want)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a good call, few and small; indices reach past both ends."""
    tokens, n, k = draw(st.integers(0, 5)), draw(st.integers(1, 6)), 16 * draw(st.integers(1, 2))
    counts = draw(st.lists(st.integers(0, 4), min_size=1, max_size=5))
    operand = draw(st.sampled_from(list(ACCUMULATIONS)))
    token_scale = operand.quantized or draw(st.booleans())
    scales: list[EpilogueNode | None] = [Granularity.CHANNEL, Granularity.EXPERT]
    scales += [] if operand.quantized else [None]
    nodes: list[EpilogueNode | None] = [
        Granularity.TOKEN if token_scale else None,
        draw(st.sampled_from(scales)),
        draw(st.sampled_from([None, Bias(BF16), Bias(FP16), Bias(FP32)])),
    ]
    case = Case(
        tokens=tokens,
        counts=tuple(counts),
        n=n,
        k=k,
        operand=operand,
        out=FP32,
        epilogue=tuple(node for node in nodes if node is not None),
        gather=draw(st.booleans()),
        spare=draw(st.integers(0, 2)),
    )
    inputs = make_inputs(case, "cpu", seed=draw(st.integers(0, 1000)))
    if case.gather:
        entries = st.lists(st.integers(-2, tokens + 1), min_size=case.rows, max_size=case.rows)
        inputs["index"] = torch.tensor(draw(entries), dtype=I32)
    return inputs


@settings(max_examples=60, deadline=None)
@given(calls())
def test_any_call_is_the_definition(inputs: dict[str, Any]) -> None:
    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    end = int(inputs["offsets"][-1])
    want = naive(**tensors)[:end]
    got = cm.grouped_matmul(**inputs)[:end].double()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


# Tracing.


@pytest.mark.parametrize(
    "name",
    [
        "one_token_8_experts",
        "bias_bf16",
        "float_scales",
        "n_8",
        "starts_few_rows",
        "n_major_few_rows",
        "geglu_20",
        "swiglu_oai_20",
        "gelu_20",
    ],
)
def test_opcheck(name: str) -> None:
    opcheck(replace(CASES[name], spare=0), "cpu")


GATED = replace(SMALL, epilogue=(*SCALES, Activation(ActivationFunction.SWIGLU)))


@pytest.mark.parametrize("case", [SMALL, FLOAT, replace(SMALL, gather=False), GATED], ids=str)
def test_fakes_know_shape_and_dtype(case: Case) -> None:
    real = make_inputs(case, "cpu")
    with FakeTensorMode() as mode:
        fake = as_fake(mode, real)
        got = cm.grouped_matmul(**fake)
        cm.grouped_matmul_out(torch.empty_like(got), **fake)
        with pytest.raises(TypeError, match="offsets must be torch.int32"):
            cm.grouped_matmul(**{**fake, "offsets": fake["offsets"].float()})
    want = cm.grouped_matmul(**real)
    assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
    assert got.stride() == want.stride()


@pytest.mark.parametrize("case", [SMALL, FLOAT], ids=["fp8", "bf16"])
def test_compiles_as_one_graph_for_any_number_of_tokens(case: Case) -> None:
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def layer(out: Tensor, inputs: dict[str, Any]) -> Tensor:
        cm.grouped_matmul_out(out, **inputs)
        return cm.grouped_matmul(**inputs) + out

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=graphs, dynamic=True)
    for tokens, last in ((9, 7), (11, 7), (30, 40)):
        inputs = make_inputs(replace(case, tokens=tokens, counts=(4, 0, last), spare=0), "cpu")
        out = torch.empty(4 + last, case.n, dtype=BFLOAT)
        product = cm.grouped_matmul(**inputs)
        assert torch.equal(compiled(out, inputs), product * 2)
        assert torch.equal(out, product)
    assert graphs.frame_count == 1


# Gradients.


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("activation", ActivationFunction, ids=str)
def test_gradients_through_activations(activation: ActivationFunction, compiled: bool) -> None:
    inputs = gradient_inputs([1, 1, 4, -1, 4, 4, 1], [3, 3, 7], torch.bfloat16)
    inputs |= {"activation": str(activation), "interleaved": activation.gated}
    check_gradients(inputs, compiled)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("shapes", ["flat", "column", "expert"])
@pytest.mark.parametrize("routing", GRADIENTS.values(), ids=GRADIENTS.keys())
def test_gradients(routing: dict[str, Any], shapes: str, compiled: bool) -> None:
    check_gradients(gradient_inputs(**routing, dtype=torch.bfloat16, shapes=shapes), compiled)


def check_gradients(inputs: dict[str, Any], compiled: bool) -> None:
    for name in DIFFERENTIABLE:
        inputs[name].requires_grad_()
    call = cm.grouped_matmul
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    out = call(**inputs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).bfloat16()
    found = torch.autograd.grad(out, [inputs[name] for name in DIFFERENTIABLE], grad)
    detached: dict[str, Any] = {
        k: v.detach() if isinstance(v, Tensor) else v for k, v in inputs.items()
    }
    for got, want in zip(found, naive_gradients(grad, detached), strict=True):
        rtol = 2**-8 if got.dtype == BFLOAT else 1e-5
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_one_input_alone_may_require_a_gradient(name: str) -> None:
    inputs = gradient_inputs([1, 0, 1], [1, 1, 3], torch.float16)
    inputs[name].requires_grad_()
    cm.grouped_matmul(**inputs).sum().backward()
    assert inputs[name].grad.shape == inputs[name].shape
    assert inputs[name].grad.any()


@pytest.mark.parametrize("name", ["x", "weight", "per_token_scale", "scale", "bias"])
def test_gradients_of_8_bit_operands_raise(name: str) -> None:
    inputs = make_inputs(SMALL, "cpu")
    inputs[name].requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient through torch.float8_e4m3fn"):
        cm.grouped_matmul(**inputs)
    with torch.no_grad():
        assert not cm.grouped_matmul(**inputs).requires_grad


@pytest.mark.parametrize("name", ["out", "x", "weight", "bias"])
def test_out_form_does_not_lose_gradients(name: str) -> None:
    inputs = make_inputs(replace(FLOAT, epilogue=(Bias(FP32),)), "cpu")
    inputs["out"] = torch.empty(13, 24, dtype=BFLOAT)
    inputs[name].requires_grad_()
    with pytest.raises(RuntimeError, match="gradient"):
        cm.grouped_matmul_out(**inputs)
    with torch.no_grad():
        cm.grouped_matmul_out(**inputs)


@pytest.mark.parametrize(
    "mirror", [cm.grouped_matmul_problem, cm.plan, cm.grouped_matmul_reference]
)
def test_mirrors_know_the_names_of_grouped_matmul_alone(mirror: Any) -> None:
    inputs = make_inputs(SMALL, "cpu")
    with pytest.raises(TypeError, match="'offset'"):
        mirror(**inputs, offset=inputs["offsets"])
    del inputs["offsets"]
    with pytest.raises(TypeError, match="'offsets'"):
        mirror(**inputs)
