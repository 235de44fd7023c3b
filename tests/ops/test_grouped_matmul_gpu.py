"""grouped_matmul on a GPU."""

from __future__ import annotations

import shutil
import threading
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe.compat.deep_gemm import get_mn_major_tma_aligned_tensor as in_columns
from cutlass_moe.images.cache import MissingImage
from cutlass_moe.operands import Operands, Options
from cutlass_moe.ops import dispatch
from cutlass_moe.ops.grouped_matmul_reference import grouped_matmul_backward
from cutlass_moe.runtime import library
from emitters.spec.registry import GemmConfig
from tests.support.cases import (
    BASE,
    BIG_CASES,
    CASES,
    FLOAT,
    RAGGED,
    SPLIT_CONFIGS,
    Case,
    alternate,
    config_cases,
    hot,
    make_inputs,
    skewed,
)
from tests.support.numerics import check, errors, limits, opcheck, poisoned, same_bits, untouched

pytestmark = pytest.mark.gpu


def launch(case: Case, inputs: dict[str, Any], **options: Any) -> Tensor:
    """The output of grouped_matmul_out, written over poison."""
    out = poisoned(case.rows, case.problem.out_columns, inputs["out_dtype"], "cuda")
    cm.grouped_matmul_out(out, **inputs, **options)
    return out


@pytest.mark.parametrize("exact", [False, True], ids=["normal", "exact"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_cases(case: Case, exact: bool) -> None:
    inputs = make_inputs(case, "cuda", exact)
    check(launch(case, inputs), case, inputs, exact)


@pytest.mark.big
@pytest.mark.parametrize("case", BIG_CASES.values(), ids=BIG_CASES.keys())
def test_offsets_beyond_31_bits(case: Case) -> None:
    inputs = make_inputs(case, "cuda")
    check(launch(case, inputs), case, inputs)


def _config_id(value: object) -> str:
    if not isinstance(value, GemmConfig):
        return str(value)
    return "-".join(str(field) for field in value.to_json().values())


@pytest.mark.parametrize("num_sms", [None, 3], ids=["all_sms", "3_sms"])
@pytest.mark.parametrize(("name", "config"), config_cases(), ids=_config_id)
def test_every_config(name: str, config: GemmConfig, num_sms: int | None) -> None:
    case = CASES[name]
    for exact in (True, False):
        inputs = make_inputs(case, "cuda", exact)
        if case.problem.block_rows and getattr(config, "tma_x", False):
            inputs["per_token_scale"] = in_columns(inputs["per_token_scale"])
        with dispatch.forced_config(config):
            check(launch(case, inputs, num_sms=num_sms), case, inputs, exact)


@pytest.mark.parametrize("name", ["blocks_no_index", "blocks_spans"])
def test_scales_anywhere_give_the_same_bits(name: str) -> None:
    case = CASES[name]
    inputs = make_inputs(case, "cuda")
    want, scale = launch(case, inputs), inputs["per_token_scale"]
    columns = in_columns(scale)
    moved = in_columns(torch.cat((scale[:1], scale)))[1:]
    assert columns.stride() == (1, -(-len(scale) // 4) * 4) and moved.data_ptr() % 16 == 4
    rows = scale.new_empty(scale.numel() + 1)[1:].view_as(scale).copy_(scale)
    # rows at boundaries of 4 and of 16 bytes
    apart, padded = (torch.nn.functional.pad(scale, (0, i))[:, :-i] for i in (1, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the address costs a copy
        for given in (columns, moved, rows, apart, padded):
            assert same_bits(launch(case, {**inputs, "per_token_scale": given}), want)


@pytest.mark.parametrize("num_sms", [1, 7, 10_000])
def test_num_sms_changes_no_bit(num_sms: int) -> None:
    case = CASES["tokens_16384"]
    inputs = make_inputs(case, "cuda")
    assert same_bits(launch(case, inputs, num_sms=num_sms), launch(case, inputs))


@pytest.mark.parametrize("expected_rows", [1, 100_000])
def test_expected_rows_is_a_hint_only(expected_rows: int) -> None:
    case = CASES["ragged"]
    inputs = make_inputs(case, "cuda", exact=True)
    check(launch(case, inputs, expected_rows=expected_rows), case, inputs, exact=True)


@pytest.mark.parametrize("name", ["tokens_16384", "bf16_fp32_bf16", "int8_int32_fp32", "outside"])
def test_two_runs_give_the_same_bytes(name: str) -> None:
    inputs = make_inputs(CASES[name], "cuda")
    assert same_bits(launch(CASES[name], inputs), launch(CASES[name], inputs))


@pytest.mark.parametrize("config", SPLIT_CONFIGS, ids=_config_id)
def test_split_k_adds_in_the_same_order_every_time(config: GemmConfig) -> None:
    inputs = make_inputs(CASES["k_7168"], "cuda")
    with dispatch.forced_config(config):
        first, *others = (launch(CASES["k_7168"], inputs) for _ in range(20))
    assert all(same_bits(first, other) for other in others)


def test_only_what_the_routing_names_is_read() -> None:
    """NaNs in weights of empty experts and in tokens that no row reads change nothing."""
    case = replace(FLOAT, counts=alternate(8, 400))
    inputs = make_inputs(case, "cuda")
    clean = launch(case, inputs)
    inputs["weight"][::2] = torch.nan
    unread = torch.ones(case.tokens, dtype=torch.bool, device="cuda")
    unread[inputs["index"][: sum(case.counts)].long()] = False
    assert unread.any()
    inputs["x"][unread] = torch.nan
    assert same_bits(launch(case, inputs), clean)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_index_outside_gives_zeros_whatever_the_weights_hold(value: float) -> None:
    inputs = make_inputs(FLOAT, "cuda")
    inputs["weight"].fill_(value)
    inputs["index"].fill_(-1)
    inputs["index"][1::2] = FLOAT.tokens
    assert not launch(FLOAT, inputs)[: sum(FLOAT.counts)].any()


def test_offsets_past_the_rows_are_clamped() -> None:
    case = replace(BASE, counts=RAGGED, spare=0)
    inputs = make_inputs(case, "cuda")
    inputs["offsets"][-1] = case.rows + 1000
    check(launch(case, inputs), case, inputs)


def test_weight_may_be_a_strided_view() -> None:
    case = CASES["ragged"]
    inputs = make_inputs(case, "cuda")
    wide = make_inputs(replace(case, n=2 * case.n), "cuda", seed=1)["weight"]
    wide[:, : case.n] = inputs["weight"]
    view = wide[:, : case.n]
    assert same_bits(launch(case, {**inputs, "weight": view}), launch(case, inputs))


@pytest.mark.parametrize("name", ["bf16_fp32_bf16", "experts_3", "bias_bf16", "expert_scale"])
def test_functional_form(name: str) -> None:
    case = CASES[name]
    end = sum(case.counts)
    inputs = make_inputs(case, "cuda")
    got = cm.grouped_matmul(**inputs)
    assert got.shape == (case.rows, case.problem.out_columns) and got.dtype == inputs["out_dtype"]
    assert same_bits(got[:end], launch(case, inputs)[:end])


def test_scales_may_have_a_last_dimension_of_one() -> None:
    case = CASES["ragged"]
    inputs = make_inputs(case, "cuda")
    columns = {name: inputs[name][..., None] for name in ("scale", "per_token_scale")}
    assert same_bits(launch(case, {**inputs, **columns}), launch(case, inputs))


def test_runs_in_order_on_the_current_stream() -> None:
    """The kernel must wait for what its stream does before it, and nobody else."""
    case = CASES["ragged"]
    late = make_inputs(case, "cuda")
    inputs = {k: torch.zeros_like(v) if isinstance(v, Tensor) else v for k, v in late.items()}
    launch(case, inputs)  # loads the kernel
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for name, value in late.items():
            if isinstance(value, Tensor):
                inputs[name].copy_(value)
        out = launch(case, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    check(out, case, late)


def test_threads_on_streams_of_their_own() -> None:
    names = ["ragged", "bf16_fp32_bf16", "ragged", "outside", "experts_128", "tokens_16384"]
    jobs = [(CASES[n], make_inputs(CASES[n], "cuda", seed=seed)) for seed, n in enumerate(names)]
    wanted = [launch(case, inputs) for case, inputs in jobs]
    torch.cuda.synchronize()
    start = threading.Barrier(len(jobs))
    failures: list[object] = []

    def work(case: Case, inputs: dict[str, Any], want: Tensor) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                start.wait()
                outs = [launch(case, inputs) for _ in range(20)]
                if not all(same_bits(out, want) for out in outs):
                    failures.append(case)
        except Exception as error:  # a thread's exception would be lost
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=(case, inputs, want))
        for (case, inputs), want in zip(jobs, wanted, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


REPLAYED = {  # 400 rows, 5 of them spare
    "skewed": skewed(8, 395),
    "one_hot": hot(8, 395),
    "empty_experts": (0, 100, 0, 100, 0, 100, 0, 95),
    "no_rows": (0,) * 8,
    "fixed": (49,) * 8,
}


@pytest.mark.parametrize("functional", [False, True], ids=["out", "functional"])
def test_graph_replays_with_a_new_routing(functional: bool) -> None:
    cases = [
        replace(BASE, counts=counts, spare=400 - sum(counts), reads=reads)
        for counts in REPLAYED.values()
        for reads in ("any", "outside")
    ]
    static = make_inputs(cases[0], "cuda")
    out = launch(cases[0], static)  # loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        if functional:
            out = cm.grouped_matmul(**static)
        else:
            cm.grouped_matmul_out(out, **static)
    for seed, case in enumerate(cases):
        inputs = make_inputs(case, "cuda", seed=seed)
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                static[name].copy_(value)
        fresh = poisoned(case.rows, case.problem.out_columns, out.dtype, "cuda")
        out.copy_(fresh)
        graph.replay()
        end = sum(case.counts)
        fresh[:end] = out[:end]
        check(fresh, case, inputs)
        assert functional or untouched(out, ~case.owned.cuda())


def test_capture_of_a_kernel_that_is_not_loaded_names_warmup() -> None:
    inputs = make_inputs(replace(BASE, n=1016), "cuda")
    with (
        pytest.raises(RuntimeError, match="warmup"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        cm.grouped_matmul(**inputs)
    torch.cuda.synchronize()  # the failed capture left the device usable
    check(launch(BASE, make_inputs(BASE, "cuda")), BASE, make_inputs(BASE, "cuda"))


def test_warmup_loads_what_capture_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["ragged"]
    inputs = make_inputs(case, "cuda")
    monkeypatch.setattr(library, "_kernels", {})
    cm.warmup(cm.grouped_matmul_problem(**inputs))
    graph = torch.cuda.CUDAGraph()
    out = poisoned(case.rows, case.problem.out_columns, inputs["out_dtype"], "cuda")
    with torch.cuda.graph(graph):
        cm.grouped_matmul_out(out, **inputs)
    graph.replay()
    check(out, case, inputs)


def test_missing_image_without_jit_names_the_build_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("CUTLASS_MOE_JIT", "0")
    monkeypatch.setenv("CUTLASS_MOE_CACHE_DIR", str(tmp_path))
    with pytest.raises(MissingImage, match="cutlass-moe build"):
        cm.grouped_matmul(**make_inputs(replace(BASE, n=1016), "cuda"))


HAS_C_COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=pytest.mark.skipif(not HAS_C_COMPILER, reason="inductor needs a C compiler"),
        ),
    ],
)
@pytest.mark.parametrize("name", ["ragged", "bf16_fp32_bf16"])
def test_compiles_as_one_graph(name: str, backend: str) -> None:
    case = CASES[name]
    end = sum(case.counts)

    def layer(inputs: dict[str, Any]) -> Tensor:
        return cm.grouped_matmul(**inputs).relu()

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for tokens in (case.tokens, case.tokens + 8, case.tokens + 24):  # the later ones with dynamic T
        inputs = make_inputs(replace(case, tokens=tokens), "cuda")
        assert same_bits(compiled(inputs)[:end], layer(inputs)[:end])


def test_routing_and_product_compile_together() -> None:
    topk_ids = torch.randint(-1, 8, (200, 2), device="cuda")
    inputs = make_inputs(BASE, "cuda")
    del inputs["index"], inputs["offsets"]

    def layer(topk_ids: Tensor) -> Tensor:
        table = cm.route(topk_ids, 8)
        out = cm.grouped_matmul(index=table.index, offsets=table.offsets, **inputs)
        return out[table.inverse[:, 0].clamp(min=0)]

    kept = topk_ids[:, 0] >= 0
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(topk_ids)
    assert same_bits(got[kept], layer(topk_ids)[kept])


@pytest.mark.parametrize("name", ["one_token_8_experts", "bias_bf16", "bf16_fp32_bf16", "n_8"])
def test_opcheck(name: str) -> None:
    opcheck(replace(CASES[name], spare=0), "cuda")


def test_backward_with_scales() -> None:
    """Against the same formulas in float64; bf16 rounds the gradients. Others: see
    test_grouped_matmul_gradient_gpu.py."""
    case = CASES["float_scales"]
    inputs = make_inputs(case, "cuda")
    names = ("x", "weight", "per_token_scale", "scale", "bias")
    leaves = {k: inputs[k].requires_grad_() for k in names if inputs.get(k) is not None}
    out = cm.grouped_matmul(**inputs)
    grad = torch.randn(out.shape, device="cuda").to(out.dtype)
    found = torch.autograd.grad(out, list(leaves.values()), grad)
    wide: dict[str, Any] = {
        k: None if inputs.get(k) is None else inputs[k].detach().double() for k in names
    }
    operands = Operands(index=inputs["index"], offsets=inputs["offsets"], **wide)
    wanted = grouped_matmul_backward(grad.double(), operands, Options(), (True,) * 5)
    for key, got in zip(leaves, found, strict=True):
        want = wanted[names.index(key)]
        assert want is not None and got.shape == want.shape and got.dtype == inputs[key].dtype
        found_errors = errors(got.reshape(len(got), -1), want.reshape(len(got), -1))
        assert found_errors.whole <= limits(FLOAT.problem).whole, key


def test_gradients_of_8_bit_operands_raise() -> None:
    inputs = make_inputs(BASE, "cuda")
    inputs["scale"].requires_grad_()
    with pytest.raises(RuntimeError, match="grad"):
        cm.grouped_matmul(**inputs)


@pytest.mark.parametrize("name", ["weight", "index", "offsets", "scale", "per_token_scale", "bias"])
def test_tensors_elsewhere_raise(name: str) -> None:
    inputs = make_inputs(CASES["bias_bf16"], "cuda")
    inputs[name] = inputs[name].cpu()
    with pytest.raises(ValueError, match=rf"{name} must be on cuda.*got.*cpu"):
        cm.grouped_matmul(**inputs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_where_its_tensors_are() -> None:
    case = CASES["ragged"]
    wanted = launch(case, make_inputs(case, "cuda:0"))
    inputs: dict[str, Any] = {
        k: v.to("cuda:1") if isinstance(v, Tensor) else v
        for k, v in make_inputs(case, "cuda:0").items()
    }
    out = poisoned(case.rows, case.problem.out_columns, inputs["out_dtype"], "cuda:1")
    cm.grouped_matmul_out(out, **inputs)
    assert torch.cuda.current_device() == 0
    assert same_bits(out.cpu(), wanted.cpu())


UNSUPPORTED = replace(FLOAT, k=12)  # rows of 24 bytes


def test_refused_problem_warns_once_and_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUTLASS_MOE_STRICT", raising=False)
    inputs = make_inputs(UNSUPPORTED, "cuda")
    with pytest.warns(UserWarning, match="16 bytes"):
        check(launch(UNSUPPORTED, inputs), UNSUPPORTED, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(launch(UNSUPPORTED, inputs), UNSUPPORTED, inputs)


def test_refused_problem_raises_when_strict_or_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(UNSUPPORTED, "cuda")
    with (
        pytest.raises(RuntimeError, match="16 bytes"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        cm.grouped_matmul(**inputs)
    monkeypatch.setenv("CUTLASS_MOE_STRICT", "1")
    with pytest.raises(RuntimeError, match="16 bytes"):
        cm.grouped_matmul(**inputs)
