"""DeepGEMM's fp8 functions with scales of blocks, against products in float64 row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cutlass_moe.compat import deep_gemm
from cutlass_moe.compat.deep_gemm.utils import layout as layouts
from tests.support.numerics import poisoned, same_bits, untouched

E4M3 = torch.float8_e4m3fn
E = 4
SHAPES = [(128, 256), (264, 400), (72, 272), (200, 96)]  # N, K


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def blocks_of_a(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] with scales of 1 x 128."""
    return deep_gemm.per_token_cast_to_fp8(x)


def blocks_of_b(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [E, N, K] with scales of 128 x 128."""
    values, scales = zip(*map(deep_gemm.per_block_cast_to_fp8, w), strict=True)
    return torch.stack(values), torch.stack(scales)


def wide(operand: tuple[Tensor, Tensor], rows: int) -> Tensor:
    """The float64 values of an operand whose scales are of blocks of so many rows x 128."""
    values, scale = operand
    n, k = values.shape[-2:]
    scales = scale.double().repeat_interleave(rows, -2)[..., :n, :].repeat_interleave(128, -1)
    return values.double() * scales[..., :k]


def check(d: Tensor, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], owner: list[int]) -> None:
    """Row r of d, from `poisoned`, is a[r] @ b[owner[r]].T, and unwritten where that is no expert.

    Within half of bfloat16's last place: products and sums on the CPU are float64.
    """
    x, weight = wide(a, 1), wide(b, 128)
    inside = torch.tensor([0 <= e < len(weight) for e in owner], dtype=torch.bool)
    assert untouched(d, ~inside)
    for row in inside.nonzero().flatten().tolist():
        want = weight[owner[row]] @ x[row]
        torch.testing.assert_close(d[row].double(), want, rtol=2**-8, atol=1e-30)


LAYOUTS = {
    "no_rows": [],
    "aligned": [0] * 3 + [-1] * 125 + [1] * 128 + [3] * 2 + [-1] * 126,
    "unaligned": [0, 1, 1, 3, 3, 3],
    "any_order": [2, 2, -1, 0, 1, 1],
    "padding_first": [-1, -1, 3],
    "padding_alone": [-1, -1],
    "ids_of_none": [4, 2, 2, 100, -5],
}


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m_indices", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_contiguous(m_indices: list[int], n: int, k: int) -> None:
    rows = len(m_indices)
    a, b = blocks_of_a(randn(rows, k)), blocks_of_b(randn(E, n, k, seed=1))
    d = poisoned(rows, n, torch.bfloat16, "cpu")
    given = torch.tensor(m_indices, dtype=torch.int32)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, given, disable_ue8m0_cast=True)
    check(d, a, b, m_indices)


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "mn_major": deep_gemm.get_mn_major_tma_aligned_tensor,
    "transposed": lambda scale: scale.mT.contiguous().mT,
    "cut": lambda scale: torch.cat([scale, scale + 1], -1)[..., : scale.shape[-1]],
    "apart": lambda scale: torch.stack([scale, scale + 1], -1)[..., 0],
}


@pytest.mark.parametrize("form", STRIDES.values(), ids=STRIDES.keys())
def test_scales_of_any_strides_give_the_same(form: Callable[[Tensor], Tensor]) -> None:
    n, k = 136, 400
    m_indices = torch.tensor([1] * 5 + [-1] * 2 + [0] * 3, dtype=torch.int32)
    a, b = blocks_of_a(randn(10, k)), blocks_of_b(randn(E, n, k, seed=1))
    masked_m = torch.tensor([5, 0, 2, 1], dtype=torch.int32)
    xs = blocks_of_a(randn(E * 5, k))
    xs = xs[0].view(E, 5, k), xs[1].view(E, 5, -1)
    got = []
    for turn in (lambda scale: scale, form):
        flat, masked = torch.zeros(10, n).bfloat16(), torch.zeros(E, 5, n).bfloat16()
        given = b[0], turn(b[1])
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous((a[0], turn(a[1])), given, flat, m_indices)
        deep_gemm.m_grouped_fp8_gemm_nt_masked((xs[0], turn(xs[1])), given, masked, masked_m, 2)
        got.append((flat, masked))
    assert got[0][0].any() and got[0][1].any()
    assert all(same_bits(mine, right) for mine, right in zip(*got, strict=True))


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize(
    "masked", [[0] * E, [5] * E, [2, 0, 3, 1], [-1, 9, 1, 0]], ids=["none", "all", "some", "beyond"]
)
def test_masked(masked: list[int], n: int, k: int) -> None:
    most = 5
    x, scale = blocks_of_a(randn(E * most, k))
    b = blocks_of_b(randn(E, n, k, seed=1))
    d = poisoned(E * most, n, torch.bfloat16, "cpu")
    xs = x.view(E, most, k), scale.view(E, most, -1)
    counts = torch.tensor(masked, dtype=torch.int32)
    deep_gemm.m_grouped_fp8_gemm_nt_masked(xs, b, d.view(E, most, n), counts, 3)
    owner = [e if r < masked[e] else -1 for e in range(E) for r in range(most)]
    check(d, (x, scale), b, owner)


@pytest.fixture
def alignment() -> Iterator[Callable[[int], None]]:
    """Sets the alignment of rows until the test ends."""
    before = deep_gemm.get_mk_alignment_for_contiguous_layout()
    yield deep_gemm.set_mk_alignment_for_contiguous_layout
    deep_gemm.set_mk_alignment_for_contiguous_layout(before)


ENDS = {  # at an alignment of 8, of at most 40 rows
    "gaps": ([3, 12, 24, 25], [(0, 3), (8, 12), (16, 24), (24, 25)]),
    "empty": ([0, 5, 8, 8], [(0, 0), (0, 5), (8, 8), (8, 8)]),
    "empty_at_the_end_before": ([3, 3, 3, 11], [(0, 3), (8, 3), (8, 3), (8, 11)]),
    "no_gaps": ([8, 16, 24, 40], [(0, 8), (8, 16), (16, 24), (24, 40)]),
    "none": ([0, 0, 0, 0], []),
}


@pytest.mark.parametrize("expected_m", [None, 6])
@pytest.mark.parametrize(("ends", "ranges"), ENDS.values(), ids=ENDS.keys())
def test_psum_layout(
    ends: list[int],
    ranges: list[tuple[int, int]],
    expected_m: int | None,
    alignment: Callable[[int], None],
) -> None:
    rows, n, k = 40, 136, 272
    owner = [-1] * rows
    for e, (start, end) in enumerate(ranges):
        owner[start:end] = [e] * (end - start)
    alignment(8)
    options: dict[str, Any] = {
        "use_psum_layout": True,
        "expected_m_for_psum_layout": expected_m,
        "ensure_zero_padding": False,
    }
    layout = torch.tensor(ends, dtype=torch.int32)

    x, b = randn(rows, k), randn(E, n, k, seed=1)
    a, weight = blocks_of_a(x), blocks_of_b(b)
    a[1][[e < 0 for e in owner]] = torch.nan  # gaps are never read
    d = poisoned(rows, n, torch.bfloat16, "cpu")
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, weight, d, layout, **options)
    check(d, a, weight, owner)

    d = poisoned(rows, n, torch.bfloat16, "cpu")
    deep_gemm.m_grouped_bf16_gemm_nt_contiguous(x, b, d, layout, **options)
    right = poisoned(rows, n, torch.bfloat16, "cpu")
    m_indices = torch.tensor(owner, dtype=torch.int32)
    deep_gemm.m_grouped_bf16_gemm_nt_contiguous(x, b, right, m_indices)
    assert same_bits(d, right)


def test_psum_layout_at_first_aligns_to_128() -> None:
    a, b = blocks_of_a(randn(200, 256)), blocks_of_b(randn(2, 24, 256, seed=1))
    d = poisoned(200, 24, torch.bfloat16, "cpu")
    ends = torch.tensor([7, 131], dtype=torch.int32)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, ends, use_psum_layout=True)
    check(d, a, b, [0] * 7 + [-1] * 121 + [1] * 3 + [-1] * 69)


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_dense(rows: int, n: int, k: int) -> None:
    a, b = blocks_of_a(randn(rows, k)), blocks_of_b(randn(1, n, k, seed=1))
    d = poisoned(rows, n, torch.bfloat16, "cpu")
    deep_gemm.fp8_gemm_nt(a, (b[0][0], b[1][0]), d, alpha=None)
    check(d, a, b, [0] * rows)


def test_dense_per_channel_and_in_float32() -> None:
    x = deep_gemm.per_token_cast_to_fp8(randn(5, 256))[0], torch.rand(5, 1)
    w = deep_gemm.per_token_cast_to_fp8(randn(24, 256, seed=1))[0], torch.rand(24, 1)
    d = torch.zeros(5, 24)
    deep_gemm.fp8_gemm_nt(x, w, d)
    want = (x[0].double() * x[1].double()) @ (w[0].double() * w[1].double()).T
    torch.testing.assert_close(d.double(), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "recipes",
    [
        {"recipe": (1, 128, 128)},
        {"recipe": [1, 128, 128]},
        {"recipe_a": (1, 128), "recipe_b": (128, 128)},
    ],
    ids=["tuple", "list", "of_each"],
)
def test_recipes_and_b_transposed(recipes: dict[str, Any]) -> None:
    n, k = 264, 400
    m_indices = torch.tensor([1, 1, 0], dtype=torch.int32)
    a, b = blocks_of_a(randn(3, k)), blocks_of_b(randn(E, n, k, seed=1))
    plain, named, turned = (torch.zeros(3, n).bfloat16() for _ in range(3))
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, plain, m_indices)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, named, m_indices, **recipes)
    of_k = b[0].mT, b[1].mT
    deep_gemm.m_grouped_fp8_gemm_nn_contiguous(a, of_k, turned, m_indices, **recipes)
    assert plain.any() and same_bits(named, plain) and same_bits(turned, plain)


# Errors

ROWS = 6
A = torch.zeros(ROWS, 272, dtype=E4M3), torch.ones(ROWS, 3)
B = torch.zeros(E, 264, 272, dtype=E4M3), torch.ones(E, 3, 3)
TOKEN = A[0], torch.ones(ROWS, 1)
CHANNEL = B[0], torch.ones(E, 264, 1)
INT32 = torch.zeros(ROWS, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": TOKEN}, ValueError, r"scales of blocks or neither, got \[6, 1\] and \[4, 3, 3\]"),
        ({"b": CHANNEL}, ValueError, r"neither, got \[6, 3\] and \[4, 264, 1\]"),
        ({"a": (A[0], A[1][:, :2])}, ValueError, r"a's scale must be .*\[6, 3\], got \[6, 2\]"),
        ({"b": (B[0], B[1][:, :2])}, ValueError, r"b's scale must be .*\[4, 3, 3\], got \[4, 2"),
        ({"a": (A[0], A[1].int())}, TypeError, "a's scale must be torch.float32, got torch.int32"),
        ({"b": (B[0], B[1].int())}, TypeError, "b's scale must be torch.float32, got torch.int32"),
        ({"recipe": (1, 1, 128)}, ValueError, r"1 rows and 128 columns .*\[4, 264, 3\] of"),
        ({"recipe": (1, 128, 64)}, ValueError, r"recipe must .*\[6, 5\] of .*got \[6, 3\]"),
        ({"recipe_a": (1, 32)}, ValueError, r"recipe_a must be as the scales are.*got \[6, 3\]"),
        ({"recipe_b": (1, 128)}, ValueError, r"recipe_b must be as the scales are.*\[4, 3, 3\]"),
        ({"use_psum_layout": True}, ValueError, r"m_indices must be \[4\], got \[6\]"),
        ({"grouped_layout": INT32[:4]}, ValueError, r"m_indices must be \[6\], got \[4\]"),
        ({"expected_m_for_psum_layout": 4}, ValueError, "None without use_psum_layout, got 4"),
        ({"epilogue": "relu"}, ValueError, "epilogue must be None, got 'relu'"),
        ({"alpha": None}, TypeError, "must be one of .*, got 'alpha'"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {"a": A, "b": B, "d": torch.zeros(ROWS, 264).bfloat16(), "grouped_layout": INT32}
    with pytest.raises(error, match=message):
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(**{**call, **change})


def test_int8_has_no_blocks() -> None:
    a, b = (A[0].to(torch.int8), A[1]), (B[0].to(torch.int8), B[1])
    with pytest.raises(TypeError, match="x must be float8 for scales that vary along K"):
        deep_gemm.m_grouped_gemm_nt_contiguous(a, b, torch.zeros(ROWS, 264).bfloat16(), INT32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": B}, r"a must be \[M, K\] and b \[N, K\], got \[6, 272\] and \[4, 264, 272\]"),
        ({"b": (B[0][0], CHANNEL[1][0])}, "scales of blocks or neither"),
        ({"c": torch.zeros(ROWS, 264)}, "c must be None .*, got Tensor"),
        ({"alpha": 2.0}, "alpha must be None, got 2.0"),
    ],
)
def test_dense_errors(change: dict[str, Any], message: str) -> None:
    call = {"a": A, "b": (B[0][0], B[1][0]), "d": torch.zeros(ROWS, 264).bfloat16()}
    with pytest.raises(ValueError, match=message):
        deep_gemm.fp8_gemm_nt(**{**call, **change})


# Scales


@pytest.mark.parametrize("use_ue8m0", [False, True])
@pytest.mark.parametrize(("rows", "k"), [(3, 256), (130, 272), (0, 128)])
def test_casts(rows: int, k: int, use_ue8m0: bool) -> None:
    x = randn(rows, k)
    for cast, height in (
        (deep_gemm.per_token_cast_to_fp8, 1),
        (deep_gemm.per_block_cast_to_fp8, 128),
    ):
        q, scale = cast(x, use_ue8m0)
        assert q.dtype == E4M3 and q.shape == x.shape and scale.dtype == torch.float32
        assert scale.shape == (-(-rows // height), -(-k // 128))
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                part = slice(height * i, height * (i + 1)), slice(128 * j, 128 * (j + 1))
                largest = float(x[part].abs().max())
                if use_ue8m0:
                    assert scale[i, j] / 2 * 448 < largest <= scale[i, j] * 448
                    assert scale[i, j].log2() == scale[i, j].log2().round()
                else:
                    torch.testing.assert_close(float(scale[i, j]) * 448, largest)
        # half of the last place of a value, or of the smallest that is normal
        error = (wide((q, scale), height) - x.double()).abs()
        step = wide((torch.ones(rows, k).to(E4M3), scale), height) * 2**-6
        assert (error <= x.double().abs().maximum(step) * 2**-4).all()


def test_casts_of_other_forms_are_refused() -> None:
    x = randn(4, 256)
    with pytest.raises(ValueError, match="gran_k must be 128, got 32"):
        deep_gemm.per_token_cast_to_fp8(x, True, 32)
    with pytest.raises(ValueError, match="gran_k must be 128, got 64"):
        deep_gemm.per_block_cast_to_fp8(x, gran_k=64)
    with pytest.raises(ValueError, match="use_packed_ue8m0 must be False .*, got True"):
        deep_gemm.per_token_cast_to_fp8(x, True, use_packed_ue8m0=True)
    with pytest.raises(ValueError, match=r"x must be \[N, K\], got \[1, 4, 256\]"):
        deep_gemm.per_block_cast_to_fp8(x[None])


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((5, 3), (1, 8)), ((8, 3), (1, 8)), ((2, 5, 3), (24, 1, 8)), ((1, 1), (1, 4))],
)
def test_mn_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    sf = torch.rand(shape)
    got = deep_gemm.get_mn_major_tma_aligned_tensor(sf)
    assert got.stride() == strides and torch.equal(got, sf)
    assert deep_gemm.get_col_major_tma_aligned_tensor(got) is got
    if sf.dim() == 2:
        assert deep_gemm.transform_sf_into_required_layout(
            sf, shape[0], 128 * shape[1] - 5, (1, 128)
        ).stride() == strides  # fmt: skip


def test_transform() -> None:
    sf = torch.rand(4, 3, 3)
    transform = deep_gemm.transform_sf_into_required_layout
    recipe = (1, 128, 128)
    assert transform(sf, 264, 272, recipe, 4, False, disable_ue8m0_cast=True) is sf
    assert transform(sf, 264, 272, [128, 128], 4) is sf
    assert transform(sf, 3, 272, recipe, 4, True).stride() == (12, 1, 4)
    for change, message in (
        ({"is_sfa": None}, r"is_sfa must be given .*\(1, 128, 128\)"),
        ({"mn": 256}, r"sf must be \[4, 2, 3\], got \[4, 3, 3\]"),
        ({"num_groups": None}, r"sf must be \[3, 3\], got"),
        ({"recipe": (1, 64, 128)}, "1 or 128 rows and 128 columns a scale, got 64 and 128"),
        ({"recipe": (128, 32)}, "got 128 and 32"),
    ):
        call: dict[str, Any] = {"mn": 264, "k": 272, "recipe": recipe, "num_groups": 4}
        with pytest.raises(ValueError, match=message):
            transform(sf, **{**call, "is_sfa": False, **change})
    with pytest.raises(TypeError, match="sf must be torch.float32, got torch.int32"):
        transform(sf.int(), 264, 272, recipe, 4, False)
    with pytest.raises(TypeError, match="sf must be torch.float32, got torch.float64"):
        deep_gemm.get_mn_major_tma_aligned_tensor(sf.double())
    with pytest.raises(ValueError, match=r"sf must be \[M, K / 128\] or .*, got \[3\]"):
        deep_gemm.get_mn_major_tma_aligned_tensor(sf[0, 0])


def test_alignments(alignment: Callable[[int], None]) -> None:
    assert deep_gemm.get_mk_alignment_for_contiguous_layout() == 128
    alignment(64)
    assert layouts.get_m_alignment_for_contiguous_layout() == 64
    assert deep_gemm.get_theoretical_mk_alignment_for_contiguous_layout(5) == 128
    assert deep_gemm.get_tma_aligned_size(5, 4) == 8 and deep_gemm.get_tma_aligned_size(5, 1) == 16
    with pytest.raises(ValueError, match="new_value must be a positive number, got 0"):
        alignment(0)
