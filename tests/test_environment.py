"""The environment variables: each declared once, read in one place, and in the manual's table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cutlass_moe import environment

ROOT = Path(__file__).parents[1]
MANUAL = ROOT / "cutlass_moe/images/README.md"
NAMES = {variable.name for variable in environment.VARIABLES}


def test_every_variable_that_the_product_names_is_declared() -> None:
    sources = [*ROOT.glob("cutlass_moe/**/*.py"), *ROOT.glob("emitters/**/*.py")]
    named = {name for path in sources for name in re.findall(r"CUTLASS_MOE_\w+", path.read_text())}
    assert named == NAMES


def test_variables_are_read_by_their_declarations_alone() -> None:
    wrong = [
        path
        for path in ROOT.glob("cutlass_moe/**/*.py")
        if re.search(r"environ\S*\W+CUTLASS_MOE", path.read_text())
    ]
    assert wrong == []


def test_the_manual_has_the_table() -> None:
    begin, end = "<!-- environment:begin -->\n", "<!-- environment:end -->"
    table = MANUAL.read_text().partition(begin)[2].partition(end)[0]
    assert table.strip() == environment.markdown().strip(), (
        "paste what `python -m cutlass_moe.environment` prints"
    )


@pytest.mark.parametrize(("text", "on"), [("", True), ("0", False), ("1", True)])
def test_switches(monkeypatch: pytest.MonkeyPatch, text: str, on: bool) -> None:
    monkeypatch.setenv("CUTLASS_MOE_JIT", text)
    assert environment.JIT.on() is on


def test_a_switch_must_be_0_or_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTLASS_MOE_STRICT", "yes")
    with pytest.raises(ValueError, match="CUTLASS_MOE_STRICT must be 0 or 1, got 'yes'"):
        environment.STRICT.on()


def test_lists_of_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTLASS_MOE_CACHE_DIR", "/a::/b.zip")
    assert environment.CACHE_DIR.paths() == ["/a", "/b.zip"]
    monkeypatch.delenv("CUTLASS_MOE_CACHE_DIR")
    assert environment.CACHE_DIR.paths() == []
