"""Bits: logic, shifts, fields, permutations, counts."""

import numpy as np

from ..errors import Unsupported
from ..program import BOOL, DTYPES, S64, U32, U64, UNSIGNED, Decoder, decodes
from .arithmetic import elementwise, ufunc

_LOGIC = {
    "and": (np.bitwise_and, np.logical_and),
    "or": (np.bitwise_or, np.logical_or),
    "xor": (np.bitwise_xor, np.logical_xor),
    "not": (np.bitwise_not, np.logical_not),
}


@decodes(*_LOGIC)
def _(d: Decoder):
    dtype = DTYPES[d.type]
    return ufunc(d, _LOGIC[d.opcode][dtype == BOOL], dtype)


@decodes("lop3")
def _(d: Decoder):
    table = int(d.operands[4], 0)
    terms = [i for i in range(8) if table >> i & 1]

    def function(a, b, c):
        result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
        for i in terms:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return result

    if d.type != "b32":
        raise Unsupported("lop3." + d.type)
    return elementwise(d, function, U32, operands=d.operands[1:4])


@decodes("shl", "shr")
def _(d: Decoder):
    dtype = DTYPES[d.type]
    bits = 8 * dtype.itemsize
    source, amount = d.read(d.operands[1], dtype), d.read(d.operands[2], U32)
    out = d.write(d.operands[0], dtype)
    shift = np.left_shift if d.opcode == "shl" else np.right_shift
    # Shifting further than the width leaves zeros, or the sign.
    most = dtype.type(bits - 1)
    keeps_sign = d.opcode == "shr" and dtype.kind == "i"

    def execute(wave, mask):
        values = wave.values
        x, n = values[source], values[amount]
        far = n >= bits
        if not np.any(far):
            np.copyto(values[out], shift(x, n.astype(dtype)), where=mask)
            return
        near = shift(x, np.where(far, most, n.astype(dtype)))
        np.copyto(values[out], near if keeps_sign else np.where(far, 0, near), where=mask)

    return execute


@decodes("shf")
def _(d: Decoder):
    direction, clamp = d.take("l", "r"), d.take("clamp", "wrap") == "clamp"
    low, high, amount = (d.read(o, U32) for o in d.operands[1:4])
    out = d.write(d.operands[0], U32)

    def execute(wave, mask):
        values = wave.values
        n = values[amount]
        n = (np.minimum(n, np.uint32(32)) if clamp else n & np.uint32(31)).astype(U64)
        pair = values[low].astype(U64) | values[high].astype(U64) << np.uint64(32)
        shifted = pair >> n if direction == "r" else (pair << n) >> np.uint64(32)
        np.copyto(values[out], shifted.astype(np.uint32), where=mask)

    if direction is None or d.type != "b32":
        raise Unsupported("shf")
    return execute


@decodes("bfe")
def _(d: Decoder):
    dtype = DTYPES[d.type]
    bits = 8 * dtype.itemsize
    signed = dtype.kind == "i"
    source = d.read(d.operands[1], dtype)
    position, length = (d.read(o, U32) for o in d.operands[2:4])
    out = d.write(d.operands[0], dtype)

    def execute(wave, mask):
        values = wave.values
        # A field that reaches beyond the top is filled with the sign, or with zeros.
        x = values[source].astype(S64 if signed else U64)
        first = (values[position] & np.uint32(255)).astype(x.dtype)
        count = np.minimum((values[length] & np.uint32(255)).astype(x.dtype), 64)
        if signed:
            field = x >> np.minimum(first, 63)
            above = np.where(count > 0, 64 - count, 0)
            field = np.where(count > 0, field << above >> above, 0)
        else:
            field = np.where(first < bits, x >> np.minimum(first, np.uint64(63)), 0)
            field &= _ones(count)
        np.copyto(values[out], field.astype(dtype), where=mask)

    return execute


def _ones(count) -> np.ndarray:
    """uint64 with the lowest `count` (0 to 64) bits set."""
    shift = np.minimum(np.uint64(64) - count, np.uint64(63))
    return np.where(count > 0, ~np.uint64(0) >> shift, np.uint64(0))


@decodes("bfi")
def _(d: Decoder):
    dtype = DTYPES[d.type]
    field, base = (d.read(o, dtype) for o in d.operands[1:3])
    position, length = (d.read(o, U32) for o in d.operands[3:5])
    out = d.write(d.operands[0], dtype)
    bits = np.uint64(8 * dtype.itemsize)

    def execute(wave, mask):
        values = wave.values
        first = (values[position] & np.uint32(255)).astype(U64)
        count = np.minimum((values[length] & np.uint32(255)).astype(U64), bits)
        shift = np.minimum(first, np.uint64(63))
        ones = np.where(first < bits, _ones(count) << shift, np.uint64(0))
        mixed = (values[base].astype(U64) & ~ones) | ((values[field].astype(U64) << shift) & ones)
        np.copyto(values[out], mixed.astype(dtype), where=mask)

    return execute


@decodes("prmt")
def _(d: Decoder):
    if d.modifiers or d.type != "b32":
        raise Unsupported("prmt mode")

    def function(a, b, selector):
        source = a.astype(U64) | b.astype(U64) << np.uint64(32)
        result = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
        for i in range(4):
            nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
            shift = ((nibble & np.uint32(7)) * np.uint32(8)).astype(U64)
            byte = ((source >> shift) & np.uint64(255)).astype(np.uint32)
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            result |= np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * i)
        return result

    return elementwise(d, function, U32)


@decodes("popc")
def _(d: Decoder):
    return elementwise(d, np.bitwise_count, DTYPES[d.type], result=U32)


@decodes("clz")
def _(d: Decoder):
    dtype = DTYPES[d.type]
    bits = 8 * dtype.itemsize
    return elementwise(d, lambda x: np.uint32(bits) - _bit_length(x), dtype, result=U32)


@decodes("bfind")
def _(d: Decoder):
    dtype = DTYPES[d.type]
    unsigned = UNSIGNED[dtype.itemsize]
    amount = d.take("shiftamt")

    def function(x):
        length = _bit_length((np.where(x < 0, ~x, x)).astype(unsigned))
        place = np.uint32(8 * dtype.itemsize) - length if amount else length - np.uint32(1)
        return np.where(length == 0, np.uint32(0xFFFFFFFF), place)

    return elementwise(d, function, dtype, result=U32)


@decodes("brev")
def _(d: Decoder):
    dtype = DTYPES[d.type]

    def function(x):
        size = dtype.itemsize
        octets = np.unpackbits(np.ascontiguousarray(x).view(np.uint8).reshape(-1, size), axis=1)
        return np.packbits(octets[:, ::-1], axis=1).view(dtype)[:, 0].reshape(np.shape(x))

    return elementwise(d, function, dtype)


def _bit_length(x) -> np.ndarray:
    """uint32: the place of the highest bit plus one; 0 for 0."""
    smeared = x
    shift = 1
    while shift < 8 * x.dtype.itemsize:
        smeared = smeared | (smeared >> x.dtype.type(shift))
        shift *= 2
    return np.bitwise_count(smeared).astype(np.uint32)
