"""The balance loss against its definition, under checkpointing and compile; the statistics."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import moelora_ops
from moelora_ops import MoLAConfig, models, reference
from moelora_ops.functional import Routing
from moelora_ops.nn import MoLALinear

MODES = {"plain": None, "non-reentrant": False, "reentrant": True}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up_proj = nn.Linear(width, 2 * width)
        self.down_proj = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down_proj(torch.tanh(self.up_proj(torch.tanh(x))))


class Toy(nn.Module):
    def __init__(self, depth=3, width=6):
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.checkpoint = None  # else the value of use_reentrant

    def forward(self, x):
        for block in self.layers:
            if self.checkpoint is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpoint)
        return x


def make(mode="plain", implementation="fused", dropout=0.0, num_experts=(2, 3, 5)):
    """The same float64 model for every mode, with random adapters."""
    torch.manual_seed(0)
    model = Toy(len(num_experts)).double()
    config = MoLAConfig(num_experts, rank=2, dropout=dropout)
    moelora_ops.apply(model, config, implementation=implementation)
    for parameter in models.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.5)
    model.checkpoint = MODES[mode]
    return model


def batch(seed=1, tokens=11):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, 6, dtype=torch.float64, generator=generator, requires_grad=True)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def by_definition(model, coefficient):
    """L_aux from the logits, stacked along the tokens layer by layer; gradients flow."""
    logits = {}

    def listen(layer):
        rows = logits.setdefault(layer.name.split(".")[1], [])
        return layer.module.register_forward_hook(
            lambda module, args, _y: rows.append(args[0] @ module.router.T)
        )

    hooks = [listen(layer) for layer in models.adapted_layers(model)]

    def loss(top_k):
        total = 0
        for rows in map(torch.cat, logits.values()):
            probs = rows.softmax(-1)
            chosen = torch.zeros_like(probs).scatter_(-1, probs.topk(top_k).indices, 1)
            total = total + rows.shape[-1] * (chosen.mean(0) / top_k * probs.mean(0)).sum()
        for hook in hooks:
            hook.remove()
        return coefficient * total

    return loss


@pytest.mark.parametrize("implementation", ["fused", "reference"])
def test_value_and_gradients_are_those_of_the_definition(implementation):
    model = make(implementation=implementation)
    x = batch()
    definition = by_definition(model, 0.3)
    y = model(x)
    wanted = definition(2)
    got = moelora_ops.aux_loss(model, 0.3)
    torch.testing.assert_close(got, wanted)
    parameters = [x, *models.adapter_parameters(model)]
    torch.testing.assert_close(
        torch.autograd.grad(y.square().mean() + got, parameters, retain_graph=True),
        torch.autograd.grad(y.square().mean() + wanted, parameters),
    )


def set_routing(layer, counts, prob_sums):
    layer.routing = Routing(torch.tensor(counts), torch.tensor(prob_sums))


def test_pools_layers_and_keeps_the_rest_apart():
    # Two modules of one layer are one pool; a module with another number of experts is its own, and
    # so is one outside the layers.
    model = Toy(1)
    block = model.layers[0]
    block.up_proj = MoLALinear(block.up_proj, 2, top_k=1)
    block.down_proj = MoLALinear(block.down_proj, 2, top_k=2)
    block.other = MoLALinear(nn.Linear(6, 6), 3, top_k=1)
    model.head = MoLALinear(nn.Linear(6, 6), 2, top_k=1)
    set_routing(block.up_proj, [8, 0], [6.0, 2.0])  # 8 tokens
    set_routing(block.down_proj, [4, 4], [1.0, 3.0])  # 4 tokens, 2 each
    set_routing(block.other, [4, 0, 0], [4.0, 0.0, 0.0])
    set_routing(model.head, [1, 3], [2.0, 2.0])
    model.eval()
    pooled = 2 * (12 / 16 * 7 / 12 + 4 / 16 * 5 / 12)
    wanted = 0.5 * (pooled + 3.0 + 1.0)
    torch.testing.assert_close(moelora_ops.aux_loss(model, 0.5), torch.tensor(wanted))

    model.head.routing = None  # has not run: left out
    torch.testing.assert_close(moelora_ops.aux_loss(model, 0.5), torch.tensor(wanted - 0.5))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("mode", ["non-reentrant", "reentrant"])
def test_gradients_under_checkpointing(mode, dropout):
    results = []
    for model in (make("plain", dropout=dropout), make(mode, dropout=dropout)):
        x = batch()
        torch.manual_seed(7)  # the dropout masks
        (model(x).square().mean() + moelora_ops.aux_loss(model, 0.3)).backward()
        results.append({"x": x.grad, **gradients(model)})
    assert all(g.abs().sum() > 0 for g in results[0].values())
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)


def test_checkpointed_gradients_differ_without_the_loss():
    # What the tests above would miss if the loss reached no router in either model.
    with_loss, without = make("reentrant"), make("reentrant")
    (with_loss(batch()).square().mean() + moelora_ops.aux_loss(with_loss, 0.3)).backward()
    without(batch()).square().mean().backward()
    for name, gradient in gradients(with_loss).items():
        if name.endswith("router"):
            assert (gradient - gradients(without)[name]).abs().max() > 1e-6


@pytest.mark.parametrize("mode", ["non-reentrant", "reentrant"])
def test_reference_layers_under_checkpointing(mode):
    model = make(mode, "reference")
    y = model(batch())
    if mode == "reentrant":
        with pytest.raises(RuntimeError, match=r"aux_loss: layers.0.up_proj is a reference layer"):
            moelora_ops.aux_loss(model)
        with torch.no_grad():
            moelora_ops.aux_loss(model)
        return
    (y.square().mean() + moelora_ops.aux_loss(model, 0.3)).backward()
    plain = make("plain", "reference")
    (plain(batch()).square().mean() + moelora_ops.aux_loss(plain, 0.3)).backward()
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("mode", ["non-reentrant", "reentrant"])
def test_a_transformers_model_under_its_own_checkpointing(mode):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    ids = torch.arange(22).reshape(2, 11) % 7
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).double().train()
        moelora_ops.apply(model, MoLAConfig("2468", rank=2, dropout=0.1))
        for parameter in models.adapter_parameters(model):
            nn.init.normal_(parameter, std=0.5)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": MODES[mode]})
            model.enable_input_require_grads()
        torch.manual_seed(7)
        loss = model(input_ids=ids, labels=ids).loss + moelora_ops.aux_loss(model, 0.3)
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(model)})
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the evaluation
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_and_evaluation_in_between(mode, at_once):
    """Accumulated gradients, one backward per batch or one for all; eval calls change nothing."""

    def evaluate(model):
        model.eval()
        with torch.no_grad():
            model(batch(9, tokens=4))
            assert not moelora_ops.aux_loss(model).requires_grad
        model.train()

    wanted = make()
    for seed in (1, 2, 3):
        (wanted(batch(seed)).square().mean() + moelora_ops.aux_loss(wanted, 0.3)).backward()

    model, losses = make(mode), []
    for seed in (1, 2, 3):
        y = model(batch(seed))
        losses.append(y.square().mean() + moelora_ops.aux_loss(model, 0.3))
        evaluate(model)
        if not at_once:
            losses.pop().backward()
    if losses:
        sum(losses).backward()
    torch.testing.assert_close(gradients(model), gradients(wanted), rtol=1e-12, atol=1e-14)
    assert all(layer.module.dprob_sums is None for layer in models.adapted_layers(model))


def test_the_loss_may_be_made_before_the_head_and_used_twice():
    # Its nodes then are older than the head's, and still younger than the layers'.
    results = []
    for mode in ("plain", "reentrant"):
        model = make(mode)
        y = model(batch())
        aux = moelora_ops.aux_loss(model, 0.3) + moelora_ops.aux_loss(model, 0.2)
        (y.tanh().exp().square().mean() * 2 + aux).backward()
        results.append(gradients(model))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("whole", [False, True])
def test_a_layer_called_twice_counts_with_its_last_call(whole):
    # Both calls in one checkpointed region, or in two.
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = make(num_experts=(3,)).layers[0]

        def both(self, x):
            return self.block(self.block(x))

        def forward(self, x, reentrant):
            if not reentrant:
                return self.both(x)
            if whole:
                return checkpoint(self.both, x, use_reentrant=True)
            for _ in range(2):
                x = checkpoint(self.block, x, use_reentrant=True)
            return x

    results = []
    for reentrant in (False, True):
        model = Twice()
        (model(batch(), reentrant).square().mean() + moelora_ops.aux_loss(model, 0.3)).backward()
        results.append(gradients(model))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)


def test_a_gradient_that_reaches_no_layer_is_an_error_and_leaves_nothing():
    model = make("reentrant")
    y = model(batch())
    with pytest.raises(RuntimeError, match="aux_loss: 6 layers ran without a graph"):
        moelora_ops.aux_loss(model).backward()
    assert all(layer.module.dprob_sums is None for layer in models.adapted_layers(model))
    y.square().mean().backward()  # and the next backward is not disturbed
    wanted = make()
    wanted(batch()).square().mean().backward()
    torch.testing.assert_close(gradients(model), gradients(wanted), rtol=1e-12, atol=1e-14)


def test_a_backward_that_fails_leaves_nothing_for_the_next():
    model, wanted = make("reentrant"), make()

    def fail(_gradient):
        raise ArithmeticError

    y = model(batch())
    hook = y.register_hook(fail)  # runs after the loss's node and before the layers
    with pytest.raises(ArithmeticError):
        (y.square().mean() + moelora_ops.aux_loss(model, 0.3)).backward()
    hook.remove()
    assert any(layer.module.dprob_sums is not None for layer in models.adapted_layers(model))
    for m in (model, wanted):
        m(batch()).square().mean().backward()
    torch.testing.assert_close(gradients(model), gradients(wanted), rtol=1e-12, atol=1e-14)


def test_frozen_routers_are_no_error():
    model = make("reentrant")
    for layer in models.adapted_layers(model):
        layer.module.router.requires_grad_(False)
    (model(batch()).square().mean() + moelora_ops.aux_loss(model)).backward()
    # Nothing that routes requires a gradient: no graph in the first layer, and rightly so.
    model.checkpoint = None
    with moelora_ops.use_backend("reference"):
        y = model(batch().detach())
    assert not model.layers[0].up_proj.routing.prob_sums.requires_grad
    (y.square().mean() + moelora_ops.aux_loss(model)).backward()


@pytest.mark.parametrize("mode", ["non-reentrant", "reentrant"])
def test_recomputation_does_not_keep_its_graph(mode):
    # layer.routing would hold the recomputed activations of every layer at once.
    model = make(mode)
    loss = model(batch()).square().mean() + moelora_ops.aux_loss(model)
    before = [layer.module.routing for layer in models.adapted_layers(model)]
    loss.backward()
    after = [layer.module.routing for layer in models.adapted_layers(model)]
    assert all(a is b for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("mode", ["plain", "non-reentrant", "reentrant"])
def test_compiled_layers(mode):
    """A compiled model, or compiled layers inside checkpoints."""
    model, wanted = make(mode, num_experts=(2, 3)), make(num_experts=(2, 3))
    torch._dynamo.reset()
    if mode == "plain":
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    else:
        compiled = model
        for block in model.layers:
            block.compile(backend="aot_eager")
    for _ in range(2):
        results = []
        for m, call in ((model, compiled), (wanted, wanted)):
            m.zero_grad()
            loss = call(batch()).square().mean() + moelora_ops.aux_loss(m, 0.3)
            loss.backward()
            results.append({"loss": loss.detach(), **gradients(m)})
        torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


def test_a_whole_compiled_step():
    model, wanted = make(num_experts=(2, 3)), make(num_experts=(2, 3))

    def step(model, x):
        return model(x).square().mean() + moelora_ops.aux_loss(model, 0.3)

    torch._dynamo.reset()
    torch.compile(step, backend="aot_eager", fullgraph=True)(model, batch()).backward()
    step(wanted, batch()).backward()
    torch.testing.assert_close(gradients(model), gradients(wanted), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_no_tokens(mode):
    model = make(mode)
    x = batch(tokens=0)
    loss = model(x).sum() + moelora_ops.aux_loss(model)
    assert loss.item() == 0
    loss.backward()
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(model).values())
    for stats in moelora_ops.routing_stats(model).values():
        assert (stats.tokens, stats.entropy, stats.used) == (0, 0.0, 0)
        assert stats.share.sum() == 0 and stats.probability.sum() == 0


def test_value_in_evaluation():
    model = make().eval()
    with torch.no_grad():
        model(batch())
        value = moelora_ops.aux_loss(model, 0.3)
    # Out of no_grad a model in eval mode has no gradient to deliver either.
    again = moelora_ops.aux_loss(model, 0.3)
    assert not again.requires_grad and torch.equal(again, value) and value.item() >= 0.3
    assert moelora_ops.aux_loss(model, 0.0) == 0


def test_statistics():
    model = Toy(2)
    block = model.layers[0]
    block.up_proj = MoLALinear(block.up_proj, 4, top_k=2)
    block.down_proj = reference.MoLALinear(block.down_proj, 1, top_k=1)
    set_routing(block.up_proj, [6, 6, 0, 0], [3.0, 1.5, 1.5, 0.0])
    set_routing(block.down_proj, [5], [5.0])
    stats = moelora_ops.routing_stats(model)
    assert list(stats) == ["layers.0.up_proj", "layers.0.down_proj"]
    collapsed = stats["layers.0.up_proj"]
    assert (collapsed.tokens, collapsed.used) == (6, 2)
    assert collapsed.share.tolist() == [0.5, 0.5, 0, 0]
    assert collapsed.probability.tolist() == [0.5, 0.25, 0.25, 0]
    assert collapsed.entropy == pytest.approx(math.log(2) / math.log(4))
    assert stats["layers.0.down_proj"][3:] == (1.0, 1)


@pytest.mark.parametrize("implementation", ["fused", "reference"])
def test_statistics_of_a_call(implementation):
    model = make(implementation=implementation)
    model(batch(tokens=11))
    for layer in models.adapted_layers(model):
        stats = moelora_ops.routing_stats(model)[layer.name]
        assert stats.tokens == 11
        for part in (stats.share, stats.probability):
            assert part.shape == (layer.module.num_experts,) and not part.requires_grad
            assert part.sum().item() == pytest.approx(1)


def test_a_single_layer_is_a_model():
    layer = MoLALinear(nn.Linear(6, 5), num_experts=3, rank=2)
    layer(torch.randn(7, 6))
    share = layer.routing.counts / layer.routing.counts.sum()
    want = 3 * (share * layer.routing.prob_sums / 7).sum()
    torch.testing.assert_close(moelora_ops.aux_loss(layer, 1.0), want)


@pytest.mark.parametrize("function", [moelora_ops.aux_loss, moelora_ops.routing_stats])
def test_models_without_routing(function):
    with pytest.raises(RuntimeError, match="model: has no layers with routed experts"):
        function(Toy())
    with pytest.raises(RuntimeError, match="model: no adapted layer has run yet"):
        function(make())
    with pytest.raises(TypeError, match=r"model: wanted a torch.nn.Module, got int"):
        function(3)


@pytest.mark.parametrize("coefficient", [-0.1, float("nan"), float("inf"), None, "1"])
def test_bad_coefficients(coefficient):
    with pytest.raises(ValueError, match="coefficient: wanted a finite number of at least 0"):
        moelora_ops.aux_loss(make(), coefficient)
