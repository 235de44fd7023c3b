"""The systems that are compared, by the names that tables speak of."""

from __future__ import annotations

from collections.abc import Callable

from perf.cases import Case
from perf.peers import deepgemm, humming, ours, torch_ops, vllm
from perf.peers.prepared import Prepared

OURS = "cutlass_moe"
PRODUCTS: dict[str, Callable[..., Prepared]] = {
    OURS: ours.product,
    "vllm": vllm.product,
    "vllm_best": vllm.best_product,
    "vllm_cutlass": vllm.cutlass_product,
    "deepgemm": deepgemm.contiguous,
    "deepgemm_masked": deepgemm.masked,
    "humming": humming.product,
    "torch": torch_ops.grouped,
    "padded_bmm": torch_ops.padded_bmm,
}
LAYERS: dict[str, Callable[..., Prepared]] = {
    OURS: ours.layer,
    "vllm": vllm.layer,
    "vllm_best": vllm.best_layer,
    "vllm_cutlass": vllm.cutlass_layer,
    "humming": humming.layer,
}
COMPILING = ("vllm", "vllm_best", "deepgemm", "deepgemm_masked", "humming")  # at their first launch


def systems_of(case: Case) -> dict[str, Callable[..., Prepared]]:
    """The functions that prepare a system for the case, or say why it can't be measured."""
    return LAYERS if case.is_layer else PRODUCTS
