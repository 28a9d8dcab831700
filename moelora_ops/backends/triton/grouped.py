"""The topk mix by segments: every expert meets the tokens that chose it, and no others.

For many experts, whose products cost more than moving a token's features once per choice
(``strategy.seconds``).  Routing goes first; then (token, slot) pairs are sorted by expert,
counting, in an order that depends on the choices alone (``launch.Segments``).  Shrinks gather the
tokens of a segment; expands go slot by slot, so that no two blocks of a launch write the same
token, and a token's experts are added in the order of its slots.

The device alone knows how long segments are.  Grids have as many tiles as any choices can need, and
a block without one ends: nothing waits for the GPU, and a graph may record it all.

`saved` holds hidden [T, k, r], logits [T, E], weights [T, k] and, as int32 bits, selected [T, k],
then order and starts of the segments.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import expand as _expand
from . import launch, tiles
from . import outer as _outer
from . import shrink as _shrink
from .device import exponentials, in_eights, load_pairs, row_keys, segment_tile, sum_runs
from .expand import expand_strip
from .routing import (
    choices,
    chosen_shares,
    last_choice,
    logit_gradients,
    store_prob_sums,
    sum_tiles,
    take_largest,
)
from .shrink import add_parts, shrink_tile

# Blocks of a slot that sort; each reads what all tiles have counted.
_SORTING = 32

# ---------------------------------------------------------------- routing and sorting


@triton.jit(
    do_not_specialize=["T"],
    do_not_specialize_on_alignment=["logits", "weights", "selected"],
)
def route(
    logits_parts, logits, weights, selected, tile_counts, tile_sums, T, PARTS: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """From parts of the logits to choices.  Grid: row tiles.

    Args:
        logits_parts: of a shrink; a single one is `logits`.
        logits: float32 [T, E], written if there are several parts.
        weights, selected: float32 and int32 [T, TOP_K], written, the largest logit first.
        tile_counts: int32 [tiles, TOP_K, E], written: tokens of a tile that chose an expert.
        tile_sums: float32 [tiles, E], written: the softmax summed over a tile.
    """
    tile = tl.program_id(0).to(tl.int64)
    rows = tile * BT + tl.arange(0, BT)
    exists = rows < T
    e = tl.arange(0, EP)
    at = rows[:, None] * E + e[None, :]
    mask = exists[:, None] & (e < E)[None, :]
    v = add_parts(logits_parts, at, T.to(tl.int64) * E, mask, PARTS)
    if PARTS > 1:
        tl.store(logits + at, v, mask=mask)
    keys = row_keys(v, E)
    chosen = choices(keys, last_choice(keys, E, EP, TOP_K), E, EP, TOP_K)
    p = exponentials(v, keys)
    shared = chosen_shares(p, chosen, RENORMALIZE)
    for slot in range(TOP_K):
        expert, keys = take_largest(keys)
        mine = e[None, :] == expert[:, None]
        pair = rows * TOP_K + slot
        tl.store(selected + pair, expert, mask=exists)
        tl.store(weights + pair, tl.sum(tl.where(mine, shared, 0.0), 1), mask=exists)
        counted = tl.sum(tl.where(exists[:, None] & mine, 1, 0), 0)
        tl.store(tile_counts + (tile * TOP_K + slot) * E + e, counted, mask=e < E)
    store_prob_sums(tile_sums, p, exists, tile, E)


@triton.jit(
    do_not_specialize=["T", "span", "tiles"],
    do_not_specialize_on_alignment=["selected", "order", "starts"],
)
def sort(
    selected, tile_counts, tile_sums, order, starts, counts, prob_sums, T, span, tiles,
    E: tl.constexpr, EP: tl.constexpr, TOP_K: tl.constexpr, BT: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Pairs by expert, slot and token; and sums over tiles.  Grid: slots, spans of tokens.

    Args:
        selected, tile_counts, tile_sums: see :func:`route`.
        order, starts: see ``launch.Segments``, written.
        counts, prob_sums: int64 and float32 [E], written.
        span: tokens of a block, a multiple of BT.
        tiles: how many, of BT tokens.
    """
    slot, part = tl.program_id(0), tl.program_id(1)
    e, g = tl.arange(0, EP), tl.arange(0, BG)
    first = part * (span // BT)
    # Pairs of an expert; and those before this block's, of which the expert's own first.
    total, place = tl.zeros([EP], tl.int32), tl.zeros([EP], tl.int32)
    for g0 in range(0, tiles * TOP_K, BG):
        row = g0 + g
        mask = (row < tiles * TOP_K)[:, None] & (e < E)[None, :]
        at = tile_counts + row.to(tl.int64)[:, None] * E + e[None, :]
        counted = tl.load(at, mask=mask, other=0)
        before = (row % TOP_K < slot) | ((row % TOP_K == slot) & (row // TOP_K < first))
        total += tl.sum(counted, 0)
        place += tl.sum(tl.where(before[:, None], counted, 0), 0)
    place += tl.cumsum(total, 0) - total
    if part == 0:
        tl.store(starts + e * TOP_K + slot, place, mask=e < E)
        if slot == 0:
            tl.store(starts + E * TOP_K, T * TOP_K)
            tl.store(counts + e, total.to(tl.int64), mask=e < E)
            sums = sum_tiles(tile_sums, tiles, E, EP, BG, tl.float32)
            tl.store(prob_sums + e, sums, mask=e < E)
    begin = part.to(tl.int64) * span
    end = tl.minimum(begin + span, T)
    for t in range(begin, end, BT):
        rows = t + tl.arange(0, BT)
        exists = rows < end
        pair = rows * TOP_K + slot
        expert = tl.load(selected + pair, mask=exists, other=-1)
        mine = tl.where(e[None, :] == expert[:, None], 1, 0)
        at = place[None, :] + tl.cumsum(mine, 0) - 1
        at = tl.sum(mine * at, 1)
        tl.store(order + at, pair.to(tl.int32), mask=exists)
        place += tl.sum(mine, 0)


# ---------------------------------------------------------------- products over segments


@triton.jit(
    do_not_specialize=["threshold"],
    do_not_specialize_on_alignment=["weights", "order", "starts"],
)
def shrink_segments(
    x, a, out, weights, mixed, order, starts, seed, K, stride_x, pitch, threshold, scale,
    SEGMENT: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, RANK: tl.constexpr,
    TOP_K: tl.constexpr, ONE_MASK: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BA: tl.constexpr, BB: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens times the rows of the experts that they chose.  Grid: tiles of segments, of rows.

    Args:
        x: [T, K]; a: [E, RANK, K].
        out: float32 [T, TOP_K, RANK], written.
        weights: float32 [T, TOP_K]; for `mixed`.
        mixed: [T * TOP_K, RANK], pitch (in eights) from row to row, written: out times scale and
            weight; or None.
    """
    expert, begin, end = segment_tile(starts, tl.program_id(0), 0, BT, E, EP, TOP_K, TOP_K)
    if expert < E:
        at = begin + tl.arange(0, BT)
        exists = at < end
        pairs, tokens = load_pairs(order, at, exists, TOP_K)
        row = tl.program_id(1) * BA + tl.arange(0, BA)
        exists_row = row < RANK
        hidden, _ = shrink_tile(
            x, stride_x, tokens, exists, a, expert * RANK + row, exists_row, None, None, None, K, 0,
            K, seed, threshold, 0 if ONE_MASK else expert, SEGMENT, 1, BT, BK, BA, BB, WIDE,
            PRECISION,
        )  # fmt: skip
        mask = exists[:, None] & exists_row[None, :]
        tl.store(out + pairs[:, None] * RANK + row[None, :], hidden, mask=mask)
        if mixed is not None:
            gate = scale * tl.load(weights + pairs, mask=exists, other=0.0)
            at_mixed = mixed + pairs[:, None] * in_eights(pitch, True) + row[None, :]
            tl.store(at_mixed, (gate[:, None] * hidden).to(mixed.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["T", "threshold", "walk", "slot"],
    do_not_specialize_on_alignment=["order", "starts"],
)
def expand_segments(
    y, left_a, a, left_b, b, bias, seed, T, N, stride_y, pitch_a, pitch_b, threshold, walk, order,
    starts, slot, GROUPS: tl.constexpr, ROWS: tl.constexpr, BR: tl.constexpr, ROWS_B: tl.constexpr,
    BRB: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    TOP_K: tl.constexpr, ONE_MASK: tl.constexpr,
):  # fmt: skip
    """One slot's experts, of every token, onto y.  Grid: strips of columns, walks over segments.

    Arguments as for ``expand.plan``, but left_a is [T * TOP_K, ROWS] and a [E, ROWS, N].
    """
    expert, begin, end = segment_tile(starts, tl.program_id(1), slot, walk, E, EP, 1, TOP_K)
    if expert < E:
        a += expert.to(tl.int64) * ROWS * in_eights(N, WIDE)
        expand_strip(
            y, stride_y, left_a, pitch_a, a, left_b, pitch_b, b, bias, seed, threshold,
            tl.program_id(0), begin, end, N, GROUPS, ROWS, BR, ROWS_B, BRB, BT, BN, WIDE,
            ACCUMULATE, PRECISION, 1, order, 0 if ONE_MASK else expert, TOP_K,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["T"],
    do_not_specialize_on_alignment=["logits", "weights", "selected"],
)
def mix_backward(
    dmixed, hidden, logits, weights, selected, dprob_sums, dhidden, mixed, dlogits, T, pitch,
    pitch_logits, scale, E: tl.constexpr, EP: tl.constexpr, RANK: tl.constexpr,
    WIDTH: tl.constexpr, TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """From a shrink of dy to the gradients of hidden and of logits.  Grid: row tiles.

    Args:
        dmixed, hidden: float32 [T, TOP_K, RANK].
        logits, weights, selected: see :func:`route`.
        dprob_sums: [E] or None.
        dhidden, mixed: [T * TOP_K, RANK], pitch (in eights) from row to row, written; or mixed is
            None.
        dlogits: [T, E], pitch_logits (in eights) from row to row, written.
    """
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    exists = rows < T
    e, column = tl.arange(0, EP), tl.arange(0, WIDTH)
    mask = exists[:, None] & (column < RANK)[None, :]
    mask_e = exists[:, None] & (e < E)[None, :]
    dtype = dhidden.dtype.element_ty
    shared, dshared = tl.zeros([BT, EP], tl.float32), tl.zeros([BT, EP], tl.float32)
    for slot in range(TOP_K):
        pair = rows * TOP_K + slot
        at = pair[:, None] * RANK + column[None, :]
        h = tl.load(hidden + at, mask=mask, other=0.0)
        dh = tl.load(dmixed + at, mask=mask, other=0.0)
        weight = tl.load(weights + pair, mask=exists, other=0.0)
        expert = tl.load(selected + pair, mask=exists, other=-1)
        mine = e[None, :] == expert[:, None]
        shared = tl.where(mine, weight[:, None], shared)
        dshared = tl.where(mine, scale * sum_runs(h * dh, WIDTH)[:, None], dshared)
        gate = (scale * weight)[:, None]
        at = pair[:, None] * in_eights(pitch, True) + column[None, :]
        tl.store(dhidden + at, (gate * dh).to(dtype), mask=mask)
        if mixed is not None:
            tl.store(mixed + at, (gate * h).to(dtype), mask=mask)
    v = tl.load(logits + rows[:, None] * E + e[None, :], mask=mask_e, other=0.0)
    p = exponentials(v, row_keys(v, E))
    out = logit_gradients(p, shared, dshared, dprob_sums, E, RENORMALIZE)
    at = dlogits + rows[:, None] * in_eights(pitch_logits, True) + e[None, :]
    tl.store(at, out.to(dtype), mask=mask_e)


# ---------------------------------------------------------------- launches


class Saved(NamedTuple):
    """Views of `saved`, flat.

    Attributes:
        hidden: float32 ``[T * k * r]``, neither weighted nor scaled.
        logits, weights: float32 ``[T * E]`` and ``[T * k]``.
        selected: int32 ``[T * k]``.
        segments: the pairs by expert.
    """

    hidden: Tensor
    logits: Tensor
    weights: Tensor
    selected: Tensor
    segments: launch.Segments


def views(saved: Tensor, tokens: int, num_experts: int, rank: int, top_k: int) -> Saved:
    """What lies in `saved`, see above."""
    pairs = tokens * top_k
    sizes = (pairs * rank, tokens * num_experts, pairs, pairs, pairs, num_experts * top_k + 1)
    hidden, logits, weights, *integers = saved.split(sizes)
    selected, order, starts = (t.view(torch.int32) for t in integers)
    segments = launch.Segments(order, starts, num_experts, top_k)
    return Saved(hidden, logits, weights, selected, segments)


def forward(
    x: launch.Rows, lora_down: Tensor, lora_up: Tensor, router: Tensor, bias: Tensor | None,
    y: launch.Rows, top_k: int, scale: float, renormalize: bool, masks: launch.Masks,
    accumulate: bool, saved: Tensor, counts: Tensor, prob_sums: Tensor,
) -> None:  # fmt: skip
    """``ops.topk_forward`` of some tokens: 4 launches, and one for each slot.

    Args:
        masks: one or E groups of them.
        scale: with what kept features are multiplied by.
        saved, counts, prob_sums: written.
    """
    T, (E, r, _) = x.count, lora_down.shape
    kept = views(saved, T, E, r, top_k)
    constants = {"E": E, "EP": tiles.power_of_2(E), "TOP_K": top_k}
    logits_parts, _, parts = _shrink.run(x, router, out_a=kept.logits)
    tile = tiles.routing(E)
    count = tiles.cdiv(T, tile.BT)
    tile_counts = x.data.new_empty((count, top_k, E), dtype=torch.int32)
    tile_sums = x.data.new_empty((count, E), dtype=torch.float32)
    route[(count,)](
        logits_parts, kept.logits, kept.weights, kept.selected, tile_counts, tile_sums, T,
        PARTS=parts, RENORMALIZE=renormalize, BT=tile.BT, **constants,
        **launch.options(tile.warps, 1),
    )  # fmt: skip
    span = tile.BT * tiles.cdiv(count, _SORTING)
    sort[(top_k, tiles.cdiv(T, span))](
        kept.selected, tile_counts, tile_sums, kept.segments.order, kept.segments.starts, counts,
        prob_sums, T, span, count, BT=tile.BT, BG=tile.BT, **constants,
        **launch.options(tile.warps, 1),
    )  # fmt: skip
    mixed = launch.workspace(x.data, T * top_k, r)
    _shrink_segments(x, lora_down, kept, kept.hidden, masks, scale, mixed)
    _expand_segments(y, mixed, lora_up, kept.segments, accumulate=accumulate, bias=bias)


def backward(
    dy: launch.Rows, x: launch.Rows, lora_down: Tensor, lora_up: Tensor, router: Tensor,
    saved: Tensor, dprob_sums: Tensor | None, dx: launch.Rows | None, top_k: int, scale: float,
    renormalize: bool, masks: launch.Masks, accumulate: bool, need_dparams: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """``ops.topk_backward``: 2 launches, one for each slot if there is a dx, and 4 for parameters.

    Args:
        saved: as :func:`forward` left it.
        dx: written, or added to; None if it is not wanted.
        masks, scale: see there.

    Returns:
        ``[E * r, K]``, ``[E * r, N]`` and ``[E, K]``; None without need_dparams.
    """
    T, (E, r, _) = x.count, lora_down.shape
    kept = views(saved, T, E, r, top_k)
    like = x.data
    dhidden, dlogits = launch.workspace(like, T * top_k, r), launch.workspace(like, T, E)
    mixed = launch.workspace(like, T * top_k, r) if need_dparams else None
    if T:
        dmixed = torch.empty_like(kept.hidden)
        _shrink_segments(dy, lora_up, kept, dmixed)
        EP, WIDTH = tiles.power_of_2(E), tiles.power_of_2(r)
        tile = tiles.mix(2 * max(EP, WIDTH))  # beside weights and gradients, which are as wide
        mix_backward[(tiles.cdiv(T, tile.BT),)](
            dmixed, *kept[:4], dprob_sums, dhidden.data, mixed and mixed.data, dlogits.data, T,
            dhidden.stride, dlogits.stride, scale, E=E, EP=EP, RANK=r, WIDTH=WIDTH, TOP_K=top_k,
            RENORMALIZE=renormalize, BT=tile.BT, **launch.options(tile.warps, 1),
        )  # fmt: skip
    if dx is not None:
        _expand_segments(
            dx, dhidden, lora_down, kept.segments, dlogits, router, accumulate=accumulate,
            masks=masks,
        )  # fmt: skip
    if not need_dparams:
        return None, None, None
    dup, _, ddown, _ = _outer.run(
        _outer.Side(dy, mixed, segments=kept.segments),
        _outer.Side(x, dhidden, masks=masks, segments=kept.segments),
    )
    return ddown, dup, _outer.run(_outer.Side(x, dlogits))[0]


def _shrink_segments(
    x: launch.Rows, a: Tensor, kept: Saved, out: Tensor, masks: launch.Masks = launch.NO_MASKS,
    scale: float = 1.0, mixed: launch.Rows | None = None,
) -> None:  # fmt: skip
    """See :func:`shrink_segments`."""
    segments, (E, r, K) = kept.segments, a.shape
    tile = tiles.grouped_shrink(
        K, r, a.element_size(), launch.arch(), masked=masks.seed is not None
    )
    shrink_segments[(segments.tiles(tile.BT, segments.top_k), tile.columns)](
        x.data, a, out, kept.weights, mixed and mixed.data, segments.order, segments.starts,
        masks.seed, K, x.stride, mixed.stride if mixed else 0, masks.threshold, scale,
        SEGMENT=tiles.segment(K), E=E, EP=tiles.power_of_2(E), RANK=r, TOP_K=segments.top_k,
        ONE_MASK=masks.groups == 1, BT=tile.BT, BK=tile.BK, BA=tile.BA, BB=tile.BB, WIDE=x.wide,
        PRECISION=launch.precision(a.dtype), **launch.options(tile.warps, tile.stages),
    )  # fmt: skip


def _expand_segments(
    y: launch.Rows, left: launch.Rows, a: Tensor, segments: launch.Segments,
    left_b: launch.Rows | None = None, b: Tensor | None = None, *, accumulate: bool,
    bias: Tensor | None = None, masks: launch.Masks = launch.NO_MASKS,
) -> None:  # fmt: skip
    """A launch per slot, of which the first also adds what all tokens get; see ``expand.plan``."""
    one_mask = masks.groups == 1
    masks = masks._replace(groups=1)
    for slot in range(segments.top_k):
        if slot:
            left_b = b = bias = None
        plan = _expand.plan(
            y, left, a, left_b, b, accumulate=accumulate or slot > 0, bias=bias, masks=masks
        )
        walk = plan.arguments[-1]
        constants = {"E": segments.num_experts, "EP": tiles.power_of_2(segments.num_experts)}
        plan._replace(
            grid=(plan.grid[0], segments.tiles(walk, 1)),
            arguments=(*plan.arguments, segments.order, segments.starts, slot),
            constants=plan.constants | constants | {"TOP_K": segments.top_k, "ONE_MASK": one_mask},
        ).run(expand_segments)
