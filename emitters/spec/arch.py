"""What a GPU architecture offers to a kernel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arch:
    """name: the compilation target. capability: the compute capability of the GPUs that run it.
    sms: of the GPU that configs are estimated for. Sizes in bytes, registers of 32 bits."""

    name: str
    capability: tuple[int, int]
    sms: int
    smem_per_sm: int
    smem_reserved: int  # of that, taken by the system for every CTA
    smem_unit: int  # what a CTA asks for is rounded up to a multiple of this
    registers_per_sm: int


SM90 = Arch("sm_90a", (9, 0), 132, 233_472, 1024, 128, 65_536)
ARCHS = {arch.name: arch for arch in (SM90,)}
DEFAULT_ARCH = SM90.name


def arch_of(capability: tuple[int, int]) -> str:
    """The compilation target of a GPU: "sm_90a" for capability 9.0; for GPUs that no template
    supports "sm_" and the digits."""
    known = {arch.capability: arch.name for arch in ARCHS.values()}
    return known.get(capability, "sm_{}{}".format(*capability))


def why_no_registers(accumulators: int, others: int, limit: int, whose: str) -> str | None:
    """None where a thread has registers for its accumulators and others, else the reason."""
    if accumulators + others <= limit:
        return None
    return (
        f"a {whose} must do with {limit} registers, it needs about {accumulators + others} "
        f"({accumulators} of them accumulators)"
    )
