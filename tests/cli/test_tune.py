"""Tables of tuned configs, how they are measured, and `cutlass-moe tune`."""

from __future__ import annotations

import dataclasses
import json
from itertools import product

import pytest
import torch
from click.testing import CliRunner

from cutlass_moe.choose import heuristics_sm90 as heuristics
from cutlass_moe.choose import tuned
from cutlass_moe.choose.tuned import TunedConfig
from cutlass_moe.cli import main as cli
from cutlass_moe.images.cache import Cache, MissingImage
from cutlass_moe.models.problems import gemm_problems
from cutlass_moe.models.shapes import DTYPES, MODELS, MoeShape
from cutlass_moe.ops import dispatch
from cutlass_moe.runtime import library
from cutlass_moe.tune import measure
from emitters.spec.config_sm90 import GemmSm90Config
from emitters.spec.image import Image
from emitters.spec.registry import why_illegal
from tests.support.fake_images import ARCH, image_for

GPU = "NVIDIA H200"
SHAPE = MoeShape("small", 8, 2, 512, 256)
PROBLEM = gemm_problems(SHAPE, "fp8")["up"]
NAME = tuned.name_of(PROBLEM)
NARROW, WIDE, ODD = GemmSm90Config(64, 64), GemmSm90Config(128, 256), GemmSm90Config(64, 192)
TABLE = {GPU: {NAME: (TunedConfig(1.0, NARROW, 5.0), TunedConfig(16.0, WIDE, 9.0))}}


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    tuned.merge(path, TABLE)
    monkeypatch.setenv("CUTLASS_MOE_TUNING", str(path))
    return path


@pytest.mark.parametrize(
    ("rows", "config"),
    [
        (1, NARROW),
        (1.49, NARROW),
        (1.51, None),
        (0.67, NARROW),
        (0.66, None),
        (10.7, WIDE),
        (16, WIDE),
        (23.9, WIDE),
        (24.1, None),
        (0, None),
    ],
)
def test_nearest_by_ratio_answers(file, rows, config):
    assert tuned.lookup(PROBLEM, GPU, rows) == config
    expected = config or heuristics.estimate(PROBLEM, 1, rows)
    assert heuristics.choose(PROBLEM, 1, rows) == expected


def test_builds_compile_what_a_table_may_choose(file):
    assert {NARROW, WIDE} <= set(heuristics.candidates(PROBLEM))
    other = dataclasses.replace(PROBLEM, n=PROBLEM.n * 2)
    assert tuned.configs(other) == ()


def test_gather_and_epilogue_share_an_entry(file):
    """But rows in order come by TMA."""
    down = dataclasses.replace(PROBLEM, gather=False, epilogue=())
    assert tuned.lookup(down, GPU, 16) == dataclasses.replace(WIDE, tma_x=True)


def test_scales_that_vary_along_k_have_entries_of_their_own(file):
    """Two-level sums of other scales are the same in accumulation, size and dtype."""
    blocks = gemm_problems(SHAPE, "fp8_block")["up"]
    plain = dataclasses.replace(PROBLEM, accumulation=blocks.accumulation)
    assert tuned.name_of(blocks) == "e4m3 two_level 1x128, E 8, N 512, K 512"
    assert tuned.name_of(plain) == "e4m3 two_level, E 8, N 512, K 512"
    tuned.merge(file, {GPU: {tuned.name_of(plain): TABLE[GPU][NAME]}})
    assert tuned.lookup(plain, GPU, 16) == WIDE
    assert tuned.lookup(blocks, GPU, 16) is None


def test_config_that_a_problem_does_not_allow_is_not_taken(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    illegal = dataclasses.replace(WIDE, tile_n=100)
    tuned.merge(path, {GPU: {NAME: (TunedConfig(1.0, illegal, 5.0), TunedConfig(1.2, WIDE, 9.0))}})
    monkeypatch.setenv("CUTLASS_MOE_TUNING", str(path))
    assert tuned.lookup(PROBLEM, GPU, 1) == WIDE
    assert tuned.configs(PROBLEM) == (WIDE,)


def test_other_gpu_is_estimated(file):
    assert tuned.lookup(PROBLEM, "NVIDIA H100 80GB HBM3", 1) is None
    assert NARROW in tuned.configs(PROBLEM)  # where it is built is not where it runs


def test_first_file_answers(file, tmp_path, monkeypatch):
    first = tmp_path / "first.json"
    tuned.merge(first, {GPU: {NAME: (TunedConfig(1.0, ODD, 4.0),)}})
    monkeypatch.setenv("CUTLASS_MOE_TUNING", f"{first}:{file}")
    assert tuned.lookup(PROBLEM, GPU, 1) == ODD
    assert tuned.configs(PROBLEM) == (ODD,)
    monkeypatch.setenv("CUTLASS_MOE_TUNING", str(first))
    problem = gemm_problems(MODELS["mixtral"], "fp8")["up"]
    assert tuned.lookup(problem, GPU, 256) in tuned.configs(problem)  # the package's


def test_merge_keeps_what_it_does_not_replace(file):
    tuned.merge(
        file, {"NVIDIA H100": {NAME: (TunedConfig(2.0, ODD, 7.0),)}, GPU: {"x": TABLE[GPU][NAME]}}
    )
    tuned.merge(file, {GPU: {NAME: (TunedConfig(4.0, ODD, 6.04),)}})
    assert tuned.read(file) == {
        GPU: {NAME: (TunedConfig(4.0, ODD, 6.0),), "x": TABLE[GPU][NAME]},
        "NVIDIA H100": {NAME: (TunedConfig(2.0, ODD, 7.0),)},
    }
    assert list(file.parent.iterdir()) == [file]


def listed(config: object, us: object) -> str:
    return json.dumps({GPU: {NAME: [{"config": config, "us": us}]}})


BAD_TABLES = [
    ("no_file", None, "No such file"),
    ("no_json", "nonsense", "Expecting value"),
    ("list", "[]", "a table that `cutlass-moe tune` wrote"),
    ("no_configs", json.dumps({GPU: {NAME: []}}), "one or more numbers of rows"),
    ("no_us", json.dumps({GPU: {NAME: [{"config": WIDE.to_json()}]}}), "KeyError"),
    ("other_config", listed({"template": "x"}, {"1": 2.0}), "config's template must be"),
    ("no_number", listed(WIDE.to_json(), {"many": 2.0}), "many"),
    ("negative", listed(WIDE.to_json(), {"-1": 2.0}), "all positive"),
]


@pytest.mark.parametrize(
    ("text", "words"), [b[1:] for b in BAD_TABLES], ids=[b[0] for b in BAD_TABLES]
)
def test_bad_table(tmp_path, monkeypatch, text, words):
    file = tmp_path / "bad.json"
    if text is not None:
        file.write_text(text)
    monkeypatch.setenv("CUTLASS_MOE_TUNING", str(file))
    with pytest.raises(ValueError, match=words):
        heuristics.choose(PROBLEM, 1, 1.0)
    with pytest.raises(ValueError, match=words):
        heuristics.candidates(PROBLEM)


# (model, dtype) of which the shipped table has all problems
TABLED = {*product(("qwen3-30b", "mixtral", "dsv3-ep8"), ("bf16", "fp8", "int8", "fp8_block"))}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shipped_table(model, dtype):
    shape = MODELS[model]
    for problem in gemm_problems(shape, dtype).values():
        for rows in (128, 256, 512, 1024):
            config = tuned.lookup(problem, GPU, rows)
            if config is None:  # up may have tiles that gated problems can't have
                assert problem.gated or (model, dtype) not in TABLED
                config = heuristics.estimate(problem, rows * shape.num_experts, rows)
            assert config in heuristics.candidates(problem)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_space(model, dtype):
    for problem in gemm_problems(MODELS[model], dtype).values():
        space = measure.space(problem)
        assert set(heuristics.candidates(problem)) <= set(space)
        assert len(space) == len(set(space)) <= 28
        assert not any(why_illegal(problem, config) for config in space)


def test_time_configs_looks_closer_at_those_in_front():
    launches = dict.fromkeys((NARROW, WIDE, ODD), 0)
    true = {NARROW: 10.0, WIDE: 10.5, ODD: 12.0}

    def sample(config, count):
        launches[config] += count
        late = 100.0 if launches[config] == count else 0.0  # the first round is disturbed
        return [true[config] + late] + [true[config]] * (count - 1)

    us = measure.time_configs(list(true), sample)
    assert us == true
    assert launches[NARROW] == launches[WIDE] > launches[ODD] > 0


def test_hopeless_configs_miss_one_size(monkeypatch):
    """And come back: what is slow with few tokens may be the fastest with many."""
    us = {1: {NARROW: 1.0, WIDE: 9.0}, 2: {NARROW: 2.0, WIDE: 9.0}, 4: {NARROW: 9.0, WIDE: 4.0}}

    class Fake:
        of = classmethod(lambda cls, *_: cls())

        def product(self, tokens, skewed):
            return tokens, skewed

    monkeypatch.setattr(measure, "RandomOperands", Fake)
    monkeypatch.setattr(measure, "flush_buffer", lambda: None)

    def batch_us(run, launches, _):
        tokens, skewed = run
        return [us[tokens][dispatch.forced] * (4.0 if skewed else 1.0)] * launches

    monkeypatch.setattr(measure, "batch_us", batch_us)
    found = list(measure.measure(PROBLEM, 2, (NARROW, WIDE), (4, 1, 2)))
    doubled = [{c: pytest.approx(2 * t) for c, t in one.items()} for one in us.values()]
    assert [one.us for one in found] == [doubled[0], {NARROW: pytest.approx(4.0)}, doubled[2]]
    assert [one.rows_per_expert for one in found] == [0.25, 0.5, 1.0]


@pytest.mark.parametrize("skewed", [False, True])
def test_routing_to_tune_for(skewed):
    torch.manual_seed(0)
    ids = measure.random_ids(4000, 8, 2, skewed)
    assert ids.shape == (4000, 2) and bool((ids[:, 0] != ids[:, 1]).all())
    counts = torch.bincount(ids.flatten(), minlength=8)
    assert (counts[0] > 2.5 * counts[7]) == skewed
    assert bool((counts.diff() < 150).all())  # none is more popular than one before it


def test_choices_are_few():
    measured = [
        measure.Measured(1, 1.0, {NARROW: 10.0, WIDE: 11.0}),
        measure.Measured(2, 2.0, {NARROW: 10.0, WIDE: 10.1, ODD: 10.0}),
        measure.Measured(4, 4.0, {WIDE: 12.0, ODD: 12.5}),
        measure.Measured(8, 8.0, {WIDE: 20.0}),
    ]
    expected = [(1.0, NARROW, 10.0), (2.0, WIDE, 10.1), (4.0, WIDE, 12.0), (8.0, WIDE, 20.0)]
    assert measure.choices(measured) == expected


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Three images, one of which spills; nothing else may be compiled, nothing is loaded."""
    for config, spilled in ((NARROW, 0), (WIDE, 0), (ODD, 8)):
        key, image = image_for(PROBLEM, config)
        record = dataclasses.replace(image.record, spill_bytes=spilled)
        Cache([tmp_path / "root"]).store(ARCH, key, Image(image.cubin, record))
    monkeypatch.setenv("CUTLASS_MOE_CACHE_DIR", str(tmp_path / "root"))
    monkeypatch.setenv("CUTLASS_MOE_JIT", "0")
    monkeypatch.setattr(library, "load", lambda *_: None)
    monkeypatch.setattr(library, "device_arch", lambda device: ARCH)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    return tmp_path / "root"


def test_images_that_are_missing_or_spill_are_left_out(root):
    found = measure.find_images(PROBLEM, (NARROW, GemmSm90Config(64, 128), ODD, WIDE))
    assert found == measure.Images((NARROW, WIDE), missing=1, spilling=1)
    with pytest.raises(MissingImage, match="build --for-tuning"):
        measure.find_images(PROBLEM, (ODD,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["up", "down"])
def test_operands_pose_the_problem(monkeypatch, dtype, bias, name):
    """Else something is timed that the table is not asked for."""
    from cutlass_moe import grouped_matmul_problem

    for maker in ("empty", "rand", "randn"):
        make = getattr(torch, maker)
        monkeypatch.setattr(
            torch, maker, lambda *a, _make=make, **k: _make(*a, **{**k, "device": "cpu"})
        )
    problem = gemm_problems(dataclasses.replace(SHAPE, bias=bias), dtype)[name]
    run = measure.RandomOperands.of(problem, 2, 16).product(8, skewed=True)
    (out,) = run.args
    assert grouped_matmul_problem(**run.keywords) == problem
    assert out.shape == (16, problem.n)
    run()
    assert out.isfinite().all() and out.any()


def call(*words: str):
    return CliRunner().invoke(cli.main, ["tune", *map(str, words)])


def test_tune_writes_a_table(root, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "small", SHAPE)
    monkeypatch.setattr(measure, "gpu_name", lambda: "A GPU")
    monkeypatch.setattr(measure, "space", lambda problem: (NARROW, WIDE))
    monkeypatch.setattr(
        measure, "find_images", lambda problem, space: measure.Images(space, missing=3, spilling=1)
    )

    def each_tokens(problem, top_k, configs):
        for tokens in measure.TOKENS:
            yield measure.Measured(tokens, tokens * top_k / 8, {NARROW: tokens, WIDE: 64.0})

    monkeypatch.setattr(measure, "measure", each_tokens)
    monkeypatch.setattr(cli, "estimate", lambda *_: NARROW)
    output = tmp_path / "out.json"
    result = call("--model", "small", "--output", output)
    assert result.exit_code == 0, result.output
    assert "2 configs; left out are 3 that may not be compiled here and 1" in result.output
    assert "at worst 512.00 times" in result.output
    monkeypatch.setattr(cli, "estimate", lambda *_: ODD)  # whose image is missing
    assert "Without a table" not in call("--model", "small", "--output", output).output
    (entries,) = {tuple(entries) for entries in tuned.read(output)["A GPU"].values()}
    assert [e.config for e in entries] == [NARROW] * 6 + [WIDE] * 10
    assert set(tuned.read(output)["A GPU"]) == {
        tuned.name_of(problem) for problem in gemm_problems(SHAPE, "fp8").values()
    }


def test_tune_without_a_gpu_or_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "expected --model" in call().output
    result = call("--model", "mixtral", "--output", tmp_path / "out.json")
    assert result.exit_code == 1
    assert "must be a GPU of compute capability 9.0" in result.output
    assert not (tmp_path / "out.json").exists()


def test_build_for_tuning(monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "_build", lambda cache, requests, *_: asked.extend(requests) or True)
    monkeypatch.setitem(MODELS, "small", SHAPE)
    result = CliRunner().invoke(cli.main, ["build", "--model", "small", "--for-tuning"])
    assert result.exit_code == 0, result.output
    for problem in gemm_problems(SHAPE, "fp8").values():
        assert {r.config for r in asked if r.problem == problem} == set(measure.space(problem))
