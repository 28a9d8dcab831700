"""PEMT's cosines of a layer's output with every expert's, in rank space (docs/math.md).

Row mathematics as in csrc/mix/cosines.h.  A block takes BT tokens, their experts one after the
other, and of an expert's columns, padded to WIDTH, C at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tiles
from .device import in_eights, sum_runs

SMALLEST_NORM: tl.constexpr = tl.constexpr(1e-8)  # as torch.nn.functional.cosine_similarity

# ---------------------------------------------------------------- device functions


@triton.jit
def at_least(norm):
    return tl.where(norm < SMALLEST_NORM, SMALLEST_NORM, norm)


@triton.jit
def columns_of(e, piece, RANK: tl.constexpr, C: tl.constexpr):
    """A piece of expert e's columns: their index among all experts', and which exist; [C] each."""
    j = piece * C + tl.arange(0, C)
    return e * RANK + j, j < RANK


@triton.jit
def load_piece(
    values, e, piece, rows, exists, E: tl.constexpr, RANK: tl.constexpr, C: tl.constexpr
):
    """values [., E * RANK] of the tokens `rows`, int64 [BT], at a piece of an expert: [BT, C]."""
    column, exists_column = columns_of(e, piece, RANK, C)
    mask = exists[:, None] & exists_column[None, :]
    return tl.load(values + rows[:, None] * (E * RANK) + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_piece(
    values, v, e, piece, rows, exists, E: tl.constexpr, RANK: tl.constexpr, C: tl.constexpr
):
    column, exists_column = columns_of(e, piece, RANK, C)
    mask = exists[:, None] & exists_column[None, :]
    tl.store(values + rows[:, None] * (E * RANK) + column[None, :], v, mask=mask)


@triton.jit
def times_matrix(
    hidden, matrices, e, piece, rows, exists, BT: tl.constexpr, E: tl.constexpr,
    RANK: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A piece of an expert's hidden times its matrix of [E, RANK, RANK]: [BT, C]."""
    product = tl.zeros([BT, C], tl.float32)
    i, exists_i = columns_of(0, piece, RANK, C)
    for q in range(WIDTH // C):
        j, exists_j = columns_of(e, q, RANK, C)
        mask = exists_j[:, None] & exists_i[None, :]
        matrix = tl.load(matrices + j[:, None] * RANK + i[None, :], mask=mask, other=0.0)
        h = load_piece(hidden, e, q, rows, exists, E, RANK, C)
        product = tl.dot(h, matrix, product, input_precision=PRECISION)
    return product


# ---------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["T"])
def measure(
    f, seen, hidden, rotations, scales, cosines, norms, f_norm, T, N, stride_f, E: tl.constexpr,
    RANK: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The arguments of ``ops.cosines``, and its results, written.  Grid: tiles of tokens."""
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    exists = rows < T
    squares = tl.zeros([BT, BN], tl.float32)
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        at = f + rows[:, None] * in_eights(stride_f, WIDE) + n[None, :]
        mask = exists[:, None] & (n < in_eights(N, WIDE))[None, :]
        v = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        squares += v * v
    m = tl.sqrt(sum_runs(squares, BN))
    tl.store(f_norm + rows, m, mask=exists)
    for e in range(E):
        squares_e, products = tl.zeros([BT, C], tl.float32), tl.zeros([BT, C], tl.float32)
        for piece in range(WIDTH // C):
            z = times_matrix(
                hidden, rotations, e, piece, rows, exists, BT, E, RANK, WIDTH, C, PRECISION
            )
            squares_e += z * z
            g = load_piece(seen, e, piece, rows, exists, E, RANK, C)
            products += g * load_piece(hidden, e, piece, rows, exists, E, RANK, C)
        s = tl.load(scales + e)
        norm = tl.abs(s) * tl.sqrt(sum_runs(squares_e, C))
        cosine = s * sum_runs(products, C) / (at_least(norm) * at_least(m))
        tl.store(norms + rows * E + e, norm, mask=exists)
        tl.store(cosines + rows * E + e, cosine, mask=exists)


@triton.jit(do_not_specialize=["T"])
def measure_backward(
    dcosines, df_given, f, seen, hidden, grams, scales, cosines, norms, f_norm, df, dhidden, dseen,
    T, N, stride_given, stride_f, E: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr,
    C: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The arguments of ``ops.cosines_backward``; df, dhidden and dseen are written.

    Grid: tiles of tokens.
    """
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    exists = rows < T
    m = tl.load(f_norm + rows, mask=exists, other=1.0)
    along = tl.zeros([BT], tl.float32)
    for e in range(E):
        norm = tl.load(norms + rows * E + e, mask=exists, other=1.0)
        dcosine = tl.load(dcosines + rows * E + e, mask=exists, other=0.0)
        s = tl.load(scales + e)
        each = dcosine * s / (at_least(norm) * at_least(m))
        product = dcosine * tl.load(cosines + rows * E + e, mask=exists, other=0.0)
        # Where a norm is clamped it is a constant.
        ratio = s / at_least(norm)
        turn = tl.where(norm > SMALLEST_NORM, product * ratio * ratio, 0.0)
        along -= product
        for piece in range(WIDTH // C):
            turned = times_matrix(
                hidden, grams, e, piece, rows, exists, BT, E, RANK, WIDTH, C, PRECISION
            )
            g = load_piece(seen, e, piece, rows, exists, E, RANK, C)
            h = load_piece(hidden, e, piece, rows, exists, E, RANK, C)
            store_piece(dseen, each[:, None] * h, e, piece, rows, exists, E, RANK, C)
            dh = each[:, None] * g - turn[:, None] * turned
            store_piece(dhidden, dh, e, piece, rows, exists, E, RANK, C)
    along = tl.where(m > SMALLEST_NORM, along / (at_least(m) * at_least(m)), 0.0)
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        mask = exists[:, None] & (n < in_eights(N, WIDE))[None, :]
        at = f + rows[:, None] * in_eights(stride_f, WIDE) + n[None, :]
        total = along[:, None] * tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if df_given is not None:
            at = df_given + rows[:, None] * in_eights(stride_given, WIDE) + n[None, :]
            total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        at = df + rows[:, None] * in_eights(N, WIDE) + n[None, :]
        tl.store(at, total.to(df.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- operators


def cosines(
    f: Tensor, seen: Tensor, hidden: Tensor, rotations: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``ops.cosines`` in one launch."""
    rows, E, r = _check(f, seen, hidden, rotations, scales, "rotations")
    shape = (*f.shape[:-1], E)
    measured, norms, f_norm = (
        f.new_empty(s, dtype=torch.float32) for s in (shape, shape, (rows.count,))
    )
    if rows.count:
        grid, constants = _constants(rows, E, r, rows.wide)
        measure[grid](
            f, seen, hidden, rotations, scales, measured, norms, f_norm, rows.count, rows.columns,
            rows.stride, **constants,
        )  # fmt: skip
    return measured, norms, f_norm


def cosines_backward(
    dcosines: Tensor, df_given: Tensor | None, f: Tensor, seen: Tensor, hidden: Tensor,
    grams: Tensor, scales: Tensor, cosines: Tensor, norms: Tensor, f_norm: Tensor, df: Tensor,
    dhidden: Tensor,
) -> Tensor:  # fmt: skip
    """``ops.cosines_backward`` in one launch."""
    rows, E, r = _check(f, seen, hidden, grams, scales, "grams")
    for t, name in ((dcosines, "dcosines"), (cosines, "cosines"), (norms, "norms")):
        launch.check_wide(t, (*f.shape[:-1], E), name)
    launch.check_wide(f_norm, (rows.count,), "f_norm")
    launch.check_wide(dhidden, tuple(hidden.shape), "dhidden")
    launch.check_like(df, f, tuple(f.shape), "df")
    given = rows if df_given is None else launch.rows_like(df_given, f, tuple(f.shape), "df_given")
    dseen = torch.empty_like(seen)
    if rows.count:
        grid, constants = _constants(rows, E, r, rows.wide and given.wide)
        measure_backward[grid](
            dcosines, df_given, f, seen, hidden, grams, scales, cosines, norms, f_norm, df,
            dhidden, dseen, rows.count, rows.columns, given.stride, rows.stride, **constants,
        )  # fmt: skip
    return dseen


def _check(
    f: Tensor, seen: Tensor, hidden: Tensor, matrices: Tensor, scales: Tensor, name: str
) -> tuple[launch.Rows, int, int]:
    """f as rows, E and r, of tensors that are where the kernels read them."""
    launch.check_dtype(f)
    if matrices.dim() != 3:
        raise RuntimeError(f"{name}: wanted 3 dimensions, got {matrices.dim()}")
    E, r = matrices.shape[:2]
    launch.check_wide(matrices, (E, r, r), name)
    launch.check_wide(scales, (E,), "scales")
    launch.check_wide(seen, (*f.shape[:-1], E * r), "seen")
    launch.check_wide(hidden, (*f.shape[:-1], E * r), "hidden")
    return launch.rows_of(f, "f"), E, r


def _constants(rows: launch.Rows, E: int, r: int, wide: bool) -> tuple[tuple[int], dict]:
    """The grid, and what the kernels are compiled for."""
    tile = tiles.cosines(r)
    constants = {
        "E": E, "RANK": r, "WIDTH": max(tiles.power_of_2(r), tile.C), "C": tile.C, "BT": tile.BT,
        "BN": tile.BN, "WIDE": wide, "PRECISION": launch.precision(torch.float32),
        **launch.options(tile.warps, 1),
    }  # fmt: skip
    return (tiles.cdiv(rows.count, tile.BT),), constants
