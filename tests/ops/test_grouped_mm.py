"""grouped_mm against its definition and against torch's function of that name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import cutlass_moe as cm

E, M, K, N = 3, 12, 16, 24
ENDS = {"ragged": [5, 5, 12], "spare_rows": [0, 3, 8], "one_hot": [0, 12, 12], "no_rows": [0, 0, 0]}
torch_grouped_mm = getattr(functional, "grouped_mm", None)
needs_torchs = pytest.mark.skipif(torch_grouped_mm is None, reason="needs functional.grouped_mm")
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
layouts = pytest.mark.parametrize("k_dense", [True, False], ids=["k_dense", "n_dense"])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def ends(name: str) -> Tensor:
    return torch.tensor(ENDS[name], dtype=torch.int32)


def operands(k_dense: bool, rows: int = M, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """mat_a, and a leaf of which mat_b is a view: [E, N, K] if K is dense, else [E, K, N]."""
    weight = randn(E, N, K, seed=1, dtype=dtype) if k_dense else randn(E, K, N, dtype=dtype)
    return randn(rows, K, dtype=dtype).requires_grad_(), weight.requires_grad_()


@dtypes
@layouts
@pytest.mark.parametrize("name", ENDS)
def test_products_and_gradients(name: str, k_dense: bool, dtype: torch.dtype) -> None:
    offs, used = ends(name), ENDS[name][-1]
    a, weight = operands(k_dense, dtype=dtype)
    grad = randn(M, N, seed=2, dtype=dtype)

    def run(function: Any) -> list[Tensor]:
        out = function(a, weight.transpose(1, 2) if k_dense else weight, offs)
        of_a, of_weight = torch.autograd.grad(out, (a, weight), grad)
        if function is cm.grouped_mm:
            assert of_weight.stride() == weight.stride()
        assert not of_a[used:].any()
        return [out[:used], of_a, of_weight]

    for mine, right in zip(run(cm.grouped_mm), run(cm.grouped_mm_reference), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-2, atol=1e-3)


@needs_torchs
@layouts
def test_as_torch_does(k_dense: bool) -> None:
    a, weight = operands(k_dense)
    b = weight.transpose(1, 2) if k_dense else weight
    want = torch_grouped_mm(a, b, offs=ends("ragged"))
    got = cm.grouped_mm(a, b, offs=ends("ragged"))
    assert got.shape == want.shape and got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@needs_torchs
@pytest.mark.parametrize(
    ("a", "b", "offs"),
    [
        (randn(M, K).float(), randn(K, N).float(), torch.tensor([3, 3, K], dtype=torch.int32)),
        (randn(E, M, K), randn(K, N), torch.tensor([8, 8, N], dtype=torch.int32)),
        (randn(E, M, K), randn(E, K, N), None),
        (randn(M, K).float(), randn(E, K, N).float(), ends("ragged")),
    ],
    ids=["2d_2d", "3d_2d", "3d_3d", "float32"],
)
def test_other_forms_are_torchs(a: Tensor, b: Tensor, offs: Tensor | None) -> None:
    out = cm.grouped_mm(a, b, offs)
    want = cm.grouped_mm_reference(a, b, offs)
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)


def test_other_forms_need_a_torch_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(functional, "grouped_mm", raising=False)
    monkeypatch.delattr(torch, "_grouped_mm", raising=False)
    with pytest.raises(RuntimeError, match="torch must have torch._grouped_mm"):
        cm.grouped_mm(randn(E, M, K), randn(E, K, N))


@dtypes
@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("name", ENDS)
def test_sums_over_rows_and_gradients(
    name: str, transposed: bool, out_dtype: torch.dtype | None, dtype: torch.dtype
) -> None:
    """Of rows [M, K] and [M, N], the first transposed; what offs leaves out has no gradient."""
    offs = ends(name)
    count = M + 4  # a multiple of 8, as torch wants strides
    rows, b = randn(count, K, dtype=dtype), randn(count, N, seed=1, dtype=dtype).requires_grad_()
    a = (rows.T if transposed else rows.T.contiguous()).requires_grad_()
    grad = randn(E, K, N, seed=2, dtype=dtype).to(out_dtype or dtype)

    def run(function: Any) -> list[Tensor]:
        out = function(a, b, offs, out_dtype=out_dtype)
        return [out, *torch.autograd.grad(out, (a, b), grad)]

    mine = run(cm.grouped_mm)
    for got, want in zip(mine, run(cm.grouped_mm_reference), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
    assert not mine[1][:, ENDS[name][-1] :].any() and not mine[2][ENDS[name][-1] :].any()


@pytest.mark.parametrize("rows", [0, M])
def test_compiled(rows: int) -> None:
    a, weight = operands(True, rows)
    offs = ends("ragged") * (rows > 0)

    def step(a: Tensor, weight: Tensor) -> Tensor:
        return cm.grouped_mm(a, weight.transpose(1, 2), offs).float().square().sum()

    want = torch.autograd.grad(step(a, weight), (a, weight))
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for mine, right in zip(
        torch.autograd.grad(compiled(a, weight), (a, weight)), want, strict=True
    ):
        assert torch.equal(mine, right)


def test_gradient_of_an_expanded_gradient_and_of_a_gradient() -> None:
    a, weight = operands(True)
    out = cm.grouped_mm(a, weight.transpose(1, 2), ends("ragged"), out_dtype=torch.float32)
    assert out.dtype == torch.float32
    (of_a,) = torch.autograd.grad(out.sum(), a, create_graph=True)
    assert of_a.dtype == a.dtype
    (second,) = torch.autograd.grad(of_a.sum(), weight)
    rows = torch.tensor([5.0, 0.0, 7.0])
    assert torch.equal(second.float(), rows[:, None, None].expand(E, N, K))
    sums = cm.grouped_mm(a.T, randn(M, N, seed=3).requires_grad_(), ends("ragged"))
    (of_a,) = torch.autograd.grad(sums.float().square().sum(), a, create_graph=True)
    assert torch.autograd.grad(of_a.float().sum(), a)[0].isfinite().all()


A, B = randn(M, K), randn(E, N, K).transpose(1, 2)
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no_offs": ({"offs": None}, ValueError, "offs must be given where mat_a is"),
    "int64": ({"offs": ends("ragged").long()}, TypeError, "offs must be torch.int32, got torch.in"),
    "experts": ({"offs": ends("ragged")[:2]}, ValueError, r"offs must be \[3\], one end per exper"),
    "sum": ({"mat_b": B[0].T, "mat_a": A}, ValueError, r"mat_b \[K, N\], got \[12, 16\] and"),
    "k": ({"mat_a": randn(M, 8)}, ValueError, r"got \[12, 8\] and \[3, 16, 24\]"),
    "dtype": ({"mat_b": B.half()}, TypeError, "mat_b must be torch.bfloat16 like mat_a, got"),
    "bias": ({"bias": randn(E, N)}, ValueError, "bias must be None, as in torch's function"),
    "out": ({"out_dtype": torch.float64}, TypeError, "out_dtype must be one of torch.bf"),
    "pitch": ({"mat_b": randn(E, K, 28)[..., :N]}, ValueError, "mat_b must have one of its last"),
    "dense": ({"mat_a": randn(M, 2 * K)[:, ::2]}, ValueError, r"got strides \(32, 2\)"),
    "type": ({"mat_a": [1.0]}, TypeError, "mat_a must be a tensor, got a list"),
}


@pytest.mark.parametrize(("changed", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cm.grouped_mm(**{"mat_a": A, "mat_b": B, "offs": ends("ragged"), **changed})
