"""Which cases there are, by suite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cutlass_moe.models.shapes import DTYPES, MODELS
from perf.layer.cases import CHAIN_DTYPES, LayerCase, chain_cases, layer_cases
from perf.product.cases import RAGGED_ROWS, ROUTINGS, Case

LAYER_SUITES = ("layer", "chain")
SUITES = ("gemm", "decode", "seed", "deepgemm", "tutorial", "schedules", *LAYER_SUITES)
GEMM_MODELS = ("qwen3-30b", "mixtral", "dsv3-ep8")
PREFILL_TOKENS = (1024, 2048, 4096, 8192, 16384)
GEMM_TOKENS = (1, 16, 128, *PREFILL_TOKENS)
DECODE_TOKENS = tuple(2**i for i in range(10))
SKEWED_TOKENS = 128  # of the decode suite
POWERS_OF_TWO = tuple(2**i for i in range(16))


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


def decode_cases(models: Sequence[str], dtypes: Iterable[str]) -> list[Case]:
    """Cases of the gemm suite: few tokens, of bf16 every other count, and once a skewed routing."""
    found = []
    for dtype in dtypes:
        tokens = DECODE_TOKENS[::2] if dtype == "bf16" else DECODE_TOKENS
        found += gemm_cases(models, [dtype], tokens, ["balanced"])
        found += gemm_cases(models, [dtype], [SKEWED_TOKENS], ["zipf"])
    return found


def select(
    suites: Sequence[str],
    models: Sequence[str] = GEMM_MODELS,
    dtypes: Sequence[str] = (),
    tokens: Sequence[int] = GEMM_TOKENS,
    routings: Sequence[str] = ("balanced",),
) -> list[Case | LayerCase]:
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
                raise ValueError(f"{what} {name!r}: expected one of {', '.join(known)}")
    if any(t < 1 for t in tokens):
        raise ValueError(f"tokens must be positive, got {', '.join(map(str, tokens))}")
    gemm: list[Case] = []
    if "gemm" in suites:
        gemm += gemm_cases(models, dtypes or DTYPES, tokens, routings)
    if "decode" in suites:
        gemm += decode_cases(models, dtypes or DTYPES)
    together = {case.weights_id: number for number, case in enumerate(gemm)}
    cases: list[Case | LayerCase] = []
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
