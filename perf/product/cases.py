"""What is measured: cases, the routing each draws, and the least time a GPU could take."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

from cutlass_moe.models.shapes import DTYPES
from emitters.spec.config_sm90 import Schedule
from emitters.spec.dtypes import ACCUMULATIONS, DType
from emitters.spec.gemm import ChannelScale, EpilogueNode, GemmProblem, PerTokenScale

ROUTINGS = ("balanced", "zipf", "half", "hot")
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
