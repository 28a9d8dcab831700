"""The reference is what kernels are judged by; here it is judged itself, sharing nothing with it.

Numbers worked out by hand, token-by-token numpy loops, finite differences, the closed-form
gradients of docs/math.md, and the published known-answer vectors of Philox.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

import moelora_ops
from moelora_ops import reference
from moelora_ops.reference import keep_mask, philox4x32

NAMES = ("x", "weight", "bias", "lora_down", "lora_up", "router")


def make_inputs(tokens=5, k_in=6, n_out=4, experts=4, rank=3, seed=0):
    """float64 arguments of ``reference.mola``, all of them drawn from a normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (tokens, k_in), (n_out, k_in), (n_out,), (experts, rank, k_in), (experts, rank, n_out),
        (experts, k_in),
    )  # fmt: skip
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in zip(NAMES, shapes, strict=True)
    }


def to_numpy(inputs):
    return {name: t.detach().numpy() for name, t in inputs.items()}


# Philox in Python integers, straight from the paper's description of a round.


def philox_ints(counter, key):
    c, k = list(counter), list(key)
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (product1 >> 32) ^ c[1] ^ k[0],
            product1 & 0xFFFFFFFF,
            (product0 >> 32) ^ c[3] ^ k[1],
            product0 & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


def keep_row(seed, t, features, p, expert):
    """The layout of docs/math.md for one token, one entry at a time."""
    row = np.zeros(features, dtype=bool)
    for i in range(features):
        words = philox_ints((i // 8, t % 2**32, expert, t >> 32), (seed % 2**32, seed >> 32))
        word = words[(i % 8) // 2]
        row[i] = (word >> 16 if i % 2 else word & 0xFFFF) >= math.floor(p * 2**16 + 0.5)
    return row


# MoLA in numpy, one token and one expert at a time.


def choose(logits, top_k):
    """Indices of the largest logits, the lower index first among equals."""
    return sorted(range(len(logits)), key=lambda e: (-logits[e], e))[:top_k]


def route(logits, top_k, renormalize):
    """(chosen experts, their weights, all probabilities) of one token."""
    powers = [math.exp(value - max(logits)) for value in logits]
    probs = [power / sum(powers) for power in powers]
    chosen = choose(logits, top_k)
    total = sum(probs[e] for e in chosen) if renormalize else 1.0
    return chosen, [probs[e] / total for e in chosen], probs


def dropped(x, t, e, dropout, mode, seed):
    """The input that expert e sees of token t, and what dropout multiplied it by."""
    factor = np.ones(x.shape[1])
    if dropout > 0:
        expert = e if mode == "expert" else 0
        factor = keep_row(seed, t, x.shape[1], dropout, expert) / (1 - dropout)
    return x[t] * factor, factor


def mola_by_token(inputs, top_k, scale, renormalize=True, dropout=0.0, mode="token", seed=0):
    x, weight, bias, down, up, router = (to_numpy(inputs)[name] for name in NAMES)
    experts = len(router)
    y, counts, prob_sums = np.zeros((len(x), len(weight))), [0] * experts, [0.0] * experts
    for t in range(len(x)):
        chosen, weights, probs = route(
            [float(router[e] @ x[t]) for e in range(experts)], top_k, renormalize
        )
        y[t] = weight @ x[t] + bias
        for e, w in zip(chosen, weights, strict=True):
            u, _ = dropped(x, t, e, dropout, mode, seed)
            y[t] += scale * w * (up[e].T @ (down[e] @ u))
            counts[e] += 1
        for e in range(experts):
            prob_sums[e] += probs[e]
    return y, counts, prob_sums


def mola_gradients(
    inputs, dy, dprob_sums, top_k, scale, renormalize=True, dropout=0.0, mode="token", seed=0
):
    """The closed forms of docs/math.md, section 3, summed token by token."""
    x, weight, _, down, up, router = (to_numpy(inputs)[name] for name in NAMES)
    grads = {name: np.zeros_like(value) for name, value in to_numpy(inputs).items()}
    experts = len(router)
    for t in range(len(x)):
        chosen, weights, probs = route(
            [float(router[e] @ x[t]) for e in range(experts)], top_k, renormalize
        )
        dx = weight.T @ dy[t]
        dw = {}
        for e, w in zip(chosen, weights, strict=True):
            u, factor = dropped(x, t, e, dropout, mode, seed)
            h = down[e] @ u
            g = scale * (up[e] @ dy[t])
            dw[e] = g @ h
            grads["lora_up"][e] += scale * w * np.outer(h, dy[t])
            grads["lora_down"][e] += w * np.outer(g, u)
            dx += factor * (down[e].T @ (w * g))

        dlogits = np.zeros(experts)
        if renormalize:
            mean = sum(w * dw[e] for e, w in zip(chosen, weights, strict=True))
            for e, w in zip(chosen, weights, strict=True):
                dlogits[e] += w * (dw[e] - mean)
        dp = [dprob_sums[e] + (0.0 if renormalize else dw.get(e, 0.0)) for e in range(experts)]
        mean = sum(probs[e] * dp[e] for e in range(experts))
        for e in range(experts):
            dlogits[e] += probs[e] * (dp[e] - mean)

        grads["x"][t] = dx + router.T @ dlogits
        grads["router"] += np.outer(dlogits, x[t])
        grads["weight"] += np.outer(dy[t], x[t])
        grads["bias"] += dy[t]
    return grads


def assert_same(name, got, want):
    """Equal up to the rounding of float64 sums of a few dozen terms."""
    got = got.detach().numpy() if isinstance(got, torch.Tensor) else got
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12, err_msg=name)


# By hand: x = (1, 2) has logits (ln 3, 0, -3), so experts 0 and 1 weigh 3/4 and 1/4, their hidden
# values are h = (3, -1), and the base gives (5.5, 0.5).


def tiny():
    inputs = {
        "x": [[1.0, 2.0]],
        "weight": [[1.0, 2.0], [3.0, -1.0]],
        "bias": [0.5, -0.5],
        "lora_down": [[[1.0, 1.0]], [[1.0, -1.0]], [[100.0, 100.0]]],
        "lora_up": [[[1.0, 0.0]], [[2.0, 4.0]], [[1000.0, 1000.0]]],
        "router": [[math.log(3), 0.0], [0.0, 0.0], [-1.0, -1.0]],
    }
    return {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for name, value in inputs.items()
    }


def test_forward_by_hand():
    y, routing = reference.mola(**tiny(), top_k=2, scale=2.0)
    # (5.5, 0.5) + 2 * (3/4 * 3 * (1, 0) + 1/4 * -1 * (2, 4))
    assert_same("y", y, [[9.0, -1.5]])
    assert routing.counts.tolist() == [1, 1, 0]
    total = 4 + math.exp(-3)
    assert_same("prob_sums", routing.prob_sums, [3 / total, 1 / total, math.exp(-3) / total])


def test_forward_by_hand_without_renormalisation():
    y, _ = reference.mola(**tiny(), top_k=2, scale=2.0, renormalize=False)
    shrink = 4 / (4 + math.exp(-3))
    assert_same("y", y, [[5.5 + 3.5 * shrink, 0.5 - 2.0 * shrink]])


def test_gradients_by_hand():
    inputs = tiny()
    reference.mola(**inputs, top_k=2, scale=2.0)[0].sum().backward()
    # g = 2 * (1, 6); dw = g h = (6, -12) with mean 3/2; dlogits = (3/4 * 9/2, 1/4 * -27/2) = ±27/8
    wanted = {
        "weight": [[1.0, 2.0], [1.0, 2.0]],
        "bias": [1.0, 1.0],
        "lora_up": [[[4.5, 4.5]], [[-0.5, -0.5]], [[0.0, 0.0]]],
        "lora_down": [[[1.5, 3.0]], [[3.0, 6.0]], [[0.0, 0.0]]],
        "router": [[3.375, 6.75], [-3.375, -6.75], [0.0, 0.0]],
        # (4, 1) + 3/2 (1, 1) + 3 (1, -1) + 27/8 (ln 3, 0)
        "x": [[8.5 + 3.375 * math.log(3), -0.5]],
    }
    for name, want in wanted.items():
        assert_same(name, inputs[name].grad, want)


CHOICES = [
    pytest.param(4, 2, True, id="k=2"),
    pytest.param(4, 2, False, id="k=2, not renormalised"),
    pytest.param(4, 1, True, id="k=1"),
    pytest.param(4, 1, False, id="k=1, not renormalised"),
    pytest.param(4, 4, True, id="k=E"),
    pytest.param(4, 4, False, id="k=E, not renormalised"),
    pytest.param(1, 1, True, id="E=1"),
    pytest.param(17, 5, True, id="E=17"),
]
DROPOUTS = [
    pytest.param(0.0, "token", id="no dropout"),
    pytest.param(0.4, "token", id="token mask"),
    pytest.param(0.4, "expert", id="expert masks"),
]
SEED = 0x1234_5678_9ABC_DEF0


@pytest.mark.parametrize("dropout, mode", DROPOUTS)
@pytest.mark.parametrize("experts, top_k, renormalize", CHOICES)
@pytest.mark.parametrize("scale", [2.0, -0.3])
def test_forward_token_by_token(experts, top_k, renormalize, scale, dropout, mode):
    # 11 features: one whole Philox group of eight and a part of the next.
    inputs = make_inputs(tokens=7, k_in=11, experts=experts)
    y, routing = reference.mola(
        **inputs, top_k=top_k, scale=scale, renormalize=renormalize,
        dropout=dropout, dropout_mode=mode, seed=torch.tensor([SEED]),
    )  # fmt: skip
    want_y, want_counts, want_sums = mola_by_token(
        inputs, top_k, scale, renormalize, dropout, mode, SEED
    )
    assert_same("y", y, want_y)
    assert routing.counts.tolist() == want_counts
    assert_same("prob_sums", routing.prob_sums, want_sums)


@pytest.mark.parametrize("dropout, mode", DROPOUTS)
@pytest.mark.parametrize("experts, top_k, renormalize", CHOICES)
@pytest.mark.parametrize("through", ["y", "prob_sums", "both"])
def test_gradients_are_the_closed_forms(experts, top_k, renormalize, dropout, mode, through):
    inputs = {name: t.requires_grad_() for name, t in make_inputs(k_in=11, experts=experts).items()}
    y, routing = reference.mola(
        **inputs, top_k=top_k, scale=1.7, renormalize=renormalize,
        dropout=dropout, dropout_mode=mode, seed=torch.tensor([SEED]),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, dtype=y.dtype)
    dprob_sums = torch.randn(experts, generator=generator, dtype=y.dtype)
    if through == "y":
        dprob_sums.zero_()
    if through == "prob_sums":
        dy.zero_()
    torch.autograd.backward((y, routing.prob_sums), (dy, dprob_sums))
    want = mola_gradients(
        inputs, dy.numpy(), dprob_sums.numpy(), top_k, 1.7, renormalize, dropout, mode, SEED
    )
    for name in NAMES:
        assert_same(name, inputs[name].grad, want[name])


@pytest.mark.parametrize("dropout, mode", DROPOUTS)
@pytest.mark.parametrize("renormalize", [True, False])
def test_gradients_by_finite_differences(renormalize, dropout, mode):
    inputs = {name: t.requires_grad_() for name, t in make_inputs(2, 5, 3, 3, 2).items()}

    def outputs(*args):
        y, routing = reference.mola(
            *args, top_k=2, scale=1.7, renormalize=renormalize, dropout=dropout, dropout_mode=mode,
            seed=torch.tensor([SEED]),
        )  # fmt: skip
        return y, routing.prob_sums

    assert torch.autograd.gradcheck(outputs, tuple(inputs.values()))


def test_renormalised_weights_are_the_softmax_of_the_selected_logits():
    inputs = make_inputs(tokens=20, experts=6)
    # Rank-1 experts that are constant 1 in one output each, so that y shows the weights themselves.
    inputs["x"][:, 0] = 1.0
    inputs["lora_down"] = torch.zeros(6, 1, 6, dtype=torch.float64)
    inputs["lora_down"][:, :, 0] = 1.0
    inputs["lora_up"] = torch.eye(6, dtype=torch.float64)[:, None]
    inputs.update(weight=torch.zeros(6, 6, dtype=torch.float64), bias=None)
    weights, _ = reference.mola(**inputs, top_k=3, scale=1.0)
    logits = inputs["x"] @ inputs["router"].T
    kept = logits.topk(3).indices
    want = torch.zeros_like(logits).scatter(-1, kept, logits.gather(-1, kept).softmax(-1))
    assert_same("weights", weights, want.numpy())


@pytest.mark.parametrize("experts, top_k", [(4, 1), (4, 2), (4, 3), (100, 30)])
def test_ties_go_to_the_lower_index(experts, top_k):
    inputs = make_inputs(tokens=9, experts=experts)
    # Small integers: a GEMM may round equal columns differently.
    inputs["x"], inputs["router"] = inputs["x"].round(), inputs["router"].round()
    inputs["router"][:] = inputs["router"][0].clone()
    y, routing = reference.mola(**inputs, top_k=top_k, scale=1.0)
    assert routing.counts.tolist() == [9 if e < top_k else 0 for e in range(experts)]
    assert_same("y", y, mola_by_token(inputs, top_k, 1.0)[0])


def test_a_tie_below_the_largest_logit():
    inputs = make_inputs(tokens=1, k_in=2, experts=4)
    inputs["x"] = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    inputs["router"] = torch.tensor(
        [[0.0, 9.0], [1.0, 9.0], [5.0, 9.0], [1.0, 9.0]], dtype=torch.float64
    )
    _, routing = reference.mola(**inputs, top_k=2, scale=1.0)
    assert routing.counts.tolist() == [0, 1, 1, 0]


def test_one_renormalised_choice_gives_the_router_no_gradient():
    inputs = make_inputs()
    inputs["router"].requires_grad_()
    y, _ = reference.mola(**inputs, top_k=1, scale=1.0)
    y.sum().backward()
    assert_same("drouter", inputs["router"].grad, np.zeros(inputs["router"].shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_route_by_float32_logits(dtype):
    """Of two logits closer than a 16-bit rounding the larger one wins, although it comes second."""
    inputs = {name: t.to(dtype) for name, t in make_inputs(tokens=1, k_in=2, experts=2).items()}
    inputs["x"] = torch.tensor([[256.0, 0.125]], dtype=dtype)
    inputs["router"] = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=dtype)
    assert torch.tensor(256.125).to(dtype) == 256
    _, routing = reference.mola(**inputs, top_k=1, scale=1.0)
    assert routing.counts.tolist() == [0, 1]
    assert routing.prob_sums.dtype == torch.float32


def test_leading_dimensions_and_base_output():
    inputs = make_inputs(tokens=6)
    y, routing = reference.mola(**inputs, top_k=2, scale=1.0)
    cube = {**inputs, "x": inputs["x"].view(2, 1, 3, 6)}
    y_cube, routing_cube = reference.mola(**cube, top_k=2, scale=1.0)
    assert y_cube.shape == (2, 1, 3, 4)
    assert torch.equal(y_cube.view(6, 4), y)
    assert torch.equal(routing_cube.counts, routing.counts)
    base_output = nn.functional.linear(cube["x"], inputs["weight"], inputs["bias"])
    foreign = {**cube, "weight": None, "bias": None, "base_output": base_output}
    assert torch.equal(reference.mola(**foreign, top_k=2, scale=1.0)[0], y_cube)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_no_tokens(shape):
    inputs = make_inputs()
    x = inputs.pop("x").new_empty(*shape, 6)
    y, routing = reference.mola(x, **inputs, top_k=2, scale=1.0)
    assert y.shape == (*shape, 4)
    assert routing.counts.tolist() == [0] * 4 and routing.prob_sums.tolist() == [0.0] * 4
    assert reference.MoLALinear(nn.Linear(6, 4), 4)(x.float()).shape == (*shape, 4)


# Philox and dropout.

KNOWN_ANSWERS = [  # Random123, kat_vectors: counter, key, output
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text):
    return [int(word, 16) for word in text.split()]


def as_int64(low, high):
    """The signed 64-bit number with these halves."""
    value = high << 32 | low
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize("counter, key, output", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, output):
    got = philox4x32(
        torch.tensor(as_int64(*words(key))), tuple(torch.tensor(c) for c in words(counter))
    )
    assert [int(word) for word in got] == words(output)
    assert list(philox_ints(words(counter), words(key))) == words(output)


def test_philox_against_python_integers():
    generator = np.random.default_rng(0)
    counters = generator.integers(0, 2**32, size=(50, 4))
    for seed in (0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1):
        got = philox4x32(torch.tensor([seed]), tuple(torch.from_numpy(counters).unbind(1)))
        want = [philox_ints([int(c) for c in row], (seed % 2**32, seed >> 32)) for row in counters]
        assert torch.stack(got, 1).tolist() == [list(row) for row in want]


@pytest.mark.parametrize("features", [1, 7, 8, 9, 24])
@pytest.mark.parametrize("expert", [0, 3])
def test_keep_mask_layout(features, expert):
    got = keep_mask(torch.tensor([SEED]), 5, features, 0.3, expert)
    assert got.dtype == torch.bool
    assert got.tolist() == [keep_row(SEED, t, features, 0.3, expert).tolist() for t in range(5)]


def correlation(a, b):
    return float(np.corrcoef(a.numpy().ravel(), b.numpy().ravel())[0, 1])


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_keep_mask_is_bernoulli_and_independent(p):
    tokens, features = 512, 64
    n = tokens * features
    mask = keep_mask(torch.tensor([7]), tokens, features, p).double()
    # Five standard deviations: wrong by chance once in two million seeds, and the seed is fixed.
    assert abs(float(mask.mean()) - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    others = {
        "next feature": mask.roll(1, 1),
        "next group": mask.roll(8, 1),
        "next token": mask.roll(1, 0),
        "next expert": keep_mask(torch.tensor([7]), tokens, features, p, expert=1).double(),
        "next seed": keep_mask(torch.tensor([8]), tokens, features, p).double(),
        "high half of the seed": keep_mask(torch.tensor([7 + 2**32]), tokens, features, p).double(),
    }
    for name, other in others.items():
        assert abs(correlation(mask, other)) < 5 / math.sqrt(n), name


def test_keep_mask_resolution():
    """p is resolved in steps of 2**-16."""
    mask = keep_mask(torch.tensor([3]), 4096, 64, 2**-16)
    assert 0 < int((~mask).sum()) < 20  # four expected
    assert keep_mask(torch.tensor([3]), 4096, 64, 0.0).all()
    assert torch.equal(
        keep_mask(torch.tensor([3]), 64, 64, 0.25), keep_mask(torch.tensor([3]), 64, 64, 0.250001)
    )


def test_dropout_modes_share_or_separate_the_masks():
    """Two equal experts, both chosen: under one mask they agree, under two they do not."""
    inputs = make_inputs(tokens=16, k_in=32, experts=2, n_out=2, rank=1)
    inputs.update(weight=torch.zeros(2, 32, dtype=torch.float64), bias=None)
    inputs["lora_down"][1] = inputs["lora_down"][0]
    inputs["lora_up"] = torch.eye(2, dtype=torch.float64)[:, None]  # expert e writes output e
    inputs["router"].zero_()
    options = {"top_k": 2, "scale": 1.0, "dropout": 0.5, "seed": torch.tensor([SEED])}
    shared, _ = reference.mola(**inputs, **options, dropout_mode="token")
    separate, _ = reference.mola(**inputs, **options, dropout_mode="expert")
    assert torch.equal(shared[:, 0], shared[:, 1])
    assert (separate[:, 0] != separate[:, 1]).all()
    # The mask of expert 0 is the mask of the token mode.
    assert torch.equal(separate[:, 0], shared[:, 0])


@pytest.mark.parametrize("mode", ["token", "expert"])
def test_the_router_sees_the_undropped_input(mode):
    inputs = make_inputs(tokens=32)
    _, plain = reference.mola(**inputs, top_k=2, scale=1.0)
    _, routing = reference.mola(
        **inputs, top_k=2, scale=1.0, dropout=0.9, dropout_mode=mode, seed=torch.tensor([SEED])
    )
    assert torch.equal(routing.counts, plain.counts)
    assert torch.equal(routing.prob_sums, plain.prob_sums)


@pytest.mark.parametrize("mode", ["token", "expert"])
def test_dropout_keeps_the_expectation(mode):
    inputs = make_inputs(tokens=4, k_in=16)
    want, _ = reference.mola(**inputs, top_k=2, scale=1.0)
    draws = torch.stack(
        [
            reference.mola(
                **inputs,
                top_k=2,
                scale=1.0,
                dropout=0.25,
                dropout_mode=mode,
                seed=torch.tensor([seed]),
            )[0]
            for seed in range(200)
        ]
    )
    error = (draws.mean(0) - want).abs()
    standard_error = draws.std(0) / math.sqrt(len(draws))
    assert (standard_error > 0).all()
    assert (error < 5 * standard_error).all()


# The layer.


def layer_and_inputs(**options):
    torch.manual_seed(0)
    layer = reference.MoLALinear(nn.Linear(6, 4), 4, rank=3, alpha=6.0, **options).double()
    nn.init.normal_(layer.lora_up)
    return layer, make_inputs()["x"]


@pytest.mark.parametrize("renormalize", [True, False])
def test_layer_is_the_function(renormalize):
    layer, x = layer_and_inputs(top_k=3, renormalize=renormalize)
    y, routing = reference.mola(
        x, layer.base.weight, layer.base.bias, layer.lora_down, layer.lora_up, layer.router,
        top_k=3, scale=6.0 / 3, renormalize=renormalize,
    )  # fmt: skip
    assert torch.equal(layer(x), y)
    assert torch.equal(layer.routing.counts, routing.counts)
    assert torch.equal(layer.routing.prob_sums, routing.prob_sums)


@pytest.mark.parametrize("mode", ["token", "expert"])
def test_layer_dropout_is_seeded_by_torch_and_off_in_eval(mode):
    layer, x = layer_and_inputs(dropout=0.5, dropout_mode=mode)

    def run(seed):
        torch.manual_seed(seed)
        return layer(x)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    torch.manual_seed(1)
    seed = torch.randint(2**63 - 1, (1,))
    want, _ = reference.mola(
        x, layer.base.weight, layer.base.bias, layer.lora_down, layer.lora_up, layer.router, 2, 2.0,
        dropout=0.5, dropout_mode=mode, seed=seed,
    )  # fmt: skip
    assert torch.equal(run(1), want)
    layer.eval()
    undropped, _ = layer_and_inputs()
    undropped.load_state_dict(layer.state_dict())
    assert torch.equal(run(1), undropped(x))


def test_layer_starts_as_its_base_and_freezes_it():
    torch.manual_seed(0)
    base = nn.Linear(6, 4)
    layer = reference.MoLALinear(base, 4)
    x = torch.randn(5, 6)
    assert torch.equal(layer(x), base(x))
    trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trainable == {"lora_down", "lora_up", "router"}
    layer(x).sum().backward()
    assert base.weight.grad is None and layer.lora_up.grad.abs().sum() > 0


def test_layer_initialisation():
    """Kaiming-uniform with a = √5 on each expert's own matrix: uniform in ±1/√in_features."""
    torch.manual_seed(0)
    layer = reference.MoLALinear(nn.Linear(64, 32), 8, rank=16)
    bound = 1 / math.sqrt(64)
    for name in ("lora_down", "router"):
        values = getattr(layer, name).detach()
        n = values.numel()
        assert values.abs().max() <= bound, name
        assert values.abs().max() > bound * (1 - 10 / n), name
        # Moments of the uniform distribution, within five standard errors.
        assert abs(float(values.mean())) < 5 * bound / math.sqrt(3 * n), name
        assert abs(float((values / bound).square().mean()) - 1 / 3) < 5 * math.sqrt(4 / 45 / n), (
            name
        )
    assert not torch.equal(layer.lora_down[0], layer.lora_down[1])
    assert not layer.lora_up.any()


def test_layer_has_the_state_of_the_fused_layer():
    layers = [
        cls(nn.Linear(6, 4), 4, rank=3) for cls in (reference.MoLALinear, moelora_ops.nn.MoLALinear)
    ]
    shapes = [{name: tuple(t.shape) for name, t in layer.state_dict().items()} for layer in layers]
    assert shapes[0] == shapes[1]
    assert shapes[0] == {
        "base.weight": (4, 6),
        "base.bias": (4,),
        "lora_down": (4, 3, 6),
        "lora_up": (4, 3, 4),
        "router": (4, 6),
    }


def test_layer_follows_its_base_in_dtype_and_device():
    layer = reference.MoLALinear(nn.Linear(6, 4, dtype=torch.bfloat16, device="meta"), 2)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    layer = reference.MoLALinear(nn.Linear(6, 4), 2, dtype=torch.float64)
    assert layer.router.dtype == torch.float64 and layer.base.weight.dtype == torch.float32
