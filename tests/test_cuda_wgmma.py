"""The CUDA back end's shrink on wgmma, the tensor-core instructions of compute capability 9.0: more
rows than a tile of mma.sync has, 16-bit types, no dropout.

On another device (``pytest --gpu``) the same tests hold for the products that it has.
"""

import cases
import devices
import mixes
import pytest
import torch
from cuda_gpu import make_gpu, names, needs_nvcc

from moelora_ops import functional, ops
from moelora_ops.bench import numerics

pytestmark = needs_nvcc

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
WGMMA, PLAIN = "wgmma_shrink", "shrink"
SEED = torch.tensor([0x1234567890ABCDE])
FEW, MANY = 1, 132  # multiprocessors: with few, a block owns all features
cuda_ops = ops.of("cuda")


@pytest.fixture
def gpu(request):
    """Makes a GPU; the cuda back end takes CPU tensors meanwhile."""
    make = make_gpu(request)

    def on(multiprocessors=MANY, arch="90a"):
        return make(arch, multiprocessors)

    with devices.on_cpu_tensors("cuda"):
        yield on


def normal(*shape, dtype=BF16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# T, K, R: a token; a feature; nothing that is aligned; two tiles of tokens and of columns, and more
# steps than stages; whole tiles.
@pytest.mark.parametrize("multiprocessors", (FEW, MANY))
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 600, 144), F16),
        ((3, 1, 129), BF16),
        ((70, 203, 131), F16),
        ((130, 1100, 200), BF16),
        ((128, 64, 384), BF16),
    ],
    ids=str,
)
def test_shrink(gpu, shape, dtype, multiprocessors):
    """Against float64, with the error of a product of float32."""
    T, K, R = shape
    x, rows = normal(T, K, dtype=dtype), normal(R, K, dtype=dtype, seed=1)
    with gpu(multiprocessors) as device:
        got = cuda_ops.shrink(x, rows)
    error = numerics.error(got, x.double() @ rows.double().T)
    plain = numerics.error(x.float() @ rows.float().T, x.double() @ rows.double().T)
    limit = numerics.budget(plain, F32)
    assert error.rms <= limit.rms and error.max <= limit.max, (error, limit)
    assert names(device)[0] == WGMMA


def test_bits_do_not_depend_on_the_plan(gpu):
    """A block for all features or one a segment, a token alone or among others."""
    x, rows = normal(130, 1100), normal(200, 1100, seed=1)
    results, grids = [], []
    for multiprocessors in (FEW, MANY):
        with gpu(multiprocessors) as device:
            results.append(cuda_ops.shrink(x, rows))
            for t in (0, 77, 129):
                assert torch.equal(cuda_ops.shrink(x[t : t + 1], rows)[0], results[0][t])
        grids += [device.launches[0].grid]
    assert torch.equal(*results)
    assert grids == [(4, 1, 1), (4, 1, 6)]  # two tiles of columns by two of tokens


def test_what_is_not_finite_spoils_no_other(gpu):
    """A token its row, an expert's row its column; not what lies between tiles, either."""
    x, rows = normal(70, 200), normal(137, 200, seed=1)
    spoiled_x, spoiled_rows = x.clone(), rows.clone()
    spoiled_x[3] = float("nan")
    spoiled_x[69, 199] = float("inf")
    spoiled_rows[136, 7] = float("nan")
    tokens = [t for t in range(70) if t not in (3, 69)]
    with gpu():
        want, got = cuda_ops.shrink(x, rows), cuda_ops.shrink(spoiled_x, spoiled_rows)
    assert torch.equal(got[tokens, :136], want[tokens, :136])
    assert not got[[3, 69]].isfinite().any()
    assert got[:, 136].isnan().all()


@pytest.mark.parametrize("distance", (201, 208))
def test_strided_rows(gpu, distance):
    """Rows that are apart, with wide copies and without; NaN between them is not read."""
    x, rows = normal(9, 200), normal(130, 200, seed=1)
    memory = torch.full((9, distance), float("nan"), dtype=BF16)
    memory[:, :200] = x
    with gpu():
        assert torch.equal(cuda_ops.shrink(memory[:, :200], rows), cuda_ops.shrink(x, rows))


@pytest.mark.parametrize("T", (3, 70))
def test_what_does_not_exist_costs_nothing(gpu, T):
    """Rows beyond the tokens and the experts are no traffic, a warp group without tokens does not
    multiply; what is read is read once a tile.
    """
    K, R = 256, 200
    with gpu(FEW) as device:
        cuda_ops.shrink(normal(T, K), normal(R, K, seed=1))
    (launch,) = device.launches
    assert launch.counts.loads.bytes == 2 * K * (2 * T + R)
    assert launch.counts.stores.bytes == 4 * T * R
    assert launch.counts.tensor_flops == {"wgmma": 2 * (128 if T > 64 else 64) * K * 2 * 192}


@pytest.mark.parametrize(
    ("rows", "dtype", "arch", "kernel"),
    [
        (129, BF16, "90a", WGMMA),
        (128, BF16, "90a", PLAIN),
        (129, F32, "90a", PLAIN),
        (129, BF16, "80", PLAIN),
    ],
    ids=str,
)
def test_where_it_is_used(gpu, rows, dtype, arch, kernel):
    with gpu(arch=arch) as device:
        for T in (1, 70, 300):
            cuda_ops.shrink(normal(T, 16, dtype=dtype), normal(rows, 16, dtype=dtype))
    assert {name for name in names(device) if name != "add"} == {kernel}


# A router below the experts, sums of features that fall into segments, a gate behind the experts.
TOPK = cases.Shape(70, 200, 136, 16, 8, 2)
SPLITS = mixes.Size((70,), 130, 66, 34, 4)
MOLE = mixes.Size((70,), 130, 66, 34, 4)


def test_topk_matches_reference(gpu):
    cases.assert_within_budget(TOPK, BF16, gpu, draws=1, strategy="stacked", balance=True)
    inputs = cases.make_inputs(TOPK, BF16)
    with gpu() as device:
        cases.run(functional.mola, inputs, 2, strategy="stacked")
    # 128 rows and 16 of the router forward; without those backward.
    assert [name for name in names(device) if "shrink" in name] == [WGMMA, PLAIN]
    with gpu() as device:
        cases.run(
            functional.mola, inputs, 2, strategy="stacked", dropout=0.3, dropout_mode="token",
            seed=SEED,
        )  # fmt: skip
    assert [name for name in names(device) if "shrink" in name] == [PLAIN, PLAIN]


@pytest.mark.parametrize(
    ("name", "variant", "size"), [("averaged", "splits", SPLITS), ("output_gate", "l2", MOLE)]
)
def test_mixes_match_reference(gpu, name, variant, size):
    with gpu() as device:
        mixes.run(mixes.MIXES[name].function, mixes.make_inputs(name, variant, size, F16))
    assert [name for name in names(device) if "shrink" in name] == [WGMMA, WGMMA]
    mixes.assert_within_budget(gpu, name, variant, size, F16, draws=1)


def test_few_tokens_get_the_bits_of_many(gpu):
    """Where the mix goes into the expand, too."""
    i = cases.make_inputs(TOPK, BF16)

    def adapter(tokens):
        return functional.mola(
            i.x[tokens], None, None, i.lora_down, i.lora_up, i.router, 2, 2.0, strategy="stacked",
            base_output=torch.zeros(len(tokens), 136, dtype=BF16),
        )  # fmt: skip

    with gpu(FEW):
        want = adapter(range(70))
    with gpu() as device:
        assert torch.equal(adapter([5, 69]), want[[5, 69]])
        assert names(device) == [WGMMA, "mix_and_expand"]
