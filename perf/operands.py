"""A case's tensors on the GPU, and what it must come to, in float64."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch

import cutlass_moe
from cutlass_moe.operands import PACKINGS, clamped_numbers
from emitters.spec.packing import E2M1_VALUES
from perf.cases import BLOCK, Case
from perf.routing import draw_topk_ids

# The relative error up to which an output counts as right. Fast fp8 accumulation reaches 2.5e-3 at
# K 7168 and grows with K. In a layer, values that the rounding to bf16 moves across the midpoint of
# two 8-bit ones change by a whole step: up to 1.9e-2 with fp8, 1.4e-2 with int8.
WORST_ERROR = {
    "product": {"fp8": 1.5e-2, "int8": 4e-3, "bf16": 4e-3, "fp8_block": 1.5e-2},
    "layer": {"fp8": 4e-2, "int8": 3e-2, "bf16": 1e-2, "fp8_block": 4e-2},
}
for _limits in WORST_ERROR.values():
    _limits |= dict.fromkeys(PACKINGS, _limits["bf16"])
CHECKED_ROWS, CHECKED_COLUMNS, CHECKED_TOKENS = 48, 512, 6
UNITS = {"int8": 40}  # standard deviation of values, where it is not 1
LARGEST = {"fp8": 448.0, "int8": 127.0}
Scale = torch.Tensor | None


def random_values(case: Case, shape: tuple[int, ...], device: str) -> torch.Tensor:
    """Normal ones of the case's dtype, of standard deviation UNITS. A GPU's power, and with it its
    clocks, depends on the bits: every dtype gets a bell curve."""
    out = torch.empty(shape, dtype=case.torch_dtype, device=device)
    for part in out if len(shape) == 3 else (out,):
        values = torch.randn(part.shape, dtype=torch.bfloat16, device=device)
        if case.dtype == "int8":
            values = (values * UNITS["int8"]).round_().clamp_(-127, 127)
        part.copy_(values)
    return out


def random_scale(case: Case, shape: tuple[int, ...], device: str, unit: float = 1.0) -> Scale:
    """float32 of 0.5 to 1.5 times the power of two next to `unit`, exact in bf16, which some
    systems store; None where x is bf16."""
    if case.torch_dtype == torch.bfloat16:
        return None
    power = 2.0 ** round(torch.tensor(unit).log2().item())
    return (torch.rand(shape, device=device) + 0.5).bfloat16().float() * power


def random_packed(case: Case, n: int, k: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scales of 4-bit weights, rounded from normal ones of standard deviation k^-0.5."""
    parts = []
    for _ in range(case.num_experts):
        w = torch.randn((1, n, k), device=device) * k**-0.5
        parts.append(cutlass_moe.unpack_weights(cutlass_moe.quantize_packed(w, case.dtype), k))
    values, scales = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(scales)


def decoded(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float64 [N, K] of 4-bit weights: MXFP4 with 16 bytes per scale, or INT4 in words."""
    if values.dtype == torch.int32:
        nibbles = torch.stack([values >> 4 * i & 15 for i in range(8)], -1).flatten(1)
        numbers, factors = nibbles.double() - 8, scale.double()
    else:
        nibbles = torch.stack([values & 15, values >> 4], -1).flatten(1).int()
        table = torch.tensor(E2M1_VALUES, dtype=torch.float64, device=values.device)
        numbers = table[nibbles & 7] * (1 - nibbles // 8 * 2)
        factors = torch.exp2(scale.double() - 127)
    return numbers * factors.repeat_interleave(numbers.shape[1] // factors.shape[1], 1)


@dataclass(frozen=True)
class Weights:
    """w [E, N, K], and its scale: [E, N], of fp8_block [E, N / BLOCK, K / BLOCK], of bf16 None.

    4-bit weights are as a checkpoint has them, with all gates before all ups: see `pack_weights`.
    made: what systems make of it once a layer, by their names.
    """

    w: torch.Tensor
    scale: Scale
    made: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, case: Case, n: int, k: int, device: str = "cuda") -> Weights:
        """Such that the product with normal values is about normal."""
        if case.packed:
            return cls(*random_packed(case, n, k, device))
        w = random_values(case, (case.num_experts, n, k), device)
        if case.dtype == "bf16":
            w *= k**-0.5
        blocks = (case.num_experts, -(-n // BLOCK), -(-k // BLOCK))
        shape = blocks if case.dtype == "fp8_block" else (case.num_experts, n)
        unit = k**-0.5 / UNITS.get(case.dtype, 1)
        return cls(w, random_scale(case, shape, device, unit))

    def exact(self, expert: int, rows: slice = slice(None)) -> torch.Tensor:
        """Some rows of one expert's weights times their scale, float64."""
        if self.w.dtype in (torch.uint8, torch.int32):
            return decoded(self.w[expert, rows], self.scale[expert, rows])
        w = self.w[expert, rows].double()
        if self.scale is None:
            return w
        scale = self.scale[expert].double()
        if scale.dim() == 1:
            return w * scale[rows, None]
        wide = scale.repeat_interleave(BLOCK, 0)[rows].repeat_interleave(BLOCK, 1)
        return w * wide[:, : w.shape[1]]


def weights_of(case: Case, device: str = "cuda") -> dict[str, Weights]:
    """By the product's name."""
    torch.manual_seed(1)
    return {part: Weights.of(case, n, k, device) for part, (n, k) in case.products.items()}


class Inputs:
    """What products and layers have in common: the routing, and rows sorted by expert.

    ids int32 [T, k]. Of each sorted row: expert_of, order (its pair) and token_of (its row of x),
    int64 [rows]; counts and ends int64 and int32 [E].
    """

    def __init__(self, case: Case, weights: dict[str, Weights]) -> None:
        self.case, self.weights = case, weights
        self.device = next(iter(weights.values())).w.device.type
        self.ids = draw_topk_ids(case).int().to(self.device)
        expert_of, self.order = torch.sort(self.ids.flatten(), stable=True)
        self.expert_of = expert_of.long()
        self.counts = torch.bincount(self.expert_of, minlength=case.num_experts)
        self.ends = self.counts.cumsum(0).int()
        self.token_of = self.order // case.slots
        torch.manual_seed(case.seed)

    def new_out(self, rows: int, columns: int) -> torch.Tensor:
        """An output bf16 in which whatever a kernel leaves unwritten is NaN."""
        return torch.full((rows, columns), torch.nan, dtype=torch.bfloat16, device=self.device)

    def sample(self, number: int, most: int) -> torch.Tensor:
        return torch.randperm(number, device=self.device)[:most].sort().values


class ProductInputs(Inputs):
    """x: a row a token, or for "down" a row a pair in the order of pairs; its scale [rows of x], of
    fp8_block [rows of x, K / BLOCK]. picked: the sorted rows that are checked."""

    def __init__(self, case: Case, weights: dict[str, Weights]) -> None:
        super().__init__(case, weights)
        self.weight = weights[case.part]
        self.n, self.k = case.products[case.part]
        rows = case.rows // case.slots
        self.x = random_values(case, (rows, self.k), self.device)
        shape = (rows, -(-self.k // BLOCK)) if case.dtype == "fp8_block" else (rows,)
        self.x_scale = random_scale(case, shape, self.device, 1 / UNITS.get(case.dtype, 1))
        self.picked = self.sample(case.rows, CHECKED_ROWS)
        first = random.Random(case.seed).randrange(max(1, self.n - CHECKED_COLUMNS))
        self.columns = slice(first, first + CHECKED_COLUMNS)

    def gathered(self) -> tuple[torch.Tensor, Scale]:
        """x in sorted order and its scale: two copies. torch can't index fp8, but wider words."""
        rows = self.x.view(torch.int64)[self.token_of].view(self.x.dtype)
        return rows, None if self.x_scale is None else self.x_scale[self.token_of]

    def expected(self) -> torch.Tensor:
        out = []
        sources = self.token_of[self.picked].tolist()
        for row, source in zip(self.picked.tolist(), sources, strict=True):
            x = self.x[source].double()
            if self.x_scale is not None:
                scale = self.x_scale[source].double()
                wide = scale.repeat_interleave(BLOCK)[: self.k] if scale.dim() else scale
                x = x * wide
            out.append(self.weight.exact(int(self.expert_of[row]), self.columns) @ x)
        return torch.stack(out)


class LayerInputs(Inputs):
    """hidden bf16 [T, H]; topk_weights float32 [T, k], whose sum is 1 for a token; picked: the
    tokens that are checked."""

    def __init__(self, case: Case, weights: dict[str, Weights]) -> None:
        super().__init__(case, weights)
        self.up, self.down = weights["up"], weights["down"]
        self.hidden = torch.randn(
            (case.tokens, case.hidden), dtype=torch.bfloat16, device=self.device
        )
        self.topk_weights = torch.randn(self.ids.shape, device=self.device).softmax(-1)
        self.picked = self.sample(case.tokens, CHECKED_TOKENS)

    def expected(self) -> torch.Tensor:
        out = []
        for token in self.picked.tolist():
            x = self.quantized(self.hidden[token].double())
            total = torch.zeros_like(x)
            for expert, share in zip(
                self.ids[token].tolist(), self.topk_weights[token].double(), strict=True
            ):
                act = self.quantized(self.active(*(self.up.exact(expert) @ x).chunk(2)))
                total += share * (self.down.exact(expert) @ act)
            out.append(total)
        return torch.stack(out)

    def active(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        numbers = clamped_numbers(self.case.activation, None, None, None)
        if numbers is None:
            return torch.nn.functional.silu(gate) * up
        gate, up = gate.clamp(max=numbers.limit), up.clamp(-numbers.limit, numbers.limit)
        return gate * torch.sigmoid(numbers.alpha * gate) * (up + numbers.beta)

    def quantized(self, row: torch.Tensor) -> torch.Tensor:
        """The values of a row float64 [K] once it has been quantised, in float32 as everybody does:
        with one scale, or with one per BLOCK values."""
        dtype = self.case.dtype
        if self.case.torch_dtype == torch.bfloat16:
            return row
        groups = row.float().split(BLOCK) if dtype == "fp8_block" else [row.float()]
        largest = row.new_full((), LARGEST[dtype.partition("_")[0]], dtype=torch.float32)
        done = []
        for group in groups:
            scale = group.abs().max() / largest
            grid = group / scale if scale > 0 else group
            grid = grid.round() if dtype == "int8" else grid
            done.append(grid.to(self.case.torch_dtype).double() * scale.double())
        return torch.cat(done)


def inputs_of(case: Case, weights: dict[str, Weights]) -> ProductInputs | LayerInputs:
    return (LayerInputs if case.is_layer else ProductInputs)(case, weights)
