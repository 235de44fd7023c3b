"""The contract of index_group_matmul, on the CPU."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import cutlass_moe as cm
from cutlass_moe.ops._lists import ListArguments
from emitters.spec.epilogue import Bias
from emitters.spec.gemm import Granularity
from tests.support.cases import BF16, FP16, FP32, INT8, SCALES, Case
from tests.support.forms import APART, FORMS, I32, I64, INDEX_FORMS, PARTS, Form, make_call
from tests.support.numerics import same_bits

SMALL = Case(tokens=9, counts=(4, 0, 7), n=24, k=32, gather=False, spare=2)
FLOAT = replace(SMALL, operand=BF16, epilogue=())


CASES = {
    "no_tokens": replace(SMALL, tokens=0, counts=(0, 0, 0), spare=0),
    "no_rows": replace(SMALL, counts=(0, 0, 0)),
    "one_expert": replace(SMALL, counts=(5,)),
    "two_experts": replace(SMALL, counts=(0, 3)),
    "hot_expert": replace(SMALL, counts=(0, 9, 0, 0)),
    "experts_33": replace(SMALL, counts=(1, 0, 2) * 11),
    "fp8": SMALL,
    "bf16": FLOAT,
    "bf16_fp32": replace(FLOAT, out=FP32),
    "fp16_token_scale": replace(FLOAT, operand=FP16, epilogue=(Granularity.TOKEN,)),
    "int8_expert_scale": replace(
        SMALL, operand=INT8, epilogue=(Granularity.TOKEN, Granularity.EXPERT, Bias(FP32))
    ),
    "bias": replace(SMALL, epilogue=(*SCALES, Bias(BF16))),
    "bf16_bias": replace(FLOAT, epilogue=(Bias(BF16),)),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_forms(case: Case, form: Form) -> None:
    call = make_call(case, form)
    before = [tensor.clone() for tensor in call.inputs]
    cm.index_group_matmul(**call.arguments)
    call.check()
    assert all(map(torch.equal, call.inputs, before))


@pytest.mark.parametrize("form", INDEX_FORMS.values(), ids=INDEX_FORMS.keys())
@pytest.mark.parametrize("reads", ["any", "few", "outside"])
@pytest.mark.parametrize("name", ["no_tokens", "no_rows", "one_expert", "fp8", "bf16_bias"])
def test_forms_with_an_index(name: str, reads: str, form: Form) -> None:
    if reads == "any" or CASES[name].tokens:
        call = make_call(replace(CASES[name], gather=True, reads=reads), form)
        cm.index_group_matmul(**call.arguments)
        call.check()


def test_scales_may_have_a_last_dimension_of_one() -> None:
    arguments = make_call(SMALL, Form()).arguments
    columns = {name: arguments[name][..., None] for name in ("scale", "per_token_scale")}
    call = make_call(SMALL, Form())
    cm.index_group_matmul(**{**call.arguments, **columns})
    call.check()
    call = make_call(SMALL, replace(APART, room=0))
    columns = {name: [t[..., None] for t in call.arguments[name]] for name in columns}
    cm.index_group_matmul(**{**call.arguments, **columns})
    call.check()


def test_one_tensor_may_be_the_weight_of_several_experts() -> None:
    call = make_call(SMALL, Form())
    weight = call.arguments["weight"]
    weight[2] = weight[0]
    call.arguments["weight"] = [weight[0], weight[1], weight[0]]
    cm.index_group_matmul(**call.arguments)
    weight = torch.stack(call.arguments["weight"])
    want = make_call(SMALL, Form())
    cm.index_group_matmul(**{**want.arguments, "weight": weight})
    assert same_bits(call.got, want.got)


@pytest.mark.parametrize("kind", ["cumsum", "count"])
@pytest.mark.parametrize("last", [0, 3, 100])
def test_counts_beyond_an_experts_tensor_are_cut(last: int, kind: str) -> None:
    call = make_call(SMALL, replace(APART, room=0, kind=kind))
    counts = torch.tensor([100, 50, last])
    call.arguments["group_list"].copy_(counts if kind == "count" else counts.cumsum(0))
    call.used = torch.arange(11) < 4 + last
    cm.index_group_matmul(**call.arguments)
    call.check()


def test_hints_change_nothing() -> None:
    call = make_call(SMALL, APART)
    cm.index_group_matmul(**call.arguments, expected_rows=1000, num_sms=3)
    call.check()


# The two steps.


@pytest.mark.parametrize(
    ("case", "form", "copied"),
    [
        (SMALL, Form(), 0),
        (SMALL, Form("one", "parts", "parts", "one", "one"), 0),
        (SMALL, Form(weight="apart"), 0),
        (SMALL, Form(dtype=I64), 0),
        (SMALL, replace(PARTS, weight="apart"), 0),
        (SMALL, Form(scale="apart"), 3 * 24 * 4),
        (SMALL, Form(x="apart"), 17 * 32),
        (SMALL, Form(out="apart"), 17 * 24 * 2),
        (SMALL, Form(per_token_scale="apart"), 17 * 4),
        (replace(SMALL, n=2048, k=4096), Form(weight="apart"), 0),
    ],
    ids=str,
)
def test_workspace_holds_what_must_be_copied(case: Case, form: Form, copied: int) -> None:
    arguments = make_call(case, form).arguments
    size, _ = cm.index_group_matmul_workspace_size(**arguments)
    groups = form.rows_per_expert or form.dtype is not I32
    assert copied <= size <= copied + (6 * 128 if copied or groups else 0)


@pytest.mark.parametrize("start", [0, 1, 64, 127, 128])
@pytest.mark.parametrize("name", ["whole", "apart", "apart_count", "count_int64", "x_apart"])
def test_any_workspace_serves(name: str, start: int) -> None:
    call = make_call(CASES["bias"], FORMS[name])
    size, executor = cm.index_group_matmul_workspace_size(**call.arguments)
    whole = torch.full((start + size + 99,), 0xA5, dtype=torch.uint8)
    executor.run(whole[start : start + size])
    call.check()
    assert (whole[:start] == 0xA5).all() and (whole[start + size :] == 0xA5).all()


ROUTINGS = [SMALL.counts, (0, 0, 0), (6, 2, 9), (0, 1, 0), (5, 0, 3)]


@pytest.mark.parametrize(
    "name", ["whole", "count", "cumsum_int64", "parts", "apart", "apart_count"]
)
def test_runs_read_their_tensors_anew(name: str) -> None:
    calls = [
        make_call(
            replace(SMALL, counts=counts, spare=17 - sum(counts)),
            FORMS[name],
            seed=seed,
            lengths=(6, 2, 9),
        )
        for seed, counts in enumerate(ROUTINGS)
    ]
    static = calls[0]
    size, executor = cm.index_group_matmul_workspace_size(**static.arguments)
    workspace = torch.empty(size, dtype=torch.uint8)
    for call in calls:
        static.become(call)
        executor.run(workspace)
        static.check()


def test_executor_keeps_its_tensors() -> None:
    call = make_call(SMALL, APART)
    size, executor = cm.index_group_matmul_workspace_size(**call.arguments)
    out = call.arguments["out"]
    call.arguments = {"out": out}
    executor.run(torch.empty(size, dtype=torch.uint8))
    call.check()


def test_workspace_may_be_missing_where_nothing_is_needed() -> None:
    call = make_call(SMALL, Form())
    size, executor = cm.index_group_matmul_workspace_size(**call.arguments)
    assert size == executor.workspace_size == 0
    executor.run()
    call.check()


WORKSPACES: dict[str, Callable[[int], Tensor | None]] = {
    "none": lambda size: None,
    "small": lambda size: torch.empty(size - 1, dtype=torch.uint8),
    "dtype": lambda size: torch.empty(size, dtype=torch.int8),
    "2d": lambda size: torch.empty(size, 1, dtype=torch.uint8),
    "strided": lambda size: torch.empty(2 * size, dtype=torch.uint8)[::2],
    "device": lambda size: torch.empty(size, dtype=torch.uint8, device="meta"),
}


@pytest.mark.parametrize("make", WORKSPACES.values(), ids=WORKSPACES.keys())
def test_errors_of_workspaces(make: Callable[[int], Tensor | None]) -> None:
    size, executor = cm.index_group_matmul_workspace_size(**make_call(SMALL, APART).arguments)
    wanted = rf"workspace must be contiguous torch.uint8 \[{size} or more\] on cpu, got "
    with pytest.raises(ValueError, match=wanted):
        executor.run(make(size))


def test_cpu_tensors_take_no_stream() -> None:
    _, executor = cm.index_group_matmul_workspace_size(**make_call(SMALL, Form()).arguments)
    with pytest.raises(ValueError, match="stream must be None for tensors on cpu, got 7"):
        executor.run(None, 7)


# Errors. What of a good call of SMALL is replaced, and what must come of it; E 3, N 24, K 32.

FP8 = torch.float8_e4m3fn


def fp8(*shape: int) -> Tensor:
    return torch.ones(shape).to(FP8)


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x_two": (
        {"x": [fp8(5, 32)] * 2},
        ValueError,
        "x must be .* list of 1 or 3 tensors, got .* of 2",
    ),
    "x_none": ({"x": []}, ValueError, "x must be .* list of 1 or 3 tensors, got a list of 0"),
    "x_no_tensor": ({"x": [fp8(5, 32), None, None]}, TypeError, r"x\[1\] must be .* got NoneType"),
    "x_scalars": ({"x": [fp8()] * 3}, ValueError, r"x\[0\] must have rows, got a scalar"),
    "x_dtypes": (
        {"x": [fp8(4, 32), fp8(0, 32).to(torch.int8), fp8(9, 32)]},
        TypeError,
        r"x\[1\] must be torch.float8_e4m3fn like x\[0\], got torch.int8",
    ),
    "x_k": (
        {"x": [fp8(4, 32), fp8(0, 32), fp8(9, 16)]},
        ValueError,
        r"x\[2\] must have the shape of x\[0\], \(4, 32\), but for the first extent, got \(9, 16\)",
    ),
    "x_rows": (
        {"x": [fp8(4, 32), fp8(0, 32), fp8(7, 32)]},
        ValueError,
        r"per_token_scale must have shape \(11,\) or \(11, 1\), got \(13,\)",
    ),
    "x_dtype": ({"x": torch.ones(13, 32)}, TypeError, "x must be .* got torch.float32"),
    "x_with_index": (
        {"x": list(fp8(13, 32).split((4, 0, 9))), "index": torch.zeros(13, dtype=I32)},
        ValueError,
        "x must be one tensor if index is given, got a list of 3 tensors",
    ),
    "token_scale_with_index": (
        {"per_token_scale": [torch.ones(4)] * 3, "index": torch.zeros(13, dtype=I32)},
        ValueError,
        "per_token_scale must be one tensor if index is given, got a list of 3 tensors",
    ),
    "token_scale_rows": (
        {
            "x": list(fp8(13, 32).split((4, 0, 9))),
            "per_token_scale": list(torch.ones(13).split((4, 1, 8))),
        },
        ValueError,
        r"per_token_scale must have as many rows per expert as .*, \[4, 0, 9\], got \[4, 1, 8\]",
    ),
    "token_scale_missing": (
        {"per_token_scale": None},
        ValueError,
        "per_token_scale must be given: .*need per_token_scale and scale, got None",
    ),
    "weight_none": ({"weight": []}, ValueError, "weight must be .* got a list of 0"),
    "weight_2d": (
        {"weight": fp8(24, 32)},
        ValueError,
        r"weight.* must be \[E, N, K\], got \(24, 32\)",
    ),
    "weight_shapes": (
        {"weight": [fp8(24, 32), fp8(24, 32), fp8(16, 32)]},
        ValueError,
        r"weight\[2\] must be \[N, K\] like weight\[0\], \(24, 32\), got \(16, 32\)",
    ),
    "weight_3d": (
        {"weight": [fp8(1, 24, 32)] * 3},
        ValueError,
        r"weight\[0\] must be \[N, K\] .*, got \(1, 24, 32\)",
    ),
    "weight_k": (
        {"weight": [fp8(24, 16) for _ in range(3)]},
        ValueError,
        r"weight must be .*32\), got \(3, 24, 16\)",
    ),
    "weight_n_major": (
        {"weight": [fp8(24, 32), fp8(32, 24).T, fp8(24, 32)]},
        ValueError,
        r"weight must have K dense.* got strides \(0, 1, 24\)",
    ),
    "weight_pitch": (
        {"weight": [fp8(24, 32), fp8(24, 40)[:, :32], fp8(24, 32)]},
        ValueError,
        r"weight must .*multiples of 16.* got strides \(0, 40, 1\)",
    ),
    "weight_dtype": (
        {"weight": [torch.ones(24, 32, dtype=torch.int8) for _ in range(3)]},
        TypeError,
        "weight must be torch.float8_e4m3fn.* got torch.int8",
    ),
    "scale_missing": (
        {"scale": None},
        ValueError,
        "scale must be given: .*need .* and scale, got None",
    ),
    "scale_shape": (
        {"scale": [torch.ones(25) for _ in range(3)]},
        ValueError,
        r"scale\[0\] must have shape \(24,\) or \(24, 1\) or \(1,\) or \(\), got \(25,\)",
    ),
    "scale_shape_whole": (
        {"scale": torch.ones(24)},
        ValueError,
        r"scale must have shape \(3, 24\) or \(3, 24, 1\) or \(3,\) or \(3, 1, 1\), got \(24,\)",
    ),
    "scale_mixed": (
        {"scale": [torch.ones(24), torch.ones(24, 1), torch.ones(24)]},
        ValueError,
        r"scale\[1\] must have the shape of scale\[0\], \(24,\), .*, got \(24, 1\)",
    ),
    "out_rows": (
        {"out": torch.empty(12, 24, dtype=torch.bfloat16)},
        ValueError,
        r"out must have shape \(13, 24\), got \(12, 24\)",
    ),
    "out_list_rows": (
        {"out": [torch.empty(4, 24, dtype=torch.bfloat16)] * 3},
        ValueError,
        r"out must have shape \(13, 24\), got \(12, 24\)",
    ),
    "out_dtype": ({"out": fp8(13, 24)}, TypeError, "out.* must be .*float32.* got .*e4m3fn"),
    "groups_dtype": (
        {"group_list": torch.tensor([4, 4, 11]).short()},
        TypeError,
        "group_list must be torch.int32 or torch.int64, got torch.int16",
    ),
    "groups_shape": (
        {"group_list": torch.zeros(4, dtype=I32)},
        ValueError,
        r"group_list must have shape \(3,\), got \(4,\)",
    ),
    "groups_kind": (
        {"group_list_type": "counts"},
        ValueError,
        "group_list_type must be 'cumsum' or 'count', got 'counts'",
    ),
    "index_dtype": (
        {"index": torch.zeros(13, dtype=torch.int16)},
        TypeError,
        "index must be torch.int32, got torch.int16",
    ),
    "expected_rows": ({"expected_rows": -5}, ValueError, "expected_rows must be 0 or more, got -5"),
    "bias_shape": ({"bias": torch.ones(24)}, ValueError, r"bias must have shape \(3, 24\)"),
    "accumulation": (
        {"accumulation": "exact"},
        ValueError,
        "accumulation must be fast or two_level .*, got 'exact'",
    ),
    "num_sms": ({"num_sms": 0}, ValueError, "num_sms must be .* got 0"),
}


@pytest.mark.parametrize("n_major", [(1,), (0, 2), (2,)], ids=str)
def test_a_list_of_k_dense_and_n_dense_weights_is_refused(n_major: tuple[int, ...]) -> None:
    weights = [torch.ones(24, 32, dtype=torch.bfloat16) for _ in range(3)]
    for e in n_major:
        weights[e] = torch.ones(32, 24, dtype=torch.bfloat16).T
    call = make_call(FLOAT, Form())
    other, dense = (1, "N") if 0 in n_major else (n_major[0], "K")
    with pytest.raises(
        ValueError, match=rf"weight\[{other}\] must have {dense} dense .*weight\[0\]"
    ):
        cm.index_group_matmul(**{**call.arguments, "weight": weights})


def test_a_misaligned_weight_is_refused_by_name() -> None:
    call = make_call(SMALL, APART)
    weights = list(call.arguments["weight"])
    weights[2] = torch.ones(24 * 32 + 1).to(FP8)[1:].view(24, 32)
    with pytest.raises(ValueError, match=r"address of weight\[2\] must be a multiple of 16 bytes"):
        cm.index_group_matmul(**{**call.arguments, "weight": weights})


@pytest.mark.parametrize("call", [cm.index_group_matmul, cm.index_group_matmul_workspace_size])
@pytest.mark.parametrize(("change", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(
    call: Callable[..., Any], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(**{**make_call(SMALL, Form()).arguments, **change})


@pytest.mark.parametrize("name", ["weight", "scale", "per_token_scale", "group_list", "out"])
def test_tensors_elsewhere_raise(name: str) -> None:
    arguments = make_call(SMALL, Form()).arguments
    with FakeTensorMode(allow_non_fake_inputs=True):  # a CUDA tensor without a GPU
        arguments[name] = torch.empty_like(arguments[name], device="cuda")
        with pytest.raises(ValueError, match=f"{name} must be on cpu, got one on cuda"):
            cm.index_group_matmul(**arguments)


@pytest.mark.parametrize("form", [Form(), APART], ids=["whole", "apart"])
@pytest.mark.parametrize("name", ["x", "weight", "out"])
def test_gradients_are_not_lost(name: str, form: Form) -> None:
    call = make_call(FLOAT, form)
    value = call.arguments[name]
    (value if isinstance(value, Tensor) else value[-1]).requires_grad_()
    with pytest.raises(RuntimeError, match="index_group_matmul has no gradient"):
        cm.index_group_matmul(**call.arguments)
    with torch.no_grad():
        size, executor = cm.index_group_matmul_workspace_size(**call.arguments)
    workspace = torch.empty(size, dtype=torch.uint8)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            executor.run(workspace)
        call.check()
        assert call.got.requires_grad == (name == "out") and not workspace.requires_grad


HOWS = ["whole", "parts", "apart"]


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    hows=st.tuples(*[st.sampled_from(HOWS)] * 5),
    kind=st.sampled_from(["cumsum", "count"]),
    dtype=st.sampled_from([I32, I64]),
    room=st.integers(0, 2),
    gather=st.booleans(),
)
def test_any_call_is_that_of_single_tensors(
    counts: list[int],
    hows: tuple[str, ...],
    kind: str,
    dtype: torch.dtype,
    room: int,
    gather: bool,
) -> None:
    form = Form(*hows, kind, dtype, room)
    if gather:
        form = replace(form, x="whole", per_token_scale="whole")
    call = make_call(replace(SMALL, counts=tuple(counts), gather=gather), form)
    cm.index_group_matmul(**call.arguments)
    call.check()


def test_both_forms_take_the_same_arguments() -> None:
    whole = inspect.signature(cm.index_group_matmul)
    assert inspect.signature(cm.index_group_matmul_workspace_size).parameters == whole.parameters
    prepared = inspect.signature(cm.index_group_matmul_workspace_size)
    assert (whole.return_annotation, prepared.return_annotation) == ("None", "tuple[int, Executor]")
    assert ListArguments._fields == tuple(whole.parameters)
    defaults = {n: p.default for n, p in whole.parameters.items() if p.default is not p.empty}
    assert ListArguments._field_defaults == defaults
    with pytest.raises(TypeError, match="stream"):
        cm.index_group_matmul_workspace_size(*"xwspgo", stream=0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="out"):
        cm.index_group_matmul_workspace_size(*"xwspg")  # type: ignore[call-arg]
