"""Moves, selections, comparisons, address spaces."""

import numpy as np

from ..errors import Unsupported
from ..numbers import unpack16, widen16
from ..program import (
    BOOL,
    DTYPES,
    LOCAL_WINDOW,
    PARAM_WINDOW,
    SHARED_WINDOW,
    U32,
    UNSIGNED,
    Decoder,
    decodes,
)

WINDOWS = {
    "shared": SHARED_WINDOW,
    "local": LOCAL_WINDOW,
    "param": PARAM_WINDOW,
    "global": 0,
    "const": 0,
}


@decodes("mov")
def _(d: Decoder):
    dtype = DTYPES[d.type]
    target, source = d.operands
    if target[0] == "{":
        return _unpack(d, dtype, d.elements(target), source)
    if source[0] == "{":
        return _pack(d, dtype, target, d.elements(source))
    out, value = d.write(target, dtype), d.read(source, dtype)

    def execute(wave, mask):
        values = wave.values
        np.copyto(values[out], values[value], where=mask)

    return execute


def _unpack(d: Decoder, dtype, targets, source):
    part = UNSIGNED[dtype.itemsize // len(targets)]
    outs, value = [d.write(t, part) for t in targets], d.read(source, UNSIGNED[dtype.itemsize])

    def execute(wave, mask):
        values = wave.values
        whole = values[value].copy()
        for i, out in enumerate(outs):
            piece = (whole >> whole.dtype.type(8 * part.itemsize * i)).astype(part)
            np.copyto(values[out], piece, where=mask)

    return execute


def _pack(d: Decoder, dtype, target, sources):
    whole = UNSIGNED[dtype.itemsize]
    part = UNSIGNED[dtype.itemsize // len(sources)]
    out, pieces = d.write(target, whole), [d.read(s, part) for s in sources]

    def execute(wave, mask):
        values = wave.values
        result = values[pieces[0]].astype(whole)
        for i, piece in enumerate(pieces[1:], 1):
            result = result | values[piece].astype(whole) << whole.type(8 * part.itemsize * i)
        np.copyto(values[out], result, where=mask)

    return execute


@decodes("selp")
def _(d: Decoder):
    dtype = DTYPES[d.type]
    a, b = (d.read(o, dtype) for o in d.operands[1:3])
    condition, out = d.read(d.operands[3], BOOL), d.write(d.operands[0], dtype)

    def execute(wave, mask):
        values = wave.values
        chosen = np.where(values[condition], values[a], values[b])
        np.copyto(values[out], chosen, where=mask)

    return execute


_ORDERED = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_UNSIGNED = {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}


def _comparison(name: str, floating: bool):
    if not floating:
        return (_ORDERED | _UNSIGNED)[name]
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name in _ORDERED and name != "ne":
        return _ORDERED[name]
    if name == "ne":  # unlike numpy's, false for NaN
        return lambda a, b: (a < b) | (a > b)
    compare = _ORDERED[name.removesuffix("u")]
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


_JOIN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@decodes("setp", "set")
def _(d: Decoder):
    kind = d.types[-1]
    paired = kind.endswith("x2")
    half = kind.removesuffix("x2")
    floating = half in ("f16", "bf16", "f32", "f64")
    name = d.modifiers.pop(0)
    compare = _comparison(name, floating)
    join = d.take("and", "or", "xor")
    d.take("ftz")  # a comparison with flushed subnormals differs only among subnormals
    dtype = U32 if paired else DTYPES[kind]
    a, b = (d.read(o, dtype) for o in d.operands[1:3])
    other = None
    if join:
        operand = d.operands[3]
        other, negated = d.read(operand.lstrip("!"), BOOL), operand[0] == "!"

    def condition(wave):
        values = wave.values
        x, y = values[a], values[b]
        if half in ("f16", "bf16") and not paired:
            x, y = (widen16(v.view(np.uint16), half) for v in (x, y))
        if paired:
            pairs = [[widen16(h, half) for h in unpack16(v)] for v in (x, y)]
            return [compare(p, q) for p, q in zip(*pairs, strict=True)]
        result = compare(x, y)
        if other is not None:
            result = _JOIN[join](result, values[other] != negated)
        return [result]

    if d.opcode == "set":
        if paired or d.types[0] not in ("u32", "s32", "f32"):
            raise Unsupported("set." + ".".join(d.types))
        out = d.write(d.operands[0], U32)
        true = np.uint32(0x3F800000 if d.types[0] == "f32" else 0xFFFFFFFF)

        def execute(wave, mask):
            chosen = np.where(condition(wave)[0], true, np.uint32(0))
            np.copyto(wave.values[out], chosen, where=mask)

        return execute

    if paired and join:
        raise Unsupported("setp of pairs with a second condition")
    first, second = d.pair(d.operands[0])
    outs = [d.write(first, BOOL)] + ([d.write(second, BOOL)] if second else [])

    def execute(wave, mask):
        results = condition(wave)
        if len(results) < len(outs):
            results.append(~results[0])
        for out, result in zip(outs, results, strict=True):
            np.copyto(wave.values[out], result, where=mask)

    return execute


@decodes("cvta")
def _(d: Decoder):
    back = d.take("to")
    window = np.uint64(WINDOWS[d.take(*WINDOWS)])
    dtype = DTYPES[d.type]
    value, out = d.read(d.operands[1], dtype), d.write(d.operands[0], dtype)
    function = np.subtract if back else np.add

    def execute(wave, mask):
        values = wave.values
        function(values[value], window, out=values[out], where=mask)

    return execute
