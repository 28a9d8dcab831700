"""Runs a kernel: all threads of a wave of blocks are lanes of numpy vectors.

An instruction acts on every lane that stands at it at once.  Lanes that diverge are run lowest
position first, so that they meet again where the paths join; within a warp always, so that `.sync`
instructions find their lanes.
"""

import struct
from collections import Counter

import numpy as np

from . import instructions as _registers_decoders  # noqa: F401
from .counting import Counts, Traffic
from .errors import Fault, Unsupported
from .memory import GlobalMemory, PrivateMemory, SharedMemory
from .program import BOOL, Program, Register, Special, decode
from .ptx import Kernel

LANES = 8192  # of a wave, about: fewer numpy calls, while the live registers stay in the cache
NOWHERE = np.int64(2**62)


class Wave:
    """Blocks that run together, their registers and their shared memory."""

    def __init__(self, launch: "Launch", blocks: np.ndarray):
        self.launch = launch
        program, threads = launch.program, launch.threads
        padded = -(-threads // 32) * 32
        self.blocks, self.count, self.warps = (
            len(blocks),
            len(blocks) * padded,
            len(blocks) * padded // 32,
        )
        self.warps_per_block = padded // 32
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
        self.at = 0  # the step being executed

        warp_in_block = (self.thread // 32).astype(np.int32)
        self.floor = np.full(self.count, 64, np.int32)  # 64 * (barriers of the block so far + 1)
        self.tag = self.floor + warp_in_block

        check = launch.check_races and program.block_barriers_only
        self.shared = SharedMemory(
            self.blocks, launch.shared_bytes, program.shared_unit, check,
            program.reads_asynchronously
        )  # fmt: skip
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
        lowest = pcs.reshape(-1, 32).min(1)
        candidates = np.unique(lowest)
        candidates = candidates[candidates != NOWHERE]
        pc = candidates[0]
        if len(candidates) > 1 and launch.turns % 32 == 0:
            pc = launch.random.choice(
                candidates
            )  # else a warp that spins below would starve the others
        warps = lowest == pc
        if launch.shuffles:
            some = warps & (launch.random.random(len(warps)) < 0.5)
            warps = some if some.any() else warps
        mask = (pcs == pc) & np.repeat(warps, 32)
        above = pcs[(pcs > pc) & (pcs != NOWHERE)]
        stop = int(above.min()) if len(above) else -1
        return int(pc), True if mask.all() else mask, stop

    def _unstick(self) -> None:
        """Nobody is ready: let those who polled an mbarrier poll again."""
        launch = self.launch
        if (self.polling & self.live).any() and launch.polls < 1000:
            launch.polls += 1
            self.polling[:] = False
            return
        stuck = self.live & (self.blocked | self.polling)
        where = sorted({int(pc) - 1 for pc in self.pc[stuck]})
        steps = launch.program.steps
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
                self.launch.branch()
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


class Launch:
    """One run of a kernel over a grid; see `run`."""

    def __init__(self, kernel, grid, block, shared, check_races, seed, max_branches):
        self.program = decode(kernel)
        self.grid = tuple(grid) + (1,) * (3 - len(grid))
        self.block = tuple(block) + (1,) * (3 - len(block))
        self.threads = int(np.prod(self.block))
        self.shared_bytes = kernel.static_shared + shared
        self.check_races = check_races
        self.shuffles = seed is not None
        self.random = np.random.default_rng(seed or 0)
        self.turns = self.polls = self.branches = 0
        self.max_branches = max_branches
        self.executed = [0] * len(self.program.steps)
        self.tensor_flops: Counter = Counter()
        blocks = int(np.prod(self.grid))
        across = check_races and blocks > 1 and not self.program.global_synchronisation
        self.memory = GlobalMemory(self.program.global_unit, across)
        self.parameters: PrivateMemory | None = None
        if not 0 < self.threads <= 1024:
            raise Fault(f"{self.threads} threads in a block; 1 to 1024 can be launched")
        if kernel.max_threads is not None and self.threads > kernel.max_threads:
            most = kernel.max_threads
            raise Fault(f"{self.threads} threads in a block; the kernel is compiled for {most}")

    def bind(self, arguments) -> None:
        """Packs the arguments, and makes the tensors among them accessible."""
        kernel = self.program.kernel
        packed = np.zeros(-(-kernel.parameter_bytes // 16) * 16, np.uint8)
        if len(arguments) != len(kernel.parameters):
            raise TypeError(
                f"{kernel.name} takes {len(kernel.parameters)} arguments, got {len(arguments)}"
            )
        for (name, parameter), argument in zip(kernel.parameters.items(), arguments, strict=True):
            if hasattr(argument, "data_ptr"):
                self.memory.add(name, *extent(argument))
                data = struct.pack("<Q", argument.data_ptr())
            elif isinstance(argument, bytes):
                data = argument
            elif isinstance(argument, float):
                data = struct.pack("<f" if parameter.size == 4 else "<d", argument)
            else:
                data = (int(argument) % 256**parameter.size).to_bytes(parameter.size, "little")
            if len(data) != parameter.size:
                raise TypeError(f"{name} has {parameter.size} bytes, the argument {len(data)}")
            packed[parameter.offset : parameter.offset + parameter.size] = np.frombuffer(
                data, np.uint8
            )
        self.parameters = PrivateMemory("parameter", packed, kernel.parameter_bytes, 0)
        for name, constant in kernel.constants.items():
            self.memory.add(name, constant.ctypes.data, constant.nbytes)

    def branch(self) -> None:
        self.branches += 1
        if self.branches > self.max_branches:
            raise Fault(f"more than {self.max_branches} branches: the kernel does not end")

    def run(self) -> None:
        blocks = np.arange(int(np.prod(self.grid)))
        per_wave = max(LANES // (-(-self.threads // 32) * 32), 1)
        if self.shuffles:
            self.random.shuffle(blocks)
            per_wave = int(self.random.integers(1, per_wave + 1))
        wave = None
        with np.errstate(all="ignore"):
            for start in range(0, len(blocks), per_wave):
                wave = Wave(self, blocks[start : start + per_wave])
                try:
                    wave.run()
                    for finish in wave.at_exit:
                        finish()
                except (Fault, Unsupported) as error:
                    raise type(error)(self._at(wave.at, str(error))) from None
                except Exception as error:
                    raise RuntimeError(self._at(wave.at, "the emulator failed here")) from error
        if wave is not None and self.memory.check_blocks:
            self.memory.check_reads(wave, self._fault_at)

    def _at(self, step: int, message: str) -> str:
        instruction = self.program.steps[step].instruction
        source = f" ({instruction.source})" if instruction.source else ""
        place = f"{self.program.kernel.name}, PTX line {instruction.line}{source}"
        return f"{message}\n  {place}: {instruction}"

    def _fault_at(self, step: int, message: str) -> None:
        raise Fault(self._at(step, message))

    def counts(self) -> Counts:
        names: Counter = Counter()
        for step, count in zip(self.program.steps, self.executed, strict=True):
            names[step.instruction.name] += count
        return Counts(
            traffic={
                b.name: Traffic(b.loads.result(), b.stores.result()) for b in self.memory.buffers
            },
            tensor_flops=dict(self.tensor_flops),
            instructions={name: count for name, count in names.most_common() if count},
            executed=self.executed,
        )


def extent(tensor) -> tuple[int, int]:
    """Address and bytes from a tensor's first element to its last.  Elements that its strides skip
    are included.
    """
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


def run(
    kernel: Kernel,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    arguments: list,
    *,
    shared: int = 0,
    buffers: dict | None = None,
    check_races: bool = True,
    seed: int | None = None,
    max_branches: int = 200_000,
) -> Counts:
    """Executes one launch and returns what it did.

    arguments: one per parameter of the kernel: a CPU tensor (or anything with its `data_ptr`,
    `shape`, `stride`,
        `element_size` and `numel`), an int, a float, or the parameter's bytes.
    shared: bytes of dynamic shared memory.
    buffers: tensors by name, for pointers that come as numbers, or to name what is among the
    arguments. check_races: look for races between the warps of a block and between blocks. seed:
    run blocks and warps in an order drawn from this seed, and not in lockstep.

    Raises Fault for what the kernel does wrong and Unsupported for instructions that are not known
    here.
    """
    launch = Launch(kernel, grid, block, shared, check_races, seed, max_branches)
    for name, tensor in (buffers or {}).items():
        launch.memory.add(name, *extent(tensor))
    launch.bind(arguments)
    launch.run()
    return launch.counts()
