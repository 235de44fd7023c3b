"""What products come to together: figures of prefill, decode, skew and the named suites."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from cutlass_moe.models.shapes import DTYPES
from perf.machine import Ceilings
from perf.product.cases import DECODE_TOKENS, PREFILL_TOKENS, dense_us, floor64_us
from perf.product.rows import RIVALS, ProductRow, ours_over_ours
from perf.rows import Figure, load_published
from perf.systems import OURS, STREAM, TRITON

LARGE = 8192  # tokens from which the floors are summed up apart
GENERAL = (TRITON, "torch")  # peers that take every shape
DENSE_ROWS, DENSE_K = 512, 2048  # rows an expert and K from which the dense rate is in reach


def product_figures(rows: Sequence[ProductRow]) -> list[Figure]:
    """Every figure that has a case."""
    mine = [row for row in rows if OURS in row.us]
    prefill = [
        row
        for row in mine
        if row.case.suite == "gemm"
        and row.case.routing == "balanced"
        and row.case.tokens in PREFILL_TOKENS
    ]
    found = [
        *against_peers(prefill),
        *against_ceilings(prefill, "the run's", None),
        *against_ceilings(prefill, "published", published_ceilings()),
        *skew([row for row in mine if row.case.suite == "schedules"]),
        *named_suites(mine),
        *decode([r for r in mine if r.case.suite == "gemm" and r.case.tokens in DECODE_TOKENS]),
    ]
    return [figure for figure in found if figure.ratios]


def published_ceilings() -> Ceilings:
    return Ceilings(**load_published()["ceilings"], empty_us=math.nan)


def against_peers(prefill: Sequence[ProductRow]) -> Iterable[Figure]:
    """Peers' time over ours, and int8's over fp8's."""
    for dtype in DTYPES:
        rows = [row for row in prefill if row.case.dtype == dtype]
        best = {named(row, row.best_rival): row.speedup for row in rows if row.speedup}
        yield Figure(f"{dtype}: best peer / ours", best)
        for peer in (*RIVALS, "torch_gemm"):
            yield versus(f"{dtype}: {peer} / ours", rows, peer)
    eight_bits = [row for row in prefill if row.case.dtype != "bf16"]
    yield Figure("int8 / fp8, ours", ours_over_ours(eight_bits, dtype="fp8"), max)


def versus(name: str, rows: Sequence[ProductRow], peer: str) -> Figure:
    ratios = {named(row, peer): row.us[peer] / row.us[OURS] for row in rows if peer in row.us}
    return Figure(name, ratios)


def named(row: ProductRow, peer: str | None) -> str:
    return row.name + row.mark(peer)


def against_ceilings(
    prefill: Sequence[ProductRow], whose: str, ceilings: Ceilings | None
) -> Iterable[Figure]:
    """floor64, and bf16's time at the dense rate, over our time. Ceilings: None for each run's."""
    for span, rows in (
        (f"T >= {LARGE}", [row for row in prefill if row.case.tokens >= LARGE]),
        (f"T < {LARGE}", [row for row in prefill if row.case.tokens < LARGE]),
    ):
        for name, dtypes in (("all", tuple(DTYPES)), *((dtype, (dtype,)) for dtype in DTYPES)):
            ratios = {
                row.name: floor64_us(row.case, row.load, ceilings or row.ceilings) / row.us[OURS]
                for row in rows
                if row.case.dtype in dtypes
            }
            yield Figure(f"{name}: floor64 / ours, {span}, {whose} ceilings", ratios)
    dense = [
        row
        for row in prefill
        if row.case.dtype == "bf16"
        and row.case.rows >= DENSE_ROWS * row.case.num_experts
        and row.case.k >= DENSE_K
    ]
    yield at_dense_rate(
        f"bf16: dense / ours, {DENSE_ROWS} rows an expert, {whose} ceilings", dense, ceilings
    )


def at_dense_rate(
    name: str, rows: Sequence[ProductRow], ceilings: Ceilings | None = None
) -> Figure:
    """Time of each expert's rows, rounded up to 64, at the dense rate, over our time."""
    return Figure(
        name,
        {
            row.name: dense_us(row.case, row.load.rows64, ceilings or row.ceilings) / row.us[OURS]
            for row in rows
        },
    )


def skew(rows: Sequence[ProductRow]) -> Iterable[Figure]:
    """Our time on a skewed routing over that on a balanced one of as many rows."""
    for routing in ("zipf", "half"):
        both = [row for row in rows if row.case.routing in (routing, "balanced")]
        yield Figure(f"{routing} / balanced, ours", ours_over_ours(both, routing="balanced"), max)


def named_suites(mine: Sequence[ProductRow]) -> Iterable[Figure]:
    """The shapes of DeepGEMM's test and of the tutorial."""
    shapes = [row for row in mine if row.case.suite == "deepgemm"]
    yield versus("deepgemm / ours, its own shapes", shapes, "deepgemm")
    tutorial = [row for row in mine if row.case.suite == "tutorial"]
    for dtype in DTYPES:
        rows = [row for row in tutorial if row.case.dtype == dtype]
        even = [row for row in rows if row.case.routing == "balanced"]
        ragged = [row for row in rows if row.case.routing == "ragged"]
        yield at_dense_rate(f"{dtype}: dense / ours, tutorial", even)
        yield versus(f"{dtype}: padded_bmm / ours, tutorial, ragged", ragged, "padded_bmm")


def decode(rows: Sequence[ProductRow]) -> Iterable[Figure]:
    """Few tokens: the best peer's time, and the yardstick's, against ours."""
    balanced = [row for row in rows if row.case.routing == "balanced"]
    for dtype in DTYPES:
        mine = [row for row in balanced if row.case.dtype == dtype]
        skewed = [row for row in rows if (row.case.dtype, row.case.routing) == (dtype, "zipf")]
        yield from few_against_peers(dtype, mine)
        yield from few_against_stream(dtype, mine, skewed)
    idle = {
        row.name: row.us[row.best_rival] / row.us[STREAM]
        for row in balanced
        if row.best_rival and STREAM in row.us
    }
    yield Figure("best peer / stream, T <= 512", idle, min, 1.0, True)


def asked_of(dtype: str, target: float) -> float | None:
    """The target, but of bf16 there is one alone."""
    return None if dtype == "bf16" else target


def few_against_peers(dtype: str, rows: Sequence[ProductRow]) -> Iterable[Figure]:
    if dtype == "bf16":
        faster = {
            row.name: min(row.us[peer] for peer in GENERAL if peer in row.us) / row.us[OURS]
            for row in rows
            if set(GENERAL) & set(row.us)
        }
        yield Figure("bf16: best of triton, torch / ours, T <= 512", faster, min, 1.03)
    for span, tokens, least in (
        ("T <= 4", range(1, 5), 1.15),
        ("T 8..512", range(8, 513), 1.03),
    ):
        best = {r.name: r.speedup for r in rows if r.speedup and r.case.tokens in tokens}
        yield Figure(f"{dtype}: best peer / ours, {span}", best, min, asked_of(dtype, least))
    within = {
        row.name: row.speedup * (1 + row.spread)
        for row in rows
        if row.speedup is not None and row.spread is not None
    }
    name = f"{dtype}: best peer, with our spread / ours, T <= 512"
    yield Figure(name, within, min, asked_of(dtype, 1.0), each=True)


def few_against_stream(
    dtype: str, rows: Sequence[ProductRow], skewed: Sequence[ProductRow]
) -> Iterable[Figure]:
    for span, tokens, most in (
        ("T < 16", range(1, 16), 1.10),
        ("T >= 16", range(16, 513), 1.04),
    ):
        over = over_stream(row for row in rows if row.case.tokens in tokens)
        yield Figure(f"{dtype}: ours / stream, {span}", over, max, asked_of(dtype, most))
    zipf = over_stream(skewed)
    yield Figure(f"{dtype}: ours / stream, zipf", zipf, max, asked_of(dtype, 1.05))


def over_stream(rows: Iterable[ProductRow]) -> dict[str, float]:
    return {row.name: row.us[OURS] / row.us[STREAM] for row in rows if STREAM in row.us}
