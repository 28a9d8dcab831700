"""Every wrong argument is refused by name, with what was wanted and what came, and nothing changes.

Non-finite activations are not refused: what they do is defined, and pinned at the end.
"""

import re

import pytest
import torch
from torch import nn

from moelora_ops import backends, functional, reference, use_backend
from moelora_ops.nn import MoLALinear

TOKENS, K, N, EXPERTS, RANK = 3, 6, 5, 4, 2
SHAPES = {
    "x": [TOKENS, K],
    "weight": [N, K],
    "bias": [N],
    "lora_down": [EXPERTS, RANK, K],
    "lora_up": [EXPERTS, RANK, N],
    "router": [EXPERTS, K],
    "base_output": [TOKENS, N],
}
# The arguments whose shape follows from the others.
CHECKED = ("weight", "bias", "lora_down", "lora_up", "router", "base_output")


def good(foreign=False):
    """Arguments that ``functional.mola`` accepts; `foreign` gives the base as its output."""
    torch.manual_seed(0)
    inputs = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    if foreign:
        inputs["weight"] = inputs["bias"] = None
    else:
        del inputs["base_output"]
    return {**inputs, "top_k": 2, "scale": 2.0}


def good_for(name):
    return good(foreign=name == "base_output")


def refused(error, message, arguments):
    """``functional.mola`` raises `error` with this `message` and touches none of its arguments."""
    tensors = [t for t in arguments.values() if isinstance(t, torch.Tensor)]
    before = [(t._version, t.clone()) for t in tensors]
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        functional.mola(**arguments)
    for t, (version, value) in zip(tensors, before, strict=True):
        assert t._version == version and t.grad_fn is None
        if not t.is_meta:
            assert torch.equal(t, value)


@pytest.mark.parametrize("foreign", [False, True])
def test_the_good_arguments_are_accepted(foreign):
    with use_backend("reference"):
        assert functional.mola(**good(foreign)).shape == (TOKENS, N)


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_dtype_unlike_x(name, dtype):
    inputs = good_for(name)
    inputs[name] = inputs[name].to(dtype)
    message = f"{name}: wanted dtype torch.float32 like x, got {dtype}; cast it or use autocast"
    refused(TypeError, message, inputs)


@pytest.mark.parametrize("name", CHECKED)
def test_device_unlike_x(name):
    inputs = good_for(name)
    inputs[name] = inputs[name].to("meta")
    refused(ValueError, f"{name}: wanted device cpu like x, got meta", inputs)


def test_x_on_another_device():
    inputs = good()
    inputs["x"] = inputs["x"].to("meta")
    refused(ValueError, "lora_down: wanted device meta like x, got cpu", inputs)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_x_is_not_floating_point(dtype):
    inputs = good()
    inputs["x"] = inputs["x"].to(dtype)
    refused(TypeError, f"x: wanted a floating-point dtype, got {dtype}", inputs)


def test_x_without_dimensions():
    inputs = {**good(), "x": torch.tensor(1.0)}
    refused(ValueError, "x: wanted shape [..., in_features], got a scalar", inputs)


@pytest.mark.parametrize("shape", [(TOKENS, K + 1), (K, TOKENS), (0,)])
def test_x_with_other_features(shape):
    inputs = {**good(), "x": torch.randn(shape)}
    message = f"x: wanted last dimension {K} like lora_down's, got {shape[-1]}"
    refused(ValueError, message, inputs)


@pytest.mark.parametrize("name", ["weight", "bias", "router", "base_output"])
@pytest.mark.parametrize("change", ["longer", "shorter", "another dimension"])
def test_shape(name, change):
    inputs, wanted = good_for(name), SHAPES[name]
    last = wanted[-1] + {"longer": 1, "shorter": -1}.get(change, 0)
    shape = [1, *wanted] if change == "another dimension" else [*wanted[:-1], last]
    inputs[name] = torch.randn(shape)
    refused(ValueError, f"{name}: wanted shape {wanted}, got {shape}", inputs)


def test_router_of_other_experts():
    inputs = {**good(), "router": torch.randn(EXPERTS + 1, K)}
    message = f"router: wanted shape {[EXPERTS, K]}, got {[EXPERTS + 1, K]}"
    refused(ValueError, message, inputs)


def test_base_output_of_other_leading_dimensions():
    inputs = {**good(foreign=True), "base_output": torch.randn(1, TOKENS, N)}
    message = f"base_output: wanted shape {[TOKENS, N]}, got {[1, TOKENS, N]}"
    refused(ValueError, message, inputs)


@pytest.mark.parametrize("shape", [[EXPERTS * RANK, K], [K], [1, EXPERTS, RANK, K]])
def test_lora_down_dimensions(shape):
    inputs = {**good(), "lora_down": torch.randn(shape)}
    refused(ValueError, f"lora_down: wanted shape [E, r, in_features], got {shape}", inputs)


@pytest.mark.parametrize(
    "shape, wanted",
    [
        ([0, RANK, K], "at least one expert, got E = 0"),
        ([EXPERTS, 0, K], "rank of at least 1, got r = 0"),
    ],
)
def test_no_experts_and_rank_zero(shape, wanted):
    inputs = {**good(), "lora_down": torch.randn(shape)}
    refused(ValueError, f"lora_down: wanted {wanted}", inputs)


@pytest.mark.parametrize(
    "shape", [[EXPERTS, RANK * N], [EXPERTS + 1, RANK, N], [EXPERTS, RANK + 1, N]]
)
def test_lora_up_unlike_lora_down(shape):
    inputs = {**good(), "lora_up": torch.randn(shape)}
    wanted = f"lora_up: wanted shape [{EXPERTS}, {RANK}, out_features], got {shape}"
    refused(ValueError, wanted, inputs)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "router", "base_output"])
def test_no_tensor(name):
    inputs = {**good_for(name), name: [1.0]}
    refused(TypeError, f"{name}: wanted a tensor, got list", inputs)


@pytest.mark.parametrize(
    "name, shape",
    [("lora_down", "[E, r, in_features]"), ("lora_up", f"[{EXPERTS}, {RANK}, out_features]")],
)
def test_no_tensor_of_three_dimensions(name, shape):
    inputs = {**good(), name: None}
    refused(ValueError, f"{name}: wanted shape {shape}, got NoneType", inputs)


def test_no_base():
    inputs = {**good(), "weight": None}
    refused(TypeError, "weight: wanted a tensor, got NoneType", inputs)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_two_bases(name):
    inputs = {**good(foreign=True), name: torch.randn(SHAPES[name])}
    message = "base_output: replaces weight and bias; pass either, not both"
    refused(ValueError, message, inputs)


TOP_KS = [0, -1, EXPERTS + 1, 2.0, True, None]
DROPOUTS = [-0.1, 1.0, 1, 2.5, float("nan"), "0.1", None, True, [0.5]]
NOT_FINITE = [float("nan"), float("inf"), -float("inf"), "2", None, True, 2j, torch.tensor(2.0)]


@pytest.mark.parametrize("top_k", TOP_KS)
def test_top_k(top_k):
    message = f"top_k: wanted an int in 1..num_experts={EXPERTS}, got {top_k!r}"
    refused(ValueError, message, {**good(), "top_k": top_k})


@pytest.mark.parametrize("dropout", DROPOUTS)
def test_dropout(dropout):
    message = f"dropout: wanted a probability in [0, 1), got {dropout!r}"
    refused(ValueError, message, {**good(), "dropout": dropout, "seed": torch.tensor([1])})


@pytest.mark.parametrize("scale", NOT_FINITE, ids=str)
def test_scale(scale):
    refused(ValueError, f"scale: wanted a finite number, got {scale!r}", {**good(), "scale": scale})


def test_dropout_mode():
    message = "dropout_mode: wanted one of ('token', 'expert'), got 'row'"
    refused(ValueError, message, {**good(), "dropout_mode": "row"})


@pytest.mark.parametrize(
    "seed, got",
    [
        (None, "NoneType"),
        (3, "int"),
        (torch.tensor([1.0]), "torch.float32 [1]"),
        (torch.tensor([1, 2]), "torch.int64 [2]"),
        (torch.tensor([1], dtype=torch.int32), "torch.int32 [1]"),
    ],
    ids=str,
)
def test_seed(seed, got):
    message = f"seed: wanted an int64 tensor of one element, as dropout > 0, got {got}"
    refused(ValueError, message, {**good(), "dropout": 0.5, "seed": seed})


def test_seed_on_another_device():
    seed = torch.tensor([1], device="meta")
    message = "seed: wanted device cpu like x, got meta"
    refused(ValueError, message, {**good(), "dropout": 0.5, "seed": seed})


def test_strategy():
    message = "strategy: wanted one of ('auto', 'stacked', 'grouped'), got 'sorted'"
    refused(ValueError, message, {**good(), "strategy": "sorted"})


# The layers.


def constructor_refused(cls, error, message, base, **options):
    """The constructor raises `error` with `message` and has not frozen the base."""
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        cls(base, **{"num_experts": EXPERTS, **options})
    if isinstance(base, nn.Module):
        assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("name", ["num_experts", "rank"])
@pytest.mark.parametrize("value", [0, -2, 2.0, True, None, "8"])
def test_layer_counts(name, value):
    message = f"{name}: wanted an int of at least 1, got {value!r}"
    constructor_refused(MoLALinear, ValueError, message, nn.Linear(K, N), **{name: value})


@pytest.mark.parametrize("top_k", TOP_KS)
def test_layer_top_k(top_k):
    message = f"top_k: wanted an int in 1..num_experts={EXPERTS}, got {top_k!r}"
    constructor_refused(MoLALinear, ValueError, message, nn.Linear(K, N), top_k=top_k)


@pytest.mark.parametrize("dropout", DROPOUTS)
def test_layer_dropout(dropout):
    message = f"dropout: wanted a probability in [0, 1), got {dropout!r}"
    constructor_refused(MoLALinear, ValueError, message, nn.Linear(K, N), dropout=dropout)


@pytest.mark.parametrize("alpha", NOT_FINITE, ids=str)
def test_layer_alpha(alpha):
    message = f"alpha: wanted a finite number, got {alpha!r}"
    constructor_refused(MoLALinear, ValueError, message, nn.Linear(K, N), alpha=alpha)


def test_layer_dropout_mode():
    message = "dropout_mode: wanted one of ('token', 'expert'), got 'row'"
    constructor_refused(MoLALinear, ValueError, message, nn.Linear(K, N), dropout_mode="row")


def test_layer_renormalize():
    message = "renormalize: wanted a bool, got 'no'"
    constructor_refused(MoLALinear, TypeError, message, nn.Linear(K, N), renormalize="no")


def test_layer_base_is_no_module():
    message = "base: wanted a torch.nn.Module, got Tensor"
    constructor_refused(MoLALinear, TypeError, message, torch.zeros(N, K))


@pytest.mark.parametrize("name", ["in_features", "out_features"])
@pytest.mark.parametrize("value", [None, 6.0])
def test_layer_base_without_features(name, value):
    base = nn.Linear(K, N)
    delattr(base, name)
    if value is not None:
        setattr(base, name, value)
    message = f"base: wanted a layer with an integer {name}, got Linear"
    constructor_refused(MoLALinear, TypeError, message, base)


def test_layer_base_is_already_adapted():
    adapted = MoLALinear(nn.Linear(K, N), EXPERTS)
    with pytest.raises(TypeError, match=r"^base: is already adapted \(MoLALinear\)$"):
        MoLALinear(adapted, EXPERTS)


@pytest.mark.parametrize("experts, top_k", [(EXPERTS, 0), (EXPERTS, EXPERTS + 1), (0, 1), (1, 2)])
def test_reference_layer_top_k(experts, top_k):
    message = f"top_k: wanted 1..num_experts={experts}, got {top_k}"
    constructor_refused(
        reference.MoLALinear, ValueError, message, nn.Linear(K, N), num_experts=experts, top_k=top_k
    )


def test_layer_input():
    layer = MoLALinear(nn.Linear(K, N), EXPERTS)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    layer.routing = routing = functional.Routing(torch.zeros(EXPERTS), torch.zeros(EXPERTS))
    with pytest.raises(ValueError, match=rf"^x: wanted last dimension {K} .* got {K + 1}$"):
        layer(torch.randn(TOKENS, K + 1))
    with pytest.raises(TypeError, match=r"^lora_down: wanted dtype torch.float64 like x"):
        layer(torch.randn(TOKENS, K, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^lora_down: wanted device meta like x, got cpu$"):
        layer(torch.randn(TOKENS, K, device="meta"))
    assert layer.routing is routing
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


# Non-finite activations: a row of NaN, and not one other bit.

AVAILABLE = [name for name, missing in backends.available() if not missing]
SICK = 3  # the token that is poisoned


@pytest.fixture(params=AVAILABLE)
def backend(request):
    with use_backend(request.param):
        yield request.param


class Poisoned:
    """Tokens of which one can be made non-finite, under experts that do not see feature 5.

    The base comes as an output, which stays finite: what is NaN in y came through the mixture.
    """

    def __init__(self, tokens, dtype, top_k, **options):
        torch.manual_seed(0)
        self.tokens, self.dtype, self.top_k, self.options = tokens, dtype, top_k, options
        self.x = torch.randn(tokens, 16, dtype=dtype)
        self.down, self.up = (torch.randn(5, 3, n, dtype=dtype) for n in (16, 12))
        self.router = torch.randn(5, 16, dtype=dtype)
        self.base_output = torch.randn(tokens, 12, dtype=dtype)
        # Feature 5 reaches the router only, and is zero in every token.
        self.x[:, 5] = 0
        self.down[:, :, 5] = 0

    def arm(self, expert, sign):
        """A router that overflows the logit of `expert` to ±inf if feature 5 is ``large``."""
        self.large = torch.finfo(self.dtype).max ** 0.5 * 16
        self.router[:, 5] = 0
        self.router[expert, 5] = sign * self.large

    def run(self):
        """y, routing and the gradient of x."""
        x = self.x.clone().requires_grad_()
        y, routing = functional.mola(
            x, None, None, self.down, self.up, self.router, self.top_k, 2.0,
            base_output=self.base_output, return_routing=True, **self.options,
        )  # fmt: skip
        y.backward(torch.ones_like(y))
        return y.detach(), routing, x.grad


def assert_only_the_sick_token_is_nan(case, clean):
    y, routing, dx = case.run()
    others = torch.arange(case.tokens) != SICK
    for name, got, want in (("y", y, clean[0]), ("dx", dx, clean[2])):
        assert want.isfinite().all(), name
        assert got[SICK].isnan().all(), name
        assert torch.equal(got[others], want[others]), name
    # The sick token still chose as many experts, and existing ones.
    assert routing.counts.sum() == case.tokens * case.top_k


# A handful of tokens takes other kernels than many do.
sizes = pytest.mark.parametrize("tokens", [9, 70], ids="T={}".format)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
routes = pytest.mark.parametrize(
    "top_k, options",
    [
        pytest.param(2, {}, id="k=2"),
        pytest.param(2, {"renormalize": False}, id="not renormalised"),
        pytest.param(2, {"strategy": "stacked"}, id="stacked"),
        pytest.param(2, {"strategy": "grouped"}, id="grouped"),
        pytest.param(5, {}, id="k=E"),
        pytest.param(2, {"dropout": 0.3, "seed": torch.tensor([11])}, id="dropout"),
    ],
)


@sizes
@dtypes
@routes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_activation(backend, tokens, dtype, top_k, options, value):
    case = Poisoned(tokens, dtype, top_k, **options)
    clean = case.run()
    case.x[SICK, 7] = value
    assert_only_the_sick_token_is_nan(case, clean)


@sizes
@dtypes
@routes
@pytest.mark.parametrize("expert", [0, 2, 4])
def test_infinite_logit(backend, tokens, dtype, top_k, options, expert):
    case = Poisoned(tokens, dtype, top_k, **options)
    case.arm(expert, +1)
    clean = case.run()
    case.x[SICK, 5] = case.large
    assert_only_the_sick_token_is_nan(case, clean)


@sizes
@dtypes
@routes
@pytest.mark.parametrize("expert", [0, 2, 4])
def test_negative_infinite_logit_is_a_probability_of_zero(
    backend, tokens, dtype, top_k, options, expert
):
    case = Poisoned(tokens, dtype, top_k, **options)
    case.arm(expert, -1)
    case.x[SICK, 5] = case.large
    y, routing, dx = case.run()
    assert y.isfinite().all() and dx.isfinite().all()
    assert routing.prob_sums.isfinite().all()
    # What the expert would add makes no difference.
    case.up[expert] = 0
    assert torch.equal(case.run()[0][SICK], y[SICK])


@sizes
@dtypes
@routes
@pytest.mark.parametrize("sign", [1, -1], ids=["+NaN", "-NaN"])
def test_nan_router_row_spoils_every_token(backend, tokens, dtype, top_k, options, sign):
    """The softmax runs over all logits: kernels that compute the chosen experts only see it too."""
    case = Poisoned(tokens, dtype, top_k, **options)
    case.router[2] = torch.tensor(sign).mul(float("nan")).to(dtype)
    y, routing, _ = case.run()
    assert y.isnan().all()
    assert routing.counts.sum() == tokens * top_k


def test_layer_passes_non_finite_tokens_through(backend):
    torch.manual_seed(0)
    layer = MoLALinear(nn.Linear(16, 12), 5)
    nn.init.normal_(layer.lora_up)
    x = torch.randn(2, 4, 16)
    clean = layer(x)
    x[1, 2, 3] = float("nan")
    y = layer(x)
    assert y[1, 2].isnan().all()
    y[1, 2] = clean[1, 2]
    assert torch.equal(y, clean)
    assert layer.routing.counts.sum() == 8 * layer.top_k
