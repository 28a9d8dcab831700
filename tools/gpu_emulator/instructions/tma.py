"""Bulk copies between global and shared memory by one thread, plain or through a tensor map (TMA).

A tensor map is 128 bytes that say which box of a tensor is copied and how it lies in shared memory.
Their real layout is not published; the one here is the emulator's own, written by `tensor_map` on
the host and by `tensormap.replace` in the kernel.

Loads land when their mbarrier is asked for, stores when their group is waited for: as late as they
may.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from ..errors import Fault, Unsupported
from ..program import PARAM_WINDOW, S32, U32, U64, Decoder, decodes
from .load_store import active_addresses, resolve
from .mbarrier import barrier_at

MAP_BYTES = 128
# Offsets of fields: (offset, bytes of each, how many).
_FIELDS = {
    "global_address": (0, 8, 1),
    "rank": (8, 4, 1),  # minus one
    "box_dim": (12, 4, 5),
    "global_dim": (32, 4, 5),
    "element_stride": (52, 4, 5),
    "global_stride": (72, 8, 4),  # bytes, of all dimensions but the first
    "elemtype": (104, 4, 1),
    "interleave_layout": (108, 4, 1),
    "swizzle_mode": (112, 4, 1),
    "fill_mode": (116, 4, 1),
}
_ELEMENT_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 4, 9: 8, 10: 2, 11: 4, 12: 4}
_SWIZZLE_BYTES = {0: 0, 1: 32, 2: 64, 3: 128}


@dataclass(frozen=True)
class TensorMap:
    """Dimensions go from the fastest one on, as in CUDA."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes; of the first dimension, an element's size
    box: tuple[int, ...]
    swizzle: int  # 0, 32, 64 or 128 bytes

    @property
    def box_bytes(self) -> int:
        return math.prod(self.box) * self.strides[0]

    @classmethod
    def decode(cls, data: bytes) -> "TensorMap":
        def get(name, index=0):
            at, size, _ = _FIELDS[name]
            return int.from_bytes(data[at + index * size : at + (index + 1) * size], "little")

        rank = get("rank") + 1
        if not 1 <= rank <= 5 or get("elemtype") not in _ELEMENT_BYTES:
            raise Fault("this is no tensor map")
        if get("interleave_layout") or get("fill_mode"):
            raise Unsupported("tensor map with interleaving or NaN fill")
        if any(get("element_stride", i) != 1 for i in range(rank)):
            raise Unsupported("tensor map with element strides")
        size = _ELEMENT_BYTES[get("elemtype")]
        found = cls(
            address=get("global_address"),
            shape=tuple(get("global_dim", i) for i in range(rank)),
            strides=(size, *(get("global_stride", i) for i in range(rank - 1))),
            box=tuple(get("box_dim", i) for i in range(rank)),
            swizzle=_SWIZZLE_BYTES[get("swizzle_mode")],
        )
        if found.address % 16 or any(s % 16 for s in found.strides[1:]):
            raise Fault("a tensor map's address or stride is not a multiple of 16 bytes")
        row = found.box[0] * size
        if row % 16 or (found.swizzle and row > found.swizzle):
            raise Fault(f"a tensor map's box has rows of {row} bytes, swizzle {found.swizzle}")
        if any(not 1 <= b <= 256 for b in found.box):
            raise Fault(f"a tensor map's box is {found.box}")
        return found


def tensor_map(tensor, box: tuple[int, ...], swizzle: int = 0) -> bytes:
    """What the host would pass for a tensor whose last dimension is contiguous.  `box` has its
    dimensions' order.
    """
    data = bytearray(MAP_BYTES)

    def put(name, value, index=0):
        at, size, _ = _FIELDS[name]
        data[at + index * size : at + (index + 1) * size] = int(value).to_bytes(size, "little")

    size = tensor.element_size()
    put("global_address", tensor.data_ptr())
    put("rank", len(box) - 1)
    put("elemtype", {1: 0, 2: 1, 4: 2, 8: 4}[size])
    put("swizzle_mode", {v: k for k, v in _SWIZZLE_BYTES.items()}[swizzle])
    for i in range(len(box)):
        put("box_dim", box[-1 - i], i)
        put("global_dim", tensor.shape[-1 - i], i)
        put("element_stride", 1, i)
        if i:
            put("global_stride", tensor.stride(-1 - i) * size, i - 1)
    return bytes(data)


def _mixed(offsets: np.ndarray, swizzle: int) -> np.ndarray:
    """Offsets in shared memory with the 16-byte chunks of each row permuted."""
    return offsets ^ ((offsets >> 7 & {0: 0, 32: 1, 64: 3, 128: 7}[swizzle]) << 4)


class _Box:
    """One copy of a box: which global addresses belong to which bytes of it."""

    def __init__(self, map_: TensorMap, corner: tuple[int, ...]):
        self.map = map_
        size, inner = map_.strides[0], map_.box[0]
        first, last = max(corner[0], 0), min(corner[0] + inner, map_.shape[0])
        number = np.arange(math.prod(map_.box[1:]))  # of the box's rows
        at = np.empty((len(map_.box) - 1, len(number)), np.int64)
        for i, (first_row, rows) in enumerate(zip(corner[1:], map_.box[1:], strict=True)):
            at[i] = first_row + number % rows
            number = number // rows
        inside = ((at >= 0) & (at < np.array(map_.shape[1:]).reshape(-1, 1))).all(0)
        count = max(last - first, 0) * size
        # The largest unit in which every row can be copied.
        self.unit = math.gcd(16, first * size, (first - corner[0]) * size, count)
        steps = np.arange(count // self.unit) * self.unit
        starts = map_.address + (at * np.array(map_.strides[1:], np.int64).reshape(-1, 1)).sum(0)
        row_bytes = inner * size
        which = np.flatnonzero(inside)
        self.addresses = (starts[which][:, None] + first * size + steps).reshape(-1)
        inner_offset = (first - corner[0]) * size
        self.offsets = (which[:, None] * row_bytes + inner_offset + steps).reshape(-1)

    def load(self, wave, lane: int, target: int) -> int:
        data = np.zeros(self.map.box_bytes, np.uint8)
        lanes = np.full(len(self.addresses), lane)
        values = wave.memory.read(wave, lanes, self.addresses, self.unit)
        data.view(values.dtype)[self.offsets // self.unit] = values
        chunks = target + np.arange(0, len(data), 16)
        lanes = np.full(len(chunks), lane)
        where = _mixed(chunks, self.map.swizzle)
        wave.shared.write(wave, lanes, where, 16, data.view(np.complex128))
        return len(data)

    def store(self, wave, lane: int, data: np.ndarray) -> None:
        values = data.view(np.uint8).view(f"u{self.unit}" if self.unit < 16 else np.complex128)
        lanes = np.full(len(self.addresses), lane)
        taken = values[self.offsets // self.unit]
        wave.memory.write(wave, lanes, self.addresses, self.unit, taken)


@dataclass
class _Store:
    lane: int
    group: int
    finish: object


@dataclass
class _Stores:
    pending: list[_Store] = field(default_factory=list)
    committed: dict[int, int] = field(default_factory=dict)  # by lane

    def wait(self, lanes, allowed: int) -> None:
        lanes, kept = set(lanes.tolist()), []
        for store in self.pending:
            done = self.committed.get(store.lane, 0) - allowed
            if store.lane in lanes and store.group < done:
                store.finish()
            else:
                kept.append(store)
        self.pending = kept

    def finish(self) -> None:
        for store in self.pending:
            store.finish()


def _stores(wave) -> _Stores:
    if "bulk" not in wave.state:
        wave.state["bulk"] = _Stores()
        wave.at_exit.append(wave.state["bulk"].finish)
    return wave.state["bulk"]


def decode_bulk(d: Decoder):
    """`cp.async.bulk...`"""
    if d.take("commit_group"):
        return _commit
    if d.take("wait_group"):
        d.take("read")
        allowed = int(d.operands[0])
        return lambda wave, mask: _stores(wave).wait(wave.active(mask), allowed)
    tensor = d.take("tensor") is not None
    rank = int(d.take_match(r"([1-5])d")[1]) if tensor else 0
    d.take("tile")
    d.take_all("L2::cache_hint")
    loads = d.take("mbarrier::complete_tx::bytes") is not None
    stores = d.take("bulk_group") is not None
    d.take_all("shared::cta", "shared::cluster", "global")
    if loads == stores:
        raise Unsupported(d.instruction.name)
    d.shared_sizes.add(16)
    d.global_sizes.add(1)
    d.reads_asynchronously = True
    if loads:
        return _tensor_load(d, rank) if tensor else _plain_load(d)
    return _tensor_store(d, rank) if tensor else _plain_store(d)


def _commit(wave, mask):
    stores = _stores(wave)
    for lane in wave.active(mask).tolist():
        stores.committed[lane] = stores.committed.get(lane, 0) + 1


def _shared_addresses(d: Decoder, operand: str):
    address = d.address(operand)

    def find(wave, mask):
        lanes, addresses = active_addresses(wave, mask, address)
        memory, addresses = (
            (wave.shared, addresses)
            if not (addresses >> 48).any()
            else resolve(wave, None, lanes, addresses)
        )
        if memory is not wave.shared:
            raise Fault("a bulk copy wants an address in shared memory")
        return addresses

    return find


def _map_and_corner(d: Decoder, operand: str, rank: int):
    """Of "[%rd1, {%r1, %r2}]": a function that gives each active lane's tensor map and
    coordinates.
    """
    pointer, corner = operand.strip("[] ").split(",", 1)
    address = d.address(pointer.strip())
    coordinates = [d.read(c, S32) for c in d.elements(corner.strip())]
    if len(coordinates) != rank:
        raise Unsupported(f"{len(coordinates)} coordinates of {rank}")

    def find(wave, mask):
        lanes, addresses = active_addresses(wave, mask, address)
        corners = np.stack([wave.spread(wave.values[c])[lanes] for c in coordinates], 1)
        for lane, at, where in zip(
            lanes.tolist(), addresses.tolist(), corners.tolist(), strict=True
        ):
            yield lane, TensorMap.decode(_map_bytes(wave, lane, at)), tuple(where)

    return find


def _map_bytes(wave, lane: int, address: int) -> bytes:
    """From the parameters (`address` may be an offset there) or from global memory."""
    if address >> 48 << 48 == PARAM_WINDOW or address < wave.parameters.size:
        lanes = np.full(MAP_BYTES, lane)
        offset = address % 2**48 + np.arange(MAP_BYTES)
        return wave.parameters.read(wave, lanes, offset, 1).tobytes()
    return wave.memory.peek(wave, lane, address, MAP_BYTES)


def _check_target(wave, lane: int, map_: TensorMap, address: int) -> None:
    alignment = {0: 128, 32: 256, 64: 512, 128: 1024}[map_.swizzle]
    if address % alignment:
        raise Fault(
            f"byte {address} of shared memory is not aligned to {alignment}, as a box with a "
            f"swizzle of {map_.swizzle} must be, {wave.thread_name(lane)}"
        )


def _tensor_load(d: Decoder, rank: int):
    targets, barriers = (_shared_addresses(d, d.operands[i]) for i in (0, 2))
    sources = _map_and_corner(d, d.operands[1], rank)

    def execute(wave, mask):
        found = zip(sources(wave, mask), targets(wave, mask), barriers(wave, mask), strict=True)
        for (lane, map_, corner), target, barrier in found:
            _check_target(wave, lane, map_, int(target))
            box = _Box(map_, corner)
            copy = _landing(box.load, wave, lane, int(target))
            barrier_at(wave, lane, int(barrier)).copies.append(copy)

    return execute


def _landing(load, wave, lane, target):
    return lambda: load(wave, lane, target)


def _tensor_store(d: Decoder, rank: int):
    targets = _map_and_corner(d, d.operands[0], rank)
    sources = _shared_addresses(d, d.operands[1])

    def execute(wave, mask):
        for (lane, map_, corner), source in zip(
            targets(wave, mask), sources(wave, mask), strict=True
        ):
            _check_target(wave, lane, map_, int(source))
            box = _Box(map_, corner)
            chunks = _mixed(int(source) + np.arange(0, map_.box_bytes, 16), map_.swizzle)
            _start_store(wave, lane, chunks, box.store)

    return execute


def _start_store(wave, lane: int, chunks: np.ndarray, store) -> None:
    stores = _stores(wave)
    lanes = np.full(len(chunks), lane)
    units = wave.shared.start_read(wave, lanes, chunks, 16)

    def finish():
        store(wave, lane, wave.shared.finish_read(wave, lanes, units, 16))

    stores.pending.append(_Store(lane, stores.committed.get(lane, 0), finish))


def _plain_load(d: Decoder):
    """`[shared], [global], bytes, [mbarrier]`"""
    targets, barriers = (_shared_addresses(d, d.operands[i]) for i in (0, 3))
    source, size = d.address(d.operands[1]), d.read(d.operands[2], U32)

    def execute(wave, mask):
        lanes, sources = active_addresses(wave, mask, source)
        sizes = wave.spread(wave.values[size])[lanes]
        found = zip(
            lanes.tolist(), sources, targets(wave, mask), sizes, barriers(wave, mask), strict=True
        )
        for lane, at, target, count, barrier in found:
            steps = _whole_chunks(int(count))
            copy = _landing(_copy_in, wave, lane, (at + steps, target + steps))
            barrier_at(wave, lane, int(barrier)).copies.append(copy)

    return execute


def _copy_in(wave, lane: int, addresses) -> int:
    sources, targets = addresses
    lanes = np.full(len(sources), lane)
    wave.shared.write(wave, lanes, targets, 16, wave.memory.read(wave, lanes, sources, 16))
    return 16 * len(sources)


def _plain_store(d: Decoder):
    """`[global], [shared], bytes`"""
    target, size = d.address(d.operands[0]), d.read(d.operands[2], U32)
    sources = _shared_addresses(d, d.operands[1])

    def execute(wave, mask):
        lanes, targets = active_addresses(wave, mask, target)
        sizes = wave.spread(wave.values[size])[lanes]
        for lane, at, source, count in zip(
            lanes.tolist(), targets, sources(wave, mask), sizes, strict=True
        ):
            steps = _whole_chunks(int(count))

            def store(wave, lane, data, where=at + steps):
                wave.memory.write(wave, np.full(len(where), lane), where, 16, data)

            _start_store(wave, lane, int(source) + steps, store)

    return execute


def _whole_chunks(count: int) -> np.ndarray:
    if count % 16:
        raise Fault(f"a bulk copy of {count} bytes; it must be a multiple of 16")
    return np.arange(0, count, 16)


@decodes("tensormap")
def _(d: Decoder):
    if d.take("cp_fenceproxy"):
        return _publish(d)
    if d.take("replace") is None or d.take("tile") is None or d.take("b1024") is None:
        raise Unsupported(d.instruction.name)
    at, size, count = _FIELDS[d.take(*_FIELDS)]
    if len(d.operands) != (3 if count > 1 else 2):
        raise Unsupported(d.instruction.name)
    if d.take("global"):
        raise Unsupported("tensormap.replace in global memory")
    d.take_all("shared", "shared::cta")
    d.shared_sizes.add(4)
    index = int(d.operands[1], 0) if count > 1 else 0
    find = _shared_addresses(d, d.operands[0])
    value = d.read(d.operands[-1], U32 if size == 4 else U64)

    def execute(wave, mask):
        lanes = wave.active(mask)
        values = wave.spread(wave.values[value])[lanes]
        wave.shared.write(wave, lanes, find(wave, mask) + at + index * size, size, values)

    return execute


def _publish(d: Decoder):
    """Copies a map from shared to global memory."""
    d.take_all("global", "shared::cta", "tensormap::generic", "release", "gpu", "sync", "aligned")
    target, source = d.address(d.operands[0]), _shared_addresses(d, d.operands[1])
    d.shared_sizes.add(4)
    d.global_sizes.add(4)

    def execute(wave, mask):
        lanes, targets = active_addresses(wave, mask, target)
        first = np.unique(wave.warp[lanes], return_index=True)[1]  # the warp copies once
        steps = np.arange(0, MAP_BYTES, 4)
        lanes = np.repeat(lanes[first], len(steps))
        taken = (source(wave, mask)[first][:, None] + steps).reshape(-1)
        data = wave.shared.read(wave, lanes, taken, 4)
        where = (targets[first][:, None] + steps).reshape(-1)
        wave.memory.write(wave, lanes, where, 4, data)

    return execute
