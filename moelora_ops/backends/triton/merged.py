"""Averaged factors with weights per sequence: merged before they meet tokens (docs/math.md).

The factors of every sequence n are merged first, ``A_n = Σ_e w_ne A_e`` and
``B_n = s Σ_e w_ne B_e``, and its tokens meet RANK rows instead of E * RANK.  Merging takes the
factors as flat, FLAT = RANK * features numbers each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import expand as _expand
from . import launch, tiles
from . import outer as _outer
from .device import in_eights
from .expand import expand_strip
from .outer import outer_block
from .shrink import add_parts, shrink_tile

# ---------------------------------------------------------------- merging


@triton.jit
def pair_of(e, f, features, E: tl.constexpr, SPLITS: tl.constexpr):
    """Which weight of a sequence expert e has at the flat column f; both broadcast."""
    if SPLITS > 1:
        e += (f % features) // (features // SPLITS) * E
    return e


@triton.jit
def merged_values(
    experts, weights, sequence, exists, f, exists_f, features, scale, E: tl.constexpr,
    RANK: tl.constexpr, SPLITS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """scale * weights times experts [E, FLAT] at sequences and flat columns f, which broadcast.

    Args:
        weights: float32 [., SPLITS * E].
        exists, exists_f: which of both are there.
    """
    FLAT = in_eights(RANK * features, WIDE)
    total = tl.zeros_like(sequence + f).to(tl.float32)
    for e in tl.range(E, loop_unroll_factor=4):
        row = tl.load(experts + e.to(tl.int64) * FLAT + f, mask=exists_f, other=0.0)
        at = sequence * (SPLITS * E) + pair_of(e, f, features, E, SPLITS)
        total += scale * tl.load(weights + at, mask=exists, other=0.0) * row.to(tl.float32)
    return total


@triton.jit
def merge_block(
    experts, merged, weights, sequences, block, features, scale, E: tl.constexpr,
    RANK: tl.constexpr, SPLITS: tl.constexpr, BS: tl.constexpr, BF: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """BS by BF of merged [sequences, FLAT]; see :func:`merged_values`."""
    FLAT = in_eights(RANK * features, WIDE)
    strips = tl.cdiv(FLAT, BF)
    f = ((block % strips) * BF + tl.arange(0, BF))[None, :]
    n = ((block // strips).to(tl.int64) * BS + tl.arange(0, BS))[:, None]
    total = merged_values(
        experts, weights, n, n < sequences, f, f < FLAT, features, scale, E, RANK, SPLITS, WIDE
    )
    mask = (n < sequences) & (f < FLAT)
    tl.store(merged + n * FLAT + f, total.to(merged.dtype.element_ty), mask=mask)


@triton.jit
def merge_own(
    experts, merged, weights, n, first, last, begin, end, features, scale, E: tl.constexpr,
    RANK: tl.constexpr, SPLITS: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Rows [first, last) by features [begin, end) of merged [., RANK, features], sequence n.

    For this block alone, whose threads may read it at once.
    """
    FLAT = in_eights(RANK * features, WIDE)
    for j0 in range(first, last, BR):
        for k0 in range(begin, end, BF):
            j, k = (j0 + tl.arange(0, BR))[:, None], (k0 + tl.arange(0, BF))[None, :]
            f, mask = j * in_eights(features, WIDE) + k, (j < last) & (k < end)
            total = merged_values(
                experts, weights, tl.full([1, 1], n, tl.int64), k < end, f, mask, features, scale,
                E, RANK, SPLITS, WIDE,
            )  # fmt: skip
            tl.store(merged + n * FLAT + f, total.to(merged.dtype.element_ty), mask=mask)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["sequences"])
def merge(
    down, up, merged_down, merged_up, weights, sequences, K, N, scale, E: tl.constexpr,
    RANK: tl.constexpr, SPLITS: tl.constexpr, BS: tl.constexpr, BF: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Both factors of all sequences.  Grid: the blocks of the one, then those of the other."""
    block = tl.program_id(0)
    blocks = tl.cdiv(sequences, BS) * tl.cdiv(RANK * K, BF)
    if block < blocks:
        merge_block(
            down, merged_down, weights, sequences, block, K, 1.0, E, RANK, SPLITS, BS, BF, WIDE
        )
    else:
        merge_block(
            up, merged_up, weights, sequences, block - blocks, N, scale, E, RANK, SPLITS, BS, BF,
            WIDE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["length"])
def shrink_sequences(
    x, merged, hidden, dhidden, low, length, K, stride_x, pitch, SEGMENT: tl.constexpr,
    RANK: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BA: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x [T, K] times the merged rows [RANK, K] of a token's sequence.

    Grid: the tiles of tokens of all sequences, tiles of rows.

    Args:
        hidden: float32 [T, RANK]; the product if dhidden is None, else read.
        dhidden: [T, RANK], pitch (in eights) from row to row; the product.
        low: the same; hidden, rounded.
    """
    tiles = tl.cdiv(length, BT)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    t = (tl.program_id(0) % tiles) * BT + tl.arange(0, BT)
    exists, rows = t < length, n * length + t
    j = tl.program_id(1) * BA + tl.arange(0, BA)
    product, _ = shrink_tile(
        x, stride_x, rows, exists, merged + n * (RANK * in_eights(K, WIDE)), j, j < RANK, None,
        None, None, K, 0, K, None, 0, 0, SEGMENT, 1, BT, BK, BA, 16, WIDE, PRECISION,
    )  # fmt: skip
    mask = exists[:, None] & (j < RANK)[None, :]
    at = rows[:, None] * in_eights(pitch, True) + j[None, :]
    at_hidden = hidden + rows[:, None] * RANK + j[None, :]
    if dhidden is None:
        tl.store(at_hidden, product, mask=mask)
    else:
        tl.store(dhidden + at, product.to(dhidden.dtype.element_ty), mask=mask)
        product = tl.load(at_hidden, mask=mask, other=0.0)
    tl.store(low + at, product.to(low.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["length", "threshold", "walk"])
def expand_sequences(
    y, left_a, a, left_b, b, bias, seed, length, N, stride_y, pitch_a, pitch_b, threshold, walk,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, BR: tl.constexpr, ROWS_B: tl.constexpr,
    BRB: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """An expand whose rows a [sequences, ROWS, N] are those of a token's sequence.

    Grid: the walks over the tokens of all sequences, strips of columns.
    """
    walks = tl.cdiv(length, walk)
    n = (tl.program_id(0) // walks).to(tl.int64)
    begin = n * length + (tl.program_id(0) % walks) * walk
    expand_strip(
        y, stride_y, left_a, pitch_a, a + n * (ROWS * in_eights(N, WIDE)), left_b, pitch_b, b, bias,
        seed, threshold, tl.program_id(1), begin, tl.minimum(begin + walk, (n + 1) * length), N,
        GROUPS, ROWS, BR, ROWS_B, BRB, BT, BN, WIDE, ACCUMULATE, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["length", "sequences"])
def merge_and_shrink(
    x, down, merged, weights, parts, length, sequences, K, stride_x, SPAN, SEGMENT: tl.constexpr,
    E: tl.constexpr, RANK: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr,
    BR: tl.constexpr, BF: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BA: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """:func:`shrink_sequences` whose blocks merge the rows that they meet: at most BT tokens each.

    Grid: sequences, tiles of rows, parts of SPAN features.

    Args:
        merged: [sequences, RANK, K], written and read.
        parts: float32 [parts, T, RANK]; see ``shrink.add_parts``.
    """
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    first, begin = tl.program_id(1) * BA, part * SPAN
    end = tl.minimum(begin + SPAN, K)
    merge_own(
        down, merged, weights, n, first, tl.minimum(first + BA, RANK), begin, end, K, 1.0, E, RANK,
        SPLITS, BR, BF, WIDE,
    )  # fmt: skip
    t, j = tl.arange(0, BT), first + tl.arange(0, BA)
    exists, rows = t < length, n * length + t
    product, _ = shrink_tile(
        x, stride_x, rows, exists, merged + n * (RANK * in_eights(K, WIDE)), j, j < RANK, None,
        None, None, K, begin, end, None, 0, 0, SEGMENT, PARTS, BT, BK, BA, 16, WIDE, PRECISION,
    )  # fmt: skip
    at = (part.to(tl.int64) * sequences * length + rows)[:, None] * RANK + j[None, :]
    tl.store(parts + at, product, mask=exists[:, None] & (j < RANK)[None, :])


@triton.jit(do_not_specialize=["length", "threshold", "walk", "sequences"])
def merge_and_expand(
    y, left_a, a, left_b, b, bias, seed, length, N, stride_y, pitch_a, pitch_b, threshold, walk,
    parts, hidden, up, weights, sequences, scale, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    BR: tl.constexpr, ROWS_B: tl.constexpr, BRB: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    WIDE: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr, E: tl.constexpr,
    SPLITS: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, BT_MIX: tl.constexpr,
    BR_MERGE: tl.constexpr,
):  # fmt: skip
    """:func:`expand_sequences` whose blocks merge their columns and add the parts of a shrink.

    Grid: sequences of at most BT_MIX tokens, strips of columns.

    Args:
        a: [sequences, ROWS, N], written and read.
        left_a: [strips, T, ROWS], pitch_a from row to row; each block's own.
        hidden: float32 [T, ROWS]; written.
    """
    n, strip = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, tokens = n * length, sequences.to(tl.int64) * length
    rows, j = begin + tl.arange(0, BT_MIX), tl.arange(0, WIDTH)
    mask = (rows < begin + length)[:, None] & (j < ROWS)[None, :]
    at = rows[:, None] * ROWS + j[None, :]
    sums = add_parts(parts, at, tokens * ROWS, mask, PARTS)
    tl.store(hidden + at, sums, mask=mask & (strip == 0))
    own = left_a + strip * tokens * pitch_a
    at = own + rows[:, None] * in_eights(pitch_a, True) + j[None, :]
    tl.store(at, sums.to(own.dtype.element_ty), mask=mask)
    merge_own(
        up, a, weights, n, 0, ROWS, strip * BN, tl.minimum(strip * BN + BN, N), N, scale, E, ROWS,
        SPLITS, BR_MERGE, BN, WIDE,
    )  # fmt: skip
    expand_strip(
        y, stride_y, own, pitch_a, a + n * (ROWS * in_eights(N, WIDE)), left_b, pitch_b, b, bias,
        seed, threshold, strip, begin, begin + length, N, GROUPS, ROWS, BR, ROWS_B, BRB, BT, BN,
        WIDE, ACCUMULATE, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["length", "span", "sequences", "blocks_0", "blocks"])
def outer_sequences(
    out_0, out_1, side_0, side_1, length, span, sequences, blocks_0, blocks, ROWS: tl.constexpr,
    BA: tl.constexpr, WIDE_0: tl.constexpr, WIDE_1: tl.constexpr, BT: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outer products of each sequence, for both sides.

    Grid: the blocks of both sides in all sequences, parts of span tokens.

    Args:
        out_0, out_1: float32 [parts, sequences, ROWS, N] of a side.
        side_0, side_1: see ``outer.Side.launch``.
    """
    block, part = tl.program_id(0) % blocks, tl.program_id(1)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    begin = n * length + part * span
    end = tl.minimum(begin + span, (n + 1) * length)
    slot = (part * sequences + n) * ROWS
    if block < blocks_0:
        wide, left, _, N, stride, pitch, _ = side_0
        outer_block(
            wide, stride, left, pitch, out_0, None, 0, None, slot * N, None, 0, block, begin, end,
            None, None, N, ROWS, BA, 0, 16, 1, BT, BN, WIDE_0, 0, False, PRECISION,
        )  # fmt: skip
    else:
        wide, left, _, N, stride, pitch, _ = side_1
        outer_block(
            wide, stride, left, pitch, out_1, None, 0, None, slot * N, None, 0, block - blocks_0,
            begin, end, None, None, N, ROWS, BA, 0, 16, 1, BT, BN, WIDE_1, 0, False, PRECISION,
        )  # fmt: skip


@triton.jit
def unmerge_block(
    parts, dexperts, weights, sequences, block, features, scale, E: tl.constexpr,
    RANK: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr, BE: tl.constexpr,
    BF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """BE by BF of dexperts [E, FLAT] = scale * weights, transposed, times the merged gradients.

    Args:
        parts: float32 [PARTS, sequences, FLAT].
    """
    FLAT = in_eights(RANK * features, WIDE)
    strips = tl.cdiv(FLAT, BF)
    f = (block % strips) * BF + tl.arange(0, BF)
    e = (block // strips) * BE + tl.arange(0, BE)
    size = sequences.to(tl.int64) * FLAT
    total = tl.zeros([BE, BF], tl.float32)
    for n in range(sequences):
        gradient = add_parts(parts, n.to(tl.int64) * FLAT + f, size, f < FLAT, PARTS)
        at = n.to(tl.int64) * (SPLITS * E) + pair_of(e[:, None], f[None, :], features, E, SPLITS)
        weight = tl.load(weights + at, mask=(e < E)[:, None], other=0.0)
        total += scale * weight * gradient[None, :]
    at = dexperts + e.to(tl.int64)[:, None] * FLAT + f[None, :]
    mask = (e < E)[:, None] & (f < FLAT)[None, :]
    tl.store(at, total.to(dexperts.dtype.element_ty), mask=mask)


@triton.jit
def products_of_segment(
    parts, experts, sequences, n, e, split, features, RANK: tl.constexpr, SPLITS: tl.constexpr,
    PARTS: tl.constexpr, BF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The merged gradients of sequence n times expert e's rows, over a segment of the features.

    Returns:
        float32 [BF], whose sum is meant.
    """
    features = in_eights(features, WIDE)
    columns = features // SPLITS
    strips = tl.cdiv(columns, BF)
    size = sequences.to(tl.int64) * RANK * features
    total = tl.zeros([BF], tl.float32)
    for i in tl.range(RANK * strips, loop_unroll_factor=4):
        c = (i % strips) * BF + tl.arange(0, BF)
        f = (i // strips) * features + split * columns + c
        row = tl.load(experts + e.to(tl.int64) * RANK * features + f, mask=c < columns, other=0.0)
        at = n.to(tl.int64) * RANK * features + f
        total += add_parts(parts, at, size, c < columns, PARTS) * row.to(tl.float32)
    return total


@triton.jit(do_not_specialize=["sequences"])
def unmerge(
    down_parts, up_parts, down, up, weights, dlora_down, dlora_up, dweights, sequences, K, N, scale,
    E: tl.constexpr, RANK: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr,
    BE: tl.constexpr, BF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradients of the experts and of the weights from those of the merged factors.

    Grid: blocks of dlora_down, of dlora_up, and one per weight, as far as they are wanted.  A
    weight's block reads all of the gradient that it meets: parts of it would need another launch.

    Args:
        down_parts, up_parts: float32 [PARTS, sequences, RANK, features].
        dlora_down, dlora_up: None if not wanted.
        dweights: float32 [sequences, SPLITS * E], or None.
    """
    block = tl.program_id(0)
    if dlora_down is not None:
        chunks = tl.cdiv(E, BE)
        blocks_down = chunks * tl.cdiv(RANK * K, BF)
        blocks_up = chunks * tl.cdiv(RANK * N, BF)
        if block < blocks_down:
            unmerge_block(
                down_parts, dlora_down, weights, sequences, block, K, 1.0, E, RANK, SPLITS, PARTS,
                BE, BF, WIDE,
            )  # fmt: skip
        elif block < blocks_down + blocks_up:
            unmerge_block(
                up_parts, dlora_up, weights, sequences, block - blocks_down, N, scale, E, RANK,
                SPLITS, PARTS, BE, BF, WIDE,
            )  # fmt: skip
        block -= blocks_down + blocks_up
    if dweights is not None and block >= 0:
        n, pair = block // (SPLITS * E), block % (SPLITS * E)
        split, e = pair // E, pair % E
        of_down = products_of_segment(
            down_parts, down, sequences, n, e, split, K, RANK, SPLITS, PARTS, BF, WIDE
        )
        of_up = products_of_segment(
            up_parts, up, sequences, n, e, split, N, RANK, SPLITS, PARTS, BF, WIDE
        )
        tl.store(dweights + block, tl.sum(of_down) + scale * tl.sum(of_up))


# Flat columns of a block; and values at once of one that merges for itself.
_FLAT, _MERGED = 512, 4096


class _Merged:
    """The factors of each sequence, merged.

    Attributes:
        down, up: ``[sequences, r, K]`` and ``[sequences, r, N]``, up with the scale in it.
    """

    def __init__(
        self, lora_down: Tensor, lora_up: Tensor, weights: Tensor, T: int, splits: int, scale: float
    ):
        self.lora_down, self.lora_up, self.weights, self.scale = lora_down, lora_up, weights, scale
        self.sequences = weights.shape[0]
        self.length = T // self.sequences
        E, r, K = lora_down.shape
        N = lora_up.shape[2]
        self.down = lora_down.new_empty((self.sequences, r, K))
        self.up = lora_up.new_empty((self.sequences, r, N))
        self.constants = {
            "E": E, "RANK": r, "SPLITS": splits, "BF": _FLAT, "WIDE": K % 8 == N % 8 == 0,
        }  # fmt: skip
        BS = min(tiles.power_of_2(self.sequences), 8)
        blocks = tiles.cdiv(self.sequences, BS) * (self._strips(K) + self._strips(N))
        merge[(blocks,)](
            lora_down, lora_up, self.down, self.up, weights, self.sequences, K, N, scale, BS=BS,
            **self.constants, **launch.options(4, 1),
        )  # fmt: skip

    def _strips(self, features: int) -> int:
        return tiles.cdiv(self.constants["RANK"] * features, _FLAT)

    def shrink(
        self, x: launch.Rows, merged: Tensor, hidden: Tensor, dhidden: launch.Rows | None = None
    ) -> launch.Rows:
        """x times `merged`: hidden ``[T, r]`` in float32, or if given dhidden.

        Returns:
            hidden in x's dtype.
        """
        K, r = x.columns, merged.shape[1]
        low = launch.workspace(merged, x.count, r)
        tile = tiles.shrink(
            self.length, K, r, 0, merged.element_size(), launch.arch(), products=self.sequences,
            whole=True,
        )  # fmt: skip
        grid = (tiles.cdiv(self.length, tile.BT) * self.sequences, tile.columns)
        shrink_sequences[grid](
            x.data, merged, hidden, dhidden and dhidden.data, low.data, self.length, K, x.stride,
            low.stride, SEGMENT=tiles.segment(K), RANK=r, BT=tile.BT, BK=tile.BK, BA=tile.BA,
            WIDE=x.wide, PRECISION=launch.precision(merged.dtype),
            **launch.options(tile.warps, tile.stages),
        )  # fmt: skip
        return low

    def expand(
        self, y: launch.Rows, left: launch.Rows, merged: Tensor, accumulate: bool,
        bias: Tensor | None = None,
    ) -> None:  # fmt: skip
        """y (+)= left ``[T, r]`` times `merged`."""
        one = y._replace(count=self.length)
        plan = _expand.plan(one, left, merged, accumulate=accumulate, bias=bias)
        strips, walks = plan.grid
        plan._replace(grid=(walks * self.sequences, strips)).run(expand_sequences)

    def gradients(
        self, dy: launch.Rows, hidden: launch.Rows, x: launch.Rows, dhidden: launch.Rows,
        need_dparams: bool, need_dweights: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:  # fmt: skip
        """dlora_down and dlora_up, None if not wanted, and dweights."""
        E, r, K = self.lora_down.shape
        N = self.lora_up.shape[2]
        sequences, wide = self.sequences, self.weights
        itemsize = self.down.element_size()
        tile = tiles.outer(self.length, (K + N) * sequences, r, itemsize, launch.arch())
        down_parts = wide.new_empty((tile.splits, sequences, r, K))
        up_parts = wide.new_empty((tile.splits, sequences, r, N))
        blocks_0, side_0, (ROWS, BA, _, _, _, WIDE_0) = _outer.Side(dy, hidden).launch(
            tile.BA, tile.BN
        )
        blocks_1, side_1, (*_, WIDE_1) = _outer.Side(x, dhidden).launch(tile.BA, tile.BN)
        blocks = blocks_0 + blocks_1
        outer_sequences[(blocks * sequences, tile.splits)](
            up_parts, down_parts, side_0, side_1, self.length, tile.span, sequences, blocks_0,
            blocks, ROWS=ROWS, BA=BA, WIDE_0=WIDE_0, WIDE_1=WIDE_1, BT=tile.BT, BN=tile.BN,
            PRECISION=launch.precision(self.down.dtype), **launch.options(tile.warps, tile.stages),
        )  # fmt: skip

        BE = min(tiles.power_of_2(E), 8)
        blocks = tiles.cdiv(E, BE) * (self._strips(K) + self._strips(N)) if need_dparams else 0
        ddown = torch.empty_like(self.lora_down) if need_dparams else None
        dup = torch.empty_like(self.lora_up) if need_dparams else None
        dweights = wide.new_empty((sequences if need_dweights else 0, wide.shape[1]))
        unmerge[(blocks + dweights.numel(),)](
            down_parts, up_parts, self.lora_down, self.lora_up, wide, ddown, dup,
            dweights if need_dweights else None, sequences, K, N, self.scale, PARTS=tile.splits,
            BE=BE, **self.constants, **launch.options(4, 1),
        )  # fmt: skip
        return ddown, dup, dweights


def _by_blocks(
    x: launch.Rows, lora_down: Tensor, lora_up: Tensor, weights: Tensor, y: launch.Rows,
    bias: Tensor | None, hidden: Tensor, splits: int, scale: float, accumulate: bool, own: int,
) -> None:  # fmt: skip
    """:func:`forward` in two launches, for sequences of at most `own` tokens; writes hidden."""
    T, K, (E, r, _), N = x.count, x.columns, lora_down.shape, y.columns
    sequences, itemsize, WIDTH = len(weights), lora_down.element_size(), tiles.power_of_2(r)
    length = T // sequences
    down, up = lora_down.new_empty((sequences, r, K)), lora_up.new_empty((sequences, r, N))
    tile = tiles.shrink(length, K, r, 0, itemsize, launch.arch(), products=sequences)
    parts = weights.new_empty((tile.parts, T, r))
    precision = launch.precision(x.data.dtype)
    common = {"E": E, "SPLITS": splits, "PARTS": tile.parts}
    BR = min(WIDTH, tile.BA)
    merge_and_shrink[(sequences, tile.columns, tile.parts)](
        x.data, lora_down, down, weights, parts, length, sequences, K, x.stride, tile.span,
        SEGMENT=tiles.segment(K), RANK=r, BR=BR, BF=_MERGED // BR, BT=tile.BT, BK=tile.BK,
        BA=tile.BA, WIDE=x.wide, PRECISION=precision, **common,
        **launch.options(tile.warps, tile.stages),
    )  # fmt: skip
    one = y._replace(count=length)
    left = launch.workspace(lora_up, _expand.strips(one) * T, r)
    plan = _expand.plan(one, left, up, accumulate=accumulate, bias=bias)
    strips, _ = plan.grid
    merge_and_expand[(sequences, strips)](
        *plan.arguments, parts, hidden, lora_up, weights, sequences, scale, WIDTH=WIDTH,
        BT_MIX=own, BR_MERGE=min(WIDTH, _MERGED // plan.constants["BN"]), **common,
        **plan.constants,
    )  # fmt: skip


def forward(
    x: launch.Rows, lora_down: Tensor, lora_up: Tensor, weights: Tensor, y: launch.Rows,
    bias: Tensor | None, splits: int, scale: float, accumulate: bool,
) -> Tensor:  # fmt: skip
    """``ops.averaged_forward``: merge, shrink, expand; of few tokens in two launches.

    Returns:
        hidden, float32 ``[T, r]``.
    """
    T, r = x.count, lora_down.shape[1]
    hidden = weights.new_empty((T, r))
    own = tiles.own_merge(T, len(weights), lora_down.shape, lora_up.shape, x.data.element_size())
    if own and y.columns:
        _by_blocks(x, lora_down, lora_up, weights, y, bias, hidden, splits, scale, accumulate, own)
    elif T:
        merged = _Merged(lora_down, lora_up, weights, T, splits, scale)
        low = merged.shrink(x, merged.down, hidden)
        merged.expand(y, low, merged.up, accumulate, bias)
    return hidden


def backward(
    dy: launch.Rows, x: launch.Rows, lora_down: Tensor, lora_up: Tensor, weights: Tensor,
    hidden: Tensor, dx: launch.Rows | None, splits: int, scale: float, accumulate: bool,
    need_dparams: bool, need_dweights: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """``ops.averaged_backward``: merge, shrink, expand, outer of each sequence, unmerge.

    Returns:
        The gradients of lora_down, lora_up (None if not wanted) and weights.
    """
    T, r = x.count, lora_down.shape[1]
    sequences = len(weights) if need_dweights else 0
    if not T:
        ddown, dup = (torch.zeros_like(t) if need_dparams else None for t in (lora_down, lora_up))
        return ddown, dup, weights.new_zeros((sequences, weights.shape[1]))
    merged = _Merged(lora_down, lora_up, weights, T, splits, scale)
    dhidden = launch.workspace(lora_down, T, r)
    low = merged.shrink(dy, merged.up, hidden, dhidden)
    if dx:
        merged.expand(dx, dhidden, merged.down, accumulate)
    if not need_dparams and not need_dweights:
        return None, None, weights.new_empty((0, weights.shape[1]))
    return merged.gradients(dy, low, x, dhidden, need_dparams, need_dweights)
