"""A kernel decoded for execution: one Python closure per instruction.

A closure is called as `execute(wave, mask)` and acts on all lanes of the wave at once; `mask` is
True for all of them or a boolean array.  It finds its operands in `wave.values`, a list with one
entry per *slot*: the row of a register file seen as some dtype, or a numpy scalar for what is
constant.  Slots are assigned here, once per kernel, so that nothing is looked up by name while a
kernel runs.

A family of instructions registers its decoders with `@decodes("add", "sub")`.  A decoder takes the
modifiers that it understands; those that are left over make the instruction unsupported, which is
raised when it is reached.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .errors import Unsupported
from .ptx import DTYPES, Instruction, Kernel, garbage_kept, split_operands

Execute = Callable[..., "bool | None"]  # True: let the scheduler choose who goes on

FLOAT8 = ("e4m3", "e5m2", "e4m3x2", "e5m2x2")
BOOL, U8, U16, U32, S32, U64, S64, F32 = (
    np.dtype(t) for t in (bool, np.uint8, np.uint16, np.uint32, np.int32, np.uint64, np.int64, "f4")
)
UNSIGNED = {1: U8, 2: U16, 4: U32, 8: U64}
_SIGNED = {1: np.dtype(np.int8), 2: np.dtype(np.int16), 4: S32, 8: S64}

SPECIALS = {
    *(f"{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
    "laneid", "warpid", "nwarpid", "WARP_SZ", "cluster_ctarank", "clock", "clock64", "globaltimer",
    "lanemask_eq", "lanemask_lt", "lanemask_le", "lanemask_gt", "lanemask_ge",
}  # fmt: skip

# Generic addresses of spaces other than global; no tensor lies up here.
SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW = 0x7FFF << 48, 0x7FFE << 48, 0x7FFD << 48

_DECODERS: dict[str, Callable[["Decoder"], Execute]] = {}


def decodes(*opcodes: str):
    def register(decoder):
        for opcode in opcodes:
            if opcode in _DECODERS:
                raise ValueError(f"two decoders for {opcode}")
            _DECODERS[opcode] = decoder
        return decoder

    return register


class Step(NamedTuple):
    execute: Execute
    guard: int | None  # slot of the predicate
    negated: bool
    target: int | None  # index of the step a branch leads to
    instruction: Instruction


class Register(NamedTuple):
    """A row of a register file, which holds all registers of one size, seen as `dtype`."""

    file: np.dtype  # bool or unsigned
    row: int
    dtype: np.dtype


class Special(NamedTuple):
    name: str
    dtype: np.dtype


class Address(NamedTuple):
    slot: int
    offset: int

    def of(self, wave) -> np.ndarray:
        """int64 byte addresses [lanes] (or one for all); of 32 bits they wrap around."""
        base = wave.values[self.slot]
        address = base.astype(np.int64)
        if self.offset:
            address += self.offset
        return address & 0xFFFFFFFF if base.dtype.itemsize == 4 else address


@dataclass
class Program:
    kernel: Kernel
    steps: list[Step]
    slots: list  # Register, Special, or a numpy scalar
    files: dict[np.dtype, int]  # registers of each size
    shared_unit: int  # bytes of the smallest access to shared memory
    global_unit: int  # and to global memory
    block_barriers_only: bool  # threads of a block synchronise by `bar.sync 0` and in no other way
    global_synchronisation: bool  # blocks may wait for each other: atomics, acquire, release
    warp_groups: bool  # four warps at a time multiply matrices
    reads_asynchronously: bool  # wgmma or TMA read shared memory behind the threads' backs


@functools.cache
def _parts(name: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Opcode, types and modifiers of "mad.wide.s32"."""
    opcode, *parts = name.split(".")
    types = [p for p in parts if p in DTYPES or p in FLOAT8]
    return opcode, tuple(types), tuple(p for p in parts if p not in types)


class Decoder:
    """What a decoder sees of one instruction, and how it gets at the operands."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.slots: list = []
        self._known: dict = {}
        self.files: Counter = Counter()
        self._places: dict[str, tuple[np.dtype, int]] = {}
        for name, dtype in kernel.registers.items():
            file = dtype if dtype == BOOL else UNSIGNED[dtype.itemsize]
            self._places[name] = file, self.files[file]
            self.files[file] += 1
        # What is found out about the kernel on the way; see Program.
        self.shared_sizes: set[int] = set()
        self.global_sizes: set[int] = set()
        self.block_barriers_only = True
        self.global_synchronisation = False
        self.warp_groups = False
        self.reads_asynchronously = False

    def step(self, instruction: Instruction) -> Step:
        self.instruction = instruction
        self.operands = instruction.operands
        self.opcode, self.types, modifiers = _parts(instruction.name)
        self.modifiers = list(modifiers)
        try:
            if self.opcode not in _DECODERS:
                raise Unsupported(f"{self.opcode} is not known")
            execute = _DECODERS[self.opcode](self)
            if self.modifiers:
                raise Unsupported(f"modifier {', '.join(self.modifiers)}")
        except Unsupported as error:
            execute = _raise_when_reached(str(error))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            # The decoder has met operands or modifiers of another form than it knows.
            execute = _raise_when_reached(f"{type(error).__name__}: {error}")
        guard = None if instruction.guard is None else self.read(instruction.guard, BOOL)
        return Step(execute, guard, instruction.negated, instruction.target, instruction)

    # Modifiers

    def take(self, *names: str) -> str | None:
        """The first of these modifiers that the instruction has; it then counts as understood."""
        for name in names:
            if name in self.modifiers:
                self.modifiers.remove(name)
                return name
        return None

    def take_all(self, *names: str) -> None:
        while self.take(*names):
            pass

    def take_match(self, pattern: str) -> re.Match | None:
        for name in self.modifiers:
            match = re.fullmatch(pattern, name)
            if match:
                self.modifiers.remove(name)
                return match
        return None

    @property
    def type(self) -> str:
        """The one type of an instruction that has only one."""
        if len(self.types) != 1:
            raise Unsupported("types " + ".".join(self.types))
        return self.types[0]

    # Operands

    def read(self, operand: str, dtype: np.dtype) -> int:
        """The slot that holds an operand as this dtype: a register (its low part if it is wider),
        special register, number or address of a variable.
        """
        return self._slot("read", operand, dtype)

    def write(self, operand: str, dtype: np.dtype) -> int:
        """The slot to store a value of this dtype to.  A wider register is extended by the value's
        sign.
        """
        return self._slot("write", operand, dtype)

    def pair(self, operand: str) -> tuple[str, str | None]:
        first, _, second = operand.partition("|")
        return first.strip(), second.strip() or None

    def elements(self, operand: str) -> list[str]:
        """ "{%r1, %r2}" to its registers; a single operand is a vector of one."""
        return split_operands(operand[1:-1]) if operand[0] == "{" else [operand]

    def address(self, operand: str) -> Address:
        """Of "[%rd1+16]"."""
        base, sign, offset = re.fullmatch(
            r"\[?\s*([\w$%.@]+)\s*(?:([+-])\s*(-?\w+))?\s*\]?", operand
        ).groups()
        slot = self.read(base, self.kernel.registers.get(base, U64))
        return Address(slot, int(offset or "0", 0) * (-1 if sign == "-" else 1))

    def _slot(self, use: str, operand: str, dtype: np.dtype) -> int:
        key = (use, operand, dtype.num)
        slot = self._known.get(key)
        if slot is None:
            self.slots.append(self._resolve(use, operand, dtype))
            slot = self._known[key] = len(self.slots) - 1
        return slot

    def _resolve(self, use: str, operand: str, dtype: np.dtype):
        kernel = self.kernel
        if operand in kernel.registers:
            size = kernel.registers[operand].itemsize
            if kernel.registers[operand] != BOOL and dtype.itemsize < size and use == "write":
                if dtype.kind == "f":
                    raise Unsupported(f"{dtype} to a register of {size} bytes")
                dtype = (_SIGNED if dtype.kind == "i" else UNSIGNED)[size]
            elif dtype.itemsize > size:
                raise Unsupported(f"{operand} has {size} bytes, not {dtype.itemsize}")
            return Register(*self._places[operand], dtype)
        if use == "write":
            if operand == "_":  # a result that nobody wants
                file = dtype if dtype == BOOL else UNSIGNED[dtype.itemsize]
                self.files[file] += 1
                return Register(file, self.files[file] - 1, dtype)
            raise Unsupported(f"destination {operand}")
        if operand.removeprefix("%") in SPECIALS:
            return Special(operand.removeprefix("%"), dtype)
        return _constant(kernel, operand, dtype)


def _constant(kernel: Kernel, operand: str, dtype: np.dtype):
    match = re.fullmatch(r"0([fFdD])([\da-fA-F]+)", operand)
    if match:
        bits = int(match[2], 16)
        value = np.uint32(bits).view(F32) if match[1] in "fF" else np.uint64(bits).view(np.float64)
        return value.astype(dtype) if dtype.kind == "f" else np.uint64(bits).astype(dtype)
    if re.fullmatch(r"-?(0[xX][\da-fA-F]+|\d+)U?", operand):
        number = int(operand.rstrip("U"), 0)
        if dtype == BOOL:
            return np.bool_(number)
        bits = number % 256**dtype.itemsize
        return np.array(bits, UNSIGNED[dtype.itemsize]).view(dtype)[()]
    for variables in (kernel.shared, kernel.local):
        if operand in variables:
            return dtype.type(variables[operand])
    if operand in kernel.constants:
        return dtype.type(kernel.constants[operand].ctypes.data)
    if operand in kernel.parameters:
        return dtype.type(kernel.parameters[operand].offset)
    raise Unsupported(f"operand {operand}")


def _raise_when_reached(reason: str) -> Execute:
    def execute(wave, mask):
        raise Unsupported(reason)

    return execute


@functools.lru_cache(maxsize=256)
@garbage_kept()
def decode(kernel: Kernel) -> Program:
    """Decoded once per kernel."""
    decoder = Decoder(kernel)
    steps = [decoder.step(i) for i in kernel.instructions]
    return Program(
        kernel=kernel,
        steps=steps,
        slots=decoder.slots,
        files=decoder.files,
        shared_unit=min(decoder.shared_sizes, default=16),
        global_unit=min(decoder.global_sizes, default=16),
        block_barriers_only=decoder.block_barriers_only,
        global_synchronisation=decoder.global_synchronisation,
        warp_groups=decoder.warp_groups,
        reads_asynchronously=decoder.reads_asynchronously,
    )
