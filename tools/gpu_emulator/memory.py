"""The memories of a launch.  Every access is checked, and nothing outside a known buffer is read or
written.

Data moves in units of the access size: a buffer is seen as an array of 1, 2, 4, 8 or 16-byte
elements and indexed once per access, whatever the type of the registers.  `lanes` are the ascending
numbers of the active lanes, and addresses, blocks and data have one entry for each.
"""

import ctypes
from bisect import bisect_right

import numpy as np

from .counting import FlowCounter
from .errors import Fault

# complex128 stands for any 16 bytes: numpy copies it whole and never looks inside.
UNITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


# A GPU computes one float32 NaN only; numpy, and what it passes on, has several.
_NANS = np.array([0x7FC00000, 0xFFC00000, 0x7FFFFFFF], np.uint32)


def differ(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Bitwise, per unit, except that computed NaN are all alike."""
    if a.itemsize < 4:
        return a != b
    a, b = (np.ascontiguousarray(x).view(np.uint32).reshape(len(x), -1) for x in (a, b))
    unequal = a != b
    if unequal.any():
        unequal &= ~(np.isin(a, _NANS) & np.isin(b, _NANS))
    return unequal.any(1)


def parts(index: np.ndarray, ratio: int) -> np.ndarray:
    """Indices of units as indices of the `ratio` smaller units that each consists of."""
    if ratio == 1:
        return index
    return (index[:, None] * ratio + np.arange(ratio)).reshape(-1)


class _Units:
    """Bytes seen in units of any access size."""

    def __init__(self, data: np.ndarray):
        self.data = data
        self._views = {1: data}

    def of(self, size: int) -> np.ndarray:
        if size not in self._views:
            whole = len(self.data) // size * size
            self._views[size] = self.data[:whole].view(UNITS[size])
        return self._views[size]


class Buffer:
    """Memory of this process that the kernel may touch."""

    def __init__(self, name: str, address: int, size: int):
        self.name, self.address, self.size = name, address, size
        self.base = address // 16 * 16  # units are counted from here, whatever the bounds
        room = -(-(address + size - self.base) // 16) * 16
        memory = (ctypes.c_uint8 * room).from_address(self.base)
        self.units = _Units(np.frombuffer(memory, np.uint8))
        self.loads = FlowCounter(address, size)
        self.stores = FlowCounter(address, size)
        self.writers: np.ndarray | None = None  # block + 1 that wrote each unit
        self.reads: list[tuple] = []  # to be compared with the writers at the end


class GlobalMemory:
    """Buffers at the addresses that they have in this process.

    `unit`: the smallest access of the kernel.  `check_blocks`: fault when one block uses what
    another one writes.
    """

    def __init__(self, unit: int, check_blocks: bool):
        self.buffers: list[Buffer] = []
        self._starts: list[int] = []
        self.unit, self.check_blocks = unit, check_blocks

    def add(self, name: str, address: int, size: int) -> None:
        """Overlapping buffers become one, under the first one's name."""
        if size == 0:
            return
        end = address + size
        overlapping = [b for b in self.buffers if b.address < end and address < b.address + b.size]
        if any(b.address <= address and end <= b.address + b.size for b in overlapping):
            return
        for other in overlapping:
            self.buffers.remove(other)
            name, address = other.name, min(address, other.address)
            end = max(end, other.address + other.size)
        self.buffers.append(Buffer(name, address, end - address))
        self.buffers.sort(key=lambda b: b.address)
        self._starts = [b.address for b in self.buffers]

    def read(self, wave, lanes, addresses, size) -> np.ndarray:
        found = self._locate(wave, lanes, addresses, size)
        values = np.empty(len(lanes), UNITS[size])
        for buffer, part in found:
            index = (addresses[part] - buffer.base) // size
            buffer.loads.add(wave.warp[lanes[part]], addresses[part], size, wave.warps_per_block)
            if self.check_blocks:
                buffer.reads.append(
                    (wave.at, wave.block[lanes[part]], index.astype(np.int32), size)
                )
            values[part] = buffer.units.of(size)[index]
        return values

    def write(self, wave, lanes, addresses, size, values) -> None:
        for buffer, part in self._locate(wave, lanes, addresses, size):
            index = (addresses[part] - buffer.base) // size
            buffer.stores.add(wave.warp[lanes[part]], addresses[part], size, wave.warps_per_block)
            units = buffer.units.of(size)
            if self.check_blocks:
                self._note_writers(wave, lanes[part], buffer, index, size, values[part])
            units[index] = values[part]
            lost = differ(units[index], values[part])
            if lost.any():
                at = int(np.flatnonzero(lost)[0])
                raise Fault(
                    f"{wave.thread_name(lanes[part][at])} and another thread store different "
                    f"values to byte {addresses[part][at] - buffer.address} of {buffer.name}"
                )

    def update(self, wave, lane: int, address: int, size: int) -> np.ndarray:
        """A view of one unit, for an atomic operation by one lane."""
        lanes, addresses = np.array([lane]), np.array([address])
        ((buffer, _),) = self._locate(wave, lanes, addresses, size)
        buffer.loads.add(wave.warp[lanes], addresses, size, wave.warps_per_block)
        buffer.stores.add(wave.warp[lanes], addresses, size, wave.warps_per_block)
        index = (address - buffer.base) // size
        return buffer.units.of(size)[index : index + 1]

    def peek(self, wave, lane: int, address: int, size: int) -> bytes:
        """Bytes that are fetched beside the traffic that is counted."""
        lanes, addresses = np.full(size, lane), address + np.arange(size)
        data = np.empty(size, np.uint8)
        for buffer, part in self._locate(wave, lanes, addresses, 1):
            data[part] = buffer.units.data[addresses[part] - buffer.base]
        return data.tobytes()

    def check(self, wave, lanes, addresses, size) -> None:
        """Faults as an access now would."""
        self._locate(wave, lanes, addresses, size)

    def _locate(self, wave, lanes, addresses, size):
        """[(buffer, selection of the lanes that use it)]"""
        if not len(lanes):
            return []
        if (addresses & (size - 1)).any():
            at = int(np.flatnonzero(addresses & (size - 1))[0])
            raise Fault(
                f"misaligned access of {size} bytes, {self._describe(addresses[at])}, "
                f"{wave.thread_name(lanes[at])}"
            )
        low, high = int(addresses.min()), int(addresses.max())
        buffer = self._buffer_of(low)
        if buffer is not None and high + size <= buffer.address + buffer.size:
            return [(buffer, slice(None))]
        owners = np.searchsorted(self._starts, addresses, "right") - 1
        found = []
        for owner in np.unique(owners):
            part = np.flatnonzero(owners == owner)
            buffer = self.buffers[owner] if owner >= 0 else None
            end = buffer.address + buffer.size if buffer else 0
            beyond = addresses[part] + size > end
            if beyond.any():
                at = part[int(np.flatnonzero(beyond)[0])]
                raise Fault(
                    f"access of {size} bytes outside every buffer, "
                    f"{self._describe(addresses[at])}, {wave.thread_name(lanes[at])}"
                )
            found.append((buffer, part))
        return found

    def _buffer_of(self, address: int) -> Buffer | None:
        at = bisect_right(self._starts, address) - 1
        return self.buffers[at] if at >= 0 else None

    def _describe(self, address) -> str:
        """An address relative to the nearest buffer."""
        address = int(address)
        if not self.buffers:
            return f"address {address:#x} (the launch has no buffers)"
        near = min(
            self.buffers,
            key=lambda b: max(b.address - address, address - (b.address + b.size - 1), 0),
        )
        return f"byte {address - near.address} of {near.name} ({near.size} bytes)"

    def _note_writers(self, wave, lanes, buffer, index, size, values):
        if buffer.writers is None:
            buffer.writers = np.zeros(len(buffer.units.data) // self.unit, np.int32)
        at, ratio = self._units(index, size)
        block = np.repeat(wave.block[lanes] + 1, ratio)
        before = buffer.writers[at]
        foreign = (before != 0) & (before != block)
        if foreign.any():
            clash = foreign.reshape(-1, ratio).any(1) & differ(buffer.units.of(size)[index], values)
            if clash.any():
                which = int(np.flatnonzero(clash)[0])
                other = int(before.reshape(-1, ratio)[which].max()) - 1
                raise Fault(
                    f"{wave.thread_name(lanes[which])} overwrites byte "
                    f"{index[which] * size + buffer.base - buffer.address} of {buffer.name}, which "
                    f"block {wave.block_name(other)} has written in this launch"
                )
        buffer.writers[at] = block

    def _units(self, index, size):
        """Indices of accesses of `size` bytes as indices of `self.unit` bytes, and how many of
        these each has.
        """
        if size < self.unit:  # the tail of a copy that is filled up with zeros
            return index * size // self.unit, 1
        return parts(index, size // self.unit), size // self.unit

    def check_reads(self, wave, fault_at) -> None:
        """At the end of a launch: nothing that one block wrote has been read by another, in
        whatever order.
        """
        for buffer in self.buffers:
            if buffer.writers is not None:
                for at, blocks, index, size in buffer.reads:
                    units, ratio = self._units(index, size)
                    writer = buffer.writers[units].reshape(-1, ratio)
                    foreign = (writer != 0) & (writer != (blocks + 1)[:, None])
                    if foreign.any():
                        which, part = (int(x[0]) for x in np.nonzero(foreign))
                        reader = wave.block_name(int(blocks[which]))
                        other = wave.block_name(int(writer[which, part]) - 1)
                        byte = int(index[which]) * size + buffer.base - buffer.address
                        fault_at(
                            at,
                            f"block {reader} reads byte {byte} of {buffer.name}, "
                            f"which block {other} writes in the same launch",
                        )
            buffer.reads.clear()


class SharedMemory:
    """Shared memory of the blocks of a wave, with a record of who has used it since the last
    barrier.

    For every unit (`unit` bytes, the smallest access of the kernel) two tags say who wrote and who
    read it last: the block's number of barriers so far times 64, plus the warp.  A tag below the
    block's present number times 64 lies before a barrier and harms nobody.  `check`: whether to
    keep that record at all.
    """

    SEVERAL = 63  # warps: whoever comes next is another one
    SAME = 62  # warps that wrote the same value, which compilers do for replicated data
    PENDING = np.int32(2**30)  # an asynchronous copy to here is under way

    def __init__(self, blocks: int, size: int, unit: int, check: bool, asynchronous_reads: bool):
        self.size, self.unit, self.check = size, unit, check
        self.stride = -(-size // 128) * 128
        self.units = _Units(np.full(blocks * self.stride, 0xFF, np.uint8))
        count = len(self.units.data) // unit
        if check:
            self.wrote, self.was_read = np.zeros(count, np.int32), np.zeros(count, np.int32)
        self.in_flight = np.zeros(count, np.int16) if check and asynchronous_reads else None

    def read(self, wave, lanes, addresses, size) -> np.ndarray:
        index = self.locate(wave, lanes, addresses, size)
        if self.check:
            self._note_read(wave, lanes, index, size)
        return self.units.of(size)[index]

    def write(self, wave, lanes, addresses, size, values) -> None:
        index = self.locate(wave, lanes, addresses, size)
        units = self.units.of(size)
        if not self.check:
            units[index] = values
            return
        ratio = size // self.unit
        at = parts(index, ratio)
        tag = np.repeat(wave.tag[lanes], ratio)
        floor = np.repeat(wave.floor[lanes], ratio)
        clash = self._clashes_with_write(at, tag, floor)
        changed = None
        if clash.any():
            # Another warp has written or read here.  Storing what is there already is no race.
            changed = np.repeat(differ(units[index], values), ratio)
            pending = self.wrote[at] >= self.PENDING
            self._fault(wave, lanes, at, clash & (changed | pending), "write", ratio)
        units[index] = values
        lost = differ(units[index], values)
        self._fault(wave, lanes, at, np.repeat(lost, ratio), "write", ratio)
        self.wrote[at] = tag
        several = self.wrote[at] != tag
        if changed is not None:
            several |= clash
        if several.any():
            self.wrote[at[several]] = floor[several] + self.SAME

    def start_copy(self, wave, lanes, addresses, size) -> None:
        """An asynchronous copy to here may land at any time from now on."""
        index = self.locate(wave, lanes, addresses, size)
        if self.check:
            ratio = size // self.unit
            at = parts(index, ratio)
            tag = np.repeat(wave.tag[lanes], ratio)
            clash = self._clashes_with_write(at, tag, np.repeat(wave.floor[lanes], ratio))
            self._fault(wave, lanes, at, clash, "copy", ratio)
            self.wrote[at] = self.PENDING

    def land_copy(self, wave, lanes, addresses, size, values) -> None:
        index = self.locate(wave, lanes, addresses, size)
        self.units.of(size)[index] = values
        if self.check:
            ratio = size // self.unit
            self.wrote[parts(index, ratio)] = np.repeat(wave.tag[lanes], ratio)

    def start_read(self, wave, lanes, addresses, size) -> np.ndarray:
        """One asynchronous operation by the warp groups of these lanes reads here from now on.
        Returns the indices of the units, for `finish_read`.
        """
        index = self.locate(wave, lanes, addresses, size)
        if self.check:
            ratio = size // self.unit
            at = parts(index, ratio)
            wrote = self.wrote[at]
            recent = wrote >= np.repeat(wave.floor[lanes], ratio)
            self._fault(wave, lanes, at, recent, "asynchronous read", ratio)
            self._fault(wave, lanes, at, wrote == 0, "uninitialised", ratio)
            self.in_flight[at] += 1
        return index

    def finish_read(self, wave, lanes, index, size) -> np.ndarray:
        if self.check:
            ratio = size // self.unit
            at = parts(index, ratio)
            self.in_flight[at] -= 1
            self.was_read[at] = np.repeat(wave.floor[lanes] + self.SEVERAL, ratio)
        return self.units.of(size)[index]

    def update(self, wave, lane: int, address: int, size: int) -> np.ndarray:
        """A view of one unit, for an atomic operation by one lane."""
        lanes = np.array([lane])
        index = self.locate(wave, lanes, np.array([address]), size)
        if self.check:
            # Atomic operations of several warps are no race between each other, only with plain
            # accesses.
            at = parts(index, size // self.unit)
            atomic = wave.floor[lane] + self.SEVERAL
            tag, floor = wave.tag[lane], wave.floor[lane]
            clash = (self.wrote[at] != atomic) & self._clashes_with_write(at, tag, floor)
            self._fault(wave, lanes, at, clash, "atomic operation", size // self.unit)
            # A plain store by this warp stays on record: to others it is one.
            self.wrote[at] = np.where(self.wrote[at] == tag, tag, atomic)
        return self.units.of(size)[int(index[0]) : int(index[0]) + 1]

    def locate(self, wave, lanes, addresses, size) -> np.ndarray:
        """Indices of units of `size` bytes; faults if an access is misaligned or out of bounds."""
        if not len(lanes):
            return np.zeros(0, np.int64)
        if (addresses & (size - 1)).any():
            at = int(np.flatnonzero(addresses & (size - 1))[0])
            raise Fault(
                f"misaligned access of {size} bytes at byte {addresses[at]} of shared memory, "
                f"{wave.thread_name(lanes[at])}"
            )
        if addresses.min() < 0 or addresses.max() + size > self.size:
            at = int(np.flatnonzero((addresses < 0) | (addresses + size > self.size))[0])
            raise Fault(
                f"access of {size} bytes at byte {addresses[at]} of shared memory "
                f"({self.size} bytes), {wave.thread_name(lanes[at])}"
            )
        return (addresses + wave.slot[lanes] * self.stride) // size

    def _clashes_with_write(self, at, tag, floor) -> np.ndarray:
        wrote, was_read = self.wrote[at], self.was_read[at]
        clash = ((wrote >= floor) & (wrote != tag)) | ((was_read >= floor) & (was_read != tag))
        if self.in_flight is not None:
            clash |= self.in_flight[at] > 0
        return clash

    def _note_read(self, wave, lanes, index, size):
        ratio = size // self.unit
        at = parts(index, ratio)
        tag = np.repeat(wave.tag[lanes], ratio)
        floor = np.repeat(wave.floor[lanes], ratio)
        wrote = self.wrote[at]
        recent = wrote >= floor
        if recent.any():
            clash = recent & (wrote != tag) & (wrote != floor + self.SAME)
            self._fault(wave, lanes, at, clash, "read", ratio)
        self._fault(wave, lanes, at, wrote == 0, "uninitialised", ratio)
        before = self.was_read[at]
        now = np.where((before >= floor) & (before != tag), floor + self.SEVERAL, tag)
        self.was_read[at] = now
        lost = self.was_read[at] != now
        if lost.any():
            self.was_read[at[lost]] = floor[lost] + self.SEVERAL

    def _fault(self, wave, lanes, at, bad, what, ratio):
        if not bad.any():
            return
        which = int(np.flatnonzero(bad)[0])
        unit = int(at[which])
        byte = unit * self.unit % self.stride
        who = wave.thread_name(lanes[which // ratio])
        if what == "uninitialised":
            raise Fault(f"{who} reads byte {byte} of shared memory, which nobody has written")
        if self.wrote[unit] >= self.PENDING:
            other = "an asynchronous copy to it has not been waited for"
        elif self.in_flight is not None and self.in_flight[unit]:
            other = "an asynchronous operation that reads it has not been waited for"
        else:
            other = "another warp has used it since the last barrier"
        raise Fault(f"race on byte {byte} of shared memory: {what} by {who}, and {other}")


class PrivateMemory:
    """Local memory of each thread, or the parameters, which all threads share (`stride` 0)."""

    def __init__(self, name: str, data: np.ndarray, size: int, stride: int):
        self.name, self.size, self.stride = name, size, stride
        self.units = _Units(data)

    def read(self, wave, lanes, addresses, size) -> np.ndarray:
        return self.units.of(size)[self._locate(wave, lanes, addresses, size)]

    def write(self, wave, lanes, addresses, size, values) -> None:
        self.units.of(size)[self._locate(wave, lanes, addresses, size)] = values

    def _locate(self, wave, lanes, addresses, size):
        bad = (addresses & (size - 1) != 0) | (addresses < 0) | (addresses + size > self.size)
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            raise Fault(
                f"access of {size} bytes at byte {addresses[at]} of {self.name} memory "
                f"({self.size} bytes), {wave.thread_name(lanes[at])}"
            )
        return (addresses + lanes * self.stride) // size
