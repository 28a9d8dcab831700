"""Exchange within a warp: shuffles, votes, reductions."""

import numpy as np

from ..errors import Fault, Unsupported
from ..program import BOOL, DTYPES, U32, Decoder, decodes

_LANE = np.arange(32)


def _by_warp(wave, value) -> np.ndarray:
    return wave.spread(value).reshape(-1, 32)


def _present(wave, mask) -> np.ndarray:
    """bool [warps, 32]"""
    return _by_warp(wave, mask)


def _check_members(wave, mask, members) -> None:
    """Every lane that calls must be named in its own member mask, and every lane that is named must
    call.
    """
    here = _present(wave, mask)
    named = (_by_warp(wave, members) >> _LANE.astype(np.uint32) & np.uint32(1)).astype(np.bool_)
    live = wave.live.reshape(-1, 32)
    missing = here & ~named
    # All callers of a warp name the same lanes; the first one speaks for them.
    bits = np.where(here, _by_warp(wave, members), np.uint32(0))
    wanted = (np.bitwise_or.reduce(bits, 1)[:, None] >> _LANE.astype(np.uint32) & 1).astype(
        np.bool_
    )
    absent = wanted & live & ~here
    if missing.any() or absent.any():
        lane = int(np.flatnonzero((missing | absent).reshape(-1))[0])
        state = "calls but is not in the member mask" if missing.any() else "is named but not here"
        raise Fault(f"{wave.thread_name(lane)} {state}")


def _members(d: Decoder, operand: str):
    slot = d.read(operand, U32)
    if operand in ("-1", "0xffffffff", "0xFFFFFFFF", "4294967295"):

        def check(wave, mask):
            if mask is not True:
                _check_members(wave, mask, wave.values[slot])

        return check
    return lambda wave, mask: _check_members(wave, mask, wave.values[slot])


@decodes("shfl")
def _(d: Decoder):
    d.take("sync")
    mode = d.take("up", "down", "bfly", "idx")
    target, valid = d.pair(d.operands[0])
    source, amount, clamp = (d.read(o, U32) for o in d.operands[1:4])
    check = _members(d, d.operands[4])
    out = d.write(target, U32)
    valid_out = d.write(valid, BOOL) if valid else None
    if d.type != "b32":
        raise Unsupported("shfl." + d.type)

    def execute(wave, mask):
        values = wave.values
        check(wave, mask)
        b = _by_warp(wave, values[amount]).astype(np.int64) & 31
        c = _by_warp(wave, values[clamp]).astype(np.int64)
        segment, limit = c >> 8 & 31, c & 31
        last = (_LANE & segment) | (limit & ~segment)
        if mode == "up":
            lane = _LANE - b
            inside = lane >= last
        else:
            lane = {
                "down": _LANE + b, "bfly": _LANE ^ b, "idx": (_LANE & segment) | (b & ~segment),
            }[mode]  # fmt: skip
            inside = lane <= last
        lane = np.where(inside, lane, _LANE)
        x = np.take_along_axis(_by_warp(wave, values[source]), lane, 1)
        if mask is not True:
            # What a lane that is not here would have sent is undefined.
            here = np.take_along_axis(_present(wave, mask), lane, 1)
            x = np.where(here, x, np.uint32(0xFFFFFFFF))
        np.copyto(values[out], x.reshape(-1), where=mask)
        if valid_out is not None:
            np.copyto(values[valid_out], inside.reshape(-1), where=mask)

    return execute


def _ballot(votes: np.ndarray) -> np.ndarray:
    """bool [warps, 32] to uint32 [warps]"""
    return np.packbits(votes, axis=1, bitorder="little").view(np.uint32)[:, 0]


@decodes("vote")
def _(d: Decoder):
    d.take("sync")
    mode = d.take("all", "any", "uni", "ballot")
    operand = d.operands[1]
    source, negated = d.read(operand.lstrip("!"), BOOL), operand[0] == "!"
    check = _members(d, d.operands[2])
    out = d.write(d.operands[0], U32 if mode == "ballot" else BOOL)

    def execute(wave, mask):
        check(wave, mask)
        here = _present(wave, mask)
        yes = here & (_by_warp(wave, wave.values[source]) != negated)
        if mode == "ballot":
            result = _ballot(np.ascontiguousarray(yes))
        elif mode == "any":
            result = yes.any(1)
        else:
            result = (yes == here).all(1)
            if mode == "uni":
                result |= ~yes.any(1)
        np.copyto(wave.values[out], np.repeat(result, 32), where=mask)

    return execute


@decodes("activemask")
def _(d: Decoder):
    out = d.write(d.operands[0], DTYPES[d.type])

    def execute(wave, mask):
        here = np.ascontiguousarray(_present(wave, mask))
        np.copyto(wave.values[out], np.repeat(_ballot(here), 32), where=mask)

    return execute


@decodes("elect")
def _(d: Decoder):
    d.take("sync")
    target, leader = d.pair(d.operands[0])
    check = _members(d, d.operands[1])
    out, leader_out = d.write(target, U32), d.write(leader, BOOL)

    def execute(wave, mask):
        check(wave, mask)
        first = _present(wave, mask).argmax(1)
        np.copyto(wave.values[out], np.repeat(first, 32).astype(np.uint32), where=mask)
        np.copyto(wave.values[leader_out], (first[:, None] == _LANE).reshape(-1), where=mask)

    return execute


_REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


@decodes("redux")
def _(d: Decoder):
    d.take("sync")
    function = _REDUCTIONS[d.take(*_REDUCTIONS)]
    dtype = DTYPES[d.type]
    if dtype.kind == "f":
        raise Unsupported("redux." + d.type)
    source, out = d.read(d.operands[1], dtype), d.write(d.operands[0], dtype)
    check = _members(d, d.operands[2])

    def execute(wave, mask):
        check(wave, mask)
        x, here = _by_warp(wave, wave.values[source]), _present(wave, mask)
        result = np.zeros(len(x), dtype)
        for warp in np.flatnonzero(here.any(1)):
            result[warp] = function.reduce(x[warp][here[warp]], dtype=dtype)
        np.copyto(wave.values[out], np.repeat(result, 32), where=mask)

    return execute


@decodes("match")
def _(d: Decoder):
    d.take("sync")
    if d.take("any", "all") != "any":
        raise Unsupported("match.all")
    dtype = DTYPES[d.type]
    source, out = d.read(d.operands[1], dtype), d.write(d.operands[0], U32)
    check = _members(d, d.operands[2])

    def execute(wave, mask):
        check(wave, mask)
        x, here = _by_warp(wave, wave.values[source]), _present(wave, mask)
        same = (x[:, :, None] == x[:, None, :]) & here[:, None, :]
        bits = _ballot(np.ascontiguousarray(same).reshape(-1, 32))
        np.copyto(wave.values[out], bits, where=mask)

    return execute
