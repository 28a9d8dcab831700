"""The GPU emulator's arithmetic, one instruction at a time, against plain Python."""

import itertools
import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx_kernels import launch

SIZE = {"pred": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4, "s32": 4}
SIZE |= {"f32": 4, "tf32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8, "u8": 1, "s8": 1}
PACKED = ("f16x2", "bf16x2", "u16x2", "s16x2")
REGISTER = {2: "%h", 4: "%r", 8: "%rd"}


def bits_of(kind):
    return 32 if kind in PACKED else 16 if kind in ("e4m3x2", "e5m2x2") else 8 * SIZE[kind]


def apply(instruction, inputs, in_kinds, out_kind):
    """Bits of `instruction`'s result for lists of bits, one thread for each.  "{d} {a} {b}" are its
    operands.
    """
    count = len(inputs[0])
    tensors, body, names = [], "", {}
    for i, (values, kind) in enumerate(zip(inputs, in_kinds, strict=True)):
        size = max(bits_of(kind) // 8, 2)
        tensors.append(torch.from_numpy(np.array(values, f"u{size}")))
        register = f"{REGISTER[size]}{20 + i}"
        names["abce"[i]] = register
        body += f"mad.wide.u32 %rd50, %r0, {size}, %rd{i};\n"
        body += f"ld.global.b{8 * size} {register}, [%rd50];\n"
    size = max(bits_of(out_kind) // 8, 2)
    names["d"] = f"{REGISTER[size]}10"
    tensors.append(torch.from_numpy(np.zeros(count, f"u{size}")))
    body += instruction.format(**names) + ";\n"
    body += f"mad.wide.u32 %rd50, %r0, {size}, %rd{len(inputs)};\n"
    body += f"st.global.b{8 * size} [%rd50], {names['d']};\n"
    launch(body, *tensors, threads=count)
    return tensors[-1].numpy().tolist()


# ---- integers


def signed(bits, kind):
    n = bits_of(kind)
    return bits - 2**n if kind[0] == "s" and bits >= 2 ** (n - 1) else bits


def samples(kind, count=96, seed=0):
    n = bits_of(kind)
    edges = [0, 1, 2, 3, 7, 31, 32, 33, 2 ** (n - 1) - 1, 2 ** (n - 1), 2**n - 1, 2**n - 2, 0x5A5A]
    random = np.random.default_rng(seed).integers(0, 2**n, count - len(edges), dtype=np.uint64)
    return [e % 2**n for e in edges] + [int(x) for x in random]


def truncated(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def field(a, position, length, n, is_signed):
    position, length = position & 255, length & 255
    sign = a >> min(position + length - 1, n - 1) & 1 if is_signed and length else 0
    picked = [
        a >> (position + i) & 1 if i < length and position + i < n else sign for i in range(n)
    ]
    return sum(bit << i for i, bit in enumerate(picked))


def inserted(a, b, position, length, n):
    for i in range(length & 255):
        place = (position & 255) + i
        if place < n:
            b = b & ~(1 << place) | (a >> i & 1) << place
    return b


def permuted(a, b, selector):
    octets = struct.pack("<II", a, b)
    result = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        octet = octets[nibble & 7]
        result |= ((255 if octet & 128 else 0) if nibble & 8 else octet) << 8 * i
    return result


def funnel(low, high, amount, left, clamp):
    amount = min(amount, 32) if clamp else amount & 31
    pair = high << 32 | low
    return (pair << amount >> 32 if left else pair >> amount) & 0xFFFFFFFF


def leading(x, n):
    return n - x.bit_length()


def each_half(function):
    """On the two signed 16-bit halves of 32 bits."""

    def halves(x):
        return [signed(x >> s & 0xFFFF, "s16") for s in (0, 16)]

    return lambda a, b: sum(
        (function(p, q) & 0xFFFF) << 16 * i
        for i, (p, q) in enumerate(zip(halves(a), halves(b), strict=True))
    )


# instruction, kinds of the sources, kind of the result, what it does to integers
INTEGERS = [
    ("add.s32 {d}, {a}, {b}", "s32 s32", "s32", lambda a, b: a + b),
    ("add.s64 {d}, {a}, {b}", "s64 s64", "s64", lambda a, b: a + b),
    ("sub.u16 {d}, {a}, {b}", "u16 u16", "u16", lambda a, b: a - b),
    ("mul.lo.s32 {d}, {a}, {b}", "s32 s32", "s32", lambda a, b: a * b),
    ("mul.lo.u64 {d}, {a}, {b}", "u64 u64", "u64", lambda a, b: a * b),
    ("mul.hi.s32 {d}, {a}, {b}", "s32 s32", "s32", lambda a, b: a * b >> 32),
    ("mul.hi.u32 {d}, {a}, {b}", "u32 u32", "u32", lambda a, b: a * b >> 32),
    ("mul.hi.s64 {d}, {a}, {b}", "s64 s64", "s64", lambda a, b: a * b >> 64),
    ("mul.hi.u64 {d}, {a}, {b}", "u64 u64", "u64", lambda a, b: a * b >> 64),
    ("mul.wide.s32 {d}, {a}, {b}", "s32 s32", "s64", lambda a, b: a * b),
    ("mul.wide.u16 {d}, {a}, {b}", "u16 u16", "u32", lambda a, b: a * b),
    ("mad.lo.s32 {d}, {a}, {b}, {c}", "s32 s32 s32", "s32", lambda a, b, c: a * b + c),
    ("mad.hi.u32 {d}, {a}, {b}, {c}", "u32 u32 u32", "u32", lambda a, b, c: (a * b >> 32) + c),
    ("mad.wide.s32 {d}, {a}, {b}, {c}", "s32 s32 s64", "s64", lambda a, b, c: a * b + c),
    ("div.s32 {d}, {a}, {b}", "s32 s32", "s32", lambda a, b: truncated(a, b)),
    ("rem.s32 {d}, {a}, {b}", "s32 s32", "s32", lambda a, b: a - b * truncated(a, b)),
    ("div.u64 {d}, {a}, {b}", "u64 u64", "u64", lambda a, b: a // b),
    ("rem.s64 {d}, {a}, {b}", "s64 s64", "s64", lambda a, b: a - b * truncated(a, b)),
    ("min.s32 {d}, {a}, {b}", "s32 s32", "s32", min),
    ("max.u32 {d}, {a}, {b}", "u32 u32", "u32", max),
    ("neg.s32 {d}, {a}", "s32", "s32", lambda a: -a),
    ("abs.s64 {d}, {a}", "s64", "s64", abs),
    ("sad.u32 {d}, {a}, {b}, {c}", "u32 u32 u32", "u32", lambda a, b, c: abs(a - b) + c),
    ("add.s16x2 {d}, {a}, {b}", "s16x2 s16x2", "s16x2", each_half(lambda a, b: a + b)),
    ("max.s16x2 {d}, {a}, {b}", "s16x2 s16x2", "s16x2", each_half(max)),
    ("and.b32 {d}, {a}, {b}", "b32 b32", "b32", lambda a, b: a & b),
    ("or.b64 {d}, {a}, {b}", "b64 b64", "b64", lambda a, b: a | b),
    ("xor.b16 {d}, {a}, {b}", "b16 b16", "b16", lambda a, b: a ^ b),
    ("not.b32 {d}, {a}", "b32", "b32", lambda a: ~a),
    ("shl.b32 {d}, {a}, {b}", "b32 u32", "b32", lambda a, n: a << min(n, 40)),
    ("shl.b64 {d}, {a}, 37", "b64", "b64", lambda a: a << 37),
    ("shr.u32 {d}, {a}, {b}", "u32 u32", "u32", lambda a, n: a >> min(n, 40)),
    ("shr.s32 {d}, {a}, {b}", "s32 u32", "s32", lambda a, n: a >> min(n, 40)),
    ("shr.s64 {d}, {a}, {b}", "s64 u32", "s64", lambda a, n: a >> min(n, 80)),
    ("bfe.u32 {d}, {a}, {b}, {c}", "u32 u32 u32", "u32", lambda a, p, n: field(a, p, n, 32, False)),
    ("bfe.s32 {d}, {a}, {b}, {c}", "b32 u32 u32", "b32", lambda a, p, n: field(a, p, n, 32, True)),
    ("bfe.u64 {d}, {a}, {b}, {c}", "u64 u32 u32", "u64", lambda a, p, n: field(a, p, n, 64, False)),
    ("bfe.s64 {d}, {a}, {b}, {c}", "b64 u32 u32", "b64", lambda a, p, n: field(a, p, n, 64, True)),
    ("bfi.b32 {d}, {a}, {b}, {c}, {e}", "b32 b32 u32 u32", "b32",
     lambda a, b, p, n: inserted(a, b, p, n, 32)),
    ("bfi.b64 {d}, {a}, {b}, {c}, {e}", "b64 b64 u32 u32", "b64",
     lambda a, b, p, n: inserted(a, b, p, n, 64)),
    ("bfind.u32 {d}, {a}", "u32", "u32", lambda a: a.bit_length() - 1),
    ("bfind.s32 {d}, {a}", "s32", "u32", lambda a: (a if a >= 0 else ~a).bit_length() - 1),
    ("bfind.shiftamt.u32 {d}, {a}", "u32", "u32", lambda a: leading(a, 32) if a else -1),
    ("brev.b32 {d}, {a}", "b32", "b32", lambda a: int(f"{a:032b}"[::-1], 2)),
    ("brev.b64 {d}, {a}", "b64", "b64", lambda a: int(f"{a:064b}"[::-1], 2)),
    ("clz.b32 {d}, {a}", "b32", "u32", lambda a: leading(a, 32)),
    ("clz.b64 {d}, {a}", "b64", "u32", lambda a: leading(a, 64)),
    ("popc.b64 {d}, {a}", "b64", "u32", lambda a: bin(a).count("1")),
    ("prmt.b32 {d}, {a}, {b}, {c}", "b32 b32 b32", "b32", permuted),
    ("lop3.b32 {d}, {a}, {b}, {c}, 0xCA", "b32 b32 b32", "b32", lambda a, b, c: a & b | ~a & c),
    ("lop3.b32 {d}, {a}, {b}, {c}, 0x96", "b32 b32 b32", "b32", lambda a, b, c: a ^ b ^ c),
    ("shf.l.wrap.b32 {d}, {a}, {b}, {c}", "b32 b32 u32", "b32",
     lambda a, b, n: funnel(a, b, n, True, False)),
    ("shf.r.clamp.b32 {d}, {a}, {b}, {c}", "b32 b32 u32", "b32",
     lambda a, b, n: funnel(a, b, n, False, True)),
    ("cvt.s32.s16 {d}, {a}", "s16", "s32", lambda a: a),
    ("cvt.u32.u16 {d}, {a}", "u16", "u32", lambda a: a),
    ("cvt.s64.s32 {d}, {a}", "s32", "s64", lambda a: a),
    ("cvt.u16.u32 {d}, {a}", "u32", "u16", lambda a: a),
    ("cvt.s32.s8 {d}, {a}", "u32", "s32", lambda a: signed(a & 255, "s8")),
    ("cvt.sat.s16.s32 {d}, {a}", "s32", "s16", lambda a: max(-(2**15), min(a, 2**15 - 1))),
    ("cvt.sat.u32.s64 {d}, {a}", "s64", "u32", lambda a: max(0, min(a, 2**32 - 1))),
    ("mov.b32 {d}, -5", "b32", "b32", lambda a: -5),
    ("mov.b64 %rd40, {{{a}, {b}}}; mov.b64 {{_, {d}}}, %rd40", "b32 b32", "b32", lambda a, b: b),
    ("mov.b32 {{%h1, %h2}}, {a}; mov.b32 {d}, {{%h2, %h1}}", "b32", "b32",
     lambda a: a >> 16 | a << 16),
    ("setp.lt.s32 %p1, {a}, {b}; selp.b32 {d}, {a}, {b}, %p1", "s32 s32", "s32", min),
    ("setp.ge.u32 %p1, {a}, {b}; selp.b32 {d}, {a}, {b}, %p1", "u32 u32", "u32", max),
    ("setp.hi.u32 %p1|%p2, {a}, {b}; selp.b32 {d}, {a}, {b}, %p2", "u32 u32", "u32", min),
    ("setp.eq.s32 %p0, {a}, 1; setp.lt.or.s32 %p1, {a}, {b}, !%p0; selp.u32 {d}, 1, 0, %p1",
     "s32 s32", "u32", lambda a, b: a < b or a != 1),
    ("set.gt.u32.s32 {d}, {a}, {b}", "s32 s32", "u32", lambda a, b: -1 if a > b else 0),
]  # fmt: skip


@pytest.mark.parametrize("case", INTEGERS, ids=lambda c: c[0].split(" {")[0])
def test_integer_instructions(case):
    instruction, in_kinds, out_kind, function = case
    in_kinds = in_kinds.split()
    inputs = [samples(kind, seed=i) for i, kind in enumerate(in_kinds)]
    if "u32 u32" in case[1] and instruction[:3] in ("bfe", "bfi"):
        inputs[-2:] = [[x % 70 for x in values] for values in inputs[-2:]]
    if instruction[:3] in ("div", "rem"):
        # Overflow and division by zero are left open by PTX.
        inputs[1] = [x if x not in (0, 2 ** bits_of(in_kinds[1]) - 1) else 5 for x in inputs[1]]
    for values in inputs[1:]:
        np.random.default_rng(7).shuffle(values)
    want = [
        function(*(signed(x, k) for x, k in zip(row, in_kinds, strict=True)))
        % 2 ** max(bits_of(out_kind), 16)
        for row in zip(*inputs, strict=True)
    ]
    assert apply(instruction, inputs, in_kinds, out_kind) == want


# ---- floating point: exact rationals, rounded once

# kind: (bits of the fraction, smallest exponent, largest finite number)
FORMATS = {
    "f64": (52, -1022, Fraction(2**53 - 1) * 2**971),
    "f32": (23, -126, Fraction(2**24 - 1) * 2**104),
    "tf32": (10, -126, Fraction(2**11 - 1) * 2**117),
    "f16": (10, -14, Fraction(65504)),
    "bf16": (7, -126, Fraction(2**8 - 1) * 2**120),
}
_STRUCT = {"f64": ("<Q", "<d"), "f32": ("<I", "<f"), "tf32": ("<I", "<f"), "f16": ("<H", "<e")}


def decode(bits, kind):
    if kind == "bf16":
        return decode(bits << 16, "f32")
    integer, floating = _STRUCT[kind]
    return struct.unpack(floating, struct.pack(integer, bits))[0]


def rounded(x, kind, ties="even"):
    """A Fraction or float to the nearest number of a format, as a float."""
    if isinstance(x, float) and not math.isfinite(x):
        return x
    fraction, lowest, largest = FORMATS[kind]
    q = Fraction(x)
    if q == 0:
        return x if isinstance(x, float) else 0.0
    exponent = max(math.floor(math.log2(abs(q))), lowest) if abs(q) < 2**1000 else 1000
    while abs(q) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while exponent > lowest and abs(q) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - fraction)
    steps = abs(q) / unit
    whole = math.floor(steps)
    rest = steps - whole
    half = Fraction(1, 2)
    if rest > half or (rest == half and (ties == "away" or whole % 2)):
        whole += 1
    value = whole * unit
    return math.copysign(float(value) if value <= largest else math.inf, q)


def encode(x, kind):
    if math.isnan(x):
        return {"f64": 0x7FF << 52 | 1, "f32": 0x7FFFFFFF, "f16": 0x7FFF, "bf16": 0x7FFF}[kind]
    if kind == "bf16":
        return encode(x, "f32") >> 16
    integer, floating = _STRUCT[kind]
    return struct.unpack(integer, struct.pack(floating, x))[0]


def float_samples(kind, count=96, seed=0):
    """Bits: zeros, subnormals, ones, huge, infinities, NaN, and numbers of all sizes."""
    n = 32 if kind == "tf32" else bits_of(kind)
    random = np.random.default_rng(seed)
    top = {"f64": 0x7FF << 52, "f32": 0x7F800000, "f16": 0x7C00, "bf16": 0x7F80}[kind]
    edges = [0, 1, 5, top - 1, top, top | 1 << (n - 1), 1 << (n - 1), top | 3, encode(1.0, kind)]
    moderate = [encode(rounded(float(x), kind), kind) for x in random.normal(size=count // 2)]
    wild = [int(x) for x in random.integers(0, 2**n, count - len(edges) - len(moderate), np.uint64)]
    found = edges + moderate + wild
    random.shuffle(found)
    return found


def same(got, want, kind):
    """NaN for NaN, else the same bits."""
    if math.isnan(want):
        return math.isnan(decode(got, kind))
    return got == encode(want, kind)


def finite(*xs):
    return all(map(math.isfinite, xs))


def exact(function):
    """Infinities and NaN as Python has them; else with fractions, where a zero keeps Python's
    sign.
    """

    def evaluate(*xs):
        try:
            plain = function(*xs)
        except (OverflowError, ZeroDivisionError):
            plain = math.nan
        if not finite(*xs):
            return plain
        result = function(*map(Fraction, xs))
        return result if result else math.copysign(0.0, plain)

    return evaluate


def smaller(a, b):
    return b if math.isnan(a) else a if math.isnan(b) else min(a, b)


def nan_or_max(a, b):
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


FLOATS = [
    ("add.f32 {d}, {a}, {b}", "f32 f32", "f32", exact(lambda a, b: a + b)),
    ("add.f64 {d}, {a}, {b}", "f64 f64", "f64", exact(lambda a, b: a + b)),
    ("sub.f32 {d}, {a}, {b}", "f32 f32", "f32", exact(lambda a, b: a - b)),
    ("mul.f32 {d}, {a}, {b}", "f32 f32", "f32", exact(lambda a, b: a * b)),
    ("mul.bf16 {d}, {a}, {b}", "bf16 bf16", "bf16", exact(lambda a, b: a * b)),
    ("add.f16 {d}, {a}, {b}", "f16 f16", "f16", exact(lambda a, b: a + b)),
    ("fma.rn.f32 {d}, {a}, {b}, {c}", "f32 f32 f32", "f32", exact(lambda a, b, c: a * b + c)),
    ("fma.rn.bf16 {d}, {a}, {b}, {c}", "bf16 bf16 bf16", "bf16", exact(lambda a, b, c: a * b + c)),
    ("min.f32 {d}, {a}, {b}", "f32 f32", "f32", smaller),
    ("max.NaN.f32 {d}, {a}, {b}", "f32 f32", "f32", nan_or_max),
    ("neg.f32 {d}, {a}", "f32", "f32", lambda a: -a),
    ("abs.f32 {d}, {a}", "f32", "f32", abs),
    ("copysign.f32 {d}, {a}, {b}", "f32 f32", "f32", lambda a, b: math.copysign(b, a)),
    ("add.sat.f32 {d}, {a}, {b}", "f32 f32", "f32",
     lambda a, b: 0.0 if math.isnan(a + b) else min(max(Fraction(a) + Fraction(b), 0), 1)
     if finite(a, b) else min(max(a + b, 0.0), 1.0)),
    ("cvt.rn.bf16.f32 {d}, {a}", "f32", "bf16", lambda a: a),
    ("cvt.rn.f16.f32 {d}, {a}", "f32", "f16", lambda a: a),
    ("cvt.f32.f16 {d}, {a}", "f16", "f32", lambda a: a),
    ("cvt.f32.bf16 {d}, {a}", "bf16", "f32", lambda a: a),
    ("cvt.rn.f32.f64 {d}, {a}", "f64", "f32", lambda a: a),
    ("cvt.f64.f32 {d}, {a}", "f32", "f64", lambda a: a),
    ("cvt.rmi.f32.f32 {d}, {a}", "f32", "f32",
     lambda a: math.copysign(math.floor(a), a) if finite(a) else a),
    ("cvt.rn.f32.s32 {d}, {a}", "s32", "f32", Fraction),
    ("cvt.rn.f32.u64 {d}, {a}", "u64", "f32", Fraction),
    ("cvt.rn.f64.s64 {d}, {a}", "s64", "f64", Fraction),
    ("cvt.rn.f16.s32 {d}, {a}", "s32", "f16", Fraction),
    ("cvt.rn.bf16.u32 {d}, {a}", "u32", "bf16", Fraction),
]  # fmt: skip


@pytest.mark.parametrize("case", FLOATS, ids=lambda c: c[0].split(" {")[0])
def test_floating_point_instructions(case):
    instruction, in_kinds, out_kind, function = case
    in_kinds = in_kinds.split()
    floating = [k in FORMATS for k in in_kinds]
    inputs = [
        float_samples(k, seed=i) if f else samples(k, seed=i)
        for i, (k, f) in enumerate(zip(in_kinds, floating, strict=True))
    ]
    got = apply(instruction, inputs, in_kinds, out_kind)
    for bits, row in zip(got, zip(*inputs, strict=True), strict=True):
        values = [
            decode(x, k) if f else signed(x, k)
            for x, k, f in zip(row, in_kinds, floating, strict=True)
        ]
        want = rounded(function(*values), out_kind)
        if want == 0 and instruction[:3] == "min":
            continue  # which zero is left open here
        assert same(bits, want, out_kind), (values, want, decode(bits, out_kind))


@pytest.mark.parametrize(
    "name, function",
    [
        ("ex2.approx.f32", lambda x: 2.0**x),
        ("lg2.approx.f32", math.log2),
        ("rcp.approx.f32", lambda x: 1 / x),
        ("rsqrt.approx.f32", lambda x: x**-0.5),
        ("sqrt.rn.f32", math.sqrt),
        ("sin.approx.f32", math.sin),
        ("cos.approx.f32", math.cos),
        ("tanh.approx.f32", math.tanh),
    ],
)
def test_functions(name, function):
    """Within two units of the last place, or of the result at 1, which the hardware is not better
    than.
    """
    x = np.random.default_rng(0).uniform(0.01, 4, 96).astype(np.float32)
    got = apply(name + " {d}, {a}", [x.view(np.uint32).tolist()], ["f32"], "f32")
    got = np.array(got, np.uint32).view(np.float32)
    want = np.array([function(float(v)) for v in x])
    assert np.all(np.abs(got - want) <= 2**-22 * np.maximum(np.abs(want), 1))


def test_division_is_rounded_once():
    a, b = (float_samples("f32", seed=i) for i in (1, 2))
    got = apply("div.full.f32 {d}, {a}, {b}", [a, b], ["f32", "f32"], "f32")
    for bits, x, y in zip(got, a, b, strict=True):
        x, y = decode(x, "f32"), decode(y, "f32")
        if finite(x, y) and x and y:
            assert same(bits, rounded(Fraction(x) / Fraction(y), "f32"), "f32")


def test_comparisons_with_nan():
    """Ordered comparisons are false for NaN, unordered ones true."""
    a, b = (float_samples("f32", seed=i) for i in (1, 2))
    a[:8] = b[:8]
    table = {
        "eq": lambda x, y: x == y, "ne": lambda x, y: x < y or x > y, "lt": lambda x, y: x < y,
        "ge": lambda x, y: x >= y, "num": lambda x, y: x == x and y == y,
        "nan": lambda x, y: x != x or y != y, "ltu": lambda x, y: not x >= y,
        "equ": lambda x, y: not (x < y or x > y), "neu": lambda x, y: x != y,
    }  # fmt: skip
    for name, function in table.items():
        text = f"setp.{name}.f32 %p1, {{a}}, {{b}}; selp.u32 {{d}}, 1, 0, %p1"
        got = apply(text, [a, b], ["f32", "f32"], "u32")
        want = [
            int(function(decode(x, "f32"), decode(y, "f32"))) for x, y in zip(a, b, strict=True)
        ]
        assert got == want, name


def test_conversion_to_integers_saturates():
    x = float_samples("f32", count=200)
    modes = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    for mode, kind in itertools.product(modes, ("s32", "u32", "s64", "s16")):
        n = bits_of(kind)
        low, high = (-(2 ** (n - 1)), 2 ** (n - 1) - 1) if kind[0] == "s" else (0, 2**n - 1)
        want = []
        for bits in x:
            v = decode(bits, "f32")
            whole = 0 if math.isnan(v) else modes[mode](v) if finite(v) else v
            want.append(int(max(low, min(whole, high))) % 2**n)
        got = apply(f"cvt.{mode}.{kind}.f32 {{d}}, {{a}}", [x], ["f32"], kind)
        assert got == want, (mode, kind)


def test_tf32_rounds_ties_away():
    x = [b for b in float_samples("f32") if finite(decode(b, "f32"))] + [0x3F801000, 0x3F803000]
    x = [b for b in x if abs(decode(b, "f32")) < 1e38]
    got = apply("cvt.rna.tf32.f32 {d}, {a}", [x], ["f32"], "b32")
    want = [encode(rounded(decode(b, "f32"), "tf32", ties="away"), "f32") for b in x]
    assert got == want


def test_pairs_of_16_bits():
    """The first source goes to the upper half."""
    high, low = (float_samples("f32", seed=i) for i in (1, 2))
    for kind in ("bf16", "f16"):
        got = apply(f"cvt.rn.{kind}x2.f32 {{d}}, {{a}}, {{b}}", [high, low], ["f32"] * 2, "b32")
        for bits, x, y in zip(got, high, low, strict=True):
            assert same(bits >> 16, rounded(decode(x, "f32"), kind), kind)
            assert same(bits & 0xFFFF, rounded(decode(y, "f32"), kind), kind)
        x, y = (float_samples(kind, seed=i) for i in (3, 4))
        pairs = [[p | q << 16 for p, q in zip(v, w, strict=True)] for v, w in ((x, y), (y, x))]
        for name, function in (("add", lambda a, b: a + b), ("mul", lambda a, b: a * b)):
            got = apply(f"{name}.{kind}x2 {{d}}, {{a}}, {{b}}", pairs, [f"{kind}x2"] * 2, "b32")
            for bits, p, q in zip(got, x, y, strict=True):
                want = rounded(exact(function)(decode(p, kind), decode(q, kind)), kind)
                assert same(bits & 0xFFFF, want, kind) and same(bits >> 16, want, kind)


def float8(code, kind):
    exponent_bits, bias = (4, 7) if kind == "e4m3" else (5, 15)
    fraction_bits = 7 - exponent_bits
    sign = -1.0 if code & 128 else 1.0
    exponent, fraction = (code & 127) >> fraction_bits, code & (1 << fraction_bits) - 1
    if kind == "e4m3" and code & 127 == 127:
        return math.nan
    if kind == "e5m2" and exponent == 31:
        return math.nan if fraction else sign * math.inf
    if exponent == 0:
        return sign * fraction * 2.0 ** (1 - bias - fraction_bits)
    return sign * (1 + fraction / (1 << fraction_bits)) * 2.0 ** (exponent - bias)


@pytest.mark.parametrize("kind", ("e4m3", "e5m2"))
def test_8_bit_floats(kind):
    codes = list(range(256))
    got = apply(
        f"cvt.rn.f16x2.{kind}x2 {{d}}, {{a}}", [[c | c << 8 for c in codes]], [f"{kind}x2"], "b32"
    )
    for bits, code in zip(got, codes, strict=True):
        assert same(bits & 0xFFFF, float8(code, kind), "f16")
        assert same(bits >> 16, float8(code, kind), "f16")
    # To nearest even among all numbers, saturating.
    numbers = sorted((float8(c, kind), c) for c in range(128) if math.isfinite(float8(c, kind)))
    largest = numbers[-1][0]
    x = np.random.default_rng(0).normal(size=96) * largest / 3
    x[:2] = 0.0, largest * 4
    x[2:4] = [(numbers[i][0] + numbers[i + 1][0]) / 2 for i in (10, 11)]  # ties
    bits = x.astype(np.float32).view(np.uint32).tolist()
    got = apply(f"cvt.rn.satfinite.{kind}x2.f32 {{d}}, {{a}}, {{a}}", [bits], ["f32"], f"{kind}x2")
    for pair, b in zip(got, bits, strict=True):
        v = abs(decode(b, "f32"))
        want = min(numbers, key=lambda n: (abs(n[0] - min(v, largest)), n[1] % 2))[1]
        assert pair & 127 == want and pair >> 8 & 127 == want and pair >> 7 & 1 == b >> 31
