"""Why a product has no kernel, in words, and which padding mends it."""

from __future__ import annotations

from dataclasses import replace

from cutlass_moe.operands import padded
from emitters.spec.dtypes import DType
from emitters.spec.gemm import GemmProblem, Major
from emitters.spec.registry import why_illegal


def why_no_product(problem: GemmProblem, arch: str) -> str | None:
    """Why no kernel for `arch` computes a product, and which padding mends it; None if one does."""
    reason = why_illegal(problem, arch=arch)
    if reason is None:
        return None
    wide = replace(problem, n=_padded_columns(problem), k=padded(problem.k, problem.x))
    if why_illegal(wide, arch=arch) is not None:
        return reason
    mends = []
    if wide.k != problem.k:
        mends.append(_pad_k(problem.x, wide.k))
    if wide.n != problem.n:
        rows = f"gates and ups to {wide.n // 2} each" if wide.gated else f"N to {wide.n}"
        columns = wide.out_columns - problem.out_columns
        mends.append(
            f"pad {rows} with zeros in weight, scale and bias, and drop the last {columns} columns"
        )
    return f"{reason}; {', and '.join(mends)}"


def _padded_columns(problem: GemmProblem) -> int:
    """The least N from the problem's up that kernels take."""
    if problem.gated:  # either half in blocks of 8 columns
        return 2 * padded(problem.n // 2, DType.BF16)
    n_major = problem.weight.major is Major.N  # rows of weights are columns then
    return padded(problem.n, problem.x if n_major else problem.out)


def _pad_k(x: DType, k: int) -> str:
    if not x.quantized:
        return f"pad K to {k} with zeros in x and weight"
    return (
        f"pad K to {k} with quantize_per_token(x, dtype, pad_to=16) and "
        "quantize_per_channel(weight, dtype, pad_to=16)"
    )
