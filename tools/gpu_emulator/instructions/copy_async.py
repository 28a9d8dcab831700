"""cp.async: copies from global to shared memory that land as late as their waits allow.

A copy's destination counts as being written from the moment it is issued until it has been waited
for, so reading or reusing it in between is a race whatever the timing.
"""

from dataclasses import dataclass

import numpy as np

from ..errors import Unsupported
from ..memory import UNITS
from ..program import U32, Decoder, decodes
from . import tma
from .load_store import active_addresses, take_hints


@dataclass
class _Copy:
    lanes: np.ndarray
    group: np.ndarray  # of each lane
    target: np.ndarray
    source: np.ndarray
    valid: np.ndarray  # bytes to copy; the rest become zeros
    size: int


class _Queue:
    def __init__(self, wave):
        self.copies: list[_Copy] = []
        self.committed = np.zeros(wave.count, np.int64)


def _queue(wave) -> _Queue:
    if "cp.async" not in wave.state:
        wave.state["cp.async"] = _Queue(wave)
    return wave.state["cp.async"]


@decodes("cp")
def _(d: Decoder):
    if d.take("async") is None:
        raise Unsupported("cp")
    if d.take("bulk"):
        return tma.decode_bulk(d)
    if d.take("commit_group"):
        return _commit
    if d.take("wait_all"):
        return lambda wave, mask: _land(wave, mask, None)
    if d.take("wait_group"):
        pending = int(d.operands[0])
        return lambda wave, mask: _land(wave, mask, pending)
    if d.take("mbarrier"):
        raise Unsupported("cp.async.mbarrier")
    return _copy(d)


def _copy(d: Decoder):
    if d.take("ca", "cg") is None or d.take("shared", "shared::cta") is None:
        raise Unsupported(d.instruction.name)
    d.take("global")
    take_hints(d)
    target, source = d.address(d.operands[0]), d.address(d.operands[1])
    size = int(d.operands[2], 0)
    if size not in (4, 8, 16):
        raise Unsupported(f"copy of {size} bytes")
    d.shared_sizes.add(size)
    d.global_sizes.add(size)
    valid = None
    if len(d.operands) > 3 and not _is_predicate(d, d.operands[3]):
        valid = d.read(d.operands[3], U32)
    elif len(d.operands) > 3:
        raise Unsupported("cp.async with ignore-src")

    def execute(wave, mask):
        lanes, targets = active_addresses(wave, mask, target)
        if not len(lanes):
            return
        _, sources = active_addresses(wave, mask, source)
        count = np.full(len(lanes), size)
        if valid is not None:
            count = wave.spread(wave.values[valid])[lanes].astype(np.int64)
        if (count > size).any():
            raise Unsupported(f"src-size beyond {size}")
        whole = count == size  # others are checked byte by byte when they land
        wave.memory.check(wave, lanes[whole], sources[whole], size)
        wave.shared.start_copy(wave, lanes, targets, size)
        queue = _queue(wave)
        queue.copies.append(
            _Copy(lanes, queue.committed[lanes], targets.copy(), sources.copy(), count, size)
        )

    return execute


def _is_predicate(d: Decoder, operand: str) -> bool:
    return d.kernel.registers.get(operand.lstrip("!")) == np.bool_


def _commit(wave, mask):
    _queue(wave).committed[wave.active(mask)] += 1


def _land(wave, mask, pending: int | None):
    """All but the last `pending` groups of each lane; None: whether committed or not."""
    queue = _queue(wave)
    here = wave.spread(mask)
    kept = []
    for copy in queue.copies:
        done = here[copy.lanes]
        if pending is not None:
            done = done & (copy.group < queue.committed[copy.lanes] - pending)
        if done.all():
            _finish(wave, copy)
        elif done.any():
            _finish(wave, _part(copy, done))
            kept.append(_part(copy, ~done))
        else:
            kept.append(copy)
    queue.copies = kept


def _part(copy: _Copy, which: np.ndarray) -> _Copy:
    return _Copy(
        copy.lanes[which], copy.group[which], copy.target[which],
        copy.source[which], copy.valid[which], copy.size,
    )  # fmt: skip


def _finish(wave, copy: _Copy) -> None:
    size = copy.size
    if (copy.valid == size).all():
        data = wave.memory.read(wave, copy.lanes, copy.source, size)
    else:
        data = np.zeros(len(copy.lanes), UNITS[size])
        for count in np.unique(copy.valid):
            which = copy.valid == count
            if count == size:
                data[which] = wave.memory.read(wave, copy.lanes[which], copy.source[which], size)
            elif count:
                data[which] = _read_bytes(wave, copy, which, int(count))
    wave.shared.land_copy(wave, copy.lanes, copy.target, size, data)


def _read_bytes(wave, copy: _Copy, which: np.ndarray, count: int) -> np.ndarray:
    """The first `count` bytes of each source, then zeros."""
    lanes = copy.lanes[which]
    octets = np.zeros((len(lanes), copy.size), np.uint8)
    source = copy.source[which][:, None] + np.arange(count)
    octets[:, :count] = wave.memory.read(
        wave, np.repeat(lanes, count), source.reshape(-1), 1
    ).reshape(-1, count)
    return octets.view(UNITS[copy.size])[:, 0]
