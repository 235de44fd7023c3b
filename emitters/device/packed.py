"""Packed 4-bit weights: copied to stages as they lie in memory, unpacked in registers for WGMMA.

The layout is that of emitters/spec/packing.py.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.experimental import primitives as prims

from emitters.device.memory import SMEM, vector
from emitters.device.weights import EVICT_FIRST
from emitters.spec.config_packed_sm90 import GemmPackedSm90Config
from emitters.spec.gemm import GemmProblem
from emitters.spec.packing import (
    BLOCK_ROWS,
    LANE_BYTES,
    UNIT_ROWS,
    VALUE_BYTES,
    Packing,
)

_AND_OR = 0xEA  # lop3: (a & b) | c
_AND = 0xC0  # lop3: a & b
_NIBBLES = 0x000F000F
_128, _MINUS_136 = 0x43004300, 0xC308C308  # pairs of bf16; 128 has a unit of 1 in its last place


class PackedLoader:
    """Copies the packed weights of a tile's columns, 128 of K at a time.

    In a stage, the blocks of each 64 columns follow each other: 32 rows, then 32 more; of a gated
    problem 32 gates, then the ups of the same outputs. A tile of 32 columns has one block; in a
    gated problem half of a block of gates, then half of one of ups. Past the end of N, and of K if
    the kernel asks for it, the last block is copied again: x has zeros there, and those columns are
    not stored.
    """

    def __init__(self, problem: GemmProblem, evict_first: bool = False):
        packing = problem.weight.packing
        assert packing is not None
        self.unit_bytes, self.block_bytes = packing.unit_bytes, packing.block_bytes
        self.gated = problem.gated
        self.n_blocks, self.k_blocks = packing.blocks(problem.n, problem.k)
        self.l2_hint = Int64(EVICT_FIRST) if evict_first else None

    def carrier(self, weight, stage_layout, box: tuple[int, int]):
        """The kernel's argument for the weights: their address."""
        return weight

    def prefetch_map(self, weight):
        pass  # there is no tensor map

    def find_map(self, weight, expert: Int32) -> cute.Pointer:
        """The address of an expert's weights."""
        return weight + Int64(expert) * (self.n_blocks * self.k_blocks * self.block_bytes)

    def copy(self, stage, weight, corner, columns: int, barrier):
        """Starts the copies of a tile's columns; by one thread.

        corner: (block of K, first column, expert).
        """
        k_block, column, _ = corner
        k_block = cutlass.min(k_block, Int32(self.k_blocks - 1))
        copied = min(BLOCK_ROWS, columns // 2 if self.gated else columns)  # rows at a time
        copied_bytes = copied // UNIT_ROWS * self.unit_bytes
        for i in range(columns // copied):
            source = weight + Int64(self.row_block(column, i) * self.k_blocks + k_block) * (
                self.block_bytes
            )
            if copied < BLOCK_ROWS:
                source = source + column // columns % 2 * copied_bytes
            prims.cp_async_bulk_shared_cluster_global(
                (stage + i * copied_bytes).to_llvm_ptr(),
                source.to_llvm_ptr(),
                barrier.to_llvm_ptr(),
                copied_bytes,
                l2_cache_hint=self.l2_hint,
            )

    def row_block(self, column: Int32, i: int) -> Int32:
        """The block of N of a tile's i-th 32 columns, or 16 gates or ups."""
        if not self.gated:
            return cutlass.min(column // BLOCK_ROWS + i, Int32(self.n_blocks - 1))
        half = self.n_blocks // 2
        block = cutlass.min(column // (2 * BLOCK_ROWS) + i // 2, Int32(half - 1))
        return block + i % 2 * half


class PackedOperand:
    """A consumer thread's packed weights of 128 of K, which become WGMMA's A operand.

    WGMMA's M is 64 columns of the product, 16 for each warp, and mma.sync's is 16. A thread has two
    of them, which are row g of two units (see emitters/spec/packing.py).
    """

    def __init__(self, problem: GemmProblem, config: GemmPackedSm90Config, powers: bool):
        """powers: whether the values of integers have their scales but for the mantissas."""
        packing = problem.weight.packing
        assert packing is not None
        self.powers = powers
        self.packing, self.gated = packing, problem.gated
        self.block_bytes = config.weight_bytes(problem)
        self.consumer_bytes = 2 * packing.block_bytes
        self.gate_units = min(64, config.tile_n) // 2 // UNIT_ROWS  # of a consumer's units
        self.scale_bytes = packing.groups * packing.scale_bytes  # of a row

    def attach(self, weights: cute.Pointer, warp: Int32, lane: Int32):
        """Binds the stages and finds this thread's units. warp: among those of all consumers."""
        unit = self.packing.unit_bytes
        first, second = (1, self.gate_units) if self.gated else (2, 1)
        base = weights + (warp // 4 * self.consumer_bytes + warp % 4 * (first * unit))
        self.units = (base, base + second * unit)
        self.row, self.lane = lane // 4, lane
        count = max(1, self.scale_bytes // 4)
        blocks = range(2)  # one that is unpacked, and the next one
        self.words_of = [cute.make_rmem_tensor((2, 4), Int32) for _ in blocks]
        self.scale_words_of = [cute.make_rmem_tensor((2, count), Int32) for _ in blocks]

    def choose(self, turn: int):
        """Says of which block, read as the 0th or 1st, words and scales are unpacked."""
        self.words, self.scale_words = self.words_of[turn], self.scale_words_of[turn]

    def read(self, block: Int32, turn: int):
        """Reads the words and scales of a block of K. block: counted over all stages."""
        packing = self.packing
        count = max(1, self.scale_bytes // 4)
        for i, unit in enumerate(self.units):
            at = unit + block * self.block_bytes
            cute.autovec_copy(
                vector(at + self.lane * LANE_BYTES, Int32, 4, SMEM), self.words_of[turn][i, None]
            )
            scales = at + VALUE_BYTES
            if packing is Packing.INT4_G128:  # a word has the scales of two rows
                scales = scales + self.row // 2 * 4
            else:
                scales = scales + self.row * self.scale_bytes
            cute.autovec_copy(
                vector(scales, Int32, count, SMEM), self.scale_words_of[turn][i, None]
            )

    def scale(self, unit: int, group: int) -> Float32:
        """What is not in the values of a group of K: an integer row's scale, or its mantissa."""
        bits = self.scale_bits(unit, group)
        if self.powers:
            bits = Int32(cute.arch.lop3(bits, _int(0x007F0000), _int(0x3F800000), _AND_OR))
        else:
            bits = bits & Int32(-65536)
        return bits.bitcast(Float32)

    def scale_bits(self, unit: int, group: int) -> Int32:
        """The bf16 scale, in the upper 16 bits, of an integer row of the block that was read."""
        word = self.scale_words[unit, group // 2]
        if self.packing is Packing.INT4_G128:
            return word << (16 - self.row % 2 * 16)
        return word << 16 if group % 2 == 0 else word

    def unpack(self, word: int, registers: cute.Tensor):
        """Writes a word's 32 of K of both rows, as bf16, to A's int32 registers of two WGMMAs."""
        scaled = self.packing is Packing.MXFP4
        if scaled:
            factors = [self.factor(unit, word) for unit in range(2)]
        elif self.powers and word % (self.packing.group // 32) == 0:
            group = word * 32 // self.packing.group
            self.terms = [self.power(unit, group) for unit in range(2)]
        for pair in range(4):
            for unit in range(2):
                bits = self.words[unit, word]
                if scaled:
                    values = _packed("mul", self.spread(bits, pair), factors[unit])
                else:  # 128 + code, - 136; or (128 + code) * power - 136 * power
                    nibbles = bits if pair == 0 else bits >> (4 * pair)
                    nibbles = cute.arch.lop3(nibbles, _int(_NIBBLES), _int(_128), _AND_OR)
                    if self.powers:
                        values = _packed("fma", nibbles, *self.terms[unit])
                    else:
                        values = _packed("add", nibbles, _int(_MINUS_136))
                registers[2 * pair + unit] = values

    def power(self, unit: int, group: int) -> tuple[Int32, Int32]:
        """A scale without its mantissa, a power of two, and -136 times that; as two equal bf16."""
        bits = self.scale_bits(unit, group)
        power = cute.arch.lop3(
            Int32(cute.arch.prmt(bits, bits, Int32(0x3232))), _int(0xFF80FF80), Int32(0), _AND
        )
        return power, _packed("mul", power, _int(_MINUS_136))

    def spread(self, bits: Int32, pair: int) -> Int32:
        """The bits of two E2M1 where bf16 has sign, exponent and mantissa: too small by 2^126."""
        if pair == 3:
            rest = cute.arch.lop3(bits, _int(0x81808180), Int32(0), _AND)
            return cute.arch.lop3(bits >> 8, _int(0x00400040), rest, _AND_OR)
        moved = _rotated_right(bits, 4) if pair == 2 else bits << (2, 6)[pair]
        return cute.arch.lop3(moved, _int(0x81C081C0), Int32(0), _AND)

    def factor(self, unit: int, group: int) -> Int32:
        """A group's scale times 2^126, as two equal bf16: their exponents are the scale's byte."""
        word = self.scale_words[unit, 0]
        upper = cute.arch.lop3(word, _int(0x7F7F7F7F), Int32(0), _AND)
        last = cute.arch.lop3(word, _int(0x80808080), Int32(0), _AND)
        selector = (4 + group) * 0x1010 + group * 0x0101
        return Int32(cute.arch.prmt(last, upper, Int32(selector)))


def _rotated_right(bits: Int32, by: int) -> Int32:
    return cute.arch.inline_ptx(
        "shf.r.wrap.b32 {$w0}, {$r0}, {$r0}, " + f"{by};",
        write_only_types=[Int32],
        read_only_args=[bits],
    )


def _int(bits: int) -> Int32:
    """32 bits, as the signed integer that they are."""
    return Int32(bits - (1 << 32) if bits >> 31 else bits)


def _packed(op: str, a: Int32, b: Int32, *c: Int32) -> Int32:
    """An operation on pairs of bf16."""
    more = ", {$r2}" * len(c)
    return cute.arch.inline_ptx(
        "{{ .reg .b32 t; mov.b32 t, {$r1}; " + op + ".rn.bf16x2 {$w0}, {$r0}, t" + more + "; }}",
        write_only_types=[Int32],
        read_only_args=[a, b, *c],
    )
