"""The systems that are compared, by the names that tables speak of."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from perf.cases import Case
from perf.peers import deepgemm, humming, ours, torch_ops, triton_kernels, vllm
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
    "triton_kernels": triton_kernels.product,
    "torch": torch_ops.grouped,
    "padded_bmm": torch_ops.padded_bmm,
}
LAYERS: dict[str, Callable[..., Prepared]] = {
    OURS: ours.layer,
    "vllm": vllm.layer,
    "vllm_best": vllm.best_layer,
    "vllm_cutlass": vllm.cutlass_layer,
    "deepgemm": deepgemm.layer,
    "humming": humming.layer,
    "triton_kernels": triton_kernels.layer,
}
FOUR_BIT = (OURS, "humming", "triton_kernels")  # that take 4-bit weights; triton_kernels no others
COMPILING = (  # at their first launch
    "vllm", "vllm_best", "deepgemm", "deepgemm_masked", "humming", "triton_kernels",
)  # fmt: skip


def named(cases: Iterable[Case]) -> list[str]:
    """The systems that any of the cases is measured with, in the order of tables."""
    asked = {name for case in cases for name in systems_of(case)}
    return [name for name in PRODUCTS if name in asked]


def systems_of(case: Case) -> dict[str, Callable[..., Prepared]]:
    """The functions that prepare a system for the case, or say why it can't be measured."""
    systems = LAYERS if case.is_layer else PRODUCTS
    if case.packed:
        return {name: systems[name] for name in FOUR_BIT}
    return {name: make for name, make in systems.items() if name != "triton_kernels"}
