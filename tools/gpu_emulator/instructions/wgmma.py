"""wgmma: matrix products of a warp group (four warps) that read shared memory behind the threads'
backs.

They happen as late as `wgmma.wait_group` allows: operands are read and accumulators written there.
Until then the operands in shared memory count as being read, and overwriting them is a race.
"""

import functools
from dataclasses import dataclass

import numpy as np

from ..errors import Fault, Unsupported
from ..program import BOOL, F32, S32, U32, U64, Decoder, decodes
from .mma import PER_REGISTER, decode_elements, fragment, matrix_a

# By the descriptor's swizzle field: bytes of a row within an atom, and the mask of row bits that
# are mixed into the number of a row's 16-byte chunk.
_SPAN = {0: 16, 1: 128, 2: 64, 3: 32}
_MIX = {0: 0, 1: 7, 2: 3, 3: 1}


@dataclass
class _Products:
    """One instruction, executed by `groups`: the first lanes of their warp groups.  Other arrays go
    with these.
    """

    groups: np.ndarray
    commit: np.ndarray  # number of the commit that it belongs to
    accumulate: np.ndarray
    a: np.ndarray | None  # 16-byte units of shared memory [groups, units]; None: A is in registers
    b: np.ndarray
    finish: object  # called with this when it has been waited for

    def part(self, which: np.ndarray) -> "_Products":
        a = None if self.a is None else self.a[which]
        return _Products(
            self.groups[which], self.commit[which], self.accumulate[which], a, self.b[which],
            self.finish,
        )  # fmt: skip


class _Queue:
    def __init__(self, wave):
        self.products: list[_Products] = []
        self.committed = np.zeros(wave.count, np.int64)


def _queue(wave) -> _Queue:
    if "wgmma" not in wave.state:
        wave.state["wgmma"] = _Queue(wave)
    return wave.state["wgmma"]


@decodes("wgmma")
def _(d: Decoder):
    d.take_all("sync", "aligned")
    if d.take("fence"):
        return lambda wave, mask: None
    if d.take("commit_group"):
        return _commit
    if d.take("wait_group"):
        pending = int(d.operands[0])
        return lambda wave, mask: _wait(wave, mask, pending)
    if d.take("mma_async"):
        return _multiply(d)
    raise Unsupported(d.instruction.name)


def _commit(wave, mask):
    _queue(wave).committed[wave.active(mask)] += 1


def _wait(wave, mask, pending: int):
    queue = _queue(wave)
    here = wave.spread(mask)
    kept = []
    for products in queue.products:
        groups = products.groups
        done = here[groups] & (products.commit < queue.committed[groups] - pending)
        if done.all():
            products.finish(wave, products)
        elif done.any():
            products.finish(wave, products.part(done))
            kept.append(products.part(~done))
        else:
            kept.append(products)
    queue.products = kept


def _multiply(d: Decoder):
    shape = d.take_match(r"m64n(\d+)k(\d+)")
    n, k = int(shape[1]), int(shape[2])
    result, a_kind, b_kind = d.types
    per = PER_REGISTER[a_kind]
    whole = a_kind in ("s8", "u8")
    if PER_REGISTER[b_kind] != per or k != 8 * per or result != ("s32" if whole else "f32"):
        raise Unsupported(d.instruction.name)
    dtype = S32 if whole else F32
    outs = [d.write(o, dtype) for o in d.elements(d.operands[0])]
    if len(outs) != n // 2:
        raise Unsupported(f"{len(outs)} accumulators")
    in_registers = d.operands[1][0] == "{"
    a_registers = [d.read(o, U32) for o in d.elements(d.operands[1])] if in_registers else []
    a_descriptor = None if in_registers else d.read(d.operands[1], U64)
    b_descriptor = d.read(d.operands[2], U64)
    accumulate = d.read(d.operands[3], BOOL)
    flags = [int(o) for o in d.operands[4:]]
    signs, transposes = ([1, 1], flags) if whole else (flags[:2], flags[2:])
    sign = dtype.type(signs[0] * signs[1])
    # Only 16-bit operands can be transposed, and only those that are in shared memory.
    if len(transposes) != ((1 if in_registers else 2) if per == 2 else 0):
        raise Unsupported(d.instruction.name)
    b_transposed = bool(transposes and transposes[-1])
    a_transposed = bool(len(transposes) == 2 and transposes[0])
    d.shared_sizes.add(16)
    d.warp_groups = d.reads_asynchronously = True
    flops = 2 * 64 * n * k

    def start(wave, mask):
        warps = wave.full_warps(mask)
        warps = np.arange(wave.warps) if warps is None else warps
        groups = warps[wave.thread[32 * warps] % 128 == 0] * 32
        if len(groups) * 4 != len(warps):
            raise Fault("not all warps of a warp group are here")
        if not len(groups):
            return
        values = wave.values
        queue = _queue(wave)
        wave.launch.tensor_flops["wgmma"] += flops * len(groups)
        # One warp group of each block at a time, so that no unit is read twice by one call.
        place = wave.thread[groups]
        for part in [groups[place == p] for p in np.unique(place)]:
            a = None
            if a_descriptor is not None:
                a = _start_read(wave, part, values[a_descriptor], 64, k, a_transposed)
            b = _start_read(wave, part, values[b_descriptor], n, k, b_transposed)
            adds = wave.spread(values[accumulate])[part]
            queue.products.append(_Products(part, queue.committed[part], adds, a, b, finish))

    def finish(wave, products):
        groups = products.groups
        if in_registers:
            a = matrix_a(fragment(wave, a_registers), a_kind)
            a = a[(groups[:, None] // 32 + np.arange(4)).reshape(-1)].reshape(-1, 64, k)
        else:
            a = _matrix(wave, products.a, groups, a_kind, a_transposed, 64, k)
        b = _matrix(wave, products.b, groups, b_kind, b_transposed, n, k)
        product = sign * (a @ b.transpose(0, 2, 1)).astype(dtype, copy=False)
        # [group, warp, row half, g, tile, q, pair] to [tile, row half, pair, group, warp, g, q]:
        # the registers' order
        tiles = product.reshape(-1, 4, 2, 8, n // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
        tiles = tiles.reshape(n // 2, -1)
        values = wave.values
        lanes = (groups[:, None] + np.arange(128)).reshape(-1)
        where = slice(None) if len(lanes) == wave.count else lanes
        adds = np.repeat(products.accumulate, 128)
        for out, tile in zip(outs, tiles, strict=True):
            if adds.all():
                values[out][where] += tile
            else:
                values[out][where] = np.where(adds, values[out][where], dtype.type(0)) + tile

    return start


def _start_read(wave, groups, descriptors, rows, k, transposed) -> np.ndarray:
    descriptors = wave.spread(descriptors)[groups]
    offsets = np.stack([_chunks(int(x), rows, k, transposed) for x in descriptors])
    units = wave.shared.start_read(
        wave, np.repeat(groups, offsets.shape[1]), offsets.reshape(-1), 16
    )
    return units.reshape(offsets.shape)


@functools.lru_cache(maxsize=4096)
def _chunks(descriptor: int, rows: int, k: int, transposed: bool) -> np.ndarray:
    """Offsets in shared memory of the 16-byte chunks of an operand [rows, k]: 2 of each row, or,
    transposed, those of every 8 rows for each of the k columns.  (PTX ISA, "Asynchronous warpgroup
    level matrix shared memory layout".)
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    swizzle = descriptor >> 62
    if descriptor >> 49 & 7:
        raise Unsupported("matrix descriptor with a base offset")
    span = _SPAN[swizzle]
    if transposed:
        row, column = 8 * np.arange(rows // 8)[:, None], np.arange(k)[None, :]
        atom = span // 2  # rows that lie side by side
        offsets = row // atom * leading + column // 8 * stride + column % 8 * span + row % atom * 2
    else:
        row, half = np.arange(rows)[:, None], np.arange(2)[None, :]
        along = leading if swizzle == 0 else 16
        offsets = row // 8 * stride + row % 8 * span + half * along
    offsets = start + offsets
    return (offsets ^ (offsets >> 7 & _MIX[swizzle]) << 4).reshape(-1)


def _matrix(wave, units, groups, kind, transposed, rows, k) -> np.ndarray:
    """float32 [groups, rows, k] from the chunks, which may be overwritten from now on."""
    data = wave.shared.finish_read(wave, np.repeat(groups, units.shape[1]), units.reshape(-1), 16)
    x = decode_elements(data.view(np.uint32), kind)
    if not transposed:
        return x.reshape(len(groups), rows, k)
    return x.reshape(len(groups), rows // 8, k, 8).transpose(0, 1, 3, 2).reshape(-1, rows, k)
