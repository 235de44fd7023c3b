"""The loader of rows of x that are in order: copies them to a stage of shared memory by TMA."""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Int32
from cutlass.experimental import primitives as prims

from emitters.device.memory import tensor_map_address
from emitters.device.parameters import Gathered


class OrderedRows:
    """Copies 128 bytes of each row of a tile to a stage, by one box of TMA.

    Rows are named by the methods that `GatherIterator` has too. The rows past the expert's end are
    copied as well: they are the next expert's, and nothing of them is stored. Past the end of x,
    and of a row, come zeros.
    """

    def attach(self, gathered: Gathered):
        """Binds x."""
        self.x = gathered.x
        self.row = cute.make_rmem_tensor((1,), Int32)
        self.next_row = cute.make_rmem_tensor((1,), Int32)

    def fetch(self, first_row: Int32, rows: Int32):
        """Names the first row of the tile after this one."""
        self.next_row[0] = first_row

    def advance(self):
        """Makes the named tile the current one."""
        self.row[0] = self.next_row[0]

    def copy(self, stage: cute.Pointer, k: Int32, barrier: cute.Pointer):
        """Starts the copy from element k of the rows on; by one thread."""
        prims.cp_async_bulk_tensor_shared_cluster_global(
            stage.to_llvm_ptr(),
            tensor_map_address(self.x).to_llvm_ptr(),
            [k, self.row[0]],
            barrier.to_llvm_ptr(),
            [],
        )
