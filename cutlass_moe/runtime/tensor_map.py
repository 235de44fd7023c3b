"""Tensor maps: encoded by the driver, kept by address."""

from __future__ import annotations

from typing import NamedTuple


class WeightView(NamedTuple):
    """Weights [E, N, K] as a tensor map describes them.

    strides: of E, N and K, in elements. interleaved: whether the rows of a gated problem's weights
    are gate, up, gate, up, ...; else the first half of them is gate.
    """

    pointer: int
    strides: tuple[int, ...]
    interleaved: bool = False
