"""The gated mix: experts with given weights, ``H'_e = s w_e φ(H_e)`` (docs/math.md).

Row mathematics as in csrc/mix/gated.h.  No expert meets another, so the mix is done in tiles of BT
tokens by EB experts, whose rank is padded to WIDTH columns, a power of two.

`hidden` is H [T, E * r] before φ, with the down biases and whatever dropout multiplies by in it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import ops
from . import expand as _expand
from . import launch, tiles
from . import outer as _outer
from . import shrink as _shrink
from .device import first_columns, in_eights, load_table, padded, sum_runs, table_row
from .expand import expand_strip
from .shrink import add_parts, shrink_tile

_RELU: tl.constexpr = tl.constexpr(ops.ACTIVATIONS["relu"])
_GELU: tl.constexpr = tl.constexpr(ops.ACTIVATIONS["gelu"])
_GELU_TANH: tl.constexpr = tl.constexpr(ops.ACTIVATIONS["gelu_tanh"])

# ---------------------------------------------------------------- row mathematics


@triton.jit
def gelu_tanh_share(v):
    """What gelu's tanh approximation multiplies v by: σ(2u), u = √(2/π) (v + 0.044715 v³)."""
    return tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    """φ(v)."""
    if ACTIVATION == _RELU:
        v = tl.where(v < 0, 0.0, v)  # NaN stays
    elif ACTIVATION == _GELU:
        v = 0.5 * v * (1 + tl.erf(v * 0.7071067811865476))
    elif ACTIVATION == _GELU_TANH:
        v = v * gelu_tanh_share(v)
    return v


@triton.jit
def times_slope(dv, v, ACTIVATION: tl.constexpr):
    """dv φ'(v); relu's slope is 0 at 0, as in PyTorch."""
    if ACTIVATION == _RELU:
        dv = dv * tl.where(v > 0, 1.0, tl.where(v == v, 0.0, v))
    elif ACTIVATION == _GELU:
        density = 0.3989422804014327 * tl.exp(-0.5 * v * v)
        dv = dv * (0.5 * (1 + tl.erf(v * 0.7071067811865476)) + v * density)
    elif ACTIVATION == _GELU_TANH:
        share = gelu_tanh_share(v)
        steepness = 1.5957691216057308 * (1 + 3 * 0.044715 * v * v)
        dv = dv * (share + v * share * (1 - share) * steepness)
    return dv


@triton.jit
def each_column(gates, WIDTH: tl.constexpr):
    """gates [BT, EB] for each of an expert's columns: [BT, EB * WIDTH]."""
    BT: tl.constexpr = gates.shape[0]
    EB: tl.constexpr = gates.shape[1]
    gates = tl.broadcast_to(gates[:, :, None], [BT, EB, WIDTH])
    return tl.reshape(gates, [BT, EB * WIDTH])


# ---------------------------------------------------------------- a tile, forward and backward


@triton.jit
def forward_tile(
    hidden, rows, exists, first, down_bias, weights, row_map, saved, mixed, pitch, gates,
    pitch_gates, scale, kept, writes, E: tl.constexpr, RANK: tl.constexpr, EB: tl.constexpr,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """hidden [BT, EB * WIDTH] of the tokens `rows`, int64 [BT], and the experts from `first` on.

    Args:
        down_bias: [E, RANK] or None.
        weights: float32 [., E]; row_map, see ``launch.RowMap``, says which row a token reads.
        saved: float32 [T, E * RANK]; written if SAVE and `writes`, with `kept` and down_bias in it.
        mixed: [T, E * RANK], pitch (in eights) from row to row; written.
        gates: [T, E], pitch_gates from row to row; what multiplies the up biases, written unless
            None.
    """
    R: tl.constexpr = E * RANK
    column, exists_column = padded(first * WIDTH + tl.arange(0, EB * WIDTH), E, RANK, WIDTH)
    mask = exists[:, None] & exists_column[None, :]
    e = first + tl.arange(0, EB)
    hidden *= kept
    if down_bias is not None:
        added = tl.load(down_bias + column, mask=exists_column, other=0.0)
        hidden += added.to(tl.float32)[None, :]
    if SAVE:
        tl.store(saved + rows[:, None] * R + column[None, :], hidden, mask=mask & writes)

    table_rows, index, tokens_per_row = row_map
    row = table_row(index, tokens_per_row, rows, exists)
    gate = scale * load_table(weights, table_rows, E, row, e)
    dtype = mixed.dtype.element_ty
    out = each_column(gate, WIDTH) * activate(hidden, ACTIVATION)
    at = mixed + rows[:, None] * in_eights(pitch, True) + column[None, :]
    tl.store(at, out.to(dtype), mask=mask)
    if gates is not None:
        at = gates + rows[:, None] * in_eights(pitch_gates, True) + e[None, :]
        tl.store(at, gate.to(dtype), mask=exists[:, None] & (e < E)[None, :])


@triton.jit
def mix_parts(
    hidden_parts, down_bias, weights, row_map, saved, mixed, gates, T, pitch, pitch_gates, scale,
    kept, tile, first, writes, PARTS: tl.constexpr, SAVE: tl.constexpr, E: tl.constexpr,
    RANK: tl.constexpr, EB: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """:func:`forward_tile` from a shrink's parts."""
    rows = tl.cast(tile, tl.int64) * BT + tl.arange(0, BT)
    exists = rows < T
    R: tl.constexpr = E * RANK
    column, exists_column = padded(first * WIDTH + tl.arange(0, EB * WIDTH), E, RANK, WIDTH)
    hidden = add_parts(
        hidden_parts, rows[:, None] * R + column[None, :], T.to(tl.int64) * R,
        exists[:, None] & exists_column[None, :], PARTS,
    )  # fmt: skip
    forward_tile(
        hidden, rows, exists, first, down_bias, weights, row_map, saved, mixed, pitch, gates,
        pitch_gates, scale, kept, writes, E, RANK, EB, WIDTH, ACTIVATION, SAVE,
    )  # fmt: skip


@triton.jit
def backward_tile(
    dmixed, dgates, rows, exists, first, weights, row_map, saved, dhidden, mixed, pitch, gates,
    pitch_gates, dweights, scale, kept, E: tl.constexpr, RANK: tl.constexpr, EB: tl.constexpr,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The gradient of `mixed` [BT, EB * WIDTH] of the tokens `rows`, int64 [BT], taken back.

    Args:
        dgates: that of `gates` [BT, EB], or None.
        saved: as the forward pass left it.
        dhidden, mixed: [T, E * RANK], pitch (in eights) from row to row; written unless None.
        gates: [T, E], pitch_gates from row to row; written unless None.
        dweights: float32 [T, E]; each token's share, written unless None.
    """
    R: tl.constexpr = E * RANK
    column, exists_column = padded(first * WIDTH + tl.arange(0, EB * WIDTH), E, RANK, WIDTH)
    mask = exists[:, None] & exists_column[None, :]
    e = first + tl.arange(0, EB)
    mask_e = exists[:, None] & (e < E)[None, :]
    hidden = tl.load(saved + rows[:, None] * R + column[None, :], mask=mask, other=0.0)

    table_rows, index, tokens_per_row = row_map
    row = table_row(index, tokens_per_row, rows, exists)
    gate = scale * load_table(weights, table_rows, E, row, e)
    active = activate(hidden, ACTIVATION)
    at = rows[:, None] * in_eights(pitch, True) + column[None, :]
    if dhidden is not None:
        out = kept * each_column(gate, WIDTH) * times_slope(dmixed, hidden, ACTIVATION)
        tl.store(dhidden + at, out.to(dhidden.dtype.element_ty), mask=mask)
    if mixed is not None:
        out = each_column(gate, WIDTH) * active
        tl.store(mixed + at, out.to(mixed.dtype.element_ty), mask=mask)
    if gates is not None:
        at = gates + rows[:, None] * in_eights(pitch_gates, True) + e[None, :]
        tl.store(at, gate.to(gates.dtype.element_ty), mask=mask_e)
    if dweights is not None:
        share = tl.reshape(sum_runs(dmixed * active, WIDTH), gate.shape)
        if dgates is not None:
            share += dgates
        tl.store(dweights + rows[:, None] * E + e[None, :], scale * share, mask=mask_e)


# ---------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["T", "threshold", "row_map"])
def shrink_and_mix(
    x, down, down_bias, weights, row_map, saved, mixed, gates, seed, T, K, stride_x, pitch,
    pitch_gates, threshold, scale, kept, SEGMENT: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr,
    EB: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From x to `mixed`, see :func:`forward_tile`.  Grid: tiles of tokens, of experts."""
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    exists = rows < T
    first = tl.program_id(1) * EB
    row, exists_row = padded(first * WIDTH + tl.arange(0, EB * WIDTH), E, RANK, WIDTH)
    hidden, _ = shrink_tile(
        x, stride_x, rows, exists, down, row, exists_row, None, None, None, K, 0, K, seed,
        threshold, 0, SEGMENT, 1, BT, BK, EB * WIDTH, 16, WIDE, PRECISION,
    )  # fmt: skip
    forward_tile(
        hidden, rows, exists, first, down_bias, weights, row_map, saved, mixed, pitch, gates,
        pitch_gates, scale, kept, True, E, RANK, EB, WIDTH, ACTIVATION, True,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "row_map"])
def mix(
    hidden_parts, down_bias, weights, row_map, saved, mixed, gates, T, pitch, pitch_gates, scale,
    kept, PARTS: tl.constexpr, SAVE: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr,
    EB: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """See :func:`mix_parts`.  Grid: tiles of tokens, of experts."""
    mix_parts(
        hidden_parts, down_bias, weights, row_map, saved, mixed, gates, T, pitch, pitch_gates,
        scale, kept, tl.program_id(0), tl.program_id(1) * EB, True, PARTS, SAVE, E, RANK, EB, WIDTH,
        ACTIVATION, BT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "threshold", "walk", "row_map"])
def mix_and_expand(
    y, left_a, a, left_b, b, bias, seed, T, N, stride_y, pitch_a, pitch_b, threshold, walk,
    hidden_parts, down_bias, weights, row_map, saved, scale, kept, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, BR: tl.constexpr, ROWS_B: tl.constexpr, BRB: tl.constexpr, BT: tl.constexpr,
    BN: tl.constexpr, WIDE: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    PARTS: tl.constexpr, SAVE: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr,
    EB: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BT_MIX: tl.constexpr,
):  # fmt: skip
    """An expand whose blocks mix all tokens by themselves, of which there are at most BT_MIX.

    Grid: strips of columns.

    Args:
        left_a, left_b: [strips, T, E * RANK] and, for the up biases, [strips, T, E] or None, with a
            pitch from row to row; each block's own.
        EB: at least E.
    """
    strip = tl.program_id(0)
    mixed, gates = left_a + (strip * T).to(tl.int64) * pitch_a, left_b
    if left_b is not None:
        gates += (strip * T).to(tl.int64) * pitch_b
    expand_strip(
        y, stride_y, mixed, pitch_a, a, gates, pitch_b, b, bias, seed, threshold, strip,
        tl.cast(0, tl.int64), T, N, GROUPS, ROWS, BR, ROWS_B, BRB, BT, BN, WIDE, ACCUMULATE,
        PRECISION, MIX=mix_parts,
        mixing=(
            hidden_parts, down_bias, weights, row_map, saved, mixed, gates, T, pitch_a, pitch_b,
            scale, kept, 0, 0, strip == 0, PARTS, SAVE, E, RANK, EB, WIDTH, ACTIVATION, BT_MIX,
        ),
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "row_map"])
def shrink_and_mix_backward(
    dy, up, up_bias, weights, row_map, saved, dhidden, mixed, gates, dweights, T, N, stride_dy,
    pitch, pitch_gates, scale, kept, SEGMENT: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr,
    EB: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, BB: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From dy on, see :func:`backward_tile`.  Grid: tiles of tokens, of experts.

    Args:
        up_bias: [E, N]; None also where the weights get no gradient.
    """
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    exists = rows < T
    first = tl.program_id(1) * EB
    row, exists_row = padded(first * WIDTH + tl.arange(0, EB * WIDTH), E, RANK, WIDTH)
    e = first + tl.arange(0, BB)
    dmixed, dgates = shrink_tile(
        dy, stride_dy, rows, exists, up, row, exists_row, up_bias, e, e < E, N, 0, N, None, 0, 0,
        SEGMENT, 1, BT, BK, EB * WIDTH, BB, WIDE, PRECISION,
    )  # fmt: skip
    dgates = None if up_bias is None else first_columns(dgates, BT, EB)
    backward_tile(
        dmixed, dgates, rows, exists, first, weights, row_map, saved, dhidden, mixed, pitch, gates,
        pitch_gates, dweights, scale, kept, E, RANK, EB, WIDTH, ACTIVATION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "row_map"])
def mix_backward(
    dmixed_parts, dgates_parts, weights, row_map, saved, dhidden, mixed, gates, dweights, T, pitch,
    pitch_gates, scale, kept, PARTS: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr,
    EB: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """From a shrink's parts, see :func:`backward_tile`.  Grid: tiles of tokens, of experts.

    Args:
        dgates_parts: those of the product with the up biases, or None.
    """
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    exists = rows < T
    first = tl.program_id(1) * EB
    tokens = T.to(tl.int64)
    R: tl.constexpr = E * RANK
    column, exists_column = padded(first * WIDTH + tl.arange(0, EB * WIDTH), E, RANK, WIDTH)
    dmixed = add_parts(
        dmixed_parts, rows[:, None] * R + column[None, :], tokens * R,
        exists[:, None] & exists_column[None, :], PARTS,
    )  # fmt: skip
    dgates = None
    if dgates_parts is not None:
        e = first + tl.arange(0, EB)
        dgates = add_parts(
            dgates_parts, rows[:, None] * E + e[None, :], tokens * E,
            exists[:, None] & (e < E)[None, :], PARTS,
        )  # fmt: skip
    backward_tile(
        dmixed, dgates, rows, exists, first, weights, row_map, saved, dhidden, mixed, pitch, gates,
        pitch_gates, dweights, scale, kept, E, RANK, EB, WIDTH, ACTIVATION,
    )  # fmt: skip


# ---------------------------------------------------------------- operators


def gated_forward(
    x: Tensor, lora_down: Tensor, down_bias: Tensor | None, lora_up: Tensor,
    up_bias: Tensor | None, weights: Tensor, row_map: Tensor | None, bias: Tensor | None,
    seed: Tensor | None, y: Tensor, scale: float, activation: int, dropout: float, accumulate: bool,
) -> Tensor:  # fmt: skip
    """``ops.gated_forward``: shrink, the mix and expand in two launches or three."""
    rows, out, table = _check(
        x, lora_down, down_bias, lora_up, up_bias, weights, row_map, y, "y", activation
    )
    T, K, (E, r, _) = rows.count, rows.columns, lora_down.shape
    if bias is not None:
        launch.check_like(bias, x, (out.columns,), "bias")
    masks, kept = launch.masks(seed, dropout, 1, x)
    hidden = x.new_empty((T, E * r), dtype=torch.float32)
    if not T:
        return hidden

    everything = _constants(E, r, activation, tiles.power_of_2(E) * tiles.power_of_2(r))
    fused = _fused(rows, lora_down, masked=masks.seed is not None)
    columns = everything["EB"] * everything["WIDTH"]
    own, copies = (None, 1) if fused else _expand.own_mix(out, columns)
    mixed = launch.workspace(x, copies * T, E * r)
    gates = None if up_bias is None else launch.workspace(x, copies * T, E)
    expand = _expand.plan(out, mixed, lora_up, gates, up_bias, accumulate=accumulate, bias=bias)
    results = (hidden, mixed.data, gates and gates.data)
    scalars = (mixed.stride, gates.stride if gates else 0)
    if fused:
        shrink_and_mix[(tiles.cdiv(T, fused.BT), fused.columns)](
            x, lora_down, down_bias, weights, table, *results, masks.seed, T, K, rows.stride,
            *scalars, masks.threshold, scale, kept, SEGMENT=tiles.segment(K), BT=fused.BT,
            BK=fused.BK, WIDE=rows.wide, PRECISION=launch.precision(x.dtype),
            **_constants(E, r, activation, fused.BA), **launch.options(fused.warps, fused.stages),
        )  # fmt: skip
        expand.run(_expand.expand_rows)
        return hidden

    # Where the mix changes hidden, it must not read what it writes.
    changes = down_bias is not None or masks.seed is not None
    sums, _, parts = _shrink.run(rows, lora_down, out_a=None if changes else hidden, masks=masks)
    save = {"PARTS": parts, "SAVE": changes or parts > 1}
    if own:
        mix_and_expand[expand.grid](
            *expand.arguments, sums, down_bias, weights, table, hidden, scale, kept, BT_MIX=own,
            **save, **everything, **expand.constants,
        )  # fmt: skip
    else:
        grid, constants = _tiles(T, E, r, activation)
        mix[grid](
            sums, down_bias, weights, table, *results, T, *scalars, scale, kept, **save, **constants
        )
        expand.run(_expand.expand_rows)
    return hidden


def gated_backward(
    dy: Tensor, x: Tensor, lora_down: Tensor, down_bias: Tensor | None, lora_up: Tensor,
    up_bias: Tensor | None, weights: Tensor, row_map: Tensor | None, seed: Tensor | None,
    hidden: Tensor, dx: Tensor, scale: float, activation: int, dropout: float, accumulate: bool,
    need_dx: bool, need_dparams: bool, need_dweights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``ops.gated_backward``: shrink of dy with the mix (or two launches), expand, outer in two."""
    rows, dy_rows, table = _check(
        x, lora_down, down_bias, lora_up, up_bias, weights, row_map, dy, "dy", activation
    )
    dx_rows = launch.rows_like(dx, x, x.shape, "dx") if need_dx else None
    T, (E, r, _) = rows.count, lora_down.shape
    masks, kept = launch.masks(seed, dropout, 1, x)
    launch.check_like(hidden, weights, (T, E * r), "hidden")
    dhidden = launch.workspace(x, T, E * r) if need_dx or need_dparams else None
    mixed = launch.workspace(x, T, E * r) if need_dparams else None
    gates = launch.workspace(x, T, E) if need_dparams and up_bias is not None else None
    dweights = weights.new_empty((T if need_dweights else 0, E))
    if T:
        _mix_backward(
            dy_rows, lora_up, up_bias if need_dweights else None, weights, table, hidden, dhidden,
            mixed, gates, dweights if need_dweights else None, scale, kept, activation,
        )  # fmt: skip
    if dx_rows:
        _expand.run(dx_rows, dhidden, lora_down, accumulate=accumulate, masks=masks)

    first = second = shared = tokens = None
    if need_dparams:
        first, second = _outer.Side(dy_rows, mixed, gates), _outer.Side(rows, dhidden, masks=masks)
        if down_bias is not None:
            tokens = _outer.Sums(dhidden, launch.RowMap(1, None, T), x.dtype, 1 / kept)
    if need_dweights and table.shared:
        shared = _outer.Sums(launch.rows_of(dweights, "dweights"), table)
    dup, dup_bias, ddown, _, sums, ddown_bias = _outer.run(first, second, (shared, tokens))
    return (
        launch.gradient(ddown, lora_down),
        launch.gradient(ddown_bias, x if down_bias is None else down_bias),
        launch.gradient(dup, lora_up),
        launch.gradient(dup_bias, x if up_bias is None else up_bias),
        dweights if sums is None else sums,
    )


def _mix_backward(
    dy: launch.Rows, up: Tensor, up_bias: Tensor | None, weights: Tensor, table: launch.RowMap,
    hidden: Tensor, dhidden: launch.Rows | None, mixed: launch.Rows | None,
    gates: launch.Rows | None, dweights: Tensor | None, scale: float, kept: float, activation: int,
) -> None:  # fmt: skip
    """Writes dhidden, mixed, gates and dweights in one launch or two; see :func:`backward_tile`."""
    T, N, (E, r, _) = dy.count, dy.columns, up.shape
    arguments = (
        weights, table, hidden, dhidden and dhidden.data, mixed and mixed.data,
        gates and gates.data, dweights,
    )  # fmt: skip
    scalars = (launch.pitch(E * r), launch.pitch(E), scale, kept)
    fused = _fused(dy, up, up_bias)
    if fused:
        constants = _constants(E, r, activation, fused.BA)
        shrink_and_mix_backward[(tiles.cdiv(T, fused.BT), fused.columns)](
            dy.data, up, up_bias, *arguments, T, N, dy.stride, *scalars, SEGMENT=tiles.segment(N),
            BT=fused.BT, BK=fused.BK, BB=max(constants["EB"], tiles.LEAST_COLUMNS), WIDE=dy.wide,
            PRECISION=launch.precision(up.dtype), **constants,
            **launch.options(fused.warps, fused.stages),
        )  # fmt: skip
    else:
        dmixed, dgates, parts = _shrink.run(dy, up, up_bias)
        grid, constants = _tiles(T, E, r, activation)
        mix_backward[grid](dmixed, dgates, *arguments, T, *scalars, PARTS=parts, **constants)


def _check(
    x: Tensor, lora_down: Tensor, down_bias: Tensor | None, lora_up: Tensor,
    up_bias: Tensor | None, weights: Tensor, row_map: Tensor | None, out: Tensor, name: str,
    activation: int,
) -> tuple[launch.Rows, launch.Rows, launch.RowMap]:  # fmt: skip
    """x and `out` [..., N] as rows and how tokens read the weights, if all fits together."""
    rows = launch.experts(x, lora_down, lora_up)
    (E, r, _), N = lora_down.shape, lora_up.shape[2]
    if down_bias is not None:
        launch.check_like(down_bias, x, (E, r), "down_bias")
    if up_bias is not None:
        launch.check_like(up_bias, x, (E, N), "up_bias")
    if activation not in ops.ACTIVATIONS.values():
        raise RuntimeError(f"activation: wanted one of {ops.ACTIVATIONS}, got {activation}")
    table = launch.table(weights, row_map, rows.count, E, "weights")
    return rows, launch.rows_like(out, x, (*x.shape[:-1], N), name), table


def _fused(
    x: launch.Rows, rows: Tensor, biases: Tensor | None = None, masked: bool = False
) -> tiles.Shrink | None:
    """The tile of the shrink of x whose blocks end with the mix; None if that is one apart."""
    E, r, features = rows.shape
    WIDTH = tiles.power_of_2(r)
    tile = tiles.shrink(
        x.count, features, E * WIDTH, 0 if biases is None else E, rows.element_size(),
        launch.arch(), masked=masked,
    )  # fmt: skip
    # With 128 columns beside the mix, registers spill.
    return tile if tile.parts == 1 and WIDTH <= tile.BA <= 64 else None


def _constants(E: int, r: int, activation: int, columns: int) -> dict:
    """What a kernel is compiled for whose blocks have so many columns, or an expert's if more."""
    WIDTH = tiles.power_of_2(r)
    EB = max(1, columns // WIDTH)
    return {"E": E, "RANK": r, "EB": EB, "WIDTH": WIDTH, "ACTIVATION": activation}


def _tiles(T: int, E: int, r: int, activation: int) -> tuple[tuple[int, int], dict]:
    """Grid and constants of the mix as a kernel of its own."""
    columns = tiles.rows_of_product(E * tiles.power_of_2(r), tiles.MOST_COLUMNS)
    constants = _constants(E, r, activation, columns)
    tile = tiles.mix(constants["EB"] * constants["WIDTH"])
    grid = tiles.cdiv(T, tile.BT), tiles.cdiv(E, constants["EB"])
    return grid, {"BT": tile.BT, **constants, **launch.options(tile.warps, 1)}
