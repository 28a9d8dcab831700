"""The Triton back end: its kernels, compiled for a GPU, run by the emulator on CPU tensors.

Every launch goes through the package's own launchers, so grids, strides and masks are tested as
well as the instructions.
"""

import contextlib

import pytest
import torch

from moelora_ops import backends, ops
from moelora_ops.backends import triton as triton_backend
from moelora_ops.bench import numerics

pytestmark = pytest.mark.skipif(
    bool(triton_backend.why_missing()), reason=triton_backend.why_missing()
)

if not triton_backend.why_missing():
    from moelora_ops.backends.triton import launch, tiles
    from tools.gpu_emulator import emulated_gpu

ARCHS = (80, 90)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
triton_ops = ops.of("triton")


@pytest.fixture(autouse=True)
def on_cpu_tensors(monkeypatch):
    """The table's row takes CPU tensors, for which the emulator stands in."""
    table = tuple(
        row._replace(device="cpu") if row.name == "triton" else row for row in backends.BACKENDS
    )
    monkeypatch.setattr(backends, "BACKENDS", table)
    monkeypatch.setattr(backends, "_BY_NAME", {row.name: row for row in table})


@contextlib.contextmanager
def gpu(arch=90, multiprocessors=None):
    """An emulated GPU, with few multiprocessors if tiles are to be chosen as for many tokens."""
    with pytest.MonkeyPatch.context() as patch, emulated_gpu("cuda", arch, execute=True) as device:
        if multiprocessors:
            patch.setattr(launch, "arch", lambda: tiles.Arch("cuda", f"sm_{arch}", multiprocessors))
        yield device


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_in_budget(got, plain, want, dtype):
    error, limit = numerics.error(got, want), numerics.budget(numerics.error(plain, want), dtype)
    assert error.rms <= limit.rms and error.max <= limit.max, (error, limit)


# T, K, R: one token, one feature, multiples of nothing, of 8, of 16, more than a tile of each.
PRODUCTS = ((1, 600, 24), (70, 200, 13), (129, 33, 72), (3, 1, 1), (20, 144, 200))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_products(shape, arch, dtype):
    """shrink, expand and outer against float64, no worse than PyTorch on the same inputs."""
    T, K, R = shape
    x, rows, y = normal(T, K, dtype=dtype), normal(R, K, dtype=dtype), normal(T, K, dtype=dtype)
    hidden = normal(T, R, seed=1)
    got_y, overwritten = y.clone(), torch.full_like(y, float("nan"))
    with gpu(arch):
        got = triton_ops.shrink(x, rows)
        triton_ops.expand(hidden, rows, got_y, True)
        triton_ops.expand(hidden, rows, overwritten, False)
        got_rows = triton_ops.outer(hidden, x)
    wide, low = (t.double() for t in (x, rows, y)), hidden.to(dtype)
    X, A, Y = wide
    assert got.dtype == torch.float32
    assert_in_budget(got, x.float() @ rows.float().T, X @ A.T, torch.float32)
    assert_in_budget(got_y, y + low @ rows, Y + hidden.double() @ A, dtype)
    assert_in_budget(overwritten, low @ rows, hidden.double() @ A, dtype)
    assert_in_budget(got_rows, low.T @ x, hidden.double().T @ X, dtype)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_shrink_has_one_order_however_it_is_split(arch, dtype):
    """The same bits from one block for all features, from halves, and from segments."""
    x, rows = normal(130, 1100, dtype=dtype), normal(24, 1100, dtype=dtype)
    results = []
    for multiprocessors, parts in ((1, 1), (4, 2), (132, 6)):
        with gpu(arch, multiprocessors) as device:
            results.append(triton_ops.shrink(x, rows))
            assert device.launches[0].grid[2] == parts
            results.append(triton_ops.shrink(x[77:78], rows))
    whole = results[0]
    for got in results[2::2]:
        assert torch.equal(got, whole)
    for got in results[1::2]:
        assert torch.equal(got, whole[77:78])


def test_no_tokens_is_no_launch():
    x, rows = normal(0, 40), normal(5, 40)
    with gpu() as device:
        assert triton_ops.shrink(x, rows).shape == (0, 5)
        triton_ops.expand(torch.zeros(0, 5), rows, x.clone(), True)
        assert torch.equal(triton_ops.outer(torch.zeros(0, 5), x), torch.zeros(5, 40))
        assert not device.launches


def test_strided_rows():
    """Rows that are apart, at any distance, read and written; what lies between is left alone."""
    rows, hidden = normal(6, 40, dtype=torch.bfloat16), normal(9, 6)
    for distance in (41, 48):
        memory = normal(9, distance, dtype=torch.bfloat16)
        x = memory[:, :40]
        y = memory.clone()[:, :40]
        with gpu():
            assert torch.equal(triton_ops.shrink(x, rows), triton_ops.shrink(x.contiguous(), rows))
            assert torch.equal(
                triton_ops.outer(hidden, x), triton_ops.outer(hidden, x.contiguous())
            )
            triton_ops.expand(hidden, rows, y, True)
            want = x.contiguous()
            triton_ops.expand(hidden, rows, want, True)
        assert torch.equal(y, want)
        assert torch.equal(y._base[:, 40:], memory[:, 40:])


def test_tf32_only_if_torch_allows_it():
    x, rows = normal(16, 64), normal(16, 64)
    want = x.double() @ rows.double().T
    with gpu(80):
        exact = numerics.error(triton_ops.shrink(x, rows), want).rms
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            rounded = numerics.error(triton_ops.shrink(x, rows), want).rms
        finally:
            torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert exact < 3e-7 and 1e-5 < rounded < 1e-3
