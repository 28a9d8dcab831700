"""The C++ kernels below the operators, on numpy arrays: row mathematics, conversions, products.

``tests/cpp/raw_kernels.cpp`` exposes them through pybind11.  It is built here, once per ISA level
and change of the sources, and kept in pytest's cache; each level of this processor is tested.
"""

import ast
import hashlib
import importlib.util
import itertools
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import moelora_ops
from moelora_ops.reference import philox

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "tests/cpp/raw_kernels.cpp"

# ---- building


def level_flags():
    """``LEVELS`` of setup.py, which cannot be imported: it builds."""
    scope = {"platform": platform}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign | ast.If) and re.search("AVX|LEVELS", ast.unparse(node)):
            exec(compile(ast.Module([node], []), "setup.py", "exec"), scope)
    return scope["LEVELS"]


FLAGS = level_flags()
LEVELS = [level for level in ("portable", "avx2", "avx512_bf16") if level in FLAGS]
# The highest level has the most code of its own; it alone is also built with the sanitizer.
SANITIZED = f"{LEVELS[-1]}_sanitized"
# Without the checks that slow the build of pybind11's code the most and say little about ours.
SANITIZE = [
    "-fsanitize=undefined", "-fno-sanitize=null,vptr,object-size", "-fno-sanitize-recover=all",
]  # fmt: skip


@pytest.fixture(scope="session")
def modules(request, tmp_path_factory):
    """Path of the built module by level."""
    candidates = filter(None, (os.environ.get("CXX"), "c++", "g++"))  # as setup.py looks
    compiler = next((c for c in map(shlex.split, candidates) if shutil.which(c[0])), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    pytest.importorskip("pybind11")
    includes = subprocess.run(
        [sys.executable, "-m", "pybind11", "--includes"], check=True, capture_output=True, text=True
    ).stdout.split()
    command = [
        *compiler, "-O1", "-w", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden",
        "-ffp-contract=fast", "-D_GLIBCXX_ASSERTIONS", f"-I{ROOT / 'csrc'}", *includes, str(SOURCE),
    ]  # fmt: skip
    read = [SOURCE, *sorted((ROOT / "csrc").rglob("*.h"))]
    key = [repr((command, FLAGS, SANITIZE, sys.version)).encode(), *(p.read_bytes() for p in read)]
    digest = hashlib.sha256(b"\0".join(key)).hexdigest()[:16]
    cache = getattr(request.config, "cache", None)  # absent under -p no:cacheprovider
    folder = cache.mkdir("raw_kernels") if cache else tmp_path_factory.mktemp("raw_kernels")
    for old in folder.iterdir():
        if digest not in old.name:
            old.unlink()
    paths, running = {}, []
    for level in [SANITIZED, *reversed(LEVELS)]:
        name = f"raw_{level}_{digest}"
        paths[level] = folder / f"{name}.so"
        if paths[level].exists():
            continue
        base = level.removesuffix("_sanitized")
        flags = [*FLAGS[base], *(SANITIZE if level == SANITIZED else [])]
        target = folder / f"{name}.{os.getpid()}.tmp"
        defines = [f"-DMOELORA_LEVEL={base}", f"-DMOELORA_MODULE={name}"]
        process = subprocess.Popen(
            [*command, *flags, *defines, "-o", str(target)], stderr=subprocess.PIPE, text=True
        )
        running.append((process, target, paths[level]))
    for process, target, path in running:
        errors = process.communicate()[1]
        if process.returncode and path == paths[SANITIZED] and "ubsan" in errors:
            continue  # the compiler came without the sanitizer's library
        assert process.returncode == 0, errors
        target.replace(path)
    return paths


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def levels_here(modules):
    return load(modules["portable"]).levels_here()


@pytest.fixture(scope="session", params=LEVELS)
def raw(request, modules, levels_here):
    """The raw kernels of one level."""
    if request.param not in levels_here:
        pytest.skip(f"this processor lacks {request.param}")
    return load(modules[request.param])


# ---- element types

TYPES = ("float32", "bfloat16")  # of the products
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float64": 2.0**-53}
ALL_BITS = np.arange(65536, dtype=np.uint16)


def to_bits(values, dtype):
    """float32 values as what a kernel of ``dtype`` takes."""
    if dtype == "float32":
        return values
    return torch.from_numpy(values).to(HALVES[dtype]).view(torch.uint16).numpy()


def to_float64(bits, dtype):
    if dtype == "float32":
        return bits.astype(np.float64)
    return torch.from_numpy(bits.copy()).view(HALVES[dtype]).double().numpy()


def normal(rng, shape, dtype):
    """Random values of ``dtype`` as the kernel takes them, and in float64."""
    bits = to_bits(rng.standard_normal(shape, dtype=np.float32), dtype)
    return bits, to_float64(bits, dtype)


def coefficients(rng, shape):
    """float32, but exact in bfloat16, to which only the bf16 level rounds coefficients."""
    _, exact = normal(rng, shape, "bfloat16")
    return exact.astype(np.float32), exact


class Guarded:
    """A matrix inside a larger one; NaN where it will be written, a pattern around that must stay.

    With ``before``, what the matrix holds at first instead of NaN.
    """

    PATTERN = 0x5A

    def __init__(self, rows, columns, dtype, before=None):
        storage = np.dtype(np.float32 if dtype == "float32" else np.uint16)
        self.whole = np.full((rows + 2, columns + 35), self.PATTERN, np.uint8).repeat(
            storage.itemsize, 1
        ).view(storage)  # fmt: skip
        self.view = self.whole[1:-1, 17 : 17 + columns]
        self.view[:] = (np.nan if dtype == "float32" else 0x7FC0) if before is None else before
        self.dtype = dtype

    def result(self):
        """What was written, in float64."""
        around = np.ones(self.whole.shape, bool)
        around[1:-1, 17 : 17 + self.view.shape[1]] = False
        outside = np.ascontiguousarray(self.whole[around]).view(np.uint8)
        assert (outside == self.PATTERN).all(), "wrote outside of the output"
        return to_float64(self.view, self.dtype)


def assert_close(got, want, magnitude, terms, dtype):
    """The rounding bound of a float32 sum of ``terms`` products, then one rounding to ``dtype``.

    want       float64
    magnitude  the same sum over absolute values
    """
    sums = (terms + 4) * 2 * ROUNDOFF["float32"] * magnitude
    rounding = ROUNDOFF[dtype] * (np.abs(want) + sums)
    assert np.isfinite(got).all()
    assert (np.abs(got - want) <= sums + rounding + 1e-37).all()


# ---- conversions


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("convert", ["widen", "load"])
def test_every_half_widens_as_in_torch(raw, convert, dtype):
    want = torch.from_numpy(ALL_BITS).view(HALVES[dtype]).float().numpy()
    got = getattr(raw, f"{convert}_{dtype}")(ALL_BITS)
    nan = np.isnan(want)
    assert (np.isnan(got) == nan).all()
    assert (got.view(np.uint32)[~nan] == want.view(np.uint32)[~nan]).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("convert", ["narrow", "store"])
def test_every_half_survives_the_round_trip(raw, convert, dtype):
    values = getattr(raw, f"widen_{dtype}")(ALL_BITS)
    back = getattr(raw, f"{convert}_{dtype}")(values)
    nan = np.isnan(values)
    # The bf16 instruction takes subnormals for zero, with their sign.
    flushed = (np.abs(values) < 2.0**-126) & (dtype == "bfloat16" and convert == "store")
    exact = ~nan & ~flushed
    assert (back[exact] == ALL_BITS[exact]).all()
    for bits in np.unique(ALL_BITS[flushed & (back != ALL_BITS)]):
        assert back[bits] == bits & 0x8000
    assert np.isnan(to_float64(back[nan], dtype)).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("convert", ["narrow", "store"])
def test_float32_rounds_as_in_torch(raw, convert, dtype):
    # Every pair of neighbouring halves: their middle, and the float32 on either side of it.
    halves = torch.from_numpy(ALL_BITS).view(HALVES[dtype]).double().numpy()
    positive = halves[: 0x7C00 if dtype == "float16" else 0x7F80]
    largest = positive[-1]
    above = np.append(positive[1:], 2 * largest - positive[-2])
    with np.errstate(over="ignore"):
        middle = ((positive + above) / 2).astype(np.float32)
    rng = np.random.default_rng(0)
    random = rng.integers(0, 1 << 32, 1 << 20, dtype=np.uint32).view(np.float32)
    corner = np.array([0.0, np.inf, np.nan, 1e-45, 1.1754942e-38, 3.4028235e38], np.float32)
    values = np.concatenate(
        [np.nextafter(middle, np.float32(0)), middle, np.nextafter(middle, np.float32(np.inf)),
         positive.astype(np.float32), random, corner]
    )  # fmt: skip
    values = np.concatenate([values, -values])
    values = values[: len(values) // 16 * 16]
    want = torch.from_numpy(values).to(HALVES[dtype]).view(torch.uint16).numpy()
    got = getattr(raw, f"{convert}_{dtype}")(values)
    nan = np.isnan(values)
    assert np.isnan(to_float64(got[nan], dtype)).all()
    flushed = (np.abs(values) < 2.0**-126) & (dtype == "bfloat16" and convert == "store")
    wrong = ~nan & (got != want) & ~(flushed & (got == want & 0x8000))
    assert not wrong.any(), (values[wrong][:5], got[wrong][:5], want[wrong][:5])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("count", [1, 3, 4, 7, 15, 17, 31])
def test_partial_loads(raw, dtype, count):
    bits = ALL_BITS[15000 : 15000 + count]
    want = torch.from_numpy(bits).view(HALVES[dtype]).float().numpy()
    assert (getattr(raw, f"load_{dtype}")(bits) == want).all()


# ---- Philox


@pytest.mark.parametrize("seed", [0, -1, 0x1234567890ABCDE, -(2**63)])
def test_philox_words(raw, seed):
    for group, token, expert in [(0, 0, 0), (7, 2**32 + 5, 3), (2**32 - 16, 2**40 - 1, 127)]:
        counter = [
            torch.arange(group, group + 16), torch.tensor(token & 0xFFFFFFFF), torch.tensor(expert),
            torch.tensor(token >> 32),
        ]  # fmt: skip
        want = torch.stack(philox.philox4x32(torch.tensor(seed), counter)).numpy()
        assert (raw.philox_words_16(seed, group, token, expert) == want).all()
        assert (raw.philox_words_1(seed, group, token, expert) == want[:, :1]).all()


# Known answers published with the authors' Random123 library: counter and key all zeros, all ones.
def test_philox_known_answers(raw):
    zeros = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert raw.philox_words_1(0, 0, 0, 0).ravel().tolist() == zeros
    most = 2**32 - 1
    assert raw.philox_words_1(-1, most, 2**64 - 1, most).ravel().tolist() == ones


# ---- exp and the order of floats


def test_exp_is_within_its_bound(raw):
    x = np.concatenate(
        [np.linspace(-87, 0, 3_000_001), -np.logspace(-44, 1.9, 500_001),
         np.arange(-125, 1) * math.log(2)]
    ).astype(np.float32)  # fmt: skip
    x = x[x >= -87]
    want = np.exp(x.astype(np.float64))
    ulp = np.spacing(want.astype(np.float32)).astype(np.float64)
    assert (np.abs(raw.exp_nonpositive_float32(x) - want) / ulp).max() <= 1.2
    x = np.linspace(-110, 0, 100_001)
    assert np.allclose(
        raw.exp_nonpositive_float64(x), np.exp(x), rtol=4 * ROUNDOFF["float64"], atol=0
    )


def test_exp_special_values(raw):
    below = np.concatenate(
        [np.linspace(-110, np.nextafter(np.float32(-87), -100), 1001), [-3e38, -np.inf]]
    )
    for dtype in (np.float32, np.float64):
        exp = getattr(raw, f"exp_nonpositive_{np.dtype(dtype)}")
        assert exp(np.array([0.0, -0.0, -1e-30], dtype)).tolist() == [1, 1, 1]
        assert np.isnan(exp(np.array([np.nan, -np.nan], dtype))).all()
        assert exp(np.array([-np.inf], dtype)) == 0
    assert (raw.exp_nonpositive_float32(below.astype(np.float32)) == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_order_key(raw, dtype):
    key = getattr(raw, f"order_key_{dtype}")
    tiny, huge = np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 256, 8 * 4096, dtype=np.uint8).view(dtype)
    ordered = np.unique(
        np.concatenate([bits[~np.isnan(bits)], [-np.inf, -huge, -tiny, 0, tiny, huge, np.inf]])
    )
    keys = key(ordered.astype(dtype)).astype(object)
    assert all(a < b for a, b in itertools.pairwise(keys))
    zeros = key(np.array([0.0, -0.0], dtype))
    assert zeros[0] == zeros[1]
    nans = key(np.array([np.nan, -np.nan], dtype))
    assert (nans == np.iinfo(nans.dtype).max).all() and nans[0] > keys[-1]


# ---- the topk mix


def choose(logits, k):
    """The definition: NaN first, then larger logits; ties to the lower index."""
    return sorted(range(len(logits)), key=lambda e: (logits[e] == logits[e], -logits[e], e))[:k]


def softmax(logits, largest):
    with np.errstate(all="ignore"):
        e = np.exp(logits.astype(np.float64) - np.float64(largest))
        return e / e.sum()


def probability_error(logits, largest, dtype):
    """Relative: rounding the argument of exp moves it by that much of its size."""
    with np.errstate(all="ignore"):
        distance = np.abs(logits.astype(np.float64) - np.float64(largest))
    return (
        (np.where(np.isfinite(distance), np.minimum(distance, 800), 0) + len(logits) + 8)
        * 2
        * ROUNDOFF[dtype]
    )


SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 2.5, -90.0]


@st.composite
def logits_rows(draw):
    dtype = draw(st.sampled_from(["float32", "float64"]))
    E = draw(st.integers(1, 130))
    numbers = draw(st.sampled_from([
        st.sampled_from(SPECIAL), st.sampled_from(SPECIAL[3:]),
        st.floats(-20, 20, width=32), st.floats(width=32),
    ]))  # fmt: skip
    logits = draw(arrays.arrays(dtype, E, elements=numbers, fill=numbers))
    return logits, draw(st.one_of(st.integers(1, E), st.just(E)))


@pytest.mark.parametrize("renormalize", [True, False])
def test_topk_forward_row(raw, renormalize):
    @settings(max_examples=150, deadline=None, database=None)
    @given(logits_rows())
    @example((np.full(130, np.nan, np.float32), 130))
    @example((np.full(5, -np.inf, np.float32), 5))
    @example((np.array([-0.0, 0.0, -0.0], np.float32), 3))
    @example((np.array([3e38, -3e38], np.float32), 2))
    def check(case):
        logits, k = case
        forward = getattr(raw, f"topk_forward_row_{logits.dtype}")
        selected, weights, probs = forward(logits, k, renormalize)
        assert selected.tolist() == choose(logits.tolist(), k)
        largest = logits[selected[0]]
        want = softmax(logits, largest)
        error = probability_error(logits, largest, str(logits.dtype))
        np.testing.assert_array_equal(np.isnan(probs), np.isnan(want))
        tiny = 1e-37 if logits.dtype == np.float32 else 1e-300
        ok = ~np.isnan(want)
        assert (np.abs(probs - want) <= error * want + tiny)[ok].all()
        with np.errstate(all="ignore"):
            chosen = want[selected]
            want_weights = chosen / chosen.sum() if renormalize else chosen
        np.testing.assert_array_equal(np.isnan(weights), np.isnan(want_weights))
        ok = ~np.isnan(want_weights)
        assert (np.abs(weights - want_weights) <= 2 * error[selected] * want_weights + tiny)[
            ok
        ].all()
        np.testing.assert_array_equal(getattr(raw, f"softmax_row_{logits.dtype}")(logits), probs)

    check()


def finite_difference(f, x, step=1e-5):
    return np.array([(f(x + step * d) - f(x - step * d)) / (2 * step) for d in np.eye(len(x))])


@pytest.mark.parametrize("E,k", [(1, 1), (4, 1), (8, 2), (8, 8), (33, 5)])
def test_backward_rows_are_derivatives(raw, E, k):
    rng = np.random.default_rng(E + k)
    # Well apart, so that no step changes what is selected.
    logits = rng.permutation(E) * 0.3 + rng.uniform(0, 0.1, E)
    dweights, dprobs, before = (
        rng.standard_normal(k),
        rng.standard_normal(E),
        rng.standard_normal(E),
    )
    selected, weights, probs = raw.topk_forward_row_float64(logits, k, True)

    dlogits = np.zeros(E)
    dlogits[selected] = raw.topk_backward_selected_float64(weights, dweights)
    want = finite_difference(
        lambda l: raw.topk_forward_row_float64(l, k, True)[1] @ dweights, logits
    )
    np.testing.assert_allclose(dlogits, want, rtol=0, atol=1e-9)
    single = raw.topk_backward_selected_float32(
        weights.astype(np.float32), dweights.astype(np.float32)
    )
    np.testing.assert_allclose(single, dlogits[selected], rtol=0, atol=1e-5)

    dlogits = before.copy()
    raw.softmax_backward_row_float64(probs, dprobs, dlogits)  # adds
    want = finite_difference(lambda l: raw.softmax_row_float64(l) @ dprobs, logits)
    np.testing.assert_allclose(dlogits - before, want, rtol=0, atol=1e-9)
    single = before.astype(np.float32)
    raw.softmax_backward_row_float32(probs.astype(np.float32), dprobs.astype(np.float32), single)
    np.testing.assert_allclose(single, dlogits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("r", [1, 3, 8, 64])
def test_dweight_row(raw, r, dtype):
    rng = np.random.default_rng(r)
    a, b = rng.standard_normal((2, r)).astype(dtype)
    got = getattr(raw, f"dweight_row_{dtype}")(a, b, 0.75)
    products = 0.75 * a.astype(np.float64) * b
    assert abs(got - products.sum()) <= (r + 2) * ROUNDOFF[dtype] * np.abs(products).sum()


# ---- the skinny products

SIZES = st.integers(1, 200)
FEW = st.integers(1, 20)
ragged = settings(max_examples=40, deadline=None, database=None)


def column_range(c0, columns):
    """Columns [c0, c1) that a thread might get: c0 is a multiple of 8."""
    c0 = min(c0, columns - 1) // 8 * 8
    return c0, columns


@pytest.mark.parametrize("dtype", TYPES)
def test_shrink(raw, dtype):
    @ragged
    @given(FEW, SIZES, FEW, st.integers(0, 99))
    def check(tokens, K, rows, seed):
        rng = np.random.default_rng(seed)
        (x, x64), (w, w64) = normal(rng, (tokens, K), dtype), normal(rng, (rows, K), dtype)
        out = Guarded(tokens, rows, "float32")
        getattr(raw, f"shrink_{dtype}")(x, w, out.view)
        assert_close(out.result(), x64 @ w64.T, np.abs(x64) @ np.abs(w64).T, K, "float32")
        # One token's bits do not depend on its neighbours, one row's not on the others.
        alone = np.empty((1, rows), np.float32)
        getattr(raw, f"shrink_{dtype}")(x[-1:], w, alone)
        assert (alone == out.view[-1:]).all()

    check()


# Tokens of one lane, of several vectors, of a whole block and a remainder, of more than one.
LINEAR_TOKENS = st.integers(1, 20) | st.integers(21, 150)


@pytest.mark.parametrize("kernel", ("small_linear", "linear"))
@pytest.mark.parametrize("dtype", TYPES)
def test_linear(raw, dtype, kernel):
    @ragged
    @given(
        FEW if kernel == "small_linear" else LINEAR_TOKENS,
        SIZES, SIZES, st.integers(0, 199), st.booleans(), st.integers(0, 99),
    )  # fmt: skip
    @example(19, 4099, 50, 0, True, 0)  # longer than what is summed at a time
    def check(tokens, K, N, n0, with_bias, seed):
        rng = np.random.default_rng(seed)
        (x, x64), (w, w64), (b, b64) = (normal(rng, s, dtype) for s in ((tokens, K), (N, K), N))
        n0 = min(n0, N - 1)
        y = Guarded(tokens, N, dtype)
        getattr(raw, f"{kernel}_{dtype}")(x, w, b if with_bias else None, n0, N, y.view)
        got = y.result()
        assert np.isnan(got[:, :n0]).all()  # columns of other threads
        add = b64 if with_bias else 0 * b64
        want, magnitude = x64 @ w64.T + add, np.abs(x64) @ np.abs(w64).T + np.abs(add)
        assert_close(got[:, n0:], want[:, n0:], magnitude[:, n0:], K + 1, dtype)

    check()


@pytest.mark.parametrize("dtype", TYPES)
def test_linear_backward(raw, dtype):
    @ragged
    @given(LINEAR_TOKENS, SIZES, SIZES, st.integers(0, 199), st.integers(0, 99))
    @example(19, 4099, 70, 0, 0)
    def check(tokens, N, K, c0, seed):
        rng = np.random.default_rng(seed)
        (dy, dy64), (w, w64) = (normal(rng, s, dtype) for s in ((tokens, N), (N, K)))
        c0 = min(c0, K - 1)
        dx = Guarded(tokens, K, dtype)
        getattr(raw, f"linear_backward_{dtype}")(dy, w, c0, K, dx.view)
        got = dx.result()
        assert np.isnan(got[:, :c0]).all()
        want, magnitude = dy64 @ w64, np.abs(dy64) @ np.abs(w64)
        assert_close(got[:, c0:], want[:, c0:], magnitude[:, c0:], N, dtype)

    check()


@pytest.mark.parametrize("dtype", TYPES)
def test_linear_without_terms(raw, dtype):
    """Zero features sum to zero, whatever scratch held before."""
    w, _ = normal(np.random.default_rng(0), (70, 0), dtype)
    x, _ = normal(np.random.default_rng(0), (20, 0), dtype)
    y = Guarded(20, 70, dtype)
    getattr(raw, f"linear_{dtype}")(x, w, None, 0, 70, y.view)
    assert (y.result() == 0).all()


def check_expand(dtype, tokens, C, c0, mode, rng, call, weighted):
    """``call(c0, c1, bias, accumulate, y)`` against ``weighted``.

    weighted: Σ h row and Σ |h row|, ``[tokens, C]`` each, and the number of terms.
    """
    c0, c1 = column_range(c0, C)
    (bias, bias64), (before, before64) = normal(rng, C, dtype), normal(rng, (tokens, C), dtype)
    start = {"write": 0 * before64, "bias": bias64 + 0 * before64, "accumulate": before64}[mode]
    y = Guarded(tokens, C, dtype, before if mode == "accumulate" else None)
    call(c0, c1, bias if mode == "bias" else None, mode == "accumulate", y.view)
    got = y.result()
    outside = got[:, :c0]
    assert (outside == before64[:, :c0]).all() if mode == "accumulate" else np.isnan(outside).all()
    want, magnitude, terms = weighted
    want, magnitude = want + start, magnitude + np.abs(start)
    assert_close(got[:, c0:], want[:, c0:], magnitude[:, c0:], terms + 1, dtype)


MODES = st.sampled_from(["write", "bias", "accumulate"])


@pytest.mark.parametrize("dtype", TYPES)
def test_expand_sparse(raw, dtype):
    @ragged
    @given(FEW, SIZES, st.integers(0, 199), FEW, st.integers(1, 4), MODES, st.integers(0, 99))
    def check(tokens, C, c0, r, slots, mode, seed):
        rng = np.random.default_rng(seed)
        groups = 5
        rows, rows64 = normal(rng, (groups * r, C), dtype)
        chosen = rng.integers(0, groups, (tokens, slots), dtype=np.int32)
        h, h64 = coefficients(rng, (tokens, slots * r))
        index = (chosen[:, :, None] * r + np.arange(r)).reshape(tokens, -1)
        terms = h64[:, :, None] * rows64[index]
        check_expand(
            dtype, tokens, C, c0, mode, rng,
            lambda *rest: getattr(raw, f"expand_sparse_{dtype}")(rows, r, chosen, h, *rest),
            (terms.sum(1), np.abs(terms).sum(1), slots * r),
        )  # fmt: skip

    check()


@pytest.mark.parametrize("dtype", TYPES)
def test_expand_dense(raw, dtype):
    @ragged
    @given(FEW, SIZES, st.integers(0, 199), FEW, MODES, st.integers(0, 99))
    def check(tokens, C, c0, R, mode, seed):
        rng = np.random.default_rng(seed)
        rows, rows64 = normal(rng, (R, C), dtype)
        h, h64 = coefficients(rng, (tokens, R))
        check_expand(
            dtype, tokens, C, c0, mode, rng,
            lambda *rest: getattr(raw, f"expand_dense_{dtype}")(rows, h, *rest),
            (h64 @ rows64, np.abs(h64) @ np.abs(rows64), R),
        )  # fmt: skip

    check()


@pytest.mark.parametrize("dtype", TYPES)
def test_expand_masked(raw, dtype):
    @ragged
    @given(FEW, SIZES, st.integers(0, 199), FEW, st.integers(1, 4), MODES, st.integers(0, 99))
    def check(tokens, C, c0, r, segments, mode, seed):
        rng = np.random.default_rng(seed)
        rows, rows64 = normal(rng, (2 * r, C), dtype)
        entry = rng.integers(0, 2 * r, (tokens, segments * r), dtype=np.int32)
        experts = rng.integers(0, 9, (tokens, segments), dtype=np.int32)
        h, h64 = coefficients(rng, entry.shape)
        keep = [philox.keep_mask(torch.tensor([seed]), tokens, C, 0.4, e).numpy() for e in range(9)]
        mask = np.array([[keep[e][t] for e in row] for t, row in enumerate(experts)])
        terms = h64[:, :, None] * rows64[entry] * mask.repeat(r, 1)
        check_expand(
            dtype, tokens, C, c0, mode, rng,
            lambda *rest: getattr(raw, f"expand_masked_{dtype}")(
                rows, entry, h, seed, 0.4, experts, *rest
            ),
            (terms.sum(1), np.abs(terms).sum(1), segments * r + segments),
        )  # fmt: skip

    check()


@pytest.mark.parametrize("dtype", TYPES)
def test_outer(raw, dtype):
    @ragged
    @given(FEW, SIZES, st.integers(0, 199), FEW, st.integers(0, 99))
    def check(tokens, C, c0, rows, seed):
        rng = np.random.default_rng(seed)
        c0, c1 = column_range(c0, C)
        v, v64 = normal(rng, (tokens, C), dtype)
        h, h64 = coefficients(rng, (tokens, rows))
        before = rng.standard_normal((rows, c1 - c0), dtype=np.float32)
        out = Guarded(rows, c1 - c0, "float32", before)
        getattr(raw, f"outer_{dtype}")(v, h, c0, c1, out.view)
        want, magnitude = h64.T @ v64, np.abs(h64).T @ np.abs(v64)
        want, magnitude = want[:, c0:] + before, magnitude[:, c0:] + np.abs(before)
        assert_close(out.result(), want, magnitude, tokens + 1, "float32")

    check()


# ---- reads past the end

# Every operand ends where a page ends, and the next page cannot be read.
PAGE_END = """
import ctypes, importlib.util, mmap, sys
import numpy as np
spec = importlib.util.spec_from_file_location(sys.argv[1], sys.argv[2])
raw = importlib.util.module_from_spec(spec)
spec.loader.exec_module(raw)
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
SPACE = 16 * mmap.PAGESIZE
free = []
def at_page_end(a):
    region = free.pop() if free else mmap.mmap(-1, SPACE + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    assert libc.mprotect(address + SPACE, mmap.PAGESIZE, 0) == 0
    out = np.frombuffer(region, a.dtype, a.size, SPACE - a.nbytes).reshape(a.shape)
    out[...] = a
    used.append(region)
    return out
def run(kernel, *args):
    def once(place):
        placed = [place(a) if isinstance(a, np.ndarray) else a for a in args]
        getattr(raw, kernel)(*placed)
        return placed[-1].tobytes()
    assert once(np.copy) == once(at_page_end), kernel
rng = np.random.default_rng(0)
def normal(*shape):
    return rng.standard_normal(shape, dtype=np.float32)
for dtype in ("float32", "bfloat16"):
    def rows(*shape):
        a = normal(*shape)
        return a if dtype == "float32" else (a.view(np.uint32) >> 16).astype(np.uint16)
    for C in sys.argv[3].split(","):
        C = int(C)
        for n, r in ((1, 1), (3, 2), (7, 3), (8, 17)):
            used = []
            run(f"shrink_{dtype}", rows(n, C), rows(r, C), normal(n, r))
            for kernel in ("small_linear", "linear"):
                run(f"{kernel}_{dtype}", rows(n, C), rows(r, C), rows(r), 0, r, rows(n, r))
            run(f"linear_backward_{dtype}", rows(n, r), rows(r, C), 0, C, rows(n, C))
            chosen = rng.integers(0, 2, (n, 2), dtype=np.int32)
            entry = rng.integers(0, r, (n, 2 * r), dtype=np.int32)
            h, wide = normal(n, r), normal(n, 2 * r)
            for start in ((rows(C), False), (None, True)):
                to = (0, C, *start, rows(n, C))
                run(f"expand_sparse_{dtype}", rows(2 * r, C), r, chosen, wide, *to)
                run(f"expand_dense_{dtype}", rows(r, C), h, *to)
                run(f"expand_masked_{dtype}", rows(r, C), entry, wide, 5, 0.3, chosen, *to)
            run(f"outer_{dtype}", rows(n, C), normal(n, r), 0, C, normal(r, C))
            free += used
for dtype in ("bfloat16", "float16"):
    for n in range(1, 40):
        used = []
        getattr(raw, f"load_{dtype}")(at_page_end(np.ones(n, np.uint16)))
        free += used
# The guard works: one byte more is fatal.
used = []
last = at_page_end(np.ones(1, np.uint8))
print("kernels passed", flush=True)
ctypes.string_at(last.ctypes.data, 2)
"""


@pytest.mark.parametrize("level", [*LEVELS, SANITIZED])
def test_reads_end_where_the_rows_end(modules, levels_here, level):
    if level.removesuffix("_sanitized") not in levels_here:
        pytest.skip(f"this processor lacks {level}")
    sizes = "1,2,5,7,8,9,15,16,17,31,32,33,63,64,65,100,127,128,129,160,191,200"
    path = modules[level]
    if not path.exists():
        pytest.skip("the compiler has no undefined-behaviour sanitizer")
    done = subprocess.run(
        [sys.executable, "-c", PAGE_END, path.stem, str(path), sizes],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout == "kernels passed\n", (done.returncode, done.stderr)
    assert done.returncode < 0  # the deliberate read after it was fatal


# ---- what the built extension needs

# All of torch that the extension may call; each is in torch 2.10, the oldest that is supported.
# A new name must be looked up in that version's torch/csrc/stable/c/shim.h or
# torch/csrc/inductor/aoti_torch/c/shim.h.
TORCH_SYMBOLS = """
    aoti_torch_abi_version aoti_torch_create_device_guard aoti_torch_delete_device_guard
    aoti_torch_delete_library_object aoti_torch_delete_tensor_object aoti_torch_device_type_cpu
    aoti_torch_dtype_bfloat16 aoti_torch_dtype_bool aoti_torch_dtype_complex128
    aoti_torch_dtype_complex32 aoti_torch_dtype_complex64 aoti_torch_dtype_float16
    aoti_torch_dtype_float32 aoti_torch_dtype_float64 aoti_torch_dtype_float8_e4m3fn
    aoti_torch_dtype_float8_e4m3fnuz aoti_torch_dtype_float8_e5m2 aoti_torch_dtype_float8_e5m2fnuz
    aoti_torch_dtype_int16 aoti_torch_dtype_int32 aoti_torch_dtype_int64 aoti_torch_dtype_int8
    aoti_torch_dtype_uint16 aoti_torch_dtype_uint32 aoti_torch_dtype_uint64 aoti_torch_dtype_uint8
    aoti_torch_empty_strided aoti_torch_get_device_index aoti_torch_get_device_type
    aoti_torch_get_dim aoti_torch_get_dtype aoti_torch_get_numel aoti_torch_get_size
    aoti_torch_get_sizes aoti_torch_get_stride aoti_torch_is_contiguous aoti_torch_library_def
    aoti_torch_library_init_fragment aoti_torch_library_init_impl aoti_torch_new_tensor_handle
    torch_get_const_data_ptr torch_get_mutable_data_ptr torch_get_num_threads torch_library_impl
    torch_new_string_handle torch_parallel_for
""".split()  # noqa: SIM905
# Of the limited C API (PEP 384).
PYTHON_SYMBOLS = {"PyModule_Create2"}


def test_the_extension_needs_stable_symbols_only():
    built = sorted(Path(moelora_ops.__file__).parent.glob("_C*.so"))
    if not built:
        pytest.skip("the compiled extension is not built")
    if shutil.which("nm") is None:
        pytest.skip("nm is missing")
    assert [path.name for path in built] == ["_C.abi3.so"]
    lines = subprocess.run(
        ["nm", "-D", "--undefined-only", str(built[0])], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    needed = {line.split()[-1].split("@")[0] for line in lines}
    assert {n for n in needed if re.match("aoti_|torch_", n)} <= set(TORCH_SYMBOLS)
    assert {n for n in needed if re.match("_?Py", n)} == PYTHON_SYMBOLS
    assert "torch_parallel_for" in needed  # torch's own pool of threads
    # No C++ of torch's: what is mangled belongs to the C++ standard library.
    foreign = {n for n in needed if n.startswith("_Z") and re.search("3c10|2at|5torch|6caffe2", n)}
    assert not foreign
