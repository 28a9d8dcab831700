"""Device functions that the kernels share.

Letters: BT rows of a tile, and in capitals whatever is known when a kernel is compiled.
"""

import triton
import triton.language as tl

# Keys of columns that do not exist; below that of every float.
NO_KEY: tl.constexpr = tl.constexpr(-(2**31))


@triton.jit
def in_eights(n, WIDE: tl.constexpr):
    """`n`; where WIDE promises that 8 divides it, in a form that shows this to the compiler.

    Triton sees by itself that 16 divides an argument.  For 200 features it would read one element
    at a time.
    """
    if WIDE:
        n = n // 8 * 8
    return n


@triton.jit
def load_left(left, pitch, rows, exists, column, exists_column):
    """left [rows, column] of rows that are pitch apart, in eights; rows int64."""
    at = left + rows[:, None] * in_eights(pitch, True) + column[None, :]
    mask = exists[:, None] & exists_column[None, :]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def load_right(right, N, row, exists_row, n, exists_n):
    """right [row, n] of rows that are N long."""
    at = right + row.to(tl.int64)[:, None] * N + n[None, :]
    return tl.load(at, mask=exists_row[:, None] & exists_n[None, :], other=0.0)


@triton.jit
def table_row(index, tokens_per_row, tokens, exists):
    """The row of a table, int64 [BT], that each token reads, see ``launch.RowMap``; -1 for none."""
    if index is None:
        row = tl.where(exists, tokens // tokens_per_row, -1)
    else:
        row = tl.load(index + tokens, mask=exists, other=-1).to(tl.int64)
    return row


@triton.jit
def load_table(table, rows, COLUMNS: tl.constexpr, row, column):
    """table [rows, COLUMNS] at [row, column]; NaN where it has none."""
    at = table + row[:, None] * COLUMNS + column[None, :]
    exists_row = (row >= 0) & (row < rows)
    mask = exists_row[:, None] & (column < COLUMNS)[None, :]
    return tl.load(at, mask=mask, other=float("nan"))


@triton.jit
def chunk(q, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Chunk q of groups of ROWS rows that are cut into chunks of at most SIZE.

    Returns:
        The group, the rows' indices [SIZE] among all groups, and which of them exist [SIZE].
    """
    PER_GROUP: tl.constexpr = (ROWS + SIZE - 1) // SIZE
    group = q // PER_GROUP
    row = (q % PER_GROUP) * SIZE + tl.arange(0, SIZE)
    return group, group * ROWS + row, row < ROWS


@triton.jit
def padded(c, GROUPS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Columns c of GROUPS groups of ROWS rows, each padded to WIDTH columns.

    Returns:
        The rows' indices without padding, and which of them exist; as large as c.
    """
    group, row = c // WIDTH, c % WIDTH
    return group * ROWS + row, (group < GROUPS) & (row < ROWS)


@triton.jit
def segment(starts, expert, slot, exists, SLOTS: tl.constexpr, TOP_K: tl.constexpr):
    """Where the pairs of SLOTS slots from `slot` on begin and end in ``launch.Segments.order``.

    Args:
        expert, exists: a scalar or as many as there shall be results; none exists: an empty one.
    """
    at = starts + expert * TOP_K + slot
    return tl.load(at, mask=exists, other=0), tl.load(at + SLOTS, mask=exists, other=0)


@triton.jit
def segment_tile(
    starts, tile, slot, SIZE, E: tl.constexpr, EP: tl.constexpr, SLOTS: tl.constexpr,
    TOP_K: tl.constexpr,
):  # fmt: skip
    """A tile of all experts' segments, each of which is cut into tiles of at most SIZE pairs.

    Returns:
        The expert, which is at least E if there are no so many tiles; where the tile begins and
        ends in ``launch.Segments.order``, int64.
    """
    e = tl.arange(0, EP)
    begin, end = segment(starts, e, slot, e < E, SLOTS, TOP_K)
    count = (end - begin + SIZE - 1) // SIZE
    after = tl.cumsum(count, 0)
    expert = tl.sum(tl.where(after <= tile, 1, 0), 0)
    begin += (tile - (after - count)) * SIZE
    end = tl.minimum(begin + SIZE, end)
    begin = tl.sum(tl.where(e == expert, begin, 0), 0)
    return expert, begin.to(tl.int64), tl.sum(tl.where(e == expert, end, 0), 0).to(tl.int64)


@triton.jit
def load_pairs(order, at, exists, TOP_K: tl.constexpr):
    """The pairs at places of ``launch.Segments.order``, int64, and their tokens."""
    pairs = tl.load(order + at, mask=exists, other=0).to(tl.int64)
    return pairs, pairs // TOP_K


@triton.jit
def sum_runs(v, LENGTH: tl.constexpr):
    """Sums of runs of LENGTH neighbours, a power of two: [numel(v) / LENGTH].

    Added as a tree of neighbours.  The order of ``tl.sum`` depends on how the tile is laid out over
    threads and so on the kernel around a mix; a token must get the same bits in each of them.
    """
    if LENGTH == 1:
        return tl.reshape(v, [v.numel])
    else:
        even, odd = tl.split(tl.reshape(v, [v.numel // 2, 2]))
        return sum_runs(even + odd, LENGTH // 2)


@triton.jit
def first_columns(v, BT: tl.constexpr, COLUMNS: tl.constexpr):
    """v[:, :COLUMNS] of a tile [BT, more columns], both powers of two."""
    if v.shape[1] == COLUMNS:
        return v
    else:
        halves = tl.permute(tl.reshape(v, [BT, 2, v.shape[1] // 2]), [0, 2, 1])
        first, _ = tl.split(halves)
        return first_columns(first, BT, COLUMNS)


@triton.jit
def order_key(v):
    """Integers in the order of float32: NaN highest, -0 equal to +0 (csrc/mix/softmax.h)."""
    bits = (v + 0.0).to(tl.int32, bitcast=True)
    return tl.where(v == v, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def keyed_float(key):
    """The float32 whose :func:`order_key` is `key`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def row_keys(v, COLUMNS: tl.constexpr):
    """:func:`order_key` of a tile [BT, EP] of which COLUMNS exist; NO_KEY for the others."""
    return tl.where((tl.arange(0, v.shape[1]) < COLUMNS)[None, :], order_key(v), NO_KEY)


@triton.jit
def exponentials(v, keys):
    """exp(v - the largest of a row), zero where a column does not exist; see :func:`row_keys`.

    A row that has a NaN or +inf, or nothing finite, has a NaN here, and so is its sum.
    """
    largest = keyed_float(tl.max(keys, 1))[:, None]
    return tl.where(keys != NO_KEY, tl.exp(v - largest), 0.0)


@triton.jit
def shares(p, of):
    """p [BT, EP] divided by the sum of `of` [BT, EP] over a row."""
    return p / sum_runs(of, of.shape[1])[:, None]


@triton.jit
def softmax_backward(p, dp):
    """p * (dp - the sum of p * dp over a row) [BT, EP]."""
    return p * (dp - sum_runs(p * dp, p.shape[1])[:, None])


@triton.jit
def keep_mask(seed, threshold, token, first, expert, SIZE: tl.constexpr):
    """Which inputs dropout keeps, bit for bit as csrc/mix/philox.h and reference/philox.py.

    Args:
        seed: int64, a value.
        threshold: drop where 16 random bits are below.
        token: int64 [BT], indices of the rows.
        first: the first feature, a multiple of 8.
        expert: index of the mask.
        SIZE: how many features, at least 8.

    Returns:
        bool [BT, SIZE].
    """
    group = (first // 8 + tl.arange(0, SIZE // 8))[None, :] + tl.zeros_like(token)[:, None]
    low, high = token[:, None] + tl.zeros_like(group), (token >> 32)[:, None] + tl.zeros_like(group)
    w0, w1, w2, w3 = tl.philox(
        seed, group.to(tl.uint32), low.to(tl.uint32), (expert + tl.zeros_like(group)).to(tl.uint32),
        high.to(tl.uint32),
    )  # fmt: skip
    # Features 2w and 2w + 1 of eight read the low and the high half of word w; joined axes are the
    # innermost, so the word's upper bit joins first.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, [token.shape[0], SIZE]) >= threshold
