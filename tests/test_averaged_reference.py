"""The literal averaged mix, judged by numpy loops, closed forms and finite differences."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moelora_ops import reference

BATCH, LENGTH, K, N, E, R = 3, 4, 6, 12, 5, 2
SCALE = 0.7
KINDS = ("token", "sequence", "row_map")


def make_inputs(kind, splits, seed=0):
    """float64 arguments; ``rows [T]`` says which weights each token takes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tokens = BATCH * LENGTH
    rows = {
        "token": torch.arange(tokens),
        "sequence": torch.arange(BATCH).repeat_interleave(LENGTH),
        "row_map": torch.randint(4, (tokens,), generator=generator),
    }[kind]
    shape = {"token": (BATCH, LENGTH), "sequence": (BATCH,), "row_map": (4,)}[kind]
    inputs = {
        "x": normal(BATCH, LENGTH, K), "weight": normal(N, K), "bias": normal(N),
        "lora_down": normal(E, R, K), "lora_up": normal(E, R, N),
        "weights": normal(*shape, *([splits] if splits > 1 else []), E),
    }  # fmt: skip
    options = {"splits": splits}
    if kind == "row_map":
        options["row_map"] = rows.to(torch.int32)
    return inputs, options, rows


def by_token(inputs, rows, splits):
    """y, and what its gradients are made of, one token, segment and expert at a time."""
    x, weight, bias, down, up, w = (t.detach().numpy() for t in inputs.values())
    x, w = x.reshape(-1, K), w.reshape(-1, splits, E)
    inside, outside = K // splits, N // splits
    y, hidden = np.zeros((len(x), N)), np.zeros((len(x), R))
    for t, row in enumerate(rows.tolist()):
        y[t] = weight @ x[t] + bias
        for q in range(splits):
            part = slice(q * inside, (q + 1) * inside)
            for e in range(E):
                hidden[t] += w[row, q, e] * (down[e][:, part] @ x[t, part])
        for q in range(splits):
            part = slice(q * outside, (q + 1) * outside)
            for e in range(E):
                y[t, part] += SCALE * w[row, q, e] * (up[e][:, part].T @ hidden[t])
    return y, hidden


def closed_forms(inputs, rows, splits, dy):
    """The gradients of docs/math.md (the averaged mix), summed token by token."""
    x, weight, _, down, up, w = (t.detach().numpy() for t in inputs.values())
    dy, x, w = dy.numpy().reshape(-1, N), x.reshape(-1, K), w.reshape(-1, splits, E)
    _, hidden = by_token(inputs, rows, splits)
    dx, ddown, dup, dw = dy @ weight, np.zeros_like(down), np.zeros_like(up), np.zeros_like(w)
    inside, outside = K // splits, N // splits
    for t, row in enumerate(rows.tolist()):
        segments = [
            (q, slice(q * inside, (q + 1) * inside), slice(q * outside, (q + 1) * outside))
            for q in range(splits)
        ]
        g = {
            (q, e): SCALE * up[e][:, n] @ dy[t, n] for q, _, n in segments for e in range(E)
        }  # dH' per segment
        dhidden = sum(w[row, q, e] * g[q, e] for q, _, _ in segments for e in range(E))
        for q, k, n in segments:
            for e in range(E):
                dw[row, q, e] += g[q, e] @ hidden[t] + dhidden @ (down[e][:, k] @ x[t, k])
                ddown[e][:, k] += w[row, q, e] * np.outer(dhidden, x[t, k])
                dup[e][:, n] += SCALE * w[row, q, e] * np.outer(hidden[t], dy[t, n])
                dx[t, k] += w[row, q, e] * (down[e][:, k].T @ dhidden)
    return dx, ddown, dup, dw


@pytest.mark.parametrize("splits", (1, 2, 3))
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_the_closed_forms(kind, splits):
    inputs, options, rows = make_inputs(kind, splits)
    leaves = [inputs[n].requires_grad_() for n in ("x", "lora_down", "lora_up", "weights")]
    y = reference.averaged(*inputs.values(), SCALE, **options)
    dy = torch.randn(y.shape, dtype=y.dtype)
    want_y, _ = by_token(inputs, rows, splits)
    np.testing.assert_allclose(y.detach().reshape(-1, N), want_y, rtol=1e-12, atol=1e-12)
    for got, want in zip(
        torch.autograd.grad(y, leaves, dy), closed_forms(inputs, rows, splits, dy), strict=True
    ):
        np.testing.assert_allclose(got.reshape(want.shape), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("splits", (1, 2))
def test_finite_differences(splits):
    inputs, options, _ = make_inputs("sequence", splits)
    leaves = [t.requires_grad_() for t in inputs.values()]
    assert torch.autograd.gradcheck(lambda *a: reference.averaged(*a, SCALE, **options), leaves)


def test_a_number_by_hand():
    # Two experts of rank 1 with weights 1/2 and 1/4: A = (1, 2)/2 + (4, 0)/4 = (1.5, 1),
    # B = 2/2 + 8/4 = 3; x = (2, 1) gives h = 4 and y = 10 + 3 · 4 · 0.5.
    y = reference.averaged(
        torch.tensor([[2.0, 1.0]]), torch.tensor([[4.0, 2.0]]), None,
        torch.tensor([[[1.0, 2.0]], [[4.0, 0.0]]]), torch.tensor([[[2.0]], [[8.0]]]),
        torch.tensor([[0.5, 0.25]]), 0.5,
    )  # fmt: skip
    assert y.tolist() == [[16.0]]


def test_one_hot_weights_are_that_lora():
    inputs, _, _ = make_inputs("sequence", 1)
    for e in range(E):
        inputs["weights"] = F.one_hot(torch.full((BATCH,), e), E).double()
        y = reference.averaged(*inputs.values(), SCALE)
        lora = inputs["x"] @ inputs["lora_down"][e].T @ inputs["lora_up"][e]
        want = F.linear(inputs["x"], inputs["weight"], inputs["bias"]) + SCALE * lora
        torch.testing.assert_close(y, want)
        torch.testing.assert_close(y, reference.gated(*inputs.values(), SCALE))


def test_one_hot_weights_per_split_put_a_lora_together_from_segments():
    inputs, options, _ = make_inputs("sequence", 2)
    inputs["weights"] = F.one_hot(torch.tensor([[3, 1]] * BATCH), E).double()
    down, up = (
        torch.cat([inputs[n][3][:, : size // 2], inputs[n][1][:, size // 2 :]], -1)
        for n, size in (("lora_down", K), ("lora_up", N))
    )
    want = (
        F.linear(inputs["x"], inputs["weight"], inputs["bias"]) + SCALE * inputs["x"] @ down.T @ up
    )
    torch.testing.assert_close(reference.averaged(*inputs.values(), SCALE, **options), want)


def test_every_example_has_a_merged_weight_of_its_own():
    inputs, options, _ = make_inputs("sequence", 1)
    y = reference.averaged(*inputs.values(), SCALE, **options)
    for b in range(BATCH):
        down = torch.tensordot(inputs["weights"][b], inputs["lora_down"], 1)
        up = torch.tensordot(inputs["weights"][b], inputs["lora_up"], 1)
        merged = inputs["weight"] + SCALE * up.T @ down
        torch.testing.assert_close(y[b], F.linear(inputs["x"][b], merged, inputs["bias"]))


def test_it_is_quadratic_in_the_weights_and_equal_splits_change_nothing():
    inputs, _, _ = make_inputs("token", 1)
    base = F.linear(inputs["x"], inputs["weight"], inputs["bias"])
    once = reference.averaged(*inputs.values(), SCALE) - base
    inputs["weights"] = 3 * inputs["weights"]
    torch.testing.assert_close(reference.averaged(*inputs.values(), SCALE) - base, 9 * once)
    inputs["weights"] = inputs["weights"].unsqueeze(-2).expand(-1, -1, 3, -1)
    split = reference.averaged(*inputs.values(), SCALE, splits=3) - base
    torch.testing.assert_close(split, 9 * once)


def test_a_base_of_its_own_and_low_precision():
    inputs, _, _ = make_inputs("sequence", 1)
    want = reference.averaged(*inputs.values(), SCALE)
    base = F.linear(inputs["x"], inputs["weight"], inputs["bias"])
    given = {**inputs, "weight": None, "bias": None}
    torch.testing.assert_close(
        reference.averaged(*given.values(), SCALE, base_output=base), want, rtol=0, atol=0
    )
    low = [t.bfloat16() if n != "weights" else t.float() for n, t in inputs.items()]
    y = reference.averaged(*low, SCALE)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), want, rtol=0.05, atol=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(kind):
    inputs, _, _ = make_inputs("sequence", 1)
    x = inputs["x"][:0] if kind != "row_map" else inputs["x"][:0].flatten(0, 1)
    weights = torch.zeros({"token": (0, LENGTH, E), "sequence": (0, E), "row_map": (2, E)}[kind])
    row_map = torch.zeros(0, dtype=torch.int32) if kind == "row_map" else None
    y = reference.averaged(
        x, *list(inputs.values())[1:5], weights.double(), SCALE, row_map=row_map
    )  # fmt: skip
    assert y.shape == (*x.shape[:-1], N)
