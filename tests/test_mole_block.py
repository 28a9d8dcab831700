"""MoLE's equations 5-13 to the letter, :class:`MoLEBlock`: sequence by sequence."""

import copy
import math

import pytest
import torch
from moles import NORMALIZATIONS, PADDING, make_loras
from torch import nn

import moelora_ops
from moelora_ops.nn import MoLEBlock


class Attention(nn.Module):
    """A pre-norm transformer block: what eqs. 5-8 are written for."""

    def __init__(self, width=6):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o, self.up = (nn.Linear(width, width) for _ in range(5))

    def forward(self, x, mask=None):
        a = self.norm1(x)
        attend = nn.functional.scaled_dot_product_attention(self.q(a), self.k(a), self.v(a), mask)
        x = x + self.o(attend)
        return x + self.up(self.norm2(x)).tanh(), "cache"


def make_block(**options):
    torch.manual_seed(0)
    block = Attention().double()
    adapters = [
        dict(zip("qkvo", make_loras((2, 1, 3, 2), 6, 6, seed=i), strict=True))
        | {"up": make_loras((2,), 6, 6, seed=10 + i)[0]}
        for i in range(3)
    ]
    layer = MoLEBlock(copy.deepcopy(block), adapters, features=6, length=5, **options)
    nn.init.normal_(layer.gate)
    nn.init.constant_(layer.log_tau, 0.4)
    return block, adapters, layer


def with_weights(block, adapter, merged):
    """The block with each linear's weight replaced by s B A, or that added to it."""
    block = copy.deepcopy(block)
    for name, (a, b, s) in adapter.items():
        linear = getattr(block, name)
        with torch.no_grad():
            linear.weight.mul_(merged).add_(s * b @ a)
            linear.bias.mul_(merged)
    return block


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("experts", ("delta", "merged"))
@pytest.mark.parametrize("length", (5, 3))
def test_the_block_wise_form_is_the_papers_equations(length, experts, normalization):
    block, adapters, layer = make_block(experts=experts, normalization=normalization)
    x = torch.randn(2, length, 6, dtype=torch.float64)
    y, other = layer(x)
    assert other == "cache"
    outputs = [with_weights(block, a, experts == "merged")(x)[0] for a in adapters]
    for i in range(2):  # one sequence after the other
        rows = torch.stack([o[i] for o in outputs])  # [E, L, d]
        if normalization == "l2":
            features = rows / rows.norm()
        elif normalization == "l2_per_expert":
            features = torch.stack([row / row.norm() for row in rows])
        elif normalization == "layernorm":
            features = (rows - rows.mean()) / (rows.var(correction=0) + 1e-5).sqrt()
        else:
            features = rows
        logits = features.flatten() @ layer.gate[:, :length].flatten(0, 2)
        gates = (logits / math.exp(0.4)).softmax(0)
        want = block(x)[0][i] + sum(g * row for g, row in zip(gates, rows, strict=True))
        torch.testing.assert_close(y[i], want)


def test_the_block_trains_its_gate_alone_and_counts_in_the_balance_loss():
    _, _, layer = make_block()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    y, _ = layer(x)
    loss = y.square().sum() + moelora_ops.gating_balance_loss(layer)
    loss.backward()
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"gate", "log_tau"}
    assert layer.gate.grad[:, :4].any() and not layer.gate.grad[:, 4:].any()
    assert layer.routing.rows == 2


def test_the_blocks_gate_does_not_see_padding():
    _, _, layer = make_block()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    attend = PADDING[:, None, :].expand(2, 4, 4)
    with moelora_ops.sequence_mask(layer, PADDING):
        y, _ = layer(x, attend)
        other, _ = layer(x.masked_fill(~PADDING.unsqueeze(-1), 3.0), attend)
    torch.testing.assert_close(other[PADDING], y[PADDING])
    assert (layer(x, attend)[0] - y)[PADDING].abs().max() > 1e-4


def test_bad_blocks():
    block, adapters, layer = make_block()
    for arguments, error, message in (
        (([], 6, 5), ValueError, "adapters: wanted at least one"),
        (([{}], 6, 5), ValueError, "adapters: wanted at least one"),
        (([{"w": adapters[0]["q"]}], 6, 5), ValueError, "adapters: wanted names .*, got w"),
        (
            ([{"norm1": adapters[0]["q"]}], 6, 5),
            TypeError,
            "linears, but norm1 is LayerNorm",
        ),
        (([{"q": make_loras()[0]}], 6, 5), ValueError, r"adapters: q: loras\[0\]: wanted A"),
        ((adapters, 0, 5), ValueError, "features: wanted an int of at least 1"),
        ((adapters, 6, 5.0), ValueError, "length: wanted an int of at least 1"),
        ((adapters, 6, 5, "l1"), ValueError, "normalization: wanted one of"),
        ((adapters, 6, 5, "l2", "sum"), ValueError, "experts: wanted one of"),
    ):
        with pytest.raises(error, match=message):
            MoLEBlock(block, *arguments)
        assert isinstance(block.q, nn.Linear) and block.q.weight.requires_grad
    with pytest.raises(ValueError, match=r"hidden: wanted shape .* at most 5, got \[2, 6, 6\]"):
        layer(torch.randn(2, 6, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match="past_key_values: a gate over the whole sequence"):
        layer(torch.randn(2, 4, 6, dtype=torch.float64), past_key_values=object())
