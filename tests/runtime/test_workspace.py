"""Workspaces: which tensors are parts of one, and what a layout does with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cutlass_moe.runtime.workspace import WorkspaceLayout, resolve, view_of_rows, view_of_slices

BUFFER = torch.arange(60)
GRID = BUFFER.view(10, 6)
OTHER = BUFFER.clone().view(10, 6)
ROWS: dict[str, tuple[list[Tensor], int | None]] = {  # and how many rows a view must have
    "adjacent": ([GRID[1:4], GRID[4:5], GRID[5:9]], 8),
    "empty_between": ([GRID[1:4], GRID[4:4], GRID[4:6]], 5),
    "empty_elsewhere": ([GRID[1:4], OTHER[9:9], GRID[4:6]], 5),
    "empty_first": ([GRID[0:0], GRID[4:6], GRID[6:7]], 3),
    "all_empty": ([GRID[3:3], OTHER[0:0]], 0),
    "gap": ([GRID[1:4], GRID[5:6]], None),
    "overlap": ([GRID[1:4], GRID[3:6]], None),
    "wrong_order": ([GRID[4:5], GRID[1:4]], None),
    "two_storages": ([GRID[1:4], OTHER[4:5]], None),
    "strided": ([GRID[:4, :3], GRID[4:, :3]], None),
    "transposed": ([BUFFER[:6].view(3, 2).T, BUFFER[6:12].view(2, 3)], None),
    "one_row_of_odd_stride": ([BUFFER.as_strided((1, 6), (77, 1)), GRID[1:3]], 3),
    "vectors": ([BUFFER[:7], BUFFER[7:9]], 9),
}
SLICES: dict[str, tuple[list[Tensor], tuple[int, ...] | None]] = {  # and a view's strides
    "stacked": (list(BUFFER.view(5, 4, 3).unbind()), (12, 3, 1)),
    "every_second": (list(BUFFER.view(5, 4, 3)[::2].unbind()), (24, 3, 1)),
    "narrow": (list(BUFFER.view(5, 4, 3)[:, 1:, :2].unbind()), (12, 3, 1)),
    "interleaved": (list(BUFFER.view(4, 5, 3).unbind(1)), (3, 15, 1)),
    "overlapping": ([GRID[0:3], GRID[1:4], GRID[2:5]], (6, 6, 1)),
    "repeated": ([GRID, GRID], None),
    "backwards": ([GRID[4:], GRID[:6]], None),
    "uneven": ([GRID[0:2], GRID[2:4], GRID[5:7]], None),
    "two_storages": ([GRID[:2], OTHER[2:4]], None),
    "pitches": ([GRID[0:2, :3], BUFFER[12:18].view(2, 3)], None),
}


@pytest.mark.parametrize(("entries", "rows"), ROWS.values(), ids=ROWS.keys())
def test_views_of_rows(entries: list[Tensor], rows: int | None) -> None:
    view = view_of_rows(entries)
    assert (None if view is None else len(view)) == rows
    if view is not None:
        assert torch.equal(view, torch.cat(entries)) and view.is_contiguous()
        assert not rows or view.untyped_storage().data_ptr() == BUFFER.data_ptr()


@pytest.mark.parametrize(("entries", "strides"), SLICES.values(), ids=SLICES.keys())
def test_views_of_slices(entries: list[Tensor], strides: tuple[int, ...] | None) -> None:
    view = view_of_slices(entries)
    assert (None if view is None else view.stride()) == strides
    if view is not None:
        assert torch.equal(view, torch.stack(entries))
        assert view.untyped_storage().data_ptr() == BUFFER.data_ptr()


def test_layout_joins_fills_and_writes_back() -> None:
    apart, adjacent = [GRID[:2].clone(), GRID[2:2].clone(), GRID[5:9].clone()], [GRID[:4], GRID[4:]]
    layout = WorkspaceLayout(torch.device("cpu"))
    three, joined = layout.from_host(BUFFER[:3]), layout.join(apart)
    assert isinstance(layout.join(adjacent), Tensor) and layout.join([GRID]) is GRID
    workspace = layout.aligned(torch.empty(layout.size, dtype=torch.uint8))
    layout.fill(workspace)
    assert torch.equal(resolve(three, workspace), BUFFER[:3])
    rows = resolve(joined, workspace)
    assert torch.equal(rows, GRID[[0, 1, 5, 6, 7, 8]])
    rows += 100
    layout.write_back(joined, workspace)
    assert torch.equal(torch.cat(apart), rows)


def test_regions_do_not_overlap_and_are_aligned() -> None:
    layout = WorkspaceLayout(torch.device("cpu"))
    shapes = [(1,), (128,), (0, 5), (129,), (3, 7)]
    regions = [layout.region(shape, torch.int16) for shape in shapes]
    workspace = torch.empty(layout.size + 1, dtype=torch.uint8)[1:]
    views = [region.of(layout.aligned(workspace)) for region in regions]
    for i, view in enumerate(views):
        view.fill_(i)
    for i, view in enumerate(views):
        assert view.shape == shapes[i] and (view == i).all()
        assert not view.numel() or view.data_ptr() % 128 == 0
