"""Outer: gradients of the experts' rows, ``left [T, R].T @ wide [T, N]``, summed over tokens.

Tokens are split into parts of fixed sizes, whose sums one more launch adds in order: no atomics,
and the same bits on every run.  One launch serves two `wide` (dy and x), each with up to two blocks
of rows (experts and router, say); all parts of all gradients share a workspace.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tiles
from .device import chunk, in_eights, keep_mask, load_left


@triton.jit
def outer_block(
    wide, stride, left_a, pitch_a, out_a, left_b, pitch_b, out_b, offset, seed, threshold, block,
    begin, end, N, ROWS: tl.constexpr, BA: tl.constexpr, ROWS_B: tl.constexpr, BB: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BN columns of BA rows of out_a (and BB of out_b) over the tokens [begin, end).

    Args:
        wide: [., N], stride from row to row.
        left_a, left_b: [., R] and [., ROWS_B], pitch (in eights) from row to row.
        out_a, out_b: [R, N] and [ROWS_B, N], after offset; out_b and left_b may be None.
        seed: pointer to the seed of the mask on wide for out_a, one per group of ROWS, or None.
        threshold: see :func:`keep_mask`.
        block: column strips of the first BA rows, then those of the next.
    """
    N = in_eights(N, WIDE)
    stride = in_eights(stride, WIDE)
    strips = tl.cdiv(N, BN)
    q = block // strips
    first = (block % strips) * BN
    n = first + tl.arange(0, BN)
    exists_n = n < N
    group, row_a, exists_a = chunk(q, ROWS, BA)
    row_b = q * BB + tl.arange(0, BB)
    exists_b = row_b < ROWS_B
    if seed is not None:
        key = tl.load(seed)
    # The strip is the product's first operand: it is wide enough for every tensor core.
    sum_a, sum_b = tl.zeros([BN, BA], tl.float32), tl.zeros([BN, BB], tl.float32)
    for t in range(begin, end, BT):
        rows = t + tl.arange(0, BT)
        exists = rows < end
        at = wide + rows[:, None] * stride + n[None, :]
        tile = tl.load(at, mask=exists[:, None] & exists_n[None, :], other=0.0)
        left = load_left(left_a, pitch_a, rows, exists, row_a, exists_a)
        if left_b is not None:
            other = load_left(left_b, pitch_b, rows, exists, row_b, exists_b)
            sum_b = tl.dot(tile.T, other, sum_b, input_precision=PRECISION)
        if seed is not None:
            tile = tl.where(keep_mask(key, threshold, rows, first, group, BN), tile, 0.0)
        sum_a = tl.dot(tile.T, left, sum_a, input_precision=PRECISION)
    store_rows(out_a + offset, N, row_a, exists_a, n, exists_n, sum_a)
    if left_b is not None:
        store_rows(out_b + offset, N, row_b, exists_b, n, exists_n, sum_b)


@triton.jit
def store_rows(out, N, row, exists_row, n, exists_n, columns):
    """out [row, n] = columns [n, row]."""
    at = out + row.to(tl.int64)[:, None] * N + n[None, :]
    mask = exists_row[:, None] & exists_n[None, :]
    tl.store(at, columns.T.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["threshold", "T", "span", "part_size", "blocks_0"])
def outer_parts(
    out_0, out_0b, out_1, out_1b, wide_0, left_0, left_0b, N_0, stride_0, pitch_0, pitch_0b, wide_1,
    left_1, left_1b, N_1, stride_1, pitch_1, pitch_1b, seed, threshold, T, span, part_size,
    blocks_0, ROWS_0: tl.constexpr, BA_0: tl.constexpr,
    ROWS_0B: tl.constexpr, BB_0: tl.constexpr, WIDE_0: tl.constexpr,
    ROWS_1: tl.constexpr, BA_1: tl.constexpr, ROWS_1B: tl.constexpr, BB_1: tl.constexpr,
    WIDE_1: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See :func:`run`.  Grid: the blocks of both sides, parts of span tokens."""
    block, part = tl.program_id(0), tl.program_id(1)
    begin = part.to(tl.int64) * span
    end = tl.minimum(begin + span, T)
    offset = part.to(tl.int64) * part_size
    if block < blocks_0:
        outer_block(
            wide_0, stride_0, left_0, pitch_0, out_0, left_0b, pitch_0b, out_0b, offset, None,
            threshold, block, begin, end, N_0, ROWS_0, BA_0, ROWS_0B, BB_0, BT, BN, WIDE_0,
            PRECISION,
        )  # fmt: skip
    elif wide_1 is not None:
        outer_block(
            wide_1, stride_1, left_1, pitch_1, out_1, left_1b, pitch_1b, out_1b, offset, seed,
            threshold, block - blocks_0, begin, end, N_1, ROWS_1, BA_1, ROWS_1B, BB_1, BT, BN,
            WIDE_1, PRECISION,
        )  # fmt: skip


@triton.jit
def add_block(out, parts, part_size, first, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out [first : first + BLOCK] of size = sum of parts, part_size apart, in their order."""
    at = first + tl.arange(0, BLOCK)
    total = tl.load(parts + at, mask=at < size, other=0.0)
    for p in tl.static_range(1, PARTS):
        total += tl.load(parts + p * part_size + at, mask=at < size, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=["part_size", "size_0", "size_0b", "size_1", "size_1b"])
def add_gradients(
    out_0, out_0b, out_1, out_1b, parts, part_size, size_0, size_0b, size_1, size_1b,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each gradient from its parts, which lie one after the other in whole blocks."""
    block = tl.program_id(0).to(tl.int64)
    end_0 = tl.cdiv(size_0, BLOCK)
    end_0b = end_0 + tl.cdiv(size_0b, BLOCK)
    end_1 = end_0b + tl.cdiv(size_1, BLOCK)
    if block < end_0:
        add_block(out_0, parts, part_size, block * BLOCK, size_0, PARTS, BLOCK)
    elif block < end_0b:
        if out_0b is not None:
            add_block(
                out_0b, parts + end_0 * BLOCK, part_size, (block - end_0) * BLOCK, size_0b, PARTS,
                BLOCK,
            )  # fmt: skip
    elif block < end_1:
        if out_1 is not None:
            add_block(
                out_1, parts + end_0b * BLOCK, part_size, (block - end_0b) * BLOCK, size_1, PARTS,
                BLOCK,
            )  # fmt: skip
    elif out_1b is not None:
        add_block(
            out_1b, parts + end_1 * BLOCK, part_size, (block - end_1) * BLOCK, size_1b, PARTS, BLOCK
        )


ADD_BLOCK = 1024


class Side(NamedTuple):
    """Gradients that share a pass over `wide`.

    Attributes:
        wide: ``[T, N]``: what came in where the rows were applied, or its gradient.
        left: ``[T, R]``, pitch in eights (:func:`launch.workspace`), in wide's dtype.
        left_b: ``[T, E]``, the same for a second block of rows, or None.
        masks: on wide, for the first block.
    """

    wide: launch.Rows
    left: launch.Rows
    left_b: launch.Rows | None = None
    masks: launch.Masks = launch.NO_MASKS

    @property
    def rows(self) -> tuple[int, int]:
        """R and E, which is 0 without a second block."""
        return self.left.columns, 0 if self.left_b is None else self.left_b.columns

    def launch(self, BA: int, BN: int) -> tuple[int, tuple, tuple]:
        """How many blocks it takes, and what :func:`outer_parts` has two of.

        Returns:
            Blocks; wide, left, left_b, N, stride and both pitches; the constants ROWS, BA, ROWS_B,
            BB and WIDE.
        """
        R, E = self.rows
        group = R // self.masks.groups
        size = tiles.rows_of_product(group, BA)
        chunks = self.masks.groups * tiles.cdiv(group, size)
        size_b = tiles.rows_of_product(tiles.cdiv(E, chunks), tiles.MOST_COLUMNS)
        wide, left, left_b = self.wide, self.left, self.left_b
        return (
            tiles.cdiv(wide.columns, BN) * chunks,
            (
                wide.data, left.data, left_b and left_b.data, wide.columns, wide.stride,
                left.stride, left_b.stride if left_b else 0,
            ),
            (group, size, E, size_b, wide.wide),
        )  # fmt: skip


def run(first: Side, second: Side | None = None) -> list[Tensor | None]:
    """``left.T @ wide`` of each block of each side, in two launches (one, if tokens are few).

    Args:
        first: has no mask.
        second: or None.

    Returns:
        ``[R, N]`` and ``[E, N]`` (None without a left_b) of the first side, in the dtype of its
        wide; then those of the second (None without one).
    """
    wide = first.wide.data
    T = first.wide.count
    results = []
    for side in (first, second):
        rows = (0, 0) if side is None else side.rows
        results += [wide.new_empty((n, side.wide.columns)) if n else None for n in rows]
    if not T:
        return [None if out is None else out.zero_() for out in results]

    features = sum(side.wide.columns for side in (first, second) if side is not None)
    masks = launch.NO_MASKS if second is None else second.masks
    most_rows = max(s.rows[0] // s.masks.groups for s in (first, second) if s is not None)
    tile = tiles.outer(T, features, most_rows, wide.element_size(), launch.arch())
    outs, part_size = results, 0
    sizes = [0 if out is None else out.numel() for out in results]
    if tile.splits > 1:
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + ADD_BLOCK * tiles.cdiv(size, ADD_BLOCK))
        part_size = starts[-1]
        parts = wide.new_empty((tile.splits, part_size), dtype=torch.float32)
        outs = [parts[0, at:] if size else None for at, size in zip(starts, sizes, strict=False)]

    blocks_0, arguments_0, constants_0 = first.launch(tile.BA, tile.BN)
    blocks_1, arguments_1, constants_1 = 0, (None, None, None, 0, 0, 0, 0), (1, 16, 0, 16, False)
    if second is not None:
        blocks_1, arguments_1, constants_1 = second.launch(tile.BA, tile.BN)
    outer_parts[(blocks_0 + blocks_1, tile.splits)](
        *outs, *arguments_0, *arguments_1, masks.seed, masks.threshold, T, tile.span, part_size,
        blocks_0, *constants_0, *constants_1, BT=tile.BT, BN=tile.BN,
        PRECISION=launch.precision(wide.dtype), **launch.options(tile.warps, tile.stages),
    )  # fmt: skip
    if tile.splits > 1:
        add_gradients[(part_size // ADD_BLOCK,)](
            *results, parts, part_size, *sizes, PARTS=tile.splits, BLOCK=ADD_BLOCK,
            **launch.options(4, 1),
        )  # fmt: skip
    return results
