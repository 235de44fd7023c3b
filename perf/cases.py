"""What is measured: grouped products and whole layers, and the order they are measured in."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch

from cutlass_moe.models import shapes
from cutlass_moe.models.shapes import MoeShape
from cutlass_moe.operands import NAMED_DTYPES, PACKINGS
from emitters.spec.packing import Packing

BLOCK = 128  # values that share a scale in fp8_block: of a row of x, and of both sides of a weight
UNPACKED = ("fp8", "int8", "bf16", "fp8_block")
DTYPES = (*UNPACKED, "mxfp4", "int4_g128")
PARTS = ("up", "down", "layer")
WGMMA_ROWS = 64  # rows that a WGMMA works on, whether an expert fills them or not
OUT_BYTES = 2  # bf16: outputs, and a layer's hidden states

MODELS: dict[str, MoeShape] = {
    **shapes.MODELS,
    "qwen3-30b-tp4": shapes.MODELS["qwen3-30b"].shard(tp=4),
}
FIGURE_MODELS = ("qwen3-30b", "mixtral", "dsv3-ep8")
FIGURE_TOKENS = (1, 16, 128, 1024, 8192)
# One of few, one of some and one of many tokens: what a model gets in one pass over all.
TOKEN_SETS = ((1, 32, 1024), (2, 64, 2048), (4, 128, 4096), (8, 256, 8192), (16, 512, 16384))
RAGGED_ROWS = (156, 89, 201, 52, 134, 98, 187, 143)  # of the tutorial's experts


@dataclass(frozen=True)
class Case:
    """A product or a layer of SwiGLU experts, at a number of tokens.

    part "up": out [T k, 2 inter] = x[token] [T, hidden] @ w[e]^T, "down": out [T k, hidden] from
    rows [T k, inter], "layer": both, from bf16 hidden states and expert ids to bf16, what 8-bit
    weights multiply being quantised per token. dtype is one of DTYPES: of weights and of x. 8-bit
    products have a scale per token and per channel, those of fp8_block one per BLOCK values of a
    token and per BLOCK x BLOCK of the weights. 4-bit weights have scales of their own, and x is
    bf16. Layers of MXFP4 have gpt-oss's activation, without its biases.
    """

    suite: str
    model: str
    part: str
    dtype: str
    tokens: int
    num_experts: int
    top_k: int
    hidden: int
    inter: int
    routing: str = "balanced"

    @property
    def unit(self) -> tuple[str, ...]:
        """Cases with the same one share their weights."""
        return (self.suite, self.model, self.part, self.dtype)

    @property
    def id(self) -> str:
        return "/".join((*self.unit, str(self.tokens), self.routing))

    @property
    def name(self) -> str:
        """What tables call it under a heading of its dtype."""
        prefix = "" if self.suite == "models" else f"{self.suite} "
        skew = f" {self.routing}" if self.skewed else ""
        return f"{prefix}{self.model} {self.part}{skew}"

    @property
    def is_layer(self) -> bool:
        return self.part == "layer"

    @property
    def skewed(self) -> bool:
        return self.routing != "balanced"

    @property
    def rows(self) -> int:
        """(token, expert) pairs."""
        return self.tokens * self.top_k

    @property
    def slots(self) -> int:
        """Rows of the product that read one row of x."""
        return 1 if self.part == "down" else self.top_k

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """N and K of the products that it consists of."""
        both = {"up": (2 * self.inter, self.hidden), "down": (self.hidden, self.inter)}
        return both if self.is_layer else {self.part: both[self.part]}

    @property
    def packed(self) -> bool:
        """Whether weights have 4 bits."""
        return self.dtype in PACKINGS

    @property
    def activation(self) -> str:
        """A layer's, by the name that `fused_moe` has for it."""
        return "swiglu_oai" if self.dtype == Packing.MXFP4 else "swiglu"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of x, and of weights that are not packed."""
        return torch.bfloat16 if self.packed else NAMED_DTYPES[self.dtype.partition("_")[0]]

    @property
    def seed(self) -> int:
        """Of the routing: dtypes and parts of one model share it."""
        return zlib.crc32(f"{self.suite}/{self.model}/{self.tokens}/{self.routing}".encode())

    @property
    def weight_bytes(self) -> int:
        """Of all experts, without scales."""
        elements = self.num_experts * sum(n * k for n, k in self.products.values())
        return elements // 2 if self.packed else elements * self.torch_dtype.itemsize

    @property
    def flops(self) -> int:
        return 2 * self.rows * sum(n * k for n, k in self.products.values())


@dataclass(frozen=True)
class Load:
    """What a routing makes of a case. rows64: each expert's rows rounded up to WGMMA_ROWS."""

    active_experts: int
    max_rows: int
    rows64: int


def moved_bytes(case: Case, load: Load) -> int:
    """Active experts' weights, what comes in and what goes out, each once; no scales or tables."""
    weights = case.weight_bytes // case.num_experts * load.active_experts
    if case.is_layer:
        return weights + 2 * case.tokens * case.hidden * OUT_BYTES
    ((n, k),) = case.products.values()
    x_rows = case.rows // case.slots
    return weights + x_rows * k * case.torch_dtype.itemsize + case.rows * n * OUT_BYTES


def of_shape(model: str, part: str, dtype: str, tokens: int, routing: str = "balanced") -> Case:
    shape = MODELS[model]
    sizes = shape.num_experts, shape.top_k, shape.hidden, shape.inter
    return Case("models", model, part, dtype, tokens, *sizes, routing)


def fits(shape: MoeShape, part: str, dtype: str) -> bool:
    """Whether K has whole groups that share a scale, and no block has gates and ups."""
    if dtype in PACKINGS:
        return not (shape.hidden % Packing(dtype).group or shape.inter % Packing(dtype).group)
    return (part, dtype) != ("layer", "fp8_block") or shape.inter % BLOCK == 0


def special_units() -> Iterator[list[Case]]:
    """Cases of one matrix [N, K] per expert, written as up projections or, where rows come in
    order, as down projections; and skewed routings."""
    for dtype in DTYPES[:3]:
        # the operator that this project began with, and the tutorial's product
        yield [Case("seed", f"e{e}", "up", dtype, 64, e, 1, 128, 1024) for e in (8, 64)]
        ragged = sum(RAGGED_ROWS)
        even = Case("tutorial", "e8", "up", dtype, 32768, 8, 1, 2048, 2048)
        more = [replace(even, tokens=t, routing="ragged") for t in (ragged, 32 * ragged)]
        yield [even, *more]
    for experts in (4, 8):  # DeepGEMM's own contiguous test
        for n, k in ((6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048)):
            model = f"g{experts} {n}x{k}"
            yield [Case("deepgemm", model, "up", "fp8", 32768, experts, 1, k, n // 2)]
            yield [Case("deepgemm", model, "down", "fp8_block", 32768, experts, 1, n, k)]
    for model in FIGURE_MODELS:
        for part in PARTS:
            skews = ((128, "zipf"), (4096, "zipf"), (4096, "half"))
            yield [of_shape(model, part, "fp8", tokens, routing) for tokens, routing in skews]


def all_cases() -> list[Case]:
    """Every case once, in the order of a run, which is fair to all wherever a budget ends it.

    First the layers of the README's figure. Then passes over all models, parts and dtypes, which
    take one of TOKEN_SETS each: parts and dtypes by turns, models in random but fixed order. The
    special ones are in the first pass.
    """
    found = [of_shape(m, "layer", "fp8", t) for m in FIGURE_MODELS for t in FIGURE_TOKENS]
    kinds = [
        (model, part, dtype)
        for model in MODELS
        for part in PARTS
        for dtype in DTYPES
        if fits(MODELS[model], part, dtype)
    ]
    for number in range(len(TOKEN_SETS)):
        units = [
            [of_shape(*kind, tokens) for tokens in TOKEN_SETS[(i + number) % len(TOKEN_SETS)]]
            for i, kind in enumerate(kinds)
        ]
        units += special_units() if number == 0 else ()
        random.Random(number).shuffle(units)
        queues: dict[tuple[str, ...], list[list[Case]]] = {}
        for unit in units:
            queues.setdefault((unit[0].suite, unit[0].part, unit[0].dtype), []).append(unit)
        turns = zip_longest(*queues.values(), fillvalue=[])
        found += [case for turn in turns for unit in turn for case in unit]
    return list(dict.fromkeys(found))


def select(
    suites: Sequence[str] = (),
    models: Sequence[str] = (),
    parts: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    tokens: Sequence[int] = (),
) -> list[Case]:
    """The cases with one of the named values of each kind that has any, in the order of a run.

    Raises ValueError for a value that no case has.
    """
    cases = all_cases()
    for field, wanted in (
        ("suite", suites),
        ("model", models),
        ("part", parts),
        ("dtype", dtypes),
        ("tokens", tokens),
    ):
        known = dict.fromkeys(getattr(case, field) for case in all_cases())
        for value in wanted:
            if value not in known:
                names = ", ".join(map(str, known))
                raise ValueError(f"{field} must be one of {names}, got {value!r}")
        if wanted:
            cases = [case for case in cases if getattr(case, field) in wanted]
    return cases
