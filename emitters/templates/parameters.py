"""What both templates of the grouped GEMM are called with."""

from __future__ import annotations

from cutlass import Int32, Uint8
from cutlass.cute.runtime import make_fake_compact_tensor

from emitters.device.epilogue.nodes import node_element, node_operand, tensor_nodes
from emitters.device.memory import ELEMENT
from emitters.spec.config_sm90 import K_TILE_BYTES, SLICE_BYTES, SLICE_ROWS, Schedule
from emitters.spec.gemm import GemmProblem, Major, WeightStorage
from emitters.spec.image import ParamKind, TensorMapBox
from emitters.spec.registry import GemmConfig
from emitters.spec.weight_map import weight_box
from emitters.templates.arguments import ABSENT, Argument, integer, pointer, several


def gemm_arguments(problem: GemmProblem, config: GemmConfig) -> tuple[Argument, ...]:
    """Of `__call__`, before grid and stream."""
    weight = pointer("weight", Uint8, 64)
    if problem.weight.storage is WeightStorage.STACKED:
        weight = _tensor(
            "weight",
            ELEMENT[problem.x],
            (problem.n, problem.k, problem.num_experts),
            (1, 0, 2) if problem.weight.major is Major.K else (0, 1, 2),
        )
    dynamic = config.schedule is Schedule.DYNAMIC
    return (
        weight,
        pointer("x", Uint8, 16),
        pointer("index", Int32, 4) if problem.gather else ABSENT,
        pointer("starts", Int32, 4),
        pointer("offsets", Int32, 4),
        pointer("out", ELEMENT[problem.out], 16),
        _tensor("out_map", ELEMENT[problem.out], (SLICE_ROWS, problem.out_columns), (1, 0)),
        integer("num_tokens"),
        integer("num_rows"),
        integer("early"),
        several(integer("column_stride"), integer("gate_stride")) if problem.gated else ABSENT,
        several(*(pointer(node_operand(node), node_element(node), 4) for node in tensor_nodes(problem))),
        pointer("counters", Int32, 8) if dynamic else ABSENT,
    )


def gemm_tensor_maps(problem: GemmProblem, config: GemmConfig) -> tuple[TensorMapBox, ...]:
    rows, k = config.tile_n // config.cluster_m, config.k_tile(problem)
    weight = TensorMapBox(
        "weight",
        box=weight_box(problem, rows, k),
        swizzle=K_TILE_BYTES,
        l2_promotion=config.l2_promotion,
    )
    out = TensorMapBox(
        "out_map",
        box=(SLICE_BYTES // problem.out.bytes, SLICE_ROWS),
        swizzle=SLICE_BYTES,
        l2_promotion=128,
    )
    return weight, out


def _tensor(name: str, element: type, shape: tuple[int, ...], order: tuple[int, ...]) -> Argument:
    """Stands for a tensor map, which the host encodes."""
    stand_in = make_fake_compact_tensor(element, shape, stride_order=order, assumed_align=16)
    return Argument(stand_in, ((name, ParamKind.TENSOR_MAP),))
