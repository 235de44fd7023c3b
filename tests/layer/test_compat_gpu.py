"""grouped_gemm's rows on a GPU: what the CPU makes of them, without a wait for the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cutlass_moe.compat.grouped_gemm import backend, ops
from tests.layer.test_nn_gpu import SIZES, D, H, no_wait, randn
from tests.support.compat_operands import FORMS
from tests.support.numerics import same_bits

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
