"""From a problem to an image, and what is said where there is none or the driver is too old."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import shlex

import pytest

import cutlass_moe
from cutlass_moe.choose.heuristics_sm90 import every_config
from cutlass_moe.images.cache import Cache, MissingImage
from cutlass_moe.images.compiler import build_command
from cutlass_moe.images.toolchains import why_unloadable
from cutlass_moe.models.problems import gemm_problems, model_problems
from cutlass_moe.models.shapes import MODELS
from cutlass_moe.runtime import kernel, library
from cutlass_moe.runtime.driver import DriverError
from cutlass_moe.runtime.kernel import Kernel
from cutlass_moe.runtime.launch import Launch
from emitters.spec.config_sm90 import GemmSm90Config
from emitters.spec.dtypes import DType
from emitters.spec.epilogue import Bias
from emitters.spec.image import Param, ParamKind
from emitters.spec.layer_steps import RouteProblem, StepConfig
from tests.support.fake_images import ARCH, image_for, make_image

PROBLEM = gemm_problems(MODELS["mixtral"], "fp8")["up"]
CONFIG = GemmSm90Config(128, 256)
MIXTRAL = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
}


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("CUTLASS_MOE_CACHE_DIR", str(tmp_path / "root"))
    monkeypatch.setattr(library, "compile_image", None)
    monkeypatch.setattr(library, "default_build", lambda: "today")
    return tmp_path / "root"


def store(root, problem=PROBLEM, config=CONFIG):
    key, image = image_for(problem, config)
    Cache([root]).store(ARCH, key, image)
    return key, image


def test_image_is_compiled_on_a_miss_once(root, monkeypatch):
    _, image = image_for(PROBLEM, CONFIG)
    compiled = []
    monkeypatch.setattr(library, "compile_image", lambda *asked: compiled.append(asked) or image)
    for _ in range(2):
        assert library.find_image(PROBLEM, CONFIG, ARCH) == image
    assert compiled == [(PROBLEM, CONFIG, ARCH)]


def test_image_that_is_there_needs_no_jit(root, monkeypatch):
    _, image = store(root)
    monkeypatch.setenv("CUTLASS_MOE_JIT", "0")
    assert library.find_image(PROBLEM, CONFIG, ARCH) == image


NEAREST = [
    ("nothing", [], "There are no images of grouped_gemm at all."),
    ("config", [(PROBLEM, GemmSm90Config(64, 256))], "is for tile_m 64, not 128."),
    (
        "problem_before_config",
        [
            (dataclasses.replace(PROBLEM, k=256), CONFIG),
            (PROBLEM, GemmSm90Config(64, 128, group_m=4)),
        ],
        "is for tile_m 64, not 128; tile_n 128, not 256; group_m 4, not 8.",
    ),
    (
        "fewest_fields",
        [
            (dataclasses.replace(PROBLEM, k=256, n=512), CONFIG),
            (dataclasses.replace(PROBLEM, gather=False), CONFIG),
        ],
        "is for gather false, not true.",
    ),
    (
        "scale",
        [(dataclasses.replace(PROBLEM, weight_scale=None), CONFIG)],
        'is for weight_scale null, not "channel".',
    ),
    (
        "epilogue",
        [(dataclasses.replace(PROBLEM, epilogue=(Bias(DType.BF16),)), CONFIG)],
        'is for epilogue [{"dtype": "bf16", "kind": "bias"}], not [].',
    ),
]


@pytest.mark.parametrize(("there", "words"), [n[1:] for n in NEAREST], ids=[n[0] for n in NEAREST])
def test_missing_image_is_an_error_that_says_what_to_do(root, monkeypatch, there, words):
    for problem, config in there:
        store(root, problem, config)
    monkeypatch.setenv("CUTLASS_MOE_JIT", "0")
    with pytest.raises(MissingImage) as raised:
        library.find_image(PROBLEM, CONFIG, ARCH)
    told = str(raised.value)
    for part in (repr(PROBLEM), repr(CONFIG), str(root), "CUTLASS_MOE_JIT=0", words):
        assert part in told
    assert ("(does not exist)" in told) == (not there)
    command = told.splitlines()[-1]
    assert command == build_command(PROBLEM, CONFIG, ARCH)
    assert shlex.split(command)[:2] == ["cutlass-moe", "build"]


def test_nearest_image_of_a_step(root, monkeypatch):
    """One of the same op, though others have more fields in common."""
    asked, config = RouteProblem(128, 64), StepConfig(1024)
    store(root, dataclasses.replace(PROBLEM, num_experts=128), CONFIG)
    monkeypatch.setenv("CUTLASS_MOE_JIT", "0")
    with pytest.raises(MissingImage, match="There are no images of route at all"):
        library.find_image(asked, config, ARCH)
    store(root, RouteProblem(64, 32), StepConfig(256))
    words = "is for num_experts 64, not 128; id_bits 32, not 64; threads 256, not 1024."
    with pytest.raises(MissingImage, match=words):
        library.find_image(asked, config, ARCH)


def test_missing_image_without_the_compiler(root, monkeypatch):
    monkeypatch.setattr(library, "default_build", lambda: None)
    with pytest.raises(MissingImage, match="nvidia-cutlass-dsl is not installed"):
        library.find_image(PROBLEM, CONFIG, ARCH)


@pytest.mark.parametrize(
    ("build", "cuda", "words"),
    [
        ("nvidia-cutlass-dsl 4.8.1 cu13 emitters 12ab", 12080, "CUDA 12.8: update it, or build"),
        ("nvidia-cutlass-dsl 4.8.1 cu13 emitters 12ab", 12080, "R580 or newer (CUDA 13.0)"),
        ("nvidia-cutlass-dsl 4.8.1 cu13 emitters 12ab", 12080, "with the cu12 toolchain"),
        (
            "nvidia-cutlass-dsl 4.8.1 cu12 emitters 12ab",
            11040,
            "supports CUDA 11.4: update it",
        ),
        ("nvidia-cutlass-dsl 5.1 cu14 emitters 12ab", 13020, "a later branch"),
        ("nvidia-cutlass-dsl 4.8.1 cu13 emitters 12ab", 13000, None),
        ("nvidia-cutlass-dsl 4.8.1 cu12 emitters cu99", 12000, None),
        ("nvidia-cutlass-dsl 4.8.1 cu13 emitters 12ab", None, None),
        ("another compiler", 12000, None),
    ],
)
def test_driver_of_an_image(build, cuda, words):
    reason = why_unloadable(build, cuda)
    assert reason is None if words is None else words in reason


def test_kernel_for_a_newer_driver_is_not_even_loaded(monkeypatch):
    _, image = image_for(PROBLEM, CONFIG, "nvidia-cutlass-dsl 4.8.1 cu13 emitters 0")
    monkeypatch.setattr(kernel, "driver_cuda", lambda: 12040)
    monkeypatch.setattr("torch.cuda.device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr("torch.cuda.current_stream", lambda: None)
    monkeypatch.setattr(kernel.driver, "cuModuleLoadData", None)
    with pytest.raises(DriverError, match=r"n.: 28672.*R580 or newer .*CUDA 12\.4"):
        Kernel(image, 0)


CLUSTER, SERIALIZATION = 4, 6  # launch attributes of the driver


def test_repeated_launch_changes_what_is_set(monkeypatch):
    seen, status = [], [0]

    def enqueue(config, function, arguments, extra):
        pointers = ctypes.cast(arguments, ctypes.POINTER(ctypes.POINTER(ctypes.c_int64)))
        attributes = [int(attribute.id) for attribute in config.attrs[: config.numAttrs]]
        values = [pointers[i][0] for i in range(3)]
        seen.append((values, config.gridDimX, int(config.hStream), attributes))
        return (status[0],)

    params = tuple(Param(name, ParamKind.POINTER, 8, 8 * i) for i, name in enumerate("abc"))
    record = dataclasses.replace(make_image().record, params=params, cluster=(2, 1, 1))
    monkeypatch.setattr(kernel.driver, "cuLaunchKernelEx", enqueue)
    repeated = Launch(0, record)
    repeated.fill([1, 2, -3])
    repeated.shape(4, overlap=True)
    repeated(5)
    repeated.values[1] = 7
    repeated(6)
    repeated.shape(8, overlap=False)
    repeated(6)
    assert seen == [
        ([1, 2, -3], 4, 5, [CLUSTER, SERIALIZATION]),
        ([1, 7, -3], 4, 6, [CLUSTER, SERIALIZATION]),
        ([1, 7, -3], 8, 6, [CLUSTER]),
    ]
    status[0] = 1
    with pytest.raises(DriverError, match="CUDA_ERROR_INVALID_VALUE"):
        repeated(6)


@pytest.mark.parametrize(
    ("asked", "options", "words"),
    [
        ("bert", {}, "'bert' is no config.json.*qwen3-30b"),
        ("mixtral", {"dtype": "fp4"}, "int8.*'fp4'"),
    ],
)
def test_warmup_of_an_unknown_model_or_dtype(asked, options, words):
    with pytest.raises(ValueError, match=words):
        cutlass_moe.warmup(asked, **options)


@pytest.mark.parametrize("source", ["name", "file", "problems"])
def test_warmup_loads_every_config_once(root, tmp_path, monkeypatch, source):
    asked = model_problems(MODELS["mixtral"], "bf16").values()
    wanted = [(p, c) for p in asked for c in every_config(p)]
    images = dict(store(root, *pair) for pair in wanted)
    loaded = []
    monkeypatch.setenv("CUTLASS_MOE_JIT", "0")
    monkeypatch.setattr(library, "_kernels", {})
    monkeypatch.setattr(library, "device_arch", lambda device: ARCH)
    monkeypatch.setattr(library, "Kernel", lambda image, device: loaded.append((image, device)))
    monkeypatch.setattr("torch.cuda._utils._get_device_index", lambda device, optional: 3)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    model = {"name": "mixtral", "file": str(tmp_path), "problems": asked}[source]
    for _ in range(2):
        cutlass_moe.warmup(model, 3, dtype="bf16")
    assert loaded == [(image, 3) for image in images.values()]
