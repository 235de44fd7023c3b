"""How many files a reader meets who follows a tensor from an op to the launch of its kernels.

A stay: a visit to a file whose functions are handed the tensor, alone or among others. Coming back
to a file is a stay again; several calls into one file from one line are one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe.layer import chain
from cutlass_moe.ops import dispatch
from cutlass_moe.runtime import library
from cutlass_moe.runtime.signatures import Signatures
from tests.support.cases import CASES, make_inputs
from tests.support.fake_driver import FakeDriver, parameters_of

PACKAGE = Path(cm.__file__).parent


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver without a GPU, which all tensors say that they are on."""
    fake = FakeDriver().patch(monkeypatch)
    properties = SimpleNamespace(multi_processor_count=132)
    for name, answer in {
        "load": lambda problem, config, device: fake.kernel(parameters_of(problem, config)),
        "device_arch": lambda device: "sm_90a",
        "device_name": lambda device: "a GPU without a table",
    }.items():
        monkeypatch.setattr(library, name, answer)
    monkeypatch.setattr(dispatch, "_calls", Signatures())
    monkeypatch.setattr(chain, "_chains", Signatures())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(Tensor, "get_device", lambda tensor: 0)


def stays(call: Callable[[], object], tensor: Tensor) -> list[str]:
    """The files in which a call hands the tensor on, in order."""
    found: list[str] = []
    last: tuple[FrameType, int, str] | None = None

    def see(frame: FrameType | None, event: str, _: Any) -> None:
        nonlocal last
        if event != "call" or frame is None or not _meets(frame, tensor):
            return
        caller, here = frame.f_back, frame.f_code.co_filename
        if caller is not None and _meets(caller, tensor):
            if last != (look := (caller, caller.f_lineno, here)):
                found.append(caller.f_code.co_filename)
            last = look
        found.append(here)

    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    names = [str(Path(file).relative_to(PACKAGE)) for file in found]
    return [name for at, name in enumerate(names) if not at or name != names[at - 1]]


def _meets(frame: FrameType, tensor: Tensor) -> bool:
    """Whether a function of the package has the tensor."""
    if not Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
        return False
    return any(item is tensor for value in frame.f_locals.values() for item in _flat(value))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = tuple(value.values())
    if not isinstance(value, tuple | list):
        yield value
        return
    for item in value:
        yield from _flat(item)


def test_of_a_product() -> None:
    inputs = make_inputs(CASES["ragged"], "cpu")
    first, warm = (stays(lambda: cm.grouped_matmul(**inputs), inputs["x"]) for _ in range(2))
    assert first[0] == "ops/grouped_matmul.py" and first[-1] == "ops/dispatch.py"
    assert len(first) <= 8 and len(set(first)) <= 5, first
    assert len(warm) < len(first) and set(warm) < set(first)


@pytest.mark.parametrize("quant", [None, "fp8"])
def test_of_a_layer(quant: str | None) -> None:
    hidden, w13, w2 = torch.randn(32, 256), torch.randn(8, 256, 256), torch.randn(8, 256, 128)
    weights, ids = torch.rand(32, 2), torch.randint(8, (32, 2), dtype=torch.int32)
    given: dict[str, Any] = {"w13": w13.bfloat16(), "w2": w2.bfloat16()}
    if quant:
        given = {"quant": quant, "w13_scale": torch.ones(8, 256), "w2_scale": torch.ones(8, 256)}
        given |= {"w13": w13.to(torch.float8_e4m3fn), "w2": w2.to(torch.float8_e4m3fn)}
    hidden = hidden.bfloat16()
    call = {**given, "topk_weights": weights, "topk_ids": ids}
    first, warm = (stays(lambda: cm.fused_moe(hidden, **call), hidden) for _ in range(2))
    assert first[0] == "layer/fused_moe.py" and first[-1] == "layer/checks.py"  # its addresses
    assert len(first) <= 16 and len(set(first)) <= 8, first
    assert len(warm) < len(first) and set(warm) < set(first)
