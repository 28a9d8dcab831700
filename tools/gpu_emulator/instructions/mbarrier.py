"""mbarrier: barriers in shared memory that count arrivals and bytes of asynchronous copies.

Their state is kept beside shared memory, by block and address.  A copy that is bound to a barrier
lands when somebody asks whether the barrier's phase is over: as late as it may.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ..errors import Fault, Unsupported
from ..program import BOOL, U32, U64, Decoder, decodes
from .load_store import active_addresses, resolve


@dataclass
class Barrier:
    count: int  # arrivals that end a phase
    pending: int = 0
    bytes: int = 0  # expected and not yet arrived
    phase: int = 0
    copies: list[Callable[[], int]] = field(
        default_factory=list
    )  # each lands and returns its bytes

    def __post_init__(self):
        self.pending = self.count

    def arrive(self, number: int, wave, lane: int) -> None:
        if number > self.pending:
            raise Fault(f"{wave.thread_name(lane)}: more arrivals than the mbarrier counts")
        self.pending -= number
        self.settle()

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.pending = self.count
            self.phase ^= 1

    def land(self) -> None:
        """Copies of the present phase."""
        phase = self.phase
        while self.copies and self.phase == phase:
            self.bytes -= self.copies.pop(0)()
            self.settle()


def barrier_at(wave, lane: int, address: int) -> Barrier:
    barriers = wave.state.setdefault("mbarrier", {})
    key = (int(wave.slot[lane]), int(address))
    if key not in barriers:
        raise Fault(f"no mbarrier at byte {address} of shared memory, {wave.thread_name(lane)}")
    return barriers[key]


def _decode_address(d: Decoder, operand: str):
    """(wave, mask) to lanes and addresses in shared memory."""
    space = "shared" if d.take("shared", "shared::cta") else None
    address = d.address(operand)

    def find(wave, mask):
        lanes, addresses = active_addresses(wave, mask, address)
        memory, addresses = resolve(wave, space, lanes, addresses)
        if memory is not wave.shared:
            raise Fault("an mbarrier outside shared memory")
        wave.shared.locate(wave, lanes, addresses, 8)
        return lanes, addresses

    return find


@decodes("mbarrier")
def _(d: Decoder):
    d.block_barriers_only = False
    d.take_all("release", "acquire", "relaxed", "cta", "cluster")
    if d.take("init"):
        return _init(d)
    if d.take("inval"):
        return _invalidate(d)
    if d.take("arrive"):
        return _arrive(d, d.take("expect_tx") is not None)
    if d.take("expect_tx"):
        return _expect(d)
    if d.take("try_wait", "test_wait"):
        return _wait(d)
    raise Unsupported(d.instruction.name)


def _init(d: Decoder):
    find, count = _decode_address(d, d.operands[0]), d.read(d.operands[1], U32)

    def execute(wave, mask):
        lanes, addresses = find(wave, mask)
        counts = wave.spread(wave.values[count])[lanes]
        barriers = wave.state.setdefault("mbarrier", {})
        for lane, address, number in zip(lanes, addresses, counts, strict=True):
            barriers[int(wave.slot[lane]), int(address)] = Barrier(int(number))

    return execute


def _invalidate(d: Decoder):
    find = _decode_address(d, d.operands[0])

    def execute(wave, mask):
        lanes, addresses = find(wave, mask)
        for lane, address in zip(lanes, addresses, strict=True):
            barrier_at(wave, lane, address)
            del wave.state["mbarrier"][int(wave.slot[lane]), int(address)]

    return execute


def _arrive(d: Decoder, with_bytes: bool):
    """`state, [address]` and, if with_bytes, how many to expect, else optionally how many
    arrive.
    """
    find = _decode_address(d, d.operands[1])
    token = d.write(d.operands[0], U64)
    number = d.read(d.operands[2], U32) if len(d.operands) > 2 else None

    def execute(wave, mask):
        lanes, addresses = find(wave, mask)
        numbers = np.ones(len(lanes), int)
        if number is not None:
            numbers = wave.spread(wave.values[number])[lanes]
        for lane, address, n in zip(lanes, addresses, numbers, strict=True):
            barrier = barrier_at(wave, lane, address)
            wave.values[token][lane] = barrier.phase
            if with_bytes:
                barrier.bytes += int(n)
            barrier.arrive(1 if with_bytes else int(n), wave, lane)

    return execute


def _expect(d: Decoder):
    find, number = _decode_address(d, d.operands[0]), d.read(d.operands[1], U32)

    def execute(wave, mask):
        lanes, addresses = find(wave, mask)
        numbers = wave.spread(wave.values[number])[lanes]
        for lane, address, n in zip(lanes, addresses, numbers, strict=True):
            barrier_at(wave, lane, address).bytes += int(n)

    return execute


def _wait(d: Decoder):
    by_parity = d.take("parity") is not None
    find = _decode_address(d, d.operands[1])
    which = d.read(d.operands[2], U32 if by_parity else U64)
    out = d.write(d.operands[0], BOOL)

    def execute(wave, mask):
        lanes, addresses = find(wave, mask)
        phases = wave.spread(wave.values[which])[lanes].astype(np.int64) & 1
        # All threads of a block usually ask the same.
        questions = np.stack([wave.slot[lanes], addresses, phases], 1)
        unique, first, inverse = np.unique(
            questions, axis=0, return_index=True, return_inverse=True
        )
        answers = np.empty(len(unique), np.bool_)
        for i, (_, address, phase) in enumerate(unique):
            barrier = barrier_at(wave, lanes[first[i]], address)
            if barrier.phase == phase:
                barrier.land()
            answers[i] = barrier.phase != phase
        done = answers[inverse.reshape(-1)]
        if done.any():
            wave.polls = 0
        wave.values[out][lanes] = done
        wave.polling[lanes[~done]] = True
        return not done.all()

    return execute
