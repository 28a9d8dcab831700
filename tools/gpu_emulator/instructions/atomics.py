"""atom and red: one lane after another, in the order of the lanes."""

import numpy as np

from ..errors import Unsupported
from ..numbers import narrow16, pack16, unpack16, widen16
from ..program import DTYPES, Decoder, decodes
from .load_store import active_addresses, note_size, resolve, take_hints, take_space

_OPERATIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, x: x,
    "inc": lambda old, x: np.where(old >= x, old.dtype.type(0), old + old.dtype.type(1)),
    "dec": lambda old, x: np.where((old == 0) | (old > x), x, old - old.dtype.type(1)),
}


def _function(kind: str, name: str):
    if name == "cas":
        return lambda old, expected, x: np.where(old == expected, x, old)
    half = kind.removesuffix("x2")
    plain = _OPERATIONS[name]
    if half not in ("bf16", "f16") or name == "exch":
        if kind in ("f32", "f64") and name in ("min", "max"):
            raise Unsupported(f"{name} of {kind}")
        return plain
    if name != "add":
        raise Unsupported(f"{name} of {kind}")

    def add16(a, b):
        return narrow16(widen16(a, half) + widen16(b, half), half)

    if kind == half:
        return lambda a, b: add16(a.view(np.uint16), b.view(np.uint16)).view(a.dtype)
    return lambda a, b: pack16(
        *(add16(x, y) for x, y in zip(unpack16(a), unpack16(b), strict=True))
    )


@decodes("atom", "red")
def _(d: Decoder):
    take_hints(d)
    d.take("noftz")
    space = take_space(d)
    name = d.take(*_OPERATIONS, "cas")
    kind = d.type
    dtype = DTYPES[kind]
    function = _function(kind, name)
    note_size(d, space, dtype.itemsize)
    if space != "shared":
        d.global_synchronisation = True
    operands = d.operands
    out = None
    if d.opcode == "atom":
        out = d.write(operands[0], dtype)
        operands = operands[1:]
    address = d.address(operands[0])
    sources = [d.read(o, dtype) for o in operands[1:]]

    def execute(wave, mask):
        lanes, addresses = active_addresses(wave, mask, address)
        if not len(lanes):
            return
        memory, addresses = resolve(wave, space, lanes, addresses)
        inputs = [wave.spread(wave.values[s])[lanes] for s in sources]
        before = np.empty(len(lanes), dtype)
        for i, lane in enumerate(lanes):
            cell = memory.update(wave, int(lane), int(addresses[i]), dtype.itemsize).view(dtype)
            before[i] = cell[0]
            cell[...] = function(cell.copy(), *(x[i : i + 1] for x in inputs))
        if out is not None:
            wave.values[out][lanes] = before

    return execute
