"""The ring of stages between the warps that load operands and the warps that multiply them."""

from __future__ import annotations

import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Int32, const_expr, range_constexpr
from cutlass.pipeline import PipelineUserType


class Ring:
    """A ring of stages with two barriers each: loads arrive at `full`, consumers at `empty`.

    Each role walks the stages with its own state, from `producer()` or `consumer()`: `index` is the
    stage, `phase` the parity with which it waits at the stage's barrier.

    full_arrivals, empty_arrivals: per fill of a stage. sharers: the number of CTAs that load each
      other's stages; the consumers of each of them release a stage to all.
    """

    def __init__(self, stages: int, full_arrivals: int, empty_arrivals: int, sharers: int = 1):
        self.stages, self.sharers = stages, sharers
        self.full_arrivals, self.empty_arrivals = full_arrivals, empty_arrivals

    def attach(self, full: cute.Pointer, empty: cute.Pointer):
        """Binds the barriers in shared memory: 8 bytes per stage, for `full` and for `empty`."""
        self.full, self.empty = full, empty

    @cute.jit
    def init(self):
        """Initialises the barriers; by one thread.

        The caller must follow with a fence and a barrier of the CTA or cluster.
        """
        for stage in range_constexpr(self.stages):
            cute.arch.mbarrier_init(self.full + stage, self.full_arrivals)
            cute.arch.mbarrier_init(self.empty + stage, self.empty_arrivals * self.sharers)

    def producer(self):
        return pipeline.make_pipeline_state(PipelineUserType.Producer, self.stages)

    def consumer(self):
        return pipeline.make_pipeline_state(PipelineUserType.Consumer, self.stages)

    def wait_empty(self, state):
        cute.arch.mbarrier_wait(self.empty + state.index, state.phase)

    def wait_full(self, state):
        cute.arch.mbarrier_wait(self.full + state.index, state.phase)

    def expect(self, state, count: int) -> cute.Pointer:
        """Arrives at `full` and expects `count` bytes of TMA loads; returns that barrier."""
        barrier = self.full + state.index
        cute.arch.mbarrier_arrive_and_expect_tx(barrier, count)
        return barrier

    def arrive_when_copied(self, state):
        """Arrives at `full` when the cp.async copies that this thread has started have landed."""
        cute.arch.cp_async_mbarrier_arrive_noinc(self.full + state.index)

    @cute.jit
    def release(self, stage: Int32):
        """Arrives at `empty`; by a whole warp, when it has read a stage."""
        barrier = self.empty + stage
        if const_expr(self.sharers == 1):
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(barrier)
        else:
            lane = cute.arch.lane_idx()
            if lane < self.sharers:
                cute.arch.mbarrier_arrive(barrier, lane)

    def release_unless(self, stage: Int32, kept: Int32):
        """`release` without a branch, of a CTA that shares no stages; nothing if kept is not 0.

        It may stand between a WGMMA and the wait for it, where a branch costs their overlap.
        """
        assert self.sharers == 1
        cute.arch.inline_ptx(
            "{{ .reg .pred p; setp.eq.b32 p, {$r1}, 0; "
            "@p mbarrier.arrive.shared.b64 _, [{$r0}]; }}",
            read_only_args=[(self.empty + stage).toint(), cute.arch.lane_idx() | kept],
        )
