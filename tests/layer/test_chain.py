"""A layer's list of launches: what each kernel reads has been written, and finds its tensor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cutlass_moe.layer import workspace
from cutlass_moe.layer.chain import Chain, layer_links, plan_workspace
from cutlass_moe.layer.checks import accept_layer, layer_addresses, problems_of
from cutlass_moe.operands import FP8_BLOCK, QUANTS, LayerOperands, LayerOptions
from cutlass_moe.runtime import library
from cutlass_moe.runtime.parameters import column_stride
from emitters.spec.gemm import GemmProblem
from tests.support.fake_driver import FakeDriver, Seen, parameters_of

HIDDEN, INTER, EXPERTS, TOP_K = 256, 128, 8, 2
BASE = 1 << 40  # the address of the workspace
OPS = ["route", "quantize", "grouped_gemm", "quantize", "grouped_gemm", "combine"]


def make_layer(quant: str | None = "fp8", tokens: int = 5, **others: Any) -> LayerOperands:
    dtype = torch.bfloat16 if quant is None else QUANTS[quant]
    of_w13, of_w2 = (2 * INTER,), (HIDDEN,)
    if quant == FP8_BLOCK:
        of_w13, of_w2 = (2 * INTER // 128, HIDDEN // 128), (HIDDEN // 128, INTER // 128)
    scales = {
        "w13_scale": torch.ones(EXPERTS, *of_w13),
        "w2_scale": torch.ones(EXPERTS, *of_w2),
    }
    return LayerOperands(
        torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16),
        torch.zeros(EXPERTS, 2 * INTER, HIDDEN).to(dtype),
        torch.zeros(EXPERTS, HIDDEN, INTER).to(dtype),
        torch.zeros(tokens, TOP_K),
        torch.zeros(tokens, TOP_K, dtype=torch.int32),
        **(scales if quant else {}),
        **others,
    )


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Launches a layer's kernels on a driver without a GPU: returns the layer's tensors and
    regions by address, and problems with what was launched."""
    fake = FakeDriver().patch(monkeypatch)
    problems: list[Any] = []

    def load(problem: Any, config: Any, device: int) -> Any:
        problems.append(problem)
        return fake.kernel(parameters_of(problem, config), config.threads)

    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(library, "load", load)
    monkeypatch.setattr(library, "device_name", lambda device: "a GPU without a table")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def launch(
        layer: LayerOperands, options: LayerOptions, again: bool = False
    ) -> tuple[dict[str, int], list[Any]]:
        posed = problems_of(layer, options)
        links = layer_links(layer, options, posed)
        tensors = layer_addresses(layer, torch.empty_like(layer.hidden))
        tensors |= plan_workspace(layer, options, posed).addresses(BASE)
        known = set(layer._fields)
        for link in links:
            assert set(link.reads.values()) - {"last_end"} <= known, "read before it is written"
            known |= set(link.writes.values())
            if again:  # first with other tensors, each at an address of its own
                link.launch({name: 256 * (at + 1) for at, name in enumerate(tensors)}, 7)
                fake.launches.pop()
            link.launch(tensors, 7)
        assert "out" in links[-1].writes
        several = len(fake.launches) - len(problems)  # of one kernel: route
        return tensors, list(zip(problems[:1] * several + problems, fake.launches, strict=True))

    return launch


@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
@pytest.mark.parametrize("quant", [None, "fp8", "int8"])
def test_every_kernel_finds_its_tensors(run: Any, quant: str | None, again: bool) -> None:
    layer = make_layer(quant, residual=torch.zeros(5, HIDDEN).bfloat16())
    tensors, launches = run(layer, LayerOptions(quant), again)
    ops = [problem.op for problem, _ in launches]
    assert ops == (OPS if quant else [op for op in OPS if op != "quantize"])
    seen: list[Seen] = [one for _, one in launches]
    route, combine = seen[0].values, seen[-1].values
    gemms = [one.values for problem, one in launches if isinstance(problem, GemmProblem)]
    for (values, weight, x, out), tokens in zip(
        (
            (gemms[0], "w13", "hidden_q" if quant else "hidden", "active"),
            (gemms[1], "w2", "active_q" if quant else "active", "rows"),
        ),
        (5, 10),
        strict=True,
    ):
        assert values["weight"][0] == tensors[weight] and values["x"] == tensors[x]
        assert values["out"] == values["out_map"][0] == tensors[out]
        assert values["offsets"] == tensors["offsets"] == route["offsets"]
        assert (values["num_tokens"], values["num_rows"], values["starts"]) == (tokens, 10, 0)
        if quant:
            assert values["scale"] == tensors[f"{weight}_scale"]
            assert values["per_token_scale"] == tensors[f"{x}_scale"]
    assert gemms[0]["index"] == route["index"] and "index" not in gemms[1]
    assert (gemms[0]["column_stride"], gemms[0]["gate_stride"]) == (1, INTER)
    assert (route["ids"], route["expert_map"]) == (tensors["topk_ids"], 0)
    assert (route["pairs"], route["choices"], route["capacity"]) == (10, TOP_K, 10)
    names = {"weights": "topk_weights", "out": "out", "rows": "rows", "residual": "residual"}
    assert {name: combine[name] for name in names} == {n: tensors[t] for n, t in names.items()}
    assert (combine["num_rows"], combine["num_tokens"]) == (10, 5)
    if quant:
        first, second = (one.values for p, one in launches if p.op == "quantize")
        assert (first["source"], first["end"], first["num_rows"]) == (tensors["hidden"], 0, 5)
        assert (second["source"], second["num_rows"]) == (tensors["active"], 10)
        assert second["end"] == tensors["offsets"] + 4 * (EXPERTS - 1)


@pytest.mark.parametrize(
    ("tokens", "room", "step"), [(5, 64, True), (48, 96, True), (48, 95, False), (64, 256, False)]
)
def test_blocks_are_quantised_by_a_step_or_by_the_product(
    run: Any, monkeypatch: pytest.MonkeyPatch, tokens: int, room: int, step: bool
) -> None:
    """By the product from 13 rows per expert on, and where there is no room for float32 rows."""
    monkeypatch.setattr(workspace, "_STORED_BYTES", room * INTER * 4)
    layer, options = make_layer(FP8_BLOCK, tokens), LayerOptions(FP8_BLOCK)
    tensors, launches = run(layer, options)
    up, down = (one.values for problem, one in launches if isinstance(problem, GemmProblem))
    steps = [one.values for problem, one in launches if problem.op == "quantize_groups"]
    rows = tokens * TOP_K
    if step:
        _, second = steps
        assert up["out"] == second["source"] == tensors["active"] and "out_scale" not in up
        assert (second["source_stride"], second["num_rows"]) == (4 * INTER, rows)
        written = second["q"], second["scale"], second["scale_stride"], second["scale_k_stride"]
    else:
        assert len(steps) == 1
        written = (up["out"], up["out_scale"], up["out_scale_stride"], up["out_scale_k_stride"])
    assert written == (tensors["active_q"], tensors["active_q_scale"], 1, column_stride(rows))
    assert down["x"] in (tensors["active_q"], (tensors["active_q"], (INTER, rows), (INTER,)))


@pytest.mark.parametrize(("tokens", "pdl"), [(5, True), (5, False), (4096, True)])
def test_small_layers_overlap_and_say_what_is_early(run: Any, tokens: int, pdl: bool) -> None:
    """But large ones do not: their products are limited by arithmetic."""
    overlap = pdl and tokens == 5
    _, launches = run(make_layer(tokens=tokens), LayerOptions("fp8", pdl=pdl))
    assert all(seen.overlap is overlap for _, seen in launches)
    early = [seen.values["early"] for problem, seen in launches if "early" in seen.values]
    first, up, second, down = early
    assert (first, up, second, down) == (overlap, 0, 0, overlap)


def test_many_pairs_are_routed_by_two_launches_of_one_kernel(run: Any) -> None:
    _, launches = run(make_layer(tokens=4096), LayerOptions("fp8"))
    (one, first), (other, second), *_ = launches
    assert one is other and (first.values["phase"], second.values["phase"]) == (1, 2)
    assert first.grid == second.grid > 1


def test_ids_of_all_ranks(run: Any) -> None:
    expert_map = torch.full((32,), -1, dtype=torch.int32)
    options = LayerOptions("fp8", capacity_factor=1.5)
    tensors, launches = run(make_layer(tokens=64, expert_map=expert_map), options)
    route = launches[0][1].values
    assert (route["expert_map"], route["num_ids"]) == (tensors["expert_map"], 32)
    assert route["capacity"] == 64 * TOP_K / 32 * 1.5


def test_on_the_cpu_there_are_no_launches() -> None:
    accepted, options = accept_layer(make_layer(), LayerOptions("fp8")), LayerOptions("fp8")
    chain = Chain(accepted, options, plan_workspace(accepted.layer, options, accepted.problems))
    assert not chain.links and chain.why_not is None
