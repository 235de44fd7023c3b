"""Shapes from files: a config.json, lists of shapes, and files that are neither."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from cutlass_moe.models.files import find_shape, read_config, read_shapes
from cutlass_moe.models.shapes import MODELS, MoeShape

DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
}
QWEN3 = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}


def test_file_and_directory(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(QWEN3))
    expected = replace(MODELS["qwen3-30b"], name="model")
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
NO_EXPERTS = "it lacks num_experts or n_routed_experts or num_local_experts"
BAD_CONFIGS = [
    ("dense", json.dumps(LLAMA3), NO_EXPERTS),
    ("dense_inter", json.dumps(without(DEEPSEEK_V3, "moe_intermediate_size")), "moe_intermediate"),
    ("no_experts", json.dumps({**DEEPSEEK_V3, "n_routed_experts": None}), "lacks n_routed_experts"),
    ("no_top_k", json.dumps(without(QWEN3, "num_experts_per_tok")), "num_experts_per_tok"),
    ("no_hidden", json.dumps(without(QWEN3, "hidden_size")), "lacks hidden_size"),
    ("by_layer", json.dumps({**QWEN3, "moe_intermediate_size": [768, 512]}), "same in every"),
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
    (
        "rank",
        "json",
        [{**ROW, "all_ranks": [64, 6]}],
        "where wanted, activation, bias, gated",
    ),
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
