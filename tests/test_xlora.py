"""PEFT's X-LoRA fused: the same outputs and gradients, and everything of PEFT goes on working."""
# ruff: noqa: E402  (imports after importorskip)

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
from peft import LoraConfig, XLoraConfig, get_peft_model
from peft.tuners.xlora.layer import XLoraLinearLayer
from safetensors.torch import load_file

import moelora_ops
from moelora_ops.integrations.xlora import FusedXLora, is_xlora

TARGETS = ["q_proj", "down_proj"]
IDS = torch.randint(50, (2, 5), generator=torch.Generator().manual_seed(2))


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, use_cache=False, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double()


def save_loras(folder, *settings):
    """Adapter directories by name: "0", "1" and so on, as X-LoRA names what it has loaded."""
    paths = {}
    for i, options in enumerate(settings):
        config = {"lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False} | options
        get_peft_model(llama(), LoraConfig(**config)).save_pretrained(folder / str(i))
        paths[str(i)] = str(folder / str(i))
    return paths


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Three experts of different ranks and scales, the last without ``down_proj``."""
    return save_loras(
        tmp_path_factory.mktemp("loras"), {"r": 2}, {"r": 4, "use_rslora": True},
        {"r": 3, "target_modules": ["q_proj"]},
    )  # fmt: skip


def make_xlora(adapters, base=llama, **options):
    config = {"hidden_size": 16, "task_type": "CAUSAL_LM"} | options
    torch.manual_seed(1)
    model = get_peft_model(base(), XLoraConfig(adapters=adapters, **config))
    for p in model.base_model.internal_xlora_classifier.parameters():
        nn.init.normal_(p)
    return model


def xlora_layers(model):
    return {name: module for name, module in model.named_modules() if is_xlora(module)}


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


OPTIONS = {
    "softmax": {},
    "temperature": {"softmax_temperature": 0.3},
    "raw scalings": {"enable_softmax": False},
    "layerwise": {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 7},
    "top-k": {"top_k_lora": 2},
    "top-k of raw scalings": {"top_k_lora": 1, "enable_softmax": False, "layerwise_scalings": True},
    "softmax over the top-k": {
        "top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True,
    },
    "scaling pass": {"scaling_pass_value": 0.4},
    "scaling weight": {"global_scaling_weight": 1.7},
    "trained experts": {"use_trainable_adapters": True},
    "all": {
        "use_trainable_adapters": True, "top_k_lora": 2, "enable_softmax": False,
        "enable_softmax_topk": True, "layerwise_scalings": True, "scaling_pass_value": -0.3,
        "global_scaling_weight": 0.6,
    },
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_outputs_and_gradients_are_pefts(options, loras, backend):
    theirs, ours = (make_xlora(loras, **options) for _ in range(2))
    parameters = dict(ours.named_parameters())
    assert moelora_ops.fuse(ours) is ours
    assert {name: id(p) for name, p in ours.named_parameters()} == {
        name: id(p) for name, p in parameters.items()
    }
    runners = [layer.forward.__self__ for layer in xlora_layers(ours).values()]
    assert len(runners) == 4 and all(isinstance(runner, FusedXLora) for runner in runners)
    outputs = []
    for model in (theirs, ours):
        y = model(input_ids=IDS, labels=IDS)
        y.loss.backward()
        outputs.append(y.logits)
    torch.testing.assert_close(outputs[1], outputs[0])
    with torch.no_grad():
        adapted = outputs[0] - theirs.get_base_model()(input_ids=IDS).logits
    assert adapted.abs().max() > 0.01  # the experts are to be seen in what is compared
    want, got = gradients(theirs), gradients(ours)
    experts = {name for name in want if "lora_A" in name or "lora_B" in name}
    assert len(experts) == (20 if options.get("use_trainable_adapters") else 0) < len(want)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(got[name], gradient, msg=name)


def test_in_16_bits(loras, backend):
    """PEFT's default: adapters in float32 on a model in bfloat16."""
    theirs, ours, wide = (
        make_xlora(loras, lambda dtype=dtype: llama().to(dtype), top_k_lora=2)
        for dtype in (torch.bfloat16, torch.bfloat16, torch.float64)
    )
    moelora_ops.fuse(ours)
    assert next(iter(xlora_layers(ours).values())).lora_A["0"].weight.dtype == torch.float32
    want, got, exact = (model(input_ids=IDS).logits for model in (theirs, ours, wide))
    assert got.dtype == torch.bfloat16
    rms = [(y.double() - exact).square().mean().sqrt() for y in (want, got)]
    assert rms[1] < 2 * rms[0]


def test_what_peft_does_with_its_model_goes_on(loras, tmp_path, backend):
    theirs, ours = (make_xlora(loras) for _ in range(2))
    moelora_ops.fuse(ours)

    def same():
        want, got = (model(input_ids=IDS).logits for model in (theirs, ours))
        torch.testing.assert_close(got, want)
        return want

    dense = same()
    for model in (theirs, ours):
        model.base_model.set_topk_lora(1)
    sparse = same()
    assert not torch.allclose(sparse, dense)
    for model in (theirs, ours):
        model.base_model.set_global_scaling_weight(2.0)
    assert not torch.allclose(same(), sparse)
    with theirs.disable_adapter(), ours.disable_adapter():
        torch.testing.assert_close(same(), llama()(IDS).logits)
    for model in (theirs, ours):
        model.base_model.lora_model.set_adapter(["2", "0"])
    assert not torch.allclose(same(), sparse)
    for model in (theirs, ours):
        model.base_model.lora_model.set_adapter(["0", "1", "2"])
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(ours.generate(IDS, **options), theirs.generate(IDS, **options))
    theirs.save_pretrained(tmp_path / "theirs"), ours.save_pretrained(tmp_path / "ours")
    saved = []
    for side in ("theirs", "ours"):
        files = (tmp_path / side).rglob("*.safetensors")
        saved.append({f.relative_to(tmp_path / side): load_file(f) for f in sorted(files)})
    assert len(saved[0]) == 4 and saved[1].keys() == saved[0].keys()  # classifier and experts
    for file, tensors in saved[0].items():
        assert saved[1][file].keys() == tensors.keys()
        assert all(torch.equal(saved[1][file][name], t) for name, t in tensors.items())


def test_copies_are_independent(loras):
    model = moelora_ops.fuse(make_xlora(loras))
    twin = copy.deepcopy(model)
    want = model(input_ids=IDS).logits
    torch.testing.assert_close(twin(input_ids=IDS).logits, want)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if "lora_B" in name:
                p.mul_(2)
    assert torch.equal(model(input_ids=IDS).logits, want)
    assert not torch.allclose(twin(input_ids=IDS).logits, want)


# ---------------------------------------------------------------- one layer


def lone_layer(*ranks, dropouts=None):
    """A layer as PEFT makes it inside of a model, and PEFT's runner of it."""
    lora = peft.tuners.lora
    base = nn.Linear(12, 9).double()
    layer = None
    for i, (rank, p) in enumerate(zip(ranks, dropouts or [0.0] * len(ranks), strict=True)):
        config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=p, init_lora_weights=False)
        if layer is None:
            layer = lora.Linear(base, "0", config=config, r=rank, lora_alpha=rank)
        else:
            layer.update_layer(str(i), rank, lora_alpha=rank, config=config)
    layer.set_adapter([str(i) for i in range(len(ranks))])
    config = XLoraConfig(hidden_size=12, adapters={str(i): "" for i in range(len(ranks))})
    model = SimpleNamespace(disabled=False)
    layer.forward = XLoraLinearLayer(model, layer, layer.forward, 0, config).forward
    return layer


def test_a_lone_layer_without_scalings_adds_every_expert(backend):
    layer = lone_layer(2, 5)
    fused = moelora_ops.fuse(layer)
    assert type(fused) is type(layer) and fused.lora_A is layer.lora_A
    x = torch.randn(3, 4, 12, dtype=torch.float64)
    want = layer.base_layer(x) + sum(
        x @ layer.lora_A[n].weight.T @ layer.lora_B[n].weight.T for n in "01"
    )
    torch.testing.assert_close(fused(x), want)


def test_a_base_of_another_kind(backend):
    """Called as it is, and its output, which it may have kept, is not written to."""

    class Tanh(nn.Linear):
        def forward(self, x):
            return super().forward(x).tanh()

    layer = lone_layer(2, 2)
    layer.base_layer.__class__ = Tanh
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    scalings = torch.rand(2, 3, 1, 2, dtype=torch.float64)
    y = moelora_ops.fuse(layer)(x, scalings=scalings)
    base = layer.base_layer(x.detach())
    adapted = [x @ layer.lora_A[n].weight.T @ layer.lora_B[n].weight.T for n in "01"]
    torch.testing.assert_close(
        y, base + sum(scalings[..., 0, i, None] * adapted[i] for i in range(2))
    )
    y.sum().backward()  # fails if the output that tanh has kept was changed
    assert x.grad.isfinite().all()


def test_dropout_thins_the_experts_only_in_training(backend):
    layer = lone_layer(3, 3, dropouts=(0.25, 0.25))
    nn.init.zeros_(layer.base_layer.weight), nn.init.zeros_(layer.base_layer.bias)
    fused = moelora_ops.fuse(layer.train())
    x = torch.randn(40, 100, 12, dtype=torch.float64)
    scalings = torch.rand(40, 100, 1, 2, dtype=torch.float64)
    torch.manual_seed(3)
    thinned = fused(x, scalings=scalings)
    torch.manual_seed(3)
    assert torch.equal(thinned, fused(x, scalings=scalings))
    whole = fused.eval()(x, scalings=scalings)
    torch.testing.assert_close(whole, layer.eval()(x, scalings=scalings))
    # Unbiased: the regression of the thinned on the whole output has slope 1.
    assert abs((thinned * whole).sum() / whole.square().sum() - 1) < 0.03
    # A quarter of the inputs is gone, the rest 4/3 as large: the variance is a third of the square.
    hidden = (whole - thinned).square().mean() / whole.square().mean()
    assert 0.2 < hidden < 0.5


def test_wrong_scalings_are_refused_by_name():
    fused = moelora_ops.fuse(lone_layer(2, 2))
    x = torch.randn(3, 4, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"weights: wanted shape \[3, 4, 2\] \(per token\)"):
        fused(x, scalings=torch.rand(3, 5, 1, 2, dtype=torch.float64))


# ---------------------------------------------------------------- what cannot be fused


def make_with(folder, *settings, **options):
    return make_xlora(save_loras(folder, *settings), **options)


def hooked(folder):
    model = make_with(folder, {"r": 2})
    next(iter(xlora_layers(model).values())).register_forward_hook(lambda *a: None)
    return model


def merged(folder):
    model = make_with(folder, {"r": 2})
    next(iter(xlora_layers(model).values())).merged_adapters.append("0")
    return model


def named_otherwise(folder):
    """As in PEFT's own documentation; its X-LoRA then leaves every expert out."""
    (path,) = save_loras(folder, {"r": 2}).values()
    return make_xlora({"physics": path})


REFUSED = {
    "dora": (lambda f: make_with(f, {"r": 2, "use_dora": True}), "wanted a plain LoRA"),
    "biases": (lambda f: make_with(f, {"r": 2, "lora_bias": True}), "LoRA without biases"),
    "dropouts": (
        lambda f: make_with(f, {"r": 2, "lora_dropout": 0.1}, {"r": 2}),
        r"wanted X-LoRA adapters of one dropout, got \[0.0, 0.1\]",
    ),
    "embeddings": (
        lambda f: make_with(f, {"r": 2, "target_modules": ["embed_tokens", "q_proj"]}),
        "wanted X-LoRA on linears, got Embedding",
    ),
    "hooks": (hooked, "q_proj has hooks"),
    "merged": (merged, "is merged into the base"),
    "names": (named_otherwise, r"those that are active are \['physics'\]"),
    "twice": (lambda f: moelora_ops.fuse(make_with(f, {"r": 2})), "are fused already"),
}


@pytest.mark.parametrize("make, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_fused_stays_as_it_is(make, message, tmp_path):
    model = make(tmp_path)
    modules = dict(model.named_modules())
    forwards = {name: layer.forward for name, layer in xlora_layers(model).items()}
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        moelora_ops.fuse(model)
    assert dict(model.named_modules()) == modules
    assert {name: layer.forward for name, layer in xlora_layers(model).items()} == forwards
    assert {n: p.requires_grad for n, p in model.named_parameters()} == required
