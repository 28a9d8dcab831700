"""The averaged mix: experts whose factors are averaged, not their outputs (docs/math.md).

Weights per token: ``h = Σ_p w_p H_p``, ``H'_p = s w_p h`` over the PAIRS p of a segment of the
features and an expert, row mathematics as in csrc/mix/averaged.h.  Each segment of the features is
a product of its own.

Weights per sequence: see merged.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import expand as _expand
from . import launch, tiles
from . import merged as merged_factors
from . import outer as _outer
from . import shrink as _shrink
from .device import in_eights, load_table, sum_runs, table_row
from .expand import expand_strip
from .shrink import add_parts

# ---------------------------------------------------------------- weights per token


@triton.jit
def mix_parts(
    hidden_parts, weights, row_map, saved, mixed, T, pitch, scale, tile, writes,
    PARTS: tl.constexpr, PAIRS: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """A tile of BT tokens from a shrink's parts to `mixed`; a single part lies in `saved`.

    Args:
        weights: float32 [., PAIRS]; row_map, see ``launch.RowMap``, says which row a token reads.
        saved: float32 [T, PAIRS * RANK]; written if `writes`.
        mixed: [T, PAIRS * RANK], pitch (in eights) from row to row; written.
    """
    R: tl.constexpr = PAIRS * RANK
    rows = tl.cast(tile, tl.int64) * BT + tl.arange(0, BT)
    exists = rows < T
    j = tl.arange(0, WIDTH)
    mask = exists[:, None] & (j < RANK)[None, :]
    table_rows, index, tokens_per_row = row_map
    row = table_row(index, tokens_per_row, rows, exists)
    average = tl.zeros([BT, WIDTH], tl.float32)
    for p in tl.range(PAIRS, loop_unroll_factor=4):
        at = rows[:, None] * R + (p * RANK + j)[None, :]
        hidden = add_parts(hidden_parts, at, T.to(tl.int64) * R, mask, PARTS)
        if PARTS > 1:
            tl.store(saved + at, hidden, mask=mask & writes)
        average += load_table(weights, table_rows, PAIRS, row, p + tl.arange(0, 1)) * hidden
    for p in tl.range(PAIRS, loop_unroll_factor=4):
        weight = load_table(weights, table_rows, PAIRS, row, p + tl.arange(0, 1))
        at = mixed + rows[:, None] * in_eights(pitch, True) + (p * RANK + j)[None, :]
        tl.store(at, (scale * weight * average).to(mixed.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "row_map"])
def mix(
    hidden_parts, weights, row_map, saved, mixed, T, pitch, scale, PARTS: tl.constexpr,
    PAIRS: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """See :func:`mix_parts`.  Grid: tiles of tokens."""
    mix_parts(
        hidden_parts, weights, row_map, saved, mixed, T, pitch, scale, tl.program_id(0), True,
        PARTS, PAIRS, RANK, WIDTH, BT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "threshold", "walk", "row_map"])
def mix_and_expand(
    y, left_a, a, left_b, b, bias, seed, T, N, stride_y, pitch_a, pitch_b, threshold, walk,
    hidden_parts, weights, row_map, saved, scale, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    BR: tl.constexpr, ROWS_B: tl.constexpr, BRB: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    WIDE: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
    PAIRS: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, BT_MIX: tl.constexpr,
    SPLITS: tl.constexpr = 1,
):  # fmt: skip
    """An expand whose blocks mix all tokens by themselves, of which there are at most BT_MIX.

    Grid: strips of columns.

    Args:
        left_a: [strips, T, PAIRS * RANK], pitch_a from row to row; each block's own.
    """
    strip = tl.program_id(0)
    mixed = left_a + (strip * T).to(tl.int64) * pitch_a
    expand_strip(
        y, stride_y, mixed, pitch_a, a, left_b, pitch_b, b, bias, seed, threshold, strip,
        tl.cast(0, tl.int64), T, N, GROUPS, ROWS, BR, ROWS_B, BRB, BT, BN, WIDE, ACCUMULATE,
        PRECISION, SPLITS, MIX=mix_parts,
        mixing=(
            hidden_parts, weights, row_map, saved, mixed, T, pitch_a, scale, 0, strip == 0, PARTS,
            PAIRS, RANK, WIDTH, BT_MIX,
        ),
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "row_map"])
def mix_backward(
    dmixed_parts, weights, row_map, saved, dhidden, mixed, dweights, T, pitch, scale,
    PARTS: tl.constexpr, PAIRS: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """From the parts of a shrink of dy to the gradients in rank space.  Grid: tiles of tokens.

    Args:
        saved: as the forward pass left it.
        dhidden, mixed: [T, PAIRS * RANK], pitch (in eights) from row to row; written, mixed unless
            None.
        dweights: float32 [T, PAIRS]; each token's share, written unless None.
    """
    R: tl.constexpr = PAIRS * RANK
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    exists = rows < T
    tokens = T.to(tl.int64)
    j = tl.arange(0, WIDTH)
    mask = exists[:, None] & (j < RANK)[None, :]
    table_rows, index, tokens_per_row = row_map
    row = table_row(index, tokens_per_row, rows, exists)
    average, daverage = tl.zeros([BT, WIDTH], tl.float32), tl.zeros([BT, WIDTH], tl.float32)
    for p in tl.range(PAIRS, loop_unroll_factor=4):
        at = rows[:, None] * R + (p * RANK + j)[None, :]
        weight = load_table(weights, table_rows, PAIRS, row, p + tl.arange(0, 1))
        average += weight * tl.load(saved + at, mask=mask, other=0.0)
        daverage += scale * weight * add_parts(dmixed_parts, at, tokens * R, mask, PARTS)
    for p in tl.range(PAIRS, loop_unroll_factor=4):
        at = rows[:, None] * R + (p * RANK + j)[None, :]
        weight = load_table(weights, table_rows, PAIRS, row, p + tl.arange(0, 1))
        if dweights is not None:
            hidden = tl.load(saved + at, mask=mask, other=0.0)
            dmixed = add_parts(dmixed_parts, at, tokens * R, mask, PARTS)
            share = sum_runs(scale * dmixed * average + daverage * hidden, WIDTH)
            tl.store(dweights + rows * PAIRS + p, share, mask=exists)
        at = rows[:, None] * in_eights(pitch, True) + (p * RANK + j)[None, :]
        dtype = dhidden.dtype.element_ty
        tl.store(dhidden + at, (weight * daverage).to(dtype), mask=mask)
        if mixed is not None:
            tl.store(mixed + at, (scale * weight * average).to(dtype), mask=mask)


def _forward(
    x: launch.Rows, lora_down: Tensor, lora_up: Tensor, weights: Tensor, table: launch.RowMap,
    y: launch.Rows, bias: Tensor | None, splits: int, scale: float, accumulate: bool,
) -> Tensor:  # fmt: skip
    T, (E, r, _) = x.count, lora_down.shape
    pairs, WIDTH = splits * E, tiles.power_of_2(r)
    hidden = weights.new_empty((T, pairs * r))
    own, copies = _expand.own_mix(y, pairs * WIDTH, splits)
    mixed = launch.workspace(lora_down, copies * T, pairs * r)
    expand = _expand.plan(y, mixed, lora_up, accumulate=accumulate, bias=bias, splits=splits)
    sums, _, parts = _shrink.run(x, lora_down, out_a=hidden, splits=splits)
    if own:
        mix_and_expand[expand.grid](
            *expand.arguments, sums, weights, table, hidden, scale, PARTS=parts, PAIRS=pairs,
            RANK=r, WIDTH=WIDTH, BT_MIX=own, **expand.constants,
        )  # fmt: skip
    else:
        _mix(
            mix, T, pairs, r, sums, weights, table, hidden, mixed.data, T, mixed.stride, scale,
            parts,
        )  # fmt: skip
        expand.run(_expand.expand_rows)
    return hidden


def _backward(
    dy: launch.Rows, x: launch.Rows, lora_down: Tensor, lora_up: Tensor, weights: Tensor,
    table: launch.RowMap, hidden: Tensor, dx: launch.Rows | None, splits: int, scale: float,
    accumulate: bool, need_dparams: bool, need_dweights: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    T, (E, r, _) = x.count, lora_down.shape
    R = splits * E * r
    dhidden = launch.workspace(lora_down, T, R)
    mixed = launch.workspace(lora_down, T, R) if need_dparams else None
    dweights = weights.new_empty((T if need_dweights else 0, splits * E))
    sums, _, parts = _shrink.run(dy, lora_up, splits=splits)
    _mix(
        mix_backward, T, splits * E, r, sums, weights, table, hidden, dhidden.data,
        mixed and mixed.data, dweights if need_dweights else None, T, dhidden.stride, scale, parts,
    )  # fmt: skip
    if dx:
        _expand.run(dx, dhidden, lora_down, accumulate=accumulate, splits=splits)
    first = second = shared = None
    if need_dparams:
        first = _outer.Side(dy, mixed, splits=splits)
        second = _outer.Side(x, dhidden, splits=splits)
    if need_dweights and table.shared:
        shared = _outer.Sums(launch.rows_of(dweights, "dweights"), table)
    dup, _, ddown, _, total = _outer.run(first, second, [shared])
    return ddown, dup, dweights if total is None else total


def _mix(kernel, T: int, pairs: int, r: int, *arguments) -> None:
    """Launch a row kernel over T tokens; the last of its arguments is PARTS."""
    WIDTH = tiles.power_of_2(r)
    tile = tiles.mix(WIDTH)
    if T:
        kernel[(tiles.cdiv(T, tile.BT),)](
            *arguments, PAIRS=pairs, RANK=r, WIDTH=WIDTH, BT=tile.BT,
            **launch.options(tile.warps, 1),
        )  # fmt: skip


# ---------------------------------------------------------------- operators


def averaged_forward(
    x: Tensor, lora_down: Tensor, lora_up: Tensor, weights: Tensor, row_map: Tensor | None,
    bias: Tensor | None, y: Tensor, splits: int, scale: float, merged: bool, accumulate: bool,
) -> Tensor:  # fmt: skip
    """``ops.averaged_forward``: shrink, the mix, expand; or merge, shrink, expand.

    Of few tokens in two launches.
    """
    rows, out, table = _check(x, lora_down, lora_up, weights, row_map, y, "y", splits, merged)
    if bias is not None:
        launch.check_like(bias, x, (out.columns,), "bias")
    if merged:
        return merged_factors.forward(
            rows, lora_down, lora_up, weights, out, bias, splits, scale, accumulate
        )
    return _forward(rows, lora_down, lora_up, weights, table, out, bias, splits, scale, accumulate)


def averaged_backward(
    dy: Tensor, x: Tensor, lora_down: Tensor, lora_up: Tensor, weights: Tensor,
    row_map: Tensor | None, hidden: Tensor, dx: Tensor, splits: int, scale: float, merged: bool,
    accumulate: bool, need_dx: bool, need_dparams: bool, need_dweights: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``ops.averaged_backward`` in five launches.

    Shrink of dy, the mix, expand, outer, the sum of its parts; or merge, shrink, expand, outer of
    each sequence, and from the merged factors' gradients those of the experts and of the weights.
    """
    rows, dy_rows, table = _check(x, lora_down, lora_up, weights, row_map, dy, "dy", splits, merged)
    columns = lora_down.shape[1] * (1 if merged else weights.shape[1])
    launch.check_like(hidden, weights, (rows.count, columns), "hidden")
    dx_rows = launch.rows_like(dx, x, x.shape, "dx") if need_dx else None
    if merged:
        ddown, dup, dweights = merged_factors.backward(
            dy_rows, rows, lora_down, lora_up, weights, hidden, dx_rows, splits, scale, accumulate,
            need_dparams, need_dweights,
        )  # fmt: skip
    else:
        ddown, dup, dweights = _backward(
            dy_rows, rows, lora_down, lora_up, weights, table, hidden, dx_rows, splits, scale,
            accumulate, need_dparams, need_dweights,
        )  # fmt: skip
    return launch.gradient(ddown, lora_down), launch.gradient(dup, lora_up), dweights


def _check(
    x: Tensor, lora_down: Tensor, lora_up: Tensor, weights: Tensor, row_map: Tensor | None,
    out: Tensor, name: str, splits: int, merged: bool,
) -> tuple[launch.Rows, launch.Rows, launch.RowMap]:  # fmt: skip
    """x and `out` [..., N] as rows and how tokens read the weights, if all fits together."""
    rows = launch.experts(x, lora_down, lora_up)
    E, N = lora_down.shape[0], lora_up.shape[2]
    if splits < 1 or rows.columns % splits or N % splits:
        raise RuntimeError(
            f"splits: wanted a divisor of in_features and out_features, got {splits}"
        )
    if merged and row_map is not None:
        raise RuntimeError("row_map: sequences lie one after the other if merged")
    table = launch.table(weights, row_map, rows.count, splits * E, "weights")
    return rows, launch.rows_like(out, x, (*x.shape[:-1], N), name), table
