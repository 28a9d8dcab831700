"""OrchMoE, Polytropon, MHR and C-Poly: layers, task router, whole models, PEFT's Poly layers."""

import contextlib
import copy
import io
import json
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import moelora_ops
from moelora_ops import OrchMoEConfig, PolytroponConfig, reference
from moelora_ops.models import adapter_parameters
from moelora_ops.nn import OrchMoELinear, PolytroponLinear, TaskRouter, TaskRouters

K, N, SKILLS, TASKS, RANK = 12, 18, 3, 4, 2


def randomize(module):
    """Every parameter that an adapter has, drawn anew: nothing is zero or symmetric any more."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    return module


KINDS = {
    "sum": (OrchMoELinear, {"combine": "sum"}),
    "average": (OrchMoELinear, {"combine": "average"}),
    "polytropon": (PolytroponLinear, {}),
    "mhr": (PolytroponLinear, {"splits": 3}),
    "c-poly": (PolytroponLinear, {"private": "matrix"}),
    "c-poly-simple": (PolytroponLinear, {"private": "simple", "splits": 2}),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def make_layer(kind, dtype=torch.float64):
    cls, options = KINDS[kind]
    torch.manual_seed(0)
    return randomize(cls(nn.Linear(K, N), SKILLS, TASKS, RANK, **options)).to(dtype)


def make_tasks(form, batch=3, length=5):
    if form == "ids":
        return torch.tensor([2, 0, 2])[:batch]
    shape = (batch, TASKS) if form == "sequence" else (batch, length, TASKS)
    return torch.randn(shape, dtype=torch.float64).softmax(-1)


forms = pytest.mark.parametrize("form", ("ids", "sequence", "token"))


# ---- layers ----


@kinds
def test_same_constructor_and_state_dict_as_the_reference(kind):
    cls, options = KINDS[kind]
    literal = getattr(reference, cls.__name__)(nn.Linear(K, N), SKILLS, TASKS, RANK, **options)
    fused = cls(nn.Linear(K, N), SKILLS, TASKS, RANK, **options)
    assert fused.state_dict().keys() == literal.state_dict().keys()
    literal.load_state_dict(fused.state_dict())
    shared = cls.from_reference(literal.eval())
    assert shared.lora_up is literal.lora_up and shared.base is literal.base and not shared.training
    assert all(getattr(shared, name) == getattr(literal, name) for name in cls.arguments)


@kinds
def test_starts_equal_to_its_base_with_nearly_even_weights(kind):
    cls, options = KINDS[kind]
    layer = cls(nn.Linear(K, N), SKILLS, TASKS, RANK, **options).eval()
    x = torch.randn(3, 5, K)
    torch.testing.assert_close(layer(x, torch.tensor([0, 3, 1])), layer.base(x))
    shared = layer.skill_weights(torch.tensor([1]))[..., :SKILLS]
    torch.testing.assert_close(shared, torch.full_like(shared, 1 / SKILLS), rtol=1e-3, atol=0)
    bound = 1 / math.sqrt(K // layer.splits)
    assert 0.8 * bound < layer.lora_down.abs().max() <= bound


@kinds
@forms
@pytest.mark.parametrize("training", (False, True))
def test_output_and_gradients_are_the_references(kind, form, training, backend):
    fused = make_layer(kind).train(training)
    cls = getattr(reference, type(fused).__name__)
    arguments = {name: getattr(fused, name) for name in fused.arguments}
    literal = cls(copy.deepcopy(fused.base), **arguments).train(training)
    literal.load_state_dict(fused.state_dict())
    x, tasks = torch.randn(3, 5, K, dtype=torch.float64), make_tasks(form)
    results = []
    for layer in (fused, literal):
        inputs = [x.clone().requires_grad_()]
        given = tasks.clone()
        if form != "ids":
            inputs.append(given.requires_grad_())
        inputs += [p for p in layer.parameters() if p.requires_grad]
        torch.manual_seed(7)
        y = layer(inputs[0], given)
        results.append([y, *torch.autograd.grad(y.sin().sum(), inputs)])
    assert len(results[0]) == len(results[1]) >= 5
    for got, want in zip(*results, strict=True):
        assert want.abs().max() > 1e-6
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_weights_in_numpy():
    """The formulas of the sources, spelled out for one example at a time."""

    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    for kind in KINDS:
        layer = make_layer(kind).eval()
        logits = layer.skill_logits.detach().numpy()
        tau = make_tasks("sequence")
        private = None
        if getattr(layer, "private", None):
            private = np.eye(TASKS)
            if layer.private == "matrix":
                private = layer.private_weights.detach().numpy()
        for tasks in (make_tasks("ids"), tau):
            got = layer.skill_weights(tasks).detach().numpy()
            for b, task in enumerate(tasks.numpy()):
                for q in range(layer.splits):
                    rows = sigmoid(logits[:, q])
                    rows = rows / (rows.sum(1, keepdims=True) + 1e-12)
                    if private is not None:
                        rows = np.concatenate([rows, private], 1)
                    want = task @ rows if task.ndim else rows[task]
                    place = got[b] if layer.splits == 1 else got[b, q]
                    np.testing.assert_allclose(place, want, rtol=1e-12)


def test_the_noise_is_a_relaxed_bernoulli():
    layer = OrchMoELinear(nn.Linear(2, 2), 2, 1).train()
    with torch.no_grad():
        layer.skill_logits.copy_(torch.tensor([[[1.0, -40.0]]]))
    torch.manual_seed(0)
    ids = torch.zeros(40000, dtype=torch.long)
    weights = layer.skill_weights(ids)  # the second skill is off, so this is z / z but for rounding
    torch.testing.assert_close(weights[:, 0], torch.ones(40000))
    with torch.no_grad():
        layer.skill_logits.copy_(torch.tensor([[[0.7, 0.7]]]))
    share = layer.skill_weights(ids)[:, 0]
    assert share.std() > 0.15  # every example has noise of its own
    assert share.mean().item() == pytest.approx(0.5, abs=0.005)
    # P(z > 1/2) = σ(logit), whence the moments of the ratio; the sampler itself, in the reference:
    z = reference.gumbel_sigmoid(torch.tensor(0.7), torch.rand(40000))
    assert (z > 0.5).float().mean().item() == pytest.approx(1 / (1 + math.exp(-0.7)), abs=0.01)


def test_one_hot_probabilities_are_ids(backend):
    for kind in KINDS:
        layer = make_layer(kind).eval()
        ids = make_tasks("ids")
        x = torch.randn(3, 5, K, dtype=torch.float64)
        one_hot = nn.functional.one_hot(ids, TASKS).double()
        torch.testing.assert_close(layer(x, one_hot), layer(x, ids))
        torch.testing.assert_close(layer(x, one_hot[:, None].expand(-1, 5, -1)), layer(x, ids))


def test_tokens_may_be_flat_with_tasks_per_token(backend):
    layer = make_layer("average").eval()
    x, tasks = torch.randn(3, 5, K, dtype=torch.float64), make_tasks("token")
    want = layer(x, tasks)
    torch.testing.assert_close(layer(x.flatten(0, 1), tasks).view_as(want), want)
    torch.testing.assert_close(layer(x[:, 0], tasks[:, 0]), want[:, 0])
    with pytest.raises(ValueError, match=r"tasks: wanted one per sequence .*\[15, 12\], got \[3\]"):
        layer(x.flatten(0, 1), tasks[:, 0])


def test_one_hot_weights_are_that_lora(backend):
    x = torch.randn(3, 5, K, dtype=torch.float64)
    for kind in ("sum", "average", "polytropon", "c-poly"):
        layer = make_layer(kind)
        for e in range(len(layer.lora_down)):
            weights = nn.functional.one_hot(torch.full((3,), e), len(layer.lora_down)).double()
            lora = x @ layer.lora_down[e].T @ layer.lora_up[e]
            want = layer.base(x) + layer.alpha / RANK * lora
            torch.testing.assert_close(layer(x, weights=weights), want)


def test_sum_and_average_differ_and_average_merges_per_example(backend):
    layer = make_layer("average").eval()
    x, ids = torch.randn(3, 5, K, dtype=torch.float64), make_tasks("ids")
    y, weights = layer(x, ids), layer.skill_weights(ids)
    for b in range(3):
        down = torch.tensordot(weights[b], layer.lora_down, 1)
        up = torch.tensordot(weights[b], layer.lora_up, 1)
        merged = layer.base.weight + layer.alpha / RANK * up.T @ down
        torch.testing.assert_close(y[b], x[b] @ merged.T + layer.base.bias)
    other = OrchMoELinear(layer.base, SKILLS, TASKS, RANK, combine="sum").double().eval()
    other.load_state_dict(layer.state_dict())
    assert (other(x, ids) - y).abs().max() > 0.1


def test_bfloat16_keeps_the_weights_wide_and_autocast_too(backend):
    layer = make_layer("sum", torch.bfloat16).eval()
    tasks = make_tasks("sequence").float()
    weights = layer.skill_weights(tasks)
    assert weights.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.skill_weights(tasks), weights)
        assert layer.float()(torch.randn(3, 5, K), tasks).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", ((0, 5), (3, 0)))
def test_nothing_in_nothing_out(shape, backend):
    x = torch.randn(*shape, K)
    ids = torch.zeros(shape[0], dtype=torch.int32)
    for kind in KINDS:
        layer = make_layer(kind, torch.float32)
        for tasks in (ids, torch.rand(shape[0], TASKS), torch.rand(*shape, TASKS)):
            assert layer(x, tasks).shape == (*shape, N)
    for causal in (False, True):
        tasks = TaskRouter(K, TASKS, causal)(x, torch.ones(shape))
        assert tasks.shape == ((*shape, TASKS) if causal else (shape[0], TASKS))
        assert tasks.isfinite().all()


@pytest.mark.parametrize(
    "error, message, tasks",
    [
        (RuntimeError, "tasks: wanted ids or probabilities", None),
        (TypeError, "tasks: wanted a tensor, got list", [0, 1, 2]),
        (TypeError, "tasks: wanted an integer dtype, got torch.bool", torch.ones(3).bool()),
        (ValueError, r"tasks: wanted task ids in 0\.\.3, got 4", torch.tensor([0, 4, 1])),
        (ValueError, r"tasks: wanted task ids in 0\.\.3, got -1", torch.tensor([0, 3, -1])),
        (ValueError, r"tasks: wanted ids of shape \[batch\]", torch.zeros(3, 5).long()),
        (ValueError, r"tasks: wanted one per sequence or token of x \[3, 5, 12\], got \[2\]",
         torch.tensor([0, 1])),
        (ValueError, r"got \[4\]", torch.rand(4, TASKS)),
        (ValueError, r"got \[3, 6\]", torch.rand(3, 6, TASKS)),
        (ValueError, r"tasks: wanted probabilities of shape \[batch, 4\].*got \[3, 5\]",
         torch.rand(3, 5)),
    ],
)  # fmt: skip
def test_bad_tasks(error, message, tasks):
    layer = make_layer("sum", torch.float32)
    with pytest.raises(error, match=message):
        layer(torch.randn(3, 5, K), tasks)


def test_bad_weights():
    layer = make_layer("mhr", torch.float32)
    x = torch.randn(3, 5, K)
    with pytest.raises(ValueError, match="weights: replaces tasks"):
        layer(x, torch.tensor([0, 1, 2]), weights=torch.rand(3, 3, SKILLS))
    with pytest.raises(ValueError, match=r"weights: wanted shape .*\[3, 3, 3\] \(per seq"):
        layer(x, weights=torch.rand(3, SKILLS))
    with pytest.raises(ValueError, match="weights: wanted shape"):
        layer(x, weights=torch.rand(2, 3, SKILLS))


@pytest.mark.parametrize(
    "cls, options, message",
    [
        (OrchMoELinear, {"num_skills": 0}, "num_skills: wanted an int of at least 1"),
        (OrchMoELinear, {"num_tasks": True}, "num_tasks: wanted an int"),
        (OrchMoELinear, {"rank": 2.0}, "rank: wanted an int"),
        (OrchMoELinear, {"alpha": math.nan}, "alpha: wanted a finite number"),
        (OrchMoELinear, {"combine": "mean"}, "combine: wanted one of"),
        (PolytroponLinear, {"splits": 0}, "splits: wanted an int of at least 1"),
        (PolytroponLinear, {"splits": 4}, "splits: wanted a divisor of out_features=18, got 4"),
        (PolytroponLinear, {"splits": 9}, "splits: wanted a divisor of in_features=12, got 9"),
        (PolytroponLinear, {"private": "shared"}, "private: wanted one of"),
    ],
)
def test_bad_constructor_arguments(cls, options, message):
    arguments = {"num_skills": SKILLS, "num_tasks": TASKS, **options}
    with pytest.raises(ValueError, match=message):
        cls(nn.Linear(K, N), **arguments)


# ---- the task router ----


def make_router(causal, dtype=torch.float64, normalize=True):
    torch.manual_seed(0)
    router = TaskRouter(6, TASKS, causal, normalize).to(dtype)
    nn.init.normal_(router.weight)
    return router


MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0]])


def test_the_router_by_hand():
    # X is the identity, so X Xᵀ/√2 is 1/√2 between a token and itself, and 0 otherwise.
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    p = math.exp(1 / math.sqrt(2)) / (math.exp(1 / math.sqrt(2)) + 1)
    # X̂ = ((1 + p, 1 - p), (1 - p, 1 + p)), whose mean is (1, 1); b = 0 and W = ((1, 0), (0, 3)).
    router = TaskRouter(2, 2, normalize=False).double()
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        router.bias.zero_()
    want = torch.tensor([[1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))]], dtype=torch.float64)
    torch.testing.assert_close(router(x), want)
    # causal: the first token sees itself alone, X̂ = 2x; at the second the mean of 2x and (1-p, 1+p)
    router.causal = True
    second = torch.tensor([(2 + 1 - p) / 2, 3 * (1 + p) / 2], dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(router(x)[0, 1], second)
    first = torch.tensor([2.0, 0.0], dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(router(x)[0, 0], first)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("mask", (None, MASK, MASK.bool()), ids=("none", "int", "bool"))
@pytest.mark.parametrize("normalize", (False, True))
def test_the_router_is_the_literal_one(causal, mask, normalize):
    router = make_router(causal, normalize=normalize)
    x = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    inputs = (x, router.weight, router.bias)
    got = router(x, mask)
    want = reference.task_router(*inputs, mask, causal, normalize)
    torch.testing.assert_close(got, want)
    dy = torch.randn_like(got)
    for g, w in zip(
        torch.autograd.grad(got, inputs, dy), torch.autograd.grad(want, inputs, dy), strict=True
    ):
        torch.testing.assert_close(g, w)


def test_normalized_routers_see_directions_and_no_giants():
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    giant = x.clone()
    giant[:, 0] *= 1e4
    torch.testing.assert_close(make_router(False)(giant), make_router(False)(x), rtol=1e-4, atol=0)
    literal = make_router(False, normalize=False)
    assert literal(giant).max(-1).values.min() > 0.999 and literal(x).max() < 0.999


def test_padding_changes_nothing_wherever_it_is():
    x = torch.randn(1, 3, 6, dtype=torch.float64)
    junk = torch.full((1, 2, 6), 1e6, dtype=torch.float64)
    for causal in (False, True):
        router = make_router(causal)
        want = router(x)
        left = router(torch.cat([junk, x], 1), torch.tensor([[0, 0, 1, 1, 1]]))
        right = router(torch.cat([x, junk], 1), torch.tensor([[1, 1, 1, 0, 0]]))
        torch.testing.assert_close(left[:, 2:] if causal else left, want)
        torch.testing.assert_close(right[:, :3] if causal else right, want)


def test_causal_means_that_the_future_is_unseen():
    router = make_router(True)
    x = torch.randn(2, 6, 6, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(router(x)[:, 2].sin().sum(), x)
    assert dx[:, :3].abs().min() > 0 and not dx[:, 3:].any()


def test_the_router_extends_a_past():
    router = make_router(True)
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 1, 1]])
    want = router(x, mask)
    tasks, past = [], (x[:, :0], x[:, :0])
    for begin, end in ((0, 3), (3, 4), (4, 7)):
        found, new = router.extend(x[:, begin:end], mask[:, :end], past)
        tasks.append(found)
        past = [torch.cat(pair, 1) for pair in zip(past, new, strict=True)]
    torch.testing.assert_close(torch.cat(tasks, 1), want)


def test_the_router_in_bfloat16():
    router = make_router(False, torch.bfloat16)
    x = torch.randn(3, 7, 6).bfloat16()
    tasks = router(x)
    assert tasks.dtype == torch.float32
    parameters = (router.weight.double(), router.bias.double())
    want = reference.task_router(x.double(), *parameters, normalize=True)
    torch.testing.assert_close(tasks.double(), want, rtol=0, atol=0.03)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(x), tasks)


def test_bad_router_input():
    router = TaskRouter(6, TASKS)
    with pytest.raises(ValueError, match=r"x: wanted shape \[batch, length, 6\], got \[2, 3, 5\]"):
        router(torch.randn(2, 3, 5))
    with pytest.raises(ValueError, match=r"mask: wanted shape \[2, 3\], got \[2, 4\]"):
        router(torch.randn(2, 3, 6), torch.ones(2, 4))
    with pytest.raises(ValueError, match="num_tasks: wanted an int of at least 1, got 0"):
        TaskRouter(6, 0)
    with pytest.raises(TypeError, match="causal: wanted a bool, got 'prompt'"):
        TaskRouter(6, 2, "prompt")


# ---- any model, any place of the checkpoint ----


class Block(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.up, self.down, self.inner = nn.Linear(8, 10), nn.Linear(10, 8), inner

    def mlp(self, x):
        return self.down(self.up(x).tanh())

    def forward(self, x):
        if self.inner is None:
            return x + self.mlp(x)
        return x + checkpoint(self.mlp, x, use_reentrant=self.inner)


class Toy(nn.Module):
    """Blocks that are checkpointed from outside, their hooks inside, or in their middle."""

    def __init__(self, outer=None, inner=None):
        super().__init__()
        self.outer = outer
        self.layers = nn.ModuleList(Block(inner) for _ in range(3))

    def forward(self, x, attention_mask=None):
        for layer in self.layers:
            if self.outer is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.outer)
        return x.sin()


TOY = {"target_modules": ["up", "down"]}
CONFIGS = {
    "layer": OrchMoEConfig(SKILLS, TASKS, RANK, combine="average", share="layer", **TOY),
    "model": OrchMoEConfig(SKILLS, TASKS, RANK, share="model", attention="sequence", **TOY),
    "prompt": OrchMoEConfig(SKILLS, TASKS, RANK, attention="prompt", **TOY),
    "ids": PolytroponConfig(TASKS, SKILLS, RANK, splits=2, private="matrix", **TOY),
}


def run_twice(model, config):
    """Two forward calls with other tasks and other padding, then one backward."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 5, 8, generator=generator, dtype=torch.float64)
    mask = torch.ones(4, 5)
    mask[1, 3:] = 0
    torch.manual_seed(5)
    total = 0
    for number in range(2):
        inputs = x.roll(number, 0).requires_grad_()
        given = contextlib.nullcontext()
        if config == "ids":
            given = moelora_ops.task_ids(model, torch.tensor([0, 3, 1 + number, 1]))
        elif config == "prompt":
            given = moelora_ops.prompt_mask(model, (torch.arange(5) <= number + 1).expand(4, -1))
        with given:
            y = model(inputs, mask.roll(number, 0))
        total = 2 * total + y[:, :3].sum()
    total.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("where", ("outer", "inner"))
@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointing_gives_the_same_gradients(config, where, reentrant):
    gradients = []
    for options in ({}, {where: reentrant}):
        torch.manual_seed(0)
        model = randomize(moelora_ops.apply(Toy(**options).double(), CONFIGS[config]))
        if config == "model" and options == {"outer": True}:
            with pytest.raises(RuntimeError, match=r"layers\.0: its task router ran without a gra"):
                run_twice(model, config)
            return
        gradients.append(run_twice(model, config))
        companion = model.moelora_companions[next(iter(model.moelora_companions))]
        assert set(companion._calls) == {None} and not companion._before
    assert gradients[0].keys() == gradients[1].keys()
    for name, want in gradients[0].items():
        assert want.abs().max() > 0
        torch.testing.assert_close(gradients[1][name], want, msg=name)


def test_without_a_stack_the_router_has_no_place():
    model = nn.ModuleDict({"up": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="target_modules: wanted linears of the numbered layers"):
        moelora_ops.apply(model, CONFIGS["layer"])
    assert isinstance(model["up"], nn.Linear)


def test_layers_outside_a_call_say_so():
    model = moelora_ops.apply(Toy(), CONFIGS["layer"])
    with pytest.raises(RuntimeError, match="tasks: wanted those of the task router, got none"):
        model.layers[0].up(torch.randn(2, 3, 8))
    model = moelora_ops.apply(Toy(), CONFIGS["ids"])
    with pytest.raises(RuntimeError, match="tasks: wanted task ids, got none"):
        model(torch.randn(2, 3, 8))


def test_task_ids_are_checked_and_put_back():
    model = moelora_ops.apply(Toy(), CONFIGS["ids"])
    x = torch.randn(2, 3, 8)
    for ids, error, message in (
        ([0, 1], TypeError, "ids: wanted an integer tensor, got list"),
        (torch.tensor([0.0, 1.0]), TypeError, "ids: wanted an integer dtype"),
        (torch.tensor([0, 4]), ValueError, r"ids: wanted task ids in 0\.\.3, got 4"),
        (torch.tensor([[0, 1]]), ValueError, r"ids: wanted shape \[batch\]"),
    ):
        with pytest.raises(error, match=message):
            moelora_ops.task_ids(model, ids).__enter__()
    with moelora_ops.task_ids(model, torch.tensor([0, 1])):
        model(x)
        wrong = pytest.raises(ValueError, match=r"tasks: wanted one per sequence .* got \[3\]")
        with moelora_ops.task_ids(model, torch.tensor([2, 2, 2])), wrong:
            model(x)
        model(x).sum().backward()
        model(x)
    with pytest.raises(ValueError, match="model: wanted one adapted with PolytroponConfig"):
        moelora_ops.task_ids(Toy(), torch.tensor([0])).__enter__()
    with pytest.raises(ValueError, match="model: wanted one adapted with OrchMoEConfig"):
        moelora_ops.prompt_mask(model, torch.ones(2, 3)).__enter__()


@pytest.mark.parametrize("config", CONFIGS)
def test_fused_and_reference_models_and_fuse_agree(config):
    torch.manual_seed(0)
    toy = Toy().double()
    models = [
        randomize(moelora_ops.apply(copy.deepcopy(toy), CONFIGS[config], implementation=i))
        for i in ("fused", "reference")
    ]
    models[1].load_state_dict(models[0].state_dict())
    want = run_twice(models[0], config)
    got = run_twice(models[1], config)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, msg=name)
    models[1].zero_grad()
    again = run_twice(moelora_ops.fuse(models[1]), config)
    assert not any("reference" in type(m).__module__ for m in models[1].modules())
    for name, gradient in want.items():
        torch.testing.assert_close(again[name], gradient, msg=name)


@pytest.mark.parametrize("config", CONFIGS)
def test_saved_copied_and_pickled_models_are_the_same(config, tmp_path):
    pytest.importorskip("safetensors")
    torch.manual_seed(0)
    toy = Toy().double()
    model = randomize(moelora_ops.apply(copy.deepcopy(toy), CONFIGS[config])).eval()
    want = run_twice(model, config)
    moelora_ops.save_adapter(model, tmp_path)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    others = {
        "loaded": moelora_ops.load_adapter(toy, tmp_path).eval(),
        "copied": copy.deepcopy(model),
        "pickled": pickle.loads(pickle.dumps(model)),
        "torch": torch.load(buffer, weights_only=False),
    }
    for how, other in others.items():
        other.zero_grad()
        # A copy's layers read from its own companion, not from the model it was copied from.
        model.moelora_companions[next(iter(model.moelora_companions))]._calls[0] = None
        got = run_twice(other, config)
        for name, gradient in want.items():
            assert torch.equal(got[name], gradient), (how, name)


@pytest.mark.parametrize(
    "place", (["nowhere", ""], ["layers.7", ""], ["", ""], ["layers.0", "nowhere"])
)
def test_a_model_without_the_modules_of_a_router_is_left_as_it_was(place, tmp_path):
    pytest.importorskip("safetensors")
    toy = Toy()
    moelora_ops.save_adapter(moelora_ops.apply(copy.deepcopy(toy), CONFIGS["model"]), tmp_path)
    index = json.loads((tmp_path / "adapter.json").read_text())
    (entry,) = index["companions"].values()
    entry["arguments"]["places"][0][:2] = place
    (tmp_path / "adapter.json").write_text(json.dumps(index))
    before = dict(toy.named_modules())
    with pytest.raises(ValueError, match=f"model: wanted a module '{place[0]}' in a stack"):
        moelora_ops.load_adapter(toy, tmp_path)
    assert dict(toy.named_modules()) == before
    assert all(p.requires_grad for p in toy.parameters())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: OrchMoEConfig(share="token"), "share: wanted one of"),
        (lambda: OrchMoEConfig(attention="all"), "attention: wanted one of"),
        (lambda: OrchMoEConfig(combine="max"), "combine: wanted one of"),
        (lambda: TaskRouters([], 3), "places: wanted a list of"),
        (lambda: TaskRouters([["a", "b"]], 3), "places: wanted"),
        (lambda: TaskRouters([["a", "b", 0]], 3), "in_features: wanted an int of at least 1"),
        (lambda: OrchMoEConfig(hidden_size=0), "hidden_size: wanted an int of at least 1"),
        (lambda: OrchMoEConfig(num_tasks=0), "num_tasks: wanted an int of at least 1"),
        (lambda: PolytroponConfig(0), "num_tasks: wanted an int of at least 1"),
        (lambda: PolytroponConfig(4, private="own"), "private: wanted one of"),
    ],
)
def test_bad_configurations(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- transformers ----


def llama(layers=2):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


IDS = torch.randint(60, (4, 10), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(IDS)
PADDED[0, :3] = 0
PADDED[2, :1] = 0


@pytest.mark.parametrize("share", ("layer", "model"))
@pytest.mark.parametrize("attention", ("causal", "prompt"))
def test_generation_with_a_cache_is_the_full_forward(share, attention):
    config = OrchMoEConfig(SKILLS, TASKS, RANK, share=share, attention=attention)
    model = randomize(moelora_ops.apply(llama(), config))
    prompt, mask = IDS[:, :6], PADDED[:, :6]
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    out = model.generate(prompt, output_logits=True, return_dict_in_generate=True, **options)
    length = out.sequences.shape[1]
    mask = torch.cat([mask, torch.ones(4, length - 6, dtype=mask.dtype)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    with moelora_ops.prompt_mask(model, (torch.arange(length) < 6).expand(4, -1)), torch.no_grad():
        full = model(out.sequences, **inputs).logits
    torch.testing.assert_close(torch.stack(out.logits, 1), full[:, 5:-1].float())
    if attention == "causal":  # beams reorder the cache
        beams = model.generate(prompt, num_beams=3, **options)
        assert torch.equal(beams, model.generate(prompt, num_beams=3, use_cache=False, **options))


def test_the_prompt_is_all_that_its_router_sees():
    model = moelora_ops.apply(llama(), OrchMoEConfig(SKILLS, TASKS, RANK, attention="prompt"))
    randomize(model)
    seen = []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda layer, _: seen.append(layer.tasks_from())
    )
    prompt = (torch.arange(10) < 6).expand(4, -1)
    other = IDS.clone()
    other[:, 6:] = 7
    for ids in (IDS, other):
        with moelora_ops.prompt_mask(model, prompt):
            model(ids, attention_mask=PADDED)
    assert torch.equal(seen[0], seen[1]) and seen[0].shape == (4, TASKS)
    hidden = model.model.embed_tokens(IDS)
    router = model.moelora_companions["task_routers"].routers[0]
    parameters = (router.weight, router.bias)
    want = reference.task_router(hidden, *parameters, PADDED * prompt, normalize=True)
    torch.testing.assert_close(seen[0], want)
    for training in (False, True):
        model.train(training)
        with pytest.raises(RuntimeError, match="prompt: wanted to know which tokens"):
            model(IDS, use_cache=training)
    wrong = pytest.raises(ValueError, match=r"prompt: wanted shape \[4, 10\]")
    with moelora_ops.prompt_mask(model, prompt[:, :9]), wrong:
        model(IDS)
    with pytest.raises(ValueError, match=r"mask: wanted shape \[batch, length\]"):
        moelora_ops.prompt_mask(model, prompt[0]).__enter__()


@pytest.mark.parametrize("attention", ("causal", "sequence"))
def test_padding_is_left_out_of_a_model_by_its_attention_mask(attention):
    config = OrchMoEConfig(SKILLS, TASKS, RANK, attention=attention)
    model = randomize(moelora_ops.apply(llama(), config))
    mask, short = torch.ones(1, 10), IDS[:1, :7]
    mask[0, 7:] = 0
    with torch.no_grad():
        want = model(short).logits
        for call in (model, lambda *a: model.lm_head(model.model(*a)[0]), model.forward):
            if call == model.forward:  # skips the root's hooks, not the decoder's
                got = call(IDS[:1], mask).logits
            else:
                got = call(IDS[:1], mask)
                got = getattr(got, "logits", got)
            torch.testing.assert_close(got[:, :7], want)
        assert (model(IDS[:1]).logits[:, :7] - want).abs().max() > 1e-6 or attention == "causal"
        four = torch.ones(1, 1, 10, 10, dtype=torch.bool).tril()
        with pytest.raises(ValueError, match=r"attention_mask: wanted \[batch, length\] somewhere"):
            model(IDS[:1], attention_mask=four)


@pytest.mark.parametrize("share", ("layer", "model"))
def test_an_encoder_decoder_generates_what_its_full_forward_says(share):
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        decoder_start_token_id=0, eos_token_id=1, initializer_factor=4.0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).double().eval()
    targets = ["SelfAttention.q", "SelfAttention.v", "wi", "wo"]
    config = OrchMoEConfig(SKILLS, TASKS, RANK, share=share, target_modules=targets)
    randomize(moelora_ops.apply(model, config))
    routers = model.moelora_companions["task_routers"]
    assert len(routers.places) == (4 if share == "layer" else 2)
    inputs = {"input_ids": IDS + 2 * (IDS < 2), "attention_mask": PADDED.flip(1)}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    out = model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **options)
    # The decoder gets no mask of its own, and must not take the encoder's, of another length.
    with torch.no_grad():
        full = model(**inputs, decoder_input_ids=out.sequences, use_cache=False).logits
    torch.testing.assert_close(torch.stack(out.logits, 1), full[:, :-1].float())


def test_flat_tokens_of_opt_and_masks_of_bert():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.OPTConfig(
        ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=64, init_std=0.5, **sizes
    )
    opt = transformers.OPTForCausalLM(config).double().eval()
    config = OrchMoEConfig(SKILLS, TASKS, RANK, target_modules=["q_proj", "fc1"])
    randomize(moelora_ops.apply(opt, config))
    with torch.no_grad():
        short = opt(IDS[:, :7]).logits
        torch.testing.assert_close(opt(IDS).logits[:, :7], short)
    config = transformers.BertConfig(intermediate_size=24, initializer_range=0.5, **sizes)
    bert = transformers.BertForSequenceClassification(config).double().eval()
    config = OrchMoEConfig(SKILLS, TASKS, RANK, attention="sequence", target_modules=["query"])
    randomize(moelora_ops.apply(bert, config))
    mask = torch.ones_like(IDS)
    mask[:, 7:] = 0
    with torch.no_grad():
        torch.testing.assert_close(bert(IDS, mask).logits, bert(IDS[:, :7]).logits)
        assert (bert(IDS).logits - bert(IDS, mask).logits).abs().max() > 1e-3


@pytest.mark.parametrize("share", ("layer", "model"))
@pytest.mark.parametrize("reentrant", (False, True))
def test_transformers_checkpointing_gives_the_same_gradients(share, reentrant):
    model = randomize(moelora_ops.apply(llama(), OrchMoEConfig(SKILLS, TASKS, RANK, share=share)))
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(1)
        losses = [
            model(ids, attention_mask=mask, labels=ids, use_cache=False).loss
            for ids, mask in ((IDS, PADDED), (IDS.flip(0), PADDED.flip(0)))
        ]
        (losses[0] + 2 * losses[1]).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, want in gradients[0].items():
        assert want.abs().max() > 0
        torch.testing.assert_close(gradients[1][name], want, msg=name)


@pytest.mark.parametrize("kind", ("router", "ids"))
def test_compiles_fullgraph_and_does_not_compile_again_for_other_tasks(kind):
    targets = {"target_modules": ["q_proj", "down_proj"]}
    if kind == "router":
        config = OrchMoEConfig(SKILLS, TASKS, RANK, **targets)
    else:
        config = PolytroponConfig(TASKS, SKILLS, RANK, **targets)
    model = randomize(moelora_ops.apply(llama(layers=1), config)).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    counters = torch._dynamo.utils.counters["stats"]
    graphs = []
    for ids in (IDS, IDS.flip(0), IDS.flip(1)):
        results = []
        for module in (model, compiled):
            model.zero_grad()
            torch.manual_seed(2)
            inputs = {"input_ids": ids, "attention_mask": PADDED, "use_cache": False}
            if kind == "ids":
                with moelora_ops.task_ids(module, ids[:, 0] % TASKS):
                    y = module(**inputs).logits
            else:
                y = module(**inputs).logits
            y.sin().sum().backward()
            results.append([y] + [p.grad for p in adapter_parameters(model)])
        for got, want in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(got, want)
        graphs.append(counters["unique_graphs"])
    assert graphs[0] == graphs[2]


# ---- PEFT's Poly ----


def poly_model(splits):
    peft = pytest.importorskip("peft")
    config = peft.PolyConfig(
        task_type="CAUSAL_LM", r=3, n_tasks=5, n_skills=4, n_splits=splits,
        target_modules=["q_proj", "down_proj"],
    )  # fmt: skip
    return randomize(peft.get_peft_model(llama(), config, autocast_adapter_dtype=False))


@pytest.mark.parametrize("splits", (1, 2, 4))
def test_pefts_poly_fused(splits, backend):
    theirs = poly_model(splits)
    ours = moelora_ops.fuse(copy.deepcopy(theirs))
    tasks = torch.tensor([4, 0, 2, 2])
    pairs = [
        (theirs.get_submodule(name), layer)
        for name, layer in ours.named_modules()
        if isinstance(layer, PolytroponLinear)
    ]
    assert len(pairs) == 4
    for training in (False, True):
        theirs.train(training).zero_grad()
        ours.train(training).zero_grad()
        torch.manual_seed(1)
        want = theirs(input_ids=IDS, labels=IDS, task_ids=tasks).loss
        torch.manual_seed(1)
        with moelora_ops.task_ids(ours, tasks):
            got = ours(input_ids=IDS, labels=IDS).loss
        torch.testing.assert_close(got, want)
        want.backward()
        got.backward()
        for poly, layer in pairs:
            a, b = (p["default"].grad for p in (poly.poly_lora_A, poly.poly_lora_B))
            logits = poly.poly_router["default"].module_logits.grad
            dense = torch.stack(  # segment by segment, not as the conversion does it
                [torch.cat([a[q, s].T for q in range(splits)], -1) for s in range(4)]
            )
            torch.testing.assert_close(layer.lora_down.grad, dense)
            dense = torch.stack([torch.cat(list(b[:, s]), -1) for s in range(4)])
            torch.testing.assert_close(layer.lora_up.grad, dense)
            torch.testing.assert_close(layer.skill_logits.grad.flatten(1), logits)
            assert logits.abs().max() > 0
    with pytest.raises(RuntimeError, match="tasks: wanted task ids, got none"):
        ours(input_ids=IDS, task_ids=tasks)


def test_poly_layers_that_are_not_plain_are_refused():
    peft = pytest.importorskip("peft")
    model = poly_model(1)
    model.add_adapter("second", peft.PolyConfig(r=2, n_tasks=5, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="wanted PEFT layers with one adapter"):
        moelora_ops.fuse(model)
    model = poly_model(1)
    before = [p.requires_grad for p in model.parameters()]
    with model.disable_adapter(), pytest.raises(ValueError, match="'default' is not active"):
        moelora_ops.fuse(model)
    assert [p.requires_grad for p in model.parameters()] == before


# ---- the example ----


def test_the_example_on_a_tiny_model(monkeypatch, tmp_path, capsys):
    helpers = pytest.importorskip("test_examples")  # puts the examples on the path
    import orchmoe_tasks

    monkeypatch.setattr(orchmoe_tasks, "load_model", lambda dtype: helpers.tiny_llama().to(dtype))
    monkeypatch.setattr(orchmoe_tasks, "load_tokenizer", helpers.CharTokenizer)
    options = "--steps 2 --batch 4 --layers 2 --length 400 --train-per-task 3 --held-out-per-task 2"
    monkeypatch.setattr("sys.argv", ["example", *options.split(), "--output", str(tmp_path)])
    orchmoe_tasks.main()
    results = json.loads((tmp_path / "report.json").read_text())
    assert len(orchmoe_tasks.TASKS) >= 8
    for method in (orchmoe_tasks.ORCHMOE, orchmoe_tasks.POLYTROPON, orchmoe_tasks.LORA):
        assert list(results["scores"][method]) == list(orchmoe_tasks.TASKS)
        assert len(results["losses"][method]) == 2
        assert results["scores"][method] != results["scores"]["before"]
    sizes = results["trained_parameters"].values()
    for use in results["skill_use"].values():
        assert len(use) == 14  # seven linears in each of the last two layers
        for weights in use.values():
            assert np.allclose(np.sum(weights, 1), 1, atol=1e-5)
    assert (tmp_path / "skills.png").read_bytes().startswith(helpers.PNG)
    assert "word_sequence_reversal" in capsys.readouterr().out
    assert max(sizes) > 0
