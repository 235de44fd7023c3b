"""Stands in for the package grouped_gemm: `from cutlass_moe.compat import grouped_gemm`."""

from cutlass_moe.compat.grouped_gemm import ops

__all__ = ["ops"]
