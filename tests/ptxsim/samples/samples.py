"""Small kernels, one for each feature that orders threads, for test_ptxsim_features.py.

Each is right; its defects are planted in the PTX that it becomes. All data are int32.
"""

from __future__ import annotations

import os
import tempfile
from functools import lru_cache
from typing import Any

os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")  # read when cutlass is imported

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
from cutlass import Int32, Int64, Uint8, const_expr, range_constexpr
from cutlass.cute.runtime import make_fake_stream, make_ptr
from cutlass.experimental import primitives as prims

STEPS = 5  # of each pipeline
STAGES = 2
ROWS = 16  # of a multicast stage, 32 numbers each


def _at(pointer, offset):
    """An int32 in global memory as a tensor of one."""
    return cute.make_tensor(pointer + offset, cute.make_layout(1))


def _tensor_map(pointer):
    """The tensor map at a global address, acquired."""
    entry = cute.make_ptr(Uint8, pointer.toint(), cute.AddressSpace.generic, assumed_align=64)
    prims.fence_proxy_acquire(prims.MemScope.SYS, entry.to_llvm_ptr(), 128)
    return entry.to_llvm_ptr()


class Multicast:
    """out[32 cta + lane] = sum of column `lane` of a [STEPS * ROWS, 32] matrix, in both CTAs of a
    cluster, each of which loads half of every stage for both."""

    threads, cluster = 64, 2

    @cute.kernel
    def kernel(self, matrix: cute.Pointer, out: cute.Pointer):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(thread // 32)
        lane = thread % 32

        @cute.struct
        class Storage:
            full: cute.struct.MemRange[Int64, STAGES]
            empty: cute.struct.MemRange[Int64, STAGES]
            data: cute.struct.Align[cute.struct.MemRange[Int32, STAGES * ROWS * 32], 128]

        storage = utils.SmemAllocator().allocate(Storage)
        full, empty = storage.full.data_ptr(), storage.empty.data_ptr()
        data = storage.data.data_ptr()
        if warp == 0:
            with cute.arch.elect_one():
                for stage in range_constexpr(STAGES):
                    cute.arch.mbarrier_init(full + stage, 1)
                    cute.arch.mbarrier_init(empty + stage, 2)
            cute.arch.mbarrier_init_fence()
        cute.arch.cluster_arrive_relaxed()
        cute.arch.cluster_wait()
        if warp == 0:
            with cute.arch.elect_one():
                stage, phase = Int32(0), Int32(0)
                rank = cute.arch.block_idx_in_cluster()
                entry = _tensor_map(matrix)
                for step in cutlass.range(STEPS, unroll=1):
                    cute.arch.mbarrier_wait(empty + stage, phase ^ 1)
                    cute.arch.mbarrier_arrive_and_expect_tx(full + stage, ROWS * 128)
                    prims.cp_async_bulk_tensor_shared_cluster_global(
                        (data + (stage * ROWS + rank * (ROWS // 2)) * 32).to_llvm_ptr(),
                        entry,
                        [Int32(0), step * ROWS + rank * (ROWS // 2)],
                        (full + stage).to_llvm_ptr(),
                        [],
                        multicast_mask=cutlass.Int16(3),
                    )
                    stage = stage ^ 1
                    if stage == 0:
                        phase = phase ^ 1
        else:
            stage, phase, total = Int32(0), Int32(0), Int32(0)
            for _ in cutlass.range(STEPS, unroll=1):
                cute.arch.mbarrier_wait(full + stage, phase)
                for row in range_constexpr(ROWS):
                    total += cute.make_tensor(
                        data + (stage * ROWS + row) * 32 + lane, cute.make_layout(1)
                    )[0]
                cute.arch.sync_warp()
                if lane < 2:
                    cute.arch.mbarrier_arrive(empty + stage, lane)
                stage = stage ^ 1
                if stage == 0:
                    phase = phase ^ 1
            _at(out, 32 * block + lane)[0] = total
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()


class Exchange:
    """out[32 cta + lane] = 100 + what the other CTA of the cluster has put into its shared memory,
    x[32 other + lane]; and what it has put into this one's, x[32 other + 31 - lane]."""

    threads, cluster = 32, 2

    @cute.kernel
    def kernel(self, x: cute.Pointer, out: cute.Pointer):
        lane, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        own = utils.SmemAllocator().allocate_array(Int32, 64)
        given = own + 32
        other = cute.arch.block_idx_in_cluster() ^ 1
        value = _at(x, 32 * block + lane)[0]
        cute.make_tensor(own + lane, cute.make_layout(1))[0] = value
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
        remote = cute.arch.map_dsmem_ptr(own + lane, other)
        read = cute.arch.inline_ptx(
            "ld.shared::cluster.b32 {$w0}, [{$r0}];",
            write_only_types=[Int32],
            read_only_args=[remote.toint()],
        )
        there = cute.arch.map_dsmem_ptr(given + (31 - lane), other)
        cute.arch.inline_ptx(
            "st.shared::cluster.b32 [{$r0}], {$r1};", read_only_args=[there.toint(), value]
        )
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
        got = cute.make_tensor(given + lane, cute.make_layout(1))[0]
        _at(out, 64 * block + lane)[0] = read + 100
        _at(out, 64 * block + 32 + lane)[0] = got


class SplitSum:
    """out[64 t + i] = x[128 t + i] + x[128 t + 64 + i]: CTAs take halves of 64 numbers from an
    atomic counter, whoever comes second adds both. counters: [1 + tiles], zero."""

    threads, cluster = 64, 1

    @cute.kernel
    def kernel(self, x: cute.Pointer, counters: cute.Pointer, halves: cute.Pointer,
               out: cute.Pointer, tiles: Int32):  # fmt: skip
        thread, _, _ = cute.arch.thread_idx()
        word = utils.SmemAllocator().allocate_array(Int32, 1)
        shared = cute.make_tensor(word, cute.make_layout(1))
        half = Int32(0)
        while half < 2 * tiles:
            if thread == 0:
                shared[0] = cute.arch.atomic_add(counters, Int32(1), sem="relaxed", scope="gpu")
            cute.arch.sync_threads()
            half = shared[0]
            cute.arch.sync_threads()
            if half < 2 * tiles:
                tile = half // 2
                _at(halves, 64 * half + thread)[0] = _at(x, 64 * half + thread)[0]
                cute.arch.sync_threads()
                if thread == 0:
                    shared[0] = cute.arch.atomic_add(
                        counters + 1 + tile, Int32(1), sem="acq_rel", scope="gpu"
                    )
                cute.arch.sync_threads()
                if shared[0] == 1:
                    _at(out, 64 * tile + thread)[0] = (
                        _at(halves, 128 * tile + thread)[0]
                        + _at(halves, 128 * tile + 64 + thread)[0]
                    )
                cute.arch.sync_threads()


class Flag:
    """CTA 0 hands x over to CTA 1 behind a flag, CTA 1 adds 1: out = x + 1. fences: with relaxed
    accesses of the flag between fences, else with a release and an acquire."""

    threads, cluster = 32, 1

    def __init__(self, fences: bool):
        self.fences = fences

    @cute.kernel
    def kernel(self, x: cute.Pointer, flag: cute.Pointer, buffer: cute.Pointer, out: cute.Pointer):
        lane, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        if block == 0:
            _at(buffer, lane)[0] = _at(x, lane)[0]
            cute.arch.sync_warp()
            if lane == 0:
                if const_expr(self.fences):
                    cute.arch.fence_acq_rel_gpu()
                    cute.arch.store(flag, Int32(1), sem="relaxed", scope="gpu")
                else:
                    cute.arch.store(flag, Int32(1), sem="release", scope="gpu")
        else:
            if lane == 0:
                seen = Int32(0)
                while seen == 0:
                    if const_expr(self.fences):
                        seen = cute.arch.load(flag, Int32, sem="relaxed", scope="gpu")
                    else:
                        seen = cute.arch.load(flag, Int32, sem="acquire", scope="gpu")
                if const_expr(self.fences):
                    cute.arch.fence_acq_rel_gpu()
            cute.arch.sync_warp()
            _at(out, lane)[0] = _at(buffer, lane)[0] + 1


class Histogram:
    """out[b] = how many of x[0 .. 63] are b, out[32] = the largest, for numbers below 32: atomics
    on shared memory."""

    threads, cluster = 64, 1

    @cute.kernel
    def kernel(self, x: cute.Pointer, out: cute.Pointer):
        thread, _, _ = cute.arch.thread_idx()
        bins = utils.SmemAllocator().allocate_array(Int32, 33)
        if thread < 33:
            cute.make_tensor(bins + thread, cute.make_layout(1))[0] = Int32(0)
        cute.arch.sync_threads()
        value = _at(x, thread)[0]
        cute.arch.atomic_add(bins + value, Int32(1), sem="relaxed", scope="cta")
        cute.arch.atomic_max(bins + 32, value, sem="relaxed", scope="cta")
        cute.arch.sync_threads()
        if thread < 33:
            _at(out, thread)[0] = cute.make_tensor(bins + thread, cute.make_layout(1))[0]


class Staged:
    """out[128 s + i] = x[128 s + i] + 1 for STEPS rows s: x by groups of cp.async, one ahead; out
    by bulk stores from staging that is written again. tensor: out is a tensor map's address."""

    threads, cluster = 32, 1

    def __init__(self, tensor: bool):
        self.tensor = tensor

    def load(self, x, step, lane, buffers):
        prims.cp_async_shared_global(
            (buffers + (step % 2) * 128 + 4 * lane).to_llvm_ptr(),
            (x + 128 * step + 4 * lane).to_llvm_ptr(),
            16,
            prims.LoadCacheModifier.CG,
        )

    @cute.kernel
    def kernel(self, x: cute.Pointer, out: cute.Pointer):
        lane, _, _ = cute.arch.thread_idx()
        buffers = utils.SmemAllocator().allocate(512 * 4, 128)
        buffers = cute.recast_ptr(buffers, dtype=Int32)
        staging = buffers + 256
        if const_expr(self.tensor):
            entry = _tensor_map(out)
        self.load(x, Int32(0), lane, buffers)
        cute.arch.cp_async_commit_group()
        for step in cutlass.range(STEPS, unroll=1):
            if step + 1 < STEPS:
                self.load(x, step + 1, lane, buffers)
            cute.arch.cp_async_commit_group()
            cute.arch.cp_async_wait_group(1)
            cute.arch.cp_async_bulk_wait_group(1, read=True)
            cute.arch.sync_warp()
            # of what another lane has copied
            layout = cute.make_layout(4, stride=32)
            read = cute.make_tensor(buffers + (step % 2) * 128 + lane, layout)
            write = cute.make_tensor(staging + (step % 2) * 128 + lane, layout)
            for i in range_constexpr(4):
                write[i] = read[i] + 1
            cute.arch.fence_view_async_shared()
            cute.arch.sync_warp()
            if lane == 0:
                source = (staging + (step % 2) * 128).to_llvm_ptr()
                if const_expr(self.tensor):
                    prims.cp_async_bulk_tensor_global_shared_cta(entry, source, [Int32(0), step])
                else:
                    prims.cp_async_bulk_global_shared_cta(
                        (out + 128 * step).to_llvm_ptr(), source, 512
                    )
                cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)


class Plain:
    """out[4 i .. 4 i + 3] = x[4 i .. 4 i + 3] + 1 for 32 i, x by one bulk copy of 512 bytes."""

    threads, cluster = 32, 1

    @cute.kernel
    def kernel(self, x: cute.Pointer, out: cute.Pointer):
        lane, _, _ = cute.arch.thread_idx()

        @cute.struct
        class Storage:
            full: cute.struct.MemRange[Int64, 1]
            data: cute.struct.Align[cute.struct.MemRange[Int32, 128], 16]

        storage = utils.SmemAllocator().allocate(Storage)
        full, data = storage.full.data_ptr(), storage.data.data_ptr()
        if lane == 0:
            cute.arch.mbarrier_init(full, 1)
            cute.arch.mbarrier_init_fence()
            cute.arch.mbarrier_arrive_and_expect_tx(full, 512)
            prims.cp_async_bulk_shared_cluster_global(
                data.to_llvm_ptr(), x.to_llvm_ptr(), full.to_llvm_ptr(), 512
            )
        cute.arch.sync_warp()
        cute.arch.mbarrier_wait(full, 0)
        layout = cute.make_layout(4)
        read = cute.make_tensor(data + 4 * lane, layout)
        write = cute.make_tensor(out + 4 * lane, layout)
        for i in range_constexpr(4):
            write[i] = read[i] + 1


class First:
    """middle[32 cta + lane] = x[...] + 1; whatever depends on it may start before."""

    threads, cluster = 32, 1

    @cute.kernel
    def kernel(self, x: cute.Pointer, middle: cute.Pointer):
        lane, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        cute.arch.griddepcontrol_launch_dependents()
        _at(middle, 32 * block + lane)[0] = _at(x, 32 * block + lane)[0] + 1


class Second:
    """out[32 cta + lane] = 10 * middle[...] + bias[lane]; before it waits, early[...] = lane."""

    threads, cluster = 32, 1

    @cute.kernel
    def kernel(
        self, middle: cute.Pointer, bias: cute.Pointer, early: cute.Pointer, out: cute.Pointer
    ):
        lane, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        added = _at(bias, lane)[0]
        _at(early, 32 * block + lane)[0] = lane
        cute.arch.griddepcontrol_wait()
        _at(out, 32 * block + lane)[0] = 10 * _at(middle, 32 * block + lane)[0] + added


class Late:
    """Copies arrays of int32, after its dependents may have started: a GEMM's predecessor."""

    threads, cluster = 32, 1

    @cute.kernel
    def kernel(
        self, x: cute.Pointer, x_to: cute.Pointer, x_count: Int32, scale: cute.Pointer,
        scale_to: cute.Pointer, scale_count: Int32, out: cute.Pointer, out_to: cute.Pointer,
        out_count: Int32,
    ):  # fmt: skip
        lane, _, _ = cute.arch.thread_idx()
        cute.arch.griddepcontrol_launch_dependents()
        for source, target, count in (
            (x, x_to, x_count), (scale, scale_to, scale_count), (out, out_to, out_count)
        ):  # fmt: skip
            for at in cutlass.range(lane, count, 32, unroll=1):
                _at(target, at)[0] = _at(source, at)[0]


class Turns:
    """out[lane] = x[lane] through STEPS rounds of (3 v + 1, then v - 2), by two warps in turn."""

    threads, cluster = 64, 1

    @cute.kernel
    def kernel(self, x: cute.Pointer, out: cute.Pointer):
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(thread // 32)
        lane = thread % 32
        words = utils.SmemAllocator().allocate_array(Int32, 32)
        value = cute.make_tensor(words + lane, cute.make_layout(1))
        if warp == 0:
            value[0] = _at(x, lane)[0]
            for _ in cutlass.range(STEPS, unroll=1):
                value[0] = 3 * value[0] + 1
                cute.arch.barrier_arrive(barrier_id=2, number_of_threads=64)
                cute.arch.barrier(barrier_id=1, number_of_threads=64)
            _at(out, lane)[0] = value[0]
        else:
            for _ in cutlass.range(STEPS, unroll=1):
                cute.arch.barrier(barrier_id=2, number_of_threads=64)
                value[0] = value[0] - 2
                cute.arch.barrier_arrive(barrier_id=1, number_of_threads=64)


@lru_cache(maxsize=32)
def emit(sample: Any, arguments: str) -> str:
    """PTX of a sample. arguments: `p` a pointer, `i` an int32, in its kernel's order."""
    fake = tuple(
        make_ptr(Int32, 16, cute.AddressSpace.gmem, assumed_align=16) if kind == "p" else Int32(1)
        for kind in arguments
    )

    @cute.jit
    def launch(args: tuple, grid: Int32, stream):
        sample.kernel(*args).launch(
            grid=[grid, 1, 1], block=[sample.threads, 1, 1], cluster=[sample.cluster, 1, 1],
            preferred_smem_carveout=100, stream=stream,
        )  # fmt: skip

    with tempfile.TemporaryDirectory() as dump:
        options = f"--keep-ptx --generate-line-info --dump-dir {dump}"
        compiled = cute.compile(launch, fake, Int32(1), make_fake_stream(), options=options)
        text = compiled.artifacts.PTX
    return text.decode() if isinstance(text, bytes) else text
