"""Expand: what was mixed in rank space times the experts' rows, onto [T, N].

``y = (y or bias) + left_a [T, R] @ a [R, N] (+ left_b [T, E] @ b [E, N])``, summed in float32 and
rounded once.  A block keeps its columns of the experts and walks tiles of tokens.  The order of a
sum depends on R and E only; what is already in y is added last.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import launch, tiles
from .device import chunk, in_eights, keep_mask, load_left, load_pairs, load_right


@triton.jit
def add_product(
    total, left, pitch, rows, exists, right, N, n, exists_n, ROWS: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """total [BT, BN] plus left [rows, :] @ right [:, n], BR of ROWS at a time."""
    for q in range((ROWS + BR - 1) // BR):
        _, row, exists_row = chunk(q, ROWS, BR)
        tile = load_left(left, pitch, rows, exists, row, exists_row)
        below = load_right(right, N, row, exists_row, n, exists_n)
        total = tl.dot(tile, below, total, input_precision=PRECISION)
    return total


@triton.jit
def expand_strip(
    y, stride_y, left_a, pitch_a, a, left_b, pitch_b, b, bias, seed, threshold, strip, begin, end,
    N, GROUPS: tl.constexpr, ROWS: tl.constexpr, BR: tl.constexpr, ROWS_B: tl.constexpr,
    BRB: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr, SPLITS: tl.constexpr = 1, order=None,
    expert=0, TOP_K: tl.constexpr = 1, MIX: tl.constexpr = None, mixing=None,
):  # fmt: skip
    """A strip of BN columns of y for the tokens [begin, end), of which begin is an int64.

    Args:
        y: [., N], stride_y from row to row.
        left_a, left_b: [., SPLITS * GROUPS * ROWS] and [., ROWS_B], pitch (in eights) from row to
            row; each of SPLITS segments of y's columns is made of its own columns of left_a.
        strip: the strips of the first segment, then those of the next.
        a, b: [GROUPS * ROWS, N] and [ROWS_B, N]; b and left_b may be None.
        bias: [N] or None.
        seed: pointer to the seed of the mask on left_a @ a, one per group of rows, or None.
        threshold: see :func:`keep_mask`.
        BR, BRB: rows of a and of b that one product takes; those of a group are never mixed.
        order: int32, pairs (``launch.Segments``); then [begin, end) are places in it, rows of
            left_a are pairs, and `expert` is the mask's.
        MIX, mixing: what writes left_a and left_b for this block alone, and its arguments: called
            once the experts' rows are under way; or None.
    """
    N = in_eights(N, WIDE)
    stride_y = in_eights(stride_y, WIDE)
    columns = in_eights(N // SPLITS, WIDE)
    strips = tl.cdiv(columns, BN)
    split = strip // strips
    first = split * columns + (strip % strips) * BN
    n = first + tl.arange(0, BN)
    exists_n = n < (split + 1) * columns
    left_a += split * (GROUPS * ROWS)
    if GROUPS == 1 and ROWS <= BR:
        row_a = tl.arange(0, BR)
        rows_a = load_right(a, N, row_a, row_a < ROWS, n, exists_n)
    if b is not None and ROWS_B <= BRB:
        row_b = tl.arange(0, BRB)
        rows_b = load_right(b, N, row_b, row_b < ROWS_B, n, exists_n)
    if bias is not None:
        added = tl.load(bias + n, mask=exists_n, other=0.0).to(tl.float32)
    if seed is not None:
        key = tl.load(seed)
    if MIX is not None:
        MIX(*mixing)
        tl.debug_barrier()  # other threads of the block read it
    for t in range(begin, end, BT):
        rows = t + tl.arange(0, BT)
        exists = rows < end
        rows_left = rows
        if order is not None:
            rows_left, rows = load_pairs(order, rows, exists, TOP_K)
        total = tl.zeros([BT, BN], tl.float32)
        if GROUPS > 1:
            for q in range(GROUPS * ((ROWS + BR - 1) // BR)):
                group, row, exists_row = chunk(q, ROWS, BR)
                left = load_left(left_a, pitch_a, rows, exists, row, exists_row)
                right = load_right(a, N, row, exists_row, n, exists_n)
                term = tl.dot(left, right, input_precision=PRECISION)
                keep = keep_mask(key, threshold, rows, first, group, BN)
                total += tl.where(keep, term, 0.0)
        else:
            if ROWS <= BR:
                left = load_left(left_a, pitch_a, rows_left, exists, row_a, row_a < ROWS)
                total = tl.dot(left, rows_a, total, input_precision=PRECISION)
            else:
                total = add_product(
                    total, left_a, pitch_a, rows_left, exists, a, N, n, exists_n, ROWS, BR,
                    PRECISION,
                )  # fmt: skip
            if seed is not None:
                total = tl.where(keep_mask(key, threshold, rows, first, expert, BN), total, 0.0)
        if b is not None:
            if ROWS_B <= BRB:
                left = load_left(left_b, pitch_b, rows, exists, row_b, row_b < ROWS_B)
                total = tl.dot(left, rows_b, total, input_precision=PRECISION)
            else:
                total = add_product(
                    total, left_b, pitch_b, rows, exists, b, N, n, exists_n, ROWS_B, BRB, PRECISION
                )
        at = y + rows[:, None] * stride_y + n[None, :]
        mask = exists[:, None] & exists_n[None, :]
        if bias is not None:
            total += added[None, :]
        if ACCUMULATE:
            total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        tl.store(at, total.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "threshold", "walk"])
def expand_rows(
    y, left_a, a, left_b, b, bias, seed, T, N, stride_y, pitch_a, pitch_b, threshold, walk,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, BR: tl.constexpr, ROWS_B: tl.constexpr,
    BRB: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr, SPLITS: tl.constexpr = 1,
):  # fmt: skip
    """See :func:`run`.  Grid: strips of columns, walks over tokens."""
    begin = tl.program_id(1).to(tl.int64) * walk
    expand_strip(
        y, stride_y, left_a, pitch_a, a, left_b, pitch_b, b, bias, seed, threshold,
        tl.program_id(0), begin, tl.minimum(begin + walk, T), N, GROUPS, ROWS, BR, ROWS_B, BRB, BT,
        BN, WIDE, ACCUMULATE, PRECISION, SPLITS,
    )  # fmt: skip


def strips(y: launch.Rows, splits: int = 1) -> int:
    """Blocks that an expand onto a tile of y's rows takes; splits as for :func:`plan`."""
    tile = tiles.expand(y.count, y.columns, 1, y.data.element_size(), launch.arch())
    return splits * tiles.cdiv(y.columns // splits, tile.BN)


def own_mix(y: launch.Rows, columns: int, splits: int = 1) -> tuple[int | None, int]:
    """``tiles.own_mix`` of an expand onto y, and how many blocks write rows of their own, or 1."""
    blocks = strips(y, splits)
    own = tiles.own_mix(y.count, columns) if blocks else None
    return own, blocks if own else 1


def plan(
    y: launch.Rows,
    left_a: launch.Rows,
    a: Tensor,
    left_b: launch.Rows | None = None,
    b: Tensor | None = None,
    *,
    accumulate: bool,
    bias: Tensor | None = None,
    masks: launch.Masks = launch.NO_MASKS,
    splits: int = 1,
) -> launch.Launch:
    """The launch of :func:`expand_rows`, and the arguments of kernels that do more in it.

    Args:
        y: ``[T, N]``, written.
        left_a: ``[T, splits * R]``, pitch in eights (:func:`launch.workspace`), in y's dtype.
        a: ``[..., N]`` of R rows, contiguous, in y's dtype.
        left_b, b: a second pair or None.
        accumulate: add to what is in y.
        bias: ``[N]`` in y's dtype, or None.
        masks: on left_a @ a.
        splits: how many equal segments the columns of y and a are in, each with R columns of
            left_a; neither masks nor a second pair then.
    """
    T, N = y.count, y.columns
    segment = y.segment(splits)
    rows, E = left_a.columns // (splits * masks.groups), 0 if left_b is None else left_b.columns
    tile = tiles.expand(T, N, max(rows, E), y.data.element_size(), launch.arch())
    arguments = (
        y.data, left_a.data, a, None if left_b is None else left_b.data, b, bias, masks.seed,
        T, N, y.stride, left_a.stride, 0 if left_b is None else left_b.stride, masks.threshold,
        tile.walk,
    )  # fmt: skip
    constants = dict(
        GROUPS=masks.groups, ROWS=rows, BR=tiles.rows_of_product(rows, tile.BR), ROWS_B=E,
        BRB=tiles.rows_of_product(E, tile.BR), BT=tile.BT, BN=tile.BN, WIDE=segment.wide,
        ACCUMULATE=accumulate, PRECISION=launch.precision(y.data.dtype),
        **launch.options(tile.warps, tile.stages),
    )  # fmt: skip
    if splits > 1:  # kernels that do more take none
        constants["SPLITS"] = splits
    grid = (strips(y, splits), tiles.cdiv(T, tile.walk))
    return launch.Launch(grid, arguments, constants)


def run(*arguments, **options) -> None:
    """Expand in one launch; arguments as for :func:`plan`."""
    plan(*arguments, **options).run(expand_rows)
