"""Shrink: rows of tokens times a few skinny rows, ``x [T, K] @ a [R, K].T`` in float32.

Two stacked blocks of rows (experts and router, say) share one pass over x, of which dropout masks
the first block's alone.  The order of a sum depends on K only: segments of `tiles.segment(K)`
features have an accumulator each and are added left to right, the first four and the others
apart, and then both halves.  A kernel may thus be split over K, into halves or segments, and a
token gets the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tiles
from .device import in_eights, keep_mask, padded


@triton.jit
def shrink_tile(
    x, stride_x, rows, exists, a, row_a, exists_a, b, row_b, exists_b, K, begin, end, seed,
    threshold, expert, SEGMENT: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of tokens times a and b over the features [begin, end), which begin with a part.

    Args:
        x: [., K], stride_x from row to row; rows int64 [BT] and exists [BT] say which.
        a: [., K]; row_a [BA] and exists_a [BA] say which rows.
        b: the same with BB rows, or None.
        seed: pointer to the seed of the mask on x for the product with a, or None.
        threshold, expert: see :func:`keep_mask`.
        PARTS: 1 for the sum over all segments, 2 over a half, more for a single segment.

    Returns:
        float32 [BT, BA] and [BT, BB]; zeros without b.
    """
    K = in_eights(K, WIDE)
    stride_x = in_eights(stride_x, WIDE)
    k = tl.arange(0, BK)
    at_x = x + rows[:, None] * stride_x + k[None, :]
    at_a = a + row_a.to(tl.int64)[:, None] * K + k[None, :]
    if b is not None:
        at_b = b + row_b.to(tl.int64)[:, None] * K + k[None, :]
    if seed is not None:
        key = tl.load(seed)
    sum_a, sum_b = tl.zeros([BT, BA], tl.float32), tl.zeros([BT, BB], tl.float32)
    half_a, half_b = sum_a, sum_b
    first_a, first_b = sum_a, sum_b
    for k0 in range(begin, end, BK):
        inside = k[None, :] < end - k0
        tile = tl.load(at_x + k0, mask=exists[:, None] & inside, other=0.0)
        rows_a = tl.load(at_a + k0, mask=exists_a[:, None] & inside, other=0.0)
        kept = tile
        if seed is not None:
            kept = tl.where(keep_mask(key, threshold, rows, k0, expert, BK), tile, 0.0)
        if b is not None:
            rows_b = tl.load(at_b + k0, mask=exists_b[:, None] & inside, other=0.0)
            sum_b = tl.dot(tile, rows_b.T, sum_b, input_precision=PRECISION)
        sum_a = tl.dot(kept, rows_a.T, sum_a, input_precision=PRECISION)
        if PARTS <= 2 and (k0 + BK) % SEGMENT == 0:
            half_a += sum_a
            half_b += sum_b
            sum_a, sum_b = tl.zeros([BT, BA], tl.float32), tl.zeros([BT, BB], tl.float32)
            if PARTS == 1 and k0 + BK == 4 * SEGMENT:
                first_a, first_b = half_a, half_b
                half_a, half_b = sum_a, sum_b
    if PARTS <= 2:
        sum_a, sum_b = half_a + sum_a, half_b + sum_b
    if PARTS == 1:
        sum_a, sum_b = first_a + sum_a, first_b + sum_b
    return sum_a, sum_b


@triton.jit
def add_parts(parts, at, stride, mask, PARTS: tl.constexpr):
    """Sum of partial results in the order of :func:`shrink_tile`.

    Args:
        parts: [PARTS, .], stride apart; `at` are the offsets in one.
    """
    total = tl.load(parts + at, mask=mask, other=0.0)
    for p in tl.static_range(1, min(PARTS, 4)):
        total += tl.load(parts + p * stride + at, mask=mask, other=0.0)
    if PARTS > 4:
        rest = tl.load(parts + 4 * stride + at, mask=mask, other=0.0)
        for p in tl.static_range(5, PARTS):
            rest += tl.load(parts + p * stride + at, mask=mask, other=0.0)
        total += rest
    return total


@triton.jit(do_not_specialize=["T", "threshold"])
def shrink_parts(
    x, a, b, out_a, out_b, seed, T, K, stride_x, threshold, SPAN, SEGMENT: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ROWS_B: tl.constexpr,
    SPLITS: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BA: tl.constexpr, BB: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes partial sums; see :func:`run`.

    Grid: row tiles, column tiles of each of SPLITS segments of K features, parts of SPAN.
    """
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    columns = tl.num_programs(1) // SPLITS
    column, split, part = tl.program_id(1) % columns, tl.program_id(1) // columns, tl.program_id(2)
    K = in_eights(K, WIDE)
    x += split * K
    a += split * K
    out_a += split * (GROUPS * ROWS)
    exists = rows < T
    first = column * BA
    row_a, exists_a = padded(first + tl.arange(0, BA), GROUPS, ROWS, WIDTH)
    row_b = column * BB + tl.arange(0, BB)
    exists_b = row_b < ROWS_B
    begin = part * SPAN
    sum_a, sum_b = shrink_tile(
        x, stride_x, rows, exists, a, row_a, exists_a, b, row_b, exists_b, SPLITS * K, begin,
        tl.minimum(begin + SPAN, K), seed, threshold, first // WIDTH, SEGMENT, PARTS, BT, BK, BA,
        BB, WIDE, PRECISION,
    )  # fmt: skip
    row = part.to(tl.int64) * T + rows
    tl.store(
        out_a + row[:, None] * (SPLITS * GROUPS * ROWS) + row_a[None, :],
        sum_a,
        mask=exists[:, None] & exists_a[None, :],
    )
    if b is not None:
        tl.store(
            out_b + row[:, None] * ROWS_B + row_b[None, :],
            sum_b,
            mask=exists[:, None] & exists_b[None, :],
        )


@triton.jit(do_not_specialize=["size"])
def add_all(parts, out, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out [size] = sum of parts [PARTS, size]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, add_parts(parts, at, size, at < size, PARTS), mask=at < size)


def run(
    x: launch.Rows,
    a: Tensor,
    b: Tensor | None = None,
    out_a: Tensor | None = None,
    out_b: Tensor | None = None,
    masks: launch.Masks = launch.NO_MASKS,
    splits: int = 1,
) -> tuple[Tensor, Tensor | None, int]:
    """Shrink in one launch, maybe into partial sums, which the consumer adds (:func:`add_parts`).

    Args:
        x: ``[T, K]``.
        a: ``[..., K]`` of R rows, contiguous, in x's dtype.
        b: ``[E, K]`` likewise, or None.
        out_a, out_b: float32 ``[T, R]`` and ``[T, E]`` for the results if there is only one part;
            else, and if None, they are allocated.
        masks: on x for a's product.
        splits: how many equal segments the features of x and a are in, each with results of its
            own, ``[T, splits * R]``; neither b nor masks then.

    Returns:
        float32 ``[parts, T, R]`` and ``[parts, T, E]`` (None without b), and parts.
    """
    T, K = x.count, x.columns // splits
    R, E = a.shape[:-1].numel(), 0 if b is None else b.shape[0]
    groups = masks.groups
    width = max(tiles.power_of_2(R // groups), tiles.LEAST_COLUMNS)
    tile = tiles.shrink(
        T, K, groups * width, E, a.element_size(), launch.arch(),
        min(width, tiles.MOST_COLUMNS), splits, masked=masks.seed is not None,
    )  # fmt: skip
    parts = tile.parts
    if parts > 1 or out_a is None:
        out_a = a.new_empty((parts, T, splits * R), dtype=torch.float32)
    if b is not None and (parts > 1 or out_b is None):
        out_b = a.new_empty((parts, T, E), dtype=torch.float32)
    if T:
        shrink_parts[(tiles.cdiv(T, tile.BT), tile.columns * splits, parts)](
            x.data, a, b, out_a, out_b, masks.seed, T, K, x.stride, masks.threshold, tile.span,
            SEGMENT=tiles.segment(K), GROUPS=groups, ROWS=R // groups, WIDTH=width, ROWS_B=E,
            SPLITS=splits, PARTS=parts, BT=tile.BT, BK=tile.BK, BA=tile.BA, BB=tile.BB,
            WIDE=x.segment(splits).wide, PRECISION=launch.precision(a.dtype),
            **launch.options(tile.warps, tile.stages),
        )  # fmt: skip
    return out_a, out_b, parts


def add(parts: Tensor, out: Tensor) -> None:
    """out = the sum of parts ``[parts, *out.shape]``, all float32, in the order of a shrink."""
    block = 1024
    if out.numel():
        add_all[(tiles.cdiv(out.numel(), block),)](
            parts, out, out.numel(), PARTS=parts.shape[0], BLOCK=block, **launch.options(4, 1)
        )
