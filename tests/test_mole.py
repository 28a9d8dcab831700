"""MoLE: the literal reference against numpy and finite differences, the fused layer against it,
gates that are shared, masks, padding, the balance loss, whole models, the block-wise form."""

import copy
import io
import itertools
import json
import math

import numpy
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import moelora_ops
from moelora_ops import MoLEConfig, models, reference, use_backend
from moelora_ops.backends import extension
from moelora_ops.bench import METHODS
from moelora_ops.bench.mole import MoLECase, StackedMoLELinear
from moelora_ops.bench.runner import Settings, prepare
from moelora_ops.nn import LoRA, MoLEBlock, MoLELinear, SharedGate, stack_loras, unstack_loras

BACKENDS = ["reference", *([] if extension.why_missing() else ["cpu"])]
NORMALIZATIONS = ("l2", "l2_per_expert", "layernorm", "none")
WITHOUT = (True, False, True)  # an expert mask


@pytest.fixture(params=BACKENDS)
def backend(request):
    moelora_ops.set_default_backend(request.param)
    yield request.param
    moelora_ops.set_default_backend(None)


def make_loras(ranks=(2, 3, 1), in_features=7, out_features=5, dtype=torch.float64, seed=0):
    random = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=random, dtype=torch.float64).to(dtype)

    return [
        (normal(r, in_features), normal(out_features, r), 0.5 * i + 0.5)
        for i, r in enumerate(ranks)
    ]


def make_layer(cls=MoLELinear, dtype=torch.float64, mask=None, **options):
    """A layer with a random gate; the same one for the same options."""
    torch.manual_seed(0)
    layer = cls(nn.Linear(7, 5).to(dtype), make_loras(dtype=dtype), **options)
    if layer.gated:
        nn.init.normal_(layer.gate)
        nn.init.constant_(layer.log_tau, -0.3)
        if mask is not None:
            layer.expert_mask = torch.tensor(mask)
    return layer


def make_input(*lead, seed=1, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*lead, 7, generator=random, dtype=torch.float64).to(dtype)


PADDING = torch.tensor([[True, True, True, False], [True, True, False, False]])


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


def assert_all_close(got, want, **tolerance):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, **tolerance)


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
    return [torch.tensor(t) for t in (dx, de)] + [torch.tensor(dlog_tau)]


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


# ---------------------------------------------------------------- shared gates


class Block(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, 4)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.gate_proj, self.up_proj = nn.Linear(width, 8), nn.Linear(width, 8)
        self.down_proj = nn.Linear(8, width)

    def forward(self, x):
        scores = self.q_proj(x) * self.k_proj(x).mean(-1, keepdim=True).tanh()
        x = x + self.o_proj(scores + self.v_proj(x))
        return x + self.down_proj(self.gate_proj(x).tanh() * self.up_proj(x))


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Toy(nn.Module):
    def __init__(self, depth=2):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.checkpoint = None  # else the value of use_reentrant

    def forward(self, x):
        for block in self.layers:
            if self.checkpoint is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpoint)
        return x


def make_adapter(model, rank, seed, linears=LINEARS):
    return {
        name: make_loras((rank,), m.in_features, m.out_features, seed=seed + i)[0]
        for i, (name, m) in enumerate(model.named_modules())
        if name.endswith(tuple(linears))
    }


def make_model(gates, implementation="fused", depth=2, **options):
    torch.manual_seed(0)
    model = Toy(depth).double()
    adapters = [make_adapter(model, rank, 100 * rank) for rank in (2, 1, 3)]
    config = MoLEConfig(adapters, gates, **options)
    moelora_ops.apply(model, config, implementation=implementation)
    random = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("gate", "log_tau")):
                p.copy_(torch.randn(p.shape, generator=random, dtype=torch.float64) / 4)
    return model


def batch(tokens=4, seed=7):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(2, tokens, 6, generator=random, dtype=torch.float64)


def gates_of(model):
    return [m for m in model.modules() if "expert_mask" in m._buffers]


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def model_gradients(model, x, coefficient=0.5):
    x = x.detach().requires_grad_()
    y = model(x)
    loss = y.square().sum() + moelora_ops.gating_balance_loss(model, coefficient)
    for p in model.parameters():
        p.grad = None
    loss.backward()
    return [y.detach(), loss.detach(), x.grad, *(p.grad for p in trained(model).values())]


@pytest.mark.parametrize(
    "gates, count", (("matrix", 14), ("layer", 8), ("block", 2), ("network", 1))
)
def test_gates_are_shared_as_far_as_asked(gates, count, backend):
    model = make_model(gates)
    assert len(gates_of(model)) == count
    assert all(name.endswith(("gate", "log_tau")) for name in trained(model))
    model(batch())
    assert all(g.routing.rows == 8 for g in gates_of(model))


SHARED = [
    dict(zip(("gates", "normalization", "granularity", "mask_mode", "compact"), v, strict=True))
    for v in [
        ("layer", "l2", "token", "gate", False),
        ("layer", "layernorm", "token", "input", False),
        ("layer", "l2_per_expert", "sequence", "input", True),
        ("block", "l2", "sequence", "gate", False),
        ("block", "layernorm", "sequence", "gate", False),
        ("block", "none", "token", "input", True),
        ("network", "l2_per_expert", "token", "gate", False),
        ("network", "l2", "sequence", "input", False),
    ]
]


@pytest.mark.parametrize("options", SHARED, ids=lambda o: "-".join(map(str, o.values())))
def test_shared_gates_are_those_of_materialised_outputs(options, backend):
    fused, literal = make_model(**options), make_model(**options, implementation="reference")
    for model in (fused, literal):
        moelora_ops.set_expert_mask(model, [True, False, True])
    for mask in (None, PADDING):
        results = []
        for model in (fused, literal):
            with moelora_ops.sequence_mask(model, mask):
                results.append(model_gradients(model, batch()))
        assert_all_close(*results)
    assert_all_close(model_gradients(moelora_ops.fuse(literal), batch()),
                     model_gradients(fused, batch()))  # fmt: skip


def test_a_shared_gate_by_hand(backend):
    """Two leaders of different widths: their outputs side by side, expert by expert."""
    bases = nn.Linear(7, 5).double(), nn.Linear(7, 4).double()
    loras = make_loras(), make_loras((1, 2, 2), 7, 4, seed=3)
    layers = [MoLELinear(b, l, gated=False) for b, l in zip(bases, loras, strict=True)]
    shared = SharedGate(["a", "b"], [], [5, 4], [3, 2], 3, dtype=torch.float64)
    shared.connect(layers)
    nn.init.normal_(shared.gate)
    x = make_input(3)
    got = [layer(x) for layer in layers]
    both = [torch.stack([s * x @ a.T @ b.T for a, b, s in l], 1) for l in loras]
    features = torch.cat(both, -1)
    features = features / features.flatten(1).norm(dim=1)[:, None, None]
    gates = torch.einsum("ten,eni->ti", features, shared.gate).softmax(-1)
    for y, base, outputs in zip(got, bases, both, strict=True):
        torch.testing.assert_close(y, base(x) + torch.einsum("te,ten->tn", gates, outputs))


def test_leaders_share_the_work_for_one_tensor_and_keep_nothing(monkeypatch):
    model = make_model("layer", depth=1)
    (shared,) = [g for g in gates_of(model) if getattr(g, "leaders", [""])[0].endswith("q_proj")]
    calls = []
    monkeypatch.setattr(
        type(shared),
        "_gate",
        lambda self, x, run=SharedGate._gate: calls.append(self) or run(self, x),
    )
    model(batch())
    assert calls.count(shared) == 1 and shared._input is None and not shared._hidden
    block = model.layers[0]
    want = block.k_proj(batch(seed=8))
    x = batch()
    block.q_proj(x)
    torch.testing.assert_close(block.k_proj(batch(seed=8)), want)  # another x: its own gate


def test_a_follower_without_gates_or_with_other_tokens():
    model = make_model("block", depth=1)
    with pytest.raises(RuntimeError, match="ran before the leaders"):
        model.layers[0].o_proj(batch())
    model(batch())
    with pytest.raises(ValueError, match=r"x: wanted leading dimensions \[2, 4\] .* got \[2, 5\]"):
        model.layers[0].o_proj(batch(5))
    with pytest.raises(RuntimeError, match="no SharedGate is connected"):
        make_layer(gated=False)(make_input(3))


@pytest.mark.parametrize("gates", ("matrix", "layer", "block", "network"))
@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointing_whole_models(gates, reentrant, backend):
    model = make_model(gates)
    want = model_gradients(model, batch())
    model.checkpoint = reentrant
    if gates == "network" and reentrant:
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            model_gradients(model, batch())
        return
    assert_all_close(model_gradients(model, batch()), want)


def test_a_model_with_shared_gates_compiles():
    model = make_model("block", depth=1)
    want = model_gradients(copy.deepcopy(model), batch())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the first call computes the factors, the second finds them
        x = batch().requires_grad_()
        y = compiled(x)
        loss = y.square().sum() + moelora_ops.gating_balance_loss(model)
        grads = torch.autograd.grad(loss, [x, *trained(model).values()])
        assert_all_close([y, loss, *grads], want)


def test_a_copy_of_the_model_has_gates_of_its_own(backend):
    model = make_model("block")
    want = model(batch())
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in trained(model).values():
            p.zero_()
    torch.testing.assert_close(other(batch()), want)
    assert (model(batch()) - want).abs().max() > 1e-3


# ---------------------------------------------------------------- balance loss


@pytest.mark.parametrize("implementation", ("fused", "reference"))
def test_the_balance_loss_is_its_definition(implementation):
    model = make_model("matrix", implementation)
    moelora_ops.set_expert_mask(model, [True, True, False])
    with moelora_ops.sequence_mask(model, PADDING):
        model(batch())
    rows = [g.routing for g in gates_of(model)]
    assert all(r.rows == PADDING.sum() for r in rows)
    q = sum(r.prob_sums / r.rows for r in rows) / len(rows)
    want = -0.25 * (q[0].log() + q[1].log())
    torch.testing.assert_close(moelora_ops.gating_balance_loss(model, 0.25), want)


def test_the_balance_loss_is_least_for_even_use():
    layer = make_layer()
    nn.init.zeros_(layer.gate)
    layer(make_input(6))
    least = moelora_ops.gating_balance_loss(layer, 1.0)
    torch.testing.assert_close(least.item(), 3 * math.log(3))
    nn.init.normal_(layer.gate)
    layer(make_input(6))
    assert moelora_ops.gating_balance_loss(layer, 1.0) > least


def test_the_balance_loss_of_collapse_and_of_nothing_is_finite():
    layer = make_layer(dtype=torch.float32, normalization="none")
    nn.init.normal_(layer.gate, std=1e6)
    layer(make_input(1, dtype=torch.float32))
    loss = moelora_ops.gating_balance_loss(layer, 1.0)
    assert 80 < loss < 300
    layer(make_input(0, dtype=torch.float32))
    loss = moelora_ops.gating_balance_loss(layer, 1.0)
    loss.backward()
    assert loss == 0 and not layer.gate.grad.any()


def test_the_balance_loss_needs_gates_that_ran():
    with pytest.raises(RuntimeError, match="has no layers with routed experts"):
        moelora_ops.gating_balance_loss(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="no adapted layer has run yet"):
        moelora_ops.gating_balance_loss(make_layer())
    with pytest.raises(ValueError, match="coefficient: wanted a finite number of at least 0"):
        moelora_ops.gating_balance_loss(make_layer(), -1.0)


# ---------------------------------------------------------------- whole models


@pytest.mark.parametrize("gates", ("matrix", "block"))
@pytest.mark.parametrize("compact", (False, True))
def test_saved_and_loaded(gates, compact, tmp_path):
    pytest.importorskip("safetensors")
    model = make_model(gates, compact=compact)
    moelora_ops.set_expert_mask(model, [True, False, True])
    want = model(batch())
    moelora_ops.save_adapter(model, tmp_path)
    for implementation in ("fused", "reference"):
        torch.manual_seed(0)
        fresh = moelora_ops.load_adapter(Toy().double(), tmp_path, implementation=implementation)
        torch.testing.assert_close(fresh(batch()), want)
        assert [g.expert_mask.tolist() for g in gates_of(fresh)] == [[True, False, True]] * len(
            gates_of(model)
        )
    there = make_model(gates, compact=compact)
    with torch.no_grad():
        for layer in models.adapted_layers(there):
            layer.module.lora_up.normal_()
    there(batch())
    moelora_ops.load_adapter(there, tmp_path)
    torch.testing.assert_close(there(batch()), want)


def test_linears_that_only_some_adapt_get_an_expert_of_zeros():
    model = Toy(1).double()
    adapters = [make_adapter(model, 2, 1, ("q_proj",)), make_adapter(model, 2, 50, ("up_proj",))]
    moelora_ops.apply(model, MoLEConfig(adapters))
    names = [layer.name for layer in models.adapted_layers(model)]
    assert names == ["layers.0.q_proj", "layers.0.up_proj"]
    block = model.layers[0]
    assert block.q_proj.lora_up[0].any() and not block.q_proj.lora_up[1].any()
    assert block.up_proj.lora_up[1].any() and not block.up_proj.lora_up[0].any()


def test_target_modules_choose_among_the_adapted():
    model = Toy(1).double()
    config = MoLEConfig([make_adapter(model, 2, 1)], target_modules=("q_proj", "o_proj"))
    moelora_ops.apply(model, config)
    names = [layer.name for layer in models.adapted_layers(model)]
    assert names == ["layers.0.q_proj", "layers.0.o_proj"]


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


@pytest.mark.parametrize(
    "mask, error, message",
    (
        ([False, False, False], ValueError, "expert_mask: wanted at least one True"),
        ([True, False], ValueError, r"expert_mask: wanted shape \[3\], got \[2\]"),
        ([1, 0, 1], TypeError, "expert_mask: wanted a bool tensor, got torch.int64"),
    ),
)
def test_bad_expert_masks(mask, error, message):
    layer, model = make_layer(), make_model("block")
    for change in (
        lambda: setattr(layer, "expert_mask", mask),
        lambda: setattr(gates_of(model)[1], "expert_mask", mask),
        lambda: moelora_ops.set_expert_mask(model, mask),
    ):
        with pytest.raises(error, match=message):
            change()
    assert layer.expert_mask.all() and all(g.expert_mask.all() for g in gates_of(model))
    with pytest.raises(ValueError, match="model: has no MoLE gates"):
        moelora_ops.set_expert_mask(nn.Linear(1, 1), [True])


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
    with moelora_ops.sequence_mask(layer, PADDING.long()):
        assert layer.sequence_mask.dtype == torch.bool
    assert layer.sequence_mask is None


@pytest.mark.parametrize(
    "options, error, message",
    (
        ({"granularity": "word"}, ValueError, "granularity: wanted one of"),
        ({"normalization": "l1"}, ValueError, "normalization: wanted one of"),
        ({"mask_mode": "out"}, ValueError, "mask_mode: wanted one of"),
        ({"compact": 1}, TypeError, "compact: wanted a bool"),
        ({"compact": True, "normalization": "layernorm"}, ValueError, "compact: wanted another"),
    ),
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        make_layer(**options)
    with pytest.raises(error, match=message):
        MoLEConfig([{}], **options)
    with pytest.raises(error, match=message):
        SharedGate(["a"], [], [5], [3], 3, **options)


def test_bad_configurations():
    model = Toy(1).double()
    adapter = make_adapter(model, 2, 1)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    for options, error, message in (
        ({"adapters": []}, ValueError, "adapters: wanted a list of at least one"),
        ({"adapters": "path"}, ValueError, "adapters: wanted a list of at least one"),
        ({"adapters": [3]}, TypeError, r"adapters\[0\]: wanted a directory, a model or a mapping"),
        ({"adapters": [adapter], "gates": "token"}, ValueError, "gates: wanted one of"),
        (
            {"adapters": [adapter, {"layers.9.q_proj": None}]}, ValueError,
            r"adapters\[1\]: has a LoRA for layers\.9\.q_proj, which is no linear of the model",
        ),
        (
            {"adapters": [adapter, adapter | {"layers.0.q_proj": make_loras()[0]}]}, ValueError,
            r"adapters: layers\.0\.q_proj: loras\[1\]: wanted A of shape \[r, 6\], got \[2, 7\]",
        ),
        (
            {"adapters": [adapter], "target_modules": ("lm_head",)}, ValueError,
            "target_modules: wanted linears that the adapters adapt",
        ),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            moelora_ops.apply(model, MoLEConfig(**options))
        assert {n: p.requires_grad for n, p in model.named_parameters()} == before


@pytest.mark.parametrize(
    "arguments, message",
    (
        (([], [], [], [], 3), "leaders: wanted a list of at least 1"),
        ((["a"], "b", [5], [3], 3), "followers: wanted a list"),
        ((["a"], [], [5, 4], [3], 3), "out_features: wanted a positive int for each of 1 leaders"),
        ((["a"], [], [5], [0], 3), "ranks: wanted a positive int"),
        ((["a"], [], [5], [3], 0), "num_experts: wanted an int of at least 1"),
    ),
)
def test_bad_shared_gates(arguments, message):
    with pytest.raises(ValueError, match=message):
        SharedGate(*arguments)


def test_backends_agree():
    results = []
    for name in BACKENDS:
        with use_backend(name):
            results.append(model_gradients(make_model("layer"), batch()))
    for result in results[1:]:
        assert_all_close(result, results[0])


# ---------------------------------------------------------------- the literal block-wise form


class Attention(nn.Module):
    """A pre-norm transformer block: what eqs. 5-8 are written for."""

    def __init__(self, width=6):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o, self.up = (nn.Linear(width, width) for _ in range(5))

    def forward(self, x, mask=None):
        a = self.norm1(x)
        attend = nn.functional.scaled_dot_product_attention(self.q(a), self.k(a), self.v(a), mask)
        x = x + self.o(attend)
        return x + self.up(self.norm2(x)).tanh(), "cache"


def make_block(**options):
    torch.manual_seed(0)
    block = Attention().double()
    adapters = [
        dict(zip("qkvo", make_loras((2, 1, 3, 2), 6, 6, seed=i), strict=True))
        | {"up": make_loras((2,), 6, 6, seed=10 + i)[0]}
        for i in range(3)
    ]
    layer = MoLEBlock(copy.deepcopy(block), adapters, features=6, length=5, **options)
    nn.init.normal_(layer.gate)
    nn.init.constant_(layer.log_tau, 0.4)
    return block, adapters, layer


def with_weights(block, adapter, merged):
    """The block with each linear's weight replaced by s B A, or that added to it."""
    block = copy.deepcopy(block)
    for name, (a, b, s) in adapter.items():
        linear = getattr(block, name)
        with torch.no_grad():
            linear.weight.mul_(merged).add_(s * b @ a)
            linear.bias.mul_(merged)
    return block


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("experts", ("delta", "merged"))
@pytest.mark.parametrize("length", (5, 3))
def test_the_block_wise_form_is_the_papers_equations(length, experts, normalization):
    block, adapters, layer = make_block(experts=experts, normalization=normalization)
    x = torch.randn(2, length, 6, dtype=torch.float64)
    y, other = layer(x)
    assert other == "cache"
    outputs = [with_weights(block, a, experts == "merged")(x)[0] for a in adapters]
    for i in range(2):  # one sequence after the other
        rows = torch.stack([o[i] for o in outputs])  # [E, L, d]
        if normalization == "l2":
            features = rows / rows.norm()
        elif normalization == "l2_per_expert":
            features = torch.stack([row / row.norm() for row in rows])
        elif normalization == "layernorm":
            features = (rows - rows.mean()) / (rows.var(correction=0) + 1e-5).sqrt()
        else:
            features = rows
        logits = features.flatten() @ layer.gate[:, :length].flatten(0, 2)
        gates = (logits / math.exp(0.4)).softmax(0)
        want = block(x)[0][i] + sum(g * row for g, row in zip(gates, rows, strict=True))
        torch.testing.assert_close(y[i], want)


def test_the_block_trains_its_gate_alone_and_counts_in_the_balance_loss():
    _, _, layer = make_block()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    y, _ = layer(x)
    loss = y.square().sum() + moelora_ops.gating_balance_loss(layer)
    loss.backward()
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"gate", "log_tau"}
    assert layer.gate.grad[:, :4].any() and not layer.gate.grad[:, 4:].any()
    assert layer.routing.rows == 2


def test_the_blocks_gate_does_not_see_padding():
    _, _, layer = make_block()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    attend = PADDING[:, None, :].expand(2, 4, 4)
    with moelora_ops.sequence_mask(layer, PADDING):
        y, _ = layer(x, attend)
        other, _ = layer(x.masked_fill(~PADDING.unsqueeze(-1), 3.0), attend)
    torch.testing.assert_close(other[PADDING], y[PADDING])
    assert (layer(x, attend)[0] - y)[PADDING].abs().max() > 1e-4


def test_bad_blocks():
    block, adapters, layer = make_block()
    for arguments, error, message in (
        (([], 6, 5), ValueError, "adapters: wanted at least one"),
        (([{}], 6, 5), ValueError, "adapters: wanted at least one"),
        (([{"w": adapters[0]["q"]}], 6, 5), ValueError, "adapters: wanted names .*, got w"),
        (
            ([{"norm1": adapters[0]["q"]}], 6, 5),
            TypeError,
            "linears, but norm1 is LayerNorm",
        ),
        (([{"q": make_loras()[0]}], 6, 5), ValueError, r"adapters: q: loras\[0\]: wanted A"),
        ((adapters, 0, 5), ValueError, "features: wanted an int of at least 1"),
        ((adapters, 6, 5.0), ValueError, "length: wanted an int of at least 1"),
        ((adapters, 6, 5, "l1"), ValueError, "normalization: wanted one of"),
        ((adapters, 6, 5, "l2", "sum"), ValueError, "experts: wanted one of"),
    ):
        with pytest.raises(error, match=message):
            MoLEBlock(block, *arguments)
        assert isinstance(block.q, nn.Linear) and block.q.weight.requires_grad
    with pytest.raises(ValueError, match=r"hidden: wanted shape .* at most 5, got \[2, 6, 6\]"):
        layer(torch.randn(2, 6, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match="past_key_values: a gate over the whole sequence"):
        layer(torch.randn(2, 4, 6, dtype=torch.float64), past_key_values=object())


# ---------------------------------------------------------------- benchmark


@pytest.mark.parametrize("direction", ("forward", "train"))
@pytest.mark.parametrize("dtype", ("bf16", "fp32"))
def test_the_benchmarks_variants_compute_the_same(dtype, direction):
    case = MoLECase("tiny", dtype, tokens=64, in_features=96, out_features=80, experts=4, rank=6)
    ready = prepare(METHODS["mole"], case, direction, Settings(compile=False))
    assert {"base", "stacked", "eager", "ours"} <= ready.layers.keys()


def test_the_benchmarks_arithmetic():
    case = MoLECase("floor", "fp32", 1024, 2048, 2048)
    method = METHODS["mole"]
    assert method.floors(case, "forward").dense == 128 / 1024
    # Frozen experts: as much again in backward as the base has, and P with its gradient.
    assert method.floors(case, "train").dense == 128 / 1024 + 128 * 8 / (1024 * 2048)
    assert {c.experts * c.rank for c in method.cases} == {128, 24}
    assert {c.tokens for c in method.cases} == {1, 8, 64, 512, 1024}
    with pytest.raises(ValueError, match="rank: wanted at least 1, got 0"):
        MoLECase("bad", "fp32", 1, 1, 1, rank=0)


def test_the_baselines_refuse_what_they_do_not_compute():
    with pytest.raises(ValueError, match="l2 gates per token only"):
        StackedMoLELinear.of(make_layer(normalization="none"))


# ---------------------------------------------------------------- example


def test_the_example_on_a_tiny_model(monkeypatch, tmp_path, capsys):
    helpers = pytest.importorskip("test_examples")  # puts the examples on the path
    pytest.importorskip("safetensors")
    import mole_compose as example

    monkeypatch.setattr(example, "load_model", lambda dtype: helpers.tiny_llama().to(dtype))
    monkeypatch.setattr(example, "load_tokenizer", helpers.CharTokenizer)
    output = tmp_path / "new" / "out"
    options = {
        "steps": 3, "lora-steps": 2, "batch": 4, "few": 3, "train-per-task": 4,
        "held-out-per-task": 2, "length": 400, "rank": 2, "output": output, "gates": "layer",
    }  # fmt: skip
    argv = ["example", *(word for k, v in options.items() for word in (f"--{k}", str(v)))]
    monkeypatch.setattr("sys.argv", argv)
    example.main()
    results = json.loads((output / "report.json").read_text())
    names = list(results["scores"])
    assert names[0] == "frozen model" and names[-1] == "MoLE" and len(names) == 8
    assert all(sum(weights) == pytest.approx(1) for weights in results["expert_use"].values())
    assert len(results["gate_losses"]) == 3
    assert (output / "compose.png").read_bytes().startswith(helpers.PNG)
    assert "| average |" in (output / "report.md").read_text()
    assert "MoLE" in capsys.readouterr().out


def test_the_examples_compositions_are_what_they_say():
    pytest.importorskip("test_examples")
    import mole_compose as example

    loras = [{"q": LoRA(*make_loras((2,), seed=i)[0][:2], 0.5 + i)} for i in range(3)]
    x = make_input(4)
    each = [l["q"].scale * x @ l["q"].A.T @ l["q"].B.T for l in loras]
    made = example.compositions(loras, ["a", "b", "c"])
    got = {}
    for name, [adapter] in made.items():
        lora = adapter["q"]
        got[name] = lora.scale * x @ lora.A.T @ lora.B.T
    torch.testing.assert_close(got["LoRA b"], each[1])
    torch.testing.assert_close(got["average"], sum(each) / 3)
    torch.testing.assert_close(got["sum"], sum(each))
    same = example.compositions([loras[1]] * 3, ["a", "b", "c"])["merged factors"][0]["q"]
    torch.testing.assert_close(same.scale * x @ same.A.T @ same.B.T, each[1])
