"""The report of models in transformers; nothing is timed."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="needs transformers")

from perf import transformers_model


def test_table_marks_the_best() -> None:
    report = {
        **{"gpu": "a GPU", "torch": "2", "transformers": "5", "layers": 4},
        "difference from eager": {"bf16": 0.01},
        "decode 1": {
            "tokens/s of the model": {"bf16": 1234, "eager": 56.78},
            "us of a layer's experts, GPU": {"bf16": 9.0, "eager": 8.5},
        },
    }
    *_, tokens, us = transformers_model.table(report).splitlines()
    assert tokens == "| decode 1 | tokens/s of the model | **1,234** |  |  |  |  | 56.8 |"
    assert us == "| decode 1 | us of a layer's experts, GPU | 9.0 |  |  |  |  | **8.5** |"


def test_what_batched_mm_would_copy_does_not_fit() -> None:
    found = dict.fromkeys(("bf16", "batched_mm"))
    assert set(transformers_model.served(found, 16)) == set(found)  # type: ignore[arg-type]
    assert set(transformers_model.served(found, 8192)) == {"bf16"}  # type: ignore[arg-type]
