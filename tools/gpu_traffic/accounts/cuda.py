"""What each kernel of csrc/cuda moves: one row of `KERNELS` per kernel, one of `MIXES` per mix.

Where all warps of a block read what depends on no token, say the columns of a table, it counts once
for each of their rounds.
"""

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


def account(launch: Launch) -> Account:
    """What `launch` moves.

    Raises:
        KeyError: the kernel or its mix has no row.
    """
    result = Account(launch)
    KERNELS[launch.name](result)
    return result


# ---------------------------------------------------------------- products


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


def _shrink(k: Account) -> None:
    tiles, column_tiles, _ = k.grid
    across = sum(
        cdiv(end, 8) - begin // 8
        for begin, end in columns_of(k, k.p.rows, k.p.masks, SHRINK_COLUMNS)
    )
    shrink(k, tiles, column_tiles, tiles * k.warps * across)


def _wgmma_shrink(k: Account) -> None:
    column_tiles = cdiv(count(k.p.rows), WGMMA_COLUMNS)
    # Groups of four warps that have a token.
    warps = 4 * k.p.batch.count * cdiv(k.p.T, 64)
    across = column_tiles * WGMMA_COLUMNS // 8
    shrink(k, k.grid[0] // column_tiles, column_tiles, warps * across)


def shrink(k: Account, tiles: int, column_tiles: int, multiplied: int) -> None:
    """A product in tiles of tokens and of columns, in so many products of 16 x 8 sums."""
    p, parts, products = k.p, k.grid[2], k.p.batch.count
    k.load(p.v, products * p.T * p.columns, k.element, column_tiles)
    k.load(p.rows.experts, products * p.rows.R * p.columns, k.element, Fraction(tiles, products))
    k.load(p.rows.others, p.rows.extra * p.columns, k.element, tiles)
    k.load(p.masks.seed, 1, SEED, k.blocks)
    length = p.columns if parts == 1 else segment_length(p.columns)
    steps = sum(
        cdiv(min(length, p.columns - part * length), SHRINK_FEATURES) for part in range(parts)
    )
    k.multiply(multiplied * steps * (SHRINK_FEATURES // 16))
    if k.finish is None or type(k.finish).__name__ == "Merged":
        k.store(p.partials, parts * p.T * products * count(p.rows), k.wide)
    if k.finish is not None:
        mix(k, k.finish, p.T, 16 * k.warps)


def segment_length(columns: int) -> int:
    """As in csrc/cuda/kernels.h."""
    return cdiv(columns, 512) * 64


def _add(k: Account) -> None:
    k.load(k.partials, k.parts * k.size, k.wide)
    k.store(k.sums, k.size, k.wide)


def _round(k: Account) -> None:
    k.load(k.arguments["from"], k.tokens * k.columns, k.wide)
    k.store(k.to, k.tokens * padded(k.columns), k.element)


def _expand(k: Account) -> None:
    expand(k, k.across, k.plan.strips, k.plan.tiles_per_walk)


def expand(k: Account, across: int, strips: int, tiles_per_walk: int, copies: int = 1) -> None:
    """A product, in blocks of several strips side by side.

    Args:
        copies: of the coefficients, which all blocks share or each has a copy of.
    """
    p, tokens = k.p, 16 * k.warps
    products, width = p.batch.count, padded(count(p.rows))
    tiles = cdiv(p.T, tokens)
    walks = cdiv(tiles, tiles_per_walk)
    # Rows that fit stay in the block; others are read for each of its tiles.
    readings = walks if width <= EXPAND_ROWS else tiles
    k.load(p.h, copies * products * p.T * width, k.element, across // copies)
    k.load(p.rows.experts, products * p.rows.R * p.columns, k.element, readings)
    k.load(p.rows.others, p.rows.extra * p.columns, k.element, readings)
    k.load(p.masks.seed, 1, SEED, products * across * walks)
    if p.accumulate:
        k.load(p.y, products * p.T * p.columns, k.element)
    else:
        # Two tokens of each warp at a time.
        last = min(p.T - (tiles - 1) * tokens, 16)
        k.load(p.bias, products * p.columns, k.element, 8 * (tiles - 1) + cdiv(last, 2))
    k.store(p.y, products * p.T * p.columns, k.element)
    steps = sum(
        cdiv(end, 16) - begin // 16 for begin, end in columns_of(k, p.rows, p.masks, EXPAND_ROWS)
    )
    k.multiply(products * tiles * k.warps * across * strips * steps * EXPAND_COLUMNS // 8)
    statistics(k, p.statistics)


def statistics(k: Account, s: Any) -> None:
    if s.blocks:
        k.load(s.prob_partials, s.blocks * s.E, k.wide)
        k.load(s.count_partials, s.blocks * s.E, INDEX)
        k.store(s.prob_sums, s.E, k.wide)
        k.store(s.counts, s.E, COUNT)


def _outer(k: Account) -> None:
    p = k.p
    segmented = p.segments.order is not None
    lengths = runs(k, p.T, 1).pairs if segmented else [p.T]
    steps = sum(
        cdiv(min(p.chunk, length - begin), OUTER_TOKENS)
        for length in lengths
        for begin in range(0, length, p.chunk)
    )
    for product in p.products:
        rows = count(product.rows)
        if not rows:
            continue
        # With segments a product is an expert's, which sees its own pairs.
        products = 1 if segmented else product.batch.count
        T = sum(lengths)
        tiles, across = cdiv(rows, OUTER_ROWS), cdiv(product.columns, p.strips * OUTER_COLUMNS)
        distinct = products * p.T * product.columns
        k.load(product.v, distinct, k.element, Fraction(T, p.T) * tiles)
        k.load(product.h, products * T * padded(rows), k.element, across)
        k.load(product.masks.seed, 1, SEED, product.batch.count * across * tiles * p.parts)
        if segmented:
            # For addresses in each strip of v and in h.
            k.load(p.segments.order, T, INDEX, (p.strips + 1) * across * tiles)
            k.load(p.segments.starts, 2 * p.segments.E, INDEX, across * tiles * p.parts)
        deep = sum(
            cdiv(end, 16) - begin // 16
            for begin, end in columns_of(k, product.rows, product.masks, OUTER_ROWS)
        )
        columns = across * p.strips * OUTER_COLUMNS
        k.multiply(products * deep * steps * OUTER_TOKENS // 16 * columns // 8)
    for sums in p.sums:
        if sums.columns:
            k.load(sums.values, p.T * sums.columns, k.wide if sums.wide else k.element)
            k.load(sums.row.map, p.T, INDEX, sums.rows * cdiv(sums.columns, 32))
    if p.partials is None:
        _outputs(k, p)
    else:
        k.store(p.partials, p.parts * _outer_size(p), k.wide)


def _outer_size(p: Any) -> int:
    return sum(o.batch.count * count(o.rows) * o.columns for o in p.products) + sum(
        s.rows * s.columns for s in p.sums
    )


def _add_parts(k: Account) -> None:
    p = k.p
    k.load(p.partials, p.parts * _outer_size(p), k.wide)
    _outputs(k, p)


def _outputs(k: Account, p: Any) -> None:
    for output in p.outputs:
        k.store(output.to, output.size, k.wide if output.wide else k.element)


# ---------------------------------------------------------------- mixes


class Rows(NamedTuple):
    """The tokens of a mix in its blocks, whose warps have one at a time: in so many rounds."""

    T: int
    blocks: int
    rounds: int


def mix(k: Account, m: Any, T: int, tokens: int) -> None:
    """A mix whose blocks have `tokens` each."""
    full, rest = divmod(T, tokens)
    rounds = full * cdiv(tokens, k.warps) + cdiv(rest, k.warps)
    MIXES[type(m).__name__](k, m, Rows(T, cdiv(T, tokens), rounds))


def _mix(k: Account) -> None:
    k.load(k.partials, k.parts * k.T * k.columns, k.wide)
    mix(k, k.mix, k.T, k.tokens)


def _mix_and_expand(k: Account) -> None:
    """Every block adds and mixes by itself; one saves what is kept, the others multiply."""
    p, others = k.p, k.blocks - 1
    mix(k, k.mix, p.T, p.T)
    k.loads.moved *= k.blocks
    k.load(k.partials, k.parts * p.T * k.columns, k.wide, k.blocks)
    k.store(k.mix.mixed, others * p.T * p.ldh, k.element)
    expand(k, k.strips, 1, 1, k.strips)


def table(k: Account, t: Any, rows: Rows) -> None:
    if t.values is not None:
        if t.row.map is not None or t.row.tokens_per_row != 1:
            raise NotImplementedError("a table whose rows tokens share")
        k.load(t.values, rows.T * t.columns, k.wide)


def _topk_routing(k: Account, m: Any, rows: Rows, slots: int) -> None:
    k.store(m.prob_partials, rows.blocks * m.E, k.wide)
    k.store(m.count_partials, rows.blocks * slots * m.E, INDEX)
    k.store(m.weights, rows.T * m.k, k.wide)
    k.store(m.selected, rows.T * m.k, INDEX)
    k.store(m.logits, rows.T * m.E, k.wide)


def _topk_forward(k: Account, m: Any, rows: Rows) -> None:
    R = m.E * m.r
    k.store(m.mixed, rows.T * padded(R), k.element)
    if m.hidden is not None:
        _topk_routing(k, m, rows, 1)
        k.store(m.hidden, rows.T * R, k.wide)


def _topk_backward(k: Account, m: Any, rows: Rows) -> None:
    R = m.E * m.r
    k.load(m.selected, rows.T * m.k, INDEX, 3)
    k.load(m.weights, rows.T * m.k, k.wide, 3)
    k.load(m.hidden, rows.T * m.k * m.r, k.wide, 1 if m.mixed is None else 2)
    k.store(m.gradients, rows.T * padded(R + m.E), k.element)
    k.store(m.mixed, rows.T * padded(R), k.element)


def _gated_forward(k: Account, m: Any, rows: Rows) -> None:
    R = m.E * m.r
    table(k, m.weights, rows)
    k.load(m.down_bias, R, k.element, rows.rounds)
    k.store(m.hidden, rows.T * R, k.wide)
    k.store(m.mixed, rows.T * padded(R + m.E * m.up_bias), k.element)


def _gated_backward(k: Account, m: Any, rows: Rows) -> None:
    R = m.E * m.r
    table(k, m.weights, rows)
    readers = sum(to is not None for to in (m.dweights, m.dhidden, m.mixed))
    k.load(m.hidden, rows.T * R, k.wide, readers)
    k.store(m.dweights, rows.T * m.E, k.wide)
    k.store(m.dhidden, rows.T * padded(R), k.element)
    k.store(m.mixed, rows.T * padded(R + m.E * m.up_bias), k.element)


def _averaged_forward(k: Account, m: Any, rows: Rows) -> None:
    table(k, m.weights, rows)
    k.store(m.hidden, rows.T * m.splits * m.E * m.r, k.wide)
    k.store(m.mixed, rows.T * m.splits * padded(m.E * m.r), k.element)


def _averaged_backward(k: Account, m: Any, rows: Rows) -> None:
    pairs, width = m.splits * m.E, m.splits * padded(m.E * m.r)
    table(k, m.weights, rows)
    k.load(m.hidden, rows.T * pairs * m.r, k.wide, 1 if m.dweights is None else 2)
    k.store(m.dweights, rows.T * pairs, k.wide)
    k.store(m.dhidden, rows.T * width, k.element)
    k.store(m.mixed, rows.T * width, k.element)


def _gates(shape: Any) -> int:
    return shape.r1 if shape.diagonal else shape.r1 * shape.r2


def _grid_forward(k: Account, m: Any, rows: Rows) -> None:
    table(k, m.intuition, rows)
    k.load(m.omega, 1, k.element, rows.blocks)
    k.load(m.beta, 1, k.element, rows.blocks)
    k.store(m.hidden, rows.T * (m.shape.r1 + _gates(m.shape)), k.wide)
    k.store(m.mixed, rows.T * padded(m.shape.r2), k.element)


def _grid_backward(k: Account, m: Any, rows: Rows) -> None:
    columns = m.shape.r1 + _gates(m.shape)
    table(k, m.intuition, rows)
    k.load(m.omega, 1, k.element, rows.blocks)
    k.load(m.beta, 1, k.element, rows.blocks)
    k.load(m.hidden, rows.T * columns, k.wide)
    k.store(m.dhidden, rows.T * padded(columns), k.element)
    k.store(m.mixed, rows.T * padded(m.shape.r2), k.element)
    k.store(m.dscalars, rows.T * 2, k.wide)
    k.store(m.dintuition, rows.T * _gates(m.shape), k.wide)


def _gate(k: Account, m: Any, rows: Rows, times: int = 1) -> None:
    """What all tokens share; norms, and the way back through them, need the triangles R_e."""
    k.load(m.factors, m.E * m.r * (m.r + 1) // 2, k.wide, times * rows.rounds)
    k.load(m.scales, m.E, k.wide, times * rows.rounds)
    k.load(m.projection, m.E * m.r * m.E, k.wide, rows.rounds)
    k.load(m.tau, 1, k.wide, rows.blocks)


def _output_gate_forward(k: Account, m: Any, rows: Rows) -> None:
    R = m.E * m.r
    _gate(k, m, rows)
    k.store(m.gates, rows.T * m.E, k.wide)
    k.store(m.hidden, rows.T * R, k.wide)
    k.store(m.mixed, rows.T * padded(R), k.element)


def _output_gate_backward(k: Account, m: Any, rows: Rows) -> None:
    R = m.E * m.r
    _gate(k, m, rows, 2 if m.dhidden else 1)
    k.load(m.hidden, rows.T * R, k.wide)
    k.load(m.gates, rows.T * m.E, k.wide, 4 if m.dhidden else 3)
    k.load(m.dgates, rows.T * m.E, k.wide)
    k.store(m.dtau, rows.T, k.wide)
    k.store(m.dlogits, rows.T * m.E, k.wide)
    k.store(m.normalized, rows.T * R, k.wide)
    k.store(m.dhidden, rows.T * padded(R), k.element)


# ---------------------------------------------------------------- segments


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


def load_tiles(k: Account, found: Runs, columns: int) -> None:
    """Every block finds its tile, if there is one, and lists its tokens."""
    s = k.segments
    k.load(s.starts, 2 * s.E, INDEX, k.blocks + Fraction(found.tiles * columns, s.E))
    k.load(s.order, sum(found.pairs), INDEX, columns)


def _sort(k: Account) -> None:
    p = k.p
    s = p.segments
    k.load(p.tile_counts, p.tiles * s.k * s.E, INDEX, k.blocks)
    k.load(p.selected, p.T * s.k, INDEX)
    k.store(s.order, p.T * s.k, INDEX)
    k.store(s.starts, s.E * s.k + 1, INDEX)
    k.store(p.counts, s.E, COUNT)


def _shrink_segments(k: Account) -> None:
    p, to, columns = k.p, k.to, k.grid[1]
    found = runs(k, p.T, 16 * k.warps)
    pairs, r = sum(found.pairs), p.rows.R
    load_tiles(k, found, columns)
    k.loads.moved += pairs * INDEX * columns  # for addresses in hidden
    k.load(p.v, p.T * p.columns, k.element, k.segments.k * columns)
    k.load(p.rows.experts, found.experts * r * p.columns, k.element, found.each)
    k.load(p.masks.seed, 1, SEED, found.tiles * columns)
    k.load(to.mixed and to.weights, pairs, k.wide, columns)
    across = sum(
        cdiv(end, 8) - begin // 8 for begin, end in columns_of(k, p.rows, p.masks, SHRINK_COLUMNS)
    )
    steps = cdiv(p.columns, SHRINK_FEATURES)
    k.multiply(found.tiles * k.warps * steps * (SHRINK_FEATURES // 16) * across)
    k.store(to.hidden, pairs * r, k.wide)
    k.store(to.mixed, pairs * padded(r), k.element)


def _expand_segments(k: Account) -> None:
    p, tokens = k.p, 16 * k.warps
    found = runs(k, p.T, k.size, k.slot)
    width = padded(count(p.rows))
    steps = sum(cdiv(n, tokens) for n in found.pairs)
    # Rows that fit stay in the block; others are read for each of its steps.
    readings = found.tiles if width <= EXPAND_ROWS else steps
    s = k.segments
    blocks = k.blocks - bool(p.statistics.blocks)
    k.load(s.starts, 2 * s.E, INDEX, blocks + Fraction(found.tiles * k.strips, s.E))
    k.load(s.order, p.T, INDEX, k.strips)
    k.load(p.h, p.T * width, k.element, k.strips)
    each = Fraction(readings, found.experts)
    k.load(p.rows.experts, found.experts * p.rows.R * p.columns, k.element, each)
    k.load(p.rows.others, p.rows.extra * p.columns, k.element, readings)
    k.load(p.masks.seed, 1, SEED, found.tiles * k.strips)
    if p.accumulate:
        k.load(p.y, p.T * p.columns, k.element)
    k.store(p.y, p.T * p.columns, k.element)
    deep = sum(
        cdiv(end, 16) - begin // 16 for begin, end in columns_of(k, p.rows, p.masks, EXPAND_ROWS)
    )
    k.multiply(steps * k.warps * k.strips * deep * EXPAND_COLUMNS // 8)
    statistics(k, p.statistics)


def _grouped_backward(k: Account, m: Any, rows: Rows) -> None:
    pairs = rows.T * m.k
    k.load(m.selected, pairs, INDEX)
    # A warp's lanes that have the same slot read its weight together.
    ldm, outputs = padded(m.r), 1 if m.mixed is None else 2
    together = {(c // 32, c // ldm) for c in range(m.k * ldm) if c % ldm < m.r}
    first = 0 if m.first is None else Fraction(cdiv(m.r, 32), m.k)
    k.load(m.weights, pairs, k.wide, 2 + Fraction(len(together), m.k) * outputs + first)
    k.load(m.hidden, pairs * m.r, k.wide, outputs)
    k.store(m.dhidden, pairs * padded(m.r), k.element)
    k.store(m.mixed, pairs * padded(m.r), k.element)
    k.store(m.first, rows.T * padded(m.r + m.E), k.element)
    k.store(m.dlogits, rows.T * padded(m.E), k.element)


# ---------------------------------------------------------------- merged factors

# Of csrc/cuda/merged.cu: threads of a block, and merged factors that share a reading of experts.
MERGE_THREADS, GROUP = 256, 8


def _merged_hidden(k: Account, to: Any, rows: Rows) -> None:
    r, T = k.p.rows.R, rows.T * k.p.batch.count
    if to.dhidden is None:
        k.store(to.hidden, T * r, k.wide)
    elif to.low is not None:
        k.load(to.hidden, T * r, k.wide)
    k.store(to.dhidden, T * padded(r), k.element)
    k.store(to.low, T * padded(r), k.element)


def _passes(k: Account, m: Any, factor: Any, others: tuple[Any, ...]) -> int:
    """Passes of all blocks over a factor, for each of which they read all weights of theirs."""
    flat, chunk = m.r * factor.columns, 16 // k.element
    aligned = all(p is None or p % 16 == 0 for p in (factor.experts, *others))
    if factor.columns // m.splits % chunk == 0 and aligned:
        return cdiv(flat, MERGE_THREADS * chunk)
    return cdiv(flat, MERGE_THREADS)


def _merge(k: Account) -> None:
    m = k.p
    if m.splits != 1:
        raise NotImplementedError("segments of the features with weights of their own")
    for factor in (m.down, m.up):
        flat = m.r * factor.columns
        k.load(factor.experts, m.E * flat, k.element, cdiv(m.rows, GROUP))
        k.load(m.weights, m.rows * m.E, k.wide, _passes(k, m, factor, (factor.merged,)))
        k.store(factor.merged, m.rows * flat, k.element)


def own_merging(k: Account, m: Any, factor: Any, shares: list[tuple[int, int]]) -> None:
    """Blocks that merge what they meet, for each row of the table: rows by columns of a factor."""
    if m.splits != 1:
        raise NotImplementedError("segments of the features with weights of their own")
    flat, chunk = m.r * factor.columns, 16 // k.element
    aligned = factor.experts % 16 == 0 and factor.merged % 16 == 0
    width = chunk if factor.columns % chunk == 0 and aligned else 1
    passes = sum(cdiv(rows * (columns // width), k.launch.threads) for rows, columns in shares)
    k.load(factor.experts, m.E * flat, k.element, m.rows)
    k.load(m.weights, m.rows * m.E, k.wide, passes)
    k.store(factor.merged, m.rows * flat, k.element)


def cut(size: int, piece: int) -> list[int]:
    return [min(piece, size - begin) for begin in range(0, size, piece)]


def _merge_rows(k: Account, m: Any, rows: Rows) -> None:
    columns = k.p.columns
    length = columns if k.grid[2] == 1 else segment_length(columns)
    shares = [(r, part) for r in cut(m.r, SHRINK_COLUMNS) for part in cut(columns, length)]
    own_merging(k, m, m.down, shares)


def _merge_and_expand(k: Account) -> None:
    p, m, strips = k.p, k.factors, k.strips
    tokens = p.T * m.rows
    k.load(k.partials, k.parts * tokens * m.r, k.wide, strips)
    k.store(k.to.hidden, tokens * m.r, k.wide)
    k.store(k.to.low, strips * tokens * p.ldh, k.element)
    own_merging(k, m, m.up, [(m.r, columns) for columns in cut(p.columns, EXPAND_COLUMNS)])
    expand(k, strips, 1, 1, strips)


def _unmerge(k: Account) -> None:
    p, m = k.p, k.p.factors
    if m.splits != 1:
        raise NotImplementedError("segments of the features with weights of their own")
    for factor, to in ((m.down, p.ddown), (m.up, p.dup)):
        flat = m.r * factor.columns
        # Groups of experts read all gradients, and so does each expert's block of a weight.
        readings = (to is not None) * cdiv(m.E, GROUP) + (p.dweights is not None) * m.E
        k.load(p.gradients, p.parts * m.rows * flat, k.wide, readings)
        k.load(p.dweights and factor.experts, m.E * flat, k.element, m.rows)
        k.load(to and m.weights, m.rows * m.E, k.wide, _passes(k, m, factor, (to,)))
        k.store(to, m.E * flat, k.element)
    k.store(p.dweights, m.rows * m.E, k.wide)


# Name of a kernel -> its formula.
KERNELS = {
    "shrink_kernel": _shrink,
    "wgmma_shrink_kernel": _wgmma_shrink,
    "add_kernel": _add,
    "round_kernel": _round,
    "expand_kernel": _expand,
    "outer_kernel": _outer,
    "add_parts_kernel": _add_parts,
    "mix_kernel": _mix,
    "mix_and_expand_kernel": _mix_and_expand,
    "sort_kernel": _sort,
    "shrink_segments_kernel": _shrink_segments,
    "expand_segments_kernel": _expand_segments,
    "merge_kernel": _merge,
    "merge_and_expand_kernel": _merge_and_expand,
    "unmerge_kernel": _unmerge,
}
# What a functor behind a shrink holds -> its formula.
MIXES = {
    "TopkForward": _topk_forward,
    "TopkBackward": _topk_backward,
    "TopkRouting": lambda k, m, rows: _topk_routing(k, m, rows, m.k),
    "GroupedBackward": _grouped_backward,
    "GatedForward": _gated_forward,
    "GatedBackward": _gated_backward,
    "AveragedForward": _averaged_forward,
    "AveragedBackward": _averaged_backward,
    "GridForward": _grid_forward,
    "GridBackward": _grid_backward,
    "OutputGateForward": _output_gate_forward,
    "OutputGateBackward": _output_gate_backward,
    "MergedHidden": _merged_hidden,
    "Merged": _merge_rows,
}
