"""Errors of the CUDA driver."""

from __future__ import annotations

from typing import Any

from cuda.bindings import driver


class DriverError(RuntimeError):
    """A call of the CUDA driver failed, or would fail."""


def checked(call: str, result: tuple[Any, ...]) -> Any:
    """The driver's answer without its status; raises DriverError unless that is success.

    call: the name of the driver's function.
    """
    if result[0] != driver.CUresult.CUDA_SUCCESS:
        raise DriverError(f"{call} failed: {driver.CUresult(result[0]).name}")
    return result[1] if len(result) == 2 else result[1:]
