"""Stands in for the package grouped_gemm: `from cutlass_moe.compat import grouped_gemm`.

Its functions are those of nv-grouped-gemm 1.1.4 (github.com/fanshiqing/grouped_gemm), of which
grouped_gemm (github.com/tgale96/grouped_gemm) has `gmm`. `cutlass_moe.compat.install` makes
`import grouped_gemm` find this.
"""

from cutlass_moe.compat.grouped_gemm import backend, ops

__all__ = ["backend", "ops"]
