"""The kernels that quantise and combine rows, simulated: right in every order, defects caught."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from cutlass_moe.images.toolchains import default_build
from emitters.spec.dtypes import DType
from emitters.spec.layer_steps import CombineProblem, QuantizeProblem, StepConfig
from tests.ptxsim.ptx import Fault
from tests.ptxsim.schedule import MODES, Schedule

if default_build() is None:
    pytest.skip("needs nvidia-cutlass-dsl", allow_module_level=True)

from cutlass_moe.operands import TORCH_DTYPES
from cutlass_moe.ops.combine import combine_reference
from cutlass_moe.ops.quantize import quantize_per_token_reference, quantize_static
from tests.ptxsim.kernels.routing import edited, kernel
from tests.ptxsim.kernels.rows import Stage, run
from tests.support.numerics import poisoned, same_bits

BF16, FP16, FP32 = DType.BF16, DType.FP16, DType.FP32


@dataclass(frozen=True)
class Quantized:
    """end: rows that count, where the device knows them."""

    source: DType
    target: DType
    k: int
    rows: int
    threads: int = 64
    end: int | None = None
    early: bool = False
    static: float = 0.0  # the scale of all rows, if not 0
    spare: int = 0  # elements between rows
    padded: bool = False

    @property
    def problem(self) -> QuantizeProblem:
        return QuantizeProblem(self.source, self.target, self.k, self.padded)

    def stage(self, x: Tensor, edit: tuple[str, str] | None = None) -> Stage:
        built = kernel(self.problem, StepConfig(self.threads))
        arguments: dict[str, Tensor | int] = {
            "source": x,
            "end": 0 if self.end is None else torch.tensor([self.end], dtype=torch.int32),
            "q": torch.full((self.rows, 8 * self.problem.q_vectors), 0x55, dtype=torch.uint8),
            "scale": poisoned(self.rows, 1, torch.float32, "cpu"),
            "static_scale": torch.tensor([self.static]) if self.static else 0,
            "num_rows": self.rows,
            "source_stride": x.shape[1] * x.element_size(),
            "early": int(self.early),
        }
        written = self.rows if self.end is None else min(self.end, self.rows)
        grid = self.problem.ctas(self.rows, self.threads)
        return Stage(edited(built, *edit) if edit else built, arguments, grid, written)

    def inputs(self) -> Tensor:
        """Ordinary rows and, in turn, one of the smallest numbers, of the largest, of zeros."""
        generator = torch.Generator().manual_seed(self.k)
        dtype = TORCH_DTYPES[self.source]
        x = torch.randn(self.rows, self.k + self.spare, generator=generator)
        info = torch.finfo(dtype)
        factors = torch.tensor([1.0, 300.0, info.tiny, info.max / 8, 0.0])
        return (x * factors[torch.arange(self.rows) % 5, None]).to(dtype)

    def check(self, stage: Stage) -> None:
        x, q, scale = (stage.arguments[name] for name in ("source", "q", "scale"))
        assert isinstance(x, Tensor) and isinstance(q, Tensor) and isinstance(scale, Tensor)
        count, target = stage.written, TORCH_DTYPES[self.target]
        x = x[:count, : self.k]
        if self.static:
            want, want_scale = quantize_static(x.float(), target, self.static)
        else:
            want, want_scale = quantize_per_token_reference(x, target)
        torch.testing.assert_close(scale[:count, 0], want_scale, rtol=0, atol=0, equal_nan=True)
        finite = want_scale.isfinite()
        assert same_bits(q[:count, : self.k][finite].view(target), want[finite])
        assert not q[:count, self.k :].any() and (q[count:] == 0x55).all()


QUANTIZED = {
    "one_thread_a_row": Quantized(BF16, DType.E4M3, 8, rows=70),
    "part_of_a_warp": Quantized(FP16, DType.E5M2, 72, rows=21),
    "a_warp": Quantized(FP32, DType.INT8, 1000, rows=5),
    "two_warps": Quantized(BF16, DType.INT8, 1048, rows=3),
    "many_vectors": Quantized(FP16, DType.E4M3, 4104, rows=2),
    "four_warps_of_eight": Quantized(BF16, DType.E4M3, 2056, rows=3, threads=256),
    "no_row_counts": Quantized(BF16, DType.INT8, 72, rows=20, end=0),
    "some_rows_count": Quantized(BF16, DType.INT8, 1048, rows=5, end=3),
    "all_rows_count": Quantized(FP32, DType.E4M3, 72, rows=9, end=99),
    "static_fp8": Quantized(BF16, DType.E4M3, 72, rows=9, static=0.25, spare=8),
    "static_int8": Quantized(FP16, DType.INT8, 264, rows=6, static=0.5),
    "padded": Quantized(BF16, DType.E4M3, 72, rows=9, end=5, spare=8, padded=True),
    "padded_alone": Quantized(FP16, DType.INT8, 8, rows=70, padded=True),
    "padded_two_warps": Quantized(BF16, DType.INT8, 1048, rows=3, padded=True),
    "early": Quantized(BF16, DType.E4M3, 72, rows=9, end=5, early=True),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_rows_are_quantised(name: str) -> None:
    case = QUANTIZED[name]
    for seed, mode in enumerate(("random", "starved_warp", "apart")):
        stage = case.stage(case.inputs())
        run([stage], Schedule(seed, mode))
        case.check(stage)


@pytest.mark.parametrize("source", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("target", [DType.E4M3, DType.E5M2, DType.INT8], ids=str)
def test_signs_zeros_and_what_is_not_finite(source: DType, target: DType) -> None:
    case = Quantized(source, target, 8, rows=5)
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([
        [0.0, -0.0, 1.0, -1.0, 1e-7, -1e-7, 0.5, -0.5],
        [-0.0] * 8,
        [1.0, inf, 0.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        [nan, 1.0, 0.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        [-inf, nan, 0.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    ]).to(TORCH_DTYPES[source])  # fmt: skip
    stage = case.stage(x)
    run([stage], Schedule(0))
    case.check(stage)


@dataclass(frozen=True)
class Combined:
    dtype: DType
    n: int
    top_k: int
    tokens: int
    rows: int
    residual: bool = False
    threads: int = 64
    weights: DType = DType.FP32
    spare: int = 0  # weights between tokens
    weighted: bool = True
    out: DType | None = None  # default: that of rows

    @property
    def problem(self) -> CombineProblem:
        out = self.out or self.dtype
        return CombineProblem(self.dtype, out, self.n, self.top_k, self.weights)

    def stage(self, rows: Tensor | None = None, edit: tuple[str, str] | None = None) -> Stage:
        """Small whole numbers, whose sums are exact; NaN in rows and weights that do not count."""
        built = kernel(self.problem, StepConfig(self.threads))
        generator = torch.Generator().manual_seed(self.n)
        dtype = TORCH_DTYPES[self.dtype]
        out_dtype = TORCH_DTYPES[self.problem.out]

        def numbers(*shape: int) -> Tensor:
            return torch.randint(-3, 4, shape, generator=generator).float()

        inverse = torch.randint(
            -2, self.rows + 1, (self.tokens, self.top_k), generator=generator, dtype=torch.int32
        )
        kept = (inverse >= 0) & (inverse < self.rows)
        weights = numbers(self.tokens, self.top_k + self.spare).to(TORCH_DTYPES[self.weights])
        weights[:, : self.top_k].masked_fill_(~kept, float("nan"))
        if rows is None:
            rows = numbers(self.rows, self.n).to(dtype)
            used = inverse[kept].unique().long()
            rows[[row for row in range(self.rows) if row not in used]] = float("nan")
        arguments: dict[str, Tensor | int] = {
            "rows": rows,
            "weights": weights if self.weighted else 0,
            "inverse": inverse,
            "residual": numbers(self.tokens, self.n).to(out_dtype) if self.residual else 0,
            "out": poisoned(self.tokens, self.n, out_dtype, "cpu"),
            "num_rows": self.rows,
            "num_tokens": self.tokens,
            "weight_stride": self.top_k + self.spare,
        }
        grid = self.problem.ctas(self.tokens, self.threads)
        built = edited(built, *edit) if edit else built
        return Stage(built, arguments, grid, self.tokens)

    def check(self, stage: Stage) -> None:
        names = ("rows", "weights", "inverse", "out")
        rows, weights, inverse, out = (stage.arguments[name] for name in names)
        residual = stage.arguments["residual"] if self.residual else None
        assert isinstance(rows, Tensor) and isinstance(inverse, Tensor)
        assert isinstance(residual, Tensor | None)
        ones = torch.ones(inverse.shape)
        weights = weights[:, : self.top_k] if isinstance(weights, Tensor) else ones
        assert isinstance(out, Tensor)
        want = torch.empty_like(out)
        combine_reference(rows, weights, inverse, residual=residual, out=want)
        assert want.isfinite().all()
        assert torch.equal(out, want)


COMBINED = {
    "one_choice": Combined(BF16, 8, 1, tokens=70, rows=40),
    "three_choices": Combined(FP16, 72, 3, tokens=9, rows=12, residual=True),
    "float32": Combined(FP32, 24, 5, tokens=13, rows=30, residual=True),
    "eight_choices": Combined(BF16, 136, 8, tokens=5, rows=20),
    "bf16_weights": Combined(BF16, 72, 3, tokens=9, rows=12, weights=BF16, spare=2),
    "fp16_weights": Combined(FP16, 72, 2, tokens=9, rows=12, weights=FP16),
    "unweighted": Combined(BF16, 72, 1, tokens=9, rows=12, weighted=False),
    "float32_to_float16": Combined(FP32, 24, 3, tokens=7, rows=12, residual=True, out=FP16),
    "many_of_float32": Combined(FP32, 8, 18, tokens=6, rows=40, residual=True, out=BF16),
    "no_rows": Combined(BF16, 72, 2, tokens=3, rows=0, residual=True),
    "many_choices": Combined(BF16, 16, 16, tokens=6, rows=50),
}


@pytest.mark.parametrize("name", COMBINED)
def test_rows_are_combined(name: str) -> None:
    case = COMBINED[name]
    for seed, mode in enumerate(("random", "starved_warp", "apart")):
        stage = case.stage()
        run([stage], Schedule(seed, mode))
        case.check(stage)


LAST = Combined(BF16, 72, 3, tokens=9, rows=12)
NEXT = Quantized(BF16, DType.INT8, 72, rows=9)


@pytest.mark.parametrize("mode", MODES)
def test_each_waits_for_the_one_before(mode: str) -> None:
    """combine, then combine of what that wrote, then, as a layer starts, its quantisation."""
    for seed in range(3):
        first = LAST.stage()
        second = replace(LAST, tokens=7, rows=9).stage(first.arguments["out"])  # type: ignore[arg-type]
        run([first, second], Schedule(seed, mode))
        replace(LAST, tokens=7, rows=9).check(second)
        first = LAST.stage()
        second = NEXT.stage(first.arguments["out"])  # type: ignore[arg-type]
        run([first, second], Schedule(seed, mode))
        NEXT.check(second)


def _said(*stages: Stage) -> str:
    """What the simulator finds in some order; empty where nothing."""
    for seed in range(3):
        for mode in MODES:
            try:
                run(stages, Schedule(seed, mode))
            except Fault as fault:
                return str(fault)
    return ""


def test_early_work_on_what_is_not_complete_is_caught() -> None:
    first = LAST.stage()
    second = replace(NEXT, early=True).stage(first.arguments["out"])  # type: ignore[arg-type]
    assert "before griddepcontrol.wait" in _said(first, second)


@pytest.mark.parametrize("last", [False, True], ids=["quantize", "combine"])
def test_a_wait_left_out_is_caught(last: bool) -> None:
    edit = ("griddepcontrol.wait;", "")
    first = LAST.stage()
    out = first.arguments["out"]
    assert isinstance(out, Tensor)
    following = replace(LAST, tokens=7, rows=9) if last else NEXT
    assert "before griddepcontrol.wait" in _said(first, following.stage(out, edit))


def test_a_barrier_left_out_is_caught() -> None:
    case = QUANTIZED["two_warps"]
    assert "bar.sync \t0;" in kernel(case.problem, StepConfig(case.threads))[1]
    assert _said(case.stage(case.inputs(), ("bar.sync \t0;", "")))
