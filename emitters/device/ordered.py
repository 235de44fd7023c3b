"""The loader of rows of x that are in order: copies them to a stage of shared memory by TMA."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.experimental import primitives as prims

from emitters.device.memory import tensor_map_address
from emitters.device.parameters import Gathered

SCALE_THREADS = 64  # that copy scales of rows in order, if these vary along K


class OrderedRows:
    """Copies 128 bytes of each row of a tile to a stage, by one box of TMA.

    Rows are named, and scales copied, by the methods that `GatherIterator` has too. The rows past
    the expert's end are copied as well: they are the next expert's, and nothing of them is stored.
    Past the end of x, and of a row, come zeros.

    rows: of a tile.
    """

    def __init__(self, rows: int):
        self.rows = rows

    def attach(self, gathered: Gathered, thread: Int32):
        """Binds x. thread: its number among those that copy scales."""
        self.x, self.num_tokens = gathered.x, gathered.num_tokens
        self.thread = thread
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

    def scaled_rows(self) -> list[Int32]:
        """The rows of the tile whose scales this thread copies."""
        return [self.thread + first for first in range(0, self.rows, SCALE_THREADS)]

    def scaled_tokens(self, tokens: cute.Tensor):
        """Writes the rows of x whose scales this thread copies; -1 past its end."""
        for i, row in enumerate(self.scaled_rows()):
            token = self.row[0] + row
            tokens[i] = cutlass.select_(token < self.num_tokens, token, Int32(-1))
