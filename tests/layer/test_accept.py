"""fused_moe takes what engines hand over: other dtypes, shapes, strides, and more ways to ask."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

import cutlass_moe as cm
from cutlass_moe.layer.accept import _per_channel, _per_token, aligned
from cutlass_moe.operands import LayerOperands
from cutlass_moe.ops.quantize import quantize_static
from cutlass_moe.runtime.fallback import announce_copy
from tests.support.layer_cases import SMALL, tokens, weights
from tests.support.layer_forms import FORMS


def arguments(count: int = 6, quant: str | None = None, **others: Any) -> dict[str, Any]:
    return {**tokens(SMALL, count, "cpu"), **weights(SMALL, quant, "cpu"), "quant": quant, **others}


@pytest.mark.parametrize("name", FORMS)
def test_forms_mean_the_same(name: str) -> None:
    form = FORMS[name]
    plain, given = form.make(arguments(quant=form.quant))
    want, got = cm.fused_moe(**plain), cm.fused_moe(**given)
    assert got.dtype == want.dtype
    assert torch.equal(got.view(want.shape), want)
    assert got.shape == (given["hidden"].shape[:-1] + want.shape[-1:])


@pytest.mark.parametrize("name", ["bf16_weights", "batched_hidden", "scale_e_n_1"])
def test_forms_compile_to_one_graph(name: str) -> None:
    form = FORMS[name]
    plain, given = form.make(arguments(quant=form.quant))
    torch._dynamo.reset()
    compiled = torch.compile(cm.fused_moe, fullgraph=True, backend="aot_eager")
    want = cm.fused_moe(**plain)
    assert torch.equal(compiled(**given).view(want.shape), want)


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.warns])
def test_what_kernels_cannot_read_is_copied_with_one_warning(name: str) -> None:
    _, given = FORMS[name].make(arguments(quant=FORMS[name].quant))
    layer = LayerOperands(**{field: given.get(field) for field in LayerOperands._fields})
    announce_copy.cache_clear()
    with pytest.warns(UserWarning, match="so every call copies it"):
        copied = aligned(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        aligned(layer)
    for before, after in zip(layer, copied, strict=True):
        assert before is None or torch.equal(before, after)


def test_rows_that_are_not_summed() -> None:
    given = arguments()
    given["topk_ids"][0, 0] = -1
    weighted = cm.fused_moe(**given, reduce="weighted")
    plain = cm.fused_moe(**given, reduce="none")
    assert weighted.shape == plain.shape == (6, SMALL.shape.top_k, SMALL.shape.hidden)
    assert not plain[0, 0].any()
    want = plain.float() * given["topk_weights"][..., None]
    torch.testing.assert_close(weighted.float(), want, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(
        weighted.float().sum(1), cm.fused_moe(**given).float(), rtol=2e-2, atol=2e-2
    )
    out = torch.empty_like(weighted)
    assert cm.fused_moe(**given, reduce="weighted", out=out) is out
    assert torch.equal(out, weighted)
    batch = {
        name: given[name].unflatten(0, (2, 3)) for name in ("hidden", "topk_weights", "topk_ids")
    }
    apart = cm.fused_moe(**given | batch, reduce="none")
    assert torch.equal(apart, plain.unflatten(0, (2, 3)))


@pytest.mark.parametrize("activation", ["swiglu", "reglu"])
def test_interleaved_weights_with_n_dense(activation: str) -> None:
    given = arguments() | {"activation": activation, "interleaved": True}
    turned = {
        name: given[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("w13", "w2")
    }
    assert torch.equal(cm.fused_moe(**given | turned), cm.fused_moe(**given))


def test_weight_on_input() -> None:
    given = arguments()
    given["topk_ids"] = given["topk_ids"][:, :1].contiguous()
    given["topk_weights"] = given["topk_weights"][:, :1].contiguous()
    got = cm.fused_moe(**given, weight_on_input=True)
    hidden = given["hidden"] * given["topk_weights"].bfloat16()
    ones = torch.ones_like(given["topk_weights"])
    assert torch.equal(got, cm.fused_moe(**given | {"hidden": hidden, "topk_weights": ones}))


@pytest.mark.parametrize(
    ("numbers", "formula"),
    [
        ({"limit": 0.5}, lambda g, u: silu(g.clamp(max=0.5)) * u.clamp(-0.5, 0.5)),
        ({"alpha": 2.0}, lambda g, u: g * torch.sigmoid(2 * g) * u),
        ({"beta": 1.0}, lambda g, u: silu(g) * (u + 1)),
    ],
)  # fmt: skip
def test_numbers_of_a_clamped_swiglu(numbers: dict[str, float], formula: Any) -> None:
    given = arguments()
    got = cm.fused_moe_reference(**given, **numbers, compute_dtype=torch.float64)
    want = torch.zeros_like(got)
    for t, (ids, shares) in enumerate(zip(given["topk_ids"], given["topk_weights"], strict=True)):
        for e, share in zip(ids.tolist(), shares.tolist(), strict=True):
            gate, up = (given["w13"][e].double() @ given["hidden"][t].double()).chunk(2)
            want[t] += share * (given["w2"][e].double() @ formula(gate, up))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_numbers_that_an_activation_does_not_take_are_refused() -> None:
    with pytest.raises(ValueError, match="activation must be 'swiglu' or 'swiglu_oai' where limit"):
        cm.fused_moe(**arguments() | {"activation": "geglu"}, limit=7.0)
    with pytest.raises(ValueError, match="limit must be positive, got 0.0"):
        cm.fused_moe(**arguments(), limit=0.0)


@pytest.mark.parametrize("quant", ["int8", "fp8"])
def test_static_scales(quant: str) -> None:
    """One value, or one of each expert, of which the largest serves."""
    given = arguments(quant=quant)
    scale = given["hidden"].float().abs().max() / 100
    each = scale * torch.linspace(0.5, 1.0, len(given["w2"]))
    got = cm.fused_moe(**given, hidden_scale=scale, active_scale=torch.tensor([0.01]))
    assert torch.equal(
        got, cm.fused_moe(**given, hidden_scale=each, active_scale=torch.tensor(0.01))
    )
    q, per_token = quantize_static(given["hidden"], given["w13"].dtype, scale)
    want = cm.fused_moe(
        **given | {"hidden": q, "hidden_scale": per_token}, active_scale=torch.tensor([0.01])
    )
    assert torch.equal(got, want)
    assert not torch.equal(got, cm.fused_moe(**given))


@pytest.mark.parametrize("max_rows", [1, 5, 17, 18, 1000])
def test_rows_beyond_max_rows_are_dropped_and_counted(max_rows: int) -> None:
    given = arguments(quant="int8")
    overflow = torch.full((1,), -7, dtype=torch.int32)
    got = cm.fused_moe(**given, max_rows=max_rows, overflow=overflow)
    table = cm.route(given["topk_ids"], len(given["w2"]))
    kept = table.inverse < max_rows
    assert overflow.item() == max(0, 18 - max_rows) == int((~kept).sum())
    ids = given["topk_ids"].where(kept, -1)
    assert torch.equal(got, cm.fused_moe(**given | {"topk_ids": ids}))
    names = ("hidden", "w13", "w2", "topk_weights", "topk_ids")
    sizes = [
        cm.fused_moe_workspace_size(
            *(given[name] for name in names),
            **{name: value for name, value in given.items() if name not in names},
            **bound,
        )
        for bound in ({"max_rows": max_rows}, {})
    ]
    assert sizes[0] < sizes[1] if max_rows < 18 else sizes[0] == sizes[1]


def test_output_dtype_of_quantized_hidden() -> None:
    given = arguments(quant="fp8")
    _, quantized = FORMS["quantized_hidden"].make(given)
    assert cm.fused_moe(**quantized, out_dtype=torch.float16).dtype == torch.float16
    with pytest.raises(TypeError, match="out_dtype must be hidden's dtype"):
        cm.fused_moe(**given, out_dtype=torch.float16)


REFUSED: tuple[tuple[dict[str, Any], str | None, str], ...] = (
    ({"reduce": "mean"}, None, "reduce must be one of sum, weighted, none, got 'mean'"),
    ({"reduce": "none", "residual": torch.zeros(6, 256).bfloat16()}, None, "residual needs"),
    ({"weight_on_input": True}, None, "weight_on_input needs one expert per token, got k = 3"),
    ({"max_rows": 0}, None, "max_rows must be at least 1, got 0"),
    ({"overflow": torch.zeros(1, dtype=torch.int32)}, None, "overflow needs max_rows"),
    ({"hidden_scale": torch.ones(1)}, None, "hidden_scale needs quant 'fp8' or 'int8'"),
    ({"active_scale": torch.ones(1)}, None, "active_scale needs quant 'fp8' or 'int8'"),
    ({"hidden": torch.zeros(6, 256, dtype=torch.int8)}, "int8", "hidden_scale must be given"),
)


@pytest.mark.parametrize(("changes", "quant", "message"), REFUSED)
def test_refused(changes: dict[str, Any], quant: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cm.fused_moe(**arguments(quant=quant) | changes)


def test_meta_tensors_give_shapes_and_do_not_mix_with_others() -> None:
    given = arguments(quant="int8")
    meta = {n: t.to("meta") if isinstance(t, Tensor) else t for n, t in given.items()}
    for _ in range(2):
        out = cm.fused_moe(**meta)
        assert out.is_meta and out.shape == given["hidden"].shape
        assert torch.equal(cm.fused_moe(**given), cm.fused_moe(**given))
        with pytest.raises(ValueError, match="w13 must be on cpu, got one on meta"):
            cm.fused_moe(**given | {"w13": meta["w13"]})


def test_addresses_are_judged_alike_on_every_device() -> None:
    given = arguments()
    buffer = given["w13"].new_zeros(given["w13"].numel() + 1)
    odd = buffer[1:].view(given["w13"].shape)
    with pytest.raises(ValueError, match="the address of w13 must be a multiple of 16 bytes"):
        cm.fused_moe(**given | {"w13": odd})


def test_a_workspace_is_refused_before_a_kernel_is_looked_for() -> None:
    given = arguments(quant="fp8")
    for workspace, words in (
        (torch.zeros(16, dtype=torch.uint8), "workspace must"),
        (torch.zeros(1 << 20), "workspace must"),
    ):
        with pytest.raises(ValueError, match=words):
            cm.fused_moe(**given, workspace=workspace)


def test_batch_invariance_changes_no_result() -> None:
    given = arguments()
    out: Tensor = cm.fused_moe(**given, batch_invariant=True)
    assert torch.equal(out, cm.fused_moe(**given))


def test_a_swiglu_without_numbers_has_none() -> None:
    from cutlass_moe.operands import Numbers, clamped_numbers

    assert clamped_numbers("swiglu", None, None, None) is None
    assert clamped_numbers("swiglu", None, 2.0, None) == Numbers(math.inf, 2.0, 0.0)
    assert clamped_numbers("swiglu_oai", 5.0, None, None) == Numbers(5.0, 1.702, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("experts", [1, 2, 4])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "form", ["", "1", "1 1", "1 1 1", "E", "E 1", "E 1 1", "E 2", "E 2 1", "E N", "E N 1"]
)
def test_scales_of_weights(form: str, interleaved: bool, experts: int, dtype: torch.dtype) -> None:
    """Each form, dense and strided, is float32 [E, N] or [E] of the values that it stands for."""
    n = 6
    shape = [{"E": experts, "N": n}.get(word) or int(word) for word in form.split()]
    for spread in (1, 2):
        wide = torch.rand(*shape, spread).to(dtype) + 1
        scale = wide[..., 0]
        got = _per_channel(torch.empty(experts, n, 3), True, interleaved)(scale)
        assert got.dtype == torch.float32 and got.is_contiguous()
        assert got.shape in ((experts, n), (experts,))
        for e, column in itertools.product(range(experts), range(n)):
            up = column % 2 if interleaved else column // (n // 2)
            index = [0 if size == 1 else e for size in shape[:1]]
            index += [{"N": column, "2": up}.get(word, 0) for word in form.split()[1:]]
            assert (got[e, column] if got.dim() == 2 else got[e]) == scale[tuple(index)]


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("form", ["", "1", "1 1", "T", "T 1"])
def test_scales_of_tokens(form: str, tokens: int) -> None:
    shape = [{"T": tokens}.get(word, 1) for word in form.split()]
    scale = torch.rand(*shape, 2)[..., 0]
    got = _per_token(tokens)(scale)
    assert got.shape == (tokens,) and got.is_contiguous()
    assert torch.equal(got, scale.flatten().expand(tokens))


def test_other_scales_are_refused() -> None:
    given = arguments(quant="int8")
    experts = len(given["w2"])
    for shape in ((experts + 1, 2), (experts, 3), (experts, 2, 2), (2,)):
        with pytest.raises(ValueError, match="w13_scale must have shape"):
            cm.fused_moe(**given | {"w13_scale": torch.ones(shape)})


def test_tensors_without_memory_and_odd_weights_are_refused_in_every_call() -> None:
    given = arguments()
    on_meta = given | {"topk_weights": given["topk_weights"].to("meta")}
    odd = torch.zeros(given["w2"].numel() + 1, dtype=torch.bfloat16)[1:].view(given["w2"].shape)
    for _ in range(2):
        cm.fused_moe(**given)
        with pytest.raises(ValueError, match="topk_weights must be on cpu, got one on meta"):
            cm.fused_moe(**on_meta)
        with pytest.raises(ValueError, match="address of w2 must be a multiple of 16 bytes"):
            cm.fused_moe(**given | {"w2": odd})
