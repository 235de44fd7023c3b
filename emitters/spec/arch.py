"""The resources that a GPU architecture offers to a kernel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arch:
    """A GPU architecture and its resources; sizes in bytes, registers of 32 bits."""

    name: str  # the compilation target
    capability: tuple[int, int]  # the compute capability of the GPUs that run it
    smem_per_sm: int
    smem_reserved: int  # of smem_per_sm, per CTA, for the system
    smem_unit: int  # the shared memory of a CTA is rounded up to a multiple of this
    registers_per_sm: int


SM90 = Arch("sm_90a", (9, 0), 233_472, 1024, 128, 65_536)
ARCHS = {arch.name: arch for arch in (SM90,)}
DEFAULT_ARCH = SM90.name


@dataclass(frozen=True)
class Gpu:
    """A GPU and those of its figures that an estimate of the fastest config asks for."""

    name: str  # as the driver gives it
    sms: int
    bandwidth: float  # of its memory, bytes per second
    l2: int  # bytes
    flops: float  # per second, dense bfloat16

    @property
    def balance(self) -> float:
        """The operations that it can do in the time of reading a byte."""
        return self.flops / self.bandwidth

    def share(self, name: str, sms: int) -> Gpu:
        """A part of this GPU that has so many SMs, and as large a share of all else."""
        part = sms / self.sms
        return Gpu(name, sms, self.bandwidth * part, round(self.l2 * part), self.flops * part)


# From NVIDIA's data sheets; L2 as the driver reports it.
H200 = Gpu("NVIDIA H200", 132, 4.8e12, 60 << 20, 989e12)
GPUS = {
    gpu.name: gpu
    for gpu in (
        H200,
        Gpu("NVIDIA H100 80GB HBM3", 132, 3.35e12, 50 << 20, 989e12),
        Gpu("NVIDIA H100 PCIe", 114, 2.0e12, 50 << 20, 756e12),
        Gpu("NVIDIA H20", 78, 4.0e12, 60 << 20, 148e12),
    )
}


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
