"""LoRA: the E = 1 case, against the formula, its reference and PEFT."""

import math

import pytest
import torch
from torch import nn

import moelora_ops
from moelora_ops import LoRAConfig, reference
from moelora_ops.nn import LoRALinear

pytestmark = pytest.mark.usefixtures("backend")


def make_layer(cls=LoRALinear, dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = cls(nn.Linear(12, 9).to(dtype), 3, **options)
    nn.init.normal_(layer.lora_B)
    return layer


def gradients(layer, x, dy):
    x = x.detach().requires_grad_()
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y, [x, layer.lora_A, layer.lora_B], dy)


def assert_all_close(got, want):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("rslora", (False, True))
@pytest.mark.parametrize("lead", ((), (0,), (1,), (17,), (2, 3)))
def test_the_formula(lead, rslora):
    layer = make_layer(alpha=5.0, rslora=rslora)
    assert layer.scale == 5.0 / (math.sqrt(3) if rslora else 3)
    x, dy = (torch.randn(*lead, n, dtype=torch.float64) for n in (12, 9))
    y, dx, da, db = gradients(layer, x, dy)
    A, B, scale = layer.lora_A, layer.lora_B, layer.scale
    torch.testing.assert_close(y, layer.base(x) + scale * x @ A.T @ B.T)
    torch.testing.assert_close(dx, dy @ layer.base.weight + scale * dy @ B @ A)
    rows, drows = x.reshape(-1, 12), dy.reshape(-1, 9)
    torch.testing.assert_close(da, scale * (drows @ B).T @ rows)
    torch.testing.assert_close(db, scale * drows.T @ (rows @ A.T))


@pytest.mark.parametrize("dropout", (0.0, 0.4))
def test_the_fused_layer_is_the_reference(dropout):
    literal = make_layer(reference.LoRALinear, dropout=dropout)
    fused = LoRALinear.from_reference(literal)
    assert fused.lora_A is literal.lora_A and fused.lora_B is literal.lora_B
    assert fused.state_dict().keys() == literal.state_dict().keys()
    x, dy = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 5, 9, dtype=torch.float64)
    results = []
    for layer in (fused, literal):
        torch.manual_seed(3)
        results.append(gradients(layer, x, dy))
    assert_all_close(*results)


def test_dropout_thins_the_expert_only_in_training():
    layer = make_layer(dropout=0.25)
    nn.init.zeros_(layer.base.weight), nn.init.zeros_(layer.base.bias)
    x = torch.randn(4000, 12, dtype=torch.float64)
    thinned = layer(x)
    whole = layer.eval()(x)
    assert torch.equal(whole, layer(x)) and not torch.equal(thinned, whole)
    # Unbiased: the regression of the thinned on the whole output has slope 1.
    slope = (thinned * whole).sum() / whole.square().sum()
    assert abs(slope - 1) < 0.03


def test_starts_equal_to_its_base():
    base = nn.Linear(12, 9)
    layer = LoRALinear(base)
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), base(x))
    assert not base.weight.requires_grad and layer.lora_A.any()


def test_wide_parameters_of_a_narrow_model():
    """PEFT keeps them in float32 beside a model in bfloat16."""
    layer = make_layer(dtype=torch.bfloat16, alpha=3.0).float()
    layer.base.bfloat16()
    x = torch.randn(5, 12).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32
    exact = layer.base.double()(x.double()) + x.double() @ layer.lora_A.double().T @ (
        layer.lora_B.double().T
    )
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=0.02 * exact.abs().max().item())


def test_autocast():
    layer = make_layer(dtype=torch.float32)
    x = torch.randn(5, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.1)


def test_compiles_fullgraph():
    layer = make_layer(dropout=0.3)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (4, 9):
        x, dy = (torch.randn(tokens, n, dtype=torch.float64) for n in (12, 9))
        results = []
        for module in (layer, compiled):
            torch.manual_seed(1)
            results.append(gradients(module, x, dy))
        assert_all_close(*results)


def test_whole_models(tmp_path):
    pytest.importorskip("safetensors")
    model = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4))
    config = LoRAConfig(2, dropout=0.1, rslora=True, target_modules=("0", "2"))
    moelora_ops.apply(model, config, implementation="reference")
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    moelora_ops.fuse(model.eval())
    assert all(isinstance(model[i], LoRALinear) for i in (0, 2))
    moelora_ops.save_adapter(model, tmp_path)
    fresh = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4)).eval()
    for i in (0, 2):
        fresh[i].load_state_dict(model[i].base.state_dict())
    moelora_ops.load_adapter(fresh, tmp_path)
    x = torch.randn(5, 12)
    assert torch.equal(fresh(x), model(x)) and fresh[0].rslora


@pytest.mark.parametrize(
    "options, error, message",
    (
        ({"rank": 0}, ValueError, "rank: wanted an int of at least 1, got 0"),
        ({"rank": 2.0}, ValueError, "rank: wanted an int of at least 1, got 2.0"),
        ({"alpha": math.inf}, ValueError, "alpha: wanted a finite number, got inf"),
        ({"dropout": 1.0}, ValueError, "dropout: wanted a probability"),
        ({"rslora": 1}, TypeError, "rslora: wanted a bool, got 1"),
    ),
)
def test_bad_arguments(options, error, message):
    base = nn.Linear(3, 3)
    with pytest.raises(error, match=message):
        LoRALinear(base, **options)
    assert base.weight.requires_grad
    with pytest.raises(error, match=message):
        LoRAConfig(**options)


def test_shared_parameters_must_fit():
    base = nn.Linear(3, 4)
    a, b = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"lora_B: wanted \[4, 2\], got \[3, 2\]"):
        LoRALinear.sharing(base, a, b, 1.0)
