"""grouped_gemm's permute, unpermute, sinkhorn and backend: against definitions written as loops."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cutlass_moe.compat
from cutlass_moe.compat.grouped_gemm import backend, ops
from tests.support.compat_operands import FORMS
from tests.support.numerics import same_bits

H = 8


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def definition(indices: list[list[int]], kept: int) -> tuple[list[int], list[list[int]]]:
    """Which token each row is of, and the row of each token's choices, -1 for none."""
    pairs = sorted(
        ((expert, t, k) for t, experts in enumerate(indices) for k, expert in enumerate(experts)),
        key=lambda pair: pair[0],
    )
    tokens = [t for _, t, _ in pairs[:kept]]
    rows = [[-1] * len(experts) for experts in indices]
    for row, (_, t, k) in enumerate(pairs[:kept]):
        rows[t][k] = row
    return tokens, rows


CASES = {  # indices, rows to keep: 0 is all
    "one_token": ([[3]], 0),
    "top_1": ([[2], [0], [2], [1]], 0),
    "top_2": ([[1, 2], [0, 1], [0, 2], [1, 2]], 0),
    "twice_the_same": ([[1, 1], [0, 1]], 0),
    "one_hot": ([[5, 5, 5]] * 3, 0),
    "dropped": ([[1, 2], [0, 1], [0, 2]], 4),
    "all_but_one_dropped": ([[1, 2], [0, 1]], 1),
    "more_than_there_are": ([[1, 0]], 9),
    "negative_ids_first": ([[1, -1], [-1, 0]], 0),
}


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize(("indices", "kept"), CASES.values(), ids=CASES)
def test_permute(indices: list[list[int]], kept: int, ids: torch.dtype) -> None:
    check_rows(indices, kept, ids)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 9), st.randoms())
def test_permute_of_anything(tokens: int, top_k: int, kept: int, rng: Any) -> None:
    indices = [[rng.randrange(4) for _ in range(top_k)] for _ in range(tokens)]
    check_rows(indices, kept, torch.int32)


def check_rows(indices: list[list[int]], kept: int, ids: torch.dtype) -> None:
    tokens, top_k = len(indices), len(indices[0])
    x = random(tokens, H)
    of_row, rows = definition(indices, kept or tokens * top_k)
    permuted, row_id_map = ops.permute(x, torch.tensor(indices, dtype=ids), kept)
    assert same_bits(permuted, x[of_row])
    assert row_id_map.dtype == torch.int32
    assert row_id_map.view(top_k, tokens).T.tolist() == rows
    probs = random(tokens, top_k, seed=1)
    want = torch.zeros(tokens, H)
    for t, choices in enumerate(rows):
        for k, row in enumerate(choices):
            want[t] += probs[t, k] * permuted[row] if row >= 0 else 0
    torch.testing.assert_close(ops.unpermute(permuted, row_id_map, probs), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_there_and_back(dtype: torch.dtype) -> None:
    x = random(5, H).to(dtype)
    permuted, row_id_map = ops.permute(x, torch.tensor([2, 0, 1, 0, 2]))
    assert permuted.dtype == dtype
    assert same_bits(ops.unpermute(permuted, row_id_map), x)


def test_permute_of_fp8() -> None:
    x = random(3, H).to(torch.float8_e4m3fn)
    permuted, _ = ops.permute(x, torch.tensor([[1, 0], [0, 2], [2, 1]]))
    assert same_bits(permuted.view(torch.uint8), x.view(torch.uint8)[[0, 1, 0, 2, 1, 2]])


@pytest.mark.parametrize("kept", [0, 4])
def test_gradients(kept: int) -> None:
    indices = torch.tensor([[1, 2], [0, 1], [0, 2]])
    x = random(3, H).double().requires_grad_()
    probs = random(3, 2, seed=1).double().requires_grad_()
    weights = random(H, seed=2).double()

    def loss(x: Tensor, probs: Tensor) -> Tensor:
        rows, row_id_map = ops.permute(x, indices, kept)
        return ops.unpermute(rows * weights, row_id_map, probs).square().sum()

    found = torch.autograd.grad(loss(x, probs), (x, probs))
    of_row, choices = definition(indices.tolist(), kept or 6)
    rows = x[of_row] * weights
    zero = torch.zeros(H, dtype=torch.float64)
    tokens = [
        sum((probs[t, k] * rows[r] for k, r in enumerate(choice) if r >= 0), zero)
        for t, choice in enumerate(choices)
    ]
    want = torch.autograd.grad(torch.stack(tokens).square().sum(), (x, probs))
    for mine, right in zip(found, want, strict=True):
        assert mine.dtype == right.dtype
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


def test_gradient_without_probs() -> None:
    x = random(4, H).requires_grad_()
    rows, row_id_map = ops.permute(x, torch.tensor([1, 0, 1, 0]))
    ops.unpermute(rows * 2, row_id_map).sum().backward()
    assert torch.equal(x.grad, torch.full((4, H), 2.0))


def test_nothing_comes_back_as_it_is() -> None:
    empty = torch.empty(0, H)
    rows, row_id_map = ops.permute(empty, torch.empty(0, 2, dtype=torch.int32))
    assert rows is empty and row_id_map is None
    assert ops.unpermute(empty, torch.empty(0, dtype=torch.int32)) is empty


def test_backend_keeps_the_workspace() -> None:
    workspace = [torch.zeros(3)]
    *_, returned = backend.permute(random(2, H), torch.tensor([[0], [1]]), 0, workspace, 64)
    assert returned is workspace


IDS = torch.zeros(3, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.permute(random(2, H), IDS), ValueError, r"got \[2, 8\] and \[3, 2\]"),
        (lambda: ops.permute(random(3, H), IDS.float()), TypeError, "got torch.float32"),
        (lambda: ops.unpermute(random(6, H), IDS.view(-1)[:5]), ValueError, "got 5 for 6 rows"),
        (lambda: ops.unpermute(random(4, H), IDS.view(-1)), ValueError, "got 6 for 4 rows"),
        (
            lambda: ops.unpermute(random(6, H), IDS.view(-1), random(2, 2)),
            ValueError,
            r"row_id_map must be \[4\], k \* T of 2 and 2, got \[6\]",
        ),
        (
            lambda: ops.unpermute(random(6, H), random(6), random(3, 2)),
            TypeError,
            "row_id_map must be torch.int32, got torch.float32",
        ),
        (
            lambda: backend.unpermute(random(6, H), IDS.view(-1), random(2, 3), 3, 2),
            ValueError,
            r"prob must be \[3, 2\], got \[2, 3\]",
        ),
    ],
)
def test_errors_of_rows(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# Sinkhorn


@pytest.mark.parametrize(("tokens", "experts"), [(1, 1), (16, 4), (64, 8)])
def test_sinkhorn(tokens: int, experts: int) -> None:
    cost = random(tokens, experts)
    before = cost.clone()
    out = ops.sinkhorn(cost, 1e-7)
    assert out is cost  # as the package writes to it
    wide = out.double()
    ones = torch.ones(tokens, dtype=torch.float64)
    torch.testing.assert_close(wide.sum(1), ones / tokens, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(wide.sum(0), ones[:experts] / experts, rtol=1e-3, atol=1e-6)
    factors = out.log() - before  # of rows and columns: of rank one
    odd = factors - factors[:1] - factors[:, :1] + factors[:1, :1]
    assert odd.abs().max() < 1e-3


def test_sinkhorn_stops_by_its_tolerance() -> None:
    """By hand: one turn of each factor for a tolerance that everything is within."""
    cost = random(6, 3)
    want = cost.double().exp()
    rows = 1 / (want.sum(1) * 6)
    columns = 1 / (rows @ want * 3)
    want = want * rows[:, None] * columns
    torch.testing.assert_close(backend.sinkhorn(cost, 1e9).double(), want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("cost", [random(4, 2).double(), random(4), random(2, 4).T])
def test_sinkhorn_errors(cost: Tensor) -> None:
    with pytest.raises(ValueError, match=r"cost must be a contiguous torch.float32 \[T, E\]"):
        ops.sinkhorn_kernel(cost)


# The backend's gmm, and names


@pytest.mark.parametrize("form", FORMS)
def test_gmm_into_c(form: str) -> None:
    trans_a, trans_b = FORMS[form]
    sizes = torch.tensor([2, 0, 3])
    a = random(5, 16).bfloat16()
    shape = (5, 24) if trans_a else (3, 24, 16) if trans_b else (3, 16, 24)
    b = random(*shape, seed=1).bfloat16()
    want = backend.gmm(a, b, sizes, trans_a, trans_b)
    c = torch.full_like(want, 7)
    assert backend.gmm(a, b, sizes, trans_a, trans_b, c) is c
    assert same_bits(c, want)
    for wrong in (c.float(), c[:-1], torch.stack([c, c], -1)[..., 0]):
        with pytest.raises(ValueError, match="c must be a contiguous torch.bfloat16"):
            backend.gmm(a, b, sizes, trans_a, trans_b, wrong)


SIGNATURES = {  # of nv-grouped-gemm 1.1.4: what can be given by place, in its order
    ops.gmm: ["a", "b", "batch_sizes", "trans_b"],
    ops.permute: ["input_act", "indices", "num_out_tokens", "max_token_num"],
    ops.unpermute: ["input_act", "row_id_map", "probs"],
    ops.sinkhorn_kernel: ["cost", "tol"],
    backend.gmm: ["a", "b", "batch_sizes", "trans_a", "trans_b", "c"],
    backend.permute: ["input", "indices", "num_out_tokens", "workspace", "max_expanded_token_num"],
    backend.unpermute: ["input", "row_id_map", "prob", "max_tokens", "num_topK"],
    backend.unpermute_bwd: ["input_bwd", "input_fwd", "row_id_map", "prob"],
    backend.sinkhorn: ["cost", "tol"],
}


def test_arguments_have_the_packages_places() -> None:
    for function, names in SIGNATURES.items():
        parameters = inspect.signature(function).parameters.values()
        places = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert places == names, function


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """No module of the packages' names, before and after."""
    parts = {
        "grouped_gemm": ["ops", "backend"],
        "deep_gemm": ["utils", "utils.layout", "utils.math"],
    }
    names = [f"{name}.{part}" for name in parts for part in parts[name]]
    for name in (*parts, *names):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)


def test_install_answers_to_import(forgotten: None) -> None:
    for _ in range(2):
        cutlass_moe.compat.install("grouped_gemm")
        cutlass_moe.compat.install("deep_gemm")
    import deep_gemm  # type: ignore[import-not-found]
    import grouped_gemm  # type: ignore[import-not-found]
    import grouped_gemm.backend as theirs  # type: ignore[import-not-found]
    from deep_gemm.utils import per_token_cast_to_fp8  # type: ignore[import-not-found]
    from deep_gemm.utils.layout import (  # type: ignore[import-not-found]
        get_mn_major_tma_aligned_tensor,
    )
    from grouped_gemm.ops import permute  # type: ignore[import-not-found]

    assert grouped_gemm.ops is ops and theirs is backend and permute is ops.permute
    assert deep_gemm.m_grouped_fp8_gemm_nt_contiguous
    assert deep_gemm.per_token_cast_to_fp8 is per_token_cast_to_fp8
    assert deep_gemm.get_mn_major_tma_aligned_tensor is get_mn_major_tma_aligned_tensor


def test_install_hides_a_package_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "grouped_gemm").mkdir()
    (tmp_path / "grouped_gemm" / "__init__.py").write_text("ops = 'theirs'")
    program = """
import sys
import cutlass_moe.compat
import grouped_gemm
try:
    cutlass_moe.compat.install("grouped_gemm")
except RuntimeError as error:
    print(error)
del sys.modules["grouped_gemm"]
cutlass_moe.compat.install("grouped_gemm")
import grouped_gemm.ops
print(grouped_gemm.__name__)
"""
    path = os.pathsep.join([str(tmp_path), str(Path(cutlass_moe.__path__[0]).parent)])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    late, early = ended.stdout.strip().split("\n")
    assert "must come before the first import of grouped_gemm" in late
    assert early == "cutlass_moe.compat.grouped_gemm", ended.stderr


def test_install_of_another_name() -> None:
    with pytest.raises(ValueError, match="one of grouped_gemm, deep_gemm, got 'cutlass'"):
        cutlass_moe.compat.install("cutlass")
