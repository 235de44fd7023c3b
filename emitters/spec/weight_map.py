"""The tensor map through which a kernel reads weights: view, box and corners agree here."""

from __future__ import annotations


def gate_strides(n: int, interleaved: bool) -> tuple[int, int]:
    """From an output's gate column to the next output's, and to its up column, among n."""
    return (2, 1) if interleaved else (1, n // 2)
