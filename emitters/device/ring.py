"""The ring of stages between those who load operands and those who multiply them."""

from __future__ import annotations

import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Int32, const_expr, range_constexpr
from cutlass.pipeline import PipelineUserType


class Ring:
    """Two barriers a stage: `full`, at which loads arrive, and `empty`, at which consumers do.

    A role walks the stages with a state of its own, from `producer()` or `consumer()`: its `index`
    is the stage, its `phase` what the stage's barrier is waited for with.

    full_arrivals, empty_arrivals: of a stage's turn. sharers: CTAs of a cluster that a stage's
    contents are written to together; consumers of each release it to all of them.
    """

    def __init__(self, stages: int, full_arrivals: int, empty_arrivals: int, sharers: int = 1):
        self.stages, self.sharers = stages, sharers
        self.full_arrivals, self.empty_arrivals = full_arrivals, empty_arrivals

    def attach(self, full: cute.Pointer, empty: cute.Pointer):
        """`stages` barriers of 8 bytes each, in shared memory."""
        self.full, self.empty = full, empty

    @cute.jit
    def init(self):
        """By one thread; a fence and a barrier of the CTA, or cluster, follow."""
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
        """Arrives for TMA loads of so many bytes; returns the barrier that they complete on."""
        barrier = self.full + state.index
        cute.arch.mbarrier_arrive_and_expect_tx(barrier, count)
        return barrier

    def arrive_when_copied(self, state):
        """Once the calling thread's cp.async copies so far have landed."""
        cute.arch.cp_async_mbarrier_arrive_noinc(self.full + state.index)

    @cute.jit
    def release(self, stage: Int32):
        """By a warp that has read a stage."""
        barrier = self.empty + stage
        if const_expr(self.sharers == 1):
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(barrier)
        else:
            lane = cute.arch.lane_idx()
            if lane < self.sharers:
                cute.arch.mbarrier_arrive(barrier, lane)
