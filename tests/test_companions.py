"""What a method may bring beside plain layers: frozen experts, nested gates, masks, companions.

On a made-up method, so that the whole-model helpers are held to their contract whatever the
published methods need of it.
"""

import copy
import dataclasses
import json
from typing import ClassVar

import pytest
import torch
from torch import nn

import moelora_ops
from moelora_ops import models
from moelora_ops.companions import COMPANIONS, Companion, companion_name, companions_of
from moelora_ops.configs import AdapterConfig
from moelora_ops.nn import AdapterLinear

pytest.importorskip("safetensors")


class MixLinear(AdapterLinear):
    """Frozen experts of different ranks under a nested gate; `key` says which companion weighs."""

    def __init__(self, base, loras, key="a", *, device=None, dtype=None):
        super().__init__(base, device, dtype)
        self.key, self.ranks = key, tuple(len(down) for down, _ in loras)
        self.down = nn.ParameterList(nn.Parameter(down.to(**self._new), False) for down, _ in loras)
        for i, (_, up) in enumerate(loras):
            self.register_buffer(f"up{i}", up.to(**self._new, copy=True))
        self.gate = nn.Linear(self.in_features, len(loras), **self._new)
        self.register_buffer("mask", torch.ones(len(loras), dtype=torch.bool))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.bottleneck = AdapterInside(nn.Linear(2, 2)) if key == "nested" else None
        self.scales = ()

    def forward(self, x):
        gates = self.gate(x).softmax(-1) * self.mask * self.scales[0].scale
        experts = [(x @ down.T) @ getattr(self, f"up{i}") for i, down in enumerate(self.down)]
        return self.base(x) + (torch.stack(experts, -1) * gates[..., None, :]).sum(-1)

    @classmethod
    def from_reference(cls, layer):
        fused = cls(layer.base, [(d, getattr(layer, f"up{i}")) for i, d in enumerate(layer.down)],
                    layer.key)  # fmt: skip
        fused.down, fused.gate, fused.mask = layer.down, layer.gate, layer.mask
        return fused.train(layer.training)


class ReferenceMixLinear(MixLinear):
    pass


class AdapterInside(MixLinear):
    def __init__(self, base):
        super().__init__(base, [(torch.zeros(1, 2), torch.zeros(1, 2))])


class Scale(Companion):
    arguments: ClassVar = ("width", "place")

    def __init__(self, width, place, *, device=None, dtype=None):
        super().__init__()
        if width < 1:
            raise ValueError(f"width: wanted at least 1, got {width}")
        self.width, self.place = width, place
        self.scale = nn.Parameter(torch.ones(width, device=device, dtype=dtype))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))

    def attach(self, model, layers):
        for name, layer in layers.items():
            if name.startswith(self.place):
                layer.scales = (self,)


@dataclasses.dataclass(frozen=True)
class MixConfig(AdapterConfig):
    loras: dict = dataclasses.field(default_factory=dict)
    key: str = "a"

    def layers(self, model):
        return {name: {"loras": loras, "key": self.key} for name, loras in self.loras.items()}

    def companions(self, model, layers, *, device, dtype):
        places = sorted({name.rpartition(".")[0] for name in layers})
        return {companion_name("scale", p): Scale(1, p, device=device, dtype=dtype) for p in places}

    @classmethod
    def check_layer(cls, name, arguments):
        if not all(rank > 0 for rank in arguments["ranks"]):
            raise ValueError(f"ranks: wanted numbers of at least 1, got {arguments['ranks']}")

    @classmethod
    def constructor_arguments(cls, base, arguments):
        loras = [
            (torch.empty(rank, base.in_features), torch.empty(rank, base.out_features))
            for rank in arguments["ranks"]
        ]
        return {"loras": loras, "key": arguments["key"]}


@pytest.fixture(autouse=True)
def _method(monkeypatch):
    row = models.Method(
        MixConfig, MixLinear, ReferenceMixLinear, ("ranks", "key"), companions={"scale": Scale}
    )
    monkeypatch.setitem(models.METHODS, "mix", row)


class Toy(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, 5), "down": nn.Linear(5, width)})
            for _ in range(2)
        )

    def forward(self, x):
        for block in self.layers:
            x = x + block["down"](block["up"](x).tanh())
        return x


def loras(seed=0):
    random = torch.Generator().manual_seed(seed)

    def pair(rank, a, b):
        return torch.randn(rank, a, generator=random), torch.randn(rank, b, generator=random)

    # Not every linear has experts, and not all have the same ranks.
    return {
        "layers.0.up": [pair(2, 4, 5), pair(3, 4, 5)],
        "layers.1.down": [pair(1, 5, 4), pair(1, 5, 4), pair(2, 5, 4)],
    }


def bare():
    torch.manual_seed(0)
    return Toy()


def adapted(seed=1, implementation="fused", **kwargs):
    model = moelora_ops.apply(
        bare(), MixConfig(loras(seed), **kwargs), implementation=implementation
    )
    torch.manual_seed(seed)
    for tensor in models.adapter_parameters(model):
        nn.init.normal_(tensor)
    model.layers[1]["down"].mask[1] = False
    companions_of(model)["scale/layers/1"].steps.fill_(seed)
    return model


def state(model):
    return {name: t for name, t in model.state_dict().items() if ".base." not in name}


def assert_bitwise(model, wanted):
    got, wanted = state(model), state(wanted)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name


def snapshot(model):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        [(name, id(module)) for name, module in model.named_modules()],
        [(name, id(t), t.requires_grad, t._version) for name, t in tensors],
    )


def test_apply_brings_companions_and_keeps_frozen_experts_frozen():
    model = adapted()
    assert list(getattr(model, COMPANIONS)) == ["scale/layers/0", "scale/layers/1"]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        "layers.0.up.gate.weight", "layers.0.up.gate.bias", "layers.1.down.gate.weight",
        "layers.1.down.gate.bias", "moelora_companions.scale/layers/0.scale",
        "moelora_companions.scale/layers/1.scale",
    }  # fmt: skip
    names = {id(p): name for name, p in model.named_parameters()}
    brought = {names[id(p)] for p in models.adapter_parameters(model)}
    assert brought == trainable | {"layers.0.up.down.0", "layers.0.up.down.1"} | {
        f"layers.1.down.down.{i}" for i in range(3)
    }
    assert model.layers[1]["down"].scales[0] is companions_of(model)["scale/layers/1"]


@pytest.mark.parametrize("present", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_is_bitwise(tmp_path, present, compiled, dtype):
    wanted = adapted().to(dtype)
    moelora_ops.save_adapter(torch.compile(wanted) if compiled else wanted, tmp_path)
    model = (adapted(2) if present else bare()).to(dtype)
    moelora_ops.load_adapter(torch.compile(model) if compiled else model, tmp_path)
    assert_bitwise(model, wanted)
    assert model.layers[0]["up"].ranks == (2, 3)
    assert not model.layers[0]["up"].down[0].requires_grad
    x = torch.randn(3, 4, dtype=dtype)
    assert torch.equal(model(x), wanted(x))


def test_a_second_generation_is_the_same_file(tmp_path):
    moelora_ops.save_adapter(adapted(), tmp_path / "first")
    model = moelora_ops.load_adapter(bare(), tmp_path / "first", implementation="reference")
    moelora_ops.save_adapter(model, tmp_path / "second")
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


def test_copies_have_companions_of_their_own():
    model = adapted()
    twin = copy.deepcopy(model)
    assert twin.layers[1]["down"].scales[0] is companions_of(twin)["scale/layers/1"]
    assert twin.layers[1]["down"].scales[0] is not model.layers[1]["down"].scales[0]


def test_fuse_attaches_again():
    model = adapted(implementation="reference")
    x = torch.randn(3, 4)
    wanted = model(x)
    moelora_ops.fuse(model)
    assert type(model.layers[0]["up"]) is MixLinear
    assert torch.equal(model(x), wanted)


def test_what_a_layer_contains_is_not_listed_twice():
    model = adapted(key="nested")
    assert [layer.name for layer in models.adapted_layers(model)] == list(loras())
    layer = model.layers[0]["up"]
    assert [(a.name, a.module) for a in models.adapted_layers(layer)] == [("", layer)]


@pytest.fixture
def saved(tmp_path):
    moelora_ops.save_adapter(adapted(), tmp_path)
    return tmp_path


def edit(path, change):
    index = json.loads((path / "adapter.json").read_text())
    change(index)
    (path / "adapter.json").write_text(json.dumps(index))


def refused(path, message, *targets):
    for model in targets or (bare(), adapted(2)):
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            moelora_ops.load_adapter(model, path)
        assert snapshot(model) == before


SCALE = "scale/layers/0"


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("wanted companions to be of type dict", lambda i: i.pop("companions")),
        ("moelora_companions.scale/layers/0: wanted a kind of .*'scale'.*, got 'router'",
         lambda i: i["companions"][SCALE].update(kind="router")),
        ("wanted kind to be of type str", lambda i: i["companions"][SCALE].pop("kind")),
        ("moelora_companions.scale/layers/0: wanted a method of",
         lambda i: i["companions"][SCALE].update(method="none")),
        ("moelora_companions.scale/layers/0: wanted a kind of .*, got 'scale'",
         lambda i: i["companions"][SCALE].update(method="mola")),
        ("arguments of moelora_companions.scale/layers/0: width: wanted at least 1, got 0",
         lambda i: i["companions"][SCALE]["arguments"].update(width=0)),
        ("arguments of moelora_companions.scale/layers/0: width is missing; depth is unknown",
         lambda i: i["companions"][SCALE].update(arguments={"depth": 1, "place": ""})),
        ("does not describe its weights file: moelora_companions.scale/layers/0.scale: wanted",
         lambda i: i["companions"][SCALE]["tensors"].update(scale=[2])),
        ("does not describe its weights file: moelora_companions.scale/layers/0.scale is not",
         lambda i: i["companions"].pop(SCALE)),
        ("arguments of layers.0.up: ranks: wanted numbers of at least 1, got .0, 3.",
         lambda i: i["modules"]["layers.0.up"]["arguments"].update(ranks=[0, 3])),
        ("is of another model: layers.0.up: wanted .*'down.0': .2, 4.* got .*'down.0': .4, 4",
         lambda i: i["modules"]["layers.0.up"]["arguments"].update(ranks=[4, 3])),
        (r"is of another model: moelora_companions.scale/layers/0: wanted .*\[1\].*, got .*\[2\]",
         lambda i: i["companions"][SCALE]["arguments"].update(width=2)),
    ],
)  # fmt: skip
def test_a_bad_index(saved, message, change):
    edit(saved, change)
    refused(saved, message, bare())


def test_companions_must_agree(saved):
    other = adapted(2)
    del getattr(other, COMPANIONS)[SCALE]
    refused(saved, f"another model: moelora_companions.{SCALE} is missing", other)
    other = adapted(2)
    getattr(other, COMPANIONS)["more"] = Scale(1, "")
    refused(saved, "another model: moelora_companions.more is not in the file", other)
    other = adapted(2)
    getattr(other, COMPANIONS)[SCALE].place = "elsewhere"
    refused(saved, "'place': 'layers.0'.*'place': 'elsewhere'", other)


def test_a_mask_is_not_cast(saved):
    safetensors = pytest.importorskip("safetensors.torch")
    import hashlib

    index = json.loads((saved / "adapter.json").read_text())
    path = saved / index["weights"]["file"]
    tensors = safetensors.load(path.read_bytes())
    data = safetensors.save(tensors | {"layers.0.up.mask": torch.tensor([0.5, 1.0])})
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    edit(saved, lambda i: i["weights"].update(bytes=len(data), sha256=digest))
    refused(saved, "layers.0.up.mask: wanted dtype torch.float32, got torch.bool")


def test_a_model_with_an_attribute_of_that_name(saved):
    model = bare()
    setattr(model, COMPANIONS, "mine")
    before = snapshot(model)
    with pytest.raises(ValueError, match="model: already has an attribute moelora_companions"):
        moelora_ops.apply(model, MixConfig(loras()))
    with pytest.raises(ValueError, match="model: already has an attribute moelora_companions"):
        moelora_ops.load_adapter(model, saved)
    assert snapshot(model) == before


def test_a_failing_companion_changes_nothing(monkeypatch):
    model = bare()
    before = snapshot(model)
    monkeypatch.setattr(Scale, "__init__", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        moelora_ops.apply(model, MixConfig(loras()))
    assert snapshot(model) == before


def test_a_companion_that_the_model_does_not_suit_changes_nothing(saved, monkeypatch):
    def unsuited(companion, model):
        assert model is root
        raise ValueError("model: wanted another")

    root = adapted(2, implementation="reference")
    monkeypatch.setattr(Scale, "check", unsuited)
    before = snapshot(root)
    with pytest.raises(ValueError, match="model: wanted another"):
        moelora_ops.fuse(root)
    assert snapshot(root) == before
    root = bare()
    before = snapshot(root)
    for change in (
        lambda: moelora_ops.apply(root, MixConfig(loras())),
        lambda: moelora_ops.load_adapter(root, saved),
    ):
        with pytest.raises(ValueError, match="model: wanted another"):
            change()
        assert snapshot(root) == before


def test_a_linear_registered_twice_needs_equal_tensors():
    model = bare()
    model.layers[1]["up"] = model.layers[0]["up"]
    one = loras()["layers.0.up"]
    equal = [(a.clone(), b.clone()) for a, b in one]
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"loras: layers.1.up is also registered elsewhere"):
        moelora_ops.apply(
            model, MixConfig({"layers.0.up": one, "layers.1.up": loras(5)["layers.0.up"]})
        )
    assert snapshot(model) == before
    moelora_ops.apply(model, MixConfig({"layers.0.up": one, "layers.1.up": equal}))
    assert model.layers[1]["up"] is model.layers[0]["up"]


def test_files_of_version_1_are_read(tmp_path):
    config = moelora_ops.MoLAConfig(3, rank=2, target_modules=["up"])
    wanted = moelora_ops.apply(bare(), config)
    moelora_ops.save_adapter(wanted, tmp_path)
    edit(tmp_path, lambda i: (i.pop("companions"), i.update(format_version=1)))
    assert_bitwise(moelora_ops.load_adapter(bare(), tmp_path), wanted)
