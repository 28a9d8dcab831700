"""Whose product the frozen linear of a CPU is: the choice, its limits, and a layer under each."""

import os
import subprocess
import sys

import pytest
import torch

import moelora_ops
from moelora_ops import autograd, ops
from moelora_ops.backends import extension
from moelora_ops.bench import numerics

pytestmark = pytest.mark.skipif(bool(extension.why_missing()), reason="the extension is not built")


def weight_of(dtype):
    return torch.randn(12, 10).to(dtype)


def test_choices():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x, weight = torch.randn(3, 10).to(dtype), weight_of(dtype)
        with extension.use_linear("own"):
            assert extension.base_product(x, weight) == ops.OWN
            assert extension.base_product(x[:1], weight) == ops.OWN_FORWARD
            assert extension.base_product(x, weight.t().contiguous().t()) == ops.LIBRARY
        with extension.use_linear("library"):
            assert extension.base_product(x, weight) == ops.LIBRARY
    with pytest.raises(ValueError, match=r"choice: wanted one of auto, own, library, got 'fast'"):
        extension.set_linear("fast")
    assert extension.linear_choice() == "auto"


def test_the_choice_ends_with_its_context():
    with pytest.raises(KeyError), extension.use_linear("own"):
        raise KeyError
    assert extension.linear_choice() == "auto"


@pytest.mark.parametrize("vendor", ("amd", "intel", "other"))
def test_limits_by_level_and_vendor(monkeypatch, vendor):
    """Beyond few tokens only where it was measured; a level without measurements has none."""
    monkeypatch.setattr(torch.ops.moelora_ops, "cpu_vendor", lambda: vendor)
    limits = extension._limits("avx512_bf16")
    few = {torch.float32: 64, torch.bfloat16: 16, torch.float16: 64}
    any_number = dict.fromkeys(few, extension.ANY_NUMBER)
    assert limits == (any_number if vendor == "amd" else few)
    assert extension._limits("avx2")[torch.float32] == 16
    assert extension._limits("none") == {}


def test_limits_are_kept(monkeypatch):
    monkeypatch.setattr(extension, "_linear_limits", {torch.float32: 6})
    x, weight = torch.randn(2, 3, 10), weight_of(torch.float32)
    assert extension.base_product(x, weight) == ops.OWN_FORWARD
    assert extension.base_product(x.repeat(2, 1, 1), weight) == ops.LIBRARY
    assert extension.base_product(x.double(), weight.double()) == ops.LIBRARY


def test_environment():
    for value, code, said in (("own", 0, "own\n"), ("", 0, "auto\n"), ("mine", 1, "")):
        done = subprocess.run(
            [sys.executable, "-c",
             "from moelora_ops.backends import extension; print(extension.linear_choice())"],
            capture_output=True, text=True, env=os.environ | {"MOELORA_LINEAR": value},
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (code, said)
    assert "MOELORA_LINEAR: wanted one of auto, own, library, got 'mine'" in done.stderr


def run(layer, x, dy):
    for p in layer.parameters():
        p.grad = None
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    trained = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **trained}


@pytest.mark.parametrize("choice", ("own", "library"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_a_layer_under_either_product(choice, dtype, monkeypatch):
    """The same layer within its budget; backward takes the product that forward took."""
    base = torch.nn.Linear(96, 80)
    reference = moelora_ops.reference.MoLALinear(base, num_experts=4, rank=4, top_k=2)
    torch.nn.init.normal_(reference.lora_up, std=0.1)
    exact = reference.to(dtype).double()
    x, dy = torch.randn(2, 50, 96).to(dtype), torch.randn(2, 50, 80).to(dtype)
    want = run(exact, x.double(), dy.double())
    plain = run(reference.to(dtype), x, dy)
    layer = moelora_ops.fuse(reference)
    calls = []
    for name in ("linear", "linear_backward"):
        operator = getattr(ops, name)
        monkeypatch.setattr(
            autograd.ops, name, lambda *a, n=name, f=operator: (calls.append(n), f(*a))[1]
        )
    with extension.use_linear(choice):
        y = layer(x.clone().requires_grad_())
    y.backward(dy)  # outside: under "auto"
    own = choice == "own"
    assert calls == (["linear", "linear_backward"] if own else [])
    with extension.use_linear(choice):
        got = run(layer, x, dy)
    for name, tensor in got.items():
        error = numerics.error(tensor, want[name])
        limit = numerics.budget(numerics.error(plain[name], want[name]), dtype)
        assert error.rms <= limit.rms and error.max <= limit.max, name
