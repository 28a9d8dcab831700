"""A wave: blocks that run together, every thread a lane of numpy vectors.

An instruction acts on all lanes that stand at it at once.  Lanes that diverge are run lowest
position first, so that they meet again where the paths join; within a warp always, so that `.sync`
instructions find their lanes, and within a warp group if the kernel has wgmma.
"""

import numpy as np

from .errors import Fault
from .memory import PrivateMemory, SharedMemory
from .program import BOOL, Program, Register, Special

NOWHERE = np.int64(2**62)


class Wave:
    """Blocks that run together, their registers and their shared memory."""

    def __init__(self, launch, blocks: np.ndarray):
        self.launch = launch
        program, threads = launch.program, launch.threads
        padded = -(-threads // 32) * 32
        self.blocks, self.warps_per_block = len(blocks), padded // 32
        self.warps, self.count = self.blocks * self.warps_per_block, self.blocks * padded
        self.lanes = np.arange(self.count)
        self.slot = self.lanes // padded  # the block's place in the wave
        self.block = blocks[self.slot]
        self.thread = self.lanes % padded
        self.warp = self.lanes // 32

        self.live = self.thread < threads
        self.blocked = np.zeros(self.count, np.bool_)  # at a barrier
        self.polling = np.zeros(self.count, np.bool_)  # waited in vain for an mbarrier
        self.barrier = np.zeros(self.count, np.int64)  # where it is blocked
        self.expected = np.zeros(self.count, np.int64)  # threads there; 0: all of the block
        self.arrived: dict[int, np.ndarray] = {}  # at a barrier without waiting, by block
        self.pc = np.zeros(self.count, np.int64)
        # Warps that stay together: single ones, or warp groups where these multiply matrices.
        warp = np.arange(self.warps) % self.warps_per_block
        starts = warp % (4 if program.warp_groups else 1) == 0
        self.group, self.group_starts = np.cumsum(starts) - 1, np.flatnonzero(starts)
        self.at = 0  # the step being executed
        self.polls = 0  # in vain, one after the other, with nobody else to run
        self.branches = 0

        warp_in_block = (self.thread // 32).astype(np.int32)
        self.floor = np.full(self.count, 64, np.int32)  # 64 * (barriers of the block so far + 1)
        self.tag = self.floor + warp_in_block

        self.shared = SharedMemory(
            self.blocks,
            launch.shared_bytes,
            program.shared_unit,
            check=launch.check_races and program.block_barriers_only,
            asynchronous_reads=program.reads_asynchronously,
        )
        local = program.kernel.local_bytes
        self.local = PrivateMemory(
            "local", np.full(self.count * local, 0xFF, np.uint8), local, local
        )
        self.parameters = launch.parameters
        self.memory = launch.memory
        self.state: dict = {}  # what families of instructions keep between instructions, by family
        self.at_exit: list = []  # called when all threads have exited
        self.values = self._values(program)

    def _values(self, program: Program) -> list:
        # Garbage, the same in every run, for who reads a register before it is written.
        files = {
            dtype: np.full((rows, self.count), dtype != BOOL and 256**dtype.itemsize // 3, dtype)
            for dtype, rows in program.files.items()
        }
        rows: dict[tuple, list] = {}
        values = []
        for slot in program.slots:
            if isinstance(slot, Register):
                key = (slot.file, slot.dtype)
                if key not in rows:
                    # Of a wider register the low part, which comes first.
                    step = slot.file.itemsize // slot.dtype.itemsize
                    rows[key] = list(files[slot.file].view(slot.dtype)[:, ::step])
                values.append(rows[key][slot.row])
            elif isinstance(slot, Special):
                values.append(self._special(slot.name).astype(slot.dtype))
            else:
                values.append(slot)
        return values

    def _special(self, name: str) -> np.ndarray:
        register, _, axis = name.partition(".")
        if axis:
            extent = self.launch.block if register in ("tid", "ntid") else self.launch.grid
            which = "xyz".index(axis)
            if register.startswith("n"):
                return np.full(self.count, extent[which])
            number = self.thread if register == "tid" else self.block
            return number // int(np.prod(extent[:which])) % extent[which]
        lane = self.thread % 32
        return {
            "laneid": lane,
            "warpid": self.thread // 32,
            "nwarpid": np.full(self.count, self.warps_per_block),
            "WARP_SZ": np.full(self.count, 32),
            "lanemask_eq": 1 << lane,
            "lanemask_lt": (1 << lane) - 1,
            "lanemask_le": (2 << lane) - 1,
            "lanemask_gt": 2**32 - (2 << lane),
            "lanemask_ge": 2**32 - (1 << lane),
        }.get(name, np.zeros(self.count, np.int64))  # clocks stand still; a cluster is one block

    # Names in messages

    def block_name(self, block: int) -> str:
        x, y, _ = self.launch.grid
        return f"({block % x}, {block // x % y}, {block // (x * y)})"

    def thread_name(self, lane: int) -> str:
        return f"block {self.block_name(int(self.block[lane]))} thread {int(self.thread[lane])}"

    # What instructions use

    def active(self, mask) -> np.ndarray:
        return self.lanes if mask is True else np.flatnonzero(mask)

    def full_warps(self, mask) -> np.ndarray | None:
        """Numbers of the warps that execute an instruction which all lanes must; None for all
        warps.
        """
        if mask is True:
            return None
        by_warp = mask.reshape(-1, 32)
        some, every = by_warp.any(1), by_warp.all(1)
        if (some != every).any():
            warp = int(np.flatnonzero(some != every)[0])
            raise Fault(f"not all lanes of the warp of {self.thread_name(32 * warp)} are here")
        return np.flatnonzero(every)

    def spread(self, value) -> np.ndarray:
        """[lanes] of a value that may be one for all."""
        return value if np.ndim(value) else np.broadcast_to(value, (self.count,))

    def exit(self, mask) -> None:
        self.live[self.active(mask)] = False
        self._release()

    def wait(self, mask, barrier: int, expected) -> bool:
        """Lanes reach `bar.sync`.  True if they must stop there."""
        if mask is True and not expected:
            self._pass(np.ones(self.blocks, np.bool_))
            return False
        lanes = self.active(mask)
        self.blocked[lanes] = True
        self.barrier[lanes] = self.spread(barrier)[lanes]
        self.expected[lanes] = self.spread(expected)[lanes]
        self._release()
        return True

    def arrive(self, mask, barrier: int) -> None:
        """Lanes reach `bar.arrive` and go on."""
        lanes = self.active(mask)
        for number in np.unique(self.spread(barrier)[lanes]):
            here = self.slot[lanes[self.spread(barrier)[lanes] == number]]
            before = self.arrived.setdefault(int(number), np.zeros(self.blocks, np.int64))
            before += np.bincount(here, minlength=self.blocks)
        self._release()

    def _release(self) -> None:
        """Barriers at which everybody has arrived open."""
        if not self.blocked.any():
            return
        shape = (self.blocks, -1)
        blocked = (self.blocked & self.live).reshape(shape)
        live = self.live.reshape(shape).sum(1)
        for barrier in np.unique(self.barrier[self.blocked]):
            here = blocked & (self.barrier.reshape(shape) == barrier)
            expected = np.where(here, self.expected.reshape(shape), 0).max(1)
            others = self.arrived.get(int(barrier), np.zeros(self.blocks, np.int64))
            waiting = here.sum(1)
            opens = (waiting > 0) & (waiting + others >= np.where(expected > 0, expected, live))
            if opens.any():
                self.blocked.reshape(shape)[here & opens[:, None]] = False
                others[opens] = 0
                self._pass(opens)

    def _pass(self, blocks: np.ndarray) -> None:
        step = np.int32(64) * np.repeat(blocks, self.count // self.blocks)
        self.floor += step
        self.tag += step

    # Scheduling

    def run(self) -> None:
        while True:
            chosen = self._schedule()
            if chosen is None:
                return
            self._advance(*chosen)

    def _schedule(self):
        """(position, mask, where to stop because others stand there) of the lanes that go next;
        None at the end.
        """
        while True:
            ready = self.live & ~self.blocked & ~self.polling
            if ready.any():
                break
            if not self.live.any():
                return None
            self._unstick()
        launch = self.launch
        launch.turns += 1
        pcs = np.where(ready, self.pc, NOWHERE)
        lowest = np.minimum.reduceat(pcs.reshape(-1, 32).min(1), self.group_starts)
        candidates = np.unique(lowest)
        candidates = candidates[candidates != NOWHERE]
        pc = candidates[0]
        if len(candidates) > 1 and launch.turns % 32 == 0:
            # Else a warp that spins below would starve the others.
            pc = launch.random.choice(candidates)
        groups = lowest == pc
        if launch.shuffles:
            some = groups & (launch.random.random(len(groups)) < 0.5)
            groups = some if some.any() else groups
        mask = (pcs == pc) & np.repeat(groups[self.group], 32)
        above = pcs[(pcs > pc) & (pcs != NOWHERE)]
        stop = int(above.min()) if len(above) else -1
        return int(pc), True if mask.all() else mask, stop

    def _unstick(self) -> None:
        """Nobody is ready: let those who polled an mbarrier poll again."""
        if (self.polling & self.live).any() and self.polls < 10:
            self.polls += 1
            self.polling[:] = False
            return
        stuck = self.live & (self.blocked | self.polling)
        where = sorted({int(pc) - 1 for pc in self.pc[stuck]})
        steps = self.launch.program.steps
        places = "; ".join(
            f"line {steps[pc].instruction.line}: {steps[pc].instruction}" for pc in where[:4]
        )
        lane = int(np.flatnonzero(stuck)[0])
        others = int(stuck.sum()) - 1
        raise Fault(
            f"deadlock: {self.thread_name(lane)} and {others} more wait for ever ({places})"
        )

    def _advance(self, pc: int, mask, stop: int) -> None:
        """Straight on from `pc` until the lanes part, wait, or meet others."""
        steps, values, executed = self.launch.program.steps, self.values, self.launch.executed
        end, everyone = len(steps), mask is True
        lanes = self.count if everyone else np.count_nonzero(mask)
        warps = self.warps if everyone else int(np.count_nonzero(mask.reshape(-1, 32).any(1)))
        while True:
            if pc >= end:
                self.exit(mask)
                return
            execute, guard, negated, target, _ = steps[pc]
            self.at = pc
            executed[pc] += warps
            active, taken = mask, lanes
            if guard is not None:
                active = ~values[guard] if negated else values[guard]
                active = active.copy() if everyone else active & mask
                taken = np.count_nonzero(active)
                if taken == self.count:
                    active = True
            if target is not None:
                if taken and taken < lanes:
                    self.pc[self.active(mask)] = pc + 1
                    self.pc[self.active(active)] = target
                    return
                pc = target if taken else pc + 1
                self.branches += 1
                if self.branches > self.launch.max_branches:
                    raise Fault(f"more than {self.branches - 1} branches: the kernel does not end")
                if not everyone:
                    self.pc[mask] = pc
                    return
                continue
            pc += 1
            if taken and execute(self, active):
                self.pc[self.active(mask)] = pc
                return
            if pc == stop:
                self.pc[self.active(mask)] = pc
                return
