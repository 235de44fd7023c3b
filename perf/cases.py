"""What is measured: cases, the routing each draws, and the least time a GPU could take."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from cutlass_moe.shapes import DTYPES, MODELS
from emitters.config import Schedule
from emitters.problem import (
    ACCUMULATIONS,
    ChannelScale,
    DType,
    EpilogueNode,
    GemmProblem,
    PerTokenScale,
)

ROUTINGS = ("balanced", "zipf", "half", "hot")
SUITES = ("gemm", "seed", "deepgemm", "tutorial", "schedules")
GEMM_MODELS = ("qwen3-30b", "mixtral", "dsv3-ep8")
PREFILL_TOKENS = (1024, 2048, 4096, 8192, 16384)
GEMM_TOKENS = (1, 16, 128, *PREFILL_TOKENS)
POWERS_OF_TWO = tuple(2**i for i in range(16))
RAGGED_ROWS = (156, 89, 201, 52, 134, 98, 187, 143)  # of the tutorial's experts
SCHEDULES = tuple(map(str, Schedule))
WGMMA_ROWS = 64  # rows a WGMMA works on, whether an expert fills them or not
OUT = DType.BF16


@dataclass(frozen=True)
class Case:
    """One grouped product out [rows, N] = x[index] [rows, K] @ weight[e(row)] [N, K]^T.

    'up': x has a row a token, which top_k experts read. 'down': x has a row for every (token,
    expert) pair, not sorted by expert, so that it is read through an index as well. tokens, top_k
    and routing make the rows; dtype is one of DTYPES, without scales for bf16 and with both for
    the others.
    """

    suite: str
    model: str
    gemm: str
    dtype: str
    num_experts: int
    top_k: int
    n: int
    k: int
    tokens: int
    routing: str = "balanced"

    @property
    def id(self) -> str:
        where = f"{self.suite}/{self.model}/{self.gemm}"
        return f"{where}/{self.dtype}/{self.tokens}/{self.routing}"

    @property
    def weights_id(self) -> tuple[str, str, str, str]:
        """Cases with the same one share their weights."""
        return (self.suite, self.model, self.gemm, self.dtype)

    @property
    def operand(self) -> DType:
        return DTYPES[self.dtype]

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
        scales: tuple[EpilogueNode, ...] = (PerTokenScale(), ChannelScale())
        return GemmProblem(
            operand=self.operand,
            accumulation=ACCUMULATIONS[self.operand][0],
            out=OUT,
            n=self.n,
            k=self.k,
            num_experts=self.num_experts,
            gather=True,
            epilogue=scales if self.operand.quantized else (),
        )

    @property
    def seed(self) -> int:
        """Of the routing: dtypes of one case share it."""
        name = f"{self.suite}/{self.model}/{self.gemm}/{self.tokens}/{self.routing}"
        return zlib.crc32(name.encode())


@dataclass(frozen=True)
class Workload:
    """What a routing makes of a case; rows64: each expert's rows rounded up to WGMMA_ROWS."""

    active_experts: int
    max_rows: int
    rows64: int


@dataclass(frozen=True)
class Ceilings:
    """What the GPU was seen to reach: GB/s, TFLOP/s, and microseconds read for an empty kernel."""

    read_gbs: float
    copy_gbs: float
    fp8_tflops: float
    int8_tflops: float
    bf16_tflops: float
    empty_us: float

    def tflops(self, dtype: str) -> float:
        """Dense rate of a dtype.

        The tensor cores run INT8 as fast as FP8, the library that measures it does not, so that
        INT8 kernels are held to the faster of the two.
        """
        if dtype == "bf16":
            return self.bf16_tflops
        return max(self.fp8_tflops, self.int8_tflops) if dtype == "int8" else self.fp8_tflops


def gemm_cases(
    models: Iterable[str],
    dtypes: Iterable[str],
    tokens: Sequence[int],
    routings: Sequence[str],
    suite: str = "gemm",
) -> list[Case]:
    """Both products of each model's layer."""
    return [
        Case(suite, model, gemm, dtype, shape.num_experts, shape.top_k, n, k, t, routing)
        for dtype in dtypes
        for model, shape in ((name, MODELS[name]) for name in models)
        for gemm, (n, k) in shape.gemms.items()
        for t in tokens
        for routing in routings
    ]


def seed_cases(dtypes: Iterable[str], routings: Sequence[str]) -> list[Case]:
    """The operator's first use: 64 tokens, K 128, N 2048, one expert a token of 8 and of 64."""
    return [
        Case("seed", f"e{experts}", "up", dtype, experts, 1, 2048, 128, 64, routing)
        for dtype in dtypes
        for experts in (8, 64)
        for routing in routings
    ]


def deepgemm_cases(dtypes: Iterable[str], routings: Sequence[str]) -> list[Case]:
    """The shapes of DeepGEMM's own contiguous test: 4 experts of ~8192 rows, 8 of ~4096."""
    return [
        Case("deepgemm", f"g{experts}", f"{n}x{k}", dtype, experts, 1, n, k, 32768, routing)
        for dtype in dtypes
        for experts in (4, 8)
        for n, k in ((6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048))
        for routing in routings
    ]


def tutorial_cases(dtypes: Iterable[str]) -> list[Case]:
    """8 experts with about 4096 rows each, and with RAGGED_ROWS and 32 times as many."""
    ragged = sum(RAGGED_ROWS)
    return [
        Case("tutorial", "e8", "4096x2048", dtype, 8, 1, 4096, 2048, tokens, routing)
        for dtype in dtypes
        for tokens, routing in ((32768, "balanced"), (ragged, "ragged"), (32 * ragged, "ragged"))
    ]


def schedule_cases(models: Iterable[str], dtypes: Iterable[str]) -> list[Case]:
    """Both products of each model's layer on balanced and on skewed routing, at a few sizes."""
    tokens, routings = PREFILL_TOKENS[::2], ("balanced", "zipf", "half")
    return gemm_cases(models, dtypes, tokens, routings, "schedules")


def select(
    suites: Sequence[str],
    models: Sequence[str] = GEMM_MODELS,
    dtypes: Sequence[str] = (),
    tokens: Sequence[int] = GEMM_TOKENS,
    routings: Sequence[str] = ("balanced",),
) -> list[Case]:
    """Cases of the suites, in the order they are to be measured in.

    Without dtypes, all of them, but only fp8 of the DeepGEMM shapes and of the schedules. models
    select among the suites gemm and schedules, tokens among gemm; tutorial and schedules have
    routings of their own. Raises ValueError on an unknown name.
    """
    for what, asked, known in (
        ("suite", suites, SUITES),
        ("model", models, tuple(MODELS)),
        ("dtype", dtypes, tuple(DTYPES)),
        ("routing", routings, ROUTINGS),
    ):
        for name in asked:
            if name not in known:
                raise ValueError(f"{what} {name!r}: expected one of {', '.join(known)}")
    if any(t < 1 for t in tokens):
        raise ValueError(f"tokens must be positive, got {', '.join(map(str, tokens))}")
    cases = []
    if "seed" in suites:
        cases += seed_cases(dtypes or DTYPES, routings)
    if "deepgemm" in suites:
        cases += deepgemm_cases(dtypes or ("fp8",), routings)
    if "tutorial" in suites:
        cases += tutorial_cases(dtypes or DTYPES)
    if "schedules" in suites:
        cases += schedule_cases(models, dtypes or ("fp8",))
    if "gemm" in suites:
        cases += gemm_cases(models, dtypes or DTYPES, tokens, routings)
    return cases


def draw_topk_ids(case: Case) -> torch.Tensor:
    """int64 [tokens, top_k] on the CPU, the same on every machine.

    A token's experts are distinct, but for half. balanced: every expert as likely as another. zipf:
    the i-th most popular expert 1/i as likely as the first. hot: every token takes one and the same
    expert, its others are balanced. half: one expert has half of the (token, expert) pairs, several
    of some tokens, the rest are balanced. ragged: one of 8 experts a token, their rows in the
    proportion of RAGGED_ROWS.
    """
    generator = torch.Generator().manual_seed(case.seed)
    if case.routing == "ragged":
        base = torch.repeat_interleave(torch.arange(len(RAGGED_ROWS)), torch.tensor(RAGGED_ROWS))
        place = torch.randperm(case.tokens, generator=generator) * len(base) // case.tokens
        return base[place][:, None]
    weights = torch.ones(case.num_experts)
    if case.routing == "zipf":
        popularity = torch.randperm(case.num_experts, generator=generator)
        weights = 1.0 / (popularity + 1.0)
    if case.routing in ("hot", "half"):
        hot = torch.randint(case.num_experts, (1,), generator=generator)
        weights[hot] = 1e9 if case.routing == "hot" else 1e-9
    chances = weights.expand(case.tokens, -1).contiguous()
    ids = torch.multinomial(chances, case.top_k, generator=generator)
    if case.routing == "half":
        pairs = torch.randperm(case.rows, generator=generator)[: case.rows // 2]
        ids.view(-1)[pairs] = hot
    return ids


def workload(case: Case, topk_ids: torch.Tensor) -> Workload:
    counts = torch.bincount(topk_ids.flatten(), minlength=case.num_experts)
    rounded = (counts + WGMMA_ROWS - 1) // WGMMA_ROWS * WGMMA_ROWS
    return Workload(int((counts > 0).sum()), int(counts.max()), int(rounded.sum()))


def flops(case: Case) -> int:
    return 2 * case.rows * case.n * case.k


def moved_bytes(case: Case, load: Workload) -> int:
    """Active experts' weights, x and out, each once; scales and tables are left out."""
    weight = load.active_experts * case.n * case.k * case.operand.bytes
    return weight + case.x_rows * case.k * case.operand.bytes + case.rows * case.n * OUT.bytes


def dense_us(case: Case, rows: int, ceilings: Ceilings) -> float:
    """What a product of so many rows takes at the dense rate."""
    return 2 * rows * case.n * case.k / (ceilings.tflops(case.dtype) * 1e6)


def floor_us(case: Case, load: Workload, ceilings: Ceilings, round_rows: bool = False) -> float:
    """The longer of moving the bytes at the read rate and doing the products at the dense rate.

    With round_rows each expert's rows count as whole blocks of WGMMA_ROWS.
    """
    memory = moved_bytes(case, load) / (ceilings.read_gbs * 1e3)
    return max(memory, dense_us(case, load.rows64 if round_rows else case.rows, ceilings))
