"""What layers and chains come to together: ratios to the Triton pipeline, to copies, to no PDL."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cutlass_moe.models.shapes import DTYPES
from perf.layer.cases import LAYER_TOKENS, ROUTE_REFERENCE
from perf.layer.rows import COPIES, COPY_FACTOR, COPY_US, LayerRow
from perf.rows import Figure
from perf.systems import NO_PDL, OURS, TRITON

# Targets: what is asked of a mean or of each case.
LAYER_TARGETS = dict(zip(LAYER_TOKENS, (0.65, 0.92, 0.97, 0.85, 0.75), strict=True))  # fp8, int8
ROUTE_MODEL, ROUTE_US = "qwen3-30b", {128: 6.0, 8192: 12.0}  # 128 experts, top-k 8
CHAIN_TARGETS = {  # by the tokens' span: of ours over NO_PDL, and over Triton
    "T <= 4": (range(1, 5), 0.85, 0.70),
    "T 16..32": (range(16, 33), 0.95, 0.93),
}
ERRORS = {"fp8": 1e-2, "int8": 5e-3, "bf16": 4e-3}  # ours, of a layer's output, to float64
BASELINE = 1.05  # the Triton pipeline over what the same steps took when they were measured first


def layer_figures(rows: Sequence[LayerRow]) -> list[Figure]:
    """Every figure that has a case."""
    layers = [row for row in rows if row.case.suite == "layer"]
    chains = [row for row in rows if row.case.suite == "chain"]
    found = [*against_triton(layers), *small_steps(layers), *dependent_launch(chains)]
    return [figure for figure in found if figure.ratios]


def ratios(rows: Iterable[LayerRow], one: str, other: str) -> dict[str, float]:
    found = ((row.name, row.ratio(one, other)) for row in rows)
    return {name: value for name, value in found if value is not None}


def against_triton(layers: Sequence[LayerRow]) -> Iterable[Figure]:
    for dtype in DTYPES:
        for tokens, most in LAYER_TARGETS.items():
            rows = [r for r in layers if (r.case.dtype, r.case.tokens) == (dtype, tokens)]
            name = f"{dtype}: layer, ours / triton{{}}, T = {tokens}"
            target = None if dtype == "bf16" else most
            yield Figure(name.format(""), ratios(rows, OURS, TRITON), max, target)
            first = {r.name: r.us[OURS] / r.published for r in rows if r.published and OURS in r.us}
            yield Figure(name.format("'s published time"), first, max, target)
        mine = [row for row in layers if row.case.dtype == dtype and OURS in row.errors]
        errors = {row.name: row.errors[OURS] / ERRORS[dtype] for row in mine}
        yield Figure(f"{dtype}: layer, our error / {ERRORS[dtype]}", errors, max, 1.0, each=True)
    first = {
        row.name: row.us[TRITON] / row.published
        for row in layers
        if row.published and TRITON in row.us
    }
    yield Figure("layer, triton / its published time", first, max, BASELINE, each=True)


def small_steps(layers: Sequence[LayerRow]) -> Iterable[Figure]:
    for step in COPIES:
        taken = {
            row.name: row.steps[step]["us"] / row.allowed(step)
            for row in layers
            if step in row.steps
        }
        yield Figure(f"{step} / ({COPY_FACTOR} x copy + {COPY_US:.0f} us)", taken, max, 1.0, True)
    routed = [row for row in layers if "route" in row.steps and row.case.model == ROUTE_MODEL]
    for tokens, most in ROUTE_US.items():
        rows = [row for row in routed if row.case.tokens == tokens]
        taken = {row.name: row.steps["route"]["us"] / most for row in rows}
        yield Figure(f"route, T = {tokens} / {most:.0f} us", taken, max, 1.0, True)
        by_torch = {
            row.name: row.steps[ROUTE_REFERENCE]["us"] / row.steps["route"]["us"] for row in rows
        }
        yield Figure(f"route, torch / ours, T = {tokens}", by_torch)


def dependent_launch(chains: Sequence[LayerRow]) -> Iterable[Figure]:
    for dtype in DTYPES:
        for span, (tokens, over_no_pdl, over_triton) in CHAIN_TARGETS.items():
            rows = [r for r in chains if r.case.dtype == dtype and r.case.tokens in tokens]
            for other, most in ((NO_PDL, over_no_pdl), (TRITON, over_triton)):
                name = f"{dtype}: chain, ours / {other}, {span}"
                yield Figure(name, ratios(rows, OURS, other), max, most, each=True)
