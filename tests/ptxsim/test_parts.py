"""The simulator's parts: what it refuses, how it rounds, what tensor maps read."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import emitters
from cutlass_moe.images.toolchains import default_build
from emitters.spec.dtypes import DType
from tests.ptxsim import alu
from tests.ptxsim.kernels import launch
from tests.ptxsim.kernels.runs import BASE, RUNS, SMALL
from tests.ptxsim.machine import Launch, Machine
from tests.ptxsim.memory import WORKSPACE, Access, GlobalMemory
from tests.ptxsim.ptx import Fault, parse
from tests.ptxsim.schedule import Schedule
from tests.ptxsim.tensormap import TensorMap
from tests.ptxsim.warp import Code

needs_dsl = pytest.mark.skipif(default_build() is None, reason="needs nvidia-cutlass-dsl")

UNKNOWN = [
    ("popc.b32", "bfind.u32", "unknown instruction bfind.u32"),
    ("ld.global.b32", "ld.global.nc.b32", "unknown instruction ld.global.nc.b32"),
    ("mul.f32", "mul.ftz.f32", "unknown instruction mul.ftz.f32"),
    ("p, 1,  1;", "p, -1,  1;", "scales and transpositions"),
    ("%nctaid.x", "%nctaid.y", "unknown operand %nctaid.y"),
    ("bar.sync", "@%p1 bar.sync", "a guard on a collective"),
    ("bar.warp.sync \t-1", "bar.warp.sync \t15", "membermask 15"),
]


@needs_dsl
@pytest.mark.parametrize(("known", "unknown", "reason"), UNKNOWN, ids=[u[1] for u in UNKNOWN])
def test_what_is_not_modelled_is_named(known: str, unknown: str, reason: str) -> None:
    ptx = launch.kernel(BASE.problem, SMALL).ptx
    assert known in ptx
    with pytest.raises(ValueError, match=reason):
        Code(parse(ptx.replace(known, unknown)))


def _run(body: str, cluster: int = 1, memory: GlobalMemory | None = None) -> None:
    """One warp a CTA, without parameters."""
    code = Code(parse(f".entry k() .reqntid 32, 1, 1 {{ .reg .b32 r<8>; .reg .b64 d<4>; {body} }}"))
    launch_one = Launch(code, cluster, 1024, 32, b"", cluster)
    Machine(memory or GlobalMemory(), [launch_one], Schedule(0)).run()


@pytest.mark.parametrize(
    "text",
    [
        "atom.global.add.u64 d1, [d0], d2;",
        "atom.global.inc.u32 r1, [d0], r2;",
        "ld.relaxed.gpu.global.b64 d1, [d0];",
        "st.acquire.gpu.global.b32 [d0], r1;",
        "fence.acq_rel.cta;",
        "barrier.cluster.arrive.acquire;",
        "st.shared.b8 [r1], r2;",
        "mbarrier.arrive.expect_tx.shared::cluster.b64 _, [r1], r2;",
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [r1], r2, [r3];",
        "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [r1], [d0], r2, [r3];",
        "cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [d0], [r1], r2, d1;",
        "cp.async.bulk.wait_group.write 0;",
    ],
)
def test_what_is_not_modelled_is_named_by_itself(text: str) -> None:
    with pytest.raises(ValueError, match=f"unknown instruction {re.escape(text.split()[0][:-1])}"):
        _run(text)


@pytest.mark.parametrize(("lanes", "wrong"), [(31, False), (15, True)])
def test_lanes_may_write_halves_of_a_word(lanes: int, wrong: bool) -> None:
    expected = pytest.raises(Fault, match="two lanes write the same") if wrong else nullcontext()
    with expected:
        _run(
            f"mov.u32 r1, %laneid; and.b32 r1, r1, {lanes}; shl.b32 r1, r1, 1; mov.b32 r2, 7; "
            "st.shared.b16 [r1+1024], r2; ret;"
        )


UNDEFINED = "mov.u32 r1, %laneid; setp.ne.u32 p, r1, 0; @p bra on; mov.b32 r2, 7; on: "


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ("mov.b32 r3, r2;", False),
        ("mov.b32 r3, r2; add.s32 r4, r3, 1;", True),
        ("shfl.sync.idx.b32 r3, r2, 0, 31, -1; add.s32 r4, r3, 1;", False),
        ("shfl.sync.idx.b32 r3, r2, 1, 31, -1;", False),
        ("shfl.sync.idx.b32 r3, r2, 1, 31, -1; add.s32 r4, r3, 1;", True),
    ],
)
def test_undefined_values_may_be_handed_on_but_not_used(body: str, wrong: bool) -> None:
    """r2 has a value in lane 0."""
    expected = pytest.raises(Fault, match="before it has a value") if wrong else nullcontext()
    with expected:
        _run(f".reg .pred p; {UNDEFINED} {body} ret;")


@pytest.mark.parametrize(
    ("text", "before", "after"),
    [
        ("red.global.add.s32 [d0], r1;", 5, {5 + 496}),
        ("red.global.add.u32 [d0], 3;", -96, {0}),
        ("red.release.gpu.global.max.s32 [d0], r1;", -1, {31}),
        ("red.global.max.u32 [d0], r1;", -1, {-1}),
        ("atom.global.min.s32 r2, [d0], r1;", 5, {0}),
        ("red.global.and.b32 [d0], r1;", 5, {0}),
        ("red.global.or.b32 [d0], r1;", 64, {95}),
        ("atom.relaxed.gpu.global.exch.b32 r2, [d0], r1;", 64, set(range(32))),
        ("atom.global.cas.b32 r2, [d0], 64, r1;", 64, set(range(32))),
        ("atom.global.cas.b32 r2, [d0], 65, r1;", 64, {64}),
        ("red.global.add.f32 [d0], 0f3F800000;", 0, {0x42000000}),  # 32 times 1.0
    ],
)
def test_atomics_of_32_lanes(text: str, before: int, after: set[int]) -> None:
    word = np.array([before], np.int32)
    memory = GlobalMemory()
    address = memory.add("word", word.view(np.uint8), WORKSPACE)
    _run(f"mov.u32 r1, %laneid; mov.b64 d0, {address}; {text} ret;", memory=memory)
    assert int(word[0]) in after


@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_cluster_registers(cluster: int) -> None:
    """A CTA whose rank is not below the cluster's size would read what has no value."""
    special = "mov.u32 r1, %cluster_ctarank; mov.u32 r2, %cluster_nctarank;"
    _run(f".reg .pred p; {special} setp.lt.u32 p, r1, r2; @p bra on; add.s32 r3, r4, 1; on: ret;",
         cluster)  # fmt: skip


def test_clusters_that_cannot_be_launched() -> None:
    code = Code(parse(".entry k() .reqntid 32, 1, 1 .reqnctapercluster 2, 1, 1 { ret; }"))
    with pytest.raises(ValueError, match="a grid of 4 CTAs in clusters of 3"):
        Launch(code, 4, 0, 32, b"", 3)
    with pytest.raises(ValueError, match="clusters of 4, the PTX wants 2"):
        Launch(code, 4, 0, 32, b"", 4)
    Launch(code, 4, 0, 32, b"", 2)


@needs_dsl
def test_line_numbers_change_no_instruction() -> None:
    """So that a fault is the same with them."""
    plain, named = (
        launch.kernel(BASE.problem, SMALL, line_info).code.instructions
        for line_info in (False, True)
    )
    assert [one.text for one in plain] == [one.text for one in named]


@needs_dsl
def test_faults_name_the_python_line() -> None:
    kernel = launch.kernel(BASE.problem, SMALL, line_info=True)
    sources = {path.name for path in Path(emitters.__file__).parent.rglob("*.py")}
    for one in kernel.code.instructions:
        if one.opcode.startswith(("wgmma", "cp.async", "mbarrier", "st.global")):
            assert one.source.partition(":")[0] in sources


def _float32(values: list[float]) -> np.ndarray:
    return np.array(values, np.float32)


def test_bf16_rounds_to_nearest_even() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 4096, np.uint32)
    values = bits.view(np.float32)
    values = np.concatenate(
        [values, _float32([0.0, -0.0, np.inf, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8])]
    )
    finite = values[~np.isnan(values)]
    want = torch.from_numpy(finite).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert (alu.bf16_bits(finite) == want).all()


def test_fma_rounds_once() -> None:
    generator = np.random.default_rng(1)
    a, b, c = (generator.standard_normal(2000).astype(np.float32) for _ in range(3))
    c[::2] = -(a * b)[::2] * (1 + generator.integers(0, 4, 1000).astype(np.float32) * 2**-20)
    got = alu.fma(a, b, c)
    for x, y, z, result in zip(a, b, c, got, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        near = [np.nextafter(result, np.float32(s)) for s in (-np.inf, np.inf)]
        errors = [abs(Fraction(float(v)) - exact) for v in (result, *near)]
        assert errors[0] == min(errors)


@pytest.mark.parametrize("corner", [(0, 0, 0), (-16, 3, 1), (32, 5, 0), (0, -9, 0), (0, 0, 2)])
def test_boxes_are_zeros_out_of_bounds(corner: tuple[int, int, int]) -> None:
    data = torch.randint(1, 255, (2, 7, 48), dtype=torch.uint8)
    memory = GlobalMemory()
    pointer = memory.add("weight", data.flatten().numpy())
    box = TensorMap(pointer, 1, (48, 7, 2), (48, 336), (32, 8, 1), 32)
    assert TensorMap.decode(box.encode()) == box
    padded = torch.zeros(6, 40, 160, dtype=torch.uint8)
    padded[2:4, 16:23, 64:112] = data
    x, y, z = corner
    want = padded[2 + z, 16 + y : 24 + y, 64 + x : 96 + x]
    assert (
        box.read_box(memory, Access(np.arange(1)), list(corner)) == want.reshape(-1, 16).numpy()
    ).all()


@pytest.mark.parametrize(
    "changes", [{"pointer": 8}, {"strides": (40, 336)}, {"box": (64, 8, 1)}, {"box": (32, 300, 1)}]
)
def test_tensor_maps_that_the_driver_refuses(changes: dict[str, Any]) -> None:
    good = TensorMap(4096, 1, (48, 7, 2), (48, 336), (32, 8, 1), 32)
    with pytest.raises(ValueError, match="must be|within the swizzle|boxes from"):
        replace(good, **changes)


def test_some_run_gives_the_integer_sums_themselves() -> None:
    """Which test_ptxsim_gpu.py compares bit by bit; float32 holds every one of them."""
    sums = [
        run.case
        for run in RUNS.values()
        if run.case.operand is DType.INT8 and run.case.out is DType.FP32 and not run.case.epilogue
    ]
    assert sums
    assert all(case.k * 127**2 < 2**24 for case in sums)


def test_lop3_is_its_table() -> None:
    lanes = np.arange(32, dtype=np.uint32)
    a, b, c = (lanes >> np.uint32(bit) & np.uint32(1) for bit in (2, 1, 0))
    for table in range(256):
        got = alu._logic(a, b, c, np.full(32, table, np.uint32)) & np.uint32(1)
        want = [table >> (lane & 7) & 1 for lane in range(32)]
        assert got.tolist() == want, table


def test_prmt_takes_bytes() -> None:
    random = np.random.default_rng(0)
    a, b, selector = random.integers(0, 2**32, (3, 32), dtype=np.uint32)
    selector &= np.uint32(0x7777)
    got = alu._permute(a, b, selector)
    for lane in range(32):
        pair = int(b[lane]) << 32 | int(a[lane])
        taken = [pair >> 8 * (int(selector[lane]) >> 4 * i & 7) & 0xFF for i in range(4)]
        assert got[lane] == sum(byte << 8 * i for i, byte in enumerate(taken))
    with pytest.raises(Fault, match="signs are not modelled"):
        alu._permute(a, b, selector | np.uint32(8))
