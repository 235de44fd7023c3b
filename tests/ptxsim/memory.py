"""Global and shared memory. Every access is checked; shared memory remembers who touched it."""

from __future__ import annotations

import numpy as np

from tests.ptxsim.order import GENERIC, NEVER, Order, Threads
from tests.ptxsim.ptx import Fault

_REGION_BITS = 40
SHARED_WINDOW = 0x7000_0000_0000_0000  # of shared memory among generic addresses
PARAM_WINDOW = 0x6000_0000_0000_0000
SHARED_BASE = 1024  # address of dynamic shared memory, as after the system's own kilobyte
_UNWRITTEN, _BARRIER = -1, -2


def _aligned(addresses: np.ndarray, size: int, what: str) -> None:
    wrong = addresses % size != 0
    if wrong.any():
        raise Fault(f"misaligned {what} of {size} bytes at {int(addresses[wrong][0]):#x}")


class Region:
    """One argument's memory."""

    def __init__(self, name: str, data: np.ndarray, base: int, writable: bool):
        self.name, self.data, self.base, self.writable = name, data, base, writable
        self.writes = np.zeros(len(data) if writable else 0, np.uint8)


class GlobalMemory:
    """The arguments' tensors, each alone in its part of the address space."""

    def __init__(self) -> None:
        self.regions: list[Region] = []

    def add(self, name: str, data: np.ndarray, writable: bool = False) -> int:
        """data: uint8 [bytes], shared with the caller. Returns its address, 256-byte aligned."""
        base = (len(self.regions) + 1) << _REGION_BITS
        self.regions.append(Region(name, data, base, writable))
        return base

    def _locate(self, addresses: np.ndarray, size: int) -> tuple[Region, np.ndarray]:
        """addresses: int64 [n], not empty, all inside one region."""
        numbers = (addresses >> _REGION_BITS) - 1
        first = int(numbers[0])
        if not 0 <= first < len(self.regions):
            raise Fault(f"global access at {int(addresses[0]):#x}, outside every argument")
        region = self.regions[first]
        offsets = addresses - region.base
        outside = (offsets < 0) | (offsets + size > len(region.data))
        if outside.any():
            raise Fault(
                f"global access of {size} bytes at {region.name} + {int(offsets[outside][0])}, "
                f"which has {len(region.data)} bytes"
            )
        return region, offsets[:, None] + np.arange(size)

    def read(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """uint8 [n, size]"""
        _aligned(addresses, size, "global read")
        return self.read_bytes(addresses, size)

    def read_bytes(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """The same of any size and alignment, as bulk copies read."""
        region, index = self._locate(addresses, size)
        return region.data[index]

    def write(self, addresses: np.ndarray, values: np.ndarray) -> None:
        size = values.shape[1]
        _aligned(addresses, size, "global write")
        region, index = self._locate(addresses, size)
        if not region.writable:
            raise Fault(f"write to {region.name}, which is an input")
        np.add.at(region.writes, index, 1)
        if (region.writes[index] > 1).any():
            at = int(index[region.writes[index] > 1].flat[0])
            raise Fault(f"{region.name} + {at} bytes written twice")
        region.data[index] = values


class SharedMemory:
    """Bytes, and for each word its last write and the reads since then.

    A read is kept per warp: its latest time and the lanes that read. WGMMA's reads are kept by
    their number in the warp's queue.
    """

    def __init__(self, size: int, order: Order):
        self.order, self.size = order, SHARED_BASE + size
        self.data = np.zeros(self.size, np.uint8)
        words = -(-self.size // 4)
        self.agent = np.full(words, _UNWRITTEN, np.int32)
        self.stamp = np.zeros(words, np.int32)
        self.generic = np.zeros(words, np.bool_)  # written through the generic proxy
        self.read_tick = np.zeros((words, order.warps), np.int32)
        self.read_lanes = np.zeros((words, order.warps), np.uint32)
        self.queue_reads = np.zeros((words, order.warps), np.int32)

    def _words(self, addresses: np.ndarray, size: int, what: str) -> np.ndarray:
        _aligned(addresses, size, f"shared {what}")
        if len(addresses) and not (
            addresses.min() >= SHARED_BASE and addresses.max() + size <= self.size
        ):
            worst = addresses.max() if addresses.max() + size > self.size else addresses.min()
            raise Fault(f"shared {what} at {int(worst)}, outside [{SHARED_BASE}, {self.size})")
        return addresses[:, None] // 4 + np.arange(size // 4)

    def take_for_barrier(self, address: int) -> None:
        words = self._words(np.array([address]), 8, "mbarrier")
        self.agent[words] = _BARRIER

    def _check_known(self, words: np.ndarray, known: np.ndarray, what: str) -> None:
        """known: bool like words, whether the last write of each happened before."""
        agent = self.agent[words]
        if (agent < 0).any():
            if (agent == _BARRIER).any():
                raise Fault(f"{what} of an mbarrier")
            raise Fault(f"{what} of uninitialised shared memory at {self._first(words, agent < 0)}")
        if not known.all():
            at = self._first(words, ~known)
            if (self.stamp[words][~known] == NEVER).any():
                raise Fault(f"{what} at {at} while an asynchronous write is pending")
            raise Fault(f"{what} at {at}: nothing orders it after the write of {self._who(at)}")

    def _first(self, words: np.ndarray, where: np.ndarray) -> int:
        return int(words[where].flat[0]) * 4

    def _who(self, address: int) -> str:
        agent = int(self.agent[address // 4])
        order = self.order
        if agent < order.threads:
            return f"thread {agent}"
        return f"a copy that completes on mbarrier {agent - order.threads - order.warps}"

    def read(self, threads: Threads, addresses: np.ndarray, size: int) -> np.ndarray:
        """By the generic proxy, a thread each: uint8 [n, size]."""
        words = self._words(addresses, size, "read")
        agent = np.maximum(self.agent[words], 0)
        known = self.order.known[GENERIC][threads[:, None], agent] >= self.stamp[words]
        self._check_known(words, known, "read")
        warp = threads[0] // 32
        self.read_tick[words, warp] = self.order.ticks[warp]
        bits = np.uint32(1) << (threads % 32).astype(np.uint32)
        np.bitwise_or.at(self.read_lanes, (words, warp), bits[:, None])
        return self.data[addresses[:, None] + np.arange(size)]

    def _check_write(self, threads: Threads, words: np.ndarray, proxy: int) -> None:
        """Everything done to these words before must have happened before. threads: [n] or [1]."""
        order, column = self.order, threads[:, None]
        agent = self.agent[words]
        if (agent == _BARRIER).any():
            raise Fault("write to an mbarrier")
        needs = np.where(self.generic[words], proxy, GENERIC)
        known = order.known[needs, column, np.maximum(agent, 0)] >= self.stamp[words]
        known |= agent == _UNWRITTEN
        if not known.all():
            at = self._first(words, ~known)
            pending = (self.stamp[words][~known] == NEVER).any()
            raise Fault(
                f"write at {at} while an asynchronous write is pending"
                if pending
                else f"write at {at}: nothing orders it after the write of {self._who(at)}"
            )
        queues = order.known[GENERIC, threads, order.threads : order.threads + order.warps]
        if (self.queue_reads[words] > queues[:, None]).any():
            late = (self.queue_reads[words] > queues[:, None]).any(axis=-1)
            raise Fault(f"write at {self._first(words, late)} that a WGMMA may still be reading")
        self._check_readers(column, words)

    def _check_readers(self, column: np.ndarray, words: np.ndarray) -> None:
        if not self.read_tick[words].any():
            return
        threads = self.order.known[GENERIC, column[:, 0], : self.order.threads]
        lanes = threads.reshape(len(column), 1, self.order.warps, 32)
        late = self.read_tick[words][..., None] > lanes
        late &= (self.read_lanes[words][..., None] >> np.arange(32, dtype=np.uint32) & 1) == 1
        if late.any():
            at = self._first(words, late.any(axis=(-1, -2)))
            raise Fault(f"write at {at}: nothing orders it after another thread's read")

    def _stamp(self, words: np.ndarray, agent: np.ndarray | int, stamp: int, generic: bool) -> None:
        self.agent[words], self.stamp[words], self.generic[words] = agent, stamp, generic
        self.read_tick[words] = 0
        self.read_lanes[words] = 0
        self.queue_reads[words] = 0

    def write(self, threads: Threads, addresses: np.ndarray, values: np.ndarray) -> None:
        """By the generic proxy, a thread each. values: uint8 [n, size]."""
        size = values.shape[1]
        words = self._words(addresses, size, "write")
        self._distinct(words)
        self._check_write(threads, words, GENERIC)
        self._stamp(words, threads[:, None], int(self.order.ticks[threads[0] // 32]), True)
        self.data[addresses[:, None] + np.arange(size)] = values

    def _distinct(self, words: np.ndarray) -> None:
        if len(np.unique(words)) < words.size:
            raise Fault("two lanes write the same shared memory at once")

    def begin_write(self, threads: Threads, addresses: np.ndarray, size: int, proxy: int) -> None:
        """An asynchronous copy is issued: nobody may touch its target until it is known to be
        there. proxy: GENERIC for cp.async, ASYNC for bulk copies."""
        words = self._words(addresses, size, "copy")
        self._distinct(words)
        self._check_write(threads, words, proxy)
        self._stamp(words, threads[:, None], int(NEVER), proxy == GENERIC)

    def land(self, addresses: np.ndarray, values: np.ndarray, agent: int, stamp: int) -> None:
        """The copy's bytes arrive: known to those who know `stamp` of `agent`."""
        size = values.shape[1]
        words = addresses[:, None] // 4 + np.arange(size // 4)
        self.agent[words], self.stamp[words] = agent, stamp
        self.data[addresses[:, None] + np.arange(size)] = values

    def queue_read(self, warp: int, number: int, addresses: np.ndarray) -> None:
        """WGMMA `number` of a warp begins to read 16 bytes at each address."""
        words = self._words(addresses, 16, "WGMMA operand")
        agent = self.agent[words]
        lanes = self.order.known[:, warp * 32 : warp * 32 + 32].min(axis=1)
        generic = self.generic[words].astype(np.intp)
        known = lanes[generic, np.maximum(agent, 0)] >= self.stamp[words]
        if not known.all() and (lanes[GENERIC, np.maximum(agent, 0)] >= self.stamp[words]).all():
            at = self._first(words, ~known)
            raise Fault(f"WGMMA reads {at}, written by the generic proxy: no fence.proxy.async")
        self._check_known(words, known, "WGMMA read")
        self.queue_reads[words, warp] = number
