"""The output gate: weights from the experts' outputs, computed in rank space (docs/math.md, MoLE).

Row mathematics as in csrc/mix/output_gate.h; P, the factors R_e and the means are named there.  Two
steps are products: hidden [T, E * r] times P [E * r, E], and each expert's hidden times its factor.
A tile of BT tokens walks hidden in chunks of C columns, experts padded to WIDTH, a power of two: a
chunk has several whole experts, or is a piece of one.  A group is a chunk of several experts, or
one expert in several chunks.
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
from .device import (
    exponentials,
    in_eights,
    padded,
    row_keys,
    shares,
    softmax_backward,
    sum_runs,
)
from .expand import expand_strip
from .shrink import add_parts

# The numbers of ops.NORMALIZATIONS.
NONE: tl.constexpr = tl.constexpr(ops.NORMALIZATIONS["none"])
L2: tl.constexpr = tl.constexpr(ops.NORMALIZATIONS["l2"])
PER_EXPERT: tl.constexpr = tl.constexpr(ops.NORMALIZATIONS["l2_per_expert"])
LAYERNORM: tl.constexpr = tl.constexpr(ops.NORMALIZATIONS["layernorm"])

LEAST_NORM: tl.constexpr = tl.constexpr(1e-12)  # as torch.nn.functional.normalize
VARIANCE_EPSILON: tl.constexpr = tl.constexpr(1e-5)  # as torch.nn.LayerNorm

# ---------------------------------------------------------------- chunks of hidden


@triton.jit
def chunk_columns(q, E: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr):
    """The columns of chunk q: their expert, their index in hidden, and which exist; [C] each."""
    c = q * C + tl.arange(0, C)
    column, exists = padded(c, E, RANK, WIDTH)
    return c // WIDTH, column, exists


@triton.jit
def feeds(fed, expert, exists):
    """Which of the experts that exist feed the gate: those of bool `fed` [E]; all without it."""
    if fed is not None:
        exists = exists & (tl.load(fed + expert, mask=exists, other=0) != 0)
    return exists


@triton.jit
def load_fed(tile, q, E: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr):
    """Chunk q of hidden, zero for experts that do not feed the gate: [BT, C].

    Args:
        tile: hidden [., E * RANK], fed, and of the tile's tokens their indices, int64 [BT], and
            which exist.
    """
    hidden, fed, rows, exists = tile
    expert, column, exists_column = chunk_columns(q, E, RANK, WIDTH, C)
    mask = exists[:, None] & feeds(fed, expert, exists_column)[None, :]
    at = hidden + rows[:, None] * (E * RANK) + column[None, :]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def load_factors(
    factors, q, p, E: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr
):
    """The factors at [columns of chunk q, columns of chunk p]: R_e[i, j], zero for two experts."""
    expert, column, exists = chunk_columns(q, E, RANK, WIDTH, C)
    other, source, exists_source = chunk_columns(p, E, RANK, WIDTH, C)
    at = factors + column[:, None] * RANK + (source - other * RANK)[None, :]
    same = expert[:, None] == other[None, :]
    return tl.load(at, mask=exists[:, None] & exists_source[None, :] & same, other=0.0)


@triton.jit
def rotated(
    tile, factors, group, piece, BT: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr,
    WIDTH: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A piece of a group of R_e H_e, the outputs in an orthonormal basis: [BT, C]."""
    PIECES: tl.constexpr = (WIDTH + C - 1) // C
    z = tl.zeros([BT, C], tl.float32)
    for p in range(piece, PIECES):  # R_e is upper triangular
        h = load_fed(tile, group * PIECES + p, E, RANK, WIDTH, C)
        f = load_factors(factors, group * PIECES + piece, group * PIECES + p, E, RANK, WIDTH, C)
        z = tl.dot(h, f.T, z, input_precision=PRECISION)
    return z


@triton.jit
def load_projection(
    projection, q, n, E: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr
):
    """P at the columns of chunk q and the logits n: [C, len(n)]."""
    _, column, exists = chunk_columns(q, E, RANK, WIDTH, C)
    at = projection + column[:, None] * E + n[None, :]
    return tl.load(at, mask=exists[:, None] & (n < E)[None, :], other=0.0)


@triton.jit
def times_projection(
    dlogits, projection, q, rows, exists, BT: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr,
    EP: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dlogits [., E] times Pᵀ at the columns of chunk q: [BT, C]."""
    EC: tl.constexpr = min(EP, 32)
    total = tl.zeros([BT, C], tl.float32)
    for first in range(0, E, EC):
        n = first + tl.arange(0, EC)
        mask = exists[:, None] & (n < E)[None, :]
        delta = tl.load(dlogits + rows[:, None] * E + n[None, :], mask=mask, other=0.0)
        p = load_projection(projection, q, n, E, RANK, WIDTH, C)
        total = tl.dot(delta, p.T, total, input_precision=PRECISION)
    return total


@triton.jit
def load_last_row(projection, E: tl.constexpr, RANK: tl.constexpr, EP: tl.constexpr):
    """The row of P that a layer norm's mean meets: [EP]."""
    n = tl.arange(0, EP)
    return tl.load(projection + E * RANK * E + n, mask=n < E, other=0.0)


@triton.jit
def sum_experts(v, EXPERTS: tl.constexpr):
    """v [BT, EXPERTS * columns of each], summed over those: [BT, EXPERTS]."""
    return tl.reshape(sum_runs(v, v.shape[1] // EXPERTS), [v.shape[0], EXPERTS])


@triton.jit
def times_experts(v, weights):
    """v [BT, EXPERTS * columns of each] times a weight of each expert [BT, EXPERTS]."""
    apart = tl.reshape(v, [v.shape[0], weights.shape[1], v.shape[1] // weights.shape[1]])
    return tl.reshape(apart * weights[:, :, None], v.shape)


# ---------------------------------------------------------------- row mathematics


@triton.jit
def inverse_norm(square):
    """1 / norm of what has this square."""
    norm = tl.sqrt(square)
    return 1 / tl.where(norm < LEAST_NORM, LEAST_NORM, norm)


@triton.jit
def expert_inverses(
    tile, factors, group, BT: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr,
    WIDTH: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """1 / norm of the outputs of a group's experts: [BT, GROUP]."""
    square = tl.zeros([BT, GROUP], tl.float32)
    for piece in range((WIDTH + C - 1) // C):
        z = rotated(tile, factors, group, piece, BT, E, RANK, WIDTH, C, PRECISION)
        square += sum_experts(z * z, GROUP)
    return inverse_norm(square)


@triton.jit
def expert_means(
    tile, means, group, BT: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr,
    C: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Means of the outputs of a group's experts: [BT, GROUP]."""
    PIECES: tl.constexpr = (WIDTH + C - 1) // C
    total = tl.zeros([BT, GROUP], tl.float32)
    for piece in range(PIECES):
        h = load_fed(tile, group * PIECES + piece, E, RANK, WIDTH, C)
        _, column, exists = chunk_columns(group * PIECES + piece, E, RANK, WIDTH, C)
        m = tl.load(means + column, mask=exists, other=0.0)
        total += sum_experts(h * m[None, :], GROUP)
    return total


@triton.jit
def count_feeding(fed, E: tl.constexpr, EP: tl.constexpr):
    e = tl.arange(0, EP)
    return tl.sum(feeds(fed, e, e < E).to(tl.float32), 0)


@triton.jit
def gate(
    tile, projection, factors, means, N, BT: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr,
    EP: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr,
    NORMALIZATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ε = normalise(hidden) P of a tile of tokens, see :func:`load_fed`.

    Returns:
        ε [BT, EP]; 1 / norm [BT] where all experts share it, else 1; and the mean [BT] that a layer
        norm subtracts, else 0.
    """
    GROUPS: tl.constexpr = (E + GROUP - 1) // GROUP
    PIECES: tl.constexpr = (WIDTH + C - 1) // C
    fed = tile[1]
    inverse, mean = tl.full([BT], 1.0, tl.float32), tl.zeros([BT], tl.float32)
    if NORMALIZATION == LAYERNORM:
        feeding = count_feeding(fed, E, EP)
        total = tl.zeros([BT, GROUP], tl.float32)
        for group in range(GROUPS):
            total += expert_means(tile, means, group, BT, E, RANK, WIDTH, C, GROUP)
        mean = sum_runs(total, GROUP) / feeding

    logits, squares = tl.zeros([BT, EP], tl.float32), tl.zeros([BT, C], tl.float32)
    spread = tl.zeros([BT, GROUP], tl.float32)
    for group in range(GROUPS):
        if NORMALIZATION == PER_EXPERT:
            inverses = expert_inverses(
                tile, factors, group, BT, E, RANK, WIDTH, C, GROUP, PRECISION
            )
        for piece in range(PIECES):
            h = load_fed(tile, group * PIECES + piece, E, RANK, WIDTH, C)
            if NORMALIZATION == PER_EXPERT:
                h = times_experts(h, inverses)
            elif NORMALIZATION != NONE:
                z = rotated(tile, factors, group, piece, BT, E, RANK, WIDTH, C, PRECISION)
                squares += z * z
            p = load_projection(
                projection, group * PIECES + piece, tl.arange(0, EP), E, RANK, WIDTH, C
            )
            logits += tl.dot(h, p, input_precision=PRECISION)
        if NORMALIZATION == LAYERNORM:
            e = group * GROUP + tl.arange(0, GROUP)
            difference = expert_means(tile, means, group, BT, E, RANK, WIDTH, C, GROUP)
            difference = tl.where(feeds(fed, e, e < E)[None, :], difference - mean[:, None], 0.0)
            spread += difference * difference

    if NORMALIZATION == L2:
        inverse = inverse_norm(sum_runs(squares, C))
        logits *= inverse[:, None]
    if NORMALIZATION == LAYERNORM:
        variance = (sum_runs(squares, C) / N + sum_runs(spread, GROUP)) / feeding
        inverse = 1 / tl.sqrt(variance + VARIANCE_EPSILON)
        last = load_last_row(projection, E, RANK, EP)
        logits = (logits + mean[:, None] * last[None, :]) * inverse[:, None]
    return logits, inverse, mean


@triton.jit
def slice_columns(j, E: tl.constexpr, RANK: tl.constexpr, EP: tl.constexpr, S: tl.constexpr):
    """Columns [j, j + S) of every expert: their index in hidden, and which exist; [EP * S] each."""
    c = tl.arange(0, EP * S)
    expert, row = c // S, j + c % S
    return expert * RANK + row, (expert < E) & (row < RANK)


@triton.jit
def mix_parts(
    hidden_parts, saved, hidden, projection, factors, means, scales, tau, mask, fed, gates, mixed,
    T, N, pitch, tile, writes, PARTS: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr,
    EP: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, S: tl.constexpr,
    NORMALIZATION: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of BT tokens from a shrink's parts to `mixed` [T, E * RANK].

    Args:
        hidden: float32 [T, E * RANK], written unless a single part lies there.
        saved: the same, or another such tensor, written then if `writes`.
        mask, fed: bool [E] or None, which experts may be used and which feed the gate.
        gates: float32 [T, E], written if `writes`.
        mixed: pitch (in eights) from row to row; written.
    """
    R: tl.constexpr = E * RANK
    rows = tl.cast(tile, tl.int64) * BT + tl.arange(0, BT)
    exists = rows < T
    tokens = T.to(tl.int64)
    n = tl.arange(0, EP)
    if PARTS > 1:
        for first in range(0, R, C):
            column = first + tl.arange(0, C)
            at = rows[:, None] * R + column[None, :]
            mask_h = exists[:, None] & (column < R)[None, :]
            h = add_parts(hidden_parts, at, tokens * R, mask_h, PARTS)
            tl.store(hidden + at, h, mask=mask_h)
            if saved is not None:
                tl.store(saved + at, h, mask=mask_h & writes)
        tl.debug_barrier()  # other threads of the block read it
    logits, _, _ = gate(
        (hidden, fed, rows, exists), projection, factors, means, N, BT, E, RANK, EP, WIDTH, C,
        GROUP, NORMALIZATION, PRECISION,
    )  # fmt: skip
    logits *= 1 / tl.load(tau)
    if mask is not None:
        logits = tl.where(feeds(mask, n, n < E)[None, :], logits, float("-inf"))
    p = exponentials(logits, row_keys(logits, E))
    g = shares(p, p)
    mask_n = exists[:, None] & (n < E)[None, :] & writes
    tl.store(gates + rows[:, None] * E + n[None, :], g, mask=mask_n)

    weights = g * tl.load(scales + n, mask=n < E, other=0.0)[None, :]
    for j in range(0, RANK, S):
        column, exists_column = slice_columns(j, E, RANK, EP, S)
        mask_h = exists[:, None] & exists_column[None, :]
        h = tl.load(hidden + rows[:, None] * R + column[None, :], mask=mask_h, other=0.0)
        at = mixed + rows[:, None] * in_eights(pitch, True) + column[None, :]
        tl.store(at, times_experts(h, weights).to(mixed.dtype.element_ty), mask=mask_h)


# ---------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["T"])
def mix(
    hidden_parts, hidden, projection, factors, means, scales, tau, mask, fed, gates, mixed, T, N,
    pitch, PARTS: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr, EP: tl.constexpr,
    WIDTH: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, S: tl.constexpr,
    NORMALIZATION: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """See :func:`mix_parts`.  Grid: tiles of tokens."""
    mix_parts(
        hidden_parts, None, hidden, projection, factors, means, scales, tau, mask, fed, gates,
        mixed, T, N, pitch, tl.program_id(0), True, PARTS, E, RANK, EP, WIDTH, C, GROUP, S,
        NORMALIZATION, BT, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "threshold", "walk"])
def mix_and_expand(
    y, left_a, a, left_b, b, bias, seed, T, N, stride_y, pitch_a, pitch_b, threshold, walk,
    hidden_parts, saved, hidden, projection, factors, means, scales, tau, mask, fed, gates,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, BR: tl.constexpr, ROWS_B: tl.constexpr,
    BRB: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr, E: tl.constexpr,
    RANK: tl.constexpr, EP: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr,
    GROUP: tl.constexpr, S: tl.constexpr, NORMALIZATION: tl.constexpr,
    BT_MIX: tl.constexpr, PRECISION_MIX: tl.constexpr,
):  # fmt: skip
    """An expand whose blocks mix all tokens by themselves, of which there are at most BT_MIX.

    Grid: strips of columns.

    Args:
        left_a: [strips, T, E * RANK], pitch_a from row to row; each block's own.
        hidden: float32 [strips, T, E * RANK], likewise; of a single part `saved`, which all read.
    """
    strip = tl.program_id(0)
    first = (strip * T).to(tl.int64)
    mixed = left_a + first * pitch_a
    if PARTS > 1:
        hidden += first * (E * RANK)
    expand_strip(
        y, stride_y, mixed, pitch_a, a, left_b, pitch_b, b, bias, seed, threshold, strip,
        tl.cast(0, tl.int64), T, N, GROUPS, ROWS, BR, ROWS_B, BRB, BT, BN, WIDE, ACCUMULATE,
        PRECISION, MIX=mix_parts,
        mixing=(
            hidden_parts, saved, hidden, projection, factors, means, scales, tau, mask, fed, gates,
            mixed, T, N, pitch_a, 0, strip == 0, PARTS, E, RANK, EP, WIDTH, C, GROUP, S,
            NORMALIZATION, BT_MIX, PRECISION_MIX,
        ),
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def mix_backward(
    dmixed_parts, hidden, gates, dgates, projection, factors, means, scales, tau, fed,
    dhidden, normalized, dlogits, dtau, T, N, pitch, PARTS: tl.constexpr, E: tl.constexpr,
    RANK: tl.constexpr, EP: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr,
    GROUP: tl.constexpr, S: tl.constexpr, NORMALIZATION: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """From the parts of a shrink of dy to all gradients.  Grid: row tiles.

    Args:
        hidden, gates: as the forward pass left them.
        dgates: float32 [T, E], what reaches the gates from elsewhere, or None.
        fed: bool [E] or None, which experts feed the gate.
        dhidden: [T, E * RANK], pitch (in eights) from row to row; written unless None.
        normalized: float32 [T, rows of P], written: what P is multiplied by.
        dlogits: float32 [T, E], written: the gradient of ε.
        dtau: float32 [T], written: each token's share in the gradient of τ.
    """
    R: tl.constexpr = E * RANK
    PIECES: tl.constexpr = (WIDTH + C - 1) // C
    ROWS: tl.constexpr = R + 1 if NORMALIZATION == LAYERNORM else R
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    exists = rows < T
    tokens = T.to(tl.int64)
    n = tl.arange(0, EP)
    tile = (hidden, fed, rows, exists)
    logits, inverse, mean = gate(
        tile, projection, factors, means, N, BT, E, RANK, EP, WIDTH, C, GROUP, NORMALIZATION,
        PRECISION,
    )  # fmt: skip

    # Through the mix into the gates, and through the softmax.
    at_n = rows[:, None] * E + n[None, :]
    mask_n = exists[:, None] & (n < E)[None, :]
    dg = tl.zeros([BT, EP], tl.float32)
    for j in range(0, RANK, S):
        column, exists_column = slice_columns(j, E, RANK, EP, S)
        at = rows[:, None] * R + column[None, :]
        mask_h = exists[:, None] & exists_column[None, :]
        h = tl.load(hidden + at, mask=mask_h, other=0.0)
        d = add_parts(dmixed_parts, at, tokens * R, mask_h, PARTS)
        dg += sum_experts(h * d, EP)
    dg *= tl.load(scales + n, mask=n < E, other=0.0)[None, :]
    if dgates is not None:
        dg += tl.load(dgates + at_n, mask=mask_n, other=0.0)
    inverse_tau = 1 / tl.load(tau)
    g = tl.load(gates + at_n, mask=mask_n, other=0.0)
    delta = inverse_tau * softmax_backward(g, dg)
    along = sum_runs(delta * logits, EP)
    tl.store(dlogits + at_n, delta, mask=mask_n)
    tl.store(dtau + rows, -inverse_tau * along, mask=exists)
    tl.debug_barrier()  # other threads of the block read dlogits

    # Through the product with P and the norm ν: with u = H / ν, dH = du / ν - <du, u> dν/dH / ν.
    if NORMALIZATION == LAYERNORM:
        feeding = count_feeding(fed, E, EP)
        dmean = sum_runs(delta * load_last_row(projection, E, RANK, EP)[None, :], EP)
        tl.store(normalized + rows * ROWS + R, mean * inverse, mask=exists)
    inverses = tl.broadcast_to(inverse[:, None], [BT, GROUP])
    alongs = tl.broadcast_to(along[:, None], [BT, GROUP])
    for group in range((E + GROUP - 1) // GROUP):
        if NORMALIZATION == PER_EXPERT:
            inverses = expert_inverses(
                tile, factors, group, BT, E, RANK, WIDTH, C, GROUP, PRECISION
            )
            alongs = tl.zeros([BT, GROUP], tl.float32)
            for piece in range(PIECES):
                q = group * PIECES + piece
                du = times_projection(
                    dlogits, projection, q, rows, exists, BT, E, RANK, EP, WIDTH, C, PRECISION
                )
                alongs += sum_experts(du * load_fed(tile, q, E, RANK, WIDTH, C), GROUP)
            alongs *= inverses
        # What R_eᵀ R_e H_e is multiplied by.  A norm that was clamped is a constant.
        turn = alongs * inverses * inverses
        if NORMALIZATION == LAYERNORM:
            difference = expert_means(tile, means, group, BT, E, RANK, WIDTH, C, GROUP)
            difference -= mean[:, None]
            dmeans = ((dmean * inverse)[:, None] - turn * difference) / feeding
            turn /= N * feeding
        else:
            turn = tl.where(inverses >= inverse_norm(tl.zeros_like(inverses)), 0.0, turn)
        for piece in range(PIECES):
            q = group * PIECES + piece
            expert, column, exists_column = chunk_columns(q, E, RANK, WIDTH, C)
            mask_h = exists[:, None] & exists_column[None, :]
            u = times_experts(load_fed(tile, q, E, RANK, WIDTH, C), inverses)
            tl.store(normalized + rows[:, None] * ROWS + column[None, :], u, mask=mask_h)
            if dhidden is not None:
                du = times_projection(
                    dlogits, projection, q, rows, exists, BT, E, RANK, EP, WIDTH, C, PRECISION
                )
                dh = times_experts(du, inverses)
                if NORMALIZATION != NONE:
                    back = tl.zeros([BT, C], tl.float32)
                    for i in range(piece + 1):
                        z = rotated(tile, factors, group, i, BT, E, RANK, WIDTH, C, PRECISION)
                        f = load_factors(factors, group * PIECES + i, q, E, RANK, WIDTH, C)
                        back = tl.dot(z, f, back, input_precision=PRECISION)
                    dh -= times_experts(back, turn)
                if NORMALIZATION == LAYERNORM:
                    m = tl.load(means + column, mask=exists_column, other=0.0)
                    dh += times_experts(tl.broadcast_to(m[None, :], [BT, C]), dmeans)
                dh = tl.where(feeds(fed, expert, exists_column)[None, :], dh, 0.0)
                at = rows[:, None] * R + column[None, :]
                d = add_parts(dmixed_parts, at, tokens * R, mask_h, PARTS)
                w = tl.load(gates + rows[:, None] * E + expert[None, :], mask=mask_h, other=0.0)
                w *= tl.load(scales + expert, mask=exists_column, other=0.0)[None, :]
                dh += w * d
                at = dhidden + rows[:, None] * in_eights(pitch, True) + column[None, :]
                tl.store(at, dh.to(dhidden.dtype.element_ty), mask=mask_h)


# ---------------------------------------------------------------- operators


def output_gate_forward(
    x: Tensor, lora_down: Tensor, lora_up: Tensor, projection: Tensor, factors: Tensor,
    means: Tensor | None, scales: Tensor, tau: Tensor, mask: Tensor | None, bias: Tensor | None,
    y: Tensor, normalization: int, mask_input: bool, accumulate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``ops.output_gate_forward``: shrink, the mix and expand in three launches or two."""
    rows = launch.experts(x, lora_down, lora_up)
    T, (E, r, N) = rows.count, lora_up.shape
    out = launch.rows_like(y, x, (*x.shape[:-1], N), "y")
    if bias is not None:
        launch.check_like(bias, x, (N,), "bias")
    _check(E, r, projection, factors, means, scales, tau, mask, normalization)
    hidden, gates = (x.new_empty((T, n), dtype=torch.float32) for n in (E * r, E))
    sums, _, parts = _shrink.run(rows, lora_down, None, hidden)
    constants, tile = _constants(E, r, normalization)
    own, copies = _expand.own_mix(out, tiles.power_of_2(E) * constants["WIDTH"])
    mixed = launch.workspace(x, copies * T, E * r)
    expand = _expand.plan(out, mixed, lora_up, accumulate=accumulate, bias=bias)
    fed = mask if mask_input else None
    gate = (projection, factors, means, scales, tau, mask, fed, gates)
    if own:
        others = hidden if parts == 1 else hidden.new_empty((copies, T, E * r))
        mix_and_expand[expand.grid](
            *expand.arguments, sums, hidden, others, *gate, PARTS=parts, BT_MIX=max(own, tile.BT),
            PRECISION_MIX=constants.pop("PRECISION"), **constants, **expand.constants,
        )  # fmt: skip
    elif T:
        mix[(tiles.cdiv(T, tile.BT),)](
            sums, hidden, *gate, mixed.data, T, N, mixed.stride, PARTS=parts, BT=tile.BT,
            **constants, **launch.options(tile.warps, 1),
        )  # fmt: skip
        expand.run(_expand.expand_rows)
    return hidden, gates


def output_gate_backward(
    dy: Tensor, dgates: Tensor | None, lora_down: Tensor, lora_up: Tensor, projection: Tensor,
    factors: Tensor, means: Tensor | None, scales: Tensor, tau: Tensor, mask: Tensor | None,
    hidden: Tensor, gates: Tensor, dx: Tensor, normalization: int, mask_input: bool,
    accumulate: bool, need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``ops.output_gate_backward``: shrink of dy, the mix, expand, and the sum for τ in two.

    dx has x's shape even if it is not wanted.
    """
    dx_rows = launch.experts(dx, lora_down, lora_up, "dx")
    T, (E, r, N) = dx_rows.count, lora_up.shape
    dy_rows = launch.rows_like(dy, dx, (*dx.shape[:-1], N), "dy")
    _check(E, r, projection, factors, means, scales, tau, mask, normalization)
    for t, columns, name in ((hidden, E * r, "hidden"), (gates, E, "gates"), (dgates, E, "dgates")):
        if t is not None:
            launch.check_wide(t, (T, columns), name)
    wide = {"dtype": torch.float32}
    normalized = dx.new_empty((T, projection.shape[0]), **wide)
    dlogits, dtau = dx.new_empty((T, E), **wide), dx.new_empty((T, 1), **wide)
    dhidden = launch.workspace(dx, T, E * r) if need_dx else None
    sums, _, parts = _shrink.run(dy_rows, lora_up)
    constants, tile = _constants(E, r, normalization)
    if T:
        mix_backward[(tiles.cdiv(T, tile.BT),)](
            sums, hidden, gates, dgates, projection, factors, means, scales, tau,
            mask if mask_input else None, dhidden and dhidden.data, normalized, dlogits, dtau, T,
            N, launch.pitch(E * r), PARTS=parts, BT=tile.BT, **constants,
            **launch.options(tile.warps, 1),
        )  # fmt: skip
    if need_dx:
        _expand.run(dx_rows, dhidden, lora_down, accumulate=accumulate)
    values = launch.rows_of(dtau, "dtau")
    *_, total = _outer.run(None, None, [_outer.Sums(values, launch.RowMap(1, None, T))])
    return normalized, dlogits, total.view(1)


def _check(
    E: int, r: int, projection: Tensor, factors: Tensor, means: Tensor | None, scales: Tensor,
    tau: Tensor, mask: Tensor | None, normalization: int,
) -> None:  # fmt: skip
    """That a gate's tensors are where the kernels read them."""
    if normalization not in ops.NORMALIZATIONS.values():
        raise RuntimeError(f"normalization: {normalization} is none")
    layernorm = normalization == LAYERNORM.value
    launch.check_wide(projection, (E * r + layernorm, E), "projection")
    launch.check_wide(factors, (E, r, r), "factors")
    launch.check_wide(scales, (E,), "scales")
    launch.check_wide(tau, (1,), "tau")
    if layernorm:
        if means is None:
            raise RuntimeError("means: layernorm needs them")
        launch.check_wide(means, (E * r,), "means")
    if mask is not None and not (
        mask.dtype == torch.bool and mask.shape == (E,) and mask.is_contiguous()
    ):
        raise RuntimeError(f"mask: wanted one bool for each of {E} experts")


def _constants(E: int, r: int, normalization: int) -> tuple[dict, tiles.OutputGate]:
    """What the kernels of the mix are compiled for but its tokens, and its tile."""
    tile, width = tiles.output_gate(E, r), tiles.power_of_2(r)
    constants = {
        "E": E, "RANK": r, "EP": tile.EP, "WIDTH": width, "C": tile.C,
        "GROUP": max(tile.C // width, 1), "S": tile.S, "NORMALIZATION": normalization,
        "PRECISION": launch.precision(torch.float32),
    }  # fmt: skip
    return constants, tile
