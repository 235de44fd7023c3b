"""The samples with arguments, and what must come out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from tests.ptxsim.machine import Launch, Machine
from tests.ptxsim.memory import WORKSPACE, GlobalMemory
from tests.ptxsim.ptx import Fault, parse
from tests.ptxsim.samples import samples
from tests.ptxsim.schedule import Schedule
from tests.ptxsim.tensormap import TensorMap
from tests.ptxsim.warp import Code, Trace

Data = dict[str, np.ndarray]
SHARED_BYTES, REGISTERS = 16384, 32


@dataclass(frozen=True)
class Kernel:
    """arguments: names of data, "map NAME" for a tensor map of [n, columns], or numbers."""

    sample: Any
    arguments: tuple[str | int, ...]
    grid: int

    @property
    def ptx(self) -> str:
        kinds = "".join("i" if isinstance(a, int) else "p" for a in self.arguments)
        return samples.emit(self.sample, kinds)


@dataclass(frozen=True)
class Scene:
    """writers: of all data but inputs, the number of the kernel, or WORKSPACE. expected: what the
    kernels must write, from the data before. box: of tensor maps."""

    kernels: tuple[Kernel, ...]
    data: Callable[[], Data]
    writers: dict[str, int]
    expected: Callable[[Data], Data]
    box: tuple[int, int] = (1, 1)
    same: dict[str, str] = field(default_factory=dict)  # names of one piece of memory

    def run(
        self, schedule: Schedule, texts: list[str] | None = None, trace: Trace | None = None
    ) -> None:
        """texts: PTX in place of the kernels' own. Raises Fault, also where the result is wrong."""
        data = {name: array.astype(np.int32) for name, array in self.data().items()}
        expected = self.expected(data)
        memory, address = GlobalMemory(), {}
        for name, array in data.items():
            address[name] = memory.add(name, array.reshape(-1).view(np.uint8), self._writer(name))
        for name, array in data.items():
            if array.ndim == 2:
                tensor_map = self._map(address[name], array).encode()
                address[f"map {name}"] = memory.add("map", np.frombuffer(tensor_map, np.uint8))
        address |= {name: address[of] for name, of in self.same.items()}
        launches = [
            self._launch(kernel, text, address)
            for kernel, text in zip(self.kernels, texts or self.texts, strict=True)
        ]
        Machine(memory, launches, schedule, trace).run()
        for name, array in expected.items():
            if not np.array_equal(data[name], array):
                raise Fault(f"wrong result: {name}")

    @property
    def texts(self) -> list[str]:
        return [kernel.ptx for kernel in self.kernels]

    def _writer(self, name: str) -> int | None:
        return self.writers.get(name)

    def _map(self, address: int, array: np.ndarray) -> TensorMap:
        rows, columns = array.shape
        return TensorMap(address, 4, (columns, rows), (columns * 4,), self.box, 0)

    def _launch(self, kernel: Kernel, text: str, address: dict[str, int]) -> Launch:
        code = _code(text)
        packed = bytearray(code.program.parameter_bytes)
        for value, p in zip(kernel.arguments, code.program.parameters, strict=True):
            number = value if isinstance(value, int) else address[value]
            packed[p.offset : p.offset + p.size] = number.to_bytes(p.size, "little")
        return Launch(
            code, kernel.grid, SHARED_BYTES, REGISTERS, bytes(packed), kernel.sample.cluster
        )


@lru_cache(maxsize=4)
def _code(ptx: str) -> Code:
    return Code(parse(ptx))


def _numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).integers(-1000, 1000, shape, np.int32)


def _zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int32)


def _exchanged(data: Data) -> Data:
    other = data["x"].reshape(-1, 2, 32)[:, ::-1]
    return {"out": np.stack([other + 100, other[..., ::-1]], axis=2).ravel()}


def _histogram(data: Data) -> Data:
    counts = np.bincount(data["x"], minlength=32)
    return {"out": np.append(counts, data["x"].max())}


def _turned(data: Data) -> Data:
    value = data["x"]
    for _ in range(samples.STEPS):
        value = 3 * value + 1 - 2
    return {"out": value}


def _flag(fences: bool) -> Scene:
    names = ("x", "flag", "buffer", "out")
    return Scene(
        (Kernel(samples.Flag(fences), names, 2),),
        lambda: {"x": _numbers(32), "flag": _zeros(1), "buffer": _zeros(32), "out": _zeros(32)},
        {"flag": WORKSPACE, "buffer": WORKSPACE, "out": 0},
        lambda data: {"out": data["x"] + 1},
    )


def _staged(tensor: bool) -> Scene:
    out = "map out" if tensor else "out"
    return Scene(
        (Kernel(samples.Staged(tensor), ("x", out), 1),),
        lambda: {"x": _numbers(samples.STEPS, 128), "out": _zeros(samples.STEPS, 128)},
        {"out": 0},
        lambda data: {"out": data["x"] + 1},
        (128, 1),
    )


SCENES: dict[str, Scene] = {
    "multicast": Scene(
        (Kernel(samples.Multicast(), ("map matrix", "out"), 4),),
        lambda: {"matrix": _numbers(samples.STEPS * samples.ROWS, 32), "out": _zeros(128)},
        {"out": 0},
        lambda data: {"out": np.tile(data["matrix"].sum(axis=0), 4)},
        (32, samples.ROWS // 2),
    ),
    "exchange": Scene(
        (Kernel(samples.Exchange(), ("x", "out"), 4),),
        lambda: {"x": _numbers(128), "out": _zeros(256)},
        {"out": 0},
        _exchanged,
    ),
    "split": Scene(
        (Kernel(samples.SplitSum(), ("x", "counters", "halves", "out", 3), 3),),
        lambda: {
            "x": _numbers(384), "counters": _zeros(4), "halves": _zeros(384), "out": _zeros(192)
        },
        {"counters": WORKSPACE, "halves": WORKSPACE, "out": 0},
        lambda data: {
            "out": data["x"].reshape(3, 2, 64).sum(axis=1).ravel(),
            "counters": np.array([9, 2, 2, 2]),
        },
    ),
    "flag": _flag(fences=False),
    "flag_fences": _flag(fences=True),
    "histogram": Scene(
        (Kernel(samples.Histogram(), ("x", "out"), 1),),
        lambda: {"x": _numbers(64) % 32, "out": _zeros(33)},
        {"out": 0},
        _histogram,
    ),
    "plain": Scene(
        (Kernel(samples.Plain(), ("x", "out"), 1),),
        lambda: {"x": _numbers(128), "out": _zeros(128)},
        {"out": 0},
        lambda data: {"out": data["x"] + 1},
    ),
    "staged": _staged(tensor=False),
    "staged_tensor": _staged(tensor=True),
    "dependent": Scene(
        (
            Kernel(samples.First(), ("x", "middle"), 2),
            Kernel(samples.Second(), ("middle", "bias", "early", "out"), 2),
        ),
        lambda: {
            "x": _numbers(64), "middle": _zeros(64), "bias": _numbers(32), "early": _zeros(64),
            "out": _zeros(64),
        },
        {"middle": 0, "early": 1, "out": 1},
        lambda data: {"out": 10 * (data["x"] + 1) + np.tile(data["bias"], 2)},
    ),
    "turns": Scene(
        (Kernel(samples.Turns(), ("x", "out"), 1),),
        lambda: {"x": _numbers(32), "out": _zeros(32)},
        {"out": 0},
        _turned,
    ),
}  # fmt: skip
