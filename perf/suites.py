"""Which cases there are, by suite."""

from __future__ import annotations

from collections.abc import Sequence

from cutlass_moe.models.shapes import DTYPES, MODELS
from perf.cases import BenchCase
from perf.layer.cases import CHAIN_DTYPES, chain_cases, layer_cases
from perf.product.cases import (
    PREFILL_TOKENS,
    ROUTINGS,
    ProductCase,
    decode_cases,
    deepgemm_cases,
    gemm_cases,
    schedule_cases,
    seed_cases,
    tutorial_cases,
)

LAYER_SUITES = ("layer", "chain")
SUITES = ("gemm", "decode", "seed", "deepgemm", "tutorial", "schedules", *LAYER_SUITES)
GEMM_MODELS = ("qwen3-30b", "mixtral", "dsv3-ep8")
GEMM_TOKENS = (1, 16, 128, *PREFILL_TOKENS)
POWERS_OF_TWO = tuple(2**i for i in range(16))


def select(
    suites: Sequence[str],
    models: Sequence[str] = GEMM_MODELS,
    dtypes: Sequence[str] = (),
    tokens: Sequence[int] = GEMM_TOKENS,
    routings: Sequence[str] = ("balanced",),
) -> list[BenchCase]:
    """Cases of the suites, in the order they are to be measured in.

    Without dtypes, all of them, but only fp8 of the DeepGEMM shapes and of the schedules, and the
    8-bit ones of chains. models select among the suites gemm, decode, schedules and layer, tokens
    among gemm; decode, tutorial and schedules have routings of their own. Raises ValueError on an
    unknown name.
    """
    for what, asked, known in (
        ("suite", suites, SUITES),
        ("model", models, tuple(MODELS)),
        ("dtype", dtypes, tuple(DTYPES)),
        ("routing", routings, ROUTINGS),
    ):
        for name in asked:
            if name not in known:
                raise ValueError(f"{what} must be one of {', '.join(known)}, got {name!r}")
    if any(t < 1 for t in tokens):
        raise ValueError(f"tokens must be positive, got {', '.join(map(str, tokens))}")
    gemm: list[ProductCase] = []
    if "gemm" in suites:
        gemm += gemm_cases(models, dtypes or DTYPES, tokens, routings)
    if "decode" in suites:
        gemm += decode_cases(models, dtypes or DTYPES)
    together = {case.weights_id: number for number, case in enumerate(gemm)}
    cases: list[BenchCase] = []
    if "seed" in suites:
        cases += seed_cases(dtypes or DTYPES, routings)
    if "layer" in suites:
        cases += layer_cases(models, dtypes or DTYPES)
    if "chain" in suites:
        cases += chain_cases(dtypes or CHAIN_DTYPES)
    if "deepgemm" in suites:
        cases += deepgemm_cases(dtypes or ("fp8",), routings)
    if "tutorial" in suites:
        cases += tutorial_cases(dtypes or DTYPES)
    if "schedules" in suites:
        cases += schedule_cases(models, dtypes or ("fp8",))
    cases += sorted(dict.fromkeys(gemm), key=lambda case: together[case.weights_id])
    return cases
