"""Runs kernels: `run` and what belongs to one launch."""

import struct
from collections import Counter

import numpy as np

from . import instructions as _registers_decoders  # noqa: F401
from .counting import Counts, Traffic
from .errors import Fault, Unsupported
from .memory import GlobalMemory, PrivateMemory
from .program import decode
from .ptx import Kernel
from .wave import Wave

LANES = 8192  # of a wave, about: fewer numpy calls, while the live registers stay in the cache


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
        self.turns = 0
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

    arguments: one per parameter of the kernel: a CPU tensor (or what has its `data_ptr`, `shape`,
        `stride`, `element_size` and `numel`), an int, a float, or the parameter's bytes.
    shared: bytes of dynamic shared memory.
    buffers: tensors by name, for pointers that come as numbers, or to name those among the
        arguments.
    check_races: look for races between the warps of a block and between blocks, and for shared
        memory that is read before it is written.
    seed: run blocks and warps in an order drawn from this seed, and not in lockstep.
    max_branches: of the blocks that run together; more mean that the kernel does not end.

    Raises Fault for what the kernel does wrong, Unsupported for instructions that are not known
    here, and TypeError for arguments that do not fit the kernel.
    """
    launch = Launch(kernel, grid, block, shared, check_races, seed, max_branches)
    for name, tensor in (buffers or {}).items():
        launch.memory.add(name, *extent(tensor))
    launch.bind(arguments)
    launch.run()
    return launch.counts()
