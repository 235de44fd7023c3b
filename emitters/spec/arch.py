"""The resources that a GPU architecture offers to a kernel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arch:
    """A GPU architecture and its resources; sizes in bytes, registers of 32 bits."""

    name: str  # the compilation target
    capability: tuple[int, int]  # the compute capability of the GPUs that run it
    sms: int  # of the GPU that configs are estimated for
    smem_per_sm: int
    smem_reserved: int  # of smem_per_sm, per CTA, for the system
    smem_unit: int  # the shared memory of a CTA is rounded up to a multiple of this
    registers_per_sm: int


SM90 = Arch("sm_90a", (9, 0), 132, 233_472, 1024, 128, 65_536)
ARCHS = {arch.name: arch for arch in (SM90,)}
DEFAULT_ARCH = SM90.name


def arch_of(capability: tuple[int, int]) -> str:
    """The compilation target of a GPU, "sm_90a" for capability (9, 0).

    For GPUs that no template supports, "sm_" and the digits of the capability.
    """
    known = {arch.capability: arch.name for arch in ARCHS.values()}
    return known.get(capability, "sm_{}{}".format(*capability))


def why_no_registers(accumulators: int, others: int, limit: int, role: str) -> str | None:
    """Why a thread has too few registers for its accumulators and other values, or None.

    role: the thread's name in the reason.
    """
    if accumulators + others <= limit:
        return None
    return (
        f"a {role} must need at most {limit} registers, got about {accumulators + others} "
        f"({accumulators} of them accumulators)"
    )
