"""What layers keep between calls, and who may change what they compute with."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import moelora_ops
from moelora_ops.backends import extension
from moelora_ops.nn import LoRALinear, MoLALinear, MoLELinear, PEMTLinear, SharedGate

K, N, RANK = 24, 16, 3
LOW = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}


def experts(biases=False):
    more = (lambda: (torch.randn(RANK), torch.randn(N))) if biases else tuple
    return [(torch.randn(RANK, K), torch.randn(N, RANK), 1.0, *more()) for _ in range(3)]


def pemt(biases=False):
    layer = PEMTLinear(
        nn.Linear(K, N), experts(biases), gate_query="input", prompt_length=2, bottleneck=4,
        activation="gelu_tanh" if biases else None,
    )  # fmt: skip
    nn.init.normal_(layer.gate)
    return layer


def mole(granularity="token", **options):
    layer = MoLELinear(nn.Linear(K, N), experts(), granularity, **options)
    if layer.gated:
        nn.init.normal_(layer.gate)
    return layer


def shared(granularity="token", followers=0):
    """A SharedGate with two leaders, and its layers."""
    layers = [mole(granularity, gated=False) for _ in range(2 + followers)]
    names = [f"layer{i}" for i in range(len(layers))]
    gate = SharedGate(names[:2], names[2:], [N] * 2, [RANK] * 2, 3, granularity)
    nn.init.normal_(gate.gate)
    gate.connect(layers[:2], layers[2:])
    return gate, layers


def inputs(*shape):
    return torch.randn(*(shape or (2, 5)), K)


LAYERS = {
    "lora": lambda: LoRALinear(nn.Linear(K, N)),
    "mola": lambda: MoLALinear(nn.Linear(K, N), num_experts=3, rank=RANK, top_k=2),
    "mole": mole,
    "mole-sequence": lambda: mole("sequence"),
    "pemt": pemt,
    "pemt-adapters": lambda: pemt(True),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    layer = LAYERS[request.param]()
    if hasattr(layer, "lora_up") and isinstance(layer.lora_up, nn.Parameter):
        nn.init.normal_(layer.lora_up)
    return layer


# ---------------------------------------------------------------- what was kept


@pytest.mark.parametrize("granularity", ("token", "sequence"))
def test_a_fused_optimiser_is_noticed(granularity):
    """It does not raise the version of what it changes."""
    layer, x = mole(granularity), inputs()
    optimiser = torch.optim.AdamW([layer.gate], lr=0.3, fused=True)
    with torch.no_grad():
        before = layer(x)
    layer(x).square().sum().backward()
    optimiser.step()
    with torch.no_grad():
        after = layer(x)
    torch.testing.assert_close(after, layer(x).detach())
    assert not torch.allclose(after, before)


def test_experts_frozen_after_a_fused_optimiser():
    layer, x = pemt(True), inputs()
    layer.requires_grad_(True)
    optimiser = torch.optim.SGD([layer.lora_up, layer.up_bias], lr=1.0, fused=True)
    layer(x).square().sum().backward()
    optimiser.step()
    layer.requires_grad_(False)
    torch.testing.assert_close(layer.train()(x), layer.eval()(x))


def test_training_after_inference_mode(layer):
    """What was kept then can be saved for a backward now."""
    x, alike = inputs(), copy.deepcopy(layer)
    with torch.inference_mode():
        layer(x)
    torch.manual_seed(0)
    y = layer(x)
    y.sum().backward()
    torch.manual_seed(0)
    assert torch.equal(y, alike(x))


def test_a_shared_gate_trains_after_inference_mode():
    _, layers = shared()
    x = inputs()
    with torch.inference_mode():
        [layer(x) for layer in layers]
    sum(layer(x).sum() for layer in layers).backward()


@pytest.mark.parametrize("make", (pemt, mole), ids=("pemt", "mole"))
def test_a_layer_made_in_inference_mode(make):
    with torch.inference_mode():
        layer = make()
        assert layer(inputs()).shape == (2, 5, N)
        assert layer(inputs()).shape == (2, 5, N)


def test_other_experts_of_the_same_version():
    layer, x = mole(), inputs()
    for _ in range(2):
        up = torch.randn_like(layer.lora_up)
        alike = copy.deepcopy(layer)
        alike.lora_up = up
        y = torch.func.functional_call(layer, {"lora_up": up}, (x,))
        torch.testing.assert_close(y, alike(x))


CHANGES = {
    "mask": lambda gate, x: setattr(gate, "expert_mask", [True, False, True]),
    "gate": lambda gate, x: gate.gate.mul_(-2),
    "temperature": lambda gate, x: gate.log_tau.add_(1),
    "x": lambda gate, x: x.mul_(-1.7),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_shared_gate_sees_what_changed(change):
    """Its second leader gets the same tensor, but not the same function of it."""
    gate, (first, second) = shared()
    x = inputs()
    first(x)
    CHANGES[change](gate, x)
    got = second(x)
    torch.testing.assert_close(got, second(x.clone()))


# ---------------------------------------------------------------- changes in place


def test_the_output_can_be_changed_in_place(layer):
    x, residual = inputs(), torch.randn(2, 5, N)
    want = torch.relu(layer(x) + residual)
    y = layer(x)
    y += residual
    y = F.relu(y, inplace=True)
    y.sum().backward()
    torch.testing.assert_close(y, want)


def test_experts_changed_before_the_backward_are_refused():
    layer, x = pemt(), inputs().requires_grad_()
    layer(x)
    loss = layer.agreement.cosines.sum()
    with torch.no_grad():
        layer.lora_down.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("choice", ("auto", "library"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("training", (True, False))
def test_selective_checkpointing(layer, training, bias, dtype, choice):
    """It keeps products of the forward pass; what we add to them must not be added twice."""
    if not bias:
        layer.base.bias = None
    layer = layer.to(dtype).train(training)
    products = [torch.ops.aten.addmm.default, torch.ops.aten.mm.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, products)

    def gradient(checkpointed):
        x = torch.ones(2, 5, K, dtype=dtype).mul_(0.3).requires_grad_()

        def block(x):
            return torch.tanh(layer(x))

        y = checkpoint(block, x, use_reentrant=False, context_fn=contexts) if checkpointed else None
        y = block(x) if y is None else y
        y.square().sum().backward()
        return x.grad

    with extension.use_linear(choice):
        want, got = gradient(False), gradient(True)
    tolerance = 4 * torch.finfo(dtype).eps ** 0.5 if dtype != torch.bfloat16 else 0.05
    assert (got - want).norm() <= tolerance * want.norm()


# ---------------------------------------------------------------- bases


def test_a_base_with_a_forward_of_its_own(layer):
    """As accelerate's hooks are put on it."""
    calls, forward, x = [], layer.base.forward, inputs()
    torch.manual_seed(0)
    want = layer(x)
    layer.base.forward = lambda x: (calls.append(1), forward(x))[1]
    torch.manual_seed(0)
    torch.testing.assert_close(layer(x), want)
    assert calls


def test_a_base_that_is_offloaded():
    accelerate = pytest.importorskip("accelerate")
    layer, x = LoRALinear(nn.Linear(K, N)), inputs()
    want = layer(x)
    accelerate.cpu_offload(nn.Sequential(layer.base), execution_device="cpu")
    assert layer.base.weight.is_meta
    torch.testing.assert_close(layer(x), want)


# ---------------------------------------------------------------- compiled


def compiled(module, backend="aot_eager", **options):
    torch._dynamo.reset()
    return torch.compile(module, backend=backend, **options)


@pytest.mark.parametrize("kind", ("pemt", "pemt-adapters", "mole", "mole-sequence"))
def test_a_compiled_layer_is_called_again(kind):
    """With other lengths, in evaluation and back, and after its experts have changed."""
    layer = LAYERS[kind]()
    alike = copy.deepcopy(layer)  # which runs as it is: the compiled one never does
    function = compiled(layer, fullgraph=True, dynamic=True)

    def compare(length):
        x = inputs(2, length)
        torch.testing.assert_close(function(x), alike(x))
        if kind.startswith("pemt") and layer.training:
            got, want = layer.agreement.cosines, alike.agreement.cosines
            torch.testing.assert_close(got, want)

    for length in (5, 5, 7, 9, 9):
        compare(length)
    for training in (False, True):
        layer.train(training), alike.train(training)
        compare(9), compare(9)
    for module in (layer, alike):
        state = {n: t if t.dtype == torch.bool else 2 * t for n, t in module.state_dict().items()}
        module.load_state_dict(state)
    compare(9), compare(5)


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_two_compiled_layers_train(backend):
    def square():
        loras = [(torch.randn(RANK, K), torch.randn(K, RANK), 1.0) for _ in range(2)]
        return PEMTLinear(nn.Linear(K, K), loras, gate_query="input", prompt_length=2)

    model = nn.Sequential(square(), square())
    alike, x = copy.deepcopy(model), inputs()
    function = compiled(model, backend)
    for _ in range(3):
        function(x).square().sum().backward()
        alike(x).square().sum().backward()
    for got, want in zip(model, alike, strict=True):
        torch.testing.assert_close(got.gate.grad, want.gate.grad)


# ---------------------------------------------------------------- autocast


@pytest.mark.parametrize("low", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("choice", ("auto", "library"))
def test_backward_inside_autocast(layer, low, choice):
    """Of a forward pass that was outside: autocast leaves our products alone."""
    x, gradients = inputs(), []
    for inside in (False, True):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(0)
        with extension.use_linear(choice):
            y = layer(leaf)
        with torch.autocast("cpu", low, enabled=inside):
            y.backward(torch.ones_like(y))
        trained = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
        gradients.append([leaf.grad, *trained])
    if isinstance(layer, (LoRALinear, MoLALinear)):
        assert all(map(torch.equal, *gradients))
    for outside, inside in zip(*gradients, strict=True):  # of a gate, PyTorch's may be rounded
        assert inside.dtype == outside.dtype
        assert (inside - outside).norm() <= 0.05 * outside.norm()


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_autocast_to_the_other_16_bits(layer, dtype):
    layer, x = layer.to(dtype), inputs().to(dtype)
    with torch.autocast("cpu", LOW[dtype]):
        y = layer(x)
    y.float().sum().backward()
    assert y.isfinite().all()


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_router_continues_in_the_other_16_bits(dtype):
    router = moelora_ops.nn.TaskRouter(K, 3, causal=True).to(dtype)
    x = inputs().to(dtype)
    with torch.autocast("cpu", LOW[dtype]):
        _, past = router.extend(x)
        tasks, _ = router.extend(x, None, past)
    assert tasks.shape == (2, 5, 3)


# ---------------------------------------------------------------- what fits and what does not


@pytest.mark.parametrize("kind", ("pemt", "shared"))
def test_an_x_of_another_dtype_is_named(kind):
    layer = pemt() if kind == "pemt" else shared()[1][0]
    with pytest.raises(TypeError, match=r"x: wanted dtype torch.float32 like lora_down, got"):
        layer(inputs().double())


@pytest.mark.parametrize("bottleneck", (4, None))
def test_a_residual_in_another_dtype(bottleneck):
    """It is added in the layer's, as the reference layer's output is."""
    layer = PEMTLinear(
        nn.Linear(K, N), experts(True), activation="gelu_tanh", residual=True,
        bottleneck=bottleneck, gate_query="input", prompt_length=2,
    ).bfloat16()  # fmt: skip
    f = layer(inputs().bfloat16(), ffn_input=torch.randn(2, 5, N))
    assert f.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", ((5,), (2, 5), (2, 3, 5)), ids=str)
def test_followers_of_a_gate_per_sequence(shape):
    _, layers = shared("sequence", followers=1)
    x = inputs(*shape)
    got = [layer(x) for layer in layers]
    batched = x.reshape(-1, shape[-1], K)
    want = [layer(batched).reshape(*shape, N) for layer in layers]
    torch.testing.assert_close(got, want)
