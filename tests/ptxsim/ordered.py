"""Memory that remembers who touched it: shared memory, and workspaces in global memory."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from tests.ptxsim.order import ASYNC, GENERIC, NEVER, Order, Threads, consecutive, differ, some
from tests.ptxsim.ptx import Fault

SHARED_WINDOW = 0x7000_0000_0000_0000  # of shared memory among generic addresses
PARAM_WINDOW = 0x6000_0000_0000_0000
SHARED_BASE = 1024  # address of dynamic shared memory, as after the system's own kilobyte
RANK_BIT = 24  # of shared::cluster addresses: above it 1 + a CTA's rank; 0 is one's own
OFFSET = (1 << RANK_BIT) - 1
_BITS = np.uint32(1) << np.arange(32, dtype=np.uint32)  # of lanes


def aligned(addresses: np.ndarray, size: int, what: str) -> None:
    """size: a power of two."""
    if np.bitwise_or.reduce(addresses) & (size - 1):
        wrong = addresses[addresses % size != 0]
        raise Fault(f"misaligned {what} of {size} bytes at {int(wrong[0]):#x}")


class Places:
    """`size` bytes at each of some addresses, int64 [n].

    numbers: of the pieces of that size in memory, [n].
    """

    def __init__(self, addresses: np.ndarray, size: int):
        self.addresses, self.size = addresses, size
        self.numbers = addresses // size
        self._words: dict[int, np.ndarray] = {}
        self.distinct = len(np.unique(addresses)) == len(addresses)
        self.aligned = not (addresses % size).any()
        self.first, self.last = int(addresses.min()), int(addresses.max())

    def words(self, grain: int) -> np.ndarray:
        """The numbers of the words of `grain` bytes, [n, size / grain]."""
        found = self._words.get(grain)
        if found is None:
            found = self.addresses[:, None] // grain + np.arange(self.size // grain)
            self._words[grain] = found
        return found


@lru_cache(maxsize=4096)
def _places(addresses: bytes, size: int) -> Places:
    return Places(np.frombuffer(addresses, np.int64), size)


def places(addresses: np.ndarray, size: int) -> Places:
    """Kept, because a kernel uses the same ones again and again."""
    return _places(addresses.tobytes(), size)


# A write is kept as one number: its agent's time, the agent, and the proxy. So the many words that
# one copy has written are checked at once.
_UNWRITTEN, _BARRIER = -1, -2
_AGENTS = 0x7FFF_FFFF


def _write(time: int, agent: np.ndarray | int, proxy: int) -> np.ndarray | int:
    return time << 32 | agent << 1 | proxy


def _time(writes: Any) -> Any:
    return writes >> 32


def _agent(writes: Any) -> Any:
    return writes >> 1 & _AGENTS


def _proxy(writes: Any) -> Any:
    return writes & 1


class Location:
    """A word that atomic accesses have touched since its last plain write."""

    def __init__(self, order: Order):
        self.clock = np.zeros((2, order.agents), np.int32)  # what an acquire learns
        self.reads = np.zeros(order.threads, np.int32)  # latest time of each thread's
        self.writes = np.zeros(order.threads, np.int32)
        self.ctas: set[tuple[int, int]] = set()  # grid and cluster, CTA
        self.scope = "sys"  # the narrowest


class OrderedMemory:
    """Bytes, and for each word, of `grain` bytes, its last write and the reads since then.

    A read is kept per warp: its latest time and the lanes that read. WGMMA's reads are kept by
    their number in the warp's queue, a bulk store's until its thread has waited for it.
    """

    def __init__(
        self, name: str, data: np.ndarray, first: int, order: Order, written: bool, grain: int = 4
    ):
        """data: uint8, of which addresses from `first` on may be used. written: before the grid
        began."""
        self.name, self.data, self.first, self.order = name, data, first, order
        self.grain = grain
        words = -(-len(data) // grain)
        self.written = np.full(words, _write(0, 0, ASYNC) if written else _UNWRITTEN, np.int64)
        self.was_read = np.zeros(words, np.bool_)  # by the generic proxy, since it was written
        self.read_tick = np.zeros((order.warps, words), np.int32)
        self.read_lanes = np.zeros((order.warps, words), np.uint32)
        self.queue_reads = np.zeros((order.warps, words), np.int32)
        self.multiplying = range(0)  # warps; those between them may be some that do not
        self.store_reads = np.zeros(words, np.int32)
        self.stores = 0  # 16 bytes each that bulk stores may still read
        self.locations: dict[int, Location] = {}  # by word

    def pieces(self, size: int) -> np.ndarray:
        """The bytes, [n, size]."""
        return self.data[: len(self.data) // size * size].reshape(-1, size)

    def _check_inside(self, at: Places, what: str) -> None:
        if not at.aligned:
            aligned(at.addresses, at.size, f"{self.name} {what}")
        size_here = len(self.data)
        if at.first < self.first or at.last + at.size > size_here:
            worst = at.last if at.last + at.size > size_here else at.first
            raise Fault(f"{self.name} {what} at {worst}, outside [{self.first}, {size_here})")

    def take_for_barrier(self, address: int) -> None:
        at = places(np.array([address]), 8)
        self._check_inside(at, "mbarrier")
        self.written[at.words(self.grain)] = _BARRIER

    def _known(
        self, threads: Threads, words: np.ndarray, proxy: int, together: bool
    ) -> np.ndarray | None:
        """bool like words: whether the last write happened before, in the proxy; None: of all
        words, and all were written. threads: one for each row of words, or [1]; together: each of
        them for all words."""
        writes, order = self.written[words], self.order
        one = int(writes[0, 0])
        if one >= 0 and not differ(writes):
            needs = proxy if _proxy(one) == GENERIC else GENERIC
            times = order.known[needs, consecutive(threads), _agent(one)]
            if min(times.tolist()) >= _time(one):
                return None
        writes = np.maximum(writes, 0)
        needs = np.where(_proxy(writes) == GENERIC, proxy, GENERIC)
        if together:
            times = order.known[:, consecutive(threads)].min(axis=1)[needs, _agent(writes)]
        else:
            times = order.known[needs, threads[:, None], _agent(writes)]
        return times >= _time(writes)

    def _check_known(self, words: np.ndarray, known: np.ndarray, what: str) -> None:
        writes = self.written[words]
        if some(writes < 0):
            if (writes == _BARRIER).any():
                raise Fault(f"{what} of an mbarrier")
            at = self._first(words, writes < 0)
            raise Fault(f"{what} of uninitialised {self.name} memory at {at}")
        late = ~known
        if some(late):
            at = self._first(words, late)
            if self._pending(words[late]):
                raise Fault(f"{what} at {at} while an asynchronous write is pending")
            raise Fault(f"{what} at {at}: nothing orders it after the write of {self._who(at)}")

    def _first(self, words: np.ndarray, where: np.ndarray) -> int:
        return int(words[where].flat[0]) * self.grain

    def _pending(self, words: np.ndarray) -> bool:
        return bool((_time(self.written[words]) == NEVER).any())

    def _who(self, address: int) -> str:
        return self.order.name(int(_agent(self.written[address // self.grain])))

    def read(self, threads: Threads, at: Places) -> np.ndarray:
        """By the generic proxy, a thread each: uint8 [n, size]."""
        self._check_inside(at, "read")
        self._check_read(threads, at.words(self.grain))
        if self.locations:
            self._check_locations(threads, at.words(self.grain), writes=False)
        self._keep_read(threads, at)
        return self.pieces(at.size)[at.numbers]

    def _check_read(self, threads: Threads, words: np.ndarray) -> None:
        known = self._known(threads, words, GENERIC, together=False)
        if known is not None:
            self._check_known(words, known, "read")

    def _keep_read(self, threads: Threads, at: Places) -> None:
        warp, words = int(threads[0]) // 32, at.words(self.grain)
        self.was_read[words] = True
        self.read_tick[warp][words] = self.order.ticks[warp]
        lanes, bits = self.read_lanes[warp], _BITS[threads % 32, None]
        if at.distinct:
            lanes[words] |= bits
        else:
            bits = np.broadcast_to(bits, words.shape)
            np.bitwise_or.at(lanes, words.ravel(), bits.ravel())

    def _check_write(self, threads: Threads, words: np.ndarray, proxy: int) -> None:
        """Everything done to these words before must have happened before. threads: [n] or [1]."""
        known = self._known(threads, words, proxy, together=False)
        if known is not None:
            writes = self.written[words]
            if some(writes == _BARRIER):
                raise Fault("write to an mbarrier")
            late = ~known & (writes != _UNWRITTEN)
            if some(late):
                at = self._first(words, late)
                raise Fault(
                    f"write at {at} while an asynchronous write is pending"
                    if self._pending(words[late])
                    else f"write at {at}: nothing orders it after the write of {self._who(at)}"
                )
        if self.multiplying:
            self._check_queues(threads, words)
        if self.stores and np.count_nonzero(self.store_reads[words]):
            at = self._first(words, self.store_reads[words] > 0)
            raise Fault(f"write at {at} that a bulk store may still be reading")
        if some(self.was_read[words]):
            self._check_readers(threads, words)

    def _check_queues(self, threads: Threads, words: np.ndarray) -> None:
        warps, order = self.multiplying, self.order
        reads = self.queue_reads[warps.start : warps.stop].take(words, axis=1)
        queues = slice(order.queue(warps.start), order.queue(warps.stop))
        known = order.known[GENERIC, consecutive(threads), queues].T
        if some(reads.max(axis=(1, 2)) > known.min(axis=1)):
            late = (reads > known[:, :, None]).any(axis=0)
            if late.any():
                at = self._first(words, late)
                raise Fault(f"write at {at} that a WGMMA may still be reading")

    def _check_readers(self, threads: Threads, words: np.ndarray) -> None:
        ticks = self.read_tick.take(words, axis=1)
        for warp, latest in enumerate(ticks.max(axis=(1, 2)).tolist()):
            lanes = slice(warp * 32, warp * 32 + 32)
            if not latest or latest <= self.order.known[GENERIC, consecutive(threads), lanes].min():
                continue
            known = self.order.known[GENERIC, threads, lanes][:, None]
            read = self.read_lanes[warp][words][..., None] & _BITS != 0
            late = ((ticks[warp][..., None] > known) & read).any(axis=-1)
            if late.any():
                at = self._first(words, late)
                raise Fault(f"write at {at}: nothing orders it after another thread's read")

    def _stamp(self, words: np.ndarray, write: np.ndarray | int) -> None:
        """The words' last write, and no read since."""
        self.written[words] = write
        if some(self.was_read[words]):
            self.was_read[words] = False
            self.read_tick[:, words] = 0
            self.read_lanes[:, words] = 0
        for warp in self.multiplying:
            self.queue_reads[warp][words] = 0
        for word in self.locations.keys() & set(words.ravel().tolist()) if self.locations else ():
            del self.locations[word]

    def write(self, threads: Threads, at: Places, values: np.ndarray) -> None:
        """By the generic proxy, a thread each. values: uint8 [n, size]."""
        self._begin(threads, at, GENERIC, "write")
        tick = int(self.order.ticks[int(threads[0]) // 32])
        self._stamp(at.words(self.grain), _write(tick, threads[:, None], GENERIC))
        self.pieces(at.size)[at.numbers] = values

    def begin_write(self, threads: Threads, at: Places, proxy: int) -> None:
        """An asynchronous copy is issued: nobody may touch its target until it is known to be
        there. proxy: GENERIC for cp.async, ASYNC for bulk copies."""
        self._begin(threads, at, proxy, "copy")
        self._stamp(at.words(self.grain), _write(int(NEVER), threads[:, None], proxy))

    def _begin(self, threads: Threads, at: Places, proxy: int, what: str) -> None:
        self._check_inside(at, what)
        if not at.distinct:
            raise Fault(f"two lanes write the same {self.name} memory at once")
        self._check_write(threads, at.words(self.grain), proxy)
        if self.locations:
            self._check_locations(threads, at.words(self.grain), writes=True)

    def land(
        self, at: Places, values: np.ndarray, agent: int | np.ndarray, time: int, proxy: int
    ) -> None:
        """The copy's bytes [n, size] arrive: known to those who know `time` of `agent`. agent: of
        all, or [n, 1]. proxy: as for `begin_write`."""
        self.written[at.words(self.grain)] = _write(time, agent, proxy)
        self.pieces(at.size)[at.numbers] = values

    def _check_async_read(self, threads: Threads, words: np.ndarray, what: str) -> None:
        """By the async proxy, for all of the threads."""
        known = self._known(threads, words, ASYNC, together=True)
        if known is None:
            return
        ordered = self._known(threads, words, GENERIC, together=True)
        if not known.all() and (ordered is None or ordered.all()):
            at = self._first(words, ~known)
            raise Fault(f"{what} reads {at}, written by the generic proxy: no fence.proxy.async")
        self._check_known(words, known, f"{what} read")

    def queue_read(self, warp: int, number: int, at: Places) -> None:
        """WGMMA `number` of a warp begins to read."""
        self._check_inside(at, "WGMMA operand")
        self._check_async_read(self.order.of_warp(warp), at.words(self.grain), "WGMMA")
        self.queue_reads[warp][at.words(self.grain)] = number
        if warp not in self.multiplying:
            warps = [warp, *self.multiplying]
            self.multiplying = range(min(warps), max(warps) + 1)

    def begin_store(self, threads: Threads, at: Places) -> np.ndarray:
        """A thread's bulk store begins to read: uint8 [n, size]."""
        self._check_inside(at, "bulk store")
        self._check_async_read(threads, at.words(self.grain), "bulk store")
        self.store_reads[at.words(self.grain)] += 1
        self.stores += len(at.numbers)
        return self.pieces(at.size)[at.numbers]

    def end_store(self, threads: Threads, at: Places) -> None:
        """The thread has waited until that was read."""
        self.store_reads[at.words(self.grain)] -= 1
        self.stores -= len(at.numbers)
        self._keep_read(threads, at)

    def _check_locations(self, threads: Threads, words: np.ndarray, writes: bool) -> None:
        """A plain access comes after the atomic ones that it could race with."""
        for thread, row in zip(np.broadcast_to(threads, len(words)), words, strict=True):
            for word in row.tolist():
                location = self.locations.get(word)
                if location is None:
                    continue
                before = np.maximum(location.writes, location.reads if writes else 0)
                if (before > self.order.known[GENERIC, thread, : self.order.threads]).any():
                    verb = "write" if writes else "read"
                    raise Fault(
                        f"{verb} at {word * self.grain}: nothing orders it after another thread's "
                        "atomic access"
                    )

    def location(self, thread: int, address: int, reads: bool, writes: bool) -> Location:
        """Of an atomic access, which must come after the plain ones it could race with."""
        at, threads = places(np.array([address]), 4), np.array([thread])
        self._check_inside(at, "atomic access")
        words = at.words(self.grain)
        if reads:
            self._check_read(threads, words)
        if writes:
            self._check_write(threads, words, GENERIC)
            self.written[words] = np.maximum(self.written[words], 0)  # if it was not
        location = self.locations.setdefault(int(words[0, 0]), Location(self.order))
        tick = self.order.ticks[thread // 32]
        if reads:
            location.reads[thread] = tick
        if writes:
            location.writes[thread] = tick
        return location


def shared_memory(size: int, order: Order, grain: int) -> OrderedMemory:
    """Of a CTA: `size` bytes from SHARED_BASE on. grain: as in OrderedMemory."""
    data = np.zeros(SHARED_BASE + size, np.uint8)
    return OrderedMemory("shared", data, SHARED_BASE, order, written=False, grain=grain)
