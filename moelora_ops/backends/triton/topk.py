"""The topk mix: router logits, softmax, the k largest, their experts weighted (docs/math.md).

All experts of every token: stacked; grouped.py has the chosen ones alone.  A tile of BT tokens has
its logits in EP columns and its hidden in EP groups of WIDTH, both powers of two that hold E
experts of rank r.

`saved` holds hidden [T, E * r], logits [T, E] and, as int32 bits, the last choice [T]: from the
logits and the k-th largest of them all else is computed again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import ops
from . import expand as _expand
from . import grouped, launch, tiles
from . import outer as _outer
from . import shrink as _shrink
from .device import exponentials, first_columns, in_eights, padded, row_keys, sum_runs
from .expand import expand_strip
from .routing import (
    choices,
    chosen_shares,
    last_choice,
    logit_gradients,
    store_prob_sums,
    sum_tiles,
)
from .shrink import add_parts, shrink_tile

# ---------------------------------------------------------------- a tile, forward and backward


@triton.jit
def scaled(weights, hidden, scale, BT: tl.constexpr, EP: tl.constexpr, WIDTH: tl.constexpr):
    """scale * weights [BT, EP] times hidden [BT, EP * WIDTH], zero where the weight is.

    Also beside an expert whose hidden is not finite.
    """
    weights = (scale * weights)[:, :, None]
    hidden = tl.reshape(hidden, [BT, EP, WIDTH])
    return tl.reshape(tl.where(weights == 0, 0.0, weights * hidden), [BT, EP * WIDTH])


@triton.jit
def forward_tile(
    hidden, logits, rows, exists, tile, T, saved, mixed, pitch, counts, prob_sums, scale, writes,
    E: tl.constexpr, RANK: tl.constexpr, EP: tl.constexpr, WIDTH: tl.constexpr,
    TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr, SAVE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """hidden [BT, EP * WIDTH] and logits [BT, EP] of the tokens `rows`, int64 [BT], to `mixed`.

    Args:
        saved: float32, see above; SAVE writes hidden and logits too.
        mixed: [T, E * RANK], pitch (in eights) from row to row.
        counts, prob_sums: [tiles, E], integers and float32; row `tile` gets this tile's sums.
        writes: whether anything is written beside `mixed`.
    """
    e = tl.arange(0, EP)
    keys = row_keys(logits, E)
    last = last_choice(keys, E, EP, TOP_K)
    chosen = choices(keys, last, E, EP, TOP_K)
    p = exponentials(logits, keys)
    weights = chosen_shares(p, chosen, RENORMALIZE)

    R: tl.constexpr = E * RANK
    column, exists_column = padded(tl.arange(0, EP * WIDTH), E, RANK, WIDTH)
    mask = exists[:, None] & exists_column[None, :]
    at_logits = saved + T.to(tl.int64) * R
    if SAVE:
        tl.store(saved + rows[:, None] * R + column[None, :], hidden, mask=mask & writes)
        mask_e = exists[:, None] & (e < E)[None, :] & writes
        tl.store(at_logits + rows[:, None] * E + e[None, :], logits, mask=mask_e)
    at_last = at_logits + T.to(tl.int64) * E
    tl.store(at_last + rows, last.to(tl.float32, bitcast=True), mask=exists & writes)

    out = scaled(weights, hidden, scale, BT, EP, WIDTH).to(mixed.dtype.element_ty)
    at = mixed + rows[:, None] * in_eights(pitch, True) + column[None, :]
    tl.store(at, out, mask=mask)

    counted = tl.where(exists[:, None] & chosen, 1, 0)
    tl.store(counts + tile * E + e, tl.sum(counted, 0), mask=(e < E) & writes)
    store_prob_sums(prob_sums, p, exists, tile, E, writes)


@triton.jit
def mix_parts(
    hidden_parts, logits_parts, saved, mixed, counts, prob_sums, T, pitch, scale, tile, writes,
    PARTS: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr, EP: tl.constexpr,
    WIDTH: tl.constexpr, TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """:func:`forward_tile` from a shrink's parts, of which a single one lies in `saved`."""
    rows = tl.cast(tile, tl.int64) * BT + tl.arange(0, BT)
    exists = rows < T
    e = tl.arange(0, EP)
    column, exists_column = padded(tl.arange(0, EP * WIDTH), E, RANK, WIDTH)
    R: tl.constexpr = E * RANK
    tokens = T.to(tl.int64)
    mask, mask_e = exists[:, None] & exists_column[None, :], exists[:, None] & (e < E)[None, :]
    at, at_e = rows[:, None] * R + column[None, :], rows[:, None] * E + e[None, :]
    forward_tile(
        add_parts(hidden_parts, at, tokens * R, mask, PARTS),
        add_parts(logits_parts, at_e, tokens * E, mask_e, PARTS), rows, exists, tile, T, saved,
        mixed, pitch, counts, prob_sums, scale, writes, E, RANK, EP, WIDTH, TOP_K, RENORMALIZE,
        PARTS > 1, BT,
    )  # fmt: skip


@triton.jit
def backward_tile(
    dmixed, rows, exists, T, saved, dprob_sums, dhidden, dlogits, mixed, pitch, pitch_logits, scale,
    E: tl.constexpr, RANK: tl.constexpr, EP: tl.constexpr, WIDTH: tl.constexpr,
    TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The gradient of `mixed` [BT, EP * WIDTH] of the tokens `rows`, int64 [BT], taken back.

    Args:
        saved: as the forward pass left it.
        dprob_sums: [E] or None.
        dhidden, mixed: [T, E * RANK], pitch (in eights) from row to row, written; or mixed is None.
        dlogits: [T, E], pitch_logits (in eights) from row to row, written.
    """
    e = tl.arange(0, EP)
    mask_e = exists[:, None] & (e < E)[None, :]
    R: tl.constexpr = E * RANK
    column, exists_column = padded(tl.arange(0, EP * WIDTH), E, RANK, WIDTH)
    mask = exists[:, None] & exists_column[None, :]
    at_logits = saved + T.to(tl.int64) * R
    at_last = at_logits + T.to(tl.int64) * E
    hidden = tl.load(saved + rows[:, None] * R + column[None, :], mask=mask, other=0.0)
    logits = tl.load(at_logits + rows[:, None] * E + e[None, :], mask=mask_e, other=0.0)
    last = tl.load(at_last + rows, mask=exists, other=0.0).to(tl.int32, bitcast=True)

    keys = row_keys(logits, E)
    chosen = choices(keys, last, E, EP, TOP_K)
    p = exponentials(logits, keys)
    weights = chosen_shares(p, chosen, RENORMALIZE)
    dweights = scale * tl.reshape(sum_runs(hidden * dmixed, WIDTH), [BT, EP])
    dweights = tl.where(chosen, dweights, 0.0)
    out = logit_gradients(p, weights, dweights, dprob_sums, E, RENORMALIZE)

    dtype = dhidden.dtype.element_ty
    at = rows[:, None] * in_eights(pitch, True) + column[None, :]
    tl.store(dhidden + at, scaled(weights, dmixed, scale, BT, EP, WIDTH).to(dtype), mask=mask)
    if mixed is not None:
        tl.store(mixed + at, scaled(weights, hidden, scale, BT, EP, WIDTH).to(dtype), mask=mask)
    at = dlogits + rows[:, None] * in_eights(pitch_logits, True) + e[None, :]
    tl.store(at, out.to(dtype), mask=mask_e)


# ---------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["T", "threshold"])
def shrink_and_mix(
    x, down, router, saved, mixed, counts, prob_sums, seed, T, K, stride_x, pitch, threshold, scale,
    SEGMENT: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr, EP: tl.constexpr,
    WIDTH: tl.constexpr, TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """From x to `mixed` in one launch; see :func:`forward_tile`.  Grid: row tiles."""
    tile = tl.program_id(0).to(tl.int64)
    rows = tile * BT + tl.arange(0, BT)
    exists = rows < T
    row_a, exists_a = padded(tl.arange(0, BA), E, RANK, WIDTH)
    row_b = tl.arange(0, BB)
    hidden, logits = shrink_tile(
        x, stride_x, rows, exists, down, row_a, exists_a, router, row_b, row_b < E, K, 0, K, seed,
        threshold, 0, SEGMENT, 1, BT, BK, BA, BB, WIDE, PRECISION,
    )  # fmt: skip
    forward_tile(
        first_columns(hidden, BT, EP * WIDTH), first_columns(logits, BT, EP), rows, exists, tile, T,
        saved, mixed, pitch, counts, prob_sums, scale, True, E, RANK, EP, WIDTH, TOP_K, RENORMALIZE,
        True, BT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def mix(
    hidden_parts, logits_parts, saved, mixed, counts, prob_sums, T, pitch, scale,
    PARTS: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr, EP: tl.constexpr,
    WIDTH: tl.constexpr, TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """See :func:`mix_parts`.  Grid: row tiles."""
    mix_parts(
        hidden_parts, logits_parts, saved, mixed, counts, prob_sums, T, pitch, scale,
        tl.program_id(0), True, PARTS, E, RANK, EP, WIDTH, TOP_K, RENORMALIZE, BT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "threshold", "walk"])
def mix_and_expand(
    y, left_a, a, left_b, b, bias, seed, T, N, stride_y, pitch_a, pitch_b, threshold, walk,
    hidden_parts, logits_parts, saved, counts, prob_sums, scale, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, BR: tl.constexpr, ROWS_B: tl.constexpr, BRB: tl.constexpr, BT: tl.constexpr,
    BN: tl.constexpr, WIDE: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    PARTS: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr, EP: tl.constexpr,
    WIDTH: tl.constexpr, TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr, BT_MIX: tl.constexpr,
):  # fmt: skip
    """An expand whose blocks mix all tokens by themselves, of which there are at most BT_MIX.

    Grid: strips of columns.

    Args:
        left_a: [strips, T, E * RANK], pitch_a from row to row; each block's own.
        hidden_parts, logits_parts: see :func:`mix_parts`.
        counts, prob_sums: [E].
    """
    strip = tl.program_id(0)
    mixed = left_a + (strip * T).to(tl.int64) * pitch_a
    expand_strip(
        y, stride_y, mixed, pitch_a, a, left_b, pitch_b, b, bias, seed, threshold, strip,
        tl.cast(0, tl.int64), T, N, GROUPS, ROWS, BR, ROWS_B, BRB, BT, BN, WIDE, ACCUMULATE,
        PRECISION, MIX=mix_parts,
        mixing=(
            hidden_parts, logits_parts, saved, mixed, counts, prob_sums, T, pitch_a, scale, 0,
            strip == 0, PARTS, E, RANK, EP, WIDTH, TOP_K, RENORMALIZE, BT_MIX,
        ),
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "threshold", "walk", "tiles"])
def expand_and_count(
    y, left_a, a, left_b, b, bias, seed, T, N, stride_y, pitch_a, pitch_b, threshold, walk, counts,
    prob_sums, tile_counts, tile_sums, tiles, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    BR: tl.constexpr, ROWS_B: tl.constexpr, BRB: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    WIDE: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """The expand, and one block that sums counts and prob_sums [E] over the mix's tiles.

    Grid: strips of columns and one more, walks over tokens.
    """
    strip, part = tl.program_id(0), tl.program_id(1)
    if strip < tl.cdiv(N, BN):
        begin = part.to(tl.int64) * walk
        expand_strip(
            y, stride_y, left_a, pitch_a, a, left_b, pitch_b, b, bias, seed, threshold, strip,
            begin, tl.minimum(begin + walk, T), N, GROUPS, ROWS, BR, ROWS_B, BRB, BT, BN, WIDE,
            ACCUMULATE, PRECISION,
        )  # fmt: skip
    elif part == 0:
        e = tl.arange(0, EP)
        tl.store(counts + e, sum_tiles(tile_counts, tiles, E, EP, BG, tl.int64), mask=e < E)
        tl.store(prob_sums + e, sum_tiles(tile_sums, tiles, E, EP, BG, tl.float32), mask=e < E)


@triton.jit(do_not_specialize=["T"])
def shrink_and_mix_backward(
    dy, up, saved, dprob_sums, dhidden, dlogits, mixed, T, N, stride_dy, pitch, pitch_logits, scale,
    SEGMENT: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr, EP: tl.constexpr,
    WIDTH: tl.constexpr, TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """From dy to dhidden and dlogits in one launch; see :func:`backward_tile`.  Grid: row tiles."""
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    exists = rows < T
    row, exists_row = padded(tl.arange(0, BA), E, RANK, WIDTH)
    dmixed, _ = shrink_tile(
        dy, stride_dy, rows, exists, up, row, exists_row, None, None, None, N, 0, N, None, 0, 0,
        SEGMENT, 1, BT, BK, BA, BB, WIDE, PRECISION,
    )  # fmt: skip
    backward_tile(
        first_columns(dmixed, BT, EP * WIDTH), rows, exists, T, saved, dprob_sums, dhidden, dlogits,
        mixed, pitch, pitch_logits, scale, E, RANK, EP, WIDTH, TOP_K, RENORMALIZE, BT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def mix_backward(
    dmixed_parts, saved, dprob_sums, dhidden, dlogits, mixed, T, pitch, pitch_logits, scale,
    PARTS: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr, EP: tl.constexpr,
    WIDTH: tl.constexpr, TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """From the parts of a shrink of dy to dhidden and dlogits.  Grid: row tiles."""
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    exists = rows < T
    column, exists_column = padded(tl.arange(0, EP * WIDTH), E, RANK, WIDTH)
    R: tl.constexpr = E * RANK
    mask = exists[:, None] & exists_column[None, :]
    at = rows[:, None] * R + column[None, :]
    backward_tile(
        add_parts(dmixed_parts, at, T.to(tl.int64) * R, mask, PARTS), rows, exists, T, saved,
        dprob_sums, dhidden, dlogits, mixed, pitch, pitch_logits, scale, E, RANK, EP, WIDTH, TOP_K,
        RENORMALIZE, BT,
    )  # fmt: skip


# ---------------------------------------------------------------- operators


def topk_forward(
    x: Tensor, lora_down: Tensor, lora_up: Tensor, router: Tensor, bias: Tensor | None,
    seed: Tensor | None, y: Tensor, top_k: int, scale: float, renormalize: bool, dropout: float,
    dropout_per_expert: bool, stacked: bool, accumulate: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``ops.topk_forward``: shrink, the mix and expand in two launches or three; or grouped."""
    rows, out = _check(x, lora_down, lora_up, router, y, "y", top_k, stacked)
    T, K, (E, r, _) = rows.count, rows.columns, lora_down.shape
    if bias is not None:
        launch.check_like(bias, x, (out.columns,), "bias")
    masks, kept = launch.masks(seed, dropout, E if dropout_per_expert else 1, x)
    saved = x.new_empty((ops.topk_saved_size("triton", T, E, r, top_k, stacked),), dtype=_WIDE)
    counts, prob_sums = x.new_empty((E,), dtype=torch.int64), x.new_empty((E,), dtype=_WIDE)
    if not T:
        return saved, counts.zero_(), prob_sums.zero_()
    if not stacked:
        grouped.forward(
            rows, lora_down, lora_up, router, bias, out, top_k, scale * kept, renormalize, masks,
            accumulate, saved, counts, prob_sums,
        )  # fmt: skip
        return saved, counts, prob_sums

    constants, columns = _constants(E, r, top_k, renormalize)
    fused = tiles.fused_shrink(
        T, K, columns, constants["EP"], x.element_size(), launch.arch(), masks.seed is not None
    )
    if masks.groups > 1:
        fused = None
    own, copies = (None, 1) if fused else _expand.own_mix(out, columns)
    mixed = launch.workspace(x, copies * T, E * r)
    plan = _expand.plan(out, mixed, lora_up, accumulate=accumulate, bias=bias)
    if not fused:
        logits = saved[T * E * r :]
        hidden, logits, parts = _shrink.run(rows, lora_down, router, saved, logits, masks)
    if own:
        mix_and_expand[plan.grid](
            *plan.arguments, hidden, logits, saved, counts, prob_sums, scale * kept, PARTS=parts,
            BT_MIX=own, **constants, **plan.constants,
        )  # fmt: skip
        return saved, counts, prob_sums

    tile = tiles.mix(columns)
    count = tiles.cdiv(T, (fused or tile).BT)
    tile_counts = x.new_empty((count, E), dtype=torch.int32)
    tile_sums = x.new_empty((count, E), dtype=_WIDE)
    if fused:
        shrink_and_mix[(count,)](
            x, lora_down, router, saved, mixed.data, tile_counts, tile_sums, masks.seed, T, K,
            rows.stride, mixed.stride, masks.threshold, scale * kept, SEGMENT=tiles.segment(K),
            BT=fused.BT, BK=fused.BK, BA=fused.BA, BB=fused.BB, WIDE=rows.wide,
            PRECISION=launch.precision(x.dtype), **constants,
            **launch.options(fused.warps, fused.stages),
        )  # fmt: skip
    else:
        mix[(count,)](
            hidden, logits, saved, mixed.data, tile_counts, tile_sums, T, mixed.stride,
            scale * kept, PARTS=parts, BT=tile.BT, **constants, **launch.options(tile.warps, 1),
        )  # fmt: skip
    strips, walks = plan.grid
    expand_and_count[(strips + 1, walks)](
        *plan.arguments, counts, prob_sums, tile_counts, tile_sums, count, E=E, EP=constants["EP"],
        BG=32, **plan.constants,
    )  # fmt: skip
    return saved, counts, prob_sums


def topk_backward(
    dy: Tensor, x: Tensor, lora_down: Tensor, lora_up: Tensor, router: Tensor, seed: Tensor | None,
    saved: Tensor, dprob_sums: Tensor | None, dx: Tensor, top_k: int, scale: float,
    renormalize: bool, dropout: float, dropout_per_expert: bool, stacked: bool, accumulate: bool,
    need_dx: bool, need_dparams: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``ops.topk_backward``: shrink of dy with the mix (or two launches), expand, outer in two.

    Or grouped.
    """
    rows, dy_rows = _check(x, lora_down, lora_up, router, dy, "dy", top_k, stacked)
    T, N, (E, r, _) = rows.count, dy_rows.columns, lora_up.shape
    masks, kept = launch.masks(seed, dropout, E if dropout_per_expert else 1, x)
    size = ops.topk_saved_size("triton", T, E, r, top_k, stacked)
    if saved.shape != (size,) or saved.dtype != _WIDE:
        raise RuntimeError(f"saved: wanted {size} numbers in float32, got {list(saved.shape)}")
    if dprob_sums is not None and (dprob_sums.shape != (E,) or dprob_sums.dtype != _WIDE):
        raise RuntimeError(f"dprob_sums: wanted [{E}] in float32, got {list(dprob_sums.shape)}")
    dx_rows = launch.rows_like(dx, x, x.shape, "dx") if need_dx else None
    if not stacked:
        ddown, dup, drouter = grouped.backward(
            dy_rows, rows, lora_down, lora_up, router, saved, dprob_sums, dx_rows, top_k,
            scale * kept, renormalize, masks, accumulate, need_dparams,
        )  # fmt: skip
        return tuple(map(launch.gradient, (ddown, dup, drouter), (lora_down, lora_up, router)))

    dhidden, dlogits = launch.workspace(x, T, E * r), launch.workspace(x, T, E)
    mixed = launch.workspace(x, T, E * r) if need_dparams else None
    constants, columns = _constants(E, r, top_k, renormalize)
    results = (saved, dprob_sums, dhidden.data, dlogits.data, mixed and mixed.data)
    fused = tiles.fused_shrink(T, N, columns, 0, x.element_size(), launch.arch())
    if fused and T:
        shrink_and_mix_backward[(tiles.cdiv(T, fused.BT),)](
            dy, lora_up, *results, T, N, dy_rows.stride, dhidden.stride, dlogits.stride,
            scale * kept, SEGMENT=tiles.segment(N), BT=fused.BT, BK=fused.BK, BA=fused.BA,
            BB=fused.BB, WIDE=dy_rows.wide, PRECISION=launch.precision(x.dtype), **constants,
            **launch.options(fused.warps, fused.stages),
        )  # fmt: skip
    elif T:
        tile = tiles.mix(columns)
        dmixed, _, parts = _shrink.run(dy_rows, lora_up)
        mix_backward[(tiles.cdiv(T, tile.BT),)](
            dmixed, *results, T, dhidden.stride, dlogits.stride, scale * kept, PARTS=parts,
            BT=tile.BT, **constants, **launch.options(tile.warps, 1),
        )  # fmt: skip
    if need_dx:
        _expand.run(
            dx_rows, dhidden, lora_down, dlogits, router, accumulate=accumulate, masks=masks
        )
    if not need_dparams:
        return tuple(lora_down.new_empty((0,)) for _ in range(3))
    dup, _, ddown, drouter = _outer.run(
        _outer.Side(dy_rows, mixed), _outer.Side(rows, dhidden, dlogits, masks)
    )
    return ddown.view(lora_down.shape), dup.view(lora_up.shape), drouter


_WIDE = torch.float32


def _check(
    x: Tensor, lora_down: Tensor, lora_up: Tensor, router: Tensor, out: Tensor, name: str,
    top_k: int, stacked: bool,
) -> tuple[launch.Rows, launch.Rows]:  # fmt: skip
    """x and `out` [..., N] as rows, once everything is known to lie where the kernels reach."""
    rows = launch.experts(x, lora_down, lora_up)
    (E, _, K), N = lora_down.shape, lora_up.shape[2]
    launch.check_like(router, x, (E, K), "router")
    if not 1 <= top_k <= E:
        raise RuntimeError(f"top_k: wanted 1..{E}, got {top_k}")
    most = (2**31 - 1) // top_k  # grouped, a pair of a token and a slot is an int32
    if not stacked and rows.count > most:
        raise RuntimeError(f"x: wanted at most {most} tokens, got {rows.count}")
    return rows, launch.rows_like(out, x, (*x.shape[:-1], N), name)


def _constants(E: int, r: int, top_k: int, renormalize: bool) -> tuple[dict, int]:
    """What every kernel of the mix is compiled for, and the columns of hidden, padding included."""
    EP, WIDTH = tiles.power_of_2(E), tiles.power_of_2(r)
    constants = {"E": E, "RANK": r, "EP": EP, "WIDTH": WIDTH}
    return constants | {"TOP_K": top_k, "RENORMALIZE": renormalize}, EP * WIDTH
