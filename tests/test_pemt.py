"""PEMT's layers: the fused against the literal ones, these against numpy."""

import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import moelora_ops
from moelora_ops import reference
from moelora_ops.bench.numerics import check_numerics
from moelora_ops.functional import expert_cosines
from moelora_ops.nn import PEMTAdapter, PEMTLinear, PEMTSourceLinear

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


@pytest.mark.parametrize("gate_query", ["input", "encoder"])
@pytest.mark.parametrize("kind", KINDS)
def test_fused_layer_is_the_literal_one(kind, gate_query, backend):
    literal = make_layer(reference.PEMTLinear, kind, gate_query)
    fused = PEMTLinear.from_reference(literal)
    inputs = make_call(literal, kind, gate_query)
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
    _, cosines = expert_cosines(f, hidden, *fused._frozen_outputs())
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


@pytest.mark.parametrize(
    ("gate_query", "sparsity"), [("input", False), ("encoder", True), ("encoder", False)]
)
def test_the_layer_compiles_whole_with_less_to_read_off_x(gate_query, sparsity):
    layer = make_layer(gate_query=gate_query, sparsity=sparsity, dtype=torch.float32)
    inputs = make_call(layer, gate_query=gate_query, dtype=torch.float32)
    results = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        f = call(**inputs)
        loss = f.square().sum()
        if sparsity:
            loss = loss + 3 * reference.task_sparsity(layer.agreement)
        results.append((f.detach(), *torch.autograd.grad(loss, (inputs["x"], layer.gate))))
    torch.testing.assert_close(*results)


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


# Bad input.


def test_nothing_is_kept_of_trained_experts():
    """FSDP2 gathers parameters anew into the same memory, and no version says so."""
    layer = make_layer().train()
    layer.lora_up.requires_grad_()
    inputs = make_call(layer)
    layer(**inputs)
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(layer.lora_up):
        layer.lora_up.normal_()
    fresh = copy.deepcopy(layer)  # copies keep nothing
    for x in (layer, fresh):
        x(**inputs)
    assert torch.equal(layer.agreement.cosines, fresh.agreement.cosines)


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


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_with_a_low_x_and_float32_parameters(kind):
    """What a feed-forward's W_o gets under autocast: x is low already, the layer is not."""
    layer = make_layer(kind=kind, dtype=torch.float32)
    inputs = make_call(layer, kind, dtype=torch.float32)
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        x = inputs["x"].detach().bfloat16().to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            f = layer(**inputs | {"x": x})
            loss = f.float().square().mean() + reference.task_sparsity(layer.agreement)
        loss.backward()
        assert x.grad.dtype == dtype
        gradients.append(x.grad.float())
    low, wide = gradients
    assert (low - wide).norm() < 2**-7 * wide.norm()
