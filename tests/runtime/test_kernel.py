"""Kernels that a driver without a GPU loads: parameters by name, tensor maps, prepared launches."""

from __future__ import annotations

import pytest

from cutlass_moe.runtime.driver import DriverError
from cutlass_moe.runtime.tensor_map import View
from tests.support.fake_driver import COUNTERS, INT, MAP, POINTER, FakeDriver

PARAMS = [("weight", MAP), ("x", POINTER), ("out", POINTER), ("out_map", MAP), ("num_rows", INT)]
VIEWS = {"weight": View((32, 64), (48,), 2), "out_map": View((64, 9), (64,), 4)}
VALUES = {"num_rows": 9, "out": 0x300, "x": 0x200, "weight": 0x100, "out_map": 0x300, "bias": 0x400}
WEIGHT, OUT = (0x100, (32, 64), (96,)), (0x300, (64, 9), (256,))


@pytest.fixture
def fake_driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    return FakeDriver().patch(monkeypatch)


def test_values_are_bound_by_name_and_others_ignored(fake_driver: FakeDriver) -> None:
    kernel = fake_driver.kernel(PARAMS)
    kernel.launch(VALUES, 12, 7, overlap=True, views=VIEWS)
    (seen,) = fake_driver.launches
    assert seen.values == {
        "weight": WEIGHT, "x": 0x200, "out": 0x300, "out_map": OUT, "num_rows": 9
    }  # fmt: skip
    assert (seen.grid, seen.stream, seen.overlap) == (12, 7, True)


def test_a_value_that_is_missing_is_named(fake_driver: FakeDriver) -> None:
    kernel = fake_driver.kernel(PARAMS)
    with pytest.raises(KeyError, match="num_rows"):
        kernel.launch({"weight": 1, "x": 2, "out": 3, "out_map": 3}, 1, 7, views=VIEWS)


def test_tensor_maps_are_encoded_once_for_each_tensor(fake_driver: FakeDriver) -> None:
    kernel = fake_driver.kernel(PARAMS)
    for address in (0x100, 0x700, 0x100):
        kernel.launch({**VALUES, "weight": address}, 12, 7, views=VIEWS)
    assert [seen.values["weight"][0] for seen in fake_driver.launches] == [0x100, 0x700, 0x100]
    assert fake_driver.encoded == [WEIGHT, OUT, (0x700, *WEIGHT[1:])]
    narrow = {**VIEWS, "out_map": View((64, 8), (64,), 4)}
    kernel.launch(VALUES, 12, 7, views=narrow)
    assert fake_driver.launches[-1].values["out_map"] == (0x300, (64, 8), (256,))


def test_a_prepared_launch_moves_with_its_tensors(fake_driver: FakeDriver) -> None:
    kernel = fake_driver.kernel(PARAMS)
    launch = kernel.prepare(VALUES, 12, views=VIEWS)
    kernel.launch({**VALUES, "x": 0x900, "weight": 0xA00}, 3, 8, views=VIEWS)
    launch(7)
    for tensor, address in (("x", 0x500), ("weight", 0x600), ("out", 0x800)):
        kernel.move(launch, tensor, address, VIEWS)
    launch(7)
    _, before, after = fake_driver.launches
    assert before.values["weight"] == WEIGHT and before.values["out_map"] == OUT
    assert (before.values["x"], before.grid, before.stream) == (0x200, 12, 7)
    assert after.values == {
        "weight": (0x600, *WEIGHT[1:]), "x": 0x500, "out": 0x800, "out_map": (0x800, *OUT[1:]),
        "num_rows": 9,
    }  # fmt: skip


def test_counters_are_the_kernels_own_and_forbid_overlap(fake_driver: FakeDriver) -> None:
    kernel = fake_driver.kernel([*PARAMS, ("counters", POINTER)])
    values = {**VALUES, "counters": 0}
    kernel.launch(values, 12, 7, overlap=True, views=VIEWS)
    kernel.prepare(values, 12, overlap=True, views=VIEWS)(8)
    for stream, seen in zip((7, 8), fake_driver.launches, strict=True):
        assert seen.values["counters"] == COUNTERS + stream and not seen.overlap


def test_parameters_of_another_size_are_refused(
    fake_driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cuda.bindings.driver.cuFuncGetParamInfo", lambda function, i: (0, 0, 4))
    with pytest.raises(DriverError, match="parameter weight must have 128 bytes, got 4"):
        fake_driver.kernel(PARAMS)
