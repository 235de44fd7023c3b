"""Arguments of wrong Python types: a TypeError with the argument's name and what came."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import cutlass_moe as cm
from cutlass_moe import operands
from cutlass_moe.nn import GatedMoeFeedForward, MoeFeedForward, quantize_
from cutlass_moe.ops._types import in_words

NOTHING = object()
VALUES: dict[str, Any] = {
    "None": None,
    "text": "text",
    "3": 3,
    "1.5": 1.5,
    "[]": [],
    "object": NOTHING,
    "ints": [1, 2],
    "array": np.zeros(2, np.float32),
}
# By part of an annotation, the values above that have such a type. An empty list of tensors has
# the right type, and the wrong length.
RIGHT: dict[str, tuple[str, ...]] = {
    "Tensor": (),
    "Tensors": ("[]",),
    "bool": (),
    "int": ("3",),
    "float": ("3", "1.5"),
    "str": ("text",),
    "torch.dtype": (),
    "torch.device": (),
    "nn.Module": (),
    "Problem": (),
    "Iterable[Problem]": ("[]",),
    "GradInto": (),
    "None": ("None",),
}

X, W13, W2 = torch.ones(4, 16), torch.ones(2, 32, 16), torch.ones(2, 16, 16)
IDS = torch.zeros(4, 1, dtype=torch.int32)
OFFSETS = torch.tensor([2, 4], dtype=torch.int32)
HALF = torch.bfloat16
PRODUCT = {"x": X.to(HALF), "weight": W2.to(HALF), "offsets": OFFSETS}
CUT = {"mat_a": X.to(HALF), "mat_b": W2.to(HALF), "offs": OFFSETS}
SUMMED = {"left": X.to(HALF), "right": X.to(HALF), "offsets": OFFSETS}
LAYER = {
    "hidden": X.to(HALF),
    "w13": W13.to(HALF),
    "w2": W2.to(HALF),
    "topk_weights": torch.ones(4, 1),
    "topk_ids": IDS,
}
LISTS = {
    "x": PRODUCT["x"],
    "weight": PRODUCT["weight"],
    "scale": None,
    "per_token_scale": None,
    "group_list": OFFSETS,
    "out": torch.ones(4, 16, dtype=HALF),
}
PACKED = cm.quantize_packed(torch.ones(1, 32, 32), "mxfp4")
BLOCKS = torch.ones((1, 32, 1, 16), dtype=torch.uint8)
COMBINED = {"rows": X, "topk_weights": torch.ones(4, 1), "inverse": IDS}
MODULE = {"embed_dim": 16, "hidden_dim": 16, "num_experts": 2}
ROUTED, CHOSEN = {"topk_ids": IDS, "num_experts": 2}, {"logits": X, "k": 2}
QUANTIZED = {"x": X, "dtype": torch.int8}
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "combine": (cm.combine, COMBINED),
    "combine_reference": (cm.combine_reference, COMBINED),
    "fused_moe": (cm.fused_moe, LAYER),
    "fused_moe_problems": (cm.fused_moe_problems, LAYER),
    "fused_moe_reference": (cm.fused_moe_reference, LAYER),
    "fused_moe_workspace_size": (cm.fused_moe_workspace_size, LAYER),
    "grouped_matmul": (cm.grouped_matmul, PRODUCT),
    "grouped_matmul_out": (cm.grouped_matmul_out, {"out": LISTS["out"], **PRODUCT}),
    "grouped_matmul_problem": (cm.grouped_matmul_problem, PRODUCT),
    "grouped_matmul_reference": (cm.grouped_matmul_reference, PRODUCT),
    "grouped_mm": (cm.grouped_mm, CUT),
    "grouped_mm_reference": (cm.grouped_mm_reference, CUT),
    "grouped_weight_grad": (cm.grouped_weight_grad, SUMMED),
    "grouped_weight_grad_reference": (cm.grouped_weight_grad_reference, SUMMED),
    "index_group_matmul": (cm.index_group_matmul, LISTS),
    "index_group_matmul_workspace_size": (cm.index_group_matmul_workspace_size, LISTS),
    "load_balancing_loss": (cm.load_balancing_loss, {"logits": X, "topk_ids": IDS}),
    "dequantize_packed": (cm.dequantize_packed, {"packed": PACKED}),
    "pack_weights": (cm.pack_weights, {"values": BLOCKS, "scale": BLOCKS[..., 0]}),
    "pad_experts": (cm.pad_experts, {"w13": LAYER["w13"], "w2": LAYER["w2"]}),
    "plan": (cm.plan, PRODUCT),
    "quantize_packed": (cm.quantize_packed, {"weight": torch.ones(1, 32, 32), "format": "mxfp4"}),
    "quantize_per_channel": (cm.quantize_per_channel, {"weight": W2, "dtype": torch.int8}),
    "quantize_per_block": (cm.quantize_per_block, {"weight": W2}),
    "quantize_per_token": (cm.quantize_per_token, QUANTIZED),
    "quantize_per_token_group": (cm.quantize_per_token_group, {"x": X}),
    "quantize_per_token_group_reference": (cm.quantize_per_token_group_reference, {"x": X}),
    "quantize_per_token_reference": (cm.quantize_per_token_reference, QUANTIZED),
    "renormalize_kept": (
        cm.renormalize_kept,
        {"topk_weights": torch.ones(4, 1), "inverse": IDS},
    ),
    "route": (cm.route, ROUTED),
    "route_logits": (cm.route_logits, CHOSEN),
    "route_reference": (cm.route_reference, ROUTED),
    "router_z_loss": (cm.router_z_loss, {"logits": X}),
    "topk_router": (cm.topk_router, CHOSEN),
    "topk_router_reference": (cm.topk_router_reference, CHOSEN),
    "unpack_weights": (cm.unpack_weights, {"packed": PACKED}),
    "warmup": (cm.warmup, {"model_or_problems": []}),
    "MoeFeedForward": (MoeFeedForward, MODULE),
    "GatedMoeFeedForward": (GatedMoeFeedForward, MODULE),
    "quantize_": (quantize_, {"module": MoeFeedForward(16, 16, 2), "quant": "int8"}),
}
NEEDS_A_GPU = {"warmup"}
# Classes, which are tested where they are defined.
CLASSES = {"Plan", "RoutingTable"}
TWO_FORMS = {"why_not"}  # takes the arguments of two ops: tests/layer/test_why_not.py


def test_every_public_function_is_here() -> None:
    assert set(cm.__all__) - CLASSES - TWO_FORMS <= set(CALLS)


def annotations(function: Callable[..., Any]) -> Iterator[tuple[str, str]]:
    """Each argument's name and annotation; those behind **arguments too."""
    parameters = inspect.signature(function).parameters
    for name, parameter in parameters.items():
        annotation = str(parameter.annotation)
        if annotation.startswith("Unpack["):
            arguments = getattr(operands, annotation[len("Unpack[") : -1])
            for field, hint in arguments.__annotations__.items():
                text = getattr(hint, "__forward_arg__", hint)
                yield field, text.removeprefix("Required[").removesuffix("]")
        elif parameter.kind is not parameter.VAR_KEYWORD:
            yield name, annotation


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_type_is_told_by_name(name: str) -> None:
    """Of each argument, each value that has none of its types."""
    for argument, annotation in annotations(CALLS[name][0]):
        kinds = annotation.split(" | ")
        assert set(kinds) <= set(RIGHT), f"{name}: {argument} is {annotation}"
        right = {value for kind in kinds for value in RIGHT[kind]}
        for value in set(VALUES) - right:
            _check_message(name, argument, value)


def _check_message(name: str, argument: str, value: str) -> None:
    function, good = CALLS[name]
    given = VALUES[value]
    with pytest.raises(TypeError) as error:
        function(**{**good, argument: given})
    message = str(error.value)
    came = [given, *given[:1]] if isinstance(given, list | np.ndarray) else [given]
    words = [word for item in came for word in (in_words(item), type(item).__name__)]
    told = argument in message and any(f"got {word}" in message for word in words)
    assert told, (argument, value, message)


@pytest.mark.parametrize("name", sorted(set(CALLS) - NEEDS_A_GPU))
def test_the_calls_are_good_otherwise(name: str) -> None:
    function, good = CALLS[name]
    if name == "quantize_":
        good = {**good, "module": MoeFeedForward(16, 16, 2)}
    function(**good)


@pytest.mark.parametrize("value", [v for v in VALUES if v != "None"])
@pytest.mark.parametrize("name", ["x", "weight", "offsets", "out"])
def test_calls_of_a_plan(name: str, value: str) -> None:
    plan = cm.plan(**PRODUCT)
    want = plan().clone()
    with pytest.raises(TypeError, match=f"{name} must be a tensor"):
        plan(**{name: VALUES[value]})
    assert torch.equal(plan(), want)


@pytest.mark.parametrize("value", [v for v in VALUES if v != "None"])
def test_the_workspace_of_a_prepared_call(value: str) -> None:
    _, executor = cm.index_group_matmul_workspace_size(**LISTS)
    with pytest.raises(TypeError, match="workspace must be a tensor or None"):
        executor.run(VALUES[value])


def test_numbers_of_numpy_are_numbers() -> None:
    got = cm.grouped_matmul(**PRODUCT, expected_rows=np.int64(3), num_sms=np.int32(3))
    assert torch.equal(got, cm.grouped_matmul(**PRODUCT))
    assert cm.route(IDS, np.int64(2), capacity_factor=np.float32(1)).offsets.shape == (2,)


def test_lists_and_arrays_are_no_tensors_when_warm_either() -> None:
    cm.grouped_matmul(**PRODUCT)
    for name in PRODUCT:
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got a list"):
            cm.grouped_matmul(**{**PRODUCT, name: [1]})
