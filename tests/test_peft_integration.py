"""PEFT's LoRAs: directories and models read, layers fused; what is no plain LoRA is refused."""
# ruff: noqa: E402  (imports after importorskip)

import json
import math

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("safetensors")
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import moelora_ops
from moelora_ops import MoLEConfig
from moelora_ops.integrations.peft import read_loras
from moelora_ops.nn import LoRALinear, MoLELinear, stack_loras


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        return x + self.down_proj(self.up_proj(x).tanh())


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return self.head(x)


TARGETS = ["up_proj", "down_proj"]


def make_peft(seed=1, toy=Toy, **options):
    """A toy with PEFT's LoRA, trained as far as random numbers go."""
    config = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS} | options
    model = get_peft_model(toy(), LoraConfig(**config))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=random) / 2)
    return model.eval()


def x_of(rows=5):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(3))


SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"layers.1.up_proj": 5, r".*\.0\.down_proj": 1},
        "alpha_pattern": {"up_proj": 2, "layers.0.down_proj": 7},
    },
    "rslora and patterns": {"use_rslora": True, "rank_pattern": {"up_proj": 4}},
    "regex targets": {"target_modules": r".*\.1\.(up|down)_proj"},
    "dropout": {"lora_dropout": 0.3},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_is_read_computes_what_peft_computes(settings, tmp_path):
    model = make_peft(**settings)
    model.save_pretrained(tmp_path)
    from_disk, in_memory = read_loras(tmp_path), read_loras(model)
    assert from_disk.keys() == in_memory.keys()
    layers = dict(model.base_model.model.named_modules())
    for name, lora in in_memory.items():
        assert torch.equal(from_disk[name].A, lora.A) and torch.equal(from_disk[name].B, lora.B)
        assert from_disk[name].scale == pytest.approx(lora.scale, rel=1e-12)
        x = torch.randn(3, lora.A.shape[1])
        want = layers[name](x)
        got = layers[name].base_layer(x) + lora.scale * x @ lora.A.T @ lora.B.T
        torch.testing.assert_close(got, want)
    injected = model.get_base_model()
    assert {n: l.scale for n, l in read_loras(injected).items()} == {
        n: l.scale for n, l in in_memory.items()
    }


def test_stacks_are_transposed_into_our_layout():
    loras = read_loras(make_peft())
    a, b, scale = loras["layers.0.up_proj"]
    assert a.shape == (2, 6) and b.shape == (10, 2) and scale == 3
    stack = stack_loras([loras["layers.0.up_proj"]], 6, 10)
    assert torch.equal(stack.lora_down[0], a) and torch.equal(stack.lora_up[0], b.T)


def test_one_of_several_adapters_of_a_model():
    model = make_peft()
    model.add_adapter("other", LoraConfig(r=1, lora_alpha=1, target_modules=["up_proj"]))
    with pytest.raises(ValueError, match=r"adapter_name: wanted one of \['default', 'other'\]"):
        read_loras(model)
    assert set(read_loras(model, "other")) == {"layers.0.up_proj", "layers.1.up_proj"}
    assert len(read_loras(model, "default")) == 4
    with pytest.raises(ValueError, match=r"adapter_name: wanted one of .*, got 'third'"):
        read_loras(model, "third")


@pytest.mark.parametrize("gates", ("matrix", "layer", "block"))
def test_mole_with_one_adapter_is_that_adapter(gates, tmp_path):
    model = make_peft(use_rslora=True)
    model.save_pretrained(tmp_path)
    composed = moelora_ops.apply(Toy(), MoLEConfig([tmp_path], gates))
    torch.testing.assert_close(composed(x_of()), model(x_of()))


def test_mole_starts_as_the_average_of_directories_and_models(tmp_path):
    adapted = [make_peft(seed=1), make_peft(seed=2, r=4, target_modules=["up_proj"])]
    adapted[0].save_pretrained(tmp_path)
    composed = moelora_ops.apply(Toy(), MoLEConfig([str(tmp_path), adapted[1]]))
    average = Toy()
    for name, module in average.named_modules():
        for model in adapted:
            lora = read_loras(model).get(name)
            if lora is not None:
                module.weight.data += lora.scale * (lora.B @ lora.A).detach() / 2
    torch.testing.assert_close(composed(x_of()), average(x_of()))


def test_mole_refuses_a_model_that_still_has_peft_layers():
    model = make_peft().get_base_model()
    with pytest.raises(ValueError, match=r"layers\.0\.up_proj has PEFT's LoRA already"):
        moelora_ops.apply(model, MoLEConfig([make_peft()]))


NOT_PLAIN = {
    "dora": ({"use_dora": True}, "use_dora=True"),
    "lora_bias": ({"lora_bias": True}, "lora_bias=True"),
    "bias": ({"bias": "lora_only"}, "wanted bias='none', got 'lora_only'"),
    "modules_to_save": ({"modules_to_save": ["head"]}, "modules_to_save"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes it"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights='olora' changes it"),
}


@pytest.mark.parametrize("settings, message", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_what_is_no_plain_lora_is_refused(settings, message, tmp_path):
    model = make_peft(**settings)
    model.save_pretrained(tmp_path)
    for source in (tmp_path, model):
        with pytest.raises(ValueError, match=message):
            read_loras(source)


def test_layers_alone_are_refused_too():
    """Without a PeftModel around them there is no configuration to ask."""
    for settings in ({"use_dora": True}, {"lora_bias": True}):
        layers = nn.Sequential(make_peft(**settings).base_model.model.layers[0].up_proj)
        with pytest.raises(ValueError, match=r"source: 0: wanted a (plain )?LoRA"):
            read_loras(layers)
    convolution = nn.Module()
    convolution.conv = nn.Conv1d(3, 3, 1)
    model = get_peft_model(convolution, LoraConfig(r=2, target_modules=["conv"]))
    with pytest.raises(ValueError, match="source: conv: wanted LoRAs of linears, got Conv1d"):
        read_loras(model)
    merged = make_peft()
    merged.merge_adapter()
    with pytest.raises(ValueError, match="is merged into the base"):
        read_loras(merged)


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def rename(tensors, old, new):
    tensors[new] = tensors.pop(old)


KEY = "base_model.model.layers.0.up_proj.lora_A.weight"
DAMAGE = {
    "another method": (lambda d: change_config(d, peft_type="LOHA"), "wanted peft_type 'LORA'"),
    "no json": (lambda d: (d / "adapter_config.json").write_text("{"), "is no json"),
    "another rank": (lambda d: change_config(d, r=3), "wanted rank 3 as adapter_config.json says"),
    "a missing half": (
        lambda d: change_tensors(d, lambda t: t.pop(KEY)),
        "wanted both lora_A and lora_B, got lora_B",
    ),
    "a foreign tensor": (
        lambda d: change_tensors(d, lambda t: rename(t, KEY, "base_model.model.head.weight")),
        "wanted lora_A.weight and lora_B.weight only, got base_model.model.head.weight",
    ),
    "another shape": (
        lambda d: change_tensors(d, lambda t: t.update({KEY: t[KEY][0].clone()})),
        "wanted a LoRA of a linear",
    ),
    "truncated": (
        lambda d: (d / "adapter_model.safetensors").write_bytes(
            (d / "adapter_model.safetensors").read_bytes()[:-20]
        ),
        "is truncated or corrupted",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE)
def test_damaged_directories(damage, message, tmp_path):
    make_peft().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_loras(tmp_path)


def test_missing_files_and_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match="wanted a directory with a PEFT adapter"):
        read_loras(tmp_path / "nowhere")
    make_peft().save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"it has no adapter_model\.safetensors"):
        read_loras(tmp_path)
    with pytest.raises(ValueError, match="adapter_name: wanted None for a directory"):
        read_loras(tmp_path, "default")
    with pytest.raises(ValueError, match="wanted a model with PEFT LoRA layers, got one without"):
        read_loras(Toy())


def test_safetensors_is_asked_for_by_name(tmp_path, monkeypatch):
    make_peft().save_pretrained(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'moelora-ops\[peft\]'"):
        read_loras(tmp_path)


# ---------------------------------------------------------------- fuse


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_fused_peft_layers_share_their_parameters_and_train_alike(settings):
    model, twin = (make_peft(toy=lambda: Toy().double(), **settings) for _ in range(2))
    shared = {id(p) for n, p in model.named_parameters() if "lora_" in n}
    assert moelora_ops.fuse(model) is model
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    assert {id(p) for layer in layers for p in (layer.lora_A, layer.lora_B)} == shared
    assert {layer.dropout for layer in layers} == {settings.get("lora_dropout", 0.0)}
    x = x_of().double()
    for module in (model, twin):
        module(x).square().sum().backward()
    torch.testing.assert_close(model(x), twin(x))
    want = [p.grad for n, p in twin.named_parameters() if "lora_" in n]
    got = [p.grad for p in model.parameters() if p.requires_grad]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_fused_peft_layers_in_16_bits():
    """PEFT's default: adapters in float32 on a model in bfloat16."""
    model = make_peft(toy=lambda: Toy().bfloat16())
    layer = model.base_model.model.layers[0].up_proj
    assert layer.lora_A["default"].weight.dtype == torch.float32
    x = x_of().bfloat16()
    want = layer(x).float()
    moelora_ops.fuse(model)
    got = model.base_model.model.layers[0].up_proj(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.02, atol=0.02)


def test_a_lone_peft_layer_is_replaced_by_what_fuse_returns():
    layer = make_peft().base_model.model.layers[0].up_proj
    want = layer(x_of())
    fused = moelora_ops.fuse(layer)
    assert isinstance(fused, LoRALinear) and fused.scale == 3 and not fused.training
    torch.testing.assert_close(fused(x_of()), want)


def two_adapters(model):
    model.add_adapter("other", LoraConfig(r=1, target_modules=TARGETS))


def with_a_hook(model):
    model.base_model.model.layers[1].up_proj.register_forward_hook(lambda *a: None)


def with_another_forward(model):
    layer = model.base_model.model.layers[1].up_proj
    layer.forward = layer.forward


NOT_FUSIBLE = {
    "dora": ({"use_dora": True}, lambda m: None, "wanted a plain LoRA"),
    "merged": ({}, lambda m: m.merge_adapter(), "is merged"),
    "two adapters": ({}, two_adapters, "wanted PEFT layers with one adapter"),
    "disabled": ({}, lambda m: m.base_model.disable_adapter_layers(), "is not active"),
    "hooks": ({}, with_a_hook, r"layers\.1\.up_proj has hooks"),
    "another forward": ({}, with_another_forward, "a forward that is not its own"),
}


@pytest.mark.parametrize("settings, change, message", NOT_FUSIBLE.values(), ids=NOT_FUSIBLE)
def test_what_cannot_be_fused_stays_as_it_is(settings, change, message):
    model = make_peft(**settings)
    change(model)
    modules = dict(model.named_modules())
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        moelora_ops.fuse(model)
    assert dict(model.named_modules()) == modules
    assert {n: p.requires_grad for n, p in model.named_parameters()} == required


def test_fused_layers_can_be_saved(tmp_path):
    model = make_peft(use_rslora=True)
    moelora_ops.fuse(model)
    moelora_ops.save_adapter(model.get_base_model(), tmp_path)
    fresh = moelora_ops.load_adapter(Toy().eval(), tmp_path)
    torch.testing.assert_close(fresh(x_of()), model(x_of()))
    assert math.isclose(fresh.layers[0].up_proj.scale, 6 / math.sqrt(2))


def test_mole_layers_take_what_is_read():
    loras = [read_loras(make_peft(seed=s))["layers.0.up_proj"] for s in (1, 2)]
    layer = MoLELinear(Toy().layers[0].up_proj, loras)
    want = layer.base(x_of()) + sum(s * x_of() @ a.T @ b.T for a, b, s in loras) / 2
    torch.testing.assert_close(layer(x_of()), want)
