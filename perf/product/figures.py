"""What cases come to together: geometric means and worst cases of prefill, skew and suites."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

from cutlass_moe.models.shapes import DTYPES
from perf.product.cases import Ceilings, dense_us, floor_us
from perf.product.rows import DAGGER, OURS, RIVALS, Row, load_published, ours_over_ours
from perf.suites import DECODE_TOKENS, PREFILL_TOKENS

HEADER = ("figure", "mean", "worst", "target", "cases", ">= 1", "worst case")
LARGE = 8192  # tokens from which the floors are summed up apart
STREAM = "stream"
GENERAL = ("triton", "torch")  # peers that take every shape
DENSE_ROWS, DENSE_K = 512, 2048  # rows an expert and K from which the dense rate is in reach


@dataclass(frozen=True)
class Figure:
    """Ratios by the case's name. worst: min where more is better, max where less is. target: what
    is asked of the mean or, with each, of the worst case."""

    name: str
    ratios: dict[str, float]
    worst: Callable[..., Any] = min
    target: float | None = None
    each: bool = False

    @property
    def cells(self) -> list[str]:
        """Under HEADER."""
        worst = self.worst(self.ratios, key=lambda name: self.ratios[name])
        values = self.ratios.values()
        return [
            self.name,
            f"{geometric_mean(values):.3f}",
            f"{self.ratios[worst]:.3f}",
            self.verdict,
            str(len(values)),
            str(sum(value >= 1 for value in values)),
            worst,
        ]

    @property
    def verdict(self) -> str:
        """The target, and whether it is met."""
        if self.target is None:
            return "-"
        values = self.ratios.values()
        asked = self.worst(values) if self.each else geometric_mean(values)
        met = asked >= self.target if self.worst is min else asked <= self.target
        sign = ">=" if self.worst is min else "<="
        return f"{sign} {self.target:.2f} {'each ' * self.each}{'met' if met else 'MISSED'}"


def figures(rows: Sequence[Row]) -> list[Figure]:
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


def against_peers(prefill: Sequence[Row]) -> Iterable[Figure]:
    """Peers' time over ours, and int8's over fp8's."""
    for dtype in DTYPES:
        rows = [row for row in prefill if row.case.dtype == dtype]
        best = {named(row, row.best_rival): row.speedup for row in rows if row.speedup}
        yield Figure(f"{dtype}: best peer / ours", best)
        for peer in (*RIVALS, "torch_gemm"):
            yield versus(f"{dtype}: {peer} / ours", rows, peer)
    eight_bits = [row for row in prefill if row.case.dtype != "bf16"]
    yield Figure("int8 / fp8, ours", ours_over_ours(eight_bits, dtype="fp8"), max)


def versus(name: str, rows: Sequence[Row], peer: str) -> Figure:
    ratios = {named(row, peer): row.us[peer] / row.us[OURS] for row in rows if peer in row.us}
    return Figure(name, ratios)


def named(row: Row, peer: str | None) -> str:
    return row.name + DAGGER * (peer in row.published)


def against_ceilings(
    prefill: Sequence[Row], whose: str, ceilings: Ceilings | None
) -> Iterable[Figure]:
    """floor64, and bf16's time at the dense rate, over our time. Ceilings: None for each run's."""
    for span, rows in (
        (f"T >= {LARGE}", [row for row in prefill if row.case.tokens >= LARGE]),
        (f"T < {LARGE}", [row for row in prefill if row.case.tokens < LARGE]),
    ):
        for name, dtypes in (("all", tuple(DTYPES)), *((dtype, (dtype,)) for dtype in DTYPES)):
            ratios = {
                row.name: floor_us(row.case, row.load, ceilings or row.ceilings, round_rows=True)
                / row.us[OURS]
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


def at_dense_rate(name: str, rows: Sequence[Row], ceilings: Ceilings | None = None) -> Figure:
    """Time of each expert's rows, rounded up to 64, at the dense rate, over our time."""
    return Figure(
        name,
        {
            row.name: dense_us(row.case, row.load.rows64, ceilings or row.ceilings) / row.us[OURS]
            for row in rows
        },
    )


def skew(rows: Sequence[Row]) -> Iterable[Figure]:
    """Our time on a skewed routing over that on a balanced one of as many rows."""
    for routing in ("zipf", "half"):
        both = [row for row in rows if row.case.routing in (routing, "balanced")]
        yield Figure(f"{routing} / balanced, ours", ours_over_ours(both, routing="balanced"), max)


def named_suites(mine: Sequence[Row]) -> Iterable[Figure]:
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


def decode(rows: Sequence[Row]) -> Iterable[Figure]:
    """Few tokens: the best peer's time, and the yardstick's, against ours."""
    balanced = [row for row in rows if row.case.routing == "balanced"]
    for dtype in DTYPES:
        mine = [row for row in balanced if row.case.dtype == dtype]
        asked = dtype != "bf16"  # of bf16 one target alone
        if not asked:
            faster = {
                row.name: min(row.us[peer] for peer in GENERAL if peer in row.us) / row.us[OURS]
                for row in mine
                if set(GENERAL) & set(row.us)
            }
            yield Figure("bf16: best of triton, torch / ours, T <= 512", faster, min, 1.03)
        for span, tokens, least in (
            ("T <= 4", range(1, 5), 1.15),
            ("T 8..512", range(8, 513), 1.03),
        ):
            best = {r.name: r.speedup for r in mine if r.speedup and r.case.tokens in tokens}
            name = f"{dtype}: best peer / ours, {span}"
            yield Figure(name, best, min, least if asked else None)
        within = {
            row.name: row.speedup * (1 + row.spread)
            for row in mine
            if row.speedup is not None and row.spread is not None
        }
        name = f"{dtype}: best peer, with our spread / ours, T <= 512"
        yield Figure(name, within, min, 1.0 if asked else None, each=True)
        for span, tokens, most in (
            ("T < 16", range(1, 16), 1.10),
            ("T >= 16", range(16, 513), 1.04),
        ):
            over = over_stream(row for row in mine if row.case.tokens in tokens)
            name = f"{dtype}: ours / stream, {span}"
            yield Figure(name, over, max, most if asked else None)
        skewed = [row for row in rows if (row.case.dtype, row.case.routing) == (dtype, "zipf")]
        name = f"{dtype}: ours / stream, zipf"
        yield Figure(name, over_stream(skewed), max, 1.05 if asked else None)
    idle = {
        row.name: row.us[row.best_rival] / row.us[STREAM]
        for row in balanced
        if row.best_rival and STREAM in row.us
    }
    yield Figure("best peer / stream, T <= 512", idle, min, 1.0, True)


def over_stream(rows: Iterable[Row]) -> dict[str, float]:
    return {row.name: row.us[OURS] / row.us[STREAM] for row in rows if STREAM in row.us}
