"""Defects to plant in a kernel's PTX: each must be caught, see test_ptxsim_mutations.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

Edit = Callable[[str], str]


def replace_nth(pattern: str, to: str, nth: int = 0, after: str = "", before: str = "") -> Edit:
    r"""Replaces a match of `pattern` (a space stands for any white space), the nth of those
    between the texts `after` and `before`. Raises ValueError where there is none."""
    regex = re.compile(pattern.replace(" ", r"\s+"))

    def edit(ptx: str) -> str:
        start = ptx.index(after) if after else ptx.index("{\n")
        end = ptx.index(before, start) if before else len(ptx)
        found = list(regex.finditer(ptx, start, end))
        if not -len(found) <= nth < len(found):
            raise ValueError(f"{len(found)} matches of {pattern}")
        match = found[nth]
        changed = match.expand(to)
        if changed == match[0]:
            raise ValueError(f"{pattern}: nothing changes")
        return ptx[: match.start()] + changed + ptx[match.end() :]

    return edit


PRODUCER, CONSUMER = "setmaxnreg.dec", "setmaxnreg.inc"


def setup(pattern: str, to: str, nth: int = 0) -> Edit:
    return replace_nth(pattern, to, nth, before=PRODUCER)


def producer(pattern: str, to: str, nth: int = 0) -> Edit:
    return replace_nth(pattern, to, nth, after=PRODUCER, before=CONSUMER)


def consumer(pattern: str, to: str, nth: int = 0) -> Edit:
    return replace_nth(pattern, to, nth, after=CONSUMER)


def swap_scales(ptx: str) -> str:
    """Exchanges the last two parameters."""
    first, second = re.findall(r"ld\.param\.b64\s+%rd\d+, \[(\w+)\];", ptx)[-2:]
    start = ptx.index("{\n")
    body = ptx[start:].replace(f"[{first}]", "[?]").replace(f"[{second}]", f"[{first}]")
    return ptx[:start] + body.replace("[?]", f"[{second}]")


def swap_gate_strides(ptx: str) -> str:
    start = ptx.index("{\n")
    body = ptx[start:].replace("_param_9]", "?").replace("_param_10]", "_param_9]")
    return ptx[:start] + body.replace("?", "_param_10]")


def initial_phase(ptx: str) -> str:
    """The producer begins as if its stages were full."""
    parity = re.search(r"try_wait\S+ P1, \[%r\d+\], (%r\d+)", ptx[ptx.index(PRODUCER) :])
    assert parity is not None
    return producer(f"mov.b32 {parity[1]}, 1;", f"mov.b32 {parity[1]}, 0;")(ptx)


def _pass_before(ptx: str, text: str) -> str:
    """The last wait before `text` lets everybody pass."""
    at = list(re.finditer(_TRY_WAIT.replace(" ", r"\s+"), ptx[: ptx.index(text)]))[-1]
    return ptx[: at.start()] + _PASSED + ptx[at.end() :]


@dataclass(frozen=True)
class Mutation:
    """expects: of these texts, one must be in what the simulator says. kernel: which one of
    test_ptxsim_mutations.KERNELS is edited."""

    edit: Edit
    expects: tuple[str, ...]
    kernel: str = "base"


_TRY_WAIT = r"mbarrier.try_wait\S+ P1, \[%r\d+\], %r\d+, 10000000;"
_PASSED = "setp.eq.b32 P1, 0, 0;"
_WRONG = "wrong result"
_READING = "a WGMMA may still be reading"
_PENDING = "an asynchronous write is pending"
_UNORDERED = "nothing orders"
_DEADLOCK = "deadlock"
_LOC = r"(?:\s+\.loc[^\n]*)*"
_STORE = (
    r"(%p\d+), (%r\d+), (%r\d+);(" + _LOC + r")\s+@%p\d+ bra (\S+);"
    r"(?=" + _LOC + r"\s+ld.shared.v4)"
)

MUTATIONS: dict[str, Mutation] = {
    # mbarrier counts, bytes, phases
    "full_counts_128": Mutation(setup("(mov.b32 %r\\d+,) 129;", r"\1 128;"), ("over-arrival",)),
    "full_counts_130": Mutation(setup("(mov.b32 %r\\d+,) 129;", r"\1 130;"), (_DEADLOCK,)),
    "empty_counts_3": Mutation(
        setup("(mov.b32 %r\\d+,) 4;", r"\1 3;"), ("over-arrival", "phase", _READING)
    ),
    "empty_counts_5": Mutation(setup("(mov.b32 %r\\d+,) 4;", r"\1 5;"), (_DEADLOCK,)),
    "expects_half_the_bytes": Mutation(
        producer("(mov.b32 %r\\d+,) 8192;", r"\1 4096;"), (_PENDING, _DEADLOCK, "phase")
    ),
    "expects_twice_the_bytes": Mutation(
        producer("(mov.b32 %r\\d+,) 8192;", r"\1 16384;"), (_DEADLOCK,)
    ),
    "producer_begins_in_phase_0": Mutation(initial_phase, (_DEADLOCK,)),
    "producer_never_flips_its_phase": Mutation(
        producer(r"xor.b32 (%r\d+), \1, %r\d+;", r"xor.b32 \1, \1, 0;"), ("phase", _DEADLOCK)
    ),
    "consumer_never_flips_its_phase": Mutation(
        consumer(r"xor.b32 (%r\d+), \1, %r\d+;", r"xor.b32 \1, \1, 0;"), ("phase", _DEADLOCK)
    ),
    "one_stage_too_many": Mutation(
        producer(r"(setp.eq.b32 %p\d+, %r\d+,) 2;", r"\1 3;"), ("no mbarrier", "phase", "mbarrier")
    ),
    "no_init_fence": Mutation(setup("fence.mbarrier_init.release.cluster;", ""), ("fence",)),
    "every_lane_inits": Mutation(
        setup(r"not.pred (%p\d+), (%p\d+);", r"mov.pred \1, 0;"), ("mbarrier.init by 32",)
    ),
    # waits and releases
    "producer_does_not_wait": Mutation(
        producer(_TRY_WAIT, _PASSED), (_READING, _PENDING, _UNORDERED)
    ),
    "consumer_does_not_wait": Mutation(
        consumer(_TRY_WAIT, _PASSED), (_PENDING, _UNORDERED, _READING, "uninitialised")
    ),
    "last_step_is_not_waited_for": Mutation(
        consumer(_TRY_WAIT, _PASSED, -1), (_PENDING, _UNORDERED, _READING)
    ),
    "released_before_the_wait": Mutation(
        consumer("wgmma.wait_group.sync.aligned 1;", "", 1), (_READING,)
    ),
    "last_stage_released_before_the_wait": Mutation(
        consumer("wgmma.wait_group.sync.aligned 0;", ""), (_READING, "read while a WGMMA")
    ),
    "every_lane_releases": Mutation(
        consumer(r"not.pred (%p\d+), (%p\d+);", r"mov.pred \1, 0;", -1), ("over-arrival",)
    ),
    "never_released": Mutation(
        consumer(r"mbarrier.arrive.shared.b64 %rd\d+, \[%r\d+\], %r\d+;", "", -1), (_DEADLOCK,)
    ),
    "copies_never_arrive": Mutation(
        producer(r"cp.async.mbarrier.arrive.noinc[^;]*;", ""), (_DEADLOCK,)
    ),
    "copies_arrive_elsewhere": Mutation(
        producer(r"(cp.async.mbarrier.arrive.noinc\S+) \[(%r\d+)([^]]*)\];",
                 r"{ .reg .b32 next; add.s32 next, \2, 8; \1 [next\3]; }"),
        ("over-arrival", _DEADLOCK, "no mbarrier", "phase", _PENDING),
    ),
    "registers_not_given_back": Mutation(
        replace_nth(r"setmaxnreg.dec.sync.aligned.u32 \d+;", ""), (_DEADLOCK,), "two_consumers"
    ),
    # fences and order
    "no_proxy_fence": Mutation(
        consumer("fence.proxy.async.shared::cta;", ""), ("no fence.proxy.async",)
    ),
    "no_proxy_fence_in_the_last_step": Mutation(
        consumer("fence.proxy.async.shared::cta;", "", -1), ("no fence.proxy.async",), "one_step"
    ),
    "no_register_fence": Mutation(
        consumer("wgmma.fence.sync.aligned;", ""), ("wgmma.fence",), "two_level"
    ),
    "no_cta_barrier": Mutation(
        setup("bar.sync 0;", ""), (_UNORDERED, "uninitialised", "no mbarrier")
    ),
    "staging_reused_too_early": Mutation(
        consumer("bar.warp.sync -1;", ""), (_UNORDERED,), "two_slices"
    ),
    "staging_read_too_early": Mutation(consumer("bar.warp.sync -1;", "", 1), (_UNORDERED,)),
    "barrier_in_a_branch": Mutation(
        setup(r"(st.shared.b32 \[%r\d+\+\d+\], 1;)(?=\s+(?:\.loc[^\n]*\s+)*\$L__BB0_\d+:)",
              r"bar.warp.sync -1; \1", -1),
        ("divergent", _DEADLOCK),
    ),
    "accumulators_read_in_flight": Mutation(
        consumer("wgmma.wait_group.sync.aligned 0;", ""), ("while a WGMMA",), "two_level"
    ),
    "tensor_map_not_acquired": Mutation(
        producer(r"fence.proxy.tensormap::generic.acquire.sys [^;]*;", ""), ("tensormap",), "table"
    ),
    # split K: sums from CTA to CTA
    "sums_expect_half_the_bytes": Mutation(
        replace_nth(r"(mov.b32 %r\d+,) 2048;", r"\1 1024;"),
        (_PENDING, _DEADLOCK, "phase", _UNORDERED, "uninitialised"),
        "split",
    ),
    "sums_are_not_asked_for_again": Mutation(
        replace_nth(r"mbarrier.arrive.shared::cluster.b64 _, [^;]*;", ""), (_DEADLOCK,), "split"
    ),
    "sums_sent_to_their_sender": Mutation(
        replace_nth(r"(mapa.shared::cluster.u32 %r\d+, %r\d+,) 0;", r"\1 1;"),
        ("its mbarrier in another",),
        "split",
    ),
    "sums_sent_before_they_are_asked_for": Mutation(
        lambda ptx: _pass_before(ptx, "st.async"), (_UNORDERED, _PENDING, "phase"), "split"
    ),
    # addresses, tails, arithmetic
    "row_tail_dropped": Mutation(
        consumer(r"setp.ge.s32 " + _STORE, r"setp.ne.s32 \1, \2, \2;\4 @\1 bra \5;"),
        ("written twice", "belongs to no expert", "bytes"),
        "no_tails",
    ),
    "column_tail_dropped": Mutation(
        consumer(r"or.pred (%p\d+), (%p\d+), (%p\d+);", r"mov.pred \1, \2;"),
        ("written", "bytes", _WRONG),
    ),
    "wrong_swizzle": Mutation(
        producer(r"(and.b32 %r\d+, %r\d+,) 112;", r"\1 96;", 1),
        (_WRONG, "two lanes write", "uninitialised"),
    ),
    "expert_search_off_by_one": Mutation(
        producer(r"setp.le.s32 (%p\d+, %r\d+, %r\d+;)(?=" + _LOC + r"\s+vote)",
                 r"setp.lt.s32 \1"),
        (_WRONG, "shared read", "uninitialised", "bytes", "phase", "mbarrier", _DEADLOCK),
    ),
    "first_expert_search_off_by_one": Mutation(
        setup(r"setp.le.s32 (%p\d+, %r\d+, %r\d+;)(?=" + _LOC + r"\s+vote)", r"setp.lt.s32 \1"),
        (_WRONG, "shared read", "uninitialised", "bytes", "written", "mbarrier"),
    ),
    "weights_of_the_next_expert": Mutation(
        producer(r"(cp.async.bulk.tensor[^{]*\{%r\d+, %r\d+,) (%r\d+)(\}[^;]*;)",
                 r"{ .reg .b32 next; add.s32 next, \2, 1; \1 next\3 }"),
        (_WRONG,),
    ),
    "coordinates_swapped": Mutation(
        producer(r"\{(%r\d+), (%r\d+), (%r\d+)\}\]", r"{\1, \3, \2}]"), (_WRONG,)
    ),
    "scales_swapped": Mutation(swap_scales, (_WRONG, "bytes")),
    "first_step_accumulates": Mutation(
        consumer(r"setp.ne.b32 p, %r\d+, 0;", "setp.eq.b32 p, 0, 0;"),
        ("accumulators added to", _WRONG),
    ),
    "a_step_too_few": Mutation(
        consumer(r"(setp.ne.b32 %p\d+, %r\d+,) 3;(?=[\s\S]{0,400}bra)", r"\1 2;", -1),
        (_WRONG, _DEADLOCK, "phase", _READING, _PENDING, _UNORDERED, "exits"),
        "six_steps",
    ),
    "descriptor_not_advanced": Mutation(
        consumer(r"(add.s32 %r\d+, %r\d+,) 4;", r"\1 2;"), (_WRONG,)
    ),
    "stages_overlap": Mutation(
        producer(r"(shl.b32 %r\d+, %r\d+,) 13;", r"\1 12;"),
        (_WRONG, _PENDING, _UNORDERED, _READING, "uninitialised"),
    ),
    "staging_address": Mutation(
        consumer(r"(stmatrix\S+ \[%r\d+)\]", r"\1+16]"),
        (_WRONG, "uninitialised", _UNORDERED, "mbarrier"),
    ),
    "index_of_the_next_row": Mutation(
        producer(r"(ld.global.b32 %r\d+, \[%rd\d+)\+64\];", r"\1+68];"), (_WRONG, "bytes")
    ),
    "index_equal_to_T": Mutation(
        producer(r"setp.lt.s32 (%p\d+, %r\d+, %r\d+;)(?=" + _LOC + r"\s+selp.b32 %r\d+, %r\d+, -1)",
                 r"setp.le.s32 \1"),
        ("bytes",),
        "outside",
    ),
    "scan_step": Mutation(
        setup(r"(shfl.sync.up.b32 %r\d+, %r\d+,) 2,", r"\1 1,"),
        (_WRONG, "written", "bytes", _DEADLOCK, "phase"),
        "many_experts",
    ),
    "half_of_the_tiles": Mutation(
        setup(r"shl.b32 (%r\d+), (%r\d+), 1;(?=" + _LOC + r"\s+shfl.sync.up)",
              r"mov.b32 \1, \2;"),
        ("never written",),
    ),
    "tiles_twice": Mutation(
        setup(r"mov.u32 (%r\d+), %nctaid.x;", r"mov.b32 \1, 1;"),
        ("written twice",),
    ),
    "misaligned_store": Mutation(
        consumer(r"(st.global.v4.b32 \[%rd\d+)\]", r"\1+4]"), ("misaligned", "bytes")
    ),
    "unset_register": Mutation(
        producer(r"mov.b32 %r\d+, -1;", ""), ("before it has a value",)
    ),
    "table_entry_not_written": Mutation(
        setup(r"st.shared.b32 \[%r\d+\+\d+\], %r\d+;", ""), ("uninitialised",)
    ),
    # bulk stores
    "staging_reused_before_it_is_stored": Mutation(
        consumer("cp.async.bulk.wait_group.read 0;", ""), ("a bulk store may still",)
    ),
    "gates_over_a_slice_of_outputs": Mutation(
        consumer("cp.async.bulk.wait_group.read 0;", "", 1), ("a bulk store may still",), "stored"
    ),
    "exit_while_stores_read": Mutation(
        consumer("cp.async.bulk.wait_group.read 0;", "", -1), ("exits with bulk stores",)
    ),
    "stores_not_committed": Mutation(
        consumer("cp.async.bulk.commit_group;", ""), ("a bulk store may still", "exits with")
    ),
    "no_proxy_fence_before_stores": Mutation(
        consumer("fence.proxy.async.shared::cta;", "", -1), ("no fence.proxy.async",)
    ),
    "stored_before_all_lanes_have_written": Mutation(
        consumer("bar.warp.sync -1;", "", -1), (_UNORDERED, "uninitialised", "no fence")
    ),
    "tail_rows_stored": Mutation(
        consumer(r"(setp.lt.s32 %p\d+, %r\d+,) 16;", r"\1 0;"),
        ("written twice", "belongs to no expert"),
    ),
    # units that the producer posts
    "posts_not_awaited": Mutation(
        producer("bar.sync 3, 128;", ""), (_UNORDERED, "uninitialised"), "one_step"
    ),
    "units_counted_without_atomics": Mutation(
        producer(r"atom.global.add.u32 (%r\d+), \[(%rd\d+)\], 1;",
                 r"{ .reg .b32 more; ld.global.b32 \1, [\2]; add.s32 more, \1, 1; "
                 r"st.global.b32 [\2], more; }"),
        (_UNORDERED,),
        "dynamic",
    ),
    "units_counted_for_each_cta": Mutation(
        producer("atom.global.add", "atom.global.cta.add"), ("scope .cta",), "dynamic"
    ),
    "counters_reset_too_early": Mutation(
        producer("atom.global.acq_rel", "atom.global.relaxed"), (_UNORDERED,), "dynamic"
    ),
    "counters_not_reset": Mutation(
        producer(r"st.global.v2.b32 \[%rd\d+\], \{0, 0\};", ""), ("counters left",), "dynamic"
    ),
    # clusters
    "empty_counts_one_cta": Mutation(
        setup("(mov.b32 %r\\d+,) 8;", r"\1 4;"),
        ("over-arrival", "phase", _READING, _PENDING, _UNORDERED),
        "cluster",
    ),
    "released_to_oneself_only": Mutation(
        consumer(r"(setp.gt.u32 %p\d+, %r\d+,) 1;", r"\1 0;"), (_DEADLOCK,), "cluster"
    ),
    "multicast_to_one_cta": Mutation(
        producer(r"(mov.b16 %rs\d+,) 3;", r"\1 1;"), (_DEADLOCK, "phase"), "cluster"
    ),
    "multicast_where_nothing_is_shared": Mutation(
        producer(r"(st.shared.v4[^;]*;" + _LOC + r"\s+st.shared.b32 [^;]*,) %r\d+;", r"\1 1;"),
        (_WRONG,),
        "cluster",
    ),
    "cta_barrier_for_the_cluster": Mutation(
        setup(r"barrier.cluster.arrive;(?s:.*?)barrier.cluster.wait;", "bar.sync 0;"),
        ("after its init", "no mbarrier"),
        "cluster",
    ),
    "no_last_cluster_barrier": Mutation(
        consumer(r"barrier.cluster.arrive;(?s:.*?)barrier.cluster.wait;", ""),
        ("has exited", "exits: nothing", "exits before"),
        "cluster",
    ),
    # activations, N-major weights, starts
    "gate_strides_swapped": Mutation(swap_gate_strides, (_WRONG, "bytes"), "gated"),
    "gate_strides_swapped_in_swap": Mutation(swap_gate_strides, (_WRONG, "bytes"), "swap_gated"),
    "coordinates_of_gates_swapped": Mutation(
        producer(r"(tensor.5d\S+ \[[^]]*\], \[%rd\d+, \{%r\d+,) (%r\d+), (%r\d+), (%r\d+)",
                 r"\1 \4, \3, \2"),
        (_WRONG,),
        "gated",
    ),
    "exponent_of_the_other_sign": Mutation(
        consumer("0fBFB8AA3B", "0f3FB8AA3B"), (_WRONG,), "gated"
    ),
    "not_divided": Mutation(
        consumer(r"rcp.approx.ftz.f32 (%r\d+), (%r\d+);", r"mov.b32 \1, \2;"), (_WRONG,), "gated"
    ),
    "second_half_of_a_slice_elsewhere": Mutation(
        consumer(r"(stmatrix\S+ \[%r\d+)\]", r"\1+16]", 2),
        (_WRONG, "uninitialised", _UNORDERED),
        "gated",
    ),
    "not_transposed": Mutation(consumer(r"(p, 1, 1, 0,) 1;", r"\1 0;"), (_WRONG,), "n_major"),
    "gate_in_place_of_up": Mutation(
        producer(r"(tensor.4d\S+ \[[^]]*\], \[%rd\d+, \{%r\d+, %r\d+,) %r\d+,", r"\1 0,", 1),
        (_WRONG,),
        "n_major_gated",
    ),
    "starts_ignored": Mutation(
        setup(r"setp.eq.b64 (%p\d+), %rd\d+, 0;", r"setp.eq.b32 \1, 0, 0;"),
        ("belongs to no expert", "never written"),
        "starts",
    ),
    # rows in order, by TMA
    "tma_x_not_expected": Mutation(
        producer("(mov.b32 %r\\d+,) 16384;", r"\1 8192;"), (_PENDING, _UNORDERED), "tma_x"
    ),
    "tma_x_scales_not_awaited": Mutation(
        setup("(mov.b32 %r\\d+,) 33;", r"\1 1;"), ("over-arrival", _UNORDERED), "blocks_tma_x"
    ),
    "tma_x_scales_not_skipped": Mutation(
        consumer(r"(and.b32 %r\d+, %r\d+,) 12;", r"\1 0;"), (_WRONG,), "blocks_tma_x"
    ),
    "tma_x_of_the_first_tile": Mutation(
        producer(r"(tensor.2d\S+ \[[^]]*\], \[%rd\d+, \{%r\d+,) %r\d+", r"\1 0"),
        (_WRONG,),
        "tma_x",
    ),
    # the slices of a whole tile together
    "slices_not_awaited": Mutation(
        consumer("cp.async.bulk.wait_group.read 0;", ""),
        ("a bulk store may still",),
        "blocks_tma_x",
    ),
    "slices_without_proxy_fence": Mutation(
        consumer("fence.proxy.async.shared::cta;", ""), ("no fence.proxy.async",), "blocks_tma_x"
    ),
    # scales of several k-tiles at once
    "spans_in_one_place": Mutation(
        producer(r"(and.b32 %r\d+, %r\d+,) 28;", r"\1 12;"),
        (_PENDING, _UNORDERED, "uninitialised"),
        "blocks_spans",
    ),
    "scales_of_another_k_tile": Mutation(
        consumer(r"(and.b32 %r\d+, %r\d+,) 28;", r"\1 24;"), (_WRONG,), "blocks_spans"
    ),
    # outputs that are quantised
    "group_of_two_lanes": Mutation(
        consumer(r"(shfl.sync.bfly.b32 %r\d+, %r\d+,) 2,", r"\1 0,"), (_WRONG,), "blocks_quantised"
    ),
    "row_in_another_half": Mutation(
        consumer(r"(st.shared.b16 \[%r\d+\+)99328", r"\g<1>98304"),
        ("uninitialised",),
        "blocks_quantised",
    ),
    "scales_of_no_row": Mutation(
        consumer(
            r"and.pred (%p\d+), (%p\d+), %p\d+;(?=\s+not.pred %p\d+, \1; [^;]*; [^;]*; or.pred)",
            r"and.pred \1, \2, \2;",
        ),
        ("global access", "written twice", "belongs to no expert"),
        "blocks_quantised",
    ),
    "scales_of_no_column": Mutation(
        consumer(r"(setp.gt.s32 %p\d+, %r\d+,) 271;", r"\1 500;", 10),
        ("global access", "written twice", "never written"),
        "blocks_quantised",
    ),
    # ping-pong
    "first_turn_not_passed": Mutation(
        consumer(r"bar.arrive [^;]*;", ""), (_DEADLOCK,), "pingpong"
    ),
    "turn_not_passed": Mutation(consumer(r"bar.arrive [^;]*;", "", -1), (_DEADLOCK,), "pingpong"),
    "turns_not_awaited": Mutation(
        consumer(r"bar.sync %r\d+, 256;", ""),
        ("phase", "for the second time", _READING, _UNORDERED, "uninitialised"),
        "pingpong",
    ),
    # packed weights
    "packed_sums_not_awaited": Mutation(
        replace_nth("wgmma.wait_group.sync.aligned 0;", ""), ("read while a WGMMA",), "packed"
    ),
    "packed_fragments_not_fenced": Mutation(
        replace_nth("wgmma.fence.sync.aligned;", "", 1), ("registers of A written",), "packed"
    ),
    "packed_released_by_all_lanes": Mutation(
        replace_nth("@p mbarrier.arrive", "mbarrier.arrive"), ("over-arrival", "phase"), "packed"
    ),
    "packed_never_released": Mutation(
        replace_nth(r"(setp.eq.b32 p, %r\d+,) 0; @p mbarrier", r"\1 77; @p mbarrier"),
        (_DEADLOCK,),
        "packed",
    ),
    "packed_half_the_bytes": Mutation(
        replace_nth("(mov.b32 %r\\d+,) 8448;", r"\1 4224;"), (_PENDING, _DEADLOCK), "packed"
    ),
    "packed_three_bits": Mutation(replace_nth("983055;", "458759;"), (_WRONG,), "packed"),
    "packed_other_bias": Mutation(replace_nth("-1022835960;", "-1022835944;"), (_WRONG,), "packed"),
    "packed_powers_left_out": Mutation(
        replace_nth("(mov.b32 %r\\d+,) -8323200;", r"\1 0;"), (_WRONG,), "packed"
    ),
    "packed_rows_of_another_box": Mutation(
        replace_nth(r"(ldmatrix[^\[]*\[%r\d+)\+1024\]", r"\1+2048]"), (_WRONG,), "packed_rows"
    ),
    "packed_rows_of_the_other_step": Mutation(
        replace_nth(
            r"(mma.sync[^{]*{[^}]*}, {[^}]*},) { (%r\d+), (%r\d+) }", r"\1 { \3, \2 }"
        ),
        (_WRONG,),
        "packed_rows",
    ),
    "packed_rows_released_by_all_lanes": Mutation(
        replace_nth("@p mbarrier.arrive", "mbarrier.arrive"),
        ("over-arrival", "phase"),
        "packed_rows",
    ),
    "packed_tile_not_fenced": Mutation(
        replace_nth("fence.proxy.async.shared::cta;", "", -1),
        ("no fence.proxy.async",),
        "packed_slices",
    ),
    "packed_tile_sent_too_early": Mutation(
        replace_nth(r"bar.sync %r\d+, 128;", "", -1),
        (_UNORDERED, "uninitialised"),
        "packed_slices",
    ),
    "packed_tile_over_the_one_before": Mutation(
        replace_nth("cp.async.bulk.wait_group.read 0;", ""),
        ("a bulk store may still",),
        "packed_slices",
    ),
    "packed_tile_written_by_one_warp_too_early": Mutation(
        replace_nth(r"bar.sync %r\d+, 128;", ""), ("a bulk store may still",), "packed_slices"
    ),
    "packed_tile_left_behind": Mutation(
        replace_nth("cp.async.bulk.wait_group.read 0;", "", -1),
        ("exits with bulk stores",),
        "packed_slices",
    ),
    "packed_rotated_too_far": Mutation(
        replace_nth(r"(shf.r.wrap.b32 [^;]*,) 4;", r"\1 20;"), (_WRONG,), "packed_mxfp4"
    ),
    "packed_sum_left_too_small": Mutation(
        replace_nth("0f4F800000;", "0f3F800000;"), (_WRONG,), "packed_mxfp4"
    ),
    "packed_factor_of_another_group": Mutation(
        replace_nth(r"(prmt.b32 [^;]*,) %r\d+;", r"\1 0x5151;", 4), (_WRONG,), "packed_mxfp4"
    ),
    # a last stage of one block; tiles of 24 rows, which the epilogue takes as 32
    "tail_as_many_bytes_as_others": Mutation(
        replace_nth(r"selp.b32 (%r\d+), 1, 0, %p\d+;(?= mov.b32 %r\d+, 8704;)", r"mov.b32 \1, 1;"),
        (_DEADLOCK, _PENDING),
        "packed_half_part",
    ),
    "half_part_rows_in_the_next_box": Mutation(
        replace_nth(r"@%p\d+ bra \S+;(?= setp.gt.s32[^;]*; selp.b32[^;]*; cp.async)", ""),
        (_WRONG, _PENDING, _UNORDERED, "copies"),
        "packed_half_part",
    ),
    "half_part_stored_as_a_whole": Mutation(
        replace_nth(r"(min.s32 [^;]*,) 24;", r"\1 32;"),
        (_WRONG, "written"),
        "packed_half_part",
    ),
    # tiles of 32 columns, which two warps multiply
    "narrow_released_by_four_warps": Mutation(
        replace_nth("(mov.b32 %r\\d+,) 2;(?= mbarrier.init)", r"\1 4;"),
        (_DEADLOCK,),
        "packed_narrow",
    ),
    "narrow_released_by_one_warp": Mutation(
        replace_nth("(mov.b32 %r\\d+,) 2;(?= mbarrier.init)", r"\1 1;"),
        ("over-arrival", "phase", _UNORDERED, _PENDING),
        "packed_narrow",
    ),
    "narrow_sums_read_too_early": Mutation(
        replace_nth("bar.sync 1, 128;", ""), (_UNORDERED, "uninitialised"), "packed_narrow"
    ),
    "narrow_sums_overwritten": Mutation(
        replace_nth("bar.sync 2, 128;", ""), (_UNORDERED,), "packed_narrow"
    ),
    "narrow_rows_of_a_warpgroup": Mutation(
        replace_nth(r"(shr.u32 (%r\d+), %r\d+, 3; and.b32 %r\d+, \2,) 7;", r"\1 15;"),
        (_WRONG, "uninitialised", _PENDING, _UNORDERED, "two lanes write"),
        "packed_narrow_alone",
    ),
    "narrow_gates_of_the_first_half": Mutation(
        replace_nth(r"(mul.wide.s32 %rd\d+, %r\d+,) 1152;", r"\1 0;"),
        (_WRONG,),
        "packed_narrow_gated",
    ),
    "narrow_ups_behind_a_whole_block": Mutation(
        replace_nth(r"(cp.async.bulk\S+ \[%r\d+)\+9344\]", r"\1+10496]"),
        (_WRONG, "uninitialised", _PENDING, _UNORDERED),
        "packed_narrow_gated",
    ),
}  # fmt: skip
