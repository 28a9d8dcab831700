"""The reference of the gated mix, judged by what shares nothing with it.

A numpy loop over tokens, the closed-form gradients of docs/math.md, finite differences, and cases
that are known by other names: LoRA, a merged weight, a parallel adapter.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moelora_ops import reference

NAMES = ("x", "weight", "bias", "lora_down", "lora_up", "weights", "down_bias", "up_bias")
ACTIVATIONS = [None, "relu", "gelu", "gelu_tanh"]
FORMS = ["token", "sequence", "row_map"]
BATCH, LENGTH, K, N, E, R = 3, 4, 5, 6, 2, 3
SCALES = (0.5, -2.0)


def make_inputs(form="token", biases=True):
    """float64 arguments of ``reference.gated``, normally distributed."""
    rows = {"token": (BATCH, LENGTH, E), "sequence": (BATCH, E), "row_map": (4, E)}[form]
    shapes = ((BATCH, LENGTH, K), (N, K), (N,), (E, R, K), (E, R, N), rows, (E, R), (E, N))
    inputs = {n: torch.randn(s, dtype=torch.float64) for n, s in zip(NAMES, shapes, strict=True)}
    if not biases:
        inputs |= {"down_bias": None, "up_bias": None}
    if form == "row_map":
        # A row that nobody takes, and one that many take.
        inputs["row_map"] = torch.tensor([3, 0, 0, 3, 3, 0, 2, 2, 3, 0, 0, 0], dtype=torch.int32)
    return inputs


def phi(activation, v):
    """φ and φ' of one number, from their definitions."""
    if activation is None:
        return v, 1.0
    if activation == "relu":
        return max(v, 0.0), float(v > 0)
    if activation == "gelu":
        share = (1 + math.erf(v / math.sqrt(2))) / 2
        return v * share, share + v * math.exp(-v * v / 2) / math.sqrt(2 * math.pi)
    c = math.sqrt(2 / math.pi)
    t = math.tanh(c * (v + 0.044715 * v**3))
    return v * (1 + t) / 2, (1 + t) / 2 + v / 2 * (1 - t * t) * c * (1 + 3 * 0.044715 * v * v)


def row_of(t, form, row_map):
    return {"token": t, "sequence": t // LENGTH, "row_map": row_map[t] if row_map else 0}[form]


def gated_by_token(inputs, form, activation, scales, dy=None):
    """y, and with dy the closed-form gradients, one token and one expert at a time."""
    v = {n: t.detach().numpy() for n, t in inputs.items() if t is not None}
    x = v["x"].reshape(-1, K)
    weights = v["weights"].reshape(-1, E)
    row_map = v["row_map"].tolist() if "row_map" in v else None
    y = np.zeros((len(x), N))
    grads = {n: np.zeros_like(a) for n, a in v.items() if n != "row_map"}
    grads |= {"x": np.zeros_like(x), "weights": np.zeros_like(weights)}
    for t, token in enumerate(x):
        row = row_of(t, form, row_map)
        y[t] = v["weight"] @ token + v["bias"]
        if dy is not None:
            grads["weight"] += np.outer(dy[t], token)
            grads["bias"] += dy[t]
            grads["x"][t] += v["weight"].T @ dy[t]
        for e in range(E):
            a = v["down_bias"][e] if "down_bias" in v else np.zeros(R)
            b = v["up_bias"][e] if "up_bias" in v else np.zeros(N)
            before = v["lora_down"][e] @ token + a
            hidden, slope = np.array([phi(activation, value) for value in before]).T
            w = scales[e] * weights[row, e]
            y[t] += w * (hidden @ v["lora_up"][e] + b)
            if dy is None:
                continue
            seen = v["lora_up"][e] @ dy[t]
            dbefore = w * seen * slope
            grads["weights"][row, e] += scales[e] * (seen @ hidden + b @ dy[t])
            grads["lora_up"][e] += w * np.outer(hidden, dy[t])
            grads["lora_down"][e] += np.outer(dbefore, token)
            grads["x"][t] += dbefore @ v["lora_down"][e]
            if "up_bias" in v:
                grads["up_bias"][e] += w * dy[t]
                grads["down_bias"][e] += dbefore
    return y.reshape(BATCH, LENGTH, N), grads


def assert_same(name, got, want):
    np.testing.assert_allclose(
        got.detach().numpy().ravel(), want.ravel(), rtol=1e-11, atol=1e-11, err_msg=name
    )


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_and_gradients_token_by_token(activation, form, biases):
    inputs = make_inputs(form, biases)
    leaves = {n: t.requires_grad_() for n, t in inputs.items() if t is not None and n != "row_map"}
    y = reference.gated(**inputs, scale=SCALES, activation=activation)
    dy = torch.randn_like(y)
    y.backward(dy)
    want, grads = gated_by_token(inputs, form, activation, SCALES, dy.numpy().reshape(-1, N))
    assert_same("y", y, want)
    for name, leaf in leaves.items():
        assert_same(name, leaf.grad, grads[name])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_by_finite_differences(activation):
    inputs = make_inputs("sequence")
    names = [n for n in NAMES if n not in ("weight", "bias")]

    def run(*values):
        return reference.gated(
            **{**inputs, **dict(zip(names, values, strict=True))}, scale=0.7, activation=activation
        )

    assert torch.autograd.gradcheck(run, [inputs[n].requires_grad_() for n in names])


def test_one_number_scales_every_expert():
    inputs = make_inputs()
    for scale in (1.5, [1.5, 1.5], torch.tensor([1.5, 1.5])):
        y = reference.gated(**inputs, scale=scale)
        assert_same("y", y, gated_by_token(inputs, "token", None, (1.5, 1.5))[0])


def test_one_expert_of_weight_one_is_a_lora():
    inputs = make_inputs(biases=False)
    inputs["lora_down"], inputs["lora_up"] = inputs["lora_down"][:1], inputs["lora_up"][:1]
    inputs["weights"] = torch.ones(BATCH, LENGTH, 1)
    merged = inputs["weight"] + 0.3 * inputs["lora_up"][0].T @ inputs["lora_down"][0]
    y = reference.gated(**inputs, scale=0.3)
    torch.testing.assert_close(y, F.linear(inputs["x"], merged, inputs["bias"]))


def test_equal_weights_are_the_mean_of_the_merged_weights():
    inputs = make_inputs("sequence", biases=False)
    inputs["weights"] = torch.full((BATCH, E), 1 / E, dtype=torch.float64)
    updates = [inputs["lora_up"][e].T @ inputs["lora_down"][e] for e in range(E)]
    merged = inputs["weight"] + sum(updates) / E
    y = reference.gated(**inputs)
    torch.testing.assert_close(y, F.linear(inputs["x"], merged, inputs["bias"]))


def test_a_gelu_expert_is_a_parallel_adapter():
    inputs = make_inputs("token")
    adapter = torch.nn.Sequential(
        torch.nn.Linear(K, R), torch.nn.GELU(approximate="tanh"), torch.nn.Linear(R, N)
    ).double()
    inputs |= {
        "lora_down": adapter[0].weight[None], "lora_up": adapter[2].weight.T[None],
        "down_bias": adapter[0].bias[None], "up_bias": adapter[2].bias[None],
        "weights": torch.ones(BATCH, LENGTH, 1, dtype=torch.float64),
    }  # fmt: skip
    y = reference.gated(**inputs, activation="gelu_tanh")
    want = F.linear(inputs["x"], inputs["weight"], inputs["bias"]) + adapter(inputs["x"])
    torch.testing.assert_close(y, want)


def test_base_output_replaces_weight_and_bias():
    inputs = make_inputs()
    base_output = F.linear(inputs["x"], inputs["weight"], inputs["bias"])
    want = reference.gated(**inputs)
    inputs |= {"weight": None, "bias": None}
    torch.testing.assert_close(reference.gated(**inputs, base_output=base_output), want)


def test_sequence_weights_are_not_taken_for_token_weights():
    """Even where E equals the length, or the batch the length."""
    x = torch.randn(E, E, K, dtype=torch.float64)
    inputs = make_inputs("sequence") | {"x": x}
    inputs["weights"] = torch.randn(E, E, dtype=torch.float64)
    per_token = inputs["weights"][:, None].expand(E, E, E)
    want = reference.gated(**{**inputs, "weights": per_token})
    torch.testing.assert_close(reference.gated(**inputs), want)


@pytest.mark.parametrize("shape", [(0, LENGTH, K), (BATCH, 0, K)])
def test_no_tokens(shape):
    inputs = make_inputs("sequence") | {"x": torch.empty(shape, dtype=torch.float64)}
    inputs["weights"] = torch.randn(shape[0], E, dtype=torch.float64)
    assert reference.gated(**inputs, activation="gelu").shape == (*shape[:2], N)


def test_weights_stay_wide_in_16_bits():
    """A weight that bfloat16 cannot hold reaches the output, which can show it."""
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    weights = torch.tensor([[1 + 2**-9, -1.0]])
    experts = one.expand(2, 1, 1) * 64
    y = reference.gated(one, one * 0, None, experts, experts, weights)
    # Expert by expert the output is rounded, but not the weight: 4096 · (1 + 2⁻⁹) = 4104.
    kept = torch.tensor(4104.0).bfloat16() - torch.tensor(4096.0).bfloat16()
    assert y.dtype == torch.bfloat16
    assert y.item() == kept.item()


def test_dropout_masks_inputs_by_the_seed():
    inputs = make_inputs("sequence")
    seed = torch.tensor([7])
    y = reference.gated(**inputs, dropout=0.5, seed=seed)
    keep = reference.keep_mask(seed, BATCH * LENGTH, K, 0.5).reshape(BATCH, LENGTH, K)
    assert 0 < keep.sum() < keep.numel()
    base_output = F.linear(inputs["x"], inputs["weight"], inputs["bias"])
    dropped = inputs | {"x": inputs["x"] * keep * 2, "weight": None, "bias": None}
    torch.testing.assert_close(y, reference.gated(**dropped, base_output=base_output))
