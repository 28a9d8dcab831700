"""The products alone, shrink, expand and outer, of the GPU back ends, run on CPU tensors.

Every launch goes through the package's own launchers, so grids, strides and masks are tested as
well as the instructions.
"""

import pytest
import torch

from moelora_ops import ops
from moelora_ops.bench import numerics

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def products(gpu_backend):
    return ops.of(gpu_backend)


def normal(*shape, dtype=F32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_in_budget(got, plain, want, dtype):
    error, limit = numerics.error(got, want), numerics.budget(numerics.error(plain, want), dtype)
    assert error.rms <= limit.rms and error.max <= limit.max, (error, limit)


# T, K, R: one token, multiples of nothing, of 8, of 16, more than a tile of each.
@pytest.mark.parametrize(
    ("shape", "arch", "dtype"),
    [
        ((1, 600, 24), 80, F16),
        ((70, 200, 13), 90, BF16),
        ((70, 200, 13), 80, F32),
        ((129, 33, 72), 90, F32),
        ((20, 144, 200), 90, BF16),
        ((35, 70, 40), 80, F64),
    ],
    ids=str,
)
def test_products(gpu_backend, gpu, products, shape, arch, dtype):
    """shrink, expand and outer against float64, no worse than PyTorch on the same inputs."""
    if gpu_backend == "triton" and dtype == F64:
        pytest.skip("Triton's kernels do not compute in float64")
    T, K, R = shape
    wide = ops.accumulator_dtype(dtype)
    x, rows, y = normal(T, K, dtype=dtype), normal(R, K, dtype=dtype), normal(T, K, dtype=dtype)
    hidden = normal(T, R, seed=1, dtype=wide)
    got_y, overwritten = y.clone(), torch.full_like(y, float("nan"))
    with gpu(arch):
        got = products.shrink(x, rows)
        products.expand(hidden, rows, got_y, True)
        products.expand(hidden, rows, overwritten, False)
        got_rows = products.outer(hidden, x)
    X, A, Y, H = (t.double() for t in (x, rows, y, hidden))
    low = hidden.to(dtype)
    assert got.dtype == wide
    assert_in_budget(got, x.to(wide) @ rows.to(wide).T, X @ A.T, wide)
    assert_in_budget(got_y, y + low @ rows, Y + H @ A, dtype)
    assert_in_budget(overwritten, low @ rows, H @ A, dtype)
    assert_in_budget(got_rows, low.T @ x, H.T @ X, dtype)


# Multiprocessors and the grid of the product: a block for all features, halves, segments.
SPLITS = {
    "cuda": ((1, (2, 1, 1)), (132, (3, 1, 6))),
    "triton": ((2, (2, 1, 1)), (5, (2, 1, 2)), (132, (3, 2, 6))),
}


@pytest.mark.parametrize(("arch", "dtype"), [(80, F32), (90, BF16)], ids=str)
def test_a_shrink_has_one_order_however_it_is_split(gpu_backend, gpu, products, arch, dtype):
    """The same bits from one block for all features, from parts of them and narrow columns."""
    x, rows = normal(130, 1100, dtype=dtype), normal(24, 1100, dtype=dtype)
    results = []
    for multiprocessors, grid in SPLITS[gpu_backend]:
        with gpu(arch, multiprocessors) as device:
            results.append(products.shrink(x, rows))
            assert device.launches[0].grid == grid
    with gpu(arch):
        alone = products.shrink(x[77:78], rows)
    assert all(torch.equal(got, results[0]) for got in results)
    assert torch.equal(alone[0], results[0][77])


def test_no_tokens_is_no_launch(gpu, products):
    x, rows = normal(0, 40), normal(5, 40)
    with gpu() as device:
        assert products.shrink(x, rows).shape == (0, 5)
        products.expand(torch.zeros(0, 5), rows, x.clone(), True)
        assert torch.equal(products.outer(torch.zeros(0, 5), x), torch.zeros(5, 40))
        assert not device.launches


def test_strided_rows(gpu, products):
    """Rows that are apart, at any distance, read and written; what lies between is left alone."""
    rows, hidden = normal(6, 40, dtype=BF16), normal(9, 6)
    for distance in (41, 48):
        memory = normal(9, distance, dtype=BF16)
        x = memory[:, :40]
        y = memory.clone()[:, :40]
        want = x.contiguous()
        with gpu(80):
            assert torch.equal(products.shrink(x, rows), products.shrink(x.contiguous(), rows))
            assert torch.equal(products.outer(hidden, x), products.outer(hidden, x.contiguous()))
            products.expand(hidden, rows, y, True)
            products.expand(hidden, rows, want, True)
        assert torch.equal(y, want)
        assert torch.equal(y._base[:, 40:], memory[:, 40:])


# Position of an argument, a bad one, and the name in the error.
@pytest.mark.parametrize(
    ("operator", "position", "bad", "name"),
    [
        ("shrink", 1, normal(5, 39), "rows"),
        ("shrink", 1, normal(5, 40, dtype=BF16), "rows"),
        ("expand", 0, normal(9, 6), "hidden"),
        ("expand", 0, normal(9, 5, dtype=F64), "hidden"),
        ("expand", 2, normal(9, 39), "rows"),
        ("outer", 0, normal(8, 5), "hidden"),
        ("outer", 0, normal(5, 9).t(), "hidden"),
    ],
)
def test_operators_called_directly_do_not_leave_their_memory(
    gpu, products, operator, position, bad, name
):
    x, rows, hidden = normal(9, 40), normal(5, 40), normal(9, 5)
    arguments = {
        "shrink": [x, rows],
        "expand": [hidden, rows, x.clone(), True],
        "outer": [hidden, x],
    }[operator]
    arguments[position] = bad
    with gpu() as device, pytest.raises(RuntimeError, match=name):
        getattr(products, operator)(*arguments)
    assert not device.launches
