"""Integer and floating-point arithmetic on registers."""

from collections.abc import Callable

import numpy as np

from ..errors import Unsupported
from ..numbers import narrow16, pack16, unpack16, widen16
from ..program import BOOL, DTYPES, S64, U16, U32, U64, Decoder, decodes

_INTEGER = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "abs": np.abs,
}


def elementwise(d: Decoder, function: Callable, dtype, result=None, operands=None):
    """`function` of the sources, seen as `dtype`, to the destination, seen as `result` (the same by
    default).
    """
    sources = [d.read(o, dtype) for o in (operands or d.operands[1:])]
    out = d.write(d.operands[0], result or dtype)

    def execute(wave, mask):
        values = wave.values
        np.copyto(values[out], function(*[values[s] for s in sources]), where=mask)

    return execute


def ufunc(d: Decoder, function: np.ufunc, dtype, operands=None):
    """The same for a numpy function that writes its result in place."""
    sources = [d.read(o, dtype) for o in (operands or d.operands[1:])]
    out = d.write(d.operands[0], dtype)
    if len(sources) == 2:
        a, b = sources

        def execute(wave, mask):
            values = wave.values
            function(values[a], values[b], out=values[out], where=mask)

    else:
        (a,) = sources

        def execute(wave, mask):
            values = wave.values
            function(values[a], out=values[out], where=mask)

    return execute


@decodes("add", "sub", "min", "max", "neg", "abs", "mul", "mad", "fma", "div", "rem", "sad")
def _(d: Decoder):
    kind = d.type
    if kind in ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2"):
        return _floating(d, kind)
    if kind in ("u16x2", "s16x2"):
        return _pairs16(d, _INTEGER[d.opcode], DTYPES[kind.removesuffix("x2")])
    dtype = DTYPES[kind]
    if d.opcode in ("mul", "mad"):
        return _product(d, dtype)
    if d.opcode in _INTEGER:
        return ufunc(d, _INTEGER[d.opcode], dtype)
    if d.opcode in ("div", "rem"):
        return elementwise(d, _quotient if d.opcode == "div" else _remainder, dtype)
    if d.opcode == "sad":
        return elementwise(d, lambda a, b, c: np.maximum(a, b) - np.minimum(a, b) + c, dtype)
    raise Unsupported(f"{d.opcode} of {kind}")


def _pairs16(d: Decoder, function: np.ufunc, dtype):
    def pairs(*sources):
        halves = [[h.view(dtype) for h in unpack16(s)] for s in sources]
        return pack16(*(function(*[h[i] for h in halves]).view(U16) for i in (0, 1)))

    return elementwise(d, pairs, U32)


def _product(d: Decoder, dtype):
    part = d.take("lo", "hi", "wide")
    wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}") if dtype.itemsize < 8 else None
    if part == "wide":
        if wide is None:
            raise Unsupported("wide product of 64-bit integers")
        a, b = (d.read(o, dtype) for o in d.operands[1:3])
        out = d.write(d.operands[0], wide)
        addend = d.read(d.operands[3], wide) if d.opcode == "mad" else None

        def execute(wave, mask):
            values = wave.values
            product = np.multiply(values[a], values[b], dtype=wide)
            if addend is not None:
                product = product + values[addend]
            np.copyto(values[out], product, where=mask)

        return execute
    if part == "hi":
        high = _high64 if wide is None else _high(dtype, wide)
        if d.opcode == "mul":
            return elementwise(d, high, dtype)
        return elementwise(d, lambda a, b, c: high(a, b) + c, dtype)
    if part != "lo":
        raise Unsupported("product without .lo, .hi or .wide")
    if d.opcode == "mul":
        return ufunc(d, np.multiply, dtype)
    return elementwise(d, lambda a, b, c: a * b + c, dtype)


def _high(dtype, wide):
    shift = wide.type(8 * dtype.itemsize)
    return lambda a, b: (np.multiply(a, b, dtype=wide) >> shift).astype(dtype)


def _high64(a, b):
    signed = a.dtype.kind == "i"
    ua, ub, low, half = a.view(U64), b.view(U64), U64.type(0xFFFFFFFF), U64.type(32)
    cross = (ua >> half) * (ub & low)
    middle = (ua & low) * (ub >> half) + (cross & low) + (((ua & low) * (ub & low)) >> half)
    high = (ua >> half) * (ub >> half) + (cross >> half) + (middle >> half)
    if signed:
        zero = U64.type(0)
        high = high - np.where(a < 0, ub, zero) - np.where(b < 0, ua, zero)
        return high.view(S64)
    return high


def _quotient(a, b):
    """Towards zero.  A divisor of 0 gives what PTX leaves open."""
    if a.dtype.kind == "u":
        return np.floor_divide(a, b)
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    magnitude = np.floor_divide(np.abs(a).view(unsigned), np.abs(b).view(unsigned)).view(a.dtype)
    return np.where((a < 0) != (b < 0), -magnitude, magnitude)


def _remainder(a, b):
    return a - _quotient(a, b) * b


# Floating point


def _fma32(a, b, c):
    # The product of two float32 is exact in float64; the sum is rounded there first, which differs
    # from one rounding only where it falls on a tie of float32 within 2**-29.
    return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)


def _fma64(a, b, c):
    return (a.astype(np.longdouble) * b + c).astype(np.float64)


_FLOATING = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
    "abs": np.abs,
    "min": np.fmin,
    "max": np.fmax,
}


def _floating(d: Decoder, kind: str):
    function = _FLOATING.get(d.opcode)
    if d.opcode in ("fma", "mad"):
        function = _fma64 if kind == "f64" else _fma32
    if function is None:
        raise Unsupported(f"{d.opcode} of {kind}")
    if d.take("NaN"):
        function = {"min": np.minimum, "max": np.maximum}[d.opcode]
    # Approximate division is done exactly.
    d.take("rn", "approx", "full")
    return floating(d, function, kind)


def floating(d: Decoder, function: Callable, kind: str):
    """A floating-point function with the modifiers .ftz, .sat, .relu."""
    flush, saturate, relu = d.take("ftz"), d.take("sat"), d.take("relu")
    plain = function

    def modified(*sources):
        if flush:
            sources = [_flush(s) for s in sources]
        x = plain(*sources)
        if flush:
            x = _flush(x)
        if saturate:
            x = np.where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1))
        if relu:
            x = np.where(np.isnan(x), x, np.maximum(x, 0))
        return x

    if flush or saturate or relu:
        function = modified
    if kind in ("f32", "f64"):
        if isinstance(function, np.ufunc):
            return ufunc(d, function, DTYPES[kind])
        return elementwise(d, function, DTYPES[kind])
    half = kind.removesuffix("x2")
    if kind == half:
        return elementwise(
            d, lambda *s: narrow16(function(*[widen16(x, half) for x in s]), half), U16
        )

    def pairs(*sources):
        halves = [[widen16(x, half) for x in unpack16(s)] for s in sources]
        return pack16(*(narrow16(function(*[h[i] for h in halves]), half) for i in (0, 1)))

    return elementwise(d, pairs, U32)


def _flush(x):
    tiny = np.finfo(x.dtype).tiny
    return np.where(np.abs(x) < tiny, np.copysign(x.dtype.type(0), x), x)


_UNARY = {
    "rcp": lambda x: x.dtype.type(1) / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: x.dtype.type(1) / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@decodes(*_UNARY)
def _(d: Decoder):
    # Approximations are done as exactly as numpy does.
    d.take("approx", "rn")
    return floating(d, _UNARY[d.opcode], d.type)


@decodes("copysign")
def _(d: Decoder):
    return elementwise(d, lambda sign, x: np.copysign(x, sign), DTYPES[d.type])


@decodes("testp")
def _(d: Decoder):
    test = d.take("finite", "infinite", "number", "notanumber")
    function = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
    }[test]
    return elementwise(d, function, DTYPES[d.type], result=BOOL)
