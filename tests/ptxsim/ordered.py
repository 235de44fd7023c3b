"""Memory that remembers who touched it: shared memory, and workspaces in global memory."""

from __future__ import annotations

import numpy as np

from tests.ptxsim.order import GENERIC, NEVER, Order, Threads
from tests.ptxsim.ptx import Fault

SHARED_WINDOW = 0x7000_0000_0000_0000  # of shared memory among generic addresses
PARAM_WINDOW = 0x6000_0000_0000_0000
SHARED_BASE = 1024  # address of dynamic shared memory, as after the system's own kilobyte
RANK_BIT = 24  # of shared::cluster addresses: above it 1 + a CTA's rank; 0 is one's own
OFFSET = (1 << RANK_BIT) - 1
_UNWRITTEN, _BARRIER = -1, -2


def aligned(addresses: np.ndarray, size: int, what: str) -> None:
    wrong = addresses % size != 0
    if wrong.any():
        raise Fault(f"misaligned {what} of {size} bytes at {int(addresses[wrong][0]):#x}")


class Location:
    """A word that atomic accesses have touched since its last plain write."""

    def __init__(self, order: Order):
        self.clock = np.zeros((2, order.agents), np.int32)  # what an acquire learns
        self.reads = np.zeros(order.threads, np.int32)  # latest time of each thread's
        self.writes = np.zeros(order.threads, np.int32)
        self.ctas: set[tuple[int, int]] = set()  # grid and cluster, CTA
        self.scope = "sys"  # the narrowest


class OrderedMemory:
    """Bytes, and for each word its last write and the reads since then.

    A read is kept per warp: its latest time and the lanes that read. WGMMA's reads are kept by
    their number in the warp's queue, a bulk store's until its thread has waited for it.
    """

    def __init__(self, name: str, data: np.ndarray, first: int, order: Order, written: bool):
        """data: uint8, of which addresses from `first` on may be used. written: before the grid
        began."""
        self.name, self.data, self.first, self.order = name, data, first, order
        words = -(-len(data) // 4)
        self.agent = np.full(words, 0 if written else _UNWRITTEN, np.int32)
        self.stamp = np.zeros(words, np.int32)
        self.generic = np.zeros(words, np.bool_)  # written through the generic proxy
        self.read_tick = np.zeros((words, order.warps), np.int32)
        self.read_lanes = np.zeros((words, order.warps), np.uint32)
        self.queue_reads = np.zeros((words, order.warps), np.int32)
        self.store_reads = np.zeros(words, np.int32)
        self.locations: dict[int, Location] = {}  # by word

    def _words(self, addresses: np.ndarray, size: int, what: str) -> np.ndarray:
        aligned(addresses, size, f"{self.name} {what}")
        size_here = len(self.data)
        if len(addresses) and not (
            addresses.min() >= self.first and addresses.max() + size <= size_here
        ):
            worst = addresses.max() if addresses.max() + size > size_here else addresses.min()
            raise Fault(f"{self.name} {what} at {int(worst)}, outside [{self.first}, {size_here})")
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
            at = self._first(words, agent < 0)
            raise Fault(f"{what} of uninitialised {self.name} memory at {at}")
        if not known.all():
            at = self._first(words, ~known)
            if (self.stamp[words][~known] == NEVER).any():
                raise Fault(f"{what} at {at} while an asynchronous write is pending")
            raise Fault(f"{what} at {at}: nothing orders it after the write of {self._who(at)}")

    def _first(self, words: np.ndarray, where: np.ndarray) -> int:
        return int(words[where].flat[0]) * 4

    def _who(self, address: int) -> str:
        return self.order.name(int(self.agent[address // 4]))

    def read(self, threads: Threads, addresses: np.ndarray, size: int) -> np.ndarray:
        """By the generic proxy, a thread each: uint8 [n, size]."""
        words = self._words(addresses, size, "read")
        self._check_read(threads, words)
        if self.locations:
            self._check_locations(threads, words, writes=False)
        self._keep_read(threads, words)
        return self.data[addresses[:, None] + np.arange(size)]

    def _check_read(self, threads: Threads, words: np.ndarray) -> None:
        agent = np.maximum(self.agent[words], 0)
        known = self.order.known[GENERIC][threads[:, None], agent] >= self.stamp[words]
        self._check_known(words, known, "read")

    def _keep_read(self, threads: Threads, words: np.ndarray) -> None:
        warp = threads[0] // 32
        self.read_tick[words, warp] = self.order.ticks[warp]
        bits = np.uint32(1) << (threads % 32).astype(np.uint32)
        np.bitwise_or.at(self.read_lanes, (words, warp), bits[:, None])

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
        if self.store_reads[words].any():
            at = self._first(words, self.store_reads[words] > 0)
            raise Fault(f"write at {at} that a bulk store may still be reading")
        self._check_readers(column, words)

    def _check_readers(self, column: np.ndarray, words: np.ndarray) -> None:
        ticks = self.read_tick[words]
        warps = np.flatnonzero(ticks.any(axis=(0, 1)))
        if not len(warps):
            return
        lanes = warps[:, None] * 32 + np.arange(32)
        late = ticks[..., warps, None] > self.order.known[GENERIC][column[..., None, None], lanes]
        read = self.read_lanes[words][..., warps, None]
        late &= (read >> np.arange(32, dtype=np.uint32) & 1) == 1
        if late.any():
            at = self._first(words, late.any(axis=(-1, -2)))
            raise Fault(f"write at {at}: nothing orders it after another thread's read")

    def _stamp(self, words: np.ndarray, agent: np.ndarray | int, stamp: int, generic: bool) -> None:
        self.agent[words], self.stamp[words], self.generic[words] = agent, stamp, generic
        self.read_tick[words] = 0
        self.read_lanes[words] = 0
        self.queue_reads[words] = 0
        for word in self.locations.keys() & set(words.ravel().tolist()) if self.locations else ():
            del self.locations[word]

    def write(self, threads: Threads, addresses: np.ndarray, values: np.ndarray) -> None:
        """By the generic proxy, a thread each. values: uint8 [n, size]."""
        size = values.shape[1]
        words = self._words(addresses, size, "write")
        self._distinct(words)
        self._check_write(threads, words, GENERIC)
        if self.locations:
            self._check_locations(threads, words, writes=True)
        self._stamp(words, threads[:, None], int(self.order.ticks[threads[0] // 32]), True)
        self.data[addresses[:, None] + np.arange(size)] = values

    def _distinct(self, words: np.ndarray) -> None:
        if len(np.unique(words)) < words.size:
            raise Fault(f"two lanes write the same {self.name} memory at once")

    def begin_write(self, threads: Threads, addresses: np.ndarray, size: int, proxy: int) -> None:
        """An asynchronous copy is issued: nobody may touch its target until it is known to be
        there. proxy: GENERIC for cp.async, ASYNC for bulk copies."""
        words = self._words(addresses, size, "copy")
        self._distinct(words)
        self._check_write(threads, words, proxy)
        if self.locations:
            self._check_locations(threads, words, writes=True)
        self._stamp(words, threads[:, None], int(NEVER), proxy == GENERIC)

    def land(
        self, addresses: np.ndarray, values: np.ndarray, agent: int | np.ndarray, stamp: int
    ) -> None:
        """The copy's bytes arrive: known to those who know `stamp` of `agent`. agent: of all, or
        [n, 1]."""
        size = values.shape[1]
        words = addresses[:, None] // 4 + np.arange(size // 4)
        self.agent[words], self.stamp[words] = agent, stamp
        self.data[addresses[:, None] + np.arange(size)] = values

    def _check_async_read(self, threads: Threads, words: np.ndarray, what: str) -> None:
        """By the async proxy, for all of the threads."""
        agent = np.maximum(self.agent[words], 0)
        lanes = self.order.known[:, threads].min(axis=1)
        known = lanes[self.generic[words].astype(np.intp), agent] >= self.stamp[words]
        if not known.all() and (lanes[GENERIC, agent] >= self.stamp[words]).all():
            at = self._first(words, ~known)
            raise Fault(f"{what} reads {at}, written by the generic proxy: no fence.proxy.async")
        self._check_known(words, known, f"{what} read")

    def queue_read(self, warp: int, number: int, addresses: np.ndarray) -> None:
        """WGMMA `number` of a warp begins to read 16 bytes at each address."""
        words = self._words(addresses, 16, "WGMMA operand")
        self._check_async_read(self.order.everyone[warp * 32 : warp * 32 + 32], words, "WGMMA")
        self.queue_reads[words, warp] = number

    def begin_store(self, threads: Threads, addresses: np.ndarray) -> np.ndarray:
        """A thread's bulk store begins to read 16 bytes at each address: uint8 [n, 16]."""
        words = self._words(addresses, 16, "bulk store")
        self._check_async_read(threads, words, "bulk store")
        self.store_reads[words] += 1
        return self.data[addresses[:, None] + np.arange(16)]

    def end_store(self, threads: Threads, addresses: np.ndarray) -> None:
        """The thread has waited until that was read."""
        words = addresses[:, None] // 4 + np.arange(4)
        self.store_reads[words] -= 1
        self._keep_read(threads, words)

    def _check_locations(self, threads: Threads, words: np.ndarray, writes: bool) -> None:
        """A plain access comes after the atomic ones that it could race with."""
        for thread, row in zip(np.broadcast_to(threads, len(words)), words, strict=True):
            for word in row.tolist():
                location = self.locations.get(word)
                if location is None:
                    continue
                before = np.maximum(location.writes, location.reads if writes else 0)
                if (before > self.order.known[GENERIC, thread, : self.order.threads]).any():
                    raise Fault(
                        f"{'write' if writes else 'read'} at {word * 4}: nothing orders it after "
                        "another thread's atomic access"
                    )

    def location(self, thread: int, address: int, reads: bool, writes: bool) -> Location:
        """Of an atomic access, which must come after the plain ones it could race with."""
        words, threads = self._words(np.array([address]), 4, "atomic access"), np.array([thread])
        if reads:
            self._check_read(threads, words)
        if writes:
            self._check_write(threads, words, GENERIC)
            self.agent[words] = np.maximum(self.agent[words], 0)  # written, if not before
        location = self.locations.setdefault(address // 4, Location(self.order))
        tick = self.order.ticks[thread // 32]
        if reads:
            location.reads[thread] = tick
        if writes:
            location.writes[thread] = tick
        return location


def shared_memory(size: int, order: Order) -> OrderedMemory:
    """Of a CTA: `size` bytes from SHARED_BASE on."""
    data = np.zeros(SHARED_BASE + size, np.uint8)
    return OrderedMemory("shared", data, SHARED_BASE, order, written=False)
