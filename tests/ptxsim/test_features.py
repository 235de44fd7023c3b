"""Small kernels for each feature of the simulator: right in every schedule, and every defect that
is planted in one is caught as what it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cutlass_moe.images.toolchains import default_build
from tests.ptxsim.ptx import Fault
from tests.ptxsim.schedule import MODES, Schedule

if default_build() is None:
    pytest.skip("needs nvidia-cutlass-dsl", allow_module_level=True)

from tests.ptxsim.samples.defects import DEFECTS
from tests.ptxsim.samples.scenes import SCENES


@pytest.mark.parametrize("name", SCENES)
def test_samples_are_right(name: str) -> None:
    for seed, mode in enumerate(MODES):
        SCENES[name].run(Schedule(seed, mode))


@pytest.mark.parametrize("name", DEFECTS)
def test_defects_are_caught(name: str) -> None:
    defect = DEFECTS[name]
    scene = SCENES[defect.scene]
    texts = scene.texts
    texts[defect.kernel] = defect.edit(texts[defect.kernel])
    said = ""
    for seed, mode in enumerate(MODES):
        try:
            scene.run(Schedule(seed, mode), texts)
        except Fault as fault:
            said = str(fault)
            break
    assert any(text in said for text in defect.expects), said or "not caught"


def test_a_dependent_grid_starts_before_the_first_ends() -> None:
    """In some schedule; never where nobody has triggered."""
    scene = SCENES["dependent"]
    for ptx, early in (
        (scene.texts[0], True),
        (scene.texts[0].replace("griddepcontrol.launch_dependents;", ""), False),
    ):
        found = False
        for seed in range(4):
            lines: list[str] = []
            scene.run(Schedule(seed), [ptx, scene.texts[1]], lines.append)
            grids = [line.startswith("grid 1") for line in lines]
            found |= grids != sorted(grids)
        assert found == early


def test_early_writes_to_what_the_first_grid_reads() -> None:
    scene = replace(
        SCENES["dependent"], same={"early": "x"}, writers={"middle": 0, "x": 1, "out": 1}
    )
    for seed in range(4):
        with pytest.raises(Fault, match="write to x, which the grid before reads"):
            scene.run(Schedule(seed))
