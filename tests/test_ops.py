"""The operators: their contracts, and the float64 reference on the shared case list."""

import os
import subprocess
import sys

import cases
import pytest
import torch
from cases import DTYPES, QUANTITIES, SHAPES, Shape, make_inputs, run
from isa_levels import ISA_LEVELS, run_at

from moelora_ops import backends, functional, ops, use_backend
from moelora_ops.backends import extension
from moelora_ops.bench import numerics

pytestmark = pytest.mark.skipif(bool(extension.why_missing()), reason=extension.why_missing())

SEED = torch.tensor([0x1234567890ABCDE])
VARIANTS = {
    "renormalized": {},
    "balance": {"balance": True},
    "switch-style": {"renormalize": False},
    "switch-style-balance": {"renormalize": False, "balance": True},
    "dropout-token": {"dropout": 0.3, "dropout_mode": "token", "seed": SEED},
    "dropout-expert": {"dropout": 0.3, "dropout_mode": "expert", "seed": SEED},
    "dropout-balance": {
        "dropout": 0.1, "dropout_mode": "expert", "seed": SEED, "balance": True,
        "renormalize": False,
    },
}  # fmt: skip


def assert_within_budget(shape, dtype, **options):
    cases.assert_within_budget(shape, dtype, lambda: use_backend("cpu"), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype):
    assert_within_budget(shape, dtype)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("strategy", ("stacked", "grouped"))
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s.T in (0, 5, 40, 77, 130, 300)], ids=str)
def test_variants_match_reference(shape, variant, strategy, dtype):
    assert_within_budget(shape, dtype, strategy=strategy, **VARIANTS[variant])


def test_long_sums():
    """Many tokens and features: the blocked sums of the weight gradients."""
    assert_within_budget(Shape(2100, 1500, 1100, 4, 8, 2), torch.float32)


def test_prob_sums_of_many_tokens():
    cases.assert_prob_sums_within_budget(lambda: use_backend("cpu"), 30_000, 4)


def test_many_rows_per_token():
    assert_within_budget(Shape(12, 24, 40, 128, 24, 90), torch.float32, strategy="grouped")


@pytest.mark.parametrize("level", ISA_LEVELS)
def test_every_isa_level(level):
    """The same cases at each level."""
    run_at(
        level,
        "import test_ops\n"
        "from cases import SHAPES, DTYPES\n"
        # Single tokens are too few to compare errors of.
        "for shape in (s for s in SHAPES if s.T == 0 or s.T > 4):\n"
        "    for dtype in DTYPES:\n"
        "        for variant in ('renormalized', 'dropout-balance'):\n"
        "            test_ops.assert_within_budget(shape, dtype, **test_ops.VARIANTS[variant])\n",
    )


def test_unknown_isa_level_is_said():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from moelora_ops.backends import extension; print(extension.isa_level())",
        ],
        env=os.environ | {"MOELORA_CPU_ISA": "sse9", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "MOELORA_CPU_ISA=sse9" in done.stderr
    assert done.stdout.strip() in ISA_LEVELS


# ---------------------------------------------------------------- contracts


def forward_arguments(dtype=torch.float32, stacked=False, dropout=0.0, accumulate=True):
    shape = Shape(20, 24, 40, 4, 3, 2)
    i = make_inputs(shape, dtype)
    y = torch.nn.functional.linear(i.x, i.weight)
    return (
        i.x, i.lora_down, i.lora_up, i.router, None if accumulate else i.bias,
        SEED if dropout else None, y, 2, 0.5, True, dropout, False, stacked, accumulate,
    )  # fmt: skip


def backward_arguments(dtype=torch.float32, stacked=False, need_dparams=True):
    arguments = forward_arguments(dtype, stacked)
    x, lora_down, lora_up, router = arguments[:4]
    saved, _, prob_sums = ops.of("cpu").topk_forward(*arguments)
    return (
        torch.randn(20, 40, dtype=dtype), x, lora_down, lora_up, router, None, saved,
        torch.randn_like(prob_sums), torch.zeros_like(x), 2, 0.5, True, 0.0, False, stacked, True,
        True, need_dparams,
    )  # fmt: skip


@pytest.mark.parametrize("stacked", (False, True))
@pytest.mark.parametrize("dropout", (0.0, 0.2))
@pytest.mark.parametrize("accumulate", (False, True))
def test_opcheck_forward(stacked, dropout, accumulate):
    torch.library.opcheck(
        ops.of("cpu").topk_forward, forward_arguments(torch.float32, stacked, dropout, accumulate)
    )


@pytest.mark.parametrize("stacked", (False, True))
@pytest.mark.parametrize("need_dparams", (False, True))
def test_opcheck_backward(stacked, need_dparams):
    torch.library.opcheck(
        ops.of("cpu").topk_backward, backward_arguments(torch.bfloat16, stacked, need_dparams)
    )


# Positions in the operators' arguments, and what would make a kernel read or write out of bounds.
@pytest.mark.parametrize(
    ("position", "bad", "name"),
    [
        (0, torch.randn(20, 23), "x"),
        (0, torch.randn(20, 24, dtype=torch.float64), "lora_down"),
        (2, torch.randn(4, 2, 40), "lora_up"),
        (3, torch.randn(3, 24), "router"),
        (3, torch.randn(4, 24, dtype=torch.bfloat16), "router"),
        (6, torch.randn(19, 40), "y"),
        (7, 5, "top_k"),
        (7, 0, "top_k"),
    ],
)
def test_operators_called_directly_do_not_leave_their_memory(position, bad, name):
    arguments = list(forward_arguments())
    arguments[position] = bad
    with pytest.raises(RuntimeError, match=name):
        ops.of("cpu").topk_forward(*arguments)


@pytest.mark.parametrize(
    ("position", "shape", "name"), [(0, (20, 39), "dy"), (6, (7,), "saved"), (8, (19, 24), "dx")]
)
def test_backward_called_directly_does_not_leave_its_memory(position, shape, name):
    arguments = list(backward_arguments())
    arguments[position] = torch.randn(shape)
    with pytest.raises(RuntimeError, match=name):
        ops.of("cpu").topk_backward(*arguments)


@pytest.mark.parametrize("tokens", (3, 80))
def test_opcheck_linear(tokens):
    x, weight, bias = torch.randn(tokens, 24), torch.randn(40, 24), torch.randn(40)
    torch.library.opcheck(ops.linear, (x, weight, bias))
    torch.library.opcheck(ops.linear_backward, (torch.randn(tokens, 40), weight))


LINEARS = {
    "forward": (ops.linear, torch.nn.functional.linear),
    "backward": (lambda x, w, _: ops.linear_backward(x, w), lambda x, w, _: x @ w),
}


@pytest.mark.parametrize("direction", LINEARS)
@pytest.mark.parametrize("tokens", (1, 2, 3, 4, 5, 8, 64, 100))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", ((64, 130), (33, 7), (1, 1), (1500, 40)))
def test_linear(dtype, tokens, features, direction):
    terms, columns = features
    shape = (columns, terms) if direction == "forward" else (terms, columns)
    random = torch.Generator().manual_seed(0)
    draws = [
        [torch.randn(s, generator=random).to(dtype) for s in ((tokens, terms), shape, (columns,))]
        for _ in range(32)
    ]
    ours, library = LINEARS[direction]
    want, plain, got = (
        torch.stack([f(*(t.to(wide) for t in draw)) for draw in draws])
        for f, wide in ((library, torch.float64), (library, dtype), (ours, dtype))
    )
    error, limit = numerics.error(got, want), numerics.budget(numerics.error(plain, want), dtype)
    assert error.rms <= limit.rms and error.max <= limit.max


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_bits(dtype):
    """A token's bits do not depend on threads, on its neighbours or on how rows lie in memory."""
    K, N, tokens = 700, 200, 333
    wide = torch.randn(tokens, K + 3).to(dtype)
    x, weight, bias = wide[:, :K], torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)
    dy = torch.randn(tokens, N).to(dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append((ops.linear(x, weight, bias), ops.linear_backward(dy, weight)))
    finally:
        torch.set_num_threads(before)
    y, dx = results[0]
    for other_y, other_dx in results[1:]:
        assert torch.equal(other_y, y) and torch.equal(other_dx, dx)
    assert torch.equal(ops.linear(x.contiguous(), weight, bias), y)
    for first, last in ((0, 40), (17, 100), (300, 333)):  # beyond small_linear, whose sums differ
        assert torch.equal(ops.linear(x[first:last], weight, bias), y[first:last])
        assert torch.equal(ops.linear_backward(dy[first:last], weight), dx[first:last])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", (64, 65, 150))
def test_shrink_bits(dtype, rows):
    """Tokens alone and in a batch; by many rows 16-bit products go another way than by few."""
    K, tokens = 1100, 150
    x, w = torch.randn(tokens, K).to(dtype), torch.randn(rows, K).to(dtype)
    shrink = ops.of("cpu").shrink
    hidden = shrink(x, w)
    for first, last in ((0, 1), (3, 11), (20, 29), (40, 104), (149, 150), (0, 17)):
        assert torch.equal(shrink(x[first:last], w), hidden[first:last])
    exact = x.double() @ w.double().t()
    wide = ops.accumulator_dtype(dtype)
    plain = x.to(wide) @ w.to(wide).t()
    error = numerics.error(hidden, exact)
    limit = numerics.budget(numerics.error(plain, exact), wide)
    assert error.rms <= limit.rms and error.max <= limit.max


def test_linear_refuses_what_does_not_fit():
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    for arguments, name in (
        ((x[:, :7], weight, None), "x"),
        ((x, weight.double(), None), "weight"),
        ((x, weight[0], None), "weight"),
        ((x, weight, torch.randn(5)), "bias"),
        ((x, weight, torch.randn(6).half()), "bias"),
    ):
        with pytest.raises(RuntimeError, match=name):
            ops.linear(*arguments)
    with pytest.raises(RuntimeError, match="dy"):
        ops.linear_backward(x, weight)
    assert ops.linear(x[:0], weight, None).shape == (0, 6)
    assert ops.linear_backward(torch.empty(0, 6), weight).shape == (0, 8)
    assert (ops.linear(torch.empty(20, 0), torch.empty(6, 0), None) == 0).all()


@pytest.mark.parametrize("stacked", (False, True))
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant, stacked):
    """Finite differences in float64 through the real kernels."""
    options = dict(VARIANTS[variant])
    balance = options.pop("balance", False)
    i = make_inputs(Shape(6, 7, 5, 3, 2, 2), torch.float64)
    leaves = [t.requires_grad_() for t in (i.x, i.weight, i.bias, i.lora_down, i.lora_up, i.router)]

    def function(*arguments):
        y, routing = functional.mola(
            *arguments,
            2,
            0.7,
            strategy="stacked" if stacked else "grouped",
            return_routing=True,
            **options,
        )
        return (y, routing.prob_sums) if balance else y

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("strategy", ("stacked", "grouped"))
def test_a_token_does_not_depend_on_its_neighbours(strategy, dtype):
    """The same adapter bits at T = 1 and inside a large batch, forward and dx."""
    shape = Shape(200, 130, 140, 8, 6, 2)
    i = make_inputs(shape, dtype)

    def adapter(rows):
        x = i.x[rows].detach().requires_grad_()
        base = torch.zeros(len(rows), shape.N, dtype=dtype)
        y = functional.mola(
            x,
            None,
            None,
            i.lora_down,
            i.lora_up,
            i.router,
            2,
            2.0,
            base_output=base,
            strategy=strategy,
        )
        (dx,) = torch.autograd.grad(y, x, i.dy[rows])
        return y.detach(), dx

    whole, dx = adapter(range(200))
    for rows in ([7], [3, 150, 9], list(range(40, 75))):
        y, dxs = adapter(rows)
        assert torch.equal(y, whole[rows])
        assert torch.equal(dxs, dx[rows])


@pytest.mark.parametrize("variant", ("balance", "dropout-expert"))
def test_bits_do_not_depend_on_threads_or_runs(variant):
    shape = Shape(777, 300, 410, 8, 8, 2)
    i = make_inputs(shape, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5, 5):
            torch.set_num_threads(threads)
            results.append(run(functional.mola, i, 2, **VARIANTS[variant]))
    finally:
        torch.set_num_threads(before)
    # The base GEMM is the library's and may differ by thread count: compare what is ours.
    for name in QUANTITIES[1:]:
        if name != "dx":
            assert all(torch.equal(results[0][name], r[name]) for r in results[1:]), name
    assert all(torch.equal(results[2][n], results[3][n]) for n in QUANTITIES)


def test_every_output_is_written():
    """Outputs that come from empty memory must not keep what was there."""
    poison = float("nan")
    arguments = list(forward_arguments(accumulate=False))
    arguments[6].fill_(poison)
    outputs = ops.of("cpu").topk_forward(*arguments)
    assert arguments[6].isfinite().all()
    assert all(o.isfinite().all() for o in outputs[1:])
    dx, accumulate = 8, 15
    backward = list(backward_arguments())
    backward[dx].fill_(poison)
    backward[accumulate] = False  # dx is to be overwritten
    assert all(o.isfinite().all() for o in ops.of("cpu").topk_backward(*backward))
    assert backward[dx].isfinite().all()


@pytest.mark.parametrize("mode", ("token", "expert"))
def test_dropout_masks_are_those_of_the_reference(mode):
    """Bit for bit: with one-hot rows the output shows each feature's mask."""
    from moelora_ops.reference import keep_mask

    features, p = 70, 0.4
    x = torch.ones(3, features, dtype=torch.float64)
    down = torch.zeros(2, features, features, dtype=torch.float64)
    down[:] = torch.eye(features)
    router = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(2, features).contiguous()
    for seed in (0, 2**63 - 2, -1):
        seed = torch.tensor([seed])
        y = functional.mola(
            x, None, None, down, down, router, 1, 1.0, dropout=p, dropout_mode=mode, seed=seed,
            base_output=torch.zeros(3, features, dtype=torch.float64),
        )  # fmt: skip
        assert torch.equal(y != 0, keep_mask(seed, 3, features, p, expert=0))
        y = functional.mola(
            x, None, None, down, down, -router, 1, 1.0, dropout=p, dropout_mode=mode, seed=seed,
            base_output=torch.zeros(3, features, dtype=torch.float64),
        )  # fmt: skip
        assert torch.equal(y != 0, keep_mask(seed, 3, features, p, expert=int(mode == "expert")))


@pytest.mark.parametrize("strategy", ("stacked", "grouped"))
def test_ties_go_to_the_lower_index(strategy):
    x = torch.zeros(4, 6)
    down, up, router = torch.randn(5, 2, 6), torch.randn(5, 2, 3), torch.randn(5, 6)
    _, routing = functional.mola(
        x, torch.randn(3, 6), None, down, up, router, 2, 1.0, strategy=strategy, return_routing=True
    )
    assert routing.counts.tolist() == [4, 4, 0, 0, 0]
    # -0 and +0 are a tie too.
    router = torch.tensor([[1.0], [-1.0], [1.0]]) * torch.ones(6)
    _, routing = functional.mola(
        x,
        torch.randn(3, 6),
        None,
        down[:3],
        up[:3],
        router,
        1,
        1.0,
        strategy=strategy,
        return_routing=True,
    )
    assert routing.counts.tolist() == [4, 0, 0]


@pytest.mark.parametrize("strategy", ("stacked", "grouped"))
def test_unused_experts_get_zero_gradients(strategy):
    """Zero, not None and not garbage: an expert with no tokens, and all tokens on one expert."""
    i = make_inputs(Shape(30, 16, 24, 4, 3, 1), torch.float32)
    router = torch.zeros_like(i.router)
    router[2] = 1
    x = i.x.abs()
    got = run(functional.mola, i._replace(x=x, router=router), 1, strategy=strategy)
    assert got["counts"].tolist() == [0, 0, 30, 0]
    for name in ("dlora_down", "dlora_up"):
        assert got[name][2].any() and not got[name][[0, 1, 3]].any()


def test_memory_saved_for_backward():
    """At most 8 T (R + E) bytes beyond x."""
    for shape in (
        Shape(256, 64, 96, 8, 8, 2),
        Shape(256, 64, 96, 8, 1, 8),
        Shape(256, 64, 96, 4, 16, 4),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            i = make_inputs(shape, dtype)
            parameters = [t.requires_grad_() for t in (i.lora_down, i.lora_up, i.router)]
            known = {t.data_ptr() for t in (i.x, i.weight, *parameters)}
            saved = {}

            def pack(t, known=known, saved=saved):
                if t.data_ptr() not in known:
                    saved[t.data_ptr()] = t.untyped_storage().nbytes()
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                functional.mola(i.x, i.weight, None, *parameters, shape.k, 1.0)
            assert 0 < sum(saved.values()) <= 8 * shape.T * shape.E * (shape.r + 1)


def test_frozen_experts_do_not_keep_the_input():
    i = make_inputs(Shape(64, 48, 40, 4, 2, 2), torch.float32)
    want = run(functional.mola, i, 2)
    for trained in (False, True):
        x = i.x.clone().requires_grad_()
        lora_down = i.lora_down.clone().requires_grad_(trained)
        saved = []

        def pack(t, saved=saved):
            saved.append(t.data_ptr())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = functional.mola(x, i.weight, i.bias, lora_down, i.lora_up, i.router, 2, 2.0)
        assert (x.data_ptr() in saved) is trained
        assert torch.equal(torch.autograd.grad(y, x, i.dy)[0], want["dx"])


def test_only_the_base_needs_a_gradient():
    i = make_inputs(Shape(9, 48, 40, 4, 2, 2), torch.float32)
    base = torch.randn(9, 40, requires_grad=True)
    y = functional.mola(i.x, None, None, i.lora_down, i.lora_up, i.router, 2, 2.0, base_output=base)
    assert torch.equal(torch.autograd.grad(y, base, i.dy)[0], i.dy)


@pytest.mark.parametrize("tokens", (3, 100))
def test_strided_parameters(tokens):
    """Views as weight, bias and experts: their gaps are not read."""
    i = make_inputs(Shape(tokens, 24, 40, 4, 3, 2), torch.float32)

    def strided(t):
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"))
        wide[..., ::2] = t
        return wide[..., ::2]

    parameters = (i.weight, i.bias, i.lora_down, i.lora_up, i.router)
    got = functional.mola(i.x, *map(strided, parameters), 2, 2.0)
    want = functional.mola(i.x, *parameters, 2, 2.0)
    torch.testing.assert_close(got, want)


def test_large_offsets():
    """Rows beyond 2**31 elements: strides are 64-bit."""
    x = torch.empty(2**31 + 16, dtype=torch.bfloat16).as_strided((2, 16), (2**31, 1))
    x.copy_(torch.randn(2, 16))
    i = make_inputs(Shape(2, 16, 24, 4, 2, 2), torch.bfloat16)
    got = functional.mola(x, i.weight, None, i.lora_down, i.lora_up, i.router, 2, 1.0)
    want = functional.mola(x.clone(), i.weight, None, i.lora_down, i.lora_up, i.router, 2, 1.0)
    assert torch.equal(got, want)


def test_automatic_choice_takes_the_kernels():
    assert backends.choose(torch.device("cpu"), torch.float32) == "cpu"
