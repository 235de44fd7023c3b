"""quantize_per_token and combine on a GPU: what the kernels write, to the bit where defined."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe.choose import heuristics_sm90 as heuristics
from cutlass_moe.operands import DTYPES, FLOATS
from cutlass_moe.ops.combine import combine_reference
from cutlass_moe.ops.dispatch import launch_step, step_kernel
from cutlass_moe.ops.quantize import LARGEST, quantize_per_token_reference
from cutlass_moe.runtime import fallback
from cutlass_moe.runtime.parameters import combine_values, quantize_values
from emitters.spec.dtypes import DType
from emitters.spec.layer_steps import (
    CombineProblem,
    GatherSumProblem,
    QuantizeProblem,
    Step,
    StepConfig,
)
from tests.support.layouts import misaligned, padded
from tests.support.numerics import poisoned, same_bits, untouched

pytestmark = pytest.mark.gpu

LENGTHS = (8, 72, 768, 2048, 2880, 7168, 14336, 32768)
SHAPES = [(rows, k) for k in LENGTHS for rows in (1, 7, 128, 65536) if rows * k <= 2**28]
SUMS = [(2048, 8), (4096, 2), (7168, 8), (2880, 4), (2048, 10), (72, 1), (8, 3)]  # N, k
CHOICES = (3, 17, 32)
COUNTED = QuantizeProblem(DType.FP16, DType.E4M3, 768)
quantizes = pytest.mark.parametrize(
    ("source", "dtype"), list(itertools.product(FLOATS, LARGEST)), ids=str
)


def images() -> set[tuple[Step, StepConfig]]:
    """Every (problem, config) that these tests load."""
    problems: list[Step] = [
        QuantizeProblem(DTYPES[source], DTYPES[dtype], k)
        for source, dtype, k in itertools.product(FLOATS, LARGEST, LENGTHS)
    ]
    problems += [CombineProblem(*(DTYPES[dtype],) * 2, n, k) for dtype in FLOATS for n, k in SUMS]
    problems += [CombineProblem(*(DType.BF16,) * 2, 8, 3, DTYPES[weights]) for weights in FLOATS]
    problems += [
        CombineProblem(DType.FP32, out, 72, k) for out in (DType.BF16, DType.FP16) for k in CHOICES
    ]
    problems += [GatherSumProblem(DTYPES[dtype], DTYPES[dtype], 72) for dtype in FLOATS]
    return {(problem, heuristics.step_config(problem)) for problem in [*problems, COUNTED]}


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No torch path in a kernel's place."""
    monkeypatch.setenv("CUTLASS_MOE_STRICT", "1")
    yield


def launch(
    problem: QuantizeProblem | CombineProblem,
    values: dict[str, int],
    rows: int,
    overlap: bool = False,
) -> None:
    kernel = step_kernel(problem, 0)
    assert kernel is not None
    launch_step(kernel, values, problem.ctas(rows, kernel.record.threads), 0, overlap)


def addresses(**tensors: Tensor) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def make_rows(rows: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Ordinary rows, small and large ones, rows of zeros, of infinities and NaNs, in turn."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(rows, k, generator=generator, device="cuda")
    info = torch.finfo(dtype)
    factors = torch.tensor([1.0, 1e-3, 300.0, info.tiny, info.max / 8, 0.0, 1.0], device="cuda")
    x *= factors[torch.arange(rows, device="cuda") % 7, None]
    x[6::14, 0], x[13::14, k // 2] = float("inf"), float("nan")
    return x.to(dtype)


def check_quantized(q: Tensor, scale: Tensor, x: Tensor) -> None:
    want, want_scale = quantize_per_token_reference(x, q.dtype)
    torch.testing.assert_close(scale, want_scale, rtol=0, atol=0, equal_nan=True)
    finite = want_scale.isfinite()
    assert same_bits(q[finite], want[finite])


@quantizes
@pytest.mark.parametrize(("rows", "k"), SHAPES)
def test_same_bits_as_torch(rows: int, k: int, source: torch.dtype, dtype: torch.dtype) -> None:
    x = make_rows(rows, k, source)
    q, scale = cm.quantize_per_token(x, dtype)
    check_quantized(q, scale, x)


@quantizes
def test_same_bits_as_on_the_cpu(source: torch.dtype, dtype: torch.dtype) -> None:
    x = make_rows(600, 2048, source)
    x = x[x.isfinite().all(1)]
    q, scale = cm.quantize_per_token(x, dtype)
    want, want_scale = cm.quantize_per_token(x.cpu(), dtype)
    assert same_bits(q.cpu(), want) and same_bits(scale.cpu(), want_scale)


def test_every_quotient_is_rounded_correctly() -> None:
    """A row for each of 2^17 scales, whose elements lie at and beside int8's ties."""
    generator = torch.Generator("cuda").manual_seed(1)
    largest = torch.empty(2**17, 1, device="cuda").uniform_(1, 2, generator=generator)
    ties = (torch.arange(72, device="cuda") + 0.5) * largest / 127
    steps = torch.randint(-2, 3, ties.shape, generator=generator, device="cuda")
    x = (ties.view(torch.int32) + steps.int()).view(torch.float32)
    x[:, 71:] = largest
    check_quantized(*cm.quantize_per_token(x, torch.int8), x)


@pytest.mark.parametrize(("rows", "k"), [(0, 64), (5, 0)], ids=str)
def test_nothing_to_quantise(rows: int, k: int) -> None:
    q, scale = cm.quantize_per_token(torch.empty(rows, k, device="cuda"), torch.int8)
    assert q.shape == (rows, k) and scale.tolist() == [1.0] * rows


def test_other_lengths_take_the_torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTLASS_MOE_STRICT", "0")
    x = make_rows(9, 61, torch.bfloat16)
    with pytest.warns(UserWarning, match="K must be a multiple of 8"):
        q, scale = cm.quantize_per_token(x, torch.int8)
    check_quantized(q, scale, x)


def test_strided_and_misaligned_rows() -> None:
    x = make_rows(72, 65, torch.bfloat16)
    for view in (x.T[:64], x.flatten()[1 : 1 + 72 * 64].view(64, 72)):
        check_quantized(*cm.quantize_per_token(view, torch.int8), view)


def test_per_channel() -> None:
    weight = torch.randn(3, 16, 72, device="cuda", dtype=torch.bfloat16)
    q, scale = cm.quantize_per_channel(weight, torch.float8_e4m3fn)
    check_quantized(q.view(48, 72), scale.view(48), weight.view(48, 72))


@pytest.mark.parametrize("early", [False, True], ids=["waits", "early"])
@pytest.mark.parametrize("end", [0, 1, 99, 128, 129, 2**31 - 1])
def test_rows_that_the_device_counts(end: int, early: bool) -> None:
    """And the layer's other wishes: early work, a dependent launch."""
    x = torch.randn(128, 768, device="cuda", dtype=torch.float16)
    q = torch.full((128, 768), 0x55, device="cuda", dtype=torch.uint8)
    scale = poisoned(128, 1, torch.float32, "cuda")
    offsets = torch.tensor([0, 0, end], dtype=torch.int32, device="cuda")
    target = q.view(torch.float8_e4m3fn)
    tensors = addresses(source=x, q=q, scale=scale, end=offsets[-1:])
    values = quantize_values(tensors, 128, 768 * 2, early=early)
    launch(COUNTED, values, 128, overlap=True)
    count = min(end, 128)
    want, want_scale = quantize_per_token_reference(x[:count].float(), target.dtype)
    assert same_bits(target[:count], want) and torch.equal(scale[:count, 0], want_scale)
    assert (q[count:] == 0x55).all() and untouched(scale, torch.arange(128) >= count)


def make_sum(tokens: int, n: int, k: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    """A sixth of the pairs has no row; rows that none has, and those pairs' weights, are NaN."""
    generator = torch.Generator("cuda").manual_seed(seed)
    count = tokens * k
    inverse = torch.randperm(count, generator=generator, device="cuda").int()
    dropped = torch.rand(count, generator=generator, device="cuda") < 1 / 6
    rows = torch.randn(count, n, generator=generator, device="cuda")
    rows[inverse[dropped].long()] = float("nan")
    weights = torch.rand(count, generator=generator, device="cuda").masked_fill(dropped, torch.nan)
    residual = torch.randn(tokens, n, generator=generator, device="cuda").to(dtype)
    return {
        "rows": rows.to(dtype),
        "topk_weights": weights.view(tokens, k),
        "inverse": inverse.masked_fill(dropped, -1).view(tokens, k),
        "residual": residual if seed % 2 == 0 else None,
    }


def check_sum(out: Tensor, inputs: dict[str, Any]) -> None:
    """Against float64, within the output's rounding and float32's over the sum."""
    wide = {**inputs, "rows": inputs["rows"].double(), "topk_weights": inputs["topk_weights"]}
    if inputs["residual"] is not None:
        wide["residual"] = inputs["residual"].double()
    want = combine_reference(**wide)
    absolute = {**wide, "rows": wide["rows"].abs()}
    if inputs["residual"] is not None:
        absolute["residual"] = wide["residual"].abs()
    size = combine_reference(**absolute)
    rounding = torch.finfo(out.dtype).eps / 2
    steps = inputs["inverse"].shape[1] + 1
    bound = rounding * want.abs() * 1.001 + steps * 2**-24 * size + torch.finfo(out.dtype).tiny
    assert ((out.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 128, 4096])
@pytest.mark.parametrize(("n", "k"), SUMS)
def test_combine(n: int, k: int, tokens: int, dtype: torch.dtype) -> None:
    for seed in range(2):
        inputs = make_sum(tokens, n, k, dtype, seed)
        out = poisoned(tokens, n, dtype, "cuda")
        assert cm.combine(**inputs, out=out) is out
        check_sum(out, inputs)
        assert untouched(out, torch.zeros(tokens, dtype=torch.bool))
        assert same_bits(cm.combine(**inputs), out)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", CHOICES)
def test_float32_rows_are_summed_to_a_narrow_output(k: int, out_dtype: torch.dtype) -> None:
    """As a layer does, whose rows may be larger than any float16."""
    inputs = make_sum(130, 72, k, torch.float32)
    inputs["rows"] *= 1e5
    inputs["topk_weights"] *= 1e-3
    inputs["residual"] = inputs["residual"].to(out_dtype)
    out = poisoned(130, 72, out_dtype, "cuda")
    names = {"rows": "rows", "weights": "topk_weights", "inverse": "inverse"}
    tensors = addresses(**{name: inputs[given] for name, given in names.items()})
    tensors |= addresses(residual=inputs["residual"], out=out)
    problem = CombineProblem(DType.FP32, DTYPES[out_dtype], 72, k)
    launch(problem, combine_values(tensors, 130 * k, 130, k), 130)
    check_sum(out, inputs)


def test_nothing_to_combine() -> None:
    empty = make_sum(0, 72, 1, torch.bfloat16)
    assert cm.combine(**empty).shape == (0, 72)
    inverse = torch.zeros(5, 1, dtype=torch.int32, device="cuda")
    weights = torch.full((5, 1), torch.nan, device="cuda")
    rows = torch.empty(0, 72, dtype=torch.bfloat16, device="cuda")
    assert torch.equal(cm.combine(rows, weights, inverse), rows.new_zeros(5, 72))
    residual = torch.randn(5, 72, device="cuda").bfloat16()
    assert cm.combine(rows, weights, inverse, residual=residual, out=residual) is residual


def test_other_widths_take_the_torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTLASS_MOE_STRICT", "0")
    inputs = make_sum(9, 61, 3, torch.bfloat16)
    with pytest.warns(UserWarning, match="N must be a multiple of 8"):
        check_sum(cm.combine(**inputs), inputs)


@pytest.mark.parametrize("name", ["rows", "residual", "out"])
def test_misaligned_tensors_are_copied(name: str) -> None:
    fallback.announce_copy.cache_clear()
    inputs = make_sum(9, 72, 1, torch.bfloat16)
    inputs |= {n: torch.zeros(9, 72, device="cuda").bfloat16() for n in ("residual", "out")}
    want = cm.combine(**inputs).clone()
    inputs[name] = misaligned(inputs[name])
    with pytest.warns(UserWarning, match=f"address of {name} is not a multiple of 16 bytes"):
        assert same_bits(cm.combine(**inputs), want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strided_weights_of_any_dtype_and_other_strided_tensors(dtype: torch.dtype) -> None:
    inputs = make_sum(9, 8, 3, torch.bfloat16)
    weights = inputs["topk_weights"].to(dtype)
    inputs |= {"topk_weights": weights.float(), "out": torch.zeros(9, 8, device="cuda").bfloat16()}
    want = cm.combine(**inputs).clone()
    inputs |= {"topk_weights": padded(weights), "inverse": inputs["inverse"].long()}
    inputs |= {name: padded(inputs[name]) for name in ("rows", "out")}
    assert same_bits(cm.combine(**inputs).contiguous(), want)


def test_graph_replay_with_other_data() -> None:
    """A chain of dependent launches, combine and the quantisation of what it wrote; and the ops."""
    x, sums = make_rows(128, 2048, torch.bfloat16), make_sum(128, 2048, 8, torch.bfloat16)
    q = torch.empty(128, 2048, device="cuda", dtype=torch.int8)
    scale, out = torch.empty(128, device="cuda"), torch.empty_like(x)

    tensors = addresses(
        rows=sums["rows"], weights=sums["topk_weights"], inverse=sums["inverse"], out=out
    )
    combined = combine_values(tensors, 1024, 128, 8)
    quantized = quantize_values(addresses(source=out, q=q, scale=scale), 128, 2048 * 2)

    def chain() -> None:
        launch(CombineProblem(DType.BF16, DType.BF16, 2048, 8), combined, 128)
        launch(QuantizeProblem(DType.BF16, DType.INT8, 2048), quantized, 128, overlap=True)

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
        eager_q, eager_scale = cm.quantize_per_token(x, torch.int8)
        eager_out = cm.combine(**sums)
    for seed in (2, 3, 4):
        for name, tensor in make_sum(128, 2048, 8, torch.bfloat16, 2 * seed).items():
            sums[name].copy_(tensor)
        x.copy_(make_rows(128, 2048, torch.bfloat16, seed))
        graph.replay()
        check_sum(out, {**sums, "residual": None})
        check_quantized(q, scale, out)
        check_quantized(eager_q, eager_scale, x)
        check_sum(eager_out, sums)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_of_a_sum(dtype: torch.dtype) -> None:
    """As autograd of the reference in float64, twice the same; pairs without a row are NaN."""
    inputs = make_sum(40, 72, 1, dtype)
    kept = inputs["inverse"] >= 0
    rows = inputs["rows"].nan_to_num()
    clean = inputs["topk_weights"].where(kept, 0)
    leaves = {"rows": rows, "topk_weights": clean, "residual": inputs["residual"]}
    wide = {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}
    generator = torch.Generator("cuda").manual_seed(5)
    grad = torch.randn(40, 72, generator=generator, device="cuda").to(dtype)
    out = combine_reference(inverse=inputs["inverse"], **wide)
    want = torch.autograd.grad(out, list(wide.values()), grad.double())
    leaves |= {name: inputs[name] for name in ("rows", "topk_weights")}
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    found, again = (
        torch.autograd.grad(
            cm.combine(inverse=inputs["inverse"], **leaves), list(leaves.values()), grad
        )
        for _ in range(2)
    )
    loose = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
    for (name, leaf), got, same, right in zip(leaves.items(), found, again, want, strict=True):
        assert torch.equal(got, same), name
        limit = loose[leaf.dtype]
        torch.testing.assert_close(got.double(), right, rtol=limit, atol=limit, msg=name)


def test_ops() -> None:
    x = torch.randn(6, 72, device="cuda").bfloat16()
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.cutlass_moe.quantize_per_token.default, (x, torch.int8), test_utils=checks
    )
    inputs = make_sum(6, 72, 1, torch.bfloat16)
    arguments = tuple(t.nan_to_num() if t.is_floating_point() else t for t in inputs.values())
    torch.library.opcheck(torch.ops.cutlass_moe.combine.default, arguments)
    torch.library.opcheck(
        torch.ops.cutlass_moe.combine_out.default, (torch.zeros_like(x), *arguments)
    )
