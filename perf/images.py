"""The kernel images that a run of cases launches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import click
import torch

import cutlass_moe
from cutlass_moe.choose import heuristics_sm90 as heuristics
from cutlass_moe.images.cache import default_cache
from cutlass_moe.images.compiler import Request, build_images
from cutlass_moe.layer.workspace import up_projection
from cutlass_moe.models.problems import problems_of_shape
from cutlass_moe.models.shapes import MoeShape
from cutlass_moe.ops._packed import packed_shape
from emitters.spec.gemm import GemmProblem
from emitters.spec.packing import Packing
from perf.cases import BLOCK, Case

Image = tuple[Any, Any]  # problem and config


def build_all(images: Iterable[Image]) -> None:
    """Compiles those that are not there yet, each once, and prints which could not be."""
    requests = [Request(*image) for image in dict.fromkeys(images)]
    failed = [result for result in build_images(default_cache(), requests) if result.error]
    for result in failed:
        click.echo(f"{result.request.problem.words}, {result.request.config.words}: {result.error}")
    click.echo(f"{len(requests) - len(failed)} of {len(requests)} images are there")


def images_of(cases: Iterable[Case], gpu: str = heuristics.GPU) -> list[Image]:
    """Those that are chosen on a GPU, each once."""
    found: dict[Image, None] = {}
    for case in cases:
        found |= dict.fromkeys((layer_images if case.is_layer else product_images)(case, gpu))
    return list(found)


def product_images(case: Case, gpu: str) -> Iterator[Image]:
    problem = problem_of(case)
    x_rows = case.rows // case.slots
    yield problem, heuristics.choose(problem, x_rows, case.rows / case.num_experts, gpu=gpu)


def problem_of(case: Case) -> GemmProblem:
    """What a call of the product asks for: without a gather where x has a row a pair."""
    ((n, k),) = case.products.values()
    e, x_rows = case.num_experts, case.rows // case.slots

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weight, scales = new(e, n, k, dtype=case.torch_dtype), {}
    if case.packed:
        weight = new(e, *packed_shape(Packing(case.dtype), n, k), dtype=torch.uint8)
    elif case.dtype == "fp8_block":
        blocks = new(e, -(-n // BLOCK), -(-k // BLOCK))
        scales = {"per_token_scale": new(x_rows, blocks.shape[2]), "scale": blocks}
    elif case.dtype != "bf16":
        scales = {"per_token_scale": new(x_rows), "scale": new(e, n)}
    return cutlass_moe.grouped_matmul_problem(
        new(x_rows, k, dtype=case.torch_dtype),
        weight,
        index=new(case.rows, dtype=torch.int32) if case.part == "up" else None,
        offsets=new(e, dtype=torch.int32),
        out_dtype=torch.bfloat16,
        **scales,
    )


def layer_images(case: Case, gpu: str) -> Iterator[Image]:
    sizes = case.num_experts, case.top_k, case.hidden, case.inter
    shape = MoeShape(case.model, *sizes, activation=case.activation)
    problems = problems_of_shape(shape, case.dtype)
    per_expert = case.rows / case.num_experts
    up = up_projection(problems, per_expert, case.rows)
    for problem in filter(None, problems._replace(up=up, quantized_up=None)):
        if isinstance(problem, GemmProblem):
            x_rows = case.tokens if problem.gather else case.rows
            yield problem, heuristics.choose(problem, x_rows, per_expert, gpu=gpu)
        else:
            yield from ((problem, config) for config in heuristics.every_config(problem))
