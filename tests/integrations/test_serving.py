"""What vLLM's and SGLang's integration share, and their entry points: runs without either."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import cutlass_moe as cm
from cutlass_moe.integrations import plugins, serving
from cutlass_moe.integrations.experts import FP8_BLOCK, ActivationArguments
from cutlass_moe.integrations.serving import ServedExperts
from cutlass_moe.models.problems import model_problems
from cutlass_moe.models.shapes import MODELS, MoeShape

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
SWIGLU = ActivationArguments("swiglu")
QWEN3 = ServedExperts(128, 8, 2048, 768, torch.bfloat16, "int8", SWIGLU)
VERSIONS = {  # which are tested
    "vllm": {"0.33.0": True, "0.33.2": True, "0.33": True, "0.34.0": False, "0.3.3": False},
    "sglang": {"0.5.23": True, "0.5.23.post1": True, "0.5.22": False, "0.5.230": False},
}


@pytest.fixture(autouse=True)
def each_time_anew() -> None:
    serving._known.clear()
    serving.refuse.cache_clear()


class Engine(ModuleType):
    """Stands for the module that puts our kernels into an engine."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__("integration")
        self.error, self.times = error, 0

    def register(self) -> None:
        self.times += 1
        if self.error:
            raise self.error


def put(
    engine: str, version: str, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None
) -> Engine:
    """The entry point of an engine that has this version; returns what it called."""
    stand_in = Engine(error)
    monkeypatch.setattr(plugins.metadata, "version", lambda _: version)
    monkeypatch.setattr(plugins, "import_module", lambda _: stand_in)
    getattr(plugins, engine)()
    return stand_in


@pytest.mark.parametrize(
    ("engine", "version", "tested"),
    [(engine, *pair) for engine, versions in VERSIONS.items() for pair in versions.items()],
)
def test_versions(
    engine: str,
    version: str,
    tested: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Another one gets one warning and stays as it is."""
    assert put(engine, version, monkeypatch).times == int(tested)
    assert len(caplog.records) == int(not tested)
    assert tested or f"{engine} {version} is not among the versions tested" in caplog.text


@pytest.mark.parametrize("engine", VERSIONS)
def test_switched_off(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"CUTLASS_MOE_{engine.upper()}", "0")
    assert put(engine, next(iter(VERSIONS[engine])), monkeypatch).times == 0


@pytest.mark.parametrize("engine", VERSIONS)
def test_an_engine_that_is_different_stays_as_it_is(
    engine: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    surprise = AttributeError("no attribute 'backend_to_kernel_cls'")
    assert put(engine, next(iter(VERSIONS[engine])), monkeypatch, surprise).times == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "which stays as it is: AttributeError: no attribute" in record.getMessage()


def test_vllm_with_a_registry_is_taken_whatever_its_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plugins, "_is_there", lambda module: module == plugins.VLLM_REGISTRY)
    assert put("vllm", "0.40.0", monkeypatch).times == 1
    monkeypatch.undo()
    assert not plugins._is_there("cutlass_moe.no_such.module")


def test_entry_points_and_extras_name_what_is_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    entries = project["entry-points"]
    for group, engine in (("vllm.general_plugins", "vllm"), ("sglang.srt.plugins", "sglang")):
        module, _, name = entries[group]["cutlass_moe"].partition(":")
        assert getattr(sys.modules[module], name) is getattr(plugins, engine)
        (extra,) = project["optional-dependencies"][engine]
        assert all(version in extra for version in plugins.TESTED[engine])


# What kernels are asked


@pytest.mark.parametrize("quant", [None, "int8", "fp8", FP8_BLOCK])
@pytest.mark.parametrize("model", ["qwen3-30b", "glm-4.5-air", "gpt-oss-120b"])
def test_images_that_are_built_for_a_model_are_those_that_it_needs(
    model: str, quant: str | None
) -> None:
    """By `cutlass-moe build --model`, for one rank and for each of several."""
    whole = MODELS[model]
    clamped = whole.activation == "swiglu_oai"
    for shape in (whole, whole.shard(ep=2), *([] if clamped else [whole.shard(tp=2)])):
        if quant == FP8_BLOCK and (clamped or shape.inter % 128):
            continue  # which no kernel reads
        served = experts_of(shape, quant)
        assert serving.why_not(served, "engine", -1) is None
        built = set(model_problems(shape, quant or "bf16").values())
        asked = cm.fused_moe_problems(**serving.arguments(served, 1))
        assert set(asked) <= built


def experts_of(shape: MoeShape, quant: str | None) -> ServedExperts:
    bias = torch.bfloat16 if shape.bias else None
    sizes = (shape.num_experts, shape.routed.top_k, shape.hidden, shape.inter)
    activation = ActivationArguments(str(shape.activation))
    return ServedExperts(*sizes, torch.bfloat16, quant, activation, bias=bias)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"inter": 100}, "pad_experts pads the experts' inner size to 112"),
        ({"dtype": torch.float32}, "float32"),
        ({"quant": FP8_BLOCK, "interleaved": True}, "interleaved must be False for 'fp8_block'"),
        ({"activation": SWIGLU._replace(limit=-1.0)}, "limit must be positive, got -1.0"),
    ],
)
def test_why_not(changes: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture) -> None:
    experts = QWEN3._replace(**changes)
    with caplog.at_level(logging.INFO, "cutlass_moe"):
        for _ in range(3):
            assert reason in str(serving.why_not(experts, "engine", -1))
    (message,) = caplog.messages  # once
    assert message.startswith("engine: own kernels run experts: 128 experts 2048 x")


def test_strict_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTLASS_MOE_STRICT", "1")
    with pytest.raises(RuntimeError, match=r"CUTLASS_MOE_STRICT=1\): 128 experts 2048 x 100"):
        serving.why_not(QWEN3._replace(inter=100), "engine", -1)


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> list[Any]:
    """Lets the module believe in a GPU; returns the problems that are loaded there."""
    loaded: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(cm, "warmup", lambda problems, device: loaded.extend(problems))
    return loaded


def test_kernels_are_loaded_when_an_engine_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = on_a_gpu(monkeypatch)
    assert serving.why_not(QWEN3, "engine", 0) is None
    assert loaded == cm.fused_moe_problems(**serving.arguments(QWEN3, 1))
    assert serving.why_not(QWEN3, "engine", 0) is None and len(loaded) == 6


def test_other_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not on_a_gpu(monkeypatch, (8, 0))
    reason = serving.why_not(QWEN3, "engine", 0)
    assert reason == "the GPU must have capability 9.0, got 8.0"


def test_missing_images_are_a_warning_and_a_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on_a_gpu(monkeypatch)

    def missing(*_: Any) -> None:
        raise OSError("no image: build it with ...")

    monkeypatch.setattr(cm, "warmup", missing)
    assert "can't be loaded: no image" in str(serving.why_not(QWEN3, "engine", 0))
    assert [r.levelno for r in caplog.records] == [logging.WARNING]


def test_while_a_graph_is_captured_the_engine_goes_on_and_asks_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = on_a_gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "is being captured" in str(serving.why_not(QWEN3, "engine", 0)) and not loaded
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert serving.why_not(QWEN3, "engine", 0) is None and loaded


def test_scales_are_views() -> None:
    scale = torch.rand(4, 6, 1)
    assert serving.per_channel(scale).shape == (4, 6)
    assert serving.per_channel(scale).data_ptr() == scale.data_ptr()
    assert serving.per_channel(scale.bfloat16()).dtype == torch.float32


def test_workspace_size() -> None:
    call = serving.arguments(QWEN3, 77)
    assert serving.workspace_size(QWEN3, 77) == cm.fused_moe_workspace_size(**call)
