"""Defects to plant in the samples' PTX: each must be caught, see test_ptxsim_features.py."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.ptxsim.kernels.mutations import Edit, replace_nth


@dataclass(frozen=True)
class Defect:
    """expects: of these texts, one must be in what the simulator says. kernel: the one edited."""

    scene: str
    edit: Edit
    expects: tuple[str, ...]
    kernel: int = 0


def _sub(pattern: str, to: str, nth: int = 0) -> Edit:
    return replace_nth(pattern, to, nth)


def both(first: Edit, second: Edit) -> Edit:
    return lambda ptx: second(first(ptx))


def _not_atomic(pattern: str, space: str) -> Edit:
    """A load, an addition and a store in place of an atomic one."""
    return _sub(
        pattern + r" (%r\d+), \[(%\w+)\], 1;",
        rf"{{ .reg .b32 more; ld.{space}.b32 \1, [\2]; add.s32 more, \1, 1; "
        rf"st.{space}.b32 [\2], more; }}",
    )


def _earlier(ptx: str) -> str:
    """The first bar.arrive comes before what it announces."""
    arrive = re.search(r"bar\.arrive\s+2, 64;", ptx)
    assert arrive is not None
    rest = ptx.replace(arrive[0], "", 1)
    return _sub(
        r"(ld.shared.b32 %r\d+, \[%r\d+\];)(?=\s+(?:\.loc[^\n]*\s+)*mad)", rf"{arrive[0]} \1"
    )(rest)


_UNORDERED = "nothing orders"
_DEADLOCK = "deadlock"
_WRONG = "wrong result"
_ARRIVE, _WAIT = "barrier.cluster.arrive;", "barrier.cluster.wait;"

DEFECTS: dict[str, Defect] = {
    # clusters: barriers, multicast, remote arrivals
    "no_first_cluster_barrier": Defect(
        "multicast", both(_sub("barrier.cluster.arrive.relaxed;", ""), _sub(_WAIT, "")),
        ("after its init", "no mbarrier"),
    ),
    "inits_not_shown_to_the_cluster": Defect(
        "multicast", _sub("fence.mbarrier_init.release.cluster;", ""), ("after its init",)
    ),
    "no_last_cluster_barrier": Defect(
        "multicast", both(_sub(_ARRIVE, ""), _sub(_WAIT, "", -1)), ("has exited", "exits: nothing")
    ),
    "last_cluster_barrier_without_wait": Defect(
        "multicast", _sub(_WAIT, "", -1), ("has exited", "exits: nothing")
    ),
    "empty_counts_one_cta": Defect(
        "multicast", _sub(r"(mov.b32 %r\d+,) 2;", r"\1 1;"),
        ("over-arrival", _UNORDERED, "phase", "pending"),
    ),
    "released_to_oneself_only": Defect(
        "multicast", _sub(r"(setp.gt.u32 %p\d+, %r\d+,) 1;", r"\1 0;"), (_DEADLOCK,)
    ),
    "released_twice_to_one": Defect(
        "multicast", _sub(r"(mapa\S+ %r\d+, %r\d+,) %r\d+;", r"\1 0;"), ("over-arrival", _UNORDERED)
    ),
    "released_before_all_lanes_have_read": Defect(
        "multicast", _sub("bar.warp.sync -1;", ""), (_UNORDERED,)
    ),
    "mask_of_one_cta": Defect(
        "multicast", _sub(r"(mov.b16 %rs\d+,) 3;", r"\1 1;"), (_DEADLOCK, "phase")
    ),
    "mask_beyond_the_cluster": Defect(
        "multicast", _sub(r"(mov.b16 %rs\d+,) 3;", r"\1 7;"), ("CTA 2 of a cluster of 2",)
    ),
    "both_write_the_first_half": Defect(
        "multicast", _sub(r"shl.b32 (%r\d+), (%r\d+), 8;", r"mov.b32 \1, 0;"),
        ("asynchronous write is pending", _UNORDERED),
    ),
    "expects_its_own_half": Defect(
        "multicast", _sub(r"(mov.b32 %r\d+,) 2048;", r"\1 1024;"),
        (_DEADLOCK, "phase", "pending", _UNORDERED),
    ),
    # distributed shared memory
    "read_before_the_cluster_barrier": Defect(
        "exchange", both(_sub(_ARRIVE, ""), _sub(_WAIT, "")), ("uninitialised", _UNORDERED)
    ),
    "relaxed_cluster_barrier": Defect(
        "exchange", _sub(_ARRIVE, "barrier.cluster.arrive.relaxed;"), (_UNORDERED,)
    ),
    "exit_before_the_peer_has_read": Defect(
        "exchange",
        both(
            both(_sub(_ARRIVE, "", -1), _sub(_WAIT, "", -1)),
            _sub(r"ld.shared.b32 (%r\d+), \[%r\d+\+128\];", r"mov.b32 \1, 0;"),
        ),
        ("has exited", "exits: nothing"),
    ),
    "last_cluster_barrier_relaxed": Defect(
        "exchange", _sub(_ARRIVE, "barrier.cluster.arrive.relaxed;", -1),
        (_UNORDERED, "uninitialised"),
    ),
    "own_memory_for_the_peers": Defect(
        "exchange", _sub(r"(xor.b32 %r\d+, %r\d+,) 1;", r"\1 0;"), (_WRONG,)
    ),
    "arrives_twice": Defect("exchange", _sub(_WAIT, _ARRIVE), ("for the second time",)),
    "waits_without_arriving": Defect("exchange", _sub(_ARRIVE, ""), ("without an arrive",)),
    # atomics
    "counter_read_and_written": Defect(
        "split", _not_atomic("atom.global.add.u32", "global"), (_UNORDERED,)
    ),
    "arrival_relaxed": Defect("split", _sub("(atom.global).acq_rel", r"\1.relaxed"), (_UNORDERED,)),
    "arrival_acquires_only": Defect(
        "split", _sub("(atom.global).acq_rel", r"\1.acquire"), (_UNORDERED,)
    ),
    "arrival_releases_only": Defect(
        "split", _sub("(atom.global).acq_rel", r"\1.release"), (_UNORDERED,)
    ),
    "arrival_of_the_wrong_scope": Defect(
        "split", _sub("(atom.global.acq_rel)", r"\1.cta"), ("scope .cta",)
    ),
    "arrival_before_all_have_written": Defect(
        "split", _sub("bar.sync 0;", "", 2), (_UNORDERED,)
    ),
    "counts_by_two": Defect(
        "split", _sub(r"(atom.global.add.u32 %r\d+, \[%rd\d+\],) 1;", r"\1 2;"), (_WRONG,)
    ),
    "flag_relaxed": Defect("flag", _sub("st.release", "st.relaxed"), (_UNORDERED,)),
    "flag_read_relaxed": Defect("flag", _sub("ld.acquire", "ld.relaxed"), (_UNORDERED,)),
    "flag_plain": Defect("flag", _sub("st.release.gpu.global", "st.global"), (_UNORDERED,)),
    "flag_never_set": Defect("flag", _sub(r"st.release[^;]*;", ""), (_DEADLOCK,)),
    "flag_of_the_wrong_scope": Defect("flag", _sub("(st.release).gpu", r"\1.cta"), ("scope .cta",)),
    "no_fence_before_the_flag": Defect(
        "flag_fences", _sub("fence.acq_rel.gpu;", ""), (_UNORDERED,)
    ),
    "no_fence_after_the_flag": Defect(
        "flag_fences", _sub("fence.acq_rel.gpu;", "", -1), (_UNORDERED,)
    ),
    "fence_of_the_wrong_scope": Defect(
        "flag_fences", _sub("fence.acq_rel.gpu;", "fence.acq_rel.cluster;"), (_UNORDERED,)
    ),
    "bins_read_and_written": Defect(
        "histogram", _not_atomic("atom.shared.cta.add.u32", "shared"),
        ("two lanes write", _UNORDERED),
    ),
    "bins_read_too_early": Defect("histogram", _sub("bar.sync 0;", "", -1), (_UNORDERED,)),
    "bins_cleared_too_late": Defect(
        "histogram", _sub("bar.sync 0;", ""), (_UNORDERED, "uninitialised")
    ),
    # plain bulk copies
    "bulk_copy_not_awaited": Defect(
        "plain", _sub(r"mbarrier.try_wait\S+ P1, [^;]*;", "setp.eq.b32 P1, 0, 0;"), ("pending",)
    ),
    "expects_half_the_bytes": Defect(
        "plain", _sub(r"(arrive.expect_tx[^,]*, \[%r\d+\],) %r\d+;", r"\1 256;"),
        (_DEADLOCK, "pending"),
    ),
    "bulk_copy_of_an_odd_size": Defect(
        "plain", _sub(r"(mov.b32 %r\d+,) 512;", r"\1 500;"), ("no multiples of 16",)
    ),
    # groups of cp.async
    "copies_not_committed": Defect(
        "staged", _sub("cp.async.commit_group;", "", -1), ("pending", "uninitialised")
    ),
    "waits_for_one_group_too_few": Defect(
        "staged", _sub("cp.async.wait_group 1;", "cp.async.wait_group 2;"), ("pending",)
    ),
    "no_wait_for_copies": Defect(
        "staged", _sub("cp.async.wait_group 1;", ""), ("pending", "nobody waits for")
    ),
    "copies_of_others_not_awaited": Defect(
        "staged", _sub("bar.warp.sync -1;", ""), (_UNORDERED, "pending")
    ),
    # bulk stores
    "staging_reused_before_it_is_read": Defect(
        "staged", _sub("cp.async.bulk.wait_group.read 1;", ""), ("a bulk store may still",)
    ),
    "waits_for_one_store_too_few": Defect(
        "staged", _sub("cp.async.bulk.wait_group.read 1;", "cp.async.bulk.wait_group.read 2;"),
        ("a bulk store may still",),
    ),
    "stores_not_committed": Defect(
        "staged", _sub("cp.async.bulk.commit_group;", ""), ("a bulk store may still", "exits with")
    ),
    "exit_while_stores_read": Defect(
        "staged", _sub("cp.async.bulk.wait_group.read 0;", ""), ("exits with bulk stores",)
    ),
    "no_fence_before_stores": Defect(
        "staged", _sub("fence.proxy.async.shared::cta;", ""), ("no fence.proxy.async",)
    ),
    "stored_before_all_lanes_have_written": Defect(
        "staged", _sub("bar.warp.sync -1;", "", -1), (_UNORDERED, "uninitialised", "no fence")
    ),
    "every_lane_stores": Defect(
        "staged", _sub(r"setp.ne.b32 (%p\d+), (%r\d+), 0;", r"setp.ne.b32 \1, \2, \2;"),
        ("written twice",),
    ),
    "tensor_store_not_awaited": Defect(
        "staged_tensor", _sub("cp.async.bulk.wait_group.read 1;", ""), ("a bulk store may still",)
    ),
    "tensor_store_of_the_wrong_row": Defect(
        "staged_tensor", _sub(r"(bulk_group \[%rd\d+, )\{(%r\d+), %r\d+\}", r"\1{\2, \2}"),
        ("written twice",),
    ),
    # dependent launches
    "read_without_waiting": Defect(
        "dependent", _sub("griddepcontrol.wait;", ""), ("before griddepcontrol.wait",), kernel=1
    ),
    "read_before_waiting": Defect(
        "dependent",
        both(
            _sub("griddepcontrol.wait;", ""),
            _sub(r"(ld.global.b32[^;]*;)(?!(?s:.*)ld.global)", r"\1 griddepcontrol.wait;"),
        ),
        ("before griddepcontrol.wait",),
        kernel=1,
    ),
    "one_lane_waits": Defect(
        "dependent",
        _sub(
            "griddepcontrol.wait;",
            "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.ne.b32 p, t, 0; "
            "@p bra past; griddepcontrol.wait; past: }",
        ),
        ("before griddepcontrol.wait",),
        kernel=1,
    ),
    # barriers by name
    "turn_not_passed": Defect("turns", _sub("bar.arrive 2, 64;", ""), (_DEADLOCK,)),
    "turn_passed_to_oneself": Defect(
        "turns", _sub("bar.arrive 2, 64;", "bar.arrive 1, 64;"), ("for the second time", _DEADLOCK)
    ),
    "turn_of_one_warp": Defect(
        "turns", both(_sub("bar.sync 2, 64;", "bar.sync 2, 32;"),
                      _sub("bar.arrive 2, 64;", "bar.arrive 2, 32;")),
        (_UNORDERED, "uninitialised"),
    ),
    "turns_of_different_counts": Defect(
        "turns", _sub("bar.sync 2, 64;", "bar.sync 2, 96;"), ("others expect",)
    ),
    "turn_passed_too_early": Defect("turns", _earlier, (_UNORDERED, "uninitialised")),
}  # fmt: skip
