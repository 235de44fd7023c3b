"""index_group_matmul on a GPU."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe.choose.heuristics_sm90 import candidates, choose
from cutlass_moe.ops import dispatch
from emitters.spec.dtypes import Accumulation
from emitters.spec.epilogue import Bias
from emitters.spec.gemm import GemmProblem, Granularity, WeightStorage
from emitters.spec.registry import GemmConfig
from tests.support.cases import BF16, FP32, INT8, RAGGED, SCALES, Case, skewed
from tests.support.forms import APART, FORMS, INDEX_FORMS, Form, make_call

pytestmark = pytest.mark.gpu

BASE = Case(counts=RAGGED, gather=False)
SCALED = (*SCALES, Bias(FP32))
CASES = {
    "no_rows": replace(BASE, counts=(0,) * 8),
    "no_rows_at_all": replace(BASE, counts=(0,) * 8, spare=0),
    "one_expert": replace(BASE, counts=(130,)),
    "fp8": BASE,
    "fp8_tails": replace(BASE, n=72, k=80, epilogue=SCALED),
    "two_level": replace(BASE, accumulation=Accumulation.TWO_LEVEL, n=264, epilogue=SCALED),
    "bf16": replace(BASE, operand=BF16, n=520, k=72, epilogue=()),
    "bf16_fp32": replace(BASE, operand=BF16, out=FP32, n=4, k=8, epilogue=(Bias(BF16),)),
    "int8_expert_scale": replace(BASE, operand=INT8, epilogue=(*SCALES[:1], Granularity.EXPERT)),
    "many_rows": replace(BASE, counts=skewed(8, 9000), n=512, k=512),
    "experts_33": replace(BASE, counts=skewed(33, 700)),
    "experts_512": replace(BASE, counts=skewed(512, 3000), n=64, k=64),
}
INDEX_CASES = {
    "fp8": replace(BASE, gather=True),
    "outside": replace(BASE, gather=True, reads="outside", epilogue=SCALED),
    "bf16": replace(BASE, gather=True, operand=BF16, epilogue=()),
}
MOST_EXPERTS = replace(BASE, counts=skewed(1024, 3000), n=8, k=16)
_TAILS = CASES["fp8_tails"].problem
TABLE = replace(_TAILS, weight=replace(_TAILS.weight, storage=WeightStorage.TABLE))

# Routings of one graph's replays, and rows of the experts' tensors where they come one per expert.
LENGTHS = (64, 140, 70, 20)
REPLAYED = [
    replace(BASE, counts=counts, spare=150 - sum(counts))
    for counts in [(1, 30, 0, 7), (0, 0, 0, 0), (64, 0, 65, 10), (0, 140, 0, 0), (5, 6, 70, 19)]
]


def images() -> set[tuple[GemmProblem, GemmConfig]]:
    """Every (problem, config) that these tests may run."""
    asked = {(TABLE, config) for config in candidates(TABLE)}
    for case in (*CASES.values(), *INDEX_CASES.values(), MOST_EXPERTS, *REPLAYED):
        experts = len(case.counts)
        lengths = [count + Form.room for count in case.counts]
        for rows in (case.rows, sum(case.counts), sum(lengths), sum(LENGTHS)):
            for how in WeightStorage:
                problem = replace(case.problem, weight=replace(case.problem.weight, storage=how))
                asked.add((problem, choose(problem, case.tokens, rows / experts)))
    return asked


def prepare(arguments: dict[str, Any]) -> tuple[Tensor, Any]:
    """A workspace full of rubbish, and the executor."""
    size, executor = cm.index_group_matmul_workspace_size(**arguments)
    return torch.full((size,), 0xA5, dtype=torch.uint8, device=executor.device), executor


def requests() -> dict[str, int]:
    """How often memory of the device and pinned memory were asked for."""
    device, host = torch.cuda.memory_stats(), torch.cuda.host_memory_stats()
    asked = {key: value for key, value in host.items() if key.endswith("s.allocated")}
    return {**asked, "device": device["allocation.all.allocated"]}


def run_quietly(executor: Any, workspace: Tensor) -> None:
    """Asserts that a run allocates nothing and waits for nothing."""
    before = requests()
    torch.cuda.set_sync_debug_mode("error")
    try:
        executor.run(workspace)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert requests() == before


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_forms(case: Case, form: Form) -> None:
    call = make_call(case, form, "cuda")
    workspace, executor = prepare(call.arguments)
    run_quietly(executor, workspace)
    call.check()


@pytest.mark.parametrize("form", INDEX_FORMS.values(), ids=INDEX_FORMS.keys())
@pytest.mark.parametrize("case", INDEX_CASES.values(), ids=INDEX_CASES.keys())
def test_forms_with_an_index(case: Case, form: Form) -> None:
    call = make_call(case, form, "cuda")
    workspace, executor = prepare(call.arguments)
    run_quietly(executor, workspace)
    call.check()


@pytest.mark.parametrize("name", ["count", "count_int64", "cumsum_int64", "apart_count", "apart"])
def test_most_experts(name: str) -> None:
    call = make_call(MOST_EXPERTS, FORMS[name], "cuda")
    workspace, executor = prepare(call.arguments)
    run_quietly(executor, workspace)
    call.check()


@pytest.mark.parametrize("form", [Form(), APART, FORMS["count_int64"]], ids=str)
def test_in_one_step(form: Form) -> None:
    for seed in range(20):  # the pinned tables of one call must outlive its copies
        call = make_call(BASE, form, "cuda", seed)
        cm.index_group_matmul(**call.arguments)
        call.check()


@pytest.mark.parametrize("how", ["apart", "pitches"])
@pytest.mark.parametrize("num_sms", [None, 3], ids=["all_sms", "3_sms"])
@pytest.mark.parametrize("config", candidates(TABLE), ids=str)
def test_tables_with_every_candidate(config: GemmConfig, num_sms: int | None, how: str) -> None:
    call = make_call(CASES["fp8_tails"], Form(weight=how), "cuda")
    with dispatch.forced_config(config):
        workspace, executor = prepare({**call.arguments, "num_sms": num_sms})
    executor.run(workspace)  # by the kernel whose boxes its table has
    call.check()


def test_one_tensor_may_be_the_weight_of_several_experts() -> None:
    call, want = make_call(BASE, Form(), "cuda"), make_call(BASE, Form(), "cuda")
    first, *rest = want.arguments["weight"]
    listed = [first, *rest[:-1], first]
    want.arguments["weight"][-1] = first
    cm.index_group_matmul(**want.arguments)
    cm.index_group_matmul(**{**call.arguments, "weight": listed})
    call.want = want.got
    call.check()


def test_weights_are_not_copied() -> None:
    call = make_call(CASES["many_rows"], Form(weight="apart"), "cuda")
    size, _ = cm.index_group_matmul_workspace_size(**call.arguments)
    assert size <= 8 * 128 + 127


# Streams and graphs.


@pytest.mark.parametrize("how", ["current", "stream", "handle", "default", "default_handle"])
@pytest.mark.parametrize("name", ["apart", "apart_count", "count_int64"])
def test_runs_on_the_stream_it_is_given(name: str, how: str) -> None:
    """The stream is asleep and the inputs arrive on it late: on another, rubbish is read."""
    call, late = (make_call(BASE, FORMS[name], "cuda", seed) for seed in (0, 1))
    workspace, executor = prepare(call.arguments)
    default = how.startswith("default")
    stream = torch.cuda.default_stream() if default else torch.cuda.Stream()
    other = torch.cuda.Stream()
    given = {
        "current": None,
        "stream": stream,
        "handle": stream.cuda_stream,
        "default": stream,
        "default_handle": 0,
    }[how]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        call.become(late)
    with torch.cuda.stream(stream if given is None else other):
        executor.run(workspace, given)
    stream.synchronize()
    call.check()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices() -> None:
    call = make_call(BASE, APART, "cuda:1")
    workspace, executor = prepare(call.arguments)
    executor.run(workspace)
    assert torch.cuda.current_device() == 0
    call.check()
    with pytest.raises(ValueError, match="stream must be one of cuda:1, got one of cuda:0"):
        executor.run(workspace, torch.cuda.Stream(0))
    with pytest.raises(ValueError, match=r"workspace must be .* on cuda:1, got .* on cuda:0"):
        executor.run(workspace.to("cuda:0"))


@pytest.mark.parametrize(
    "name", ["whole", "count", "cumsum_int64", "parts", "apart", "apart_count", "weight_apart"]
)
def test_captured_runs_replay_with_new_contents(name: str) -> None:
    calls = [
        make_call(case, FORMS[name], "cuda", seed, LENGTHS) for seed, case in enumerate(REPLAYED)
    ]
    static = calls[0]
    workspace, executor = prepare(static.arguments)
    executor.run(workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        executor.run(workspace)
    for call in calls:
        static.become(call)
        workspace.fill_(0xA5)
        graph.replay()
        static.check()


@pytest.mark.parametrize("name", ["whole", "count_int64", "scale_apart", "weight_parts"])
def test_one_step_may_be_captured_without_tables(name: str) -> None:
    call, late = (make_call(BASE, FORMS[name], "cuda", seed) for seed in (0, 1))
    cm.index_group_matmul(**call.arguments)  # loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cm.index_group_matmul(**call.arguments)
    call.become(late)
    graph.replay()
    call.check()


@pytest.mark.parametrize("name", ["weight_apart", "x_parts", "out_apart"])
def test_one_step_with_tables_raises_under_capture(name: str) -> None:
    call = make_call(BASE, FORMS[name], "cuda")
    cm.index_group_matmul(**call.arguments)  # loads the kernel
    with (
        pytest.raises(RuntimeError, match="needs tables from the host: prepare it before"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        cm.index_group_matmul(**call.arguments)
    torch.cuda.synchronize()  # the failed capture left the device usable
    cm.index_group_matmul(**call.arguments)
    call.check()


# Without a kernel, and errors.

REFUSED = replace(BASE, operand=BF16, k=20, epilogue=())  # rows of 40 bytes


def test_refused_problem_warns_once_and_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUTLASS_MOE_STRICT", raising=False)
    with pytest.warns(UserWarning, match="16 bytes"):
        call = make_call(REFUSED, APART, "cuda")
        cm.index_group_matmul(**call.arguments)
    call.check()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call = make_call(REFUSED, APART, "cuda", seed=1)
        cm.index_group_matmul(**call.arguments)
    call.check()


def test_refused_problem_raises_when_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTLASS_MOE_STRICT", "1")
    with pytest.raises(RuntimeError, match="16 bytes"):
        cm.index_group_matmul(**make_call(REFUSED, APART, "cuda").arguments)


def test_weights_at_odd_addresses_raise() -> None:
    arguments = make_call(BASE, Form(weight="apart"), "cuda").arguments
    odd = torch.empty(BASE.n * BASE.k + 8, dtype=torch.float8_e4m3fn, device="cuda")
    arguments["weight"][3] = odd[8:].view(BASE.n, BASE.k)
    with pytest.raises(ValueError, match=r"address of weight\[3\] must be a multiple of 16 bytes"):
        cm.index_group_matmul(**arguments)


@pytest.mark.parametrize("name", ["weight", "scale", "per_token_scale", "group_list", "out"])
def test_tensors_elsewhere_raise(name: str) -> None:
    arguments = make_call(BASE, Form(weight="apart"), "cuda").arguments
    value = arguments[name]
    arguments[name] = [*value[:-1], value[-1].cpu()] if name == "weight" else value.cpu()
    with pytest.raises(ValueError, match=rf"{name} must be on cuda:0, got one on cpu"):
        cm.index_group_matmul(**arguments)
