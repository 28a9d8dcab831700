"""What the formulas share: the account of a launch, and the numbers of csrc/cuda."""

import ctypes
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

from tools.gpu_emulator.cuda_runtime import Launch
from tools.gpu_traffic import accounts

# Of csrc/cuda, for 16-bit types: columns of a shrink's tile and features of its steps; columns of a
# strip of an expand, and rows of it at a time; rows and columns of an outer product's tile and
# tokens of its steps.
SHRINK_COLUMNS = EXPAND_COLUMNS = EXPAND_ROWS = OUTER_ROWS = OUTER_COLUMNS = 128
WGMMA_COLUMNS = 192
OUTER_TOKENS = 32
SHRINK_FEATURES = 64
MMA = 2 * 16 * 8 * 16
SEED = COUNT = 8
INDEX = 4


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def padded(columns: int) -> int:
    return cdiv(columns, 16) * 16


def segment_length(columns: int) -> int:
    """As in csrc/cuda/kernels.h."""
    return cdiv(columns, 512) * 64


class Account(accounts.Account):
    """Of a CUDA kernel.

    Attributes:
        element, wide: bytes of an element and of an accumulator.
        masked: whether the kernel is one with dropout.
    """

    def __init__(self, launch: Launch):
        given = launch.given
        super().__init__(launch, given.values)
        self.element, self.wide = given.element, 8 if given.element == 8 else 4
        self.masked = given.flags[:1] == (True,)
        self.warps = launch.threads // 32

    @property
    def name(self) -> str:
        fused = self.arguments.get("finish") is not None
        return self.launch.name.removesuffix("_kernel") + "_and_mix" * fused

    def load(self, pointer, elements: int, size: int, times: int | Fraction = 1) -> None:
        """Elements of `size` bytes are read, so many times on average; through null nothing is."""
        if pointer is not None:
            self.loads.add(elements * size, times)

    def store(self, pointer, elements: int, size: int) -> None:
        """Elements of `size` bytes are written, each once; through null nothing is."""
        if pointer is not None:
            self.stores.add(elements * size)

    def multiply(self, tiles: int) -> None:
        """So many products of 16 x 16 and 16 x 8; others than of 16 bits pass tensor cores by."""
        if self.element == 2:
            self.flops += tiles * MMA


def count(rows: Any) -> int:
    return rows.R + rows.extra


def columns_of(k: Account, rows: Any, masks: Any, size: int) -> Iterator[tuple[int, int]]:
    """Runs of rows that are multiplied apart, cut into tiles of `size`, from the tile's first."""
    groups = [(0, count(rows))]
    if k.masked:
        experts = rows.R // rows.r if masks.per_expert else 1
        each = rows.R // experts
        groups = [(i * each, (i + 1) * each) for i in range(experts)]
        groups += [(rows.R, count(rows))] * bool(rows.extra)
    for first in range(0, count(rows), size):
        for begin, end in groups:
            begin, end = max(begin - first, 0), min(end - first, size, count(rows) - first)
            if begin < end:
                yield begin, end


class Runs(NamedTuple):
    """Pairs of each expert that has any, in tiles of a size."""

    pairs: list[int]
    tiles: int
    experts: int

    @property
    def each(self) -> Fraction:
        """How often an expert's rows are read on average."""
        return Fraction(self.tiles, self.experts)


def runs(k: Account, T: int, size: int, slot: int | None = None) -> Runs:
    """Of a slot or of all; evenly if nothing was executed."""
    s = k.segments if "segments" in k.arguments else k.p.segments
    segments, pairs = s.E * s.k, T * s.k
    places = [i * pairs // segments for i in range(segments + 1)]
    if k.launch.counts is not None:
        places = list((ctypes.c_int32 * (segments + 1)).from_address(s.starts))
    slots = s.k if slot is None else 1
    found = [places[i + slots] - places[i] for i in range(slot or 0, segments, s.k)]
    return Runs(found, sum(cdiv(n, size) for n in found), sum(n > 0 for n in found))
