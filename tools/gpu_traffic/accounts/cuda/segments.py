"""The grouped path, whose products take an expert's tokens."""

from fractions import Fraction

from .common import (
    COUNT,
    EXPAND_COLUMNS,
    EXPAND_ROWS,
    INDEX,
    SEED,
    SHRINK_COLUMNS,
    SHRINK_FEATURES,
    Account,
    Runs,
    cdiv,
    columns_of,
    count,
    padded,
    runs,
)
from .products import statistics


def load_tiles(k: Account, found: Runs, columns: int) -> None:
    """Every block finds its tile, if there is one, and lists its tokens."""
    s = k.segments
    k.load(s.starts, 2 * s.E, INDEX, k.blocks + Fraction(found.tiles * columns, s.E))
    k.load(s.order, sum(found.pairs), INDEX, columns)


def sort(k: Account) -> None:
    p = k.p
    s = p.segments
    k.load(p.tile_counts, p.tiles * s.k * s.E, INDEX, k.blocks)
    k.load(p.selected, p.T * s.k, INDEX)
    k.store(s.order, p.T * s.k, INDEX)
    k.store(s.starts, s.E * s.k + 1, INDEX)
    k.store(p.counts, s.E, COUNT)


def shrink_segments(k: Account) -> None:
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


def expand_segments(k: Account) -> None:
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
