"""The mixes, whether behind a shrink or by themselves."""

from fractions import Fraction
from typing import Any, NamedTuple

from .common import INDEX, SHRINK_COLUMNS, Account, cdiv, padded, segment_length
from .merged import cut, own_merging


class Rows(NamedTuple):
    """The tokens of a mix in its blocks, whose warps have one at a time: in so many rounds."""

    T: int
    blocks: int
    rounds: int


def mix(k: Account, m: Any, T: int, tokens: int) -> None:
    """A mix whose blocks have `tokens` each."""
    full, rest = divmod(T, tokens)
    rounds = full * cdiv(tokens, k.warps) + cdiv(rest, k.warps)
    MIXES[type(m).__name__](k, m, Rows(T, cdiv(T, tokens), rounds))


def table(k: Account, t: Any, rows: Rows) -> None:
    if t.values is not None:
        if t.row.map is not None or t.row.tokens_per_row != 1:
            raise NotImplementedError("a table whose rows tokens share")
        k.load(t.values, rows.T * t.columns, k.wide)


def _topk_routing(k: Account, m: Any, rows: Rows, slots: int) -> None:
    k.store(m.prob_partials, rows.blocks * m.E, k.wide)
    k.store(m.count_partials, rows.blocks * slots * m.E, INDEX)
    k.store(m.weights, rows.T * m.k, k.wide)
    k.store(m.selected, rows.T * m.k, INDEX)
    k.store(m.logits, rows.T * m.E, k.wide)


def _topk_forward(k: Account, m: Any, rows: Rows) -> None:
    R = m.E * m.r
    k.store(m.mixed, rows.T * padded(R), k.element)
    if m.hidden is not None:
        _topk_routing(k, m, rows, 1)
        k.store(m.hidden, rows.T * R, k.wide)


def _topk_backward(k: Account, m: Any, rows: Rows) -> None:
    R = m.E * m.r
    k.load(m.selected, rows.T * m.k, INDEX, 3)
    k.load(m.weights, rows.T * m.k, k.wide, 3)
    k.load(m.hidden, rows.T * m.k * m.r, k.wide, 1 if m.mixed is None else 2)
    k.store(m.gradients, rows.T * padded(R + m.E), k.element)
    k.store(m.mixed, rows.T * padded(R), k.element)


def _grouped_backward(k: Account, m: Any, rows: Rows) -> None:
    pairs = rows.T * m.k
    k.load(m.selected, pairs, INDEX)
    # A warp's lanes that have the same slot read its weight together.
    ldm, outputs = padded(m.r), 1 if m.mixed is None else 2
    together = {(c // 32, c // ldm) for c in range(m.k * ldm) if c % ldm < m.r}
    first = 0 if m.first is None else Fraction(cdiv(m.r, 32), m.k)
    k.load(m.weights, pairs, k.wide, 2 + Fraction(len(together), m.k) * outputs + first)
    k.load(m.hidden, pairs * m.r, k.wide, outputs)
    k.store(m.dhidden, pairs * padded(m.r), k.element)
    k.store(m.mixed, pairs * padded(m.r), k.element)
    k.store(m.first, rows.T * padded(m.r + m.E), k.element)
    k.store(m.dlogits, rows.T * padded(m.E), k.element)


def _gated_forward(k: Account, m: Any, rows: Rows) -> None:
    R = m.E * m.r
    table(k, m.weights, rows)
    k.load(m.down_bias, R, k.element, rows.rounds)
    k.store(m.hidden, rows.T * R, k.wide)
    k.store(m.mixed, rows.T * padded(R + m.E * m.up_bias), k.element)


def _gated_backward(k: Account, m: Any, rows: Rows) -> None:
    R = m.E * m.r
    table(k, m.weights, rows)
    readers = sum(to is not None for to in (m.dweights, m.dhidden, m.mixed))
    k.load(m.hidden, rows.T * R, k.wide, readers)
    k.store(m.dweights, rows.T * m.E, k.wide)
    k.store(m.dhidden, rows.T * padded(R), k.element)
    k.store(m.mixed, rows.T * padded(R + m.E * m.up_bias), k.element)


def _averaged_forward(k: Account, m: Any, rows: Rows) -> None:
    table(k, m.weights, rows)
    k.store(m.hidden, rows.T * m.splits * m.E * m.r, k.wide)
    k.store(m.mixed, rows.T * m.splits * padded(m.E * m.r), k.element)


def _averaged_backward(k: Account, m: Any, rows: Rows) -> None:
    pairs, width = m.splits * m.E, m.splits * padded(m.E * m.r)
    table(k, m.weights, rows)
    k.load(m.hidden, rows.T * pairs * m.r, k.wide, 1 if m.dweights is None else 2)
    k.store(m.dweights, rows.T * pairs, k.wide)
    k.store(m.dhidden, rows.T * width, k.element)
    k.store(m.mixed, rows.T * width, k.element)


def _merged_hidden(k: Account, to: Any, rows: Rows) -> None:
    r, T = k.p.rows.R, rows.T * k.p.batch.count
    if to.dhidden is None:
        k.store(to.hidden, T * r, k.wide)
    elif to.low is not None:
        k.load(to.hidden, T * r, k.wide)
    k.store(to.dhidden, T * padded(r), k.element)
    k.store(to.low, T * padded(r), k.element)


def _merge_rows(k: Account, m: Any, rows: Rows) -> None:
    columns = k.p.columns
    length = columns if k.grid[2] == 1 else segment_length(columns)
    shares = [(r, part) for r in cut(m.r, SHRINK_COLUMNS) for part in cut(columns, length)]
    own_merging(k, m, m.down, shares)


def _gates(shape: Any) -> int:
    return shape.r1 if shape.diagonal else shape.r1 * shape.r2


def _grid_forward(k: Account, m: Any, rows: Rows) -> None:
    table(k, m.intuition, rows)
    k.load(m.omega, 1, k.element, rows.blocks)
    k.load(m.beta, 1, k.element, rows.blocks)
    k.store(m.hidden, rows.T * (m.shape.r1 + _gates(m.shape)), k.wide)
    k.store(m.mixed, rows.T * padded(m.shape.r2), k.element)


def _grid_backward(k: Account, m: Any, rows: Rows) -> None:
    columns = m.shape.r1 + _gates(m.shape)
    table(k, m.intuition, rows)
    k.load(m.omega, 1, k.element, rows.blocks)
    k.load(m.beta, 1, k.element, rows.blocks)
    k.load(m.hidden, rows.T * columns, k.wide)
    k.store(m.dhidden, rows.T * padded(columns), k.element)
    k.store(m.mixed, rows.T * padded(m.shape.r2), k.element)
    k.store(m.dscalars, rows.T * 2, k.wide)
    k.store(m.dintuition, rows.T * _gates(m.shape), k.wide)


def _gate(k: Account, m: Any, rows: Rows, times: int = 1) -> None:
    """What all tokens share; norms, and the way back through them, need the triangles R_e."""
    k.load(m.factors, m.E * m.r * (m.r + 1) // 2, k.wide, times * rows.rounds)
    k.load(m.scales, m.E, k.wide, times * rows.rounds)
    k.load(m.projection, m.E * m.r * m.E, k.wide, rows.rounds)
    k.load(m.tau, 1, k.wide, rows.blocks)


def _output_gate_forward(k: Account, m: Any, rows: Rows) -> None:
    R = m.E * m.r
    _gate(k, m, rows)
    k.store(m.gates, rows.T * m.E, k.wide)
    k.store(m.hidden, rows.T * R, k.wide)
    k.store(m.mixed, rows.T * padded(R), k.element)


def _output_gate_backward(k: Account, m: Any, rows: Rows) -> None:
    R = m.E * m.r
    _gate(k, m, rows, 2 if m.dhidden else 1)
    k.load(m.hidden, rows.T * R, k.wide)
    k.load(m.gates, rows.T * m.E, k.wide, 4 if m.dhidden else 3)
    k.load(m.dgates, rows.T * m.E, k.wide)
    k.store(m.dtau, rows.T, k.wide)
    k.store(m.dlogits, rows.T * m.E, k.wide)
    k.store(m.normalized, rows.T * R, k.wide)
    k.store(m.dhidden, rows.T * padded(R), k.element)


# What a functor behind a shrink holds -> its formula.
MIXES = {
    "TopkForward": _topk_forward,
    "TopkBackward": _topk_backward,
    "TopkRouting": lambda k, m, rows: _topk_routing(k, m, rows, m.k),
    "GroupedBackward": _grouped_backward,
    "GatedForward": _gated_forward,
    "GatedBackward": _gated_backward,
    "AveragedForward": _averaged_forward,
    "AveragedBackward": _averaged_backward,
    "GridForward": _grid_forward,
    "GridBackward": _grid_backward,
    "OutputGateForward": _output_gate_forward,
    "OutputGateBackward": _output_gate_backward,
    "MergedHidden": _merged_hidden,
    "Merged": _merge_rows,
}
