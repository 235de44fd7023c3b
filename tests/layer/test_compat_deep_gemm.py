"""DeepGEMM's own names: what they take is what ours take. Blocks: test_compat_blocks.py."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from cutlass_moe.compat import deep_gemm
from cutlass_moe.ops.quantize import quantize_per_channel, quantize_per_token
from tests.support.numerics import same_bits

M, E, N, K = 6, 3, 24, 16
LAYOUT = torch.tensor([0, 0, 2, -1, 1, 1], dtype=torch.int32)
E4M3 = torch.float8_e4m3fn


def bf16(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def fp8(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A tensor and a scale [..., 1] a row."""
    flat, scale = quantize_per_token(bf16(*shape, seed=seed).view(-1, shape[-1]), E4M3)
    return flat.view(shape), scale.view(*shape[:-1], 1)


def weights(seed: int = 1) -> tuple[Tensor, Tensor]:
    values, scale = quantize_per_channel(bf16(E, N, K, seed=seed), E4M3)
    return values, scale[..., None]


def written(call: Any, *shape: int) -> Tensor:
    d = torch.full(shape, 7.0).bfloat16()
    assert call(d) is None
    return d


def test_bf16_contiguous() -> None:
    a, b = bf16(M, K), bf16(E, N, K, seed=1)
    want = written(lambda d: deep_gemm.m_grouped_gemm_nt_contiguous(a, b, d, LAYOUT), M, N)
    name = deep_gemm.m_grouped_bf16_gemm_nt_contiguous
    assert same_bits(written(lambda d: name(a, b, d, LAYOUT), M, N), want)
    options = {"compiled_dims": "mnk", "ensure_zero_padding": False}
    assert same_bits(written(lambda d: name(a, b, d, LAYOUT, **options), M, N), want)
    turned = b.transpose(1, 2)
    nn = deep_gemm.m_grouped_bf16_gemm_nn_contiguous
    for given in (turned, turned.contiguous()):
        got = written(lambda d, given=given: nn(a, given, d, LAYOUT), M, N)
        torch.testing.assert_close(got, want)
    assert (want[3] == 7).all()  # padding


def test_bf16_masked() -> None:
    a, b, counts = bf16(E, 4, K), bf16(E, N, K, seed=1), torch.tensor([4, 0, 2]).int()
    want = written(lambda d: deep_gemm.m_grouped_gemm_nt_masked(a, b, d, counts), E, 4, N)
    name = deep_gemm.m_grouped_bf16_gemm_nt_masked
    assert same_bits(written(lambda d: name(a, b, d, counts, 2), E, 4, N), want)
    assert deep_gemm.bf16_m_grouped_gemm_nt_masked is name


@pytest.mark.parametrize("recipes", [{}, {"recipe": (1, 1, K)}, {"recipe_a": (1, K)}])
def test_fp8_contiguous(recipes: dict[str, Any]) -> None:
    a, b = fp8(M, K), weights()
    want = written(lambda d: deep_gemm.m_grouped_gemm_nt_contiguous(a, b, d, LAYOUT), M, N)
    name = deep_gemm.m_grouped_fp8_gemm_nt_contiguous
    got = written(lambda d: name(a, b, d, LAYOUT, **recipes, disable_ue8m0_cast=True), M, N)
    assert same_bits(got, want)
    turned = b[0].transpose(1, 2), b[1].transpose(1, 2)
    nn = deep_gemm.m_grouped_fp8_gemm_nn_contiguous
    assert same_bits(written(lambda d: nn(a, turned, d, LAYOUT, **recipes), M, N), want)


def test_fp8_masked() -> None:
    a, b, counts = fp8(E, 4, K), weights(), torch.tensor([4, 0, 2]).int()
    want = written(lambda d: deep_gemm.m_grouped_gemm_nt_masked(a, b, d, counts), E, 4, N)
    name = deep_gemm.m_grouped_fp8_gemm_nt_masked
    got = written(lambda d: name(a, b, d, counts, 2, recipe=(1, 1, K)), E, 4, N)
    assert same_bits(got, want)
    assert deep_gemm.fp8_m_grouped_gemm_nt_masked is name


CHANNEL = torch.zeros(E, 256, 256, dtype=E4M3), torch.ones(E, 256, 1)
TOKEN = torch.zeros(M, 256, dtype=E4M3), torch.ones(M, 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"recipe": (1, 128, 128)}, ValueError, r"recipe must be as the scales are.*got \[6, 1\]"),
        ({"recipe_a": (1, 128)}, ValueError, r"recipe_a must be .*\[6, 2\] of .*got \[6, 1\]"),
        ({"recipe_b": (128, 256)}, ValueError, r"recipe_b must be .*got \[3, 256, 1\]"),
        ({"a": (TOKEN[0].to(torch.int8), TOKEN[1])}, TypeError, "a must be of .*got torch.int8"),
        ({"b": (CHANNEL[0].to(torch.int8), CHANNEL[1])}, TypeError, "b must be of .*torch.int8"),
        ({"a": TOKEN[0]}, TypeError, "a must be a pair of an fp8 tensor and its scale, got Tensor"),
        ({"compile_dims": "nk"}, TypeError, "must be one of .*, got 'compile_dims'"),
    ],
)
def test_what_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {"a": TOKEN, "b": CHANNEL, "d": torch.zeros(M, 256).bfloat16()}
    with pytest.raises(error, match=message):
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(**{**call, "grouped_layout": LAYOUT, **change})


def test_masked_products_have_no_psum_layout() -> None:
    a, counts = torch.zeros(E, M, 256).bfloat16(), torch.ones(E, dtype=torch.int32)
    pair = a.to(E4M3), torch.ones(E, M, 1)
    d = torch.zeros(E, M, 256).bfloat16()
    with pytest.raises(TypeError, match="must be one of .*, got 'use_psum_layout'"):
        deep_gemm.m_grouped_fp8_gemm_nt_masked(pair, CHANNEL, d, counts, 1, use_psum_layout=True)
    with pytest.raises(ValueError, match="epilogue must be None, got 1"):
        deep_gemm.m_grouped_bf16_gemm_nt_masked(a, a, d, counts, 1, epilogue=1)


@pytest.mark.parametrize("operand", ["a", "b"])
def test_bf16_names_take_bf16_alone(operand: str) -> None:
    call: dict[str, Any] = {"a": bf16(M, K), "b": bf16(E, N, K), "d": bf16(M, N)}
    for wrong in (call[operand].half(), fp8(M, K)):
        with pytest.raises(TypeError, match=f"{operand} must be a torch.bfloat16 tensor, got"):
            deep_gemm.m_grouped_bf16_gemm_nt_contiguous(
                **{**call, operand: wrong}, grouped_layout=LAYOUT
            )


PLACES = {  # of DeepGEMM 2.6 and 2.8.1: the first of its arguments, in its order
    "m_grouped_fp8_gemm_nt_contiguous": "a b d grouped_layout recipe recipe_a recipe_b",
    "m_grouped_fp8_gemm_nn_contiguous": "a b d grouped_layout recipe recipe_a recipe_b",
    "m_grouped_fp8_gemm_nt_masked": "a b d masked_m expected_m recipe recipe_a recipe_b",
    "m_grouped_bf16_gemm_nt_contiguous": "a b d grouped_layout",
    "m_grouped_bf16_gemm_nn_contiguous": "a b d grouped_layout",
    "m_grouped_bf16_gemm_nt_masked": "a b d masked_m expected_m compiled_dims epilogue",
    "fp8_gemm_nt": "a b d c recipe recipe_a recipe_b",
    "per_token_cast_to_fp8": "x use_ue8m0 gran_k use_packed_ue8m0",
    "per_block_cast_to_fp8": "x use_ue8m0 gran_k",
    "get_mn_major_tma_aligned_tensor": "sf",
    "set_mk_alignment_for_contiguous_layout": "new_value",
    "get_theoretical_mk_alignment_for_contiguous_layout": "expected_m",
    "transform_sf_into_required_layout": (
        "sf mn k recipe num_groups is_sfa disable_ue8m0_cast psum_layout"
    ),
}


def test_arguments_have_deep_gemms_places() -> None:
    for name, places in PLACES.items():
        parameters = inspect.signature(getattr(deep_gemm, name)).parameters.values()
        assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == places.split()
    assert deep_gemm.get_m_alignment_for_contiguous_layout() == 128
