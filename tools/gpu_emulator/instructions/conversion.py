"""cvt: between integers and floating-point formats."""

import numpy as np

from ..errors import Unsupported
from ..numbers import (
    bf16_to_f32,
    f8_to_f32,
    f32_to_f8,
    f32_to_tf32,
    narrow16,
    pack16,
    unpack16,
    widen16,
)
from ..program import DTYPES, F32, U16, U32, Decoder, decodes
from .arithmetic import elementwise

_HALVES = ("bf16", "f16")
_TO_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_PAIR8 = ("e4m3x2", "e5m2x2")


@decodes("cvt")
def _(d: Decoder):
    target, source = d.types
    saturate, relu, _ = d.take("sat"), d.take("relu"), d.take("ftz")
    finite = d.take("satfinite")
    rounding = d.take("rn", "rna", *_TO_INTEGRAL)
    to_half, to_pair = target in _HALVES, target.removesuffix("x2") in _HALVES
    if finite and target not in _PAIR8:
        raise Unsupported("satfinite")

    def adjust(x):
        if saturate:
            x = np.where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1))
        return np.where(np.isnan(x), x, np.maximum(x, 0)) if relu else x

    if target in _PAIR8:
        kind = target.removesuffix("x2")

        def pair8(high, low):
            high, low = (f32_to_f8(np.atleast_1d(adjust(x)), kind) for x in (high, low))
            return high.astype(np.uint16) << np.uint16(8) | low

        if source == "f32":
            return elementwise(d, pair8, F32, result=U16)
        half = source.removesuffix("x2")
        return elementwise(
            d, lambda x: pair8(*(widen16(h, half) for h in unpack16(x)[::-1])), U32, result=U16
        )
    if source in _PAIR8:
        kind, half = source.removesuffix("x2"), target.removesuffix("x2")

        def unpair8(bits):
            bits = np.atleast_1d(bits)
            parts = (bits.astype(np.uint8), (bits >> np.uint16(8)).astype(np.uint8))
            return pack16(*(narrow16(adjust(f8_to_f32(p, kind)), half) for p in parts))

        return elementwise(d, unpair8, U16, result=U32)
    if to_pair and not to_half:
        half = target.removesuffix("x2")
        if source != "f32" or rounding != "rn":
            raise Unsupported(d.instruction.name)
        return elementwise(
            d,
            lambda high, low: pack16(narrow16(adjust(low), half), narrow16(adjust(high), half)),
            F32,
            result=U32,
        )
    if target == "tf32":
        if rounding != "rna" or source != "f32":
            raise Unsupported(d.instruction.name)
        return elementwise(d, f32_to_tf32, F32, result=U32)
    return _scalar(d, target, source, rounding, adjust, bool(saturate))


def _scalar(d: Decoder, target: str, source: str, rounding, adjust, saturate: bool):
    result = DTYPES[target]
    from_float = source in ("f16", "bf16", "f32", "f64")
    to_float = target in ("f16", "bf16", "f32", "f64")

    if from_float:
        integral = _TO_INTEGRAL.get(rounding)
        if to_float and rounding not in (None, "rn", *_TO_INTEGRAL):
            raise Unsupported(d.instruction.name)
        if not to_float and integral is None:
            raise Unsupported(d.instruction.name)

        def function(x):
            x = bf16_to_f32(x) if source == "bf16" else x
            x = integral(x) if integral else x
            if not to_float:
                return _float_to_integer(x, result)
            x = adjust(x)
            return narrow16(x, target).view(result) if target in _HALVES else x.astype(result)

    elif to_float:

        def function(x):
            if target in _HALVES:
                # Through float64, where integers up to 2**53 are exact: float32 would round twice.
                return _narrow_exact(x.astype(np.float64), target).view(result)
            return adjust(x.astype(result))

    elif saturate:
        limits = np.iinfo(result)

        def function(x):
            low = max(int(limits.min), int(np.iinfo(x.dtype).min))
            high = min(int(limits.max), int(np.iinfo(x.dtype).max))
            return np.clip(x, x.dtype.type(low), x.dtype.type(high)).astype(result)

    else:

        def function(x):
            return x.astype(result)

    return elementwise(d, function, DTYPES[source], result=result)


def _narrow_exact(x: np.ndarray, kind: str) -> np.ndarray:
    """float64 integers to 16 bits with one rounding."""
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    # To float32 with the lost bits kept as a sticky last bit, so that rounding again is right.
    rounded = x.astype(np.float32)
    away = np.where(np.abs(rounded) > np.abs(x), np.nextafter(rounded, np.float32(0)), rounded)
    bits = away.view(np.uint32) | (away != x).astype(np.uint32)
    return narrow16(bits.view(np.float32), kind)


def _float_to_integer(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Saturating; NaN becomes 0."""
    limits = np.iinfo(dtype)
    x = x.astype(np.float64)
    # 2**63 - 1 is no float64, so the top is compared and set apart.
    top, bottom = x >= float(limits.max), x <= float(limits.min)
    inside = np.where(top | bottom | np.isnan(x), 0.0, x).astype(dtype)
    return np.where(top, dtype.type(limits.max), np.where(bottom, dtype.type(limits.min), inside))
