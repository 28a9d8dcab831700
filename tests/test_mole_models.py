"""MoLE on whole models: shared gates, the balance loss, files, configurations."""

import copy
import math

import pytest
import torch
from moles import PADDING, assert_all_close, make_input, make_layer, make_loras
from torch import nn
from torch.utils.checkpoint import checkpoint

import moelora_ops
from moelora_ops import MoLEConfig, models, use_backend
from moelora_ops.backends import extension
from moelora_ops.nn import MoLELinear, SharedGate


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


def test_backends_agree():
    if why := extension.why_missing():
        pytest.skip(why)
    results = []
    for name in ("reference", "cpu"):
        with use_backend(name):
            results.append(model_gradients(make_model("layer"), batch()))
    assert_all_close(*results)


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
