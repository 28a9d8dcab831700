"""The output gate: weights from the experts' outputs, computed in rank space (docs/math.md, MoLE).

Row mathematics as in csrc/mix/output_gate.h; P, the factors R_e and the means are named there.  Two
steps of it are products: hidden [T, E * r] times P [E * r, E], and each expert's hidden times its
factor.  A tile of BT tokens walks hidden in chunks of C columns, each of which is several whole
experts, their ranks padded to WIDTH (a power of two), or a piece of one.  Groups are what experts
share chunks, or chunks share an expert: the least number of whole chunks and whole experts.
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
from .device import exponentials, in_eights, padded, row_keys, shares, softmax_backward, sum_runs
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
def load_fed(
    hidden, fed, rows, exists, T, q, E: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr,
    C: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Chunk q of the tokens `rows`, int64 [BT]; zero for experts that do not feed the gate."""
    expert, column, exists_column = chunk_columns(q, E, RANK, WIDTH, C)
    mask = exists[:, None] & feeds(fed, expert, exists_column)[None, :]
    R: tl.constexpr = E * RANK
    return add_parts(hidden, rows[:, None] * R + column[None, :], T.to(tl.int64) * R, mask, PARTS)


@triton.jit
def load_factors(
    factors, q, p, E: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr
):
    """The factors at [chunk q, chunk p]: R_e[i, j], zero for columns of two experts."""
    expert, column, exists = chunk_columns(q, E, RANK, WIDTH, C)
    other, source, exists_source = chunk_columns(p, E, RANK, WIDTH, C)
    at = factors + column[:, None] * RANK + (source - other * RANK)[None, :]
    same = expert[:, None] == other[None, :]
    return tl.load(at, mask=exists[:, None] & exists_source[None, :] & same, other=0.0)


@triton.jit
def rotated(
    hidden, fed, factors, rows, exists, T, group, piece, E: tl.constexpr, RANK: tl.constexpr,
    WIDTH: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A piece of a group of R_e H_e, an expert's output in an orthonormal basis: [BT, C]."""
    PIECES: tl.constexpr = (WIDTH + C - 1) // C
    z = tl.zeros([rows.shape[0], C], tl.float32)
    for p in range(piece, PIECES):  # R_e is upper triangular
        h = load_fed(hidden, fed, rows, exists, T, group * PIECES + p, E, RANK, WIDTH, C, PARTS)
        f = load_factors(factors, group * PIECES + piece, group * PIECES + p, E, RANK, WIDTH, C)
        z = tl.dot(h, f.T, z, input_precision=PRECISION)
    return z


@triton.jit
def load_projection(
    projection, q, E: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr,
    EP: tl.constexpr,
):  # fmt: skip
    """P of chunk q: [C, EP]."""
    _, column, exists = chunk_columns(q, E, RANK, WIDTH, C)
    n = tl.arange(0, EP)
    at = projection + column[:, None] * E + n[None, :]
    return tl.load(at, mask=exists[:, None] & (n < E)[None, :], other=0.0)


@triton.jit
def sum_experts(v, GROUP: tl.constexpr):
    """Sums over the columns [BT, C] of each expert of a chunk: [BT, GROUP]."""
    return tl.reshape(sum_runs(v, v.shape[1] // GROUP), [v.shape[0], GROUP])


@triton.jit
def of_columns(v, C: tl.constexpr):
    """v [BT, GROUP], a number per expert of a chunk, at its columns: [BT, C]."""
    BT: tl.constexpr = v.shape[0]
    GROUP: tl.constexpr = v.shape[1]
    return tl.reshape(tl.broadcast_to(v[:, :, None], [BT, GROUP, C // GROUP]), [BT, C])


# ---------------------------------------------------------------- row mathematics


@triton.jit
def expert_means(
    hidden, fed, means, rows, exists, T, group, E: tl.constexpr, RANK: tl.constexpr,
    WIDTH: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Means of the outputs of a group's experts: [BT, GROUP]."""
    PIECES: tl.constexpr = (WIDTH + C - 1) // C
    total = tl.zeros([rows.shape[0], GROUP], tl.float32)
    for piece in range(PIECES):
        q = group * PIECES + piece
        h = load_fed(hidden, fed, rows, exists, T, q, E, RANK, WIDTH, C, PARTS)
        _, column, exists_column = chunk_columns(q, E, RANK, WIDTH, C)
        m = tl.load(means + column, mask=exists_column, other=0.0)
        total += sum_experts(h * m[None, :], GROUP)
    return total


@triton.jit
def expert_inverses(
    hidden, fed, factors, rows, exists, T, group, E: tl.constexpr, RANK: tl.constexpr,
    WIDTH: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """1 / norm of the outputs of a group's experts: [BT, GROUP]."""
    square = tl.zeros([rows.shape[0], GROUP], tl.float32)
    for piece in range((WIDTH + C - 1) // C):
        z = rotated(
            hidden, fed, factors, rows, exists, T, group, piece, E, RANK, WIDTH, C, PARTS, PRECISION
        )
        square += sum_experts(z * z, GROUP)
    return inverse_norm(square)


@triton.jit
def inverse_norm(square):
    """1 / norm of what has this square."""
    norm = tl.sqrt(square)
    return 1 / tl.where(norm < LEAST_NORM, LEAST_NORM, norm)


@triton.jit
def count_feeding(fed, E: tl.constexpr, EP: tl.constexpr):
    e = tl.arange(0, EP)
    return tl.sum(feeds(fed, e, e < E).to(tl.float32), 0)


@triton.jit
def gate(
    hidden, fed, projection, factors, means, rows, exists, T, N, E: tl.constexpr,
    RANK: tl.constexpr, EP: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr,
    GROUP: tl.constexpr, NORMALIZATION: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ε = normalise(hidden) P of the tokens `rows`, int64 [BT].

    Returns:
        ε [BT, EP]; 1 / norm [BT] where all experts share it, else 1; and the mean [BT] that a layer
        norm subtracts, else 0.
    """
    BT: tl.constexpr = rows.shape[0]
    GROUPS: tl.constexpr = (E + GROUP - 1) // GROUP
    PIECES: tl.constexpr = (WIDTH + C - 1) // C
    inverse, mean = tl.full([BT], 1.0, tl.float32), tl.zeros([BT], tl.float32)
    if NORMALIZATION == LAYERNORM:
        feeding = count_feeding(fed, E, EP)
        total = tl.zeros([BT, GROUP], tl.float32)
        for group in range(GROUPS):
            total += expert_means(
                hidden, fed, means, rows, exists, T, group, E, RANK, WIDTH, C, GROUP, PARTS
            )
        mean = sum_runs(total, GROUP) / feeding
    logits, squares = tl.zeros([BT, EP], tl.float32), tl.zeros([BT, C], tl.float32)
    spread = tl.zeros([BT, GROUP], tl.float32)
    for group in range(GROUPS):
        if NORMALIZATION == PER_EXPERT:
            inverses = expert_inverses(
                hidden, fed, factors, rows, exists, T, group, E, RANK, WIDTH, C, GROUP, PARTS,
                PRECISION,
            )  # fmt: skip
        for piece in range(PIECES):
            q = group * PIECES + piece
            h = load_fed(hidden, fed, rows, exists, T, q, E, RANK, WIDTH, C, PARTS)
            if NORMALIZATION == PER_EXPERT:
                h = h * of_columns(inverses, C)
            elif NORMALIZATION != NONE:
                z = rotated(
                    hidden, fed, factors, rows, exists, T, group, piece, E, RANK, WIDTH, C, PARTS,
                    PRECISION,
                )  # fmt: skip
                squares += z * z
            p = load_projection(projection, q, E, RANK, WIDTH, C, EP)
            logits += tl.dot(h, p, input_precision=PRECISION)
        if NORMALIZATION == LAYERNORM:
            of_each = expert_means(
                hidden, fed, means, rows, exists, T, group, E, RANK, WIDTH, C, GROUP, PARTS
            )
            difference = fed_only(of_each - mean[:, None], fed, group, E)
            spread += difference * difference
    if NORMALIZATION == L2:
        inverse = inverse_norm(sum_runs(squares, C))
        logits *= inverse[:, None]
    if NORMALIZATION == LAYERNORM:
        variance = (sum_runs(squares, C) / N + sum_runs(spread, GROUP)) / feeding
        inverse = 1 / tl.sqrt(variance + VARIANCE_EPSILON)
        row = load_last_row(projection, E, RANK, EP)
        logits = (logits + mean[:, None] * row[None, :]) * inverse[:, None]
    return logits, inverse, mean


@triton.jit
def fed_only(v, fed, group, E: tl.constexpr):
    """v [BT, GROUP] of a group's experts, zero for those that do not feed the gate."""
    e = group * v.shape[1] + tl.arange(0, v.shape[1])
    return tl.where(feeds(fed, e, e < E)[None, :], v, 0.0)


@triton.jit
def load_last_row(projection, E: tl.constexpr, RANK: tl.constexpr, EP: tl.constexpr):
    """What a layer norm's mean is multiplied by, [EP]."""
    n = tl.arange(0, EP)
    return tl.load(projection + E * RANK * E + n, mask=n < E, other=0.0)


@triton.jit
def weigh(v, weights, S: tl.constexpr):
    """weights [BT, EP] times v [BT, EP * S], S columns of each expert."""
    BT: tl.constexpr = weights.shape[0]
    EP: tl.constexpr = weights.shape[1]
    return tl.reshape(tl.reshape(v, [BT, EP, S]) * weights[:, :, None], [BT, EP * S])


@triton.jit
def slice_columns(j, E: tl.constexpr, RANK: tl.constexpr, EP: tl.constexpr, S: tl.constexpr):
    """Columns [j, j + S) of every expert: their index in hidden, and which exist; [EP * S] each."""
    c = tl.arange(0, EP * S)
    expert, row = c // S, j + c % S
    return expert * RANK + row, (expert < E) & (row < RANK)


# ---------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["T", "N"])
def mix(
    hidden_parts, saved, projection, factors, means, scales, tau, mask, gates, mixed, T, N, pitch,
    PARTS: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr, EP: tl.constexpr,
    WIDTH: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, S: tl.constexpr,
    NORMALIZATION: tl.constexpr, MASK_INPUT: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """From a shrink's parts to gates [T, E] and `mixed` [T, E * RANK].  Grid: row tiles.

    Args:
        saved: float32 [T, E * RANK], hidden; written unless a single part lies there.
        mask: bool [E] or None; MASK_INPUT if it also says what feeds the gate.
        mixed: pitch (in eights) from row to row.
    """
    R: tl.constexpr = E * RANK
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    exists = rows < T
    n = tl.arange(0, EP)
    logits, _, _ = gate(
        hidden_parts, mask if MASK_INPUT else None, projection, factors, means, rows, exists, T, N,
        E, RANK, EP, WIDTH, C, GROUP, NORMALIZATION, PARTS, PRECISION,
    )  # fmt: skip
    logits *= 1 / tl.load(tau)
    if mask is not None:
        logits = tl.where(
            (tl.load(mask + n, mask=n < E, other=0) != 0)[None, :], logits, float("-inf")
        )
    p = exponentials(logits, row_keys(logits, E))
    g = shares(p, p)
    tl.store(gates + rows[:, None] * E + n[None, :], g, mask=exists[:, None] & (n < E)[None, :])

    weights = g * tl.load(scales + n, mask=n < E, other=0.0)[None, :]
    for j in range(0, RANK, S):
        column, exists_column = slice_columns(j, E, RANK, EP, S)
        at = rows[:, None] * R + column[None, :]
        mask_h = exists[:, None] & exists_column[None, :]
        h = add_parts(hidden_parts, at, T.to(tl.int64) * R, mask_h, PARTS)
        if PARTS > 1:
            tl.store(saved + at, h, mask=mask_h)
        at = mixed + rows[:, None] * in_eights(pitch, True) + column[None, :]
        tl.store(at, weigh(h, weights, S).to(mixed.dtype.element_ty), mask=mask_h)


@triton.jit(do_not_specialize=["T", "N"])
def mix_backward(
    dmixed_parts, hidden, gates, dgates, projection, factors, means, scales, tau, mask, dhidden,
    normalized, dlogits, dtau, T, N, pitch, PARTS: tl.constexpr, E: tl.constexpr,
    RANK: tl.constexpr, EP: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr,
    GROUP: tl.constexpr, S: tl.constexpr, NORMALIZATION: tl.constexpr, MASK_INPUT: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """From the parts of a shrink of dy to all gradients.  Grid: row tiles.

    Args:
        hidden, gates: as the forward pass left them.
        dgates: float32 [T, E], what reaches the gates from elsewhere, or None.
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
    fed = mask if MASK_INPUT else None
    logits, inverse, mean = gate(
        hidden, fed, projection, factors, means, rows, exists, T, N, E, RANK, EP, WIDTH, C, GROUP,
        NORMALIZATION, 1, PRECISION,
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
        dh = add_parts(dmixed_parts, at, tokens * R, mask_h, PARTS)
        dg += tl.reshape(sum_runs(h * dh, S), [BT, EP])
    dg *= tl.load(scales + n, mask=n < E, other=0.0)[None, :]
    if dgates is not None:
        dg += tl.load(dgates + at_n, mask=mask_n, other=0.0)
    inverse_tau = 1 / tl.load(tau)
    delta = inverse_tau * softmax_backward(tl.load(gates + at_n, mask=mask_n, other=0.0), dg)
    along = sum_runs(delta * logits, EP)
    tl.store(dlogits + at_n, delta, mask=mask_n)
    tl.store(dtau + rows, -inverse_tau * along, mask=exists)

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
                hidden, fed, factors, rows, exists, T, group, E, RANK, WIDTH, C, GROUP, 1, PRECISION
            )
            alongs = tl.zeros([BT, GROUP], tl.float32)
            for piece in range(PIECES):
                q = group * PIECES + piece
                u = load_fed(hidden, fed, rows, exists, T, q, E, RANK, WIDTH, C, 1)
                p = load_projection(projection, q, E, RANK, WIDTH, C, EP)
                du = tl.dot(delta, p.T, input_precision=PRECISION)
                alongs += sum_experts(du * u, GROUP)
            alongs *= inverses
        # What R_eᵀ R_e H_e is multiplied by.  A norm that was clamped is a constant.
        turn = alongs * inverses * inverses
        if NORMALIZATION == LAYERNORM:
            of_each = expert_means(
                hidden, fed, means, rows, exists, T, group, E, RANK, WIDTH, C, GROUP, 1
            )
            dmeans = (dmean * inverse)[:, None] - turn * (of_each - mean[:, None])
            dmeans /= feeding
            turn /= N * feeding
        else:
            turn = tl.where(inverses >= inverse_norm(tl.zeros_like(inverses)), 0.0, turn)
        for piece in range(PIECES):
            q = group * PIECES + piece
            expert, column, exists_column = chunk_columns(q, E, RANK, WIDTH, C)
            mask_h = exists[:, None] & exists_column[None, :]
            u = load_fed(hidden, fed, rows, exists, T, q, E, RANK, WIDTH, C, 1)
            u *= of_columns(inverses, C)
            tl.store(normalized + rows[:, None] * ROWS + column[None, :], u, mask=mask_h)
            if dhidden is not None:
                p = load_projection(projection, q, E, RANK, WIDTH, C, EP)
                dh = tl.dot(delta, p.T, input_precision=PRECISION) * of_columns(inverses, C)
                if NORMALIZATION != NONE:
                    back = tl.zeros([BT, C], tl.float32)
                    for i in range(piece + 1):
                        z = rotated(
                            hidden, fed, factors, rows, exists, T, group, i, E, RANK, WIDTH, C, 1,
                            PRECISION,
                        )  # fmt: skip
                        f = load_factors(factors, group * PIECES + i, q, E, RANK, WIDTH, C)
                        back = tl.dot(z, f, back, input_precision=PRECISION)
                    dh -= of_columns(turn, C) * back
                if NORMALIZATION == LAYERNORM:
                    m = tl.load(means + column, mask=exists_column, other=0.0)
                    dh += of_columns(dmeans, C) * m[None, :]
                dh = tl.where(feeds(fed, expert, exists_column)[None, :], dh, 0.0)
                at = rows[:, None] * R + column[None, :]
                d = add_parts(dmixed_parts, at, tokens * R, mask_h, PARTS)
                g = tl.load(gates + rows[:, None] * E + expert[None, :], mask=mask_h, other=0.0)
                dh += tl.load(scales + expert, mask=exists_column, other=0.0)[None, :] * g * d
                at = dhidden + rows[:, None] * in_eights(pitch, True) + column[None, :]
                tl.store(at, dh.to(dhidden.dtype.element_ty), mask=mask_h)


# ---------------------------------------------------------------- operators


def output_gate_forward(
    x: Tensor, lora_down: Tensor, lora_up: Tensor, projection: Tensor, factors: Tensor,
    means: Tensor | None, scales: Tensor, tau: Tensor, mask: Tensor | None, bias: Tensor | None,
    y: Tensor, normalization: int, mask_input: bool, accumulate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``ops.output_gate_forward`` in three launches: shrink, the mix, expand."""
    rows = launch.experts(x, lora_down, lora_up)
    T, (E, r, N) = rows.count, lora_up.shape
    out = launch.rows_like(y, x, (*x.shape[:-1], N), "y")
    if bias is not None:
        launch.check_like(bias, x, (N,), "bias")
    _check(E, r, projection, factors, means, scales, tau, mask, normalization)
    hidden, gates = (x.new_empty((T, n), dtype=torch.float32) for n in (E * r, E))
    mixed = launch.workspace(x, T, E * r)
    parts, _, count = _shrink.run(rows, lora_down, None, hidden)
    _mix(
        mix, T, E, r, normalization, mask, mask_input, parts, hidden, projection, factors, means,
        scales, tau, mask, gates, mixed.data, T, N, mixed.stride, count,
    )  # fmt: skip
    _expand.run(out, mixed, lora_up, accumulate=accumulate, bias=bias)
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
    dx_rows = launch.experts(dx, lora_down, lora_up)
    T, (E, r, N) = dx_rows.count, lora_up.shape
    dy_rows = launch.rows_like(dy, dx, (*dx.shape[:-1], N), "dy")
    _check(E, r, projection, factors, means, scales, tau, mask, normalization)
    for t, columns, name in ((hidden, E * r, "hidden"), (gates, E, "gates"), (dgates, E, "dgates")):
        if t is not None:
            _check_wide(t, (T, columns), name)
    wide = {"dtype": torch.float32}
    normalized = dx.new_empty((T, projection.shape[0]), **wide)
    dlogits, dtau = dx.new_empty((T, E), **wide), dx.new_empty((T, 1), **wide)
    dhidden = launch.workspace(dx, T, E * r) if need_dx else None
    parts, _, count = _shrink.run(dy_rows, lora_up)
    _mix(
        mix_backward, T, E, r, normalization, mask, mask_input, parts, hidden, gates, dgates,
        projection, factors, means, scales, tau, mask, dhidden and dhidden.data, normalized,
        dlogits, dtau, T, N, launch.pitch(E * r), count,
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
    _check_wide(projection, (E * r + layernorm, E), "projection")
    _check_wide(factors, (E, r, r), "factors")
    _check_wide(scales, (E,), "scales")
    _check_wide(tau, (1,), "tau")
    if layernorm:
        if means is None:
            raise RuntimeError("means: layernorm needs them")
        _check_wide(means, (E * r,), "means")
    if mask is not None and not (
        mask.dtype == torch.bool and mask.shape == (E,) and mask.is_contiguous()
    ):
        raise RuntimeError(f"mask: wanted one bool for each of {E} experts")


def _check_wide(t: Tensor, shape: tuple[int, ...], name: str) -> None:
    if t.dtype != torch.float32 or t.shape != shape or not t.is_contiguous():
        raise RuntimeError(
            f"{name}: wanted a contiguous float32 tensor {list(shape)}, got {list(t.shape)} in"
            f" {t.dtype}"
        )


def _mix(
    kernel, T: int, E: int, r: int, normalization: int, mask: Tensor | None, mask_input: bool,
    *arguments,
) -> None:  # fmt: skip
    """Launch a row kernel over T tokens; the last of its arguments is PARTS."""
    tile = tiles.output_gate(E, r)
    WIDTH = tiles.power_of_2(r)
    if T:
        kernel[(tiles.cdiv(T, tile.BT),)](
            *arguments, E=E, RANK=r, EP=tile.EP, WIDTH=WIDTH, C=tile.C,
            GROUP=max(tile.C // WIDTH, 1), S=tile.S, NORMALIZATION=normalization,
            MASK_INPUT=mask_input and mask is not None, PRECISION=launch.precision(torch.float32),
            BT=tile.BT, **launch.options(tile.warps, 1),
        )  # fmt: skip
