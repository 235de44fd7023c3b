"""Every family's config.json, as it is published, and what must be derived from it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cutlass_moe.choose.heuristics_sm90 import every_config
from cutlass_moe.models.families import FAMILIES, Family
from cutlass_moe.models.files import Model, find_model, find_shape, read_model
from cutlass_moe.models.problems import model_problems, problems_of_shape
from cutlass_moe.models.shapes import DTYPES, MODELS, MoeShape, Routed
from emitters.spec.registry import why_illegal

CONFIGS = Path(__file__).parent / "configs"
README = Path(__file__).parents[2] / "cutlass_moe/models/README.md"
# Whose copies of published files these are. SNAPSHOT: with revision and checksum; it leaves
# quantization_config out, which then is the one that the card of the model describes.
SNAPSHOT = "github.com/BrendanJamesLynskey/llm-architectures-explained, data/hf"
CARD = "huggingface.co, the model's own config.json"
CODE = "transformers 5.24.0, configuration and modeling files"
FLOATS = ("bf16", "fp32")  # dtypes of logits
NO_KERNEL = "the products are built without"


@dataclass(frozen=True)
class Case:
    """file: of CONFIGS. sources: where its fields are from. notes: one for each in Model.notes, of
    which it is a part. layers: what words say of them; beside: the width of what all tokens see."""

    file: str
    sources: tuple[str, ...]
    shape: MoeShape
    layers: str
    beside: int = 0
    notes: tuple[str, ...] = ()
    dtype: str = "fp8"


def case(file: str, sources: tuple[str, ...], *sizes: object, **rest: object) -> Case:
    """sizes and what MoeShape has of rest are the shape's."""
    own = {name: rest.pop(name) for name in ("layers", "beside", "notes", "dtype") if name in rest}
    return Case(file, sources, MoeShape(file, *sizes, **rest), **own)  # type: ignore[arg-type]


SIGMOID = {"scoring": "sigmoid"}
CASES = (
    case("mixtral-8x7b", (SNAPSHOT,), 8, 2, 4096, 14336, layers="all 32 layers"),
    case("qwen1.5-moe", (SNAPSHOT,), 60, 4, 2048, 1408, layers="all 24 layers", beside=5632),
    case("qwen3-30b", (SNAPSHOT,), 128, 8, 2048, 768, layers="all 48 layers"),
    case("qwen3-next", (SNAPSHOT,), 512, 10, 2048, 512, layers="all 48 layers", beside=512),
    case("qwen3.5-397b", (SNAPSHOT,), 512, 10, 4096, 1024, layers="all 60 layers", beside=1024),
    case(
        "deepseek-v2",
        (SNAPSHOT,),
        *(160, 6, 5120, 1536),
        num_groups=8,
        layers="layers 1 to 59 of 60",
        beside=3072,
        notes=("topk_router goes by the sum of a group's best two",),
    ),
    case(
        "deepseek-v3",
        (SNAPSHOT, CARD),
        *(256, 8, 7168, 2048),
        **SIGMOID,
        num_groups=8,
        layers="layers 3 to 60 of 61",
        beside=2048,
        dtype="fp8_block",
    ),
    case(
        "kimi-k2.5",  # without the generation fields and most of the vision tower's
        (SNAPSHOT, CARD),
        *(384, 8, 7168, 2048),
        **SIGMOID,
        layers="layers 1 to 60 of 61",
        beside=2048,
        dtype="int4_g32",
    ),
    case(
        "glm-4.5-air",
        (SNAPSHOT,),
        *(128, 8, 4096, 1408),
        **SIGMOID,
        layers="layers 1 to 45 of 46",
        beside=1408,
    ),
    case(  # no field says sigmoid: the code does
        "glm-4.7-flash",
        ("a copy with one field more at huggingface.co/naaviii/glm-code-next-4b", CODE),
        *(64, 4, 2048, 1536),
        **SIGMOID,
        layers="layers 1 to 46 of 47",
        beside=1536,
    ),
    case(  # scoring_func holds noaux_tc, and the code is sigmoid
        "dots.llm1",
        ("huggingface.co/rednote-hilab/dots.llm1.base", CODE),
        *(128, 6, 4096, 1408),
        **SIGMOID,
        layers="layers 1 to 61 of 62",
        beside=2816,
    ),
    case(
        "deepseek-v4-flash",
        (SNAPSHOT, CARD, CODE),
        *(256, 6, 4096, 2048),
        activation="swiglu_oai",
        scoring="sqrtsoftplus",
        layers="all 43 layers",
        beside=2048,
        notes=(
            "swiglu_oai with numbers of its own: call it with limit=10, alpha=1, beta=0",
            "asks for experts of fp4",
            "the first 3 layers take experts by a hash",
        ),
    ),
    case(  # sizes of Ling-2.5-1T's file, keys of Ring-mini-2.0's, of which it is the large sister
        "ling-1t",
        (
            "huggingface.co/inclusionAI/Ring-mini-sparse-2.0-exp for the keys",
            f"{SNAPSHOT}, Ling-2.5-1T, for the sizes",
        ),
        *(256, 8, 8192, 2048),
        **SIGMOID,
        num_groups=8,
        layers="layers 4 to 79 of 80",
        beside=2048,
    ),
    case(
        "ling-2.5-1t",
        (SNAPSHOT,),
        *(256, 8, 8192, 2048),
        **SIGMOID,
        num_groups=8,
        layers="layers 4 to 79 of 80",
        beside=2048,
    ),
    case(
        "ling-coder-lite",
        ("huggingface.co/inclusionAI/Ling-Coder-lite",),
        *(64, 6, 2048, 1408),
        layers="all 28 layers",
        beside=2816,
    ),
    case(
        "trinity-large",
        (SNAPSHOT,),
        *(256, 4, 3072, 3072),
        **SIGMOID,
        layers="layers 6 to 59 of 60",
        beside=3072,
    ),
    case(
        "nemotron-3-nano",
        (SNAPSHOT, CODE),
        *(128, 6, 2688, 1856),
        **SIGMOID,
        activation="relu2",
        gated=False,
        layers="23 layers from 1 to 51 of 52",
        beside=3712,
    ),
    case(
        "nemotron-3-super",
        (SNAPSHOT, CODE),
        *(512, 22, 1024, 2688),
        **SIGMOID,
        activation="relu2",
        gated=False,
        layers="40 layers from 1 to 87 of 88",
        beside=5376,
        notes=("its experts see 1024 columns",),
    ),
    case(
        "gpt-oss-120b",
        (SNAPSHOT, CARD),
        *(128, 4, 2880, 2880),
        bias=True,
        activation="swiglu_oai",
        layers="all 36 layers",
        dtype="mxfp4",
    ),
    case(
        "llama-4-maverick",
        ("github.com/ai-dynamo/aiconfigurator, model_configs", CODE),
        *(128, 1, 5120, 8192),
        **SIGMOID,
        layers="layers 1, 3, ... 47 of 48",
        beside=8192,
        notes=("multiplied with the experts' input",),
    ),
    case(
        "minimax-m2",
        (SNAPSHOT, CARD),
        *(256, 8, 3072, 1536),
        **SIGMOID,
        layers="all 62 layers",
        dtype="fp8_block",
    ),
    case(  # the code takes tanh's approximation of GELU, whatever a field says
        "grok-2",
        (SNAPSHOT,),
        *(8, 2, 8192, 16384),
        activation="geglu_tanh",
        layers="all 64 layers",
        beside=32768,
        notes=("30.0 * tanh",),
    ),
    case(  # rope_scaling, two lists of 64 numbers, is left out
        "phi-3.5-moe",
        ("huggingface.co/optimum-intel-internal-testing/phi-3.5-moe-tiny-random", CODE),
        *(16, 2, 4096, 6400),
        scoring=None,
        layers="all 32 layers",
        notes=("its router is sparsemixer, topk_router has softmax, sigmoid",),
    ),
    case(  # sizes of copies of the file in tests, defaults and meaning of the code
        "ernie-4.5-21b",
        ("copies in github.com repositories' tests", CODE),
        *(64, 6, 2560, 1536),
        layers="layers 1 to 27 of 28",
        beside=3072,
    ),
    case(  # vision_config is shortened; moe_capacity and im_patch_id are the card's
        "ernie-4.5-vl-28b",
        ("copies in github.com repositories' tests", CARD, CODE),
        *(64, 6, 2560, 1536),
        layers="layers 1 to 27 of 28",
        beside=3072,
        notes=("the experts of images, of inter 512, are a layer of their own",),
    ),
    case(  # keys of Hunyuan-7B-Pretrain's file, of the same code; sizes of the model's card
        "hunyuan-a13b",
        ("huggingface.co/tencent/Hunyuan-7B-Pretrain for the keys", CARD, CODE),
        *(64, 8, 4096, 3072),
        layers="all 32 layers",
        beside=3072,
    ),
    case("jamba", (SNAPSHOT,), 16, 2, 4096, 14336, layers="layers 1, 3, ... 31 of 32"),
    case("olmoe", (SNAPSHOT,), 64, 8, 2048, 1024, layers="all 16 layers"),
    case(
        "dbrx",
        ("huggingface.co/LnL-AI/dbrx-base-converted-v2, a copy", CODE),
        *(16, 4, 6144, 10752),
        layers="all 40 layers",
    ),
    case(  # vision_config is shortened
        "step-3",
        ("huggingface.co/stepfun-ai/step3",),
        *(48, 3, 7168, 5120),
        layers="layers 4 to 59 of 61",
        beside=5120,
    ),
    case(
        "step-3.5-flash",
        (SNAPSHOT,),
        *(288, 8, 4096, 1280),
        **SIGMOID,
        layers="layers 3 to 44 of 45",
        beside=1280,
        notes=("in layers 43 to 44 silu(gate) and up are limited (swiglu_limits 7)",),
    ),
    case(
        "longcat-flash",
        ("huggingface.co/mlx-community/LongCat-Flash-Chat-bf16, a copy", CODE),
        *(512, 8, 6144, 2048),
        all_ranks=Routed(768, 12),
        layers="all 28 layers",
        notes=("256 ids behind the experts' mean the token itself",),
    ),
    case(  # no model_type: found by its architecture
        "longcat-flash-lite",
        (SNAPSHOT,),
        *(256, 8, 3072, 1024),
        all_ranks=Routed(384, 12),
        layers="all 14 layers",
        notes=("128 ids behind the experts' mean the token itself",),
    ),
    case(  # vision_config is shortened
        "gemma-4-26b-a4b",
        (SNAPSHOT, CODE),
        *(128, 8, 2816, 704),
        activation="geglu_tanh",
        layers="all 30 layers",
        beside=2112,
        notes=("normalises hidden before the logits",),
    ),
)
every_case = pytest.mark.parametrize("one", CASES, ids=lambda one: one.file)


def read(file: str) -> Model:
    return read_model(CONFIGS / f"{file}.json")


def test_every_file_is_a_case() -> None:
    assert {one.file for one in CASES} == {path.stem for path in CONFIGS.iterdir()}
    assert all(one.sources for one in CASES)


@every_case
def test_what_is_derived(one: Case) -> None:
    model = read(one.file)
    assert model.shape == one.shape
    assert model.dtype == one.dtype
    beside = f", beside them one MLP of inter {one.beside} for every token" if one.beside else ""
    assert model.words == f"experts in {one.layers}{beside}"
    assert len(model.notes) == len(one.notes), model.notes
    for note, part in zip(model.notes, one.notes, strict=True):
        assert part in note


@every_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_exist(one: Case, dtype: str) -> None:
    problems = model_problems(one.shape, dtype)
    for problem in problems.values():
        assert every_config(problem)
        assert all(why_illegal(problem, config) is None for config in every_config(problem))
    assert ("activated" in problems) == (one.shape.activation is not None)
    assert ("topk_router bf16" in problems) == (one.shape.scoring is not None)
    assert problems["up"].n == one.shape.gemms["up"].n


def test_named_shapes_are_those_of_files() -> None:
    files = {"mixtral": "mixtral-8x7b", "qwen3-30b": "qwen3-30b", "qwen3-next": "qwen3-next"}
    files |= {"dsv3": "deepseek-v3", "kimi-k2": "kimi-k2.5", "glm-4.5-air": "glm-4.5-air"}
    files |= {"llama4-maverick": "llama-4-maverick", "gpt-oss-120b": "gpt-oss-120b"}
    for name, file in files.items():
        assert replace(read(file).shape, name=name) == MODELS[name]


# The manual's table

HEAD = (
    "| model_type or architecture | fields of experts, k, hidden, inter | activation | router "
    "| experts' tensors |"
)


def row(family: Family) -> str:
    """One line of the table: the family, where its fields are, and the files that test it."""
    tested = [one.file for one in CASES if is_of(one, family)]
    sizes = (family.experts, family.top_k, family.hidden, family.inter)
    shown = ", ".join(" or ".join(f"`{name}`" for name in names) for names in sizes)
    act = family.activation or " or ".join(f"`{name}`" for name in family.act) or family.default_act
    gated = act if family.gated else f"{act}, no gate"
    scoring = " or ".join(f"`{name}`" for name in family.scoring)
    router = f"{scoring}, else {family.default_scoring}"
    names, tensors = ", ".join(family.types), "not read"
    if family.tensors is not None:
        ends = ", ".join(family.tensors.projections[0 if family.gated else 1 :])
        tensors = f"`{family.tensors.experts}`: {ends}"
    return f"| {names} | {shown} | {gated} | {router} | {tensors} | {', '.join(tested)} |"


def is_of(one: Case, family: Family) -> bool:
    plain = json.loads((CONFIGS / f"{one.file}.json").read_text())
    inside = plain.get("text_config", plain)
    names = [*inside.get("architectures", []), inside.get("model_type")]
    return next((f for f in (owner(name) for name in names) if f), None) is family


def owner(name: str | None) -> Family | None:
    return next((family for family in FAMILIES if name in family.types), None)


def test_manual_has_the_table() -> None:
    """And every family is tested."""
    lines = [row(family) for family in FAMILIES]
    assert not [line for line in lines if line.endswith("|  |")]
    text = README.read_text()
    found = [line for line in text.splitlines() if line.startswith("| ") and line[2] != "-"]
    expected = [f"{HEAD} tested file |", *lines]
    assert found == expected, "the table must be:\n" + "\n".join(expected)


# Files that are odd


def write(tmp_path: Path, file: str, **changes: object) -> Path:
    """A copy of a file with changes; None takes a field out."""
    plain = json.loads((CONFIGS / f"{file}.json").read_text())
    plain = {k: v for k, v in {**plain, **changes}.items() if not (k in changes and v is None)}
    path = tmp_path / f"{file}.json"
    path.write_text(json.dumps(plain))
    return path


def test_mark_before_the_first_byte(tmp_path: Path) -> None:
    text = (CONFIGS / "olmoe.json").read_text()
    (tmp_path / "olmoe.json").write_text(text, encoding="utf-8-sig")
    assert read_model(tmp_path / "olmoe.json") == read("olmoe")


@pytest.mark.parametrize("key", ["text_config", "llm_config", "language_config"])
def test_nested(tmp_path: Path, key: str) -> None:
    inside = json.loads((CONFIGS / "ling-1t.json").read_text())
    (tmp_path / "ling-1t.json").write_text(json.dumps({"model_type": "vl", key: inside}))
    assert read_model(tmp_path / "ling-1t.json") == read("ling-1t")


@pytest.mark.parametrize(
    ("file", "changes", "note"),
    [
        ("qwen3-30b", {"expert_swiglu_beta": 1.5}, "expert_swiglu_beta 1.5 is not understood"),
        ("qwen3-30b", {"router_noise": 0.1}, "router_noise 0.1 is not understood"),
        ("dbrx", {"moe_gate_type": "x"}, "moe_gate_type 'x' is not understood"),
        ("mixtral-8x7b", {"scoring_func": "max"}, "its router is max, topk_router has softmax"),
        (
            "qwen3-30b",
            {"hidden_act": "relu2"},
            f"reglu2 (relu2, gated), which no kernel has: {NO_KERNEL}",
        ),
        ("gpt-oss-120b", {"swiglu_limit": 9.0}, "with limit=9, alpha=1.702, beta=1"),
        ("qwen3-30b", {"model_type": "qwen9", "architectures": None}, "'qwen9' is in no table"),
        (
            "step-3.5-flash",
            {"swiglu_limits": [7] * 45},
            "in all layers silu(gate) and up are limited",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_not_understood_is_told(
    tmp_path: Path, file: str, changes: dict[str, object], note: str
) -> None:
    path = write(tmp_path, file, **changes)
    assert any(note in one for one in read_model(path).notes), read_model(path).notes
    with pytest.warns(
        RuntimeWarning, match="not understood|router is|no kernel|numbers of its own|in no table"
    ):
        find_shape(str(path))


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("qwen3-30b", {"hidden_act": "relu2"}),
        ("step-3.5-flash", {"swiglu_limits": [7] * 45}),
        ("phi-3.5-moe", {}),
    ],
    ids=["activation", "limit", "router"],
)
def test_what_no_kernel_has_is_not_built(
    tmp_path: Path, file: str, changes: dict[str, object]
) -> None:
    """Nor is another taken for it."""
    shape = read_model(write(tmp_path, file, **changes)).shape
    problems = model_problems(shape, "fp8")
    assert problems["up"].n == 2 * shape.inter
    left_out = {"activated"} if shape.activation is None else set()
    if shape.scoring is None:
        left_out |= {f"{op} {dtype}" for op in ("topk_router", "route_logits") for dtype in FLOATS}
    every = model_problems(replace(shape, activation="swiglu", scoring="softmax"), "fp8")
    assert left_out and every.keys() - problems.keys() == left_out
    assert all(problems[name] == every[name] for name in problems if "rout" not in name)
    if shape.activation is None:
        with pytest.raises(ValueError, match="no kernel has its experts' activation"):
            problems_of_shape(shape, "fp8")


@pytest.mark.parametrize("quiet", [False, None, []])
def test_unknown_field_that_asks_for_nothing(tmp_path: Path, quiet: object) -> None:
    plain = json.loads((CONFIGS / "olmoe.json").read_text())
    (tmp_path / "olmoe.json").write_text(json.dumps({**plain, "moe_magic": quiet}))
    assert find_model(str(tmp_path / "olmoe.json")) == read("olmoe")


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("hunyuan-a13b", {"moe_topk": [8] * 31 + [4]}, "moe_topk must be the same in every layer"),
        ("qwen3-30b", {"hidden_act": "mish"}, "hidden_act must be one of silu, .*, got 'mish'"),
        ("nemotron-3-nano", {"mlp_bias": True}, "mlp_bias must be absent, got True"),
        ("ernie-4.5-21b", {"use_bias": True}, "use_bias must be absent, got True"),
        ("gpt-oss-120b", {"hidden_act": "gelu"}, "hidden_act must be absent or 'silu', got 'gelu'"),
        ("longcat-flash", {"zero_expert_type": "copy"}, "zero_expert_type must be .*, got 'copy'"),
        ("deepseek-v3", {"topk_method": "new"}, "topk_method must be .*, got 'new'"),
        ("dbrx", {"ffn_config": {}}, "lacks ffn_config.moe_num_experts, ffn_config.moe_top_k"),
        ("ling-2.5-1t", {"score_function": "softmax"}, "must agree, got .*'score_function': 'soft"),
        ("jamba", {"num_experts": "16"}, "num_experts must be a positive integer, got '16'"),
        ("jamba", {"expert_layer_period": "x"}, "expert_layer_period must be an integer, got 'x'"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, file: str, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_model(write(tmp_path, file, **changes))


def test_dense_model_of_a_family_is_refused(tmp_path: Path) -> None:
    plain = json.loads((CONFIGS / "gemma-4-26b-a4b.json").read_text())
    text = {**plain["text_config"], "enable_moe_block": False}
    (tmp_path / "config.json").write_text(json.dumps({**plain, "text_config": text}))
    with pytest.raises(ValueError, match="enable_moe_block must be True, got None"):
        read_model(tmp_path)
