"""The Triton back end: its kernels, compiled for a GPU, run by the emulator on CPU tensors.

Every launch goes through the package's own launchers, so grids, strides and masks are tested as
well as the instructions.  Compiling takes longer than running: tests share shapes where they can,
and a case runs on one architecture and in one dtype.
"""

import subprocess
import sys

import cases
import pytest
import torch
from cases import QUANTITIES, Shape, make_inputs, reference_run, run
from triton_gpu import WHY_MISSING, gpu, names, needs_triton

from moelora_ops import functional, ops, use_backend
from moelora_ops.backends import extension
from moelora_ops.bench import numerics
from moelora_ops.reference import keep_mask

if not WHY_MISSING:
    from moelora_ops.backends.triton import tiles

pytestmark = needs_triton

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SEED = torch.tensor([0x1234567890ABCDE])
triton_ops = ops.of("triton")


def normal(*shape, dtype=F32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_tf32_only_if_torch_allows_it():
    x, rows = normal(16, 64), normal(16, 64)
    want = x.double() @ rows.double().T
    with gpu(80):
        exact = numerics.error(triton_ops.shrink(x, rows), want).rms
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            rounded = numerics.error(triton_ops.shrink(x, rows), want).rms
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
    assert exact < 3e-7 and 1e-5 < rounded < 1e-3


# ---------------------------------------------------------------- topk

VARIANTS = {
    "renormalized": {},
    "balance": {"balance": True},
    "switch-balance": {"renormalize": False, "balance": True},
    "token-balance": {"dropout": 0.3, "dropout_mode": "token", "seed": SEED, "balance": True},
    "token-switch": {
        "dropout": 0.3, "dropout_mode": "token", "seed": SEED, "renormalize": False,
    },
    "expert": {"dropout": 0.3, "dropout_mode": "expert", "seed": SEED},
}  # fmt: skip


# Shapes of the shared list; with one multiprocessor the mix is in the shrink's launch.
@pytest.mark.parametrize(
    ("shape", "arch", "dtype", "multiprocessors", "variant"),
    [
        (Shape(0, 32, 48, 4, 2, 2), 90, BF16, None, "renormalized"),
        (Shape(3, 1, 1, 2, 1, 1), 80, F32, None, "renormalized"),
        (Shape(5, 33, 47, 4, 3, 2), 90, F16, 1, "token-switch"),
        (Shape(16, 257, 129, 8, 4, 2), 80, F32, 1, "renormalized"),
        (Shape(17, 128, 64, 1, 8, 1), 80, BF16, None, "balance"),
        (Shape(77, 256, 512, 32, 1, 4), 90, BF16, 1, "balance"),
        (Shape(130, 200, 136, 8, 8, 2), 90, F32, None, "switch-balance"),
        (Shape(40, 128, 130, 3, 4, 3), 90, F16, 1, "expert"),
        (Shape(33, 130, 258, 2, 64, 2), 80, BF16, 1, "renormalized"),
        (Shape(64, 96, 100, 5, 16, 4), 80, BF16, 1, "token-balance"),
        (Shape(9, 40, 24, 128, 2, 3), 90, BF16, None, "renormalized"),
        (Shape(513, 17, 19, 4, 2, 2), 80, F32, None, "renormalized"),
    ],
    ids=str,
)
def test_topk_matches_reference(shape, arch, dtype, multiprocessors, variant):
    """Output, statistics and all gradients; errors pooled over a few draws, as in test_ops."""
    options = VARIANTS[variant]
    got, plain, want = [], [], []
    for seed in range(4 if shape.T < 64 else 1):
        inputs = make_inputs(shape, dtype, seed)
        with gpu(arch, multiprocessors) as device:
            got.append(run(functional.mola, inputs, shape.k, **options))
        want.append(reference_run(inputs, shape.k, torch.float64, **options))
        plain.append(reference_run(inputs, shape.k, dtype, **options))
        counts = [runs[-1].pop("counts") for runs in (got, plain, want)]
        assert torch.equal(counts[0], counts[2])
        if shape.k == 1 and options.get("renormalize", True) and not options.get("balance"):
            # The weight is the constant 1: the reference's zero is rounded, ours is exact.
            assert not got[-1]["drouter"].any()
            plain[-1]["drouter"].zero_()
            want[-1]["drouter"].zero_()
    pooled = [
        {name: torch.stack([r[name] for r in runs]) for name in QUANTITIES}
        for runs in (got, plain, want)
    ]
    numerics.check_numerics(f"triton {shape}", *pooled)
    if multiprocessors:
        few_columns = tiles.power_of_2(shape.E) * tiles.power_of_2(shape.r) <= 64
        fused = names(device)[0] == "shrink_and_mix"
        assert fused == (few_columns and variant != "expert")


# What the tests below share, so that its kernels are compiled once.
STANDARD = Shape(70, 200, 136, 8, 8, 2)


def test_launches():
    """Beside the base GEMM: 3 or 2 forward, at most 5 backward."""
    inputs = make_inputs(STANDARD._replace(T=600), BF16)
    leaves = [t.requires_grad_() for t in (inputs.x, *inputs[3:6])]
    for multiprocessors, forward, mix_backward, add in (
        (132, ["shrink_parts", "mix"], ["shrink_parts", "mix_backward"], ["add_gradients"]),
        (1, ["shrink_and_mix"], ["shrink_and_mix_backward"], []),
    ):
        with gpu(90, multiprocessors, execute=False) as device:
            y = functional.mola(leaves[0], inputs.weight, None, *leaves[1:], 2, 1.0)
            assert names(device) == [*forward, "expand_and_count"]
            device.launches.clear()
            torch.autograd.grad(y, leaves, inputs.dy)
            assert names(device) == [*mix_backward, "expand_rows", "outer_parts", *add]


def adapter(inputs, rows, **options):
    """Output and dx of the adapter alone for some tokens."""
    x = inputs.x[rows].detach().requires_grad_()
    base = torch.zeros(len(rows), STANDARD.N, dtype=x.dtype)
    y = functional.mola(
        x, None, None, inputs.lora_down, inputs.lora_up, inputs.router, 2, 2.0, base_output=base,
        **options,
    )  # fmt: skip
    return y.detach(), *torch.autograd.grad(y, x, inputs.dy[rows])


@pytest.mark.parametrize(("arch", "dtype"), [(90, BF16), (80, F32)], ids=str)
def test_a_token_does_not_depend_on_its_neighbours(arch, dtype):
    """The same bits alone and among others, whatever the tiles and wherever the mix runs.

    In float32 no rounding hides a sum in another order, and without renormalisation all logits are
    summed.
    """
    # Products of float32 are slow to compile: fewer rows, as many segments of features.
    shape = STANDARD if dtype == BF16 else Shape(70, 136, STANDARD.N, 4, 4, 2)
    inputs = make_inputs(shape, dtype)
    with gpu(arch, 1):
        whole = adapter(inputs, range(STANDARD.T), renormalize=dtype != F32)
    for multiprocessors in (1, 4, 132):
        with gpu(arch, multiprocessors) as device:
            few, many = [66, 3, *range(8, 38)], list(range(70))
            for rows in ([7], few, many) if dtype == BF16 else (few, many):  # slow in float32
                device.launches.clear()
                results = adapter(inputs, rows, renormalize=dtype != F32)
                for got, want in zip(results, whole, strict=True):
                    assert torch.equal(got, want[rows])
                forward = names(device)[:2]
                if multiprocessors == 1:
                    assert forward == ["shrink_and_mix", "expand_and_count"]
                else:
                    mix = "mix" if rows is many else "mix_and_expand"
                    assert forward == ["shrink_parts", mix]


@pytest.mark.parametrize("mode", ("token", "expert"))
def test_dropout_masks_are_those_of_the_reference(mode):
    """Bit for bit: with one-hot rows the output shows each feature's mask, as does dx."""
    features, p = 70, 0.4
    x = torch.ones(3, features, dtype=BF16, requires_grad=True)
    eye = torch.eye(features, dtype=BF16).expand(2, features, features).contiguous()
    router = torch.tensor([[1.0], [-1.0]], dtype=BF16).expand(2, features).contiguous()
    for value, expert in ((0, 0), (2**63 - 2, 1), (-1, 0)):
        seed = torch.tensor([value])
        with gpu(80):
            y = functional.mola(
                x, None, None, eye, eye, -router if expert else router, 1, 1.0, dropout=p,
                dropout_mode=mode, seed=seed, base_output=torch.zeros_like(x),
            )  # fmt: skip
            (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        want = keep_mask(seed, 3, features, p, expert=expert if mode == "expert" else 0)
        assert torch.equal(y != 0, want)
        assert torch.equal(dx != 0, want)


def routed(x, router, top_k=2, features=136):
    """y and the routing of experts in rank space."""
    E, K = router.shape
    return functional.mola(
        x, None, None, normal(E, 8, K, dtype=x.dtype, seed=1),
        normal(E, 8, features, dtype=x.dtype, seed=2), router, top_k, 1.0,
        base_output=torch.zeros(x.shape[0], features, dtype=x.dtype), return_routing=True,
    )  # fmt: skip


def test_prob_sums_of_many_tokens():
    cases.assert_prob_sums_within_budget(gpu, 4000, 0, strategy="stacked")


def test_no_features_out():
    """An expand of few tokens, whose first block would count, has none."""
    x, router = normal(4, 200, dtype=BF16), normal(8, 200, dtype=BF16)
    with gpu(90):
        _, routing = routed(x, router, features=0)
        _, want = routed(x, router)
    assert torch.equal(routing.counts, want.counts) and want.counts.sum() == 8
    torch.testing.assert_close(routing.prob_sums, want.prob_sums)


def test_ties_go_to_the_lower_index():
    x = torch.zeros(4, 200, dtype=BF16)
    with gpu(90):
        assert routed(x, normal(8, 200, dtype=BF16))[1].counts.tolist() == [4, 4, 0, 0, 0, 0, 0, 0]
        # -0 and +0 are a tie too.
        x[:, 0] = 1
        router = torch.full((8, 200), -0.0, dtype=BF16)
        router[5:, 0], router[1, 0] = 0.0, -1.0
        assert routed(x, router)[1].counts.tolist() == [4, 0, 4, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("arch", "dtype"), [(90, BF16), (80, F16)], ids=str)
def test_a_token_that_is_not_finite_spoils_no_other(arch, dtype):
    """It selects experts that exist, its row is NaN, and all other rows keep their bits."""
    x, router = normal(70, 200, dtype=dtype), normal(8, 200, dtype=dtype)
    router[:, 5] = -1
    spoiled = x.clone()
    spoiled[3] = float("nan")
    spoiled[4, 0] = float("inf")  # logits of +inf and -inf
    spoiled[66, 5] = float("inf")  # all -inf
    others = [t for t in range(70) if t not in (3, 4, 66)]
    for multiprocessors in (1, 132):
        with gpu(arch, multiprocessors):
            y, routing = routed(spoiled, router)
            want, _ = routed(x, router)
        assert torch.equal(y[others], want[others])
        assert y[[3, 4, 66]].isnan().all()
        assert routing.counts.sum() == 140 and routing.counts.min() >= 0
        if not extension.why_missing():
            with use_backend("cpu"):
                assert torch.equal(routed(spoiled, router)[1].counts, routing.counts)


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
def test_minus_infinity_beside_finite_logits_is_a_probability_of_zero(dtype):
    x, router = normal(20, 200, dtype=dtype), normal(8, 200, dtype=dtype)
    x[:, 0], router[:, 0] = 1, 0
    router[2, 0] = -float("inf")
    with gpu(90):
        y, routing = routed(x, router)
    assert routing.counts[2] == 0 and routing.prob_sums[2] == 0
    assert routing.counts.sum() == 40 and y.isfinite().all()
    torch.testing.assert_close(routing.prob_sums.sum(), torch.tensor(20.0))


# ---------------------------------------------------------------- contracts


def forward_arguments(dtype=BF16, dropout=0.0, accumulate=True):
    i = make_inputs(STANDARD._replace(T=20), dtype)
    y = torch.zeros(20, STANDARD.N, dtype=dtype)
    return (
        i.x, i.lora_down, i.lora_up, i.router, None if accumulate else i.bias,
        SEED if dropout else None, y, 2, 0.5, True, dropout, False, True, accumulate,
    )  # fmt: skip


def backward_arguments(dtype=BF16, need_dparams=True):
    arguments = forward_arguments(dtype)
    x, lora_down, lora_up, router = arguments[:4]
    saved, _, prob_sums = triton_ops.topk_forward(*arguments)
    return (
        normal(20, STANDARD.N, dtype=dtype), x, lora_down, lora_up, router, None, saved,
        torch.ones_like(prob_sums), torch.zeros_like(x), 2, 0.5, True, 0.0, False, True, True,
        True, need_dparams,
    )  # fmt: skip


def test_opcheck():
    x, rows = normal(20, 40), normal(8, 40)
    with gpu(90):
        torch.library.opcheck(triton_ops.topk_forward, forward_arguments())
        torch.library.opcheck(triton_ops.topk_forward, forward_arguments(accumulate=False))
        for need_dparams in (False, True):
            torch.library.opcheck(
                triton_ops.topk_backward, backward_arguments(need_dparams=need_dparams)
            )
        torch.library.opcheck(triton_ops.shrink, (x, rows))
        torch.library.opcheck(triton_ops.expand, (normal(20, 8), rows, x, True))
        torch.library.opcheck(triton_ops.outer, (normal(20, 8), x))


def test_compiles_in_one_graph():
    """Forward and backward, with dynamic shapes, to the bits of the eager call."""
    inputs = make_inputs(STANDARD, BF16)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(x, lora_down, lora_up, router):
        return functional.mola(x, inputs.weight, inputs.bias, lora_down, lora_up, router, 2, 2.0)

    leaves = [t.detach().requires_grad_() for t in (inputs.x, *inputs[3:6])]
    for tokens in (20, 70):
        x, dy = leaves[0][:tokens].detach().requires_grad_(), inputs.dy[:tokens]
        with gpu(90):
            y = compiled(x, *leaves[1:])
            got = [y, *torch.autograd.grad(y, (x, *leaves[1:]), dy)]
            y = functional.mola(x, inputs.weight, inputs.bias, *leaves[1:], 2, 2.0)
            want = [y, *torch.autograd.grad(y, (x, *leaves[1:]), dy)]
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


# Positions in the operators' arguments, and what would make a kernel read or write out of bounds.
@pytest.mark.parametrize(
    ("position", "bad", "name"),
    [
        (0, normal(20, 199, dtype=BF16), "x"),
        (0, normal(20, 200), "lora_down"),
        (0, normal(20, 200, dtype=torch.float64), "x"),
        (2, normal(8, 7, 136, dtype=BF16), "lora_up"),
        (3, normal(7, 200, dtype=BF16), "router"),
        (6, normal(19, 136, dtype=BF16), "y"),
        (7, 9, "top_k"),
        (7, 0, "top_k"),
    ],
)
def test_operators_called_directly_do_not_leave_their_memory(position, bad, name):
    arguments = list(forward_arguments())
    arguments[position] = bad
    with pytest.raises(RuntimeError, match=name):
        triton_ops.topk_forward(*arguments)


@pytest.mark.parametrize(
    ("position", "shape", "name"),
    [(0, (20, 135), "dy"), (6, (7,), "saved"), (7, (7,), "dprob_sums"), (8, (19, 200), "dx")],
)
def test_backward_called_directly_does_not_leave_its_memory(position, shape, name):
    with gpu(90):
        arguments = list(backward_arguments())
        arguments[position] = torch.zeros(shape, dtype=arguments[position].dtype)
        with pytest.raises(RuntimeError, match=name):
            triton_ops.topk_backward(*arguments)


def test_frozen_experts_cost_no_weight_gradients():
    inputs = make_inputs(STANDARD, BF16)
    with gpu(90) as device:
        _, dx = adapter(inputs, range(70))
        assert names(device)[-1] == "expand_rows"
        trained = inputs.lora_down.detach().requires_grad_()
        _, want = adapter(inputs._replace(lora_down=trained), range(70))
        assert names(device)[-1] == "outer_parts"
    assert torch.equal(dx, want)


def test_large_offsets():
    """Rows beyond 2**31 elements: strides are 64-bit."""
    x = torch.empty(2**31 + 200, dtype=BF16).as_strided((2, 200), (2**31, 1))
    x.copy_(normal(2, 200))
    with gpu(90):
        got = triton_ops.shrink(x, normal(8, 200, dtype=BF16))
        want = triton_ops.shrink(x.clone(), normal(8, 200, dtype=BF16))
    assert torch.equal(got, want)


def test_float64_is_refused():
    with gpu(), pytest.raises(RuntimeError, match=r"'triton' .* does not compute in torch.float64"):
        functional.shrink(normal(2, 3).double(), normal(4, 3).double())


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not there
import moelora_ops
from moelora_ops import backends
print(dict(backends.available())["triton"])
"""


def test_without_triton_the_package_imports_and_says_so():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "triton is not installed"


def test_importing_the_package_does_not_import_triton():
    program = "import moelora_ops, sys; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


# ---------------------------------------------------------------- tiles


def test_what_every_block_does_by_itself():
    """Few tokens, and as many columns as a block of 128 threads holds with 32 values each."""
    assert [tiles.own_mix(T, 64) for T in (0, 1, 5, 32, 33)] == [None, 1, 8, 32, None]
    assert [tiles.own_mix(32, n) for n in (128, 129)] == [32, None]
    assert [tiles.own_mix(1, n) for n in (4096, 4097)] == [1, None]
    # A sequence reads 1 MB of experts in bfloat16, and 16.5 MB cost as much as a launch.
    experts = (8, 8, 4096)
    assert [tiles.own_merge(T, n, experts, experts, 2) for T, n in ((1, 1), (30, 15))] == [1, 2]
    assert tiles.own_merge(32, 16, experts, experts, 2) is None
    assert tiles.own_merge(33, 1, experts, experts, 2) is None
    assert tiles.own_merge(0, 1, experts, experts, 2) is None
    # A block reads 65 kB of them, and 252 kB cost as much as a launch.
    assert [tiles.own_merge(1, 1, (E, 8, 4096), experts, 2) for E in (30, 31)] == [1, None]


@pytest.mark.parametrize("itemsize", (2, 4))
@pytest.mark.parametrize("rows", (1, 13, 64, 200, 1000))
def test_tiles_cover_everything(itemsize, rows):
    for name, multiprocessors in (("sm_80", 108), ("sm_90", 132), ("sm_100", 148), ("sm_90", 1)):
        arch = tiles.Arch("cuda", name, multiprocessors)
        for tokens in (1, 33, 2048, 8192, 10**6):
            for features in (0, 1, 200, 576, 1100, 4096, 14336):
                tile = tiles.shrink(tokens, features, rows, 8, itemsize, arch)
                assert tile.parts * tile.span >= features > (tile.parts - 1) * tile.span - 1
                assert tile.span % tiles.segment(features) == 0
                assert tiles.segment(features) % tile.BK == 0
                assert tile.columns * tile.BA >= rows and tile.columns * tile.BB >= 8
                # The order of a sum must not depend on these.
                assert tiles.SHRINK_STEP[itemsize] == tile.BK
                assert tile.parts <= tiles.MOST_SEGMENTS and tile.BT >= 64
                tile = tiles.outer(tokens, features, rows, itemsize, arch)
                assert tile.splits * tile.span >= tokens > (tile.splits - 1) * tile.span
                tile = tiles.expand(tokens, features, rows, itemsize, arch)
                assert tile.walk % tile.BT == 0
