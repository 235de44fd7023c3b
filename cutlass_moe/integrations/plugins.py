"""What serving engines call when they start: the entry points of this package.

They are loaded wherever this package is installed beside an engine. A version that was not tested
is left as it is, with one warning, and so is an engine in which something is not where it should
be: neither ends the engine.
"""

from __future__ import annotations

import importlib.util
import logging
from importlib import import_module, metadata

from cutlass_moe.environment import SGLANG, VLLM

TESTED = {"vllm": ("0.33",), "sglang": ("0.5.23",)}  # versions begin with one of these
VLLM_REGISTRY = "vllm.model_executor.layers.fused_moe.oracle.fp8_registry"
_logger = logging.getLogger("cutlass_moe")


def vllm() -> None:
    """Offers our experts to vLLM's choice of kernels (`vllm.general_plugins`)."""
    if VLLM.on():
        _register("vllm", is_open=_is_there(VLLM_REGISTRY))


def sglang() -> None:
    """Puts our kernels before SGLang's Triton runner (`sglang.srt.plugins`)."""
    if SGLANG.on():
        _register("sglang")


def is_tested(engine: str) -> bool:
    """Whether the installed version of an engine is one that this package was tested with."""
    version = metadata.version(engine)
    return any(version == one or version.startswith(f"{one}.") for one in TESTED[engine])


def _register(engine: str, is_open: bool = False) -> None:
    """is_open: the engine has a registry for kernels like ours, whatever its version."""
    if not is_tested(engine) and not is_open:
        _logger.warning(
            "%s %s is not among the versions tested with cutlass_moe, %s, and stays as it is",
            *(engine, metadata.version(engine), ", ".join(TESTED[engine])),
        )
        return
    try:
        import_module(f"cutlass_moe.integrations.{engine}").register()
    except Exception as error:
        _logger.warning(
            "cutlass_moe could not be put into %s %s, which stays as it is: %s: %s",
            *(engine, metadata.version(engine), type(error).__name__, error),
        )


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False
