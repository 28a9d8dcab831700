"""Whole models: the configuration, what apply changes and what it refuses, and fuse."""

import copy

import pytest
import torch
from torch import nn

import moelora_ops
from moelora_ops import MoLAConfig, models, reference
from moelora_ops.depth import numbered_layer
from moelora_ops.nn import MoLALinear

LINEARS = ("q_proj", "up_proj", "down_proj")


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.up_proj = nn.Linear(width, 2 * width)
        self.down_proj = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return x + self.down_proj(torch.tanh(self.up_proj(torch.tanh(self.q_proj(x)))))


class Toy(nn.Module):
    def __init__(self, depth=8, width=6):
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return self.head(self.norm(x))


def experts(model):
    """num_experts per qualified name."""
    return {layer.name: layer.module.num_experts for layer in models.adapted_layers(model)}


def snapshot(model):
    """What a refused call must leave as it was."""
    return (
        [(name, id(module)) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()],
    )


@pytest.mark.parametrize(
    ("num_experts", "depth", "wanted"),
    [
        ("2468", 8, [2, 2, 4, 4, 6, 6, 8, 8]),
        ("2468", 6, [2, 2, 4, 6, 6, 8]),
        ("8642", 4, [8, 6, 4, 2]),
        ("28", 5, [2, 2, 2, 8, 8]),
        ("5", 3, [5, 5, 5]),
        (3, 2, [3, 3]),
        ([2, 7, 4], 3, [2, 7, 4]),
    ],
)
def test_experts_follow_the_depth(num_experts, depth, wanted):
    model = moelora_ops.apply(Toy(depth), MoLAConfig(num_experts, rank=1))
    names = [f"layers.{i}.{linear}" for i in range(depth) for linear in LINEARS]
    assert experts(model) == dict(zip(names, [e for e in wanted for _ in LINEARS], strict=True))


@pytest.mark.parametrize("implementation", ["fused", "reference"])
def test_apply_wraps_freezes_and_keeps_the_function(implementation):
    model = Toy(4).double()
    model.layers[1].eval()
    x = torch.randn(5, 6, dtype=torch.float64)
    wanted, bases = model(x), {id(b.q_proj) for b in model.layers}

    config = MoLAConfig(
        "24", rank=3, alpha=6.0, top_k=1, dropout=0.25, dropout_mode="expert", renormalize=False
    )
    assert moelora_ops.apply(model, config, implementation=implementation) is model

    # B is zero at first, so that only the order of additions may differ.
    torch.testing.assert_close(model(x), wanted)
    layer = model.layers[3].q_proj
    assert type(layer) is {"fused": MoLALinear, "reference": reference.MoLALinear}[implementation]
    assert {id(b.q_proj.base) for b in model.layers} == bases
    assert (layer.num_experts, layer.rank, layer.alpha, layer.top_k) == (4, 3, 6.0, 1)
    assert (layer.dropout, layer.dropout_mode, layer.renormalize) == (0.25, "expert", False)
    assert layer.lora_down.dtype == torch.float64
    assert layer.training and not model.layers[1].q_proj.training
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        f"layers.{i}.{linear}.{p}"
        for i in range(4)
        for linear in LINEARS
        for p in ("lora_down", "lora_up", "router")
    }
    assert {id(p) for p in models.adapter_parameters(model)} == {
        id(p) for p in model.parameters() if p.requires_grad
    }


def test_adapter_dtype_is_that_of_the_new_parameters_only():
    model = moelora_ops.apply(Toy(2), MoLAConfig(2, adapter_dtype=torch.bfloat16))
    assert {p.dtype for p in models.adapter_parameters(model)} == {torch.bfloat16}
    assert model.layers[0].q_proj.base.weight.dtype == torch.float32


def test_all_linear_is_every_linear_inside_the_numbered_layers():
    model = moelora_ops.apply(Toy(2), MoLAConfig(2, target_modules="all-linear"))
    assert set(experts(model)) == {f"layers.{i}.{linear}" for i in range(2) for linear in LINEARS}


def test_all_linear_leaves_what_attention_reads_without_calling():
    model = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16)])
    moelora_ops.apply(model, MoLAConfig(2, target_modules="all-linear"))
    assert set(experts(model)) == {"0.linear1", "0.linear2"}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("implementation", ["fused", "reference"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_fused_path_of_torch_transformers_keeps_the_experts(implementation, padded, compiled):
    """In eval without gradients it reads the weights of both linears and calls neither."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 5, 8), torch.arange(5) >= torch.tensor([[5], [3]])
    options = {"src_key_padding_mask": padding} if padded else {}
    with torch.no_grad():
        base = model(x, **options)
    moelora_ops.apply(
        model, MoLAConfig(2, target_modules="all-linear"), implementation=implementation
    )
    for parameter in models.adapter_parameters(model):
        nn.init.normal_(parameter)
    run = torch.compile(model, backend="eager") if compiled else model
    with torch.no_grad():
        got = run(x, **options)
    wanted = model(x, **options)  # with gradients: no fused path
    assert wanted.requires_grad
    rows = ~padding if padded else ...
    torch.testing.assert_close(got[rows], wanted[rows])
    assert (got[rows] - base[rows]).abs().max() > 0.1


def test_attention_projections_are_refused_by_name():
    model = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16)])
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"target_modules: 0.self_attn.out_proj belongs to an nn.M"):
        moelora_ops.apply(model, MoLAConfig(2, target_modules=["linear1", "out_proj"]))
    assert snapshot(model) == before


@pytest.mark.parametrize("kind", [MoLALinear, reference.MoLALinear])
def test_layers_look_like_their_base(kind):
    base = nn.Linear(6, 5)
    layer = kind(base, 4)
    assert isinstance(layer.weight, torch.Tensor) and layer.weight.dtype == torch.float32
    assert layer.weight.data_ptr() == base.weight.data_ptr() and torch.equal(
        layer.weight, base.weight
    )
    assert type(layer.weight + 1) is torch.Tensor
    assert layer.bias is base.bias
    assert set(layer.state_dict()) == {
        "base.weight", "base.bias", "lora_down", "lora_up", "router",
    }  # fmt: skip

    @torch.compile(fullgraph=True, backend="eager")
    def cast_and_call(x):  # as T5 does
        return layer(x.to(layer.weight.dtype))

    assert cast_and_call(torch.zeros(3, 6, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("kind", [MoLALinear, reference.MoLALinear])
def test_a_base_without_weight_gives_none(kind):
    base = nn.Linear(6, 5)
    del base.weight, base.bias
    layer = kind(base, 4)
    assert not hasattr(layer, "weight") and not hasattr(layer, "bias")
    sharded = nn.Linear(6, 5)
    sharded.weight = nn.Parameter(sharded.weight.detach().as_subclass(Special))
    assert kind(sharded, 4).weight is sharded.weight


class Special(torch.Tensor):
    """A weight that is more than its elements."""


@pytest.mark.parametrize("kind", [MoLALinear, reference.MoLALinear])
def test_products_that_would_skip_the_experts_are_refused(kind):
    layer, x = kind(nn.Linear(8, 8), 4), torch.randn(3, 8)
    with pytest.raises(TypeError, match=r"weight: linear on the weight .* would skip its experts"):
        nn.functional.linear(x, layer.weight, layer.bias)
    for training in (True, False):
        attention = nn.MultiheadAttention(8, 2, batch_first=True).train(training)
        attention.out_proj = kind(attention.out_proj, 4)
        with torch.no_grad(), pytest.raises(TypeError, match="would skip its experts"):
            attention(x[None], x[None], x[None])


def test_all_linear_takes_the_outermost():
    class Quantised(nn.Module):
        in_features, out_features = 6, 6

        def __init__(self):
            super().__init__()
            self.dense = nn.Linear(6, 6)

    model = Toy(1)
    model.layers[0].q_proj = Quantised()
    moelora_ops.apply(model, MoLAConfig(2, target_modules="all-linear"))
    assert set(experts(model)) == {f"layers.0.{linear}" for linear in LINEARS}


def test_names_match_whole_components_from_the_end():
    model = Toy(2)
    model.layers[0].add_module("xq_proj", nn.Linear(6, 6))
    moelora_ops.apply(model, MoLAConfig(2, target_modules=["1.q_proj", "head"]))
    assert set(experts(model)) == {"layers.1.q_proj", "head"}


def test_a_linear_registered_twice_stays_one():
    model = Toy(2)
    model.layers[1].q_proj = model.layers[1].also = model.layers[0].q_proj
    moelora_ops.apply(model, MoLAConfig(2, target_modules=["q_proj", "also"]))
    assert model.layers[0].q_proj is model.layers[1].q_proj is model.layers[1].also
    assert isinstance(model.layers[0].q_proj.base, nn.Linear)


def test_foreign_linears_are_wrapped():
    class Foreign(nn.Module):
        in_features, out_features = 6, 6

        def forward(self, x):
            return 2 * x

    model = Toy(1)
    model.layers[0].q_proj = Foreign()
    moelora_ops.apply(model, MoLAConfig(2, target_modules=["q_proj"]))
    x = torch.randn(4, 6)
    torch.testing.assert_close(model.layers[0].q_proj(x), 2 * x)


def test_numbered_layer_takes_the_outermost_module_list():
    inner = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    layer = nn.Module()
    layer.experts = inner
    model = nn.Sequential(nn.ReLU(), nn.ModuleList([layer, layer]))
    assert numbered_layer(model, "1.1.experts.2") == ("1.1", 1, 2)
    assert numbered_layer(model, "0") == ("0", 0, 2)
    assert numbered_layer(Toy(3), "layers.2.q_proj") == ("layers.2", 2, 3)
    assert numbered_layer(Toy(3), "head") is None


def llama_2_7b():
    """The linears of LLaMA-2-7B: 32 layers, width 4096, MLP 11008."""

    def block():
        layer = nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            layer.add_module(name, nn.Linear(4096, 4096, bias=False))
        for name, shape in (
            ("gate_proj", (4096, 11008)),
            ("up_proj", (4096, 11008)),
            ("down_proj", (11008, 4096)),
        ):
            layer.add_module(name, nn.Linear(*shape, bias=False))
        return layer

    model = nn.Module()
    model.layers = nn.ModuleList(block() for _ in range(32))
    return model


def hf_llama_2_7b():
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig())


@pytest.mark.parametrize("build", [llama_2_7b, hf_llama_2_7b])
@pytest.mark.parametrize(
    ("num_experts", "wanted"),
    [("8888", 169_017_344), ("2468", 105_635_840), (5, 105_635_840), ("4444", 84_508_672)],
)
def test_parameter_counts_of_the_paper(build, num_experts, wanted):
    with torch.device("meta"):
        model = build()
    moelora_ops.apply(model, MoLAConfig(num_experts, rank=8))
    new = list(models.adapter_parameters(model))
    assert sum(p.numel() for p in new) == wanted
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == wanted
    assert all(p.is_meta for p in new)


@pytest.mark.parametrize(
    ("error", "message", "fields"),
    [
        (ValueError, "num_experts: wanted an int of at least 1, got 0", {"num_experts": 0}),
        (ValueError, "num_experts: wanted an int of at least 1, got 0", {"num_experts": "2048"}),
        (ValueError, "num_experts: wanted a string of digits, got ''", {"num_experts": ""}),
        (ValueError, "num_experts: wanted a string of digits, got '2-4'", {"num_experts": "2-4"}),
        (ValueError, "num_experts: wanted one int per layer, got an empty", {"num_experts": []}),
        (
            ValueError,
            "num_experts: wanted an int of at least 1, got 2.0",
            {"num_experts": [4, 2.0]},
        ),
        (ValueError, "num_experts: wanted an int of at least 1, got None", {"num_experts": None}),
        (ValueError, "rank: wanted an int of at least 1, got 0", {"rank": 0}),
        (ValueError, r"top_k: wanted an int in 1..num_experts=2, got 3", {"top_k": 3}),
        (ValueError, r"top_k: wanted an int in 1..num_experts=2, got 0", {"top_k": 0}),
        (ValueError, r"dropout: wanted a probability in \[0, 1\), got -0.1", {"dropout": -0.1}),
        (ValueError, r"dropout: wanted a probability in \[0, 1\), got 1", {"dropout": 1}),
        (ValueError, "dropout_mode: wanted one of", {"dropout_mode": "batch"}),
        (ValueError, "alpha: wanted a finite number, got nan", {"alpha": float("nan")}),
        (ValueError, "alpha: wanted a finite number, got '16'", {"alpha": "16"}),
        (TypeError, "renormalize: wanted a bool, got 1", {"renormalize": 1}),
        (
            ValueError,
            "target_modules: wanted 'all-linear' or a sequence",
            {"target_modules": "q_proj"},
        ),
        (ValueError, "target_modules: wanted 'all-linear' or a sequence", {"target_modules": ()}),
        (ValueError, "target_modules: wanted 'all-linear' or a sequence", {"target_modules": [1]}),
        (ValueError, "target_modules: wanted .* got None", {"target_modules": None}),
        (ValueError, "adapter_dtype: wanted None or one of", {"adapter_dtype": torch.int8}),
    ],
)
def test_bad_configurations(error, message, fields):
    with pytest.raises(error, match=message):
        MoLAConfig(**fields)


@pytest.mark.parametrize(
    ("error", "message", "fields"),
    [
        (ValueError, "num_experts: wanted at most 3 digits, as layers.0.q_proj",
         {"num_experts": "2468"}),
        (ValueError, "num_experts: wanted 3 entries, one per layer of the stack that .* got 2",
         {"num_experts": [2, 4]}),
        (ValueError, "num_experts: wanted one int, as head is outside",
         {"num_experts": "24", "target_modules": ["q_proj", "head"]}),
        (ValueError, "target_modules: .* none matches", {"target_modules": ["query"]}),
        (TypeError, "target_modules: .* norm is LayerNorm", {"target_modules": ["q_proj", "norm"]}),
        (ValueError, "num_experts: layers.2.q_proj is also registered elsewhere",
         {"num_experts": [2, 2, 3]}),
    ],
)  # fmt: skip
def test_a_configuration_that_does_not_fit_changes_nothing(error, message, fields):
    model = Toy(3)
    model.layers[2].q_proj = model.layers[0].q_proj
    before = snapshot(model)
    with pytest.raises(error, match=message):
        moelora_ops.apply(model, MoLAConfig(**{"num_experts": 2, "top_k": 1, **fields}))
    assert snapshot(model) == before


def test_a_failure_while_layers_are_made_changes_nothing(monkeypatch):
    made = []

    def fail_at_the_third(layer, *args, **kwargs):
        made.append(layer)
        if len(made) == 3:
            raise MemoryError

    monkeypatch.setattr(MoLALinear, "reset_parameters", fail_at_the_third)
    model = Toy(2)
    before = snapshot(model)
    with pytest.raises(MemoryError):
        moelora_ops.apply(model, MoLAConfig(2))
    assert snapshot(model) == before


def test_what_is_no_model_is_refused_by_name(tmp_path):
    def inside(manager, *arguments):
        with manager(None, *arguments):
            pass

    mask = torch.ones(2, 3)
    for call in (
        lambda: list(moelora_ops.adapter_parameters(None)),
        lambda: moelora_ops.save_adapter(None, tmp_path),
        lambda: moelora_ops.load_adapter(None, tmp_path),
        lambda: moelora_ops.aux_loss(None),
        lambda: moelora_ops.gating_balance_loss(None),
        lambda: moelora_ops.source_weights(None),
        lambda: moelora_ops.set_expert_mask(None, [True]),
        lambda: inside(moelora_ops.sequence_mask, mask.bool()),
        lambda: inside(moelora_ops.prompt_mask, mask),
        lambda: inside(moelora_ops.intuition, mask),
        lambda: inside(moelora_ops.task_ids, torch.tensor([0])),
    ):
        with pytest.raises(TypeError, match=r"^model: wanted a torch.nn.Module, got NoneType$"):
            call()


def test_other_bad_arguments_of_apply():
    model = Toy(2)
    with pytest.raises(TypeError, match=r"model: wanted a torch.nn.Module, got list"):
        moelora_ops.apply([model], MoLAConfig(2))
    with pytest.raises(TypeError, match=r"config: wanted one of .*MoLAConfig.*, got dict"):
        moelora_ops.apply(model, {"num_experts": 2})
    with pytest.raises(ValueError, match=r"implementation: wanted one of .* got 'quick'"):
        moelora_ops.apply(model, MoLAConfig(2), implementation="quick")
    assert not experts(model)


@pytest.mark.parametrize("implementation", ["fused", "reference"])
def test_apply_twice_is_refused(implementation):
    model = moelora_ops.apply(Toy(2), MoLAConfig(2), implementation=implementation)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"model: is already adapted \(layers.0.q_proj\)"):
        moelora_ops.apply(model, MoLAConfig(2))
    assert snapshot(model) == before


def test_fuse_shares_parameters_and_keeps_the_outputs():
    model = moelora_ops.apply(Toy(4).double(), MoLAConfig("24", rank=2), implementation="reference")
    for parameter in models.adapter_parameters(model):
        nn.init.normal_(parameter)
    model.layers[1].eval()
    model.layers[2].q_proj.router.requires_grad_(False)
    model.layers[3].q_proj = model.layers[2].q_proj
    x = torch.randn(7, 6, dtype=torch.float64)
    wanted = model(x)
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}

    assert moelora_ops.fuse(model) is model
    assert {type(layer.module) for layer in models.adapted_layers(model)} == {MoLALinear}
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert model.layers[3].q_proj is model.layers[2].q_proj
    assert model.layers[0].q_proj.training and not model.layers[1].q_proj.training
    torch.testing.assert_close(model(x), wanted)


def test_fuse_of_a_layer_returns_the_fused_one():
    layer = reference.MoLALinear(nn.Linear(4, 5), 3, dropout=0.5, dropout_mode="expert").eval()
    fused = moelora_ops.fuse(layer)
    assert isinstance(fused, MoLALinear) and fused.lora_up is layer.lora_up
    assert (fused.dropout, fused.dropout_mode, fused.training) == (0.5, "expert", False)


def test_fuse_refuses_what_it_would_lose():
    with pytest.raises(ValueError, match="model: has no reference layers"):
        moelora_ops.fuse(moelora_ops.apply(Toy(2), MoLAConfig(2)))
    model = moelora_ops.apply(Toy(2), MoLAConfig(2), implementation="reference")
    model.layers[1].q_proj.register_forward_hook(lambda *_: None)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"model: layers.1.q_proj has hooks"):
        moelora_ops.fuse(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("implementation", ["fused", "reference"])
def test_models_can_be_copied_after_a_call(implementation):
    model = moelora_ops.apply(Toy(2), MoLAConfig(2), implementation=implementation)
    model(torch.randn(3, 6))
    twin = copy.deepcopy(model)
    assert model.layers[0].q_proj.routing is not None and twin.layers[0].q_proj.routing is None
    x = torch.randn(4, 6)
    assert torch.equal(twin(x), model(x))
