"""fused_moe's gradients without a GPU: the ops against float64, and how torch sees them."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import checkpoint

import cutlass_moe as cm
from cutlass_moe.layer import backward, training
from cutlass_moe.layer.activate import activate_rows_backward_reference, activate_rows_reference
from cutlass_moe.layer.backward import LayerBackward
from cutlass_moe.operands import QUANTS, LayerOptions
from cutlass_moe.ops.activations import ACTIVATIONS
from tests.support.training_cases import (
    DIFFERENTIABLE,
    TrainingCase,
    gradients,
    leaves_of,
    reference_gradients,
    relative,
)

BASE = TrainingCase()
CASES = {
    **{activation: TrainingCase(activation, bias=True) for activation in ACTIVATIONS},
    "interleaved": TrainingCase(interleaved=True, bias=True),
    "clamped": TrainingCase(options={"limit": 30.0, "alpha": 1.5, "beta": 0.5}),
    "n_major": TrainingCase("geglu", n_major=True, bias=True),
    "float16": TrainingCase(dtype=torch.float16, bias=True),
    "recompute": TrainingCase(bias=True, options={"recompute": True}),
    "capacity": TrainingCase(bias=True, options={"capacity_factor": 0.5}),
    "max_rows": TrainingCase(bias=True, options={"max_rows": 10}),
    "batch_invariant": TrainingCase(options={"batch_invariant": True}),
    "one_expert": TrainingCase(bias=True, routing="one_expert"),
    "foreign": TrainingCase(bias=True, routing="foreign"),
    "nobody": TrainingCase(bias=True, routing="nobody"),
    "no_tokens": TrainingCase(tokens=0, bias=True),
    "many_rows": TrainingCase(tokens=40, hidden=16, bias=True),  # active is larger than w2
    "one_choice": TrainingCase(top_k=1, options={"weight_on_input": True}),
    "bf16_weights": TrainingCase(weights=torch.bfloat16),
}
LIMITS = {torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def _compiled_nothing_yet() -> None:
    torch._dynamo.reset()  # which compiles a function for so many kinds of arguments only


@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str) -> None:
    case = CASES[name]
    given = case.arguments("cpu")
    leaves = leaves_of(given)
    out, found = gradients({**given, **leaves})
    want_out, want = reference_gradients(given)
    assert relative(out, want_out) <= LIMITS[case.dtype]
    for leaf, leaf_tensor in leaves.items():
        got = found[leaf]
        assert got.dtype == leaf_tensor.dtype and got.shape == leaf_tensor.shape
        assert got.stride() == leaf_tensor.stride(), leaf
        assert relative(got, want[leaf]) <= LIMITS[case.dtype], leaf


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_each_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is frozen has no product of its own."""
    given = TrainingCase(bias=True).arguments("cpu")
    _, want = gradients({**given, **leaves_of(given)})
    made: list[tuple[int, ...]] = []
    real = cm.grouped_weight_grad

    def count(*operands: Any, **options: Any) -> Tensor:
        made.append(tuple(real(*operands, **options).shape[1:]))
        return real(*operands, **options)

    monkeypatch.setattr(backward, "grouped_weight_grad", count)
    leaf = leaves_of(given)[name]
    _, found = gradients({**given, name: leaf})
    assert torch.equal(found[name], want[name])
    assert len(made) == (name in ("w13", "w2"))


def test_bitwise_the_same_again() -> None:
    given = TrainingCase(bias=True).arguments("cpu")
    results = [gradients({**given, **leaves_of(given)}) for _ in range(2)]
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, results[1][1][name]) for name, a in results[0][1].items())


LAYOUTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "rows_at_a_stride": lambda g: {"hidden": torch.nn.functional.pad(g["hidden"], (0, 8))[:, :-8]},
    "columns": lambda g: {"hidden": g["hidden"].T.contiguous().T},
    "more_dimensions": lambda g: {
        name: g[name].unflatten(0, (2, -1))
        for name in ("hidden", "residual", "topk_weights", "topk_ids")
    },
    "int64": lambda g: {"topk_ids": g["topk_ids"].long()},
    "int8": lambda g: {"topk_ids": g["topk_ids"].to(torch.int8)},
    "weights_at_a_stride": lambda g: {
        "topk_weights": torch.nn.functional.pad(g["topk_weights"], (0, 3))[:, :-3]
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str) -> None:
    given = BASE.arguments("cpu")
    changed = {**given, **LAYOUTS[name](given)}
    _, want = gradients({**given, **leaves_of(given)})
    leaves = leaves_of(changed)
    out, found = gradients({**changed, **leaves})
    assert out.shape == changed["hidden"].shape
    for leaf, got in found.items():
        assert got.shape == leaves[leaf].shape
        assert torch.equal(got.reshape(want[leaf].shape), want[leaf]), leaf


def test_padded_experts() -> None:
    given = TrainingCase(hidden=60, inter=20).arguments("cpu")
    leaves = leaves_of(given)
    wide = cm.pad_experts(leaves["w13"].detach(), leaves["w2"].detach())
    padded = {**given, **leaves, "w13": wide.w13, "w2": wide.w2}
    wanted = [leaves[name] for name in ("hidden", "topk_weights", "residual")]
    found = torch.autograd.grad(cm.fused_moe(**padded).sum(), wanted)
    want = torch.autograd.grad(cm.fused_moe(**{**given, **leaves}).sum(), wanted)
    assert all(relative(a, b.double()) < 6e-3 for a, b in zip(found, want, strict=True))


def test_expanded_and_strided_gradients() -> None:
    given = BASE.arguments("cpu")
    leaves = leaves_of(given)
    names = list(leaves)
    out = cm.fused_moe(**{**given, **leaves})
    for grad in (out.new_ones(1, 1).expand_as(out), out.detach().T.contiguous().T):
        tensors = list(leaves.values())
        found = torch.autograd.grad(out, tensors, grad, retain_graph=True)
        want = torch.autograd.grad(out, tensors, grad.contiguous(), retain_graph=True)
        for name, a, b in zip(names, found, want, strict=True):
            assert torch.equal(a, b), name


def test_numbers_that_nobody_reads_do_not_spread() -> None:
    """Of pairs that were dropped, and of weights of experts without rows."""
    given = TrainingCase(bias=True).arguments("cpu")
    dropped = given["topk_ids"] < 0
    assert dropped.any()
    empty = given["w13"].shape[0] - 1
    given["topk_ids"][given["topk_ids"] == empty] = 0
    given["topk_weights"] = given["topk_weights"].masked_fill(dropped, torch.nan)
    given["w13"][empty], given["w2"][empty] = torch.nan, torch.nan
    out, found = gradients({**given, **leaves_of(given)})
    assert out.isfinite().all() and all(g.isfinite().all() for g in found.values())
    assert not found["topk_weights"][dropped].any()
    for name in ("w13", "w2", "w13_bias", "w2_bias"):
        assert not found[name][empty].any(), name


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_kept(recompute: bool) -> None:
    """hidden, weights, h or nothing in its place, and the table: nothing of rows x H."""
    given = TrainingCase(tokens=64).arguments("cpu")
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    leaves = leaves_of(given)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = cm.fused_moe(**{**given, **leaves}, recompute=recompute)
    inputs = {leaf.data_ptr() for leaf in leaves.values()}
    pairs, columns = given["topk_ids"].numel(), given["w13"].shape[1]
    table = 4 * (2 * pairs + len(given["w2"]))
    added = sum(size for at, size in kept.items() if at not in inputs)
    assert added == table + (0 if recompute else 2 * pairs * columns)
    assert leaves["residual"].data_ptr() not in kept and out.data_ptr() not in kept


def test_the_gradient_of_h_takes_its_place_unless_the_graph_is_kept() -> None:
    given = BASE.arguments("cpu")
    leaves = leaves_of(given)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = cm.fused_moe(**{**given, **leaves})
    shape = given["topk_ids"].numel(), given["w13"].shape[1]
    (h,) = (tensor for tensor in saved if tensor.shape == shape)
    before = h.clone()
    tensors = list(leaves.values())
    first = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
    assert torch.equal(h, before)
    again = torch.autograd.grad(out.sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(h, before)


@pytest.mark.parametrize(
    ("case", "graph_kept", "h_kept"),
    [(BASE, False, False), (BASE, True, True), (CASES["many_rows"], False, True)],
    ids=["once", "graph_kept", "many_rows"],
)
def test_h_is_let_go_before_the_gradient_of_w2(
    case: TrainingCase, graph_kept: bool, h_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the graph is kept, or active takes more memory than that gradient."""
    made: list[weakref.ref[Tensor]] = []
    there: list[bool] = []
    real_up, real_down = training.project_up, LayerBackward.of_down

    def project_up(*given: Any) -> tuple[Tensor, Tensor]:
        h, active = real_up(*given)
        made.append(weakref.ref(h))
        return h, active

    def of_down(self: LayerBackward, *given: Any) -> dict[str, Tensor | None]:
        there.append(made[0]() is not None)
        return real_down(self, *given)

    monkeypatch.setattr(training, "project_up", project_up)
    monkeypatch.setattr(LayerBackward, "of_down", of_down)
    given = case.arguments("cpu")
    leaves = leaves_of(given)
    out = cm.fused_moe(**{**given, **leaves})
    torch.autograd.grad(out.sum(), list(leaves.values()), retain_graph=graph_kept)
    assert there == [h_kept]


# Frozen 8-bit experts.


def quantised(quant: str, one_scale: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of a layer with 8-bit weights, and of one with their values in bfloat16."""
    given = TrainingCase(tokens=40, hidden=64, inter=48, bias=True).arguments("cpu")
    wide = dict(given)
    for name in ("w13", "w2"):
        values, scale = cm.quantize_per_channel(given[name], QUANTS[quant])
        wide[name] = (values.float() * scale[..., None]).bfloat16()
        given[name], given[f"{name}_scale"] = values, scale[..., None] if one_scale else scale
    return {**given, "quant": quant}, wide


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("quant", ["fp8", "int8"])
def test_frozen_8_bit_experts(quant: str, recompute: bool) -> None:
    """Close to the gradients of the same weights in bfloat16: quantisations pass them on."""
    given, wide = quantised(quant)
    trained = [name for name in DIFFERENTIABLE if name not in ("w13", "w2")]
    leaves = {name: leaf for name, leaf in leaves_of(wide).items() if name in trained}
    out, found = gradients({**given, **leaves, "recompute": recompute})
    want_out, want = gradients({**wide, **leaves})
    limit = {"fp8": 0.1, "int8": 0.04}[quant]
    assert 1e-3 < relative(out, want_out.double()) < limit
    for name, gradient in found.items():
        assert gradient.dtype == leaves[name].dtype
        assert relative(gradient, want[name].double()) < limit, name
    compiled = torch.compile(cm.fused_moe, fullgraph=True, backend="aot_eager")
    got, same = gradients({**given, **leaves, "recompute": recompute}, call=compiled)
    assert torch.equal(got, out) and all(torch.equal(same[name], found[name]) for name in found)


def test_8_bit_weights_are_widened_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    given, _ = quantised("int8", one_scale=True)
    given["topk_ids"] = given["topk_ids"].clamp(max=3)  # none for the last expert
    hidden = given["hidden"].clone().requires_grad_()
    found = []
    for some in (1 << 27, 1, 4 * 64 * 96):  # all experts, one, two at a time
        monkeypatch.setattr(backward, "_SOME_BYTES", some)
        found.append(torch.autograd.grad(cm.fused_moe(**{**given, "hidden": hidden}).sum(), hidden))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][0], found[2][0])


# As torch sees it.


def test_opcheck() -> None:
    given = TrainingCase(bias=True).arguments("cpu")
    defaults = {**LayerOptions()._asdict(), "recompute": False}
    leaves = leaves_of(given)
    names = [
        argument.name
        for argument in torch.ops.cutlass_moe.fused_moe_train.default._schema.arguments
    ]
    values = [{**defaults, **given, **leaves}.get(name) for name in names]
    torch.library.opcheck(torch.ops.cutlass_moe.fused_moe_train.default, tuple(values))
    with torch.no_grad():
        out, *saved = torch.ops.cutlass_moe.fused_moe_train(*values)
    tensors = [given[name] for name in backward.Needs._fields]
    how = ("swiglu", False, None, None, None, None, None, 12)
    arguments = (out, *tensors, None, None, *saved, *how, [True] * 6)
    torch.library.opcheck(
        torch.ops.cutlass_moe.fused_moe_backward.default,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["swiglu", "n_major", "recompute", "one_choice", "foreign"])
def test_compiled_in_one_graph(name: str, dynamic: bool) -> None:
    compiled = torch.compile(cm.fused_moe, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (12, 20) if dynamic else (12,):
        given = copy.copy(CASES[name].arguments("cpu", tokens))
        out, want = gradients({**given, **leaves_of(given)})
        got, found = gradients({**given, **leaves_of(given)}, call=compiled)
        assert torch.equal(got, out)
        assert all(torch.equal(found[leaf], want[leaf]) for leaf in want)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the forwards of the layer: the number of tokens of each."""
    from cutlass_moe.layer import training

    calls: list[int] = []
    real = training._route

    def count(*arguments: Any) -> Any:
        calls.append(arguments[0].topk_ids.shape[0])
        return real(*arguments)

    monkeypatch.setattr(training, "_route", count)
    return calls


def test_checkpointed(monkeypatch: pytest.MonkeyPatch) -> None:
    given = TrainingCase(bias=True).arguments("cpu")
    out, want = gradients({**given, **leaves_of(given)})
    calls = counted(monkeypatch)

    def call(**arguments: Any) -> Tensor:
        return checkpoint.checkpoint(cm.fused_moe, use_reentrant=False, **arguments)

    got, found = gradients({**given, **leaves_of(given)}, call=call)
    assert torch.equal(got, out) and all(torch.equal(found[leaf], want[leaf]) for leaf in want)
    assert len(calls) == 2


def test_selectively_checkpointed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that keeps the results of the layer's op runs its forward once."""
    given = TrainingCase(bias=True).arguments("cpu")
    out, want = gradients({**given, **leaves_of(given)})
    calls = counted(monkeypatch)
    kept = [torch.ops.cutlass_moe.fused_moe_train.default]

    def call(**arguments: Any) -> Tensor:
        return checkpoint.checkpoint(
            lambda: cm.fused_moe(**arguments).sin(),
            use_reentrant=False,
            context_fn=lambda: checkpoint.create_selective_checkpoint_contexts(kept),
        )

    leaves = leaves_of(given)
    call(**{**given, **leaves}).sum().backward()
    assert len(calls) == 1
    cosine = out.detach().cos()
    got = torch.autograd.grad(cm.fused_moe(**{**given, **leaves}), list(leaves.values()), cosine)
    for (leaf, tensor), right in zip(leaves.items(), got, strict=True):
        assert torch.equal(tensor.grad, right), leaf
    assert set(want) == set(leaves)


def test_differentiable_once() -> None:
    given = BASE.arguments("cpu")
    leaves = leaves_of(given)
    out = cm.fused_moe(**{**given, **leaves})
    (grad,) = torch.autograd.grad(out.square().sum(), leaves["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="fused_moe is differentiable once"):
        grad.sum().backward()
    out = cm.fused_moe(**{**given, **leaves}, grad_into=main_grads(given))
    with pytest.raises(RuntimeError, match="grad_into must be None where a gradient has a grad"):
        torch.autograd.grad(out.square().sum(), leaves["hidden"], create_graph=True)


def test_on_the_meta_device() -> None:
    given = {
        name: value.to("meta") if isinstance(value, Tensor) else value
        for name, value in BASE.arguments("cpu").items()
    }
    leaves = leaves_of(given)
    out = cm.fused_moe(**{**given, **leaves})
    found = torch.autograd.grad(out, list(leaves.values()), torch.empty_like(out))
    for gradient, leaf in zip(found, leaves.values(), strict=True):
        assert gradient.is_meta and gradient.shape == leaf.shape


REFUSED = {
    "quant": ({"quant": "fp8_block"}, "quant must be None or 'fp8' or 'int8', got 'fp8_block'"),
    "frozen": ({"quant": "fp8"}, "w13 must be frozen with quant, got one that requires one"),
    "reduce": ({"reduce": "none"}, "here .* reduce must be 'sum', got 'none'; or call under"),
    "overflow": ({"overflow": torch.zeros(1).int()}, "overflow must be None, got 'a tensor'"),
    "out": ({"out": torch.zeros(12, 64).bfloat16()}, "no gradient into out or workspace"),
    "workspace": ({"workspace": torch.zeros(1)}, "no gradient into out or workspace"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_gradient_is_not_lost_silently(name: str) -> None:
    given = BASE.arguments("cpu")
    more, message = REFUSED[name]
    with pytest.raises(RuntimeError, match=message):
        cm.fused_moe(**{**given, **leaves_of(given), **more})


# Main gradients.


def main_grads(given: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    w13, w2 = (
        torch.randn(given[name].shape, generator=generator).to(dtype) for name in ("w13", "w2")
    )
    return w13, w2


@pytest.mark.parametrize("n_major", [False, True])
def test_gradients_are_added_to_main_gradients(n_major: bool) -> None:
    given = TrainingCase(n_major=n_major, bias=True).arguments("cpu")
    leaves = leaves_of(given)
    _, want = gradients({**given, **leaves_of(given)})
    into = main_grads(given)
    before = [tensor.clone() for tensor in into]
    for _ in range(2):  # two microbatches
        out = cm.fused_moe(**{**given, **leaves}, grad_into=into)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        out.backward(grad)
    for name, main, old in zip(("w13", "w2"), into, before, strict=True):
        assert leaves[name].grad is None
        assert relative(main - old, 2 * want[name].double()) < 6e-3
    twice = leaves["hidden"].grad
    assert twice is not None and relative(twice, 2 * want["hidden"].double()) < 6e-3


@pytest.mark.parametrize("zeros", [False, True])
def test_megatrons_convention(zeros: bool) -> None:
    given = TrainingCase(n_major=True).arguments("cpu")
    w1 = torch.nn.Parameter(given["w13"].mT.contiguous())
    w1.grad_added_to_main_grad = False
    w1.zero_out_wgrad = zeros
    hooked = []
    w1.register_post_accumulate_grad_hook(lambda p: hooked.append(p.grad.shape))
    g13, _ = main_grads({**given, "w13": w1})
    before = g13.clone()
    cm.fused_moe(**{**given, "w13": w1.mT}, grad_into=(g13.mT, None)).sum().backward()
    assert w1.grad_added_to_main_grad is True and hooked == [w1.shape]
    assert not zeros or not w1.grad.any()
    assert not torch.equal(g13, before)


def test_one_weight_may_have_a_main_gradient() -> None:
    given = BASE.arguments("cpu")
    leaves = leaves_of(given)
    _, g2 = main_grads(given)
    cm.fused_moe(**{**given, **leaves}, grad_into=(None, g2)).sum().backward()
    assert leaves["w13"].grad is not None and leaves["w2"].grad is None


INTO_ERRORS: dict[str, tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = {
    "list": (lambda g: [None, None], TypeError, "grad_into must be a tuple of two"),
    "three": (lambda g: (None,) * 3, TypeError, "grad_into must be a tuple of two"),
    "text": (lambda g: ("a", None), TypeError, "grad_into of w13 must be a tensor, got str"),
    "shape": (
        lambda g: (torch.zeros(2, 3), None),
        ValueError,
        r"grad_into of w13 must have shape .* got \(2, 3\)",
    ),
    "dtype": (
        lambda g: (None, torch.zeros(g["w2"].shape).double()),
        TypeError,
        "grad_into of w2 must be torch.float32 or torch.bfloat16, got torch.float64",
    ),
}


@pytest.mark.parametrize("name", INTO_ERRORS)
def test_wrong_main_gradients(name: str) -> None:
    given = BASE.arguments("cpu")
    make, error, message = INTO_ERRORS[name]
    with pytest.raises(error, match=message):
        cm.fused_moe(**{**given, **leaves_of(given)}, grad_into=make(given))


def test_main_gradients_need_leaves_and_no_compiler() -> None:
    given = BASE.arguments("cpu")
    leaves = leaves_of(given)
    into = main_grads(given)
    with pytest.raises(ValueError, match="needs a w13 that is a leaf of the graph"):
        cm.fused_moe(**{**given, **leaves, "w13": leaves["w13"] * 1}, grad_into=into)
    compiled = torch.compile(cm.fused_moe, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="grad_into must be None under torch.compile"):
        compiled(**{**given, **leaves}, grad_into=into)


# The references, which all of this is compared with.


def test_the_layer_reference_has_the_gradient_of_its_formula() -> None:
    case = TrainingCase(
        "geglu", tokens=3, hidden=4, inter=2, bias=True, options={"capacity_factor": 1.0}
    )
    given = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.arguments("cpu").items()
    }
    names = list(leaves_of(given))

    def layer(*values: Tensor) -> Tensor:
        tensors = dict(zip(names, values, strict=True))
        return cm.fused_moe_reference(**{**given, **tensors}, compute_dtype=torch.float64)

    assert torch.autograd.gradcheck(layer, list(leaves_of(given).values()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activations_reference_is_its_gradient(activation: str) -> None:
    """Of sum over rows of w * grad * act(h), by autograd, in float64."""
    generator = torch.Generator().manual_seed(0)
    options = LayerOptions(activation=activation)
    columns = 2 * 8 if options.function.gated else 8
    h, grad = (torch.randn(5, n, generator=generator).double() for n in (columns, 8))
    inverse = torch.tensor([[3, -1], [0, 4], [1, 9]]).int()
    weights = torch.rand(3, 2, generator=generator).double().requires_grad_()
    h.requires_grad_()
    by_h, active, by_weight = activate_rows_backward_reference(
        h.detach(), grad, weights.detach(), inverse, options
    )
    value = activate_rows_reference(h, inverse, options)
    of_row = torch.zeros(5, dtype=torch.float64).index_put(
        (torch.tensor([3, 0, 4, 1]),), weights.flatten()[torch.tensor([0, 2, 3, 4])]
    )
    want = torch.autograd.grad((value * grad * of_row[:, None]).sum(), (h, weights))
    torch.testing.assert_close(by_h, want[0])
    torch.testing.assert_close(by_weight, want[1])
    torch.testing.assert_close(active, (value * of_row[:, None]).detach())
