"""The GPU emulator under Triton: what its compiler makes is executed, recorded and counted, and
bugs are found, planted in the source or in the compiled kernel.
"""

import itertools
import re
from contextlib import contextmanager

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.runtime import driver as triton_driver  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

from tools.gpu_emulator import Fault, emulated_gpu, load, run  # noqa: E402
from tools.gpu_emulator.triton_driver import DEVICES  # noqa: E402

ARCHS = (80, 90)


@contextmanager
def gpu(arch=90, **options):
    with emulated_gpu("cuda", arch, execute=True, **options) as device:
        yield device


def numbers(*shape, dtype=torch.float32, seed=0):
    """Multiples of 1/4 so small that sums of their products are exact in float32; integers for
    int8.
    """
    x = torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype) if dtype == torch.int8 else (x / 4).to(dtype)


# ---- matrix products


@triton.jit
def gemm(
    a, b, c, M, N, K, sa, sb, sc,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr, MASK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """c [M, N] = a [M, K] @ b, which is [K, N] or, TRANSPOSED, [N, K]."""
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    kk = tl.arange(0, BK)
    acc = tl.zeros([BM, BN], tl.int32 if a.dtype.element_ty == tl.int8 else tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        inside = kk < K - k
        x = tl.load(
            a + m[:, None] * sa + kk[None, :] + k,
            mask=(m < M)[:, None] & inside[None, :],
            other=0.0,
        )
        if TRANSPOSED:
            y = tl.load(
                b + n[:, None] * sb + kk[None, :] + k,
                mask=(n < N)[:, None] & inside[None, :],
                other=0.0,
            ).T
        else:
            y = tl.load(
                b + (kk[:, None] + k) * sb + n[None, :],
                mask=inside[:, None] & (n < N)[None, :],
                other=0.0,
            )
        acc = tl.dot(x, y, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    at = c + m[:, None] * sc + n[None, :]
    if MASK:
        tl.store(at, acc.to(c.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
    else:
        tl.store(at, acc.to(c.dtype.element_ty))


def multiply(
    a, b, c=None, tile=(64, 64, 32), transposed=False, precision="tf32", mask=True, stages=3
):
    M, K = a.shape
    N = b.shape[0] if transposed else b.shape[1]
    if c is None:
        c = torch.empty(M, N, dtype=torch.int32 if a.dtype == torch.int8 else torch.float32)
    grid = (triton.cdiv(M, tile[0]), triton.cdiv(N, tile[1]))
    gemm[grid](
        a, b, c, M, N, K, a.stride(0), b.stride(0), c.stride(0), *tile,
        transposed, precision, mask, stages, num_warps=4,
    )  # fmt: skip
    return c


WIDE = (torch.bfloat16, torch.float16, torch.float32, torch.int8)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Tensor cores take float8 from sm_90 on, with K along the rows.
DOTS = [*itertools.product(ARCHS, WIDE, (False, True)), *((90, t, True) for t in FLOAT8)]


@pytest.mark.parametrize("arch, dtype, transposed", DOTS, ids=str)
def test_tensor_core_products(arch, dtype, transposed):
    """Triton's own layouts: ldmatrix and mma on sm_80, swizzled descriptors and wgmma on sm_90.

    Exact numbers, so that nothing depends on the order of sums.
    """
    a, b = numbers(70, 96, dtype=dtype), numbers(96, 72, dtype=dtype, seed=1)
    want = a.double() @ b.double()
    with gpu(arch) as device:
        got = multiply(a, b.T.contiguous() if transposed else b, transposed=transposed)
    assert torch.equal(got.double(), want)
    (record,) = device.launches
    unit = "mma" if arch == 80 else "wgmma"
    assert record.counts.tensor_flops == {unit: 2 * 128 * 128 * 96}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("precision", ("ieee", "tf32x3"))
def test_float32_products(arch, precision):
    """Both forms are as good as float32; tf32 alone is not, so that it is seen to round its
    operands.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(s, generator=generator) for s in ((32, 64), (64, 32)))
    want, room = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    with gpu(arch):
        exact = multiply(a, b, tile=(32, 32, 32), precision=precision)
        rough = multiply(a, b, tile=(32, 32, 32), precision="tf32")
    assert ((exact - want).abs() <= 2**-20 * room).all()
    assert (2**-13 * room.max() < (rough - want).abs().max()) and (
        (rough - want).abs() < 2**-9 * room
    ).all()


@pytest.mark.parametrize("arch", ARCHS)
def test_counts_equal_the_formula(arch):
    """Every row tile reads all of its column tile's b, and the other way round; masked elements are
    not asked for.
    """
    M, N, K = 130, 96, 80
    a, b = numbers(M, K, dtype=torch.bfloat16), numbers(K, N, dtype=torch.bfloat16)
    with gpu(arch) as device:
        multiply(a, b, tile=(64, 32, 32))
    record = device.launches[0]
    traffic, counts = record.counts.traffic, record.counts
    assert record.name == "gemm" and record.grid == (3, 3, 1) and record.build.warps == 4
    assert record.arguments["M"] == M and record.arguments["a"] is a
    assert traffic["a"].loads.bytes == 3 * 2 * M * K and traffic["b"].loads.bytes == 3 * 2 * K * N
    assert traffic["c"].stores.bytes == 4 * M * N and traffic["c"].loads.bytes == 0
    assert traffic["a"].loads.distinct_bytes == 2 * M * K
    assert traffic["b"].loads.distinct_bytes == 2 * K * N
    assert sum(counts.tensor_flops.values()) == 2 * 192 * 96 * 96
    assert counts.loads.bytes == 6 * M * K + 6 * K * N
    assert counts.instructions["cp.async.cg.shared.global"] > 0
    assert record.build.options["BM"] == 64 and record.seconds > 0


@pytest.mark.parametrize("arch", ARCHS)
def test_the_order_of_blocks_and_warps_does_not_matter(arch):
    a, b = torch.randn(96, 64).bfloat16(), torch.randn(64, 80).bfloat16()
    results = []
    for seed in (None, 1, 2):
        with gpu(arch, seed=seed):
            results.append(multiply(a, b, tile=(64, 32, 32)))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# ---- planted bugs


def test_missing_mask():
    a, b = numbers(60, 32, dtype=torch.bfloat16), numbers(32, 64, dtype=torch.bfloat16)
    memory = torch.zeros(64, 64)
    with gpu(), pytest.raises(Fault) as fault:
        multiply(a, b, memory[:60], mask=False)
    assert re.search(
        r"byte 15\d\d\d of c \(15360 bytes\), block \(0, 0, 0\) thread \d+", str(fault.value)
    )
    assert re.search(
        r"gemm, PTX line \d+ \(test_gpu_emulator_triton\.py:\d+:\d+\)", str(fault.value)
    )


def test_wrong_strides():
    """Too large a stride leaves the tensor; too small a one gives wrong numbers."""
    a, b = numbers(64, 32, dtype=torch.bfloat16), numbers(32, 64, dtype=torch.bfloat16)
    c = torch.empty(64, 64)
    arguments = (64, 32, 32, False, "tf32", True, 3)
    with gpu():
        with pytest.raises(Fault, match="of a "):
            gemm[(1, 1)](a, b, c, 64, 64, 32, 48, 64, 64, *arguments, num_warps=4)
        with pytest.raises(Fault, match="of c "):
            gemm[(1, 1)](a, b, c, 64, 64, 32, 32, 64, 80, *arguments[:1], 64, *arguments[2:])
        with pytest.raises(Fault, match=r"store different values|overwrites"):
            gemm[(2, 2)](a, b, c, 64, 64, 32, 32, 64, 16, 32, *arguments[1:], num_warps=4)


def compiled(arch):
    """PTX of a pipelined product, and a function that runs a changed version of it: how many
    numbers are wrong.
    """
    a, b = numbers(64, 256, dtype=torch.bfloat16), numbers(256, 64, dtype=torch.bfloat16, seed=1)
    want = a.double() @ b.double()
    with gpu(arch) as device:
        c = multiply(a, b)
    assert torch.equal(c.double(), want)
    build, text = device.launches[0].build, device.launches[0].build.assembly()

    def wrong(text):
        c = torch.full((64, 64), float("nan"))
        kernel = load(text)["gemm"]
        values = [a, b, c, 64, 64, 256, a.stride(0), b.stride(0), c.stride(0), 0, 0]
        run(kernel, (1, 1), (128,), values[: len(kernel.parameters)], shared=build.shared)
        return int((c.double() != want).sum())

    return text, wrong


def variants(text, pattern, replacement):
    """The text with one match replaced, for each match."""
    for match in re.finditer(pattern, text):
        yield text[: match.start()] + match.expand(replacement) + text[match.end() :]


def outcome(wrong, text):
    """How the emulator tells that a kernel is broken; None if it does not."""
    try:
        return "wrong numbers" if wrong(text) else None
    except Fault as fault:
        return str(fault)


@pytest.mark.parametrize("arch", ARCHS)
def test_missing_barriers_in_a_compiled_kernel(arch):
    """Each alone.  One more than needed is allowed: Triton's loop on sm_80 begins with a barrier
    that repeats the one before it.
    """
    text, wrong = compiled(arch)
    outcomes = [outcome(wrong, changed) for changed in variants(text, r"bar\.sync\s+0;", "")]
    races = [o for o in outcomes if o and "race" in o]
    assert len(outcomes) >= 4 and len(races) >= len(outcomes) - 1


@pytest.mark.parametrize("arch", ARCHS)
def test_lax_waits_in_a_compiled_kernel(arch):
    text, wrong = compiled(arch)
    lax = list(variants(text, r"(cp\.async\.wait_group\s+)\d+;", r"\g<1>9;"))
    assert "an asynchronous copy to it has not been waited for" in outcome(wrong, lax[0])
    all_lax = re.sub(r"(cp\.async\.wait_group\s+)\d+;", r"\g<1>9;", text)
    assert "an asynchronous copy to it has not been waited for" in outcome(wrong, all_lax)
    if arch == 90:
        never = re.sub(r"(wgmma\.wait_group\.sync\.aligned\s+)\d+;", r"\g<1>9;", text)
        assert "an asynchronous operation that reads it" in outcome(wrong, never)


def test_wrong_layouts_in_a_compiled_kernel():
    text, wrong = compiled(80)
    assert ".trans." in text and outcome(wrong, text.replace(".trans.", ".")) == "wrong numbers"
    text, wrong = compiled(90)
    # the last immediates of wgmma say which operands are transposed
    changed = re.sub(r"(wgmma\.mma_async[^;]*), 1;", r"\1, 0;", text)
    assert changed != text and outcome(wrong, changed) is not None


def test_misaligned_copies_in_a_compiled_kernel():
    """A kernel that was compiled for rows of multiples of 16 bytes meets others."""
    a = numbers(64, 72, dtype=torch.bfloat16)[:, 1:]
    b, c = numbers(64, 64, dtype=torch.bfloat16), torch.empty(64, 64)
    text, _ = compiled(80)
    values = [a, b, c, 64, 64, 64, 72, 64, 64, 0, 0]
    kernel = load(text)["gemm"]
    with pytest.raises(Fault, match="misaligned access of 16 bytes, byte 0 of gemm_param_0"):
        run(kernel, (1, 1), (128,), values[: len(kernel.parameters)], shared=40000)


# ---- rows: reductions, scans, bfloat16 arithmetic, assertions


@triton.jit
def rows(x, total, best, where, sums, products, n, SIZE: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, SIZE)
    inside = i < n
    v = tl.load(x + row * n + i, mask=inside, other=0.0)
    tl.device_assert(v < 3.0)
    tl.store(total + row, tl.sum(v.to(tl.float32), 0))
    masked = tl.where(inside, v.to(tl.float32), float("-inf"))
    m, at = tl.max(masked, 0, return_indices=True)
    tl.store(best + row, m)
    tl.store(where + row, at)
    tl.store(sums + row * n + i, tl.cumsum(v.to(tl.float32), 0), mask=inside)
    tl.store(products + row * n + i, (v * v + v).to(tl.bfloat16), mask=inside)


@pytest.mark.parametrize("arch", ARCHS)
def test_rows(arch):
    x = numbers(5, 200, dtype=torch.bfloat16)
    with gpu(arch):
        total, best = torch.empty(5), torch.empty(5)
        where = torch.empty(5, dtype=torch.int32)
        sums, products = torch.empty(5, 200), torch.empty_like(x)
        rows[(5,)](x, total, best, where, sums, products, 200, 256, debug=True)
    wide = x.double()
    assert torch.equal(total.double(), wide.sum(1)) and torch.equal(best.double(), wide.amax(1))
    assert where.tolist() == wide.numpy().argmax(1).tolist()  # the first of several
    assert torch.equal(sums.double(), wide.cumsum(1))
    assert torch.equal(products, (wide * wide + wide).bfloat16())
    x[3, 17] = 4
    with gpu(arch), pytest.raises(Fault, match=r"device assertion failed, block \(3, 0, 0\)"):
        rows[(5,)](x, total, best, where, sums, products, 200, 256, debug=True)


@triton.jit
def last_block_adds(x, parts, lock, out, n, BLOCKS: tl.constexpr):
    """Each block sums its part; the one that comes last adds the parts."""
    b, i = tl.program_id(0), tl.arange(0, 64)
    tl.store(parts + b, tl.sum(tl.load(x + b * n + i, mask=i < n, other=0.0), 0))
    tl.debug_barrier()
    if tl.atomic_add(lock, 1, sem="acq_rel") == BLOCKS - 1:
        j = tl.arange(0, BLOCKS)
        tl.store(out, tl.sum(tl.load(parts + j, cache_modifier=".cg"), 0))
        tl.store(out + 1, b.to(tl.float32))


def test_blocks_that_wait_for_each_other():
    """By an atomic counter, which is no race; whoever comes last, the sum is the same."""
    x, last = numbers(8, 50), set()
    for seed in range(6):
        lock = torch.zeros(1, dtype=torch.int32)
        with gpu(seed=seed):
            parts, out = torch.empty(8), torch.empty(2)
            last_block_adds[(8,)](x, parts, lock, out, 50, 8)
        assert out[0].double() == x.double().sum()
        last.add(out[1].item())
    assert len(last) > 1


@triton.jit
def neighbours(x, n, FAR: tl.constexpr):
    """Adds to each element the next one; with FAR the last of a block belongs to another."""
    i = tl.program_id(0) * 32 + tl.arange(0, 32)
    inside = (i + 1 < n) & (FAR | (i % 32 < 31))
    tl.store(
        x + i, tl.load(x + i, mask=i < n) + tl.load(x + i + 1, mask=inside, other=0), mask=i < n
    )


def test_races_between_blocks():
    with gpu():
        neighbours[(3,)](torch.ones(96), 96, False)
        with pytest.raises(
            Fault, match=r"block \(0, 0, 0\) reads byte 128 of x, which block \(1, 0, 0\)"
        ):
            neighbours[(3,)](torch.ones(96), 96, True)
    with gpu(check_races=False):
        neighbours[(3,)](torch.ones(96), 96, True)


# ---- tensor memory accelerator


@triton.jit
def scaled_copy(x, y, M, N, BM: tl.constexpr, BN: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [M, N], [N, 1], [BM, BN])
    target = tl.make_tensor_descriptor(y, [M, N], [N, 1], [BM, BN])
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    target.store([row, column], source.load([row, column]) * 2)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32, torch.int8), ids=str)
def test_tensor_descriptors(dtype):
    """Made in the kernel; boxes hang over both edges of the tensor."""
    x = numbers(50, 48, dtype=dtype)
    for seed in (0, None):
        with gpu(seed=seed) as device:
            y = torch.empty_like(x)
            scaled_copy[(2, 2)](x, y, 50, 48, 32, 32)
        assert torch.equal(y, x * 2)
    counts = device.launches[0].counts
    assert any("cp.async.bulk.tensor" in name for name in counts.instructions)
    assert counts.traffic["x"].loads.bytes == counts.traffic["y"].stores.bytes == x.nbytes


# ---- the driver


@triton.jit
def scalars(y, flag, small, whole, long, half, single, pair, one, nothing, UP: tl.constexpr):
    tl.store(y + 0, flag.to(tl.float32))
    tl.store(y + 1, small.to(tl.float32))
    tl.store(y + 2, whole.to(tl.float32))
    tl.store(y + 3, long.to(tl.float32))
    tl.store(y + 4, half.to(tl.float32))
    tl.store(y + 5, single)
    tl.store(y + 6, pair[0].to(tl.float32))
    tl.store(y + 7, tl.load(pair[1]))
    tl.store(y + 8, one + UP + (nothing is None))


def test_arguments_of_all_kinds():
    y, z = torch.zeros(9), torch.full((3,), 0.75)
    with gpu() as device:
        scalars[(1,)](y, True, -5, 2**20, 2**40, 0.5, 1 / 3, (12, z), 1, None, 4)
    assert y.tolist() == [1, -5, 2**20, 2**40, 0.5, torch.tensor(1 / 3).item(), 12, 0.75, 6]
    assert "pair[1]" in device.launches[0].counts.traffic


@triton.jit
def fill(x, n, VALUE: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(x + i, VALUE, mask=i < n)


def test_what_no_kernel_has_written_is_seen():
    with gpu():
        x = torch.empty(100)
        fill[(3,)](x, 100, 1.0, 32)
    assert torch.equal(x[:96], torch.ones(96)) and x[96:].isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_empty_grids_and_empty_tensors():
    with gpu() as device:
        fill[(0,)](torch.empty(0), 0, 1.0, 32)
        fill[(1,)](torch.empty(0), 0, 1.0, 32)
    assert [r.counts is None for r in device.launches] == [True, False]
    assert device.launches[1].counts.stores.bytes == 0


@pytest.mark.parametrize("target", DEVICES, ids=str)
def test_compiling_alone(target):
    """Everything a launch needs is made, for each architecture by its own compiler; nothing is
    run.
    """
    x = torch.ones(64, 64, dtype=torch.bfloat16)
    with emulated_gpu(*target) as device:
        c = torch.full((64, 64), 7.0)
        multiply(x, x, c)
        multiply(x, x, c)
        assert triton_driver.active.get_current_target().arch == target[1]
    assert (c == 7).all()
    assert len(device.launches) == 2 and len(device.builds) == 1
    build = device.builds[0]
    assert device.launches[0].counts is None and build.target.arch == target[1]
    assert 16 <= build.resources.registers <= 255 and build.resources.stack == 0
    product = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", "gfx942": "v_mfma"}
    assert product[target[1]] in build.assembly()


def test_spills_and_limits_are_those_of_the_device():
    x = torch.ones(256, 64, dtype=torch.bfloat16)
    with emulated_gpu("cuda", 90) as device:
        multiply(x, x, tile=(256, 128, 16), transposed=True)
        with pytest.raises(OutOfResources, match="shared memory"):
            multiply(x, x, tile=(128, 128, 64), transposed=True, stages=9)
    assert device.builds[0].resources.registers == 255 and device.builds[0].resources.stack > 0


def test_drivers_nest_and_are_put_back():
    before = triton_driver._active
    with emulated_gpu("cuda", 90, multiprocessors=3) as outer:
        with emulated_gpu("cuda", 80):
            assert triton_driver.active.get_current_target().arch == 80
        assert triton_driver.active is outer
        assert outer.utils.get_device_properties(0)["multiprocessor_count"] == 3
        with (
            pytest.raises(ValueError, match="not executed"),
            emulated_gpu("cuda", 100, True),
        ):
            pass
    assert triton_driver._active is before
