"""ld and st: registers from and to the global, shared, local and parameter spaces."""

import re

import numpy as np

from ..errors import Fault, Unsupported
from ..program import (
    BOOL,
    DTYPES,
    LOCAL_WINDOW,
    PARAM_WINDOW,
    SHARED_WINDOW,
    Decoder,
    decodes,
)

# Hints and cache operations change no value; ordering is stronger here than any of these asks for.
_HINTS = (
    "ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "weak", "volatile", "relaxed", "mmio",
    "cta", "cluster", "gpu", "sys",
    "L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last",
    "L1::no_allocate", "L2::evict_normal", "L2::evict_first", "L2::evict_last", "L2::64B",
    "L2::128B", "L2::256B",
)  # fmt: skip
_SPACES = ("global", "shared", "shared::cta", "local", "param", "param::entry", "const")


def take_space(d: Decoder) -> str | None:
    """None for a generic address."""
    space = d.take(*_SPACES)
    if space is None:
        return None
    return {"const": "global"}.get(space.partition("::")[0], space.partition("::")[0])


def take_hints(d: Decoder) -> None:
    if d.take("acquire", "release", "acq_rel", "sc"):
        d.global_synchronisation = True
    d.take_all(*_HINTS)


def note_size(d: Decoder, space: str | None, size: int) -> None:
    if space in (None, "shared"):
        d.shared_sizes.add(size)
    if space in (None, "global"):
        d.global_sizes.add(size)


def resolve(wave, space: str | None, lanes: np.ndarray, addresses: np.ndarray):
    """(memory, addresses within it) of a space, or of generic addresses, which must all lie in one
    space.
    """
    if space is None and len(addresses):
        window = int(addresses[0]) >> 48 << 48
        space = {
            SHARED_WINDOW: "shared", LOCAL_WINDOW: "local", PARAM_WINDOW: "param",
        }.get(window, "global")  # fmt: skip
        base = 0 if space == "global" else window
        addresses = addresses - base
        if space != "global" and ((addresses < 0) | (addresses >> 48 != 0)).any():
            raise Unsupported("generic addresses in several spaces at once")
    memory = {
        "global": wave.memory, "shared": wave.shared, "local": wave.local, "param": wave.parameters,
    }[space or "global"]  # fmt: skip
    return memory, addresses


def active_addresses(wave, mask, address) -> tuple[np.ndarray, np.ndarray]:
    """(lanes, addresses) of the active lanes."""
    lanes = wave.active(mask)
    addresses = wave.spread(address.of(wave))
    return lanes, addresses if mask is True else addresses[lanes]


def _passes_arguments(d: Decoder, operand: str) -> bool:
    """Whether this is the parameter of a call, not of the kernel."""
    name = re.match(r"\[\s*([\w$%.@]+)", operand)[1]
    return name not in d.kernel.parameters and name not in d.kernel.registers


def _form(d: Decoder):
    take_hints(d)
    space = take_space(d)
    vector = d.take_match(r"v([248])")
    dtype = DTYPES[d.type]
    count = int(vector[1]) if vector else 1
    size = dtype.itemsize * count
    if dtype == BOOL or size > 16:
        raise Unsupported(f"access of {size} bytes")
    note_size(d, space, size)
    return space, dtype, count, size


@decodes("ld", "ldu")
def _(d: Decoder):
    space, dtype, count, size = _form(d)
    if space == "param" and _passes_arguments(d, d.operands[1]):
        return lambda wave, mask: None
    targets = [d.write(t, dtype) for t in d.elements(d.operands[0])]
    address = d.address(d.operands[1])
    if len(targets) != count:
        raise Unsupported("vector of registers")

    def execute(wave, mask):
        lanes, addresses = active_addresses(wave, mask, address)
        memory, addresses = resolve(wave, space, lanes, addresses)
        data = memory.read(wave, lanes, addresses, size).view(dtype).reshape(-1, count)
        where = slice(None) if mask is True else lanes
        for i, target in enumerate(targets):
            wave.values[target][where] = data[:, i]

    return execute


@decodes("st")
def _(d: Decoder):
    space, dtype, count, size = _form(d)
    if space == "param" and _passes_arguments(d, d.operands[0]):
        return lambda wave, mask: None
    address = d.address(d.operands[0])
    sources = [d.read(s, dtype) for s in d.elements(d.operands[1])]
    if len(sources) != count:
        raise Unsupported("vector of registers")

    def execute(wave, mask):
        lanes, addresses = active_addresses(wave, mask, address)
        memory, addresses = resolve(wave, space, lanes, addresses)
        data = np.empty((len(lanes), count), dtype)
        for i, source in enumerate(sources):
            value = wave.spread(wave.values[source])
            data[:, i] = value if mask is True else value[lanes]
        unit = np.dtype(np.complex128) if size == 16 else np.dtype(f"u{size}")
        memory.write(wave, lanes, addresses, size, data.view(unit)[:, 0])

    return execute


@decodes("prefetch", "prefetchu", "discard", "applypriority")
def _(d: Decoder):
    take_hints(d)
    take_space(d)
    d.take_all("L1", "L2", "tensormap")
    return lambda wave, mask: None


@decodes("call")
def _(d: Decoder):
    """Calls of device functions are unknown, except of the one that assertions end in, and of
    printf.
    """
    d.take("uni")
    text = " ".join(d.operands)
    if "__assertfail" in text:

        def execute(wave, mask):
            raise Fault(f"device assertion failed, {wave.thread_name(wave.active(mask)[0])}")

        return execute
    if "vprintf" in text:
        return lambda wave, mask: None
    raise Unsupported("call of a device function")
