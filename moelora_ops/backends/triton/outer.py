"""Outer: gradients of the experts' rows, ``left [T, R].T @ wide [T, N]``, summed over tokens.

Tokens are split into parts of fixed sizes, whose sums one more launch adds in order: no atomics,
and the same bits on every run.  One launch serves two `wide` (dy and x), each with up to two blocks
of rows (experts and router, say), and sums of small values over the tokens (the gradients of biases
and of weights that tokens share); all parts of all gradients share a workspace.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tiles
from .device import chunk, in_eights, keep_mask, load_left, load_pairs, segment


@triton.jit
def outer_block(
    wide, stride, left_a, pitch_a, out_a, left_b, pitch_b, out_b, offset, seed, threshold, block,
    begin, end, order, starts, N, ROWS: tl.constexpr, BA: tl.constexpr, ROWS_B: tl.constexpr,
    BB: tl.constexpr, SPLITS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
    TOP_K: tl.constexpr, ONE_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BN columns of BA rows of out_a (and BB of out_b) over the tokens [begin, end).

    Args:
        wide: [., N], stride from row to row.
        left_a, left_b: [., SPLITS * R] and [., ROWS_B], pitch (in eights) from row to row; each of
            SPLITS segments of wide's columns meets R columns of its own.
        out_a, out_b: [R, N] and [ROWS_B, N], after offset; out_b and left_b may be None.
        seed: pointer to the seed of the mask on wide for out_a, one per group of ROWS, or None.
        threshold: see :func:`keep_mask`.
        block: column strips of the first BA rows, then those of the next.
        order, starts: see ``launch.Segments``, or None.  Then each group of ROWS is an expert's,
            rows of left_a [., ROWS] are pairs, and [begin, end) are those of the group's.
        ONE_MASK: that of all groups.
    """
    N = in_eights(N, WIDE)
    stride = in_eights(stride, WIDE)
    columns = in_eights(N // SPLITS, WIDE)
    strips = tl.cdiv(columns, BN)
    q, strip = block // (SPLITS * strips), block % (SPLITS * strips)
    split = strip // strips
    first = split * columns + (strip % strips) * BN
    n = first + tl.arange(0, BN)
    exists_n = n < (split + 1) * columns
    left_a += split * ROWS
    group, row_a, exists_a = chunk(q, ROWS, BA)
    column_a = row_a
    if order is not None:
        column_a -= group * ROWS
        first_pair, after = segment(starts, group, 0, True, TOP_K, TOP_K)
        begin, end = first_pair + begin, tl.minimum(first_pair + end, after)
    row_b = q * BB + tl.arange(0, BB)
    exists_b = row_b < ROWS_B
    if seed is not None:
        key = tl.load(seed)
    # The strip is the product's first operand: without a mask, wide enough for every tensor core.
    sum_a, sum_b = tl.zeros([BN, BA], tl.float32), tl.zeros([BN, BB], tl.float32)
    for t in range(begin, end, BT):
        rows = t + tl.arange(0, BT)
        exists = rows < end
        rows_left = rows
        if order is not None:
            rows_left, rows = load_pairs(order, rows, exists, TOP_K)
        at = wide + rows[:, None] * stride + n[None, :]
        tile = tl.load(at, mask=exists[:, None] & exists_n[None, :], other=0.0)
        left = load_left(left_a, pitch_a, rows_left, exists, column_a, exists_a)
        kept = tile
        if seed is not None:
            expert = 0 if ONE_MASK else group
            kept = tl.where(keep_mask(key, threshold, rows, first, expert, BN), tile, 0.0)
        if left_b is not None:
            other = load_left(left_b, pitch_b, rows, exists, row_b, exists_b)
            sum_b = tl.dot(tile.T, other, sum_b, input_precision=PRECISION)
        sum_a = tl.dot(kept.T, left, sum_a, input_precision=PRECISION)
    store_rows(out_a + offset, N, row_a, exists_a, n, exists_n, sum_a)
    if left_b is not None:
        store_rows(out_b + offset, N, row_b, exists_b, n, exists_n, sum_b)


@triton.jit
def store_rows(out, N, row, exists_row, n, exists_n, columns):
    """out [row, n] = columns [n, row]."""
    at = out + row.to(tl.int64)[:, None] * N + n[None, :]
    mask = exists_row[:, None] & exists_n[None, :]
    tl.store(at, columns.T.to(out.dtype.element_ty), mask=mask)


@triton.jit
def sum_block(sums, offset, block, begin, end, BT: tl.constexpr, BN: tl.constexpr):
    """BN columns of a row of the table: the sum over its tokens in [begin, end), int64.

    Args:
        sums: see :meth:`Sums.arguments`.
        block: the column strips of the first row, then those of the next.
    """
    out, values, pitch, columns, index, tokens_per_row, _, scale = sums
    strips = tl.cdiv(columns, BN)
    row = block // strips
    c = (block % strips) * BN + tl.arange(0, BN)
    if index is None:
        begin = tl.maximum(begin, row.to(tl.int64) * tokens_per_row)
        end = tl.minimum(end, (row + 1).to(tl.int64) * tokens_per_row)
    total = tl.zeros([BT, BN], tl.float32)
    for t in range(begin, end, BT):
        tokens = t + tl.arange(0, BT)
        mine = tokens < end
        if index is not None:
            mine = mine & (tl.load(index + tokens, mask=mine, other=-1) == row)
        at = values + tokens[:, None] * pitch + c[None, :]
        mask = mine[:, None] & (c < columns)[None, :]
        total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    total = scale * tl.sum(total, 0)
    at = out + offset + row.to(tl.int64) * columns + c
    tl.store(at, total.to(out.dtype.element_ty), mask=c < columns)


@triton.jit(
    do_not_specialize=["threshold", "T", "span", "part_size", "blocks_0", "blocks_1", "sums"],
    do_not_specialize_on_alignment=["order", "starts"],
)
def outer_parts(
    out_0, out_0b, out_1, out_1b, wide_0, left_0, left_0b, N_0, stride_0, pitch_0, pitch_0b, wide_1,
    left_1, left_1b, N_1, stride_1, pitch_1, pitch_1b, sums, seed, threshold, T, span, part_size,
    blocks_0, blocks_1, order, starts, ROWS_0: tl.constexpr, BA_0: tl.constexpr,
    ROWS_0B:     tl.constexpr, BB_0: tl.constexpr, SPLITS_0: tl.constexpr, WIDE_0: tl.constexpr,
    ROWS_1:     tl.constexpr, BA_1: tl.constexpr, ROWS_1B: tl.constexpr, BB_1: tl.constexpr,
    SPLITS_1:     tl.constexpr, WIDE_1: tl.constexpr, BT: tl.constexpr, BN_0: tl.constexpr,
    BN_1: tl.constexpr, SUMS: tl.constexpr, BN_SUM: tl.constexpr, TOP_K: tl.constexpr,
    ONE_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See :func:`run`.  Grid: the blocks of both sides and of each of sums, parts of span tokens.

    Args:
        wide_0, wide_1: may be None.
        sums: a tuple of SUMS (whose length Triton 3.6 cannot take).
    """
    block, part = tl.program_id(0), tl.program_id(1)
    begin = part.to(tl.int64) * span
    end = tl.minimum(begin + span, T)
    offset = part.to(tl.int64) * in_eights(part_size, True)
    if wide_0 is not None and block < blocks_0:
        outer_block(
            wide_0, stride_0, left_0, pitch_0, out_0, left_0b, pitch_0b, out_0b, offset, None,
            threshold, block, begin, end, order, starts, N_0, ROWS_0, BA_0, ROWS_0B, BB_0, SPLITS_0,
            BT, BN_0, WIDE_0, TOP_K, ONE_MASK, PRECISION,
        )  # fmt: skip
    block -= blocks_0
    if wide_1 is not None and (block >= 0) & (block < blocks_1):
        outer_block(
            wide_1, stride_1, left_1, pitch_1, out_1, left_1b, pitch_1b, out_1b, offset, seed,
            threshold, block, begin, end, order, starts, N_1, ROWS_1, BA_1, ROWS_1B, BB_1, SPLITS_1,
            BT, BN_1, WIDE_1, TOP_K, ONE_MASK, PRECISION,
        )  # fmt: skip
    block -= blocks_1
    for i in tl.static_range(SUMS):
        blocks = sums[i][6] * tl.cdiv(sums[i][3], BN_SUM)
        if (block >= 0) & (block < blocks):
            sum_block(sums[i], offset, block, begin, end, BT, BN_SUM)
        block -= blocks


@triton.jit
def add_block(out, parts, part_size, first, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out [first : first + BLOCK] of size = sum of parts, part_size apart, in their order."""
    at = first + tl.arange(0, BLOCK)
    part_size = in_eights(part_size, True)
    total = tl.load(parts + at, mask=at < size, other=0.0)
    for p in tl.static_range(1, PARTS):
        total += tl.load(parts + p * part_size + at, mask=at < size, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=["sizes", "part_size"])
def add_gradients(outs, sizes, parts, part_size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Each gradient of a tuple from its parts, which lie one after the other in whole blocks."""
    block = tl.program_id(0).to(tl.int64)
    for i in tl.static_range(len(outs)):
        blocks = tl.cdiv(sizes[i], BLOCK)
        if (block >= 0) & (block < blocks):
            add_block(outs[i], parts, part_size, block * BLOCK, sizes[i], PARTS, BLOCK)
        block -= blocks
        parts += blocks * BLOCK


ADD_BLOCK = 1024
# Columns of a table that one block sums.
SUM_COLUMNS = 32


class Side(NamedTuple):
    """Gradients that share a pass over `wide`.

    Attributes:
        wide: ``[T, N]``: what came in where the rows were applied, or its gradient.
        left: ``[T, splits * R]``, pitch in eights (:func:`launch.workspace`), in wide's dtype.
        left_b: ``[T, E]``, the same for a second block of rows, or None.
        masks: on wide, for the first block.
        splits: how many equal segments wide's columns are in, each with R columns of left; neither
            masks nor a second block then.
        segments: the tokens of each expert, for whose E gradients left is ``[T * k, r]``; no second
            block then.  Both sides of a :func:`run` have the same.
    """

    wide: launch.Rows
    left: launch.Rows
    left_b: launch.Rows | None = None
    masks: launch.Masks = launch.NO_MASKS
    splits: int = 1
    segments: launch.Segments | None = None

    @property
    def rows(self) -> tuple[int, int]:
        """R and E, which is 0 without a second block."""
        R = self.left.columns // self.splits
        if self.segments:
            R *= self.segments.num_experts
        return R, 0 if self.left_b is None else self.left_b.columns

    @property
    def groups(self) -> int:
        """How many groups the first block's rows are in; one product has rows of one alone."""
        return self.segments.num_experts if self.segments else self.masks.groups

    def launch(self, BA: int, BN: int) -> tuple[int, tuple, tuple]:
        """How many blocks it takes, and what :func:`outer_parts` has two of.

        Returns:
            Blocks; wide, left, left_b, N, stride and both pitches; the constants ROWS, BA, ROWS_B,
            BB, SPLITS and WIDE.
        """
        R, E = self.rows
        group = R // self.groups
        size = tiles.rows_of_product(group, BA)
        chunks = self.groups * tiles.cdiv(group, size)
        size_b = tiles.rows_of_product(tiles.cdiv(E, chunks), tiles.MOST_COLUMNS)
        wide, left, left_b = self.wide, self.left, self.left_b
        segment = wide.segment(self.splits)
        return (
            self.splits * tiles.cdiv(segment.columns, BN) * chunks,
            (
                wide.data, left.data, left_b and left_b.data, wide.columns, wide.stride,
                left.stride, left_b.stride if left_b else 0,
            ),
            (group, size, E, size_b, self.splits, segment.wide),
        )  # fmt: skip


_NO_SIDE = 0, (None, None, None, 0, 0, 0, 0), (1, 16, 0, 16, 1, False)


class Sums(NamedTuple):
    """Sums of values over the tokens of each row of a table.

    Attributes:
        values: ``[T, columns]``.
        row_map: which row a token belongs to.
        dtype: of the result ``[rows, columns]``.
        scale: what it is multiplied by.
    """

    values: launch.Rows
    row_map: launch.RowMap
    dtype: torch.dtype = torch.float32
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """Of the result."""
        return self.row_map.rows, self.values.columns

    def arguments(self, out: Tensor) -> tuple:
        """What :func:`sum_block` takes apart."""
        values, row_map = self.values, self.row_map
        return (
            out, values.data, values.stride, values.columns, row_map.index, row_map.tokens_per_row,
            row_map.rows, self.scale,
        )  # fmt: skip


def run(
    first: Side | None, second: Side | None = None, sums: Sequence[Sums | None] = ()
) -> list[Tensor | None]:
    """``left.T @ wide`` of each block of each side, and sums, in two launches (one, if few tokens).

    Args:
        first: has no mask; or None, as everything here.

    Returns:
        ``[R, N]`` and ``[E, N]`` (None without a left_b) of the first side, in the dtype of its
        wide; those of the second (None without one); ``[rows, columns]`` of each of sums.
    """
    sides = [side for side in (first, second) if side is not None]
    wanted_sums = [s for s in sums if s is not None]
    results = []
    for side in (first, second):
        rows = (0, 0) if side is None else side.rows
        results += [side.wide.data.new_empty((n, side.wide.columns)) if n else None for n in rows]
    for s in sums:
        results.append(None if s is None else s.values.data.new_empty(s.shape, dtype=s.dtype))
    if not sides and not wanted_sums:
        return results
    some = sides[0].wide if sides else wanted_sums[0].values
    T = some.count
    wanted = [out for out in results if out is not None]
    if not T:
        return [None if out is None else out.zero_() for out in results]

    features = sum(side.wide.columns for side in sides)
    most_rows = max((s.rows[0] // s.groups for s in sides), default=1)
    segments = sides[0].segments if sides else None
    tile = tiles.outer(
        T, features, most_rows, some.data.element_size(), launch.arch(),
        segments.num_experts if segments else 1,
    )  # fmt: skip
    outs, part_size = results, 0
    if tile.splits > 1:
        starts = [0]
        for out in wanted:
            starts.append(starts[-1] + ADD_BLOCK * tiles.cdiv(out.numel(), ADD_BLOCK))
        part_size = starts[-1]
        parts = some.data.new_empty((tile.splits, part_size), dtype=torch.float32)
        each = iter(starts)
        outs = [None if out is None else parts.view(-1)[next(each) :] for out in results]

    blocks_0, arguments_0, constants_0 = first.launch(tile.BA, tile.BN) if first else _NO_SIDE
    masks = second.masks if second else launch.NO_MASKS
    BN_1 = tile.BN if masks.seed is None else tiles.MASKED_ROWS
    blocks_1, arguments_1, constants_1 = second.launch(tile.BA, BN_1) if second else _NO_SIDE
    blocks = blocks_0 + blocks_1
    blocks += sum(s.shape[0] * tiles.cdiv(s.shape[1], SUM_COLUMNS) for s in wanted_sums)
    outer_parts[(blocks, tile.splits)](
        *outs[:4], *arguments_0, *arguments_1,
        tuple(s.arguments(out) for s, out in zip(sums, outs[4:], strict=True) if s), masks.seed,
        masks.threshold, T, tile.span, part_size, blocks_0, blocks_1,
        segments and segments.order, segments and segments.starts, *constants_0, *constants_1,
        BT=tile.BT, BN_0=tile.BN, BN_1=BN_1, SUMS=len(wanted_sums), BN_SUM=SUM_COLUMNS,
        TOP_K=segments.top_k if segments else 1, ONE_MASK=masks.groups == 1,
        PRECISION=launch.precision(some.data.dtype), **launch.options(tile.warps, tile.stages),
    )  # fmt: skip
    if tile.splits > 1:
        add_gradients[(part_size // ADD_BLOCK,)](
            tuple(wanted), tuple(out.numel() for out in wanted), parts, part_size,
            PARTS=tile.splits, BLOCK=ADD_BLOCK, **launch.options(4, 1),
        )  # fmt: skip
    return results
