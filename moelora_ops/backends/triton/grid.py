"""The grid mix: H'_j = s Σ_i G_ij H_i, G = a softmax(logits) + b intuition (docs/math.md).

Row mathematics as in csrc/mix/grid.h.  The gates of a tile of BT tokens are [BT, P1, P2]: G_ij in
powers of two that hold R1 rows of down and R2 of up.  In the diagonal form ("rank1" mode) row i
meets row i only: the gates are [BT, 1, P2], and so is hidden.

`hidden` [T, r1 + gates], which forward saves, holds logits [T, gates] and then hidden [T, r1].  The
router is the first block of the shrink's rows, which may be many; the r1 rows of down the second.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import expand as _expand
from . import launch, tiles
from . import outer as _outer
from . import shrink as _shrink
from .device import (
    NO_KEY,
    exponentials,
    in_eights,
    load_table,
    order_key,
    padded,
    shares,
    softmax_backward,
    sum_runs,
    table_row,
)
from .expand import expand_strip
from .shrink import add_parts

# ---------------------------------------------------------------- row mathematics


@triton.jit
def sharp_sigmoid(v):
    """σ(100 v), and its derivative."""
    value, rest = 1 / (1 + tl.exp(-100 * v)), 1 / (1 + tl.exp(100 * v))
    return value, 100 * value * rest


@triton.jit
def load_scales(omega, beta, token_scale, task_scale):
    """a, b and s."""
    o, _ = sharp_sigmoid(tl.load(omega).to(tl.float32))
    rest, _ = sharp_sigmoid(-tl.load(omega).to(tl.float32))
    s, _ = sharp_sigmoid(tl.load(beta).to(tl.float32))
    return token_scale * o, task_scale * rest, s


@triton.jit
def of_down(hidden, DIAGONAL: tl.constexpr):
    """hidden [BT, rows of down] beside the gates."""
    return hidden[:, None, :] if DIAGONAL else hidden[:, :, None]


@triton.jit
def sum_over_down(v):
    """[BT, P2] of v [BT, P1, P2]."""
    return tl.reshape(sum_runs(tl.permute(v, [0, 2, 1]), v.shape[1]), [v.shape[0], v.shape[2]])


@triton.jit
def sum_for_down(v, DIAGONAL: tl.constexpr):
    """[BT, rows of down] of v [BT, P1, P2]."""
    if DIAGONAL:
        return tl.reshape(v, [v.shape[0], v.shape[2]])
    else:
        return tl.reshape(sum_runs(v, v.shape[2]), [v.shape[0], v.shape[1]])


@triton.jit
def gate_keys(logits, exists):
    """:func:`order_key` of logits [BT, columns]; NO_KEY where `exists` [columns] is false."""
    return tl.where(exists[None, :], order_key(logits), NO_KEY)


@triton.jit
def probabilities(logits, exists):
    """softmax(logits) [BT, columns], zero where `exists` [columns] is false."""
    p = exponentials(logits, gate_keys(logits, exists))
    return shares(p, p)


@triton.jit
def load_intuition(intuition, row_map, rows, exists, gate, exists_gate, GATES: tl.constexpr):
    """intuition [., GATES] of the tokens `rows`, int64 [BT]: [BT, P1 * P2]."""
    table_rows, index, tokens_per_row = row_map
    row = table_row(index, tokens_per_row, rows, exists)
    return tl.where(exists_gate[None, :], load_table(intuition, table_rows, GATES, row, gate), 0.0)


@triton.jit
def mix_parts(
    logits_parts, hidden_parts, saved, omega, beta, intuition, row_map, mixed, T, pitch,
    token_scale, task_scale, tile, writes, PARTS: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    P1: tl.constexpr, P2: tl.constexpr, DIAGONAL: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """A tile of BT tokens from a shrink's parts to `mixed`; a single part lies in `saved`.

    Args:
        saved: float32 [T, gates + rows of down], see above; written if `writes`.
        intuition: float32 [., gates] or None; row_map, see ``launch.RowMap``, says which row a
            token reads.
        mixed: [T, R2], pitch (in eights) from row to row; written.
    """
    GATES: tl.constexpr = R1 * R2
    DOWN: tl.constexpr = R2 if DIAGONAL else R1
    rows = tl.cast(tile, tl.int64) * BT + tl.arange(0, BT)
    exists = rows < T
    gate, exists_gate = padded(tl.arange(0, P1 * P2), R1, R2, P2)
    down = tl.arange(0, P2 if DIAGONAL else P1)
    up = tl.arange(0, P2)
    at_gate = rows[:, None] * GATES + gate[None, :]
    at_down = rows[:, None] * DOWN + down[None, :]
    mask_gate = exists[:, None] & exists_gate[None, :]
    mask_down = exists[:, None] & (down < DOWN)[None, :]
    tokens = T.to(tl.int64)
    logits = add_parts(logits_parts, at_gate, tokens * GATES, mask_gate, PARTS)
    hidden = add_parts(hidden_parts, at_down, tokens * DOWN, mask_down, PARTS)
    if PARTS > 1:
        tl.store(saved + at_gate, logits, mask=mask_gate & writes)
        tl.store(saved + tokens * GATES + at_down, hidden, mask=mask_down & writes)

    a, b, s = load_scales(omega, beta, token_scale, task_scale)
    gates = a * probabilities(logits, exists_gate)
    if intuition is not None:
        gates += b * load_intuition(intuition, row_map, rows, exists, gate, exists_gate, GATES)
    gates = tl.reshape(gates, [BT, P1, P2])
    out = s * sum_over_down(gates * of_down(hidden, DIAGONAL))
    at = mixed + rows[:, None] * in_eights(pitch, True) + up[None, :]
    tl.store(at, out.to(mixed.dtype.element_ty), mask=exists[:, None] & (up < R2)[None, :])


# ---------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["T", "row_map"])
def mix(
    logits_parts, hidden_parts, saved, omega, beta, intuition, row_map, mixed, T, pitch,
    token_scale, task_scale, PARTS: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    P1: tl.constexpr, P2: tl.constexpr, DIAGONAL: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """See :func:`mix_parts`.  Grid: tiles of tokens."""
    mix_parts(
        logits_parts, hidden_parts, saved, omega, beta, intuition, row_map, mixed, T, pitch,
        token_scale, task_scale, tl.program_id(0), True, PARTS, R1, R2, P1, P2, DIAGONAL, BT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "threshold", "walk", "row_map"])
def mix_and_expand(
    y, left_a, a, left_b, b, bias, seed, T, N, stride_y, pitch_a, pitch_b, threshold, walk,
    logits_parts, hidden_parts, saved, omega, beta, intuition, row_map, token_scale, task_scale,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, BR: tl.constexpr, ROWS_B: tl.constexpr,
    BRB: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr, R1: tl.constexpr,
    R2: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, DIAGONAL: tl.constexpr,
    BT_MIX: tl.constexpr,
):  # fmt: skip
    """An expand whose blocks mix all tokens by themselves, of which there are at most BT_MIX.

    Grid: strips of columns.

    Args:
        left_a: [strips, T, R2], pitch_a from row to row; each block's own.
    """
    strip = tl.program_id(0)
    mixed = left_a + (strip * T).to(tl.int64) * pitch_a
    expand_strip(
        y, stride_y, mixed, pitch_a, a, left_b, pitch_b, b, bias, seed, threshold, strip,
        tl.cast(0, tl.int64), T, N, GROUPS, ROWS, BR, ROWS_B, BRB, BT, BN, WIDE, ACCUMULATE,
        PRECISION, MIX=mix_parts,
        mixing=(
            logits_parts, hidden_parts, saved, omega, beta, intuition, row_map, mixed, T, pitch_a,
            token_scale, task_scale, 0, strip == 0, PARTS, R1, R2, P1, P2, DIAGONAL, BT_MIX,
        ),
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "row_map"])
def mix_backward(
    dmixed_parts, saved, omega, beta, intuition, row_map, dlogits, dhidden, mixed, dscalars,
    dintuition, T, pitch_gates, pitch_down, pitch_up, token_scale, task_scale, PARTS: tl.constexpr,
    R1: tl.constexpr, R2: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, DIAGONAL: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """From the parts of a shrink of dy to the gradients of logits and hidden.  Grid: row tiles.

    Args:
        intuition, row_map: see :func:`mix_parts`.
        saved: as the forward pass left it.
        dlogits, dhidden: [T, gates] and [T, rows of down], written, as is mixed [T, R2] unless
            None; with a pitch (in eights) from row to row.
        dscalars: float32 [T, 2], each token's share in the gradients of omega and beta, or None.
        dintuition: float32 [T, gates], each token's share, or None.
    """
    GATES: tl.constexpr = R1 * R2
    DOWN: tl.constexpr = R2 if DIAGONAL else R1
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    exists = rows < T
    gate, exists_gate = padded(tl.arange(0, P1 * P2), R1, R2, P2)
    down = tl.arange(0, P2 if DIAGONAL else P1)
    up = tl.arange(0, P2)
    at_gate = rows[:, None] * GATES + gate[None, :]
    mask_gate = exists[:, None] & exists_gate[None, :]
    mask_down = exists[:, None] & (down < DOWN)[None, :]
    mask_up = exists[:, None] & (up < R2)[None, :]
    tokens = T.to(tl.int64)
    logits = tl.load(saved + at_gate, mask=mask_gate, other=0.0)
    at = saved + tokens * GATES + rows[:, None] * DOWN + down[None, :]
    hidden = of_down(tl.load(at, mask=mask_down, other=0.0), DIAGONAL)
    at = rows[:, None] * R2 + up[None, :]
    dmixed = add_parts(dmixed_parts, at, tokens * R2, mask_up, PARTS)

    a, b, s = load_scales(omega, beta, token_scale, task_scale)
    p = probabilities(logits, exists_gate)
    gates = a * p
    if intuition is not None:
        external = load_intuition(intuition, row_map, rows, exists, gate, exists_gate, GATES)
        gates += b * external
    gates = tl.reshape(gates, [BT, P1, P2])
    dout = dmixed[:, None, :]
    dgates = tl.reshape(s * hidden * dout, [BT, P1 * P2])

    dtype = dlogits.dtype.element_ty
    out = softmax_backward(p, a * dgates).to(dtype)
    at = dlogits + rows[:, None] * in_eights(pitch_gates, True) + gate[None, :]
    tl.store(at, out, mask=mask_gate)
    out = (s * sum_for_down(gates * dout, DIAGONAL)).to(dtype)
    at = dhidden + rows[:, None] * in_eights(pitch_down, True) + down[None, :]
    tl.store(at, out, mask=mask_down)
    if dintuition is not None:
        tl.store(dintuition + at_gate, b * dgates, mask=mask_gate)
    if mixed is not None:
        # H' / s first, so that the gradient of s needs no division by an s that may be 0.
        out = sum_over_down(gates * hidden)
        at = mixed + rows[:, None] * in_eights(pitch_up, True) + up[None, :]
        tl.store(at, (s * out).to(dtype), mask=mask_up)
        _, slope = sharp_sigmoid(tl.load(beta).to(tl.float32))
        tl.store(dscalars + 2 * rows + 1, slope * sum_runs(dmixed * out, P2), mask=exists)
        _, slope = sharp_sigmoid(tl.load(omega).to(tl.float32))
        along = token_scale * sum_runs(dgates * p, P1 * P2)
        if intuition is not None:
            along -= task_scale * sum_runs(dgates * external, P1 * P2)
        tl.store(dscalars + 2 * rows, slope * along, mask=exists)


# ---------------------------------------------------------------- operators


def grid_forward(
    x: Tensor, lora_down: Tensor, lora_up: Tensor, router: Tensor, omega: Tensor, beta: Tensor,
    intuition: Tensor | None, row_map: Tensor | None, bias: Tensor | None, y: Tensor,
    token_scale: float, task_scale: float, diagonal: bool, accumulate: bool,
) -> Tensor:  # fmt: skip
    """``ops.grid_forward``: shrink, the mix and expand in three launches or two."""
    rows, out, index = _check(
        x, lora_down, lora_up, router, omega, beta, intuition, row_map, y, "y", diagonal
    )
    if bias is not None:
        launch.check_like(bias, x, (out.columns,), "bias")
    T, gates, r1, r2 = rows.count, len(router), len(lora_down), len(lora_up)
    saved = x.new_empty((T, gates + r1), dtype=torch.float32)
    logits, hidden, parts = _shrink.run(rows, router, lora_down, saved, saved.view(-1)[T * gates :])
    constants, tile = _constants(r1, r2, diagonal)
    own, copies = _expand.own_mix(out, constants["P1"] * constants["P2"])
    mixed = launch.workspace(x, copies * T, r2)
    expand = _expand.plan(out, mixed, lora_up, accumulate=accumulate, bias=bias)
    gate = (logits, hidden, saved, omega, beta, intuition, index)
    if own:
        mix_and_expand[expand.grid](
            *expand.arguments, *gate, token_scale, task_scale, PARTS=parts, BT_MIX=own,
            **constants, **expand.constants,
        )  # fmt: skip
    elif T:
        mix[(tiles.cdiv(T, tile.BT),)](
            *gate, mixed.data, T, mixed.stride, token_scale, task_scale, PARTS=parts, BT=tile.BT,
            **constants, **launch.options(tile.warps, 1),
        )  # fmt: skip
        expand.run(_expand.expand_rows)
    return saved


def grid_backward(
    dy: Tensor, x: Tensor, lora_down: Tensor, lora_up: Tensor, router: Tensor, omega: Tensor,
    beta: Tensor, intuition: Tensor | None, row_map: Tensor | None, hidden: Tensor, dx: Tensor,
    token_scale: float, task_scale: float, diagonal: bool, accumulate: bool, need_dx: bool,
    need_dparams: bool, need_dintuition: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``ops.grid_backward``: shrink of dy, the mix, expand, outer with the sums in two."""
    rows, dy_rows, index = _check(
        x, lora_down, lora_up, router, omega, beta, intuition, row_map, dy, "dy", diagonal
    )
    dx_rows = launch.rows_like(dx, x, x.shape, "dx") if need_dx else None
    T, gates, r1, r2 = rows.count, len(router), len(lora_down), len(lora_up)
    if hidden.shape != (T, gates + r1) or hidden.dtype != torch.float32:
        raise RuntimeError(f"hidden: wanted {[T, gates + r1]} in float32, got {list(hidden.shape)}")
    need_dintuition = need_dintuition and intuition is not None

    dlogits, dhidden = launch.workspace(x, T, gates), launch.workspace(x, T, r1)
    mixed = launch.workspace(x, T, r2) if need_dparams else None
    dscalars = x.new_empty((T, 2), dtype=torch.float32) if need_dparams else None
    dintuition = x.new_empty((T if need_dintuition else 0, gates), dtype=torch.float32)
    dmixed, _, parts = _shrink.run(dy_rows, lora_up)
    constants, tile = _constants(r1, r2, diagonal)
    if T:
        mix_backward[(tiles.cdiv(T, tile.BT),)](
            dmixed, hidden, omega, beta, intuition, index, dlogits.data, dhidden.data,
            mixed and mixed.data, dscalars, dintuition if need_dintuition else None, T,
            dlogits.stride, dhidden.stride, launch.pitch(r2), token_scale, task_scale, PARTS=parts,
            BT=tile.BT, **constants, **launch.options(tile.warps, 1),
        )  # fmt: skip
    if dx_rows:
        _expand.run(dx_rows, dlogits, router, dhidden, lora_down, accumulate=accumulate)

    first = second = None
    sums = [None, None, None]
    if need_dintuition and index.shared:
        sums[0] = _outer.Sums(launch.rows_of(dintuition, "dintuition"), index)
    if need_dparams:
        first, second = _outer.Side(dy_rows, mixed), _outer.Side(rows, dlogits, dhidden)
        all_tokens = launch.RowMap(1, None, T)
        for i, column in enumerate(dscalars.split(1, dim=1)):
            values = launch.rows_of(column, "dscalars")
            sums[1 + i] = _outer.Sums(values, all_tokens, x.dtype)
    dup, _, drouter, ddown, *totals = _outer.run(first, second, sums)
    parameters = (lora_down, lora_up, router, omega, beta)
    gradients = (ddown, dup, drouter, *totals[1:])
    return (
        *(launch.gradient(t, p) for t, p in zip(gradients, parameters, strict=True)),
        dintuition if totals[0] is None else totals[0],
    )


def _check(
    x: Tensor, lora_down: Tensor, lora_up: Tensor, router: Tensor, omega: Tensor, beta: Tensor,
    intuition: Tensor | None, row_map: Tensor | None, out: Tensor, name: str, diagonal: bool,
) -> tuple[launch.Rows, launch.Rows, launch.RowMap]:  # fmt: skip
    """x and `out` [..., N] as rows, once everything is known to lie where the kernels reach.

    And how tokens read the intuition; without one, whatever.
    """
    launch.check_dtype(x)
    rows = launch.rows_of(x, "x")
    if lora_down.dim() != 2 or lora_up.dim() != 2:
        raise RuntimeError("lora_down, lora_up: wanted 2 dimensions")
    (r1, K), (r2, N) = lora_down.shape, lora_up.shape
    if not r1 or not r2 or (diagonal and r1 != r2):
        raise RuntimeError(f"lora_down, lora_up: have ranks that do not fit, {r1} and {r2}")
    if rows.columns != K:
        raise RuntimeError(f"x: wanted last dimension {K}, got {rows.columns}")
    gates = r1 if diagonal else r1 * r2
    launch.check_like(lora_down, x, (r1, K), "lora_down")
    launch.check_like(lora_up, x, (r2, N), "lora_up")
    launch.check_like(router, x, (gates, K), "router")
    for scalar, called in ((omega, "omega"), (beta, "beta")):
        if scalar.numel() != 1 or scalar.dtype != x.dtype:
            raise RuntimeError(f"{called}: wanted one element in {x.dtype} like x")
    index = launch.RowMap(0, None, 1)
    if intuition is not None:
        index = launch.table(intuition, row_map, rows.count, gates, "intuition")
    return rows, launch.rows_like(out, x, (*x.shape[:-1], N), name), index


def _constants(r1: int, r2: int, diagonal: bool) -> tuple[dict, tiles.Mix]:
    """What the kernels of the mix are compiled for but its tile, and that."""
    R1, P1 = (1, 1) if diagonal else (r1, tiles.power_of_2(r1))
    P2 = tiles.power_of_2(r2)
    constants = {"R1": R1, "R2": r2, "P1": P1, "P2": P2, "DIAGONAL": diagonal}
    return constants, tiles.mix(P1 * P2, 1024)  # all parts of a shrink are loaded at once
