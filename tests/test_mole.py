"""MoLE on one linear: the literal reference against numpy and finite differences, the fused layer
against it, masks and padding."""

import copy
import io
import itertools
import math

import numpy
import pytest
import torch
from moles import NORMALIZATIONS, PADDING, assert_all_close, make_input, make_layer, make_loras
from torch import nn
from torch.utils.checkpoint import checkpoint

import moelora_ops
from moelora_ops import reference
from moelora_ops.nn import MoLELinear, stack_loras, unstack_loras

WITHOUT = (True, False, True)  # an expert mask


def outputs_and_gradients(layer, x, gate=None):
    """y, the sums of the gates, and the gradients of x and the gate's parameters."""
    gate = gate or layer
    x = x.detach().requires_grad_()
    y = layer(x)
    sums = gate.routing.prob_sums
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    dsums = torch.arange(len(sums)).to(sums.dtype)
    leaves = [x, gate.gate, gate.log_tau]
    loss = (y * dy.to(y.dtype)).sum() + (sums * dsums).sum()
    return y.detach(), sums.detach(), *torch.autograd.grad(loss, leaves)


# ---------------------------------------------------------------- the reference


def numpy_mole(layer, x, mask=None, mask_mode="gate", sequence=None):
    """y and the gates, one token (or sequence) after the other, from the paper's equations.

    Args:
        sequence: for a gate per sequence: bool ``[length]``, the real tokens of x ``[length, K]``.
    """
    down, up, gate = (t.detach().numpy() for t in (layer.lora_down, layer.lora_up, layer.gate))
    experts, tau = range(len(down)), math.exp(layer.log_tau.item())
    feeding = [e for e in experts if mask is None or mask_mode == "gate" or mask[e]]

    def outputs_of(token):
        return [layer.scales[e] * up[e].T @ (down[e] @ token) for e in experts]

    def gates_of(outputs):
        seen = {e: outputs[e] for e in feeding}
        everything = numpy.concatenate(list(seen.values()))
        if layer.normalization == "l2":
            seen = {e: o / numpy.sqrt((everything**2).sum()) for e, o in seen.items()}
        elif layer.normalization == "l2_per_expert":
            seen = {e: o / numpy.sqrt((o**2).sum()) for e, o in seen.items()}
        elif layer.normalization == "layernorm":
            deviation = numpy.sqrt(everything.var() + 1e-5)
            seen = {e: (o - everything.mean()) / deviation for e, o in seen.items()}
        logits = [sum(seen[e] @ gate[e][:, i] for e in seen) for i in experts]
        powers = [
            math.exp(logit / tau) if mask is None or mask[i] else 0.0
            for i, logit in enumerate(logits)
        ]
        return [power / sum(powers) for power in powers]

    weight, bias = layer.base.weight.detach().numpy(), layer.base.bias.detach().numpy()
    outputs = [outputs_of(token) for token in x.numpy()]
    if sequence is None:
        gates = [gates_of(o) for o in outputs]
    else:
        real = [o for o, is_real in zip(outputs, sequence, strict=True) if is_real]
        shared = gates_of([sum(o[e] for o in real) / len(real) for e in experts])
        gates = [shared] * len(outputs)
    y = [
        weight @ token + bias + sum(g[e] * o[e] for e in experts)
        for token, o, g in zip(x.numpy(), outputs, gates, strict=True)
    ]
    return torch.tensor(numpy.array(y)), torch.tensor(gates, dtype=torch.float64)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("mask_mode", ("gate", "input"))
@pytest.mark.parametrize("mask", (None, WITHOUT))
def test_the_reference_is_the_papers_equations(normalization, mask, mask_mode):
    options = {"normalization": normalization, "mask_mode": mask_mode, "mask": mask}
    layer = make_layer(reference.MoLELinear, **options)
    x = make_input(6)
    y, gates = numpy_mole(layer, x, mask, mask_mode)
    torch.testing.assert_close(layer(x), y)
    torch.testing.assert_close(layer.routing.prob_sums, gates.sum(0))

    layer = make_layer(reference.MoLELinear, granularity="sequence", **options)
    layer.sequence_mask = torch.tensor([True, True, True, True, False, False])
    y, gates = numpy_mole(layer, x, mask, mask_mode, layer.sequence_mask)
    torch.testing.assert_close(layer(x), y)
    torch.testing.assert_close(layer.routing.prob_sums, gates[0])


@pytest.mark.parametrize("granularity", ("token", "sequence"))
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_references_gradients_are_finite_differences(normalization, granularity):
    layer = make_layer(reference.MoLELinear, normalization=normalization, granularity=granularity)
    x = make_input(2, 3)
    dy = torch.randn(2, 3, 5, dtype=torch.float64)

    def loss(x, gate, log_tau):
        parameters = {"gate": gate, "log_tau": log_tau}
        return (torch.func.functional_call(layer, parameters, (x,)) * dy).sum()

    leaves = [t.detach().clone().requires_grad_() for t in (x, layer.gate, layer.log_tau)]
    gradients = torch.autograd.grad(loss(*leaves), leaves)
    random, step = torch.Generator().manual_seed(3), 1e-5
    for i, gradient in enumerate(gradients):
        along = torch.randn(gradient.shape, generator=random, dtype=torch.float64)
        sides = []
        for sign in (1, -1):
            moved = [t.detach() for t in leaves]
            moved[i] = moved[i] + sign * step * along
            sides.append(loss(*moved))
        want = (sides[0] - sides[1]) / (2 * step)
        torch.testing.assert_close((gradient * along).sum(), want, rtol=1e-6, atol=1e-8)


def closed_forms(layer, x, dy):
    """Gradients of x, gate and log τ in rank space: docs/math.md, "MoLE", in numpy."""
    E, N = layer.num_experts, layer.out_features
    A, B, e = (t.detach().numpy() for t in (layer.lora_down, layer.lora_up, layer.gate))
    s, tau, kind = layer.scales, math.exp(layer.log_tau.item()), layer.normalization
    P = [s[i] * B[i] @ e[i] for i in range(E)]
    m = [s[i] * B[i].mean(1) for i in range(E)]
    centered = [s[i] * B[i].T - (m[i] if kind == "layernorm" else 0) for i in range(E)]
    R = [numpy.linalg.qr(columns, mode="r") for columns in centered]
    c = e.sum((0, 1))
    dx, de, dlog_tau = numpy.zeros(x.shape), numpy.zeros(e.shape), 0.0
    for t, (token, incoming) in enumerate(zip(x.numpy(), dy.numpy(), strict=True)):
        h = [A[i] @ token for i in range(E)]
        norms = [numpy.linalg.norm(R[i] @ h[i]) for i in range(E)]
        means = [m[i] @ h[i] for i in range(E)]
        mean = sum(means) / E
        if kind == "none":
            nu = [1.0] * E
        elif kind == "l2":
            nu = [math.sqrt(sum(n**2 for n in norms))] * E
        elif kind == "l2_per_expert":
            nu = norms
        else:
            spread = sum((mu - mean) ** 2 for mu in means) / E
            nu = [math.sqrt(sum(n**2 for n in norms) / (E * N) + spread + 1e-5)] * E
        parts = [h[i] @ P[i] / nu[i] for i in range(E)]
        epsilon = sum(parts) - (mean * c / nu[0] if kind == "layernorm" else 0)
        powers = numpy.exp(epsilon / tau)
        g = powers / powers.sum()
        d = [s[i] * B[i] @ incoming for i in range(E)]
        dg = numpy.array([d[i] @ h[i] for i in range(E)])
        dz = g * (dg - g @ dg)
        delta = dz / tau
        dlog_tau -= dz @ epsilon / tau
        dx[t] = incoming @ layer.base.weight.detach().numpy()
        for i in range(E):
            de[i] += s[i] * B[i].T @ numpy.outer(h[i] / nu[i], delta)
            dh = g[i] * d[i] + P[i] @ delta / nu[i]
            image = R[i].T @ R[i] @ h[i]
            if kind == "layernorm":
                de[i] -= mean / nu[i] * delta
                dh -= c @ delta * m[i] / (E * nu[i])
                image = image / N + (means[i] - mean) * m[i]
                dh -= epsilon @ delta * image / (E * nu[i] ** 2)
            elif kind != "none":
                along = epsilon if kind == "l2" else parts[i]
                dh -= along @ delta * image / nu[i] ** 2
            dx[t] += dh @ A[i]
    return [torch.tensor(t) for t in (dx, de, [dlog_tau])]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_references_gradients_are_the_closed_forms(normalization):
    layer = make_layer(reference.MoLELinear, normalization=normalization)
    x, dy = make_input(6).requires_grad_(), torch.randn(6, 5, dtype=torch.float64)
    got = torch.autograd.grad(layer(x), [x, layer.gate, layer.log_tau], dy)
    assert_all_close(got, closed_forms(layer, x.detach(), dy))


def test_the_gate_learns_only_in_the_column_space_of_b():
    """Parts of e that are orthogonal to B change nothing and get no gradient (docs/math.md)."""
    layer = make_layer(reference.MoLELinear, normalization="none")
    layer(make_input(6)).square().sum().backward()
    for e, up in enumerate(layer.lora_up):
        q = torch.linalg.svd(up.T)[0][:, : torch.linalg.matrix_rank(up)]
        beside = layer.gate.grad[e] - q @ (q.T @ layer.gate.grad[e])
        assert beside.abs().max() < 1e-12 < 1e-3 < layer.gate.grad[e].abs().max()


# ---------------------------------------------------------------- the layer


OPTIONS = [
    dict(zip(("normalization", "granularity", "mask_mode", "compact"), values, strict=True))
    for values in itertools.product(
        NORMALIZATIONS, ("token", "sequence"), ("gate", "input"), (False, True)
    )
    if not (values[0] == "layernorm" and values[3])
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_the_fused_layer_is_the_reference(options, backend):
    for mask in (None, WITHOUT):
        literal = make_layer(reference.MoLELinear, mask=mask, **options)
        fused = MoLELinear.from_reference(literal)
        assert fused.gate is literal.gate and fused.lora_up is literal.lora_up
        for sequence_mask in (None, PADDING):
            fused.sequence_mask = literal.sequence_mask = sequence_mask
            x = make_input(2, 4)
            assert_all_close(outputs_and_gradients(fused, x), outputs_and_gradients(literal, x))
            with torch.no_grad():
                torch.testing.assert_close(fused(x), literal(x))


@pytest.mark.parametrize("granularity", ("token", "sequence"))
def test_one_expert_is_that_lora(granularity, backend):
    (lora,) = make_loras((3,))
    layer = MoLELinear(nn.Linear(7, 5).double(), [lora], granularity)
    nn.init.normal_(layer.gate)
    x = make_input(2, 4)
    want = layer.base(x) + lora[2] * x @ lora[0].T @ lora[1].T
    torch.testing.assert_close(layer(x), want)


@pytest.mark.parametrize("granularity", ("token", "sequence"))
def test_starts_as_the_average_of_the_loras(granularity, backend):
    loras = make_loras()
    layer = MoLELinear(nn.Linear(7, 5).double(), loras, granularity)
    assert not layer.gate.any() and not layer.log_tau.any()
    x = make_input(2, 4)
    average = sum(s * x @ a.T @ b.T for a, b, s in loras) / 3
    torch.testing.assert_close(layer(x), layer.base(x) + average)


def test_a_token_alone_has_the_gate_of_its_sequence(backend):
    token, sequence = (make_layer(granularity=g) for g in ("token", "sequence"))
    x = make_input(5, 1)
    assert_all_close(outputs_and_gradients(token, x), outputs_and_gradients(sequence, x))


def test_masked_experts_are_a_softmax_without_them(backend):
    """k g / Σ k g, the paper's form of it, is the softmax with -inf for the others."""
    whole, masked = make_layer(), make_layer(mask=WITHOUT)
    x = make_input(1)
    whole(x), masked(x)
    kept = whole.routing.prob_sums * torch.tensor(WITHOUT)
    torch.testing.assert_close(masked.routing.prob_sums, kept / kept.sum())


def test_an_expert_masked_from_the_input_might_as_well_be_missing(backend):
    masked = make_layer(mask=WITHOUT, mask_mode="input")
    loras = make_loras()
    layer = MoLELinear(masked.base, [loras[0], loras[2]])
    with torch.no_grad():
        layer.gate.copy_(masked.gate[[0, 2]][:, :, [0, 2]])
        layer.log_tau.copy_(masked.log_tau)
    x = make_input(6)
    torch.testing.assert_close(masked(x), layer(x))
    gate_mode = make_layer(mask=WITHOUT)
    assert (gate_mode(x) - layer(x)).abs().max() > 1e-3


def test_a_mask_can_be_set_and_lifted_again(backend):
    layer, x = make_layer(), make_input(6)
    before = layer(x)
    layer.expert_mask = [True, True, False]
    assert (layer(x) - before).abs().max() > 1e-3
    layer.expert_mask = torch.ones(3, dtype=torch.bool)
    assert torch.equal(layer(x), before)


def test_padding_reaches_no_gate(backend):
    layer, x = make_layer(granularity="sequence"), make_input(2, 4)
    layer.sequence_mask = PADDING
    before = layer(x)
    other = x.masked_fill(~PADDING.unsqueeze(-1), float("nan"))
    torch.testing.assert_close(layer(other)[PADDING], before[PADDING])
    layer.sequence_mask = None
    assert (layer(x) - before).abs().max() > 1e-3


def test_tokens_see_no_other_token_and_sequences_no_other_sequence(backend):
    x = make_input(2, 4)
    layer = make_layer()
    torch.testing.assert_close(layer(x)[1, 2], layer(x[1, 2]))
    layer = make_layer(granularity="sequence")
    torch.testing.assert_close(layer(x)[1], layer(x[1]))


def test_an_expert_that_says_nothing_is_no_trouble(backend):
    """LoRAs start with B = 0: norms of zero give no NaN, here and in the gradients."""
    for normalization in NORMALIZATIONS:
        loras = [(a, torch.zeros_like(b), s) for a, b, s in make_loras()]
        layer = MoLELinear(nn.Linear(7, 5).double(), loras, normalization=normalization)
        y, sums, *gradients = outputs_and_gradients(layer, make_input(6))
        torch.testing.assert_close(y, layer.base(make_input(6)))
        torch.testing.assert_close(sums, torch.full_like(sums, 2.0))
        assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("lead", ((), (1,), (0,), (2, 0), (2, 3), (2, 1, 3)))
def test_any_leading_shape(lead, backend):
    for granularity in ("token", "sequence") if lead else ("token",):
        layer = make_layer(granularity=granularity)
        x = make_input(*lead)
        y = layer(x.requires_grad_())
        assert y.shape == (*lead, 5) and y.isfinite().all()
        y.sum().backward()
        assert x.grad.shape == x.shape


def test_the_same_constructor_and_state_dict_as_the_reference(backend):
    for options in ({}, {"compact": True}, {"gated": False}):
        fused, literal = make_layer(**options), make_layer(reference.MoLELinear, **options)
        assert fused.state_dict().keys() == literal.state_dict().keys()
        for key, value in literal.state_dict().items():
            assert fused.state_dict()[key].shape == value.shape, key
    fused = make_layer()
    wanted = fused(make_input(6))
    other = MoLELinear(nn.Linear(7, 5).double(), make_loras(seed=5))
    other(make_input(6))
    other.load_state_dict(fused.state_dict())  # experts too, and what is derived from them
    torch.testing.assert_close(other(make_input(6)), wanted)


def test_what_is_kept_follows_every_change(backend):
    """Factors and the kept projection are of the experts and the gate as they are now."""
    layer, x = make_layer(), make_input(6)

    @torch.no_grad()
    def check():
        torch.testing.assert_close(layer(x), fresh(layer)(x))

    def fresh(layer):
        literal = make_layer(reference.MoLELinear)
        literal.load_state_dict(layer.state_dict())
        return literal.to(layer.gate.dtype)

    check()
    with torch.no_grad():
        layer.gate.mul_(2)
    check()
    with torch.no_grad():
        layer.lora_up.add_(0.3)
    check()
    layer.gate = nn.Parameter(torch.randn_like(layer.gate))
    check()
    layer.lora_up = torch.randn_like(layer.lora_up)
    check()
    layer.load_state_dict(make_layer(mask=WITHOUT).state_dict())
    check()
    x = x.float()
    layer.float()
    check()
    layer.double()
    x = x.double()
    check()
    with torch.inference_mode():
        layer(x)
    check()
    layer.gate.data.mul_(2)  # leaves the version as it was
    layer.eval()
    check()


def test_experts_are_frozen_and_only_the_gate_is_trained():
    layer = make_layer()
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"gate", "log_tau"}
    loras = make_loras()
    loras[0][0].requires_grad_()
    layer = MoLELinear(nn.Linear(7, 5).double(), loras)
    loras[0][0].data.zero_()
    assert layer.lora_down[0].any() and not layer.lora_down.requires_grad


def test_different_ranks_are_padded_with_zeros():
    layer, loras = make_layer(), make_loras()
    assert layer.rank == 3 and not layer.lora_down[2, 1:].any() and not layer.lora_up[0, 2:].any()
    back = unstack_loras(layer.lora_down, layer.lora_up, layer.scales)
    for (a, b, s), (a2, b2, s2) in zip(loras, back, strict=True):
        assert torch.equal(a, a2[: len(a)]) and torch.equal(b, b2[:, : len(a)]) and s == s2


def test_copies_and_pickles_after_a_call():
    layer, x = make_layer(), make_input(6)
    y = layer(x)
    torch.testing.assert_close(copy.deepcopy(layer)(x), y)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.load(buffer, weights_only=False)(x), y)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_16_bits_and_autocast(dtype, backend):
    exact, x = make_layer(), make_input(2, 6)
    want = exact(x)
    low = make_layer(dtype=dtype)
    assert low.lora_up.dtype == dtype and low.gate.dtype == low.log_tau.dtype == torch.float32
    with torch.no_grad():
        low.gate.copy_(exact.gate)
    y = low(x.to(dtype))
    torch.testing.assert_close(low.to(dtype)(x.to(dtype)), y, rtol=0.05, atol=0.1)
    assert y.dtype == dtype and low.routing.prob_sums.dtype == torch.float32
    torch.testing.assert_close(y.double(), want, rtol=0, atol=0.03 * want.abs().max().item())
    layer = make_layer().float()
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x.float())
        with torch.no_grad():
            again = layer(x.float())  # with the projection that is kept
    assert y.dtype == dtype
    y.sum().backward()
    assert layer.gate.grad.dtype == torch.float32 and layer.gate.grad.any()
    for got in (y, again):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=0.03 * want.abs().max().item())


@pytest.mark.parametrize("granularity", ("token", "sequence"))
def test_compiles_fullgraph_with_dynamic_shapes(granularity):
    layer = make_layer(granularity=granularity)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (4, 9, 6):
        x = make_input(2, tokens)
        want = outputs_and_gradients(layer, x)
        assert_all_close(outputs_and_gradients(compiled, x, gate=layer), want)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), want[0])


@pytest.mark.parametrize("reentrant", (False, True))
def test_gradient_checkpointing(reentrant, backend):
    layer, x = make_layer(), make_input(6)
    dy = torch.randn(6, 5, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    want = torch.autograd.grad(layer(leaf), [leaf, layer.gate, layer.log_tau], dy)
    checkpoint(layer, leaf, use_reentrant=reentrant).backward(dy)
    assert_all_close([leaf.grad, layer.gate.grad, layer.log_tau.grad], want)


class Foreign(nn.Module):
    in_features, out_features = 7, 5

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(7, 5).double()

    def forward(self, x):
        return self.inner(x).tanh()


def test_foreign_base(backend):
    literal = reference.MoLELinear(Foreign(), make_loras(), dtype=torch.float64)
    nn.init.normal_(literal.gate)
    fused = MoLELinear.from_reference(literal)
    x = make_input(2, 4)
    assert_all_close(outputs_and_gradients(fused, x), outputs_and_gradients(literal, x))


# ---------------------------------------------------------------- bad input


def test_loras_that_do_not_fit_are_named():
    base = nn.Linear(7, 5)
    a, b, s = make_loras()[0]
    for bad, message in (
        ([], "loras: wanted a list of at least one"),
        (a, "loras: wanted a list of at least one"),
        ([(a, b)], r"loras\[0\]: wanted \(A, B, scale\)"),
        ([(a, b, s), (a[:, 1:], b, s)], r"loras\[1\]: wanted A of shape \[r, 7\], got \[2, 6\]"),
        (
            [(a, b, s), (a[:0], b[:, :0], s)],
            r"loras\[1\]: wanted A of shape \[r, 7\], got \[0, 7\]",
        ),
        ([(a, b[1:], s)], r"loras\[0\]: wanted B of shape \[5, 2\] .*got \[4, 2\]"),
        ([(a, b.T, s)], r"loras\[0\]: wanted B of shape \[5, 2\] .*got \[2, 5\]"),
        ([(a, b, math.nan)], r"loras\[0\]: scale: wanted a finite number, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            MoLELinear(base, bad)
    with pytest.raises(
        TypeError, match=r"loras\[0\]: wanted A as a floating-point tensor, got str"
    ):
        MoLELinear(base, [("A", b, s)])
    with pytest.raises(TypeError, match=r"loras\[0\]: wanted B as a floating-point tensor"):
        stack_loras([(a, b.long(), s)], 7, 5)
    assert base.weight.requires_grad  # a refused layer leaves its base alone


def test_bad_sequence_masks():
    for layer in (make_layer(), make_layer(granularity="sequence")):
        layer.sequence_mask = PADDING
        with pytest.raises(ValueError, match="sequence_mask: wanted"):
            layer(make_input(2, 5))
        layer.sequence_mask = PADDING.long()
        with pytest.raises(TypeError, match="sequence_mask: wanted a bool tensor"):
            layer(make_input(2, 4))
        layer.sequence_mask = None
    with pytest.raises(ValueError, match=r"x: wanted .*length, in_features"):
        layer(make_input())
    with (
        pytest.raises(TypeError, match="mask: wanted a bool or integer tensor"),
        moelora_ops.sequence_mask(layer, torch.ones(2, 4)),
    ):
        pass
    with (
        pytest.raises(ValueError, match="model: has no MoLE gates"),
        moelora_ops.sequence_mask(nn.Linear(2, 3), PADDING),
    ):
        pass
    with moelora_ops.sequence_mask(layer, PADDING.long()):
        assert layer.sequence_mask.dtype == torch.bool
    assert layer.sequence_mask is None
