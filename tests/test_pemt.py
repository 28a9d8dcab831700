"""PEMT: fused layers against literal ones, these against numpy, T5 models against plain T5."""

import copy
import importlib.util
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import moelora_ops
from moelora_ops import backends, reference
from moelora_ops.bench import runner
from moelora_ops.bench.gated import GATED, GatedCase
from moelora_ops.bench.numerics import check_numerics
from moelora_ops.bench.pemt import PEMT, PEMTCase
from moelora_ops.nn import PEMTAdapter, PEMTLinear, PEMTSourceLinear
from moelora_ops.nn.cosines import expert_cosines, triangular_factors

BACKENDS = [name for name, _ in backends.available()]
BATCH, LENGTH, P, K, N = 3, 6, 2, 10, 8
RANKS, SCALES = (3, 5, 2), (1.0, 0.5, -2.0)
KINDS = ["lora", "adapter"]


def make_experts(kind="lora", ranks=RANKS, scales=SCALES, k_in=K, n_out=N):
    experts = []
    for rank, scale in zip(ranks, scales, strict=True):
        biases = (torch.randn(rank), torch.randn(n_out)) if kind == "adapter" else ()
        experts.append((torch.randn(rank, k_in), torch.randn(n_out, rank), scale, *biases))
    return experts


def make_layer(cls=PEMTLinear, kind="lora", gate_query="input", dtype=torch.float64, **options):
    """A layer with a gate and an adapter that do something."""
    options = {
        "gate_query": gate_query, "gate_features": N, "prompt_length": P, "bottleneck": 4,
        "activation": "gelu_tanh" if kind == "adapter" else None, "residual": kind == "adapter",
        **options,
    }  # fmt: skip
    layer = cls(nn.Linear(K, N), make_experts(kind), **options).to(dtype)
    with torch.no_grad():
        for p in (layer.gate, *(layer.adapter.parameters() if layer.adapter else ())):
            if p is not None:
                p.normal_()
    return layer


def make_call(layer, kind="lora", gate_query="input", dtype=torch.float64):
    """x and the other inputs of `layer`, all leaves."""
    random = torch.Generator().manual_seed(5)

    def leaf(*shape):
        return torch.randn(shape, generator=random, dtype=dtype).requires_grad_()

    inputs = {"x": leaf(BATCH, LENGTH, K)}
    if gate_query == "encoder":
        inputs["encoder_states"] = leaf(BATCH, LENGTH + 1, N)
    if kind == "adapter":
        inputs["ffn_input"] = leaf(BATCH, LENGTH, N)
    return inputs


def run(layer, inputs, mask=None):
    """f, the loss, and the gradients of a sum of both, by name."""
    f = layer(**inputs)
    loss = reference.task_sparsity(layer.agreement, mask)
    dy = torch.randn(f.shape, generator=torch.Generator().manual_seed(6)).to(f.dtype)
    leaves = inputs | {n: p for n, p in layer.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((f * dy).sum() + 3 * loss, list(leaves.values()))
    named = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"f": f.detach(), "cosines": layer.agreement.cosines.detach(), **named}


# The literal layers, against numpy.


def gelu_tanh(v):
    return v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3))) / 2


def softmax(v):
    powers = np.exp(v - v.max())
    return powers / powers.sum()


def pemt_by_token(layer, inputs, mask=None):
    """f, the weights and the loss, position by position from the formulas."""
    v = {n: t.detach().numpy() for n, t in (*inputs.items(), *layer.state_dict().items())}
    experts, batch, length = len(layer.ranks), len(v["x"]), v["x"].shape[1]
    states = v["x"] if layer.gate_query == "input" else v["encoder_states"]
    f, weights = np.zeros((batch, length, N)), np.zeros((batch, experts))
    cosines = np.zeros((batch, length, experts))
    for b in range(batch):
        query = sum(states[b, i] for i in range(P)) / P
        weights[b] = softmax(v["gate"] @ query)
        for t in range(length):
            z, outputs = v["base.weight"] @ v["x"][b, t] + v["base.bias"], []
            for e in range(experts):
                hidden = v["lora_down"][e] @ v["x"][b, t]
                if layer.biases:
                    hidden = gelu_tanh(hidden + v["down_bias"][e])
                output = v["lora_up"][e].T @ hidden
                if layer.biases:
                    output = output + v["up_bias"][e]
                outputs.append(layer.scales[e] * output)
                residual = v["ffn_input"][b, t] if layer.residual else 0
                z = z + weights[b, e] * (outputs[e] + residual)
            inner = gelu_tanh(v["adapter.down"][0] @ z + v["adapter.down_bias"][0])
            f[b, t] = z + v["adapter.up"][0].T @ inner + v["adapter.up_bias"][0]
            for e, o in enumerate(outputs):
                cosines[b, t, e] = f[b, t] @ o / np.sqrt((f[b, t] @ f[b, t]) * (o @ o))
    kept = np.ones((batch, length), bool) if mask is None else mask.numpy()
    loss = sum(weights[:, e].mean() * (1 - cosines[kept][:, e].mean()) for e in range(experts))
    return f, weights, loss


@pytest.mark.parametrize("gate_query", ["input", "encoder"])
@pytest.mark.parametrize("kind", KINDS)
def test_literal_layer_position_by_position(kind, gate_query):
    layer = make_layer(reference.PEMTLinear, kind, gate_query)
    inputs = make_call(layer, kind, gate_query)
    mask = torch.rand(BATCH, LENGTH) < 0.6
    for which in (None, mask):
        f, weights, loss = pemt_by_token(layer, inputs, which)
        torch.testing.assert_close(layer(**inputs).detach(), torch.from_numpy(f))
        torch.testing.assert_close(layer.agreement.weights.detach(), torch.from_numpy(weights))
        got = reference.task_sparsity(layer.agreement, which)
        assert got.item() == pytest.approx(loss, rel=1e-12)


def test_prompts_combine_by_attention_without_a_scale():
    target, sources = torch.randn(4, 6).double(), [torch.randn(n, 6).double() for n in (3, 5)]
    want = target.numpy().copy()
    for source in (s.numpy() for s in sources):
        for i, row in enumerate(target.numpy()):
            want[i] += softmax(source @ row) @ source
    torch.testing.assert_close(reference.combine_prompts(target, sources), torch.from_numpy(want))
    assert reference.combine_prompts(target, []) is target


def test_dropout_of_the_prompt_attention_keeps_its_expectation():
    target, sources = torch.randn(2, 3), [torch.randn(4, 3)]
    want = reference.combine_prompts(target, sources)
    draws = torch.stack([reference.combine_prompts(target, sources, 0.25) for _ in range(2000)])
    standard_error = draws.std(0) / len(draws) ** 0.5
    assert (standard_error > 0).all()
    assert ((draws.mean(0) - want).abs() < 5 * standard_error).all()


# The fused layers, against the literal ones.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate_query", ["input", "encoder"])
@pytest.mark.parametrize("kind", KINDS)
def test_fused_layer_is_the_literal_one(kind, gate_query, backend):
    literal = make_layer(reference.PEMTLinear, kind, gate_query)
    fused = PEMTLinear.from_reference(literal)
    inputs = make_call(literal, kind, gate_query)
    with moelora_ops.use_backend(backend):
        want, got = run(literal, inputs), run(fused, inputs)
        assert got.keys() == want.keys()
        for name in want:
            torch.testing.assert_close(got[name], want[name], msg=lambda m, n=name: f"{n}: {m}")
        # Without the cosines another function runs.
        for layer in (literal, fused):
            layer.eval()
        torch.testing.assert_close(fused(**inputs), literal(**inputs))
        assert fused.agreement.cosines is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_errors_keep_to_the_budget(kind, dtype):
    """At most twice the error of the literal layer in the same dtype."""
    rounded = make_layer(reference.PEMTLinear, kind, dtype=dtype)
    exact = copy.deepcopy(rounded).double()
    inputs = make_call(rounded, kind, dtype=dtype)
    wide = {n: t.detach().double().requires_grad_() for n, t in inputs.items()}
    want = run(exact, wide)
    got = run(PEMTLinear.from_reference(rounded), inputs)
    check_numerics("PEMTLinear", got, run(rounded, inputs), want)


def test_the_constructor_stacks_what_the_literal_one_does():
    torch.manual_seed(1)
    literal = make_layer(reference.PEMTLinear, "adapter")
    torch.manual_seed(1)
    fused = make_layer(PEMTLinear, "adapter")
    states = literal.state_dict(), fused.state_dict()
    assert states[0].keys() == states[1].keys()
    for name in ("lora_down", "lora_up", "down_bias", "up_bias"):
        assert torch.equal(states[0][name], states[1][name])
    down, up = fused.lora_down, fused.lora_up
    assert down.shape == (3, 5, K) and up.shape == (3, 5, N)
    assert not down[0, 3:].any() and not up[0, 3:].any() and down[1].all()
    trained = {name for name, p in fused.named_parameters() if p.requires_grad}
    adapter = {f"adapter.{n}" for n in ("down", "up", "down_bias", "up_bias")}
    assert trained == {"gate", *adapter}
    fresh = PEMTLinear(nn.Linear(K, N), make_experts(), gate_query="input", prompt_length=P)
    assert not fresh.gate.any() and fresh.adapter is None


def test_given_weights_replace_the_gate():
    layer = make_layer(gate_query=None)
    weights = torch.rand(BATCH, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(BATCH, LENGTH, K, dtype=torch.float64)
    literal = make_layer(reference.PEMTLinear, gate_query=None)
    literal.load_state_dict(layer.state_dict())
    for training in (True, False):
        layer.train(training)
        torch.testing.assert_close(layer(x, weights), literal(x, weights))
    grads = [
        torch.autograd.grad(m(x, weights).square().sum(), weights)[0] for m in (layer, literal)
    ]
    torch.testing.assert_close(*grads)
    # One position per sequence, without a dimension for it.
    layer.train()
    torch.testing.assert_close(layer(x[:, 0], weights), literal(x, weights)[:, 0])


def test_one_hot_weights_give_that_source():
    layer = make_layer(gate_query=None, bottleneck=None).eval()
    x = torch.randn(BATCH, LENGTH, K, dtype=torch.float64)
    for e in range(3):
        a, b = layer.lora_down[e], layer.lora_up[e].T
        merged = layer.base.weight + SCALES[e] * b @ a
        weights = F.one_hot(torch.full((BATCH,), e), 3).double()
        torch.testing.assert_close(layer(x, weights), F.linear(x, merged, layer.base.bias))


def test_a_foreign_base_is_called_and_its_gradients_are_left_alone():
    class Foreign(nn.Module):
        in_features = out_features = N

        def forward(self, x):
            return x  # its gradient is its output's own tensor

    torch.manual_seed(0)
    experts = make_experts(k_in=N)
    options = {"gate_query": "input", "prompt_length": P, "sparsity": True}
    layer = PEMTLinear(Foreign(), experts, dtype=torch.float64, **options)
    literal = reference.PEMTLinear(Foreign(), experts, dtype=torch.float64, **options)
    inputs = {"x": torch.randn(BATCH, LENGTH, N, dtype=torch.float64, requires_grad=True)}
    nn.init.normal_(layer.gate)
    literal.load_state_dict(layer.state_dict())
    dy = torch.randn(BATCH, LENGTH, N, dtype=torch.float64)
    kept = dy.clone()
    grads = [torch.autograd.grad(m(**inputs), inputs["x"], dy)[0] for m in (layer, literal)]
    assert torch.equal(dy, kept)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_someone_unfreezes_are_trained_and_constants_to_the_loss(kind):
    literal = make_layer(reference.PEMTLinear, kind)
    fused = PEMTLinear.from_reference(literal)
    names = [n for n in ("lora_down", "lora_up", "down_bias", "up_bias") if hasattr(fused, n)]
    experts = [p.requires_grad_() for n in names if (p := getattr(fused, n)) is not None]
    inputs = make_call(fused, kind)
    f = fused(**inputs)
    got = torch.autograd.grad(f.square().sum(), experts, retain_graph=True)
    want = torch.autograd.grad(literal(**inputs).square().sum(), experts)
    torch.testing.assert_close(got, want)
    # Without f in between, nothing of the loss reaches them.
    f = literal(**inputs).detach()
    hidden = fused._hidden(inputs["x"] @ fused.lora_down.detach().flatten(0, 1).T)
    cosines = expert_cosines(f, hidden, *fused._frozen_outputs())
    torch.testing.assert_close(cosines, literal.agreement.cosines)
    with pytest.raises(RuntimeError, match="have been used in the graph"):
        torch.autograd.grad(cosines.sum(), experts)


def test_hooks_of_the_base_see_gradients_that_nobody_changes_later():
    layer = make_layer()
    seen, inputs = [], make_call(layer)
    layer.base.register_full_backward_hook(lambda m, dx, dy: seen.extend((dx[0], dx[0].clone())))
    want = run(make_layer_like(layer), inputs)["dx"]
    torch.testing.assert_close(run(layer, inputs)["dx"], want)
    assert torch.equal(*seen)


def make_layer_like(layer):
    """The same without hooks."""
    other = copy.deepcopy(layer)
    other.base._backward_hooks.clear()
    return other


@pytest.mark.parametrize("only", ["f", "weights", "cosines"])
def test_each_output_alone_has_its_gradients(only):
    literal = make_layer(reference.PEMTLinear)
    fused = PEMTLinear.from_reference(literal)
    grads = []
    for layer in (literal, fused):
        inputs = make_call(layer)
        f = layer(**inputs)
        chosen = {"f": f, **layer.agreement._asdict()}[only]
        leaves = [inputs["x"], layer.gate]
        grads.append(torch.autograd.grad(chosen.square().sum(), leaves))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kind", KINDS)
def test_source_layer_is_the_literal_one_and_hands_over_its_expert(kind):
    torch.manual_seed(2)
    literal = reference.PEMTSourceLinear(nn.Linear(K, N), 3, 6.0, kind=kind).double()
    torch.manual_seed(2)
    fused = PEMTSourceLinear(nn.Linear(K, N), 3, 6.0, kind=kind).double()
    with torch.no_grad():
        for p in (literal.down_bias, literal.up_bias):
            if p is not None:
                p.normal_()
    fused.load_state_dict(literal.state_dict())
    x = torch.randn(BATCH, LENGTH, K, dtype=torch.float64)
    v = torch.randn(BATCH, LENGTH, N, dtype=torch.float64) if kind == "adapter" else None
    torch.testing.assert_close(fused(x, v), literal(x, v))
    torch.testing.assert_close(PEMTSourceLinear.from_reference(literal)(x, v), literal(x, v))
    # As the only source of stage 2 it computes the same.
    stage_2 = PEMTLinear(
        fused.base, [fused.expert()], activation="gelu_tanh" if kind == "adapter" else None,
        residual=kind == "adapter",
    ).double()  # fmt: skip
    one = torch.ones(BATCH, 1)
    torch.testing.assert_close(stage_2(x, one, ffn_input=v), literal(x, v))
    assert fused.expert().scale == (1.0 if kind == "adapter" else 2.0)


def test_source_initialisations():
    torch.manual_seed(0)
    base = nn.Linear(64, 48)
    layer = PEMTSourceLinear(base, 16)
    for values, fan_in in ((layer.lora_down, 64), (layer.lora_up, 16)):
        bound, values = fan_in**-0.5, values.detach()
        n = values.numel()
        assert values.abs().max() <= bound and values.abs().max() > bound * (1 - 20 / n)
        assert abs(values.mean()) < 5 * bound / (3 * n) ** 0.5
    assert not PEMTSourceLinear(nn.Linear(64, 48), 16, init="zero").lora_up.any()
    adapter = PEMTSourceLinear(nn.Linear(64, 48), 16, kind="adapter")
    for layer in (adapter, PEMTAdapter(64, 16)):
        for name, p in layer.named_parameters():
            if "bias" in name and "base" not in name:
                assert not p.any()
            elif "base" not in name:
                assert 0.008 < p.std() < 0.012


# The loss in rank space.


def cosine_inputs(n_out=N, rank=3, experts=2, tokens=5):
    f = torch.randn(tokens, n_out, dtype=torch.float64)
    hidden = torch.randn(tokens, experts, rank, dtype=torch.float64)
    up = torch.randn(experts, rank, n_out, dtype=torch.float64)
    return f, hidden, up, torch.tensor([0.5, -2.0], dtype=torch.float64)[:experts]


@pytest.mark.parametrize("rank", [1, 3, N, 2 * N])
def test_cosines_are_those_of_the_materialised_outputs(rank):
    f, hidden, up, scales = cosine_inputs(rank=rank)
    got = expert_cosines(f, hidden, up, triangular_factors(up), scales)
    for t in range(5):
        for e in range(2):
            o = scales[e] * hidden[t, e] @ up[e]
            want = (f[t] @ o) / (f[t].norm() * o.norm())
            assert got[t, e].item() == pytest.approx(want.item(), rel=1e-11)


def test_gradients_of_the_cosines_by_finite_differences():
    f, hidden, up, scales = cosine_inputs()
    factors = triangular_factors(up)
    assert torch.autograd.gradcheck(
        lambda f, h: expert_cosines(f, h, up, factors, scales),
        (f.requires_grad_(), hidden.requires_grad_()),
    )


def test_gradients_of_the_cosines_are_the_closed_forms():
    f, hidden, up, scales = cosine_inputs()
    f.requires_grad_(), hidden.requires_grad_()
    cosines = expert_cosines(f, hidden, up, triangular_factors(up), scales)
    dcosines = torch.randn_like(cosines)
    cosines.backward(dcosines)
    v, h, b, dc = (t.detach().numpy() for t in (f, hidden, up, dcosines))
    df, dh = np.zeros_like(v), np.zeros_like(h)
    for t in range(5):
        for e in range(2):
            o = h[t, e] @ b[e]
            norm, length = np.linalg.norm(o), np.linalg.norm(v[t])
            c = np.sign(scales[e].item()) * (v[t] @ o) / (norm * length)
            along = np.sign(scales[e].item()) / (norm * length)
            df[t] += dc[t, e] * (along * o - c * v[t] / length**2)
            dh[t, e] += dc[t, e] * (along * (b[e] @ v[t]) - c * (b[e] @ o) / norm**2)
    np.testing.assert_allclose(f.grad.numpy(), df, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(hidden.grad.numpy(), dh, rtol=1e-10, atol=1e-12)


def test_norms_do_not_square_the_condition_number():
    """cond(B) = 1e4 in its worst direction, float32: a Gram matrix would be 9 % off."""
    q, _ = torch.linalg.qr(torch.randn(64, 4, dtype=torch.float64))
    mixer, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    b = q @ torch.diag(torch.tensor([1.0, 0.1, 0.01, 1e-4]).double()) @ mixer.T
    hidden = mixer[:, 3]
    f = torch.randn(64, dtype=torch.float64)
    up = b.T[None]
    want = F.cosine_similarity(f, b @ hidden, dim=0)
    got = expert_cosines(
        f[None].float(), hidden[None, None].float(), up.float(), triangular_factors(up.float()),
        torch.ones(1),
    )  # fmt: skip
    # The rounding of B itself moves the direction by 1e-7 / 1e-4.
    assert abs(got.item() - want.item()) < 5e-3


def test_zero_outputs_have_cosine_zero_and_no_gradient():
    f, hidden, up, scales = cosine_inputs()
    with torch.no_grad():
        hidden[0], f[1], scales[0] = 0, 0, 0
    f.requires_grad_(), hidden.requires_grad_()
    cosines = expert_cosines(f, hidden, up, triangular_factors(up), scales)
    outputs = scales[:, None] * torch.einsum("ter,ern->ten", hidden, up)
    want = F.cosine_similarity(f[:, None], outputs, dim=-1)
    torch.testing.assert_close(cosines, want)
    assert not cosines[0].any() and not cosines[1].any() and not cosines[:, 0].any()
    cosines.sum().backward()
    assert f.grad.isfinite().all() and hidden.grad.isfinite().all()


def test_many_tokens_go_block_by_block():
    f, hidden, up, scales = cosine_inputs(tokens=1100)
    outputs = scales[:, None] * torch.einsum("ter,ern->ten", hidden, up)
    want = F.cosine_similarity(f[:, None], outputs, dim=-1)
    torch.testing.assert_close(expert_cosines(f, hidden, up, triangular_factors(up), scales), want)


def test_factors_follow_the_experts():
    layer = make_layer()
    x = torch.randn(BATCH, LENGTH, K, dtype=torch.float64)
    layer(x)
    other = make_layer()
    layer.load_state_dict(other.state_dict())
    layer(x), other(x)
    torch.testing.assert_close(layer.agreement.cosines, other.agreement.cosines)


def test_nothing_of_the_size_of_all_experts_outputs_is_made():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    self.elements = max(self.elements, t.numel())
            return out

    experts, k_in, n_out, tokens = 6, 40, 64, 300
    literal = reference.PEMTLinear(
        nn.Linear(k_in, n_out), make_experts("lora", [4] * experts, [1.0] * experts, k_in, n_out),
        gate_query="input", prompt_length=P, bottleneck=4,
    )  # fmt: skip
    sizes = {}
    for name, layer in (("fused", PEMTLinear.from_reference(literal)), ("literal", literal)):
        x = torch.randn(3, tokens // 3, k_in, requires_grad=True)
        with Largest() as largest:
            run(layer, {"x": x})
        sizes[name] = largest.elements
    assert sizes["fused"] <= tokens * n_out
    assert sizes["literal"] >= tokens * experts  # the mode does see things


def test_a_layer_that_has_run_can_be_copied_and_pickled():
    layer = make_layer()
    x = torch.randn(BATCH, LENGTH, K, dtype=torch.float64)
    f = layer(x)
    copied = copy.deepcopy(layer)
    assert copied.agreement is None and layer.agreement is not None
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copied, torch.load(file, weights_only=False)):
        torch.testing.assert_close(other(x), f)


def test_the_layer_compiles_whole():
    layer = make_layer(dtype=torch.float32)
    inputs = make_call(layer, dtype=torch.float32)
    want = run(layer, inputs)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    f = compiled(**inputs)
    torch.testing.assert_close(f.detach(), want["f"])
    torch.testing.assert_close(layer.agreement.cosines.detach(), want["cosines"])
    loss = reference.task_sparsity(layer.agreement)
    dy = torch.randn(f.shape, generator=torch.Generator().manual_seed(6))
    (dx,) = torch.autograd.grad((f * dy).sum() + 3 * loss, inputs["x"])
    torch.testing.assert_close(dx, want["dx"])


def test_autocast():
    layer = make_layer(dtype=torch.float32)
    inputs = make_call(layer, dtype=torch.float32)
    want = run(layer, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(layer, inputs)
    assert got["f"].dtype == torch.bfloat16 and got["dgate"].dtype == torch.float32
    assert layer.agreement.weights.dtype == torch.float32
    for name in want:
        error = (got[name].float() - want[name]).norm() / want[name].norm()
        assert error < 0.05, name


# The benchmark, and what it says about memory.

TINY_CASES = [
    (GATED, GatedCase("tiny", "fp64", 12, 10, 8, 3, 4)),
    (GATED, GatedCase("tiny", "fp32", 256, 10, 8, 3, 4, trained=True)),
    (PEMT, PEMTCase("tiny", "fp64", 24, 10, 8, 3, 4, 4)),
    (PEMT, PEMTCase("tiny", "bf16", 256, 64, 48, 3, 8, 4)),
]


@pytest.mark.parametrize("direction", ["forward", "train"])
@pytest.mark.parametrize(("method", "case"), TINY_CASES, ids=lambda v: f"{v.name}-{v}"[:30])
def test_benchmark_competes_on_the_same_function(method, case, direction):
    """Every variant keeps to its error budget, or this raises."""
    ready = runner.prepare(method, case, direction, runner.Settings(compile=False))
    peft = ["peft-xlora"] if method is GATED and importlib.util.find_spec("peft") else []
    assert list(ready.layers) == ["base", "touch", "stacked", "expert-loop", *peft, "ours"]
    assert not ready.coarse
    assert all(("dx" in errors) == (direction == "train") for errors in ready.errors.values())
    assert runner.saved_bytes(ready.layers["ours"], ready.x) <= method.memory_target(case)


def test_benchmark_floors_by_hand():
    gated = GatedCase("c", "fp32", 1, in_features=30, out_features=20, experts=2, rank=3)
    assert GATED.floors(gated, "forward").dense == pytest.approx(6 * 50 / 600)
    assert GATED.floors(gated, "train").dense == pytest.approx(2 * 6 * 50 / 1200)
    trained = replace(gated, trained=True)
    assert GATED.floors(trained, "train").dense == pytest.approx(3 * 6 * 50 / 1200)
    pemt = PEMTCase("c", "fp32", 1, 30, 20, experts=2, rank=3, bottleneck=5)
    assert PEMT.floors(pemt, "forward").dense == pytest.approx((6 * 50 + 2 * 5 * 20) / 600)
    loss = 2 * 6 * (20 + 3)
    want = (2 * 6 * 50 + 6 * 5 * 20 + loss) / 1200
    assert PEMT.floors(pemt, "train").dense == pytest.approx(want)


def test_a_step_needs_ten_times_less_memory_than_the_authors_form():
    """At E = 6, r = 64, N = 768, beside what the frozen linear and the adapter need.

    With more tokens the ratio grows: some scratch is of a fixed number of tokens.
    """
    step, x, dy = PEMT.make_inputs(PEMTCase("c", "fp32", 1024, in_features=64), 0)
    rivals = {v.name: v.build(None, step) for v in PEMT.variants if not v.compiled}
    rivals["neither"] = nn.Sequential(step.base, step.layer.adapter)
    peaks = {}
    for name in ("neither", "expert-loop", "ours"):
        call = runner.make_call(rivals[name], x, dy, "train")
        call()
        peaks[name] = runner.peak_bytes(call)
    extra = {name: peaks[name] - peaks["neither"] for name in ("expert-loop", "ours")}
    assert extra["ours"] > 1024 * 6 * 64 * 4  # the hidden of every expert
    assert extra["expert-loop"] >= 10 * extra["ours"]


# Bad input.


@pytest.mark.parametrize(
    ("message", "loras"),
    [
        ("loras: wanted a list of at least one", []),
        (r"loras\[1\]: wanted A of shape \[r, 10\]", [make_experts()[0], make_experts(k_in=9)[0]]),
        (r"loras\[0\]: wanted B of shape \[8, 3\]", make_experts(n_out=7)),
        (r"loras\[0\]: scale: wanted a finite number", make_experts(scales=[float("nan"), 1, 1])),
        (r"loras\[1\]: wanted biases for all", [make_experts("adapter")[0], make_experts()[0]]),
        (
            r"loras\[0\]: wanted a of shape \[3\], got \[2\]",
            [(*make_experts()[0], torch.zeros(2), torch.zeros(N))],
        ),
        (
            r"loras\[0\]: wanted b of shape \[8\], got None",
            [(*make_experts()[0], torch.zeros(3), None)],
        ),
    ],
)
def test_bad_experts_are_refused_before_the_base_is_frozen(message, loras):
    base = nn.Linear(K, N)
    with pytest.raises((TypeError, ValueError), match=message):
        PEMTLinear(base, loras)
    assert base.weight.requires_grad


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("activation: wanted one of", {"activation": "silu"}),
        ("gate_query: wanted one of", {"gate_query": "decoder"}),
        ("prompt_length: wanted an int of at least 1, got None", {"gate_query": "input"}),
        ("prompt_length: wanted an int", {"gate_query": "input", "prompt_length": 0}),
        ("gate_features: wanted an int", {"gate_query": "encoder", "prompt_length": 1}),
        ("bottleneck: wanted an int", {"bottleneck": 0}),
        ("residual: wanted a bool", {"residual": 1}),
        ("sparsity: wanted a bool", {"sparsity": None}),
    ],
)
def test_bad_arguments_are_refused(message, options):
    base = nn.Linear(K, N)
    with pytest.raises((TypeError, ValueError), match=message):
        PEMTLinear(base, make_experts(), **options)
    assert base.weight.requires_grad


@pytest.mark.parametrize(
    ("message", "kwargs"),
    [
        ("rank: wanted an int of at least 1, got 0", {"rank": 0}),
        ("alpha: wanted a finite number", {"alpha": float("inf")}),
        ("kind: wanted one of", {"kind": "prefix"}),
        ("init: wanted one of", {"init": "normal"}),
    ],
)
def test_bad_source_arguments_are_refused(message, kwargs):
    with pytest.raises(ValueError, match=message):
        PEMTSourceLinear(nn.Linear(K, N), **kwargs)
    with pytest.raises(ValueError, match=message):
        moelora_ops.PEMTSourceConfig(3, **kwargs)


@pytest.mark.parametrize("training", [True, False])
def test_a_prompt_longer_than_the_input_is_refused(training):
    layer = make_layer(prompt_length=LENGTH + 1).train(training)
    with pytest.raises(ValueError, match="x: wanted at least the prompt's 7 positions, got 6"):
        layer(make_call(layer)["x"])
    layer = make_layer(gate_query="encoder", prompt_length=LENGTH + 2).train(training)
    with pytest.raises(ValueError, match="encoder_states: wanted at least the prompt's 8 pos"):
        layer(**make_call(layer, gate_query="encoder"))


def test_what_a_call_lacks_is_named():
    x = torch.randn(BATCH, LENGTH, K, dtype=torch.float64)
    states = torch.randn(BATCH, LENGTH, N, dtype=torch.float64)
    for layer, kwargs, message in (
        (make_layer(gate_query=None), {}, "weights: wanted .* the layer has no gate, got None"),
        (make_layer(), {"weights": torch.ones(BATCH, 2)}, r"weights: wanted shape \[3, 3\], got"),
        (make_layer(gate_query="encoder"), {}, "encoder_states: wanted the final encoder output"),
        (
            make_layer(gate_query="encoder"),
            {"encoder_states": states[..., :3]},
            r"encoder_states: wanted shape \[batch, length, 8\], got \[3, 6, 3\]",
        ),
        (make_layer(kind="adapter"), {}, "ffn_input: wanted the feed-forward's input"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x, **kwargs)
    with pytest.raises(ValueError, match=r"x: wanted shape \[batch, length, 10\], got \[6, 10\]"):
        make_layer()(x[0])
    with pytest.raises(ValueError, match="ffn_input: wanted the feed-forward's input"):
        PEMTSourceLinear(nn.Linear(K, N), kind="adapter")(x.float())


# A T5-type model.

transformers = pytest.importorskip("transformers")
PROMPTS = ([5, 6], [7, 8, 9], [10])
TARGET = [11, 12, 13, 14]


def tiny_t5(**options):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **options,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def batch():
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 40, (3, 7), generator=random)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    labels = torch.randint(2, 40, (3, 5), generator=random)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def source_model(e, kind="lora", implementation="fused", **options):
    model = tiny_t5(**options)
    config = moelora_ops.PEMTSourceConfig(PROMPTS[e], rank=2 + e, alpha=3.0, kind=kind)
    return moelora_ops.apply(model, config, implementation=implementation)


def sources(kind="lora", **options):
    found = []
    for e in range(len(PROMPTS)):
        model = source_model(e, kind, **options)
        torch.manual_seed(20 + e)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.normal_(std=0.3)
        found.append(moelora_ops.pemt_source(model))
    return found


def target_model(kind="lora", implementation="fused", gates=True, t5=None, **options):
    """Stage 2 with gates and adapters that do something."""
    model = tiny_t5(**(t5 or {}))
    config = moelora_ops.PEMTConfig(sources(kind, **(t5 or {})), TARGET, dropout=0.0, **options)
    model = moelora_ops.apply(model, config, implementation=implementation)
    torch.manual_seed(9)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if ".adapter." in name or (gates and name.endswith(".gate")):
                p.normal_(std=0.3)
    return model.train()


def gradients(model, **kwargs):
    """Loss with the task sparsity loss, and every gradient by name."""
    model.zero_grad()
    output = model(**batch(), **kwargs)
    loss = output.loss + moelora_ops.task_sparsity_loss(model, 1.0)
    loss.backward()
    named = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), "logits": output.logits.detach(), **named}


def assert_all_close(got, want, **tolerances):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], msg=lambda m, n=name: f"{n}: {m}", **tolerances
        )


def feed_forward_linears(model):
    return {n: m for n, m in model.named_modules() if n.endswith("DenseReluDense.wo")}


@torch.no_grad()
def plain_logits(model, merged, prompt):
    """Of an untouched T5 whose W_o are `merged` and whose input has `prompt` before it."""
    for name, weight in merged.items():
        model.get_submodule(name).weight.copy_(weight)
    inputs = batch()
    ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
    embeds = torch.cat([prompt.expand(len(ids), -1, -1), model.shared(ids)], 1)
    mask = torch.cat([torch.ones(len(ids), len(prompt), dtype=mask.dtype), mask], 1)
    return model(inputs_embeds=embeds, attention_mask=mask, labels=labels).logits


def test_stage_1_is_plain_t5_with_merged_weights_and_a_prompt():
    model = source_model(1)
    start = tiny_t5().shared.weight[torch.tensor(PROMPTS[1])]
    assert torch.equal(model.moelora_companions["prompt"].target, start)
    merged = {
        name: layer.base.weight + 3.0 / 3 * layer.lora_up[0].T @ layer.lora_down[0]
        for name, layer in feed_forward_linears(model).items()
    }
    assert len(merged) == 4
    want = plain_logits(tiny_t5(), merged, start)
    torch.testing.assert_close(model(**batch()).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("t5", [{}, {"feed_forward_proj": "gated-gelu"}], ids=["t5", "v1.1"])
def test_at_the_start_stage_2_is_plain_t5_with_the_uniform_average(t5):
    """Gates start at zero: every source has weight 1/3, so the experts merge into W_o."""
    model = target_model(gates=False, reduction=None, t5=t5)
    given = sources(**t5)
    merged = {
        name: layer.base.weight
        + sum(s.experts[name].scale * s.experts[name].up @ s.experts[name].down for s in given) / 3
        for name, layer in feed_forward_linears(model).items()
    }
    target = tiny_t5(**t5).shared.weight[torch.tensor(TARGET)]
    prompt = reference.combine_prompts(target, [s.prompt for s in given])
    want = plain_logits(tiny_t5(**t5), merged, prompt)
    torch.testing.assert_close(model(**batch()).logits, want, rtol=1e-4, atol=1e-4)
    weights = moelora_ops.source_weights(model)
    assert list(weights) == list(merged)
    for of_layer in weights.values():
        torch.testing.assert_close(of_layer, torch.full((3,), 1 / 3))


@pytest.mark.parametrize("kind", KINDS)
def test_gates_see_the_prompt_in_the_activation_and_in_the_encoders_output(kind):
    model = target_model(kind)
    seen = {}
    handles = [
        layer.register_forward_pre_hook(lambda m, args, n=name: seen.setdefault(n, args[0]))
        for name, layer in feed_forward_linears(model).items()
    ]
    output = model(**batch())
    for handle in handles:
        handle.remove()
    assert output.encoder_last_hidden_state.shape[1] == len(TARGET) + 7
    for name, layer in feed_forward_linears(model).items():
        states = seen[name] if "encoder" in name else output.encoder_last_hidden_state
        query = states[:, : len(TARGET)].mean(1)
        want = (query @ layer.gate.T).softmax(-1)
        torch.testing.assert_close(layer.agreement.weights, want)
        assert want.std(0).max() > 0  # from sequence to sequence, not from task to task


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_model_is_the_literal_one_and_fuse_makes_it(kind):
    want = gradients(target_model(kind, "reference"))
    assert_all_close(gradients(target_model(kind)), want, rtol=1e-3, atol=1e-4)
    fused = moelora_ops.fuse(target_model(kind, "reference"))
    assert all(type(m) is PEMTLinear for m in feed_forward_linears(fused).values())
    assert_all_close(gradients(fused), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing(kind):
    model = target_model(kind)
    want = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_all_close(gradients(model, use_cache=False), want)
    # A recomputed layer has left nothing behind.
    for layer in feed_forward_linears(model).values():
        assert layer.encoder_states is None and layer.ffn_input is None


@pytest.mark.parametrize("kind", KINDS)
def test_reentrant_checkpointing_without_the_sparsity_loss(kind):
    def gradients(model):
        model.zero_grad()
        model(**batch(), use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    model = target_model(kind)
    want = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert_all_close(gradients(model), want)
    with pytest.raises(RuntimeError, match=r"ran without a graph in training mode\. Checkpoint"):
        moelora_ops.task_sparsity_loss(model)
    with torch.no_grad():
        assert moelora_ops.task_sparsity_loss(model) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_a_cache(kind):
    model = target_model(kind).eval()
    inputs = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    want = inputs | {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
    cached = model.generate(**want, use_cache=True)
    assert torch.equal(cached, model.generate(**want, use_cache=False))
    # And by hand, from an encoder output that is made once.
    encoded = model.encoder(**inputs)
    first = model(
        encoder_outputs=encoded, attention_mask=inputs["attention_mask"],
        decoder_input_ids=torch.zeros(3, 1, dtype=torch.long),
    )  # fmt: skip
    direct = model(**inputs, decoder_input_ids=torch.zeros(3, 1, dtype=torch.long))
    torch.testing.assert_close(first.logits, direct.logits)


def test_padding_changes_nothing_that_a_mask_keeps():
    model = target_model()
    short = {name: t[1:2, :4] for name, t in batch().items()}
    padded = {name: t.clone() for name, t in short.items()}
    padded["input_ids"] = F.pad(short["input_ids"], (0, 3), value=17)
    padded["attention_mask"] = F.pad(short["attention_mask"], (0, 3))
    values = []
    for inputs in (short, padded):
        loss = model(**inputs).loss
        sparsity = moelora_ops.task_sparsity_loss(model, attention_mask=inputs["attention_mask"])
        values.append((loss, sparsity))
    torch.testing.assert_close(values[1], values[0])
    everywhere = moelora_ops.task_sparsity_loss(model)
    assert abs(everywhere - values[1][1]) > 1e-4  # as the authors' code: padding included


def test_the_sparsity_loss_is_the_mean_over_layers():
    model = target_model()
    model(**batch())
    decoder_mask = torch.tensor([[1, 1, 1, 0, 0]] * 3)
    encoder_mask = F.pad(batch()["attention_mask"], (len(TARGET), 0), value=1).bool()
    terms = []
    for name, layer in feed_forward_linears(model).items():
        mask = encoder_mask if "encoder" in name else decoder_mask.bool()
        terms.append(reference.task_sparsity(layer.agreement, mask))
    got = moelora_ops.task_sparsity_loss(
        model, 0.1, attention_mask=batch()["attention_mask"], decoder_attention_mask=decoder_mask
    )
    torch.testing.assert_close(got, 0.1 * sum(terms) / 4)


def test_the_papers_parameter_counts():
    """T5-base, six sources of rank 64, bottleneck 48: what the authors' code trains and freezes."""
    config = transformers.T5Config(
        d_model=768, d_ff=3072, d_kv=64, num_layers=12, num_heads=12, vocab_size=32128
    )

    def t5_base():
        with torch.device("meta"):
            return transformers.T5ForConditionalGeneration(config)

    def trained(model, *parts):
        return sum(
            p.numel() for n, p in model.named_parameters()
            if p.requires_grad and any(part in n for part in parts)
        )  # fmt: skip

    length = 33
    model = moelora_ops.apply(t5_base(), moelora_ops.PEMTSourceConfig(list(range(length))))
    assert trained(model, ".lora_") == 5_898_240
    assert trained(model, "") == 5_898_240 + 768 * length
    source = moelora_ops.pemt_source(model)
    model = moelora_ops.apply(t5_base(), moelora_ops.PEMTConfig([source] * 6, list(range(length))))
    assert trained(model, ".gate") == 276_480
    assert trained(model, ".adapter.") == 1_789_056
    assert trained(model, "layer_norm") == 47_616
    assert trained(model, "") == 276_480 + 1_789_056 + 47_616 + 768 * length
    assert trained(model, ".lora_") == 0


def test_what_trains_in_which_stage():
    model = source_model(0)
    kinds = {n.split(".")[-1] for n, p in model.named_parameters() if p.requires_grad}
    assert kinds == {"lora_down", "lora_up", "target"}
    model = target_model()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    norms = [n for n in names if "layer_norm" in n]
    assert len(norms) == 2 * 2 + 2 * 3 + 2
    rest = {n.split("wo.")[-1] for n in names} - set(norms)
    adapter = {f"adapter.{n}" for n in ("down", "up", "down_bias", "up_bias")}
    assert rest == {"gate", *adapter, "moelora_companions.prompt.target"}
    frozen = moelora_ops.apply(
        tiny_t5(), moelora_ops.PEMTConfig(sources(), 2, train_norms=False, reduction=None)
    )
    rest = {n.split("wo.")[-1] for n, p in frozen.named_parameters() if p.requires_grad}
    assert rest == {"gate", "moelora_companions.prompt.target"}


def test_a_number_of_positions_starts_from_random_rows_of_the_vocabulary():
    model = moelora_ops.apply(tiny_t5(), moelora_ops.PEMTSourceConfig(5, rank=2))
    target, table = model.moelora_companions["prompt"].target, model.shared.weight
    assert target.shape == (5, 16)
    assert all((table == row).all(1).any() for row in target)


@pytest.mark.parametrize("kind", KINDS)
def test_both_stages_are_saved_and_loaded(kind, tmp_path):
    pytest.importorskip("safetensors")
    stage_1 = source_model(2, kind)
    moelora_ops.save_adapter(stage_1, tmp_path / "source")
    loaded = moelora_ops.load_adapter(tiny_t5(), tmp_path / "source").eval()
    assert torch.equal(loaded(**batch()).logits, stage_1(**batch()).logits)
    from_file, from_model = (moelora_ops.pemt_source(s) for s in (tmp_path / "source", stage_1))
    assert torch.equal(from_file.prompt, from_model.prompt)
    assert from_file.experts.keys() == from_model.experts.keys()
    for name, expert in from_file.experts.items():
        for got, want in zip(expert, from_model.experts[name], strict=True):
            assert torch.equal(got, want) if isinstance(got, torch.Tensor) else got == want

    model = target_model(kind)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    gradients(model)
    optimizer.step()  # moves the LayerNorms too
    moelora_ops.save_adapter(model, tmp_path / "target")
    for implementation in ("fused", "reference"):
        fresh = moelora_ops.load_adapter(
            tiny_t5(), tmp_path / "target", implementation=implementation
        )
        trained = {n for n, p in fresh.named_parameters() if p.requires_grad}
        assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
        difference = fresh.eval()(**batch()).logits - model.eval()(**batch()).logits
        assert difference.abs().max() < (1e-12 if implementation == "fused" else 1e-4)
    # Into a model that has the adapters already; what matters in training only may differ.
    other = target_model(kind, sparsity=False)
    other.moelora_companions["prompt"].dropout = 0.5
    moelora_ops.load_adapter(other, tmp_path / "target")
    assert torch.equal(other.eval()(**batch()).logits, model(**batch()).logits)


def test_a_copy_of_the_model_stands_alone():
    model = target_model()
    want = model(**batch()).logits
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model.moelora_companions["prompt"].target.zero_()
        model.encoder.final_layer_norm.weight.zero_()
    assert torch.equal(copied(**batch()).logits, want)
    copied.encoder.final_layer_norm.weight.data.mul_(2)
    norms = copied.moelora_companions["norms"]
    index = norms.names.index("encoder.final_layer_norm.weight")
    assert norms.weights[index] is copied.encoder.final_layer_norm.weight


def test_stage_1_models_without_the_hooks_of_the_other_stage():
    """fuse attaches anew: prompts come once, not twice."""
    model = moelora_ops.fuse(source_model(1, implementation="reference"))
    assert model(**batch()).encoder_last_hidden_state.shape[1] == len(PROMPTS[1]) + 7


def test_positional_arguments_and_embeddings_reach_the_encoder():
    model = target_model().eval()
    ids, mask = batch()["input_ids"], batch()["attention_mask"]
    want = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(model.encoder(ids, mask).last_hidden_state, want)
    embeds = model.shared(ids)
    got = model.encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    assert torch.equal(got, want)
    encoder_only = transformers.T5EncoderModel(model.config)
    one = moelora_ops.PEMTSourceConfig(2, rank=2)
    states = moelora_ops.apply(encoder_only, one)(ids).last_hidden_state
    assert states.shape[1] == 2 + ids.shape[1]


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("sources: wanted at least one", lambda: moelora_ops.PEMTConfig([], 2)),
        (r"sources\[0\]: wanted a PEMTSource", lambda: moelora_ops.PEMTConfig([3], 2)),
        ("prompt: wanted token ids or a number", lambda: moelora_ops.PEMTSourceConfig([])),
        ("prompt: wanted token ids or a number", lambda: moelora_ops.PEMTSourceConfig(0)),
        ("prompt: wanted token ids or a number", lambda: moelora_ops.PEMTSourceConfig("cola")),
        ("prompt: wanted token ids or a number", lambda: moelora_ops.PEMTSourceConfig([-1])),
        ("reduction: wanted", lambda: moelora_ops.PEMTConfig(sources(), 2, reduction=0)),
        ("dropout: wanted", lambda: moelora_ops.PEMTConfig(sources(), 2, dropout=1.0)),
        ("train_norms: wanted", lambda: moelora_ops.PEMTConfig(sources(), 2, train_norms=1)),
        ("sparsity: wanted", lambda: moelora_ops.PEMTConfig(sources(), 2, sparsity="no")),
    ],
)
def test_bad_configurations_are_refused(message, make):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_models_that_do_not_fit_are_refused_and_left_as_they_were():
    good = sources()
    some = dict(list(good[1].experts.items())[:2])
    with pytest.raises(ValueError, match=r"sources\[1\]: wanted experts for the linears of sourc"):
        moelora_ops.PEMTConfig([good[0], moelora_ops.PEMTSource(good[1].prompt, some)], 2)
    narrow = moelora_ops.PEMTSource(good[1].prompt[:, :8], good[1].experts)
    mixed = [good[0], sources("adapter")[1]]
    model = tiny_t5()
    for config, message in (
        (moelora_ops.PEMTSourceConfig([3, 40]), "prompt: wanted token ids below 40"),
        (moelora_ops.PEMTConfig([good[0], narrow], 2), r"sources\[1\]: wanted a prompt of shape"),
        (moelora_ops.PEMTConfig(mixed, 2), r"loras\[1\]: wanted biases for all experts"),
        (
            moelora_ops.PEMTSourceConfig(2, target_modules=("wi",)),
            "target_modules: wanted the second linear of T5 feed-forwards",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            moelora_ops.apply(model, config)
        assert all(p.requires_grad for p in model.parameters())
        assert not hasattr(model, "moelora_companions")
        assert all(type(m) is nn.Linear for m in feed_forward_linears(model).values())
    with pytest.raises(ValueError, match="model: wanted a T5-type model, got Sequential"):
        moelora_ops.apply(
            nn.Sequential(nn.Linear(2, 2)), moelora_ops.PEMTSourceConfig(2, target_modules=("0",))
        )
    deeper = tiny_t5(num_decoder_layers=1)
    with pytest.raises(ValueError, match=r"but the model has none called decoder\.block\.1"):
        moelora_ops.apply(deeper, moelora_ops.PEMTConfig(good, 2))


def without(path):
    def change(model):
        parent, _, name = path.rpartition(".")
        delattr(model.get_submodule(parent), name)

    return change


def with_wider_norm(model):
    model.encoder.final_layer_norm.weight = nn.Parameter(torch.ones(17))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (
            r"wanted a parameter encoder\.final_layer_norm\.weight of shape \[16\], got None",
            without("encoder.final_layer_norm"),
        ),
        (r"final_layer_norm\.weight of shape \[16\], got \[17\]", with_wider_norm),
        ("model: wanted a T5-type model", without("encoder.is_decoder")),
        (
            "model: wanted embeddings of width 16, got 8",
            lambda model: model.encoder.set_input_embeddings(nn.Embedding(40, 8)),
        ),
    ],
    ids=["missing norm", "wider norm", "no encoder", "narrow embeddings"],
)
def test_a_model_that_a_file_does_not_suit_is_left_as_it_was(message, change, tmp_path):
    pytest.importorskip("safetensors")
    moelora_ops.save_adapter(target_model(), tmp_path)
    model = tiny_t5()
    change(model)
    modules = dict(model.named_modules())
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        moelora_ops.load_adapter(model, tmp_path)
    assert dict(model.named_modules()) == modules
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in modules.values())
    for name, p in model.named_parameters():
        assert p.requires_grad and torch.equal(p, values[name])


def test_norms_of_compiled_blocks_are_found_by_their_plain_names(tmp_path):
    pytest.importorskip("safetensors")
    model = target_model()
    moelora_ops.save_adapter(model, tmp_path)
    wrapped = tiny_t5()
    wrapped.encoder.block[0] = torch.compile(wrapped.encoder.block[0], backend="eager")
    assert any("_orig_mod." in name for name, _ in wrapped.named_parameters())
    with torch.no_grad():
        wrapped.encoder.block[0].layer[0].layer_norm.weight.fill_(3)
    moelora_ops.load_adapter(wrapped, tmp_path)
    assert torch.equal(
        wrapped.encoder.block[0].layer[0].layer_norm.weight,
        model.encoder.block[0].layer[0].layer_norm.weight,
    )


def test_what_is_no_source_is_refused(tmp_path):
    with pytest.raises(ValueError, match="source: wanted PEMT's stage 1, got no adapters"):
        moelora_ops.pemt_source(tiny_t5())
    with pytest.raises(ValueError, match=r"source: wanted PEMT's stage 1, got \['pemt'\]"):
        moelora_ops.pemt_source(target_model())
    with pytest.raises(FileNotFoundError, match="dir: wanted a directory with an adapter"):
        moelora_ops.pemt_source(tmp_path / "none")


def test_losses_and_masks_that_do_not_fit_are_refused():
    model = target_model()
    with pytest.raises(RuntimeError, match="model: no PEMT layer has run yet"):
        moelora_ops.task_sparsity_loss(model)
    model.eval()(**batch())
    with pytest.raises(RuntimeError, match="with sparsity=True has run in training mode"):
        moelora_ops.task_sparsity_loss(model)
    model.train()(**batch())
    for value in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="coefficient: wanted a finite number of at least 0"):
            moelora_ops.task_sparsity_loss(model, value)
    with pytest.raises(ValueError, match=r"attention_mask: wanted shape \[3, 11\], got \[3, 6\]"):
        moelora_ops.task_sparsity_loss(model, attention_mask=torch.ones(3, 6))
    with pytest.raises(ValueError, match="decoder_attention_mask: wanted shape"):
        moelora_ops.task_sparsity_loss(model, decoder_attention_mask=torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"attention_mask: wanted shape \[batch, 7\], without the"):
        model(**{**batch(), "attention_mask": torch.ones(3, 9)})
    # An encoder's output that is shorter than the prompt: not one that this encoder made.
    with pytest.raises(ValueError, match="encoder_states: wanted at least the prompt's 4 pos"):
        model(encoder_outputs=(torch.randn(3, 3, 16),), labels=batch()["labels"])


# The example.


@pytest.fixture
def example(monkeypatch):
    for package in ("matplotlib", "rich", "safetensors"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    import pemt_t5

    return pemt_t5


def test_the_examples_answers_are_right(example):
    for task in ("text", *example.PROPERTIES, "target"):
        words = {i: word for word, i in example.VOCABULARY.items()}
        for text, answer in example.make_examples(task, 50, seed=1):
            assert words[text[-1]] == words[answer[-1]] == "</s>"
            assert len(text) == example.LENGTH + 1 and len(answer) == 2
            said = words[answer[0]]
            if task == "text":
                assert [words[i] for i in text].count("<mask>") == 1
                known = [int(words[i][1:]) for i in text[:-1] if words[i] != "<mask>"]
                everyone = [*known, int(said[1:])]
                shared = [
                    len({example.value_of(w, name) for w in everyone}) for name in example.IN_TEXT
                ]
                assert 1 in shared
                continue
            name = "colour" if task == "target" else task
            values = [example.value_of(int(words[i][1:]), name) for i in text[:-1]]
            commonest = max(set(values), key=values.count)
            assert sum(values.count(v) == values.count(commonest) for v in set(values)) == 1
            want = ("yes" if commonest in example.WARM else "no") if task == "target" else commonest
            assert said == want


def test_the_whole_example_with_a_few_steps(example, monkeypatch, tmp_path, capsys):
    output = tmp_path / "new" / "folder"
    small = {
        "--width": 32, "--layers": 1, "--pretrain-steps": 3, "--source-steps": 2, "--steps": 2,
        "--seeds": 2, "--held-out": 20, "--rank": 2, "--batch": 4,
    }  # fmt: skip
    options = [str(word) for pair in small.items() for word in pair]
    monkeypatch.setattr(
        "sys.argv", ["pemt_t5", *options, "--shots", "2", "4", "--output", str(output)]
    )
    example.main()
    facts = json.loads((output / "report.json").read_text())
    rivals = [example.PEMT, example.ORACLE, example.LORA, example.FULL]
    assert list(facts["target"]) == list(facts["trained"]) == rivals
    assert all(len(seeds) == 2 for r in facts["target"].values() for seeds in r.values())
    assert list(facts["sources"]) == list(example.PROPERTIES)
    assert len(facts["weights"]) == 2
    assert all(sum(row) == pytest.approx(1, rel=1e-5) for row in facts["weights"].values())
    assert facts["trained"][example.PEMT] < facts["trained"][example.FULL]
    assert (output / "pemt.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    printed = capsys.readouterr().out
    for name in rivals:
        assert f"| {name} |" in (output / "report.md").read_text() and name in printed


def test_the_example_refuses_no_steps(example, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pemt_t5", "--steps", "0"])
    with pytest.raises(SystemExit):
        example.parse_arguments()
    assert "--steps: wanted at least 1, got 0" in capsys.readouterr().err
