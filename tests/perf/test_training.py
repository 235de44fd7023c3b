"""The benchmark of training: its systems agree, its images are legal, its table has all of it."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("click")

from emitters.spec.registry import why_illegal
from perf import training
from perf.training_report import full_table, training_part

TINY = training.TrainedCase("tiny", 8, 2, 64, 32, 24, published=(366, 407))


@pytest.mark.parametrize("zipf", [False, True])
def test_systems_agree(zipf: bool) -> None:
    case = dataclasses.replace(TINY, zipf=zipf)
    errors = training.TrainedLayer(case, TINY.tokens, "cpu").errors(())
    assert set(errors) >= {training.OURS, "torch", "padded"}
    for name, found in errors.items():
        assert set(found) == {"out", *training.NAMES}
        assert max(found.values()) < 1e-2, name


def test_routing() -> None:
    """Any expert alike, or Zipf's law; a token takes an expert once."""
    loads = {}
    for zipf in (False, True):
        case = dataclasses.replace(TINY, zipf=zipf)
        ids = training.TrainedLayer(case, 4000, "cpu").ids
        assert ids.shape == (4000, 2) and bool((ids[:, 0] != ids[:, 1]).all())
        loads[zipf] = torch.bincount(ids.flatten(), minlength=8)
    assert loads[False].min() > 900 and loads[False].max() < 1100
    assert loads[True][0] > 2000 and loads[True][-1] < 600


@pytest.mark.parametrize("case", training.CASES, ids=lambda c: f"{c.name} {c.tokens}")
def test_images_are_legal(case: training.TrainedCase) -> None:
    images = training.images_of(case)
    assert not [image for image in images if why_illegal(*image) is not None]


def test_table_and_figure(tmp_path: Path) -> None:
    figures = {
        "forward_us": 1000.0,
        "backward_us": 2000.0,
        "both_us": 3000.0,
        "forward_tflops": TINY.tflops(1000.0, 3),
        "backward_tflops": TINY.tflops(2000.0, 6),
        "kept": 0.25,
        "peak_forward": 1.0,
        "peak_backward": 2.0,
        "errors": {"out": 3e-3},
    }
    one = {
        "case": dataclasses.asdict(TINY),
        "systems": {training.OURS: figures, "torch": {**figures, "both_us": 6000.0}},
        "absent": {"padded": "out of memory"},
    }
    one["run"] = {"date": "2026-01-02", "commit": "abc", "torch": "2.11"}
    report = {"gpu": "a GPU", "cases": [one]}
    lines = full_table(report).splitlines()
    assert "| 2.00 | 0.25 | 2.00 | 3.0e-03 |" in lines[4]
    assert "SonicMoE" in lines[6] and "out of memory" in lines[7]
    part = training_part([report])
    assert "commit abc, torch 2.11: tiny at 24." in part and lines[4] in part
    if find_spec("matplotlib"):
        from perf.plots import write_training_plot

        drawn = write_training_plot(report, tmp_path / "gpu.json")
        assert drawn.name == "gpu.svg" and "tiny, 24 tokens" in drawn.read_text()
    assert TINY.tflops(1000.0, 3) == pytest.approx(6 * 48 * 64 * 32 / 1e9)


def test_a_case_measured_again_replaces_itself() -> None:
    first, second = ({"case": {"name": "one", "tokens": n}, "run": 1} for n in (16, 32))
    report = training.with_case(training.with_case({"cases": []}, first), second)
    again = {**first, "run": 2}
    assert training.with_case(report, again)["cases"] == [again, second]
