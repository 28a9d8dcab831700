"""The products, and the mixes that go into them."""

from fractions import Fraction
from typing import Any

from .common import (
    COUNT,
    EXPAND_COLUMNS,
    EXPAND_ROWS,
    INDEX,
    OUTER_COLUMNS,
    OUTER_ROWS,
    OUTER_TOKENS,
    SEED,
    SHRINK_COLUMNS,
    SHRINK_FEATURES,
    WGMMA_COLUMNS,
    Account,
    cdiv,
    columns_of,
    count,
    padded,
    runs,
    segment_length,
)
from .merged import cut, own_merging
from .mixes import mix


def mma_shrink(k: Account) -> None:
    tiles, column_tiles, _ = k.grid
    across = sum(
        cdiv(end, 8) - begin // 8
        for begin, end in columns_of(k, k.p.rows, k.p.masks, SHRINK_COLUMNS)
    )
    shrink(k, tiles, column_tiles, tiles * k.warps * across)


def wgmma_shrink(k: Account) -> None:
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


def add(k: Account) -> None:
    k.load(k.partials, k.parts * k.size, k.wide)
    k.store(k.sums, k.size, k.wide)


def round_coefficients(k: Account) -> None:
    k.load(k.arguments["from"], k.tokens * k.columns, k.wide)
    k.store(k.to, k.tokens * padded(k.columns), k.element)


def mma_expand(k: Account) -> None:
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


def outer(k: Account) -> None:
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


def add_parts(k: Account) -> None:
    p = k.p
    k.load(p.partials, p.parts * _outer_size(p), k.wide)
    _outputs(k, p)


def _outputs(k: Account, p: Any) -> None:
    for output in p.outputs:
        k.store(output.to, output.size, k.wide if output.wide else k.element)


def mix_alone(k: Account) -> None:
    k.load(k.partials, k.parts * k.T * k.columns, k.wide)
    mix(k, k.mix, k.T, k.tokens)


def mix_and_expand(k: Account) -> None:
    """Every block adds and mixes by itself; one saves what is kept, the others multiply."""
    p, others = k.p, k.blocks - 1
    mix(k, k.mix, p.T, p.T)
    k.loads.moved *= k.blocks
    k.load(k.partials, k.parts * p.T * k.columns, k.wide, k.blocks)
    k.store(k.mix.mixed, others * p.T * p.ldh, k.element)
    expand(k, k.strips, 1, 1, k.strips)


def merge_and_expand(k: Account) -> None:
    p, m, strips = k.p, k.factors, k.strips
    tokens = p.T * m.rows
    k.load(k.partials, k.parts * tokens * m.r, k.wide, strips)
    k.store(k.to.hidden, tokens * m.r, k.wide)
    k.store(k.to.low, strips * tokens * p.ldh, k.element)
    own_merging(k, m, m.up, [(m.r, columns) for columns in cut(p.columns, EXPAND_COLUMNS)])
    expand(k, strips, 1, 1, strips)
