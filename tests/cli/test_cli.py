"""The command line: what it accepts, prints and returns."""

from __future__ import annotations

import dataclasses
import io
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from cutlass_moe.choose.heuristics_sm90 import every_config
from cutlass_moe.cli import common, demo
from cutlass_moe.cli import main as cli
from cutlass_moe.images import compiler
from cutlass_moe.images.cache import Cache
from cutlass_moe.images.compiler import Request, build_command
from cutlass_moe.images.toolchains import default_build, default_toolchain
from cutlass_moe.models.problems import model_problems
from cutlass_moe.models.shapes import MODELS, MoeShape
from emitters.spec.config_sm90 import GemmSm90Config
from emitters.spec.gemm import GemmProblem
from emitters.spec.image import image_key
from tests.support import fake_worker
from tests.support.fake_images import ARCH, image_for

needs_dsl = pytest.mark.skipif(default_build() is None, reason="needs nvidia-cutlass-dsl")
TINY = MoeShape("tiny", 8, 2, 256, 128)
REQUESTS = [(p, c) for p in model_problems(TINY, "fp8").values() for c in every_config(p)]

STEPS = (
    "route E 8 int32",
    "route E 8 int64",
    "topk_router E 8 fp32 softmax",
    "route_logits E 8 bf16 softmax",
    "quantize bf16 > e4m3 K 256",
    "quantize bf16 > e4m3 K 128",
    "combine bf16 > bf16 N 256 k 2",
)


def call(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.main, [str(word) for word in words])


def keys(root: Path) -> set[str]:
    return {entry.key for entry in Cache([root]).entries()}


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """An empty cache; qwen3-30b is a small model."""
    monkeypatch.setenv("CUTLASS_MOE_CACHE_DIR", str(tmp_path / "root"))
    monkeypatch.setitem(MODELS, "qwen3-30b", TINY)
    return tmp_path / "root"


@pytest.fixture
def filled(root):
    """The cache as after a build of the model: images of mere bytes."""
    for problem, config in REQUESTS:
        Cache([root]).store(ARCH, *image_for(problem, config, default_build()))
    return root


@needs_dsl
def test_build_of_a_model(root, tmp_path, monkeypatch):
    """By workers that write mere bytes."""
    monkeypatch.setattr(sys, "executable", fake_worker.executable(tmp_path))
    result = call("build", "--model", "qwen3-30b", "--output", root)
    assert result.exit_code == 0, result.output
    assert keys(root) == {image_key(problem, config, "sm_90a") for problem, config in REQUESTS}
    assert len(json.loads((root / "manifest.json").read_text())["images"]) == len(REQUESTS)
    for words in ("e4m3 > bf16 E 8 N 256 K 256", *STEPS, "256 threads"):
        assert words in result.output
    assert "cached" not in result.output


@needs_dsl
def test_build_skips_what_exists(filled, monkeypatch):
    monkeypatch.setattr(compiler, "compile_images", None)
    result = call("build", "--model", "qwen3-30b")
    assert result.exit_code == 0, result.output
    assert result.output.count("cached") == len(REQUESTS)


@needs_dsl
def test_build_command_of_an_error_message_is_accepted(root, tmp_path):
    problem, config = REQUESTS[0]
    command = shlex.split(build_command(problem, config))[1:]
    more = ["--output", tmp_path / "output", "--toolchain", default_toolchain(), "--jobs", "1"]
    for options, where in (([], root), (more, tmp_path / "output")):
        result = call(*command, *options)
        assert result.exit_code == 0, result.output
        assert keys(where) == {image_key(problem, config, "sm_90a")}


@pytest.fixture
def asked(monkeypatch):
    """The problems that a build would compile."""
    asked = []

    def build_nothing(cache, requests, jobs, toolchain):
        for request in requests:
            asked.append(request.problem)
            yield compiler.Result(request, None, None)

    monkeypatch.setattr(cli, "build_images", build_nothing)
    return asked


def as_listed(shape: MoeShape) -> dict[str, object]:
    plain = dataclasses.asdict(shape)
    return {name: value for name, value in plain.items() if value is not None}


def test_build_of_files_and_names(asked, tmp_path):
    """Several models at once, of every kind of source, sharded alike."""
    config = {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 16}
    for name in "ab":
        (tmp_path / name).mkdir()
        config["num_experts"] *= 2
        text = json.dumps({**config, "num_experts_per_tok": 2})
        (tmp_path / name / "config.json").write_text(text)
    listed = [MoeShape("c", 8, 2, 128, 64), MoeShape("d", 8, 2, 256, 64, bias=True)]
    (tmp_path / "list.json").write_text(json.dumps([as_listed(one) for one in listed]))
    models = ("--model", tmp_path / "a", "--model", tmp_path / "b" / "config.json")
    others = ("--model", "qwen3-30b", "--shapes", tmp_path / "list.json")
    dtypes = ("--dtype", "int8", "--dtype", "bf16")
    result = call("build", *models, *others, *dtypes, "--tp", "2", "--ep", "8")
    assert result.exit_code == 0, result.output
    shapes = [MoeShape("a", 32, 2, 512, 256), MoeShape("b", 64, 2, 512, 256), TINY, *listed]
    ranks = [shape.shard(tp=2, ep=8) for shape in shapes]
    expected = [
        model_problems(rank, dtype).values() for rank in ranks for dtype in ("int8", "bf16")
    ]
    assert set(asked) == {problem for pair in expected for problem in pair}
    gemms = [problem for problem in asked if isinstance(problem, GemmProblem)]
    assert {problem.num_experts for problem in gemms} == {4, 8, 1}


def test_training_adds_what_it_launches(root, monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "_build", lambda _, requests, *__: asked.extend(requests) or True)
    words = ("--model", "qwen3-30b", "--dtype", "bf16")
    assert call("build", *words, "--training").exit_code == 0
    problems = model_problems(TINY, "bf16", training=True).values()
    assert {request.problem for request in asked} == set(problems)
    assert len(problems) == len(set(problems))
    ops = {problem.op for problem in set(problems) - set(model_problems(TINY, "bf16").values())}
    assert ops == {"grouped_gemm", "weight_grad", "activate", "activate_backward"}
    gemms = [problem for problem in problems if isinstance(problem, GemmProblem)]
    assert sum(problem.stored for problem in gemms) == 2  # of weights with K and with N dense
    assert sum(problem.gradient is not None for problem in gemms) == 2
    result = call("verify", *words, "--training")
    assert "missing: " in result.output and "up gradient k added" in result.output
    assert "--dtype=bf16 --training" in result.output


@needs_dsl
def test_one_failure_of_many_shows_in_the_exit_code(root, monkeypatch):
    problem, config = REQUESTS[0]
    monkeypatch.setattr(cli, "why_illegal", lambda *_: None)
    monkeypatch.setattr(cli, "every_config", lambda _: (config, GemmSm90Config(tile_n=100)))
    monkeypatch.setattr(common, "model_problems", lambda *_: {"up": problem})
    result = call("build", "--model", "qwen3-30b")
    assert result.exit_code == 1
    assert "Failed:" in result.output
    assert "got 100" in result.output
    assert len(list(Cache([root]).entries())) == 1


PROBLEM = '{"op":"grouped_gemm","x":"e4m3","accumulation":"fast","out":"bf16","n":%d,"k":256,'
PROBLEM += '"num_experts":8,"gather":true,"epilogue":[],'
PROBLEM += '"weight":{"dtype":"e4m3","major":"k","storage":"stacked"}}'
REFUSED = [
    ("nothing_to_build", ("build",), 2, "either --model"),
    ("both", ("build", "--model", "mixtral", "--problem", PROBLEM % 256), 2, "either --model"),
    ("config_of_a_model", ("build", "--model", "mixtral", "--config", "{}"), 2, "either --model"),
    ("unknown_model", ("build", "--model", "bert"), 2, "qwen3-30b"),
    ("unknown_dtype", ("build", "--model", "mixtral", "--dtype", "fp4"), 2, "fp8"),
    ("unknown_arch", ("build", "--model", "mixtral", "--arch", "sm_80"), 2, "sm_90a"),
    ("no_json", ("build", "--problem", "nonsense"), 2, "--problem"),
    ("json_of_a_list", ("build", "--problem", "[1]"), 2, "--problem"),
    ("other_op", ("build", "--problem", '{"op": "sort"}'), 2, "grouped_gemm"),
    ("other_config", ("build", "--problem", PROBLEM % 256, "--config", "{}"), 2, "gemm_sm90"),
    ("illegal", ("build", "--problem", PROBLEM % 3), 1, "must be a multiple of"),
    ("tp_of_a_problem", ("build", "--problem", PROBLEM % 256, "--tp", "2"), 2, "either --model"),
    ("tuning", ("build", "--problem", PROBLEM % 256, "--for-tuning"), 2, "either --model"),
    ("training", ("build", "--problem", PROBLEM % 256, "--training"), 2, "either --model"),
    ("training_in_fp8", ("build", "--model", "mixtral", "--training"), 2, "bf16, got fp8"),
    ("tp", ("build", "--model", "mixtral", "--tp", "3"), 2, "tp 3 does not divide inter 14336"),
    ("no_tp", ("build", "--model", "mixtral", "--tp", "0"), 2, "--tp"),
    ("ep", ("build", "--model", "mixtral", "--ep", "16"), 2, "ep 16 does not divide 8 experts"),
    ("no_config", ("build", "--model", "/no/such/model"), 2, "'/no/such/model' is no config.json"),
    ("no_moe", ("build", "--model", __file__), 2, "test_cli.py: Extra data"),
    ("no_shapes", ("build", "--shapes", "/no/such/file"), 2, "does not exist"),
    ("bad_shapes", ("build", "--shapes", __file__), 2, "test_cli.py: Extra data"),
    ("toolchain", ("build", "--model", "mixtral", "--toolchain", "cu11"), 2, "cu13"),
    ("file", ("build", "--model", "mixtral", "--output", __file__), 2, "or a .zip file, got"),
    ("no_tokens", ("show-config", "mixtral", "--tokens", "0"), 2, "0"),
    ("no_routing", ("demo", "--topk-ids", "/no/such/file"), 2, "does not exist"),
    ("two_routings", ("demo", "--topk-ids", __file__, "--tokens", "4"), 2, "either --tokens"),
]


@pytest.mark.parametrize(
    ("words", "code", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_refused(root, words, code, message):
    result = call(*words)
    assert result.exit_code == code
    assert message in result.output
    assert not root.exists()


def test_build_without_permission(monkeypatch):
    monkeypatch.setattr(Cache, "writable", False)
    result = call("build", "--model", "qwen3-30b")
    assert result.exit_code == 1
    assert "no permission to write" in result.output


@pytest.mark.parametrize("command", ["build", "demo"])
def test_untrusted_root_is_refused(root, command):
    root.mkdir()
    root.chmod(0o777)
    result = call(command, "--model", "qwen3-30b")
    assert result.exit_code == 1
    assert "images are code" in result.output


def test_directory_in_the_way_of_an_archive(tmp_path):
    (tmp_path / "a.zip").mkdir()
    result = call("build", "--model", "mixtral", "--output", tmp_path / "a.zip")
    assert result.exit_code == 2
    assert "or a .zip file, got" in result.output


def test_build_without_the_toolchain(monkeypatch):
    monkeypatch.setattr(
        "emitters.spec.identity._installed", lambda package: not package.endswith("cu13")
    )
    result = call("build", "--model", "qwen3-30b", "--toolchain", "cu13")
    assert result.exit_code == 1
    assert "pip install 'cutlass-moe[jit-cu13]'" in result.output


def test_build_without_the_dsl(monkeypatch):
    monkeypatch.setattr("emitters.spec.identity._installed", lambda package: False)
    result = call("build", "--model", "qwen3-30b")
    assert result.exit_code == 1
    assert "pip install 'cutlass-moe[jit]'" in result.output


@needs_dsl
def test_clear_cache(filled):
    assert f"{len(REQUESTS)} images removed" in call("clear-cache").output
    assert list(Cache([filled]).entries()) == []
    assert "0 images removed" in call("clear-cache").output


@pytest.mark.parametrize("model", MODELS)
def test_show_config(model):
    result = call("show-config", model, "--tokens", "1", "--tokens", "4096", "--dtype", "int8")
    assert result.exit_code == 0, result.output
    assert f"{MODELS[model].name} up: int8 > bf16" in result.output
    assert result.output.count(" 4096 ") >= 2


def test_show_config_of_a_rank_says_what_is_padded():
    rank = ("show-config", "gpt-oss-120b", "--tp", "8", "--tokens", "1", "--dtype")
    result = call(*rank, "fp8")
    words = " ".join(result.output.split())
    assert result.exit_code == 0, result.output
    assert "gpt-oss-120b-tp8 down: e4m3 > bf16 E 128 N 2880 K 368" in words
    assert "inter 360 is padded with zeros to 368 for fp8 weights; cutlass_moe.pad_experts" in words
    assert "padded" not in call(*rank, "bf16").output


@pytest.mark.parametrize("dtype", ["fp8", "int8", "bf16"])
@pytest.mark.parametrize("model", ["gpt-oss-120b", "nemotron-3-nano"])
def test_build_of_a_rank_of_eight(monkeypatch, model, dtype):
    """Whose experts have 360 and 232 columns: rows of 8-bit weights are padded."""
    asked: list[Request] = []
    monkeypatch.setattr(cli, "_build", lambda cache, requests, *_: asked.extend(requests) or True)
    file = Path(__file__).parents[1] / "models" / "configs" / f"{model}.json"
    result = call("build", "--model", file, "--tp", "8", "--dtype", dtype)
    assert result.exit_code == 0, result.output
    inter = {"gpt-oss-120b": (360, 368), "nemotron-3-nano": (232, 240)}[model][dtype != "bf16"]
    sizes = {r.problem.k for r in asked if isinstance(r.problem, GemmProblem)}
    assert inter in sizes and len(sizes) == 2


def test_build_of_a_width_that_no_kernel_takes(monkeypatch):
    monkeypatch.setitem(MODELS, "mixtral", dataclasses.replace(TINY, hidden=40_000))
    result = call("build", "--model", "mixtral")
    assert result.exit_code == 1 and "got 40000" in result.output


@pytest.mark.parametrize("inter", [120, 128])
def test_demo_says_why_there_is_no_kernel(monkeypatch, inter):
    """Not of an inner size that is padded, but of a width that kernels do not have."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for width in (250, 256):
        shape = dataclasses.replace(TINY, hidden=width, inter=inter)
        output = io.StringIO()
        assert demo.run(shape, "int8", Console(file=output, width=200))
        assert ("No kernel for the layer: K must be" in output.getvalue()) == (width == 250)


@needs_dsl
def test_demo_without_a_gpu(filled, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = call("demo", "--tokens", "5")
    assert result.exit_code == 0, result.output
    assert "No SM90 GPU" in result.output
    assert result.output.count("cached") == len(REQUESTS)
    assert result.output.count(" 10 ") >= 2, result.output  # rows: tokens x top_k


@needs_dsl
def test_demo_of_a_saved_routing(filled, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    ids = np.array([[0, 7], [0, -1], [8, 0]], dtype=np.int32)  # -1 and 8 take no rows
    np.save(tmp_path / "ids.npy", ids)
    result = call("demo", "--topk-ids", tmp_path / "ids.npy")
    assert result.exit_code == 0, result.output
    assert result.output.count(" 4 ") >= 2, result.output


BAD_ROUTINGS = [
    ("one_dimension", np.zeros(3, np.int32), "[tokens, top_k]"),
    ("floats", np.zeros((3, 2)), "int32 or int64"),
    ("no_tokens", np.zeros((0, 2), np.int32), "[0, 2]"),
    ("no_expert", np.full((3, 2), 8), "[0, 8)"),
]


@needs_dsl
@pytest.mark.parametrize(
    ("ids", "message"), [r[1:] for r in BAD_ROUTINGS], ids=[r[0] for r in BAD_ROUTINGS]
)
def test_demo_of_a_bad_routing(filled, tmp_path, monkeypatch, ids, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    np.save(tmp_path / "ids.npy", ids)
    result = call("demo", "--topk-ids", tmp_path / "ids.npy")
    assert result.exit_code == 1
    assert message in result.output


@needs_dsl
@pytest.mark.parametrize("limit", ["ERROR_LIMIT", "LAYER_ERROR_LIMIT"])
def test_demo_whose_results_are_wrong_fails(filled, monkeypatch, limit):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(f"cutlass_moe.cli.demo.{limit}", 1e-9)
    assert call("demo").exit_code == 1


@pytest.mark.parametrize("dtype", ["fp8", "int8", "bf16"])
@pytest.mark.parametrize("bias", [False, True])
def test_demo_without_the_dsl_runs_the_reference(monkeypatch, dtype, bias):
    monkeypatch.setitem(MODELS, "qwen3-30b", dataclasses.replace(TINY, bias=bias))
    monkeypatch.setattr("emitters.spec.identity._installed", lambda package: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = call("demo", "--dtype", dtype)
    assert result.exit_code == 0, result.output
    assert "Nothing compiled" in result.output


def test_as_a_program():
    program = "from cutlass_moe.cli.main import main; main()"
    command = [sys.executable, "-c", program, "show-config", "mixtral"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "mixtral down" in ended.stdout


def test_without_click_it_names_the_extra():
    program = "import sys; sys.modules['click'] = None; import cutlass_moe.cli.main"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "pip install 'cutlass-moe[cli]'" in ended.stderr
