"""Shapes from files: config.json of every family, lists of shapes, and files that are neither."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from cutlass_moe.models.files import find_shape, read_config, read_shapes
from cutlass_moe.models.shapes import MODELS, MoeShape

MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
}
QWEN3 = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "scoring_func": "sigmoid",
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "experts_per_token": 4,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_experts_per_tok": 4,
    "num_local_experts": 128,
}
LLAMA4 = {
    "model_type": "llama4",
    "text_config": {
        "model_type": "llama4_text",
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_experts_per_tok": 1,
        "num_local_experts": 128,
    },
    "vision_config": {"hidden_size": 1408, "intermediate_size": 5632},
}
QWEN2 = {**QWEN3, "model_type": "qwen2_moe", "intermediate_size": 5632, "num_experts": 60} | {
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 4,
    "shared_expert_intermediate_size": 5632,
}
QWEN3_NEXT = {**QWEN3, "model_type": "qwen3_next", "num_experts": 512} | {
    "moe_intermediate_size": 512,
    "num_experts_per_tok": 10,
    "shared_expert_intermediate_size": 512,
}
DEEPSEEK_V2 = {**DEEPSEEK_V3, "model_type": "deepseek_v2", "hidden_size": 2048} | {
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_group": 1,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "scoring_func": "softmax",
}
KIMI_K2 = {**DEEPSEEK_V3, "model_type": "kimi_k2", "n_group": 1, "n_routed_experts": 384}
GLM = {**DEEPSEEK_V3, "model_type": "glm4_moe", "hidden_size": 4096, "n_routed_experts": 128} | {
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "scoring_func": None,
}
FAMILIES = [
    ("mixtral", MIXTRAL, MODELS["mixtral"]),
    ("qwen2", QWEN2, MoeShape("qwen2", 60, 4, 2048, 1408)),
    ("qwen3", QWEN3, MODELS["qwen3-30b"]),
    ("qwen3_local", {**QWEN3, "num_local_experts": 128}, MODELS["qwen3-30b"]),
    ("qwen3_next", QWEN3_NEXT, MODELS["qwen3-next"]),
    ("deepseek_v2", DEEPSEEK_V2, MODELS["dsv2-lite"]),
    ("deepseek_v3", DEEPSEEK_V3, MODELS["dsv3"]),
    ("kimi_k2", KIMI_K2, MODELS["kimi-k2"]),
    ("kimi_k2_nested", {"text_config": KIMI_K2}, MODELS["kimi-k2"]),
    ("glm", GLM, MODELS["glm-4.5-air"]),
    ("gpt_oss", GPT_OSS, MODELS["gpt-oss-120b"]),
    ("llama4", LLAMA4, MODELS["llama4-maverick"]),
]


@pytest.mark.parametrize(
    ("config", "shape"), [f[1:] for f in FAMILIES], ids=[f[0] for f in FAMILIES]
)
def test_config_of_every_family(tmp_path, config, shape):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    expected = replace(shape, name="model")
    assert read_config(directory) == read_config(directory / "config.json") == expected
    assert find_shape(str(directory)) == expected


def test_names_come_from_files(tmp_path, monkeypatch):
    (tmp_path / "Some-MoE.json").write_text(json.dumps(QWEN3))
    assert read_config(tmp_path / "Some-MoE.json").name == "Some-MoE"
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    monkeypatch.chdir(tmp_path)
    assert find_shape("config.json").name == tmp_path.name
    assert find_shape("mixtral") is MODELS["mixtral"]


def without(config, *names):
    return {name: value for name, value in config.items() if name not in names}


LLAMA3 = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336}
NO_EXPERTS = "num_experts or n_routed_experts or num_local_experts"
BAD_CONFIGS = [
    ("dense", json.dumps(LLAMA3), NO_EXPERTS),
    ("dense_inter", json.dumps(without(DEEPSEEK_V3, "moe_intermediate_size")), "moe_intermediate"),
    ("no_experts", json.dumps({**DEEPSEEK_V3, "n_routed_experts": None}), NO_EXPERTS),
    ("no_top_k", json.dumps(without(MIXTRAL, "num_experts_per_tok")), "num_experts_per_tok"),
    ("no_hidden", json.dumps(without(GLM, "hidden_size")), "lacks hidden_size"),
    ("by_layer", json.dumps({**QWEN3, "moe_intermediate_size": [768, 512]}), "inter must be"),
    ("zero", json.dumps({**QWEN3, "num_experts": 0}), "num_experts must be a positive"),
    ("nested_dense", json.dumps({"text_config": LLAMA3}), NO_EXPERTS),
    ("nested_name", json.dumps({"text_config": "llama"}), "expected a JSON object, got 'llama'"),
    ("list", "[1]", "expected a JSON object"),
    ("no_json", "nonsense", "config.json: Expecting value"),
    ("no_text", b"\xff\xfe", "config.json: 'utf-8'"),
]


@pytest.mark.parametrize(
    ("text", "message"), [c[1:] for c in BAD_CONFIGS], ids=[c[0] for c in BAD_CONFIGS]
)
def test_bad_config(tmp_path, text, message):
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        find_shape(str(tmp_path))


def test_no_such_model(tmp_path):
    with pytest.raises(ValueError, match=r"'bert' is no config\.json.*mixtral"):
        find_shape("bert")
    with pytest.raises(ValueError, match=r"config\.json: .*No such file"):
        find_shape(str(tmp_path))


SHAPES = [MoeShape("a", 64, 6, 2048, 1408), MoeShape("b", 8, 2, 4096, 14336, bias=True)]
TOML = """
[[shapes]]  # without bias
name = "a"
num_experts = 64
top_k = 6
hidden = 2048
inter = 1408

[[shapes]]
name = "b"
num_experts = 8
top_k = 2
hidden = 4096
inter = 14336
bias = true
"""


def plain(shape):
    """As a file has it."""
    return {name: value for name, value in asdict(shape).items() if value is not None}


def test_lists_of_shapes(tmp_path):
    (tmp_path / "shapes.toml").write_text(TOML)
    (tmp_path / "shapes.json").write_text(json.dumps([plain(shape) for shape in SHAPES]))
    assert read_shapes(tmp_path / "shapes.toml") == SHAPES
    assert read_shapes(tmp_path / "shapes.json") == SHAPES


ROW = plain(SHAPES[0])
BAD_LISTS = [
    ("empty", "json", [], "expected a list of shapes"),
    ("one_object", "json", ROW, "expected a list of shapes"),
    ("number", "json", [ROW, 3], "expected shape 2 to have hidden, inter"),
    ("missing", "json", [without(ROW, "inter")], "expected shape 1 to have hidden, inter"),
    ("unknown", "json", [{**ROW, "dtype": "fp8"}], "'dtype': 'fp8'"),
    ("type", "json", [{**ROW, "hidden": "2048"}], "hidden must be a positive integer, got '2048'"),
    ("bias", "json", [{**ROW, "bias": 1}], "a bool as bias"),
    ("rank", "json", [{**ROW, "all_ranks": [64, 6]}], "where wanted, activation, bias, num_groups"),
    ("name", "json", [{**ROW, "name": None}], "a string as name"),
    ("json_in_toml", "toml", [ROW], "shapes.toml: "),
]


@pytest.mark.parametrize(
    ("ending", "listed", "message"), [b[1:] for b in BAD_LISTS], ids=[b[0] for b in BAD_LISTS]
)
def test_bad_list_of_shapes(tmp_path, ending, listed, message):
    file = tmp_path / f"shapes.{ending}"
    file.write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=message):
        read_shapes(file)
