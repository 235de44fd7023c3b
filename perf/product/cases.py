"""Grouped products to measure: cases, suites of them, and the least time a GPU could take."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cutlass_moe.models.shapes import MODELS
from emitters.spec.config_sm90 import Schedule
from emitters.spec.dtypes import ACCUMULATIONS, DType
from emitters.spec.gemm import GemmProblem, Granularity, WeightFormat
from perf.cases import BenchCase
from perf.machine import Ceilings

ROUTINGS = ("balanced", "zipf", "half", "hot")
RAGGED_ROWS = (156, 89, 201, 52, 134, 98, 187, 143)  # of the tutorial's experts
SCHEDULES = tuple(map(str, Schedule))
WGMMA_ROWS = 64  # rows a WGMMA works on, whether an expert fills them or not
OUT = DType.BF16

PREFILL_TOKENS = (1024, 2048, 4096, 8192, 16384)
DECODE_TOKENS = tuple(2**i for i in range(10))
SKEWED_TOKENS = 128  # of the decode suite


@dataclass(frozen=True)
class ProductCase(BenchCase):
    """One grouped product out [rows, N] = x[index] [rows, K] @ weight[e(row)] [N, K]^T.

    'up': x has a row a token, which top_k experts read. 'down': x has a row for every (token,
    expert) pair, not sorted by expert, so that it is read through an index as well. tokens, top_k
    and routing make the rows. There are no scales for bf16 and both for the other dtypes.
    """

    gemm: str
    num_experts: int
    top_k: int
    n: int
    k: int
    routing: str = "balanced"

    @property
    def weights_id(self) -> tuple[str, ...]:
        return (self.suite, self.model, self.gemm, self.dtype)

    @property
    def id(self) -> str:
        return f"{super().id}/{self.routing}"

    @property
    def name(self) -> str:
        return super().name + ("" if self.routing == "balanced" else f" {self.routing}")

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k

    @property
    def slots(self) -> int:
        """Rows of the product that read one row of x."""
        return 1 if self.gemm == "down" else self.top_k

    @property
    def x_rows(self) -> int:
        return self.rows // self.slots

    @property
    def problem(self) -> GemmProblem:
        """What the library is asked for."""
        scaled = self.element.quantized
        return GemmProblem(
            x=self.element,
            weight=WeightFormat(self.element),
            accumulation=ACCUMULATIONS[self.element][0],
            out=OUT,
            n=self.n,
            k=self.k,
            num_experts=self.num_experts,
            gather=True,
            x_scale=Granularity.TOKEN if scaled else None,
            weight_scale=Granularity.CHANNEL if scaled else None,
        )

    @property
    def seed(self) -> int:
        """Of the routing: dtypes of one case share it."""
        name = f"{self.suite}/{self.model}/{self.gemm}/{self.tokens}/{self.routing}"
        return zlib.crc32(name.encode())


def gemm_cases(
    models: Iterable[str],
    dtypes: Iterable[str],
    tokens: Sequence[int],
    routings: Sequence[str],
    suite: str = "gemm",
) -> list[ProductCase]:
    """Both products of each model's layer."""
    return [
        ProductCase(suite, model, dtype, t, gemm, shape.num_experts, shape.top_k, n, k, routing)
        for dtype in dtypes
        for model, shape in ((name, MODELS[name]) for name in models)
        for gemm, (n, k) in shape.gemms.items()
        for t in tokens
        for routing in routings
    ]


def seed_cases(dtypes: Iterable[str], routings: Sequence[str]) -> list[ProductCase]:
    """The operator's first use: 64 tokens, K 128, N 2048, one expert a token of 8 and of 64."""
    return [
        ProductCase("seed", f"e{experts}", dtype, 64, "up", experts, 1, 2048, 128, routing)
        for dtype in dtypes
        for experts in (8, 64)
        for routing in routings
    ]


def deepgemm_cases(dtypes: Iterable[str], routings: Sequence[str]) -> list[ProductCase]:
    """The shapes of DeepGEMM's own contiguous test: 4 experts of ~8192 rows, 8 of ~4096."""
    return [
        ProductCase("deepgemm", f"g{experts}", dtype, 32768, f"{n}x{k}", experts, 1, n, k, routing)
        for dtype in dtypes
        for experts in (4, 8)
        for n, k in ((6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048))
        for routing in routings
    ]


def tutorial_cases(dtypes: Iterable[str]) -> list[ProductCase]:
    """8 experts with about 4096 rows each, and with RAGGED_ROWS and 32 times as many."""
    ragged = sum(RAGGED_ROWS)
    return [
        ProductCase("tutorial", "e8", dtype, tokens, "4096x2048", 8, 1, 4096, 2048, routing)
        for dtype in dtypes
        for tokens, routing in ((32768, "balanced"), (ragged, "ragged"), (32 * ragged, "ragged"))
    ]


def schedule_cases(models: Iterable[str], dtypes: Iterable[str]) -> list[ProductCase]:
    """Both products of each model's layer on balanced and on skewed routing, at a few sizes."""
    tokens, routings = PREFILL_TOKENS[::2], ("balanced", "zipf", "half")
    return gemm_cases(models, dtypes, tokens, routings, "schedules")


def decode_cases(models: Sequence[str], dtypes: Iterable[str]) -> list[ProductCase]:
    """Cases of the gemm suite: few tokens, of bf16 every other count, and once a skewed routing."""
    found = []
    for dtype in dtypes:
        tokens = DECODE_TOKENS[::2] if dtype == "bf16" else DECODE_TOKENS
        found += gemm_cases(models, [dtype], tokens, ["balanced"])
        found += gemm_cases(models, [dtype], [SKEWED_TOKENS], ["zipf"])
    return found


@dataclass(frozen=True)
class Workload:
    """What a routing makes of a case; rows64: each expert's rows rounded up to WGMMA_ROWS."""

    active_experts: int
    max_rows: int
    rows64: int


def flops(case: ProductCase) -> int:
    return 2 * case.rows * case.n * case.k


def moved_bytes(case: ProductCase, load: Workload) -> int:
    """Active experts' weights, x and out, each once; scales and tables are left out."""
    weight = load.active_experts * case.n * case.k * case.element.bytes
    return weight + case.x_rows * case.k * case.element.bytes + case.rows * case.n * OUT.bytes


def dense_us(case: ProductCase, rows: int, ceilings: Ceilings) -> float:
    """What a product of so many rows takes at the dense rate."""
    return 2 * rows * case.n * case.k / (ceilings.tflops(case.dtype) * 1e6)


def memory_us(case: ProductCase, load: Workload, ceilings: Ceilings) -> float:
    """What moving the bytes takes at the read rate."""
    return moved_bytes(case, load) / (ceilings.read_gbs * 1e3)


def floor_us(case: ProductCase, load: Workload, ceilings: Ceilings) -> float:
    """The longer of moving the bytes and doing the products."""
    return max(memory_us(case, load, ceilings), dense_us(case, case.rows, ceilings))


def floor64_us(case: ProductCase, load: Workload, ceilings: Ceilings) -> float:
    """The same, but each expert's rows count as whole blocks of WGMMA_ROWS."""
    return max(memory_us(case, load, ceilings), dense_us(case, load.rows64, ceilings))
