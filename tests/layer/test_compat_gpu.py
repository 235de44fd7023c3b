"""grouped_gemm's rows and DeepGEMM's fp8 products on a GPU, without a wait for the device.

Rows: against what the CPU makes of them. Products with scales of blocks: against float64.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe.choose.heuristics_sm90 import candidates
from cutlass_moe.compat import deep_gemm
from cutlass_moe.compat.grouped_gemm import backend, ops
from emitters.spec.gemm import GemmProblem
from emitters.spec.registry import GemmConfig
from tests.layer.test_compat_blocks import blocks_of_a, blocks_of_b, wide
from tests.layer.test_nn_gpu import SIZES, D, H, no_wait, no_warning, randn
from tests.support.compat_operands import FORMS
from tests.support.numerics import errors, poisoned, same_bits, untouched

pytestmark = pytest.mark.gpu


def there_and_back(x: Tensor, indices: Tensor, probs: Tensor, kept: int) -> list[Tensor]:
    """Rows, their map, tokens, and gradients of x and probs."""
    x, probs = x.clone().requires_grad_(), probs.clone().requires_grad_()
    rows, row_id_map = ops.permute(x, indices, kept)
    out = ops.unpermute(rows, row_id_map, probs)
    grads = torch.autograd.grad(out, (x, probs), torch.ones_like(out))
    return [rows.detach(), row_id_map, out.detach(), *grads]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kept", [0, 700])
def test_rows(dtype: torch.dtype, kept: int) -> None:
    x = torch.randn(300, 192).to(dtype)
    indices = torch.randint(16, (300, 4), dtype=torch.int32)
    probs = torch.rand(300, 4)
    want = there_and_back(x, indices, probs, kept)
    operands = [tensor.cuda() for tensor in (x, indices, probs)]
    there_and_back(*operands, kept)
    with no_wait():
        got = there_and_back(*operands, kept)
    for mine, right in zip(got, want, strict=True):
        torch.testing.assert_close(mine.cpu(), right, rtol=1e-2, atol=1e-3)
    assert same_bits(got[0].cpu(), want[0]) and torch.equal(got[1].cpu(), want[1])


def test_sinkhorn() -> None:
    cost = torch.randn(512, 16)
    on_gpu = cost.cuda()
    assert ops.sinkhorn(on_gpu) is on_gpu
    torch.testing.assert_close(on_gpu.cpu(), ops.sinkhorn(cost), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_gmm_into_c(form: str) -> None:
    trans_a, trans_b = FORMS[form]
    sizes = torch.tensor(SIZES["ragged"], device="cuda")
    rows = sum(SIZES["ragged"])
    a = randn(rows, D)
    b = randn(*((rows, H) if trans_a else (4, H, D) if trans_b else (4, D, H)), seed=1)
    want = backend.gmm(a, b, sizes, trans_a, trans_b)
    c = torch.full_like(want, 7)
    assert backend.gmm(a, b, sizes, trans_a, trans_b, c) is c
    assert same_bits(c, want)


# DeepGEMM's products with scales of blocks

E, N, K, MOST = 4, 264, 400, 136
LIMIT = 2e-3  # of the whole; rounding to bfloat16 alone makes 1.66e-3
Pair = tuple[Tensor, Tensor]
MN_MAJOR = {"k_major": lambda scale: scale, "mn_major": deep_gemm.get_mn_major_tma_aligned_tensor}


def images() -> set[tuple[GemmProblem, GemmConfig]]:
    """Every (problem, config) that the tests from here on may run."""
    problems = set()
    for experts in (E, 1):
        (x, per_token_scale), (weight, scale) = _operands(1, experts, "cpu")
        offsets = torch.zeros(experts, dtype=torch.int32)
        scales = {"per_token_scale": per_token_scale, "scale": scale}
        problems.add(cm.grouped_matmul_problem(x, weight, offsets=offsets, **scales))
    return {(problem, config) for problem in problems for config in candidates(problem)}


@pytest.fixture
def _strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """No reference in a kernel's place."""
    monkeypatch.setenv("CUTLASS_MOE_STRICT", "1")


def _operands(rows: int, experts: int = E, device: str = "cuda") -> tuple[Pair, Pair]:
    """Quantised on the CPU, so that no other kernel is needed."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, K, generator=generator).bfloat16()
    w = torch.randn(experts, N, K, generator=generator).bfloat16()
    a, b = blocks_of_a(x), blocks_of_b(w)
    return (a[0].to(device), a[1].to(device)), (b[0].to(device), b[1].to(device))


def _check(d: Tensor, a: Pair, b: Pair, owner: list[int]) -> None:
    """Row r of d, from `poisoned`, is of expert owner[r], and unwritten if that is -1."""
    of_row = torch.tensor(owner, device="cuda")
    assert untouched(d, of_row < 0)
    inside = of_row >= 0
    if inside.any():
        weight = wide(b, 128)[of_row[inside]]
        want = torch.einsum("mk,mnk->mn", wide(a, 1)[inside], weight)
        assert errors(d[inside], want).whole <= LIMIT


def _twice(call: Callable[[], None]) -> None:
    """Once to load the kernel, and once without a wait."""
    with no_warning():
        call()
        with no_wait():
            call()


@pytest.mark.usefixtures("_strict")
@pytest.mark.parametrize("layout", MN_MAJOR)
@pytest.mark.parametrize("padding", [1, 128])
@pytest.mark.parametrize("sizes", [[70, 0, 1, 130], [0] * 4, [3, 5, 0, 7]], ids=str)
def test_blocks_contiguous(sizes: list[int], padding: int, layout: str) -> None:
    owner = sum(([e] * sizes[e] + [-1] * (-sizes[e] % padding) for e in (2, 0, 3, 1)), [-1] * 3)
    (x, scale), b = _operands(len(owner))
    d = poisoned(len(owner), N, torch.bfloat16, "cuda")
    m_indices = torch.tensor(owner, dtype=torch.int32, device="cuda")
    a = x, MN_MAJOR[layout](scale)
    _twice(lambda: deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, m_indices))
    _check(d, a, b, owner)


@pytest.mark.usefixtures("_strict")
@pytest.mark.parametrize("layout", MN_MAJOR)
@pytest.mark.parametrize("masked", [[70, 0, 1, 130], [0] * 4, [-3, 500, 130, 2]], ids=str)
def test_blocks_masked(masked: list[int], layout: str) -> None:
    (x, scale), b = _operands(E * MOST)
    d = poisoned(E * MOST, N, torch.bfloat16, "cuda")
    a = x.view(E, MOST, K), MN_MAJOR[layout](scale.view(E, MOST, -1))
    masked_m = torch.tensor(masked, dtype=torch.int32, device="cuda")
    out = d.view(E, MOST, N)
    _twice(lambda: deep_gemm.m_grouped_fp8_gemm_nt_masked(a, b, out, masked_m, 64))
    owner = [e if r < masked[e] else -1 for e in range(E) for r in range(MOST)]
    _check(d, (x, scale), b, owner)


@pytest.mark.usefixtures("_strict")
def test_blocks_in_psum_layout_in_a_graph() -> None:
    rows = 700
    a, b = _operands(rows)
    d = poisoned(rows, N, torch.bfloat16, "cuda")
    ends = torch.zeros(E, dtype=torch.int32, device="cuda")

    def call() -> None:
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
            a, b, d, ends, use_psum_layout=True, expected_m_for_psum_layout=100
        )

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for sizes in ([70, 0, 129, 200], [0, 1, 0, 128]):
        owner, start = [-1] * rows, 0
        new = []
        for e, size in enumerate(sizes):
            owner[start : start + size] = [e] * size
            new.append(start + size)
            start += -(-size // 128) * 128
        ends.copy_(torch.tensor(new))
        d.copy_(poisoned(rows, N, torch.bfloat16, "cuda"))
        graph.replay()
        _check(d, a, b, owner)


@pytest.mark.usefixtures("_strict")
@pytest.mark.parametrize("rows", [1, 300])
def test_blocks_dense(rows: int) -> None:
    a, b = _operands(rows, 1)
    d = poisoned(rows, N, torch.bfloat16, "cuda")
    _twice(lambda: deep_gemm.fp8_gemm_nt(a, (b[0][0], b[1][0]), d))
    _check(d, a, b, [0] * rows)
