"""The MoLA layer drops in: training, autocast, checkpointing, compile and foreign bases."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moelora_ops import reference, use_backend
from moelora_ops.backends import extension
from moelora_ops.nn import MoLALinear

pytestmark = pytest.mark.usefixtures("backend")


def make_layer(dtype=torch.float32, bias=True, **options) -> MoLALinear:
    torch.manual_seed(0)
    layer = MoLALinear(nn.Linear(24, 40, bias=bias), 4, rank=3, **options)
    nn.init.normal_(layer.lora_up)
    return layer.to(dtype)


def gradients(layer, x, dy):
    x = x.detach().requires_grad_()
    y = layer(x)
    trained = [p for p in layer.parameters() if p.requires_grad]
    return y.detach(), *torch.autograd.grad(y, [x, *trained], dy)


def assert_all_close(got, want):
    """Equal up to the rounding of a sum of some dozen terms of the largest value's size."""
    for g, w in zip(got, want, strict=True):
        largest = w.abs().max().item() if w.numel() else 0.0
        torch.testing.assert_close(g, w, rtol=0, atol=16 * torch.finfo(w.dtype).eps * largest)


def test_same_constructor_and_state_dict_as_the_reference():
    fused, literal = make_layer(bias=True), reference.MoLALinear(nn.Linear(24, 40), 4, rank=3)
    assert fused.state_dict().keys() == literal.state_dict().keys()
    literal.load_state_dict(fused.state_dict())
    x = torch.randn(2, 5, 24)
    assert_all_close(
        gradients(fused, x, torch.ones(2, 5, 40)), gradients(literal, x, torch.ones(2, 5, 40))
    )


def test_starts_equal_to_its_base():
    base = nn.Linear(24, 40).double()
    layer = MoLALinear(base, 4)
    x = torch.randn(7, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), base(x))
    assert not base.weight.requires_grad and layer.lora_down.requires_grad
    assert layer.lora_down.dtype == torch.float64


@pytest.mark.parametrize("lead", ((), (1,), (0,), (3,), (2, 0), (2, 3), (2, 1, 3)))
def test_any_leading_shape(lead):
    layer = make_layer()
    x = torch.randn(*lead, 24, requires_grad=True)
    y = layer(x)
    assert y.shape == (*lead, 40)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is not None for p in (layer.lora_down, layer.lora_up, layer.router))
    rows = [layer(row) for row in x.detach().reshape(-1, 24)]
    if rows:
        torch.testing.assert_close(y.detach().reshape(-1, 40), torch.stack(rows).detach())


@pytest.mark.parametrize(
    "view",
    (
        lambda t: t.transpose(0, 1),
        lambda t: t[::2],
        lambda t: t[..., ::2],
        lambda t: t[..., 3:27],
        lambda t: t.permute(2, 0, 1),
        lambda t: t[:1].expand(3, -1, -1),
    ),
)
def test_non_contiguous_inputs(view):
    x = view(torch.randn(30, 26, 48))[..., :24]
    layer = make_layer()
    dy = torch.randn(*x.shape[:-1], 80)[..., ::2]
    assert_all_close(gradients(layer, x, dy), gradients(layer, x.contiguous(), dy.contiguous()))


def test_inputs_are_left_alone():
    layer = make_layer()
    x = torch.randn(9, 24)
    before, weight = x.clone(), layer.base.weight.clone()
    layer(x).sum().backward()
    assert torch.equal(x, before) and torch.equal(weight, layer.base.weight)


def test_unfrozen_base_gets_its_gradient():
    layer = make_layer()
    layer.base.requires_grad_(True)
    x = torch.randn(9, 24, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.base.weight.grad, x.detach().sum(0).expand(40, -1))
    torch.testing.assert_close(layer.base.bias.grad, torch.full((40,), 9.0))


def test_frozen_experts_still_pass_dx():
    layer = make_layer()
    x = torch.randn(9, 24)
    want = gradients(layer, x, torch.ones(9, 40))[1]
    for p in layer.parameters():
        p.requires_grad_(False)
    got = gradients(layer, x, torch.ones(9, 40))[1]
    torch.testing.assert_close(got, want)


def test_input_without_gradient():
    layer = make_layer()
    x = torch.randn(9, 24)
    _, _, *want = gradients(layer, x, torch.ones(9, 40))
    layer(x).sum().backward()
    assert_all_close([layer.lora_down.grad, layer.lora_up.grad, layer.router.grad], want)


def test_top_1_renormalized_has_no_router_gradient_and_switch_style_has():
    x = torch.randn(50, 24, dtype=torch.float64)
    for renormalize in (True, False):
        layer = make_layer(torch.float64, top_k=1, renormalize=renormalize)
        layer(x).square().sum().backward()
        # The reference finds the zero up to float64 rounding.
        assert bool(layer.router.grad.abs().max() > 1e-6) is not renormalize


# ---------------------------------------------------------------- foreign bases


class Foreign(nn.Module):
    """A layer that is no nn.Linear and saves its own output for backward."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 24, 40
        self.inner = nn.Linear(24, 40)

    def forward(self, x):
        return self.inner(x).tanh()


def test_foreign_base():
    torch.manual_seed(0)
    layer = MoLALinear(Foreign(), 4, rank=3)
    nn.init.normal_(layer.lora_up)
    literal = reference.MoLALinear(layer.base, 4, rank=3)
    literal.load_state_dict(layer.state_dict())
    x, dy = torch.randn(2, 9, 24), torch.randn(2, 9, 40)
    assert_all_close(gradients(layer, x, dy), gradients(literal, x, dy))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), literal(x))


class Passes(nn.Module):
    """Returns its input: adding to its output in place would corrupt it."""

    in_features = out_features = 24

    def forward(self, x):
        return x


@pytest.mark.parametrize("train", (False, True))
def test_base_that_returns_its_input(train):
    layer = MoLALinear(Passes(), 4, rank=3, device="cpu")
    nn.init.normal_(layer.lora_up)
    x = torch.randn(9, 24)
    before = x.clone()
    with torch.set_grad_enabled(train):
        y = layer(x)
    assert torch.equal(x, before) and not torch.equal(y, before)


def test_hooks_on_the_base_run():
    layer = make_layer()
    x = torch.randn(9, 24)
    want = layer(x) + 1
    layer.base.register_forward_hook(lambda module, args, output: output + 1)
    torch.testing.assert_close(layer(x), want)


# ---------------------------------------------------------------- around the layer


@pytest.mark.parametrize("mode", ("token", "expert"))
def test_dropout(mode):
    layer = make_layer(dropout=0.5, dropout_mode=mode)
    x = torch.randn(9, 24)
    torch.manual_seed(7)
    first = layer(x)
    assert not torch.equal(first, layer(x))
    torch.manual_seed(7)
    assert torch.equal(first, layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    literal = reference.MoLALinear(layer.base, 4, rank=3, dropout=0.5, dropout_mode=mode)
    literal.load_state_dict(layer.state_dict())
    layer.train()
    outputs = []
    for module in (layer, literal):
        torch.manual_seed(7)
        outputs.append(gradients(module, x, torch.ones(9, 40)))
    assert_all_close(*outputs)


@pytest.mark.parametrize("low", (torch.bfloat16, torch.float16), ids=str)
def test_autocast(low):
    layer = make_layer()
    x = torch.randn(9, 24, requires_grad=True)
    with torch.autocast("cpu", dtype=low):
        y = layer(x)
    assert y.dtype == low
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters() if p.requires_grad)
    want = make_layer(low)(x.detach().to(low))
    torch.testing.assert_close(y, want)


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("dropout", (0.0, 0.3))
def test_gradient_checkpointing(reentrant, dropout):
    layer = make_layer(dropout=dropout)
    x, dy = torch.randn(9, 24), torch.randn(9, 40)
    torch.manual_seed(3)
    want = gradients(layer, x, dy)[1:]
    torch.manual_seed(3)
    leaf = x.requires_grad_()
    checkpoint(layer, leaf, use_reentrant=reentrant).backward(dy)
    got = [leaf.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]
    assert_all_close(got, want)


def test_copies_and_pickles_after_a_call():
    layer = make_layer()
    x = torch.randn(9, 24)
    y = layer(x)
    torch.testing.assert_close(copy.deepcopy(layer)(x), y)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.load(buffer, weights_only=False)(x), y)


def test_routing_is_recorded():
    layer = make_layer()
    layer(torch.randn(2, 9, 24))
    assert layer.routing.counts.sum() == 2 * 9 * 2
    torch.testing.assert_close(layer.routing.prob_sums.sum(), torch.tensor(18.0))


@pytest.mark.parametrize("dropout", (0.0, 0.3))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_compiles_fullgraph_with_dynamic_shapes(dtype, dropout, backend):
    layer = make_layer(dtype, dropout=dropout)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (9, 33, 20):
        x, dy = torch.randn(2, tokens, 24).to(dtype), torch.randn(2, tokens, 40).to(dtype)
        torch.manual_seed(1)
        want = gradients(layer, x, dy)
        torch.manual_seed(1)
        got = gradients(compiled, x, dy)
        assert_all_close(got, want)
    assert layer.routing.counts.sum() == 2 * 20 * 2


def test_compiles_with_inductor(backend):
    """One graph, forward and backward, through the default compiler."""
    layer = make_layer()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    x, dy = torch.randn(9, 24), torch.randn(9, 40)
    assert_all_close(gradients(compiled, x, dy), gradients(layer, x, dy))


def test_compiled_foreign_base(backend):
    layer = MoLALinear(Foreign(), 4, rank=3)
    nn.init.normal_(layer.lora_up)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(9, 24), torch.randn(9, 40)
    assert_all_close(gradients(compiled, x, dy), gradients(layer, x, dy))


def test_backends_agree_inside_a_model():
    if why := extension.why_missing():
        pytest.skip(why)
    model = nn.Sequential(
        make_layer(), nn.GELU(), MoLALinear(nn.Linear(40, 24), 3, rank=2)
    ).double()
    nn.init.normal_(model[2].lora_up)
    x, dy = torch.randn(5, 24, dtype=torch.float64), torch.randn(5, 24, dtype=torch.float64)
    results = []
    for name in ("reference", "cpu"):
        with use_backend(name):
            results.append(gradients(model, x, dy))
    assert_all_close(*results)
