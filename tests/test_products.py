"""The public products: shrink, expand, and expand onto a frozen linear."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moelora_ops import functional
from moelora_ops.backends import extension
from moelora_ops.bench import numerics
from moelora_ops.nn import MoLALinear

BATCH, LENGTH, K, N, R = 2, 21, 24, 20, 11
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORMS = ("linear", "without bias", "base_output")
pytestmark = pytest.mark.usefixtures("backend")


def inputs(dtype=torch.float64, form="linear"):
    """Arguments of :func:`functional.linear_expand`, all with gradients."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {
        "x": torch.randn(BATCH, LENGTH, K),
        "weight": torch.randn(N, K) / K**0.5,
        "bias": torch.randn(N),
        "hidden": torch.randn(BATCH, LENGTH, R),
        "rows": torch.randn(R, N) / R**0.5,
        "base_output": torch.randn(BATCH, LENGTH, N),
    }
    if form == "base_output":
        tensors["weight"] = tensors["bias"] = None
    else:
        tensors["base_output"] = None
    if form == "without bias":
        tensors["bias"] = None
    return {
        name: None if t is None else t.to(wide if name == "hidden" else dtype).requires_grad_()
        for name, t in tensors.items()
    }


def plain(x, weight, bias, hidden, rows, base_output):
    y = F.linear(x, weight, bias) if base_output is None else base_output
    return y + hidden.to(rows.dtype) @ rows


def run(function, tensors):
    """y and the gradient of everything that y depends on."""
    leaves = {n: t.detach().requires_grad_() for n, t in tensors.items() if t is not None}
    y = function(**{**dict.fromkeys(tensors), **leaves})
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape).to(y.dtype))
    return {"y": y.detach(), **{n: t.grad for n, t in leaves.items() if t.grad is not None}}


@pytest.mark.parametrize("choice", ("own", "library"))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_expand_within_its_budget(dtype, form, choice):
    tensors = inputs(dtype, form)
    wide = {n: None if t is None else t.detach().double() for n, t in tensors.items()}
    exact, same_dtype = run(plain, wide), run(plain, tensors)
    with extension.use_linear(choice):
        got = run(functional.linear_expand, tensors)
    assert got.keys() == exact.keys()
    for name, tensor in got.items():
        error = numerics.error(tensor, exact[name])
        limit = numerics.budget(numerics.error(same_dtype[name], exact[name]), dtype)
        assert error.rms <= limit.rms and error.max <= limit.max, name


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form):
    tensors = inputs(form=form)
    names = [name for name, t in tensors.items() if t is not None]
    fixed = dict.fromkeys(tensors)

    def function(*values):
        return functional.linear_expand(**{**fixed, **dict(zip(names, values, strict=True))})

    assert torch.autograd.gradcheck(function, [tensors[name] for name in names])
    leaves = [inputs()[name] for name in ("hidden", "rows", "base_output", "x")]
    hidden, rows, x = leaves[0], leaves[1], leaves[3]
    y = inputs(form="base_output")["base_output"]
    assert torch.autograd.gradcheck(functional.expand, (hidden, rows, y))
    assert torch.autograd.gradcheck(functional.shrink, (x, torch.randn(R, K).double()))


def test_without_a_graph_the_bits_are_the_same():
    for form in FORMS:
        tensors = inputs(torch.float32, form)
        y = functional.linear_expand(**tensors)
        with torch.no_grad():
            assert torch.equal(functional.linear_expand(**tensors), y)


def test_layouts():
    """x, hidden and rows of any strides give what contiguous ones give."""
    tensors = {n: None if t is None else t.detach() for n, t in inputs().items()}
    want = functional.linear_expand(**tensors)
    for name in ("x", "hidden", "rows"):
        t = tensors[name]
        strided = t.transpose(0, -1).contiguous().transpose(0, -1)
        spaced = t.repeat_interleave(2, -1)[..., ::2]
        for other in (strided, spaced):
            assert not other.is_contiguous()
            torch.testing.assert_close(functional.linear_expand(**{**tensors, name: other}), want)


def test_base_output_is_left_alone():
    tensors = inputs(torch.float32, "base_output")
    before = tensors["base_output"].detach().clone()
    y = functional.linear_expand(**tensors)
    assert torch.equal(tensors["base_output"], before)
    assert y.data_ptr() != tensors["base_output"].data_ptr()


def test_autocast():
    tensors = inputs(torch.float32)
    low = {n: t if t is None or n == "hidden" else t.bfloat16() for n, t in tensors.items()}
    want = functional.linear_expand(**low)
    with torch.autocast("cpu", torch.bfloat16):
        got = functional.linear_expand(**tensors)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)


@pytest.mark.parametrize("form", FORMS)
def test_compiles_whole(form):
    tensors = inputs(torch.float32, form)
    want = run(functional.linear_expand, tensors)
    torch._dynamo.reset()
    compiled = torch.compile(functional.linear_expand, fullgraph=True, backend="aot_eager")
    for name, got in run(compiled, tensors).items():
        torch.testing.assert_close(got, want[name], msg=name)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"x": None}, TypeError, "x: wanted a tensor, got NoneType"),
        ({"x": torch.ones(BATCH, LENGTH, K, dtype=torch.int64)}, TypeError,
         "x: wanted a floating-point dtype, got torch.int64"),
        ({"x": torch.ones(3, K)}, ValueError, f"hidden: wanted shape [3, {R}], got"),
        ({"weight": torch.ones(N, K + 1)}, ValueError,
         f"weight: wanted shape [{N}, {K}], got [{N}, {K + 1}]"),
        ({"weight": None}, TypeError, "weight: wanted a tensor, got NoneType"),
        ({"bias": torch.ones(N + 1)}, ValueError, f"bias: wanted shape [{N}], got [{N + 1}]"),
        ({"rows": torch.ones(R, 2, N)}, ValueError, "rows: wanted shape [R, out_features], got"),
        ({"rows": torch.ones(R, N).half()}, TypeError,
         "rows: wanted dtype torch.float32 like x, got torch.float16"),
        ({"rows": torch.ones(R + 1, N)}, ValueError,
         f"hidden: wanted shape {[BATCH, LENGTH, R + 1]}, got {[BATCH, LENGTH, R]}"),
        ({"hidden": torch.ones(BATCH, LENGTH, R).half()}, TypeError,
         "hidden: wanted dtype torch.float32 beside torch.float32, got torch.float16"),
        ({"hidden": None}, TypeError, "hidden: wanted a tensor, got NoneType"),
        ({"base_output": torch.ones(BATCH, LENGTH, N)}, ValueError,
         "base_output: replaces weight and bias; pass either, not both"),
    ],
)  # fmt: skip
def test_bad_input(changes, error, message):
    with pytest.raises(error) as raised:
        functional.linear_expand(**{**inputs(torch.float32), **changes})
    assert str(raised.value).startswith(message)


HOOKS = {
    "forward": nn.Module.register_forward_hook,
    "forward pre": nn.Module.register_forward_pre_hook,
    "backward": nn.Module.register_full_backward_hook,
    "backward pre": nn.Module.register_full_backward_pre_hook,
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_a_base_are_run(kind):
    """A hook sees the base's call, in every layer; without one the base is not called."""
    layer = MoLALinear(nn.Linear(K, N), num_experts=2, rank=3, top_k=1)
    x, calls = torch.randn(4, K, requires_grad=True), []
    before = layer(x)
    handle = HOOKS[kind](layer.base, lambda *args: calls.append(kind))
    y = layer(x)
    y.sum().backward()
    assert calls == [kind]
    torch.testing.assert_close(y, before)
    handle.remove()
    layer(x).sum().backward()
    assert calls == [kind]
