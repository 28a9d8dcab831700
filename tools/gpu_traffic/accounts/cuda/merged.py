"""The merging of factors, and the way back."""

from typing import Any

from .common import Account, cdiv

# Of csrc/cuda/merged.cu: threads of a block, and merged factors that share a reading of experts.
MERGE_THREADS, GROUP = 256, 8


def _passes(k: Account, m: Any, factor: Any, others: tuple[Any, ...]) -> int:
    """Passes of all blocks over a factor, for each of which they read all weights of theirs."""
    flat, chunk = m.r * factor.columns, 16 // k.element
    aligned = all(p is None or p % 16 == 0 for p in (factor.experts, *others))
    if factor.columns // m.splits % chunk == 0 and aligned:
        return cdiv(flat, MERGE_THREADS * chunk)
    return cdiv(flat, MERGE_THREADS)


def own_merging(k: Account, m: Any, factor: Any, shares: list[tuple[int, int]]) -> None:
    """Blocks that merge what they meet, for each row of the table: rows by columns of a factor."""
    if m.splits != 1:
        raise NotImplementedError("segments of the features with weights of their own")
    flat, chunk = m.r * factor.columns, 16 // k.element
    aligned = factor.experts % 16 == 0 and factor.merged % 16 == 0
    width = chunk if factor.columns % chunk == 0 and aligned else 1
    passes = sum(cdiv(rows * (columns // width), k.launch.threads) for rows, columns in shares)
    k.load(factor.experts, m.E * flat, k.element, m.rows)
    k.load(m.weights, m.rows * m.E, k.wide, passes)
    k.store(factor.merged, m.rows * flat, k.element)


def cut(size: int, piece: int) -> list[int]:
    return [min(piece, size - begin) for begin in range(0, size, piece)]


def merge(k: Account) -> None:
    m = k.p
    if m.splits != 1:
        raise NotImplementedError("segments of the features with weights of their own")
    for factor in (m.down, m.up):
        flat = m.r * factor.columns
        k.load(factor.experts, m.E * flat, k.element, cdiv(m.rows, GROUP))
        k.load(m.weights, m.rows * m.E, k.wide, _passes(k, m, factor, (factor.merged,)))
        k.store(factor.merged, m.rows * flat, k.element)


def unmerge(k: Account) -> None:
    p, m = k.p, k.p.factors
    if m.splits != 1:
        raise NotImplementedError("segments of the features with weights of their own")
    for factor, to in ((m.down, p.ddown), (m.up, p.dup)):
        flat = m.r * factor.columns
        # Groups of experts read all gradients, and so does each expert's block of a weight.
        readings = (to is not None) * cdiv(m.E, GROUP) + (p.dweights is not None) * m.E
        k.load(p.gradients, p.parts * m.rows * flat, k.wide, readings)
        k.load(p.dweights and factor.experts, m.E * flat, k.element, m.rows)
        k.load(to and m.weights, m.rows * m.E, k.wide, _passes(k, m, factor, (to,)))
        k.store(to, m.E * flat, k.element)
    k.store(p.dweights, m.rows * m.E, k.wide)
