"""The kernel images that a run of cases may launch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from cutlass_moe.choose import heuristics_sm90 as heuristics
from cutlass_moe.models.problems import problems_of_shape
from emitters.spec.dtypes import DType
from emitters.spec.layer_steps import TopkProblem
from perf.cases import BenchCase
from perf.layer.cases import MoeLayerCase
from perf.product.cases import SCHEDULES, ProductCase

Image = tuple[Any, Any]  # problem and config


def images_of(cases: Iterable[BenchCase]) -> list[Image]:
    """Each image once."""
    return list(dict.fromkeys(image for case in cases for image in KINDS[type(case)](case)))


def product_images(case: ProductCase) -> Iterator[Image]:
    """The images among which an op may choose, and those of schedules that are named."""
    problem = case.problem
    yield from ((problem, config) for config in heuristics.candidates(problem))
    if case.suite == "schedules":
        rows = case.rows / case.num_experts
        for schedule in SCHEDULES:
            yield problem, heuristics.choose(problem, case.x_rows, rows, schedule=schedule)


def layer_images(case: MoeLayerCase) -> Iterator[Image]:
    """The images of `fused_moe`, of its steps as `perf.layer.steps` calls them, whose activations
    are not scaled, and of `topk_router`."""
    # of tokens that choose among this rank's experts
    problems = problems_of_shape(replace(case.shape, all_ranks=None), case.dtype)
    nodes, activation = problems.up.epilogue, problems.up.activation
    assert activation is not None
    up = replace(problems.up, epilogue=(*nodes[:-1], replace(activation, scale=1.0)))
    router = TopkProblem(case.shape.num_experts, DType.FP32, "softmax", 1)
    found: set[Any] = {*problems, up, router}
    if problems.quantize_active:
        found.add(replace(problems.quantize_active, source_scale=1.0))
    for problem in found - {None}:
        yield from ((problem, config) for config in heuristics.every_config(problem))


KINDS: dict[type, Callable[[Any], Iterator[Image]]] = {
    ProductCase: product_images,
    MoeLayerCase: layer_images,
}
