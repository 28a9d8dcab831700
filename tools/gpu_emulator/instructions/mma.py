"""ldmatrix, stmatrix and mma.sync: matrices spread over the lanes of a warp.

A fragment is a uint32 array [registers, warps, 32]; lane = 4 * g + q holds row (or column) g and
the columns (rows) that belong to q.  Products are summed in float32, in numpy's order, which is not
the tensor cores'.
"""

import numpy as np

from ..errors import Unsupported
from ..numbers import TF32_MASK, f8_to_f32, widen16
from ..program import F32, FLOAT8, S32, U32, Decoder, decodes

# Elements of a 32-bit register, by format.
PER_REGISTER = {"bf16": 2, "f16": 2, "tf32": 1, "s8": 4, "u8": 4, "e4m3": 4, "e5m2": 4}


def fragment(wave, slots: list[int]) -> np.ndarray:
    """uint32 [registers, warps, 32]"""
    out = np.empty((len(slots), wave.warps, 32), np.uint32)
    for i, slot in enumerate(slots):
        out[i] = wave.spread(wave.values[slot]).reshape(-1, 32)
    return out


def decode_elements(bits: np.ndarray, kind: str) -> np.ndarray:
    """uint32 [..., n] to float32 [..., n, elements per register].

    Of integers too: sums of 32 products of 8-bit integers are exact in float32.
    """
    if kind == "tf32":
        return (bits & TF32_MASK).view(np.float32)[..., None]
    per = PER_REGISTER[kind]
    parts = np.ascontiguousarray(bits)[..., None].view(np.dtype(f"u{4 // per}"))
    if per == 2:
        return widen16(parts, kind)
    if kind in FLOAT8:
        return f8_to_f32(parts, kind)
    return parts.view(np.int8 if kind == "s8" else np.uint8).astype(np.float32)


@decodes("ldmatrix")
def _(d: Decoder):
    count, transposed = _matrices(d)
    outs = [d.write(o, U32) for o in d.elements(d.operands[0])]
    address = d.address(d.operands[1])
    d.shared_sizes.add(16)

    def execute(wave, mask):
        warps, rows, data = _row_addresses(wave, mask, address, count)
        data = wave.shared.read(wave, rows, data, 16).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            data = np.ascontiguousarray(data.transpose(0, 1, 3, 2))
        registers = data.view(np.uint32).reshape(-1, count, 32)
        for i, out in enumerate(outs):
            by_warp = wave.values[out].reshape(-1, 32)
            by_warp[slice(None) if warps is None else warps] = registers[:, i]

    return execute


@decodes("stmatrix")
def _(d: Decoder):
    count, transposed = _matrices(d)
    address = d.address(d.operands[0])
    sources = [d.read(o, U32) for o in d.elements(d.operands[1])]
    d.shared_sizes.add(16)

    def execute(wave, mask):
        warps, rows, addresses = _row_addresses(wave, mask, address, count)
        registers = fragment(wave, sources).transpose(1, 0, 2)
        if warps is not None:
            registers = registers[warps]
        data = np.ascontiguousarray(registers).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            data = np.ascontiguousarray(data.transpose(0, 1, 3, 2))
        units = data.reshape(-1, 8).view(np.complex128)[:, 0]
        wave.shared.write(wave, rows, addresses, 16, units)

    return execute


def _matrices(d: Decoder) -> tuple[int, bool]:
    d.take_all("sync", "aligned", "shared", "shared::cta")
    count = d.take_match("x([124])")
    if d.take("m8n8") is None or d.type != "b16" or count is None:
        raise Unsupported(d.instruction.name)
    return int(count[1]), d.take("trans") is not None


def _row_addresses(wave, mask, address, count):
    """(warps or None for all, lanes that hold an address, their addresses): 8 rows of 16 bytes per
    matrix.
    """
    warps = wave.full_warps(mask)
    lanes = wave.lanes.reshape(-1, 32)[:, : 8 * count]
    if warps is not None:
        lanes = lanes[warps]
    lanes = lanes.reshape(-1)
    return warps, lanes, wave.spread(address.of(wave))[lanes]


@decodes("mma")
def _(d: Decoder):
    if d.take("sync") is None or d.take("row") is None or d.take("col") is None:
        raise Unsupported(d.instruction.name)
    d.take("aligned")
    shape = d.take_match(r"m16n8k(\d+)")
    result, a_kind, b_kind, addend = d.types
    k = int(shape[1]) if shape else 0
    if PER_REGISTER.get(a_kind) is None or result != addend or k * 4 % PER_REGISTER[a_kind]:
        raise Unsupported(d.instruction.name)
    if result != ("s32" if a_kind in ("s8", "u8") else "f32"):
        raise Unsupported(d.instruction.name)
    dtype = S32 if result == "s32" else F32
    saturate = result == "s32" and d.take("satfinite") is not None
    outs = [d.write(o, dtype) for o in d.elements(d.operands[0])]
    a, b = ([d.read(o, U32) for o in d.elements(x)] for x in d.operands[1:3])
    c = [d.read(o, dtype) for o in d.elements(d.operands[3])]
    if len(a) * PER_REGISTER[a_kind] * 32 != 16 * k or len(b) * PER_REGISTER[b_kind] * 32 != 8 * k:
        raise Unsupported(d.instruction.name)
    flops = 2 * 16 * 8 * k

    def execute(wave, mask):
        warps = wave.full_warps(mask)
        product = matrix_a(fragment(wave, a), a_kind) @ matrix_b(fragment(wave, b), b_kind)
        # [warps, row half, g, q, pair] to [row half, pair, warps, g, q]: the order of the
        # registers.
        tiles = product.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
        tiles = tiles.astype(dtype, copy=False)
        values = wave.values
        for i, out in enumerate(outs):
            total = tiles[i] + values[c[i]]
            if saturate:
                exact = tiles[i].astype(np.int64) + values[c[i]]
                total = np.clip(exact, -(2**31), 2**31 - 1).astype(S32)
            np.copyto(values[out], total, where=mask)
        count = wave.warps if warps is None else len(warps)
        wave.launch.tensor_flops["mma"] += flops * count

    return execute


def matrix_a(bits: np.ndarray, kind: str) -> np.ndarray:
    """Fragment [registers, warps, 32] of A to [warps, 16, k].  Registers alternate between the
    upper and the lower eight rows, then go on along k.
    """
    registers, warps = bits.shape[:2]
    x = decode_elements(bits.reshape(registers // 2, 2, warps, 8, 4), kind)
    return np.ascontiguousarray(x.transpose(2, 1, 3, 0, 4, 5)).reshape(warps, 16, -1)


def matrix_b(bits: np.ndarray, kind: str) -> np.ndarray:
    """Fragment [registers, warps, 32] of B to [warps, k, 8]."""
    registers, warps = bits.shape[:2]
    x = decode_elements(bits.reshape(registers, warps, 8, 4), kind)
    return np.ascontiguousarray(x.transpose(1, 0, 3, 4, 2)).reshape(warps, -1, 8)
