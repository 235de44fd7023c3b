"""What a GPU architecture offers to a kernel."""

from __future__ import annotations

ARCHS = ("sm_90a",)

_SMEM_PER_SM = 233_472  # 228 KiB, of which each CTA loses 1 KiB to the system

_SMEM_RESERVED = 1024

_SMEM_UNIT = 128

_REGISTERS_PER_SM = 65_536
